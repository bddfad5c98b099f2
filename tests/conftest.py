"""Fixtures of all tests: a clean environment, fake engines, and the engines of the contract suite.

Real servers are used where LLM_TEST_VLLM_URL, LLM_TEST_SGLANG_URL or LLM_TEST_OLLAMA_URL name one (LLM_TEST_OLLAMA_MODEL:
its model); everything else needs loopback, tests/requirements.txt and the embedded model alone. LLM_TEST_WIRE=httpx: as
without aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fake_engine import Dialect, FakeEngine, Json, Reply, Seen, recorded

from llm_inference import Chunk, HttpxWire, InferenceError, LLMInferencer, Wire

T = TypeVar("T")
ALL: tuple[Dialect, ...] = ("ollama", "vllm", "sglang", "llamacpp")
CHAT = {
    "ollama": "/api/chat",
    "vllm": "/v1/chat/completions",
    "sglang": "/v1/chat/completions",
    "llamacpp": "/v1/chat/completions",
}
PROMPT = "Count from one to twenty, in words."
_KEPT = ("LLM_INFERENCE_TEST_CACHE",)
_OURS = ("OLLAMA_", "VLLM_", "SGLANG_", "LLAMACPP_", "LLM_INFERENCE_")


def pytest_configure() -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background ignores it, and what the tests start would too
    if os.environ.get("LLM_TEST_WIRE") == "httpx":  # as where the five packages alone are installed
        Wire.open = staticmethod(HttpxWire)  # type: ignore[method-assign]


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(_OURS) and n not in _KEPT]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests reaches them."""
    clear_environment(monkeypatch)


class Fake(FakeEngine):
    """A fake engine with the start flags of SGLang, and a view of the generations that it was asked for."""

    def __init__(self, dialect: Dialect, **options: Any) -> None:
        super().__init__(dialect, **options)
        self.flags: Json = {
            "tool_call_parser": "qwen",
            "reasoning_parser": None,
            "enable_deterministic_inference": False,
        }

    @property
    def chat(self) -> str:
        return CHAT[self.dialect]

    @property
    def asked(self) -> list[Seen]:
        """The requests for a generation, in their order."""
        return [
            seen
            for seen in list(self.requests)
            if seen.method == "POST" and seen.path in (self.chat, "/api/generate", "/v1/completions")
        ]

    @property
    def body(self) -> Json:
        """What the last generation was asked with."""
        asked: Json = self.asked[-1].json
        return asked

    def say(self, *names: str) -> None:
        """The next chat calls get these recordings (a probe of the module's own does not use them up)."""
        for name in names:
            self.script(recorded(self.dialect, name), self.chat)

    def reply(self, reply: Reply) -> None:
        self.script(reply, self.chat)

    def stream_reply(self) -> Reply:
        """A recorded, whole, streamed answer."""
        return recorded(self.dialect, "06_chat_stream" if self.dialect == "ollama" else "chat_stream_usage")

    def _info(self, path: str) -> Reply:
        reply = super()._info(path)
        if path == "/server_info" and reply.status == 200:
            reply = self._json({**json.loads(reply.pieces[0]), **self.flags})
        return reply


class Attach(Protocol):
    def __call__(self, engine: Fake | Dialect, model_name: str | None = None, **options: Any) -> LLMInferencer: ...


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Makes running fake engines: `fake("vllm", version="0.10.2")`."""
    with contextlib.ExitStack() as stack:

        def make(dialect: Dialect, **options: Any) -> Fake:
            engine = Fake(dialect, **options)
            stack.enter_context(engine)
            return engine

        yield make


@pytest.fixture
def attach(fake: Callable[..., Fake]) -> Iterator[Attach]:
    """Makes inferencers: `attach(engine)`, or `attach("vllm", base_url=…)`."""
    made: list[LLMInferencer] = []

    def make(engine: Fake | Dialect, model_name: str | None = None, **options: Any) -> LLMInferencer:
        if isinstance(engine, Fake):
            options.setdefault("base_url", engine.base_url)
        llm = LLMInferencer(engine.dialect if isinstance(engine, Fake) else engine, model_name, **options)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="session")
def embedded() -> Iterator[LLMInferencer]:
    """The real embedded engine, one for the session; nothing outside is attached to."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear_environment(monkeypatch)
        llm = LLMInferencer("llamacpp", launch=True)
        llm.__enter__()
    yield llm
    llm.close()


@dataclass(frozen=True)
class Engine:
    """An engine of the contract suite; `fake` is None for a real one."""

    name: str
    llm: LLMInferencer
    fake: Fake | None = None

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    def says(self, *answers: str) -> None:
        """A fake gives these answers in turn, the last one for ever; a real engine finds its own."""
        if self.fake is not None:
            left = list(answers)
            self.fake.answer = lambda ask: left.pop(0) if len(left) > 1 else left[0]

    def text_of(self, value: str) -> str:
        """How a fake must spell a choice: Ollama is asked for it as JSON."""
        return f'"{value}"' if self.kind == "ollama" else value


@pytest.fixture(scope="session")
def real_server() -> Iterator[Callable[[str], LLMInferencer]]:
    """The real server that LLM_TEST_<KIND>_URL names; skips, by name, where there is none."""
    made: dict[str, LLMInferencer] = {}

    def find(kind: str) -> LLMInferencer:
        name = f"LLM_TEST_{kind.upper()}_URL"
        if not (url := os.environ.get(name)):
            pytest.skip(f"no real {kind}: set {name}")
        return made.setdefault(
            kind, LLMInferencer(kind, os.environ.get(f"LLM_TEST_{kind.upper()}_MODEL"), base_url=url)
        )

    yield find
    for llm in made.values():
        llm.close()


ENGINES = (
    "llamacpp-real",
    "ollama-fake",
    "vllm-fake",
    "sglang-fake",
    "llamacpp-fake",
    "vllm-real",
    "sglang-real",
    "ollama-real",
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, fake: Callable[..., Fake], attach: Attach) -> Engine:
    """One engine after the other, under the same laws."""
    name: str = request.param
    kind, _, how = name.partition("-")
    if how == "fake":
        made = fake(kind)
        return Engine(name, attach(made), made)
    return Engine(
        name,
        request.getfixturevalue("embedded") if kind == "llamacpp" else request.getfixturevalue("real_server")(kind),
    )


@pytest.fixture(params=ALL)
def faked(request: pytest.FixtureRequest, fake: Callable[..., Fake], attach: Attach) -> Engine:
    """The four fakes alone, for laws that need a scripted engine."""
    made = fake(request.param)
    return Engine(f"{request.param}-fake", attach(made), made)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def collect(items: AsyncGenerator[T, None]) -> list[T]:
    return [item async for item in items]


def chunks(llm: LLMInferencer, prompt: str | Sequence[Any] = PROMPT, **options: Any) -> list[Chunk]:
    """Every chunk of a streamed answer."""
    asked, build = llm.request(prompt, **options)
    return [chunk for burst in run(collect(llm.bursts(asked, build))) for chunk in burst]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, package=None: None if name in names else find(name, package)
        )

    return hide


#: replies that are errors: before the answer, and in its middle
BROKEN = (
    Reply(status=500, headers={"content-type": "application/json"}, pieces=[b'{"error":"boom"}']),
    Reply(headers={"content-type": "text/event-stream"}, pieces=[b"data: {}\n\n"]),
)


@contextlib.contextmanager
def no_error_stays() -> Iterator[None]:
    """The errors that are raised in here go without the collector, and with them the requests that their frames hold."""

    def alive() -> set[int]:
        return {id(each) for each in gc.get_objects() if isinstance(each, InferenceError)}

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
