"""The rows: the question, and how the answer shows whether the field was honoured.

A row returns a note where the feature is honoured. It raises Dropped where the answer ignores what was asked,
Undecidable where the answer would look the same either way; a Refusal of the side passes through. Answers are kept to a
few tokens.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from . import schemas
from .judge import (
    DROPPED,
    FAILED,
    FEATURES,
    HONOURED,
    REFUSED,
    Decide,
    Dropped,
    Feature,
    Refusal,
    Undecidable,
    check,
    feature,
)
from .sides import Answer, Json, OnV1, Side, response_format

STORY = "Tell me a story about a fox."
HELLO = "Repeat the word 'hello' many times: hello hello hello hello"
TOKENS = 16
#: Two runs of an engine may differ in the last bits of a float (batches, caches): what must be equal is asked twice at
#: most.
TRIES = 2


def short(answer: Answer) -> str:
    return repr(answer.text[:60])


def baseline(side: Side, prompt: str, tokens: int = TOKENS) -> str:
    """The text at temperature 0, which a row can tell others from only if it comes a second time."""
    if (prompt, tokens) not in side.memo:
        texts = [side.ask(prompt, max_tokens=tokens, temperature=0.0).text for _ in range(2)]
        side.memo[prompt, tokens] = texts[0] if texts[0] == texts[1] else None
    if side.memo[prompt, tokens] is None:
        raise Undecidable("temperature 0 gives two different texts")
    return str(side.memo[prompt, tokens])


def wild(side: Side) -> list[str]:
    """Two texts of a hot sampler: what greedy-looking answers are told from."""
    if "wild" not in side.memo:
        side.memo["wild"] = [side.ask(STORY, max_tokens=TOKENS, temperature=1.5).text for _ in range(2)]
    if len({baseline(side, STORY), *side.memo["wild"]}) < 3:
        raise Undecidable("the sampler gives the same text at temperature 1.5 as at 0")
    return list(side.memo["wild"])


def equal(expected: str, ask: Callable[[], Answer], otherwise: str) -> Answer:
    """An answer with that text, at the second try at the latest."""
    got = Answer()
    for _ in range(TRIES):
        got = ask()
        if got.text.strip() == expected.strip():
            return got
    raise Dropped(f"{otherwise}: {expected[:60]!r} was due, {short(got)} came")


# --------------------------------------------------------------------------------------- length and sampling


@feature("max_tokens", "max_tokens")
def max_tokens(side: Side) -> None:
    got = side.ask(STORY, max_tokens=5, temperature=0.0)
    check(got.tokens <= 5 and len(got.text.split()) <= 5, f"{got.tokens} tokens: {short(got)}")
    check(baseline(side, STORY).startswith(got.text.rstrip("�")), "another text than without a limit")


@feature("a cut answer says `length`", "max_tokens")
def cut_says_length(side: Side) -> None:
    got = side.ask(STORY, max_tokens=3, temperature=0.0)
    check(got.finish == "length", f"finish_reason {got.finish!r}")


@feature("a cut stream says `length`", "max_tokens")
def cut_stream_says_length(side: Side) -> None:
    got = side.ask(STORY, max_tokens=3, temperature=0.0, stream=True)
    check(got.finish == "length", f"finish_reason {got.finish!r}")


@feature("a stream spells the whole answer", "stream")
def stream_is_whole(side: Side) -> None:
    expected = baseline(side, STORY)
    equal(expected, lambda: side.ask(STORY, max_tokens=TOKENS, temperature=0.0, stream=True), "the stream differs")


@feature("temperature", "temperature")
def temperature(side: Side) -> None:
    ask = partial(side.ask, STORY, max_tokens=TOKENS, temperature=0.0)
    first = ask().text
    equal(first, ask, "0 is not deterministic")
    check(
        len({first, *(side.ask(STORY, max_tokens=TOKENS, temperature=1.5).text for _ in range(2))}) > 1,
        "1.5 gives the text of 0",
    )


def greedy_like(side: Side, **fields: Any) -> None:
    """The sampler is left one token to take: a hot one says what the greedy one says."""
    expected = baseline(side, STORY)
    wild(side)
    name = ", ".join(f"{n}={v}" for n, v in fields.items())
    equal(expected, lambda: side.ask(STORY, max_tokens=TOKENS, temperature=1.5, **fields), f"{name} is not greedy")


@feature("top_p", "top_p")
def top_p(side: Side) -> None:
    greedy_like(side, top_p=1e-6)


@feature("top_k", "top_k")
def top_k(side: Side) -> None:
    greedy_like(side, top_k=1)


@feature("min_p", "min_p")
def min_p(side: Side) -> None:
    greedy_like(side, min_p=1.0)


@feature("seed", "seed")
def seed(side: Side) -> None:
    ask = partial(side.ask, STORY, max_tokens=TOKENS, temperature=1.0)
    first = ask(seed=11).text
    equal(first, lambda: ask(seed=11), "one seed, two texts")
    check(len({first, ask(seed=12).text, ask(seed=13).text}) > 1, "three seeds, one text")


def stop_cuts(side: Side, listed: bool, stream: bool) -> None:
    """A stop of two words, which are several tokens: all before it comes, and nothing of it."""
    full = baseline(side, STORY)
    words = full.split()
    if len(words) < 6:
        raise Undecidable(f"the answer is too short: {full!r}")
    stop = " ".join(words[4:6])
    given = ["zebra", stop] if listed else stop
    got = equal(
        full[: full.index(stop)],
        lambda: side.ask(STORY, max_tokens=TOKENS, temperature=0.0, stop=given, stream=stream),
        f"stop {stop!r}",
    )
    check(got.finish == "stop", f"finish_reason {got.finish!r}")


@feature("stop, a text", "stop")
def stop_text(side: Side) -> None:
    stop_cuts(side, listed=False, stream=False)


@feature("stop, a list", "stop")
def stop_list(side: Side) -> None:
    stop_cuts(side, listed=True, stream=False)


@feature("stop inside a stream", "stop")
def stop_stream(side: Side) -> None:
    stop_cuts(side, listed=True, stream=True)


def repetitions(text: str) -> int:
    words = re.findall(r"\w+", text.lower())
    return len(words) - len(set(words))


def penalty_shows(side: Side, name: str, high: float, low: float) -> str:
    """Its two ends give two texts, each of them twice, and the high end does not repeat more: on one of three prompts,
    since a weak penalty may not turn the greedy choice."""
    for prompt in (HELLO, "Say hello many times: hello hello hello", STORY):
        most, least = (
            [side.ask(prompt, max_tokens=TOKENS, temperature=0.0, **{name: value}).text for _ in range(2)]
            for value in (high, low)
        )
        if most[0] == most[1] != least[0] == least[1] and repetitions(most[0]) <= repetitions(least[0]):
            return f"{repetitions(most[0])} repeated words at {high}, {repetitions(least[0])} at {low}"
    raise Dropped(f"the same text at {high} and at {low}: {most[0][:60]!r}")


@feature("presence_penalty", "presence_penalty")
def presence_penalty(side: Side) -> str:
    return penalty_shows(side, "presence_penalty", 2.0, -2.0)


@feature("frequency_penalty", "frequency_penalty")
def frequency_penalty(side: Side) -> str:
    return penalty_shows(side, "frequency_penalty", 2.0, -2.0)


@feature("repetition_penalty", "repetition_penalty|repeat_penalty")
def repetition_penalty(side: Side) -> str:
    return penalty_shows(side, "repetition_penalty", 2.0, 0.5)


def logprobs_come(side: Side, top: int | None, stream: bool) -> None:
    more = {} if top is None else {"top_logprobs": top}
    got = side.ask(STORY, max_tokens=4, temperature=0.0, logprobs=True, stream=stream, **more)
    check(1 <= len(got.logprobs) <= got.tokens, f"{len(got.logprobs)} entries for {got.tokens} tokens")
    check(all(entry["logprob"] <= 0 for entry in got.logprobs), "a logarithm of a probability above 0")
    if top is not None:
        sizes = {len(entry.get("top_logprobs") or ()) for entry in got.logprobs}
        check(sizes == {top}, f"{sizes} alternatives, {top} asked")


@feature("logprobs", "logprobs")
def logprobs(side: Side) -> None:
    logprobs_come(side, None, stream=False)


@feature("top_logprobs", "logprobs")
def top_logprobs(side: Side) -> None:
    logprobs_come(side, 3, stream=False)


@feature("logprobs inside a stream", "logprobs")
def logprobs_stream(side: Side) -> None:
    logprobs_come(side, 2, stream=True)


# ----------------------------------------------------------------------------------------------------- tools


def tool(name: str, description: str, **properties: Json) -> Json:
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schemas.obj(**properties)},
    }


WEATHER = tool("get_weather", "The weather of a city", city=schemas.text(10), unit={"enum": ["celsius", "fahrenheit"]})
ADD = tool("add", "The sum of two numbers", a=schemas.integer(), b=schemas.integer())
ASK_WEATHER = "What is the weather in Paris?"
CALL_TOKENS = 128


def called(side: Side, got: Answer, wanted: Json, strict: bool = False) -> str:
    """Every call is of this tool. Its arguments fit the tool's schema where that was asked, and through us always."""
    if not got.calls and got.finish == "length" and re.match(r"\s*(<tool_call>|\[?\s*\{)", got.text):
        raise Undecidable(f"the call was cut, and says so: {short(got)}")
    check(bool(got.calls), f"no call: {short(got)}")
    for call in got.calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        check(name == wanted["function"]["name"], f"it calls {name!r}")
        if strict or not side.bare:
            check(json_fits(wanted["function"]["parameters"], arguments), f"the arguments do not fit: {arguments[:80]}")
    return f"{got.calls[0]['function']['name']}({got.calls[0]['function']['arguments']})"


