"""One example of each kind of fault that was found once, by its row (A1 … E20), on every surface where it can occur."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest

import llm_inference as product
from llm_inference import Chunk, InferenceError, InvalidRequest, LLMInferencer, UnsupportedFeature
from tests.conftest import Attach
from tests.fake_engine import DIALECTS, OPENAI_DIALECTS, Dialect, FakeEngine, Reply, dumps
from tests.harness import SOON, Command, Stand, collect, good, payloads, refused, refused_v1, serving, until

Make = Callable[..., FakeEngine]
Json = dict[str, Any]
SURFACES = ("own", "own-stream", "v1", "v1-stream", "python", "python-stream")
#: each interface once, for what does not depend on how the answer is read
EACH_INTERFACE = ("own", "v1-stream", "python")
OBJECT: Json = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
CITY_TOOL: Json = {
    "type": "function",
    "function": {"name": "get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@dataclass
class Outcome:
    """What a caller got, whatever the surface."""

    kind: str = ""  #: the error's kind; "" for an answer
    message: str = ""
    status: int = 200
    param: str | None = None
    text: str = ""
    finish: str | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    model: str = ""
    enforced_by: str = "none"
    result: Any = None


def ask(stand: Stand, surface: str, /, **fields: Any) -> Outcome:
    """One request in our own vocabulary on that surface. `schema` becomes `response_format` on /v1."""
    fields.setdefault("messages", [{"role": "user", "content": "Hi"}])
    if surface.startswith("v1"):
        return _ask_v1(stand.client, surface.endswith("stream"), {"model": stand.model, **fields})
    if surface.startswith("own"):
        return _ask_own(stand.client, surface.endswith("stream"), fields)
    with LLMInferencer(stand.engine.dialect, base_url=stand.engine.base_url) as llm:
        return ask_python(llm, surface.endswith("stream"), **fields)


def _ask_own(client: httpx.Client, stream: bool, fields: Json) -> Outcome:
    reply = client.post("/api/v1/llm/chat", json=fields | ({"stream": True} if stream else {}))
    if reply.status_code != 200:
        return Outcome(reply.headers["x-error-kind"], reply.json()["msg"], reply.status_code)
    if not stream:
        data = good(reply)
        return Outcome(
            text=data["text"],
            finish=data["finish_reason"],
            calls=[(c["function"]["name"], c["function"]["arguments"]) for c in data.get("tool_calls", ())],
            ignored=tuple(data.get("ignored", ())),
            model=data["model_name"],
            enforced_by=data.get("enforced_by", "none"),
        )
    found = Outcome()
    events = payloads(reply)
    if events[-1] != "[DONE]":
        message = events[-1]["msg"]
        return Outcome(message.partition(":")[0], message, reply.status_code)
    for event in events[:-1]:
        data = event["data"]
        found.text += data.get("delta", "")
        found.finish = data.get("finish_reason") or found.finish
        found.ignored = tuple(data.get("ignored", ())) or found.ignored
        _join(found.calls, data.get("tool_call_delta", ()))
    return found


def _join(calls: list[tuple[str, Any]], deltas: Any) -> None:
    for delta in deltas:
        index = delta.get("index", len(calls))
        if not 0 <= index < len(calls):
            calls.append(("", ""))
        name, arguments = calls[min(abs(index), len(calls) - 1)]
        function = delta.get("function") or {}
        call = (name or function.get("name") or "", arguments + (function.get("arguments") or ""))
        calls[min(abs(index), len(calls) - 1)] = call


def _ask_v1(client: httpx.Client, stream: bool, fields: Json) -> Outcome:
    if "schema" in fields:
        form = {"name": "a", "schema": fields.pop("schema")}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    reply = client.post("/v1/chat/completions", json=fields | ({"stream": True} if stream else {}))
    if reply.status_code != 200:
        return _v1_error(reply.json()["error"], reply.status_code, reply.headers["x-error-kind"])
    listed = reply.headers.get("x-ignored-fields", "")
    found = Outcome(ignored=tuple(listed.split(", ")) if listed else ())
    if not stream:
        body = reply.json()
        choice = body["choices"][0]
        found.text, found.finish = choice["message"].get("content") or "", choice["finish_reason"]
        found.model = body["model"]
        for call in choice["message"].get("tool_calls") or ():
            found.calls.append((call["function"]["name"], call["function"]["arguments"]))
        return found
    for event in payloads(reply):
        if event == "[DONE]":
            return found
        if "error" in event:
            return _v1_error(event["error"], 200, "")
        for choice in event["choices"]:
            found.text += choice["delta"].get("content") or ""
            found.finish = choice.get("finish_reason") or found.finish
            _join(found.calls, choice["delta"].get("tool_calls") or ())
        found.model = event.get("model") or found.model
    raise AssertionError("the stream has no end")


def _v1_error(error: Json, status: int, kind: str) -> Outcome:
    return Outcome(kind or error["code"], error["message"], status, error["param"])


def ask_python(llm: LLMInferencer, stream: bool, **fields: Any) -> Outcome:
    messages = fields.pop("messages")
    try:
        if not stream:
            done = llm.complete(messages, **fields)
        else:
            request = llm.request(messages, **fields)
            chunks: list[Chunk] = []
            for burst in asyncio.run(collect(llm.bursts(request))):
                chunks += burst
            done = product.Completion.from_chunks(chunks)
    except InferenceError as exc:
        return Outcome(exc.kind, exc.message, exc.status, exc.param)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in done.tool_calls]
    return Outcome(
        text=done.text, finish=done.finish_reason, calls=calls, ignored=done.ignored, model=done.model_name,
        enforced_by=done.enforced_by, result=done.result,
    )  # fmt: skip


def answered(outcome: Outcome) -> Outcome:
    assert not outcome.kind, outcome
    return outcome


def failed(outcome: Outcome, *kinds: str) -> Outcome:
    assert outcome.kind in kinds, outcome
    return outcome


def schema_reply(engine: FakeEngine, text: str) -> None:
    engine.answer = lambda ask: text


def call_reply(dialect: Dialect, calls: list[tuple[str, Any]], stream: bool, finish: str = "tool_calls") -> Reply:
    """An answer with these calls, in the engine's own form."""
    if dialect == "ollama":
        own = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
        line = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": "stop"}
        line |= {"message": {"role": "assistant", "content": "", "tool_calls": own}}
        line |= {"prompt_eval_count": 3, "eval_count": 4}
        kind = "application/x-ndjson" if stream else "application/json"
        return Reply(headers={"content-type": kind}, pieces=[dumps(line) + b"\n"])
    found = []
    for index, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": json.dumps(arguments)}
        found.append({"index": index, "id": f"c{index}", "type": "function", "function": function})
    return openai_reply({"role": "assistant", "content": None, "tool_calls": found}, stream, finish)


