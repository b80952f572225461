"""web/models.js in Node.js: the sidebar's list of the models in memory, and its button that lets one go."""

import pytest
from page_scripts import lay_out, run

BEGIN = """
const { showSidebar } = await import("./extensions/qwenvl/models.js");
let models = given?.models ?? [];
server["/qwenvl/models"] = () => ({ models });
const setup = () => page.extensions[0].setup();
const container = document.createElement("div");
const open = async () => {
  document.body.append(container);
  setup();
  tabs["qwenvl-models"].render(container);
  await pass();
};
const lines = () => container.all("article").map((each) => each.children.map((child) => child.textContent));
const button = () => container.one("button");
"""
# Noon of the double's clock, in seconds.
NOON = 1_767_268_800
DEMO = {
    "key": "demo none cpu",
    "model": "Demo",
    "quantization": "none",
    "devices": ["cpu"],
    "bytes": 3e6,
    "since": NOON - 3 * 60,
}
LARGE = {
    "key": "8B",
    "model": "Qwen3-VL-8B",
    "quantization": "int8",
    "devices": ["cuda:0", "RAM, waiting"],
    "bytes": 9.96e9,
    "since": NOON - 125 * 60,
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("page"))


def test_it_lists_the_models_in_memory(scripts):
    large, demo = run(scripts, BEGIN + "await open(); seen.push(...lines());", {"models": [LARGE, DEMO]})
    assert (large[0], large[1], large[3]) == ("Qwen3-VL-8B", "10.0 GB, int8, on cuda:0, RAM, waiting", "Unload")
    assert large[2].endswith("(2 h 5 min)")
    assert demo[:2] == ["Demo", "3 MB, unquantized, on cpu"]
    assert demo[2].endswith("(3 min)")


def test_it_follows_what_the_server_says_and_leaves_the_list_alone_while_nothing_changes(scripts):
    script = """
    await open();
    const first = button();
    await pass(2000);
    seen.push(button() === first, lines().length);
    models = [];
    await pass(2000);
    seen.push(container.textContent);
    models = given.models;
    await pass(2000);
    seen.push(lines().length);
    """
    nothing = "QwenVL modelsNone is in memory. A node loads its model when it runs."
    assert run(scripts, BEGIN + script, {"models": [DEMO]}) == [True, 1, nothing, 1]


def test_it_asks_the_server_to_unload_that_model(scripts):
    script = """
    server["/qwenvl/unload"] = () => ({ unloads: "now" });
    await open();
    const pressed = container.all("button")[1];
    const done = pressed.onclick();
    seen.push(pressed.disabled);
    await done;
    seen.push(asked.find(({ method }) => method), pressed.textContent, container.all("button")[0].disabled);
    """
    asked = {"path": "/qwenvl/unload", "method": "POST", "body": {"model": DEMO["key"]}}
    assert run(scripts, BEGIN + script, {"models": [LARGE, DEMO]}) == [True, asked, "Unloads now", False]


def test_a_model_that_goes_after_the_run_says_so_until_it_is_gone(scripts):
    script = """
    server["/qwenvl/unload"] = () => ({ unloads: "after this run" });
    await open();
    await button().onclick();
    const look = () => seen.push(container.all("button").map((each) => [each.textContent, each.disabled]));
    look();
    models = [given.models[0], given.more];
    await pass(2000);
    look();
    models = [given.more];
    await pass(2000);
    models = given.models;
    await pass(2000);
    look();
    """
    going, there = ["Unloads after this run", True], ["Unload", False]
    seen = run(scripts, BEGIN + script, {"models": [DEMO], "more": LARGE})
    assert seen == [[going], [going, there], [there]], "loaded anew, it can go again"


def test_what_the_server_refuses_is_said_and_the_button_can_be_pressed_again(scripts):
    script = """
    server["/qwenvl/unload"] = () => ({ status: 403, text: "no" });
    await open();
    await button().onclick();
    const look = () => seen.push([button().textContent, button().disabled]);
    look();
    await pass(2000);
    look();
    server["/qwenvl/models"] = () => ({ status: 403, text: "The name evil.example is not known." });
    await pass(2000);
    seen.push(container.textContent);
    server["/qwenvl/models"] = () => ({ models });
    await pass(2000);
    seen.push(lines().length);
    """
    refused = "QwenVL modelsRefused (403): The name evil.example is not known."
    assert run(scripts, BEGIN + script, {"models": [DEMO]}) == [["Refused (403)", True], ["Unload", False], refused, 1]


def test_while_the_server_is_away_the_list_waits_and_the_button_can_be_pressed_again(scripts):
    script = """
    await open();
    const away = () => new Error("fetch failed");
    server["/qwenvl/models"] = server["/qwenvl/unload"] = away;
    await pass(2000);
    await button().onclick();
    seen.push(lines().length, button().disabled, button().textContent);
    models = [];
    server["/qwenvl/models"] = () => ({ models });
    await pass(2000);
    seen.push(lines().length);
    """
    assert run(scripts, BEGIN + script, {"models": [DEMO]}) == [1, False, "Unload", 0]


def test_it_asks_only_while_it_is_open(scripts):
    script = """
    await open();
    await pass(2000);
    const open_ = asked.length;
    container.remove();
    await pass(60000);
    seen.push(open_, asked.length);
    """
    assert run(scripts, BEGIN + script) == [2, 2]


def test_the_tab_is_there_or_not_as_the_setting_says(scripts):
    script = """
    const look = () => seen.push(Object.values(tabs).map(({ title, tooltip }) => [title, tooltip]));
    settings["QwenVL.Sidebar"] = false;
    setup();
    look();
    showSidebar(true);
    look();
    showSidebar(false);
    look();
    delete settings["QwenVL.Sidebar"];
    setup();
    look();
    """
    tab = ["QwenVL", "QwenVL: models in memory"]
    assert run(scripts, BEGIN + script) == [[], [tab], [], [tab]]
