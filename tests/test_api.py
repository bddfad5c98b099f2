"""The HTTP API over real sockets: envelope, validation, streams, limits, access."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import pytest

import llm_inference as product
from tests.fake_engine import DIALECTS, TEXT, Dialect, FakeEngine, Reply
from tests.harness import (
    API,
    BROKEN,
    KINDS,
    SOON,
    Command,
    Stand,
    enveloped,
    good,
    hang_up,
    no_error_stays,
    payloads,
    refused,
    refused_v1,
    run_command,
    serving,
    until,
)
from tests.processes import ROOT, descendants, free_port, neutral_environment

pytestmark = pytest.mark.usefixtures("alone")

MARK = "x-nobody-may-echo-this-x"
ROUTES = ("/generate", "/chat", "/structured-generate")
CITY = {"city": "string", "population": "number"}
PARIS = {"city": "Paris", "population": 2.1}
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def body_of(route: str, **more: Any) -> dict[str, Any]:
    words: dict[str, Any] = {"messages": HI} if route == "/chat" else {"prompt": "hi"}
    return words | ({"schema": CITY} if route == "/structured-generate" else {}) | more


def answers_json(stand: Stand, value: Any = PARIS) -> None:
    stand.engine.answer = lambda ask: json.dumps(value)


# ----------------------------------------------------------------------------------------------- the three routes


def test_generate_answers(stand: Stand) -> None:
    data = good(stand.post("/generate", prompt="hi", max_tokens=64))
    assert set(data) == {"text", "finish_reason", "usage", "engine_type", "model_name", "timing"}
    assert (data["text"], data["finish_reason"], data["engine_type"]) == (TEXT, "stop", stand.engine.dialect)
    assert set(data["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert data["usage"]["total_tokens"] == data["usage"]["prompt_tokens"] + data["usage"]["completion_tokens"] > 0
    assert set(data["timing"]) == {"ttft", "total", "tokens_per_second"} and data["timing"]["total"] > 0


def test_generate_is_chat_with_one_user_message(stand: Stand) -> None:
    good(stand.post("/generate", prompt="hi"))
    good(stand.post("/chat", messages=HI))
    one, other = stand.engine.bodies
    assert one == other and one["messages"] == HI


def test_chat_adds_the_message(stand: Stand) -> None:
    data = good(stand.post("/chat", messages=HI))
    assert data["message"] == {"role": "assistant", "content": TEXT} and data["text"] == TEXT


def test_structured_generate_adds_the_checked_result(stand: Stand) -> None:
    answers_json(stand)
    data = good(stand.post("/structured-generate", prompt="hi", schema=CITY))
    assert data["result"] == PARIS and data["enforced_by"] == "engine"
    assert good(stand.post("/structured-generate", messages=HI, schema=CITY))["result"] == PARIS


def test_structured_generate_without_a_schema_means_any_object(stand: Stand) -> None:
    answers_json(stand, {"a": [1]})
    assert good(stand.post("/structured-generate", prompt="hi"))["result"] == {"a": [1]}


def test_choice_is_a_constraint_of_every_engine(stand: Stand) -> None:
    stand.engine.answer = lambda ask: '"yes"' if stand.engine.dialect == "ollama" else "yes"
    assert good(stand.post("/structured-generate", prompt="hi", choice=["yes", "no"]))["result"] == "yes"


@pytest.mark.parametrize("route", ROUTES)
def test_the_real_embedded_engine_answers_complete_and_streamed(real: httpx.Client, route: str) -> None:
    body = body_of(route, max_tokens=60 if route == "/structured-generate" else 16, temperature=0, seed=1)
    data = good(real.post(API + route, json=body))
    assert data["text"] and data["usage"]["completion_tokens"] > 0 and data["engine_type"] == "llamacpp"
    events = payloads(real.post(API + route, json={**body, "stream": True}))
    last = check_stream(events)
    assert "".join(e["data"].get("delta", "") for e in events[:-1]) == data["text"]
    if route == "/structured-generate":
        assert last["result"] == data["result"] == json.loads(data["text"])


# ----------------------------------------------------------------------------------------------- streams


def check_stream(events: list[Any]) -> dict[str, Any]:
    """The law of a streamed answer; the last event's data."""
    *items, done = events
    assert done == "[DONE]" and items
    for item in items:
        assert enveloped(item)["code"] == 200 and item["msg"] == "success"
    assert len({item["request_id"] for item in items}) == 1
    assert ["finish_reason" in item["data"] for item in items] == [False] * (len(items) - 1) + [True]
    last: dict[str, Any] = items[-1]["data"]
    assert {"usage", "timing"} <= set(last) and set(last["usage"]) == {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
    }
    for item in items[:-1]:
        assert set(item["data"]) <= {"delta", "reasoning_delta", "tool_call_delta", "logprobs"} and item["data"]
    return last


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_is_envelopes_then_done(stand: Stand, route: str) -> None:
    if route == "/structured-generate":
        answers_json(stand)
    events = stand.events(route, **body_of(route))
    last = check_stream(events)
    full = good(stand.post(route, **body_of(route)))
    assert "".join(e["data"].get("delta", "") for e in events[:-1]) == full["text"]
    assert (last["finish_reason"], last["usage"]) == (full["finish_reason"], full["usage"])
    assert ("result" in last) == (route == "/structured-generate")
    if route == "/structured-generate":
        assert last["result"] == PARIS


def test_bytes_that_arrive_one_by_one_make_the_same_stream(stand: Stand) -> None:
    stand.engine.text = "a\u2028b \u0085 北京 🚲 end"
    full = good(stand.post("/generate", prompt="hi"))["text"]
    stand.engine.slice = 1
    events = stand.events("/generate", prompt="hi")
    check_stream(events)
    assert "".join(e["data"].get("delta", "") for e in events[:-1]) == full == stand.engine.text


def test_a_cut_answer_says_so(stand: Stand) -> None:
    assert good(stand.post("/generate", prompt="hi", max_tokens=2))["finish_reason"] == "length"
    assert check_stream(stand.events("/generate", prompt="hi", max_tokens=2))["finish_reason"] == "length"


