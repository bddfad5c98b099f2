"""What becomes of every field of the Responses and Messages APIs: asked of each engine, and looked at.

    python -m tests.conformance.surfaces          # asks, writes results/surfaces/fields.json and the table in README.md
    python -m tests.conformance.surfaces --table  # the table alone, from the results

Every row of `official.py` is asked with and without its field, whole and streamed. What reached the engine, what was
answered, `X-Ignored-Fields` and the error's text decide. Exits 1 where a field is dropped in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import llm_inference as product
from tests.fake_engine import DIALECTS, TEXT, Dialect, Reply
from tests.harness import Stand, serving

from . import official
from .official import COUNT, MESSAGES, RESPONSES, Json, Row
from .table import NAMES, line

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "surfaces" / "fields.json", HERE / "README.md"
CONSTRAINTS = ("format", "response_format", "json_schema", "grammar")  #: in a body, to the scripted engines
#: fields that are for us alone: they show in the answer. That of a real engine may also differ by chance.
IN_ANSWERS = r"stream|reasoning\.(generate_)?summary|thinking\[\w+\]\.display|.*parallel_tool_(calls|use)"
#: fields that show in an answer of several calls alone, on Ollama
ONE_CALL = ("parallel_tool_calls", "tool_choice[auto].disable_parallel_tool_use")
TEMPLATE = HERE.parent / "integration" / "tools.jinja"
BEGIN, END = "<!-- surfaces -->\n", "<!-- /surfaces -->"
SAME, REFUSED, NAMED, ANSWER, NOTHING = "yes", "refused", "named", "answer", "nothing"
DROPPED, FAILED = "DROPPED", "FAILED"
EMBEDDED = "embedded"
COLUMNS = (*DIALECTS[:3], EMBEDDED)  #: of the table; the scripted llama.cpp is in the suite
HEADS = {**NAMES, EMBEDDED: "llama.cpp, embedded"}

EVERYWHERE = (*DIALECTS, EMBEDDED)
NOT_THINKING = ("llamacpp", EMBEDDED)  #: their models do not think
#: Rows that change nothing: (sides, pattern of the key without its API, reason). What else changes nothing was dropped.
NO_EFFECT: tuple[tuple[Sequence[str], str, str], ...] = (
    (EVERYWHERE, r'truncation: "disabled"', "nothing is ever shortened here"),
    (EVERYWHERE, r'service_tier: "(auto|default)"', "there is one tier"),
    (EVERYWHERE, r'text\.verbosity: "medium"|text\.format\[text\]|parallel_tool_calls: true', "the default"),
    (EVERYWHERE, r'stream_options.*: (\{"include_obfuscation": )?false\}?', "nothing is obfuscated here"),
    (EVERYWHERE, r"max_tool_calls: 7", "it limits the tools that OpenAI runs; none are run here"),
    (EVERYWHERE, r'input\[\w+\]\.(id|status): "\w+"', "it says nothing to a model"),
    (EVERYWHERE, r'input\[function_call_output\]\.(name|namespace): "x"', "the call says it"),
    (EVERYWHERE, r".*\[output_text\]\.(annotations|logprobs)", "an answer has them beside its text"),
    (EVERYWHERE, r'assistant\[redacted_thinking\]\.data: "x2"', "the block is left out, and named"),
    (EVERYWHERE, r'thinking\[\w+\]\.display: "summarized"', "all of the thinking is sent, not a summary alone"),
    (EVERYWHERE, r"max_tokens: 9", "a prompt's tokens do not depend on it"),  # /count_tokens
    (
        NOT_THINKING,
        r'(reasoning\.effort: "none")|thinking(\[disabled\]|: \{"type": "disabled"\})',
        "the model does not think",
    ),
    (NOT_THINKING, r'reasoning\.(generate_)?summary: "(auto|detailed)"', "the model does not think"),
    (NOT_THINKING, r'thinking\[\w+\]\.display: "omitted"', "the model does not think"),
    (("ollama",), r'tool_choice: "auto"|tool_choice\[auto\]', "the default"),
    (("ollama",), r'text\.format\[json_schema\]\.(name|description): "\w+"', "Ollama takes the schema alone"),
    (("ollama",), r"text\.format\[json_schema\]\.strict: true", "a schema is always enforced"),
    (
        ("ollama",),
        r'.*(call_id|tool_use_id|\[tool_use\]\.id): "c12"',
        "it joins a call to its result, whose tool is named",
    ),
    (("ollama",), r"image\.source\[base64\]\.media_type: .*", "Ollama takes the data alone"),
)
#: what a refusal calls it
OTHER_NAMES = {"input_image": "images", "image": "images", "base64": "images", "mode": "tool_choice"}


@dataclass
class Side:
    """A server of ours, and what its engine was sent."""

    name: str
    client: httpx.Client
    model: str
    count: Callable[[], int]  #: what reached the engine so far
    since: Callable[[int], list[Json]]  #: the bodies after that many
    prepare: Callable[[Row, bool], None] = lambda row, stream: None  #: for the next answer
    memo: dict[str, Seen] = field(default_factory=dict)  #: what the requests without a field came to


@dataclass(frozen=True)
class Seen:
    """What one request came to."""

    status: int
    body: Json | None  #: what the engine was sent
    answer: Any  #: without ids and times
    error: str
    ignored: frozenset[str]
    echo: Json
    streamed: bool


# -------------------------------------------------------------------------------------------------------- asking


@contextlib.contextmanager
def scripted(dialect: Dialect) -> Iterator[Side]:
    """A scripted engine whose model thinks and sees, so that every field has something to act on."""
    with Stand(dialect, capabilities=["vision"], reasoning="Hm.") as stand:
        stand.engine.answer = lambda body: '{"city": "Paris"}' if body.keys() & CONSTRAINTS else TEXT

        def since(number: int) -> list[Json]:
            return [seen.json for seen in stand.engine.requests[number:] if seen.path == stand.engine.chat]

        def prepare(row: Row, stream: bool) -> None:
            if dialect == "ollama" and row.name in ONE_CALL:
                stand.engine.script_chat(_two_calls(stand.engine.model, stream))  # the module sends the first alone

        yield Side(dialect, stand.client, stand.model, lambda: len(stand.engine.requests), since, prepare)


def _two_calls(model: str, stream: bool) -> Reply:
    """A line of Ollama's, which is a complete answer too."""
    calls = [{"id": name, "function": {"name": "weather", "arguments": {"city": name}}} for name in ("Bonn", "Rome")]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    counts = {"done": True, "done_reason": "stop", "prompt_eval_count": 1, "eval_count": 1}
    body = {"model": model, "created_at": "2026-11-28T12:00:00Z", "message": said, **counts}
    kind = "application/x-ndjson" if stream else "application/json"
    return Reply(headers={"content-type": kind}, pieces=[json.dumps(body).encode() + b"\n"])


