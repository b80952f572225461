"""A capture that fails does no harm. That one succeeds is tested on a pretended device (on_another_device.py), and on a
GPU where there is one (test_on_gpu.py)."""

import pytest
import tiny
import torch
from kernels import reference_kernel
from pictures import draw

from qwenvl.decoding.cuda_graph import CapturedStep, CaptureError, HostSyncs
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.step_attention import ByLength, Flash, Sdpa
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

GREEDY = Sampling(do_sample=False, max_new_tokens=64)
DRAWN = Sampling(temperature=1.2, top_p=0.95, top_k=40, repetition_penalty=1.1, max_new_tokens=64)


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
    with caplog.at_level("INFO"):
        assert [generated(decoder, inputs, sampling, seed) for _ in "abcde"] == [expected] * 5
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert [level for level, _ in told] == ["INFO", "INFO", "WARNING"], "then no more is tried, and no more is said"
    assert "from now on: it failed 3 times: it is not on a GPU" in told[-1][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a capture succeeds")
def test_where_a_capture_fails_it_is_tried_without_flash_decoding_first(tmp_path, caplog):
    model, inputs = model_and_prompt("qwen3_vl", tmp_path / "m", "cpu")
    expected = generated(Decoder(model, "sdpa", "own step"), inputs, GREEDY)
    decoder = Decoder(model, "sdpa", "own step")
    decoder._captures = True
    decoder._lanes._step.attention = ByLength(Sdpa(), Flash(reference_kernel))
    with caplog.at_level("INFO"):
        for _ in "abcde":
            assert generated(decoder, inputs, GREEDY) == expected
            assert decoder.attention == "sdpa"
    assert (caplog.text.count("is made simpler"), caplog.text.count("without a CUDA graph")) == (3, 3)
    assert not decoder._lanes._step.attention.reads_only_text(4096)


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
        CapturedStep(logits, lambda result: result.argmax(-1), lambda: None, tokens, [seen], random)
    assert (tokens.tolist(), seen.tolist()) == ([3], [0, 0, 0, 0])
    assert torch.equal(random.get_state(), before)
