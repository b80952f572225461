import gc
import threading
import weakref

import pytest
import torch

from qwenvl.cache import ModelCache
from qwenvl.capabilities import Machine
from qwenvl.loader import LoadPlan, ModelHandle
from qwenvl.request import LoadSpec

CPU = Machine("cpu", torch.float32, "")
A, B = LoadSpec("a"), LoadSpec("b")


class Loads:
    """Stands for the loader: makes real modules with a reference cycle, as transformers' models have, and counts."""

    def __init__(self, plan=None):
        self.specs = []
        self.alive = []
        self.plan = plan

    def __call__(self, spec):
        module = torch.nn.Linear(4, 4)
        module.cycle = [module]
        self.specs.append(spec)
        self.alive.append(weakref.ref(module))
        return ModelHandle(spec, self.plan or LoadPlan("none", "sdpa"), CPU, module, None, None, 0.0)

    @property
    def living(self):
        return sum(each() is not None for each in self.alive)


@pytest.fixture(autouse=True)
def no_collection_by_chance():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def use(cache, spec, load):
    """What a run does: its frame holds the model only while it works."""
    return cache.get(spec, load).spec


def test_the_second_run_with_the_same_settings_loads_nothing():
    cache, load = ModelCache(), Loads()
    for _ in range(3):
        with cache.turn(keep=True):
            use(cache, A, load)
    assert load.specs == [A]


def test_a_request_that_fell_back_hits_the_cache_next_time():
    cache, load = ModelCache(), Loads(LoadPlan("none", "sdpa", ("4bit is not possible here",)))
    for _ in range(3):
        with cache.turn(keep=True):
            use(cache, LoadSpec("a", "4bit"), load)
    assert len(load.specs) == 1


def test_the_old_model_is_gone_before_the_new_one_is_read():
    cache, load = ModelCache(), Loads()
    living = []

    def second(spec):
        living.append(load.living)
        return load(spec)

    with cache.turn(keep=True):
        use(cache, A, load)
    with cache.turn(keep=True):
        use(cache, B, second)
    assert living == [0]
    assert cache.held == B


def test_without_keep_the_model_is_gone_when_the_turn_ends():
    cache, load = ModelCache(), Loads()
    with cache.turn(keep=False):
        use(cache, A, load)
        assert load.living == 1
    assert load.living == 0
    assert cache.held is None


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_without_keep_the_model_is_gone_after_an_error_too(kind):
    cache, load = ModelCache(), Loads()

    def fail():
        handle = cache.get(A, load)
        raise kind(f"with {type(handle.model).__name__} in its frame")

    # The error is kept, as ComfyUI keeps it for its report: its traceback holds fail's frame.
    with pytest.raises(kind) as caught, cache.turn(keep=False):
        fail()
    assert caught.value is not None
    assert load.living == 0


def test_an_error_that_came_from_another_holds_no_model_either():
    cache, load = ModelCache(), Loads()

    def fail():
        handle = cache.get(A, load)
        raise ValueError(type(handle).__name__)

    def translate():
        try:
            fail()
        except ValueError as error:
            raise RuntimeError("in other words") from error

    with pytest.raises(RuntimeError) as caught, cache.turn(keep=False):
        translate()
    assert caught.value.__cause__ is not None
    assert load.living == 0


def test_a_model_that_failed_to_load_is_tried_again():
    cache, load = ModelCache(), Loads()

    def broken(spec):
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), cache.turn(keep=True):
        use(cache, A, broken)
    assert cache.held is None
    with cache.turn(keep=True):
        use(cache, A, load)
    assert cache.held == A


def test_two_threads_take_turns():
    cache, load = ModelCache(), Loads()
    inside, most = [], []

    def run(spec):
        with cache.turn(keep=True):
            inside.append(spec)
            most.append(len(inside))
            use(cache, spec, load)
            inside.remove(spec)

    threads = [threading.Thread(target=run, args=(spec,)) for spec in (A, B) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(most) == 16
    assert max(most) == 1
