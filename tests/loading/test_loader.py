import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib.metadata import version

import pytest
import tiny
import torch
from accelerate import dispatch_model
from pictures import ROOT, draw
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qwenvl.decoding.decoder import best_tier
from qwenvl.decoding.patch_embedding import PatchLinear, patch_embedding_as_matmul
from qwenvl.decoding.static_cache import why_not_generic
from qwenvl.loading import capabilities, loader
from qwenvl.loading.capabilities import Machine, machine
from qwenvl.loading.loader import (
    PICTURE_PIXELS,
    LoadError,
    LoadPlan,
    load,
    load_options,
    park,
    plan_load,
)
from qwenvl.media.media import Video
from qwenvl.models.checkpoint import Checkpoint
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")


def ignore(*_):
    pass


AMPERE = Machine("cuda:1", torch.bfloat16, "", (8, 6))
APPLE = Machine("mps", torch.float16, "")


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(capabilities, "has_package", lambda name: False)


@pytest.fixture
def all_packages(monkeypatch):
    monkeypatch.setattr(capabilities, "has_package", lambda name: True)


def plan(spec, where):
    """For a checkpoint that brings nothing special."""
    return plan_load(spec, where, Checkpoint(tiny.DEMO_FOLDER, "qwen3_vl"))


def test_quantization_that_cannot_be_had_falls_back_to_none_with_the_reason(no_packages):
    result = plan(LoadSpec("m", "4bit"), AMPERE)
    assert result.quantization == "none"
    assert result.fallbacks == (
        "4bit is not possible here: bitsandbytes is not installed (pip install bitsandbytes); using none instead",
    )


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe_text"])
def test_a_family_that_this_transformers_is_too_old_for_names_the_version_that_has_it(family, monkeypatch, tmp_path):
    """Really too old in the tests on the oldest transformers; elsewhere only its version is another."""
    if tiny.known(family):
        monkeypatch.setattr(loader, "version", lambda package: "5.1.3")
    installed = loader.version("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(
        LoadError, match=rf"needs transformers 5\.2 or later, and {installed} is installed: pip install"
    ):
        load(LoadSpec("m"), tmp_path, CPU)


def test_weights_go_to_one_named_device():
    assert load_options(LoadPlan("none", "eager"), AMPERE) == {
        "dtype": torch.bfloat16,
        "attn_implementation": "eager",
        "device_map": {"": "cuda:1"},
    }


@pytest.mark.parametrize("family", tiny.families(*tiny.SEEING))
def test_the_patch_embedding_gives_the_same_embeddings_as_the_convolution(family):
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


@pytest.mark.parametrize("family", tiny.families(*tiny.SEEING))
def test_every_vision_family_loads_by_its_config_and_reads_pictures_and_videos(family, tmp_path):
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    assert type(handle.model.config).model_type == family
    frames = Video(torch.zeros(4, 64, 64, 3, dtype=torch.uint8).numpy(), (0.0, 1.0, 2.0, 3.0), 4.0)
    request = Request(LoadSpec(family), "What is it?", sampling=Sampling(do_sample=False, max_new_tokens=3))
    prompt = encode(handle, request, [draw("circle", "red", "blue")], [frames])
    assert {"pixel_values", "pixel_values_videos"} <= set(prompt.inputs)
    assert len(tiny.decoder(handle.model).generate(prompt.inputs, request.sampling, None, ignore, ignore).ids) > 0


@pytest.mark.parametrize(
    "family", tiny.families(*(one_family for one_family in tiny.CLASSES if one_family not in tiny.SEEING))
)
def test_every_text_family_loads_by_its_config_and_has_no_processor(family, tmp_path):
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    assert handle.processor is None
    assert type(handle.model.config).model_type == family


