"""What the engines' own Responses and Messages routes make of the fields that we are asked in surfaces.py.

    python -m tests.conformance.bare --engine llamacpp                 # starts one
    python -m tests.conformance.bare --engine vllm --base-url URL      # also sglang; with tests/integration/tools.jinja
    python -m tests.conformance.bare --table                           # the table alone, from the results

Every row of `official.py` is asked with and without its field: of the engine's own routes (bare), and of ours before
the same engine (us). Both are judged by the same eye, which sees answers alone: what stays unseen counts as accepted.
Writes results/surfaces/bare_ENGINE.json, with the request and both answers of each drop, and the table in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

import llm_inference as product
from tests.harness import serving
from tests.processes import free_port

from ..bench.proc import Process
from . import official, surfaces
from .official import COUNT, MESSAGES, RESPONSES, Json, Row
from .surfaces import DROPPED, HERE, NAMED, README, REFUSED, TEMPLATE, Seen, Side, Verdict
from .table import NAMES, line

KEY = "bare"
BEGIN, END = "<!-- bare -->\n", "<!-- /bare -->"
EFFECT, ACCEPTED, ERROR, NO_ROUTE = "effect", "accepted", "error", "no route"
HOWS = (EFFECT, NAMED, REFUSED, ACCEPTED, DROPPED, ERROR)
HEADS = {EFFECT: "effect seen", ACCEPTED: "accepted, nothing seen", DROPPED: "**dropped**"}
SIDES = {"us": "through us", "bare": "bare"}
ENGINES = ("llamacpp", "vllm", "sglang")
LONG = "word " * 6000  #: no engine here has room for it
WARM = {RESPONSES: 1.5, MESSAGES: 1.0}  #: temperatures at which two answers differ; the Messages API has none above
ROOM = 64  #: tokens, for a call
BEGINNING = 40  #: characters that two answers share by chance at these temperatures hardly ever
TAKES = 3  #: answers at another temperature, one of which must differ
#: Values that show in an answer where those of official.py need not.
SHARP: dict[str, Any] = {"top_k": 1, "top_p": 0.001, "min_p": 1.0, "seed": 7}
SHARP |= {"presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": {"28": 100}}
SHARP |= {"messages": [{"role": "user", "content": "Good evening."}]}
SHARP |= {"stop": ["weather"], "stop_sequences": ["weather"]}
#: We refuse these, and an answer cannot show whether a bare engine heeds them: no model here thinks or sees.
UNSEEN = r"reasoning_effort|(text\.)?verbosity|reasoning\.mode|thinking\[\w+\](\.display)?|image|truncation"
UNSEEN += r'|background_options|messages\[system\]\.clear_at: "never"|user\[redacted_thinking\]'
THOUGHTS = r"input\[reasoning\]|\w+\[redacted_thinking\]|assistant\[thinking\]"  #: the chat template shows none
CONTENT = r"(tools|input|input\.content|user|assistant|system|tool_result\.content|image\.source)\[\w+\]"


#: of an answer, what the results keep
ANSWERED = ("model", "status", "stop_reason", "output", "content", "usage", "input_tokens", "metadata")
UNSUPPORTED = r"not (yet )?(support|implement)|unsupported|not a multimodal|not configured|'x' not found"
SOME = 9  #: validation errors, at most, that may name a field


@dataclass(frozen=True)
class Said:
    """What an answer shows."""

    text: str
    calls: tuple[str, ...]
    kinds: tuple[str, ...]  #: of its items or blocks
    state: str
    prompt: int  #: tokens
    tokens: int


def said(seen: Seen) -> Said:
    echo = seen.echo
    usage = echo.get("usage") or {}
    cached = ("cache_read_input_tokens", "cache_creation_input_tokens")
    prompt = sum(usage.get(name) or 0 for name in ("input_tokens", *cached)) or echo.get("input_tokens") or 0
    items = [each for each in echo.get("output") or echo.get("content") or [] if isinstance(each, dict)]
    parts = [part for each in items for part in each.get("content") or [each] if each.get("type") != "reasoning"]
    calls = [each["name"] for each in items if each.get("type") in ("function_call", "tool_use")]
    return Said(
        text="".join(part.get("text") or "" for part in parts if isinstance(part, dict)),
        calls=tuple(calls),
        kinds=tuple(str(each.get("type")) for each in items),
        state=str(echo.get("status") or echo.get("stop_reason") or ""),
        prompt=prompt,
        tokens=usage.get("output_tokens") or 0,
    )


@dataclass
class Case:
    """A row, as it is asked here, and its two answers."""

    side: Side
    row: Row
    plain: Seen
    asked: Seen
    more: list[Said] = dataclasses.field(default_factory=list)  #: what else was asked: again, or without the block

    def put(self, body: Json) -> Seen:
        """Ask something more."""
        found = surfaces.ask(self.side, self.row, body, streams(self.row))
        self.more.append(said(found))
        return found


# ---------------------------------------------------------------- checks: True is honoured, False dropped, None unseen

Check = Callable[[Case], "bool | None"]


def _is_json(case: Case) -> bool | None:
    text = said(case.asked).text.strip()
    return text.startswith("{") if text else None


def _json_holds(case: Case) -> bool | None:
    """Of a field inside a format."""
    return False if _is_json(case) is False else None


def _is_called(case: Case) -> bool | None:
    """A call that the choice forces; that it was made anyway tells nothing."""
    choice = case.row.asked["tool_choice"]
    wanted = choice.get("name") if isinstance(choice, dict) else None
    calls, before = said(case.asked).calls, said(case.plain).calls
    if not calls:
        return _call_holds(case)
    if wanted not in (None, *calls) or len(set(calls)) > 1:
        return False
    return True if before != calls else None


def _call_holds(case: Case) -> bool | None:
    """An answer that was cut may have come to its call later."""
    answer = said(case.asked)
    return None if answer.calls or answer.tokens >= ROOM else False


def _is_not_called(case: Case) -> bool | None:
    if said(case.asked).calls:
        return False
    return True if said(case.plain).calls else None


def _is_allowed(case: Case) -> bool | None:
    allowed = {tool.get("name") for tool in case.row.asked["tool_choice"]["tools"]}
    answer = said(case.asked)
    in_text = not answer.calls and re.search(r'"name": ?"(weather|other)"', answer.text)
    return False if in_text or not set(answer.calls) <= allowed else None


def _hosted(case: Case) -> bool | None:
    """A call of that type of tool."""
    word = case.row.name.rpartition("[")[2].rstrip("]")
    return any(word in kind for kind in said(case.asked).kinds)


def _has_logprobs(case: Case) -> bool | None:
    found = re.search(r'"(top_)?logprobs": [\[{].', json.dumps(case.asked.echo).replace("[]", "null"))
    return found is not None


def _stops(case: Case) -> bool | None:
    before, after = said(case.plain).text, said(case.asked).text
    return "weather" not in after if "weather" in before else None


def _settles(case: Case) -> bool | None:
    """At a temperature where two answers differ, the field makes them alike, until two tokens are equally likely."""
    if _alike(said(case.plain), said(case.put(case.row.plain))):
        return None
    return _alike(said(case.asked), said(case.put(case.row.asked)))


def _alike(one: Said, other: Said) -> bool:
    return one.text[:BEGINNING] == other.text[:BEGINNING]


def _varies(case: Case) -> bool | None:
    texts = {said(case.put(case.row.asked)).text for _ in range(TAKES)}
    return True if texts != {said(case.plain).text} else None


def _shortens(case: Case) -> bool | None:
    """Where what is too long is refused none the less, nothing is silent."""
    return True if case.put({**case.row.asked, "input": LONG}).status == 200 else None


def _is_stored(case: Case) -> bool | None:
    return case.side.client.get(f"{RESPONSES}/{case.asked.echo.get('id')}").status_code == 200


def _is_obfuscated(case: Case) -> bool | None:
    return "obfuscation" in json.dumps(case.asked.answer)


def _never(case: Case) -> bool | None:
    """That there is an answer at all shows it."""
    return False


def _in_prompt(case: Case) -> bool | None:
    return said(case.plain).prompt != said(case.asked).prompt


def _bites(case: Case) -> bool | None:
    return said(case.asked).text != said(case.plain).text


FORMATS = r"response_format|output_config|output_format|text|(text|output_config)\.format(\[json_\w+\])?"
#: (pattern of the name, how it shows, what a drop looks like); the first that fits
CHECKS: tuple[tuple[str, Check, str], ...] = (
    (r".*frobnicate", lambda case: None, ""),
    (r"stream", lambda case: case.asked.streamed, "the answer is not streamed"),
    (r"model", _never, "another model answers"),
    (r"n", lambda case: len(said(case.asked).kinds) > 1, "one answer"),
    (r"max_(output_|completion_)?tokens", lambda case: said(case.asked).tokens <= 3, "the answer is longer"),
    (r"(top_)?logprobs", _has_logprobs, "no log-probabilities"),
    (r"include: .*output_text\.logprobs.*", _has_logprobs, "no log-probabilities"),
    (r"stop(_sequences)?", _stops, "the answer goes on behind it"),
    (r"top_p|top_k|min_p|seed", _settles, "answers vary as without it"),
    (r"temperature", _varies, ""),
    (r"logit_bias", _bites, "a bias of 100 changes nothing"),
    (r"text\.format\[text\].*", lambda case: None, ""),
    (FORMATS, _is_json, "the answer is no JSON"),
    (r"(text|output_config)\.format(\[json_\w+\])?\..*", _json_holds, "the answer is no JSON"),
    (r'tool_choice: ("none"|\{"type": "none"\})|tool_choice\[none\]', _is_not_called, "a tool is called"),
    (r'tool_choice: "required"|tool_choice\[(any|function|tool)\](\.name.*)?', _is_called, "no such call"),
    (r"tool_choice\[allowed_tools\]\.mode.*", _is_called, "no such call"),
    (r"tool_choice\[allowed_tools\](\.tools.*)?", _is_allowed, "another tool is called, or the call stays in the text"),
    (r"tool_choice\[(any|function|tool)\]\..*", _call_holds, "no such call"),
    (r"tool_choice\[(auto|none)\].*|tool_choice: .*", lambda case: None, ""),
    (r"tool_choice\[\w+\]", _hosted, "no call of this type of tool"),
    (r"user\[tool_result\]\.is_error", _in_prompt, "the prompt is as long as without it"),
    (r"metadata", lambda case: case.asked.echo.get("metadata") == case.row.value, "not in the answer"),
    (r"background", lambda case: said(case.asked).state in ("queued", "in_progress"), "answered in the foreground"),
    (r"truncation: \"auto\"", _shortens, ""),
    (r"store", _is_stored, "GET with its id finds nothing"),
    (r"previous_response_id|conversation|prompt", _never, "it names what is not there"),
    (r".*include_obfuscation(\": |: )true.*", _is_obfuscated, "no obfuscation"),
)
NOT_IN_PROMPT = "a tool, an item or a block that is not in the prompt"
UNKNOWN = "a field of no API"
NOTHING_OF_IT = "we refuse it; nothing of it shows"


def check_of(row: Row) -> tuple[Check, str]:
    """How the row's field shows. Only /v1/responses gives metadata back."""
    name = row.name if row.of_type else row.key.partition(" ")[2]
    if row.api != COUNT and not (row.api == MESSAGES and row.name == "metadata"):
        for pattern, check, words in CHECKS:
            if re.fullmatch(pattern, name) or (re.fullmatch(pattern, row.name) and ":" not in pattern):
                return check, words
    return (_never, "another model answers") if row.name == "model" else (lambda case: None, "")


