"""Films whose index claims more than they hold: what FFmpeg would make of it is never made."""

import io
import struct
import subprocess
import sys

import films
import pytest
from pictures import ROOT

from qwenvl.media.film_index import require_small_index
from qwenvl.media.media import MediaError, read_video
from qwenvl.media.packets import MOST_PACKETS, TooManyPacketsError
from qwenvl.request import Frames

MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
WHOLE = struct.pack(">I4s", 16, b"moov")


def box(kind, *content):
    inside = b"".join(content)
    return struct.pack(">I4s", 8 + len(inside), kind) + inside


def full(kind, *content):
    return box(kind, bytes(4), *content)


def stsz(count):
    """So many samples of one size, in twenty bytes."""
    return full(b"stsz", struct.pack(">II", 1, count))


def elst(*parts):
    return box(b"edts", full(b"elst", struct.pack(">I", len(parts)), *(struct.pack(">Iii", *part) for part in parts)))


def track(number, count, edits=b"", entry=b"", sizes=None, more=b"", stts=None):
    tkhd = box(
        b"tkhd", struct.pack(">IIIII8x", 7, 0, 0, number, 0), bytes(12), MATRIX, struct.pack(">II", 64 << 16, 64 << 16)
    )
    mdhd = full(b"mdhd", struct.pack(">IIIIHH", 0, 0, 1000, 1000, 0x55C4, 0))
    hdlr = full(b"hdlr", struct.pack(">4s4s12x", b"", b"vide"), b"v\0")
    seen = bytes(6) + struct.pack(">H16xHHIIIH32xHh", 1, 64, 64, 0x480000, 0x480000, 0, 1, 24, -1)
    tables = (
        full(b"stsd", struct.pack(">I", 1), box(b"mp4v", seen, entry)),
        full(b"stts", struct.pack(">III", 1, stts or count, 1)),
        stsz(count) if sizes is None else sizes,
        full(b"stsc", struct.pack(">IIII", 1, 1, count, 1)),
        full(b"stco", struct.pack(">II", 1, 48)),
        more,
    )
    minf = box(b"minf", full(b"vmhd", bytes(8)), box(b"stbl", *tables))
    return box(b"trak", tkhd, edits, box(b"mdia", mdhd, hdlr, minf))


def moov(*tracks):
    mvhd = full(b"mvhd", struct.pack(">IIIIIH10x", 0, 0, 1000, 1000, 0x10000, 0x100), MATRIX, bytes(24), b"\0\0\0\2")
    return box(b"moov", mvhd, *tracks)


def film(*boxes):
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"mdat", bytes(64)) + b"".join(boxes)