@contextlib.contextmanager
def embedded() -> Iterator[Side]:
    """The real llama.cpp, started by the module; a subclass of its adapter keeps what is sent."""
    sent: list[Json] = []

    class Kept(product.LlamaCppAdapter):
        def encode(self, request: Any, body: Json) -> tuple[str, Json]:
            path, wire = super().encode(request, body)
            sent.append(json.loads(json.dumps(wire)))
            return path, wire

    known = product.LLMInferencer.ENGINE_MAP
    usual, known["llamacpp"] = known["llamacpp"], Kept
    try:
        arguments = ("n_ctx=4096", f"chat_template={TEMPLATE.read_text()}")
        app = product.create_app(product.Settings(engine="llamacpp", launch_args=arguments))
        with serving(app) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            model = f"llamacpp/{product.DEFAULT_MODEL}"
            yield Side(EMBEDDED, client, model, lambda: len(sent), lambda number: sent[number:])
    finally:
        known["llamacpp"] = usual


def ask(side: Side, row: Row, body: Json, stream: bool) -> Seen:
    """Send that body, with the side's model where the row is not about the model."""
    asked = {**body, "model": body.get("model") or side.model}
    if stream:
        asked["stream"] = True
    side.prepare(row, stream)
    before = side.count()
    reply = side.client.post(row.api, json=asked)
    found = side.since(before)
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    events = _events(reply.text) if streamed else [_whole(reply)]
    failed = [event for event in events if event.get("type") in ("error", "response.failed")] if streamed else []
    error = reply.text if reply.status_code != 200 else json.dumps(failed) if failed else ""
    ignored = frozenset(filter(None, reply.headers.get("x-ignored-fields", "").split(", ")))
    echo = events[-1].get("response", events[-1])
    status = 502 if failed else reply.status_code
    return Seen(status, found[-1] if found else None, _plain(events), error, ignored, echo, streamed)


