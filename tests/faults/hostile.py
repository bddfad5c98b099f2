"""The row of hostile bodies: bad ones are refused, every answer is an envelope, memory is bounded, nothing hangs."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator
from typing import Any

from .rig import (
    API,
    KINDS,
    V1,
    Engine,
    Json,
    Link,
    Reply,
    Result,
    Seen,
    World,
    ask,
    at_once,
    quantile,
    request_bytes,
    until,
    wrong_error,
)

OTHERS = ("/v1/embeddings", "/v1/responses", "/v1/messages")  #: their fields have other names and bounds
PATHS = ("/api/v1/llm/generate", API, "/api/v1/llm/structured-generate", V1, "/v1/completions", *OTHERS)
VALID: dict[str, Json] = {
    "/api/v1/llm/generate": {"prompt": "hi", "max_tokens": 8, "temperature": 0.5, "stop": ["x"], "seed": 1},
    API: {
        "engine_type": "vllm",
        "model_name": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "top_p": 0.5,
        "stream": True,
    },
    "/api/v1/llm/structured-generate": {
        "prompt": "hi",
        "schema": {"city": "string", "tags": ["string"]},
        "max_tokens": 8,
    },
    V1: {
        "model": "vllm/m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 8,
        "n": 1,
        "response_format": {"type": "json_object"},
    },
    "/v1/completions": {"model": "ollama/m", "prompt": "hi", "max_tokens": 8, "stop": "x", "stream": False},
    "/v1/embeddings": {"model": "vllm/m", "input": ["a", "b"]},
    "/v1/responses": {
        "model": "vllm/m",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "max_output_tokens": 16,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    },
    "/v1/messages": {
        "model": "vllm/m",
        "max_tokens": 8,
        "system": "be brief",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "stop_sequences": ["x"],
        "stream": True,
    },
}
#: 500s that a hostile but well-formed body may come to: the engine's text does not fit what was asked
MAY_FAIL = {"structured_output_invalid"}
SLOWEST = 3.0  # seconds any one body may take
MEMORY = 4  # times what the bodies in flight weigh: read, decoded, checked, written for the engine


def constant(engine: Engine, seen: Seen) -> Reply | None:
    """Every engine answers everything with the same good answer, whatever it was asked; but Ollama makes one vector a
    text."""
    if seen.path == "/api/embed":
        return None
    kept: dict[tuple[str, bool], Reply] = engine.__dict__.setdefault("kept", {})
    stream = b'"stream":true' in seen.body
    key = (seen.path, stream)
    if key not in kept:
        ask_for: Json = {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "prompt": "hi",
            "input": "hi",
            "stream": stream,
        }
        kept[key] = engine.usual(
            Seen(method="POST", path=seen.path, headers=seen.headers, body=json.dumps(ask_for).encode())
        )
    return kept[key]


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def ladder(rungs: int) -> Json:
    """Local references that double at each step."""
    steps = {f"r{n}": {"allOf": [{"$ref": f"#/$defs/r{n + 1}"}, {"$ref": f"#/$defs/r{n + 1}"}]} for n in range(rungs)}
    return {"$defs": {**steps, f"r{rungs}": {"type": "string"}}, "$ref": "#/$defs/r0"}


def refused_bodies() -> Iterator[tuple[str, str, bytes, set[str]]]:
    """(name, path, body, the kinds it may be refused with): each has one thing wrong with it, which one guard looks
    at."""
    invalid = {"invalid_request"}
    for path, valid in VALID.items():
        text = json.dumps(valid)
        start = text[:-1]

        def with_(more: str, start: str = start) -> bytes:
            return f"{start}, {more}}}".encode()

        yield "not JSON", path, b"{", invalid
        yield "no object", path, b"[1]", invalid
        yield "empty", path, b"", invalid
        yield "not UTF-8", path, with_('"user": "x"').replace(b'"x"', b'"\xff\xfe"'), invalid
        yield "UTF-16", path, text.encode("utf-16"), invalid
        yield "lone surrogate", path, with_('"user": "\\ud800"'), invalid
        yield "NaN", path, with_('"user": NaN'), invalid
        yield "Infinity", path, with_('"metadata": {"a": [-Infinity]}'), invalid
        yield "5000-digit integer", path, with_(f'"user": {"9" * 5000}'), invalid
        yield "a key twice", path, with_('"user": "a", "user": "b"'), invalid
        yield "nested too deep", path, with_(f'"metadata": {{"a": {json.dumps(nested(70))}}}'), invalid
        yield "nested very deep", path, b'{"metadata": ' + b"[" * 100_000, invalid
        yield "over 4 MiB", path, with_(f'"user": "{"x" * (4 << 20)}"'), {"payload_too_large"}
        if path in OTHERS:
            continue
        for name, value in (
            ("max_tokens", "0"),
            ("max_tokens", "true"),
            ("max_tokens", '"7"'),
            ("max_tokens", "1e18"),
            ("max_tokens", "-2"),
            ("temperature", "2.1"),
            ("temperature", '"1"'),
            ("top_p", "0"),
            ("seed", "true"),
            ("top_logprobs", "21"),
            ("stop", json.dumps(list("abcdefghijklmnopq"))),
            ("stop", f'"{"x" * 300}"'),
            ("stop", '[""]'),
        ):
            body = json.dumps({key: v for key, v in valid.items() if key != name})
            yield f"{name} {value[:10]}", path, f'{body[:-1]}, "{name}": {value}}}'.encode(), invalid
    for model in (
        "http://127.0.0.1:1/x",
        "../../etc/passwd",
        "/etc/passwd",
        "a//b",
        "m\r\nx: y",
        "m x",
        "m?x=1",
        "m#",
        "\\\\host\\share",
        "%2e%2e",
        "a" * 300,
        "",
    ):
        for path, field in ((API, "model_name"), (V1, "model"), ("/v1/responses", "model"), ("/v1/messages", "model")):
            body = json.dumps({**VALID[path], field: model}).encode()
            yield "model name", path, body, invalid | {"model_not_found"}
    for schema in (ladder(16), ladder(30)):
        yield (
            "laddered $refs",
            "/api/v1/llm/structured-generate",
            json.dumps({"prompt": "x", "schema": schema}).encode(),
            invalid,
        )
        yield (
            "laddered $refs",
            V1,
            json.dumps(
                {
                    **VALID[V1],
                    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
                }
            ).encode(),
            invalid,
        )
    for pattern in ("(a{1000}){1000}", "(?=a)b", r"(a)\1", "((a{100}){100}){100}", "("):
        yield (
            f"pattern {pattern}",
            "/api/v1/llm/structured-generate",
            json.dumps({"prompt": "x", "schema": {"type": "string", "pattern": pattern}}).encode(),
            invalid,
        )
    yield (
        "schema too large",
        "/api/v1/llm/structured-generate",
        json.dumps({"prompt": "x", "schema": {f"f{n}": "string" for n in range(20_000)}}).encode(),
        invalid,
    )
    yield "n", V1, json.dumps({**VALID[V1], "n": 129}).encode(), invalid


POISON: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    2**63,
    2**200,
    "",
    "x",
    "\x00",
    "\u2028",
    "\U0010ffff",
    "a" * 5000,
    [],
    {},
    [[]],
    [{}],
    [None],
    {"": {}},
    {"a": {"b": [1, {}]}},
    {"type": "object"},
    {"$ref": "#"},
    {"$ref": "file:///etc/passwd"},
    {"type": ["string", 7]},
    {"role": "user"},
    [{"role": "user", "content": None}],
    [{"role": "tool", "content": "x", "tool_call_id": "y"}],
    [{"role": "assistant", "tool_calls": [{}]}],
    "none",
    "required",
    "auto",
    "llamacpp",
    "ollama/m",
)
NAMES = (
    "prompt",
    "messages",
    "model",
    "model_name",
    "engine_type",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "seed",
    "schema",
    "choice",
    "regex",
    "grammar",
    "tools",
    "tool_choice",
    "think",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "response_format",
    "n",
    "input",
    "encoding_format",
    "dimensions",
    "metadata",
    "user",
    "store",
    "on_unsupported",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "engine_options",
    "chat_template_kwargs",
    "reasoning_effort",
    "guided_json",
    "functions",
    "suffix",
    "echo",
    "best_of",
    "logit_bias",
    "extra_body",
)


def put_somewhere(value: Any, rng: random.Random) -> Any:
    """The value with poison at one place in it."""
    if isinstance(value, dict) and value and rng.random() < 0.7:
        key = rng.choice(list(value))
        return {**value, key: put_somewhere(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], put_somewhere(value[at], rng), *value[at + 1 :]]
    return rng.choice(POISON)


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A valid body, changed once or a few times: in its values, its fields or its bytes."""
    path = rng.choice(PATHS)
    body: Any = VALID[path]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.random()
        if how < 0.4:
            body = put_somewhere(body, rng)
        elif isinstance(body, dict):
            body = (
                {**body, rng.choice(NAMES): rng.choice(POISON)}
                if how < 0.8
                else {key: body[key] for key in body if rng.random() < 0.7}
            )
    data = json.dumps(body).encode()
    if rng.random() < 0.35:
        at = rng.randrange(len(data) or 1)
        data = rng.choice(
            (
                data[:at],
                data[:at] + rng.randbytes(rng.randrange(1, 5)) + data[at + 1 :],
                data[:at] + data[at : at + 9] * 3 + data[at:],
                data[::-1],
                data * 2,
            )
        )
    return path, data


def verdict(path: str, answer: Any) -> str:
    """What is wrong with an answer to whatever was sent; a good answer, or an error in the envelope, is fine."""
    if not answer.status or not answer.complete:
        return f"no whole answer: {answer.note or answer.status}"
    if answer.status == 200:
        return ""
    kind = answer.headers.get("x-error-kind", "")
    try:
        openai = path.startswith(("/v1", "/tokenize", "/detokenize"))
        wrong = wrong_error(json.loads(answer.body), openai, kind, answer.status)
    except ValueError:
        wrong = f"{answer.status} that is not JSON"
    error = KINDS.get(kind)
    if not wrong and error is not None and error.code == 500 and kind not in MAY_FAIL:
        wrong = f"an unexpected 500: {answer.body[:160]!r}"
    return wrong


async def hostile_bodies(full: bool, off: str | None = None, focus: str = "") -> Result:
    """What must be refused; random mutations of valid bodies on every route; the largest bodies at once; hypothesis's
    inventions."""
    found, many = Result(), 96_000 if full else 2400
    async with World(off=off) as world:
        for engine in world.engines.values():
            engine.how = constant
        must = [case for case in refused_bodies() if focus in case[0]]
        await must_refuse(world, found, must)
        if not focus:
            await mutations(world, found, many, 5)
            await invented(world, found, 3000 if full else 150)
        if focus in ("", "capped"):
            await capped(world, found)
        if not focus or focus == "memory":
            await heavy(world, found, 4 if full else 1)
        if not focus or focus == "header":
            await headers(world, found)
        for engine in world.engines.values():
            engine.how = None
        found.need(await until(lambda: world.live() == 0, 5), "generations live on")
        await world.census(found)
    return found


