import json

import pytest
import torch
from seeds import DEMO

from qwenvl.sound import LoadError, Understood, require_backing


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), Exception("of tokenizers"), RuntimeError("odd")])
def test_what_transformers_raises_about_a_folder_is_a_load_error(error):
    with pytest.raises(LoadError, match=r"^m cannot be read: .+") as caught, Understood("m cannot be read"):
        raise error
    assert caught.value.__cause__ is error


class Cancel(Exception):  # noqa: N818
    """As ComfyUI's own, an Exception of no kind of ours."""


@pytest.mark.parametrize(
    "error",
    [Cancel(), KeyboardInterrupt(), MemoryError(), torch.cuda.OutOfMemoryError("x"), LoadError("m holds nothing")],
)
def test_what_is_not_the_folder_s_fault_passes(error):
    with pytest.raises(type(error)) as caught, Understood("m cannot be read"):
        raise error
    assert caught.value is error


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
