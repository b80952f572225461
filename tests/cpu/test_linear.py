"""Layers in a CPU's own forms compute what the plain layer computes."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qwenvl.cpu import choice, int4, linear
from qwenvl.cpu.int4 import GROUPS, Int4Linear, to_int4, unpacking
from qwenvl.cpu.linear import Int8Linear, Int8WeightLinear, Joined, OneDnnLinear, joined, to_int8

# Form -> largest error of its product with Gaussian weights, as a share of the product: its rounding of the weights.
FORMS = {
    "oneDNN": (OneDnnLinear, 0.004),
    "int8": (Int8Linear, 0.012),
    "int8 weight": (Int8WeightLinear, 0.012),
    **{f"int4 {group}": (lambda w, b, group=group: Int4Linear(w, b, group), 0.12) for group in GROUPS},
}
ROWS = (1, 2, 3, 5, 40, 130)


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_computes_the_product_for_any_number_of_rows(form, rows, biased):
    build, most = FORMS[form]
    weight, x = drawn(192, 256), drawn(rows, 256, seed=1)
    bias = drawn(192, seed=2) * 10 if biased else None
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    layer = build(weight, bias)
    found = layer(x[None])
    assert found.shape == (1, rows, 192)
    assert found.dtype == torch.bfloat16
    assert off(found[0], expected) < most
    assert layer.nbytes < 1.01 * weight.nbytes


@pytest.mark.parametrize("form", [form for form in FORMS if form != "oneDNN"])
def test_forms_with_fewer_bits_work_in_float32_too(form):
    build, most = FORMS[form]
    weight, x = drawn(64, 128, dtype=torch.float32), drawn(7, 128, dtype=torch.float32, seed=1)
    layer = build(weight, None)
    assert layer(x).dtype == torch.float32
    assert off(layer(x), x @ weight.t()) < most


@pytest.mark.parametrize("form", FORMS)
def test_a_large_channel_does_not_hide_the_others(form):
    """Language models have channels hundreds of times as large as the others, and rows as different."""
    build, most = FORMS[form]
    weight, x = drawn(128, 256), drawn(4, 256, seed=1)
    # One number in a group of its own, so that 4 bits hold it as well.
    weight[:, 128:] = 0
    x[:, 200] = 500
    x[0] *= 300
    layer = build(weight, None)
    found, expected = layer(x), x.float() @ weight.float().t()
    for row in range(4):
        assert off(found[row], expected[row]) < 1.5 * most, f"row {row}"


@pytest.mark.parametrize("form", ["int8", "int8 weight"])
def test_int8_is_off_by_its_weights_alone(form):
    """The activations lose nothing that bfloat16 would show."""
    build, _ = FORMS[form]
    weight, x = drawn(128, 256, dtype=torch.float32), drawn(4, 256, dtype=torch.float32, seed=1)
    numbers, scales = to_int8(weight)
    assert off(build(weight, None)(x), x @ (numbers * scales[:, None]).t()) < 0.0005


def test_a_cpu_that_adds_two_products_in_16_bits_gets_smaller_integers(monkeypatch):
    """Larger ones would be cut off there, without an error."""
    monkeypatch.setattr(linear, "activation_levels", lambda: 63)
    seen, product = [], linear._int8_product

    def look(integers, levels, packed):
        seen.append(integers.abs().max().item())
        return product(integers, levels, packed)

    monkeypatch.setattr(linear, "_int8_product", look)
    weight, x = drawn(128, 256, dtype=torch.float32), drawn(4, 256, dtype=torch.float32, seed=1)
    numbers, scales = to_int8(weight)
    assert off(Int8Linear(weight, None)(x), x @ (numbers * scales[:, None]).t()) < 0.0005
    assert max(seen) <= 63, "with 64 added to it, twice 127 times 127 is less than 2**15"


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_what_is_not_finite(form):
    build, _ = FORMS[form]
    layer = build(drawn(64, 128), None)
    assert layer(torch.zeros(1, 128, dtype=torch.bfloat16)).abs().max() == 0
    for bad in (float("nan"), float("inf")):
        x = drawn(1, 128)
        x[0, 3] = bad
        assert not layer(x).isfinite().all(), f"{bad} became numbers"
    zeros = build(torch.zeros(64, 128, dtype=torch.bfloat16), None)
    assert zeros(drawn(2, 128)).abs().max() == 0


def test_a_row_of_zeros_among_others_stays_zero():
    x = torch.cat((torch.zeros(1, 128), drawn(1, 128))).bfloat16()
    found = Int8Linear(drawn(64, 128), None)(x)
    assert found[0].abs().max() == 0
    assert found[1].abs().max() > 0


@pytest.mark.parametrize("rows", [16, 64, 200])
@pytest.mark.parametrize("group", GROUPS)
def test_a_4_bit_weight_made_plain_is_what_its_product_uses(rows, group):
    layer = Int4Linear(drawn(rows, 256), None, group)
    one_by_one = layer(torch.eye(256).bfloat16()[:40])
    plain = layer._plain(unpacking(), torch.bfloat16)[:40, :rows]
    assert torch.allclose(one_by_one.float(), plain.float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "oneDNN"])
def test_a_weight_that_is_converted_in_blocks_is_the_same(form, monkeypatch):
    """The last block is shorter, and its rows are no multiple of those that are packed together."""
    build, _ = FORMS[form]
    weight, x = drawn(200, 128), drawn(3, 128, seed=1)
    whole = build(weight, None)(x)
    monkeypatch.setattr(linear, "_LARGEST_BLOCK", 64 * 128)
    assert [block.start for block in linear.row_blocks(weight)] == [0, 64, 128, 192]
    assert torch.equal(build(weight, None)(x), whole)


def test_torch_s_packed_form_is_read_on_this_cpu():
    assert unpacking() is not None


@pytest.mark.parametrize("way", [lambda p, c: int4._halves(p, c, 64), lambda p, c: int4._halves(p, c, 32), int4._pairs])
def test_each_known_order_of_packed_numbers_is_a_different_one(way):
    """Otherwise the trial could not tell them apart."""
    numbers, _ = to_int4(drawn(128, 32), 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    assert way(packed, 32).shape == (32, 128)
    right = torch.equal(way(packed, 32).int(), numbers.t())
    tried = unpacking()
    assert right == torch.equal(way(packed, 32), tried(packed, 32))


class Counted(torch.nn.Module):
    """A layer that counts its products."""

    def __init__(self, rows, columns):
        super().__init__()
        self.layer, self.calls = choice.plain(drawn(rows, columns), None), 0
        self.out_features, self.in_features = rows, columns

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def test_joined_layers_are_one_product_and_give_what_they_gave():
    whole = Counted(96, 64)
    parts = Joined(whole, [48, 32, 16]).parts()
    for again in range(2):
        x = drawn(1, 5, 64, seed=again)
        found = torch.cat([part(x) for part in parts], -1)
        assert torch.equal(found, whole.layer(x))
        assert whole.calls == again + 1
    assert [(part.in_features, part.out_features) for part in parts] == [(64, 48), (64, 32), (64, 16)]


def test_joined_layers_keep_nothing_when_all_were_asked():
    joint = Joined(Counted(96, 64), [48, 48])
    x = drawn(1, 64)
    for part in joint.parts():
        part(x)
    assert joint._input is None
    assert joint._products == ()


def test_joined_layers_take_every_tensor_for_itself():
    """Asked in another order, twice, or after a run that was cancelled between two of them."""
    whole = Counted(96, 64)
    first, second = Joined(whole, [48, 48]).parts()
    one, other = drawn(1, 64), drawn(1, 64, seed=1)
    expected = {id(x): whole.layer(x).split(48, -1) for x in (one, other)}
    for part, x, index in ((first, one, 0), (first, one, 0), (first, other, 0), (second, one, 1), (second, other, 1)):
        assert torch.equal(part(x), expected[id(x)][index])


def test_only_parts_of_one_whole_are_joined():
    whole = Counted(96, 64)
    first, second = Joined(whole, [48, 48]).parts()
    stranger, _ = Joined(Counted(96, 64), [48, 48]).parts()
    assert joined([first, second]) is whole
    assert joined([first, stranger]) is None
    assert joined([torch.nn.Linear(64, 48), second]) is None
