"""The adapters: the exact bodies sent to each engine, what is refused before that, and how an engine is found."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

import llm_inference
from llm_inference import (
    BadEngineReply,
    Deadlines,
    EngineNotInstalled,
    EngineOverloaded,
    EngineTimeout,
    EngineUnavailable,
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    ModelNotFound,
    StructuredOutputInvalid,
    UnsupportedFeature,
)
from tests.conftest import Attach
from tests.fake_engine import CHAT, DIALECTS, Dialect, FakeEngine, Reply
from tests.harness import BROKEN, chunks, collect, no_error_stays, until
from tests.processes import free_port

Make = Callable[..., FakeEngine]
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get_time"}}
OPENAI: tuple[Dialect, ...] = ("vllm", "sglang", "llamacpp")
PARSERS = (llm_inference.response_parser(), llm_inference.H11Parser)


def base(dialect: Dialect, *, stream: bool = False) -> dict[str, Any]:
    """The body when no option is given. Complete answers of SGLang and llama.cpp are folded streams."""
    if dialect == "ollama":
        return {
            "model": "m:latest",
            "messages": MESSAGES,
            "stream": stream,
            "truncate": False,
            "shift": False,
            "options": {},
        }
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "m", "messages": MESSAGES, **(streamed if stream or dialect != "vllm" else {})}


def sent(engine: FakeEngine, llm: LLMInferencer, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    llm.complete(prompt, **fields)
    return engine.body


# Each field --------------------------------------------------------------------------------------
PLAIN: dict[str, tuple[Any, Any, Any]] = {  # field: value, what an OpenAI engine gets, what Ollama's options get
    "max_tokens": (7, {"max_tokens": 7}, {"num_predict": 7}),
    "temperature": (0.5, {"temperature": 0.5}, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}, {"top_p": 0.9}),
    "top_k": (40, {"top_k": 40}, {"top_k": 40}),
    "min_p": (0.1, {"min_p": 0.1}, {"min_p": 0.1}),
    "seed": (0, {"seed": 0}, {"seed": 0}),
    "presence_penalty": (-1.5, {"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
    "frequency_penalty": (0, {"frequency_penalty": 0}, {"frequency_penalty": 0}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}, {"repeat_penalty": 1.1}),
    "stop": ("x", {"stop": ["x"]}, {"stop": ["x"]}),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("field", PLAIN)
def test_a_sampling_field_is_sent_under_the_engines_name_and_nothing_else_is(
    dialect: Dialect, field: str, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    engine.flags["enable_deterministic_inference"] = True
    value, openai, options = PLAIN[field]
    expected = base(dialect)
    if dialect == "ollama":
        expected["options"] = options
    elif dialect == "llamacpp" and field == "repetition_penalty":
        expected["repeat_penalty"] = value
    else:
        expected |= openai
    assert sent(engine, attach(engine), **{field: value}) == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fields_that_were_not_given_are_not_sent(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine)
    assert sent(engine, llm) == base(dialect)
    list(llm.stream("hi"))
    assert engine.body == base(dialect, stream=True)
    assert [seen.path for seen in engine.asked] == [CHAT[dialect]] * 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_stop_is_a_list_in_the_order_given(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    body = sent(engine, attach(engine), stop=["b", "a"])
    assert (body["options"] if dialect == "ollama" else body)["stop"] == ["b", "a"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logprobs(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    assert sent(engine, attach(engine), logprobs=True, top_logprobs=3) == base(dialect) | {
        "logprobs": True,
        "top_logprobs": 3,
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_engine_options_are_sent_verbatim_over_everything_else(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    options: dict[str, Any] = (
        {"options": {"num_ctx": 4096, "temperature": 1}, "keep_alive": "1m"}
        if dialect == "ollama"
        else {"ignore_eos": True, "temperature": 1}
    )
    body = sent(engine, attach(engine), temperature=0.5, max_tokens=3, engine_options=options)
    if dialect == "ollama":
        assert body["options"] == {"num_predict": 3, "num_ctx": 4096, "temperature": 1} and body["keep_alive"] == "1m"
    else:
        assert body == base(dialect) | {"max_tokens": 3} | options


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_callers_values_are_not_changed(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    given: dict[str, Any] = {
        "tools": [TOOL],
        "engine_options": {"options": {"num_ctx": 1}} if dialect == "ollama" else {"x": {}},
    }
    before, messages = json.dumps(given), [*MESSAGES, {"role": "assistant", "content": "ok"}, *MESSAGES]
    for _ in range(2):
        attach(engine).complete(messages, temperature=0, **given)
    assert json.dumps(given) == before and len(messages) == 3


# Constraints -------------------------------------------------------------------------------------
def schema_form(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    }


NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}  # or the answer could be lost in the reasoning
# engine, version, asked, sent, an answer that fits
CONSTRAINED: list[tuple[Dialect, str, dict[str, Any], dict[str, Any], str]] = [
    *((d, "", {"schema": SCHEMA}, schema_form(SCHEMA) | NO_THINKING, '{"a": "x"}') for d in OPENAI),
    *((d, "", {"schema": {}}, {"response_format": {"type": "json_object"}} | NO_THINKING, "{}") for d in OPENAI),
    *(
        ("vllm", v, {"choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}} | NO_THINKING, "a")
        for v in ("0.26.0", "0.32.0", "0.32.0+cpu")
    ),
    ("vllm", "0.32.0", {"regex": "[ab]"}, {"structured_outputs": {"regex": "[ab]"}} | NO_THINKING, "a"),
    (
        "vllm",
        "0.32.0",
        {"grammar": 'root ::= "a"'},
        {"structured_outputs": {"grammar": 'root ::= "a"'}} | NO_THINKING,
        "a",
    ),
    ("sglang", "", {"choice": ["a.b", "c|d"]}, {"regex": r"(a\.b|c\|d)"} | NO_THINKING, "a.b"),
    ("sglang", "", {"regex": "[ab]"}, {"regex": "[ab]"} | NO_THINKING, "a"),
    ("sglang", "", {"grammar": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'} | NO_THINKING, "a"),
    ("llamacpp", "", {"choice": ["a", 'b"\\\n北']}, {"grammar": 'root ::= "a" | "b\\"\\\\\\n北"'} | NO_THINKING, "a"),
    ("llamacpp", "", {"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'} | NO_THINKING, "a"),
    ("ollama", "", {"schema": SCHEMA}, {"format": SCHEMA}, '{"a": "x"}'),
    ("ollama", "", {"schema": {}}, {"format": "json"}, "{}"),
    ("ollama", "", {"choice": ["a", "北"]}, {"format": {"type": "string", "enum": ["a", "北"]}}, '"北"'),
]


@pytest.mark.parametrize(("dialect", "version", "asked", "expected", "answer"), CONSTRAINED, ids=lambda v: str(v)[:30])
def test_a_constraint_is_translated_exactly(
    dialect: Dialect,
    version: str,
    asked: dict[str, Any],
    expected: dict[str, Any],
    answer: str,
    fake: Make,
    attach: Attach,
) -> None:
    engine = fake(dialect, version=version or None)
    engine.answer = lambda ask: answer
    done = attach(engine).complete("hi", **asked)
    if dialect == "llamacpp" and asked.get("schema"):
        expected = schema_form(llm_inference.llamacpp_schema(SCHEMA)[0]) | NO_THINKING
    assert engine.body == base(dialect) | expected
    assert len(engine.asked) == 1 and done.enforced_by == "engine" and done.result is not None


def test_llama_cpps_regex_is_a_grammar(fake: Make, attach: Attach) -> None:
    engine = fake("llamacpp")
    for regex, answer in ((r"a/b", "a/b"), (r"a\/b", "a/b"), ("a\nb", "a\nb"), (r"a\\/b", r"a\/b")):
        engine.answer = lambda ask, answer=answer: answer
        attach(engine).complete("hi", regex=regex)
        assert engine.body["grammar"] == llm_inference.llamacpp_regex(regex)


@pytest.mark.parametrize("field", ["regex", "grammar"])
def test_ollama_refuses_what_it_has_no_field_for_and_says_what_would_work(
    field: str, fake: Make, attach: Attach
) -> None:
    engine = fake("ollama")
    with pytest.raises(UnsupportedFeature, match=field) as caught:
        attach(engine).complete("hi", **{field: "a"})
    assert "ollama" in caught.value.reason and "vllm" in caught.value.hint and engine.asked == []


def test_a_lark_grammar_that_would_be_ignored_is_refused(fake: Make, attach: Attach) -> None:
    engine = fake("llamacpp")
    with pytest.raises(UnsupportedFeature, match="Lark"):
        attach(engine).complete("hi", grammar="%llguidance {}\nstart: /a/")
    assert engine.asked == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ignore_drops_and_names_what_is_not_there(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    engine.capabilities = ["completion"]
    engine.flags = {}
    if dialect == "vllm":  # vLLM does not say whether it has a tool parser; `think` is what it can be asked to ignore
        asked: dict[str, Any] = {"think": True}
    else:
        asked = {"tools": [TOOL], "think": True}
    done = attach(engine).complete("hi", on_unsupported="ignore", temperature=0, **asked)
    assert set(done.ignored) == set(asked) and "tools" not in engine.body and "think" not in engine.body
    with pytest.raises(UnsupportedFeature) as caught:
        attach(engine).complete("hi", **asked)
    assert all(name in str(caught.value) for name in asked)


def test_an_ignored_constraint_is_still_checked(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    engine.answer = lambda ask: "123"
    done = attach(engine).complete("hi", regex="[0-9]+", on_unsupported="ignore")
    assert (done.text, done.ignored, done.enforced_by, done.result) == ("123", ("regex",), "checked", "123")


# Tools, images, thinking -------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", OPENAI)
def test_tools_as_they_are(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    body = sent(engine, attach(engine), tools=[TOOL, OTHER])
    assert body == base(dialect) | {"tools": [TOOL, OTHER]}
    assert sent(engine, attach(engine), tools=[TOOL], tool_choice="auto") == base(dialect) | {
        "tools": [TOOL],
        "tool_choice": "auto",
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tool_choice_none_is_no_tools(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    assert sent(engine, attach(engine), tools=[TOOL], tool_choice="none") == base(dialect)


def test_sglang_enforces_a_forced_tools_schema_with_strict_only(fake: Make, attach: Attach) -> None:
    engine = fake("sglang")
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in (TOOL, OTHER)]
    assert sent(engine, attach(engine), tools=[TOOL, OTHER], tool_choice="required") == base("sglang") | {
        "tools": strict,
        "tool_choice": "required",
    }


@pytest.mark.parametrize("dialect", ["sglang", "llamacpp"])
def test_a_named_function_is_offered_alone_where_another_might_be_called(
    dialect: Dialect, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    alone = {**OTHER, "function": {**OTHER["function"], "strict": True}}
    assert sent(engine, attach(engine), tools=[TOOL, OTHER], tool_choice=NAMED) == base(dialect) | {
        "tools": [alone],
        "tool_choice": "required",
    }


def test_vllm_is_sent_a_named_function(fake: Make, attach: Attach) -> None:
    """vLLM too constrains the arguments only with `strict` (WIRE.md): a forced call must send it."""
    engine = fake("vllm")
    body = sent(engine, attach(engine), tools=[TOOL, OTHER], tool_choice=NAMED)
    assert body["tool_choice"] == NAMED
    assert all(tool["function"].get("strict") is True for tool in body["tools"])


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_ollama_refuses_a_forced_tool(choice: Any, fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    with pytest.raises(UnsupportedFeature, match="tool_choice"):
        attach(engine).complete("hi", tools=[TOOL, OTHER], tool_choice=choice)
    assert engine.asked == []


def test_ollama_gets_tools_and_no_tool_choice(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    for choice in (None, "auto"):
        assert sent(engine, attach(engine), tools=[TOOL], tool_choice=choice) == base("ollama") | {"tools": [TOOL]}


IMAGE = "data:image/png;base64,iVBORw0KGgo="
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what "},
            {"type": "image_url", "image_url": {"url": IMAGE, "detail": "auto"}},
            {"type": "text", "text": "is it?"},
        ],
    }
]
CALLED = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


def test_ollama_gets_images_as_bare_base64(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    engine.capabilities = ["completion", "vision"]
    assert sent(engine, attach(engine), SEEN)["messages"] == [
        {"role": "user", "content": "what is it?", "images": ["iVBORw0KGgo="]}
    ]


def test_ollama_gets_tool_messages_in_its_own_shape(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    assert sent(engine, attach(engine), CALLED, tools=[TOOL])["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "北京"}}}],
        },
        {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
    ]


@pytest.mark.parametrize("dialect", OPENAI)
def test_openai_engines_get_the_messages_as_they_are(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    engine.capabilities = ["completion", "tools", "vision"]
    for messages in (CALLED, SEEN) if dialect != "sglang" else (CALLED,):
        assert sent(engine, attach(engine), messages)["messages"] == messages


@pytest.mark.parametrize("arguments", ["{", "not json", "[1", '{"a": NaN}'])
def test_arguments_in_the_history_that_are_no_json_are_the_callers(arguments: str, fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    messages = [
        *CALLED[:2],
        {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}],
        },
    ]
    with pytest.raises(InvalidRequest, match="arguments"):
        attach(engine).complete(messages)
    assert engine.asked == []


@pytest.mark.parametrize("dialect", ["ollama", "llamacpp"])
def test_an_image_for_a_model_that_cannot_see_is_refused_even_under_ignore(
    dialect: Dialect, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    for how in ("error", "ignore"):
        with pytest.raises(UnsupportedFeature, match="images"):
            attach(engine).complete(SEEN, on_unsupported=how)
    assert engine.asked == []


def test_thinking_on_each_engine(fake: Make, attach: Attach) -> None:
    ollama, vllm, sglang = fake("ollama"), fake("vllm"), fake("sglang")
    ollama.reasoning = sglang.reasoning = vllm.reasoning = "hm"
    sglang.flags["reasoning_parser"] = "qwen3"
    for family, level in (("qwen3", True), ("gptoss", "low")):  # gpt-oss alone has levels
        ollama.details = {"family": family}
        low = attach(ollama).complete("hi", think="low")
        assert ollama.body["think"] == level
        assert low.ignored == (("think",) if level is True else ())
    for think in (True, False, "low"):
        assert sent(ollama, attach(ollama), think=think) == base("ollama") | {"think": think}
        for tokens in ([1, 2], [1]):  # the rendered prompt differs: the template looks at it
            vllm.script(
                Reply(
                    headers={"content-type": "application/json"},
                    pieces=[json.dumps({"count": 1, "tokens": tokens}).encode()],
                ),
                "/tokenize",
            )
        for engine in (vllm, sglang):
            expected: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": bool(think)}}
            if isinstance(think, str):
                expected["reasoning_effort"] = think
            assert sent(engine, attach(engine), think=think) == base(engine.dialect) | expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_thinking_is_refused_where_the_model_does_not(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    with pytest.raises(UnsupportedFeature, match="think"):
        attach(engine).complete("hi", think=True)
    assert engine.asked == []


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("seed", 1, "--enable-deterministic-inference"),
        ("think", True, "--reasoning-parser"),
        ("tools", [TOOL], "--tool-call-parser"),
    ],
)
def test_sglang_refuses_what_it_was_not_started_for_and_names_the_flag(
    field: str, value: Any, flag: str, fake: Make, attach: Attach
) -> None:
    engine = fake("sglang")
    engine.flags, engine.capabilities = {}, ["completion"]
    with pytest.raises(UnsupportedFeature, match=field) as caught:
        attach(engine).complete("hi", **{field: value})
    assert flag in caught.value.hint and engine.asked == []


# Embeddings, models, pull ------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", DIALECTS)
def test_embeddings(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    engine.capabilities = ["embedding"]
    vectors = attach(engine).embed(["a", "北京"])
    assert [round(vector[0], 2) for vector in vectors] == [0.01, 0.02] and len(vectors[0]) == 8
    seen = engine.requests[-1]
    if dialect == "ollama":
        assert (seen.path, seen.json) == (
            "/api/embed",
            {"model": "m:latest", "input": ["a", "北京"], "truncate": False},
        )
    else:
        assert (seen.path, seen.json) == (
            "/v1/embeddings",
            {"model": "m", "input": ["a", "北京"], "encoding_format": "float"},
        )


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("ollama", "13_embed_string"),
        ("vllm", "embeddings"),
        ("sglang", "embeddings"),
        ("llamacpp", "plain_post_v1_embeddings"),
    ],
)
def test_a_chat_server_has_no_embeddings(dialect: Dialect, name: str, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    engine.replay(name, name)  # llama.cpp is asked beforehand whether it can
    with pytest.raises(UnsupportedFeature):
        attach(engine).embed("a")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_models(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect, model="smol")
    engine.context = 4321
    (model,) = attach(engine).models()
    assert (model.name, model.context_length) == ("smol:latest" if dialect == "ollama" else "smol", 4321)


def test_ollama_pulls_and_others_say_that_they_do_not(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    attach(engine).pull("new")
    assert engine.models == ["m", "new"]
    for name in ("14_pull_unreachable_stream", "14_pull_bad_name"):
        engine.replay(name)
        with pytest.raises(InferenceError):
            attach(engine).pull("other")
    for dialect in ("vllm", "sglang"):
        with pytest.raises(UnsupportedFeature, match="pull"):
            attach(fake(dialect)).pull("x")
    with pytest.raises(ModelNotFound):
        attach(fake("llamacpp")).pull("x")


# Finding an engine -------------------------------------------------------------------------------
def test_without_a_package_for_http_the_error_names_it(without: Callable[..., None]) -> None:
    without("httptools", "h11")
    with pytest.raises(EngineNotInstalled, match="pip install httptools"):
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").generate("hi")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", ["{url}", "{host}", "{url}/", "{url}/v1", "{host}/v1/"])
def test_attach_by_base_url_in_any_form(dialect: Dialect, form: str, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(dialect, base_url=form.format(url=engine.base_url, host=engine.base_url.removeprefix("http://")))
    assert llm.health() == {
        "engine_type": dialect,
        "healthy": True,
        "how": "attached by base_url",
        "version": engine.version,
        "models": [m.name for m in llm.models()],
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_attach_by_the_environment(
    dialect: Dialect, fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, other = fake(dialect), fake(dialect)
    name = LLMInferencer.ENGINE_MAP[dialect].url_env  # type: ignore[attr-defined]
    assert name in ("OLLAMA_HOST", "VLLM_BASE_URL", "SGLANG_BASE_URL", "LLAMACPP_BASE_URL")
    monkeypatch.setenv(name, engine.base_url.replace("http://127.0.0.1", "0.0.0.0"))
    assert attach(dialect).health()["how"] == f"attached by {name}"
    attach(dialect, base_url=other.base_url).generate("hi")  # base_url comes first
    assert other.asked and not engine.asked


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_default_port_is_taken_only_from_the_engine_itself(
    dialect: Dialect, fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = LLMInferencer.ENGINE_MAP[dialect]
    engine = fake(dialect)
    monkeypatch.setattr(cls, "default_url", engine.base_url)
    assert attach(dialect).health()["how"] == f"found on port {engine.port}"
    for other in DIALECTS:
        if other != dialect:
            wrong = fake(other)
            monkeypatch.setattr(cls, "default_url", wrong.base_url)
            with pytest.raises((EngineUnavailable, EngineNotInstalled)):
                attach(dialect, launch=False).generate("hi")
            assert wrong.asked == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("other", DIALECTS)
def test_a_base_url_of_another_engine_is_refused_and_the_engine_named(
    dialect: Dialect, other: Dialect, fake: Make, attach: Attach
) -> None:
    if dialect == other:
        return
    wrong = fake(other)
    with pytest.raises(EngineUnavailable) as caught:
        attach(dialect, base_url=wrong.base_url).generate("hi")
    assert other in str(caught.value) and wrong.asked == []


def unreachable(dialect: Dialect, fake: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeEngine, Any]:
    """An engine that was stopped, at its adapter's default address; and the adapter."""
    gone = fake(dialect)
    gone.stop()
    adapter = LLMInferencer.ENGINE_MAP[dialect]
    monkeypatch.setattr(adapter, "default_url", gone.base_url)
    return gone, adapter


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_error_of_an_unreachable_engine_says_how_to_start_it(
    dialect: Dialect, fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, cls = unreachable(dialect, fake, monkeypatch)
    for options in ({"base_url": gone.base_url}, {"launch": False}):
        llm = attach(dialect, **options)
        with pytest.raises(EngineUnavailable) as caught:
            llm.generate("hi")
        assert caught.value.retryable and cls.start_hint in str(caught.value)  # type: ignore[attr-defined]
        health = llm.health()
        assert health["healthy"] is False and health["error"]


@pytest.mark.parametrize("dialect", ["ollama", "vllm", "sglang"])
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    dialect: Dialect, fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cls = unreachable(dialect, fake, monkeypatch)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EngineUnavailable) as caught:
        attach(dialect).generate("hi")
    assert cls.install_hint in caught.value.hint and cls.start_hint in caught.value.hint  # type: ignore[attr-defined]


