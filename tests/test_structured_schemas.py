"""Structured output without an engine: which schemas are accepted, and what the check of an answer lets through."""

import dataclasses
import datetime
import enum
import functools
import ipaddress
import json
import pathlib
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Annotated, Any, ForwardRef, Generic, Literal, NamedTuple, Optional, Required, TypeVar

import pytest
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr
from typing_extensions import TypedDict

import llm_inference
from llm_inference import (
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    SchemaCheck,
    UnsupportedFeature,
    check_limits,
    full_matcher,
    llamacpp_regex,
    llamacpp_schema,
    matcher,
    normalize_schema,
)
from tests.fake_engine import FakeEngine

check_tool_schema = functools.partial(check_limits, strict=False)


def checked_schema(given: Any) -> dict[str, Any]:
    """The schema of a request, as `normalize_schema` takes it."""
    schema, _ = normalize_schema(given)
    check_limits(schema)
    return schema


def fits(schema: Any, value: Any) -> bool:
    try:
        SchemaCheck(schema)(value)
    except ValueError:
        return False
    return True


def taken(schema: Any) -> bool:
    """Whether the schema is taken; a refusal is one of ours and says something."""
    try:
        checked_schema(schema)
    except (InvalidRequest, UnsupportedFeature) as exc:
        assert exc.reason and exc.hint and len(str(exc)) < 1000
        return False
    return True


@contextmanager
def bounded_cpu(seconds: float = 2.5) -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


# What is taken -----------------------------------------------------------------------------------
def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


STRING, NUMBER = {"type": "string"}, {"type": "number"}
SHORT: list[tuple[Any, Any]] = [
    ({"city": "string", "population": "number"}, obj(city=STRING, population=NUMBER)),
    ({"tags": ["string"]}, obj(tags={"type": "array", "items": STRING})),
    ({"at": {"lat": "number"}}, obj(at=obj(lat=NUMBER))),
    (
        {"a": [{"b": ["integer"]}]},
        obj(a={"type": "array", "items": obj(b={"type": "array", "items": {"type": "integer"}})}),
    ),
    ({"城市": "string"}, obj(城市=STRING)),
    ({"kind": {"enum": ["a", "b"]}}, obj(kind={"enum": ["a", "b"]})),
    ({"age": {"type": "integer", "minimum": 0}}, obj(age={"type": "integer", "minimum": 0})),
    (
        {"ok": "boolean", "none": "null", "any": "object"},
        obj(ok={"type": "boolean"}, none={"type": "null"}, any={"type": "object"}),
    ),
    ({"type": "string", "name": "string"}, obj(type=STRING, name=STRING)),  # a field called type beside another field
    ({"items": ["string"]}, obj(items={"type": "array", "items": STRING})),
    ({"properties": {"a": "string"}}, obj(properties=obj(a=STRING))),
    ({"properties": "string", "required": "boolean"}, obj(properties=STRING, required={"type": "boolean"})),
    ({"items": {"type": "string", "price": "number"}}, obj(items=obj(type=STRING, price=NUMBER))),
]
FULL: list[Any] = [
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "string"}}},
    {"enum": ["a", 1]},
    {"const": 1},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
    {"type": ["string", "null"]},
    {"type": "array", "items": {"type": "integer"}},
    {"type": "string", "maxLength": 3},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"},
    {"type": "object", "title": "T", "description": "d"},
    {"type": "string"},
]


@pytest.mark.parametrize(("short", "full"), SHORT, ids=lambda v: json.dumps(v, ensure_ascii=False)[:40])
def test_the_short_form_means_an_object_with_all_its_fields(short: Any, full: Any) -> None:
    assert normalize_schema(short) == (full, None)


@pytest.mark.parametrize("schema", FULL, ids=lambda v: json.dumps(v)[:40])
def test_a_json_schema_is_taken_as_it_is(schema: Any) -> None:
    assert normalize_schema(schema) == (schema, None)


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_schema_means_any_object(nothing: Any) -> None:
    assert normalize_schema(nothing) == ({"type": "object"}, None)


@pytest.mark.parametrize(
    "schema", [{"type": "string", "description": "string"}, {"type": "string", "title": "string", "format": "string"}]
)
def test_what_could_be_either_form_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="short form"):
        normalize_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"city": "text"},
        {"city": 1},
        {"city": []},
        {"city": ["string", "number"]},
        {"city": None},
        {"city": {}},
        {"a": {"b": "str"}},
        "string",
        5,
        [1],
        {"city": ["text"]},
    ],
)
def test_what_is_neither_form_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="schema"):
        normalize_schema(schema)


@pytest.mark.parametrize("kind", [object(), type("Plain", (), {}), "Person", Callable[[int], int]], ids=str)
def test_what_has_no_schema_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match="schema"):
        normalize_schema(kind)


# The check ---------------------------------------------------------------------------------------
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
    "additionalProperties": False,
}
TABLE: list[tuple[Any, list[Any], list[Any]]] = [
    ({"type": "string"}, ["", "北京"], [1, None, True, [], {}]),
    ({"type": "number"}, [0, -1.5, 1e300], ["1", True, None]),
    ({"type": "integer"}, [0, -3, 2.0, 10**400], [1.5, True, "1"]),
    ({"type": "boolean"}, [True, False], [0, 1, "true"]),
    ({"type": "null"}, [None], [False, 0, ""]),
    ({"type": "object"}, [{}, {"a": 1}], [[], None]),
    ({"type": "array"}, [[], [1]], [{}, ""]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    (
        {"enum": [1, "a", None, [1], {"a": 1}, True]},
        [1, "a", None, [1], {"a": 1}, 1.0, True],
        [2, "b", False, [2], {"a": 2}, {}],
    ),
    ({"enum": [0]}, [0, 0.0], [False]),
    ({"enum": [False]}, [False], [0]),
    ({"enum": [[1], {"a": 1.0}]}, [[1], [1.0], {"a": 1}], [[True], {"a": True}]),
    ({"const": "a"}, ["a"], ["b", None]),
    ({"const": None}, [None], [0, False]),
    ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "x"}, {"b": 1}, 5], [{"a": 1}]),
    ({"required": ["a", "b"]}, [{"a": 1, "b": None}, "x"], [{"a": 1}, {}]),
    ({"properties": {"a": True}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
    ({"additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "x"}]),
    (
        {"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        [{"x1": 1}],
        [{"x1": "a"}, {"y": 1}],
    ),
    (
        {"properties": {"xa": {"minimum": 5}}, "patternProperties": {"^x": {"type": "integer"}}},
        [{"xa": 5}],
        [{"xa": 4}, {"xa": 5.5}],
    ),
    ({"propertyNames": {"maxLength": 2}}, [{"ab": 1}], [{"abc": 1}]),
    ({"minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": 1, "b": 2, "c": 3}]),
    ({"items": {"type": "integer"}}, [[], [1, 2]], [[1, "x"]]),
    (
        {"prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        [["a", 1], ["a"], []],
        [["a", "b"], ["a", 1, 2]],
    ),
    ({"minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
    (
        {"uniqueItems": True},
        [[1, 2], [[1], [2]], [1, "1"], [0, False]],
        [[1, 1], [{"a": 1, "b": 2}, {"b": 2, "a": 1}], [1, 1.0]],
    ),
    ({"minLength": 2, "maxLength": 3}, ["ab", "北京市", "🚲🚲"], ["a", "abcd", "🚲"]),
    ({"pattern": "^[0-9]+$"}, ["12", 5], ["a", "", "1a"]),
    ({"pattern": "b"}, ["abc"], ["ac"]),
    ({"minimum": 1, "maximum": 2}, [1, 2, 1.5, "x"], [0, 3, 0.999]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, [1.5], [1, 2, 0]),
    ({"multipleOf": 3}, [0, 3, -6, 9.0, 3 * 10**30], [1, 4.5, 3 * 10**30 + 1]),
    ({"multipleOf": 2}, [2 * 10**9], [2 * 10**9 + 3, 1e308 / 1e308]),
    ({"multipleOf": 0.1}, [0.3, 1.1, 5, 0.7], [0.35]),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["a", 5, None], [4]),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, [2, 3, 9], [6, 1]),
    ({"allOf": [{"minimum": 2}, {"maximum": 4}]}, [2, 4], [1, 5]),
    ({"not": {"type": "string"}}, [1, None], ["a"]),
    ({"if": {"minimum": 10}, "then": {"multipleOf": 10}, "else": {"maximum": 5}}, [10, 20, 5], [11, 6]),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, ["a", 1], [""]),
    ({"if": False, "else": {"const": 1}}, [1], [2]),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, [1], ["a"]),
    ({"$ref": "#/$defs/n", "maximum": 3, "$defs": {"n": {"type": "integer"}}}, [1], [4, 1.5]),
    ({"$ref": "#/definitions/a~1b~0", "definitions": {"a/b~": {"const": 1}}}, [1], [2]),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}],
        [{"v": "x"}, {"v": 1, "next": {}}, {"v": 1, "next": {"v": 2, "x": 1}}],
    ),
    (
        {"properties": {"self": {"$ref": "#"}}, "additionalProperties": False},
        [{}, {"self": {"self": {}}}],
        [{"self": {"x": 1}}],
    ),
    (True, [1, "a", None], []),
]
CELLS = [
    (schema, value, good)
    for schema, goods, bads in TABLE
    for good, values in ((True, goods), (False, bads))
    for value in values
]


