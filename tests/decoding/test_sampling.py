import itertools
from dataclasses import replace

import pytest
import torch
from transformers.generation import logits_process as hf

from qwenvl.decoding.rows import NO_TOKEN
from qwenvl.decoding.sampling import (
    TIES,
    Sampler,
    candidates,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_count,
    penalize_repetition,
)
from qwenvl.request import Sampling

NEVER = float("-inf")
FOUR = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
ALL = list(itertools.product((0.3, 1.0, 1.7), (0, 5), (0.0, 0.4, 0.9, 1.0), (0.0, 0.2), (1.0, 1.3)))


def kept(logits):
    return (logits != NEVER).tolist()[0]


def test_top_k_keeps_the_k_best():
    values, ids = keep_top_k(FOUR.flip(-1), 2)
    assert ids.tolist() == [[3, 2, 1, 0]]
    assert kept(values) == [True, True, False, False]
    assert kept(keep_top_k(FOUR, 9)[0]) == [True] * 4


def test_top_k_keeps_what_ties_with_the_last():
    values, ids = keep_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]]), 2)
    assert sorted(ids[values != NEVER].tolist()) == [0, 1, 2, 4]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    assert kept(keep_top_p(FOUR, 0.6)) == [True, True, False, False]
    assert kept(keep_top_p(FOUR, 0.0)) == [True, False, False, False]


