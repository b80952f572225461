"""A proxy in front of an engine that does to a request what a test asks for, and remembers what was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """A request as it arrived; `gone` is set when the caller has closed the connection."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)
    gone: threading.Event = field(default_factory=threading.Event)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"
Fault = Callable[["FaultProxy", Seen, bytes, asyncio.StreamWriter], Awaitable[None]]


class FaultProxy:
    """Uses one fault for each request; when none is left, `otherwise`, which passes requests on."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.otherwise: Fault = passed_on
        self.seen: list[Seen] = []
        self.base_url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request of a connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            named = (line.partition(":") for line in lines if line)
            headers = {name.lower(): value.strip() for name, _, value in named}
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            seen = Seen(first.split()[1], headers, json.loads(content) if content else {})
            self.seen.append(seen)
            fault = self.faults.pop(0) if self.faults else self.otherwise
            watching = asyncio.ensure_future(self._watch(reader, seen))
            try:
                await fault(self, seen, content, writer)
            finally:
                watching.cancel()
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _watch(self, reader: asyncio.StreamReader, seen: Seen) -> None:
        """Notice when the caller closes the connection."""
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        seen.gone.set()


@contextlib.contextmanager
def fault_proxy(upstream: tuple[str, int]) -> Iterator[FaultProxy]:
    """Run the proxy on a free port of loopback, in a thread of its own."""
    proxy = FaultProxy(upstream)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 26))
    proxy.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def passed_on(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
    """Pass on the engine's reply as it comes, until the caller is gone."""
    async for block in _asked(proxy, seen, content):
        writer.write(block)
        await writer.drain()


def cut_after(pieces: int) -> Fault:
    """End the connection in the middle of the stream, after that many events."""

    async def fault(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
        count = 0
        async for block in _asked(proxy, seen, content):
            for line in block.splitlines(keepends=True):
                if count > pieces:
                    return
                writer.write(line)
                count += line.startswith(b"data:")
        raise AssertionError("the engine said all that it had to say")

    return fault


def stalled(answer: bytes = b"", seconds: float = 60) -> Fault:
    """Send those bytes, and then nothing for that time, or until the caller gives up."""

    async def fault(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        for _ in range(round(100 * seconds)):
            if seen.gone.is_set():
                return
            await asyncio.sleep(0.01)

    return fault


async def dropped(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
    """End the connection before a byte is sent."""
    writer.transport.abort()


def raw(answer: bytes) -> Fault:
    """Send those bytes, and end the connection."""

    async def fault(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return fault


def endless(event: object) -> Fault:
    """Send the same event again and again, until the caller gives up."""

    async def fault(proxy: FaultProxy, seen: Seen, content: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        block = streamed(event).removeprefix(STREAM)
        try:
            while not seen.gone.is_set():
                writer.write(block)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            seen.gone.set()

    return fault


def status(code: int, content: object, **headers: str) -> Fault:
    """Write a response with that status; a body that is not a text is sent as JSON."""
    body = (content if isinstance(content, str) else json.dumps(content)).encode()
    lines = [f"HTTP/1.1 {code} Whatever", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)


def streamed(*events: object) -> bytes:
    """Write a stream of those events; an event that is not a text is sent as JSON."""
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return STREAM + "".join(lines).encode()


def stream(*events: object) -> Fault:
    """Send a stream of those events, and end the connection."""
    return raw(streamed(*events))


def piece(text: str | None = None, end: str | None = None, **delta: object) -> dict[str, Any]:
    """Make an event of a stream."""
    return {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": end}]}


async def _asked(proxy: FaultProxy, seen: Seen, content: bytes) -> Any:
    reader, writer = await asyncio.open_connection(*proxy.upstream)
    try:
        kept = {name: value for name, value in seen.headers.items() if name not in ("host", "connection")}
        lines = [f"POST {seen.path} HTTP/1.1" if content else f"GET {seen.path} HTTP/1.1", "Host: engine"]
        lines += [f"{name}: {value}" for name, value in kept.items()]
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + content)
        while not seen.gone.is_set() and (block := await reader.read(1 << 16)):
            yield block
    finally:
        writer.close()
