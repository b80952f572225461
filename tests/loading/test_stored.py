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
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.models.checkpoint import INDEX, WHOLE
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
    made = tiny.decoder(handle.model).generate(prompt.inputs, request.sampling, None, ignore, ignore)
    return handle.tokenizer.decode(made.ids)


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
