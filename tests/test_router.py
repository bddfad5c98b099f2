"""`create_router()` in another application, and an engine written by a user."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

import llm_inference as product
from llm_inference import (
    BaseLLMAdapter,
    Chunk,
    GenerateRequest,
    LLMInferencer,
    ModelInfo,
    ModelNotFound,
    Settings,
    Timing,
    UnsupportedFeature,
    Usage,
    create_router,
)
from tests.fake_engine import TEXT, FakeEngine, Reply
from tests.harness import API, SOON, Command, enveloped, good, hang_up, payloads, refused, run_command, serving, until
from tests.processes import ROOT, free_port

pytestmark = pytest.mark.usefixtures("alone")

HI = [{"role": "user", "content": "hi"}]
END = Chunk(finish_reason="stop")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine("vllm") as found:
        yield found


class Item(BaseModel):
    n: int


class Host:
    """A platform with a 404 handler, a 500 handler, a middleware, a lifespan, a body model and a route of its own."""

    def __init__(self, engine: FakeEngine, dependencies: list[Any] | None = None) -> None:
        self.lived: list[str] = []

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
            self.lived.append("up")
            yield {"state": "of the host"}
            self.lived.append("down")

        self.app = FastAPI(lifespan=lifespan, title="host")
        self.llm = LLMInferencer("vllm", base_url=engine.base_url)
        self.app.include_router(create_router(self.llm), dependencies=dependencies)

        @self.app.exception_handler(404)
        async def missing(request: Request, exc: Exception) -> Response:
            return PlainTextResponse("the host's 404", 404)

        @self.app.exception_handler(ZeroDivisionError)
        async def divided(request: Request, exc: Exception) -> Response:
            return PlainTextResponse("the host's 500", 500)

        @self.app.middleware("http")
        async def stamp(request: Request, call_next: Any) -> Any:
            answer = await call_next(request)
            answer.headers["x-host"] = "yes"
            return answer

        @self.app.get("/own")
        async def own(request: Request) -> dict[str, Any]:
            return {"state": request.state.state}

        @self.app.get("/divide")
        async def divide() -> None:
            raise ZeroDivisionError

        @self.app.post("/items")
        async def items(item: Item) -> int:
            return item.n


@pytest.fixture
def host(engine: FakeEngine) -> Host:
    return Host(engine)


def test_the_hosts_own_answers_are_untouched(host: Host) -> None:
    with serving(host.app, ready=None) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/nope").text == "the host's 404"
        assert client.get("/own").json() == {"state": "of the host"}
        assert client.get("/divide").text == "the host's 500"
        assert client.post("/items", json={"n": 3}).json() == 3
        assert client.post("/items", json={"n": "x"}).json()["detail"][0]["loc"] == ["body", "n"]  # FastAPI's own 422
        assert client.get("/health").status_code == client.get("/v1/models").status_code == 404
        assert client.get("/own").headers["x-host"] == "yes"
        assert host.lived == ["up"]
    assert host.lived == ["up", "down"]


def test_our_routes_answer_in_the_envelope(host: Host, engine: FakeEngine) -> None:
    with serving(host.app, ready=None) as url, httpx.Client(base_url=url, trust_env=False) as client:
        reply = client.post(f"{API}/chat", json={"messages": HI})
        assert good(reply)["text"] == TEXT and reply.headers["x-host"] == "yes"
        events = payloads(client.post(f"{API}/generate", json={"prompt": "hi", "stream": True}))
        assert events[-1] == "[DONE]" and "".join(e["data"].get("delta", "") for e in events[:-1]) == TEXT
        refused(client.post(f"{API}/generate", json={"prompt": "hi", "max_tokens": 0}), "invalid_request")
        engine.script(Reply(status=500, pieces=[b'{"error":"out of memory"}']))
        refused(client.post(f"{API}/generate", json={"prompt": "hi"}), "out_of_memory")
        assert [m["name"] for m in good(client.get(f"{API}/models"))] == ["m"]


def test_a_wrong_method_is_the_hosts_business(host: Host) -> None:
    with serving(host.app, ready=None) as url:
        reply = httpx.get(f"{url}{API}/chat", trust_env=False)
        assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})


def test_the_lifespan_of_the_host_closes_what_is_ours(host: Host, engine: FakeEngine) -> None:
    with serving(host.app, ready=None) as url:
        good(httpx.post(f"{url}{API}/generate", json={"prompt": "hi"}, trust_env=False))
    engine.wait(lambda: engine.connections == 0, SOON)


def test_a_router_under_a_prefix_and_twice(engine: FakeEngine) -> None:
    app = FastAPI()
    llm = LLMInferencer("vllm", base_url=engine.base_url)
    app.include_router(create_router(llm), prefix="/a")
    sub = FastAPI()
    sub.include_router(create_router(llm))
    app.mount("/b", sub)
    with serving(app, ready=None) as url:
        for prefix in ("/a", "/b"):
            assert (
                good(httpx.post(f"{url}{prefix}{API}/generate", json={"prompt": "hi"}, trust_env=False))["text"] == TEXT
            )


def test_a_router_needs_no_lifespan(engine: FakeEngine) -> None:
    """httpx's ASGITransport, and test clients without `with`, run none."""
    app = FastAPI()
    app.include_router(create_router(settings=Settings(engine="vllm", base_url=engine.base_url)))
    assert good(TestClient(app).post(f"{API}/generate", json={"prompt": "hi"}))["text"] == TEXT

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
            return await client.post(f"{API}/generate", json={"prompt": "hi"})

    assert good(asyncio.run(ask()))["text"] == TEXT


