import shutil
from dataclasses import replace

import hub_server
import pytest
import tiny
import torch
from pictures import draw, image

from qwenvl.comfyui import host
from qwenvl.loading import capabilities
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import LoadError
from qwenvl.loading.source import ModelSource, find_source
from qwenvl.models import catalog
from qwenvl.models.catalog import DEMO
from qwenvl.models.download import DownloadError, why_incomplete
from qwenvl.models.families import family_of
from qwenvl.pipeline import run
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import ATTENTIONS, SAMPLING_FROM

MINE = LoadSpec("Mine")
CPU = Machine("cpu", torch.float32, "")
SAMPLING = Sampling(seed=1, temperature=1.5, top_p=1, max_new_tokens=12)


class Watch:
    """Records what is reported."""

    def __init__(self):
        self.texts = []

    def check(self):
        pass

    def report(self, done, total, text, state="downloading"):
        self.texts.append(text)

    def stage(self, state, **facts): ...

    def update(self, new_tokens, text, thinking):
        pass

    def end(self, text):
        pass


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One folder of models, and `Mine` among the user's own."""
    custom = tmp_path / "custom_models.json"
    custom.write_text('{"models": {"Mine": {"repo_id": "owner/name"}}}')
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", custom)
    monkeypatch.setattr(host, "model_roots", lambda: [tmp_path / "LLM", tmp_path / "more"])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from hub_server.start(tmp_path, monkeypatch, tiny.DEMO_FOLDER)


def test_a_model_that_is_nowhere_is_fetched_into_the_first_folder_under_its_owner(hub, tmp_path):
    watch = Watch()
    source = find_source(MINE, watch, "auto")
    assert source.folder == tmp_path / "LLM" / "owner--name"
    assert why_incomplete(source.folder) is None
    assert watch.texts[-1].startswith("Downloading name: 2.9 of 2.9 MB")


def test_a_model_that_is_there_is_not_asked_for(hub, tmp_path):
    folder = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "more" / "name")
    assert find_source(MINE, Watch(), "auto").folder == folder
    assert hub.asked == []


@pytest.mark.parametrize(("policy", "offline"), [("never", ""), ("auto", "1"), ("never", "1")])
def test_where_nothing_may_be_fetched_the_error_names_the_folders_and_the_command(
    hub, tmp_path, monkeypatch, policy, offline
):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(DownloadError) as caught:
        find_source(MINE, Watch(), policy)
    message = str(caught.value)
    assert "Mine is not on this machine, and" in message
    assert ("HF_HUB_OFFLINE is set" if offline else "the download policy is never") in message
    for place in ("LLM", "more", "hub"):
        assert str(tmp_path / place) in message
    assert message.endswith(f'hf download owner/name --local-dir "{tmp_path / "LLM" / "owner--name"}"')
    assert hub.asked == []


def test_what_the_command_of_the_error_fetches_is_then_found(tmp_path):
    shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "owner--name")
    assert find_source(MINE, Watch(), "never").folder == tmp_path / "LLM" / "owner--name"


def test_a_folder_of_the_user_s_that_is_not_whole_is_left_alone(hub, tmp_path):
    theirs = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "name")
    (theirs / "model.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in theirs.iterdir()}
    assert find_source(MINE, Watch(), "auto").folder == tmp_path / "LLM" / "owner--name"
    assert {path: path.stat().st_mtime_ns for path in theirs.iterdir()} == before


def test_a_damaged_folder_without_a_repository_says_what_is_missing(tmp_path):
    folder = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "Found")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(LoadError, match=r"Found is damaged: model\.safetensors has .* bytes instead of .* in .*Found"):
        find_source(LoadSpec("Found"), Watch(), "auto")


