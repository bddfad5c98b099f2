"""`run`: Python functions as tools, on the four engines."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_inference import InferenceError, InvalidRequest, LLMInferencer, tool_from
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


def test_a_functions_signature_becomes_its_schema() -> None:
    tool = tool_from(get_weather)["function"]
    assert tool["name"] == "get_weather" and tool["description"] == "The weather in a city."
    assert tool["parameters"]["properties"]["days"] == {"default": 1, "title": "Days", "type": "integer"}
    assert tool["parameters"]["required"] == ["city"] and json.dumps(tool)

    def odd(what: Callable[[], None]) -> None: ...

    with pytest.raises(InvalidRequest, match="odd"):
        tool_from(odd)