def test_the_checkpoint_s_sampling_defaults_do_not_mix_into_ours(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m", do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.9)
    plain = tiny.save("qwen3", tmp_path / "plain")
    sampling = Sampling(do_sample=False, max_new_tokens=40)
    results = []
    for value in (folder, plain):
        handle = load(LoadSpec("m"), value, CPU)
        prompt = encode(handle, Request(handle.spec, "Hello"), [], None)
        results.append(tiny.decoder(handle.model).generate(prompt.inputs, sampling, None, ignore, ignore).ids)
    assert results[0] == results[1]


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


def test_a_checkpoint_that_lacks_weights_is_an_error_and_no_random_answer(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"lack 1 of the weights that a 'qwen3' model has, model\.layers\.1\.mlp\.up_"):
        load(LoadSpec("m"), folder, CPU)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="safetensors"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_whose_layers_are_in_several_places_answers_the_same(place, demo, tmp_path):
    """As accelerate spreads it, with parts that are brought by its hooks when they are needed."""
    handle = load(LoadSpec("demo"), tiny.DEMO_FOLDER, machine("cpu"))
    layers = "model.language_model.layers"
    kept = ("model.visual", "model.language_model.embed_tokens", f"{layers}.0", f"{layers}.1", "lm_head")
    where = {**dict.fromkeys(kept, "cpu"), f"{layers}.2": place, f"{layers}.3": place}
    where |= dict.fromkeys(("model.language_model.norm", "model.language_model.rotary_emb"), "cpu")
    dispatch_model(handle.model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    tier, reason = best_tier(handle.model, tiny.decode_of(handle.model))
    assert (tier, "it is spread over several devices" in reason) == ("generate", True)
    assert why_not_generic(handle.model) == "it is spread over several devices"
    assert answer(handle) == "a red circle on a blue background"


def test_layers_that_go_to_disk_keep_their_patch_embedding(tmp_path):
    """accelerate's hooks belong to the modules that it found."""
    model = AutoModelForImageTextToText.from_pretrained(tiny.DEMO_FOLDER).eval()
    where = {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path)
    patch_embedding_as_matmul(model)
    assert isinstance(model.model.visual.patch_embed.proj, torch.nn.Conv3d)


def test_weights_that_cannot_wait_in_ram_say_so(all_packages):
    where = replace(AMPERE, offloads=True)
    assert plan(LoadSpec("m", "4bit"), where).fallbacks == (
        "4bit weights cannot wait in RAM, so all layers have to fit on the GPUs",
    )
    assert plan(LoadSpec("m"), where).fallbacks == ()


def answer(handle):
    """What the demo model says of a red circle, by a decoder of its own."""
    handle.decoder = tiny.decoder(handle.model)
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
    spread = replace(demo, machine=Machine("cpu:0", torch.float32, "", others=("cpu:1",)))
    assert park(spread, free_ram=10**12) is None, "its layers are in several places"
    elsewhere = replace(demo, machine=Machine("cpu:0", torch.float32, ""))
    assert park(demo, free_ram=10**12) is None, "it is in RAM already"
    assert park(elsewhere, free_ram=size) is None, "the RAM is short"
    assert park(replace(elsewhere, plan=LoadPlan("4bit", "sdpa")), free_ram=10**12) is None


TAKES_OLD_ACCELERATE = version("transformers").startswith("4.")
MISSING = 'import sys; sys.modules["accelerate"] = None'
TOO_OLD = """
from importlib import metadata
found = metadata.version
metadata.version = lambda name: "1.0.1" if name == "accelerate" else found(name)
"""


@pytest.mark.parametrize(
    ("lacking", "command"),
    [
        (MISSING, "accelerate is not installed (pip install accelerate)"),
        pytest.param(
            TOO_OLD,
            "accelerate 1.0.1 is too old: 1.1 or later is needed (pip install -U accelerate)",
            marks=pytest.mark.skipif(TAKES_OLD_ACCELERATE, reason="transformers 4 takes accelerate 1.0"),
        ),
    ],
    ids=["missing", "too old"],
)
def test_without_accelerate_a_model_answers_and_only_quantization_is_missed(lacking, command):
    """In a process of its own, in which the package cannot be found, or transformers does not take it."""
    ask = (
        f"{lacking}\n"
        + """
from pictures import draw, image
from qwenvl.loading import loader, precision
from qwenvl.loading.cache import ModelCache
from qwenvl.loading.capabilities import Machine
from qwenvl.models.catalog import DEMO
from qwenvl.models.checkpoint import Checkpoint
from qwenvl.comfyui.progress import NodeWatch
from qwenvl.pipeline import run
from qwenvl.request import LoadSpec, Request, Sampling
precision.why_no_form = lambda *_: "as on a GPU"
pictures = {"image1": image(draw("circle", "red", "blue"))}
question = Request(LoadSpec(DEMO, "4bit"), "Describe this image.", images=pictures, sampling=Sampling(do_sample=False))
result = run(question, ModelCache(), NodeWatch(512))
print(result.text)
print(result.stats.loaded.quantization, *result.stats.loaded.fallbacks)
spread = Machine("cuda:0", None, "", others=("cuda:1",))
try:
    loader.plan_load(LoadSpec(DEMO), spread, Checkpoint(None, "qwen3_vl"))
except loader.LoadError as error:
    print(error)
"""
    )
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=where, cwd=ROOT, check=False)
    answer, fallback, error = ran.stdout.splitlines()[-3:] if not ran.returncode else pytest.fail(ran.stderr)
    assert answer == "a red circle on a blue background"
    assert fallback.startswith("none") and command in fallback
    assert command in error


def test_a_model_that_lacks_weights_moves_nobodys_seed(tmp_path):
    """transformers gives random numbers to what it does not find, and draws them before it says so."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.DEMO_FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({name: weight for name, weight in weights.items() if name != lacking}, folder / "model.safetensors")
    before = torch.get_rng_state()
    with pytest.raises(LoadError, match="lack 1 of the weights"):
        load(LoadSpec("m"), folder, CPU)
    assert torch.equal(torch.get_rng_state(), before)
