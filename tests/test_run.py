"""`run`: Python functions as tools, on the four engines."""

import asyncio
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_inference import InferenceError, InvalidRequest, LLMInferencer, call_function, tool_from
from tests.fake_engine import DIALECTS, Dialect, FakeEngine


def get_weather(city: str, days: int = 1) -> dict[str, Any]:
    """The weather in a city."""
    return {"city": city, "days": days, "sky": "clear"}


async def get_time(zone: str) -> str:
    return f"12:00 in {zone}"


def fails(city: str) -> str:
    raise RuntimeError(f"{city} is closed")


def calling(fake: Callable[..., FakeEngine], dialect: Dialect, name: str, arguments: dict[str, Any]) -> FakeEngine:
    """An engine that calls once, and then answers."""
    engine = fake(dialect)
    engine.capabilities = ["completion", "tools"]
    engine.tool_call = (name, arguments)
    return engine


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (get_weather, {"city": "Paris"}, '{"city":"Paris","days":1,"sky":"clear"}'),
        (get_time, {"zone": "UTC"}, "12:00 in UTC"),
        (fails, {"city": "Rome"}, "error: RuntimeError: Rome is closed"),
    ],
    ids=["sync", "async", "error"],
)
def test_a_function_is_called_and_its_result_goes_back(
    dialect: Dialect, function: Any, arguments: Any, result: str, fake: Any, attach: Any
) -> None:
    engine = calling(fake, dialect, function.__name__, arguments)
    llm: LLMInferencer = attach(engine)

    engine.answer = lambda ask: "It is clear."
    call = engine.tool_call
    original = llm.acomplete

    async def counted(messages: Any, **options: Any) -> Any:
        engine.tool_call = call if not any(m.get("role") == "tool" for m in messages) else None
        return await original(messages, **options)

    llm.acomplete = counted  # type: ignore[method-assign]
    done = llm.run("What is it like?", tools=[function])
    assert done.text == "It is clear."
    last = engine.bodies[-1]["messages"][-1]
    assert last["role"] == "tool" and last["content"] == result


def test_a_model_that_calls_for_ever_is_an_error(fake: Any, attach: Any) -> None:
    llm: LLMInferencer = attach(calling(fake, "vllm", "get_weather", {"city": "Paris"}))
    called = llm.complete("?", tools=[tool_from(get_weather)])
    assert called.tool_calls

    async def calls(messages: Any, **options: Any) -> Any:
        return called

    llm.acomplete = calls  # type: ignore[method-assign]
    with pytest.raises(InferenceError, match="3 turns"):
        llm.run("?", tools=[get_weather], max_turns=3)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_call_is_not_lost_where_only_text_is_returned(dialect: Dialect, fake: Any, attach: Any) -> None:
    """The answer is a call without any text: `generate` used to return "", and `stream` nothing."""
    llm: LLMInferencer = attach(calling(fake, dialect, "get_weather", {"city": "Paris"}))
    tools = [tool_from(get_weather)]
    verbs: list[Callable[[], Any]] = [
        lambda: llm.generate("?", tools=tools),
        lambda: llm.chat([{"role": "user", "content": "?"}], tools=tools),
        lambda: list(llm.stream("?", tools=tools)),
        lambda: asyncio.run(streamed(llm, tools)),
    ]
    for verb in verbs:
        with pytest.raises(InvalidRequest, match=r"tools: the model called get_weather, .*; use complete\(\)"):
            verb()
    assert llm.complete("?", tools=tools).tool_calls
    assert llm.generate("?", tools=tools, tool_choice="none", on_unsupported="ignore") is not None


async def streamed(llm: LLMInferencer, tools: list[Any]) -> list[str]:
    return [text async for text in llm.astream("?", tools=tools)]


def test_a_functions_signature_becomes_its_schema() -> None:
    tool = tool_from(get_weather)["function"]
    assert tool["name"] == "get_weather" and tool["description"] == "The weather in a city."
    assert tool["parameters"]["properties"]["days"] == {"default": 1, "title": "Days", "type": "integer"}
    assert tool["parameters"]["required"] == ["city"] and json.dumps(tool)

    def odd(what: Callable[[], None]) -> None: ...

    with pytest.raises(InvalidRequest, match="odd"):
        tool_from(odd)


def counts_to(city: str) -> Iterator[int]:
    yield 1
    raise RuntimeError(f"{city} is closed")


@functools.wraps(get_time)
def decorated(zone: str) -> Any:
    return get_time(zone)


@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (decorated, {"zone": "UTC"}, "12:00 in UTC"),  # its coroutine is awaited
        (functools.partial(get_weather, days=2), {"city": "Bonn"}, '{"city":"Bonn","days":2,"sky":"clear"}'),
        (counts_to, {"city": "Rome"}, "error: RuntimeError: Rome is closed"),
        (lambda city: (city, 1.5, None), {"city": "Rome"}, '["Rome",1.5,null]'),
    ],
    ids=["decorated", "partial", "generator", "lambda"],
)
def test_the_text_of_a_result(function: Any, arguments: Any, result: str) -> None:
    assert asyncio.run(call_function("f", function, json.dumps(arguments))) == result


@pytest.mark.parametrize("result", [object(), b"\xff", {"a": object()}])
def test_a_result_that_is_no_json_is_refused_by_its_functions_name(result: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"tools: f returned what JSON cannot express"):
        asyncio.run(call_function("f", lambda: result, "{}"))


def any_number(*args: int) -> None: ...
def by_place(city: str, /) -> None: ...
def one_and_more(city: str, *args: str) -> None: ...


@pytest.mark.parametrize("function", [any_number, by_place, one_and_more])
def test_a_function_that_takes_no_arguments_by_name_is_no_tool(function: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{function.__name__} has positional-only parameters, or ") as caught:
        tool_from(function)
    assert caught.value.hint == "a call gives arguments by name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": get_weather}, "tools: must be a list of functions; put it into a list, or wrap it in a function"),
        ({"tools": [lambda city: city]}, r"tools[0].function.name: must match ^[A-Za-z0-9_-]{1,64}$; correct it"),
        ({"tools": [get_weather], "max_turns": 0}, "max_turns: must be an integer from 1 on, got 0; leave it out"),
        ({"tools": [get_weather], "max_turns": "3"}, "max_turns: must be an integer from 1 on, got '3'; leave it out"),
    ],
)
def test_a_mistake_in_the_arguments_of_run_is_named(options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLMInferencer("vllm", base_url="http://127.0.0.1:9").run("?", **options)
    assert caught.value.message == message
