"""One contract for every engine: the real embedded one, the four fakes, and any real server that is named."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from llm_inference import (
    BadEngineReply,
    Completion,
    ContextTooLong,
    Deadlines,
    EngineOverloaded,
    EngineTimeout,
    EngineUnavailable,
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    ModelNotFound,
    StructuredOutputInvalid,
    UnsupportedFeature,
    join_tool_calls,
)
from tests.conftest import Attach, Engine
from tests.fake_engine import Dialect, FakeEngine, Reply, dumps, recorded
from tests.harness import PROMPT, chunks, collect

Make = Callable[..., FakeEngine]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}


def with_hint(error: InferenceError) -> InferenceError:
    """Every error says what it is, whose fault, whether to try again, why, and what to do."""
    assert error.kind and error.code in (400, 500) and isinstance(error.retryable, bool) and error.reason and error.hint
    assert not re.search(r"site-packages|/venv/|Traceback", str(error)) and len(str(error)) < 1500
    return error


# Whole and streamed ------------------------------------------------------------------------------
def test_a_stream_folds_to_the_complete_answer(engine: Engine) -> None:
    full = engine.llm.complete(PROMPT, **GREEDY)
    pieces = list(engine.llm.stream(PROMPT, **GREEDY))
    assert "".join(pieces) == full.text == engine.llm.generate(PROMPT, **GREEDY) and len(pieces) > 1 and all(pieces)
    folded = Completion.from_chunks(chunks(engine.llm, **GREEDY))
    assert (folded.text, folded.finish_reason, folded.usage) == (full.text, full.finish_reason, full.usage)


def test_exactly_one_finish_reason_and_it_is_on_the_last_chunk(engine: Engine) -> None:
    *before, last = chunks(engine.llm, **GREEDY)
    assert [chunk.finish_reason for chunk in before] == [None] * len(before)
    assert last.finish_reason in ("stop", "length") and last.usage is not None and last.timing is not None
    assert [chunk.usage for chunk in before] == [None] * len(before)


def test_usage_adds_up(engine: Engine) -> None:
    usage = engine.llm.complete(PROMPT, **GREEDY).usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 6
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens == usage.as_dict()["total_tokens"]


def test_an_answer_cut_by_max_tokens_says_length(engine: Engine) -> None:
    done = engine.llm.complete(PROMPT, temperature=0, max_tokens=3)
    assert done.finish_reason == "length" and done.usage.completion_tokens <= 3
    assert chunks(engine.llm, temperature=0, max_tokens=3)[-1].finish_reason == "length"


def test_a_completion_says_who_answered_and_how_long_it_took(engine: Engine) -> None:
    done = engine.llm.complete(PROMPT, **GREEDY)
    assert done.engine_type == engine.kind and done.model_name in [m.name for m in engine.llm.models()]
    assert done.timing.total > 0 and done.ignored == () and done.enforced_by == "none"
    for name in ("ttft", "decode", "queue", "tokens_per_second"):
        value = getattr(done.timing, name)
        assert value is None or value >= 0
    timing = chunks(engine.llm, **GREEDY)[-1].timing
    assert timing is not None and timing.ttft is not None and 0 < timing.ttft <= timing.total


def test_generate_is_chat_with_one_users_message(engine: Engine) -> None:
    message = [{"role": "user", "content": PROMPT}]
    assert engine.llm.generate(PROMPT, **GREEDY) == engine.llm.chat(message, **GREEDY)
    assert engine.llm.chat(
        [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], **GREEDY
    ) == engine.llm.chat(message, **GREEDY)


def test_the_bytes_may_come_in_any_pieces(faked: Engine) -> None:
    assert faked.fake is not None
    for size in (1, 2, 3, 7, 64):
        faked.fake.slice = size
        assert "".join(faked.llm.stream(PROMPT)) == faked.fake.text == faked.llm.generate(PROMPT)


@pytest.mark.parametrize(
    "text",
    [
        "\u2028\u2029\u0085 \x0b\x0c",
        "data: [DONE]\n\ndata: {",
        '{"error": "x"}',
        "\\n\\u0000",
        "\x00\x1f",
        "🚲" * 50,
        " ",
        "\r\n\r\n",
        "",
    ],
)
def test_any_text_arrives_unchanged(faked: Engine, text: str) -> None:
    faked.answers(text)
    assert faked.llm.generate(PROMPT) == text == "".join(faked.llm.stream(PROMPT))


# Refusals ----------------------------------------------------------------------------------------
REFUSED: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": True},
    {"temperature": 2.5},
    {"temperature": "0"},
    {"top_p": 0},
    {"stop": [""]},
    {"seed": 1.5},
    {"max_token": 5},
    {"schema": {"type": "wrong"}},
    {"schema": {"$ref": "http://127.0.0.1:9/x"}},
    {"choice": []},
    {"regex": "("},
    {"choice": ["a"], "regex": "a"},
    {"tools": {}},
    {"tool_choice": "required"},
    {"top_logprobs": 2},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_a_bad_request_is_refused_before_any_byte_is_sent(engine: Engine, fields: dict[str, Any]) -> None:
    for verb in (
        engine.llm.generate,
        engine.llm.stream,
        lambda p, **f: chunks(engine.llm, p, **f),
        lambda p, **f: asyncio.run(engine.llm.agenerate(p, **f)),
    ):
        with pytest.raises(InvalidRequest) as caught:
            verb(PROMPT, **fields)
        assert with_hint(caught.value).code == 400
    assert engine.fake is None or engine.fake.requests == []


@pytest.mark.parametrize("prompt", [5, None, b"bytes", [], [5], {"role": "user"}, [{"role": "user"}, 5]], ids=str)
def test_a_prompt_of_the_wrong_shape_is_refused(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.llm.complete(prompt)
    with_hint(caught.value)


def test_what_an_engine_cannot_do_is_refused_before_a_generation(engine: Engine) -> None:
    """Each feature that this engine lacks is refused by name, complete and streamed; others have their own tests."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    asks: dict[str, dict[str, Any]] = {
        "regex": {"regex": "a"},
        "grammar": {"grammar": 'root ::= "a"'},
        "think": {"think": True},
        "seed": {"seed": 1},
        "tools": {"tools": [tool]},
        "images": {},
        "tool_choice": {"tools": [tool], "tool_choice": "required"},
    }
    adapter = asyncio.run(engine.llm.engine())
    lacks = asks.keys() - asyncio.run(adapter.features(asyncio.run(adapter.model_for(None))))
    assert lacks, "an engine that can do everything?"
    for feature in lacks:
        prompt = [{"role": "user", "content": image}] if feature == "images" else PROMPT
        for verb in (engine.llm.complete, lambda p, **f: list(engine.llm.stream(p, **f))):
            with pytest.raises(UnsupportedFeature, match=feature) as caught:
                verb(prompt, **asks[feature])
            assert engine.kind in with_hint(caught.value).reason
    assert engine.fake is None or engine.fake.asked == []