def test_auto_takes_the_first_that_answers(fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, sglang, llamacpp = fake("vllm"), fake("sglang"), fake("llamacpp")
    gone.stop()
    for dialect, there in (("ollama", gone), ("vllm", gone), ("sglang", sglang), ("llamacpp", llamacpp)):
        monkeypatch.setattr(LLMInferencer.ENGINE_MAP[dialect], "default_url", there.base_url)
    llm = attach("auto")  # type: ignore[arg-type]
    assert llm.engine_type == "auto" and llm.generate("hi") == sglang.text and llm.engine_type == "sglang"
    named = attach("auto", "llamacpp/m")  # type: ignore[arg-type]
    assert named.generate("hi") == llamacpp.text and named.engine_type == "llamacpp"


def test_auto_without_any_engine_says_so(fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = fake("vllm")
    gone.stop()
    for dialect in DIALECTS:
        monkeypatch.setattr(LLMInferencer.ENGINE_MAP[dialect], "default_url", gone.base_url)
    with pytest.raises(EngineUnavailable) as caught:
        attach("auto", launch=False).generate("hi")  # type: ignore[arg-type]
    assert all(dialect in caught.value.hint for dialect in DIALECTS)


# Keys and headers --------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_key_goes_out_as_bearer(
    dialect: Dialect, fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake(dialect)
    engine.api_key = "sekret"
    attach(engine, api_key="sekret").generate("hi")
    monkeypatch.setenv(LLMInferencer.ENGINE_MAP[dialect].key_env, "sekret")  # type: ignore[attr-defined]
    attach(engine).generate("hi")
    assert {seen.headers.get("authorization") for seen in engine.requests} == {"Bearer sekret"}


@pytest.mark.parametrize("dialect", OPENAI)
@pytest.mark.parametrize("key", [None, "wr0ng"])
def test_a_refused_key_is_an_error_that_does_not_show_it(
    dialect: Dialect, key: str | None, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    engine.api_key = "sekret"
    with pytest.raises(InferenceError) as caught:
        attach(engine, api_key=key).generate("hi")
    assert "key" in str(caught.value) and "wr0ng" not in str(caught.value) and engine.asked == []
    assert caught.value.hint and caught.value.code == 500


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_key_no_header_and_no_compression(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    attach(engine).generate("hi")
    for seen in engine.requests:
        assert "authorization" not in seen.headers and seen.headers["accept-encoding"] == "identity"
    assert engine.asked[-1].headers["content-type"] == "application/json"


def test_no_proxy_and_no_redirect_is_followed(fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, proxy = fake("vllm"), fake("vllm")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.base_url)
    llm = attach(engine)
    assert llm.generate("hi") == engine.text and proxy.requests == []
    engine.script_chat(Reply(status=307, headers={"location": f"{proxy.base_url}/v1/chat/completions"}, pieces=[b""]))
    with pytest.raises(InferenceError):
        llm.generate("hi")
    assert proxy.requests == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_questions_about_the_engine_are_asked_once(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine, "m")
    llm.complete("hi", temperature=0)
    before = len(engine.requests)
    for _ in range(3):
        llm.complete("hi", temperature=0)
    assert len(engine.requests) == before + 3


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_engine_that_restarts_is_found_again(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine)
    llm.generate("hi")
    engine.stop()
    with pytest.raises(EngineUnavailable):
        llm.generate("hi")
    engine.start()
    assert llm.generate("hi") == engine.text


def test_a_relaunched_engine_of_another_version_is_asked_anew(fake: Make, attach: Attach) -> None:
    """An upgrade of vLLM behind the same address: which fields it has is looked at again."""
    engine = fake("vllm", version="0.26.0")
    llm = attach(engine)
    llm.complete("hi")
    assert llm.fleet is not None
    adapter = llm.fleet.endpoints[0].adapter
    assert "stream_interval" not in adapter.fields(CHAT["vllm"])
    engine.stop()
    with pytest.raises(EngineUnavailable):
        llm.complete("hi")
    engine.version = "0.32.0"
    engine.start()
    llm.complete("hi")
    assert "stream_interval" in adapter.fields(CHAT["vllm"])


# A new engine ------------------------------------------------------------------------------------
def test_a_new_engine_is_a_subclass_in_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parrot(llm_inference.BaseLLMAdapter):
        engine_type = "parrot"

        async def _stream(self, request: llm_inference.GenerateRequest) -> Any:
            for word in str(request.messages[-1].get("content")).split():
                yield [llm_inference.Chunk(text=word)]
            yield [llm_inference.Chunk(finish_reason="stop")]

    monkeypatch.setitem(LLMInferencer.ENGINE_MAP, "parrot", Parrot)
    llm = LLMInferencer("parrot")
    assert llm.generate("a b") == "ab" and list(llm.stream("a b")) == ["a", "b"]
    done = llm.complete("a b")
    assert (done.engine_type, done.finish_reason, done.model_name) == ("parrot", "stop", "parrot")
    assert [chunk.finish_reason for chunk in chunks(llm, "a b")] == [None, None, "stop"]
    with pytest.raises(UnsupportedFeature, match="temperature"):
        llm.generate("a", temperature=1)
    assert llm.complete("a", temperature=1, on_unsupported="ignore").ignored == ("temperature",)


def test_an_engine_is_not_blamed_for_what_another_one_logged() -> None:
    """Engines that were started on the same port, one after the other, each have a log of their own."""
    port, said = 0, []
    for error in ("not a valid JSON file", "[Errno 98] Address already in use"):
        child = llm_inference.EngineChild.share(error, "vllm")
        child.port = port
        child.start(lambda _, error=error: ([sys.executable, "-c", f"import sys; sys.exit('OSError: {error}')"], {}))
        until(lambda child=child: not child.alive)
        said.append(child.failure())
        port = child.port
        child.release()
    assert [error.kind for error in said] == ["model_not_found", "engine_unavailable"]
    assert "JSON" not in said[1].detail


# Starts that fail, in the engines' own words, from real logs; test_start.py provokes those of the engines that run here
@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            "ValueError: Loaded weights leave no GPU memory for the KV cache under "
            "--mem-fraction-static=0.004. Raise --mem-fraction-static above 0.011",
            "out_of_memory",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
            "GPU 0 has a total capacity of 79.18 GiB of which 1.2 GiB is free.",
            "out_of_memory",
        ),
        (
            "ValueError: Free memory on device cuda:0 (60.1/79.2 GiB) on startup is less "
            "than desired GPU memory utilization (0.9, 71.3 GiB).",
            "out_of_memory",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. "
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073479680 bytes.",
            "out_of_memory",
        ),
        (
            "ValueError: No available memory for the cache blocks. "
            "Try increasing `gpu_memory_utilization` when initializing the engine",
            "out_of_memory",
        ),
        (
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
            "incomplete metadata, file not fully covered",
            "model_not_found",
        ),
        ("sglang serve: error: unrecognized arguments: --no-such-flag", "invalid_request"),
        ("RuntimeError: Failed to infer device type, please set the environment variable", "engine_unavailable"),
    ],
)
def test_what_a_failed_start_says(line: str, kind: str, tmp_path: Path) -> None:
    child = llm_inference.EngineChild("sglang")
    child.log, child.key = tmp_path / "log", "key"
    child.log.write_text(f"[2026-11-25 03:20:11] INFO loading\n[2026-11-25 03:20:12 TP0] {line}\n")
    assert child.failure().kind == kind


# Nothing is dropped, nothing is taken for something else -----------------------------------------
def answers(said: Any, status: int = 200) -> Reply:
    return Reply(status=status, headers={"content-type": "application/json"}, pieces=[json.dumps(said).encode()])


def test_a_seed_of_zero_is_a_seed(fake: Make, attach: Attach) -> None:
    engine = fake("sglang")
    engine.flags = {}
    llm = attach(engine)
    with pytest.raises(UnsupportedFeature, match="seed"):
        llm.complete("hi", seed=0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_not_to_think_asks_for_nothing_where_the_model_does_not_think(
    dialect: Dialect, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    assert sent(engine, attach(engine), think=False) == base(dialect)


def test_a_grammar_that_was_cut_is_no_answer(fake: Make, attach: Attach) -> None:
    engine = fake("vllm")
    llm = attach(engine)
    cut = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "abc"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    llm.generate("hi")
    for _ in range(2):
        engine.script(answers(cut))
    with pytest.raises(StructuredOutputInvalid, match="max_tokens was reached"):
        llm.structured_generate("x", grammar='root ::= "abc def"', max_tokens=1)


def test_a_dropped_grammar_is_not_reported_as_checked(fake: Make, attach: Attach) -> None:
    done = attach(fake("ollama")).complete("x", grammar='root ::= "a"', on_unsupported="ignore")
    assert (done.ignored, done.enforced_by) == (("grammar",), "none")


def test_an_image_detail_that_ollama_has_no_field_for_is_refused(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    engine.capabilities = ["completion", "vision"]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "high"}}
    with pytest.raises(UnsupportedFeature, match="detail"):
        attach(engine).complete([{"role": "user", "content": [image]}])


def test_ollama_tool_calls_that_all_have_index_0_stay_separate(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    engine.capabilities = ["completion", "tools"]

    def line(**more: Any) -> bytes:
        return (
            json.dumps({"model": "m", "message": {"role": "assistant", "content": ""}, "done": False, **more}).encode()
            + b"\n"
        )

    def called(name: str, city: str) -> bytes:
        return line(
            message={
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": name, "function": {"index": 0, "name": "get_weather", "arguments": {"city": city}}}
                ],
            }
        )

    llm = attach(engine)
    llm.complete("hi", tools=[TOOL])
    engine.script(
        Reply(
            headers={"content-type": "application/x-ndjson"},
            pieces=[called("c1", "Rome"), called("c2", "Oslo"), line(done=True, done_reason="stop")],
        )
    )
    done = llm_inference.Completion.from_chunks(chunks(llm, "hi", tools=[TOOL]))
    assert [json.loads(call["function"]["arguments"]) for call in done.tool_calls] == [
        {"city": "Rome"},
        {"city": "Oslo"},
    ]


# An engine that fails now has not lost what it can do --------------------------------------------
def test_a_question_that_fails_once_narrows_nothing(fake: Make, attach: Attach) -> None:
    engine = fake("llamacpp")
    engine.capabilities = ["completion", "tools"]
    llm = attach(engine)
    llm.models()
    engine.script(answers({"error": {"message": "Loading model", "code": 503}}, 503), "/props")
    with pytest.raises(EngineOverloaded):
        llm.complete("hi", tools=[TOOL])
    assert llm.complete("hi", tools=[TOOL]).text


def test_a_template_probe_that_failed_is_repeated(fake: Make, attach: Attach) -> None:
    engine = fake("vllm")
    engine.reasoning = "hm"
    llm = attach(engine)
    llm.models()
    for path in ("/tokenize", "/v1/chat/completions"):
        engine.script(answers({"error": {"message": "overloaded"}}, 503), path)
    with pytest.raises(EngineOverloaded):
        llm.complete("hi", think=True)
    assert llm.complete("hi", think=True).text


def test_a_failure_of_ollama_is_not_reported_as_a_missing_model(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    llm = attach(engine)
    llm.models()
    engine.script(answers({"error": "boom"}, 500), "/api/show")
    with pytest.raises(BadEngineReply, match="boom"):
        llm.generate("hi")


@pytest.mark.parametrize("said", [{"data": ["x"]}, {"data": {"x": 1}}, {"data": None}, {"data": [{}]}, {}, [], "page"])
def test_a_malformed_list_of_models_is_an_error(said: Any, fake: Make, attach: Attach) -> None:
    engine = fake("vllm")
    llm = attach(engine)
    llm.generate("hi")
    engine.script(answers(said), "/v1/models")
    with pytest.raises(BadEngineReply):
        llm.models()


@pytest.mark.parametrize("vectors", [None, [], [[]], [[1.0], [2.0]], [["1.0"]], [None], "x"], ids=str)
@pytest.mark.parametrize(("dialect", "path"), [("ollama", "/api/embed"), ("vllm", "/v1/embeddings")])
def test_embeddings_without_vectors_are_an_error(
    dialect: Dialect, path: str, vectors: Any, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    engine.capabilities = ["completion", "embedding"]
    data = (
        [{"index": n, "embedding": vector} for n, vector in enumerate(vectors)]
        if isinstance(vectors, list)
        else vectors
    )
    said = {} if vectors is None else {"embeddings": vectors} if dialect == "ollama" else {"data": data}
    engine.script(answers(said), path)
    with pytest.raises(BadEngineReply, match=r"malformed|something other"):
        attach(engine).embed("x")


@contextlib.contextmanager
def http_server(body: Callable[[Any], bytes]) -> Iterator[str]:
    """A server that says the same to every question; its base URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = body(self)
            self.send_response(200)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_auto_takes_nothing_that_does_not_say_what_it_is(fake: Make, attach: Attach) -> None:
    with http_server(lambda handler: b"<html>hi</html>") as url:
        assert attach("auto", base_url=url, launch=False).health()["healthy"] is False  # type: ignore[arg-type]
        assert attach("ollama", base_url=url).health()["healthy"] is False
        with pytest.raises(EngineUnavailable):
            attach("auto", base_url=url, launch=False).generate("hi")  # type: ignore[arg-type]
    with http_server(lambda handler: b'{"data": ["x"]}') as url:
        assert attach("vllm", base_url=url).health()["healthy"] is False


def test_auto_finds_the_engine_at_any_of_its_addresses(fake: Make) -> None:
    urls = [f"http://127.0.0.1:{free_port()}", fake("vllm").base_url]
    for addresses in (urls, urls[::-1]):
        with LLMInferencer("auto", base_url=addresses) as llm:
            assert llm.generate("hi")
            assert llm.engine_type == "vllm"


def test_a_wrong_setting_is_named(fake: Make, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake("ollama")
    assert attach(engine, api_key="k\n").generate("hi")
    assert engine.requests[-1].headers["authorization"] == "Bearer k"
    with pytest.raises(InvalidRequest, match="api_key"):
        attach(engine, api_key="k\nx: y").generate("hi")
    monkeypatch.setenv("OLLAMA_HOST", "ftp://x")
    for engine_type in ("ollama", "auto"):
        with pytest.raises(InvalidRequest, match="OLLAMA_HOST"):
            attach(engine_type).generate("hi")  # type: ignore[arg-type]
    assert llm_inference.clean_url(":11434") == "http://127.0.0.1:11434"


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("base_url", "says"),
    [
        ("http://no-such-host.invalid:8000", "unknown host name"),
        ("127.0.0.1:70000", "port .* does not exist"),
        ("http://127.0.0.1:0/v1", "port .* does not exist"),
    ],
)
def test_an_impossible_address_is_an_error(
    base_url: str, says: str, parser: Any, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **named: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # no name leaves this machine
    monkeypatch.setattr(llm_inference, "response_parser", lambda: parser)
    with pytest.raises(llm_inference.InferenceError, match=says):
        LLMInferencer("vllm", base_url=base_url).generate("hi")


@pytest.mark.parametrize("dialect", OPENAI)  # Ollama's is looked up again after ten seconds
def test_the_default_model_is_the_servers_that_is_there_now(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine)
    assert llm.complete("hi").model_name == "m"
    engine.stop()
    engine.model, engine.models = "other", ["other"]
    engine.start()
    assert llm.complete("hi").model_name == "other"


def test_a_web_page_is_not_taken_for_an_engine(attach: Attach) -> None:
    with http_server(lambda path: b"<html>hello</html>") as url:
        for dialect in DIALECTS:
            with (
                pytest.raises(BadEngineReply, match="lists no models; correct the address"),
                LLMInferencer(dialect, base_url=url) as llm,
            ):
                llm.generate("hi")


def test_a_connection_that_is_not_accepted_is_a_timeout(attach: Attach) -> None:
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        for parser in PARSERS:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineTimeout, match="connect"):
                patch.setattr(llm_inference, "response_parser", lambda kept=parser: kept)
                attach(
                    "vllm", base_url=f"http://127.0.0.1:{full.getsockname()[1]}", deadlines=Deadlines(connect=0.3)
                ).generate("hi")


# What ends, ends ---------------------------------------------------------------------------------
def test_a_batch_that_breaks_leaves_nothing_running(fake: Make, attach: Attach) -> None:
    class Picky(pydantic.BaseModel):
        text: str

        @pydantic.field_validator("text")
        @classmethod
        def refuse(cls, value: str) -> str:
            if value == "bad":
                raise KeyError("mine")
            return value

    async def main() -> None:
        llm = attach(engine)
        await llm.agenerate("hi")  # connected: what runs from here on is the batch's
        before = asyncio.all_tasks()
        with pytest.raises(KeyError):
            await llm.abatch(["long", "bad"] * 6, concurrency=2, schema=Picky)
        assert asyncio.all_tasks() == before

    engine = fake("vllm")
    engine.answer = lambda ask: json.dumps(
        {"text": "bad" if ask["messages"][-1]["content"] == "bad" else "word " * 100}
    )
    engine.pace = 0.02
    asyncio.run(main())
    engine.wait(lambda: engine.live == 0)
    assert len(engine.asked) <= 3


def test_ctrl_c_in_a_stream_that_takes_a_moment_to_end_is_ctrl_c() -> None:
    """An answer may end in several steps, and a generator that is at work cannot be closed."""
    ended = []

    async def answer() -> AsyncGenerator[str, None]:
        try:
            yield "one"
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        list(llm_inference.portal.iterate(answer()))
    assert ended


@pytest.mark.parametrize("verb", ["generate", "stream", "structured_generate", "batch", "agenerate", "astream"])
def test_an_error_keeps_no_request_alive(verb: str, fake: Make, attach: Attach) -> None:
    """As in test_api.py, for the Python verbs."""

    def fails() -> None:
        with contextlib.suppress(InferenceError):
            answer = list(
                getattr(llm, verb)("x", **({"schema": {"a": "string"}} if verb == "structured_generate" else {}))
            )
            assert verb == "batch" and isinstance(answer[0], InferenceError)

    async def fails_there() -> None:  # caught there, for asyncio.run makes such a cycle itself
        with contextlib.suppress(InferenceError):
            await (collect(llm.astream("x")) if verb == "astream" else llm.agenerate("x"))
            pytest.fail("it answered")

    engine = fake("vllm")
    llm = attach(engine)
    llm.generate("warm")
    with no_error_stays():
        for reply in BROKEN:
            engine.script_chat(reply)
            asyncio.run(fails_there()) if verb.startswith("a") else fails()


def test_closing_while_it_is_reached_is_an_error_and_no_cancellation(attach: Attach) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            llm = attach("vllm", base_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
            asking = asyncio.ensure_future(llm.agenerate("hi"))
            connection, _ = await asyncio.to_thread(silent.accept)
            await llm.aclose()
            with pytest.raises(EngineUnavailable, match="closed"):
                await asking
            connection.close()

    asyncio.run(main())


def test_two_callers_that_need_a_new_connection_pool_share_it() -> None:
    async def main() -> None:
        sessions = llm_inference.Sessions()
        await sessions.get(None)
        one, other = await asyncio.gather(sessions.get("/nowhere.sock"), sessions.get("/nowhere.sock"))
        assert one is other
        await sessions.close()

    asyncio.run(main())
