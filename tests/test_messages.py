"""The Messages API's surface: what it reads, what it writes, and both with Anthropic's own client."""

import asyncio
import base64
import contextlib
import http.server
import json
import threading
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_inference import (
    BadEngineReply,
    EngineUnavailable,
    InvalidRequest,
    MessageWriter,
    UnsupportedFeature,
    anthropic_error,
    anthropic_models,
    chat_from_messages,
)

HI = {"role": "user", "content": "Hi"}
PIXEL = base64.b64encode(b"\x89PNG").decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
WEATHER = {"name": "weather", "description": "Weather", "input_schema": {"type": "object", "properties": {"city": {}}}}


def body(*messages, **fields):
    return {"model": "m", "max_tokens": 10, "messages": list(messages) or [HI], **fields}


def messages_of(*messages, **fields):
    return chat_from_messages(body(*messages, **fields))[0]["messages"]


def refused(error, param, *messages, **fields):
    with pytest.raises(error) as caught:
        chat_from_messages(body(*messages, **fields))
    assert caught.value.param == param
    assert caught.value.hint
    assert len(str(caught.value)) < 400
    assert caught.value.reason.startswith(param)


# Requests
def test_the_smallest_request():
    chat, ignored = chat_from_messages(body())
    assert chat == {"model": "m", "max_tokens": 10, "messages": [HI]}
    assert ignored == []


def test_the_body_is_left_as_it_was():
    given_body = body(HI, system="s", tools=[WEATHER], stop_sequences=["x"], thinking={"type": "disabled"})
    copy = json.loads(json.dumps(given_body))
    chat_from_messages(given_body)
    assert given_body == copy


@pytest.mark.parametrize(
    "system", ["Be brief.\nNow.", [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Now."}]]
)
def test_system(system):
    assert messages_of(system=system)[0] == {"role": "system", "content": "Be brief.\nNow."}


def test_a_system_message_amid_the_conversation_stays_there():
    sent = (HI, {"role": "assistant", "content": "Yo"}, {"role": "system", "content": "Short!"}, HI)
    assert messages_of(*sent) == list(sent)


def test_the_billing_line_of_claude_code_is_left_out():
    line = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=00a1b;"}
    chat, ignored = chat_from_messages(body(system=[line, {"type": "text", "text": "You are"}]))
    assert chat["messages"][0]["content"] == "You are"
    assert ignored == ["x-anthropic-billing-header"]


def test_images():
    content = [{"type": "text", "text": "What is it?"}, IMAGE]
    assert messages_of({"role": "user", "content": content})[0]["content"] == [content[0], IMAGE_PART]


@pytest.mark.parametrize("source", [{"type": "url", "url": "http://x/y.png"}, {"type": "file", "file_id": "f"}])
def test_images_by_reference_are_refused(source):
    message = {"role": "user", "content": [{"type": "image", "source": source}]}
    refused(UnsupportedFeature, "messages[0].content[0].source.type", message)


def test_an_image_that_is_none():
    source = {"type": "base64", "media_type": "image/png", "data": "not base64!"}
    refused(
        InvalidRequest,
        "messages[0].content[0].source.data",
        {"role": "user", "content": [{"type": "image", "source": source}]},
    )
    source = {"type": "base64", "media_type": "image/tiff", "data": PIXEL}
    refused(
        UnsupportedFeature,
        "messages[0].content[0].source.media_type",
        {"role": "user", "content": [{"type": "image", "source": source}]},
    )


def test_a_round_of_tools():
    calls = [
        {"type": "thinking", "thinking": "hm", "signature": "abc"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "t2", "name": "weather", "input": {}, "caller": {"type": "direct"}},
    ]
    results = [
        {"type": "text", "text": "And now?"},
        {"type": "tool_result", "tool_use_id": "t1", "content": "12 C"},
        {
            "type": "tool_result",
            "tool_use_id": "t2",
            "content": [{"type": "text", "text": "no city"}],
            "is_error": True,
        },
    ]
    chat, ignored = chat_from_messages(
        body(HI, {"role": "assistant", "content": calls}, {"role": "user", "content": results})
    )
    assert chat["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}},
                {"id": "t2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "12 C"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no city"},
        {"role": "user", "content": "And now?"},
    ]
    assert ignored == ["signature", "redacted_thinking", "caller"]


def test_images_in_tool_results_follow_in_the_user_message():
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "shot"}, IMAGE]},
        {"type": "tool_result", "tool_use_id": "b", "content": [IMAGE]},
        {"type": "tool_result", "tool_use_id": "c"},
        {"type": "text", "text": "Compare"},
    ]
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    assert messages_of(HI, call, {"role": "user", "content": results})[2:] == [
        {"role": "tool", "tool_call_id": "a", "content": "shot\n[image 1]"},
        {"role": "tool", "tool_call_id": "b", "content": "[image 2]"},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[image 1]"},
                IMAGE_PART,
                {"type": "text", "text": "[image 2]"},
                IMAGE_PART,
                {"type": "text", "text": "Compare"},
            ],
        },
    ]


