import pytest
import tiny
import torch
import transformers
from pictures import draw
from tiny import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwenvl.decoding.decoder import Decoder
from qwenvl.loading.capabilities import machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
from qwenvl.report import sdpa
from qwenvl.request import LoadSpec, Request, Sampling

PICTURE = [draw("circle", "red", "blue")]


def test_what_is_switched_off_is_not_allowed():
    assert sdpa.allowed() == ["flash", "memory-efficient", "math"]
    with sdpa_kernel(SDPBackend.MATH):
        assert sdpa.allowed() == ["math"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert sdpa.allowed() == ["cuDNN"]


@pytest.fixture
def ask(demo):
    """Answers with the demo model; returns the tokens and the kernels that were seen."""
    request = Request(LoadSpec("demo"), "Describe this image.")
    decoder = Decoder(demo.model, "sdpa", "generate")

    def run(watched=True, check=lambda: None):
        question = encode(demo, request, PICTURE, None)
        arguments = (question.inputs, Sampling(do_sample=False, max_new_tokens=4), None, lambda rows: None, check)
        if not watched:
            return decoder.generate(*arguments).ids, {}
        with sdpa.observed(demo.model) as kernels:
            return decoder.generate(*arguments).ids, kernels

    return run


@pytest.mark.parametrize(("allowed", "name"), [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")])
def test_the_kernel_that_ran_is_the_one_that_was_allowed(ask, allowed, name):
    with sdpa_kernel(allowed):
        _, kernels = ask()
    assert kernels == {"vision_tower": name, "prefill": name}


def test_being_watched_changes_no_token_and_leaves_nothing_behind(ask, demo):
    expected, _ = ask(watched=False)
    assert ask()[0] == expected
    assert [name for name, module in demo.model.named_modules() if "forward" in vars(module)] == []


def test_a_cancel_leaves_nothing_behind_either(ask, demo):
    def cancel():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(check=cancel)
    assert [name for name, module in demo.model.named_modules() if "forward" in vars(module)] == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_where_attention_is_no_such_kernel_nothing_is_seen(tmp_path):
    handle = load(LoadSpec("tiny", attention="eager"), save("qwen3", tmp_path), machine("cpu"))
    question = encode(handle, Request(LoadSpec("tiny"), "hello"), [], None)
    with sdpa.observed(handle.model) as kernels:
        tiny.decoder(handle.model, "eager").generate(
            question.inputs, Sampling(do_sample=False, max_new_tokens=2), None, lambda rows: None, lambda: None
        )
    assert kernels == {}


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5TextConfig"), reason="this transformers has no Qwen3.5")
def test_in_a_model_that_begins_with_linear_attention_a_later_layer_is_looked_at():
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**sizes, **heads, **linear)).eval()
    with sdpa.observed(model) as kernels, torch.inference_mode():
        model(torch.arange(1, 20)[None])
    assert kernels == {"prefill": "flash"}
