"""python -m tests.conformance.breadth --engine llamacpp|vllm [--base-url URL] [--quick] [--json FILE]

Asks the engine for answers to hundreds of real-world schemas: types of Pydantic (models.py), components of OpenAPI
documents and tools of MCP servers (data/). Each is asked for three times: as Python gives it, streamed; the same with a
prompt that speaks against the schema, at a high temperature; and as JSON Schema through /v1. Each answer is judged by
Pydantic and the jsonschema package, not by the module's own check:

    valid     a right answer, and who made it so: `engine` (its decoding) or `checked`
    refused   before any token, by an error that names a keyword of the schema
    cut       max_tokens ended the answer, and the error says so
    misfit    a whole answer that does not fit, refused by an error; only where the claim is `checked`
    BAD       anything else: a wrong answer passed off as good, a false claim, an untyped error, an HTTP 500

Exits 1 when anything is bad.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pydantic

import llm_inference as product
from llm_inference import Chunk, Completion, InferenceError, LLMInferencer, StructuredOutputInvalid

from .models import all_types
from .sides import Us, through_us

Json = dict[str, Any]
DATA = Path(__file__).parent / "data"
VALID_BY_ENGINE, VALID_CHECKED, REFUSED, CUT, MISFIT, BAD = "engine", "checked", "refused", "cut", "misfit", "BAD"
VERDICTS = (VALID_BY_ENGINE, VALID_CHECKED, REFUSED, CUT, MISFIT, BAD)
REFUSALS = ("invalid_request", "unsupported_feature")
TOKENS = 256
PLAIN = "Answer with one small example, as short as possible."
CONTRARY = "Give one short example that is wrong: values of wrong types, huge numbers, impossible dates, odd texts."
WAYS = ("python", "contrary", "/v1")
#: keys of a schema that name no reason for a refusal
NOT_A_REASON = frozenset({"properties", "type", "title", "description", "schema", "default", "examples"})


@dataclass(frozen=True)
class Case:
    """One schema: as a caller of Python gives it, and as JSON Schema."""

    source: str
    name: str
    given: Any
    schema: Json

    @property
    def id(self) -> str:
        return f"{self.source}: {self.name}"

    def misfit(self, text: str, way: str = "python") -> str:
        """Why a text does not fit, as others see it; "" where it does. Through /v1 only the JSON Schema is known."""
        try:
            value = json.loads(text, parse_float=_number, parse_constant=_no_constant)
            if self.given is not self.schema and way != "/v1":
                pydantic.TypeAdapter(self.given).validate_json(text)
        except ValueError as exc:
            return " ".join(str(exc).split())[:200] or "no JSON"
        return _misfit(self.schema, value)

    def names(self, message: str) -> bool:
        """Whether the message names a keyword of the schema, or quotes one of its patterns."""
        if any(pattern in message for pattern in _patterns(self.schema)):
            return True
        return any(re.search(rf"(?<![\w$]){re.escape(key)}(?!\w)", message) for key in _keys(self.schema))


def _number(text: str) -> int | Decimal:
    """Exact, so that a float's rounding spoils no `multipleOf`. Raises ValueError for what no float holds."""
    rough = float(text)
    if math.isinf(rough):
        raise ValueError(f"{text[:40]} is too large")
    found = Decimal(text if rough else 0)
    return int(found) if found == found.to_integral_value() else found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _misfit(schema: Json, value: Any) -> str:
    plain = re.sub(
        r"\\\\p\{\w+\}", r"[^\\\\W\\\\d_]", json.dumps(schema)
    )  # Python's regexes have no classes of Unicode
    exact = json.loads(plain, parse_float=_number)
    kind = jsonschema.validators.validator_for(exact, jsonschema.Draft202012Validator)
    error = next(iter(kind(exact, format_checker=kind.FORMAT_CHECKER).iter_errors(value)), None)
    return "" if error is None else f"{error.json_path}: {error.message}"[:200]


def _patterns(node: Any) -> list[str]:
    if isinstance(node, list):
        return [pattern for part in node for pattern in _patterns(part)]
    if not isinstance(node, dict):
        return []
    own = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
    return own + _patterns(list(node.values()))


