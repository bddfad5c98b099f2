"""Two replicas of one model on two GPUs: what a balancer in front makes of their prefix caches.

Clients hold conversations below a few long system prompts (`load.py --turns`). The same load goes in turn to one
replica alone (half of the clients), to both with every client kept at one by hand, and to both behind nginx (round
robin), vllm-router (cache_aware) and ours (`llm.toml` with two endpoints). Every load has words of its own, so that
none finds what an earlier one left in the caches; the hit rates are what the engines count themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.machine import cpu_seconds, ended, wait_until
from tests.processes import ROOT, free_port

if TYPE_CHECKING:
    from tests.gpu.run import Run

Json = dict[str, Any]
LOAD = Path(__file__).resolve().parent / "load.py"
CONFIG = """max_in_flight = 4096
queue = 4096
""" + "\n".join(f'\n[[endpoint]]\nengine = "{{engine}}"\nbase_url = "{{{n}}}"' for n in range(2))
NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log {log}; keepalive_requests 1000000; client_max_body_size 64m; client_body_buffer_size 1m;
    client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
    uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
    upstream replicas {{ {servers} keepalive 1024; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
ALONE, BY_HAND, OURS = "one replica, half the load", "each client at one replica", "ours"
#: what a replica counts; the seconds to the first token are those from the request's arrival in its server
COUNTED = {
    "queries": "prefix_cache_queries_total",
    "hits": "prefix_cache_hits_total",
    "written": "generation_tokens_total",
    "waited": "time_to_first_token_seconds_sum",
    "begun": "time_to_first_token_seconds_count",
}


@dataclass(frozen=True)
class Side:
    """Where the clients ask."""

    urls: list[str]
    pid: int = 0  #: of the program in between
    share: int = 1  #: the load is divided by it, and the throughput multiplied


def replicas(run: Run) -> Json:
    """The same conversations against each side, in turn."""
    args, model = run.args, run.dummy("large")
    found: Json = {
        "model": "large",
        "conversations": {name: getattr(args, name) for name in ("turns", "talks", "systems", "answers")}
        | {"system_words": args.system_words, "question_words": args.question_words},
        "cases": {},
    }
    with contextlib.ExitStack() as stack:
        urls = args.attach or stack.enter_context(both(run, model))
        sides = {ALONE: Side(urls[:1], share=2), BY_HAND: Side(urls)}
        for name, start in fronts(run).items():
            if url_and_pid := stack.enter_context(start(run, urls)):
                sides[name] = Side([url_and_pid[0]], url_and_pid[1])
        found |= {"sides": list(sides), "versions": versions()}
        for level, (clients, count) in enumerate(zip(args.clients, args.client_rounds, strict=True)):
            rounds: list[Json] = []
            for number in range(-1 if level == 0 else 0, count):  # the first one warms up
                order = list(sides) if number % 2 else list(reversed(sides))
                seeds = {name: 1_000_000 * clients + 100 * number + at + 1000 for at, name in enumerate(order)}
                one = {name: one_side(run, sides[name], urls, clients, seeds[name], number < 0) for name in order}
                if number >= 0:
                    rounds.append(one)
                    found["cases"][str(clients)] = {name: summary(rounds, name) for name in sides}
                    run.save("replicas", found)
    return found


def one_side(run: Run, side: Side, urls: list[str], clients: int, seed: int, warm_up: bool) -> Json:
    args = run.args
    command = [sys.executable, str(LOAD), "--url", *side.urls, "--model", served(urls[0]), "--seed", str(seed)]
    streams, processes = clients // side.share, args.processes // side.share  # as many streams in each process
    command += ["--streams", str(streams), "--processes", str(processes), "--ramp", "2"]
    for name in ("turns", "talks", "systems", "system_words", "question_words"):
        value = 1 if warm_up and name == "talks" else getattr(args, name)
        command += ["--" + name.replace("_", "-"), str(value)]
    command += ["--lengths", *map(str, args.answers)]
    before, cpu = [counters(url) for url in urls], cpu_seconds(side.pid) if side.pid else 0.0
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"load.py: {done.stderr[-1500:]}")
    seen: Json = json.loads(done.stdout)
    spent = cpu_seconds(side.pid) - cpu if side.pid else 0.0
    after = [counters(url) for url in urls]
    more = [{name: late[name] - early[name] for name in late} for early, late in zip(before, after, strict=True)]
    queries, hits, waited, begun = (sum(one[name] for one in more) for name in ("queries", "hits", "waited", "begun"))
    seen.pop("by_url", None)
    return seen | {
        "tokens_per_s": round(seen["tokens_per_s"] * side.share, 1),
        "hit_rate": round(hits / queries, 4) if queries else None,
        "not_cached_tokens": round(queries - hits),
        "written": [round(one["written"]) for one in more],
        "first_token_in_engine_mean_ms": round(1000 * waited / begun, 2) if begun else None,
        "cpu_us_a_token": round(1e6 * spent / max(1, seen["tokens"]), 1) if side.pid else None,
    }


def summary(rounds: list[Json], name: str) -> Json:
    """Medians over the rounds, and the throughput beside the others' of the same round."""
    kept = ("tokens_per_s", "first_token_p50_ms", "first_token_p99_ms", "first_token_mean_ms")
    kept += ("first_token_in_engine_mean_ms", "hit_rate", "cpu_us_a_token")
    values = {key: [one[name][key] for one in rounds if one[name][key] is not None] for key in kept}
    ratios = {
        other: round(statistics.median(one[name]["tokens_per_s"] / one[other]["tokens_per_s"] for one in rounds), 4)
        for other in rounds[0]
        if other != name and all(one[other]["tokens_per_s"] for one in rounds)
    }
    return {
        **{key: round(statistics.median(found), 4) if found else None for key, found in values.items()},
        "tokens_per_s, times": ratios,
        "errors": sum(one[name]["errors"] for one in rounds),
        "rounds": [one[name] for one in rounds],
    }


