"""The engines' own routers between us and two engine servers: what they pass on, and a server killed under load.

    python -m tests.scale.routers vllm|sglang [--fake] [--json tests/scale/results.json]

Installs the router (PyPI) into an environment of its own under ~/.cache, and starts two real engine servers as
tests/engines.py does (`--fake`: scripted ones, to try the router's settings in seconds). Whatever is started here is
ended by its process id. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests import engines
from tests.fake_engine import FakeEngine
from tests.harness import Command, until
from tests.processes import free_port
from tests.scale.load import Load, record, reported

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_inference-tests"
# A dead server is out after two checks, one second apart, or after three failed requests; a request that found nobody
# is tried again at once.
TUNED = (
    "--health-check-interval-secs 1 --health-check-timeout-secs 2 "
    "--health-failure-threshold 2 --health-success-threshold 1 "
    "--cb-failure-threshold 3 --cb-success-threshold 1 --cb-timeout-duration-secs 5 --cb-window-duration-secs 10 "
    "--retry-max-retries 5 --retry-initial-backoff-ms 50 --retry-max-backoff-ms 1000 --worker-startup-check-interval 1"
).split()


@dataclass(frozen=True)
class Kind:
    program: tuple[str, ...]
    tuned: tuple[str, ...] = ()


ROUTERS = {
    "vllm": Kind(("vllm-router",)),
    "sglang": Kind(("sglang-router", "launch"), ("--health-check-endpoint", "/ready")),
}  # SGLang's /health generates a token: slow when it is busy


def tuned(engine: str) -> list[str]:
    return [*TUNED, *ROUTERS[engine].tuned]


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def program(engine: str) -> list[str]:
    name, *rest = ROUTERS[engine].program
    home = HOME / name
    if not (home / "bin" / name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "-q", name], check=True)
    return [str(home / "bin" / name), *rest]


def version(engine: str) -> str:
    name = ROUTERS[engine].program[0]
    found = sorted((HOME / name).glob(f"lib/*/site-packages/{name.replace('-', '_')}-*.dist-info"))
    return found[-1].name.split("-")[1].removesuffix(".dist") if found else "-"


@contextlib.contextmanager
def router(engine: str, urls: list[str], more: list[str]) -> Iterator[str]:
    port = free_port()
    command = [
        *program(engine),
        "--worker-urls",
        *urls,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
    ]
    command += [
        "--log-level",
        "warn" if engine == "sglang" else "warning",
        "--prometheus-port",
        str(free_port()),
        *more,
    ]
    log = Path(tempfile.gettempdir()) / f"scale-router-{port}.log"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert child.poll() is None, log.read_text(errors="replace")[-2000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url + "/v1/models", trust_env=False, timeout=5).status_code == 200
        return False

    try:
        until(answers, 120)
        yield url
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(5)
        log.unlink()


# ------------------------------------------------------------------------------------------------------ what passes

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HI = [{"role": "user", "content": "Name a city."}]
ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 8}),
    "streamed": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 8, "stream": True}),
    "a wrong model name": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 8, "model_name": "nope"}),
    "schema": (
        "/api/v1/llm/structured-generate",
        {"prompt": "A city.", "schema": CITY, "max_tokens": 64, "temperature": 0},
    ),
    "choice": (
        "/api/v1/llm/structured-generate",
        {"prompt": "Is Paris in France?", "choice": ["yes", "no"], "max_tokens": 8},
    ),
    "regex": ("/api/v1/llm/structured-generate", {"prompt": "A year.", "regex": "[0-9]{4}", "max_tokens": 8}),
    "tools, auto": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 32, "tools": [TOOL]}),
    "tools, required": (
        "/api/v1/llm/chat",
        {"messages": HI, "max_tokens": 64, "tools": [TOOL], "tool_choice": "required", "temperature": 0},
    ),
    "think": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 8, "think": True}),
    "seed": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 8, "seed": 7}),
    "logprobs": ("/api/v1/llm/chat", {"messages": HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
    "a prompt that does not fit": (
        "/api/v1/llm/chat",
        {"messages": [{"role": "user", "content": "word " * 9000}], "max_tokens": 8},
    ),
    "/v1 whole": ("/v1/chat/completions", {"messages": HI, "max_tokens": 8}),
    "/v1 streamed": (
        "/v1/chat/completions",
        {"messages": HI, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "/v1 a wrong model name": ("/v1/chat/completions", {"messages": HI, "max_tokens": 8, "model": "nope"}),
    "/v1 response_format": (
        "/v1/chat/completions",
        {
            "messages": HI,
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}},
        },
    ),
    "/v1 tool_choice required": (
        "/v1/chat/completions",
        {"messages": HI, "max_tokens": 64, "tools": [TOOL], "tool_choice": "required"},
    ),
    "/v1/completions": ("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 4}),
    "/v1/completions streamed": (
        "/v1/completions",
        {"prompt": "The capital of France is", "max_tokens": 4, "stream": True},
    ),
    "/v1/embeddings": ("/v1/embeddings", {"input": "hi"}),
}


# What only the comparison of bodies asks: whatever our adapters let through.
EVERY = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "stop": ["x"],
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "max_tokens": 8,
    "ignore_eos": True,
    "min_tokens": 2,
    "stop_token_ids": [3],
    "skip_special_tokens": False,
}
MORE = {
    "vllm": {
        "structured_outputs": {"choice": ["a", "b"]},
        "include_stop_str_in_output": True,
        "bad_words": ["y"],
        "allowed_token_ids": [1, 2],
        "length_penalty": 1.1,
        "priority": 1,
    },
    "sglang": {"regex": "[a-z]+", "stop_regex": "z", "no_stop_trim": True},
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
HISTORY = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "t"}, PICTURE], "name": "u"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "20"},
]


def wide(engine: str) -> dict[str, tuple[str, dict[str, Any]]]:
    chat, text = "/v1/chat/completions", "/v1/completions"
    return {
        "/v1 every field": (
            chat,
            EVERY
            | MORE[engine]
            | {"messages": HI, "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": False}},
        ),
        "/v1 history": (
            chat,
            {"messages": HISTORY, "tools": [TOOL], "parallel_tool_calls": False}
            if engine == "vllm"
            else {"messages": HISTORY, "tools": [TOOL]},
        ),
        "/v1/completions every field": (
            text,
            EVERY
            | {k: v for k, v in MORE[engine].items() if k != "regex"}
            | {"prompt": "x", "logprobs": 2, "echo": True},
        ),
    }


def outcome(client: httpx.Client, model: str, path: str, body: dict[str, Any]) -> str:
    if path.startswith("/v1"):
        body = {"model": model, **body}
    try:
        reply = client.post(path, json=body)
    except httpx.HTTPError as exc:
        return type(exc).__name__
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.headers.get('x-error-kind')}"
    if body.get("stream"):
        return "streamed to [DONE]" if reply.text.endswith("data: [DONE]\n\n") else "stream without [DONE]"
    body = reply.json()
    data = body["data"] if isinstance(body.get("data"), dict) else body
    calls = data.get("tool_calls") or ((data.get("choices") or [{}])[0].get("message") or {}).get("tool_calls")
    return "ok" + (", tool call" if calls else "") + (f", {data['enforced_by']}" if data.get("enforced_by") else "")


def compare(engine: str, direct: str, routed: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    heard: dict[str, dict[str, str]] = {}
    for where, url in (("direct", direct), ("routed", routed)):
        with (
            Command("--engine", engine, "--base-url", url) as ours,
            httpx.Client(base_url=ours.url, timeout=120, trust_env=False) as client,
        ):
            about = next(e for e in client.get("/api/v1/llm/engines").json()["data"] if e["engine_type"] == engine)
            found[where] = {name: about.get(name) for name in ("version", "models", "features")}
            model = about["models"][0]
            heard[where] = {name: outcome(client, model, *ask) for name, ask in ASKS.items()}
    found["same"] = [name for name in ASKS if heard["direct"][name] == heard["routed"][name]]
    found["different"] = {
        name: [heard["direct"][name], heard["routed"][name]]
        for name in ASKS
        if heard["direct"][name] != heard["routed"][name]
    }
    found["direct_outcomes"] = heard["direct"]
    return found


def bodies(engine: str) -> dict[str, Any]:
    """What the router changes in a request's body on its way to a (scripted) engine: what it takes away, what it adds,
    what is not asked at all."""
    asks = ASKS | wide(engine)
    lost: dict[str, Any] = {}
    added: dict[str, Any] = {}
    refused, neither = [], []
    with Scripted(engine) as fake, router(engine, [fake.base_url], tuned(engine)) as url:  # type: ignore[arg-type]
        seen: dict[str, dict[str, Any]] = {}
        for where in (fake.base_url, url):
            with (
                Command("--engine", engine, "--base-url", where) as ours,
                httpx.Client(base_url=ours.url, timeout=30, trust_env=False) as client,
            ):
                for name, ask in asks.items():
                    fake.requests.clear()
                    outcome(client, fake.model, *ask)
                    seen.setdefault(name, {})[where] = next(
                        (request.json for request in fake.requests if request.path.startswith("/v1/") and request.body),
                        {},
                    )
    for name, two in seen.items():
        direct, routed = two[fake.base_url], two[url]
        if not (direct and routed):
            (refused if direct else neither).append(name)
            continue
        for where, value in leaves(direct).items():
            if leaves(routed).get(where) != value:
                lost.setdefault(name, {})[where] = [value, leaves(routed).get(where)]
        added |= {
            where: value for where, value in leaves(routed).items() if where not in leaves(direct) and value is not None
        }
    return {
        "compared": len(seen),
        "taken_away_or_changed": lost,
        "added": added,
        "asked_direct_alone": refused,
        "asked_neither_way": neither,
    }


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Every value of a JSON document by its place."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return {where: value}
    return {place: leaf for name, child in inner for place, leaf in leaves(child, f"{where}.{name}").items()}


# ------------------------------------------------------------------------------------------------- one server killed


class Scripted(FakeEngine):
    """A fake engine that closes on what is not HTTP/1.1: sglang-router asks by gRPC first."""

    async def _read(self, reader: Any) -> Any:
        try:
            return await super()._read(reader)
        except ValueError:
            raise ConnectionError from None


class Server:
    """One engine server: real, or a scripted one."""

    def __init__(self, url: str, model: str, pid: int = 0, fake: FakeEngine | None = None) -> None:
        self.url, self.model, self.pid, self.fake = url, model, pid, fake

    def kill(self) -> None:
        if self.fake:
            self.fake.stop()
            return
        for pid in engines._family(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def running(self) -> float:
        """Generations that the engine works on."""
        if self.fake:
            return float(self.fake.live)
        text = httpx.get(self.url + "/metrics", trust_env=False, timeout=10).text
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(("vllm:num_requests_running", "sglang:num_running_reqs"))
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def client_gone(ours: Command, servers: list[Server], model: str) -> dict[str, Any]:
    """Through the router too, the engine stops for a client that hung up."""
    took: dict[str, list[float]] = {"whole": [], "streamed": []}
    for number in range(6):
        streamed = bool(number % 2)
        body = {"messages": HI, "max_tokens": 1500, "stream": streamed}
        connection = httpx.Client(base_url=ours.url, timeout=httpx.Timeout(60, read=1.5), trust_env=False)
        with contextlib.suppress(httpx.TimeoutException):
            if streamed:
                with connection.stream("POST", "/api/v1/llm/chat", json=body) as reply:
                    for _ in reply.iter_raw():
                        break
            else:
                connection.post("/api/v1/llm/chat", json=body)
        connection.close()
        gone = time.monotonic()
        with contextlib.suppress(AssertionError):
            until(lambda: sum(server.running() for server in servers) == 0, 30)
        took["streamed" if streamed else "whole"].append(round(time.monotonic() - gone, 2))
    return {"engine_idle_after_s": took}


def killed(
    engine: str, servers: list[Server], more: list[str], name: str, clients: int, max_tokens: int, bring_back: bool
) -> None:
    with router(engine, [server.url for server in servers], more) as url:
        with Command("--engine", engine, "--base-url", url) as ours:
            with Load(ours.url, servers[0].model, clients=clients, max_tokens=max_tokens) as load:
                until(lambda: len(load.answers) > 2 * clients, 120)
                at = time.monotonic()
                servers[1].kill()
                time.sleep(20)
                back = time.monotonic()
                if bring_back and servers[1].fake:
                    fake = servers[1].fake
                    fake.requests.clear()
                    fake.start()
                    with contextlib.suppress(AssertionError):
                        until(lambda: bool(fake.bodies), 75)
                    back = time.monotonic() - back
            figures = reported(load.answers, at)
            if bring_back:
                figures["used_again_after_s"] = round(back, 1)
    record(
        "routers",
        f"{engine}: {name}",
        figures
        | {"router": f"{ROUTERS[engine].program[0]} {version(engine)}", "settings": " ".join(more) or "defaults"},
    )


@contextlib.contextmanager
def servers(engine: str, fake: bool) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        if fake:
            found = [stack.enter_context(Scripted(engine)) for _ in range(2)]  # type: ignore[arg-type]
            for each in found:
                each.pace = 0.05
            yield [Server(each.base_url, each.model, fake=each) for each in found]
        else:
            engines.install(engine)
            engines.hf_model()
            with ThreadPoolExecutor(2) as pool:
                started = list(pool.map(lambda _: stack.enter_context(engines.running(engine)), range(2)))
            yield [Server(each.base_url, each.model, each.pid) for each in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=list(ROUTERS))
    parser.add_argument("--fake", action="store_true", help="scripted engines")
    parser.add_argument("--parts", default="bodies,compare,gone,tuned,defaults")
    parser.add_argument("--json", help="results go there too")
    args = parser.parse_args()
    if args.json:
        os.environ["LLM_TEST_SCALE_JSON"] = args.json
    kind, parts = "scripted engines" if args.fake else "real engines", args.parts.split(",")
    program(args.engine)
    if "bodies" in parts:
        record("routers", f"{args.engine}: bodies", bodies(args.engine))
    if {"compare", "gone", "tuned"} & set(parts):
        with servers(args.engine, args.fake) as two:
            say("two engine servers answer")
            if {"compare", "gone"} & set(parts):
                with router(args.engine, [server.url for server in two], tuned(args.engine)) as url:
                    if "compare" in parts:
                        record("routers", f"{args.engine}: what passes, {kind}", compare(args.engine, two[0].url, url))
                    if "gone" in parts:
                        with Command("--engine", args.engine, "--base-url", url) as ours:
                            record(
                                "routers", f"{args.engine}: client gone, {kind}", client_gone(ours, two, two[0].model)
                            )
            if "tuned" in parts:
                killed(
                    args.engine,
                    two,
                    tuned(args.engine),
                    f"one of two killed -9, tuned, {kind}",
                    16 if args.fake else 8,
                    64 if args.fake else 24,
                    args.fake,
                )
    if "defaults" in parts:
        with servers(args.engine, args.fake) as two:
            killed(
                args.engine,
                two,
                [],
                f"one of two killed -9, the router's defaults, {kind}",
                16 if args.fake else 8,
                64 if args.fake else 24,
                args.fake,
            )


if __name__ == "__main__":
    main()
