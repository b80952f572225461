"""Versions as numbers that can be compared. Needs packaging, which transformers needs too."""

from __future__ import annotations

from packaging.version import Version


def release(version: str | None) -> tuple[int, ...]:
    """2.9.1+cu128 -> (2, 9, 1), 5.2.0.dev0 -> (5, 2, 0); (0,) of what is none, as a broken installation may have."""
    try:
        # HIP puts a hash behind a hyphen, which no version may have there.
        return Version((version or "").partition("-")[0]).release
    except ValueError:
        return (0,)
