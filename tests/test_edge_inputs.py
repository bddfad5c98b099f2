"""Inputs at the edge of what is allowed: each is refused by name before anything is sent, or answered rightly."""

import functools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from llm_inference import (
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    StructuredOutputInvalid,
    UnsupportedFeature,
    load_settings,
)
from tests.fake_engine import DIALECTS, Dialect, FakeEngine
from tests.harness import Stand, refused_v1

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "Hi"}


def field(**schema: Any) -> Json:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}


def tool(**schema: Any) -> Json:
    return {"type": "function", "function": {"name": "f", "parameters": field(**schema)}}


def refused_unsent(dialect: Dialect, **options: Any) -> InvalidRequest:
    """The refusal of a request that no engine has seen."""
    with FakeEngine(dialect) as engine, LLMInferencer(dialect, base_url=engine.base_url) as llm:
        with pytest.raises(InvalidRequest) as caught:
            llm.complete("x", **options)
        assert not engine.bodies
    return caught.value


# Structured output -------------------------------------------------------------------------------
REVERSED: list[tuple[Json, str]] = [
    ({"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
    ({"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 1}}, "minLength"),
    ({"type": "array", "items": {}, "minItems": 2, "maxItems": 1}, "minItems"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"type": "string", "pattern": '^#"a{3,1}$'}, "pattern"),
]


@pytest.mark.parametrize(("schema", "named"), REVERSED, ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_bounds_that_nothing_fits_are_refused(schema: Json, named: str, dialect: Dialect) -> None:
    """llama.cpp repeats `char{3,1}` until the memory is full: every later request fails, then the engine ends."""
    for options in ({"schema": field(**schema)}, {"tools": [tool(**schema)]}):
        assert named in refused_unsent(dialect, **options).reason


@pytest.mark.parametrize("grammar", ['root ::= "a"{3,1}', 'root ::= "\\"" ("a" # "\n){ 3 ,\n1 }'])
def test_a_reversed_count_in_a_grammar_is_refused(grammar: str) -> None:
    assert refused_unsent("llamacpp", grammar=grammar).reason == "grammar: the count {3,1}"


@pytest.mark.parametrize("grammar", ['root ::= "{3,1}" [{3,1}] # {3,1}\n', 'root ::= "a"{1,3} "b"{2,2}'])
def test_a_count_in_a_literal_is_none(grammar: str) -> None:
    with FakeEngine("llamacpp") as engine, LLMInferencer("llamacpp", base_url=engine.base_url) as llm:
        assert llm.complete("x", grammar=grammar).text
        assert engine.body["grammar"] == grammar


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= ([a-z]? [a-z]?){0,500}",
        "root ::= ([a-z]{0,40}){0,40}",
        'root ::= a{2,9}\na ::= b\nb ::= "x"*',
        'root ::= ("" | "a"){3}',
        "\n".join(["root ::= r0{2}", *(f"r{number} ::= r{number + 1}" for number in range(900)), 'r900 ::= ""']),
    ],
)
def test_a_grammar_that_repeats_what_may_be_empty_is_refused(grammar: str) -> None:
    """37 characters would stop the embedded engine for all callers."""
    with FakeEngine("llamacpp") as engine, LLMInferencer("llamacpp", base_url=engine.base_url) as llm:
        with pytest.raises(UnsupportedFeature, match="may be empty"):
            llm.complete("x", grammar=grammar)
        assert not engine.bodies


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= ("a"? "b"){0,500}',
        'root ::= ("a" "b")? | "c"*',
        'root ::= ("x{0,3}?"){0,5}',
        '# c (a?){0,4}\nroot ::= "a"{3}',
        'root ::= (\n  "a" |\n  "b"\n){2,5}',
        'root ::= (expr "=" term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" expr ")"',
    ],
)
def test_other_repetitions_in_a_grammar_pass(grammar: str) -> None:
    with FakeEngine("llamacpp") as engine, LLMInferencer("llamacpp", base_url=engine.base_url) as llm:
        assert llm.complete("x", grammar=grammar).text
        assert engine.body["grammar"] == grammar


def test_a_grammar_that_is_nested_too_deeply_is_refused() -> None:
    """Whatever Python's own limit is: others in the process may have raised it."""
    limit = sys.getrecursionlimit()
    for depth in (300, 30_000):
        assert "nested too deeply" in refused_unsent("llamacpp", grammar="root ::= " + "(" * depth).reason
    sys.setrecursionlimit(50_000)
    try:
        assert "nested too deeply" in refused_unsent("llamacpp", grammar="root ::= " + "(" * 30_000).reason
    finally:
        sys.setrecursionlimit(limit)


def test_no_integer_between_two_bounds_is_refused() -> None:
    """llama.cpp answers 500: Unexpected empty grammar stack."""
    refused_unsent("llamacpp", schema=field(type="integer", exclusiveMinimum=1, exclusiveMaximum=2))


