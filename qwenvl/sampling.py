"""How a row of logits becomes the next token: pure functions, no state but the generator that is passed in.

Parameters may be numbers or 0-dimensional tensors on the logits' device: a captured step reads them from there.
"""

from __future__ import annotations

from typing import Any

import torch

from .request import Sampling

MASKED = float("-inf")
# More tokens than this that tie with the last of the top_k best are dropped.
TIES = 32

Number = float | torch.Tensor


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: Number) -> torch.Tensor:
    """Make tokens that already occurred less likely (Keskar et al., 2019).

    Args:
        logits: (B, V) float. Not changed.
        seen: (B, V) bool, tokens of the prompt and of the answer so far.
        penalty: 1 changes nothing; positive logits are divided by it, negative ones multiplied.

    Returns:
        (B, V), same dtype and device.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k best tokens and those that tie with the last of them: (B, V) -> values and ids, (B, K), best first.

    K is a little more than top_k; what is not kept is -inf.
    """
    values, ids = logits.topk(min(top_k + TIES, logits.shape[-1]), dim=-1)
    last = values[:, min(top_k, values.shape[-1]) - 1, None]
    return values.masked_fill(values < last, MASKED), ids


def keep_top_p(logits: torch.Tensor, top_p: Number) -> torch.Tensor:
    """Mask all but the smallest set of tokens whose probability reaches top_p (Holtzman et al., 2020).

    Args:
        logits: (B, V) float, best first. Not changed.
        top_p: share of probability to keep, in [0, 1]. 0 keeps the best token, 1 keeps all.

    Returns:
        (B, V), same dtype and device. Dropped tokens are -inf; at least one token per row stays.
    """
    # The tail is summed from its small end, as transformers does: from the large end it would round differently.
    rest = logits.softmax(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
    dropped = rest <= 1 - top_p
    dropped[:, 0] = False
    return logits.masked_fill(dropped, MASKED)


def keep_min_p(logits: torch.Tensor, min_p: Number) -> torch.Tensor:
    """Mask tokens less probable than min_p times the best one (Nguyen et al., 2024). (B, V) -> (B, V)."""
    probability = logits.softmax(dim=-1)
    floor = min_p * probability.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probability < floor, MASKED)


def candidates(
    logits: torch.Tensor, sampling: Sampling, temperature: Number, top_p: Number, min_p: Number
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What may be drawn, after every filter that is on, in the order of transformers' generate.

    Returns:
        Logits (B, K), and the token of each (B, K), or None where column i is token i.
    """
    ids = None
    logits = logits / temperature
    if sampling.top_k:
        logits, ids = keep_top_k(logits, sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, min_p)
    return logits, ids


class Chooser:
    """Chooses the next token of each row, and remembers which have occurred where that matters.

    Its state lies in tensors that stay where they are, so that a captured step goes on using them in later runs.

    Args:
        sampling: what to do. start() may change the values, not which filters are on.
        rows: B.
        vocabulary: V.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, rows: int, vocabulary: int, device: torch.device | str) -> None:
        self._sampling = sampling
        self.random = None if sampling.greedy else torch.Generator(device)
        self._parameters = {name: torch.zeros((), device=device) for name in _PARAMETERS}
        penalized = sampling.repetition_penalty != 1
        self.seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if penalized else None

    @staticmethod
    def kind(sampling: Sampling) -> tuple[Any, ...]:
        """Equal for samplings that can share a chooser."""
        if sampling.greedy:
            return ("greedy", sampling.repetition_penalty != 1)
        filters = (sampling.top_k, sampling.top_p < 1, sampling.min_p > 0, sampling.repetition_penalty != 1)
        return ("drawn", *filters)

    def start(self, sampling: Sampling, seed: int | None, prompt: torch.Tensor, mask: torch.Tensor) -> None:
        """Begin with a prompt: (B, L) ids and (B, L) mask, 0 where a row is padded on its left."""
        for name, value in self._parameters.items():
            value.fill_(float(getattr(sampling, name)))
        if self.random is not None and seed is not None:
            self.random.manual_seed(seed)
        if self.seen is not None:
            # Padding must not count as seen: the row's last token, which has been, stands in for it.
            self.seen.zero_().scatter_(1, torch.where(mask.bool(), prompt, prompt[:, -1:]), True)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) logits -> (B,) int64."""
        logits = logits.float()
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, self._parameters["repetition_penalty"])
        chosen = logits.argmax(dim=-1) if self.random is None else self._draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        p = self._parameters
        logits, ids = candidates(logits, self._sampling, p["temperature"], p["top_p"], p["min_p"])
        # argmax(p / e) with e ~ Exp(1) draws from p, and unlike torch.multinomial never waits for the device.
        noise = torch.empty_like(logits).exponential_(generator=self.random)
        # An exact 0 would turn the 0 / 0 of a masked token into NaN, which argmax prefers to every number.
        noise.clamp_min_(torch.finfo(noise.dtype).tiny)
        drawn = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


# What a captured step reads from the device, so that it follows when they change.
_PARAMETERS = ("temperature", "top_p", "min_p", "repetition_penalty")
