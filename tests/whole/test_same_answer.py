"""The same question has the same answer: every time, every way, with the oldest and the newest transformers.

same_answers.json holds the questions and what the demo model says to them, token by token. Whatever installation runs
these tests is compared with that, and so with every other one.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from pictures import ROOT, draw, image, write_video

from qwenvl.__main__ import main
from qwenvl.decoding.decoder import Decoder
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.media import media
from qwenvl.models import catalog
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import caption, run
from qwenvl.process import PROCESS
from qwenvl.prompting.prompt import encode, side_by_side
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import IMAGE_MODES

CASES = {
    case["name"]: case
    for case in json.loads((ROOT / "tests" / "support" / "same_answers.json").read_text(encoding="utf-8"))
}
GREEDY = Sampling(do_sample=False, max_new_tokens=80)
SYSTEM = "You are a helpful assistant."
# The numbers of a box are tokens of nearly the same likelihood: in bfloat16, whose numbers have eight bits, which of
# them is the likeliest depends on the order in which a version adds. They count from 0 to 1000.
NEAR = 40
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def film(tmp_path):
    scenes = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]
    return write_video(tmp_path / "v.mp4", scenes, 2)


def pictures(case):
    return [draw(*scene[:3], tuple(scene[3:])) for scene in case["pictures"]]


def request(case, film, model=DEMO, **changes):
    shown = {f"image{number}": image(picture) for number, picture in enumerate(pictures(case), 1)}
    given = {
        "load": LoadSpec(model),
        "system": case.get("system", SYSTEM),
        "images": shown,
        "video_path": str(film) if case.get("video") else "",
        "thinking": case.get("thinking", "auto"),
        "sampling": GREEDY,
    }
    return Request(text=case["text"], **(given | changes))


def prompt_tokens(case):
    """Version 5 leaves the two marks that stand for a video around what it puts in its place, version 4 does not."""
    marks = 2 if case.get("video") and not transformers.__version__.startswith("4.") else 0
    return case["prompt_tokens"] + marks


def same(case, text):
    """Whether the text is the committed one, but for the numbers of a box where those may differ."""
    if case["name"] != "a box":
        return text == case["answer"]
    numbers = [[int(entry) for entry in re.findall(r"\d+", one)] for one in (text, case["answer"])]
    near = all(abs(a - b) <= NEAR for a, b in zip(*numbers, strict=True))
    return near and re.sub(r"\d+", "", text) == re.sub(r"\d+", "", case["answer"])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def handle(request):
    return load(LoadSpec(DEMO), catalog.find(DEMO).folder, Machine("cpu", request.param, ""))


@each_case
@pytest.mark.parametrize("tier", ["own step", "generate"])
def test_the_tokens_are_the_committed_ones(handle, tier, name, film):
    case = CASES[name]
    asked = request(case, film)
    prompt = encode(handle, asked, pictures(case), media.videos(asked))
    assert prompt.tokens == prompt_tokens(case)
    result = Decoder(handle.model, "sdpa", tier).generate(prompt.inputs, GREEDY, None, lambda _: None, lambda: None)
    if name == "a box" and handle.machine.dtype == torch.bfloat16:
        assert same(case, handle.tokenizer.decode(result.ids))
    else:
        assert list(result.ids) == case["tokens"]


def test_an_answer_is_the_same_again_after_a_reload_and_after_another_model_took_its_place(models, film):
    first = {}
    for moment in ("first", "again", "reloaded", "another model came", "again"):
        if moment == "reloaded":
            models.clear()
        if moment == "another model came":
            run(Request(LoadSpec(DEMO, attention="eager"), "hello"), models, NoWatch())
        for name, case in CASES.items():
            (answer,) = run(request(case, film), models, NoWatch()).answers
            assert same(case, answer.text), (moment, name)
            assert answer.thinking == case.get("thought", "")
            assert first.setdefault(name, answer) == answer, (moment, name)


def test_pictures_answered_together_have_the_answers_that_each_has_alone(models):
    alike = [case for case in CASES.values() if case["text"] == "Describe this image." and "thinking" not in case]
    shown = {f"image{number}": image(*pictures(case)) for number, case in enumerate(alike, 1)}
    asked = Request(LoadSpec(DEMO), alike[0]["text"], SYSTEM, shown, sampling=GREEDY, image_mode=IMAGE_MODES[1])
    result = run(asked, models, NoWatch())
    assert [answer.text for answer in result.answers] == [case["answer"] for case in alike]
    assert result.stats.decode.batch_size == len(alike) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_the_last_digits_of_the_logits_and_no_token(dtype):
    """A padded row goes through kernels of other sizes, which add in another order: bit for bit it cannot be equal.

    What that makes of the largest logit is bounded here by its precision, and the likeliest token must be the same.
    """
    handle = load(LoadSpec(DEMO), catalog.find(DEMO).folder, Machine("cpu", dtype, ""))
    alike = [CASES[name] for name in ("a small picture", "a large picture", "a picture")]
    prompts = [encode(handle, Request(handle.spec, case["text"], SYSTEM), pictures(case)) for case in alike]
    assert len({prompt.tokens for prompt in prompts}) == 3
    with torch.inference_mode():
        alone = torch.cat([handle.model(**prompt.inputs).logits[:, -1] for prompt in prompts]).float()
        padded = side_by_side(prompts)
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert positions[0, 0] == 0
        together = handle.model(**padded).logits[:, -1].float()
    error = (together - alone).abs().max() / alone.abs().max()
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert together.argmax(-1).tolist() == alone.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["two pictures", "a thought", "a video", "a letter that is several tokens"])
def test_the_command_line_says_the_same(name, film, tmp_path, capsys):
    case = CASES[name]
    arguments = [case["text"], "--system", SYSTEM, "--thinking", case.get("thinking", "auto")]
    for number, picture in enumerate(pictures(case)):
        picture.save(tmp_path / f"{number}.png")
        arguments += ["--image", str(tmp_path / f"{number}.png")]
    arguments += ["--video", str(film)] if case.get("video") else []
    assert main([*arguments, "--no-do-sample", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{case['answer']}\n"
    figures = json.loads(err[err.index("{") :])
    # The token that ends the answer is not counted.
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (prompt_tokens(case), len(case["tokens"]))


@pytest.fixture
def in_comfyui(comfy, pack):
    """Runs a node in the double of ComfyUI; the answer and the thought."""

    def ask(case, film, **changes):
        node = pack.NODE_CLASS_MAPPINGS["QwenVL" if case["pictures"] or case.get("video") else "Qwen"]
        declared = {name: options.get("default") for name, (_, options) in node.INPUT_TYPES()["required"].items()}
        shown = {f"image{number}": image(picture) for number, picture in enumerate(pictures(case), 1)}
        asked = {"text" if "text" in declared else "prompt": case["text"], "system": case.get("system", SYSTEM)}
        asked |= {"model": DEMO, "do_sample": False, "thinking": case.get("thinking", "auto"), **shown}
        asked |= {"video_path": str(film)} if case.get("video") else {}
        texts, thoughts, _ = comfy.run(node, **declared | asked | changes)
        return texts[0], thoughts[0]

    return ask


def test_the_nodes_say_the_same(in_comfyui, film):
    for name, case in CASES.items():
        text, thought = in_comfyui(case, film)
        assert same(case, text), name
        assert thought == case.get("thought", ""), name


@each_case
def test_an_engine_says_the_same(served, tmp_path, monkeypatch, models, name, film):
    case = CASES[name]
    entry = {"base_url": served.base_url, "model": served.model, "pixels": [4096, 65536]}
    (tmp_path / "custom_models.json").write_text(json.dumps({"engines": {"there": entry}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", tmp_path / "custom_models.json")
    # As if found out before, so that each question is one request.
    unknown = {"top_k", "min_p", "repetition_penalty", "repeat_penalty"}
    monkeypatch.setitem(PROCESS.unknown_fields, (served.base_url, served.model), unknown)
    result = run(request(case, film, "there @ engine"), models, NoWatch())
    assert same(case, result.text)
    assert result.thinking == case.get("thought", "")
    # It is shown the frames of a video as pictures.
    assert case.get("video") or result.stats.prompt.prompt_tokens == case["prompt_tokens"]


COLOR = {"name": "a sample", "text": "Name a random color.", "pictures": []}
WIDE = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=40, seed=11)
FLAGS = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40, "seed": 11}


def test_a_seed_gives_the_same_sample_through_node_command_line_and_python(models, in_comfyui, tmp_path):
    """On one machine with one version of torch: another may add in another order, and a sample is decided by that."""
    here = run(request(COLOR, "", sampling=WIDE), models, NoWatch()).text
    others = {run(request(COLOR, "", sampling=replace(WIDE, seed=seed)), models, NoWatch()).text for seed in range(8)}
    assert len(others) > 1, "the seed decides"
    models.clear()
    assert run(request(COLOR, "", sampling=WIDE), models, NoWatch()).text == here
    assert in_comfyui(COLOR, "", do_sample=True, **FLAGS)[0] == here
    flags = [text for name, value in FLAGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "qwenvl", COLOR["text"], "--system", SYSTEM, *flags]
    # One thread, as here: how work is divided among threads decides the last digits too.
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == here, done.stderr


def test_of_many_sampled_answers_a_seed_gives_all_again_and_one_at_a_time_those_of_the_seeds_after_it(models):
    """Answer number n is drawn with the seed plus n where it is made alone. Answers made together share their draws,
    so that the same come again where as many are made at a time, and others where not."""
    scenes = [draw("circle", color, "white") for color in ("red", "green", "pink", "blue")]

    def drawn(batch_size):
        answers = {}
        asked = Request(LoadSpec(DEMO), COLOR["text"], SYSTEM, sampling=WIDE)
        caption(asked, [("a", scene) for scene in scenes], models, NoWatch(), batch_size, done=answers.__setitem__)
        return [answers[number].text for number in range(len(scenes))]

    one_by_one, together = drawn(1), drawn(4)
    assert drawn(1) == one_by_one
    assert drawn(4) == together
    alone = [
        run(
            Request(LoadSpec(DEMO), COLOR["text"], SYSTEM, {"image1": image(scene)},
                    sampling=replace(WIDE, seed=WIDE.seed + number)),
            models, NoWatch(),
        ).text
        for number, scene in enumerate(scenes)
    ]  # fmt: skip
    assert one_by_one == alone
    assert len(set(one_by_one)) > 1