def _keys(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(_keys, node))
    if not isinstance(node, dict):
        return set()
    return (set(node) - NOT_A_REASON).union(*map(_keys, node.values()))


# The schemas -------------------------------------------------------------------------------------
def all_cases() -> list[Case]:
    found = []
    for name, kind in all_types().items():
        found.append(Case("pydantic", name, kind, pydantic.TypeAdapter(kind).json_schema()))
    components = json.loads((DATA / "openapi.json").read_text())["components"]["schemas"]
    for name in components:
        schema = _component(components, name)
        found.append(Case("openapi", name, schema, schema))
    for name, schema in json.loads((DATA / "mcp_tools.json").read_text()).items():
        found.append(Case("mcp", name, schema, schema))
    return found


def _component(components: Json, name: str) -> Json:
    """A component with what it refers to under $defs, as tools that make requests of OpenAPI documents do."""
    wanted, waiting = {name}, [name]
    while waiting:
        for each in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(components[waiting.pop()])):
            if each not in wanted:
                wanted.add(each)
                waiting.append(each)
    body = json.dumps({**components[name], "$defs": {each: components[each] for each in sorted(wanted)}})
    found: Json = json.loads(body.replace("#/components/schemas/", "#/$defs/"))
    return found if "#/$defs/" in json.dumps(found) else components[name]


# Asking ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    case: Case
    way: str
    verdict: str
    why: str = ""
    tokens: int = 0


async def ask_python(llm: LLMInferencer, case: Case, way: str) -> Outcome:
    """Streamed: one try, whose raw text is known even where it is refused, and with it whether the claim is true."""
    sampling: Json = {"temperature": 0.0} if way == "python" else {"temperature": 1.0, "seed": 11}
    if llm.engine_type == "sglang":
        sampling.pop("seed", None)
    prompt = PLAIN if way == "python" else CONTRARY
    request = None
    try:
        request = llm.request(prompt, schema=case.given, max_tokens=TOKENS, **sampling)
        chunks: list[Chunk] = []
        async with contextlib.aclosing(llm.bursts(request)) as bursts:
            async for burst in bursts:
                chunks += burst
        done = Completion.from_chunks(chunks)
    except InferenceError as exc:
        claim = product.enforced_by(request) if request is not None else "none"
        return Outcome(case, way, *_of_error(case, exc, claim))
    except Exception as exc:
        return Outcome(case, way, BAD, f"untyped: {type(exc).__name__}: {exc}"[:200])
    if why := case.misfit(done.text):
        return Outcome(case, way, BAD, f"passed off as good: {done.text[:100]!r}: {why}")
    claim = product.enforced_by(request)
    if claim not in (VALID_BY_ENGINE, VALID_CHECKED):
        return Outcome(case, way, BAD, f"enforced_by: {claim!r}")
    return Outcome(case, way, claim, "", done.usage.completion_tokens)


def _of_error(case: Case, error: InferenceError, claim: str) -> tuple[str, str]:
    if error.kind in REFUSALS:
        return (REFUSED, error.message) if case.names(error.message) else (BAD, f"names no keyword: {error.message}")
    if not isinstance(error, StructuredOutputInvalid):
        return BAD, f"{error.kind}: {error.message}"
    text = error.text or ""
    try:
        json.loads(text)
    except ValueError:
        return CUT, f"{error.reason} {text[-60:]!r}"
    if not case.misfit(text):
        return BAD, f"a right answer was refused: {text[:100]!r}: {error.reason}"
    if claim != VALID_CHECKED:
        return BAD, f"claims {claim!r}, and the engine wrote {text[:100]!r}: {error.reason}"
    return MISFIT, f"{text[:100]!r}: {error.reason}"


