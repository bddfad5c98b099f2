"""What clients send by habit: defaults written out, nulls, and dumps of earlier answers. All of it passes, everywhere.

One row is one value that asks for nothing. Each is sent alone and all are sent together, to every engine, on every
surface, whole and streamed; the answer is the one that the bare request gets."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llm_inference import LLMInferencer
from tests.conftest import Attach
from tests.fake_engine import TEXT
from tests.harness import API, Stand, payloads

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "Hi"}
NULLS = (
    "temperature top_p max_tokens seed stop presence_penalty frequency_penalty logprobs top_logprobs tools tool_choice "
    "parallel_tool_calls response_format"
).split()
#: OpenAI's defaults, as SDKs, LangChain, LiteLLM, Open WebUI and others write them out
CHAT: list[Json] = [
    *({name: None} for name in NULLS),
    *({name: None} for name in ("n", "logit_bias", "user", "stream_options", "max_completion_tokens", "functions")),
    *({name: None} for name in ("function_call", "audio", "modalities")),
    *({name: None} for name in ("prediction", "metadata", "store", "verbosity")),
    *({name: None} for name in ("reasoning_effort", "service_tier")),
    *({name: None} for name in ("web_search_options", "extra_body", "prompt_cache_key")),
    {"n": 1}, {"temperature": 1}, {"temperature": 1.0}, {"top_p": 1}, {"top_p": 1.0}, {"logprobs": False},
    {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"stop": []}, {"tools": []},
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []},
    {"functions": [], "function_call": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
    {"logit_bias": {}}, {"store": False}, {"metadata": {}}, {"user": ""}, {"service_tier": "auto"},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}}, {"verbosity": "medium"}, {"max_tokens": -1}, {"best_of": 1},
    {"top_logprobs": 0, "logprobs": False}, {"safety_identifier": "u"}, {"prompt_cache_key": "k"},
]  # fmt: skip
COMPLETIONS: list[Json] = [
    *({name: None} for name in ("suffix", "best_of", "echo", "logit_bias", "logprobs", "n", "stop", "user", "seed")),
    {"n": 1}, {"best_of": 1}, {"echo": False}, {"suffix": ""}, {"temperature": 1}, {"top_p": 1},
    {"presence_penalty": 0},
    {"frequency_penalty": 0}, {"logit_bias": {}}, {"stop": []}, {"user": ""}, {"stream_options": None},
]  # fmt: skip
OWN: list[Json] = [
    *({name: None} for name in NULLS if name != "response_format"),
    *({name: None} for name in ("model_name", "engine_type", "schema", "choice")),
    *({name: None} for name in ("regex", "grammar", "think", "system")),
    {"temperature": 1}, {"top_p": 1}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"repetition_penalty": 1.0},
    {"presence_penalty": 0}, {"stop": []}, {"tools": []}, {"tool_choice": "auto"},
    {"logprobs": False}, {"think": False},
    {"parallel_tool_calls": True}, {"max_tokens": -1},
]  # fmt: skip
RESPONSES: list[Json] = [
    *({name: None} for name in ("instructions", "previous_response_id", "reasoning", "text", "tools", "tool_choice")),
    *({name: None} for name in ("max_output_tokens", "metadata", "include", "truncation", "user", "store", "prompt")),
    *({name: None} for name in ("background", "max_tool_calls", "service_tier", "top_logprobs", "conversation")),
    {"temperature": 1.0}, {"top_p": 1.0}, {"store": False}, {"tools": []}, {"tool_choice": "auto"}, {"include": []},
    {"parallel_tool_calls": True}, {"truncation": "disabled"}, {"metadata": {}}, {"background": False},
    {"text": {"format": {"type": "text"}}}, {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
    {"reasoning": {"effort": None, "summary": None}}, {"service_tier": "auto"}, {"top_logprobs": 0}, {"user": "u"},
]  # fmt: skip
MESSAGES: list[Json] = [
    *({name: None} for name in ("system", "temperature", "top_k", "top_p", "stop_sequences", "tools", "tool_choice")),
    *({name: None} for name in ("metadata", "thinking", "service_tier", "container")),
    {"system": ""}, {"system": []}, {"temperature": 1.0}, {"top_p": 1.0}, {"stop_sequences": []}, {"tools": []},
    {"tools": [], "tool_choice": {"type": "auto"}}, {"metadata": {}}, {"metadata": {"user_id": "u"}},
    {"thinking": {"type": "disabled"}}, {"service_tier": "auto"},
]  # fmt: skip
#: a path, what must be sent there, and what is sent by habit
SURFACES: dict[str, tuple[str, Json, list[Json]]] = {
    "chat": ("/v1/chat/completions", {"messages": [USER]}, CHAT),
    "completions": ("/v1/completions", {"prompt": "Hi"}, COMPLETIONS),
    "responses": ("/v1/responses", {"input": "Hi"}, RESPONSES),
    "messages": ("/v1/messages", {"messages": [USER], "max_tokens": 64}, MESSAGES),
    "own chat": (f"{API}/chat", {"messages": [USER]}, OWN),
    "own generate": (f"{API}/generate", {"prompt": "Hi"}, OWN),
}


def together(rows: list[Json]) -> Json:
    """All of them in one request; the later of two values of the same field."""
    found: Json = {}
    for fields in rows:
        found |= fields
    return {name: value for name, value in found.items() if name != "max_tokens" or value is not None}


def text_of(reply: httpx.Response, stream: bool) -> str:
    """The answer's text on any surface; an assertion where there is none."""
    assert reply.status_code == 200, reply.text
    if stream:
        return "".join(map(piece_of, events_of(reply)))
    body = reply.json()
    if "data" in body:
        return str(body["data"]["text"])
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    blocks = body["output"][-1]["content"] if "output" in body else body["content"]
    return str(blocks[-1]["text"])


