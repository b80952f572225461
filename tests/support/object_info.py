"""Prints what a running ComfyUI sends the page about this pack's nodes, and what has changed since an earlier print.

COMFYUI_DIR=... COMFYUI_PYTHON=... python tests/support/object_info.py > before.json
COMFYUI_DIR=... COMFYUI_PYTHON=... python tests/support/object_info.py --against before.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comfyui_server import Server, with_the_pack

Info = dict[str, Any]
# For what only one of two has.
NOTHING = object()


def main(arguments: list[str]) -> int:
    """Return the exit status: 1 if there are differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FILE", help="print what differs from this, and nothing else")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        now = object_info(with_the_pack(Path(folder)))
    if given.against is None:
        print(json.dumps(now, indent=2, sort_keys=True, ensure_ascii=False))
        return 0
    found = list(differences(json.loads(given.against.read_text(encoding="utf-8")), now))
    print("\n".join(found) or f"As in {given.against}: {len(now)} nodes.")
    return int(bool(found))


def object_info(server: Server) -> Info:
    """Return the entries of the pack's nodes."""
    try:
        server.wait_until_ready()
        everything = server.client.get("/object_info")
    finally:
        server.stop()
    ours = {name: node for name, node in everything.items() if "ComfyUI_QwenVL" in node["python_module"]}
    if not ours:
        raise SystemExit(f"ComfyUI has none of the pack's nodes. Its log:\n{server.start_log}")
    return ours


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Write a line for each value that differs, with its node and input."""
    if before == now:
        return
    pairs = _pairs(before, now)
    if pairs is None:
        yield f"{place}: {_shown(before)} -> {_shown(now)}"
        return
    for name, (old, new) in pairs.items():
        yield from differences(old, new, f"{place} > {name}" if place else str(name))


def _pairs(before: Any, now: Any) -> dict[Any, tuple[Any, Any]] | None:
    """Return the parts to compare one by one; None if the two are compared as a whole, as lists of names are."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {name: (before.get(name, NOTHING), now.get(name, NOTHING)) for name in (before | now)}
    # An input: its type and its options.
    if all(isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict) for value in (before, now)):
        return {"type": (before[0], now[0]), "options": (before[1], now[1])}
    return None


def _shown(value: Any) -> str:
    return "nothing" if value is NOTHING else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    if not os.environ.get("COMFYUI_DIR"):
        raise SystemExit("Set COMFYUI_DIR to a ComfyUI checkout, and COMFYUI_PYTHON to the interpreter that runs it.")
    sys.exit(main(sys.argv[1:]))
