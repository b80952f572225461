"""Answers that are no JSON, or were cut off: what is read of them, and what is said."""

import json
import sys

import pytest

from qwenvl.media import nearly_json
from qwenvl.media.boxes import Mark, read

RED = '{"bbox_2d": [10, 20, 30, 40], "label": "red"}'
BLUE = '{"bbox_2d": [50, 60, 70, 80], "label": "blue"}'
BOTH = [Mark((10, 20, 30, 40), "red"), Mark((50, 60, 70, 80), "blue")]


@pytest.mark.parametrize(
    ("end", "label"),
    [
        ('{"bbox_2d": [50, 60, 70, 80], "label": "bl', ""),
        ('{"bbox_2d": [50, 60, 70, 80]', ""),
        ('{"bbox_2d": [50, 60, 70, 80], "label": "blue",', "blue"),
    ],
)
def test_of_an_answer_that_was_cut_off_all_whole_boxes_are_read(end, label):
    marks, problems = read(f"```json\n[{RED}, {end}")
    assert marks == [BOTH[0], Mark(BOTH[1].box, label)]
    assert len(problems) == 2
    assert "read as well as it can be" in problems[0]
    assert "max_new_tokens" in problems[1]


@pytest.mark.parametrize("cut", [5, 12, 20, 24])
def test_a_box_that_was_cut_off_is_left_out_and_the_rest_kept(cut):
    marks, problems = read(f"[{RED}, {BLUE[:cut]}")
    assert marks == BOTH[:1]
    assert "max_new_tokens" in problems[-1]
    assert ("left out" in problems[0]) == (cut > 9)


def test_a_list_that_ends_after_an_object_is_known_to_be_cut_off():
    marks, problems = read(f"[{RED}, {BLUE},")
    assert marks == BOTH
    assert ["max_new_tokens" in problem for problem in problems] == [True]


@pytest.mark.parametrize(
    "text",
    [
        "[{'bbox_2d': [10, 20, 30, 40], 'label': 'red'}]",
        '[{"bbox_2d": [10, 20, 30, 40], "label": "red",}]',
        '[{bbox_2d: [10, 20, 30, 40], label: "red"}]',
        '[{"bbox_2d": [10, 20, 30, 40], "label": "red"',
    ],
)
def test_what_is_nearly_json_is_read_with_a_warning(text):
    marks, problems = read(text + "\n")
    assert marks == BOTH[:1]
    assert "no JSON" in problems[0]


