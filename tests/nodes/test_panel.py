"""The paths that the page's list of models uses: over HTTP, with a model that is really in memory."""

import asyncio
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pictures import draw, image
from waiting import until

from qwenvl.nodes.panel import is_cross_site, is_foreign_name

DEMO = "Demo-Shapes (5 MB, offline)"
KEY = f"{DEMO} / none / sdpa / auto"
RED_CIRCLE = image(draw("circle", "red", "blue"))


@pytest.fixture
def loaded(comfy, pack):
    """The pack with the demo model in memory."""
    node = pack.NODE_CLASS_MAPPINGS["QwenVL"]
    required = node.INPUT_TYPES()["required"]
    values = {name: options["default"] for name, (_, options) in required.items()}
    comfy.run(
        node, **{**values, "model": DEMO, "do_sample": False, "text": "Describe this image.", "image1": RED_CIRCLE}
    )
    return pack


@pytest.fixture
def ask(loaded, monkeypatch):
    """ask(method, path, **options) -> status and JSON, from a server that has the pack's paths."""
    panel = sys.modules["the_pack.qwenvl.nodes.panel"]
    table = web.RouteTableDef()
    monkeypatch.setattr(panel.host, "server", lambda: SimpleNamespace(routes=table))
    panel.add_routes(loaded.nodes.MODELS)

    async def once(method, path, **options):
        application = web.Application()
        application.add_routes(table)
        async with TestClient(TestServer(application)) as client, client.request(method, path, **options) as reply:
            return reply.status, await reply.json() if reply.content_type == "application/json" else None

    return lambda *request, **options: asyncio.run(once(*request, **options))


def releasing():
    """The threads that unload a model."""
    return [thread for thread in threading.enumerate() if thread.name == "qwenvl-release"]


BROKEN = ("http://[::1", "http://[", "", "://", "\u00e9", "http://a:b:c", "x" * 7000, "http://127.0.0.1:99999999")
NO_JSON = (b"[" * 100_000, b'{"model":' * 50_000, b"\xff\xfe", b"", b"9" * 5000)


