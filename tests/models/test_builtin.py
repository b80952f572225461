"""The sizes in the list, counted again in transformers' classes without weights."""

import pytest
import torch
import transformers

from qwenvl.loading import budget
from qwenvl.models import builtin
from qwenvl.models.checkpoint import why_too_old
from qwenvl.models.families import family_of


def text(hidden, inner, layers, heads, kv_heads, vocabulary=151936, tied=False, **more):
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


def vision3(depth, hidden, inner, heads, out, **more):
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_heads": heads,
        "out_hidden_size": out,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        **more,
    }


def qwen3_vl(tower, *sizes, **more):
    language = text(*sizes, head_dim=128, **more)
    language["rope_scaling"] = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    deep = [5, 11, 17] if tower[0] == 24 else [8, 16, 24]
    vision = vision3(*tower, sizes[0], deepstack_visual_indexes=deep)
    family = "qwen3_vl_moe" if "num_experts" in more else "qwen3_vl"
    return family, {"text_config": language, "vision_config": vision}


def qwen3_5(tower, *sizes, values, **more):
    language = text(*sizes, 248320, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=values, **more)
    family = "qwen3_5_moe" if "num_experts" in more else "qwen3_5"
    return family, {"text_config": language, "vision_config": vision3(*tower, sizes[0])}


