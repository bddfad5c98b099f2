"""/v1/responses, /v1/messages and /v1/messages/count_tokens over HTTP, on every engine; then their official clients
against the real command with the embedded engine."""

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent

from tests.fake_engine import DIALECTS, TEXT, Dialect, Json, Reply
from tests.harness import KINDS, SOON, Stand, good, refused_v1

pytestmark = pytest.mark.usefixtures("alone")

CHAT, RESPONSES, MESSAGES, COUNT = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
BOTH = (RESPONSES, MESSAGES)
HI: list[Json] = [{"role": "user", "content": "hi"}]
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Json = {"type": "function", "name": "weather", "description": "now", "parameters": PARAMETERS, "strict": False}
TOOL: Json = {"name": "weather", "description": "now", "input_schema": PARAMETERS}
PIXEL = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
).decode()
CAPITAL: Json = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
#: a turn like those of Codex, written by hand: not a recording
CODEX: Json = {
    "instructions": "You are a coding agent.",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    "tools": [
        WEATHER,
        {"type": "local_shell"},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "a"}},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0190b2c6",
}
#: a turn like those of Claude Code, written by hand: not a recording
CLAUDE_CODE: Json = {
    "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}],
    "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
    "metadata": {"user_id": "user_1"},
    "max_tokens": 32000,
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "temperature": 1,
    "stream": True,
}


def ask(stand: Stand, path: str, /, _headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    """A small request to that route, with these fields in it."""
    usual: Json = {"input": "hi"} if path == RESPONSES else {"messages": HI}
    if path == MESSAGES:
        usual["max_tokens"] = 64
    return stand.post(path, _headers, **{"model": stand.model, **usual, **body})


def answered(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    return reply.json()


def named_events(reply: httpx.Response) -> list[Json]:
    """The events of a stream, each under its own name."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    assert reply.text.endswith("\n\n")
    for block in filter(None, reply.text.split("\n\n")):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}", block
        found.append(event)
    return found


def kinds_of(events: list[Json]) -> list[str]:
    """The types of events, each once where it repeats."""
    kinds = [event["type"] for event in events]
    return [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]


def refused_messages(reply: httpx.Response, kind: str, of_type: str = "invalid_request_error") -> str:
    """The message of an error in Anthropic's form."""
    body = reply.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error", body
    assert (body["error"]["type"], reply.headers["x-error-kind"]) == (of_type, kind), body
    return str(body["error"]["message"])


def refused(reply: httpx.Response, path: str, kind: str) -> str:
    if path == RESPONSES:
        return refused_v1(reply, kind)
    assert reply.status_code == KINDS[kind].v1[0], reply.text
    return refused_messages(reply, kind, "not_found_error" if reply.status_code == 404 else "invalid_request_error")


def ignored(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.headers.get("x-ignored-fields", ""))


# ------------------------------------------------------------------------------------------------ /v1/responses


def test_a_response(stand: Stand) -> None:
    reply = ask(stand, RESPONSES, instructions="Be brief.", temperature=0, max_output_tokens=100)
    found = answered(reply)
    OpenAIResponse.model_validate(found, strict=False)
    assert (found["object"], found["status"], found["model"]) == ("response", "completed", stand.model)
    (item,) = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert "".join(part["text"] for part in item["content"]) == TEXT
    assert found["usage"]["input_tokens"] > 0 and found["usage"]["output_tokens"] > 0
    assert found["instructions"] == "Be brief." and found["error"] is None and found["incomplete_details"] is None
    assert reply.headers["x-endpoint"] and reply.headers["x-request-id"]
    assert stand.engine.body["messages"] == [{"role": "system", "content": "Be brief."}, *HI]


def test_a_response_streams(stand: Stand) -> None:
    events = named_events(ask(stand, RESPONSES, stream=True))
    check = pydantic.TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events):
        check.validate_python(event, strict=False)
        assert event["sequence_number"] == number
    assert kinds_of(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == TEXT and len(deltas) > 3
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == TEXT
    assert last["usage"]["output_tokens"] > 0
    assert {event["response"]["model"] for event in events if "response" in event} == {stand.model}


def test_a_response_cut_by_its_limit_is_incomplete(stand: Stand) -> None:
    found = answered(ask(stand, RESPONSES, max_output_tokens=2))
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    last = named_events(ask(stand, RESPONSES, max_output_tokens=2, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_a_round_of_tools_over_responses(stand: Stand) -> None:
    stand.engine.tool_call = ("weather", {"city": "Köln"})
    question = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
    for stream in (False, True):
        reply = ask(stand, RESPONSES, input=[question], tools=[WEATHER], tool_choice="auto", stream=stream)
        found = named_events(reply)[-1]["response"] if stream else answered(reply)
        (call,) = [item for item in found["output"] if item["type"] == "function_call"]
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Köln"})
        assert found["status"] == "completed" and call["call_id"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        reply = ask(stand, RESPONSES, input=[question, *found["output"], output], tools=[WEATHER], stream=stream)
        found = named_events(reply)[-1]["response"] if stream else answered(reply)
        assert found["output"][0]["content"][0]["text"] == TEXT
        roles = [message["role"] for message in stand.engine.body["messages"]]
        assert roles == ["user", "assistant", "tool"]
        assert stand.engine.body["messages"][-1]["content"] == "sunny"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_is_forced_over_responses(stand: Stand, choice: Any) -> None:
    reply = ask(stand, RESPONSES, tools=[WEATHER], tool_choice=choice)
    if stand.engine.dialect == "ollama":
        message = refused(reply, RESPONSES, "unsupported_feature")
        assert "tool_choice" in message and reply.json()["error"]["param"] == "tool_choice"
        return
    assert [item["type"] for item in answered(reply)["output"]] == ["function_call"]


@pytest.fixture(scope="module", params=DIALECTS)
def thinker(request: pytest.FixtureRequest) -> Iterator[Stand]:
    """A model that thinks, on each engine."""
    dialect: Dialect = request.param
    with Stand(dialect, reasoning="Let me see.") as stand:
        yield stand


def test_reasoning_is_an_item_of_a_response(thinker: Stand) -> None:
    for stream in (False, True):
        reply = ask(thinker, RESPONSES, stream=stream)
        found = named_events(reply)[-1]["response"] if stream else answered(reply)
        assert [item["type"] for item in found["output"]] == ["reasoning", "message"]
        assert found["output"][0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    found = answered(ask(thinker, RESPONSES, reasoning={"summary": "auto"}))
    assert found["output"][0]["summary"] == [{"type": "summary_text", "text": "Let me see."}]


def test_reasoning_goes_back_to_the_engine(thinker: Stand) -> None:
    """Under the name that the engine reads."""
    thought = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "It rained."}],
    }
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "rain"}
    answered(ask(thinker, RESPONSES, input=[*HI, thought, call, output], tools=[WEATHER]))
    name = {"ollama": "thinking", "vllm": "reasoning"}.get(thinker.engine.dialect, "reasoning_content")
    assert thinker.engine.body["messages"][1][name] == "It rained."


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_over_responses(stand: Stand, stream: bool) -> None:
    stand.engine.answer = lambda _: '{"city": "Paris", "large": true}'
    form = {"type": "json_schema", "name": "capital", "schema": CAPITAL, "strict": True}
    reply = ask(stand, RESPONSES, text={"format": form}, stream=stream)
    found = named_events(reply)[-1]["response"] if stream else answered(reply)
    assert json.loads(found["output"][0]["content"][0]["text"]) == {"city": "Paris", "large": True}
    assert found["text"]["format"]["schema"] == CAPITAL
    sent = stand.engine.body
    assert sent.get("format") or sent["response_format"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BOTH)
def test_an_answer_that_breaks_its_schema_is_never_a_success(stand: Stand, path: str, stream: bool) -> None:
    stand.engine.answer = lambda _: '{"city": "Oslo"}'
    form: Json = {"type": "json_schema", "schema": CAPITAL}
    field: Json = {"text": {"format": form | {"name": "capital"}}} if path == RESPONSES else {}
    reply = ask(stand, path, stream=stream, **(field or {"output_config": {"format": form}}))
    if stream and reply.status_code == 200:
        last = named_events(reply)[-1]
        assert last["type"] in ("response.failed", "error")
        return
    assert (reply.status_code, reply.headers["x-error-kind"]) == (502, "structured_output_invalid")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
        ("truncation", "auto"),
    ],
)
def test_what_needs_a_store_is_refused(vllm: Stand, field: str, value: Any) -> None:
    reply = ask(vllm, RESPONSES, **{field: value})
    assert field in refused(reply, RESPONSES, "unsupported_feature")
    assert reply.json()["error"]["param"] == field
    assert not vllm.engine.asked