def events_of(reply: httpx.Response) -> Iterator[Json]:
    """The JSON of a stream's events, whatever stands beside it."""
    assert "error" not in reply.text.replace('"error":null', ""), reply.text
    if "event: " not in reply.text:
        yield from (event for event in payloads(reply) if event != "[DONE]")
        return
    for line in reply.text.splitlines():
        if line.startswith("data: "):
            yield httpx.Response(200, text=line[6:]).json()


def piece_of(event: Json) -> str:
    if isinstance(event.get("data"), dict):
        return str(event["data"].get("delta", ""))
    if event.get("choices"):
        choice = event["choices"][0]
        return str((choice["delta"].get("content") if "delta" in choice else choice["text"]) or "")
    delta = event.get("delta")
    if event.get("type") == "response.output_text.delta":
        return str(delta)
    return str(delta.get("text", "")) if isinstance(delta, dict) and event.get("type") == "content_block_delta" else ""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("surface", SURFACES)
def test_each_habit_passes_alone_and_with_all_others(surface: str, stream: bool, stand: Stand) -> None:
    path, needed, rows = SURFACES[surface]
    model = {"model": stand.model} if path.startswith("/v1") else {}
    wrong = {}
    for fields in [*rows, together(rows)]:
        body = {**needed, **fields, **model, **({"stream": True} if stream else {})}
        body |= {name: value for name, value in needed.items() if body.get(name) is None}
        reply = stand.client.post(path, json=body)
        try:
            assert text_of(reply, stream) == TEXT
        except (AssertionError, KeyError, TypeError) as exc:
            wrong[str(fields)[:80]] = f"{type(exc).__name__}: {exc}"[:200]
    assert not wrong, wrong


@pytest.mark.parametrize("fields", [*OWN, together(OWN)], ids=lambda fields: str(fields)[:40])
def test_each_habit_passes_in_python(fields: Json, faked: Any) -> None:
    fields = {name: value for name, value in fields.items() if name != "engine_type"}
    assert faked.llm.complete([USER], **fields).text == TEXT


#: earlier answers as clients dump them, with what their libraries add
ASSISTANTS: list[Json] = [
    {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "audio": None, "function_call": None,
     "tool_calls": None},
    {"role": "assistant", "content": "Hello", "reasoning": None, "reasoning_content": None, "tool_calls": []},
    {"role": "assistant", "content": "Hello", "name": None, "refusal": None},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
]  # fmt: skip
OUTPUT: Json = {
    "id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": None,
    "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
}  # fmt: skip
BLOCKS: list[Json] = [
    {"role": "assistant", "content": [{"type": "text", "text": "Hello", "citations": None}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello", "cache_control": None}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]},
]


@pytest.mark.parametrize("dump", ASSISTANTS, ids=range(len(ASSISTANTS)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", f"{API}/chat"])
def test_a_dumped_answer_passes(path: str, dump: Json, stand: Stand) -> None:
    model = {"model": stand.model} if path.startswith("/v1") else {}
    reply = stand.client.post(path, json={"messages": [USER, dump, {**USER, "name": None}], **model})
    assert text_of(reply, False) == TEXT
    with LLMInferencer(stand.engine.dialect, base_url=stand.engine.base_url) as llm:
        assert llm.chat([USER, dump, USER]) == TEXT


def test_a_dumped_response_passes(stand: Stand) -> None:
    """The whole output of a response, of ours and as OpenAI writes it."""
    first = stand.post("/v1/responses", model=stand.model, input="Hi").json()
    for output in (first["output"], [OUTPUT]):
        body = {"model": stand.model, "input": [{**USER, "type": "message"}, *output, USER]}
        assert text_of(stand.client.post("/v1/responses", json=body), False) == TEXT


def test_a_dumped_message_passes(stand: Stand) -> None:
    first = stand.post("/v1/messages", model=stand.model, messages=[USER], max_tokens=64).json()
    for dump in ({"role": "assistant", "content": first["content"]}, *BLOCKS):
        body = {"model": stand.model, "messages": [USER, dump, USER], "max_tokens": 64}
        assert text_of(stand.client.post("/v1/messages", json=body), False) == TEXT


@pytest.mark.parametrize("surface", SURFACES)
def test_the_real_engine_takes_all_of_them(surface: str, real: httpx.Client) -> None:
    """What we pass on of them the embedded engine accepts."""
    path, needed, rows = SURFACES[surface]
    body = {**needed, **together(rows)}
    limit = "max_output_tokens" if surface == "responses" else "max_tokens"
    body |= {name: value for name, value in needed.items() if body.get(name) is None} | {limit: 4}
    if path.startswith("/v1"):
        body["model"] = real.get("/v1/models").json()["data"][0]["id"]
    assert text_of(real.post(path, json=body), False)


def test_unhelpful_habits_are_still_refused(attach: Attach, vllm: Stand) -> None:
    """The matrix can fail: a value that asks for something is no habit."""
    for fields in ({"modalities": ["audio"]}, {"n": 0}, {"functions": [{"name": "f"}]}):
        reply = vllm.post("/v1/chat/completions", model=vllm.model, messages=[USER], **fields)
        assert reply.status_code == 400, (fields, reply.text)
