"""Several endpoints behind one address: naming, choice, failover, starts on request, the config file.

The laws are those of the design's section on endpoints. Most tests run fake engines; the last part starts real ones.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

import llm_inference as product
from llm_inference import (
    Endpoint,
    EndpointConfig,
    EngineChild,
    EngineTimeout,
    EngineUnavailable,
    Fleet,
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    ModelNotFound,
    Replicas,
    Settings,
    VLLMAdapter,
)
from tests.conftest import Attach
from tests.fake_engine import DIALECTS, Dialect, FakeEngine, Reply, recorded
from tests.harness import API, Command, good, payloads, refused, refused_v1, run_command, serving, until
from tests.processes import ROOT, alive, descendants, free_port

Make = Callable[..., FakeEngine]
HI = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}

# ---------------------------------------------------------------------------------------------------------- helpers


def attached(engine: FakeEngine, name: str = "", **more: Any) -> EndpointConfig:
    return EndpointConfig(name=name, engine=engine.dialect, base_url=engine.base_url, **more)


class Site:
    """The app in front of a configured fleet, in a thread."""

    def __init__(self, *endpoints: EndpointConfig, llm: LLMInferencer | None = None, **settings: Any) -> None:
        self.app = product.create_app(Settings(endpoints=endpoints, **settings), llm)
        self.gateway: product.Gateway = self.app.state.gateway
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.url = self._stack.enter_context(serving(self.app))
        self.client = self._stack.enter_context(httpx.Client(base_url=self.url, timeout=30, trust_env=False))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    @property
    def endpoints(self) -> list[Endpoint]:
        fleet = self.gateway.default.fleet
        assert fleet is not None
        return fleet.endpoints

    def generate(self, prompt: str = "hi", **body: Any) -> httpx.Response:
        return self.client.post(f"{API}/generate", json={"prompt": prompt, **body})

    def v1(self, model: str, messages: Any = HI, **body: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **body})


class Refuser:
    """A port where every connection is closed at once; it remembers when."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port))
        self.base_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.times.append(time.monotonic())
                connection.close()

    @property
    def trials(self) -> list[float]:
        """When it was tried; one trial may take two connections."""
        found: list[float] = []
        for at in sorted(self.times):
            if not found or at - found[-1] > 0.5:
                found.append(at)
        return found


@contextlib.contextmanager
def unresponsive() -> Iterator[str]:
    """An address that takes no connection and refuses none: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def replicas(attach: Attach, fake: Make, count: int = 2, dialect: Dialect = "vllm") -> tuple[Any, list[FakeEngine]]:
    engines = [fake(dialect) for _ in range(count)]
    return attach(dialect, base_url=[engine.base_url for engine in engines]), engines


def endpoints_of(llm: LLMInferencer) -> list[Endpoint]:
    assert llm.fleet is not None
    return llm.fleet.endpoints


def who(engines: Sequence[FakeEngine], ask: Callable[[], Any]) -> FakeEngine:
    """The engine that answered."""
    before = [len(engine.asked) for engine in engines]
    ask()
    (found,) = [engine for engine, count in zip(engines, before, strict=True) if len(engine.asked) > count]
    return found


def other_than(engines: Sequence[FakeEngine], one: FakeEngine) -> FakeEngine:
    (found,) = [engine for engine in engines if engine is not one]
    return found


def endpoint_at(llm: LLMInferencer, engine: FakeEngine) -> Endpoint:
    (found,) = [each for each in endpoints_of(llm) if each.adapter.base_url == engine.base_url]
    return found


def at_once(count: int, ask: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def a_fleet(count: int, slots: Sequence[int] = ()) -> Replicas:
    """Endpoints that nobody reaches."""
    made = []
    for number in range(count):
        adapter = VLLMAdapter(base_url=f"http://127.0.0.1:{number + 1}")
        made.append(Endpoint(adapter, name=f"vllm-{number + 1}", slots=slots[number] if slots else 1))
    return Replicas(made)


# ------------------------------------------------------------------------------------------------------ in Python


def test_a_list_of_addresses_is_a_set_of_replicas(attach: Attach, fake: Make) -> None:
    llm, engines = replicas(attach, fake)
    for number in range(40):
        assert llm.generate(f"question {number}")
    assert all(engine.asked for engine in engines)
    assert sum(len(engine.asked) for engine in engines) == 40


def test_verbs_that_name_no_model_do_not_need_the_first_replica(attach: Attach, fake: Make) -> None:
    llm, (first, second) = replicas(attach, fake)
    assert [model.name for model in llm.models()] == ["m"], "which both serve"
    first.stop()
    llm = attach("vllm", base_url=[first.base_url, second.base_url])
    assert len(llm.embed("x")) == 1
    health = llm.health()
    assert (health["healthy"], health["how"], health["models"]) == (True, "attached by base_url", ["m"])
    second.stop()
    assert not attach("vllm", base_url=[first.base_url, second.base_url]).health()["healthy"]
    with pytest.raises(EngineUnavailable):
        attach("vllm", base_url=[first.base_url, second.base_url]).models()


def test_the_models_of_one_endpoint_are_those_to_serve(fake: Make, tmp_path: Path) -> None:
    engine = fake("ollama", model="a:latest")
    engine.models.append("b:latest")
    with LLMInferencer.from_config(write(tmp_path, table(engine, models=["b:latest"]))) as llm:
        assert [model.name for model in llm.models()] == llm.health()["models"] == ["b:latest"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_variable_takes_a_list(
    dialect: Dialect, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [fake(dialect), fake(dialect)]
    variable = "OLLAMA_HOST" if dialect == "ollama" else f"{dialect.upper()}_BASE_URL"
    monkeypatch.setenv(variable, f"{engines[0].base_url}, {engines[1].base_url}")
    llm = attach(dialect)
    for number in range(40):
        assert llm.generate(f"question {number}")
    assert all(engine.asked for engine in engines)


def test_a_comma_too_many_is_no_further_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be a replica at the engine's default address."""
    monkeypatch.setenv("OLLAMA_HOST", "a:1, ")
    for llm in (
        LLMInferencer("vllm", base_url="a:1,,"),
        LLMInferencer("ollama"),
        LLMInferencer("vllm", base_url=["a:1", ""]),
    ):
        assert [each.adapter.base_url for each in endpoints_of(llm)] == ["a:1"]


