from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from pictures import draw
from tiny import batch_of, by_transformers, cancelled
from transformers.cache_utils import StaticLayer

from qwenvl.decoding.decoder import Decoder
from qwenvl.errors import UnusableError
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
TIERS = ("own step", "generic step", "generate")
FAMILIES = tiny.DENSE
GREEDY = Sampling(do_sample=False, max_new_tokens=48)


def ignore(*_):
    pass


@pytest.fixture(scope="module", params=FAMILIES)
def random_model(request, tmp_path_factory):
    """A handle of random weights, and a prompt, with a picture where the family sees."""
    handle = load(LoadSpec(request.param), tiny.save(request.param, tmp_path_factory.mktemp("m")), CPU)
    pictures = [draw("circle", "red", "blue")] if handle.processor else []
    return handle, encode(handle, Request(handle.spec, "What is it?"), pictures, None).inputs


def tiers():
    """Those that this version of transformers has."""
    generic = hasattr(StaticLayer(8), "cumulative_length")
    return [tier for tier in TIERS if generic or tier != "generic step"]


@pytest.fixture
def broken(random_model):
    """Makes the model fail where it computes its logits, until the end of the test."""
    model = random_model[0].model
    whole = model.lm_head.weight
    yield lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(whole[:, 1:], requires_grad=False))
    model.lm_head.weight = whole


@pytest.fixture(params=tiers())
def generate(request, random_model):
    """The generation of one tier with the random model, on its prompt unless told otherwise."""
    handle, inputs = random_model
    decoder = Decoder(handle.model, "sdpa", request.param)

    def run(sampling, seed=None, on_tokens=ignore, check=ignore, given=inputs):
        return decoder.generate(given, sampling, seed, on_tokens, check)

    return run


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_generate(random_model, generate, penalty):
    handle, inputs = random_model
    expected = by_transformers(handle.model, inputs, repetition_penalty=penalty)
    result = generate(Sampling(do_sample=False, max_new_tokens=48, repetition_penalty=penalty))
    assert result.rows == expected


def test_random_models_say_many_things(random_model):
    """And what they say depends on what they read; otherwise equal tokens would prove little."""
    handle, inputs = random_model
    assert len(set(by_transformers(handle.model, inputs)[0])) > 3
    assert len(set(by_transformers(handle.model, batch_of(handle)))) == 3


def test_a_padded_batch_gives_the_tokens_of_generate(random_model, generate):
    handle, _ = random_model
    inputs = batch_of(handle)
    assert inputs["attention_mask"].sum(1).unique().numel() == 3, "three lengths"
    assert generate(GREEDY, given=inputs).rows == by_transformers(handle.model, inputs)


def test_each_row_of_a_batch_ends_by_itself(random_model, generate):
    handle, _ = random_model
    inputs = batch_of(handle)
    rows = generate(GREEDY, given=inputs).rows
    ends = [rows[0][5], rows[2][20]]
    config = handle.model.generation_config
    before, config.eos_token_id = config.eos_token_id, ends
    try:
        told = [[], [], []]

        def tell(new):
            for all_, row in zip(told, new, strict=True):
                all_.extend(row)

        result = generate(GREEDY, given=inputs, on_tokens=tell)
        assert result.rows == by_transformers(handle.model, inputs)
        assert {len(row) for row in result.rows} != {48}
        assert tuple(map(tuple, told)) == result.rows
    finally:
        config.eos_token_id = before


def test_a_row_that_the_caller_ends_is_over_while_the_others_go_on(random_model, generate):
    handle, _ = random_model
    inputs = batch_of(handle)
    whole = generate(GREEDY, given=inputs).rows
    told = [[], [], []]

    def end_early(new):
        for all_, row in zip(told, new, strict=True):
            all_.extend(row)
        return [row for row, limit in enumerate((5, 48, 9)) if len(told[row]) == limit]

    result = generate(GREEDY, given=inputs, on_tokens=end_early)
    assert result.rows == (whole[0][:5], whole[1], whole[2][:9]) == tuple(map(tuple, told))
    assert result.steps == sum(len(row) - 1 for row in result.rows)
    asked = []
    everyone = generate(GREEDY, given=inputs, on_tokens=lambda new: asked.append(new) or range(3))
    assert everyone.rows == tuple(row[:1] for row in whole)
    assert len(asked) == 1, "the loop ends with the last row"


