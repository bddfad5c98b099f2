"""A stand-in for an engine and its busy HTTP server, for measuring without a GPU what a server in front costs.

    python tests/gpu/steps.py --port 9300 --step 0.0085 --token-cost 120
    python llm_inference.py --serve --engine vllm --base-url http://127.0.0.1:9300 --port 9301 \\
        --host 127.0.0.1 --no-auth
    python tests/gpu/load.py --url http://127.0.0.1:9301 --model m --streams 64 --processes 1

A thread is the engine: at each step every running answer gets a token; new ones come in between two steps and make the
next one longer. The event loop is its server: a token costs it `--token-cost` µs, a request eight turns of the loop,
and tokens that pile up go out as one, as with vLLM's. Speaks vLLM's dialect, streams only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import threading
import time
from typing import Any

CHUNK: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 8192}]}
INFO: dict[str, Any] = {"/v1/models": MODELS, "/version": {"version": "0.26.0"}}
TURNS, TURN_COST = 8, 150e-6  # a request's way through the server: parsed, rendered, tokenized, sent to the engine
PREFILL, PREFILL_EACH = 3e-3, 0.5e-3  # seconds that new requests add to a step


def event(**fields: Any) -> bytes:
    """An event of a stream, as a chunk of HTTP/1.1."""
    data = b"data: " + json.dumps(CHUNK | fields).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = event(choices=[{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])
LAST = event(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": "length"}])
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def work(seconds: float) -> None:
    """CPU that is really used."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Answer:
    """A running answer; `left` is the engine's, `tokens` arrive in the server's loop as what is left after each."""

    def __init__(self, length: int) -> None:
        self.length = self.left = length
        self.tokens: asyncio.Queue[int] = asyncio.Queue()


class Engine:
    def __init__(self, step: float, loop: asyncio.AbstractEventLoop) -> None:
        self.step, self.loop = step, loop
        self.lock, self.new = threading.Lock(), list[Answer]()
        threading.Thread(target=self.run, daemon=True).start()

    def add(self, answer: Answer) -> None:
        with self.lock:
            self.new.append(answer)

    def run(self) -> None:
        running: list[Answer] = []
        while True:
            with self.lock:
                new, self.new = self.new, []
            running += new
            time.sleep(self.step + (PREFILL + PREFILL_EACH * len(new) if new else 0.0) if running else 0.001)
            for answer in running:
                answer.left -= 1
            self.loop.call_soon_threadsafe(self.deliver, [(answer, answer.left) for answer in running])
            running = [answer for answer in running if answer.left]

    @staticmethod
    def deliver(tokens: list[tuple[Answer, int]]) -> None:
        for answer, left in tokens:
            answer.tokens.put_nowait(left)


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, engine: Engine, token_cost: float) -> None:
        self.engine, self.token_cost, self.buffer = engine, token_cost, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not found or len(body) < (size := int(length[1]) if length else 0):
            return
        self.buffer = body[size:]
        path = head.split()[1].decode()
        if path == "/v1/chat/completions":
            self.task = asyncio.ensure_future(self.answer(json.loads(body[:size])["max_tokens"]))
            return
        said = json.dumps(INFO.get(path, {})).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said)
        )

    async def answer(self, length: int) -> None:
        for _ in range(TURNS):
            work(TURN_COST)
            await asyncio.sleep(0)
        answer = Answer(length)
        self.engine.add(answer)
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        left = length
        while left:
            left = await answer.tokens.get()
            while not answer.tokens.empty():
                left = answer.tokens.get_nowait()
            work(self.token_cost)
            if left:
                self.transport.write(TOKEN)
        usage = {"prompt_tokens": 9, "completion_tokens": length, "total_tokens": 9 + length}
        self.transport.write(TOKEN + LAST + event(choices=[], usage=usage) + DONE)


async def serve(port: int, step: float, token_cost: float) -> None:
    loop = asyncio.get_running_loop()
    engine = Engine(step, loop)
    server = await loop.create_server(lambda: Connection(engine, token_cost), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step", type=float, default=0.01, help="seconds")
    parser.add_argument("--token-cost", type=float, default=0.0, help="µs of the server's CPU")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.step, args.token_cost * 1e-6))


if __name__ == "__main__":
    main()
