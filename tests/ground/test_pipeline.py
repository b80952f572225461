import gc
import json
import shutil
import time
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pictures import draw, image, write_video
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from qwenvl.comfyui import host
from qwenvl.decoding.decoder import Decoder
from qwenvl.loading import loader
from qwenvl.loading.budget import OutOfMemoryError
from qwenvl.loading.cache import ModelCache, OneAtATime
from qwenvl.loading.loader import LoadError
from qwenvl.media.media import MediaError
from qwenvl.models import catalog
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import caption, run
from qwenvl.prompting.answer import NoAnswerError
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import IMAGE_MODES, RELEASES

EACH = IMAGE_MODES[1]
# To which the demo model's processor scales pictures, at least and at most.
PIXELS = (4096, 65536)
GREEDY = Sampling(do_sample=False, max_new_tokens=80)
READING_S = 0.5


class Watch:
    """Records what it is told; presses cancel at a token."""

    def __init__(self, cancel_at=None):
        self.cancel_at, self.updates, self.final = cancel_at, [], None
        self.thoughts, self.total, self.stages = set(), None, []

    def check(self):
        pass

    def stage(self, state, **facts):
        self.stages.append((state, facts))

    def update(self, new_tokens, text, thinking=""):
        self.updates.append((new_tokens, text))
        self.thoughts.add(thinking)
        if new_tokens == self.cancel_at:
            raise KeyboardInterrupt

    def advance(self, done, total, text):
        self.total = total
        self.update(done, text)

    def end(self, text):
        self.final = text


def request(text="Describe this image.", **changes):
    given = {"load": LoadSpec(DEMO), "sampling": GREEDY, "system": "You are a helpful assistant."} | changes
    return Request(text=text, **given)


@pytest.fixture
def loads(monkeypatch):
    """Weak references to every model that the pipeline loads, in order."""
    results = []
    real = loader.load

    def load(*arguments):
        handle = real(*arguments)
        results.append(weakref.ref(handle.model))
        return handle

    monkeypatch.setattr(loader, "load", load)
    return results


@pytest.fixture(scope="module")
def warm():
    """A cache that keeps the demo model for all tests that ask about answers and not about loading."""
    cache = ModelCache()
    yield cache
    cache.clear()


RED_CIRCLE = {"image1": image(draw("circle", "red", "blue"))}


def test_the_answer_says_what_is_on_the_picture(warm):
    assert run(request(images=RED_CIRCLE), warm, Watch()).text == "a red circle on a blue background"
    other = {"image1": image(draw("square", "green", "white"))}
    assert run(request(images=other), warm, Watch()).text == "a green square on a white background"


def test_what_goes_on_before_the_first_token_is_told(models):
    for first in (True, False):
        watch = Watch()
        run(request(images={**RED_CIRCLE, "image2": RED_CIRCLE["image1"]}), models, watch)
        states = [state for state, _ in watch.stages]
        assert states == (["loading", "reading"] if first else ["reading"]), "it is in memory the second time"
        assert watch.stages[-1][1] == {"pictures": 2, "videos": 0}
        if first:
            assert watch.stages[0][1]["model"] == DEMO
            assert watch.stages[0][1]["size"] > 1_000_000


def test_red_is_not_taken_for_blue(warm):
    for color, background in (("red", "blue"), ("blue", "red")):
        images = {"image1": image(draw("square", color, background))}
        assert f"{color} square on a {background}" in run(request(images=images), warm, Watch()).text


def test_pictures_of_several_inputs_and_batches_are_described_in_order(warm):
    scenes = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
    pictures = [draw(*scene) for scene in scenes]
    expected = "; ".join(
        f"image {i}: a {color} {shape} on a {back} background" for i, (shape, color, back) in enumerate(scenes, 1)
    )
    for images in ({"image1": image(*pictures)}, {"image1": image(*pictures[:2]), "image4": image(pictures[2])}):
        answer = run(request("Describe each image.", images=images), warm, Watch()).text
        assert answer == expected.capitalize()


SCENES = [("circle", "red", "blue"), ("square", "green", "white"), ("triangle", "yellow", "black")]
CAPTIONS = [f"a {color} {shape} on a {background} background" for shape, color, background in SCENES]


