"""How a row of logits becomes the next token: the filters as pure functions, and Sampler, which holds the state.

Parameters may be numbers or 0-dimensional tensors on the logits' device: a captured step reads them from there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from ..request import Sampling
from .rows import NO_TOKEN

MASKED = float("-inf")
# Tokens beyond top_k that are kept if they tie with the last of the top_k best.
TIES = 32

Number = float | torch.Tensor


class Candidates(NamedTuple):
    """Tokens that may be chosen: their logits (B, K) and ids (B, K); ids is None if column i is token i."""

    logits: torch.Tensor
    ids: torch.Tensor | None


def penalize_repetition(logits: torch.Tensor, occurred: torch.Tensor, penalty: Number) -> torch.Tensor:
    """Make tokens that already occurred less likely (Keskar et al., 2019).

    Args:
        logits: (B, V) float. Not changed.
        occurred: (B, V) bool, tokens of the prompt and of the answer so far.
        penalty: 1 changes nothing; positive logits are divided by it, negative ones multiplied.

    Returns:
        (B, V), same dtype and device.
    """
    return torch.where(occurred, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_count(logits: torch.Tensor, counts: torch.Tensor, presence: Number, frequency: Number) -> torch.Tensor:
    """Lower the logits of tokens of the answer, as OpenAI's interface defines the two penalties.

    Args:
        logits: (B, V) float. Not changed.
        counts: (B, V) float, how often each token has occurred in the answer so far.
        presence: subtracted once from the logit of every token that has occurred.
        frequency: subtracted from a token's logit for every time that it has occurred.

    Returns:
        (B, V), same dtype and device.
    """
    return logits - frequency * counts - presence * counts.clamp(max=1)


def keep_top_k(logits: torch.Tensor, top_k: int) -> Candidates:
    """Keep the top_k best tokens and those that tie with the last of them: (B, V) -> logits and ids (B, K), best first.

    K is top_k + TIES, or V if that is less; the logits of tokens that are not kept are -inf.
    """
    values, ids = logits.topk(min(top_k + TIES, logits.shape[-1]), dim=-1)
    last = values[:, min(top_k, values.shape[-1]) - 1, None]
    return Candidates(values.masked_fill(values < last, MASKED), ids)


def keep_top_p(logits: torch.Tensor, top_p: Number) -> torch.Tensor:
    """Mask all but the smallest set of tokens whose probability reaches top_p (Holtzman et al., 2020).

    Args:
        logits: (B, V) float, best first. Not changed.
        top_p: probability to keep, in [0, 1]. 0 keeps the best token, 1 keeps all.

    Returns:
        (B, V), same dtype and device. Dropped tokens are -inf; at least one token per row stays.
    """
    # Summed from the least probable token up, as transformers does: the other direction would round differently.
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
) -> Candidates:
    """Apply temperature and every filter that is on, in the order of transformers' generate(); (B, V) logits."""
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
    return Candidates(logits, ids)


class NoRepeats:
    """The filter of no_repeat_ngram_size: masks tokens that would repeat a sequence of that length; kept on the host.

    Args:
        size: length of the sequence in tokens.
        texts: the prompt of each row, without padding.
    """

    def __init__(self, size: int, texts: list[list[int]]) -> None:
        self._size = size
        self._texts: list[list[int]] = [[] for _ in texts]
        # For each row: the tokens that have followed a sequence of size - 1 tokens.
        self._followed: list[dict[tuple[int, ...], list[int]]] = [{} for _ in texts]
        for row, text in enumerate(texts):
            for token in text:
                self._append(row, token)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a copy of the logits (B, V) with -inf at tokens that would repeat a sequence."""
        logits = logits.clone()
        for row in range(len(logits)):
            logits[row, self._followed[row].get(self._end(row), [])] = MASKED
        return logits

    def push(self, tokens: list[int]) -> None:
        """Append the next token of each row."""
        for row, token in enumerate(tokens):
            self._append(row, token)

    def _append(self, row: int, token: int) -> None:
        if len(self._texts[row]) >= self._size - 1:
            self._followed[row].setdefault(self._end(row), []).append(token)
        self._texts[row].append(token)

    def _end(self, row: int) -> tuple[int, ...]:
        text = self._texts[row]
        return tuple(text[len(text) - self._size + 1 :])


class Sampler:
    """The choice of the next token of each row; remembers which tokens have occurred if a filter needs it.

    Its state is in tensors that never move, so that a captured step goes on using them in later runs.

    Args:
        sampling: the settings. start() may change their values, but not which filters are on.
        rows: B.
        vocabulary: V.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, rows: int, vocabulary: int, device: torch.device | str) -> None:
        self._sampling = sampling
        self.random = None if sampling.greedy else torch.Generator(device)
        self._parameters = {name: torch.zeros((), device=device) for name in _PARAMETERS}
        filters = _filters(sampling)
        self.occurred = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if filters["occurred"] else None
        self.counts = torch.zeros(rows, vocabulary, device=device) if filters["counts"] else None
        # Tokens of the answer so far.
        self.length = torch.zeros((), device=device) if filters["length"] else None
        self._ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._repeats: NoRepeats | None = None

    @staticmethod
    def kind(sampling: Sampling) -> tuple[Any, ...]:
        """Return a key that is equal for samplings that can share a sampler."""
        filters = tuple(_filters(sampling).values())
        if sampling.greedy:
            return ("greedy", *filters)
        return ("drawn", sampling.top_k, sampling.top_p < 1, sampling.min_p > 0, *filters)

    @staticmethod
    def why_not_captured(sampling: Sampling) -> str | None:
        """Return the reason why a step with this sampling cannot be captured, or None."""
        return "no_repeat_ngram_size looks at every token on the host" if sampling.no_repeat_ngram_size else None

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors that a choice changes."""
        return [tensor for tensor in (self.occurred, self.counts, self.length) if tensor is not None]

    def start(
        self,
        sampling: Sampling,
        seed: int | None,
        prompt: torch.Tensor,
        mask: torch.Tensor,
        end_ids: Collection[int] = (),
    ) -> None:
        """Begin with a prompt.

        Args:
            prompt: (B, L) token ids.
            mask: (B, L), 0 where a row is padded on its left.
            end_ids: tokens that end a text.
        """
        for name, value in self._parameters.items():
            value.fill_(float(getattr(sampling, name)))
        if self.random is not None and seed is not None:
            self.random.manual_seed(seed)
        for tensor in self.state:
            tensor.zero_()
        if self.length is not None:
            self._ends.zero_()[list(end_ids)] = True
        if self.occurred is not None:
            # Padding must not count as occurred: it is replaced by the row's last token, which has occurred.
            self.occurred.scatter_(1, torch.where(mask.bool(), prompt, prompt[:, -1:]), True)
        if sampling.no_repeat_ngram_size:
            texts = [row[there].tolist() for row, there in zip(prompt, mask.bool(), strict=True)]
            self._repeats = NoRepeats(sampling.no_repeat_ngram_size, texts)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose from (B, V) logits: (B,) int64; NO_TOKEN if a row's largest logit is NaN, infinity or -infinity."""
        logits = logits.float()
        # Computed on the device and read with the token, so that the host does not wait. NaN counts as the largest.
        sound = logits.amax(dim=-1).isfinite()
        logits = self._filtered(logits)
        chosen = logits.argmax(dim=-1) if self.random is None else self._draw(logits)
        if self.occurred is not None:
            self.occurred.scatter_(1, chosen[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, chosen[:, None], torch.ones_like(self.counts[:, :1]))
        if self.length is not None:
            self.length.add_(1)
        if self._repeats is not None:
            self._repeats.push(chosen.tolist())
        return chosen.masked_fill(~sound, NO_TOKEN)

    def _filtered(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the filters that hold for greedy choices too."""
        p = self._parameters
        if self.occurred is not None:
            logits = penalize_repetition(logits, self.occurred, p["repetition_penalty"])
        if self.counts is not None:
            logits = penalize_count(logits, self.counts, p["presence_penalty"], p["frequency_penalty"])
        if self._repeats is not None:
            logits = self._repeats.mask(logits)
        if self.length is not None:
            logits = logits.masked_fill(self._ends & (self.length < p["min_new_tokens"]), MASKED)
        return logits

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw one token for each row, (B,) int64."""
        p = self._parameters
        logits, ids = candidates(logits, self._sampling, p["temperature"], p["top_p"], p["min_p"])
        # argmax(p / e) with e ~ Exp(1) draws from p, and unlike torch.multinomial never waits for the device.
        noise = torch.empty_like(logits).exponential_(generator=self.random)
        # An exact 0 would turn the 0 / 0 of a masked token into NaN, which argmax prefers to every number.
        noise.clamp_min_(torch.finfo(noise.dtype).tiny)
        drawn = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def _filters(sampling: Sampling) -> dict[str, Any]:
    """Return which of the filters that hold for greedy choices too are on."""
    return {
        "occurred": sampling.repetition_penalty != 1,
        "counts": bool(sampling.presence_penalty or sampling.frequency_penalty),
        "length": sampling.min_new_tokens > 0,
        "repeats": sampling.no_repeat_ngram_size,
    }


# Settings that a captured step reads from the device, so that it need not be captured again when they change.
_PARAMETERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_new_tokens",
)