def test_a_wrong_address_in_a_list_is_refused_by_name(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not passed over for the others."""
    addresses = [fake("vllm").base_url, "ftp://gpu2:8000"]
    with pytest.raises(InvalidRequest, match=r"base_url: not an http\(s\) URL"):
        LLMInferencer("vllm", base_url=addresses)
    monkeypatch.setenv("VLLM_BASE_URL", ",".join(addresses))
    with pytest.raises(InvalidRequest, match=r"VLLM_BASE_URL: not an http\(s\) URL"):
        LLMInferencer("vllm")


def test_the_variable_takes_a_list_for_the_server_too(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [fake("vllm"), fake("vllm")]
    monkeypatch.setenv("VLLM_BASE_URL", ",".join(engine.base_url for engine in engines))
    with Site(engine="vllm") as site:
        for number in range(20):
            assert good(site.generate(f"question {number}"))["text"]
            assert site.v1("m", [{"role": "user", "content": f"question {number}"}]).status_code == 200
        listed = [model["id"] for model in site.client.get("/v1/models").json()["data"]]
    assert all(engine.asked for engine in engines)
    assert len(listed) == len(set(listed)), "a replica is no second model"


def test_a_server_without_a_list_is_given_to_an_alias_with_its_fallback(
    fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--alias best=vllm/m --alias best=ollama/m:latest, without a config file."""
    fallback = fake("ollama")
    monkeypatch.setenv("OLLAMA_HOST", fallback.base_url)
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")
    with Site(engine="ollama", aliases={"best": ["vllm/m", "ollama/m"]}) as site:
        assert good(site.generate(model_name="best"))["engine_type"] == "ollama"


def test_a_config_file_in_python(fake: Make, tmp_path: Path) -> None:
    one, two, third = fake("vllm", model="a"), fake("vllm", model="b"), fake("ollama", model="c")
    file = write(tmp_path, table(one), table(two), table(third, name="small"), alias={"fast": "vllm/b"})
    with LLMInferencer.from_config(file) as llm:
        assert llm.generate("hi", model_name="a") and len(one.asked) == 1
        assert llm.generate("hi", model_name="b") and len(two.asked) == 1
        assert llm.generate("hi", model_name="fast") and len(two.asked) == 2
        assert llm.generate("hi", model_name="vllm/b") and len(two.asked) == 3
        assert llm.generate("hi", model_name="small/c:latest") and len(third.asked) == 1
        assert "".join(llm.stream("hi", model_name="small/c")) and len(third.asked) == 2
        assert [model.name for model in llm.models()] == ["a", "b", "c:latest"]
        assert llm.embed("x", model_name="b")
        with pytest.raises(ModelNotFound):
            llm.generate("hi", model_name="vllm/c")
        with pytest.raises(InvalidRequest, match="model_name"):
            llm.generate("hi", model="a")  # type: ignore[call-arg]


def test_a_config_file_wrong(tmp_path: Path) -> None:
    (tmp_path / "llm.toml").write_text('[[endpoint]]\nengine = "vllm"\nslot = 2\n')
    with pytest.raises(InvalidRequest, match=r"llm\.toml: endpoint\[1\]\.slot \(line 3\).*slots"):
        LLMInferencer.from_config(tmp_path / "llm.toml")


def test_embeddings_go_to_the_endpoint_that_embeds(fake: Make, tmp_path: Path) -> None:
    """No model is named: the first endpoint's only chats."""
    chat, embedder = fake("ollama", model="chat"), fake("ollama", model="bge")
    embedder.capabilities = ["embedding"]
    with LLMInferencer.from_config(write(tmp_path, table(chat), table(embedder))) as llm:
        assert len(llm.embed("x")) == 1
        assert len(llm.embed("x", model_name="bge")) == 1
    assert not [seen for seen in chat.requests if seen.path == "/api/embed"]


def write(folder: Path, *tables: str, alias: dict[str, Any] | None = None, head: str = "") -> Path:
    lines = [f"{name} = {json.dumps(target)}" for name, target in (alias or {}).items()]
    file = folder / "llm.toml"
    file.write_text("\n".join([head, *tables, *(["[alias]", *lines] if lines else [])]) + "\n")
    return file


def table(fake: FakeEngine | None = None, **keys: Any) -> str:
    if fake:
        keys = {"engine": fake.dialect, "base_url": fake.base_url, **keys}
    return "\n".join(["[[endpoint]]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())])


# ---------------------------------------------------------------------------------------------------------- names


def test_names_lead_to_endpoints(fake: Make) -> None:
    one, two, small = fake("vllm", model="a"), fake("vllm", model="b"), fake("ollama", model="b:latest")
    configs = (attached(one), attached(two, "second"), attached(small))
    with Site(*configs, aliases={"fast": "vllm/b", "best": ["sglang/none", "fast"]}) as site:
        for name, engine in (("a", one), ("vllm/a", one), ("vllm/b", two), ("second/b", two), ("fast", two)):
            assert who([one, two, small], functools.partial(site.generate, model_name=name)) is engine
        assert who([one, two, small], lambda: good(site.generate(model_name="best"))) is two
        assert who([one, two, small], lambda: good(site.generate(model_name="ollama/b"))) is small
        assert who([one, two, small], lambda: good(site.generate(engine_type="ollama", model_name="b"))) is small
        for name in ("fast", "second/b", "vllm/a", "ollama/b"):
            reply = site.v1(name)
            assert (reply.status_code, reply.json()["model"]) == (200, name)
            assert {event["model"] for event in payloads(site.v1(name, stream=True))[:-1]} == {name}


def test_one_endpoint_with_its_engine_named_and_no_model(fake: Make) -> None:
    with Site(attached(fake("vllm", model="a"))) as site:
        assert good(site.generate(engine_type="vllm"))["model_name"] == "a"
        assert "no endpoint runs ollama" in refused(site.generate(engine_type="ollama"), "model_not_found")


def test_a_fleet_with_an_engine_named_and_no_model(fake: Make) -> None:
    one, small = fake("vllm", model="a"), fake("ollama", model="b")
    with Site(attached(one), attached(small)) as site:
        assert good(site.generate(engine_type="ollama"))["engine_type"] == "ollama"
        assert "llamacpp" in refused(site.generate(engine_type="llamacpp"), "model_not_found")


def test_without_a_name_the_first_endpoints_model_answers(fake: Make) -> None:
    one, two = fake("vllm", model="a"), fake("vllm", model="b")
    with Site(attached(one), attached(two)) as site:
        for number in range(5):
            assert good(site.generate(f"{number}"))["model_name"] == "a"
    assert not two.asked


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("name", ["b", "ollama/b", "fast"])
def test_the_model_of_the_settings_answers_requests_that_name_none(
    name: str, more: int, fake: Make, tmp_path: Path
) -> None:
    engine, others = fake("ollama", model="a:latest"), [fake("vllm", model="c") for _ in range(more)]
    engine.models.append("b:latest")
    tables, alias = [table(each) for each in (*others, engine)], {"fast": "ollama/b"} if name == "fast" else {}
    with LLMInferencer.from_config(write(tmp_path, *tables, head=f'model = "{name}"', alias=alias)) as llm:
        assert llm.generate("hi") and engine.body["model"] == "b"
    with Site(*map(attached, (*others, engine)), model=name, aliases=alias) as site:
        assert good(site.generate())["model_name"] == "b"


@pytest.mark.parametrize("more", [0, 1])
def test_without_a_name_the_first_of_those_to_serve_answers(more: int, fake: Make) -> None:
    """The engine's own first model is not among `models`."""
    engine = fake("ollama", model="a:latest")
    engine.models.append("b:latest")
    configs = [attached(engine, models=["b:latest"]), *(attached(fake("vllm", model="c")) for _ in range(more))]
    with Site(*configs) as site:
        until(lambda: site.client.get("/ready").status_code == 200)
        assert good(site.generate())["model_name"] == "b:latest"
        refused(site.generate(model_name="a:latest"), "model_not_found")


def test_a_bare_name_on_several_endpoints_is_a_replica_set(fake: Make) -> None:
    """Even of different engines: it is no ambiguity."""
    engines = [fake("vllm"), fake("sglang"), fake("llamacpp")]
    with Site(*map(attached, engines)) as site:
        for number in range(40):
            messages = [{"role": "user", "content": f"question {number}"}]
            assert site.v1("m", messages).status_code == 200
        listed = [model["id"] for model in site.client.get("/v1/models").json()["data"]]
    assert all(engine.asked for engine in engines)
    assert len(listed) == len(set(listed))


def test_an_unknown_model_is_named_with_what_is_near(fake: Make) -> None:
    with Site(attached(fake("vllm", model="Qwen3-8B")), attached(fake("ollama", model="llama3.2"))) as site:
        assert "Qwen3-8B" in refused(site.generate(model_name="Qwen3-8b"), "model_not_found")
        assert "llama3.2" in refused_v1(site.v1("llama3.1"), "model_not_found")
        refused_v1(site.v1("ollama/Qwen3-8B"), "model_not_found")


def test_many_requests_for_an_unknown_model_do_not_flood_the_engines(fake: Make) -> None:
    engines = [fake("vllm"), fake("vllm")]
    llm = LLMInferencer("vllm", base_url=[engine.base_url for engine in engines])

    async def ask() -> None:
        async with llm:
            assert await llm.achat(HI)
            for engine in engines:
                engine.requests.clear()
            asked = [llm.achat(HI, model_name=f"unknown-{number}") for number in range(100)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(outcome, ModelNotFound) for outcome in outcomes)

    asyncio.run(ask())
    for engine in engines:
        lists = [seen for seen in list(engine.requests) if seen.path == "/v1/models"]
        assert 1 <= len(lists) <= 10


def test_the_place_of_a_models_file_is_in_no_error(fake: Make) -> None:
    config = EndpointConfig(
        engine="llamacpp", name="small", model="/the/operators/folder/small.gguf", start="on_request"
    )
    with Site(attached(fake("vllm")), config) as site:
        for name in ("operators/folder/small.gguf", "nothing-like-it"):
            assert "/the/operators" not in refused(site.generate(model_name=name), "model_not_found", 400)
        assert "/the/operators" not in site.client.get("/ready").text


def test_an_endpoint_serves_only_its_models(fake: Make) -> None:
    engine = fake("ollama")
    engine.models = ["a:latest", "b:latest"]
    with Site(attached(engine, models=["a:latest"]), attached(fake("vllm"))) as site:
        assert good(site.generate(model_name="a"))["text"]
        refused(site.generate(model_name="b"), "model_not_found")
        refused(site.generate(model_name="ollama/b:latest"), "model_not_found")
        assert not any("b:latest" in model["id"] for model in site.client.get("/v1/models").json()["data"])
        assert "b:latest" not in [model["name"] for model in good(site.client.get(f"{API}/models"))]


def test_one_endpoint_serves_only_its_models(fake: Make) -> None:
    engine = fake("ollama")
    engine.models = ["a:latest", "b:latest"]
    with Site(attached(engine, models=["a:latest"])) as site:
        assert good(site.generate(model_name="a"))["text"]
        refused(site.generate(model_name="b"), "model_not_found")


@pytest.mark.parametrize("more", [0, 1])
def test_the_models_to_serve_are_named_as_requests_name_them(more: int, fake: Make) -> None:
    """Ollama lists `b` as `b:latest`."""
    engine = fake("ollama", model="a:latest")
    engine.models.append("b:latest")
    configs = [attached(engine, models=["b"]), *(attached(fake("vllm", model="c")) for _ in range(more))]
    with Site(*configs) as site:
        assert good(site.generate(model_name="b"))["model_name"] == "b"
        assert good(site.generate(model_name="b:latest"))["model_name"] == "b:latest"
        assert good(site.generate(f"{more}"))["model_name"] == "b:latest"
        refused(site.generate(model_name="a"), "model_not_found")


def test_a_stopped_endpoint_lists_the_models_to_serve(fake: Make) -> None:
    late = EndpointConfig(engine="ollama", start="on_request", models=("llama3.2", "qwen3"))
    with Site(late, attached(fake("vllm", model="b"))) as site:
        listed = [model["id"] for model in site.client.get("/v1/models").json()["data"]]
        assert listed == ["ollama/llama3.2", "ollama/qwen3", "vllm/b"]


def test_a_request_asks_no_endpoint_for_its_models_that_was_just_asked(fake: Make) -> None:
    """A name that only one endpoint lists costs no question to the others."""
    engines = [fake("vllm", model=f"m{number}") for number in range(4)]
    with Site(*map(attached, engines)) as site:
        good(site.generate(model_name="m3"))
        before = [len(engine.requests) for engine in engines]
        for _ in range(20):
            good(site.generate(model_name="m3"))
        more = [len(engine.requests) - count for engine, count in zip(engines, before, strict=True)]
    assert more[3] >= 20 and sum(more[:3]) <= 9, more  # those of the watch


# --------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("surface", ["generate", "chat", "v1"])
def test_the_same_beginning_goes_to_the_same_endpoint(fake: Make, surface: str) -> None:
    engines = [fake("vllm") for _ in range(4)]
    with Site(*map(attached, engines)) as site:

        def ask(conversation: int, turn: int) -> httpx.Response:
            messages: list[dict[str, str]] = [
                {"role": "system", "content": "You are terse."},
                {"role": "user", "content": f"conversation {conversation}"},
            ]
            for number in range(turn):
                messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"turn {number}"}]
            if surface == "generate":
                return site.generate(f"conversation {conversation}", temperature=turn / 10)
            if surface == "chat":
                return site.client.post(f"{API}/chat", json={"messages": messages, "max_tokens": 10 + turn})
            return site.v1("m", messages, temperature=turn / 10)

        seen = set()
        for conversation in range(12):
            names = set()
            for turn in range(3):
                reply = ask(conversation, turn)
                assert reply.status_code == 200, reply.text
                names.add(reply.headers["x-endpoint"])
            assert len(names) == 1, (conversation, names)
            seen |= names
        assert len(seen) > 1


def test_no_endpoint_gets_more_than_its_share(attach: Attach, fake: Make) -> None:
    """32 requests with the same beginning at once: none has more than 1.25 times the average."""
    llm, engines = replicas(attach, fake, 4)
    llm.generate("same")  # reached, features known
    for engine in engines:
        engine.pace = 0.5
    answers = asyncio.run(gathered(llm, 32, "same"))
    assert len(answers) == 32
    counts = [len(engine.asked) for engine in engines]
    assert sum(counts) == 33 and max(counts) <= math.ceil(1.25 * 33 / 4) + 1, counts


async def gathered(llm: LLMInferencer, count: int, prompt: str) -> list[str]:
    return list(await asyncio.gather(*(llm.agenerate(prompt) for _ in range(count))))


def test_slots_are_shares(fake: Make) -> None:
    engines = [fake("vllm"), fake("vllm")]
    with Site(attached(engines[0], slots=3), attached(engines[1], slots=1)) as site:
        good(site.generate(model_name="m"))
        for engine in engines:
            engine.pace = 0.3
        at_once(24, lambda number: good(site.generate(f"question {number}", model_name="m")))
        peaks = [len(engine.asked) for engine in engines]
    assert sum(peaks) == 25
    assert 15 <= peaks[0] <= 23 and peaks[1] <= 9, peaks  # 18 and 6, within the bound and the first request


def keys(count: int) -> list[int]:
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": f"question {number}"}]
        found.append(product.prefix_hash({"messages": messages}))
    return found


CONVERSATIONS = keys(10_000)


def in_order(fleet: Fleet, group: Replicas, key: int) -> list[Endpoint]:
    """The order in which the endpoints are asked, where each of them fails."""
    tried: list[Endpoint] = []
    while chosen := fleet.choose(group, key, tried=tried):
        tried.append(chosen)
    return tried


def rendezvous_order(group: Replicas, key: int) -> list[Endpoint]:
    """The order in which idle endpoints are asked."""
    return in_order(Fleet(group), group, key)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_conversations_are_spread(count: int) -> None:
    endpoints = a_fleet(count)
    shares = Counter(rendezvous_order(endpoints, key)[0].name for key in CONVERSATIONS)
    mean = len(CONVERSATIONS) / count
    assert len(shares) == count
    assert max(shares.values()) <= 1.25 * mean, shares
    assert min(shares.values()) >= mean / 1.25, shares


@pytest.mark.parametrize("count", [2, 4, 16])
def test_few_conversations_move_when_an_endpoint_leaves(count: int) -> None:
    """Those of the endpoint that leaves, and no others, in an order that spreads them.

    Over all endpoints that may leave this is 1/n exactly. For one of them it is as many as a hash gave it: each
    conversation with a chance of 1/n, so four standard deviations of a binomial more at most.
    """
    endpoints = a_fleet(count)
    gone = endpoints[count // 2]
    left = Replicas([endpoint for endpoint in endpoints if endpoint is not gone])
    heirs: Counter[str] = Counter()
    for key in CONVERSATIONS:
        before, after = rendezvous_order(endpoints, key), rendezvous_order(left, key)
        assert [endpoint for endpoint in before if endpoint is not gone] == after
        if before[0] is gone:
            heirs[after[0].name] += 1
    moved, noise = sum(heirs.values()), math.sqrt(len(CONVERSATIONS) * (1 - 1 / count) / count)
    assert moved <= len(CONVERSATIONS) / count + 4 * noise
    assert len(heirs) == count - 1
    assert max(heirs.values()) <= 1.5 * moved / (count - 1)


def test_the_order_does_not_depend_on_how_endpoints_are_listed() -> None:
    endpoints = a_fleet(5)
    for key in CONVERSATIONS[:100]:
        assert rendezvous_order(endpoints, key) == rendezvous_order(Replicas(endpoints[::-1]), key)


def test_orders_of_many_endpoints_take_little_memory() -> None:
    endpoints = a_fleet(1000)
    tracemalloc.start()
    try:
        for key in CONVERSATIONS[:3000]:
            endpoints.order(key)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 12e6


def test_the_order_is_the_same_in_every_process() -> None:
    """Workers and restarts send a conversation to the same endpoint: no hash with a random seed is used."""
    code = "from tests.test_fleet import *; print([e.name for e in rendezvous_order(a_fleet(5), CONVERSATIONS[7])])"
    done = run_command(code, script=Path("-c"), PYTHONPATH=str(ROOT), PYTHONHASHSEED="7")
    assert done.stdout.strip() == str([each.name for each in rendezvous_order(a_fleet(5), CONVERSATIONS[7])])


@pytest.mark.parametrize("slots", [[1, 1, 1, 1], [2, 1, 1, 4]])
def test_load_is_bounded(slots: list[int]) -> None:
    """Requests with one beginning, none of which ends: each goes to an endpoint within 1.25 times the average load."""
    endpoints = a_fleet(4, slots)
    fleet = Fleet(endpoints)
    for number in range(1, 101):
        chosen = fleet.choose(endpoints, CONVERSATIONS[0])
        chosen.in_flight += 1
        average = number / sum(slots)
        assert chosen.in_flight <= math.ceil(1.25 * average * chosen.slots), (number, chosen.name)
    assert max(each.in_flight / each.slots for each in endpoints) <= 1.25 * 100 / sum(slots) + 1


def test_an_endpoint_with_too_much_comes_last_but_is_not_left_out() -> None:
    endpoints = a_fleet(3)
    fleet, favourite = Fleet(endpoints), rendezvous_order(endpoints, 5)[0]
    favourite.in_flight = 3
    order = in_order(fleet, endpoints, 5)
    assert len(order) == 3 and order[-1] is favourite


@pytest.mark.parametrize("slots", [[1, 1], [1, 1, 1, 1], [1, 3]])
def test_conversations_begin_where_there_is_room_and_stay_there(slots: list[int]) -> None:
    """Rendezvous hashing alone gives two replicas 100 of 200 conversations, plus or minus 7."""
    endpoints = a_fleet(len(slots), slots)
    fleet, began = Fleet(endpoints), {}
    for key in CONVERSATIONS[:200]:
        began[key] = fleet.choose(endpoints, key, new=True)
        began[key].in_flight += 1
        loads = [endpoint.in_flight / endpoint.slots for endpoint in endpoints]
        assert max(loads) <= sum(endpoint.in_flight for endpoint in endpoints) / sum(slots) + 1
    assert any(rendezvous_order(endpoints, key)[0] is not chosen for key, chosen in began.items())
    for _ in range(3):
        for key, chosen in began.items():
            chosen.in_flight -= 1
            assert fleet.choose(endpoints, key) is chosen, "its next question"
            assert fleet.choose(endpoints, key, new=True) is chosen, "the first one again"
            chosen.in_flight += 1


def test_a_conversation_that_is_no_longer_remembered_goes_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "HOMES", 3)
    endpoints = a_fleet(2)
    fleet, (first, *others) = Fleet(endpoints), CONVERSATIONS[:4]
    favourite, other = rendezvous_order(endpoints, first)
    favourite.in_flight = 2
    assert fleet.choose(endpoints, first, new=True) is other
    favourite.in_flight = 0
    assert fleet.choose(endpoints, first) is other
    for key in others:
        fleet.choose(endpoints, key, new=True)
    assert fleet.choose(endpoints, first) is favourite


def test_conversations_that_begin_in_several_threads_are_remembered_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fleet, "HOMES", 100)
    endpoints = a_fleet(4)
    fleet, switching = Fleet(endpoints), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        parts = [CONVERSATIONS[start::4] for start in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            chosen = pool.map(lambda part: [fleet.choose(endpoints, key, True) for key in part], parts)
            assert sum(map(len, chosen)) == len(CONVERSATIONS)
    finally:
        sys.setswitchinterval(switching)


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        ({"messages": HI}, True),
        ({"messages": [{"role": "system", "content": "x"}, *HI]}, True),
        ({"messages": [*HI, {"role": "assistant", "content": "a"}, *HI]}, False),
        ({"prompt": "a"}, True),
    ],
)
def test_a_conversation_begins_with_the_request_that_holds_no_answer(body: Any, begins: bool) -> None:
    assert product.has_answers(body) is not begins


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"messages": HI}, {"messages": [*HI, {"role": "assistant", "content": "a"}], "temperature": 1}, True),
        ({"messages": HI}, {"messages": [{"role": "user", "content": "ho"}]}, False),
        ({"messages": HI}, {"messages": [{"role": "system", "content": "x"}, *HI]}, False),
        ({"messages": HI}, {"messages": HI, "tools": [{"type": "function"}]}, False),
        ({"prompt": "a"}, {"prompt": "b"}, False),
    ],
)
def test_what_counts_as_the_beginning(one: Any, two: Any, same: bool) -> None:
    assert (product.prefix_hash(one) == product.prefix_hash(two)) is same


