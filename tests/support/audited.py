"""Records what a way into the pack opens, writes, starts and reaches, by the interpreter's audit hook and the disk.

The hook sees what Python does. Libraries in C and Rust (FFmpeg, tokenizers, safetensors) open files by themselves, so a
folder of traps is watched from outside as well (`Traps`), which sees every opening of a file there and every connection
to its address.

Runs in a process that fork_server.py has forked: an audit hook cannot be taken away again.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What runs of a hostile file would hold this word.
MARK = "sprung_trap"
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
# Verb -> how a failure says it.
WORDS = {
    "read": "opened {} for reading",
    "list": "listed {}",
    "write": "opened {} for writing",
    "change": "made, moved or removed {}",
    "connect": "connected to {}",
    "look up": "asked for the address of {}",
    "listen": "listened on {}",
    "start": "started {}",
    "load": "loaded the library {}",
    "run": "ran code of {}",
}


@dataclass
class Places:
    """Names for folders and addresses, so that a list holds no path of a machine. The longest path that fits counts."""

    folders: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)

    def of(self, verb: str, what: str) -> str:
        if verb in ("connect", "listen", "look up", "start"):
            return self.addresses.get(what, what)
        if what.startswith("<"):
            return what
        path = _real(what, follow=verb != "change")
        found = [root for root in self.folders if path == root or path.startswith(root.rstrip("/") + "/")]
        return self.folders[max(found, key=len)] if found else path


def _real(path: str, follow: bool) -> str:
    """Return where a path leads; if a link is moved or removed, the path of the link itself."""
    if follow:
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # noqa: PTH118, PTH119, PTH120


def machine() -> dict[str, str]:
    """Name the places that every machine has: an interpreter and its packages, the pack, the system's own tables."""
    installed = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    installed |= {os.path.realpath(entry) for entry in installed}
    system = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/usr/lib", "/lib", "/etc/mime.types", "/etc/ssl")
    system += ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/usr/share/zoneinfo", "/etc/localtime")
    pack = {
        str(ROOT / name): "the pack" for name in ("qwenvl", "nodes.py", "__init__.py", "pyproject.toml", "__pycache__")
    }
    return {
        **dict.fromkeys(system, "the system"),
        **dict.fromkeys(installed, "the interpreter"),
        **pack,
        str(ROOT): "the checkout",
        str(ROOT / "custom_models.json"): "the example",
        str(ROOT / "demo"): "the demo",
        str(ROOT / "tests"): "the tests",
    }


# Addresses that are known only when a way has begun.
OWN = {"127.0.0.1:0": "the page's server"}
# Read by whatever runs in Python at all.
ALWAYS = {(verb, place) for verb in ("read", "list", "run") for place in ("the interpreter", "the pack", "the system")}
ALWAYS |= {("run", "the tests"), ("read", "the tests"), ("load", "the interpreter"), ("load", "the system")}
# Python looks for modules in the first two. The pack looks once, as it is loaded, for models in the example.
ALWAYS |= {("list", "the tests"), ("list", "the checkout"), ("read", "the example")}


class Hook:
    """Records (verb, what) of everything that happens in this process from now on."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._on = True
        self._inside = threading.local()
        sys.addaudithook(self._event)

    def end(self) -> None:
        self._on = False

    def _event(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._on or getattr(self._inside, "yes", False):
            return
        self._inside.yes = True
        try:
            self.seen.update(_told(event, given))
        finally:
            self._inside.yes = False


def _told(event: str, given: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield (verb, what) for the things that an event concerns."""
    if event in _CHANGES:
        yield from _named("change", given[: _CHANGES[event]])
    elif event in _STARTS:
        program = os.fsdecode(given[0]) if isinstance(given[0], (str, bytes)) else str(given[0])
        yield "start", "Python" if program == sys.executable else program
    elif event in _EVENTS:
        yield from _EVENTS[event](*given)


def _reached(verb: str) -> Callable[..., Iterator[tuple[str, str]]]:
    def told(_: Any, address: Any, *rest: Any) -> Iterator[tuple[str, str]]:
        yield verb, ":".join(map(str, address[:2])) if isinstance(address, tuple) else os.fsdecode(address)

    return told


