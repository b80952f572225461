"""Functions that take any bytes: what benchmarks/fuzz.py feeds by the million, and the property tests by the hundred.

Each hands its bytes to one of our readers, as a file, a text or a stream. Allowed is an answer, or one of our own
errors with a sentence; anything else escapes, and so is a finding. A target leaves the process as it found it.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageFile

from qwenvl import boxes, budget, checkpoint, custom, discovery, download, engines, media, presets, refusals, remote
from qwenvl.log import log
from qwenvl.reply import DONE, Reply, event_of, stream_data
from qwenvl.request import Frames, LoadSpec, Request, Sampling

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
ENGINE = engines.Engine("studio", "http://127.0.0.1:8000/v1", "m")
# A message is read by people.
LONGEST_MESSAGE = 4000


def outcome(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What the call returns, or the error of ours that it raises. Any other error escapes."""
    try:
        return call(*given, **named)
    except (ValueError, RuntimeError) as error:
        if "qwenvl" not in type(error).__module__:
            raise
        message = str(error)
        assert len(message.split()) > 3, f"no sentence: {message!r}"
        assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
        return error


# Deeper than any reader follows, and longer than Python takes a number: what the fuzzer's inputs are too short for.
DEEP = (b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b"- " * 2000, b'{"bbox_2d": ' + b"[" * 3000)


@contextmanager
def unchanged() -> Iterator[None]:
    """A block that leaves what belongs to the whole process as it was, and no file open."""
    before = _globals()
    yield
    after = _globals()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"changed: {', '.join(changed)}"


def _globals() -> dict[str, Any]:
    return {
        # As it is kept: decoding all of it would take as long as most of the readers.
        "environment": dict(os.environ._data),
        "working directory": os.getcwd(),  # noqa: PTH109 (faster)
        "open files": len(os.listdir("/proc/self/fd")) if os.name == "posix" else 0,  # noqa: PTH208
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "torch's settings": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "Pillow's limits": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        "log level": log.logger.level,
    }


@dataclass(frozen=True)
class Target:
    """A reader under attack, files that it takes, and words that its kind of file is made of."""

    name: str
    attack: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[str, ...] = ()

    def __call__(self, data: bytes) -> None:
        with unchanged():
            self.attack(data)


@cache
def _folder(name: str) -> Path:
    """One for each target and process, with the small files of the demo model in it."""
    in_memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"qwenvl-{name}-", dir=in_memory if in_memory.is_dir() else None))
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _written(target: str, name: str, data: bytes) -> Path:
    file = _folder(target) / name
    file.write_bytes(data)
    return file


def _custom_models(data: bytes) -> None:
    file = _written("custom", "custom_models.json", data)
    custom._read.cache_clear()
    for model in outcome(custom.custom_models, file):
        assert model.repo_id or model.folder
        if model.folder:
            outcome(discovery.describe, model.folder)
            outcome(download.why_incomplete, model.folder)


def _engines(data: bytes) -> None:
    file = _written("engines", "custom_models.json", b'{"engines": {"studio": ' + data + b"}}")
    engines._read.cache_clear()
    for engine in outcome(engines.read_engines, file):
        assert 0 < engine.timeout_s < float("inf")
        assert engine.place


def _presets(data: bytes) -> None:
    """The first byte chooses the kind of file."""
    suffix = presets._SUFFIXES[data[0] % len(presets._SUFFIXES)] if data else ".txt"
    file = _written("presets", f"a{suffix}", data[1:])
    presets._parsed.cache_clear()
    presets._told.clear()
    for _, preset in presets._in_folder(file.parent):
        preset.fill("You see.", "a cat")
    file.unlink()


def _boxes(data: bytes) -> None:
    marks, problems = outcome(boxes.read, data.decode("utf-8", "surrogateescape"))
    placed, outside = boxes.place(marks, (1000, 1000), (64, 48))
    assert len(placed) + len(outside) == len(marks)
    for line in (*problems, *outside, *(mark.label for mark in placed)):
        line.encode()
    for box in boxes.as_bounding_boxes(placed):
        assert 0 <= box["x"] < box["x"] + box["width"] <= 64
        assert 0 <= box["y"] < box["y"] + box["height"] <= 48
    if len(placed) <= 5:
        assert boxes.draw(Image.new("RGB", (64, 48)), placed).size == (64, 48)
        assert boxes.mask((64, 48), placed).size == (64, 48)


