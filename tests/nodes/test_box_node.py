import json
import logging

import numpy as np
import pytest
import torch
from pictures import draw, image

DEMO = "Demo-Shapes (5 MB, offline)"
ASK = {"model": DEMO, "do_sample": False, "text": "Locate the red circle, output bbox_2d JSON"}
# Where conftest draws: the middle, with a radius of 0.32 of the shorter side.
RED_CIRCLE = draw("circle", "red", "blue", (240, 160))
CIRCLE_BOX = (120 - 51, 80 - 51, 120 + 51, 80 + 51)


def answer_of(*boxes):
    return json.dumps([{"bbox_2d": list(box), "label": label} for label, box in boxes])


@pytest.fixture
def mark(comfy, pack):
    def run(picture, text, coordinates="auto", **more):
        node = pack.NODE_CLASS_MAPPINGS["QwenVLBoxes"]
        return comfy.run(node, image=picture, text=text, coordinates=coordinates, **more)

    return run


@pytest.fixture
def ask(comfy, pack):
    def run(picture):
        node = pack.NODE_CLASS_MAPPINGS["QwenVL"]
        required = {name: options.get("default") for name, (_, options) in node.INPUT_TYPES()["required"].items()}
        return comfy.run(node, **{**required, **ASK, "image1": picture})[0]

    return run


def overlap(one, other):
    """Shared share of two boxes' union."""
    left, top, right, bottom = (
        pick(pair) for pick, pair in zip((max, max, min, min), zip(one, other, strict=True), strict=True)
    )
    shared = max(0, right - left) * max(0, bottom - top)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (area - shared)


def corners(box):
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def test_the_box_that_the_model_found_is_drawn_around_the_shape_that_is_there(ask, mark):
    picture = image(RED_CIRCLE)
    answer = ask(picture)
    text = answer[0] if isinstance(answer, list) else answer
    (drawn,), (mask,), (((box,),),) = mark(picture, text)
    assert box["label"] == "red circle"
    assert overlap(corners(box), CIRCLE_BOX) > 0.7
    rows, columns = np.nonzero(mask[0].numpy())
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == corners(box)
    changed = (drawn != picture).any(dim=-1)[0].numpy()
    left, top, right, bottom = corners(box)
    assert changed[top : top + 2, left:right].all() and changed[bottom - 2 : bottom, left:right].all()
    assert changed[top:bottom, left : left + 2].all() and changed[top:bottom, right - 2 : right].all()
    assert not changed[top + 20 : bottom - 2, left + 2 : right - 2].any()


def test_kinds_shapes_and_ranges_are_comfyuis(mark):
    (drawn,), (mask,), (boxes,) = mark(image(RED_CIRCLE), answer_of(("a", (0, 0, 500, 500))))
    assert (drawn.shape, drawn.dtype) == ((1, 160, 240, 3), torch.float32)
    assert (mask.shape, mask.dtype) == ((1, 160, 240), torch.float32)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert boxes == [[{"x": 0, "y": 0, "width": 120, "height": 80, "label": "a"}]]


def test_a_batch_has_an_answer_for_each_picture(mark):
    batch = image(RED_CIRCLE, RED_CIRCLE)
    texts = [answer_of(("one", (0, 0, 100, 100))), answer_of(("two", (500, 500, 1000, 1000)))]
    (drawn,), (mask,), (boxes,) = mark(batch, texts)
    assert drawn.shape[0] == mask.shape[0] == 2
    assert [[box["label"] for box in found] for found in boxes] == [["one"], ["two"]]
    assert (mask[0, :16, :24].all(), mask[0].sum(), mask[1].sum()) == (True, 16 * 24, 80 * 120)


def test_a_list_of_pictures_of_different_sizes_gives_a_list(mark):
    pictures = [image(RED_CIRCLE), image(draw("circle", "red", "blue", (100, 100)))]
    texts = [answer_of(("one", (0, 0, 100, 100))), answer_of(("two", (0, 0, 100, 100)))]
    drawn, masks, boxes = mark(pictures, texts)
    assert [entry.shape for entry in drawn] == [(1, 160, 240, 3), (1, 100, 100, 3)]
    assert [found.shape for found in masks] == [(1, 160, 240), (1, 100, 100)]
    assert [corners(found[0]) for (found,) in boxes] == [(0, 0, 24, 16), (0, 0, 10, 10)]


def test_one_answer_goes_for_all_pictures(mark):
    _, _, (boxes,) = mark(image(RED_CIRCLE, RED_CIRCLE), answer_of(("a", (0, 0, 500, 500))))
    assert [len(found) for found in boxes] == [1, 1]


def test_a_wrong_number_of_answers_is_an_error_that_says_what_to_do(mark):
    with pytest.raises(ValueError, match=r"2 texts for 3 pictures.*one answer per image"):
        mark(image(RED_CIRCLE, RED_CIRCLE, RED_CIRCLE), ["", ""])


def test_points_are_in_the_mask_and_not_among_the_boxes(mark):
    _, (mask,), (boxes,) = mark(image(RED_CIRCLE), '{"point_2d": [500, 500], "label": "middle"}')
    assert boxes == [[]]
    assert mask[0, 80, 120] == 1
    assert 20 < mask.sum() < 60


