"""The server process: --workers, /metrics, and the limits that uvicorn itself lacks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

import llm_inference as product
from tests.fake_engine import TEXT, FakeEngine, Reply
from tests.harness import (
    API,
    SOON,
    Command,
    Stand,
    clean_env,
    enveloped,
    hang_up,
    refused,
    refused_v1,
    run_command,
    serve_flags,
    serving,
    until,
)
from tests.processes import ROOT, descendants, free_port

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


# ------------------------------------------------------------------------------------------------------- the wire


@pytest.fixture(scope="module")
def limited() -> Iterator[Stand]:
    with Stand("vllm", header_timeout=0.3, body_timeout=0.6) as stand:
        yield stand


@pytest.fixture(scope="module", params=["httptools", "h11"])
def port(request: pytest.FixtureRequest, limited: Stand) -> Iterator[int]:
    """The app behind the protocol of --serve, with either parser, and its deadlines short."""
    import uvicorn

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            patch.setitem(__import__("sys").modules, "uvicorn.protocols.http.httptools_impl", None)
        protocol = product.limited_protocol(limited.gateway.settings)
    assert any(request.param in base.__module__ for base in protocol.__mro__)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            limited.app, http=protocol, log_config=None, lifespan="off", h11_max_incomplete_event_size=1 << 17
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(15)
    listener.close()
    assert not thread.is_alive()


def said(port: int, *parts: bytes) -> tuple[int, Any]:
    """The status and JSON that these bytes get; (0, None) for a connection closed without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        with contextlib.suppress(OSError):
            for part in parts:
                wire.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := wire.recv(65536):
                answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)) if head else (0, None)


START = b"POST /api/v1/llm/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "parts, status, kind",
    [
        ((START,), 408, "request_timeout"),
        ((START + b"Content-Length: 50\r\n\r\n", b'{"messages": ['), 408, "request_timeout"),
        ((START + b"X-Endless: ", *[b"a" * 8192] * 6), 431, "header_too_large"),
        (
            (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + b"X-A: b\r\n" * 101 + b"\r\n",),
            431,
            "header_too_large",
        ),
        ((b"\x16\x03\x01 not HTTP\r\n\r\n",), 400, "invalid_request"),
    ],
    ids=["slow header", "slow body", "endless header", "101 fields", "garbage"],
)
def test_what_is_too_long_or_too_slow(port: int, parts: tuple[bytes, ...], status: int, kind: str) -> None:
    assert (found := said(port, *parts))[0] == status, found
    assert enveloped(found[1])["msg"].startswith(kind)


CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "endless",
    [b"0\r\n" + b"X-A: b\r\n" * 20_000, b"0\r\nX-A: " + b"b" * 160_000, b"1;x=" + b"y" * 160_000],
    ids=["fields", "value", "extension"],
)
def test_what_follows_a_body_has_an_end(port: int, endless: bytes) -> None:
    """Trailers and chunks' extensions, which no deadline of ours would bound in size. h11 has limits of its own, and
    says 400."""
    status, body = said(
        port, CHUNKED, b"2\r\n{ \r\n", *[endless[at : at + 8192] for at in range(0, len(endless), 8192)]
    )
    assert (status, body["msg"].partition(":")[0]) in ((431, "header_too_large"), (400, "invalid_request"))


def test_a_body_in_the_smallest_chunks_and_a_trailer_pass(port: int, limited: Stand) -> None:
    limited.engine.reset()
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    status, answer = said(
        port, CHUNKED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), chunks, b"0\r\nAuthorization: Bearer x\r\n\r\n"
    )
    assert (status, answer["data"]["text"]) == (200, TEXT)


