"""The check of an answer against its constraint, without an engine; schemas: test_structured_schemas.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import llm_inference
from llm_inference import (
    Choice,
    GenerateRequest,
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    UnsupportedFeature,
    check_text,
    make_request,
    normalize_schema,
)
from tests.fake_engine import FakeEngine
from tests.test_structured_schemas import ladder, nested


@contextmanager
def bounded_cpu(seconds: float = 2.5) -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def checked(request: GenerateRequest, text: str) -> Any:
    choice = Choice()
    choice.text_parts.append(text)
    return check_text(request, choice)


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0)]
    friends: list[Person] = []


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (
            Person,
            '{"name": "A", "age": 1, "friends": [{"name": "B", "age": 2}]}',
            Person(name="A", age=1, friends=[Person(name="B", age=2)]),
        ),
        (list[int], "[1, 2]", [1, 2]),
        (dict[str, bool], '{"a": true}', {"a": True}),
        (Literal["x", "y"], '"x"', "x"),
        (int | None, "null", None),
        (tuple[int, str], '[1, "a"]', (1, "a")),
    ],
    ids=str,
)
def test_a_python_type_gives_its_instance(kind: Any, text: str, value: Any) -> None:
    schema, build = normalize_schema(kind)
    request = make_request(messages=[{"role": "user", "content": "x"}], schema=schema, build=build)
    assert checked(request, text) == value
    with pytest.raises(ValueError):
        checked(request, '{"wrong": 1}' if kind != dict[str, bool] else '{"a": 2}')


# Answers -----------------------------------------------------------------------------------------
def answer(text: str, **constraint: Any) -> Any:
    return checked(make_request(messages=[{"role": "user", "content": "x"}], **constraint), text)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1', "null", "[]", "NaN", "{} {}", "```json\n{}\n```", '{"a": NaN}', "{'a': 1}"]
)
def test_what_is_no_json_object_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError):
        answer(text, schema={"type": "object"})


def test_an_answer_with_a_duplicate_key_is_invalid() -> None:
    """vLLM was seen to repeat a key: what the check saw is what is returned."""
    assert answer('{"a": 1, "a": 2}', schema={"type": "object"}) in ({"a": 1}, {"a": 2})


def test_an_answer_nested_too_deeply_is_invalid() -> None:
    with pytest.raises(ValueError):
        answer("[" * 100_000 + "]" * 100_000, schema={"type": "array"})


def test_a_choice_matches_exactly_one_of_the_choices() -> None:
    assert answer("red", choice=["red", "blue"]) == "red"
    for wrong in ("Red", "red ", "", "redblue", '"red"'):
        with pytest.raises(ValueError):
            answer(wrong, choice=["red", "blue"])


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("[0-9]{3}", "123", "1234"),
        ("a|b", "b", "ab"),
        ("a|b", "a", "ax"),
        (".*", "x", "x\ny"),
        ("(?i)yes", "YES", "no"),
        ("^a$", "a", "aa"),
        ("a" * 4096, "a" * 4096, "a"),
    ],
)
def test_a_regex_matches_the_complete_answer(regex: str, good: str, bad: str) -> None:
    assert answer(good, regex=regex) == good
    for wrong in (bad, good + "\n", "\n" + good):
        with pytest.raises(ValueError):
            answer(wrong, regex=regex)


@pytest.mark.parametrize("regex", ["(", "(?=a)", r"(a)\1", "*", "a{2,1}", "[z-a]"])
def test_a_bad_regex_is_the_callers_mistake_before_anything_is_sent(regex: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^regex: "):
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").request("x", regex=regex)


@pytest.mark.parametrize(
    "parameters",
    [{"$ref": "http://127.0.0.1:9/x"}, ladder(28), nested(200), {"type": "wrong"}, {"properties": 5}],
    ids="abcde",
)
def test_a_tools_schema_is_as_hostile_as_any(parameters: Any) -> None:
    llm = LLMInferencer("vllm", base_url="http://127.0.0.1:9")
    with bounded_cpu(), pytest.raises((InvalidRequest, UnsupportedFeature)):
        llm.request("x", tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
TEXT_FORM = {"type": "json_schema", "name": "city", "schema": CITY}
FUNCTION = {"name": "f", "parameters": CITY}
HI = [{"role": "user", "content": "hi"}]
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("", {"schema": CITY}),
    ("", {"schema": {"city": "string"}}),
    ("", {"schema": Person}),
    ("", {"tools": [{"type": "function", "function": FUNCTION}]}),
    ("/api/v1/llm/structured-generate", {"prompt": "hi", "schema": CITY}),
    ("/api/v1/llm/structured-generate", {"prompt": "hi", "schema": {"city": "string"}}),
    ("/api/v1/llm/chat", {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}]}),
    ("/v1/chat/completions", {"model": "m", "messages": HI, "response_format": FORM}),
    ("/v1/chat/completions", {"model": "m", "messages": HI, "tools": [{"type": "function", "function": FUNCTION}]}),
    ("/v1/completions", {"model": "m", "prompt": "hi", "response_format": FORM}),
    ("/v1/responses", {"model": "m", "input": "hi", "text": {"format": TEXT_FORM}}),
    ("/v1/responses", {"model": "m", "input": "hi", "tools": [{"type": "function", **FUNCTION}]}),
    ("/v1/messages", {"model": "m", "max_tokens": 9, "messages": HI, "tools": [{"name": "f", "input_schema": CITY}]}),
]


@pytest.mark.parametrize(("path", "body"), WAYS, ids=range(len(WAYS)))
def test_a_schema_is_checked_once(path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(llm_inference, "check_limits", lambda schema, *_, **__: calls.append(schema))
    if path:
        llm_inference.OPERATIONS[path].surface("id", path).read(body)
    else:
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").request("hi", **body)
    assert len(calls) == 1 and "properties" in str(calls[0])


@pytest.mark.parametrize(
    "tools",
    [5, "x", [5], [[]], [{"function": 5}], [{"function": {"parameters": 5}}], [{"function": None}], {"a": 1}],
    ids=str,
)
def test_tools_of_any_shape_are_refused_by_one_of_ours(tools: Any) -> None:
    with pytest.raises(InferenceError):
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").request("x", tools=tools)


def test_an_engine_error_that_echoes_a_long_text_is_cheap() -> None:
    def cost(text: str) -> float:
        began = time.process_time()
        for _ in range(20):
            assert len(llm_inference.redact(text)) <= 400
        return time.process_time() - began

    short, long = cost("no such model " + "a-" * 400), cost("a-" * 40_000)
    assert long <= 20 * short + 0.05
    assert (
        llm_inference.redact("see 10.0.0.1:80, host.lan:8000 and /etc/pass/wd " + "x" * 2000)
        == "see <address>, <address> and <path>"
    )


@pytest.mark.parametrize("path", ["/api/v1/llm/chat", "/v1/chat/completions"])
def test_a_refused_schema_of_a_tool_is_named(path: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "int"}}}}}]
    body = {"messages": HI, "tools": tools, **({"model": "m"} if path.startswith("/v1") else {})}
    with pytest.raises(InvalidRequest, match=r"^tools: 'f': parameters\.properties\.a\.type: 'int'") as caught:
        llm_inference.OPERATIONS[path].surface("id", path).read(body)
    assert caught.value.param == "tools"


def test_a_place_keeps_the_callers_names_where_a_field_is_renamed() -> None:
    surface = llm_inference.OPERATIONS["/v1/responses"].surface("id", "/v1/responses")
    form = {"type": "json_schema", "name": "x", "schema": {"properties": {"schema": {"type": "int"}}}}
    with pytest.raises(InvalidRequest) as caught:
        surface.read({"model": "m", "input": "hi", "text": {"format": form}})
    surface.rename(caught.value)
    assert caught.value.reason.startswith("text.format.schema.properties.schema.type: 'int'")


# Costs -------------------------------------------------------------------------------------------
SLOW = {"type": "string", "pattern": r"^\p{L}{0,160}$"}  # 0.06 s to compile


def test_a_schema_is_compiled_once_for_all_choices() -> None:
    request = make_request(messages=HI, schema=SLOW)
    with bounded_cpu():
        for _ in range(100):
            assert checked(request, '"x"') == "x"


@pytest.mark.parametrize("referred", [False, True])
def test_the_place_of_a_misfit_costs_little(referred: bool) -> None:
    part = {"$ref": "#/$defs/slow"} if referred else SLOW
    fields = {f"p{n}": dict(part) for n in range(100)} | {"z": {"type": "null"}}
    request = make_request(messages=HI, schema={"type": "object", "properties": fields, "$defs": {"slow": SLOW}})
    with bounded_cpu(), pytest.raises(ValueError, match="does not fit"):
        checked(request, json.dumps(dict.fromkeys(fields, "a")))


def called(parameters: Any, arguments: Any) -> Any:
    """What comes of a call of a tool that is merely offered."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with FakeEngine("vllm") as engine, LLMInferencer("vllm", base_url=engine.base_url) as llm:
        engine.tool_call = ("f", arguments)
        return llm.complete("x", tools=[tool]).tool_calls


def test_an_offered_tools_patterns_cost_little() -> None:
    slow = {f"p{n}": {"type": "string", "pattern": rf"^\p{{L}}{{0,{100 + n}}}$"} for n in range(100)}
    with bounded_cpu():
        assert called({"type": "object", "properties": slow}, {"p1": "a"})


@pytest.mark.parametrize("part", [{"type": "string", "nullable": True}, {"items": [{"type": "null"}], "type": "array"}])
def test_a_call_is_not_held_to_keywords_that_are_not_checked(part: Any) -> None:
    value = None if "nullable" in part else [1]
    assert called({"type": "object", "properties": {"a": part}}, {"a": value})


def test_a_call_of_an_offered_tool_is_checked() -> None:
    with pytest.raises(InferenceError, match="does not fit"):
        called({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": 1})