def test_reasoning_comes_under_its_own_name() -> None:
    for dialect in ("ollama", "vllm", "sglang", "llamacpp"):
        with Stand(dialect, reasoning="let me think") as stand:
            data = good(stand.post("/chat", messages=HI))
            assert (data["reasoning"], data["text"], data["message"]["content"]) == ("let me think", TEXT, TEXT)
            events = stand.events("/chat", messages=HI)
            check_stream(events)
            assert "".join(e["data"].get("reasoning_delta", "") for e in events[:-1]) == "let me think"
            assert "".join(e["data"].get("delta", "") for e in events[:-1]) == TEXT


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_tool_calls_complete_and_streamed(stand: Stand) -> None:
    stand.engine.tool_call = ("get_weather", {"city": "巴黎"})
    data = good(stand.post("/chat", messages=HI, tools=[TOOL]))
    (call,) = data["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "巴黎"})
    assert (
        data["finish_reason"] == "tool_calls"
        and data["message"]["tool_calls"] == data["tool_calls"]
        and data["text"] == ""
    )
    events = stand.events("/chat", messages=HI, tools=[TOOL])
    assert check_stream(events)["finish_reason"] == "tool_calls"
    deltas = [each for e in events[:-1] for each in e["data"].get("tool_call_delta", ())]
    assert json.loads("".join(d["function"].get("arguments") or "" for d in deltas)) == {"city": "巴黎"}


@pytest.mark.parametrize("end", ["eof", "reset"])
def test_a_late_failure_is_an_envelope_and_no_done(stand: Stand, end: Any) -> None:
    first = (
        stand.engine._native(True, {"model": "m", "messages": HI})
        if stand.engine.dialect == "ollama"
        else stand.engine._openai(True, {"messages": HI, "stream": True})
    )
    stand.engine.script(Reply(headers=first.headers, pieces=first.pieces[:4], end=end, gap=0.05))
    events = payloads(stand.post("/chat", messages=HI, stream=True))
    *before, last = events
    assert "[DONE]" not in events and before and not any("finish_reason" in e["data"] for e in before)
    assert enveloped(last)["code"] == 500 and last["data"] is None and last["msg"].startswith("bad_engine_reply: ")
    assert last["request_id"] == before[0]["request_id"]


def test_a_streamed_answer_that_does_not_fit_ends_as_an_error(stand: Stand) -> None:
    answers_json(stand, {"city": 7})
    stand.engine.pace = 0.05  # an answer that has come as one piece is refused before the stream begins
    events = payloads(stand.post("/structured-generate", prompt="hi", schema=CITY, stream=True))
    assert "[DONE]" not in events and enveloped(events[-1])["code"] == 500
    assert events[-1]["msg"].startswith("structured_output_invalid: ") and events[-1]["data"] is None


def test_a_complete_answer_that_does_not_fit_is_asked_for_once_more(stand: Stand) -> None:
    answers_json(stand, {"city": 7})
    refused(stand.post("/structured-generate", prompt="hi", schema=CITY), "structured_output_invalid")
    assert len(stand.engine.bodies) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_early_failure_has_its_real_status(stand: Stand, stream: bool) -> None:
    assert "did you mean" in refused(
        stand.post("/chat", messages=HI, stream=stream, engine_type="vlm"), "unknown_engine"
    )
    stand.engine.script(
        Reply(status=500, headers={"content-type": "application/json"}, pieces=[b'{"error":"CUDA out of memory"}'])
    )
    refused(stand.post("/chat", messages=HI, stream=stream), "out_of_memory")
    stand.engine.script(
        Reply(
            status=503, headers={"content-type": "application/json"}, pieces=[b'{"error":"maximum pending requests"}']
        )
    )
    assert refused(stand.post("/chat", messages=HI, stream=stream), "engine_overloaded")
    stand.engine.script(Reply(pieces=[b"<html>hello</html>"], headers={"content-type": "text/html"}))
    refused(stand.post("/chat", messages=HI, stream=stream), "bad_engine_reply")
    stand.engine.script(Reply(status=302, headers={"location": "http://127.0.0.1:9/"}))
    refused(stand.post("/chat", messages=HI, stream=stream), "bad_engine_reply")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_not_there(stand: Stand, stream: bool) -> None:
    message = refused(stand.post("/chat", messages=HI, stream=stream, model_name="nope"), "model_not_found")
    assert "nope" in message and "m" in message.partition("nope")[2]  # what is there
    assert stand.engine.live == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_went_away(stream: bool) -> None:
    with Stand("vllm") as stand:
        stand.engine.stop()
        assert "start it" in refused(stand.post("/chat", messages=HI, stream=stream), "engine_unavailable")
        stand.engine.start()
        assert stand.post("/chat", messages=HI, stream=stream).status_code == 200


def test_silence_is_filled_with_comments(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "KEEP_ALIVE_COMMENT", 0.03)
    stand.engine.pace, stand.engine.text = 0.1, "a b"
    reply = stand.post("/chat", messages=HI, stream=True)
    check_stream(payloads(reply))
    assert reply.text.count(": keep-alive\n\n") >= 2
    reply = stand.post("/v1/chat/completions", model=stand.model, messages=HI, stream=True)
    assert reply.text.count(": keep-alive\n\n") >= 2 and reply.text.endswith("data: [DONE]\n\n")


def test_an_answer_that_begins_with_nothing_to_show_is_no_client_that_does_not_read(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first event of an engine often has the role alone, of which our own stream shows nothing."""
    limits = product.Deadlines(idle=0.2)  # of the client; the engine keeps its own
    monkeypatch.setattr(stand.gateway, "settings", dataclasses.replace(stand.gateway.settings, deadlines=limits))
    stand.engine.pace, stand.engine.text = 0.6, "a b"
    check_stream(payloads(stand.post("/chat", messages=HI, stream=True)))


# ----------------------------------------------------------------------------------------------- envelope and status


def test_every_answer_is_an_envelope(vllm: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/nope", API, f"{API}/nope", f"{API}/generate/x", "/api/v1"):
        message = refused(vllm.client.get(path), "not_found")
        assert "; " in message, "what to do is missing"
    for method, path in (
        ("GET", "/generate"),
        ("GET", "/generate/"),
        ("PUT", "/chat"),
        ("DELETE", "/structured-generate"),
        ("POST", "/engines"),
        ("PATCH", "/models"),
    ):
        reply = vllm.client.request(method, API + path)
        refused(reply, "method_not_allowed")
        assert reply.headers["allow"]
    for path in ("/engines", "/models"):
        good(vllm.client.get(API + path))

    def broken(*_: Any) -> Any:
        raise RuntimeError(MARK)

    monkeypatch.setattr(vllm.gateway, "engines", broken)
    monkeypatch.setattr(vllm.gateway, "route", broken)
    for reply in (
        vllm.client.get(API + "/engines"),
        vllm.post("/chat", messages=HI),
        vllm.post("/chat", messages=HI, stream=True),
    ):
        assert MARK not in refused(reply, "internal_error")


def test_what_lies_outside_the_router_fails_in_an_envelope_too(vllm: Stand) -> None:
    assert vllm.app
    app = product.create_app(product.Settings(engine="vllm", base_url="http://127.0.0.1:9"))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError(MARK)

    with serving(app) as url:
        assert MARK not in refused(httpx.get(url + "/broken", trust_env=False), "internal_error")


STATUS = {
    "invalid_request": (400, 400, 400, "invalid_request_error"),
    "unsupported_feature": (400, 400, 400, "invalid_request_error"),
    "context_too_long": (400, 400, 400, "invalid_request_error"),
    "unknown_engine": (400, 400, 400, "invalid_request_error"),
    "model_not_found": (400, 400, 404, "not_found_error"),
    "payload_too_large": (400, 413, 413, None),
    "busy": (400, 429, 429, None),
    "unauthorized": (400, 401, 401, None),
    "engine_unavailable": (500, 500, 503, None),
    "engine_not_installed": (500, 500, 503, None),
    "engine_overloaded": (500, 500, 503, None),
    "engine_timeout": (500, 500, 504, None),
    "out_of_memory": (500, 500, 502, None),
    "bad_engine_reply": (500, 500, 502, None),
    "structured_output_invalid": (500, 500, 502, None),
    "internal_error": (500, 500, 500, None),
}


@pytest.mark.parametrize("kind", STATUS)
def test_the_table_of_errors(vllm: Stand, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    code, status, v1, of_type = STATUS[kind]

    def fails() -> None:
        raise KINDS[kind]("a reason", "a hint")

    monkeypatch.setattr(vllm.gateway, "refuse_full", fails)
    reply = vllm.post("/chat", messages=HI)
    assert (reply.status_code, reply.json()["code"], reply.json()["msg"]) == (status, code, f"{kind}: a reason; a hint")
    assert enveloped(reply.json()) and reply.headers["x-error-kind"] == kind
    reply = vllm.post("/v1/chat/completions", model="vllm/m", messages=HI)
    assert (reply.status_code, reply.headers["x-error-kind"]) == (v1, kind)
    assert of_type in (None, reply.json()["error"]["type"])


def test_the_request_id_is_in_the_header_too(vllm: Stand) -> None:
    for reply in (vllm.post("/chat", messages=HI), vllm.post("/chat")):
        assert reply.headers["x-request-id"] == reply.json()["request_id"]


def test_the_request_id_goes_on_to_the_engine(vllm: Stand) -> None:
    reply = vllm.post("/chat", messages=HI)
    assert vllm.engine.requests[-1].headers["x-request-id"] == reply.json()["request_id"]


@pytest.mark.parametrize(
    "given", ["6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "6F9619FF-8B86-4D01-B42D-00CF4FC964FF", MARK, ""]
)
def test_a_request_id_is_accepted_where_it_is_a_uuid(vllm: Stand, given: str) -> None:
    reply = vllm.client.post(API + "/chat", json={"messages": HI}, headers={"x-request-id": given})
    accepted = given.strip() if given == given.lower() and "-8b86-" in given else None
    assert (reply.json()["request_id"] == given.strip()) is bool(accepted)
    assert (
        vllm.engine.requests[-1].headers["x-request-id"]
        == reply.json()["request_id"]
        == enveloped(reply.json())["request_id"]
    )


# ----------------------------------------------------------------------------------------------- strict bodies

BAD: list[tuple[str, Any]] = [
    *(("max_tokens", bad) for bad in (0, -2, 1.5, True, "7", MARK, 10**18, 10**400, [], {})),
    *(("temperature", bad) for bad in (-0.1, 2.1, True, "1", MARK, [1])),
    *(("top_p", bad) for bad in (0, 1.1, "1", True)),
    *(("top_k", bad) for bad in (-2, 1.5, "1", True)),
    *(("min_p", bad) for bad in (-0.1, 1.1, MARK)),
    *(("stop", bad) for bad in ("", ["a"] * 5, [1], 7, [""], "x" * 300, {MARK: 1})),
    *(("seed", bad) for bad in (2**63, -(2**63) - 1, 1.5, "1", True)),
    *(("presence_penalty", bad) for bad in (-2.1, 2.1, MARK)),
    *(("frequency_penalty", bad) for bad in (-2.1, 2.1, MARK)),
    *(("repetition_penalty", bad) for bad in (0, 2.1, MARK)),
    *(("logprobs", bad) for bad in (1, "true", MARK)),
    *(("top_logprobs", bad) for bad in (-1, 21, 1.5, MARK)),
    *(
        ("tools", bad)
        for bad in (
            {},
            MARK,
            [MARK],
            [{"type": MARK}],
            [{"type": "function", "function": {"name": MARK + " !"}}],
            [{**TOOL, MARK: 1}],
        )
    ),
    *(("tool_choice", bad) for bad in (MARK, 1, {}, {"type": "function", "function": {MARK: 1}}, "required")),
    *(("think", bad) for bad in (MARK, 1, [])),
    *(("schema", bad) for bad in (MARK, [], 1, {"a": ["string", "number"]}, {"$ref": "http://127.0.0.1:9/" + MARK})),
    *(("choice", bad) for bad in ([], [1], MARK, [""])),
    *(("regex", bad) for bad in ("", 1, "(" + MARK, "(?=" + MARK + ")")),
    *(("grammar", bad) for bad in ("", 1)),
    *(("on_unsupported", bad) for bad in (MARK, 1)),
    *(("stream", bad) for bad in (1, "true", MARK)),
    *(("engine_type", bad) for bad in (1, "")),
    *(("model_name", bad) for bad in (1, "", MARK + "\r\nX: y", "x" * 1025)),
]


@pytest.mark.parametrize(("field", "bad"), BAD, ids=[f"{field}={str(bad)[:24]!r}" for field, bad in BAD])
def test_a_bad_field_is_named_and_never_echoed(vllm: Stand, field: str, bad: Any) -> None:
    reply = vllm.post("/generate", prompt=MARK, **{field: bad})
    assert reply.status_code == 400, reply.text
    message = refused(reply, reply.headers["x-error-kind"])
    assert field in message and MARK not in reply.text and len(message) < 600
    assert not vllm.engine.bodies


@pytest.mark.parametrize("long", ["x" * 300, "名" * 300, "\u202e" * 300])
def test_a_name_that_is_looked_up_is_repeated_in_part(vllm: Stand, long: str) -> None:
    """Names of engines, models and types: at most 100 characters of them, and nothing that is not printable."""
    for route, field in (
        ("/generate", {"engine_type": long}),
        ("/generate", {"model_name": long}),
        ("/structured-generate", {"schema": {"a": long}}),
    ):
        reply = vllm.post(route, prompt="hi", **field)
        assert reply.status_code == 400, reply.text
        message = refused(reply, reply.headers["x-error-kind"])
        assert message.count(long[0]) <= 105 and message.isprintable(), message
    assert not vllm.engine.bodies


NO_OPS: list[dict[str, Any]] = [
    {"top_k": 0}, {"top_k": -1}, {"top_p": 1}, {"min_p": 0}, {"stop": []}, {"tools": []}, {"tool_choice": "auto"},
    {"tool_choice": "none"}, {"max_tokens": -1}, {"repetition_penalty": 1.0}, {"presence_penalty": 0},
    {"logprobs": False}, {"think": False}, {"parallel_tool_calls": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", NO_OPS, ids=str)
def test_a_value_that_asks_for_nothing_passes_on_every_engine(stand: Stand, fields: dict[str, Any]) -> None:
    data = good(stand.post("/chat", messages=HI, **fields))
    assert data["text"] == TEXT and "ignored" not in data
    check_stream(stand.events("/chat", messages=HI, **fields))
    for name in ("stop", "tools", "tool_choice"):
        assert not any(body.get(name) for body in stand.engine.bodies)
    if "think" not in fields:
        reply = stand.post("/v1/chat/completions", model=stand.model, messages=HI, **fields)
        assert reply.status_code == 200 and "x-ignored-fields" not in reply.headers, reply.text


@pytest.mark.parametrize("seed", [-1, 2**31, 0])
def test_a_seed_is_passed_on(stand: Stand, seed: int) -> None:
    good(stand.post("/chat", messages=HI, seed=seed))
    (body,) = stand.engine.bodies
    assert (body.get("options") or body)["seed"] == seed


@pytest.mark.parametrize(
    ("field", "bad", "words"),
    [
        ("max_tokens", 0, "1"),
        ("max_tokens", 10**7, "1000000"),
        ("temperature", 2.1, "2"),
        ("temperature", -1, "0"),
        ("top_p", 1.5, "1"),
        ("seed", 2**63, str(2**63)),
        ("top_k", -2, "-1"),
        ("top_logprobs", 21, "20"),
        ("stop", ["a"] * 5, "4"),
        ("on_unsupported", "x", "ignore"),
        ("presence_penalty", 3, "2"),
    ],
)
def test_the_message_names_the_range(vllm: Stand, field: str, bad: Any, words: str) -> None:
    assert words in refused(vllm.post("/generate", prompt="hi", **{field: bad}), "invalid_request").partition(field)[2]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        MARK,
        {},
        [MARK],
        [{}],
        [{"role": "user"}, {"content": "x"}],
        [{"role": MARK, "content": "x"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": MARK}]}],
        [{"role": "user", "content": "x", MARK: 1}],
        [{"role": "user", "content": [{"type": "text", "text": 7}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/" + MARK}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/" + MARK}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": MARK}}]}],
    ],
    ids=lambda messages: str(messages)[:60],
)
def test_bad_messages_are_refused(vllm: Stand, messages: Any) -> None:
    reply = vllm.post("/chat", messages=messages)
    assert "messages" in refused(reply, "invalid_request") and MARK not in reply.text and not vllm.engine.bodies


@pytest.mark.parametrize(
    "schema",
    [
        {"type": {"a": 1}},
        {"type": ["string", 7]},
        {"type": "object", "properties": 7},
        {"type": "object", "properties": {"a": 7}},
        {"type": "object", "required": 7},
        {"type": "object", "required": [7]},
        {"enum": 7},
        {"enum": []},
        {"allOf": 7},
        {"anyOf": []},
        {"anyOf": [7]},
        {"$ref": 7},
        {"$ref": "#/$defs/a", "$defs": 7},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "object", "patternProperties": {"(": True}},
        {"type": "object", "patternProperties": 7},
        {"type": "string", "minLength": "x"},
        {"type": "string", "pattern": 7},
        {"type": "number", "minimum": "x"},
        {"type": "number", "multipleOf": 0},
        {"type": "array", "items": [{"type": "string"}]},
        {"type": "array", "items": 7},
        {"type": "array", "prefixItems": 7},
        {"type": "array", "minItems": {}},
        {"type": "object", "additionalProperties": 7},
        {"not": 7},
        {"if": 7},
        {"oneOf": [True, 7]},
        {"a": []},
        {"a": {}},
        {"a": None},
        {"a": 7},
        {"": "string"},
        {"type": "string", "title": 7},
    ],
    ids=lambda schema: json.dumps(schema)[:70],
)
def test_no_schema_breaks_us(vllm: Stand, schema: Any) -> None:
    """Refused, or kept to: never our own failure."""
    for answer in ('"text"', "1.5", "[1]", '{"a":1}'):
        vllm.engine.answer = lambda ask, answer=answer: answer  # type: ignore[misc]
        reply = vllm.post("/structured-generate", prompt="hi", schema=schema)
        assert reply.status_code == 200 or reply.headers["x-error-kind"] in (
            "invalid_request",
            "unsupported_feature",
            "structured_output_invalid",
        ), reply.text


def test_prompt_or_messages_is_required(vllm: Stand) -> None:
    assert "prompt" in refused(vllm.post("/generate"), "invalid_request")
    assert "prompt" in refused(vllm.post("/generate", prompt=""), "invalid_request")
    assert "prompt" in refused(vllm.post("/generate", prompt=["hi"]), "invalid_request")
    assert "prompt" in refused(vllm.post("/generate", prompt=None), "invalid_request")
    assert "messages" in refused(vllm.post("/chat"), "invalid_request")
    assert "messages" in refused(vllm.post("/generate", messages=HI, prompt="hi"), "invalid_request")
    assert "prompt" in refused(vllm.post("/chat", prompt="hi", messages=HI), "invalid_request")
    for neither_nor in ({}, {"prompt": "hi", "messages": HI}):
        assert "prompt" in refused(vllm.post("/structured-generate", **neither_nor), "invalid_request")


def test_null_means_not_given(vllm: Stand) -> None:
    nothing = dict.fromkeys(
        ("engine_type", "model_name", "max_tokens", "temperature", "stop", "schema", "tools", "seed")
    )
    good(vllm.post("/generate", prompt="hi", **nothing))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("modelname", "model_name"), ("strem", "stream")],
)
@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_field_is_refused_with_the_near_one(vllm: Stand, route: str, wrong: str, right: str) -> None:
    message = refused(vllm.post(route, **body_of(route), **{wrong: 1}), "invalid_request")
    assert wrong in message and f"did you mean '{right}'?" in message


@pytest.mark.parametrize(
    "name",
    [
        "engine_options",
        "base_url",
        "api_key",
        "launch",
        "python",
        "launch_args",
        "model",
        "raw",
        "deadlines",
        "headers",
        "template",
        "__class__",
    ],
)
def test_options_for_python_or_the_operator_are_refused_over_http(vllm: Stand, name: str) -> None:
    reply = vllm.post("/generate", prompt="hi", **{name: {MARK: 1}})
    assert name in refused(reply, "invalid_request") and MARK not in reply.text and not vllm.engine.bodies


def test_an_unknown_fields_name_is_input_too(vllm: Stand) -> None:
    reply = vllm.post("/generate", prompt="hi", **{MARK * 1000: 1})
    refused(reply, "invalid_request")
    assert len(reply.content) < 2000


@pytest.mark.parametrize("path", [*ROUTES, "/v1/chat/completions"])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b"nothing",
        b"[]",
        b'"text"',
        b"7",
        b"null",
        b"\xff\xfe",
        b'{"prompt":"\xff"}',
        b"{'prompt':1}",
        b'{"prompt":"hi"} x',
        b'{"prompt":"hi",}',
        b'{"prompt":"hi","temperature":NaN}',
        b'{"prompt":"hi","temperature":Infinity}',
        b'{"prompt":"hi","temperature":1e999}',
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"hi","seed":' + b"9" * 5000 + b"}",
        b"\x1f\x8b\x08\x00",
        b'{"prompt":"hi","prompt":"hi"}',
        b"--x\r\nContent-Disposition: form-data",
        b"a=b&c=d",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_what_is_not_strict_json_is_refused(vllm: Stand, path: str, raw: bytes) -> None:
    if path in ("/chat", "/v1/chat/completions"):
        raw = raw.replace(
            b'"prompt":"hi"',
            b'"model":"vllm/m","messages":[{"role":"user","content":"hi"}]'
            if path[1] == "v"
            else b'"messages":[{"role":"user","content":"hi"}]',
        )
    reply = vllm.raw(path, raw)
    (refused_v1 if path[1] == "v" else refused)(reply, "invalid_request")
    assert not vllm.engine.bodies


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_depth_is_limited(vllm: Stand, path: str) -> None:
    refuse = refused_v1 if path[1] == "v" else refused
    for opened, closed, levels in (
        (b"[", b"]", 65),
        (b'{"a":', b"}", 65),
        (b"[", b"]", 100_000),
        (b'{"a":', b"}", 100_000),
    ):
        refuse(
            vllm.raw(path, b'{"prompt":"hi","model":"vllm/m","x":' + opened * levels + b"1" + closed * levels + b"}"),
            "invalid_request",
        )
    refuse(vllm.raw(path, b"[" * 1_000_000), "invalid_request")


def test_brackets_inside_a_prompt_do_not_count_as_nesting(vllm: Stand) -> None:
    good(vllm.post("/generate", prompt="[{" * 5000))


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_body_over_4_mib_is_refused(vllm: Stand, path: str) -> None:
    refuse = refused_v1 if path[1] == "v" else refused
    limit = 4 << 20
    refuse(vllm.raw(path, b" " * (limit + 1)), "payload_too_large")
    url = path if path[1] == "v" else API + path
    refuse(
        vllm.client.post(url, content=(b" " * (1 << 16) for _ in range(65))), "payload_too_large"
    )  # chunked, without a length
    refuse(vllm.raw(path, b" " * limit), "invalid_request")  # as large as it may be: read, and no JSON


def test_a_body_that_is_announced_too_large_is_not_waited_for(vllm: Stand) -> None:
    with contextlib.closing(hang_up(vllm.url)) as client:
        client.putrequest("POST", f"{API}/generate")
        client.putheader("content-length", str(5 << 20))
        client.endheaders(b"{")
        client.sock.settimeout(SOON)
        assert client.getresponse().status == 413


def test_any_content_type_is_read_as_json(vllm: Stand) -> None:
    for kind in ("application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain"):
        good(vllm.raw("/generate", b'{"prompt":"hi"}', **{"content-type": kind}))


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_byte_order_mark_is_no_part_of_the_body(vllm: Stand, path: str) -> None:
    reply = vllm.raw(
        path, b"\xef\xbb\xbf" + json.dumps({"prompt": "hi", **({"model": "m"} if path[1] == "v" else {})}).encode()
    )
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_compressed_body_is_refused_by_name(vllm: Stand, path: str) -> None:
    body = gzip.compress(json.dumps({"prompt": "hi", "model": "m"}).encode())
    reply = vllm.raw(path, body, **{"content-encoding": "gzip"})
    message = (refused_v1 if path[1] == "v" else refused)(reply, "invalid_request")
    assert "content-encoding" in message and "uncompressed" in message and not vllm.engine.bodies


@pytest.mark.parametrize("path", [*ROUTES, "/v1/chat/completions"])
def test_a_trailing_slash_is_the_same_route(vllm: Stand, path: str) -> None:
    answers_json(vllm)
    body = {"model": "m", "messages": HI} if path[1] == "v" else body_of(path)
    reply, other = vllm.post(path, **body), vllm.post(path + "/", **body)
    assert (reply.status_code, other.status_code) == (200, 200) and set(reply.json()) == set(other.json())
    assert vllm.client.get(f"{API}/models/").json()["data"] == vllm.client.get(f"{API}/models").json()["data"]


def test_the_endpoint_is_named(stand: Stand) -> None:
    for reply in (
        stand.post("/generate", prompt="hi"),
        stand.post("/generate", prompt="hi", stream=True),
        stand.post("/v1/chat/completions", model=stand.model, messages=HI),
        stand.post("/v1/chat/completions", model=stand.model, messages=HI, stream=True),
    ):
        assert (reply.status_code, reply.headers["x-endpoint"]) == (200, stand.engine.dialect)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": "x"}, "max_tokens"),
        ({"tools": "x"}, "tools"),
        ({"model": "nope"}, "model"),
        ({"messages": []}, "messages"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_an_error_of_openais_form_names_the_field(stand: Stand, fields: dict[str, Any], param: str) -> None:
    reply = stand.post("/v1/chat/completions", **{"model": stand.model, "messages": HI, **fields})
    assert 400 <= reply.status_code < 500 and reply.json()["error"]["param"] == param, reply.text


def test_the_cap_on_max_tokens_is_the_operators(vllm: Stand) -> None:
    """What is asked for over it is reduced and named; clients have such numbers built in."""
    assert "ignored" not in good(vllm.post("/generate", prompt="hi", max_tokens=8192))
    assert good(vllm.post("/generate", prompt="hi", max_tokens=32_000))["ignored"] == ["max_tokens"]
    with Stand("vllm", max_tokens_cap=2) as stand:
        data = good(stand.post("/generate", prompt="hi", max_tokens=3))
        assert (data["ignored"], data["finish_reason"]) == (["max_tokens"], "length")
        last = check_stream(stand.events("/generate", prompt="hi", max_tokens=3))
        assert (last["ignored"], last["finish_reason"]) == (["max_tokens"], "length")
        for stream in (False, True):
            for name in ("max_tokens", "max_completion_tokens"):
                ask = {"model": "m", "messages": HI, "stream": stream, name: 3}
                reply = stand.post("/v1/chat/completions", **ask)
                assert reply.status_code == 200 and reply.headers["x-ignored-fields"] == name
        assert "ignored" not in good(stand.post("/generate", prompt="hi"))
        for body in stand.engine.bodies:
            assert {body.get(name) for name in ("max_tokens", "max_completion_tokens")} <= {2, None}
            assert 2 in (body.get("max_tokens"), body.get("max_completion_tokens"))


def test_what_the_engine_cannot_do_is_refused_or_named(all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    stand.engine.reset()
    assert "regex" in refused(stand.post("/generate", prompt="hi", regex="a+"), "unsupported_feature")
    assert not stand.engine.bodies
    assert good(stand.post("/generate", prompt="hi", think=True, on_unsupported="ignore"))["ignored"] == ["think"]


# ----------------------------------------------------------------------------------------------- client gone


def gone(stand: Stand) -> None:
    stand.engine.wait(lambda: stand.engine.live == 0, SOON)
    until(lambda: (stand.gateway.in_flight, stand.gateway.waiting) == (0, 0), SOON)


GONE = ["/generate", "/v1/chat/completions"]


@pytest.mark.parametrize("path", GONE)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(stand: Stand, path: str, stream: bool) -> None:
    cut = stand.engine.cut
    stand.engine.script(Reply(delay=60))
    with (
        stand.leaving(path, model=stand.model, messages=HI, stream=stream)
        if path in GONE[1:]
        else stand.leaving(path, prompt="hi", stream=stream)
    ):
        stand.engine.wait(lambda: stand.engine.live == 1)
    gone(stand)
    assert stand.engine.cut == cut + 1


@pytest.mark.parametrize("path", GONE)
def test_a_client_that_leaves_in_the_middle(stand: Stand, path: str) -> None:
    cut, stand.engine.pace, stand.engine.text = stand.engine.cut, 0.05, "word " * 2000
    with stand.leaving(
        path, stream=True, **({"model": stand.model, "messages": HI} if path in GONE[1:] else {"prompt": "hi"})
    ) as client:
        assert client.getresponse().read(100)
    gone(stand)
    assert stand.engine.cut == cut + 1


def test_a_client_that_leaves_during_a_complete_answer(stand: Stand) -> None:
    cut, stand.engine.pace, stand.engine.text = stand.engine.cut, 0.05, "word " * 2000
    with stand.leaving("/generate", prompt="hi"):
        stand.engine.wait(lambda: stand.engine.live == 1)
    gone(stand)
    assert stand.engine.cut == cut + 1


def test_a_client_that_leaves_with_half_its_body(vllm: Stand) -> None:
    begun = vllm.engine.begun
    with contextlib.closing(hang_up(vllm.url)) as client:
        client.putrequest("POST", f"{API}/generate")
        client.putheader("content-length", "100")
        client.endheaders(b'{"prompt":')
    gone(vllm)
    good(vllm.post("/generate", prompt="hi"))
    assert vllm.engine.begun == begun + 1


def test_a_client_that_reads_nothing_and_leaves(vllm: Stand) -> None:
    cut, vllm.engine.text = vllm.engine.cut, "word " * 20_000
    with vllm.leaving("/generate", prompt="hi", stream=True):
        vllm.engine.wait(lambda: vllm.engine.live == 1)
        time.sleep(0.2)  # the pipes fill up
    gone(vllm)
    assert vllm.engine.cut >= cut


def test_a_client_that_leaves_during_the_second_ask(vllm: Stand) -> None:
    """The re-ask of an answer that does not fit is work for a client too."""
    cut = vllm.engine.cut
    bad = vllm.engine._openai(True, {"messages": HI})
    vllm.engine.script(Reply(headers=bad.headers, pieces=bad.pieces))
    vllm.engine.script(Reply(delay=60))
    with vllm.leaving("/structured-generate", prompt="hi", schema=CITY):
        vllm.engine.wait(lambda: len(vllm.engine.bodies) == 2)
    gone(vllm)
    assert vllm.engine.cut == cut + 1


def test_the_server_is_intact_after_many_clients_have_left(vllm: Stand) -> None:
    vllm.engine.pace = 0.2
    for _ in range(40):
        with vllm.leaving("/generate", prompt="hi", stream=True):
            pass
    gone(vllm)
    vllm.engine.pace = 0
    for _ in range(20):
        good(vllm.post("/generate", prompt="hi"))
    until(lambda: vllm.engine.connections <= 2, SOON)


# ----------------------------------------------------------------------------------------------- admission


@contextlib.contextmanager
def busy(stand: Stand, path: str = "/generate") -> Iterator[None]:
    """One request in flight for as long as this lasts."""
    stand.engine.reset().script(Reply(delay=60))
    with stand.leaving(path, prompt="hi"):
        stand.engine.wait(lambda: stand.engine.live == 1)
        yield
    gone(stand)


def test_a_request_over_the_limit_gets_a_retry_after() -> None:
    with Stand("vllm", max_in_flight=1, queue=0) as stand:
        with busy(stand):
            for stream in (False, True):
                reply = stand.post("/chat", messages=HI, stream=stream)
                refused(reply, "busy")
                assert int(reply.headers["retry-after"]) >= 1
            reply = stand.post("/v1/chat/completions", model="m", messages=HI)
            refused_v1(reply, "busy")
            assert int(reply.headers["retry-after"]) >= 1
            assert (
                stand.client.get("/health").status_code == 200 and stand.client.get("/ready").json()["in_flight"] == 1
            )
        good(stand.post("/chat", messages=HI))


def test_the_queue_waits_and_forgets_who_left() -> None:
    with Stand("vllm", max_in_flight=1, queue=1) as stand, ThreadPoolExecutor(1) as pool:
        with busy(stand):
            with stand.leaving("/generate", prompt="left"):
                until(lambda: stand.gateway.waiting == 1)
                refused(stand.post("/chat", messages=HI), "busy")
            until(lambda: stand.gateway.waiting == 0)
            second = pool.submit(stand.post, "/generate", prompt="second")
            until(lambda: stand.gateway.waiting == 1)
        assert good(second.result())
        assert [ask["messages"][0]["content"] for ask in stand.engine.bodies] == ["hi", "second"]


def test_a_bad_request_gives_its_place_back() -> None:
    with Stand("vllm", max_in_flight=1, queue=0) as stand:
        for _ in range(3):
            refused(stand.post("/generate"), "invalid_request")
            refused(stand.post("/generate", prompt="hi", model_name="nope"), "model_not_found")
        good(stand.post("/generate", prompt="hi"))


# ----------------------------------------------------------------------------------------------- routing


def test_engines_lists_which_are_reachable(stand: Stand) -> None:
    found = {e["engine_type"]: e for e in good(stand.client.get(f"{API}/engines"))}
    assert set(found) == set(product.LLMInferencer.ENGINE_MAP)
    for name, each in found.items():
        assert each["reachable"] is (name == stand.engine.dialect) is each["default"]
        assert "error" not in each if each["reachable"] else each["error"]
    own = found[stand.engine.dialect]
    assert own["version"] == stand.engine.version and own["models"] and "schema" in own["features"]
    assert (own["name"], own["state"], own["slots"], own["in_flight"]) == (stand.engine.dialect, "up", 1, 0)


def test_models_lists_what_is_served(stand: Stand) -> None:
    (found,) = good(stand.client.get(f"{API}/models"))
    assert (
        found["engine_type"] == stand.engine.dialect
        and found["name"].partition(":")[0] == "m"
        and found["context_length"] == 8192
    )


@pytest.mark.parametrize(
    ("where", "engine"),
    [
        ({}, "vllm"),
        ({"engine_type": "auto"}, "vllm"),
        ({"engine_type": "vllm"}, "vllm"),
        ({"model_name": "m"}, "vllm"),
        ({"model_name": "vllm/m"}, "vllm"),
        ({"engine_type": "sglang"}, "sglang"),
        ({"engine_type": "sglang", "model_name": "m"}, "sglang"),
        ({"model_name": "sglang/m"}, "sglang"),
        ({"model_name": "fast"}, "vllm"),
        ({"model_name": "other"}, "sglang"),
        ({"model_name": "a/slashed/alias"}, "sglang"),
    ],
)
def test_a_request_goes_to_the_engine_that_it_names(two: Stand, where: dict[str, str], engine: str) -> None:
    assert good(two.post("/chat", messages=HI, **where))["engine_type"] == engine
    assert check_stream(two.events("/chat", messages=HI, **where))


@pytest.mark.parametrize(
    "where",
    [
        {"model_name": "nope/m"},
        {"model_name": "Qwen/Qwen-7B"},
        {"model_name": "nope"},
        {"model_name": "vllm/nope"},
        {"engine_type": "sglang", "model_name": "nope"},
    ],
)
def test_a_slash_names_an_engine_only_where_there_is_one(two: Stand, where: dict[str, str]) -> None:
    name = where["model_name"].removeprefix("vllm/")
    assert name in refused(two.post("/chat", messages=HI, **where), "model_not_found")


@pytest.fixture
def two(all_stands: dict[str, Stand], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """vLLM by default, SGLang found by its environment variable, and aliases."""
    sglang = all_stands["sglang"].engine
    monkeypatch.setenv("SGLANG_BASE_URL", sglang.base_url)
    with Stand("vllm", aliases={"fast": "vllm/m", "other": "sglang/m", "a/slashed/alias": "sglang/m"}) as found:
        yield found


def test_no_request_starts_a_process(vllm: Stand) -> None:
    before = descendants(os.getpid())
    for where in (
        {"engine_type": "llamacpp"},
        {"engine_type": "llamacpp", "stream": True},
        {"model_name": "llamacpp/SmolLM2-135M-Instruct.Q4_1"},
        {"engine_type": "ollama"},
    ):
        refused(vllm.post("/chat", messages=HI, **where), "engine_unavailable")
    refused_v1(vllm.post("/v1/chat/completions", model="llamacpp/x", messages=HI), "engine_unavailable")
    for path in (f"{API}/engines", f"{API}/models", "/v1/models"):
        assert vllm.client.get(path).status_code == 200
    assert descendants(os.getpid()) <= before


PLACES = [
    "http://127.0.0.1:9/x",
    "https://evil.example/m",
    "file:///etc/passwd",
    "../../etc/passwd",
    "a/../../b",
    "/etc/passwd",
    "/tmp/x.gguf",
    "C:\\x.gguf",
    "~/x.gguf",
    "m?x=1",
    "m#x",
    "m%2e%2e",
    "m\r\nx: y",
    "m\x00",
    "vllm/../m",
    "vllm//etc/passwd",
    "vllm/http://127.0.0.1:9/x",
    "..",
    ".",
]


@pytest.mark.parametrize("name", PLACES)
def test_a_model_name_is_never_used_as_a_path_or_url(vllm: Stand, name: str) -> None:
    """It is looked up among the engine's models, and reaches neither a file nor another address."""
    reply = vllm.post("/chat", messages=HI, model_name=name)
    kind = reply.headers["x-error-kind"]
    assert kind == "model_not_found" or not name.isprintable()
    refused(reply, kind)
    refused_v1(vllm.post("/v1/chat/completions", model=name, messages=HI), kind)
    assert not vllm.engine.bodies
    asked = {request.path for request in vllm.engine.requests}
    assert asked <= {"/v1/models", "/version", "/health", "/openapi.json", "/metrics"}, asked


@pytest.mark.parametrize("name", ["/data/models/Qwen", "My Model 中文.gguf", "_m", "a b", "m?x=1#y", "名字", "../m"])
def test_what_is_listed_can_be_asked_for(name: str) -> None:
    engine = FakeEngine("vllm", model=name)
    with Stand("vllm", engine=engine) as stand:
        (listed,) = good(stand.client.get(f"{API}/models"))
        for model in (listed["name"], f"vllm/{listed['name']}"):
            assert good(stand.post("/chat", messages=HI, model_name=model))["model_name"] == name
        for each in stand.client.get("/v1/models").json()["data"]:
            reply = stand.post("/v1/chat/completions", model=each["id"], messages=HI)
            assert (reply.status_code, reply.json()["model"]) == (200, each["id"])


def test_a_server_does_not_attach_to_itself(vllm: Stand) -> None:
    refused(vllm.post("/chat", {product.LOOP_HEADER: product.INSTANCE}, messages=HI), "invalid_request")
    assert not vllm.engine.bodies
    with pytest.raises(product.InferenceError):
        product.LLMInferencer("vllm", base_url=vllm.url).generate("hi")
    assert not vllm.engine.bodies


def test_a_server_on_an_engines_default_port_is_not_that_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's default port is ours too."""
    with Stand("vllm") as stand:
        monkeypatch.setattr(product.VLLMAdapter, "default_url", stand.url)
        with pytest.raises(product.EngineUnavailable):
            product.LLMInferencer("vllm", launch=False).generate("hi")
        assert not stand.engine.bodies


def test_a_server_on_an_engines_default_port_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for engines asks our own /v1/models, which would look for engines."""
    with Stand("sglang") as stand:
        monkeypatch.setattr(product.VLLMAdapter, "default_url", stand.url)
        found = {e["engine_type"]: e["reachable"] for e in good(stand.client.get(f"{API}/engines", timeout=3))}
        assert found == {"ollama": False, "vllm": False, "sglang": True, "llamacpp": False}
        assert [m["engine_type"] for m in good(stand.client.get(f"{API}/models", timeout=3))] == ["sglang"]


# ----------------------------------------------------------------------------------------------- who gets in

KEYLESS_OK = [
    {},
    {"host": "localhost"},
    {"host": "localhost:8000"},
    {"host": "127.0.0.1:1"},
    {"host": "[::1]:8000"},
    {"host": "[::1]"},
    {"host": "LOCALHOST"},
]
KEYLESS_NO = [
    {"host": "evil.example"},
    {"host": "evil.example:80"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "localhost.evil.example"},
    {"host": "10.0.0.1"},
    {"host": ""},
    {"host": "127.0.0.1@evil.example"},
    {"host": "evil.example#127.0.0.1"},
    {"x-forwarded-for": "127.0.0.1"},
    {"forwarded": "for=127.0.0.1"},
    {"x-real-ip": "127.0.0.1"},
    {"x-forwarded-host": "localhost"},
    {"x-forwarded-for": ""},
    {"via": "1.1 proxy"},
    {"x-forwarded-proto": "https"},
]


@pytest.mark.parametrize("headers", KEYLESS_OK, ids=str)
def test_a_loopback_caller_needs_no_key_where_none_is_configured(vllm: Stand, headers: dict[str, str]) -> None:
    good(vllm.client.get(f"{API}/models", headers=headers))


@pytest.mark.parametrize("headers", KEYLESS_NO, ids=str)
def test_callers_from_elsewhere_need_the_generated_key(vllm: Stand, headers: dict[str, str]) -> None:
    why = "this one's Host is neither localhost nor 127.0.0.1" if "host" in headers else "this one came through a proxy"
    assert why in refused(vllm.client.get(f"{API}/models", headers=headers), "unauthorized")
    assert why in refused_v1(vllm.client.get("/v1/models", headers=headers), "unauthorized")
    assert (
        vllm.client.get(
            f"{API}/models", headers={**headers, "authorization": f"Bearer {vllm.gateway.settings.made_key}"}
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        ("127.0.0.1", 200),
        ("127.8.9.10", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("::ffff:10.0.0.1", 401),
        ("10.0.0.1", 401),
        ("::", 401),
        ("0.0.0.0", 401),
        ("", 401),
    ],
)
def test_this_machines_addresses_are_those_of_loopback(vllm: Stand, peer: str, status: int) -> None:
    """A socket that listens on :: names an IPv4 caller ::ffff:127.0.0.1."""

    async def ask() -> int:
        transport = httpx.ASGITransport(vllm.app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/v1/models")).status_code

    assert asyncio.run(ask()) == status


@pytest.fixture(scope="module")
def keyed() -> Iterator[Stand]:
    with Stand("vllm", api_keys=("first", "second-ключ")) as found:
        yield found


@pytest.mark.parametrize("headers", [
    {"authorization": "Bearer first"}, {"authorization": "bearer first"}, {"x-api-key": "first"},
    {"authorization": "Bearer second-ключ".encode()}, {"authorization": "Bearer first", "host": "evil.example"},
], ids=str)  # fmt: skip
def test_a_configured_key_opens(keyed: Stand, headers: Any) -> None:
    good(keyed.client.get(f"{API}/models", headers=headers))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer firs"},
        {"authorization": "Bearer first2"},
        {"authorization": "Bearer first,second"},
        {"authorization": "Basic first"},
        {"authorization": "first"},
        {"x-api-key": ""},
        {"x-api-key": "FIRST"},
        {"cookie": "key=first"},
        {"x-api-key": "\xff".encode("latin-1")},
    ],
    ids=str,
)
def test_nobody_gets_in_without_the_configured_key(keyed: Stand, headers: Any) -> None:
    reply = keyed.client.get(f"{API}/models?api_key=first", headers=headers)
    refused(reply, "unauthorized")
    assert reply.headers["www-authenticate"] == "Bearer"
    refused(
        keyed.client.get(
            f"{API}/models",
            headers={**headers, **({} if headers else {"authorization": f"Bearer {keyed.gateway.settings.made_key}"})},
        ),
        "unauthorized",
    )


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/redoc", "/openapi.json", "/ui", "/favicon.ico"])
def test_what_is_public(keyed: Stand, path: str) -> None:
    """With a trailing slash too, which makes no other route of it."""
    for spelling in (path, path + "/"):
        assert keyed.client.get(spelling, headers={"host": "evil.example"}).status_code == 200
    if path in ("/health", "/ready", "/ui"):
        reply = keyed.client.head(path)
        assert (reply.status_code, reply.content) == (200, b"")


def test_the_root_leads_to_the_page(keyed: Stand) -> None:
    reply = keyed.client.get("/")
    assert reply.is_redirect and reply.headers["location"].strip("/") == "ui"
    assert keyed.client.get("/", follow_redirects=True).url.path == "/ui"


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/metrics",
        "/metrics/",
        "/health/x",
        "/ui/x",
        "/uix",
        "//ui/",
        "/ui/../metrics",
        "/HEALTH",
        "/docs/x",
        "//docs",
        "/docs%2f..%2fapi",
        "/docs/../api/v1/llm/models",
        "/api/v1/llm",
        f"{API}/engines",
        f"{API}/models",
        "/v1/models",
        "/v1/models/x",
        "/v1/nope",
        "/openapi.json/x",
        "/api/v1/llm/models/",
        "/api/v1/llm/models?x=/docs",
        "/api/v1/llm/models#/docs",
        "/api/v1/llm/models;/docs",
    ],
)
def test_every_other_path_is_closed(keyed: Stand, path: str) -> None:
    with contextlib.closing(hang_up(keyed.url)) as client:
        client.request("GET", path)  # as it stands: httpx would tidy it up
        reply = client.getresponse()
        assert (reply.status, reply.headers["x-error-kind"]) == (401, "unauthorized")


@pytest.mark.parametrize("path", [*ROUTES, "/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_no_engine_is_asked_without_the_key(keyed: Stand, path: str) -> None:
    body = {"model": "m", "messages": HI, "prompt": "hi", "input": "hi"} if path.startswith("/v1") else body_of(path)
    keyed.engine.reset()
    for stream in (False, True):
        (refused_v1 if path.startswith("/v1") else refused)(keyed.post(path, **body, stream=stream), "unauthorized")
    for odd in (
        f"/{API}{path}",
        f"{API}{path}/",
        f"{API}{path}?x=1",
        f"{API.upper()}{path}",
        f"{API}/.{path}",
        f"{API}%2f{path[1:]}",
    ):
        assert keyed.client.post(odd, json=body).status_code == 401
    assert not keyed.engine.bodies


@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "OPTIONS", "DELETE", "TRACE", "PROPFIND"])
def test_every_method_is_closed(keyed: Stand, method: str) -> None:
    reply = keyed.client.request(method, f"{API}/generate", json={"prompt": "hi"})
    assert reply.status_code == 401 and not keyed.engine.bodies


def test_no_auth_is_the_explicit_way_out() -> None:
    with Stand("vllm", no_auth=True) as stand:
        good(stand.client.get(f"{API}/models", headers={"host": "evil.example", "x-forwarded-for": "1.2.3.4"}))


def test_health_shows_no_secret(keyed: Stand) -> None:
    for path in ("/health", "/ready"):
        assert keyed.engine.base_url.partition("//")[2] not in keyed.client.get(path).text


def test_without_origins_there_is_no_cors(vllm: Stand) -> None:
    for method in ("GET", "OPTIONS"):
        reply = vllm.client.request(
            method, f"{API}/models", headers={"origin": "https://page.example", "access-control-request-method": "POST"}
        )
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_cors_is_for_the_configured_origins_alone() -> None:
    with Stand("vllm", cors_origins=("https://page.example",), api_keys=("k",)) as stand:
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        reply = stand.client.options(f"{API}/chat", headers={"origin": "https://page.example", **preflight})
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()
        of_openais_client = ("x-stainless-os", "x-stainless-retry-count", "content-type")
        asked = {**preflight, "access-control-request-headers": ",".join(of_openais_client)}
        reply = stand.client.options("/v1/chat/completions", headers={"origin": "https://page.example", **asked})
        allowed = reply.headers["access-control-allow-headers"].lower()
        assert reply.status_code == 200 and all(name in allowed for name in of_openais_client)
        for headers in ({}, {"authorization": "Bearer k"}):  # a page must be able to read its refusal
            reply = stand.client.post(
                f"{API}/chat", json={"messages": HI}, headers={"origin": "https://page.example", **headers}
            )
            assert reply.headers["access-control-allow-origin"] == "https://page.example"
            assert "x-error-kind" in reply.headers["access-control-expose-headers"].lower()
        for origin in ("https://evil.example", "http://page.example", "https://page.example.evil.example", "null"):
            assert (
                "access-control-allow-origin"
                not in stand.client.options(f"{API}/chat", headers={"origin": origin, **preflight}).headers
            )
            assert (
                "access-control-allow-origin"
                not in stand.client.get(
                    f"{API}/models", headers={"origin": origin, "authorization": "Bearer k"}
                ).headers
            )


# ----------------------------------------------------------------------------------------------- OpenAPI and pages


def openapi_examples(doc: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    return [(path, method, content["schema"], content.get("example"))
            for path, item in doc["paths"].items() for method, operation in item.items() if "requestBody" in operation
            for content in (operation["requestBody"]["content"]["application/json"],)]  # fmt: skip


def test_openapi_examples_validate(vllm: Stand) -> None:
    doc = vllm.client.get("/openapi.json").json()
    posts = [(path, method) for path, item in doc["paths"].items() for method in item if method == "post"]
    found = openapi_examples(doc)
    assert [(path, method) for path, method, *_ in found] == posts and {API + route for route in ROUTES} <= {
        path for path, *_ in found
    }

    def check(schema: dict[str, Any], value: Any, where: str) -> None:
        known = jsonschema_rs.Draft202012Validator({**schema, "components": doc["components"]})
        assert known.is_valid(value), (where, [error.message for error in known.iter_errors(value)][:3])

    for path, _, schema, example in found:
        assert example, path
        check(schema, example, path)
    for path, item in doc["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            for status, answer in operation["responses"].items():
                content = answer.get("content", {}).get("application/json", {})
                if path.startswith(API) and status != "422":
                    assert enveloped(content["example"]), (path, status)
                    check(content["schema"], content["example"], f"{path} {status}")


def test_every_route_shows_its_errors(vllm: Stand) -> None:
    for path, item in vllm.client.get("/openapi.json").json()["paths"].items():
        for operation in item.values() if path.startswith((API, "/v1")) else ():
            shown = {
                status: answer["content"]["application/json"]["example"]
                for status, answer in operation["responses"].items()
                if status >= "400"
            }
            assert "401" in shown, path
            for e in shown.values():
                if path.startswith(product.MESSAGES):
                    assert set(e) == {"type", "error", "request_id"} and set(e["error"]) == {"type", "message"}, path
                elif path.startswith("/v1"):
                    assert set(e["error"]) == {"message", "type", "param", "code"}, path
                else:
                    assert enveloped(e), path


def test_the_pages_fall_back_to_the_cdn(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, where in (("fastapi_offline", "cdn"), (None, product.ASSETS)):
        with monkeypatch.context() as patch:
            if module:
                patch.setitem(sys.modules, module, None)
            with Stand("vllm", api_keys=("k",)) as stand:
                assert all(where in stand.client.get(path).text for path in ("/docs", "/redoc"))
                if not module:
                    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png"):
                        assert stand.client.get(f"{product.ASSETS}/{name}").status_code == 200
                    for odd in (
                        "",
                        "/",
                        "/x",
                        "/../../v1/models",
                        "/swagger-ui.css/../../../v1/models",
                    ):
                        with contextlib.closing(hang_up(stand.url)) as client:
                            client.request("GET", product.ASSETS + odd)  # as it stands
                            assert client.getresponse().status == 401


def test_openapi_promises_no_422(vllm: Stand) -> None:
    doc = vllm.client.get("/openapi.json").json()
    assert not [
        path for path, item in doc["paths"].items() for operation in item.values() if "422" in operation["responses"]
    ]


def test_every_reference_in_openapi_leads_somewhere(vllm: Stand) -> None:
    doc = vllm.client.get("/openapi.json").json()
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(v for k, v in node.items() if k == "$ref" and isinstance(v, str))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(doc)
    for ref in set(found):
        assert product.resolve_ref(doc, ref) is not None, ref


def test_openapi_shows_this_servers_cap() -> None:
    doc = product.create_app(product.Settings(max_tokens_cap=77)).openapi()
    schema = doc["paths"][f"{API}/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "reduced" in schema["properties"]["max_tokens"]["anyOf"][0]["description"]
    assert "77" in schema["properties"]["max_tokens"]["anyOf"][0]["description"]


def test_openapi_names_every_field_with_its_range(vllm: Stand) -> None:
    doc = vllm.client.get("/openapi.json").json()
    for path, _, schema, _ in openapi_examples(doc):
        if path.startswith(API):
            fields = schema["properties"]
            assert {
                "engine_type",
                "model_name",
                "max_tokens",
                "temperature",
                "stream",
                "stop",
                "schema",
                "on_unsupported",
            } <= set(fields)
            assert (
                schema["additionalProperties"] is False
                and "engine_options" not in fields
                and "2" in json.dumps(fields["temperature"])
            )


def test_openapi_examples_run_as_they_stand(real: httpx.Client) -> None:
    failed = {}
    for path, method, _, example in openapi_examples(real.get("/openapi.json").json()):
        if path in ("/v1/embeddings", "/v1/rerank"):  # they need models of their own, which the embedded one is not
            continue
        reply = real.request(method, path, json=example)
        if reply.status_code != 200:
            failed[path] = reply.text
    assert not failed


def test_the_pages_are_there(vllm: Stand) -> None:
    for path in ("/docs", "/redoc"):
        page = vllm.client.get(path)
        assert page.status_code == 200 and "html" in page.headers["content-type"] and "openapi.json" in page.text


# ----------------------------------------------------------------------------------------------- many at once


def test_many_callers_get_their_own_answers(stand: Stand) -> None:
    stand.engine.answer = lambda ask: ask["messages"][-1]["content"]
    nonces = [f"nonce {n}" for n in range(40)]
    with ThreadPoolExecutor(8) as pool:

        def ask(nonce: str) -> bool:
            full = good(stand.post("/generate", prompt=nonce))["text"]
            streamed = "".join(e["data"].get("delta", "") for e in stand.events("/generate", prompt=nonce)[:-1])
            return full == streamed == nonce

        assert all(pool.map(ask, nonces))
    assert threading.active_count() < 120


# ----------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with FakeEngine("vllm") as found:
        yield found


def attached(engine: FakeEngine, *args: str, **more: Any) -> Command:
    return Command("--engine", engine.dialect, "--base-url", engine.base_url, *args, **more)


Call = Callable[..., tuple[Any, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line in this process: its exit status and output."""

    def called(*args: str, **env: str) -> tuple[Any, str]:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        try:
            status: Any = product.main(args)
        except SystemExit as exc:
            status = exc.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return called


def test_help_reads_well(call: Call) -> None:
    status, said = call("--help")
    assert status == 0
    for word in (
        "--serve",
        "--api-test",
        "--host",
        "--port",
        "--engine",
        "--model",
        "--base-url",
        "--api-key",
        "--json",
        "8000",
        "OLLAMA_HOST",
        "LLAMACPP_MODEL",
    ):
        assert word in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--serve", "--api-test"], "not allowed with"),
        (["--nope"], "--nope"),
        (["--port", "x"], "--port"),
        (["--serve", "--engine", "olama"], "did you mean 'ollama'"),
        (["--serve", "--alias", "x"], "--alias"),
        (["--serve", "--alias", "x=nope/m"], "no such engine or endpoint: 'nope/m'"),
    ],
)
def test_a_bad_command_line_says_what_is_wrong(call: Call, args: list[str], says: str) -> None:
    status, said = call(*args)
    assert status == 2 and says in said


