"""HTTP routes for the page: list the models in memory, unload one, and describe the models that can be chosen."""

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
# Limits of an unload request: a model's name and settings take a few hundred characters.
_ASKED = bounded_json.Limit(1 << 16, 1 << 10)
_PORT = re.compile(r":\d+$")


def add_routes(models: ModelCache) -> None:
    """Add GET /qwenvl/models, GET /qwenvl/choices and POST /qwenvl/unload to ComfyUI's server, if there is one."""
    routes = getattr(host.server(), "routes", None)
    if routes is None:
        return
    from aiohttp import web  # imported here because only ComfyUI's server needs it

    @routes.get("/qwenvl/models")
    @_guarded
    async def get_models(_: web.Request) -> web.Response:
        return web.json_response({"models": listed(models)})

    @routes.get("/qwenvl/choices")
    @_guarded
    async def get_choices(_: web.Request) -> web.Response:
        # In a thread, because it reads disks, which may be slow.
        return web.json_response(await asyncio.to_thread(choices.facts))

    @routes.post("/qwenvl/unload")
    @_guarded
    async def unload(request: web.Request) -> web.Response:
        # Another site's page can send a form without a CORS preflight, but not JSON.
        if request.content_type != JSON:
            return web.Response(status=403, text=f"only {JSON} is taken")
        try:
            # In UTF-8, whatever charset the request names.
            asked = bounded_json.parse(await _body(request), _ASKED)
        except (ValueError, RecursionError):
            return web.Response(status=400, text="that is no JSON")
        wanted = asked.get("model") if isinstance(asked, dict) else None
        spec = next((resident.spec for resident in models.residents if key(resident.spec) == wanted), None)
        if spec is None:
            return web.json_response({"error": f"no model {shown(wanted)} is in memory"}, status=404)
        running = host.running_prompts()
        host.when_gone(running, ("unload", spec), lambda: models.forget(spec))
        return web.json_response({"unloads": "after this run" if running else "now"})


async def _body(request: Any) -> bytes:
    """Read the body up to one byte over the limit: ComfyUI itself accepts 100 MB."""
    body = b""
    while len(body) <= _ASKED.size and (block := await request.content.read(_ASKED.size + 1 - len(body))):
        body += block
    return body


def _guarded(answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """Wrap a request handler so that it answers 403 to browsers that another site may control."""

    async def guarded(request: Any) -> Any:
        if reason := why_refused(request.headers, host.own_names()):
            from aiohttp import web

            return web.Response(status=403, text=reason)
        return await answer(request)

    return guarded


def why_refused(headers: Mapping[str, str], own_names: Collection[str]) -> str | None:
    """Return why another site may control the browser that sent the request, or None."""
    if is_cross_site(headers):
        return "another site's page asks"
    name = headers.get("Host", "")
    if is_foreign_name(name, own_names):
        return f"{shown(name)} is no name of this machine. If a proxy asks for it, name it in {host.HOSTS}"
    return None


def is_foreign_name(name: str, own_names: Collection[str]) -> bool:
    """Return True if the host name may belong to another site that resolves it to this machine (DNS rebinding).

    The browser then takes that site's page for ComfyUI's own, so its Origin looks right. Addresses and localhost are
    safe: no site can redirect them.

    Args:
        name: the request's Host header.
        own_names: names of this machine and its proxies, in lower case.
    """
    name = _PORT.sub("", name.strip().lower()).removesuffix(".")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return bool(name) and name != "localhost" and not name.endswith(".localhost") and name not in own_names
    return False


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Return True if another site's page sent the request.

    ComfyUI refuses such requests only if it is reached as localhost. With --listen, under another name, it does not
    compare the Origin; with --enable-cors-header it refuses no page, and every page may read the answers.
    """
    if "Origin" not in headers:  # without it, another site's page cannot read the answer
        return False
    own, origin = headers.get("Host", "").lower(), headers["Origin"].lower().partition("://")[2]
    # A proxy may leave the port out of Host, or write one that an origin leaves out.
    if not (_PORT.search(own) and _PORT.search(origin)):
        own, origin = _PORT.sub("", own), _PORT.sub("", origin)
    return origin != own


def key(spec: LoadSpec) -> str:
    """Return the text that identifies a model in memory: its name and settings."""
    return " / ".join((spec.model, spec.quantization, spec.attention, spec.device))


def listed(models: ModelCache) -> list[dict[str, Any]]:
    """List the models in memory for the page, the most recently loaded last."""
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
