import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import draw

from qwenvl import capabilities
from qwenvl.capabilities import Machine, machine
from qwenvl.decode import Decoder
from qwenvl.loader import (
    PICTURE_PIXELS,
    LoadError,
    LoadPlan,
    PatchLinear,
    load,
    load_options,
    park,
    patch_embedding_as_matmul,
    plan_load,
)
from qwenvl.media import Video
from qwenvl.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")


def ignore(*_):
    pass


AMPERE = Machine("cuda:1", torch.bfloat16, "", (8, 6))
APPLE = Machine("mps", torch.float16, "")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(capabilities, "has_package", lambda name: False)


@pytest.fixture
def all_packages(monkeypatch):
    monkeypatch.setattr(capabilities, "has_package", lambda name: True)


def test_what_the_machine_has_is_used_as_asked(all_packages):
    spec = LoadSpec("m", "4bit", "flash_attention_2")
    assert plan_load(spec, AMPERE) == LoadPlan("4bit", "flash_attention_2")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_that_cannot_be_had_falls_back_to_none_with_the_reason(no_packages, quantization):
    plan = plan_load(LoadSpec("m", quantization), AMPERE)
    assert plan.quantization == "none"
    assert quantization in plan.fallbacks[0]
    assert "bitsandbytes is not installed" in plan.fallbacks[0]


def test_bitsandbytes_is_not_tried_on_apple_gpus(all_packages):
    assert plan_load(LoadSpec("m", "4bit"), APPLE).quantization == "none"


@pytest.mark.parametrize("where", [CPU, APPLE])
def test_flash_attention_falls_back_to_sdpa_where_there_is_no_gpu_for_it(all_packages, where):
    plan = plan_load(LoadSpec("m", attention="flash_attention_2"), where)
    assert plan.attention == "sdpa"
    assert where.device in plan.fallbacks[0]


def test_flash_attention_that_is_not_installed_says_how_to_install_it(no_packages):
    plan = plan_load(LoadSpec("m", attention="flash_attention_2"), AMPERE)
    assert "pip install flash-attn" in plan.fallbacks[0]


def test_auto_attention_is_sdpa_and_no_fallback(no_packages):
    assert plan_load(LoadSpec("m", attention="auto"), AMPERE) == LoadPlan("none", "sdpa")


def test_weights_go_to_one_named_device():
    assert load_options(LoadPlan("none", "eager"), AMPERE) == {
        "dtype": torch.bfloat16,
        "attn_implementation": "eager",
        "device_map": {"": "cuda:1"},
    }


def test_4bit_computes_in_the_machine_dtype_with_double_quantization():
    options = load_options(LoadPlan("4bit", "sdpa"), AMPERE)["quantization_config"]
    assert options.load_in_4bit
    assert options.bnb_4bit_quant_type == "nf4"
    assert options.bnb_4bit_use_double_quant
    assert options.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_embedding_gives_the_same_embeddings_as_the_convolution(family):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(tiny.config(family)).eval()
    embed = next(module for name, module in model.named_modules() if name.endswith("patch_embed"))
    patches = torch.randn(12, embed.proj.weight[0].numel())
    weights = embed.proj.weight.data_ptr()
    before = embed(patches)
    patch_embedding_as_matmul(model)
    assert isinstance(embed.proj, PatchLinear)
    assert embed.proj.weight.data_ptr() == weights, "no second copy"
    torch.testing.assert_close(embed(patches), before, atol=1e-5, rtol=1e-5)


def test_the_shipped_model_runs_its_patch_embedding_as_a_matrix_product(demo):
    embeds = [module for name, module in demo.model.named_modules() if name.endswith("patch_embed")]
    assert [type(embed.proj) for embed in embeds] == [PatchLinear]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vision_family_loads_by_its_config_and_reads_pictures_and_videos(family, tmp_path):
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    assert type(handle.model.config).model_type == family
    frames = Video(torch.zeros(4, 64, 64, 3, dtype=torch.uint8).numpy(), (0.0, 1.0, 2.0, 3.0), 4.0)
    request = Request(LoadSpec(family), "What is it?", sampling=Sampling(do_sample=False, max_new_tokens=3))
    prompt = encode(handle, request, [draw("circle", "red", "blue")], [frames])
    assert {"pixel_values", "pixel_values_videos"} <= set(prompt.inputs)
    assert len(Decoder(handle.model, "sdpa").generate(prompt.inputs, request.sampling, None, ignore, ignore).ids) > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_text_family_loads_by_its_config_and_has_no_processor(family, tmp_path):
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    assert handle.processor is None
    assert type(handle.model.config).model_type == family


