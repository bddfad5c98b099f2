"""LangChain's own standard suites (`langchain-tests`) on real engines: ChatOpenAI on both APIs, and ChatAnthropic."""

from typing import Any

import pytest

pytest.importorskip("langchain_tests")
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.integration.conftest import Target


class Standard(ChatModelIntegrationTests):
    """What the three have in common. Images, sound and documents are for models that take them."""

    @pytest.fixture(autouse=True)
    def _at(self, target: Target) -> None:
        type(self).server = target

    server: Target

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {"temperature": 0, "max_tokens": 96, "max_retries": 0, "timeout": 120}
        return {"model": self.server.model, "api_key": "none", "base_url": self.server.v1, **fixed}

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return True


@pytest.mark.client("langchain-openai, chat (standard suite)", "langchain-openai", "langchain-tests")
class TestChat(Standard):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": False, "stream_usage": True}


@pytest.mark.client("langchain-openai, responses (standard suite)", "langchain-openai", "langchain-tests")
class TestResponses(Standard):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


@pytest.mark.client("langchain-anthropic (standard suite)", "langchain-anthropic", "langchain-tests")
class TestAnthropic(Standard):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "base_url": self.server.url}
