"""Choosing devices. GPUs are counted, never used: what runs on one cannot be tried without it."""

import gc
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from transformers import AutoModelForCausalLM

from qwenvl.loading import capabilities, devices
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.devices import cancellable, current, device_choices, machine_for, placement, require_device, strays
from qwenvl.loading.source import ModelSource
from qwenvl.request import InvalidSettingError, LoadSpec

GB = 10**9


@pytest.fixture
def two_gpus(monkeypatch):
    """An RTX 4090 and, second, an RTX 2080 with more memory free."""
    abilities = {"cuda:0": (8, 9), "cuda:1": (7, 5)}
    free = {"cuda:0": 10 * GB, "cuda:1": 20 * GB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", abilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 24 * GB))


def test_a_machine_without_a_gpu_offers_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ())
    assert device_choices() == ("auto", "cpu")


def test_every_gpu_is_offered_by_its_name(two_gpus):
    assert device_choices() == ("auto", "cuda:0", "cuda:1", "cpu", "all GPUs", "all GPUs and CPU")


@pytest.mark.parametrize(
    ("found", "spreads"),
    [(("cuda:0",), ("all GPUs and CPU",)), (("mps",), ()), (("xpu:0", "xpu:1"), ("all GPUs", "all GPUs and CPU"))],
)
def test_layers_are_spread_only_where_there_is_something_to_spread_them_over(monkeypatch, found, spreads):
    monkeypatch.setattr(devices, "gpus", lambda: found)
    assert device_choices() == ("auto", *found, "cpu", *spreads)


@pytest.mark.parametrize("asked", ["cuda:0", "cuda:7", "mps", "xpu:0", "all GPUs", "all GPUs and CPU"])
def test_a_device_that_does_not_exist_is_an_error_that_names_those_that_do(asked, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ())
    with pytest.raises(InvalidSettingError, match=rf"device '{asked}' does not exist.* Pick one of: auto, cpu\."):
        machine_for(asked, None)
    LoadSpec("m", device=asked)  # a saved workflow may name it


@pytest.mark.parametrize("asked", ["cuda", "gpu", "cuda:x", "all", "", "disk", "CPU"])
def test_what_is_no_device_anywhere_is_refused_at_once(asked):
    with pytest.raises(InvalidSettingError, match="device must be like"):
        LoadSpec("m", device=asked)


def test_auto_is_the_device_that_comfyui_chose(two_gpus):
    assert machine_for("auto", "cuda:1").device == "cuda:1"
    assert machine_for("auto", "cpu").device == "cpu"


def test_one_device_is_that_device_whatever_comfyui_chose(two_gpus):
    assert machine_for("cuda:1", "cuda:0").devices == ("cuda:1",)
    assert machine_for("cuda:1", "cuda:0").dtype == torch.float16
    assert machine_for("cuda:0", "cuda:1").dtype == torch.bfloat16
    beside = machine_for("cpu", "cuda:0")
    assert (beside.devices, beside.dtype) == (("cpu",), capabilities.machine("cpu").dtype)


def test_all_gpus_compute_as_the_oldest_can(two_gpus):
    where = machine_for("all GPUs", "cuda:1")
    assert where.devices == ("cuda:0", "cuda:1")
    assert (where.dtype, where.compute_capability, where.offloads) == (torch.float16, (7, 5), False)
    assert machine_for("all GPUs and CPU", "cuda:0").offloads


def test_one_device_means_that_nothing_can_go_elsewhere(two_gpus):
    for asked in ("cuda:1", "cpu"):
        assert placement(machine_for(asked, "cuda:0")) == {"device_map": {"": asked}}


def test_the_cpu_gets_layers_only_where_that_was_asked_for(two_gpus):
    assert placement(machine_for("all GPUs", "cuda:0")) == {
        "device_map": "balanced",
        "max_memory": {0: 8.5 * GB, 1: 17 * GB},
    }
    spilled = placement(machine_for("all GPUs and CPU", "cuda:0"))
    assert spilled["device_map"] == "auto"
    assert set(spilled["max_memory"]) == {0, 1, "cpu"}


@pytest.mark.parametrize(("room", "fits"), [(300_000, True), (150_000, False)])
def test_a_model_that_fits_on_no_gpu_is_noticed(two_gpus, room, fits):
    """By accelerate's own plan for a real model of 387 kB, for GPUs with that many bytes each."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(tiny.config("qwen3_moe"))
    whole = ["Qwen3MoeDecoderLayer"]
    model.hf_device_map = infer_auto_device_map(model, {0: 300_000, 1: room}, no_split_module_classes=whole)
    assert {0, 1} <= set(model.hf_device_map.values())
    assert bool(strays(model, machine_for("all GPUs", "cuda:0"))) != fits


def test_layers_in_ram_are_strays_only_where_they_were_not_asked_for(two_gpus):
    model = SimpleNamespace(hf_device_map={"a": 0, "b": "cpu", "c": 1})
    assert strays(model, machine_for("all GPUs", "cuda:0")) == ["b"]
    assert strays(model, machine_for("all GPUs and CPU", "cuda:0")) == []
    model.hf_device_map["d"] = "disk"
    assert strays(model, machine_for("all GPUs and CPU", "cuda:0")) == ["d"]
    assert strays(model, Machine("cpu", torch.float32, "")) == []


def test_the_cpu_and_apple_gpus_need_not_be_made_current():
    for device in ("cpu", "mps"):
        with current(device):
            pass


def test_counting_devices_starts_no_cuda_context():
    require_device("auto")
    assert not torch.cuda.is_initialized()


class CancelledError(Exception):
    pass


def cancels_at(last):
    """A check that raises at the last-th time that it is called."""
    seen = []

    def check():
        seen.append(1)
        if len(seen) == last:
            raise CancelledError

    return check, seen


def living_bytes():
    """Of all tensors on the CPU."""
    return sum(value.nbytes for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_load_can_be_cancelled_at_every_moment_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(devices, "LOOK_EVERY_S", -1.0)
    source = ModelSource(LoadSpec("demo"), tiny.DEMO_FOLDER, Machine("cpu", torch.float32, ""))

    def load(check):
        with cancellable(check):
            return source.load()

    never, looks = cancels_at(-1)
    load(never)  # and all imports are done
    size, often = (tiny.DEMO_FOLDER / "model.safetensors").stat().st_size, len(looks)
    gc.collect()
    gc.disable()
    try:
        before = living_bytes()
        for last in range(1, often - 20, often // 8):
            check, seen = cancels_at(last)
            with pytest.raises(CancelledError) as caught:
                load(check)
            assert len(seen) - last <= 2, "what is closed on the way out may use tensors"
            traceback.clear_frames(caught.value.__traceback__)
            del caught
            assert living_bytes() - before < size / 10
    finally:
        gc.enable()
    assert load(never).model is not None


def test_an_import_is_not_cut_in_two(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "LOOK_EVERY_S", -1.0)
    (tmp_path / "made_of_tensors.py").write_text("import torch\nfirst = torch.zeros(3)\nsecond = first + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    check, seen = cancels_at(1)
    with pytest.raises(CancelledError), cancellable(check):
        import made_of_tensors

        assert not seen
        made_of_tensors.second.sum()
    assert "made_of_tensors" in sys.modules and seen


def test_outside_the_block_and_in_other_threads_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(devices, "LOOK_EVERY_S", -1.0)
    check, seen = cancels_at(-1)
    with cancellable(check), ThreadPoolExecutor(1) as pool:
        before = len(seen)
        pool.submit(torch.zeros, 3).result()
        assert len(seen) == before
    torch.zeros(3).sum()
    assert len(seen) == before
