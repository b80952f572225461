"""Whole folders whose weights lie there in another way, or hold what config.json does not say: loaded and asked."""

import json
import re
import shutil

import pytest
import tiny
import torch
from pictures import draw
from safetensors.torch import load_file, save_file

from qwenvl.errors import LoadError
from qwenvl.files.headers import INDEX, WHOLE
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.models.download import why_incomplete
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
ANSWER = "a red circle on a blue background"


def ignore(*_):
    pass


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "m")


def answer(folder):
    handle = load(LoadSpec("m"), folder, CPU)
    request = Request(handle.spec, "Describe this image.", sampling=Sampling(do_sample=False, max_new_tokens=40))
    prompt = encode(handle, request, [draw("circle", "red", "blue")])
    result = tiny.decoder(handle.model).generate(prompt.inputs, request.sampling, None, ignore, ignore)
    return handle.tokenizer.decode(result.ids)


def weights(folder):
    return load_file(folder / WHOLE)


def save(folder, tensors, name=WHOLE):
    save_file(tensors, folder / name, {"format": "pt"})


def shards(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """The model in several files; returns where each of its tensors is."""
    tensors = weights(folder)
    (folder / WHOLE).unlink()
    places = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save(folder, {name: tensors[name] for name, place in places.items() if place == file}, file)
    return places


def index(folder, places, **more):
    (folder / INDEX).write_text(json.dumps({"weight_map": places, **more}))


def _index_of_another(folder):
    index(folder, dict.fromkeys(weights(folder), "model-00001-of-00009.safetensors"), metadata={})


def _broken_index(folder):
    (folder / INDEX).write_text("{")


def _shards_beside(folder):
    """Of something else, with their index: model.safetensors comes first."""
    save(folder, {"x": torch.zeros(9)}, "model-00001-of-00001.safetensors")
    index(folder, {"x": "model-00001-of-00001.safetensors"}, metadata={})


def _shards(folder):
    index(folder, shards(folder), metadata={})


def _index_without_metadata(folder):
    index(folder, shards(folder))


def _shards_without_an_index(folder):
    shards(folder)


def _shards_and_a_stale_index(folder):
    places = shards(folder)
    index(folder, dict.fromkeys(places, "model-00001-of-00009.safetensors"), metadata={})


def _one_shard(folder):
    (folder / WHOLE).rename(folder / "model-00001-of-00001.safetensors")


def _variant(folder):
    (folder / WHOLE).rename(folder / "model.fp16.safetensors")


def _variant_in_shards(folder):
    shards(folder, ("model-00001-of-00002.bf16.safetensors", "model-00002-of-00002.bf16.safetensors"))


def _older_variant_in_shards(folder):
    shards(folder, ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"))


def _named_after_itself(folder):
    (folder / WHOLE).rename(folder / "My-Finetune-0.1.safetensors")


def _as_the_newest_are_called(folder):
    shards(folder, ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"))


def _variant_beside(folder):
    save(folder, {"x": torch.zeros(9)}, "model.fp16.safetensors")


def _another_layout_beside_shards(folder):
    save(folder, {"tok_embeddings.weight": torch.zeros(9)}, "consolidated.safetensors")
    shards(folder)


def _pickles_beside(folder):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    (folder / "pytorch_model.bin").write_bytes(b"x")


WAYS = [way for name, way in list(globals().items()) if name.startswith("_") and hasattr(way, "__code__")]


@pytest.mark.parametrize("lay", WAYS)
def test_weights_are_read_however_they_lie(folder, lay):
    lay(folder)
    before = sorted(folder.iterdir())
    assert why_incomplete(folder) is None
    assert answer(folder) == ANSWER
    assert sorted(folder.iterdir()) == before, "nothing is written into a folder that may not be ours"


def test_the_end_of_an_answer_is_that_of_the_folder_s_own_settings(folder):
    """They lie beside the weights, and transformers looks for them where the index is."""
    shards(folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [7, 1000]}))
    handle = load(LoadSpec("m"), folder, CPU)
    assert 7 in handle.model.generation_config.eos_token_id
    assert handle.model.name_or_path == str(folder)


def test_a_shard_that_is_missing_is_named_without_an_index_too(folder):
    shards(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert why_incomplete(folder) == "model-00001-of-00002.safetensors is missing"


def test_several_sets_of_weights_are_not_guessed_among(folder):
    for name in ("model.fp16.safetensors", "model.fp32.safetensors"):
        shutil.copy(folder / WHOLE, folder / name)
    (folder / WHOLE).unlink()
    reason = why_incomplete(folder)
    assert reason == (
        "it holds several sets of weights (model.fp16.safetensors, model.fp32.safetensors), and none is called "
        "model.safetensors: leave the one that is to be read"
    )


@pytest.mark.parametrize("family", tiny.families(*tiny.SEEING, "qwen3", "qwen2"))
@pytest.mark.parametrize("part", ["text_config", None])
def test_embeddings_are_the_output_head_where_any_part_of_the_config_says_so(family, part, tmp_path):
    folder = tiny.save(family, tmp_path / "m")
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    save(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config.get("text_config", {}).pop("tie_word_embeddings", None)
    config.get(part, config)["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = load(LoadSpec("m"), folder, CPU).model
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_head_that_is_stored_is_read_whatever_the_text_part_says(tmp_path):
    folder = tiny.save("qwen3_vl", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model = load(LoadSpec("m"), folder, CPU).model
    assert torch.equal(model.get_output_embeddings().weight, weights(folder)["lm_head.weight"])


def test_a_head_that_is_nowhere_is_an_error(tmp_path):
    folder = tiny.save("qwen3_vl", tmp_path / "m")
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    save(folder, tensors)
    with pytest.raises(LoadError, match=re.escape("lack 1 of the weights")):
        load(LoadSpec("m"), folder, CPU)


PROJECTION = "model.language_model.layers.0.mlp.down_proj.weight"


def add(folder, **tensors):
    save(folder, weights(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()})


def _scaled(folder, suffix, stored=torch.float8_e4m3fn):
    """One projection quantized, its scale beside it."""
    tensors = weights(folder)
    weight = tensors[PROJECTION].float()
    scale = weight.abs().max() / 448
    save(folder, tensors | {PROJECTION: (weight / scale).to(stored), PROJECTION.removesuffix("weight") + suffix: scale})


SCALES = {
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale": "FP8, INT8 or FP4 with scales",
    "input_scale": "FP8, INT8 or FP4 with scales",
    "weight_scale_2": "FP8, INT8 or FP4 with scales",
    "scale_weight": "as ComfyUI's own loaders read it",
    "comfy_quant": "as ComfyUI's own loaders read it",
    "SCB": "bitsandbytes in 8 bits",
    "weight_format": "bitsandbytes in 8 bits",
    "weight.absmax": "bitsandbytes in 4 bits",
    "weight.quant_map": "bitsandbytes in 4 bits",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes in 4 bits",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight._data": "some quantization",
}


@pytest.mark.parametrize("suffix", SCALES)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16])
def test_scales_without_a_word_of_them_in_the_config_are_an_error(folder, suffix, stored):
    _scaled(folder, suffix, stored)
    with pytest.raises(LoadError, match=re.escape(SCALES[suffix]) + ".* has no quantization_config"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_weights_that_are_no_plain_numbers_are_an_error_where_nothing_says_what_they_are(folder, stored):
    tensors = weights(folder)
    save(folder, tensors | {PROJECTION: tensors[PROJECTION].float().to(stored)})
    with pytest.raises(LoadError, match=rf"stored as \w+: {re.escape(PROJECTION)} is among them"):
        load(LoadSpec("m"), folder, CPU)


def test_a_mark_of_comfyui_s_files_is_known_without_a_layer(folder):
    add(folder, scaled_fp8=torch.zeros(2))
    with pytest.raises(LoadError, match="as ComfyUI's own loaders read it"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize("stored", ["fp8", "compressed-tensors", "bitsandbytes-8bit"])
def test_a_quantized_folder_that_lost_its_word_of_it_is_an_error(stored, tmp_path):
    """As a merge or a copy leaves it; with it, the same folder is loaded (test_precision.py)."""
    folder = tiny.save_demo(tmp_path / "m", stored)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="seem to be quantized"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("text_config", "num_hidden_layers", "3 layers"),
        ("vision_config", "depth", "blocks"),
        ("vision_config", "deepstack_visual_indexes", "no place for"),
    ],
)
def test_more_layers_than_the_config_names_are_an_error(folder, section, name, said):
    config = json.loads((folder / "config.json").read_text())
    value = config[section][name]
    config[section][name] = value[:-1] if isinstance(value, list) else value - 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=said):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize("family", tiny.families("qwen3", "qwen2_moe", "qwen3_5_text", "qwen3_vl_moe"))
def test_in_every_kind_of_model(family, tmp_path):
    folder = tiny.save(family, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] -= 1
    text.get("layer_types", [0]).pop()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"config.json says that the model has \d layers, and its weights have more"):
        load(LoadSpec("m"), folder, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "model__language_model__layers__0__self_attn__q_proj__bias",
        "model__language_model__layers__1__mlp__down_proj__lora_A__weight",
        "model__language_model__layers__1__self_attn__sinks",
    ],
)
def test_weights_within_a_layer_that_the_model_has_no_place_for_are_an_error(folder, name):
    add(folder, **{name: torch.zeros(64)})
    with pytest.raises(LoadError, match=rf"no place for 1 of its weights, {re.escape(name.replace('__', '.'))}"):
        load(LoadSpec("m"), folder, CPU)


