import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from qwenvl.checks import InvalidSettingError, checked, shown, text_of, whole_characters

INPUTS = {
    "text": ("STRING", {}),
    "on": ("BOOLEAN", {}),
    "count": ("INT", {}),
    "share": ("FLOAT", {}),
    "choice": (["a", "b"], {}),
    "image": ("IMAGE", {}),
    "video": ("VIDEO", {}),
}


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("text", "a", "a"),
        ("on", 1, True),
        ("on", np.int64(0), False),
        ("count", np.int64(5), 5),
        ("count", 5.0, 5),
        ("count", True, 1),
        ("share", 2, 2),
        ("share", np.float32(0.5), 0.5),
        ("share", Fraction(1, 2), 0.5),
        ("choice", "c", "c"),
        ("image", None, None),
        ("video", 5, 5),
        ("unknown", 5, 5),
    ],
)
def test_what_a_link_brings_becomes_what_the_input_declares(name, given, taken):
    found = checked(INPUTS, {name: given})[name]
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("text", 5, "a text"),
        ("on", "false", "true or false"),
        ("count", 5.5, "a whole number"),
        ("count", math.nan, "a whole number"),
        ("count", math.inf, "a whole number"),
        ("count", "5", "a whole number"),
        ("share", None, "a number"),
        ("choice", ["a"], "a text"),
        ("image", "/etc/passwd", "an image"),
        ("image", [torch.zeros(1), "a.png"], "an image"),
    ],
)
def test_what_it_cannot_become_is_refused_by_the_input_s_name(name, given, wanted):
    with pytest.raises(InvalidSettingError, match=rf"^{name} must be {wanted}, got "):
        checked(INPUTS, {name: given})


def test_a_list_of_images_is_images():
    images = [torch.zeros(1), torch.zeros(2)]
    assert checked(INPUTS, {"image": images})["image"] is images


def test_half_a_character_becomes_what_stands_for_one_and_nothing_else_changes():
    assert whole_characters("a\ud800b\udc00") == "a\ufffdb\ufffd"
    assert whole_characters("\ud83d\ude00") == "\U0001f600", "two halves that belong together"
    for text in ("", "\ufeffa", "\U0001f98a\0\ufffd", "größe"):
        assert text_of("text", text) == text


@pytest.mark.parametrize("value", ["x" * 10**6, 10**5000, [[0] * 10**5]], ids=["text", "number", "list"])
def test_a_value_is_shown_in_a_line(value):
    assert len(shown(value)) < 300