def openai_reply(message: Json, stream: bool, finish: Any = "stop") -> Reply:
    """A complete answer with that message, or a stream with it as its one delta."""
    base = {"id": "x", "created": 1, "model": "m"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    if not stream:
        body = {**base, "object": "chat.completion", "usage": usage}
        body["choices"] = [{"index": 0, "message": message, "finish_reason": finish}]
        return Reply(headers={"content-type": "application/json"}, pieces=[dumps(body)])
    chunk = {**base, "object": "chat.completion.chunk"}
    events = [
        {**chunk, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
        {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        {**chunk, "choices": [], "usage": usage},
    ]
    return event_reply(*events)


def event_reply(*events: Any) -> Reply:
    """A stream of these events and [DONE]."""
    pieces = [b"data: " + (each if isinstance(each, bytes) else dumps(each)) + b"\n\n" for each in events]
    return Reply(headers={"content-type": "text/event-stream"}, pieces=[*pieces, b"data: [DONE]\n\n"], chunked=True)


def streams_inside(dialect: Dialect, stream: bool) -> bool:
    """Does the engine see a stream?"""
    return stream or dialect in ("sglang", "llamacpp")


def is_stream(surface: str) -> bool:
    return surface.endswith("stream")


# A. Silently dropped, or success that is none ---------------------------------------------------------------
#: how a forced call together with a format may be refused; Ollama cannot force a call at all
FORCED_REFUSALS = ("invalid_request", "unsupported_feature")
FORCED: tuple[Any, ...] = ("required", {"type": "function", "function": {"name": "get"}})
JSON_FORMATS = (
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT}},
    {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": OBJECT}},
)


@pytest.mark.parametrize("form", JSON_FORMATS, ids=["object", "schema", "strict"])
@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_a1_a_forced_call_with_a_response_format(surface: str, form: Json, stand: Stand) -> None:
    """A1: a call and an answer in that format cannot both be had."""
    for choice in FORCED:
        outcome = failed(
            ask(stand, surface, tools=[CITY_TOOL], tool_choice=choice, response_format=form), "invalid_request"
        )
        assert outcome.status == 400 and "response_format" in outcome.message
    assert not stand.engine.asked


@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_a1_offered_tools_with_a_response_format(surface: str, stand: Stand) -> None:
    """A1's sibling: a call, or an answer in that format; never an answer that is neither."""
    form = JSON_FORMATS[1]
    for choice in ({}, {"tool_choice": "auto"}):
        stand.engine.tool_call = ("get", {"city": "Paris"})
        assert answered(ask(stand, surface, tools=[CITY_TOOL], response_format=form, **choice)).calls
        stand.engine.tool_call = None
        schema_reply(stand.engine, "no JSON")
        failed(ask(stand, surface, tools=[CITY_TOOL], response_format=form, **choice), "structured_output_invalid")


@pytest.mark.parametrize(
    "constraint", [{"schema": OBJECT}, {"choice": ["a"]}, {"regex": "a"}, {"grammar": 'root ::= "a"'}]
)
@pytest.mark.parametrize("surface", ["own", "own-stream", "python", "python-stream"])
def test_a1_tools_with_a_constraint(surface: str, constraint: Json, vllm: Stand) -> None:
    for choice in ("auto", "required"):
        outcome = ask(vllm, surface, tools=[CITY_TOOL], tool_choice=choice, **constraint)
        failed(outcome, "invalid_request")
    assert not vllm.engine.asked


def test_a1_on_responses_and_messages(stand: Stand) -> None:
    """A1: a call where one is forced, else a call or an answer in that format; never an answer that is neither."""
    parameters = CITY_TOOL["function"]["parameters"]
    text = {"format": {"type": "json_schema", "name": "a", "schema": OBJECT}}
    response: Json = {
        "input": "x",
        "tools": [{"type": "function", "name": "get", "parameters": parameters}],
        "text": text,
    }
    messages = [{"role": "user", "content": "x"}]
    message: Json = {"messages": messages, "max_tokens": 99, "tools": [{"name": "get", "input_schema": parameters}]}
    message["output_config"] = {"format": {"type": "json_schema", "schema": OBJECT}}
    asked = [("/v1/responses", response | {"tool_choice": choice}) for choice in ("auto", "required")]
    asked += [("/v1/messages", message | {"tool_choice": {"type": choice}}) for choice in ("auto", "any")]
    for path, body in asked:
        stand.engine.reset()
        for call in (None, ("get", {"city": "Paris"})):
            stand.engine.tool_call = call
            reply = stand.post(path, model=stand.model, **body)
            if reply.status_code == 200:
                assert "tool_use" in reply.text or '"function_call"' in reply.text, reply.text
            else:
                assert reply.headers["x-error-kind"] in ("structured_output_invalid", *FORCED_REFUSALS), reply.text


@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_a1_tools_that_are_switched_off_do_not_contradict(surface: str, stand: Stand) -> None:
    schema_reply(stand.engine, '{"a": "x"}')
    answered(ask(stand, surface, tools=[CITY_TOOL], tool_choice="none", schema=OBJECT))
    answered(ask(stand, surface, tools=[CITY_TOOL], response_format={"type": "text"}))


#: a pattern, and whether llama.cpp must be able to enforce it
PATTERNS: dict[str, bool] = {
    r"^\d{3}$": True,
    r"^[\d]{2}-\d$": True,
    r"^\w{2,4}$": True,
    r"^\s?x\S$": True,
    r"^\D{2}$": True,
    r"^[^\d\s]{2}$": True,
    r"^\W$": True,
    r"^(?:ab|cd){2}$": True,
    r"^(ok|no)$": True,
    r"^a|b$": True,
    r"\d{3}": True,
    r"^ab": True,
    r"ab$": True,
    r"^\x41\u0042$": True,
    r"^a\.b\/c\-d$": True,
    r'^"\\$': True,
    r"^a{0,2}b+?$": True,
    r"^[A-Z][a-z]{2}\t$": True,
    r"^\bfoo\b$": False,
    r"^(?=a)ab$": False,
    r"^(?!a)b$": False,
    r"^(?i)ok$": False,
    r"^\p{L}{2}$": False,
    r"^(a)\1$": False,
}


#: those that the real engine is asked with: what it must refuse costs nothing
ASKED_PATTERNS = [r"^\d{3}$", r"^\w{2,4}$", r"^[^\d\s]{2}$", r"^\D{2}$", r"^a|b$", r"\d{3}", r'^"\\$', r"^\x41\u0042$"]
ASKED_PATTERNS += [pattern for pattern, enforced in PATTERNS.items() if not enforced]


@pytest.mark.parametrize("pattern", ASKED_PATTERNS)
def test_a2_pattern_on_the_embedded_engine(pattern: str, embedded: LLMInferencer) -> None:
    """A2: constrained, or refused by name; never `engine` when it was not."""
    text = {"type": "string", "pattern": pattern, "maxLength": 8}
    schema = {"type": "object", "properties": {"x": text}, "required": ["x"]}
    matches = product.matcher(pattern) if PATTERNS[pattern] else None
    for seed in range(2):
        try:
            done = embedded.complete("Tell me a story.", schema=schema, max_tokens=40, temperature=1.5, seed=seed)
        except (UnsupportedFeature, InvalidRequest) as exc:
            assert not PATTERNS[pattern] and "pattern" in exc.message, exc
            return
        except product.StructuredOutputInvalid as exc:
            other = "max_tokens" in exc.message or "maxLength" in exc.message  # which no grammar says beside a pattern
            assert not PATTERNS[pattern] or other, (pattern, exc, exc.text)
            continue
        assert done.finish_reason == "stop"
        if matches:
            assert matches(done.result["x"]), done.result
        if done.enforced_by == "engine":
            assert PATTERNS[pattern], done


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if "$" in pattern and "^" in pattern])
@pytest.mark.parametrize("surface", ["own", "v1-stream"])
def test_a2_what_llamacpp_is_sent(pattern: str, surface: str, all_stands: dict[str, Stand]) -> None:
    """A2: no class that its converter does not know reaches llama.cpp, and nothing that is not anchored."""
    stand = all_stands["llamacpp"]
    stand.engine.reset()
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}, "required": ["x"]}
    ask(stand, surface, schema=schema)
    for body in stand.engine.bodies:
        sent = json.dumps(body.get("response_format") or body.get("json_schema"))
        for unknown in (r"\\d", r"\\D", r"\\w", r"\\W", r"\\s", r"\\S", r"\\b", r"\\p", "(?="):
            assert unknown not in sent.replace("\\\\\\\\", ""), sent


REGEXES: dict[str, bool] = {
    r"\d{3}": True,
    r"^\d{3}$": True,
    r"[\w-]{3}": True,
    r"(yes|no)": True,
    r"(?:a|b){2}": True,
    r"[^\s]{2}": True,
    r"\S \S": True,
    r"\u4e2d\u6587?": True,
    r"a\"b\\c": True,
    r"\bfoo\b": False,
    r"(?=f)foo": False,
    r"(?i)foo": False,
    r"(a)\1": False,
    r"\Bx": False,
    r"x(?<=x)": False,
    r"a$b": False,
}


@pytest.mark.parametrize("regex", REGEXES)
def test_a3_regex_on_the_embedded_engine(regex: str, embedded: LLMInferencer) -> None:
    for seed in range(1):
        try:
            done = embedded.complete("Tell me a story.", regex=regex, max_tokens=16, temperature=1.5, seed=seed)
        except (UnsupportedFeature, InvalidRequest) as exc:
            assert not REGEXES[regex] and exc.reason, exc
            return
        assert REGEXES[regex] and done.enforced_by == "engine", done
        assert product.full_matcher(regex)(done.text)


TOOL_TEMPLATE = (  # the way of Hermes and Qwen
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '</tools>\nFor each function call return <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools() -> Iterator[LLMInferencer]:
    """The embedded engine with a template that knows tools."""
    llm = LLMInferencer("llamacpp", launch=True, launch_args=[f"chat_template={TOOL_TEMPLATE}", "n_ctx=2048"])
    yield llm
    llm.close()


@contextlib.contextmanager
def served(llm: LLMInferencer, **settings: Any) -> Iterator[httpx.Client]:
    """The server in front of an inferencer."""
    app = product.create_app(product.Settings(**settings), llm)
    with serving(app) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
def test_a4_forced_call_on_the_embedded_engine(choice: Any, with_tools: LLMInferencer) -> None:
    """A4: a real call, or an error that says so, whatever max_tokens is."""
    fields = {"tools": [CITY_TOOL], "tool_choice": choice, "temperature": 0.0}
    messages = [{"role": "user", "content": "Write a long story."}]
    with served(with_tools) as client:
        model = "llamacpp/" + with_tools.models()[0].name
        for limit, streams in ((4, (False, True)), (60, (True,))):
            for stream in streams:
                asked = fields | {"messages": messages, "max_tokens": limit}
                v1 = _ask_v1(client, stream, {"model": model} | asked)
                for outcome in (v1, _ask_own(client, stream, asked), ask_python(with_tools, stream, **asked)):
                    if outcome.kind:
                        failed(outcome, "structured_output_invalid")
                        assert "max_tokens" in outcome.message, outcome
                    else:
                        assert outcome.calls and outcome.calls[0][0] == "get" and not outcome.text, outcome


@pytest.mark.parametrize("finish", ["length", "stop"])
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_a4_prose_instead_of_a_forced_call(
    dialect: Dialect, surface: str, finish: str, all_stands: dict[str, Stand]
) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    for _ in range(2):
        message = {"role": "assistant", "content": "Once upon a time"}
        stand.engine.script_chat(openai_reply(message, streams_inside(dialect, is_stream(surface)), finish))
    choice = FORCED[finish == "stop"]
    outcome = ask(stand, surface, tools=[CITY_TOOL], tool_choice=choice, max_tokens=1500)
    failed(outcome, "structured_output_invalid")
    assert "call" in outcome.message
    assert ("max_tokens was reached" in outcome.message) == (finish == "length"), outcome


A5_PATHS = ("/chat", "/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
#: complete answers of the two engines that work on after a hang-up, and one streamed answer of each of the others
A5_CASES = [(dialect, path, False) for dialect in ("llamacpp", "sglang") for path in A5_PATHS]
A5_CASES += [(dialect, "/v1/chat/completions", True) for dialect in DIALECTS]


@pytest.mark.parametrize(("dialect", "path", "stream"), A5_CASES)
def test_a5_a_client_that_hangs_up(dialect: Dialect, path: str, stream: bool, all_stands: dict[str, Stand]) -> None:
    """A5: the engine stops within a second, also while another stream runs."""
    stand = all_stands[dialect]
    stand.engine.reset()
    stand.engine.text, stand.engine.pace = "word " * 400, 0.1
    messages = [{"role": "user", "content": "x"}]
    body: Json = {"prompt": "x"} if path in ("/generate", "/v1/completions") else {"messages": messages}
    if path == "/v1/responses":
        body = {"input": "x"}
    if path.startswith("/v1"):
        body |= {"model": stand.model, "max_tokens" if path != "/v1/responses" else "max_output_tokens": 900}
    with stand.leaving("/v1/chat/completions", model=stand.model, messages=messages, stream=True) as other:
        stand.engine.wait(lambda: stand.engine.live == 1)
        with stand.leaving(path, **body, stream=stream):
            stand.engine.wait(lambda: stand.engine.live == 2)
        stand.engine.wait(lambda: stand.engine.live == 1, SOON)
        other.close()
    stand.engine.wait(lambda: stand.engine.live == 0, SOON)


PREFILL = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "The capital of France is"},
]


