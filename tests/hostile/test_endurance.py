"""Long runs: nothing is left behind, a cancel harms nothing, and two threads at once never mix anything.

Short versions of what `python -m benchmarks.soak` and the tests marked long do many times over.
"""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pictures import ROOT

from benchmarks.levels import look, watched_loads
from benchmarks.mixed import GREEDY, SYSTEM, Cancel, Scene, Watch
from benchmarks.soak import Soak
from qwenvl.loading.cache import ModelCache
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import IMAGE_MODES, RELEASES

# Its first six runs are of every kind: right, sampled, cancelled, refused, 8bit, a video, thinking, an answer each.
SEED = 257
# transformers keeps two tensors, of three numbers, for each of the last ten processors.
FEW, SMALL = 20, 10 * 2 * 3 * 4


@pytest.fixture
def alive():
    with watched_loads() as loads:
        yield loads


def well(soak):
    figures = soak.figures()
    return (figures["wrong"], figures["runs_with_more_models_alive_than_held"]) == ({}, 0)


def test_what_is_run_again_leaves_nothing_behind(alive, tmp_path):
    """The same runs a second time need nothing that the first had not made."""
    levels = []
    for _ in "ab":
        soak = Soak(SEED, tmp_path, alive)
        soak.runs(6, {6})
        assert well(soak), soak.figures()
        levels.append(soak.levels[6])
    first, again = levels
    assert again.models == 0
    assert again.tensors <= first.tensors + FEW
    assert again.tensor_bytes <= first.tensor_bytes + SMALL
    assert again.files <= first.files
    assert again.threads <= first.threads


@pytest.mark.long
def test_two_thousand_mixed_runs_and_two_hundred_cancels_leave_nothing_behind():
    """The benchmark itself: without what oneDNN keeps of shapes, its process shows whether memory grows."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.long)])
def test_a_right_answer_follows_every_cancel(alive, tmp_path, count):
    soak = Soak(SEED, tmp_path, alive)
    soak.cancels(count)
    assert well(soak), soak.figures()
    assert soak.figures()["cancels_followed_by_a_known_question"] == count
    assert len(alive) == 1, "no cancel costs the model"


def test_what_leaks_is_seen(alive):
    before, kept = look(alive), []
    kept.append(torch.zeros(1 << 19))
    thread_over = threading.Event()
    threads = [threading.Thread(target=thread_over.wait) for _ in range(2)]
    files = [Path(__file__).open() for _ in range(3)]  # noqa: SIM115
    for thread in threads:
        thread.start()
    kept += [torch.zeros(1) for _ in range(20)]
    grown = look(alive).growth(before, resident=False)
    thread_over.set()
    for value in (*threads, *files):
        value.join() if isinstance(value, threading.Thread) else value.close()
    assert [entry.split(":")[0] for entry in grown] == ["files", "threads", "tensors", "tensor_bytes"]


@dataclass(frozen=True)
class Told:
    """All that a caller is told of a run, times apart."""

    answers: tuple
    live: tuple
    stats: tuple


FIGURES = ("model", "quantization", "attention", "sampling", "seed", "answers", "prompt_tokens", "new_tokens")


def told(request, models):
    watch = Watch()
    result = run(request, models, watch)
    figures = json.loads(result.stats.to_json())
    return Told(result.answers, tuple(watch.texts), tuple(str(figures[name]) for name in FIGURES))


def asked(scene, text="Describe this image.", **changes):
    given = {"load": LoadSpec(DEMO), "system": SYSTEM, "images": {"image1": scene.image}, "sampling": GREEDY}
    return Request(text=text, **(given | changes))


RED, GREEN, PINK = Scene("red", "white"), Scene("green", "black"), Scene("pink", "white", (128, 160))
# Callers whose runs would spoil each other's: of one model, of the same question about other pictures and the other
# way round, of a batch, and of models that take each other's place.
CALLERS = {
    "one model": (asked(RED), asked(GREEN)),
    "one picture": (asked(RED), asked(RED, "Which colour is it?")),
    "a sample and a greedy answer": (
        asked(RED, "Name a random color.", sampling=Sampling(temperature=1.5, top_p=1, max_new_tokens=30, seed=5)),
        asked(GREEN),
    ),
    "a batch and one": (
        asked(RED, images={f"image{i}": drawn.image for i, drawn in enumerate((RED, GREEN, PINK), 1)},
              image_mode=IMAGE_MODES[1]),
        asked(PINK, thinking="on"),
    ),
    "two models": (asked(RED), asked(GREEN, load=LoadSpec(DEMO, "none", "eager"), release=RELEASES[-1])),
}  # fmt: skip


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("callers", "shared"), [*((name, True) for name in CALLERS), ("one model", False), ("two models", False)]
)
def test_two_threads_at_once_are_told_what_each_is_told_alone(models, callers, shared, rounds):
    requests = CALLERS[callers]
    expected = [told(request, models) for request in requests]
    assert expected[0] != expected[1]
    caches = [models, models] if shared else [ModelCache(), ModelCache()]
    found, start = {}, threading.Barrier(2)

    def ask(number):
        start.wait()
        found[number] = {told(requests[number], caches[number]) for _ in range(rounds)}

    at_once(ask)
    assert found == {0: {expected[0]}, 1: {expected[1]}}
    assert torch.get_default_dtype() == torch.float32


def at_once(work):
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.long)])
def test_a_cancel_of_one_thread_costs_the_other_nothing(models, rounds):
    requests = asked(RED), asked(GREEN)
    expected, answers, cancelled = told(requests[1], models), [], []

    def ask(number):
        for turn in range(rounds):
            if number:
                answers.append(told(requests[1], models))
                continue
            with pytest.raises(Cancel):
                run(requests[0], models, Watch(cancel_at=turn % 7))
            cancelled.append(turn)

    at_once(ask)
    assert answers == [expected] * rounds
    assert len(cancelled) == rounds


def test_an_error_of_one_thread_costs_the_other_nothing(models):
    requests = asked(RED, sampling=replace(GREEDY, max_new_tokens=3), thinking="on"), asked(GREEN)
    expected, found = told(requests[1], models), []

    def ask(number):
        for _ in range(2):
            if number:
                found.append(told(requests[1], models))
            else:
                with pytest.raises(RuntimeError, match="still thinking"):
                    run(requests[0], models, Watch())

    at_once(ask)
    assert found == [expected] * 2
