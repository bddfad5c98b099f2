"""Rows about clients: leaving at every point of a request, mass cancellation, slow and silent connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

from .rig import (
    API,
    DIALECTS,
    V1,
    Engine,
    Link,
    Reply,
    Result,
    Seen,
    World,
    ask,
    asking,
    at_once,
    hang_up,
    judge,
    nonce,
    quantile,
    request_bytes,
    until,
    words_for,
)

POINTS = (
    "half a body",
    "just sent",
    "in the queue",
    "the engine thinks",
    "the engine's head is here",
    "in mid-answer",
    "answer unread",
)
LEAVE_WITHIN = 1.0
FORMS = ("plain", "pipelined", "HTTP/1.0")  # pipelined: another request lies behind, unread
KEY = "faults-key"
WAYS = ("reset", "fin", "half-closed")  # half-closed: the client says that it sends no more, and goes a moment later


def think(engine: Engine, seen: Seen) -> Reply | None:
    """Nothing comes, not even a head."""
    return Reply(status=0, end="stall")


def head_only(engine: Engine, seen: Seen) -> Reply | None:
    """The head, and not one byte of the answer."""
    usual = engine.usual(seen)
    return Reply(headers=usual.headers, pieces=[b""], end="stall", chunked=True)


def mid_answer(engine: Engine, seen: Seen) -> Reply | None:
    """A first part of the answer, then silence."""
    usual = engine.usual(seen)
    if len(usual.pieces) == 1:
        return Reply(headers=usual.headers, pieces=[usual.pieces[0][:60], b""], end="stall", chunked=True)
    return Reply(headers=usual.headers, pieces=list(usual.pieces[:3]), end="stall", chunked=True)


def flood(engine: Engine, seen: Seen) -> Reply | None:
    """More than all buffers between hold: the client that does not read stops the engine, until it leaves."""
    usual = engine.usual(seen)
    if len(usual.pieces) == 1:
        return mid_answer(engine, seen)
    return Reply(headers=usual.headers, pieces=[usual.pieces[1]] * 60_000, chunked=True)


HOW: dict[str, Callable[[Engine, Seen], Reply | None] | None] = {
    "half a body": think,
    "just sent": think,
    "in the queue": think,
    "the engine thinks": think,
    "the engine's head is here": head_only,
    "in mid-answer": mid_answer,
    "answer unread": flood,
}


class Keyed(World):
    """By HTTP/1.0, which proxies speak, nobody gets in without a key."""

    def __init__(self, *args: str, off: str | None = None) -> None:
        super().__init__("--api-key", KEY, *args, off=off)
        self.key = {"authorization": f"Bearer {KEY}"}


async def leave_all(world: World, found: Result, point: str, dialect: Any, stream: bool, n: int) -> float:
    """`n` clients come to that point together and go; seconds until no upstream connection carries a generation."""
    engine = world.engines[dialect]
    engine.how = HOW[point]
    links = [Link(world.port) for _ in range(n)]
    for number, link in enumerate(links):
        _, writer = await link.open()
        writer.write(asked_as(FORMS[number % len(FORMS)], point, dialect, number % 2 == 1, stream))
        await writer.drain()
    if point in ("the engine thinks", "the engine's head is here", "in mid-answer", "answer unread"):
        found.need(
            await until(lambda: engine.live >= n, 5),
            f"{point}, {dialect}: only {engine.live} of {n} requests reached the engine",
        )
    if point == "in mid-answer" and stream:
        for link in links:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.reader.readuntil(b"data: "), 2)
    if point == "answer unread":
        await asyncio.sleep(0.2)  # buffers fill
    if point == "in the queue":
        found.need(await until_waiting(world, n), f"{point}: {n} did not come to wait")
    left = time.monotonic()
    await go(links)
    if point in ("half a body", "just sent"):  # what was sent may reach the engine after the client has gone
        await asyncio.sleep(0.3)
    holders = 1 if point == "in the queue" else 0
    gone = await until(lambda: engine.live <= holders, LEAVE_WITHIN - (time.monotonic() - left))
    seconds = time.monotonic() - left
    still = max(0, engine.live - holders)
    if point == "in the queue":
        found.need(await until_waiting(world, 0), f"{point}: the queue still holds somebody who left")
    found.n += n
    found.bad += [
        f"{point}, {dialect}, {'stream' if stream else 'whole'}: upstream connection open after {LEAVE_WITHIN:g} s"
    ] * (0 if gone else still)
    if not gone:
        await until(lambda: engine.live <= holders, 5)
    return seconds


def asked_as(form: str, point: str, dialect: str, v1: bool, stream: bool) -> bytes:
    """The request in that form, as far as it comes."""
    body = json.dumps(asking(dialect, nonce(), v1=v1, stream=stream)).encode()
    raw = request_bytes(V1 if v1 else API, body, {"authorization": f"Bearer {KEY}"})
    if form == "HTTP/1.0":
        raw = raw.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
    if point == "half a body":
        return raw[:-20]
    return raw + request_bytes("/health", None, method="GET") * (form == "pipelined")


async def go(links: list[Link]) -> None:
    """All leave, each form of request in each way."""
    ways = {link: WAYS[number // len(FORMS) % len(WAYS)] for number, link in enumerate(links)}
    for link, way in ways.items():
        assert link.writer is not None
        if way == "half-closed":
            with contextlib.suppress(OSError):
                link.writer.write_eof()
        else:
            hang_up(link.writer, way)
    await asyncio.sleep(0.1)
    for link, way in ways.items():
        if way == "half-closed" and link.writer is not None:
            hang_up(link.writer, "fin")


async def until_waiting(world: World, n: int) -> bool:
    """Whether that many requests come to wait for admission, as /ready tells."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        state = json.loads((await ask(world.port, "/ready", method="GET")).body)
        if state["waiting"] == n:
            return True
        await asyncio.sleep(0.02)
    return False