# ------------------------------------------------------------------------------------------------- /v1/messages


def test_a_message(stand: Stand) -> None:
    reply = ask(stand, MESSAGES, system="Be brief.", temperature=0)
    found = answered(reply)
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", stand.model)
    assert found["content"] == [{"type": "text", "text": TEXT}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    assert found["usage"]["input_tokens"] > 0 and found["usage"]["output_tokens"] > 0
    assert found["id"].startswith("msg_")
    assert reply.headers["x-endpoint"] and reply.headers["x-request-id"]
    assert stand.engine.body["messages"] == [{"role": "system", "content": "Be brief."}, *HI]


def test_a_message_streams(stand: Stand) -> None:
    events = named_events(ask(stand, MESSAGES, stream=True))
    assert kinds_of(events) == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(texts) == TEXT and len(texts) > 3
    assert events[0]["message"]["model"] == stand.model
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 0 and events[-2]["usage"]["input_tokens"] > 0


def test_beta_in_the_query(vllm: Stand) -> None:
    assert answered(ask(vllm, f"{MESSAGES}?beta=true", max_tokens=9))["type"] == "message"
    assert answered(ask(vllm, f"{COUNT}?beta=true"))["input_tokens"] > 0


def test_a_message_cut_by_its_limit(stand: Stand) -> None:
    assert answered(ask(stand, MESSAGES, max_tokens=2))["stop_reason"] == "max_tokens"
    assert named_events(ask(stand, MESSAGES, max_tokens=2, stream=True))[-2]["delta"]["stop_reason"] == "max_tokens"


def test_a_round_of_tools_over_messages(stand: Stand) -> None:
    stand.engine.tool_call = ("weather", {"city": "Köln"})
    question = {"role": "user", "content": "Weather?"}
    found = answered(ask(stand, MESSAGES, messages=[question], tools=[TOOL]))
    (call,) = [block for block in found["content"] if block["type"] == "tool_use"]
    assert (call["name"], call["input"], found["stop_reason"]) == ("weather", {"city": "Köln"}, "tool_use")
    events = named_events(ask(stand, MESSAGES, messages=[question], tools=[TOOL], stream=True))
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Köln"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "sunny"}]}
    history = [question, {"role": "assistant", "content": found["content"]}, {"role": "user", "content": [result]}]
    found = answered(ask(stand, MESSAGES, messages=history, tools=[TOOL]))
    assert found["content"] == [{"type": "text", "text": TEXT}]
    assert [message["role"] for message in stand.engine.body["messages"]] == ["user", "assistant", "tool"]
    assert stand.engine.body["messages"][-1]["content"] == "sunny"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_is_forced_over_messages(stand: Stand, choice: Json) -> None:
    reply = ask(stand, MESSAGES, tools=[TOOL], tool_choice=choice)
    if stand.engine.dialect == "ollama":
        assert "tool_choice" in refused(reply, MESSAGES, "unsupported_feature")
        return
    found = answered(reply)
    assert [block["type"] for block in found["content"]] == ["tool_use"]
    assert found["stop_reason"] == "tool_use"


def test_tool_choice_none_offers_nothing(stand: Stand) -> None:
    stand.engine.tool_call = ("weather", {"city": "Köln"})
    found = answered(ask(stand, MESSAGES, tools=[TOOL], tool_choice={"type": "none"}))
    assert found["content"] == [{"type": "text", "text": TEXT}]
    assert "tools" not in stand.engine.body


def test_thinking_is_a_block(thinker: Stand) -> None:
    found = answered(ask(thinker, MESSAGES))
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]
    assert found["content"][0]["thinking"] == "Let me see." and "signature" in found["content"][0]
    events = named_events(ask(thinker, MESSAGES, stream=True))
    thoughts = [event["delta"].get("thinking", "") for event in events if event["type"] == "content_block_delta"]
    assert "".join(thoughts) == "Let me see."
    history = [*HI, {"role": "assistant", "content": found["content"]}, *HI]
    answered(ask(thinker, MESSAGES, messages=history))


