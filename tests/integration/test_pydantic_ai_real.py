"""pydantic-ai's three models on real engines."""

import asyncio
from typing import Any

import pytest

from tests.integration.asked import CITIES, QUESTION, STRUCTURE_QUESTION, WEATHER_QUESTION, Capital
from tests.integration.conftest import Target

pydantic_ai = pytest.importorskip("pydantic_ai")
pytestmark = pytest.mark.client("pydantic-ai", "pydantic-ai-slim")
SETTINGS: Any = {"temperature": 0, "max_tokens": 128}


@pytest.fixture(params=["responses", "chat", "anthropic"])
def model(request: pytest.FixtureRequest, target: Target) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if request.param == "anthropic":
        profile: Any = {"supports_json_schema_output": True}  # it knows which models have it by their names
        provider = AnthropicProvider(base_url=target.url, api_key="none")
        return AnthropicModel(target.model, provider=provider, profile=profile)
    kind = OpenAIResponsesModel if request.param == "responses" else OpenAIChatModel
    return kind(target.model, provider=OpenAIProvider(base_url=target.v1, api_key="none"))


def agent(model: Any, **more: Any) -> Any:
    return pydantic_ai.Agent(model, model_settings=SETTINGS, **more)


def test_text(model: Any) -> None:
    found = agent(model, instructions="Be brief.").run_sync(QUESTION)
    assert "Paris" in found.output and found.usage.output_tokens > 0


def test_stream(model: Any) -> None:
    async def work() -> str:
        async with agent(model).run_stream(QUESTION) as running:
            return "".join([piece async for piece in running.stream_text(delta=True)])

    assert "Paris" in asyncio.run(work())


def test_tools(model: Any) -> None:
    """The model may call the tool, its template leads it to; the result goes back."""
    seen = []

    def weather(city: str) -> str:
        """The weather in a city."""
        seen.append(city)
        return "sunny"

    assert agent(model, tools=[weather]).run_sync(WEATHER_QUESTION).output
    assert seen


def test_structured_output(model: Any) -> None:
    found = agent(model, output_type=pydantic_ai.NativeOutput(Capital)).run_sync(STRUCTURE_QUESTION)
    assert found.output.city in CITIES


def test_structured_output_by_a_call(model: Any) -> None:
    found = agent(model, output_type=pydantic_ai.ToolOutput(Capital, max_retries=3)).run_sync(STRUCTURE_QUESTION)
    assert found.output.city in CITIES