# ------------------------------------------------------------------------------------------------------- judging


def streams(row: Row) -> bool:
    return row.name.startswith("stream_options")


def sharpened(row: Row) -> Row:
    """With a value that shows in the answer, and room for a call."""
    plain, asked, value = dict(row.plain), dict(row.asked), row.value
    if row.name in SHARP and row.api != COUNT:
        value = asked[row.name] = SHARP[row.name]
        if check_of(row)[0] is _settles:
            plain["temperature"] = asked["temperature"] = WARM[row.api]
    if row.name in ("max_tokens", "max_completion_tokens") and row.api == RESPONSES:
        for body in (plain, asked):  # without the API's own limit; a sentence is short enough
            body["stop"] = ["."]
            del body["max_output_tokens"]
    if row.name == "top_logprobs" and row.api == RESPONSES:
        plain["include"] = asked["include"] = ["message.output_text.logprobs"]
    if row.name.startswith("tool_choice"):
        for body in (plain, asked):
            body |= {name: ROOM for name in ("max_tokens", "max_output_tokens") if name in body}
    if row.name.startswith("thinking[enabled]"):
        for body in (plain, asked):
            body |= {"max_tokens": 1100, "stop_sequences": ["."]}  # more than the budget, which is to be less
    return dataclasses.replace(row, plain=plain, asked=asked, value=value)


