import math

import pytest

from qwenvl.checks import InvalidSettingError
from qwenvl.request import Frames, LoadSpec, Request, Sampling
from qwenvl.settings import settings_of

NUMBERS = [(kind, entry) for kind in (Sampling, Frames) for entry in settings_of(kind) if entry.span]


@pytest.mark.parametrize(("kind", "setting"), NUMBERS, ids=[entry.name for _, entry in NUMBERS])
def test_both_ends_of_every_range_are_allowed_and_nothing_beyond(kind, setting):
    low, high = setting.span
    kind(**{setting.name: low})
    kind(**{setting.name: high})
    for beyond in (low - 1, high + 1, math.nan, "1"):
        with pytest.raises(InvalidSettingError, match=setting.name):
            kind(**{setting.name: beyond})


@pytest.mark.parametrize(
    ("name", "value"), [("image_mode", "each"), ("image_resolution", "huge"), ("thinking", True), ("release", "never")]
)
def test_choices_of_a_request_are_checked(name, value):
    with pytest.raises(InvalidSettingError, match=f"{name} {value!r} does not exist"):
        Request(LoadSpec("any"), "?", **{name: value})


@pytest.mark.parametrize("stop", ["END", ("END", "")])
def test_stops_are_texts_that_are_not_empty(stop):
    with pytest.raises(InvalidSettingError, match="stop must be a list"):
        Sampling(stop=stop)


def test_an_unknown_choice_is_named_with_those_that_exist():
    with pytest.raises(InvalidSettingError, match=r"quantization '3bit'.*none, 4bit, 8bit"):
        LoadSpec("any", quantization="3bit")
    with pytest.raises(InvalidSettingError, match=r"attention_mode 'sage'.*sdpa"):
        LoadSpec("any", attention="sage")


def test_an_unknown_amount_of_diagnostics_is_named_with_those_that_exist():
    with pytest.raises(InvalidSettingError, match=r"diagnostics 'verbose'.*summary, full, off"):
        Request(LoadSpec("any"), "text", diagnostics="verbose")


def test_temperature_zero_is_greedy_even_when_sampling():
    assert Sampling(do_sample=True, temperature=0).greedy
    assert Sampling(do_sample=False, temperature=1).greedy
    assert not Sampling(do_sample=True, temperature=0.1).greedy


def test_what_a_model_s_makers_recommend_replaces_what_is_set_and_nothing_else():
    as_set = Sampling(temperature=1.2, top_p=0.5, top_k=7, min_p=0.1, max_new_tokens=99, seed=5)
    own = as_set.with_own({"do_sample": True, "temperature": 0.6, "top_k": 20})
    assert own == Sampling(temperature=0.6, top_p=0.5, top_k=20, min_p=0.1, max_new_tokens=99, seed=5)
    assert as_set.with_own({"do_sample": False, "temperature": 0.6}).greedy
    assert not as_set.with_own({"temperature": 0.6}).greedy


@pytest.mark.parametrize(
    ("given", "taken"), [({"top_k": -1}, 0), ({"top_k": 1000}, 200), ({"temperature": 1e-6}, 1e-6)]
)
def test_a_recommendation_outside_of_our_ranges_becomes_the_nearest_inside(given, taken):
    name = next(iter(given))
    assert getattr(Sampling().with_own(given), name) == taken


def test_sampling_says_what_it_is():
    assert str(Sampling(do_sample=False)) == "greedy"
    assert str(Sampling(top_k=20)) == "temperature 0.7, top_p 0.9, top_k 20, min_p 0, repetition_penalty 1"


@pytest.mark.parametrize("value", [None, True, [1], "1", 1.5, pytest.param(10**5000, id="thousands of digits")])
def test_a_whole_number_is_nothing_else(value):
    with pytest.raises(InvalidSettingError, match="top_k must be a whole number between 0 and 200"):
        Sampling(top_k=value)


@pytest.mark.parametrize("own", [{"temperature": math.nan}, {"top_k": "20"}, {"top_p": None}])
def test_a_recommendation_that_is_no_number_is_none(own):
    assert Sampling().with_own(own) == Sampling()


def test_a_whole_number_stays_one_where_makers_wrote_a_fraction():
    assert Sampling().with_own({"top_k": 20.0, "temperature": 1}).top_k == 20


@pytest.mark.parametrize("given", [{"text": 5}, {"system": None}])
def test_a_question_is_text(given):
    with pytest.raises(InvalidSettingError, match="must be a text"):
        Request(LoadSpec("any"), **{"text": "?", **given})


def test_half_a_character_in_a_question_becomes_what_stands_for_one():
    """Nothing could encode it: not the tokenizer, not the page, not an engine's JSON."""
    assert Request(LoadSpec("any"), "a\ud800").text == "a\ufffd"


@pytest.mark.parametrize("given", [{"model": []}, {"model": "m", "device": 5}, {"model": "m", "quantization": []}])
def test_a_load_is_asked_for_in_texts(given):
    with pytest.raises(InvalidSettingError):
        LoadSpec(**given)
