"""Requests through our server in one process: memory in place of the sockets to the client and to the engine.

What the kernel and other programs do is left out, and of many short rounds the least counts, so differences of a few
microseconds show on a busy machine too.
"""

import asyncio
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

import llm_inference as product

from .run import KEY, V1
from .upstream import full

TURNS = 6  #: of the event loop, until the engine answers: requests overlap
ANSWERS = {
    b" /v1/models ": b'{"object":"list","data":[{"id":"m","object":"model","owned_by":"vllm","max_model_len":4096}]}',
    b" /version ": b'{"version":"0.32.0"}',
    b" /v1/chat/completions ": full(V1),
}


class Memory(asyncio.Transport):
    """A connection whose other end is a function that gets what is written."""

    def __init__(self, written: Callable[[bytes], None]) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 8000)})
        self.write = written  # type: ignore[assignment,method-assign]

    def is_closing(self) -> bool:
        return False

    def nothing(self, *args: Any, **more: Any) -> None:
        """Flow control and the end mean nothing here."""

    close = abort = pause_reading = resume_reading = set_write_buffer_limits = nothing  # type: ignore[assignment]


async def connect(wire: Any, place: product.Place, seconds: float) -> Any:
    """In place of `Wire._connect`: an engine that answers after some turns of the loop."""
    link, prompts = product._Link(wire, place.origin), 0

    def later(answer: bytes, turns: int) -> None:
        if turns:
            wire.loop.call_soon(later, answer, turns - 1)
        else:
            link.data_received(answer)

    def written(request: bytes) -> None:
        nonlocal prompts
        prompts += 1
        body = json.dumps({"tokens": [prompts]}).encode()  # of two prompts never the same: its template knows tools
        for path, known in ANSWERS.items():
            if path in request[:60]:
                body = known
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        later(head.encode() + body, TURNS)

    link.connection_made(Memory(written))
    return link


class Client:
    """A connection to our server that asks again and again."""

    def __init__(self, config: uvicorn.Config, prompt: str) -> None:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 256}).encode()
        head = f"POST {V1} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.request, self.answer = head.encode() + body, b""
        self.protocol: Any = config.http_protocol_class(config, ServerState(), {})  # type: ignore[attr-defined]
        self.protocol.connection_made(Memory(self.written))

    async def ask(self) -> None:
        self.answer, self.done = b"", asyncio.get_running_loop().create_future()
        self.protocol.data_received(self.request)
        await self.done
        if b" 200 OK" not in self.answer[:20]:
            raise RuntimeError(self.answer)

    def written(self, data: bytes) -> None:
        self.answer += data
        if self.answer.endswith(b"}") and not self.done.done():
            self.done.set_result(None)


def clients(settings: product.Settings, prompts: list[str]) -> list[Client]:
    config = uvicorn.Config(
        product.create_app(settings), http=product.limited_protocol(settings), log_config=None, access_log=False,
        server_header=False, proxy_headers=False, lifespan="off")  # fmt: skip
    config.load()
    return [Client(config, prompt) for prompt in prompts]


async def least(servers: dict[Any, list[Client]], rounds: int = 60, each: int = 12) -> dict[Any, float]:
    """Microseconds of CPU a request for each server, in turn; all clients of one ask at once."""
    best = dict.fromkeys(servers, float("inf"))
    gc.collect()  # as in `run_server`: with the default thresholds the collector takes a quarter of the time
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)
    for number in range(-3, rounds):  # the first ones warm up
        for name, several in servers.items():
            began = time.process_time()
            for _ in range(each):
                await asyncio.gather(*[client.ask() for client in several])
            if number >= 0:
                best[name] = min(best[name], 1e6 * (time.process_time() - began) / each / len(several))
    return best