def test_consecutive_messages_of_one_role_are_one_turn():
    sent = [
        HI,
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        HI,
    ]
    assert messages_of(*sent) == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "A\nB"},
        HI,
    ]


def test_a_prefill():
    chat, _ = chat_from_messages(body(HI, {"role": "assistant", "content": "The answer is ("}))
    assert chat["messages"][-1] == {"role": "assistant", "content": "The answer is ("}
    assert chat["continue_final_message"] is True


@pytest.mark.parametrize("content", ["", [], [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]])
def test_a_last_message_without_text_to_continue(content):
    refused(InvalidRequest, "messages", HI, {"role": "assistant", "content": content})


@pytest.mark.parametrize(
    "kind", ["document", "search_result", "server_tool_use", "web_search_tool_result", "container_upload", "tool_use"]
)
def test_other_blocks_are_refused_by_name(kind):
    content = [{"type": "text", "text": "x"}, {"type": kind}]
    refused(
        UnsupportedFeature,
        "messages[1].content[1].type",
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": content},
    )


def test_other_blocks_in_tool_results_are_refused_by_name():
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "document"}]}
    refused(UnsupportedFeature, "messages[0].content[0].content[0].type", {"role": "user", "content": [result]})


def test_sampling():
    chat, ignored = chat_from_messages(
        body(
            stream=True,
            stop_sequences=["END"],
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            seed=1,
            metadata={"user_id": "u"},
            service_tier="auto",
        )
    )
    assert chat == {
        "model": "m",
        "max_tokens": 10,
        "messages": [HI],
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 1,
    }
    assert ignored == ["metadata", "service_tier"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "9"),
        ("temperature", 1.5),
        ("temperature", False),
        ("stream", 1),
        ("stop_sequences", "x"),
        ("messages", {}),
        ("messages", []),
        ("system", 3),
        ("tools", {}),
        ("thinking", True),
    ],
)
def test_wrong_values(name, value):
    refused(InvalidRequest, name, **{name: value})


def test_max_tokens_is_required():
    question = {"model": "m", "messages": [HI]}
    assert chat_from_messages({**question, "max_tokens": 1})[0] == {**question, "max_tokens": 1}
    with pytest.raises(InvalidRequest, match="max_tokens"):
        chat_from_messages({"model": "m", "messages": [HI]})


@pytest.mark.parametrize("name", ["mcp_servers", "container", "thread", "compaction", "n", "logprobs"])
def test_what_changes_the_answer_is_refused(name):
    refused(UnsupportedFeature, name, **{name: [1]})
    assert name not in chat_from_messages(body(**{name: None}))[0]


def test_a_field_twice():
    refused(InvalidRequest, "stop", stop_sequences=["a"], stop=["b"])
    refused(InvalidRequest, "chat_template_kwargs", thinking={"type": "disabled"}, chat_template_kwargs={})


@pytest.mark.parametrize(
    ("thinking", "enabled"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive", "display": "omitted"}, True),
        ({"type": "disabled"}, False),
    ],
)
def test_thinking(thinking, enabled):
    chat, ignored = chat_from_messages(body(thinking=thinking))
    assert chat["chat_template_kwargs"] == {"enable_thinking": enabled}
    assert ignored == (["budget_tokens"] if "budget_tokens" in thinking else [])