def without(value: Any, word: str) -> Any:
    """The same without the tools, items or blocks of that type."""
    if isinstance(value, list):
        return [without(each, word) for each in value if not (isinstance(each, dict) and each.get("type") == word)]
    return {name: without(each, word) for name, each in value.items()} if isinstance(value, dict) else value


def look(side: Side, row: Row, ours: str) -> tuple[Verdict, Case]:
    """`ours`: what becomes of the field at our server, by surfaces.py."""
    row = sharpened(row)
    key = json.dumps([row.api, row.plain, streams(row)], sort_keys=True)
    if key not in side.memo:
        side.memo[key] = surfaces.ask(side, row, row.plain, streams(row))
    case = Case(side, row, side.memo[key], surfaces.ask(side, row, row.asked, streams(row)))
    return verdict(case, ours), case


def verdict(case: Case, ours: str) -> Verdict:
    row, plain, asked = case.row, case.plain, case.asked
    if asked.status != 200:
        return _of_error(row, plain, asked)
    if not asked.streamed and not {"output", "content", "input_tokens"} & asked.echo.keys():
        return Verdict(ERROR, note="with a 200, what is no answer of this API")
    named = asked.ignored if row.again else asked.ignored - plain.ignored
    if any(surfaces._names(row, each) for each in named):
        return Verdict(NAMED, note=", ".join(sorted(named)))
    check, words = check_of(row)
    found = check(case)
    if found is not None:
        return Verdict(EFFECT) if found else Verdict(DROPPED, note=words)
    return _of_answers(case, ours)


