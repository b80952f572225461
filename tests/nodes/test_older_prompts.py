"""API prompts by name, as the older packs' users have them in scripts: what ComfyUI then checks and runs."""

import pytest
from comfy_double import Rejected
from pictures import draw, image

from qwenvl.nodes.older_prompts import complete

DEMO = "Demo-Shapes (5 MB, offline)"
RED_CIRCLE = image(draw("circle", "red", "blue"))
FEW = {
    "model": DEMO,
    "quantization": "none",
    "keep_model_loaded": False,
    "temperature": 0.0,
    "max_new_tokens": 128,
    "seed": 5,
}
ALL = {
    "system": "You are a helpful assistant.",
    "model": DEMO,
    "quantization": "none",
    "attention_mode": "eager",
    "keep_model_loaded": False,
    "bypass": False,
    "do_sample": False,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 512,
    "seed": -1,
}
LOOK = {"text": "Describe this image."}
PROMPTS = {
    "the reference pack's": ("QwenVL", {**LOOK, **ALL, "image1": RED_CIRCLE, "video_path": ""}),
    "the reference pack's, by its other id": ("Qwen2.5VL", {**LOOK, **ALL, "image2": RED_CIRCLE, "video_path": ""}),
    "the sibling fork's": (
        "QwenVL",
        {
            **LOOK,
            **ALL,
            "attention_mode": "auto",
            "image1": RED_CIRCLE,
            "image_resolution": "medium (512x28x28)",
        },
    ),
    "the older upstream's": ("QwenVL", {**LOOK, **FEW, "image": RED_CIRCLE, "video_path": ""}),
    "the older upstream's, by its other id": ("Qwen2.5VL", {**LOOK, **FEW, "image": RED_CIRCLE}),
    "the oldest's": ("Qwen2VL", {**LOOK, **FEW, "image": RED_CIRCLE}),
}
TEXTS = {
    "the reference pack's": ("Qwen", {"prompt": "Count from 3 to 5.", **ALL}),
    "the older upstream's": ("Qwen2.5", {"system": "You are helpful.", "prompt": "Count from 3 to 5.", **FEW}),
}


def run(comfy, pack, node_id, inputs):
    queued = complete({"prompt": {"1": {"class_type": node_id, "inputs": dict(inputs)}}}, pack.NODE_CLASS_MAPPINGS)
    return comfy.run(pack.NODE_CLASS_MAPPINGS[node_id], **queued["prompt"]["1"]["inputs"])[0]


@pytest.mark.parametrize("whose", PROMPTS)
def test_a_prompt_by_name_describes_its_picture(comfy, pack, whose):
    assert run(comfy, pack, *PROMPTS[whose]) == ["a red circle on a blue background"]


@pytest.mark.parametrize("whose", TEXTS)
def test_a_text_prompt_by_name_is_answered(comfy, pack, whose):
    assert run(comfy, pack, *TEXTS[whose]) == ["3, 4, 5"]


@pytest.mark.parametrize("missing", ["text", "model"])
def test_what_every_pack_asked_for_is_still_required(comfy, pack, missing):
    node_id, inputs = PROMPTS["the older upstream's"]
    with pytest.raises(Rejected, match=f"Required input is missing: {missing}"):
        run(comfy, pack, node_id, {name: value for name, value in inputs.items() if name != missing})


def test_what_is_given_stays(pack):
    given = {**LOOK, **ALL, "image": ["2", 0], "image1": ["3", 0], "top_k": ["4", 0]}
    node = {"class_type": "QwenVL", "inputs": dict(given)}
    complete({"prompt": {"1": node}}, pack.NODE_CLASS_MAPPINGS)
    assert node["inputs"] == {name: value for name, value in given.items() if name != "image"}


def test_nodes_of_others_and_what_is_no_prompt_are_left_alone(pack):
    nodes = {"QwenVL": pack.NODE_CLASS_MAPPINGS["QwenVL"]}
    for prompt in (
        {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}},
        {
            "1": {"class_type": "QwenVL"},
            "2": {"inputs": {}},
            "3": "text",
            "4": {"class_type": ["QwenVL"], "inputs": {}},
        },
        "text",
        None,
    ):
        queued = {"prompt": prompt}
        before = repr(queued)
        assert repr(complete(queued, nodes)) == before
    assert complete({}, nodes) == {}
