"""Who may write in a folder: on disks with locks, and without."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import lockless
import pytest
from pictures import ROOT
from waiting import until

from qwenvl.files.locks import FileLock

HOLDS = """
import sys
from pathlib import Path
from qwenvl.files.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
lock.release()
"""


def holder(path):
    command = [sys.executable, "-c", HOLDS, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path):
    lock = FileLock(tmp_path / "lock")
    assert not lock.is_held() and not lock.path.exists()
    with holder(lock.path) as other:
        assert lock.is_held() and not lock.take()
        other.kill()
    assert lock.path.exists(), "what a dead process leaves is no lock"
    assert not lock.is_held()
    assert lock.take() and lock.take() and lock.is_held()
    assert not FileLock(lock.path).take(), "nor is it another one's of this process"
    lock.release()
    lock.release()
    assert not lock.path.exists()


def test_a_lock_that_was_deleted_under_one_who_waits_is_taken_anew(tmp_path):
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    assert first.take()
    waiting = threading.Thread(target=second.wait, args=(lambda: None,))
    waiting.start()
    first.release()
    waiting.join()
    assert not third.take()
    assert second.path.exists()
    second.release()


def test_many_threads_hold_a_lock_one_after_the_other(tmp_path):
    """It is deleted and made again all the while."""
    inside, most, done = [], [], []

    def work():
        for _ in range(50):
            lock = FileLock(tmp_path / "lock")
            while not lock.take():
                time.sleep(0)
            inside.append(1)
            most.append(len(inside))
            time.sleep(0)
            inside.pop()
            lock.release()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        FileLock(tmp_path / "lock").take()
    assert not FileLock(tmp_path / "lock").is_held()
    assert not (tmp_path / "elsewhere").exists()


# Begins a process that has no locks, whose disk is as those of a network.
LOCKLESS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "tests/support")
from lockless import without_locks
without_locks()
from qwenvl.files import locks
from qwenvl.files.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
"""
COUNTS = """
number = Path(sys.argv[1]).with_name("number")
for _ in range(15):
    lock.wait(lambda: None)
    before = int(number.read_text())
    time.sleep(0.001)
    number.write_text(str(before + 1))
    lock.release()
"""
HOLDS_A_CLAIM = """
locks.RENEWED_S = 0.01
print(lock.take(), flush=True)
sys.stdin.read()
lock.release()
"""
lockless_only = pytest.mark.skipif(not lockless.is_possible(), reason="no seccomp here")


def lockless_process(path, code):
    command = [sys.executable, "-c", LOCKLESS + code, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def no_locks(monkeypatch):
    """Within this process, flock alone is replaced: what refuses it for real cannot be undone."""

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)


@lockless_only
def test_processes_on_a_disk_without_locks_take_turns(tmp_path):
    (tmp_path / "number").write_text("0")
    running = [lockless_process(tmp_path / "lock", COUNTS) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "45"
    assert [file.name for file in tmp_path.iterdir()] == ["number"]


@lockless_only
def test_a_claim_is_renewed_while_its_process_runs_and_free_when_that_is_killed(tmp_path, no_locks):
    lock, claim = FileLock(tmp_path / "lock"), tmp_path / "lock.claim"
    with lockless_process(lock.path, HOLDS_A_CLAIM) as other:
        assert other.stdout.readline() == "True\n"
        os.utime(claim, (1, 1))
        assert until(lambda: claim.stat().st_mtime > 1)
        assert lock.is_held() and not lock.take()
        other.kill()
    assert claim.exists(), "it was left"
    assert not lock.is_held()
    assert lock.take() and lock.take() and lock.is_held() and FileLock(lock.path).is_held()
    assert not FileLock(lock.path).take(), "nor is it another one's of this process"
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def claimed(path, age_s=0.0, **said):
    """A claim of another machine's, renewed so long ago."""
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t", **said}))
    then = time.time() - age_s
    os.utime(path, (then, then))


@pytest.mark.parametrize(("age_s", "free"), [(0, False), (50, False), (70, True), (1e9, True), (-1e6, False)])
def test_a_claim_of_another_machine_lasts_a_minute_longer_than_it(tmp_path, no_locks, age_s, free):
    """By the disk's clock, whatever that says: one from the future is not old."""
    lock = FileLock(tmp_path / "lock")
    claimed(tmp_path / "lock.claim", age_s)
    assert lock.is_held() is not free
    assert lock.take() is free
    lock.release()
    assert (tmp_path / "lock.claim").exists() is not free
    assert not list(tmp_path.glob("lock.claim.*"))


def test_one_of_many_who_find_an_old_claim_gets_it(tmp_path, no_locks):
    for _ in range(20):
        claimed(tmp_path / "lock.claim", 100)
        locks = [FileLock(tmp_path / "lock") for _ in range(6)]
        start, taken = threading.Barrier(6), []

        def take(lock, start=start, taken=taken):
            start.wait()
            taken.append(lock.take())

        threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(taken) <= 1
        for lock in locks:
            lock.release()
    assert not list(tmp_path.glob("lock.claim.*"))


def test_a_claim_that_was_lost_is_not_taken_from_who_has_it(tmp_path, no_locks, monkeypatch, caplog):
    monkeypatch.setattr("qwenvl.files.locks.RENEWED_S", 0.01)
    lock = FileLock(tmp_path / "lock")
    assert lock.take()
    claimed(tmp_path / "lock.claim")
    assert until(lambda: "was taken by another process" in caplog.text)
    lock.release()
    assert json.loads((tmp_path / "lock.claim").read_text())["token"] == "t"


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10**6, b"\xff", b'{"host": 1, "pid": "x"}', b'{"pid": -1}'])
def test_a_claim_that_says_nothing_lasts_as_long(tmp_path, no_locks, content):
    lock, claim = FileLock(tmp_path / "lock"), tmp_path / "lock.claim"
    claim.write_bytes(content)
    assert lock.is_held() and not lock.take()
    os.utime(claim, (1, 1))
    assert not lock.is_held() and lock.take()
    lock.release()