@pytest.mark.parametrize("traced", [False, True])
def test_our_layers_are_around_those_of_fastapi_unless_they_trace(
    traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI's own layers cost every request a part of its time and every stream memory."""
    passed: list[str] = []
    call = FastAPI.__call__

    async def watched(self: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope.get("path", scope["type"]))
        await call(self, scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", watched)
    if traced:
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk", sys)
    with Stand("vllm", api_keys=("k",), cors_origins=("https://a.example",)) as stand:
        key, origin = {"authorization": "Bearer k"}, {"origin": "https://a.example"}
        question = {"model": stand.model, "messages": HI}
        assert stand.client.post(CHAT, json=question, headers=key).status_code == 200
        assert (CHAT in passed) is traced
        assert stand.client.post(CHAT, json=question).status_code == 401
        asked = {**origin, "access-control-request-method": "POST"}
        allowed = stand.client.options(CHAT, headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        answer = stand.client.post(CHAT, json=question, headers={**key, **origin})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert stand.client.get("/nope", headers=key).json()["msg"].startswith("not_found: there is no route")
        assert stand.client.get("/docs").status_code == 200
    assert passed[0] == "lifespan" and "/nope" in passed


@pytest.mark.parametrize("own", [True, False], ids=["--serve", "a host's uvicorn"])
@pytest.mark.parametrize(
    "path, body",
    [(f"{API}/chat", {"messages": HI}), (CHAT, {"messages": HI, "model": "vllm/fake"})],
    ids=["ours", "openai"],
)
def test_a_client_that_does_not_read_is_gone(own: bool, path: str, body: dict[str, Any]) -> None:
    """Neither a place nor a generation is kept for it; --serve ends its connection too."""
    with Stand("vllm", deadlines=product.Deadlines(idle=0.5)) as stand, contextlib.ExitStack() as stack:
        stand.engine.text = "word " * 60_000
        url = (
            stack.enter_context(serving(stand.app, http=product.limited_protocol(stand.gateway.settings)))
            if own
            else stand.url
        )
        client = stack.enter_context(contextlib.closing(socket.socket()))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        asked = (
            json.dumps(body | {"model": stand.model} if "model" in body else body)[:-1].encode() + b', "stream": true}'
        )
        client.sendall(
            b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(asked)) + asked
        )
        until(lambda: stand.gateway.in_flight == 1)
        until(lambda: stand.gateway.in_flight == 0)
        stand.engine.wait(lambda: stand.engine.live == 0)
        if own:
            client.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(1 << 20):
                    pass


@pytest.mark.parametrize(
    ("stuck", "pause"),
    [("http.response.start", 0), (b"data: 1\n\n", 0), (b": keep-alive\n\n", 60), (b": keep-alive\n\n", 0.2), (b"", 0)],
    ids=["head", "event", "comment", "comment before the end", "end"],
)
def test_shutdown_does_not_wait_for_a_client_that_does_not_read(
    stuck: Any, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under any server: whichever message it is that does not go out."""
    monkeypatch.setattr(product, "KEEP_ALIVE_COMMENT", 0.1)
    settings = product.Settings(engine="vllm", base_url="127.0.0.1:9", deadlines=product.Deadlines(idle=0.2))
    gateway, ended = product.Gateway(settings), list[bool]()
    surface = functools.partial(product.OpenAISurface, path=CHAT)

    class One(product.Exchange):
        async def work(self, raw: bytes) -> None:
            await self.events(self.parts())

        async def parts(self) -> AsyncGenerator[product.Burst, None]:
            try:
                yield product.Burst(b"data: 1\n\n")
                await asyncio.sleep(pause)
            finally:
                ended.append(True)

    async def ask() -> None:
        said = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> dict[str, Any]:
            return said.pop() if said else await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            if stuck in (message["type"], message.get("body")):
                await asyncio.Future()

        await asyncio.wait_for(One(gateway, surface)({"type": "http", "path": "/x", "headers": []}, receive, send), 20)
        for _ in range(5):  # turns that a cancelled task takes to end
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "a task is left"

    asyncio.run(ask())
    assert ended == [True] and gateway.in_flight == 0


def test_a_connection_that_asks_nothing_is_closed(port: int) -> None:
    assert said(port) == (0, None)


def test_a_slow_body_on_the_openai_surface_is_openais_error(port: int) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    status, body = said(port, head)
    assert (status, body["error"]["code"]) == (408, "request_timeout")


def test_requests_in_pieces_and_in_a_row_pass(port: int, limited: Stand) -> None:
    """An answer slower than every deadline of the request, in the middle of them."""
    limited.engine.reset()
    limited.engine.pace = 0.1
    body = json.dumps({"messages": HI}).encode()
    request = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        for _ in range(2):
            for at in range(0, len(request), 40):
                wire.sendall(request[at : at + 40])
            answer = b""
            while b'"data"' not in answer or not answer.endswith(b"}}"):
                data = wire.recv(65536)
                assert data, answer
                answer += data
            assert answer.startswith(b"HTTP/1.1 200") and TEXT in answer.decode()


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_a_client_that_leaves_with_a_request_behind_its_first(port: int, limited: Stand, stream: bool) -> None:
    """uvicorn reads no further behind a pipelined request, and would not notice that the client has left."""
    limited.engine.reset().script(Reply(delay=60))
    body = json.dumps({"messages": HI, "stream": stream}).encode()
    asked = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(asked + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        limited.engine.wait(lambda: limited.engine.live == 1)
    limited.engine.wait(lambda: limited.engine.live == 0, SOON)
    until(lambda: limited.gateway.in_flight == 0, SOON)


@pytest.mark.parametrize("behind", [b"half of a body", b"x" * (8 << 20)], ids=["half", "much"])
def test_what_comes_behind_a_request_does_not_get_into_its_answer(port: int, limited: Stand, behind: bytes) -> None:
    """Its place is given back, its bytes are bounded, and no second answer stands inside of the first."""
    limited.engine.reset()
    limited.engine.pace, limited.engine.text = 0.05, "word " * 40
    body = json.dumps({"messages": HI, "stream": True}).encode()
    asked = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(asked + START + b"Content-Length: %d\r\n\r\n" % (len(behind) + 9))
        answer = wire.recv(65536)
        with contextlib.suppress(OSError):
            wire.sendall(behind)
        with contextlib.suppress(OSError):
            while data := wire.recv(65536):
                answer += data
    before, _, after = answer.partition(b"[DONE]")
    assert before.count(b"HTTP/1.1 ") == 1 and after.count(b"HTTP/1.1 ") <= 1, answer
    limited.engine.wait(lambda: limited.engine.live == 0)
    until(lambda: limited.gateway.in_flight == 0)


def test_a_large_body_is_no_request_behind_another(port: int, limited: Stand) -> None:
    limited.engine.reset()
    body = json.dumps({"messages": [{"role": "user", "content": "x" * (3 << 20)}]}).encode()
    head = START + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    for parts in ((head + body,), (head, body)):
        status, answer = said(port, *parts)
        assert (status, answer["data"]["text"]) == (200, TEXT)


def test_two_requests_in_one_segment_however_it_is_cut() -> None:
    """The second one's header reaches nobody else's: the key is read from where it stands."""
    second = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer k\r\nConnection: close\r\n\r\n"
    both = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n\r\n" + second
    with Stand("vllm", api_keys=("k",)) as stand:
        protocol = product.limited_protocol(stand.gateway.settings)
        with serving(stand.app, http=protocol) as url:
            for cut in range(1, len(both)):
                with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as wire:
                    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    wire.sendall(both[:cut])
                    time.sleep(0.002)
                    wire.sendall(both[cut:])
                    answer = b""
                    while data := wire.recv(65536):
                        answer += data
                assert answer.count(b"HTTP/1.1 200") == 2, (cut, answer)


def test_a_client_of_http_1_0_gets_a_plain_stream(port: int, limited: Stand) -> None:
    """No chunks: its stream ends with the connection (RFC 9112, 6.1)."""
    limited.engine.reset()
    body = json.dumps({"messages": HI, "stream": True}).encode()
    head = START.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Authorization: Bearer %s\r\n" % (
        limited.gateway.settings.made_key.encode()
    )
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while data := wire.recv(65536):
            answer += data
    headers, _, text = answer.partition(b"\r\n\r\n")
    assert b" 200 " in headers and b"chunked" not in headers.lower(), headers
    assert text.startswith(b"data: {") and text.endswith(b"data: [DONE]\n\n")


def test_a_body_in_a_coding_that_is_not_chunked_alone_is_refused(port: int) -> None:
    head = START + b"Transfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n"
    status, _ = said(port, head, b"2\r\n{}\r\n0\r\n\r\n")
    assert status in (400, 501)


# ------------------------------------------------------------------------------------------------------ /metrics


def counted(url: str) -> dict[str, float]:
    page = httpx.get(url + "/metrics", trust_env=False).text
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    }


def test_metrics() -> None:
    with Stand("vllm") as stand:
        assert stand.post("/chat", messages=HI).status_code == 200
        stand.events("/chat", messages=HI)
        refused(stand.post("/chat", messages=[]), "invalid_request")
        refused_v1(stand.post(CHAT, model="vllm/none", messages=[]), "invalid_request")
        found = counted(stand.url)
        assert found['llm_endpoint_up{endpoint="vllm"}'] == 1
        of_endpoint = 'endpoint="vllm",engine="vllm"'
        route = f'{of_endpoint},route="/api/v1/llm/chat"'
        assert found[f'llm_requests_total{{{route},status="200"}}'] == 2
        assert found['llm_requests_total{endpoint="-",engine="-",route="/api/v1/llm/chat",status="400"}'] == 1
        assert found['llm_errors_total{endpoint="-",engine="-",kind="invalid_request"}'] == 2
        assert (
            found[f"llm_first_token_seconds_count{{{route}}}"] == 1
            and found[f"llm_request_seconds_count{{{route}}}"] == 2
        )
        assert found[f'llm_tokens_total{{{of_endpoint},kind="completion"}}'] > 0 and found["llm_engine_up"] == 1
        assert found["llm_requests_in_flight"] == found["llm_requests_waiting"] == 0
        stand.engine.pace, stand.engine.text = 0.05, "word " * 200
        with stand.client.stream("POST", "/api/v1/llm/chat", json={"messages": HI, "stream": True}) as reply:
            pieces = reply.iter_bytes()  # closed with its last reference
            next(pieces)
            assert counted(stand.url)["llm_requests_in_flight"] == 1


def test_metrics_ask_for_the_key() -> None:
    with Stand("vllm", api_keys=("k",)) as stand:
        refused(httpx.get(stand.url + "/metrics", trust_env=False), "unauthorized")
        assert (
            httpx.get(stand.url + "/metrics", headers={"authorization": "Bearer k"}, trust_env=False).status_code == 200
        )


# ------------------------------------------------------------------------------------------------------ --workers


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if "zombie" not in proc(pid, "status") != ""}


def proc(pid: int, name: str) -> str:
    """A file of /proc/PID; "" where the process has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


def workers(command: Command) -> set[int]:
    started = [
        line.split("worker ")[1].split()[0]
        for line in command.said.splitlines()
        if " worker " in line and line.endswith("started")
    ]
    return alive(set(map(int, started)))


def engines(pids: set[int]) -> set[int]:
    """Those of them that serve llama.cpp; their watchers' command lines are others."""
    return {pid for pid in pids if f"-c\0{product.LLAMACPP_SERVER}" in proc(pid, "cmdline")}


def ask(command: Command) -> bool:
    with contextlib.suppress(httpx.TransportError):
        reply = httpx.post(
            command.url + "/api/v1/llm/chat", json={"messages": HI, "max_tokens": 4}, trust_env=False, timeout=60
        )
        return reply.status_code == 200
    return False


def test_workers_share_an_engine_and_are_replaced() -> None:
    with Command("--engine", "llamacpp", "--workers", "2") as command:
        until(lambda: len(workers(command)) == 2)
        assert all(ask(command) for _ in range(6))
        found = counted(command.url)  # each worker reports what both have done
        labels = 'endpoint="llamacpp",engine="llamacpp",route="/api/v1/llm/chat",status="200"'
        assert found[f"llm_requests_total{{{labels}}}"] == 6
        assert len(engines(descendants(command.process.pid))) == 1  # not one for each worker
        killed = min(workers(command))
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(workers(command)) == 2 and killed not in workers(command), 30)
        until(lambda: ask(command), 30)
        both = descendants(command.process.pid)
        assert command.end() == 0
        until(lambda: not alive(both))


def test_workers_of_a_silent_engine_can_be_stopped() -> None:
    """Nobody listens before there is an engine to ask, and SIGTERM is a clean end then too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = free_port()
        where = ["--engine", "vllm", "--base-url", f"127.0.0.1:{silent.getsockname()[1]}"]
        argv = [sys.executable, str(ROOT / "llm_inference.py"), *serve_flags(port, "--workers", "2", *where)]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env()
        ) as process:
            silent.settimeout(30)
            kept = silent.accept()[0]
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", port), 1)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        kept.close()
    assert process.returncode == 0 and "Traceback" not in err, err


def test_workers_outlive_neither_their_parent_nor_a_dead_engine() -> None:
    with Command("--engine", "llamacpp", "--workers", "2") as command:
        until(lambda: len(workers(command)) == 2)
        below = descendants(command.process.pid)
        (engine,) = engines(below)
        os.kill(engine, signal.SIGKILL)
        until(lambda: not alive({engine}))
        until(lambda: ask(command), 60)  # started again by the parent, at the same address
        below |= descendants(command.process.pid)
        command.process.kill()
        until(lambda: not alive(below), 30)


# --------------------------------------------------------------------------------------------------- offline pages


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_documentation_asks_no_other_host(page: str) -> None:
    """Scripts, styles and icons come from this server, and without a key."""
    with Stand("vllm", api_keys=("k",)) as stand:
        html = stand.client.get(page).text
        found = re.findall(r"""(?:src|href|spec-url)=["']([^"']+)""", html)
        assert any(each.endswith(".js") for each in found) and all(each.startswith("/") for each in found), found
        for each in found:
            assert stand.client.get(each).status_code == 200, each
        refused(stand.client.get("/docs/assets/none.js"), "unauthorized")


# ------------------------------------------------------------------------------------- what the fault rig has found


@pytest.mark.parametrize("origin", ["null", "file://", "http://evil.example", "x://127.0.0.1"])
def test_a_page_of_another_origin_needs_the_key(limited: Stand, origin: str) -> None:
    refused(limited.client.get("/api/v1/llm/models", headers={"origin": origin}), "unauthorized")


def test_a_page_of_our_own_origin_needs_no_key(limited: Stand) -> None:
    assert limited.client.get("/api/v1/llm/models", headers={"origin": limited.url}).status_code == 200


def test_two_hosts_are_refused(port: int) -> None:
    status, body = said(
        port, b"GET /api/v1/llm/models HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert status == 400 and enveloped(body)["msg"].startswith("invalid_request")


AWAY = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "$defs": {"unused": {"$ref": "http://127.0.0.1:9/x"}},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": AWAY}}]},
        {"structured_outputs": {"json": AWAY}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": AWAY}}},
    ],
    ids=["tool", "structured_outputs", "response_format"],
)
def test_no_reference_leaves_a_relayed_schema(fields: dict[str, Any]) -> None:
    with Stand("vllm", capabilities=("tools",)) as stand:
        assert "$ref" in refused_v1(stand.post(CHAT, model=stand.model, messages=HI, **fields), "invalid_request")
        assert not stand.engine.bodies


def test_no_reference_leaves_a_schema(limited: Stand) -> None:
    assert "$ref" in refused(limited.post("/structured-generate", prompt="x", schema=AWAY), "invalid_request")


@pytest.mark.parametrize("body", [
    b'{"messages": [{"role": "user", "content": "hi"}], "x": [' + b"[]," * 200_000 + b"0]}",
    b'{"messages": [{"role": "user", "content": "hi"}]' + b"".join(b', "n%d": 0' % n for n in range(200_000)) + b"}",
], ids=["empty lists", "names"])  # fmt: skip
def test_a_body_of_too_many_values(limited: Stand, body: bytes) -> None:
    assert "too many values" in refused(limited.raw("/chat", body), "invalid_request")


def test_commas_inside_a_text_do_not_count_as_values(limited: Stand) -> None:
    limited.engine.reset()
    assert limited.post("/chat", messages=[{"role": "user", "content": '[{,\\",' * 100_000}]).status_code == 200


def stream_of(stand: Stand, *pieces: bytes, end: str = "clean") -> None:
    full = stand.engine.reset()._openai(True, {"messages": HI, "stream": True, "model": "m"})
    stand.engine.script(
        Reply(headers=full.headers, pieces=[*full.pieces[:3], *pieces, *full.pieces[3:]], end=end, chunked=True)
    )  # type: ignore[arg-type]


def test_a_connection_broken_after_the_end_is_no_error(limited: Stand) -> None:
    stream_of(limited, end="eof")
    text = limited.post(CHAT, model=limited.model, messages=HI, stream=True).text
    assert text.endswith("data: [DONE]\n\n") and '"error"' not in text


def test_control_characters_do_not_end_an_event(limited: Stand) -> None:
    stream_of(limited, b'data: {"id":"\x00"}\n\n')
    assert "[DONE]" not in limited.post(CHAT, model=limited.model, messages=HI, stream=True).text


def test_garbage_lines_are_an_error_on_our_own_routes(limited: Stand) -> None:
    stream_of(limited, b"<html>502</html>\n\n")
    text = limited.post("/chat", messages=HI, stream=True).text  # an error before the first byte, or an event
    assert "bad_engine_reply" in text and "[DONE]" not in text


# ---------------------------------------------------- the chat page (in a browser: tests/browser/test_ui.py)


def test_the_page_needs_no_key_and_no_package(without: Callable[..., None]) -> None:
    """It holds no secret; what it asks of the other routes carries the key that is typed into it."""
    without("gradio")
    for settings in ({}, {"workers": 2}):
        with Stand("vllm", api_keys=("a-secret-key",), **settings) as stand:
            page = stand.client.get("/ui")
            assert page.status_code == 200 and page.text == product.CHAT_PAGE and "a-secret-key" not in page.text
            assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page.text)  # nothing else is loaded
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "connect-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy


def test_a_password_of_a_browser_opens_nothing() -> None:
    """A page elsewhere could ride on one that a browser keeps."""
    basic = {"authorization": "Basic " + base64.b64encode(b"anyone:right").decode()}
    with Stand("vllm", api_keys=("right",)) as stand:
        for path in ("/api/v1/llm/models", "/v1/models", "/metrics", "/uix", "//ui/", "/ui/../metrics"):
            with contextlib.closing(hang_up(stand.url)) as client:
                client.request("GET", path, headers=basic)  # as it stands: httpx would tidy it up
                reply = client.getresponse()
                assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), path
        refused(stand.client.post("/api/v1/llm/chat", headers=basic, json={"messages": HI}), "unauthorized")


# ------------------------------------------------------------------------------------------------ the command line


def test_a_second_server_on_the_same_port_fails() -> None:
    """Both are started before either has bound: an engine that nobody can reach may take long to find."""
    port = free_port()
    where = ["--engine", "vllm", "--base-url", "http://127.0.0.1:9"]
    argv = [sys.executable, str(ROOT / "llm_inference.py"), *serve_flags(port, *where)]
    both = [
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=clean_env()
        )
        for _ in range(2)
    ]
    try:
        until(lambda: any(process.poll() is not None for process in both), 30)
        loser = next(process for process in both if process.poll() is not None)
        assert loser.returncode == 1 and b"cannot be used" in loser.stderr.read()  # type: ignore[union-attr]
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_the_api_test_detects_a_server_of_another_kind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")

        thread = threading.Thread(target=answer)
        thread.start()
        done = run_command("--api-test", "--port", str(listener.getsockname()[1]))
        thread.join()
    assert done.returncode == 1 and "is not llm_inference" in done.stderr and "Traceback" not in done.stderr
    with Stand("vllm", api_keys=("k",)) as stand:
        done = run_command("--api-test", "--base-url", stand.url)
    assert done.returncode == 1 and "--api-key" in done.stderr


