"""Matches regular expressions as Python's own engine does, and counts the steps that an input costs.

Steps are counted instead of time: a pattern is linear if twice the input takes twice the steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, product

try:
    from re import _constants as c
    from re import _parser as parser
except ImportError:  # before Python 3.11
    import sre_constants as c
    import sre_parse as parser

# Characters that classes tell apart, beside those that a pattern names.
_OTHERS = "a0 \n_-.<\x00é"
_NEVER = "\x00"
# What takes one character.
SINGLE = (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN)
# There is none before Python 3.11.
ATOMIC = getattr(c, "ATOMIC_GROUP", None)


class TooManyStepsError(Exception):
    """Matching took more steps than allowed."""


def small(pattern: re.Pattern[str], most: int = 3) -> Program:
    """Cut a pattern's finite bounds to a few, so that its growth shows on short inputs."""
    return Program(pattern, most)


class Program:
    """A pattern whose matching is counted.

    Args:
        most: the largest finite bound, to which larger ones are cut; None keeps all.
    """

    def __init__(self, pattern: re.Pattern[str], most: int | None = None) -> None:
        self._most = most
        self._flags = pattern.flags
        self.nodes = list(parser.parse(pattern.pattern, pattern.flags))
        self._steps = self._allowed = 0
        self._text = ""
        self._taken: dict[tuple, bool] = {}

    def steps(self, text: str, anchored: bool, allowed: int = 1_000_000) -> int:
        """Return how many steps it takes to find every match or, anchored, one of the whole text."""
        self._text, self._steps, self._allowed = text, 0, allowed
        at = 0
        while at <= len(text):
            # Anchored, every way to match is gone through, as a match that ends early is none.
            ends = (end for end in self._sequence(self.nodes, 0, at, {}) if not anchored or end == len(text))
            end = next(ends, None)
            if anchored:
                break
            at = end if end is not None and end > at else at + 1
        return self._steps

    def _step(self) -> None:
        self._steps += 1
        if self._steps > self._allowed:
            raise TooManyStepsError

    def _sequence(self, nodes, index, at, groups) -> Iterator[int]:
        if index == len(nodes):
            yield at
            return
        for end in self._node(nodes[index], at, groups):
            yield from self._sequence(nodes, index + 1, end, groups)

    def _node(self, node, at, groups) -> Iterator[int]:
        """Find the places at which the text may go on behind the node."""
        operator, given = node
        self._step()
        if operator in SINGLE:
            return iter([at + 1] if at < len(self._text) and self.takes(node, self._text[at]) else [])
        if operator in (c.MAX_REPEAT, c.MIN_REPEAT):
            return self._repeat(given, at, groups, operator is c.MIN_REPEAT)
        if operator in (c.ASSERT, c.ASSERT_NOT):
            return iter([at] if self._looks(given, at, groups) == (operator is c.ASSERT) else [])
        if operator is ATOMIC:
            return islice(self._sequence(given, 0, at, groups), 1)
        return {c.BRANCH: self._branch, c.SUBPATTERN: self._group, c.AT: self._place, c.GROUPREF: self._again}[
            operator
        ](given, at, groups)

    def _branch(self, given, at, groups) -> Iterator[int]:
        for branch in given[1]:
            yield from self._sequence(branch, 0, at, groups)

    def _group(self, given, at, groups) -> Iterator[int]:
        number, add, drop, inner = given
        outside, inside = self._flags, (self._flags | add) & ~drop
        self._flags = inside
        for end in self._sequence(inner, 0, at, groups):
            groups[number] = (at, end)
            self._flags = outside
            yield end
            self._flags = inside
        self._flags = outside

    def _place(self, given, at, groups) -> Iterator[int]:
        return iter([at] if self._stands(given, at) else [])

    def _again(self, given, at, groups) -> Iterator[int]:
        start, end = groups.get(given, (0, 0))
        return iter([at + end - start] if self._text.startswith(self._text[start:end], at) else [])

    def _repeat(self, given, at, groups, lazy) -> Iterator[int]:
        low, high, inner = given
        if self._most is not None:
            low, high = min(low, self._most - 1), high if high is c.MAXREPEAT else min(high, self._most)
        limit = len(self._text) + 1 if high is c.MAXREPEAT else high
        single = len(inner) == 1 and inner[0][0] in SINGLE
        if single and not lazy:
            end = at
            while end - at < limit and end < len(self._text) and self.takes(inner[0], self._text[end]):
                self._step()
                end += 1
            for place in range(end, at + low - 1, -1):
                self._step()
                yield place
            return
        yield from self._times(inner, at, groups, low, limit, lazy)

    def _times(self, inner, at, groups, low, left, lazy) -> Iterator[int]:
        self._step()
        if lazy and low <= 0:
            yield at
        if left > 0:
            for end in self._sequence(inner, 0, at, groups):
                if end > at:
                    yield from self._times(inner, end, groups, low - 1, left - 1, lazy)
        if not lazy and low <= 0:
            yield at

    def takes(self, node, character: str) -> bool:
        self._step()
        operator, given = node
        key = (operator, id(given), character, self._flags)
        if key not in self._taken:
            self._taken[key] = self._accepts(operator, given, character)
        return self._taken[key]

    def _accepts(self, operator, given, character: str) -> bool:
        if operator is c.ANY:
            return character != "\n" or bool(self._flags & re.DOTALL)
        alike = {character}
        if self._flags & re.IGNORECASE:
            alike |= {character.lower(), character.upper()}
        if operator is c.LITERAL:
            return chr(given) in alike
        if operator is c.NOT_LITERAL:
            return chr(given) not in alike
        negate = given[0][0] is c.NEGATE
        return negate != any(_within(item, entry) for item in given for entry in alike)

    def _stands(self, where, at) -> bool:
        text = self._text
        before, behind = at > 0 and _is_word(text[at - 1]), at < len(text) and _is_word(text[at])
        lines = bool(self._flags & re.MULTILINE)
        return {
            c.AT_BEGINNING: at == 0 or (lines and text[at - 1] == "\n"),
            c.AT_BEGINNING_STRING: at == 0,
            c.AT_END: at == len(text) or text[at:] == "\n" or (lines and text[at : at + 1] == "\n"),
            c.AT_END_STRING: at == len(text),
            c.AT_BOUNDARY: before != behind,
            c.AT_NON_BOUNDARY: before == behind,
        }[where]

    def _looks(self, given, at, groups) -> bool:
        direction, inner = given
        if direction > 0:
            return next(self._sequence(inner, 0, at, groups), None) is not None
        start = at - inner.getwidth()[0]
        return start >= 0 and any(end == at for end in self._sequence(inner, 0, start, groups))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _within(item, character: str) -> bool:
    operator, given = item
    if operator is c.LITERAL:
        return ord(character) == given
    if operator is c.RANGE:
        return given[0] <= ord(character) <= given[1]
    if operator is not c.CATEGORY:
        return False
    tests = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
    name = str(given).removeprefix("CATEGORY_")
    return tests[name.removeprefix("NOT_")](character) != name.startswith("NOT_")


