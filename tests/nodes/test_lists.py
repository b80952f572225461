import pytest

from qwenvl.nodes.lists import first, named, runs

PICTURES = ("image1", "image2")


@pytest.mark.parametrize("together", [True, False])
def test_single_values_are_one_run(together):
    (run,) = runs({"text": "a", "seed": [1], "image1": ["x"]}, PICTURES, together)
    assert (run["text"], run["seed"], run["image1"]) == ("a", 1, ["x"] if together else "x")


def test_each_picture_has_a_run_of_its_own_with_the_last_of_what_is_shorter():
    given = {"text": ["a", "b"], "seed": [1], "image1": ["x", "y", "z"]}
    assert runs(given, PICTURES, together=False) == [
        {"text": "a", "seed": 1, "image1": "x"},
        {"text": "b", "seed": 1, "image1": "y"},
        {"text": "b", "seed": 1, "image1": "z"},
    ]


def test_pictures_stay_together_where_they_may_and_nothing_else_is_a_list():
    given = {"text": ["a"], "image1": ["x", "y"], "image2": ["z"]}
    assert runs(given, PICTURES, together=True) == [{"text": "a", "image1": ["x", "y"], "image2": ["z"]}]
    given["text"] = ["a", "b"]
    assert runs(given, PICTURES, together=True) == [
        {"text": "a", "image1": "x", "image2": "z"},
        {"text": "b", "image1": "y", "image2": "z"},
    ]


def test_an_empty_list_is_an_input_that_is_not_connected():
    assert runs({"text": ["a"], "image1": []}, PICTURES, together=True) == [{"text": "a"}]
    assert runs({"text": ["a"], "image1": []}, PICTURES, together=False) == [{"text": "a"}]


def test_errors_can_tell_one_picture_of_several_from_another():
    assert named("image1", "x") == named("image1", ["x"]) == {"image1": "x"}
    assert named("image1", ["x", "y"]) == {"image1 (1 of 2)": "x", "image1 (2 of 2)": "y"}


@pytest.mark.parametrize(("value", "expected"), [([1, 2], 1), ((None,), None), ("ab", "ab"), (None, None), ([], [])])
def test_a_widgets_value_may_come_in_a_list(value, expected):
    assert first(value) == expected