# As Qwen2.5-VL sees it, 1600 x 800 pixels are 1260 x 616.
WIDE = (1600, 800)
IN_PIXELS = (630, 308, 1260, 616)
ORIGINAL = {"image_resolution": "original"}


def stats(model="m", **more):
    return json.dumps({"model": model, **more})


@pytest.mark.parametrize(
    ("coordinates", "numbers", "more", "expected"),
    [
        ("pixels", IN_PIXELS, {}, (800, 400, 1600, 800)),
        ("auto", IN_PIXELS, {}, (800, 400, 1600, 800)),
        ("auto", (0, 0, 630, 308), {}, (0, 0, 1008, 247)),
        ("auto", (0, 0, 630, 308), {"stats": stats(coordinates="pixels")}, (0, 0, 800, 400)),
        ("auto", (0, 0, 630, 308), {"stats": stats(coordinates="0-1000")}, (0, 0, 1008, 247)),
        ("auto", (0, 0, 630, 308), {"stats": stats(coordinates="")}, (0, 0, 1008, 247)),
        ("auto", (0, 0, 630, 308), {"stats": stats(model="Qwen2.5-VL-7B-Instruct")}, (0, 0, 1008, 247)),
        ("auto", (0, 0, 630, 308), {"stats": "nothing of ours"}, (0, 0, 1008, 247)),
        # Seen as 800 x 400, whatever the widget says.
        ("pixels", (0, 0, 400, 200), {"stats": stats(seen_sizes=[[[800, 400]]])}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 400, 200), {"stats": stats(seen_sizes=[[[800, 400]]]), **ORIGINAL}, (0, 0, 800, 400)),
        ("auto", (0, 0, 400, 200), {"stats": stats(coordinates="pixels", seen_sizes=[[[800, 400]]])}, (0, 0, 800, 400)),
        ("auto", (0, 0, 1001, 200), {"stats": stats(seen_sizes=[[[1001, 400]]])}, (0, 0, 1600, 400)),
        # Of other pictures, or of none: computed as without stats.
        ("pixels", (0, 0, 630, 308), {"stats": stats(seen_sizes=[[[8, 8]], [[8, 8]]])}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 630, 308), {"stats": stats(seen_sizes=[])}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 630, 308), {"stats": stats(seen_sizes=[[[0, 8]]])}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 630, 308), {"stats": stats(seen_sizes=[8, "x", None])}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 630, 308), {}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 308, 154), {"image_resolution": "low (256x28x28)"}, (0, 0, 800, 400)),
        ("pixels", (0, 0, 798, 406), ORIGINAL, (0, 0, 800, 400)),
        ("0-1000", (0, 0, 1260, 500), {}, (0, 0, 1600, 400)),
    ],
)
def test_numbers_count_what_the_widget_and_the_stats_say(mark, coordinates, numbers, more, expected):
    _, _, (((box,),),) = mark(torch.zeros(1, *WIDE[::-1], 3), answer_of(("a", numbers)), coordinates, **more)
    assert corners(box) == expected


@pytest.mark.parametrize(
    "told",
    [
        [stats(seen_sizes=[[[800, 400], [400, 400]]])],
        [stats(seen_sizes=[[[800, 400]], [[400, 400]]])],
        [stats(seen_sizes=[[[800, 400]]]), stats(seen_sizes=[[[400, 400]]])],
    ],
    ids=["of one answer", "of an answer each", "of a run each"],
)
def test_each_picture_has_the_size_at_which_it_was_seen(mark, told):
    pictures = [torch.zeros(1, 800, 1600, 3), torch.zeros(1, 800, 800, 3)]
    _, _, boxes = mark(pictures, [answer_of(("a", (0, 0, 400, 200)))] * 2, "pixels", stats=told)
    assert [corners(found[0]) for (found,) in boxes] == [(0, 0, 800, 400), (0, 0, 800, 400)]


@pytest.mark.parametrize("text", ["There is none.", "", "[]"])
def test_without_boxes_the_picture_is_as_it_was_and_the_log_says_so(mark, comfy, caplog, text):
    picture = image(RED_CIRCLE)
    (drawn,), (mask,), (boxes,) = mark(picture, text)
    assert torch.equal(drawn, picture)
    assert mask.sum() == 0
    assert boxes == [[]]
    assert "no bbox_2d or point_2d" in caplog.text
    assert comfy.texts[-1][0].startswith("0 found; there is no bbox_2d")


def test_of_a_truncated_answer_the_rest_is_drawn_with_a_warning_in_the_log_and_on_the_node(mark, comfy, caplog):
    cut = answer_of(("one", (0, 0, 100, 100)), ("two", (500, 500, 1000, 1000)))[:-30]
    _, _, (boxes,) = mark(image(RED_CIRCLE), cut)
    assert [box["label"] for box in boxes[0]] == ["one"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("max_new_tokens" in warning for warning in warnings)
    assert comfy.texts[-1][0].startswith("1 found: one; ")
    assert "max_new_tokens" in comfy.texts[-1][0]


def test_boxes_of_a_transparent_or_grey_picture_are_drawn_in_colour(mark):
    for channels in (1, 4):
        (drawn,), _, _ = mark(torch.ones(1, 50, 50, channels), answer_of(("a", (100, 100, 900, 900))))
        assert drawn.shape == (1, 50, 50, 3)
