"""The page's scripts in Node.js, with tests/support/page_double.mjs in the browser's place."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pictures import ROOT

NODE = shutil.which("node")
if NODE is None:
    pytest.skip("Install Node.js to try the page's scripts without a browser.", allow_module_level=True)

LIMIT_S = 60
BEGIN = """
import * as page from "./page_double.mjs";
import { readFileSync } from "node:fs";
const { Node, app, api, asked, clipboard, document, pass, server, settings, tabs, tell } = page;
const given = JSON.parse(readFileSync(0));
const seen = [];
"""
END = "\nconsole.log(JSON.stringify(seen));"


def lay_out(folder: Path) -> Path:
    """The scripts where ComfyUI serves them, beside ComfyUI's own two. Copies: Node.js follows links."""
    ours = folder / "extensions" / "qwenvl"
    ours.mkdir(parents=True)
    for file in (*(ROOT / "web").glob("*.js"), ROOT / "web" / "words.json"):
        shutil.copy(file, ours)
    shutil.copy(ROOT / "tests" / "support" / "page_double.mjs", folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "scripts").mkdir()
    for name in ("app", "api"):
        (folder / "scripts" / f"{name}.js").write_text(f'export {{ {name} }} from "../page_double.mjs";')
    return folder


def run(folder: Path, script: str, given: Any = None) -> Any:
    """What the script has put into `seen`.

    Args:
        folder: of lay_out().
        script: JavaScript, which loads ours by `await import("./extensions/qwenvl/NAME.js")`.
        given: what it has as `given`.
    """
    command = [NODE, "--input-type=module", "--eval", BEGIN + script + END]
    done = subprocess.run(
        command,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