def test_thinking_can_be_switched(thinker: Stand) -> None:
    if thinker.engine.dialect == "llamacpp":
        pytest.skip("the recorded template does not think")
    found = answered(ask(thinker, MESSAGES, thinking={"type": "disabled"}))
    assert [block["type"] for block in found["content"]] == ["text"]
    found = answered(ask(thinker, MESSAGES, thinking={"type": "enabled", "budget_tokens": 1024}))
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_over_messages(stand: Stand, stream: bool) -> None:
    stand.engine.answer = lambda _: '{"city": "Paris", "large": true}'
    reply = ask(stand, MESSAGES, output_config={"format": {"type": "json_schema", "schema": CAPITAL}}, stream=stream)
    if stream:
        events = named_events(reply)
        text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    else:
        text = answered(reply)["content"][0]["text"]
    assert json.loads(text) == {"city": "Paris", "large": True}
    sent = stand.engine.body
    assert sent.get("format") or sent["response_format"]


def test_stop_sequences(stand: Stand) -> None:
    answered(ask(stand, MESSAGES, stop_sequences=["END"]))
    sent = stand.engine.body
    assert (sent["options"]["stop"] if stand.engine.dialect == "ollama" else sent["stop"]) == ["END"]


def test_the_stop_sequence_that_was_met(vllm: Stand) -> None:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "one"},
        "finish_reason": "stop",
        "stop_reason": "END",
    }
    body = {"object": "chat.completion", "id": "x", "created": 1, "model": "m", "choices": [choice]}
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    vllm.engine.script_chat(
        Reply(headers={"content-type": "application/json"}, pieces=[json.dumps(body | usage).encode()])
    )
    found = answered(ask(vllm, MESSAGES, stop_sequences=["END"]))
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "END")


def test_an_answer_that_is_begun_by_the_caller(stand: Stand) -> None:
    """Anthropic's prefill: the last message is the assistant's, and the model goes on with it."""
    reply = ask(stand, MESSAGES, messages=[*HI, {"role": "assistant", "content": "Once"}])
    if stand.engine.dialect == "ollama":
        assert "user message" in refused(reply, MESSAGES, "unsupported_feature")
        return
    answered(reply)
    assert stand.engine.body["messages"][-1]["content"] == "Once"


@pytest.mark.parametrize("path", BOTH)
def test_images(path: str) -> None:
    url = f"data:image/png;base64,{PIXEL}"
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    part: Json = {"type": "image", "source": source} if path == MESSAGES else {"type": "input_image", "image_url": url}
    text = {"type": "text" if path == MESSAGES else "input_text", "text": "What is it?"}
    talk = [{"role": "user", "content": [text, part]}]
    field = {"messages" if path == MESSAGES else "input": talk}
    with Stand("llamacpp", capabilities=["vision"]) as stand:
        answered(ask(stand, path, **field))
        assert stand.engine.body["messages"][0]["content"][1]["image_url"]["url"] == url
    with Stand("llamacpp") as stand:
        assert "images" in refused(ask(stand, path, **field), path, "unsupported_feature")


# ------------------------------------------------------------------------------------- /v1/messages/count_tokens


def test_tokens_are_counted(stand: Stand) -> None:
    small = answered(ask(stand, COUNT))
    assert set(small) == {"input_tokens"}
    more = answered(ask(stand, COUNT, system="word " * 50, tools=[TOOL]))
    assert more["input_tokens"] > small["input_tokens"] > 0


@pytest.mark.parametrize(
    "more",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": CAPITAL}}},
        {"tools": [TOOL], "tool_choice": {"type": "auto"}},
        {"thinking": {"type": "disabled"}},
        {"max_tokens": 100},
    ],
)
def test_tokens_are_counted_whatever_the_answer_would_be(stand: Stand, more: Json) -> None:
    assert answered(ask(stand, COUNT, **more))["input_tokens"] > 0


def test_tokens_are_counted_with_a_forced_call(vllm: Stand) -> None:
    vllm.engine.tool_call = ("weather", {"city": "a city with a long name"})
    assert answered(ask(vllm, COUNT, tools=[TOOL], tool_choice={"type": "any"}))["input_tokens"] > 0


# ------------------------------------------------------------------------------------------------------ agents


@pytest.fixture(scope="module", params=[(dialect, thinks) for dialect in DIALECTS for thinks in (False, True)], ids=str)
def any_model(request: pytest.FixtureRequest) -> Iterator[Stand]:
    """Each engine, with a model that thinks and with one that does not."""
    dialect, thinks = request.param
    with Stand(dialect, reasoning="Hm." if thinks else "") as stand:
        yield stand


