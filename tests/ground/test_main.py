import io
import json
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from pictures import ROOT, draw, write_video

from qwenvl.__main__ import TerminalWatch, main
from qwenvl.models.catalog import DEMO

GREEDY = "--no-do-sample"


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def red_circle(tmp_path):
    draw("circle", "red", "blue").save(tmp_path / "red circle.png")
    return str(tmp_path / "red circle.png")


def test_a_picture_is_described(red_circle, capsys):
    assert main(["--image", red_circle, "Describe this image.", GREEDY]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"


def test_pictures_are_seen_in_the_order_given(red_circle, tmp_path, capsys):
    draw("square", "yellow", "black").save(tmp_path / "b.png")
    second = str(tmp_path / "b.png")
    for order in ([red_circle, second], [second, red_circle]):
        main(["--image", order[0], "--image", order[1], "Describe each image.", GREEDY])
        out = capsys.readouterr().out
        assert (out.index("red circle") < out.index("yellow square")) == (order[0] == red_circle)


def test_a_video_is_described(tmp_path, capsys):
    scenes = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]
    path = write_video(tmp_path / "v.mp4", scenes, 2)
    assert main(["--video", str(path), "Describe this video.", GREEDY]) == 0
    out = capsys.readouterr().out
    assert out.index("red circle") < out.index("blue square")


