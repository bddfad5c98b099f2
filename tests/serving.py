"""The server under test: in a thread (`serving`, `Stand`), or as the real command (`Command`). A pytest plugin of fixtures too
(PYTEST_DONT_REWRITE: the test modules import it before pytest does).

    with Stand("vllm") as stand:                 # the whole app in front of a fake vLLM
        stand.post("/generate", prompt="hi")
        stand.engine.wait(lambda: stand.engine.live == 0)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_engine import TEXT, Dialect, FakeEngine, Json, Reply

import llm_inference as product

ROOT = Path(__file__).resolve().parent.parent
API = "/api/v1/llm"
ALL: list[Dialect] = ["ollama", "vllm", "sglang", "llamacpp"]
KINDS = {cls.kind: cls for cls in (product.InferenceError, *product.InferenceError.__subclasses__())}
OURS = ("OLLAMA_HOST", "VLLM_", "SGLANG_", "LLAMACPP_", "LLM_INFERENCE_", "OPENAI_")
SOON = 2.0  # seconds; the promise is one, and this machine has other work


# ------------------------------------------------------------------------------------------------------ in a thread


@contextlib.contextmanager
def serving(app: Any, ready: str | None = "/ready", **config: Any) -> Iterator[str]:
    """Any ASGI app behind uvicorn on a free loopback port; the URL, once `ready` says something else than "starting"."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3, **config)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        if ready:
            until(lambda: httpx.get(url + ready, trust_env=False).json()["status"] != "starting", 30)
        yield url
    finally:
        server.should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def until(true: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


class Fake(FakeEngine):
    """FakeEngine, with an SGLang whose /server_info tells its flags as the real one does; and `reset` between tests."""

    def _info(self, path: str) -> Reply:
        reply = super()._info(path)
        if self.dialect == "sglang" and path in ("/server_info", "/get_server_info"):
            flags = {
                "tool_call_parser": "qwen" if "tools" in self.capabilities else None,
                "reasoning_parser": "qwen3",
                "enable_deterministic_inference": True,
            }
            return self._json({**json.loads(reply.pieces[0]), **flags})
        return reply

    def reset(self) -> Self:
        self.wait(lambda: self.live == 0)
        self.text, self.answer, self.reasoning, self.tool_call, self.pace, self.slice = TEXT, None, "", None, 0.0, 0
        self.requests.clear()
        self._queue.clear()
        return self

    def asked(self) -> list[Json]:
        """The bodies of the generations so far."""
        return [
            seen.json for seen in self.requests if seen.method == "POST" and seen.path not in ("/api/show", "/tokenize")
        ]


class Stand:
    """The whole app in front of one fake engine (or, with `url`, any server), and the ways to ask it."""

    def __init__(
        self,
        dialect: Dialect = "vllm",
        *,
        capabilities: Sequence[str] = (),
        reasoning: str = "",
        engine: Fake | None = None,
        **settings: Any,
    ) -> None:
        self.engine = engine or Fake(dialect)
        self.engine.capabilities += [each for each in capabilities if each not in self.engine.capabilities]
        self.engine.reasoning = reasoning
        self.settings = settings
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.engine)
        settings = {"engine": self.engine.dialect, "base_url": self.engine.base_url, **self.settings}
        self.app = product.create_app(product.Settings(**settings))
        self.hub: product.Hub = self.app.state.hub
        self.url = self._stack.enter_context(serving(self.app))
        self.client = self._stack.enter_context(httpx.Client(base_url=self.url, timeout=20, trust_env=False))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    @property
    def model(self) -> str:
        return f"{self.engine.dialect}/{self.engine.model}"

    def post(self, path: str, /, _headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.client.post(path if path.startswith("/v1") else API + path, json=body, headers=_headers)

    def raw(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        return self.client.post(
            path if path.startswith("/v1") else API + path,
            content=body,
            headers={"content-type": "application/json", **headers},
        )

    def events(self, path: str, **body: Any) -> list[Any]:
        """The payloads of a streamed answer, "[DONE]" as it is."""
        reply = self.post(path, stream=True, **body)
        assert reply.status_code == 200, reply.text
        return payloads(reply)

    @contextlib.contextmanager
    def leaving(self, path: str, **body: Any) -> Iterator[http.client.HTTPConnection]:
        """A client that has asked and not yet read anything; it may hang up (`close`) whenever it wants."""
        with contextlib.closing(hang_up(self.url)) as client:
            client.request(
                "POST",
                path if path.startswith("/v1") else API + path,
                json.dumps(body),
                {"content-type": "application/json"},
            )
            yield client


def hang_up(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=20)


def payloads(reply: httpx.Response) -> list[Any]:
    """Events may only be `data: …` lines and comments, each closed by an empty line."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    text = reply.content.decode()
    assert not text or text.endswith("\n\n")
    found = []
    for event in filter(None, text.split("\n\n")):
        assert event.startswith(("data: ", ":")) and "\n" not in event, event
        if event.startswith("data: "):
            found.append(event[6:] if event == "data: [DONE]" else json.loads(event[6:]))
    return found


def good(reply: httpx.Response) -> Any:
    """`data` of a good envelope."""
    assert reply.status_code == 200, reply.text
    body = enveloped(reply.json())
    assert (body["code"], body["msg"]) == (200, "success")
    return body["data"]


def refused(reply: httpx.Response, kind: str, status: int | None = None) -> str:
    """The message of an envelope of that kind, as the contract has it."""
    body, error = enveloped(reply.json()), KINDS[kind]
    assert body["msg"].startswith(f"{kind}: "), body
    assert (body["code"], reply.status_code, reply.headers["x-error-kind"]) == (
        error.code,
        status or error.http or error.code,
        kind,
    ), (body, reply.status_code)
    assert body["data"] is None
    assert reply.headers["content-type"].startswith("application/json")
    return str(body["msg"])


def refused_v1(reply: httpx.Response, kind: str) -> str:
    """The same in OpenAI's format."""
    status, of_type = KINDS[kind].v1
    error = reply.json()["error"]
    assert set(reply.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (reply.status_code, error["type"], error["code"], reply.headers["x-error-kind"]) == (
        status,
        of_type,
        kind,
        kind,
    ), reply.text
    return str(error["message"])


def enveloped(body: Any) -> Json:
    assert list(body) == ["request_id", "code", "msg", "data"], body
    assert str(uuid.UUID(body["request_id"])) == body["request_id"]
    assert body["code"] in (200, 400, 500)
    return dict(body)


# --------------------------------------------------------------------------------------------------- as a command


def clean_env(**more: str) -> dict[str, str]:
    """Ours, without what steers llm_inference, and with nobody on the engines' default ports."""
    nobody = dict.fromkeys(("OLLAMA_HOST", "VLLM_BASE_URL", "SGLANG_BASE_URL"), "127.0.0.1:9")
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | nobody | more


def run(*args: str, timeout: float = 60, script: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script or ROOT / "llm_inference.py"), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_env(**env),
        check=False,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Command:
    """`python llm_inference.py --serve …` (or a script with the same command line), ended by its pid."""

    def __init__(
        self,
        *args: str,
        script: Path | None = None,
        python: str = sys.executable,
        env: dict[str, str] | None = None,
        ready: bool = True,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        argv = [
            python,
            str(script or ROOT / "llm_inference.py"),
            "--serve",
            "--port",
            str(self.port),
            "--host",
            "127.0.0.1",
            *args,
        ]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_env(**(env or {})),
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready = ready

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line

    def __enter__(self) -> Self:
        try:
            until(self._answers, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"it ended: {self.said}"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + ("/ready" if self._ready else "/health"), trust_env=False).status_code == 200
        return False

    def end(self, timeout: float = 20) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        self._reader.join(5)


def descendants(pid: int) -> set[int]:
    """The live processes below this one (Linux)."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found |= {child} | descendants(child)
    return found


# --------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is on the engines' default ports, whatever runs on this machine."""
    for adapter in (product.OllamaAdapter, product.VLLMAdapter, product.SGLangAdapter, product.LlamaCppAdapter):
        monkeypatch.setattr(adapter, "default_url", "http://127.0.0.1:9")
        monkeypatch.delenv(adapter.url_env, raising=False)


@pytest.fixture(scope="session")
def all_stands() -> Iterator[dict[str, Stand]]:
    with contextlib.ExitStack() as stack:
        yield {dialect: stack.enter_context(Stand(dialect)) for dialect in ALL}


@pytest.fixture(params=ALL)
def stand(request: pytest.FixtureRequest, all_stands: dict[str, Stand]) -> Stand:
    """The app in front of each fake engine in turn."""
    found = all_stands[request.param]
    found.engine.reset()
    return found


@pytest.fixture
def vllm(all_stands: dict[str, Stand]) -> Stand:
    """The app in front of the fake vLLM, for what does not depend on the engine."""
    all_stands["vllm"].engine.reset()
    return all_stands["vllm"]


@pytest.fixture(scope="session")
def real() -> Iterator[httpx.Client]:
    """The real command with the real embedded engine and model."""
    with (
        Command("--engine", "llamacpp") as command,
        httpx.Client(base_url=command.url, timeout=120, trust_env=False) as client,
    ):
        yield client