def _config(data: bytes) -> None:
    folder = _written("config", "config.json", data).parent
    outcome(checkpoint.read_checkpoint, folder)
    need = outcome(budget.request_bytes, folder, torch.bfloat16, 4096, 512)
    assert isinstance(need, Exception) or need >= 0


def _small_files(data: bytes) -> None:
    """What stands beside config.json: the first byte chooses which."""
    names = ("generation_config.json", "tokenizer_config.json", "chat_template.json", "model.safetensors.index.json")
    folder = _folder("small")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / names[data[0] % len(names)]).write_bytes(data[1:]) if data else None
    found = outcome(checkpoint.read_checkpoint, folder)
    if isinstance(found, checkpoint.Checkpoint):
        outcome(Sampling().with_own, found.sampling)
    outcome(download.why_incomplete, folder)
    outcome(checkpoint.why_too_old, "qwen3_5", data[:20].decode("latin-1"))


def _weights(data: bytes) -> None:
    folder = _written("weights", "model.safetensors", data).parent
    reason = outcome(download.why_incomplete, folder)
    if reason is not None:
        assert len(reason.split()) > 3
        return
    for quantization in ("none", "4bit"):
        size = outcome(budget.model_bytes, folder, torch.bfloat16, quantization)
        assert isinstance(size, Exception) or size >= 0


def _stream(data: bytes) -> None:
    """An engine's answer in blocks: the first byte says how long they are."""
    size = 1 + data[0] if data else 1
    blocks = [data[start : start + size] for start in range(1, len(data), size)]
    reply = outcome(_heard, blocks)
    if isinstance(reply, Reply):
        writer = remote.Writer(ENGINE, Request(LoadSpec("m"), "?", sampling=Sampling(stop=("END",))))
        writer.reply = reply
        for answer in (writer.so_far, writer.end()):
            json.dumps([answer and [answer.text, answer.thinking], writer.tokens, reply.cached], ensure_ascii=False)
            if answer:
                f"{answer.text}{answer.thinking}".encode()


def _heard(blocks: Sequence[bytes]) -> Reply | Exception:
    """As wire.py does it, without the wire."""
    reply = Reply(0.0)

    async def arriving() -> Any:
        for block in blocks:
            yield block

    async def work() -> Reply | Exception:
        async for data in stream_data(arriving()):
            event = event_of(data)
            if data == DONE:
                break
            if event is None:
                return refusals.garbage(ENGINE, data)
            if event.get("error"):
                return refusals.refused(ENGINE, refusals.status_in(event), refusals.words(data))
            reply.take(event)
        return reply

    work_ = work()
    # No real loop: nothing in it waits, and a loop for each stream would cost more than the reading.
    try:
        work_.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the reader waits")


def _refusal(data: bytes) -> None:
    """Words of an engine that refuses; the first byte stands for its status."""
    words = refusals.words(data[1:].decode(errors="replace"))
    words.encode()
    assert len(words) <= refusals._LONGEST_WORDS + 4
    refusals.unknown_fields(words, {"top_k", "stop"})
    error = refusals.refused(ENGINE, 400 + data[0] if data else 500, words)
    assert len(str(error)) < LONGEST_MESSAGE


def _picture(data: bytes) -> None:
    file = _written("picture", "a.png", data)
    found = outcome(media.pictures, {"image1": file})
    if isinstance(found, list):
        assert [picture.mode for picture in found] == ["RGB"]


