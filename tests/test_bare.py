"""What tests/conformance/bare.py says of an engine's own Responses and Messages routes, on scripted answers."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("anthropic")
from tests.conformance import bare, official, surfaces
from tests.conformance.bare import ACCEPTED, DROPPED, EFFECT, ERROR, NAMED, REFUSED
from tests.conformance.official import COUNT, MESSAGES, RESPONSES

Json = dict[str, Any]


def answer(text: str = "It is warm.", prompt: int = 9, tokens: int = 24, **more: Any) -> Json:
    content = [{"type": "output_text", "text": text, "logprobs": []}]
    output = [{"type": "message", "content": content}]
    usage = {"input_tokens": prompt, "output_tokens": tokens}
    return {"object": "response", "status": "completed", "output": output, "usage": usage, **more}


def call(name: str) -> Json:
    return answer() | {"output": [{"type": "function_call", "name": name, "arguments": "{}"}]}


def refuses(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


def found(key: str, reply: Callable[[Json], Json | httpx.Response], ours: str = surfaces.SAME) -> str:
    """The verdict on that row of an engine that answers so."""

    def handle(request: httpx.Request) -> httpx.Response:
        got = reply(json.loads(request.content or b"{}"))
        return got if isinstance(got, httpx.Response) else httpx.Response(200, json=got)

    client = httpx.Client(base_url="http://engine", transport=httpx.MockTransport(handle))
    side = surfaces.Side("bare", client, "m", lambda: 0, lambda number: [])
    row = next(each for each in official.all_rows() if each.key == key)
    return bare.look(side, row, ours)[0].how


def test_an_unknown_field_that_is_answered_is_dropped() -> None:
    assert found(f"{RESPONSES} frobnicate: 1", lambda body: answer()) == DROPPED
    assert found(f"{COUNT} frobnicate: 1", lambda body: {"input_tokens": 9}) == DROPPED


def test_what_shows_nowhere_is_dropped_only_where_it_must_show() -> None:
    assert found(f'{RESPONSES} user: "x"', lambda body: answer(), surfaces.NAMED) == ACCEPTED
    assert found(f'{RESPONSES} reasoning_effort: "low"', lambda body: answer(), surfaces.REFUSED) == ACCEPTED
    assert found(f'{RESPONSES} conversation: "x"', lambda body: answer(), surfaces.REFUSED) == DROPPED
    assert found(f"{RESPONSES} n: 2", lambda body: answer(), surfaces.REFUSED) == DROPPED
    assert found(f'{RESPONSES} metadata: {{"a": "b"}}', lambda body: answer()) == DROPPED
    assert found(f'{RESPONSES} metadata: {{"a": "b"}}', lambda body: answer(metadata=body.get("metadata"))) == EFFECT


@pytest.mark.parametrize(
    ("status", "message", "how"),
    [
        (400, "n must be 1", REFUSED),
        (400, "bad request", ERROR),
        (500, "bad n", ERROR),
        (500, "several answers are not supported", REFUSED),
        (400, "236 validation errors: {'loc': 'body.n'}", ERROR),
        (400, "1 validation error: {'loc': 'body', 'input': '{n: 2}'}", ERROR),
    ],
)
def test_a_refusal_names_the_field_or_says_what_is_not_supported(status: int, message: str, how: str) -> None:
    assert found(f"{RESPONSES} n: 2", lambda body: refuses(status, message) if "n" in body else answer()) == how


def test_an_answer_of_another_kind_is_an_error() -> None:
    assert found(f"{RESPONSES} n: 2", lambda body: httpx.Response(200, json=[1]) if "n" in body else answer()) == ERROR


def test_a_field_in_the_ignored_ones_is_named() -> None:
    def reply(body: Json) -> httpx.Response:
        return httpx.Response(200, json=answer(), headers={"x-ignored-fields": "user"} if "user" in body else {})

    assert found(f'{RESPONSES} user: "x"', reply) == NAMED


def test_a_tool_that_the_prompt_does_not_hold_is_dropped() -> None:
    key = f"{RESPONSES} tools[web_search]"
    assert found(key, lambda body: answer(prompt=9)) == DROPPED
    assert found(key, lambda body: answer(prompt=9 + len(body["tools"]))) == EFFECT


def test_a_block_in_the_place_of_another_is_held_against_none() -> None:
    def words(body: Json) -> int:
        return len([part for turn in body["messages"] for part in turn["content"] if "text" in part])

    key = f"{MESSAGES} assistant[document]"
    assert found(key, lambda body: {"content": [], "usage": {"input_tokens": words(body)}}) == DROPPED
    assert found(key, lambda body: {"content": [], "usage": {"input_tokens": len(str(body))}}) == EFFECT


def test_a_forced_call_must_be_made() -> None:
    key = f'{RESPONSES} tool_choice[function].name: "other"'
    assert found(key, lambda body: call("weather")) == DROPPED
    assert found(key, lambda body: call(body["tool_choice"]["name"])) == EFFECT
    assert found(key, lambda body: answer()) == DROPPED
    assert found(key, lambda body: answer(tokens=bare.ROOM)) == ACCEPTED  # it may have come


def test_a_format_must_be_kept() -> None:
    key = f"{RESPONSES} text.format[json_schema]"
    assert found(key, lambda body: answer()) == DROPPED
    assert found(key, lambda body: answer('{"city": "Bonn"}' if "text" in body else "Bonn")) == EFFECT


def test_sampling_is_seen_where_answers_vary() -> None:
    varying = (str(number) * bare.BEGINNING for number in itertools.count())
    assert found(f"{RESPONSES} seed: 7", lambda body: answer(next(varying))) == DROPPED
    assert found(f"{RESPONSES} seed: 7", lambda body: answer("a" * 99 if "seed" in body else next(varying))) == EFFECT
    assert found(f"{RESPONSES} seed: 7", lambda body: answer()) == ACCEPTED


def test_a_difference_that_does_not_come_again_is_chance() -> None:
    varying = (str(number) for number in itertools.count())
    assert found(f'{RESPONSES} user: "x"', lambda body: answer(next(varying))) == ACCEPTED


def test_the_table_is_that_of_the_results_and_each_drop_can_be_read() -> None:
    text = bare.README.read_text()
    assert text == bare.with_table(text), "run python -m tests.conformance.bare --table"
    for engine in bare.ENGINES:
        for side in bare.SIDES:
            for key, row in bare.load(engine).get(side, {}).items():
                assert row["how"] != DROPPED or {"note", "asked", "without", "with"} <= row.keys(), key
