import numpy as np
import pytest
from pictures import draw as draw_shape
from PIL import Image

from qwenvl.media.boxes import Mark, as_bounding_boxes, counts_pixels, draw, mask, place, read

RED = '{"bbox_2d": [10, 20, 30, 40], "label": "red"}'
BLUE = '{"bbox_2d": [50, 60, 70, 80], "label": "blue"}'
BOTH = [Mark((10, 20, 30, 40), "red"), Mark((50, 60, 70, 80), "blue")]


@pytest.mark.parametrize(
    "text",
    [
        f"[{RED}, {BLUE}]",
        f"{RED}\n{BLUE}",
        f"```json\n[{RED},\n{BLUE}]\n```",
        f"Here they are:\n```json\n[\n\t{RED},\n\t{BLUE}\n]\n```\nI hope {{this}} helps [1].",
        f'{{"objects": [{RED}, {{"nested": {BLUE}}}]}}',
        f"[[{RED}], [{BLUE}]]",
        "[" * 30 + RED + "]" * 30 + BLUE,
    ],
)
def test_objects_are_read_wherever_they_stand(text):
    marks, problems = read(text)
    assert (marks, problems) == (BOTH, [])


@pytest.mark.parametrize("text", ["", "There is no car in this picture.", "{}", "[]", "{not json}", '{"label": "x"}'])
def test_an_answer_without_boxes_has_none_and_is_no_mistake(text):
    assert read(text) == ([], [])


@pytest.mark.parametrize(
    "value",
    [
        *("[1, 2, 3]", "[1, 2, 3, 4, 5, 6, 7, 8]", '"1 2 3"', '"a box"', "[true, 2, 3, 4]", '[1, 2, 3, "x"]', "{}"),
        *("[]", "null", "5", "[NaN, 1, 2, 3]", f"[1, 2, 3, 1{'0' * 400}]", f'[1, 2, 3, "1{"0" * 400}"]'),
    ],
)
def test_a_box_of_something_else_is_left_out_and_named(value):
    marks, problems = read(f'[{{"bbox_2d": {value}, "label": "odd"}}, {RED}]')
    assert marks == BOTH[:1]
    (problem,) = problems
    assert "bbox_2d of 'odd' must be 4 numbers" in problem


def test_an_answer_that_repeats_itself_gives_each_object_once():
    marks, problems = read(f"[{', '.join([RED] * 50)}, {BLUE}]")
    assert marks == BOTH
    assert problems == ["49 objects are there more than once"]


@pytest.mark.parametrize(
    ("numbers", "seen", "known", "pixels"),
    [
        ((10, 20, 900, 950), (1024, 768), "", False),
        ((10, 20, 1010, 700), (1024, 768), "", True),
        ((10, 20, 1003, 700), (896, 896), "", False),
        ((10, 20, 900, 1200), (700, 1204), "", True),
        ((10, 20, 900, 700), (1024, 768), "pixels", True),
        ((10, 20, 900, 700), (1024, 768), "0-1000", False),
        ((10, 20, 1010, 700), (1024, 768), "0-1000", True),
    ],
)
def test_auto_takes_pixels_where_the_family_does_or_thousandths_cannot_be_meant(numbers, seen, known, pixels):
    assert counts_pixels([Mark((1, 1, 2, 2)), Mark(numbers)], seen, known) == pixels


def test_thousandths_and_pixels_of_a_scaled_picture_are_placed():
    marks = [Mark((100, 200, 500, 1000), "a")]
    assert place(marks, (1000, 1000), (200, 400)) == ([Mark((20, 80, 100, 400), "a")], [])
    assert place(marks, (500, 1000), (1000, 500)) == ([Mark((200, 100, 1000, 500), "a")], [])


def test_marks_are_cut_off_at_the_edge_and_left_out_beyond_it():
    marks = [
        Mark((-50, 500, 1200, 600), "wide"),
        Mark((1100, 0, 1200, 100), "gone"),
        Mark((10, 10, 10, 50), "flat"),
        Mark((1000, 1000, 1000, 1000), "corner", is_point=True),
        Mark((1001, 5, 1001, 5), "away", is_point=True),
    ]
    placed, problems = place(marks, (1000, 1000), (100, 100))
    assert [(mark.label, mark.box) for mark in placed] == [
        ("wide", (0, 50, 100, 60)),
        ("corner", (100, 100, 100, 100)),
    ]
    assert [problem.split()[0] for problem in problems] == ["gone", "flat", "away"]


