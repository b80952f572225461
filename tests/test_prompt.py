import pytest
import tiny
import torch
from conftest import draw

from qwenvl.capabilities import Machine
from qwenvl.loader import load
from qwenvl.prompt import PromptError, break_control_tokens, encode, require_question
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
    for asked in (Request(spec, "?"), Request(spec, "", images={"image1": PICTURE}), Request(spec, "", video_path="v")):
        require_question(asked)


def test_no_system_prompt_means_no_system_turn(demo):
    assert "system" not in demo.tokenizer.decode(ids_of(demo, "hi"))
    assert "system\nBe brief." in demo.tokenizer.decode(ids_of(demo, "hi", "Be brief."))
