"""A very fast stand-in engine, against which the cost of a layer in front of an engine is measured.

    python -m tests.bench.upstream --port 9100 [--tokens 128] [--pace 0.05]

Speaks vLLM's OpenAI API and Ollama's, complete and streamed, on a raw asyncio Protocol (uvloop where installed).
A stream is `--tokens` pieces, back to back (one write each), or `--pace` seconds apart; a paced piece carries the time
at which it was written (`@<monotonic seconds>`), so that a reader knows how long it travelled; `max_tokens` shortens a
paced stream. GET /stats counts. It is a load fixture, not a model.
"""

import argparse
import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any, ClassVar, cast

TEXT = "Paris is the capital of France, and it has been for a long time."
OPENAI: dict[str, Any] = {"id": "chatcmpl-5f0c6c1e9d0b4d0f8a7c", "created": 1700000000, "model": "m"}
OLLAMA: dict[str, Any] = {"model": "m", "created_at": "2026-01-01T00:00:00.000000000Z"}
COUNTS = {
    "total_duration": 10**6,
    "load_duration": 10**3,
    "prompt_eval_count": 12,
    "prompt_eval_duration": 10**4,
    "eval_duration": 10**6,
}
# a paced piece, until the time is known; the others are numbered, for LiteLLM refuses an answer that repeats itself
STAMP = "@00000000.000000"


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": 12 + tokens}


def full(path: str) -> bytes:
    """The answer to a whole call."""
    match path:
        case "/v1/chat/completions":
            choice: dict[str, Any] = {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT},
                "logprobs": None,
                "finish_reason": "stop",
            }
            answer = OPENAI | {"object": "chat.completion", "choices": [choice], "usage": usage(16)}
        case "/v1/completions":
            answer = OPENAI | {
                "object": "text_completion",
                "choices": [{"index": 0, "text": TEXT, "finish_reason": "stop"}],
                "usage": usage(16),
            }
        case "/api/chat":
            answer = (
                OLLAMA
                | COUNTS
                | {
                    "message": {"role": "assistant", "content": TEXT},
                    "done": True,
                    "done_reason": "stop",
                    "eval_count": 16,
                }
            )
        case _:
            answer = OLLAMA | COUNTS | {"response": TEXT, "done": True, "done_reason": "stop", "eval_count": 16}
    return json.dumps(answer, separators=(",", ":")).encode()


def piece(path: str, text: str, first: bool = False, finish: str | None = None, tokens: int = 0) -> bytes:
    """One piece of a stream, framed as an event or a line, and as a chunk of HTTP."""
    if path.startswith("/v1/"):
        role = {"role": "assistant"} if first else {}
        what = {"delta": role | {"content": text}} if "chat" in path else {"text": text}
        kind = "chat.completion.chunk" if "chat" in path else "text_completion"
        choice = {"index": 0, **what, "logprobs": None, "finish_reason": finish, "token_ids": None}
        event = (
            b"data: %s\n\n" % json.dumps(OPENAI | {"object": kind, "choices": [choice]}, separators=(",", ":")).encode()
        )
    else:
        line = (
            OLLAMA
            | ({"message": {"role": "assistant", "content": text}} if path == "/api/chat" else {"response": text})
            | {"done": finish is not None}
        )
        line |= {"done_reason": finish, **COUNTS, "eval_count": tokens} if finish else {}
        event = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    return chunk(event)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Stream:
    """The bytes of one kind of stream: `tokens` pieces, the last with its finish_reason; then usage, if asked, and the
    end."""

    def __init__(self, path: str, tokens: int, paced: bool) -> None:
        kind = b"text/event-stream; charset=utf-8" if path.startswith("/v1/") else b"application/x-ndjson"
        self.head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n" % kind
        texts = [STAMP if paced else f"@{n:08}.{n:06}" for n in range(tokens)]
        self.pieces = [piece(path, text, first=n == 0) for n, text in enumerate(texts[:-1])] + [
            piece(path, texts[-1], finish="stop", tokens=tokens)
        ]
        event = OPENAI | {
            "object": "chat.completion.chunk" if "chat" in path else "text_completion",
            "choices": [],
            "usage": usage(tokens),
        }
        self.usage = (
            chunk(b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode())
            if path.startswith("/v1/")
            else b""
        )
        self.end = (chunk(b"data: [DONE]\n\n") if path.startswith("/v1/") else b"") + b"0\r\n\r\n"


FACTS: dict[str, dict[str, Any]] = {
    "/health": {},
    "/version": {"version": "0.32.0"},
    "/v1/models": {
        "object": "list",
        "data": [{"id": "m", "object": "model", "created": 1700000000, "owned_by": "vllm", "max_model_len": 32768}],
    },
    "/api/version": {"version": "0.33.0"},
    "/api/tags": {
        "models": [{"name": "m", "model": "m", "size": 1, "digest": "0" * 64, "details": {"family": "llama"}}]
    },
    "/api/ps": {"models": [{"name": "m", "model": "m", "size": 1, "digest": "0" * 64, "context_length": 32768}]},
    "/api/show": {
        "capabilities": ["completion"],
        "details": {"family": "llama"},
        "model_info": {"llama.context_length": 32768},
    },
}
GENERATIONS = ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate")


