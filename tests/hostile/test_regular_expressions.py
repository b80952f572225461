"""No text costs a regular expression of the pack more than its length: each is given the worst input of its alphabet.

Python's engine holds the interpreter while it matches, so one that grows with the square of a text would stop ComfyUI.
"""

import ast
import fnmatch
import importlib
import re

import pytest
from counted_matching import growth
from pictures import ROOT

from qwenvl.loading import consistency

FILES = [*sorted((ROOT / "qwenvl").rglob("*.py")), *(ROOT / name for name in ("nodes.py", "install.py", "__init__.py"))]
ANCHORED = {"match", "fullmatch"}
FUNCTIONS = {*ANCHORED, "compile", "search", "sub", "subn", "split", "findall", "finditer"}
# What is made of something else while the pack runs -> how it may look.
MADE = {
    "re.escape(written) + '(?![\\\\w.-])'": [re.escape("/home/somebody") + r"(?![\w.-])"],
    "pattern": list(consistency._BESIDE),
    "f'\\\\b{name}\\\\b'": [r"\btop_k\b"],
    "'[\\\\\\\\/]' if windows else '/'": [r"[\\/]", "/"],
    "re.escape(key)": [re.escape("sk-aaaa+aaaa")],
    "fnmatch.translate(pattern or '*')": [fnmatch.translate(glob) for glob in ("*a*a*ab", "?*[!a]*x", "**[a-c]**")],
}
# Of those that get no name in their module: what is only held against whole texts.
WHOLE = {"fnmatch.translate(pattern or '*')"}


class Call:
    """A call of re: where, what, and the name that a compiled pattern gets."""

    def __init__(self, file, node, names):
        self.file, self.node, self.names = file, node, names
        self.first = ast.unparse(node.args[0])
        self.where = f"{file.relative_to(ROOT)}:{node.lineno}"

    def patterns(self):
        if self.names:
            name = ".".join(self.file.relative_to(ROOT).with_suffix("").parts)
            return [
                pattern for name_ in self.names for pattern in compiled(getattr(importlib.import_module(name), name_))
            ]
        if isinstance(self.node.args[0], ast.Constant):
            return [re.compile(self.node.args[0].value, self.flags())]
        return [re.compile(pattern, self.flags()) for pattern in MADE[self.first]]

    def flags(self):
        given = [*self.node.args[1:], *(keyword.value for keyword in self.node.keywords)]
        named = [node.attr for part in given for node in ast.walk(part) if isinstance(node, ast.Attribute)]
        return sum(int(getattr(re, name)) for name in named if isinstance(getattr(re, name, None), re.RegexFlag))

    def anchored(self, uses):
        if self.names:
            return all(uses.get(name, {"otherwise"}) <= ANCHORED for name in self.names)
        return self.node.func.attr in ANCHORED or self.first in WHOLE


def compiled(value):
    """The patterns that a name of a module stands for."""
    values = value.values() if isinstance(value, dict) else [value]
    return [item for item in values if isinstance(item, re.Pattern)]


def calls():
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named = {}
        for statement in tree.body:
            if isinstance(statement, ast.Assign):
                names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
                named |= {id(node): names for node in ast.walk(statement)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_of_re(node.func):
                yield Call(file, node, named.get(id(node)))


def is_of_re(func):
    of_re = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "re"
    return of_re and func.attr in FUNCTIONS


def uses():
    """By the name of a compiled pattern: its methods that are called, "otherwise" where it is handed on."""
    found = {}
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        owners = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name and name.strip("_").isupper() and not isinstance(node.ctx, ast.Store):
                owner = owners.get(id(node))
                found.setdefault(name, set()).add(owner.attr if owner else "otherwise")
    return found


CALLS, USES = list(calls()), uses()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.where)
def test_twice_the_text_takes_twice_the_steps(call):
    patterns = call.patterns()
    assert patterns, f"{call.where}: how may {call.first} look? Say so in MADE."
    for pattern in patterns:
        times, (head, word, end) = growth(pattern, call.anchored(USES))
        assert times < 2.6, f"{pattern.pattern}: {head!r} + {word!r} * n + {end!r} takes {times:.1f} times as long"


@pytest.mark.parametrize(
    ("pattern", "linear"),
    [
        (r"<[^>]*>", False),
        (r"<[^<>]*>", True),
        (r"(a+)+b", False),
        (r"(?:a|aa)*b", False),
        (r"a*a*b", False),
        (r"\s+$", False),
        (r"\bmodel\b.*(?:x|y)", False),
        (r"\bmodel\b.{0,400}(?:x|y)", True),
        (r"[a-z]{1,90}x", True),
        (r"\[\s*(a)\s*\]", True),
        (r"\d+\.\d+", False),
    ],
)
def test_what_is_known_to_be_slow_is_found(pattern, linear):
    assert (growth(re.compile(pattern), anchored=False)[0] < 2.6) == linear


def test_every_way_to_use_re_is_looked_at():
    """Nothing of re is imported by name, and no other engine for patterns is there."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("re", "regex"), file
            if isinstance(node, ast.Import):
                assert not [
                    alias for alias in node.names if alias.name == "regex" or (alias.name == "re" and alias.asname)
                ]


def test_the_pages_scripts_use_none():
    result = re.compile(r"RegExp|\.(?:match|matchAll|search|replaceAll)\(|[(=,:?]\s?/[^/*\s]|(?:split|replace)\(/")
    for file in sorted((ROOT / "web").glob("*.js")):
        code = "\n".join(line.partition(" // ")[0] for line in file.read_text(encoding="utf-8").splitlines())
        code = re.sub(r"\"[^\"\n]*\"|`[^`]*`", '""', code)
        assert not result.search(code), f"{file.name}: {result.search(code)}"