@pytest.mark.parametrize(
    ("schema", "value", "good"),
    CELLS,
    ids=lambda v: "" if isinstance(v, bool) else json.dumps(v, ensure_ascii=False)[:40],
)
def test_a_value_fits_its_schema_or_not(schema: Any, value: Any, good: bool) -> None:
    check_limits(schema)
    assert fits(schema, value) is good


def test_the_table_is_right() -> None:
    """The reference implementation says the same of every cell (but for one float that its own rounding spoils)."""
    reference = pytest.importorskip("jsonschema").Draft202012Validator
    for schema, value, good in CELLS:
        if "$ref" not in str(schema) and schema != {"multipleOf": 0.1} and schema not in ({"multipleOf": 3},):
            assert reference(schema).is_valid(value) is good, (schema, value)


# Against the reference ---------------------------------------------------------------------------
def some_value(rng: random.Random, depth: int = 0) -> Any:
    plain: list[Any] = [None, True, False, 0, 1, 2, 3, -1, 1.5, 2.0, 10, "", "a", "ab", "abc", "北京", "1", "x1"]
    if depth < 2 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(["a", "b", "x1", "名"]): some_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(plain)


def some_schema(rng: random.Random, depth: int = 0) -> Any:
    if depth > 2 or rng.random() < 0.1:
        return rng.choice([True, False, {}, {"type": "string"}, {"type": "integer"}, {"minimum": 1}])
    schema: dict[str, Any] = {}

    def child() -> Any:
        return some_schema(rng, depth + 1)

    makers: dict[str, Callable[[], Any]] = {
        "type": lambda: rng.choice(
            [
                "string",
                "number",
                "integer",
                "boolean",
                "null",
                "object",
                "array",
                ["string", "null"],
                ["integer", "array", "object"],
            ]
        ),
        "enum": lambda: [some_value(rng, 1) for _ in range(3)],
        "const": lambda: some_value(rng, 1),
        "properties": lambda: {name: child() for name in rng.sample(["a", "b", "x1"], 2)},
        "required": lambda: rng.sample(["a", "b"], 1),
        "additionalProperties": child,
        "patternProperties": lambda: {rng.choice(["^x", "[ab]", "名"]): child()},
        "propertyNames": child,
        "minProperties": lambda: rng.randrange(3),
        "maxProperties": lambda: rng.randrange(3),
        "items": child,
        "prefixItems": lambda: [child(), child()],
        "minItems": lambda: rng.randrange(3),
        "maxItems": lambda: rng.randrange(2, 4),
        "uniqueItems": lambda: rng.choice([True, False]),
        "minLength": lambda: rng.randrange(3),
        "maxLength": lambda: rng.randrange(2, 4),
        "pattern": lambda: rng.choice(["^a", "b$", "[0-9]", "^.{2}$"]),
        "minimum": lambda: rng.choice([0, 1, 1.5]),
        "maximum": lambda: rng.choice([1.5, 2, 2.5]),
        "exclusiveMinimum": lambda: rng.choice([0, 1]),
        "exclusiveMaximum": lambda: rng.choice([2, 3]),
        "multipleOf": lambda: rng.choice([1, 2, 0.5]),
        "anyOf": lambda: [child(), child()],
        "oneOf": lambda: [child(), child()],
        "allOf": lambda: [child()],
        "not": child,
        "if": child,
        "then": child,
        "else": child,
    }
    for name in rng.sample(list(makers), rng.randrange(1, 5)):
        schema[name] = makers[name]()
    return schema


def test_the_check_agrees_with_the_reference_implementation() -> None:
    """1500 generated schemas, 8 values each, a fixed seed."""
    reference = pytest.importorskip("jsonschema").Draft202012Validator
    rng, different, both = random.Random(20261122), [], {True: 0, False: 0}
    for _ in range(1500):
        schema = some_schema(rng)
        check_limits(schema)
        for _ in range(8):
            value = some_value(rng)
            expected = reference(schema).is_valid(value)
            both[expected] += 1
            if fits(schema, value) is not expected:
                different.append((schema, value, expected))
    assert min(both.values()) > 1000
    assert not different, f"{len(different)} differ, such as {different[:3]}"


# Hostile schemas ---------------------------------------------------------------------------------
PLACES = [
    "http://127.0.0.1:9/s.json",
    "https://example.com/s",
    "file:///etc/passwd",
    "/etc/passwd",
    "s.json",
    "s.json#/a",
    "urn:x:y",
    "//h/s",
    "#anchor",
    "ftp://h/x",
    "#/../x",
    "",
]


