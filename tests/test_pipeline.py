import gc
import json
import shutil
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import draw, image, write_video

from qwenvl import catalog, host, loader
from qwenvl.budget import OutOfMemoryError
from qwenvl.catalog import DEMO
from qwenvl.decode import Decoder
from qwenvl.loader import LoadError
from qwenvl.media import MediaError
from qwenvl.pipeline import NoAnswerError, caption, run
from qwenvl.request import IMAGE_MODES, RELEASES, LoadSpec, Request, Sampling

GREEDY = Sampling(do_sample=False, max_new_tokens=80)


class Watch:
    """Records what it is told; presses cancel at a token."""

    def __init__(self, cancel_at=None):
        self.cancel_at, self.updates, self.final = cancel_at, [], None

    def check(self):
        pass

    def update(self, new_tokens, text, thinking=""):
        self.updates.append((new_tokens, text))
        if new_tokens == self.cancel_at:
            raise KeyboardInterrupt

    def advance(self, done, total, text):
        self.updates.append((done, text))

    def end(self, text):
        self.final = text


def request(text="Describe this image.", **changes):
    given = {"load": LoadSpec(DEMO), "sampling": GREEDY, "system": "You are a helpful assistant."} | changes
    return Request(text=text, **given)


@pytest.fixture
def loads(monkeypatch):
    """Weak references to every model that the pipeline loads, in order."""
    made = []
    real = loader.load

    def load(*arguments):
        handle = real(*arguments)
        made.append(weakref.ref(handle.model))
        return handle

    monkeypatch.setattr(loader, "load", load)
    return made


RED_CIRCLE = {"image1": image(draw("circle", "red", "blue"))}


def test_the_answer_says_what_is_on_the_picture(models):
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"
    other = {"image1": image(draw("square", "green", "white"))}
    assert run(request(images=other), models, Watch()).text == "a green square on a white background"


def test_red_is_not_taken_for_blue(models):
    for color, background in (("red", "blue"), ("blue", "red")):
        images = {"image1": image(draw("square", color, background))}
        assert f"{color} square on a {background}" in run(request(images=images), models, Watch()).text


def test_pictures_of_several_inputs_and_batches_are_described_in_order(models):
    scenes = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
    pictures = [draw(*scene) for scene in scenes]
    expected = "; ".join(
        f"image {i}: a {color} {shape} on a {back} background" for i, (shape, color, back) in enumerate(scenes, 1)
    )
    for images in ({"image1": image(*pictures)}, {"image1": image(*pictures[:2]), "image4": image(pictures[2])}):
        answer = run(request("Describe each image.", images=images), models, Watch()).text
        assert answer == expected.capitalize()


SCENES = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
CAPTIONS = [f"a {color} {shape} on a {background} background" for shape, color, background in SCENES]


def test_each_picture_has_an_answer_of_its_own_in_order(models):
    pictures = [draw(*scene) for scene in SCENES]
    asked = request(images={"image1": image(*pictures[:2]), "image4": image(pictures[2])}, image_mode=IMAGE_MODES[1])
    assert [answer.text for answer in run(asked, models, Watch()).answers] == CAPTIONS


def test_pictures_of_a_folder_are_answered_and_what_cannot_be_read_is_told_and_left_out(models, tmp_path):
    items = []
    for number, scene in enumerate(SCENES):
        draw(*scene).save(tmp_path / f"{number}.png")
        items.append((f"{number}.png", tmp_path / f"{number}.png"))
    (tmp_path / "bad.png").write_text("no picture")
    items.insert(1, ("bad.png", lambda: tmp_path / "bad.png"))
    answers, errors = {}, {}
    caption(request(), iter(items), models, Watch(), done=answers.__setitem__, failed=errors.__setitem__)
    assert {index: answer.text for index, answer in answers.items()} == dict(zip((0, 2, 3), CAPTIONS, strict=True))
    assert list(errors) == [1]
    assert "bad.png" in str(errors[1])


def test_a_video_is_described_in_the_order_of_time(models, tmp_path):
    scenes = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]
    for order in (scenes, scenes[::-1]):
        path = write_video(tmp_path / "v.mp4", order, seconds_each=2)
        answer = run(request("Describe this video.", video_path=str(path)), models, Watch()).text
        assert (answer.index("red circle") < answer.index("blue square")) == (order == scenes)


def test_the_text_grows_token_by_token_and_ends_as_the_answer(models):
    watch = Watch()
    result = run(request(images=RED_CIRCLE), models, watch)
    counts = [count for count, _ in watch.updates]
    assert counts == sorted(counts)
    texts = [text for _, text in watch.updates]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == watch.final == result.text


def test_a_fixed_seed_repeats_the_answer_and_minus_one_draws_a_new_seed(models):
    sampling = Sampling(temperature=2, top_p=1, top_k=0, max_new_tokens=12)
    fixed = [
        run(request("hello", sampling=Sampling(**{**_as_dict(sampling), "seed": 4})), models, Watch()) for _ in "ab"
    ]
    assert fixed[0].text == fixed[1].text
    assert fixed[0].stats.seed == 4
    drawn = [run(request("hello", sampling=sampling), models, Watch()) for _ in range(4)]
    assert len({each.stats.seed for each in drawn}) == 4
    again = Sampling(**{**_as_dict(sampling), "seed": drawn[0].stats.seed})
    assert run(request("hello", sampling=again), models, Watch()).text == drawn[0].text


def _as_dict(sampling):
    return {name: getattr(sampling, name) for name in sampling.__slots__}