def _of_error(row: Row, plain: Seen, asked: Seen) -> Verdict:
    """An error is a refusal where it names the field, its place or what holds it, or says what is not supported."""
    text = _told(asked.error)
    held = "with what holds it: " if plain.status != 200 and _told(plain.error) == text else ""
    if _is_refusal(row, text, asked.status, bool(held)):
        return Verdict(REFUSED, note=held + text[:200])
    return Verdict(ERROR, note=f"{asked.status} {held}{text[:200]}")


def _is_refusal(row: Row, text: str, status: int, held: bool) -> bool:
    if re.search(UNSUPPORTED, text, re.IGNORECASE):
        return True  # llama.cpp blames itself (500) for an image
    many = re.match(r"\W*(\d+) validation errors", text)
    if status >= 500 or (many and int(many[1]) > SOME):
        return False  # an error for each member of a union names everything
    places = [place for place in re.split(r"[\[\].]+", row.name)[:-1] if held and place]
    located = row.of_type and re.search(r"\.type\b", text)
    return bool(located) or surfaces._names(row, text) or any(place in text for place in places)


def _told(error: str) -> str:
    """What an error says, without the request that it quotes."""
    with contextlib.suppress(ValueError):
        body = json.loads(error)
        inner = body.get("error", body) if isinstance(body, dict) else body
        error = json.dumps([inner.get("message"), inner.get("param")]) if isinstance(inner, dict) else str(inner)
    return re.sub(r"'input': '.*?'(?=[,}])", "", error)


def _of_answers(case: Case, ours: str) -> Verdict:
    row, before, after = case.row, said(case.plain), said(case.asked)
    if case.plain.status != 200:
        return Verdict(EFFECT, note="without it: " + _told(case.plain.error)[:200])
    if row.of_type and re.fullmatch(CONTENT, row.name):
        word = row.name.rpartition("[")[2].rstrip("]")
        bare = case.put(without(row.asked, word))
        if bare.status == 200 and said(bare) == after:
            return Verdict(ACCEPTED) if re.fullmatch(THOUGHTS, row.name) else Verdict(DROPPED, note=NOT_IN_PROMPT)
    if before.prompt != after.prompt:
        return Verdict(EFFECT, note=f"{before.prompt} → {after.prompt} tokens of prompt")
    if before != after and said(case.put(row.plain)) == before and said(case.put(row.asked)) == after:
        return Verdict(EFFECT)
    if surfaces._last(row) in official.UNKNOWN:
        return Verdict(DROPPED, note=UNKNOWN)
    unseen = re.fullmatch(UNSEEN, row.name) or re.fullmatch(UNSEEN, row.key.partition(" ")[2])
    if ours == REFUSED and not unseen:
        return Verdict(DROPPED, note=NOTHING_OF_IT)
    return Verdict(ACCEPTED)


