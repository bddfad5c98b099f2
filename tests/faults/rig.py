"""The base of every row: four scripted engines behind fault proxies, the real server, a raw client, a judge.

async with World() as world:
    answer = await ask(world.port, "/api/v1/llm/chat", chat("vllm", "hi"))
    judge(answer, v1=False, stream=False)   # ("good", its text), (an error's kind, ""), ("!what is wrong", "")
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import re
import secrets
import socket
import struct
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from tests.fake_engine import DIALECTS, NOT_GENERATIONS, SGLANG_FLAGS, TEXT, Dialect, FakeEngine, Json, Reply, Seen
from tests.harness import KINDS, Command

from .proxy import Proxies

URL_ENV = {
    "ollama": "OLLAMA_HOST",
    "vllm": "VLLM_BASE_URL",
    "sglang": "SGLANG_BASE_URL",
    "llamacpp": "LLAMACPP_BASE_URL",
}
API, V1 = "/api/v1/llm/chat", "/v1/chat/completions"
HUNG = 10.0  # seconds after which the client gives an answer up, where a row says nothing else
NONCE = re.compile(r"nonce-[0-9a-f]{12}")
T, S = TypeVar("T"), TypeVar("S")


@dataclass
class Result:
    """What a row found: how many were tried, what was wrong with which, and figures beside it."""

    n: int = 0
    bad: list[str] = field(default_factory=list)
    figures: Json = field(default_factory=dict)

    def check(self, fine: object, what: str) -> None:
        self.n += 1
        self.need(fine, what)

    def need(self, fine: object, what: str) -> None:
        """A condition of the row as a whole, or a second one of the same case: it counts no further case."""
        if not fine:
            self.bad.append(what)

    def as_json(self) -> Json:
        kinds = collections.Counter(re.sub(r"\d+(\.\d+)?", "#", what)[:120] for what in self.bad)
        return {
            "n": self.n,
            "bad": len(self.bad),
            "figures": self.figures,
            "first_bad": self.bad[:8],
            "kinds_of_bad": dict(kinds.most_common(20)),
        }


# -------------------------------------------------------------------------------------------------------------- engines


def words_for(text: str) -> str:
    """What an engine says to a prompt: the prompt's nonce before and after the usual words, so that a mixed or cut
    answer shows."""
    found = NONCE.findall(text)
    return f"{found[-1]} {TEXT} {found[-1]}" if found else TEXT


class Engine(FakeEngine):
    """A fake engine that echoes nonces, and that a row can tell what to do with each generation."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self.flags |= SGLANG_FLAGS
        self.requests = collections.deque(maxlen=4000)  # type: ignore[assignment]  # a long run must not fill memory
        self.how: Callable[[Engine, Seen], Reply | None] | None = None
        self.generations = 0
        self.answer = lambda asked: words_for(json.dumps(asked.get("messages") or asked.get("prompt")))

    def usual(self, seen: Seen) -> Reply:
        return super()._reply(seen)[0]

    def _reply(self, seen: Seen) -> tuple[Reply, int]:
        if seen.method == "POST" and seen.path not in NOT_GENERATIONS:
            self.generations += 1
            if self.how is not None and (reply := self.how(self, seen)) is not None:
                self.requests.append(seen)
                return reply, 1
        return super()._reply(seen)


# --------------------------------------------------------------------------------------------------------------- server


