"""Tells which of the pictures that a run has read are still in memory."""

from __future__ import annotations

import weakref
from typing import Any

from qwenvl.media import media


class PicturesMade:
    """Keeps weak references to all pictures that are made of tensors from now on, in order."""

    def __init__(self, monkeypatch: Any) -> None:
        self._made: list[weakref.ref[Any]] = []
        real = media.pictures

        def pictures(images: Any) -> Any:
            found = real(images)
            self._made.extend(map(weakref.ref, found))
            return found

        monkeypatch.setattr(media, "pictures", pictures)

    def alive(self) -> list[int]:
        """Return the numbers of those that are still in memory."""
        return [number for number, picture in enumerate(self._made) if picture() is not None]