@pytest.mark.parametrize("size", [1, 2])
def test_no_row_of_tokens_occurs_twice(random_model, generate, size):
    handle, inputs = random_model
    result = generate(replace(GREEDY, no_repeat_ngram_size=size)).rows
    assert result == by_transformers(handle.model, inputs, no_repeat_ngram_size=size)
    rows = list(zip(*(result[0][start:] for start in range(size)), strict=False))
    assert len(rows) == len(set(rows))


def test_a_text_is_at_least_so_long(random_model, generate):
    handle, inputs = random_model
    config = handle.model.generation_config
    # A token that comes early ends the text now.
    before, config.eos_token_id = config.eos_token_id, [generate(GREEDY).ids[9]]
    try:
        result = generate(replace(GREEDY, min_new_tokens=30)).rows
        assert result == by_transformers(handle.model, inputs, min_new_tokens=30)
        assert len(result[0]) >= 30 > 9 >= len(generate(GREEDY).ids)
    finally:
        config.eos_token_id = before


def test_penalties_change_the_tokens_alike_in_every_tier(random_model):
    handle, inputs = random_model
    results = {}
    for how in ({}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}, {"frequency_penalty": -2.0}):
        sampling = replace(GREEDY, **how)
        decoders = [Decoder(handle.model, "sdpa", tier) for tier in tiers()]
        (ids,) = {decoder.generate(inputs, sampling, None, ignore, ignore).ids for decoder in decoders}
        results[str(how)] = ids
    assert len(set(results.values())) >= 3
    repeated = [len(ids) - len(set(ids)) for ids in results.values()]
    assert repeated[2] <= repeated[0] <= repeated[3]


def test_a_step_that_cannot_be_captured_says_why_and_runs_eagerly(random_model):
    handle, inputs = random_model
    decoder = tiny.decoder(handle.model)
    sampling = replace(GREEDY, no_repeat_ngram_size=2)
    expected = decoder.generate(inputs, sampling, None, ignore, ignore)
    assert "ngram" not in expected.tier_reason, "on a CPU nothing is captured anyway"
    # As on a GPU: here a capture would fail at once.
    decoder._captures = True
    result = decoder.generate(inputs, sampling, None, ignore, ignore)
    assert result.rows == expected.rows
    assert "no_repeat_ngram_size" in result.tier_reason
    assert decoder._captures, "no capture was tried"