class Engine(asyncio.Protocol):
    """One connection of a client."""

    tokens, pace = 128, 0.0
    stats: ClassVar[dict[str, int]] = dict.fromkeys(("begun", "finished", "cut", "open"), 0)
    wholes: ClassVar[dict[bytes, bytes]] = {}
    streams: ClassVar[dict[bytes, Stream]] = {}

    @classmethod
    def prepare(cls, tokens: int, pace: float) -> None:
        cls.tokens, cls.pace = tokens, pace
        for path in GENERATIONS:
            cls.wholes[path.encode()], cls.streams[path.encode()] = respond(full(path)), Stream(path, tokens, pace > 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer, self.paused = cast(asyncio.Transport, transport), b"", False
        self.rest: Iterator[bytes] | None = None  # of the stream that is being written
        self.timer: asyncio.TimerHandle | None = None
        self.stats["open"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.stats["open"] -= 1
        self.stats["cut"] += self.rest is not None
        self.rest = None
        if self.timer:
            self.timer.cancel()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.rest is not None and not self.pace:
            self.write_on()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            if not head.startswith((b"get ", b"post ", b"head ")):
                self.transport.close()  # an HTTP/2 preface, say
                return
            body, used = self.body(head, end + 4)
            if used < 0:
                return  # it has not all come yet
            self.buffer = self.buffer[used:]
            self.answer(head.split(b" ", 2)[1].partition(b"?")[0], body)

    def body(self, head: bytes, start: int) -> tuple[bytes, int]:
        """The request's body and where it ends; -1 while it is not there."""
        if (at := head.find(b"\r\ncontent-length:")) >= 0:
            end = start + int(head[at + 17 :].partition(b"\r\n")[0])
            return self.buffer[start:end], end if len(self.buffer) >= end else -1
        parts = []
        while b"\r\ntransfer-encoding:" in head:
            line = self.buffer.find(b"\r\n", start)
            size = int(self.buffer[start:line], 16) if line >= 0 else 0
            if line < 0 or len(self.buffer) < line + size + 4:
                return b"", -1
            parts.append(self.buffer[line + 2 : line + 2 + size])
            start = line + size + 4
            if not size:
                break
        return b"".join(parts), start

    def answer(self, path: bytes, body: bytes) -> None:
        if path not in self.wholes:
            name = path.decode()
            facts = self.stats if name == "/stats" else FACTS.get(name)
            self.transport.write(
                b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
                if facts is None
                else respond(json.dumps(facts).encode())
            )
            return
        self.stats["begun"] += 1
        flat = body.replace(b" ", b"")
        asked = b'"stream":true' in flat if path.startswith(b"/v1/") else b'"stream":false' not in flat
        if not asked:
            self.transport.write(self.wholes[path])
            self.stats["finished"] += 1
            return
        stream = self.streams[path]
        self.tail = (stream.usage if b'"include_usage":true' in flat else b"") + stream.end
        self.rest = iter(stream.pieces)
        self.transport.write(stream.head)
        if self.pace:
            if found := re.search(rb'"max_tokens":(\d+)', flat):
                self.rest = iter([*stream.pieces[: max(0, min(int(found[1]), self.tokens) - 1)], stream.pieces[-1]])
            self.due = time.monotonic() + self.pace
            self.timer = asyncio.get_running_loop().call_later(self.pace, self.write_one)
        else:
            self.write_on()

    def write_on(self) -> None:
        """Back to back, one write each, as fast as the reader takes them."""
        while not self.paused and self.rest is not None:
            if (data := next(self.rest, None)) is None:
                self.finish()
                return
            self.transport.write(data)

    def write_one(self) -> None:
        """A paced piece, stamped; the schedule is kept, so that a late piece makes no other one late."""
        if self.rest is None:
            return
        if (data := next(self.rest, None)) is None:
            self.finish()
            return
        now = time.monotonic()
        self.transport.write(data.replace(STAMP.encode(), b"@%015.6f" % now))
        self.due += self.pace
        self.timer = asyncio.get_running_loop().call_later(max(0.0, self.due - now), self.write_one)

    def finish(self) -> None:
        self.rest = None
        self.stats["finished"] += 1
        self.transport.write(self.tail)


def respond(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def serve(port: int, addresses: int) -> None:
    hosts = [f"127.0.0.{number}" for number in range(1, addresses + 1)]
    server = await asyncio.get_running_loop().create_server(Engine, hosts, port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two tokens (default: none)")
    parser.add_argument("--addresses", type=int, default=1, help="how many: 127.0.0.1, 127.0.0.2, …")
    args = parser.parse_args()
    Engine.prepare(args.tokens, args.pace)
    run: Any = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        run = uvloop.run
    with contextlib.suppress(KeyboardInterrupt):
        run(serve(args.port, args.addresses))


if __name__ == "__main__":
    main()
