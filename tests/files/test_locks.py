"""Who may write in a folder: on disks with locks, and without."""

import errno
import subprocess
import sys
import threading
import time

import pytest
from pictures import ROOT

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


def test_a_disk_that_knows_no_locks_is_told_of_and_used(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    lock = FileLock(tmp_path / "lock")
    assert lock.take()
    assert "knows no locks" in caplog.text
    lock.release()
    assert not lock.path.exists()