def test_what_codex_sends_passes(any_model: Stand) -> None:
    reply = ask(any_model, RESPONSES, **CODEX)
    assert named_events(reply)[-1]["type"] == "response.completed"
    for name in ("local_shell", "custom", "web_search", "reasoning.encrypted_content", "prompt_cache_key"):
        assert name in ignored(reply)
    assert len(any_model.engine.body["tools"]) == 1


def test_what_claude_code_sends_passes(any_model: Stand) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,effort-2025-11-24"}
    reply = ask(any_model, f"{MESSAGES}?beta=true", headers, **CLAUDE_CODE)
    assert named_events(reply)[-1]["type"] == "message_stop"
    for name in ("cache_control", "metadata", "context_management", "web_search_20250305"):
        assert name in ignored(reply)


@pytest.mark.parametrize("effort", ["low", "high", "xhigh"])
def test_effort_on_a_model_that_does_not_think_is_named(stand: Stand, effort: str) -> None:
    reply = ask(stand, RESPONSES, reasoning={"effort": effort})
    assert "reasoning.effort" in ignored(reply)
    reply = ask(stand, MESSAGES, output_config={"effort": effort})
    assert "output_config.effort" in ignored(reply)


@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}])
def test_thinking_on_a_model_that_does_not_think_is_named(stand: Stand, thinking: Json) -> None:
    for path in (MESSAGES, COUNT):
        assert "thinking" in ignored(ask(stand, path, thinking=thinking))


@pytest.mark.parametrize("path", BOTH)
def test_many_tools(vllm: Stand, path: str) -> None:
    """An agent with several MCP servers offers hundreds."""
    tool = WEATHER if path == RESPONSES else TOOL
    answered(ask(vllm, path, tools=[tool | {"name": f"tool_{number}"} for number in range(300)]))
    assert len(vllm.engine.body["tools"]) == 300


# -------------------------------------------------------------------------------------------------- the fields


@pytest.mark.parametrize("path", [*BOTH, COUNT])
def test_an_unknown_field_is_refused_by_name(stand: Stand, path: str) -> None:
    reply = ask(stand, path, frobnicate=1)
    message = refused(reply, path, "unsupported_feature")
    assert "frobnicate" in message
    assert "on_unsupported" not in message  # these routes do not have it
    assert not stand.engine.asked


def test_names_are_those_of_the_callers_api(vllm: Stand) -> None:
    """Not those of the chat API, which the request becomes."""
    reply = ask(vllm, RESPONSES, text={"verbosity": "low"})
    assert "text.verbosity" in refused(reply, RESPONSES, "unsupported_feature")
    assert reply.json()["error"]["param"] == "text.verbosity"
    for fields, name in (
        ({"max_output_tokens": 2_000_000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "strng"}}}}, "text.format"),
    ):
        reply = ask(vllm, RESPONSES, **fields)
        assert name in refused(reply, RESPONSES, "invalid_request")
        assert str(reply.json()["error"]["param"]).startswith(name)
    for fields, name in (
        ({"stop_sequences": ["x"] * 40}, "stop_sequences"),
        ({"stop_sequences": ["x", ""]}, "stop_sequences[1]"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "strng"}}}}, "output_config.format"),
    ):
        assert name in refused(ask(vllm, MESSAGES, **fields), MESSAGES, "invalid_request")


def test_the_tool_whose_schema_is_bad_is_named(vllm: Stand) -> None:
    bad = {"type": "strng"}
    response = [WEATHER, {**WEATHER, "name": "other", "parameters": bad, "strict": True}]
    message = [TOOL, {"name": "other", "input_schema": bad}]
    functions = [{name: tool[name] for name in ("name", "parameters")} for tool in response]
    chat = [{"type": "function", "function": function} for function in functions]
    for reply in (
        ask(vllm, RESPONSES, tools=response),
        ask(vllm, MESSAGES, tools=message, tool_choice={"type": "any"}),
        vllm.post(CHAT, model=vllm.model, messages=HI, tools=chat, tool_choice="required"),
        vllm.post("/chat", messages=HI, tools=chat, tool_choice="required"),
    ):
        assert reply.status_code == 400 and "tools: 'other': parameters.type: 'strng'" in reply.text, reply.text


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (RESPONSES, {"input": None}, "input"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"model": None}, "model"),
        (RESPONSES, {"temperature": 3}, "temperature"),
        (RESPONSES, {"temperature": "hot"}, "temperature"),
        (RESPONSES, {"messages": HI}, "messages"),
        (RESPONSES, {"input": [{"type": "message", "role": "robot", "content": "x"}]}, "input[0].role"),
        (MESSAGES, {"messages": []}, "messages"),
        (MESSAGES, {"max_tokens": None}, "max_tokens"),
        (MESSAGES, {"max_tokens": 0}, "max_tokens"),
        (MESSAGES, {"model": None}, "model"),
        (MESSAGES, {"temperature": 1.5}, "temperature"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (COUNT, {"messages": []}, "messages"),
    ],
)
def test_a_bad_field_is_named(vllm: Stand, path: str, fields: Json, name: str) -> None:
    reply = ask(vllm, path, **fields)
    assert name in refused(reply, path, "invalid_request")
    assert not vllm.engine.asked
    if path == RESPONSES:
        assert reply.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("max_completion_tokens", 9, "max_output_tokens"),
        ("reasoning_effort", "low", "reasoning.effort"),
        ("response_format", {"type": "json_object"}, "text.format"),
        ("verbosity", "low", "text.verbosity"),
    ],
)
def test_a_field_of_the_chat_api_is_refused_under_its_own_name(vllm: Stand, field: str, value: Any, named: str) -> None:
    reply = ask(vllm, RESPONSES, **{field: value})
    message = refused(reply, RESPONSES, "invalid_request")
    assert message.startswith(f"{field}: ") and f"send {named}" in message
    assert reply.json()["error"]["param"] == field


