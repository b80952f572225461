import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from picture_folder import ASK, CAPTIONS, SCENES
from pictures import ROOT, draw

from qwenvl.__main__ import main
from qwenvl.files.locks import FileLock


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for name, scene in SCENES.items():
        draw(*scene).save(folder / name, quality=95)
    return folder


def captions(folder, suffix=".txt"):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob(f"*{suffix}")}


def ask(folder, *flags):
    return main(["caption", str(folder), *ASK, *flags])


def test_each_picture_gets_its_own_caption_beside_it(folder, capsys):
    assert ask(folder, "--recursive") == 0
    assert captions(folder) == CAPTIONS
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*")} == {*SCENES, *CAPTIONS, "sub"}
    assert capsys.readouterr().out == "4 captioned, 0 not, 0 had a caption\n"


def test_folders_below_are_left_alone_unless_asked_for(folder):
    assert ask(folder) == 0
    assert set(captions(folder)) == {"1.txt", "2.txt", "10.txt"}


def test_captions_that_are_there_stay_and_the_rest_is_made(folder, capsys):
    (folder / "2.txt").write_text("mine")
    assert ask(folder) == 0
    assert captions(folder) == {"1.txt": CAPTIONS["1.txt"], "2.txt": "mine", "10.txt": CAPTIONS["10.txt"]}
    assert capsys.readouterr().out == "2 captioned, 0 not, 1 had a caption\n"


def test_when_all_have_one_no_model_is_loaded(folder, capsys, monkeypatch):
    for name in CAPTIONS:
        (folder / name).write_text("mine")
    monkeypatch.setattr("qwenvl.pipeline.caption", None)
    assert ask(folder, "--recursive") == 0
    assert set(captions(folder).values()) == {"mine"}


def test_overwrite_makes_all_of_them_new(folder):
    for name in CAPTIONS:
        (folder / name).write_text("mine")
    assert ask(folder, "--recursive", "--overwrite") == 0
    assert captions(folder) == CAPTIONS


def test_the_files_have_the_suffix_that_was_asked_for(folder):
    assert ask(folder, "--suffix", ".caption") == 0
    assert set(captions(folder, ".caption")) == {"1.caption", "2.caption", "10.caption"}
    assert captions(folder) == {}


def test_two_pictures_of_one_name_do_not_share_a_caption(folder):
    draw("square", "red", "white").save(folder / "1.webp", quality=95)
    assert ask(folder) == 0
    assert {name: text for name, text in captions(folder).items() if name.startswith("1.")} == {
        "1.png.txt": CAPTIONS["1.txt"],
        "1.webp.txt": "a red square on a white background",
    }


def test_a_name_behind_a_name_gets_the_caption_of_its_own_picture(folder):
    for name in ("1.png.png", "1.webp"):
        draw("square", "red", "white").save(folder / name, quality=95)
    assert ask(folder) == 0
    assert {name: text for name, text in captions(folder).items() if name.startswith("1.")} == {
        "1.png.txt": CAPTIONS["1.txt"],
        "1.webp.txt": "a red square on a white background",
        "1.png.png.txt": "a red square on a white background",
    }


@pytest.mark.parametrize("name", ["1.png", "1.txt"])
def test_the_one_file_of_all_captions_is_none_of_the_folder(folder, name, capsys):
    before = (folder / "1.png").read_bytes()
    assert ask(folder, "--jsonl", str(folder / name)) == 2
    assert "is a picture or a caption" in capsys.readouterr().err
    assert captions(folder) == {}
    assert (folder / "1.png").read_bytes() == before


def test_pictures_that_cannot_be_read_are_told_at_the_end_and_cost_themselves_only(folder, capsys):
    (folder / "0.png").write_text("no picture")
    (folder / "5.jpg").write_bytes((folder / "2.jpg").read_bytes()[:300])
    assert ask(folder, "--recursive") == 1
    assert captions(folder) == CAPTIONS
    out, err = capsys.readouterr()
    assert out == "4 captioned, 2 not, 0 had a caption\n"
    told = [line for line in err.splitlines() if line.startswith("no caption: ")]
    assert [re.match(r"no caption: (\S+):", line).group(1) for line in told] == ["0.png", "5.jpg"]
    assert "cannot be read as a picture" in told[0]


def test_they_are_tried_again_the_next_time(folder, capsys):
    (folder / "0.png").write_text("no picture")
    ask(folder)
    draw("circle", "red", "white").save(folder / "0.png")
    capsys.readouterr()
    assert ask(folder) == 0
    assert captions(folder)["0.txt"] == "a red circle on a white background"
    assert capsys.readouterr().out == "1 captioned, 0 not, 3 had a caption\n"


def test_an_empty_answer_is_no_caption(folder, capsys, monkeypatch):
    from qwenvl.request import Answer

    def caption(request, items, models, watch, batch_size, done, failed):
        for index in range(len(items)):
            done(index, Answer("" if index == 1 else "text"))

    monkeypatch.setattr("qwenvl.pipeline.caption", caption)
    assert ask(folder) == 1
    assert captions(folder) == {"1.txt": "text", "10.txt": "text"}
    assert "2.jpg: the model answered nothing" in capsys.readouterr().err


