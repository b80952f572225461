import base64
import io

import av
import numpy as np
import pytest
import torch
from pictures import draw
from PIL import Image

from qwenvl.loading.loader import PICTURE_PIXELS
from qwenvl.media.media import Video
from qwenvl.models.engines import Engine
from qwenvl.remote import chat, kinds
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import MODELS_OWN

STUDIO = Engine("studio", "http://127.0.0.1:8000/v1", "Qwen/Qwen3-VL-4B-Instruct")


def request(text="Describe this image.", **changes):
    return Request(LoadSpec("studio @ engine"), text, **changes)


def content(part):
    """The bytes behind a part's data URL."""
    kind = part["type"]
    return base64.b64decode(part[kind]["url"].partition(";base64,")[2])


def picture(part):
    return Image.open(io.BytesIO(content(part)))


def film(count=4, seconds=8.0):
    frames = np.stack([np.full((64, 96, 3), 20 + 50 * number, np.uint8) for number in range(count)])
    return Video(frames, tuple(seconds * number / count for number in range(count)), seconds)


def parts(engine=STUDIO, pictures=(), videos=(), **changes):
    return list(chat.shown(engine, request(**changes), pictures, videos))


def test_a_picture_within_the_budget_arrives_as_it_is_to_the_last_bit():
    photo = Image.effect_noise((700, 500), 80).convert("RGB")
    (part,) = parts(pictures=[photo])
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    assert np.array_equal(picture(part), photo)


