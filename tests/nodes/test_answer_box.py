"""web/answer.js in Node.js: what the box on a node shows, and what its button copies."""

import json

import pytest
from page_scripts import lay_out, run
from pictures import ROOT

# After every state what a user sees of the box. `given` are the states, one after the other.
SHOW = """
const { show } = await import("./extensions/qwenvl/answer.js");
const node = new Node([{ name: "text", value: "What is it?" }]);
for (const state of given) {
  show(node, state);
  const box = node.widgets.at(-1).element;
  const told = (name) => (box.one(name).hidden ? null : box.one(name).textContent);
  seen.push({
    state: box.dataset.state, status: told(".status"), text: told(".text"), rest: told(".rest"), button: told("button"),
    thought: box.one("details").hidden ? null : told(".thinking"), folded: !box.one("details").open,
  });
}
"""
LIVE = {"state": "answering", "text": "a red", "done": 2, "unit": "tokens", "per_s": 10.04}
DONE = {"state": "done", "text": "a red circle", "done": 5, "unit": "tokens", "per_s": 11}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("page"))


def test_an_answer_takes_the_place_of_the_text_that_was_live(scripts):
    live, done = run(scripts, SHOW, [LIVE, DONE])
    assert (live["text"], live["status"]) == ("a red", "Answering · 2 tokens · 10.0 tokens/s")
    assert (done["text"], done["status"]) == ("a red circle", "5 tokens · 11.0 tokens/s")
    assert (done["state"], done["rest"], done["button"]) == ("done", None, "Copy")


def test_an_error_is_marked_and_hides_the_old_answer_and_its_thought(scripts):
    thought = {**DONE, "thinking": "It is round."}
    before, error = run(
        scripts, SHOW, [thought, {"state": "error", "text": "Film 'a.mp4' cannot be read.", "thinking": ""}]
    )
    assert (before["thought"], before["folded"]) == ("It is round.", True)
    assert (error["state"], error["status"], error["text"]) == ("error", "Error", "Film 'a.mp4' cannot be read.")
    assert error["thought"] is None
    (style,) = run(scripts, SHOW + "seen.splice(0, 9, document.head.textContent)", [DONE])
    assert '.qwenvl-answer[data-state="error"] .status { background:' in style


STATUS = [
    ({"state": "starting"}, "Starting"),
    (
        {"state": "downloading", "done": 5e8, "total": 2e9, "per_s": 1e7},
        "Downloading 500 MB of 2.0 GB · 10 MB/s · 3 min left",
    ),
    (
        {"state": "downloading", "done": 5e8, "total": 6e8, "per_s": 1e7},
        "Downloading 500 MB of 600 MB · 10 MB/s · 10 s left",
    ),
    (
        {"state": "downloading", "done": 1e6, "total": 3e6, "per_s": 81_234},
        "Downloading 1 MB of 3 MB · 82 KB/s · 25 s left",
    ),
    ({"state": "downloading", "done": 0, "total": 2e9, "per_s": None}, "Downloading 0 MB of 2.0 GB"),
    ({"state": "loading", "model": "Demo", "size": 5e6}, "Loading Demo · 5 MB"),
    ({"state": "reading", "pictures": 0, "videos": 0}, "Reading the question"),
    ({"state": "reading", "pictures": 1, "videos": 0}, "Reading 1 picture"),
    ({"state": "reading", "pictures": 3, "videos": 0}, "Reading 3 pictures"),
    ({"state": "reading", "pictures": 1, "videos": 1}, "Reading the video"),
    ({"state": "reading", "done": 1, "total": 8, "unit": "pictures", "text": "1 of 8 pictures"}, "Reading 8 pictures"),
    ({"state": "done", "done": 8, "total": 8, "unit": "pictures", "per_s": 9, "text": "8 pictures"}, ""),
    ({"state": "asking", "model": "m"}, "Waiting for m"),
    ({"state": "thinking", "done": 1, "unit": "tokens", "per_s": None}, "Thinking · 1 token"),
    ({"state": "answering", "done": 0, "unit": "tokens", "per_s": None}, "Answering · 0 tokens"),
    (
        {"state": "answering", "done": 2, "total": 3, "unit": "answers", "per_s": 1},
        "Answering · 2 of 3 answers · 1.0 answers/s",
    ),
    ({"state": "done", "done": 1, "unit": "tokens", "per_s": None, "text": "a"}, "1 token"),
    ({"state": "done", "done": 2, "unit": "tokens", "per_s": None, "text": "a"}, "2 tokens"),
    (
        {"state": "done", "done": 3, "total": 3, "unit": "answers", "per_s": 2.5, "text": "a"},
        "3 answers · 2.5 answers/s",
    ),
    ({"state": "done", "done": 1, "total": 1, "unit": "answers", "per_s": None, "text": "a"}, "1 answer"),
    ({"state": "answering", "done": 1, "total": None, "unit": "answers", "per_s": None}, "Answering · 1 answer"),
    ({"state": "done", "text": "of a run that nobody has seen"}, ""),
    ({"state": "cancelled", "done": 1, "unit": "tokens", "text": "a"}, "Cancelled after 1 token"),
    ({"state": "cancelled", "done": 2, "total": 3, "unit": "answers"}, "Cancelled after 2 of 3 answers"),
    ({"state": "cancelled", "done": 5e8, "unit": "bytes"}, "Cancelled"),
    ({"state": "cancelled"}, "Cancelled"),
    ({"state": "of a server that is newer than the page"}, ""),
]


