"""How a row of logits becomes the next token: pure functions, no state but the generator that is passed in."""

from __future__ import annotations

import torch

from .request import Sampling

MASKED = float("-inf")


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that already occurred less likely (Keskar et al., 2019).

    Args:
        logits: (B, V) float. Not changed.
        seen: (B, L) int64, ids of the prompt and of the answer so far.
        penalty: 1 changes nothing; positive logits are divided by it, negative ones multiplied.

    Returns:
        (B, V), same dtype and device.
    """
    score = logits.gather(1, seen)
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, seen, score)


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mask all but the top_k best tokens; ties with the last of them stay. (B, V) -> (B, V)."""
    last = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < last, MASKED)


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask all but the smallest set of tokens whose probability reaches top_p (Holtzman et al., 2020).

    Args:
        logits: (B, V) float. Not changed.
        top_p: share of probability to keep, in [0, 1]. 0 keeps the best token, 1 keeps all.

    Returns:
        (B, V), same dtype and device. Dropped tokens are -inf; at least one token per row stays.
    """
    ascending, order = logits.sort(dim=-1)
    tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    tail[:, -1] = False
    return logits.masked_fill(tail.scatter(1, order, tail), MASKED)


def keep_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """Mask tokens less probable than min_p times the best one (Nguyen et al., 2024). (B, V) -> (B, V)."""
    probability = logits.softmax(dim=-1)
    floor = min_p * probability.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probability < floor, MASKED)


def filter_logits(logits: torch.Tensor, seen: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Apply every filter that is switched on, in the order of transformers' generate. (B, V) -> (B, V)."""
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def choose(
    logits: torch.Tensor, seen: torch.Tensor, sampling: Sampling, random: torch.Generator | None
) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: (B, V) float32.
        seen: (B, L) int64, ids of the prompt and of the answer so far.
        random: a generator on the logits' device; None where sampling is greedy.

    Returns:
        (B,) int64.
    """
    logits = filter_logits(logits, seen, sampling)
    if sampling.greedy:
        return logits.argmax(dim=-1)
    # argmax(p / e) with e ~ Exp(1) draws from p, and unlike torch.multinomial never waits for the device.
    noise = torch.empty_like(logits).exponential_(generator=random)
    # An exact 0 would turn the 0 / 0 of a masked token into NaN, which argmax prefers to every number.
    noise.clamp_min_(torch.finfo(noise.dtype).tiny)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)
