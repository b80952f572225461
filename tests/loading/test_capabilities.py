import pytest
import torch

from qwenvl.loading.capabilities import choose_dtype, machine, why_no_bitsandbytes


@pytest.mark.parametrize(
    ("device", "capability", "cpu_bf16", "dtype"),
    [
        ("cuda:0", (7, 5), False, torch.float16),
        ("cuda:0", (8, 0), False, torch.bfloat16),
        ("cuda:0", (8, 9), False, torch.bfloat16),
        ("cuda:0", (12, 0), False, torch.bfloat16),
        ("mps", None, False, torch.float16),
        ("xpu:0", None, False, torch.bfloat16),
        ("cpu", None, True, torch.bfloat16),
        ("cpu", None, False, torch.float32),
    ],
)
def test_the_dtype_is_the_fastest_safe_one_and_has_a_reason(device, capability, cpu_bf16, dtype):
    chosen, reason = choose_dtype(device, capability, cpu_bf16)
    assert chosen == dtype
    assert reason


def test_the_device_that_comfyui_chose_is_kept():
    assert machine("cpu").device == "cpu"


def test_quantization_needs_a_device_that_can(monkeypatch):
    monkeypatch.setattr("qwenvl.loading.capabilities.has_package", lambda name: True)
    assert why_no_bitsandbytes("cuda:0") is None
    assert why_no_bitsandbytes("cpu") is None
    assert "Apple" in why_no_bitsandbytes("mps")


@pytest.mark.parametrize(
    ("quantization", "capability", "works"),
    [
        ("8bit", (7, 0), False),
        ("8bit", (7, 5), True),
        ("4bit", (7, 0), True),
        ("4bit", (5, 2), False),
        ("4bit", (12, 0), True),
    ],
)
def test_an_old_gpu_has_no_kernels_for_quantized_weights(quantization, capability, works):
    reason = why_no_bitsandbytes("cuda:0", quantization, capability)
    assert (reason is None) == works
    assert works or f"this GPU has {capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(("installed", "works"), [("0.48.2", False), ("0.49.0", True), ("0.50.2", True), ("1.0", True)])
def test_bitsandbytes_runs_on_a_cpu_from_0_49_on(installed, works, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: installed)
    reason = why_no_bitsandbytes("cpu")
    assert (reason is None) == works
    assert (
        works
        or f"0.49 or later is needed on a CPU, and {installed} is installed (pip install -U bitsandbytes)" in reason
    )


def test_bitsandbytes_without_its_library_for_this_torch_is_told_before_it_is_used(monkeypatch):
    """As it is after a torch for a CUDA that it was not built for: imported, and broken at the first product."""
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no such file"))
    assert "has no kernels for CUDA" in why_no_bitsandbytes("cuda:0", "4bit", (8, 6))
    assert why_no_bitsandbytes("cpu") is None


def test_bitsandbytes_whose_metadata_is_lost_is_told_of(monkeypatch):
    """As an update that broke off leaves it: there to be imported, and of no version."""
    monkeypatch.setattr("qwenvl.loading.capabilities.version_of", lambda name: None)
    assert "is needed on a CPU, and unknown is installed (pip install -U bitsandbytes)" in why_no_bitsandbytes("cpu")
