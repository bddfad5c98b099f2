"""The Responses surface, checked against the official types and the official client's accumulator."""

import http.server
import json
import threading
from typing import ClassVar

import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from llm_inference import BadEngineReply, InvalidRequest, ResponseWriter, UnsupportedFeature, chat_from_responses

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
RESPONSE = pydantic.TypeAdapter(Response)
PNG = "data:image/png;base64,iVBORw0KGgo="
FN = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}


def messages(**body):
    return chat_from_responses({"model": "m", **body})[0]["messages"]


def chunk(finish=None, usage=None, logprobs=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return {"object": "chat.completion.chunk", "model": "served", "choices": [choice], "usage": usage}


def call(index, arguments="", name=None, call_id=None):
    return {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}


USAGE = {
    "object": "chat.completion.chunk",
    "choices": [],
    "usage": {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    },
}
LOGPROBS = {
    "content": [
        {"token": "a", "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "a", "logprob": -0.1, "bytes": None}]}
    ]
}
STREAMS = {
    "text": [chunk(role="assistant"), chunk(content="Hel"), chunk(content="lo"), chunk("stop"), USAGE],
    "reasoning": [chunk(reasoning="hm"), chunk(reasoning_content="m"), chunk(content="Hi"), chunk("stop"), USAGE],
    "calls": [
        chunk(reasoning="r"),
        chunk(content="I look."),
        chunk(tool_calls=[call(0, "", "f", "call_a")]),
        chunk(tool_calls=[call(0, '{"x"')]),
        chunk(tool_calls=[call(0, ":1}")]),
        chunk(tool_calls=[call(1, "{}", "f", "call_b")]),
        chunk("tool_calls"),
        USAGE,
    ],
    "same ids": [
        chunk(tool_calls=[call(0, "{}", "f", "c"), call(1, "{}", "f", "c"), call(2, "{}", "f")]),
        chunk("tool_calls"),
    ],
    "length": [chunk(content="cut"), chunk("length"), USAGE],
    "filtered": [chunk(content="no"), chunk("content_filter")],
    "refusal": [chunk(refusal="I can"), chunk(refusal="not"), chunk("stop")],
    "logprobs": [chunk(content="a", logprobs=LOGPROBS), chunk(content="", logprobs=LOGPROBS), chunk("stop")],
    "nothing": [chunk("stop"), USAGE],
    "text after a call": [chunk(tool_calls=[call(0, "{}", "f", "c")]), chunk(content="\n"), chunk("tool_calls")],
}
BODIES = {
    "plain": {"model": "m", "input": "hi"},
    "full": {
        "model": "m",
        "input": "hi",
        "instructions": "be",
        "tools": [FN, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
            "verbosity": "low",
        },
        "temperature": 0.5,
        "top_p": 1,
        "max_output_tokens": 20,
        "max_tool_calls": 3,
        "user": "u",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "top_logprobs": 2,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
    },
    "allowed": {
        "model": "m",
        "input": "hi",
        "tools": [FN],
        "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
    },
}


def run(body, chunks):
    writer = ResponseWriter(body, "resp_0123", 1700000000)
    events = writer.start()
    for payload in chunks:
        events += writer.feed(payload)
    return events + writer.end()


def whole_object(chunks):
    """What the module's fold makes of the chunks (Answer.complete)."""
    message, found, calls = {"role": "assistant", "content": ""}, {"model": "served", "usage": None}, {}
    finish, logprobs = None, []
    for payload in chunks:
        found["usage"] = payload.get("usage") or found["usage"]
        for choice in payload["choices"]:
            finish = choice["finish_reason"] or finish
            logprobs += (choice["logprobs"] or {}).get("content", [])
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for name in ("reasoning", "reasoning_content"):
                if delta.get(name):
                    message["reasoning"] = message.get("reasoning", "") + delta[name]
            if delta.get("refusal"):
                message["refusal"] = message.get("refusal", "") + delta["refusal"]
            for piece in delta.get("tool_calls") or ():
                begun = {
                    "id": piece["id"],
                    "type": "function",
                    "function": {"name": piece["function"]["name"], "arguments": ""},
                }
                full = calls.setdefault(piece["index"], begun)
                full["function"]["arguments"] += piece["function"]["arguments"]
    message["tool_calls"] = list(calls.values())
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": finish,
        "logprobs": {"content": logprobs} if logprobs else None,
    }
    return {**found, "object": "chat.completion", "choices": [choice]}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("body", BODIES)
def test_events_have_the_official_types(body, stream):
    chat_from_responses(BODIES[body])
    events = run(BODIES[body], STREAMS[stream])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event, strict=False)
        known = type(EVENT.validate_python(event))
        assert known.model_fields["type"].annotation.__args__[0] == event["type"]
        if "response" in event:
            RESPONSE.validate_python(event["response"])
    assert events[0]["type"] == "response.created" and events[1]["type"] == "response.in_progress"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


