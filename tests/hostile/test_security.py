"""What no line of the pack may do: run text, open pickles, trust code of others, start other programs.

Looked for in the syntax tree, and by the rules that ComfyUI's registry applies.
"""

import ast
import subprocess
import sys

import pytest
from pictures import ROOT

from qwenvl.packages import FLASH

FILES = sorted([*(ROOT / "qwenvl").rglob("*.py"), ROOT / "nodes.py", ROOT / "__init__.py"])
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
# The one file that starts a program.
DOWNLOAD = "qwenvl/models/download.py"
# What runs text, or hands the terminal to somebody.
RUNNING = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
# Modules that run what they read, or start others.
FORBIDDEN = {
    *("pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "code", "codeop", "pty"),
    *("runpy", "ctypes", "cffi", "multiprocessing", "ftplib", "xmlrpc", "webbrowser", "pip", "commands", "timeit"),
}
# Functions by their last name, whatever their module is called: shells, programs, code by its path, objects from text.
CALLS = {
    *("system", "popen", "startfile", "fork", "forkpty", "spawnl", "spawnv", "execl", "execv", "execve", "execvp"),
    *("posix_spawn", "getoutput", "getstatusoutput", "check_output", "check_call", "create_subprocess_shell"),
    *("create_subprocess_exec", "exec_module", "spec_from_file_location", "run_path", "run_module", "load_module"),
    *("unsafe_load", "full_load", "load_all", "load_state_dict_from_url", "read_pickle", "chmod", "chown", "setuid"),
}
# Of these only with their module, since the last name is everybody's.
PICKLES = {"torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "torch.hub.load"}
CHANGES = ("putenv", "unsetenv", "chdir", "umask", "environ.update", "environ.setdefault", "environ.pop")


def calls():
    """(file, the function as it is written, the node) of every call."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield file, ast.unparse(node.func), node


def settings():
    """(file, name, value) of every keyword and of every key of a dict."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword):
                yield file, node.arg, node.value
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                yield from ((file, key.value, value) for key, value in pairs if isinstance(key, ast.Constant))


def test_there_is_something_to_look_at():
    assert len(TREES) > 60
    assert len(list(calls())) > 1000


def test_nothing_runs_text():
    assert [(file, name) for file, name, _ in calls() if name in RUNNING or name.startswith("builtins.")] == []


def test_nothing_imports_what_runs_or_unpickles_what_it_reads():
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [(file, name) for name in names if name.split(".")[0] in FORBIDDEN]
    assert found == []


def test_no_call_starts_a_shell_or_a_program_or_makes_objects_out_of_a_file():
    found = [(file, name) for file, name, _ in calls() if name.rpartition(".")[2] in CALLS or name in PICKLES]
    assert [(file, name) for file, name in found if name != "platform.system"] == []
    assert [name for _, name, _ in settings() if name in ("allow_pickle", "weights_only", "shell")] == []


def test_modules_are_imported_by_name_in_one_place_only():
    """FlashAttention's, to see whether they load; none by a name that comes from anywhere else."""

    def given_to(function):
        return sorted(ast.unparse(node.args[0]) for _, name, node in calls() if name.rpartition(".")[2] == function)

    assert given_to("import_module") == ["module"]
    assert given_to("why_not_imported") == ["'flash_attn_2_cuda'", "flash.module"]
    assert {flash.module for flash in FLASH.values()} == {"flash_attn", "flash_attn_interface", "flash_attn.cute"}


def test_the_one_program_that_is_started_is_python_with_a_fixed_text():
    """What it runs is written in the file; the repository and the folder are arguments of their own."""
    started = [(file, node) for file, name, node in calls() if name.startswith("subprocess.")]
    assert [(file, ast.unparse(node.func)) for file, node in started] == [
        ("qwenvl/models/download.py", "subprocess.Popen")
    ]
    command = [ast.unparse(part) for part in started[0][1].args[0].elts]
    assert command == ["sys.executable", "'-c'", "code", "str(_PACK)", "repo_id", "str(folder.absolute())"]
    (text,) = [
        node.value
        for node in ast.walk(TREES[DOWNLOAD])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code"
    ]
    assert isinstance(text, ast.Constant)


def test_models_are_read_from_this_disk_as_safetensors_without_code_of_their_folders():
    found = [node for _, name, node in calls() if name.endswith(".from_pretrained")]
    spread = [{ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None} for node in found]
    assert len(found) >= 4
    assert [entry for entry in spread if not entry & {"_LOCAL", "options"}] == []
    loader = [ast.unparse(node) for node in ast.walk(TREES["qwenvl/loading/loader.py"]) if isinstance(node, ast.Dict)]
    assert "{'local_files_only': True, 'trust_remote_code': False}" in loader
    assert [entry for entry in loader if entry.startswith("{**_LOCAL") and "'use_safetensors': True" in entry]


def test_code_of_others_is_never_trusted():
    found = [ast.unparse(value) for _, name, value in settings() if name in ("trust_remote_code", "allow_all_kernels")]
    assert found == ["False"]


def test_the_environment_is_read_and_never_changed():
    found = [(file, name) for file, name, _ in calls() if name.removeprefix("os.") in CHANGES]
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            found += [(file, "os.environ") for target in targets if ast.unparse(target).startswith("os.environ")]
    assert found == []


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        # Those that ComfyUI's registry applies, to every file.
        ("S102,S307,E702", ["."]),
        ("S102,S301,S302,S306,S307,S310,S312,S321,S323,S501,S506,S602,S604,S605,S609,S701", ["qwenvl", "nodes.py"]),
    ],
)
def test_the_rules_of_comfyuis_registry_find_nothing(rules, where):
    """Without this project's exceptions, as the registry has it."""
    command = [sys.executable, "-m", "ruff", "check", *where, "-q", "--no-cache", "--ignore-noqa", "--select", rules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr
