import itertools

import pytest
import torch
from transformers.generation import logits_process as hf

from qwenvl.request import Sampling
from qwenvl.sampling import choose, filter_logits, keep_min_p, keep_top_k, keep_top_p, penalize_repetition

NEVER = float("-inf")
FOUR = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()


def kept(logits):
    return (logits != NEVER).tolist()[0]


def test_top_k_keeps_the_k_best():
    assert kept(keep_top_k(FOUR, 2)) == [True, True, False, False]
    assert kept(keep_top_k(FOUR, 9)) == [True] * 4


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert kept(keep_top_p(FOUR, 0.6)) == [True, True, False, False]
    assert kept(keep_top_p(FOUR, 0.0)) == [True, False, False, False]


def test_min_p_keeps_what_is_likely_enough_beside_the_best():
    assert kept(keep_min_p(FOUR, 0.4)) == [True, True, False, False]


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[0, 1, 1]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    list(itertools.product((0.3, 1.0, 1.7), (0, 5), (0.4, 0.9, 1.0), (0.0, 0.2), (1.0, 1.3))),
)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p, penalty):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(3, 50, generator=generator)
    seen = torch.randint(0, 50, (3, 20), generator=generator)
    processors = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    processors += [hf.TopKLogitsWarper(top_k)] if top_k else []
    processors += [hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)]
    expected = logits.clone()
    for processor in processors:
        expected = processor(seen, expected)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    ours = filter_logits(logits, seen, sampling)
    assert torch.equal(ours == NEVER, expected == NEVER)
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=0)


def test_draws_follow_the_distribution():
    random = torch.Generator().manual_seed(0)
    rows = FOUR.expand(20000, 4)
    drawn = choose(rows, torch.zeros(20000, 1, dtype=torch.long), Sampling(temperature=1, top_p=1, top_k=3), random)
    share = torch.bincount(drawn, minlength=4) / 20000
    # Four standard deviations of a share near one half are 0.014.
    torch.testing.assert_close(share, torch.tensor([0.5556, 0.2778, 0.1667, 0.0]), atol=0.015, rtol=0)


def test_greedy_takes_the_best_and_needs_no_generator():
    assert choose(FOUR, torch.zeros(1, 1, dtype=torch.long), Sampling(do_sample=False), None).tolist() == [0]


def test_a_masked_token_is_never_drawn_even_if_the_noise_underflows(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    sampling = Sampling(temperature=1, top_k=1, top_p=1)
    assert choose(FOUR.flip(-1), torch.zeros(1, 1, dtype=torch.long), sampling, torch.Generator()).tolist() == [3]
