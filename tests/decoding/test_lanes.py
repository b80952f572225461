"""Exactness of the own step, through its whole flow: the tokens of transformers' generate(), in float32."""

import pytest
import tiny
import torch
from kernels import reference_kernel
from pictures import draw
from tiny import by_transformers

from qwenvl.decoding.lanes import OwnStepLanes
from qwenvl.decoding.prefill import forward
from qwenvl.decoding.step_attention import ByLength, Eager, Flash, Sdpa
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.media.media import Video
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
FAMILIES = tiny.DENSE
LENGTH = 256
NEVER = 999_999
CIRCLE, SQUARE = draw("circle", "red", "blue"), draw("square", "green", "white", (96, 160))
TRIANGLE = draw("triangle", "yellow", "black", (64, 64))
PADDED = ("input_ids", "attention_mask", "mm_token_type_ids")


def ignore(*_):
    pass


def loaded(family, folder, seed=0):
    handle = load(LoadSpec(family), tiny.save(family, folder, seed), CPU)
    handle.model.generation_config.eos_token_id = NEVER
    return handle


def video(frames=6, size=(64, 96)):
    drawn = torch.randint(0, 255, (frames, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Video(drawn.numpy(), tuple(0.5 * i for i in range(frames)), 0.5 * frames)


def prompts(handle):
    """One of each kind: text, one picture, several, a video."""
    seen = [([], []), ([CIRCLE], []), ([CIRCLE, SQUARE, TRIANGLE], []), ([TRIANGLE], [video()])]
    texts = ["Tell me at length what you know.", "What is it?", "Hi.", "What happens in the video, please?"]
    cases = zip(texts, seen if handle.processor else [([], [])] * 4, strict=True)
    return [encode(handle, Request(handle.spec, text), *look).inputs for text, look in cases]


def batched(rows):
    """One batch of several prompts, padded on the left."""
    longest, together = max(row["input_ids"].shape[1] for row in rows), {}
    for name in {name for row in rows for name in row}:
        values = [row[name] for row in rows if name in row]
        if name in PADDED:
            values = [torch.nn.functional.pad(value, (longest - value.shape[1], 0)) for value in values]
        together[name] = torch.cat([torch.as_tensor(value) for value in values])
    return together


def models():
    """Five of each family; a short run takes two, and asks each kind of prompt alone at least once."""
    for number, family in enumerate(FAMILIES):
        for seed in range(5):
            short = seed in (number % 4, (number + 1) % 4)
            yield pytest.param(family, seed, marks=[] if short else pytest.mark.long)


@pytest.mark.parametrize(("family", "seed"), list(models()))
def test_256_tokens_of_several_models_of_each_family_are_those_of_generate(family, seed, tmp_path):
    """A padded batch of all kinds of prompt, and one of them alone that ends by itself half way."""
    handle = loaded(family, tmp_path / "m", seed)
    decoder, rows = tiny.decoder(handle.model), prompts(handle)

    def made(inputs, penalty=1.0):
        sampling = Sampling(do_sample=False, max_new_tokens=LENGTH, repetition_penalty=penalty)
        found = decoder.generate(inputs, sampling, None, ignore, ignore)
        assert found.tier == "own step"
        return found.rows

    together = batched(rows)
    answers = made(together)
    assert answers == by_transformers(handle.model, together, LENGTH)
    assert len(set(answers)) == 4, "each answers its own prompt"

    alone, penalty = rows[seed % 4], 1.2 if seed % 2 else 1.0
    (whole,) = made(alone, penalty)
    handle.model.generation_config.eos_token_id = [whole[LENGTH // 2], NEVER]
    (ended,) = made(alone, penalty)
    assert (ended,) == by_transformers(handle.model, alone, LENGTH, repetition_penalty=penalty)
    assert ended == whole[: whole.index(whole[LENGTH // 2])]


@pytest.fixture(scope="module", params=FAMILIES)
def handle(request, tmp_path_factory):
    return loaded(request.param, tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def answered(handle):
    """A batch of all kinds of prompt, and what generate() makes of it."""
    inputs = batched(prompts(handle))
    return inputs, by_transformers(handle.model, inputs, STATIC_LENGTH)


STATIC_LENGTH = 160
STATIC = {"masked": (Sdpa(), Sdpa()), "eager": (Eager(), Eager()), "flash": (Sdpa(), Flash(reference_kernel))}


@pytest.mark.parametrize("how", STATIC)
def test_steps_over_a_span_give_the_tokens_of_generate(handle, answered, how, monkeypatch):
    """What a captured step computes, run eagerly: every size is that of the span, every length is on the device."""
    monkeypatch.setattr("qwenvl.decoding.step_attention.FLASH_FROM", 256)
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 64)
    for room in ("AHEAD", "HEADROOM"):
        monkeypatch.setattr(f"qwenvl.decoding.lanes.{room}", 1)
    inputs, expected = answered
    lanes, rows, spans, used = OwnStepLanes(handle.model, "sdpa"), [], set(), set()
    lanes._step.attention = ByLength(*STATIC[how])
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, STATIC_LENGTH, ignore, "")
        tokens = logits.argmax(-1)
        for _ in range(STATIC_LENGTH):
            rows.append(tokens.tolist())
            lanes.grow()
            span = lanes.span()
            spans.add(span)
            used.add(lanes.attention(static=True))
            tokens = lanes.step(tokens, span).argmax(-1)
            lanes.count_on_device()
            lanes.count_on_host()
    assert tuple(zip(*rows, strict=True)) == expected
    assert len(spans) > 1
    assert used == {value.name for value in STATIC[how]}


def test_the_tables_reach_positions_beyond_the_number_of_tokens(handle, monkeypatch):
    """Some versions count positions in a video by time, so that few tokens may lie far apart."""

    def far(model, inputs):
        result = forward(model, inputs)
        return result._replace(offset=result.offset + 5000)

    lanes, inputs = OwnStepLanes(handle.model, "sdpa"), prompts(handle)[0]
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, 8, ignore, "")
        version, near = lanes.version, lanes.step(logits.argmax(-1))
        monkeypatch.setattr("qwenvl.decoding.lanes.forward", far)
        _, logits = lanes.prefill(inputs, 8, ignore, "")
        assert lanes.version > version, "captured steps would read the old tables"
        assert not torch.equal(lanes.step(logits.argmax(-1)), near)
