"""Functions that take any bytes, from benchmarks/fuzz.py by the million and from property tests by the hundred.

Each gives its bytes to one of our readers, as a file, a text or a stream. What guarded.py does not allow escapes as an
error, and is a finding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl.loading import budget
from qwenvl.media import boxes, media
from qwenvl.models import checkpoint, custom, discovery, download, engines, trust
from qwenvl.process import PROCESS
from qwenvl.prompting import presets
from qwenvl.remote import kinds, refusals
from qwenvl.remote.answer import EngineAnswer
from qwenvl.remote.reply import DONE, Reply, event_of, stream_data
from qwenvl.remote.secret import Secret
from qwenvl.request import Frames, LoadSpec, Request, Sampling

if __package__:  # of the benchmark
    from . import seeds
    from .guarded import LONGEST_MESSAGE, outcome, unchanged
else:
    import seeds
    from guarded import LONGEST_MESSAGE, outcome, unchanged

ENGINE = engines.Engine("studio", "http://127.0.0.1:8000/v1", "m")


@dataclass(frozen=True)
class Target:
    """A reader under attack, files that it accepts, and words that are typical of its kind of file."""

    name: str
    attack: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[str, ...] = ()

    def __call__(self, data: bytes) -> None:
        with unchanged():
            self.attack(data)


@cache
def _folder(name: str) -> Path:
    """Make a folder for each target and process, with the small files of the demo model in it."""
    in_memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"qwenvl-{name}-", dir=in_memory if in_memory.is_dir() else None))
    for file in seeds.DEMO.iterdir():
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
    custom._read.cache_clear()
    for engine in outcome(custom.custom_engines, file):
        assert 0 < engine.timeout_s < float("inf")
        assert engine.place


def _presets(data: bytes) -> None:
    """Read a preset; the first byte chooses the kind of file."""
    suffix = presets._SUFFIXES[data[0] % len(presets._SUFFIXES)] if data else ".txt"
    file = _written("presets", f"a{suffix}", data[1:])
    presets._parsed.cache_clear()
    PROCESS.logged.clear()
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
    names = ("generation_config.json", "tokenizer_config.json", "processor_config.json", "model.safetensors.index.json")
    folder = _folder("small")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    (folder / names[data[0] % len(names)]).write_bytes(data[1:]) if data else None
    found = outcome(checkpoint.read_checkpoint, folder)
    if isinstance(found, checkpoint.Checkpoint):
        outcome(Sampling().with_own, found.sampling)
    outcome(download.why_incomplete, folder)
    outcome(trust.why_unsafe, folder)
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
        writer = EngineAnswer(ENGINE, Request(LoadSpec("m"), "?", sampling=Sampling(stop=("END",))), Secret(""))
        writer.reply = reply
        for answer in (writer.so_far, writer.end()):
            json.dumps([answer and [answer.text, answer.thinking], writer.tokens, reply.cached], ensure_ascii=False)
            if answer:
                f"{answer.text}{answer.thinking}".encode()


def _heard(blocks: Sequence[bytes]) -> Reply | Exception:
    """Read a reply as remote/client.py does, without a connection."""
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
    """Read the refusal of an engine; the first byte stands for its status."""
    words = refusals.words(data[1:].decode(errors="replace"))
    words.encode()
    assert len(words) <= refusals._LONGEST_QUOTE + 4
    refusals.left_out(data[0] * 4 if data else 500, words, {"top_k", "stop"})
    kinds.of_models(data.decode(errors="replace"))
    error = refusals.refused(ENGINE, 400 + data[0] if data else 500, words)
    assert len(str(error)) < LONGEST_MESSAGE


def _picture(data: bytes) -> None:
    file = _written("picture", "a.png", data)
    found = outcome(media.pictures, {"image1": file})
    if isinstance(found, list):
        assert [picture.mode for picture in found] == ["RGB"]


def _tensor(data: bytes) -> None:
    """Read a tensor; the bytes are its shape, type and values."""
    types = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64)
    head, values = data[:6], data[6:]
    shape = [entry % 9 for entry in head[1 : 1 + (head[0] % 6 if head else 0)]]
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
    """Check values of settings, as JSON, as a workflow may hold them."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return
    for kind in (Sampling, Frames, LoadSpec, Request):
        fields = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        needed = {LoadSpec: {"model": "m"}, Request: {"load": LoadSpec("m"), "text": "?"}}.get(kind, {})
        result = outcome(kind, **{**needed, **{name: value for name, value in fields.items() if name != "load"}})
        if isinstance(result, Sampling):
            str(result)
    outcome(Sampling().with_own, values)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "custom_models",
            _custom_models,
            seeds.written(*seeds.CUSTOM),
            (*custom.MODEL_KEYS, *custom._ENTRY, "\\u0000"),
        ),
        Target("engines", _engines, seeds.written(*seeds.ENGINES), tuple(engines._SETTINGS)),
        Target(
            "presets",
            _presets,
            seeds.prefixed(seeds.yaml_files, 3),
            ("text", "system", "!!int", "!!float", "<<", "&a", "*a"),
        ),
        Target("boxes", _boxes, seeds.box_texts, ("bbox_2d", "point_2d", "label", "NaN", "Infinity", "\\ud800")),
        Target(
            "config", _config, seeds.written(seeds.demo_file("config.json"), {"model_type": "qwen3", "num_experts": 5})
        ),
        Target(
            "small_files",
            _small_files,
            seeds.prefixed(
                seeds.written(
                    {"temperature": 0.7, "top_k": 20, "top_p": float("nan"), "do_sample": 1, "min_p": True},
                    {"vocab_file": "../x", "merges_file": [], "init_inputs": [], "audio_tokenizer": {}},
                    {"weight_map": {"a": "model.safetensors", "b": "../x", "c": 5}},
                ),
                4,
            ),
        ),
        Target("weights", _weights, seeds.weight_files, ("data_offsets", "shape", "dtype", "__metadata__", "F8_E4M3")),
        Target(
            "stream", _stream, seeds.stream_texts, ("data: ", "choices", "delta", "content", "finish_reason", "\\ud83d")
        ),
        Target("refusal", _refusal, seeds.refusal_texts, ("error", "message", "detail", "loc", "param")),
        Target("picture", _picture, seeds.picture_files),
        Target(
            "tensor", _tensor, lambda: [bytes([4, 1, 2, 2, 3, 0, 9, 9]), bytes([3, 1, 1, 5, 0, 1]), b"\x04\0\0\0\0\0"]
        ),
        Target("video", _video, seeds.video_files),
        Target("settings", _settings, seeds.written(*seeds.SETTINGS), (*seeds.NAMES, "NaN", "Infinity", "null")),
    )
}
