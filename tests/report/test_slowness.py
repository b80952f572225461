from dataclasses import replace
from itertools import count

import pytest
from asking import stats_of

from qwenvl.decoding.rows import Generation, TokenTime
from qwenvl.process import PROCESS
from qwenvl.report import slowness
from qwenvl.report.slowness import why_slow
from qwenvl.request import LoadSpec

NOTHING = {"gpu": None, "memory": None}
names = count()


@pytest.fixture
def run():
    """One run of a model of its own after another: asks whether it was slow."""
    spec = LoadSpec(f"model {next(names)}")
    yield lambda result, prompt=100, looked=NOTHING, busy=5.0, tier="own step": why_slow(
        spec, stats(prompt, tier), [result, SHORT], lambda: looked, lambda: busy
    )
    PROCESS.fastest.clear()


def stats(prompt_tokens, tier):
    return stats_of(prompt_tokens=prompt_tokens, tier=tier)


def made(interval_s, tokens=40, stalls=(), telling_s=0.0, first_s=None):
    """A generation with an even pace but for {after token: length}."""
    now, times = 0.0, []
    lengths = {1: first_s or interval_s, **dict(stalls)}
    for number in range(1, tokens + 1):
        times.append(TokenTime(now, now + telling_s))
        now += lengths.get(number, interval_s)
    return Generation(((0,) * tokens,), 0.1, times[-1].arrived, tokens - 1, "own step", "", 0, times)


SHORT = Generation(((0,),), 0.1, 0.0, 0, "own step", "", 0, [TokenTime(0.0, 0.0)])


def test_a_third_of_what_was_reached_is_not_slow_yet_and_less_is(run):
    assert run(made(0.01)) is None
    assert run(made(0.0299)) is None
    assert "made 33.2 tokens/s, and 100.0 before" in run(made(0.0301))


def test_the_fastest_run_counts_whenever_it_was(run):
    assert [run(made(value)) for value in (0.02, 0.005, 0.014)] == [None] * 3
    assert "and 200.0 before" in run(made(0.0151))


def test_a_few_tokens_and_a_first_step_that_is_captured_say_nothing(run):
    run(made(0.01))
    assert run(made(0.5, tokens=16)) is None
    assert run(made(0.01, first_s=9.0)) is None
    assert run(made(0.5, tokens=17)) is not None


def test_another_way_of_making_tokens_is_measured_by_itself(run):
    run(made(0.01))
    assert run(made(0.9), tier="generate") is None


@pytest.mark.parametrize("rows", [(8, 1), (1, 8)])
def test_a_batch_of_another_size_is_measured_by_itself(run, rows):
    """Its steps take another time."""
    fast, slow = (replace(made(value), rows=((0,) * 40,) * size) for value, size in zip((0.01, 0.9), rows, strict=True))
    assert [run(value) for value in (fast, slow)] == [None] * 2
    assert run(replace(slow, rows=fast.rows)) is not None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"result": made(0.1, telling_s=0.08)}, "showing the text took 3.2 of 4.0 s"),
        (
            {"result": made(0.01, stalls={7: 1.0, 21: 2.0})},
            "2 stalls took 3.0 of 3.4 s, the longest of 2.0 s after token 21",
        ),
        (
            {"looked": {"gpu": {"clock_mhz": 210, "max_clock_mhz": 3100, "held_back_by": []}, "memory": None}},
            "the GPU runs at 210 of 3100 MHz",
        ),
        (
            {"looked": {"gpu": {"clock_mhz": 600, "max_clock_mhz": 3100, "held_back_by": ["heat"]}, "memory": None}},
            "at 600 of 3100 MHz, held back by heat",
        ),
        (
            {"looked": {"gpu": None, "memory": {"free_bytes": 10**8, "total_bytes": 24 * 10**9}}},
            "0.1 of 24 GB are free on the GPU, so its driver may use slow RAM instead",
        ),
        ({"busy": 93.0}, "other programs use 93 % of the CPU"),
        ({"prompt": 4000}, "the prompt has 4000 tokens, and had 100 then"),
        ({}, "no figure says why; diagnostics full shows them all"),
    ],
)
def test_the_reason_is_the_likeliest_that_the_figures_give(run, given, reason):
    run(made(0.01))
    assert reason in run(**{"result": made(0.1), **given})


def test_a_gpu_at_its_clock_with_memory_to_spare_is_no_reason(run):
    run(made(0.01))
    fine = {
        "gpu": {"clock_mhz": 2700, "max_clock_mhz": 3100, "held_back_by": ["the power limit"]},
        "memory": {"free_bytes": 8 * 10**9, "total_bytes": 24 * 10**9},
    }
    assert "no figure says why" in run(made(0.1), looked=fine)


def test_how_busy_others_are_is_measured_in_percent():
    assert 0 <= slowness._cpu_percent() <= 100
