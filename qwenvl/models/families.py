"""The families of models, by the model_type in their config.json, and the properties of each.

Thinking is not among them, because models of one family differ in it: their chat templates tell.
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What the models of a family have in common.

    Attributes:
        transformers: the first version that supports it; "" if that is not known.
        decode: our own decode step that fits, "dense"; "" if none fits.
        coordinates: the unit of boxes and points in an answer: "pixels" of the picture as the model saw it, or
            "0-1000", thousandths of each side; "" for a family that reads no pictures.
        patch: side, in pixels, of the square that becomes one token; 0 for a family that reads no pictures.
        linear_attention: most of its layers use linear attention, which needs special kernels to be fast.
    """

    transformers: str = ""
    decode: str = ""
    coordinates: str = ""
    patch: int = 0
    linear_attention: bool = False

    @property
    def has_vision(self) -> bool:
        """Tell if the family's class has a vision tower."""
        return self.patch > 0


FAMILIES: dict[str, Family] = {
    "qwen2": Family("4.37", "dense"),
    "qwen2_moe": Family("4.40"),
    "qwen2_vl": Family("4.45", "dense", "0-1000", 28),
    "qwen2_5_vl": Family("4.49", "dense", "pixels", 28),
    "qwen3": Family("4.51", "dense"),
    "qwen3_moe": Family("4.51"),
    "qwen3_next": Family("4.57", linear_attention=True),
    "qwen3_vl": Family("4.57", "dense", "0-1000", 32),
    "qwen3_vl_moe": Family("4.57", "", "0-1000", 32),
    "qwen3_5": Family("5.2", "", "0-1000", 32, linear_attention=True),
    "qwen3_5_text": Family("5.2", linear_attention=True),
    "qwen3_5_moe": Family("5.2", "", "0-1000", 32, linear_attention=True),
    "qwen3_5_moe_text": Family("5.2", linear_attention=True),
    "qwen4_exp": Family("5.16", "", "0-1000", 32, linear_attention=True),
    "qwen4_exp_text": Family("5.16", linear_attention=True),
}
_UNKNOWN = Family()


def family_of(model_type: str) -> Family:
    """Return the properties of the family; for an unknown one, the defaults."""
    return FAMILIES.get(model_type, _UNKNOWN)
