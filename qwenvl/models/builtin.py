"""The models that the pack lists by itself, and their sizes. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..log import gigabytes
from .engines import Engine


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the weights: on disk, and in memory for each quantization."""

    disk: int
    memory: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        in_memory = ", ".join(f"{name} {bytes_ / 1e9:.1f}" for name, bytes_ in self.memory.items())
        return f"{gigabytes(self.disk)} on disk" + (f"; in memory {in_memory} GB" if in_memory else "")


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the list: a repository to download from, a folder that is already there, or an engine to ask."""

    name: str
    repo_id: str = ""
    folder: Path | None = None
    size: Size | None = None
    engine: Engine | None = None
    # The model_type of its config.json, if it is known without the folder.
    family: str = ""

    @property
    def owner(self) -> str:
        return self.repo_id.partition("/")[0]

    @property
    def last(self) -> str:
        return self.repo_id.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Parameter counts, as transformers counts them in the family's class, built without weights.

    Attributes:
        family: the model_type of its config.json.
        total: all parameters in memory.
        matrices: those in matrices of the language model's layers, which an FP8 twin stores in one byte each.
        on_disk_only: stored, but not in the total: heads that predict several tokens, which transformers leaves out,
            and output heads that are equal to the embedding.
        linear: those of the matrices in linear layers, which bitsandbytes quantizes (not experts). None means all.
    """

    family: str
    total: int
    matrices: int
    on_disk_only: int = 0
    linear: int | None = None


# Bytes of a weight in memory; for 8bit and 4bit with its share of the scales.
_BYTES = {"none": 2.0, "8bit": 1.01, "4bit": 0.52}
# Bytes of a weight in an FP8 twin, with its share of the scale of a 128 x 128 block.
_FP8_BYTES = 1 + 2 / 128**2

_SHAPES = {
    "Qwen3-VL-2B": _Shape("qwen3_vl", 2_127_532_032, 1_409_286_144),
    "Qwen3-VL-4B": _Shape("qwen3_vl", 4_437_815_808, 3_633_315_840),
    "Qwen3-VL-8B": _Shape("qwen3_vl", 8_767_123_696, 6_945_767_424),
    "Qwen3-VL-32B": _Shape("qwen3_vl", 33_357_390_064, 31_205_621_760),
    "Qwen3-VL-30B-A3B": _Shape("qwen3_vl_moe", 31_070_754_032, 29_909_581_824, linear=905_969_664),
    "Qwen3.5-0.8B": _Shape("qwen3_5", 852_985_920, 497_614_848, 20_452_864),
    "Qwen3.5-2B": _Shape("qwen3_5", 2_213_241_664, 1_372_717_056, 60_828_160),
    "Qwen3.5-4B": _Shape("qwen3_5", 4_539_265_536, 3_569_090_560, 120_599_552),
    "Qwen3.5-9B": _Shape("qwen3_5", 9_409_813_744, 6_918_504_448, 243_290_624),
    "Qwen3.5-27B": _Shape("qwen3_5", 27_356_728_560, 24_350_556_160, 424_699_392),
    "Qwen3.5-35B-A3B": _Shape("qwen3_5_moe", 35_107_181_936, 33_642_332_160, 844_640_768, linear=1_409_105_920),
    "Qwen2.5-VL-3B": _Shape("qwen2_5_vl", 3_754_622_976, 2_774_532_096),
    "Qwen2.5-VL-7B": _Shape("qwen2_5_vl", 8_292_166_656, 6_525_288_448),
    "Qwen2.5-VL-32B": _Shape("qwen2_5_vl", 33_452_718_336, 31_205_621_760),
    "Qwen2.5-VL-72B": _Shape("qwen2_5_vl", 73_410_777_344, 70_212_648_960),
    "Qwen2-VL-2B": _Shape("qwen2_vl", 2_208_985_600, 1_310_195_712),
    "Qwen2-VL-7B": _Shape("qwen2_vl", 8_291_375_616, 6_525_288_448),
    "Qwen3-0.6B": _Shape("qwen3", 596_049_920, 440_401_920, 155_582_464),
    "Qwen3-1.7B": _Shape("qwen3", 1_720_574_976, 1_409_286_144, 311_164_928),
    "Qwen3-4B": _Shape("qwen3", 4_022_468_096, 3_633_315_840),
    "Qwen3-8B": _Shape("qwen3", 8_190_735_360, 6_945_767_424),
    "Qwen3-14B": _Shape("qwen3", 14_768_307_200, 13_212_057_600),
    "Qwen3-32B": _Shape("qwen3", 32_762_123_264, 31_205_621_760),
    "Qwen2.5-3B": _Shape("qwen2", 3_085_938_688, 2_774_532_096),
    "Qwen2.5-7B": _Shape("qwen2", 7_615_616_512, 6_525_288_448),
    "Qwen2.5-14B": _Shape("qwen2", 14_770_033_664, 13_212_057_600),
    "Qwen2.5-32B": _Shape("qwen2", 32_763_876_352, 31_205_621_760),
}
# Later generations that have the same shape.
_SHAPES |= dict.fromkeys(("Qwen3.6-27B", "Qwen3.8-27B"), _SHAPES["Qwen3.5-27B"])
_SHAPES |= {"Qwen3.6-35B-A3B": _SHAPES["Qwen3.5-35B-A3B"]}