@pytest.mark.parametrize("ref", PLACES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda r: r,
        lambda r: {"type": "object", "properties": {"a": r}},
        lambda r: {"anyOf": [r]},
        lambda r: {"$ref": "#/$defs/a", "$defs": {"a": r}},
    ],
    ids="abcd",
)
def test_no_reference_leaves_the_schema(ref: str, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import socket
    import threading

    def never_here(known: Any) -> Any:
        """Other threads watch engines meanwhile."""

        def ask(*args: Any, **options: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread(), "a place was asked"
            return known(*args, **options)

        return ask

    schema = wrap({"$ref": ref})
    monkeypatch.setattr(socket, "socket", never_here(socket.socket))
    monkeypatch.setattr(builtins, "open", never_here(open))
    assert not taken(schema)


def ladder(rungs: int, width: int = 2) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"d{n}": {"type": "object", "properties": {str(w): {"$ref": f"#/$defs/d{n + 1}"} for w in range(width)}}
        for n in range(rungs)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{rungs}": {"type": "string"}}}


def deep(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE: dict[str, Callable[[], Any]] = {
    "ladder of references": lambda: ladder(28),
    "wide ladder": lambda: ladder(10, 8),
    "ladder in allOf": lambda: {
        "$ref": "#/$defs/0",
        "$defs": {
            **{str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 3} for n in range(20)},
            "20": {"type": "string"},
        },
    },
    "200 deep": lambda: nested(200),
    "100000 deep": lambda: nested(100_000),
    "deep short form": lambda: json.loads('{"a":' * 500 + '"string"' + "}" * 500),
    "deep list": lambda: json.loads('{"a":' + "[" * 500 + '"string"' + "]" * 500 + "}"),
    "1 MB enum": lambda: {"enum": ["x" * 10] * 100_000},
    "1 MB of properties": lambda: {"type": "object", "properties": {str(n): {"type": "string"} for n in range(50_000)}},
    "6000 parts": lambda: {"anyOf": [{"const": 1}] * 6000},
    "a huge number": lambda: {"type": "integer", "maximum": 10**80_000},
    "not JSON": lambda: {"type": "string", "const": {1, 2}},
    "nan": lambda: {"type": "number", "maximum": float("nan")},
    "a cycle of objects": lambda: (lambda d: d.update(properties={"a": d}) or d)({"type": "object"}),
    "look-around": lambda: {"type": "string", "pattern": "(?=a)b"},
    "back-reference": lambda: {"type": "string", "pattern": r"(a)\1"},
    "bad pattern": lambda: {"type": "string", "pattern": "("},
    "huge repeat": lambda: {"type": "string", "pattern": "(((a{1000}){1000}){1000})"},
    "long pattern": lambda: {"type": "string", "pattern": "a" * 5000},
    "many costly patterns": lambda: {"anyOf": [{"pattern": rf"\p{{L}}{{{n}}}"} for n in range(40, 540)]},
    "hostile property pattern": lambda: {"type": "object", "patternProperties": {"(": True}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_at_little_cost(name: str) -> None:
    schema = HOSTILE[name]()
    with bounded_cpu():
        assert not taken(schema)


JUNK: list[Any] = [5, -1, 0, "x", None, [], {}, [5], {"a": 5}, True, 1.5, [[]], [None], "1e999", ["a", "a"], 1e-300]
VALUES: list[Any] = ["text", 5, 1e300, 10**400, [1, 2, [3]], {"a": 1, "b": {"c": []}}, {}, [], None, True]


@pytest.mark.parametrize("keyword", sorted({*llm_inference._KEYWORDS, *llm_inference._ANNOTATIONS}))
def test_a_keyword_with_a_senseless_value_is_refused_or_harmless(keyword: str) -> None:
    """Never an error that is not ours: neither when the schema is given, nor when an answer is checked against it."""
    wrong = []
    for junk in JUNK:
        schema = {"type": ["object", "string", "number", "array"], keyword: junk}
        try:
            check = SchemaCheck(checked_schema(schema))
        except (InvalidRequest, UnsupportedFeature):
            continue
        except Exception as exc:
            wrong.append(f"{junk!r} when given: {exc!r}")
            continue
        for value in VALUES:
            try:
                check(value)
            except ValueError:
                continue
            except Exception as exc:
                wrong.append(f"{junk!r} against {str(value)[:20]}: {exc!r}")
                break
    assert not wrong, f"{keyword}: " + "; ".join(wrong)


CATASTROPHIC = [
    "^(a+)+$",
    "^(a|a)*$",
    "^(a|aa)+$",
    "(.*)*x",
    "^([a-zA-Z0-9])(([-.]|[_]+)?([a-zA-Z0-9]+))*(@){1}$",
    "(x+x+)+y",
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_catastrophic_pattern_costs_little(pattern: str) -> None:
    schema = {"type": "array", "items": {"type": "string", "pattern": pattern}}
    with bounded_cpu():
        if taken(schema):
            fits(schema, ["a" * 5000 + "!"] * 20)
            fits({"patternProperties": {pattern: True}, "additionalProperties": False}, {"a" * 5000 + "!": 1})


def test_patterns_of_many_callers_do_not_pile_up() -> None:
    """A compiled one can take 10 MB: 200 of those in the cache were 1.6 GB."""
    for n in range(100):
        matcher(f"^x{n}$")
    assert llm_inference._compile_pattern.cache_info().currsize <= 16


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}, 1),
        ({"$ref": "#"}, 1),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, 1),
        (
            {"anyOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}], "not": {"const": 1}},
            json.loads("[" * 40 + "1" + "]" * 40),
        ),
        ({"items": {"enum": list(range(3000))}}, [-1.5] * 3000),
        ({"uniqueItems": True}, [[n] * 100 for n in range(5000)]),
        ({"items": {"$ref": "#"}}, deep(5000, lambda v: [v])),
        ({"properties": {"a": {"$ref": "#"}}}, deep(5000, lambda v: {"a": v})),
        ({"enum": [[["x"] * 3000]] * 5}, [["x"] * 2999 + ["y"]]),
        (
            {"oneOf": [{"oneOf": [{"oneOf": [{"type": "array", "items": {"type": "integer"}}] * 9}] * 9}] * 9},
            list(range(3000)),
        ),
    ],
    ids=range(10),
)
def test_the_check_of_an_answer_is_bounded(schema: Any, value: Any) -> None:
    """Whatever the schema and the answer: a verdict within the budget, and no error but ValueError."""
    with bounded_cpu():
        if taken(schema):
            fits(schema, value)


# Keywords ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("$dynamicRef", "#a"),
        ("$recursiveRef", "#"),
        ("additionalItems", False),
        ("dependencies", {"a": ["b"]}),
        ("nullable", True),
        ("madeUp", {}),
        ("minLenght", 3),
        ("maxitems", 3),
        ("divisibleBy", 2),
        ("formatMinimum", "2020-01-01"),
        ("items", [{"type": "string"}]),
    ],
)
def test_a_keyword_that_would_not_be_checked_is_refused_by_name(keyword: str, value: Any) -> None:
    inner = {"type": "object", "properties": {"a": {"type": "array", keyword: value}}}
    for schema in (inner, {"type": "object", keyword: value}):
        with pytest.raises((UnsupportedFeature, InvalidRequest)) as caught:
            checked_schema(schema)
        assert keyword in str(caught.value)