async def client_leaves(full: bool, off: str | None = None, focus: str = "") -> Result:
    """7 points x 4 dialects x whole/stream, on both surfaces, each form of request and way to go: 1 s after the client
    left nothing of it is open upstream."""
    found, each = Result(), 54 if full else 9
    points = [point for point in POINTS if focus in point]
    worst: dict[str, float] = {}
    async with Keyed(off=off) as world:
        for point, dialect, stream in itertools.product(
            [p for p in points if p != "in the queue"], DIALECTS if not focus else ("vllm", "ollama"), (False, True)
        ):
            worst[point] = max(worst.get(point, 0.0), await leave_all(world, found, point, dialect, stream, each))
        for engine in world.engines.values():
            engine.how = None
        await healthy(world, found, "afterwards")
        await world.census(found)
    if "in the queue" in points:
        async with Keyed("--max-in-flight", "1", "--queue", "64", off=off) as world:
            for dialect, stream in itertools.product(DIALECTS, (False, True)):
                engine = world.engines[dialect]
                engine.how = think
                async with Link(world.port) as holder:
                    _, writer = await holder.open()
                    writer.write(asked_as("plain", "", dialect, False, True))
                    await until(lambda e=engine: e.live == 1, 5)  # type: ignore[misc]
                    worst["in the queue"] = max(
                        worst.get("in the queue", 0.0),
                        await leave_all(world, found, "in the queue", dialect, stream, each),
                    )
                await until(lambda e=engine: e.live == 0, 5)  # type: ignore[misc]
                engine.how = None
            await healthy(world, found, "afterwards")
            await world.census(found)
    found.figures["slowest_s"] = {point: round(seconds, 2) for point, seconds in worst.items()}
    return found


async def healthy(world: World, found: Result, when: str, n: int = 16) -> None:
    """Good requests are answered whole by every engine."""
    wrong: list[str] = []

    async def one(number: int) -> None:
        name, dialect, v1, stream = nonce(), DIALECTS[number % 4], number // 4 % 2 == 1, number // 8 % 2 == 1
        body = asking(dialect, name, v1=v1, stream=stream)
        answer = await ask(world.port, V1 if v1 else API, body, headers=world.key)
        if judge(answer, v1=v1, stream=stream) != ("good", words_for(name)):
            wrong.append(f"{when}: {dialect}: {judge(answer, v1=v1, stream=stream)}")

    await at_once(range(n), one, 8)
    found.figures["good afterwards"] = f"{n - len(wrong)} of {n}"
    found.bad += wrong


