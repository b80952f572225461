import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import ROOT
from PIL import Image

from qwenvl.media.folder import (
    SUFFIXES,
    FolderError,
    LongNameError,
    _cannot_write,
    caption_files,
    find_pictures,
    is_there,
    make_folder,
    remove_leftovers,
    write_whole,
)
from qwenvl.media.opening import PICTURES

FILES = ["b.png", "A.JPG", "pic10.webp", "pic9.webp", "notes.txt", ".hidden.png", "._b.png", "video.mp4", "png"]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate([*FILES, "sub/z.png", "sub/deep/a.gif", ".thumbs/t.png"]):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
        os.utime(file, (1000 + number, 1000 + number))
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def found(folder, **how):
    return [file.relative_to(folder).as_posix() for file in find_pictures(folder, **how)]


def test_pictures_are_found_by_their_suffix_and_sorted_as_people_count(folder):
    assert found(folder) == ["A.JPG", "b.png", "pic9.webp", "pic10.webp"]


def test_folders_below_are_looked_into_where_asked(folder):
    assert found(folder, recursive=True) == [
        *["A.JPG", "b.png", "pic9.webp", "pic10.webp"],
        *["sub/deep/a.gif", "sub/z.png"],
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["A.JPG", "b.png", "pic9.webp", "pic10.webp"]),
        ("*", ["A.JPG", "b.png", "pic9.webp", "pic10.webp"]),
        ("*.jpg", ["A.JPG"]),
        ("PIC?.*", ["pic9.webp"]),
        ("b.png", ["b.png"]),
        ("b", []),
        (".*", []),
        ("*.mp4", []),
    ],
)
def test_a_pattern_picks_by_name_and_nothing_but_pictures(folder, pattern, names):
    assert found(folder, pattern=pattern) == names


@pytest.mark.parametrize("pattern", ["../*.png", "sub/*", "..\\*", "/etc/*"])
def test_a_pattern_leads_to_no_other_folder(folder, pattern):
    with pytest.raises(FolderError, match="pattern"):
        find_pictures(folder, pattern)


def test_order(folder):
    assert found(folder, sort="oldest first") == ["b.png", "A.JPG", "pic10.webp", "pic9.webp"]
    assert found(folder, sort="newest first")[:3] == ["pic9.webp", "pic10.webp", "A.JPG"]
    with pytest.raises(FolderError, match="'size' does not exist"):
        find_pictures(folder, sort="size")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FolderError, match=r"no folder .*gone"):
        find_pictures(tmp_path / "gone")


def test_links_to_folders_are_not_followed(folder):
    (folder / "sub" / "loop").symlink_to(folder)
    assert found(folder, recursive=True)[-2:] == ["sub/deep/a.gif", "sub/z.png"]


@pytest.mark.parametrize(
    ("names", "suffix", "captions"),
    [
        (["a.png", "v1.5 b.jpg", "no suffix", ".png"], ".txt", ["a.txt", "v1.5 b.txt", "no suffix.txt", ".png.txt"]),
        (["a.png"], ".caption", ["a.caption"]),
        (["a.png", "a.jpg", "b.png"], ".txt", ["a.png.txt", "a.jpg.txt", "b.txt"]),
        (["A.png", "a.jpg"], ".txt", ["A.png.txt", "a.jpg.txt"]),
        (["a.png", "a.jpg", "a.png.png"], ".txt", ["a.png.txt", "a.jpg.txt", "a.png.png.txt"]),
        (
            ["a.png.png", "a.png.jpg", "a.png", "a.gif"],
            ".txt",
            ["a.png.png.txt", "a.png.jpg.txt", "a.png.txt", "a.gif.txt"],
        ),
        (["a.png", "A.PNG", "b.png"], ".txt", ["a.png~2.txt", "A.PNG.txt", "b.txt"]),
        (["a.png", "A.png", "a.png~2.png"], ".txt", ["a.png~3.txt", "A.png.txt", "a.png~2.txt"]),
        (["\u00e9.png", "e\u0301.png"], ".txt", ["\u00e9.png~2.txt", "e\u0301.png.txt"]),
    ],
)
def test_each_picture_has_a_caption_file_of_its_own(tmp_path, names, suffix, captions):
    files = [tmp_path / name for name in names]
    assert caption_files(files, suffix) == {
        file: tmp_path / caption for file, caption in zip(files, captions, strict=True)
    }


