import math

import pytest

from qwenvl.request import RANGES, InvalidSettingError, LoadSpec, Request, Sampling


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range_are_allowed_and_nothing_beyond(name):
    low, high = RANGES[name]
    Sampling(**{name: low})
    Sampling(**{name: high})
    for beyond in (low - 1, high + 1, math.nan, "1"):
        with pytest.raises(InvalidSettingError, match=name):
            Sampling(**{name: beyond})


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
