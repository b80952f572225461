from types import SimpleNamespace

import pytest
import tiny
import torch
from kernels import reference_kernel
from pictures import draw
from shortage import Shortage

from benchmarks.launches import Launches
from qwenvl.decoding.cuda_graph import HostSyncs
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.own_step import OwnStep, has_fused_norm, text_stack, why_not_dense
from qwenvl.decoding.prefill import forward, named_cache
from qwenvl.decoding.sampling import Sampler
from qwenvl.decoding.step_attention import FLASH_FROM, ByLength, Flash, Sdpa
from qwenvl.loading.capabilities import Machine, machine
from qwenvl.loading.loader import load
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
FAMILIES = tiny.DENSE


def ignore(*_):
    pass


def loaded(family, folder, dtype=torch.float32):
    return load(LoadSpec(family), tiny.save(family, folder), Machine("cpu", dtype, ""))


@pytest.fixture(scope="module", params=FAMILIES)
def handle(request, tmp_path_factory):
    return loaded(request.param, tmp_path_factory.mktemp("m"))


def prefilled(handle, step, padded=0):
    """A buffer after the prefill of a prompt, and the first token; with a second row, padded, if told so."""
    pictures = [draw("circle", "red", "blue")] if handle.processor and not padded else []
    inputs = encode(handle, Request(handle.spec, "What is it?"), pictures, None).inputs
    if padded:
        inputs = {name: value.repeat(2, 1) for name, value in inputs.items()}
        inputs["attention_mask"][1, :padded] = 0
    kv = step.allocate(1 + bool(padded), 256)
    step.reach(256)
    cache, logits, offset = forward(handle.model, inputs)
    kv.fill(cache, inputs["attention_mask"], offset)
    return kv, logits.argmax(-1)


def test_rotary_tables_that_memory_runs_out_for_are_made_the_next_time(handle):
    """Where only one of them grew, every later run would go wrong, on a GPU for the whole process."""
    step, whole = OwnStep(handle.model, "sdpa"), Shortage()
    with whole():
        step.reach(64)
    for number in range(1, whole.count + 1):
        step = OwnStep(handle.model, "sdpa")
        with Shortage(number)(), pytest.raises(RuntimeError, match="out of memory"):
            step.reach(64)
        step.reach(64)
        assert len(step._cos) == len(step._sin) == 64


@pytest.mark.parametrize(
    ("on_gpu", "version", "fused"),
    [(True, "2.8.0+cu128", False), (True, "2.9.0+cu130", True), (True, "2.14.1", True), (False, "2.14.1", False)],
)
def test_a_norm_is_one_call_only_where_it_is_one_kernel(on_gpu, version, fused):
    assert has_fused_norm(SimpleNamespace(is_cuda=on_gpu), version) == fused


def test_a_norm_in_one_call_gives_the_logits_of_its_parts(handle):
    fused, parts = (OwnStep(handle.model, "sdpa", flag) for flag in (True, False))
    kv, tokens = prefilled(handle, fused)
    parts.reach(256)
    with torch.inference_mode():
        torch.testing.assert_close(fused(tokens, kv), parts(tokens, kv), atol=1e-5, rtol=1e-5)


FLASH = ByLength(Sdpa(), Flash(reference_kernel))


@torch.inference_mode()
def whole_step(step, kv, tokens, sample, span):
    logits = step(tokens, kv, span)
    kv.lens.add_(1)
    return sample(logits)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(do_sample=False), Sampling(top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.1), Sampling(top_k=0)],
    ids=["greedy", "all filters", "top_p alone"],
)
@pytest.mark.parametrize("padded", [0, 3], ids=["one row", "padded batch"])
def test_nothing_in_a_step_waits_for_the_device(handle, sampling, padded):
    step = OwnStep(handle.model, "sdpa", fused_norm=True)
    kv, tokens = prefilled(handle, step, padded)
    assert kv.even == (not padded)
    sample = Sampler(sampling, len(tokens), handle.model.get_output_embeddings().weight.shape[0], "cpu")
    sample.start(sampling, 1, tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.long))
    with HostSyncs() as waits:
        whole_step(step, kv, tokens, sample, 256)
    assert waits.found == []


def test_the_lengths_of_flash_decoding_stay_on_the_device(handle):
    def only_there(query, keys, values, rows, slots, span, used):
        return query.clone()

    step = OwnStep(handle.model, "sdpa", fused_norm=True)
    step.attention = ByLength(Sdpa(), Flash(only_there))
    kv, tokens = prefilled(handle, step, padded=3)
    with HostSyncs() as waits, torch.inference_mode():
        step(tokens, kv, FLASH_FROM)
    assert waits.found == []


@pytest.mark.parametrize("padded", [0, 3], ids=["one row", "padded batch"])
def test_a_layer_takes_at_most_20_launches_and_transformers_more_than_twice_as_many(handle, padded):
    step = OwnStep(handle.model, "sdpa", fused_norm=True)
    kv, tokens = prefilled(handle, step, padded)
    counts = {}
    for layers in (1, 2):
        step._layers = step._layers[:layers] if layers == 1 else OwnStep(handle.model, "sdpa", True)._layers
        with Launches() as launches, torch.inference_mode():
            step(tokens, kv, 256)
        counts[layers] = len(launches.names)
    assert 10 <= counts[2] - counts[1] <= 20
    stack = text_stack(handle.model)
    with Launches() as theirs, torch.inference_mode():
        stack(input_ids=tokens[:, None], use_cache=False)
    assert len(theirs.names) / len(stack.layers) > 2 * (counts[2] - counts[1])


