import json
import logging
from importlib.util import find_spec

import pytest
import tiny
import torch
import transformers
from pictures import draw

from qwenvl.loading import capabilities, precision
from qwenvl.loading.capabilities import Machine, machine
from qwenvl.loading.loader import LoadError, load
from qwenvl.loading.precision import Precision, PrecisionError, plan_precision, precision_options, quiet_others
from qwenvl.loading.source import ModelSource
from qwenvl.models.checkpoint import Checkpoint
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
ADA = Machine("cuda:0", torch.bfloat16, "", (8, 9))
AMPERE = Machine("cuda:0", torch.bfloat16, "", (8, 6))
APPLE = Machine("mps", torch.float16, "")
PLAIN = Checkpoint(tiny.DEMO_FOLDER, "qwen3_vl")
NEW = not transformers.__version__.startswith("4.")


def ignore(*_):
    pass


def stored(how, **more):
    return Checkpoint(tiny.DEMO_FOLDER, "qwen3_vl", quantized=how, **more)


@pytest.fixture
def packages(monkeypatch):
    """The packages that are installed, as a set to change."""
    installed = {"accelerate", "bitsandbytes", "gptqmodel", "optimum", "awq", "compressed_tensors", "triton", "kernels"}
    monkeypatch.setattr(capabilities, "has_package", lambda name: name in installed)
    return installed


def answer(handle):
    """What the demo model says of a red circle."""
    sampling = Sampling(do_sample=False, max_new_tokens=20)
    inputs = encode(handle, Request(handle.spec, "Describe this image."), [draw("circle", "red", "blue")], None).inputs
    return handle.tokenizer.decode(tiny.decoder(handle.model).generate(inputs, sampling, None, ignore, ignore).ids)


def test_what_can_be_had_is_used_as_asked(packages):
    for asked in ("none", "4bit", "8bit"):
        assert plan_precision(asked, PLAIN, AMPERE) == Precision(asked)


@pytest.mark.parametrize("asked", ["4bit", "8bit"])
def test_what_cannot_be_had_becomes_none_with_the_reason(packages, asked):
    assert plan_precision(asked, PLAIN, APPLE) == Precision(
        "none", reason=f"{asked} is not possible here: bitsandbytes does not run on Apple GPUs; using none instead"
    )
    packages.clear()
    assert "pip install bitsandbytes" in plan_precision(asked, PLAIN, AMPERE).reason


def test_4bit_computes_in_the_machine_dtype_with_double_quantization():
    options = precision_options("4bit", torch.float16)["quantization_config"]
    assert options.load_in_4bit
    assert options.bnb_4bit_quant_type == "nf4"
    assert options.bnb_4bit_use_double_quant
    assert options.bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(("asked", "kind"), [("4bit", "Int4Linear"), ("8bit", "Int8Linear")])
def test_a_cpu_s_own_products_need_no_bitsandbytes_and_the_demo_still_sees(asked, kind, monkeypatch):
    monkeypatch.setattr(precision, "why_no_bitsandbytes", lambda *_: "it is not installed")
    handle = load(LoadSpec("demo", asked), tiny.DEMO_FOLDER, machine("cpu"))
    assert handle.plan.quantization == asked
    assert handle.plan.fallbacks == ()
    forms = [name for name, module in handle.model.named_modules() if type(module).__name__ == kind]
    assert len(forms) == 4 * 4 + (asked == "8bit"), "four layers of four products, and the head in 8 bits"
    assert not any("visual" in name for name in forms)
    assert answer(handle) == "a red circle on a blue background"


@pytest.mark.parametrize("asked", ["4bit", "8bit"])
def test_a_cpu_without_such_products_uses_bitsandbytes_and_else_none(asked, monkeypatch):
    monkeypatch.setattr(precision, "why_no_form", lambda *_: "no product")
    assert plan_precision(asked, PLAIN, CPU) == Precision(asked)
    monkeypatch.setattr(precision, "why_no_bitsandbytes", lambda *_: "it is not installed")
    assert plan_precision(asked, PLAIN, CPU).name == "none"
    assert "it is not installed" in plan_precision(asked, PLAIN, CPU).reason


