"""What installing the pack does to an environment of ComfyUI: nothing that was there changes."""

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pictures import ROOT

# An older torch than an installer would choose.
TORCH = "torch==2.13.0"
MANAGER = "comfyui-manager==4.2.2"
# The manager's own resolver, which looks at no environment, on this pack alone: what it would install.
RESOLVE = """
import sys
sys.argv, comfyui, pack = sys.argv[:1], *sys.argv[1:]
sys.path.insert(0, comfyui)
from comfyui_manager.common.unified_dep_resolver import UnifiedDepResolver, collect_base_requirements
rest = {"blacklist": set(), "overrides": {}, "downgrade_blacklist": []}
resolver = UnifiedDepResolver(node_pack_paths=[pack], base_requirements=collect_base_requirements(comfyui), **rest)
collected = resolver.collect_requirements()
result = resolver.compile_lockfile(collected)
assert result.success and not collected.skipped, (result, collected)
print(open(result.lockfile_path).read())
"""


def wanted():
    """requirements.txt, line by line, as ComfyUI-Manager reads it."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (each.split("#")[0].strip() for each in lines) if line]


def depends_on_torch(name):
    """By the metadata of what is installed here, through any number of packages."""
    seen, ahead = set(), [name]
    while ahead:
        try:
            lines = metadata.requires(ahead.pop()) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        needed = {each.name for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()}
        ahead += needed - seen
        seen |= needed
    return "torch" in seen


def test_nothing_in_requirements_depends_on_torch():
    """An installer that resolves anew would take the newest torch in place of the user's."""
    assert depends_on_torch("accelerate") and depends_on_torch("bitsandbytes")
    assert not [each for each in wanted() if depends_on_torch(Requirement(each).name)]


def test_the_install_script_leaves_what_is_there_alone():
    before = frozen(sys.executable)
    done = subprocess.run([sys.executable, ROOT / "install.py"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert frozen(sys.executable) == before


@pytest.mark.long
@pytest.mark.skipif("COMFYUI_DIR" not in os.environ, reason="COMFYUI_DIR names no checkout of ComfyUI to install into.")
def test_a_fresh_environment_of_comfyui_keeps_its_versions(tmp_path):
    comfyui = Path(os.environ["COMFYUI_DIR"])
    python = fresh(tmp_path / "environment", comfyui)
    before = frozen(python)
    for each in wanted():
        pip(python, each)
    subprocess.run([python, ROOT / "install.py"], check=True)
    after = frozen(python)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"accelerate", "bitsandbytes", "nvidia-ml-py", "json-repair"}
    assert (
        "No broken requirements"
        in subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).stdout
    )

    pip(python, MANAGER, "uv")
    resolved = subprocess.run([python, "-c", RESOLVE, comfyui, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert resolved.returncode == 0, resolved.stderr
    pinned = {line.split("==")[0] for line in resolved.stdout.splitlines() if "==" in line}
    assert pinned == {"nvidia-ml-py"}


def fresh(folder, comfyui):
    """An environment with ComfyUI's requirements, but for torch's companions, and the oldest transformers."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    rest = folder / "rest.txt"
    rest.write_text("\n".join(line for line in lines if not line.startswith("torch")), encoding="utf-8")
    pip(python, TORCH)
    pip(python, "-r", str(rest), TORCH, "transformers==4.57.1")
    return python


def pip(python, *what):
    subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)


def frozen(python):
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True).stdout
    return {each["name"]: each["version"] for each in json.loads(listed)}