@pytest.mark.parametrize(
    ("args", "says"), [(["--port", "70000"], "port"), (["--max-in-flight", "0"], "--max-in-flight")]
)
def test_a_number_out_of_range_starts_no_server(args: list[str], says: str) -> None:
    done = run_command("--serve", *args, timeout=6)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            done = run_command("--serve", "--host", host, "--port", str(port), "--engine", "ollama")
            assert (
                done.returncode == 1
                and str(port) in done.stderr
                and "--port" in done.stderr
                and "Traceback" not in done.stderr
            )


def test_a_host_address_that_is_not_ours_is_an_error() -> None:
    done = run_command("--serve", "--host", "203.0.113.7", "--engine", "ollama")
    assert done.returncode == 1 and "an address of this machine" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def life() -> Iterator[dict[str, Any]]:
    """A server that was started, asked twice and stopped by SIGTERM."""
    with FakeEngine("vllm") as engine, attached(engine) as server:
        ids = [
            httpx.post(f"{server.url}{API}/generate", json=body, trust_env=False).json()["request_id"]
            for body in ({"prompt": "hi"}, {})
        ]
        yield {"status": server.end(), "said": server.said, "url": server.url, "ids": ids}


def test_the_banner_shows_the_addresses(life: dict[str, Any]) -> None:
    for word in (
        f"{life['url']}{API}/generate",
        f"{life['url']}/docs",
        f"{life['url']}/redoc",
        f"{life['url']}/v1",
        "vllm",
    ):
        assert word in life["said"]