async def must_refuse(world: World, found: Result, cases: list[tuple[str, str, bytes, set[str]]]) -> None:
    times: list[float] = []
    before = world.generations()

    async def one(case: tuple[str, str, bytes, set[str]]) -> None:
        name, path, body, kinds = case
        answer = await ask(world.port, path, body)
        times.append(answer.seconds)
        wrong = verdict(path, answer)
        kind = answer.headers.get("x-error-kind")
        found.check(not wrong and kind in kinds, f"{name} on {path}: {answer.status} {kind} {wrong}")
        found.need(answer.seconds < SLOWEST, f"{name} on {path}: {answer.seconds:.1f} s")

    await at_once(cases, one, 4)
    found.need(world.generations() == before, f"{world.generations() - before} of them reached an engine")
    found.figures |= {"must be refused": len(cases), "slowest_s": round(max(times, default=0), 2)}


async def capped(world: World, found: Result) -> None:
    """More tokens than the server allows: the engine is asked for the limit, and the answer names the field."""
    both = ("max_tokens", "max_completion_tokens")
    for path, field in ((API, both[0]), (V1, both[0]), (V1, both[1]), ("/v1/messages", both[0])):
        body = {key: value for key, value in VALID[path].items() if key not in (*both, "response_format")}
        answer = await ask(world.port, path, {**body, field: 8193})
        named = answer.headers.get("x-ignored-fields", "") if path != API else answer.body.decode()
        sent = json.loads(world.engines["vllm"].requests[-1].body)
        most = max(sent.get(name) or 0 for name in both)
        fine = answer.status == 200 and field in named and most == 8192
        found.check(fine, f"capped {field} on {path}: {most} {named[:200]}")


