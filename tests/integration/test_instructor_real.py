"""instructor on real engines: the modes of OpenAI's two APIs and of Anthropic's that enforce a structure.

JSON, MD_JSON and ANTHROPIC_JSON ask for one in words, too much for this model: test_agents.py has them, scripted.
"""

from typing import Any

import pytest

from tests.integration.asked import CITIES, STRUCTURE_QUESTION, Capital
from tests.integration.conftest import Target

instructor = pytest.importorskip("instructor")
pytestmark = pytest.mark.client("instructor", "instructor", "openai", "anthropic")
ASK: Any = {"response_model": Capital, "max_retries": 0, "temperature": 0}
TALK: Any = [{"role": "user", "content": STRUCTURE_QUESTION}]


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS", "TOOLS_STRICT"])
def test_chat(target: Target, mode: str) -> None:
    import openai

    made = openai.OpenAI(base_url=target.v1, api_key="none", max_retries=0)
    client = instructor.from_openai(made, mode=instructor.Mode[mode])
    asked = {"model": target.model, "messages": TALK, "max_tokens": 200, **ASK}
    assert client.chat.completions.create(**asked).city in CITIES


def test_chat_partial(target: Target) -> None:
    import openai

    made = openai.OpenAI(base_url=target.v1, api_key="none", max_retries=0)
    client = instructor.from_openai(made, mode=instructor.Mode.JSON_SCHEMA)
    pieces = list(client.chat.completions.create_partial(model=target.model, messages=TALK, max_tokens=200, **ASK))
    assert pieces[-1].city in CITIES


def test_responses_tools(target: Target) -> None:
    import openai

    made = openai.OpenAI(base_url=target.v1, api_key="none", max_retries=0)
    client = instructor.from_openai(made, mode=instructor.Mode.RESPONSES_TOOLS)
    assert client.responses.create(model=target.model, input=STRUCTURE_QUESTION, **ASK).city in CITIES


def test_messages_tools(target: Target) -> None:
    import anthropic

    made = anthropic.Anthropic(base_url=target.url, api_key="none", max_retries=0)
    client = instructor.from_anthropic(made, mode=instructor.Mode.ANTHROPIC_TOOLS)
    asked: Any = {"model": target.model, "messages": TALK, "max_tokens": 200}
    found = client.messages.create(**asked, response_model=Capital, max_retries=0)
    assert found.city in CITIES