def test_an_unknown_model_is_not_found_and_what_is_there_is_named(engine: Engine) -> None:
    there = engine.llm.models()[0].name
    for options in ({}, {"temperature": 0}):
        for verb in (engine.llm.complete, lambda p, **f: list(engine.llm.stream(p, **f))):
            with pytest.raises(ModelNotFound) as caught:
                verb(PROMPT, model_name="no-such-model", **options)
            assert there in str(with_hint(caught.value)) and "no-such-model" in str(caught.value)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(engine: Engine) -> None:
    if engine.fake is not None:
        pytest.skip("the fakes have no context; their recordings are below")
    context = engine.llm.models()[0].context_length or 8192
    for verb in (engine.llm.generate, lambda p, **f: list(engine.llm.stream(p, **f))):
        with pytest.raises(ContextTooLong) as caught:
            verb("word " * (context + 500), max_tokens=4)
        assert str(context) in with_hint(caught.value).reason


# Leaving early -----------------------------------------------------------------------------------
def endless(fake: FakeEngine) -> None:
    """The next answer begins and never ends."""
    full = fake.stream_reply()
    fake.script_chat(Reply(headers=full.headers, pieces=full.pieces[:3], end="stall"))


def test_leaving_a_stream_early_closes_the_upstream(engine: Engine) -> None:
    if engine.fake is not None:
        for leave in ("close", "break", "async"):
            endless(engine.fake)
            before = engine.fake.cut
            if leave == "async":

                async def first() -> str:
                    async with contextlib.aclosing(engine.llm.astream(PROMPT)) as pieces:
                        return await anext(pieces)

                assert asyncio.run(first())
            elif leave == "break":
                for _ in engine.llm.stream(PROMPT):
                    break
            else:
                pieces = engine.llm.stream(PROMPT)
                next(pieces)
                pieces.close()  # type: ignore[attr-defined]
            engine.fake.wait(lambda before=before: engine.fake.live == 0 and engine.fake.cut == before + 1)
        return
    for _ in range(5):  # the embedded engine has 4 slots: were they still taken, the last would wait for 1500 tokens
        pieces = engine.llm.stream(PROMPT, max_tokens=1500, engine_options={"ignore_eos": True})
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    started = time.monotonic()
    assert engine.llm.generate(PROMPT, **GREEDY)
    assert time.monotonic() - started < 20


def test_a_cancelled_task_closes_the_upstream(faked: Engine) -> None:
    fake = faked.fake
    assert fake is not None

    async def main(work: Callable[[], Any]) -> None:
        endless(fake)
        begun, cut = fake.begun, fake.cut
        task = asyncio.ensure_future(work())
        await asyncio.to_thread(fake.wait, lambda: fake.begun == begun + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(fake.wait, lambda: fake.live == 0 and fake.cut == cut + 1)

    faked.llm.generate(PROMPT)  # what is asked of an engine once is asked
    for work in (lambda: faked.llm.acomplete(PROMPT), lambda: collect(faked.llm.astream(PROMPT))):
        asyncio.run(main(work))
    assert faked.llm.generate(PROMPT) == fake.text


# One code path, every way of calling -------------------------------------------------------------
def test_every_verb_has_a_twin_that_says_the_same(engine: Engine) -> None:
    llm, message = engine.llm, [{"role": "user", "content": PROMPT}]
    assert asyncio.run(llm.agenerate(PROMPT, **GREEDY)) == llm.generate(PROMPT, **GREEDY)
    assert asyncio.run(llm.achat(message, **GREEDY)) == llm.chat(message, **GREEDY)
    assert "".join(asyncio.run(collect(llm.astream(PROMPT, **GREEDY)))) == "".join(llm.stream(PROMPT, **GREEDY))
    assert asyncio.run(llm.acomplete(PROMPT, **GREEDY)).usage == llm.complete(PROMPT, **GREEDY).usage
    assert asyncio.run(llm.amodels()) == llm.models() != []
    assert asyncio.run(llm.ahealth()) == llm.health()
    assert llm.health()["healthy"] is True and llm.health()["models"] == [m.name for m in llm.models()]


def test_the_synchronous_verbs_work_inside_a_running_loop(engine: Engine) -> None:
    expected = engine.llm.generate(PROMPT, **GREEDY)

    async def notebook() -> list[str]:
        return [
            engine.llm.generate(PROMPT, **GREEDY),
            "".join(engine.llm.stream(PROMPT, **GREEDY)),
            await engine.llm.agenerate(PROMPT, **GREEDY),
        ]

    assert asyncio.run(notebook()) == [expected] * 3


def test_several_loops_one_after_another(engine: Engine) -> None:
    answers = [asyncio.run(engine.llm.agenerate(PROMPT, **GREEDY)) for _ in range(4)]
    assert len(set(answers)) == 1 and answers[0]


def test_several_loops_at_once(engine: Engine) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(lambda _: asyncio.run(engine.llm.agenerate(PROMPT, temperature=0, max_tokens=4)), range(6))
        )
    assert len(answers) == 6 and all(answers)


def test_answers_of_many_threads_are_not_mixed(engine: Engine) -> None:
    if engine.fake is not None:
        engine.fake.answer = lambda ask: "answer to " + ask["messages"][-1]["content"]
        engine.fake.pace = 0.001
        names = [f"question {n}" for n in range(40)]

        def ask(name: str) -> str:
            return engine.llm.generate(name) if int(name[9:]) % 2 else "".join(engine.llm.stream(name))

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(ask, names)) == ["answer to " + name for name in names]
        return
    words = ["red", "blue", "green", "grey", "北京", "上海"]
    with ThreadPoolExecutor(6) as pool:
        assert (
            list(
                pool.map(
                    lambda word: engine.llm.structured_generate("Say a word.", choice=[word], max_tokens=16), words
                )
            )
            == words
        )


# Batch -------------------------------------------------------------------------------------------
def test_a_batch_keeps_order_and_puts_errors_in_their_place(engine: Engine) -> None:
    prompts: list[Any] = ["one", [{"role": "wizard", "content": "x"}], "two", 5, "three"]
    if engine.fake is not None:
        engine.fake.answer = lambda ask: "re: " + ask["messages"][-1]["content"]
    answers = engine.llm.batch(prompts, temperature=0, max_tokens=4)
    assert [isinstance(answer, InvalidRequest) for answer in answers] == [False, True, False, True, False]
    assert all(isinstance(answer, Completion) and answer.text for answer in answers[::2])
    if engine.fake is not None:
        assert [answer.text for answer in answers if isinstance(answer, Completion)] == [
            "re: one",
            "re: two",
            "re: three",
        ]
    assert engine.llm.batch([]) == []


