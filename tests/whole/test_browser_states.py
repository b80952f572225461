"""What a node shows of itself in a real browser: what it does, an error, a long answer, and the box that holds it."""

from __future__ import annotations

import json
import re

from comfyui_page import ComfyPage
from comfyui_scene import DEMO, ENDLESS
from comfyui_server import Server

# Every line and every text that a box is given from now on, in order, however many come before the browser looks.
RECORD = """() => {
    window.said = { status: [], text: [] };
    new MutationObserver((changes) => changes.forEach(({ target, addedNodes }) => {
        for (const { data } of addedNodes) if (data) window.said[target.className]?.push(data);
    })).observe(document.querySelector('.qwenvl-answer'), { subtree: true, childList: true });
}"""
BOX = """() => {
    const box = document.querySelector('.qwenvl-answer'), scale = app.canvas.ds.scale;
    const seen = (part) => part.getBoundingClientRect();
    return {
        text: seen(box.querySelector('.text')).height / scale,
        width: seen(box).width / scale,
        question: Math.max(...[...document.querySelectorAll('textarea')].map((area) => seen(area).height)) / scale,
        node: [...app.graph.nodes.find(({ type }) => type === 'QwenVL').size],
        top: box.querySelector('.text').scrollTop,
    };
}"""


def test_what_goes_on_is_shown_in_place_of_the_old_answer(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", keep_model_loaded=False)
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    old = page.answer()
    page.run_js(RECORD)
    page.set("QwenVL", text="Which shape is it?")
    page.queue()
    page.wait("old => document.querySelector('.qwenvl-answer .text').textContent !== old", old)
    page.wait_for_state("done")
    said = page.run_js("() => window.said")
    lines = list(dict.fromkeys(said["status"]))
    assert [line.split()[0] for line in lines[:4]] == ["Starting", "Loading", "Reading", "Answering"]
    assert re.fullmatch(re.escape(f"Loading {DEMO} · ") + r"\d+ MB", lines[1])
    assert lines[2] == "Reading 1 picture"
    assert old not in said["text"]


def test_one_token_is_one_token(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", max_new_tokens=1)
    page.queue()
    page.wait_for_state("done")
    assert page.status() == "1 token"


def test_an_error_stands_in_the_place_of_the_answer_until_the_next_one(page: ComfyPage, server: Server) -> None:
    page.ask(text="Describe this image.")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    page.set("QwenVL", video_path="/nowhere/film.mp4")
    page.queue()
    page.wait_for_state("error")
    page.shot("error")
    assert "film.mp4" in page.answer()
    assert page.status() == "Error"
    newest = max(server.client.get("/history?max_items=50").values(), key=lambda run: run["prompt"][0])
    messages = dict(newest["status"]["messages"])
    assert messages["execution_error"]["exception_message"].strip() == page.answer()
    assert messages["execution_error"]["exception_type"].startswith("QwenVL.")
    page.set("QwenVL", video_path="", text="Which shape is it?")
    page.tab.keyboard.press("Escape")
    page.queue()
    page.wait_for_state("done")


def test_why_comfyui_refuses_a_prompt_stands_there_too(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", model="Nobody/Nothing")
    page.queue()
    page.wait_for_state("error")
    page.shot("refused")
    assert page.answer().count("Nobody/Nothing") == 1
    assert page.answer().startswith("Model ")


def test_of_a_long_answer_the_page_holds_a_part_and_copies_the_whole(page: ComfyPage, server: Server) -> None:
    page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask(text="Describe this image.")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    prompt, run = max(server.client.get("/history?max_items=50").items(), key=lambda item: item[1]["prompt"][0])
    node = next(number for number, entry in run["prompt"][2].items() if entry["class_type"] == "QwenVL")
    page.run_js(
        """([prompt_id, node]) => app.api.dispatchEvent(new CustomEvent('executed', {
            detail: { prompt_id, node, display_node: node, output: { text: ['a' + 'x'.repeat(1 << 20) + 'e'] } },
        }))""",
        [prompt, node],
    )
    page.wait("() => document.querySelector('.qwenvl-answer .text').textContent.length > 1000")
    assert len(page.answer()) == 100_000
    assert page.tab.locator(".qwenvl-answer .rest").text_content().startswith("948578 more characters")
    page.shot("long")
    page.tab.locator(".qwenvl-answer button").click()
    page.wait("() => document.querySelector('.qwenvl-answer button').textContent === 'Copied'")
    assert page.run_js("async () => (await navigator.clipboard.readText()).length") == (1 << 20) + 2


def test_the_box_has_its_room_at_once_and_the_question_keeps_its_own(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", model=ENDLESS, do_sample=True, max_new_tokens=600)
    before = page.run_js("() => app.graph.nodes.find(({ type }) => type === 'QwenVL').size[1]")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    page.tab.wait_for_timeout(300)  # it is drawn where it is then
    first = page.run_js(BOX)
    assert first["text"] >= 150
    assert first["question"] >= 36, "three lines"
    assert first["node"][1] > before
    assert first["top"] == 0, "its beginning is in sight"
    page.shot("box")
    page.set("QwenVL", seed=5, max_new_tokens=500)
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .status').textContent.startsWith('500 tokens')")
    page.wait_until_idle()
    assert page.run_js(BOX)["node"] == first["node"], "it grows once"


def test_the_panel_beside_the_workflow_leaves_the_box_alone(page: ComfyPage) -> None:
    page.ask(text="Describe this image.")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    page.open_panel()
    page.run_js("() => app.canvas.selectNode(app.graph.nodes.find(({ type }) => type === 'QwenVL'))")
    page.tab.wait_for_timeout(800)
    page.shot("panel")
    page.run_js("() => app.graph.nodes.find(({ type }) => type === 'QwenVL').setSize([600, 800])")
    page.run_js("() => app.graph.setDirtyCanvas(true, true)")
    page.tab.wait_for_timeout(500)
    assert page.run_js(BOX)["width"] > 550
    assert "qwenvl_answer" not in page.run_js("() => document.body.innerText")
    assert "$$node-text-preview" not in page.run_js("() => document.body.innerText")


def test_what_is_changed_from_elsewhere_comes_out_of_the_fold(page: ComfyPage) -> None:
    page.add_by_search("QwenVL", "QwenVL")
    page.run_js("() => { app.graph.nodes[0].pos = [420, 60]; app.canvas.ds.offset = [20, 60]; }")
    height = page.run_js("() => app.graph.nodes[0].size[1]")
    assert "top_p" not in page.widgets("QwenVL")
    page.run_js(
        """() => {
            app.graph.nodes[0].widgets.find(({ name }) => name === 'top_p').value = 0.5;
            app.graph.setDirtyCanvas(true, true);
        }"""
    )
    page.tab.wait_for_timeout(300)  # it comes out when it is drawn
    assert page.widgets("QwenVL")["top_p"] == 0.5
    assert page.run_js("() => app.graph.nodes[0].size[1]") > height


def test_the_question_is_what_one_types_into_first(page: ComfyPage) -> None:
    page.add_by_search("QwenVL", "QwenVL")
    page.run_js("() => { app.graph.nodes[0].pos = [420, 60]; app.canvas.ds.offset = [20, 60]; }")
    page.run_js("() => app.graph.setDirtyCanvas(true, true)")
    # On the canvas: the panel beside it, if it is open, has text areas of its own.
    areas = "[...document.querySelectorAll('.dom-widget textarea')]"
    page.wait(f"() => {areas}.filter((area) => area.offsetHeight).length === 1")
    page.shot("new_node")
    hint = page.run_js(f"() => {areas}.find((area) => area.offsetHeight).placeholder")
    assert hint == "Your question, such as: Describe this image."


def test_a_new_node_draws_a_new_seed_on_every_run(page: ComfyPage) -> None:
    page.add_by_search("QwenVL", "QwenVL")
    page.set("QwenVL", model=DEMO, text="hello")
    seen = page.widgets("QwenVL")
    assert (seen["seed"], seen["control_after_generate"]) == (-1, "fixed")
    page.queue()
    page.wait_for_state("done")
    assert page.widgets("QwenVL")["seed"] == -1


def test_a_node_alone_answers(page: ComfyPage, server: Server) -> None:
    """Nothing is connected to it: ComfyUI by itself would say that the prompt has no outputs."""
    page.add_by_search("QwenVL", "QwenVL")
    page.set("QwenVL", model=DEMO, text="hello", seed=77)
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()
    page.shot("alone")
    assert page.answer()
    assert json.dumps(page.run_js("() => app.graph.serialize()")).count("PreviewAny") == 0
