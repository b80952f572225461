import gc
import weakref
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from pictures import draw, image, write_video
from PIL import Image
from video_input import VideoInput

from qwenvl.decoding.lanes import OwnStepLanes
from qwenvl.faults import OUT_OF_MEMORY
from qwenvl.loading.cache import ModelCache
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.media import content
from qwenvl.media.content import fingerprint
from qwenvl.media.films import Video
from qwenvl.media.media import MediaError, shown_pictures, shown_videos
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.prompting.processed import LaterPixels, Shown, tokenize
from qwenvl.prompting.prompt import encode, side_by_side
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import IMAGE_MODES

GREEDY = Sampling(do_sample=False, max_new_tokens=40)
FIRST, SECOND = "Describe this image.", "Describe this image in a few words, please."
CIRCLE, SQUARE = image(draw("circle", "red", "blue")), image(draw("square", "green", "white", (240, 160)))
SYSTEM = "You are a helpful assistant."


class InMemory(VideoInput):
    def get_components(self):
        return SimpleNamespace(images=torch.cat([CIRCLE, 1 - CIRCLE] * 4), frame_rate=Fraction(2), audio=None)


SHOWN = {
    "a picture": {"images": {"image1": CIRCLE}},
    "pictures": {"images": {"image1": CIRCLE, "image2": SQUARE}},
    "a batch": {"images": {"image1": torch.cat([CIRCLE, 1 - CIRCLE])}},
    "one answer per image": {"images": {"image1": CIRCLE}, "image_mode": IMAGE_MODES[1]},
    "frames": {"video_frames": torch.cat([CIRCLE, 1 - CIRCLE] * 12)},
    "one frame": {"video_frames": CIRCLE},
    "a video in memory": {"video": InMemory()},
    "picture and frames": {"images": {"image1": SQUARE}, "video_frames": torch.cat([CIRCLE, 1 - CIRCLE] * 12)},
}
FORMATS = {
    "float16": CIRCLE.half(),
    "bfloat16": CIRCLE.bfloat16(),
    "float64": CIRCLE.double(),
    "bytes": (CIRCLE * 255).to(torch.uint8),
    "RGBA": torch.cat([CIRCLE, CIRCLE[..., :1]], -1),
    "grey": CIRCLE[..., :1],
    "three dimensions": CIRCLE[0],
    "channels first": CIRCLE.movedim(-1, 1).contiguous().movedim(1, -1),
    "cut out": torch.cat([CIRCLE, CIRCLE], 2)[:, :, 40:232],
    "upside down": CIRCLE.flip(1),
}


@pytest.fixture
def work(demo, monkeypatch):
    """Counts what is really converted and processed."""
    done = Counter()

    def counted(owner, name, what):
        real = getattr(owner, name)

        def call(*given, **how):
            done[what] += 1
            return real(*given, **how)

        monkeypatch.setattr(owner, name, call)

    counted(content, "from_tensor", "converted")
    counted(Image, "fromarray", "made a picture")
    counted(type(demo.processor.image_processor), "preprocess", "processed pictures")
    counted(type(demo.processor.video_processor), "preprocess", "processed videos")
    return done


def asked(text, **shown):
    return Request(LoadSpec(DEMO), text, SYSTEM, sampling=GREEDY, **shown)


def cold(text, **shown):
    """The result of a model that was never asked before."""
    models = ModelCache()
    try:
        return run(asked(text, **shown), models, NoWatch())
    finally:
        models.clear()


def same(found, expected):
    """Tell if the answers and what was seen are the same."""
    assert [each.text for each in found.answers] == [each.text for each in expected.answers]
    assert found.stats.prompt.prompt_tokens == expected.stats.prompt.prompt_tokens
    assert found.stats.prompt.seen_sizes == expected.stats.prompt.seen_sizes
    return True


def ask_twice(models, work, **shown):
    """Return what was done for the first question, and assert that the second does nothing and is answered the same."""
    expected = cold(SECOND, **shown)
    work.clear()
    run(asked(FIRST, **shown), models, NoWatch())
    first = Counter(work)
    work.clear()
    second = run(asked(SECOND, **shown), models, NoWatch())
    assert work == Counter()
    assert second.stats.prompt.reused_tokens > 16
    assert same(second, expected)
    return first


