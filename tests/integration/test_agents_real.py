"""openai-agents on real engines: text, streams, a round of tools, structured output, on both of OpenAI's APIs."""

import asyncio
import warnings
from typing import Any

import pytest

from tests.integration.asked import CITIES, QUESTION, STRUCTURE_QUESTION, WEATHER_QUESTION, Capital
from tests.integration.conftest import Target

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.client("openai-agents", "openai-agents")


@pytest.fixture(params=["responses", "chat"])
def model(request: pytest.FixtureRequest, target: Target) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=target.v1, api_key="none", max_retries=0)
    kind = agents.OpenAIResponsesModel if request.param == "responses" else agents.OpenAIChatCompletionsModel
    return kind(model=target.model, openai_client=client)


def agent(model: Any, **more: Any) -> Any:
    settings = agents.ModelSettings(temperature=0, max_tokens=128, **more.pop("settings", {}))
    return agents.Agent(name="a", model=model, model_settings=settings, **more)


def test_text(model: Any) -> None:
    assert "Paris" in agents.Runner.run_sync(agent(model, instructions="Be brief."), QUESTION).final_output


def test_stream(model: Any) -> None:
    async def work() -> tuple[str, str]:
        running = agents.Runner.run_streamed(agent(model), QUESTION)
        texts = []
        async for event in running.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                texts.append(event.data.delta)
        return "".join(texts), running.final_output

    streamed, whole = asyncio.run(work())
    assert streamed == whole and "Paris" in whole


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tools(model: Any, streamed: bool) -> None:
    """The call is forced, the tool runs, and its result goes back."""
    seen = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        seen.append(city)
        return "sunny"

    made = agent(model, tools=[weather], settings={"tool_choice": "required"})

    async def work() -> str:
        if not streamed:
            return str((await agents.Runner.run(made, WEATHER_QUESTION)).final_output)
        running = agents.Runner.run_streamed(made, WEATHER_QUESTION)
        async for _ in running.stream_events():
            pass
        return str(running.final_output)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert asyncio.run(work())
    assert seen


def test_structured_output(model: Any) -> None:
    found = agents.Runner.run_sync(agent(model, output_type=Capital), STRUCTURE_QUESTION).final_output
    assert found.city in CITIES


def test_handoff(model: Any) -> None:
    """A handoff is a call of a tool that has no parameters."""
    other = agent(model, instructions="Be brief.")
    handoff = agents.handoff(other, tool_name_override="weather")
    made = agent(model, handoffs=[handoff], settings={"tool_choice": "required"})
    found = agents.Runner.run_sync(made, QUESTION)
    assert found.final_output and found.last_agent is other