def _looked_up(name: Any, port: Any = None, *_: Any) -> Iterator[tuple[str, str]]:
    yield "look up", str(name) if port is None else f"{name}:{port}"


def _listed(folder: Any = None) -> Iterator[tuple[str, str]]:
    yield from _named("list", ("." if folder is None else folder,))


def _loaded(library: Any) -> Iterator[tuple[str, str]]:
    if library is not None:
        yield "load", os.fsdecode(library)


def _imported(_: Any, file: Any, *rest: Any) -> Iterator[tuple[str, str]]:
    if file:
        yield "run", os.fsdecode(file)


def _executed(code: Any) -> Iterator[tuple[str, str]]:
    yield from _run(getattr(code, "co_filename", ""), "")


def _compiled(source: Any, name: Any) -> Iterator[tuple[str, str]]:
    text = source.decode(errors="replace") if isinstance(source, bytes) else str(source)
    yield from _run(name if isinstance(name, str) else "", text)


def _unpickled(module: Any, name: Any) -> Iterator[tuple[str, str]]:
    yield "run", f"<pickle of {module}.{name}>"


def _opened(path: Any, mode: Any, flags: Any) -> Iterator[tuple[str, str]]:
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    writes = set(mode) & set("wax+") if isinstance(mode, str) else isinstance(flags, int) and flags & changes
    yield from _named("write" if writes else "read", (path,))


def _named(verb: str, paths: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    for path in paths:
        if not isinstance(path, int):
            yield verb, os.fsdecode(path)


def _run(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield code that is run. What a library generates, as for dataclasses, is named <...> and is not a file's."""
    if not name.startswith("<") and name:
        # Cython names its sources by where they were, which are not there.
        if os.path.isabs(name) or os.path.exists(name):  # noqa: PTH110, PTH117 (no more events)
            yield "run", name
    elif MARK in text:
        yield "run", "<a file's text>"


_EVENTS: dict[str, Callable[..., Iterator[tuple[str, str]]]] = {
    "open": _opened,
    **dict.fromkeys(("os.listdir", "os.scandir"), _listed),
    **dict.fromkeys(("socket.connect", "socket.sendto"), _reached("connect")),
    "socket.bind": _reached("listen"),
    **dict.fromkeys(("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"), _looked_up),
    "ctypes.dlopen": _loaded,
    "import": _imported,
    "exec": _executed,
    "compile": _compiled,
    "pickle.find_class": _unpickled,
}


class Traps:
    """A folder and an address that must not be touched, watched from outside of the process under test.

    On Linux inotify reports every opening in the folder, by any library; elsewhere only the hook sees them.
    """

    _OPEN, _CREATE, _DELETE, _MODIFY = 0x20, 0x100, 0x200, 0x2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._calls: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._listen, daemon=True).start()
        self._number = -1

    def arm(self) -> None:
        """Begin to count what happens there."""
        if sys.platform.startswith("linux"):
            self._number = ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK)
            mask = self._OPEN | self._CREATE | self._DELETE | self._MODIFY
            for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
                assert ctypes.CDLL(None).inotify_add_watch(self._number, os.fsencode(folder), mask) >= 0

    def sprung(self) -> list[str]:
        """Return what was opened, and what was requested from the address, since the last call."""
        opened = []
        try:
            told = os.read(self._number, 1 << 20) if self._number >= 0 else b""
        except BlockingIOError:
            told = b""
        while told:
            _, mask, _, length = struct.unpack_from("iIII", told)
            name = told[16 : 16 + length].rstrip(b"\0").decode()
            told = told[16 + length :]
            if name:
                opened.append(f"{'opened' if mask & self._OPEN else 'changed'} {name}")
        calls, self._calls[:] = list(self._calls), []
        return sorted({*opened, *calls})

    def close(self) -> None:
        self._server.close()
        if self._number >= 0:
            os.close(self._number)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            with connection:
                connection.settimeout(1)
                try:
                    self._calls.append(f"was asked over the network for {connection.recv(80)!r}")
                except OSError:
                    self._calls.append("was connected to")