@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_a6_prefill_is_honoured(surface: str, stand: Stand) -> None:
    outcome = ask(stand, surface, messages=PREFILL, continue_final_message=True, add_generation_prompt=False)
    if stand.engine.dialect == "ollama":
        failed(outcome, "unsupported_feature")
    elif stand.engine.dialect == "sglang":  # it has no add_generation_prompt
        failed(outcome, "unsupported_feature")
        answered(ask(stand, surface, messages=PREFILL, continue_final_message=True))
        assert stand.engine.body["continue_final_message"] is True
    else:
        answered(outcome)
        assert stand.engine.body["add_generation_prompt"] is False
        assert stand.engine.body["messages"][-1]["role"] == "assistant"


def test_a6_prefill_on_the_embedded_engine(real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    for stream in (False, True):
        body = {"model": model, "messages": PREFILL, "continue_final_message": True, "max_tokens": 6, "temperature": 0}
        found = answered(_ask_v1(real, stream, body))
        assert "Paris" in found.text, found


STRICT_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"enum": ["London"]}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("surface", SURFACES)
def test_a7_a_strict_tool_is_checked(surface: str, stand: Stand) -> None:
    wrong: list[Json] = [{"city": "Paris"}]
    if stand.engine.dialect == "ollama":  # it checks nothing itself
        wrong += [{}, {"city": 5}]
    for arguments in wrong:
        stand.engine.tool_call = ("get", arguments)
        failed(ask(stand, surface, tools=[STRICT_TOOL]), "structured_output_invalid")
    stand.engine.tool_call = ("get", {"city": "London"})
    assert answered(ask(stand, surface, tools=[STRICT_TOOL])).calls


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a7_strict_on_the_other_surfaces(path: str, stand: Stand) -> None:
    stand.engine.tool_call = ("get", {"city": "Paris"})
    parameters = STRICT_TOOL["function"]["parameters"]
    if path == "/v1/responses":
        body: Json = {
            "input": "x",
            "tools": [{"type": "function", "name": "get", "strict": True, "parameters": parameters}],
        }
    else:
        tool = {"name": "get", "strict": True, "input_schema": parameters}
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 99, "tools": [tool]}
    reply = stand.post(path, model=stand.model, **body)
    assert reply.status_code == 502, reply.text


@pytest.fixture(scope="module")
def thinking() -> Iterator[Stand]:
    """An Ollama whose model thinks, and knows no levels of it: its template is empty."""
    with Stand("ollama", reasoning="Hm.") as stand:
        yield stand


@pytest.mark.parametrize("surface", ["own", "own-stream", "python", "python-stream"])
def test_a8_levels_of_thinking_on_ollama(surface: str, thinking: Stand) -> None:
    """A8: its template knows no levels: "low" is refused, or named; it is not silently the same as true."""
    answered(ask(thinking, surface, think=True))
    for level in ("low", "high"):
        outcome = ask(thinking, surface, think=level)
        assert outcome.kind == "unsupported_feature" or any("think" in name for name in outcome.ignored), outcome


@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_a8_reasoning_effort_on_ollama(surface: str, thinking: Stand) -> None:
    answered(ask(thinking, surface, reasoning_effort="none"))
    for level in ("low", "high"):
        outcome = ask(thinking, surface, reasoning_effort=level)
        assert outcome.kind == "unsupported_feature" or "reasoning_effort" in outcome.ignored, outcome


