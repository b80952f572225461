"""Which kernels of scaled_dot_product_attention are allowed while an answer is made, and afterwards."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import StaticLayer

from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.step_attention import allowed_kernels, without_cudnn
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

ALL = ["flash", "memory-efficient", "cuDNN", "math"]
TIERS = [
    pytest.param(
        tier,
        marks=pytest.mark.skipif(
            tier == "generic step" and not hasattr(StaticLayer(8), "cumulative_length"),
            reason="this transformers has no static cache of that kind",
        ),
    )
    for tier in ("own step", "generic step", "generate")
]


@pytest.fixture(scope="module")
def handle(tmp_path_factory):
    folder = tiny.save("qwen3", tmp_path_factory.mktemp("m") / "m")
    return load(LoadSpec("qwen3"), folder, Machine("cpu", torch.float32, ""))


@pytest.fixture
def seen(handle):
    """What was allowed each time that the model computed logits: of the prompt, and of each token."""
    seen = []
    hook = handle.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(allowed_kernels()))
    yield seen
    hook.remove()


def generate(handle, tier, on_tokens=lambda rows: None):
    inputs = encode(handle, Request(handle.spec, "Hi."), [], None).inputs
    sampling = Sampling(do_sample=False, max_new_tokens=6)
    return Decoder(handle.model, "sdpa", tier).generate(inputs, sampling, None, on_tokens, lambda: None)


@pytest.mark.parametrize("tier", TIERS)
def test_cudnn_computes_neither_the_prompt_nor_a_token_and_is_allowed_again(handle, seen, tier):
    assert allowed_kernels() == ALL
    generate(handle, tier)
    assert len(seen) >= 6
    assert all(entry == ["flash", "memory-efficient", "math"] for entry in seen)
    assert allowed_kernels() == ALL


@pytest.mark.parametrize("tier", TIERS)
def test_what_somebody_has_switched_off_stays_off(handle, seen, tier):
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):
        generate(handle, tier)
        assert allowed_kernels() == ["cuDNN", "math"]
    with sdpa_kernel([SDPBackend.MATH]):
        generate(handle, tier)
        assert allowed_kernels() == ["math"]
    assert all(entry == ["math"] for entry in seen)


def test_where_cudnn_alone_is_allowed_it_stays():
    """Otherwise there would be none, which is an error."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]), without_cudnn():
        assert allowed_kernels() == ["cuDNN"]


def test_a_cancel_leaves_it_allowed(handle):
    tiny.cancelled(lambda stop: generate(handle, "own step", stop), 2)
    assert allowed_kernels() == ALL


def test_a_device_s_own_kernel_stays_allowed():
    """Which torch's own sdpa_kernel() would switch off."""
    allowed = getattr(torch._C, "_get_overrideable_sdp_enabled", lambda: True)
    before = allowed()
    with without_cudnn():
        assert allowed() == before


def test_a_torch_without_that_kernel_is_left_alone(monkeypatch):
    monkeypatch.delattr(torch.backends.cuda, "cudnn_sdp_enabled")
    monkeypatch.delattr(torch.backends.cuda, "enable_cudnn_sdp")
    with without_cudnn():
        assert allowed_kernels() == ["flash", "memory-efficient", "math"]
