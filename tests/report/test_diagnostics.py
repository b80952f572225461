import gc
import json
import logging
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from asking import stats_of
from nvml_double import RTX_5090, UUID, NvmlDouble
from pictures import draw, image

from qwenvl.decoding.rows import Generation, TokenTime
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.process import PROCESS
from qwenvl.report import diagnostics, nvml
from qwenvl.report.diagnostics import Diagnosis, Phases, in_words
from qwenvl.request import LoadSpec, Request, Sampling

SCENE = "a red circle on a blue background"
PICTURE = image(draw("circle", "red", "blue"))
# So long an answer that its pace counts.
TWO = {"text": "Describe each image.", "images": {"image1": PICTURE, "image2": PICTURE}}
SLEEP_S = 0.4


class Watch:
    """Sleeps once, when it is told of a token; or raises there."""

    def __init__(self, sleep_at=None, cancel_at=None, sleep_s=SLEEP_S):
        self.sleep_at, self.cancel_at, self.sleep_s = sleep_at, cancel_at, sleep_s

    def check(self):
        pass

    def stage(self, state, **facts): ...

    def update(self, new_tokens, text, *more):
        if new_tokens == self.cancel_at:
            raise KeyboardInterrupt
        if self.sleep_at in (new_tokens, "every token"):
            time.sleep(self.sleep_s)

    def end(self, text):
        pass


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    for forget in (PROCESS.logged.clear, PROCESS.fastest.clear, nvml._start.cache_clear):
        forget()
    yield
    nvml._start.cache_clear()


@pytest.fixture
def ask(models):
    """Runs the demo model; full diagnostics unless said otherwise."""

    def answer(watch=None, **changes):
        given = {"text": "Describe this image.", "images": {"image1": PICTURE}, "diagnostics": "full"} | changes
        sampling = Sampling(do_sample=False, max_new_tokens=80)
        return run(Request(load=LoadSpec(DEMO), sampling=sampling, **given), models, watch or Watch())

    return answer


def test_the_phases_are_all_there_and_no_longer_than_the_run(ask):
    stats = ask().stats
    seconds = stats.diagnostics["phases_s"]
    assert list(seconds) == [
        *("media", "load", "template", "processor", "transfer"),
        *("vision_tower", "prefill", "decode", "detokenise"),
    ]
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) <= stats.total_s
    assert seconds["load"] == stats.loaded.load_s


def test_no_time_is_counted_twice(ask, models):
    """The tower is part of the prefill that is measured, and telling of tokens of the loop."""
    ask()
    tower = models.get(models.source(models.held[0])).model.model.visual
    hook = tower.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    other = {"image1": image(draw("square", "green", "white"))}
    stats = ask(Watch(sleep_at=5), images=other).stats
    hook.remove()
    seconds = stats.diagnostics["phases_s"]
    assert min(seconds["vision_tower"], seconds["detokenise"]) >= SLEEP_S
    assert sum(seconds.values()) <= stats.total_s


def test_pictures_that_are_still_in_memory_cost_the_vision_tower_nothing(ask):
    ask()
    assert ask().stats.diagnostics["phases_s"]["vision_tower"] == 0


def test_a_phase_that_comes_twice_counts_twice():
    phases = Phases()
    for _ in range(2):
        with phases("media"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="broken"), phases("template"):
        raise ValueError("broken")
    assert phases.seconds["media"] >= 0.04
    assert "template" in phases.seconds


def test_a_stall_is_found_at_its_token_with_its_length_and_its_place(ask):
    ask()
    result = ask(Watch(sleep_at=5))
    (stall,) = (
        one_stall for one_stall in result.stats.diagnostics["tokens"]["stalls"] if one_stall["after_token"] == 5
    )
    assert stall["ms"] >= stall["telling_ms"] >= 1000 * SLEEP_S
    assert "this run in report/test_diagnostics.py update()" in stall["meanwhile"]
    assert result.stats.diagnostics["tokens"]["longest_ms"] >= stall["ms"]
    assert result.stats.diagnostics["phases_s"]["detokenise"] >= SLEEP_S
    assert result.text == SCENE


