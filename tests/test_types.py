"""The domain types and small pure functions: bounds, messages, folding, lines, names."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest

from llm_inference import (
    BadEngineReply,
    Chunk,
    Completion,
    Deadlines,
    GenerateRequest,
    InferenceError,
    InvalidRequest,
    LineReader,
    LLMInferencer,
    Timing,
    Usage,
    clean_url,
    error_text,
    escape_regex,
    from_json,
    is_clean,
    join_tool_calls,
    make_request,
    sse_payloads,
    to_json,
    version_tuple,
)

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
INF, NAN = float("inf"), float("nan")


def request(**fields: Any) -> GenerateRequest:
    return make_request(messages=HI, **fields)


# Bounds ------------------------------------------------------------------------------------------
GOOD: list[tuple[str, list[Any]]] = [
    ("max_tokens", [1, 1_000_000]),
    ("temperature", [0, 0.0, 2, 2.0]),
    ("top_p", [1e-6, 1, 1.0]),
    ("top_k", [1, 100_000]),
    ("min_p", [0, 1]),
    ("stop", ["x", "x" * 256, ["a"], ["a", "b", "c", "d"], "\n"]),
    ("seed", [0, 2**31 - 1]),
    ("presence_penalty", [-2, 2, 0.5]),
    ("frequency_penalty", [-2, 2, 0.5]),
    ("repetition_penalty", [1e-6, 2]),
    ("logprobs", [True, False]),
    ("tools", [[TOOL], [TOOL] * 128]),
    ("think", [True, False, "low", "medium", "high"]),
    ("schema", [{}, {"type": "object"}]),
    ("choice", [["a"], [str(n) for n in range(1000)]]),
    ("regex", ["a", "a" * 4096]),
    ("grammar", ['root ::= "a"']),
    ("model", ["m", "组织/模型"]),
    ("on_unsupported", ["error", "ignore"]),
    ("engine_options", [{"any": "thing"}]),
]
BAD: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -2, 1_000_001, 10**18, 1.0, 1.5, "7", True, False, [1], INF]),
    ("temperature", [-0.01, 2.01, "0.5", True, NAN, INF, [0]]),
    ("top_p", [0, -0.1, 1.01, "1", True, NAN]),
    ("top_k", [-2, 100_001, 1.0, "1", True]),
    ("min_p", [-0.1, 1.1, "0", True, NAN]),
    ("stop", ["", "x" * 257, ["a"] * 5, [""], [1], ["x" * 257], 1, True, {"a": 1}]),
    ("seed", [-(2**63) - 1, 2**63, 1.0, "1", True]),
    ("presence_penalty", [-2.1, 2.1, "0", True, NAN]),
    ("frequency_penalty", [-2.1, 2.1, "0", True, NAN]),
    ("repetition_penalty", [0, -1, 2.1, "1", True, NAN]),
    ("logprobs", [1, 0, "true", "yes"]),
    ("top_logprobs", [-1, 21, 1.0, "1", True]),
    (
        "tools",
        [
            TOOL,
            "x",
            [TOOL] * 129,
            [{}],
            [{"type": "function"}],
            [{"type": "x", "function": {"name": "f"}}],
            [{"type": "function", "function": {"name": "a b"}}],
            [{"type": "function", "function": {"name": "f", "extra": 1}}],
        ],
    ),
    ("tool_choice", ["always", 1, True, {}, {"type": "function"}, {"type": "function", "function": {"name": 1}}]),
    ("think", [1, 0, "yes", "max", {}]),
    ("schema", ["string", 1, True, []]),
    ("choice", [[], [""], "ab", [1], [str(n) for n in range(1001)]]),
    ("regex", ["", "a" * 4097, 1, ["a"]]),
    ("grammar", ["", "a" * 65_537, 1]),
    ("model", [1, True, ["m"]]),
    ("on_unsupported", ["drop", True, 1]),
    ("engine_options", ["x", 1, []]),
]


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in GOOD for v in values], ids=lambda v: str(v)[:24])
def test_a_value_within_its_bounds_is_taken_as_it_is(field: str, value: Any) -> None:
    made = request(**{field: value})
    if field == "on_unsupported":
        assert made.lenient == (value == "ignore")
    elif field == "engine_options":
        assert made.options == value
    else:
        assert made.body.get(field) == (None if (field, value) == ("logprobs", False) else value)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD for v in values], ids=lambda v: str(v)[:24])
def test_a_value_outside_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    more = {"logprobs": True} if field == "top_logprobs" else {"tools": [TOOL]} if field == "tool_choice" else {}
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: value}, **more)
    assert field in caught.value.reason and caught.value.hint
    assert isinstance(caught.value, ValueError) and (caught.value.kind, caught.value.code) == ("invalid_request", 400)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        None,
        [1],
        [{}],
        [{"role": "wizard", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": "x", "extra": 1}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x"}] * 4097,
    ],
)
def test_messages_are_checked(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        make_request(messages=messages)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/html;base64,AAAA",
        "DATA:image/png;base64,AA",
        "data:image/png,AA",
    ],
)
def test_an_image_is_a_data_url_and_never_a_remote_one(url: str) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        make_request(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def test_none_means_the_engines_default() -> None:
    assert (
        request(
            **{
                f.name: None
                for f in dataclasses.fields(GenerateRequest)
                if f.name not in ("messages", "on_unsupported")
            }
        )
        == request()
    )


def test_a_request_is_frozen() -> None:
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        request().lenient = True  # type: ignore[misc]


# Together ----------------------------------------------------------------------------------------
CONSTRAINTS: dict[str, Any] = {"schema": {"type": "object"}, "choice": ["a"], "regex": "a", "grammar": 'root ::= "a"'}


@pytest.mark.parametrize("one", CONSTRAINTS)
@pytest.mark.parametrize("other", CONSTRAINTS)
def test_one_constraint_at_most(one: str, other: str) -> None:
    if one == other:
        assert request(**{one: CONSTRAINTS[one]}).constraint == one
        return
    with pytest.raises(InvalidRequest) as caught:
        request(**{one: CONSTRAINTS[one], other: CONSTRAINTS[other]})
    assert one in caught.value.reason and other in caught.value.reason


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"tools": [TOOL], "choice": ["a"]}, "choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "get_weather"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("shema", "schema"), ("top_pp", "top_p")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(InvalidRequest, match=f"did you mean {right!r}") as caught:
        request(**{wrong: 1})
    assert wrong in caught.value.reason


def test_an_unknown_field_with_no_similar_name_is_refused_too() -> None:
    with pytest.raises(InvalidRequest, match="zzz"):
        request(zzz=1)


# Messages of errors ------------------------------------------------------------------------------
SECRET = "s3cr3t" * 2000


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": SECRET},
        {"stop": [SECRET]},
        {"max_tokens": SECRET},
        {"temperature": SECRET},
        {"tool_choice": SECRET},
        {"think": SECRET},
        {"regex": [SECRET]},
        {"on_unsupported": SECRET},
        {"schema": SECRET},
        {"tools": [{SECRET: 1}]},
        {"choice": {SECRET: SECRET}},
        {"model": [SECRET]},
        {SECRET: 1},
        {"messages": [{"role": SECRET, "content": "x"}]},
        {"messages": [{"role": "user", "content": {SECRET: SECRET}}]},
        {"messages": [{"role": "user", "content": "x", SECRET: 1}]},
        {"messages": [{"role": "user", "content": [{"type": SECRET}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
    ],
    ids=lambda f: next(iter(f))[:12] + str(f)[-40:].replace("s3cr3t", ""),
)
def test_a_refusal_never_echoes_the_input(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_request(**{"messages": HI, **fields})
    assert len(str(caught.value)) < 1000 and "s3cr3ts3cr3t" not in str(caught.value)


def every_error() -> list[type[InferenceError]]:
    found, todo = [], [InferenceError]
    while todo:
        found.append(todo.pop())
        todo += found[-1].__subclasses__()
    return found


def test_every_error_class_has_a_kind_of_its_own_and_a_place_in_the_table() -> None:
    kinds = [cls.kind for cls in every_error()]
    assert len(kinds) == len(set(kinds))
    for cls in every_error():
        error = cls("why", "do that", text="raw")
        assert (error.code, error.status // 100) in ((400, 4), (500, 5)) and isinstance(error.retryable, bool)
        assert cls.v1[0] // 100 == error.status // 100 and cls.v1[1] and cls.__doc__
        assert (str(error), error.reason, error.hint, error.text) == ("why; do that", "why", "do that", "raw")


DESIGN = {
    "invalid_request": (400, 400, "invalid_request_error", False),
    "unsupported_feature": (400, 400, "invalid_request_error", False),
    "context_too_long": (400, 400, "invalid_request_error", False),
    "unknown_engine": (400, 400, "invalid_request_error", False),
    "model_not_found": (400, 404, "not_found_error", False),
    "engine_unavailable": (500, 503, "", True),
    "engine_not_installed": (500, 503, "", False),
    "engine_overloaded": (500, 503, "", True),
    "engine_timeout": (500, 504, "", True),
    "out_of_memory": (500, 502, "", False),
    "bad_engine_reply": (500, 502, "", False),
    "structured_output_invalid": (500, 502, "", False),
    "internal_error": (500, 500, "", False),
}


@pytest.mark.parametrize("kind", DESIGN)
def test_the_table_of_errors_is_the_designs(kind: str) -> None:
    (cls,) = [cls for cls in every_error() if cls.kind == kind]
    code, status, word, retryable = DESIGN[kind]
    assert (cls.code, cls.v1[0], cls.retryable) == (code, status, retryable) and cls.v1[1].startswith(word)


# Folding -----------------------------------------------------------------------------------------
def test_chunks_fold_into_the_complete_answer() -> None:
    done = Completion.from_chunks(
        [
            Chunk(reasoning="hm"),
            Chunk(text="北", logprobs=({"token": "北"},)),
            Chunk(text="京", logprobs=({"token": "京"},)),
            Chunk(
                finish_reason="stop",
                usage=Usage(prompt_tokens=3, completion_tokens=2),
                timing=Timing(total=1.5),
                result=7,
            ),
        ]
    )
    assert (done.text, done.reasoning, done.finish_reason, done.result) == ("北京", "hm", "stop", 7)
    assert (
        done.usage.as_dict() == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        and done.timing.total == 1.5
    )
    assert [p["token"] for p in done.logprobs] == ["北", "京"]
    assert Completion.from_chunks([Chunk(finish_reason="function_call")]).finish_reason == "tool_calls"


@pytest.mark.parametrize("chunks", [[], [Chunk(text="a")], [Chunk(text="a", finish_reason="stop"), Chunk(text="b")]])
def test_a_stream_without_its_end_is_no_answer(chunks: list[Chunk]) -> None:
    with pytest.raises(BadEngineReply):
        Completion.from_chunks(chunks)


def test_tool_call_deltas_are_joined_by_their_index() -> None:
    deltas: list[dict[str, Any]] = [
        {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f"}},
        {"index": 0, "id": None, "function": {"name": None, "arguments": '{"x"'}},
        {"index": 1, "function": {"arguments": "{}"}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 0, "function": None},
    ]
    first, second = join_tool_calls(deltas)
    assert first == {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert second == {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert join_tool_calls([]) == ()


def test_complete_calls_without_an_index_stay_separate() -> None:
    calls = join_tool_calls(
        [
            {"id": "a", "function": {"name": "f", "arguments": "1"}},
            {"id": "b", "function": {"name": "f", "arguments": "2"}},
        ]
    )
    assert [call["function"]["arguments"] for call in calls] == ["1", "2"]


# Bytes -------------------------------------------------------------------------------------------
RAW = (
    'data: {"a": "x\u2028y\u0085z"}\r\n\r\ndata: 北京 🚲\n: ping\n\nerror: {"code": 1}\nevent: x\ndata:[DONE]'.encode()
)
LINES = [
    'data: {"a": "x\u2028y\u0085z"}',
    "",
    "data: 北京 🚲",
    ": ping",
    "",
    'error: {"code": 1}',
    "event: x",
    "data:[DONE]",
]


def lines_of(*pieces: bytes) -> list[bytes]:
    """What a reader makes of pieces of a stream, the last line without an end among it."""
    reader = LineReader()
    data = b"".join(map(reader.complete, pieces))
    if reader.size:
        data += reader.complete(b"\n")
    assert not reader.size and data.endswith(b"\n")
    return [line.removesuffix(b"\r") for line in data.split(b"\n")[:-1]]


@pytest.mark.parametrize("cut", range(len(RAW) + 1))
def test_lines_do_not_depend_on_where_the_bytes_are_cut(cut: int) -> None:
    assert [line.decode() for line in lines_of(RAW[:cut], RAW[cut:])] == LINES


def test_lines_byte_by_byte() -> None:
    lines = lines_of(*(RAW[n : n + 1] for n in range(len(RAW))))
    assert [line.decode() for line in lines] == LINES
    assert list(sse_payloads(lines)) == [
        '{"a": "x\u2028y\u0085z"}'.encode(),
        "北京 🚲".encode(),
        b'{"error":{"code": 1}}',
        b"[DONE]",
    ]


def test_an_endless_line_is_refused_and_not_kept() -> None:
    reader, piece = LineReader(), b"x" * (1 << 20)
    with pytest.raises(BadEngineReply):
        for _ in range(LineReader.LIMIT // len(piece) + 2):
            assert reader.complete(piece) == b""


def test_a_long_line_in_small_pieces_costs_little() -> None:
    """4 MiB in pieces of 1 KiB: linear, not quadratic."""
    reader, started = LineReader(), time.process_time()
    for _ in range(4096):
        reader.complete(b"x" * 1024)
    assert time.process_time() - started < 2.5


def test_an_empty_input_yields_no_lines() -> None:
    assert LineReader().complete(b"") == b"" and not LineReader().size


@pytest.mark.parametrize(
    ("data", "clean"),
    [
        ('data: {"a": 1}\n\n', True),
        ('data: {"a": "北京 🚲"}\n\ndata: {"b": {}}\n\n', True),
        ('data: {"a": "\x00"}\n\n', False),
        ('data: {"a": "\r"}\n\n', False),  # ends a line for a client
        ('data: {"a": 1}\r\n\r\n', False),
        ('data: {"a": 1}\n', False),
        ('data: {"a": 1\n\n', False),
        ("data: [1]\n\n", False),
        ("data: {}\n\n", False),
        ('event: x\ndata: {"a": 1}\n\n', False),
        ('data: {"a": 1}\n\ndata: [DONE]\n\n', False),
    ],
)
def test_which_events_are_passed_on_unread(data: str, clean: bool) -> None:
    """What is not in the engines' own form is parsed first."""
    assert is_clean(data.encode()) is clean


