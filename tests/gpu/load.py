"""A closed loop of streams against an OpenAI-compatible server: tokens/s and time to first token.

    python tests/gpu/load.py --url http://127.0.0.1:8000 --model NAME --streams 64

Every stream asks one question after the other. The answers' lengths are `--lengths` in a turned order, so that the
streams do not go in step but all have the same work; `ignore_eos` makes the engine keep to them, and an answer of
another length is an error. Each prompt begins differently, so that no engine finds it in its prefix cache. Prints one
line of JSON.

With `--turns N` every stream holds conversations instead: `--talks` of them, each of N questions, below one of
`--systems` long system prompts that many share. A question sends all that was said before it, so an engine that has the
conversation in its prefix cache has little to read. What the assistant is said to have said is a text of the answer's
length, not the answer: every server gets the same tokens to read, whatever it wrote. With another `--seed` all is new.

With several `--url` the streams are dealt out to them and run together, so that what the engine does at that time is
the same for all: `by_url` has each one's figures. Two ways to one engine are compared closest like that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import aiohttp

Message = dict[str, str]

LENGTHS = (32, 64, 96, 128, 160)
WORDS = (
    "river stone lamp garden winter paper bridge cloud music window "
    "seven harbour green letter morning engine forest silver table road"
).split()


@dataclass
class Seen:
    """What one process saw."""

    first: list[float] = field(default_factory=list)  #: seconds from the question to the first token, an answer
    ends: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0

    def add(self, other: Seen) -> None:
        self.first += other.first
        self.ends += other.ends
        self.errors += other.errors
        self.tokens += other.tokens


idle: ContextVar[float | None] = ContextVar("idle", default=None)  #: seconds, of this request's connection; None: new


class Connector(aiohttp.TCPConnector):
    """Notes how long a connection was idle. It takes the one that was so for longest, as aiohttp does."""

    async def _get(self, key: Any, traces: Any) -> Any:
        waiting = self._conns.get(key)
        since = waiting[0][1] if waiting else time.monotonic()
        found = await super()._get(key, traces)
        idle.set(time.monotonic() - since if found else None)
        return found


def words(seed: object, count: int) -> str:
    """So many words, the same for the same seed."""
    return " ".join(random.Random(str(seed)).choices(WORDS, k=count))


def asks(args: argparse.Namespace, number: int) -> Iterator[tuple[list[Message], int]]:
    """What one client asks, one after the other: the messages, and how many tokens the answer shall have."""
    if not args.turns:
        for turn in range(len(args.lengths)):
            question = {"role": "user", "content": words(args.seed * 1_000_000 + number * 1000 + turn, 60)}
            yield [question], args.lengths[(number + turn) % len(args.lengths)]
        return
    for talk in range(args.talks):
        which = (number + talk) % args.systems
        said = [{"role": "system", "content": words(f"{args.seed} system {which}", args.system_words)}]
        for turn in range(args.turns):
            place = f"{args.seed} {number} {talk} {turn}"
            tokens = args.lengths[(number + talk + turn) % len(args.lengths)]
            said.append({"role": "user", "content": words(place, args.question_words)})
            yield list(said), tokens
            said.append({"role": "assistant", "content": words(place + " answer", tokens)})


async def answer(
    session: aiohttp.ClientSession, args: argparse.Namespace, url: str, messages: list[Message], tokens: int, seen: Seen
) -> None:
    """One streamed answer, read to its end."""
    body = {
        "model": args.model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, last = time.perf_counter(), 0.0, b""
    async with session.post(url + "/v1/chat/completions", json=body) as reply:
        if reply.status != 200:
            seen.errors.append(f"{reply.status}: {(await reply.text())[:300]}")
            return
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            last = line
            if not first and any(choice["delta"].get("content") for choice in json.loads(line[6:])["choices"]):
                first = time.perf_counter()
    event = json.loads(last[6:]) if last else {}
    made = (event.get("usage") or {}).get("completion_tokens", 0)
    if made != tokens or not first:
        seen.errors.append(f"{made} tokens instead of {tokens}; the last event: {event}"[:300])
        return
    seen.first.append(first - began)
    seen.ends.append(time.time())
    seen.tokens += made


async def stream(session: aiohttp.ClientSession, args: argparse.Namespace, number: int, seen: list[Seen]) -> None:
    """One client: it asks again as soon as it has its answer."""
    which = number // args.processes % len(args.url)
    await asyncio.sleep(max(0.0, args.begin - time.time()) + args.ramp * number / args.streams)
    for messages, tokens in asks(args, number):
        began = time.time()
        try:
            await answer(session, args, args.url[which], messages, tokens, seen[which])
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            when = f"asked at {began - args.begin:.3f} s, failed {1e3 * (time.time() - began):.1f} ms later"
            seen[which].errors.append(f"{exc!r:.200}; {when}; connection idle before, s: {idle.get()}")


async def some_streams(args: argparse.Namespace, numbers: list[int]) -> list[Seen]:
    seen = [Seen() for _ in args.url]
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(connector=Connector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(stream(session, args, number, seen) for number in numbers))
    return seen


def one_process(args: argparse.Namespace, numbers: list[int]) -> list[Seen]:
    return asyncio.run(some_streams(args, numbers))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    args.processes = min(args.processes, args.streams // len(args.url))  # each has a stream to every address
    shares = [list(range(n, args.streams, args.processes)) for n in range(args.processes)]
    args.begin = time.time() + 1.5  # until every process has started
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        done = [work.result() for work in [pool.submit(one_process, args, share) for share in shares]]
    by_url, everything = [Seen() for _ in args.url], Seen()
    for process in done:
        for which, one in enumerate(process):
            by_url[which].add(one)
            everything.add(one)
    result = {"streams": args.streams, **figures(everything, args.begin)}
    return result if len(by_url) == 1 else result | {"by_url": [figures(one, args.begin) for one in by_url]}


def figures(seen: Seen, begin: float) -> dict[str, Any]:
    first = sorted(1e3 * seconds for seconds in seen.first)
    seconds = max(seen.ends, default=begin) - begin
    return {
        "answers": len(first), "tokens": seen.tokens, "seconds": round(seconds, 3),
        "tokens_per_s": round(seen.tokens / seconds, 1) if seconds else 0.0,
        "first_token_p50_ms": round(statistics.median(first), 2) if first else None,
        "first_token_mean_ms": round(statistics.mean(first), 2) if first else None,
        "first_token_p99_ms": round(first[min(len(first) - 1, int(0.99 * len(first)))], 2) if first else None,
        "errors": len(seen.errors), "first_errors": seen.errors[:5],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of the answers that each stream asks for"
    )
    parser.add_argument("--turns", type=int, default=0, help="questions of a conversation; 0: single questions")
    parser.add_argument("--talks", type=int, default=1, help="conversations of each stream")
    parser.add_argument("--systems", type=int, default=4, help="different system prompts")
    parser.add_argument("--system-words", type=int, default=1000)
    parser.add_argument("--question-words", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--ramp", type=float, default=0.5, help="seconds over which the streams are begun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
