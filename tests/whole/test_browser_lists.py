"""What the page offers to choose from, in a real browser: nodes, models, and words of its language."""

from __future__ import annotations

import os
from typing import Any

import pytest
import templates

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to test its page in a browser.", allow_module_level=True)

from comfyui_page import ComfyPage
from comfyui_scene import DEMO, ENDLESS
from comfyui_server import Server


@pytest.fixture
def online(closed: ComfyPage) -> ComfyPage:
    """The same as if the server might download: that of the tests is offline, and would say so of every model."""

    def answer(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json=reply.json() | {"forbidden": None})

    closed.tab.route("**/qwenvl/choices", answer)
    closed.open()
    return closed


@pytest.mark.parametrize(("words", "node_id"), [("QwenVL", "QwenVL"), ("qwen", "Qwen")])
def test_a_search_finds_the_nodes_of_today_first(page: ComfyPage, words: str, node_id: str) -> None:
    page.add_by_search(words, node_id)


def test_a_search_offers_no_id_of_older_packs(page: ComfyPage) -> None:
    page._open_search()
    page.tab.keyboard.type("Qwen", delay=20)
    page.tab.get_by_text("QwenVL Boxes").first.wait_for()
    page.shot("search")
    seen = page.run_js("() => document.body.innerText")
    assert [name for name in ("Qwen2.5VL", "Qwen2.5", "Qwen2VL") if name in seen] == []


LINES = """() => {
    const node = app.graph.nodes.find(({ type }) => type.startsWith('Qwen'));
    const said = [];
    const context = new Proxy(document.createElement('canvas').getContext('2d'), {
        get: (target, name) => name === 'fillText' ? (text) => said.push(text)
            : typeof target[name] === 'function' ? target[name].bind(target) : target[name],
        set: (target, name, value) => { target[name] = value; return true; },
    });
    node.onDrawForeground(context, app.canvas);
    return said;
}"""


def place(page: ComfyPage, node_id: str = "QwenVL") -> None:
    page.add_by_search(node_id, node_id)
    page.run_js(
        "() => { app.graph.nodes[0].pos = [420, 60]; app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 60]; }"
    )


def test_a_server_that_is_offline_downloads_nothing(page: ComfyPage) -> None:
    place(page)
    page.wait(f"() => ({LINES})().length === 2")
    assert page.run_js(LINES)[0].startswith("not on this machine, and downloads are off · needs 8.9 GB of ")


def test_below_the_model_stands_what_it_would_cost(online: ComfyPage) -> None:
    page = online
    place(page)
    page.wait(f"() => ({LINES})().length === 2")
    model, picture = page.run_js(LINES)
    assert model.startswith("8.9 GB to download · needs 8.9 GB of ")
    assert picture == "sees no picture: answers from the text alone"
    page.shot("model_line")
    page.set("QwenVL", model=DEMO)
    assert page.run_js(LINES)[0].startswith("on this machine · needs 3 MB of ")
    page.set("QwenVL", model="Qwen2.5-VL-72B-Instruct")
    assert page.run_js(LINES)[0].startswith("146.8 GB to download · needs 146.8 GB of ")
    page.set("QwenVL", quantization="4bit")
    assert "needs 42.9 GB of " in page.run_js(LINES)[0]
    page.set("QwenVL", download="never")
    assert page.run_js(LINES)[0].startswith("not on this machine, and downloads are off · ")
    page.set("QwenVL", model="one of another machine")
    assert page.run_js(LINES)[0] == "not in the list of this machine"
    page.set("QwenVL", video_path="a.mp4")
    assert len(page.run_js(LINES)) == 1


def test_the_lines_follow_the_model_when_the_node_is_folded(page: ComfyPage) -> None:
    """Pages call what draws them before they place the widgets."""
    place(page)
    page.wait(f"() => ({LINES})().length === 2")
    page.run_js(
        """() => {
            const [node] = app.graph.nodes, { onDrawForeground } = node;
            node.onDrawForeground = function () {
                window.drawn = node.widgets.find(({ name }) => name === 'model').y;
                return onDrawForeground.apply(this, arguments);
            };
        }"""
    )
    for _ in range(2):
        page.press_widget("QwenVL", "qwenvl_more")
        page.tab.wait_for_timeout(500)
        drawn, there = page.run_js(
            "() => [window.drawn, app.graph.nodes[0].widgets.find(({ name }) => name === 'model').y]"
        )
        assert drawn == there