async def mutations(world: World, found: Result, many: int, seed: int) -> None:
    rng, statuses, times = random.Random(seed), dict[int, int](), list[float]()
    cases = iter([mutated(rng) for _ in range(many)])

    async def worker() -> None:
        async with Link(world.port) as link:
            for path, body in cases:
                answer = await link.ask(request_bytes(path, body))
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
                times.append(answer.seconds)
                wrong = verdict(path, answer)
                found.check(not wrong, f"{path} {body[:300]!r}: {wrong}")

    await asyncio.gather(*(worker() for _ in range(12)))
    found.figures |= {
        "mutations": many,
        "statuses": {str(key): statuses[key] for key in sorted(statuses)},
        "mutation_p99_ms": round(1e3 * quantile(times, 0.99), 1),
        "mutation_max_s": round(max(times), 2),
    }


async def invented(world: World, found: Result, many: int) -> None:
    """Bodies that hypothesis makes: any JSON in any field; and schemathesis' from our own OpenAPI document, where it is
    installed."""
    try:
        from hypothesis import HealthCheck, Phase, given, seed, settings
        from hypothesis import strategies as st
    except ImportError:
        found.figures["hypothesis"] = "not installed"
        return
    made: list[tuple[str, bytes]] = []
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    value = st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    )
    quiet = settings(
        max_examples=many // 2,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @seed(3)
    @quiet
    @given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), value, max_size=6), st.booleans())
    def invent(path: str, fields: Json, keep: bool) -> None:
        made.append((path, json.dumps({**(VALID[path] if keep else {}), **fields}).encode()))

    invent()
    found.figures["hypothesis"] = len(made)
    of_schema = await asyncio.to_thread(from_openapi, world.port, many - many // 2)
    found.figures["schemathesis"] = len(of_schema) if of_schema is not None else "not installed"

    async def one(case: tuple[str, bytes]) -> None:
        path, body = case
        wrong = verdict(path, answer := await ask(world.port, path, body))
        found.check(not wrong, f"{path} {body[:300]!r}: {wrong}")
        found.need(answer.seconds < SLOWEST, f"{path} {body[:300]!r}: {answer.seconds:.1f} s")

    await at_once(itertools.chain(made, of_schema or ()), one, 8)


def from_openapi(port: int, many: int) -> list[tuple[str, bytes]] | None:
    """Bodies for our POST routes that schemathesis draws from the server's OpenAPI document: valid ones, and ones that
    break it."""
    try:
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, seed, settings
        from schemathesis import GenerationMode
    except ImportError:
        return None
    document = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations() if result.ok().method.upper() == "POST"]
    made: list[tuple[str, bytes]] = []
    for operation, mode in itertools.product(operations, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
        examples = max(2, many // len(operations) // 2)
        quiet = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        def keep(case: Any) -> None:
            if isinstance(case.body, (dict, list, str, int, float, bool, type(None))):
                made.append((case.operation.path, json.dumps(case.body).encode()))

        seed(5)(quiet(given(case=operation.as_strategy(generation_mode=mode))(keep)))()
    return made


async def heavy(world: World, found: Result, rounds: int) -> None:
    """Bodies of just under 4 MiB, eight at once, of all shapes; and how long the others wait meanwhile."""
    limit = (4 << 20) - 64
    shapes = {
        "text": b'{"prompt": "%b"}' % (b"x" * (limit - 20)),
        "lists": b'{"prompt": [%b[]]}' % (b"[]," * ((limit - 20) // 3)),
        "objects": b'{"prompt": [%b{}]}' % (b'{"":0},' * ((limit - 20) // 7)),
        "numbers": b'{"prompt": [%b1]}' % (b"1," * ((limit - 20) // 2)),
        "keys": json.dumps({f"k{n}": 0 for n in range(limit // 14)}).encode()[:limit],
        "messages": b'{"messages": [%b{"role":"user","content":"x"}]}' % (b'{"role":"user","content":"x"},' * 100_000),
        "escapes": b'{"prompt": "%b"}' % (b"\\u0041" * ((limit - 20) // 6)),
    }
    start = (await asyncio.to_thread(world.server.census))["rss"]
    over, waits = asyncio.Event(), list[float]()

    async def beside() -> None:
        while not over.is_set():
            waits.append((await ask(world.port, "/health", method="GET")).seconds)
            await asyncio.sleep(0.02)

    probe = asyncio.ensure_future(beside())
    for name, body in [shape for shape in shapes.items() for _ in range(rounds)]:

        async def one(path: str, name: str = name, body: bytes = body) -> None:
            wrong = verdict(path, answer := await ask(world.port, path, body, timeout=60))
            found.check(not wrong, f"4 MiB of {name} on {path}: {wrong}")
            found.need(answer.seconds < 15, f"4 MiB of {name} on {path}: {answer.seconds:.1f} s")

        await asyncio.gather(*(one(path) for path in ("/api/v1/llm/generate", API) * 4))
    over.set()
    await probe
    peak = (await asyncio.to_thread(world.server.census))["peak"]
    bound = MEMORY * 8 * (4 << 20)
    found.figures |= {
        "heavy_peak_growth_MB": round((peak - start) / 1e6, 1),
        "heavy_bound_MB": round(bound / 1e6, 1),
        "others_wait_max_s": round(max(waits), 2),
    }
    found.need(
        peak - start <= bound, f"memory grew by {(peak - start) / 1e6:.0f} MB, the bound is {bound / 1e6:.0f} MB"
    )
    found.need(max(waits) < 1.0, f"/health waited {max(waits):.1f} s beside large bodies")


async def headers(world: World, found: Result) -> None:
    """Headers past their bounds, broken framing, and other words than HTTP: refused or closed, and the server lives."""
    cases: dict[str, bytes] = {
        "one header of 40 KiB": request_bytes("/health", None, {"x": "y" * 40_000}, "GET"),
        "400 headers": request_bytes("/health", None, {f"x{n}": "y" for n in range(400)}, "GET"),
        "an endless header": b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * (20 << 20),
        "an endless path": b"GET /" + b"y" * (20 << 20),
        "content-length twice": b"POST /api/v1/llm/chat HTTP/1.1\r\nhost: a\r\n"
        b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        "length and chunks": b"POST /api/v1/llm/chat HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "a negative length": b"POST /api/v1/llm/chat HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        "a huge length": b"POST /api/v1/llm/chat HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99999999999\r\n\r\n{",
        "chunks without end": b"POST /api/v1/llm/chat HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
        + (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 6,
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    }
    for name, raw in cases.items():
        began = time.monotonic()
        async with Link(world.port) as link:
            answer = await link.ask(raw, 5)
        fine = answer.status in (400, 408, 413, 431, 411, 501, 505) or (not answer.status and answer.note != "hung")
        found.check(
            fine, f"{name}: {answer.status} {answer.note} {answer.body[:80]!r} after {time.monotonic() - began:.1f} s"
        )
    alive = await ask(world.port, "/health", method="GET")
    found.check(alive.status == 200, "the server does not live")
    ours = await ask(
        world.port, API, VALID[API], headers={"x-llm-inference-hop": alive.headers.get("x-llm-inference", "")}
    )
    found.check(ours.status == 400, f"a request that this server sent itself: {ours.status}")
