"""Clients from npm on real engines: openai, Anthropic's, Vercel's AI SDK and LangChain.js (`node/*.mjs`)."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration import npm
from tests.integration.asked import CITIES
from tests.integration.conftest import Target

pytestmark = npm.needed
openai = pytest.mark.client("openai (JavaScript)", "npm:openai")
anthropic = pytest.mark.client("@anthropic-ai/sdk", "npm:@anthropic-ai/sdk")
ai = pytest.mark.client(
    "AI SDK", "npm:ai", "npm:@ai-sdk/openai", "npm:@ai-sdk/openai-compatible", "npm:@ai-sdk/anthropic"
)
langchain = pytest.mark.client("LangChain.js", "npm:@langchain/openai", "npm:@langchain/anthropic")


def ask(script: str, feature: str, target: Target, home: Path) -> Any:
    return npm.script(script, feature, target.url, target.model, home)


def good(found: Any) -> None:
    """The question was answered, or a structure or the arguments of a call were as enforced."""
    if "text" in found:
        assert "Paris" in found["text"], found
    else:
        assert found["city"] in CITIES, found
    assert found.get("tokens", 1) > 0 and found.get("steps", 2) == 2, found


@openai
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("feature", ["", "_stream", "_structured", "_tools"], ids=["text", "stream", "schema", "tools"])
def test_openai(target: Target, tmp_path: Path, api: str, feature: str) -> None:
    good(ask("openai", api + feature, target, tmp_path))


@anthropic
@pytest.mark.parametrize("feature", ["text", "stream", "tools"])
def test_anthropic(target: Target, tmp_path: Path, feature: str) -> None:
    good(ask("anthropic", feature, target, tmp_path))


@anthropic
def test_anthropic_count_tokens(target: Target, tmp_path: Path) -> None:
    assert ask("anthropic", "count_tokens", target, tmp_path)["tokens"] > 5


@anthropic
def test_anthropic_models(target: Target, tmp_path: Path) -> None:
    assert ask("anthropic", "models", target, tmp_path)["found"]


@ai
@pytest.mark.parametrize("provider", ["responses", "chat", "compatible", "anthropic"])
@pytest.mark.parametrize("feature", ["text", "stream", "structured", "tools"])
def test_ai_sdk(target: Target, tmp_path: Path, provider: str, feature: str) -> None:
    good(ask("ai", f"{feature} {provider}", target, tmp_path))


@langchain
@pytest.mark.parametrize("api", ["chat", "responses", "anthropic"])
@pytest.mark.parametrize("feature", ["text", "stream", "structured", "tools"])
def test_langchain_js(target: Target, tmp_path: Path, api: str, feature: str) -> None:
    good(ask("langchain", f"{feature} {api}", target, tmp_path))
