"""What the two commands do where they cannot set up: a sentence and status 1, in any Python 3."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from pictures import ROOT

COMMANDS = ("demo", "tests")
READ_FIRST = ("demo/__main__.py", "demo/environment.py", "tests/__main__.py")
# Before the command: what this Python lacks, or is.
RUN = "import runpy, sys; {before}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def checkout(tmp_path):
    """The files that the commands need to begin."""
    for name in READ_FIRST:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tests" / "requirements", tmp_path / "tests" / "requirements")
    return tmp_path


def ran(checkout, command, before="pass", **environment):
    code = [sys.executable, "-c", RUN.format(before=before), str(checkout / command)]
    return subprocess.run(code, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def refused(done):
    """The sentence, which is all that there is."""
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = done.stderr.splitlines()
    return sentence


@pytest.mark.parametrize("name", READ_FIRST)
def test_the_files_that_are_read_first_are_read_by_every_python_3(name):
    """Or an old one would show a traceback in place of the sentence."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 6))
    assert "__future__" not in [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_python_that_is_too_old_is_named(checkout, command):
    said = refused(ran(checkout, command, "sys.version_info = (3, 9, 18, 'final', 0)"))
    assert said == f"Python 3.10 or later is needed, and {sys.executable} is 3.9.18."


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
@pytest.mark.parametrize("command", COMMANDS)
def test_without_what_makes_environments_the_package_that_has_it_is_named(checkout, command, module):
    """As on Debian, where it is a package of its own."""
    hidden = (
        f"import importlib.util as u; old = u.find_spec; u.find_spec = lambda n: None if n == {module!r} else old(n)"
    )
    said = refused(ran(checkout, command, hidden))
    assert f"has no module {module}" in said and "apt install python3." in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkout_that_cannot_be_written_is_named(checkout, command):
    (checkout / ".venv").write_text("a file where the folder should be")
    done = ran(checkout, command)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{checkout / '.venv'} cannot be written (")


def test_what_is_fetched_is_told_and_an_index_that_does_not_answer_costs_a_sentence(checkout, tmp_path):
    """And what somebody told pip to do everywhere leads nowhere else."""
    (checkout / "tests" / "requirements" / "common.txt").write_text("no-such-package-of-ours\n")
    dead = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    astray = {"PIP_USER": "1", "PIP_TARGET": str(tmp_path / "elsewhere")}
    done = ran(checkout, "demo", PIP_RETRIES="0", PIP_FIND_LINKS="", PIP_NO_INDEX="", **dead, **astray)
    assert (done.returncode, done.stdout) == (1, "")
    first, *_, last = done.stderr.splitlines()
    assert first.startswith(f"Setting up {checkout / '.venv'}, once: 1.7 GB")
    assert "Collecting" not in first and "no-such-package-of-ours" in done.stderr
    assert last.startswith("pip could not install all that is needed") and "PIP_INDEX_URL" in last
    assert "Traceback" not in done.stderr and "--user" not in done.stderr
    assert not (checkout / ".venv" / "complete.txt").exists()
    assert not (tmp_path / "elsewhere").exists()
