"""Our models in ComfyUI's memory manager: the double's, and a real one's where COMFYUI_DIR names a checkout."""

import json
import os
import subprocess
import sys
import threading
import time

import memory_scenario
import pytest
from pictures import ROOT
from waiting import until


@pytest.fixture
def card(comfy):
    """The double with a card of 10 GB."""
    before = comfy.memory.device, comfy.memory.total
    comfy.memory.device, comfy.memory.total = memory_scenario.CARD, memory_scenario.TOTAL
    comfy.memory.loaded.clear()
    yield comfy.memory
    comfy.memory.device, comfy.memory.total = before
    comfy.memory.loaded.clear()


@pytest.fixture
def story(card, pack):
    patcher = sys.modules["comfy.model_patcher"].ModelPatcher
    return memory_scenario.Story(pack, sys.modules["comfy.model_management"], patcher)


def test_models_come_and_go_as_comfyui_needs_memory(story):
    assert memory_scenario.tell(story) == memory_scenario.EXPECTED


def test_models_on_other_devices_take_nothing_from_the_card_that_comfyui_uses(story):
    assert memory_scenario.describe_devices(story) == memory_scenario.EXPECTED_ON_DEVICES


@pytest.mark.parametrize("listen", ["127.0.0.1", "::1", "127.0.0.1,::1", "localhost", "127.8.8.8, ::1"])
def test_at_this_machine_every_folder_is_reachable(comfy, pack, listen):
    comfy.args.listen = listen
    assert pack.nodes.host.reachable() is None


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "0.0.0.0,::", "127.0.0.1,192.168.1.7", "", "my-server", "127.1"])
def test_from_elsewhere_only_comfyuis_own_folders_are(comfy, pack, listen):
    comfy.args.listen = listen
    assert pack.nodes.host.reachable() == [comfy.base / name for name in ("input", "output", "temp", "user")]


def test_with_pages_of_others_let_in_only_comfyuis_own_folders_are(comfy, pack, monkeypatch):
    """--enable-cors-header: then whatever page the user looks at may queue prompts, at this machine too."""
    assert pack.nodes.host.reachable() is None
    monkeypatch.setattr(comfy.args, "enable_cors_header", "*", raising=False)
    assert pack.nodes.host.reachable() == [comfy.base / name for name in ("input", "output", "temp", "user")]


def test_the_users_models_lie_where_updates_leave_them_and_others_cannot_write_them(comfy, pack, caplog):
    """ComfyUI's server takes files for the folder of its user, from whoever reaches it: an engine may name any key."""
    catalog, user = pack.nodes.catalog, comfy.base / "user"
    shared, hidden = user / "default" / "qwenvl" / "custom_models.json", user / "__qwenvl" / "custom_models.json"
    for file in (shared, hidden):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"models": {f"in {file.parent.name}": {"repo_id": "some/one"}}}))
    try:
        assert catalog.own_file() == shared
        assert {"in qwenvl", "in __qwenvl"} <= set(catalog.all_models())
        catalog.keep_own()
        assert caplog.text == ""
        comfy.args.listen = "0.0.0.0"
        assert catalog.own_file() == hidden
        assert {"in qwenvl", "in __qwenvl"} & set(catalog.all_models()) == {"in __qwenvl"}
        catalog.keep_own()
        assert f"{shared} is not read" in caplog.text and f"move it to {hidden}" in caplog.text
    finally:
        shared.unlink()
        hidden.unlink()


def test_relative_paths_start_in_comfyuis_folders(comfy, pack):
    assert pack.nodes.host.reading_bases()[0] == comfy.base / "input"
    assert pack.nodes.host.writing_bases() == [comfy.base / "output"]


@pytest.mark.skipif(not os.environ.get("COMFYUI_DIR"), reason="set COMFYUI_DIR to a ComfyUI checkout for this one")
def test_a_real_comfyui_tells_the_same_stories():
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "tests/support/memory_scenario.py", os.environ["COMFYUI_DIR"], str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == [memory_scenario.EXPECTED, memory_scenario.EXPECTED_ON_DEVICES]


def test_what_a_request_needs_is_asked_for_before_the_weights_are_read(story, card):
    story.theirs("core", 6000)
    story.ours("A", 3000)
    assert card.requests == [0, 500 * memory_scenario.MB]
    assert story.core["core"].loaded_size() == 0, "it was in the way, and went before the load"


def test_room_for_an_answer_is_made_by_everyone_but_the_model_that_answers(story):
    story.theirs("core", 3000)
    story.ours("B", 2000)
    spec = story.ours("A", 3000)
    story.models.free_memory(spec, 6500 * memory_scenario.MB)
    assert [key.model for key in story.models.held] == ["A"]
    assert story.core["core"].loaded_size() == 0


def test_ram_that_is_short_takes_models_that_are_in_ram_alone(story, card, monkeypatch):
    host = sys.modules["the_pack.qwenvl.comfyui.host"]
    story.ours("on the card", 3000)
    story.ours("in RAM", 3000, on=("cpu",))
    monkeypatch.setattr(host, "free_ram", lambda: 0)
    story.ours("new", 3000, on=("cpu",))
    assert [key.model for key in story.models.held] == ["on the card", "new"]


def test_what_unload_models_does_not_reach_goes_with_the_nodes(story, card):
    story.ours("on the card", 1000)
    story.ours("in RAM", 1000, on=("cpu",))
    story.models.forget_parked()
    assert [key.model for key in story.models.held] == ["on the card"]


