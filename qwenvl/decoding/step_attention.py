"""The attention of the decode step: chosen once for a model by what its device can do; and which of torch's kernels
may run during an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)

from ..log import log
from .kv_cache import KVCache

# Captured steps over fewer slots would read all of them under a mask; no span is that short. Modelled, not measured: at
# 1,024 slots flash's kernels take 13 us a layer, and the masked one, with a block for each key head, 15 to 20; besides,
# flash reads the text alone. `python -m benchmarks.decode --step-attention` forces either.
FLASH_FROM = 1024
# The trial's rows, in tokens, and the capacity of its buffer, in slots.
_TRIAL_LENGTHS, _TRIAL_CAPACITY = (5, 1500), 2048
# Largest difference allowed in the trial: its outputs are about 1, and half precision has at least 8 bits.
_TRIAL_TOLERANCE = 0.03

# query (B, heads, dim), keys and values (B * capacity, kv heads, dim), first query of each row and first slot of each
# row, with the end as last entry, (B + 1,) int32, most slots of a row, slots in use of each row (B,) int32
# -> (B, heads, dim)
Kernel = Callable[..., torch.Tensor]


def allowed_kernels() -> list[str]:
    """Return the kernels that scaled_dot_product_attention may choose from on a GPU now."""
    flags = torch.backends.cuda
    kernels = {
        "flash": flags.flash_sdp_enabled,
        "memory-efficient": flags.mem_efficient_sdp_enabled,
        "cuDNN": getattr(flags, "cudnn_sdp_enabled", bool),
        "math": flags.math_sdp_enabled,
    }
    return [name for name, enabled in kernels.items() if enabled()]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Switch off cuDNN's attention kernel within the block, unless it is the only one that is allowed.

    From 2.11 on torch prefers it on H100, H200 and B200. It plans anew for every shape, and each token adds a key: tens
    of milliseconds for each token of a loop, and plans that are kept without bound.
    """
    kernels = allowed_kernels()
    if "cuDNN" not in kernels or len(kernels) == 1:
        yield
        return
    # torch's sdpa_kernel() would set the flags of all kernels, and switch off any kernel that is not passed to it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class Sdpa:
    """torch's own attention over a number of slots that the host knows, with a mask if the rows' lengths differ."""

    name = "sdpa"

    def prepare(self, kv: KVCache, span: int | None) -> Any:
        """Return what all layers of one step attend to: slots and mask. span None is the exact length."""
        if span is None:
            return kv.filled + 1, None if kv.even else kv.bias[..., : kv.filled + 1]
        return span, kv.bias[..., :span]

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots_used: Any) -> torch.Tensor:
        """Attend with queries (B, heads, dim) to keys and values (B, kv heads, capacity, dim): (B, heads * dim)."""
        span, bias = slots_used
        batch, _, dim = query.shape
        # Query heads that share a key head become query positions, so that the keys need not be copied for each.
        grouped = query.reshape(batch, keys.shape[1], -1, dim)
        return self._attend(grouped, keys[:, :, :span], values[:, :, :span], bias).reshape(batch, -1)

    def _attend(self, query, keys, values, bias) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)


class Eager(Sdpa):
    """Attention as in Sdpa, but in plain matrix products."""

    name = "eager"

    def _attend(self, query, keys, values, bias) -> torch.Tensor:
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


def flash_kernel(query, keys, values, rows, slots, span, used) -> torch.Tensor:
    """Call torch's flash attention with the lengths on the device; in newer versions also torch.nn.attention.varlen."""
    flash = torch.ops.aten._flash_attention_forward
    return flash(query, keys, values, rows, slots, 1, span, 0.0, False, False, seqused_k=used)[0]


class Flash:
    """Flash decoding: it reads each row's length on the device, and no slot beyond that length.

    Args:
        kernel: the function that computes the attention.
    """

    name = "flash"

    def __init__(self, kernel: Kernel = flash_kernel) -> None:
        self._kernel = kernel

    def prepare(self, kv: KVCache, span: int | None) -> Any:
        """Return the kernel's last four arguments; span only sets how finely the work is split over the GPU."""
        return kv.starts, kv.starts * kv.capacity, span or kv.filled + 1, (kv.lens + 1).int()

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots_used: Any) -> torch.Tensor:
        """Attend as Sdpa does, with the same shapes."""
        # (B * capacity, kv heads, dim), which is how the tensors lie in memory: nothing is copied.
        flat = (stored.transpose(1, 2).flatten(0, 1) for stored in (keys, values))
        return self._kernel(query, *flat, *slots_used).flatten(1)


Attention = Sdpa | Flash


def why_not_flash(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, kernel: Kernel = flash_kernel
) -> str | None:
    """Return the reason why flash decoding cannot be used here, or None. Runs it once and compares it with Sdpa."""
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
    except (RuntimeError, AttributeError) as error:  # missing in this build, or with other arguments in this version
        return str(error).splitlines()[0][:200]


@without_cudnn()
def _why_wrong(flash: Flash, kv: KVCache, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """Return by how much flash differs from Sdpa over the exact length, as text; None if by rounding only."""
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
    """One attention for spans below FLASH_FROM slots, and another for longer ones."""

    def __init__(self, short: Attention, long: Attention) -> None:
        self._short, self._long = short, long
        self._simple = False

    def at(self, span: int | None) -> Attention:
        """Return the attention of a step over `span` slots; None is the exact length."""
        return self._short if self._simple or span is None or span < FLASH_FROM else self._long

    def reads_only_text(self, span: int) -> bool:
        """Return True if slots without a token cost nothing in a span of that length."""
        return isinstance(self.at(span), Flash)

    def all_as_short(self) -> bool:
        """Use the attention for short spans for all, until as_chosen(); True if that changes anything."""
        changed = not self._simple and self._long is not self._short
        self._simple = True
        return changed

    def as_chosen(self) -> None:
        """Undo all_as_short()."""
        self._simple = False


def attention_for(
    asked: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> ByLength:
    """Return the step's attention for a model that was loaded with the attention `asked`."""
    short = Eager() if asked == "eager" else Sdpa()
    if asked == "eager" or device.type != "cuda" or dtype == torch.float32:
        return ByLength(short, short)
    if reason := why_not_flash(heads, kv_heads, dim, dtype, device):
        log.debug("no flash decoding: %s", reason)
        return ByLength(short, short)
    return ByLength(short, Flash())
