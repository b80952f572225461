"""A text that an engine's max_tokens cut off is an answer or half a thought, whatever the model is called."""

import json

import pytest
import torch
from fault_proxy import fault_proxy, piece, status, stream

from qwenvl.loading.cache import ModelCache
from qwenvl.models import catalog
from qwenvl.pipeline import run
from qwenvl.process import PROCESS
from qwenvl.prompting.answer import NoAnswerError
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import IMAGE_MODES

CUT = stream(piece("Okay, the user wants"), piece(" a caption."), piece(end="length"))
AT_ONCE = stream(piece("yes"), piece(end="stop"))
names = pytest.mark.parametrize("name", ["Qwen/Qwen3.6-27B", "Qwen/Qwen3-VL-8B-Thinking", "Qwen/Qwen3-VL-8B-Instruct"])


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine that says what a test gives it to say. Called, it is asked; `proxy` has what it was sent."""
    PROCESS.opens_thought.clear()
    with fault_proxy(("127.0.0.1", 1)) as proxy:

        def ask(*faults, name="Qwen/Some", **changes):
            file = tmp_path / "custom_models.json"
            file.write_text(json.dumps({"engines": {"canned": {"base_url": proxy.base_url, "model": name}}}))
            monkeypatch.setattr(catalog, "CUSTOM_MODELS", file)
            proxy.faults = list(faults)
            # As if found out before: what it ignores is no matter here.
            monkeypatch.setitem(PROCESS.engine_kinds, (proxy.base_url, name), "vLLM")
            return run(Request(LoadSpec("canned @ engine"), "Well?", **changes), ModelCache(), NoWatch())

        ask.proxy = proxy
        yield ask


@names
@pytest.mark.parametrize(
    "told",
    [AT_ONCE, stream(piece("<think>hm"), piece(end="length")), stream(piece(reasoning="hm"), piece(end="length"))],
    ids=["answers at once", "opens the block itself", "tells thoughts apart"],
)
def test_of_a_model_that_opens_no_block_unseen_it_is_the_answer(engine, name, told):
    result = engine(CUT, told, name=name)
    assert (result.text, result.thinking) == ("Okay, the user wants a caption.", "")


@names
@pytest.mark.parametrize(
    "told",
    [stream(piece("The word is yes.</think>yes"), piece(end="stop")), CUT, status(400, {"error": {"message": "no"}})],
    ids=["closes a block", "thinks on", "does not say"],
)
def test_of_a_model_that_thinks_and_where_there_is_no_telling_it_is_no_answer(engine, name, told):
    with pytest.raises(NoAnswerError, match="still thinking"):
        engine(CUT, told, name=name)


def test_the_question_is_short_and_asked_as_the_one_that_was_cut_off(engine):
    drawn = Sampling(temperature=1.5, stop=("END",), min_new_tokens=20, thinking_budget=9, max_new_tokens=1000)
    engine(CUT, AT_ONCE, system="Be thorough.", sampling=drawn)
    first, second = (seen.body for seen in engine.proxy.seen)
    assert second["messages"] == [{"role": "user", "content": "Answer with one word: yes."}]
    assert (second["max_tokens"], second["temperature"]) == (64, 0)
    assert {*first} - {*second} == {"stop", "min_tokens", "thinking_token_budget", "thinking_budget_tokens"}


def test_it_is_asked_once_and_for_every_run(engine):
    for _ in range(2):
        assert engine(CUT, AT_ONCE).text
    assert len(engine.proxy.seen) == 3


def test_many_that_are_cut_off_at_a_time_ask_once(engine):
    async def either(proxy, seen, content, writer):
        """Only the questions about pictures have parts."""
        cut = isinstance(seen.body["messages"][-1]["content"], list)
        await (CUT if cut else AT_ONCE)(proxy, seen, content, writer)

    batch = {"image1": torch.zeros(4, 64, 64, 3)}
    result = engine(*[either] * 9, images=batch, image_mode=IMAGE_MODES[1])
    assert [answer.text for answer in result.answers] == ["Okay, the user wants a caption."] * 4
    assert len(engine.proxy.seen) == 5


@pytest.mark.parametrize(
    ("thinking", "fault"),
    [("off", AT_ONCE), ("auto", AT_ONCE), ("auto", stream(piece("hm</think>yes"), piece(end="stop")))],
    ids=["told not to think", "ended by itself", "marked"],
)
def test_nothing_is_asked_where_it_does_not_matter(engine, thinking, fault):
    assert engine(fault, thinking=thinking).text
    assert len(engine.proxy.seen) == 1


def test_a_model_that_was_told_to_think_is_not_asked_whether_it_does(engine):
    with pytest.raises(NoAnswerError):
        engine(CUT, thinking="on")
    assert len(engine.proxy.seen) == 1


def test_a_block_that_was_closed_once_is_open_from_then_on(engine):
    """So the next thought is shown as one while it comes."""
    assert engine(stream(piece("hm</think>yes"), piece(end="stop"))).thinking == "hm"
    with pytest.raises(NoAnswerError):
        engine(CUT)
    assert len(engine.proxy.seen) == 2


def test_a_model_that_thinks_though_it_was_told_not_to_gives_no_thought_for_an_answer(engine):
    """Thinking models have no switch for it, and some engines pass over the field."""
    with pytest.raises(NoAnswerError, match="still thinking"):
        engine(CUT, stream(piece("One word.</think>yes"), piece(end="stop")), thinking="off")
    assert engine.proxy.seen[-1].body["chat_template_kwargs"] == {"enable_thinking": False}
    result = engine(stream(piece("hm</think>yes"), piece(end="stop")), thinking="off")
    assert (result.text, result.thinking) == ("yes", "hm")
    assert len(engine.proxy.seen) == 3


def test_a_mark_in_the_answer_of_a_model_that_was_told_not_to_think_is_asked_about(engine):
    whole = stream(piece("hm</think>yes"), piece(end="stop"))
    result = engine(whole, stream(piece("One word.</think>yes"), piece(end="stop")), thinking="off")
    assert (result.text, result.thinking) == ("yes", "hm")
    PROCESS.opens_thought.clear()
    refused = status(400, {"error": {"message": "no"}})
    assert engine(whole, refused, thinking="off").text == "hm</think>yes", "nothing of it is lost without a reason"


def test_of_a_model_that_heeds_it_a_mark_is_a_word_and_what_was_cut_off_the_answer(engine):
    assert engine(CUT, AT_ONCE, thinking="off").text == "Okay, the user wants a caption."
    assert engine(stream(piece("a </think> b"), piece(end="stop")), thinking="off").text == "a </think> b"
    assert len(engine.proxy.seen) == 3


def test_what_is_found_out_for_one_setting_says_nothing_of_the_other(engine):
    """With auto it thinks, with off it does not."""
    with pytest.raises(NoAnswerError):
        engine(CUT, CUT)
    assert engine(CUT, AT_ONCE, thinking="off").text
    assert len(engine.proxy.seen) == 4


@pytest.mark.parametrize("end", ["length", "max_tokens", "stop"])
def test_a_thought_was_cut_off_where_the_tokens_ran_out_whatever_the_engine_calls_that(engine, end):
    used = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 16}}
    cut = stream(piece("Okay, the user"), piece(end=end), used)
    with pytest.raises(NoAnswerError, match="still thinking"):
        engine(cut, CUT, sampling=Sampling(max_new_tokens=16))


def test_a_thought_that_the_engine_ended_itself_may_end_within_the_text(engine):
    told = stream(piece(reasoning="hm"), piece(".\n</think>\n\nyes"), piece(end="stop"))
    result = engine(told)
    assert (result.text, result.thinking) == ("yes", "hm.")


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_tokens_that_ran_out_before_a_word_was_sent_are_an_error(engine, text, thinking):
    with pytest.raises(NoAnswerError, match="the engine sent no text"):
        engine(stream(piece(text), piece(end="length")), thinking=thinking)


def test_an_answer_that_is_empty_by_itself_is_one(engine):
    assert engine(stream(piece(""), piece(end="stop"))).text == ""
    stopped = stream(piece("END and more"), piece(end="length"))
    assert engine(stopped, AT_ONCE, sampling=Sampling(stop=("END",))).text == ""
