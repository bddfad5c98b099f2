"""What this layer costs: measures it and its baselines in front of a stand-in engine.

    python -m tests.bench.run [--quick] [--out tests/bench/results.json] [--only v1,vllm-router] [--install-peers]

Needs wrk (a Debian package) and Linux (/proc). Then `python -m tests.bench.table` makes the tables. See README.md here.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.gpu.replicas import NGINX, nginx_program
from tests.processes import cpu_name, free_port

from .proc import Process, machine_busy, many_sockets

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "llm_inference.py"
PEERS = {
    "vllm-router": ("vllm-router", "vllm-router"),
    "litellm": ("litellm[proxy]", "litellm"),
}  # name: what pip calls it, its program
PEER_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_inference-tests"
KEY, TOKENS, PACE = "sk-" + secrets.token_hex(32), 128, 0.05
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
V1, API = "/v1/chat/completions", "/api/v1/llm/chat"


# ------------------------------------------------------------------------------------------------ what is measured
@dataclass(frozen=True)
class Target:
    """A server in front of the stand-in engine at `url`, and the routes that are measured on it: name, path, fields of
    the body."""

    name: str
    routes: tuple[tuple[str, str, dict[str, Any]], ...]
    start: (
        Callable[[str, int | None], Process] | None
    )  #: url of the engine, the core to run on; None: the engine itself
    conns: tuple[int, ...] = (16, 256)


def as_module(program: Path) -> dict[str, str]:
    """The environment in which a program is imported from its cached bytecode, as it is in use."""
    return {"PYTHONPATH": str(program.parent), "PYTHONDONTWRITEBYTECODE": ""}


def ours(dialect: str, program: Path) -> Callable[[str, int | None], Process]:
    def start(url: str, core: int | None) -> Process:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            program.stem,
            "--serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--engine",
            dialect,
            "--model",
            "m",
            "--api-key",
            KEY,
        ]
        command += ["--max-in-flight", "1200"] if core is not None else []
        return Process(
            f"ours-{dialect}",
            command,
            port=port,
            ready="/ready",
            env={"VLLM_BASE_URL": url, "OLLAMA_HOST": url, **as_module(program)},
            core=core,
        )

    return start


def echo(url: str, core: int | None) -> Process:
    port = free_port()
    return Process(
        "fastapi echo",
        [sys.executable, "-m", "tests.bench.echo", "--port", str(port)],
        port=port,
        env={"PYTHONPATH": str(HERE.parents[1])},
        core=core,
    )


def peer_program(name: str) -> str | None:
    own = PEER_HOME / name / "bin" / PEERS[name][1]
    return str(own) if own.exists() else shutil.which(PEERS[name][1])


def vllm_router(url: str, core: int | None) -> Process:
    port = free_port()
    command = [
        str(peer_program("vllm-router")),
        "--worker-urls",
        url,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
    ]
    command += ["--log-level", "error", "--prometheus-port", str(free_port())]
    return Process("vllm-router", command, port=port, core=core)


def relay(url: str, core: int | None) -> Process:
    port = free_port()
    command = [sys.executable, str(HERE / "relay.py"), "--port", str(port), "--engine-port", url.rpartition(":")[2]]
    return Process("relay", command, port=port, core=core)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with this process."""
    return tempfile.TemporaryDirectory(prefix="bench-")


def nginx(url: str, core: int | None) -> Process:
    port, folder = free_port(), Path(tempfile.mkdtemp(dir=scratch().name))
    config, engine = folder / "nginx.conf", f"server {url.removeprefix('http://')};"
    config.write_text(NGINX.format(dir=folder, servers=engine, port=port, log=folder / "access.log"))
    command = [str(nginx_program()), "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")]
    return Process("nginx", command, port=port, core=core)


