"""What the page's list of models asks the server: which are in memory, and to let one go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..comfyui import host
from ..loading.cache import ModelCache
from ..request import LoadSpec

JSON = "application/json"
_PORT = re.compile(r":\d+$")


def add_routes(models: ModelCache) -> None:
    """GET /qwenvl/models and POST /qwenvl/unload, where there is a server."""
    routes = getattr(host.server(), "routes", None)
    if routes is None:
        return
    from aiohttp import web  # ComfyUI has it; nobody else needs it here

    @routes.get("/qwenvl/models")
    async def get_models(request: web.Request) -> web.Response:
        if is_cross_site(request.headers):
            return web.Response(status=403)
        return web.json_response({"models": listed(models)})

    @routes.post("/qwenvl/unload")
    async def unload(request: web.Request) -> web.Response:
        # A page elsewhere can send a form without asking first, but no JSON.
        if is_cross_site(request.headers) or request.content_type != JSON:
            return web.Response(status=403)
        try:
            asked = json.loads(await request.text())
        except ValueError:
            return web.Response(status=400)
        wanted = asked.get("model") if isinstance(asked, dict) else None
        spec = next((each.spec for each in models.residents if key(each.spec) == wanted), None)
        if spec is None:
            return web.json_response({"error": f"no model {wanted!r} is in memory"}, status=404)
        running = host.running_prompts()
        host.when_gone(running, ("unload", spec), lambda: models.forget(spec))
        return web.json_response({"unloads": "after this run" if running else "now"})


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
