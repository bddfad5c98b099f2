"""LlamaIndex on real engines: OpenAILike (chat), and Anthropic."""

from typing import Any

import pytest

from tests.integration.asked import CITIES, QUESTION, STRUCTURE_QUESTION, WEATHER_QUESTION, Capital
from tests.integration.conftest import ALIAS, Target

pytest.importorskip("llama_index.core")
pytestmark = pytest.mark.client(
    "llama-index", "llama-index-core", "llama-index-llms-openai-like", "llama-index-llms-anthropic"
)


@pytest.fixture(params=["chat", "anthropic"])
def llm(request: pytest.FixtureRequest, target: Target) -> Any:
    fixed: dict[str, Any] = {"temperature": 0, "max_tokens": 96, "max_retries": 0, "api_key": "none"}
    if request.param == "anthropic":
        from llama_index.llms.anthropic import Anthropic

        if not target.ours:
            pytest.skip("it takes only Anthropic's names of models: an alias of ours")
        return Anthropic(model=ALIAS, base_url=target.url, **fixed)
    from llama_index.llms.openai_like import OpenAILike

    known: Any = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 8192}
    return OpenAILike(model=target.model, api_base=target.v1, **known, **fixed)


def talk(text: str) -> list[Any]:
    from llama_index.core.llms import ChatMessage

    return [ChatMessage(role="user", content=text)]


def test_text(llm: Any) -> None:
    assert "Paris" in llm.chat(talk(QUESTION)).message.content


def test_stream(llm: Any) -> None:
    assert "Paris" in "".join(piece.delta or "" for piece in llm.stream_chat(talk(QUESTION)))


def test_tools(llm: Any) -> None:
    from llama_index.core.tools import FunctionTool

    seen = []

    def weather(city: str) -> str:
        """The weather in a city."""
        seen.append(city)
        return "sunny"

    tool = FunctionTool.from_defaults(fn=weather)
    found = llm.chat_with_tools([tool], user_msg=WEATHER_QUESTION, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(found)
    assert call.tool_name == "weather" and call.tool_kwargs["city"]


def test_structured_output(llm: Any) -> None:
    assert llm.as_structured_llm(Capital).chat(talk(STRUCTURE_QUESTION)).raw.city in CITIES