def test_sigterm_is_a_clean_end(life: dict[str, Any]) -> None:
    assert life["status"] == 0 and "Traceback" not in life["said"]


def test_one_line_is_logged_for_a_request(life: dict[str, Any]) -> None:
    for request_id, words in zip(
        life["ids"], (("vllm", "m", "200", f"{API}/generate"), ("400", f"{API}/generate")), strict=True
    ):
        (line,) = [line for line in life["said"].splitlines() if request_id in line]
        assert all(word in line for word in words)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_the_generated_key_is_printed_where_needed_and_never_logged(fake: FakeEngine, host: str) -> None:
    """On loopback too: a call through a proxy of this machine, or by another name, is told to send the printed key."""
    with attached(fake, "--host", host) as server:
        (line,) = [line for line in server.said.splitlines() if "API key" in line]
        key = line.split()[2]
        elsewhere = {"host": "elsewhere.example"}
        ask = {"prompt": MARK}
        assert (
            httpx.post(f"{server.url}{API}/generate", json=ask, headers=elsewhere, trust_env=False).status_code == 401
        )
        assert (
            httpx.post(
                f"{server.url}{API}/generate", json=ask, headers={**elsewhere, "x-api-key": key}, trust_env=False
            ).status_code
            == 200
        )
        server.end()
        assert server.said.count(key) == 1 and MARK not in server.said


