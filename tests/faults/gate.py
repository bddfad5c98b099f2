"""The access row: every combination of route, path, Host and headers that must be refused is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
from collections.abc import Mapping
from urllib.parse import unquote

from .rig import DIALECTS, Answer, Json, Link, Result, World, asking, at_once, request_bytes

KEY = "sk-right-key-0123456789"
ROUTES = {  # every guarded route: its method and a body that would be answered
    "/api/v1/llm/generate": ("POST", {"prompt": "x"}),
    "/api/v1/llm/chat": ("POST", asking("vllm", "x", v1=False, stream=False)),
    "/api/v1/llm/structured-generate": ("POST", {"prompt": "x"}),
    "/api/v1/llm/engines": ("GET", None),
    "/api/v1/llm/models": ("GET", None),
    "/v1/models": ("GET", None),
    "/v1/models/vllm/m": ("GET", None),
    "/v1/chat/completions": ("POST", asking("vllm", "x", v1=True, stream=True)),
    "/v1/completions": ("POST", {"model": "vllm/m", "prompt": "x"}),
    "/v1/embeddings": ("POST", {"model": "vllm/m", "input": "x"}),
    "/v1/responses": ("POST", {"model": "vllm/m", "input": "x"}),
    "/v1/messages": ("POST", {"model": "vllm/m", "max_tokens": 8, "messages": [{"role": "user", "content": "x"}]}),
    "/v1/messages/count_tokens": ("POST", {"model": "vllm/m", "messages": [{"role": "user", "content": "x"}]}),
    "/metrics": ("GET", None),
    "/nowhere": ("GET", None),
    "/ui/below": ("POST", {"data": []}),
}
PUBLIC = {"/", "/ui", "/favicon.ico", "/health", "/ready", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"}
PUBLIC_BELOW = ("/docs/", "/redoc/", "/static/", "/assets/")  # the pages' own scripts
KEPT_OUT = (400, 401, 403, 404, 405, 408, 413, 414, 421, 431, 501, 505)


def paths_like(path: str) -> list[str]:
    """Ways of writing a path that a router or proxy might take for it."""
    encoded = "/" + "".join(f"%{ord(c):02x}" for c in path[1:])
    return [
        path,
        path + "/",
        "/" + path,
        path.replace("/", "//"),
        path.upper(),
        path + "?key=" + KEY,
        path + "?api_key=" + KEY,
        path + "#x",
        path + ";x=1",
        path + "%00",
        path + "%20",
        path + ".json",
        "/." + path,
        "/health/.." + path,
        "/docs/.." + path,
        "/health%2f..%2f.." + path,
        "/docs/%2e%2e" + path,
        "/health;" + path,
        "/health?" + path,
        encoded,
        path.replace("/", "%2f"),
        path.replace("v1", "v%31"),
        "/docs" + path,
        "/openapi.json" + path,
        "/health" + path,
        "\\" + path[1:],
        path.replace("/", "\\"),
        "http://127.0.0.1" + path,
        "http://127.0.0.1/health/.." + path,
        "//127.0.0.1" + path,
        path + "/../../../../health",
        "/docs/oauth2-redirect/../.." + path,
        path[1:],
        "*",
    ]


def wrong_keys() -> list[dict[str, str]]:
    """Headers without the right key."""
    bearer = "authorization"
    return [
        {},
        {bearer: ""},
        {bearer: "Bearer"},
        {bearer: "Bearer "},
        {bearer: f"Bearer {KEY}x"},
        {bearer: f"Bearer {KEY[:-1]}"},
        {bearer: f"Bearer {KEY.upper()}"},
        {bearer: KEY},
        {bearer: f"Basic {KEY}"},
        {bearer: f"Token {KEY}"},
        {bearer: f"Bearer,{KEY}"},
        {bearer: f"Bearer {KEY},{KEY}"},
        {bearer: f'Bearer "{KEY}"'},
        {bearer: "Bearer null"},
        {bearer: "Basic eDp4"},
        {bearer: f"Basic x:{KEY}"},
        {"x-api-key": ""},
        {"x-api-key": "x"},
        {"x-api-key": f"Bearer {KEY}"},
        {"cookie": f"api_key={KEY}"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-real-ip": "127.0.0.1"},
        {"x-original-url": "/health"},
        {"x-rewrite-url": "/health"},
        {"x-http-method-override": "OPTIONS"},
        {"x-forwarded-host": "localhost"},
        {"api-key": KEY},
        {"proxy-authorization": f"Bearer {KEY}"},
        {bearer: "Bearer \xff\xfe"},
        {bearer: "Bearer " + "a" * 8000},
        {"x-api-key": "\x00"},
        {"x-llm-inference-hop": "x"},
    ]


FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example#127.0.0.1",
    "localhost@evil.example",
    "0.0.0.0",
    "192.0.2.7",
    "[2001:db8::1]",
    "localhost, evil.example",
    "evil.example, localhost",
    "2130706433",
    "127.1",
    "0x7f000001",
    "localhost.",
    "localhost:x",
    "",
    " ",
    "[::1",
    "xn--localhost",
    "localhost\t",
    "127.0.0.1:80:80",
)
FORWARDED = (
    {"x-forwarded-for": "127.0.0.1"},
    {"x-forwarded-for": ""},
    {"X-Forwarded-For": "::1"},
    {"forwarded": "for=127.0.0.1"},
    {"x-real-ip": "127.0.0.1"},
    {"via": "1.1 proxy"},
    {"x-forwarded-host": "localhost"},
    {"x-forwarded-proto": "https"},
    {"x-client-ip": "127.0.0.1"},
    {"cf-connecting-ip": "127.0.0.1"},
    {"true-client-ip": "127.0.0.1"},
)
PAGES = (
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost.evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://evil.example", "sec-fetch-site": "same-origin"},
    {"origin": "file://"},
    {"origin": "chrome-extension://abc"},
    {"origin": "http://127.0.0.1:1"},
)
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "127.9.9.9")


def names_public(target: str) -> bool:
    """Is it exactly one of the public paths, once decoded?"""
    path = target.removeprefix("http://127.0.0.1") if target.startswith("http://127.0.0.1") else target
    path = unquote(path.partition("?")[0].partition("#")[0])
    return (path.rstrip("/") or "/") in PUBLIC or path.startswith(PUBLIC_BELOW)


def through(answer: Answer, target: str, method: str) -> str:
    """What an uninvited caller got that the rule keeps from it, or nothing."""
    if answer.status in KEPT_OUT or (not answer.status and answer.note != "hung"):
        if answer.status in (404, 405) and not names_public(target):
            return f"past the guard: {answer.status}"  # default deny: who is not let in does not learn what is there
        return ""
    if names_public(target) and answer.status in (200, 503):
        return ""
    return f"{answer.status} {answer.note} {answer.body[:60]!r}"


def written(
    target: str, body: Json | None, headers: Mapping[str, str], method: str, *, twice: tuple[str, str] | None = None
) -> bytes:
    raw = request_bytes(target, body, headers, method)
    return raw.replace(b"\r\n", f"\r\n{twice[0]}: {twice[1]}\r\n".encode("latin-1"), 1) if twice else raw


async def gate(full: bool, off: str | None = None, focus: str = "") -> Result:
    """With a key: nobody without it. Without one: nobody from elsewhere, by another name, through a proxy, or from a
    web page."""
    found = Result()
    if focus in ("", "keyed"):
        await keyed(full, off, found)
    if focus != "keyed":
        await keyless(full, off, found, focus)
    return found


async def keyed(full: bool, off: str | None, found: Result) -> None:
    cells = [
        (route, path, keys, method)
        for route in ROUTES
        for path in paths_like(route)
        for keys in wrong_keys()
        for method in (ROUTES[route][0],)
    ]
    cells += [
        (route, route, keys, method)
        for route in ROUTES
        for keys in wrong_keys()
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "GET", "POST", "post", "CONNECT", "X")
    ]
    random.Random(3).shuffle(cells)
    world = World("--api-key", KEY, off=off)
    world.key = {"authorization": f"Bearer {KEY}"}
    async with world:
        before = world.generations()

        async def one(cell: tuple[str, str, dict[str, str], str]) -> None:
            route, target, keys, method = cell
            async with Link(world.port) as link:
                answer = await link.ask(written(target, ROUTES[route][1], keys, method), 5)
            wrong = through(answer, target, method)
            found.check(not wrong, f"{method} {target} {keys}: {wrong}")

        await at_once(cells if full else cells[:1500], one, 16)
        found.need(world.generations() == before, f"{world.generations() - before} requests reached an engine")
        async with Link(world.port) as link:
            answer = await link.ask(
                request_bytes("/api/v1/llm/chat", ROUTES["/api/v1/llm/chat"][1], {"authorization": f"Bearer {KEY}"})
            )
        found.need(answer.status == 200, f"with the key: {answer.status}")
        await world.census(found)


def own_address() -> str | None:
    """This machine's address on its network, where it has one (nothing is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return None


