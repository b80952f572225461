"""The last tier: transformers' generate(), with our sampling and our callback in its loop."""

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
    """Our sampling as a logits processor: it masks all but the chosen token, which generate()'s arg-max then takes.

    generate()'s own sampling draws from torch's global generator, which other nodes seed and use.
    """

    chosen: torch.Tensor

    def __init__(self, sample: Sampler) -> None:
        self._sample = sample

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.chosen = self._sample(scores)
        # NO_TOKEN becomes token 0 here: _Report passes NO_TOKEN to the rows, which raise before token 0 is used.
        return torch.full_like(scores, float("-inf")).scatter(1, self.chosen.clamp_min(0)[:, None], 0.0)


class _Report:
    """A stopping criterion, called by generate() after every token: it passes the token on and stops ended rows."""

    def __init__(self, rows: Rows, choose: _OnlyChosen, at_first: Callable[[], None]) -> None:
        self._rows = rows
        self._choose = choose
        self._at_first = at_first

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self._rows.steps:
            self._at_first()
        self._rows.push(self._choose.chosen.tolist())
        return torch.tensor(self._rows.ended, device=input_ids.device)
