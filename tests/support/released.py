"""Tells which of the pictures that a run has read are still in memory."""

from __future__ import annotations

import weakref
from typing import Any

from qwenvl.media import media


class PicturesMade:
    """Keeps weak references to all pictures that are read from now on; several threads read, so in any order."""

    def __init__(self, monkeypatch: Any) -> None:
        self._made: list[weakref.ref[Any]] = []
        real = media.pictures

        def pictures(images: Any) -> Any:
            found = real(images)
            self._made.extend(map(weakref.ref, found))
            return found

        monkeypatch.setattr(media, "pictures", pictures)

    def alive(self) -> list[int]:
        """Return the widths of those that are still in memory."""
        return [picture.width for made in self._made if (picture := made()) is not None]
