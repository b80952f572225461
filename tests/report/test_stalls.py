import gc
import threading
import time

import pytest

from qwenvl.decoding.rows import TokenTime
from qwenvl.report.stalls import LOOK_EVERY_S, StackSampler, pace, telling_s


def times(*tokens):
    """(when a token was there, how long it was told of) -> the list that a generation keeps."""
    return [TokenTime(arrived, arrived + telling) for arrived, telling in tokens]


def test_every_interval_over_twice_the_median_is_a_stall_after_its_token():
    figures = pace([times((0.0, 0), (0.01, 0), (0.02, 0.3), (0.33, 0), (0.34, 0), (0.365, 0), (0.375, 0))])
    assert figures["shortest_ms"] == pytest.approx(10)
    assert figures["median_ms"] == pytest.approx(10)
    assert figures["longest_ms"] == pytest.approx(310)
    assert [(stall["after_token"], round(stall["ms"]), round(stall["telling_ms"])) for stall in figures["stalls"]] == [
        (3, 310, 300),
        (5, 25, 0),
    ]


def test_twice_the_median_is_no_stall_yet():
    assert pace([times((0, 0), (1, 0), (2, 0), (4, 0))])["stalls"] == []


@pytest.mark.parametrize("given", [[], [[]], [times((1.0, 0.1))], [times((1, 0)), times((9, 0))]])
def test_tokens_that_none_follows_have_no_pace(given):
    assert pace(given) == {}


def test_between_two_generations_there_is_no_stall():
    first, second = times((0, 0), (1, 0), (2, 0)), times((100, 0), (101, 0), (104, 0))
    (stall,) = pace([first, second])["stalls"]
    assert (stall["generation"], stall["after_token"], stall["ms"]) == (2, 2, 3000)


def test_telling_is_summed_over_all_tokens():
    assert telling_s(times((0, 0.25), (1, 0.5), (2, 0.125))) == pytest.approx(0.875)


def wait(looks=3):
    time.sleep(looks * LOOK_EVERY_S)


def test_the_place_where_a_run_waits_is_seen():
    with StackSampler() as sampler:
        start = time.perf_counter()
        wait()
        end = time.perf_counter()
    assert "this run in report/test_stalls.py wait()" in sampler.between(start, end)


def test_another_thread_is_seen_at_work_and_not_when_it_waits():
    stop = threading.Event()

    def save_a_picture():
        while not stop.is_set():
            sum(range(1000))

    def idle():
        stop.wait()

    threads = [threading.Thread(target=value, name=value.__name__) for value in (save_a_picture, idle)]
    with StackSampler() as sampler:
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        wait(5)
        end = time.perf_counter()
        stop.set()
    seen = sampler.between(start, end)
    assert "thread save_a_picture in report/test_stalls.py save_a_picture()" in seen
    assert not any("idle" in entry for entry in seen)


def test_a_garbage_collection_is_seen_with_its_length():
    with StackSampler() as sampler:
        start = time.perf_counter()
        gc.collect()
        end = time.perf_counter()
    assert any(entry.startswith("garbage collection for ") for entry in sampler.between(start, end))
    assert sampler.between(end, end + 1e-9) == []


def test_what_lets_no_other_code_run_is_told_as_such():
    with StackSampler() as sampler:
        start = time.perf_counter()
        sum(range(30_000_000))  # one call that never lets go of the interpreter
        end = time.perf_counter()
        inside = sampler.between(start + 0.02, end - 0.02)
    assert "something that lets no other Python code run" in inside


def test_nobody_looks_on_afterwards():
    before = threading.active_count(), list(gc.callbacks)
    with pytest.raises(KeyboardInterrupt), StackSampler():
        raise KeyboardInterrupt
    assert (threading.active_count(), gc.callbacks) == before