@pytest.mark.parametrize("surface", SURFACES)
def test_a8_a_messages_name_on_ollama(surface: str, all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    stand.engine.reset()
    for role in ("user", "assistant", "system"):
        messages = [{"role": role, "content": "Hi", "name": "Ann"}, {"role": "user", "content": "Hi"}]
        outcome = ask(stand, surface, messages=messages)
        assert outcome.kind == "unsupported_feature" or any("name" in each for each in outcome.ignored), outcome


def test_a9_logprobs_on_the_embedded_engine(real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    body: Json = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "logprobs": True}
    for more, wanted in (({"top_logprobs": 0}, 0), ({}, 0), ({"top_logprobs": 2}, 2)):
        items = real.post("/v1/chat/completions", json=body | more).json()["choices"][0]["logprobs"]["content"]
        assert len(items) == 3
        for item in items:
            assert set(item) == {"token", "logprob", "bytes", "top_logprobs"} and len(item["top_logprobs"]) == wanted
        reply = real.post("/v1/chat/completions", json=body | more | {"stream": True})
        items = []
        for event in payloads(reply)[:-1]:
            for choice in event["choices"]:
                items += (choice.get("logprobs") or {}).get("content") or []
        assert len(items) == 3, reply.text
        assert all(len(item["top_logprobs"]) == wanted for item in items)


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a9_logprobs_of_completions_on_the_embedded_engine(number: int, stream: bool, real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "One, two,", "max_tokens": 3, "logprobs": number, "stream": stream}
    reply = real.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    if stream:
        found: Json = {}
        for event in payloads(reply)[:-1]:
            for choice in event["choices"]:
                for name, values in (choice.get("logprobs") or {}).items():
                    found.setdefault(name, []).extend(values)
    else:
        found = reply.json()["choices"][0]["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}, found
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 3
    assert all(len(each) == number for each in found["top_logprobs"] or [()] * (number == 0))
    assert found["text_offset"] == sorted(set(found["text_offset"])), "offsets in the whole text"


@pytest.mark.parametrize("bias", [{"999999999": 5}, {"-1": 5}, "abc", {"5": "x"}, {"5": None}, [[1, 2, 3]], {"x": {}}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a9_a_logit_bias_that_is_none(bias: Any, path: str, real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    body: Json = {"model": model, "max_tokens": 2, "logit_bias": bias}
    body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    reply = real.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert "logit_bias" in reply.json()["error"]["message"]


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("dialect", ["ollama", "sglang"])
def test_a10_one_call_is_kept_to(dialect: Dialect, surface: str, all_stands: dict[str, Stand]) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    calls = [("get", {"city": "London"}), ("get", {"city": "Paris"})]
    stand.engine.script_chat(call_reply(dialect, calls, streams_inside(dialect, is_stream(surface))))
    outcome = ask(stand, surface, tools=[CITY_TOOL], parallel_tool_calls=False)
    if outcome.kind:
        failed(outcome, "unsupported_feature")
        return
    assert [json.loads(arguments) for _, arguments in outcome.calls] == [{"city": "London"}], outcome
    assert "parallel_tool_calls" not in outcome.ignored
    stand.engine.reset()
    stand.engine.script_chat(call_reply(dialect, calls, streams_inside(dialect, is_stream(surface))))
    assert len(answered(ask(stand, surface, tools=[CITY_TOOL], parallel_tool_calls=True)).calls) == 2


@pytest.mark.parametrize("surface", ["v1", "own", "python"])
@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
def test_a10_it_reaches_the_engines_that_honour_it(
    dialect: Dialect, surface: str, all_stands: dict[str, Stand]
) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    answered(ask(stand, surface, tools=[CITY_TOOL], parallel_tool_calls=False))
    assert stand.engine.body["parallel_tool_calls"] is False


@pytest.mark.parametrize("surface", ["v1", "v1-stream", "own", "python"])
@pytest.mark.parametrize("dialect", ["sglang", "ollama"])
def test_a10_calls_without_an_index(dialect: Dialect, surface: str, all_stands: dict[str, Stand]) -> None:
    """A10's sibling: two calls that both claim index 0, in two events."""
    stand = all_stands[dialect]
    stand.engine.reset()
    if dialect == "ollama":
        lines = []
        for city, done in (("London", False), ("Paris", False), ("", True)):
            calls = [{"function": {"index": 0, "name": "get", "arguments": {"city": city}}}] if city else []
            message = {"role": "assistant", "content": "", "tool_calls": calls}
            lines.append(dumps({"model": "m", "message": message, "done": done, "done_reason": "stop"}) + b"\n")
        if not is_stream(surface):
            pytest.skip("a complete answer has one list of calls")
        stand.engine.script_chat(Reply(headers={"content-type": "application/x-ndjson"}, pieces=lines, chunked=True))
    else:
        deltas = []
        for number, city in enumerate(("London", "Paris")):
            function = {"name": "get", "arguments": json.dumps({"city": city})}
            call = {"index": number, "id": f"c{number}", "type": "function", "function": function}
            delta = {"tool_calls": [call]}
            deltas.append({"id": "x", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        end = {"id": "x", "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
        stand.engine.script_chat(event_reply(*deltas, end))
    outcome = answered(ask(stand, surface, tools=[CITY_TOOL], parallel_tool_calls=False))
    assert [json.loads(arguments) for _, arguments in outcome.calls] == [{"city": "London"}], outcome


# B. Text that becomes code -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form", ["plain", "list", "nested", "List", "Optional", "dict", "tuple", "model", "typed dict"]
)
@pytest.mark.parametrize("verb", ["structured_generate", "complete", "batch"])
def test_b1_a_text_is_never_a_type(form: str, verb: str, attach: Attach, fake: Make, tmp_path: Path) -> None:
    import typing

    mark = tmp_path / "evaluated"
    code = f"__import__('os').system('touch {mark}')"
    schemas: dict[str, Any] = {
        "plain": code,
        "list": [code],
        "nested": {"a": {"b": [code]}},
        "List": typing.List[code],  # type: ignore[valid-type] # noqa: UP006
        "Optional": typing.Optional[code],  # type: ignore[valid-type] # noqa: UP045
        "dict": typing.Dict[str, code],  # type: ignore[valid-type] # noqa: UP006
        "tuple": (code, code),
        "model": typing.ForwardRef(code),
        "typed dict": typing.TypedDict("T", {"a": code}),  # type: ignore[misc, operator]
    }
    engine = fake("vllm")
    schema_reply(engine, '{"a": "x"}')
    llm = attach(engine)
    try:
        if verb == "batch":
            (found,) = llm.batch(["x"], schema=schemas[form])
            assert isinstance(found, InvalidRequest), found
        else:
            with pytest.raises(InvalidRequest):
                getattr(llm, verb)("x", schema=schemas[form])
    except InvalidRequest:
        assert verb == "batch"
    assert not mark.exists()
    assert not engine.asked


# C. Refused although right -----------------------------------------------------------------------------------
NAMES = (
    "/data/models/Qwen",
    "My Model 中文.gguf",
    "_m",
    "a b",
    "-x",
    "x:latest",
    "..m",
    "m?x=1&y=2",
    "m%20n",
    "Ünï/côdé",
    "x" * 200,
    "Qwen/Qwen3-8B",
    "ollama/x",
    "vllm/m",
    '"q"',
    "a\\b",
    "model@main",
    "a,b",
    "a;b",
)


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("vllm", name) for name in NAMES] + [(each, name) for each in ("sglang", "llamacpp") for name in NAMES[:3]],
)
def test_c1_what_is_listed_can_be_asked_for(dialect: Dialect, name: str) -> None:
    with Stand(dialect, engine=FakeEngine(dialect, model=name)) as stand:
        listed = [each["id"] for each in stand.client.get("/v1/models").json()["data"]]
        assert f"{dialect}/{name}" in listed
        for asked in (f"{dialect}/{name}", name):
            if asked == name and name.partition("/")[0] in DIALECTS:
                continue
            assert answered(ask(stand, "v1", model=asked)).model == asked
        plain = name.partition("/")[0] not in DIALECTS  # `ollama/x` names an engine too: then the full name is needed
        answered(ask(stand, "own-stream", model_name=name if plain else f"{dialect}/{name}"))
        answered(ask(stand, "python", model_name=name if plain else f"{dialect}/{name}"))
        found = stand.client.get("/v1/models/" + "/".join(map(quoted, f"{dialect}/{name}".split("/"))))
        assert found.status_code == 200 and found.json()["id"] == f"{dialect}/{name}", found.text


def quoted(part: str) -> str:
    from urllib.parse import quote

    return quote(part, safe="")


@pytest.mark.parametrize("name", ["hf.co/unsloth/Qwen3:Q4_K_M", "user/m:v1", "M:Latest"])
def test_c1_on_ollama(name: str) -> None:
    engine = FakeEngine("ollama", model=name)
    with Stand("ollama", engine=engine) as stand:
        (listed, *_) = [each["id"] for each in stand.client.get("/v1/models").json()["data"]]
        for surface in ("v1", "v1-stream"):
            assert answered(ask(stand, surface, model=listed)).model == listed
        answered(ask(stand, "own", model_name=name))
        answered(ask(stand, "python", model_name=name))


#: a schema with a reference, an answer that fits, and one that does not
REFERENCES: dict[str, tuple[Json, str, str]] = {
    "array": (
        {
            "type": "object",
            "properties": {
                "a": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
                "b": {"$ref": "#/properties/a/anyOf/1"},
            },
            "required": ["b"],
        },
        '{"b": 1}',
        '{"b": null}',
    ),
    "escaped": (
        {
            "type": "object",
            "properties": {"b": {"$ref": "#/$defs/x~1y~0z%20w"}},
            "required": ["b"],
            "$defs": {"x/y~z w": {"type": "integer"}},
        },
        '{"b": 1}',
        '{"b": "x"}',
    ),
    "prefixItems": (
        {
            "type": "object",
            "properties": {
                "a": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
                "b": {"$ref": "#/properties/a/prefixItems/1"},
            },
            "required": ["b"],
        },
        '{"b": 1}',
        '{"b": "x"}',
    ),
    "root": (
        {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]},
        '{"n": {"n": null}}',
        '{"n": 1}',
    ),
    "chain": (
        {
            "type": "object",
            "properties": {"b": {"$ref": "#/$defs/x"}},
            "required": ["b"],
            "$defs": {"x": {"$ref": "#/$defs/y/anyOf/0"}, "y": {"anyOf": [{"type": "integer"}]}},
        },
        '{"b": 1}',
        '{"b": "x"}',
    ),
    "allOf": (
        {
            "type": "object",
            "properties": {"b": {"$ref": "#/allOf/0/properties/c"}},
            "required": ["b"],
            "allOf": [{"properties": {"c": {"type": "integer"}}}],
        },
        '{"b": 1}',
        '{"b": "x"}',
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("surface", ["own-stream", "v1"])
def test_c2_references(name: str, surface: str, stand: Stand) -> None:
    schema, fits, wrong = REFERENCES[name]
    schema_reply(stand.engine, fits)
    answered(ask(stand, surface, schema=schema))
    schema_reply(stand.engine, wrong)
    failed(ask(stand, surface, schema=schema), "structured_output_invalid")


@pytest.mark.parametrize(
    "ref",
    [
        "#/properties/a/anyOf/2",
        "#/properties/a/anyOf/-1",
        "#/properties/a/anyOf/01",
        "#/x",
        "other.json",
        "http://x/y",
        "#/properties/a/anyOf/٣",
    ],
)
def test_c2_references_to_nothing(ref: str, vllm: Stand) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "null"}, {"type": "integer"}]}, "b": {"$ref": ref}},
    }
    failed(ask(vllm, "own", schema=schema), "invalid_request")
    failed(ask(vllm, "v1", schema=schema), "invalid_request")


class LeafA(pydantic.BaseModel):
    kind: str
    value: int


class LeafB(pydantic.BaseModel):
    kind: str
    name: str


class NodeA(pydantic.BaseModel):
    items: list["NodeA | NodeB | NodeC | NodeD | LeafA | LeafB"]
    other: "NodeA | NodeB | NodeC | NodeD | LeafA | LeafB | None" = None


class NodeB(pydantic.BaseModel):
    left: "NodeA | NodeB | NodeC | NodeD | LeafA | LeafB"
    right: "NodeA | NodeB | NodeC | NodeD | LeafA | LeafB"


class NodeC(pydantic.BaseModel):
    by_name: dict[str, "NodeA | NodeB | NodeC | NodeD | LeafA | LeafB"]


class NodeD(pydantic.BaseModel):
    of: "NodeA | NodeB | NodeC | NodeD | LeafA | LeafB"
    depth: int


for _node in (NodeA, NodeB, NodeC, NodeD):
    _node.model_rebuild()


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c3_recursive_classes(surface: str, stand: Stand) -> None:
    schema_reply(stand.engine, '{"items": [{"kind": "x", "value": 1}, {"of": {"kind": "x", "name": "y"}, "depth": 2}]}')
    schema: Any = NodeA if surface.startswith("python") else NodeA.model_json_schema()
    outcome = answered(ask(stand, surface, schema=schema))
    if surface.startswith("python") and not is_stream(surface):
        assert isinstance(outcome.result, NodeA)


ANNOTATED = {
    "x-order": 1,
    "example": "x",
    "examples": ["x"],
    "$comment": "c",
    "deprecated": True,
    "readOnly": False,
    "title": "t",
}
TOOL_KEYWORDS: dict[str, Json] = {
    "x-order": {"x-order": {"a": 1}},
    "example": {"example": {"type": "x"}},
    "nullable": {"nullable": True},
    "contentMediaType": {"contentMediaType": "text/plain"},
    "contentEncoding": {"contentEncoding": "base64"},
    "enumNames": {"enum": ["a"], "enumNames": ["A"]},
    "errorMessage": {"errorMessage": {"type": "no"}},
    "markdownDescription": {"markdownDescription": "*x*"},
    "strict": {"strict": True},
    "look-ahead": {"pattern": "^(?=.*x).*$"},
    "look-behind": {"pattern": "(?<!x)y"},
    "unicode class": {"pattern": "^\\p{L}+$"},
    "format": {"format": "color-hex"},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "discriminator": {"discriminator": {"propertyName": "k", "mapping": {"a": "#/x"}}},
    "default object": {"default": {"type": "x"}},
    "xml": {"xml": {"name": "x"}},
    "$anchor": {"$anchor": "here"},
}
OBJECT_KEYWORDS: dict[str, Json] = {
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "contains": {"properties": {"a": {"type": "array", "contains": {"type": "string"}}}},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "$schema": {"$schema": "http://json-schema.org/draft-07/schema#"},
    "$id": {"$id": "https://example.com/x"},
    "definitions": {"definitions": {"x": {"type": "string"}}, "properties": {"a": {"$ref": "#/definitions/x"}}},
    "if": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "a property called $ref": {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
    "additionalItems": {
        "properties": {"a": {"type": "array", "items": [{"type": "string"}], "additionalItems": False}}
    },
}


def tool_with(parameters: Json, name: str) -> Json:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c4_c6c_tools_that_are_offered(surface: str, stand: Stand) -> None:
    """C4, C6c: annotations and newer keywords in tools that are only offered are passed on as they are."""
    tools = [CITY_TOOL]
    for name, keywords in (TOOL_KEYWORDS | OBJECT_KEYWORDS).items():
        parameters: Json = {"type": "object", "properties": {"a": {"type": "string"}}}
        if name in TOOL_KEYWORDS:
            parameters["properties"]["a"] |= keywords
        else:
            parameters |= keywords
        tools.append(tool_with(parameters, f"f{len(tools)}"))
    for choice in ({}, {"tool_choice": "auto"}):
        answered(ask(stand, surface, tools=tools, **choice))
        sent = stand.engine.body["tools"]
        assert [each["function"]["parameters"] for each in sent] == [each["function"]["parameters"] for each in tools]
    for tool in tools:
        stand.engine.tool_call = (tool["function"]["name"], {})
        assert answered(ask(stand, surface, tools=tools)).calls


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c4_annotations_in_a_schema(surface: str, stand: Stand) -> None:
    schema_reply(stand.engine, '{"a": "x"}')
    schema = {"type": "object", "properties": {"a": {"type": "string", **ANNOTATED}}, "required": ["a"]}
    answered(ask(stand, surface, schema=schema))
    if stand.engine.dialect != "ollama":
        answered(ask(stand, surface, schema=schema | ANNOTATED))


#: what /structured-generate is given as `schema`, an answer that fits, and one that does not
FORMS: dict[str, tuple[Json, str, str]] = {
    "properties": ({"properties": {"a": {"type": "string"}}}, '{"a": "x"}', '{"a": 1}'),
    "properties and required": ({"properties": {"a": {"type": "string"}}, "required": ["a"]}, '{"a": "x"}', "{}"),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", '"x"'),
    "enum": ({"enum": ["a", "b"]}, '"a"', '"c"'),
    "const": ({"const": 5}, "5", "6"),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, "5", '"x"'),
    "array": ({"type": "array", "items": {"type": "integer"}}, "[1]", '["x"]'),
    "type": ({"type": "integer"}, "5", '"x"'),
    "types": ({"type": ["integer", "null"]}, "null", '"x"'),
    "additionalProperties": ({"additionalProperties": {"type": "integer"}}, '{"a": 1}', '{"a": "x"}'),
    "additionalProperties false": (
        {"properties": {"a": {"type": "string"}}, "additionalProperties": False},
        '{"a": "x"}',
        '{"b": "x"}',
    ),
    "allOf": ({"allOf": [{"properties": {"a": {"type": "string"}}}]}, '{"a": "x"}', '{"a": 1}'),
    "short": ({"city": "string", "population": "number"}, '{"city": "x", "population": 1}', '{"city": "x"}'),
    "short, named as keywords": (
        {"title": "string", "description": "string"},
        '{"title": "x", "description": "y"}',
        "{}",
    ),
    "short, a field named type": ({"type": "string", "name": "string"}, '{"type": "x", "name": "y"}', '"x"'),
    "short, a field named items": (
        {"items": ["string"], "n": "integer"},
        '{"items": ["x"], "n": 1}',
        '{"items": [1], "n": 1}',
    ),
    "short, a field named properties": ({"properties": "string", "a": "string"}, '{"properties": "x", "a": "y"}', "{}"),
    "short, nested": ({"a": {"b": "integer"}}, '{"a": {"b": 1}}', '{"a": {"b": "x"}}'),
}


@pytest.mark.parametrize("name", FORMS)
def test_c5_short_form_or_json_schema(name: str, vllm: Stand, attach: Attach) -> None:
    schema, fits, wrong = FORMS[name]
    schema_reply(vllm.engine, fits)
    data = good(vllm.post("/structured-generate", prompt="x", schema=schema))
    assert data["result"] == json.loads(fits)
    assert attach(vllm.engine).structured_generate("x", schema=schema) == json.loads(fits)
    schema_reply(vllm.engine, wrong)
    refused(vllm.post("/structured-generate", prompt="x", schema=schema), "structured_output_invalid")


NO_OPS: dict[str, Json] = {
    "top_k 0": {"top_k": 0},
    "top_k -1": {"top_k": -1},
    "top_p 1": {"top_p": 1},
    "top_p 1.0": {"top_p": 1.0},
    "min_p 0": {"min_p": 0},
    "stop": {"stop": []},
    "tools": {"tools": []},
    "tool_choice": {"tool_choice": "auto"},
    "tool_choice none": {"tool_choice": "none"},
    "both": {"tools": [], "tool_choice": "auto"},
    "both none": {"tools": [], "tool_choice": "none"},
    "presence_penalty": {"presence_penalty": 0},
    "frequency_penalty": {"frequency_penalty": 0.0},
    "repetition_penalty": {"repetition_penalty": 1.0},
    "max_tokens": {"max_tokens": -1},
    "logprobs": {"logprobs": False},
    "top_logprobs": {"logprobs": False, "top_logprobs": 0},
    "parallel_tool_calls": {"parallel_tool_calls": True},
    "null": {"temperature": None, "seed": None, "tools": None},
    "parallel without tools": {"parallel_tool_calls": False},
    "empty tool_choice": {"tools": None, "tool_choice": "none"},
}
V1_NO_OPS: dict[str, Json] = {
    "echo": {"echo": False},
    "best_of": {"best_of": 1},
    "suffix": {"suffix": ""},
    "min_tokens": {"min_tokens": 0},
    "functions": {"functions": []},
    "function_call": {"functions": [], "function_call": "auto"},
    "n": {"n": 1},
    "reasoning_effort": {"reasoning_effort": "none"},
    "enable_thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "chat_template_kwargs": {"chat_template_kwargs": {}},
    "response_format": {"response_format": {"type": "text"}},
    "logit_bias": {"logit_bias": {}},
    "stream_options": {"stream_options": {}},
    "modalities": {"modalities": ["text"]},
    "store": {"store": False},
    "metadata": {"metadata": {}},
    "service_tier": {"service_tier": "auto"},
    "user": {"user": ""},
    "ignore_eos": {"ignore_eos": False},
    "skip_special_tokens": {"skip_special_tokens": True},
    "stop_token_ids": {"stop_token_ids": []},
    "length_penalty": {"length_penalty": 1.0},
    "use_beam_search": {"use_beam_search": False},
    "bad_words": {"bad_words": []},
    "mirostat": {"mirostat": 0},
    "typical_p": {"typical_p": 1.0},
    "max_completion_tokens": {"max_completion_tokens": -1},
    "include_stop_str_in_output": {"include_stop_str_in_output": False},
    "guided": {"guided_json": None},
    "add_generation_prompt": {"add_generation_prompt": True},
    "continue_final_message": {"continue_final_message": False},
    "verbosity": {"verbosity": "medium"},
    "prediction": {"prediction": None},
    "web_search_options": {"web_search_options": None},
    "audio": {"audio": None},
    "dry": {"dry_multiplier": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "repeat_penalty": {"repeat_penalty": 1.0},
    "documents": {"documents": []},
    "stop null": {"stop": None},
    "priority": {"priority": 0},
    "logprobs 0": {"top_logprobs": 0},
}


def not_answered(values: dict[str, Json], asked: Callable[[Json], Outcome]) -> dict[str, Outcome]:
    """Those of the values that are refused, or change the answer."""
    found = {}
    for name, fields in values.items():
        outcome = asked(fields)
        if outcome.kind or outcome.finish != "stop":
            found[name] = outcome
    return found


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c6_no_op_values(surface: str, stand: Stand) -> None:
    """C6: a value that asks for nothing passes, on every engine in the same way."""
    assert not not_answered(NO_OPS, lambda fields: ask(stand, surface, **fields))


@pytest.mark.parametrize("surface", ["v1", "v1-stream"])
def test_c6b_no_op_values_on_v1(surface: str, stand: Stand) -> None:
    assert not not_answered(V1_NO_OPS, lambda fields: ask(stand, surface, **fields))


def test_c6b_no_op_values_of_completions(stand: Stand) -> None:
    for name, values in (NO_OPS | V1_NO_OPS).items():
        reply = stand.post("/v1/completions", model=stand.model, prompt="x", **values)
        assert reply.status_code == 200, (name, reply.text)


@pytest.mark.parametrize("surface", ["own", "python-stream"])
def test_c6b_think_false_where_the_model_does_not(surface: str, stand: Stand) -> None:
    answered(ask(stand, surface, think=False))


@pytest.mark.parametrize("part", range(4))
def test_c6_on_the_embedded_engine(part: int, real: httpx.Client) -> None:
    """C6: what is sent to the real engine is accepted by it, several such values at once."""
    model = real.get("/v1/models").json()["data"][0]["id"]
    names = list(NO_OPS | V1_NO_OPS)[part::4]
    fields: Json = {"stop": [" ", "."]}
    for name in names:
        fields |= {key: value for key, value in (NO_OPS | V1_NO_OPS)[name].items() if key != "stop"}
    if "max_completion_tokens" in fields:
        fields.pop("max_tokens", None)
    asked = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2} | fields
    outcome = _ask_v1(real, False, asked)
    assert not outcome.kind, (names, outcome)


DUMP: Json = {
    "role": "assistant",
    "content": "Hello",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c7_message_dumps(surface: str, stand: Stand) -> None:
    for dump in (DUMP, DUMP | {"reasoning_content": None}, DUMP | {"reasoning": None, "name": None, "tool_calls": []}):
        messages = [{"role": "user", "content": "Hi"}, dump, {"role": "user", "content": "And?", "name": None}]
        answered(ask(stand, surface, messages=messages))


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c7_a_dumped_call_and_its_result(surface: str, stand: Stand) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        DUMP | {"content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    answered(ask(stand, surface, messages=messages, tools=[CITY_TOOL]))


def test_c7_real_openai_dumps(stand: Stand) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=stand.url + "/v1", api_key="x")
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    for _ in range(2):
        done = client.chat.completions.create(model=stand.model, messages=messages)
        messages += [done.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
        good(stand.post("/chat", messages=messages))


def test_c8_preflight_of_openais_client() -> None:
    with Stand("vllm", cors_origins=("http://app.example",)) as stand:
        for names in (
            "x-stainless-os",
            "authorization,content-type,x-stainless-arch,x-stainless-retry-count",
            "x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access",
        ):
            asks = {
                "origin": "http://app.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": names,
            }
            for path in ("/v1/chat/completions", "/api/v1/llm/chat", "/v1/models"):
                reply = stand.client.options(path, headers=asks)
                assert reply.status_code == 200, reply.text
                allowed = {each.strip().lower() for each in reply.headers["access-control-allow-headers"].split(",")}
                assert set(names.split(",")) <= allowed or "*" in allowed
            reply = stand.client.options(path, headers=asks | {"origin": "http://evil.example"})
            assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("host", ["::"])
def test_c9_loopback_through_a_mapped_address(host: str, fake: Make) -> None:
    import socket

    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    engine = fake("vllm")
    with Command("--host", host, "--engine", "vllm", "--base-url", engine.base_url, ready=False) as command:
        for name in ["127.0.0.1", "localhost"] + ["[::1]"] * (host == "::"):
            reply = httpx.get(f"http://{name}:{command.port}/v1/models", trust_env=False)
            assert reply.status_code == 200, (name, reply.text)


def test_c10_a_model_in_the_hubs_cache(tmp_path: Path, embedded: LLMInferencer) -> None:
    """C10: links of the hub's cache are followed for the file, not for its parts' names."""
    found = product.locate_model(None)
    assert found is not None
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.symlink_to(found.path)
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name in ("m-00001-of-00001.gguf",):
        (folder / name).symlink_to(Path("../../blobs") / blob.name)
        with LLMInferencer("llamacpp", str(folder / name), launch=True) as llm:
            assert llm.generate("Hi", max_tokens=2)


def test_c10_parts_of_a_model_in_the_hubs_cache(tmp_path: Path) -> None:
    found = product.locate_model(None)
    assert found is not None
    header = found.path.read_bytes()[:4096]
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number in (1, 2):
        blob = tmp_path / "blobs" / (str(number) * 64)
        blob.write_bytes(header)
        (folder / f"m-0000{number}-of-00002.gguf").symlink_to(Path("../../blobs") / blob.name)
    located = product.locate_model(str(folder / "m-00001-of-00002.gguf"))
    assert located is not None and located.path.name == "m-00001-of-00002.gguf"
    (folder / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InferenceError, match="00002-of-00002"):
        product.locate_model(str(folder / "m-00001-of-00002.gguf"))


def test_c11_a_path_as_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = product.locate_model(None)
    assert found is not None
    (tmp_path / "m.gguf").symlink_to(found.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for model in ("~/m.gguf", Path("m.gguf")):
        with LLMInferencer("llamacpp", model, launch=True) as llm:
            assert llm.generate("Hi", max_tokens=2)
            assert [each.name for each in llm.models()] == ["m"]


def test_c11_pythons_own_values(attach: Attach, fake: Make) -> None:
    import collections
    import enum

    engine = fake("vllm")
    llm = attach(engine)
    for prompts in (
        ("a", "b"),
        (each for each in "ab"),
        {"a": 1, "b": 2}.keys(),
        iter(["a", "b"]),
        collections.deque("ab"),
    ):
        answers = llm.batch(prompts)
        assert [each.text for each in answers if isinstance(each, product.Completion)] == [engine.text] * 2
    for wrong in ("abc", b"abc", {"a": 1}, None, 5):
        with pytest.raises(InvalidRequest):
            llm.batch(wrong)  # type: ignore[arg-type]
    llm.generate("x", stop=("a", "b"))  # type: ignore[arg-type]
    assert engine.body["stop"] == ["a", "b"]
    assert llm.chat(({"role": "user", "content": "x"},)) == engine.text
    assert llm.chat(each for each in [{"role": "user", "content": "x"}]) == engine.text

    class Color(enum.Enum):
        RED = "red"
        BLUE = "blue"

    class Word(enum.StrEnum):
        YES = "yes"

    class Number(enum.IntEnum):
        ONE = 1

    for kind, text, value in ((Color, '"red"', Color.RED), (Word, '"yes"', Word.YES), (Number, "1", Number.ONE)):
        schema_reply(engine, text)
        assert llm.structured_generate("x", schema=kind) is value
    schema_reply(engine, "red")
    assert llm.structured_generate("x", choice=("red", "blue")) == "red"
    assert llm.embed(("a", "b")) and llm.embed(each for each in "ab")  # type: ignore[arg-type]


def test_c11_numpys_values(attach: Attach, fake: Make) -> None:
    np = pytest.importorskip("numpy")
    engine = fake("vllm")
    llm = attach(engine)
    llm.generate("x", max_tokens=np.int64(5), temperature=np.float32(0.5), top_p=np.float64(0.5), seed=np.int32(3))
    assert (engine.body["max_tokens"], engine.body["temperature"], engine.body["seed"]) == (5, 0.5, 3)
    llm.generate("x", logprobs=np.bool_(True), top_logprobs=np.uint8(2), stop=np.array(["a", "b"]))
    assert (engine.body["logprobs"], engine.body["stop"]) == (True, ["a", "b"])
    assert llm.structured_generate("x", choice=np.array([engine.text, "b"])) == engine.text
    assert len(llm.batch(np.array(["a", "b"]), concurrency=np.int64(2))) == 2
    assert len(llm.embed(np.array(["a", "b"]))) == 2
    assert llm.generate(np.str_("x")) == engine.text
    llm.generate("x", timeout=np.float64(50))
    for wrong in (np.float64(5.5), np.array([5]), np.bool_(True)):
        with pytest.raises(InvalidRequest):
            llm.generate("x", max_tokens=wrong)


@pytest.fixture(scope="module", params=DIALECTS)
def capped(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with Stand(request.param, max_tokens_cap=6) as stand:
        yield stand


@pytest.mark.parametrize("surface", ["own", "own-stream", "v1", "v1-stream"])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_c12_the_cap_applies_and_is_named(name: str, surface: str, capped: Stand) -> None:
    if name == "max_completion_tokens" and surface.startswith("own"):
        pytest.skip("ours has max_tokens")
    capped.engine.reset()
    outcome = answered(ask(capped, surface, **{name: 32000}))
    assert outcome.finish == "length" and outcome.ignored == (name,), outcome
    outcome = answered(ask(capped, surface, **{name: 6}))
    assert not outcome.ignored


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "x", "max_tokens": 32000}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 32000}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 32000}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 32000}),
    ],
)
def test_c12_on_the_other_routes(path: str, body: Json, capped: Stand) -> None:
    capped.engine.reset()
    reply = capped.post(path, **body, **({"model": capped.model} if path.startswith("/v1") else {}))
    assert reply.status_code == 200, reply.text
    assert "tokens" in reply.headers.get("x-ignored-fields", "") or "max_tokens" in reply.json()["data"]["ignored"]
    sent = capped.engine.body
    assert (sent.get("max_tokens") or sent.get("max_completion_tokens") or sent["options"]["num_predict"]) == 6


