"""Who looks on while an answer is made. Standard library only."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Who looks on while an answer is made: ComfyUI's node, or the terminal."""

    def check(self) -> None:
        """Raise to cancel."""

    def report(self, done: int, total: int, text: str) -> None:
        """While a model is downloaded: how many of how many bytes are there, and a line that says so."""

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """After every token: how many there are, the answer so far, and the thought before it. Raise to cancel."""

    def advance(self, done: int, total: int | None, text: str) -> None:
        """The same with many answers: how many are finished of how many (None: nobody knows), and the latest."""

    def end(self, text: str) -> None:
        """Once, with the final answer."""


class Nobody:
    """A watch that looks at nothing and never cancels."""

    def check(self) -> None: ...

    def report(self, done: int, total: int, text: str) -> None: ...

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None: ...

    def advance(self, done: int, total: int | None, text: str) -> None: ...

    def end(self, text: str) -> None: ...
