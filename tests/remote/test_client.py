import asyncio
import base64
import gzip
import json
import traceback
from urllib.parse import quote

import pytest
from fault_proxy import STREAM, dropped, endless, fault_proxy, piece, raw, stalled, status, stream, streamed

from qwenvl.models.engines import Engine
from qwenvl.remote import client, incoming
from qwenvl.remote.client import Wire
from qwenvl.remote.refusals import EngineError, QuestionError
from qwenvl.remote.reply import LONGEST_LINE

KEY = "sk-sEcrEt+4/2"
# How it must not be told either.
FORMS = [
    str,
    str.lower,
    lambda key: quote(key, safe=""),
    lambda key: quote(key, safe="").lower(),
    lambda key: "".join(f"%{ord(part):02x}" for part in key),
    lambda key: "".join(f"\\u{ord(part):04x}" for part in key),
    lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2}
FINE = stream(
    piece(role="assistant"), piece("Hel"), piece("lo"), piece(end="stop"), {"choices": [], "usage": USAGE}, "[DONE]"
)
BODY = {"model": "m", "messages": [], "max_tokens": 10, "top_k": 5, "min_p": 0.1}


@pytest.fixture
def proxy():
    with fault_proxy(("127.0.0.1", 1)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.01, 0.01))


def ask(base_url, timeout_s=20.0, key=KEY, pieces=None):
    """The reply to BODY, and the wire."""
    engine = Engine("studio", base_url, "m", api_key_env="STUDIO_KEY", timeout_s=timeout_s)

    async def work():
        line = Wire(engine, key)
        try:
            heard = [] if pieces is None else pieces
            return await line.complete(BODY, {"top_k", "min_p"}, lambda reply: heard.append(reply.text)), line
        finally:
            await line.close()

    return asyncio.run(work())


def failure(base_url, **changes):
    """The error that BODY ends in; the key is in no part of it."""
    with pytest.raises(EngineError) as caught:
        ask(base_url, **changes)
    error = caught.value
    told = "".join(traceback.format_exception(error))
    while error is not None:
        told += repr(error) + repr(vars(error))
        error = error.__cause__ or error.__context__
    for form in FORMS:
        assert form(KEY) not in told
    return caught.value


def test_the_pieces_become_the_answer_and_the_engines_numbers_are_kept(proxy):
    proxy.faults = [FINE]
    heard = []
    reply, _ = ask(proxy.base_url, pieces=heard)
    assert (reply.text, reply.thinking, reply.ended, reply.pieces) == ("Hello", "", "stop", 2)
    assert heard == ["Hel", "Hello"]
    assert reply.usage == USAGE
    assert reply.sent_s <= reply.first_s <= reply.last_s
    (seen,) = proxy.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.body == BODY


def test_without_a_key_no_header_speaks_of_one(proxy):
    proxy.faults = [FINE]
    ask(proxy.base_url, key="")
    assert "authorization" not in proxy.seen[0].headers


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_engine_is_asked_again(proxy, code):
    proxy.faults = [status(code, {"detail": "wait"}), status(code, "busy"), FINE]
    assert ask(proxy.base_url)[0].text == "Hello"
    assert len(proxy.seen) == 3
    assert {str(seen.body) for seen in proxy.seen} == {str(BODY)}


def test_an_engine_that_stays_busy_is_an_error_with_its_words(proxy):
    proxy.faults = [status(503, {"error": {"message": "no worker is free"}})] * 9
    error = failure(proxy.base_url)
    assert isinstance(error, QuestionError)
    assert "no worker is free" in str(error)
    assert len(proxy.seen) == 4


def test_the_engine_says_how_long_to_wait_but_not_longer_than_there_is_patience(proxy, monkeypatch, caplog):
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.3)
    caplog.set_level("INFO")
    proxy.faults = [status(429, "busy", Retry_After="0.2"), status(429, "busy", Retry_After="1"), FINE]
    ask(proxy.base_url)
    assert [record.getMessage()[-6:] for record in caplog.records if "again" in record.getMessage()] == [
        "0.2 s.",
        "0.3 s.",
    ]


@pytest.mark.parametrize("fault", [dropped, raw(b""), raw(STREAM), stream(piece(role="assistant"))])
def test_a_connection_that_is_lost_before_the_answer_begins_is_tried_again(proxy, fault):
    proxy.faults = [fault, fault, FINE]
    assert ask(proxy.base_url)[0].text == "Hello"
    assert len(proxy.seen) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 408, 409, 413, 418, 422, 500, 502])
def test_other_refusals_are_final(proxy, code):
    proxy.faults = [status(code, {"error": {"message": "these are my words"}}), FINE]
    assert "these are my words" in str(failure(proxy.base_url))
    assert len(proxy.seen) == 1