def test_each_picture_has_an_answer_of_its_own_in_order(warm):
    pictures = [draw(*scene) for scene in SCENES]
    images = {"image1": image(*pictures[:2]), "image4": image(pictures[2])}
    result = run(request(images=images, image_mode=EACH), warm, Watch())
    assert [answer.text for answer in result.answers] == CAPTIONS
    assert (result.stats.decode.answers, result.stats.decode.batch_size) == (3, 3)
    with pytest.raises(ValueError, match="too many values"):
        _ = result.text


def test_the_statistics_say_at_what_size_each_picture_was_seen_and_what_boxes_count(warm):
    """So that whoever draws boxes need not know how a processor scales."""
    images = {"image1": image(draw(*SCENES[0])), "image2": image(draw(*SCENES[1], (200, 120)))}
    together, each = (run(request(images=images, image_mode=mode), warm, Watch()).stats for mode in IMAGE_MODES)
    sizes = [smart_resize(height, width, 32, *PIXELS)[::-1] for width, height in ((192, 192), (200, 120))]
    assert sizes[1] != (200, 120)
    assert together.prompt.seen_sizes == (tuple(sizes),)
    assert each.prompt.seen_sizes == ((sizes[0],), (sizes[1],))
    told = json.loads(each.to_json())
    assert told["seen_sizes"] == [[list(sizes[0])], [list(sizes[1])]]
    assert told["coordinates"] == "0-1000"
    assert run(request("Count from 3 to 5."), warm, Watch()).stats.prompt.seen_sizes == ((),)


def test_without_a_picture_one_answer_per_image_is_one_answer(warm):
    assert run(request("Count from 3 to 5.", image_mode=EACH), warm, Watch()).text == "3, 4, 5"


def test_many_answers_are_counted_while_they_are_made(warm):
    watch = Watch()
    images = {"image1": image(*(draw(*scene) for scene in SCENES))}
    run(request(images=images, image_mode=EACH), warm, watch)
    counts = [count for count, _ in watch.updates]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], watch.total) == (0, 3, 3)
    texts = [text for _, text in watch.updates]
    assert texts[0] == CAPTIONS[0][: len(texts[0])] != ""
    assert texts[-1] in CAPTIONS
    assert watch.final == "\n\n".join(CAPTIONS)


def test_an_answer_whose_thought_was_cut_counts_once(warm):
    watch = Watch()
    images = {"image1": image(*(draw(*scene) for scene in SCENES[::2]))}
    sampling = replace(GREEDY, thinking_budget=4)
    result = run(request(images=images, image_mode=EACH, thinking="on", sampling=sampling), warm, watch)
    assert [answer.text for answer in result.answers] == CAPTIONS[::2]
    counts = [count for count, _ in watch.updates]
    assert counts == sorted(counts)
    assert counts.index(2) > 4


def test_a_video_is_shown_beside_each_picture(warm, tmp_path):
    path = str(write_video(tmp_path / "v.mp4", VIDEO, seconds_each=3))
    images = {"image1": image(*(draw(*scene) for scene in SCENES[:2]))}
    asked = request("Describe the image and the video.", images=images, video_path=path, image_mode=EACH)
    answers = [answer.text for answer in run(asked, warm, Watch()).answers]
    assert answers == [f"Image 1: {entry}; video 1: a red circle, then a blue square" for entry in CAPTIONS[:2]]


@pytest.fixture
def folder(tmp_path):
    """Files of the scenes, with one among them that is no picture."""
    items = []
    for number, scene in enumerate(SCENES):
        draw(*scene).save(tmp_path / f"{number}.png")
        items.append((f"{number}.png", tmp_path / f"{number}.png"))
    (tmp_path / "bad.png").write_text("no picture")
    items.insert(1, ("bad.png", lambda: tmp_path / "bad.png"))
    return items


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_pictures_of_a_folder_are_answered_and_what_cannot_be_read_is_told_and_left_out(warm, folder, batch_size):
    answers, errors = {}, {}
    told = {"done": answers.__setitem__, "failed": errors.__setitem__}
    stats = caption(request(), iter(folder), warm, Watch(), batch_size, **told)
    assert {index: answer.text for index, answer in answers.items()} == dict(zip((0, 2, 3), CAPTIONS, strict=True))
    assert list(errors) == [1]
    assert "bad.png" in str(errors[1])
    assert (stats.decode.answers, stats.decode.batch_size) == (3, batch_size or 3)


