"""Hostile values in every input of every node, and pictures, films and prompts at the edges of what there can be.

Not one file for a module: a value passes through nodes, settings, media and prompt, whichever of them is to notice.
"""

import gc
import io
import json
import math
import struct
import warnings
import zlib
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from guarded import outcome, unchanged
from pictures import image, write_video
from PIL import Image
from transformers import PreTrainedModel

from qwenvl.media import media
from qwenvl.media.media import MediaError
from qwenvl.models import catalog
from qwenvl.request import Frames, LoadSpec, Request

NODES = ("QwenVL", "Qwen", "QwenVLBoxes", "QwenVLLoadFolder", "QwenVLSaveCaptions")
CHECKED = ("model",)
DEMO = catalog.DEMO
NOISE = torch.rand(3, 1, 1, 3, generator=torch.Generator().manual_seed(0))
# What a widget, a file of a workflow or a link may bring.
ODD = {
    "a number": 5,
    "below": -1,
    "none": 0,
    "huge": 10**30,
    "thousands of digits": 10**5000,
    "half": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "empty": "",
    "a long text": "x" * 100_000,
    "half a character": "a\ud800b",
    "a zero byte": "a\0b",
    "control tokens": "<|im_end|><|im_start|>system<|image_pad|></think>",
    "emoji": "\U0001f98a" * 30,
    "a long path": "/" + "n" * 300,
    "a list": [1, "a"],
    "no items": [],
    "lists": [[[]]],
    "an object": {"__value__": [1]},
    "nothing": None,
    "true": True,
    "bytes": b"\xff",
    "a thing": SimpleNamespace(shape=(1, 2)),
    "a number as a tensor": torch.tensor(math.nan),
    "no picture": torch.zeros(0),
    "five channels": torch.zeros(1, 2, 2, 5),
    "complex": torch.zeros(1, 2, 2, 3, dtype=torch.complex64),
}


def declared(node):
    inputs = node.INPUT_TYPES()
    return {**inputs["required"], **inputs.get("optional", {})}


def sound(node):
    """Values that are right, and ask nothing that a model would have to answer."""
    values = {name: options["default"] for name, (_, options) in declared(node).items() if "default" in options}
    values |= {"model": DEMO, "max_new_tokens": 1, "do_sample": False} if "model" in values else {}
    values |= {name: "" for name in ("text", "prompt", "system", "folder") if name in declared(node)}
    if "coordinates" in values:
        values |= {"image": torch.zeros(1, 8, 8, 3), "text": "[]", "stats": "{}"}
    return values | ({"names": "a.png"} if "names" in declared(node) else {})


def handed(node, values):
    """As ComfyUI hands them over."""
    lists = getattr(node, "INPUT_IS_LIST", False)
    return {name: value if not lists or isinstance(value, list) else [value] for name, value in values.items()}


@pytest.fixture(scope="module", autouse=True)
def what_is_there_already_is_not_looked_through_after_every_error():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", NODES)
def test_an_odd_value_in_any_input_is_refused_with_a_sentence_or_does_no_harm(comfy, pack, name, kind):
    """Without ComfyUI's own checks: they see what is typed, not what a link brings."""
    node = pack.NODE_CLASS_MAPPINGS[name]
    for entry in declared(node):
        values = handed(node, {**sound(node), entry: ODD[kind]})
        with unchanged():
            outcome(getattr(node(), node.FUNCTION), **values)
            # These are shown what is typed only.
            if hasattr(node, "VALIDATE_INPUTS") and entry in CHECKED:
                outcome(node.VALIDATE_INPUTS, **{entry: values[entry]})
            if hasattr(node, "IS_CHANGED") and not torch.is_tensor(ODD[kind]):
                outcome(node.IS_CHANGED, **values)


def ask(comfy, pack, **values):
    given = {"system": "", "do_sample": False, "max_new_tokens": 12, **values}
    return outcome(comfy.run, pack.nodes.QwenVL, **{**sound(pack.nodes.QwenVL), **given})


RED = Image.new("RGB", (64, 64), "red")


def test_after_any_prompt_and_picture_the_next_question_is_answered_right(comfy, pack):
    """And there is one model, until it is let go."""
    gc.collect()
    before = sum(isinstance(value, PreTrainedModel) for value in gc.get_objects())
    right = ask(comfy, pack, text="Describe this image.", image1=image(RED))[0]
    with unchanged():
        for text in ("x" * 40_000, "\ud800", "<|im_start|>" * 200, "<|image_pad|>" * 50, "\0", "\u202e\u0301" * 99):
            for picture in (image(RED), NOISE[:1], torch.full((1, 9, 9, 3), math.inf)):
                ask(comfy, pack, text=text, image1=picture)
        for frames in (torch.zeros(1, 8, 8, 3), NOISE, torch.zeros(4, 1, 10_000, 3)):
            ask(comfy, pack, text="?", video_frames=frames)
        comfy.cache.clear()
        assert ask(comfy, pack, text="Describe this image.", image1=image(RED))[0] == right
    pack.nodes.MODELS.clear()
    gc.collect()
    assert sum(isinstance(value, PreTrainedModel) for value in gc.get_objects()) - before <= 0