def test_the_id_of_a_file_beside_an_image_is_named() -> None:
    part = {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "file_id": "file_1"}
    with Stand("llamacpp", capabilities=["vision"]) as stand:
        assert ignored(ask(stand, RESPONSES, input=[{"role": "user", "content": [part]}])) == "input.file_id"


@pytest.mark.parametrize("path", [*BOTH, COUNT])
def test_a_body_that_is_none(vllm: Stand, path: str) -> None:
    for body in (b"", b"{", b"[]", b'{"model": "a", "model": "b"}'):
        refused(vllm.raw(path, body), path, "invalid_request")


def test_hints_are_named(stand: Stand) -> None:
    reply = ask(
        stand, RESPONSES, metadata={"a": "b"}, store=True, user="u", safety_identifier="s", truncation="disabled"
    )
    for name in ("store", "user", "safety_identifier"):
        assert name in ignored(reply)
    assert reply.json()["metadata"] == {"a": "b"}
    assert reply.json()["store"] is False
    reply = ask(stand, MESSAGES, metadata={"user_id": "u"}, service_tier="auto", betas=["x"])
    assert ignored(reply) == "metadata, service_tier, betas"


@pytest.mark.parametrize("path", BOTH)
def test_of_many_hints_the_first_are_named_and_the_others_counted(vllm: Stand, path: str) -> None:
    names = ignored(ask(vllm, path, tools=[{"type": f"hosted_{number}"} for number in range(100)])).split(", ")
    assert len(names) == 33 and "hosted_31" in names[31] and names[32] == "and 68 more"


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_before_the_answer(stand: Stand, stream: bool) -> None:
    broken = Reply(status=500, headers={"content-type": "application/json"}, pieces=[b'{"error":"boom"}'])
    for path in BOTH:
        stand.engine.script(broken, stand.engine.chat)
        reply = ask(stand, path, stream=stream)
        assert reply.status_code == 502 and reply.headers["x-error-kind"] == "bad_engine_reply", reply.text
        if path == RESPONSES:
            refused_v1(reply, "bad_engine_reply")
        else:
            refused_messages(reply, "bad_engine_reply", "api_error")


@pytest.mark.parametrize("end", ["reset", "eof"])
def test_an_engine_that_ends_in_mid_stream(stand: Stand, end: Any) -> None:
    whole = stand.engine.stream_reply()
    for path in BOTH:
        half = Reply(headers=whole.headers, pieces=whole.pieces[:4], end=end, gap=0.01)
        stand.engine.script(half, stand.engine.chat)
        events = named_events(ask(stand, path, stream=True))
        if path == RESPONSES:
            error, failed = events[-2:]
            assert (error["type"], failed["type"]) == ("error", "response.failed")
            assert (failed["response"]["status"], failed["response"]["error"]["code"]) == ("failed", "server_error")
            assert failed["response"]["error"]["message"]
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
        else:
            assert events[-1]["type"] == "error" and events[-1]["error"]["type"] in ("api_error", "overloaded_error")
            assert "message_stop" not in kinds_of(events)


def test_tokens_that_a_cache_had_or_keeps_now(vllm: Stand) -> None:
    """As vLLM reports them with --enable-prompt-tokens-details: 331 tokens of a prompt, asked for the second time."""
    for name, cached, created in (("prefix_cache_1", 0, 256), ("prefix_cache_2", 256, 0)):
        vllm.engine.replay_chat(name)
        usage = answered(ask(vllm, RESPONSES))["usage"]
        assert usage["input_tokens"] == 331
        assert usage["input_tokens_details"] == {"cached_tokens": cached, "cache_write_tokens": created}
        vllm.engine.replay_chat(name)
        usage = answered(ask(vllm, MESSAGES))["usage"]
        assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (cached, created)
        assert usage["input_tokens"] == 331 - 256


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_the_reasoning(stream: bool) -> None:
    """SGLang counts them beside the others, vLLM among their details."""
    with Stand("sglang", reasoning="Let me see.") as sglang:
        for path in BOTH:
            reply = ask(sglang, path, stream=stream)
            if path == RESPONSES:
                found = named_events(reply)[-1]["response"] if stream else answered(reply)
                assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
            else:
                found = named_events(reply)[-2] if stream else answered(reply)
                assert found["usage"]["output_tokens_details"] == {"thinking_tokens": 3}


def test_the_tokens_of_both_tries_are_counted(stand: Stand) -> None:
    """An answer that does not fit its schema is asked for once more: that costs as much on every surface."""
    words = itertools.cycle(["no JSON", '{"city": "Paris", "large": true}'])
    stand.engine.answer = lambda asked: next(words)
    own = good(stand.post("/chat", messages=HI, schema=CAPITAL))["usage"]
    assert own["completion_tokens"] == 2 + 4
    named = {"type": "json_schema", "name": "capital", "schema": CAPITAL}
    response = answered(ask(stand, RESPONSES, text={"format": named}))["usage"]
    bare = {"type": "json_schema", "schema": CAPITAL}
    message = answered(ask(stand, MESSAGES, output_config={"format": bare}))["usage"]
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL}}
    chat = answered(stand.post(CHAT, model=stand.model, messages=HI, response_format=form))["usage"]
    assert {name: chat[name] for name in own} == own
    for usage in (response, message):
        assert (usage["input_tokens"], usage["output_tokens"]) == (own["prompt_tokens"], own["completion_tokens"])