class Server(Command):
    """The real command, by way of server.py: with a guard switched off, with other settings, and with a control
    socket."""

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        off: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="faults-")
        self.control = f"{self._dir.name}/control"
        more = {
            "FAULTS_CONTROL": self.control,
            "FAULTS_OFF": off or "",
            "FAULTS_SETTINGS": json.dumps(dict(settings or {})),
        }
        self.unexpected = 0  #: how often the log has "unexpected error"
        super().__init__(*args, module="tests.faults.server", env={**(env or {}), **more})

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.unexpected += "unexpected error" in line or "Exception in ASGI application" in line
            self.said = self.said[-20_000:] + line

    def census(self) -> Json:
        """Tasks, threads, fds, children, sockets, memory of the server's process, as it tells."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(20)
            peer.connect(self.control)
            said = b"".join(iter(lambda: peer.recv(65536), b""))
        found: Json = json.loads(said)
        return found

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._dir.cleanup()


LASTING = ("tasks", "threads", "fds", "children", "sockets")


class World:
    """Four engines, four proxies, one server; `vllm` is its default engine."""

    def __init__(
        self,
        *args: str,
        off: str | None = None,
        settings: Mapping[str, Any] | None = None,
        proxied: bool = False,
        **env: str,
    ) -> None:
        self.args, self.off, self.settings, self.proxied, self.env = args, off, settings, proxied, env
        self.engines = {dialect: Engine(dialect) for dialect in DIALECTS}
        self._stack = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._start)
            await self._warm()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _start(self) -> None:
        for engine in self.engines.values():
            self._stack.callback(engine.stop)
            engine.start()
        ports: dict[str, int] = {dialect: engine.port for dialect, engine in self.engines.items()}
        if self.proxied:
            self.proxies = self._stack.enter_context(Proxies(ports))
            ports = self.proxies.ports
        urls = {URL_ENV[dialect]: f"http://127.0.0.1:{port}" for dialect, port in ports.items()}
        self.server = self._stack.enter_context(
            Server("--engine", "vllm", *self.args, off=self.off, settings=self.settings, env={**urls, **self.env})
        )
        self.port = self.server.port

    async def _warm(self) -> None:
        """Each engine is reached once by each surface, so that what lasts is there before it is counted."""
        for dialect in DIALECTS:
            for path, v1 in ((API, False), (V1, True)):
                for stream in (False, True):
                    answer = await ask(self.port, path, asking(dialect, "warm", v1=v1, stream=stream), headers=self.key)
                    assert judge(answer, v1=v1, stream=stream)[0] == "good", answer
        self.born = await asyncio.to_thread(self.server.census)

    key: Mapping[str, str] = {}

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._stack.close)

    def live(self) -> int:
        return sum(engine.live for engine in self.engines.values())

    def generations(self) -> int:
        return sum(engine.generations for engine in self.engines.values())

    async def at_rest(self, seconds: float = 12.0) -> tuple[Json, Json]:
        """What the server holds once it holds no more than when it started (idle pooled connections live 4 s), and what
        is left over."""
        deadline = time.monotonic() + seconds
        while True:
            now = await asyncio.to_thread(self.server.census)
            more = {name: now[name] - self.born[name] for name in LASTING if now[name] > self.born[name]}
            if not more or time.monotonic() > deadline:
                return now, more
            await asyncio.sleep(0.25)

    async def census(self, found: Result) -> None:
        """Tasks, threads, fds, children and sockets come back to where they were."""
        now, more = await self.at_rest()
        found.figures["census"] = more or "back to where it was"
        found.need(
            not more, f"census: more than before: {more}" + (f" {now['thread_names']}" if "threads" in more else "")
        )
        found.need(not self.server.unexpected, f"the log has {self.server.unexpected} unexpected errors")


# --------------------------------------------------------------------------------------------------------------- client


@dataclass(frozen=True, slots=True)
class Answer:
    status: int  # 0: none came
    headers: Json
    body: bytes
    complete: bool  # its framing came to an end
    seconds: float
    note: str = ""


_serial = itertools.count(1)


def nonce() -> str:
    return f"nonce-{secrets.token_hex(6)}"


def asking(dialect: str, prompt: str, *, v1: bool, stream: bool, **more: Any) -> Json:
    messages = [{"role": "user", "content": prompt}]
    if v1:
        return {"model": f"{dialect}/m", "messages": messages, "max_tokens": 400, "stream": stream, **more}
    return {"engine_type": dialect, "messages": messages, "max_tokens": 400, "stream": stream, **more}


def request_bytes(
    path: str, body: bytes | Json | None, headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    head = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
    if data:
        head.setdefault("content-length", str(len(data)))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + data


class Link:
    """One connection to the server, asked again and again; opened anew when it was closed."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.host = port, host
        self.writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.writer is None or self.writer.is_closing() or self.reader.at_eof():
            self.close()
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1 << 26)
        return self.reader, self.writer

    async def ask(self, raw: bytes, timeout: float = HUNG) -> Answer:
        began, status, headers, parts = time.monotonic(), 0, {}, []  # type: float, int, Json, list[bytes]
        complete, note, bare = False, "", raw.startswith(b"HEAD ")
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await self.open()
                writer.write(raw)
                if len(raw) > 1 << 16:
                    with contextlib.suppress(ConnectionError):  # it may be refused before we have said all
                        await writer.drain()
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                status = int(lines[0].split()[1])
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])
                }
                if bare or status in (204, 304):
                    complete = True
                elif "chunked" in headers.get("transfer-encoding", ""):
                    while size := int(await reader.readline(), 16):
                        parts.append(await reader.readexactly(size))
                        await reader.readexactly(2)
                    await reader.readline()
                    complete = True
                elif "content-length" in headers:
                    parts.append(await reader.readexactly(int(headers["content-length"])))
                    complete = True
                else:
                    parts.append(await reader.read())
                    complete = True
        except TimeoutError:
            note = "hung"
        except asyncio.IncompleteReadError as exc:
            parts.append(exc.partial)
            note = "closed"
        except (OSError, ValueError) as exc:
            note = f"closed ({type(exc).__name__})"
        if not complete or headers.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, headers, b"".join(parts), complete, time.monotonic() - began, note)


async def ask(
    port: int,
    path: str,
    body: bytes | Json | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
    timeout: float = HUNG,
    host: str = "127.0.0.1",
) -> Answer:
    """One request over a connection of its own."""
    async with Link(port, host) as link:
        return await link.ask(request_bytes(path, body, headers, method), timeout)