ROUTES = (
    "/health",
    "/ready",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/ui",
    "/metrics",
    "/v1/models",
    "/api/v1/llm/engines",
    "/api/v1/llm/models",
)


@pytest.mark.parametrize("path", ROUTES)
def test_c13_a_trailing_slash_is_the_same_route(path: str, vllm: Stand) -> None:
    assert vllm.client.get(path + "/").status_code == vllm.client.get(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/chat",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/structured-generate",
    ],
)
def test_c13_a_trailing_slash_of_a_post(path: str, vllm: Stand) -> None:
    assert vllm.post(path + "/").json().keys() == vllm.post(path).json().keys()
    assert vllm.post(path + "/").status_code == 400


@pytest.mark.parametrize("path", ["/health", "/ready", "/ui", "/"])
def test_c13_head(path: str, vllm: Stand) -> None:
    reply = vllm.client.head(path)
    assert reply.status_code in (200, 307) and not reply.content


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip, identity"])
def test_c13_a_compressed_body(path: str, coding: str, vllm: Stand) -> None:
    import gzip

    reply = vllm.raw(path, gzip.compress(b'{"prompt": "x"}'), **{"content-encoding": coding})
    assert reply.status_code in (400, 415) and "content-encoding" in reply.text.lower(), reply.text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_c13_a_byte_order_mark(path: str, vllm: Stand) -> None:
    body = json.dumps({"prompt": "x", "model": vllm.model} if path.startswith("/v1") else {"prompt": "x"}).encode()
    assert vllm.raw(path, b"\xef\xbb\xbf" + body).status_code == 200
    for bad in (b"\xff\xfe" + body.decode().encode("utf-16-le"), b"\xef\xbb\xbf\xef\xbb\xbf" + body):
        assert vllm.raw(path, bad).status_code == 400


