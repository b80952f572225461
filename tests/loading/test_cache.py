import gc
import threading
import time
import weakref

import pytest
import torch

from qwenvl.loading import devices
from qwenvl.loading.budget import OutOfMemoryError
from qwenvl.loading.cache import ModelCache, OneAtATime
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import LoadPlan, ModelHandle
from qwenvl.request import LoadSpec

CPU = Machine("cpu", torch.float32, "")
A, B = LoadSpec("a"), LoadSpec("b")


class Loads:
    """Stands for the loader: makes real modules with a reference cycle, as transformers' models have, and counts."""

    def __init__(self, plan=None, parks=False):
        self.specs = []
        self.alive = []
        self.plan = plan or LoadPlan("none", "sdpa")
        self.parks = parks

    def source(self, spec, fails=None):
        return _Source(self, spec, fails)

    @property
    def living(self):
        return sum(entry() is not None for entry in self.alive)


class _Source:
    def __init__(self, loads, spec, fails):
        self.loads, self.spec, self.fails = loads, spec, fails

    def size(self):
        return 1000

    def load(self):
        if self.fails:
            raise self.fails
        module = torch.nn.Linear(4, 4)
        module.cycle = [module]
        self.loads.specs.append(self.spec)
        self.loads.alive.append(weakref.ref(module))
        return ModelHandle(self.spec, self.loads.plan, CPU, module, None, None, 0.0)

    def park(self, handle):
        return (lambda: handle) if self.loads.parks else None


@pytest.fixture(autouse=True)
def no_collection_by_chance():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def use(cache, spec, loads):
    """What a run does: its frame holds the model only while it works."""
    return cache.get(cache.source(spec) or loads.source(spec)).spec


def run(cache, spec, loads, keep=True):
    with cache.turn(spec, keep=keep):
        use(cache, spec, loads)


def test_the_second_run_with_the_same_settings_loads_nothing():
    cache, loads = ModelCache(), Loads()
    for _ in range(3):
        run(cache, A, loads)
    assert loads.specs == [A]
    assert cache.held == [A]


def test_a_request_that_fell_back_hits_the_cache_next_time():
    cache, loads = ModelCache(), Loads(LoadPlan("none", "sdpa", ("4bit is not possible here",)))
    for _ in range(3):
        run(cache, LoadSpec("a", "4bit"), loads)
    assert len(loads.specs) == 1


def test_without_comfyui_the_old_model_is_gone_before_the_new_one_is_read():
    cache, loads = ModelCache(), Loads()
    run(cache, A, loads)
    source, living = loads.source(B), []
    load = source.load
    source.load = lambda: (living.append(loads.living), load())[1]
    with cache.turn(B, keep=True):
        cache.get(source)
    assert living == [0]
    assert cache.held == [B]


def test_without_keep_the_model_is_gone_when_the_turn_ends():
    cache, loads = ModelCache(), Loads()
    with cache.turn(A, keep=False):
        use(cache, A, loads)
        assert loads.living == 1
    assert loads.living == 0
    assert cache.held == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, OutOfMemoryError])
def test_without_keep_the_model_is_gone_after_an_error_too(kind):
    cache, loads = ModelCache(), Loads()

    def fail():
        handle = cache.get(loads.source(A))
        raise kind(f"with {type(handle.model).__name__} in its frame")

    # The error is kept, as ComfyUI keeps it for its report: its traceback holds fail's frame.
    with pytest.raises(kind) as caught, cache.turn(A, keep=False):
        fail()
    assert caught.value is not None
    assert loads.living == 0


def test_an_error_that_came_from_another_holds_no_model_either():
    cache, loads = ModelCache(), Loads()

    def fail():
        handle = cache.get(loads.source(A))
        raise ValueError(type(handle).__name__)

    def translate():
        try:
            fail()
        except ValueError as error:
            raise RuntimeError("in other words") from error

    with pytest.raises(RuntimeError) as caught, cache.turn(A, keep=False):
        translate()
    assert caught.value.__cause__ is not None
    assert loads.living == 0


def test_a_model_that_failed_to_load_leaves_nothing_and_is_tried_again():
    cache, loads = ModelCache(), Loads()
    with pytest.raises(OSError, match="no such file"), cache.turn(A, keep=True):
        cache.get(loads.source(A, fails=OSError("no such file")))
    assert cache.source(A) is None
    run(cache, A, loads)
    assert cache.held == [A]


class ToRam(OneAtATime):
    """As ComfyUI does it: a model gives way, but it may wait in RAM, and be where nobody else unloads it."""

    reach = True

    def reaches(self, resident):
        return self.reach

    def bring(self, resident, others, request_bytes):
        for other in others:
            other.give_way()
        resident.bring()


def test_without_comfyui_nothing_waits_in_ram():
    cache, loads = ModelCache(), Loads(parks=True)
    run(cache, A, loads)
    run(cache, B, loads)
    assert loads.living == 1