def test_every_token_is_reported_once_in_order(generate):
    told = []
    result = generate(Sampling(max_new_tokens=20), 3, on_tokens=lambda rows: told.extend(rows[0]))
    assert told == list(result.ids)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(generate):
    sampling = Sampling(temperature=1.5, top_p=1, top_k=0, max_new_tokens=24)
    results = [generate(sampling, seed).ids for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_all_tiers_draw_the_same_tokens_from_a_seed(random_model):
    handle, inputs = random_model
    sampling = Sampling(temperature=1.2, top_p=0.95, top_k=40, min_p=0.01, repetition_penalty=1.2, max_new_tokens=32)
    results = {
        Decoder(handle.model, "sdpa", tier).generate(inputs, sampling, 7, ignore, ignore).ids for tier in tiers()
    }
    assert len(results) == 1


def test_sampling_neither_seeds_nor_draws_from_the_global_generator(generate):
    before = torch.get_rng_state()
    generate(Sampling(max_new_tokens=8), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_many_kinds_of_sampling_the_last_are_kept(random_model):
    """Each keeps tensors of the size of the vocabulary, and on a GPU a captured step."""
    handle, inputs = random_model
    decoder = tiny.decoder(handle.model)
    for top_k in (1, 2, 3, 1, 4, 5, 1):
        decoder.generate(inputs, Sampling(top_k=top_k, max_new_tokens=2), 1, ignore, ignore)
    assert [key[2] for key in decoder._samplers] == [3, 4, 5, 1]


def test_the_largest_seed_works(generate):
    assert generate(Sampling(max_new_tokens=1), 2**64 - 1).ids


@pytest.mark.parametrize("token", [1, 5])
def test_what_the_watcher_raises_stops_the_loop_at_that_token_and_the_next_run_is_right(generate, token):
    whole = generate(GREEDY).ids
    assert cancelled(lambda stop: generate(GREEDY, on_tokens=stop), token) == whole[:token]
    assert generate(GREEDY).ids == whole


def test_cancel_works_at_every_part_of_the_prefill_and_of_the_first_steps_and_leaves_nothing_behind(
    random_model, generate
):
    handle, inputs = random_model
    fresh = {"given": {**inputs, "input_ids": inputs["input_ids"].clone()}}
    whole, checks = generate(GREEDY, **fresh).ids, []
    generate(GREEDY, check=lambda: checks.append(1), **fresh)
    layers = 4 if handle.processor else 2
    assert len(checks) > 5 * layers, "two layers of text and two of vision, and their parts"
    for last in range(1, len(checks) + 1, 7):
        seen = []

        def stop(last=last, seen=seen):
            seen.append(1)
            if len(seen) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(GREEDY, check=stop, **fresh)
        assert len(seen) == last
    assert generate(GREEDY, **fresh).ids == whole
    checks.clear()
    handle.model(**inputs)
    assert checks == []


def test_a_step_is_checked_before_every_layer_and_no_part_of_it(generate):
    """A token of a large model takes a second on a CPU."""
    checks, at_token = [], []

    def tell(new):
        at_token.append(len(checks))

    generate(GREEDY, check=lambda: checks.append(1), on_tokens=tell)
    assert {later - earlier for earlier, later in pairwise(at_token)} == {2}, "two layers of text"


def test_a_model_that_cannot_be_computed_is_an_error_of_ours(generate, broken):
    broken()
    with pytest.raises(
        UnusableError, match=r"m\d* was loaded, but cannot be computed\. .*, or ask the model's maker: \S"
    ) as caught:
        generate(GREEDY)
    assert type(caught.value.__cause__) is RuntimeError


def test_a_step_that_cannot_be_computed_is_too(random_model, broken):
    handle, inputs = random_model
    decoder = Decoder(handle.model, "sdpa", tiers()[1])
    told = []

    def tell(new):
        told.append(new)
        broken()

    with pytest.raises(UnusableError, match="was loaded, but cannot be computed"):
        decoder.generate(inputs, GREEDY, None, tell, ignore)
    assert len(told) == 1


def test_times_add_up(generate):
    result = generate(Sampling(do_sample=False, max_new_tokens=12))
    assert result.prefill_s > 0
    assert result.decode_s > 0
    assert result.steps == 11
    assert result.tokens_per_s == pytest.approx(11 / result.decode_s)


def test_one_token_has_no_speed(generate):
    assert generate(Sampling(do_sample=False, max_new_tokens=1)).tokens_per_s == 0


def test_the_end_token_ends_the_text_and_is_not_part_of_it(demo):
    question = Request(demo.spec, "Describe this image.")
    inputs = encode(demo, question, [draw("circle", "red", "blue")], None).inputs
    for tier in tiers():
        result = Decoder(demo.model, "sdpa", tier).generate(inputs, GREEDY, None, ignore, ignore)
        assert demo.tokenizer.decode(result.ids, skip_special_tokens=False) == "a red circle on a blue background"


def test_a_text_that_outgrows_its_buffer_goes_on_unchanged(random_model, monkeypatch):
    handle, inputs = random_model
    expected = by_transformers(handle.model, inputs, 300)
    monkeypatch.setattr("qwenvl.decoding.kv_cache.SMALLEST_CAPACITY", 16)
    monkeypatch.setattr("qwenvl.decoding.lanes.HEADROOM", 1)
    decoder = tiny.decoder(handle.model)
    result = decoder.generate(inputs, Sampling(do_sample=False, max_new_tokens=300), None, ignore, ignore)
    assert result.rows == expected
    assert decoder._lanes.kv.capacity < 1024, "it grew from a small one"


def test_a_large_buffer_is_given_back_after_the_run(random_model, monkeypatch):
    handle, inputs = random_model
    monkeypatch.setattr("qwenvl.decoding.lanes.KEPT_CAPACITY", 512)
    decoder = tiny.decoder(handle.model)
    first, second = (decoder.generate(inputs, GREEDY, None, ignore, ignore) for _ in "ab")
    assert decoder._lanes._kv is None
    assert first.rows == second.rows
    assert second.reused_tokens == 0


# With the tokens around it, long enough for re-use by itself.
SYSTEM = "Be brief, be exact, and answer in one sentence, as a teacher would."


class Reuse:
    """Questions about pictures to one decoder, and to a fresh one each time."""

    def __init__(self, handle):
        self.handle = handle
        self.decoder = tiny.decoder(handle.model)

    def ask(self, text, pictures, system=SYSTEM):
        prompt = encode(self.handle, Request(self.handle.spec, text, system), pictures, None)
        arguments = (prompt.inputs, GREEDY, None, ignore, ignore, prompt.media)
        result = self.decoder.generate(*arguments)
        assert result.rows == tiny.decoder(self.handle.model).generate(*arguments).rows
        return result


@pytest.fixture
def reuse(random_model):
    return Reuse(random_model[0])


CIRCLE, SQUARE = draw("circle", "red", "blue"), draw("square", "red", "blue")


def seen_by(reuse, *pictures):
    return list(pictures) if reuse.handle.processor else []


def test_a_second_question_about_the_same_picture_reuses_it_and_answers_the_same(reuse):
    pictures = seen_by(reuse, CIRCLE)
    assert reuse.ask("What is it, my dear friend?", pictures).reused_tokens == 0
    second = reuse.ask("What is it that you can see?", pictures)
    prompt = encode(reuse.handle, Request(reuse.handle.spec, "What is it", SYSTEM), pictures, None)
    assert second.reused_tokens >= prompt.tokens - 8
    third = reuse.ask("Where?", pictures)
    assert third.reused_tokens >= 16


def test_the_same_question_again_computes_one_token_of_the_prompt(reuse):
    pictures = seen_by(reuse, CIRCLE)
    reuse.ask("What is it, my dear friend?", pictures)
    again = reuse.ask("What is it, my dear friend?", pictures)
    tokens = encode(
        reuse.handle, Request(reuse.handle.spec, "What is it, my dear friend?", SYSTEM), pictures, None
    ).tokens
    assert again.reused_tokens == tokens - 1


def test_another_picture_of_the_same_size_is_looked_at(reuse):
    if reuse.handle.processor is None:
        pytest.skip("this family does not see")
    reuse.ask("What is it?", [CIRCLE])
    assert reuse.ask("What is it?", [SQUARE]).reused_tokens == 0
    assert reuse.ask("What is it?", [SQUARE, CIRCLE]).reused_tokens == 0


def test_another_system_prompt_is_read_anew(reuse):
    pictures = seen_by(reuse, CIRCLE)
    reuse.ask("What is it?", pictures, SYSTEM)
    assert reuse.ask("What is it?", pictures, "Answer at length, in French.").reused_tokens == 0


def test_reuse_skips_the_vision_tower(demo):
    looks = []
    decoder = tiny.decoder(demo.model)
    visual = next(module for name, module in demo.model.named_modules() if name.endswith("visual"))
    hook = visual.register_forward_pre_hook(lambda *_: looks.append(1))
    try:
        for text in ("Describe this image.", "Which shape is it?"):
            prompt = encode(demo, Request(demo.spec, text, "You are a helpful assistant."), [CIRCLE], None)
            decoder.generate(prompt.inputs, GREEDY, None, ignore, ignore, prompt.media)
    finally:
        hook.remove()
    assert looks == [1]


def test_a_cancelled_run_leaves_nothing_to_reuse(reuse):
    pictures = seen_by(reuse, CIRCLE)
    reuse.ask("What is it, my dear friend?", pictures)
    prompt = encode(reuse.handle, Request(reuse.handle.spec, "Why?", SYSTEM), pictures, None)

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reuse.decoder.generate(prompt.inputs, GREEDY, None, stop, ignore, prompt.media)
    assert reuse.ask("What is it, my dear friend?", pictures).reused_tokens == 0


@pytest.mark.parametrize(("family", "decodes"), [("qwen2", "sdpa"), ("qwen3_moe", "flash_attention_2")])
def test_what_tokens_attend_with_is_told_apart_from_the_prompt(family, decodes, tmp_path):
    """Our own step has two ways; all others are the model's."""
    handle = load(LoadSpec(family), tiny.save(family, tmp_path / "m"), CPU)
    assert tiny.decoder(handle.model, "flash_attention_2").attention == decodes
    assert tiny.decoder(handle.model, "eager").attention == "eager"
