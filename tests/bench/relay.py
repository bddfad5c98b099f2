"""The floor for Python: uvloop hands bytes from one socket to another, and nothing looks at them.

Each client's connection has one of its own to the engine. What a layer in Python costs beyond this is its own doing.
"""

import argparse
import asyncio
from functools import partial
from typing import Any

import uvloop


class Half(asyncio.Protocol):
    """One of the two connections; what comes on it goes out on the other."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: Half | None = None
        self.waiting: list[bytes] = []  #: what came before the other one was connected

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.other is not None:
            self.other.join(self)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.waiting.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def join(self, other: "Half") -> None:
        self.other = other
        for data in self.waiting:
            other.transport.write(data)
        self.waiting.clear()


class Client(Half):
    """A client's; connects to the engine."""

    def __init__(self, engine_port: int) -> None:
        super().__init__()
        self.engine_port = engine_port

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        engine = Half()
        engine.other = self
        loop = asyncio.get_running_loop()
        self.connecting = loop.create_task(loop.create_connection(lambda: engine, "127.0.0.1", self.engine_port))


async def serve(port: int, engine_port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Client, engine_port), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-port", type=int, required=True)
    args = parser.parse_args()
    uvloop.run(serve(args.port, args.engine_port))