def json_fits(schema: Json, text: str) -> bool:
    try:
        return schemas.fits(schema, schemas.spelled(text))
    except ValueError:
        return False


@feature("tools, tool_choice auto", "tool")
def tools_auto(side: Side) -> str:
    """A call, or at least tools that the model has seen: they lengthen the prompt."""
    got = side.ask(ASK_WEATHER, tools=[WEATHER], tool_choice="auto", max_tokens=48, temperature=0.0)
    if got.calls:
        return called(side, got, WEATHER)
    plain = side.ask(ASK_WEATHER, max_tokens=1, temperature=0.0)
    check(
        got.prompt_tokens > plain.prompt_tokens,
        f"the model never sees the tools: {plain.prompt_tokens} prompt tokens with and without them",
    )
    return (
        f"no call, but the model sees the tools: {got.prompt_tokens} prompt tokens, {plain.prompt_tokens} without them"
    )


@feature("tool_choice none", "tool")
def tools_none(side: Side) -> None:
    got = side.ask(ASK_WEATHER, tools=[WEATHER], tool_choice="none", max_tokens=8, temperature=0.0)
    check(not got.calls and bool(got.text), f"{len(got.calls)} calls")


@feature("tool_choice required", "tool")
def tools_required(side: Side) -> str:
    got = side.ask(ASK_WEATHER, tools=[WEATHER], tool_choice="required", max_tokens=CALL_TOKENS, temperature=0.0)
    return called(side, got, WEATHER)


