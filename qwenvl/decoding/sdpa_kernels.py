"""Which of torch's attention kernels may run while the pack computes: the prompt, the steps, and what is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