@pytest.mark.parametrize("stream", [name for name in STREAMS if name != "text after a call"])
@pytest.mark.parametrize("body", BODIES)
def test_whole_is_what_the_stream_ends_with(body, stream):
    streamed = run(BODIES[body], STREAMS[stream])[-1]["response"]
    whole = ResponseWriter(BODIES[body], "resp_0123", 1700000000).complete(whole_object(STREAMS[stream]))
    assert whole == streamed


def test_text_event_sequence():
    assert [event["type"] for event in run(BODIES["plain"], STREAMS["text"])] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_call_event_sequence():
    events = run(BODIES["full"], STREAMS["calls"])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["summary"] == [{"type": "summary_text", "text": "r"}]
    assert (output[2]["call_id"], output[2]["arguments"]) == ("call_a", '{"x":1}')


def test_events_are_not_changed_by_later_ones():
    writer = ResponseWriter(BODIES["plain"], "resp_1", 1)
    seen = [(event, json.dumps(event)) for event in writer.start()]
    for payload in STREAMS["calls"] + STREAMS["logprobs"]:
        seen += [(event, json.dumps(event)) for event in writer.feed(payload)]
    seen += [(event, json.dumps(event)) for event in writer.end()]
    for event, text in seen:
        assert json.dumps(event) == text


@pytest.mark.parametrize(("stream", "reason"), [("length", "max_output_tokens"), ("filtered", "content_filter")])
def test_incomplete(stream, reason):
    last = run(BODIES["plain"], STREAMS[stream])[-1]
    assert last["type"] == "response.incomplete" and last["response"]["incomplete_details"] == {"reason": reason}
    assert last["response"]["status"] == last["response"]["output"][-1]["status"] == "incomplete"


def test_usage():
    usage = run(BODIES["plain"], STREAMS["text"])[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (7, 5, 12)
    assert usage["input_tokens_details"]["cached_tokens"] == 3


def test_reasoning_is_content_unless_a_summary_was_asked_for():
    item = run(BODIES["plain"], STREAMS["reasoning"])[-1]["response"]["output"][0]
    assert item["content"] == [{"type": "reasoning_text", "text": "hmm"}] and item["summary"] == []


def test_call_ids_are_unique():
    output = run(BODIES["plain"], STREAMS["same ids"])[-1]["response"]["output"]
    assert len({item["call_id"] for item in output}) == 3


def test_overlapping_calls_are_refused():
    writer = ResponseWriter(BODIES["plain"], "resp_1", 1)
    writer.feed(chunk(tool_calls=[call(0, "{", "f", "a"), call(1, "{", "f", "b")]))
    with pytest.raises(BadEngineReply):
        writer.feed(chunk(tool_calls=[call(0, "}")]))


@pytest.mark.parametrize("fed", [[], STREAMS["text"][:2], STREAMS["calls"][:4]])
def test_failure(fed):
    writer = ResponseWriter(BODIES["plain"], "resp_1", 1)
    events = []
    for payload in fed:
        events += writer.feed(payload)
    events += writer.fail("engine_unavailable", "the engine ended")
    for number, event in enumerate(events):
        EVENT.validate_python(event)
        assert event["sequence_number"] == number
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "the engine ended"}
    for item in events[-1]["response"]["output"]:
        assert item.get("status", "completed") == "completed"


# The official client, over loopback
class Server(http.server.BaseHTTPRequestHandler):
    chunks: ClassVar[list] = []
    fails = False

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat_from_responses(body)
        writer = ResponseWriter(body, "resp_0123", 1700000000)
        if not body.get("stream"):
            return self.reply("application/json", json.dumps(writer.complete(whole_object(self.chunks))))
        events = []
        for payload in self.chunks:
            events += writer.feed(payload)
        events += writer.fail("busy", "went away") if self.fails else writer.end()
        self.reply("text/event-stream", "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events))

    def reply(self, kind, text):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(scope="module")
def client():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="k", max_retries=0)
    server.shutdown()
    server.server_close()