def test_keys_and_defaults_come_from_the_environment(fake: FakeEngine) -> None:
    env = {
        "LLM_INFERENCE_API_KEY": "one, two",
        "LLM_INFERENCE_ENGINE": "vllm",
        "LLM_INFERENCE_MODEL": "m",
        "VLLM_BASE_URL": fake.base_url.removeprefix("http://"),
        "VLLM_API_KEY": "theirs",
    }
    fake.api_key = "theirs"
    with Command(env=env) as server:
        for key, status in (("one", 200), ("two", 200), ("three", 401)):
            assert (
                httpx.post(
                    f"{server.url}{API}/generate", json={"prompt": "hi"}, headers={"x-api-key": key}, trust_env=False
                ).status_code
                == status
            )
        assert fake.requests[-1].headers["authorization"] == "Bearer theirs"


def test_a_stopping_server_lets_its_streams_finish(fake: FakeEngine) -> None:
    fake.pace, fake.text = 0.1, "word " * 15
    with attached(fake) as server, httpx.Client(trust_env=False, timeout=20) as client:
        with client.stream("POST", f"{server.url}{API}/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and "finish_reason" in rest[-2]
        server.process.wait(20)
        assert "Traceback" not in server.said


def test_a_stopping_server_refuses_what_is_new(fake: FakeEngine) -> None:
    fake.pace, fake.text = 0.1, "word " * 20
    with (
        attached(fake) as server,
        httpx.Client(trust_env=False, timeout=20) as client,
        contextlib.closing(hang_up(server.url)) as kept,
    ):
        kept.request("GET", "/health")
        kept.getresponse().read()
        with client.stream("POST", f"{server.url}{API}/generate", json={"prompt": "hi", "stream": True}) as reply:
            next(reply.iter_lines())
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(
                httpx.TransportError, OSError, http.client.HTTPException
            ):  # closed, or refused with 503
                until(lambda: httpx.get(server.url + "/ready", trust_env=False).status_code == 503)
            with contextlib.suppress(OSError, http.client.HTTPException):
                kept.request("POST", f"{API}/generate", json.dumps({"prompt": "hi"}))
                assert kept.getresponse().status == 503
        assert len(fake.bodies) == 1


def test_a_stopping_server_ends_an_endless_stream_with_an_error_event(fake: FakeEngine) -> None:
    fake.pace, fake.text = 0.2, "word " * 1000
    with attached(fake) as server, httpx.Client(trust_env=False, timeout=40) as client:
        with client.stream("POST", f"{server.url}{API}/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines, rest = reply.iter_lines(), []
            rest.append(next(lines))
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                rest.extend(filter(None, lines))
        server.process.wait(20)
        fake.wait(lambda: fake.live == 0)
        last = json.loads(rest[-1].removeprefix("data: "))
        assert enveloped(last)["code"] == 500 and last["data"] is None


def test_a_stopping_server_does_not_wait_for_a_client_that_does_not_read(fake: FakeEngine) -> None:
    fake.text = "word " * 60_000
    with attached(fake) as server, contextlib.closing(hang_up(server.url)) as client:
        client.request("POST", f"{API}/generate", json.dumps({"prompt": "hi", "stream": True}))
        fake.wait(lambda: fake.live == 1)
        until(lambda: httpx.get(server.url + "/ready", trust_env=False).json()["in_flight"] == 1)
        server.end(30)
        fake.wait(lambda: fake.live == 0)
        assert "Traceback" not in server.said


def test_a_second_signal_forces(fake: FakeEngine) -> None:
    fake.script(Reply(delay=60))
    with attached(fake) as server, contextlib.closing(hang_up(server.url)) as client:
        client.request("POST", f"{API}/generate", json.dumps({"prompt": "hi"}))
        fake.wait(lambda: fake.live == 1)
        server.process.send_signal(signal.SIGINT)
        until(lambda: refuses(server.port))
        server.process.send_signal(signal.SIGINT)
        server.process.wait(5)
        fake.wait(lambda: fake.live == 0)
        assert "Shutting down" in server.said and "Traceback" not in server.said


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_the_server(stop: signal.Signals) -> None:
    with Command("--engine", "llamacpp") as server:
        children = descendants(server.process.pid)
        assert len(children) >= 2  # the watcher and its engine
        server.process.send_signal(stop)
        server.process.wait(20)
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))