def test_the_figures_are_those_of_the_run(models):
    first, second = (run(request(images=RED_CIRCLE), models, Watch()).stats for _ in "ab")
    assert first.load_s > 0 == second.load_s or second.load_s < 0.05
    assert second.new_tokens == len(_tokens(models, "a red circle on a blue background"))
    assert second.prompt_tokens > 36, "six by six picture tokens and the words"
    assert 0 < second.prefill_s <= second.first_token_s < second.total_s
    assert second.decode_tokens_per_s > 0
    assert (second.device, second.quantization, second.attention, second.seed) == ("cpu", "none", "sdpa", None)


def _tokens(models, text):
    tokenizer = models.get(models.source(models.held[0])).tokenizer
    return tokenizer.encode(text, add_special_tokens=False)


def test_three_runs_load_once_even_where_something_fell_back(models, loads):
    for _ in range(3):
        result = run(request("hello", load=LoadSpec(DEMO, attention="flash_attention_2")), models, Watch())
    assert len(loads) == 1
    assert result.stats.attention == "sdpa"
    assert "flash_attention_2" in result.stats.fallbacks[0]


@pytest.mark.parametrize("diagnostics", ["summary", "full"])
@pytest.mark.parametrize("cancel_at", [None, 1, 3])
def test_without_keep_all_memory_is_back_when_the_run_ends(models, loads, cancel_at, diagnostics):
    asked = request(images=RED_CIRCLE, release=RELEASES[-1], diagnostics=diagnostics)
    gc.collect()
    if cancel_at:
        with pytest.raises(KeyboardInterrupt) as cancelled:
            run(asked, models, Watch(cancel_at))
        assert cancelled.value is not None
    else:
        assert run(asked, models, Watch()).text
    assert [each() for each in loads] == [None]


def test_a_run_after_a_cancel_gives_the_right_answer(models, loads):
    with pytest.raises(KeyboardInterrupt):
        run(request(images=RED_CIRCLE), models, Watch(cancel_at=2))
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"
    assert len(loads) == 1


def test_a_bad_picture_is_found_before_a_model_is_loaded(models, loads):
    with pytest.raises(MediaError, match="image1"):
        run(request(images={"image1": torch.zeros(0, 4, 4, 3)}), models, Watch())
    assert loads == []


def test_thinking_is_split_off(models, demo_that_thinks):
    result = run(request(load=LoadSpec(demo_that_thinks), images=RED_CIRCLE), models, Watch())
    assert result.text == "a red circle on a blue background"
    assert "red circle" in result.thinking


def test_a_thought_that_is_cut_off_is_an_error_that_says_what_to_raise(models, demo_that_thinks):
    asked = request(load=LoadSpec(demo_that_thinks), images=RED_CIRCLE, sampling=Sampling(max_new_tokens=3))
    with pytest.raises(NoAnswerError, match=r"still thinking after 3 tokens.*Raise max_new_tokens"):
        run(asked, models, Watch())


@pytest.fixture
def demo_that_thinks(tmp_path, monkeypatch):
    """The demo model with a template that always opens the think block, as those of Thinking models do."""
    folder = shutil.copytree(catalog.find(DEMO).folder, tmp_path / "LLM" / "Thinker")
    template = folder / "chat_template.jinja"
    template.write_text("{%- set enable_thinking = true -%}" + template.read_text())
    return _custom(tmp_path, monkeypatch, "Thinker")


def _custom(tmp_path, monkeypatch, name):
    """Add a model to the list whose folder lies under tmp_path / LLM."""
    file = tmp_path / "custom_models.json"
    file.write_text(json.dumps({"hf_models": {name: {"repo_id": f"someone/{name}"}}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", file)
    monkeypatch.setattr(host, "model_roots", lambda: [tmp_path / "LLM"])
    return name


def test_a_damaged_demo_model_is_an_error_and_no_download(models, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PACK", tmp_path)
    with pytest.raises(LoadError, match=r"Demo-Shapes.*config\.json is missing"):
        run(request(), models, Watch())


def out_of_memory(*_, **__):
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_once_while_answering_is_mended_by_making_room(models, monkeypatch):
    left = [1]
    real = Decoder.generate
    dropped = []

    def generate(self, *arguments):
        if left:
            left.pop()
            dropped.append(weakref.ref(self._lanes.kv) if self._lanes._kv else None)
            out_of_memory()
        return real(self, *arguments)

    run(request(images=RED_CIRCLE), models, Watch())
    monkeypatch.setattr(Decoder, "generate", generate)
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"
    assert dropped[0]() is None, "the buffer was given back before the second try"


@pytest.mark.parametrize("keep", RELEASES[::2])
def test_running_out_twice_is_the_error_and_the_next_run_works(models, loads, monkeypatch, keep):
    tried = []
    with (
        monkeypatch.context() as patched,
        pytest.raises(OutOfMemoryError, match=r"to answer with Demo.*are free") as caught,
    ):
        patched.setattr(Decoder, "generate", lambda *_: (tried.append(1), out_of_memory()))
        run(request(images=RED_CIRCLE, release=keep), models, Watch())
    assert caught.value is not None
    assert len(tried) == 2
    assert [each() is None for each in loads] == [keep == RELEASES[-1]]
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"


def test_running_out_while_loading_frees_what_was_read_and_names_what_would_fit(models, monkeypatch):
    half = []

    def plan_then_fail(model):
        half.append(weakref.ref(model))
        out_of_memory()

    with (
        monkeypatch.context() as patched,
        pytest.raises(OutOfMemoryError, match=r"to load with Demo.*GB are free") as caught,
    ):
        patched.setattr(loader, "patch_embedding_as_matmul", plan_then_fail)
        run(request(images=RED_CIRCLE), models, Watch())
    assert caught.value is not None
    assert [each() for each in half] == [None]
    assert models.held == []
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"