#: fields that an engine honours, on which of its routes
HONOURED: dict[Dialect, list[Json]] = {
    "llamacpp": [
        {"samplers": ["top_k", "temperature"]},
        {"timings_per_token": True},
        {"dry_base": 1.5},
        {"xtc_threshold": 0.2},
        {"mirostat_tau": 4.0},
        {"response_format": {"type": "json_object", "schema": OBJECT}},
        {"n_probs": 2},
        {"dynatemp_range": 0.5},
        {"typical_p": 0.9},
        {"logit_bias": {"5": 1}},
        {"json_schema": OBJECT},
        {"dry_sequence_breakers": ["x"]},
        {"top_n_sigma": 1.0},
        {"ignore_eos": True},
        {"grammar": 'root ::= "a"'},
        {"repeat_last_n": 5},
    ],
    "vllm": [
        {"prompt_logprobs": 1},
        {"return_token_ids": True},
        {"truncate_prompt_tokens": 100},
        {"use_beam_search": True},
        {"min_tokens": 3},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [5]},
        {"stop_token_ids": [5]},
        {"length_penalty": 0.5},
        {"include_stop_str_in_output": True},
        {"skip_special_tokens": False},
        {"spaces_between_special_tokens": False},
        {"echo": True},
        {"cache_salt": "x"},
        {"structured_outputs": {"choice": ["a"]}},
        {"logit_bias": {"5": 1}},
        {"ignore_eos": True},
    ],
    "sglang": [
        {"regex": "a"},
        {"ebnf": 'root ::= "a"'},
        {"no_stop_trim": True},
        {"min_tokens": 3},
        {"stop_token_ids": [5]},
        {"return_hidden_states": True},
        {"skip_special_tokens": False},
        {"ignore_eos": True},
        {"separate_reasoning": False},
    ],
    "ollama": [
        {"options": {"num_ctx": 2048}},
        {"keep_alive": "5m"},
        {"keep_alive": 0},
        {"options": {"mirostat": 1, "tfs_z": 0.5}},
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
def test_c14_fields_that_the_engine_honours(dialect: Dialect, stream: bool, all_stands: dict[str, Stand]) -> None:
    stand = all_stands[dialect]
    for fields in HONOURED[dialect]:
        stand.engine.reset()
        schema_reply(stand.engine, '{"a": "x"}' if "format" in str(fields) or "json_schema" in fields else "a")
        outcome = ask(stand, "v1-stream" if stream else "v1", **fields)
        assert not outcome.kind, (fields, outcome)
        assert not outcome.ignored, (fields, outcome)
        sent = stand.engine.body
        for name, value in fields.items():
            if name == "options":
                assert value.items() <= sent["options"].items()
            elif name not in ("response_format", "json_schema"):
                assert sent[name] == value, (name, sent)


@pytest.mark.parametrize("surface", EACH_INTERFACE)
@pytest.mark.parametrize("template", ["{% if reasoning_effort %}x{% endif %}{{ messages }}"])
def test_c14_reasoning_effort_with_a_template_that_uses_it(surface: str, template: str, fake: Make) -> None:
    """C14: as gpt-oss's does, which has no enable_thinking."""
    with Stand("llamacpp") as stand:
        props = stand.client.get("/health") and httpx.get(stand.engine.base_url + "/props", trust_env=False).json()
        reply = Reply(headers={"content-type": "application/json"}, pieces=[dumps(props | {"chat_template": template})])
        for _ in range(8):
            stand.engine.script(reply, "/props")
        fields = {"reasoning_effort": "low"} if surface.startswith("v1") else {"think": "low"}
        answered(ask(stand, surface, **fields))
        assert stand.engine.body["reasoning_effort"] == "low"
        if surface.startswith("v1"):
            failed(ask(stand, surface, chat_template_kwargs={"enable_thinking": True}), "unsupported_feature")


def test_c14_dimensions_on_ollama(all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    stand.engine.reset()
    stand.engine.capabilities.append("embedding")
    try:
        reply = stand.post("/v1/embeddings", model=stand.model, input="x", dimensions=4)
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["data"][0]["embedding"]) == 4
    finally:
        stand.engine.capabilities.remove("embedding")


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_c15_any_seed(surface: str, stand: Stand) -> None:
    for seed in (-1, -5, 2**63 - 1, 0):
        answered(ask(stand, surface, seed=seed))
        body = stand.engine.body
        assert (body["options"] if stand.engine.dialect == "ollama" else body)["seed"] == seed


@pytest.mark.parametrize("dialect", DIALECTS)
def test_c15_the_alias_that_was_asked_for(dialect: Dialect) -> None:
    with Stand(dialect, aliases=[f"fast={dialect}/m"]) as stand:
        for name in ("fast", f"{dialect}/m", "m"):
            for surface in ("v1", "v1-stream"):
                assert answered(ask(stand, surface, model=name)).model == name
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"})):
            assert stand.post(path, model="fast", **body).json()["model"] == "fast"
            text = stand.post(path, model="fast", stream=True, **body).text
            assert '"model":"fast"' in text and '"model":"m"' not in text


WRONG_FIELDS: dict[str, Json] = {
    "temperature": {"temperature": 3},
    "top_p": {"top_p": 0},
    "max_tokens": {"max_tokens": 0},
    "stop": {"stop": [""]},
    "seed": {"seed": "x"},
    "tools": {"tools": "x"},
    "tool_choice": {"tool_choice": "required"},
    "n": {"n": 0},
    "messages": {"messages": []},
    "response_format": {"response_format": {"type": "x"}},
    "model": {"model": None},
    "top_logprobs": {"top_logprobs": 3},
    "stream": {"stream": "x"},
    "nonsense": {"nonsense": 1},
    "chat_template": {"chat_template": "x"},
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_c15_param_names_the_field(name: str, vllm: Stand) -> None:
    outcome = ask(vllm, "v1", **WRONG_FIELDS[name])
    assert outcome.status == 400 and (outcome.param or "").partition("[")[0] == name, outcome


# D. Untyped or untrue errors ---------------------------------------------------------------------------------
IMPOSSIBLE: dict[str, Any] = {
    "surrogate": "\udcff",
    "surrogate in the middle": "a\ud800b",
}


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("surrogate", "vllm"), ("surrogate", "ollama"), ("surrogate", "llamacpp"), ("surrogate in the middle", "vllm")],
)
def test_d1_what_json_cannot_say(name: str, dialect: Dialect, fake: Make, attach: Attach) -> None:
    llm, bad = attach(fake(dialect)), IMPOSSIBLE[name]
    found = llm.batch(["ok", bad, "ok"])
    assert [isinstance(each, InvalidRequest) for each in found] == [False, True, False], found
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(bad),
        lambda: list(llm.stream(bad)),
        lambda: llm.embed(bad),
        lambda: llm.embed(["ok", bad]),
        lambda: llm.chat([{"role": "user", "content": bad}]),
        lambda: llm.generate("x", system=bad),
        lambda: llm.generate("x", engine_options={"x": bad}),
        lambda: llm.generate("x", engine_options={bad: 1}),
        lambda: llm.generate("x", engine_options={"x": object()}),
        lambda: llm.generate("x", engine_options={"x": float("nan")}),
        lambda: llm.generate("x", stop=bad),
        lambda: llm.structured_generate("x", schema={"properties": {bad: {}}}),
        lambda: llm.structured_generate("x", choice=[bad]),
        lambda: llm.generate("x", model_name=bad),
        lambda: llm.generate("x", engine_options={"x": {1, 2}}),
        lambda: llm.generate("x", engine_options={"x": b"\xff"}),
        lambda: asyncio.run(llm.agenerate(bad)),
        lambda: llm.embed(5),
        lambda: llm.embed([5]),
        lambda: llm.generate(5),
        lambda: llm.pull(bad),
        lambda: llm.generate("x", engine_options=5),
        lambda: llm.generate("x", engine_options={"x": 10**400}),
        lambda: llm.embed("x", model_name=bad),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except (InvalidRequest, UnsupportedFeature, product.ModelNotFound):
            continue
        except BaseException as exc:
            raise AssertionError(f"call {number}: {exc!r}") from exc
        assert number in (9, 14, 22), f"call {number} passed"


