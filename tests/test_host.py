"""Our models in ComfyUI's memory manager: the double's, and a real one's where COMFYUI_DIR names a checkout."""

import json
import os
import subprocess
import sys
import time

import memory_scenario
import pytest
from conftest import ROOT


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
    assert memory_scenario.tell_of_devices(story) == memory_scenario.EXPECTED_ON_DEVICES


@pytest.mark.skipif(not os.environ.get("COMFYUI_DIR"), reason="set COMFYUI_DIR to a ComfyUI checkout for this one")
def test_a_real_comfyui_tells_the_same_stories():
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "tests/memory_scenario.py", os.environ["COMFYUI_DIR"], str(ROOT)]
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
    story.models.make_room(spec, 6500 * memory_scenario.MB)
    assert [each.model for each in story.models.held] == ["A"]
    assert story.core["core"].loaded_size() == 0


def test_ram_that_is_short_takes_models_that_are_in_ram_alone(story, card, monkeypatch):
    host = sys.modules["the_pack.qwenvl.host"]
    story.ours("on the card", 3000)
    story.ours("in RAM", 3000, on=("cpu",))
    monkeypatch.setattr(host, "free_ram", lambda: 0)
    story.ours("new", 3000, on=("cpu",))
    assert [each.model for each in story.models.held] == ["on the card", "new"]


def test_what_unload_models_does_not_reach_goes_with_the_nodes(story, card):
    story.ours("on the card", 1000)
    story.ours("in RAM", 1000, on=("cpu",))
    story.models.forget_parked()
    assert [each.model for each in story.models.held] == ["on the card"]


def test_a_model_goes_when_its_prompt_leaves_the_queue(comfy, pack):
    host = sys.modules["the_pack.qwenvl.host"]
    comfy.running[0] = (0, "p")
    gone = []
    host.when_prompt_ends(lambda: gone.append(1))
    time.sleep(3 * host.PROMPT_POLL_S)
    assert gone == [], "the prompt is still being worked on"
    del comfy.running[0]
    deadline = time.monotonic() + 10
    while not gone and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(gone) == 1