ANNOTATIONS: dict[str, Any] = {
    "x-order": 1,
    "x-a": {"type": 5},
    "example": {"a": 1},
    "examples": [1],
    "enumNames": ["a"],
    "markdownDescription": "m",
    "strict": True,
    "contentMediaType": "text/plain",
    "contentEncoding": "base64",
    "errorMessage": {"type": "t"},
    "nullable": False,
    "order": 3,
    "xml": {"name": "a"},
    "externalDocs": {"url": "u"},
    "title": "t",
    "$comment": "c",
    "propertyOrdering": ["a"],
    "deprecated": True,
    "readOnly": True,
    "default": {"$ref": "#/nowhere"},
    "$anchor": "a",
    "discriminator": {"propertyName": "k"},
}


@pytest.mark.parametrize("keyword", ANNOTATIONS)
def test_an_annotation_constrains_nothing(keyword: str) -> None:
    schema = {"type": "string", keyword: ANNOTATIONS[keyword]}
    check_limits({"type": "object", "properties": {"a": schema}})
    assert fits(schema, "x") and not fits(schema, 1)


MORE: list[tuple[Any, list[Any], list[Any]]] = [
    ({"dependentRequired": {"a": ["b"]}}, [{}, {"a": 1, "b": 1}], [{"a": 1}]),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{}, {"a": 1, "b": 1}], [{"a": 1}]),
    ({"contains": {"const": 1}, "minContains": 2}, [[1, 1]], [[1], []]),
    ({"properties": {"a": True}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
    ({"prefixItems": [True], "unevaluatedItems": False}, [[1]], [[1, 2]]),
    ({"format": "date"}, ["2024-02-29", 5], ["2023-02-29", "x"]),
    ({"format": "email"}, ["a@b.de"], ["a"]),
    ({"format": "date-time"}, ["2024-01-01T00:00:00Z"], ["yesterday"]),
    ({"format": "made-up"}, ["x"], []),
    ({"pattern": r"^\d$"}, ["1"], ["٣"]),
    ({"pattern": r"^\w$"}, ["a"], ["é"]),
    ({"pattern": r"^\W$"}, ["é"], ["a"]),
    ({"$ref": "#/properties/a/anyOf/1", "properties": {"a": {"anyOf": [True, {"type": "null"}]}}}, [None], [1]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), MORE, ids=str)
def test_more_keywords_are_checked(schema: Any, good: list[Any], bad: list[Any]) -> None:
    check_limits(schema)
    for value in good:
        assert fits(schema, value)
    for value in bad:
        assert not fits(schema, value)


ANY_OF = "#/properties/a/anyOf"


@pytest.mark.parametrize("ref", ["#/$defs/b", f"{ANY_OF}/2", f"{ANY_OF}/-1", f"{ANY_OF}/x", "#/title", ANY_OF])
def test_a_pointer_to_nothing_is_refused(ref: str) -> None:
    with pytest.raises(InvalidRequest, match=r"no target"):
        check_limits({"$ref": ref, "title": "t", "properties": {"a": {"anyOf": [True, {"type": "null"}]}}})


FOO = {"properties": {"a": {"$ref": "#/$defs/Foo"}}}
INVALID: list[tuple[Any, str]] = [
    ({**FOO, "$defs": {"Foo": {"properties": {"x": {"minimum": "1"}}}}}, "schema.$defs.Foo.properties.x.minimum: "),
    ({"$ref": "#/properties/a", "properties": {"a": {"anyOf": [{"maxItems": -1}]}}}, "a.anyOf[0].maxItems: -1 is less"),
    ({"items": {"$ref": "#"}, "required": ["a", "a"]}, "schema.required: "),
    ({"properties": {"a": {"type": "int"}}}, "schema.properties.a.type: 'int'"),
    ({"properties": {"a": {"nullable": True}}}, "schema.properties.a: the keyword 'nullable'"),
    ({"anyOf": [{}, {"pattern": "("}]}, "schema.anyOf[1].pattern: invalid"),
    ({"patternProperties": {"(": True}}, "schema.patternProperties: invalid"),
    ({"anyOf": [{}, 5]}, "schema.anyOf[1]: not a schema"),
    ({"properties": {"a": {"items": 5}}}, "schema.properties.a.items: not a schema"),
    ({"properties": {"a": {"enum": [1], "anyOf": {}}}}, "schema.properties.a.anyOf: not a valid value"),
    ({**FOO, "$defs": {"Foo": {"items": {"$ref": "x"}}}}, "schema.$defs.Foo.items: its $ref leads out"),
    (FOO, "schema.properties.a: $ref '#/$defs/Foo' has no target"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "schema.properties.a: a $ref leads only to itself"),
    ({"$defs": {"A": {"$id": "x"}}}, "schema.$defs.A: an $id"),
    ({"default": [{"minLength": 2, "maxLength": 1}]}, "schema.default[0]: its minLength"),
]


@pytest.mark.parametrize(("schema", "message"), INVALID, ids=range(len(INVALID)))
def test_a_refusal_names_the_callers_place(schema: Any, message: str) -> None:
    with pytest.raises((InvalidRequest, UnsupportedFeature)) as caught:
        check_limits(schema)
    assert message in str(caught.value)


MISFITS: list[tuple[Any, Any, str]] = [
    (
        {"properties": {"a": {"items": {"type": "integer"}}}},
        {"a": [1, "x"]},
        '$.a[1]: does not fit {"type": "integer"}',
    ),
    ({"required": ["city"]}, {}, "$: 'city' is missing"),
    ({"properties": {"a": True}, "additionalProperties": False}, {"b": 1}, "$.b: nothing is allowed here"),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"v": 1, "next": {"v": 1, "next": {"v": "x"}}},
        '$.next.next.v: does not fit {"type": "integer"}',
    ),
    (
        {"properties": {"a": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}}},
        {"a": "abc"},
        '$.a: does not fit {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}',
    ),
    (
        {"items": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}, "$defs": {"A": STRING, "B": NUMBER}},
        [None],
        '$[0]: does not fit {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}',
    ),
    ({"allOf": [{"required": ["a"]}]}, {}, "$: 'a' is missing"),
    ({"properties": {"a": False}}, {"a": 1}, "$.a: nothing is allowed here"),
]