# ------------------------------------------------------------------------------------------------------- failover

FAULTS: dict[str, Reply | None] = {
    "refuses": None,
    "resets": Reply(status=0, end="reset"),
    "closes": Reply(status=0, end="eof"),
    "breaks after its head": Reply(headers={"content-type": "text/event-stream"}, end="reset", chunked=True),
    "503": Reply(status=503, headers=JSON, pieces=[b'{"error":"busy"}']),
    "503 with Retry-After": Reply(status=503, headers={**JSON, "retry-after": "9"}, pieces=[b'{"error":"busy"}']),
    "429": Reply(status=429, headers=JSON, pieces=[b'{"error":{"message":"too many requests"}}']),
}


def break_with(engine: FakeEngine, fault: Reply | None, times: int = 1) -> None:
    if fault is None:
        engine.stop()
        return
    if fault.status == 0 and engine.dialect != "llamacpp":  # whose connections are not kept
        times *= 2  # a request on a kept connection that breaks is sent once more on a new one
    for _ in range(times):
        engine.script_chat(fault)


def ask(llm: LLMInferencer, stream: bool, prompt: str = "hi") -> str:
    return "".join(llm.stream(prompt)) if stream else llm.generate(prompt)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_failure_before_the_first_byte_is_passed_over(
    dialect: Dialect, fault: str, stream: bool, attach: Attach, fake: Make
) -> None:
    llm, engines = replicas(attach, fake, dialect=dialect)
    first = who(engines, lambda: ask(llm, stream))
    second = other_than(engines, first)
    break_with(first, FAULTS[fault])
    asked = len(first.asked)
    assert ask(llm, stream) == first.text
    assert len(second.asked) == 1
    twice = 1 if dialect == "llamacpp" else 2
    assert len(first.asked) - asked == {"refuses": 0, "resets": twice, "closes": twice}.get(fault, 1)
    endpoint = endpoint_at(llm, first)
    assert endpoint.failures == 1
    assert who(engines, lambda: ask(llm, stream)) is second, "it is left alone"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_over_http(fault: str, fake: Make) -> None:
    for stream in (False, True):
        engines = [fake("vllm"), fake("vllm")]
        with Site(*map(attached, engines)) as site:
            first = who(engines, functools.partial(site.v1, "m"))
            break_with(first, FAULTS[fault])
            reply = site.v1("m", stream=stream)
            assert reply.status_code == 200 and first.text in text_of(reply, stream)
            names = [endpoint.name for endpoint in site.endpoints]
            expected = names[engines.index(other_than(engines, first))]
            assert reply.headers["x-endpoint"] == expected


