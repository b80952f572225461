import pytest
import tiny
import torch
from conftest import draw

from qwenvl.capabilities import Machine
from qwenvl.decode import generate
from qwenvl.loader import load
from qwenvl.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")


def ignore(*_):
    pass


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def random_model(request, tmp_path_factory):
    """A handle and a prompt, with a picture where the family sees."""
    handle = load(LoadSpec(request.param), tiny.save(request.param, tmp_path_factory.mktemp("m")), CPU)
    pictures = [draw("circle", "red", "blue")] if handle.processor else []
    return handle, encode(handle, Request(handle.spec, "What is it?"), pictures, None).inputs


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_generate(random_model, penalty):
    handle, inputs = random_model
    expected = handle.model.generate(**inputs, do_sample=False, max_new_tokens=48, repetition_penalty=penalty)
    sampling = Sampling(do_sample=False, max_new_tokens=48, repetition_penalty=penalty)
    new = expected[0, inputs["input_ids"].shape[1] :].tolist()
    ends = handle.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert list(generate(handle.model, inputs, sampling, None, ignore, ignore).ids) == [i for i in new if i not in ends]


def test_every_token_is_reported_once_in_order(random_model):
    handle, inputs = random_model
    told = []
    made = generate(handle.model, inputs, Sampling(max_new_tokens=20), 3, told.extend, ignore)
    assert told == list(made.ids)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(random_model):
    handle, inputs = random_model
    sampling = Sampling(temperature=1.5, top_p=1, top_k=0, max_new_tokens=24)
    made = [generate(handle.model, inputs, sampling, seed, ignore, ignore).ids for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_sampling_neither_seeds_nor_draws_from_the_global_generator(random_model):
    handle, inputs = random_model
    before = torch.get_rng_state()
    generate(handle.model, inputs, Sampling(max_new_tokens=8), 5, ignore, ignore)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_largest_seed_works(random_model):
    handle, inputs = random_model
    assert generate(handle.model, inputs, Sampling(max_new_tokens=1), 2**64 - 1, ignore, ignore).ids


@pytest.mark.parametrize("token", [1, 5])
def test_what_the_watcher_raises_stops_the_loop_at_that_token(random_model, token):
    handle, inputs = random_model
    seen = []

    def stop(ids):
        seen.extend(ids)
        if len(seen) == token:
            raise KeyboardInterrupt

    sampling = Sampling(do_sample=False, max_new_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        generate(handle.model, inputs, sampling, None, stop, ignore)
    assert len(seen) == token


def test_times_add_up(random_model):
    handle, inputs = random_model
    made = generate(handle.model, inputs, Sampling(do_sample=False, max_new_tokens=12), None, ignore, ignore)
    assert made.prefill_s > 0
    assert made.decode_s > 0
    assert made.tokens_per_s == pytest.approx((len(made.ids) - 1) / made.decode_s)


def test_one_token_has_no_speed(random_model):
    handle, inputs = random_model
    made = generate(handle.model, inputs, Sampling(do_sample=False, max_new_tokens=1), None, ignore, ignore)
    assert made.tokens_per_s == 0


def test_the_end_token_ends_the_text_and_is_not_part_of_it(demo):
    question = Request(demo.spec, "Describe this image.")
    inputs = encode(demo, question, [draw("circle", "red", "blue")], None).inputs
    made = generate(demo.model, inputs, Sampling(do_sample=False, max_new_tokens=50), None, ignore, ignore)
    assert demo.tokenizer.decode(made.ids, skip_special_tokens=False) == "a red circle on a blue background"


def test_cancel_works_at_every_layer_of_the_prefill_and_never_later(random_model):
    handle, inputs = random_model
    tokens = Sampling(do_sample=False, max_new_tokens=4)
    checks = []
    generate(handle.model, inputs, tokens, None, ignore, lambda: checks.append(1))
    layers = 4 if handle.processor else 2
    assert len(checks) == layers, "two layers of text and two of vision, once each"
    for last in range(1, layers + 1):
        checks.clear()

        def stop(last=last):
            checks.append(1)
            if len(checks) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(handle.model, inputs, tokens, None, ignore, stop)
        assert len(checks) == last
    # Nothing is left hooked to the model.
    checks.clear()
    handle.model(**inputs)
    assert checks == []
