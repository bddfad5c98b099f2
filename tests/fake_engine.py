"""The stand-in engine: a scripted Ollama, vLLM, SGLang or llama.cpp on real sockets, in a thread.

    with FakeEngine("vllm") as engine:
        engine.replay("chat_stream")                            # next generation: that transcript in tests/wire/vllm/
        engine.script(Reply(pieces=[b"data: {"], end="reset"))  # the one after it; all others get default answers,
        engine.wait(lambda: engine.live == 0)                   # which are recorded ones with other words in them

Once a client disconnects it does what real engines do: streams stop, and so do complete answers of Ollama and vLLM;
llama.cpp and SGLang finish a complete (not streamed) answer that nobody will read, and `live` counts it until then.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

Dialect = Literal["ollama", "vllm", "sglang", "llamacpp"]
Json = dict[str, Any]
Call = tuple[str, Json]
DIALECTS: tuple[Dialect, ...] = ("ollama", "vllm", "sglang", "llamacpp")
OPENAI_DIALECTS: tuple[Dialect, ...] = ("vllm", "sglang", "llamacpp")
CHAT: dict[Dialect, str] = {"ollama": "/api/chat"} | dict.fromkeys(OPENAI_DIALECTS, "/v1/chat/completions")
NOT_GENERATIONS = (
    "/api/show",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/rerank",
)  # POST routes that make no text
WIRE = Path(__file__).parent / "wire"
#: `flags` of an SGLang that was started with everything
SGLANG_FLAGS: Json = {"tool_call_parser": "qwen", "reasoning_parser": "qwen3", "enable_deterministic_inference": True}
TEXT = "北京是中国的首都，a city of hills 🚲."
VERSIONS: dict[Dialect, str] = {"ollama": "0.33.0", "vllm": "0.32.0", "sglang": "0.5.21", "llamacpp": "b6714-d2ee056e"}
RECORDED: dict[Dialect, dict[str, str]] = {  # stream headers, unknown path, unreadable body, no key
    "ollama": {"stream": "06_chat_stream", "404": "unknown_path", "400": "malformed_json", "401": ""},
    "vllm": {"stream": "chat_stream", "404": "get_nope", "400": "err_malformed_json", "401": "key_none"},
    "sglang": {"stream": "chat_stream", "404": "get_nope", "400": "err_malformed_json", "401": "key_none"},
    "llamacpp": {
        "stream": "chat_stream",
        "404": "post_nope",
        "400": "malformed",
        "401": "keyed_nokey_post_v1_chat_completions",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The reply to one request. `status=0` sends the pieces without a head (garbage; if there are none, nothing)."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes] = ()
    end: Literal["clean", "reset", "eof", "stall"] = "clean"
    gap: float = 0.0  # seconds between two pieces
    delay: float = 0.0  # seconds before the head
    chunked: bool | None = (
        None  # None: unless it is one piece that ends cleanly; False without a length: until the close
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request as it arrived; header names are lower case, `path` keeps its query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@functools.cache
def recorded(dialect: Dialect, name: str) -> Reply:
    """The answer of tests/wire/<dialect>/<name>.json (`name` may omit a leading `06_` or `plain_`), in pieces as they
    arrived when it was recorded."""
    near = [p for p in (WIRE / dialect).glob("*.json") if name in (p.stem, re.sub(r"^(\d\d|plain)_", "", p.stem))]
    if len(near) != 1:
        raise LookupError(f"{len(near)} recordings of {dialect} are called {name!r}")
    full: Json = json.loads(near[0].read_bytes())
    answer: Json = full.get("response") or full
    if "raw_head" in answer:  # vLLM's engine killed in mid-stream
        head, _, start = answer["raw_head"].partition("\r\n\r\n")
        parts = (start, answer["raw_response_after_kill"])  # the first was recorded up to the middle of an event
        events = [event for part in parts for event in re.findall(r"data: .*?\n\n", part, re.DOTALL)]
        answer = {
            "status": 200,
            "headers": [line.split(": ", 1) for line in head.split("\r\n")[1:]],
            "body": "".join(events),
        }
    elif "examples" in answer:  # many requests at once: the one that was refused
        answer = next(example for status, example in answer["examples"].items() if status != "200")
    headers = {name.lower(): value for name, value in answer.get("headers", [])}
    was_chunked = "transfer-encoding" in headers
    asked_to_close = "close" in str(full.get("request", {}).get("headers"))
    for framing in (
        "date",
        "content-length",
        "transfer-encoding",
        "keep-alive",
        *(["connection"] if asked_to_close else []),
    ):
        headers.pop(framing, None)
    if "exception" in answer:  # the server died: no answer, or a head and nothing more
        return Reply(status=answer.get("status", 0), headers=headers, end="eof")
    body = answer.get("body_text", answer.get("body"))
    text = body if isinstance(body, str) else dumps(body).decode()  # bodies that were JSON were recorded parsed
    chunks = answer.get("chunks")
    pieces = [chunk["data"] for chunk in chunks] if isinstance(chunks, list) else [text]
    if was_chunked and not isinstance(chunks, list):
        pieces = re.findall(r".+?(?:\n\n|\Z)", text, re.DOTALL)
    return Reply(
        status=answer["status"],
        headers=headers,
        pieces=[piece.encode() for piece in pieces],
        chunked=was_chunked,
        end="clean" if answer.get("terminating_zero_chunk", True) else "eof",
    )


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def split(text: str) -> list[str]:
    """The tokens of a text here: words, and groups of up to four Chinese characters. Joined, they are the text."""
    return re.findall(r"\s*(?:[\u3000-\u9fff\uff00-\uffef]{1,4}|[^\s\u3000-\u9fff\uff00-\uffef]+)|\s+", text)


def tagged(name: str) -> str:
    return name.lower() if ":" in name else f"{name.lower()}:latest"


class Reader(asyncio.StreamReader):
    """Cancels the work for a client that has disconnected; a half-closed connection counts too, as in real engines."""

    task: asyncio.Task[Any] | None = None

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.task:
            self.task.cancel()

    def set_exception(self, exc: Exception) -> None:
        self.feed_eof()


@dataclass(frozen=True, slots=True)
class Said:
    reasoning: list[str]
    pieces: list[str]
    call: Call | None
    cut: bool
    asked: int  # prompt tokens
    tokens: int


def _has_results(messages: list[Json]) -> bool:
    """Whether a tool has answered since the last assistant message. A user message with its images may follow."""
    for message in reversed(messages):
        if message["role"] in ("tool", "assistant"):
            return bool(message["role"] == "tool")
    return False


class FakeEngine:
    def __init__(
        self, dialect: Dialect, *, version: str | None = None, model: str = "m", uds: str | None = None
    ) -> None:
        self.dialect: Dialect = dialect
        self.version = version or VERSIONS[dialect]
        self.model = model
        self.models = [model]  # Ollama offers all of these, and a pull adds one
        self.uds, self.port = uds, 0  # the port is kept over stop() and start()
        self.base_url = "http://localhost" if uds else ""
        self.api_key: str | None = None  # asked for where the real engine asks for it
        self.capabilities = ["completion", "tools"]
        self.details: Json = {}  #: that /api/show tells beside the recorded ones
        self.context = 8192
        self.text, self.answer, self.reasoning = TEXT, None, ""  # type: str, Callable[[Json], str] | None, str
        self.tool_call: Call | None = None
        self.flags: Json = {  # what SGLang was started with, as /server_info shows it
            "tool_call_parser": "qwen",
            "reasoning_parser": None,
            "enable_deterministic_inference": False,
        }
        self.pace = 0.0  # seconds between two pieces of a default generation; a complete answer waits for all of them
        self.slice = 0  # when set, no write has more bytes of body than this: events and characters arrive in parts
        self.requests: list[Seen] = []
        self.live = self.begun = self.finished = self.cut = self.connections = 0
        self._queue: list[tuple[str | None, Reply]] = []
        self._unread: set[asyncio.TimerHandle] = set()  # generations that go on after their client has hung up
        self._faults: list[Exception] = []
        self._changed = threading.Condition()
        self._serial = itertools.count(1)
        self._thread: threading.Thread | None = None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stop()
        if kind is None and self._faults:
            raise self._faults[0]

    def start(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(ready)), name=f"fake-{self.dialect}", daemon=True
        )
        self._thread.start()
        assert ready.wait(10), "the fake engine did not start"
        return self

    __enter__ = start

    def stop(self) -> None:
        """Close the port and every connection, as a killed engine does. It may be started again, on the same port."""
        if self._thread:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(10)
            self._thread = None
            self._unread.clear()
            self._count(cut=self.live, live=-self.live)

    def reset(self) -> Self:
        """Restore the initial state for the next test: default answers, no requests, nothing running."""
        self._loop.call_soon_threadsafe(self._drop_unread)
        self.wait(lambda: self.live == 0)
        self.text, self.answer, self.reasoning, self.tool_call, self.pace, self.slice = TEXT, None, "", None, 0.0, 0
        self.requests.clear()
        self._queue.clear()
        return self

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(Reader(), self._serve)

        if self.uds:
            server: asyncio.Server = await self._loop.create_unix_server(protocol, self.uds)
        else:
            server = await self._loop.create_server(protocol, "127.0.0.1", self.port, backlog=2048)
            self.port = server.sockets[0].getsockname()[1]
            self.base_url = f"http://127.0.0.1:{self.port}"
        ready.set()
        await self._stopped.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        if self.uds:
            Path(self.uds).unlink(missing_ok=True)

    def wait(self, predicate: Callable[[], bool], timeout: float = 5.0) -> None:
        """Wait until the predicate holds; it is evaluated when something changes here, and every 20 ms."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not predicate():
                if time.monotonic() > deadline:
                    counts = {name: getattr(self, name) for name in ("live", "begun", "finished", "cut", "connections")}
                    raise AssertionError(f"not within {timeout} s: {counts}, {len(self.requests)} requests")
                self._changed.wait(0.02)

    def replay(self, *names: str) -> None:
        """Answer the next generations (any POST but /api/show) with these recordings, in this order."""
        for name in names:
            self.script(recorded(self.dialect, name))

    def script(self, reply: Reply, path: str | None = None) -> None:
        """Answer the next generation with this; with `path`, the next request of any method to that path."""
        with self._changed:
            self._queue.append((path, self._named(reply)))

    def _named(self, reply: Reply) -> Reply:
        """A recording with this engine's model in it: llama.cpp names the model that really answered."""
        if self.dialect != "llamacpp" or reply.status != 200:
            return reply
        name = b'"model":"%s"' % self.model.encode()
        return replace(reply, pieces=[re.sub(rb'"model": ?"[^"]*"', name, piece) for piece in reply.pieces])

    def replay_chat(self, *names: str) -> None:
        """The same for the next chat calls only, so that no probe of the module uses up a recording."""
        for name in names:
            self.script_chat(recorded(self.dialect, name))

    def script_chat(self, reply: Reply) -> None:
        """Answer the next chat call with this."""
        self.script(reply, self.chat)

    def stream_reply(self) -> Reply:
        """A complete recorded stream."""
        return recorded(self.dialect, "06_chat_stream" if self.dialect == "ollama" else "chat_stream_usage")

    @property
    def chat(self) -> str:
        """The path of the dialect's chat route."""
        return CHAT[self.dialect]

    @property
    def asked(self) -> list[Seen]:
        """The requests for text, in their order (no embeddings, no probes of the module)."""
        routes = (self.chat, "/api/generate", "/v1/completions")
        return [seen for seen in list(self.requests) if seen.method == "POST" and seen.path in routes]

    @property
    def bodies(self) -> list[Json]:
        """The bodies of the requests for text."""
        return [seen.json for seen in self.asked]

    @property
    def body(self) -> Json:
        """The body of the last request for text."""
        return self.bodies[-1]

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, number in more.items():
                setattr(self, name, getattr(self, name) + number)
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, Reader)
        reader.task = asyncio.current_task()
        self._writers.add(writer)
        self._count(connections=1)
        again, live, ends = True, 0, 0.0
        try:
            while again and not reader.at_eof():
                seen = await self._read(reader)
                reply, live = self._reply(seen)
                ends = self._ends(reply, seen) if live else 0.0
                self._count(begun=live, live=live)
                again = await self._send(writer, reply, seen, functools.partial(self._count, finished=live, live=-live))
                live = 0
            writer.close()
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()  # the client is gone
            if live and ends > self._loop.time() and not self._stopped.is_set():
                self._finish_unread(ends)
                live = 0
        except Exception as exc:  # a mistake of the test or of this file: raised when the engine is left
            self._faults.append(exc)
            writer.transport.abort()
            raise
        finally:
            self._writers.discard(writer)
            self._count(connections=-1, cut=live, live=-live)

    def _ends(self, reply: Reply, seen: Seen) -> float:
        """Loop time when the generation ends if its client disconnects; 0 if that stops it (or its script stalls)."""
        if self.dialect in ("ollama", "vllm") or reply.end == "stall":
            return 0.0
        with contextlib.suppress(ValueError):
            if seen.json.get("stream"):
                return 0.0
        return self._loop.time() + reply.delay + reply.gap * (len(reply.pieces) - 1)

    def _finish_unread(self, ends: float) -> None:
        """Continue a generation that nobody reads, which keeps the engine busy until it ends."""

        def finish() -> None:
            self._unread.discard(timer)
            self._count(finished=1, live=-1)

        timer = self._loop.call_at(ends, finish)
        self._unread.add(timer)

    def _drop_unread(self) -> None:
        for timer in self._unread:
            timer.cancel()
        self._count(cut=len(self._unread), live=-len(self._unread))
        self._unread.clear()

    async def _read(self, reader: Reader) -> Seen:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        return Seen(method=method, path=path, headers=headers, body=body)

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply, seen: Seen, done: Callable[[], None]) -> bool:
        """Send the reply; returns whether the connection is reusable. `done` is called before the last byte is sent."""
        await asyncio.sleep(reply.delay)
        headers = {name.lower(): value for name, value in reply.headers.items()}
        chunked = reply.chunked
        if chunked is None:
            chunked = "content-length" not in headers and (len(reply.pieces) > 1 or reply.end != "clean")
        if chunked:
            headers["transfer-encoding"] = "chunked"
        elif reply.end == "clean":
            headers.setdefault("content-length", str(sum(map(len, reply.pieces))))
        if seen.headers.get("connection", "").lower() == "close" or not (chunked or "content-length" in headers):
            headers["connection"] = "close"
        phrase = next((each.phrase for each in http.HTTPStatus if each == reply.status), "")
        head = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        out = "\r\n".join(head).encode() if reply.status else b""
        chunked = chunked and reply.status > 0
        step = self.slice or 1 << 30
        parts = [(at, piece[at : at + step]) for piece in reply.pieces for at in range(0, len(piece), step)]
        for index, (at, part) in enumerate([] if seen.method == "HEAD" else parts):
            if index:
                writer.write(out)
                await asyncio.sleep(0 if at else reply.gap)
                await writer.drain()
                out = b""
            out += b"%x\r\n%b\r\n" % (len(part), part) if chunked else part
        if reply.end == "stall":
            writer.write(out)
            await asyncio.Event().wait()
        done()
        writer.write(out + (b"0\r\n\r\n" if chunked and reply.end == "clean" else b""))
        if reply.end == "reset":
            peer: socket.socket = writer.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        return reply.end == "clean" and reply.status > 0 and headers.get("connection", "").lower() != "close"

    # ----------------------------------------------------------------------------------- what a request gets

    def _reply(self, seen: Seen) -> tuple[Reply, int]:
        """The answer, and 1 if it is a generation, else 0."""
        path = seen.path.partition("?")[0]
        generates = int(seen.method == "POST" and path not in NOT_GENERATIONS)
        with self._changed:
            self.requests.append(seen)
            for index, (only, reply) in enumerate(self._queue):
                if only == path or (only is None and generates):
                    del self._queue[index]
                    return reply, generates
        guarded = {
            "vllm": path.startswith("/v1/"),
            "sglang": path not in ("/health", "/ready"),
            "llamacpp": path not in ("/health", "/v1/health"),
        }.get(self.dialect, False)
        scheme, _, key = seen.headers.get("authorization", "").partition(" ")
        if guarded and self.api_key and (scheme.lower(), key) != ("bearer", self.api_key):
            return self._recorded("401"), 0
        if seen.method in ("GET", "HEAD"):
            return self._info(path), 0
        routes: dict[str, Callable[[Json], Reply]] = {
            "/v1/chat/completions": functools.partial(self._openai, True),
            "/v1/completions": functools.partial(self._openai, False),
            "/v1/embeddings": self._embeddings,
        }
        routes |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize, "/v1/rerank": self._rerank}
        if self.dialect == "llamacpp":
            routes["/apply-template"] = self._apply_template
        if self.dialect == "ollama":
            routes = {
                "/api/show": self._show,
                "/api/embed": self._embed,
                "/api/pull": self._pull,
                "/api/chat": functools.partial(self._native, True),
                "/api/generate": functools.partial(self._native, False),
            }
        if path not in routes:
            return self._recorded("404"), 0
        try:
            ask: Json = seen.json
        except ValueError:
            return self._recorded("400"), 0
        name = ask.get("model") or ""
        if self.dialect == "ollama" and path != "/api/pull" and tagged(name) not in map(tagged, self.models):
            return self._json({"error": f"model '{name}' not found"}, 404), 0
        if self.dialect == "vllm" and name and name not in self.models:
            error = f"The model `{name}` does not exist. Valid aliases: {', '.join(self.models)}."
            return self._json(
                {"error": {"message": error, "type": "NotFoundError", "param": "model", "code": 404}}, 404
            ), 0
        reply = routes[path](ask)
        return reply, generates * (reply.status == 200)

    def _tokenize(self, ask: Json) -> Reply:
        """One token per byte. The template shows messages and tools, and enable_thinking if the model can think."""
        if self.dialect == "llamacpp":
            data = (ask.get("content") or "").encode()  # without one there are no tokens
            begin = [1] * bool(ask.get("add_special"))
            tokens: list[Any] = begin + list(data)
            if ask.get("with_pieces"):
                tokens = [{"id": token, "piece": chr(token) if token < 128 else [token]} for token in tokens]
            return self._json({"tokens": tokens})
        if "prompt" in ask:
            data = ask["prompt"].encode()
        else:
            shown = [ask.get("messages"), ask.get("tools"), ask.get("chat_template_kwargs") if self.reasoning else None]
            data = json.dumps(shown).encode()
        begin = [1] * ask.get("add_special_tokens", "prompt" in ask)
        tokens = begin + list(data)
        found: Json = {"tokens": tokens, "count": len(tokens), "max_model_len": self.context}
        if self.dialect == "vllm":
            found["token_strs"] = [chr(token) for token in tokens] if ask.get("return_token_strs") else None
        return self._json(found)

    def _detokenize(self, ask: Json) -> Reply:
        name = {"vllm": "prompt", "sglang": "text"}.get(self.dialect, "content")
        return self._json({name: "".join(map(chr, ask["tokens"]))})

    def _apply_template(self, ask: Json) -> Reply:
        return self._json({"prompt": json.dumps([ask["messages"], ask.get("tools")])})

    def _rerank(self, ask: Json) -> Reply:
        """The score is how often a document contains the query; order and field names are those of the real engines."""
        documents: list[str] = ask["documents"]
        scores = [document.count(ask["query"]) for document in documents]
        usage = {"prompt_tokens": 7, "total_tokens": 7}
        found: list[Json]
        if self.dialect == "sglang":
            found = [{"score": score, "document": documents[i], "index": i} for i, score in enumerate(scores)]
            return Reply(headers={"content-type": "application/json"}, pieces=[json.dumps(found).encode()])
        found = [{"index": i, "relevance_score": score} for i, score in enumerate(scores)]
        found.sort(key=lambda item: -item["relevance_score"])
        if self.dialect == "vllm":
            for item in found:
                item["document"] = {"text": documents[item["index"]], "multi_modal": None}
            return self._json({"id": "score-1", "model": self.model, "usage": usage, "results": found})
        return self._json({"model": self.model, "object": "list", "usage": usage, "results": found})

    def _recorded(self, what: str) -> Reply:
        return recorded(self.dialect, RECORDED[self.dialect].get(what, what))

    def _json(self, value: object, status: int = 200, wait: float = 0.0) -> Reply:
        kind = "application/json" if self.dialect in ("vllm", "sglang") else "application/json; charset=utf-8"
        return Reply(status=status, headers={"content-type": kind}, pieces=[dumps(value)], delay=wait)

    def _stream(self, pieces: list[bytes]) -> Reply:
        return Reply(headers=self._recorded("stream").headers, pieces=pieces, gap=self.pace, chunked=True)

    def _like(self, name: str, **changed: object) -> Json:
        body: Json = json.loads(self._recorded(name).pieces[0])
        return {**body, **changed}

    def _info(self, path: str) -> Reply:
        name, tools, sight = self.model, "tools" in self.capabilities, "vision" in self.capabilities
        match self.dialect, path:
            case "ollama", "/":
                return self._recorded("00_root_get")
            case ("ollama", "/api/version") | ("vllm", "/version"):
                return self._json({"version": self.version})
            case "ollama", "/api/tags":
                one = self._like("02_tags")["models"][0] | {"capabilities": self._able()}
                one["details"]["context_length"] = self.context
                return self._json(
                    {"models": [{**one, "name": each, "model": each} for each in map(tagged, self.models)]}
                )
            case "ollama", "/api/ps":
                one = self._like("04_ps_loaded")["models"][0] | {"context_length": self.context}
                return self._json({"models": [{**one, "name": tagged(name), "model": tagged(name)}]})
            case "ollama", "/v1/models":
                one = self._like("15_v1_models")["data"][0]
                return self._json({"object": "list", "data": [{**one, "id": tagged(each)} for each in self.models]})
            case ("vllm" | "sglang" | "llamacpp", "/health") | ("sglang", "/ready" | "/ping"):
                return self._recorded("get_health")
            case "vllm" | "sglang", "/v1/models":
                one = self._like("get_v1_models")["data"][0] | {"id": name, "max_model_len": self.context}
                return self._json({"object": "list", "data": [one]})
            case "sglang", "/model_info" | "/get_model_info":
                own = {
                    "served_model_name": name,
                    "tool_call_parser": "qwen" if tools else None,
                    "has_image_understanding": sight,
                }
                return self._json(self._like("get_model_info", **own))
            case "sglang", "/server_info" | "/get_server_info":  # a few of the real one's 528 fields
                flags = dict(self.flags)
                if "tool_call_parser" in flags and not tools:
                    flags["tool_call_parser"] = None
                return self._json(
                    {
                        "served_model_name": name,
                        "is_embedding": False,
                        "status": "ready",
                        "version": self.version,
                        "max_req_input_len": self.context - 6,
                        **flags,
                    }
                )
            case "llamacpp", "/v1/models":
                body = self._like("get_v1_models")
                body["models"][0] |= {"name": name, "model": name}
                body["data"][0] |= {
                    "id": name,
                    "aliases": [name],
                    "meta": {**body["data"][0]["meta"], "n_ctx": self.context},
                }
                return self._json(body)
            case "llamacpp", "/props":
                body = self._like("tooltpl_props" if tools else "get_props", build_info=self.version, model_alias=name)
                body["default_generation_settings"]["n_ctx"], body["modalities"]["vision"] = self.context, sight
                return self._json(body)
        return self._recorded("404")

    def _say(self, ask: Json, limit: int) -> Said:
        prompt = ask.get("messages", ask.get("prompt"))
        thinks = (
            ask.get("think") is not False
            and (ask.get("chat_template_kwargs") or {}).get("enable_thinking") is not False
        )
        call, reasoning = self._call(ask), split(self.reasoning) if thinks else []
        pieces = [] if call else split(self.answer(ask) if self.answer else self.text)
        if cut := 0 < limit < len(reasoning) + len(pieces):
            reasoning, pieces = reasoning[:limit], pieces[: max(0, limit - len(reasoning))]
        tokens = len(reasoning) + len(pieces) + (8 if call else 0)
        return Said(reasoning, pieces, call, cut, len(split(json.dumps(prompt))), tokens)

    def _call(self, ask: Json) -> Call | None:
        tools = {tool["function"]["name"]: tool["function"] for tool in ask.get("tools") or []}
        choice = ask.get("tool_choice")
        forced = choice == "required" or isinstance(choice, dict)
        if (
            not tools
            or choice == "none"
            or not (forced or self.tool_call)
            or (not forced and _has_results(ask["messages"]))
        ):
            return None
        name = choice["function"]["name"] if isinstance(choice, dict) else next(iter(tools))
        samples = {"number": 1.5, "integer": 7, "boolean": True, "array": [], "object": {}}
        wanted = tools[name].get("parameters", {}).get("properties", {})
        return self.tool_call or (
            name,
            {key: samples.get(str(shape.get("type")), "Paris") for key, shape in wanted.items()},
        )

    def _vectors(self, ask: Json) -> tuple[list[list[float]], int]:
        texts = [ask["input"]] if isinstance(ask["input"], str) else ask["input"]
        size = ask.get("dimensions") or 8
        return [[(len(str(text)) + i) / 100 for i in range(size)] for text in texts], sum(
            len(split(str(text))) for text in texts
        )

    # ------------------------------------------------------------------------------------------ Ollama's own

    def _able(self) -> list[str]:
        return self.capabilities + (["thinking"] if self.reasoning and "thinking" not in self.capabilities else [])

    def _show(self, ask: Json) -> Reply:
        info = {
            "general.architecture": "llama",
            "general.parameter_count": 134515008,
            "llama.context_length": self.context,
        }
        return self._json(
            {
                "modelfile": "",
                "parameters": "",
                "template": "",
                "details": self._like("02_tags")["models"][0]["details"] | self.details,
                "model_info": info,
                "tensors": [],
                "capabilities": self._able(),
                "modified_at": "2026-11-22T11:14:18Z",
            }
        )

    def _native(self, chat: bool, ask: Json) -> Reply:
        name = ask["model"]
        for wanted, able, says in (
            ("tools", "tools", f"registry.example/library/{name} does not support tools"),
            ("think", "thinking", f'"{name}" does not support thinking'),
        ):
            if ask.get(wanted) and able not in self._able():
                return self._json({"error": says}, 400)
        said = self._say(ask, (ask.get("options") or {}).get("num_predict") or 0)
        *_, last = map(json.loads, recorded("ollama", "06_chat_stream" if chat else "05_generate_stream").pieces)
        last.update(prompt_eval_count=said.asked, eval_count=said.tokens, done_reason="length" if said.cut else "stop")

        def line(content: str = "", thinking: str = "", call: Call | None = None, end: Json | None = None) -> Json:
            words: Json = {"role": "assistant", "content": content} if chat else {"response": content}
            words |= {"thinking": thinking} if thinking else {}
            if call:
                function = {"index": 0, "name": call[0], "arguments": call[1]}
                words["tool_calls"] = [{"id": f"call_{next(self._serial):08x}", "function": function}]
            return {
                **(end or {"done": False}),
                "model": name,
                "created_at": last["created_at"],
                **({"message": words} if chat else words),
            }

        if ask.get("stream") is False:
            body = line("".join(said.pieces), "".join(said.reasoning), said.call, last)
            return self._json(body, wait=self.pace * said.tokens)
        lines = [line(thinking=text) for text in said.reasoning] + [line(text) for text in said.pieces]
        lines += [line(call=said.call)] if said.call else []
        return self._stream([dumps(each) + b"\n" for each in (*lines, line(end=last))])

    def _embed(self, ask: Json) -> Reply:
        vectors, tokens = self._vectors(ask)
        body = self._like("13_embed_ok_list", model=ask["model"], embeddings=vectors, prompt_eval_count=tokens)
        return self._json(body, wait=self.pace)

    def _pull(self, ask: Json) -> Reply:
        self.models.append(ask.get("model") or ask["name"])
        layer = {"status": "pulling 941f309b54ca", "digest": f"sha256:941f309b54ca{'0' * 52}", "total": 98362744}
        steps = [
            {"status": "pulling manifest"},
            layer,
            *({**layer, "completed": 24590686 * part} for part in (1, 2, 3, 4)),
            {"status": "verifying sha256 digest"},
            {"status": "writing manifest"},
            {"status": "success"},
        ]
        return (
            self._json(steps[-1])
            if ask.get("stream") is False
            else self._stream([dumps(step) + b"\n" for step in steps])
        )

    # ----------------------------------------------------------------------- OpenAI's, as the three speak it

    def _openai(self, chat: bool, ask: Json) -> Reply:
        llama, vllm = self.dialect == "llamacpp", self.dialect == "vllm"
        said = self._say(ask, ask.get("max_completion_tokens") or ask.get("max_tokens") or 0)
        finish = "length" if said.cut else "stop"
        if said.call and not (vllm and isinstance(ask.get("tool_choice"), dict)):  # vLLM: a named tool just stops
            finish = "tool_calls"
        prefix = {"sglang": "", "llamacpp": "chatcmpl-"}.get(self.dialect, "chatcmpl-" if chat else "cmpl-")
        stamp = {
            "id": f"{prefix}{next(self._serial):016x}",
            "created": int(time.time()),
            "model": self.model if llama else ask.get("model") or self.model,
        }
        body = self._like(
            ("post_v1_" if llama else "")
            + ("chat" if chat and not llama else "chat_completions" if chat else "completions")
        )
        counts = {
            "prompt_tokens": said.asked,
            "completion_tokens": said.tokens,
            "total_tokens": said.asked + said.tokens,
        }
        counts |= {"reasoning_tokens": len(said.reasoning)} if self.dialect == "sglang" else {}
        body["usage"] |= counts
        if ask.get("stream"):
            return self._events(chat, ask, said, finish, stamp, body)
        choice = body["choices"][0]
        if chat:
            words = choice["message"]
            words["content"] = None if said.call and llama else "".join(said.pieces)
            words |= {"reasoning" if vllm else "reasoning_content": "".join(said.reasoning)} if said.reasoning else {}
            if said.call:
                tool = self._tool(said.call[0], dumps(said.call[1]).decode())
                words["tool_calls"] = [
                    tool if self.dialect == "sglang" else {key: tool[key] for key in tool if key != "index"}
                ]
        else:
            choice["text"] = "".join(said.pieces)
        choice |= {"finish_reason": finish} | (
            {"matched_stop": None if finish == "length" else 2} if "matched_stop" in choice else {}
        )
        return self._json({**body, **stamp}, wait=self.pace * said.tokens)

    def _tool(self, name: str, arguments: str) -> Json:
        own = {"vllm": "chatcmpl-tool-", "sglang": "call_"}.get(self.dialect, "")
        return {
            "id": f"{own}{next(self._serial):016x}",
            "index": 0,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _tool_deltas(self, call: Call) -> list[Json]:
        text, first = json.dumps(call[1], ensure_ascii=False), self._tool(call[0], "")
        later: list[Json] = [
            {"index": 0, "function": {"arguments": text[at : at + 5]}} for at in range(0, len(text), 5)
        ]
        if self.dialect == "sglang":
            later = [
                {"id": None, "type": "function", **each, "function": {"name": None, **each["function"]}}
                for each in later
            ]
        if self.dialect == "vllm":
            del first["function"]["arguments"]
        around = {
            "sglang": {"role": None, "content": None, "reasoning_content": None},
            "vllm": {"content": None},
            "llamacpp": {},
        }
        return [{**around[self.dialect], "tool_calls": [each]} for each in (first, *later)]

    def _events(self, chat: bool, ask: Json, said: Said, finish: str, stamp: Json, full: Json) -> Reply:
        """Recorded chunks with other words: a head (chat), one chunk per piece, the finish, and the usage if it was
        requested."""
        sglang = self.dialect == "sglang"
        usage_asked = bool((ask.get("stream_options") or {}).get("include_usage"))
        if chat or self.dialect != "llamacpp":
            name = "chat_stream_usage" if chat else "completions_stream_usage" if sglang else "completions_stream"
            *events, tail = [json.loads(piece[6:]) for piece in self._recorded(name).pieces if b"[DONE]" not in piece]
            head, middle, last = events[0], events[1], events[-1]
        # llama.cpp's completions stream was not recorded: its complete answer, with the counts on the last chunk
        else:
            middle, last, tail, usage_asked = (
                {key: full[key] for key in full.keys() - {"usage", "timings"}},
                full,
                {},
                False,
            )
        if not usage_asked:  # what rides on the usage chunk then rides on the finish
            last |= {key: tail[key] for key in ("system_fingerprint", "timings") if key in tail}

        def chunk(base: Json, words: Json, reason: str | None = None) -> Json:
            (choice,) = base["choices"]
            own = {"matched_stop": 2 if reason == "stop" else None} if sglang else {}
            return {**base, **stamp, "choices": [{**choice, **own, **words, "finish_reason": reason}]}

        think = "reasoning" if self.dialect == "vllm" else "reasoning_content"
        blank = {"reasoning_content": None} if sglang else {}
        parts: list[Json] = [{"delta": {think: text}} for text in said.reasoning] if chat else []
        parts += [{"delta": {**blank, "content": text}} if chat else {"text": text} for text in said.pieces]
        parts += [{"delta": delta} for delta in self._tool_deltas(said.call)] if said.call else []
        closing: Json = {"delta": {} if said.call else last["choices"][0]["delta"]} if chat else {"text": ""}
        if finish == "length" and (self.dialect == "vllm" or (sglang and not chat)):
            closing = parts.pop()  # there the last piece carries the reason
        chunks = [chunk(head, {})] if chat else []
        chunks += [*(chunk(middle, words) for words in parts), chunk(last, closing, finish)]
        if usage_asked:
            chunks.append(
                {**tail, **stamp, "usage": tail["usage"] | {key: full["usage"][key] for key in tail["usage"]}}
            )
        return self._stream([b"data: " + dumps(each) + b"\n\n" for each in chunks] + [b"data: [DONE]\n\n"])

    def _embeddings(self, ask: Json) -> Reply:
        vectors, tokens = self._vectors(ask)
        packed = [base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in vectors]
        shown = packed if ask.get("encoding_format") == "base64" else vectors
        data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(shown)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens} | (
            {} if self.dialect == "llamacpp" else {"completion_tokens": 0}
        )
        return self._json(
            {"object": "list", "model": ask.get("model") or self.model, "data": data, "usage": usage}, wait=self.pace
        )