def litellm(url: str, core: int | None) -> Process:
    port = free_port()
    config = Path(tempfile.gettempdir()) / f"bench-litellm-{os.getpid()}.yaml"
    config.write_text(
        json.dumps(
            {
                "model_list": [
                    {
                        "model_name": "m",
                        "litellm_params": {"model": "openai/m", "api_base": url + "/v1", "api_key": KEY},
                    }
                ]
            }
        )
    )
    env = {
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_TELEMETRY": "False",
    }
    command = [str(peer_program("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return Process("litellm", command, port=port, ready="/health/liveliness", env=env, core=core)


def targets(program: Path) -> list[Target]:
    openai = {"model": "m", "messages": MESSAGES, "max_tokens": 256}
    native = {"model_name": "m", "messages": MESSAGES, "max_tokens": 256}
    responses = {"model": "m", "input": MESSAGES[0]["content"], "max_output_tokens": 256}
    translated = (("responses", "/v1/responses", responses), ("messages", "/v1/messages", openai))
    found = [
        Target("direct", (("direct", V1, openai),), None),
        Target("echo", (("echo", V1, openai),), echo),
        Target("relay", (("relay", V1, openai),), relay),
        Target("ours", (("v1", V1, openai), ("api", API, native), *translated), ours("vllm", program)),
        Target("ours-ollama", (("v1-ollama", V1, openai), ("api-ollama", API, native)), ours("ollama", program)),
    ]
    if peer_program("vllm-router"):
        found.append(Target("vllm-router", (("vllm-router", V1, openai),), vllm_router))
    if nginx_program():
        found.append(Target("nginx", (("nginx", V1, openai),), nginx))
    if peer_program("litellm"):
        found.append(Target("litellm", (("litellm", V1, openai),), litellm, conns=(16,)))
    return found


def install_peers() -> None:
    """The peers, each in a virtual environment of its own."""
    for name, (package, _) in PEERS.items():
        home = PEER_HOME / name
        if not peer_program(name):
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            subprocess.run([str(home / "bin" / "pip"), "install", "-q", package], check=True)


@contextmanager
def engine(tokens: int, pace: float = 0.0, core: int | None = None) -> Iterator[Process]:
    port = free_port()
    command = [
        sys.executable,
        str(HERE / "upstream.py"),
        "--port",
        str(port),
        "--tokens",
        str(tokens),
        "--pace",
        str(pace),
    ]
    with Process("upstream", command, port=port, core=core) as process:
        yield process


@contextmanager
def serving(target: Target, upstream: Process, core: int | None = None) -> Iterator[Process]:
    if target.start is None:
        yield upstream
        return
    with target.start(upstream.url, core) as process:
        yield process


@contextmanager
def forgiving(target: Target) -> Iterator[None]:
    """A peer that does not work is left out, and said; one of ours ends the run."""
    try:
        yield
    except RuntimeError as exc:
        if target.name not in PEERS:
            raise
        say(f"{target.name} is left out: {exc}")


# ------------------------------------------------------------------------------------------- requests back to back
def fetch(url: str, body: str) -> bytes:
    """The bytes of the answer to one request, head included; wrk counts the same."""
    where = urlsplit(url)
    head = (
        f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname or "", where.port or 80), timeout=60) as wire:
        wire.sendall(head.encode() + body.encode())
        answer = b""
        while data := wire.recv(1 << 16):
            answer += data
            head_end = answer.find(b"\r\n\r\n") + 4
            at = answer[:head_end].lower().find(b"content-length:")
            full = (
                len(answer) >= head_end + int(answer[at + 15 :].split(b"\r\n", 1)[0])
                if at >= 0
                else answer.endswith(b"0\r\n\r\n")
            )
            if head_end > 3 and full:
                break
    return answer


def checked(url: str, body: str, streamed: bool) -> int:
    """The size of a right answer on the wire. Raises RuntimeError when it is not right: a fast wrong one is worth
    nothing."""
    answer = fetch(url, body)
    ended = any(end in answer for end in (b"[DONE]", b'"message_stop"', b'"response.completed"'))
    wrong = (
        answer.count(b"@0") < TOKENS - 1 or not ended
        if streamed
        else b"Paris is the capital" not in answer
    )
    if wrong or not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{url} answered {answer[:300]!r} … {answer[-300:]!r}")
    return len(answer)


class Patience:
    """Waits for a calm machine, `left` seconds in all: what others do on the same cores falls on every figure."""

    def __init__(self, left: float) -> None:
        self.left = left

    def wait(self) -> None:
        while self.left > 0:
            busy, mine, began = machine_busy(), sum(os.times()[:4]), time.monotonic()
            time.sleep(1)
            spent = time.monotonic() - began
            if machine_busy() - busy - (sum(os.times()[:4]) - mine) < 0.25 * spent:
                return
            self.left -= spent


patience = Patience(0)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wrk(url: str, body: str, conns: int, seconds: float) -> dict[str, Any]:
    command = [
        "wrk",
        "-t1",
        f"-c{conns}",
        f"-d{max(1, round(seconds))}s",
        "--timeout",
        "60s",
        "-s",
        str(HERE / "post.lua"),
        url,
    ]
    done = subprocess.run(
        command, env=os.environ | {"BODY": body, "KEY": KEY}, capture_output=True, text=True, check=True
    )
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def drive(
    process: Process, upstream: Process, path: str, body: dict[str, Any], conns: int, seconds: float
) -> dict[str, float]:
    """One case: a check, a warm-up, and a measured run."""
    streamed, text = bool(body.get("stream")), json.dumps(body)
    size = checked(process.url + path, text, streamed)
    wrk(process.url + path, text, conns, min(2.0, seconds))
    time.sleep(0.3)  # what the warm-up left open is closed
    patience.wait()
    both = [process] if process is upstream else [process, upstream]
    cpus, busy, mine = [p.cpu() for p in both], machine_busy(), children_cpu()
    outcome = wrk(process.url + path, text, conns, seconds)
    used = [p.cpu() - before for p, before in zip(both, cpus, strict=True)]
    others = machine_busy() - busy - sum(used) - (children_cpu() - mine)
    # Streams that the end of the run cut did their part of the work too: they are counted by their bytes.
    answers = max(outcome["bytes"] / size if streamed else outcome["requests"], 0.01)
    result = {
        "rps": answers / outcome["seconds"],
        "p50_ms": outcome["p50"],
        "p99_ms": outcome["p99"],
        "cpu_ms": 1e3 * used[0] / answers,
        "rss_mib": process.rss(),
        "errors": sum(outcome[kind] for kind in ("status", "connect", "read", "write", "timeout")),
        "cpu_share": used[0] / outcome["seconds"],
        "others_share": max(0.0, others) / outcome["seconds"],
    }
    return result | ({"token_us": 1e3 * result["cpu_ms"] / TOKENS} if streamed else {})


def back_to_back(
    chosen: list[Target], rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every case in every round, round by round, so that a noisy minute falls on all of them."""
    cases: dict[tuple[str, bool, int], list[dict[str, float]]] = {}
    starts: dict[str, list[dict[str, float]]] = {}
    with engine(TOKENS) as upstream:
        for number in range(rounds):
            for target in chosen:
                with forgiving(target), serving(target, upstream) as process:
                    for (name, path, fields), streamed, conns in itertools.product(
                        target.routes, (False, True), target.conns
                    ):
                        kind = "streamed" if streamed else "complete"
                        say(f"round {number + 1}/{rounds}: {name}, {kind}, {conns} connections")
                        body = fields | ({"stream": True} if streamed else {})
                        cases.setdefault((name, streamed, conns), []).append(
                            drive(process, upstream, path, body, conns, seconds)
                        )
                    left = {
                        "ready_cpu_s": process.cpu_until_ready,
                        "idle_rss_mib": process.ready_rss,
                        "sockets_left": sockets_left(process),
                    }
                    starts.setdefault(target.name, []).append(left)
    return (
        [
            {"target": name, "streamed": streamed, "conns": conns, **medians(found)}
            for (name, streamed, conns), found in cases.items()
        ],
        [{"target": name, **medians(found)} for name, found in starts.items()],
    )


def sockets_left(process: Process) -> int:
    """Sockets that are still open twelve seconds after the load went, more than there were before it: idle ones are
    closed by then."""
    until = time.monotonic() + 12
    while (left := process.sockets() - process.ready_sockets) > 0 and time.monotonic() < until:
        time.sleep(0.2)
    return max(0, left)


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the calmer half of the rounds: those in which others disturbed least. Errors are counted in all."""
    every = found
    if "others_share" in found[0]:
        found = sorted(found, key=lambda one: one["others_share"])[: len(found) // 2 + 1]
    middle = {name: statistics.median_low([one[name] for one in found]) for name in found[0]}
    return middle | ({"errors": sum(one["errors"] for one in every)} if "errors" in middle else {})


# ----------------------------------------------------------------------------------------------------- paced streams
# A stream through LiteLLM costs so much that a thousand of them would measure nothing but a queue.
PACED = {"direct", "relay", "v1", "api", "vllm-router", "nginx"}


def paced(chosen: list[Target], streams: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Many streams of 20 tokens/s: the server has the last core to itself, stand-in and reader share the first."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, list[str]] = {}
    with engine(tokens, PACE, cores[0]) as upstream:
        for number in range(rounds):
            for target in chosen:
                for name, path, fields in [route for route in target.routes if route[0] in PACED]:
                    with forgiving(target), serving(target, upstream, cores[-1]) as process:
                        load = f"{streams} streams of {tokens} tokens, {1 / PACE:.0f} a second"
                        say(f"round {number + 1}/{rounds}: {name}, {load}")
                        body = fields | {"stream": True, "max_tokens": tokens}
                        read(process, upstream, path, body | {"max_tokens": 10}, min(20, streams), 10, cores[0])  # warm
                        one = read(process, upstream, path, body, streams, tokens, cores[0])
                        failed.setdefault(name, []).extend(one.pop("first_errors"))
                        found.setdefault(name, []).append(one)
    return [{"target": name, **medians(several), "first_errors": failed[name][:3]} for name, several in found.items()]


def read(
    process: Process, upstream: Process, path: str, body: dict[str, Any], streams: int, tokens: int, core: int
) -> dict[str, Any]:
    ramp, both = streams / 400, {process, upstream}
    command = [
        "taskset",
        "-c",
        str(core),
        sys.executable,
        str(HERE / "load.py"),
        "--url",
        process.url + path,
        "--body",
        json.dumps(body),
        "--key",
        KEY,
    ]
    command += ["--streams", str(streams), "--ramp", str(ramp), "--tokens", str(tokens)]
    patience.wait()
    before, began, busy, mine, its = (
        process.rss(),
        time.monotonic(),
        machine_busy(),
        children_cpu(),
        sum(p.cpu() for p in both),
    )
    samples: list[tuple[float, float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            samples.append((time.monotonic() - began, process.cpu(), process.rss()))
            time.sleep(0.2)
        said = reader.stdout.read() if reader.stdout else ""
    if reader.returncode:
        raise RuntimeError(f"load.py ended with {reader.returncode}")
    outcome: dict[str, Any] = json.loads(said)
    used = children_cpu() - mine + sum(p.cpu() for p in both) - its
    outcome["others_share"] = max(0.0, machine_busy() - busy - used) / (time.monotonic() - began)
    level = [(at, cpu) for at, cpu, _ in samples if ramp + 1 <= at <= tokens * PACE - 0.3]  # all streams run
    share = (level[-1][1] - level[0][1]) / (level[-1][0] - level[0][0]) if len(level) > 1 else 0.0
    memory = max((rss for *_, rss in samples), default=before) - before
    if streams == 1:
        return outcome  # too little CPU time and memory to be seen
    return outcome | {
        "cpu_share": share,
        "token_us": 1e6 * share * PACE / streams,
        "kib_a_stream": 1024 * memory / streams,
    }


# --------------------------------------------------------------------------------------------------- verbs and start
def verbs(program: Path, calls: int) -> dict[str, float]:
    say(f"the Python verbs, {calls} calls each")
    with engine(TOKENS) as upstream:
        command = [
            sys.executable,
            str(HERE / "verbs.py"),
            "--url",
            upstream.url,
            "--program",
            str(program),
            "--calls",
            str(calls),
        ]
        found: dict[str, float] = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        return found


def imports(program: Path, times: int) -> dict[str, float]:
    """CPU seconds and memory of `import llm_inference`, a bare interpreter's taken off."""

    def once(code: str) -> dict[str, float]:
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-c", code], os.environ | as_module(program)
        )
        _, _, used = os.wait4(pid, 0)
        return {"cpu_s": used.ru_utime + used.ru_stime, "rss_mib": used.ru_maxrss / 1024}

    bare, full = (medians([once(code) for _ in range(times)]) for code in ("pass", "import llm_inference"))
    return {"cpu_s": full["cpu_s"] - bare["cpu_s"], "rss_mib": full["rss_mib"], "bare_rss_mib": bare["rss_mib"]}


# -------------------------------------------------------------------------------------------------------- the command
def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in ("aiohttp", "fastapi", "httptools", "pydantic", "uvicorn", "uvloop"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    for name in PEERS:
        found = sorted((PEER_HOME / name).glob(f"lib/*/site-packages/{name.replace('-', '_')}-*.dist-info"))
        if found:
            versions[name] = found[-1].name.split("-")[1].removesuffix(".dist")
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short runs: does it work at all?")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a measured run")
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 256, 1000])
    parser.add_argument(
        "--only",
        help="names of targets, by commas: direct, echo, relay, ours, ours-ollama, vllm-router, nginx, litellm",
    )
    parser.add_argument(
        "--parts", default="wrk,paced,lone,verbs,start", help="which measurements, by commas (default: all)"
    )
    parser.add_argument("--program", type=Path, default=PROGRAM, help="another llm_inference.py to measure")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait, in all, for others on this machine to be calm",
    )
    parser.add_argument(
        "--install-peers",
        action="store_true",
        help=f"put vllm-router and LiteLLM into {PEER_HOME}, each into its own environment",
    )
    args = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt install wrk")
    many_sockets()
    patience.left = args.patience
    if args.install_peers:
        install_peers()
    rounds, seconds = (1, 1.0) if args.quick else (args.rounds, args.seconds)
    counts, tokens = ([100], 60) if args.quick else (args.streams, 240)
    parts = args.parts.split(",")
    chosen = [target for target in targets(args.program) if not args.only or target.name in args.only.split(",")]

    results: dict[str, Any] = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "quick": args.quick}
    results |= {"rounds": rounds, "seconds": seconds, "tokens": TOKENS, "pace": PACE}
    if "start" in parts:
        results["import"] = imports(args.program, 3 if args.quick else 7)
    if "verbs" in parts:
        results["verbs"] = verbs(args.program, 200 if args.quick else 2000)
    if "wrk" in parts:
        results["cases"], results["starts"] = back_to_back(chosen, rounds, seconds)
    if "lone" in parts:
        results["lone"] = paced(chosen, 1, tokens, rounds)
    if "paced" in parts:
        results["paced"] = []
        for streams in counts:
            results["paced"] += paced(chosen, streams, tokens if streams == counts[-1] else tokens // 2, rounds)
    args.out.write_text(json.dumps(rounded(results), indent=1) + "\n")
    say(f"written: {args.out}")
    return 0


def rounded(value: Any) -> Any:
    """Four significant digits are more than these figures hold."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