HARMLESS = (
    "mtp__layers__0__mlp__down_proj__weight",
    "model__mtp__layers__9__mlp__down_proj__weight",
    "talker__model__layers__30__mlp__down_proj__weight",
    "model__language_model__layers__0__self_attn__rotary_emb__inv_freq",
    "model__language_model__layers__0__self_attn__k_scale",
    "model__language_model__layers__0__self_attn__v_scale",
    "v_head__summary__weight",
    "score__weight",
)


@pytest.mark.parametrize("name", HARMLESS)
def test_heads_and_buffers_that_are_known_to_be_extra_are_passed_over(folder, name):
    add(folder, **{name: torch.zeros(4)})
    assert answer(folder) == ANSWER


def test_a_head_that_is_tied_may_be_stored_all_the_same(folder):
    tensors = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    embeddings = tensors["model.language_model.embed_tokens.weight"]
    save(folder, tensors | {"lm_head.weight": embeddings.clone()})
    assert config["tie_word_embeddings"]
    assert answer(folder) == ANSWER


def test_a_text_model_may_have_the_tower_of_the_one_that_it_was_made_from(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    add(folder, model__visual__blocks__40__norm1__weight=torch.zeros(4), visual__merger__mlp__0__bias=torch.zeros(4))
    assert load(LoadSpec("m"), folder, CPU).processor is None


@pytest.mark.parametrize("family", tiny.families(*tiny.CLASSES))
def test_no_family_s_own_weights_are_taken_for_others(family, tmp_path):
    load(LoadSpec("m"), tiny.save(family, tmp_path / "m"), CPU)
