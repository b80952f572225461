"""Whole runs on the pretended device, with steps that are captured and replayed.

test_another_device.py runs these tests in a process of their own, which the device needs. What a GPU's own kernels
compute, and how fast, they cannot show.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pretended
import pytest
import tiny
import torch
from asking import ask, ignore
from pictures import draw
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.cache_utils import StaticLayer

from qwenvl.cli import doctor
from qwenvl.decoding.cuda_graph import CapturedStep, CaptureError, HostSyncs, ReadLater
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.kv_cache import capacity_for, span_for
from qwenvl.decoding.lanes import OwnStepLanes
from qwenvl.decoding.own_step import why_not_dense
from qwenvl.decoding.sampling import Sampler
from qwenvl.decoding.static_cache import StaticCacheLanes, why_not_generic
from qwenvl.decoding.step_attention import ByLength, Flash, Sdpa, allowed_kernels
from qwenvl.errors import NotFiniteError
from qwenvl.loading.capabilities import Machine, machine
from qwenvl.loading.loader import load, park
from qwenvl.media.media import Video
from qwenvl.models import catalog
from qwenvl.prompting.prompt import encode, side_by_side
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
# All that a greedy choice heeds, and all that a drawn one does.
GREEDY = Sampling(
    do_sample=False,
    max_new_tokens=12,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    min_new_tokens=4,
)
SHORTER = replace(GREEDY, max_new_tokens=5)
DRAWN = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, max_new_tokens=12)
SCENES = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
STEPS = {OwnStepLanes.name: lambda model: OwnStepLanes(model, "sdpa"), StaticCacheLanes.name: StaticCacheLanes}
# One of each kind; the others take minutes.
SHORT = ("qwen3_vl", "qwen3_5")


def families():
    known = [one_family for one_family in (*tiny.DENSE, *tiny.OTHERS) if tiny.known(one_family)]
    return [entry if entry in SHORT else pytest.param(entry, marks=pytest.mark.long) for entry in known]


@pytest.fixture(scope="session")
def handles(request, tmp_path_factory):
    """All at once: nothing can be loaded once the device is known."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    names = {call.params["family"] for call in params if call and "family" in call.params}
    folder = tmp_path_factory.mktemp("models")
    results = {name: load(LoadSpec(name), tiny.save(name, folder / name), CPU) for name in sorted(names)}
    return results | {"demo": load(LoadSpec(catalog.DEMO), catalog.find(catalog.DEMO).folder, machine("cpu"))}


@pytest.fixture(scope="session")
def expected(handles):
    """What each says on the CPU."""
    families = {name: answers(handle, "generate") for name, handle in handles.items() if name != "demo"}
    films = {("film", name): filmed(handle) for name, handle in handles.items() if name != "demo" and handle.processor}
    return families | films | {"demo": captioned(handles["demo"])}


@pytest.fixture(params=families())
def family(request):
    return request.param


@pytest.fixture
def handle(handles, expected, family):
    """A model on the device."""
    with pretended.there(handles[family].model):
        yield handles[family]


def _not_dense(model):
    return why_not_dense(model, tiny.decode_of(model))


@pytest.fixture(params=STEPS)
def step(request, handle):
    """The name of a step that the model has."""
    why_not = {OwnStepLanes.name: _not_dense, StaticCacheLanes.name: why_not_generic}[request.param]
    if reason := why_not(handle.model):
        pytest.skip(reason)
    return request.param


def prompts(handle, second="Why on earth would that be so?"):
    """Two, of different lengths, with a picture where the model sees."""
    pictures = [draw("circle", "red", "blue")] if handle.processor else []
    texts = ("What is it?", second)
    return [encode(handle, Request(handle.spec, text), pictures) for text in texts]


def nearly_full(handle):
    """Prompts that leave a few slots of a buffer, where buffers begin small: the answer soon outgrows it."""
    return side_by_side(prompts(handle, "Why on earth?"))


def decoder_of(handle, tier, captured):
    decoder = Decoder(handle.model, "sdpa", tier)
    decoder._captures = captured
    return decoder


def answers(handle, tier, captured=False):
    """Of a batch, of the same again, and of one that finds most of its prompt in memory; then three that are drawn."""
    decoder = decoder_of(handle, tier, captured)
    asked = prompts(handle)
    greedy = [
        decoder.generate(side_by_side(value), GREEDY, None, ignore, ignore, "seen").rows
        for value in (asked, asked, asked[:1], asked[:1])
    ]
    drawn = [decoder.generate(side_by_side(asked), DRAWN, seed, ignore, ignore).rows for seed in (1, 2, 1)]
    assert decoder._captures == captured, "no capture failed"
    assert greedy[0] == greedy[1]
    assert drawn[0] == drawn[2] != drawn[1]
    return greedy + drawn