@feature("tool_choice, a named function", "tool")
def tools_named(side: Side) -> str:
    choice = {"type": "function", "function": {"name": "add"}}
    return called(
        side,
        side.ask(ASK_WEATHER, tools=[WEATHER, ADD], tool_choice=choice, max_tokens=CALL_TOKENS, temperature=0.0),
        ADD,
    )


@feature("tool arguments, strict", "tool|strict")
def tools_strict(side: Side) -> str:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    got = side.ask(ASK_WEATHER, tools=[strict], tool_choice="required", max_tokens=CALL_TOKENS, temperature=0.0)
    return called(side, got, WEATHER, strict=True)


@feature("tool calls inside a stream", "tool")
def tools_stream(side: Side) -> str:
    got = side.ask(
        ASK_WEATHER, tools=[WEATHER], tool_choice="required", max_tokens=CALL_TOKENS, temperature=0.0, stream=True
    )
    return called(side, got, WEATHER)


@feature("tool calls in the history", "tool")
def tool_history(side: Side) -> None:
    """An earlier call's arguments reach the model: longer ones lengthen the prompt."""

    def size(city: str) -> int:
        call = {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
        }
        messages = [
            {"role": "user", "content": ASK_WEATHER},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny", "tool_call_id": "call00001"},
        ]
        return side.ask(messages, max_tokens=1, temperature=0.0).prompt_tokens

    small, large = size("Rome"), size("one of the towns that lie along the upper Rhine between Basel and Mainz")
    check(
        large > small,
        f"the model never sees the call: {small} prompt tokens with short arguments, {large} with long ones",
    )


