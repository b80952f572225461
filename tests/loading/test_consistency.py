import json
import re
from types import SimpleNamespace

import pytest
import torch
from seeds import DEMO

from qwenvl.errors import LoadError
from qwenvl.loading.consistency import require_backing, why_unfit


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("text_config", "num_hidden_layers", 10**9), ("vision_config", "deepstack_visual_indexes", [0] * 10**5)],
)
def test_a_model_of_more_parts_than_its_weights_have_is_never_built(folder, section, name, value):
    config = json.loads((folder / "config.json").read_text())
    config[section][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"{name} is more than they can hold"):
        require_backing(folder, lambda: pytest.fail("it would take for ever"))


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
