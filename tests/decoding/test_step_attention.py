"""Flash decoding itself needs a GPU (test_on_gpu.py). Here a kernel of the same interface stands in for it."""

import pytest
import torch
from kernels import reference_kernel

from qwenvl.decoding.kv_cache import KVCache, span_for
from qwenvl.decoding.step_attention import (
    FLASH_FROM,
    ByLength,
    Eager,
    Flash,
    Sdpa,
    allowed_kernels,
    attention_for,
    flash_kernel,
    why_not_flash,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 6, 2, 16
SIZES = (HEADS, KV_HEADS, DIM, torch.float32, CPU)


def reads_everything(query, keys, values, rows, slots, span, used):
    """A kernel that does not know about lengths on the device."""
    return reference_kernel(query, keys, values, rows, slots, span, torch.full_like(used, span))


def stored(*lengths, capacity=48):
    """A buffer in which the last token of each row has been stored but not counted, and its keys and values."""
    random = torch.Generator().manual_seed(1)
    kv = KVCache(len(lengths), KV_HEADS, DIM, capacity, torch.float32, CPU)
    kv.lens.copy_(torch.tensor(lengths) - 1)
    kv.filled, kv.even = max(lengths) - 1, len(set(lengths)) == 1
    slots = torch.arange(capacity)
    kv.bias.masked_fill_((slots < torch.tensor(lengths)[:, None])[:, None, None], 0.0)
    keys, values = kv.allocate(), kv.allocate()
    keys.copy_(torch.randn(keys.shape, generator=random))
    values.copy_(torch.randn(values.shape, generator=random))
    return kv, keys, values, torch.randn(len(lengths), HEADS, DIM, generator=random)


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (40, 1, 17)], ids=["one row", "even rows", "uneven rows"])
@pytest.mark.parametrize("attend", [Sdpa(), Eager(), Flash(reference_kernel)], ids=lambda value: value.name)
@pytest.mark.parametrize("span", [None, 44], ids=["exact", "span"])
def test_each_row_attends_to_its_own_tokens(attend, lengths, span):
    kv, keys, values, query = stored(*lengths)
    result = attend(query, keys, values, attend.prepare(kv, span))
    own = (KV_HEADS, HEADS // KV_HEADS, DIM)
    for row, length in enumerate(lengths):
        scores = query[row].view(own) @ keys[row, :, :length].transpose(-1, -2) / DIM**0.5
        expected = (scores.softmax(-1) @ values[row, :, :length]).reshape(-1)
        torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=1e-5)


def test_flash_reads_no_slot_beyond_the_text():
    kv, keys, values, query = stored(9, 30)
    for row, length in enumerate((9, 30)):
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    attend = Flash(reference_kernel)
    assert attend(query, keys, values, attend.prepare(kv, 48)).isfinite().all()


def test_flash_is_taken_only_where_a_trial_of_it_is_right():
    def broken(*_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    assert why_not_flash(*SIZES, reference_kernel) is None
    assert "off by" in why_not_flash(*SIZES, reads_everything)
    assert why_not_flash(*SIZES, broken) == "FlashAttention only supports Ampere GPUs or newer."
    assert why_not_flash(*SIZES, flash_kernel), "this torch has no such kernel for a CPU, and that is a reason"


def test_short_texts_are_attended_to_by_one_kernel():
    short, long = Sdpa(), Flash(reference_kernel)
    both = ByLength(short, long)
    assert [both.at(span) for span in (None, FLASH_FROM - 1, FLASH_FROM)] == [short, short, long]
    assert [both.reads_only_text(span) for span in (FLASH_FROM - 1, FLASH_FROM)] == [False, True]
    assert both.all_as_short()
    assert both.at(FLASH_FROM) is short
    assert not both.reads_only_text(FLASH_FROM)
    assert not both.all_as_short()
    both.as_chosen()
    assert both.at(FLASH_FROM) is long


def test_every_captured_step_is_long_enough_for_flash_decoding():
    assert span_for(1) >= FLASH_FROM


def test_the_trial_of_flash_decoding_does_without_cudnn():
    seen = []

    def look(*given):
        seen.append(allowed_kernels())
        return reference_kernel(*given)

    assert why_not_flash(*SIZES, look) is None
    assert [entry for entry in seen if "cuDNN" in entry] == []
    assert "cuDNN" in allowed_kernels()


@pytest.mark.parametrize(("asked", "used"), [("sdpa", "sdpa"), ("flash_attention_2", "sdpa"), ("eager", "eager")])
def test_what_was_asked_for_is_honoured(asked, used):
    assert {attention_for(asked, *SIZES).at(span).name for span in (None, 4096)} == {used}