COMPLETE = [name for name in STREAMS if name not in ("length", "filtered")]


@pytest.mark.parametrize("stream", COMPLETE)
def test_official_client_accumulates(client, stream, monkeypatch):
    monkeypatch.setattr(Server, "chunks", STREAMS[stream])
    whole = client.responses.create(model="m", input="hi", tools=[FN])
    with client.responses.stream(model="m", input="hi", tools=[FN]) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text.strip() == whole.output_text.strip()
    if stream != "text after a call":
        unparsed = RESPONSE.validate_python(final.to_dict()).to_dict()
        for item in unparsed["output"]:
            item.pop("parsed_arguments", None)
            for part in item.get("content") or ():
                part.pop("parsed", None)
        assert unparsed["output"] == whole.to_dict()["output"]


def test_official_client_parses(client, monkeypatch):
    class City(pydantic.BaseModel):
        city: str

    monkeypatch.setattr(Server, "chunks", [chunk(content='{"city":'), chunk(content='"Bern"}'), chunk("stop"), USAGE])
    assert client.responses.parse(model="m", input="hi", text_format=City).output_parsed == City(city="Bern")
    with client.responses.stream(model="m", input="hi", text_format=City) as events:
        assert events.get_final_response().output_parsed == City(city="Bern")


def test_official_client_sends_the_answer_back(client, monkeypatch):
    monkeypatch.setattr(Server, "chunks", STREAMS["calls"])
    first = client.responses.create(model="m", input="hi", tools=[FN])
    items = [{"role": "user", "content": "hi"}, *[item.model_dump(mode="json") for item in first.output]]
    outputs = [{"type": "function_call_output", "call_id": c, "output": "42"} for c in ("call_a", "call_b")]
    chat, ignored = chat_from_responses({"model": "m", "input": items + outputs, "tools": [FN]})
    assert ignored == []
    _user, assistant, *tools = chat["messages"]
    assert assistant["content"] == "I look." and assistant["reasoning"] == "r"
    assert [c["id"] for c in assistant["tool_calls"]] == [t["tool_call_id"] for t in tools] == ["call_a", "call_b"]


def test_official_client_raises_for_a_failure(client, monkeypatch):
    monkeypatch.setattr(Server, "chunks", STREAMS["text"][:2])
    monkeypatch.setattr(Server, "fails", True)
    with pytest.raises(openai.APIError, match="went away"):
        list(client.responses.create(model="m", input="hi", stream=True))
    with pytest.raises(openai.APIError, match="went away"), client.responses.stream(model="m", input="hi") as events:
        events.get_final_response()


def test_official_client_incomplete(client, monkeypatch):
    monkeypatch.setattr(Server, "chunks", STREAMS["length"])
    *_, last = client.responses.create(model="m", input="hi", stream=True)
    assert last.type == "response.incomplete" and last.response.incomplete_details.reason == "max_output_tokens"


# Requests
CODEX = {
    "model": "m",
    "instructions": "You are Codex.",
    "store": False,
    "client_metadata": {"x": "y"},
    "stream": True,
    "tool_choice": "auto",
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "low"},
    "tools": [
        {"type": "function", "name": "shell", "description": "", "strict": False, "parameters": {"type": "object"}},
        {"type": "local_shell"},
        {"type": "web_search", "external_web_access": False},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "",
            "format": {"type": "grammar", "syntax": "lark", "definition": ""},
        },
    ],
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "perms"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ls"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "think"}], "encrypted_content": None},
        {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "file"},
    ],
}


def test_codex():
    chat, ignored = chat_from_responses(CODEX)
    assert ignored == [
        "tools[1] (local_shell)",
        "tools[2] (web_search)",
        "tools[3] (custom)",
        "include (reasoning.encrypted_content)",
        "client_metadata",
    ]
    assert chat == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt_cache_key": "k",
        "reasoning_effort": "medium",
        "verbosity": "low",
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "tools": [
            {
                "type": "function",
                "function": {"name": "shell", "description": "", "strict": False, "parameters": {"type": "object"}},
            }
        ],
        "messages": [
            {"role": "system", "content": "You are Codex.\n\nperms"},
            {"role": "user", "content": "ls"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "think",
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "shell", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "file"},
        ],
    }


