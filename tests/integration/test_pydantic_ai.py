"""pydantic-ai's three models on every engine. The scripted ones."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel

from tests.fake_engine import TEXT
from tests.harness import Stand

pytest.importorskip("pydantic_ai")
pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.client("pydantic-ai", "pydantic-ai-slim")]


class Capital(BaseModel):
    city: str
    large: bool


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture(params=["responses", "chat", "anthropic"])
def pydantic_model(request: pytest.FixtureRequest, stand: Stand) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if request.param == "anthropic":
        profile = {"supports_json_schema_output": True}  # it knows which of Anthropic's models have it by their names
        provider = AnthropicProvider(base_url=stand.url, api_key="none")
        return AnthropicModel(stand.model, provider=provider, profile=profile)  # type: ignore[arg-type]
    provider = OpenAIProvider(base_url=f"{stand.url}/v1", api_key="none")
    kind = OpenAIResponsesModel if request.param == "responses" else OpenAIChatModel
    return kind(stand.model, provider=provider)


def test_pydantic_ai_text(stand: Stand, pydantic_model: Any) -> None:
    from pydantic_ai import Agent

    found = Agent(pydantic_model, instructions="Be brief.").run_sync("hi")
    assert found.output == TEXT and found.usage.output_tokens > 0


def test_pydantic_ai_tools(stand: Stand, pydantic_model: Any) -> None:
    from pydantic_ai import Agent

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    assert Agent(pydantic_model, tools=[weather]).run_sync("Weather?").output == TEXT
    assert stand.engine.body["messages"][-1]["content"] == "sunny in Köln"


def test_pydantic_ai_stream(stand: Stand, pydantic_model: Any) -> None:
    from pydantic_ai import Agent

    stand.engine.tool_call = ("weather", {"city": "Köln"})

    async def work() -> str:
        async with Agent(pydantic_model, tools=[weather]).run_stream("Weather?") as running:
            return "".join([piece async for piece in running.stream_text(delta=True)])

    assert asyncio.run(work()) == TEXT


def test_pydantic_ai_structured(stand: Stand, pydantic_model: Any) -> None:
    from pydantic_ai import Agent, NativeOutput

    stand.engine.answer = lambda _: '{"city": "Paris", "large": true}'
    found = Agent(pydantic_model, output_type=NativeOutput(Capital)).run_sync("hi")
    assert found.output == Capital(city="Paris", large=True)


def test_pydantic_ai_structured_by_a_call(stand: Stand, pydantic_model: Any) -> None:
    from pydantic_ai import Agent

    if stand.engine.dialect == "ollama":
        pytest.skip("Ollama cannot force a call")
    stand.engine.tool_call = ("final_result", {"city": "Paris", "large": True})
    found = Agent(pydantic_model, output_type=Capital).run_sync("hi")
    assert found.output == Capital(city="Paris", large=True)