def test_ready_names_the_engine_that_is_missing() -> None:
    with Command("--engine", "ollama", ready=False) as server:
        until(lambda: httpx.get(server.url + "/ready", trust_env=False).json()["status"] != "starting")
        reply = httpx.get(server.url + "/ready", trust_env=False)
        assert reply.status_code == 503 and "engine_unavailable" in reply.json()["status"]
        assert httpx.get(server.url + "/health", trust_env=False).status_code == 200


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ready_names_the_models_of_the_only_engine(dialect: Dialect) -> None:
    with Stand(dialect) as stand:
        names = ["m:latest"] if dialect == "ollama" else ["m"]
        until(lambda: stand.client.get("/ready").json()["endpoints"][0]["models"] == names, SOON)


def test_a_server_gets_ready_when_its_engine_comes_late() -> None:
    late = FakeEngine("vllm").start()
    late.stop()
    with attached(late, ready=False) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        until(lambda: client.get("/ready").json()["status"] != "starting")
        with late:
            good(client.post(f"{API}/generate", json={"prompt": "hi"}))
            assert client.get("/ready").status_code == 200


def test_the_self_test_in_json() -> None:
    with contextlib.ExitStack() as stack:
        env = {
            "OLLAMA_HOST": "ollama",
            "VLLM_BASE_URL": "vllm",
            "SGLANG_BASE_URL": "sglang",
            "LLAMACPP_BASE_URL": "llamacpp",
        }
        done = run_command(
            "--json", **{name: stack.enter_context(FakeEngine(dialect)).base_url for name, dialect in env.items()}
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["engine_type"] for each in found] == list(env.values())
    for each in found:
        assert each["ok"] and each["text"] == TEXT and each["how"] and each["version"] and each["model"]