@contextmanager
def audited(given: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Write the block's events at its end, as [verb, place, what]; those of ALWAYS are left out."""
    hook = Hook()
    try:
        yield
    finally:
        hook.end()
        places = Places({**machine(), **given["folders"]}, {**OWN, **given["addresses"]})
        named = {(verb, places.of(verb, what), what) for verb, what in hook.seen}
        write({"seen": sorted(entry for entry in named if entry[:2] not in ALWAYS)})


def loaded_pack(base: Path) -> tuple[Any, Any]:
    """Return ComfyUI's double, which lives in the folder, and the pack as the double loads it."""
    from comfy_double import load_pack

    double, module = load_pack(base / "comfyui" / "models")
    sys.modules["the_pack.qwenvl.models.catalog"].CUSTOM_MODELS = base / "custom_models.json"
    return double, module


def node(base: Path, name: str, listen: str = "127.0.0.1", **values: Any) -> Any:
    """Run a node of the pack as ComfyUI does; the value "picture" becomes a picture."""
    from pictures import draw, image

    double, module = loaded_pack(base)
    double.args.listen = listen
    kind = module.NODE_CLASS_MAPPINGS[name]
    inputs = kind.INPUT_TYPES()
    defaults = {
        key: options["default"]
        for key, (_, options) in {**inputs["required"], **inputs.get("optional", {})}.items()
        if "default" in options
    }
    pictures = {key: image(draw("circle", "red", "blue")) for key, value in values.items() if value == "picture"}
    return double.run(kind, **{**defaults, **values, **pictures})


def routes(base: Path, asked: list[list[Any]]) -> Any:
    """Request the page's routes from a server: [method, path, options] for each request."""
    import asyncio
    from types import SimpleNamespace

    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    _, module = loaded_pack(base)
    panel = sys.modules["the_pack.qwenvl.nodes.panel"]
    table = web.RouteTableDef()
    panel.host.server = lambda: SimpleNamespace(routes=table)
    panel.add_routes(module.nodes.MODELS)

    async def once(method: str, path: str, options: dict[str, Any]) -> int:
        application = web.Application()
        application.add_routes(table)
        async with TestClient(TestServer(application)) as client:
            OWN[f"127.0.0.1:{client.port}"] = "the page's server"
            async with client.request(method, path, **options) as reply:
                await reply.read()
                return reply.status

    return [asyncio.run(once(*entry)) for entry in asked]


def command(base: Path, *arguments: str) -> Any:
    """Run a command of the command line, with a list of models of its own."""
    from qwenvl.__main__ import main
    from qwenvl.models import catalog

    catalog.CUSTOM_MODELS = base / "custom_models.json"
    return main(arguments)


def transfer(base: Path, repo_id: str, folder: str) -> Any:
    """Run the process that downloads a model, which ends when its standard input is closed."""
    from qwenvl.models import download
    from qwenvl.models import transfer as process

    held, _ = os.pipe()
    os.dup2(held, 0)
    process.main(repo_id, folder, download.why_incomplete)


WAYS: dict[str, Callable[..., Any]] = {"node": node, "routes": routes, "command": command, "transfer": transfer}


def work(base: str, told: str) -> int:
    """Follow an order in the forked process, and write what was seen to seen.json."""
    given, where = json.loads(told), Path(base)
    (where / "here").mkdir(exist_ok=True)
    os.chdir(where / "here")
    found: dict[str, Any] = {"outcome": ""}

    def write(seen: dict[str, Any]) -> None:
        (where / "seen.json").write_text(json.dumps(found | seen))

    with audited(given, write):
        try:
            found["outcome"] = repr(WAYS[given["way"]](where, *given["arguments"], **given["values"]))[:2000]
        except SystemExit as error:
            found["outcome"] = f"exit {error.code}"
        except (ValueError, RuntimeError, OSError) as error:
            found["outcome"] = f"{type(error).__name__}: {error}"[:2000]
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(work(*sys.argv[1:]))