@pytest.mark.parametrize("size", [2.0, 2**31, 2**53 - 1, 10**30])
def test_llamacpp_is_sent_the_sizes_that_it_reads(size: float) -> None:
    """It refuses a float, and what 31 bits do not hold: "Unable to generate parser for this template"."""
    schema = field(type="array", maxItems=size, items={"type": "string", "maxLength": size})
    with FakeEngine("llamacpp") as engine, LLMInferencer("llamacpp", base_url=engine.base_url) as llm:
        engine.answer = lambda asked: '{"a": ["x"]}'
        assert llm.complete("x", schema=schema).enforced_by == "engine"
        answer = engine.body["response_format"]["json_schema"]["schema"]["properties"]["a"]
        llm.complete("x", tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])
        offered = engine.body["tools"][0]["function"]["parameters"]["properties"]["a"]
    for found in (answer, offered):
        sizes = [found.get("maxItems"), found["items"].get("maxLength")]
        assert sizes == ([2, 2] if size == 2.0 else [None, None])
        assert float not in map(type, sizes)


@pytest.mark.parametrize("constraint", [{"choice": ["a\0b"]}, {"regex": "a\\x00b"}], ids=str)
def test_a_character_that_llamacpp_cannot_say_is_refused(constraint: Json) -> None:
    """It answers 500 to U+0000 in a grammar: Unexpected empty grammar stack."""
    with FakeEngine("llamacpp") as engine, LLMInferencer("llamacpp", base_url=engine.base_url) as llm:
        with pytest.raises(UnsupportedFeature, match=r"U\+0000|regex"):
            llm.complete("x", **constraint)
        assert not engine.bodies


class Odd(BaseModel):
    numbers: list[int]

    @field_validator("numbers")
    @classmethod
    def are_odd(cls, value: list[int]) -> list[int]:
        if not all(number % 2 for number in value):
            raise ValueError("no even numbers")
        return value


def test_a_validators_own_words_are_told_without_pydantics() -> None:
    with FakeEngine("vllm") as engine, LLMInferencer("vllm", base_url=engine.base_url) as llm:
        engine.answer = lambda asked: '{"numbers": [2]}'
        with pytest.raises(StructuredOutputInvalid) as caught:
            llm.structured_generate("x", schema=Odd)
    assert caught.value.reason == "the answer does not satisfy its constraint: $.numbers: no even numbers"


# HTTP --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", ["1e400", "-1E+309", "1" * 400 + ".0"])
def test_a_number_that_nobody_can_hold_is_refused(number: str, vllm: Stand) -> None:
    """It became infinity, and null on the way to the engine: dropped in silence."""
    body = f'{{"model": "{vllm.model}", "messages": [{{"role": "user", "content": "x"}}], "length_penalty": {number}}}'
    assert number[:20] in refused_v1(vllm.raw("/v1/chat/completions", body.encode()), "invalid_request")
    assert not vllm.engine.bodies


CALL: Json = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARSED: Json = {**CALL, "function": {**CALL["function"], "parsed_arguments": {}}}
DUMPS: dict[str, Json] = {
    "OpenAI's stream helper": {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]},
    "OpenAI's parse()": {"role": "assistant", "content": "{}", "parsed": {"a": 1}, "refusal": None},
    "parse() without a format": {"role": "assistant", "content": "{}", "parsed": None},
    "parse() with a call": {"role": "assistant", "content": None, "parsed": None, "tool_calls": [PARSED]},
    "no type": {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
    "null": {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": None}}]},
}


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/llm/chat"])
def test_an_answer_that_a_client_dumped_passes(dump: str, path: str, stand: Stand) -> None:
    """They passed on /v1 with vLLM, SGLang and llama.cpp, and were refused by Ollama and on /api: no such field."""
    messages = [USER, DUMPS[dump], {"role": "tool", "tool_call_id": "c", "content": "5"}]
    messages = messages if DUMPS[dump].get("tool_calls") else [*messages[:2], USER]
    model = {"model": stand.model} if path.startswith("/v1") else {}
    reply = stand.client.post(path, json={"messages": messages, **model})
    assert reply.status_code == 200, reply.text
    if path.startswith("/api"):
        sent = stand.engine.body["messages"][1]
        assert "parsed" not in str(sent) and "index" not in str(sent)


@pytest.mark.parametrize(
    "part", [{"type": "refusal", "refusal": "I cannot"}, {"type": "file", "file": {"filename": "a"}}]
)
def test_what_is_no_address_is_not_called_one(part: Json, vllm: Stand) -> None:
    """vLLM knows parts of the type refusal; a file's name is no address."""
    messages = [USER, {"role": "assistant", "content": [part]}, USER]
    assert "address" not in vllm.post("/v1/chat/completions", model=vllm.model, messages=messages).text


# Python ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [float("inf"), float("nan"), -float("inf")])
def test_a_number_that_is_none_is_refused_in_engine_options(number: float) -> None:
    """It was sent on as null."""
    assert "JSON" in refused_unsent("vllm", engine_options={"length_penalty": [number]}).reason


def test_words_like_numbers_pass() -> None:
    with FakeEngine("vllm") as engine, LLMInferencer("vllm", base_url=engine.base_url) as llm:
        assert llm.generate("NaN and Infinity")


def test_the_largest_seed_is_told_exactly() -> None:
    """It said: from -9223372036854775808 to 9223372036854775808, got 9223372036854775808."""
    assert "to 9223372036854775807," in refused_unsent("vllm", seed=2**63).reason


@pytest.mark.parametrize("arguments", [("vllm", 5), (["vllm"],), (None,), ("vllm", b"m")], ids=str)
def test_a_name_that_is_none_is_refused(arguments: Any) -> None:
    """They raised TypeError: unhashable type, or expected str, bytes or os.PathLike object."""
    with pytest.raises(InferenceError, match=r"^(engine_type|model_name): "):
        LLMInferencer(*arguments).close()


@pytest.mark.parametrize("env", [{"A": "a\0b"}, {"A=B": "1"}, {"": "1"}], ids=str)
def test_an_environment_that_cannot_be_is_refused(env: dict[str, str]) -> None:
    """The first request raised ValueError: embedded null byte."""
    with pytest.raises(InvalidRequest, match="launch_env"):
        LLMInferencer("vllm", "m", launch=True, launch_env=env).close()


def echo(text: str, times: int = 1) -> str:
    return text * times


def leaves(text: str) -> str:
    sys.exit(f"usage: {text}")  # as argparse and click do


def interrupted(text: str) -> str:
    raise KeyboardInterrupt(text)


def told_by(function: Any, name: str) -> str:
    """What goes back to the model that called the function."""
    with FakeEngine("vllm") as engine, LLMInferencer("vllm", base_url=engine.base_url) as llm:
        engine.tool_call = (name, {"text": "a"})
        llm.run("x", tools=[function])
        told = str(engine.body["messages"][-1]["content"])
        engine.tool_call = None
        assert llm.generate("x", timeout=5)
    return told


@pytest.mark.parametrize("function", [leaves, interrupted])
def test_a_function_that_exits_does_not_end_the_loop(function: Any) -> None:
    """It ended the module's event loop: this call and every later one of the process waited for ever."""
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(told_by(function, function.__name__)), daemon=True)
    thread.start()
    thread.join(20)
    assert done and done[0].startswith("error: ")