def test_a_stream_that_is_cut_is_an_error_and_its_beginning_no_answer(proxy):
    proxy.faults = [stream(piece("The beginning"), piece(" of it")), FINE]
    error = failure(proxy.base_url)
    assert "broke off" in str(error)
    assert "beginning" not in str(error)
    assert len(proxy.seen) == 1, "what has begun is not begun again"


@pytest.mark.parametrize("end", ["abort", "content_filter"])
def test_an_answer_that_the_engine_gave_up_is_none(proxy, end):
    proxy.faults = [stream(piece("Half"), piece(end=end), "[DONE]")]
    assert end in str(failure(proxy.base_url))


def test_an_engine_that_does_not_stop_at_max_tokens_is_stopped(proxy):
    for endlessly in (piece("and so on "), piece(reasoning="and so on ")):
        proxy.faults = [endless(endlessly)]
        pieces = []
        error = failure(proxy.base_url, pieces=pieces)
        assert "broke off: it has more than 5,120 characters" in str(error)
        assert len(pieces) == 5120 // len("and so on ") + 1
        assert proxy.seen[-1].gone.wait(5)
    assert len(proxy.seen) == 2


def test_an_error_within_a_stream_is_told_in_the_engines_words(proxy):
    for error in ("out of memory", {"message": "out of memory", "code": 500}):
        proxy.faults = [stream(piece("Half"), {"error": error})]
        assert "out of memory" in str(failure(proxy.base_url))


@pytest.mark.parametrize("begun", [b"", STREAM, streamed(piece("The beginning"))])
def test_an_engine_that_stalls_is_given_up_and_the_connection_closed(proxy, begun):
    proxy.faults = [stalled(begun, seconds=3)]
    error = failure(proxy.base_url, timeout_s=0.3)
    assert "0.3 s" in str(error)
    assert "timeout_s" in str(error)
    assert "beginning" not in str(error)
    assert proxy.seen[0].gone.wait(5)
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    "fault",
    [
        status(200, "<html>Welcome to the router</html>"),
        status(200, {"choices": [{"message": {"content": "whole"}}]}),
        raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
        stream("no json"),
        stream({"no": "choices"}),
        raw(STREAM + b"data: " + b"x" * (LONGEST_LINE + 10)),
    ],
)
def test_what_is_no_chat_completion_is_an_error(proxy, fault):
    proxy.faults = [fault] * 9
    assert "ngine 'studio'" in str(failure(proxy.base_url))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_is_not_carried_to_where_a_redirect_points(proxy, code):
    with fault_proxy(("127.0.0.1", 1)) as other:
        target = other.base_url.replace("127.0.0.1", "localhost")
        proxy.faults = [status(code, "", Location=f"{target}/chat/completions?secret=1")]
        said = str(failure(proxy.base_url))
        assert target.removesuffix("/v1") in said
        assert "secret" not in said
        assert other.seen == []


def test_a_key_that_the_engine_repeats_is_taken_out_of_its_words(proxy):
    for form in FORMS:
        said = f"Incorrect key {form(KEY)}"
        escaped = json.dumps({"error": {"message": said}}).replace(KEY, FORMS[5](KEY))
        answers = [*(status(code, escaped) for code in (200, 400, 401, 404, 500)), stream(said), stream(escaped)]
        for fault in [*answers, *(status(code, said) for code in (200, 400, 401, 500))]:
            proxy.faults = [fault]
            assert "***" in str(failure(proxy.base_url))


@pytest.mark.parametrize("code", [429, 503])
def test_the_key_is_in_no_log_of_an_engine_that_is_asked_again(proxy, code, caplog):
    caplog.set_level("DEBUG")
    for form in FORMS:
        proxy.faults = [status(code, {"error": f"Incorrect key {form(KEY)}"})] * 9
        assert "***" in str(failure(proxy.base_url))
        assert "Asking again" in caplog.text
        assert form(KEY) not in caplog.text


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://other.host:444/v1?key={key}", "https://other.host:444,"),
        ("https://user:{key}@other.host/v1", "https://other.host,"),
        ("//other.host/{key}", "://other.host,"),
        ("/login?next=/v1&key={key}", "another path of its own"),
        ("http://{key}.other.host/", "***"),
        ("http://[::1]:80/{key}", "http://[::1]:80,"),
        ("http://[{key}", "an address that is not valid"),
        ("http://host:{key}/", "an address that is not valid"),
        ("", "an address it does not name"),
        ("http://" + "h" * 5000 + "/", "h" * 253 + ","),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_of_a_redirect_scheme_and_host_are_told(proxy, address, told, form):
    proxy.faults = [status(302, "", Location=address.replace("{key}", form("sk-sEcrEt42x")))]
    said = str(failure(proxy.base_url, key="sk-sEcrEt42x"))
    assert told in said
    assert form("sk-sEcrEt42x") not in said


def test_what_never_was_there_cannot_be_reached_and_is_not_tried_for_long():
    error = failure("http://127.0.0.1:1/v1")
    assert type(error) is EngineError
    assert "cannot be reached" in str(error)


