"""A real browser on a real ComfyUI page: does what a user does, and reads what is on the nodes.

Screenshots go to the folder in QWENVL_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from comfyui_scene import DEMO

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to test its page in a browser.", allow_module_level=True)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("Install chromium, or name a browser of that kind in CHROMIUM.", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="The browser tests need: pip install playwright==1.55.0 (no browser of its own)"
)

PACK = "ComfyUI_QwenVL"
READY = """() => Boolean(window.LiteGraph?.registered_node_types.QwenVL && window.app?.graph
    && app.extensionManager?.workflow?.activeWorkflow && app.graph.nodes.length)"""
WAIT_MS = 60_000
Value = Any


class ComfyPage:
    """One tab of the browser. Everything that a user can do by hand is done by mouse and keyboard."""

    def __init__(self, tab: Any, address: str) -> None:
        self.tab = tab
        self.address = address
        self.errors: list[str] = []
        tab.set_default_timeout(WAIT_MS)
        tab.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))

    def open(self) -> None:
        """Open the page with an empty workflow, and without the offer of a first tour."""
        settings = json.dumps({"Comfy.TutorialCompleted": True}).encode()
        request = urllib.request.Request(f"{self.address}/settings", settings, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()
        self.tab.goto(self.address)
        self.wait(READY)
        self.command("Comfy.NewBlankWorkflow")
        self.wait("() => app.graph.nodes.length === 0")

    def reload(self) -> None:
        self.tab.reload()
        self.wait(READY)

    def run_js(self, script: str, argument: Value = None) -> Value:
        return self.tab.evaluate(script, argument)

    def wait(self, script: str, argument: Value = None, timeout_ms: int = WAIT_MS) -> None:
        """Wait until the script returns something true."""
        self.tab.wait_for_function(script, arg=argument, timeout=timeout_ms)

    def command(self, name: str) -> None:
        self.run_js("name => app.extensionManager.command.execute(name)", name)

    def add_by_search(self, words: str, node_id: str) -> None:
        """Add a node by a double click on the empty canvas, some words, and Enter."""
        before = self.run_js("() => app.graph.nodes.length")
        self._open_search()
        self.tab.keyboard.type(words, delay=20)
        self.tab.wait_for_timeout(800)  # the list is filtered a moment after the last key
        self.tab.keyboard.press("Enter")
        self.wait("before => app.graph.nodes.length > before", before)
        # Newer pages hang the new node on the pointer.
        self.wait("() => document.activeElement.tagName !== 'INPUT'")
        while self.run_js("() => Boolean(app.graph.nodes.at(-1).flags.ghost)"):
            self.tab.mouse.click(700, 400)
            self.tab.wait_for_timeout(200)
        assert self.run_js("() => app.graph.nodes.at(-1).type") == node_id

    def _open_search(self) -> None:
        """Double-click, and again if the page was still busy with the last workflow and missed it."""
        for _ in range(10):
            self.tab.mouse.dblclick(900, 640)
            try:
                self.wait("() => document.activeElement.tagName === 'INPUT'", timeout_ms=6_000)
            except playwright.TimeoutError:
                continue
            return
        raise AssertionError("a double click on the canvas opens no search")

    def set(self, node_id: str, **values: Value) -> None:
        """Type values into widgets of the first node of that kind."""
        self.run_js(
            """([type, values]) => {
                const node = app.graph.nodes.find((each) => each.type === type);
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find((each) => each.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
            }""",
            [node_id, values],
        )

    def ask(self, **values: Value) -> None:
        """Add a node by search, with the demo model and these values, and a preview that makes it run."""
        self.add_by_search("QwenVL", "QwenVL")
        # A seed of its own each time: older pages are told nothing of an answer that comes from the cache.
        settled = {"model": DEMO, "seed": time.time_ns() % 10**9, "control_after_generate": "fixed", "do_sample": False}
        self.set("QwenVL", **{**settled, **values})
        self.run_js(
            """() => {
                const node = app.graph.nodes.find(({ type }) => type === 'QwenVL');
                node.pos = [420, 60];
                const image = LiteGraph.createNode('LoadImage'), preview = LiteGraph.createNode('PreviewAny');
                image.pos = [60, 60];
                preview.pos = [900, 60];
                app.graph.add(image);
                app.graph.add(preview);
                image.widgets.find(({ name }) => name === 'image').value = 'circle.png';
                image.connect(0, node, node.inputs.findIndex(({ name }) => name === 'image1'));
                node.connect(0, preview, 0);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [20, 60];
                app.graph.setDirtyCanvas(true, true);
            }"""
        )
        self.tab.mouse.click(650, 950)  # the page notices changes at clicks

    def press_widget(self, node_id: str, name: str) -> None:
        """Click in the middle of a widget that is drawn on the canvas."""
        self.run_js("() => app.graph.setDirtyCanvas(true, true)")
        self.tab.wait_for_timeout(300)  # it has its place when it is drawn
        x, y = self.run_js(
            """([type, name]) => {
                const node = app.graph.nodes.find((each) => each.type === type);
                const widget = node.widgets.find((each) => each.name === name);
                const { scale, offset } = app.canvas.ds;
                const { left, top } = app.canvas.canvas.getBoundingClientRect();
                return [
                    left + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,
                    top + (node.pos[1] + widget.y + 10 + offset[1]) * scale,
                ];
            }""",
            [node_id, name],
        )
        self.tab.mouse.click(x, y)
        self.tab.wait_for_timeout(300)

    def widgets(self, node_id: str) -> dict[str, Value]:
        """Return {name: value} of the visible widgets on the first node of that kind. Of one that is connected, pages
        from 1.58 on show the row alone."""
        return self.run_js(
            """type => {
                const node = app.graph.nodes.find((each) => each.type === type);
                const isSeen = node.isWidgetRowVisible ?? node.isWidgetVisible;
                const seen = node.widgets.filter((each) => isSeen.call(node, each));
                return Object.fromEntries(seen.map((each) => [each.name, each.value]));
            }""",
            node_id,
        )

    def load(self, workflow: dict[str, Any], name: str = "saved.json") -> None:
        """Open a workflow file as if it were dropped on the page."""
        before = self.run_js("() => app.extensionManager.workflow.activeWorkflow.path")
        self.run_js(
            """([text, name]) => app.handleFile(new File([text], name, { type: 'application/json' }))""",
            [json.dumps(workflow), name],
        )
        self.wait("path => app.extensionManager.workflow.activeWorkflow.path !== path", before)
        self.wait("count => app.graph.nodes.length === count", len(workflow["nodes"]))

    def open_template(self, pack: str, title: str) -> None:
        """Open a template by the dialog of templates: the pack's group, then the template."""
        self.command("Comfy.BrowseTemplates")
        group = self.tab.get_by_text(re.compile(f"^{re.escape(pack).replace('_', '.')}$")).last
        group.click()
        self.tab.get_by_text(title, exact=True).last.click()
        self.wait("title => app.extensionManager.workflow.activeWorkflow.filename.startsWith(title)", title)
        self.wait("() => app.graph.nodes.some(({ type }) => type.startsWith('Qwen'))")

    def node_js(self, expression: str, argument: Value = None) -> Value:
        """Evaluate an expression on the first QwenVL node."""
        find = "app.graph.nodes.find(({ type }) => type === 'QwenVL')"
        return self.run_js(f"argument => {{ const node = {find}; return {expression}; }}", argument)

    def open_panel(self) -> None:
        """Open the panel with the properties of the selection, if the page has one."""
        button = self.tab.get_by_label("Toggle properties panel").first
        if button.count():
            button.click()

    def sidebar_button(self) -> Any:
        """The button of the pack's tab in the sidebar. Pages from 1.58 on name it in another attribute."""
        name = "qwenvl-models-tab-button"
        return self.tab.locator(f".{name}, [data-testid={name}]")

    def queue(self) -> None:
        self.tab.keyboard.press("Control+Enter")

    def cancel(self) -> None:
        self.tab.keyboard.press("Control+Alt+Enter")

    def wait_until_idle(self, timeout_ms: int = 120_000) -> None:
        """Wait until nothing runs and nothing is queued on the server."""
        self.wait(
            """async () => {
                const { exec_info } = await (await app.api.fetchApi('/prompt')).json();
                return exec_info.queue_remaining === 0;
            }""",
            timeout_ms=timeout_ms,
        )

    def answer(self) -> str:
        return self.tab.locator(".qwenvl-answer .text").first.text_content()

    def status(self) -> str:
        return self.tab.locator(".qwenvl-answer .status").first.text_content()

    def wait_for_state(self, state: str) -> None:
        """Wait until the answer on the node shows that state."""
        self.wait("state => document.querySelector('.qwenvl-answer')?.dataset.state === state", state)

    def shot(self, name: str, **options: Any) -> None:
        folder = os.environ.get("QWENVL_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.tab.screenshot(path=str(Path(folder) / f"{name}.png"), **options)


@contextmanager
def browser() -> Iterator[Any]:
    """Start the machine's own Chromium without a window."""
    with playwright.sync_playwright() as player:
        started = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()