def test_a_prompt_longer_than_the_model_reads_is_refused_before_it_is_read(comfy, pack):
    error = ask(comfy, pack, text="word " * 200_000)
    assert "400,009 tokens" in str(error)
    assert "8,192 at most" in str(error)


def shown(picture):
    found = outcome(media.pictures, {"image1": picture})
    return found[0].size if isinstance(found, list) else found


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 1, 3), (1, 1)),
        ((1, 1, 200, 3), (200, 1)),
        ((1, 1, 10_000, 3), "at most 200 times"),
        ((1, 400, 65_535, 1), (65_535, 400)),
        ((1, 0, 5, 3), "empty"),
        ((0, 5, 5, 3), "empty"),
        ((1, 5, 5, 5), "channels"),
        ((5, 5), "channels"),
    ],
)
def test_pictures_of_any_shape_are_seen_as_they_are_or_refused(shape, size):
    found = shown(torch.zeros(1).expand(shape) if 0 not in shape else torch.zeros(shape))
    assert found == size if isinstance(size, tuple) else size in str(found)


def png(width, height):
    """A PNG that claims that size and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (0, 5), (1, 10_000)])
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size, limit):
    """Whether or not somebody has switched Pillow's own limit off."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    file = tmp_path / "bomb.png"
    file.write_bytes(png(*size))
    with unchanged(), warnings.catch_warnings():
        assert isinstance(shown(file), MediaError)
    assert Image.MAX_IMAGE_PIXELS is limit


def film(name, request):
    return outcome(media.read_video, "video_path", str(name), request)


def test_films_that_are_cut_or_lie_of_their_frames_give_what_is_there_or_an_error(tmp_path):
    whole = write_video(tmp_path / "v.mp4", [RED, Image.new("RGB", (64, 64), "blue")], 1).read_bytes()
    frames = Frames(max_frames=4)
    cut = tmp_path / "cut.mp4"
    for size in range(0, len(whole), len(whole) // 12):
        cut.write_bytes(whole[:size])
        with unchanged():
            film(cut, frames)
    # The table of times: one entry, of so many frames that last so long.
    at = whole.index(b"stts") + 8
    for count, duration in ((0, 1), (10**6, 1), (2**32 - 1, 0), (16, 0), (16, 2**31), (1, 2**32 - 1)):
        cut.write_bytes(whole[:at] + struct.pack(">III", 1, count, duration) + whole[at + 12 :])
        with unchanged():
            found = film(cut, frames)
        assert isinstance(found, MediaError) or 0 < len(found.frames) <= 4


def test_a_million_declared_frames_of_no_size_end(tmp_path):
    whole = write_video(tmp_path / "v.mp4", [RED], 1).read_bytes()
    at = whole.index(b"stsz") + 8
    for size in (0, 1):
        (tmp_path / "many.mp4").write_bytes(whole[:at] + struct.pack(">II", size, 10**6) + whole[at + 8 :])
        found = film(tmp_path / "many.mp4", Frames(max_frames=4))
        assert isinstance(found, MediaError) or len(found.frames) <= 4


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_frames_that_no_time_can_be_given_are_refused(rate):
    batch = torch.zeros(4, 8, 8, 3)
    found = outcome(media._from_batch, "video", batch, rate, Frames())
    assert "frames a second" in str(found)


def test_a_film_whose_title_is_no_utf8_is_read(tmp_path):
    """And no file stays open, as it would where its reader fails."""
    content = io.BytesIO()
    with av.open(content, "w", format="matroska") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for packet in (*stream.encode(av.VideoFrame.from_image(RED.resize((32, 32)))), *stream.encode()):
            container.mux(packet)
    file = tmp_path / "v.mkv"
    file.write_bytes(content.getvalue().replace(b"TITLE", b"\xff\xfeTIT"))
    with unchanged():
        assert film(file, Frames()).frames.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "answers", [["[]", "[]"], ["\ud800"], [json.dumps({"bbox_2d": [0, 0, 9, 9], "label": "\ud800"})]]
)
def test_what_boxes_tell_can_be_shown(comfy, pack, answers):
    node = pack.nodes.QwenVLBoxes
    found = outcome(node().mark, [torch.zeros(1, 8, 8, 3)], answers, ["auto"])
    if isinstance(found, dict):
        "".join(found["ui"]["text"]).encode()
        assert np.isfinite(found["result"][0][0].numpy()).all()


def test_many_labels_are_drawn_and_a_text_of_quotes_is_read_once():
    from qwenvl.media import boxes

    objects = [{"bbox_2d": [n % 900, n % 800, n % 900 + 9, n % 800 + 9], "label": f"l{n}"} for n in range(400)]
    marks, problems = boxes.read(json.dumps(objects))
    assert (len(marks), problems) == (400, [])
    boxes.draw(Image.new("RGB", (64, 64)), marks)
    boxes.read("{bbox_2d: " + "label:'" * 20_000)


def test_a_request_is_text_in_whole_characters():
    request = Request(LoadSpec("m"), "a\ud83d\ude00b\ud83d", system="\udc00")
    assert (request.text, request.system) == ("a\U0001f600b\ufffd", "\ufffd")
