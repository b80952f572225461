import pytest
import torch

from qwenvl.capabilities import choose_dtype, machine, why_no_bitsandbytes


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
    monkeypatch.setattr("qwenvl.capabilities.has_package", lambda name: True)
    assert why_no_bitsandbytes("cuda:0") is None
    assert why_no_bitsandbytes("cpu") is None
    assert "Apple" in why_no_bitsandbytes("mps")
