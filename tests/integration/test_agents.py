"""Agents and clients that people use, on /v1/responses, /v1/messages and /v1/chat/completions of every engine.

On the fakes, which call tools when they are told to; test_clients.py has the embedded engine.
"""

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from tests.fake_engine import TEXT
from tests.harness import Stand

pytestmark = pytest.mark.usefixtures("alone")
KEY = "none"
ANSWER = '{"city": "Paris", "large": true}'


class Capital(BaseModel):
    city: str
    large: bool


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def tool_result(stand: Stand) -> str:
    """What the engine was told that the tool said."""
    (found,) = [message["content"] for message in stand.engine.body["messages"] if message["role"] == "tool"]
    return str(found)


def without_forced_calls(stand: Stand) -> None:
    if stand.engine.dialect == "ollama":
        pytest.skip("Ollama cannot force a call")


# ------------------------------------------------------------------------------------------------ openai-agents


@pytest.fixture(params=["responses", "chat"])
def agents_model(request: pytest.FixtureRequest, stand: Stand) -> Any:
    agents = pytest.importorskip("agents")
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=KEY, max_retries=0)
    kind = agents.OpenAIResponsesModel if request.param == "responses" else agents.OpenAIChatCompletionsModel
    return kind(model=stand.model, openai_client=client)


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_text(stand: Stand, agents_model: Any) -> None:
    import agents

    agent = agents.Agent(name="a", instructions="Be brief.", model=agents_model)
    assert agents.Runner.run_sync(agent, "hi").final_output == TEXT


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_tools(stand: Stand, agents_model: Any) -> None:
    import agents

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    agent = agents.Agent(name="a", model=agents_model, tools=[agents.function_tool(weather)])
    assert agents.Runner.run_sync(agent, "Weather?").final_output == TEXT
    assert tool_result(stand) == "sunny in Köln"


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_stream(stand: Stand, agents_model: Any) -> None:
    import agents

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    agent = agents.Agent(name="a", model=agents_model, tools=[agents.function_tool(weather)])

    async def work() -> tuple[str, str]:
        running = agents.Runner.run_streamed(agent, "Weather?")
        texts = []
        async for event in running.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                texts.append(event.data.delta)
        return "".join(texts), running.final_output

    assert asyncio.run(work()) == (TEXT, TEXT)


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_structured(stand: Stand, agents_model: Any) -> None:
    import agents

    stand.engine.answer = lambda _: ANSWER
    agent = agents.Agent(name="a", model=agents_model, output_type=Capital)
    assert agents.Runner.run_sync(agent, "hi").final_output == Capital(city="Paris", large=True)


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_structured_with_tools(stand: Stand, agents_model: Any) -> None:
    """A tool may be called, and the answer after its result must satisfy the schema."""
    import agents

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    stand.engine.answer = lambda _: ANSWER
    agent = agents.Agent(name="a", model=agents_model, output_type=Capital, tools=[agents.function_tool(weather)])
    assert agents.Runner.run_sync(agent, "hi").final_output == Capital(city="Paris", large=True)
    assert tool_result(stand) == "sunny in Köln"


@pytest.mark.client("openai-agents", "openai-agents")
def test_openai_agents_effort(stand: Stand, agents_model: Any) -> None:
    import agents
    from openai.types.shared import Reasoning

    if isinstance(agents_model, agents.OpenAIChatCompletionsModel):
        pytest.skip("on the chat API the effort is a field of its own")
    settings = agents.ModelSettings(reasoning=Reasoning(effort="low", summary="auto"), store=False)
    agent = agents.Agent(name="a", model=agents_model, model_settings=settings)
    assert agents.Runner.run_sync(agent, "hi").final_output == TEXT


# ---------------------------------------------------------------------------------------------------- LangChain