# ------------------------------------------------------------------------------------------------- reasoning


@feature("think on", "think")
def think_on(side: Side) -> None:
    got = side.ask("How much is 3 + 4?", think=True, max_tokens=32, temperature=0.0)
    if not got.reasoning:
        plain = side.ask("How much is 3 + 4?", max_tokens=1, temperature=0.0)
        check(got.prompt_tokens != plain.prompt_tokens, "no reasoning, and the same prompt as without it")


@feature("think off", "think")
def think_off(side: Side) -> str:
    got = side.ask("How much is 3 + 4?", think=False, max_tokens=16, temperature=0.0)
    check(not got.reasoning and bool(got.text), f"{len(got.reasoning)} characters of reasoning")
    return "no reasoning came"


# ----------------------------------------------------------------------------------------------- constraints


def constrained(
    side: Side, prompt: str, tokens: int = schemas.TOKENS, opening: str | None = None, **fields: Any
) -> Answer:
    """A constrained answer that was not cut. A weak model rambles inside a constraint that lets it, and is asked again;
    a constraint that does not (no `opening`), or an answer that does not begin with it, was ignored."""
    failed: Refusal | None = None
    for attempt in range(3):
        try:
            got = side.ask(prompt, max_tokens=tokens, temperature=0.0 if attempt == 0 else 0.8, **fields)
        except Refusal as exc:
            if exc.kind != "structured_output_invalid" or opening is None:
                raise
            failed = exc
            continue
        if got.finish != "length":
            return got
        check(opening is not None and got.text.lstrip().startswith(opening), f"unconstrained: {short(got)}")
    raise failed or Undecidable(f"the model never ends its answer within {tokens} tokens")


def outcome(side: Side, schema: Json, prompt: str, tokens: int = schemas.TOKENS) -> tuple[str, str]:
    """What came of one schema and one prompt: a verdict and why. A cut answer that says so is an honest failure."""
    try:
        got = side.ask(prompt, schema=schema, max_tokens=tokens, temperature=0.0)
    except Refusal as exc:
        return (REFUSED if exc.refuses else FAILED), str(exc)
    if json_fits(schema, got.text) and (side.bare or got.result == schemas.spelled(got.text)):
        return HONOURED, ""
    return (FAILED, "cut, and says so") if got.finish == "length" else (DROPPED, got.text[:60])


def schema_row(names: tuple[str, ...], side: Side) -> str:
    with ThreadPoolExecutor(side.parallel) as pool:
        found = dict(
            zip(
                names,
                pool.map(lambda name: outcome(side, schemas.SCHEMAS[name], schemas.PROMPTS[0]), names),
                strict=True,
            )
        )
    named = {
        verdict: [name for name, (each, _) in found.items() if each == verdict]
        for verdict in (HONOURED, REFUSED, FAILED, DROPPED)
    }
    tally = ", ".join(
        f"{len(which)} {word}" + (f" ({'; '.join(which[:8])})" if verdict != HONOURED else "")
        for (verdict, which), word in zip(named.items(), ("valid", "refused", "honest errors", "wrong"), strict=True)
        if which
    )
    check(not named[DROPPED], tally)
    if not named[HONOURED]:
        raise Refusal("schema", f"{tally}: {next(iter(found.values()))[1]}", bool(named[REFUSED]))
    return tally


@feature("schema", "schema")
def schema_few(side: Side) -> str:
    return schema_row(schemas.SHORT, side)


@feature("schema, 50 of them", "schema", short=False)
def schema_all(side: Side) -> str:
    return schema_row(tuple(schemas.SCHEMAS), side)


@feature("schema inside a stream", "schema|response_format")
def schema_stream(side: Side) -> str:
    schema = schemas.obj(城市=schemas.text(8), n=schemas.integer())
    return fitting(schema, constrained(side, "北京", opening="{", schema=schema, stream=True))


def fitting(schema: Json, got: Answer) -> str:
    if got.finish == "length" and got.text.lstrip().startswith("{"):
        return "cut, and it says so"
    check(json_fits(schema, got.text), f"it does not fit: {short(got)}")
    return got.text[:60]