def test_a_model_goes_when_its_prompt_leaves_the_queue(comfy, pack):
    host = sys.modules["the_pack.qwenvl.comfyui.host"]
    comfy.running[0] = (0, "p", {}, {}, [])
    gone = []
    host.when_prompt_ends("it", lambda: gone.append(1))
    time.sleep(3 * host.PROMPT_POLL_S)
    assert gone == [], "the prompt is still being worked on"
    del comfy.running[0]
    assert until(lambda: gone)
    assert len(gone) == 1


def waiting_threads():
    return [thread for thread in threading.enumerate() if thread.name == "qwenvl-release"]


def test_one_thread_waits_for_all_that_is_to_be_done_after_prompts(comfy, pack):
    """Of what is asked for again and again, the last one is done, once."""
    host, done = sys.modules["the_pack.qwenvl.comfyui.host"], []
    comfy.running |= {0: (0, "p", {}, {}, []), 1: (1, "q", {}, {}, [])}
    for number in range(500):
        host.when_gone({"p"}, "a", lambda number=number: done.append(("a", number)))
        host.when_gone({"p", "q"}, "a", lambda number=number: done.append(("a, both", number)))
        host.when_gone({"q"}, "b", lambda number=number: done.append(("b", number)))
    assert len(waiting_threads()) == 1
    del comfy.running[0]
    assert until(lambda: done) and done == [("a", 499)]
    del comfy.running[1]
    assert until(lambda: len(done) == 3)
    assert sorted(done[1:]) == [("a, both", 499), ("b", 499)]
    assert until(lambda: not waiting_threads()), "nobody waits for nothing"
    host.when_gone((), "now", lambda: done.append("now"))
    assert until(lambda: done[-1] == "now")


def test_what_fails_after_a_prompt_costs_the_rest_nothing(comfy, pack, monkeypatch):
    host, done, failed = sys.modules["the_pack.qwenvl.comfyui.host"], [], []
    monkeypatch.setattr(threading, "excepthook", lambda told: failed.append(told.exc_type))
    comfy.running[0] = (0, "p", {}, {}, [])
    host.when_gone({"p"}, "bad", lambda: 1 // 0)
    host.when_gone({"p"}, "good", lambda: done.append(1))
    del comfy.running[0]
    assert until(lambda: done and failed)
    assert failed == [ZeroDivisionError]
    assert until(lambda: not waiting_threads())


def test_models_are_looked_for_in_every_folder_that_comfyui_knows_for_them(comfy, pack, tmp_path, monkeypatch):
    folder_paths, host = sys.modules["folder_paths"], sys.modules["the_pack.qwenvl.comfyui.host"]
    own = comfy.models_dir / "LLM"
    assert host.model_roots() == [own]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "LLM", ([str(own), str(tmp_path / "more")], set()))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path / "te")], set()))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "llm", ([str(tmp_path / "more"), str(own)], set()))
    assert host.model_roots() == [own, tmp_path / "more", tmp_path / "te"]


def test_a_download_is_told_on_the_node_and_the_bar_then_counts_tokens(comfy, pack):
    watch = sys.modules["the_pack.qwenvl.comfyui.progress"].NodeWatch(40)
    watch.report(5_000_000_000, 9_000_000_000, "Downloading X: 5.0 of 9.0 GB")
    watch.update(1, "a")
    watch.end("a red")
    assert [(value, total) for value, total, _ in comfy.progress] == [
        (5_000_000_000, 9_000_000_000),
        (1, 40),
        (40, 40),
    ]
    assert comfy.texts[0] == ("Downloading X: 5.0 of 9.0 GB", "7", "browser")


def test_cancel_is_raised_from_a_report_of_a_download(comfy, pack):
    watch = sys.modules["the_pack.qwenvl.comfyui.progress"].NodeWatch(40)
    comfy.interrupted = True
    with pytest.raises(sys.modules["comfy.model_management"].InterruptProcessingException):
        watch.report(1, 2, "x")


def test_live_text_goes_to_the_page_that_queued_the_prompt(comfy, pack, monkeypatch):
    """Not to that of the prompt that began last: another thread may run one at the same time."""
    progress = sys.modules["the_pack.qwenvl.comfyui.progress"]
    comfy.running |= {0: (0, "p", {}, {"client_id": "mine"}, []), 1: (1, "q", {}, {"client_id": "theirs"}, [], {})}
    progress.NodeWatch(40).end("for me")
    monkeypatch.setattr(comfy, "prompt_id", "q")
    progress.NodeWatch(40).end("for them")
    comfy.running[1] = (1, "q", {}, {}, [])
    progress.NodeWatch(40).end("for no page: all would show it")
    monkeypatch.setattr(comfy, "prompt_id", "unknown")
    progress.NodeWatch(40).end("for the last one")
    assert comfy.texts == [
        ("for me", "7", "mine"),
        ("for them", "7", "theirs"),
        ("for the last one", "7", "browser"),
    ]


def test_folders_that_are_links_to_themselves_are_no_trouble(comfy, pack, tmp_path, monkeypatch):
    folder_paths, host = sys.modules["folder_paths"], sys.modules["the_pack.qwenvl.comfyui.host"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "LLM", ([str(loop), str(tmp_path)], set()))
    assert tmp_path in host.model_roots()
    monkeypatch.setattr(host, "preset_folder", lambda: loop)
    assert not host.is_preset_folder(tmp_path)
