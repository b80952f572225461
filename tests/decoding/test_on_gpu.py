"""What only a GPU can show: that steps are captured, what a replay says, and torch's flash attention.

It needs torch, transformers and Pillow, no other package and no model: pytest -m gpu tests/decoding
"""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from pictures import ROOT
from tiny import cancelled

from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.kv_cache import KVCache
from qwenvl.decoding.static_cache import why_not_generic
from qwenvl.decoding.step_attention import Flash, Sdpa, allowed_kernels, why_not_flash
from qwenvl.request import Sampling

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
GREEDY = Sampling(do_sample=False, max_new_tokens=64)
DRAWN = Sampling(temperature=1.2, top_p=0.95, top_k=40, repetition_penalty=1.1, max_new_tokens=64)


def ignore(*_):
    pass


def model_and_prompt(family, dtype=torch.float32):
    model = tiny.random_model(family).eval().to(DEVICE, dtype)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model, tiny.random_prompt(model)


def generated(decoder, inputs, sampling, seed=None):
    return decoder.generate(inputs, sampling, seed, ignore, ignore).ids


@pytest.mark.parametrize("tier", ["own step", "generic step"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_captured_tokens_are_those_of_generate_run_after_run(family, tier):
    model, inputs = model_and_prompt(family)
    if tier == "generic step" and why_not_generic(model):
        pytest.skip(why_not_generic(model))
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    decoder = Decoder(model, "sdpa", tier)
    for _ in range(3):
        assert list(generated(decoder, inputs, GREEDY)) == expected.tolist()
    assert decoder._captures
    assert decoder._steps


def test_a_seed_repeats_captured_draws_and_other_values_need_no_new_capture():
    model, inputs = model_and_prompt("qwen3_vl")
    decoder = tiny.decoder(model)
    first = generated(decoder, inputs, DRAWN, 1)
    captured = dict(decoder._steps)
    hotter = Sampling(temperature=1.9, top_p=0.9, top_k=40, repetition_penalty=1.5, max_new_tokens=64)
    assert generated(decoder, inputs, hotter, 1) != first
    assert generated(decoder, inputs, DRAWN, 2) != first
    assert generated(decoder, inputs, DRAWN, 1) == first
    assert decoder._steps == captured


def test_twenty_runs_do_not_grow_the_memory():
    model, inputs = model_and_prompt("qwen3_vl")
    decoder = tiny.decoder(model)
    held = []
    for _ in range(20):
        generated(decoder, inputs, GREEDY)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[2:])) == 1


def test_an_answer_that_outgrows_its_buffer_is_captured_anew_and_goes_on(monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 128)
    monkeypatch.setattr("qwenvl.decoding.lanes.HEADROOM", 1)
    model, inputs = model_and_prompt("qwen3_vl")
    long = Sampling(do_sample=False, max_new_tokens=400)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=400)[0, inputs["input_ids"].shape[1] :]
    decoder = tiny.decoder(model)
    for _ in range(2):
        assert list(generated(decoder, inputs, long)) == expected.tolist()
    assert decoder._captures


@pytest.mark.parametrize("token", [1, 2, 20])
def test_a_cancel_in_a_captured_answer_leaves_the_next_one_right(token):
    model, inputs = model_and_prompt("qwen3_vl")
    decoder = tiny.decoder(model)
    whole = generated(decoder, inputs, GREEDY)
    told = cancelled(lambda stop: decoder.generate(inputs, GREEDY, None, stop, ignore), token)
    assert told == whole[:token]
    assert generated(decoder, inputs, GREEDY) == whole


def test_every_captured_step_is_attended_to_by_flash_decoding_and_the_result_says_so():
    model, inputs = model_and_prompt("qwen3_vl", torch.bfloat16)
    decoder = tiny.decoder(model)
    generated(decoder, inputs, GREEDY)
    assert decoder.attention == "flash"
    lanes = decoder._lanes
    with torch.inference_mode():
        tokens = lanes.prefill(inputs, 8, ignore, "")[1].argmax(-1)
        flash, exact = lanes.step(tokens, lanes.span()).float(), lanes.step(tokens).float()
    assert (flash - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["sdpa", "flash"])
