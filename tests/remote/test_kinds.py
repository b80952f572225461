"""What kind of engine answers is told by what it says of itself, found out once, and named with what it ignores."""

import json

import pytest
from fault_proxy import dropped, fault_proxy, piece, raw, status, stream, streamed

from qwenvl.loading.cache import ModelCache
from qwenvl.models import catalog
from qwenvl.pipeline import run
from qwenvl.process import PROCESS
from qwenvl.prompting.watch import NoWatch
from qwenvl.remote import kinds
from qwenvl.request import LoadSpec, Request, Sampling

YES = (piece("yes"), piece(end="stop"), {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}})
SHORT = Sampling(min_new_tokens=20)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine that says what a test gives it to say. Called, it is asked; returns what the statistics say."""
    with fault_proxy(("127.0.0.1", 1)) as proxy:

        def ask(*faults, **changes):
            file = tmp_path / "custom_models.json"
            file.write_text(json.dumps({"engines": {"canned": {"base_url": proxy.base_url, "model": "m"}}}))
            monkeypatch.setattr(catalog, "CUSTOM_MODELS", file)
            proxy.faults = list(faults)
            asked = Request(LoadSpec("canned @ engine"), "Well?", **{"sampling": SHORT, **changes})
            return list(run(asked, ModelCache(), NoWatch()).stats.loaded.fallbacks)

        ask.proxy = proxy
        yield ask
        PROCESS.engine_kinds.pop((proxy.base_url, "m"), None)


def models(*owners):
    return {"object": "list", "data": [{"id": f"m{number}", "owned_by": owner} for number, owner in enumerate(owners)]}


@pytest.mark.parametrize(
    ("server", "fingerprint", "kind"),
    [
        ("llama.cpp", "", "llama.cpp"),
        ("", "b11434-1a2b3c4d", "llama.cpp"),
        ("", "fp_ollama", "Ollama"),
        ("uvicorn", "fp_44709d6fcb", ""),
        ("", "", ""),
    ],
)
def test_some_say_it_in_every_answer(server, fingerprint, kind):
    assert kinds.of_answer(server, fingerprint) == kind


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (models("vllm"), "vLLM"),
        (models("sglang"), "SGLang"),
        (models("llamacpp"), "llama.cpp"),
        (models("library", "library"), "Ollama"),
        (models("organization_owner"), "LM Studio"),
        (models("vllm", "llamacpp"), ""),
        (models("me"), ""),
        (models(), ""),
        ({"data": [{"id": "m"}, 5]}, ""),
        ({"data": [{"owned_by": ["vllm"]}]}, ""),
        ({"data": {"owned_by": "vllm"}}, ""),
        (["vllm"], ""),
        ("no json", ""),
        ("[" * 100_000, ""),
    ],
)
def test_others_in_the_list_of_their_models(body, kind):
    assert kinds.of_models(body if isinstance(body, str) else json.dumps(body)) == kind


def test_the_list_is_asked_for_once_and_what_is_ignored_is_named_every_time(engine):
    for faults in ((stream(*YES), status(200, models("library"))), (stream(*YES),)):
        assert engine(*faults) == ["Ollama ignores top_k, min_new_tokens"]
    assert [seen.path for seen in engine.proxy.seen] == [
        "/v1/chat/completions",
        "/v1/models",
        "/v1/chat/completions",
    ]


def test_an_engine_that_says_it_in_its_answer_is_not_asked(engine):
    head = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    events = streamed(*YES).partition(b"\r\n\r\n")[2]
    assert engine(raw(head + events)) == ["llama.cpp ignores min_new_tokens"]
    assert len(engine.proxy.seen) == 1


def test_nothing_is_asked_where_nothing_can_be_ignored(engine):
    assert engine(stream(*YES), sampling=Sampling(do_sample=False)) == []
    assert len(engine.proxy.seen) == 1


def test_a_list_that_there_is_not_costs_no_answer_and_is_not_asked_for_again(engine):
    for fault in (
        status(404, "no"),
        status(200, "x" * 200_000),
        status(302, "", Location="http://127.0.0.1:1/"),
        dropped,
    ):
        PROCESS.engine_kinds.clear()
        # A get that is dropped is repeated by aiohttp.
        (sentence,) = engine(stream(*YES), fault, fault)
        assert "does not say what kind it is, and may ignore top_k, min_new_tokens" in sentence
        before = len(engine.proxy.seen)
        assert engine(stream(*YES)) == [sentence]
        assert len(engine.proxy.seen) == before + 1


def test_a_stop_that_makes_an_engine_fail_is_not_sent_again(engine):
    stops = Sampling(do_sample=False, stop=("END",))
    said = stream(piece("one END two"), *YES[1:])
    broken = stream({"error": {"message": "stop strings need a tokenizer", "code": 500}})
    for fault in (status(500, "Internal Server Error"), status(400, {"error": "too many stop words"}), broken):
        PROCESS.unknown_fields.clear()
        assert engine(fault, said, sampling=stops) == []
        assert ["stop" in seen.body for seen in engine.proxy.seen[-2:]] == [True, False]
