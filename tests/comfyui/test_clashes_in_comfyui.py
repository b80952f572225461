"""Packs with our node ids beside ours in a real ComfyUI. Skipped without COMFYUI_DIR (a checkout)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to test the pack beside others.", allow_module_level=True)

from comfyui_server import PACK, with_the_pack

OTHER = """
class Other:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{}}}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "x"

NODE_CLASS_MAPPINGS = {{"{}": Other, "Elsewhere {}": Other}}
"""


def test_packs_with_our_ids_are_named_whether_they_are_read_before_ours_or_after(tmp_path: Path) -> None:
    for folder, name in (("A_older_pack", "QwenVL"), ("Z_older_pack", "Qwen2.5"), ("harmless", "Something else")):
        (tmp_path / "custom_nodes" / folder).mkdir(parents=True)
        (tmp_path / "custom_nodes" / folder / "__init__.py").write_text(OTHER.format(name, name), encoding="utf-8")
    server = with_the_pack(tmp_path)
    try:
        server.wait_until_ready()
        lines = [line for line in server.log().splitlines() if "nodes of the same names" in line]
    finally:
        server.stop()
    assert [line.partition("custom_nodes/")[2].partition(". ")[0] for line in sorted(lines)] == [
        "A_older_pack has nodes of the same names (QwenVL)",
        "Z_older_pack has nodes of the same names (Qwen2.5)",
    ], server.log()
    assert PACK.name not in " ".join(lines)
