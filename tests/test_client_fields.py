"""Every field of the official clients' requests to /v1/responses and /v1/messages, on the scripted engines: none is
dropped in silence, and what becomes of each is what tests/conformance/README.md says."""

import functools
import json
from typing import Any

import pytest

pytest.importorskip("anthropic")
import llm_inference as product
from tests.conformance import official, surfaces
from tests.conformance.official import COUNT, MESSAGES, RESPONSES, Row
from tests.fake_engine import DIALECTS, Dialect

pytestmark = pytest.mark.usefixtures("alone")
COMMITTED = surfaces.load()
AGAIN = "look at what becomes of it, and run python -m tests.conformance.surfaces"


@functools.cache
def rows() -> list[Row]:
    """Made once, and not where tests are collected alone."""
    return official.all_rows()


def row(key: str) -> Row:
    return next(each for each in rows() if each.key == key)


def hows(dialect: Dialect, *keys: str) -> dict[str, str]:
    """What becomes of these rows, asked now."""
    found = surfaces.measure(dialect, [row(key) for key in keys] if keys else rows())
    return {key: surfaces.cell(verdicts) for key, verdicts in found.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_field_of_a_client_is_dropped(dialect: Dialect) -> None:
    found = hows(dialect)
    bad = {key: how for key, how in found.items() if surfaces.DROPPED in how or surfaces.FAILED in how}
    assert not bad
    new = found.keys() - COMMITTED["cells"].keys()
    assert not new, AGAIN
    others = {key: how for key, how in found.items() if COMMITTED["cells"][key][dialect] != how}
    assert not others, AGAIN


def test_the_results_are_complete_and_the_table_is_theirs() -> None:
    assert not surfaces.bad_cells(COMMITTED)
    for key, cells in COMMITTED["cells"].items():
        assert cells.keys() == set(surfaces.EVERYWHERE), key
    text = surfaces.README.read_text()
    assert text == surfaces.with_table(text, COMMITTED), "run python -m tests.conformance.surfaces --table"


def test_every_reason_for_no_effect_is_used() -> None:
    used = set()
    for key, cells in COMMITTED["cells"].items():
        used |= {surfaces.reason_of(side, key.partition(" ")[2]) for side, how in cells.items() if how == "nothing"}
    assert used == {reason for _, _, reason in surfaces.NO_EFFECT}


def sent_in(api: str) -> set[str]:
    """The names of the fields that some row of the API sends, at any depth."""

    def names(value: Any) -> set[str]:
        if isinstance(value, dict):
            return value.keys() | {found for inner in value.values() for found in names(inner)}
        return {found for inner in value for found in names(inner)} if isinstance(value, list) else set()

    return {name for each in rows() if each.api == api for name in names(each.asked)}


def test_every_field_that_the_readers_know_is_sent() -> None:
    """The clients may lack some, which other clients send: official.BESIDE."""
    known = {*product._RESPONSES_FIELDS, *product._NEEDS_STORE, *product._CHAT_ONLY, *product._RESPONSES_HINTS}
    known |= {*product._TEXT_FIELDS, *product._FORMAT_FIELDS, *product._REASONING_FIELDS, *product._FUNCTION_FIELDS}
    assert known <= sent_in(RESPONSES)
    known = {*product._BODY_HINTS, *product._FIELD_HINTS, *product._MESSAGES_REFUSED}
    assert known <= sent_in(MESSAGES)


def test_the_newest_fields_of_the_clients_are_rows() -> None:
    """Of the types themselves, without the code that makes the rows."""
    from anthropic.types.beta import message_count_tokens_params as count
    from anthropic.types.beta import message_create_params as message
    from openai.types.responses import response_create_params as response

    for api, kind in (
        (RESPONSES, response.ResponseCreateParamsBase),
        (MESSAGES, message.MessageCreateParamsBase),
        (COUNT, count.MessageCountTokensParams),
    ):
        names = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
        assert names
        assert names <= {each.name for each in rows() if each.api == api}


# --------------------------------------------------------------------------------------------- the judge can fail


def test_what_is_left_out_without_a_word_is_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product._Reader, "ignore", lambda self, name: None)
    key = f'{RESPONSES} tools[function].allowed_callers: ["direct"]'
    assert hows("vllm", key) == {key: surfaces.DROPPED}


def test_what_does_not_reach_the_engine_is_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = product.VLLMAdapter.encode

    def heedless(self: Any, request: Any, body: Any) -> Any:
        path, wire = encode(self, request, body)
        return path, {name: value for name, value in wire.items() if name not in ("seed", "top_p")}

    monkeypatch.setattr(product.VLLMAdapter, "encode", heedless)
    keys = (f"{RESPONSES} seed: 7", f"{MESSAGES} top_p: 0.5", f"{MESSAGES} top_k: 5")
    assert hows("vllm", *keys) == dict(zip(keys, [surfaces.DROPPED, surfaces.DROPPED, surfaces.SAME], strict=True))


def test_another_value_is_not_the_same_field(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = product.VLLMAdapter.encode

    def altered(self: Any, request: Any, body: Any) -> Any:
        path, wire = encode(self, request, body)
        return path, wire | ({"seed": 8} if "seed" in wire else {})

    monkeypatch.setattr(product.VLLMAdapter, "encode", altered)
    assert hows("vllm", f"{RESPONSES} seed: 7") == {f"{RESPONSES} seed: 7": "seed"}


def test_a_refusal_must_name_the_field() -> None:
    plain = surfaces.Seen(200, {}, [], "", frozenset(), {}, False)
    error = {"error": {"message": "bad request", "param": None}}
    asked = surfaces.Seen(400, None, [], json.dumps(error), frozenset(), {}, False)
    seed = row(f"{RESPONSES} seed: 7")
    assert surfaces.verdict(seed, plain, asked).how == surfaces.FAILED
    error["error"]["param"] = "seed"
    asked = surfaces.Seen(400, None, [], json.dumps(error), frozenset(), {}, False)
    assert surfaces.verdict(seed, plain, asked).how == surfaces.REFUSED
