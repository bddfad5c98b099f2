"""LiteLLM and DSPy on real engines: LiteLLM's openai, anthropic and responses routes."""

import asyncio
import json
from typing import Any

import pytest

from tests.integration.asked import CHAT_TOOL, CITIES, MESSAGES, QUESTION, WEATHER_QUESTION, Capital
from tests.integration.conftest import Target

litellm = pytest.importorskip("litellm")
litellm.suppress_debug_info = True
litellm.telemetry = False
lite = pytest.mark.client("litellm", "litellm")
WEATHER: Any = [{"role": "user", "content": WEATHER_QUESTION}]


@pytest.fixture(params=["openai", "anthropic"])
def route(request: pytest.FixtureRequest, target: Target) -> dict[str, Any]:
    base = target.v1 if request.param == "openai" else target.url
    fixed = {"temperature": 0, "max_tokens": 96, "max_retries": 0, "timeout": 120}
    return {"model": f"{request.param}/{target.model}", "api_base": base, "api_key": "none", **fixed}


@lite
def test_text(route: dict[str, Any]) -> None:
    found = litellm.completion(**route, messages=MESSAGES)
    assert "Paris" in found.choices[0].message.content and found.usage.completion_tokens > 0


@lite
def test_stream(route: dict[str, Any]) -> None:
    pieces = litellm.completion(**route, messages=MESSAGES, stream=True)
    assert "Paris" in "".join(piece.choices[0].delta.content or "" for piece in pieces)

    async def work() -> str:
        pieces = await litellm.acompletion(**route, messages=MESSAGES, stream=True)
        return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

    assert "Paris" in asyncio.run(work())


@lite
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tools(route: dict[str, Any], streamed: bool) -> None:
    asked = {**route, "messages": list(WEATHER), "tools": [CHAT_TOOL], "tool_choice": "required"}
    found = litellm.completion(**asked, stream=streamed)
    if streamed:
        found = litellm.stream_chunk_builder(list(found))
    message = found.choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES
    asked["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert litellm.completion(**{**asked, "tool_choice": "auto"}).choices[0].message


@lite
def test_structured_output(route: dict[str, Any]) -> None:
    """On the anthropic route it makes a tool of the schema: it knows which models have schemas by their names."""
    found = litellm.completion(**route, messages=MESSAGES, response_format=Capital)
    assert Capital.model_validate_json(found.choices[0].message.content).city in CITIES


@lite
def test_responses(target: Target) -> None:
    route = {"model": f"openai/{target.model}", "api_base": target.v1, "api_key": "none", "temperature": 0}
    found = litellm.responses(**route, input=QUESTION, max_output_tokens=96)
    assert "Paris" in found.output[-1].content[0].text
    pieces = litellm.responses(**route, input=QUESTION, max_output_tokens=96, stream=True)
    texts = [piece.delta for piece in pieces if piece.type == "response.output_text.delta"]
    assert "Paris" in "".join(texts)


@lite
def test_messages(target: Target) -> None:
    route = {"model": f"anthropic/{target.model}", "api_base": target.url, "api_key": "none"}
    found = asyncio.run(litellm.anthropic_messages(**route, messages=MESSAGES, max_tokens=96, temperature=0))
    assert "Paris" in found["content"][0]["text"]


@lite
def test_errors(route: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**route, "model": route["model"].partition("/")[0] + "/nobody"}, messages=MESSAGES)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**route, messages=[{"role": "user", "content": "word " * 20_000}])


# ---------------------------------------------------------------------------------------------------------- DSPy


def dspy_model(target: Target, **more: Any) -> Any:
    """Its adapters ask for a form that this model does not keep: the model alone is tried."""
    dspy = pytest.importorskip("dspy")
    fixed = {"temperature": 0, "max_tokens": 96, "num_retries": 0, "cache": False}
    return dspy.LM(f"openai/{target.model}", api_base=target.v1, api_key="none", **fixed, **more)


@pytest.mark.client("dspy", "dspy")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_dspy_text(target: Target, api: str) -> None:
    assert "Paris" in str(dspy_model(target, model_type=api)(QUESTION)[0])


@pytest.mark.client("dspy", "dspy")
def test_dspy_structured_output(target: Target) -> None:
    answer = dspy_model(target)(QUESTION, response_format=Capital)[0]
    assert Capital.model_validate_json(str(answer)).city in CITIES
