"""Takes an engine's key out of messages and answers: plain, escaped, or encoded. Standard library only."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator

from ..prompting.answer import certain

MASK = "***"
# Escapes of a character in JSON, addresses, HTML and Python.
_ESCAPED = re.compile(
    r"%([0-9A-Fa-f]{2})|\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|&#[xX]([0-9A-Fa-f]{1,6});"
    r"|&#([0-9]{1,7});|\\([\\/\"'])|(&(?:amp|quot|apos|lt|gt);)"
)
# Escapes may be nested: a JSON text in a JSON text, an address in an address.
_MOST_LAYERS = 3
# A name and a password before the host in an address.
_LOGIN = re.compile(r"(?<=://)[^\s/@]{1,400}@")
# Makes capitals small, since engines may change the case, and joins the two alphabets of base64.
_ALIKE = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ-_", "abcdefghijklmnopqrstuvwxyz+/")
# A shorter key, or beginning of a key, may be a part of any text.
_SHORTEST_CODE, _SHORTEST_PART = 8, 4
# Shorter keys may be ordinary words, made up for an engine that takes any key: "lm-studio", "not-needed".
_SHORTEST_SECRET = 12


class Secret:
    """A key that must not be shown.

    Args:
        key: "" if the engine needs no key.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        # Answers may contain "ollama" or "token", but by chance no text with digits in it that is as long as a key.
        self._in_answers = len(key) >= _SHORTEST_SECRET and any(character.isdigit() for character in key)
        self._plain = re.compile(re.escape(key), re.IGNORECASE) if key else None
        self._codes = list(dict.fromkeys(_codes(key))) if len(key) >= _SHORTEST_CODE else []

    def hidden(self, words: str) -> str:
        """Replace by *** the key in every form, a beginning of it at the text's end, and logins in addresses. Pure.

        Args:
            words: the text. It must be bounded in length: each character takes a few microseconds.
        """
        words = _LOGIN.sub(f"{MASK}@", words)
        if self._plain is not None:
            words = self._plain.sub(MASK, words)
        if not self._codes:
            return words
        spans = sorted(span for layer in _layers(words) for code in self._codes for span in layer.find(code))
        parts, end = [], 0
        for start, stop in spans:
            if stop > end:
                parts += [words[end : max(start, end)], MASK if start >= end else ""]
                end = stop
        return "".join([*parts, words[end:]])

    def hidden_sentence(self, sentence: str) -> str:
        """Hide the key in a complete message: what it quotes was hidden before, but not as it stands there. Pure."""
        return self.hidden(sentence) if self._codes else sentence

    def certain(self, text: str) -> str:
        """Return an unfinished answer without the key, and without an end that may be the key's beginning. Pure."""
        return certain(self.hidden_answer(text), (self._key,)) if self._in_answers else text

    def hidden_answer(self, text: str) -> str:
        """Replace the key in an answer by ***. Pure."""
        return self._plain.sub(MASK, text) if self._in_answers and self._plain else text


class _Layer:
    """A text without its white space that remembers each character's place in the original.

    Args:
        places: for each character, where it begins and ends in the original text.
    """

    def __init__(self, text: str, places: list[tuple[int, int]]) -> None:
        solid = [at for at, character in enumerate(text) if not character.isspace()]
        self.text = "".join(text[at] for at in solid).translate(_ALIKE)
        self._places = [places[at] for at in solid]

    def find(self, code: str) -> Iterator[tuple[int, int]]:
        """Yield the spans, in the original text, of the code, and of a beginning of it at the text's end."""
        at = self.text.find(code)
        while at >= 0:
            end = at + len(code)
            yield self._span(at, end)
            at = self.text.find(code, end)
        for size in range(min(len(code) - 1, len(self.text)), _SHORTEST_PART - 1, -1):
            if self.text.endswith(code[:size]):
                yield self._span(len(self.text) - size, len(self.text))
                return

    def _span(self, start: int, end: int) -> tuple[int, int]:
        return self._places[start][0], self._places[end - 1][1]


def _layers(text: str) -> Iterator[_Layer]:
    """Yield the text as it stands, then with its escapes replaced, then with the escapes inside those replaced."""
    places = [(at, at + 1) for at in range(len(text))]
    yield _Layer(text, places)
    for _ in range(_MOST_LAYERS):
        parts, kept, end = [], [], 0
        for found in _ESCAPED.finditer(text):
            parts += [text[end : found.start()], _character(found)]
            kept += [*places[end : found.start()], (places[found.start()][0], places[found.end() - 1][1])]
            end = found.end()
        if not end:
            return
        text, places = "".join([*parts, text[end:]]), [*kept, *places[end:]]
        yield _Layer(text, places)


def _character(found: re.Match[str]) -> str:
    """Return the character that an escape stands for."""
    *hexadecimal, decimal, quoted, named = found.groups()
    if quoted or named:
        return quoted or html.unescape(named)
    number = int(decimal) if decimal else int(next(filter(None, hexadecimal)), 16)
    # Keys are ASCII, so other characters do not matter.
    return chr(number) if number < 128 else "\ufffd"


def _codes(key: str) -> Iterator[str]:
    """Yield the key, and its forms in base64 and hexadecimal digits, written as in a _Layer."""
    # The layers of the key, in case it holds something that looks like an escape.
    yield from (layer.text for layer in _layers(key) if len(layer.text) >= _SHORTEST_CODE)
    content = key.encode()
    yield content.hex()
    for before in range(3):
        # The first and the last character are cut off: they hold bits of what stands before and behind the key.
        start, end = -(-before * 8 // 6), (before + len(content)) * 8 // 6
        yield base64.b64encode(b"\0" * before + content + b"\0\0").decode().translate(_ALIKE)[start:end]
