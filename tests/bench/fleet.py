"""What a fleet costs: 16 endpoints beside one, in the same run; a config file with very many of them; how evenly
conversations are spread.

    python -m tests.bench.fleet [--pairs 8] [--rounds 4] [--out tests/bench/fleet.json]

Needs wrk and Linux. Two servers, one of each kind, have the last core to themselves, and the load goes to one after the
other: what others on the machine do falls on both. As two processes of the same kind differ by some microseconds, this
is done with several pairs of fresh servers; what a fleet adds is the median of their differences.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llm_inference as product
from tests.processes import free_port

from .inprocess import clients, connect, least
from .proc import Process, many_sockets
from .run import API, HERE, KEY, MESSAGES, PROGRAM, TOKENS, V1, checked, imports, machine, rounded, say, wrk

ENDPOINTS, CONNECTIONS = 16, 16
MANY_ENDPOINTS, MANY_ALIASES, CONVERSATIONS = 1000, 10_000, 10_000
QUESTIONS = [{**MESSAGES[-1], "content": MESSAGES[-1]["content"] + " #00"}]  # see post.lua
#: route, model, messages, streamed, connections
CASES: dict[str, tuple[str, dict[str, str], list[Any], bool, int]] = {
    "v1, complete, 64 prompts, 16 connections": (V1, {"model": "m"}, QUESTIONS, False, 16),
    "v1, complete, 64 prompts, 256 connections": (V1, {"model": "m"}, QUESTIONS, False, 256),
    "v1, complete, one prompt, 16 connections": (V1, {"model": "m"}, MESSAGES, False, 16),
    "api, complete, 64 prompts, 256 connections": (API, {"model_name": "m"}, QUESTIONS, False, 256),
    "v1, streamed, one prompt, 16 connections": (V1, {"model": "m"}, MESSAGES, True, 16),
}
READ_ALL = "import sys, llm_inference as m; s = m.load_settings(dict(config=sys.argv[1]), 'serve'); m.create_app(s)"


@contextmanager
def engine() -> Iterator[Process]:
    """The stand-in engine at 16 addresses."""
    port = free_port()
    command = [sys.executable, str(HERE / "upstream.py"), "--port", str(port), "--tokens", str(TOKENS)]
    with Process("upstream", [*command, "--addresses", str(ENDPOINTS)], port=port) as process:
        yield process


@contextmanager
def ours(count: int, upstream: Process, program: Path, core: int | None = None) -> Iterator[Process]:
    """Our server with `count` endpoints."""
    port = free_port()
    tables = []
    for number in range(1, count + 1):
        address = f"http://127.0.0.{number}:{upstream.port}"
        tables.append(f'[[endpoint]]\nengine = "vllm"\nbase_url = "{address}"\n')
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
        file = Path(folder) / "llm.toml"
        file.write_text("\n".join(tables))
        command = [sys.executable, str(program), "--serve", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--config", str(file), "--api-key", KEY]
        with Process(f"ours-{count}-{port}", command, port=port, ready="/ready", core=core) as process:
            yield process


def compare(pairs: int, rounds: int, program: Path) -> dict[str, Any]:
    """CPU a request and a token with one endpoint and with 16: what several pairs of fresh servers say."""
    found: dict[str, list[dict[int, float]]] = {}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:-1])  # also the stand-in and the load generator
    with engine() as upstream:
        for number in range(pairs):
            say(f"pair {number + 1}/{pairs}")
            with ours(1, upstream, program, cores[-1]) as one, ours(ENDPOINTS, upstream, program, cores[-1]) as many:
                for case in CASES:
                    found.setdefault(case, []).append(in_turn(case, {1: one, ENDPOINTS: many}, rounds))
    os.sched_setaffinity(0, cores)
    return {case: summary(case, by_pair) for case, by_pair in found.items()}


def in_turn(case: str, servers: dict[int, Process], rounds: int) -> dict[int, float]:
    """The median over the rounds of the CPU microseconds an answer of each server."""
    path, fields, messages, stream, connections = CASES[case]
    body = json.dumps(fields | {"messages": messages, "max_tokens": 256, "stream": stream})
    taken: dict[int, list[float]] = {count: [] for count in servers}
    for number in range(-1, rounds):  # the first one warms up
        for count in sorted(servers, reverse=number % 2 == 1):
            server = servers[count]
            size = checked(server.url + path, body, stream)
            before = server.cpu_exactly()
            outcome = wrk(server.url + path, body, connections, 1)
            used = server.cpu_exactly() - before
            if errors := sum(outcome[kind] for kind in ("status", "connect", "read", "write", "timeout")):
                raise RuntimeError(f"{case}: {errors} errors")
            if number >= 0:
                taken[count].append(1e6 * used / (outcome["bytes"] / size if stream else outcome["requests"]))
    return {count: statistics.median(several) for count, several in taken.items()}


def summary(case: str, by_pair: list[dict[int, float]]) -> dict[str, Any]:
    """Microseconds of CPU: medians of both, and of what the fleet adds; the pairs say how sure that is."""
    stream = CASES[case][3]
    scale = 1 / TOKENS if stream else 1.0
    more = [scale * (pair[ENDPOINTS] - pair[1]) for pair in by_pair]
    return {
        "unit": "µs a token" if stream else "µs a request",
        "one endpoint": scale * statistics.median([pair[1] for pair in by_pair]),
        f"{ENDPOINTS} endpoints": scale * statistics.median([pair[ENDPOINTS] for pair in by_pair]),
        "more": statistics.median(more),
        "more, mean": statistics.fmean(more),
        "more, standard error": statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else None,
        "more, by pair": sorted(more),
    }


def choices() -> list[dict[str, float]]:
    """Microseconds of CPU to choose an endpoint: the least of many short rounds, which nobody disturbed."""
    system = {"role": "system", "content": "You are a helpful assistant. " * 40}
    prompts = {"short": MESSAGES, "long": [system, *MESSAGES]}
    product.Endpoint.LIST_TTL = 1e9

    async def measure(upstream: Process, count: int) -> dict[str, float]:
        urls = [f"http://127.0.0.{number}:{upstream.port}" for number in range(1, count + 1)]
        llm = product.LLMInferencer("vllm", base_url=urls)
        fleet = await llm.found()
        found: dict[str, float] = {"endpoints": count}
        for name, messages in prompts.items():
            request = product.GenerateRequest(body={"model": "m", "messages": messages})
            next(await fleet.routes(request))  # the lists are read
            least = float("inf")
            for _ in range(50):
                began = time.process_time()
                for _ in range(200):
                    next(await fleet.routes(request))
                least = min(least, (time.process_time() - began) / 200)
            found[f"{name} prompt"] = 1e6 * least
        await llm.aclose()
        return found

    with engine() as upstream:
        return [asyncio.run(measure(upstream, count)) for count in (1, 2, 4, ENDPOINTS)]


def in_process() -> dict[str, dict[str, float]]:
    """Microseconds of CPU a request with one endpoint and with 16, without sockets."""

    async def measure(prompts: list[str]) -> dict[str, float]:
        product.Wire._connect = connect  # type: ignore[method-assign]
        servers = {}
        for count in (1, ENDPOINTS):
            urls = [f"http://127.0.0.{number}:9" for number in range(1, count + 1)]
            configs = tuple([product.EndpointConfig(engine="vllm", base_url=url) for url in urls])
            servers[count] = clients(product.Settings(endpoints=configs, api_keys=(KEY,)), prompts)
        one, many = (await least(servers)).values()
        return {"one endpoint": one, f"{ENDPOINTS} endpoints": many, "more": many - one}

    product.Endpoint.LIST_TTL = 1e9
    found = {"as many prompts as connections": [f"question {number}" for number in range(CONNECTIONS)]}
    found["one prompt"] = ["question"] * CONNECTIONS
    return {name: asyncio.run(measure(prompts)) for name, prompts in found.items()}


def many(program: Path, times: int) -> dict[str, Any]:
    """CPU seconds to read and check a file with very many endpoints and aliases and to make the app, import apart."""
    lines = []
    for number in range(MANY_ENDPOINTS):
        lines.append(f'[[endpoint]]\nengine = "vllm"\nbase_url = "http://10.0.{number // 250}.{number % 250}:8000"\n')
    lines.append("[alias]")
    lines += [f'a{number} = ["vllm/model-{number}", "vllm/model-{number + 1}"]' for number in range(MANY_ALIASES)]
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
        file = Path(folder) / "llm.toml"
        file.write_text("\n".join(lines))
        small = Path(folder) / "small.toml"
        small.write_text("\n".join([lines[0], lines[1]]))
        taken = [cpu(program, file) for _ in range(times)]
        base = [cpu(program, small) for _ in range(times)]
    seconds = {"all": statistics.median(taken), "with two endpoints": statistics.median(base)}
    return {"endpoints": MANY_ENDPOINTS, "aliases": MANY_ALIASES, "cpu_s": seconds}


def cpu(program: Path, file: Path) -> float:
    """CPU seconds of a process that reads the file and makes the app."""
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(program.parent)}
    subprocess.run([sys.executable, "-c", READ_ALL, str(file)], env=environment, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def first(group: product.Replicas, key: int) -> product.Endpoint | None:
    """Where a conversation goes while no endpoint has anything to do."""
    return product.Fleet(group).choose(group, key)


def spread(count: int) -> dict[str, float]:
    """Where 10,000 conversations go, as shares of the mean, and how many move when one endpoint leaves.

    `bound`: 1/n and four standard deviations of a binomial, since a hash gives each conversation to an endpoint with
    that chance.
    """
    configs = []
    for number in range(1, count + 1):
        configs.append(product.EndpointConfig(engine="vllm", base_url=f"http://10.0.0.{number}:8000"))
    endpoints = product.Replicas(product.Settings(endpoints=tuple(configs)).inferencer().candidates())
    keys = []
    for number in range(CONVERSATIONS):
        messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": f"question {number}"}]
        keys.append(product.prefix_hash({"messages": messages}))
    before = [first(endpoints, key) for key in keys]
    shares = sorted(Counter(before).values())
    moved = []
    for gone in endpoints if count > 1 else ():
        left = product.Replicas([endpoint for endpoint in endpoints if endpoint is not gone])
        after = [first(left, key) for key in keys]
        moved.append(sum(a is not b for a, b in zip(before, after, strict=True)))
    noise = math.sqrt(CONVERSATIONS * (1 - 1 / count) / count)
    mean = CONVERSATIONS / count
    return {
        "endpoints": count,
        "fullest / mean": shares[-1] / mean,
        "emptiest / mean": shares[0] / mean,
        "moved at most": max(moved, default=0) / CONVERSATIONS,
        "moved on average": sum(moved) / max(1, len(moved)) / CONVERSATIONS,
        "bound": 1 / count + 4 * noise / CONVERSATIONS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="of servers, one after the other")
    parser.add_argument("--rounds", type=int, default=4, help="of a second, for each pair and case")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="another llm_inference.py to measure")
    parser.add_argument("--out", type=Path, default=HERE / "fleet.json")
    args = parser.parse_args()
    many_sockets()
    results: dict[str, Any] = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine()}
    results |= {"pairs": args.pairs, "rounds": args.rounds}
    results["spread"] = [spread(count) for count in (1, 2, 4, 16)]
    results["start"] = many(args.program, 3) | {"import": imports(args.program, 3)}
    results["choice, µs"] = choices()
    results["a request in one process, µs"] = in_process()
    results["cost"] = compare(args.pairs, args.rounds, args.program)
    args.out.write_text(json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n")
    say(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