def test_namespaces_of_tools():
    """Codex puts the tools of each MCP server into a namespace; the chat API has none."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    weather = {"type": "function", "name": "weather", "description": "now", "strict": False, "parameters": schema}
    other = {"type": "custom", "name": "patch"}
    space = {"type": "namespace", "name": "mcp__sky", "description": "Tools.", "tools": [weather, other]}
    call = {"type": "function_call", "call_id": "c", "namespace": "mcp__sky", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
    body = {"model": "m", "input": ["hi", call, output], "tools": [FN, space]}
    body["input"][0] = {"role": "user", "content": "hi"}
    chat, ignored = chat_from_responses(body)
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["f", "mcp__sky__weather"]
    assert chat["messages"][1]["tool_calls"][0]["function"]["name"] == "mcp__sky__weather"
    assert ignored == ["tools[1].description", "tools[1].tools[1] (custom)"]
    function = {"name": "mcp__sky__weather", "arguments": "{}"}
    message = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    answer = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    response = Response.model_validate(ResponseWriter(body, "resp_0", 0).complete(answer))
    (item,) = response.output
    assert (item.type, item.namespace, item.name) == ("function_call", "mcp__sky", "weather")
    assert [tool.type for tool in response.tools] == ["function", "namespace"]


def test_text_input_and_passed_fields():
    chat, ignored = chat_from_responses(
        {"input": "hi", "seed": 1, "top_k": 5, "stop": None, "user": "u", "max_output_tokens": 9}
    )
    assert chat == {
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 1,
        "top_k": 5,
        "user": "u",
        "max_completion_tokens": 9,
    }
    assert ignored == []


def test_images():
    content = [{"type": "input_text", "text": "what"}, {"type": "input_image", "image_url": PNG, "detail": "high"}]
    assert messages(input=[{"role": "user", "content": content}]) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what"},
                {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
            ],
        }
    ]


def test_images_in_tool_results_follow_the_last_of_them():
    """Codex's `view_image` answers with an image."""
    calls = [{"type": "function_call", "call_id": id_, "name": "view_image", "arguments": "{}"} for id_ in "ab"]
    image = {"type": "input_image", "image_url": PNG}
    outputs = [{"type": "function_call_output", "call_id": id_, "output": [image]} for id_ in "ab"]
    found = messages(input=[*calls, *outputs, {"role": "user", "content": "what"}])
    assert [message["role"] for message in found] == ["assistant", "tool", "tool", "user", "user"]
    assert [message["content"] for message in found[1:3]] == ["[image 1]", "[image 2]"]
    assert [part.get("image_url", {}).get("url") for part in found[3]["content"]] == [None, PNG, None, PNG]


def test_assistant_turns():
    def text(value):
        return {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": value, "annotations": []}],
        }

    fc = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    out = {
        "type": "function_call_output",
        "call_id": "c",
        "output": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}],
    }
    found = messages(input=[text("a"), text("b"), fc, text("c"), out, {"type": "reasoning", "summary": []}, text("d")])
    assert [m["role"] for m in found] == ["assistant", "assistant", "tool", "assistant"]
    assert [m["content"] for m in found] == ["a", "bc", "1\n2", "d"]


def test_later_system_messages_stay_where_they_are():
    items = [{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}]
    assert [m["role"] for m in messages(input=items, instructions="i")] == ["system", "user", "system"]


def test_formats():
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True, "description": None}
    chat, _ = chat_from_responses({"input": "x", "text": {"format": schema}})
    assert chat["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }
    chat, _ = chat_from_responses({"input": "x", "text": {"format": {"type": "json_object"}}})
    assert chat["response_format"] == {"type": "json_object"}


def test_a_function_in_a_namespace_can_be_chosen():
    """By its qualified name, as OpenAI's agents SDK has it; a name of its own at the top comes first."""
    spaces = [{"type": "namespace", "name": name, "description": "", "tools": [FN]} for name in ("sky", "sea")]
    body = {"input": "x", "tools": [*spaces, {**FN, "name": "sea.g"}]}
    choice = {"type": "function", "name": "sea.f"}
    chat, _ = chat_from_responses({**body, "tool_choice": choice})
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "sea__f"}} and len(chat["tools"]) == 3
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [choice]}
    chat, _ = chat_from_responses({**body, "tool_choice": allowed})
    assert chat["tool_choice"] == "required" and [t["function"]["name"] for t in chat["tools"]] == ["sea__f"]
    chat, _ = chat_from_responses({**body, "tool_choice": {"type": "function", "name": "sea.g"}})
    assert chat["tool_choice"]["function"]["name"] == "sea.g"
    for name in ("f", "sky", "sun.f"):
        with pytest.raises(InvalidRequest):
            chat_from_responses({**body, "tool_choice": {"type": "function", "name": name}})