TOO_MANY = MOST_PACKETS + 1
BOUNDED = {
    "one track": film(moov(track(1, TOO_MANY))),
    "all tracks together": film(moov(*(track(n, TOO_MANY // 9 + 1) for n in range(1, 10)))),
    "a table of the other kind": film(moov(track(1, 1, sizes=full(b"stz2", b"\0\0\0\4", struct.pack(">I", TOO_MANY))))),
    "two tables": film(moov(track(1, MOST_PACKETS, more=stsz(9)))),
    "in another table": film(moov(track(1, 1, sizes=b"", entry=stsz(TOO_MANY)))),
    "in a box of its own kind": film(
        moov(track(1, 1, sizes=b"", more=box(b"udta", box(b"meta", bytes(4), stsz(TOO_MANY)))))
    ),
    "an edit list": film(moov(track(1, 1 << 20, edits=elst(*[(1000, 0, 0x10000)] * 99)))),
    "many edits": film(moov(track(1, 1 << 12, edits=elst(*[(1000, 0, 0x10000)] * 9999)))),
    "fragments": film(moov(track(1, 0)), box(b"moof", box(b"traf", full(b"trun", struct.pack(">I", TOO_MANY))))),
    "many fragments": film(
        moov(track(1, 0)), *[box(b"moof", box(b"traf", full(b"trun", struct.pack(">I", 1 << 18))))] * 17
    ),
    "behind all else": film(box(b"free", bytes(99)), box(b"uuid", bytes(99)), moov(track(1, TOO_MANY))),
    "before all else": moov(track(1, TOO_MANY)) + film(),
    "without an end": film(b"\0\0\0\0" + moov(track(1, TOO_MANY))[4:]),
    "with a long size": film(
        box(b"moov", b"")[:0] + b"\0\0\0\1moov" + struct.pack(">Q", 1 << 40) + moov(track(1, TOO_MANY))[8:]
    ),
    "beyond the end": film(b"\x7f\0\0\0" + moov(track(1, TOO_MANY))[4:]),
    "as free room": film(b"".join((moov(track(1, TOO_MANY))[:4], b"free", moov(track(1, TOO_MANY))[8:]))),
    "packed": film(box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", bytes(9))))),
    "boxes in boxes": film(moov(*[box(b"stbl", b"")] * (1 << 20))),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_an_index_that_claims_too_much_is_refused_with_a_sentence(tmp_path, name):
    file = tmp_path / "a.mp4"
    file.write_bytes(BOUNDED[name])
    for source in (str(file), io.BytesIO(BOUNDED[name])):
        with pytest.raises(MediaError, match=r"cannot be read as a video \('(its index|it is cut)"):
            read_video("video", source, Frames())


MEASURE = """
import sys
sys.path.insert(0, 'tests/support')
import peak
import av
from qwenvl.media.media import MediaError, read_video
from qwenvl.request import Frames
peak.begin()
before = peak.peak_mb()
told = ""
try:
    if sys.argv[2] == "plainly":
        av.open(sys.argv[1]).close()
    else:
        read_video("video", sys.argv[1], Frames())
except (MediaError, av.FFmpegError) as error:
    told = str(error)
print(peak.peak_mb() - before, told)
"""


def measured(file, content, how="ours"):
    """MB that reading it took at most, in a process of its own."""
    file.write_bytes(content)
    command = [sys.executable, "-c", MEASURE, file, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


CLAIMS = {
    "one track": film(moov(track(1, 20_000_000))),
    "edits": film(moov(track(1, 1 << 20, edits=elst(*[(1 << 20, 0, 0x10000)] * 30)))),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on Windows")
@pytest.mark.parametrize("name", CLAIMS)
def test_a_few_bytes_that_would_have_taken_a_gigabyte_take_nothing(tmp_path, name):
    assert measured(tmp_path / "a.mp4", CLAIMS[name], "plainly") > 300, "it is no empty threat"
    assert measured(tmp_path / "a.mp4", CLAIMS[name]) < 60


LARGEST = {
    "samples": film(moov(track(1, MOST_PACKETS))),
    "times of more samples than there are": film(moov(track(1, 9, stts=0xFFFFFFFF))),
    "shifts of more samples than there are": film(
        moov(track(1, 9, more=full(b"ctts", struct.pack(">III", 1, 0x7FFFFFFF, 1))))
    ),
    "key frames": film(moov(track(1, 9, more=full(b"stss", struct.pack(">I", 0xFFFFFFF0))))),
    "chunks": film(moov(track(1, 9, more=full(b"co64", struct.pack(">I", 0x1FFFFFF0))))),
    "fragments": film(
        moov(track(1, 0), box(b"mvex", full(b"trex", struct.pack(">5I", 1, 1, 1, 1, 0)))),
        box(
            b"moof",
            full(b"mfhd", bytes(4)),
            box(b"traf", full(b"tfhd", b"\0\0\0\1"), full(b"trun", struct.pack(">I", MOST_PACKETS))),
        ),
    ),
    "an index of fragments": film(full(b"sidx", struct.pack(">IIIIHH", 1, 1000, 0, 0, 0, 0xFFFF)), moov(track(1, 9))),
    "a film of another kind": bytes.fromhex("1a45dfa3a3428288")
    + b"matroska"
    + bytes.fromhex("18538067010000000fffffff1c53bb6b0fffffff"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on Windows")
@pytest.mark.parametrize("name", LARGEST)
def test_what_is_let_through_holds_what_its_limit_allows(tmp_path, name):
    assert measured(tmp_path / "a.mp4", LARGEST[name]) < 400


@pytest.mark.parametrize("muxing", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "ts"])
def test_films_that_people_have_pass(tmp_path, suffix, muxing):
    file = films.write_film(tmp_path / f"a.{suffix}", muxing=muxing if suffix in ("mp4", "mov") else {})
    require_small_index(str(file), lambda: None)
    require_small_index(io.BytesIO(file.read_bytes()), lambda: None)
    assert films.numbers(read_video("video", str(file), Frames()))


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"RIFF", bytes(4096), b"\xff" * 4096, b"\0\0\0\1moov", WHOLE, WHOLE * 9]
)
def test_what_is_no_film_is_for_ffmpeg_to_refuse(content):
    require_small_index(io.BytesIO(content), lambda: None)


def test_a_cancel_is_heard_at_every_box():
    seen = []

    def check():
        seen.append(1)
        if len(seen) > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        require_small_index(io.BytesIO(BOUNDED["boxes in boxes"]), check)
    assert len(seen) == 51


def test_words_in_a_title_are_no_table():
    title = box(b"udta", box(b"name", b"how stsz and trun and elst and cmov are read " * 20))
    require_small_index(io.BytesIO(film(moov(track(1, 9), title))), lambda: None)
    with pytest.raises(TooManyPacketsError):
        require_small_index(io.BytesIO(film(moov(track(1, 9), box(b"udta", stsz(TOO_MANY))))), lambda: None)