def _whole(reply: httpx.Response) -> Json:
    """The object; a bare engine may send something else."""
    with contextlib.suppress(ValueError):
        value = reply.json()
        return value if isinstance(value, dict) else {"no object": value}
    return {"no object": reply.text[:200]}


def _events(text: str) -> list[Json]:
    lines = [each.removeprefix("data: ") for each in text.split("\n") if each.startswith("data: ")]
    return [json.loads(each) for each in lines if each != "[DONE]"]


#: what differs from answer to answer; of a prompt's tokens, how many were cached
_VOLATILE = frozenset(
    ("id", "item_id", "call_id", "created_at", "completed_at", "request_id", "input_tokens", "input_tokens_details")
) | {"cache_read_input_tokens", "cache_creation_input_tokens"}


def _plain(events: list[Json]) -> Any:
    """The events, or the one object, without what is new in each answer."""

    def cleaned(value: Any, depth: int = 0) -> Any:
        if isinstance(value, list):
            return [cleaned(each) for each in value]
        if not isinstance(value, dict):
            return value
        echo = value.get("object") == "response"
        kept = ("object", "output", "status", "usage", "error", "incomplete_details") if echo else value
        return {name: cleaned(value[name]) for name in kept if name in value and name not in _VOLATILE}

    return cleaned(events)


# ------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Verdict:
    """One cell. `how`: one of the words above, or the engine's own name for what it was sent."""

    how: str
    shown: bool = False  #: the answer differs too
    note: str = ""


def verdict(row: Row, plain: Seen, asked: Seen) -> Verdict:
    """What became of the field, from what was seen with and without it."""
    same = _message(asked.error) == _message(plain.error)
    if 400 <= plain.status < 500 and (same or _names(row, asked.error)):
        return Verdict(REFUSED, note=f"with what holds it: {_message(asked.error)}")
    if plain.status != 200 and plain.body is None:
        return Verdict(FAILED, note=f"without it: {plain.error[:200]}")
    if 400 <= asked.status < 500:
        if _names(row, asked.error):
            return Verdict(REFUSED, note=_message(asked.error))
        return Verdict(FAILED, note=f"refused without its name: {_message(asked.error)}")
    shown = asked.answer != plain.answer or asked.streamed != plain.streamed
    named = asked.ignored if row.again else asked.ignored - plain.ignored
    if any(_names(row, each) for each in named):
        return Verdict(NAMED, shown, ", ".join(sorted(named)))
    if asked.streamed != plain.streamed:
        return Verdict(ANSWER, shown)
    changed = _changed(plain.body, asked.body)
    if changed:
        return Verdict(_word(row, plain, asked, changed), shown, _message(asked.error))
    if asked.status != 200:
        return Verdict(FAILED, note=_message(asked.error))
    given_back = row.name == "metadata" and asked.echo.get("metadata") == row.value
    if given_back or (shown and re.fullmatch(IN_ANSWERS, row.name)):
        return Verdict(ANSWER, True)
    return Verdict(DROPPED)


def _last(row: Row) -> str:
    """The word that a refusal must hold: the field's own name, or the type."""
    if row.of_type:
        return row.name.rpartition("[")[2].removesuffix("]")
    return row.name.rpartition(".")[2]


def _names(row: Row, text: str) -> bool:
    words = [_last(row)]
    if isinstance(row.value, list) and len(row.value) == 1 and isinstance(row.value[0], str):
        words.append(row.value[0])  # of `include`, each value is a thing of its own
    if isinstance(row.value, dict):
        words += list(row.value)  # an object of one field
    if row.of_type:  # or the place of the type
        words += ["type:", row.name.rpartition("[")[0].rpartition(".")[2]]
    words += [OTHER_NAMES[_last(row)]] if _last(row) in OTHER_NAMES else []
    words += [row.name.partition("[")[0]] if _last(row) in official.UNKNOWN else []  # the object that has it
    return any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) for word in words)