async def keyless(full: bool, off: str | None, found: Result, focus: str = "") -> None:
    """No key configured: every mutation here must be kept out, and the plain loopback call let in."""
    outside = own_address()
    async with World("--host", "0.0.0.0", off=off) as world:
        before = world.generations()
        cells: list[tuple[str, dict[str, str], tuple[str, str] | None]] = []
        if focus in ("", "host"):
            cells += [(route, {"host": host}, None) for route in ROUTES for host in FOREIGN_HOSTS]
            cells += [(route, {"host": "evil.example", **more}, None) for route in ROUTES for more in FORWARDED]
            cells += [(route, {"host": good}, ("host", "evil.example")) for route in ROUTES for good in LOOPBACK_HOSTS]
        if focus in ("", "forwarded"):
            cells += [
                (route, {"host": host, **more}, None)
                for route in ROUTES
                for host in LOOPBACK_HOSTS
                for more in FORWARDED
            ]
        if focus in ("", "page"):
            cells += [
                (route, {"host": host, **more}, None) for route in ROUTES for host in LOOPBACK_HOSTS for more in PAGES
            ]

        async def one(cell: tuple[str, dict[str, str], tuple[str, str] | None]) -> None:
            route, headers, twice = cell
            method, body = ROUTES[route]
            async with Link(world.port) as link:
                answer = await link.ask(written(route, body, headers, method, twice=twice), 5)
            wrong = through(answer, route, method)
            found.check(not wrong, f"keyless {method} {route} {headers} {twice or ''}: {wrong}")

        random.Random(4).shuffle(cells)
        await at_once(cells if full or focus else cells[:700], one, 16)
        if outside and focus in ("", "host"):

            async def from_outside(cell: tuple[str, dict[str, str]]) -> None:
                route, keys = cell
                async with Link(world.port, outside) as link:
                    answer = await link.ask(
                        written(route, ROUTES[route][1], {**keys, "host": "localhost"}, ROUTES[route][0]), 5
                    )
                wrong = through(answer, route, ROUTES[route][0])
                found.check(not wrong, f"from {outside}: {route} {keys}: {wrong}")

            await at_once(itertools.product(ROUTES, wrong_keys()), from_outside, 16)
        found.figures["from another address"] = bool(outside)
        found.need(world.generations() == before, f"{world.generations() - before} requests reached an engine")
        for host in LOOPBACK_HOSTS:
            async with Link(world.port) as link:
                answer = await link.ask(
                    request_bytes("/api/v1/llm/chat", asking(DIALECTS[1], "x", v1=False, stream=False), {"host": host})
                )
            found.need(
                answer.status == 200, f"a plain loopback call by {host}: {answer.status} {json.dumps(answer.headers)}"
            )
        await world.census(found)