@pytest.mark.parametrize("size", [(1400, 900), (900, 1400), (640, 360), (300, 40), (48, 48), (20, 60), (257, 255)])
def test_a_scaled_picture_is_what_a_model_here_would_see(demo, size):
    """The engine's processor, whatever its own limits, then has nothing left to scale."""
    processor = demo.processor.image_processor
    limits = (processor.size["shortest_edge"], processor.size["longest_edge"])
    photo = Image.effect_noise((size[0] // 4 + 1, size[1] // 4 + 1), 80).convert("RGB").resize(size)
    sent = chat.scaled(photo, limits, 32)
    here = processor([photo], return_tensors="pt")
    wide = {"size": {"shortest_edge": 32 * 32, "longest_edge": 1 << 24}}
    there = processor([sent], return_tensors="pt", **wide)
    assert torch.equal(here["image_grid_thw"], there["image_grid_thw"])
    assert torch.equal(here["pixel_values"], there["pixel_values"])


def test_pictures_are_scaled_to_what_the_node_says_else_to_what_the_entry_says_else_as_here():
    huge = Image.new("RGB", (4000, 3000))
    own = Engine("small", STUDIO.base_url, "m", pixels=(4096, 65536))

    def pixels(engine, resolution="auto"):
        shown = picture(parts(engine, [huge], image_resolution=resolution)[0])
        return shown.width * shown.height

    assert 0.8 * PICTURE_PIXELS[1] < pixels(STUDIO) <= PICTURE_PIXELS[1]
    assert 0.8 * 65536 < pixels(own) <= 65536
    assert pixels(own, "low (256x28x28)") <= 256 * 28 * 28
    assert pixels(own, "low (256x28x28)") > 65536
    assert pixels(own, "original") == 4000 * 3000


def test_sides_are_rounded_to_the_patches_of_the_family():
    huge = Image.new("RGB", (4000, 3000))
    for family, factor in (("qwen2_5_vl", 28), ("qwen3_vl", 32), ("qwen2", 32), ("", 32)):
        (part,) = parts(Engine("e", STUDIO.base_url, "Qwen/Qwen2.5-VL-7B-Instruct", family=family), [huge])
        assert {side % factor for side in picture(part).size} == {0}


def test_pictures_come_before_the_frames_of_a_video_and_each_frame_after_its_time():
    shown = parts(pictures=[draw("circle", "red", "blue", (700, 500))], videos=[film()])
    kinds = [part["type"] for part in shown]
    assert kinds == ["image_url"] + ["text", "image_url"] * 4
    assert [part["text"] for part in shown[1::2]] == [f"<{time} seconds>" for time in ("0.0", "2.0", "4.0", "6.0")]
    assert [np.asarray(picture(part))[0, 0, 0] for part in shown[2::2]] == [20, 70, 120, 170]


def test_an_engine_that_takes_videos_gets_one_file_with_the_same_frames_at_their_pace():
    (part,) = parts(Engine("e", STUDIO.base_url, "m", video_url=True), videos=[film()])
    assert part["video_url"]["url"].startswith("data:video/mp4;base64,")
    with av.open(io.BytesIO(content(part))) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
    assert [round(frame.time, 3) for frame in frames] == [0, 2, 4, 6]
    shades = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    assert shades == pytest.approx([20, 70, 120, 170], abs=3)


@pytest.mark.parametrize("times_s", [(0.0, 0.5, 20.0, 21.0), (0.0, 0.033, 0.067, 0.1), (0.4, 1.4, 2.4)])
def test_the_file_shows_each_frame_at_its_time(times_s):
    """As those of films with a variable rate are not evenly spread."""
    video = Video(film().frames[: len(times_s)], times_s, times_s[-1] + 1)
    (part,) = parts(Engine("e", STUDIO.base_url, "m", video_url=True), videos=[video])
    with av.open(io.BytesIO(content(part))) as container:
        seen = [(frame.time, frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert [time for time, _ in seen] == pytest.approx(times_s, abs=0.001)
    assert [shade for _, shade in seen] == pytest.approx([20, 70, 120, 170][: len(times_s)], abs=3)


def test_the_body_of_a_drawn_answer_holds_every_parameter_under_the_name_that_engines_know():
    own = Sampling(
        temperature=0.9, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.1, max_new_tokens=33, presence_penalty=0.5,
        frequency_penalty=0.25, min_new_tokens=3, stop=("END",), thinking_budget=100,
    )  # fmt: skip
    asked = request(system="Be brief.", sampling=own, thinking="off")
    assert chat.body(STUDIO, asked, 11, []) == {
        "model": "Qwen/Qwen3-VL-4B-Instruct",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Describe this image."},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "repeat_penalty": 1.1,
        "max_tokens": 133,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 3,
        "stop": ["END"],
        "thinking_token_budget": 100,
        "thinking_budget_tokens": 100,
        "seed": 11,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_filters_that_are_off_are_sent_as_off_or_the_engine_would_use_the_defaults_of_the_models_makers():
    off = chat.body(STUDIO, request(sampling=Sampling(top_p=1, top_k=0)), 1, [])
    assert (off["top_p"], off["top_k"], off["min_p"], off["repetition_penalty"]) == (1, -1, 0, 1)
    greedy = chat.body(STUDIO, request(sampling=Sampling(do_sample=False, temperature=0.7, top_k=5)), None, [])
    assert (greedy["temperature"], greedy["top_k"]) == (0, -1)
    assert "seed" not in greedy
    assert "stop" not in greedy
    assert "chat_template_kwargs" not in greedy


def test_a_seed_fits_into_what_engines_hold():
    assert chat.body(STUDIO, request(), 2**64 - 1, [])["seed"] == 2**63 - 1
    assert chat.body(STUDIO, request(), 0, [])["seed"] == 0


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<think>", "</think>", "<tool_call>"])
def test_no_control_token_of_the_text_reaches_the_engine_whole(demo, token):
    asked = request(f"a {token} b", system=f"c {token} d")
    messages = chat.body(STUDIO, asked, None, [])["messages"]
    for message, written in zip(messages, (f"c {token} d", f"a {token} b"), strict=True):
        assert token not in message["content"]
        assert message["content"].replace("\u200b", "") == written, "nothing but a space of no width was added"
        ids = demo.tokenizer.encode(message["content"], add_special_tokens=False)
        assert not set(ids) & set(demo.tokenizer.get_added_vocab().values())


def test_what_only_looks_like_a_control_token_stays_as_it_is():
    for text in ("a <b> c", "1 <| 2", "<|>", "<thinking>", "if a<|b| > c"):
        assert chat.plain(text) == text


def test_what_was_asked_for_and_cannot_be_had_is_said_in_one_sentence_each():
    spec = LoadSpec("studio @ engine", "4bit", "eager", "cuda:1")
    asked = Request(spec, "x", sampling=Sampling(no_repeat_ngram_size=3, min_p=0.1), thinking="on")
    body = chat.body(STUDIO, asked, 1, [])
    sentences = chat.without_effect(asked, body, {"min_p", "chat_template_kwargs", "repetition_penalty"})
    assert len(sentences) == 3
    assert "quantization, attention_mode and device have no effect" in sentences[0]
    assert sentences[1] == "the engine does not know min_p, thinking"
    assert "no_repeat_ngram_size" in sentences[2]


def test_a_thinking_budget_is_sent_and_not_promised():
    asked = request(sampling=Sampling(thinking_budget=100, max_new_tokens=10))
    body = chat.body(STUDIO, asked, 1, [])
    assert (body["thinking_token_budget"], body["max_tokens"]) == (100, 110)
    (sentence,) = chat.without_effect(asked, body, set(), "vLLM")
    assert "the engine's to keep" in sentence
    names = {"thinking_token_budget", "thinking_budget_tokens"}
    assert chat.without_effect(asked, body, names, "vLLM") == ["the engine does not know thinking_budget"]
    assert chat.without_effect(asked, body, set(), "SGLang") == ["SGLang ignores thinking_budget"]
    # It may know the field by its other name.
    for name in names:
        assert not any("does not know" in entry for entry in chat.without_effect(asked, body, {name}))


@pytest.mark.parametrize("spec", [("none", "sdpa", "cuda:0"), ("8bit", "sdpa", "auto"), ("none", "eager", "auto")])
def test_any_of_the_three_that_is_set_is_told_of(spec):
    asked = Request(LoadSpec("studio @ engine", *spec), "x")
    (sentence,) = chat.without_effect(asked, chat.body(STUDIO, asked, 1, []), set(), "vLLM")
    assert "device" in sentence


ODD = Sampling(min_p=0.1, repetition_penalty=1.2, min_new_tokens=5)


@pytest.mark.parametrize(
    ("kind", "sentences"),
    [
        ("vLLM", []),
        ("SGLang", []),
        ("llama.cpp", ["llama.cpp ignores min_new_tokens"]),
        ("LM Studio", ["LM Studio ignores min_p, min_new_tokens, thinking"]),
        ("Ollama", ["Ollama ignores top_k, min_p, repetition_penalty, min_new_tokens, thinking"]),
        ("", ["the engine does not say what kind it is, and may ignore top_k, min_p, repetition_penalty, "
              "min_new_tokens, thinking"]),
    ],
)  # fmt: skip
def test_what_an_engine_passes_over_without_a_word_is_named(kind, sentences):
    asked = request(sampling=ODD, thinking="off")
    body = chat.body(STUDIO, asked, 1, [])
    assert chat.without_effect(asked, body, set(), kind) == sentences


def test_an_engine_that_says_what_it_does_not_know_passes_over_nothing():
    asked = request(sampling=ODD)
    body = chat.body(STUDIO, asked, 1, [])
    assert chat.doubtful(body, {"min_p"}) == []
    assert chat.without_effect(asked, body, {"min_p"}) == ["the engine does not know min_p"]
    # That it fails on these says nothing of the others.
    assert chat.doubtful(body, {"stop", "stream_options"}) == ["top_k", "min_p", "repetition_penalty", "min_tokens"]


def test_what_is_off_is_missed_nowhere():
    asked = request(sampling=Sampling(do_sample=False))
    assert chat.without_effect(asked, chat.body(STUDIO, asked, None, []), set(), "Ollama") == []


def test_each_kind_ignores_fields_that_there_are():
    assert set().union(*kinds.IGNORES.values()) <= kinds.DOUBTFUL <= set(chat.FIELDS)
    assert set(chat.ALSO) <= set(chat.FIELDS)
    assert set(chat.ALSO.values()) <= chat.MAY_DROP


def test_the_models_own_sampling_is_left_to_the_engine():
    own = Sampling(do_sample=False, presence_penalty=0.5, max_new_tokens=9)
    asked = request(sampling_from=MODELS_OWN, sampling=own)
    body = chat.body(STUDIO, asked, 7, [])
    assert not {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} & set(body)
    assert (body["presence_penalty"], body["max_tokens"], body["seed"]) == (0.5, 9, 7)
    (sentence,) = chat.without_effect(asked, body, set())
    assert "engine's own" in sentence


def test_nothing_is_said_where_nothing_was_lost():
    asked = request()
    body = chat.body(STUDIO, asked, 1, [])
    assert chat.without_effect(asked, body, {"min_p", "repetition_penalty", "stream_options"}) == []
