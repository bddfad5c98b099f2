"""The official Anthropic client on real engines: messages, streams, tools, counts, models; sync and async."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.integration.asked import CITIES, MESSAGES, MESSAGES_TOOL, PARAMETERS, WEATHER_QUESTION, Capital
from tests.integration.conftest import Target

pytestmark = pytest.mark.client("anthropic (Python)", "anthropic")
FORCED: Any = {"type": "tool", "name": "weather"}
WEATHER = [{"role": "user", "content": WEATHER_QUESTION}]


@pytest.fixture
def client(target: Target) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=target.url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ask(target: Target, **more: Any) -> Any:
    return {"model": target.model, "messages": MESSAGES, "max_tokens": 96, "extra_body": {"temperature": 0}, **more}


def test_messages(client: anthropic.Anthropic, target: Target) -> None:
    found = client.messages.create(**ask(target, system="Be brief."))
    assert "Paris" in found.content[0].text and found.usage.output_tokens > 0
    assert found.stop_reason in ("end_turn", "max_tokens")


def test_messages_stream(client: anthropic.Anthropic, target: Target) -> None:
    with client.messages.stream(**ask(target)) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert "Paris" in text and message.content[0].text == text
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0


def test_messages_async(target: Target) -> None:
    async def work() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=target.url, api_key="none", max_retries=0) as client:
            whole = await client.messages.create(**ask(target))
            async with client.messages.stream(**ask(target)) as stream:
                return whole.content[0].text, "".join([piece async for piece in stream.text_stream])

    whole, streamed = asyncio.run(work())
    assert "Paris" in whole and "Paris" in streamed


@pytest.mark.parametrize("choice", ["tool", "any"])
def test_tools(client: anthropic.Anthropic, target: Target, choice: str) -> None:
    """A forced call, and its result sent back."""
    forced = FORCED if choice == "tool" else {"type": "any", "disable_parallel_tool_use": True}
    talk: list[Any] = list(WEATHER)
    found = client.messages.create(**ask(target, messages=talk, tools=[MESSAGES_TOOL], tool_choice=forced))
    (call,) = [block for block in found.content if block.type == "tool_use"]
    assert found.stop_reason == "tool_use" and call.input["city"] in CITIES
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    talk += [{"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**ask(target, messages=talk, tools=[MESSAGES_TOOL])).content


def test_tools_stream(client: anthropic.Anthropic, target: Target) -> None:
    with client.messages.stream(**ask(target, messages=WEATHER, tools=[MESSAGES_TOOL], tool_choice=FORCED)) as stream:
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and call.input["city"] in CITIES


def test_tools_offered(client: anthropic.Anthropic, target: Target) -> None:
    found = client.messages.create(**ask(target, tools=[MESSAGES_TOOL]))
    assert found.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_structured_output(client: anthropic.Anthropic, target: Target) -> None:
    """`parse`, and the schema written by hand."""
    assert client.messages.parse(**ask(target, output_format=Capital)).parsed_output.city in CITIES
    written = {"format": {"type": "json_schema", "schema": PARAMETERS}}
    found = client.messages.create(**ask(target, output_config=written))
    assert any(city in found.content[0].text for city in CITIES)


@pytest.mark.fails_on(["llama.cpp"], "llama.cpp's chat API does not say that a stop sequence was met")
def test_stop_sequences(client: anthropic.Anthropic, target: Target) -> None:
    found = client.messages.create(**ask(target, stop_sequences=["Paris", "paris"]))
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "Paris")


def test_thinking_and_hints(client: anthropic.Anthropic, target: Target) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    more: Any = {"system": system, "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}}
    assert client.messages.create(**ask(target, **more)).content[0].text


def test_count_tokens(client: anthropic.Anthropic, target: Target) -> None:
    asked: Any = {"model": target.model, "messages": MESSAGES, "tools": [MESSAGES_TOOL]}
    found = client.messages.count_tokens(**asked)
    used = client.messages.create(**ask(target, tools=[MESSAGES_TOOL])).usage
    assert found.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_models(client: anthropic.Anthropic, target: Target) -> None:
    found = client.models.list()
    assert target.model in [each.id for each in found] and found.data[0].type == "model"


def test_errors(client: anthropic.Anthropic, target: Target) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ask(target, model="nobody"))
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**ask(target, messages=[{"role": "user", "content": "word " * 20_000}]))
    assert raised.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert "prompt is too long" in str(raised.value)
