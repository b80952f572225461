"""Converts pixels of any kind, from files, other programs and tensors, to 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..log import log

if TYPE_CHECKING:
    import torch

_SIXTEEN_BITS = 65535
# Filters overshoot the range by less than this; the overshoot is cut off.
_OVERSHOOT = 0.01
# A tensor that reaches further was not meant to be in the range 0 to 1.
_FAR_BEYOND = 1.5
# Tags of a TIFF: bits of a value, if 0 is black or white, and if whole numbers have a sign.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_ZERO_IS_WHITE, _UNSIGNED = 0, 1


def as_rgb(name: str, picture: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB. Transparent parts become white, as in Qwen's own preprocessing.

    Grey of 16 bits is scaled by its range. Numbers of 32 bits have no fixed range: whole numbers that fit into 16 bits
    and fractions from 0 to 1 are scaled by these ranges; others are stretched from their smallest to their largest
    value, with a warning in the log.

    Args:
        name: the input's name, for the log.

    Raises:
        ValueError: the picture holds no finite number.
    """
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return _from_grey(picture, _unit_values(name, picture))
    if picture.mode in ("RGBa", "La"):
        # Pillow converts these premultiplied modes to one other mode only.
        picture = picture.convert({"RGBa": "RGBA", "La": "LA"}[picture.mode])
    if picture.mode == "RGB" and isinstance(picture.info.get("transparency"), tuple):
        return _without_key(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def from_tensor(name: str, frame: torch.Tensor) -> Image.Image:
    """Convert a tensor (height, width, channels) of floats from 0 to 1, uint8 or bool to an RGB picture.

    Values beyond the range are cut off, as in ComfyUI, with a warning in the log if they are far beyond.

    Raises:
        ValueError: the tensor holds NaN.
    """
    values = frame.float().cpu().numpy()
    if str(frame.dtype) == "torch.uint8":
        values = values / 255
    low, high = values.min(), values.max()
    if np.isnan(low):
        raise ValueError("holds NaN: the node that made it went wrong (often a VAE decode in fp16)")
    if high > _FAR_BEYOND or low < 1 - _FAR_BEYOND:
        log.warning("%s: values from %g to %g, where 0 to 1 is expected: what is beyond is cut off", name, low, high)
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return as_rgb(name, Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _from_grey(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """Convert grey values (height, width) from 0 to 1 to RGB; a PNG's transparent grey becomes white."""
    if _tag(picture, _PHOTOMETRIC, None) == _ZERO_IS_WHITE:
        values = 1 - values
    grey = (values.clip(0, 1) * 255).round().astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[np.asarray(picture) == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _without_key(picture: Image.Image) -> Image.Image:
    """Make the one transparent colour of an RGB picture white. A PNG of 16 bits names it in 16 bits; Pillow reads 8."""
    clear = picture.info["transparency"]
    if max(clear) > 255:
        clear = tuple(value >> 8 for value in clear)
    pixels = np.array(picture)
    pixels[(pixels == clear).all(-1)] = 255
    return Image.fromarray(pixels)


def _unit_values(name: str, picture: Image.Image) -> np.ndarray:
    """Return the picture's values as float32 (height, width), from 0 for black to 1 for white."""
    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        bits = _tag(picture, _BITS, 16)
        return values.astype(np.float32) / ((1 << bits) - 1 if 8 < bits < 16 else _SIXTEEN_BITS)
    if picture.mode == "I" and hasattr(picture, "tag_v2") and _tag(picture, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no number in it is finite")
    low, high = values[finite].min(), values[finite].max()
    if not finite.all():
        log.warning("%s: %d of its numbers are NaN or infinite: shown black", name, (~finite).sum())
        values = np.where(finite, values, low)
    if picture.mode == "I" and low >= 0 and high <= _SIXTEEN_BITS:
        log.info("%s: whole numbers of 32 bits, which fit into 16: shown as 16 bits", name)
        return (values / _SIXTEEN_BITS).astype(np.float32)
    if picture.mode == "F" and low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return values.astype(np.float32)
    log.warning("%s: numbers from %g to %g: the smallest is shown black, the largest white", name, low, high)
    return ((values - low) / max(high - low, np.finfo(np.float64).tiny)).astype(np.float32)


def _tag(picture: Image.Image, tag: int, otherwise: Any) -> Any:
    """Return the first value of a TIFF tag, or `otherwise` if the picture does not have the tag."""
    value = getattr(picture, "tag_v2", {}).get(tag, otherwise)
    return value[0] if isinstance(value, tuple) and value else value