def refusing(stand: Stand) -> None:
    """The next chat is answered with OpenAI's refusal, in two parts."""
    base: Json = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": stand.engine.model}
    deltas: list[Json] = [{"role": "assistant", "content": ""}, {"refusal": "I can"}, {"refusal": "not."}, {}]
    pieces = []
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        pieces.append(b"data: " + json.dumps({**base, "choices": [choice]}).encode() + b"\n\n")
    headers = {"content-type": "text/event-stream"}
    stand.engine.script_chat(Reply(headers=headers, pieces=[*pieces, b"data: [DONE]\n\n"]))


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_a_refusal_is_passed_on(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    """Both engines are asked for a stream, which is folded where the caller wants a complete answer."""
    stand = all_stands[dialect]
    stand.engine.reset()
    for more in ({}, {"response_format": {"type": "json_object"}}):
        refusing(stand)
        (choice,) = answered(stand.post(CHAT, model=stand.model, messages=HI, **more))["choices"]
        assert choice["message"] == {"role": "assistant", "content": None, "refusal": "I cannot."}
    refusing(stand)
    (item,) = answered(ask(stand, RESPONSES))["output"]
    assert item["content"] == [{"type": "refusal", "refusal": "I cannot."}]
    refusing(stand)
    assert answered(ask(stand, MESSAGES))["content"] == [{"type": "text", "text": "I cannot."}]
    refusing(stand)
    deltas = [event.get("delta", {}) for event in named_events(ask(stand, MESSAGES, stream=True))]
    assert "".join(delta.get("text", "") for delta in deltas) == "I cannot."
    refusing(stand)
    assert good(stand.post("/generate", prompt="hi"))["text"] == "I cannot."
    refusing(stand)
    events = stand.events("/generate", prompt="hi")[:-1]
    assert "".join(event["data"].get("delta", "") for event in events) == "I cannot."


def test_a_refusal_goes_back_as_the_text_that_it_is(stand: Stand) -> None:
    refused_before = {"role": "assistant", "content": None, "refusal": "I cannot."}
    messages = [*HI, refused_before, *HI]
    answered(stand.post(CHAT, model=stand.model, messages=messages))
    good(stand.post("/chat", messages=messages))
    for body in stand.engine.bodies:
        assert body["messages"][1] == {"role": "assistant", "content": "I cannot."}


def test_an_engine_that_is_full(vllm: Stand) -> None:
    full = Reply(
        status=503, headers={"content-type": "application/json", "retry-after": "7"}, pieces=[b'{"error":"x"}']
    )
    for path in BOTH:
        vllm.engine.script(full, vllm.engine.chat)
        reply = ask(vllm, path)
        assert reply.headers["retry-after"] == "7"
        if path == RESPONSES:
            refused_v1(reply, "engine_overloaded")
        else:
            assert reply.status_code == 529
            refused_messages(reply, "engine_overloaded", "overloaded_error")


TOO_LONG = {
    "ollama": "19_ctx_chat_truncate_false",
    "vllm": "ctx_overflow",
    "sglang": "ctx_maxtok_overflow",
    "llamacpp": "plain_ctx_overflow",
}


def test_a_prompt_that_is_too_long(stand: Stand) -> None:
    """Clients look for these words: the text of an error of openai 3.57 no longer holds its code."""
    for path in BOTH:
        stand.engine.replay_chat(TOO_LONG[stand.engine.dialect])
        message = refused(ask(stand, path), path, "context_too_long")
        assert message.startswith("prompt is too long: ") and "context" in message


def test_a_model_that_nobody_has(vllm: Stand) -> None:
    for path in (*BOTH, COUNT):
        reply = ask(vllm, path, model="gpt-99")
        assert "gpt-99" in refused(reply, path, "model_not_found")
        assert reply.status_code == 404


# --------------------------------------------------------------------------------------- who gets in, and routes


def test_a_missing_key_is_refused_in_each_apis_form() -> None:
    with Stand("vllm", api_keys=("secret",)) as stand:
        for path in (MESSAGES, COUNT):
            reply = ask(stand, path)
            assert reply.status_code == 401
            refused_messages(reply, "unauthorized", "authentication_error")
        reply = ask(stand, RESPONSES)
        assert reply.status_code == 401
        refused_v1(reply, "unauthorized")
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            for path in (*BOTH, COUNT):
                answered(ask(stand, path, headers))
        for headers in ({"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
            assert ask(stand, MESSAGES, headers).status_code == 401
        reply = stand.client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        refused_messages(reply, "unauthorized", "authentication_error")


@pytest.mark.parametrize("path", [CHAT, RESPONSES, "/tokenize"])
def test_anthropics_header_changes_no_error_of_another_api(path: str) -> None:
    """Whoever finds the fault: the guard, the router or the exchange."""
    header = {"anthropic-version": "2023-06-01"}
    with Stand("vllm", api_keys=("secret",)) as stand:
        for method, more in (("POST", {}), ("GET", {"x-api-key": "secret"}), ("POST", {"x-api-key": "secret"})):
            reply = stand.client.request(method, path, json={"model": "none"}, headers=header | more)
            assert set(reply.json()) == {"error"}, reply.text


def test_models_in_the_callers_form(vllm: Stand) -> None:
    listed = vllm.client.get("/v1/models").json()
    assert listed["object"] == "list" and listed["data"][0]["object"] == "model"
    found = vllm.client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert [model["id"] for model in found["data"]] == [model["id"] for model in listed["data"]]
    assert found["data"][0]["type"] == "model" and found["data"][0]["display_name"]
    assert found["has_more"] is False and found["first_id"] == found["data"][0]["id"]
    one = vllm.client.get(f"/v1/models/{vllm.model}", headers={"anthropic-version": "2023-06-01"}).json()
    assert (one["type"], one["id"]) == ("model", vllm.model)
    none = vllm.client.get("/v1/models/none", headers={"anthropic-version": "2023-06-01"})
    assert none.status_code == 404
    refused_messages(none, "model_not_found", "not_found_error")


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("name", ["fast", "m"])
def test_the_model_is_named_as_it_was_asked_for(path: str, name: str) -> None:
    with Stand("vllm", aliases={"fast": ("vllm/m",)}) as stand:
        assert answered(ask(stand, path, model=name))["model"] == name
        assert stand.engine.body["model"] == "m"
        events = named_events(ask(stand, path, model=name, stream=True))
        first = events[0].get("response") or events[0]["message"]
        assert first["model"] == name
        if path == RESPONSES:
            assert events[-1]["response"]["model"] == name


@pytest.mark.parametrize(
    ("method", "path", "names"),
    [
        ("GET", "/v1/responses/resp_1", "/v1/responses"),
        ("DELETE", "/v1/responses/resp_1", "/v1/responses"),
        ("POST", "/v1/responses/resp_1/cancel", "/v1/responses"),
        ("GET", "/v1/responses/resp_1/input_items", "/v1/responses"),
        ("POST", "/v1/messages/batches", "/v1/messages"),
        ("POST", "/v1/complete", "/v1/messages"),
        ("POST", "/messages", "/v1/messages"),
        ("POST", "/responses", "/v1/responses"),
        ("POST", "/v1/v1/messages", "/v1/messages"),
    ],
)
def test_a_404_names_the_route_that_does_it(vllm: Stand, method: str, path: str, names: str) -> None:
    reply = vllm.client.request(method, path)
    assert reply.status_code in (404, 405)
    assert names in reply.text.replace(f"'{path}'", "")


def test_a_trailing_slash_is_the_same_route(vllm: Stand) -> None:
    answered(ask(vllm, RESPONSES + "/", input="hi", messages=None))
    answered(ask(vllm, MESSAGES + "/", max_tokens=5))
    answered(ask(vllm, COUNT + "/"))


# ------------------------------------------------------------------------------------------- limits and leaving


def test_the_servers_limit_of_tokens() -> None:
    with Stand("vllm", max_tokens_cap=3) as stand:
        reply = ask(stand, RESPONSES, max_output_tokens=32000)
        assert ignored(reply) == "max_output_tokens"
        assert reply.json()["incomplete_details"] == {"reason": "max_output_tokens"}
        reply = ask(stand, MESSAGES, max_tokens=32000)
        assert ignored(reply) == "max_tokens" and reply.json()["stop_reason"] == "max_tokens"
        assert answered(ask(stand, RESPONSES))["status"] == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BOTH)
def test_a_client_that_leaves_ends_the_work(stand: Stand, path: str, stream: bool) -> None:
    stand.engine.pace, stand.engine.text = 0.1, "word " * 200
    body: Json = {"model": stand.model, "stream": stream}
    body |= {"input": "hi"} if path == RESPONSES else {"messages": HI, "max_tokens": 500}
    with stand.leaving(path, **body) as client:
        stand.engine.wait(lambda: stand.engine.live == 1)
        if stream:
            client.getresponse().read(20)
    stand.engine.wait(lambda: stand.engine.live == 0, SOON)


# -------------------------------------------------------- the official clients, on the embedded engine and model

MODEL = "llamacpp/SmolLM2-135M-Instruct.Q4_1"
QUESTION = "What is the capital of France? Answer in one short sentence."


class Capital(pydantic.BaseModel):
    """Nothing in it that a small model could write without an end."""

    large: bool


@pytest.fixture
def client(real: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.base_url}/v1".replace("//v1", "/v1"), api_key="none", max_retries=0) as made:
        yield made


def test_openai_responses(client: openai.OpenAI) -> None:
    found = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0)
    assert "Paris" in found.output_text and found.model == MODEL
    assert found.usage and found.usage.output_tokens > 0
    history: Any = [{"role": "user", "content": QUESTION}, *found.output, {"role": "user", "content": "Thanks!"}]
    again = client.responses.create(model=MODEL, input=history, instructions="Be brief.", max_output_tokens=8)
    assert again.usage and found.usage.input_tokens < again.usage.input_tokens


def test_openai_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert "Paris" in text and final.output_text == text


def test_openai_responses_parse(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model=MODEL, input="Is Paris large?", text_format=Capital, max_output_tokens=64, temperature=0
    )
    assert isinstance(found.output_parsed, Capital)


def test_openai_responses_tools(stand: Stand) -> None:
    """On the fakes: the embedded model's template shows no tools."""
    stand.engine.tool_call = ("weather", {"city": "Köln"})
    tools: Any = [WEATHER]
    with openai.OpenAI(base_url=f"{stand.url}/v1", api_key="none", max_retries=0) as made:
        found = made.responses.create(model=stand.model, input="Weather?", tools=tools)
        (call,) = [item for item in found.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Köln"}
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        history: Any = [{"role": "user", "content": "Weather?"}, *found.output, output]
        with made.responses.stream(model=stand.model, input=history, tools=tools) as stream:
            assert stream.get_final_response().output_text == TEXT


def test_tools_on_a_model_without_them(client: openai.OpenAI) -> None:
    tools: Any = [WEATHER]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Weather?", tools=tools)
    assert caught.value.code == "unsupported_feature" and caught.value.param == "tools"


def test_openai_chat_parse(client: openai.OpenAI) -> None:
    ask_for: Any = [{"role": "user", "content": "Is Paris large?"}]
    found = client.chat.completions.parse(
        model=MODEL, messages=ask_for, response_format=Capital, max_tokens=64, temperature=0
    )
    assert isinstance(found.choices[0].message.parsed, Capital)
    with client.chat.completions.stream(
        model=MODEL, messages=ask_for, response_format=Capital, max_tokens=64, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Capital)


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="none", input="hi")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=MODEL, input="word " * 30_000)
    assert long.value.code == "context_length_exceeded" and "maximum context length" in str(long.value)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_openai_async(client: openai.OpenAI) -> None:
    async def work() -> str:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as made:
            found = await made.responses.create(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0)
            texts = []
            stream = await made.responses.create(
                model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0, stream=True
            )
            async for event in stream:
                if event.type == "response.output_text.delta":
                    texts.append(event.delta)
            assert "".join(texts) == found.output_text
            chat = await made.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
            )
            assert chat.choices[0].message.content == found.output_text
            return found.output_text

    assert "Paris" in asyncio.run(work())