async def cancels(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Thousands of requests cancelled at all moments, then 200 good ones: all of them are answered."""
    found, many = Result(), 10_000 if full else 600
    async with World(off=off) as world:
        for engine in world.engines.values():
            engine.pace = 0.005

        async def cancel(number: int) -> None:
            dialect, v1, stream = DIALECTS[number % 4], number // 4 % 2 == 1, number // 8 % 2 == 1
            link = Link(world.port)
            _, writer = await link.open()
            writer.write(request_bytes(V1 if v1 else API, asking(dialect, nonce(), v1=v1, stream=stream)))
            await asyncio.sleep(number % 97 / 97 * 0.08)
            hang_up(writer, "reset" if number % 2 else "fin")

        await at_once(range(many), cancel, 64)
        found.need(await until(lambda: world.live() == 0, 5), f"{world.live()} generations live on after all have gone")
        for engine in world.engines.values():
            engine.pace = 0.0
        found.figures["cancelled"], found.figures["of them seen by an engine"] = many, world.generations() - 16
        await healthy(world, found, "after the cancels", 200)
        found.n = many
        await world.census(found)
    return found


# ----------------------------------------------------------------------------------------------------- slow and idle

LIMITS = {"header_timeout": 1.0, "body_timeout": 2.0, "keep_alive": 5.0}
GRACE = 1.0  # seconds past the limit


async def idle_after_answer(port: int, give_up: float) -> float:
    """A good request, then silence on the connection: seconds until it is closed."""
    async with Link(port) as link:
        await link.ask(request_bytes("/health", None, method="GET"))
        if link.writer is None:
            return 0.0
        began = time.monotonic()
        with contextlib.suppress(TimeoutError, OSError):
            await asyncio.wait_for(link.reader.read(), give_up)
        return time.monotonic() - began


async def slow_clients(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Slow headers, slow bodies, silent and idle connections beside good clients: closed at their limit, the good ones
    served."""
    found, n = Result(), 1000 if full else 80
    body = json.dumps(asking("vllm", nonce(), v1=False, stream=False)).encode()
    raw = request_bytes(API, body)
    head = raw[: -len(body)]
    give_up = max(LIMITS.values()) + 3
    kinds: dict[str, tuple[float, Callable[[int], Any]]] = {
        "silent": (LIMITS["header_timeout"], lambda port: send_then_wait(port, b"", give_up)),
        "slow header": (LIMITS["header_timeout"], lambda port: send_then_wait(port, b"", give_up, head)),
        "header, then silence": (LIMITS["body_timeout"], lambda port: send_then_wait(port, head, give_up)),
        "slow body": (LIMITS["body_timeout"], lambda port: send_then_wait(port, head, give_up, body)),
        "half a head, half-closed": (
            LIMITS["header_timeout"],
            lambda port: send_then_wait(port, head[:30], give_up, half_close=True),
        ),
        "idle": (LIMITS["keep_alive"], lambda port: idle_after_answer(port, give_up)),
    }
    kinds = {name: kind for name, kind in kinds.items() if focus in name}
    async with World(off=off, settings=LIMITS) as world:
        late: dict[str, list[float]] = {name: [] for name in kinds}
        good: list[bool] = []

        async def slow(number: int) -> None:
            name = list(kinds)[number % len(kinds)]
            limit, run = kinds[name]
            seconds = await run(world.port)
            late[name].append(seconds - limit)
            found.check(seconds <= limit + GRACE, f"{name}: not closed within {limit:g} + {GRACE:g} s")

        async def good_client() -> None:
            while not over.is_set():
                name = nonce()
                answer = await ask(world.port, API, asking("vllm", name, v1=False, stream=False))
                good.append(judge(answer, v1=False, stream=False) == ("good", words_for(name)))
                await asyncio.sleep(0.02)

        over = asyncio.Event()
        beside = [asyncio.ensure_future(good_client()) for _ in range(4)]
        await at_once(range(n), slow, 250)
        over.set()
        await asyncio.gather(*beside)
        found.need(good and all(good), f"{good.count(False)} of {len(good)} good clients were not served")
        found.figures |= {"good clients": f"{good.count(True)} of {len(good)}", "limits_s": LIMITS}
        found.figures["p99_past_limit_s"] = {
            name: round(quantile(values, 0.99), 2) for name, values in late.items() if values
        }
        await world.census(found)
    return found


async def send_then_wait(port: int, raw: bytes, give_up: float, slowly: bytes = b"", half_close: bool = False) -> float:
    """Send at once, then (slowly or not at all) the rest: seconds until the server has closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    writer.write(raw)
    if half_close:
        writer.write_eof()
    heard = asyncio.ensure_future(reader.read())
    for at in range(len(slowly)):
        with contextlib.suppress(OSError):
            writer.write(slowly[at : at + 1])
        if (await asyncio.wait({heard}, timeout=0.1))[0] or time.monotonic() - began > give_up:
            break
    await asyncio.wait({heard}, timeout=max(0.0, give_up - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    heard.cancel()
    await asyncio.gather(heard, return_exceptions=True)
    writer.transport.abort()
    return seconds
