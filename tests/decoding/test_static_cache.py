"""Families that our own step does not cover, on transformers' static cache."""

import json

import pytest
import tiny
import torch
from pictures import draw
from tiny import batch_of, by_transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.cache_utils import StaticLayer

from qwenvl.decoding.cuda_graph import HostSyncs
from qwenvl.decoding.decoder import Decoder, best_tier
from qwenvl.decoding.own_step import SLIDES, why_not_dense
from qwenvl.decoding.static_cache import StaticCacheLanes, why_not_generic
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.media.media import Video
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

pytestmark = pytest.mark.skipif(
    not hasattr(StaticLayer(8), "cumulative_length"),
    reason="this transformers has no static cache that can be captured",
)
CPU = Machine("cpu", torch.float32, "")
GREEDY = Sampling(do_sample=False, max_new_tokens=48)


def ignore(*_):
    pass


@pytest.fixture(scope="module", params=tiny.families(*tiny.OTHERS))
def handle(request, tmp_path_factory):
    folder = tiny.save(request.param, tmp_path_factory.mktemp("m"))
    return load(LoadSpec(request.param), folder, CPU)


def question(handle, text="What is it?", shape="circle", video=None):
    """A prompt, with a picture where the family sees."""
    pictures = [draw(shape, "red", "blue")] if handle.processor else []
    return encode(handle, Request(handle.spec, text), pictures, [video] if video else []).inputs


def _skip_without(handle):
    if reason := why_not_generic(handle.model):
        pytest.skip(reason)


def generic(handle):
    """One decoder, asked again and again as the pipeline does it."""
    _skip_without(handle)
    decoder = Decoder(handle.model, "sdpa", StaticCacheLanes.name)
    return lambda inputs: decoder.generate(inputs, GREEDY, None, ignore, ignore).rows


def test_tokens_are_those_of_generate_question_after_question(handle):
    ask = generic(handle)
    longer = question(handle, "Tell me at length what you can see here, and what you cannot. " * 3)
    answers = []
    for inputs in (question(handle), longer, question(handle), question(handle, "Why?", "square")):
        answers.append(by_transformers(handle.model, inputs))
        assert ask(inputs) == answers[-1]
    # Otherwise equal tokens would prove little.
    assert len(set(answers)) == 3
    assert len({token for rows in answers for token in rows[0]}) > 10


@pytest.mark.parametrize("family", tiny.families("qwen3_moe", "qwen3_5"))
def test_eager_attention_has_a_mask_of_its_own_kind(family, tmp_path):
    """It adds the mask to the scores, where SDPA takes it for what may be seen."""
    handle = load(LoadSpec(family, attention="eager"), tiny.save(family, tmp_path / "m"), CPU)
    ask = generic(handle)
    for inputs in (question(handle), batch_of(handle)):
        assert ask(inputs) == by_transformers(handle.model, inputs)


def test_other_attention_has_no_static_cache(handle, monkeypatch):
    monkeypatch.setattr(handle.model.config, "_attn_implementation_internal", "flash_attention_2")
    assert "needs attention_mode sdpa, and the model has flash_attention_2" in why_not_generic(handle.model)


def test_a_padded_batch_gives_the_tokens_of_generate_before_and_after_a_single_row(handle):
    ask, inputs = generic(handle), batch_of(handle)
    expected = by_transformers(handle.model, inputs)
    assert ask(inputs) == expected
    assert ask(question(handle)) == by_transformers(handle.model, question(handle))
    assert ask(inputs) == expected