@pytest.mark.parametrize("made", [lambda claim: claim.symlink_to("elsewhere"), os.mkfifo, lambda claim: claim.mkdir()])
def test_a_link_and_a_pipe_in_the_place_of_a_claim_are_neither_followed_nor_waited_for(tmp_path, no_locks, made):
    made(tmp_path / "lock.claim")
    assert not FileLock(tmp_path / "lock").take()
    assert not (tmp_path / "elsewhere").exists()


def test_whoever_has_locks_sees_the_claim_of_one_who_has_none(tmp_path):
    lock = FileLock(tmp_path / "lock")
    claimed(tmp_path / "lock.claim")
    assert lock.is_held() and not lock.take()
    (tmp_path / "lock.claim").unlink()
    assert lock.take()
    lock.release()


def test_a_disk_that_knows_no_locks_is_told_of_once(tmp_path, no_locks, caplog):
    for _ in range(2):
        lock = FileLock(tmp_path / "lock")
        assert lock.take()
        lock.release()
    assert caplog.text.count("has no file locks") == 1
    assert list(tmp_path.iterdir()) == []


ON_WINDOWS = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests/support")
import msvcrt_double
sys.modules["msvcrt"] = msvcrt_double
from qwenvl.files import locks
locks._WINDOWS = True
lock = locks.FileLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def windows(monkeypatch):
    """The branch for Windows, with a double of its module: there is no Windows here."""
    double = pytest.importorskip("msvcrt_double", reason="no locks of open file descriptions here")
    if not hasattr(double.fcntl, "F_OFD_SETLK"):
        pytest.skip("no locks of open file descriptions here")
    monkeypatch.setitem(sys.modules, "msvcrt", double)
    monkeypatch.setattr("qwenvl.files.locks._WINDOWS", True)
    monkeypatch.setattr("fcntl.flock", None)
    return double


def test_by_windows_locks_one_process_holds_it_and_it_goes_with_that(tmp_path, windows):
    lock = FileLock(tmp_path / "lock")
    assert not lock.is_held() and not lock.path.exists()
    command = [sys.executable, "-c", ON_WINDOWS, str(lock.path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        assert lock.is_held() and not lock.take()
        other.kill()
    assert lock.path.exists(), "what a dead process leaves is no lock"
    assert not lock.is_held()
    assert lock.take() and lock.take() and FileLock(lock.path).is_held()
    assert not FileLock(lock.path).take(), "nor is it another one's of this process"
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_by_windows_locks_who_waits_gets_it(tmp_path, windows):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    told = []
    assert first.take()
    waiting = threading.Thread(target=second.wait, args=(lambda: told.append(1),))
    waiting.start()
    assert until(lambda: told)
    first.release()
    waiting.join()
    assert second.is_held() and not FileLock(tmp_path / "lock").take()
    second.release()


def test_the_first_byte_is_locked_and_unlocked_before_a_file_is_closed(tmp_path, windows, monkeypatch):
    """Where the file stands does not matter, and Windows unlocks what was closed at its convenience."""
    done = []
    real = windows.locking

    def locking(number, mode, count):
        done.append((mode, os.lseek(number, 0, os.SEEK_CUR), count))
        real(number, mode, count)

    monkeypatch.setattr(windows, "locking", locking)
    lock = FileLock(tmp_path / "lock")
    assert lock.take()
    os.lseek(lock._number, 7, os.SEEK_SET)
    lock.release()
    assert done == [(windows.LK_NBLCK, 0, 1), (windows.LK_UNLCK, 0, 1)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_by_windows_locks_what_is_wrong_is_no_other_holder(tmp_path, windows, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(windows, "locking", fails)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        FileLock(tmp_path / "lock").take()


def test_a_claim_that_came_meanwhile_is_neither_written_over_nor_taken_away(tmp_path, no_locks, monkeypatch):
    """Between the look and the making, and between two who find the same old one."""
    lock, claim = FileLock(tmp_path / "lock"), tmp_path / "lock.claim"
    claimed(claim, 100, token="new")
    assert not lock._claim._give_way({"token": "old"})
    assert json.loads(claim.read_text())["token"] == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["lock.claim"]
    monkeypatch.setattr(lock._claim, "_read", lambda: None)
    assert not lock.take()
    assert json.loads(claim.read_text())["token"] == "new"