def hang_up(writer: asyncio.StreamWriter, how: str) -> None:
    """A client leaves: `fin` closes as a program that ends, `reset` as one that is killed with unread data."""
    if how == "reset":
        peer: socket.socket = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def at_once(cases: Iterable[T], work: Callable[[T], Awaitable[S]], limit: int = 32) -> list[S]:
    """All cases, `limit` at a time, in their order."""
    gate = asyncio.Semaphore(limit)

    async def one(case: T) -> S:
        async with gate:
            return await work(case)

    return list(await asyncio.gather(*(one(case) for case in cases)))


async def until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in that time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


# --------------------------------------------------------------------------------------------------------------- judge


def judge(answer: Answer, *, v1: bool, stream: bool) -> tuple[str, str]:
    """("good", text), (kind of a typed error, text before it), or ("!…", ""): hung, cut in silence, outside the
    format."""
    if answer.note == "hung":
        return "!hung", ""
    if not answer.status:
        return f"!no answer: {answer.note}", ""
    if answer.status != 200 or not stream:
        if not answer.complete:
            return "!cut in silence", ""
        try:
            body = json.loads(answer.body)
        except ValueError:
            return f"!{answer.status} that is not JSON", ""
        if answer.status != 200:
            kind = str(answer.headers.get("x-error-kind"))
            return (problem, "") if (problem := wrong_error(body, v1, kind, answer.status)) else (kind, "")
        with contextlib.suppress(KeyError, TypeError, IndexError):
            if v1:
                return "good", str(body["choices"][0]["message"]["content"])
            if list(body) == ["request_id", "code", "msg", "data"] and body["code"] == 200:
                return "good", str(body["data"]["text"])
        return "!200 with another body", ""
    return judge_stream(answer, v1)


def judge_stream(answer: Answer, v1: bool) -> tuple[str, str]:
    text, kind, done, finish = "", "", False, None
    events = answer.body.split(b"\n\n")
    for event in events[:-1] if answer.complete else events:
        if not event.startswith(b"data: "):
            if event.startswith(b":") or not event:
                continue
            return ("!cut in silence" if event is events[-1] else "!an event that is none"), ""
        if event == b"data: [DONE]":
            done = True
            continue
        try:
            body = json.loads(event[6:])
            if done:
                return "!something after [DONE]", ""
            if v1 and "error" in body:
                kind = kind_of(body["error"]["code"])
            elif v1:
                for choice in body["choices"]:
                    text, finish = text + (choice["delta"].get("content") or ""), choice["finish_reason"] or finish
            elif body["code"] != 200:
                kind = body["msg"].partition(":")[0]
            else:
                text, finish = text + body["data"].get("delta", ""), body["data"].get("finish_reason") or finish
        except (ValueError, KeyError, TypeError, AttributeError):
            return ("!cut in silence" if event is events[-1] else "!an event that cannot be read"), ""
    if kind:
        return (
            ("!an error, and [DONE]", "") if done else (kind, text) if kind in KINDS else (f"!unknown kind {kind}", "")
        )
    if not answer.complete or not done or finish is None:
        return "!cut in silence", ""
    return "good", text


def kind_of(code: str) -> str:
    """The kind that a code on /v1 stands for."""
    return next((kind for kind, error in KINDS.items() if error.openai_code == code), code)


def wrong_error(body: Any, v1: bool, kind: str, status: int) -> str:
    """What is wrong with an error's body, or nothing. Errors of HTTP itself (400 of the parser) are judged by the
    caller."""
    if kind not in KINDS:
        return f"!{status} without a known kind ({kind})"
    error = KINDS[kind]
    if isinstance(body, dict) and "type" in body:  # Anthropic's
        inner = body.get("error")
        good = list(body) == ["type", "error", "request_id"] and body["type"] == "error" and is_uuid(body["request_id"])
        good = good and isinstance(inner, dict) and set(inner) == {"type", "message"} and v1
        good = good and status in (error.v1[0], error.http)
    elif v1:
        inner = body.get("error") if isinstance(body, dict) else None
        good = (
            isinstance(inner, dict)
            and set(inner) == {"message", "type", "param", "code"}
            and inner["code"] == (error.openai_code or kind)
            and status in (error.v1[0], error.http)
        )
    else:
        good = isinstance(body, dict) and list(body) == ["request_id", "code", "msg", "data"] and body["data"] is None
        good = (
            good
            and body["msg"].startswith(f"{kind}: ")
            and body["code"] == error.code
            and status == (error.http or error.code)
            and is_uuid(body["request_id"])
        )
    return "" if good else f"!{status} {kind} outside the envelope"


def is_uuid(text: Any) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except (ValueError, TypeError, AttributeError):
        return False


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def first_half(reply: Reply, **changes: Any) -> Reply:
    """Half of what the engine would say, ended in another way."""
    pieces = list(reply.pieces)
    kept = pieces[: max(1, len(pieces) // 2)] if len(pieces) > 1 else [pieces[0][: len(pieces[0]) // 2]]
    return dataclasses.replace(reply, pieces=kept, **changes)


def chunks_of(items: list[T], size: int) -> Iterator[list[T]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]