@pytest.mark.parametrize("what", SHOWN)
def test_a_second_question_converts_and_processes_nothing_and_is_answered_the_same(models, work, what):
    first = ask_twice(models, work, **SHOWN[what])
    shown = shown_videos(asked("", **SHOWN[what]))
    assert bool(first["processed pictures"]) == ("images" in SHOWN[what])
    assert bool(first["processed videos"]) == bool(shown)
    assert first["converted"] >= 1


@pytest.mark.parametrize("kind", FORMATS)
def test_of_pictures_of_any_format(models, work, kind):
    assert ask_twice(models, work, images={"image1": FORMATS[kind]})["converted"] == 1


def test_of_pictures_that_are_read_from_files(models, work, tmp_path):
    draw("circle", "red", "blue").save(tmp_path / "a.png")
    ask_twice(models, work, images={"image1": str(tmp_path / "a.png")})
    ask_twice(models, work, images={"image1": draw("square", "red", "blue")})


def test_of_a_film_that_is_read_from_a_file(models, work, tmp_path):
    path = str(write_video(tmp_path / "v.mp4", [draw("circle", "red", "blue"), draw("square", "red", "blue")]))
    assert ask_twice(models, work, video_path=path)["processed videos"] == 1


def test_a_third_question_too_and_the_first_one_again(models, work):
    ask_twice(models, work, **SHOWN["a picture"])
    third = run(asked(FIRST, **SHOWN["a picture"]), models, NoWatch())
    assert work == Counter()
    assert same(third, cold(FIRST, **SHOWN["a picture"]))


def test_one_changed_value_is_another_picture(models, work):
    """Changed in place, as other nodes do: the tensor is the same object."""
    picture = CIRCLE.clone()
    shown = {"images": {"image1": picture}}
    run(asked(FIRST, **shown), models, NoWatch())
    picture[0, 191, 191, 2] = 0.5
    work.clear()
    second = run(asked(SECOND, **shown), models, NoWatch())
    assert work == Counter({"converted": 1, "made a picture": 1, "processed pictures": 1})
    assert second.stats.prompt.reused_tokens == 0
    assert same(second, cold(SECOND, **shown))


def test_one_changed_value_is_another_film(models, work):
    frames = torch.cat([CIRCLE] * 48)
    run(asked(FIRST, video_frames=frames), models, NoWatch())
    frames[0, 191, 191, 2] = 0.5
    work.clear()
    second = run(asked(SECOND, video_frames=frames), models, NoWatch())
    assert work["processed videos"] == 1
    assert second.stats.prompt.reused_tokens == 0
    assert same(second, cold(SECOND, video_frames=frames))


@pytest.mark.parametrize(
    "changed",
    [
        {"images": {"image1": CIRCLE, "image2": CIRCLE}},
        {"images": {"image1": CIRCLE}, "video_frames": CIRCLE},
        {"images": {"image1": CIRCLE}, "image_resolution": "low (256x28x28)"},
    ],
    ids=["more pictures", "a film beside it", "another size"],
)
def test_another_way_of_showing_it_is_processed(models, work, changed):
    run(asked(FIRST, **SHOWN["a picture"]), models, NoWatch())
    work.clear()
    second = run(asked(SECOND, **changed), models, NoWatch())
    assert work["processed pictures"] == 1
    assert same(second, cold(SECOND, **changed))


def forget_buffers(models):
    models.get(models.source(LoadSpec(DEMO))).decoder.drop_buffers()


def ask_many(models):
    run(asked(FIRST, images={"image1": torch.cat([CIRCLE] * 2)}, image_mode=IMAGE_MODES[1]), models, NoWatch())


def ask_about_another(models):
    run(asked(FIRST, images={"image1": SQUARE}), models, NoWatch())


