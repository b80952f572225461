import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from qwenvl.checks import InvalidSettingError, checked, printable, shown, text_of, whole_characters

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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ein Rotes — 红 👩\u200d🎨 e\u0301\u3000", "ein Rotes — 红 👩\u200d🎨 e\u0301\u3000"),
        ("a\n\tb", "a\n\tb"),
        ("\x1b[2J\x07\r\x00\x7f\x9b", r"\x1b[2J\x07\r\x00\x7f\x9b"),
        ("gpj.\u202egnp \u2066x\u2069 \u2028", r"gpj.\u202egnp \u2066x\u2069 \u2028"),
        ("\udce4", r"\udce4"),
    ],
)
def test_what_is_written_to_a_terminal_holds_no_orders(text, told):
    assert printable(text) == told
    told.encode()


def test_a_line_stays_one():
    assert printable("a\nb\tc", "") == r"a\nb\tc"
