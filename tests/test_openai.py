"""The OpenAI routes under the real `openai` client: strict types, streams, errors, bytes passed on unchanged."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ValidationError

import llm_inference as product
from tests.fake_engine import DIALECTS, TEXT, Dialect, FakeEngine, Reply
from tests.harness import SOON, Command, Stand, payloads, refused, refused_v1, serving, until

pytestmark = pytest.mark.usefixtures("alone")

RELAYED: list[Dialect] = ["vllm", "sglang", "llamacpp"]
CHAT = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class City(BaseModel):
    city: str
    population: float


class Capital(BaseModel):
    """Nothing in it that a small model could write without an end."""

    city: Literal["Paris", "Rome"]
    large: bool


def client_of(url: str, key: str = "any", **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30, **more)


@pytest.fixture
def client(stand: Stand) -> Iterator[openai.OpenAI]:
    """The official client in front of each fake engine in turn."""
    with client_of(stand.url) as found:
        yield found


@pytest.fixture(scope="module", params=["llamacpp-real", "vllm-real"])
def real_server(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """The real command in front of the real embedded engine, and of a real vLLM where LLM_TEST_VLLM_URL names one."""
    if request.param == "llamacpp-real":
        yield request.getfixturevalue("real")
        return
    url = os.environ.get("LLM_TEST_VLLM_URL")
    if not url:
        pytest.skip("LLM_TEST_VLLM_URL names no server")
    with (
        Command("--engine", "vllm", "--base-url", url) as command,
        httpx.Client(base_url=command.url, timeout=120, trust_env=False) as found,
    ):
        yield found


@pytest.fixture
def official(real_server: httpx.Client) -> Iterator[openai.OpenAI]:
    """The official client in front of each real engine in turn."""
    with client_of(str(real_server.base_url).rstrip("/")) as found:
        yield found


@pytest.fixture
def real_model(real_server: httpx.Client, official: openai.OpenAI) -> str:
    engine = real_server.get("/ready").json()["engine_type"]
    return next(m.id for m in official.models.list() if m.id.startswith(engine))


@pytest.fixture(params=RELAYED)
def relayed(request: pytest.FixtureRequest, all_stands: dict[str, Stand]) -> Stand:
    found = all_stands[request.param]
    found.engine.reset()
    return found


def closed(kind: type[BaseModel], raw: Any) -> None:
    """OpenAI's own type, taken strictly: nothing missing, nothing of another type. The client itself never checks."""
    kind.model_validate_json(json.dumps(raw), strict=True)


def strict_chunks(raw: list[Any]) -> list[ChatCompletionChunk]:
    *items, done = raw
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(json.dumps(item), strict=True) for item in items]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# ----------------------------------------------------------------------------------------------- chat


def test_chat_complete(stand: Stand, client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=stand.model, messages=HI)
    (choice,) = done.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason, done.object) == (
        TEXT,
        "assistant",
        "stop",
        "chat.completion",
    )
    assert (
        done.usage
        and done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens > 0
        and done.id
        and done.created
    )


def test_chat_streamed(stand: Stand, client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=stand.model, messages=HI, stream=True))
    assert text_of(chunks) == TEXT and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert not any(c.usage for c in chunks) and len({c.id for c in chunks}) == 1


def test_chat_streamed_with_usage(stand: Stand, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=stand.model, messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        text_of(chunks) == TEXT
        and chunks[-1].usage
        and chunks[-1].choices == []
        and chunks[-1].usage.completion_tokens > 0
    )
    assert not any(c.usage for c in chunks[:-1])


def test_the_async_client(stand: Stand) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="any", max_retries=0) as client:
            full = await client.chat.completions.create(model=stand.model, messages=HI)
            stream = await client.chat.completions.create(model=stand.model, messages=HI, stream=True)
            return full.choices[0].message.content, text_of([chunk async for chunk in stream])

    assert asyncio.run(ask()) == (TEXT, TEXT)


def test_chat_passes_openais_strict_types(stand: Stand) -> None:
    closed(ChatCompletion, stand.post(CHAT, model=stand.model, messages=HI).json())
    stand.engine.tool_call = ("get_weather", {"city": "Paris"})
    closed(ChatCompletion, stand.post(CHAT, model=stand.model, messages=HI, tools=[WEATHER]).json())


def test_streamed_chat_passes_openais_strict_types(stand: Stand) -> None:
    assert strict_chunks(stand.events(CHAT, model=stand.model, messages=HI, stream_options={"include_usage": True}))
    stand.engine.tool_call = ("get_weather", {"city": "Paris"})
    assert strict_chunks(stand.events(CHAT, model=stand.model, messages=HI, tools=[WEATHER]))


def test_the_other_three_pass_openais_strict_types(stand: Stand) -> None:
    closed(Completion, stand.post("/v1/completions", model=stand.model, prompt="hi").json())
    for event in stand.events("/v1/completions", model=stand.model, prompt="hi")[:-1]:
        for choice in event["choices"]:
            choice["finish_reason"] = (
                choice["finish_reason"] or "stop"
            )  # null before the end, as OpenAI sends it, is not in its type
        closed(Completion, event)
    closed(CreateEmbeddingResponse, stand.post("/v1/embeddings", model=stand.model, input=["a", "b"]).json())
    for each in stand.client.get("/v1/models").json()["data"]:
        closed(Model, each)


def test_the_real_engines_answers_pass_openais_strict_types(real_server: httpx.Client, real_model: str) -> None:
    ask = {"model": real_model, "messages": HI, "max_tokens": 8, "temperature": 0}
    closed(ChatCompletion, real_server.post(CHAT, json=ask).json())
    assert strict_chunks(
        payloads(real_server.post(CHAT, json={**ask, "stream": True, "stream_options": {"include_usage": True}}))
    )
    closed(
        Completion,
        real_server.post("/v1/completions", json={"model": real_model, "prompt": "hi", "max_tokens": 4}).json(),
    )


def test_the_real_engine(official: openai.OpenAI, real_model: str) -> None:
    ask: Any = {"model": real_model, "messages": HI, "max_tokens": 12, "temperature": 0}
    full = official.chat.completions.create(**ask).choices[0].message.content
    assert full and text_of(list(official.chat.completions.create(**ask, stream=True))) == full
    parsed = official.chat.completions.parse(
        model=real_model,
        messages=[{"role": "user", "content": "The capital of France, as JSON."}],
        response_format=Capital,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)
    assert (
        official.completions.create(model=real_model, prompt="The capital of France is", max_tokens=4).choices[0].text
    )
    assert official.models.retrieve(real_model).id == real_model


def test_temperature_and_the_like_reach_the_engine(stand: Stand, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=stand.model,
        messages=HI,
        temperature=0.3,
        top_p=0.5,
        max_tokens=7,
        stop=["x"],
        seed=4,
        presence_penalty=0.1,
        frequency_penalty=0.2,
    )
    (ask,) = stand.engine.bodies
    found = ask["options"] if stand.engine.dialect == "ollama" else ask
    assert [
        found[name] for name in ("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty")
    ] == [0.3, 0.5, ["x"], 4, 0.1, 0.2]
    assert found.get("max_tokens", found.get("num_predict")) == 7


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(stand: Stand, client: openai.OpenAI, name: str) -> None:
    more: Any = {name: 2}
    done = client.chat.completions.create(model=stand.model, messages=HI, **more)
    assert done.choices[0].finish_reason == "length" and done.usage and done.usage.completion_tokens == 2


# ----------------------------------------------------------------------------------------------- tools


def test_tools_complete(stand: Stand, client: openai.OpenAI) -> None:
    stand.engine.tool_call = ("get_weather", {"city": "巴黎"})
    (choice,) = client.chat.completions.create(model=stand.model, messages=HI, tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert (
        call.type == "function"
        and call.id
        and (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "巴黎"})
    )


