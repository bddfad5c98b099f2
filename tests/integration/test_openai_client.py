"""The official OpenAI client on real engines: chat, responses, completions, models; sync and async."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.integration.asked import CHAT_TOOL, CITIES, MESSAGES, QUESTION, RESPONSES_TOOL, WEATHER_QUESTION, Capital
from tests.integration.conftest import Target

pytestmark = pytest.mark.client("openai (Python)", "openai")
FORCED: Any = {"type": "function", "function": {"name": "weather"}}
WEATHER: Any = [{"role": "user", "content": WEATHER_QUESTION}]


@pytest.fixture
def client(target: Target) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=target.v1, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def asynchronous(target: Target) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=target.v1, api_key="none", max_retries=0, timeout=120)


def chat(target: Target, **more: Any) -> Any:
    return {"model": target.model, "messages": MESSAGES, "max_tokens": 96, "temperature": 0, **more}


def response(target: Target, **more: Any) -> Any:
    return {"model": target.model, "input": QUESTION, "max_output_tokens": 96, "temperature": 0, **more}


def test_models(client: openai.OpenAI, target: Target) -> None:
    assert target.model in [each.id for each in client.models.list()]


def test_chat(client: openai.OpenAI, target: Target) -> None:
    found = client.chat.completions.create(**chat(target))
    assert "Paris" in found.choices[0].message.content and found.usage.completion_tokens > 0


def test_chat_stream(client: openai.OpenAI, target: Target) -> None:
    chunks = list(client.chat.completions.create(**chat(target, stream=True, stream_options={"include_usage": True})))
    assert "Paris" in "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert chunks[-1].usage.completion_tokens > 0


def test_chat_stream_helper(client: openai.OpenAI, target: Target) -> None:
    with client.chat.completions.stream(**chat(target)) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content


def test_chat_async(target: Target) -> None:
    async def work() -> tuple[str, str]:
        async with asynchronous(target) as client:
            whole = await client.chat.completions.create(**chat(target))
            stream = await client.chat.completions.create(**chat(target, stream=True))
            pieces = [each.choices[0].delta.content or "" async for each in stream if each.choices]
            return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(work())
    assert "Paris" in whole and "Paris" in streamed


def test_chat_parse(client: openai.OpenAI, target: Target) -> None:
    found = client.chat.completions.parse(**chat(target, response_format=Capital))
    assert found.choices[0].message.parsed.city in CITIES


def test_chat_json_object(client: openai.OpenAI, target: Target) -> None:
    asked = chat(target, response_format={"type": "json_object"}, max_tokens=400)
    asked["messages"] = [{"role": "user", "content": 'Answer with this JSON: {"city": "Paris"}'}]
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_chat_logprobs(client: openai.OpenAI, target: Target) -> None:
    found = client.chat.completions.create(**chat(target, logprobs=True, top_logprobs=2))
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2


def test_chat_tools(client: openai.OpenAI, target: Target) -> None:
    """A forced call, and its result sent back."""
    talk = list(WEATHER)
    found = client.chat.completions.create(**chat(target, messages=talk, tools=[CHAT_TOOL], tool_choice=FORCED))
    message = found.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in CITIES
    talk += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(**chat(target, messages=talk, tools=[CHAT_TOOL])).choices[0].message


@pytest.mark.parametrize("choice", ["function", "required"])
def test_chat_tools_stream(client: openai.OpenAI, target: Target, choice: str) -> None:
    forced = FORCED if choice == "function" else "required"
    with client.chat.completions.stream(
        **chat(target, messages=WEATHER, tools=[CHAT_TOOL], tool_choice=forced)
    ) as stream:
        list(stream)
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES


def test_chat_tools_offered(client: openai.OpenAI, target: Target) -> None:
    found = client.chat.completions.create(**chat(target, tools=[CHAT_TOOL], parallel_tool_calls=False))
    assert found.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses(client: openai.OpenAI, target: Target) -> None:
    found = client.responses.create(**response(target, instructions="Be brief."))
    assert "Paris" in found.output_text and found.usage.output_tokens > 0


def test_responses_stream(client: openai.OpenAI, target: Target) -> None:
    events = list(client.responses.create(**response(target, stream=True)))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == text and "Paris" in text


def test_responses_stream_helper(client: openai.OpenAI, target: Target) -> None:
    with client.responses.stream(**response(target)) as stream:
        list(stream)
        assert "Paris" in stream.get_final_response().output_text


def test_responses_async(target: Target) -> None:
    async def work() -> tuple[str, str]:
        async with asynchronous(target) as client:
            whole = await client.responses.create(**response(target))
            stream = await client.responses.create(**response(target, stream=True))
            pieces = [each.delta async for each in stream if each.type == "response.output_text.delta"]
            return whole.output_text, "".join(pieces)

    whole, streamed = asyncio.run(work())
    assert "Paris" in whole and "Paris" in streamed


def test_responses_parse(client: openai.OpenAI, target: Target) -> None:
    assert client.responses.parse(**response(target, text_format=Capital)).output_parsed.city in CITIES


@pytest.mark.parametrize("choice", ["function", "required"])
def test_responses_tools(client: openai.OpenAI, target: Target, choice: str) -> None:
    """A forced call, and its result sent back."""
    forced = {"type": "function", "name": "weather"} if choice == "function" else "required"
    talk: list[Any] = list(WEATHER)
    found = client.responses.create(**response(target, input=talk, tools=[RESPONSES_TOOL], tool_choice=forced))
    (call,) = [item for item in found.output if item.type == "function_call"]
    assert call.name == "weather" and json.loads(call.arguments)["city"] in CITIES
    talk += [*found.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(**response(target, input=talk, tools=[RESPONSES_TOOL])).output


def test_responses_tools_stream(client: openai.OpenAI, target: Target) -> None:
    with client.responses.stream(
        **response(target, input=WEATHER, tools=[RESPONSES_TOOL], tool_choice="required")
    ) as stream:
        list(stream)
        (call,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in CITIES


def test_responses_that_end_early(client: openai.OpenAI, target: Target) -> None:
    found = client.responses.create(**response(target, max_output_tokens=2))
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_completions(client: openai.OpenAI, target: Target) -> None:
    asked: Any = {"model": target.model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    assert "Paris" in client.completions.create(**asked).choices[0].text
    assert "Paris" in "".join(each.choices[0].text for each in client.completions.create(**asked, stream=True))


def test_errors(client: openai.OpenAI, target: Target) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat(target, model="nobody"))
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**response(target, model="nobody"))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**chat(target, temperature=9))


def test_a_prompt_that_is_too_long(client: openai.OpenAI, target: Target) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**chat(target, messages=[{"role": "user", "content": "word " * 20_000}]))
    assert raised.value.code == "context_length_exceeded"