def test_a_partial_is_a_function() -> None:
    """AttributeError: 'functools.partial' object has no attribute '__name__'."""
    assert told_by(functools.partial(echo, times=3), "echo") == "aaa"


@pytest.mark.parametrize("tools", [None, 5, "echo", echo, [5], [{"type": "function"}], [echo, lambda: 1, lambda: 2]])
def test_what_is_no_list_of_functions_is_refused(tools: Any) -> None:
    """TypeError and AttributeError; of two of one name, both were offered and one was called."""
    with pytest.raises(InvalidRequest, match="tools: "):
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").run("x", tools=tools)


@pytest.mark.parametrize("concurrency", [None, "5", 1.5, float("nan"), True])
def test_a_concurrency_that_is_no_integer_is_refused(concurrency: Any) -> None:
    with pytest.raises(InvalidRequest, match="concurrency"):
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").batch(["x"], concurrency=concurrency)


def test_a_type_in_the_short_form_is_named(fake: Any, attach: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        attach(fake("vllm")).structured_generate("x", schema={"city": str})
    assert caught.value.hint == 'write types as text: "string"'


def test_a_model_that_is_no_name_is_refused_by_embed(fake: Any, attach: Any) -> None:
    with pytest.raises(InvalidRequest, match="model_name: not the name of a model"):
        attach(fake("vllm")).embed("x", model_name=5)


# Settings ----------------------------------------------------------------------------------------
WRONG: dict[str, tuple[str, str]] = {
    "5000 brackets": (f"port = {'[' * 5000}{']' * 5000}", "llm.toml"),
    "no key": ('api_key = ""', "api_key (line 1)"),
    "no origin": ('cors_origin = ""', "cors_origin (line 1)"),
    "a password": ('engine = "vllm"\nbase_url = "http://user:secret@h:1"', "a password"),
    "a query": ('engine = "vllm"\nbase_url = "http://h:1/?key=a"', "a query"),
    "an engine beside endpoints": (
        'engine = "ollama"\n[[endpoint]]\nengine = "llamacpp"',
        "engine (line 1): cannot be combined",
    ),
    "a variable": ('[[endpoint]]\nengine = "llamacpp"\nlaunch_env = {"A=B" = "1"}', "launch_env"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_in_a_file_is_told_with_its_place(wrong: str, tmp_path: Path) -> None:
    text, told = WRONG[wrong]
    path = tmp_path / "llm.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load_settings({"config": str(path)}, env={}).inferencer()
    assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("flags", [{"api_key": ""}, {"config": "~nobody-of-that-name/llm.toml"}], ids=str)
def test_a_flag_without_a_value_is_refused(flags: Json) -> None:
    """`--api-key "$UNSET"` served without a key: behind a proxy every caller is loopback, and let in."""
    with pytest.raises(InvalidRequest):
        load_settings(flags, env={})
