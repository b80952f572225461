"""What a generation collects where a model computes no numbers, in each tier."""

import itertools

import pytest
import tiny
import torch
from tiny import batch_of
from transformers.cache_utils import StaticLayer

from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.rows import NO_TOKEN, Rows
from qwenvl.errors import NotFiniteError, UnusableError
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.request import LoadSpec, Sampling

CPU = Machine("cpu", torch.float32, "")
GREEDY = Sampling(do_sample=False, max_new_tokens=24)
DRAWN = Sampling(temperature=1.1, top_k=30, max_new_tokens=24)
CASES = [
    *itertools.product(["qwen3", "qwen2_5_vl"], ["own step", "generic step", "generate"]),
    *itertools.product(["qwen3_moe", "qwen3_vl_moe"], ["generic step", "generate"]),
]


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def handles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    families = {family for family, _ in CASES}
    return {
        one_family: load(LoadSpec(one_family), tiny.save(one_family, folder / one_family), CPU)
        for one_family in sorted(families)
    }


@pytest.fixture(params=CASES, ids="-".join)
def case(request, handles):
    """A model, and a decoder of one tier."""
    family, tier = request.param
    if tier == "generic step" and not hasattr(StaticLayer(8), "cumulative_length"):
        pytest.skip("this transformers has no static cache that can be captured")
    return handles[family], Decoder(handles[family].model, "sdpa", tier)


class Poisoned:
    """Within the block, a row of a weight holds what is no number."""

    def __init__(self, weight, row, bad=float("nan")):
        self._weight, self._row, self._bad = weight.data, row, bad

    def __enter__(self):
        self._kept = self._weight[self._row].clone()
        self._weight[self._row] = self._bad

    def __exit__(self, *_):
        self._weight[self._row] = self._kept


def _place(rows, inputs):
    """A row, where in it there is a token that no row and no prompt has before, and the token."""
    prompt = {*inputs["input_ids"].flatten().tolist()}
    for at, row in itertools.product(range(2, 20), range(len(rows))):
        token = rows[row][at]
        before = [one_token for number, ids in enumerate(rows) for one_token in ids[: at + (number != row)]]
        if token not in {*prompt, *before}:
            return row, at, token
    raise AssertionError("this model says the same all the time")


@pytest.mark.parametrize(("sampling", "seed"), [(GREEDY, None), (DRAWN, 3)])
def test_it_is_seen_at_whatever_token_it_begins_and_names_the_row(case, sampling, seed):
    handle, decoder = case
    inputs = batch_of(handle)
    whole = decoder.generate(inputs, sampling, seed, ignore, ignore).rows
    row, at, token = _place(whole, inputs)
    told = []
    embeddings = handle.model.get_input_embeddings().weight
    with Poisoned(embeddings, token), pytest.raises(NotFiniteError) as raised:
        decoder.generate(inputs, sampling, seed, lambda new: told.append([*new]), ignore)
    assert raised.value.rows[0] == row
    assert raised.value.token == at + 1
    assert isinstance(raised.value, UnusableError)
    assert [one_token for new in told for one_token in new[row]] == list(whole[row][: at + 1]), (
        "nothing that is no answer"
    )
    assert decoder.generate(inputs, sampling, seed, ignore, ignore).rows == whole, "nothing of it is left behind"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("sampling", "seed"), [(GREEDY, None), (DRAWN, 3)])
def test_it_is_seen_in_the_prompt_s_own_logits(case, bad, sampling, seed):
    handle, decoder = case
    with Poisoned(handle.model.lm_head.weight, 5, bad), pytest.raises(NotFiniteError) as raised:
        decoder.generate(batch_of(handle), sampling, seed, pytest.fail, ignore)
    assert raised.value.token == 0
    assert raised.value.rows == [0, 1, 2] or bad == float("inf")


def test_a_row_that_has_ended_may_go_on_as_it_likes():
    rows = Rows(2, frozenset({9}), ignore)
    rows.push([9, 1])
    rows.push([NO_TOKEN, 2])
    assert rows.all_ids == [[9], [1, 2]]
    assert rows.unsound, "what it leaves in the buffers is to go"
    with pytest.raises(NotFiniteError) as raised:
        rows.push([NO_TOKEN, NO_TOKEN])
    assert raised.value.rows == [1]


def test_a_question_after_one_without_numbers_finds_nothing_of_it_in_memory(handles):
    """Own step, which keeps what the last prompt had in common with the next."""
    handle = handles["qwen3"]
    inputs = {name: entry[:1] for name, entry in batch_of(handle).items()}
    decoder = Decoder(handle.model, "sdpa", "own step")
    whole = decoder.generate(inputs, GREEDY, None, ignore, ignore).rows
    with Poisoned(handle.model.get_input_embeddings().weight, whole[0][3]), pytest.raises(NotFiniteError):
        decoder.generate(inputs, GREEDY, None, ignore, ignore)
    again = decoder.generate(inputs, GREEDY, None, ignore, ignore)
    assert (again.rows, again.reused_tokens) == (whole, 0)
