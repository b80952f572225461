"""web/qwenvl.js with states.js, runs.js and model_choices.js in Node.js: what the server says is on the right node."""

import pytest
from page_scripts import lay_out, run

BEGIN = """
await import("./extensions/qwenvl/qwenvl.js");
const make = (id, type = "QwenVL") => Object.assign(new Node([{ name: "text", value: "" }], type), { id });
const open = page.open;
const queue = async () => (await api.queuePrompt(0, { output: {} })).prompt_id;
const box = (node) => {
  const area = node.widgets.find(({ name }) => name === "qwenvl_answer")?.element;
  return area ? [area.dataset.state, area.one(".status").textContent, area.one(".text").textContent] : null;
};
const progress = (prompt_id, text, more) =>
  tell("qwenvl.progress", { node: "1", prompt_id, workflow: "a graph", state: "answering", text, ...more });
const end = (prompt_id, text, node = "1") => tell("executed", { node, prompt_id, output: { text: [text].flat() } });
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("page"))


def test_an_answer_replaces_live_text_and_keeps_how_fast_it_was(scripts):
    script = """
    const node = make(1);
    await open("first.json", [node]);
    seen.push(box(node));
    const prompt = await queue();
    await progress(prompt, "a red", { done: 2, unit: "tokens", per_s: 3 });
    seen.push(box(node));
    await end(prompt, ["a red circle", "a blue square"]);
    seen.push(box(node));
    """
    live = ["answering", "Answering · 2 tokens · 3.0 tokens/s", "a red"]
    done = ["done", "2 tokens · 3.0 tokens/s", "a red circle\n\na blue square"]
    assert run(scripts, BEGIN + script) == [None, live, done]


def test_an_error_hides_the_answer_and_the_next_answer_hides_the_error(scripts):
    script = """
    const node = make(1);
    await open("first.json", [node]);
    await end(await queue(), "a red circle");
    const error = { node_id: "1", node_type: "QwenVL", exception_message: " The film cannot be read.\\n" };
    await tell("execution_error", { ...error, prompt_id: await queue() });
    seen.push(box(node));
    await end(await queue(), "a film");
    seen.push(box(node));
    await tell("execution_interrupted", { node_id: "1", node_type: "QwenVL", prompt_id: await queue() });
    seen.push(box(node));
    """
    error = ["error", "Error", "The film cannot be read."]
    assert run(scripts, BEGIN + script) == [error, ["done", "", "a film"], ["cancelled", "Cancelled", ""]]


def test_why_comfyui_refuses_a_prompt_is_on_the_node_that_it_is_about(scripts):
    script = """
    const [asked_, other] = [make(1), make(2)];
    await open("first.json", [asked_, other]);
    const found = ["model", "device"].map((name) => (
      { message: "Custom validation failed", details: `${name} - Nobody has it.`, extra_info: { input_name: name } }));
    const error = new Error("refused");
    error.response = { node_errors: { 1: { errors: found, class_type: "QwenVL" } } };
    server.queue = () => error;
    seen.push(await queue().catch(({ message }) => message), box(asked_), box(other));
    """
    assert run(scripts, BEGIN + script) == ["refused", ["error", "Error", "Nobody has it."], None], "each sentence once"


def test_an_answer_is_in_the_tab_that_the_prompt_was_queued_from(scripts):
    """Both tabs hold one workflow with one id and the same node ids."""
    script = """
    const [first, second] = [make(1), make(1)];
    await open("first.json", [first]);
    const prompt = await queue();
    await open("second.json", [second]);
    await progress(prompt, "a red");
    await end(prompt, "a red circle");
    seen.push(box(second));
    const again = make(1);
    await open("first.json", [again]);
    seen.push(box(again));
    """
    assert run(scripts, BEGIN + script) == [None, ["done", "", "a red circle"]]


def test_what_another_pack_tells_is_not_ours(scripts):
    script = """
    const [ours, theirs] = [make(1), make(2, "PreviewAny")];
    await open("first.json", [ours, theirs]);
    const prompt = await queue();
    await end(prompt, "a text of theirs", "2");
    const error = { node_id: "2", node_type: "PreviewAny", exception_message: "no" };
    await tell("execution_error", { ...error, prompt_id: prompt });
    seen.push(box(ours), box(theirs), JSON.parse(page.leave()["QwenVL.runs"]).kept);
    """
    assert run(scripts, BEGIN + script) == [None, None, []]


def test_a_run_that_ended_with_the_server_says_so(scripts):
    script = """
    const node = make(1);
    await open("first.json", [node]);
    await progress(await queue(), "a red", { done: 2, unit: "tokens" });
    await tell("reconnected");
    seen.push(box(node));
    """
    assert run(scripts, BEGIN + script) == [["cancelled", "Cancelled after 2 tokens", "a red"]]


def test_when_the_page_is_left_the_answers_are_kept_by_the_path_of_their_tab(scripts):
    script = """
    await open("first.json", [make(1)]);
    const prompt = await queue();
    await end(prompt, "a red circle");
    const { queued, kept } = JSON.parse(page.leave()["QwenVL.runs"]);
    seen.push(queued, kept.map(([path, node, { text }]) => [path, node, text]));
    """
    seen = run(scripts, BEGIN + script)
    assert seen == [[["prompt 1", "first.json"]], [["first.json", "1", "a red circle"]]]


CHOICES = """
const { mark, refreshChoices, describe } = await import("./extensions/qwenvl/model_choices.js");
server["/qwenvl/choices"] = () => given.table;
const look = (model, more) => describe({ model, quantization: "none", device: "auto", download: "auto", ...more });
seen.push(look("here"));
await refreshChoices();
"""
TABLE = {
    "models": {
        "here": {"place": "here", "disk": 5e6, "memory": {"none": 5e6}},
        "engine": {"place": "elsewhere", "disk": 0, "memory": {}},
        "torn": {"place": "damaged", "disk": 5e6, "memory": {"none": 5e6}},
        "small": {"place": "hub", "disk": 5e8, "memory": {"none": 5e8, "int8": 2e8}},
        "large": {"place": "hub", "disk": 16e9, "memory": {"none": 16e9, "int8": 9e9, "fp8": 8e9}},
        "unknown": {"place": "hub", "disk": None, "memory": {}},
    },
    "memory": {"auto": 12e9, "cpu": 64e9},
    "forbidden": None,
}
OFF = "not on this machine, and downloads are off"
TOLD = [
    ("here", {}, "quiet", "on this machine · needs 5 MB of 12.0 GB: fits"),
    ("engine", {}, "quiet", "runs elsewhere"),
    ("torn", {}, "bad", "damaged · needs 5 MB of 12.0 GB: fits"),
    ("small", {}, "quiet", "500 MB to download · needs 500 MB of 12.0 GB: fits"),
    ("small", {"download": "never"}, "bad", f"{OFF} · needs 500 MB of 12.0 GB: fits"),
    ("large", {"quantization": "int8"}, "warning", "16.0 GB to download · needs 9.0 GB of 12.0 GB: fits"),
    ("large", {}, "bad", "16.0 GB to download · needs 16.0 GB of 12.0 GB: does not fit"),
    ("large", {"device": "cpu"}, "warning", "16.0 GB to download · needs 16.0 GB of 64.0 GB: fits"),
    ("large", {"device": "cuda:7"}, "warning", "16.0 GB to download"),
    ("unknown", {}, "quiet", "to be downloaded"),
    ("of nobody", {}, "bad", "not in the list of this machine"),
]


def test_a_line_says_where_a_model_is_and_whether_it_fits(scripts):
    script = CHOICES + "for (const [model, more] of given.asked) seen.push(look(model, more));"
    first, *seen = run(scripts, script, {"table": TABLE, "asked": [entry[:2] for entry in TOLD]})
    assert first is None, "nothing while nothing is known"
    assert [(entry["tone"], entry["text"]) for entry in seen] == [entry[2:] for entry in TOLD]


def test_where_downloads_are_forbidden_or_the_server_is_away(scripts):
    script = """
    seen.push(look("small").text);
    server["/qwenvl/choices"] = () => new Error("away");
    seen.push(await refreshChoices(), look("here").text);
    """
    seen = run(scripts, CHOICES + script, {"table": {**TABLE, "forbidden": "HF_HUB_OFFLINE is set"}})
    here = "on this machine · needs 5 MB of 12.0 GB: fits"
    assert seen[1:] == [f"{OFF} · needs 500 MB of 12.0 GB: fits", False, here], "what was known stays"


def test_the_list_marks_what_runs_without_a_download(scripts):
    script = CHOICES + "for (const model of Object.keys(given.table.models)) seen.push(mark(model));"
    marks = run(scripts, script, {"table": TABLE})[1:]
    assert [(mark["ready"], mark["text"]) for mark in marks] == [
        *((True, "on this machine"), (True, "runs elsewhere"), (False, "damaged")),
        *((False, "500 MB to download"), (False, "16.0 GB to download"), (False, "to be downloaded")),
    ]
