"""The last tier: transformers' generate(), with our sampling and our watcher in its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .prefill import Check, Inputs, checked
from .rows import Rows
from .sampling import Sampler


def generate(model: Any, inputs: Inputs, max_new_tokens: int, sample: Sampler, rows: Rows, check: Check) -> None:
    """Fill the rows until all have ended or max_new_tokens is reached."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    choose = _OnlyChosen(sample)
    with checked(model, check) as unhook:
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([_Report(rows, choose, unhook)]),
        )


class _OnlyChosen:
    """Our sampling as a logits processor: everything but the chosen token is masked, and arg-max takes what is left.

    generate()'s own sampling draws from torch's global generator, which other nodes seed and use.
    """

    chosen: torch.Tensor

    def __init__(self, sample: Sampler) -> None:
        self._sample = sample

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.chosen = self._sample(scores)
        # Where there is none, any: the rows are told so before it is used.
        return torch.full_like(scores, float("-inf")).scatter(1, self.chosen.clamp_min(0)[:, None], 0.0)


class _Report:
    """A stopping criterion, which generate() calls once a token: it ends the rows that somebody else ended."""

    def __init__(self, rows: Rows, choose: _OnlyChosen, at_first: Callable[[], None]) -> None:
        self._rows = rows
        self._choose = choose
        self._at_first = at_first

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self._rows.steps:
            self._at_first()
        self._rows.push(self._choose.chosen.tolist())
        return torch.tensor(self._rows.ended, device=input_ids.device)