def test_answers_are_handed_over_batch_by_batch(warm, folder):
    watch, seen = Watch(), []
    caption(request(), folder, warm, watch, 1, done=lambda index, _: seen.append((index, len(watch.updates))))
    assert [index for index, _ in seen] == [0, 2, 3]
    assert 0 < seen[0][1] < seen[1][1] < seen[2][1] == len(watch.updates)


def test_a_folder_without_a_picture_loads_nothing(models, loads, folder):
    errors = {}
    assert caption(request(), folder[1:2], models, Watch(), failed=errors.__setitem__) is None
    assert (list(errors), loads) == ([0], [])


def test_a_cancelled_folder_keeps_what_was_handed_over_and_frees_the_model(models, loads, folder):
    answers = {}
    watch = Watch()

    def done(index, answer):
        answers[index] = answer.text
        watch.cancel_at = 1  # answers so far

    with pytest.raises(KeyboardInterrupt) as cancelled:
        caption(request(release=RELEASES[-1]), folder, models, watch, 1, done=done)
    assert cancelled.value is not None
    assert answers == {0: CAPTIONS[0]}
    assert [load() for load in loads] == [None]


def test_what_was_not_answered_is_told(warm, folder):
    errors, answers = {}, {}
    sampling = Sampling(do_sample=False, max_new_tokens=5)
    told = {"done": answers.__setitem__, "failed": errors.__setitem__}
    caption(request(thinking="on", sampling=sampling), folder, warm, Watch(), **told)
    kinds = {index: type(error) for index, error in errors.items()}
    assert kinds == {0: NoAnswerError, 1: MediaError, 2: NoAnswerError, 3: NoAnswerError}
    assert answers == {}
    images = {"image1": image(draw(*SCENES[0]))}
    with pytest.raises(NoAnswerError):
        run(request(thinking="on", sampling=sampling, images=images, image_mode=EACH), warm, Watch())


VIDEO = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]


def test_a_video_is_described_in_the_order_of_time(warm, tmp_path):
    scenes = VIDEO
    for order in (scenes, scenes[::-1]):
        path = write_video(tmp_path / "v.mp4", order, seconds_each=2)
        answer = run(request("Describe this video.", video_path=str(path)), warm, Watch()).text
        assert (answer.index("red circle") < answer.index("blue square")) == (order == scenes)


class Stream:
    """ComfyUI's VIDEO, as far as it is used."""

    def __init__(self, source, window=(0.0, 0.0)):
        self._source, self._window = source, window

    def get_stream_source(self):
        return self._source

    def get_active_trim_window(self):
        return self._window


def test_of_a_trimmed_video_only_its_part_is_described(warm, tmp_path):
    path = str(write_video(tmp_path / "v.mp4", VIDEO, seconds_each=3))

    def describe(*window):
        return run(request("Describe this video.", video=Stream(path, window)), warm, Watch()).text

    assert describe(0.0, 0.0) == "a red circle, then a blue square"
    assert "red" not in describe(3.0, 0.0)
    assert "blue square" in describe(3.0, 0.0)
    assert describe(0.0, 2.9) == "a red circle"


def test_frames_are_a_video_and_every_kind_is_seen_in_order(warm, tmp_path):
    path = str(write_video(tmp_path / "v.mp4", VIDEO, seconds_each=3))
    green = draw("triangle", "green", "black", (128, 128))
    frames = image(*[VIDEO[0]] * 48, *[VIDEO[1]] * 48)
    text = run(request("Describe this video.", video_frames=frames), warm, Watch()).text
    assert text == "a red circle, then a blue square"
    everything = {"images": {"image1": image(green)}, "video_frames": image(*[green] * 24), "video_path": path}
    text = run(request("Describe the image and the videos.", **everything), warm, Watch()).text
    places = [text.index(value) for value in ("Image 1: a green", "video 1: a green", "red circle", "blue square")]
    assert places == sorted(places)