# -------------------------------------------------------------------------------------------------------- asking


@contextlib.contextmanager
def llamacpp() -> Iterator[str]:
    """A bare server of the embedded engine's; no prompt is cached, so that equal requests get equal answers."""
    port = free_port()
    settings = (f"port={port}", "n_ctx=4096", "cache_prompt=false", f"chat_template={TEMPLATE.read_text()}")
    adapter = product.LlamaCppAdapter(launch_args=settings)
    adapter.file = product.pull_model(None, lambda done, total: None, threading.Event())
    command, env = adapter.command(SimpleNamespace(uds="127.0.0.1", key=KEY))  # type: ignore[arg-type]
    with Process("llamacpp", command, port=port, env=env) as process:
        yield process.url


class Kept(httpx.HTTPTransport):
    """Keeps each answer in a file, so that a run that was cut goes on, and can be judged again without asking."""

    def __init__(self, side: str, file: Path | None) -> None:
        no_reuse = httpx.Limits(max_keepalive_connections=0)  # llama.cpp closes after a stream, and does not say so
        super().__init__(limits=no_reuse)
        self.side, self.file = side, file
        self.known: dict[str, list[Json]] = {}
        for each in file.read_text().splitlines() if file and file.exists() else ():
            answer = json.loads(each)
            self.known.setdefault(answer.pop("of"), []).append(answer)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        key = f"{self.side} {request.method} {request.url.path} {request.content.decode()}"
        if not self.known.get(key):
            reply = super().handle_request(request)
            names = ("content-type", "x-ignored-fields")
            headers = {name: reply.headers[name] for name in names if name in reply.headers}
            text = reply.read().decode()
            self.known[key] = [{"status": reply.status_code, "headers": headers, "text": text}]
            if self.file:
                with self.file.open("a") as out:
                    out.write(json.dumps({"of": key, **self.known[key][0]}) + "\n")
        found = self.known[key].pop(0)
        return httpx.Response(found["status"], headers=found["headers"], content=found["text"].encode())


def client(url: str, side: str = "", file: Path | None = None) -> httpx.Client:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=url, timeout=300, transport=Kept(side, file), headers=headers)


@contextlib.contextmanager
def sides(engine: str, url: str, names: Sequence[str], file: Path | None) -> Iterator[dict[str, Side]]:
    """The engine, and our server in front of it."""
    with contextlib.ExitStack() as stack:
        settings = product.Settings(engine=engine, base_url=url, engine_api_key=KEY)
        urls = {"bare": url}
        if "us" in names:
            urls["us"] = stack.enter_context(serving(product.create_app(settings)))
        found = {}
        for name in names:
            http = stack.enter_context(client(urls[name], name, file))
            model = http.get("/v1/models").json()["data"][0]["id"]
            found[name] = Side(name, http, model, lambda: 0, lambda number: [])
        yield found


def has_route(side: Side, api: str) -> bool:
    body = official.message_body() | official.response_body() | {"model": side.model}
    return side.client.post(api, json=body).status_code not in (404, 405)


def ask_all(side: Side, rows: Sequence[Row], ours: dict[str, str]) -> dict[str, Json]:
    routes = {api: has_route(side, api) for api in (RESPONSES, MESSAGES, COUNT)}
    found: dict[str, Json] = {}
    for row in rows:
        if not routes[row.api]:
            found[row.key] = {"how": NO_ROUTE}
            continue
        seen, case = look(side, row, ours[row.key])
        found[row.key] = {"how": seen.how} | ({"note": seen.note} if seen.note else {})
        if seen.how == DROPPED:
            found[row.key] |= recorded(case)
    return found


def recorded(case: Case) -> Json:
    """What a reader needs to see a drop with."""
    shown = {name: value for name, value in case.asked.echo.items() if name in ANSWERED}
    events = {"events": case.asked.answer[:9]} if case.asked.streamed else {}
    more = {"more": [dataclasses.asdict(each) for each in case.more]} if case.more else {}
    return {"asked": case.row.asked, "without": dataclasses.asdict(said(case.plain)), "with": shown, **events, **more}


