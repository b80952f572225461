import json

import pytest
import tiny
import torch
from pictures import draw
from PIL import Image
from safetensors.torch import load_file, save_file

from qwenvl.cpu.packing import packed_bytes
from qwenvl.faults import is_out_of_memory
from qwenvl.loading.budget import OutOfMemoryError, model_bytes, prompt_tokens, request_bytes, why_out_of_memory
from qwenvl.loading.capabilities import Machine, machine
from qwenvl.loading.loader import load
from qwenvl.loading.source import ModelSource
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request

CPU = Machine("cpu", torch.float32, "")
GB = 10**9
SIZES = {"none": 9 * GB, "8bit": 5 * GB, "4bit": 3 * GB}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_weights_is_known_before_they_are_read(demo, dtype):
    held = sum(weight.numel() for weight in demo.model.parameters()) * dtype.itemsize
    assert model_bytes(tiny.DEMO_FOLDER, dtype, "none") == pytest.approx(held, rel=0.01)


@pytest.mark.usefixtures("by_bitsandbytes")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_size_of_quantized_weights_is_known_too(quantization):
    there = machine("cpu")
    handle = load(LoadSpec("demo", quantization), tiny.DEMO_FOLDER, there)
    held = handle.model.get_memory_footprint(return_buffers=False)
    assert model_bytes(tiny.DEMO_FOLDER, there.dtype, quantization) == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("model", ["the demo model, whose head is its embedding", "qwen3"])
def test_the_size_of_weights_for_a_cpu_s_own_products_is_known(model, quantization, tmp_path):
    folder = tiny.save(model, tmp_path / "m", wide=True) if model == "qwen3" else tiny.DEMO_FOLDER
    handle = load(LoadSpec("demo", quantization), folder, machine("cpu"))
    assert handle.plan.packed
    assert ModelSource(handle.spec, folder, machine("cpu")).size() == pytest.approx(packed_bytes(handle.model), rel=0.1)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("family", tiny.families("qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe"))
def test_the_size_of_a_mixture_of_experts_is_known(family, quantization, tmp_path):
    """Wider than the others, so that experts weigh something."""
    folder = tiny.save(family, tmp_path / "m", wide=True)
    handle = load(LoadSpec(family, quantization), folder, CPU)
    held = packed_bytes(handle.model)
    assert ModelSource(handle.spec, folder, CPU).size() == pytest.approx(held, rel=0.05)


def test_heads_that_are_left_on_disk_are_not_counted(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    before = model_bytes(folder, torch.bfloat16, "none")
    weights = load_file(folder / "model.safetensors") | {"mtp.layers.0.mlp.up_proj.weight": torch.zeros(64, 64)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert model_bytes(folder, torch.bfloat16, "none") == before


def test_the_cache_of_a_request_is_counted_exactly(tmp_path):
    config = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"head_dim": 128, "intermediate_size": 9728}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    per_token = request_bytes(tmp_path, torch.bfloat16, 1001, 0) - request_bytes(tmp_path, torch.bfloat16, 1000, 0)
    assert per_token == 2 * 36 * 8 * 128 * 2


def test_the_length_of_a_prompt_is_guessed_within_a_factor_of_two(demo):
    text = "Describe this image in a few words, please. " * 4
    pictures = [draw("circle", "red", "blue", (256, 256))] * 3
    counted = encode(demo, Request(demo.spec, text), pictures, None).tokens
    assert counted / 2 < prompt_tokens(text, pictures, [], 256 * 256) < 2 * counted
    large = [Image.new("RGB", (4000, 4000))]
    assert prompt_tokens("", large, [], 1024 * 784) == prompt_tokens("", large, [], 1024 * 784)
    assert prompt_tokens("", large, [], 1024 * 784) == 1024 + 64


def test_running_out_while_loading_names_what_was_needed_what_is_free_and_what_fits():
    error = str(why_out_of_memory(LoadSpec("Big", "none"), "load", SIZES, GB, 6.5 * GB))
    assert "load with Big (none): it needs about 10.0 GB, and 6.5 GB are free" in error
    assert "8bit needs about 5.0 GB" in error
    assert "4bit needs about 3.0 GB" in error


def test_only_what_fits_is_advised():
    error = str(why_out_of_memory(LoadSpec("Big", "none"), "load", SIZES, GB, 4.5 * GB))
    assert "8bit" not in error
    assert "4bit needs about 3.0 GB" in error
    assert "quantization" not in str(why_out_of_memory(LoadSpec("Big", "4bit"), "load", SIZES, GB, GB))


def test_running_out_while_answering_counts_the_model_as_room_that_a_smaller_one_would_leave():
    error = str(why_out_of_memory(LoadSpec("Big", "none"), "answer", SIZES, 2 * GB, GB))
    assert "it needs about 2.0 GB, and 1.0 GB are free" in error
    assert "8bit needs about 5.0 GB" in error


def test_comfyui_knows_the_error_for_what_it_is():
    assert issubclass(OutOfMemoryError, torch.cuda.OutOfMemoryError)
    assert is_out_of_memory(OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"head_dim": 10**300},
        {"head_dim": -8},
        {"head_dim": 8.0},
        {"head_dim": True},
    ],
)
def test_a_configuration_that_makes_no_sense_is_for_the_loader_to_refuse(tmp_path, odd):
    sound = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 9}
    (tmp_path / "config.json").write_text(json.dumps({**sound, **odd}))
    assert 0 <= request_bytes(tmp_path, torch.float32, 100, 10) < 10**9
