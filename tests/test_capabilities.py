import pytest
import torch

from qwenvl.capabilities import blackwell_warning, choose_dtype, machine, why_no_bitsandbytes

CUDA_128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_124 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


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


@pytest.mark.parametrize(
    ("capability", "arch_list", "warned"),
    [
        ((12, 0), CUDA_124, True),
        ((12, 0), CUDA_128, False),
        ((12, 1), CUDA_128, False),
        ((12, 0), [*CUDA_124, "sm_120a"], False),
        ((10, 0), CUDA_124, True),
        ((10, 3), CUDA_128, False),
        ((12, 0), ["sm_90", "sm_100"], True),
        ((8, 6), CUDA_124, False),
        ((9, 0), CUDA_124, False),
        ((12, 0), [], True),
    ],
)
def test_a_blackwell_gpu_is_warned_of_exactly_where_torch_was_built_without_it(capability, arch_list, warned):
    message = blackwell_warning(capability, arch_list, "2.6.0", "12.4")
    assert bool(message) == warned
    if warned:
        assert f"sm_{capability[0]}{capability[1]}" in message
        assert "pip install" in message
        assert "570" in message


def test_the_device_that_comfyui_chose_is_kept():
    assert machine("cpu").device == "cpu"


def test_quantization_needs_a_device_that_can(monkeypatch):
    monkeypatch.setattr("qwenvl.capabilities.has_package", lambda name: True)
    assert why_no_bitsandbytes("cuda:0") is None
    assert why_no_bitsandbytes("cpu") is None
    assert "Apple" in why_no_bitsandbytes("mps")
