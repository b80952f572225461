"""The rules of the layout: who may import whom, one module for ComfyUI, light at import."""

import ast
import subprocess
import sys

import pytest
from pictures import ROOT

ENGINE = ROOT / "qwenvl"
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
# What every room may import.
GROUND = {"request", "settings", "checks", "paths", "errors", "faults", "log", "packages", "process"}
# Room, or file that stands in none -> the rooms and files that it may import, beside the ground.
MAY_IMPORT = {
    **{file: set() for file in GROUND},
    "comfyui": set(),
    "files": set(),
    "models": {"files", "comfyui"},
    "media": set(),
    "cpu": {"files"},
    "decoding": {"cpu"},
    "report": {"decoding"},
    "loading": {"decoding", "cpu", "media", "models", "comfyui", "files"},
    "prompting": {"loading", "decoding", "media", "comfyui"},
    "remote": {"prompting", "loading", "media", "models"},
    "nodes": {"prompting", "loading", "media", "models", "comfyui", "files"},
    "session": {"remote", "report", "prompting", "loading", "decoding", "media", "models", "comfyui"},
    "pipeline": {"session", "report", "prompting", "loading", "media"},
    "cli": {"pipeline", "report", "prompting", "loading", "media", "models", "comfyui", "files"},
    "__main__": {"cli", "pipeline", "prompting", "loading", "models", "comfyui"},
}
MOST_FILES, MOST_LINES = 12, 300
STANDARD_ONLY = {
    *("checks", "settings", "request", "log", "process", "paths", "prompting.watch", "media.folder"),
    *("nodes.lists", "remote.reply", "remote.refusals", "remote.kinds", "remote.loop", "media.notations"),
    *("remote.incoming", "remote.secret"),
    *(f"models.{name}" for name in ("families", "catalog", "trust", "builtin", "custom", "discovery", "download")),
    *("models.engines", "files.bounded_json", "files.headers", "files.locks"),
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
    return sorted(ENGINE.rglob("*.py"))


def rooms():
    return [path for path in sorted(ENGINE.iterdir()) if path.is_dir() and path.name != "__pycache__"]


def name_of(file):
    return ".".join(file.relative_to(ENGINE).with_suffix("").parts)


def first_part(name):
    return name.split(".")[0]


def reached(start, edges):
    """Whatever can be come to from there."""
    found, waiting = set(), [start]
    while waiting:
        for name in edges.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def edges(within=None):
    """Who imports whom: rooms and the files in none, or the files of one room."""
    found = {}
    for file in engine_files():
        parts = file.relative_to(ENGINE).with_suffix("").parts
        for level, module in imports(file):
            if within and parts[0] == within and level == 1:
                found.setdefault(parts[-1], set()).add(first_part(module))
            elif not within and level == len(parts):
                found.setdefault(parts[0], set()).add(first_part(module))
    return found


def test_every_file_has_its_place_in_the_table():
    files = {file.stem for file in ENGINE.glob("*.py")}
    assert files | {room.name for room in rooms()} == set(MAY_IMPORT) | {"__init__"}


@pytest.mark.parametrize("file", engine_files(), ids=name_of)
def test_a_room_imports_only_what_stands_below_it(file):
    """By one dot within a room, by two across."""
    *room, _ = file.relative_to(ENGINE).parts
    found = list(imports(file))
    assert {level for level, _ in found} <= {0, *range(1, len(room) + 2)}
    across = {first_part(name) for level, name in found if level == len(room) + 1}
    assert across <= GROUND | MAY_IMPORT.get(room[0] if room else file.stem, set())
    assert "qwenvl" not in {first_part(name) for level, name in found if level == 0}


@pytest.mark.parametrize("within", [None, *(room.name for room in rooms())])
def test_nothing_is_imported_in_a_circle(within):
    graph = edges(within)
    assert graph or within, "rooms import each other"
    assert [name for name in graph if name in reached(name, graph)] == []


@pytest.mark.parametrize("room", [ENGINE, *rooms()], ids=lambda room: room.name)
def test_a_room_is_small_and_says_what_it_is(room):
    files = [file for file in room.glob("*.py") if file.name != "__init__.py"]
    assert 1 < len(files) <= MOST_FILES
    (only,) = ast.parse((room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only.value.value, str), "a docstring, and nothing is passed on"


@pytest.mark.parametrize("file", [*engine_files(), ROOT / "nodes.py"], ids=lambda file: file.stem)
def test_a_file_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("file", engine_files(), ids=name_of)
def test_only_the_room_of_comfyui_knows_it(file):
    absolute = {first_part(name) for level, name in imports(file) if level == 0}
    assert file.parent.name == "comfyui" or not absolute & COMFYUI


@pytest.mark.parametrize("name", sorted(STANDARD_ONLY))
def test_the_lowest_modules_need_the_standard_library_only(name):
    file = ENGINE / f"{name.replace('.', '/')}.py"
    absolute = {first_part(module) for level, module in imports(file) if level == 0}
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


START = """
import sys
from qwenvl.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print(status, sorted({"torch", "transformers", "numpy", "PIL", "jinja2", "av", "aiohttp"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--list-models"], ["--list-presets"], ["serve-info"], ["caption", "{}", "--prompt", "x"]],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_waits_for_torch_only_where_a_model_is_asked(tmp_path, arguments):
    """The folder has a caption for its picture already."""
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_text("x")
    command = [sys.executable, "-c", START, *(part.format(tmp_path) for part in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_nothing_outside_the_command_line_catches_everything():
    for file in [*engine_files(), ROOT / "nodes.py", ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, f"{file.name}:{node.lineno}"
