"""/v1/rerank, /tokenize and /detokenize: the same answer on every engine that has them, a refusal by name elsewhere."""

from typing import Any

import httpx
import pytest

from tests.fake_engine import Json
from tests.harness import Stand, refused_v1

pytestmark = pytest.mark.usefixtures("alone")

RERANK, TOKENIZE, DETOKENIZE = "/v1/rerank", "/tokenize", "/detokenize"
DOCUMENTS: list[Any] = ["rome", {"text": "paris paris"}, "paris"]
BODIES: dict[str, Json] = {
    RERANK: {"query": "paris", "documents": DOCUMENTS},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [104, 105]},
}


def ask(stand: Stand, path: str, body: Json) -> httpx.Response:
    return stand.client.post(path, json=body)


@pytest.fixture(params=["vllm", "sglang", "llamacpp"])
def able(request: pytest.FixtureRequest, all_stands: dict[str, Stand]) -> Stand:
    """The app in front of each engine that has these routes."""
    found = all_stands[request.param]
    found.engine.reset()
    return found


@pytest.mark.parametrize("path", BODIES)
def test_ollama_refuses_by_name(path: str, all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    reply = ask(stand, path, BODIES[path] | {"model": stand.model})
    refused_v1(reply, "unsupported_feature")
    assert f"ollama has no {path}" in reply.text


def test_documents_are_ordered_by_their_relevance(able: Stand) -> None:
    reply = ask(able, RERANK, BODIES[RERANK] | {"model": able.model})
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["model"] == able.model
    assert answer["results"] == [
        {"index": 1, "relevance_score": 2.0, "document": {"text": "paris paris"}},
        {"index": 2, "relevance_score": 1.0, "document": {"text": "paris"}},
        {"index": 0, "relevance_score": 0.0, "document": {"text": "rome"}},
    ]
    assert able.engine.requests[-1].json["documents"] == ["rome", "paris paris", "paris"]


def test_top_n_and_return_documents(able: Stand) -> None:
    body = BODIES[RERANK] | {"model": able.model, "top_n": 1, "return_documents": False}
    assert ask(able, RERANK, body).json()["results"] == [{"index": 1, "relevance_score": 2.0}]


def test_top_n_zero_means_all(able: Stand) -> None:
    body = BODIES[RERANK] | {"model": able.model, "top_n": 0}
    assert len(ask(able, RERANK, body).json()["results"]) == 3


def test_a_prompt_has_the_same_tokens_everywhere(able: Stand) -> None:
    answer = ask(able, TOKENIZE, {"model": able.model, "prompt": "hi"}).json()
    assert answer["tokens"] == [1, 104, 105], "special tokens are added by default"
    assert (answer["count"], answer["max_model_len"]) == (3, able.engine.context)


def test_without_special_tokens(able: Stand) -> None:
    body = {"model": able.model, "prompt": "hi", "add_special_tokens": False}
    assert ask(able, TOKENIZE, body).json()["tokens"] == [104, 105]


def test_no_model_is_the_default_one(able: Stand) -> None:
    assert ask(able, TOKENIZE, {"prompt": "hi"}).json()["count"] == 3


def test_messages_are_counted_with_their_template(able: Stand) -> None:
    few = ask(able, TOKENIZE, {"model": able.model, "messages": [{"role": "user", "content": "hi"}]}).json()
    more = ask(able, TOKENIZE, {"model": able.model, "messages": [{"role": "user", "content": "hi" * 9}]}).json()
    assert more["count"] == few["count"] + 16


def test_texts_of_tokens(able: Stand) -> None:
    reply = ask(able, TOKENIZE, {"model": able.model, "prompt": "hi", "return_token_strs": True})
    if able.engine.dialect == "sglang":
        refused_v1(reply, "unsupported_feature")
        assert "return_token_strs" in reply.text
    else:
        assert reply.json()["token_strs"][1:] == ["h", "i"]


def test_tokens_become_text(able: Stand) -> None:
    assert ask(able, DETOKENIZE, BODIES[DETOKENIZE] | {"model": able.model}).json() == {"prompt": "hi"}


@pytest.mark.parametrize(
    ("path", "change", "name"),
    [
        (RERANK, {"documents": []}, "documents"),
        (RERANK, {"documents": ["a", 5]}, "documents"),
        (RERANK, {"documents": [{"text": "a", "title": "b"}]}, "documents"),
        (RERANK, {"query": None}, "query"),
        (RERANK, {"top_n": -1}, "top_n"),
        (RERANK, {"rank_fields": ["text"]}, "rank_fields"),
        (TOKENIZE, {"prompt": None}, "prompt"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        (TOKENIZE, {"prompt": ["a", "b"]}, "prompt"),
        (TOKENIZE, {"add_special_tokens": "no"}, "add_special_tokens"),
        (TOKENIZE, {"max_tokens": 4}, "max_tokens"),
        (DETOKENIZE, {"tokens": "hi"}, "tokens"),
        (DETOKENIZE, {"tokens": [-1]}, "tokens"),
        (DETOKENIZE, {"tokens": [1.5]}, "tokens"),
    ],
)
def test_a_bad_field_is_named(able: Stand, path: str, change: Json, name: str) -> None:
    reply = ask(able, path, BODIES[path] | {"model": able.model} | change)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert name in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_model(able: Stand, path: str) -> None:
    refused_v1(ask(able, path, BODIES[path] | {"model": "nope"}), "model_not_found")


def test_the_embedded_engine(real: httpx.Client) -> None:
    model = real.get("/v1/models").json()["data"][0]["id"]
    messages = [{"role": "user", "content": "Hi"}]
    counted = real.post(TOKENIZE, json={"model": model, "messages": messages}).json()
    answer = real.post("/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 1}).json()
    assert counted["count"] == len(counted["tokens"]) == answer["usage"]["prompt_tokens"]
    text = "Hello 世界"
    tokens = real.post(TOKENIZE, json={"model": model, "prompt": text}).json()["tokens"]
    assert real.post(DETOKENIZE, json={"model": model, "tokens": tokens}).json() == {"prompt": text}
    beyond = real.post(DETOKENIZE, json={"model": model, "tokens": [10**6]})
    refused_v1(beyond, "invalid_request")
    assert "0 to 49151" in beyond.text
    refused_v1(real.post(RERANK, json=BODIES[RERANK] | {"model": model}), "unsupported_feature")
