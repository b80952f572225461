"""JSON that is too much, and the memory that what is taken may hold."""

import json
import os
import subprocess
import sys

import pytest
from pictures import ROOT

from qwenvl.files.bounded_json import (
    HEADER,
    INDEX,
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    Limit,
    OversizeError,
    UnreadableError,
    limit_of,
    parse,
    read_json_object,
    why_too_much,
)


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
        (b"[" * 100_000, "nested too deep"),
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
    for path, reason in ((file, "there is no such file"), (tmp_path, "it is not a file")):
        with pytest.raises(UnreadableError, match=reason):
            read_json_object(path)
    os.mkfifo(file)
    with pytest.raises(UnreadableError, match="it is not a file"):
        read_json_object(file)


def test_a_file_is_read_up_to_the_size_that_is_allowed(file):
    file.write_text('{"a": 1}')
    assert read_json_object(file, Limit(8, 99)) == {"a": 1}
    with pytest.raises(UnreadableError, match="it is larger than 7 bytes"):
        read_json_object(file, Limit(7, 99))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *((name, SETTINGS) for name in ("config.json", "tokenizer_config.json", "generation_config.json", "x")),
        *((name, SETTINGS) for name in ("custom_models.json", "chat_template.json", "added_tokens.json")),
        *((name, TOKENIZER) for name in ("tokenizer.json", "Tokenizer.JSON", "vocab.json", "merges.txt", "a.model")),
        *((name, INDEX) for name in ("model.safetensors.index.json", "x.index.json")),
        *((name, TEMPLATE) for name in ("chat_template.jinja", "tool_use.jinja")),
    ],
)
def test_each_kind_of_file_has_its_limit(name, limit):
    assert limit_of(name) == limit


def vocabulary(words):
    """As tokenizer.json has it: words with numbers, and pairs of words."""
    content = {
        "model": {"vocab": {f"w{n}": n for n in range(words)}, "merges": [[f"w{n}", f"v{n}"] for n in range(words)]}
    }
    return json.dumps(content, indent=2).encode()


def index(tensors):
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight_scale_inv"
    return {name.format(n // 400, n): f"model-{n // 1000:05}-of-00163.safetensors" for n in range(tensors)}


def header(tensors):
    told = {"dtype": "F8_E4M3", "shape": [7168, 2048], "data_offsets": [10**12, 10**12 + 1]}
    return json.dumps(dict.fromkeys(index(tensors), told)).encode()


def test_what_the_largest_of_models_have_is_taken():
    """A vocabulary of 260,000 words, and a mixture of a trillion numbers in one file."""
    assert why_too_much(vocabulary(260_000), TOKENIZER) is None
    assert why_too_much(json.dumps({"metadata": {}, "weight_map": index(140_000)}).encode(), INDEX) is None
    assert why_too_much(header(140_000), HEADER) is None
    kept = [f"model.layers.{n}.mlp.gate" for n in range(20_000)]
    assert (
        why_too_much(json.dumps({"quantization_config": {"modules_to_not_convert": kept}}).encode(), SETTINGS) is None
    )


# Text of which most comes when it is parsed, by what is repeated.
WORST = {
    "lists": b"[],",
    "objects": b"{},",
    "lists of lists": b"[[]],",
    "fractions": b"5e1,",
    "words": b'"ab",',
    "long numbers": b"1234567890123,",
    "letters": b'"\\u4e00",',
    "wide letters": '"\U0001f600",'.encode(),
    "keys": b'{"a":{"b":1}},',
    "empty": b"0,",
}
MEASURE = """
import sys
sys.path.insert(0, 'tests/support')
import peak
from pathlib import Path
from qwenvl.files.bounded_json import UnreadableError, read_json_object
peak.begin()
before = peak.peak_mb()
try:
    held = read_json_object(Path(sys.argv[1]))
    told = "read"
except UnreadableError as error:
    told = error.reason
print(peak.peak_mb() - before, told)
"""
MOST_MB = {"config.json": 150, "model.safetensors.index.json": 500, "tokenizer.json": 1000}


def measured(file):
    """(MB that reading the file took at most, what came of it), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, file], cwd=ROOT, capture_output=True, text=True, check=True)
    size, _, told = done.stdout.strip().partition(" ")
    return int(size), told


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on Windows")
@pytest.mark.parametrize("name", ["config.json"])
@pytest.mark.parametrize("kind", WORST)
def test_what_is_taken_holds_no_more_memory_than_its_kind_may(tmp_path, name, kind):
    """As much as goes through, and the most that the size alone would let through."""
    limit, text = limit_of(name), WORST[kind]
    marks = sum(map(text.count, (b",", b"[", b"{", b":")))
    for count in ((limit.values - 9) // marks, limit.size // len(text) - 9):
        file = tmp_path / name
        file.write_bytes(b'{"a":[' + text * min(count, limit.size // len(text) - 9) + b"0]}")
        size, told = measured(file)
        assert size <= MOST_MB[name], told
        assert told == "read" or told.startswith("it holds more than")


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on Windows")
@pytest.mark.parametrize(("name", "kind"), [("model.safetensors.index.json", "objects"), ("tokenizer.json", "lists")])
def test_the_worst_of_larger_kinds(tmp_path, name, kind):
    limit, text = limit_of(name), WORST[kind]
    file = tmp_path / name
    file.write_bytes(b'{"a":[' + text * ((limit.values - 9) // sum(map(text.count, (b",", b"[", b"{", b":")))) + b"0]}")
    size, told = measured(file)
    assert told == "read"
    assert size <= MOST_MB[name]
    file.write_bytes(b'{"a":[' + text * (limit.size // len(text) - 9) + b"0]}")
    size, told = measured(file)
    assert told == f"it holds more than {limit.values:,} values"
    assert size <= 2 * limit.size >> 20


def test_what_comes_from_elsewhere_than_a_file_has_the_same_limits():
    assert parse(b"\xef\xbb\xbf[1]", Limit(99, 9)) == [1]
    for content in (b"[" + b"1," * 9 + b"1]", b"[" + b" " * 99 + b"]", b"\xff", b"{"):
        with pytest.raises(ValueError):
            parse(content, Limit(99, 9))


def test_files_that_are_too_much_are_told_from_those_that_are_none(file):
    for content, kind in ((b"[" * 5000, True), (b"9," * (1 << 18) + b",", True), (b"{", False), (b"1" * 5000, False)):
        file.write_bytes(content)
        with pytest.raises(UnreadableError) as caught:
            read_json_object(file)
        assert isinstance(caught.value, OversizeError) == kind
