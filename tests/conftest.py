"""Fixtures of all tests: a clean environment, fake engines, and the engines of the contract suite.

Real servers are used where LLM_TEST_VLLM_URL, LLM_TEST_SGLANG_URL or LLM_TEST_OLLAMA_URL name one
(LLM_TEST_OLLAMA_MODEL: its model); everything else needs loopback, tests/requirements.txt and the embedded model alone.
LLM_TEST_WIRE=h11: as without httptools.
LLM_TEST_FLEET=1: each engine of the contract is the first of a mixed fleet."""

import contextlib
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import pytest

import llm_inference as product
from llm_inference import EndpointConfig, H11Parser, LLMInferencer
from tests.fake_engine import DIALECTS, Dialect, FakeEngine
from tests.harness import Command, Stand
from tests.processes import is_setting


def pytest_configure() -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background ignores it, and what the tests start would too
    if os.environ.get("LLM_TEST_WIRE") == "h11":  # as where the five packages alone are installed
        product.response_parser = lambda: H11Parser


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if is_setting(name):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests reaches them."""
    clear_environment(monkeypatch)


@pytest.fixture(autouse=True)
def asked_again_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's laws ask a faulty engine twice; in a fleet it would be left alone meanwhile."""
    if os.environ.get("LLM_TEST_FLEET"):
        monkeypatch.setattr(product.Endpoint, "available", lambda self, now: not self.removed and self.trial is None)


class Attach(Protocol):
    def __call__(
        self, engine: FakeEngine | Dialect, model_name: str | None = None, **options: Any
    ) -> LLMInferencer: ...


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeEngine]]:
    """Makes running fake engines: `fake("vllm", version="0.10.2")`."""
    with contextlib.ExitStack() as stack:

        def make(dialect: Dialect, **options: Any) -> FakeEngine:
            engine = FakeEngine(dialect, **options)
            stack.enter_context(engine)
            return engine

        yield make


@pytest.fixture
def attach(fake: Callable[..., FakeEngine]) -> Iterator[Attach]:
    """Makes inferencers: `attach(engine)`, or `attach("vllm", base_url=…)`."""
    made: list[LLMInferencer] = []

    def make(engine: FakeEngine | Dialect, model_name: str | None = None, **options: Any) -> LLMInferencer:
        if isinstance(engine, FakeEngine):
            options.setdefault("base_url", engine.base_url)
        llm = LLMInferencer(engine.dialect if isinstance(engine, FakeEngine) else engine, model_name, **options)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="session")
def bystanders() -> Iterator[tuple[EndpointConfig, ...]]:
    """A fake of each dialect with a model of its own: the rest of a fleet. None without LLM_TEST_FLEET."""
    with contextlib.ExitStack() as stack:
        found = []
        for dialect in DIALECTS if os.environ.get("LLM_TEST_FLEET") else ():
            made = stack.enter_context(FakeEngine(dialect, model=f"another-{dialect}"))
            found.append(EndpointConfig(name=f"by-{dialect}", engine=dialect, base_url=made.base_url))
        yield tuple(found)


def among(bystanders: tuple[EndpointConfig, ...], engine: str, **config: Any) -> LLMInferencer:
    """An engine alone, or the first of a fleet."""
    if not bystanders:
        return LLMInferencer(engine, **config)
    first = EndpointConfig(engine=engine, **config)
    return product.Settings(endpoints=(first, *bystanders)).inferencer()


@pytest.fixture(scope="session")
def embedded(bystanders: tuple[EndpointConfig, ...]) -> Iterator[LLMInferencer]:
    """The real embedded engine, one for the session; nothing outside is attached to."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear_environment(monkeypatch)
        llm = among(bystanders, "llamacpp", **({} if bystanders else {"launch": True}))
        llm.__enter__()
    yield llm
    llm.close()


@dataclass(frozen=True)
class Engine:
    """An engine of the contract suite; `fake` is None for a real one."""

    name: str
    llm: LLMInferencer
    fake: FakeEngine | None = None

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    def answers(self, *answers: str) -> None:
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


@pytest.fixture
def scripted(
    fake: Callable[..., FakeEngine], bystanders: tuple[EndpointConfig, ...]
) -> Iterator[Callable[[Dialect], Engine]]:
    """Makes a fake engine under the contract."""
    with contextlib.ExitStack() as stack:

        def make(dialect: Dialect) -> Engine:
            made = fake(dialect)
            llm = stack.enter_context(contextlib.closing(among(bystanders, dialect, base_url=made.base_url)))
            return Engine(f"{dialect}-fake", llm, made)

        yield make


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, scripted: Callable[[Dialect], Engine]) -> Engine:
    """One engine after the other, under the same laws."""
    name: str = request.param
    kind, _, how = name.partition("-")
    if how == "fake":
        return scripted(kind)  # type: ignore[arg-type]
    return Engine(
        name,
        request.getfixturevalue("embedded") if kind == "llamacpp" else request.getfixturevalue("real_server")(kind),
    )


@pytest.fixture(params=DIALECTS)
def faked(request: pytest.FixtureRequest, scripted: Callable[[Dialect], Engine]) -> Engine:
    """The four fakes alone, for laws that need a scripted engine."""
    return scripted(request.param)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, package=None: None if name in names else find(name, package)
        )

    return hide


# ------------------------------------------------------------------------------------------------ servers


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is on the engines' default ports, whatever runs on this machine."""
    for adapter in (product.OllamaAdapter, product.VLLMAdapter, product.SGLangAdapter, product.LlamaCppAdapter):
        monkeypatch.setattr(adapter, "default_url", "http://127.0.0.1:9")
        monkeypatch.delenv(adapter.url_env, raising=False)


@pytest.fixture(scope="session")
def all_stands() -> Iterator[dict[str, Stand]]:
    with contextlib.ExitStack() as stack:
        yield {dialect: stack.enter_context(Stand(dialect)) for dialect in DIALECTS}


@pytest.fixture(params=DIALECTS)
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
