"""Many paced streams at once, read with raw asyncio: how long each token took from the engine's write to our read.

    python load.py --url http://127.0.0.1:9400/v1/chat/completions --body JSON --streams 1000 --ramp 2 --tokens 200

A paced stand-in engine writes the time into each token; both clocks are the machine's monotonic one. Prints one line of
JSON.
"""

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

STAMP = re.compile(rb"@(\d{8}\.\d{6})")


class Reader(asyncio.Protocol):
    """One stream: its tokens' travel times, and whether it came to a clean end."""

    def __init__(self, request: bytes, tokens: int) -> None:
        self.request, self.tokens, self.tail = request, tokens, b""
        self.late: list[float] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # what went wrong; "" = nothing

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self.tail + data  # a stamp, or the end, may have come in two
        read = 0
        for match in STAMP.finditer(data):
            self.late.append(now - float(match[1]))
            read = match.end()
        self.tail = data[read:][-64:]
        refused = data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200")
        if (refused or data.endswith(b"0\r\n\r\n")) and not self.ended.done():
            clean = b"[DONE]" in data and len(self.late) == self.tokens
            self.ended.set_result("" if clean else f"{len(self.late)} tokens, then {data[:20]!r} … {data[-80:]!r}")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(f"{len(self.late)} tokens, then the connection ended: {exc!r}, {self.tail!r}")


async def read_all(args: argparse.Namespace) -> dict[str, Any]:
    where = urlsplit(args.url)
    body = args.body.encode()
    request = (
        f"POST {where.path} HTTP/1.1\r\nhost: {where.netloc}\r\nauthorization: Bearer {args.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()
    readers: list[Reader] = []
    errors: list[str] = []
    began = time.monotonic()

    async def one(number: int) -> str:
        await asyncio.sleep(args.ramp * number / args.streams)
        try:
            _, reader = await loop.create_connection(lambda: Reader(request, args.tokens), where.hostname, where.port)
        except OSError as exc:
            return f"no connection: {exc}"
        readers.append(reader)
        return await reader.ended

    async with asyncio.timeout(args.timeout):
        errors = [said for said in await asyncio.gather(*(one(n) for n in range(args.streams))) if said]
    late = sorted(1e3 * seconds for reader in readers for seconds in reader.late)
    cuts = statistics.quantiles(late, n=1000, method="inclusive") if len(late) > 1 else [0.0] * 999
    return {
        "streams": args.streams,
        "tokens": len(late),
        "errors": len(errors),
        "first_errors": errors[:3],
        "seconds": time.monotonic() - began,
        "p50_ms": cuts[499],
        "p99_ms": cuts[989],
        "p999_ms": cuts[998],
        "max_ms": late[-1] if late else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--body", required=True)
    parser.add_argument("--key", default="sk-bench")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--ramp", type=float, default=2.0, help="seconds over which the streams are begun")
    parser.add_argument("--tokens", type=int, required=True, help="how many a stream must have")
    parser.add_argument("--timeout", type=float, default=120.0)
    run: Any = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        run = uvloop.run
    print(json.dumps(run(read_all(parser.parse_args()))))


if __name__ == "__main__":
    main()
