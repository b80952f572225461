import json
import shlex

import pytest

from qwenvl.__main__ import main
from qwenvl.cli.serve_info import served
from qwenvl.models import catalog
from qwenvl.models.custom import custom_engines


@pytest.mark.parametrize(
    ("weights_gb", "gpu_gb", "gpus"),
    [(4, 24, 1), (9, 24, 1), (17.5, 24, 2), (17.5, 32, 1), (67, 24, 4), (67, 80, 2), (0, 24, 1)],
)
def test_large_models_get_as_many_gpus_as_they_need(weights_gb, gpu_gb, gpus):
    found = served("owner/name", True, weights_gb, gpu_gb)
    assert found.gpus == gpus
    for name, option in (("vLLM", "--tensor-parallel-size"), ("SGLang", "--tp")):
        words = shlex.split(found.commands[name])
        assert (option in words) == (gpus > 1)
        if gpus > 1:
            assert words[words.index(option) + 1] == str(gpus)


def test_pictures_are_allowed_for_models_that_see_and_mean_nothing_to_others():
    for vision in (True, False):
        words = shlex.split(served("Qwen/Qwen3-VL-4B-Instruct", vision, 9, 24).commands["vLLM"])
        assert ("--limit-mm-per-prompt" in words) == vision
    seen = shlex.split(served("Qwen/Qwen3-VL-4B-Instruct", True, 9, 24).commands["vLLM"])
    assert json.loads(seen[seen.index("--limit-mm-per-prompt") + 1])["image"] >= 64


@pytest.mark.parametrize("vision", [True, False])
def test_the_entry_that_is_printed_is_one_that_is_read(vision, caplog, tmp_path):
    found = served("Qwen/Qwen3-VL-4B-Instruct", vision, 9, 24, "qwen3_vl")
    for name, command in found.commands.items():
        file = tmp_path / f"{name}.json"
        file.write_text(found.entry(name))
        (engine,) = custom_engines(file)
        port = shlex.split(command)[shlex.split(command).index("--port") + 1]
        assert (engine.place, engine.model, engine.vision) == (f"127.0.0.1:{port}", found.repo_id, vision)
        assert engine.family == "qwen3_vl"
    assert caplog.text == ""


def test_every_model_of_the_lists_has_its_two_commands(capsys):
    assert main(["serve-info"]) == 0
    out = capsys.readouterr().out
    for name, model in {**catalog.vision_models(), **catalog.text_models()}.items():
        assert (f"{name}: " in out) == bool(model.repo_id)
        if model.repo_id:
            assert out.count(f" {model.repo_id} ") == 2
    assert "\nQwen3-VL-4B-Instruct: 1 GPU\n" in f"\n{out}"
    assert "Qwen3-VL-32B-Instruct: 4 GPUs\n" in out
    assert catalog.DEMO not in out


def test_one_model_is_told_of_with_its_entries_and_an_unknown_one_is_an_error(capsys):
    assert main(["serve-info", "Qwen3-VL-32B-Instruct", "--gpu-gb", "80"]) == 0
    out = capsys.readouterr().out
    assert "--tensor-parallel-size 2" in out
    assert '"base_url": "http://127.0.0.1:8000/v1"' in out
    assert out.count('"family": "qwen3_vl"') == 2
    assert "Qwen3-VL-4B" not in out
    assert main(["serve-info", "no such model"]) == 2
    assert "no such model" in capsys.readouterr().err