def test_a_batch_is_bounded(faked: Engine) -> None:
    fake, running = faked.fake, []
    assert fake is not None
    fake.answer = lambda ask: running.append(fake.live + 1) or "a b c"  # type: ignore[func-returns-value]
    fake.pace = 0.02
    assert len(faked.llm.batch([str(n) for n in range(15)], concurrency=3)) == 15
    assert max(running) <= 3 and len(running) == 15 and max(running) > 1


def test_an_engine_that_fails_once_spoils_one_item_of_a_batch(faked: Engine) -> None:
    assert faked.fake is not None
    faked.fake.script_chat(Reply(status=500, pieces=[b"oops"]))
    answers = faked.llm.batch(["a", "b", "c", "d"], concurrency=1)
    assert [isinstance(answer, BadEngineReply) for answer in answers] == [True, False, False, False]


# Structured --------------------------------------------------------------------------------------
class Verdict(BaseModel):
    ok: bool
    mood: Literal["good", "bad"]


FORMS: list[tuple[str, Any, str, Any]] = [
    ("short form", {"ok": "boolean"}, '{"ok": true}', dict),
    (
        "JSON Schema",
        {
            "type": "object",
            "properties": {"mood": {"enum": ["good", "bad"]}},
            "required": ["mood"],
            "additionalProperties": False,
        },
        '{"mood": "bad"}',
        dict,
    ),
    ("Pydantic model", Verdict, '{"ok": false, "mood": "good"}', Verdict),
    ("a type", Annotated[list[bool], Field(min_length=1, max_length=3)], "[true]", list),
    ("an enumeration", {"enum": ["北京", "上海"]}, '"北京"', str),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form[0]))
def test_structured_generate_gives_a_checked_value(engine: Engine, form: tuple[str, Any, str, Any]) -> None:
    _, schema, answer, kind = form
    engine.answers(answer)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 64, "schema": schema}
    value = engine.llm.structured_generate("Is the sky blue?", **options)
    assert isinstance(value, kind)
    assert chunks(engine.llm, "Is the sky blue?", **options)[-1].result == value
    if engine.fake is not None:
        assert (value.model_dump() if isinstance(value, BaseModel) else value) == json.loads(answer)
        assert asyncio.run(engine.llm.astructured_generate("Is the sky blue?", **options)) == value
        done = engine.llm.complete("Is the sky blue?", **options)
        assert done.result == value and done.enforced_by == "engine"


def test_a_list_of_integers_is_one(faked: Engine) -> None:
    faked.answers("[1, 2]")
    assert faked.llm.structured_generate("Count.", schema=list[int]) == [1, 2]


def test_no_schema_means_any_object(faked: Engine) -> None:
    faked.answers('{"any": ["thing"]}')
    assert faked.llm.structured_generate("Anything.") == {"any": ["thing"]}


def test_a_choice_returns_one_of_the_choices(engine: Engine) -> None:
    engine.answers(engine.text_of("blue"))
    for _ in range(2):
        assert engine.llm.structured_generate("A colour?", choice=["red", "blue"], max_tokens=8) in ("red", "blue")
    assert "".join(engine.llm.stream("A colour?", choice=["red", "blue"], max_tokens=8)) in ("red", "blue")


@pytest.mark.parametrize(
    "tricky",
    [
        'say "hi"',
        "back\\slash",
        "line\nbreak",
        "a.b*c",
        "(x)|[y]",
        "北京 🚲",
        "tab\there",
        "it's {fine}",
        "form\x0cfeed",
        "a/b",
        "%s \\n",
        "\x07bell",
    ],
)
def test_a_choice_may_be_any_text(engine: Engine, tricky: str) -> None:
    engine.answers(json.dumps(tricky) if engine.kind == "ollama" else tricky)
    assert engine.llm.structured_generate("Say it.", choice=[tricky], max_tokens=32) == tricky


@pytest.mark.parametrize(
    ("regex", "answer"),
    [
        ("[0-9]{3}", "123"),
        ("(yes|no)", "yes"),
        (r"\d\d/\d\d", "12/34"),
        ("[a-c]-[北上]", "a-北"),
        ("a\nb", "a\nb"),
        ('"[ab]"', '"a"'),
        (r"\\[x/]", "\\x"),
        ("(?i)ok", "OK"),
        ("x{2}y?z*", "xxyz"),
    ],
)
def test_a_regex_is_matched_or_refused(engine: Engine, regex: str, answer: str) -> None:
    engine.answers(answer)
    try:
        value = engine.llm.structured_generate("A code?", regex=regex, max_tokens=16)
    except UnsupportedFeature as exc:
        assert engine.kind == "ollama" or regex.startswith("(?i)"), with_hint(exc)
    else:
        assert re.fullmatch(regex, value)


def test_a_grammar_is_kept_or_refused(engine: Engine) -> None:
    engine.answers("yes")
    if engine.kind == "ollama":
        with pytest.raises(UnsupportedFeature, match="grammar"):
            engine.llm.structured_generate("Sure?", grammar='root ::= "yes" | "no"')
    else:
        assert engine.llm.structured_generate("Sure?", grammar='root ::= "yes" | "no"', max_tokens=8) in ("yes", "no")


@pytest.mark.parametrize("bad", ['{"ok": 1}', '{"ok": true', "yes", "", '{"ok": true, "more": 1}', "```json\n{}\n```"])
def test_an_answer_that_does_not_fit_twice_is_an_error_with_the_raw_text(faked: Engine, bad: str) -> None:
    assert faked.fake is not None
    faked.answers(bad)
    with pytest.raises(StructuredOutputInvalid) as caught:
        faked.llm.structured_generate("?", schema={"ok": "boolean"})
    assert with_hint(caught.value).text == bad and len(faked.fake.asked) == 2
    with pytest.raises(StructuredOutputInvalid) as caught:
        list(faked.llm.stream("?", schema={"ok": "boolean"}))
    assert with_hint(caught.value).text == bad


def test_an_answer_that_does_not_fit_once_is_asked_for_again(faked: Engine) -> None:
    assert faked.fake is not None
    faked.answers('{"ok": 1}', '{"ok": true}')
    assert faked.llm.structured_generate("?", schema={"ok": "boolean"}) == {"ok": True}
    first, second = (seen.json for seen in faked.fake.asked)
    assert first["messages"] == second["messages"]


