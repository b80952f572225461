"""How the new token of each row attends to what is stored: chosen once for a model, by what its device can do; and
which of torch's kernels may run meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)

from ..log import log
from .kv_cache import KVCache

# Captured steps over fewer slots look at all of them under a mask; no span is that short. Modelled, not measured: at
# 1,024 slots flash's kernels take 13 us a layer, and the masked one, with a block for each key head, 15 to 20; besides,
# flash reads the text alone. `python -m benchmarks.decode --step-attention` forces either.
FLASH_FROM = 1024
# What the trial runs on: rows of so many tokens in a buffer of so many slots.
_TRIAL_LENGTHS, _TRIAL_CAPACITY = (5, 1500), 2048
# Outputs of the trial are of the order of 1, and half precision has 8 bits or more.
_TRIAL_TOLERANCE = 0.03

# query (B, heads, dim), keys and values (B * capacity, kv heads, dim), first query and first slot of each row and
# their ends (B + 1,) int32, most slots of a row, slots in use of each row (B,) int32 -> (B, heads, dim)
Kernel = Callable[..., torch.Tensor]


def allowed_kernels() -> list[str]:
    """The kernels that scaled_dot_product_attention may choose from on a GPU now."""
    asked = torch.backends.cuda
    each = {
        "flash": asked.flash_sdp_enabled,
        "memory-efficient": asked.mem_efficient_sdp_enabled,
        "cuDNN": getattr(asked, "cudnn_sdp_enabled", bool),
        "math": asked.math_sdp_enabled,
    }
    return [name for name, enabled in each.items() if enabled()]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """A block in which cuDNN's kernel is not chosen; where it is the only one that is allowed, it stays.

    torch prefers it on H100, H200 and B200 from 2.11 on. It makes a plan for every shape, the number of keys among its
    sizes: tens of milliseconds for each token of a loop, and plans that are kept without bound.
    """
    kernels = allowed_kernels()
    if "cuDNN" not in kernels or len(kernels) == 1:
        yield
        return
    # Not torch's sdpa_kernel(): it sets the flags of all kernels, and switches off those that it is not told of.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class Sdpa:
    """torch's own attention over a number of slots that the host knows, under a mask where the rows' lengths differ."""

    name = "sdpa"

    def prepare(self, kv: KVCache, span: int | None) -> Any:
        """Once a step: what all layers look at. span None is the exact length, known to the host."""
        if span is None:
            return kv.filled + 1, None if kv.even else kv.bias[..., : kv.filled + 1]
        return span, kv.bias[..., :span]

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots_used: Any) -> torch.Tensor:
        """(B, heads, dim) queries over (B, kv heads, capacity, dim) -> (B, heads * dim)."""
        span, bias = slots_used
        batch, _, dim = query.shape
        # Query heads that share a key head stand in for query positions: no copy of the keys is made.
        grouped = query.reshape(batch, keys.shape[1], -1, dim)
        return self._attend(grouped, keys[:, :, :span], values[:, :, :span], bias).reshape(batch, -1)

    def _attend(self, query, keys, values, bias) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)


class Eager(Sdpa):
    """The same in plain matrix products."""

    name = "eager"

    def _attend(self, query, keys, values, bias) -> torch.Tensor:
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


def flash_kernel(query, keys, values, rows, slots, span, used) -> torch.Tensor:
    """torch's flash attention with the lengths on the device; newer versions offer it as torch.nn.attention.varlen."""
    flash = torch.ops.aten._flash_attention_forward
    return flash(query, keys, values, rows, slots, 1, span, 0.0, False, False, seqused_k=used)[0]


class Flash:
    """Flash decoding: it reads each row's length on the device, and no slot beyond it.

    Args:
        kernel: the attention itself.
    """

    name = "flash"

    def __init__(self, kernel: Kernel = flash_kernel) -> None:
        self._kernel = kernel

    def prepare(self, kv: KVCache, span: int | None) -> Any:
        """As Sdpa.prepare; span only tells how finely the slots are shared out over the GPU."""
        return kv.starts, kv.starts * kv.capacity, span or kv.filled + 1, (kv.lens + 1).int()

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots_used: Any) -> torch.Tensor:
        """As Sdpa."""
        # The rows one after the other, which is how they lie in memory.
        flat = (each.transpose(1, 2).flatten(0, 1) for each in (keys, values))
        return self._kernel(query, *flat, *slots_used).flatten(1)


Attention = Sdpa | Flash


def why_not_flash(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, kernel: Kernel = flash_kernel
) -> str | None:
    """The reason why flash decoding cannot be had here, or None. Runs it once, beside attention of the exact length."""
    random = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.float32).to(dtype)

    kv = KVCache(len(_TRIAL_LENGTHS), kv_heads, dim, _TRIAL_CAPACITY, dtype, device)
    kv.lens.copy_(torch.tensor(_TRIAL_LENGTHS) - 1)
    query, keys, values = drawn(kv.batch, heads, dim), kv.allocate(), kv.allocate()
    keys.copy_(drawn(*keys.shape))
    values.copy_(drawn(*values.shape))
    try:
        return _why_wrong(Flash(kernel), kv, query, keys, values)
    except (RuntimeError, AttributeError) as error:  # not in this build, or called otherwise in this version
        return str(error).splitlines()[0][:200]


@without_cudnn()
def _why_wrong(flash: Flash, kv: KVCache, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """By how much it differs from attention of the exact length, or None where that is rounding."""
    plain = Sdpa()
    found = flash(query, keys, values, flash.prepare(kv, _TRIAL_CAPACITY)).float()
    for row, length in enumerate(_TRIAL_LENGTHS):
        own = slice(row, row + 1)
        expected = plain(query[own], keys[own], values[own], (length, None)).float()
        error = (found[own] - expected).abs().max()
        if not error <= _TRIAL_TOLERANCE:
            return f"its result is off by {error:.2g}"
    return None


class ByLength:
    """Short spans are attended to one way, and long ones another."""

    def __init__(self, short: Attention, long: Attention) -> None:
        self._short, self._long = short, long
        self._simple = False

    def at(self, span: int | None) -> Attention:
        """What a step over so many slots uses; None is the exact length."""
        return self._short if self._simple or span is None or span < FLASH_FROM else self._long

    def reads_only_text(self, span: int) -> bool:
        """Whether slots without a token cost nothing in a span of that length."""
        return isinstance(self.at(span), Flash)

    def all_as_short(self) -> bool:
        """Until as_chosen() one way for both; whether that is a change."""
        changed = not self._simple and self._long is not self._short
        self._simple = True
        return changed

    def as_chosen(self) -> None:
        """Each its own way again."""
        self._simple = False


def attention_for(
    asked: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> ByLength:
    """For a model that was loaded with the attention that was asked for."""
    short = Eager() if asked == "eager" else Sdpa()
    if asked == "eager" or device.type != "cuda" or dtype == torch.float32:
        return ByLength(short, short)
    if reason := why_not_flash(heads, kv_heads, dim, dtype, device):
        log.debug("no flash decoding: %s", reason)
        return ByLength(short, short)
    return ByLength(short, Flash())