def test_the_self_test_as_text(call: Call, fake: FakeEngine) -> None:
    status, said = call("--engine", "vllm", VLLM_BASE_URL=fake.base_url)
    assert status == 0 and TEXT in said and "\x1b" not in said and "1 of 1" in said


def test_the_self_test_on_a_terminal_has_bars() -> None:
    ours, theirs = os.openpty()
    with FakeEngine("vllm") as engine, FakeEngine("ollama") as other:
        engine.pace = 0.02
        env = neutral_environment() | {
            "VLLM_BASE_URL": engine.base_url,
            "OLLAMA_HOST": other.base_url,
        }
        program = subprocess.Popen(
            [sys.executable, str(ROOT / "llm_inference.py")],
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env=env | {"COLUMNS": "160", "SGLANG_BASE_URL": "127.0.0.1:1"},
        )
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO is a terminal's end
            while data := os.read(ours, 65536):
                said += data
        os.close(ours)
        assert program.wait(60) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", said.decode()).splitlines()
    rows = [line for line in lines if re.match(r"(vllm|ollama|sglang|llamacpp) +\S", line)]
    speeds = {row.split()[0]: len((re.findall("█+", row) or [""])[-1]) for row in rows}
    assert (
        max(speeds.values()) == 12
        and 0 < min(speeds[name] for name in ("vllm", "ollama")) <= 12
        and not speeds["sglang"]
    ), said.decode()