@pytest.mark.parametrize("resolution", ["low (256x28x28)", "medium (512x28x28)", "original"])
def test_pictures_can_be_shown_larger_and_the_next_run_is_as_before(warm, resolution):
    images = {"image1": image(draw("square", "green", "white", (640, 480)))}
    asked = request(images=images)
    before = run(asked, warm, Watch())
    large = run(replace(asked, image_resolution=resolution), warm, Watch())
    assert large.text == before.text == "a green square on a white background"
    assert large.stats.prompt.prompt_tokens > 2 * before.stats.prompt.prompt_tokens
    assert run(asked, warm, Watch()).stats.prompt.prompt_tokens == before.stats.prompt.prompt_tokens


def test_the_answer_ends_before_a_stop(warm):
    watch = Watch()
    result = run(request(images=RED_CIRCLE, sampling=replace(GREEDY, stop=("on a", "back"))), warm, watch)
    assert result.text == watch.final == "a red circle"
    assert result.stats.decode.new_tokens < len(_tokens(warm, CAPTIONS[0]))
    assert not any("on" in text for _, text in watch.updates)


def test_thinking_is_switched_and_its_budget_kept(warm):
    plain, thinks = (run(request(images=RED_CIRCLE, thinking=value), warm, Watch()) for value in ("off", "on"))
    assert (plain.thinking, plain.text) == ("", thinks.text)
    assert thinks.thinking == "I see one image. It shows a red circle."
    limited = replace(GREEDY, thinking_budget=4)
    watch = Watch()
    cut = run(request(images=RED_CIRCLE, thinking="on", sampling=limited), warm, watch)
    assert (cut.thinking, cut.text) == ("I see one image", plain.text)
    assert (cut.stats.decode.thoughts_cut, thinks.stats.decode.thoughts_cut) == (1, 0)
    counts = [count for count, _ in watch.updates]
    assert counts == sorted(counts)
    assert "I see one image" in watch.thoughts


def test_the_text_grows_token_by_token_and_ends_as_the_answer(warm):
    watch = Watch()
    result = run(request(images=RED_CIRCLE), warm, watch)
    counts = [count for count, _ in watch.updates]
    assert counts == sorted(counts)
    texts = [text for _, text in watch.updates]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == watch.final == result.text


def test_a_fixed_seed_repeats_the_answer_and_minus_one_draws_a_new_seed(warm):
    sampling = Sampling(temperature=2, top_p=1, top_k=0, max_new_tokens=12)
    fixed = [run(request("hello", sampling=Sampling(**{**_as_dict(sampling), "seed": 4})), warm, Watch()) for _ in "ab"]
    assert fixed[0].text == fixed[1].text
    assert fixed[0].stats.decode.seed == 4
    drawn = [run(request("hello", sampling=sampling), warm, Watch()) for _ in range(4)]
    assert len({entry.stats.decode.seed for entry in drawn}) == 4
    again = Sampling(**{**_as_dict(sampling), "seed": drawn[0].stats.decode.seed})
    assert run(request("hello", sampling=again), warm, Watch()).text == drawn[0].text


def _as_dict(sampling):
    return {name: getattr(sampling, name) for name in sampling.__slots__}


def test_the_figures_are_those_of_the_run(models):
    first, second = (run(request(images=RED_CIRCLE), models, Watch()).stats for _ in "ab")
    assert first.loaded.load_s > 0 == second.loaded.load_s or second.loaded.load_s < 0.05
    assert second.decode.new_tokens == len(_tokens(models, "a red circle on a blue background"))
    assert second.prompt.prompt_tokens > 36, "six by six picture tokens and the words"
    assert 0 < second.prompt.prefill_s <= second.prompt.first_token_s < second.total_s
    assert second.decode.decode_tokens_per_s > 0
    loaded = second.loaded
    assert (loaded.device, loaded.quantization, loaded.attention, second.decode.seed) == ("cpu", "none", "sdpa", None)
    assert (second.decode.answers, second.decode.batch_size, second.decode.tier) == (1, 1, "own step")
    assert second.peak_bytes > 100_000_000, "torch alone needs more"
    assert json.loads(second.to_json())["new_tokens"] == second.decode.new_tokens


