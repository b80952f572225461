import errno
import hashlib
import subprocess
import sys
import threading
import time

import pytest
from pictures import ROOT

from qwenvl.models.part import FileLock, Part, RemoteFile

CONTENT = bytes(range(256)) * 20
LARGE = RemoteFile("model.safetensors", len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
SMALL = RemoteFile("a.json", 3, git_sha1="da39a3ee")


@pytest.fixture
def told():
    return []


def test_what_an_earlier_try_left_counts_and_the_rest_makes_it_whole(tmp_path, told):
    first = Part(LARGE, tmp_path, told.append)
    first.write(CONTENT[:1000])
    assert first.why_wrong() == f"it has 1000 bytes instead of {len(CONTENT)}"
    assert first.path.read_bytes() == CONTENT[:1000], "on disk at once, not when it is closed"
    second = Part(LARGE, tmp_path, told.append)
    assert (second.size, second.tell()) == (1000, 1000)
    second.write(CONTENT[1000:])
    assert second.why_wrong() is None
    assert told == [1000, len(CONTENT) - 1000]


def test_a_server_that_begins_anew_does_not_spoil_the_file(tmp_path, told):
    part = Part(LARGE, tmp_path, told.append)
    part.write(CONTENT[:1000])
    part.seek(0)
    part.truncate()
    part.write(CONTENT)
    assert part.why_wrong() is None
    assert sum(told) == len(CONTENT)


def test_a_wrong_byte_shows_in_the_hash(tmp_path, told):
    part = Part(LARGE, tmp_path, told.append)
    part.write(CONTENT[:-1] + b"?")
    assert "its hash is" in part.why_wrong()


def test_parts_of_different_revisions_do_not_meet(tmp_path):
    other = RemoteFile(LARGE.name, LARGE.size, sha256="0" * 64)
    assert LARGE.part_path(tmp_path) != other.part_path(tmp_path)


def test_small_files_are_hashed_as_git_does(tmp_path, told):
    # `printf abc | git hash-object --stdin`
    file = RemoteFile("a.json", 3, git_sha1="f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f")
    part = Part(file, tmp_path, told.append)
    part.write(b"abc")
    assert part.why_wrong() is None
    part.path.replace(tmp_path / "a.json")
    assert file.equals(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"abd")
    assert not file.equals(tmp_path / "a.json")
    assert not file.equals(tmp_path / "missing")


HOLDS = """
import sys
from pathlib import Path
from qwenvl.models.part import FileLock
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
