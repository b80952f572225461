"""The words of the page's scripts: each is found where it is said, and its translation keeps what stands in braces."""

import json
import re
import shutil
import subprocess

import node_texts
import page_words
import pytest

WORDS = re.compile(r"\{\w+\}")
EVERY_CALL = re.compile(r"\bword\(")


def test_words_are_found_in_the_scripts():
    assert {"Unload", "QwenVL models", "Refused ({status})"} <= page_words.english()


@pytest.mark.parametrize("script", page_words.scripts(), ids=lambda script: script.name)
def test_every_word_stands_in_its_call_as_one_plain_string(script):
    code = page_words._code(script)
    said = len(EVERY_CALL.findall(code.replace("function word(", "")))
    assert said == len(page_words._CALL.findall(code))


def test_choices_that_are_words_are_those_of_the_nodes(pack):
    """And nothing that no list offers."""
    offered = set()
    for node in pack.NODE_CLASS_MAPPINGS.values():
        groups = node.INPUT_TYPES()
        inputs = {**groups["required"], **groups.get("optional", {})}
        known = {name: kind for name, (kind, _) in inputs.items() if isinstance(kind, list)}
        offered |= {name for name in known if name not in ("model", "attention_mode")}
        for name in known.keys() & node_texts.choices().keys() - {"device"}:
            assert set(node_texts.choices()[name]) <= set(known[name])
    assert offered == node_texts.choices().keys()


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_a_tooltip_calls_a_choice_what_the_list_does(language):
    result = json.loads(node_texts.file(language).read_text(encoding="utf-8"))
    meanings = node_texts.meanings(language)
    tooltip = result["QwenVL"]["inputs"]["image_mode"]["tooltip"]
    for choice in ("together", "one answer per image"):
        assert f"{meanings[choice]} ({choice})" in tooltip
    assert f"{meanings['all GPUs and CPU']} (all GPUs and CPU)" in result["QwenVL"]["inputs"]["device"]["tooltip"]


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_no_two_choices_of_a_list_are_called_the_same(language):
    meanings = node_texts.meanings(language)
    for offered in node_texts.choices().values():
        assert len({meanings.get(entry, entry) for entry in offered}) == len(offered)


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_what_stands_in_braces_stands_in_the_translation(language):
    for english, said in json.loads(page_words.FILE.read_text(encoding="utf-8"))[language].items():
        assert set(WORDS.findall(said)) == set(WORDS.findall(english)), english


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_a_note_keeps_what_is_bold(language):
    said = json.loads(page_words.FILE.read_text(encoding="utf-8"))[language]
    for english in page_words.of_templates():
        assert said[english].count("**") == english.count("**"), english
        assert "{" not in said[english]


TRY = """
const { readFileSync } = await import("node:fs");
globalThis.fetch = async () => ({ ok: OK, json: async () => JSON.parse(readFileSync(process.argv[1], "utf-8")) });
const { word } = await import("data:text/javascript," + encodeURIComponent(CODE));
console.log(JSON.stringify([word("Unload"), word("Refused ({status})", { status: 403 }), word("no such {word}")]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize(
    ("language", "is_there", "said"),
    [
        ("de", True, ["Entladen", "Abgelehnt (403)", "no such {word}"]),
        ("en", True, ["Unload", "Refused (403)", "no such {word}"]),
        ("pt", True, ["Unload", "Refused (403)", "no such {word}"]),
        ("de", False, ["Unload", "Refused (403)", "no such {word}"]),
    ],
)
def test_a_word_is_said_in_the_language_of_the_page(language, is_there, said):
    code = (page_words.FOLDER / "words.js").read_text(encoding="utf-8")
    app = f'const app = {{ extensionManager: {{ setting: {{ get: () => "{language}" }} }} }};'
    code = re.sub(r"^import .*$", app, code, count=1, flags=re.MULTILINE)
    code = code.replace('new URL("words.json", import.meta.url)', '"words.json"')
    script = TRY.replace("CODE", json.dumps(code)).replace("OK", str(is_there).lower())
    command = ["node", "--input-type=module", "-e", script, str(page_words.FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout or "null") == said, done.stderr
