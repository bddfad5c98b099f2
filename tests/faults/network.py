"""Rows about the network and faulty engines: each ends in a good answer or a typed error, in time."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gzip
import itertools
import random
import re

from .clients import healthy
from .rig import (
    API,
    DIALECTS,
    V1,
    Engine,
    Reply,
    Result,
    Seen,
    World,
    ask,
    asking,
    at_once,
    first_half,
    judge,
    nonce,
    quantile,
    words_for,
)

DEADLINES = {"connect": 1.0, "first_token": 1.0, "idle": 1.0, "total": 2.0}
GRACE = 0.5
PLACES = ("h0", "h20", "h100", "b0", "b1", "b60", "b200", "t40", "t6", "t1")
PASSING = ("latency", "slice", "slow")  # good in the end
STRIKING = ("reset", "fin", "stall", "corrupt")
BROKEN = {"engine_unavailable", "bad_engine_reply"}
EXPECTED = {"reset": BROKEN, "fin": BROKEN, "corrupt": BROKEN, "stall": {"engine_timeout"}}
#: for these a whole answer is put together from a stream: so they stop when their caller hangs up
ALWAYS_STREAMED = ("sglang", "llamacpp")
ASKED = re.compile(rb"\[\[engine:([\w ]+)\]\]")


@functools.cache
def gzip_bomb() -> bytes:
    return gzip.compress(bytes(50 << 20))


def blown(usual: Reply, size: int) -> Reply:
    """A valid answer, blown up with spaces past every bound (whole: 33 MiB; a streamed line: 9 MiB)."""
    pieces = list(usual.pieces)
    at = 1 if len(pieces) > 1 else 0
    pieces[at] = pieces[at].replace(b",", b"," + b" " * size, 1)
    return dataclasses.replace(usual, pieces=pieces)


def without_finish(usual: Reply) -> Reply:
    """All the text, and no word that it is over."""
    kept = [
        re.sub(rb'"(finish_reason|done_reason)": ?"\w+"', rb'"\1":null', piece).replace(b'"done":true', b'"done":false')
        for piece in usual.pieces
    ]
    return dataclasses.replace(usual, pieces=kept)


def error_event(usual: Reply, dialect: str) -> Reply:
    body = (
        b'{"error":"boom"}' if dialect == "ollama" else b'{"error":{"message":"boom","type":"server_error","code":500}}'
    )
    if len(usual.pieces) == 1:
        return dataclasses.replace(usual, pieces=[body])
    event = body + b"\n" if dialect == "ollama" else b"data: " + body + b"\n\n"
    tail = b"" if dialect == "ollama" else b"data: [DONE]\n\n"
    return dataclasses.replace(usual, pieces=[*usual.pieces[:3], event + tail])


def garbage(usual: Reply) -> Reply:
    half = first_half(usual)
    return dataclasses.replace(
        half, pieces=[*half.pieces, b"\x00\xff\xfe <html>\n\n", *usual.pieces[len(half.pieces) :]]
    )


def aborted(usual: Reply) -> Reply:
    return dataclasses.replace(
        usual,
        pieces=[re.sub(rb'"(finish_reason|done_reason)": ?"\w+"', rb'"\1":"abort"', piece) for piece in usual.pieces],
    )


def mistake(name: str, engine: Engine, usual: Reply) -> Reply:
    """What an engine gets wrong."""
    complete = len(usual.pieces) == 1
    match name:
        case "no http":
            return Reply(status=0, pieces=[b"\x00\x01 this is no HTTP\r\n\r\n"], end="eof")
        case "a web page":
            return Reply(headers={"content-type": "text/html"}, pieces=[b"<html><body>Welcome to nginx</body></html>"])
        case "redirect":
            return Reply(status=302, headers={"location": f"{engine.base_url}/elsewhere"}, pieces=[b""])
        case "gzip bomb":
            return Reply(
                headers={"content-type": "application/json", "content-encoding": "gzip"},
                pieces=[gzip_bomb()],
            )
        case "endless":
            return blown(usual, (33 << 20) if complete else (9 << 20))
        case "error under 200":
            return error_event(usual, engine.dialect)
        case "early end":
            return first_half(usual)
        case "early eof":
            return first_half(usual, end="eof", chunked=True)
        case "no finish":
            return without_finish(usual)
        case "nothing":
            return dataclasses.replace(usual, pieces=[b""])
        case "garbage inside":
            return garbage(usual)
        case "aborted":
            return aborted(usual)
        case "overloaded":
            return Reply(status=503, headers={"content-type": "text/html"}, pieces=[b"<h1>503</h1>"])
        case "crashed":
            return Reply(status=500, pieces=[b""])
    raise LookupError(name)


MISTAKES = {
    "no http": BROKEN,
    "a web page": BROKEN,
    "redirect": BROKEN,
    "gzip bomb": BROKEN,
    "endless": BROKEN | {"engine_timeout"},
    "error under 200": BROKEN,
    "early end": BROKEN,
    "early eof": BROKEN,
    "no finish": BROKEN,
    "nothing": BROKEN,
    "garbage inside": BROKEN,
    "aborted": BROKEN,
    "overloaded": {"engine_overloaded"},
    "crashed": BROKEN,
}


def misbehave(engine: Engine, seen: Seen) -> Reply | None:
    """The prompt names the engine's mistake."""
    found = ASKED.search(seen.body)
    return mistake(found[1].decode(), engine, engine.usual(seen)) if found else None