@pytest.mark.parametrize(
    "family", tiny.families(*(one_family for one_family in tiny.OTHERS if one_family in tiny.SEEING))
)
def test_tokens_after_a_video_and_a_picture_are_those_of_generate(family, tmp_path):
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    frames = torch.randint(0, 255, (6, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = question(handle, "What happens?", video=Video(frames.numpy(), (0.0, 0.5, 1.0, 2.0, 2.5, 3.0), 3.5))
    assert {"pixel_values", "pixel_values_videos"} <= set(inputs)
    assert generic(handle)(inputs) == by_transformers(handle.model, inputs)


def test_a_text_that_outgrows_its_cache_goes_on_unchanged(handle, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    monkeypatch.setattr("qwenvl.decoding.static_cache.HEADROOM", 1)
    _skip_without(handle)
    inputs, long = batch_of(handle), Sampling(do_sample=False, max_new_tokens=80)
    expected = by_transformers(handle.model, inputs, 80)
    decoder = Decoder(handle.model, "sdpa", StaticCacheLanes.name)
    assert decoder.generate(inputs, long, None, ignore, ignore).rows == expected
    assert decoder._lanes.version > 1, "it grew"


def attended(model):
    """Collects how many slots the attention of each full layer has seen, call by call."""
    seen = []

    def look(module, args, kwargs):
        cache, layer = kwargs.get("cache") or kwargs["past_key_values"], module.layer_idx
        seen.append((kwargs["hidden_states"].shape[1], cache.layers[layer].get_max_length()))

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_the_prompt_and_each_token_attend_to_the_text_and_not_to_the_room_after_it(tmp_path):
    handle = load(LoadSpec("qwen3_moe"), tiny.save("qwen3_moe", tmp_path / "m"), CPU)
    ask, seen = generic(handle), attended(handle.model)
    for text in ("What is it?", "Why?", "Tell me at length what you can see. " * 9):
        inputs = question(handle, text)
        length = inputs["input_ids"].shape[1]
        seen.clear()
        assert len(ask(inputs)[0]) == 48
        layers = handle.model.config.num_hidden_layers
        assert seen[::layers] == [(length, length), *((1, length + 1 + step) for step in range(47))]


def test_a_captured_step_attends_to_few_sizes(tmp_path, monkeypatch):
    """And gives the logits of an exact one: what it is shown beyond the text is masked."""
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    monkeypatch.setattr("qwenvl.decoding.static_cache.AHEAD", 1)
    handle = load(LoadSpec("qwen3_moe"), tiny.save("qwen3_moe", tmp_path / "m"), CPU)
    _skip_without(handle)
    lanes, seen = StaticCacheLanes(handle.model), attended(handle.model)
    inputs = question(handle, "Tell me at length. " * 9)
    length = inputs["input_ids"].shape[1]
    spans = set()
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, 64, ignore, "")
        for step in range(40):
            tokens = logits.argmax(-1)
            before = [tensor.clone() for tensor in lanes.state]
            exact = lanes.step(tokens).clone()
            for tensor, value in zip(lanes.state, before, strict=True):
                tensor.copy_(value)
            logits = lanes.step(tokens, lanes.span())
            torch.testing.assert_close(logits, exact)
            spans.add(seen[-1][1])
            assert length + 1 + step <= seen[-1][1] <= (length + 1 + step) * 9 / 8 + 16
            lanes.count_on_device()
            lanes.count_on_host()
    assert 1 < len(spans) <= 5


def test_on_a_cpu_these_models_use_generate_and_say_why(handle):
    tier, reason = best_tier(handle.model, tiny.decode_of(handle.model))
    assert tier == "generate"
    assert f"{handle.spec.model} is not one of the dense families" in reason
    result = tiny.decoder(handle.model).generate(question(handle), GREEDY, None, ignore, ignore)
    assert result.rows == by_transformers(handle.model, question(handle))


def test_nothing_in_a_step_waits_for_the_device(handle):
    """Families for which transformers does not promise it either say so."""
    _skip_without(handle)
    lanes = StaticCacheLanes(handle.model)
    with torch.inference_mode():
        _, logits = lanes.prefill(batch_of(handle), 16, ignore, "")
        with HostSyncs() as waits:
            lanes.step(logits.argmax(-1))
            lanes.count_on_device()
    assert waits.found == []


def test_a_warm_up_can_be_undone(handle):
    """What a capture does before it: run the step, give the state back, and go on as if nothing had been."""
    if handle.spec.model.startswith("qwen4"):
        assert "state of its indexed_attention layers grows" in why_not_generic(handle.model)
        return
    assert why_not_generic(handle.model) is None
    lanes = StaticCacheLanes(handle.model)
    with torch.inference_mode():
        _, logits = lanes.prefill(question(handle), 16, ignore, "")
        tokens = logits.argmax(-1)
        before = [tensor.clone() for tensor in lanes.state]
        first = lanes.step(tokens).clone()
        lanes.count_on_device()
        for tensor, value in zip(lanes.state, before, strict=True):
            tensor.copy_(value)
        torch.testing.assert_close(lanes.step(tokens), first)


# How a config.json says that attention slides, or names a window that is off.
ON = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
WAYS = {
    "on": ON,
    "on, and all layers are called full": {**ON, "layer_types": ["full_attention"] * 2},
    "in one layer": {**ON, "layer_types": ["full_attention", "sliding_attention"]},
    "off": {**ON, "use_sliding_window": False},
    "not said": {"sliding_window": 8, "max_window_layers": 0},
}
WINDOWED = tiny.families("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl", "qwen2_5_vl")


def _with_window(family, said):
    """A model of the family whose config.json says that of its attention."""
    content = json.loads(tiny.config(family).to_json_string(use_diff=False))
    text = content.get("text_config", content)
    for name in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"):
        text.pop(name, None)
    text |= said
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family in tiny.SEEING else AutoModelForCausalLM
    return auto.from_config(type(tiny.config(family)).from_dict(content), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", WINDOWED)
def test_a_model_whose_attention_slides_takes_neither_step(family, way):
    model, whole = _with_window(family, WAYS[way]), _with_window(family, {"use_sliding_window": False})
    ids = torch.arange(10, 60)[None]
    with torch.inference_mode():
        slides = not torch.allclose(model(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)
    if way in ("on", "in one layer"):
        assert slides, "or this test shows nothing"
    if slides:
        assert "sliding" in why_not_generic(model)
        assert why_not_dense(model, "dense") == SLIDES


@pytest.mark.parametrize("way", ["off", "not said"])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_is_off_changes_nothing(family, way):
    model = _with_window(family, WAYS[way])
    assert why_not_generic(model) is None
    assert why_not_dense(model, "dense") is None