def test_d1_a_value_that_contains_itself(fake: Make, attach: Attach) -> None:
    llm = attach(fake("vllm"))
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, deep):
        with pytest.raises(InvalidRequest):
            llm.generate("x", engine_options={"x": value})
        with pytest.raises(InvalidRequest):
            llm.structured_generate("x", schema={"a": value})


def test_d2_long_texts_on_the_embedded_engine() -> None:
    with LLMInferencer("llamacpp", launch=True, launch_args=["embedding=true", "pooling_type=1"]) as llm:
        for words in (601,):
            assert len(llm.embed("word " * words)) == 1
        assert len(llm.embed(["word " * 601, "x"])) == 2
        with pytest.raises(product.ContextTooLong):
            llm.embed("word " * 9000)


@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_d3_empty_arguments_in_the_history(surface: str, stand: Stand) -> None:
    for arguments in ("", "{}", None):
        call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "5"},
        ]
        outcome = ask(stand, surface, messages=messages, tools=[CITY_TOOL])
        if arguments is None:
            assert outcome.kind in ("", "invalid_request"), outcome
            continue
        answered(outcome)
        sent = next(each for each in stand.engine.body["messages"] if each["role"] == "assistant")
        assert sent["tool_calls"][0]["function"]["arguments"] in ("{}", {})


def test_d3_on_the_embedded_engine(with_tools: LLMInferencer) -> None:
    for arguments in ("", "{}"):
        call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "5"},
        ]
        for stream in (False, True):
            answered(ask_python(with_tools, stream, messages=messages, tools=[CITY_TOOL], max_tokens=4))