def test_an_answer_is_captured_once_and_before_its_second_token(dtype):
    model, inputs = model_and_prompt("qwen3_vl", dtype)
    decoder, told = tiny.decoder(model), []
    decoder.generate(inputs, GREEDY, None, lambda _: told.append(len(decoder._steps)), ignore)
    assert told == [0] + [1] * 63


def test_cudnn_attends_to_nothing_in_an_answer_and_is_allowed_again():
    model, inputs = model_and_prompt("qwen3_vl", torch.bfloat16)
    before, seen = allowed_kernels(), []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(allowed_kernels()))
    for tier in ("own step", "generate"):
        generated(Decoder(model, "sdpa", tier), inputs, GREEDY)
    assert seen
    assert all("cuDNN" not in entry for entry in seen)
    assert allowed_kernels() == before


BREAKS_OFF = """
import torch
from qwenvl.decoding.cuda_graph import CapturedStep, CaptureError

device = torch.device("cuda:0")
tokens, own = torch.zeros(1, dtype=torch.long, device=device), torch.Generator(device)

def step(breaks):
    def logits(given):
        made = torch.rand(1, 8, device=device, generator=own)
        if breaks and torch.cuda.is_current_stream_capturing():
            given.item()
        return made
    return CapturedStep(logits, lambda made: made.argmax(-1), lambda: None, tokens, [], own)

with torch.inference_mode():
    step(False)()
    torch.cuda.synchronize()
    try:
        step(True)
        raise SystemExit("it did not break off")
    except CaptureError as error:
        print("broke off:", error)
    assert torch.cuda.current_stream() == torch.cuda.default_stream(), "the current stream"
    torch.rand(3, device=device), torch.rand(3, device=device, generator=own)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        large = torch.empty(2**28, dtype=torch.uint8, device=device)
        del large
        torch.cuda.synchronize()
        torch.empty(1, device=device)
    assert torch.cuda.memory_allocated() <= before + 2**20, "memory is given back"
    step(False)()
    torch.cuda.synchronize()
print("all is well")
"""


@pytest.mark.parametrize("allocator", ["native", "cudaMallocAsync"])
def test_a_capture_that_breaks_off_harms_nobody(allocator):
    """In a process of its own: if it does harm, the other tests should not suffer."""
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF=f"backend:{allocator}", PYTHONPATH=str(ROOT))
    found = subprocess.run(
        [sys.executable, "-c", BREAKS_OFF], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout.splitlines()[-1:] == ["all is well"], found.stdout + found.stderr[-2000:]


@pytest.mark.parametrize("sizes", [(32, 8, 128), (16, 2, 128), (16, 8, 64)])
def test_this_gpu_has_flash_decoding(sizes):
    assert why_not_flash(*sizes, torch.bfloat16, torch.device("cuda:0")) is None


def test_flash_decoding_is_captured_with_its_length(sizes=(8, 2, 64)):
    """A replay must read the length of the moment, not that of the capture."""
    heads, kv_heads, dim = sizes
    device, dtype = torch.device("cuda:0"), torch.bfloat16
    kv = KVCache(1, kv_heads, dim, 4096, dtype, device)
    keys, values = kv.allocate().normal_(), kv.allocate().normal_()
    query = torch.randn(1, heads, dim, dtype=dtype, device=device)
    flash, result = Flash(), torch.empty(1, heads * dim, dtype=dtype, device=device)
    graph = torch.cuda.CUDAGraph()
    flash(query, keys, values, flash.prepare(kv, 4096))
    with torch.cuda.graph(graph):
        result.copy_(flash(query, keys, values, flash.prepare(kv, 4096)))
    for length in (1, 700, 4096):
        kv.lens.fill_(length - 1)
        graph.replay()
        torch.testing.assert_close(result, Sdpa()(query, keys, values, (length, None)), atol=0.03, rtol=0.03)
