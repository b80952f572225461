"""What the documents say is so: links lead somewhere, the tree is complete, figures and errors are the code's own."""

import ast
import re
from urllib.parse import unquote

import pytest
from pictures import ROOT

from qwenvl.models import catalog

DOCUMENTS = [
    ROOT / name
    for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "demo/README.md")
]
READMES = DOCUMENTS[:2]
# Several models in one row of the table have the same figures.
ROW = re.compile(r"^\| (\S[^|]*?) \| ([\d.]+) GB \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def names(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_lead_to_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    headings = {anchor(title) for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (document.parent / unquote(target.split("#")[0])).exists(), target


def anchor(title):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_tree_names_every_module():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it works")[1].split("```")[1]
    named = set(re.findall(r"\w+\.py", tree))
    there = {path.name for path in [*(ROOT / "qwenvl").rglob("*.py"), *ROOT.glob("*.py")]}
    assert named == there
    rooms = {path.name for path in (ROOT / "qwenvl").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))


@pytest.mark.parametrize("document", READMES, ids=names)
def test_sizes_of_models_are_the_lists(document):
    sizes = {name: str(model.size) for name, model in catalog.all_models([]).items()}
    rows = ROW.findall(document.read_text(encoding="utf-8"))
    assert len(rows) == 12
    for label, *figures in rows:
        model = re.match(r"[\w.-]+", label, re.ASCII)[0]
        size = next(size for name, size in sizes.items() if name == model or name.startswith(f"{model}-"))
        assert size == "{} GB on disk; in memory none {}, 8bit {}, 4bit {} GB".format(*figures), label


def test_both_languages_give_the_same_speeds():
    rows = [
        re.findall(r"^\|[^|]*\|[^|]*\| [\d.]+ ?[(\uff08].*", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in READMES
    ]
    english, chinese = ([re.findall(r"[\d.]+", row) for row in each] for each in rows)
    assert len(english) == 5
    assert english == chinese


@pytest.mark.parametrize("document", READMES, ids=names)
def test_errors_that_are_explained_are_errors_of_the_code(document):
    messages = re.findall(r"^\| \*([^*].+?)\*", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages) > 8
    said = "\n".join(map(constants, [ROOT / "nodes.py", *sorted((ROOT / "qwenvl").rglob("*.py"))]))
    for message in messages:
        for part in re.split(r"…|\bN\b|\bM\b|4bit|:", message):
            assert part.strip() in said, message


def constants(path):
    """The text of all strings in a file, an f-string's in one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    joined = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant))
    return "\n".join(
        "".join(str(each.value) for each in node.values if isinstance(each, ast.Constant))
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for node in joined
    )
