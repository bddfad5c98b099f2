"""The fake engine answers as the recorded real ones did, to the byte and to the key."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import CHAT, DIALECTS, OPENAI_DIALECTS, TEXT, WIRE, Dialect, FakeEngine, Reply, recorded

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "你好"}], "stream": False, **more}


def call(
    engine: FakeEngine, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", engine.port, timeout=5)) as client:
        client.request(method, path, json.dumps(body) if body is not None else None, headers)
        with client.getresponse() as answer:
            return answer.status, answer.headers, answer.read()


def post(engine: FakeEngine, body: object, path: str = "") -> Any:
    return json.loads(call(engine, "POST", path or CHAT[engine.dialect], body)[2])


def events(raw: bytes) -> list[Any]:
    """The objects of an NDJSON or event stream; the [DONE] of the latter must be there."""
    text = raw.decode()
    if not text.startswith("data: "):
        return [json.loads(line) for line in text.splitlines()]
    *chunks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def stream(engine: FakeEngine, path: str = "", **more: Any) -> list[Any]:
    return events(call(engine, "POST", path or CHAT[engine.dialect], ask(**{"stream": True, **more}))[2])


def shape(value: Any) -> Any:
    """Keys alone; a list is the shape of its first entry."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value[:1]] if isinstance(value, list) else None


def body_of(dialect: Dialect, name: str) -> Any:
    return json.loads(b"".join(recorded(dialect, name).pieces))