@pytest.mark.parametrize("engine_type", ["auto", "vllm", "llamacpp"])
def test_an_unknown_option_is_refused_at_once(engine_type: str) -> None:
    with pytest.raises(product.InvalidRequest, match="did you mean 'model_name'"):
        product.LLMInferencer(engine_type, model="x")
    with pytest.raises(product.InvalidRequest, match="did you mean 'base_url'"):
        product.LLMInferencer(engine_type, base_ur="x")


def test_refused_requests_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with Stand("vllm", api_keys=("right",)) as stand, caplog.at_level("INFO", "llm_inference"):
        stand.client.get("/v1/models%0Afaked", headers={"authorization": "Bearer wr0ng"})
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert lines == ["- '/v1/models\\nfaked' refused: unauthorized"]


def test_both_tries_are_counted(limited: Stand) -> None:
    def ask(*answers: str) -> tuple[int, float]:
        """(completion tokens in the answer, and as counted by /metrics)."""
        limited.engine.reset()
        said = iter(answers)
        limited.engine.answer = lambda ask: next(said)
        before = counted()
        reply = limited.post("/structured-generate", prompt="x", schema={"a": "integer"}).json()
        return reply["data"] and reply["data"]["usage"]["completion_tokens"], counted() - before

    def counted() -> float:
        labels = {"endpoint": "vllm", "engine": "vllm", "kind": "completion"}
        metrics = limited.gateway.metrics
        assert metrics is not None
        return metrics.registry.get_sample_value("llm_tokens_total", labels) or 0.0

    one, two, failed = ask('{"a": 1}'), ask("not JSON", '{"a": 1}'), ask("not JSON", "not JSON")
    limited.engine.reset()
    assert one[0] == one[1] < two[0] == two[1]
    assert failed[0] is None and failed[1] > 0


