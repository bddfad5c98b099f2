"""Shared helpers: to run the server under test in a thread or as a command, read its answers, and use the library.

with Stand("vllm") as stand:                 # the app with all its routes in front of a fake vLLM
    stand.post("/generate", prompt="hi")
    stand.engine.wait(lambda: stand.engine.live == 0)
"""

import asyncio
import contextlib
import gc
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import uvicorn

import llm_inference as product
from tests.fake_engine import SGLANG_FLAGS, Dialect, FakeEngine, Json, Reply
from tests.processes import ROOT, free_port, neutral_environment

T = TypeVar("T")
API = "/api/v1/llm"
PROMPT = "Count from one to twenty, in words."
KINDS: dict[str, type[product.InferenceError]] = {
    cls.kind: cls for cls in (product.InferenceError, *product.InferenceError.__subclasses__())
}
SOON = 2.0  # seconds; the promise is one, and this machine has other work
#: replies that are errors: before the answer, and in its middle
BROKEN = (
    Reply(status=500, headers={"content-type": "application/json"}, pieces=[b'{"error":"boom"}']),
    Reply(headers={"content-type": "text/event-stream"}, pieces=[b"data: {}\n\n"]),
)


# ------------------------------------------------------------------------------------------------------ in a thread


@contextlib.contextmanager
def serving(app: Any, ready: str | None = "/ready", **config: Any) -> Iterator[str]:
    """Serve any ASGI app with uvicorn on a free loopback port; yields the URL once the route `ready` answers anything
    other than "starting"."""
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


def until(condition: Callable[[], T], timeout: float = 10.0) -> T:
    """Waits until the condition holds, and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)
    return value


class Stand:
    """The app with all its routes in front of one fake engine (or, with `url`, any server), with methods to call it."""

    def __init__(
        self,
        dialect: Dialect = "vllm",
        *,
        capabilities: Sequence[str] = (),
        reasoning: str = "",
        engine: FakeEngine | None = None,
        **settings: Any,
    ) -> None:
        self.engine = engine or FakeEngine(dialect)
        self.engine.flags |= SGLANG_FLAGS
        self.engine.capabilities += [each for each in capabilities if each not in self.engine.capabilities]
        self.engine.reasoning = reasoning
        self.settings = settings
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.engine)
        settings = {"engine": self.engine.dialect, "base_url": self.engine.base_url, **self.settings}
        found = product.Settings(**settings)
        self.app = product.create_app(found)
        self.gateway: product.Gateway = self.app.state.gateway
        http = product.limited_protocol(found)  # as `run_server` has it
        self.url = self._stack.enter_context(serving(self.served(), http=http))
        self.client = self._stack.enter_context(httpx.Client(base_url=self.url, timeout=20, trust_env=False))
        return self

    def served(self) -> Any:
        """What is served: the app as `run_server` has it; subclasses may put a layer around it."""
        return product.inside_out(self.app)

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
        """A client that has sent its request and read nothing yet; it may disconnect (`close`) at any time."""
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
    """The payloads of the events, which may only be `data: …` lines and comments, each closed by an empty line."""
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
    """The `data` of a successful envelope."""
    assert reply.status_code == 200, reply.text
    body = enveloped(reply.json())
    assert (body["code"], body["msg"]) == (200, "success")
    return body["data"]


def refused(reply: httpx.Response, kind: str, status: int | None = None) -> str:
    """The message of an error envelope of that kind, checked against the contract."""
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
    """The same for an error in OpenAI's format."""
    status, of_type = KINDS[kind].v1
    error = reply.json()["error"]
    assert set(reply.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (reply.status_code, error["type"], error["code"], reply.headers["x-error-kind"]) == (
        status,
        of_type,
        KINDS[kind].openai_code or kind,
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
    """Our environment without the variables of llm_inference, and with engine addresses where nothing listens."""
    nobody = dict.fromkeys(("OLLAMA_HOST", "VLLM_BASE_URL", "SGLANG_BASE_URL"), "127.0.0.1:9")
    return neutral_environment() | nobody | more


def run_command(
    *args: str, timeout: float = 60, script: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line of llm_inference (or of a script with the same one) until it ends."""
    return subprocess.run(
        [sys.executable, str(script or ROOT / "llm_inference.py"), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_env(**env),
        check=False,
    )


def serve_flags(port: int, *more: str) -> list[str]:
    return ["--serve", "--host", "127.0.0.1", "--port", str(port), *more]


class Command:
    """A running `python llm_inference.py --serve …` (or a script or module with the same flags), ended by its pid."""

    def __init__(
        self,
        *args: str,
        script: Path | None = None,
        module: str = "",
        python: str = sys.executable,
        env: dict[str, str] | None = None,
        ready: bool = True,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        program = ["-m", module] if module else [str(script or ROOT / "llm_inference.py")]
        argv = [python, *program, *serve_flags(self.port, *args)]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT if module else None,
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
        """Send SIGTERM; returns the exit code."""
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


# -------------------------------------------------------------------------------------------------- in the library


async def collect(items: AsyncGenerator[T, None]) -> list[T]:
    return [item async for item in items]


def chunks(llm: product.LLMInferencer, prompt: str | Sequence[Any] = PROMPT, **options: Any) -> list[product.Chunk]:
    """Every chunk of a streamed answer."""
    asked = llm.request(prompt, **options)
    return [chunk for burst in asyncio.run(collect(llm.bursts(asked))) for chunk in burst]


@contextlib.contextmanager
def no_error_stays() -> Iterator[None]:
    """Check that the errors raised inside are freed without the garbage collector, and so the requests that their
    frames hold."""

    def alive() -> set[int]:
        return {id(each) for each in gc.get_objects() if isinstance(each, product.InferenceError)}

    gc.collect()
    before = alive()  # of other tests
    gc.disable()
    try:
        yield
        deadline = time.monotonic() + 10
        while not alive() <= before:  # a loop lets go of its last step a moment later
            assert time.monotonic() < deadline, "an error is kept"
            time.sleep(0.01)
    finally:
        gc.enable()
