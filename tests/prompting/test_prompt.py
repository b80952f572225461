import json
import re

import numpy as np
import pytest
import tiny
import torch
from pictures import draw

from qwenvl.loading import devices
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.media.media import Video
from qwenvl.prompting.prompt import (
    PromptError,
    break_control_tokens,
    encode,
    require_question,
    seen_sizes,
    side_by_side,
    why_no_switch,
)
from qwenvl.request import LoadSpec, Request

CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
)
PICTURE = draw("circle", "red", "blue")


def ids_of(handle, text, system="", pictures=()):
    return encode(handle, Request(handle.spec, text, system), list(pictures), None).inputs["input_ids"][0].tolist()


def count(handle, ids, token):
    return ids.count(handle.tokenizer.convert_tokens_to_ids(token))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return load(LoadSpec("qwen3"), tiny.save("qwen3", tmp_path_factory.mktemp("m")), Machine("cpu", torch.float32, ""))


def test_plain_text_is_tokenized_exactly_as_the_template_and_processor_do(demo):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]},
    ]
    text = demo.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = demo.processor(text=[text], images=[PICTURE], return_tensors="pt")
    ours = encode(demo, Request(demo.spec, "Describe this image.", "Be brief."), [PICTURE], None).inputs
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[key].float(), expected[key].to(ours[key].dtype).float()) for key in expected)