def test_an_answer_cut_by_max_tokens_is_no_value(engine: Engine) -> None:
    engine.answers('{"text": "a b c d e f g"}')
    with pytest.raises(StructuredOutputInvalid, match="max_tokens") as caught:
        engine.llm.structured_generate("Write a long story.", schema={"text": "string", "more": "string"}, max_tokens=3)
    assert with_hint(caught.value).text is not None  # a small model's three tokens may be none that can be seen


@pytest.mark.parametrize("wrong", ["green", "Red", "red or blue", ""])
def test_an_answer_outside_the_choices_is_an_error(faked: Engine, wrong: str) -> None:
    faked.answers(faked.text_of(wrong))
    with pytest.raises(StructuredOutputInvalid):
        faked.llm.structured_generate("?", choice=["red", "blue"])


def test_a_senseless_schema_is_refused_and_not_an_internal_error(faked: Engine) -> None:
    faked.answers('{"a": 5}')
    # else what earlier tests left may be collected at the recursion's end, where its finalizers have no stack left
    gc.collect()
    for schema in (
        {"$ref": "#"},
        {"type": "object", "required": 5},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": "x"}}},
    ):
        with pytest.raises(InferenceError):
            faked.llm.structured_generate("?", schema=schema)


# Tools -------------------------------------------------------------------------------------------
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
ARGUMENTS = {"city": '北京 "n"', "days": 7}


