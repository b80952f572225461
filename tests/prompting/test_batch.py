import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from asking import ask
from pictures import draw
from PIL import Image
from released import PicturesMade
from transformers.cache_utils import StaticLayer

from qwenvl.decoding.decoder import Decoder
from qwenvl.loading.budget import OutOfMemoryError
from qwenvl.media.media import MediaError
from qwenvl.pipeline import caption
from qwenvl.prompting.answer import NoAnswerError
from qwenvl.prompting.batch import READERS, BatchLimit, later_seed, read_ahead, shown_bytes
from qwenvl.prompting.prompt import Prompt, encode
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import Answer, Request, Sampling
from qwenvl.settings import MAX_SEED

GREEDY = Sampling(do_sample=False, max_new_tokens=40)
COLORS = ("red", "green", "yellow", "blue", "purple", "pink")
SCENES = [
    (shape, color, background)
    for shape in ("circle", "square", "triangle")
    for color in COLORS
    for background in ("white", "black")
]
CAPTIONS = [f"a {color} {shape} on a {background} background" for shape, color, background in SCENES]
TIERS = ("own step", "generic step", "generate")


def tiers():
    """Those that this version of transformers has."""
    generic = hasattr(StaticLayer(8), "cumulative_length")
    return [tier for tier in TIERS if generic or tier != "generic step"]


def questions(demo, count=None, thinking="auto"):
    """Pictures of two sizes, so that the prompts are of two lengths."""
    asked = Request(demo.spec, "Describe this image.", "You are a helpful assistant.", thinking=thinking)
    sizes = cycle([(192, 192), (128, 160)])
    pictures = [draw(*scene, size) for scene, size in zip(SCENES[:count], sizes, strict=False)]
    return [encode(demo, asked, [picture]) for picture in pictures]


@pytest.fixture
def answer(demo, monkeypatch):
    """Answers prompts in batches; returns what came of each in order, and the statistics."""

    def run(prompts, sampling=GREEDY, most=16, tier=None, **asked):
        monkeypatch.setattr(demo, "decoder", Decoder(demo.model, "sdpa", tier, decode="dense"))
        return ask(demo, prompts, sampling, most, **asked)

    return run


@pytest.mark.parametrize("tier", tiers())
def test_a_batch_says_of_each_picture_what_one_by_one_says(demo, answer, tier):
    prompts = questions(demo)
    assert len({prompt.tokens for prompt in prompts}) == 2
    batched, stats = answer(prompts, tier=tier)
    assert [entry.text for entry in batched] == CAPTIONS
    assert answer(prompts, most=1, tier=tier)[0] == batched
    assert (stats.decode.answers, stats.decode.batch_size, stats.decode.tier) == (len(SCENES), 16, tier)
    assert stats.prompt.prompt_tokens == sum(prompt.tokens for prompt in prompts)


def test_a_row_that_has_ended_says_nothing_more(demo, answer):
    asked = Request(demo.spec, "Count from 1 to 9.", "You are a helpful assistant.")
    prompts = [encode(demo, asked, []), *questions(demo, 3)]
    assert [entry.text for entry in answer(prompts)[0]] == ["1, 2, 3, 4, 5, 6, 7, 8, 9", *CAPTIONS[:3]]


def test_every_token_is_looked_at_and_rows_end_by_themselves(demo, answer):
    ended = []
    answer(questions(demo, 4), look=lambda writers: ended.append(sum(writer.ended for writer in writers)))
    assert ended == sorted(ended)
    assert (ended[0], ended[-1]) == (0, 4)


@pytest.mark.parametrize("tier", tiers())
@pytest.mark.parametrize("many", [1, 3])
def test_a_thought_that_is_cut_short_is_followed_by_the_answer(demo, answer, tier, many):
    prompts = questions(demo, many, thinking="on")
    sampling = Sampling(do_sample=False, max_new_tokens=20, thinking_budget=4)
    answers, stats = answer(prompts, sampling, tier=tier)
    assert answers == [Answer(caption, "I see one image") for caption in CAPTIONS[:many]]
    assert stats.decode.thoughts_cut == many