def test_the_sizes_at_which_pictures_are_seen_are_those_of_their_patches(demo):
    pictures = [PICTURE.resize(size) for size in ((200, 100), (64, 130))]
    inputs = encode(demo, Request(demo.spec, "What is on these?"), pictures).inputs
    sizes = seen_sizes(inputs, 16)
    assert all(side % 32 == 0 for size in sizes for side in size)
    assert [width > height for width, height in sizes] == [True, False]
    patches = [width * height // 16**2 for width, height in sizes]
    assert sum(patches) == len(inputs["pixel_values"])
    assert seen_sizes(encode(demo, Request(demo.spec, "Nothing to see"), []).inputs, 16) == ()


@pytest.mark.parametrize("where", ["text", "system"])
def test_control_tokens_that_a_user_typed_are_text(demo, where):
    typed = "".join(CONTROL) + " and </think>"
    plain = {"text": "Describe this image.", "system": "Be brief."}
    ids = ids_of(demo, **plain, pictures=[PICTURE])
    broken = ids_of(demo, **{**plain, where: typed}, pictures=[PICTURE])
    for token in (*CONTROL, "</think>"):
        assert count(demo, broken, token) == count(demo, ids, token), token
    assert typed in demo.tokenizer.decode(broken), "not a character is lost or added"


def test_control_tokens_are_text_for_text_models_too(text_model):
    typed = "ends <|im_end|> here"
    ids = ids_of(text_model, typed)
    assert count(text_model, ids, "<|im_end|>") == count(text_model, ids_of(text_model, "x"), "<|im_end|>")
    assert typed in text_model.tokenizer.decode(ids)


def test_everything_as_long_as_the_prompt_stays_as_long_as_the_prompt(demo):
    inputs = encode(demo, Request(demo.spec, "<|im_end|>"), [PICTURE], None).inputs
    length = inputs["input_ids"].shape[1]
    assert inputs["attention_mask"].shape == (1, length)
    assert all(value.shape[1] == length for key, value in inputs.items() if key.endswith("token_type_ids"))


def test_each_control_token_is_broken_and_nothing_else():
    assert break_control_tokens("a <|im_end|> <|im_end|> b", ["<|im_end|>"]).replace("\ufdd0", "") == (
        "a <|im_end|> <|im_end|> b"
    )
    assert "<|im_end|>" not in break_control_tokens("<|im_end|>", ["<|im_end|>"])
    assert break_control_tokens("<|other|>", ["<|im_end|>"]) == "<|other|>"


def test_a_text_model_cannot_be_shown_a_picture(text_model):
    with pytest.raises(PromptError, match="text model and cannot see"):
        encode(text_model, Request(text_model.spec, "?"), [PICTURE], None)


def test_an_empty_question_is_an_error():
    spec = LoadSpec("any")
    with pytest.raises(PromptError, match="nothing to answer"):
        require_question(Request(spec, "  ", " "))
    things = ({"images": {"image1": PICTURE}}, {"video_path": "v"}, {"video": "v"}, {"video_frames": torch.zeros(2, 2)})
    for asked in (Request(spec, "?"), *(Request(spec, "", **thing) for thing in things)):
        require_question(asked)


def test_no_system_prompt_means_no_system_turn(demo):
    assert "system" not in demo.tokenizer.decode(ids_of(demo, "hi"))
    assert "system\nBe brief." in demo.tokenizer.decode(ids_of(demo, "hi", "Be brief."))


@pytest.mark.parametrize(("thinking", "end"), [("auto", ""), ("on", "<think>\n"), ("off", "<think>\n\n</think>\n\n")])
def test_thinking_is_switched_by_the_chat_template(demo, thinking, end):
    prompt = encode(demo, Request(demo.spec, "hi", thinking=thinking), [])
    assert demo.tokenizer.decode(prompt.inputs["input_ids"][0]).endswith(f"assistant\n{end}")
    assert prompt.thinks == (thinking == "on")


def test_a_template_without_a_switch_is_told_of_and_nothing_changes(text_model, monkeypatch):
    asked = {thinking: Request(text_model.spec, "hi", thinking=thinking) for thinking in ("auto", "on", "off")}
    assert why_no_switch(text_model, asked["on"]) is None
    plain = text_model.tokenizer.chat_template.replace("enable_thinking", "something_else")
    monkeypatch.setattr(text_model.tokenizer, "chat_template", plain)
    assert why_no_switch(text_model, asked["auto"]) is None
    assert "thinking 'off' has no effect" in why_no_switch(text_model, asked["off"])
    ids = [encode(text_model, entry, []).inputs["input_ids"].tolist() for entry in asked.values()]
    assert ids[0] == ids[1] == ids[2]


def tokens_of(handle, side, resolution):
    asked = Request(handle.spec, "?", image_resolution=resolution)
    prompt = encode(handle, asked, [draw("circle", "red", "blue", (side, side))])
    return count(handle, prompt.inputs["input_ids"][0].tolist(), "<|image_pad|>")


@pytest.mark.parametrize(
    ("resolution", "low", "high"),
    [
        ("low (256x28x28)", 128, 256),
        ("medium (512x28x28)", 256, 512),
        ("high (768x28x28)", 512, 768),
        ("ultra (1024x28x28)", 768, 1024),
    ],
)
def test_a_resolution_is_that_of_one_call(demo, resolution, low, high):
    size = {**dict(demo.processor.image_processor.size)}
    before = tokens_of(demo, 300, "auto")
    # A token of this family is 32 x 32 pixels.
    cells = (28 / 32) ** 2
    assert tokens_of(demo, 64, resolution) == pytest.approx(low * cells, rel=0.15)
    assert tokens_of(demo, 2000, resolution) == pytest.approx(high * cells, rel=0.15)
    assert dict(demo.processor.image_processor.size) == size
    assert tokens_of(demo, 300, "auto") == before


def test_original_leaves_a_picture_as_it_is(demo):
    assert tokens_of(demo, 64, "original") == 4
    assert tokens_of(demo, 1600, "original") == 50 * 50


def test_a_resolution_outranks_what_a_models_folder_sets(tmp_path):
    """Files of Qwen2.5-VL have min_pixels and max_pixels, which version 4 of transformers would prefer."""
    folder = tiny.save("qwen2_5_vl", tmp_path / "m")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings["size"]
    file.write_text(json.dumps(settings | {"min_pixels": 3136, "max_pixels": 12845056}))
    handle = load(LoadSpec("m"), folder, Machine("cpu", torch.float32, ""))
    before = tokens_of(handle, 2000, "auto")
    assert before == pytest.approx(1024 * (28 / 32) ** 2, rel=0.1)
    assert tokens_of(handle, 2000, "low (256x28x28)") == pytest.approx(256 * (28 / 32) ** 2, rel=0.1)
    assert tokens_of(handle, 64, "low (256x28x28)") == pytest.approx(128 * (28 / 32) ** 2, rel=0.15)
    assert tokens_of(handle, 2000, "auto") == before


def test_questions_side_by_side_are_padded_on_the_left_and_keep_their_pictures_in_order(demo):
    texts = ("Hi.", "What is there to see on this picture?")
    one, two = (encode(demo, Request(demo.spec, text), [PICTURE]) for text in texts)
    none = encode(demo, Request(demo.spec, "No picture"), [])
    both = side_by_side([one, none, two])
    lengths = [one.tokens, none.tokens, two.tokens]
    assert both["input_ids"].shape == both["attention_mask"].shape == (3, max(lengths))
    assert both["attention_mask"].sum(1).tolist() == lengths
    for row, prompt in enumerate((one, none, two)):
        assert both["input_ids"][row, -prompt.tokens :].tolist() == prompt.inputs["input_ids"][0].tolist()
    assert torch.equal(both["pixel_values"], torch.cat([one.inputs["pixel_values"], two.inputs["pixel_values"]]))
    assert both["image_grid_thw"].shape == (2, 3)
    alone = side_by_side([one])
    assert all(torch.equal(alone[key], value) for key, value in one.inputs.items())


def test_a_prompt_that_goes_on_has_more_text_and_the_same_pictures(demo):
    before = encode(demo, Request(demo.spec, "Hi.", thinking="on"), [PICTURE])
    after = before.continued([5, 6, 7])
    assert after.inputs["input_ids"][0].tolist() == [*before.inputs["input_ids"][0].tolist(), 5, 6, 7]
    assert after.tokens == before.tokens + 3 == after.inputs["attention_mask"].sum()
    assert (after.media, after.thinks) == (before.media, False)
    assert after.inputs["pixel_values"] is before.inputs["pixel_values"]
    kinds = [key for key in before.inputs if key.endswith("token_type_ids")]
    assert all(after.inputs[key][0, -3:].tolist() == [0, 0, 0] for key in kinds)


def test_each_video_has_its_own_times(tmp_path):
    handle = load(LoadSpec("m"), tiny.save("qwen2_5_vl", tmp_path / "m"), Machine("cpu", torch.float32, ""))
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    videos = [Video(frames, (0.0, 1.0, 2.0, 3.0), 4.0), Video(frames, (0.0, 5.0, 10.0, 15.0), 20.0)]
    inputs = encode(handle, Request(handle.spec, "?"), [], videos).inputs
    # Two frames are joined.
    assert inputs["second_per_grid_ts"].tolist() == [2.0, 10.0]
    assert len(inputs["video_grid_thw"]) == 2


def test_the_times_of_a_video_are_exact_in_half_precision(tmp_path):
    """Positions are computed from them."""
    handle = load(LoadSpec("m"), tiny.save("qwen2_5_vl", tmp_path / "m"), Machine("cpu", torch.bfloat16, ""))
    video = Video(np.zeros((6, 64, 64, 3), np.uint8), tuple(range(6)), 19.0)
    inputs = encode(handle, Request(handle.spec, "?"), [], [video]).inputs
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * 19 / 6], abs=1e-6)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16


