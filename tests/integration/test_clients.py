"""README's examples for LangChain, instructor and openai, on our server with the real embedded engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import llm_inference as product
from tests.harness import serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(product.create_app(product.Settings(engine="llamacpp"))) as found:
        yield found + "/v1"


def test_langchain(url: str) -> None:
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI

    llm = ChatOpenAI(
        base_url=url, api_key="none", model="llamacpp/SmolLM2-135M-Instruct.Q4_1", temperature=0, max_tokens=24
    )
    assert "Paris" in llm.invoke("What is the capital of France? Answer in one short sentence.").text
    assert "Paris" in "".join(
        piece.text for piece in llm.stream("What is the capital of France? Answer in one short sentence.")
    )


def test_instructor(url: str) -> None:
    instructor = pytest.importorskip("instructor")
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        city: str
        country: str

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
    ask = [{"role": "user", "content": "Paris is the capital of France."}]
    found = client.chat.completions.create(
        model="llamacpp/SmolLM2-135M-Instruct.Q4_1", messages=ask, response_model=City, max_tokens=64, temperature=0
    )
    assert isinstance(found, City) and found.city


def test_openai(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    ask = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    assert (
        "Paris"
        in client.chat.completions.create(
            model="llamacpp/SmolLM2-135M-Instruct.Q4_1", messages=ask, max_tokens=24, temperature=0
        )
        .choices[0]
        .message.content
    )