PIECES = st.sampled_from(
    ["a", "A", "~2", "~", ".png", ".PNG", ".jpg", ".txt", ".", " ", "\u00e9", "e\u0301", "\ufb01", "\udce4"]
)
ALIKE = st.lists(st.sampled_from([".png", ".PNG", ".jpg", "~2", ".txt"]), max_size=3).map("".join)
NAMES = st.one_of(
    st.builds("{}{}{}".format, st.sampled_from(["a", "A", "\u00e9"]), ALIKE, st.sampled_from([".png", ".jpg", ".PNG"])),
    st.lists(PIECES, min_size=1, max_size=90).map("".join),
).filter(lambda name: name.strip(".") and len(os.fsencode(name)) <= 255)


@given(names=st.sets(NAMES, max_size=20), suffix=st.sampled_from([".txt", ".caption", "._a", ".png.txt"]))
def test_as_many_files_as_pictures_whatever_they_are_called(names, suffix):
    """On disks that know no capitals and no ways to put an accent too."""
    files = [Path("set", name) for name in names]
    captions = caption_files(files, suffix)
    assert list(captions) == files
    assert captions == caption_files(reversed(files), suffix), "the order says nothing"
    kept = {unicodedata.normalize("NFC", caption.name).upper().casefold() for caption in captions.values()}
    assert len(kept) == len(files)
    assert not {caption.suffix.lower() for caption in captions.values()} & set(SUFFIXES)
    assert {caption.parent for caption in captions.values()} <= {Path("set")}
    assert all(len(os.fsencode(caption.name)) <= 255 for caption in captions.values())


@pytest.mark.skipif(sys.platform != "linux", reason="names that other systems do not take")
@given(names=st.sets(NAMES, max_size=12))
def test_each_text_is_found_beside_its_picture_again(names):
    with tempfile.TemporaryDirectory() as where:
        captions = caption_files([Path(where, name) for name in names])
        for picture, caption in captions.items():
            write_whole(caption, ascii(picture.name))
        assert {picture.name: caption.read_text() for picture, caption in captions.items()} == {
            name: ascii(name) for name in names
        }
        assert len(list(Path(where).iterdir())) == len(names)


def test_equal_names_in_two_folders_are_no_trouble(tmp_path):
    files = [tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"]
    assert list(caption_files(files).values()) == [tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"]


@pytest.mark.parametrize(
    "suffix", ["", "txt", ".", ".png", ".JPG", "/../x.txt", ".a/b", "..", ".txt\n", ".a.png", ".txt.JPG"]
)
def test_a_suffix_that_would_hit_other_files_is_refused(tmp_path, suffix):
    with pytest.raises(FolderError, match="suffix"):
        caption_files([tmp_path / "a.png"], suffix)


def test_a_caption_is_written_as_it_is_and_nothing_stays_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("ein Rotes — 红\n\nzwei", "", "new"):
        write_whole(file, text)
        assert file.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_caption_takes_the_place_of_the_old_file_whole(tmp_path):
    """The old file is never written to, so there is no moment at which half of the new text is in its place."""
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "same file").hardlink_to(tmp_path / "a.txt")
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "same file").read_text() == "old"