def test_the_line_says_what_goes_on(scripts):
    seen = run(scripts, SHOW, [state for state, _ in STATUS])
    assert [entry["status"] for entry in seen] == [line for _, line in STATUS]
    assert [entry["button"] for entry in seen] == ["Copy" if state.get("text") else None for state, _ in STATUS]


def test_the_line_is_in_the_language_of_the_page(scripts):
    seen = run(scripts, 'settings["Comfy.Locale"] = "zh";' + SHOW, [LIVE, {"state": "error", "text": "x"}])
    words = json.loads((ROOT / "web" / "words.json").read_text(encoding="utf-8"))["zh"]
    tokens, speed = words["{n} tokens"].replace("{n}", "2"), words["{n} tokens/s"].replace("{n}", "10.0")
    assert [entry["status"] for entry in seen] == [f"{words['Answering']} · {tokens} · {speed}", words["Error"]]
    assert words["Answering"] != "Answering"


# Presses the button of a box; `given` is the state.
COPY = """
const { show } = await import("./extensions/qwenvl/answer.js");
const node = new Node();
const long = "a".repeat(given.length) + "e";
show(node, { state: "done", text: long, thinking: "only thought" });
const box = node.widgets[0].element;
if (given.http) navigator.clipboard = undefined;
await box.one("button").onclick();
seen.push(box.one(".text").textContent.length, box.one(".rest").hidden, box.one(".rest").textContent);
seen.push(clipboard.text === long, document.body.all("textarea").length, box.one("button").textContent);
await pass(1500);
seen.push(box.one("button").textContent);
"""


@pytest.mark.parametrize("http", [False, True])
def test_a_long_answer_is_cut_in_the_box_and_copied_whole(scripts, http):
    seen = run(scripts, COPY, {"length": 123_456, "http": http})
    assert seen == [100_000, False, "23457 more characters: copy to have them", True, 0, "Copied", "Copy"]


def test_an_answer_that_just_fits_is_not_cut(scripts):
    assert run(scripts, COPY, {"length": 99_999})[:3] == [100_000, True, ""]


def test_an_answer_is_text_whatever_it_looks_like(scripts):
    html = "<img src=x onerror=alert(1)>"
    (seen,) = run(scripts, SHOW, [{"state": "done", "text": html, "thinking": html}])
    assert (seen["text"], seen["thought"]) == (html, html)


# The text's box is 100 pixels high and holds 500; `given` is where the user has scrolled to.
SCROLL = """
const { show } = await import("./extensions/qwenvl/answer.js");
const node = new Node();
show(node, { state: "answering", text: "a" });
const text = node.widgets[0].element.one(".text");
Object.assign(text, { scrollHeight: 500, clientHeight: 100, scrollTop: given });
show(node, { state: "answering", text: "a b" });
seen.push(text.scrollTop);
show(node, { state: "done", text: "a b c" });
seen.push(text.scrollTop);
text.scrollTop = 50;
show(node, { state: "done", text: "a b c" });
seen.push(text.scrollTop);
"""


@pytest.mark.parametrize(("reads_at", "then"), [(400, 500), (385, 500), (120, 120), (0, 0)])
def test_the_end_stays_in_sight_while_the_answer_grows_unless_the_user_reads_above(scripts, reads_at, then):
    assert run(scripts, SCROLL, reads_at) == [then, 0, 50], "its beginning at the end, and then where the user reads"


GROW = """
const { show } = await import("./extensions/qwenvl/answer.js");
for (const isSmall of [false, true]) {
  const node = new Node([{ name: "text", value: "What is it?" }]);
  node.setSize(given);
  const before = node.serialize();
  show(node, { state: "starting" }, isSmall);
  const grown = [...node.size];
  show(node, { state: "done", text: "x".repeat(5000), thinking: "y" }, isSmall);
  seen.push({ grown, size: node.size, boxes: node.widgets.length - 1, styles: document.head.children.length });
  seen.push([before, node.serialize(), node.widgets[1].options.serialize]);
}
"""


@pytest.mark.parametrize(("size", "large", "small"), [([200, 64], 268, 152), ([600, 900], 900, 900)])
def test_a_node_grows_once_for_its_box_which_is_no_value_of_a_saved_workflow(scripts, size, large, small):
    seen = run(scripts, GROW, size)
    for entry, height in zip(seen[::2], (large, small), strict=True):
        expected = [size[0], height]
        assert entry == {"grown": expected, "size": expected, "boxes": 1, "styles": 1}
    for before, after, options in seen[1::2]:
        assert before["widgets_values"] == after["widgets_values"] == ["What is it?"]
        assert options is False, "prompts that are queued leave it out"