def test_tools_streamed(stand: Stand, client: openai.OpenAI) -> None:
    stand.engine.tool_call = ("get_weather", {"city": "巴黎"})
    with client.chat.completions.stream(model=stand.model, messages=HI, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.id and (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "巴黎"})


def test_a_tools_result_goes_back(stand: Stand, client: openai.OpenAI) -> None:
    stand.engine.tool_call = ("get_weather", {"city": "Paris"})
    asked = client.chat.completions.create(model=stand.model, messages=HI, tools=[WEATHER]).choices[0].message
    assert asked.tool_calls
    history: Any = [*HI, asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "sunny"}]
    stand.engine.tool_call = None
    assert (
        client.chat.completions.create(model=stand.model, messages=history, tools=[WEATHER]).choices[0].message.content
        == TEXT
    )
    last = stand.engine.bodies[-1]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant", "tool"] and last[2]["content"] == "sunny"


def test_tools_for_a_model_that_has_none_are_refused() -> None:
    for dialect in ("ollama", "sglang", "llamacpp"):
        stand = Stand(dialect)
        stand.engine.capabilities.remove("tools")
        with stand, client_of(stand.url) as client, pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(model=stand.model, messages=HI, tools=[WEATHER])


# ----------------------------------------------------------------------------------------------- response_format


def test_parse_into_a_pydantic_model(stand: Stand, client: openai.OpenAI) -> None:
    stand.engine.answer = lambda ask: '{"city":"Paris","population":2.1}'
    done = client.chat.completions.parse(model=stand.model, messages=HI, response_format=City)
    assert done.choices[0].message.parsed == City(city="Paris", population=2.1)
    (ask,) = stand.engine.bodies
    wanted = ask["format"] if stand.engine.dialect == "ollama" else ask["response_format"]["json_schema"]["schema"]
    assert set(wanted["properties"]) == {"city", "population"}


def test_json_object(stand: Stand, client: openai.OpenAI) -> None:
    stand.engine.answer = lambda ask: '{"a":1}'
    client.chat.completions.create(model=stand.model, messages=HI, response_format={"type": "json_object"})
    (ask,) = stand.engine.bodies
    assert (
        ask["format"] == "json"
        if stand.engine.dialect == "ollama"
        else ask["response_format"] == {"type": "json_object"}
    )


CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
GOOD, WRONG = (
    '{"city":"Paris","population":2.1}',
    '{"city":"Paris"}',
)  # what an engine that ignores or mistakes the schema may say


def test_an_answer_that_does_not_fit_is_asked_for_once_more(stand: Stand) -> None:
    said = iter([WRONG, GOOD])
    stand.engine.answer = lambda ask: next(said)
    reply = stand.post(CHAT, model=stand.model, messages=HI, response_format=CITY)
    assert reply.json()["choices"][0]["message"]["content"] == GOOD and len(stand.engine.bodies) == 2


@pytest.mark.parametrize("text", [WRONG, "no JSON", '{"city":"Paris","population":"many"}'])
def test_an_answer_that_never_fits_is_an_error(stand: Stand, text: str) -> None:
    stand.engine.answer = lambda ask: text
    assert "does not satisfy" in refused_v1(
        stand.post(CHAT, model=stand.model, messages=HI, response_format=CITY), "structured_output_invalid"
    )
    reply = stand.post(
        CHAT, model=stand.model, messages=HI, response_format=CITY, stream=True
    )  # an error event, or where all came at once no stream at all
    last = payloads(reply)[-1] if reply.status_code == 200 else reply.json()
    assert last["error"]["code"] == "structured_output_invalid" and "[DONE]" not in reply.text
    stand.engine.answer = lambda ask: GOOD
    assert stand.events(CHAT, model=stand.model, messages=HI, response_format=CITY)[-1] == "[DONE]"


def test_json_object_is_checked_too(stand: Stand) -> None:
    stand.engine.answer = lambda ask: "[1]"
    refused_v1(
        stand.post(CHAT, model=stand.model, messages=HI, response_format={"type": "json_object"}),
        "structured_output_invalid",
    )


