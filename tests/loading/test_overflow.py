"""Whole runs of a model that computes no numbers: in float32 in its place, or an error that says what helps."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from pictures import draw, image
from safetensors.torch import load_file, save_file

from qwenvl.comfyui import host
from qwenvl.errors import NotFiniteError
from qwenvl.loading import capabilities
from qwenvl.loading.overflow import in_float32, why_not_finite
from qwenvl.models import catalog
from qwenvl.pipeline import caption, run
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import LoadSpec, Request, Sampling

ANSWER = "a red circle on a blue background"
LAYER = "model.language_model.layers.1.mlp"
# Beyond what float16 holds; what comes of it is brought back by the next product.
FACTOR = 2.0**22
GREEDY = Sampling(do_sample=False, max_new_tokens=20)


class Watch(NoWatch):
    """Keeps what was shown."""

    def __init__(self):
        self.shown = []

    def update(self, new_tokens, text, thinking=""):
        self.shown.append(text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The demo model, listed as "mine"."""
    result = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "m")
    listed = tmp_path / "custom_models.json"
    listed.write_text(json.dumps({"hf_models": {"mine": {"path": str(result)}}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", listed)
    return result


def overflow(folder, factor=FACTOR):
    """Have a product of one layer overflow in float16, and the layer compute the same all in all."""
    weights = {name: entry.float() for name, entry in load_file(folder / "model.safetensors").items()}
    weights[f"{LAYER}.up_proj.weight"] *= factor
    weights[f"{LAYER}.down_proj.weight"] /= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def poison(folder):
    weights = load_file(folder / "model.safetensors")
    weights[f"{LAYER}.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def half(monkeypatch):
    """A machine that computes in float16, as GPUs without bfloat16 do."""
    monkeypatch.setattr(capabilities, "choose_dtype", lambda *_: (torch.float16, "it has no bfloat16"))


def request(**changes):
    asked = Request(LoadSpec("mine"), "Describe this image.", images={"a": image(draw("circle", "red", "blue"))})
    return replace(asked, sampling=GREEDY, **changes)


def ask(models, watch=None, **changes):
    return run(request(**changes), models, watch or Watch())


@pytest.mark.usefixtures("half")
def test_what_fits_into_float16_stays_in_it(folder, models):
    result = ask(models)
    assert (result.text, result.stats.loaded.dtype, result.stats.loaded.fallbacks) == (ANSWER, "float16", ())


@pytest.mark.usefixtures("half")
def test_a_model_that_overflows_in_float16_is_loaded_in_float32_and_the_statistics_say_so(folder, models, caplog):
    overflow(folder)
    watch = Watch()
    result = ask(models, watch)
    assert result.text == ANSWER
    assert result.stats.loaded.dtype == "float32"
    (fallback,) = result.stats.loaded.fallbacks
    assert fallback == "mine overflows in float16, so it is computed in float32, which takes more memory and time"
    assert fallback in caplog.text
    assert all(ANSWER.startswith(shown) for shown in watch.shown), "no garbage was shown on the way"


@pytest.mark.usefixtures("half")
def test_the_next_question_finds_it_in_float32(folder, models, caplog):
    overflow(folder)
    ask(models)
    caplog.clear()
    result = ask(models)
    assert (result.text, result.stats.loaded.dtype) == (ANSWER, "float32")
    assert "loaded" not in caplog.text
    assert len(models.held) == 1


@pytest.mark.usefixtures("half")
def test_many_pictures_too(folder, models):
    overflow(folder)
    scenes = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
    answers = {}
    stats = caption(
        request(images={}),
        [(scene[0], draw(*scene)) for scene in scenes],
        models,
        Watch(),
        2,
        answers.__setitem__,
        pytest.fail,
    )
    assert [answers[number].text for number in range(3)] == [f"a {b} {a} on a {c} background" for a, b, c in scenes]
    assert stats.loaded.dtype == "float32"


@pytest.mark.usefixtures("half")
def test_where_float32_has_no_room_it_is_an_error_that_says_what_helps(folder, models, monkeypatch):
    overflow(folder)
    monkeypatch.setattr(host, "free_bytes", lambda device: 0)
    watch = Watch()
    with pytest.raises(
        NotFiniteError, match=r"mine computes no numbers \(NaN or infinity\) for token 1, in float16 on"
    ):
        ask(models, watch)
    assert not any(watch.shown)


@pytest.mark.usefixtures("half")
def test_a_model_that_computes_no_numbers_in_float32_either_is_an_error(folder, models):
    poison(folder)
    with pytest.raises(NotFiniteError, match=r"for token 1, in float32 on cpu.* its weights may be damaged"):
        ask(models)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=1, max_new_tokens=20)])
def test_in_any_other_precision_it_is_an_error_at_once(folder, models, sampling):
    poison(folder)
    with pytest.raises(NotFiniteError, match=r"What may help: attention_mode eager; downloading it again"):
        run(replace(request(), sampling=sampling), models, Watch())
    assert [key.model for key in models.held] == ["mine"], "and no second load"


def test_of_many_pictures_only_those_fail_that_cannot_be_computed(folder, models, monkeypatch):
    """A picture of its own kind of numbers: pixels that are none, as a damaged file may give."""
    from qwenvl import session

    real = session.prompt.encode

    def encode(handle, asked, pictures, videos, phase, number, *how):
        result = real(handle, asked, pictures, videos, phase, number, *how)
        if number == 1:
            result.inputs["pixel_values"][0, 0] = float("nan")
        return result

    monkeypatch.setattr(session.prompt, "encode", encode)
    colors, answers, failed = ["red", "green", "yellow"], {}, {}
    pictures = [(color, draw("circle", color, "blue")) for color in colors]
    caption(request(images={}), pictures, models, Watch(), 3, answers.__setitem__, failed.__setitem__)
    assert {number: answer.text for number, answer in answers.items()} == {
        number: f"a {colors[number]} circle on a blue background" for number in (0, 2)
    }
    assert list(failed) == [1]
    assert "for token 1 of answer 2 of 3 that were made together" in str(failed[1])


def test_what_helps_depends_on_what_it_was_computed_with(demo):
    gpu = replace(demo.machine, device="cuda:0", dtype=torch.float16)
    stored = replace(demo, machine=gpu, plan=replace(demo.plan, quantization="gptq", attention="eager"))
    (error,) = why_not_finite(stored, NotFiniteError([0], 3), 1)
    assert str(error).endswith(
        "for token 4, in float16 on cuda:0 with attention eager, gptq. What may help: a GPU that computes in bfloat16, "
        "since float16 overflows with some models; device cpu, which computes in bfloat16 or float32; attention_mode "
        "sdpa; the same model not stored as gptq; downloading it again, because its weights may be damaged."
    )
    assert in_float32(None, stored) is None, "its weights leave no choice"
