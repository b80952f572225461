import sys

import pytest
import tiny
import torch
import transformers

from qwenvl.loading import capabilities
from qwenvl.loading.attention import AttentionPlan, plan_attention
from qwenvl.loading.capabilities import Machine
from qwenvl.models.checkpoint import Checkpoint
from qwenvl.settings import ATTENTIONS

CPU = Machine("cpu", torch.bfloat16, "")
APPLE = Machine("mps", torch.float16, "")
TURING = Machine("cuda:0", torch.float16, "", (7, 5))
AMPERE = Machine("cuda:0", torch.bfloat16, "", (8, 6))
HOPPER = Machine("cuda:0", torch.bfloat16, "", (9, 0))
SEEING = Checkpoint(tiny.DEMO_FOLDER, "qwen3_vl", has_vision=True)
TEXT = Checkpoint(tiny.DEMO_FOLDER, "qwen3")
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
NEW = not transformers.__version__.startswith("4.")
needs_new = pytest.mark.skipif(not NEW, reason="this transformers has no FlashAttention 4")
OFFERED = [pytest.param(name, marks=needs_new) if name.endswith("4") else name for name in FLASH]
MODULES = {FLASH[0]: "flash_attn", FLASH[1]: "flash_attn_interface", FLASH[2]: "flash_attn.cute"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package that can be imported, or that fails as one that was built for another torch does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(capabilities, "version_of", lambda name: "2.8.3" if name in installed else None)
    installed = set()

    def do(attention, content=""):
        installed.add("flash-attn" if attention.endswith("2") else attention.replace("flash_attention_", "flash-attn-"))
        folder = tmp_path
        for part in MODULES[attention].split("."):
            folder = folder / part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(content)

    yield do
    for name in [module for module in sys.modules if module.startswith("flash_attn")]:
        del sys.modules[name]


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
@pytest.mark.parametrize("where", [CPU, APPLE, TURING, HOPPER])
def test_what_torch_has_is_used_as_asked(asked, where):
    assert plan_attention(asked, SEEING, where) == AttentionPlan(asked)


def test_auto_is_sdpa_and_no_fallback():
    assert plan_attention("auto", SEEING, HOPPER) == AttentionPlan("sdpa")


@pytest.mark.parametrize("asked", OFFERED)
def test_flash_attention_that_is_installed_is_used(asked, install):
    install(asked)
    assert plan_attention(asked, SEEING, HOPPER) == AttentionPlan(asked)


@pytest.mark.parametrize("asked", OFFERED)
def test_flash_attention_that_is_not_installed_falls_back_and_says_how_to_get_it(asked, install):
    install("flash_attention_2" if asked != "flash_attention_2" else "flash_attention_3")
    plan = plan_attention(asked, SEEING, HOPPER)
    assert plan.name == "sdpa"
    assert "is not installed (" in plan.reason
    assert plan.reason.endswith("; using sdpa instead")


def test_flash_attention_that_was_built_for_another_torch_falls_back_before_it_breaks(install):
    install(
        "flash_attention_2", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')"
    )
    plan = plan_attention("flash_attention_2", SEEING, AMPERE)
    assert plan.name == "sdpa"
    assert "flash-attn 2.8.3 does not load (flash_attn_2_cuda.so: undefined symbol" in plan.reason
    assert "(pip uninstall -y flash-attn && pip install flash-attn --no-build-isolation --no-cache-dir)" in plan.reason


@pytest.mark.parametrize("asked", OFFERED)
@pytest.mark.parametrize("where", [CPU, APPLE])
def test_flash_attention_needs_a_gpu_that_can_have_it(asked, where, install):
    install(asked)
    plan = plan_attention(asked, SEEING, where)
    assert (plan.name, f"this runs on {where.device}" in plan.reason) == ("sdpa", True)


def test_flash_attention_needs_half_precision(install):
    install("flash_attention_2")
    where = Machine("cuda:0", torch.float32, "", (8, 6))
    assert "half precision" in plan_attention("flash_attention_2", SEEING, where).reason


def test_an_old_gpu_is_a_hint_for_flash_attention_2_and_no_block(install):
    install("flash_attention_2")
    plan = plan_attention("flash_attention_2", SEEING, TURING)
    assert (plan.name, plan.reason) == ("flash_attention_2", "")
    assert "made for compute capability 8.0 and later, and this GPU has 7.5" in plan.hint
    assert plan_attention("flash_attention_2", SEEING, AMPERE).hint == ""


@pytest.mark.parametrize(("asked", "where"), [(FLASH[1], TURING), pytest.param(FLASH[2], AMPERE, marks=needs_new)])
def test_newer_flash_attention_has_kernels_for_newer_gpus_only(asked, where, install):
    install(asked)
    assert f"and this GPU has {where.compute_capability[0]}." in plan_attention(asked, SEEING, where).reason


@pytest.mark.skipif(not NEW, reason="this transformers names no kernels for what is missing")
def test_a_kernel_of_the_hub_stands_in_only_where_it_is_on_disk(install, monkeypatch):
    monkeypatch.setattr(capabilities, "has_package", lambda name: name == "kernels")
    on_disk = set()
    monkeypatch.setattr(capabilities, "kernel_on_disk", lambda repo_id: repo_id in on_disk)
    assert "not installed" in plan_attention("flash_attention_2", SEEING, AMPERE).reason
    on_disk.add("kernels-community/flash-attn2")
    assert plan_attention("flash_attention_2", SEEING, AMPERE) == AttentionPlan("flash_attention_2")
    monkeypatch.setattr(capabilities, "has_package", lambda name: False)
    assert "not installed" in plan_attention("flash_attention_2", SEEING, AMPERE).reason


def test_flex_attention_needs_a_gpu_triton_and_a_family_that_has_it(monkeypatch):
    packages = {"triton"}
    monkeypatch.setattr(capabilities, "has_package", lambda name: name in packages)
    assert plan_attention("flex_attention", TEXT, AMPERE) == AttentionPlan("flex_attention")
    assert "this runs on cpu" in plan_attention("flex_attention", TEXT, CPU).reason
    assert (
        "transformers offers no flex_attention for qwen3_vl models"
        in plan_attention("flex_attention", SEEING, AMPERE).reason
    )
    packages.clear()
    assert "pip install triton" in plan_attention("flex_attention", TEXT, AMPERE).reason


@pytest.mark.skipif(NEW, reason="this transformers has FlashAttention 4")
def test_what_this_transformers_does_not_have_falls_back(install):
    install("flash_attention_4")
    plan = plan_attention("flash_attention_4", SEEING, HOPPER)
    assert plan.name == "sdpa"
    assert f"transformers {transformers.__version__} has no flash_attention_4" in plan.reason


def test_every_choice_of_the_widget_is_known():
    for asked in ATTENTIONS:
        assert plan_attention(asked, TEXT, CPU).name in ("sdpa", "eager")