@pytest.mark.parametrize(
    "choice",
    [None, "auto", "required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["default", "auto", "required", "named"],
)
def test_a_tool_call_is_the_same_complete_and_streamed(faked: Engine, choice: Any) -> None:
    assert faked.fake is not None
    if faked.kind == "ollama" and choice not in (None, "auto"):
        with pytest.raises(UnsupportedFeature, match="tool_choice"):
            faked.llm.complete("?", tools=[WEATHER, TIME], tool_choice=choice)
        return
    faked.fake.tool_call = ("get_weather", ARGUMENTS)
    done = faked.llm.complete("?", tools=[WEATHER, TIME], tool_choice=choice)
    (call,) = done.tool_calls
    assert (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "function",
        "get_weather",
        ARGUMENTS,
    )
    assert call["id"] and done.finish_reason == "tool_calls" and done.text == ""
    streamed = chunks(faked.llm, "?", tools=[WEATHER, TIME], tool_choice=choice)
    (again,) = join_tool_calls(delta for chunk in streamed for delta in chunk.tool_calls)
    assert (
        again["function"]["name"] == "get_weather"
        and json.loads(again["function"]["arguments"]) == ARGUMENTS
        and again["id"]
    )
    assert [chunk.finish_reason for chunk in streamed if chunk.finish_reason] == ["tool_calls"]


def test_the_answer_to_a_tool_goes_in(faked: Engine) -> None:
    assert faked.fake is not None
    faked.fake.tool_call = ("get_weather", ARGUMENTS)
    question = [{"role": "user", "content": "weather?"}]
    (call,) = faked.llm.complete(question, tools=[WEATHER]).tool_calls
    history = [
        *question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    done = faked.llm.complete(history, tools=[WEATHER])
    assert (done.text, done.finish_reason, done.tool_calls) == (faked.fake.text, "stop", ())
    said = faked.fake.body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert (said if faked.kind == "ollama" else json.loads(said)) == ARGUMENTS


def test_tools_with_choice_none_give_words(faked: Engine) -> None:
    assert faked.fake is not None
    faked.fake.tool_call = ("get_weather", ARGUMENTS)
    done = faked.llm.complete("?", tools=[WEATHER], tool_choice="none")
    assert (done.text, done.tool_calls) == (faked.fake.text, ())


@pytest.mark.parametrize(
    "call",
    [
        ("get_weather", {"city": 5}),
        ("get_weather", {}),
        ("get_weather", {"city": "x", "more": 1}),
        ("no_such_tool", {"city": "x"}),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit_its_tool_is_asked_for_again_and_then_an_error(faked: Engine, call: Any) -> None:
    assert faked.fake is not None
    faked.fake.tool_call = call
    with pytest.raises(StructuredOutputInvalid) as caught:
        faked.llm.complete("?", tools=[WEATHER])
    assert with_hint(caught.value) and len(faked.fake.asked) == 2
    with pytest.raises(StructuredOutputInvalid):
        chunks(faked.llm, "?", tools=[WEATHER])


def test_arguments_encoded_twice_are_refused(fake: Make, attach: Attach) -> None:
    """vLLM without `strict` was seen to answer `"\\"Paris\\""`."""
    engine = fake("vllm")
    engine.replay_chat("hermes_required", "hermes_required")
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    with pytest.raises(StructuredOutputInvalid):
        attach(engine).complete("?", tools=[tool], tool_choice="required")


def test_a_required_call_that_does_not_come_is_an_error(fake: Make, attach: Attach) -> None:
    dialects: tuple[Dialect, ...] = ("vllm", "sglang", "llamacpp")
    for dialect in dialects:
        engine = fake(dialect)
        for _ in range(2):
            engine.script_chat(recorded("vllm", "chat") if dialect == "vllm" else engine.stream_reply())
        with pytest.raises(StructuredOutputInvalid, match="no call"):
            attach(engine).complete("?", tools=[WEATHER], tool_choice="required")


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("ollama", "08_tools_stream"),
        ("vllm", "hermes_required_stream"),
        ("vllm", "hermes_named_stream"),
        ("vllm", "hermes_auto_stream"),
        ("sglang", "tools_qwen_required_strict_stream"),
        ("sglang", "tools_noparser_required_strict_stream"),
        ("llamacpp", "tooltpl_required_stream"),
    ],
)
def test_recorded_tool_streams_are_read(dialect: Dialect, name: str, fake: Make, attach: Attach) -> None:
    """Each recording yields calls with a name and JSON arguments, or text, and one finish reason at the end."""
    engine = fake(dialect)
    engine.replay_chat(name)
    got = chunks(attach(engine), "?")
    calls = join_tool_calls(delta for chunk in got for delta in chunk.tool_calls)
    assert calls or "".join(chunk.text for chunk in got)
    for call in calls:
        assert call["id"] and call["function"]["name"]
        if got[-1].finish_reason != "length":
            json.loads(call["function"]["arguments"])
    assert [chunk.finish_reason for chunk in got[:-1]] == [None] * (len(got) - 1)
    assert got[-1].finish_reason == (
        "length" if got[-1].finish_reason == "length" else "tool_calls" if calls else "stop"
    )


# Reasoning ---------------------------------------------------------------------------------------
def test_reasoning_comes_out_under_one_name(faked: Engine) -> None:
    assert faked.fake is not None
    faked.fake.reasoning = "先想一下, then answer."
    done = faked.llm.complete(PROMPT)
    assert (done.reasoning, done.text) == (faked.fake.reasoning, faked.fake.text)
    streamed = chunks(faked.llm)
    assert "".join(chunk.reasoning for chunk in streamed) == faked.fake.reasoning
    assert "".join(faked.llm.stream(PROMPT)) == faked.fake.text


def test_a_constrained_answer_is_not_lost_in_the_reasoning(faked: Engine) -> None:
    """With a constraint and no `think`, the engine is asked not to think."""
    assert faked.fake is not None
    faked.fake.reasoning = "let me think about this for long"
    faked.answers('{"ok": true}')
    done = faked.llm.complete("?", schema={"ok": "boolean"}, max_tokens=6)
    assert done.result == {"ok": True} and done.reasoning == ""


@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        ("sglang", "reasoning"),
        ("sglang", "reasoning_stream"),
        ("ollama", "16_thinking_model_default"),
        ("ollama", "16_thinking_model_stream"),
    ],
)
def test_recorded_reasoning_is_read(dialect: Dialect, name: str, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    engine.replay_chat(name)
    llm = attach(engine)
    if "stream" in name:
        assert any(chunk.reasoning for chunk in chunks(llm))
    elif dialect == "ollama":
        assert llm.complete(PROMPT).reasoning


# Errors that engines were seen to give -----------------------------------------------------------
SAID: list[tuple[Dialect, str, type[InferenceError]]] = [
    *(
        ("ollama", name, InvalidRequest)
        for name in (
            "07_chat_format_array",
            "07_chat_format_unknown_word",
            "07_chat_format_bad_schema_ref",
            "07_chat_format_bad_schema_type",
            "08_tools_arguments_as_string",
            "09_chat_bad_name",
            "10_options_not_a_map",
            "10_options_num_ctx_string",
            "10_options_num_predict_string",
            "10_options_seed_string",
            "10_options_stop_array_of_int",
            "10_options_stop_string",
            "10_options_temperature_string",
            "11_content_openai_parts",
            "12_json_array",
            "12_malformed_not_json",
            "12_stream_string",
            "16_think_garbage_string",
            "17_keep_alive_string_bad",
            "18_chat_image_bad_base64",
        )
    ),
    *(
        ("ollama", name, UnsupportedFeature)
        for name in (
            "08_chat_tools_model_without_tools",
            "13_chat_on_embed_model",
            "16_think_high",
            "16_think_true",
            "18_chat_image_no_vision",
            "13_embed_string",
        )
    ),
    *(
        ("ollama", name, ModelNotFound)
        for name in ("09_chat_unknown_model", "09_chat_without_tag", "13_embed_unknown_model", "03_show_unknown")
    ),
    *(
        ("ollama", name, ContextTooLong)
        for name in (
            "19_ctx_chat_shift_false",
            "19_ctx_chat_truncate_false",
            "19_ctx_generate_truncate_false",
            "13_embed_too_long_truncate_false",
        )
    ),
    *(
        ("ollama", name, EngineOverloaded)
        for name in ("21_queue1_unloaded_16_parallel", "21_queue1_num_ctx_differs_16_parallel")
    ),
    ("ollama", "22_runner_killed_chat_nonstream", EngineUnavailable),
    *(
        ("vllm", name, InvalidRequest)
        for name in (
            "content_null",
            "err_bad_utf8",
            "err_empty_body",
            "err_json_not_object",
            "err_logprobs_without",
            "err_max_tokens_0",
            "err_max_tokens_neg1",
            "err_max_tokens_float",
            "err_messages_empty",
            "err_seed_huge",
            "err_stop_5",
            "err_stop_empty",
            "err_temperature_5",
            "err_temperature_str",
            "err_top_k_neg5",
            "err_top_p_0",
            "part_unknown",
            "rf_bad_schema",
            "rf_json_schema_noname",
            "rf_unknown",
            "so_bad_grammar",
            "so_bad_regex",
            "so_choice_empty",
            "so_two",
            "tools_bad_choice",
            "tools_named_missing",
            "tools_empty",
            "chat_template_kwargs_bad",
            "err_max_tokens_huge",
            "chat_top_logprobs_21",
            "err_logit_bias_range",
        )
    ),
    *(
        ("vllm", name, UnsupportedFeature)
        for name in ("image_part", "audio_part", "tools_auto", "tools_required", "tools_named", "embeddings")
    ),
    *(("vllm", name, ContextTooLong) for name in ("ctx_overflow", "ctx_overflow_stream", "completions_ctx_overflow")),
    ("vllm", "err_wrong_model", ModelNotFound),
    ("vllm", "logprobs_no_compiler", EngineUnavailable),
    ("vllm", "key_wrong", EngineUnavailable),
    *(
        ("sglang", name, InvalidRequest)
        for name in (
            "chat_bad_ebnf",
            "chat_bad_regex",
            "chat_two_constraints",
            "content_missing",
            "content_null",
            "err_empty_body",
            "err_messages_missing",
            "p_max_tokens_-1",
            "p_max_tokens_2.5",
            "p_min_p_2",
            "p_presence_penalty_9",
            "p_temperature_-1",
            "p_temperature_hot",
            "p_top_p_2",
            "rf_bad_schema",
            "rf_bad_schema_stream",
            "rf_json_schema_noname",
            "rf_unknown",
            "role_wrong",
            "tools_bad_choice",
            "tools_bad_schema",
            "tools_named_missing",
            "tools_required_plus_rf",
            "p_reasoning_effort_bad",
        )
    ),
    *(("sglang", name, UnsupportedFeature) for name in ("content_image", "embeddings")),
    *(("sglang", name, ContextTooLong) for name in ("ctx_maxtok_overflow", "ctx_maxtok_overflow_stream")),
    ("sglang", "key_none", EngineUnavailable),
    ("sglang", "kill9_scheduler_plain", EngineUnavailable),
    ("sglang", "err_json_not_object", BadEngineReply),
    ("sglang", "get_nope", UnsupportedFeature),
    *(
        ("llamacpp", name, InvalidRequest)
        for name in (
            "plain_bad_grammar",
            "plain_bad_grammar_stream",
            "plain_bad_schema",
            "plain_empty_body",
            "plain_malformed",
            "plain_no_messages",
            "plain_rf_yaml",
            "plain_temp_str",
            "plain_n5_gt_slots",
            "tooltpl_bad_tool_schema",
            "tooltpl_required_and_grammar",
            "plain_role_missing",
            "tooltpl_bad_tool",
        )
    ),
    *(
        ("llamacpp", name, UnsupportedFeature)
        for name in ("plain_image_part", "plain_post_v1_embeddings", "plain_post_nope")
    ),
    *(("llamacpp", name, ContextTooLong) for name in ("plain_ctx_overflow", "plain_ctx_overflow_stream")),
    ("llamacpp", "keyed_wrongkey", EngineUnavailable),
    ("llamacpp", "shared_ctx_full", EngineOverloaded),
]


@pytest.mark.parametrize(("dialect", "name", "error"), SAID, ids=lambda v: v if isinstance(v, str) else v.kind)
@pytest.mark.parametrize("how", ["whole", "streamed"])
def test_a_recorded_engine_error_becomes_a_typed_error(
    dialect: Dialect, name: str, error: type[InferenceError], how: str, fake: Make, attach: Attach
) -> None:
    engine = fake(dialect)
    engine.replay_chat(name, name)  # twice: a request on a kept connection that breaks is sent once more
    llm = attach(engine)
    with pytest.raises(InferenceError) as caught:
        llm.generate(PROMPT) if how == "whole" else list(llm.stream(PROMPT))
    assert type(with_hint(caught.value)) is error, caught.value
    if error is ContextTooLong and "shift_false" not in name and "embed" not in name:
        assert len(set(re.findall(r"\d{3,}", caught.value.reason))) >= 2, "both numbers"
    if error is EngineOverloaded:
        assert caught.value.retry_after


def test_ollama_is_asked_again_for_the_counts_that_it_omitted(fake: Make, attach: Attach) -> None:
    for how in ("whole", "streamed"):
        engine = fake("ollama")
        engine.context = 512
        engine.replay_chat("19_ctx_chat_shift_false", "19_ctx_chat_truncate_false")
        llm = attach(engine)
        with pytest.raises(ContextTooLong, match=r"4010.*512"):
            llm.generate(PROMPT) if how == "whole" else list(llm.stream(PROMPT))
        assert (
            engine.body["options"]["num_ctx"] == 512
        )  # the one that is loaded, so that Ollama does not load the model again


def test_a_text_too_long_to_embed_is_too_long_on_ollama(fake: Make, attach: Attach) -> None:
    engine = fake("ollama")
    engine.capabilities, engine.context = ["completion", "embedding"], 512
    llm = attach(engine)
    for number in (1, 2):  # the second time, the loaded model's context is known
        for _ in range(2 * number):
            engine.replay("13_embed_too_long_truncate_false")
        with pytest.raises(ContextTooLong, match="OLLAMA_CONTEXT_LENGTH"):
            llm.embed("word " * 9000)
        engine.reset()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (500, b"CUDA out of memory. Tried to allocate 2 GiB", "out_of_memory"),
        (500, b'{"error": "model requires more system memory (9 GiB) than is available"}', "out_of_memory"),
        (503, b"", "engine_overloaded"),
        (429, b'{"error": {"message": "too many"}}', "engine_overloaded"),
        (502, b"<html>bad gateway</html>", "engine_unavailable"),
        (504, b"", "engine_unavailable"),
        (500, b"\xff\xfe\x00", "bad_engine_reply"),
        (418, b"{}", "invalid_request"),
        (302, b"", "bad_engine_reply"),
        (204, b"", "bad_engine_reply"),
        (403, b"", "engine_unavailable"),
        (500, b"", "bad_engine_reply"),
        (400, b"", "invalid_request"),
        (501, b"{}", "unsupported_feature"),
    ],
)
def test_any_engine_status_becomes_a_typed_error(faked: Engine, status: int, body: bytes, error: str) -> None:
    assert faked.fake is not None
    faked.llm.models()
    for ask in (faked.llm.generate, lambda p: list(faked.llm.stream(p))):
        faked.fake.script_chat(Reply(status=status, pieces=[body]))
        with pytest.raises(InferenceError) as caught:
            ask(PROMPT)
        assert with_hint(caught.value).kind == error, caught.value