def test_a_busy_engine_that_does_not_list_its_models_answers_a_bare_name(
    limited: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,024 streams vLLM took 16 s to list its models, and answered chats."""
    limited.engine.reset()
    name = limited.engine.model
    assert limited.events(CHAT, model=name, messages=HI)[-1] == "[DONE]"
    brief = dataclasses.replace(product.Deadlines(), first_token=1.0, total=1.0)
    monkeypatch.setattr(product.Deadlines, "brief", lambda self: brief)
    monkeypatch.setattr(product.Endpoint, "LIST_TTL", 0.0)
    for _ in range(4):
        limited.engine.script(Reply(status=0, end="stall"), "/v1/models")
    reply = limited.post(CHAT, stream=True, model=name, messages=HI)
    assert reply.status_code == 200, reply.text


def test_usage_that_comes_before_the_last_burst_is_counted(limited: Stand, caplog: pytest.LogCaptureFixture) -> None:
    """On a GPU, a tenth of vLLM's streams have the usage in one segment and [DONE] in the next."""
    limited.engine.reset()
    text = {"index": 0, "delta": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
    events = [{"choices": [text]}, {"choices": [], "usage": usage}]
    common = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    pieces = [b"data: " + json.dumps(common | event, separators=(",", ":")).encode() + b"\n\n" for event in events]
    headers = {"content-type": "text/event-stream"}
    limited.engine.script(Reply(headers=headers, pieces=[*pieces, b"data: [DONE]\n\n"], chunked=True, gap=0.05))
    asked = {"model": limited.model, "messages": HI, "stream_options": {"include_usage": True}}

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if CHAT in record.getMessage()]

    with caplog.at_level("INFO", "llm_inference"):
        assert limited.events(CHAT, **asked)[-1] == "[DONE]"
        until(lines)  # written after the answer's last byte
    assert [line.rpartition(" ")[2] for line in lines()] == ["9+7"]


# ------------------------------------------------------------------------------ what a hostile reading found


def test_a_proxy_that_names_nobody_is_not_this_machine(port: int) -> None:
    """nginx's default: HTTP/1.0 towards us, our own address as Host, no forwarding header."""
    ask = b"GET /v1/models HTTP/1.%d\r\nhost: 127.0.0.1:%d\r\nconnection: close\r\n\r\n"
    for minor, status in ((1, b"200"), (0, b"401")):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(ask % (minor, port))
            with client.makefile("rb") as reply:
                assert reply.read().split()[1] == status


def test_an_empty_line_after_a_body_breaks_no_answer(port: int, limited: Stand) -> None:
    limited.engine.reset()
    limited.engine.pace = 0.05  # the stream takes longer than the 0.3 s for a header
    body = json.dumps({"messages": HI, "stream": True}).encode()
    head = (
        f"POST {product.API}/chat HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(head.encode() + body)
        said = client.recv(65536)
        client.sendall(b"\r\n")
        while b"[DONE]" not in said:
            said += client.recv(65536)
            assert b"HTTP/1.1 408" not in said
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in b"".join(iter(lambda: client.recv(65536), b""))
    limited.engine.reset()


def test_a_host_dependencys_background_tasks_run() -> None:
    ran = list[str]()

    def bill(tasks: BackgroundTasks) -> None:
        tasks.add_task(ran.append, "billed")

    with Stand("vllm") as stand:
        host = FastAPI()
        host.include_router(
            product.create_router(product.LLMInferencer("vllm", base_url=stand.engine.base_url)),
            dependencies=[Depends(bill)],
        )
        with TestClient(host) as client:
            assert client.post(f"{product.API}/generate", json={"prompt": "hi"}).status_code == 200
    assert ran == ["billed"]


def test_an_error_of_the_host_is_not_the_callers() -> None:
    def mistaken() -> None:
        TypeAdapter(int).validate_python("x")

    host = FastAPI()
    host.include_router(
        product.create_router(product.LLMInferencer("vllm", base_url="http://127.0.0.1:9")),
        dependencies=[Depends(mistaken)],
    )
    with TestClient(host, raise_server_exceptions=False) as client:
        assert client.post(f"{product.API}/generate", json={"prompt": "hi"}).status_code == 500


@pytest.mark.parametrize(
    "field", [{"structured_outputs": {"json": '{"$ref": "http://evil/x"}'}}, {"structured_outputs": "x"}]
)
def test_a_schema_given_as_a_string_is_not_passed_on_unchecked(limited: Stand, field: dict[str, Any]) -> None:
    limited.engine.reset()
    refused_v1(limited.post(CHAT, model="m", messages=HI, **field), "invalid_request")
    assert not limited.engine.bodies


def test_an_alias_is_not_put_before_the_engine_that_is_named() -> None:
    with Stand("vllm", aliases={"fast": "vllm/m"}) as stand:
        refused(stand.post("/chat", messages=HI, engine_type="olama", model_name="fast"), "unknown_engine")
        refused(stand.post("/chat", messages=HI, engine_type="vllm", model_name="fast"), "model_not_found")
        assert stand.post("/chat", messages=HI, model_name="fast").status_code == 200


def test_the_text_of_an_answer_may_contain_done(limited: Stand) -> None:
    limited.engine.reset()
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    said = [
        {"delta": {"content": "It ends with data: [DONE] as its last line."}, "finish_reason": None},
        {"delta": {}, "finish_reason": "stop"},
    ]
    pieces = [b"data: " + json.dumps(chunk | {"choices": [{"index": 0, **part}]}).encode() + b"\n\n" for part in said]
    limited.engine.script(
        Reply(headers={"content-type": "text/event-stream"}, pieces=[*pieces, b"data: [DONE]\n\n"], gap=0.05)
    )
    assert limited.events(CHAT, model="m", messages=HI)[-1] == "[DONE]"


def test_ollama_takes_its_own_message_back_and_refuses_logprobs_of_a_prompt() -> None:
    with Stand("ollama") as stand:
        back = [
            *HI,
            {"role": "assistant", "content": "x", "reasoning": "hm", "refusal": None},
            {"role": "user", "content": "and?"},
        ]
        assert stand.post(CHAT, model="m", messages=back).status_code == 200
        refused_v1(stand.post("/v1/completions", model="m", prompt="x", logprobs=True), "unsupported_feature")
        stand.engine.capabilities.append("embedding")
        assert stand.post("/v1/embeddings", model="m", input="x", user="u").headers["x-ignored-fields"] == "user"


@pytest.mark.parametrize("usage", [{"completion_tokens": 3}, "x"])
def test_a_malformed_complete_answer_is_the_engines_error(limited: Stand, usage: Any) -> None:
    limited.engine.reset()
    answer = {
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
        "usage": usage,
    }
    limited.engine.script(Reply(headers={"content-type": "application/json"}, pieces=[json.dumps(answer).encode()]))
    refused_v1(limited.post(CHAT, model="m", messages=HI), "bad_engine_reply")


def test_one_busy_engine_does_not_hide_the_others() -> None:
    with Stand("vllm") as stand:
        until(lambda: stand.client.get("/ready").status_code == 200)
        for path in ("/tokenize", CHAT):
            stand.engine.script(
                Reply(
                    status=503,
                    headers={"content-type": "application/json"},
                    pieces=[b'{"error": {"message": "overloaded"}}'],
                ),
                path,
            )
        reported = stand.client.get(f"{product.API}/engines").json()
    assert (
        reported["code"] == 200
        and next(engine for engine in reported["data"] if engine["engine_type"] == "vllm")["error"]
    )


def test_more_answers_than_a_request_may_ask_for(limited: Stand) -> None:
    limited.engine.reset()
    refused_v1(limited.post("/v1/completions", model="m", prompt=["x"] * 65, n=2), "invalid_request")
    refused_v1(limited.post("/v1/completions", model="m", prompt=["x"] * 129), "invalid_request")
    assert not limited.engine.bodies


def test_a_signal_while_a_worker_is_started_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
import functools, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import llm_inference
from multiprocessing.context import SpawnProcess
start = SpawnProcess.start
def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)  # before there is a process to be told
    start(self)
SpawnProcess.start = signalled
if __name__ == "__main__":
    llm_inference.supervise(functools.partial(time.sleep, 60), 1)
    print("over")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "over\n", done.stderr


def test_the_keeper_starts_nothing_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeEngine("vllm") as engine:
        settings = product.Settings(engine="vllm", base_url=engine.base_url)
        reached, closing = list[bool](), threading.Event()
        connect, close = product.VLLMAdapter.connect, product.VLLMAdapter.close

        async def counted(self: Any) -> None:
            if self.base_url == engine.base_url:  # others' engines are watched meanwhile
                reached.append(closing.is_set())
            await connect(self)

        async def slowly(self: Any) -> None:
            if self.base_url == engine.base_url:
                closing.set()
            await close(self)
            await asyncio.sleep(1.5)

        monkeypatch.setattr(product.VLLMAdapter, "connect", counted)
        monkeypatch.setattr(product.VLLMAdapter, "close", slowly)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            with product.sharing(settings, 2):
                until(lambda: len(reached) > 3, 20)
        assert not any(reached)


def test_workers_share_all_addresses_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with FakeEngine("vllm") as one, FakeEngine("vllm") as two:
        settings = product.Settings(engine="vllm", base_url=f"{one.base_url}, {two.base_url}", engine_api_key="k")
        with product.sharing(settings, 2) as shared:
            found = shared.inferencer().candidates()
    assert [(each.adapter.base_url, each.adapter.api_key) for each in found] == [
        (one.base_url, "k"),
        (two.base_url, "k"),
    ]


def test_a_replica_that_is_down_keeps_no_worker_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with FakeEngine("vllm") as one:
        settings = product.Settings(engine="vllm", base_url=f"{one.base_url},http://127.0.0.1:9")
        with product.sharing(settings, 2) as shared:
            assert shared.base_url == settings.base_url
