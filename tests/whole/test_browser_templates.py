"""The templates in ComfyUI's real page, in a real browser: how they look, and how one asks about a picture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import templates

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to test its page in a browser.", allow_module_level=True)

from comfyui_page import PACK, ComfyPage
from comfyui_server import Server
from pictures import draw

# Wires that run behind a node that they have nothing to do with, and notes that lie on a node or a group.
MUDDLE = """() => {
    const box = (node) => [...node.getBounding()];
    const inside = ([x, y], [left, top, width, height]) =>
        x > left + 2 && x < left + width - 2 && y > top + 2 && y < top + height - 2;
    const found = [];
    const { nodes, groups } = app.graph;
    for (const link of app.graph.links.values()) {
        const from = app.graph.getNodeById(link.origin_id), to = app.graph.getNodeById(link.target_id);
        const [ax, ay] = from.getConnectionPos(false, link.origin_slot);
        const [bx, by] = to.getConnectionPos(true, link.target_slot);
        const reach = Math.hypot(ax - bx, ay - by) / 4;
        for (let step = 0; step <= 100; step++) {
            const t = step / 100, u = 1 - t;
            const mix = (a, b, c, d) => u ** 3 * a + 3 * u * u * t * b + 3 * u * t * t * c + t ** 3 * d;
            const point = [mix(ax, ax + reach, bx - reach, bx), mix(ay, ay, by, by)];
            for (const node of nodes) {
                if (node === from || node === to || !inside(point, box(node))) continue;
                found.push(`${from.title} > ${to.title} behind ${node.title}`);
            }
        }
    }
    const overlap = ([a, b, c, d], [e, f, g, h]) => a < e + g && e < a + c && b < f + h && f < b + d;
    const notes = nodes.filter(({ type }) => type === 'MarkdownNote');
    for (const note of notes) {
        const others = nodes.filter((node) => node !== note).map((node) => [node.title, box(node)]);
        const framed = groups.map(({ title, pos, size }) => [title, [...pos, ...size]]);
        for (const [title, place] of [...others, ...framed]) {
            if (overlap(box(note), place)) found.push(`note on ${title}`);
        }
    }
    return [...new Set(found)];
}"""


@pytest.fixture
def viewport() -> dict[str, int]:
    """Wide enough for a whole template."""
    return {"width": 1800, "height": 1000}


def fit(page: ComfyPage) -> None:
    """All of it in sight."""
    page.command("Comfy.Canvas.FitView")
    page.tab.wait_for_timeout(1500)


@pytest.mark.parametrize("name", templates.names())
def test_no_wire_runs_behind_a_node_and_the_note_is_clear_of_everything(
    page: ComfyPage, server: Server, name: str
) -> None:
    page.open_template(PACK, name)
    fit(page)
    page.shot(f"canvas {name}")
    assert page.run_js(MUDDLE) == []


@pytest.mark.parametrize("name", templates.names())
def test_the_same_where_nodes_are_html(page: ComfyPage, name: str) -> None:
    if page.run_js("() => app.extensionManager.setting.get('Comfy.Node.AlwaysShowAdvancedWidgets') == null"):
        pytest.skip("this page draws its nodes on the canvas alone")
    page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.open_template(PACK, name)
        fit(page)
        page.shot(f"html {name}")
        assert page.run_js(MUDDLE) == []
    finally:
        page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_a_sample_is_put_where_the_template_finds_it_and_nothing_is_written_before(
    page: ComfyPage, server: Server
) -> None:
    for sample in templates.SAMPLES.iterdir():
        (server.base / "input" / sample.name).unlink(missing_ok=True)
    assert not (server.base / "input" / "QwenVL sample.png").exists()
    page.open_template(PACK, "Describe an image")
    assert (server.base / "input" / "QwenVL sample.png").read_bytes() == (
        templates.SAMPLES / "QwenVL sample.png"
    ).read_bytes()
    page.queue()
    page.wait(
        "() => document.querySelector('.qwenvl-answer .text')?.textContent === 'a red square on a blue background'"
    )
    page.wait_until_idle()


def test_a_picture_that_is_uploaded_is_what_a_run_is_about(page: ComfyPage, tmp_path: Path) -> None:
    draw("circle", "yellow", "green", (128, 128)).save(tmp_path / "mine.png")
    page.open_template(PACK, "Describe an image")
    fit(page)
    with page.tab.expect_file_chooser() as chooser:
        page.press_widget("LoadImage", "upload")
    chooser.value.set_files(str(tmp_path / "mine.png"))
    page.wait("() => app.graph.nodes.find(({ type }) => type === 'LoadImage').widgets[0].value.startsWith('mine')")
    page.queue()
    page.wait(
        """() => app.graph.nodes.find(({ type }) => type === 'PreviewAny').widgets
            .some(({ value }) => String(value).includes('a yellow circle on a green background'))"""
    )
    page.wait_for_state("done")
    assert page.answer() == "a yellow circle on a green background"
    page.wait_until_idle()
    page.shot("uploaded")
