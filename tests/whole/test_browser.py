"""The nodes in ComfyUI's real page, in a real browser. Skipped without COMFYUI_DIR (a checkout) and a Chromium."""

from __future__ import annotations

import pytest
from comfyui_page import PACK, ComfyPage
from comfyui_scene import DEMO, ENDLESS
from comfyui_server import Server
from saved_workflows import SAVED, in_a_subgraph, workflow_of_all_cases

FIRST_SEEN = [
    *("text", "model", "quantization", "max_new_tokens", "seed", "control_after_generate"),
    *("thinking", "image_mode", "preset", "qwenvl_more"),
]


def test_a_node_found_by_search_answers_and_the_answer_is_there_after_a_reload(page: ComfyPage) -> None:
    page.ask(text="Describe this image.")
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.endsWith('background')")
    page.wait_until_idle()
    page.shot("node")
    page.wait("() => app.graph.nodes.length === 3")
    # The page keeps the workflow a moment after its last change.
    page.wait(
        """() => [localStorage, sessionStorage].some(
            (store) => Object.values(store).some((kept) => kept.includes('LoadImage') && kept.includes('QwenVL'))
        )"""
    )
    page.reload()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.endsWith('background')")
    assert page.answer() == "a red circle on a blue background"


def test_text_and_its_speed_appear_while_it_is_made_and_a_cancel_ends_it(page: ComfyPage, server: Server) -> None:
    page.ask(text="Describe this image.", model=ENDLESS, do_sample=True, max_new_tokens=7000)
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.length > 20")
    lengths = []
    for _ in range(3):
        lengths.append(len(page.answer()))
        page.wait("length => document.querySelector('.qwenvl-answer .text').textContent.length > length", lengths[-1])
    assert lengths == sorted(set(lengths))
    page.shot("while_it_is_made")
    doing, tokens, speed = page.status().split(" · ")
    assert doing == "Answering"
    assert int(tokens.removesuffix(" tokens")) > 0
    assert float(speed.removesuffix(" tokens/s")) > 0
    page.cancel()
    page.wait_for_state("cancelled")
    page.wait_until_idle()
    assert "Traceback" not in server.log().removeprefix(server.start_log)
    count = page.status().removeprefix("Cancelled after ").removesuffix(" tokens")
    assert 0 < int(count) < 7000
    assert len(page.answer()) > lengths[-1], "what was made stays"
    page.shot("cancelled")


def test_a_thought_is_folded_above_the_answer_and_only_the_answer_is_copied(page: ComfyPage) -> None:
    page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask(text="Describe this image.", thinking="on")
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.endsWith('background')")
    page.wait_until_idle()
    thought = page.tab.locator(".qwenvl-answer details")
    assert page.answer() == "a red circle on a blue background"
    assert thought.get_attribute("open") is None
    assert not thought.locator(".thinking").is_visible()
    thought.locator("summary").click()
    assert thought.locator(".thinking").text_content() == "I see one image. It shows a red circle."
    page.shot("thought")
    page.tab.get_by_text("Copy", exact=True).click()
    page.wait("() => document.querySelector('.qwenvl-answer button').textContent === 'Copied'")
    assert page.run_js("() => navigator.clipboard.readText()") == "a red circle on a blue background"


def test_few_widgets_are_shown_until_more_are_asked_for(page: ComfyPage) -> None:
    page.add_by_search("QwenVL", "QwenVL")
    page.run_js(
        "() => { app.graph.nodes[0].pos = [420, 60]; app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [0, 90] }"
    )
    assert list(page.widgets("QwenVL")) == FIRST_SEEN
    height = "() => app.graph.nodes[0].size[1]"
    low = page.run_js(height)
    page.shot("folded")

    page.press_widget("QwenVL", "qwenvl_more")
    everything = page.widgets("QwenVL")
    assert len(everything) > 30
    assert everything["temperature"] == 0.7
    assert page.run_js(height) > 2 * low
    page.shot("unfolded")
    page.set("QwenVL", temperature=1.2)

    page.press_widget("QwenVL", "qwenvl_more")
    assert [*page.widgets("QwenVL")] == [*FIRST_SEEN[:3], "temperature", *FIRST_SEEN[3:]]
    saved = page.run_js("() => app.graph.nodes[0].serialize().widgets_values")
    everything["temperature"] = 1.2
    del everything["qwenvl_more"]
    assert saved == list(everything.values())


def test_a_folded_widget_that_is_connected_is_shown(page: ComfyPage) -> None:
    page.add_by_search("QwenVL", "QwenVL")
    page.run_js(
        """() => {
            const node = app.graph.nodes[0], text = LiteGraph.createNode('PrimitiveString');
            app.graph.add(text);
            text.connect(0, node, node.inputs.findIndex(({ name }) => name === 'stop'));
        }"""
    )
    assert "stop" in page.widgets("QwenVL")