def _tensor(data: bytes) -> None:
    """The bytes are a shape, a type and values."""
    types = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64)
    head, values = data[:6], data[6:]
    shape = [each % 9 for each in head[1 : 1 + (head[0] % 6 if head else 0)]]
    dtype = types[head[5] % len(types)] if len(head) > 5 else torch.float32
    count = int(np.prod(shape))
    bits = torch.frombuffer(
        bytearray((values * (8 * count // max(1, len(values)) + 1))[: 8 * count] or b"\0" * 8), dtype=torch.uint8
    )
    numbers = bits.view(torch.float16).float() if dtype.is_floating_point or dtype.is_complex else bits
    image = numbers[:count].reshape(shape).to(dtype) if len(numbers) >= count else torch.zeros(shape, dtype=dtype)
    found = outcome(media.pictures, {"image1": image})
    assert isinstance(found, Exception) or {picture.mode for picture in found} == {"RGB"}
    request = Request(LoadSpec("m"), "?", video_frames=image, frames=Frames(max_frames=4))
    shown = outcome(media.videos, request)
    assert isinstance(shown, Exception) or all(video.frames.shape[3] == 3 for video in shown)


def _video(data: bytes) -> None:
    file = _written("video", "a.mp4", data)
    video = outcome(media.read_video, "video_path", str(file), Frames(max_frames=4))
    if not isinstance(video, Exception):
        assert len(video.frames) == len(video.times_s) <= 4


def _settings(data: bytes) -> None:
    """Values of settings, as JSON: what a workflow may hold."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return
    for kind in (Sampling, Frames, LoadSpec, Request):
        fields = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        needed = {LoadSpec: {"model": "m"}, Request: {"load": LoadSpec("m"), "text": "?"}}.get(kind, {})
        made = outcome(kind, **{**needed, **{name: value for name, value in fields.items() if name != "load"}})
        if isinstance(made, Sampling):
            str(made)
    outcome(Sampling().with_own, values)


def _json_seeds(*documents: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document).encode() for document in documents]


def _prefixed(seeds: Callable[[], list[bytes]], count: int) -> Callable[[], list[bytes]]:
    return lambda: [bytes([first]) + seed for seed in seeds() for first in range(count)]


def _demo_file(name: str) -> Any:
    return json.loads((DEMO / name).read_text())


def _yaml_seeds() -> list[bytes]:
    texts = (
        "system: You tag.\ntext: |\n  List {text}\n",
        "text: &a [1, 2]\nsystem: *a\n",
        "text: !!bool x\n",
        "text: 'a'\n<<: {system: b}\n",
        'text: "\\ud800"\n',
        "text: 2020-99-99",
        "- a",
        "? [a]\n: b",
        "text: !!timestamp x",
    )
    return [text.encode() for text in texts]


def _box_seeds() -> list[bytes]:
    whole = [{"bbox_2d": [10, 20, 500, 600], "label": "a cat"}, {"point_2d": [5, 5], "text_content": "eye"}]
    texts = (
        json.dumps(whole),
        f"Here:\n```json\n{json.dumps(whole)[:-20]}",
        "{'bbox_2d': [1, 2, 3, 4], 'label': 'x', }",
        json.dumps({"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "\ud800"}),
        '{"bbox_2d": [1e999, NaN, -Infinity, true], "label": "x"}',
    )
    return [text.encode() for text in texts]


def _weight_file(header: Any, data: bytes = b"\0" * 8) -> bytes:
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data


def _weight_seeds() -> list[bytes]:
    tensor = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    whole = _weight_file({"a.weight": tensor, "__metadata__": {"format": "pt"}})
    odd = ({"shape": "a"}, {"dtype": []}, {"data_offsets": []}, {"data_offsets": [0, "8"]}, {"shape": [-1, None]})
    return [
        *(whole, whole[:20], b"", b"\0" * 8, b"\xff" * 20, _weight_file([]), _weight_file({"a": 1}), _weight_file({})),
        *(_weight_file({"a.weight": {**tensor, **each}}) for each in odd),
    ]


def _stream_seeds() -> list[bytes]:
    def event(**delta: Any) -> str:
        return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}) + "\n\n"

    end = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}}\n'
    texts = (
        event(role="assistant") + event(content="Hel") + event(content="lo") + end,
        event(reasoning_content="hm") + event(content="yes") + usage + end,
        event(content="<think>a</think>b END c") + end,
        event(content="\ud83d") + event(content="\ude00") + end,
        'data: {"error": {"message": "full", "code": 503}}\n\n',
        ": ping\r\nid: 1\r\ndata:{}\r\n\r\n",
        'data: {"choices": [{"delta": {"content": 5}}]}\n',
    )
    return [bytes([size]) + text.encode() for text in texts for size in (6, 255)]


def _refusal_seeds() -> list[bytes]:
    bodies = (
        {"error": {"message": "unknown field top_k", "param": "top_k"}},
        {"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]},
        {"message": "context length exceeded"},
    )
    texts = [json.dumps(body) for body in bodies] + ["<html><b>502</b></html>"]
    return [b"\0" + text.encode() for text in texts]


def _picture_seeds() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 4), np.uint8)
    seeds = []
    for kind, mode in (
        *(("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGBA")),
        *(
            ("GIF", "P"),
            ("BMP", "RGB"),
            ("TIFF", "RGB"),
            ("TIFF", "F"),
            ("PPM", "RGB"),
            ("ICO", "RGBA"),
            ("TGA", "RGB"),
        ),
    ):
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(noise[..., 0] if mode in ("I;16", "F") else noise[..., :3]).convert(mode)
        picture.save(file, kind, **({"exif": exif} if kind in ("JPEG", "WEBP") else {}))
        seeds.append(file.getvalue())
    return [*seeds, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b""]


def _video_seeds() -> list[bytes]:
    seeds = []
    for kind, codec in (
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mjpeg"),
        ("mpegts", "mpeg2video"),
        ("gif", "gif"),
    ):
        file = io.BytesIO()
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=8)
            pixels = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
            stream.width, stream.height, stream.pix_fmt = 32, 16, pixels
            for shade in (0, 90, 200):
                container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 16), (shade, 9, 9)))))
            container.mux(stream.encode())
        seeds.append(file.getvalue())
    return [*seeds, b"#EXTM3U\n#EXTINF:1,\na.ts\n", b""]


_CUSTOM = (
    {
        "hf_models": {
            "A": {"repo_id": "a/b"},
            "B": {"path": "/data/b", "default": True, "vram_requirement": {"full": 5}},
        }
    },
    {"models": {"x": {"path": "/a\0b"}, "y": {"path": "/\ud800"}, "z": {"repo_id": "a/" + "b" * 300}}, "odd": 1},
    {"hf_vl_models": {"n": {"path": "/" + "n" * 300}, "m": 5}, "_comment": [], "engines": {}},
)
_ENGINE = (
    {"base_url": "http://127.0.0.1:8000/v1", "model": "m", "api_key_env": "KEY", "timeout_s": 5, "pixels": [1, 2]},
    {"base_url": "https://u:p@h/v1?x#y", "model": "m", "max_concurrency": 3, "vision": False, "video_url": True},
    {"base_url": "http://[::1]:99999/v1", "model": ""},
)
_SETTINGS = (
    {"temperature": 0.7, "top_k": 50, "seed": -1, "do_sample": True, "stop": ["a"], "quantization": "4bit"},
    {"temperature": float("nan"), "top_k": 5.5, "seed": 10**30, "max_new_tokens": None, "top_p": [1], "min_p": True},
    {"fps": 0, "max_frames": float("inf"), "sample_fps": "1", "device": 5, "thinking": [], "image_mode": {}},
    {"text": "a", "system": "\ud800", "release": "after the node", "temperature": float("-inf")},
)
_NAMES = tuple({**Sampling.__dataclass_fields__, **Frames.__dataclass_fields__, **LoadSpec.__dataclass_fields__})

TARGETS = {
    target.name: target
    for target in (
        Target("custom_models", _custom_models, _json_seeds(*_CUSTOM), (*custom.MODEL_KEYS, *custom._ENTRY, "\\u0000")),
        Target("engines", _engines, _json_seeds(*_ENGINE), tuple(engines._SETTINGS)),
        Target(
            "presets", _presets, _prefixed(_yaml_seeds, 3), ("text", "system", "!!int", "!!float", "<<", "&a", "*a")
        ),
        Target("boxes", _boxes, _box_seeds, ("bbox_2d", "point_2d", "label", "NaN", "Infinity", "\\ud800")),
        Target("config", _config, _json_seeds(_demo_file("config.json"), {"model_type": "qwen3", "num_experts": 5})),
        Target(
            "small_files",
            _small_files,
            _prefixed(
                _json_seeds(
                    {"temperature": 0.7, "top_k": 20, "top_p": float("nan"), "do_sample": 1, "min_p": True},
                    {"chat_template": [{"name": [], "template": "add_generation_prompt<think>"}]},
                    {"weight_map": {"a": "model.safetensors", "b": "../x", "c": 5}},
                ),
                4,
            ),
        ),
        Target("weights", _weights, _weight_seeds, ("data_offsets", "shape", "dtype", "__metadata__", "F8_E4M3")),
        Target("stream", _stream, _stream_seeds, ("data: ", "choices", "delta", "content", "finish_reason", "\\ud83d")),
        Target("refusal", _refusal, _refusal_seeds, ("error", "message", "detail", "loc", "param")),
        Target("picture", _picture, _picture_seeds),
        Target(
            "tensor", _tensor, lambda: [bytes([4, 1, 2, 2, 3, 0, 9, 9]), bytes([3, 1, 1, 5, 0, 1]), b"\x04\0\0\0\0\0"]
        ),
        Target("video", _video, _video_seeds),
        Target("settings", _settings, _json_seeds(*_SETTINGS), (*_NAMES, "NaN", "Infinity", "null")),
    )
}