def test_tool_choices():
    two = [FN, {**FN, "name": "g"}]
    chat, _ = chat_from_responses({"input": "x", "tools": two, "tool_choice": {"type": "function", "name": "g"}})
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "g"}} and len(chat["tools"]) == 2
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "g"}, {"type": "web_search"}],
    }
    chat, _ = chat_from_responses({"input": "x", "tools": two, "tool_choice": allowed})
    assert chat["tool_choice"] == "required" and [t["function"]["name"] for t in chat["tools"]] == ["g"]
    chat, ignored = chat_from_responses(
        {"input": "x", "tools": [{"type": "web_search"}], "tool_choice": "auto", "parallel_tool_calls": True}
    )
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & chat.keys() and ignored == ["tools[0] (web_search)"]


def test_ignored_names_are_safe_in_a_header():
    tools = [{"type": f"x{n}\r\nSet-Cookie: é"} for n in range(1000)]
    items = [{"role": "user", "content": "a", "bad\r\nkey": 1, "phase": "x"}]
    _, ignored = chat_from_responses({"input": items, "tools": tools, "store": True, "reasoning": {"context": "auto"}})
    assert len(ignored) == 1004 and all(name.isascii() and name.isprintable() and len(name) < 100 for name in ignored)


def test_logprobs():
    chat, ignored = chat_from_responses({"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 3})
    assert (chat["logprobs"], chat["top_logprobs"], ignored) == (True, 3, [])


U = {"role": "user", "content": "a"}
REFUSED = [
    ({"previous_response_id": "resp_1"}, UnsupportedFeature, "previous_response_id"),
    ({"conversation": {}}, UnsupportedFeature, "conversation"),
    ({"prompt": {"id": "p"}}, UnsupportedFeature, "prompt"),
    ({"background": True}, UnsupportedFeature, "background"),
    ({"truncation": "auto"}, UnsupportedFeature, "truncation"),
    ({"truncation": "x"}, InvalidRequest, "truncation"),
    ({"messages": []}, InvalidRequest, "messages"),
    ({"n": 2}, InvalidRequest, "n"),
    ({"max_output_tokens": 0}, InvalidRequest, "max_output_tokens"),
    ({"max_output_tokens": True}, InvalidRequest, "max_output_tokens"),
    ({"temperature": "1"}, InvalidRequest, "temperature"),
    ({"metadata": {"a": 1}}, InvalidRequest, "metadata"),
    ({"input": []}, InvalidRequest, "input"),
    ({"input": None}, InvalidRequest, "input"),
    ({"input": [U, 3]}, InvalidRequest, "input[1]"),
    ({"input": [U, {"type": "web_search_call"}]}, UnsupportedFeature, "input[1].type"),
    ({"input": [{"type": "item_reference", "id": "m"}]}, UnsupportedFeature, "input[0].type"),
    ({"input": [{"role": "tool", "content": "a"}]}, InvalidRequest, "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        UnsupportedFeature,
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
        InvalidRequest,
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        InvalidRequest,
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PNG}]}]},
        UnsupportedFeature,
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, InvalidRequest, "input[0].call_id"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]},
        InvalidRequest,
        "input[0].arguments",
    ),
    ({"include": ["x"]}, InvalidRequest, "include[0]"),
    ({"text": {"foo": 1}}, UnsupportedFeature, "text.foo"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, InvalidRequest, "text.format.schema"),
    ({"text": {"format": {"name": "n"}}}, InvalidRequest, "text.format.type"),
    ({"reasoning": {"mode": "pro"}}, UnsupportedFeature, "reasoning.mode"),
    ({"stream_options": {"include_usage": True}}, UnsupportedFeature, "stream_options.include_usage"),
    ({"tools": [{"name": "f"}]}, InvalidRequest, "tools[0].type"),
    ({"tools": [FN, FN]}, InvalidRequest, "tools[1].name"),
    ({"max_output_tokens": -(10**5000)}, InvalidRequest, "max_output_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, InvalidRequest, "tools[0].name"),
    ({"tools": [FN], "tool_choice": {"type": "function", "name": "g"}}, InvalidRequest, "tool_choice"),
    (
        {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
        UnsupportedFeature,
        "tool_choice.type",
    ),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, UnsupportedFeature, "tool_choice"),
    (
        {"tools": [FN], "tool_choice": {"type": "function", "name": "f", "namespace": "n"}},
        InvalidRequest,
        "tool_choice",
    ),
    ({"tools": [FN], "tool_choice": {"type": "function", "id": "f"}}, InvalidRequest, "tool_choice"),
    (
        {"tools": [FN], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [], "model": "m"}},
        InvalidRequest,
        "tool_choice",
    ),
]


