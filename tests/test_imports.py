"""The rules of the layout: who may import whom, one module for ComfyUI, light at import."""

import ast
import subprocess
import sys

import pytest
from pictures import ROOT

ENGINE = ROOT / "qwenvl"
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
# Module -> the modules of the engine that it may import.
LOW = {"request", "settings", "checks", "log", "files", "units", "versions"}
MAY_IMPORT = {
    "__init__": set(),
    "checks": set(),
    "settings": {"checks"},
    "request": {"checks", "settings"},
    "log": set(),
    "files": set(),
    "units": set(),
    "versions": set(),
    "packages": {"versions"},
    "sampling": LOW,
    "capabilities": LOW | {"packages"},
    "nvml": LOW,
    "facts": LOW | {"nvml", "packages"},
    "report": LOW | {"facts", "packages"},
    "sdpa": LOW,
    "stalls": LOW | {"rows"},
    "slow": LOW | {"rows", "stalls"},
    "diagnostics": LOW | {"nvml", "rows", "sdpa", "slow", "stalls"},
    "doctor": LOW
    | {
        "pipeline",
        "cache",
        "catalog",
        "host",
        "capabilities",
        "facts",
        "families",
        "files",
        "report",
        "diagnostics",
        "watch",
    },
    "families": set(),
    "checkpoint": {"families", "files", "settings", "versions"},
    "trust": {"files", "paths"},
    "download": LOW | {"hub_errors", "paths", "transfer"},
    "opening": set(),
    "media": LOW | {"opening"},
    "engines": LOW | {"families"},
    "builtin": {"engines", "units"},
    "custom": LOW | {"builtin", "engines", "paths"},
    "discovery": LOW | {"builtin", "checkpoint", "download", "families", "files"},
    "catalog": LOW | {"builtin", "custom", "discovery", "download", "engines"},
    "part": set(),
    "hub_errors": set(),
    "transfer": {"files", "hub_errors", "part", "units"},
    "live": set(),
    "host": LOW | {"live", "paths"},
    "older_prompts": {"host"},
    "panel": LOW | {"cache", "host"},
    "paths": LOW,
    "lists": LOW,
    "presets": LOW | {"host", "paths"},
    "faults": LOW,
    "budget": LOW | {"checkpoint", "download", "faults", "media"},
    "devices": LOW | {"capabilities"},
    "attention": LOW | {"capabilities", "checkpoint"},
    "precision": LOW | {"capabilities", "checkpoint"},
    "understood": {"faults"},
    "sound": LOW | {"checkpoint", "download", "understood"},
    "loader": LOW
    | {"attention", "capabilities", "checkpoint", "dense", "devices", "faults", "precision", "sound", "understood"},
    "turns": set(),
    "cache": LOW | {"faults", "loader", "turns"},
    "answer": LOW,
    "prompt": LOW | {"answer", "loader", "media", "sound", "understood"},
    "keyvalues": LOW,
    "attend": LOW | {"keyvalues"},
    "dense": LOW | {"keyvalues", "attend"},
    "prefill": LOW | {"dense", "keyvalues"},
    "lanes": LOW | {"dense", "keyvalues", "prefill"},
    "generic": LOW | {"keyvalues", "prefill"},
    "graph": LOW,
    "rows": LOW,
    "plain": LOW | {"prefill", "rows", "sampling"},
    "decode": LOW | {"dense", "lanes", "generic", "graph", "plain", "prefill", "rows", "sampling"} | {"understood"},
    "source": LOW
    | {"catalog", "download", "host", "loader", "decode", "budget", "capabilities", "checkpoint", "devices"}
    | {"faults", "precision", "trust", "understood"},
    "batch": LOW | {"keyvalues", "media", "prompt"},
    "refusals": LOW | {"engines"},
    "reply": LOW,
    "loop": set(),
    "wire": LOW | {"engines", "refusals", "reply"},
    "chat": LOW | {"engines", "loader", "media"},
    "remote": LOW
    | {"answer", "batch", "chat", "diagnostics", "engines", "loop", "media", "refusals", "reply", "watch", "wire"},
    "session": LOW
    | {"answer", "batch", "source", "cache", "devices", "keyvalues", "loader", "prompt", "media", "budget", "host"}
    | {"diagnostics", "faults", "report", "catalog", "remote", "rows", "watch"},
    "pipeline": LOW | {"batch", "cache", "media", "prompt", "session", "watch"},
    "watch": {"request"},
    "widgets": LOW | {"catalog", "devices", "download", "presets"},
    "boxes": LOW,
    "folder": LOW,
    "box_node": LOW | {"boxes", "host", "lists", "loader", "media"},
    "folder_nodes": LOW | {"folder", "host", "lists", "media", "opening", "paths"},
    "command": LOW | {"catalog", "devices", "download", "presets"},
    "captions": LOW | {"pipeline", "cache", "command", "folder", "presets"},
    "serving": LOW | {"catalog", "command"},
    "__main__": LOW | {"pipeline", "cache", "catalog", "captions", "command", "doctor", "host", "presets", "serving"},
}
STANDARD_ONLY = {
    *("checks", "settings", "request", "log", "files", "units", "watch", "catalog", "paths", "folder", "lists", "live"),
    *("checkpoint", "builtin", "custom", "discovery", "download"),
    *("engines", "refusals", "reply", "loop", "trust", "turns"),
}


def imports(path):
    """(level, module) of every import in the file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


def engine_files():
    return sorted(ENGINE.glob("*.py"))


def test_every_module_has_its_place_in_the_table():
    assert {file.stem for file in engine_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", engine_files(), ids=lambda file: file.stem)
def test_modules_import_downwards_only_and_by_a_single_dot(file):
    found = list(imports(file))
    assert {level for level, _ in found} <= {0, 1}
    assert {name.split(".")[0] for level, name in found if level == 1} <= MAY_IMPORT[file.stem]
    assert "qwenvl" not in {name.split(".")[0] for level, name in found if level == 0}


@pytest.mark.parametrize("file", engine_files(), ids=lambda file: file.stem)
def test_only_host_knows_comfyui(file):
    absolute = {name.split(".")[0] for level, name in imports(file) if level == 0}
    assert file.stem == "host" or not absolute & COMFYUI


@pytest.mark.parametrize("name", sorted(STANDARD_ONLY))
def test_the_lowest_modules_need_the_standard_library_only(name):
    absolute = {module.split(".")[0] for level, module in imports(ENGINE / f"{name}.py") if level == 0}
    assert absolute <= sys.stdlib_module_names


REGISTER = """
import importlib.util, sys
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("the_pack", sys.argv[1], submodule_search_locations=[sys.argv[2]])
module = importlib.util.module_from_spec(spec)
sys.modules["the_pack"] = module
spec.loader.exec_module(module)
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
heavy = {"transformers", "bitsandbytes", "accelerate", "huggingface_hub", "av", "flash_attn", "torchvision", "aiohttp"}
print("heavy:", sorted(heavy & (set(sys.modules) - before)))
import torch
print("cuda:", torch.cuda.is_initialized())
"""


def test_registering_the_nodes_loads_nothing_heavy_and_prints_nothing():
    command = [sys.executable, "-c", REGISTER, str(ROOT / "__init__.py"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["heavy: []", "cuda: False"], done.stderr
    assert done.stderr == ""


def test_nothing_outside_the_command_line_catches_everything():
    for file in [*engine_files(), ROOT / "nodes.py", ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, f"{file.name}:{node.lineno}"