def test_output_config():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}, "strict": True}}
    chat, _ = chat_from_messages(body(output_config={"effort": "max", "format": form}))
    assert (chat["reasoning_effort"], chat["response_format"]) == ("high", wanted)
    assert chat_from_messages(body(output_format=form))[0]["response_format"] == wanted
    chat, ignored = chat_from_messages(body(output_config={"effort": "low"}, thinking={"type": "disabled"}))
    assert "reasoning_effort" not in chat and ignored == ["output_config.effort"]
    refused(UnsupportedFeature, "output_config.format.type", output_config={"format": {"type": "text"}})
    refused(UnsupportedFeature, "thinking.type", thinking={"type": "between_tools"})


@pytest.mark.parametrize("effort", ["xhigh", "max"])
def test_an_effort_that_is_sent_as_a_lower_one_is_named(effort):
    chat, ignored = chat_from_messages(body(output_config={"effort": effort}))
    assert chat["reasoning_effort"] == effort or "output_config.effort" in ignored


def test_tools():
    custom = {
        **WEATHER,
        "type": "custom",
        "strict": True,
        "cache_control": {"type": "ephemeral"},
        "input_examples": [{"city": "Bonn"}],
    }
    search = {"type": "web_search_20250305", "name": "web_search"}
    chat, ignored = chat_from_messages(
        body(tools=[search, custom], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    )
    function = {
        "name": "weather",
        "description": "Weather",
        "strict": True,
        "parameters": {**WEATHER["input_schema"], "examples": [{"city": "Bonn"}]},
    }
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("auto", False)
    assert ignored == ["tools.web_search_20250305", "cache_control"]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_tool_choice(choice, wanted):
    assert chat_from_messages(body(tools=[WEATHER], tool_choice=choice))[0]["tool_choice"] == wanted


def test_tool_choice_without_tools():
    assert chat_from_messages(body(tools=[], tool_choice={"type": "auto"}))[0] == chat_from_messages(body())[0]
    search = {"type": "web_search_20250305", "name": "web_search"}
    refused(UnsupportedFeature, "tool_choice.type", tools=[search], tool_choice={"type": "any"})
    refused(
        UnsupportedFeature,
        "tool_choice.name",
        tools=[search, WEATHER],
        tool_choice={"type": "tool", "name": "web_search"},
    )
    refused(UnsupportedFeature, "tool_choice.name", tools=[WEATHER], tool_choice={"type": "tool", "name": "x" * 10_000})


def test_names_of_what_was_ignored_are_safe_in_a_header():
    refused(InvalidRequest, "tools[0].type", tools=[{"type": "a\r\nX-Evil: 1"}])
    _, ignored = chat_from_messages(body(tools=[{"type": f"kind_{number}"} for number in range(1000)]))
    assert len(ignored) == 1000  # as many as a header holds are named there


def test_unknown_fields_of_known_objects_are_refused():
    refused(InvalidRequest, "tools[0].colour", tools=[{**WEATHER, "colour": 1}])
    refused(
        InvalidRequest,
        "messages[0].content[0].colour",
        {"role": "user", "content": [{"type": "text", "text": "", "colour": 1}]},
    )


WORDS = st.sampled_from(
    """role content type text user assistant system tool_use tool_result image source base64 media_type image/png data
    id name input tool_use_id is_error thinking signature enabled budget_tokens custom input_schema any tool json_schema
    schema format effort cache_control""".split()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5),
    max_leaves=25,
)
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {"type": WORDS | JSON},
        optional=dict.fromkeys(("text", "source", "id", "name", "input", "content", "thinking"), JSON),
    )
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": BLOCKS | JSON}
)
FIELDS = """system tools tool_choice thinking output_config output_format stop_sequences stream temperature metadata
    container n""".split()


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"messages": st.lists(TURN, max_size=4) | JSON, "max_tokens": st.just(5) | JSON},
        optional=dict.fromkeys(FIELDS, JSON),
    )
)
def test_any_json_is_read_or_refused(sent):
    with contextlib.suppress(InvalidRequest, UnsupportedFeature):
        chat, ignored = chat_from_messages(sent)
        json.dumps(chat)
        assert all(name.isascii() and name.isprintable() for name in ignored)
        MessageWriter(sent, "msg_1").start()


