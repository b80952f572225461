import json
import re
from types import SimpleNamespace

import pytest
import torch
from seeds import DEMO

from qwenvl.errors import LoadError
from qwenvl.loading.consistency import require_backing, require_claims, why_unfit


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("section", "name", "value", "why"),
    [
        ("text_config", "num_hidden_layers", 10**9, "than any model has"),
        ("vision_config", "depth", 1025, "than any model has"),
        ("text_config", "num_experts", 4097, "than any model has"),
        ("text_config", "num_experts", 4096, "than they can hold"),
        ("vision_config", "deepstack_visual_indexes", [0] * 10**5, "than they can hold"),
        ("vision_config", "deepstack_visual_indexes", [2**48], "than any model has"),
        ("vision_config", "hidden_size", -(2**48), "than any model has"),
        ("text_config", "head_dim", 10**4000, "than any model has"),
        ("text_config", "rope_scaling", {"factor": 2**48}, "than any model has"),
    ],
)
def test_a_configuration_of_more_than_its_weights_or_any_model_has_is_refused(folder, section, name, value, why):
    config = json.loads((folder / "config.json").read_text())
    config[section][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"is more {why}"):
        require_claims(folder)


def test_what_a_configuration_says_in_numbers_that_are_not_whole_is_left_to_who_reads_it(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"a": 1e300, "b": True, "c": None, "d": [[]], "e": "x", "num_hidden_layers": 2.5}
    (folder / "config.json").write_text(json.dumps(config))
    require_claims(folder)


def test_a_model_that_is_larger_than_its_weights_is_refused_and_takes_no_memory(folder):
    with pytest.raises(LoadError, match=r"it has 1\.0e\+15 numbers, and they have 2\.8e\+06 bytes"):
        require_backing(folder, lambda: torch.nn.Linear(10**6, 10**9, bias=False))
    require_backing(folder, lambda: torch.nn.Linear(1000, 1000))


def test_buffers_count_too(folder):
    class Buffer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.zeros(10**12))

    with pytest.raises(LoadError, match="numbers"):
        require_backing(folder, Buffer)


VISION = SimpleNamespace(patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
SIZES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"shortest_edge": 65536, "longest_edge": 1 << 24}


@pytest.mark.parametrize(
    ("has", "pixels", "reason"),
    [
        ({}, {}, None),
        ({"patch_size": 14}, {}, "its processor has patch_size 14, and config.json has patch_size 16"),
        ({"merge_size": 1}, {}, "its processor has merge_size 1, and config.json has spatial_merge_size 2"),
        ({"temporal_patch_size": 10**500}, {}, r"temporal_patch_size \d{10,99}, and"),
        ({}, {"shortest_edge": 0}, "makes 0 to 16777216 pixels"),
        ({}, {"shortest_edge": 1 << 25, "longest_edge": 1 << 26}, "makes 33554432 to 67108864 pixels"),
        ({}, {"longest_edge": 1000}, "makes 65536 to 1000 pixels"),
    ],
)
def test_a_processor_serves_the_vision_tower_that_it_was_made_for(has, pixels, reason):
    found = why_unfit(SimpleNamespace(**SIZES | has, size=PIXELS | pixels), VISION)
    assert found is None if reason is None else re.search(reason, found)