def _message(error: str) -> str:
    if not error:
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(error)["error"]["message"])[:200]
    return error[:200]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """The scalars in a body, by their paths."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {found: leaf for name, inner in items for found, leaf in _leaves(inner, (*path, name)).items()}
    return {path: value}


def _changed(plain: Json | None, asked: Json | None) -> list[tuple[Any, ...]]:
    """The places where two bodies differ."""
    if asked is None:
        return []
    before, after = _leaves(plain), _leaves(asked)
    gone = object()
    return [place for place in {**before, **after} if before.get(place, gone) != after.get(place, gone)]


def _word(row: Row, plain: Seen, asked: Seen, changed: list[tuple[Any, ...]]) -> str:
    """`yes` where the engine was sent the field with its value, else the name under which it was sent something."""
    leaves = _leaves(asked.body)
    own = [place for place in changed if _last(row) in place and place in leaves]
    if not row.of_type and any(isinstance(row.value, dict | list) or leaves[place] == row.value for place in own):
        return SAME
    places = sorted({".".join(part for part in place if isinstance(part, str)) for place in changed})
    tops = sorted({place.partition(".")[0] for place in places})
    if len(places) == 1 and len(places[0]) < 40:
        return places[0]
    return ", ".join(tops)


def look(side: Side, row: Row, stream: bool) -> Verdict:
    """Ask with and without the field; where nothing changes, whether that is right."""
    key = json.dumps([row.api, row.plain, stream], sort_keys=True)
    if key not in side.memo:
        side.memo[key] = ask(side, row, row.plain, stream)
    found = verdict(row, side.memo[key], ask(side, row, row.asked, stream))
    reason = reason_of(side.name, row.key.partition(" ")[2]) if found.how == DROPPED else ""
    return Verdict(NOTHING, note=reason) if reason else found


def reason_of(side: str, name: str) -> str:
    """Why it is right that this changes nothing there."""
    return next((reason for sides, pattern, reason in NO_EFFECT if side in sides and re.fullmatch(pattern, name)), "")


def ask_all(side: Side, rows: Sequence[Row]) -> dict[str, tuple[Verdict, ...]]:
    """Each row's verdicts by its key: whole, and streamed where there are streams."""
    found = {}
    for row in rows:
        once = row.api == COUNT or row.name == "stream"
        found[row.key] = tuple(look(side, row, stream) for stream in ((False,) if once else (False, True)))
    return found


def cell(verdicts: Sequence[Verdict]) -> str:
    """One word where whole and streamed are alike."""
    return " / ".join(dict.fromkeys(each.how for each in verdicts))


# ------------------------------------------------------------------------------------- the results and the table


def measure(name: str, rows: Sequence[Row]) -> dict[str, tuple[Verdict, ...]]:
    with embedded() if name == EMBEDDED else scripted(name) as side:  # type: ignore[arg-type]
        return ask_all(side, rows)


def results(old: Json, sides: Sequence[str]) -> Json:
    """The results of these sides, over the old ones."""
    rows = official.all_rows()
    cells: dict[str, Json] = {row.key: dict(old.get("cells", {}).get(row.key, {})) for row in rows}
    shown = old.get("shown", [])
    for side in sides:
        found = measure(side, rows)
        for key, verdicts in found.items():
            cells[key][side] = cell(verdicts)
            for each in verdicts:
                if each.how in (DROPPED, FAILED):
                    print(f"{side}: {key}: {each.how} {each.note}")
        if side == EMBEDDED:
            shown = [key for key, verdicts in found.items() if any(each.shown for each in verdicts)]
    versions = {"llm_inference": product.__version__, **official.versions()}
    versions["xllamacpp"] = importlib.metadata.version("xllamacpp")
    return {"date": datetime.date.today().isoformat(), "versions": versions, "cells": cells, "shown": shown}


def bad_cells(found: Json) -> list[str]:
    return [
        f"{key} on {side}: {how}"
        for key, row in found["cells"].items()
        for side, how in row.items()
        if DROPPED in how or FAILED in how
    ]


