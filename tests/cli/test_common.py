"""What the commands write: no answer is lost to an encoding, and whoever stops reading causes no traceback."""

import io
import os
import re
import subprocess
import sys

import pytest
from picture_folder import ASK
from pictures import ROOT, draw

from qwenvl.__main__ import TerminalWatch, main
from qwenvl.cli import common

ANSWER = "一只猫 🐱 é"
ENCODINGS = ["cp1252", "cp437", "cp932", "ascii", "latin-1", "utf-8", "utf-16", "gbk"]


@pytest.fixture
def terminal(monkeypatch):
    """Standard output in some encoding, and what was written there, read as that."""

    def of(encoding, errors="strict", name="stdout"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
        monkeypatch.setattr(sys, name, stream)

        def said():
            stream.flush()
            return stream.buffer.getvalue().decode(encoding)

        return said

    return of


def unescaped(text):
    """The text with what stands for other characters put back."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_answer_is_written_in_any_encoding_and_can_be_read_again(terminal, encoding, errors):
    said = terminal(encoding, errors)
    watch = TerminalWatch()
    for end in range(len(ANSWER) + 1):
        watch.update(end, ANSWER[:end])
    watch.end(ANSWER)
    assert unescaped(said()) == ANSWER
    assert (said() == ANSWER) == encoding.startswith("utf")


def test_who_asked_for_question_marks_has_them(terminal):
    said = terminal("ascii", "replace")
    TerminalWatch().end(ANSWER)
    assert said() == "??? ? ?"


@pytest.mark.parametrize(("encoding", "told"), [("cp1252", True), ("utf-8", False)])
def test_that_there_were_others_is_told_on_standard_error(terminal, capsys, monkeypatch, encoding, told):
    said = terminal(encoding)
    monkeypatch.setattr("qwenvl.pipeline.run", lambda request, models, watch: watch.end(ANSWER))
    assert main(["x"]) == 0
    assert unescaped(said()) == f"{ANSWER}\n"
    assert ("note: standard output is cp1252" in capsys.readouterr().err) == told


def test_a_thought_and_an_error_of_any_letters_are_told_on_any_terminal(terminal, monkeypatch):
    told = terminal("cp1252", name="stderr")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    TerminalWatch().update(1, "", ANSWER)
    assert main(["--image", "猫.png", "x"]) == 2
    assert r"there is no file '\u732b.png'" in told()
    assert ANSWER in unescaped(told().replace("\033[2m", "").replace("\033[0m", ""))


def run(*words, env=None, **streams):
    """The command line as a program of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(
        [sys.executable, "-m", "qwenvl", *map(str, words)], cwd=ROOT, env={**os.environ, **(env or {})}, **streams
    )


@pytest.fixture
def home(tmp_path):
    """Somebody's, with a preset of a Chinese name."""
    presets = tmp_path / ".config" / "qwenvl" / "presets"
    presets.mkdir(parents=True)
    (presets / "标签.txt").write_text("List tags.", encoding="utf-8")
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}


@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_lists_hold_every_name(home, encoding):
    process = run("--list-presets", env=home | encoding)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, b"Error" in err) == (0, False)
    # Where Python reads names as bytes, it writes them so.
    assert rb"\u6807\u7b7e" in out or "标签".encode() in out


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["caption", "--help"],
        ["doctor", "--help"],
        ["serve-info", "--help"],
        ["serve-info"],
        ["--list-models"],
    ],
)
def test_what_is_always_written_is_written_in_ascii_too(terminal, words):
    said = terminal("ascii")
    try:
        assert main(words) == 0
    except SystemExit as end:
        assert end.code == 0
    assert len(said()) > 100


def test_captions_are_utf8_whatever_the_terminal_is(tmp_path, terminal, capsys):
    said = terminal("cp1252")
    for name in ("猫.png", "é.png"):
        draw("circle", "red", "blue").save(tmp_path / name)
    (tmp_path / "狗.png").write_text("no picture")
    assert main(["caption", str(tmp_path), *ASK]) == 1
    assert (tmp_path / "猫.txt").read_text(encoding="utf-8") == "a red circle on a blue background"
    assert said() == "2 captioned, 1 not, 0 had a caption\n"
    assert "no caption: 狗.png" in unescaped(capsys.readouterr().err)


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
@pytest.mark.parametrize("words", [["--list-models"], ["serve-info"], ["--list-presets"]])
@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_nobody_reads_ends_it_without_a_word(words, both):
    read, write = os.pipe()
    os.close(read)
    process = run(*words, stdout=write, **({"stderr": write} if both else {}))
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert process.returncode == common.UNREAD
    assert not err


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_captions_are_on_the_disk_though_nobody_reads_the_sum(tmp_path):
    draw("circle", "red", "blue").save(tmp_path / "a.png")
    read, write = os.pipe()
    os.close(read)
    process = run("caption", tmp_path, *ASK, "--jsonl", tmp_path / "all.jsonl", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert process.returncode == common.UNREAD
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    assert (tmp_path / "a.txt").read_text() == "a red circle on a blue background"
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk at hand")  # noqa: PTH110
def test_a_full_disk_is_told_in_one_line():
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = run("--list-models", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (told,) = err.decode().strip().splitlines()
    assert re.search("^error: .*No space left on device", told)


def test_without_any_output_it_runs_too(monkeypatch):
    """As pythonw does on Windows."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--list-presets"]) == 0
    TerminalWatch().end("x")


@pytest.mark.parametrize("form", ['"{}"', "'{}'", "\u202a{}\u202c", "file://{}"])
def test_pictures_and_films_may_be_given_as_they_are_pasted(tmp_path, capsys, form):
    draw("circle", "red", "blue").save(tmp_path / "a.png")
    assert main(["--image", form.format(tmp_path / "a.png"), "Describe this image.", "--no-do-sample"]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"
    assert main(["--video", form.format(tmp_path / "gone.mp4"), "x"]) == 2
    assert f"there is no file {str(tmp_path / 'gone.mp4')!r}" in capsys.readouterr().err
