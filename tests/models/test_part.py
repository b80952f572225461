import hashlib

import pytest

from qwenvl.models.part import Part, RemoteFile

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
    assert file.equals(tmp_path / "a.json", told.append) and told[-1] == 3
    (tmp_path / "a.json").write_bytes(b"abd")
    assert not file.equals(tmp_path / "a.json", told.append)
    assert not file.equals(tmp_path / "missing", told.append)