def test_the_question_comes_from_standard_input_with_a_dash(red_circle, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Describe this image."))
    assert main(["--image", red_circle, "-", GREEDY]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"


def test_the_models_are_listed(capsys):
    assert main(["--list-models"]) == 0
    lines = dict(re.split(r"  +|$", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["Qwen3-4B-Instruct-2507"] == "8.0 GB on disk; in memory none 8.0, 8bit 4.4, 4bit 2.7 GB"
    assert {DEMO, "Qwen3-VL-4B-Instruct"} <= set(lines)


def test_a_missing_model_is_not_fetched_where_that_is_forbidden(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["--model", "Qwen2.5-VL-72B-Instruct", "--download", "never", "x"]) == 2
    assert 'hf download Qwen/Qwen2.5-VL-72B-Instruct --local-dir "' in capsys.readouterr().err


def test_presets_are_listed_and_put_around_the_question(red_circle, capsys):
    assert main(["--list-presets"]) == 0
    assert {"none", "describe briefly", "tags for a training set"} <= set(capsys.readouterr().out.splitlines())
    assert main(["--image", red_circle, "--preset", "tags for a training set", GREEDY]) == 0
    assert capsys.readouterr().out == "red circle, blue background\n"


def test_a_question_that_is_a_command_is_asked_after_two_dashes(red_circle, capsys):
    assert main([GREEDY, "--image", red_circle, "--", "caption"]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"


def test_stops_end_the_answer_and_figures_go_to_standard_error(red_circle, capsys):
    assert (
        main(["--image", red_circle, "Describe this image.", GREEDY, "--stop", " blue", "--stop", "x", "--stats"]) == 0
    )
    out, err = capsys.readouterr()
    assert out == "a red circle on a\n"
    assert json.loads(err[err.index("{") :])["new_tokens"] > 3


def test_an_answer_for_each_picture(red_circle, tmp_path, capsys):
    draw("square", "yellow", "black").save(tmp_path / "b.png")
    files = ["--image", red_circle, "--image", str(tmp_path / "b.png")]
    main([*files, "Describe this image.", GREEDY, "--image-mode", "one answer per image"])
    assert capsys.readouterr().out == "a red circle on a blue background\n\na yellow square on a black background\n"


def test_a_thought_is_written_dimmed_to_a_terminal_and_never_to_standard_output(red_circle, capsys, monkeypatch):
    asked = ["--image", red_circle, "Describe this image.", GREEDY, "--thinking", "on"]
    main(asked)
    assert "I see" not in "".join(capsys.readouterr())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(asked)
    out, err = capsys.readouterr()
    assert out == "a red circle on a blue background\n"
    assert "I see one image. It shows a red circle." in err.replace("\033[2m", "").replace("\033[0m", "")


def test_every_sampling_parameter_arrives(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("qwenvl.pipeline.run", lambda request, *_: asked.append(request))
    values = {
        "temperature": 1.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "max_new_tokens": 33,
        "seed": 2**64 - 1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "no_repeat_ngram_size": 4,
        "min_new_tokens": 5,
        "thinking_budget": 99,
    }
    frames = {"fps": 12.5, "sample_fps": 2.0, "max_frames": 8, "max_frame_pixels": 50000, "max_video_tokens": 999}
    more = {"thinking": "on", "image_mode": "one answer per image", "image_resolution": "original"}
    values |= frames | more
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    main(["x", "--no-do-sample", "--system", "S", "--quantization", "8bit", "--attention-mode", "eager", *flags])
    (request,) = asked
    for part, names in ((request.frames, frames), (request, more), (request.sampling, set(values) - {*frames, *more})):
        assert {name: getattr(part, name) for name in names} == {name: values[name] for name in names}
    assert not request.sampling.do_sample
    assert (request.system, request.text, request.load.quantization, request.load.attention) == (
        "S",
        "x",
        "8bit",
        "eager",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png", "x"], "there is no file 'missing.png'"),
        (["--video", "missing.mp4", "x"], "there is no file 'missing.mp4'"),
        (["--model", "Qwen9", "x"], "'Qwen9' is not in the list"),
        (["--preset", "gone", "x"], "preset 'gone' does not exist"),
        (["--temperature", "3", "x"], "temperature must be between"),
        (["", "--system", ""], "nothing to answer"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_the_first_word_may_be_a_command(capsys, monkeypatch):
    told = []
    monkeypatch.setattr(
        "qwenvl.cli.doctor.examine", lambda model, say, complete: told.append(model) or say("well") or True
    )
    assert main(["doctor"]) == 0
    assert main(["doctor", "--model", "Qwen3-VL-4B-Instruct"]) == 0
    assert told == [DEMO, "Qwen3-VL-4B-Instruct"]
    assert capsys.readouterr().out == "well\nwell\n"
    monkeypatch.setattr("qwenvl.cli.doctor.examine", lambda model, say, complete: False)
    assert main(["doctor"]) == 1


def test_a_command_as_a_question_is_asked_after_two_dashes(monkeypatch):
    asked = []
    monkeypatch.setattr("qwenvl.pipeline.run", lambda request, *_: asked.append(request.text))
    for arguments in (["--", "doctor"], [GREEDY, "doctor"], ["ask the doctor"]):
        assert main(arguments) == 0
    assert asked == ["doctor", "doctor", "ask the doctor"]


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="no file"):
        main(["--image", "missing.png", "x", "--debug"])


def test_it_runs_as_a_program_and_writes_nothing_but_the_answer_to_standard_output(red_circle):
    command = [sys.executable, "-m", "qwenvl", "--image", red_circle, "Describe this image.", GREEDY, "--verbose"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "a red circle on a blue background\n")
    assert "tokens/s" in done.stderr
    assert "Traceback" not in done.stderr


ORDERS = "\x1b]0;x\x07\x9b2J\r\u202e"


def test_names_of_presets_and_models_give_the_terminal_no_orders(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    presets = tmp_path / ".config" / "qwenvl" / "presets"
    presets.mkdir(parents=True)
    (presets / f"{ORDERS}\udce4.txt").write_text("Say nothing.")
    custom = tmp_path / "custom_models.json"
    custom.write_text(json.dumps({"hf_vl_models": {f"mine{ORDERS}": {"repo_id": "owner/name"}}}))
    monkeypatch.setattr("qwenvl.models.catalog.CUSTOM_MODELS", custom)
    for command in (["--list-presets"], ["--list-models"], ["serve-info"], ["hi", "--preset", ORDERS]):
        main(command)
        out, err = capsys.readouterr()
        assert not set("\x1b\x07\x9b\r\u202e") & set(out + err), command
    main(["--list-presets"])
    assert r"\x1b]0;x\x07\x9b2J\r\u202e\udce4" in capsys.readouterr().out
    for command in (["caption"], ["doctor"], ["serve-info"], []):
        with pytest.raises(SystemExit):
            main([*command, "a", "b", ORDERS])
        assert not set("\x1b\x07\x9b\r\u202e") & set(capsys.readouterr().err), command


def test_models_in_the_file_that_ships_are_copied_at_the_first_start(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    custom = tmp_path / "custom_models.json"
    custom.write_text(json.dumps({"models": {"Mine": {"repo_id": "owner/name"}}}))
    monkeypatch.setattr("qwenvl.models.catalog.CUSTOM_MODELS", custom)
    for _ in "ab":
        assert main(["--list-models"]) == 0
    assert capfd.readouterr().out.count("Mine") == 2
    custom.write_text("{}")  # an update
    assert main(["--list-models"]) == 0
    assert capfd.readouterr().out.count("Mine") == 1


def test_an_answer_gives_a_terminal_no_orders_and_a_file_every_character(capsys, monkeypatch):
    said = f"a\n{ORDERS}"
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        watch = TerminalWatch()
        watch.update(1, said[:4], ORDERS)
        watch.end(said)
        out, err = capsys.readouterr()
        assert out == (f"a\n{ascii(ORDERS)[1:-1]}" if terminal else said)
        assert err.count("\x1b") == 2, "to dim a thought, and to end that"


def test_what_others_log_gives_the_terminal_no_orders(capsys):
    root = logging.getLogger()
    root.handlers[:] = []
    main(["--list-presets"])
    capsys.readouterr()
    logging.getLogger("another").warning("name %s", ORDERS)
    logging.getLogger("qwenvl").warning("100 %% of %s", ORDERS)
    root.handlers[0].flush()
    err = capsys.readouterr().err
    assert err.splitlines() == [f"name {ascii(ORDERS)[1:-1]}", f"100 % of {ascii(ORDERS)[1:-1]}"]


@pytest.mark.parametrize("quantizations", [["none"], ["4bit", "8bit"]])
def test_a_healthy_run_writes_the_answer_and_nothing_besides(quantizations):
    """No bar of transformers, and nothing that bitsandbytes says of packages that nobody asked for."""
    runs = f"for each in {quantizations}: main(['--no-do-sample', '--quantization', each, 'Hello'])"
    command = [sys.executable, "-c", f"from qwenvl.__main__ import main\n{runs}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Hello! I am a tiny Qwen3-VL.") == len(quantizations)


def test_full_diagnostics_are_shown_without_asking_for_the_log_and_a_bar_where_a_variable_asks_for_it(red_circle):
    command = [sys.executable, "-m", "qwenvl", "--image", red_circle, "Describe this image.", GREEDY]
    given = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    done = subprocess.run(
        [*command, "--diagnostics", "full"], cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "a red circle on a blue background\n")
    assert "[QwenVL] phases: media" in done.stderr
    assert BAR in done.stderr


# transformers 4 reads small models without one.
BAR = "" if version("transformers").startswith("4.") else "Loading weights"