FORGETS = {
    "the model was unloaded": lambda models: models.clear(),
    "its memory was needed": forget_buffers,
    "many were asked at a time": ask_many,
    "another picture was asked about": ask_about_another,
}


@pytest.mark.parametrize("what", ["a picture", "picture and frames"])
@pytest.mark.parametrize("why", FORGETS)
def test_what_is_no_longer_there_is_processed_again(models, work, why, what):
    shown = SHOWN[what]
    expected = cold(SECOND, **shown)
    run(asked(FIRST, **shown), models, NoWatch())
    FORGETS[why](models)
    work.clear()
    second = run(asked(SECOND, **shown), models, NoWatch())
    assert second.stats.prompt.reused_tokens == 0
    assert work["processed pictures"] == 1
    assert work["processed videos"] == ("video_frames" in shown)
    assert same(second, expected)


def test_a_text_before_the_picture_that_changed_is_read_with_the_picture(models, work):
    """Its keys and values are still there, but none of them fits behind another text."""
    shown = SHOWN["a picture"]
    run(asked(FIRST, **shown), models, NoWatch())
    work.clear()
    another = Request(LoadSpec(DEMO), FIRST, "Answer in uppercase.", sampling=GREEDY, **shown)
    second = run(another, models, NoWatch())
    assert second.stats.prompt.reused_tokens == 0
    assert work["processed pictures"] == 1
    assert second.text == second.text.upper()


def test_memory_that_runs_out_in_the_second_answer_costs_the_processing_only(models, work, monkeypatch):
    shown = SHOWN["picture and frames"]
    expected = cold(SECOND, **shown)
    run(asked(FIRST, **shown), models, NoWatch())
    real, tries = OwnStepLanes.prefill, []

    def prefill(self, *given):
        tries.append(1)
        if len(tries) == 1:
            raise OUT_OF_MEMORY("out of memory")
        return real(self, *given)

    monkeypatch.setattr(OwnStepLanes, "prefill", prefill)
    work.clear()
    second = run(asked(SECOND, **shown), models, NoWatch())
    assert len(tries) == 2
    assert (work["processed pictures"], work["processed videos"]) == (1, 1)
    assert same(second, expected)


def test_a_thought_that_was_cut_is_continued_without_the_pixels(models, work):
    shown = SHOWN["a picture"]
    thinking = Request(
        LoadSpec(DEMO), FIRST, SYSTEM, sampling=Sampling(do_sample=False, thinking_budget=2), thinking="on", **shown
    )
    first = run(thinking, models, NoWatch())
    work.clear()
    second = run(thinking, models, NoWatch())
    assert second.stats.decode.thoughts_cut == 1
    assert work == Counter()
    assert (second.text, second.thinking) == (first.text, first.thinking)


def test_a_picture_that_holds_nan_is_refused_by_a_model_that_waits_and_the_next_question_is_answered(models, work):
    shown = SHOWN["a picture"]
    run(asked(FIRST, **shown), models, NoWatch())
    for name, broken in (("image1", {"images": {"image1": CIRCLE * float("nan")}}), ("video_frames", None)):
        broken = broken or {"video_frames": torch.cat([CIRCLE] * 8) * float("nan")}
        with pytest.raises(MediaError, match=f"{name} holds NaN"):
            run(asked(SECOND, **broken), models, NoWatch())
    assert same(run(asked(SECOND, **shown), models, NoWatch()), cold(SECOND, **shown))


def test_every_picture_is_looked_at_before_a_model_is_loaded(models, monkeypatch):
    monkeypatch.setattr(ModelCache, "get", lambda *_: pytest.fail("a model was loaded"))
    pictures = torch.cat([CIRCLE, CIRCLE, CIRCLE * float("nan")])
    for mode in IMAGE_MODES:
        with pytest.raises(MediaError, match="image1 holds NaN"):
            run(asked(FIRST, images={"image1": pictures}, image_mode=mode), models, NoWatch())


FRAMES = torch.rand(7, 64, 96, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=tiny.families(*tiny.SEEING))
def seeing(request, tmp_path_factory):
    folder = tiny.save(request.param, tmp_path_factory.mktemp("m") / "m")
    handle = load(LoadSpec(request.param), folder, Machine("cpu", torch.float32, ""))
    handle.decoder = tiny.decoder(handle.model)
    return handle