@pytest.mark.parametrize(("schema", "value", "message"), MISFITS, ids=range(len(MISFITS)))
def test_the_place_of_a_misfit_is_named(schema: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SchemaCheck(schema)(value)
    assert str(caught.value) == message


def test_a_misfit_never_repeats_a_long_input() -> None:
    with pytest.raises(ValueError) as caught:
        SchemaCheck({"enum": ["y" * 9000], "properties": {"x" * 9000: {"maxLength": 1}}})({"x" * 9000: "z" * 9000})
    assert len(str(caught.value)) <= 500


# Types and texts ---------------------------------------------------------------------------------
class Color(enum.Enum):
    RED = "red"
    TWO = 2


def test_an_enum_class_is_a_type() -> None:
    schema, adapter = normalize_schema(Color)
    assert schema["enum"] == ["red", 2] and adapter is not None and adapter.validate_python("red") is Color.RED


def test_a_text_is_never_evaluated(tmp_path: Any) -> None:
    flag = tmp_path / "F"
    text = f"__import__('os').system('touch {flag}')"
    json_values: list[Any] = [text, [text], {"a": text}, {"a": [text]}, {"type": text}, {"$ref": text}]
    json_values.append({"properties": {"a": {"type": text}}})
    types: list[Any] = [(text,), text.encode(), ForwardRef(text)]
    types += [list[text], Optional[text], dict[str, list[text]]]  # type: ignore[valid-type]  # noqa: UP045
    for schema in json_values + types:
        with pytest.raises((InvalidRequest, UnsupportedFeature)):
            checked_schema(schema)
    assert not flag.exists()


WORDS = [("strng", "string"), ("int", "integer"), ("Boolean", "boolean"), ("float", "number"), ("list", "array")]


@pytest.mark.parametrize(("word", "near"), WORDS)
def test_a_wrong_type_word_gets_a_suggestion(word: str, near: str) -> None:
    for schema in ({"a": word}, {"a": [word]}, {"type": "object", "properties": {"a": {"type": word}}}):
        with pytest.raises(InvalidRequest) as caught:
            checked_schema(schema)
        assert word in str(caught.value) and f'"{near}"' in str(caught.value)


# Recursion ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [4, 12])
def test_mutually_recursive_classes_pass(count: int) -> None:
    defs: dict[str, Any] = {"L": {"type": "string"}}
    for number in range(count):
        any_node = {"anyOf": [{"$ref": f"#/$defs/N{k}"} for k in range(count)]}
        defs[f"N{number}"] = obj(left=any_node, right=any_node, leaf={"$ref": "#/$defs/L"})
    schema = {"$ref": "#/$defs/N0", "$defs": defs}
    tree: Any = {"leaf": "x"}
    for _ in range(30):
        tree = {"left": tree, "right": {"leaf": "x"}, "leaf": "x"}
    with bounded_cpu():
        check_limits(schema)
        fits(schema, tree)
        llamacpp_schema(schema)


TWICE: list[Any] = [
    {"allOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}}]},
    {"anyOf": [{"items": {"$ref": "#"}, "minItems": 1}, {"items": {"$ref": "#"}}], "not": {"const": 1}},
]


def test_a_check_is_bounded_by_a_budget_of_steps() -> None:
    schema = {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"items": True}}}
    with bounded_cpu(), pytest.raises(ValueError, match="steps"):
        SchemaCheck(schema)([[[1]] * 2000] * 600)


def test_every_keyword_that_is_let_in_is_tested() -> None:
    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node) | {key for value in node.values() for key in keys(value)}
        return {key for value in node for key in keys(value)} if isinstance(node, list) else set()

    assert keys([schema for schema, _, _ in TABLE + MORE]) >= set(llm_inference._KEYWORDS) - {"maxContains"}


@pytest.mark.parametrize("schema", TWICE)
def test_a_recursive_check_has_a_budget(schema: Any) -> None:
    with bounded_cpu():
        check_limits(schema)
        fits(schema, deep(190, lambda v: [v]))


# Without jsonschema-rs ---------------------------------------------------------------------------
PLAIN = {"type", "properties", "required", "additionalProperties", "items", "enum", "const"}


def is_plain(schema: Any) -> bool:
    text = json.dumps(schema)
    scalars = not any(isinstance(value, (list, dict)) for value in schema.get("enum", ()))
    return set(schema) <= PLAIN and scalars and "minimum" not in text and "pattern" not in text


SIMPLE = [cell for cell in CELLS if isinstance(cell[0], dict) and is_plain(cell[0])]


