"""Makes small valid files of every kind that is read, and of some that are not, from which hostile ones are made."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from qwenvl.request import Frames, LoadSpec, Sampling

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
# Deeper than any reader follows, and longer than Python takes a number: what the fuzzer's inputs are too short for.
DEEP = (b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b"- " * 2000, b'{"bbox_2d": ' + b"[" * 3000)


def written(*documents: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document).encode() for document in documents]


def prefixed(seeds: Callable[[], list[bytes]], count: int) -> Callable[[], list[bytes]]:
    return lambda: [bytes([first]) + seed for seed in seeds() for first in range(count)]


def demo_file(name: str) -> Any:
    return json.loads((DEMO / name).read_text())


def yaml_files() -> list[bytes]:
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


def box_texts() -> list[bytes]:
    whole = [{"bbox_2d": [10, 20, 500, 600], "label": "a cat"}, {"point_2d": [5, 5], "text_content": "eye"}]
    texts = (
        json.dumps(whole),
        f"Here:\n```json\n{json.dumps(whole)[:-20]}",
        "{'bbox_2d': [1, 2, 3, 4], 'label': 'x', }",
        json.dumps({"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "\ud800"}),
        '{"bbox_2d": [1e999, NaN, -Infinity, true], "label": "x"}',
    )
    return [text.encode() for text in texts]


def weight_file(header: Any, data: bytes = b"\0" * 8) -> bytes:
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data


def weight_files() -> list[bytes]:
    tensor = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    whole = weight_file({"a.weight": tensor, "__metadata__": {"format": "pt"}})
    odd = ({"shape": "a"}, {"dtype": []}, {"data_offsets": []}, {"data_offsets": [0, "8"]}, {"shape": [-1, None]})
    return [
        *(whole, whole[:20], b"", b"\0" * 8, b"\xff" * 20, weight_file([]), weight_file({"a": 1}), weight_file({})),
        *(weight_file({"a.weight": {**tensor, **entry}}) for entry in odd),
    ]


def stream_texts() -> list[bytes]:
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


def refusal_texts() -> list[bytes]:
    bodies = (
        {"error": {"message": "unknown field top_k", "param": "top_k"}},
        {"detail": [{"loc": ["body", "stop"], "msg": "Extra inputs are not permitted"}]},
        {"message": "context length exceeded"},
    )
    texts = [json.dumps(body) for body in bodies] + ["<html><b>502</b></html>"]
    return [b"\0" + text.encode() for text in texts]


def picture_files() -> list[bytes]:
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


def video_files() -> list[bytes]:
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


CUSTOM = (
    {
        "hf_models": {
            "A": {"repo_id": "a/b"},
            "B": {"path": "/data/b", "default": True, "vram_requirement": {"full": 5}},
        }
    },
    {"models": {"x": {"path": "/a\0b"}, "y": {"path": "/\ud800"}, "z": {"repo_id": "a/" + "b" * 300}}, "odd": 1},
    {"hf_vl_models": {"n": {"path": "/" + "n" * 300}, "m": 5}, "_comment": [], "engines": {}},
)
ENGINES = (
    {"base_url": "http://127.0.0.1:8000/v1", "model": "m", "api_key_env": "KEY", "timeout_s": 5, "pixels": [1, 2]},
    {"base_url": "https://u:p@h/v1?x#y", "model": "m", "max_concurrency": 3, "vision": False, "video_url": True},
    {"base_url": "http://[::1]:99999/v1", "model": ""},
)
SETTINGS = (
    {"temperature": 0.7, "top_k": 50, "seed": -1, "do_sample": True, "stop": ["a"], "quantization": "4bit"},
    {"temperature": float("nan"), "top_k": 5.5, "seed": 10**30, "max_new_tokens": None, "top_p": [1], "min_p": True},
    {"fps": 0, "max_frames": float("inf"), "sample_fps": "1", "device": 5, "thinking": [], "image_mode": {}},
    {"text": "a", "system": "\ud800", "release": "after the node", "temperature": float("-inf")},
)
NAMES = tuple({**Sampling.__dataclass_fields__, **Frames.__dataclass_fields__, **LoadSpec.__dataclass_fields__})
