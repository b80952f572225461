"""An engine's key, and taking it out of what is told: plain, escaped, or encoded. Standard library only."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator

from ..prompting.answer import certain

MASK = "***"
# How JSON, addresses, HTML and Python write a character otherwise.
_ESCAPED = re.compile(
    r"%([0-9A-Fa-f]{2})|\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|&#[xX]([0-9A-Fa-f]{1,6});"
    r"|&#([0-9]{1,7});|\\([\\/\"'])|(&(?:amp|quot|apos|lt|gt);)"
)
# One may be written within another: a JSON text in a JSON text, an address in an address.
_MOST_LAYERS = 3
# A name and a password before the host of an address.
_LOGIN = re.compile(r"(?<=://)[^\s/@]{1,400}@")
# Letters that engines may write in another case, and the second alphabet of base64.
_ALIKE = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ-_", "abcdefghijklmnopqrstuvwxyz+/")
# A shorter text may be a part of any other.
_SHORTEST_CODE, _SHORTEST_PART = 8, 4
# Keys of words that somebody made up, where an engine wants any: "lm-studio", "not-needed".
_SHORTEST_SECRET = 12


class Secret:
    """A key that must not be told.

    Args:
        key: "" where there is none.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        # Answers speak of "ollama" and "token", but of no text with figures in it that is as long as a key.
        self._in_answers = len(key) >= _SHORTEST_SECRET and any(each.isdigit() for each in key)
        self._plain = re.compile(re.escape(key), re.IGNORECASE) if key else None
        self._codes = list(dict.fromkeys(_codes(key))) if len(key) >= _SHORTEST_CODE else []

    def hidden(self, words: str) -> str:
        """What somebody said, with *** for the key in every form, for its beginning at the end, and for logins. Pure.

        Args:
            words: bounded in length: this takes a few microseconds for each character.
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
        """A finished sentence: the words of others in it, once more and as they stand there. Pure."""
        return self.hidden(sentence) if self._codes else sentence

    def certain(self, text: str) -> str:
        """Of an answer while it comes: without the key, and without an end that may be its beginning. Pure."""
        return certain(self.hidden_answer(text), (self._key,)) if self._in_answers else text

    def hidden_answer(self, text: str) -> str:
        """Of an answer: with *** for the key. Pure."""
        return self._plain.sub(MASK, text) if self._in_answers and self._plain else text


class _Layer:
    """A text without its white space, which remembers where each character was written.

    Args:
        places: of each character, where it begins and ends in the text as it was written.
    """

    def __init__(self, text: str, places: list[tuple[int, int]]) -> None:
        solid = [at for at, each in enumerate(text) if not each.isspace()]
        self.text = "".join(text[at] for at in solid).translate(_ALIKE)
        self._places = [places[at] for at in solid]

    def find(self, code: str) -> Iterator[tuple[int, int]]:
        """Where the code stands in the text as it was written, and where its beginning stands at the end of it."""
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
    """The text as it stands, without its escapes, and without those that were within them."""
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
    """The one that is written otherwise."""
    *hexadecimal, decimal, quoted, named = found.groups()
    if quoted or named:
        return quoted or html.unescape(named)
    number = int(decimal) if decimal else int(next(filter(None, hexadecimal)), 16)
    # No key has others.
    return chr(number) if number < 128 else "\ufffd"


def _codes(key: str) -> Iterator[str]:
    """The key, and what it looks like in base64 and as hexadecimal digits, as a layer writes them."""
    # What looks like an escape in the key itself is taken for one too.
    yield from (layer.text for layer in _layers(key) if len(layer.text) >= _SHORTEST_CODE)
    content = key.encode()
    yield content.hex()
    for before in range(3):
        # Of what stands before and behind it, there are bits in the first and in the last character.
        start, end = -(-before * 8 // 6), (before + len(content)) * 8 // 6
        yield base64.b64encode(b"\0" * before + content + b"\0\0").decode().translate(_ALIKE)[start:end]