def test_others_may_read_a_caption_as_any_new_file(tmp_path):
    write_whole(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_half_a_character_is_written_as_what_stands_for_one(tmp_path):
    write_whole(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new \ufffd"


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "a.txt"
    write_whole(file, "old")
    with pytest.raises(AttributeError):
        write_whole(file, None)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


KILLED = """
import os, signal, sys
from pathlib import Path
from qwenvl.media import folder
real = os.fsync
os.fsync = lambda number: (real(number), os.kill(os.getpid(), signal.SIGKILL))
folder.write_whole(Path(sys.argv[1]), "x" * 100_000)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_killed_in_the_middle_of_a_file_there_is_none_and_the_leftover_goes_later(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a.txt")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    remove_leftovers([tmp_path])
    assert left.exists(), "it might be another run's, that is just writing"
    old = time.time() - 120
    os.utime(left, (old, old))
    remove_leftovers([tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_is_none_is_said(tmp_path):
    with pytest.raises(FolderError, match="pattern"):
        find_pictures(tmp_path, "x" * 300 + "/")


def test_a_leftover_of_a_clock_that_was_put_back_goes_too(tmp_path):
    left = tmp_path / ".qwenvl-0.tmp"
    left.touch()
    ahead = time.time() + 1e8
    os.utime(left, (ahead, ahead))
    remove_leftovers([tmp_path])
    assert not left.exists()


def test_every_kind_of_file_that_can_be_named_is_found_in_a_folder(tmp_path):
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in PICTURES}
    assert known <= set(SUFFIXES)
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix.upper()}").touch()
    assert len(find_pictures(tmp_path)) == len(SUFFIXES)
    assert caption_files([tmp_path / "a.JFIF"]) == {tmp_path / "a.JFIF": tmp_path / "a.txt"}


@pytest.mark.parametrize("suffix", [".jfif", ".Pjp", ".apng"])
def test_none_of_their_endings_is_one_of_captions(tmp_path, suffix):
    with pytest.raises(FolderError, match="suffix"):
        caption_files([tmp_path / "a.png"], suffix)


@pytest.mark.parametrize("name", ["p" * 252 + ".txt", "ü" * 126 + ".txt", "画" * 85 + ".txt"])
def test_a_name_that_the_file_system_does_not_take_is_an_error_of_its_own(tmp_path, name):
    for ask in (is_there, lambda file: write_whole(file, "x")):
        with pytest.raises(LongNameError, match="longer than the file system takes"):
            ask(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_none_of_its_length(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for missing in (tmp_path / "b", tmp_path / "a" / "b", tmp_path / "loop"):
        assert not is_there(missing)
    assert is_there(tmp_path / "a")
    with pytest.raises(FolderError) as caught:
        write_whole(tmp_path / "a" / "b", "x")
    assert not isinstance(caught.value, LongNameError)


@pytest.mark.parametrize(("code", "count", "long"), [(206, 10, True), (3, 300, True), (3, 100, False), (5, 300, False)])
def test_what_windows_says_of_long_paths_is_understood(code, count, long):
    error = FileNotFoundError(errno.ENOENT, "gone")
    error.winerror = code
    assert isinstance(_cannot_write(Path("p" * count), error), LongNameError) == long


@pytest.mark.parametrize("pattern", ["[a-" * 5000, "*" * 256, "[!a" * 86, "x" * 1_000_000])
def test_a_pattern_longer_than_a_name_is_refused_in_a_short_sentence(folder, pattern):
    with pytest.raises(FolderError, match="is longer than 255 characters") as refused:
        find_pictures(folder, pattern)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("pattern", ["[a-" * 85, "*a" * 127, "[z-a]" * 51, "[[" * 127, "?*" * 127])
def test_a_pattern_of_any_signs_finds_something_or_nothing(folder, pattern):
    (folder / f"{'a' * 200}.png").touch()
    assert set(found(folder, pattern=pattern)) <= set(found(folder))


@pytest.fixture
def deep(tmp_path):
    """A folder that lies deeper than Python follows. It is deleted from its end on: rmtree does not follow either."""
    where = tmp_path / "/".join("d" * 1500)
    yield where
    while where != tmp_path:
        for file in where.iterdir() if where.exists() else ():
            file.unlink()
        if where.exists():
            where.rmdir()
        where = where.parent


def test_folders_deeper_than_python_follows_are_made_and_found(tmp_path, deep):
    make_folder(deep)
    make_folder(deep)
    (deep / "a.png").touch()
    assert find_pictures(tmp_path, recursive=True) == [deep / "a.png"]
    write_whole(caption_files([deep / "a.png"])[deep / "a.png"], "text")
    assert (deep / "a.txt").read_text() == "text"


def test_a_folder_cannot_be_made_in_a_file(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError):
        make_folder(tmp_path / "a" / "b" / "c")


def test_links_to_themselves_are_no_pictures_and_no_captions(tmp_path):
    for name in ("a.png", "a.txt", "loop"):
        (tmp_path / name).symlink_to(tmp_path / name)
    (tmp_path / "b.png").touch()
    assert found(tmp_path, recursive=True) == ["b.png"]
    write_whole(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
    with pytest.raises(FolderError, match="no folder"):
        find_pictures(tmp_path / "loop")