@pytest.mark.parametrize("padded", [0, 3], ids=["one row", "padded batch"])
def test_a_static_span_gives_the_logits_of_the_exact_length(handle, padded, monkeypatch):
    monkeypatch.setattr("qwenvl.decoding.step_attention.FLASH_FROM", 256)
    step = OwnStep(handle.model, "sdpa")
    step.attention = FLASH
    kv, tokens = prefilled(handle, step, padded)
    with torch.inference_mode():
        exact = step(tokens, kv)
        for span in (128, 256):
            torch.testing.assert_close(step(tokens, kv, span), exact, atol=1e-5, rtol=1e-5)


def test_logits_are_those_of_the_forward_of_transformers(handle):
    step = OwnStep(handle.model, "sdpa")
    kv, tokens = prefilled(handle, step)
    torch.testing.assert_close(*both_logits(handle, step, kv, tokens), atol=1e-4, rtol=1e-4)


def both_logits(handle, step, kv, tokens):
    """Of our step and of transformers, for one more token after the same prompt."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(keys[:, :, : kv.filled], values[:, :, : kv.filled], layer)
    position = (kv.lens + kv.offset)[:, None]
    with torch.inference_mode():
        mask = torch.ones(1, kv.filled + 1, dtype=torch.long)
        positions = position.expand(3, 1, 1) if handle.processor else position
        expected = handle.model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, **named_cache(handle.model, cache)
        )
        return step(tokens, kv).float(), expected.logits[:, -1].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_within_rounding(family, tmp_path):
    """Two layers of bfloat16 (8 bits of mantissa): within 3 % of the largest logit, and half of that on average."""
    handle = loaded(family, tmp_path / "m", torch.bfloat16)
    step = OwnStep(handle.model, "sdpa")
    kv, tokens = prefilled(handle, step)
    result, expected = both_logits(handle, step, kv, tokens)
    error = (result - expected).abs()
    assert error.max() <= 0.03 * expected.abs().max()
    assert error.mean() <= 0.015 * expected.abs().max()


def test_the_demo_model_says_the_same_in_bfloat16():
    handle = load(LoadSpec("demo"), tiny.DEMO_FOLDER, Machine("cpu", torch.bfloat16, ""))
    sampling = Sampling(do_sample=False, max_new_tokens=60)
    for shape, color, background in (
        ("circle", "red", "blue"),
        ("square", "green", "white"),
        ("triangle", "pink", "gray"),
    ):
        question = Request(handle.spec, "Describe this image.")
        inputs = encode(handle, question, [draw(shape, color, background)], None).inputs
        own, last = (
            Decoder(handle.model, "sdpa", tier).generate(inputs, sampling, None, ignore, ignore).ids
            for tier in ("own step", "generate")
        )
        assert own == last


def test_eager_attention_gives_the_same_logits(handle):
    sdpa, eager = OwnStep(handle.model, "sdpa"), OwnStep(handle.model, "eager")
    kv, tokens = prefilled(handle, sdpa)
    eager.reach(256)
    with torch.inference_mode():
        for span in (None, 256):
            torch.testing.assert_close(eager(tokens, kv, span), sdpa(tokens, kv, span), atol=1e-4, rtol=1e-4)


def test_fused_weights_are_the_model_s_own_and_add_no_memory(handle):
    OwnStep(handle.model, "sdpa")
    layer = text_stack(handle.model).layers[0]
    storages = [getattr(layer.self_attn, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"]
    assert len(set(storages)) == 1
    assert len({p.weight.untyped_storage().data_ptr() for p in (layer.mlp.gate_proj, layer.mlp.up_proj)}) == 1


def test_a_second_step_for_one_model_fuses_nothing_anew(handle):
    """Otherwise every new step would leave the old fused tensors behind."""
    weights = [text_stack(handle.model).layers[0].self_attn.q_proj.weight]
    OwnStep(handle.model, "sdpa")
    before = text_stack(handle.model).layers[0].self_attn.q_proj.weight.data_ptr()
    OwnStep(handle.model, "sdpa")
    assert text_stack(handle.model).layers[0].self_attn.q_proj.weight.data_ptr() == before
    assert weights


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_layers_are_called_as_they_are(quantization):
    handle = load(LoadSpec("demo", quantization), tiny.DEMO_FOLDER, machine("cpu"))
    inputs = encode(handle, Request(handle.spec, "Describe this image."), [draw("circle", "red", "blue")], None).inputs
    sampling = Sampling(do_sample=False, max_new_tokens=40)
    own, last = (
        Decoder(handle.model, "sdpa", tier).generate(inputs, sampling, None, ignore, ignore).ids
        for tier in ("own step", "generate")
    )
    assert own == last
    assert handle.tokenizer.decode(own) == "a red circle on a blue background"


def test_models_that_do_not_fit_say_why(tmp_path):
    from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = tiny.config("qwen3")
    assert why_not_dense(Qwen3ForCausalLM(small), "dense") is None
    small.hidden_act = "gelu"
    assert "gelu" in why_not_dense(Qwen3ForCausalLM(small), "dense")
    sliding = tiny.config("qwen2")
    sliding.layer_types = ["full_attention", "sliding_attention"]
    sliding.sliding_window = 8
    from transformers import Qwen2ForCausalLM

    assert "sliding" in why_not_dense(Qwen2ForCausalLM(sliding), "dense")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    moe = Qwen3MoeConfig(
        **sizes, head_dim=8, vocab_size=50, num_experts=2, moe_intermediate_size=8, intermediate_size=8
    )
    assert why_not_dense(Qwen3MoeForCausalLM(moe), "") == "qwen3_moe is not one of the dense families"
