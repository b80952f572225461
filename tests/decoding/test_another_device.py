"""Runs on_another_device.py in a process of its own."""

import os
import subprocess
import sys

import pytest
from pictures import ROOT


def run(*options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/decoding/on_another_device.py",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_whole_runs_are_right_on_a_device_beside_the_cpu():
    done = run()
    assert done.returncode == 0, done.stdout[-8000:]
    assert "passed" in done.stdout


@pytest.mark.long
def test_whole_runs_of_all_families_are_right_on_a_device_beside_the_cpu():
    done = run("-m", "long")
    assert done.returncode == 0, done.stdout[-8000:]