@pytest.fixture(params=["responses", "chat", "anthropic"])
def langchain_model(request: pytest.FixtureRequest, stand: Stand) -> Any:
    if request.param == "anthropic":
        found = pytest.importorskip("langchain_anthropic")
        return found.ChatAnthropic(model=stand.model, base_url=stand.url, api_key=KEY, max_tokens=256, max_retries=0)
    found = pytest.importorskip("langchain_openai")
    return found.ChatOpenAI(
        model=stand.model,
        base_url=f"{stand.url}/v1",
        api_key=KEY,
        use_responses_api=request.param == "responses",
        http_async_client=httpx.AsyncClient(),  # its own is kept over event loops
        max_retries=0,
        max_tokens=256,
    )


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_text(stand: Stand, langchain_model: Any) -> None:
    found = langchain_model.invoke([("system", "Be brief."), ("user", "hi")])
    assert found.text == TEXT and found.usage_metadata["output_tokens"] > 0


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_stream(stand: Stand, langchain_model: Any) -> None:
    assert "".join(piece.text for piece in langchain_model.stream("hi")) == TEXT

    async def work() -> str:
        return "".join([piece.text async for piece in langchain_model.astream("hi")])

    assert asyncio.run(work()) == TEXT


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_tools(stand: Stand, langchain_model: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    model = langchain_model.bind_tools([weather])
    question = HumanMessage("Weather?")
    called = model.invoke([question])
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Köln"})
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    assert model.invoke([question, called, result]).text == TEXT
    assert tool_result(stand) == "sunny in Köln"
    whole: Any = None
    for piece in model.stream([question]):
        whole = piece if whole is None else whole + piece
    assert whole.tool_calls[0]["args"] == {"city": "Köln"}


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_structured(stand: Stand, langchain_model: Any) -> None:
    stand.engine.answer = lambda _: ANSWER
    model = langchain_model.with_structured_output(Capital, method="json_schema")
    assert model.invoke("hi") == Capital(city="Paris", large=True)


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_structured_by_a_call(stand: Stand, langchain_model: Any) -> None:
    without_forced_calls(stand)
    stand.engine.tool_call = ("Capital", {"city": "Paris", "large": True})
    model = langchain_model.with_structured_output(Capital, method="function_calling")
    assert model.invoke("hi") == Capital(city="Paris", large=True)


@pytest.mark.client("LangChain (scripted)", "langchain-openai")
def test_langchain_knows_a_prompt_that_is_too_long(vllm: Stand) -> None:
    pytest.importorskip("langchain_anthropic")
    from langchain_anthropic import ChatAnthropic
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    ours: Any = {"model": vllm.model, "api_key": KEY, "max_retries": 0}
    for model in (
        ChatOpenAI(base_url=f"{vllm.url}/v1", **ours),
        ChatOpenAI(base_url=f"{vllm.url}/v1", use_responses_api=True, **ours),
        ChatAnthropic(base_url=vllm.url, **ours),
    ):
        vllm.engine.replay_chat("ctx_overflow")
        with pytest.raises(ContextOverflowError):
            model.invoke("hi")


# ------------------------------------------------------------------------------------------------------ LiteLLM


@pytest.fixture(params=["openai", "anthropic"])
def litellm_route(request: pytest.FixtureRequest, stand: Stand) -> dict[str, Any]:
    litellm = pytest.importorskip("litellm")
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    base = f"{stand.url}/v1" if request.param == "openai" else stand.url
    return {"model": f"{request.param}/{stand.model}", "api_base": base, "api_key": KEY, "max_retries": 0}


@pytest.mark.client("litellm", "litellm")
def test_litellm_text(stand: Stand, litellm_route: dict[str, Any]) -> None:
    import litellm

    ask: Any = [{"role": "user", "content": "hi"}]
    found: Any = litellm.completion(**litellm_route, messages=ask, max_tokens=256)
    assert found.choices[0].message.content == TEXT and found.usage.completion_tokens > 0
    pieces: Any = litellm.completion(**litellm_route, messages=ask, max_tokens=256, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TEXT


@pytest.mark.client("litellm", "litellm")
def test_litellm_tools(stand: Stand, litellm_route: dict[str, Any]) -> None:
    import litellm

    stand.engine.tool_call = ("weather", {"city": "Köln"})
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "now", "parameters": parameters}}]
    talk: Any = [{"role": "user", "content": "Weather?"}]
    found: Any = litellm.completion(**litellm_route, messages=talk, tools=tools, max_tokens=256)
    (call,) = found.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    talk += [found.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    found = litellm.completion(**litellm_route, messages=talk, tools=tools, max_tokens=256)
    assert found.choices[0].message.content == TEXT and tool_result(stand) == "sunny"


@pytest.mark.client("litellm", "litellm")
def test_litellm_structured(stand: Stand, litellm_route: dict[str, Any]) -> None:
    import litellm

    stand.engine.answer = lambda _: ANSWER
    if litellm_route["model"].startswith("anthropic/"):
        pytest.skip("litellm knows which of Anthropic's models have it by their names")
    ask: Any = [{"role": "user", "content": "hi"}]
    found: Any = litellm.completion(**litellm_route, messages=ask, response_format=Capital)
    assert Capital.model_validate_json(found.choices[0].message.content).city == "Paris"


@pytest.mark.client("litellm", "litellm")
def test_litellm_responses(stand: Stand) -> None:
    litellm = pytest.importorskip("litellm")
    route = {"model": f"openai/{stand.model}", "api_base": f"{stand.url}/v1", "api_key": KEY}
    found = litellm.responses(**route, input="hi", max_output_tokens=256)
    assert found.output[0].content[0].text == TEXT
    pieces = litellm.responses(**route, input="hi", max_output_tokens=256, stream=True)
    texts = [getattr(piece, "delta", "") for piece in pieces if piece.type == "response.output_text.delta"]
    assert "".join(texts) == TEXT


# --------------------------------------------------------------------------------------------------- instructor


@pytest.mark.client("instructor", "instructor")
@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON", "MD_JSON", "TOOLS", "TOOLS_STRICT", "RESPONSES_TOOLS"])
def test_instructor(stand: Stand, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    import openai

    if "TOOLS" in mode:
        without_forced_calls(stand)
        stand.engine.tool_call = ("Capital", {"city": "Paris", "large": True})
    stand.engine.answer = lambda _: ANSWER
    made = openai.OpenAI(base_url=f"{stand.url}/v1", api_key=KEY, max_retries=0)
    found = instructor.from_openai(made, mode=instructor.Mode[mode])
    ask: Any = {"model": stand.model, "response_model": Capital, "max_retries": 0}
    if mode == "RESPONSES_TOOLS":
        answer = found.responses.create(input="hi", **ask)
    else:
        answer = found.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **ask)
    assert answer.model_dump() == {"city": "Paris", "large": True}


@pytest.mark.client("instructor", "instructor")
@pytest.mark.parametrize("mode", ["ANTHROPIC_TOOLS", "ANTHROPIC_JSON"])
def test_instructor_on_messages(stand: Stand, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    import anthropic

    if "TOOLS" in mode:
        without_forced_calls(stand)
        stand.engine.tool_call = ("Capital", {"city": "Paris", "large": True})
    stand.engine.answer = lambda _: ANSWER
    made = anthropic.Anthropic(base_url=stand.url, api_key=KEY, max_retries=0)
    found = instructor.from_anthropic(made, mode=instructor.Mode[mode])
    ask: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 256, "max_retries": 0}
    answer = found.messages.create(model=stand.model, response_model=Capital, **ask)
    assert answer.model_dump() == {"city": "Paris", "large": True}
