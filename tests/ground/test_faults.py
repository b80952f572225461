import weakref

import pytest
import tiny
import torch
from pictures import draw, image
from shortage import MESSAGE, Shortage

from qwenvl.decoding import cuda_graph
from qwenvl.decoding.own_step import OwnStep
from qwenvl.faults import DeviceLostError, is_lost_device, is_out_of_memory, running_out_at_once
from qwenvl.loading import loader
from qwenvl.loading.budget import OutOfMemoryError
from qwenvl.loading.cache import ModelCache
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.source import ModelSource
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.request import LoadSpec, Request, Sampling

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
RED_CIRCLE = "a red circle on a blue background"


class Watch:
    def check(self): ...

    def stage(self, state, **facts): ...

    def update(self, new_tokens, text, thinking=""): ...

    def end(self, text): ...


@pytest.fixture
def request_():
    return Request(
        LoadSpec(DEMO),
        "Describe this image.",
        "You are a helpful assistant.",
        images={"image1": image(draw("circle", "red", "blue"))},
        sampling=Sampling(do_sample=False, max_new_tokens=40),
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        MemoryError(),
        OutOfMemoryError("x"),
    ],
)
def test_running_out_of_memory_is_known_in_all_its_words(error):
    assert is_out_of_memory(error)
    assert not is_lost_device(error)


def test_what_torch_says_here_when_ram_runs_out_is_among_them():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (ILLEGAL, True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: unspecified launch failure", True),
        ("HIP error: the operation cannot be performed in the present state", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", True),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
        ("out of memory", False),
    ],
)
def test_a_lost_gpu_is_told_from_what_leaves_it_as_it_was(text, lost):
    error = getattr(torch, "AcceleratorError", RuntimeError) if "CUDA error" in text else RuntimeError
    assert is_lost_device(error(text)) == lost
    assert not is_out_of_memory(RuntimeError(text))


def failing_once(monkeypatch, owner, name, at=1):
    """Makes one call of a function end as it does where the GPU is lost."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise getattr(torch, "AcceleratorError", RuntimeError)(ILLEGAL)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(loader, "patch_embedding_as_matmul", 1), (torch.nn.functional, "silu", 5), (OwnStep, "__call__", 3)],
    ids=["loading", "prefill", "step"],
)
def test_a_lost_gpu_takes_its_models_along_and_the_next_run_is_right(request_, monkeypatch, owner, name, at):
    models = ModelCache()
    alive, real = [], loader._read
    monkeypatch.setattr(loader, "_read", lambda *given: (result := real(*given), alive.append(weakref.ref(result)))[0])
    failing_once(monkeypatch, owner, name, at)
    with pytest.raises(DeviceLostError, match=r"GPU failed while Demo.*illegal memory access was.*restart") as caught:
        run(request_, models, Watch())
    assert caught.value is not None  # kept, as ComfyUI keeps it for its report
    assert [tensor() for tensor in alive] == [None]
    assert models.held == []
    assert run(request_, models, Watch()).text == RED_CIRCLE
    models.clear()


def test_a_lost_gpu_that_cannot_be_tidied_up_is_the_error_all_the_same(request_, monkeypatch, caplog):
    models = ModelCache()
    run(request_, models, Watch())
    failing_once(monkeypatch, OwnStep, "__call__")
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: failing(), raising=False)

    def failing():
        raise RuntimeError(ILLEGAL)

    with pytest.raises(DeviceLostError):
        run(request_, models, Watch())
    assert models.held == []
    assert "gives no memory back" in caplog.text
    monkeypatch.undo()
    assert run(request_, models, Watch()).text == RED_CIRCLE
    models.clear()


def test_a_capture_that_ends_in_an_error_of_the_gpu_goes_on_without_one(request_, monkeypatch, caplog):
    """Where the GPU is lost the next step says so by itself."""
    models = ModelCache()
    run(request_, models, Watch())
    (resident,) = models._residents.values()
    resident.handle.decoder._captures = True
    failing_once(monkeypatch, cuda_graph.CapturedStep, "_watched")
    with caplog.at_level("INFO"):
        assert run(request_, models, Watch()).text == RED_CIRCLE
    assert "without a CUDA graph: CUDA error: an illegal memory access" in caplog.text
    models.clear()


def test_running_out_while_weights_are_converted_keeps_its_name(tmp_path):
    """transformers 5 catches it, reads on, and raises an error that does not speak of memory. The experts of this model
    lie on disk one by one, and are stacked while they are read."""
    folder = tiny.save("qwen3_moe", tmp_path / "m")
    source = ModelSource(LoadSpec("m"), folder, Machine("cpu", torch.float32, ""))
    whole = Shortage()
    with whole():
        source.load()
    for number in range(1, whole.count + 1, 2):
        with Shortage(number)(), pytest.raises(OutOfMemoryError, match="to load with m"):
            source.load()


def test_only_running_out_of_memory_ends_the_reading_of_weights():
    with pytest.raises(RuntimeError, match="must match"), running_out_at_once():
        torch.ones(2) + torch.ones(3)
    with pytest.raises(RuntimeError, match="must match"), running_out_at_once():
        _converted_by_transformers(lambda: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="Tried to allocate") as caught, Shortage(1)(), running_out_at_once():
        _converted_by_transformers(lambda: torch.ones(2))
    assert is_out_of_memory(caught.value)
    assert MESSAGE in str(caught.value)


def _converted_by_transformers(work):
    try:
        work()
    except Exception as error:
        raise RuntimeError("it must match") from error