WHOLE: list[tuple[Dialect, str, str, dict[str, Any]]] = [
    ("ollama", "06_chat_nonstream", "/api/chat", {}),
    ("vllm", "chat", "/v1/chat/completions", {}),
    ("ollama", "08_tools_nonstream", "/api/chat", {"tools": [TOOL], "tool_choice": "required"}),
    ("vllm", "hermes_required", "/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
    ("sglang", "tools_qwen_required_strict", "/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
    ("sglang", "chat", "/v1/chat/completions", {}),
    ("llamacpp", "post_v1_chat_completions", "/v1/chat/completions", {}),
    ("ollama", "13_embed_ok_list", "/api/embed", {"input": ["a", "b"]}),
    ("vllm", "completions", "/v1/completions", {"prompt": "x"}),
    ("sglang", "completions", "/v1/completions", {"prompt": "x"}),
    ("llamacpp", "post_v1_completions", "/v1/completions", {"prompt": "x"}),
    ("ollama", "09_chat_unknown_model", "/api/chat", {"model": "nosuch:1b"}),
    ("vllm", "err_wrong_model", "/v1/chat/completions", {"model": "x"}),
]


@pytest.mark.parametrize(("dialect", "name", "path", "more"), WHOLE)
def test_complete_answers_have_the_recorded_keys(dialect: Dialect, name: str, path: str, more: dict[str, Any]) -> None:
    with FakeEngine(dialect) as engine:
        status, _, raw = call(engine, "POST", path, ask(**more))
        assert (status, shape(json.loads(raw))) == (recorded(dialect, name).status, shape(body_of(dialect, name)))


STREAMS: list[tuple[Dialect, str, str, dict[str, Any]]] = [
    ("ollama", "06_chat_stream", "/api/chat", {}),
    ("vllm", "chat_stream", "/v1/chat/completions", {"max_tokens": 5}),
    ("ollama", "08_tools_stream", "/api/chat", {"tools": [TOOL], "tool_choice": "required"}),
    ("vllm", "chat_stream_usage", "/v1/chat/completions", {"stream_options": {"include_usage": True}}),
    (
        "vllm",
        "hermes_required_stream",
        "/v1/chat/completions",
        {"tools": [TOOL], "tool_choice": "required", "stream_options": {"include_usage": True}},
    ),
    (
        "vllm",
        "completions_stream",
        "/v1/completions",
        {"prompt": "x", "max_tokens": 5, "stream_options": {"include_usage": True}},
    ),
    ("sglang", "chat_stream", "/v1/chat/completions", {}),
    ("sglang", "chat_stream_usage", "/v1/chat/completions", {"stream_options": {"include_usage": True}}),
    ("sglang", "completions_stream", "/v1/completions", {"prompt": "x", "max_tokens": 5}),
    ("llamacpp", "chat_stream", "/v1/chat/completions", {}),
    ("llamacpp", "chat_stream_usage", "/v1/chat/completions", {"stream_options": {"include_usage": True}}),
]


@pytest.mark.parametrize(("dialect", "name", "path", "more"), STREAMS)
def test_streams_have_the_recorded_keys(dialect: Dialect, name: str, path: str, more: dict[str, Any]) -> None:
    with FakeEngine(dialect) as engine:
        ours = [shape(event) for event in stream(engine, path, **more)]
        theirs = [shape(event) for event in events(b"".join(recorded(dialect, name).pieces))]
        assert (ours[0], ours[1], ours[-2], ours[-1]) == (theirs[0], theirs[1], theirs[-2], theirs[-1])
        assert {json.dumps(each, sort_keys=True) for each in ours} == {
            json.dumps(each, sort_keys=True) for each in theirs
        }


INFO: list[tuple[Dialect, str, str]] = [
    ("ollama", "02_tags", "/api/tags"),
    ("ollama", "04_ps_loaded", "/api/ps"),
    ("ollama", "01_version", "/api/version"),
    ("vllm", "get_version", "/version"),
    ("vllm", "get_v1_models", "/v1/models"),
    ("vllm", "get_nope", "/nope"),
    ("sglang", "get_model_info", "/model_info"),
    ("sglang", "get_v1_models", "/v1/models"),
    ("sglang", "get_version", "/version"),
    ("llamacpp", "get_props", "/props"),
    ("llamacpp", "get_v1_models", "/v1/models"),
    ("llamacpp", "get_health", "/health"),
]


@pytest.mark.parametrize(("dialect", "name", "path"), INFO)
def test_information_has_the_recorded_keys(dialect: Dialect, name: str, path: str) -> None:
    with FakeEngine(dialect) as engine:
        status, headers, raw = call(engine, "GET", path)
        assert (status, shape(json.loads(raw))) == (recorded(dialect, name).status, shape(body_of(dialect, name)))
        assert headers["content-type"] == recorded(dialect, name).headers["content-type"]


def test_every_recording_replays_to_the_byte() -> None:
    for dialect in DIALECTS:
        with FakeEngine(dialect) as engine:
            for path in sorted((WIRE / dialect).glob("*.json")):
                full = json.loads(path.read_bytes())
                answer = full.get("response") or full
                text = answer.get("body_text", answer.get("body"))
                if not isinstance(text, str) or answer["status"] == 204 or full["request"]["method"] == "HEAD":
                    continue
                named = re.search(r'"model": ?"([^"]*)"', text)
                engine.model = named[1] if named else engine.model  # a replay names the model of its own engine
                engine.replay(path.stem)
                if not answer.get("terminating_zero_chunk", True):
                    with pytest.raises(http.client.IncompleteRead):
                        call(engine, "POST", "/", {})
                    continue
                status, headers, raw = call(engine, "POST", "/", {})
                assert (status, raw) == (answer["status"], text.encode()), path
                chunked = any(name.lower() == "transfer-encoding" for name, _ in answer["headers"])
                assert (headers.get("transfer-encoding") == "chunked") == chunked, path
                engine.requests.clear()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_text_reasoning_tools_and_length(dialect: Dialect) -> None:
    field = {"ollama": "thinking", "vllm": "reasoning"}.get(dialect, "reasoning_content")
    with FakeEngine(dialect) as engine:

        def said(events: list[Any], key: str) -> str:
            parts = [event["message"] if dialect == "ollama" else event["choices"][0]["delta"] for event in events]
            return "".join(part.get(key) or "" for part in parts)

        assert 7 <= len(stream(engine)) <= 14
        assert said(stream(engine), "content") == TEXT
        engine.reasoning, engine.answer = "let me see 🤔", lambda request: f'{{"n": {len(request["messages"])}}}'
        for engine.slice in (0, 3):
            assert said(stream(engine), field) == "let me see 🤔"
            assert said(stream(engine), "content") == '{"n": 1}'
        full = post(engine, ask())
        message = full["message"] if dialect == "ollama" else full["choices"][0]["message"]
        assert (message[field], message["content"]) == ("let me see 🤔", '{"n": 1}')

        short: dict[str, Any] = {"options": {"num_predict": 2}} if dialect == "ollama" else {"max_tokens": 2}
        last = [stream(engine, **short)[-1], post(engine, ask(**short))]
        reasons = [each["done_reason"] if dialect == "ollama" else each["choices"][0]["finish_reason"] for each in last]
        assert reasons == ["length", "length"]

        engine.tool_call, engine.reasoning = ("get_weather", {"city": "北京", "days": 3}), ""
        if dialect == "ollama":
            assert said(stream(engine, tools=[TOOL]), "content") == ""
            assert (
                post(engine, ask(tools=[TOOL]))["message"]["tool_calls"][0]["function"]["arguments"]
                == engine.tool_call[1]
            )
            return
        full = post(engine, ask(tools=[TOOL]))["choices"][0]
        assert full["finish_reason"] == "tool_calls"
        assert json.loads(full["message"]["tool_calls"][0]["function"]["arguments"]) == engine.tool_call[1]
        deltas = [event["choices"][0]["delta"].get("tool_calls") for event in stream(engine, tools=[TOOL])]
        fragments = [delta[0]["function"].get("arguments") or "" for delta in deltas if delta]
        assert len(fragments) > 3
        assert json.loads("".join(fragments)) == engine.tool_call[1]


@pytest.mark.parametrize(
    ("dialect", "streamed"),
    [*((dialect, True) for dialect in DIALECTS), ("ollama", False), ("vllm", False)],
)
def test_a_generation_stops_when_its_client_hangs_up(dialect: Dialect, streamed: bool) -> None:
    with FakeEngine(dialect) as engine:
        engine.pace = 0.2
        with hanging_up(engine, streamed):
            assert (engine.begun, engine.finished, engine.cut, engine.connections) == (1, 0, 0, 1)
        engine.wait(lambda: engine.live == 0, timeout=0.15)  # sooner than the next piece
        assert (engine.begun, engine.finished, engine.cut) == (1, 0, 1)
        engine.wait(lambda: engine.connections == 0)
        engine.pace = 0
        post(engine, ask())
        assert (engine.begun, engine.finished, engine.cut) == (2, 1, 1)


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_a_complete_answer_is_finished_after_the_client_has_hung_up(dialect: Dialect) -> None:
    with FakeEngine(dialect) as engine:
        engine.pace = 0.05
        with hanging_up(engine, streamed=False):
            pass
        engine.wait(lambda: engine.connections == 0)
        assert (engine.begun, engine.live, engine.finished, engine.cut) == (1, 1, 0, 0)
        engine.wait(lambda: engine.live == 0)
        assert (engine.finished, engine.cut) == (1, 0)


@pytest.mark.parametrize("end", ["reset", "stop"])
def test_a_reset_or_stopped_engine_works_on_nothing(end: str) -> None:
    with FakeEngine("llamacpp") as engine:
        engine.pace = 60.0
        with hanging_up(engine, streamed=False):
            pass
        engine.wait(lambda: engine.connections == 0)
        assert engine.live == 1
        getattr(engine, end)()
        assert (engine.live, engine.finished, engine.cut) == (0, 0, 1)


@contextmanager
def hanging_up(engine: FakeEngine, streamed: bool) -> Iterator[None]:
    """A client that hangs up at the end of the block; before it, its generation runs."""
    client = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=5)
    client.request("POST", engine.chat, json.dumps(ask(stream=streamed)))
    engine.wait(lambda: engine.live == 1)
    if streamed:
        client.getresponse().read(20)
    yield
    client.sock.shutdown(socket.SHUT_RDWR)
    client.close()


def test_ends_of_a_script() -> None:
    with FakeEngine("vllm") as engine:
        for end, error in (("reset", ConnectionResetError), ("eof", http.client.IncompleteRead)):
            engine.script(Reply(pieces=[b"data: 1\n\n", b"data: 2"], end=end))  # type: ignore[arg-type]
            with pytest.raises(error):
                call(engine, "POST", "/", {})
        engine.replay("kill9_enginecore_midstream")
        assert b'"code": 500}}\n\ndata: [DONE]' in call(engine, "POST", "/", {})[2]
        engine.script(Reply(status=0))  # no answer at all
        with pytest.raises(http.client.RemoteDisconnected):
            call(engine, "POST", "/", {})
        engine.script(Reply(pieces=[b"to the end"], chunked=False, end="eof"))
        assert call(engine, "POST", "/", {})[2] == b"to the end"
        engine.script(Reply(status=503, headers={"Retry-After": "7"}), path="/health")
        status, headers, _ = call(engine, "GET", "/health")
        assert (status, headers["retry-after"], engine.begun) == (503, "7", 5)

        engine.script(Reply(pieces=[b"x"], end="stall"))
        client = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=0.2)
        client.request("POST", "/", "{}")
        answer = client.getresponse()
        assert answer.read(1) == b"x"
        with pytest.raises(TimeoutError):
            answer.read(1)
        assert engine.live == 1
        client.close()
        answer.close()
        engine.wait(lambda: engine.live == 0 and engine.cut == 1)


