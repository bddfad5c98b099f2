"""An asyncio fault proxy before each engine. The prompt names the fault, so that faults of all kinds run side by side:

    [[reset@b40]]   40 bytes into the reply's body the connection is reset

Faults: latency, slice, slow (good in the end); reset, fin (half-close), stall, corrupt, at a place: hN (bytes into the
head), bN (bytes into the body), tN (N bytes before the end). For a whole port, by `mode`: `limit` (closed as soon as it
is accepted), `hole` (accepted, never answered), `refuse` (nobody listens)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

MARK = re.compile(rb"\[\[(latency|slice|slow|reset|fin|stall|corrupt)(?:@([hbt])(\d+))?\]\]")
NONCE = re.compile(rb"nonce-[0-9a-f]{12}")
NULS = bytes(16)
#: bytes a write: within a character, a line end, an event, across two of them; 3 each would take a busy machine past
#: the total deadline
SLICES = (3, 1, 2, 17, 3, 101)


@dataclass
class Fault:
    kind: str
    place: str
    offset: int
    nonce: str


def place_of(fault: Fault, reply: bytes) -> tuple[int | None, int]:
    """Where the fault strikes, once that is known; and how far one may send before it is."""
    head = reply.find(b"\r\n\r\n") + 4
    if fault.place == "h":
        return fault.offset, fault.offset
    if fault.place == "b":
        return (head + fault.offset, head + fault.offset) if head > 3 else (None, len(reply))
    if head > 3 and is_whole(reply, head):
        return len(reply) - fault.offset, len(reply) - fault.offset
    return None, max(0, len(reply) - fault.offset)


def is_whole(reply: bytes, head: int) -> bool:
    if found := re.search(rb"(?i)content-length: *(\d+)", reply[:head]):
        return len(reply) >= head + int(found[1])
    return reply.endswith(b"\r\n0\r\n\r\n")


class Proxies:
    """One port before each target, all in one thread; `applied` has the nonces of the requests that a fault has
    struck."""

    def __init__(self, targets: Mapping[str, int]) -> None:
        self.targets = dict(targets)
        self.ports: dict[str, int] = {}
        self.mode: dict[str, str] = {}
        self.applied: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="proxies", daemon=True)
        self._thread.start()
        assert ready.wait(10), "the proxies did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._servers: dict[str, asyncio.Server] = {}
        for name in self.targets:
            await self._listen(name)
        ready.set()
        await self._stopped.wait()
        for server in self._servers.values():
            server.close()
        for task in self._tasks:
            task.cancel()

    async def _listen(self, name: str) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(name, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", self.ports.get(name, 0), backlog=2048)
        self.ports[name], self._servers[name] = server.sockets[0].getsockname()[1], server

    def set_mode(self, name: str, mode: str) -> None:
        """ "" (pass), "limit", "hole", "refuse": of connections that come from now on."""
        asyncio.run_coroutine_threadsafe(self._set_mode(name, mode), self._loop).result(10)

    async def _set_mode(self, name: str, mode: str) -> None:
        was, self.mode[name] = self.mode.get(name, ""), mode
        if mode == "refuse" and was != "refuse":
            self._servers[name].close()
        elif was == "refuse" and mode != "refuse":
            await self._listen(name)

    async def _serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            mode = self.mode.get(name, "")
            if mode == "limit":
                return
            if mode == "hole":
                while await reader.read(65536):
                    pass
                return
            up_reader, upstream = await asyncio.open_connection("127.0.0.1", self.targets[name])
            await Exchange(self, reader, writer, up_reader, upstream).run()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for each in (writer, upstream):
                if each is not None:
                    each.transport.abort() if each is upstream else each.close()


class Exchange:
    """One connection and its engine's: requests pass as they are, replies as the request's fault has it."""

    def __init__(
        self,
        owner: Proxies,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        self.owner, self.reader, self.writer, self.up_reader, self.upstream = owner, reader, writer, up_reader, upstream
        self.asked, self.reply, self.sent = b"", b"", 0
        self.fault: Fault | None = None

    async def run(self) -> None:
        there, back = asyncio.ensure_future(self._requests()), asyncio.ensure_future(self._replies())
        _, pending = await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(there, back, return_exceptions=True)

    async def _requests(self) -> None:
        while data := await self.reader.read(65536):
            if self.reply:  # the next request
                self.asked, self.reply, self.sent, self.fault = b"", b"", 0, None
            self.asked += data
            if self.fault is None and (found := MARK.search(self.asked)):
                nonce = NONCE.search(self.asked)
                self.fault = Fault(
                    found[1].decode(),
                    (found[2] or b"").decode(),
                    int(found[3] or 0),
                    nonce[0].decode() if nonce else "",
                )
            self.upstream.write(data)
            await self.upstream.drain()

    async def _replies(self) -> None:
        while data := await self.up_reader.read(65536):
            self.reply += data
            if self.fault is None:
                self.writer.write(data)
                await self.writer.drain()
            elif self.fault.kind in ("latency", "slice", "slow"):
                await self._dawdle(self.fault, data)
            elif await self._strike(self.fault):
                return

    async def _dawdle(self, fault: Fault, data: bytes) -> None:
        self.owner.applied.add(fault.nonce)
        sizes, pause = {"latency": ((len(data),), 0.05), "slice": (SLICES, 0.0), "slow": ((1024,), 0.02)}[fault.kind]
        at = 0
        for size in itertools.cycle(sizes):
            await asyncio.sleep(pause)
            self.writer.write(data[at : at + size])
            await self.writer.drain()
            at += size
            if at >= len(data):
                return

    async def _strike(self, fault: Fault) -> bool:
        """Pass on what comes before the place; at the place, strike. True: the connection is over."""
        place, safe = place_of(fault, self.reply)
        if place is None or len(self.reply) <= place:
            part = self.reply[self.sent : min(safe, len(self.reply))]
            self.sent += len(part)
            self.writer.write(part)
            await self.writer.drain()
            return False
        self.owner.applied.add(fault.nonce)
        if fault.kind == "corrupt":
            self.reply = self.reply[:place] + NULS[: len(self.reply) - place] + self.reply[place + len(NULS) :]
            self.writer.write(self.reply[self.sent :])
            self.sent, self.fault = len(self.reply), None
            return False
        self.writer.write(self.reply[self.sent : place])
        await self.writer.drain()
        if fault.kind == "stall":
            await asyncio.Event().wait()
        if fault.kind == "fin":
            with contextlib.suppress(OSError):
                self.writer.write_eof()
                await asyncio.Event().wait()  # half-closed: it ends when the other side closes
        peer: socket.socket = self.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return True
