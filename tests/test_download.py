import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qwenvl.catalog import DEMO, find
from qwenvl.download import UNFINISHED, DownloadError, fetch, weight_headers, why_incomplete


@pytest.fixture
def folder(tmp_path):
    """A whole model in one file."""
    return shutil.copytree(find(DEMO).folder, tmp_path / "model")


@pytest.fixture
def sharded(folder):
    """The same in two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(8)}, folder / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_model_is_whole(folder, sharded):
    assert why_incomplete(folder) is None
    assert {name: tensor["shape"] for name, tensor in weight_headers(sharded)} == {"w0": [8], "w1": [8]}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_noticed(folder, name):
    (folder / name).unlink()
    assert why_incomplete(folder)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert why_incomplete(sharded) == "model-00002-of-00002.safetensors is missing"


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_was_cut_is_noticed(folder, size):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:size])
    assert "model.safetensors" in why_incomplete(folder)


def test_a_download_that_was_cut_off_is_not_taken_for_whole(folder):
    (folder / UNFINISHED).touch()
    assert why_incomplete(folder) == "its download has not finished"


def test_pickled_weights_are_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert why_incomplete(folder) == "it holds no .safetensors weights"


@pytest.mark.parametrize("outside", ["/etc/passwd", "../other/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_refused(sharded, outside):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": outside}}))
    assert "no plain file name" in why_incomplete(sharded)


@pytest.mark.parametrize("broken", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_a_reason_not_a_crash(sharded, broken):
    (sharded / "model.safetensors.index.json").write_text(broken)
    assert "cannot be read" in why_incomplete(sharded)


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_where_the_files_belong(tmp_path, monkeypatch):
    import huggingface_hub.constants

    # A port on which nothing listens: the connection is refused at once.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: huggingface_hub.hf_api.HfApi(endpoint="http://127.0.0.1:9"))
    folder = tmp_path / "owner--name"
    with pytest.raises(
        DownloadError, match=r"owner/name could not be downloaded.*put the model's files into"
    ) as caught:
        fetch("owner/name", folder)
    assert str(folder) in str(caught.value)
    assert not folder.exists()