def versions() -> Json:
    """Of what stands in between."""
    found: Json = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["vllm-router"] = importlib.metadata.version("vllm-router")
    if program := nginx_program():
        said = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=20).stderr
        found["nginx"] = said.strip().rpartition("/")[2]
    return found


def nginx_program() -> str | None:
    return os.environ.get("NGINX_PROGRAM") or shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def served(url: str) -> str:
    """The name of the first model there."""
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as reply:
        return str(json.load(reply)["data"][0]["id"])


def counters(url: str) -> dict[str, float]:
    """What a replica has counted so far."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as reply:
        text = reply.read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    return {key: total(name) for key, name in COUNTED.items()}


@contextlib.contextmanager
def both(run: Run, model: Path) -> Iterator[list[str]]:
    """Two servers, a GPU each, started at the same time."""
    words = run.arguments(run.args.load_memory, "--load-format", "dummy", eager=run.args.eager_load)
    with contextlib.ExitStack() as stack:
        waits: list[Callable[[], str]] = []
        for gpu in range(2):
            env = {"CUDA_VISIBLE_DEVICES": str(gpu), "VLLM_CACHE_ROOT": str(run.args.work / f"cache-{gpu}")}
            waits.append(stack.enter_context(run.starting(model, words, env)))
        yield [wait() for wait in waits]


Front = contextlib.AbstractContextManager[tuple[str, int] | None]


@contextlib.contextmanager
def nginx(run: Run, urls: list[str]) -> Iterator[tuple[str, int] | None]:
    program = nginx_program()
    if not program:
        yield None
        return
    folder, port = run.args.work / "nginx", free_port()
    folder.mkdir(parents=True, exist_ok=True)
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    (folder / "nginx.conf").write_text(NGINX.format(dir=folder, servers=servers, port=port, log="off"))
    with started(run, "nginx", [program, "-c", str(folder / "nginx.conf")], port, "/version") as side:
        yield side


@contextlib.contextmanager
def vllm_router(run: Run, urls: list[str]) -> Iterator[tuple[str, int] | None]:
    if not importlib.util.find_spec("vllm_router"):
        yield None
        return
    port = free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--worker-urls", *urls, "--policy", "cache_aware"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    command += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
    with started(run, "vllm-router", command, port, "/v1/models") as side:
        yield side


@contextlib.contextmanager
def ours(run: Run, urls: list[str], module: Path, words: str) -> Iterator[tuple[str, int] | None]:
    config, port = run.args.work / "llm.toml", free_port()
    config.write_text(CONFIG.format(*urls, engine=run.args.engine))
    command = [sys.executable, str(module), "--serve", "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-auth", *words.split()]
    with started(run, f"ours-{port}", command, port, "/ready") as side:
        yield side


def fronts(run: Run) -> dict[str, Callable[[Run, list[str]], Front]]:
    """What may stand in between; with --module and --serve-args, other versions of ours and other arguments too."""
    found: dict[str, Callable[[Run, list[str]], Front]] = {
        "round robin (nginx)": nginx,
        "vllm-router, cache_aware": vllm_router,
    }
    for name, module in [("", ROOT / "llm_inference.py"), *(run.args.module or ())]:
        for words in run.args.serve_args or [""]:
            title = " ".join(filter(None, (OURS, name, words)))
            found[title] = functools.partial(ours, module=module, words=words)
    return found


@contextlib.contextmanager
def started(run: Run, name: str, command: list[str], port: int, path: str) -> Iterator[tuple[str, int]]:
    log = run.logs / f"replicas-{name}.log"
    with ended(command, log, dict(os.environ)) as process:
        wait_until(f"http://127.0.0.1:{port}{path}", process, log, 60)
        yield f"http://127.0.0.1:{port}", process.pid