def test_saved_workflows_open_with_every_value_in_its_widget_and_run_with_their_pictures(page: ComfyPage) -> None:
    page.load(workflow_of_all_cases())
    found = page.run_js(
        """() => Object.fromEntries(app.graph.nodes.filter(({ id }) => id < 1000).map((node) => [node.id, {
            widgets: Object.fromEntries(node.widgets.map(({ name, value }) => [name, value])),
            pictures: node.inputs.filter(({ link, type }) => link != null && type === 'IMAGE').map(({ name }) => name),
            slots: node.inputs.every(({ link }, at) => link == null || app.graph.links.get(link).target_slot === at),
        }]))"""
    )
    prompt = page.run_js("async () => (await app.graphToPrompt()).output")
    for place, case in enumerate(SAVED["cases"], 1):
        node = found[str(place)]
        assert {name: node["widgets"][name] for name in case["expect"]} == case["expect"], case["what"]
        assert node["pictures"] == list(case.get("connected", {}).values()), case["what"]
        assert node["slots"], case["what"]
        sent = prompt[str(place)]["inputs"]
        assert "qwenvl_more" not in sent
        assert all(isinstance(sent[name], list) for name in case.get("connected", {}).values()), case["what"]


def test_a_saved_node_inside_a_subgraph_opens_the_same(page: ComfyPage) -> None:
    case = next(case for case in SAVED["cases"] if case["what"] == "the sibling fork's QwenVL")
    page.load(in_a_subgraph(case))
    found = page.run_js(
        """() => Object.fromEntries(
            app.graph.nodes[0].subgraph.nodes[0].widgets.map(({ name, value }) => [name, value])
        )"""
    )
    assert {name: found[name] for name in case["expect"]} == case["expect"]


def test_values_come_back_from_what_the_page_itself_saves(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", temperature=1.2, preset="OCR", max_video_tokens=4096)
    saved = page.run_js("() => app.graph.serialize()")
    node = next(node for node in saved["nodes"] if node["type"] == "QwenVL")
    assert node["widgets_values_named"]["preset"] == "OCR"
    assert "qwenvl_more" not in node["widgets_values_named"]
    page.load(saved)
    again = page.run_js("() => app.graph.serialize()")
    found = next(node for node in again["nodes"] if node["type"] == "QwenVL")
    assert found["widgets_values"] == node["widgets_values"]


def test_the_sidebar_tells_which_model_is_in_memory_and_unloads_it(page: ComfyPage, server: Server) -> None:
    page.ask(text="Which shape is it?")
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent")
    page.wait_until_idle()
    page.sidebar_button().click()
    entry = page.tab.locator(".qwenvl-models article", has_text=DEMO)
    entry.wait_for()
    assert "MB, unquantized, on cpu" in entry.text_content()
    page.shot("sidebar")
    entry.get_by_text("Unload", exact=True).click()
    entry.wait_for(state="detached")
    assert DEMO not in [model["model"] for model in server.client.get("/qwenvl/models")["models"]]


def test_where_nodes_are_html_the_page_folds_them_itself_and_shows_the_answer(page: ComfyPage) -> None:
    if page.run_js("() => app.extensionManager.setting.get('Comfy.Node.AlwaysShowAdvancedWidgets') == null"):
        pytest.skip("this page does not fold nodes")
    page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.run_js(
            """() => {
                const node = LiteGraph.createNode('QwenVL'), preview = LiteGraph.createNode('PreviewAny');
                node.pos = [300, 20];
                preview.pos = [1000, 20];
                app.graph.add(node);
                app.graph.add(preview);
                node.connect(0, preview, 0);
                app.canvas.ds.scale = 0.6;
                app.canvas.ds.offset = [20, 120];
            }"""
        )
        page.set("QwenVL", model=DEMO, text="Hello", seed=3)
        node = page.tab.locator("[data-node-id]").first
        node.get_by_text("preset", exact=True).wait_for()
        assert node.get_by_text("temperature", exact=True).count() == 0
        assert node.get_by_text("more settings").count() == 0
        node.get_by_test_id("advanced-inputs-button").click()
        node.get_by_text("temperature", exact=True).wait_for()
        node.get_by_test_id("advanced-inputs-button").click()
        page.queue()
        page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.length > 2")
        page.wait_until_idle()
        page.shot("nodes_as_html")
        assert page.tab.locator(".qwenvl-answer .text").is_visible()
    finally:
        page.run_js("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def templates(server: Server) -> list[str]:
    """What ComfyUI lists of this pack."""
    return sorted(server.client.get("/workflow_templates").get(PACK, []))


def test_every_template_opens_from_the_dialog_without_a_missing_node(page: ComfyPage, server: Server) -> None:
    titles = templates(server)
    if not titles:
        pytest.skip("the pack has no templates")
    for title in titles:
        page.open_template(PACK, title)
        missing = page.run_js(
            "() => app.graph.nodes.map(({ type }) => type).filter((type) => !LiteGraph.registered_node_types[type])"
        )
        assert missing == [], title
        page.shot(f"template {title}")


def test_a_template_runs_as_it_is(page: ComfyPage, server: Server) -> None:
    if "Describe an image" not in templates(server):
        pytest.skip("the pack has no template of this name")
    page.open_template(PACK, "Describe an image")
    page.queue()
    page.wait("() => document.querySelector('.qwenvl-answer .text')?.textContent.length > 5", timeout_ms=90_000)
    page.wait_until_idle()
    assert page.answer()
    page.shot("template_ran")
