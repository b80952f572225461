"""Captured steps. Most of it needs a GPU; without one, what is tested is that a failed capture does no harm."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from kernels import reference_kernel
from pictures import ROOT, draw
from tiny import cancelled

from qwenvl.decoding.cuda_graph import CapturedStep, CaptureError, HostSyncs
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.static_cache import why_not_generic
from qwenvl.decoding.step_attention import ByLength, Flash, Sdpa
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a capture succeeds")
def test_where_a_capture_fails_it_is_tried_without_flash_decoding_first(tmp_path, caplog):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cpu")
    expected = generated(Decoder(model, "sdpa", "own step"), inputs, GREEDY)
    decoder = Decoder(model, "sdpa", "own step")
    decoder._captures = True
    decoder._lanes._step.attention = ByLength(Sdpa(), Flash(reference_kernel))
    assert generated(decoder, inputs, GREEDY) == expected
    assert not decoder._lanes._step.attention.reads_only_text
    assert (caplog.text.count("is made simpler"), caplog.text.count("without a CUDA graph")) == (1, 1)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
        lambda x: torch.where(x > 0),
        lambda x: x.to("meta"),
    ],
    ids=["item", "if", "mask", "nonzero", "equal", "repeat", "where", "another device"],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_what_makes_the_host_wait_is_seen(wait, inference):
    with torch.inference_mode(inference), HostSyncs() as waits:
        wait(torch.ones(3))
    assert waits.found


def test_what_does_not_is_let_through():
    with torch.inference_mode(), HostSyncs() as waits:
        x = torch.ones(4, 3)
        x.repeat_interleave(2, dim=0)[torch.tensor([0, 1])] = 1.0
        x.to(torch.float16).masked_fill(x > 0, 0).sort(-1)
        torch.where(x > 0, x, 0)
    assert waits.found == []


def test_a_step_that_waits_is_never_captured_and_leaves_its_state_as_it_was():
    """A capture that breaks off may end the process."""
    tokens, seen, random = torch.tensor([3]), torch.zeros(4), torch.Generator().manual_seed(1)
    before = random.get_state()

    def logits(given):
        seen[given.item()] += 1
        return torch.rand(1, 4, generator=random)

    with pytest.raises(CaptureError, match="waits for the device in _local_scalar_dense"):
        CapturedStep(logits, lambda made: made.argmax(-1), lambda: None, tokens, [seen], random)
    assert (tokens.tolist(), seen.tolist()) == ([3], [0, 0, 0, 0])
    assert torch.equal(random.get_state(), before)


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
    decoder = tiny.decoder(model)
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
    decoder = tiny.decoder(model)
    held = []
    for _ in range(20):
        generated(decoder, inputs, GREEDY)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[2:])) == 1


@on_gpu
def test_an_answer_that_outgrows_its_buffer_is_captured_anew_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 128)
    monkeypatch.setattr("qwenvl.decoding.lanes.HEADROOM", 1)
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cuda:0")
    long = Sampling(do_sample=False, max_new_tokens=400)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=400)[0, inputs["input_ids"].shape[1] :]
    decoder = tiny.decoder(model)
    for _ in range(2):
        assert list(generated(decoder, inputs, long)) == expected.tolist()
    assert decoder._captures


@on_gpu
@pytest.mark.parametrize("token", [1, 2, 20])
def test_a_cancel_in_a_captured_answer_leaves_the_next_one_right(tmp_path, token):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cuda:0")
    decoder = tiny.decoder(model)
    whole = generated(decoder, inputs, GREEDY)
    told = cancelled(lambda stop: decoder.generate(inputs, GREEDY, None, stop, ignore), token)
    assert told == whole[:token]
    assert generated(decoder, inputs, GREEDY) == whole


@on_gpu
def test_a_long_text_is_attended_to_by_flash_decoding_and_the_result_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.step_attention.FLASH_FROM", 1)
    handle = load(LoadSpec("m"), tiny.save("qwen3_vl", tmp_path / "m"), Machine("cuda:0", torch.bfloat16, ""))
    inputs = encode(handle, Request(handle.spec, "What is it?"), [draw("circle", "red", "blue")], None).inputs
    decoder = tiny.decoder(handle.model)
    generated(decoder, inputs, GREEDY)
    assert decoder.attention == "flash"
    lanes = decoder._lanes
    with torch.inference_mode():
        tokens = lanes.prefill(inputs, 8, ignore, "")[1].argmax(-1)
        flash, exact = lanes.step(tokens, lanes.span()).float(), lanes.step(tokens).float()
    assert (flash - exact).abs().max() <= 0.03 * exact.abs().max()


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


@on_gpu
@pytest.mark.parametrize("allocator", ["native", "cudaMallocAsync"])
def test_a_capture_that_breaks_off_harms_nobody(allocator):
    """In a process of its own: if it does harm, the other tests should not suffer."""
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF=f"backend:{allocator}", PYTHONPATH=str(ROOT))
    found = subprocess.run(
        [sys.executable, "-c", BREAKS_OFF], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout.splitlines()[-1:] == ["all is well"], found.stdout + found.stderr[-2000:]