_BOTH = ("-Instruct", "-Thinking", "-Instruct-FP8", "-Thinking-FP8")
_TWIN = ("", "-FP8")
# Shape -> endings of its repositories' names, in the order of the list. The first model is a new node's default.
_VISION: dict[str, tuple[str, ...]] = {
    "Qwen3-VL-4B": _BOTH,
    "Qwen3-VL-2B": _BOTH,
    "Qwen3-VL-8B": _BOTH,
    "Qwen3-VL-32B": _BOTH,
    "Qwen3-VL-30B-A3B": _BOTH,
    "Qwen3.5-0.8B": ("",),
    "Qwen3.5-2B": ("",),
    "Qwen3.5-4B": ("",),
    "Qwen3.5-9B": ("",),
    "Qwen3.5-27B": _TWIN,
    "Qwen3.5-35B-A3B": _TWIN,
    "Qwen3.6-27B": _TWIN,
    "Qwen3.6-35B-A3B": _TWIN,
    "Qwen3.8-27B": _TWIN,
    "Qwen2.5-VL-3B": ("-Instruct",),
    "Qwen2.5-VL-7B": ("-Instruct",),
    "Qwen2.5-VL-32B": ("-Instruct",),
    "Qwen2.5-VL-72B": ("-Instruct",),
    "Qwen2-VL-2B": ("-Instruct",),
    "Qwen2-VL-7B": ("-Instruct",),
}
_TEXT: dict[str, tuple[str, ...]] = {
    "Qwen3-4B": ("-Instruct-2507", "-Thinking-2507", "-Instruct-2507-FP8", "-Thinking-2507-FP8", "", "-FP8"),
    "Qwen3-0.6B": _TWIN,
    "Qwen3-1.7B": _TWIN,
    "Qwen3-8B": _TWIN,
    "Qwen3-14B": _TWIN,
    "Qwen3-32B": _TWIN,
    "Qwen2.5-3B": ("-Instruct",),
    "Qwen2.5-7B": ("-Instruct",),
    "Qwen2.5-14B": ("-Instruct",),
    "Qwen2.5-32B": ("-Instruct",),
}


def vision() -> list[Model]:
    """List the models that read pictures, the QwenVL node's default first."""
    shape = _SHAPES["Qwen2.5-VL-7B"]
    captioner = Model("SkyCaptioner-V1", "Skywork/SkyCaptioner-V1", size=_size(shape, fp8=False), family=shape.family)
    return [*_named(_VISION), captioner]


def text() -> list[Model]:
    """List the models that read text only, the Qwen node's default first."""
    return list(_named(_TEXT))


def _named(table: dict[str, tuple[str, ...]]) -> Iterator[Model]:
    for shape, endings in table.items():
        for ending in endings:
            name, size = shape + ending, _size(_SHAPES[shape], fp8=ending.endswith("-FP8"))
            yield Model(name, f"Qwen/{name}", size=size, family=_SHAPES[shape].family)


def _size(shape: _Shape, fp8: bool) -> Size:
    rest = shape.total - shape.matrices
    if fp8:
        there = round(2 * rest + _FP8_BYTES * shape.matrices)
        return Size(there + shape.on_disk_only, {"fp8": there})
    linear = shape.matrices if shape.linear is None else shape.linear
    memory = {name: round(2 * (shape.total - linear) + bytes_ * linear) for name, bytes_ in _BYTES.items()}
    return Size(2 * (shape.total + shape.on_disk_only), memory)