def test_a_cut_answer_says_so_itself(stand: Stand) -> None:
    """OpenAI's own client raises LengthFinishReasonError for it."""
    stand.engine.answer = lambda ask: GOOD.replace(",", ", ")
    reply = stand.post(CHAT, model=stand.model, messages=HI, response_format=CITY, max_tokens=1)
    assert (
        reply.status_code == 200
        and reply.json()["choices"][0]["finish_reason"] == "length"
        and len(stand.engine.bodies) == 1
    )
    assert stand.events(CHAT, model=stand.model, messages=HI, response_format=CITY, max_tokens=1)[-1] == "[DONE]"


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_a_forced_call_that_is_cut_says_so_itself(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    """As a cut text does; our own routes refuse both, and say what helps."""
    stand = all_stands[dialect]
    stand.engine.reset()
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Par'}}
    pieces = []
    for delta, finish in (({"role": "assistant", "content": ""}, None), ({"tool_calls": [call]}, None), ({}, "length")):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": stand.engine.model}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        pieces.append(b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n")
    cut = Reply(headers={"content-type": "text/event-stream"}, pieces=[*pieces, b"data: [DONE]\n\n"])
    asked: Any = {"messages": HI, "tools": [WEATHER], "tool_choice": "required"}
    stand.engine.script_chat(cut)
    (choice,) = stand.post(CHAT, model=stand.model, **asked).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["tool_calls"][0]["function"]["arguments"]) == (
        "length",
        '{"city":"Par',
    )
    stand.engine.script_chat(cut)
    assert stand.events(CHAT, model=stand.model, **asked)[-1] == "[DONE]"
    assert len(stand.engine.bodies) == 2
    stand.engine.script_chat(cut)
    stand.engine.script_chat(cut)
    said = refused(stand.post("/chat", **asked), "structured_output_invalid")
    assert "max_tokens was reached" in said and "raise max_tokens" in said


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string"}}},
        {"items": {"type": "string"}},
        {"title": "integer"},
        {"required": ["a"]},
        {"description": "string", "type": "object"},
    ],
)
def test_a_response_formats_schema_is_json_schema(stand: Stand, schema: dict[str, Any]) -> None:
    """Not the short form of our own routes, which these could be as well."""
    stand.engine.answer = lambda ask: '{"a":"b"}'
    reply = stand.post(
        CHAT,
        model=stand.model,
        messages=HI,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    (ask,) = stand.engine.bodies[:1]
    if stand.engine.dialect == "llamacpp":
        schema = product.llamacpp_schema(schema)[0]
    assert (
        ask["format"] if stand.engine.dialect == "ollama" else ask["response_format"]["json_schema"]["schema"]
    ) == schema
    assert reply.status_code == 200, reply.text


def test_tools_and_a_response_format_are_refused_together(stand: Stand) -> None:
    """The format would leave no room for the call that is asked for (A1)."""
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        asked = {"tools": [WEATHER], "tool_choice": choice, "response_format": CITY}
        reply = stand.post(CHAT, model=stand.model, messages=HI, **asked)
        assert "tools" in refused_v1(reply, "invalid_request") and not stand.engine.bodies


def test_a_tool_that_is_no_function_is_refused(stand: Stand) -> None:
    """Ollama reads no other type: it would offer the model a function without a name, and say nothing."""
    for tool in ({"type": "custom", "custom": {"name": "grep"}}, {"type": "function", "function": {"name": ""}}):
        reply = stand.post(CHAT, model=stand.model, messages=HI, tools=[WEATHER, tool])
        assert "tools: " in refused_v1(reply, "invalid_request") and not stand.engine.bodies


def test_tools_offered_beside_a_format_give_a_call_or_an_answer_in_that_format(stand: Stand) -> None:
    stand.engine.capabilities = [*{*stand.engine.capabilities, "tools"}]
    asked = {"model": stand.model, "messages": HI, "tools": [WEATHER], "response_format": CITY}
    stand.engine.tool_call = ("get_weather", {"city": "Paris"})
    assert stand.post(CHAT, **asked).json()["choices"][0]["message"]["tool_calls"]
    stand.engine.tool_call = None
    answers = ["no JSON", '{"city":"Paris","population":1}']
    stand.engine.answer = lambda ask: answers.pop(0)
    stand.engine.requests.clear()
    reply = stand.post(CHAT, **asked)
    assert json.loads(reply.json()["choices"][0]["message"]["content"])["city"] == "Paris", reply.text
    first, second = stand.engine.bodies
    name = "format" if stand.engine.dialect == "ollama" else "response_format"
    assert name not in first and "tools" in first and name in second and "tools" not in second
    stand.engine.answer = lambda ask: "no JSON"
    assert "structured_output_invalid" in stand.post(CHAT, **asked, stream=True).text


def test_the_call_of_a_named_function_is_a_call_although_the_engine_says_stop(all_stands: dict[str, Stand]) -> None:
    """vLLM says "stop" behind it."""
    stand = all_stands["vllm"]
    stand.engine.reset()
    stand.engine.capabilities = [*{*stand.engine.capabilities, "tools"}]
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    full = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    delta = {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": message, "finish_reason": "stop"}],
    }
    asked = {
        "model": stand.model,
        "messages": HI,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }
    stand.engine.script(Reply(headers={"content-type": "application/json"}, pieces=[json.dumps(full).encode()]))
    reply = stand.post(CHAT, **asked)
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["tool_calls"] == [call], reply.text
    events = [b"data: " + json.dumps(delta).encode() + b"\n\n", b"data: [DONE]\n\n"]
    stand.engine.script(Reply(headers={"content-type": "text/event-stream"}, pieces=events, chunked=True))
    assert stand.events(CHAT, **asked)[-1] == "[DONE]"


@pytest.mark.parametrize(
    "usage",
    [
        "3",
        {"prompt_tokens": None, "completion_tokens": "3"},
        {"prompt_tokens": -1},
        {"prompt_tokens": 1.5},
        {"completion_tokens": 3},
        7,
        [1],
    ],
)
def test_malformed_usage_is_an_error(relayed: Stand, usage: Any) -> None:
    choice = {"index": 0, "finish_reason": "stop"}
    said = {"role": "assistant", "content": "x"}
    if relayed.engine.dialect == "vllm":
        answer = {"choices": [{**choice, "message": said}], "usage": usage}
        reply = Reply(headers={"content-type": "application/json"}, pieces=[json.dumps(answer).encode()])
    else:  # a stream, folded
        event = b"data: " + json.dumps({"choices": [{**choice, "delta": said}], "usage": usage}).encode()
        reply = Reply(headers={"content-type": "text/event-stream"}, pieces=[event + b"\n\ndata: [DONE]\n\n"])
    relayed.engine.script(reply)
    refused_v1(relayed.post(CHAT, model=relayed.model, messages=HI), "bad_engine_reply")


def test_a_check_that_finds_the_engine_failing_says_so(relayed: Stand) -> None:
    """What the engine refuses in the middle of a constrained answer is a ValueError too, and no answer that does not
    fit."""
    relayed.engine.script(
        Reply(
            headers={"content-type": "application/json"},
            pieces=[b'{"error":{"message":"json schema too odd","code":400}}'],
        )
    )
    assert "does not fit" not in refused_v1(
        relayed.post(CHAT, model=relayed.model, messages=HI, response_format=CITY), "invalid_request"
    )


@pytest.mark.parametrize("other", ["grammar", "json_schema", "regex", "ebnf", "structured_outputs"])
def test_two_constraints_are_refused(relayed: Stand, other: str) -> None:
    value: Any = {
        "grammar": 'root ::= "a"',
        "json_schema": {"type": "object"},
        "regex": "a",
        "ebnf": 'root ::= "a"',
        "structured_outputs": {"regex": "a"},
    }[other]
    reply = relayed.post(CHAT, model=relayed.model, messages=HI, response_format=CITY, **{other: value})
    assert reply.status_code == 400 and other in refused_v1(reply, reply.headers["x-error-kind"])
    assert not relayed.engine.bodies


@pytest.mark.parametrize(
    "form",
    [
        {"type": "nope"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9/x"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": 7}},
        {"type": "json_schema", "json_schema": 7},
        "json",
        7,
        [],
    ],
    ids=str,
)
def test_a_bad_response_format_is_refused(stand: Stand, form: Any) -> None:
    reply = stand.post(CHAT, model=stand.model, messages=HI, response_format=form)
    assert "response_format" in refused_v1(reply, reply.headers["x-error-kind"]) or "schema" in reply.text
    assert reply.status_code == 400
    assert not stand.engine.bodies


# ----------------------------------------------------------------------------------------------- the other three


def test_completions(stand: Stand, client: openai.OpenAI) -> None:
    done = client.completions.create(model=stand.model, prompt="The capital", max_tokens=64)
    assert done.object == "text_completion" and done.choices[0].text == TEXT and done.choices[0].finish_reason == "stop"
    pieces = list(client.completions.create(model=stand.model, prompt="The capital", stream=True))
    assert "".join(c.choices[0].text for c in pieces if c.choices) == TEXT
    assert stand.engine.bodies[0]["prompt"] == "The capital"  # raw: no chat template


def test_embeddings_as_floats_and_as_the_client_asks(stand: Stand, client: openai.OpenAI) -> None:
    wanted, _ = stand.engine._vectors({"input": ["a", "bcd"]})
    for encoding in ("float", "base64", None):
        more: Any = {"encoding_format": encoding} if encoding else {}
        done = client.embeddings.create(model=stand.model, input=["a", "bcd"], **more)
        assert [each.index for each in done.data] == [0, 1] and done.usage.prompt_tokens > 0 and done.object == "list"
        for each, vector in zip(done.data, wanted, strict=True):
            found = (
                each.embedding
                if not isinstance(each.embedding, str)
                else list(struct.unpack(f"<{len(vector)}f", base64.b64decode(each.embedding)))
            )
            assert found == pytest.approx(vector)
    assert client.embeddings.create(model=stand.model, input="one").data[0].embedding


def test_bad_embedding_inputs(stand: Stand) -> None:
    for bad in ([], [[]], {}, 7, [7, "a"], [None]):
        if stand.engine.dialect == "ollama":
            refused_v1(stand.post("/v1/embeddings", model=stand.model, input=bad), "invalid_request")
    refused_v1(stand.post("/v1/embeddings", model=stand.model), "invalid_request")
    refused_v1(stand.post("/v1/embeddings", model=stand.model, input="a", encoding_format="hex"), "invalid_request")


def test_what_means_nothing_to_embeddings_is_refused(all_stands: dict[str, Stand]) -> None:
    for stand in all_stands.values():
        for field, value in (
            ("stream", True),
            ("max_tokens", 5),
            ("tool_choice", "required"),
            ("messages", [{"role": "user", "content": "x"}]),
        ):
            reply = stand.post("/v1/embeddings", model=stand.model, input="a", **{field: value})
            assert reply.status_code == 400 and field in reply.json()["error"]["message"], (stand.engine.dialect, field)


@pytest.mark.parametrize("name", ["unix:/etc/passwd", "file:/etc/passwd", "http:/evil/x", "a/b:/c", "x:"])
def test_a_model_name_that_is_a_path_or_url_is_not_found(stand: Stand, name: str) -> None:
    refused_v1(stand.post("/v1/embeddings", model=name, input="a"), "model_not_found")
    assert not stand.engine.bodies


def test_a_trailing_slash_is_the_same_route(stand: Stand) -> None:
    assert stand.client.get("/v1/models/").json() == stand.client.get("/v1/models").json()