@pytest.mark.usefixtures("by_bitsandbytes")
@pytest.mark.parametrize(("asked", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_bitsandbytes_quantizes_the_language_model_alone_and_the_demo_still_sees(asked, kind, demo):
    handle = load(LoadSpec("demo", asked), tiny.DEMO_FOLDER, machine("cpu"))
    replaced = [name for name, module in handle.model.named_modules() if type(module).__name__ == kind]
    assert len(replaced) == 4 * 7, "four layers of seven projections"
    assert all(".layers." in name and "visual" not in name for name in replaced)
    assert handle.model.lm_head.weight.dtype == handle.model.dtype == machine("cpu").dtype
    assert handle.model.get_memory_footprint() < 0.8 * demo.model.get_memory_footprint()
    assert answer(handle) == "a red circle on a blue background"


@pytest.mark.parametrize("kind", ["Linear4bit", "Int4Linear"])
@pytest.mark.parametrize("family", tiny.families("qwen3_moe", "qwen3_next", "qwen3_5_moe"))
def test_routers_and_decays_are_not_quantized_and_fused_experts_are_named(family, kind, tmp_path, request):
    if kind == "Linear4bit":
        request.getfixturevalue("by_bitsandbytes")
    folder = tiny.save(family, tmp_path / "m")
    handle = load(LoadSpec(family, "4bit"), folder, CPU)
    kinds = (kind, "Part") if kind == "Int4Linear" else (kind,)
    replaced = {name.split(".")[-1] for name, m in handle.model.named_modules() if type(m).__name__ in kinds}
    assert {"q_proj", "o_proj"} <= replaced
    assert replaced.isdisjoint({"gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "lm_head"})
    assert bool(handle.plan.fallbacks) == NEW
    assert not NEW or "4bit leaves the experts of this model as they are" in handle.plan.fallbacks[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", ["none", "4bit"])
@pytest.mark.parametrize("how", ["bitsandbytes-4bit", "bitsandbytes-8bit", "fp8", "compressed-tensors"])
def test_a_checkpoint_that_brings_its_own_quantization_is_read_and_sees(how, asked, dtype, tmp_path):
    if how == "fp8" and not NEW:
        pytest.skip("this transformers cannot make FP8 plain")
    if how == "compressed-tensors" and not find_spec("compressed_tensors"):
        pytest.skip("compressed-tensors is not installed")
    folder = tiny.save_demo(tmp_path / "m", how)
    where, spec = Machine("cpu", dtype, ""), LoadSpec("demo", asked)
    handle = load(spec, folder, where)
    assert answer(handle) == "a red circle on a blue background"
    assert {weight.dtype for weight in handle.model.parameters() if weight.is_floating_point()} == {dtype}
    assert handle.plan.quantization == (how if how.startswith("bits") else "none")
    told = f"4bit has no effect: the checkpoint's weights are stored as {how}" in " ".join(handle.plan.fallbacks)
    assert told == (asked == "4bit" and how != "bitsandbytes-4bit")
    held = handle.model.get_memory_footprint(return_buffers=False)
    # Before transformers 5, compressed weights stay beside the plain ones.
    margin = 0.2 if how == "compressed-tensors" and not NEW else 0.05
    assert ModelSource(spec, folder, where).size() == pytest.approx(held, rel=margin)


def test_8bit_that_the_checkpoint_brings_does_not_flood_the_log_either(tmp_path, caplog):
    handle = load(LoadSpec("demo"), tiny.save_demo(tmp_path / "m", "bitsandbytes-8bit"), machine("cpu"))
    with caplog.at_level(logging.WARNING):
        answer(handle)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize("how", ["awq", "gptq", "compressed-tensors", "bitsandbytes-4bit"])
def test_a_missing_package_is_an_error_with_the_command_before_weights_are_read(how, packages, tmp_path):
    """There are no weights in the folder at all."""
    packages.clear()
    settings = {"quant_method": how, "bits": 4}
    if how.startswith("bitsandbytes"):
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "quantization_config": settings}))
    names = {"gptq": "optimum gptqmodel", "awq": "gptqmodel" if NEW else "autoawq", "bitsandbytes-4bit": "bitsandbytes"}
    command = rf"stored as {how}, which cannot be read here: .*\(pip install {names.get(how, how)}\)"
    with pytest.raises(LoadError, match=command):
        load(LoadSpec("m"), tmp_path, AMPERE)


def test_a_way_of_storing_that_transformers_does_not_know_is_an_error(packages):
    with pytest.raises(PrecisionError, match=r"stored as int3-magic.*transformers \d[\d.]+ does not know it"):
        plan_precision("none", stored("int3-magic"), AMPERE)


def test_what_the_checkpoint_brings_is_kept_and_the_widget_told_to_have_no_effect(packages):
    assert plan_precision("none", stored("awq"), AMPERE) == Precision("awq")
    told = plan_precision("8bit", stored("awq"), AMPERE)
    assert (told.name, told.reason) == (
        "awq",
        "8bit has no effect: the checkpoint's weights are stored as awq",
    )
    same = plan_precision("8bit", stored("bitsandbytes-8bit"), AMPERE)
    assert same == Precision("bitsandbytes-8bit"), "it is what was asked for"


def test_fp8_is_kept_where_it_can_be_computed(packages, monkeypatch):
    monkeypatch.setattr(capabilities, "kernel_on_disk", lambda repo_id: True)
    assert plan_precision("none", stored("fp8"), ADA) == Precision("fp8")


@pytest.mark.skipif(not NEW, reason="this transformers cannot make FP8 plain")
@pytest.mark.parametrize(
    ("where", "missing", "reason"),
    [
        (CPU, "", "FP8 is computed on GPUs only, and this runs on cpu"),
        (APPLE, "", "this runs on mps"),
        (AMPERE, "", "FP8 needs compute capability 8.9, and this GPU has 8.6"),
        (ADA, "triton", "pip install triton"),
        (ADA, "kernels", "pip install kernels"),
        (ADA, "on disk", "hf download kernels-community/finegrained-fp8"),
    ],
)
def test_fp8_that_cannot_be_computed_is_made_plain_with_the_reason(packages, monkeypatch, where, missing, reason):
    packages.discard(missing)
    monkeypatch.setattr(capabilities, "kernel_on_disk", lambda repo_id: missing != "on disk")
    result = plan_precision("none", stored("fp8"), where)
    assert (result.name, result.expands) == ("none", "fp8")
    assert reason in result.reason


@pytest.mark.skipif(NEW, reason="this transformers can make FP8 plain")
def test_fp8_that_can_be_neither_computed_nor_made_plain_is_an_error(packages):
    with pytest.raises(PrecisionError, match=r"compute capability 8\.9.*transformers 5 can make them plain"):
        plan_precision("none", stored("fp8"), AMPERE)


@pytest.mark.parametrize("kind", ["kernels", "models"])
def test_a_kernel_is_on_disk_when_its_build_is(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    assert not capabilities.kernel_on_disk("owner/name")
    snapshot = tmp_path / f"{kind}--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert not capabilities.kernel_on_disk("owner/name"), "what was asked for and never came"
    (snapshot / "build" / "torch-cuda").mkdir(parents=True)
    assert capabilities.kernel_on_disk("owner/name")


@pytest.mark.parametrize(
    ("logger", "line"),
    [
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16"),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s."),
        ("accelerate.big_modeling", "Some parameters are on the meta device because they were offloaded to the cpu."),
    ],
)
def test_what_others_warn_of_where_all_is_well_is_left_out_and_nothing_else(logger, line, caplog):
    for _ in "ab":
        quiet_others()
    logging.getLogger(logger).warning(line)
    logging.getLogger(logger).warning("something else")
    assert caplog.messages == ["something else"]
    # The pack itself, which other tests load as ComfyUI does, may have added one of its own class.
    ours = [known for known in logging.getLogger(logger).filters if type(known).__module__ == quiet_others.__module__]
    assert len(ours) == 1