# Answers
USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": ""}},
]
COMPLETION = {
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "So:", "reasoning": "hm", "tool_calls": CALLS},
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}
CONTENT = [
    {"type": "thinking", "thinking": "hm", "signature": ""},
    {"type": "text", "text": "So:"},
    {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Köln"}},
    {"type": "tool_use", "id": "call_b", "name": "now", "input": {}},
]


def delta(finish=None, **parts):
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}


CHUNKS = [
    delta(role="assistant", content=""),
    delta(reasoning="h"),
    delta(reasoning_content="m"),
    delta(content="S"),
    delta(content="o:"),
    delta(tool_calls=[{"index": 0, "id": "call_a", "function": {"name": "weather", "arguments": ""}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": '{"city": '}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": '"Köln"}'}}]),
    delta(tool_calls=[{"index": 1, "id": "call_b", "function": {"name": "now", "arguments": ""}}]),
    delta(finish="tool_calls", content=""),
    {"choices": [], "usage": USAGE},
]


def stream(chunks, **fields):
    writer = MessageWriter(body(**fields), "msg_1")
    events = writer.start()
    for chunk in chunks:
        events += writer.feed(chunk)
    return events + writer.end()


def whole(completion, **fields):
    return MessageWriter(body(**fields), "msg_1").complete(completion)


def completion(finish="stop", extra=(), **message):
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, **dict(extra)}], "usage": USAGE}


def test_a_whole_answer():
    assert whole(COMPLETION) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": CONTENT,
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 2,
            "cache_read_input_tokens": 8,
            "cache_creation_input_tokens": 0,
            "output_tokens": 4,
        },
    }


def test_a_streamed_answer():
    kinds = [(event["type"], event.get("index")) for event in stream(CHUNKS)]
    starts = "content_block_start", "content_block_delta", "content_block_stop"
    assert kinds == [
        ("message_start", None),
        ("ping", None),
        *[(starts[0], 0), (starts[1], 0), (starts[1], 0), (starts[1], 0), (starts[2], 0)],
        *[(starts[0], 1), (starts[1], 1), (starts[1], 1), (starts[2], 1)],
        *[(starts[0], 2), (starts[1], 2), (starts[1], 2), (starts[2], 2)],
        *[(starts[0], 3), (starts[1], 3), (starts[2], 3)],
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert stream(CHUNKS)[-2]["usage"] == whole(COMPLETION)["usage"]


@pytest.mark.parametrize(
    ("finish", "message", "extra", "wanted"),
    [
        ("stop", {"content": "x"}, {}, ("end_turn", None)),
        ("length", {"content": "x"}, {}, ("max_tokens", None)),
        ("content_filter", {"content": "x"}, {}, ("refusal", None)),
        ("stop", {"tool_calls": CALLS}, {}, ("tool_use", None)),
        ("tool_calls", {"content": "x"}, {}, ("end_turn", None)),
        ("stop", {"content": "x"}, {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"content": "x"}, {"matched_stop": "END"}, ("stop_sequence", "END")),
        ("stop", {"content": "x"}, {"matched_stop": 2}, ("end_turn", None)),
        ("stop", {"content": "x"}, {"matched_stop": ""}, ("end_turn", None)),
        ("stop", {"content": "x"}, {"stop_reason": "</s>"}, ("end_turn", None)),
    ],
)
def test_stop_reasons(finish, message, extra, wanted):
    answer = whole(completion(finish, extra, **message), stop_sequences=["END"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == wanted


def test_a_call_that_max_tokens_cut():
    call = {"id": "a", "function": {"name": "f", "arguments": '{"x": 1, "city": "Kö'}}
    answer = whole(completion("length", tool_calls=[call]))
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("max_tokens", {"x": 1})


def test_omitted_thinking():
    thinking = {"type": "adaptive", "display": "omitted"}
    assert whole(COMPLETION, thinking=thinking)["content"] == CONTENT[1:]


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]", "no", 3, ["x"], '{"x": NaN}'])
def test_bad_arguments(arguments):
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(BadEngineReply):
        whole(completion("tool_calls", tool_calls=[call]))
    with pytest.raises(BadEngineReply):
        stream([delta(tool_calls=[call]), delta("tool_calls")])


def test_arguments_as_an_object():
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    assert whole(completion(tool_calls=[call]))["content"] == [
        {"type": "tool_use", "id": "toolu_msg_1_0", "name": "f", "input": {"x": 1}}
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        [delta(content="x")],
        [delta("abort")],
        [delta(content=["x"])],
        [delta(tool_calls=[{"index": "0", "function": {"name": "f"}}])],
        [delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}])],
        [delta(tool_calls=[{"index": i, "function": {"name": "f", "arguments": "{}"}}]) for i in (0, 1, 0)],
        [{"choices": "no"}],
        [{"choices": [], "usage": {"prompt_tokens": "3"}}],
    ],
)
def test_bad_streams(chunks):
    with pytest.raises((BadEngineReply, EngineUnavailable)):
        stream(chunks)


