"""Families that our own step does not cover, on transformers' static cache."""

import pytest
import torch
import transformers
from transformers.cache_utils import StaticLayer

from qwenvl.decode import Decoder, best_tier
from qwenvl.generic import CachedLanes, why_not_generic
from qwenvl.request import Sampling

pytestmark = pytest.mark.skipif(
    not hasattr(StaticLayer(8), "cumulative_length"),
    reason="this transformers has no static cache that can be captured",
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


def random_model(family):
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)
        made = transformers.Qwen3MoeForCausalLM
    else:
        config = transformers.Qwen3_5TextConfig(**SIZES, **LINEAR)
        made = transformers.Qwen3_5ForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(config).eval()
    model.generation_config.update(eos_token_id=299, pad_token_id=0)
    return model


def ignore(*_):
    pass


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_5"])
def model(request):
    return random_model(request.param)


def prompt(*lengths):
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(20,), (20, 7, 13)], ids=["one", "padded batch"])
def test_tokens_are_those_of_generate_run_after_run(model, lengths):
    inputs = prompt(*lengths)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=64)[:, max(lengths) :].tolist()
    expected = tuple(tuple(row[: row.index(299)] if 299 in row else row) for row in made)
    decoder = Decoder(model, "sdpa", CachedLanes.name)
    sampling = Sampling(do_sample=False, max_new_tokens=64)
    for _ in range(2):
        assert decoder.generate(inputs, sampling, None, ignore, ignore).rows == expected
    assert len(set(expected[0])) > 3


def test_on_a_cpu_these_models_use_generate_and_say_why(model):
    tier, reason = best_tier(model)
    assert tier == "generate"
    assert "not one of the dense families" in reason
    assert why_not_generic(model) is None


def test_a_warm_up_can_be_undone(model):
    """What a capture does before it: run the step, give the state back, and go on as if nothing had been."""
    lanes = CachedLanes(model)
    inputs = prompt(12)
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, 16, ignore, "")
        tokens = logits.argmax(-1)
        before = [each.clone() for each in lanes.state]
        first = lanes.step(tokens).clone()
        lanes.count_on_device()
        for each, value in zip(lanes.state, before, strict=True):
            each.copy_(value)
        torch.testing.assert_close(lanes.step(tokens), first)