@pytest.mark.parametrize("family", tiny.families(*tiny.CLASSES))
def test_every_family_answers_a_question_and_says_how(family, tmp_path, models):
    spec = LoadSpec(family)
    models.get(ModelSource(spec, tiny.save(family, tmp_path / "m"), CPU))
    images = {"image1": image(draw("circle", "red", "blue"))} if family in tiny.SEEING else {}
    first, second = (run(Request(spec, "What is it?", images=images, sampling=SAMPLING), models, Watch()) for _ in "12")
    assert first.text
    assert second.text == first.text, "a seed repeats its answer"
    assert first.stats.decode.new_tokens > 3
    assert first.stats.prompt.coordinates == family_of(family).coordinates
    assert first.stats.decode.tier == ("own step" if family in tiny.DENSE else "generate")
    assert bool(first.stats.decode.tier_reason) == (family not in tiny.DENSE)


@pytest.mark.usefixtures("by_bitsandbytes")
def test_4bit_that_cannot_be_had_is_recorded_and_loaded_once(models, monkeypatch, caplog):
    monkeypatch.setattr(capabilities, "has_package", lambda name: name != "bitsandbytes")
    request = Request(LoadSpec(DEMO, "4bit"), "Hello", sampling=Sampling(do_sample=False, max_new_tokens=4))
    with caplog.at_level("INFO"):
        results = [run(request, models, Watch()) for _ in range(3)]
    assert sum("loaded " in record.message for record in caplog.records) == 1
    for result in results:
        assert result.stats.loaded.quantization == "none"
        assert "4bit is not possible here: bitsandbytes is not installed" in result.stats.loaded.fallbacks[0]


@pytest.mark.parametrize("attention", [entry for entry in ATTENTIONS if entry not in ("sdpa", "auto")])
def test_what_runs_is_recorded_where_something_else_was_asked_for(attention, models):
    """On a CPU, which has neither FlashAttention nor Triton."""
    spec = LoadSpec("m", attention=attention)
    models.get(ModelSource(spec, tiny.DEMO_FOLDER, CPU))
    request = Request(spec, "Hello", sampling=Sampling(do_sample=False, max_new_tokens=4))
    stats = run(request, models, Watch()).stats
    runs = "eager" if attention == "eager" else "sdpa"
    assert (stats.loaded.attention, stats.loaded.decode_attention) == (runs, runs)
    assert len(stats.loaded.fallbacks) == (attention != "eager")
    assert attention == "eager" or stats.loaded.fallbacks[0].endswith("; using sdpa instead")


def own_sampling(models, tmp_path, sampling, **recommended):
    """The answer and statistics of a random model that comes with that recommendation, and what is set otherwise."""
    spec = LoadSpec("m")
    models.get(ModelSource(spec, tiny.save("qwen3", tmp_path / "m", **recommended), CPU))
    return [
        run(Request(spec, "Hi", sampling=sampling, sampling_from=entry), models, Watch()) for entry in SAMPLING_FROM
    ]


def test_the_model_s_own_sampling_is_what_its_makers_recommend(models, tmp_path, caplog):
    wild = Sampling(temperature=2.0, top_p=1.0, top_k=0, seed=3, max_new_tokens=12)
    with caplog.at_level("INFO"):
        as_set, own = own_sampling(models, tmp_path, wild, do_sample=True, temperature=0.6, top_k=1)
    assert (as_set.stats.decode.sampling, as_set.stats.decode.sampling_from) == (wild, "as set")
    assert own.stats.decode.sampling == replace(wild, temperature=0.6, top_k=1)
    assert own.stats.decode.sampling_from == "model's own"
    expected = run(Request(LoadSpec("m"), "Hi", sampling=Sampling(do_sample=False, max_new_tokens=12)), models, Watch())
    assert own.text == expected.text, "one token to draw from is the likeliest one"
    assert as_set.text != own.text
    assert "model's own sampling (temperature 0.6, top_p 1, top_k 1, min_p 0, repetition_penalty 1)" in caplog.text


def test_a_model_without_a_recommendation_is_sampled_as_set(models, tmp_path, caplog):
    as_set, own = own_sampling(models, tmp_path, SAMPLING)
    assert own.text == as_set.text
    assert own.stats.decode.sampling_from == "as set"
    assert "recommends no sampling; using what is set instead" in caplog.text