def test_a_mounted_fleet_answers_by_its_own_names(engine: FakeEngine) -> None:
    with FakeEngine("sglang", model="other") as second:
        configs = [product.EndpointConfig(engine=each.dialect, base_url=each.base_url) for each in (engine, second)]
        app = FastAPI()
        settings = Settings(endpoints=tuple(configs), aliases={"fast": "sglang/other"})
        app.include_router(create_router(settings.inferencer()))
        with TestClient(app) as client:
            for where in ({"engine_type": "sglang"}, {"model_name": "sglang/other"}, {"model_name": "fast"}):
                reply = client.post(f"{API}/generate", json={"prompt": "hi", **where})
                assert good(reply)["engine_type"] == "sglang"
            listed = [(each["engine_type"], each["name"]) for each in good(client.get(f"{API}/models"))]
            assert listed == [("vllm", "m"), ("sglang", "other")]
            assert [each["engine_type"] for each in good(client.get(f"{API}/engines"))] == ["vllm", "sglang"]


def test_the_openapi_page_of_the_host_has_all_of_our_routes(host: Host) -> None:
    doc = TestClient(host.app).get("/openapi.json").json()
    assert {
        "/own",
        "/items",
        f"{API}/generate",
        f"{API}/chat",
        f"{API}/structured-generate",
        f"{API}/engines",
        f"{API}/models",
    } <= set(doc["paths"])

    def refs(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (v for k, v in node.items() if k == "$ref" and isinstance(v, str))
            for value in node.values():
                yield from refs(value)
        elif isinstance(node, list):
            for value in node:
                yield from refs(value)

    missing = {ref for ref in refs(doc) if ref.rpartition("/")[2] not in doc["components"]["schemas"]}
    assert not missing


def untouched() -> dict[str, Any]:
    """Logging, signals, environment, event-loop policy, hooks: what a guest leaves alone."""
    root = logging.getLogger()
    return {
        "handlers": list(root.handlers),
        "level": root.level,
        "disabled": logging.root.manager.disable,
        "class": logging.getLoggerClass(),
        "uvicorn": [
            (name, list(logging.getLogger(name).handlers), logging.getLogger(name).level)
            for name in ("uvicorn", "uvicorn.error", "fastapi", "asyncio")
        ],
        "ours": (
            list(logging.getLogger("llm_inference").handlers),
            logging.getLogger("llm_inference").level,
            logging.getLogger("llm_inference").propagate,
        ),
        "signals": {each: signal.getsignal(each) for each in signal.Signals},
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "environ": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "cwd": os.getcwd(),
        "path": list(sys.path),
        "policy": type(asyncio.get_event_loop_policy()),
    }


def test_importing_the_module_changes_nothing_in_the_process() -> None:
    script = """
        import asyncio, logging, os, signal, sys, threading
        def state():
            handlers = {each: signal.getsignal(each) for each in signal.Signals}
            logs = logging.getLogger().handlers[:]
            return [logs, handlers, dict(os.environ), sys.excepthook, threading.active_count()]
        before = state()
        import llm_inference
        from llm_inference import LLMInferencer, create_router
        LLMInferencer("ollama"), LLMInferencer("llamacpp"), LLMInferencer()
        assert before == state()
        heavy = set("fastapi uvicorn httpx httptools requests xllamacpp vllm sglang ollama torch openai rich".split())
        heavy &= set(sys.modules)
        assert not heavy, heavy
    """
    done = product.subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_two_hundred_starts_and_stops_leave_nothing_and_touch_nothing(engine: FakeEngine) -> None:
    def census() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once() -> None:
        app = FastAPI()
        app.include_router(create_router(LLMInferencer("vllm", base_url=engine.base_url)))
        with TestClient(app) as client:
            good(client.post(f"{API}/generate", json={"prompt": "hi"}))
            client.post(f"{API}/generate", json={"prompt": "hi", "stream": True})
            assert client.post(f"{API}/generate", json={}).status_code == 400

    before = untouched()
    once()  # the background loop starts
    engine.wait(lambda: engine.connections == 0)
    held = census()
    for _ in range(200):
        once()
    engine.wait(lambda: engine.connections == 0)
    until(lambda: census() <= held)
    assert untouched() == before


# ----------------------------------------------------------------------------------------------- the host's own key


def keyed(request: Request) -> None:
    if request.headers.get("x-host-key") != "k":
        raise HTTPException(401, "the host wants its key", {"www-authenticate": "Host"})


@pytest.mark.parametrize(
    "path", [f"{API}/generate", f"{API}/chat", f"{API}/structured-generate", f"{API}/engines", f"{API}/models"]
)
def test_the_hosts_dependency_guards_every_route(engine: FakeEngine, path: str) -> None:
    host = Host(engine, [Depends(keyed)])
    method = "GET" if path.endswith(("engines", "models")) else "POST"
    client = TestClient(host.app)
    reply = client.request(method, path, json={"prompt": "hi"})
    assert "the host wants its key" in refused(reply, "unauthorized") and reply.headers["www-authenticate"] == "Host"
    assert not engine.bodies
    body = {"messages": HI} if path.endswith("chat") else {"prompt": "hi"}
    engine.answer = lambda ask: "{}"
    good(client.request(method, path, json=body, headers={"x-host-key": "k"}))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request"),
        (401, "unauthorized"),
        (403, "unauthorized"),
        (404, "not_found"),
        (409, "invalid_request"),
        (429, "busy"),
        (500, "internal_error"),
        (503, "not_ready"),
    ],
)
def test_whatever_a_dependency_raises_is_an_envelope(engine: FakeEngine, status: int, kind: str) -> None:
    def refuses() -> None:
        raise HTTPException(status, {"why": "host's own words"}, {"retry-after": "7"})

    reply = TestClient(Host(engine, [Depends(refuses)]).app, raise_server_exceptions=False).post(
        f"{API}/generate", json={"prompt": "hi"}
    )
    assert "host's own words" in refused(reply, kind, status) and reply.headers["retry-after"] == "7"