@pytest.fixture
def anthropic_client(real: httpx.Client) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=str(real.base_url), api_key="none", max_retries=0) as made:
        yield made


MESSAGE: Json = {
    "model": MODEL,
    "max_tokens": 24,
    "messages": [{"role": "user", "content": QUESTION}],
    "extra_body": {"temperature": 0},  # anthropic 2 has no argument for it
}


def test_anthropic_create(anthropic_client: Any) -> None:
    found = anthropic_client.messages.create(**MESSAGE)
    assert "Paris" in found.content[0].text and found.model == MODEL
    assert found.stop_reason in ("end_turn", "max_tokens") and found.usage.output_tokens > 0
    counted = anthropic_client.messages.count_tokens(model=MODEL, messages=MESSAGE["messages"])
    assert counted.input_tokens == found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)


def test_anthropic_stream(anthropic_client: Any) -> None:
    with anthropic_client.messages.stream(**MESSAGE) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert "Paris" in text and final.content[0].text == text
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 0


def test_anthropic_tools(stand: Stand) -> None:
    anthropic = pytest.importorskip("anthropic")
    stand.engine.tool_call = ("weather", {"city": "Köln"})
    asked: Json = {"model": stand.model, "max_tokens": 64, "messages": HI, "tools": [TOOL]}
    with anthropic.Anthropic(base_url=stand.url, api_key="none", max_retries=0) as made:
        found = made.messages.create(**asked)
        (call,) = [block for block in found.content if block.type == "tool_use"]
        assert (call.input, found.stop_reason) == ({"city": "Köln"}, "tool_use")
        with made.messages.stream(**asked) as stream:
            assert stream.get_final_message().content[-1].input == call.input
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        asked["messages"] = [
            *HI,
            {"role": "assistant", "content": found.content},
            {"role": "user", "content": [result]},
        ]
        assert made.messages.create(**asked).content[0].text == TEXT
        assert made.messages.count_tokens(model=stand.model, messages=asked["messages"], tools=[TOOL]).input_tokens > 0


