"""Rows about load: open-loop arrivals beyond capacity, and a long run with memory and descriptors watched."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator

from .rig import (
    API,
    DIALECTS,
    V1,
    Json,
    Link,
    Reply,
    Result,
    World,
    ask,
    asking,
    judge,
    nonce,
    quantile,
    request_bytes,
    words_for,
)

SERVICE = 0.1  # seconds an answer takes the engine
SEATS = 8
HANGS = 5.0
REFUSAL_P99 = 0.020
IDLE_SERVER = """
import asyncio
async def serve(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\nconnection: close\\r\\n\\r\\n{}")
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def yardstick(into: Json) -> AsyncIterator[None]:
    """A server that does nothing else, asked by this same client meanwhile: how late machine and client are by
    themselves."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", IDLE_SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    port, took, over = int(await process.stdout.readline()), list[float](), asyncio.Event()

    async def measure() -> None:
        while not over.is_set():
            took.append((await ask(port, "/", method="GET")).seconds)
            await asyncio.sleep(0.005)

    measuring = asyncio.ensure_future(measure())
    try:
        yield
    finally:
        over.set()
        await measuring
        process.kill()
        await process.wait()
        into["yardstick_p99_ms"] = round(1e3 * quantile(took, 0.99), 1)


async def arrivals(world: World, rate: float, seconds: float) -> list[tuple[str, float]]:
    """Requests at that rate, whatever becomes of those before; (verdict, seconds) of each."""
    loop, outcomes, running = asyncio.get_running_loop(), list[tuple[str, float]](), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        name, stream = nonce(), number % 2 == 1
        answer = await ask(world.port, API, asking("vllm", name, v1=False, stream=stream), timeout=HANGS)
        kind, text = judge(answer, v1=False, stream=stream)
        if kind == "good" and text != words_for(name):
            kind = "!another text"
        if kind == "busy" and not answer.headers.get("retry-after", "").isdigit():
            kind = "!429 without Retry-After"
        outcomes.append((kind, answer.seconds))

    began, number = loop.time(), 0
    while (now := loop.time() - began) < seconds:
        for _ in range(int(now * rate) - number):
            task = loop.create_task(one(number))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
        await asyncio.sleep(0.002)
    while running:
        await asyncio.wait(set(running))
    return outcomes


async def overload(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Open-loop load to 10 x capacity: goodput stays, refusals are quick and say when to come again, nobody hangs."""
    found, capacity = Result(), SEATS / SERVICE
    async with World("--max-in-flight", str(SEATS), "--queue", str(SEATS), off=off) as world:
        engine = world.engines["vllm"]
        tokens = len(words_for(nonce()).split())

        def steady(engine, seen):  # type: ignore[no-untyped-def]
            usual = engine.usual(seen)
            return Reply(
                status=usual.status, headers=usual.headers, pieces=[b"".join(usual.pieces)], delay=SERVICE, chunked=True
            )

        engine.how = steady
        peak_time, time_each = (8.0, 60.0) if full else (2.0, 5.0)
        peak = sum(kind == "good" for kind, _ in await arrivals(world, capacity, peak_time)) / peak_time
        for times in (2, 5, 10) if full else (10,):
            seconds = time_each if times == 10 else 10.0
            async with yardstick(found.figures):
                outcomes = await arrivals(world, times * capacity, seconds)
            kinds = Counter(kind for kind, _ in outcomes)
            refused = [took for kind, took in outcomes if kind == "busy"]
            goodput = kinds["good"] / seconds
            p99, beside = quantile(refused, 0.99), found.figures["yardstick_p99_ms"] / 1e3
            found.n += len(outcomes)
            found.bad += [
                f"{kind} at {times} x"
                for kind in kinds.elements()
                if kind.startswith("!") or kind not in ("good", "busy")
            ]
            found.need(goodput >= 0.9 * peak, f"goodput {goodput:.1f}/s at {times} x, the peak was {peak:.1f}/s")
            found.need(refused, f"nobody was refused at {times} x capacity")
            found.need(
                not full or p99 <= REFUSAL_P99 + beside,
                f"refusals at {times} x: p99 {1e3 * p99:.1f} ms beside a yardstick of {1e3 * beside:.1f} ms",
            )
            waits = [took for kind, took in outcomes if kind == "good"]
            found.need(max(waits, default=0) < 1.0, f"a good answer at {times} x took {max(waits, default=0):.1f} s")
            found.figures[f"{times}x"] = {
                "arrivals_per_s": times * capacity,
                "seconds": seconds,
                "goodput_per_s": round(goodput, 1),
                "refused": len(refused),
                "refusal_p50_ms": round(1e3 * quantile(refused, 0.5), 1),
                "refusal_p99_ms": round(1e3 * p99, 1),
                "good_p99_s": round(quantile(waits, 0.99), 2),
            }
        engine.how = None
        found.figures |= {"peak_per_s": round(peak, 1), "tokens": tokens}
        await world.census(found)
    return found


async def soak(full: bool, off: str | None = None, focus: str = "") -> Result:
    """A steady mix of good, bad and abandoned requests: descriptors stay, memory stays."""
    found, seconds = Result(), 600.0 if full else 12.0
    async with World(off=off) as world:
        loop = asyncio.get_running_loop()
        done = 0

        async def caller(number: int, until: float) -> None:
            nonlocal done
            async with Link(world.port) as link:
                turn = number
                while loop.time() < until:
                    turn += 1
                    dialect, v1, stream, name = DIALECTS[turn % 4], turn // 4 % 2 == 1, turn // 8 % 2 == 1, nonce()
                    body: Json = asking(dialect, name, v1=v1, stream=stream)
                    if turn % 17 == 0:  # a bad one
                        body["max_tokens"] = -2
                    if turn % 23 == 0:  # one that leaves
                        await link.ask(request_bytes(V1 if v1 else API, body), timeout=0.002)
                        continue
                    answer = await link.ask(request_bytes(V1 if v1 else API, body))
                    kind, text = judge(answer, v1=v1, stream=stream)
                    fine = kind == "invalid_request" if turn % 17 == 0 else (kind, text) == ("good", words_for(name))
                    found.check(
                        fine,
                        f"{dialect} {'v1' if v1 else 'api'} {'stream' if stream else 'whole'}: {kind} {text[:30]!r}",
                    )
                    done += 1

        async def load(period: float) -> None:
            until = loop.time() + period
            await asyncio.gather(*(caller(number, until) for number in range(8)))

        await load(seconds / 4)  # caches and pools fill
        samples: list[tuple[int, int, int]] = []
        for _ in range(6 if full else 2):
            await load(seconds / (8 if full else 2))
            now, more = await world.at_rest()  # under load the count is the callers' and the pool's, whatever leaks
            found.need(not more, f"at rest after {done} requests, more than before: {more}")
            samples.append((done, now["fds"], now["rss"]))
        counts, fds, rss = (list(column) for column in zip(*samples, strict=True))
        fd_slope = statistics.linear_regression(counts, fds).slope * 1e5
        per_100k = statistics.linear_regression(counts, rss).slope * 1e5 / 1e6
        found.figures |= {
            "requests": done,
            "seconds": seconds,
            "fds": fds,
            "rss_MB": [round(each / 1e6, 1) for each in rss],
            "fds_per_100k": round(fd_slope, 2),
            "MB_per_100k": round(per_100k, 2),
        }
        growth = (rss[-1] - rss[0]) / 1e6
        # a short run is too short for a slope: one page of noise is then megabytes per 100,000
        found.need(
            per_100k <= 0.5 if full else growth <= 2.0,
            f"memory: {per_100k:.2f} MB per 100,000 requests ({growth:+.1f} MB)",
        )
        await world.census(found)
    return found
