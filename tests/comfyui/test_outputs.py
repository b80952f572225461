from types import SimpleNamespace

import pytest

from qwenvl.comfyui.outputs import with_outputs

KNOWN = {
    "QwenVL": SimpleNamespace(),
    "PreviewAny": SimpleNamespace(OUTPUT_NODE=True),
    "SaveImage": SimpleNamespace(OUTPUT_NODE=True),
    "StringConcatenate": SimpleNamespace(),
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def taken(prompt, **more):
    return with_outputs({"prompt": prompt, **more}, {"QwenVL"}, KNOWN)


def test_a_prompt_that_only_asks_has_a_preview_behind_every_question():
    asked = taken({"1": node("QwenVL"), "2": node("StringConcatenate", a=["1", 0]), "3": node("QwenVL", text=["2", 0])})
    added = {
        number: entry["inputs"] for number, entry in asked["prompt"].items() if entry["class_type"] == "PreviewAny"
    }
    assert added == {"1-answer": {"source": ["1", 0]}, "3-answer": {"source": ["3", 0]}}


def test_where_anything_else_is_an_output_nothing_is_changed():
    """What lies about unconnected is not run then, nor the branch that a switch leaves out."""
    prompt = {"1": node("QwenVL"), "2": node("SaveImage")}
    assert taken(dict(prompt)) == {"prompt": prompt}


def test_one_that_is_asked_for_by_itself_is_run():
    prompt = {
        "1": node("QwenVL"),
        "2": node("PreviewAny", source=["1", 0]),
        "3": node("QwenVL"),
        "4": node("SaveImage"),
    }
    asked = taken(prompt, partial_execution_targets=["1", "4"])
    assert asked["partial_execution_targets"] == ["4", "1-answer"]
    assert asked["prompt"]["1-answer"] == node("PreviewAny", source=["1", 0])
    assert "3-answer" not in asked["prompt"]


def test_of_others_that_are_asked_for_nothing_is_changed():
    prompt = {"1": node("QwenVL"), "2": node("PreviewAny", source=["1", 0])}
    assert taken(dict(prompt), partial_execution_targets=["2"]) == {
        "prompt": prompt,
        "partial_execution_targets": ["2"],
    }


@pytest.mark.parametrize("queued", [{}, {"prompt": None}, {"prompt": []}, {"prompt": {"1": None, "2": {}, "3": 5}}])
def test_what_is_no_prompt_is_left_to_comfyui(queued):
    assert with_outputs(dict(queued), {"QwenVL"}, KNOWN) == queued


def test_a_comfyui_without_the_preview_is_left_as_it_is():
    queued = {"prompt": {"1": node("QwenVL")}}
    assert with_outputs(queued, {"QwenVL"}, {"QwenVL": SimpleNamespace()}) == {"prompt": {"1": node("QwenVL")}}