def test_an_unknown_field_of_a_namespace_is_named():
    space = {"type": "namespace", "name": "sky", "description": "", "tools": [FN], "defer": True}
    assert "tools[0].defer" in chat_from_responses({"input": "x", "tools": [space]})[1]


@pytest.mark.parametrize(("fields", "error", "param"), REFUSED)
def test_refused(fields, error, param):
    with pytest.raises(error) as raised:
        chat_from_responses({"input": "hi", **fields})
    assert type(raised.value) is error and raised.value.param == param and raised.value.hint
    assert raised.value.reason.startswith(param.split("[")[0].split(".")[0])


def test_errors_do_not_echo_long_input():
    for fields in ({"truncation": "x" * 10_000}, {"text": {"y" * 10_000: 1}}, {"input": [{"type": "z" * 10_000}]}):
        with pytest.raises((InvalidRequest, UnsupportedFeature)) as raised:
            chat_from_responses({"input": "hi", **fields})
        assert len(raised.value.reason) < 300 and len(raised.value.param) < 200


# Random and nearly right requests
WORDS = st.sampled_from(
    [
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "item_reference",
        "input_text",
        "input_image",
        "refusal",
        "user",
        "assistant",
        "system",
        "function",
        "web_search",
        "allowed_tools",
        "auto",
        "required",
        "none",
        "json_schema",
        "c1",
        "f",
        "low",
        "concise",
        PNG,
        "",
    ]
)
KEYS = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "call_id",
        "name",
        "arguments",
        "output",
        "summary",
        "image_url",
        "detail",
        "tools",
        "mode",
        "schema",
        "format",
        "effort",
        "encrypted_content",
        "refusal",
        "parameters",
        "strict",
        "verbosity",
        "zzz",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 5) | st.floats(allow_nan=False) | WORDS | st.text(max_size=3)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)
ITEM = st.fixed_dictionaries(
    {"type": WORDS},
    optional=dict.fromkeys("role content call_id name arguments output summary image_url text".split(), JSON),
)
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "input": st.text(max_size=3) | st.lists(ITEM, max_size=4) | JSON,
        "tools": st.lists(ITEM, max_size=3) | JSON,
        "tool_choice": WORDS | ITEM | JSON,
        **dict.fromkeys(
            [
                *("instructions", "text", "reasoning", "include", "stream_options", "metadata", "store", "stream"),
                *("temperature", "top_logprobs", "truncation"),
            ],
            JSON,
        ),
        **dict.fromkeys(
            "model prompt background max_output_tokens parallel_tool_calls prompt_cache_options seed".split(), JSON
        ),
    },
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(NEAR | st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_request_is_translated_or_refused_by_name(body):
    before = json.dumps(body)
    try:
        chat, ignored = chat_from_responses(body)
    except (InvalidRequest, UnsupportedFeature) as exc:
        assert exc.param
    else:
        json.dumps(chat)
        assert all(name.isascii() and name.isprintable() for name in ignored)
        events = run(body, STREAMS["calls"])
        assert events[-1]["type"] == "response.completed"
        RESPONSE.validate_python(events[-1]["response"])
    assert json.dumps(body) == before


def test_cost_is_linear():
    import time

    parts = [{"type": "input_text", "text": "x"}] * 50_000
    calls = [{"type": "function_call", "call_id": f"c{n}", "name": "f", "arguments": "{}"} for n in range(50_000)]
    tools = [{**FN, "name": f"f{n}"} for n in range(20_000)]
    unknown = {f"x{n}": 1 for n in range(20_000)}
    tools.append({"type": "namespace", "name": "space", "tools": tools.copy(), **unknown})
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": f"f{n}"} for n in range(20_000)],
    }
    started = time.process_time()
    chat_from_responses(
        {"input": [{"role": "assistant", "content": parts}, *calls], "tools": tools, "tool_choice": allowed}
    )
    assert time.process_time() - started < 3