def inputs(pattern: re.Pattern[str], most_words: int = 250) -> list[tuple[str, str, str]]:
    """Return (beginning, repeated part, end) of the inputs that may be the worst for a pattern."""
    program = small(pattern)
    alphabet = _alphabet(program)
    heads = list(dict.fromkeys(["", *_heads(program, program.nodes, "", alphabet)]))
    examples = [head for head in heads if head]
    words = [*alphabet, *examples, *map("".join, product(alphabet, repeat=2))]
    words += [f"{example}{letter}" for example in examples for letter in alphabet]
    words = list(islice(dict.fromkeys(words), most_words))
    plain = [("", word, end) for word in words for end in ("", _NEVER)]
    return plain + [(head, word, _NEVER) for head in examples[:12] for word in [*alphabet, head]]


def _alphabet(program: Program) -> list[str]:
    """Return one character for each set of the pattern's parts that accept it."""
    atoms = list(_atoms(program.nodes))
    letters = [chr(given) for operator, given in atoms if operator in (c.LITERAL, c.NOT_LITERAL)]
    letters += [
        chr(given) for operator, items in atoms if operator is c.IN for name, given in items if name is c.LITERAL
    ]
    by_taken: dict[tuple[bool, ...], str] = {}
    program._allowed = 1 << 60
    for letter in [*letters, *_OTHERS]:
        by_taken.setdefault((_is_word(letter), *(program.takes(atom, letter) for atom in atoms)), letter)
    return list(by_taken.values())[:16]