@pytest.mark.parametrize("bad", [b"", b"{", b"NaN", b"Infinity", b'{"a": 1}x', b"\xff", b"[1,]"])
def test_json_is_strict(bad: bytes) -> None:
    with pytest.raises(ValueError):
        from_json(bad)


def test_json_round_trip() -> None:
    value = {"北京": [1, 1.5, None, True, "🚲\u2028"], "": {}}
    assert from_json(to_json(value)) == value == json.loads(to_json(value))


# Names and places --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/a/b/v1", "https://h/a/b"),
        ("0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("http://0.0.0.0", "http://127.0.0.1"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("10.0.0.0:80", "http://10.0.0.0:80"),
        ("http://10.0.0.0.0.0/x", "http://10.0.0.0.0.0/x"),
        ("h_1.example", "http://h_1.example"),
    ],
)
def test_a_base_url_is_read_as_people_write_it(given: str, clean: str) -> None:
    assert clean_url(given) == clean == clean_url(clean)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ftp://h",
        "file:///etc/passwd",
        "http://",
        "http://h:port",
        "http://u:p@h",
        "http://h/?q=1",
        "http://h/#f",
        "http://h h",
        "http://h\r\nx: y",
        "http://h\n",
        "h:123456",
    ],
)
def test_what_is_no_base_url_is_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="base_url"):
        clean_url(bad)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.10.2+cpu", (0, 10, 2)),
        ("v0.6.1.post1", (0, 6, 1)),
        ("0.33.0-rc2", (0, 33, 0)),
        ("1.2", (1, 2)),
        ("", (999,)),
        ("unknown", (999,)),
    ],
)
def test_versions_compare_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_tuple(text) == numbers
    assert version_tuple("0.9") < version_tuple("0.10.0") < version_tuple("")


