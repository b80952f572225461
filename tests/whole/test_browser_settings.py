"""The pack's settings in ComfyUI's Settings, and what they change, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfyui_page import ComfyPage
from comfyui_scene import DEMO
from comfyui_server import Server

FIRST = {"KeepAnswers": False, "Downloads": "auto", "Model": "*", "Sidebar": True}
# In the list of the pack, and nowhere on this machine.
AWAY = "Qwen2.5-VL-3B-Instruct"


def change(page: ComfyPage, **values: object) -> None:
    for name, value in values.items():
        page.run_js(
            "([name, value]) => app.extensionManager.setting.set(`QwenVL.${name}`, value)",
            [name, value],
        )


@pytest.fixture(autouse=True)
def _as_at_first(page: ComfyPage) -> Iterator[None]:
    yield
    change(page, **FIRST)


def answered(page: ComfyPage) -> None:
    page.ask(text="Describe this image.")
    page.queue()
    page.wait_for_state("done")
    page.wait_until_idle()


def test_an_answer_is_in_the_file_only_where_that_is_wanted(page: ComfyPage, server: Server) -> None:
    answered(page)
    saved = page.run_js("() => app.graph.serialize()")
    assert "a red circle" not in str(saved)
    change(page, KeepAnswers=True)
    kept = page.run_js("() => app.graph.serialize()")
    values = [[node.get("widgets_values") for node in value["nodes"]] for value in (saved, kept)]
    assert values[0] == values[1], "it is no value of a widget"
    server.client.post("/history", {"clear": True})  # as a restart does
    kept["id"] = "00000000-0000-4000-8000-00000000000a"
    page.load(kept, "kept.json")
    page.wait_for_state("done")
    page.wait(
        "() => document.querySelector('.qwenvl-answer .text').textContent === 'a red circle on a blue background'"
    )
    change(page, KeepAnswers=False)
    assert "a red circle" not in str(page.run_js("() => app.graph.serialize()"))


def test_new_nodes_have_the_model_that_is_set(page: ComfyPage) -> None:
    change(page, Model=DEMO)
    page.add_by_search("QwenVL", "QwenVL")
    assert page.widgets("QwenVL")["model"] == DEMO
    change(page, Model="of another machine")
    page.run_js("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('QwenVL')); }")
    assert page.widgets("QwenVL")["model"] != "of another machine"


def test_every_setting_says_what_is_chosen(page: ComfyPage) -> None:
    page.command("Comfy.ShowSettingsDialog")
    dialog = page.tab.get_by_role("dialog")
    dialog.get_by_text("QwenVL", exact=True).first.click()
    dialog.get_by_text("Model of new nodes").wait_for()
    page.shot("settings")
    assert dialog.get_by_text("the first of the list").count() == 1
    assert dialog.get_by_text("as each node is set").count() == 1


def test_the_sidebar_goes_and_comes_with_its_setting(page: ComfyPage) -> None:
    entry = page.sidebar_button()
    entry.wait_for()
    change(page, Sidebar=False)
    entry.wait_for(state="detached")
    change(page, Sidebar=True)
    entry.wait_for()


def test_nothing_is_downloaded_where_that_is_set(page: ComfyPage) -> None:
    change(page, Downloads="never")
    page.ask(text="Describe this image.", model=AWAY)
    before = page.run_js("() => app.graph.serialize()")
    page.queue()
    page.wait_for_state("error")
    assert "so it is not downloaded" in page.answer()
    assert page.run_js("() => app.graph.serialize().nodes[0].widgets_values") == before["nodes"][0]["widgets_values"]


def test_the_user_is_asked_before_a_download(page: ComfyPage) -> None:
    change(page, Downloads="ask")
    page.ask(text="Describe this image.", model=AWAY)
    page.queue()
    page.tab.get_by_text("These models are not on the server's disk. Download them?").wait_for()
    assert page.tab.get_by_text(AWAY).count() > 0
    page.shot("download_is_asked_about")
    page.tab.keyboard.press("Escape")
    page.wait_for_state("error")
    assert "so it is not downloaded" in page.answer()


def test_nothing_is_asked_where_everything_is_here(page: ComfyPage) -> None:
    change(page, Downloads="ask")
    answered(page)
    assert page.answer() == "a red circle on a blue background"