def test_min_p_keeps_what_is_likely_enough_beside_the_best():
    assert kept(keep_min_p(FOUR, 0.4)) == [True, True, False, False]


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def ours(logits, ids, sampling):
    """The probabilities from which the sampler draws, in the order of the vocabulary."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    found, columns = candidates(logits, sampling, sampling.temperature, sampling.top_p, sampling.min_p)
    if columns is None:
        return found
    return torch.full_like(logits, NEVER).scatter_(1, columns, found)


def theirs(logits, ids, sampling):
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        hf.TemperatureLogitsWarper(sampling.temperature),
        *([hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        hf.TopPLogitsWarper(sampling.top_p),
        hf.MinPLogitsWarper(sampling.min_p),
    ]
    logits = logits.clone()
    for processor in processors:
        logits = processor(ids, logits)
    return logits


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16 with ties"])
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p", "penalty"), ALL)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p, penalty, rounded):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(3, 500, generator=generator)
    logits = logits.bfloat16().float() if rounded else logits
    ids = torch.randint(0, 500, (3, 20), generator=generator)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    result, expected = ours(logits, ids, sampling), theirs(logits, ids, sampling)
    # Which of several equal logits the cut of top_p falls on is a matter of how they were sorted.
    if not rounded or top_p == 1:
        assert torch.equal(result == NEVER, expected == NEVER)
    by_size = (value.softmax(-1).sort(-1).values for value in (result, expected))
    torch.testing.assert_close(*by_size, atol=1e-6, rtol=0)


def test_more_ties_than_there_is_room_for_cost_only_ties():
    values, ids = keep_top_k(torch.zeros(1, 500), 5)
    assert values.shape[-1] == 5 + TIES
    assert kept(values) == [True] * (5 + TIES)
    assert len(set(ids[0].tolist())) == 5 + TIES


def sampler(sampling, seed=None, prompt=((0,),), mask=((1,),), vocabulary=4, ends=()):
    prompt, mask = torch.tensor(prompt), torch.tensor(mask)
    result = Sampler(sampling, len(prompt), vocabulary, "cpu")
    result.start(sampling, seed, prompt, mask, ends)
    return result


def test_draws_follow_the_distribution():
    sample = sampler(Sampling(temperature=1, top_p=1, top_k=3), 0)
    share = torch.bincount(sample(FOUR.expand(20000, 4)), minlength=4) / 20000
    # Four standard deviations of a share near one half are 0.014.
    torch.testing.assert_close(share, torch.tensor([0.5556, 0.2778, 0.1667, 0.0]), atol=0.015, rtol=0)


def test_greedy_takes_the_best_and_needs_no_seed():
    assert sampler(Sampling(do_sample=False))(FOUR).tolist() == [0]


BAD = float("nan"), float("inf")
EVERY_FILTER = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "min_new_tokens": 2,
    "no_repeat_ngram_size": 2,
}


@pytest.mark.parametrize("filters", [{}, EVERY_FILTER])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"top_k": 2, "min_p": 0.1}, {"top_k": 0, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", BAD)
def test_a_row_without_numbers_gives_no_token_and_leaves_the_others(filters, how, dtype, place, bad):
    rows = FOUR.repeat(3, 1).to(dtype)
    sound = sampler(Sampling(**how, **filters), 5, [[1]] * 3, [[1]] * 3, ends=[place])(rows).tolist()
    rows[1, place] = bad
    result = sampler(Sampling(**how, **filters), 5, [[1]] * 3, [[1]] * 3, ends=[place])(rows).tolist()
    assert result == [sound[0], NO_TOKEN, sound[2]]


@pytest.mark.parametrize("how", [{"do_sample": False}, {"top_k": 2}])
def test_masked_tokens_are_numbers_enough_but_not_all_of_them(how):
    rows = torch.tensor([[NEVER, NEVER, 1.0, NEVER], [NEVER] * 4])
    assert sampler(Sampling(**how), 5, [[1]] * 2, [[1]] * 2)(rows).tolist() == [2, NO_TOKEN]


def test_the_largest_float16_is_a_number():
    rows = torch.full((1, 4), 65504.0, dtype=torch.float16)
    assert sampler(Sampling(do_sample=False))(rows).tolist() == [0]
    assert sampler(Sampling(do_sample=False))(rows * 2).tolist() == [NO_TOKEN]


def test_what_was_chosen_counts_as_seen_and_padding_does_not():
    sample = sampler(Sampling(do_sample=False, repetition_penalty=2.0), None, [[0, 3], [1, 3]], [[0, 1], [1, 1]])
    logits = torch.tensor([[4.0, 3.0, 1.0, 7.0]] * 2)
    # Row 0: token 3 is seen, token 0 is padding. Row 1: tokens 1 and 3 are.
    assert [sample(logits).tolist() for _ in range(2)] == [[0, 0], [3, 3]]


def test_a_seed_repeats_its_draws():
    rows = torch.zeros(64, 100)
    draws = [sampler(Sampling(temperature=1, top_k=0, top_p=1), seed)(rows).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_chooser_that_starts_again_is_as_good_as_new():
    first = Sampling(temperature=1.9, top_p=0.9, top_k=4, repetition_penalty=1.9)
    second = Sampling(temperature=0.5, top_p=0.8, top_k=4, repetition_penalty=1.1)
    assert Sampler.kind(first) == Sampler.kind(second) != Sampler.kind(Sampling(top_k=5))
    used = sampler(first, 1, [[2]])
    used(FOUR)
    used.start(second, 3, torch.tensor([[1]]), torch.tensor([[1]]))
    fresh = sampler(second, 3, [[1]])
    assert [used(FOUR).tolist() for _ in range(20)] == [fresh(FOUR).tolist() for _ in range(20)]


def test_a_masked_token_is_never_drawn_even_if_the_noise_underflows(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert sampler(Sampling(temperature=1, top_k=1, top_p=1), 0)(FOUR.flip(-1)).tolist() == [3]


def test_presence_and_frequency_lower_what_is_in_the_answer():
    logits, counts = torch.tensor([[3.0, 3.0, 3.0, 3.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert penalize_count(logits, counts, 0.5, 0.0).tolist() == [[3.0, 2.5, 2.5, 2.5]]
    assert penalize_count(logits, counts, 0.0, 0.5).tolist() == [[3.0, 2.5, 2.0, 1.5]]
    assert penalize_count(logits, counts, -0.5, -0.5).tolist() == [[3.0, 4.0, 4.5, 5.0]]


GREEDY = Sampling(do_sample=False)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        # The prompt holds token 0; it counts for the repetition penalty only.
        ({}, [0, 0, 0, 0]),
        ({"presence_penalty": 0.75}, [0, 1, 0, 0]),
        ({"frequency_penalty": 0.75}, [0, 1, 0, 2]),
        ({"repetition_penalty": 2.0}, [1, 2, 0, 0]),
    ],
)
def test_penalties_count_the_answer_and_start_anew(settings, chosen):
    logits = torch.tensor([[3.0, 2.5, 1.8, 0.0]])
    sample = sampler(replace(GREEDY, **settings), None, [[0]])
    for _ in "ab":
        assert [sample(logits).tolist()[0] for _ in chosen] == chosen
        sample.start(replace(GREEDY, **settings), None, torch.tensor([[0]]), torch.tensor([[1]]))


def test_penalties_are_those_of_each_row():
    sample = sampler(replace(GREEDY, presence_penalty=2.0), None, [[0], [0]], [[1], [1]])
    first = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 3.0]])
    same = torch.tensor([[3.0, 2.0, 1.9, 2.5]] * 2)
    assert sample(first).tolist() == [0, 3]
    assert sample(same).tolist() == [3, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_would_repeat_is_what_transformers_forbids(size):
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, 4, (3, 30), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :29] = 0
    sample = sampler(replace(GREEDY, no_repeat_ngram_size=size), None, ids.tolist(), mask.tolist())
    rows = [row[there.bool()].tolist() for row, there in zip(ids, mask, strict=True)]
    for _ in range(12):
        logits = torch.randn(3, 6, generator=generator)
        alone = [hf.NoRepeatNGramLogitsProcessor(size)(torch.tensor([row]), logits[[i]]) for i, row in enumerate(rows)]
        expected = torch.cat(alone)
        assert torch.equal(sample._filtered(logits), expected)
        assert sample(logits).tolist() == expected.argmax(-1).tolist()
        for row, token in zip(rows, expected.argmax(-1).tolist(), strict=True):
            row.append(token)


def test_a_text_does_not_end_too_early():
    ends = [2, 3]
    sampling = replace(GREEDY, min_new_tokens=3)
    theirs = hf.MinNewTokensLengthLogitsProcessor(1, 3, ends, device="cpu")
    sample = sampler(sampling, ends=ends)
    logits, row = torch.tensor([[1.0, 2.0, 9.0, 8.0]]), [0]
    for _ in range(5):
        expected = theirs(torch.tensor([row]), logits).argmax(-1).tolist()
        assert sample(logits).tolist() == expected
        row += expected
    assert row == [0, 1, 1, 1, 2, 2]


def test_what_a_captured_step_changes_is_all_in_its_state():
    """A warm-up is undone by giving these back."""
    every = replace(GREEDY, repetition_penalty=1.5, presence_penalty=1.0, min_new_tokens=9)
    sample = sampler(every, ends=[3])
    before = [tensor.clone() for tensor in sample.state]
    logits = torch.tensor([[3.0, 2.9, 2.8, 9.0]])
    first = [sample(logits).tolist() for _ in range(3)]
    assert len(before) == 3
    for tensor, value in zip(sample.state, before, strict=True):
        assert not torch.equal(tensor, value)
        tensor.copy_(value)
    assert [sample(logits).tolist() for _ in range(3)] == first


def test_only_what_looks_at_the_host_prevents_a_capture():
    free = {
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "min_new_tokens": 4,
        "stop": ("x",),
        "thinking_budget": 3,
    }
    assert Sampler.why_not_captured(Sampling(**free)) is None
    assert "no_repeat_ngram_size" in Sampler.why_not_captured(Sampling(no_repeat_ngram_size=2))


@pytest.mark.parametrize("changes", [{"presence_penalty": 1.0}, {"min_new_tokens": 2}, {"no_repeat_ngram_size": 3}])
def test_samplings_with_other_filters_do_not_share_a_chooser(changes):
    for plain in (GREEDY, Sampling()):
        assert Sampler.kind(plain) != Sampler.kind(replace(plain, **changes))
    more = {name: value + 1 for name, value in changes.items()}
    same = Sampler.kind(replace(GREEDY, **changes)) == Sampler.kind(replace(GREEDY, **more))
    assert same == ("no_repeat_ngram_size" not in changes)
