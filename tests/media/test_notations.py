import pytest

from qwenvl.media.boxes import Mark, read


def test_points_and_rows_and_other_names_for_labels_are_read():
    text = (
        '[{"point_2d": [5, 6], "label": "eye"}, {"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "tree"}, '
        '{"bbox_2d": [9.5, 8, 20, 30], "text_content": "EXIT"}, {"bbox_2d": [30, 40, 10, 20]}]'
    )
    assert read(text) == (
        [
            Mark((5, 6, 5, 6), "eye", is_point=True),
            Mark((1, 2, 3, 4), "tree"),
            Mark((5, 6, 7, 8), "tree"),
            Mark((9.5, 8, 20, 30), "EXIT"),
            Mark((10, 20, 30, 40), ""),
        ],
        [],
    )


@pytest.mark.parametrize(
    ("held", "boxes"),
    [
        ('"bbox_2d": ["1", "2", "3", "4"]', [(1, 2, 3, 4)]),
        ('"bbox_2d": "[1, 2, 3, 4]"', [(1, 2, 3, 4)]),
        ('"bbox_2d": "1, 2, 3, 4"', [(1, 2, 3, 4)]),
        ('"bbox_2d": "(1,2),(3,4)"', [(1, 2, 3, 4)]),
        ('"bbox_2d": ["1,2,3,4"]', [(1, 2, 3, 4)]),
        ('"bbox_2d": [[1, 2], [3, 4]]', [(1, 2, 3, 4)]),
        ('"bbox_2d": [["1", "2", "3", "4"], "5 6 7 8"]', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('"bbox_2d": {"x1": 1, "y1": 2, "x2": 3, "y2": "4"}', [(1, 2, 3, 4)]),
        ('"x1": 1, "y1": 2, "x2": 3, "y2": 4', [(1, 2, 3, 4)]),
        ('"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4', [(1, 2, 3, 4)]),
        ('"x": 1, "y": 2, "width": 2, "height": 2', [(1, 2, 3, 4)]),
        ('"x": 1, "y": 2', [(1, 2, 1, 2)]),
        ('"point_2d": ["1", "2"]', [(1, 2, 1, 2)]),
        ('"point_2d": "(1, 2)"', [(1, 2, 1, 2)]),
        ('"points": [[1, 2], [3, 4]]', [(1, 2, 1, 2), (3, 4, 3, 4)]),
        ('"coordinate": [1, 2]', [(1, 2, 1, 2)]),
        *((f'"{key}": [1, 2, 3, 4]', [(1, 2, 3, 4)]) for key in ("bbox", "BBox", "box_2d", "Bounding Box", "box")),
        ('"bbox": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]', [(5, 6, 7, 8)]),
        ('"box": "of wood", "point": "of view"', []),
    ],
)
def test_numbers_are_read_in_every_way_in_which_they_are_written(held, boxes):
    marks, problems = read(f'[{{{held}, "label": "a"}}]')
    assert (marks, problems) == ([Mark(box, "a", box[:2] == box[2:]) for box in boxes], [])


@pytest.mark.parametrize(
    ("held", "label"),
    [
        ('"name_zh": "米饭", "name_en": "Rice"', "Rice"),
        ('"name_zh": "米饭"', "米饭"),
        ('"names": {"zh": "富冈义勇", "en": "Giyu Tomioka"}', "Giyu Tomioka"),
        ('"names": {"zh": "富冈义勇"}', "富冈义勇"),
        ('"names": ["a", "b"]', "a, b"),
        ('"label": {"en": "a"}', "a"),
        ('"Label": "a"', "a"),
        ('"label": "", "text_content": "EXIT"', "EXIT"),
        ('"label": 7', "7"),
        ('"label": null, "category": "a"', "a"),
        ('"depth": 3', ""),
    ],
)
@pytest.mark.parametrize("quotes", ['"', "'"])
def test_labels_have_many_names(held, label, quotes):
    answer = f'[{{"bbox_2d": [1, 2, 3, 4], {held}}}]'.replace('"', quotes)
    assert read(answer)[0] == [Mark((1, 2, 3, 4), label)]


def test_several_boxes_have_a_label_each_where_there_are_as_many():
    answer = '{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": ["a", "b"]}'
    assert read(answer) == ([Mark((1, 2, 3, 4), "a"), Mark((5, 6, 7, 8), "b")], [])


DOG, CAT = Mark((10, 20, 300, 400), "dog"), Mark((1, 2, 3, 4), "cat")


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("dog(10,20),(300,400)", [DOG]),
        ("dog(10,20),(300,400)cat(1,2),(3,4)(5,6),(7,8)", [DOG, CAT, Mark((5, 6, 7, 8), "cat")]),
        ("<|object_ref_start|>dog<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|><|im_end|>", [DOG]),
        ("<ref>dog</ref><box>(10, 20), (300, 400)</box>", [DOG]),
        ("- dog: (10, 20), (300, 400)\n- cat: (1, 2), (3, 4)\n", [DOG, CAT]),
        ("(120, 340)", [Mark((120, 340, 120, 340), "", True)]),
        ("cup: (120.5, 340).", [Mark((120.5, 340, 120.5, 340), "cup", True)]),
        ("They scored (3, 4) goals in 1998 (and more).", []),
        ('<points x1="5" y1="6" x2="7" y2="8" alt="cup">cup</points>',
         [Mark((5, 6, 5, 6), "cup", True), Mark((7, 8, 7, 8), "cup", True)]),
        ("<point x='5' y='6' alt='cup'/>", [Mark((5, 6, 5, 6), "cup", True)]),
        ('<p data-bbox="10 20 300 400">dog</p>\n<h1 class="x" data-bbox="1 2 3 4">cat</h1>', [DOG, CAT]),
    ],
)  # fmt: skip
def test_the_notations_of_older_models_are_read(answer, marks):
    assert read(answer) == (marks, [])


@pytest.mark.parametrize(
    "end", ["cat(1,", "cat(1,2),(", "cat(1,2),", '<points x1="5" y1=', '<p data-bbox="1 2 3', "<|box_start|>(1"]
)
def test_such_an_answer_that_was_cut_off_says_so(end):
    marks, problems = read(f"dog(10,20),(300,400){end}")
    assert marks == [DOG]
    assert "cut off" in problems[-1]


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("[10, 20, 300, 400]", [Mark(DOG.box)]),
        ("10, 20, 300, 400", [Mark(DOG.box)]),
        ("[[10, 20, 300, 400], [1, 2, 3, 4]]", [Mark(DOG.box), Mark(CAT.box)]),
        ('{"dog": [10, 20, 300, 400], "cat": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [DOG, CAT, Mark((5, 6, 7, 8), "cat")]),
        ("dog: [10, 20, 300, 400]\ncat: [1, 2, 3, 4]", [DOG, CAT]),
        ("It is red: [255, 0, 0, 1].", []),
        ("[1, 2, 3]", []),
    ],
)
def test_four_numbers_without_a_key_are_a_box_where_they_can_be_and_it_is_said(answer, marks):
    found, problems = read(answer)
    assert found == marks
    assert ["without a key" in problem for problem in problems] == ([True] if marks else [])
