"""What installing the pack does to an environment of ComfyUI: nothing that was there changes."""

import importlib.util
import json
import os
import shutil
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
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def depends_on_torch(name):
    """By the metadata of what is installed here, through any number of packages."""
    seen, ahead = set(), [name]
    while ahead:
        try:
            lines = metadata.requires(ahead.pop()) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        needed = {
            requirement.name
            for requirement in map(Requirement, lines)
            if requirement.marker is None or requirement.marker.evaluate()
        }
        ahead += needed - seen
        seen |= needed
    return "torch" in seen


def test_a_line_of_requirements_is_a_requirement_and_nothing_more():
    """Older versions of the manager hand pip the line as it stands, and pip as an argument knows no comment."""
    assert len(wanted()) > 1
    assert [line for line in wanted() if "#" in line or str(Requirement(line)) != line] == []


def test_nothing_in_requirements_depends_on_torch():
    """An installer that resolves anew would take the newest torch in place of the user's."""
    assert depends_on_torch("accelerate") and depends_on_torch("bitsandbytes")
    assert not [entry for entry in wanted() if depends_on_torch(Requirement(entry).name)]


def test_the_install_script_leaves_what_is_there_alone():
    before = frozen(sys.executable)
    done = subprocess.run([sys.executable, ROOT / "install.py"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert frozen(sys.executable) == before


@pytest.fixture
def install():
    """install.py as a module."""
    spec = importlib.util.spec_from_file_location("install_script", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [("1.0.1", True), ("1.1.0", False), ("1.10.0", False), ("2.0.0.dev0", False), ("unknown", True), (None, True)],
)
def test_what_is_too_old_is_installed_anew(install, monkeypatch, installed, wanted):
    def version(name):
        if name == "bitsandbytes":
            return "0.50.0"
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    asked = []
    monkeypatch.setattr(install.metadata, "version", version)
    monkeypatch.setattr(install, "bring_back_models", lambda pack: None)
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: asked.append(command) or done(7))
    assert install.main() == (7 if wanted else 0)
    assert [entry[-2:] for entry in asked] == ([["--no-deps", "accelerate>=1.1"]] if wanted else [])


def done(status):
    return subprocess.CompletedProcess([], status)


@pytest.mark.parametrize(
    ("modules", "path", "command"),
    [
        ({"pip", "uv"}, "/bin/uv", [sys.executable, "-m", "pip", "install"]),
        ({"uv"}, "/bin/uv", [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]),
        (set(), "/bin/uv", ["/bin/uv", "pip", "install", "--python", sys.executable]),
        (set(), None, None),
    ],
)
def test_pip_installs_or_uv_where_there_is_none(install, monkeypatch, modules, path, command):
    monkeypatch.setattr(install.util, "find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr(install.shutil, "which", lambda name: path)
    assert install.find_installer() == command


def test_without_any_installer_a_sentence_says_what_is_missing_and_what_to_do(tmp_path):
    """In an environment without pip, as uv makes them, where no uv is in the path."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = interpreter(tmp_path / "bare")
    ran = subprocess.run(
        [python, ROOT / "install.py"], capture_output=True, text=True, check=False, env={**os.environ, "PATH": ""}
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("accelerate>=1.1 and bitsandbytes>=0.45 cannot be installed: this Python has neither")
    assert len(ran.stderr.splitlines()) == 1 and str(python) in ran.stderr


@pytest.fixture
def updated(tmp_path):
    """A checkout with an install.py, whose user has models of their own; and what git does there."""

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True).stdout

    shutil.copy(ROOT / "install.py", tmp_path)
    models = tmp_path / "custom_models.json"
    models.write_text('{\n  "hf_models": {}\n}\n')
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "as it ships")
    models.write_text(MINE)
    return models, git


MINE = '{"models": {"Mine": {"repo_id": "some/one"}}}'


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_models_that_an_update_has_stashed_are_brought_back_once(updated, install, capsys):
    models, git = updated
    install.bring_back_models(models.parent)
    assert (models.read_text(), capsys.readouterr().out) == (MINE, "")
    git("stash")
    assert models.read_text() != MINE
    install.bring_back_models(models.parent)
    assert models.read_text() == MINE
    assert "has your models again" in capsys.readouterr().out
    git("checkout", "-q", "custom_models.json")
    install.bring_back_models(models.parent)
    assert models.read_text() != MINE, "the user has taken them out since"
    models.write_text(MINE.replace("Mine", "Other"))
    git("stash")
    install.bring_back_models(models.parent)
    assert "Other" in models.read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_the_user_has_now_and_stashes_of_other_files_are_left_alone(updated, install):
    models, git = updated
    git("stash")
    models.write_text(MINE.replace("Mine", "Newer"))
    install.bring_back_models(models.parent)
    assert "Newer" in models.read_text()
    git("checkout", "-q", "custom_models.json")
    git("stash", "drop")
    (models.parent / "install.py").write_text("# changed")
    git("stash")
    install.bring_back_models(models.parent)
    assert '"hf_models": {}' in models.read_text()


def test_the_pack_copies_the_users_models_when_comfyui_starts(tmp_path):
    for name in ("qwenvl", "web"):
        shutil.copytree(ROOT / name, tmp_path / "pack" / name)
    for name in ("__init__.py", "nodes.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "pack")
    (tmp_path / "pack" / "custom_models.json").write_text(MINE)
    home = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE")}
    ran = subprocess.run(
        [sys.executable, "-c", "import pack"],
        cwd=tmp_path,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "home" / ".config" / "qwenvl" / "custom_models.json").read_text() == MINE
    assert ran.stderr.count("were copied to") == 1


def test_what_pip_install_makes_runs_from_any_folder_with_all_its_data(tmp_path):
    """The wheel's files as pyproject.toml lays them out; building it takes the package index."""
    shutil.copytree(ROOT / "qwenvl", tmp_path / "site" / "qwenvl")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[tool.hatch.build.targets.wheel.force-include]")[1].split("[")[0]
    pairs = [[part.strip().strip('"') for part in line.split("=")] for line in section.strip().splitlines()]
    assert len(pairs) > 1
    for source, target in pairs:
        place = tmp_path / "site" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    home = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE")}

    def ran(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "qwenvl", *arguments],
            cwd=tmp_path,
            env={**os.environ, **home, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )

    told = ran("doctor").stdout
    assert told.startswith("ComfyUI_QwenVL 0.") and "the demo model's answers are right" in told
    assert "describe briefly" in ran("--list-presets").stdout
    missing = ran("hi", "--model", "Qwen3-0.6B", "--download", "never").stderr
    assert str(tmp_path / "home" / ".cache" / "qwenvl" / "models" / "LLM") in missing, "nothing beside the packages"


def interpreter(folder):
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.mark.long
@pytest.mark.skipif("COMFYUI_DIR" not in os.environ, reason="COMFYUI_DIR names no checkout of ComfyUI to install into.")
def test_a_fresh_environment_of_comfyui_keeps_its_versions(tmp_path):
    comfyui = Path(os.environ["COMFYUI_DIR"])
    python = fresh(tmp_path / "environment", comfyui)
    before = frozen(python)
    for entry in wanted():
        pip(python, entry)
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
    python = interpreter(folder)
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
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}