@pytest.mark.parametrize(("schema", "value", "good"), SIMPLE, ids=lambda v: str(v)[:40])
def test_simple_schemas_are_checked_without_jsonschema_rs(
    schema: Any, value: Any, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    check_limits(schema)
    assert fits(schema, value) is good


@pytest.mark.parametrize(
    ("wanted", "value", "good"),
    [
        ([1], [1.0], True),
        ({"a": {"b": [2.0]}}, {"a": {"b": [2]}}, True),
        ([1], [True], False),
        ([0, "1"], [0, 1], False),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        ("1.0", "1", False),
    ],
    ids=str,
)
def test_equal_json_values_are_equal_at_every_depth(
    wanted: Any, value: Any, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for schema in ({"const": wanted}, {"enum": ["other", wanted]}):
        assert fits(schema, value) is good
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    for schema in ({"const": wanted}, {"enum": ["other", wanted]}):
        assert fits(schema, value) is good


def test_other_schemas_name_the_package_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    schema, _ = normalize_schema({"city": "string", "tags": ["string"], "at": {"lat": "number"}})
    assert fits(schema, {"city": "x", "tags": ["a"], "at": {"lat": 1}})
    with pytest.raises(ValueError, match=r"\$\.tags\[0\]"):
        SchemaCheck(schema)({"city": "x", "tags": [1], "at": {"lat": 1}})
    beyond: list[Any] = [{"pattern": "a"}, {"type": "integer", "minimum": 1}, {"anyOf": [{"type": "string"}]}]
    for schema in beyond:
        with pytest.raises(UnsupportedFeature, match="jsonschema-rs"):
            check_limits(schema)
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/n"}}}
    nested_ref = {"$ref": "#/$defs/n", "$defs": {"n": {**node, "required": ["v"]}}}
    check_limits(nested_ref)
    assert fits(nested_ref, {"v": 1, "next": {"v": 2}}) and not fits(nested_ref, {"v": 1, "next": {}})


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ({"$ref": 5}, r"\$ref"),
        ({"properties": [1]}, "properties"),
        ({"required": False}, "required"),
        ({"required": [1]}, "required"),
        ({"required": [{}]}, "required"),
        ({"enum": "a"}, "enum"),
        ({"items": [{"type": "string"}]}, "items"),
        ({"additionalProperties": 1}, "not a schema"),
        ({"minLength": "1"}, "minLength"),
        ({"maxItems": {}}, "maxItems"),
    ],
    ids=str,
)
@pytest.mark.parametrize("inside", [False, True])
def test_an_invalid_value_of_a_keyword_is_refused_without_jsonschema_rs(
    part: dict[str, Any], key: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    schema = {"type": "object", "properties": {"a": part}} if inside else part
    with pytest.raises(InferenceError, match=key) as refused:
        check_limits(schema)
    assert refused.value.code == 400


CIRCLES: list[Any] = [
    {"$ref": "#"},
    {"properties": {"a": {"$ref": "#/properties/a"}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/%61"}}},
    {
        "allOf": [{"$ref": "#/$defs/a"}],
        "$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
]


@pytest.mark.parametrize("schema", CIRCLES, ids=range(len(CIRCLES)))
@pytest.mark.parametrize("library", [True, False])
def test_a_circle_of_references_alone_is_refused(schema: Any, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    with pytest.raises(InvalidRequest, match="leads only to itself"):
        check_limits(schema)
    check_tool_schema(schema)
    check = SchemaCheck(schema)  # of a tool that is merely offered: it ends
    for value in (1, [1], {"a": 1}):
        passes(check, value)


def test_a_check_without_jsonschema_rs_has_a_budget_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    schema = {"$ref": "#/$defs/a", "items": {"$ref": "#"}, "$defs": {"a": {"items": {"$ref": "#"}}}}
    check_limits(schema)
    with bounded_cpu(), pytest.raises(ValueError, match="too many steps"):
        SchemaCheck(schema)(deep(190, lambda v: [v]))


# Tools that are only offered ---------------------------------------------------------------------
OFFERED: list[dict[str, Any]] = [
    {"nullable": True},
    {"pattern": "^(?=.*a)(?!b).*$"},
    {"contains": {"type": "string"}},
    {"unevaluatedProperties": {}},
    {"madeUp": {"a": 1}},
    {"items": [{"type": "string"}]},
    {"dependencies": {"a": ["b"]}},
    {"$dynamicRef": "#a"},
    {"enumNames": ["a"]},
    {"contentMediaType": "x"},
    {"minLenght": 4},
    {"pattern": "("},
    {"exclusiveMinimum": True, "minimum": 1},
    {"enum": [], "required": True},
]


@pytest.mark.parametrize("part", OFFERED, ids=str)
def test_a_tool_that_is_only_offered_is_passed_on(part: dict[str, Any]) -> None:
    check_tool_schema({"type": "object", "properties": {"a": {"description": "d", **part}}})


HOSTILE_TOOLS: list[Any] = [
    {"$ref": "http://127.0.0.1:9/x"},
    ladder(28),
    nested(200),
    {"type": "wrong"},
    {"properties": 5},
    {"a": {"$ref": "file:///etc/passwd"}},
    {"description": "x" * 70_000},
]


@pytest.mark.parametrize("parameters", HOSTILE_TOOLS, ids=range(len(HOSTILE_TOOLS)))
def test_an_offered_tools_schema_is_as_hostile_as_any(parameters: Any) -> None:
    with bounded_cpu(), pytest.raises((InvalidRequest, UnsupportedFeature)):
        check_tool_schema(parameters)


# Regular expressions -----------------------------------------------------------------------------
REWRITTEN: list[tuple[str, list[str], list[str]]] = [
    (r"^\d{3}$", ["123"], ["12", "1234", "٣٣٣", ""]),
    (r"\d", ["a1b", "1"], ["", "a"]),
    (r"^a|b$", ["ax", "xb"], ["xa", "bx"]),
    (r"\/", ["a/b"], ["ab"]),
    (r"^[\w.-]+@x$", ["a.b-c@x"], ["é@x", "@x"]),
    (r"^[^\d\s]$", ["a", "é"], ["1", " ", ""]),
    (r"^\S+$", ["中文"], ["a b", "a\u00a0b"]),
    (r"^.$", ["a", "🚲", '"'], ["", "\n"]),
    (r"^(?:ab)+?$", ["abab"], ["aba"]),
    (r"^(?P<y>\d)$", ["1"], ["a"]),
    (r'^["\\]$', ['"', "\\"], ["a"]),
    (r"^\u4e2d\x41$", ["中A"], ["A"]),
    ("", ["", "x"], []),
    (r"^$", [""], ["x"]),
    (r"^[+-]?\d+(\.\d+)?$", ["-1.5", "2"], ["1.", "+"]),
    (r"^a{2,}$", ["aaa"], ["a"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), REWRITTEN, ids=[row[0] for row in REWRITTEN])
def test_a_regex_is_rewritten_exactly(pattern: str, good: list[str], bad: list[str]) -> None:
    for text in good + bad:
        expected = text in good
        assert matcher(pattern)(text) is expected
        assert fits({"pattern": pattern}, text) is expected
        assert allowed_by_llamacpp(pattern, text) is expected


@functools.cache
def sent_to_llamacpp(pattern: str) -> str:
    sent, exact = llamacpp_schema({"type": "string", "pattern": pattern})
    assert exact and sent["pattern"][0] == "^" and sent["pattern"][-1] == "$"
    return sent["pattern"][1:-1]


def allowed_by_llamacpp(pattern: str, text: str) -> bool:
    """Whether the pattern that llama.cpp is sent, which speaks of a JSON string's inside, matches."""
    return re.fullmatch(sent_to_llamacpp(pattern), json.dumps(text, ensure_ascii=False)[1:-1]) is not None


NOT_PORTABLE = [
    r"\bfoo\b",
    r"(?=a)b",
    r"(a)\1",
    r"\p{L}",
    r"(?i)a",
    r"a^b",
    r"(^a|b)",
    r"[a&&b]",
    r"[[a]]",
    "(",
    ")",
    "a)(b",
    "[",
    r"\A",
    r"a{3000}",
    "*",
    "a**",
    r"[z-a]",
    r"\<",
    r"(a|)*",
    "\\",
    r"[^]",
    "[]",
    r"[^\x00-\u{10FFFF}]",
]


@pytest.mark.parametrize("pattern", NOT_PORTABLE)
def test_what_cannot_be_rewritten_exactly_is_not(pattern: str) -> None:
    assert not llamacpp_schema({"type": "string", "pattern": pattern})[1]
    with pytest.raises(UnsupportedFeature, match="regex"):
        llamacpp_regex(pattern)


ATOMS = [
    "a", "b", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", ".", "[ab]", "[^a]", r"[\d-]", r"[^\w\s]", r"\.", r"\/", "é",
    "中", " ", '"', r"\\", "(?:a|b)", "(ab)", "-", r"[\x20-\x7e]",
]  # fmt: skip
TEXTS = ["", "a", "b", "ab", "ba", "aab", "1", "a1", "é", "中a", " ", "a b", '"', "\\", "/", ".", "a-1", "\n", "٣"]


def test_the_rewritten_regex_agrees_with_the_check() -> None:
    """1000 random regexes on random texts: what the grammar allows is just what the check lets through."""
    rng = random.Random(7)
    for _ in range(1000):
        body = ""
        for _ in range(rng.randrange(1, 4)):
            body += rng.choice(ATOMS) + rng.choice(["", "", "*", "+", "?", "{1,2}", "*?"])
        pattern = rng.choice(["", "^"]) + body + rng.choice(["", "$", "|" + rng.choice(ATOMS), "$|^b"])
        original = SchemaCheck({"pattern": pattern})
        for text in TEXTS:
            found = [passes(original, text), allowed_by_llamacpp(pattern, text), matcher(pattern)(text)]
            assert len(set(found)) == 1, (pattern, text, found)


def passes(check: SchemaCheck, value: Any) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


WHOLE = [
    ("[0-9]{3}", "123", "1234"), ("a|b", "b", "ab"), (".*", "x", "x\ny"), ("(?i)yes", "YES", "no"), ("^a$", "a", "aa"),
    (r"\d", "1", "٣"), (r"^\bx$", "x", "y"), ("a" * 4096, "a" * 4096, "a"),
]  # fmt: skip


@pytest.mark.parametrize(("regex", "good", "bad"), WHOLE, ids=range(len(WHOLE)))
def test_a_regex_matches_the_whole_text(regex: str, good: str, bad: str) -> None:
    check = full_matcher(regex)
    assert check(good)
    for text in (bad, good + "\n", "\n" + good):
        assert not check(text)


HIDDEN = [
    "[ab]*a[ab]{0000000019000}c",
    "[ab]*a[ab]{ 19000 }c",
    "(?x)[ab]*a[ab]{ #\n 19000}c",
    "(?ix) a",
    "(a{5000}){,2}",
]


@pytest.mark.parametrize("pattern", HIDDEN)
def test_a_count_cannot_be_hidden(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="pattern"):
        matcher(pattern)


@pytest.mark.parametrize("regex", ["a)|(?:b", "a)(b", "a|b)c("])
def test_a_regex_is_one_without_our_brackets(regex: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid regular expression"):
        full_matcher(regex)


# What llama.cpp enforces -------------------------------------------------------------------------
def closed(schema: Any) -> Any:
    """What llama.cpp makes of a schema, said in JSON Schema: no other properties, tuples of just their items."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            found[key] = {name: closed(part) for name, part in value.items()}
        else:
            found[key] = value if key in ("enum", "const", "required") else closed(value)
    if "properties" in schema:
        found.setdefault("additionalProperties", False)
    if "prefixItems" in schema:
        found |= {"items": False, "minItems": len(schema["prefixItems"])}
    return found


LLAMACPP_KEYWORDS = set(
    "type properties required additionalProperties items prefixItems minItems maxItems pattern format minLength "
    "maxLength minimum maximum enum anyOf $ref $defs".split()
)


def test_what_is_called_enforced_is() -> None:
    """2000 random schemas: a value that the schema for llama.cpp lets through fits the caller's where it says so."""
    reference = pytest.importorskip("jsonschema").Draft202012Validator
    rng, enforced, wrong = random.Random(11), 0, []
    for _ in range(2000):
        schema = some_schema(rng)
        if isinstance(schema, bool):
            continue
        sent, exact = llamacpp_schema(schema)
        assert set(sent) <= LLAMACPP_KEYWORDS
        enforced += exact
        for _ in range(12 * exact):
            value = some_value(rng)
            if reference(closed(sent)).is_valid(value) and not reference(schema).is_valid(value):
                wrong.append((schema, sent, value))
    assert enforced > 200 and not wrong, f"{len(wrong)} of {enforced}: {wrong[:3]}"


def test_constants_beside_patterns_cost_little() -> None:
    schema = {"anyOf": [{"const": n, "pattern": r"^\p{L}{160}$"} for n in range(100)]}
    check_limits(schema)
    with bounded_cpu():
        llamacpp_schema(schema)


# Real-world schemas ------------------------------------------------------------------------------
class Money(BaseModel):
    amount: Decimal = Field(max_digits=8, decimal_places=2)
    currency: Literal["EUR", "USD"]


class Address(BaseModel):
    street: str = Field(min_length=1, max_length=80)
    zip_code: str = Field(alias="zipCode", pattern=r"^\d{5}$")
    country: Literal["DE", "FR"] = "DE"


class Customer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: uuid.UUID
    name: Annotated[str, Field(min_length=1)]
    born: datetime.date | None = None
    joined: datetime.datetime
    address: Address
    tags: set[str] = set()
    limits: dict[str, Money] = {}


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    barks: bool


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Cat | Dog] = Field(default=[], max_length=5)


class Tree(BaseModel):
    value: int
    left: "Tree | None" = None
    right: "Tree | None" = None


class Forest(BaseModel):
    trees: list[Tree]
    by_name: dict[str, Tree]


class Add(BaseModel):
    op: Literal["add"] = "add"
    left: "Expr"
    right: "Expr"


class Neg(BaseModel):
    op: Literal["neg"] = "neg"
    value: "Expr"


class Num(BaseModel):
    op: Literal["num"] = "num"
    value: float


Expr = Add | Neg | Num
Add.model_rebuild()
Neg.model_rebuild()


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: float
    y: float


class Plain:
    """Pydantic knows no schema of it; and of `typing.TypedDict` only from Python 3.12 on."""


class Silent:
    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        raise RuntimeError


@pytest.mark.parametrize(("kind", "why"), [(Plain, "Unable to generate .*Plain"), (Silent, "RuntimeError")])
def test_a_type_without_a_schema_is_refused_in_pydantics_words(kind: Any, why: str) -> None:
    def tool(what: Any) -> None: ...

    tool.__annotations__["what"] = kind
    with pytest.raises(llm_inference.InvalidRequest, match=rf"this type \({why}.*\); give a dict"):
        llm_inference.normalize_schema(kind)
    with pytest.raises(llm_inference.InvalidRequest, match=rf"parameters of tool \({why}.*\); annotate"):
        llm_inference.tool_from(tool)


class Movie(TypedDict, total=False):
    title: Required[str]
    year: int


@dataclasses.dataclass
class Part:
    name: str
    sizes: tuple[int, int, int]
    parent: Optional["Part"] = None


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    items: list[Item]
    next_page: int | None = None


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Everything(BaseModel):
    price: Decimal
    ratio: Annotated[float, Field(gt=0, lt=1)]
    step: Annotated[int, Field(multiple_of=5)]
    url: AnyUrl
    when: datetime.time
    span: datetime.timedelta
    raw: bytes
    any: Any
    maybe: bool | None
    level: Level
    color: Color
    point: Point
    movie: Movie
    part: Part
    path: pathlib.Path
    ip: ipaddress.IPv4Address
    mail: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+\.[a-z]{2,}$")]
    secret: SecretStr
    frozen: frozenset[int]
    counts: dict[Literal["a", "b"], int]
    keyed: dict[Annotated[str, Field(pattern="^[a-z]+$")], int]
    nested: list[list[list[int]]]
    const: Literal[1, "one", True, None]


TYPES_OF_PYTHON: list[Any] = [
    Money,
    Address,
    Customer,
    Cat,
    Owner,
    Tree,
    Forest,
    Add,
    Neg,
    Num,
    Expr,
    Level,
    Color,
    Point,
    Movie,
    Part,
    Page[int],
    Page[Customer],
    Page[Page[str]],
    Loose,
    Everything,
    list[Customer],
    dict[str, Tree],
    tuple[int, ...],
    tuple[int, str],
    set[Level],
    int | None,
    Literal["x", "y"],
    bool,
    str,
    float,
    Decimal,
    datetime.date,
    datetime.datetime,
    uuid.UUID,
    Any,
    list[dict[str, list[int | str | None]]],
    Annotated[str, Field(max_length=3)],
    Annotated[list[int], Field(min_length=2)],
    Annotated[int, Field(gt=0)],
    Annotated[Decimal, Field(gt=0, max_digits=5, decimal_places=2)],
    frozenset[str],
]


def tool(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required or []}


TEXT, COUNT = {"type": "string", "description": "d"}, {"type": "integer", "default": 10, "minimum": 1, "maximum": 100}
TOOLS: list[dict[str, Any]] = [
    tool(["path"], path=TEXT),
    tool(["path", "edits"], path=TEXT, edits={"type": "array", "items": tool(["oldText"], oldText=TEXT, newText=TEXT)}),
    {**tool(["query"], query=TEXT, limit=COUNT), "$schema": "http://json-schema.org/draft-07/schema#"},
    {**tool(["url"], url={"type": "string", "format": "uri", "minLength": 1}), "additionalProperties": False},
    tool(
        ["owner", "repo"],
        owner=TEXT,
        repo=TEXT,
        state={"enum": ["open", "closed"], "type": "string"},
        page={"type": "number"},
    ),
    tool(
        labels={"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        assignees={"type": ["array", "null"], "items": TEXT},
    ),
    tool(filter={"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Filter"}),
    {"type": "object"},
    {"type": "object", "properties": {}},
    {
        "type": "object",
        "properties": {},
        "additionalProperties": {"not": {}},
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    },
    tool(
        when={"type": "string", "format": "date-time", "x-order": 1},
        zone={"type": "string", "example": "Europe/Berlin"},
    ),
    tool(
        ["entities"],
        entities={
            "type": "array",
            "items": tool(["name", "observations"], name=TEXT, observations={"type": "array", "items": TEXT}),
        },
    ),
    tool(coordinates={"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
    tool(op={"oneOf": [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}], "type": "string"}),
    tool(
        value={"oneOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]},
        meta={"type": "object", "additionalProperties": True},
    ),
    {
        **tool(node={"$ref": "#/definitions/node"}),
        "definitions": {
            "node": tool(["id"], id=TEXT, children={"type": "array", "items": {"$ref": "#/definitions/node"}})
        },
    },
    {**tool(a=TEXT, b=TEXT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {
        **tool(["kind"], kind=TEXT, size=COUNT),
        "if": {"properties": {"kind": {"const": "box"}}},
        "then": {"required": ["size"]},
    },
    tool(headers={"type": "object", "additionalProperties": TEXT, "propertyNames": {"pattern": "^[A-Za-z-]+$"}}),
    tool(env={"type": "object", "patternProperties": {"^[A-Z_]+$": {"type": "string"}}, "additionalProperties": False}),
    {"allOf": [{"$ref": "#/$defs/base"}, tool(["extra"], extra=TEXT)], "$defs": {"base": tool(["id"], id=TEXT)}},
    tool(thoughtNumber={"type": "integer", "minimum": 1}, nextThoughtNeeded={"type": "boolean"}, branchId=TEXT),
    tool(lat={"type": "number", "minimum": -90, "maximum": 90}, lon={"type": "number", "exclusiveMinimum": -180}),
    tool(
        html={"type": "string", "contentMediaType": "text/html", "contentEncoding": "utf-8"},
        rank={"type": "integer", "format": "int32"},
    ),
]


@pytest.mark.parametrize("kind", TYPES_OF_PYTHON, ids=lambda kind: str(getattr(kind, "__name__", kind))[:40])
def test_a_python_type_passes_both_ways(kind: Any) -> None:
    """As a type, and as the JSON Schema that Pydantic makes of it."""
    schema, adapter = normalize_schema(kind)
    assert adapter is not None
    check_tool_schema(schema)
    llamacpp_schema(schema)
    if schema:
        assert normalize_schema(schema) == (schema, None)


@pytest.mark.parametrize("schema", TOOLS, ids=range(len(TOOLS)))
def test_a_tools_schema_passes(schema: dict[str, Any]) -> None:
    check_tool_schema(schema)
    check_limits(schema)
    assert normalize_schema(schema) == (schema, None)
    llamacpp_schema(schema)


@pytest.mark.parametrize(
    ("name", "enforced"), [("date", False), ("date-time", False), ("time", True), ("uuid", True), ("email", False)]
)
def test_a_format_is_called_enforced_only_where_the_grammar_has_no_other_text(name: str, enforced: bool) -> None:
    """llama.cpp's rule for a date has days 01 to 31 in every month, which the check refuses."""
    assert llamacpp_schema({"type": "string", "format": name})[1] is enforced
    assert not fits({"type": "string", "format": "date"}, "2024-02-31")


EXACT: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]},
    {"type": "string", "pattern": "^a$"},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1]}}},
    {"type": "object", "properties": {"format": {"type": "string"}, "not": {"type": "null"}}},
]
LEFT_OUT: list[Any] = [
    {"type": "number", "multipleOf": 0.01},
    {"type": "string", "pattern": "^[A-Z]+$", "minLength": 4},
    {"type": "string", "format": "uri"},
    {"allOf": [{"type": "integer"}]},
    {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
    {"type": "object", "minProperties": 2},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "uniqueItems": True}}},
]


@pytest.mark.parametrize("schema", EXACT + LEFT_OUT, ids=json.dumps)
@pytest.mark.parametrize("dialect", ["vllm", "sglang", "ollama"])
def test_what_a_grammar_leaves_out_is_called_checked(schema: Any, dialect: Any) -> None:
    """vLLM 0.32 wrote 1.111111 to a multipleOf of 0.01, "C" to a pattern with a minLength, and text to an allOf."""
    values = [{"a": 1}, "a", "b", None, 1, 0.01, "ABCD", "http://a/b", {"a": 1, "b": 2}, [], {}]
    value = next(value for value in values if fits(schema, value))
    with FakeEngine(dialect) as engine, LLMInferencer(dialect, base_url=engine.base_url) as llm:
        engine.answer = lambda asked: json.dumps(value)
        exact = schema in EXACT and not (dialect == "ollama" and "pattern" in schema)
        assert llm.complete("x", schema=schema).enforced_by == ("engine" if exact else "checked")


DECIMALS: list[tuple[Any, list[Any], list[Any]]] = [
    (Annotated[Decimal, Field(max_digits=8, decimal_places=2)], [1.5, "12.50", 0.07], ["much", 1.234, "1.234", 10**7]),
    (Decimal, [1.5, "12", "-0.001"], ["much", "1.2.3", ""]),
    (Annotated[Decimal, Field(ge=34, le=43, decimal_places=1)], [36.6], [50, 36.66, "36.6"]),
    (Annotated[Decimal, Field(decimal_places=0)], [3, "12"], [1.5, "1.5"]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), DECIMALS, ids=range(len(DECIMALS)))
def test_a_decimal_is_no_other_text(kind: Any, good: list[Any], bad: list[Any]) -> None:
    schema, adapter = normalize_schema(kind)
    assert adapter is not None
    for value in good:
        assert fits(schema, value), value
        adapter.validate_json(json.dumps(value))
    for value in bad:
        assert not fits(schema, value), value


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ({"type": "array", "items": [{"type": "string"}]}, "use prefixItems"),
        ({"type": "string", "nullable": True}, 'add "null" to its type'),
        ({"dependencies": {"a": ["b"]}}, "dependentRequired"),
    ],
)
def test_an_older_keyword_is_told_its_newer_one(part: Any, hint: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        checked_schema({"type": "object", "properties": {"a": part}})
    assert hint in caught.value.hint


@pytest.mark.parametrize("constraint", [{"schema": {"type": "string", "pattern": r"^\p{Lu}+$"}}, {"regex": r"\p{Lu}"}])
def test_what_vllm_answers_500_to_is_refused(constraint: Any) -> None:
    """vLLM 0.32: its grammar compilers know no classes of Unicode, and the server answers 500."""
    with FakeEngine("vllm") as engine, LLMInferencer("vllm", base_url=engine.base_url) as llm:
        engine.answer = lambda asked: '"Ä"'
        with pytest.raises(UnsupportedFeature, match=r"pattern.*\\p"):
            llm.complete("x", **constraint)
        assert not engine.bodies