def test_a_dependency_with_parameters_is_checked_in_the_envelope(engine: FakeEngine) -> None:
    def tenant(tenant: int) -> None: ...

    client = TestClient(Host(engine, [Depends(tenant)]).app)
    assert "tenant" in refused(client.post(f"{API}/generate", json={"prompt": "hi"}), "invalid_request", 400)
    assert "SECRET" not in client.post(f"{API}/generate?tenant=SECRET", json={"prompt": "hi"}).text
    good(client.post(f"{API}/generate?tenant=1", json={"prompt": "hi"}))


def test_a_dependency_that_breaks_is_an_envelope(engine: FakeEngine) -> None:
    def breaks() -> None:
        raise RuntimeError("SECRET")

    reply = TestClient(Host(engine, [Depends(breaks)]).app, raise_server_exceptions=False).post(
        f"{API}/generate", json={"prompt": "hi"}
    )
    assert "SECRET" not in refused(reply, "internal_error")


def test_a_dependency_that_has_read_the_body_leaves_it_to_us(engine: FakeEngine) -> None:
    async def reads(request: Request) -> None:
        await request.body()

    with serving(Host(engine, [Depends(reads)]).app, ready=None) as url:
        assert (
            good(httpx.post(f"{url}{API}/generate", json={"prompt": "hi"}, trust_env=False, timeout=3))["text"] == TEXT
        )