@pytest.mark.parametrize("text", ["{" * 20_000, '{"a":' * 20_000, "[" * 20_000 + RED, '{"bbox_2d": [' * 2_000])
def test_nonsense_ends(text):
    marks, _ = read(text)
    assert marks == (BOTH[:1] if RED in text else [])


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("[{'bbox_2d': [1, 2, 30, 40], 'label': 'a'}]", ["a"]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "a",}, ]', ["a"]),
        ("[{'bbox_2d': [1, 2, 30, 40], 'label': 'the dog's tail'}, {'bbox_2d': [5, 6, 7, 8]}]", ["the dog's tail", ""]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "12" pipe"}, {"bbox_2d": [5, 6, 7, 8]}]', ['12" pipe', ""]),
        ("[{'bbox_2d': [1, 2, 30, 40], 'label': 'a [b'}]", ["a [b"]),
        ('[{"bbox_2d": [1, 2, 30, 40, "label": "a"}]', ["a"]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "a"]', ["a"]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "a", {"bbox_2d": [5, 6, 7, 8], "label": "b"}]', ["a", "b"]),
        ('{"bbox_2d": [1, 2, 30, 40] "label": "a"}', ["a"]),
        ("[{bbox_2d: [1 2 30 40], label: a}]", ["a"]),
        ("[{“bbox_2d”: [1, 2, 30, 40], “label”: “a”}]", ["a"]),
        ("```python\nboxes = [{'bbox_2d': (1, 2, 30, 40), 'label': None},]\n```", [""]),
        ("[{'names': {'zh': '狗', 'en': 'dog'}, 'bbox_2d': [1, 2, 30, 40]}]", ["dog"]),
        ("{'objects': [" + "{'bbox_2d': [1, 2, 30, 40], 'label': 'a'}]}", ["a"]),
        ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "a"}\n```', ["a"]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "a"}\nThere is one.', ["a"]),
        ('As boxes [in thousandths:\n[{"bbox_2d": [1, 2, 30, 40], "label": "a"}]', ["a"]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "a"}] (see [above', ["a"]),
    ],
)
def test_what_is_nearly_json_is_read_and_is_not_called_cut_off(answer, labels):
    marks, problems = read(answer)
    assert [mark.label for mark in marks] == labels
    assert marks[0].box == (1, 2, 30, 40)
    assert not [problem for problem in problems if "cut off" in problem]


@pytest.mark.parametrize(
    "end",
    [
        *(
            '{"bbox_2d": [50, 60, 70, 8',
            '{"bbox_2d": ["50", "60", "70", "8',
            '{"bbox_2d": "[50, 60, 70, 8',
            "{'bbox_2d",
        ),
        *(
            "{'bbox_2d': [50, 60, 70, 8",
            '{"box_2d": [[50, 60, 70, 8',
            "{bbox_2d: [50 60 70 8",
            '{"bbox_2d": "50,60,70,8',
        ),
    ],
)
@pytest.mark.parametrize("begin", ["[", "", "```json\n["])
def test_half_a_number_is_no_number(begin, end):
    marks, problems = read(f"{begin}{RED}, {end}")
    assert marks == BOTH[:1]
    assert "cut off" in problems[-1]


def test_without_json_repair_the_rest_is_read_and_a_sentence_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "json_repair", None)
    odd = ", ".join("{'bbox_2d': [1, 2, 3, 4]}" for _ in range(30))
    marks, problems = read(f"[{RED}, {odd}, {BLUE}]")
    assert marks == BOTH
    assert "pip install json-repair" in problems[0]
    assert "left out" in problems[1]
    assert not any("json-repair" in problem for problem in read(f"[{RED}]").problems)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "{",
            "[",
            "{'",
            "{bbox_2d:",
            "{'bbox_2d': [1]}, ",
            '{"bbox_2d": [1]}, ',
            "{'bbox_2d': [1, 2, 3, 4]}, ",
            "bbox: ",
        ),
        *(
            '{"bbox_2d": "',
            "(1,2),",
            "<points x1=1 ",
            '<p data-bbox="',
            "'x, ",
            "[1, 2, 3, 4",
            "{}",
            "x1: ",
            "{{}}bbox:",
        ),
    ],
)
def test_the_work_grows_as_the_answer_does(piece):
    """Counted in steps of Python and of what it calls, not in time."""

    def steps(count):
        counted = 0

        def count_one(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        text = piece * count
        sys.setprofile(count_one)
        try:
            read(text)
        finally:
            sys.setprofile(None)
        return counted

    small, large = steps(1500), steps(6000)
    assert large < 6 * small + 1000


def test_json_repair_is_given_little_at_a_time_and_not_for_ever(monkeypatch):
    given = []
    monkeypatch.setattr(nearly_json, "_library", lambda: lambda text, **_: given.append(text))
    read("".join("{'bbox_2d': [1], 'text': '" + "x" * 5000 + "'} {'bbox_2d': " + "{" * 500 for _ in range(100)))
    assert max(map(len, given)) <= 2000
    assert max(text.count("{") for text in given) <= 5
    read("{'bbox_2d': [1], 'label': 'a'}" * 30_000)
    assert sum(map(len, given)) <= 2 * nearly_json.MOST_MENDED


def test_json_in_a_label_is_a_label():
    label = json.dumps([{"bbox_2d": [1, 2, 3, 4]}])
    assert read(json.dumps({"bbox_2d": [10, 20, 30, 40], "label": label})) == ([Mark((10, 20, 30, 40), label)], [])


def test_a_number_may_be_followed_by_what_only_some_take_for_a_space():
    """Found by fuzzing: to a regular expression, U+001C is a space."""
    marks, _ = read('{"bbox_2d": [1, 2, 3, 50\x1c], "label": "x"}')
    assert marks == [Mark((1, 2, 3, 50), "x")]
    assert read('{"bbox_2d": [1, 2, 3, "50\x1cx"]}')[0] == []


@pytest.mark.parametrize(
    "text",
    [
        *("{" * 500_000, "{\n" * 250_000, '{"a"' * 100_000, "{label:'" * 60_000),
        *('{"a":' * 100_000, ('{"k":[' + "1," * 500) * 800, '{"bbox_2d":' * 900),
    ],
)
def test_a_text_that_is_no_json_over_and_over_is_read_to_its_end(text):
    """Most of these took minutes: json counts the lines up to every mistake, and every brace began anew."""
    marks, _ = read(f'{{"bbox_2d": [1, 2, 3, 4]}} {text} {{bbox_2d: [5, 6, 7, 8]}}')
    assert [mark.box for mark in marks] == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_whole_objects_are_found_within_others_that_are_cut_off():
    """Their labels stand behind objects of their own, where what is no JSON has no label."""
    inner = '{"bbox_2d": [10, 20, 30, 40], "is": {"of": {"steel": 1}}, "label": "red"}'
    marks, problems = read('{"a": {"b": [{"c": [{"d": ' + inner + ', {"bbox_2d": [1, 2')
    assert marks == BOTH[:1]
    assert ["left out" in problems[0], "cut off" in problems[1]] == [True, True]


def test_many_objects_that_are_nearly_json_are_all_read():
    text = "".join(f"{{'bbox_2d': [{n}, 2, {n + 1}, 4], 'label': 'x'}}, " for n in range(1000))
    assert len(read(text)[0]) == 1000