CHOICES = st.dictionaries(
    st.sampled_from(["delta", "message", "finish_reason", "stop_reason"]),
    JSON | st.fixed_dictionaries({"tool_calls": JSON, "content": JSON}),
)
PAYLOADS = st.dictionaries(st.sampled_from(["choices", "usage"]), JSON) | st.builds(lambda c: {"choices": [c]}, CHOICES)


@settings(max_examples=200, deadline=None)
@given(PAYLOADS)
def test_any_payload_is_read_or_refused(payload):
    with contextlib.suppress(BadEngineReply, EngineUnavailable):
        whole(payload)


PART = st.one_of(
    st.text(max_size=4).map(lambda text: delta(content=text)),
    st.text(max_size=4).map(lambda text: delta(reasoning=text)),
    st.sampled_from(["stop", "length", "content_filter", "tool_calls"]).map(lambda finish: delta(finish)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PART))
def test_every_stream_is_well_formed(chunks):
    open_block, blocks = None, 0
    for event in stream([*chunks, delta("stop")]):
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == blocks
            open_block, blocks = blocks, blocks + 1
        elif event["type"].startswith("content_block"):
            assert event["index"] == open_block
        if event["type"] in ("content_block_stop", "message_stop"):
            open_block = None
        elif event["type"] == "message_delta":
            assert open_block is None


@pytest.mark.parametrize(
    ("kind", "status", "wanted"),
    [
        ("invalid_request", 400, "invalid_request_error"),
        ("unauthorized", 401, "authentication_error"),
        ("model_not_found", 404, "not_found_error"),
        ("invalid_request", 405, "invalid_request_error"),
        ("payload_too_large", 413, "request_too_large"),
        ("busy", 429, "rate_limit_error"),
        ("internal_error", 500, "api_error"),
        ("bad_engine_reply", 502, "api_error"),
        ("engine_overloaded", 503, "overloaded_error"),
        ("engine_unavailable", 503, "overloaded_error"),
        ("engine_not_installed", 503, "api_error"),
        ("engine_timeout", 504, "timeout_error"),
    ],
)
def test_errors(kind, status, wanted):
    assert anthropic_error(kind, status, "no", "req_1") == {
        "type": "error",
        "error": {"type": wanted, "message": "no"},
        "request_id": "req_1",
    }


# Anthropic's own types and client
try:
    import anthropic
except ImportError:
    anthropic = None
needs_anthropic = pytest.mark.skipif(anthropic is None, reason="the package anthropic is not installed")


def strict(kind, value):
    """The value as that official type, which must know every field."""
    import pydantic

    def check(model):
        assert not model.model_extra, model.model_extra
        for field in type(model).model_fields:
            inner = getattr(model, field)
            for each in inner if isinstance(inner, list) else [inner]:
                if isinstance(each, pydantic.BaseModel):
                    check(each)

    model = pydantic.TypeAdapter(kind).validate_json(json.dumps(value))
    check(model)
    return model


@needs_anthropic
def test_official_types():
    from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
    from anthropic.types.shared.error_response import ErrorResponse

    strict(Message, whole(COMPLETION))
    for event in stream(CHUNKS):
        if event["type"] != "ping":
            strict(RawMessageStreamEvent, event)
    for model in anthropic_models([{"id": "a", "created": 1_700_000_000}, {"id": "b"}])["data"]:
        strict(ModelInfo, model)
    strict(ErrorResponse, anthropic_error("busy", 429, "no", "req_1"))


