import json
import os
import shutil

import pytest
import tiny
import transformers

from qwenvl.files.bounded_json import UnreadableError
from qwenvl.models.checkpoint import read_checkpoint, why_too_old
from qwenvl.models.families import FAMILIES

KNOWN = [family for family in FAMILIES if why_too_old(family, transformers.__version__) is None]


@pytest.fixture
def model(tmp_path):
    """Writes a folder with that config.json, and other files by name."""

    def write(config, **files):
        for name, content in {"config": config, **files}.items():
            path = tmp_path / f"{name}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def saved_config(family, folder):
    config_class = transformers.CONFIG_MAPPING[family]
    # As dictionaries: version 4 takes no configs.
    parts = {name: cls().to_dict() for name, cls in getattr(config_class, "sub_configs", {}).items()}
    config_class(**parts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", KNOWN)
def test_every_family_is_told_by_the_config_that_transformers_writes(family, tmp_path):
    checkpoint = read_checkpoint(saved_config(family, tmp_path))
    assert checkpoint.family == family
    assert checkpoint.has_vision == (family in tiny.SEEING)
    assert checkpoint.moe == ("moe" in family or family in {"qwen3_next", "qwen4_exp", "qwen4_exp_text"})
    assert checkpoint.quantized is None


@pytest.mark.parametrize("family", KNOWN)
def test_transformers_has_a_class_that_generates_text_for_every_family(family):
    config = transformers.CONFIG_MAPPING[family]
    auto = transformers.AutoModelForImageTextToText if family in tiny.SEEING else transformers.AutoModelForCausalLM
    assert config in auto._model_mapping


def test_the_demo_model_sees_and_recommends_to_be_greedy():
    checkpoint = read_checkpoint(tiny.DEMO_FOLDER)
    assert (checkpoint.family, checkpoint.has_vision, checkpoint.moe) == ("qwen3_vl", True, False)
    assert checkpoint.sampling == {"do_sample": False}


def test_a_name_that_says_otherwise_changes_nothing(tmp_path):
    folder = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "Qwen2.5-7B-Thinking-AWQ-MoE-A3B")
    there, here = read_checkpoint(folder), read_checkpoint(tiny.DEMO_FOLDER)
    assert (there.family, there.has_vision, there.moe, there.quantized) == (
        here.family,
        here.has_vision,
        here.moe,
        here.quantized,
    )


def test_a_finetune_that_kept_the_language_model_only_does_not_see(model):
    config = {"model_type": "qwen3_5", "vision_config": {"depth": 2}, "text_config": {}}
    assert read_checkpoint(model(config | {"architectures": ["Qwen3_5ForConditionalGeneration"]})).has_vision
    assert not read_checkpoint(model(config | {"architectures": ["Qwen3_5ForCausalLM"]})).has_vision
    assert not read_checkpoint(model({"model_type": "qwen3_5", "text_config": {}})).has_vision


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes-4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes-8bit"),
        ({"load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "torchao"}, "torchao"),
        ({}, None),
    ],
)
def test_how_the_weights_are_stored_is_named(model, settings, name):
    assert read_checkpoint(model({"model_type": "qwen3", "quantization_config": settings})).quantized == name
    nested = {"model_type": "qwen3_vl", "text_config": {"quantization_config": settings}}
    assert read_checkpoint(model(nested)).quantized == name


def test_recommended_sampling_is_what_the_generation_config_holds_of_it(model):
    settings = {"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2], "top_p": None, "do_sample": True}
    checkpoint = read_checkpoint(model({"model_type": "qwen3"}, generation_config=settings))
    assert checkpoint.sampling == {"temperature": 0.6, "top_k": 20, "do_sample": True}


def test_a_checkpoint_can_be_hashed_and_compared():
    assert len({read_checkpoint(tiny.DEMO_FOLDER), read_checkpoint(tiny.DEMO_FOLDER)}) == 1


@pytest.mark.parametrize("content", ["{", "[]", "3", "", '{"model_type": 3}', "{}", "\x00"])
def test_a_broken_config_is_an_error_that_names_the_file(model, content):
    with pytest.raises(UnreadableError, match=r"config\.json"):
        read_checkpoint(model(content))


def test_a_missing_config_and_one_that_is_no_text_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(UnreadableError, match=r"config\.json cannot be read: there is no such file"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path)


def test_a_transformers_that_is_too_old_is_told_with_the_command_that_mends_it():
    assert why_too_old("qwen3_5", "4.57.1") == (
        "A 'qwen3_5' model needs transformers 5.2 or later, and 4.57.1 is installed: pip install -U transformers"
    )
    for family, version in (("qwen3_5", "5.2.0.dev0"), ("qwen3_5", "5.10.1"), ("qwen3_vl", "4.57.1"), ("bert", "4.0")):
        assert why_too_old(family, version) is None


@pytest.mark.parametrize("content", ["[" * 5000, "1" * 5000, '{"a": ' * 5000])
def test_a_file_that_no_reader_follows_is_an_error_of_ours(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnreadableError, match=r"config\.json cannot be read"):
        read_checkpoint(tmp_path)


def test_a_pipe_and_a_file_without_end_are_not_read(tmp_path):
    file = tmp_path / "config.json"
    os.mkfifo(file)
    with pytest.raises(UnreadableError, match="it is not a file"):
        read_checkpoint(tmp_path)
    file.unlink()
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(UnreadableError, match="larger than"):
        read_checkpoint(tmp_path)