def test_connections_are_kept_and_bodies_may_be_chunked() -> None:
    with FakeEngine("sglang", model="served") as engine:
        client = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=5)
        for _ in range(3):
            client.request(
                "POST",
                "/v1/chat/completions",
                iter([b'{"messages":', b'[{"role":"user","content":"x"}],"model":"other"}']),
                {"X-Mine": "1"},
                encode_chunked=True,
            )
            assert json.loads(client.getresponse().read())["model"] == "other"
        client.request("GET", "/health?now")
        assert client.getresponse().read() == b""
        assert (engine.connections, len(engine.requests)) == (1, 4)
        assert (engine.requests[0].headers["x-mine"], engine.requests[0].json["model"]) == ("1", "other")
        client.close()


def test_keys_sockets_restarts_and_nothing_left_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    for dialect in OPENAI_DIALECTS:
        with FakeEngine(dialect) as engine:
            engine.api_key = "k"
            assert call(engine, "POST", CHAT[dialect], ask())[0] == 401
            assert call(engine, "POST", CHAT[dialect], ask(), Authorization="Bearer k")[0] == 200
            assert call(engine, "GET", "/health")[0] == 200
            port = engine.port
            engine.stop()
            with pytest.raises(ConnectionRefusedError):
                call(engine, "GET", "/health")
            engine.start()
            assert (engine.port, call(engine, "GET", "/health")[0]) == (port, 200)
    with FakeEngine("llamacpp", uds=str(tmp_path / "x.sock")) as engine:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "x.sock"))
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert client.recv(9999).endswith(b'{"status":"ok"}')
        client.close()
    assert threading.active_count() == before
    assert not (tmp_path / "x.sock").exists()


def test_ollama_pulls_and_shows() -> None:
    with FakeEngine("ollama") as engine:
        assert call(engine, "GET", "/")[2] == b"Ollama is running"
        assert post(engine, {"model": "new:1b"}, "/api/show")["error"] == "model 'new:1b' not found"
        lines = events(call(engine, "POST", "/api/pull", {"model": "new:1b"})[2])
        assert (lines[0], lines[-1]) == ({"status": "pulling manifest"}, {"status": "success"})
        assert post(engine, {"model": "new:1b"}, "/api/show")["capabilities"] == ["completion", "tools"]
        engine.capabilities = ["completion"]
        assert "does not support tools" in post(engine, ask(tools=[TOOL]))["error"]


def test_no_recording_names_a_place_or_a_secret() -> None:
    for path in WIRE.rglob("*.json"):
        text = path.read_text()
        assert not any(word in text for word in ("/home/", "/root/", "/tmp/", "/work/", "pypi", "hf_", "sk-")), path
        assert len(text) < 20_000, path