def captioned(handle, captured=False, most=1):
    """What the demo model says of each scene, at once and after a thought that is cut short."""
    handle.decoder = decoder_of(handle, OwnStepLanes.name, captured)
    results = []
    for thinking in ("auto", "on"):
        sampling = Sampling(do_sample=False, thinking_budget=4 if thinking == "on" else 0)
        request = Request(handle.spec, "Describe this image.", "You are a helpful assistant.", thinking=thinking)
        outcomes, stats = ask(handle, [encode(handle, request, [draw(*scene)]) for scene in SCENES], sampling, most)
        results.append([answer.text for answer in outcomes])
        assert bool(stats.decode.thoughts_cut) == (thinking == "on")
    return tuple(results)


def flash(query, keys, values, rows, slots, span, used):
    """What flash_kernel computes, without a look at a length on the host."""
    batch, heads, dim = query.shape
    keys, values = (value.unflatten(0, (batch, -1))[:, :span].transpose(1, 2) for value in (keys, values))
    unseen = torch.arange(keys.shape[2], device=query.device) >= used[:, None]
    grouped = query.view(batch, keys.shape[1], -1, dim)
    scores = (grouped @ keys.transpose(-1, -2) * dim**-0.5).masked_fill(unseen[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ values).view(batch, heads, dim)


def test_the_device_is_one_of_its_own(handle):
    """Otherwise all of this would prove nothing."""
    here, there = torch.ones(2), torch.ones(2, device=pretended.NAME)
    with pytest.raises(RuntimeError, match="add has tensors of two devices"):
        here + there
    assert (here + there.cpu()).tolist() == [2, 2]
    assert handle.model.device.type == pretended.NAME


def test_generate_says_the_same_there(handle, expected):
    assert answers(handle, "generate") == expected[handle.spec.model]


def test_a_step_says_the_same_there(handle, step, expected):
    assert answers(handle, step) == expected[handle.spec.model]


def test_captured_and_replayed_it_says_the_same(handle, step, expected):
    captures, replays = pretended.Graph.captures, pretended.Graph.replays
    assert answers(handle, step, captured=True) == expected[handle.spec.model]
    assert pretended.Graph.replays - replays > 50
    # Two batch sizes, greedy and drawn; other seeds need none.
    assert pretended.Graph.captures - captures == 3


def test_nothing_in_a_step_waits_for_the_host(handle, step):
    lanes, inputs = STEPS[step](handle.model), side_by_side(prompts(handle))
    ids = inputs["input_ids"]
    choose = Sampler(GREEDY, len(ids), handle.model.get_output_embeddings().weight.shape[0], ids.device)
    with torch.no_grad():
        choose.start(GREEDY, None, ids, inputs["attention_mask"], [1])
        _, logits = lanes.prefill(inputs, 64, ignore, "")
        tokens = choose(logits)
        with HostSyncs() as waits:
            choose(lanes.step(tokens, lanes.span()))
            lanes.count_on_device()
    assert waits.found == []


def test_an_answer_that_outgrows_its_buffer_is_captured_anew_and_goes_on(handle, step, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    monkeypatch.setattr("qwenvl.decoding.lanes.HEADROOM", 1)
    monkeypatch.setattr("qwenvl.decoding.static_cache.HEADROOM", 1)
    inputs = nearly_full(handle)
    length = inputs["input_ids"].shape[1]
    long = replace(GREEDY, max_new_tokens=capacity_for(length + 1) + 10 - length)
    whole = decoder_of(handle, "generate", captured=False).generate(inputs, long, None, ignore, ignore).rows
    decoder = decoder_of(handle, step, captured=True)
    versions = []
    for _ in "ab":
        assert decoder.generate(inputs, long, None, ignore, ignore).rows == whole
        versions.append(decoder._lanes.version)
    assert versions[0] == versions[1] > 2, "made, grown, and then kept"
    assert decoder._captures


@pytest.mark.parametrize("token", [1, 9])
def test_a_cancel_at_any_token_leaves_the_next_answer_right(handle, step, token):
    inputs = side_by_side(prompts(handle)[:1])
    decoder = decoder_of(handle, step, captured=True)
    whole = decoder.generate(inputs, GREEDY, None, ignore, ignore).ids
    told = tiny.cancelled(lambda stop: decoder.generate(inputs, GREEDY, None, stop, ignore), token)
    assert told == whole[:token]
    assert decoder.generate(inputs, GREEDY, None, ignore, ignore).ids == whole


@pytest.mark.parametrize("captured", [False, True])
def test_numbers_that_are_none_are_found_on_the_device_and_not_told_of(handle, step, captured):
    """From the fifth token of a row on, by the embedding of the token before; the buffers are of no use after it."""
    inputs, whole = side_by_side(prompts(handle)), decoder_of(handle, step, captured=False)
    (first, second), decoder = (
        whole.generate(inputs, GREEDY, None, ignore, ignore).rows,
        decoder_of(handle, step, captured),
    )
    at = next(
        at for at in range(3, 9) if first[at] not in {*first[:at], *second[: at + 2], *inputs["input_ids"][0].tolist()}
    )
    embeddings, told = handle.model.get_input_embeddings().weight, []
    kept = embeddings[first[at]].clone()
    embeddings.data[first[at]] = float("nan")
    try:
        with pytest.raises(NotFiniteError) as raised:
            decoder.generate(inputs, GREEDY, None, lambda new: told.append([*map(tuple, new)]), ignore)
    finally:
        embeddings.data[first[at]] = kept
    assert (raised.value.rows, raised.value.token) == ([0], at + 1)
    assert told == [[(one,), (two,)] for one, two in zip(first[: at + 1], second[: at + 1], strict=True)]
    assert decoder._captures == captured, "no capture failed"
    assert decoder.generate(inputs, GREEDY, None, ignore, ignore).rows == (first, second)


@pytest.mark.parametrize("captured", [False, True])
def test_they_are_found_in_the_prompt_s_own_logits(handle, step, captured):
    head = handle.model.lm_head.weight
    kept = head[7].clone()
    head.data[7] = float("nan")
    decoder = decoder_of(handle, step, captured)
    try:
        with pytest.raises(NotFiniteError) as raised:
            decoder.generate(side_by_side(prompts(handle)), DRAWN, 1, pytest.fail, ignore)
    finally:
        head.data[7] = kept
    assert (raised.value.rows, raised.value.token) == ([0, 1], 0)


def test_a_model_that_waited_in_ram_says_the_same(handle, expected):
    """Its fused weights are let go before it moves, and made anew when it is back."""
    there = replace(handle, machine=Machine(f"{pretended.NAME}:0", torch.float32, ""))
    tier = OwnStepLanes.name if _not_dense(handle.model) is None else "generate"
    there.decoder = decoder_of(there, tier, captured=tier == OwnStepLanes.name)
    there.decoder.generate(side_by_side(prompts(there)), GREEDY, None, ignore, ignore)
    bring_back = park(there, 1 << 40)
    assert there.decoder is None
    assert {weight.device.type for weight in handle.model.parameters()} == {"cpu"}
    bring_back()
    assert {weight.device.type for weight in handle.model.parameters()} == {pretended.NAME}
    assert answers(there, tier, captured=tier == OwnStepLanes.name) == expected[handle.spec.model]


def filmed(handle, tier="generate", captured=False):
    """What it says of a film, in which Qwen2.5-VL computes positions from seconds."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3), np.uint8)
    video = Video(frames, (0.0, 0.7, 1.4, 2.1, 2.8, 3.5), 4.2)
    inputs = encode(handle, Request(handle.spec, "What happens?"), [], [video]).inputs
    return decoder_of(handle, tier, captured).generate(inputs, GREEDY, None, ignore, ignore).rows


def test_a_film_is_seen_there(handle, expected, step):
    if handle.processor is None:
        pytest.skip("it does not see")
    assert filmed(handle, step, captured=True) == expected["film", handle.spec.model]


def test_rows_that_end_early_do_not_disturb_the_others(handle, step, expected):
    whole = expected[handle.spec.model][0]
    decoder, told = decoder_of(handle, step, captured=True), [[], []]

    def end(new):
        for row, ids in zip(told, new, strict=True):
            row.extend(ids)
        return [0] if len(told[0]) == 5 else []

    result = decoder.generate(side_by_side(prompts(handle)), GREEDY, None, end, ignore)
    assert result.rows == (whole[0][:5], whole[1])


def test_flash_decoding_is_captured_with_the_lengths_on_the_device(handle, expected, monkeypatch):
    if reason := _not_dense(handle.model):
        pytest.skip(reason)
    monkeypatch.setattr("qwenvl.decoding.step_attention.FLASH_FROM", 1)
    decoder = decoder_of(handle, OwnStepLanes.name, captured=True)
    decoder._lanes._step.attention = ByLength(Sdpa(), Flash(flash))
    inputs = side_by_side(prompts(handle))
    assert decoder.generate(inputs, GREEDY, None, ignore, ignore).rows == expected[handle.spec.model][0]
    assert decoder.attention == "flash"


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("most", [1, 3])
def test_pictures_are_told_apart_and_thoughts_cut_short_as_on_the_cpu(handles, expected, captured, most):
    with pretended.there(handles["demo"].model):
        captions, after_thoughts = captioned(handles["demo"], captured, most)
    assert captions == [f"a {color} {shape} on a {background} background" for shape, color, background in SCENES]
    assert (captions, after_thoughts) == expected["demo"]


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize(("share", "taken"), [(0.0, True), (0.018, True), (0.022, False), (float("nan"), False)])
def test_a_captured_step_may_differ_by_a_fiftieth_of_its_largest_logit(share, taken):
    """Of the largest, also where it is a small one that differs."""
    with pretended.there(), nullcontext() if taken else pytest.raises(CaptureError, match="logits differ by"):
        tokens, made = (torch.tensor(value, device=pretended.NAME) for value in ([2], [[0.1, 8.0, 3.0]]))
        off = torch.tensor([[8.0 * share, 0.0, 0.0]], device=pretended.NAME)

        def logits(_):
            return made + off if pretended.Graph.recording else made + 0

        CapturedStep(logits, lambda result: result.argmax(-1), lambda: None, tokens, [], None)()
    assert tokens.tolist() == [1 if taken else 2]


# How a capture fails, and whether the next run may well succeed for that reason.
RAN_OUT = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
BROKE_OFF = "CUDA error: operation failed due to a previous error during capture"


class Failing:
    """Raises in the captures of some runs, where the model computes its logits.

    Args:
        words: of the error; "" raises none.
        attention: the decoder must attend that way for it to fail.
    """

    def __init__(self, decoder, attention=""):
        self.words, self._decoder, self._attention = "", decoder, attention

    def __call__(self, *_):
        now = self._decoder._lanes.attention(True)
        if self.words and pretended.Graph.recording and self._attention in ("", now):
            raise RuntimeError(self.words)


@pytest.fixture
def failing(handle):
    hooks = []

    def failing(decoder, attention=""):
        hook = Failing(decoder, attention)
        hooks.append(handle.model.lm_head.register_forward_pre_hook(hook))
        return hook

    yield failing
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("words", "ends"), [(RAN_OUT, False), (BROKE_OFF, True)], ids=["ran out", "broke off"])
def test_a_capture_that_fails_is_tried_again_at_the_next_run(handle, step, expected, failing, words, ends, caplog):
    decoder, inputs = decoder_of(handle, step, captured=True), side_by_side(prompts(handle))
    fails, whole = failing(decoder), expected[handle.spec.model][0]

    def run(fail):
        fails.words = words if fail else ""
        replays = pretended.Graph.replays
        assert decoder.generate(inputs, SHORTER, None, ignore, ignore).rows == tuple(row[:5] for row in whole)
        decoder.drop_buffers()
        return pretended.Graph.replays > replays

    # Two in a row are forgotten when one succeeds.
    assert [run(fail) for fail in (1, 1, 0, 1, 1, 0)] == [False, False, True, False, False, True]
    assert [run(fail) for fail in (1, 1, 1, 0)] == [False, False, False, not ends]
    assert decoder._captures != ends
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([warning for warning in warnings if "from now on" in warning]) == ends


def test_flash_decoding_that_is_not_captured_is_tried_again_at_the_next_run(handle, expected, failing):
    if reason := _not_dense(handle.model):
        pytest.skip(reason)
    decoder, inputs = decoder_of(handle, OwnStepLanes.name, captured=True), side_by_side(prompts(handle))
    decoder._lanes._step.attention = ByLength(Sdpa(), Flash(flash))
    fails = failing(decoder, "flash")
    used = []
    for fail in (1, 0, 1, 1, 1, 0):
        fails.words = BROKE_OFF if fail else ""
        assert decoder.generate(inputs, GREEDY, None, ignore, ignore).rows == expected[handle.spec.model][0]
        used.append(decoder.attention)
        decoder.drop_buffers()
    assert used == ["sdpa", "flash", "sdpa", "sdpa", "sdpa", "sdpa"], "three times in a row end it"
    assert decoder._captures


def test_cudnn_is_not_allowed_while_a_step_is_captured(handle, step):
    decoder, seen = decoder_of(handle, step, captured=True), []
    look = handle.model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append(allowed_kernels()) if pretended.Graph.recording else None
    )
    decoder.generate(side_by_side(prompts(handle)), GREEDY, None, ignore, ignore)
    look.remove()
    assert seen
    assert all("cuDNN" not in entry for entry in seen)


def captures_by_token(decoder, inputs, sampling):
    """How many captures there had been when each token was told."""
    told, before = [], pretended.Graph.captures
    rows = decoder.generate(
        inputs, sampling, None, lambda _: told.append(pretended.Graph.captures - before), ignore
    ).rows
    return rows, told


@pytest.mark.parametrize("kernel", ["flash", "sdpa"])
def test_an_answer_that_crosses_a_bucket_captures_once_and_before_its_second_token(handle, step, monkeypatch, kernel):
    if kernel == "flash" and step != OwnStepLanes.name:
        pytest.skip("only the own step has flash decoding")
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    monkeypatch.setattr("qwenvl.decoding.step_attention.FLASH_FROM", 16)
    inputs = nearly_full(handle)
    length = inputs["input_ids"].shape[1]
    new = capacity_for(length + 1) + 10 - length
    long = replace(GREEDY, max_new_tokens=new, min_new_tokens=new)
    assert span_for(length + 1) < span_for(length + new)
    whole = decoder_of(handle, "generate", captured=False).generate(inputs, long, None, ignore, ignore).rows
    decoder = decoder_of(handle, step, captured=True)
    if kernel == "flash":
        decoder._lanes._step.attention = ByLength(Sdpa(), Flash(flash))
    rows, told = captures_by_token(decoder, inputs, long)
    assert rows == whole
    assert told == [0] + [1] * (new - 1)
    assert captures_by_token(decoder, inputs, long) == (whole, [0] * new)


def test_a_masked_span_grows_only_where_an_answer_is_longer_than_was_looked_ahead(handle, step, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    for room in ("lanes", "static_cache"):
        monkeypatch.setattr(f"qwenvl.decoding.{room}.AHEAD", 20)
    inputs = side_by_side(prompts(handle))
    long = replace(GREEDY, max_new_tokens=60, min_new_tokens=60)
    _, told = captures_by_token(decoder_of(handle, step, captured=True), inputs, long)
    assert told[20] == 1
    assert told[-1] > 1


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize(("free", "emptied"), [(8 << 30, 0), (100 << 20, 1)])
def test_the_cache_is_emptied_for_a_capture_only_where_memory_is_scarce(free, emptied, monkeypatch):
    monkeypatch.setattr(pretended.Memory, "free", free)
    monkeypatch.setattr(pretended.Memory, "emptied", 0)
    with pretended.there():
        captured(lambda _: torch.ones(1, 3, device=pretended.NAME))
    assert pretended.Memory.emptied == emptied


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize(("version", "times"), [("2.9.0+cu128", 1), ("2.13.1", 1), ("2.14.0+cu130", 0)])
def test_torch_is_told_of_the_generator_where_that_does_something(version, times, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(pretended.Graph, "registered", 0)
    with pretended.there():
        captured(lambda _: torch.ones(1, 3, device=pretended.NAME), torch.Generator())
    assert pretended.Graph.registered == times


@pytest.mark.usefixtures("expected")
def test_what_a_captured_step_must_give_is_of_a_step_that_nobody_watched():
    """Under the watch some operators compute in other parts, and round otherwise."""

    def watched():
        return any(isinstance(mode, HostSyncs) for mode in _get_current_dispatch_mode_stack())

    with pretended.there():
        result = torch.tensor([[1.0, 0.5]], device=pretended.NAME)
        captured(lambda _: result * (1.5 if watched() else 1.0))


def captured(logits, random=None):
    tokens = torch.tensor([0], device=pretended.NAME)
    return CapturedStep(logits, lambda result: result.argmax(-1), lambda: None, tokens, [], random)


@pytest.mark.usefixtures("expected")
def test_whoever_waits_for_a_token_lets_the_core_go():
    with pretended.there():
        assert all(event.blocking for event in ReadLater(1, 3)._ready)


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize(("free", "size"), [(4000, 1000), (1 << 50, 4 << 30)])
def test_a_copy_on_a_gpu_is_timed_there_and_takes_at_most_a_quarter_of_what_is_free(free, size, monkeypatch):
    monkeypatch.setattr(pretended.Memory, "free", free)
    monkeypatch.setattr(pretended.Memory, "emptied", 0)
    with pretended.there():
        assert doctor._copied_bytes(pretended.NAME) == size
        assert doctor.copy_bandwidth(pretended.NAME, min(size, 1000)) == pytest.approx(2 * 1000 / 0.002)
    assert pretended.Memory.emptied == 1


def test_a_version_without_generic_step_is_known():
    """So that the skips above hide nothing."""
    assert hasattr(StaticLayer(8), "cumulative_length") or not tiny.known("qwen3_5")