def test_the_times_of_every_video_are_told_to_qwen3(demo):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    videos = [Video(frames, (0.0, 1.0, 2.0, 3.0), 4.0), Video(frames, (0.0, 5.0, 10.0, 15.0), 20.0)]
    text = demo.tokenizer.decode(encode(demo, Request(demo.spec, "?"), [], videos).inputs["input_ids"][0])
    assert re.findall(r"<([\d.]+) seconds>", text) == ["0.5", "2.5", "2.5", "12.5"]


def test_a_single_frame_is_a_video(demo):
    """Qwen's processors take no fewer than two."""
    video = Video(np.zeros((1, 64, 64, 3), np.uint8), (0.0,), 0.1)
    assert encode(demo, Request(LoadSpec("demo"), "?"), [], [video]).tokens > 4


def test_a_question_beyond_the_model_s_positions_is_refused_with_both_numbers(demo, monkeypatch):
    request = Request(LoadSpec("demo"), "word " * 10_000)
    with pytest.raises(PromptError, match=r"has 20,\d{3} tokens, and demo reads 8,192 at most"):
        encode(demo, request, [])
    text = demo.model.config.get_text_config()
    # As version 5 of transformers calls it, or version 4.
    name = "rope_parameters" if hasattr(text, "rope_parameters") else "rope_scaling"
    monkeypatch.setattr(text, name, {"factor": 4.0, "original_max_position_embeddings": 8192})
    assert encode(demo, request, []).tokens > 20_000, "YaRN has them stretched"


def test_a_cancel_is_heard_while_pictures_are_cut_into_patches(demo, monkeypatch):
    monkeypatch.setattr(devices, "LOOK_EVERY_S", -1.0)
    looks, asked = [], Request(demo.spec, "What is this?")

    def stop():
        looks.append(1)
        if len(looks) == most:
            raise KeyboardInterrupt

    most = -1
    encode(demo, asked, [PICTURE] * 4)  # the first time does more
    encode(demo, asked, [PICTURE] * 4, check=stop)
    often = len(looks)
    for most in range(1, often - 5, 10):
        looks.clear()
        with pytest.raises(KeyboardInterrupt):
            encode(demo, asked, [PICTURE] * 4, check=stop)
        assert len(looks) >= most
    assert most > 20, "the processor itself was looked at"
