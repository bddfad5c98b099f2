"""A relay before each endpoint of a fleet, which fails on command; and a diary of what reached the endpoints.

Modes: "" (pass), "refuse" (nobody listens, what is open is closed), "close" (accepted and closed at once), "freeze"
(nothing moves until the mode changes), "slow" (answers begin late), "503" and "429" (each chat request gets that
status, `retry_after` with it where it is set)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Self

from .rig import NONCE

LATE = 0.25  # seconds, in the mode "slow"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
STATUSES = {"503": b"503 Service Unavailable", "429": b"429 Too Many Requests"}


@dataclass(frozen=True, slots=True)
class Entry:
    at: float
    endpoint: str
    what: str  # "connection", "list" (any request that is no chat), "chat", "first" (an answer's first byte)
    nonce: str = ""


@dataclass
class Diary:
    """What reached the endpoints, in its order."""

    entries: list[Entry] = field(default_factory=list)

    def note(self, endpoint: str, what: str, nonce: str = "") -> None:
        self.entries.append(Entry(time.monotonic(), endpoint, what, nonce))

    def of(self, endpoint: str, since: float, what: str) -> list[float]:
        """When that happened at an endpoint."""
        return [e.at for e in self.entries if e.endpoint == endpoint and e.what == what and e.at >= since]

    def by_request(self) -> dict[str, list[Entry]]:
        """Each request's way: where it was sent, and where an answer to it began."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.nonce:
                found[entry.nonce].append(entry)
        return found


@dataclass
class Exchange:
    """One connection: the request that it carries, and how far the reply has come."""

    nonce: str = ""
    head: bytes = b""
    begun: bool = False


class Relay:
    """One port before an endpoint's own."""

    def __init__(self, name: str, target: int, diary: Diary) -> None:
        self.name, self.target, self.diary = name, target, diary
        self.mode, self.retry_after, self.port = "", 0, 0
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._moving = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._moving.set()
        await self._listen()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def set(self, mode: str, retry_after: int = 0) -> None:
        was, self.mode, self.retry_after = self.mode, mode, retry_after
        if was == "refuse" and mode != "refuse":
            await self._listen()
        if mode == "refuse" and was != "refuse":
            self._server.close()
        if mode in ("refuse", "close"):
            for task in list(self._open):
                task.cancel()
        (self._moving.clear if mode == "freeze" else self._moving.set)()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        self.diary.note(self.name, "connection")
        try:
            if self.mode not in ("close", "refuse"):
                await self._carry(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # either side has gone, or the mode says so
        finally:
            del self._open[task]
            writer.close()  # not abort(): what was sent is to arrive

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
        exchange = Exchange()
        both = [
            asyncio.ensure_future(self._requests(reader, writer, upstream, exchange)),
            asyncio.ensure_future(self._replies(up_reader, writer, exchange)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            upstream.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
        exchange: Exchange,
    ) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            nonce = NONCE.search(body.decode(errors="replace"))
            exchange.nonce, exchange.head, exchange.begun = nonce[0] if nonce else "", b"", False
            self.diary.note(self.name, "chat" if nonce else "list", exchange.nonce)
            await self._moving.wait()
            if nonce and self.mode in STATUSES:
                writer.write(self._refusal())
                continue
            upstream.write(head + body)

    def _refusal(self) -> bytes:
        body = b'{"error":"the fault says so"}'
        lines = [b"HTTP/1.1 " + STATUSES[self.mode], b"content-type: application/json"]
        lines.append(b"content-length: %d" % len(body))
        if self.retry_after:
            lines.append(b"retry-after: %d" % self.retry_after)
        return b"\r\n".join([*lines, b"", body])

    async def _replies(self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        while data := await up_reader.read(65536):
            await self._moving.wait()
            if self.mode == "slow" and not exchange.head:
                await asyncio.sleep(LATE)
            writer.write(data)
            self._note_first(exchange, data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()

    def _note_first(self, exchange: Exchange, data: bytes) -> None:
        """Notes the first byte of a good answer's body."""
        if exchange.begun or not exchange.nonce:
            return
        exchange.head += data
        head, end, body = exchange.head.partition(b"\r\n\r\n")
        if end and body and head.split(b" ", 2)[1] == b"200":
            exchange.begun = True
            self.diary.note(self.name, "first", exchange.nonce)