def test_the_list_is_told_with_places_and_sizes_and_memory(ask, comfy, tmp_path, monkeypatch):
    choices = sys.modules["the_pack.qwenvl.nodes.choices"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    custom = tmp_path / "custom_models.json"
    custom.write_text(
        '{"models": {"Gone": {"path": "/nowhere/Gone"}, "Hub": {"repo_id": "a/Hub"}}, '
        '"engines": {"far": {"base_url": "http://127.0.0.1:1/v1", "model": "x"}}}'
    )
    monkeypatch.setattr(choices.catalog, "CUSTOM_MODELS", custom)
    folder = comfy.models_dir / "LLM" / "Qwen3-VL-2B-Instruct"
    shutil.copytree(choices.catalog.PACK / "demo" / "model", folder)
    try:
        status, told = ask("GET", "/qwenvl/choices")
    finally:
        shutil.rmtree(folder)
    assert status == 200
    models, stored = told["models"], (choices.catalog.PACK / "demo" / "model" / "model.safetensors").stat().st_size
    places = {name: model["place"] for name, model in models.items()}
    assert {places[name] for name in (DEMO, "Qwen3-VL-2B-Instruct")} == {"here"}
    assert (places["Qwen3-VL-4B-Instruct"], places["Gone"], places["Hub"]) == ("hub", "damaged", "hub")
    assert "elsewhere" in places.values()
    assert models[DEMO]["disk"] == models["Qwen3-VL-2B-Instruct"]["disk"] == stored
    assert 0.4 * stored < models[DEMO]["memory"]["4bit"] < models[DEMO]["memory"]["none"] < 1.1 * stored
    assert models["Qwen3-VL-4B-Instruct"] == {
        "place": "hub",
        "disk": 8_875_631_616,
        "memory": dict(choices.catalog.find("Qwen3-VL-4B-Instruct").size.memory),
    }
    assert (models["Hub"]["disk"], models["Hub"]["memory"]) == (0, {})
    assert told["memory"] == {"auto": comfy.memory.total, "cpu": comfy.memory.total}
    assert told["forbidden"] is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask("GET", "/qwenvl/choices")[1]["forbidden"] == "HF_HUB_OFFLINE is set"
    assert ask("GET", "/qwenvl/choices", headers={"Origin": "http://elsewhere"})[0] == 403


def test_a_loaded_model_is_told_with_its_size_its_place_and_since_when(ask, loaded):
    status, told = ask("GET", "/qwenvl/models")
    (model,) = told["models"]
    assert status == 200
    assert (model["key"], model["model"], model["quantization"], model["devices"]) == (KEY, DEMO, "none", ["cpu"])
    (held,) = loaded.nodes.MODELS.residents
    assert model["bytes"] == held.size > 1_000_000
    assert 0 <= time.time() - model["since"] < 600


def test_one_model_is_unloaded_and_then_it_is_not_told_any_more(ask, loaded):
    assert ask("POST", "/qwenvl/unload", json={"model": KEY}) == (200, {"unloads": "now"})
    assert until(lambda: not loaded.nodes.MODELS.residents)
    assert ask("GET", "/qwenvl/models") == (200, {"models": []})


def test_while_a_prompt_runs_the_model_stays_until_it_has_ended(ask, loaded, comfy):
    comfy.running[0] = (0, "p", {}, {}, [])
    assert ask("POST", "/qwenvl/unload", json={"model": KEY}) == (200, {"unloads": "after this run"})
    time.sleep(1)
    assert len(loaded.nodes.MODELS.residents) == 1
    del comfy.running[0]
    assert until(lambda: not loaded.nodes.MODELS.residents)


def test_many_requests_while_a_prompt_runs_wait_in_one_thread(ask, loaded, comfy):
    comfy.running[0] = (0, "p", {}, {}, [])
    for _ in range(20):
        assert ask("POST", "/qwenvl/unload", json={"model": KEY}) == (200, {"unloads": "after this run"})
    assert len(releasing()) == 1
    del comfy.running[0]
    assert until(lambda: not loaded.nodes.MODELS.residents)


# Options of a request that is not the page's, and the status of its reply.
NO_REQUESTS = (
    ({"json": {"model": "none of ours"}}, 404),
    ({"json": {}}, 404),
    ({"json": [1]}, 404),
    ({"data": "{", "headers": {"Content-Type": "application/json"}}, 400),
    ({"data": f'{{"model": "{KEY}"}}', "headers": {"Content-Type": "text/plain"}}, 403),
    ({"data": {"model": KEY}}, 403),
    ({"json": {"model": KEY}, "headers": {"Origin": "http://elsewhere.example"}}, 403),
    ({"json": {"model": KEY}, "headers": {"Origin": "null"}}, 403),
    *(({"json": {"model": KEY}, "headers": {"Origin": origin}}, 403) for origin in BROKEN),
    ({"json": {"model": KEY}, "headers": {"Host": "evil.example"}}, 403),
    ({"json": {"model": KEY}, "headers": {"Host": "evil.example", "Origin": "http://evil.example"}}, 403),
    *(({"data": data, "headers": {"Content-Type": "application/json"}}, 400) for data in NO_JSON),
    ({"data": '{"model": "x"}', "headers": {"Content-Type": "application/json; charset=klingon"}}, 404),
    ({"data": '{"model": "x"}', "headers": {"Content-Type": "application/json; charset=rot13"}}, 404),
    ({"json": {"model": "x" * 60_000}}, 404),
    ({"json": {"model": "x" * 900_000}}, 400),
    ({"json": [[]] * 2000}, 400),
    ({"json": {"model": ["\ud800"] * 900}}, 404),
)


def test_what_is_no_request_of_the_page_unloads_nothing(ask, loaded):
    for number, (options, status) in enumerate(NO_REQUESTS):
        assert ask("POST", "/qwenvl/unload", **options)[0] == status, number
        assert until(lambda: not releasing()), number
        assert len(loaded.nodes.MODELS.residents) == 1, number


def test_unloading_takes_a_post(ask, loaded):
    assert ask("GET", "/qwenvl/unload")[0] == 405
    assert len(loaded.nodes.MODELS.residents) == 1


def test_another_site_is_not_told_which_models_there_are(ask):
    assert ask("GET", "/qwenvl/models", headers={"Origin": "http://elsewhere.example"})[0] == 403


@pytest.mark.parametrize(
    ("headers", "cross"),
    [
        ({}, False),
        ({"Host": "127.0.0.1:8188"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188"}, False),
        ({"Host": "Studio.local", "Origin": "https://studio.local"}, False),
        ({"Host": "studio.local:443", "Origin": "https://studio.local"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:3000"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "http://evil.example"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "null"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1.evil.example:8188"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:99999"}, True),
        ({"Host": "studio.local", "Origin": "https://studio.local:8443"}, False),
        ({"Host": "studio.local", "Origin": "https://evil.example:8443"}, True),
        ({"Host": "[::1]:8188", "Origin": "http://[::1]:8188"}, False),
        ({"Host": "[::1]:8188", "Origin": "http://[::1"}, True),
    ],
)
def test_where_a_request_comes_from(headers, cross):
    assert is_cross_site(headers) is cross


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        *(
            (name, False)
            for name in ("", "localhost", "localhost:8188", "LOCALHOST.", "a.localhost:1", "127.0.0.1:8188")
        ),
        *((name, False) for name in ("[::1]:8188", "192.168.1.7", "[fe80::1%25eth0]:8188", "[fe80::1]", "Studio:8188")),
        *((name, False) for name in ("studio.local.", "comfy.my.example:443")),
        *((name, True) for name in ("evil.example", "evil.example:8188", "localhost.evil.example")),
        *((name, True) for name in ("evillocalhost", "studio.local.evil.example", "192.168.1.7.nip.io", "a:b:c")),
        *((name, True) for name in ("127.0.0.1@evil.example", "my.example", "\u00e9", "..")),
    ],
)
def test_a_name_that_may_lead_here_without_being_ours(name, foreign):
    assert is_foreign_name(name, {"studio", "studio.local", "comfy.my.example"}) is foreign


def test_a_name_that_was_made_to_lead_here_is_told_nothing(ask, monkeypatch):
    """DNS rebinding: to the browser it is the page's own server, so it sends no Origin."""
    assert ask("GET", "/qwenvl/models", headers={"Host": "evil.example:8188"})[0] == 403
    monkeypatch.setenv("QWENVL_HOSTS", "comfy.my.example, Other.example")
    for name in ("comfy.my.example", "other.example:443", "localhost:8188", "10.0.0.1"):
        assert ask("GET", "/qwenvl/models", headers={"Host": name})[0] == 200


def test_the_address_and_the_name_of_this_machine_are_its_own(comfy, pack, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Studio.lan.example")
    comfy.args.listen = "127.0.0.1,my-server"
    names = {"studio.lan.example", "studio", "studio.local", "127.0.0.1", "my-server"}
    assert pack.nodes.host.own_names() == names