def test_the_self_test_fails_where_nobody_answers(call: Call) -> None:
    status, said = call("--engine", "ollama", "--json")
    (only,) = json.loads(said)
    assert status == 1 and not only["ok"] and "ollama serve" in only["error"]
    status, said = call("--engine", "ollama")
    assert status == 1 and "ollama serve" in said


def test_the_self_test_names_a_wrong_engine(call: Call) -> None:
    status, said = call("--engine", "olama")
    assert status != 0 and "did you mean" in said


def test_api_test_passes_on_the_real_embedded_engine(real: httpx.Client) -> None:
    done = run_command("--api-test", "--host", "127.0.0.1", "--port", str(real.base_url.port), timeout=120)
    assert done.returncode == 0, done.stdout
    assert " 0 failed" in done.stdout and "\x1b" not in done.stdout
    assert " …" in done.stdout  # a long refusal is cut at a word


def test_api_test_uses_the_key_and_fails_without_it(call: Call, keyed: Stand) -> None:
    keyed.engine.answer = lambda ask: '{"city":"Paris","country":"France"}'
    where = ("--api-test", "--port", keyed.url.rpartition(":")[2])
    assert call(*where)[0] == 1
    assert call(*where, "--api-key", "first")[0] == 0
    assert call(*where, LLM_INFERENCE_API_KEY="first")[0] == 0


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}/", "http://127.0.0.1:{}/v1"])
def test_api_test_takes_an_address_as_people_write_it(call: Call, keyed: Stand, form: str) -> None:
    status, said = call("--api-test", "--base-url", form.format(keyed.url.rpartition(":")[2]))
    assert status == 1 and "asks for a key" in said, said


def test_api_test_against_nothing_says_how_to_start(call: Call) -> None:
    status, said = call("--api-test", "--port", str(free_port()))
    assert status == 1 and "--serve" in said


def test_api_test_against_a_server_that_lists_no_models_says_so(
    call: Call, vllm: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(gateway: Any) -> Any:
        raise product.Busy("too many", "later")

    monkeypatch.setattr(product.Gateway, "models", busy)
    status, said = call("--api-test", "--base-url", vllm.url)
    assert status == 1 and "to GET /v1/models" in said and "Traceback" not in said


def test_api_test_against_something_else_fails(call: Call, fake: FakeEngine) -> None:
    assert call("--api-test", "--port", str(fake.port))[0] == 1


# Nothing stays ----------------------------------------------------------------------------------
def test_an_error_keeps_no_request_alive(stand: Stand) -> None:
    """An error that a frame's own name holds is a cycle, and keeps the body until the collector comes: 400 MB in 64
    large requests."""
    stand.post("/generate", prompt="warm")
    with no_error_stays():
        for body in ({"temperature": 9}, {"max_tokens": 10**7}, {"model_name": "none/such"}):
            assert stand.post("/generate", prompt="x", **body).status_code >= 400
        for stream in (False, True):
            for reply in BROKEN:
                stand.engine.script(reply)
                answer = stand.post("/generate", prompt="x", stream=stream)
                late = "bad_engine_reply: " in answer.text and "[DONE]" not in answer.text
                assert answer.status_code >= 400 or (stream and late)