def save(found: Json) -> None:
    """A row a line, so that a change shows."""
    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in found["cells"].items()]
    head = {name: value for name, value in found.items() if name != "cells"}
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "cells": {\n' + ",\n".join(lines) + "\n }\n}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


def _word_of(how: str) -> str:
    known = (SAME, REFUSED, NAMED, ANSWER, NOTHING)
    words = [{NOTHING: "–"}.get(each, each) if each in known else f"`{each}`" for each in how.split(" / ")]
    return " / ".join(f"**{word}**" if word in (DROPPED, FAILED) else word for word in words)


def _grouped(cells: dict[str, Json], api: str) -> dict[str, dict[str, list[str]]]:
    """The rows of one API by their line of cells: line → field → its values there."""
    lines: dict[str, dict[str, list[str]]] = {}
    for key, row in cells.items():
        path, _, rest = key.partition(" ")
        if path == api:
            name, _, value = rest.partition(": ")
            shown = " | ".join(_word_of(row.get(side, "")) for side in COLUMNS)
            lines.setdefault(shown, {}).setdefault(name, []).append(value)
    return lines


def _field(name: str, values: list[str], everywhere: int) -> str:
    """The field, with its values where others of them came to something else."""
    shown = [value.strip('"') for value in values if value]
    if everywhere == len(values) or not shown:
        return f"`{name}`"
    return f"`{name}` ({', '.join(shown)})"


def table(found: Json) -> str:
    text = [summary(found)]
    for api in (RESPONSES, MESSAGES, COUNT):
        lines = _grouped(found["cells"], api)
        totals: dict[str, int] = {}
        for fields in lines.values():
            for name, values in fields.items():
                totals[name] = totals.get(name, 0) + len(values)
        text += ["", line([f"`{api}`", *(HEADS[side] for side in COLUMNS)]), line(["---"] * (len(COLUMNS) + 1))]
        for shown, fields in lines.items():
            text.append(
                f"| {' '.join(_field(name, values, totals[name]) for name, values in fields.items())} | {shown} |"
            )
    reasons: dict[str, list[str]] = {}
    for key, row in found["cells"].items():
        for side in COLUMNS:
            if NOTHING in row.get(side, ""):
                name = key.partition(" ")[2]
                reasons.setdefault(reason_of(side, name), []).append(name.partition(": ")[0])
    text += ["", "What changes nothing (–), and why that is right:", ""]
    for reason, names in reasons.items():
        text.append(f"- {', '.join(f'`{name}`' for name in dict.fromkeys(names))}: {reason}")
    return "\n".join(text) + "\n"


def summary(found: Json) -> str:
    """How many fields of each API came to what, and on what versions."""
    heads = {
        SAME: "sent, same name",
        "": "sent, translated",
        ANSWER: "in the answer",
        NAMED: "named",
        REFUSED: "refused",
    }
    heads |= {NOTHING: "nothing to do", DROPPED: "**dropped**", FAILED: "**failed**"}
    text = [line(["API, engine", "rows", *heads.values()]), line(["---"] * (len(heads) + 2))]
    for api in (RESPONSES, MESSAGES, COUNT):
        for side in COLUMNS:
            hows = [row.get(side, "").split(" / ")[-1] for key, row in found["cells"].items() if key.split()[0] == api]
            counts = {name: hows.count(name) for name in heads if name}
            counts[""] = len(hows) - sum(counts.values())
            text.append(line([f"`{api}`, {HEADS[side]}", str(len(hows)), *(str(counts[name]) for name in heads)]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    embedded_shown = f"On the embedded llama.cpp {len(found['shown'])} rows also changed what was answered."
    return "\n".join([*text, "", f"{found['date']}: {versions}. {embedded_shown}"])


def with_table(text: str, found: Json) -> str:
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table(found) + END + rest.partition(END)[2]


def load() -> Json:
    found: Json = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="make the table alone")
    parser.add_argument("--only", nargs="+", choices=EVERYWHERE, default=EVERYWHERE, help="ask these again")
    asked = parser.parse_args(argv)
    found = load() if asked.table else results(load(), asked.only)
    if not asked.table:
        save(found)
    README.write_text(with_table(README.read_text(), found))
    bad = bad_cells(found)
    print(f"{len(found['cells'])} rows, {len(bad)} dropped or failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