def test_one_file_holds_the_captions_of_the_whole_folder_old_ones_too(folder):
    (folder / "2.txt").write_text("mine — ü")
    (folder / "0.png").write_text("no picture")
    file = folder / "metadata.jsonl"
    assert ask(folder, "--recursive", "--jsonl", str(file)) == 1
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"file_name": "1.png", "text": CAPTIONS["1.txt"]},
        {"file_name": "2.jpg", "text": "mine — ü"},
        {"file_name": "10.webp", "text": CAPTIONS["10.txt"]},
        {"file_name": "sub/deep.png", "text": CAPTIONS["sub/deep.txt"]},
    ]


def test_a_preset_asks_the_question(folder):
    assert main(["caption", str(folder), "--preset", "tags for a training set", "--no-do-sample"]) == 0
    assert captions(folder)["1.txt"] == "red circle, blue background"


@pytest.mark.parametrize("size", ["1", "2", "auto"])
def test_any_number_at_a_time_gives_the_same_captions(folder, size):
    assert ask(folder, "--recursive", "--batch-size", size) == 0
    assert captions(folder) == CAPTIONS


HELD = """
import sys
from pathlib import Path
from qwenvl.cli.caption import _Turn
root = Path(sys.argv[1])
_Turn(root, {root}, sys.argv[2] == "recursive").take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("theirs", "how", "ours", "flags", "waits"),
    [
        (".", "", ".", [], True),
        (".", "recursive", ".", ["--recursive"], True),
        (".", "recursive", "sub", [], True),
        ("sub", "", ".", ["--recursive"], True),
        (".", "", "sub", [], False),
        ("sub", "recursive", ".", [], False),
    ],
)
def test_two_runs_do_not_make_the_same_captions(folder, capsys, theirs, how, ours, flags, waits):
    command = [sys.executable, "-c", HELD, str(folder / theirs), how]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        status = ask(folder / ours, *flags)
        other.kill()
    err = capsys.readouterr().err
    assert (status, "Another run is making captions in" in err) == ((2, True) if waits else (0, False))
    assert bool(captions(folder)) is not waits
    assert ask(folder / ours, *flags) == 0, "a run that was killed is nobody to wait for"
    assert captions(folder / ours)
    assert not any(file.name.startswith(".") for file in (folder / ours).iterdir())


def test_when_all_have_a_caption_nobody_is_waited_for(folder, capsys):
    ask(folder)
    lock = FileLock(folder / ".qwenvl-captions.lock")
    assert lock.take()
    assert ask(folder) == 0
    lock.release()


def test_what_another_run_made_just_now_is_not_made_again(folder, capsys, monkeypatch):
    real = FileLock.take

    def later(lock):
        (folder / "2.txt").write_text("theirs")
        return real(lock)

    monkeypatch.setattr(FileLock, "take", later)
    assert ask(folder) == 0
    assert captions(folder)["2.txt"] == "theirs"
    assert capsys.readouterr().out == "2 captioned, 0 not, 1 had a caption\n"


def test_a_folder_where_no_lock_can_be_made_is_captioned_all_the_same(folder, caplog):
    (folder / ".qwenvl-captions.lock").symlink_to(folder / "elsewhere.txt")
    assert ask(folder) == 0
    assert "cannot check if another run" in caplog.text
    assert set(captions(folder)) == {"1.txt", "2.txt", "10.txt"}


def test_names_give_the_terminal_no_orders(folder, capsys, caplog):
    (folder / "\x1b]0;x\x07\u202e\n\x9b2J.png").write_text("no picture")
    (folder / "\udce4\r.gif").write_text("no picture")
    assert ask(folder) == 1
    out, err = capsys.readouterr()
    # Progress bars move the cursor by \x1b[A.
    assert not set("\x07\x9b\u202e\udce4") & set(out + err + caplog.text)
    assert "\x1b]" not in out + err + caplog.text
    told = [line for line in err.splitlines() if line.startswith("no caption: ")]
    assert len(told) == 2
    assert r"\x1b]0;x\x07\u202e\n\x9b2J.png" in told[0]
    assert ask(folder / "\x1b[2J") == 2
    assert "\x1b[2J" not in capsys.readouterr().err


def test_progress_tells_the_rate_and_the_time_left(folder, capsys):
    ask(folder)
    last = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert re.search(r"100%.* 3/3 \[\d\d:\d\d, 00:00 left, +[\d.]+ images/s\]", last), last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{folder}"], "give --prompt, --preset or both"),
        (["{folder}/gone", *ASK], "There is no folder"),
        (["{folder}/empty", *ASK], "There is no picture in"),
        (["{folder}", *ASK, "--suffix", ".png"], "suffix '.png'"),
        (["{folder}", *ASK, "--preset", "gone"], "preset 'gone' does not exist"),
        (["{folder}", "--preset", "compare two images"], "needs two pictures, and the model is shown only one"),
        (["{folder}", *ASK, "--model", "Qwen9"], "'Qwen9' is not in the list"),
        (["{folder}", *ASK, "--jsonl", "{folder}/gone/out.jsonl"], "--jsonl: there is no folder"),
        (["{folder}", *ASK, "--temperature", "3"], "temperature must be between"),
    ],
)
def test_an_error_that_stops_it_all_is_one_line_and_status_2(folder, flags, message, capsys):
    (folder / "empty").mkdir()
    assert main(["caption", *(flag.format(folder=folder) for flag in flags)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert captions(folder) == {}


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_a_batch_size_is_auto_or_a_number(folder, size, capsys):
    with pytest.raises(SystemExit) as stopped:
        ask(folder, f"--batch-size={size}")
    assert stopped.value.code == 2
    assert "must be auto or a number" in capsys.readouterr().err


def test_a_caption_that_cannot_be_written_stops_it_with_what_was_done_so_far(folder, capsys):
    (folder / "2.txt").mkdir()
    assert ask(folder, "--overwrite", "--batch-size", "1") == 2
    out, err = capsys.readouterr()
    assert "1 captioned, 0 not, 0 had a caption, 2 left to do" in out
    assert "2.txt" in err.splitlines()[-1]


LONG = "p" * 251 + ".png"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_caption_whose_name_is_too_long_costs_its_picture_only(folder, capsys, overwrite):
    draw("circle", "red", "blue").save(folder / LONG)
    file = folder / "all.jsonl"
    assert ask(folder, "--recursive", "--suffix", ".caption", "--jsonl", str(file), *overwrite) == 1
    assert len(captions(folder, ".caption")) == len(file.read_text().splitlines()) == 4
    out, err = capsys.readouterr()
    assert out == "4 captioned, 1 not, 0 had a caption\n"
    assert re.search(r"no caption: .*ppp\.caption' cannot be written: the name is longer", err)
    assert ask(folder, "--recursive", "--suffix", ".caption") == 1
    assert capsys.readouterr().out == "0 captioned, 1 not, 4 had a caption\n", "and no model is asked"


def test_so_it_does_where_that_shows_only_when_it_is_written(folder, capsys, monkeypatch):
    """As on Windows."""
    draw("circle", "red", "blue").save(folder / LONG)
    monkeypatch.setattr("qwenvl.cli.caption.folder.is_there", lambda file: False)
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: len(self.name) < 256 and real(self))
    assert ask(folder, "--suffix", ".caption") == 1
    assert len(captions(folder, ".caption")) == 3
    assert capsys.readouterr().out == "3 captioned, 1 not, 0 had a caption\n"


def test_jpegs_under_all_their_names_are_captioned(folder):
    for number, suffix in enumerate((".jfif", ".jpe", ".PJPEG", ".mpo")):
        draw("square", "red", "white").save(folder / f"other{number}{suffix}", "JPEG", quality=95)
    assert ask(folder) == 0
    assert len(captions(folder)) == 7


@pytest.mark.parametrize("form", ['"{}"', "'{}'", "\u202a{}\u202c", "file://{}", "file://localhost{}"])
def test_the_folder_may_be_given_as_it_is_pasted(folder, form):
    spaced = folder.rename(folder.with_name("my set"))
    asked = form.format(str(spaced).replace(" ", "%20") if "file" in form else spaced)
    assert main(["caption", asked, *ASK]) == 0
    assert len(captions(spaced)) == 3


def many(folder, count=16):
    for number in range(count):
        draw(*list(SCENES.values())[number % 4]).save(folder / f"many {number}.png")
    return count


def hears_ctrl_c():
    """A shell makes what it starts in the background deaf to Ctrl-C, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(folder, *flags):
    """The command in a process of its own, once it has written two captions."""
    command = [sys.executable, "-m", "qwenvl", "caption", str(folder), *ASK, "--batch-size", "2", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=None if os.name == "nt" else hears_ctrl_c, **pipes)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.txt"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_killed_in_the_middle_every_caption_is_whole_and_the_next_run_makes_the_rest(tmp_path, capsys):
    count = many(tmp_path, 48)
    process = started(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = {file: (file.read_text(), file.stat().st_mtime_ns) for file in tmp_path.glob("*.txt")}
    assert 2 <= len(first) < count
    assert {text for text, _ in first.values()} <= set(CAPTIONS.values())

    assert ask(tmp_path) == 0
    assert capsys.readouterr().out == f"{count - len(first)} captioned, 0 not, {len(first)} had a caption\n"
    assert {file: (file.read_text(), file.stat().st_mtime_ns) for file in first} == first
    results = [tmp_path / f"many {number}.txt" for number in range(count)]
    assert [file.read_text() for file in results] == (list(CAPTIONS.values()) * count)[:count]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to others on Windows")
def test_ctrl_c_ends_it_with_a_sum_and_the_captions_so_far_in_one_file(tmp_path):
    count = many(tmp_path, 100)
    process = started(tmp_path, "--jsonl", str(tmp_path / "all.jsonl"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    written = len(captions(tmp_path))
    assert 2 <= written < count
    assert f"{written} captioned, 0 not, 0 had a caption, {count - written} left to do" in out
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == written