def test_a_stall_of_the_model_is_not_put_down_to_the_telling(ask, models):
    ask()
    head = models.get(models.source(models.held[0])).model.lm_head
    calls = []

    def sleep_at_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(SLEEP_S)

    hook = head.register_forward_pre_hook(sleep_at_the_third)
    stalls = ask().stats.diagnostics["tokens"]["stalls"]
    hook.remove()
    longest = max(stalls, key=lambda value: value["ms"])
    assert longest["ms"] >= 1000 * SLEEP_S > 2 * longest["telling_ms"]
    # The prefill is the first call, and gives the first token.
    assert longest["after_token"] == 2
    assert "this run in report/test_diagnostics.py sleep_at_the_third()" in longest["meanwhile"]


def test_the_kernels_are_seen_and_what_cannot_be_known_is_said(ask):
    figures = ask().stats.diagnostics
    assert figures["attention"]["asked_for"] == "sdpa"
    assert figures["attention"]["ran"] == {"vision_tower": "flash", "prefill": "flash"}
    assert any("token loop" in entry for entry in figures["not_known"])
    assert any("not read on cpu" in entry for entry in figures["not_known"])
    assert figures["gpu"] == {"before": None, "after": None}


def test_the_statistics_can_be_written_as_json(ask):
    stats = ask().stats
    assert json.loads(json.dumps(stats.diagnostics)) == stats.diagnostics


def test_the_log_says_each_thing_in_a_line_of_its_own(ask, caplog):
    ask()
    with caplog.at_level(logging.INFO):
        ask(Watch(sleep_at=5))
    lines = [record.getMessage() for record in caplog.records]
    for beginning in ("Demo-Shapes", "phases: media", "tokens: shortest", "attention: sdpa; allowed"):
        assert sum(line.startswith(f"[QwenVL] {beginning}") for line in lines) == 1, beginning
    (stall,) = (line for line in lines if " after token 5, of which " in line)
    assert stall.startswith("[QwenVL] stall of ")
    assert "this run in report/test_diagnostics.py update()" in stall


def test_what_cannot_be_read_is_said_once(ask, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ask()
    lines = [record.getMessage() for record in caplog.records if "are not read on cpu" in record.getMessage()]
    assert lines == ["[QwenVL] diagnostics: GPU memory, clocks, power and temperature are not read on cpu"]


def test_a_summary_is_one_line(ask, caplog):
    ask()
    with caplog.at_level(logging.INFO):
        caplog.clear()
        stats = ask(diagnostics="summary").stats
    assert [record.getMessage() for record in caplog.records] == [f"[QwenVL] {stats}"]
    assert stats.diagnostics is None


def test_off_logs_no_line_and_asks_nothing(ask, caplog, monkeypatch):
    ask(diagnostics="off")
    double = NvmlDouble(RTX_5090).install(monkeypatch)
    asked = []
    for name in ("_look_at", "why_slow", "StackSampler", "pace"):
        monkeypatch.setattr(diagnostics, name, lambda *_, name=name: asked.append(name))
    with caplog.at_level(logging.DEBUG):
        caplog.clear()
        result = ask(diagnostics="off")
    assert [record.getMessage() for record in caplog.records if record.name == "qwenvl"] == []
    assert (result.text, result.stats.diagnostics, asked, double.started) == (SCENE, None, [], 0)


def test_nothing_stays_behind(ask, models):
    before = threading.active_count(), list(gc.callbacks)
    for watch in (Watch(), Watch(cancel_at=2)):
        with suppress(KeyboardInterrupt):
            ask(watch)
    assert (threading.active_count(), gc.callbacks) == before
    model = models.get(models.source(models.held[0])).model
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert not model.model.visual._forward_pre_hooks and not model.model.visual._forward_hooks


def test_a_run_that_is_slow_without_need_is_one_warning_with_the_reason(ask, caplog):
    median_s = ask(**TWO).stats.diagnostics["tokens"]["median_ms"] / 1000
    caplog.clear()
    ask(Watch("every token", sleep_s=max(0.02, 20 * median_s)), **TWO, diagnostics="summary")
    (record,) = (one_record for one_record in caplog.records if one_record.levelno >= logging.WARNING)
    assert "before: showing the text took" in record.getMessage()
    caplog.clear()
    ask(Watch("every token", sleep_s=max(0.02, 20 * median_s)), **TWO, diagnostics="off")
    assert caplog.records == []


@pytest.fixture
def card(monkeypatch):
    """A GPU of 32 GB as torch and NVML tell of it: a dictionary of what torch says, to be changed."""
    told = {"memory_allocated": 9 * 10**9, "memory_reserved": 9_500_000_000, "max_memory_allocated": 11 * 10**9}
    for name in told:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: told[name])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 32 * 10**9))
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    seen = SimpleNamespace(uuid=UUID.removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen)
    told["resets"] = resets
    return told