@feature("schema, cut by max_tokens", "schema|max_tokens")
def schema_cut(side: Side) -> str:
    """Half a JSON document is never passed off as an answer."""
    try:
        got = side.ask(STORY, schema=schemas.obj(a={"type": "string", "minLength": 40}), max_tokens=5, temperature=0.0)
    except Refusal as exc:
        if exc.kind == "structured_output_invalid":
            return exc.kind
        raise
    check(got.finish == "length", f"finish_reason {got.finish!r}: {short(got)}")
    return "it says length"


ANY_JSON = 'Answer with this JSON object: {"a": 1}'


@feature("any JSON object", "schema|response_format|json")
def any_object(side: Side) -> str:
    return fitting({"type": "object"}, constrained(side, ANY_JSON, tokens=48, opening="{", schema={}))


CHOICES = (
    "it's",
    'say "hi"',
    "北京市",
    "a\\b/c",
    "x|y (z)* [1]?",
    "two\nlines",
    "🚲 bike",
    " padded ",
    "$5.00 ^",
    "{}",
)


@feature("choice", "choice")
def choice(side: Side) -> None:
    got = constrained(side, STORY, 8, choice=["red", "blue"])
    check(got.text in ("red", "blue"), short(got))
    stream = constrained(side, STORY, 8, choice=["red", "blue"], stream=True)
    check(stream.text in ("red", "blue"), f"streamed: {short(stream)}")


@feature("choice: quotes, Chinese, special characters", "choice")
def choice_special(side: Side) -> str:
    for option in CHOICES:
        got = constrained(side, STORY, 24, choice=[option])
        check(got.text == option, f"{option!r} became {short(got)}")
    return f"{len(CHOICES)} of them"


REGEXES = (
    r"[A-Z]{3}-[0-9]{4}",
    r"cat|dog",
    r"\d{1,3}(\.\d{1,2})?",
    r"https?://[a-z]{1,8}\.(com|org)/",
    r"[一-龥]{2,4}",
    r'"[a-z]{1,6}"',
)


@feature("regex", "regex")
def regex(side: Side) -> str:
    for pattern in REGEXES:
        got = constrained(side, STORY, 40, regex=pattern)
        check(re.fullmatch(pattern, got.text) is not None, f"{pattern} became {short(got)}")
    return f"{len(REGEXES)} of them"


GRAMMAR = 'root ::= ("yes" | "no") " " [0-9]'


@feature("grammar", "grammar")
def grammar(side: Side) -> str:
    got = constrained(side, STORY, 16, grammar=GRAMMAR)
    check(re.fullmatch("(yes|no) [0-9]", got.text) is not None, short(got))
    return got.text


@feature("grammar in Lark", "grammar|lark", short=False)
def grammar_lark(side: Side) -> None:
    got = constrained(side, STORY, 16, grammar='start: ("yes" | "no") " " /[0-9]/')
    check(re.fullmatch("(yes|no) [0-9]", got.text) is not None, short(got))


def must_be_refused(side: Side, **fields: Any) -> None:
    got = side.ask(STORY, max_tokens=8, temperature=0.0, **fields)
    raise Dropped(f"answered {short(got)}")


@feature("a broken regex", "regex|pattern")
def regex_broken(side: Side) -> None:
    must_be_refused(side, regex="(")


@feature("a broken grammar", "grammar")
def grammar_broken(side: Side) -> None:
    must_be_refused(side, grammar='root ::= ("a"')


@feature("a broken schema", "schema|type|grammar")
def schema_broken(side: Side) -> None:
    must_be_refused(side, schema={"type": "object", "properties": {"a": {"type": "wrong"}}, "required": ["a"]})


@feature("two constraints at once", "regex|grammar|structured|constrain|json_schema")
def two_constraints(side: Side) -> None:
    must_be_refused(side, schema=schemas.obj(a=schemas.integer()), grammar=GRAMMAR)


@feature("a constraint beside tools", "tool|schema|response_format", short=False)
def constraint_and_tools(side: Side) -> str:
    """Either both can hold (an answer that fits, or a call), or one must be refused."""
    schema = schemas.obj(a=schemas.integer())
    got = side.ask(STORY, schema=schema, tools=[WEATHER], tool_choice="auto", max_tokens=48, temperature=0.0)
    return called(side, got, WEATHER) if got.calls else fitting(schema, got)


