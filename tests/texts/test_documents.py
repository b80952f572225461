"""What the documents name is there: files, headings, programs, flags. Nothing is said twice."""

import re
import shlex
from collections import Counter
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from urllib.parse import unquote

import pytest
from pictures import ROOT

from qwenvl import __main__ as command_line

README, CHINESE = READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "demo/README.md", "benchmarks/README.md")
DOCUMENTS = [*READMES, *PAGES, *(ROOT / name for name in OTHERS)]
MOST_WORDS = 1300
COMFYUIS = ("--cpu", "--listen", "--lowvram", "--highvram", "--disable-smart-memory", "--enable-cors-header")
# What begins a path of the checkout in a text.
FOLDERS = "qwenvl|tests|benchmarks|demo|web|locales|example_workflows|docs"


def names(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return path.read_text(encoding="utf-8")


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=names)


def test_a_readme_is_short():
    assert len(re.findall(r"\S*\w\S*", read(README))) <= MOST_WORDS


def test_every_page_is_linked_in_both_languages():
    for document in READMES:
        linked = {target.split("#")[0] for target in links(read(document))}
        assert {f"docs/{page.name}" for page in PAGES} <= linked


@each_document
def test_links_lead_to_files_and_headings(document):
    for target in links(read(document)):
        if "://" not in target:
            name, _, heading = target.partition("#")
            file = document.parent / unquote(name) if name else document
            assert file.exists(), target
            assert not heading or heading in headings(file), target


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def headings(file):
    return {anchor(title) for title in re.findall(r"^#+ (.*)", read(file), re.MULTILINE)}


def anchor(title):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@each_document
def test_files_and_programs_that_are_named_are_there(document):
    text = read(document)
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", text):
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"python3? -m ((?:benchmarks|qwenvl)[\w.]*)", text):
        assert find_spec(module.rstrip(".")), module


@pytest.fixture(scope="module")
def flags():
    """The flags of each command, by its first word; of the question by \"\"."""
    return {command: shown_flags(*filter(None, [command])) for command in ("", *command_line.COMMANDS)}


def shown_flags(*command):
    with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit):
        command_line.main([*command, "--help"])
    return set(re.findall(r"--[a-z-]+", shown.getvalue()))


@pytest.mark.parametrize("document", [*READMES, *PAGES], ids=names)
def test_commands_and_flags_are_those_of_the_command_line(document, flags):
    text = read(document)
    for line in re.findall(r"python -m qwenvl ([^`\n]*)", text):
        words = shlex.split(line)
        command = words[0] if words[0] in flags else ""
        assert {word for word in words if word.startswith("--")} <= flags[command], line
    known = {*COMFYUIS, *(flag for one_flag in flags.values() for flag in one_flag)}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


def test_no_sentence_stands_twice():
    written = Counter(sentence for document in (README, *PAGES) for sentence in sentences(read(document)))
    assert [sentence for sentence, times in written.items() if times > 1] == []


def sentences(text):
    """Sentences and cells of 8 words or more, without code and without the errors that are explained."""
    text = re.sub(r"```.*?```|^\| \*.*?(?=\|)", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|[*`\[\]!]", "", text)
    text = re.sub(r"\n(?=\s*(?:[-|#]|\d\.))", "\n\n", text)
    for part in re.split(r"\n\s*\n|\|", text):
        for sentence in re.split(r"(?<=[.:;?!])\s+", " ".join(part.split())):
            if len(re.findall(r"[A-Za-z]+", sentence)) >= 8:
                yield sentence.strip(" .:;-").lower()


def test_the_tree_names_every_file_and_no_other():
    assert set(tree()) == {
        names(path)
        for path in (*ROOT.glob("*.py"), *(ROOT / "qwenvl").rglob("*.py"), *(ROOT / "web").glob("*.js"))
        if path.name != "__init__.py" or path.parent == ROOT
    }


def tree():
    """The files of the tree, by their paths."""
    room, drawn = "", read(ROOT / "docs/how-it-works.md").split("## Rooms and files")[1].split("```")[1]
    for indent, name in re.findall(r"^( *)(\S+)(?: |$)", drawn, re.MULTILINE):
        above = room.split("/")[: len(indent) // 2]
        if name.endswith("/"):
            room = "/".join([*above, name[:-1]])
        else:
            yield "/".join([*above, name])