def network_cases(full: bool, focus: str) -> list[tuple[str, str, bool, bool]]:
    faults = (
        list(PASSING)
        + [f"{kind}@{place}" for kind in STRIKING for place in PLACES]
        + [f"engine:{name}" for name in MISTAKES]
    )
    if not full:  # every fault, at every second place
        faults = [fault for number, fault in enumerate(faults) if "@" not in fault or number % 2]
    cells = [
        (f, d, v1, s)
        for f, d, v1, s in itertools.product(faults, DIALECTS, (False, True), (False, True))
        if focus in f"{f} {d} {'v1' if v1 else 'api'}"
    ]
    cells = cells * (4 if full and not focus else 1)
    random.Random(7).shuffle(cells)
    return cells


async def network(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Faults of the network and of the engines x dialects x surfaces x whole/stream: typed, in time, nothing cut in
    silence."""
    found, cells = Result(), network_cases(full, focus)
    times: list[float] = []
    struck = 0
    gzip_bomb()  # made before anybody waits for it
    async with World(off=off, proxied=True, settings={"deadlines": DEADLINES}) as world:
        for engine in world.engines.values():
            engine.how = misbehave

        async def one(cell: tuple[str, str, bool, bool]) -> None:
            nonlocal struck
            fault, dialect, v1, stream = cell
            name = nonce()
            answer = await ask(
                world.port, V1 if v1 else API, asking(dialect, f"[[{fault}]] {name}", v1=v1, stream=stream), timeout=8
            )
            kind, text = judge(answer, v1=v1, stream=stream)
            hit = fault.startswith("engine:") or name in world.proxies.applied
            struck += hit
            wanted = wanted_kinds(fault, stream or dialect in ALWAYS_STREAMED, hit)
            if hit:
                times.append(answer.seconds)
            limit = (
                (DEADLINES["idle"] if stream else DEADLINES["total"])
                + GRACE
                + (0.8 if fault in PASSING or "endless" in fault else 0.0)
            )
            what = f"{fault}, {dialect}, {'v1' if v1 else 'api'}, {'stream' if stream else 'whole'}"
            found.check(
                kind in wanted and (kind != "good" or text == words_for(name)),
                f"{what}: {kind} {text[:30]!r}, wanted {'/'.join(sorted(wanted))}",
            )
            found.need(words_for(name).startswith(text), f"{what}: other words: {text[:60]!r}")
            found.need(answer.seconds <= limit, f"{what}: {kind} after {answer.seconds:.2f} s")

        await at_once(cells, one, 12)
        if not focus or focus in ("limit", "hole", "refuse"):
            for mode in ("limit", "hole", "refuse"):
                await whole_port(world, found, mode, 4 if full else 1)
        for engine in world.engines.values():
            engine.how = None
        await healthy(world, found, "after the faults")
        found.figures |= {
            "struck": struck,
            "slowest_s": round(max(times, default=0), 2),
            "p50_s": round(quantile(times, 0.5), 2),
            "deadlines_s": DEADLINES,
            "grace_s": GRACE,
        }
        await world.census(found)
    return found


def wanted_kinds(fault: str, stream: bool, hit: bool) -> set[str]:
    if fault.startswith("engine:"):
        return MISTAKES[fault.removeprefix("engine:")]
    kind, _, place = fault.partition("@")
    if kind in PASSING or not hit:  # a reply that was shorter than the place
        return {"good"}
    if place.startswith(
        "t"
    ):  # a broken end of a chunked reply is waited for; and after [DONE] nothing of the answer is missing
        return EXPECTED[kind] | {"engine_timeout"} | ({"good"} if stream else set())
    return EXPECTED[kind]


async def whole_port(world: World, found: Result, mode: str, times: int) -> None:
    """An engine's port that closes at once, never answers, or refuses: typed within the deadline, and good again
    afterwards."""
    for dialect in DIALECTS:
        world.proxies.set_mode(dialect, mode)
    await asyncio.sleep(4.5)  # idle pooled connections pass the old way; after 4 s there are none

    async def one(cell: tuple[str, bool, bool, int]) -> None:
        dialect, v1, stream, _ = cell
        answer = await ask(world.port, V1 if v1 else API, asking(dialect, nonce(), v1=v1, stream=stream), timeout=8)
        kind, _ = judge(answer, v1=v1, stream=stream)
        wanted = {"engine_timeout"} if mode == "hole" else BROKEN
        limit = DEADLINES["total"] + GRACE
        what = f"{mode}, {dialect}, {'v1' if v1 else 'api'}, {'stream' if stream else 'whole'}"
        found.check(kind in wanted, f"{what}: {kind}")
        found.need(answer.seconds <= limit, f"{what}: {kind} after {answer.seconds:.2f} s")

    await at_once(itertools.product(DIALECTS, (False, True), (False, True), range(times)), one, 8)
    for dialect in DIALECTS:
        world.proxies.set_mode(dialect, "")


async def storm(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Faults at random, clients that leave, and good requests, all at once: nobody gets another's answer, the good ones
    are answered."""
    found, seconds, rng = Result(), 600.0 if full else 6.0, random.Random(11)
    faults = (
        [f"{kind}@{place}" for kind in STRIKING for place in PLACES]
        + [*PASSING]
        + [f"engine:{name}" for name in MISTAKES if name not in ("endless", "gzip bomb")]
    )
    good = good_done = left = 0
    async with World(off=off, proxied=True, settings={"deadlines": DEADLINES}) as world:
        for engine in world.engines.values():
            engine.how = misbehave
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds

        async def caller(number: int) -> None:
            nonlocal good, good_done, left
            while loop.time() < end:
                fault = rng.choice(faults) if rng.random() < 0.5 else ""
                dialect, v1, stream, name = rng.choice(DIALECTS), rng.random() < 0.5, rng.random() < 0.5, nonce()
                leaves = rng.random() < 0.1
                prompt = f"[[{fault}]] {name}" if fault else name
                answer = await ask(
                    world.port,
                    V1 if v1 else API,
                    asking(dialect, prompt, v1=v1, stream=stream),
                    timeout=rng.random() * 0.05 if leaves else 8,
                )
                if leaves:
                    left += 1
                    continue
                kind, text = judge(answer, v1=v1, stream=stream)
                found.check(words_for(name).startswith(text), f"another caller's words: {text[:60]!r}")
                case = (
                    f"{fault or 'no fault'}, {dialect}, {'v1' if v1 else 'api'}, {'stream' if stream else 'complete'}"
                )
                found.need(not kind.startswith("!"), f"{case}: {kind}")
                if not fault:
                    good += 1
                    good_done += (kind, text) == ("good", words_for(name))

        await asyncio.gather(*(caller(number) for number in range(16)))
        share = good_done / good if good else 0.0
        found.need(share >= 0.999, f"only {good_done} of {good} valid requests were answered")
        found.figures |= {
            "seconds": seconds,
            "valid": f"{good_done} of {good}",
            "valid_share": round(share, 5),
            "left": left,
            "answers to the wrong caller": sum("another caller" in b for b in found.bad),
        }
        for engine in world.engines.values():
            engine.how = None
        await world.census(found)
    return found
