"""The run of all that is measured on a GPU: what fails in it, and the same from start to end on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_lines
import pytest
import tiny

from benchmarks.gpu.__main__ import chosen, write
from benchmarks.gpu.bench import ASYNC, NATIVE, Line, Options
from benchmarks.gpu.lines import lines
from benchmarks.gpu.runner import START_SECONDS, Runner

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
CPU = Options("cpu", "nano")


def is_running(number):
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Of every line of gpu_lines, by name; and the number of the program that the stuck one started."""
    number = tmp_path_factory.mktemp("stuck") / "number"
    options = Options("cpu", "nano", str(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        found = list(Runner(options, module="gpu_lines").run(gpu_lines.lines(options)))
    assert [entry["line"] for entry in found] == [line.name for line in gpu_lines.lines(options)]
    return {entry["line"]: entry for entry in found}, int(number.read_text())


def test_neighbours_share_a_process_and_what_it_has_made(entries):
    by_name, _ = entries
    first, third = (by_name[name]["result"] for name in ("first", "chatters"))
    assert first["process"] == third["process"] != os.getpid()
    assert (first["seen"], third["seen"]) == (1, 2)


def test_what_cannot_be_had_is_told_in_a_sentence(entries):
    told = entries[0]["absent"]
    assert (told["status"], told["why"]) == ("not measured", "There is no such thing here.")


def test_what_libraries_print_is_no_figure(entries):
    assert entries[0]["chatters"]["status"] == "measured"
    assert isinstance(entries[0]["chatters"]["result"]["process"], int)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raises", "RuntimeError: CUDA error: an illegal memory access"),
        ("unwritable", "not JSON serializable"),
        ("leaves", "status 7"),
        ("crashes", "status -"),
    ],
)
def test_a_line_that_fails_loses_itself_only(entries, fault, why):
    by_name, _ = entries
    assert by_name[fault]["status"] == "failed"
    assert why in by_name[fault]["why"]
    after = by_name[f"after-{fault}"]
    # In a new process, in which nothing is left of the old one's state.
    assert (after["status"], after["result"]["seen"]) == ("measured", 1)


def test_what_failed_says_where(entries):
    assert "in raises" in entries[0]["raises"]["printed"]
    assert "crashes" in entries[0]["crashes"]["printed"]


def test_a_line_that_hangs_is_ended_with_what_it_started(entries):
    by_name, number = entries
    assert (by_name["stuck_here"]["status"], by_name["stuck_here"]["why"]) == ("timed out", "It took longer than 2 s.")
    assert "stuck_here" in by_name["stuck_here"]["printed"], "where it was is told"
    assert not is_running(number)
    assert by_name["after-stuck_here"]["status"] == "measured"


def test_the_allocator_is_the_lines_own(entries):
    by_name, _ = entries
    assert by_name["first"]["result"]["allocator"] == NATIVE
    assert by_name["elsewhere"]["result"] == {
        "process": by_name["elsewhere"]["result"]["process"],
        "seen": 1,
        "allocator": ASYNC,
    }
    assert by_name["elsewhere"]["result"]["process"] != by_name["after-stuck_here"]["result"]["process"]


def test_no_process_is_left(entries):
    by_name, _ = entries
    processes = [entry["result"]["process"] for entry in by_name.values() if "result" in entry]
    assert not any(is_running(process) for process in processes)


@pytest.mark.parametrize("left", [-1, 0, START_SECONDS + gpu_lines.LIMIT - 1])
def test_no_line_starts_that_may_not_end_in_time(left):
    (entry,) = Runner(CPU, time.monotonic() + left, "no_such_module").run(
        [Line("first", gpu_lines.fine, gpu_lines.LIMIT)]
    )
    assert (entry["status"], entry["why"]) == ("no time left", f"It may take {START_SECONDS + gpu_lines.LIMIT} s.")


