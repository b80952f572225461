"""The doctor's first look: which packages are not installed. It needs none of them itself."""

from __future__ import annotations

from collections.abc import Callable

from ..packages import NEEDED, missing


def examine(model: str, say: Callable[[str], None]) -> bool:
    """Tell what is not installed, and then, where that can run, the whole report of doctor.py.

    Returns:
        Whether nothing grave was found.
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
