import asyncio
import gzip
import json
import zlib

import pytest

from qwenvl.remote import incoming
from qwenvl.remote.incoming import LONGEST_WORDS, UnreadableError, beginning, read_json, unpacked

WORDS = b"words that are packed, and some more " * 9000


def bare(content):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


PACKED = [("", bytes), ("identity", bytes), ("gzip", gzip.compress), (" X-GZIP ", gzip.compress)]
PACKED += [("deflate", zlib.compress), ("deflate", bare)]


async def blocks_of(content, size, taken=None):
    for start in range(0, len(content), size):
        if taken is not None:
            taken.append(start)
        yield content[start : start + size]


def steps(content, encoding, size=1000):
    async def all_of_them():
        return [step async for step in unpacked(blocks_of(content, size), encoding)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
@pytest.mark.parametrize(("encoding", "pack"), PACKED)
def test_a_packed_response_is_what_it_was(encoding, pack, size):
    assert b"".join(steps(pack(WORDS), encoding, size)) == WORDS


@pytest.mark.parametrize("length", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 17])
def test_nothing_is_lost_where_a_step_is_just_full(length):
    assert b"".join(steps(gzip.compress(b"<" * length), "gzip", 1 << 20)) == b"<" * length


@pytest.mark.parametrize(("encoding", "pack"), PACKED[2:])
def test_what_a_few_bytes_unpack_to_is_never_there_at_once(encoding, pack):
    assert max(map(len, steps(pack(b"<" * 30_000_000), encoding, 1 << 20))) <= 1 << 16


@pytest.mark.parametrize(("encoding", "pack"), PACKED)
def test_of_what_a_response_says_a_bounded_part_is_taken(encoding, pack):
    taken = []
    packed = pack(b"<" * 30_000_000)
    size = 1000 if len(packed) < 1_000_000 else 70_000
    text = asyncio.run(beginning(unpacked(blocks_of(packed, size, taken), encoding)))
    assert text == "<" * LONGEST_WORDS
    assert len(taken) <= 2


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"no gzip at all", "gzip"),
        (gzip.compress(WORDS)[:40] + b"\xff" * 4000, "gzip"),
        (b"\x08\x08\x08", "deflate"),
        (WORDS, "br"),
        (WORDS, "zstd"),
        (gzip.compress(gzip.compress(WORDS)), "gzip, gzip"),
        (WORDS, "x" * 8000),
    ],
)
def test_what_is_packed_otherwise_or_broken_is_an_error_and_its_words_are_lost(content, encoding):
    with pytest.raises(UnreadableError) as caught:
        steps(content, encoding)
    assert len(str(caught.value)) < 200
    assert len(asyncio.run(beginning(unpacked(blocks_of(content, 1000), encoding)))) <= len(WORDS)


def test_what_follows_the_end_of_what_is_packed_is_passed_over():
    assert b"".join(steps(gzip.compress(b"words") + b"rest" * 900, "gzip")) == b"words"


@pytest.mark.parametrize("digits", [19, 400, 5000, 500_000])
def test_numbers_of_more_digits_than_anybody_counts_to_are_infinite(digits):
    number = "7" * digits
    assert read_json(f'{{"a": {number}, "b": -{number}.5e3, "c": [5, 2.5, -3, 1e2]}}')["a"] == float("inf")
    assert read_json("[5, 2.5, -3, 1e2, 123456789012345678]") == [5, 2.5, -3, 100.0, 123456789012345678]


@pytest.mark.parametrize("text", ["", "no", "[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000 + "x", '"\\u12"'])
def test_what_is_no_json_or_deeper_than_anybody_follows_is_one_kind_of_error(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_json_is_read_like_json():
    for value in ({"a": [1, None, True, "ü\ud800"]}, "text", 0.5, {}):
        assert incoming.read_json(json.dumps(value)) == value