def test_a_short_line_still_starts_where_a_long_one_does_not(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    wanted = [Line("first", gpu_lines.fine, 10_000), Line("absent", gpu_lines.absent, 1)]
    found = Runner(CPU, time.monotonic() + START_SECONDS + 60, "gpu_lines").run(wanted)
    assert [entry["status"] for entry in found] == ["no time left", "not measured"]


def test_where_no_worker_starts_every_line_says_why():
    found = list(
        Runner(CPU, module="no_such_module").run([Line("first", gpu_lines.fine, 5), Line("b", gpu_lines.fine, 5)])
    )
    assert [entry["status"] for entry in found] == ["failed", "failed"]
    assert all("No module named 'no_such_module'" in entry["why"] for entry in found)


def test_an_entry_is_on_the_disk_before_the_next_line_starts(tmp_path, capsys):
    file = tmp_path / "found.jsonl"
    for number in range(3):
        write(file, {"line": number})
        assert [json.loads(line)["line"] for line in file.read_text().splitlines()] == list(range(number + 1))
    assert capsys.readouterr().out == file.read_text()


def test_lines_are_chosen_by_name_and_keep_their_order():
    found = lines(CPU)
    names = [line.name for line in found]
    assert len(set(names)) == len(names)
    assert [line.name for line in chosen(found, "kernels, machine")] == ["machine", "kernels"]
    assert [line.name for line in chosen(found, "")] == names
    with pytest.raises(ValueError, match="there is no line 'kernel'; there are: machine, own-step, kernels"):
        chosen(found, "kernel")


def test_those_beside_comfyui_come_with_a_checkout_of_it():
    more = [line.name for line in lines(Options("cpu", "nano", "/somewhere"))[len(lines(CPU)) :]]
    assert more == ["comfyui-decode", "comfyui-alternations"]


def run_on_cpu(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "nano", "--results", str(folder)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.iterdir()
    assert done.stdout == file.read_text()
    head, *entries, total = (json.loads(line) for line in file.read_text().splitlines())
    assert (head["line"], total["line"]) == ("run", "all")
    return {entry["line"]: entry for entry in entries}


def holds(entry):
    """A figure, or an honest sentence."""
    if entry["status"] == "measured":
        return bool(entry["result"])
    return entry["status"] == "not measured" and entry["why"].endswith(".")


def test_it_measures_on_a_cpu_what_it_can(tmp_path):
    wanted = "own-step,generate,prefill,flash-from-1,hybrid"
    found = run_on_cpu(tmp_path, "--lines", wanted)
    assert ",".join(found) == wanted
    assert all(map(holds, found.values()))
    step, compared, first = (found[name]["result"] for name in ("own-step", "generate", "prefill"))
    assert step["tier"] == "own step"
    assert 0 < step["ceiling_share"] < 1
    # The same tokens, all of them: what is compared does the same.
    assert compared["same_tokens_as_generate"] == compared["new_tokens"]
    assert 0 < first["ceiling_share"] < 1
    if not tiny.known("qwen3_5"):
        assert "transformers" in found["hybrid"]["why"]
        return
    hybrid = found["hybrid"]["result"]
    assert hybrid["same_tokens_as_generate"] == hybrid["new_tokens"]


def children(number):
    file = Path(f"/proc/{number}/task/{number}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="where processes are is read from Linux's /proc")
def test_where_a_time_limit_ends_it_its_workers_end_too(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "nano", "--results", str(tmp_path)]
    with subprocess.Popen([*command, "--lines", "tests"], cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        while not (workers := [inner for outer in children(run.pid) for inner in (outer, *children(outer))][1:]):
            assert run.poll() is None
            time.sleep(0.1)
        workers += children(run.pid)
        run.terminate()
    assert run.returncode != 0
    assert len(workers) >= 2, "the worker, and the tests that it runs"
    assert not any(map(is_running, workers))


@pytest.mark.long
def test_it_runs_from_start_to_end_on_a_cpu(tmp_path):
    found = run_on_cpu(tmp_path)
    assert list(found) == [line.name for line in lines(CPU)]
    assert all(map(holds, found.values()))


@pytest.fixture(scope="module")
def alternated():
    """Figures of pretended_alternations.py: one with time for both of its turns, and one without."""
    command = [sys.executable, str(SUPPORT / "pretended_alternations.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT)))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


@pytest.mark.parametrize(("number", "turns"), [(0, 2), (1, 1)], ids=["all", "one where time is short"])
def test_the_block_is_never_there_while_the_model_is(alternated, number, turns):
    found = alternated[number]
    # Taken when the model has gone; let go before it comes.
    assert found["seen"] == [
        ["take", False, "cpu"],
        *turns * [["free", True, "cpu"], ["free", False, "cpu"], ["take", False, "cpu"]],
    ]
    assert found["figures"]["turns"] == turns
    assert found["figures"]["same_answer_every_turn"]
    assert set(found["tokens"]) == {4}