def _atoms(nodes) -> Iterator:
    for operator, given in nodes:
        if operator in SINGLE:
            yield operator, given
        for inner in _within_node(operator, given):
            yield from _atoms(inner)


def _within_node(operator, given) -> list:
    if operator is c.BRANCH:
        return given[1]
    if operator is c.SUBPATTERN:
        return [given[3]]
    if operator in (c.MAX_REPEAT, c.MIN_REPEAT):
        return [given[2]]
    if operator is ATOMIC:
        return [given]
    return [given[1]] if operator in (c.ASSERT, c.ASSERT_NOT) else []


def _heads(program, nodes, before, alphabet) -> Iterator[str]:
    """Find texts that lead to each part of a sequence, and through all of it."""
    for node in nodes:
        if node[0] is c.BRANCH:
            for branch in node[1][1]:
                yield from _heads(program, branch, before, alphabet)
        elif node[0] in (c.SUBPATTERN, ATOMIC):
            yield from _heads(program, _within_node(*node)[0], before, alphabet)
        elif node[0] in (c.MAX_REPEAT, c.MIN_REPEAT):
            yield before
            yield from _heads(program, node[1][2], before, alphabet)
        before += _example(program, [node], alphabet)
    yield before


def _example(program, nodes, alphabet) -> str:
    """Return a short text that the nodes accept, leaving out assertions."""
    text = ""
    for operator, given in nodes:
        if operator in SINGLE:
            text += next((letter for letter in alphabet if program.takes((operator, given), letter)), "a")
        elif operator is c.BRANCH:
            text += _example(program, given[1][0], alphabet)
        elif operator is c.SUBPATTERN:
            text += _example(program, given[3], alphabet)
        elif operator is ATOMIC:
            text += _example(program, given, alphabet)
        elif operator in (c.MAX_REPEAT, c.MIN_REPEAT):
            text += _example(program, given[2], alphabet) * max(1, min(given[0], 3))
    return text


# How often what is repeated stands in the inputs: to find the worst of them, and to tell how they grow.
FEW, MANY, ALLOWED = (8, 16), (40, 80), 150_000


def growth(pattern: re.Pattern[str], anchored: bool) -> tuple[float, tuple[str, str, str]]:
    """Return the factor in steps for twice the worst input (2 is linear, 4 quadratic), and that input."""
    program = small(pattern)

    def steps(given: tuple[str, str, str], times: int) -> float:
        head, word, end = given
        try:
            return program.steps(head + word * times + end, anchored, ALLOWED)
        except (TooManyStepsError, RecursionError):
            return float("inf")

    excess = {}
    for text in inputs(pattern):
        more = steps(text, FEW[1])
        if more == float("inf"):
            return more, text
        excess[text] = (more - 2 * steps(text, FEW[0])) / len(text[1])
    worst = sorted(excess, key=excess.__getitem__, reverse=True)[:10]
    return max((steps(entry, MANY[1]) / min(ALLOWED, steps(entry, MANY[0])), entry) for entry in worst)