def test_the_list_says_of_each_model_where_it_is(page: ComfyPage) -> None:
    place(page)
    page.wait(f"() => ({LINES})().length === 2")
    page.press_widget("QwenVL", "model")
    entry = page.tab.locator(".litecontextmenu .litemenu-entry", has_text=DEMO)
    entry.wait_for()
    page.shot("model_list")
    assert entry.locator(".qwenvl-mark").text_content() == "on this machine"
    # Newer pages have a field for a search above the list.
    names = page.run_js("() => [...document.querySelectorAll('.litemenu-entry')].map((each) => each.dataset.value)")
    assert names[:3] == [ENDLESS, DEMO, "Qwen3-VL-4B-Instruct"]
    other = page.tab.locator(".litemenu-entry", has_text="Qwen3-VL-8B-Instruct-FP8")
    assert other.locator(".qwenvl-mark").text_content() == "10.6 GB to download"
    entry.click()
    assert page.widgets("QwenVL")["model"] == DEMO


def test_where_nodes_are_html_the_same_is_said(online: ComfyPage) -> None:
    page = online
    if page.run_js("() => app.extensionManager.setting.get('Comfy.Node.AlwaysShowAdvancedWidgets') == null"):
        pytest.skip("this page draws its nodes on the canvas alone")
    place(page)
    page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        lines = page.tab.locator("[data-node-id] .qwenvl-model div")
        lines.first.wait_for()
        page.shot("model_line_html")
        assert lines.first.text_content().startswith("8.9 GB to download · needs 8.9 GB of ")
        assert page.run_js(LINES) == []
        page.open_panel()
        page.run_js("() => app.canvas.selectNode(app.graph.nodes[0])")
        page.tab.wait_for_timeout(800)
        page.shot("model_panel_html")
        assert "qwenvl_" not in page.run_js("() => document.body.innerText")
        page.open_panel()
        saved = page.run_js("() => app.graph.serialize().nodes[0].widgets_values")
        page.set("QwenVL", model=DEMO)
        page.wait("() => document.querySelector('.qwenvl-model div').textContent.startsWith('on this machine')")
        assert len(saved) == len(page.run_js("() => app.graph.serialize().nodes[0].widgets_values"))
        assert None not in saved
    finally:
        page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    page.wait("() => !app.graph.nodes[0].widgets.some(({ name }) => name === 'qwenvl_model')")
    assert len(page.run_js(LINES)) == 2


def test_a_page_in_french_is_in_french(closed: ComfyPage, server: Server) -> None:
    page = closed
    server.client.post("/settings", {"Comfy.Locale": "fr"})
    try:
        page.open()
        page.load(templates.workflow("Describe an image"))
        page.wait("() => app.graph.groups.some(({ title }) => title === '2  Question')")
        page.wait("() => app.graph.nodes.some(({ title }) => title === 'Votre image')")
        note = page.run_js("() => app.graph.nodes.find(({ type }) => type === 'MarkdownNote').widgets[0].value")
        assert note.startswith("## Décrire une image\n\n1. Exécutez")
        assert "Demo-Shapes** est fourni avec le pack" in note
        lines = page.run_js(LINES)
        assert lines[0].startswith("sur cette machine · demande 3 MB sur ")
        labels = page.run_js(
            """() => {
                const node = app.graph.nodes.find(({ type }) => type === 'QwenVL');
                const labelled = node.widgets.find(({ name }) => name === 'image_mode');
                return [labelled.value, labelled.options.getOptionLabel(labelled.value), labelled._displayValue];
            }"""
        )
        assert labels[:2] == ["together", "ensemble"]
        # Older pages know no labels.
        assert labels[2] in ("ensemble", "together", None)
        page.command("Workspace.ToggleSidebarTab.qwenvl-models")
        page.tab.get_by_text("Modèles QwenVL").wait_for()
        page.shot("french")
    finally:
        server.client.post("/settings", {"Comfy.Locale": "en"})
