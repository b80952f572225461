"""Plain versions of what GPU kernels compute."""

from __future__ import annotations

import torch


def reference_kernel(query, keys, values, rows, slots, span, used):
    """Compute in loops what flash_kernel computes, from the same arguments."""
    assert all(value.dtype == torch.int32 for value in (rows, slots, used))
    group = query.shape[1] // keys.shape[1]
    output = torch.empty_like(query)
    for row in range(len(rows) - 1):
        assert rows[row + 1] - rows[row] == 1, "one query each"
        assert used[row] <= min(span, slots[row + 1] - slots[row])
        own = slice(int(slots[row]), int(slots[row] + used[row]))
        for head in range(query.shape[1]):
            k, v = keys[own, head // group], values[own, head // group]
            weights = (k @ query[int(rows[row]), head] * query.shape[-1] ** -0.5).softmax(0)
            output[row, head] = weights @ v
    return output
