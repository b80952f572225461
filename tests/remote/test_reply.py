import asyncio
import json

import pytest
from fault_proxy import piece

from qwenvl.remote.reply import LONGEST_LINE, Reply, event_of, stream_data


def heard(*blocks):
    async def arriving():
        for block in blocks:
            yield block

    async def work():
        return [data async for data in stream_data(arriving())]

    return asyncio.run(work())


def grown(*events):
    reply = Reply(0.0)
    more = [reply.take(event_of(json.dumps(event))) for event in events]
    return reply, more


def test_a_stream_may_come_in_any_pieces_and_with_any_line_ends():
    whole = ': ping\r\n\r\nid: 1\r\nevent: chunk\r\ndata:{"größe": 1}\r\n\r\ndata: [DONE]\n\n'.encode()
    for size in (1, 7, len(whole)):
        blocks = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert heard(*blocks) == ['{"größe": 1}', "[DONE]"]


def test_a_last_line_that_was_cut_is_not_taken_for_one():
    assert heard(b'data: {"a": 1}\ndata: {"b"') == ['{"a": 1}']


def test_a_line_without_end_is_not_kept_for_ever():
    assert heard(b"data: 1\n", *[b"x" * LONGEST_LINE] * 3, b"\ndata: 2\n") == ["1"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_is_told_from_the_answer(name):
    reply, more = grown(piece(**{name: "h"}), piece(None, **{name: "m"}), piece("yes"), piece(end="stop"))
    assert (reply.text, reply.thinking, reply.pieces, reply.ended) == ("yes", "hm", 3, "stop")
    assert more == [True, True, True, False]


def test_what_holds_no_text_is_no_piece():
    reply, _ = grown(piece(role="assistant"), piece(""), {"choices": [{"delta": None}]}, {"choices": []})
    assert (reply.pieces, reply.first_s, reply.ended) == (0, 0.0, "")


def test_the_engines_numbers_are_those_it_sent_last_and_0_where_it_sends_none():
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    reply, _ = grown(piece("a", end="stop"), {"choices": [], "usage": {}}, {"choices": [], "usage": usage})
    assert (reply.count("prompt_tokens"), reply.count("completion_tokens"), reply.cached) == (5, 2, 4)
    for odd in ({}, {"prompt_tokens": None, "prompt_tokens_details": None}, {"prompt_tokens": "5"}):
        reply, _ = grown({"choices": [], "usage": odd})
        assert (reply.count("prompt_tokens"), reply.cached) == (0, 0)


@pytest.mark.parametrize(
    "closing",
    [
        {"choices": None, "usage": {"completion_tokens": 3}},
        {"usage": {"completion_tokens": 3}},
        {"object": "chat.completion.chunk", "usage": {"completion_tokens": 3}},
        {"choices": [], "usage": {"completion_tokens": 3}},
    ],
)
def test_a_closing_event_without_choices_holds_the_numbers(closing):
    reply, more = grown(piece("yes", end="stop"), closing)
    assert (reply.text, reply.count("completion_tokens"), more) == ("yes", 3, [True, False])


@pytest.mark.parametrize("event", [{"choices": None}, {"object": "chat.completion.chunk"}])
def test_an_event_that_holds_nothing_is_passed_over(event):
    assert grown(event, piece("yes"))[0].text == "yes"


@pytest.mark.parametrize("end", ["length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "model_length"])
def test_engines_have_many_words_for_a_limit(end):
    assert grown(piece("Half", end=end))[0].ended == "length"


@pytest.mark.parametrize(
    ("said", "made", "most", "ended"),
    [("stop", 16, 16, "length"), ("", 17, 16, "length"), ("stop", 15, 16, "stop"), ("", 0, 16, "stop"),
     ("stop", 16, 0, "stop"), ("tool_calls", 16, 16, "tool_calls")],
)  # fmt: skip
def test_an_engine_that_made_all_the_tokens_it_may_was_cut_off_whatever_it_says(said, made, most, ended):
    reply, _ = grown(piece("Half", end=said or None), {"choices": [], "usage": {"completion_tokens": made}})
    reply.end(most)
    assert reply.ended == ended


@pytest.mark.parametrize("end", ["abort", "content_filter"])
def test_an_answer_that_the_engine_gave_up_is_broken(end):
    assert grown(piece("Half", end=end))[0].broken
    assert not grown(piece("Whole", end="length"))[0].broken


@pytest.mark.parametrize(
    "odd",
    [
        "text",
        [1],
        "error",
        {"no": "choices"},
        {"choices": {}},
        {"choices": [3]},
        {"choices": [{"delta": "text"}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {}, "finish_reason": 1}]},
    ],
)
def test_what_is_no_piece_of_an_answer_is_recognised(odd):
    assert event_of(json.dumps(odd)) is None


def test_what_is_no_json_is_recognised_and_an_error_kept():
    assert event_of("{") is None
    assert event_of('{"error": "full"}') == {"error": "full"}


def test_what_is_nested_deeper_than_anybody_follows_is_no_event():
    assert event_of("[" * 5000) is None
    assert event_of('{"a":' * 5000) is None


def test_a_count_below_nothing_is_none():
    reply, _ = grown({"choices": [], "usage": {"prompt_tokens": -5}})
    assert reply.count("prompt_tokens") == 0