def test_only_the_thoughts_that_are_too_long_are_cut(demo, answer):
    long_, short = questions(demo, 2, thinking="on")[0], questions(demo, 2, thinking="off")[1]
    answers, stats = answer([long_, short], Sampling(do_sample=False, max_new_tokens=20, thinking_budget=4))
    assert answers == [Answer(CAPTIONS[0], "I see one image"), Answer(CAPTIONS[1])]
    assert stats.decode.thoughts_cut == 1


def test_after_a_cut_the_pictures_are_not_looked_at_again(demo, answer):
    looked = []
    hook = demo.model.model.visual.register_forward_pre_hook(lambda *_: looked.append(1))
    try:
        answer(questions(demo, 1, thinking="on"), Sampling(do_sample=False, thinking_budget=4))
    finally:
        hook.remove()
    assert looked == [1]


def test_without_a_budget_a_thought_that_does_not_end_has_no_answer(demo, answer):
    sampling = Sampling(do_sample=False, max_new_tokens=4)
    assert [type(entry) for entry in answer(questions(demo, 2, thinking="on"), sampling)[0]] == [NoAnswerError] * 2


def test_batches_of_a_seeded_run_draw_different_numbers_and_the_run_repeats(demo, answer):
    asked = Request(demo.spec, "Name a random color.", "You are a helpful assistant.")
    prompts = [encode(demo, asked, []) for _ in range(8)]
    drawn = [answer(prompts, Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=5), most=1)[0] for _ in "ab"]
    assert drawn[0] == drawn[1]
    assert len({entry.text for entry in drawn[0]}) > 2
    assert later_seed(MAX_SEED, 2) == 1


def failing(monkeypatch, *sizes):
    """Makes as many generations run out of memory as sizes are given, those of more rows than that; returns the rows
    of all that were tried."""
    tried, left, real = [], list(sizes), Decoder.generate

    def generate(self, inputs, *arguments):
        rows = len(inputs["input_ids"])
        tried.append(rows)
        if left and rows > left[0]:
            left.pop(0)
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, inputs, *arguments)

    monkeypatch.setattr(Decoder, "generate", generate)
    return tried


def test_a_batch_is_halved_until_it_fits_and_no_finished_answer_is_made_again(demo, answer, monkeypatch):
    expected = answer(questions(demo))[0]
    # The second batch of 16 runs out, then its half.
    calls, real = [], Decoder.generate

    def generate(self, inputs, *arguments):
        rows = len(inputs["input_ids"])
        calls.append(rows)
        if len(calls) > 1 and rows > 4:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, inputs, *arguments)

    monkeypatch.setattr(Decoder, "generate", generate)
    assert answer(questions(demo))[0] == expected
    assert calls == [16, 16, 8, 4, 4, 4, 4, 4]


def test_what_was_made_for_a_batch_is_given_back_before_the_next_try(demo, answer, monkeypatch):
    held, real = [], Decoder.generate

    def generate(self, *arguments):
        held.append(self._lanes._kv is not None)
        result = real(self, *arguments)
        if len(held) == 1:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(Decoder, "generate", generate)
    assert [entry.text for entry in answer(questions(demo, 4))[0]] == CAPTIONS[:4]
    assert held == [False, False, True]


def test_one_answer_that_does_not_fit_is_tried_again_once_room_is_made(demo, answer, monkeypatch):
    told = []
    tried = failing(monkeypatch, 0)
    answers, _ = answer(questions(demo, 1), free_memory=lambda: told.append(len(tried)))
    assert answers[0].text == CAPTIONS[0]
    assert (tried, told) == ([1, 1], [1])