# Broken streams ----------------------------------------------------------------------------------
def shorter(faked: Engine) -> Reply:
    assert faked.fake is not None
    return faked.fake.stream_reply()


@pytest.mark.parametrize("end", ["clean", "eof", "reset"])
def test_a_stream_that_ends_early_is_never_a_clean_end(faked: Engine, end: Any) -> None:
    """Cut before any piece of a recorded answer: the pieces that came, and then an error."""
    fake, full = faked.fake, shorter(faked)
    assert fake is not None
    for kept in range(len(full.pieces)):
        fake.script_chat(Reply(headers=full.headers, pieces=full.pieces[:kept], end=end, chunked=True))
        with pytest.raises((BadEngineReply, EngineUnavailable)) as caught:
            list(faked.llm.stream(PROMPT))
        with_hint(caught.value)
    fake.script_chat(full)
    assert list(faked.llm.stream(PROMPT))


@pytest.mark.parametrize("end", ["clean", "eof", "reset"])
def test_a_piece_cut_in_the_middle_is_never_a_clean_end(faked: Engine, end: Any) -> None:
    fake, full = faked.fake, shorter(faked)
    assert fake is not None
    for kept in range(len(full.pieces)):
        *before, torn = full.pieces[: kept + 1]
        fake.script_chat(Reply(headers=full.headers, pieces=[*before, torn[: len(torn) // 2]], end=end, chunked=True))
        with pytest.raises((BadEngineReply, EngineUnavailable)):
            list(faked.llm.stream(PROMPT))


@pytest.mark.parametrize("end", ["eof", "reset"])
def test_a_complete_answer_that_ends_early_is_an_error(faked: Engine, end: Any) -> None:
    assert faked.fake is not None
    for pieces in ([], [b'{"mod'], [b'data: {"id"']):
        faked.fake.script_chat(
            Reply(
                headers={"content-type": "application/json", "content-length": "900"},
                pieces=pieces,
                end=end,
                chunked=False,
            )
        )
        with pytest.raises((BadEngineReply, EngineUnavailable)) as caught:
            faked.llm.generate(PROMPT)
        with_hint(caught.value)


def test_the_connection_lost_before_the_head(faked: Engine) -> None:
    assert faked.fake is not None
    for end in ("eof", "reset"):
        for _ in range(2):  # a kept connection that breaks is no news: the request is sent once more on a new one
            faked.fake.script_chat(Reply(status=0, end=end))  # type: ignore[arg-type]
        with pytest.raises(EngineUnavailable) as caught:
            faked.llm.generate(PROMPT)
        assert with_hint(caught.value).retryable


GARBAGE = [
    b"data: {\n\n",
    b"data: []\n\n",
    b"data: {}\n\n",
    b'data: {"choices": 5}\n\n',
    b'data: {"choices": [5]}\n\n',
    b'data: {"choices": [{}]}\n\n',
    b'data: {"choices": [{"delta": 5}]}\n\n',
    b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
    b'data: {"choices": [{"delta": {"tool_calls": 5}}]}\n\n',
    b'data: {"choices": [{"delta": {"tool_calls": [5]}}]}\n\n',
    b'data: {"choices": [], "usage": 5}\n\n',
    b'data: {"choices": [], "usage": {}}\n\n',
    b"data: \xff\n\n",
    b"data: null\n\n",
    b"data: {}}\n\n",
]
NDGARBAGE = [
    b"{\n",
    b"[]\n",
    b"null\n",
    b"\xff\n",
    b'"x"\n',
    b'{"message": 5}\n',
    b'{"message": {"content": 5}}\n',
    b'{"message": {"tool_calls": 5}}\n',
    b'{"message": {"tool_calls": [{}]}}\n',
    b'{"done": true, "eval_count": "x"}\n',
    b'{"done": true, "eval_duration": "x"}\n',
    b"<html></html>\n",
]


def test_garbage_in_a_stream_is_a_bad_reply(faked: Engine) -> None:
    """Nothing that an engine says ends in an error that is not ours, or in a clean answer."""
    fake, full, wrong = faked.fake, shorter(faked), []
    assert fake is not None
    for garbage in NDGARBAGE if faked.kind == "ollama" else GARBAGE:
        fake.script_chat(
            Reply(headers=full.headers, pieces=[*full.pieces[:2], garbage, *full.pieces[2:]], chunked=True)
        )
        try:
            said: Any = chunks(faked.llm)
        except InferenceError as exc:
            with_hint(exc)
        except Exception as exc:
            wrong.append(f"{garbage!r}: {exc!r}")
        else:
            if not all(isinstance(c.text, str) and isinstance(c.tool_calls, tuple) for c in said):
                wrong.append(f"{garbage!r}: passed on")
    assert not wrong, "\n".join(wrong)


WHOLE_GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"x"',
    b"<html></html>",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{}]}',
    b'{"choices": 5}',
    b'{"message": 5, "done": true}',
    b'{"choices": [{"message": {"content": "x"}}]}',
    b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
    b'{"message": {"content": "cut"}, "done": false}',
    b'{"message": {"content": "cut"}}',
    b"\xff",
]


def test_garbage_as_a_complete_answer_is_a_bad_reply(faked: Engine) -> None:
    assert faked.fake is not None
    for garbage in WHOLE_GARBAGE:
        faked.fake.script_chat(Reply(headers={"content-type": "application/json"}, pieces=[garbage]))
        with pytest.raises(BadEngineReply) as caught:
            faked.llm.generate(PROMPT)
        with_hint(caught.value)


@pytest.mark.parametrize(
    ("dialect", "name", "error"),
    [
        ("ollama", "22_runner_killed_chat_stream", EngineUnavailable),
        ("ollama", "28_server_sigterm_mid_stream", BadEngineReply),
        ("ollama", "24_token_repeat_chat_stream", BadEngineReply),
        ("ollama", "24_token_repeat_chat_nonstream", BadEngineReply),
        ("sglang", "kill9_scheduler_stream", (BadEngineReply, EngineUnavailable)),
        ("sglang", "term_midstream_stream", None),
        ("sglang", "rf_bad_schema_stream", InvalidRequest),
        ("sglang", "abort_chat_stream", InferenceError),
        ("sglang", "abort_chat", InferenceError),
    ],
)
def test_a_recorded_late_failure_is_an_error(
    dialect: Dialect,
    name: str,
    error: type[InferenceError] | tuple[type[InferenceError], ...] | None,
    fake: Make,
    attach: Attach,
) -> None:
    """Also where the engine itself says [DONE] after it, or ends with a finish reason that is no finish."""
    engine = fake(dialect)
    engine.replay_chat(name)
    llm = attach(engine)
    if error is None:
        assert chunks(llm)[-1].finish_reason in ("stop", "length")
        return
    with pytest.raises(error) as caught:
        llm.generate(PROMPT) if "nonstream" in name or name == "abort_chat" else list(llm.stream(PROMPT))
    with_hint(caught.value)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "boom", "code": 500}}\n\n',
        b'data: {"error": "boom"}\n\n',
        b'error: {"code": 500, "message": "boom"}\n\n',
        b'data: {"object": "error", "message": "boom", "code": 500}\n\n',
    ],
)
def test_an_error_event_is_an_error_although_done_follows(faked: Engine, event: bytes) -> None:
    fake, full = faked.fake, shorter(faked)
    assert fake is not None
    if faked.kind == "ollama":
        event = b'{"error": "boom"}\n'
    fake.script_chat(Reply(headers=full.headers, pieces=[*full.pieces[:3], event, full.pieces[-1]], chunked=True))
    with pytest.raises(BadEngineReply, match="boom"):
        list(faked.llm.stream(PROMPT))