def text_of(reply: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(reply.json()["choices"][0]["message"]["content"])
    deltas = [choice["delta"] for event in payloads(reply)[:-1] for choice in event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


@pytest.mark.parametrize("surface", ["/v1/embeddings", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_every_surface_fails_over(surface: str, fake: Make) -> None:
    engines = [fake("vllm"), fake("vllm")]
    bodies: dict[str, Any] = {
        "/v1/embeddings": {"input": "x"},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": HI, "max_tokens": 20},
    }
    with Site(*map(attached, engines)) as site:

        def once() -> str:
            reply = site.client.post(surface, json={"model": "m", **bodies[surface]})
            assert reply.status_code == 200, reply.text
            return str(reply.headers["x-endpoint"])

        first = once()
        engines[[endpoint.name for endpoint in site.endpoints].index(first)].stop()
        assert once() != first


def test_an_address_that_does_not_connect_is_passed_over(attach: Attach, fake: Make) -> None:
    engine = fake("vllm")
    deadlines = dataclasses.replace(product.Deadlines(), connect=0.5)
    with unresponsive() as address:
        llm = attach("vllm", base_url=[address, engine.base_url], deadlines=deadlines)
        began = time.monotonic()
        assert llm.generate("hi")
        assert time.monotonic() - began < 5
        began = time.monotonic()
        for number in range(10):
            assert llm.generate(f"{number}")
        assert time.monotonic() - began < 1.5, "it is left alone"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_is_sent_twice_after_the_first_byte(dialect: Dialect, attach: Attach, fake: Make) -> None:
    llm, engines = replicas(attach, fake, dialect=dialect)
    first = who(engines, lambda: ask(llm, True))
    whole = first.stream_reply()
    first.script_chat(dataclasses.replace(whole, pieces=whole.pieces[:3], end="reset", chunked=True))
    pieces = []
    with pytest.raises(InferenceError) as caught:
        for piece in llm.stream("hi"):
            pieces.append(piece)
    assert pieces and caught.value.code == 500
    assert len(other_than(engines, first).asked) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_complete_answer_that_broke_is_not_asked_for_elsewhere(dialect: Dialect, attach: Attach, fake: Make) -> None:
    """Its first bytes had come: the engine has worked on it."""
    llm, engines = replicas(attach, fake, dialect=dialect)
    first = who(engines, lambda: ask(llm, False))
    whole = first.stream_reply() if dialect in ("sglang", "llamacpp") else None
    if whole is None:
        name = "chat" if dialect == "vllm" else "06_chat"
        with contextlib.suppress(LookupError):
            whole = recorded(dialect, name)
    if whole is None:
        whole = Reply(headers=JSON, pieces=[b'{"model":"m","message":{"role":"assistant","content":"half"}', b"}"])
    data = b"".join(whole.pieces)
    pieces = list(whole.pieces[:3]) if len(whole.pieces) > 3 else [data[:20], data[20:40]]
    first.script_chat(dataclasses.replace(whole, pieces=pieces, end="reset", chunked=True, gap=0.05))
    with pytest.raises(InferenceError) as caught:
        llm.generate("hi")
    assert caught.value.code == 500
    assert len(other_than(engines, first).asked) == 0


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_a_complete_answer_whose_stream_reports_an_overload_is_not_asked_for_elsewhere(
    dialect: Dialect, attach: Attach, fake: Make
) -> None:
    """These two are asked for streams; an overload in the middle of one is not an overload before the first byte."""
    llm, engines = replicas(attach, fake, dialect=dialect)
    first = who(engines, lambda: ask(llm, False))
    whole = first.stream_reply()
    full = b'data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}\n\n'
    first.script_chat(dataclasses.replace(whole, pieces=[*whole.pieces[:3], full], chunked=True, gap=0.05))
    with pytest.raises(InferenceError) as caught:
        llm.generate("hi")
    assert caught.value.kind == "engine_overloaded"
    assert len(other_than(engines, first).asked) == 0


@pytest.mark.parametrize("own", [False, True])
def test_a_stream_that_breaks_later_ends_with_an_error_event(own: bool, fake: Make) -> None:
    engines = [fake("vllm"), fake("vllm")]
    with Site(*map(attached, engines)) as site:
        first = who(engines, lambda: site.v1("m"))
        whole = first.stream_reply()
        first.script_chat(dataclasses.replace(whole, pieces=whole.pieces[:3], end="reset", chunked=True))
        reply = site.generate(model_name="m", stream=True) if own else site.v1("m", stream=True)
        assert reply.status_code == 200 and "x-endpoint" in reply.headers
        *events, last = payloads(reply)
        assert events and last != "[DONE]"
        assert (last["code"] == 500) if own else last["error"]
        assert not other_than(engines, first).asked


ANSWERS = {
    "400": (400, b'{"error":{"message":"invalid value","type":"BadRequestError","code":400}}', "invalid_request"),
    "context": (
        400,
        b'{"error":{"message":"This model\'s maximum context length is 8192 tokens. However, you requested 9000."}}',
        "context_too_long",
    ),
    "memory": (500, b'{"error":{"message":"CUDA out of memory"}}', "out_of_memory"),
    "500": (500, b'{"error":{"message":"boom"}}', "bad_engine_reply"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ANSWERS)
def test_other_errors_are_the_answer(case: str, stream: bool, attach: Attach, fake: Make) -> None:
    status, body, kind = ANSWERS[case]
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: ask(llm, stream))
    first.script_chat(Reply(status=status, headers=JSON, pieces=[body]))
    with pytest.raises(InferenceError) as caught:
        ask(llm, stream)
    assert caught.value.kind == kind
    assert not other_than(engines, first).asked
    assert endpoint_at(llm, first).failures == 0
    assert who(engines, lambda: ask(llm, stream)) is first


@pytest.mark.parametrize("dialect", ["ollama", "vllm"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_an_endpoint_has_lost_is_asked_for_elsewhere(
    stream: bool, dialect: Dialect, attach: Attach, fake: Make
) -> None:
    """As after `ollama rm`, or a new server at the address; the endpoint is not down."""
    llm, engines = replicas(attach, fake, dialect=dialect)

    def asking() -> None:
        assert "".join(llm.stream("hi", model_name="m")) if stream else llm.generate("hi", model_name="m")

    first = who(engines, asking)
    first.models = ["other"]
    for _ in range(2):
        assert who([other_than(engines, first)], asking)
    assert endpoint_at(llm, first).failures == 0
    other_than(engines, first).models = ["other"]
    with pytest.raises(ModelNotFound) as caught:
        asking()
    assert caught.value.retry_after is None


def test_an_alias_may_lead_to_an_endpoint_by_its_name(fake: Make, tmp_path: Path) -> None:
    first, second = fake("vllm"), fake("vllm")
    tables = [table(first, name="gpu1"), table(second, name="gpu2")]
    with LLMInferencer.from_config(write(tmp_path, *tables, alias={"b": ["gpu2/m", "gpu1/m"]})) as llm:
        for number in range(6):
            assert llm.generate(f"question {number}", model_name="b")
    assert len(second.asked) == 6 and not first.asked


def test_an_alias_answers_with_the_first_that_can(fake: Make) -> None:
    best, fallback = fake("vllm", model="big"), fake("ollama", model="small")
    with Site(attached(best), attached(fallback), aliases={"best": ["vllm/big", "ollama/small"]}) as site:
        assert good(site.generate(model_name="best"))["engine_type"] == "vllm"
        best.stop()
        for number in range(3):
            assert good(site.generate(f"{number}", model_name="best"))["engine_type"] == "ollama"
            assert site.v1("best").json()["model"] == "best"


def test_an_alias_whose_first_target_was_never_there(fake: Make) -> None:
    fallback = fake("ollama", model="small")
    gone = EndpointConfig(engine="vllm", base_url=f"http://127.0.0.1:{free_port()}")
    llm = Settings(endpoints=(gone, attached(fallback)), aliases={"best": ("vllm/big", "ollama/small")}).inferencer()
    with contextlib.closing(llm):
        for number in range(3):
            assert llm.complete(f"{number}", model_name="best").engine_type == "ollama"


@pytest.mark.parametrize("targets", [("vllm/big", "ollama/none"), ("ollama/none", "vllm/big")])
def test_an_alias_with_a_target_that_is_down_is_unavailable_and_not_unknown(targets: Any, fake: Make) -> None:
    gone = EndpointConfig(engine="vllm", base_url=f"http://127.0.0.1:{free_port()}")
    with Site(gone, attached(fake("ollama")), aliases={"best": targets}) as site:
        reply = site.generate(model_name="best")
        refused(reply, "engine_unavailable")
        assert int(reply.headers["retry-after"]) >= 1


def test_a_model_on_an_endpoint_that_was_never_there_is_unavailable_and_not_unknown(fake: Make) -> None:
    """Nobody knows what that endpoint serves: "there is no such model" would be untrue."""
    gone = EndpointConfig(engine="vllm", base_url=f"http://127.0.0.1:{free_port()}")
    with Site(gone, attached(fake("ollama"))) as site:
        for _ in range(2):
            reply = site.generate(model_name="vllm/big")
            refused(reply, "engine_unavailable")
            assert int(reply.headers["retry-after"]) >= 1


# -------------------------------------------------------------------------------------------- outages and back-off


def test_an_outage_is_counted_once(attach: Attach, fake: Make, caplog: pytest.LogCaptureFixture) -> None:
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    second = other_than(engines, first)
    break_with(first, Reply(status=503, headers=JSON, pieces=[b'{"error":"x"}'], delay=0.3), times=10)
    with caplog.at_level(logging.WARNING, "llm_inference"):
        assert all(asyncio.run(gathered(llm, 10, "hi")))
    endpoint = endpoint_at(llm, first)
    assert endpoint.failures == 1
    assert 0 < endpoint.retry_at - time.monotonic() <= 2
    assert len([record for record in caplog.records if endpoint.name in record.getMessage()]) == 1
    assert len(second.asked) >= 5


@pytest.mark.parametrize("fault", ["refuses", "resets", "503", "429"])
def test_the_back_off_doubles_from_2_to_30_seconds(fault: str, attach: Attach, fake: Make) -> None:
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    endpoint, pauses = endpoint_at(llm, first), []
    break_with(first, FAULTS[fault], times=6)
    for _ in range(6):
        endpoint.retry_at = 0.0  # the pause is over
        assert llm.generate("hi")
        pauses.append(round(endpoint.retry_at - time.monotonic()))
    assert pauses == [2, 4, 8, 16, 30, 30]
    assert endpoint.failures == 6


def test_retry_after_is_the_pause(attach: Attach, fake: Make) -> None:
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    break_with(first, FAULTS["503 with Retry-After"])
    assert llm.generate("hi")
    assert 8 < endpoint_at(llm, first).retry_at - time.monotonic() <= 9


def test_a_list_does_not_end_an_overload(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pause would be two seconds each time, and its end would let all requests through at once."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.2)
    engines = [fake("vllm"), fake("vllm")]
    with Site(*map(attached, engines)) as site:
        first = who(engines, lambda: good(site.generate(model_name="m")))
        (endpoint,) = [each for each in site.endpoints if each.adapter.base_url == first.base_url]
        break_with(first, Reply(status=503, headers={**JSON, "retry-after": "1"}, pieces=[b'{"error":"full"}']))
        good(site.generate(model_name="m"))
        asked = len(first.requests)
        first.wait(lambda: any(seen.path == "/v1/models" for seen in first.requests[asked:]), 15)
        until(lambda: endpoint.is_fresh(time.monotonic()))
        time.sleep(0.1)  # what follows the list has been done
        assert endpoint.failures == 1
        assert who(engines, lambda: good(site.generate(model_name="m"))) is first
        assert endpoint.failures == 0


def test_a_failed_endpoint_is_left_alone_and_tried_again(fake: Make) -> None:
    """No connection reaches it but one trial per pause: after 2 s, and 4 s later."""
    engine = fake("vllm")
    with Refuser() as dead:
        config = EndpointConfig(name="dead", engine="vllm", base_url=dead.base_url)
        with Site(config, attached(engine, "alive")) as site:
            until(lambda: dead.trials)
            end = dead.trials[0] + 5.5
            while time.monotonic() < end:
                at_once(4, lambda number: good(site.generate(f"{number}", model_name="m")))
                time.sleep(0.05)
            trials = [at - dead.trials[0] for at in dead.trials if at < end]
    assert len(trials) <= 2, trials
    for trial in trials[1:]:
        assert trial > 1.9


def test_a_returning_endpoint_is_tried_with_one_request(
    attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.3)
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    break_with(first, FAULTS["resets"])
    llm.generate("hi")
    asked = len(first.asked)
    first.script_chat(Reply(status=0, delay=0.8, end="reset"))
    time.sleep(0.35)
    assert all(asyncio.run(gathered(llm, 10, "hi")))
    assert len(first.asked) - asked == 1
    assert endpoint_at(llm, first).failures == 2


def test_a_request_on_its_way_passes_over_what_failed_meanwhile(attach: Attach, fake: Make) -> None:
    """Requests that find the first endpoint overloaded do not all try the second, which one of them has found dead."""
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    second = other_than(engines, first)
    break_with(second, None)
    with Refuser(second.port) as dead:
        for number in range(6):
            overloaded = FAULTS["503"]
            assert overloaded
            first.script_chat(dataclasses.replace(overloaded, delay=0.3 + number * 0.2))
        endpoint_at(llm, second).in_flight = 100  # so that all go to the first
        errors = asyncio.run(failures(llm, 6))
        assert {error.kind for error in errors} <= {"engine_unavailable", "engine_overloaded"}
        assert len(dead.times) <= 3, "one request, its connection tried again"
        assert all(error.retry_after for error in errors), "each says when to ask again"


async def failures(llm: LLMInferencer, count: int) -> list[InferenceError]:
    found = await asyncio.gather(*(llm.agenerate("hi") for _ in range(count)), return_exceptions=True)
    return [error for error in found if isinstance(error, InferenceError)]


def test_a_trial_is_over_with_its_first_byte(attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stream is no reason to leave a sound endpoint alone."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.1)
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    break_with(first, FAULTS["resets"])
    llm.generate("hi")
    time.sleep(0.15)
    first.pace = 0.3
    pieces = llm.stream("hi")
    next(pieces)
    assert first.live == 1
    endpoint = endpoint_at(llm, first)
    assert (endpoint.failures, endpoint.available(time.monotonic())) == (0, True)
    pieces.close()  # type: ignore[attr-defined]


def test_an_older_request_does_not_end_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request from before the outage ends while another one finds out whether it is over: nobody else joins it."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.0)
    (endpoint,) = a_fleet(1)
    older, trial = object(), object()
    endpoint.begin(older)
    endpoint.failed(product.EngineUnavailable("it refuses connections"))
    endpoint.begin(trial)
    endpoint.finish(older)
    assert not endpoint.available(time.monotonic())
    endpoint.finish(trial)
    assert endpoint.available(time.monotonic())


@pytest.mark.parametrize("what", ["answer", "list"])
def test_what_was_asked_before_an_outage_does_not_end_it(
    what: str, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine without room goes on answering what it has: that is no reason to ask it before the pause is over."""
    llm, engines = replicas(attach, fake)
    endpoint = endpoint_at(llm, who(engines, lambda: llm.generate("hi")))
    fleet = llm.fleet

    async def scene() -> None:
        held: Any = endpoint.adapter if what == "answer" else endpoint
        method = "answer" if what == "answer" else "models"
        real, asked, go = getattr(held, method), asyncio.Event(), asyncio.Event()

        async def later(*args: Any) -> Any:
            asked.set()
            await go.wait()
            return await real(*args)

        monkeypatch.setattr(held, method, later)
        asks = llm.agenerate("hi") if what == "answer" else product.Gateway._look_at(fleet, endpoint)
        older = asyncio.ensure_future(asks)
        await asked.wait()
        endpoint.failed(EngineUnavailable("another request finds it dead"))
        go.set()
        await older

    asyncio.run(scene())
    assert endpoint.failures == 1 and endpoint.retry_at > 0


def test_a_call_that_is_ended_twice_is_cancelled_once() -> None:
    """Two looks may find its endpoint silent at once: the second cancel would end the request and not the call."""

    async def scene() -> None:
        deadline = product.Deadline(product.Deadlines(), "vllm", set())
        waiting = asyncio.ensure_future(deadline.wait(asyncio.sleep(60)))
        await asyncio.sleep(0)
        deadline.abort()
        deadline.abort()
        with pytest.raises(EngineUnavailable, match="closed during the call"):
            await waiting
        deadline.close()

    asyncio.run(scene())


def test_a_call_that_ends_as_it_is_aborted_leaves_its_request_alone() -> None:
    """The cancel comes when the call has its reply, and the request is at something else."""

    async def scene() -> None:
        deadline, reply = product.Deadline(product.Deadlines(), "vllm", set()), asyncio.Event()

        async def request() -> str:
            await deadline.wait(reply.wait())
            with pytest.raises(EngineUnavailable, match="closed during the call"):
                await deadline.wait(asyncio.sleep(60))
            await asyncio.sleep(0.01)
            return "it goes on"

        asked = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        reply.set()
        deadline.abort()
        assert await asked == "it goes on"
        deadline.close()

    asyncio.run(scene())


@pytest.mark.parametrize("silent", [True, False])
def test_a_request_that_is_passed_on_to_a_failed_endpoint_waits_for_its_list_first(
    silent: bool, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pause has ended while the request waited elsewhere; a silent engine would keep the request for long."""
    monkeypatch.setattr(product.Deadlines, "brief", lambda self: dataclasses.replace(self, first_token=1.0, total=2.0))
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    second = other_than(engines, first)
    endpoint = endpoint_at(llm, second)
    break_with(first, FAULTS["503"])
    assert llm.generate("hi")  # so that a connection to the second one is kept
    endpoint_at(llm, first).recovered(None)
    asked = len(second.asked)
    if silent:
        second.script(Reply(status=0, end="stall"), "/v1/models")

    async def fails(*_: Any) -> Any:
        endpoint.failed(EngineTimeout("its list did not come"))
        endpoint.retry_at = 0.0  # the pause is over
        raise EngineUnavailable("it ended")

    monkeypatch.setattr(endpoint_at(llm, first).adapter, "answer", fails)
    lists = sum(seen.path == "/v1/models" for seen in second.requests)
    if silent:
        with pytest.raises(EngineUnavailable):
            llm.generate("hi")
    else:
        assert llm.generate("hi")
    assert sum(seen.path == "/v1/models" for seen in second.requests) > lists
    assert (len(second.asked) - asked, endpoint.failures) == ((0, 2) if silent else (1, 0))


def test_a_trial_that_waits_in_a_silent_engine_is_passed_on(
    attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trial is a request that gets no answer, the watch finds that out, and another endpoint answers it."""
    brief = dataclasses.replace(product.Deadlines(), first_token=0.3, total=0.3)
    monkeypatch.setattr(product.Deadlines, "brief", lambda self: brief)
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(Endpoint, "LIST_TTL", 0.5)
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    endpoint = endpoint_at(llm, first)
    endpoint.failed(product.EngineUnavailable("it was gone"))
    time.sleep(0.15)
    first.script_chat(Reply(status=0, end="stall"))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(llm.generate, "hi")
        first.wait(lambda: first.live == 1)
        for _ in range(3):
            first.script(Reply(status=0, end="stall"), "/v1/models")
        time.sleep(0.6)
        assert llm.fleet
        product.portal.call(product.Gateway._look_at(llm.fleet, endpoint))
        assert answer.result(10)


@pytest.mark.parametrize("answer", ["good", "400"])
def test_an_endpoint_that_is_back_is_used_again(
    answer: str, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is the answer shows as well that it is back."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.2)
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    first.stop()
    assert who(engines, lambda: llm.generate("hi")) is not first
    first.start()
    time.sleep(0.25)
    if answer == "400":
        first.script_chat(Reply(status=400, headers=JSON, pieces=[ANSWERS["400"][1]]))
        with pytest.raises(InvalidRequest):
            llm.generate("hi")
    else:
        assert who(engines, lambda: llm.generate("hi")) is first
    endpoint = endpoint_at(llm, first)
    assert (endpoint.failures, endpoint.error) == (0, "")


def test_an_endpoint_that_was_not_there_joins(fake: Make) -> None:
    late, engine = fake("sglang", model="late"), fake("vllm")
    late.stop()
    with Site(attached(late), attached(engine)) as site:
        assert good(site.generate(model_name="m"))["text"]
        late.start()
        until(lambda: site.generate(model_name="late").status_code == 200, 12)


def test_when_none_is_left_the_last_error_says_when_to_ask_again(fake: Make) -> None:
    engines = [fake("vllm"), fake("vllm")]
    with Site(*map(attached, engines)) as site:
        good(site.generate(model_name="m"))
        reply_503 = Reply(status=503, headers={**JSON, "retry-after": "7"}, pieces=[b'{"error":"full"}'])
        for engine in engines:
            break_with(engine, reply_503)
        reply = site.generate(model_name="m")
        refused(reply, "engine_overloaded")
        assert reply.headers["retry-after"] == "7"
        asked = sum(len(engine.asked) for engine in engines)
        for stream in (False, True):
            reply = site.v1("m", stream=stream)
            assert reply.status_code == 503 and "full" in reply.text
            assert 1 <= int(reply.headers["retry-after"]) <= 7
        assert sum(len(engine.asked) for engine in engines) == asked, "Retry-After is kept to"


def test_when_all_are_gone_and_back(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.5)
    engines = [fake("vllm"), fake("vllm")]
    with Site(*map(attached, engines)) as site:
        good(site.generate(model_name="m"))
        for engine in engines:
            engine.stop()
        for _ in range(3):
            for reply in (site.generate(model_name="m"), site.generate()):
                refused(reply, "engine_unavailable")
                assert int(reply.headers["retry-after"]) >= 1
        for engine in engines:
            engine.start()
        until(lambda: site.generate(model_name="m").status_code == 200, 8)
        until(lambda: site.client.get("/ready").status_code == 200, 8)


def test_a_model_whose_endpoints_are_all_down_is_unavailable_and_not_unknown(
    fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the moment after the pause, in which they are asked again for their lists."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.2)
    engines = [fake("vllm"), fake("vllm")]
    with Site(*map(attached, engines)) as site:
        good(site.generate(model_name="m"))
        for engine in engines:
            engine.stop()
        end = time.monotonic() + 1.5
        kinds = set()
        while time.monotonic() < end:
            kinds |= {site.generate(model_name=name).headers["x-error-kind"] for name in ("m", "vllm/m")}
    assert kinds == {"engine_unavailable"}


def test_a_frozen_endpoint_holds_up_nobody_elses_requests(
    attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list is out of date and does not come: who is answered by another endpoint does not wait for it."""
    llm, engines = replicas(attach, fake)
    prompts = [f"question {number}" for number in range(16)]
    sound = [prompt for prompt in prompts if who(engines, functools.partial(llm.generate, prompt)) is engines[0]]
    assert 0 < len(sound) < len(prompts)
    monkeypatch.setattr(Endpoint, "LIST_TTL", 0.1)
    time.sleep(0.2)
    engines[1].script(Reply(status=0, end="stall"), "/v1/models")
    began = time.monotonic()
    for prompt in sound:
        assert llm.generate(prompt)
        time.sleep(0.05)
    assert time.monotonic() - began < 5
    until(lambda: endpoint_at(llm, engines[1]).failures == 1, 15)
    assert "deadline of 10 s" in endpoint_at(llm, engines[1]).error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_waits_for_a_frozen_endpoint_goes_to_another(
    dialect: Dialect, stream: bool, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither begins to answer nor lists its models: nothing of the answer has come, so another one is asked."""
    monkeypatch.setattr(Endpoint, "LIST_TTL", 0.1)
    deadlines = product.Deadlines(first_token=120)
    monkeypatch.setattr(product.Deadlines, "brief", lambda self: dataclasses.replace(self, first_token=1.0, total=2.0))
    engines = [fake(dialect), fake(dialect)]
    llm = attach(dialect, base_url=[engine.base_url for engine in engines], deadlines=deadlines)
    first = who(engines, lambda: ask(llm, stream))
    with ThreadPoolExecutor(1) as pool:
        first.script_chat(Reply(status=0, end="stall"))
        waiting = pool.submit(ask, llm, stream)
        first.wait(lambda: first.live == 1)
        first.script(Reply(status=0, end="stall"), "/api/tags" if dialect == "ollama" else "/v1/models")
        time.sleep(0.2)
        assert ask(llm, stream, "another")
        assert waiting.result(15)
    assert endpoint_at(llm, first).failures == 1
    assert len(first.asked) <= 3 and len(other_than(engines, first).asked) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_endpoint_that_does_not_answer_a_question_before_the_request_is_passed_over(
    stream: bool, attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama is asked what its model can do: nothing of the request has been sent."""
    monkeypatch.setattr(product.OllamaAdapter, "features_ttl", 0.0)
    monkeypatch.setattr(product.Deadlines, "brief", lambda self: dataclasses.replace(self, first_token=3.0, total=6.0))
    llm, engines = replicas(attach, fake, dialect="ollama")
    first = who(engines, lambda: ask(llm, stream))
    first.script(Reply(status=0, end="stall"), "/api/show")
    assert who(engines, lambda: ask(llm, stream)) is not first
    assert endpoint_at(llm, first).failures == 1


def test_a_pause_ends_with_one_question(attach: Attach, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests come as it ends; one of them asks the endpoint for its models, the others go elsewhere."""
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.2)
    llm, engines = replicas(attach, fake)
    first = who(engines, lambda: llm.generate("hi"))
    break_with(first, FAULTS["resets"])
    assert llm.generate("hi")
    for _ in range(10):
        first.script(Reply(status=503, delay=0.8, headers=JSON, pieces=[b'{"error":"busy"}']), "/v1/models")
    time.sleep(0.25)
    listed = sum(seen.path == "/v1/models" for seen in first.requests)
    assert all(asyncio.run(gathered(llm, 10, "hi")))
    assert sum(seen.path == "/v1/models" for seen in first.requests) - listed == 1
    assert endpoint_at(llm, first).failures == 2


def test_no_answer_is_lost_while_an_endpoint_flaps(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.1)
    engines = [fake("vllm"), fake("sglang"), fake("llamacpp"), fake("ollama", model="m")]
    ended = threading.Event()

    def flap() -> None:
        while not ended.wait(0.15):
            engines[0].stop()
            time.sleep(0.1)
            engines[0].start()

    with Site(*map(attached, engines)) as site:
        good(site.generate(model_name="m"))
        thread = threading.Thread(target=flap)
        thread.start()
        try:
            replies = at_once(8, lambda worker: [site.generate(f"{worker} {n}", model_name="m") for n in range(25)])
        finally:
            ended.set()
            thread.join(10)
    failed = [reply.text for several in replies for reply in several if reply.status_code != 200]
    # an answer that had begun may break; it is not asked for again
    assert all("ended early" in text or "broke" in text for text in failed) and len(failed) <= 10, failed[:3]


# -------------------------------------------------------------------------------------------------------- seen


def test_what_is_seen_of_endpoints(fake: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, two = fake("vllm", model="a"), fake("ollama", model="b")
    with Site(attached(one, "first", slots=3), attached(two, "second")) as site:
        caplog.set_level(logging.INFO, "llm_inference")
        reply = site.generate(model_name="a")
        good(reply)
        assert reply.headers["x-endpoint"] == "first"
        request_id = reply.headers["x-request-id"]
        lines = until(lambda: [line for line in caplog.messages if line.startswith(request_id)])
        assert len(lines) == 1 and " first " in lines[0]
        two.stop()
        assert refused(site.generate(model_name="b"), "engine_unavailable")
        shown = {each["name"]: each for each in site.client.get("/ready").json()["endpoints"]}
        assert (shown["first"]["state"], shown["first"]["failures"]) == ("up", 0)
        assert (shown["first"]["slots"], shown["first"]["models"]) == (3, ["a"])
        assert shown["first"]["in_flight"] == 0
        assert (shown["second"]["state"], shown["second"]["failures"]) == ("down", 1)
        assert shown["second"]["error"] and "127.0.0.1" not in shown["second"]["error"]
        listed = {each["name"]: each for each in good(site.client.get(f"{API}/engines"))}
        assert listed["first"]["reachable"] is True and listed["first"]["engine_type"] == "vllm"
        assert listed["second"]["reachable"] is False and listed["second"]["failures"] == 1
        assert "schema" in listed["first"]["features"] and not listed["second"]["features"]
        page = site.client.get("/metrics").text
        assert re.search(r'llm_requests_total\{[^}]*endpoint="first"[^}]*status="200"\} 1\.0', page)
        assert re.search(r'llm_tokens_total\{[^}]*endpoint="first"[^}]*kind="completion"', page)
        assert re.search(r'llm_errors_total\{[^}]*endpoint="second"[^}]*kind="engine_unavailable"', page)
        assert 'llm_endpoint_up{endpoint="first"} 1.0' in page
        until(lambda: 'llm_endpoint_up{endpoint="second"} 0.0' in site.client.get("/metrics").text, 8)


def test_x_endpoint_is_on_errors_too(fake: Make) -> None:
    engine = fake("vllm")
    with Site(attached(engine, "only-one"), attached(fake("ollama", model="x"))) as site:
        engine.script_chat(Reply(status=400, headers=JSON, pieces=[ANSWERS["400"][1]]))
        reply = site.v1("m")
        assert (reply.status_code, reply.headers["x-endpoint"]) == (400, "only-one")


def test_a_fleet_is_ready_while_one_is_up(fake: Make) -> None:
    one, two = fake("vllm"), fake("ollama", model="b")
    two.stop()
    with Site(attached(one), attached(two)) as site:
        until(lambda: site.client.get("/ready").status_code == 200, 5)
        one.stop()
        until(lambda: site.client.get("/ready").status_code == 503, 12)
        assert site.client.get("/ready").json()["status"].startswith("engine_unavailable")
        one.start()
        until(lambda: site.client.get("/ready").status_code == 200, 12)


# ----------------------------------------------------------------------------------------------- the real command


@contextlib.contextmanager
def configured(file: Path, *flags: str, **env: str) -> Iterator[Command]:
    with Command("--config", str(file), *flags, env=env) as server:
        yield server


def asks(server: Command, model: str, **more: Any) -> httpx.Response:
    body = {"prompt": "hi", "model_name": model, **more}
    return httpx.post(f"{server.url}{API}/generate", json=body, trust_env=False, timeout=30)


def at_work(server: Command) -> int:
    return int(httpx.get(f"{server.url}/ready", trust_env=False).json()["in_flight"])


def reload(server: Command, said: str) -> None:
    before = server.said.count(said)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.said.count(said) > before, 10)


def test_the_config_file_of_the_command(fake: Make, tmp_path: Path) -> None:
    one, two = fake("vllm", model="a"), fake("ollama", model="b")
    file = write(tmp_path, table(one), table(two, name="small"), alias={"fast": "vllm/a"}, head="max_in_flight = 7")
    with configured(file) as server:
        assert good(asks(server, "fast"))["engine_type"] == "vllm"
        assert asks(server, "small/b").headers["x-endpoint"] == "small"
        assert "vllm, small" in server.said or "small" in server.said
    with Command(env={"LLM_INFERENCE_CONFIG": str(file)}) as server:
        assert good(asks(server, "fast"))["model_name"] == "a"


def test_check_config(fake: Make, tmp_path: Path) -> None:
    engine = fake("vllm", model="a")
    file = write(
        tmp_path,
        table(engine, name="big", slots=4),
        table(engine="llamacpp", model="/models/x.gguf", start="on_request", stop_after=60, group="g"),
        alias={"fast": "vllm/a", "best": ["ollama/none", "fast"]},
    )
    done = run_command("--config", str(file), "--check-config")
    assert done.returncode == 0, done.stderr
    for word in ("big", engine.base_url, "4", "llamacpp", "/models/x.gguf", "on request", "60", "g", "fast", "best"):
        assert word in done.stdout, word
    assert not engine.requests, "nothing is reached"
    assert run_command("--serve", "--config", str(file), "--check-config").returncode == 0
    file.write_text(file.read_text().replace("slots = 4", "slots = 0"))
    done = run_command("--config", str(file), "--check-config")
    assert done.returncode == 2 and "endpoint[1].slots (line" in done.stderr, done.stderr
    assert run_command("--config", str(tmp_path / "none.toml"), "--check-config").returncode == 2


def test_sighup_reads_the_file_again(fake: Make, tmp_path: Path) -> None:
    one, two = fake("vllm", model="a"), fake("ollama", model="b")
    file = write(tmp_path, table(one), alias={"fast": "vllm/a"})
    with configured(file) as server:
        good(asks(server, "fast"))
        write(tmp_path, table(one), table(two), alias={"fast": "ollama/b"}, head='model = "b"')
        reload(server, "read again")
        assert good(asks(server, "fast"))["engine_type"] == "ollama"
        assert good(asks(server, "a"))["engine_type"] == "vllm"
        reply = httpx.post(f"{server.url}{API}/generate", json={"prompt": "hi"}, trust_env=False)
        assert good(reply)["engine_type"] == "ollama", "the new default"
        file.write_text('[[endpoint]]\nengine = "vlm"\n')
        reload(server, "unchanged")
        assert "endpoint[1].engine" in server.said
        assert good(asks(server, "fast"))["engine_type"] == "ollama"
        file.unlink()
        reload(server, "unchanged")
        assert good(asks(server, "b"))["engine_type"] == "ollama"
        file.write_text("")
        reload(server, "unchanged")
        assert good(asks(server, "b"))["engine_type"] == "ollama"


def test_sighup_changes_the_timeout_of_an_endpoint_that_stays(fake: Make, tmp_path: Path) -> None:
    engine = fake("vllm", model="a")
    file = write(tmp_path, table(engine), head="timeout = 60")
    with configured(file) as server:
        good(asks(server, "a"))
        engine.pace = 60
        write(tmp_path, table(engine), head="timeout = 0.5")
        reload(server, "0 removed")
        refused(asks(server, "a"), "engine_timeout")


def test_a_removed_endpoint_finishes_what_it_has(fake: Make, tmp_path: Path) -> None:
    one, two = fake("vllm", model="a"), fake("ollama", model="b")
    file = write(tmp_path, table(one, name="leaving"), table(two))
    with configured(file) as server:
        good(asks(server, "a"))
        one.pace = 0.25
        replies: list[httpx.Response] = []
        client = threading.Thread(target=lambda: replies.append(asks(server, "a", stream=True)))
        client.start()
        one.wait(lambda: one.live == 1)
        write(tmp_path, table(two))
        reload(server, "read again")
        assert one.live == 1
        refused(asks(server, "a"), "model_not_found")
        client.join(20)
        assert payloads(replies[0])[-1] == "[DONE]"
        until(lambda: "leaving is removed" in server.said, 5)
        assert good(asks(server, "b"))["text"]
        shown = httpx.get(server.url + "/ready", trust_env=False).json()["endpoints"]
        assert [each["name"] for each in shown] == ["ollama"]
        assert 'endpoint_up{endpoint="leaving"} 1' not in httpx.get(server.url + "/metrics", trust_env=False).text


def test_flags_stand_above_the_file_after_a_reload_too(fake: Make, tmp_path: Path) -> None:
    one, two = fake("vllm", model="a"), fake("ollama", model="b")
    file = write(tmp_path, table(one))
    flags = ("--api-key", "secret", "--max-tokens-cap", "7", "--alias", "mine=vllm/a")
    key = {"authorization": "Bearer secret"}
    with configured(file, *flags) as server:
        write(tmp_path, table(one), table(two))
        reload(server, "read again")
        url = f"{server.url}{API}/generate"
        refused(httpx.post(url, json={"prompt": "hi"}, trust_env=False), "unauthorized", 401)
        body = {"prompt": "hi", "model_name": "mine", "max_tokens": 100}
        data = good(httpx.post(url, json=body, headers=key, trust_env=False))
        assert "max_tokens" in data["ignored"]
        assert good(httpx.post(url, json={"prompt": "hi", "model_name": "b"}, headers=key, trust_env=False))["text"]


def test_a_fleet_with_workers(fake: Make, tmp_path: Path) -> None:
    one, two, down = fake("vllm", model="a"), fake("vllm", model="a"), fake("ollama", model="b")
    down.stop()
    file = write(tmp_path, table(one, name="x"), table(two, name="y"), table(down), alias={"fast": "vllm/a"})
    with configured(file, "--workers", "2") as server:
        names = Counter(asks(server, "fast", prompt=f"question {n}").headers["x-endpoint"] for n in range(30))
        assert set(names) == {"x", "y"}
        same = {asks(server, "a", prompt="the same").headers["x-endpoint"] for _ in range(10)}
        assert len(same) == 1, "the workers agree"
        one.stop()
        for n in range(10):
            assert asks(server, "a", prompt=f"question {n}").headers["x-endpoint"] == "y"
        down.start()
        until(lambda: asks(server, "b").status_code == 200, 15)
        page = httpx.get(server.url + "/metrics", trust_env=False).text
        assert 'endpoint="y"' in page


def test_sighup_does_not_end_a_server_with_workers(fake: Make, tmp_path: Path) -> None:
    file = write(tmp_path, table(fake("vllm", model="a")))
    with configured(file, "--workers", "2") as server:
        server.process.send_signal(signal.SIGHUP)
        time.sleep(1.5)
        assert server.process.poll() is None, server.said
        assert good(asks(server, "a"))["text"]


# ------------------------------------------------------------------------------------------- starts, stops, groups

STUB = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from tests.fake_engine import FakeEngine
arguments = sys.argv
value = lambda name: arguments[arguments.index(name) + 1]
time.sleep(float(os.environ.get("STUB_DELAY", "0")))
engine = FakeEngine("vllm", model=value("--served-model-name"))
engine.port, engine.pace = int(value("--port")), float(os.environ.get("STUB_PACE", "0"))
engine.start()
time.sleep(600)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """An "interpreter" that is a fake vLLM, started as a real one is."""
    file = tmp_path / "python"
    file.write_text(STUB.format(python=sys.executable, root=str(ROOT)))
    file.chmod(0o755)
    return file


def started(stub: Path, name: str, model: str = "", delay: float = 0.0, pace: float = 0.0, **more: Any) -> Any:
    env = {"STUB_DELAY": str(delay), "STUB_PACE": str(pace), "STUB_NAME": name}
    return EndpointConfig(
        name=name,
        engine="vllm",
        model=model or name,
        python=str(stub),
        launch_env=env,
        **{"start": "on_request"} | more,
    )


def children() -> dict[str, EngineChild]:
    """The children that run, by their models; without the default model, which other tests share."""
    found = {}
    for identity, child in list(EngineChild._all.items()):
        model = json.loads(identity)[1]
        if child.alive and model is not None:
            found[model] = child
    return found


def running() -> set[str]:
    """The models of the children that run."""
    return set(children())


def test_an_endpoint_is_started_by_the_first_request(stub: Path, fake: Make) -> None:
    with Site(started(stub, "late", delay=0.5), attached(fake("ollama", model="b"))) as site:
        assert running() == set()
        shown = {each["name"]: each["state"] for each in site.client.get("/ready").json()["endpoints"]}
        assert shown["late"] == "stopped"
        assert "late" in [model["name"] for model in good(site.client.get(f"{API}/models"))]
        assert "vllm/late" in [model["id"] for model in site.client.get("/v1/models").json()["data"]]
        good(site.generate(model_name="b"))
        assert running() == set(), "only a request for it starts it"
        replies = at_once(6, lambda number: site.generate(f"{number}", model_name="late"))
        assert [reply.status_code for reply in replies] == [200] * 6, replies[0].text
        assert running() == {"late"}
        assert good(site.generate(model_name="vllm/late"))["model_name"] == "late"
        (child,) = children().values()
        assert child.generation == 1
    assert running() == set()


def test_a_stopped_endpoint_alone(stub: Path) -> None:
    with Site(started(stub, "alone")) as site:
        assert site.client.get("/ready").status_code == 200
        assert running() == set()
        assert good(site.generate())["model_name"] == "alone"
        assert running() == {"alone"}


def test_an_endpoint_stops_when_nobody_asks(stub: Path) -> None:
    with Site(started(stub, "idle", stop_after=1, pace=0.2)) as site:
        good(site.generate(model_name="idle"))
        assert running() == {"idle"}
        began = time.monotonic()
        until(lambda: running() == set(), 10)
        assert time.monotonic() - began > 0.9
        assert good(site.generate(model_name="idle"))["text"], "and starts again"


@pytest.mark.parametrize("group", ["", "gpu0"])
def test_an_endpoint_stops_when_nobody_asks_in_python_too(group: str, stub: Path) -> None:
    config = started(stub, "idle", stop_after=1, pace=0.3, group=group or None)
    with contextlib.closing(Settings(endpoints=(config, started(stub, "other"))).inferencer()) as llm:
        for _ in range(2):
            assert llm.generate("hi", model_name="idle"), "which takes longer than a second"
            assert running() == {"idle"}
            until(lambda: running() == set(), 10)


def test_progress_of_a_start_is_seen(stub: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Site(started(stub, "slow", delay=1.5)) as site:
        client = threading.Thread(target=lambda: site.generate(model_name="slow"))
        client.start()
        until(lambda: site.client.get("/ready").json().get("starting", {}).get("slow"), 3)
        client.join(20)
        assert not site.client.get("/ready").json()["starting"]


def test_a_caller_waits_no_longer_than_the_timeout(stub: Path) -> None:
    deadlines = product.Deadlines().within(1.0)
    with Site(started(stub, "slow", delay=6.0), deadlines=deadlines) as site:
        began = time.monotonic()
        reply = site.generate(model_name="slow")
        assert time.monotonic() - began < 4
        refused(reply, "engine_timeout")


def test_endpoints_of_a_group_take_turns(stub: Path) -> None:
    configs = [started(stub, name, group="gpu0", pace=0.05) for name in ("one", "two")]
    with Site(*configs) as site:
        for name in ("one", "two", "one"):
            assert good(site.generate(model_name=name))["model_name"] == name
            assert running() == {name}
        ended = threading.Event()
        seen: set[frozenset[str]] = set()

        def look() -> None:
            while not ended.wait(0.02):
                seen.add(frozenset(running()))

        watcher = threading.Thread(target=look)
        watcher.start()
        replies = at_once(6, lambda n: site.generate(f"{n}", model_name=("one", "two")[n % 2], stream=True))
        ended.set()
        watcher.join()
        for reply in replies:
            assert reply.status_code == 200, reply.text
            assert payloads(reply)[-1] == "[DONE]", "no stream was cut"
        assert max(map(len, seen)) == 1, seen


def test_a_start_that_its_caller_has_left_keeps_its_groups_turn(stub: Path) -> None:
    configs = [started(stub, name, delay=delay, group="gpu0") for name, delay in (("one", 2.0), ("two", 0.0))]
    with contextlib.closing(Settings(endpoints=tuple(configs)).inferencer()) as llm:
        with pytest.raises(EngineTimeout):
            llm.generate("hi", model_name="one", timeout=0.5)
        assert running() == {"one"}
        waiting = threading.Thread(target=lambda: llm.generate("hi", model_name="two"))
        waiting.start()
        seen: set[frozenset[str]] = set()
        while waiting.is_alive():
            seen.add(frozenset(running()))
            time.sleep(0.02)
        assert running() == {"two"}
        assert max(map(len, seen)) == 1, seen
        assert all(endpoint.in_flight == 0 for endpoint in endpoints_of(llm))


def test_a_caller_that_leaves_while_it_waits_for_its_turn_stops_nothing(stub: Path) -> None:
    configs = [started(stub, name, pace=0.3, group="gpu0") for name in ("one", "two")]
    with contextlib.closing(Settings(endpoints=tuple(configs)).inferencer()) as llm:
        stream = llm.stream("hi", model_name="one")
        assert next(stream)
        with pytest.raises(EngineTimeout, match="waiting for its turn"):
            llm.generate("hi", model_name="two", timeout=0.5)
        assert "".join(stream)
        assert llm.generate("hi", model_name="one")
        assert children()["one"].generation == 1


def test_event_loops_take_turns_in_a_group(stub: Path) -> None:
    configs = [started(stub, name, delay=0.3, group="gpu0") for name in ("one", "two")]
    with contextlib.closing(Settings(endpoints=tuple(configs)).inferencer()) as llm:

        def ask(number: int) -> str:
            return asyncio.run(llm.agenerate("hi", model_name=("one", "two")[number % 2], timeout=20))

        assert all(at_once(6, ask))
        assert len(running()) == 1


def test_endpoints_that_join_a_group_take_turns_with_those_that_leave_it(stub: Path) -> None:
    """As after SIGHUP: `two` joins, then `one` is removed while it answers, and `three` joins."""

    def fleet_of(*names: str) -> Any:
        configs = [started(stub, name, group="gpu0", pace=0.1) for name in names]
        return Fleet(Settings(endpoints=tuple(configs)).inferencer().candidates())

    fleet, later = fleet_of("one"), fleet_of("two", "three")
    two, three = later.endpoints
    with contextlib.closing(LLMInferencer.from_fleet(fleet)) as llm:
        llm.generate("hi", model_name="one")
        fleet.replace([*fleet.endpoints, two], {})
        llm.generate("hi", model_name="two")
        assert running() == {"two"}
        stream = llm.stream("hi", model_name="one")
        text = next(stream)
        assert running() == {"one"}
        fleet.replace([two, three], {})
        waiting = threading.Thread(target=lambda: llm.generate("hi", model_name="three"))
        waiting.start()
        time.sleep(0.3)
        assert running() == {"one"}, "which still answers"
        assert text + "".join(stream)
        waiting.join(20)
        assert running() == {"three"}


def test_a_removed_endpoint_answers_what_waits_for_its_turn(stub: Path, fake: Make, tmp_path: Path) -> None:
    """One request waits for the start of `one`, another for `two`'s turn; SIGHUP removes both, `three` joins."""
    other = table(fake("ollama", model="b"))

    def starting(name: str) -> str:
        keys = {"engine": "vllm", "name": name, "model": name, "python": str(stub), "group": "gpu0"}
        return table(start="on_request", **keys) + f'\nlaunch_env = {{ STUB_DELAY = "1.5", STUB_NAME = "{name}" }}'

    file = write(tmp_path, other, starting("one"), starting("two"))
    with configured(file) as server, ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(asks, server, "one")]
        until(lambda: at_work(server) == 1)
        replies.append(pool.submit(asks, server, "two"))
        until(lambda: at_work(server) == 2)
        write(tmp_path, other, starting("three"))
        reload(server, "read again")
        replies.append(pool.submit(asks, server, "three"))
        for reply, name in zip(replies, ("one", "two", "three"), strict=True):
            assert good(reply.result())["model_name"] == name
        until(lambda: "one is removed" in server.said and "two is removed" in server.said, 20)


def test_a_request_that_looks_for_its_endpoint_while_the_file_is_read_again_gets_a_new_one() -> None:
    """The endpoints that it has found are removed by then."""
    before, after = a_fleet(2), a_fleet(2)
    fleet = Fleet(before)

    async def serves_until_the_change(model: str) -> bool:
        fleet.replace(after, {})
        for endpoint in before:
            endpoint.removed = True
        return True

    async def serves(model: str) -> bool:
        return True

    for endpoint in before:
        endpoint.serves = serves_until_the_change  # type: ignore[method-assign]
    for endpoint in after:
        endpoint.serves = serves  # type: ignore[method-assign]
    routes = asyncio.run(fleet.routes(product.GenerateRequest(body={"model": "m", "messages": HI})))
    assert {endpoint for endpoint, _ in routes} == set(after)


def test_a_request_for_another_endpoint_does_not_wait_for_a_start(stub: Path, fake: Make) -> None:
    """Only what names the starting one waits for it."""
    engine = fake("ollama", model="b")
    llm = Settings(endpoints=(started(stub, "slow", delay=4.0, start="at_start"), attached(engine))).inferencer()
    with contextlib.closing(llm):
        waiting = threading.Thread(target=lambda: llm.generate("hi", model_name="slow"))
        waiting.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert llm.generate("hi", model_name="ollama/b")
        assert llm.generate("hi", model_name="b:latest")
        assert time.monotonic() - began < 2
        waiting.join(20)


def test_a_request_during_the_start_waits(stub: Path, fake: Make) -> None:
    """Over HTTP, before the server is ready."""
    app = product.create_app(
        Settings(endpoints=(started(stub, "slow", delay=1.5, start="at_start"), attached(fake("ollama", model="b"))))
    )
    with serving(app, ready=None) as url:
        for model, engine in (("slow", "vllm"), ("vllm/slow", "vllm"), ("b", "ollama")):
            body = {"prompt": "hi", "model_name": model}
            reply = httpx.post(f"{url}{API}/generate", json=body, trust_env=False, timeout=20)
            assert good(reply)["engine_type"] == engine


def test_a_started_endpoint_that_is_killed_is_passed_over_and_started_again(
    stub: Path, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "FIRST_PAUSE", 0.2)
    configs = (started(stub, "m", start="at_start"), attached(fake("sglang", model="m")))
    with Site(*configs) as site:
        good(site.generate(model_name="m"))
        (child,) = children().values()
        assert child._process is not None
        for pid in descendants(child._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for number in range(10):
            assert good(site.generate(f"{number}", model_name="m"))["text"]
        until(lambda: child.generation == 2 and child.alive, 15)


def test_workers_do_not_start_what_is_started_on_request(stub: Path, fake: Make, tmp_path: Path) -> None:
    """Two processes cannot take turns on one group: refused by name, or not started before a request."""
    late = table(engine="vllm", model="late", python=str(stub), start="on_request", name="late")
    file = write(tmp_path, table(fake("ollama", model="b")), late)
    done = run_command("--config", str(file), "--check-config", "--workers", "2")
    if done.returncode == 2:
        assert "start" in done.stderr or "workers" in done.stderr
        return
    with configured(file, "--workers", "2") as server:
        good(asks(server, "b"))
        lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(server.process.pid) if alive(pid)]
        assert not any(str(stub) in line for line in lines)


# The embedded engine -----------------------------------------------------------------------------


@pytest.fixture
def two_models(embedded: LLMInferencer, tmp_path: Path) -> list[Path]:
    """The default model under two names."""
    source = product.pull_model(None, lambda done, total: None, threading.Event()).path
    found = [tmp_path / "left.gguf", tmp_path / "right.gguf"]
    for file in found:
        try:
            os.link(source, file)
        except OSError:
            shutil.copyfile(source, file)
    return found


def embedded_endpoint(model: Path, **more: Any) -> EndpointConfig:
    return EndpointConfig(
        engine="llamacpp", name=model.stem, model=str(model), **{"launch_env": {"TURN": model.stem}} | more
    )


def test_two_real_models_take_turns(two_models: list[Path]) -> None:
    configs = [embedded_endpoint(model, start="on_request", group="cpu") for model in two_models]
    with Site(*configs) as site:
        story = "Tell me a long story."

        def ask(number: int) -> httpx.Response:
            name = two_models[number % 2].stem
            return site.client.post(
                f"{API}/generate",
                json={"prompt": story, "model_name": name, "max_tokens": 60, "stream": True},
                timeout=120,
            )

        replies = at_once(6, ask)
        for number, reply in enumerate(replies):
            assert reply.status_code == 200, reply.text
            events = payloads(reply)
            assert events[-1] == "[DONE]", "no stream was cut"
            assert events[-2]["data"]["usage"]["completion_tokens"] > 0
            assert reply.headers["x-endpoint"] == two_models[number % 2].stem
        assert len([child for identity, child in EngineChild._all.items() if child.alive and "TURN" in identity]) == 1


def test_chat_and_embeddings_as_two_endpoints(two_models: list[Path]) -> None:
    chat, embedder = two_models
    configs = (
        embedded_endpoint(chat),
        embedded_endpoint(embedder, launch_args=["embedding=true", "pooling_type=1"]),
    )
    with Site(*configs) as site:
        assert good(site.generate(max_tokens=4))["model_name"] == "left"
        reply = site.client.post("/v1/embeddings", json={"model": "right", "input": ["a", "b"]})
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["data"]) == 2 and reply.headers["x-endpoint"] == "right"


def test_real_engines_fail_over(two_models: list[Path]) -> None:
    """The same file at two endpoints; one is killed under load."""
    (model, _) = two_models
    configs = [dataclasses.replace(embedded_endpoint(model, launch_env={"N": n}), name=n) for n in ("x", "y")]
    with Site(*configs) as site:
        good(site.generate(max_tokens=2, model_name="left"))
        children = [child for identity, child in EngineChild._all.items() if child.alive and '"N"' in identity]
        assert len(children) == 2
        process = children[0]._process
        assert process is not None
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for number in range(8):
            assert good(site.generate(f"{number}", max_tokens=2, model_name="left"))["text"] is not None