def test_the_checkpoint_s_sampling_defaults_do_not_mix_into_ours(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m", do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.9)
    plain = tiny.save("qwen3", tmp_path / "plain")
    sampling = Sampling(do_sample=False, max_new_tokens=40)
    made = []
    for each in (folder, plain):
        handle = load(LoadSpec("m"), each, CPU)
        prompt = encode(handle, Request(handle.spec, "Hello"), [], None)
        made.append(Decoder(handle.model, "sdpa").generate(prompt.inputs, sampling, None, ignore, ignore).ids)
    assert made[0] == made[1]


def test_a_checkpoint_made_for_large_pictures_gets_the_pack_s_picture_size(tmp_path):
    folder = tiny.save("qwen3_vl", tmp_path / "m")
    file = folder / "preprocessor_config.json"
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    handle = load(LoadSpec("m"), folder, CPU)
    grids = []
    for side in (64, 4000):
        prompt = encode(handle, Request(handle.spec, "?"), [draw("circle", "red", "blue", (side, side))], None)
        grids.append(prompt.inputs["image_grid_thw"][0].tolist())
    small, large = (16 * 16 * height * width for _, height, width in grids)
    assert PICTURE_PIXELS[0] <= small <= PICTURE_PIXELS[0] * 1.2
    assert PICTURE_PIXELS[1] * 0.8 <= large <= PICTURE_PIXELS[1]


def test_a_checkpoint_made_for_small_pictures_keeps_its_size(demo):
    prompt = encode(demo, Request(demo.spec, "?"), [draw("circle", "red", "blue", (1024, 1024))], None)
    assert prompt.inputs["image_grid_thw"][0].tolist() == [1, 16, 16]


def test_a_family_that_transformers_does_not_know_is_an_error_that_says_so(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    with pytest.raises(LoadError, match=r"not understood by transformers \d"):
        load(LoadSpec("m"), folder, CPU)


def test_a_model_that_writes_no_text_is_an_error(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny.DEMO_FOLDER, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(LoadError, match="'vit' model, which does not generate text"):
        load(LoadSpec("m"), folder, CPU)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize(("quantization", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_bitsandbytes_really_quantizes_and_the_demo_still_sees(quantization, kind, demo):
    handle = load(LoadSpec("demo", quantization), tiny.DEMO_FOLDER, machine("cpu"))
    kinds = {type(module).__name__ for module in handle.model.modules()}
    assert kind in kinds
    size, plain = (each.model.get_memory_footprint() for each in (handle, demo))
    assert size < 0.75 * plain
    request = Request(handle.spec, "Describe this image.", sampling=Sampling(do_sample=False, max_new_tokens=20))
    prompt = encode(handle, request, [draw("circle", "red", "blue")], None)
    ids = Decoder(handle.model, "sdpa").generate(prompt.inputs, request.sampling, None, ignore, ignore).ids
    assert handle.tokenizer.decode(ids) == "a red circle on a blue background"


def answer(handle):
    """What the demo model says of a red circle, by a decoder of its own."""
    handle.decoder = Decoder(handle.model, "sdpa")
    request = Request(handle.spec, "Describe this image.", sampling=Sampling(do_sample=False, max_new_tokens=20))
    prompt = encode(handle, request, [draw("circle", "red", "blue")], None)
    return handle.tokenizer.decode(handle.decoder.generate(prompt.inputs, request.sampling, None, ignore, ignore).ids)


def test_a_model_that_was_parked_comes_back_as_it_was():
    handle = load(LoadSpec("demo"), tiny.DEMO_FOLDER, Machine("cpu", torch.float32, ""))
    # Another name for the CPU, so that it counts as a device that weights can be moved away from.
    handle.machine = replace(handle.machine, device="cpu:0")
    assert answer(handle) == "a red circle on a blue background"
    decoder = weakref.ref(handle.decoder)
    bring_back = park(handle, free_ram=10**12)
    gc.collect()
    assert decoder() is None, "its buffers and fused weights went"
    assert not any("_fused_into" in vars(module) for module in handle.model.modules())
    assert answer(bring_back()) == "a red circle on a blue background"


def test_what_cannot_or_should_not_wait_in_ram_is_dropped(demo):
    size = sum(weight.numel() * weight.element_size() for weight in demo.model.parameters())
    elsewhere = replace(demo, machine=Machine("cpu:0", torch.float32, ""))
    assert park(demo, free_ram=10**12) is None, "it is in RAM already"
    assert park(elsewhere, free_ram=size) is None, "the RAM is short"
    assert park(replace(elsewhere, plan=LoadPlan("4bit", "sdpa")), free_ram=10**12) is None
