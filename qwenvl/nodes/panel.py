"""What the page asks the server of models: which are in memory, to let one go, and what the list offers."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from ..checks import shown
from ..comfyui import host
from ..files import bounded_json
from ..loading.cache import ModelCache
from ..request import LoadSpec
from . import choices

JSON = "application/json"
# A name with its settings; no more than a few hundred characters.
_ASKED = bounded_json.Limit(1 << 16, 1 << 10)
_PORT = re.compile(r":\d+$")


def add_routes(models: ModelCache) -> None:
    """GET /qwenvl/models, GET /qwenvl/choices and POST /qwenvl/unload, where there is a server."""
    routes = getattr(host.server(), "routes", None)
    if routes is None:
        return
    from aiohttp import web  # ComfyUI has it; nobody else needs it here

    @routes.get("/qwenvl/models")
    @_guarded
    async def get_models(_: web.Request) -> web.Response:
        return web.json_response({"models": listed(models)})

    @routes.get("/qwenvl/choices")
    @_guarded
    async def get_choices(_: web.Request) -> web.Response:
        # Disks are looked at, and may be slow.
        return web.json_response(await asyncio.to_thread(choices.told))

    @routes.post("/qwenvl/unload")
    @_guarded
    async def unload(request: web.Request) -> web.Response:
        # A page elsewhere can send a form without asking first, but no JSON.
        if request.content_type != JSON:
            return web.Response(status=403, text=f"only {JSON} is taken")
        try:
            # In UTF-8, whatever charset the request names.
            asked = bounded_json.parse(await _body(request), _ASKED)
        except (ValueError, RecursionError):
            return web.Response(status=400, text="that is no JSON")
        wanted = asked.get("model") if isinstance(asked, dict) else None
        spec = next((each.spec for each in models.residents if key(each.spec) == wanted), None)
        if spec is None:
            return web.json_response({"error": f"no model {shown(wanted)} is in memory"}, status=404)
        running = host.running_prompts()
        host.when_gone(running, ("unload", spec), lambda: models.forget(spec))
        return web.json_response({"unloads": "after this run" if running else "now"})


async def _body(request: Any) -> bytes:
    """What was sent, up to a byte more than is taken: ComfyUI lets a request have 100 MB."""
    body = b""
    while len(body) <= _ASKED.size and (block := await request.content.read(_ASKED.size + 1 - len(body))):
        body += block
    return body


def _guarded(answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """The same handler of requests, for those that may ask."""

    async def guarded(request: Any) -> Any:
        if reason := why_refused(request.headers, host.own_names()):
            from aiohttp import web

            return web.Response(status=403, text=reason)
        return await answer(request)

    return guarded


def why_refused(headers: Mapping[str, str], own_names: Collection[str]) -> str | None:
    """Why the browser that asks may be in another one's hands, or None."""
    if is_cross_site(headers):
        return "another site's page asks"
    name = headers.get("Host", "")
    if is_foreign_name(name, own_names):
        return f"{shown(name)} is no name of this machine. If a proxy asks for it, name it in {host.HOSTS}"
    return None


def is_foreign_name(name: str, own_names: Collection[str]) -> bool:
    """Whether a browser may have been led here by a name that is somebody else's (DNS rebinding).

    To the browser, the page under that name is ComfyUI's own then, and sends no other Origin. An address cannot lead
    elsewhere, nor can localhost.

    Args:
        name: what Host says.
        own_names: of this machine and its proxies, in small letters.
    """
    name = _PORT.sub("", name.strip().lower()).removesuffix(".")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return bool(name) and name != "localhost" and not name.endswith(".localhost") and name not in own_names
    return False


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Whether another site's page sent the request.

    ComfyUI itself refuses those where it is reached as localhost. With --listen, under another name, it compares no
    Origin; with --enable-cors-header it refuses nobody, and every page may read the answers.
    """
    if "Origin" not in headers:  # without it, a page elsewhere cannot read an answer
        return False
    own, origin = headers.get("Host", "").lower(), headers["Origin"].lower().partition("://")[2]
    # A proxy may leave the port out of Host, or write one that an origin leaves out.
    if not (_PORT.search(own) and _PORT.search(origin)):
        own, origin = _PORT.sub("", own), _PORT.sub("", origin)
    return origin != own


def key(spec: LoadSpec) -> str:
    """One of those that are in memory, by its settings."""
    return " / ".join((spec.model, spec.quantization, spec.attention, spec.device))


def listed(models: ModelCache) -> list[dict[str, Any]]:
    """What there is, as the page shows it: the most recently loaded last."""
    return [
        {
            "key": key(resident.spec),
            "model": resident.spec.model,
            "quantization": resident.spec.quantization,
            "devices": list(resident.source.devices) if resident.handle is not None else ["RAM, waiting"],
            "bytes": resident.size,
            "since": resident.loaded_at,
        }
        for resident in models.residents
    ]