def annotations(*kinds):
    names = set()
    for kind in kinds:
        names |= set(typing.get_type_hints(kind))
    return sorted(names)


@needs_anthropic
def test_every_official_field_is_known():
    """None passes through to the engine as an unknown field, and none is refused as unknown to the object."""
    from anthropic.types import beta
    from anthropic.types.beta import message_count_tokens_params as count
    from anthropic.types.beta import message_create_params as create

    as_they_are = {"model", "messages", "max_tokens", "temperature", "top_p", "top_k", "stream"}
    for name in annotations(
        create.MessageCreateParamsBase, create.MessageCreateParamsStreaming, count.MessageCountTokensParams
    ):
        with contextlib.suppress(InvalidRequest, UnsupportedFeature):
            chat, ignored = chat_from_messages(body(**{name: "x"}))
            assert name in as_they_are or name in ignored or name == "system" and name not in chat, name
    kinds = {
        "text": beta.BetaTextBlockParam,
        "image": beta.BetaImageBlockParam,
        "tool_result": beta.BetaToolResultBlockParam,
        "tool_use": beta.BetaToolUseBlockParam,
        "thinking": beta.BetaThinkingBlockParam,
        "redacted_thinking": beta.BetaRedactedThinkingBlockParam,
    }
    for kind, official in kinds.items():
        role = "user" if kind in ("text", "image", "tool_result") else "assistant"
        for name in annotations(official):
            known(HI, {"role": role, "content": [{name: 5, "type": kind}]})
    for name in annotations(beta.BetaToolParam):
        known(tools=[{name: 5, "type": "custom"}])
    for name in annotations(beta.BetaToolChoiceAutoParam, beta.BetaToolChoiceToolParam, beta.BetaToolChoiceAnyParam):
        known(tool_choice={name: 5})
    for name in annotations(beta.BetaThinkingConfigEnabledParam, beta.BetaThinkingConfigAdaptiveParam):
        known(thinking={name: 5})
    for name in annotations(beta.BetaOutputConfigParam):
        known(output_config={name: 5})
    for name in annotations(beta.BetaBase64ImageSourceParam):
        known({"role": "user", "content": [{"type": "image", "source": {name: 5}}]})


def known(*messages, **fields):
    try:
        chat_from_messages(body(*messages, **fields))
    except (InvalidRequest, UnsupportedFeature) as error:
        assert "is not a field" not in error.reason


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with COMPLETION or CHUNKS, as the server would."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(200, anthropic_models([{"id": "a", "created": 1_700_000_000}, {"id": "b"}]))

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, sent))
        counting = self.path.partition("?")[0].endswith("count_tokens")
        try:
            chat_from_messages({"max_tokens": 1, **sent})
        except (InvalidRequest, UnsupportedFeature) as error:
            self.server.refused.append((error.param, anthropic_error(error.kind, 400, error.reason, "req_1")["error"]))
            return self.answer(400, anthropic_error(error.kind, 400, error.reason, "req_1", param=error.param))
        if counting:
            return self.answer(200, {"input_tokens": 12})
        if sent["model"] == "busy":
            return self.answer(529, anthropic_error("engine_overloaded", 529, "no", "req_1"))
        writer = MessageWriter(sent, "msg_1")
        if not sent.get("stream"):
            return self.answer(200, writer.complete(self.server.completion))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.end_headers()
        self.send(writer.start())
        for chunk in CHUNKS:
            self.send(writer.feed(chunk))
            if sent["model"] == "breaks":
                return self.send([anthropic_error("engine_unavailable", 529, "the engine ended", "req_1")])
        return self.send(writer.end())

    def send(self, events):
        for event in events:
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen, running.refused, running.completion = [], [], COMPLETION
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def settings_of(server):
    return {"base_url": f"http://127.0.0.1:{server.server_port}", "api_key": "k", "max_retries": 0}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(**settings_of(server)) as opened:
        yield opened