def shown_to(handle):
    given = Request(handle.spec, "?", video_frames=FRAMES)
    film = Video(np.zeros((1, 64, 64, 3), np.uint8), (0.5,), 1.0)
    pictures = shown_pictures({"image1": CIRCLE, "image2": SQUARE})
    return pictures, [*shown_videos(given), film]


def test_the_tokens_of_every_family_are_the_same_without_the_pixels(seeing):
    pictures, films = shown_to(seeing)
    shown = Shown(pictures, films, "auto")
    text = "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "image", "video", "video"))
    whole, rest = tokenize(seeing, text, shown)
    for _ in range(2):
        without, again = tokenize(seeing, text, shown, rest)
        assert set(whole) - set(without) == {"pixel_values", "pixel_values_videos"}
        assert all(torch.equal(torch.as_tensor(whole[name]), torch.as_tensor(without[name])) for name in without)
        assert rest.keys() == again.keys()
    longer, _ = tokenize(seeing, text + " and more", shown, rest)
    expected, _ = tokenize(seeing, text + " and more", shown)
    assert torch.equal(longer["input_ids"], expected["input_ids"])


def twice(handle, text="What is it?"):
    """Encode a question about the same pictures twice."""
    given = Request(handle.spec, text)
    return [encode(handle, given, *shown_to(handle)) for _ in "ab"]


def test_inputs_are_complete_for_whoever_reads_them(seeing):
    """For other tiers, which do not know what was there before, and for a model whose buffer was given back."""
    first, second = twice(seeing)
    assert isinstance(second.inputs, LaterPixels) == (seeing.decoder.tier == OwnStepLanes.name)
    for one, two in ((first, second), (first.continued([5, 6]), second.continued([5, 6]))):
        assert one.tokens == two.tokens
        read = dict(**two.inputs)
        assert set(read) == set(one.inputs) == set(two.inputs)
        assert len(two.inputs) == len(read)
        assert all(
            torch.equal(torch.as_tensor(read[name]), torch.as_tensor(value)) for name, value in one.inputs.items()
        )
    assert "pixel_values" in second.inputs
    assert "nothing" not in second.inputs
    assert second.inputs.get("nothing") is None
    assert tiny.by_transformers(seeing.model, second.inputs, 4) == tiny.by_transformers(seeing.model, first.inputs, 4)


def test_pixels_are_made_in_the_models_precision_and_joined_to_others(seeing):
    first, second = twice(seeing)
    for prompts in ([second], [second, first]):
        joined = side_by_side(prompts, torch.float16)
        assert joined["pixel_values"].dtype == joined["pixel_values_videos"].dtype == torch.float16
        assert joined["pixel_values"].shape[0] == len(prompts) * first.inputs["pixel_values"].shape[0]
    assert torch.equal(side_by_side([second], torch.float32)["pixel_values"], first.inputs["pixel_values"])


def test_pixels_that_wait_hold_no_model(tmp_path):
    handle = load(LoadSpec("m"), tiny.save("qwen3_vl", tmp_path / "m"), Machine("cpu", torch.float32, ""))
    handle.decoder = tiny.decoder(handle.model)
    prompt = twice(handle)[1]
    assert isinstance(prompt.inputs, LaterPixels)
    model = weakref.ref(handle.model)
    del handle
    gc.collect()
    assert model() is None
    assert prompt.inputs["pixel_values"].ndim == 2


def test_a_model_that_recognises_nothing_hashes_nothing(seeing, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "qwenvl.prompting.processed.fingerprint", lambda *given: hashed.append(1) or fingerprint(*given)
    )
    first, second = twice(seeing)
    own = seeing.decoder.tier == OwnStepLanes.name
    assert bool(hashed) == own
    assert (first.media == second.media) == own
    encode(seeing, Request(seeing.spec, "?"), *shown_to(seeing), alone=False)
    assert len(hashed) == 2 * own
