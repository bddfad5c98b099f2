"""Rows about engines killed or frozen in mid-answer (the embedded one too), and about our own end by kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

from tests import kill_loop
from tests.processes import ROOT, descendants

from .network import BROKEN
from .rig import API, DIALECTS, KINDS, URL_ENV, V1, Link, Result, Server, ask, asking, judge, request_bytes

TYPED_WITHIN = 1.0
DEADLINES = {"connect": 1.0, "first_token": 1.0, "idle": 1.0, "total": 20.0}


class EngineProcess:
    """A scripted engine as a process; started again it keeps its port."""

    def __init__(self, dialect: str, pace: float) -> None:
        self.dialect, self.pace, self.port = dialect, pace, 0

    def start(self) -> None:
        argv = [sys.executable, "-m", "tests.faults.engine_process", self.dialect, str(self.port), str(self.pace)]
        self.process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


async def in_mid_answer(port: int, body: Any, path: str, strike: Any) -> tuple[str, float]:
    """Ask for a stream, strike after its first event: how it ended, and how many seconds after the stroke."""
    async with Link(port) as link:
        reader, writer = await link.open()
        writer.write(request_bytes(path, body))
        head = await asyncio.wait_for(reader.readuntil(b"data: "), 10)
        began = time.monotonic()
        strike()
        with contextlib.suppress(TimeoutError):
            rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
            text = (head + rest).decode(errors="replace")
            kind = next((kind for kind in KINDS if f'"{kind}"' in text or f'"msg":"{kind}:' in text), "!no typed error")
            return ("!an error, and [DONE]" if "[DONE]" in text else kind), time.monotonic() - began
        return "!hung", time.monotonic() - began


async def until_good(port: int, path: str, dialect: str, v1: bool) -> tuple[str, float]:
    """Asks until the answer is good, for 5 s at most: the last verdict, and how long that took."""
    began = time.monotonic()
    while True:
        answer = await ask(port, path, asking(dialect, "hi", v1=v1, stream=False))
        kind, _ = judge(answer, v1=v1, stream=False)
        spent = time.monotonic() - began
        if kind == "good" or spent > 5:
            return kind, spent
        await asyncio.sleep(0.05)


async def engine_ends(full: bool, off: str | None, signal_number: int, rounds: int, found: Result) -> None:
    frozen = signal_number == signal.SIGSTOP
    kinds = {"engine_timeout"} if frozen else BROKEN
    within = DEADLINES["idle"] + 0.5 if frozen else TYPED_WITHIN
    slowest, recovered = 0.0, list[float]()
    for dialect in DIALECTS:
        engine = EngineProcess(dialect, 0.05)
        engine.start()
        server = Server(
            "--engine",
            dialect,
            off=off,
            settings={"deadlines": DEADLINES},
            env={URL_ENV[dialect]: f"http://127.0.0.1:{engine.port}"},
        )
        try:
            await asyncio.to_thread(server.__enter__)
            for number in range(rounds):
                v1 = number % 2 == 1
                path, body = (V1 if v1 else API), asking(dialect, "hi", v1=v1, stream=True)
                kind, seconds = await in_mid_answer(server.port, body, path, lambda e=engine: e.send(signal_number))
                slowest = max(slowest, seconds)
                found.check(
                    kind in kinds and seconds <= within,
                    f"{dialect}, {'v1' if v1 else 'api'}: {kind} after {seconds:.2f} s",
                )
                # the engine is still away
                answer = await ask(server.port, path, asking(dialect, "hi", v1=v1, stream=True))
                kind, _ = judge(answer, v1=v1, stream=True)
                found.need(
                    kind in kinds and answer.seconds <= within,
                    f"{dialect}, while it is away: {kind} after {answer.seconds:.2f} s",
                )
                if frozen:
                    engine.send(signal.SIGCONT)
                else:
                    engine.kill()
                    engine.start()
                kind, seconds = await until_good(server.port, path, dialect, v1)
                recovered.append(seconds)
                found.need(kind == "good", f"{dialect}: not recovered within 5 s: {kind}")
        finally:
            await asyncio.to_thread(server.__exit__)
            engine.send(signal.SIGCONT)
            engine.kill()
    found.figures |= {"slowest_typed_s": round(slowest, 2), "slowest_recovery_s": round(max(recovered, default=0), 2)}


async def engine_killed(full: bool, off: str | None = None, focus: str = "") -> Result:
    """An engine's process is killed -9 in mid-answer: a typed error within a second, refused fast while away, good
    again when it is back."""
    found = Result()
    await engine_ends(full, off, signal.SIGKILL, 25 if full else 2, found)
    await embedded_killed(3 if full else 1, found)
    return found


async def engine_frozen(full: bool, off: str | None = None, focus: str = "") -> Result:
    """An engine's process is stopped (SIGSTOP) in mid-answer: the idle deadline ends it, and it goes on when the engine
    does."""
    found = Result()
    await engine_ends(full, off, signal.SIGSTOP, 8 if full else 1, found)
    return found


def embedded_engine(server: Server) -> int:
    """The process of the embedded engine: the server's grandchild, below its watcher."""
    watchers = descendants(server.process.pid)
    return next(pid for pid in watchers if not descendants(pid))


async def embedded_killed(rounds: int, found: Result) -> None:
    """The real embedded llama.cpp is killed -9 under a stream: typed within a second, and started again by us."""
    server = Server("--engine", "llamacpp", settings={"deadlines": {**DEADLINES, "first_token": 20.0}})
    recovered: list[float] = []
    try:
        await asyncio.to_thread(server.__enter__)
        body = {"prompt": "Count from one to one hundred, in words.", "max_tokens": 300, "stream": True}
        for _ in range(rounds):
            kind, seconds = await in_mid_answer(
                server.port, body, "/api/v1/llm/generate", lambda: os.kill(embedded_engine(server), signal.SIGKILL)
            )
            found.check(kind in BROKEN and seconds <= TYPED_WITHIN, f"embedded: {kind} after {seconds:.2f} s")
            began = time.monotonic()
            while time.monotonic() - began < 30:
                answer = await ask(server.port, "/api/v1/llm/generate", {"prompt": "hi", "max_tokens": 2}, timeout=30)
                if answer.status == 200:
                    break
                await asyncio.sleep(0.2)
            recovered.append(time.monotonic() - began)
            found.need(answer.status == 200, f"embedded: not started again within 30 s: {answer.body[:200]!r}")
        found.figures["embedded_started_again_s"] = round(max(recovered), 1)
    finally:
        await asyncio.to_thread(server.__exit__)


async def parent_killed(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Our process is killed -9 (or interrupted, or returns) with the embedded engine under it: nothing is left after 2
    s."""
    found, rounds = Result(), 100 if full else 3
    spent: dict[str, list[float]] = {}
    for number in range(rounds):
        end = kill_loop.ENDS[number % 3] if number % 2 else "SIGKILL"
        seconds = await asyncio.to_thread(kill_loop.one_round, end)
        spent.setdefault(end, []).append(seconds)
        found.check(seconds <= 2.0, f"{end}: a descendant lived for {seconds:.1f} s")
    found.figures = {end: {"n": len(all_), "slowest_s": round(max(all_), 2)} for end, all_ in spent.items()}
    return found
