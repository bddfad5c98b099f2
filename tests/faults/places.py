"""The row of places: nothing in a request becomes a URL, path, header, file or process; a canary listens for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from typing import Any

from .hostile import POISON, VALID
from .rig import API, V1, Engine, Json, Link, Reply, Result, Seen, World, asking, request_bytes

SECRET = "/etc/faults-canary"
UPSTREAM_PATHS = {
    "ollama": {
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/show",
        "/api/tags",
        "/api/version",
        "/api/ps",
        "/",
        "/v1/models",
    },
    "vllm": {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/version",
        "/health",
        "/tokenize",
        "/server_info",
    },
    "sglang": {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/server_info",
        "/get_server_info",
        "/model_info",
        "/get_model_info",
        "/health",
        "/version",
    },
    "llamacpp": {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/props",
        "/apply-template",
        "/health",
        "/version",
    },
}
UPSTREAM_HEADERS = {
    "host",
    "accept-encoding",
    "content-type",
    "content-length",
    "x-request-id",
    "x-llm-inference-hop",
    "connection",
    "authorization",
    "accept",
    "user-agent",
}
TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context: a number, no place
WORDS = {
    "content",
    "text",
    "prompt",
    "input",
    "stop",
    "name",
    "description",
    "id",
    "tool_call_id",
    "arguments",
    "reasoning",
    "title",
    "enum",
    "const",
    "default",
    "choices",
}


class Canary:
    """A server that nobody has a reason to call, and a naive engine that fetches every place it is handed."""

    def __init__(self) -> None:
        self.hits: list[str] = []

    async def start(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.hits.append(f"fetched: {(await reader.read(200))[:80]!r}")
            writer.transport.abort()

        self.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port: int = self.server.sockets[0].getsockname()[1]

    def places(self) -> list[str]:
        at = f"127.0.0.1:{self.port}"
        return [
            f"http://{at}/c",
            f"HTTP://{at}/c",
            f"//{at}/c",
            f"https://{at}/",
            f"http://localhost:{self.port}/c",
            f"http://user:pw@{at}/c",
            f" http://{at}/c",
            f"http://{at}/c#x",
            f"file://{SECRET}",
            SECRET,
            f"../../../../../..{SECRET}",
            f"data:text/html,<img src=http://{at}/>",
            f"ftp://{at}/c",
            f"unix:{SECRET}",
            f"x\r\nhost: {at}\r\nx-canary: 1",
            f"x\r\n\r\nGET http://{at}/c HTTP/1.1\r\n\r\n",
            f"m%0d%0ahost:%20{at}",
            f"{{{{http://{at}/}}}}",
            f"${{jndi:ldap://{at}/c}}",
            f"; curl http://{at}/c",
            f"$(curl http://{at}/c)",
            f"`cat {SECRET}`",
            f"@{SECRET}",
            "--model\x00/etc",
            f"s3://{at}/c",
            f"\\\\{at}\\c",
            f"http:/{at}/c",
            f"javascript:fetch('http://{at}')",
        ]

    def naive(self, engine: Engine, seen: Seen) -> Reply | None:
        """Looks at what came upstream as an engine would that trusts it; what it would fetch is a hit."""
        path = seen.path.partition("?")[0]
        if path not in UPSTREAM_PATHS[engine.dialect] or "?" in seen.path:
            self.hits.append(f"{engine.dialect} was asked for {seen.path}")
        traced = TRACE.fullmatch(seen.headers.get("traceparent", "")) is not None
        if extra := set(seen.headers) - UPSTREAM_HEADERS - ({"traceparent", "tracestate"} if traced else set()):
            self.hits.append(f"{engine.dialect} got the headers {extra}")
        if seen.headers.get("host") not in (f"127.0.0.1:{engine.port}", f"localhost:{engine.port}"):
            self.hits.append(f"{engine.dialect} was called {seen.headers.get('host')}")
        self.look(json.loads(seen.body or b"{}"), "", engine.dialect)
        canned: Json = {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "prompt": "hi",
            "input": "hi",
            "stream": b'"stream":true' in seen.body,
        }
        return engine.usual(Seen(method="POST", path=seen.path, headers=seen.headers, body=json.dumps(canned).encode()))

    def look(self, value: Any, key: str, dialect: str) -> None:
        """A text that names the canary, anywhere but in words, is a place."""
        if isinstance(value, dict):
            for name, inner in value.items():
                if (
                    name
                    in (
                        "$id",
                        "$schema",
                        "$comment",
                        "description",
                        "title",
                        "default",
                        "enum",
                        "const",
                        "examples",
                        "pattern",
                        "properties",
                        "required",
                        "metadata",
                        "regex",
                        "grammar",
                        "ebnf",
                        "choice",
                        "guided_choice",
                        "json_schema",
                        "format",
                        "parameters",
                        "structured_outputs",
                        "cache_salt",  # vLLM's: it goes into a hash
                    )
                    and dialect
                ):
                    self.look_for_refs(inner, dialect)
                else:
                    self.look(inner, name, dialect)
        elif isinstance(value, list):
            for inner in value:
                self.look(inner, key, dialect)
        elif key == "model" and isinstance(
            value, str
        ):  # a name, which an engine looks up in its own list: `127.0.0.1:80/x` is one of Ollama's
            if (
                value.startswith(("/", "."))
                or "//" in value
                or ".." in value
                or not value.isprintable()
                or " " in value
            ):
                self.hits.append(f"{dialect} was handed the model {value[:60]!r}")
        elif (
            isinstance(value, str)
            and key not in WORDS
            and not value.startswith("data:")
            and (str(self.port) in value or SECRET in value)
        ):
            self.hits.append(f"{dialect} was handed {key} = {value[:60]!r}")

    def look_for_refs(self, value: Any, dialect: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name == "$ref" and isinstance(inner, str) and not inner.startswith("#"):
                    self.hits.append(f"{dialect} was handed $ref = {inner[:60]!r}")
                self.look_for_refs(inner, dialect)
        elif isinstance(value, list):
            for inner in value:
                self.look_for_refs(inner, dialect)


def carriers(place: str) -> list[tuple[str, str, Json, dict[str, str]]]:
    """(what, path, body, headers): the place in every field that could be taken for one."""
    found: list[tuple[str, str, Json, dict[str, str]]] = []
    chat, v1 = asking("vllm", "x", v1=False, stream=False), asking("vllm", "x", v1=True, stream=False)
    for kind in (
        "image_url",
        "video_url",
        "audio_url",
        "input_audio",
        "file",
        "input_image",
        "image",
        "IMAGE_URL",
        "image_embeds",
        "pdf_url",
    ):
        for part in (
            {"type": kind, kind: {"url": place}},
            {"type": kind, kind: place},
            {"type": "text", "text": "x", kind: {"url": place}},
            {"type": kind, kind: {"data": place, "file_data": place}},
        ):
            found.append((f"part {kind}", V1, {**v1, "messages": [{"role": "user", "content": [part]}]}, {}))
            found.append((f"part {kind}", API, {**chat, "messages": [{"role": "user", "content": [part]}]}, {}))
    for dialect in ("ollama", "sglang", "llamacpp"):
        found.append(
            (
                "image",
                V1,
                {
                    **v1,
                    "model": f"{dialect}/m",
                    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": place}}]}],
                },
                {},
            )
        )
        found.append(
            (
                "images",
                API,
                {**chat, "engine_type": dialect, "messages": [{"role": "user", "content": "x", "images": [place]}]},
                {},
            )
        )
    for name in (
        "base_url",
        "api_base",
        "url",
        "endpoint",
        "host",
        "proxy",
        "engine_options",
        "launch_args",
        "extra_body",
        "extra_headers",
        "chat_template",
        "lora_path",
        "mm_processor_kwargs",
        "model_path",
        "hf_token",
        "callback",
        "webhook",
        "documents",
        "web_search_options",
        "media_io_kwargs",
        "template",
        "path",
        "slot_save_path",
        "lora",
        "cache_salt",
        "python",
    ):
        for value in (place, {"url": place}, [place]):
            found += [(name, API, {**chat, name: value}, {}), (name, V1, {**v1, name: value}, {})]
    for name, path, body in (
        ("model_name", API, chat),
        ("engine_type", API, chat),
        ("model", V1, v1),
        ("model", "/v1/completions", {"model": "x", "prompt": "x"}),
        ("model", "/v1/embeddings", {"input": "x"}),
    ):
        for form in (place, f"vllm/{place}", f"llamacpp/{place}", f"ollama/{place}"):
            found.append((name, path, {**body, name: form}, {}))
    for schema in (
        {"$ref": place},
        {"type": "object", "properties": {"a": {"$ref": place}}},
        {"type": "string", "$id": place, "$schema": place},
        {"allOf": [{"$ref": place + "#/x"}]},
        {"$dynamicRef": place},
        {"$defs": {"a": {"$ref": place}}, "type": "object"},
        {"$defs": {"a": {"$ref": place}}, "$ref": "#/$defs/a"},
    ):
        found.append(("schema", "/api/v1/llm/structured-generate", {"prompt": "x", "schema": schema}, {}))
        found.append(
            (
                "schema",
                V1,
                {**v1, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
                {},
            )
        )
        found += [
            ("schema", V1, {**v1, "structured_outputs": {"json": schema}}, {}),
            ("schema", V1, {**v1, "model": "llamacpp/m", "json_schema": schema}, {}),
        ]
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
        found += [("tool", V1, {**v1, "tools": [tool]}, {}), ("tool", API, {**chat, "tools": [tool]}, {})]
    clean = place.replace("\r", "%0d").replace("\n", "%0a").replace("\x00", "")
    for header in (
        "x-forwarded-host",
        "referer",
        "x-request-id",
        "x-api-base",
        "x-target-url",
        "forwarded",
        "user-agent",
        "accept-encoding",
        "x-llm-inference-hop",
        "cookie",
        "x-engine",
        "via",
        "traceparent",
        "openai-organization",
    ):
        found.append((f"header {header}", V1, v1, {header: clean}))
    found.append(("content", V1, {**v1, "messages": [{"role": "user", "content": place}]}, {}))
    return found


async def places(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Canary places in every field and header, alone and amid mutations: nothing fetches them, nothing opens them,
    upstream has its own paths."""
    found, rng, canary = Result(), random.Random(13), Canary()
    await canary.start()
    cases = [case for place in canary.places() for case in carriers(place) if focus in case[0]]
    if not full and not focus:
        cases = rng.sample(cases, 1500)
    while full and len(cases) < 10_000:  # mutations of valid bodies with a place in them
        path = rng.choice(list(VALID))
        cases.append(
            (
                "mutation",
                path,
                {
                    **VALID[path],
                    rng.choice(list(VALID[path])): rng.choice(
                        (rng.choice(canary.places()), [rng.choice(canary.places())], rng.choice(POISON))
                    ),
                },
                {},
            )
        )
    urls = [
        ("url", path.replace("*", place), None, {})
        for place, path in itertools.product(
            canary.places(), ("/v1/models/*", "/docs/*", "/docs/../*", "/static/*", "/v1/models/?base_url=*")
        )
    ]
    async with World("--no-auth", off=off) as world:
        for engine in world.engines.values():
            engine.how = canary.naive
        opened = set((await asyncio.to_thread(world.server.census))["opened"])
        async with Link(world.port) as link:
            for what, path, body, headers in [
                *cases,
                *(urls if not focus else []),
            ]:  # one after the other, so that a hit has a name
                hits = len(canary.hits)
                target = "".join(c if 32 < ord(c) < 127 else f"%{ord(c):02x}" for c in path)
                answer = await link.ask(request_bytes(target, body, headers, "POST" if body is not None else "GET"))
                named = answer.status in (400, 404) and len(answer.body) < 700  # a refusal names what it refuses
                fine = answer.note != "hung" and (named or b"faults-canary" not in answer.body)
                echo = "" if fine else f"echoed: {answer.body[:200]!r}"
                found.check(
                    fine and len(canary.hits) == hits,
                    f"{what} on {path[:60]}: {answer.status} {answer.note} {canary.hits[hits:][:1]} {echo}",
                )
        await asyncio.sleep(0.5)  # what is fetched late
        new = set((await asyncio.to_thread(world.server.census))["opened"]) - opened
        outside = [
            path for path in new if SECRET in path or str(canary.port) in path or path.startswith(("subprocess", "os."))
        ]
        found.need(not outside, f"opened: {outside[:3]}")
        found.need(not canary.hits, f"{len(canary.hits)} hits: {canary.hits[:3]}")
        for engine in world.engines.values():
            engine.how = None
        found.figures |= {"canary hits": len(canary.hits), "outside opens": len(outside), "files opened": len(new)}
        await world.census(found)
    canary.server.close()
    return found
