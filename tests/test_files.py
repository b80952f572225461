import os

import pytest

from qwenvl.files import UnreadableError, read_json_object


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.json"


def test_the_object_of_a_file_is_read(file):
    file.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json_object(file) == {"a": [1, "ü"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"[]", "it must hold a JSON object"),
        (b"\xff\xfe{}", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"1" * 5000, "digits"),
    ],
    ids=["cut", "empty", "list", "no text", "deep", "long number"],
)
def test_what_holds_no_object_is_one_kind_of_error_that_names_the_file_and_says_why(file, content, reason):
    file.write_bytes(content)
    with pytest.raises(UnreadableError) as caught:
        read_json_object(file)
    assert str(caught.value) == f"{file} cannot be read: {caught.value.reason}."
    assert reason in caught.value.reason


def test_a_file_that_is_not_there_a_folder_and_a_pipe_are_not_waited_for(file, tmp_path):
    for path, reason in ((file, "there is no such file"), (tmp_path, "it is no file")):
        with pytest.raises(UnreadableError, match=reason):
            read_json_object(path)
    os.mkfifo(file)
    with pytest.raises(UnreadableError, match="it is no file"):
        read_json_object(file)


def test_a_file_is_read_up_to_the_size_that_is_allowed(file):
    file.write_text('{"a": 1}')
    assert read_json_object(file, largest=8) == {"a": 1}
    with pytest.raises(UnreadableError, match="it is larger than 7 bytes"):
        read_json_object(file, largest=7)