def test_each_answer_has_its_second_try(demo, answer, monkeypatch):
    tried, told, real = [], [], Decoder.generate

    def generate(self, *arguments):
        tried.append(1)
        if len(tried) in (1, 2, 4):
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *arguments)

    monkeypatch.setattr(Decoder, "generate", generate)
    answers, _ = answer(questions(demo, 3), free_memory=lambda: told.append(len(tried)))
    assert [one_answer.text for one_answer in answers] == CAPTIONS[:3]
    assert told == [2, 4]


def test_one_answer_that_does_not_fit_twice_is_an_error(demo, answer, monkeypatch):
    failing(monkeypatch, 0, 0)
    with pytest.raises(MemoryError, match="no room for a single answer"):
        answer(questions(demo, 1))


def test_other_errors_are_not_taken_for_memory(demo, answer, monkeypatch):
    monkeypatch.setattr(Decoder, "generate", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        answer(questions(demo, 2))


def test_the_buffer_of_a_batch_is_not_kept(demo, answer):
    answer(questions(demo, 3))
    assert demo.decoder._lanes._kv is None
    answer(questions(demo, 1))
    assert demo.decoder._lanes._kv is not None, "that of a single question is, for the next one"


def prompt(tokens):
    return Prompt({"input_ids": torch.zeros(1, tokens, dtype=torch.long)})


def test_so_many_fit_as_the_longest_prompt_allows():
    asked = []

    def bytes_of(tokens, prompt_tokens):
        asked.append((tokens, prompt_tokens))
        return prompt_tokens

    limit = BatchLimit(1000, bytes_of, 500, 16)
    assert limit.fits([prompt(200)] * 4)
    assert not limit.fits([prompt(100)] * 4 + [prompt(200)])
    assert not limit.fits([prompt(1)] * 17)
    assert limit.fits([prompt(100_000)]), "one is always tried"
    # A buffer of the next power of two, which is copied where it grows.
    assert asked[0] == (1024 * 3 // 2, 200)


def test_what_is_shown_counts_too_and_never_makes_a_batch_of_gigabytes(monkeypatch):
    shown = replace(prompt(1), inputs=prompt(1).inputs | {"pixel_values": torch.zeros(10, 10)})
    assert (shown_bytes(prompt(1)), shown_bytes(shown)) == (0, 400)
    assert BatchLimit(2100, lambda *_: 1, 1, 16).fits([shown] * 2)
    assert not BatchLimit(1900, lambda *_: 1, 1, 16).fits([shown] * 2), "twice, while it is put side by side"
    monkeypatch.setattr("qwenvl.prompting.batch.BATCH_BYTES", 1000)
    much = BatchLimit(1 << 40, lambda *_: 1, 1, 16)
    assert much.fits([shown] * 2)
    assert not much.fits([shown] * 3)
    monkeypatch.setattr("qwenvl.prompting.batch.BATCH_BYTES", 1)
    assert much.fits([shown]), "one is always tried"


def test_pictures_are_read_while_others_are_worked_on_and_come_in_order():
    started, gate = [], threading.Event()

    def read(number):
        started.append(number)
        if number == 3:
            gate.wait(10)
        return Image.new("RGB", (number + 1, 1))

    ahead = read_ahead(((f"{n}", lambda n=n: read(n)) for n in range(8)), depth=3)
    first = next(ahead)
    assert (first.number, first.pictures[0].width) == (0, 1)
    gate.set()
    assert [(entry.number, entry.pictures[0].width) for entry in ahead] == [(n, n + 1) for n in range(1, 8)]
    assert sorted(started) == list(range(8))


def test_no_more_is_read_than_is_needed_soon():
    asked = []

    def items():
        for number in range(100):
            asked.append(number)
            yield str(number), Image.new("RGB", (2, 2))

    ahead = read_ahead(items(), depth=5)
    list(islice(ahead, 3))
    assert len(asked) <= 9
    ahead.close()
    assert len(asked) <= 9


MEGABYTES_4 = (1000, 1000)


def test_large_pictures_wait_to_be_read_until_others_are_taken():
    started, taken = [], []

    def read(number):
        started.append(number)
        assert number < len(taken) + 3 + 2 * READERS, "three are more than 10 MB"
        return Image.new("RGB", MEGABYTES_4)

    items = ((f"{n}", lambda n=n: read(n)) for n in range(40))
    with closing(read_ahead(items, depth=30, most_bytes=10 << 20)) as ahead:
        for question in ahead:
            assert (question.number, question.pictures[0].size) == (len(taken), MEGABYTES_4)
            taken.append(question.number)
            if len(taken) < 4:
                time.sleep(0.3)  # what would be read too early is read meanwhile
    assert taken == sorted(started) == list(range(40))


@pytest.mark.parametrize("most_bytes", [1, 4_000_001])
def test_a_picture_that_is_larger_than_all_that_may_wait_is_read_in_its_turn(most_bytes):
    def broken():
        raise OSError("gone")

    items = [(f"{n}", broken if n % 5 == 2 else lambda: Image.new("RGB", MEGABYTES_4)) for n in range(20)]
    assert [entry.number for entry in read_ahead(items, depth=10, most_bytes=most_bytes)] == list(range(20))


def test_readers_that_wait_for_room_end_with_the_run():
    read = []
    items = [(f"{n}", lambda n=n: read.append(n) or Image.new("RGB", MEGABYTES_4)) for n in range(40)]
    ahead = read_ahead(items, depth=30, most_bytes=1)
    next(ahead)
    ahead.close()
    assert len(read) <= 1 + READERS


def test_pictures_go_once_they_are_encoded(demo, models, monkeypatch):
    """Not with the answers: at that moment those of a whole batch would be in memory."""
    pictures, alive = PicturesMade(monkeypatch), []
    real = Decoder.generate

    def generate(self, *given):
        alive.append(pictures.alive())
        return real(self, *given)

    monkeypatch.setattr(Decoder, "generate", generate)
    answers = {}
    items = [(str(number), draw(*scene)) for number, scene in enumerate(SCENES[:8])]
    asked = Request(demo.spec, "Describe this image.", "You are a helpful assistant.", sampling=GREEDY)
    caption(asked, items, models, NoWatch(), batch_size=8, done=answers.__setitem__)
    assert [answers[number].text for number in range(8)] == CAPTIONS[:8]
    assert len(alive) == 1
    assert len(alive[0]) <= 1, alive


def test_a_prompt_that_holds_no_pictures_is_never_taken_for_another(demo):
    asked, picture = Request(demo.spec, "Describe this image."), draw(*SCENES[0])
    one, two = (encode(demo, asked, [picture], alone=False) for _ in "ab")
    assert one.media == one.media == one.continued([1]).media != two.media
    assert encode(demo, asked, [picture]).media == encode(demo, asked, [picture]).media


def test_what_waits_to_be_read_is_not_read_after_a_cancel(monkeypatch):
    read, gate = [], threading.Event()

    class Executor(ThreadPoolExecutor):
        """Lets those that are being read go on only when the others have been cancelled, or not."""

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            gate.set()
            super().shutdown(wait=wait)

    def picture(number):
        read.append(number)
        if number:
            gate.wait(10)
        return Image.new("RGB", (2, 2))

    monkeypatch.setattr("qwenvl.prompting.batch.ThreadPoolExecutor", Executor)
    ahead = read_ahead(((str(n), lambda n=n: picture(n)) for n in range(40)), depth=20)
    next(ahead)
    ahead.close()
    assert len(read) <= 1 + READERS


def test_what_cannot_be_read_is_told_in_its_place(tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")

    def broken():
        raise OSError("the disk is gone")

    items = [("bad", tmp_path / "bad.png"), ("good", tmp_path / "good.png"), ("gone", broken)]
    bad, good, gone = read_ahead(items, depth=2)
    assert isinstance(bad.result, MediaError)
    assert "bad" in str(bad.result)
    assert (good.number, good.pictures[0].size) == (1, (4, 4))
    assert "disk is gone" in str(gone.result)