def test_a_client_that_leaves_a_host_with_middleware(host: Host, engine: FakeEngine) -> None:
    engine.pace, engine.text = 0.05, "word " * 2000
    with serving(host.app, ready=None) as url:
        for stream in (True, False):
            with contextlib.closing(hang_up(url)) as client:
                client.request("POST", f"{API}/generate", json.dumps({"prompt": "hi", "stream": stream}))
                engine.wait(lambda: engine.live == 1)
            engine.wait(lambda: engine.live == 0, SOON)


# ----------------------------------------------------------------------------------------------- a new engine

ECHO = """
    from collections.abc import AsyncGenerator
    from llm_inference import BaseLLMAdapter, Chunk, GenerateRequest, LLMInferencer, main


    class Echo(BaseLLMAdapter):
        engine_type = "echo"
        capabilities = frozenset({"max_tokens", "temperature"})

        async def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
            for word in str(request.messages[-1]["content"]).split(" "):
                yield [Chunk(text=word)]
            yield [Chunk(finish_reason="stop")]


    if __name__ == "__main__":
        LLMInferencer.ENGINE_MAP["echo"] = Echo
        raise SystemExit(main())
"""


class Echo(BaseLLMAdapter):
    engine_type: ClassVar[str] = "echo"
    capabilities: ClassVar[frozenset[str]] = frozenset({"max_tokens", "temperature"})

    async def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        for word in str(request.messages[-1]["content"]).split(" "):
            yield [Chunk(text=word)]
        yield [Chunk(finish_reason="stop")]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LLMInferencer.ENGINE_MAP, "echo", Echo)


@pytest.fixture
def echoing(echo: None) -> Iterator[httpx.Client]:
    with (
        serving(product.create_app(Settings(engine="echo"))) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        yield client


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "with_echo.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(ECHO)}")
    return path


@pytest.mark.usefixtures("echo")
def test_a_new_engine_works_in_python() -> None:
    with LLMInferencer("echo") as llm:
        assert llm.generate("a b c") == "abc" == "".join(llm.stream("a b c"))
        assert llm.chat([{"role": "user", "content": "x y"}]) == "xy"
        done = llm.complete("a b")
        assert (done.engine_type, done.finish_reason) == ("echo", "stop")
        assert [m.name for m in llm.models()] == ["echo"] and llm.health()["healthy"]
        assert [each.text for each in llm.batch(["a", "b"])] == ["a", "b"]  # type: ignore[union-attr]
    assert asyncio.run(LLMInferencer(model_name="echo/x").agenerate("a b")) == "ab"