def test_vllms_dead_engine_is_unavailable_although_done_follows(fake: Make, attach: Attach) -> None:
    engine = fake("vllm")
    *_, killed, done = recorded("vllm", "kill9_enginecore_midstream").pieces
    full = engine.stream_reply()
    engine.script_chat(
        Reply(
            headers=full.headers,
            pieces=[*full.pieces[:3], killed[killed.index(b'data: {"error"') :], done],
            chunked=True,
        )
    )
    with pytest.raises(EngineUnavailable, match="EngineCore") as caught:
        list(attach(engine).stream(PROMPT))
    assert with_hint(caught.value).retryable


def test_what_came_before_an_error_is_passed_on(faked: Engine) -> None:
    """Also where both arrive in one read: text that the engine sent is not lost."""
    fake, full = faked.fake, shorter(faked)
    assert fake is not None
    error = b'{"error": "boom"}\n' if faked.kind == "ollama" else b'data: {"error": {"message": "boom"}}\n\n'
    for reply in (
        Reply(headers=full.headers, pieces=[*full.pieces[:3], error], chunked=True),
        Reply(headers=full.headers, pieces=[b"".join(full.pieces[:3]) + error], chunked=True),
    ):
        fake.script_chat(reply)
        got = []
        with pytest.raises(BadEngineReply, match="boom"):
            for piece in faked.llm.stream(PROMPT):
                got.append(piece)
        assert got


