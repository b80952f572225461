"""Makes pictures and films that the demo model knows, and names the folder of the checkout.

Packages are imported inside the functions, because the GPU tests run where little else is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def draw(shape: str, color: str, background: str, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """Draw a shape in the middle of a picture, in colours that PIL knows by name."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, background)
    x, y = size[0] / 2, size[1] / 2
    r = 0.32 * min(size)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=color)
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=color)
    else:
        pen.polygon([(x, y - r), (x + r, y + 0.82 * r), (x - r, y + 0.82 * r)], fill=color)
    return picture


def image(*pictures: Image.Image) -> torch.Tensor:
    """Convert pictures of one size to ComfyUI's IMAGE: (B, H, W, C) float32 in [0, 1]."""
    import numpy as np
    import torch

    return torch.stack([torch.from_numpy(np.asarray(picture).astype(np.float32) / 255) for picture in pictures])


def write_video(path: Path, scenes: list[Image.Image], seconds_each: float = 3.0, fps: int = 8) -> Path:
    """Write a video file that shows each picture in turn."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *scenes[0].size, "yuv420p"
        for scene in scenes:
            for _ in range(round(seconds_each * fps)):
                container.mux(stream.encode(av.VideoFrame.from_image(scene)))
        container.mux(stream.encode())
    return path