@pytest.mark.parametrize(
    "where", [{}, {"engine_type": "echo"}, {"model_name": "echo/echo"}, {"engine_type": "echo", "model_name": "any"}]
)
def test_a_new_engine_works_over_http(echoing: httpx.Client, where: dict[str, str]) -> None:
    data = good(echoing.post(f"{API}/generate", json={"prompt": "a b c", **where}))
    assert (data["text"], data["engine_type"]) == ("abc", "echo")
    events = payloads(
        echoing.post(f"{API}/chat", json={"messages": [{"role": "user", "content": "a b c"}], "stream": True, **where})
    )
    assert (
        events[-1] == "[DONE]"
        and [e["data"].get("delta") for e in events[:-1]] == ["a", "b", "c", None]
        and events[-2]["data"]["finish_reason"] == "stop"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_asked_for_is_not_asked_of_an_engine_that_cannot(
    echoing: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(Echo, "capabilities", frozenset())
    for path, body in (
        (f"{API}/generate", {"prompt": "a b"}),
        ("/v1/chat/completions", {"model": "echo", "messages": HI}),
    ):
        reply = echoing.post(path, json={**body, "stream": stream})
        assert reply.status_code == 200, reply.text


def test_a_new_engine_is_listed(echoing: httpx.Client) -> None:
    assert "echo" in [e["engine_type"] for e in good(echoing.get(f"{API}/engines")) if e["reachable"]]
    assert ("echo", "echo") in [(m["engine_type"], m["name"]) for m in good(echoing.get(f"{API}/models"))]
    assert "echo/echo" in [m["id"] for m in echoing.get("/v1/models").json()["data"]]
    assert "echo" in refused(
        echoing.post(f"{API}/chat", json={"messages": HI, "engine_type": "ecko"}), "unknown_engine"
    )


def test_a_new_engine_is_on_the_openapi_page(echoing: httpx.Client) -> None:
    doc = echoing.get("/openapi.json").json()
    field = doc["paths"][f"{API}/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "properties"
    ]["engine_type"]
    assert "echo" in json.dumps(field)


def test_a_new_engine_refuses_what_it_cannot_do(echoing: httpx.Client) -> None:
    assert "seed" in refused(echoing.post(f"{API}/generate", json={"prompt": "a", "seed": 1}), "unsupported_feature")
    assert good(echoing.post(f"{API}/generate", json={"prompt": "a", "seed": 1, "on_unsupported": "ignore"}))[
        "ignored"
    ] == ["seed"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_new_engine_speaks_openai(echoing: httpx.Client, stream: bool) -> None:
    reply = echoing.post(
        "/v1/chat/completions",
        json={"model": "echo/echo", "messages": [{"role": "user", "content": "a b"}], "stream": stream},
    )
    assert reply.status_code == 200, reply.text
    if stream:
        assert reply.text.endswith("data: [DONE]\n\n")
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in payloads(reply)[:-1]) == "ab"
    else:
        assert reply.json()["choices"][0]["message"]["content"] == "ab"


def test_a_new_engine_embeds(echoing: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def embed(self: Any, texts: Sequence[str], model: str) -> tuple[list[list[float]], Usage]:
        return [[float(len(text)), 0.5] for text in texts], Usage(prompt_tokens=3)

    body = {"model": "echo/echo", "input": ["a", "bc"]}
    assert echoing.post("/v1/embeddings", json=body).json()["error"]["code"] == "unsupported_feature"
    with LLMInferencer("echo") as llm:
        with pytest.raises(UnsupportedFeature, match="echo has no embeddings"):
            llm.embed("a")
        monkeypatch.setattr(Echo, "embed", embed)
        assert llm.embed(["a", "bc"]) == [[1.0, 0.5], [2.0, 0.5]]
    found = echoing.post("/v1/embeddings", json=body).json()
    assert [each["embedding"] for each in found["data"]] == [[1.0, 0.5], [2.0, 0.5]]
    assert found["usage"]["prompt_tokens"] == 3


def test_a_new_engines_failure_is_typed(echoing: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(self: Any, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        raise RuntimeError("SECRET")
        yield []

    async def stops(self: Any, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        yield [Chunk(text="a")]

    monkeypatch.setattr(Echo, "_stream", breaks)
    assert "SECRET" not in refused(echoing.post(f"{API}/generate", json={"prompt": "a"}), "internal_error")
    monkeypatch.setattr(Echo, "_stream", stops)
    refused(echoing.post(f"{API}/generate", json={"prompt": "a"}), "bad_engine_reply")
    for path, body in (
        (f"{API}/generate", {"prompt": "a"}),
        ("/v1/chat/completions", {"model": "echo", "messages": HI}),
    ):
        text = echoing.post(path, json={**body, "stream": True}).text
        assert "[DONE]" not in text and "bad_engine_reply" in text


def streaming(monkeypatch: pytest.MonkeyPatch, *bursts: list[Chunk]) -> None:
    """The new engine answers with these."""

    async def answer(self: Any, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        for burst in bursts:
            yield burst

    monkeypatch.setattr(Echo, "_stream", answer)


def test_what_a_new_engine_measures_and_counts_is_passed_on(
    echoing: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(total=9.0, queue=0.25, decode=0.5, tokens_per_second=4.0)
    figures = Chunk(text="b", usage=Usage(prompt_tokens=3, completion_tokens=2), timing=timing)
    streaming(monkeypatch, [], [Chunk(text="a")], [figures, END])
    with LLMInferencer("echo") as llm:
        done = llm.complete("x")
    assert (done.text, done.usage) == ("ab", Usage(prompt_tokens=3, completion_tokens=2))
    assert done.timing == dataclasses.replace(timing, total=done.timing.total, ttft=done.timing.ttft, source="engine")
    body = {"prompt": "x", "stream": True}
    for found in (
        good(echoing.post(f"{API}/generate", json=body | {"stream": False})),
        payloads(echoing.post(f"{API}/generate", json=body))[-2]["data"],
    ):
        assert found["usage"]["total_tokens"] == 5 and found["timing"]["tokens_per_second"] == 4.0
    chunks = payloads(echoing.post("/v1/completions", json=body | {"model": "echo"}))[:-1]
    assert not any("timings" in chunk for chunk in chunks)


def test_the_logprobs_of_a_new_engine_are_on_every_route(
    echoing: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "capabilities", frozenset({"logprobs"}))
    tokens = [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in ("ab", "c")]
    streaming(monkeypatch, *([Chunk(text=each["token"], logprobs=(each,))] for each in tokens), [END])
    body = {"model": "echo", "prompt": "x", "logprobs": 1}
    found = echoing.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert (found["tokens"], found["text_offset"]) == (["ab", "c"], [0, 2])
    events = payloads(echoing.post("/v1/completions", json=body | {"stream": True}))[:2]
    found = [event["choices"][0]["logprobs"] for event in events]
    assert [(each["tokens"], each["text_offset"]) for each in found] == [(["ab"], [0]), (["c"], [2])]
    body = {"model": "echo", "messages": HI, "logprobs": True}
    found = echoing.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]
    assert found["content"] == tokens


def test_an_engine_that_only_embeds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Embeds(BaseLLMAdapter):
        engine_type = "embeds"

        async def models(self) -> list[ModelInfo]:
            return [ModelInfo(name="e", capabilities=("embedding",))]

    monkeypatch.setitem(LLMInferencer.ENGINE_MAP, "embeds", Embeds)
    with LLMInferencer("embeds") as llm:
        with pytest.raises(ModelNotFound, match="no model that can chat; use another engine"):
            llm.generate("x")
        with pytest.raises(UnsupportedFeature, match="embeds generates no text; use another engine"):
            llm.generate("x", model_name="e")


def test_a_new_engine_on_the_command_line(script: Path) -> None:
    done = run_command("--engine", "echo", "--json", script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each["text"].startswith("Whatisthecapital") for each in json.loads(done.stdout)] == [True]
    assert "echo" in run_command("--help", script=script).stdout
    assert "echo" in run_command("--engine", "nope", script=script).stderr


def test_a_new_engine_is_served_from_the_command_line(script: Path) -> None:
    with Command("--engine", "echo", script=script) as server:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as client:
            client.request("POST", f"{API}/generate", json.dumps({"prompt": "a b"}))
            assert enveloped(json.loads(client.getresponse().read()))["data"]["text"] == "ab"


def test_a_new_engine_is_not_shared_by_workers(script: Path) -> None:
    port = str(free_port())
    done = run_command("--serve", "--engine", "echo", "--workers", "2", "--port", port, script=script)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "invalid_request: echo runs in this process alone; serve it with --workers 1\n"


# A user's own routes and middleware on create_app() ---------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 409, 415, 418, 422, 429, 502, 504])
def test_a_route_of_the_users_own_keeps_its_status(status: int, engine: FakeEngine) -> None:
    app = product.create_app(Settings(engine="vllm", base_url=engine.base_url))

    async def refuse() -> None:
        raise HTTPException(status, "for a reason")

    for path in ("/v1/own", f"{API}/own", "/own"):
        app.add_api_route(path, refuse)
        with TestClient(app, client=("127.0.0.1", 5), base_url="http://localhost") as client:
            reply = client.get(path)
        assert reply.status_code == status and reply.headers["x-error-kind"], path


def test_a_middleware_may_change_the_headers_of_the_page(engine: FakeEngine) -> None:
    app = product.create_app(Settings(engine="vllm", base_url=engine.base_url))
    app.add_middleware(GZipMiddleware)
    with TestClient(app, client=("127.0.0.1", 5), base_url="http://localhost") as client:
        packed = client.get("/ui", headers={"accept-encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip" and "<html" in packed.text
        plain = client.get("/ui", headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers and "<html" in plain.text