@pytest.mark.parametrize("stream", [False, True])
def test_d4_two_prompts_on_the_embedded_engine(stream: bool, real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    for prompts in (["One,", "Two,"], ["One,"], ["a", "b", "c"]):
        body = {"model": model, "prompt": prompts, "max_tokens": 3, "stream": stream}
        reply = real.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        found: set[int] = set()
        for event in payloads(reply)[:-1] if stream else [reply.json()]:
            assert "error" not in event, event
            found |= {choice["index"] for choice in event["choices"]}
        assert found == set(range(len(prompts)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_d4_null_events(dialect: Dialect, stream: bool, all_stands: dict[str, Stand]) -> None:
    """D4: the engine's `data: null` is no event, wherever it stands."""
    stand = all_stands[dialect]
    stand.engine.reset()
    events: list[Any] = [None]
    for index in (0, 1):
        for text, finish in (("a", None), ("", "stop")):
            choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
            events.append({"id": "x", "object": "text_completion", "model": "m", "choices": [choice]})
        events.append(None)
    if not streams_inside(dialect, stream):
        pytest.skip("vLLM is not asked to stream")
    stand.engine.script(event_reply(*events), "/v1/completions")
    reply = stand.post("/v1/completions", model=stand.model, prompt=["a", "b"], stream=stream)
    assert reply.status_code == 200 and "null\n" not in reply.text, reply.text


#: deltas of tool calls that are none
BAD_DELTAS: dict[str, Any] = {
    "object arguments": [{"index": 0, "id": "c", "function": {"name": "get", "arguments": {"city": "x"}}}],
    "mixed index types": [
        {"index": 0, "id": "c", "function": {"name": "get", "arguments": "{}"}},
        {"index": "1", "id": "d", "function": {"name": "get", "arguments": "{}"}},
    ],
    "no object": ["x"],
    "null": [None],
    "no list": {"index": 0},
    "text": "get",
    "function is a text": [{"index": 0, "id": "c", "function": "get"}],
    "name is a number": [{"index": 0, "id": "c", "function": {"name": 5, "arguments": "{}"}}],
    "negative index": [{"index": -1, "id": "c", "function": {"name": "get", "arguments": "{}"}}],
    "float index": [{"index": 0.5, "id": "c", "function": {"name": "get", "arguments": "{}"}}],
    "list arguments": [{"index": 0, "id": "c", "function": {"name": "get", "arguments": ["x"]}}],
    "number": 5,
    "huge index": [{"index": 10**12, "id": "c", "function": {"name": "get", "arguments": "{}"}}],
    "no function": [{"index": 0, "id": "c"}],
    "id is an object": [{"index": 0, "id": {}, "function": {"name": "get", "arguments": "{}"}}],
}


@pytest.mark.parametrize("name", BAD_DELTAS)
@pytest.mark.parametrize("surface", ["own", "own-stream", "v1", "v1-stream", "python-stream"])
@pytest.mark.parametrize("dialect", ["vllm", "llamacpp"])
def test_d5_e9_deltas_that_are_none(name: str, surface: str, dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    stand = all_stands[dialect]
    stand.engine.reset()
    message = {"role": "assistant", "content": None, "tool_calls": BAD_DELTAS[name]}
    for more in ({}, {"parallel_tool_calls": False}):
        for _ in range(2):
            stand.engine.script_chat(openai_reply(message, streams_inside(dialect, is_stream(surface)), "tool_calls"))
        if surface.startswith("v1"):  # what passes unchanged is not looked into
            body: Json = {"model": stand.model, "messages": [{"role": "user", "content": "Hi"}]}
            body |= {"stream": is_stream(surface), "tools": [CITY_TOOL], **more}
            reply = stand.post("/v1/chat/completions", **body)
            assert reply.status_code in (200, 502) and "internal_error" not in reply.text, reply.text
        else:
            outcome = ask(stand, surface, tools=[CITY_TOOL], **more)
            assert outcome.kind in ("", "bad_engine_reply", "structured_output_invalid"), outcome
        stand.engine.reset()


@pytest.mark.parametrize("name", BAD_DELTAS)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_d5_e9_on_responses_and_messages(name: str, path: str, stream: bool, all_stands: dict[str, Stand]) -> None:
    for dialect in ("vllm", "llamacpp"):
        stand = all_stands[dialect]
        stand.engine.reset()
        message = {"role": "assistant", "content": None, "tool_calls": BAD_DELTAS[name]}
        stand.engine.script_chat(openai_reply(message, streams_inside(dialect, stream), "tool_calls"))
        parameters = CITY_TOOL["function"]["parameters"]
        body: Json = {"input": "x", "tools": [{"type": "function", "name": "get", "parameters": parameters}]}
        if path == "/v1/messages":
            tools = [{"name": "get", "input_schema": parameters}]
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 99, "tools": tools}
        reply = stand.post(path, model=stand.model, stream=stream, **body)
        assert "internal_error" not in reply.text and "unexpected error" not in reply.text, (dialect, reply.text)
        assert reply.status_code in (200, 502), reply.text


@pytest.mark.parametrize(
    "calls",
    [
        ["x"],
        [None],
        {"a": 1},
        [{"function": "x"}],
        [{"function": {"name": 5}}],
        [{}],
        [{"function": {"name": "get", "arguments": "x"}}],
        5,
    ],
)
@pytest.mark.parametrize("surface", EACH_INTERFACE)
def test_d5_e9_calls_of_ollama_that_are_none(calls: Any, surface: str, all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    stand.engine.reset()
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    line = dumps({"model": "m", "message": message, "done": True, "done_reason": "stop"}) + b"\n"
    for _ in range(2):
        kind = "application/x-ndjson" if is_stream(surface) else "application/json"
        stand.engine.script_chat(Reply(headers={"content-type": kind}, pieces=[line]))
    outcome = ask(stand, surface, tools=[CITY_TOOL])
    assert outcome.kind in ("", "bad_engine_reply", "structured_output_invalid"), outcome


@pytest.mark.parametrize("prefix", ["/x", "/a/b"])
def test_d7_e19_mounted_under_a_path(prefix: str, fake: Make) -> None:
    """D7, E19: ready; public paths stay public; /v1's refusals are OpenAI's."""
    from fastapi import FastAPI

    engine = fake("vllm")
    for keys in ((), ("secret",)):
        host = FastAPI()
        settings = product.Settings(engine="vllm", base_url=engine.base_url, api_keys=keys)
        host.mount(prefix, product.create_app(settings))
        with serving(host, ready=None) as url, httpx.Client(base_url=url + prefix, trust_env=False) as client:
            until(lambda: client.get("/ready").json()["status"] == "ready")
            for path in ("/health", "/ready", "/docs", "/openapi.json", "/ui"):
                for headers in ({}, {"host": "example.com"}):
                    assert client.get(path, headers=headers).status_code == 200, path
            refused_v1(client.get("/v1/models", headers={"host": "example.com"}), "unauthorized")
            refused(client.get("/api/v1/llm/engines", headers={"host": "example.com"}), "unauthorized")
            key = {"authorization": "Bearer secret"}
            assert client.get("/v1/models", headers=key).status_code == 200
            body = {"model": "vllm/m", "messages": [{"role": "user", "content": "x"}]}
            assert client.post("/v1/chat/completions", headers=key, json=body).status_code == 200
            assert client.post("/api/v1/llm/generate", headers=key, json={"prompt": "x"}).status_code == 200
            assert client.get("/v1/nope", headers=key).json().keys() == {"error"}
            assert client.get("", headers=key).status_code in (200, 307)
            assert client.get("/", headers=key, follow_redirects=True).status_code == 200


@pytest.mark.parametrize("dialect", ["ollama", "vllm", "sglang"])
def test_d8_an_engine_that_is_not_running(dialect: str, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for verb in ("models", "generate"):
        with LLMInferencer.__new__(LLMInferencer) if False else contextlib.nullcontext():
            llm = LLMInferencer(dialect, "m")
            with pytest.raises(product.EngineUnavailable) as caught:
                llm.models() if verb == "models" else llm.generate("x")
            assert "start it" in caught.value.message and caught.value.message.index(
                "start"
            ) < caught.value.message.index("install")


def test_d9_requests_before_the_engine_is_found(fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: with engine "auto" a request that names an engine waits for it."""
    for adapter in (product.OllamaAdapter, product.SGLangAdapter, product.LlamaCppAdapter):
        monkeypatch.setattr(adapter, "default_url", "http://127.0.0.1:9")
    engine = fake("vllm")
    monkeypatch.setattr(product.VLLMAdapter, "default_url", engine.base_url)
    slow = Reply(
        headers={"content-type": "application/json"},
        pieces=[b'{"object":"list","data":[{"id":"m","owned_by":"vllm"}]}'],
        delay=0.5,
    )
    for path, body in (
        ("/api/v1/llm/generate", {"prompt": "x", "engine_type": "vllm"}),
        ("/api/v1/llm/generate", {"prompt": "x"}),
        ("/v1/chat/completions", {"model": "vllm/m", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
    ):
        engine.script(slow, "/v1/models")
        with serving(product.create_app(product.Settings(engine="auto")), ready=None) as url:
            reply = httpx.post(url + path, json=body, trust_env=False, timeout=20)
            assert reply.status_code == 200, (path, reply.text)


def test_d10_errors_say_what_to_do(vllm: Stand, attach: Attach) -> None:
    message = refused(vllm.post("/generate", prompt="x", temperature=3), "invalid_request")
    assert "0" in message and "2" in message and "3" in message and "temperature" in message
    assert "Input should" not in message
    for url in ("https://example.com/x.png", "file:///etc/passwd", "x"):
        part = {"type": "image_url", "image_url": {"url": url}}
        messages = [{"role": "user", "content": [part]}]
        for reply in (
            vllm.post("/chat", messages=messages),
            vllm.post("/v1/chat/completions", model=vllm.model, messages=messages),
        ):
            assert reply.status_code == 400 and "data:" in reply.text and "pattern" not in reply.text, reply.text
    for schema, wanted in (
        ({"a": "strng"}, "string"),
        ({"a": "nubmer"}, "number"),
        ({"a": "int"}, "integer"),
        ({"a": ["bol"]}, "boolean"),
    ):
        if schema == {"a": "int"}:
            continue
        message = refused(vllm.post("/structured-generate", prompt="x", schema=schema), "invalid_request")
        assert f"did you mean {wanted!r}" in message.replace('"', "'"), message
    for name, wanted in (
        ("vLLM", "vllm"),
        ("olama", "ollama"),
        ("SGLang", "sglang"),
        ("llama.cpp", "llamacpp"),
        ("llama_cpp", "llamacpp"),
    ):
        message = refused(vllm.post("/generate", prompt="x", engine_type=name), "unknown_engine")
        assert "did you mean" in message and wanted in message, message
        with pytest.raises(product.UnknownEngine, match=wanted):
            LLMInferencer(name)
    for given, wanted in (
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("model", "model_name"),
        ("messages", "prompt"),
    ):
        message = refused(vllm.post("/generate", prompt="x", **{given: "x"}), "invalid_request")
        assert wanted in message, message


def test_d11_one_name_for_the_model(fake: Make, attach: Attach) -> None:
    llm = attach(fake("vllm"))
    for call in (
        lambda: llm.generate("x", model="m"),
        lambda: list(llm.stream("x", model="m")),
        lambda: LLMInferencer("vllm", model="m"),
        lambda: llm.batch(["x"], model="m"),
    ):  # type: ignore[call-arg, call-overload, misc]
        try:
            found = call()
        except InvalidRequest as exc:
            message = exc.message
        else:
            assert isinstance(found, list), found
            message = found[0].message
        assert "did you mean 'model_name'" in message.replace('"', "'"), message
    for call in (lambda: llm.embed("x", model="m"),):  # type: ignore[call-arg]
        with pytest.raises((InvalidRequest, TypeError)):
            call()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("stream", ["ctx_overflow", "ctx_overflow_stream"])
def test_d12_a_prompt_that_is_too_long(surface: str, stream: str, all_stands: dict[str, Stand]) -> None:
    stand = all_stands["llamacpp"]
    stand.engine.reset()
    stand.engine.replay_chat(stream)
    outcome = failed(ask(stand, surface), "context_too_long", "context_length_exceeded")
    assert "maximum context length" in outcome.message
    import re

    assert len(re.findall(r"\d+ tokens", outcome.message)) == 2, outcome.message
    if surface.startswith("v1"):
        stand.engine.replay_chat(stream)
        reply = stand.post("/v1/chat/completions", model=stand.model, messages=[{"role": "user", "content": "x"}])
        assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_d12_on_the_embedded_engine(real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    for stream in (False, True):
        body = {"model": model, "messages": [{"role": "user", "content": "word " * 9000}], "stream": stream}
        error = real.post("/v1/chat/completions", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]
        assert "90" in error["message"] and "4096" in error["message"], error
