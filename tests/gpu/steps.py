"""A stand-in engine that steps as a GPU does: every `--step` seconds each running stream gets one token, all at one go.

    python tests/gpu/steps.py --port 9300 --step 0.025
    python llm_inference.py --serve --engine vllm --base-url http://127.0.0.1:9300 --host 127.0.0.1 --port 9301 --no-auth
    python tests/gpu/load.py --url http://127.0.0.1:9301 --model m --streams 256 --processes 1

No GPU is needed to see what our server adds to the first token, and what it takes from the tokens/s. Speaks vLLM's dialect, streams only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from typing import Any

CHUNK: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 8192}]}
INFO: dict[str, Any] = {"/v1/models": MODELS, "/version": {"version": "0.26.0"}}


def event(**fields: Any) -> bytes:
    """An event of a stream, as a chunk of HTTP/1.1."""
    data = b"data: " + json.dumps(CHUNK | fields).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = event(choices=[{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])
LAST = event(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": "length"}])
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One keep-alive connection; it is in `running` while it streams."""

    running: set[Connection] = set()  # noqa: RUF012

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer, self.tokens, self.left = transport, b"", 0, 0

    def connection_lost(self, exc: Exception | None) -> None:
        self.running.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not found or len(body) < (size := int(length[1]) if length else 0):
            return
        self.buffer = body[size:]
        path = head.split()[1].decode()
        if path != "/v1/chat/completions":
            said = json.dumps(INFO.get(path, {})).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said))
            return
        self.tokens = self.left = json.loads(body[:size])["max_tokens"]
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self.running.add(self)

    def step(self) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(TOKEN)
            return
        usage = {"prompt_tokens": 9, "completion_tokens": self.tokens, "total_tokens": 9 + self.tokens}
        self.transport.write(TOKEN + LAST + event(choices=[], usage=usage) + DONE)
        self.running.discard(self)


async def serve(port: int, step: float) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Connection, "127.0.0.1", port)
    at = loop.time()
    while True:
        at = max(at + step, loop.time() - step)  # late by more than a step: the time is lost, as on a GPU
        await asyncio.sleep(max(0.0, at - loop.time()))
        for connection in list(Connection.running):
            connection.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step", type=float, default=0.01)
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.step))


if __name__ == "__main__":
    main()
