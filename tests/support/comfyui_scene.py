"""Files that a running ComfyUI gets for the tests: pictures, a film, and a model that never ends its answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comfyui_server import ENVIRONMENT, PACK, Server, with_the_pack
from pictures import write_video
from PIL import Image, ImageDraw

DEMO = "Demo-Shapes (5 MB, offline)"
# The demo model changed so that it never ends its text, in the folder of a model that the pack knows.
ENDLESS = "Qwen3-VL-2B-Instruct"
UNUSED_TOKEN = "<|vision_pad|>"


def started(base: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Iterator[Server]:
    make_endless_model(base / "models" / "LLM" / ENDLESS)
    draw_pictures(base / "input")
    server = with_the_pack(base, environment=environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def draw_pictures(folder: Path) -> None:
    folder.mkdir()
    for name, shape, colour, background in (
        ("circle.png", ImageDraw.ImageDraw.ellipse, "red", "blue"),
        ("square.png", ImageDraw.ImageDraw.rectangle, "yellow", "green"),
    ):
        picture = Image.new("RGB", (160, 160), background)
        shape(ImageDraw.Draw(picture), (40, 40, 120, 120), fill=colour)
        picture.save(folder / name)
    circle, square = (Image.new("RGB", (128, 128), "white") for _ in "ab")
    ImageDraw.Draw(circle).ellipse((24, 24, 104, 104), fill="red")
    ImageDraw.Draw(square).rectangle((24, 24, 104, 104), fill="blue")
    write_video(folder / "scenes.mp4", [circle, square])


def make_endless_model(folder: Path) -> None:
    """Copy the demo model, changed so that it never stops."""
    shutil.copytree(PACK / "demo" / "model", folder)
    use_another_end_token(folder)


def use_another_end_token(folder: Path) -> int:
    """Name a token that the demo model never writes as the end in all files of a model that has its tokenizer, and
    other think tokens, so that its text does not look like a thought. Return the token's id."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace("think>", "mark>"), encoding="utf-8")
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    unused = next(token["id"] for token in tokens if token["content"] == UNUSED_TOKEN)
    _set(folder / "generation_config.json", eos_token_id=[unused])
    _set(folder / "tokenizer_config.json", eos_token=UNUSED_TOKEN)
    template = folder / "chat_template.jinja"
    answered = f"{{{{ messages[-1].content[0].text }}}}{UNUSED_TOKEN}"
    asked = template.read_text(encoding="utf-8")
    answers = "{% if messages[-1].role == 'assistant' %}"
    template.write_text(f"{answers}{answered}{{% else %}}{asked}{{% endif %}}", encoding="utf-8")
    return int(unused)


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
