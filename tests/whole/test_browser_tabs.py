"""An answer belongs to the workflow that it was asked from: tabs, subgraphs, reloads and undo in a real browser."""

from __future__ import annotations

import json
from typing import Any

from comfyui_page import ComfyPage
from comfyui_scene import ENDLESS
from comfyui_server import PACK as PACK_FOLDER
from comfyui_server import Server
from saved_workflows import SAVED, in_a_subgraph

TEMPLATE = json.loads((PACK_FOLDER / "example_workflows" / "Describe an image.json").read_text(encoding="utf-8"))
BOXES = """() => app.graph.nodes.flatMap(({ widgets }) => widgets ?? []).filter(({ name }) => name === 'qwenvl_answer')
    .map(({ element }) => element.dataset.state)"""
# Of all nodes, core's too, what holds live text.
PREVIEWS = "() => app.graph.nodes.filter(({ widgets }) => widgets?.some(({ name }) => name.startsWith('$$node-text')))"
TAB = "() => app.extensionManager.workflow.activeWorkflow.path"
KEPT = """() => [localStorage, sessionStorage].some(
    (store) => Object.values(store).some((kept) => kept.includes('LoadImage') && kept.includes('QwenVL'))
)"""


def turn(page: ComfyPage, forward: bool) -> None:
    """To the next tab, or to the one before."""
    before = page.run_js(TAB)
    page.command(f"Workspace.{'Next' if forward else 'Previous'}OpenedWorkflow")
    page.wait("path => app.extensionManager.workflow.activeWorkflow.path !== path", before)
    page.tab.wait_for_timeout(300)  # what belongs there is shown a moment later


def settled(page: ComfyPage) -> None:
    """The page keeps the workflow a moment after its last change."""
    page.wait(KEPT)
    page.tab.wait_for_timeout(1500)


def test_the_same_workflow_in_another_tab_shows_nothing_of_the_run(page: ComfyPage) -> None:
    """Both have one id, as two of one template have."""
    page.load(TEMPLATE, "first.json")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    answer = page.answer()
    ids = page.run_js("() => app.graph.id")
    page.load(TEMPLATE, "second.json")
    page.tab.wait_for_timeout(1000)
    assert page.run_js("() => app.graph.id") == ids
    assert page.run_js(BOXES) == []
    turn(page, forward=False)
    page.wait_for_state("done")
    assert page.answer() == answer


def test_live_text_goes_to_its_own_workflow_while_another_is_in_sight(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", model=ENDLESS, do_sample=True, max_new_tokens=7000)
    page.queue()
    page.wait_for_state("answering")
    page.command("Comfy.DuplicateWorkflow")
    page.wait("() => app.graph.nodes.length === 3")
    page.tab.wait_for_timeout(1500)  # many texts are sent
    assert page.run_js(BOXES) == []
    assert page.run_js(f"() => ({PREVIEWS})().length") == 0
    turn(page, forward=False)
    page.wait_for_state("answering")
    length = len(page.answer())
    page.wait("length => document.querySelector('.qwenvl-answer .text').textContent.length > length", length)
    turn(page, forward=True)
    page.cancel()
    page.wait_until_idle()
    assert page.run_js(BOXES) == []
    turn(page, forward=False)
    page.wait_for_state("cancelled")


def test_what_runs_is_shown_again_after_a_reload(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", model=ENDLESS, do_sample=True, max_new_tokens=20000)
    settled(page)
    page.queue()
    page.wait_for_state("answering")
    page.reload()
    page.wait_for_state("answering")
    length = len(page.answer())
    page.wait("length => document.querySelector('.qwenvl-answer .text').textContent.length > length", length)
    page.cancel()
    page.wait_for_state("cancelled")
    status = page.status()
    page.reload()
    page.wait_for_state("cancelled")
    assert page.status() == status


def test_an_error_is_there_after_a_reload(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", video_path="/nowhere/film.mp4")
    settled(page)
    page.queue()
    page.wait_for_state("error")
    page.reload()
    page.wait_for_state("error")
    assert "film.mp4" in page.answer()


def test_an_error_is_there_in_a_browser_that_has_not_seen_it(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", video_path="/nowhere/another.mp4")
    settled(page)
    page.queue()
    page.wait_for_state("error")
    page.run_js("() => window.addEventListener('pagehide', () => sessionStorage.removeItem('QwenVL.runs'))")
    page.reload()
    page.wait_for_state("error")
    assert "another.mp4" in page.answer()


def test_an_answer_stays_when_something_is_undone(page: ComfyPage) -> None:
    page.ask(text="Describe this image.")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    page.run_js("() => { app.graph.add(LiteGraph.createNode('PreviewAny')); }")
    page.tab.mouse.click(650, 950)
    page.wait("() => app.graph.nodes.length === 4")
    page.tab.wait_for_timeout(500)
    page.tab.keyboard.press("Control+z")
    page.wait("() => app.graph.nodes.length === 3")
    page.wait_for_state("done")
    assert page.answer() == "a red circle on a blue background"
    assert page.status().endswith("tokens/s")


def asked_in_a_subgraph() -> dict[str, Any]:
    case = next(case for case in SAVED["cases"] if case["what"] == "the sibling fork's QwenVL")
    return in_a_subgraph(case)


def test_a_node_in_a_subgraph_shows_its_own_answer(page: ComfyPage, server: Server) -> None:
    page.load(asked_in_a_subgraph())
    page.run_js(
        """([model]) => {
            const node = app.graph.nodes[0].subgraph.nodes.find(({ type }) => type.startsWith('Qwen'));
            const set = (name, value) => (node.widgets.find((each) => each.name === name).value = value);
            set('model', model);
            set('text', 'hello');
            set('bypass', false);
            set('video_path', '');
        }""",
        ["Demo-Shapes (5 MB, offline)"],
    )
    page.queue()
    page.wait_until_idle()
    page.wait(
        """() => app.graph.nodes[0].subgraph.nodes.some(({ widgets }) => widgets?.some(
            (each) => each.name === 'qwenvl_answer' && each.element.dataset.state === 'done' && each.value
        ))"""
    )
    assert page.run_js("() => app.graph.nodes[0].widgets?.some(({ name }) => name === 'qwenvl_answer')") in (
        False,
        None,
    )