def qwen2_5_vl(inner_vision, *sizes, **more):
    language = text(*sizes, **more)
    language["rope_scaling"] = {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": inner_vision, "num_heads": 16}
    return "qwen2_5_vl", {"text_config": language, "vision_config": {**vision, "out_hidden_size": sizes[0]}}


def qwen2_vl(*sizes, **more):
    language = text(*sizes, **more)
    language["rope_scaling"] = {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": sizes[0], "mlp_ratio": 4}
    return "qwen2_vl", {"text_config": language, "vision_config": vision}


SMALL, MEDIUM, LARGE = (12, 768, 3072, 12), (24, 1024, 4096, 16), (27, 1152, 4304, 16)
ARCHITECTURES = {
    "Qwen3-VL-2B": qwen3_vl(MEDIUM, 2048, 6144, 28, 16, 8, tied=True),
    "Qwen3-VL-4B": qwen3_vl(MEDIUM, 2560, 9728, 36, 32, 8, tied=True),
    "Qwen3-VL-8B": qwen3_vl(LARGE, 4096, 12288, 36, 32, 8),
    "Qwen3-VL-32B": qwen3_vl(LARGE, 5120, 25600, 64, 64, 8),
    "Qwen3-VL-30B-A3B": qwen3_vl(LARGE, 2048, 6144, 48, 32, 4, num_experts=128, moe_intermediate_size=768),
    "Qwen3.5-0.8B": qwen3_5(SMALL, 1024, 3584, 24, 8, 2, values=16, tied=True),
    "Qwen3.5-2B": qwen3_5(MEDIUM, 2048, 6144, 24, 8, 2, values=16, tied=True),
    "Qwen3.5-4B": qwen3_5(MEDIUM, 2560, 9216, 32, 16, 4, values=32, tied=True),
    "Qwen3.5-9B": qwen3_5(LARGE, 4096, 12288, 32, 16, 4, values=32),
    "Qwen3.5-27B": qwen3_5(LARGE, 5120, 17408, 64, 24, 4, values=48),
    "Qwen3.5-35B-A3B": qwen3_5(LARGE, 2048, 0, 40, 16, 2, values=32, num_experts=256, moe_intermediate_size=512),
    "Qwen2.5-VL-3B": qwen2_5_vl(3420, 2048, 11008, 36, 16, 2, tied=True),
    "Qwen2.5-VL-7B": qwen2_5_vl(3420, 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-VL-32B": qwen2_5_vl(3456, 5120, 27648, 64, 40, 8, 152064),
    "Qwen2.5-VL-72B": qwen2_5_vl(3456, 8192, 29568, 80, 64, 8, 152064),
    "Qwen2-VL-2B": qwen2_vl(1536, 8960, 28, 12, 2, tied=True),
    "Qwen2-VL-7B": qwen2_vl(3584, 18944, 28, 28, 4, 152064),
    "Qwen3-0.6B": ("qwen3", text(1024, 3072, 28, 16, 8, tied=True, head_dim=128)),
    "Qwen3-1.7B": ("qwen3", text(2048, 6144, 28, 16, 8, tied=True, head_dim=128)),
    "Qwen3-4B": ("qwen3", text(2560, 9728, 36, 32, 8, tied=True, head_dim=128)),
    "Qwen3-8B": ("qwen3", text(4096, 12288, 36, 32, 8, head_dim=128)),
    "Qwen3-14B": ("qwen3", text(5120, 17408, 40, 40, 8, head_dim=128)),
    "Qwen3-32B": ("qwen3", text(5120, 25600, 64, 64, 8, head_dim=128)),
    "Qwen2.5-3B": ("qwen2", text(2048, 11008, 36, 16, 2, tied=True)),
    "Qwen2.5-7B": ("qwen2", text(3584, 18944, 28, 28, 4, 152064)),
    "Qwen2.5-14B": ("qwen2", text(5120, 13824, 48, 40, 8, 152064)),
    "Qwen2.5-32B": ("qwen2", text(5120, 27648, 64, 40, 8, 152064)),
}
LATER = {"Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3.8-27B"}


def test_every_shape_of_the_list_is_counted_here():
    assert set(builtin._SHAPES) == set(ARCHITECTURES) | LATER


def test_every_model_of_the_list_says_its_family():
    families = {shape: family for shape, (family, _) in ARCHITECTURES.items()}
    assert {shape: builtin._SHAPES[shape].family for shape in families} == families
    for model in [*builtin.vision(), *builtin.text()]:
        assert family_of(model.family).has_vision == (model in builtin.vision()), model.name


@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_the_counts_are_those_of_the_class(shape):
    family, sizes = ARCHITECTURES[shape]
    if why_too_old(family, transformers.__version__):
        pytest.skip(f"this transformers has no {family}")
    tied = sizes.get("text_config", sizes)["tie_word_embeddings"]
    config = transformers.CONFIG_MAPPING[family](**{**sizes, "tie_word_embeddings": tied})
    sees = "vision_config" in sizes
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    expected = builtin._SHAPES[shape]
    weights = dict(model.named_parameters())
    assert sum(weight.numel() for weight in weights.values()) == expected.total
    layers = {name for name in weights if ".layers." in name and "visual" not in name and "conv1d" not in name}
    assert sum(weights[name].numel() for name in layers if weights[name].ndim > 1) == expected.matrices
    if expected.linear:
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        # Routers are linear layers in version 4, and no quantization touches them.
        linear = {name for name in linear if not name.endswith("mlp.gate")}
        assert (
            sum(weights[f"{name}.weight"].numel() for name in linear if f"{name}.weight" in layers) == expected.linear
        )


def test_heads_for_several_tokens_are_a_layer_and_a_projection_on_disk_only():
    hidden, inner, heads, kv_heads = 5120, 17408, 24, 4
    attention = hidden * 256 * (2 * heads + 2 * kv_heads) + heads * 256 * hidden + 2 * 256
    layer = attention + 3 * hidden * inner + 2 * hidden
    assert builtin._SHAPES["Qwen3.5-27B"].on_disk_only == layer + 2 * hidden * hidden + 3 * hidden


def test_the_bytes_of_quantized_weights_are_those_that_the_budget_counts_with():
    assert {name: builtin._BYTES[name] for name in budget.STORED} == budget.STORED


def test_a_line_says_what_a_model_takes():
    sizes = {model.name: model.size for model in [*builtin.vision(), *builtin.text()]}
    assert str(sizes["Qwen3-VL-4B-Instruct"]) == "8.9 GB on disk; in memory none 8.9, 8bit 5.3, 4bit 3.5 GB"
    assert sizes["Qwen3-VL-8B-Instruct-FP8"].memory == {"fp8": sizes["Qwen3-VL-8B-Instruct-FP8"].disk}
    experts = sizes["Qwen3-VL-30B-A3B-Instruct"].memory
    assert experts["4bit"] > 0.95 * experts["none"], "bitsandbytes leaves experts as they are"
    assert sizes["Qwen3.5-4B"].disk > sizes["Qwen3.5-4B"].memory["none"], "the heads are not loaded"


def test_what_is_promised_is_listed_once_under_its_own_name():
    names = [model.name for model in [*builtin.vision(), *builtin.text()]]
    assert len(names) == len(set(names))
    assert all(model.repo_id == f"Qwen/{model.name}" for model in builtin.text())
    assert {model.owner for model in builtin.vision()} == {"Qwen", "Skywork"}
    for sizes, ending in (
        (("Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B", "Qwen3-VL-32B", "Qwen3-VL-30B-A3B"), "-Instruct"),
        (("Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-8B", "Qwen3-VL-32B", "Qwen3-VL-30B-A3B"), "-Thinking-FP8"),
        (("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B", "Qwen2-VL-2B"), "-Instruct"),
        (("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.5-35B-A3B"), ""),
        (("Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3.8-27B"), "-FP8"),
        (("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"), ""),
        (("Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B"), "-Instruct"),
    ):
        assert {size + ending for size in sizes} <= set(names)