class SlowPicture(Image.Image):
    """Takes its time to be read."""

    def convert(self, *arguments):
        time.sleep(READING_S)
        return super().convert(*arguments)


class SlowStream(Stream):
    """The same of a video."""

    def get_stream_source(self):
        time.sleep(READING_S)
        return super().get_stream_source()


def slow_picture(shape, color, background):
    picture = draw(shape, color, background)
    picture.__class__ = SlowPicture
    return picture


def test_the_first_tokens_time_has_the_reading_of_what_is_shown_in_it(models, tmp_path):
    """And the reading is not within the prefill's."""
    stream = SlowStream(str(write_video(tmp_path / "v.mp4", VIDEO)))
    for shown in ({"images": {"image1": slow_picture(*SCENES[0])}}, {"video": stream}):
        stats = run(request(**shown), models, Watch()).stats
        assert stats.prompt.first_token_s >= READING_S + stats.prompt.prefill_s


def test_the_first_tokens_time_has_the_reading_of_the_first_file_in_it(models):
    items = [(str(number), slow_picture(*scene)) for number, scene in enumerate(SCENES)]
    stats = caption(request(), items, models, Watch(), batch_size=1)
    assert stats.prompt.first_token_s >= READING_S


def _tokens(models, text):
    tokenizer = models.get(models.source(models.held[0])).tokenizer
    return tokenizer.encode(text, add_special_tokens=False)


def test_three_runs_load_once_even_where_something_fell_back(models, loads):
    for _ in range(3):
        result = run(request("hello", load=LoadSpec(DEMO, attention="flash_attention_2")), models, Watch())
    assert len(loads) == 1
    assert result.stats.loaded.attention == "sdpa"
    assert "flash_attention_2" in result.stats.loaded.fallbacks[0]


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
    assert [load() for load in loads] == [None]


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


def test_a_model_that_has_no_switch_for_thinking_is_told_of(models, demo_that_thinks):
    result = run(request(load=LoadSpec(demo_that_thinks), images=RED_CIRCLE, thinking="off"), models, Watch())
    assert result.thinking
    assert "thinking 'off' has no effect" in result.stats.loaded.fallbacks[0]


def test_a_thought_that_is_cut_off_is_an_error_that_says_what_to_raise(models, demo_that_thinks):
    asked = request(load=LoadSpec(demo_that_thinks), images=RED_CIRCLE, sampling=Sampling(max_new_tokens=3))
    with pytest.raises(NoAnswerError, match=r"still thinking after 3 tokens.*Raise max_new_tokens"):
        run(asked, models, Watch())


@pytest.fixture
def demo_that_thinks(tmp_path, monkeypatch):
    """The demo model with a template that always opens the think block, as those of Thinking models do."""
    folder = shutil.copytree(catalog.find(DEMO).folder, tmp_path / "LLM" / "Thinker")
    template = folder / "chat_template.jinja"
    template.write_text("{%- set always = true -%}" + template.read_text().replace("enable_thinking", "always"))
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
    assert [load() is None for load in loads] == [keep == RELEASES[-1]]
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
    assert [entry() for entry in half] == [None]
    assert models.held == []
    assert run(request(images=RED_CIRCLE), models, Watch()).text == "a red circle on a blue background"


class Asked(OneAtATime):
    """Remembers for how many bytes room was asked."""

    def bring(self, resident, others, request_bytes):
        self.bytes, self.resident = request_bytes, resident
        super().bring(resident, others, request_bytes)


def test_room_is_asked_for_the_whole_buffer_that_a_short_question_takes():
    """It has the size of a bucket, many times that of the text."""
    memory = Asked()
    run(request("hello"), ModelCache(memory), Watch())
    kv = memory.resident.handle.decoder._lanes.kv
    assert memory.bytes >= sum(value.numel() * value.element_size() for value in (*kv.keys, *kv.values))
