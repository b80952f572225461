"""The doctor's first step: which packages are not installed. It imports none of them itself."""

from __future__ import annotations

from collections.abc import Callable

from ..packages import NEEDED, missing


def examine(model: str, say: Callable[[str], None]) -> bool:
    """Print which packages are not installed, and then the report of doctor.py, if that can be imported.

    Returns:
        False if something grave was found.
    """
    lacks = missing()
    for module, lack in lacks.items():
        say(f"critical: {lack.what}: {NEEDED[module][1]}. To mend it: {lack.command()}")
    try:
        from . import doctor
    except ModuleNotFoundError:
        if not lacks:
            raise
        say("the rest of the report needs what is missing")
        return False
    return doctor.examine(model, say, complete=not lacks) and not lacks