def version_of(engine: str, url: str) -> str:
    if engine == "llamacpp":
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    path = {"vllm": "/version", "sglang": "/server_info"}[engine]
    with client(url) as http:
        return str(http.get(path).json()["version"])


def measure(engine: str, url: str, names: Sequence[str], only: str = "", file: Path | None = None) -> Json:
    """The results of these sides."""
    rows = [row for row in official.all_rows() if only in row.key]
    column = {"llamacpp": surfaces.EMBEDDED}.get(engine, engine)
    ours = {key: cells.get(column, "") for key, cells in surfaces.load()["cells"].items()}
    head = {"engine": engine, "version": version_of(engine, url), "date": datetime.date.today().isoformat()}
    with sides(engine, url, names, file) as asked:
        return {**head, **{name: ask_all(side, rows, ours) for name, side in asked.items()}}


# ------------------------------------------------------------------------------------- the results and the table


def path_of(engine: str) -> Path:
    return HERE / "results" / "surfaces" / f"bare_{engine}.json"


def load(engine: str) -> Json:
    found: Json = json.loads(path_of(engine).read_text()) if path_of(engine).exists() else {}
    return found


def save(found: Json) -> None:
    """A row a line."""
    parts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items() if name not in SIDES]
    for side in SIDES:
        if side in found:
            rows = [f"  {json.dumps(key)}: {json.dumps(row, ensure_ascii=False)}" for key, row in found[side].items()]
            parts.append(f' "{side}": {{\n' + ",\n".join(rows) + "\n }")
    path_of(found["engine"]).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def counts(results: Sequence[Json]) -> list[str]:
    text = [line(["API, engine", "rows", *(HEADS.get(how, how) for how in HOWS)]), line(["---"] * (len(HOWS) + 2))]
    for api in (RESPONSES, MESSAGES, COUNT):
        for found in results:
            for side in SIDES:
                hows = [row["how"] for key, row in found.get(side, {}).items() if key.split()[0] == api]
                cells = [NO_ROUTE] * len(HOWS) if NO_ROUTE in hows else [str(hows.count(how)) for how in HOWS]
                if hows:
                    text.append(line([f"`{api}`, {NAMES[found['engine']]}, {SIDES[side]}", str(len(hows)), *cells]))
    return text


def _short(key: str) -> str:
    """The field, with a word that is its value."""
    name, _, value = key.partition(" ")[2].partition(": ")
    return f"`{name}` ({value[1:-1]})" if re.fullmatch(r'"\w{2,}"', value) else f"`{name}`"


def drops(found: Json) -> list[str]:
    """What is dropped there: a line for each API and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for side in SIDES:
        for key, row in found.get(side, {}).items():
            if row["how"] == DROPPED:
                groups.setdefault((side, key.split()[0], row["note"]), []).append(_short(key))
    return [
        f"- {NAMES[found['engine']]}, {SIDES[side]}, `{api}`, {why}: {' '.join(dict.fromkeys(fields))}"
        for (side, api, why), fields in groups.items()
    ]


def table(results: Sequence[Json]) -> str:
    asked = "; ".join(f"{NAMES[found['engine']]} {found['version']}, {found['date']}" for found in results)
    text = [*counts(results), "", f"{asked}.", "", "Dropped:", ""]
    for found in results:
        text += drops(found)
    return "\n".join(text) + "\n"


def with_table(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    results = [found for engine in ENGINES if (found := load(engine))]
    return head + BEGIN + table(results) + END + rest.partition(END)[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--base-url", help="where it is; llama.cpp is started")
    parser.add_argument("--sides", default="bare,us", help="by commas")
    parser.add_argument("--only", default="", help="the rows with this in their key; saves nothing")
    parser.add_argument("--answers", type=Path, help="keep the answers there; what it has is not asked again")
    parser.add_argument("--table", action="store_true", help="make the table alone")
    asked = parser.parse_args(argv)
    if asked.engine:
        start = contextlib.nullcontext(asked.base_url) if asked.base_url else llamacpp()
        with start as url:
            found = measure(asked.engine, url, asked.sides.split(","), asked.only, asked.answers)
        if asked.only:
            print(json.dumps(found, indent=1))
            return 0
        save(load(asked.engine) | found)
    README.write_text(with_table(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