def test_the_mask_is_the_union_of_the_boxes_and_a_disc_for_each_point():
    marks = [Mark((10, 20, 30, 40)), Mark((20, 30, 50, 60)), Mark((80, 80, 80, 80), is_point=True)]
    result = np.asarray(mask((100, 90), marks))
    assert result.shape == (90, 100)
    expected = np.zeros((90, 100), bool)
    expected[20:40, 10:30] = expected[30:60, 20:50] = True
    disc = result[70:90, 70:90] > 0
    assert 20 < disc.sum() < 50
    assert result[80, 80] == 255
    expected[70:90, 70:90] = disc
    assert (result == expected * 255).all()


def test_bounding_boxes_are_whole_pixels_within_the_picture_and_points_are_none():
    marks, _ = place(
        [Mark((0, 500, 1000, 1000), "a"), Mark((999.9, 0, 1000, 0.1), "b"), Mark((5, 5, 5, 5), "c", is_point=True)],
        (1000, 1000),
        (192, 100),
    )
    assert as_bounding_boxes(marks) == [
        {"x": 0, "y": 50, "width": 192, "height": 50, "label": "a"},
        {"x": 191, "y": 0, "width": 1, "height": 1, "label": "b"},
    ]


def test_boxes_and_labels_are_drawn_and_the_picture_itself_stays_as_it_was():
    picture = draw_shape("circle", "red", "blue", (200, 200))
    before = picture.tobytes()
    drawn = draw(picture, [Mark((50, 60, 150, 160), "red circle")])
    changed = np.asarray(drawn) != np.asarray(picture)
    rows, columns = np.nonzero(changed.any(axis=2))
    assert picture.tobytes() == before
    # The plate with the label stands on the box's upper edge, and within the box only its frame is new.
    assert (columns.min(), columns.max(), rows.max()) == (50, 149, 159)
    assert 40 <= rows.min() < 50
    assert not changed[64:156, 54:146].any()


def test_each_label_has_a_colour_of_its_own():
    picture = Image.new("RGB", (200, 200))
    marks = [Mark((20, 50, 40, 90), "a"), Mark((60, 50, 80, 90), "b"), Mark((100, 50, 120, 90), "a")]
    drawn = draw(picture, marks)
    first, second, third = (drawn.getpixel((x, 89)) for x in (30, 70, 110))
    assert first == third != second
    assert first != (0, 0, 0) != second


@pytest.mark.parametrize("label", ["x" * 500, "红色的圆", "two\nlines", "🙂", "\x00"])
@pytest.mark.parametrize("size", [(1, 1), (8, 300), (300, 8)])
def test_any_label_fits_on_any_picture(label, size):
    drawn = draw(Image.new("RGB", size), [Mark((0, 0, *size), label), Mark((0, 0, 0, 0), label, is_point=True)])
    assert drawn.size == size


def test_of_an_answer_that_no_model_gives_the_beginning_is_read():
    marks, problems = read(f"[{RED}, {' ' * 1_000_000} {BLUE}]")
    assert marks == BOTH[:1]
    assert "1,000,000 characters" in problems[0]


def test_half_a_character_in_an_answer_can_be_shown():
    marks, problems = read('[{"bbox_2d": [1, 2, 3, 4], "label": "\\ud800"}, {"bbox_2d": "\ud800"}, {bbox_2d: \ud800}]')
    assert marks[0].label == "\ufffd"
    "".join(problems).encode()


def test_a_box_that_is_nested_as_deep_as_json_follows_is_named():
    """Writing it down again goes deeper than reading it."""
    for depth in range(500, 1000):
        marks, problems = read(f'{RED} {{"bbox_2d": {"[" * depth}{"]" * depth}}}')
        assert (marks, len(problems)) == (BOTH[:1], 1)


def test_of_a_mistake_that_is_made_over_and_over_the_first_are_told():
    odd = ", ".join(f'{{"bbox_2d": [{number}]}}' for number in range(300))
    marks, problems = read(f"[{RED}, {RED}, {odd}")
    assert marks == BOTH[:1]
    assert "got [19]" in problems[19]
    assert [
        word in problem for word, problem in zip(("280 more", "cut off", "more than once"), problems[20:], strict=True)
    ]
    outside = place([Mark((2000, number, 3000, 5000)) for number in range(300)], (1000, 1000), (100, 100))[1]
    assert (len(outside), outside[20]) == (21, "and 280 more like these")