@pytest.mark.parametrize(
    "text", ["a.b", "(x)|[y]", "^$*+?{1,2}\\", "a/b-c", "北京", "x\ny", "tab\t", '"q"', "a b", "#&~", "\r\n"]
)
def test_an_escaped_text_matches_itself_alone(text: str) -> None:
    import re

    from llm_inference import matcher

    escaped = escape_regex(text)
    assert "\n" not in escaped
    for matches in (lambda s: bool(re.search(f"^(?:{escaped})$", s)), matcher(f"^(?:{escaped})$")):
        assert matches(text) and not matches(text + "x") and not matches("x" + text)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": "plain"}', "plain"),
        (b'{"error": {"message": "m", "code": 400}}', "m"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"message": "m"}', "m"),
        (b'{"error": "{\\"error\\": {\\"code\\": 400, \\"message\\": \\"deep\\"}}"}', "deep"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"", "no reason given"),
        (b"a\nb\t c", "a b c"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"null", "null"),
        (b"[1]", "[1]"),
    ],
)
def test_what_an_engine_says(body: bytes, said: str) -> None:
    assert error_text(body) == said


@pytest.mark.parametrize(
    "leak",
    [
        "/venv/lib/python3/site-packages/sglang/srt/x.py",
        "http://10.1.2.3:9000/v2/x",
        "https://u:p@h/x?token=1",
        "/root/models/m.gguf",
        "~/.cache/x/y",
        "/data/模型/权重.gguf",
        "file:///etc/passwd",
        "dial tcp 10.1.2.3:9000",
    ],
)
def test_what_an_engine_says_has_no_paths_and_addresses(leak: str) -> None:
    said = error_text(json.dumps({"error": {"message": f"it broke at {leak}, sorry"}}).encode())
    assert said.startswith("it broke at") and not any(
        part in said for part in ("site-packages", "10.1.2.3", "token", "root", "cache", "模型", "passwd")
    )


def test_what_an_engine_says_is_short() -> None:
    assert len(error_text(b"x" * 100_000)) <= 400


# Construction ------------------------------------------------------------------------------------
def test_constructors_do_no_io(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import subprocess

    def never(*_: object, **__: object) -> None:
        raise AssertionError("I/O in a constructor")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    for name in ("auto", *LLMInferencer.ENGINE_MAP):
        assert LLMInferencer(name, "m", base_url="http://127.0.0.1:9").engine_type == name


@pytest.mark.parametrize("value", [-1, 0, float("nan"), "5", None, True])
def test_deadlines_are_numbers_above_zero(value: Any) -> None:
    for name in ("connect", "first_token", "idle", "total"):
        with pytest.raises(InvalidRequest, match=rf"deadlines\.{name}: must be a number above 0"):
            Deadlines(**{name: value})


@pytest.mark.parametrize("name", ["olama", "OLLAMA", "", "x" * 5000])
def test_an_unknown_engine_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(InferenceError) as caught:
        LLMInferencer(name)
    assert (caught.value.kind, caught.value.code) == ("unknown_engine", 400) and len(str(caught.value)) < 300
    assert "ollama" in caught.value.hint