class OnCard(torch.nn.Module):
    device = torch.device("cuda:1")
    config = SimpleNamespace(_attn_implementation="sdpa")


def finish(level="full", between=lambda: None):
    """A generation of a model on the card, of which only the figures exist."""
    stats = stats_of(device="cuda:1")
    diagnosis = Diagnosis(level)
    with diagnosis.watching(OnCard()):
        between()
    times = [TokenTime(0.01 * step, 0.01 * step + 0.005) for step in range(4)]
    result = Generation(((0,) * 4,), 0.1, 0.06, 3, "own step", "", 0, times)
    return diagnosis.finish(stats, [result], LoadSpec("m"))


def test_memory_and_gpu_are_read_before_and_after(card, monkeypatch):
    double = NvmlDouble(dict(RTX_5090)).install(monkeypatch)

    def work():
        assert card["resets"] == [torch.device("cuda:1")], "the peak is that of this run"
        card.update(memory_allocated=10 * 10**9)
        double.answers["nvmlDeviceGetTemperature"] = 83

    figures = finish(between=work).diagnostics
    memory, gpu = figures["memory"], figures["gpu"]
    assert [memory[at]["allocated_bytes"] for at in ("before", "after")] == [9 * 10**9, 10 * 10**9]
    assert memory["after"]["peak_bytes"] == 11 * 10**9
    assert [gpu[at]["temperature_c"] for at in ("before", "after")] == [64, 83]
    lines = list(in_words(figures))
    assert (
        "memory before: 9.00 GB allocated, 9.50 GB reserved, 11.00 GB at most; "
        "after: 10.00 GB allocated, 9.50 GB reserved, 11.00 GB at most"
    ) in lines
    assert (
        "gpu before: 2400 of 3100 MHz, 432 of 575 W, 64 C, held back by the power limit; "
        "after: 2400 of 3100 MHz, 432 of 575 W, 83 C, held back by the power limit"
    ) in lines


@pytest.mark.parametrize(("reserved_gb", "warned"), [(9.9, False), (10.2, True)])
def test_more_than_a_gigabyte_that_nothing_uses_is_a_warning(card, monkeypatch, caplog, reserved_gb, warned):
    NvmlDouble(RTX_5090).install(monkeypatch)
    card["memory_reserved"] = int(reserved_gb * 1e9)
    finish()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == (
        ["[QwenVL] torch keeps 1.2 GB of the GPU's memory that nothing uses, so other programs cannot have it"]
        if warned
        else []
    )


def test_without_nvml_the_memory_is_there_and_the_reason_is_said(card, monkeypatch, caplog):
    NvmlDouble(RTX_5090, broken=True).install(monkeypatch)
    with caplog.at_level(logging.INFO):
        figures = finish().diagnostics
    assert figures["memory"]["after"]["allocated_bytes"] == 9 * 10**9
    assert figures["gpu"] == {"before": None, "after": None}
    reason = "clocks, power, temperature: NVML does not start: NVML Shared Library Not Found"
    assert reason in figures["not_known"]
    assert f"[QwenVL] diagnostics: {reason}" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("level", ["summary", "off"])
def test_less_than_full_does_not_look_at_the_card(card, monkeypatch, level):
    double = NvmlDouble(RTX_5090).install(monkeypatch)
    finish(level)
    assert (double.started, card["resets"]) == (0, [])