ASK = {
    "model": "m",
    "max_tokens": 2048,
    "messages": [HI],
    "tools": [WEATHER],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}


def plain(message):
    return [block.model_dump(exclude_none=True) for block in message.content]


@needs_anthropic
def test_client_create_and_the_next_turn(client, server):
    message = client.messages.create(**ASK)
    assert plain(message) == CONTENT
    assert (message.stop_reason, message.usage.input_tokens, message.usage.cache_read_input_tokens) == (
        "tool_use",
        2,
        8,
    )
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "12 C"}
        for block in message.content
        if block.type == "tool_use"
    ]
    client.messages.create(
        **ASK
        | {"messages": [HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]}
    )
    chat, ignored = chat_from_messages(server.seen[-1][1])
    assert [sent["role"] for sent in chat["messages"]] == ["user", "assistant", "tool", "tool"]
    assert chat["messages"][1]["reasoning"] == "hm"
    assert ignored == ["budget_tokens"]


@needs_anthropic
def test_client_stream(client):
    with client.messages.stream(**ASK) as opened:
        kinds = [event.type for event in opened]
        message = opened.get_final_message()
    assert plain(message) == CONTENT
    assert {"thinking", "text", "input_json", "signature", "content_block_stop", "message_stop"} <= set(kinds)
    assert (message.stop_reason, message.usage.output_tokens, message.usage.input_tokens) == ("tool_use", 4, 2)


@needs_anthropic
def test_client_create_with_stream(client):
    kinds = [event.type for event in client.messages.create(**ASK, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]


@needs_anthropic
def test_client_beta(client, server):
    message = client.beta.messages.create(**ASK, betas=["x-2026-01-01"])
    assert plain(message) == CONTENT
    assert server.seen[-1][0] in ("/v1/messages", "/v1/messages?beta=true")
    with client.beta.messages.stream(**ASK) as opened:
        assert plain(opened.get_final_message()) == CONTENT


@needs_anthropic
def test_client_async(server):
    async def ask():
        async with anthropic.AsyncAnthropic(**settings_of(server)) as opened:
            message = await opened.messages.create(**ASK)
            async with opened.messages.stream(**ASK) as events:
                return message, await events.get_final_message()

    created, streamed = asyncio.run(ask())
    assert plain(created) == plain(streamed) == CONTENT


@needs_anthropic
def test_client_count_tokens(client):
    assert client.messages.count_tokens(model="m", messages=[HI], system="s", tools=[WEATHER]).input_tokens == 12


@needs_anthropic
def test_client_models(client):
    assert [(model.id, model.created_at.year) for model in client.models.list()] == [("a", 2023), ("b", 1970)]


@needs_anthropic
def test_client_errors(client):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**ASK | {"messages": [{"role": "user", "content": [{"type": "document"}]}]})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**ASK | {"model": "busy"})
    assert caught.value.status_code == 529
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(**ASK | {"model": "breaks"}) as opened,
    ):
        opened.until_done()
    assert caught.value.body["error"] == {"type": "overloaded_error", "message": "the engine ended"}


@needs_anthropic
def test_client_parse(client, server):
    import pydantic

    class City(pydantic.BaseModel):
        name: str

    server.completion = completion(content='{"name": "Bonn"}')
    asked = {"model": "m", "max_tokens": 20, "messages": [HI], "output_format": City}
    assert client.messages.parse(**asked).parsed_output == City(name="Bonn")
    form = chat_from_messages(server.seen[-1][1])[0]["response_format"]
    assert form["json_schema"]["schema"]["properties"]["name"]["type"] == "string"


@needs_anthropic
def test_client_tool_runner(client, server):
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Weather of a city."""
        server.completion = completion(content=f"12 C in {city}")
        return "12 C"

    server.completion = completion("tool_calls", tool_calls=CALLS[:1])
    runner = client.beta.messages.tool_runner(model="m", max_tokens=20, messages=[HI], tools=[weather])
    assert runner.until_done().content[0].text == "12 C in Köln"
    assert chat_from_messages(server.seen[-1][1])[0]["messages"][-1]["content"] == "12 C"
    assert [error["type"] for _, error in server.refused] in ([], ["invalid_request_error"])  # thread, in newer clients