def test_anthropic_beta(stand: Stand) -> None:
    """`client.beta.messages` asks with ?beta=true."""
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=stand.url, api_key="none", max_retries=0) as made:
        found = made.beta.messages.create(model=stand.model, max_tokens=64, messages=HI, betas=["effort-2025-11-24"])
        assert found.content[0].text == TEXT


def test_anthropic_finds_the_id_of_a_request(vllm: Stand) -> None:
    """In the header that Anthropic's API calls request-id, also of an error."""
    anthropic = pytest.importorskip("anthropic")
    asked: Json = {"model": "vllm/m", "max_tokens": 8, "messages": HI}
    with anthropic.Anthropic(base_url=vllm.url, api_key="none", max_retries=0) as made:
        found = made.messages.create(**asked)
        assert found.id == f"msg_{found._request_id.replace('-', '')}"
        assert made.messages.count_tokens(model="vllm/m", messages=HI)._request_id
        with made.messages.stream(**asked) as stream:
            assert stream.request_id and stream.request_id != found._request_id
        with pytest.raises(anthropic.NotFoundError) as caught:
            made.messages.create(**asked | {"model": "none"})
        assert caught.value.request_id == caught.value.body["request_id"]


def test_anthropic_structured(anthropic_client: Any) -> None:
    if not hasattr(anthropic_client.messages, "parse"):
        pytest.skip("this anthropic has no messages.parse")
    found = anthropic_client.messages.parse(**MESSAGE | {"max_tokens": 40}, output_format=Capital)
    assert isinstance(found.parsed_output, Capital)


def test_anthropic_errors(anthropic_client: Any) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError):
        anthropic_client.messages.create(**MESSAGE | {"model": "none"})
    with pytest.raises(anthropic.BadRequestError) as caught:
        anthropic_client.messages.create(**MESSAGE | {"extra_body": {"temperature": 2}})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert [model.id for model in anthropic_client.models.list()] == [MODEL]
    assert anthropic_client.models.retrieve(MODEL).display_name


def test_anthropic_async(anthropic_client: Any) -> None:
    import anthropic

    async def work() -> str:
        async with anthropic.AsyncAnthropic(base_url=anthropic_client.base_url, api_key="none", max_retries=0) as made:
            found = await made.messages.create(**MESSAGE)
            async with made.messages.stream(**MESSAGE) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            assert text == found.content[0].text
            counted = await made.messages.count_tokens(model=MODEL, messages=MESSAGE["messages"])
            assert counted.input_tokens > 0
            return text

    assert "Paris" in asyncio.run(work())


def test_no_tool_is_called_that_the_caller_did_not_allow(vllm: Stand) -> None:
    """A model may call what it was not offered: a small one does, and vLLM's hermes parser lets it through."""
    vllm.engine.tool_call = ("weather", {"city": "Paris"})
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    reply = ask(vllm, RESPONSES, tools=[WEATHER, {**WEATHER, "name": "other"}], tool_choice=choice)
    assert [tool["function"]["name"] for tool in vllm.engine.body["tools"]] == ["other"]
    assert "weather" not in [item.get("name") for item in reply.json().get("output", ())]
