"""Captured steps. Most of it needs a GPU; without one, what is tested is that a failed capture does no harm."""

import pytest
import tiny
import torch
from conftest import draw

from qwenvl.capabilities import Machine
from qwenvl.decode import Decoder
from qwenvl.generic import why_not_generic
from qwenvl.loader import load
from qwenvl.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

GREEDY = Sampling(do_sample=False, max_new_tokens=64)
DRAWN = Sampling(temperature=1.2, top_p=0.95, top_k=40, repetition_penalty=1.1, max_new_tokens=64)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def ignore(*_):
    pass


def model_and_prompt(family, folder, device):
    handle = load(LoadSpec(family), tiny.save(family, folder), Machine(device, torch.float32, ""))
    handle.model.generation_config.eos_token_id = 999
    pictures = [draw("circle", "red", "blue")] if handle.processor else []
    return handle.model, encode(handle, Request(handle.spec, "What is it?"), pictures, None).inputs


def generated(decoder, inputs, sampling, seed=None):
    return decoder.generate(inputs, sampling, seed, ignore, ignore).ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a capture succeeds")
@pytest.mark.parametrize(("sampling", "seed"), [(GREEDY, None), (DRAWN, 5)])
def test_where_a_capture_fails_the_eager_step_goes_on_with_the_same_tokens(tmp_path, caplog, sampling, seed):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cpu")
    expected = generated(Decoder(model, "sdpa", "own step"), inputs, sampling, seed)
    decoder = Decoder(model, "sdpa", "own step")
    decoder._captures = True
    assert [generated(decoder, inputs, sampling, seed) for _ in "ab"] == [expected] * 2
    assert caplog.text.count("without a CUDA graph") == 1, "said once, not at every run"


@on_gpu
@pytest.mark.parametrize("tier", ["own step", "generic step"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_captured_tokens_are_those_of_generate_run_after_run(family, tier, tmp_path):
    model, inputs = model_and_prompt(family, tmp_path / "m", "cuda:0")
    if tier == "generic step" and why_not_generic(model):
        pytest.skip(why_not_generic(model))
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    decoder = Decoder(model, "sdpa", tier)
    for _ in range(3):
        assert list(generated(decoder, inputs, GREEDY)) == expected.tolist()
    assert decoder._captures
    assert decoder._steps


@on_gpu
def test_a_seed_repeats_captured_draws_and_other_values_need_no_new_capture(tmp_path):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cuda:0")
    decoder = Decoder(model, "sdpa")
    first = generated(decoder, inputs, DRAWN, 1)
    captured = dict(decoder._steps)
    hotter = Sampling(temperature=1.9, top_p=0.9, top_k=40, repetition_penalty=1.5, max_new_tokens=64)
    assert generated(decoder, inputs, hotter, 1) != first
    assert generated(decoder, inputs, DRAWN, 2) != first
    assert generated(decoder, inputs, DRAWN, 1) == first
    assert decoder._steps == captured


@on_gpu
def test_twenty_runs_do_not_grow_the_memory(tmp_path):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cuda:0")
    decoder = Decoder(model, "sdpa")
    held = []
    for _ in range(20):
        generated(decoder, inputs, GREEDY)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[2:])) == 1