# Deadlines ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["ollama", "vllm", "sglang", "llamacpp"])
def test_an_engine_that_stalls_runs_into_a_deadline(dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    full = engine.stream_reply()
    none = Reply(headers=full.headers, end="stall", chunked=True)
    some = Reply(headers=full.headers, pieces=full.pieces[:3], end="stall")
    slow = Reply(headers=full.headers, pieces=[*full.pieces[:2] * 200], gap=0.02, end="stall")
    far = Deadlines(first_token=6, idle=6, total=8)
    cases = [
        ("first token", replace(far, first_token=0.2), none),
        ("first token", replace(far, first_token=0.2), Reply(delay=60)),
        ("idle", replace(far, idle=0.2), some),
        ("total", replace(far, total=0.3), slow),
    ]
    for limit, deadlines, reply in cases:
        llm = attach(engine, deadlines=deadlines)
        llm.models()
        cut, started = engine.cut, time.monotonic()
        engine.script_chat(reply)
        with pytest.raises(EngineTimeout, match=limit) as caught:
            list(llm.stream(PROMPT))
        assert time.monotonic() - started < 4, f"{limit}: long after its deadline"
        assert with_hint(caught.value).retryable
        engine.wait(lambda cut=cut: engine.live == 0 and engine.cut == cut + 1)


def test_a_complete_answer_has_a_deadline_too(faked: Engine, attach: Attach) -> None:
    fake = faked.fake
    assert fake is not None
    for deadlines in (Deadlines(first_token=0.2, total=8), Deadlines(first_token=8, total=0.2)):
        llm = attach(fake, deadlines=deadlines)
        llm.models()
        fake.script_chat(Reply(delay=60))
        with pytest.raises(EngineTimeout):
            llm.generate(PROMPT)
        fake.wait(lambda: fake.live == 0)


def test_a_slow_reader_does_not_count_as_a_slow_engine(faked: Engine, attach: Attach) -> None:
    """The idle deadline looks at the engine's silence, not at the caller's."""
    fake = faked.fake
    assert fake is not None
    fake.text = "one two three"
    llm = attach(fake, deadlines=Deadlines(idle=0.15, first_token=5, total=8))
    pieces = []
    for piece in llm.stream(PROMPT):
        pieces.append(piece)
        threading.Event().wait(0.2)
    assert "".join(pieces) == fake.text


def test_nothing_is_asked_again_after_the_request_went_out(faked: Engine) -> None:
    """One failure, one request: a retry could do the work twice."""
    fake = faked.fake
    assert fake is not None
    for status in (500, 503):
        fake.script_chat(Reply(status=status, pieces=[b"x"]))
        before = len(fake.asked)
        with pytest.raises(InferenceError):
            faked.llm.generate(PROMPT)
        assert len(fake.asked) == before + 1


def test_a_connection_is_not_leaked_by_failures(faked: Engine) -> None:
    fake, full = faked.fake, shorter(faked)
    assert fake is not None
    for _ in range(20):
        fake.script_chat(Reply(headers=full.headers, pieces=[b"data: {\n\n", b"{\n"], end="stall"))
        with contextlib.suppress(InferenceError):
            list(faked.llm.stream(PROMPT))
    fake.wait(lambda: fake.live == 0 and fake.connections <= 2)
    faked.llm.close()
    fake.wait(lambda: fake.connections == 0)


def test_close_and_use_again(faked: Engine) -> None:
    assert faked.fake is not None
    for _ in range(3):
        assert faked.llm.generate(PROMPT) == faked.fake.text
        faked.llm.close()
    with faked.llm as llm:
        assert llm.generate(PROMPT) == faked.fake.text

    async def main() -> str:
        async with faked.llm as llm:
            return await llm.agenerate(PROMPT)

    assert asyncio.run(main()) == faked.fake.text


def test_the_recorded_answers_are_read_to_the_byte(fake: Make, attach: Attach) -> None:
    """Every recorded complete chat answer is read as its transcript has it."""
    seen: Counter[str] = Counter()
    for dialect, names in {
        "ollama": ["06_chat_nonstream", "06_chat_natural_stop", "11_content_empty"],
        "vllm": ["chat", "chat_stop", "content_parts_text", "logit_bias"],
    }.items():
        engine = fake(dialect)
        llm = attach(engine)
        for name in names:
            body = json.loads(recorded(dialect, name).pieces[0])  # type: ignore[arg-type]
            engine.replay_chat(name)
            done = llm.complete(PROMPT)
            if dialect == "ollama":
                assert (done.text, done.usage.completion_tokens) == (
                    body["message"]["content"],
                    body.get("eval_count", 0),
                )
            else:
                assert (done.text, done.usage.as_dict()["total_tokens"]) == (
                    body["choices"][0]["message"]["content"],
                    body["usage"]["total_tokens"],
                )
            seen[dialect] += 1
    assert dict(seen) == {"ollama": 3, "vllm": 4}


def test_one_inferencer_many_models(fake: Make, attach: Attach) -> None:
    """A request may name another model of the same engine; the inferencer's own is the default."""
    engine = fake("ollama")
    engine.models = ["m", "n"]
    llm = attach(engine, "n")
    assert llm.complete(PROMPT).model_name == "n" and engine.body["model"] == "n"
    assert llm.complete(PROMPT, model_name="m").model_name == "m" and engine.body["model"] == "m"
    assert dumps(engine.body)


def test_an_inferencer_is_not_confused_by_a_second_on_the_same_engine(faked: Engine) -> None:
    assert faked.fake is not None
    with LLMInferencer(faked.kind, base_url=faked.fake.base_url) as other:
        assert other.generate(PROMPT) == faked.llm.generate(PROMPT)
    assert faked.llm.generate(PROMPT) == faked.fake.text


# A router in between -----------------------------------------------------------------------------
CALL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def test_behind_vllm_router_a_demanded_call_is_refused(fake: Make, attach: Attach) -> None:
    """vllm-router 0.1.17 takes `strict` out of tools, and vLLM then holds a call to nothing. It answers /list_workers;
    vLLM does not."""
    engine = fake("vllm")
    engine.capabilities += ["tools"]
    for _ in range(2):  # it is identified when it is found, and at the first request
        engine.script(engine._json({"urls": ["http://127.0.0.1:1"]}), "/list_workers")
    llm = attach(engine)
    with pytest.raises(UnsupportedFeature, match=r"tool_choice.*vllm-router"):
        llm.complete(PROMPT, tools=[CALL], tool_choice="required")
    assert not engine.asked
    llm.complete(PROMPT, tools=[CALL])


def test_behind_sglang_router_what_cannot_be_known_is_refused(fake: Make, attach: Attach) -> None:
    """sglang-router 0.3.2 passes neither /server_info nor /model_info nor /tokenize: what a template shows is seen
    from the number of prompt tokens."""
    engine = fake("sglang")
    engine.capabilities += ["tools", "vision"]
    engine._info = lambda path: (
        engine._json({"detail": "Not Found"}, 404) if "info" in path else type(engine)._info(engine, path)
    )  # type: ignore[method-assign]
    for _ in range(4):
        engine.script(engine._json({"detail": "Not Found"}, 404), "/tokenize")
    llm = attach(engine)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(UnsupportedFeature, match="images"):
        llm.complete([{"role": "user", "content": [image]}])
    assert [seen.json["max_tokens"] for seen in engine.asked] == [1, 1, 1, 1]
    assert llm.chat([{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "x", "content": "1"}])