# ------------------------------------------------------------------------ what does not fit, or is not there


def png() -> str:
    """A red dot, as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(url: str) -> list[Json]:
    return [
        {"role": "user", "content": [{"type": "text", "text": STORY}, {"type": "image_url", "image_url": {"url": url}}]}
    ]


@feature("images", "image|multimodal")
def images(side: Side) -> str:
    """A picture that the model sees lengthens the prompt by more than its few words."""
    got = side.ask(picture(png()), max_tokens=2, temperature=0.0)
    plain = side.ask(STORY, max_tokens=2, temperature=0.0)
    check(
        got.prompt_tokens > plain.prompt_tokens + 8,
        f"{got.prompt_tokens} prompt tokens with it, {plain.prompt_tokens} without",
    )
    return f"{got.prompt_tokens} prompt tokens with it, {plain.prompt_tokens} without"


@feature("text in several parts", "content|parts")
def parts(side: Side) -> None:
    one, two = "Tell me a story", " about a fox."
    message = {"role": "user", "content": [{"type": "text", "text": one}, {"type": "text", "text": two}]}
    full = side.ask(STORY, max_tokens=1, temperature=0.0).prompt_tokens
    got = side.ask([message], max_tokens=1, temperature=0.0).prompt_tokens
    check(got >= full, f"{got} prompt tokens in two parts, {full} in one")


@feature("embeddings of a chat model", "embed|not found")
def embeddings(side: Side) -> str:
    vector = side.embed("fox")
    check(bool(vector) and any(vector), "an empty vector")
    return f"{len(vector)} numbers"


def overflow(side: Side, stream: bool) -> None:
    words = (side.context or 8192) + 200
    got = side.ask("fox " * words, max_tokens=2, temperature=0.0, stream=stream)
    check(got.prompt_tokens >= words, f"{words} words were cut to {got.prompt_tokens} tokens")
    raise Undecidable(f"{words} words fit")


@feature("a prompt that does not fit", r"\d+ .*\d+")
def prompt_overflow(side: Side) -> None:
    overflow(side, stream=False)


@feature("a prompt that does not fit, streamed", r"\d+ .*\d+")
def prompt_overflow_stream(side: Side) -> None:
    overflow(side, stream=True)


@feature("a wrong model name", "model")
def wrong_model(side: Side) -> None:
    must_be_refused(side, model="no-such-model")


@feature("an unknown field", "frobnicate")
def unknown_field(side: Side) -> None:
    must_be_refused(side, frobnicate=1)


@feature("on_unsupported=ignore names what it leaves out", "on_unsupported")
def ignore_names(side: Side) -> str:
    if side.bare:
        raise Undecidable("a field of ours")
    given: tuple[Json, ...] = (
        {"think": True},
        {"seed": 1},
        {"regex": "[a-z]{3}"},
        {"grammar": GRAMMAR},
        {"tools": [WEATHER]},
    )
    for fields in given:
        got = side.ask(STORY, max_tokens=12, temperature=0.0, on_unsupported="ignore", **fields)
        if got.ignored:
            check(set(got.ignored) == set(fields), f"{fields} left out, {got.ignored} named")
            return ", ".join(got.ignored)
    raise Undecidable("this engine does all that was tried")


# ------------------------------------------------------------------------------------------- OpenAI's routes


def chat(side: Side, prompt: str = STORY, tokens: int = TOKENS, **body: Any) -> Answer:
    return side.v1(
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=body.pop("temperature", 0.0),
        **body,
    )


def on_v1(row: Feature) -> Decide:
    return lambda side: row.decide(OnV1(side))


AGAIN = (
    "stop, a list",
    "stop inside a stream",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_logprobs",
    "a cut stream says `length`",
    "a prompt that does not fit",
    "a prompt that does not fit, streamed",
    "images",
    "embeddings of a chat model",
    "tools, tool_choice auto",
    "tool_choice none",
    "tool_choice required",
    "tool_choice, a named function",
    "tool arguments, strict",
    "tool calls inside a stream",
    "tool calls in the history",
    "a wrong model name",
    "an unknown field",
)
for _row in [row for row in FEATURES if row.name in AGAIN]:
    FEATURES.append(
        Feature(
            f"/v1 {_row.name}", on_v1(_row), _row.named, short=_row.name in ("an unknown field", "tool_choice required")
        )
    )


@feature("/v1 max_completion_tokens", "max_completion_tokens")
def v1_max_completion_tokens(side: Side) -> None:
    got = side.v1(messages=[{"role": "user", "content": STORY}], max_completion_tokens=4, temperature=0.0)
    check(got.tokens <= 4 and got.finish == "length", f"{got.tokens} tokens, finish_reason {got.finish!r}")


@feature("/v1 n", r"\bn\b")
def v1_n(side: Side) -> None:
    got = chat(side, tokens=4, n=2, temperature=1.0)
    check(len(got.texts) == 2, f"{len(got.texts)} choice")


@feature("/v1 stream_options", "stream_options")
def v1_usage(side: Side) -> str:
    with_it = chat(side, tokens=4, stream=True, stream_options={"include_usage": True})
    without = chat(side, tokens=4, stream=True)
    check(with_it.usage_events >= 1 and with_it.tokens > 0, "no usage")
    return f"{with_it.usage_events} events with a usage, {without.usage_events} without the field"


FIXED = schemas.obj(a={"enum": ["x", "y"]}, n=schemas.integer())


@feature("/v1 response_format json_schema", "response_format|schema")
def v1_json_schema(side: Side) -> str:
    return fitting(FIXED, chat(side, tokens=48, response_format=response_format(FIXED)))


@feature("/v1 response_format json_schema, streamed", "response_format|schema", short=False)
def v1_json_schema_stream(side: Side) -> str:
    return fitting(FIXED, chat(side, tokens=48, response_format=response_format(FIXED), stream=True))


@feature("/v1 response_format json_object", "response_format")
def v1_json_object(side: Side) -> str:
    got = chat(side, ANY_JSON, 64, response_format={"type": "json_object"})
    return fitting({"type": "object"}, got)


@feature("/v1 response_format of an unknown type", "response_format", short=False)
def v1_format_unknown(side: Side) -> None:
    raise Dropped(f"answered {short(chat(side, tokens=8, response_format={'type': 'yaml'}))}")


@feature("/v1 response_format json_schema without a schema", "response_format|schema", short=False)
def v1_format_empty(side: Side) -> None:
    raise Dropped(f"answered {short(chat(side, tokens=8, response_format={'type': 'json_schema'}))}")


def other_dialect(name: str, value: Any, pattern: str, side: Side) -> str:
    """A constraint as some engine spells it: any other engine must refuse it, or keep to it."""
    got = chat(side, tokens=32, **{name: value})
    if name.endswith("json") or name in ("format", "json_schema"):
        return fitting(FIXED, got)
    check(re.fullmatch(pattern, got.text) is not None, f"unconstrained: {short(got)}")
    return got.text


DIALECTS: tuple[tuple[str, Any], ...] = (
    ("guided_json", FIXED),
    ("guided_regex", "red|blue"),
    ("guided_choice", ["red", "blue"]),
    ("structured_outputs", {"choice": ["red", "blue"]}),
    ("regex", "red|blue"),
    ("ebnf", 'root ::= "red" | "blue"'),
    ("grammar", 'root ::= "red" | "blue"'),
    ("json_schema", FIXED),
    ("format", FIXED),
)
for _name, _value in DIALECTS:
    FEATURES.append(
        Feature(
            f"/v1 {_name}",
            partial(other_dialect, _name, _value, "red|blue"),
            _name,
            short=_name in ("guided_json", "regex", "format"),
        )
    )


@feature("/v1 a remote image URL", "image|multimodal|messages")
def v1_remote_image(side: Side) -> None:
    got = side.v1(messages=picture("http://127.0.0.1:9/fox.png"), max_tokens=2)
    raise Dropped(f"answered {short(got)}")


@feature("/v1 logit_bias", "logit_bias", short=False)
def v1_logit_bias(side: Side) -> None:
    plain, got = chat(side, tokens=6), chat(side, tokens=6, logit_bias={"500": 100})
    check(got.text != plain.text and got.tokens == 6, f"the same text: {short(got)}")


@feature("/v1 repeat_penalty", "repeat_penalty", short=False)
def v1_repeat_penalty(side: Side) -> str:
    return penalty_shows(OnV1(side), "repeat_penalty", 2.0, 0.5)


@feature("/v1 functions, the old form of tools", "functions", short=False)
def v1_functions(side: Side) -> None:
    got = chat(side, ASK_WEATHER, 32, functions=[WEATHER["function"]], function_call={"name": "get_weather"})
    check(bool(got.calls), f"no call: {short(got)}")


@feature("/v1 reasoning_effort", "reasoning_effort|think", short=False)
def v1_reasoning_effort(side: Side) -> None:
    got, plain = chat(side, tokens=8, reasoning_effort="high"), chat(side, tokens=1)
    check(
        bool(got.reasoning) or got.prompt_tokens != plain.prompt_tokens,
        "no reasoning, and the same prompt as without it",
    )


@feature("/v1 min_tokens", "min_tokens", short=False)
def v1_min_tokens(side: Side) -> None:
    plain = chat(side, "Answer with one word: yes.", 40)
    if plain.finish != "stop":
        raise Undecidable("the model talks on without it")
    got = chat(side, "Answer with one word: yes.", 40, min_tokens=plain.tokens + 8)
    check(got.tokens >= plain.tokens + 8, f"{got.tokens} tokens, {plain.tokens} without it")


@feature("/v1 ignore_eos", "ignore_eos", short=False)
def v1_ignore_eos(side: Side) -> None:
    plain = chat(side, "Answer with one word: yes.", 40)
    if plain.finish != "stop":
        raise Undecidable("the model talks on without it")
    got = chat(side, "Answer with one word: yes.", plain.tokens + 8, ignore_eos=True)
    check(got.finish == "length", f"finish_reason {got.finish!r} after {got.tokens} tokens")


@feature("/v1 user", "user", short=False)
def v1_user(side: Side) -> str:
    """A field that changes no word is let through; ours is to say so in X-Ignored-Fields."""
    got = chat(side, tokens=2, user="someone")
    if side.bare:
        return "changes no word"
    check("user" in got.ignored, "X-Ignored-Fields does not name it")
    return "named in X-Ignored-Fields"


COMPLETIONS = "/v1/completions"


def complete(side: Side, tokens: int = 6, **body: Any) -> Answer:
    return side.v1(COMPLETIONS, prompt="The fox jumps over", max_tokens=tokens, temperature=0.0, **body)


@feature("/v1/completions stop", "stop", short=False)
def completions_stop(side: Side) -> None:
    plain = complete(side, 12).text
    stop = plain.split()[3]
    got = complete(side, 12, stop=[stop]).text
    check(got.strip() == plain[: plain.index(stop)].strip(), f"{plain!r} was not stopped at {stop!r}: {got!r}")


@feature("/v1/completions echo", "echo", short=False)
def completions_echo(side: Side) -> None:
    got = complete(side, echo=True)
    check(got.text.startswith("The fox jumps over"), f"the prompt is not echoed: {short(got)}")


@feature("/v1/completions suffix", "suffix", short=False)
def completions_suffix(side: Side) -> None:
    plain, got = complete(side), complete(side, suffix=" and that was the end of the lazy dog.")
    check(
        got.prompt_tokens > plain.prompt_tokens,
        f"the model never sees it: {plain.prompt_tokens} prompt tokens with and without it",
    )


@feature("/v1/completions best_of", "best_of", short=False)
def completions_best_of(side: Side) -> None:
    plain, got = complete(side), complete(side, best_of=3)
    check(got.tokens > plain.tokens, f"{got.tokens} tokens, {plain.tokens} without it")


@feature("/v1/completions logprobs", "logprobs", short=False)
def completions_logprobs(side: Side) -> None:
    check(bool(complete(side, logprobs=2).logprobs), "none came")


@feature("/v1/completions response_format", "response_format", short=False)
def completions_response_format(side: Side) -> str:
    return fitting(FIXED, complete(side, 48, response_format=response_format(FIXED)))


@feature("/v1/completions tools", "tool", short=False)
def completions_tools(side: Side) -> None:
    plain, got = complete(side), complete(side, tools=[WEATHER], tool_choice="required")
    check(bool(got.calls) or got.prompt_tokens > plain.prompt_tokens, f"the model never sees them: {short(got)}")