async def ask_v1(client: httpx.AsyncClient, model: str, case: Case) -> Outcome:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": case.schema}}
    body = {"model": model, "messages": [{"role": "user", "content": PLAIN}], "max_tokens": TOKENS, "temperature": 0}
    reply = await client.post("/v1/chat/completions", json={**body, "response_format": form})
    if reply.status_code == 200:
        choice = reply.json()["choices"][0]
        text = choice["message"]["content"]
        if not (why := case.misfit(text, "/v1")):
            return Outcome(case, "/v1", VALID_CHECKED, "", reply.json()["usage"]["completion_tokens"])
        if choice["finish_reason"] == "length":  # OpenAI's way to say so
            return Outcome(case, "/v1", CUT, text[-60:])
        return Outcome(case, "/v1", BAD, f"passed off as good: {text[:100]!r}: {why}")
    kind, message = reply.headers.get("x-error-kind", ""), reply.json()["error"]["message"]
    if reply.status_code == 400 and kind in REFUSALS and case.names(message):
        return Outcome(case, "/v1", REFUSED, message)
    if reply.status_code == 502 and kind == "structured_output_invalid":
        return Outcome(case, "/v1", CUT if "max_tokens was reached" in message else MISFIT, message)
    return Outcome(case, "/v1", BAD, f"{reply.status_code} {kind}: {message}")


async def ask_all(us: Us, cases: Sequence[Case], ways: Iterable[str], parallel: int) -> list[Outcome]:
    places = asyncio.Semaphore(parallel)
    async with httpx.AsyncClient(base_url=us.http.url, timeout=600, trust_env=False) as client:

        async def one(case: Case, way: str) -> Outcome:
            async with places:
                try:
                    if way == "/v1":
                        return await ask_v1(client, f"{us.engine}/{us.model}", case)
                    return await ask_python(us.llm, case, way)
                except Exception as exc:  # of the judge: the others are asked all the same
                    return Outcome(case, way, BAD, f"not judged: {type(exc).__name__}: {exc}"[:200])

        return list(await asyncio.gather(*(one(case, way) for way in ways for case in cases)))


def quick(cases: Sequence[Case], step: int = 12) -> list[Case]:
    """Every twelfth: some of each source."""
    return list(cases)[::step]


# The report --------------------------------------------------------------------------------------
def report(us: Us, outcomes: Sequence[Outcome], seconds: float) -> Json:
    counts = collections.Counter((each.case.source, each.way, each.verdict) for each in outcomes)
    rows = []
    for source, way in dict.fromkeys((each.case.source, each.way) for each in outcomes):
        found = {verdict: counts[source, way, verdict] for verdict in VERDICTS}
        rows.append({"source": source, "way": way, "schemas": sum(found.values()), **found})
    return {
        "engine": us.engine,
        "version": us.version,
        "model": us.model,
        "date": datetime.date.today().isoformat(),
        "pydantic": pydantic.VERSION,
        "schemas": len({each.case.id for each in outcomes}),
        "answers": len(outcomes),
        "bad": sum(each.verdict == BAD for each in outcomes),
        "seconds": round(seconds),
        "rows": rows,
        "not valid": [
            {"schema": each.case.id, "way": each.way, "verdict": each.verdict, "why": each.why}
            for each in outcomes
            if each.verdict not in (VALID_BY_ENGINE, VALID_CHECKED)
        ],
    }


def table(result: Json) -> str:
    """The counts in Markdown. Through /v1 nobody says who enforced it: there both kinds are one column."""
    lines = [
        "| schemas | asked | n | valid: engine | valid: checked | refused | cut | misfit, refused | bad |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = [row["source"], row["way"], row["schemas"], *(row[verdict] for verdict in VERDICTS)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    head = "{engine} {version}, {model}, {date}: {schemas} schemas, {answers} answers, {bad} bad, {seconds} s."
    return "\n".join([*lines, "", head.format(**result)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.breadth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", required=True, choices=list(LLMInferencer.ENGINE_MAP))
    parser.add_argument("--base-url", help="the engine's server; llamacpp is started where it is left out")
    parser.add_argument("--quick", action="store_true", help="the schemas of the normal suite")
    parser.add_argument("--only", default="", help="the schemas with this in their name")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this one (repeatable)")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    cases = [case for case in all_cases() if args.only in case.id]
    started = time.monotonic()
    llm = LLMInferencer(args.engine, base_url=args.base_url, launch=True if not args.base_url else "auto")
    try:
        with through_us(llm) as us:
            asked = ask_all(us, quick(cases) if args.quick else cases, args.way or WAYS, args.parallel)
            result = report(us, asyncio.run(asked), time.monotonic() - started)
    finally:
        llm.close()
    for each in result["not valid"]:
        print(f"{each['verdict']:8} {each['way']:9} {each['schema']:40} {each['why'][:160]}")
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