def test_fields_that_the_engine_does_not_know_are_left_out(proxy):
    refusal = status(422, {"detail": "Unexpected fields in the request: {'top_k', 'min_p'}"})
    proxy.faults = [refusal, FINE]
    reply, line = ask(proxy.base_url)
    assert reply.text == "Hello"
    assert line.unknown == {"top_k", "min_p"}
    proxy.faults = [FINE]
    assert ask(proxy.base_url)[0].text == "Hello"
    asked = [sorted(seen.body) for seen in proxy.seen]
    assert asked == [sorted(BODY), *[["max_tokens", "messages", "model"]] * 2], "and not found out again"


def test_a_field_that_it_must_know_is_not_left_out(proxy):
    proxy.faults = [status(422, {"detail": "Unexpected fields in the request: {'messages'}"})]
    assert "messages" in str(failure(proxy.base_url))
    assert len(proxy.seen) == 1


def packed(code, kind, content, encoding="gzip"):
    """A response as a web server on the way packs it."""
    lines = [f"HTTP/1.1 {code} Whatever", f"Content-Type: {kind}", f"Content-Encoding: {encoding}", "Connection: close"]
    return raw("\r\n".join([*lines, "", ""]).encode() + content)


def test_engines_are_asked_not_to_pack(proxy):
    proxy.faults = [FINE]
    ask(proxy.base_url)
    assert proxy.seen[0].headers["accept-encoding"] == "identity"


def test_an_answer_that_is_packed_all_the_same_is_read(proxy):
    proxy.faults = [packed(200, "text/event-stream", gzip.compress(streamed(piece("Hello"), "[DONE]")[len(STREAM) :]))]
    assert ask(proxy.base_url)[0].text == "Hello"


@pytest.mark.parametrize("kind", ["application/json", "text/html", "text/event-stream"])
@pytest.mark.parametrize("code", [200, 302, 400, 401, 404, 429, 500, 503])
def test_megabytes_in_a_few_bytes_are_looked_at_in_a_bounded_part(proxy, code, kind, monkeypatch):
    """The size of what goes on from here, and not how long it took: everything after it is linear in that."""
    seen = []
    monkeypatch.setattr(client, "unpacked", lambda *given: counted(incoming.unpacked(*given), seen))
    proxy.faults = [packed(code, kind, gzip.compress(b"<" * 50_000_000))] * 9
    assert len(str(failure(proxy.base_url))) < 800
    # Two lines of a stream, or what is read of other responses, as often as it is asked.
    assert sum(seen) < 5 * (2 * LONGEST_LINE)


async def counted(steps, seen):
    async for step in steps:
        seen.append(len(step))
        yield step


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "nonsense"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_answer_that_cannot_be_unpacked_is_an_error_that_says_so(proxy, encoding, kind):
    proxy.faults = [packed(200, kind, b"whatever" * 900, encoding)] * 9
    assert "not a chat completion" in str(failure(proxy.base_url))
    proxy.faults = [packed(401, kind, b"whatever" * 900, encoding)] * 9
    assert "refuses the key: status 401" in str(failure(proxy.base_url))


def test_a_stream_of_nothing_has_an_end(proxy, monkeypatch):
    monkeypatch.setattr(client, "_MOST_BYTES_BESIDE", 1 << 16)
    proxy.otherwise = endless({"choices": [], "padding": "x" * 1000})
    assert "broke off" in str(failure(proxy.base_url))


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_an_engine_that_counts_in_hundreds_of_digits_loses_no_answer(proxy, digits):
    usage = f'{{"choices": [], "usage": {{"completion_tokens": {"7" * digits}, "prompt_tokens": {"9" * digits}}}}}'
    proxy.faults = [stream(piece("Hello"), piece(end="stop"), usage, "[DONE]")]
    reply, _ = ask(proxy.base_url)
    assert (reply.text, reply.count("completion_tokens"), reply.count("prompt_tokens")) == ("Hello", 0, 0)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Type: \xff\xfe/\x80",
        b"Content-Type: text/event-stream; charset=" + b"x" * 5000,
        b"Content-Length: " + b"9" * 5000,
        b"Content-Length: -5",
        b"Transfer-Encoding: chunked, chunked",
        b"Set-Cookie: " + b'a="\\\\' * 1000,
        b"Content-Encoding: \xff",
        b"Server: " + b"x" * 60_000,
        b"Retry-After: " + b"9" * 5000,
        b"Location: http://[",
        b"Location: http://[::1%25" + b"x" * 5000,
        b"\x00: x",
    ],
)
@pytest.mark.parametrize("code", [b"200", b"302", b"400", b"503"])
def test_a_hostile_head_ends_in_an_error_of_ours(proxy, head, code):
    proxy.faults = [raw(b"HTTP/1.1 " + code + b" OK\r\n" + head + b"\r\nConnection: close\r\n\r\n{}")] * 9
    assert len(str(failure(proxy.base_url))) < 800
