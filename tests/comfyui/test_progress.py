import sys

import pytest

from qwenvl.comfyui import progress


def counted(monkeypatch, *counts, unit="tokens"):
    """What is told after counts at so many seconds each: (seconds, done)."""
    live = progress.Live()
    for seconds, done in counts:
        monkeypatch.setattr(progress.time, "monotonic", lambda seconds=seconds: seconds)
        live.count("answering", done, unit)
    return live.fields()


def test_before_anything_is_made_nothing_is_claimed():
    nothing = {"done": None, "total": None, "unit": "", "per_s": None}
    assert progress.Live().fields() == {"state": "starting", **nothing}


def test_one_token_has_no_speed_yet(monkeypatch):
    told = counted(monkeypatch, (10.0, 1))
    assert (told["done"], told["per_s"]) == (1, None)


def test_the_speed_is_that_of_the_tokens_after_the_first(monkeypatch):
    """However long the pictures took before it."""
    assert counted(monkeypatch, (100.0, 1), (102.0, 21))["per_s"] == 10.0
    assert counted(monkeypatch, (100.0, 1), (101.0, 11), (104.0, 21))["per_s"] == 5.0


def test_answers_are_counted_like_tokens(monkeypatch):
    told = counted(monkeypatch, (1.0, 0), (3.0, 4), unit="answers")
    assert (told["done"], told["unit"], told["per_s"]) == (4, "answers", 2.0)


def test_a_clock_that_stands_still_gives_no_speed(monkeypatch):
    assert counted(monkeypatch, (1.0, 0), (1.0, 4))["per_s"] is None


def test_bytes_are_not_the_first_tokens(monkeypatch):
    live = progress.Live()
    for seconds, state, done, unit in ((1.0, "downloading", 5000, "bytes"), (9.0, "answering", 1, "tokens")):
        monkeypatch.setattr(progress.time, "monotonic", lambda seconds=seconds: seconds)
        live.count(state, done, unit)
    assert (live.fields()["done"], live.fields()["per_s"]) == (1, None)


def test_what_goes_on_is_told_until_something_else_does(monkeypatch):
    live = progress.Live()
    nothing = {"done": None, "total": None, "unit": "", "per_s": None}
    live.stage("loading", {"model": "A", "size": 5})
    assert live.fields() == {"state": "loading", "model": "A", "size": 5, **nothing}
    live.count("thinking", 1, "tokens")
    assert (live.fields()["state"], "size" in live.fields()) == ("thinking", False)
    live.count("answering", 2, "tokens")
    assert (live.fields()["state"], live.fields()["done"]) == ("answering", 2)


@pytest.fixture
def watched(comfy, pack, monkeypatch):
    """A watch of a prompt that a page queued from a workflow, and what the page is told."""
    monkeypatch.setattr(sys.modules["the_pack.qwenvl.comfyui.progress"], "LIVE_TEXT_INTERVAL_S", 0.0)
    page = {"client_id": "browser", "extra_pnginfo": {"workflow": {"id": "w"}}}
    comfy.running[0] = (0, "p", {}, page, [])
    return sys.modules["the_pack.qwenvl.comfyui.progress"].NodeWatch(40), comfy.events


def test_files_that_are_checked_before_a_download_are_no_part_of_its_speed(watched, comfy):
    watch, events = watched
    watch.report(10**9, 10**9, "Checking", "checking")
    watch.report(5, 9, "Downloading")
    told = [data for event, data, _ in events if event == "qwenvl.progress"]
    assert [(entry["state"], entry["done"], entry["total"]) for entry in told[1:]] == [
        ("checking", 10**9, 10**9),
        ("downloading", 5, 9),
    ]
    assert told[-1]["per_s"] is None


def test_a_page_is_told_to_which_prompt_and_workflow_it_belongs_and_nothing_by_the_node_alone(watched, comfy):
    watch, events = watched
    watch.stage("reading", pictures=2, videos=0)
    watch.report(5, 9, "Downloading")
    watch.update(1, "", "I see")
    watch.update(2, "a", "I see")
    watch.end("a circle")
    told = [data for event, data, _ in events if event == "qwenvl.progress"]
    assert {(entry["node"], entry["prompt_id"], entry["workflow"]) for entry in told} == {("7", "p", "w")}
    states = ["starting", "reading", "downloading", "thinking", "answering", "done"]
    assert [entry["state"] for entry in told] == states
    assert [entry["text"] for entry in told] == ["", "", "", "", "a", "a circle"]
    assert told[-1]["thinking"] == "I see"
    assert told[-1]["done"] == 2
    assert (told[1]["pictures"], told[2]["done"], told[2]["total"]) == (2, 5, 9)
    assert comfy.texts == []


@pytest.mark.parametrize(
    ("extra", "workflow"),
    [
        ({}, None),
        ({"extra_pnginfo": None}, None),
        ({"extra_pnginfo": "x"}, None),
        ({"extra_pnginfo": {"workflow": [1]}}, None),
        ({"extra_pnginfo": {"workflow": {}}}, ""),
        ({"extra_pnginfo": {"workflow": {"id": 5}}}, "5"),
    ],
)
def test_programs_that_queue_without_a_workflow_are_sent_comfyuis_own_text(comfy, pack, extra, workflow):
    comfy.running[0] = (0, "p", {}, {"client_id": "program", **extra}, [])
    sys.modules["the_pack.qwenvl.comfyui.progress"].NodeWatch(40).end("a circle")
    assert comfy.texts == ([("a circle", "7", "program")] if workflow is None else [])
    assert comfy.events[-1][1]["workflow"] == workflow


def test_of_a_long_answer_the_end_is_sent_while_it_is_made_and_the_beginning_when_it_is_done(watched, comfy):
    watch, events = watched
    limit = progress.LIVE_TEXT_LIMIT
    text = "b" + "x" * (16 << 20) + "e"
    watch.update(1, text, text)
    assert len(events[-1][1]["text"]) == len(events[-1][1]["thinking"]) == limit + 1
    assert events[-1][1]["text"].startswith("…x") and events[-1][1]["text"].endswith("xe")
    watch.advance(1, 2, text)
    assert len(events[-1][1]["text"]) == limit + 1
    watch.end(text)
    assert len(events[-1][1]["text"]) == limit + 1
    assert events[-1][1]["text"].startswith("bx") and events[-1][1]["text"].endswith("x…")
    comfy.running.clear()
    bare = sys.modules["the_pack.qwenvl.comfyui.progress"].NodeWatch(40)
    bare.update(1, text)
    bare.advance(1, 2, text)
    bare.end(text)
    assert [len(one_text) for one_text, _, _ in comfy.texts] == [limit + 1, limit + 1 + len("1 of 2\n\n"), limit + 1]