@pytest.mark.parametrize("dialect", RELAYED)
def test_only_sglang_takes_an_adapter_behind_a_models_name(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    reply = stand.post(CHAT, model=f"{stand.model}:adapter", messages=HI)
    if dialect == "sglang":
        assert reply.status_code == 200
    else:
        refused_v1(reply, "model_not_found")


def test_models(stand: Stand, client: openai.OpenAI) -> None:
    found = [m.id for m in client.models.list()]
    assert len(found) == 1 and found[0].startswith(f"{stand.engine.dialect}/m")
    for name in (found[0], found[0].partition("/")[2]):
        assert client.models.retrieve(name).owned_by == stand.engine.dialect
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_every_listed_name_can_be_asked(stand: Stand, client: openai.OpenAI) -> None:
    for model in client.models.list():
        assert client.chat.completions.create(model=model.id, messages=HI).choices[0].message.content == TEXT
    assert client.chat.completions.create(model="m", messages=HI).choices[0].message.content == TEXT


def questions(stand: Stand) -> int:
    """What the engine was asked beside generations."""
    return len(stand.engine.requests) - len(stand.engine.bodies)


@pytest.mark.parametrize(("path", "named"), [(CHAT, {"model": "m"}), ("/chat", {"model_name": "m"}), ("/chat", {})])
def test_a_request_is_one_request_to_the_engine(stand: Stand, path: str, named: dict[str, str]) -> None:
    """A busy engine answers even small questions late: asking it for its models first cost 40 ms a request."""
    for number in range(21):
        assert stand.post(path, messages=HI, **named).status_code == 200
        if not number:
            stand.engine.reset()
    assert len(stand.engine.bodies) == 20
    assert questions(stand) <= 2  # the watch over the engine asks now and then


@pytest.mark.parametrize("dialect", DIALECTS)
def test_concurrent_first_requests_probe_the_engine_once(dialect: Dialect) -> None:
    asked = []
    for at_once in (1, 16):
        with Stand(dialect) as stand:
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                replies = [
                    pool.submit(stand.post, CHAT, model=stand.model, messages=HI, max_tokens=5) for _ in range(at_once)
                ]
            assert {reply.result().status_code for reply in replies} == {200}
            asked.append(questions(stand))
    assert asked[1] < asked[0] + 8, asked  # 15 more if each asked; the server's own watch may have looked meanwhile


def test_aliases_and_slashes(all_stands: dict[str, Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    sglang = all_stands["sglang"].engine
    sglang.reset()
    monkeypatch.setenv("SGLANG_BASE_URL", sglang.base_url)
    stand = Stand("vllm", aliases={"fast": "vllm/Qwen/Qwen3", "small": "sglang/m"})
    stand.engine.model, stand.engine.models = "Qwen/Qwen3", ["Qwen/Qwen3"]
    with stand, client_of(stand.url) as client:
        assert {m.id for m in client.models.list()} == {"vllm/Qwen/Qwen3", "sglang/m", "fast", "small"}
        for name in ("fast", "vllm/Qwen/Qwen3", "Qwen/Qwen3"):
            client.chat.completions.create(model=name, messages=HI)
            assert stand.engine.bodies[-1]["model"] == "Qwen/Qwen3"
        for name in ("small", "sglang/m", "m"):
            client.chat.completions.create(model=name, messages=HI)
        assert len(sglang.bodies) == 3
        assert client.models.retrieve("fast").id == "fast"


def test_an_alias_goes_to_the_first_engine_that_serves_its_model(
    all_stands: dict[str, Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without [[endpoint]] tables, as with them."""
    sglang = all_stands["sglang"].engine
    sglang.reset()
    monkeypatch.setenv("SGLANG_BASE_URL", sglang.base_url)
    aliases = {"best": ["vllm/none", "sglang/m"], "good": ["vllm/m", "sglang/m"]}
    with Stand("vllm", aliases=aliases) as stand:
        assert stand.post(CHAT, model="best", messages=HI).headers["x-endpoint"] == "sglang"
        assert stand.post(CHAT, model="good", messages=HI).headers["x-endpoint"] == "vllm"
        refused_v1(stand.post(CHAT, model="vllm/none", messages=HI), "model_not_found")


def test_the_aliases_of_a_given_fleet_are_listed(all_stands: dict[str, Stand]) -> None:
    engines = [all_stands[name].engine for name in ("vllm", "sglang")]
    configs = [product.EndpointConfig(engine=each.dialect, base_url=each.base_url) for each in engines]
    llm = product.Settings(endpoints=tuple(configs), aliases={"fast": "sglang/m"}).inferencer()
    with contextlib.closing(llm), serving(product.create_app(product.Settings(), llm)) as url, client_of(url) as client:
        listed = {model.id: model.owned_by for model in client.models.list()}
        assert listed == {"vllm/m": "vllm", "sglang/m": "sglang", "fast": "sglang"}


# ----------------------------------------------------------------------------------------------- errors


def test_a_wrong_key_is_an_authentication_error() -> None:
    with Stand("vllm", api_keys=("right",)) as stand:
        with client_of(stand.url, "right") as client:
            assert client.models.list().data
        with client_of(stand.url, "wrong") as client:
            for call in (
                lambda: client.models.list(),
                lambda: client.chat.completions.create(model="m", messages=HI),
                lambda: client.embeddings.create(model="m", input="a"),
            ):
                with pytest.raises(openai.AuthenticationError) as info:
                    call()
                assert info.value.code == "invalid_api_key" and info.value.type == "authentication_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_model_is_a_not_found_error(stand: Stand, client: openai.OpenAI, stream: bool) -> None:
    for name in ("nope", f"{stand.engine.dialect}/nope", "nope/m"):
        with pytest.raises(openai.NotFoundError) as info:
            client.chat.completions.create(model=name, messages=HI, stream=stream)
        assert info.value.code == "model_not_found" and info.value.type == "not_found_error"


BAD: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": "7"},
    {"max_tokens": True},
    {"max_tokens": 10**12},
    {"temperature": 3},
    {"temperature": "1"},
    {"top_p": 0},
    {"n": 0},
    {"n": 129},
    {"stop": 7},
    {"stop": [""]},
    {"seed": 1.5},
    {"presence_penalty": 3},
    {"top_logprobs": 21},
    {"logprobs": "x"},
    {"stream": "true"},
    {"tools": {}},
    {"tools": [7]},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [7]},
    {"stream_options": 7},
    {"model": 7},
    {"max_completion_tokens": 0},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_field_is_a_bad_request_and_goes_nowhere(stand: Stand, bad: dict[str, Any]) -> None:
    reply = stand.post(CHAT, **{"model": stand.model, "messages": HI, **bad})
    assert next(iter(bad)) in refused_v1(reply, "invalid_request")
    assert not stand.engine.bodies


ODD: list[dict[str, Any]] = [
    *(
        {"messages": [bad]}
        for bad in (
            {},
            {"role": 7},
            {"role": "user", "content": 7},
            {"role": "user", "content": [7]},
            {"role": "user", "content": [{"type": ["image_url"]}]},
            {"role": "user", "content": [{"type": 7}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": None}]},
            {"role": "user", "content": {"type": "image_url"}},
            {"role": "assistant", "tool_calls": 7},
            {"role": "assistant", "tool_calls": [7]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
            },
            {"role": "tool", "content": "x", "tool_call_id": 7},
            {"role": "user", "content": "x", "name": 7},
        )
    ),
    *(
        {"tools": bad}
        for bad in (
            [{}],
            [{"type": "function"}],
            [{"type": "function", "function": 7}],
            [{"type": "function", "function": {"name": "f", "parameters": 7}}],
            [[]],
        )
    ),
    *(
        {"tool_choice": bad, "tools": [WEATHER]}
        for bad in (
            7,
            {},
            [],
            {"type": "function"},
            {"type": "function", "function": 7},
            {"type": "function", "function": {"name": "other"}},
        )
    ),
    *({"reasoning_effort": bad} for bad in (7, [], {}, "huge")),
    {"stream_options": {"include_usage": "x"}},
    {"stream_options": {"include_usage": True}},
    {"logprobs": 7},
    {"top_logprobs": 3},
    {"response_format": {"type": ["json_schema"]}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
    {"logit_bias": 7},
    {"metadata": 7},
    {"user": 7},
    {"": 1},
    {"\n": 1},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: json.dumps(odd)[:80])
def test_no_body_breaks_us(stand: Stand, odd: dict[str, Any]) -> None:
    """Whether it is refused here or there: never our own failure, and always in the format."""
    stand.engine.script(default_answer(stand))
    reply = stand.post(CHAT, **{"model": stand.model, "messages": HI, **odd})
    assert reply.status_code in (200, 400), reply.text


@pytest.mark.parametrize("prompt", [7, [], {}, [7], [[1, 2]], ["a"], ""], ids=str)
def test_no_prompt_breaks_us(stand: Stand, prompt: Any) -> None:
    stand.engine.script(default_answer(stand))
    reply = stand.post("/v1/completions", model=stand.model, prompt=prompt)
    assert reply.status_code in (200, 400), reply.text


def test_a_bad_field_is_a_bad_request_error_of_the_client(client: openai.OpenAI, stand: Stand) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=stand.model, messages=HI, temperature=3)


def test_what_is_missing_is_named(stand: Stand) -> None:
    for path, needed in ((CHAT, "messages"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        assert needed in refused_v1(stand.post(path, model=stand.model), "invalid_request")
        assert "model" in refused_v1(
            stand.post(path, **{needed: HI if needed == "messages" else "hi"}), "invalid_request"
        )


def test_other_paths_and_methods_speak_openai_too(stand: Stand) -> None:
    refused_v1(stand.client.get("/v1/nope"), "not_found")
    refused_v1(stand.client.get(CHAT), "method_not_allowed")


@pytest.mark.parametrize(
    ("reply", "error", "kind"),
    [
        (Reply(status=503, pieces=[b'{"error":"server busy"}']), openai.InternalServerError, "engine_overloaded"),
        (Reply(status=500, pieces=[b'{"error":"CUDA out of memory"}']), openai.InternalServerError, "out_of_memory"),
        (
            Reply(status=400, pieces=[b'{"error":{"message":"This model\'s maximum context length is 8 tokens"}}']),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (
            Reply(pieces=[b"<html>"], headers={"content-type": "text/html"}),
            openai.InternalServerError,
            "bad_engine_reply",
        ),
        (
            Reply(pieces=[b'{"error":{"message":"boom","code":500}}'], headers={"content-type": "application/json"}),
            openai.InternalServerError,
            "bad_engine_reply",
        ),
        (
            Reply(
                pieces=[b'{"id":"x","choices":['],
                headers={"content-type": "application/json", "content-length": "900"},
                end="eof",
            ),
            openai.InternalServerError,
            "bad_engine_reply",
        ),
        (
            Reply(status=302, headers={"location": "http://127.0.0.1:9/"}),
            openai.InternalServerError,
            "bad_engine_reply",
        ),
        (
            Reply(pieces=[b"\x1f\x8b\x08"], headers={"content-encoding": "gzip"}),
            openai.InternalServerError,
            "bad_engine_reply",
        ),
    ],
    ids=["busy", "memory", "context", "html", "error under 200", "early end", "redirect", "gzip"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_failure_before_the_first_byte(
    stand: Stand, client: openai.OpenAI, reply: Reply, error: type[openai.APIStatusError], kind: str, stream: bool
) -> None:
    stand.engine.script_chat(reply)
    with pytest.raises(error) as info:
        client.chat.completions.create(model=stand.model, messages=HI, stream=stream)
    assert info.value.code == kind


@pytest.mark.parametrize(
    "said",
    [
        b'{ "error" : {"message":"boom"}}',
        b'{"object":"error","message":"boom","code":500}',
        b"{}",
        b'{"choices":[',
        b'{"choices":[]}',
        b'{"id":"x","choices":"y"}',
    ],
)
def test_what_is_no_completion_is_not_passed_on_as_one(all_stands: dict[str, Stand], said: bytes) -> None:
    stand = all_stands["vllm"]
    stand.engine.reset().script(Reply(pieces=[said], headers={"content-type": "application/json"}))
    refused_v1(stand.post(CHAT, model=stand.model, messages=HI), "bad_engine_reply")


def test_an_engine_that_is_away(client: openai.OpenAI) -> None:
    with Stand("sglang") as stand, client_of(stand.url) as own:
        stand.engine.stop()
        with pytest.raises(openai.InternalServerError) as info:
            own.chat.completions.create(model="m", messages=HI)
        assert (info.value.status_code, info.value.code) == (503, "engine_unavailable")
        stand.engine.start()


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("end", ["eof", "reset", "clean"])
def test_a_late_failure_raises_in_the_client(stand: Stand, client: openai.OpenAI, end: Any, keep: int) -> None:
    """Never a clean end: an early end of the stream, even a tidy one, is an error."""
    full = default_stream(stand)
    stand.engine.script(Reply(headers=full.headers, pieces=full.pieces[:keep], end=end, chunked=True, gap=0.02))
    with pytest.raises(openai.APIError):
        for _ in client.chat.completions.create(model=stand.model, messages=HI, stream=True):
            pass
    reply = scripted_text(
        stand, Reply(headers=full.headers, pieces=full.pieces[:keep], end=end, chunked=True, gap=0.02)
    )
    assert (
        "[DONE]" not in reply
        and json.loads(reply.strip().rpartition("\n\n")[2].removeprefix("data: "))["error"]["code"]
        == "bad_engine_reply"
    )


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"EngineCore died","code":500}}\n\n',
        b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n',
        b'data: { "error": {"message": "EngineCore died"}}\n\n',
        b'error: {"code":500,"message":"EngineCore died"}\n\n',
        b'data: {"object":"error","message":"EngineCore died","code":500}\n\n',
        b'data: {"id":"x","choices":[],"error":{"message":"EngineCore died"}}\n\n',
        b'data: {"id": "x", "object": "error", "message": "EngineCore died"}\n\n',
    ],
    ids=["tight", "spaced", "loose", "llama.cpp", "object", "not first", "object, spaced"],
)
def test_an_error_event_is_never_a_clean_end(relayed: Stand, event: bytes) -> None:
    """Whatever follows it, [DONE] included: vLLM sends one after its error."""
    full = default_stream(relayed)
    broken = Reply(headers=full.headers, pieces=[*full.pieces[:3], event, b"data: [DONE]\n\n"], chunked=True)
    for relayed.engine.slice in (0, 1):
        text = scripted_text(relayed, broken)
        assert "[DONE]" not in text and '"error"' in text.rpartition("data: ")[2]
    with client_of(relayed.url) as client, pytest.raises(openai.APIError):
        relayed.engine.script(broken)
        for _ in client.chat.completions.create(model=relayed.model, messages=HI, stream=True):
            pass


def test_an_error_event_is_an_event_of_its_own(relayed: Stand) -> None:
    """The engine's last event came without its blank line: what follows it must not become a second line of that
    event."""
    full = default_stream(relayed)
    first, second = (piece.strip() for piece in b"".join(full.pieces).split(b"\n\n")[:2])
    for tail in (b"\n", b"\r\n", b""):
        broken = Reply(headers=full.headers, pieces=[first + b"\n\n", second + tail], chunked=True, gap=0.02)
        with client_of(relayed.url) as client, pytest.raises(openai.APIError, match="ended early"):
            relayed.engine.script(broken)
            for _ in client.chat.completions.create(model=relayed.model, messages=HI, stream=True):
                pass


@pytest.mark.parametrize(
    "event", [b"data: not json at all\n\n", b"garbage\n\n", b"<html>502</html>\n\n", b'data: {"id":"x"\n\n']
)
def test_garbage_in_a_stream_is_never_a_clean_end(all_stands: dict[str, Stand], event: bytes) -> None:
    stand = all_stands["vllm"]
    stand.engine.reset()
    full = default_stream(stand)
    text = scripted_text(
        stand, Reply(headers=full.headers, pieces=[*full.pieces[:3], event, *full.pieces[3:]], chunked=True)
    )
    assert "[DONE]" not in text and '"error"' in text.rpartition("data: ")[2]


def test_a_cut_stream_whose_text_contains_done_is_still_cut(relayed: Stand) -> None:
    relayed.engine.text = "it ends with data: [DONE] and more words"
    full = default_stream(relayed)
    text = scripted_text(relayed, Reply(headers=full.headers, pieces=full.pieces[:-3], end="clean", chunked=True))
    assert json.loads(text.strip().rpartition("\n\n")[2].removeprefix("data: "))["error"]["code"] == "bad_engine_reply"


@pytest.mark.parametrize("space", [b"", b" "])
def test_an_aborted_stream_is_no_answer(relayed: Stand, space: bytes) -> None:
    full = default_stream(relayed)
    said = re.sub(rb'"finish_reason": ?"\w+"', b'"finish_reason":%s"abort"' % space, b"".join(full.pieces))
    text = scripted_text(relayed, Reply(headers=full.headers, pieces=[said], chunked=True))
    assert "[DONE]" not in text and "engine_unavailable" in text


def test_nothing_follows_the_done_event(relayed: Stand) -> None:
    """In whatever form the end comes, and whether the engine ends the reply behind it or not."""
    full = default_stream(relayed)
    events = b"".join(full.pieces).rpartition(b"data: [DONE]")[0]
    for tail in (b"data:[DONE]\n\n", b'data: [DONE]\n\ndata: {"id":"late"}\n\n', b"data: [DONE]\r\n\r\n: bye\n\n"):
        text = scripted_text(relayed, Reply(headers=full.headers, pieces=[events, tail], chunked=True, end="stall"))
        assert text.endswith("\n\ndata: [DONE]\n\n") and "late" not in text and text.count("[DONE]") == 1


def test_a_stream_without_a_finish_is_cut(relayed: Stand) -> None:
    """[DONE] after half an answer: no choice has a finish reason."""
    full = default_stream(relayed)
    text = scripted_text(
        relayed, Reply(headers=full.headers, pieces=[*full.pieces[:3], b"data: [DONE]\n\n"], chunked=True)
    )
    assert "[DONE]" not in text


def test_text_that_looks_like_an_error_or_an_end_is_text(stand: Stand) -> None:
    stand.engine.text = 'say data: [DONE] and {"error": 1} and error: now \n\nerror: x'
    full = stand.post(CHAT, model=stand.model, messages=HI).json()["choices"][0]["message"]["content"]
    assert full == stand.engine.text
    events = stand.events(CHAT, model=stand.model, messages=HI)
    assert events[-1] == "[DONE]" and text_of(strict_chunks(events)) == full


def default_answer(stand: Stand) -> Reply:
    streamed = stand.engine.dialect in ("sglang", "llamacpp")  # a complete answer of theirs is a stream, folded
    ask = {"model": "m", "messages": HI, "stream": streamed}
    return stand.engine._native(True, ask) if stand.engine.dialect == "ollama" else stand.engine._openai(True, ask)


def default_stream(stand: Stand) -> Reply:
    if stand.engine.dialect == "ollama":
        return stand.engine._native(True, {"model": "m", "messages": HI})
    return stand.engine._openai(True, {"messages": HI, "stream": True, "model": "m"})


def scripted_text(stand: Stand, reply: Reply, **more: Any) -> str:
    stand.engine.script(reply)
    return stand.post(CHAT, model=stand.model, messages=HI, stream=True, **more).text


# ----------------------------------------------------------------------------------------------- leaving


def test_leaving_in_mid_stream_closes_the_upstream(stand: Stand, client: openai.OpenAI) -> None:
    cut, stand.engine.pace, stand.engine.text = stand.engine.cut, 0.05, "word " * 2000
    with client.chat.completions.create(model=stand.model, messages=HI, stream=True) as stream:
        next(iter(stream))
    stand.engine.wait(lambda: stand.engine.live == 0, SOON)
    assert stand.engine.cut == cut + 1


def test_a_cancelled_task_closes_the_upstream(stand: Stand) -> None:
    cut, stand.engine.pace, stand.engine.text = stand.engine.cut, 0.05, "word " * 2000

    async def leave(stream: bool) -> None:
        async with openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="any", max_retries=0) as client:

            async def ask() -> None:
                answer = await client.chat.completions.create(model=stand.model, messages=HI, stream=stream)
                if stream:
                    async for _ in answer:  # type: ignore[union-attr]
                        pass

            task = asyncio.create_task(ask())
            await asyncio.to_thread(stand.engine.wait, lambda: stand.engine.live == 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    for stream in (True, False):
        asyncio.run(leave(stream))
        stand.engine.wait(lambda: stand.engine.live == 0, SOON)
    assert stand.engine.cut == cut + 2


def test_a_client_timeout_closes_the_upstream(stand: Stand) -> None:
    stand.engine.script(Reply(delay=60))
    with client_of(stand.url) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=stand.model, messages=HI)
    stand.engine.wait(lambda: stand.engine.live == 0, SOON)
    until(lambda: stand.gateway.in_flight == 0, SOON)


# ----------------------------------------------------------------------------------------------- fields


def test_harmless_fields_are_named_and_left_out(stand: Stand, client: openai.OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(
        model=stand.model, messages=HI, user="u", metadata={"a": "b"}, store=True, service_tier="flex"
    )
    assert set(reply.headers["x-ignored-fields"].split(", ")) == {"user", "metadata", "store", "service_tier"}
    assert not {"user", "metadata", "store", "service_tier"} & set(stand.engine.bodies[0])
    stream = client.chat.completions.with_raw_response.create(model=stand.model, messages=HI, user="u", stream=True)
    assert stream.headers["x-ignored-fields"] == "user"
    assert (
        "x-ignored-fields"
        not in client.chat.completions.with_raw_response.create(model=stand.model, messages=HI).headers
    )


@pytest.mark.parametrize(
    "field",
    [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "functions",
        "function_call",
        "nonsense",
        "logit_bias_x",
        "best_of",
        "chat_template",
        "web_search_options",
        "audio",
        "documents",
        "mm_processor_kwargs",
        "kv_transfer_params",
        "lora_path",
        "custom_logit_processor",
        "vllm_xargs",
        "session_params",
    ],
)
def test_a_field_that_the_engine_ignores_or_that_is_unsafe_is_refused(stand: Stand, field: str) -> None:
    reply = stand.post(CHAT, model=stand.model, messages=HI, **{field: {"x": 1}})
    assert field in refused_v1(reply, "unsupported_feature") and not stand.engine.bodies


def test_one_engines_constraint_is_not_anothers(all_stands: dict[str, Stand]) -> None:
    for dialect, field in (
        ("sglang", "structured_outputs"),
        ("llamacpp", "structured_outputs"),
        ("ollama", "structured_outputs"),
        ("vllm", "regex"),
        ("vllm", "ebnf"),
        ("llamacpp", "regex"),
        ("vllm", "grammar"),
        ("ollama", "n"),
    ):
        stand = all_stands[dialect]
        stand.engine.reset()
        bad: Any = 2 if field == "n" else "a+" if field != "structured_outputs" else {"regex": "a+"}
        assert field in refused_v1(
            stand.post(CHAT, model=stand.model, messages=HI, **{field: bad}), "unsupported_feature"
        )
        assert not stand.engine.bodies


def test_one_engines_constraint_is_its_own(all_stands: dict[str, Stand]) -> None:
    for dialect, field, value in (
        ("vllm", "structured_outputs", {"regex": "a+"}),
        ("sglang", "regex", "a+"),
        ("sglang", "ebnf", "root ::= 'a'"),
        ("llamacpp", "grammar", 'root ::= "a"'),
    ):
        stand = all_stands[dialect]
        stand.engine.reset()
        stand.engine.answer = lambda ask: "a"
        assert stand.post(CHAT, model=stand.model, messages=HI, **{field: value}).status_code == 200
        assert stand.engine.bodies[0][field] == value


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"type": "image_url", "image_url": "https://evil.example/x.png"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/x.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:9/x.wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "image_url", "image_url": {"url": " http://127.0.0.1:9/x.png"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
    ],
    ids=lambda part: json.dumps(part)[:90],
)
def test_a_url_in_a_message_is_refused(stand: Stand, part: Any) -> None:
    no_place(stand, part)


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "video_url", "video_url": {}}], ids=json.dumps)
def test_a_part_without_its_data_is_refused(stand: Stand, part: Any) -> None:
    stand.engine.reset()
    messages = [{"role": "user", "content": [part]}]
    assert "must hold a data: URL" in refused_v1(
        stand.post(CHAT, model=stand.model, messages=messages), "invalid_request"
    )
    assert not stand.engine.asked


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "http://127.0.0.1:9/x.png"},
        {"image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"audio_url": "http://127.0.0.1:9/x.wav"},
        {"video_url": "http://127.0.0.1:9/x.mp4"},
        {"type": "text", "text": "x", "uuid": "u", "image_url": "http://127.0.0.1:9/x.png"},
        {"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"},
        {"type": "image_embeds", "image_embeds": "http://127.0.0.1:9/x"},
        {"type": "image", "image": "http://127.0.0.1:9/x.png"},
        {"type": "IMAGE_URL", "image_url": {"url": "http://127.0.0.1:9/x"}},
    ],
    ids=lambda part: json.dumps(part)[:90],
)
def test_a_url_in_a_form_that_vllm_also_accepts_is_refused(all_stands: dict[str, Stand], part: Any) -> None:
    """Beside the documented ones (vllm/entrypoints/chat_utils.py): without a type, with a uuid, and older names."""
    all_stands["vllm"].engine.reset()
    no_place(all_stands["vllm"], part)


def no_place(stand: Stand, part: Any) -> None:
    reply = stand.post(
        CHAT, model=stand.model, messages=[{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]
    )
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert not stand.engine.bodies


def test_a_url_in_an_embeddings_input_is_refused(all_stands: dict[str, Stand]) -> None:
    """SGLang takes {"text", "image"} there."""
    relayed = all_stands["sglang"]
    relayed.engine.reset()
    for bad in (
        [{"image": "http://127.0.0.1:9/x.png"}],
        [{"text": "x", "image": "/etc/passwd"}],
        {"image": "http://127.0.0.1:9/x.png"},
    ):
        refused_v1(relayed.post("/v1/embeddings", model=relayed.model, input=bad), "invalid_request")
    assert not relayed.engine.bodies


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_image_as_data_is_passed(dialect: Dialect) -> None:
    with Stand(dialect, capabilities=["vision"]) as stand, client_of(stand.url) as client:
        content: Any = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
        assert (
            client.chat.completions.create(model=stand.model, messages=[{"role": "user", "content": content}])
            .choices[0]
            .message.content
            == TEXT
        )
        assert PIXEL.partition(",")[2] in json.dumps(stand.engine.bodies[-1]["messages"])


@pytest.mark.parametrize("dialect", ["ollama"])  # the others say so themselves
def test_an_image_for_a_model_without_vision_is_refused(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    assert "image" in refused_v1(
        stand.post(CHAT, model=stand.model, messages=[{"role": "user", "content": content}]), "unsupported_feature"
    )
    assert not stand.engine.bodies


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("slice_", [0, 1])
def test_reasoning_comes_under_one_name(dialect: Dialect, slice_: int) -> None:
    with Stand(dialect, reasoning="let me think") as stand:
        stand.engine.slice = slice_
        message = stand.post(CHAT, model=stand.model, messages=HI).json()["choices"][0]["message"]
        assert (
            message["reasoning"] == "let me think" and message["content"] == TEXT and "reasoning_content" not in message
        )
        deltas = [c["delta"] for e in stand.events(CHAT, model=stand.model, messages=HI)[:-1] for c in e["choices"]]
        assert (
            "".join(d.get("reasoning") or "" for d in deltas) == "let me think"
            and "".join(d.get("content") or "" for d in deltas) == TEXT
        )
        assert not any("reasoning_content" in d for d in deltas)


def test_renaming_the_reasoning_field_leaves_the_text_unchanged(relayed: Stand) -> None:
    relayed.engine.text = 'the key "reasoning_content": is a word here'
    assert (
        relayed.post(CHAT, model=relayed.model, messages=HI).json()["choices"][0]["message"]["content"]
        == relayed.engine.text
    )
    assert text_of(strict_chunks(relayed.events(CHAT, model=relayed.model, messages=HI))) == relayed.engine.text


def streamed(engine: FakeEngine, kind: str, *parts: Mapping[str, Any]) -> Reply:
    """A stream of the engine's: its events, each with what they have in common."""
    known = {"id": "c", "object": kind, "created": 1, "model": engine.model}
    events = [b"data: " + json.dumps({**known, **part}).encode() + b"\n\n" for part in parts]
    pieces = [*events, b"data: [DONE]\n\n"]
    return Reply(headers={"content-type": "text/event-stream"}, pieces=pieces, chunked=True)


def test_a_second_choice_may_come_first(relayed: Stand) -> None:
    """llama.cpp and SGLang begin a choice when its first token is there: the official client took the second for the
    first, and failed with an IndexError."""
    said: list[tuple[int, Any, str | None]] = [
        (1, {"role": "assistant", "content": None}, None),
        (1, {"content": "one"}, None),
        (0, {"role": "assistant", "content": None}, None),
        (0, {"content": "nought"}, None),
        (1, {}, "stop"),
        (0, {}, "stop"),
    ]
    parts = [{"choices": [{"index": index, "delta": delta, "finish_reason": end}]} for index, delta, end in said]
    relayed.engine.script_chat(streamed(relayed.engine, "chat.completion.chunk", *parts))
    ask: Any = {"model": relayed.model, "messages": HI, "n": 2}
    with client_of(relayed.url) as client, client.chat.completions.stream(**ask) as events:
        chunks = [event.chunk for event in events if event.type == "chunk"]
        done = events.get_final_completion()
    roles = [(each.index, each.delta.role) for chunk in chunks for each in chunk.choices if each.delta.role]
    assert roles == [(0, "assistant"), (1, "assistant")]
    found = [(each.index, each.message.role, each.message.content) for each in done.choices]
    assert found == [(0, "assistant", "nought"), (1, "assistant", "one")]


@pytest.mark.parametrize("slice_", [0, 7])
@pytest.mark.parametrize("stream", [False, True])
def test_the_usage_is_that_of_all_choices(all_stands: dict[str, Stand], stream: bool, slice_: int) -> None:
    """llama.cpp reports each choice's own: the answer had that of the choice which ended last."""
    stand = all_stands["llamacpp"]
    engine = stand.engine.reset()
    engine.slice = slice_

    def usage(prompt: int, completion: int) -> Any:
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def asked(path: str, parts: list[Any], **fields: Any) -> Any:
        engine.script(streamed(engine, "x", *parts), path)
        fields |= {"model": stand.model}
        if not stream:
            return stand.post(path, **fields).json()["usage"]
        events = stand.events(path, **fields, stream_options={"include_usage": True})
        (found,) = (event["usage"] for event in events[:-1] if event.get("usage"))
        assert events[-1] == "[DONE]" and events[-2]["usage"] == found
        return found

    parts: list[Any] = []
    for index in (1, 0):  # two answers to one prompt; the usage has a chunk of its own
        said = [{"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "x"}}, {"delta": {}}]
        ends = [None, None, "stop"]
        parts += [
            {"choices": [{"index": index, "finish_reason": end, **words}]}
            for words, end in zip(said, ends, strict=True)
        ]
        parts.append({"choices": [], "usage": usage(9, 3 + index)})
    assert asked(CHAT, parts, messages=HI, n=2) == usage(9, 7)

    parts = []
    for index, prompt in ((2, 5), (0, 2), (1, 2), (3, 5)):  # two to each of two prompts; here it comes with the end
        parts.append({"choices": [{"index": index, "text": "x", "finish_reason": None}]})
        parts.append({"choices": [{"index": index, "text": "", "finish_reason": "length"}], "usage": usage(prompt, 4)})
    assert asked("/v1/completions", parts, prompt=["a", "b"], n=2) == usage(7, 16)


def test_a_model_is_not_missing_while_its_engine_starts(relayed: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being started is not listed yet: its name was refused with 404, which no client tries again."""
    known, nobodys = relayed.model, "nobodys"
    assert relayed.client.get(f"/v1/models/{known}").status_code == 200
    monkeypatch.setattr(relayed.gateway, "state", "starting")
    assert relayed.client.get(f"/v1/models/{known}").status_code == 200
    refused_v1(relayed.client.get(f"/v1/models/{nobodys}"), "not_ready")
    monkeypatch.undo()
    refused_v1(relayed.client.get(f"/v1/models/{nobodys}"), "model_not_found")


# ----------------------------------------------------------------------------------------------- the relay


def test_every_field_of_vllms_answer_is_passed_on(all_stands: dict[str, Stand]) -> None:
    """logprobs, n, token ids, whatever it says: the bytes are the engine's."""
    stand = all_stands["vllm"]
    stand.engine.reset()
    for name in ("chat", "chat_tools_auto", "chat_logprobs"):
        with contextlib.suppress(LookupError):
            stand.engine.replay(name)
            theirs = stand.engine._queue[-1][1].pieces[0]
            reply = stand.post(CHAT, model="m", messages=HI, n=2, logprobs=True, top_logprobs=3, tools=[WEATHER])
            assert reply.content == theirs
    ask = stand.engine.bodies[-1]
    assert (ask["n"], ask["logprobs"], ask["top_logprobs"]) == (2, True, 3)


@pytest.mark.parametrize("slice_", [0, 1, 7])
def test_a_stream_arrives_complete_and_in_order(relayed: Stand, slice_: int) -> None:
    relayed.engine.text = 'a\u2028b\u0085c 北京 🚲 \\n " end'
    full = default_stream(relayed)
    theirs = b"".join(full.pieces)
    relayed.engine.slice = slice_
    ours = scripted_text(relayed, full).encode()
    name = f'"model":"{relayed.model}"'.encode()  # as it was asked for
    assert ours == theirs.replace(b'"reasoning_content":', b'"reasoning":').replace(b'"model":"m"', name)


def test_ollamas_stream_survives_any_cut(all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    stand.engine.reset().text = "a\u2028b\u0085c 北京 🚲 end"
    stand.engine.slice = 1
    assert text_of(strict_chunks(stand.events(CHAT, model=stand.model, messages=HI))) == stand.engine.text


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.replace(b"\n", b"\r\n"),
        lambda p: b": hello\n\n" + p,
        lambda p: b"data:" + p[6:],
        lambda p: b"event: message\nid: 1\n" + p,
    ],
    ids=["crlf", "comments", "tight", "event and id"],
)
def test_every_standard_form_of_an_event_comes_through(relayed: Stand, change: Callable[[bytes], bytes]) -> None:
    """CRLF is what sse-starlette sends; a proxy in front of the engine may add comments."""
    full = default_stream(relayed)
    for relayed.engine.slice in (0, 1):
        relayed.engine.script(
            Reply(headers=full.headers, pieces=[change(piece) for piece in full.pieces], chunked=True)
        )
        with client_of(relayed.url) as client:
            assert text_of(list(client.chat.completions.create(model=relayed.model, messages=HI, stream=True))) == TEXT


def test_a_token_that_arrives_alone_leaves_at_once(stand: Stand) -> None:
    stand.engine.pace, stand.engine.text = 0.25, "a b c"
    with stand.client.stream("POST", CHAT, json={"model": stand.model, "messages": HI, "stream": True}) as reply:
        for line in reply.iter_lines():
            if '"content":"a"' in line:
                assert stand.engine.live == 1, "the first token came when the last was done"
                break
    stand.engine.wait(lambda: stand.engine.live == 0, 5)


def test_large_answers_come_through(stand: Stand) -> None:
    stand.engine.text = f"{'long' * 40} " * 4_000
    for each in (
        stand.post(CHAT, model=stand.model, messages=HI).json()["choices"][0]["message"]["content"],
        text_of(strict_chunks(stand.events(CHAT, model=stand.model, messages=HI))),
    ):
        assert each == stand.engine.text


def test_an_endless_answer_that_is_checked_is_bounded() -> None:
    answer = product.Answer()
    with pytest.raises(product.BadEngineReply, match="32 MiB"):
        for _ in range(40):
            answer.add({"choices": [{"index": 0, "delta": {"content": "x" * (1 << 20)}}]})


def test_an_endless_event_is_bounded(relayed: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product.LineReader, "LIMIT", 1 << 16)
    text = scripted_text(
        relayed,
        Reply(headers={"content-type": "text/event-stream"}, pieces=[b"data: " + b"x" * (1 << 14)] * 16, chunked=True),
    )
    assert "bad_engine_reply" in text and len(text) < 1 << 12


def test_the_engines_key_and_headers_stay_with_us(all_stands: dict[str, Stand]) -> None:
    stand = Stand("vllm", engine_api_key="theirs", api_keys=("ours",))
    stand.engine.api_key = "theirs"
    with stand, client_of(stand.url, "ours", default_headers={"x-secret": "s", "cookie": "c=1"}) as client:
        client.chat.completions.create(model="m", messages=HI, extra_headers={"x-forwarded-for": "1.2.3.4"})
        seen = stand.engine.requests[-1]
        assert seen.headers["authorization"] == "Bearer theirs" and not {"x-secret", "cookie", "x-forwarded-for"} & set(
            seen.headers
        )
        assert b"ours" not in seen.body


def test_many_streams_at_once_get_their_own_words(stand: Stand) -> None:
    stand.engine.answer = lambda ask: ask["messages"][-1]["content"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="any", max_retries=0) as client:

            async def one(n: int) -> str:
                stream = await client.chat.completions.create(
                    model=stand.model, messages=[{"role": "user", "content": f"nonce {n}"}], stream=True
                )
                return text_of([chunk async for chunk in stream])

            return await asyncio.gather(*(one(n) for n in range(32)))

    assert asyncio.run(ask()) == [f"nonce {n}" for n in range(32)]


def test_the_strict_types_are_strict() -> None:
    with pytest.raises(ValidationError):
        closed(ChatCompletion, {"id": 1, "choices": [], "created": 1, "model": "m", "object": "chat.completion"})


@pytest.mark.parametrize(
    "event",
    [b'{"choices":{"message":"bm"}}', b'{"choices":["x"]}', b'{"choices":7}', b'{"choices":[{"finish_reason":{}}]}'],
)
def test_a_malformed_event_in_a_relayed_stream_is_an_error(stand: Stand, event: bytes) -> None:
    if stand.engine.dialect == "ollama":
        pytest.skip("translated, not relayed")
    stand.engine.script(
        Reply(headers={"content-type": "text/event-stream"}, pieces=[b"data:" + event + b"\n\n", b"data: [DONE]\n\n"])
    )  # without the blank: not the form that passes unparsed
    reply = stand.post("/v1/chat/completions", model=stand.model, messages=HI, stream=True)
    assert reply.headers.get("x-error-kind", "") in (
        "bad_engine_reply",
        "engine_unavailable",
    ) and reply.status_code in (502, 503), reply.text