def test_a_model_that_gave_way_to_ram_comes_back_without_a_load():
    cache, loads = ModelCache(ToRam()), Loads(parks=True)
    run(cache, A, loads)
    run(cache, B, loads)
    assert cache.held == [B]
    assert loads.living == 2
    run(cache, A, loads)
    assert cache.held == [A]
    assert loads.specs == [A, B]


@pytest.mark.parametrize("forget", [lambda cache: cache.forget(A), lambda cache: cache.forget_parked()])
def test_what_waits_in_ram_can_be_let_go(forget):
    cache, loads = ModelCache(ToRam()), Loads(parks=True)
    run(cache, A, loads)
    run(cache, B, loads)
    forget(cache)
    gc.collect()
    assert loads.living == 1
    assert cache.held == [B]


def test_a_model_that_was_used_again_is_not_let_go_by_an_older_wish():
    cache, loads = ModelCache(), Loads()
    run(cache, A, loads)
    wished_at = time.monotonic()
    run(cache, A, loads)
    cache.forget(A, unless_used_after=wished_at)
    assert cache.held == [A]
    cache.forget(A, unless_used_after=time.monotonic())
    assert cache.held == []


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_take_turns_whether_or_not_they_share_a_cache(shared):
    """transformers changes the precision of everything that is computed in the process while it loads."""
    caches, loads = [ModelCache()] * 2 if shared else [ModelCache(), ModelCache()], Loads()
    inside, most = [], []

    def work(spec, cache):
        with cache.turn(spec, keep=True):
            inside.append(spec)
            time.sleep(0.005)
            most.append(len(inside))
            use(cache, spec, loads)
            inside.remove(spec)

    threads = [
        threading.Thread(target=work, args=value) for value in zip((A, B), caches, strict=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(most) == 16
    assert max(most) == 1


class Elsewhere:
    """A thread that has begun and may or may not get on."""

    def __init__(self, work):
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: (work(), self._done.set()))
        self._thread.start()

    def gets_on(self, within_s):
        return self._done.wait(within_s)


def test_who_needs_the_memory_of_a_model_that_answers_waits_until_it_has_answered():
    """As another thread of ComfyUI's may: moved to RAM in the middle of an answer, half of it would be elsewhere."""
    cache, loads = ModelCache(ToRam()), Loads(parks=True)
    with cache.turn(A, keep=True):
        use(cache, A, loads)
        other = Elsewhere(cache._residents[A].give_way)
        assert not other.gets_on(0.2)
        assert cache.held == [A]
    assert other.gets_on(10)
    assert cache.held == []


def test_a_node_that_goes_in_the_middle_of_a_run_neither_waits_nor_takes_the_model_of_the_run():
    memory = ToRam()
    memory.reach = False
    cache, loads = ModelCache(memory), Loads(parks=True)
    run(cache, A, loads)
    with cache.turn(B, keep=True):
        use(cache, B, loads)
        assert Elsewhere(cache.forget_parked).gets_on(10), "another thread's garbage collection"
        cache.forget_parked()  # this thread's own
        assert cache.held == [B]
        cache.free_memory(B, 1)
        assert loads.living == 2
    assert cache.held == []
    assert loads.living == 0


def test_who_waits_for_another_run_can_cancel():
    cache, loads = ModelCache(), Loads()
    cancelled = []

    def wait():
        with pytest.raises(KeyboardInterrupt), cache.turn(B, keep=True, check=cancel):
            use(cache, B, loads)
        cancelled.append(1)

    def cancel():
        raise KeyboardInterrupt

    with cache.turn(A, keep=True):
        use(cache, A, loads)
        assert Elsewhere(wait).gets_on(10)
        assert cancelled == [1]
        assert loads.specs == [A]


def test_what_a_run_checks_is_checked_while_its_model_is_read_and_not_afterwards(monkeypatch):
    monkeypatch.setattr(devices, "LOOK_EVERY_S", -1.0)
    cache, loads, seen = ModelCache(), Loads(), []
    with cache.turn(A, keep=True):
        cache.get(loads.source(A), check=lambda: seen.append(1))
        assert seen
        seen.clear()
        torch.zeros(2)
        cache.get(cache.source(A))
    assert not seen


def test_a_cancel_of_a_run_whose_model_stays_collects_no_garbage(monkeypatch):
    """In a process with ComfyUI in it that takes a third of a second."""
    cache, loads, collected = ModelCache(), Loads(), []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    with pytest.raises(KeyboardInterrupt), cache.turn(A, keep=True):
        use(cache, A, loads)
        raise KeyboardInterrupt
    assert not collected and cache.held == [A]


def test_without_comfyui_what_a_failed_load_left_goes_at_once():
    cache, loads = ModelCache(), Loads()
    left = []

    def load():
        module = torch.nn.Linear(4, 4)
        module.cycle = [module]
        left.append(weakref.ref(module))
        raise KeyboardInterrupt

    source = loads.source(A)
    source.load = load
    with pytest.raises(KeyboardInterrupt), cache.turn(A, keep=True):
        cache.get(source)
    assert left[0]() is None
