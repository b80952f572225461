"""A loaded model's layers in the form of this CPU: which, how much memory, the same answers."""

import weakref

import pytest
import tiny
import torch
from torch import nn

from qwenvl.cpu import packing
from qwenvl.cpu.choice import HALF, Choices
from qwenvl.cpu.int4 import Int4Linear
from qwenvl.cpu.linear import CpuLinear, Int8Linear, OneDnnLinear, Part
from qwenvl.cpu.packing import pack, packed_bytes
from qwenvl.decoding.decoder import Decoder
from qwenvl.models.families import family_of
from qwenvl.request import Sampling

KEEP = ("gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba")
PLENTY = 1 << 40


class Fixed(Choices):
    """A form for all shapes, without measuring."""

    def __init__(self, half="oneDNN, 4 rows", eight="int8 twice"):
        super().__init__(None)
        self._names = half, eight

    def fastest(self, ways, rows, columns, dtype):
        return self._names[ways is not HALF]


@pytest.fixture
def _every_size(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 1)


def kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, CpuLinear)}


def answered(model, family, inputs, rows=24):
    decoder = Decoder(model, "sdpa", decode=family_of(family).decode)
    sampling = Sampling(max_new_tokens=rows, do_sample=False)
    return decoder.generate(inputs, sampling, None, lambda tokens: None, lambda: None).rows


def text(model):
    ids = torch.randint(20, 200, (1, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.usefixtures("_every_size")
@pytest.mark.parametrize("family", tiny.families("qwen2", "qwen3", "qwen3_moe", "qwen3_5"))
def test_bfloat16_in_another_order_gives_the_same_logits(family):
    model = tiny.random_model(family).bfloat16()
    ids = text(model)["input_ids"]
    with torch.inference_mode():
        before = model(ids).logits.float()
        assert pack(model, "none", Fixed(), KEEP, PLENTY) > 0
        after = model(ids).logits.float()
    assert kinds(model) == {OneDnnLinear}
    assert (after - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize(("quantization", "kind"), [("8bit", Int8Linear), ("4bit", Int4Linear)])
@pytest.mark.parametrize("family", tiny.families("qwen2", "qwen3", "qwen3_vl", "qwen3_5", "qwen3_moe", "qwen2_5_vl"))
def test_fewer_bits_for_the_language_model_alone(family, quantization, kind):
    model = tiny.random_model(family).bfloat16()
    before = packed_bytes(model)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    pack(model, quantization, Fixed(), KEEP, PLENTY)
    replaced = {name for name in linear if isinstance(model.get_submodule(name), CpuLinear | Part)}
    assert kind in kinds(model)
    assert isinstance(model.lm_head, Int8Linear), "the head has 8 bits in both"
    for name in linear - replaced:
        odd = quantization == "4bit" and model.get_submodule(name).in_features % 32
        assert "visual" in name or name.split(".")[-1] in KEEP or odd
    assert not any("visual" in name for name in replaced)
    assert packed_bytes(model) < before + model.lm_head.nbytes


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.usefixtures("_every_size")
def test_the_own_step_says_what_the_model_s_forward_says(quantization):
    """Token by token, with the packed layers in both."""
    model = tiny.random_model("qwen3").bfloat16()
    pack(model, quantization, Fixed(), KEEP, PLENTY)
    inputs = text(model)
    (mine,) = answered(model, "qwen3", inputs)
    ids = inputs["input_ids"]
    with torch.inference_mode():
        for token in mine:
            logits = model(ids).logits[0, -1].float()
            assert logits.max() - logits[token] < 0.05 * logits.std(), "another token, and not by rounding"
            ids = torch.cat((ids, torch.tensor([[token]])), 1)


@pytest.mark.usefixtures("_every_size")
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_rows_of_a_batch_do_not_change_each_other(quantization):
    model = tiny.random_model("qwen3").bfloat16()
    pack(model, quantization, Fixed(), KEEP, PLENTY)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features).bfloat16()
    louder = x.clone()
    louder[1:] *= 1000
    assert torch.equal(layer(x)[0], layer(louder)[0])


@pytest.mark.usefixtures("_every_size")
def test_a_tied_head_is_stored_twice_only_where_there_is_room():
    for spare, packed in ((PLENTY, True), (0, False)):
        model = tiny.random_model("qwen3_vl").bfloat16()
        model.lm_head.weight = model.get_input_embeddings().weight
        pack(model, "none", Fixed(), KEEP, spare)
        assert isinstance(model.lm_head, OneDnnLinear) == packed
        assert type(model.get_input_embeddings()) is nn.Embedding


def test_small_layers_stay_as_they_are():
    model = tiny.random_model("qwen3").bfloat16()
    assert pack(model, "none", Fixed(), KEEP, PLENTY) == 0


def test_columns_that_no_group_divides_stay_plain():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.even, self.embedding = nn.Linear(48, 64), nn.Linear(64, 48), nn.Embedding(4, 4)

        get_output_embeddings = get_input_embeddings = lambda self: self.embedding

    model = Model().bfloat16()
    assert pack(model, "4bit", Fixed(), (), PLENTY) == 1
    assert type(model.odd) is nn.Linear
    assert isinstance(model.even, Int4Linear)
    assert model.even(torch.zeros(1, 64).bfloat16()).shape == (1, 48)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.usefixtures("_every_size")
def test_no_two_layers_are_in_memory_in_both_forms(quantization, monkeypatch):
    """A model that is mapped from its files never is in memory as a whole."""
    model = tiny.random_model("qwen2").bfloat16()
    plain, built = [], packing._built

    def look(build, layers):
        assert [weight() for weight in plain if weight() is not None] == []
        plain.extend(weakref.ref(layer.weight) for layer in layers)
        return built(build, layers)

    monkeypatch.setattr(packing, "_built", look)
    assert pack(model, quantization, Fixed(), KEEP, PLENTY) == len(plain)
