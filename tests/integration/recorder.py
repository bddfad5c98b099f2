"""What a client really sends, and what it is answered: an ASGI layer around the server under test."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """One request, and its answer."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0
    answer: bytes = b""
    answer_headers: dict[str, str] = field(default_factory=dict)

    @property
    def route(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


class Recorder:
    """Wraps an app and keeps every exchange, except for questions about its health."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.seen: list[Exchange] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in ("/ready", "/health"):
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope["method"], scope["path"], scope["query_string"].decode(), _read(scope["headers"]))
        self.seen.append(exchange)

        async def heard() -> Any:
            message = await receive()
            exchange.body += message.get("body", b"")
            return message

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.answer_headers = _read(message["headers"])
            exchange.answer += message.get("body", b"")
            await send(message)

        await self.app(scope, heard, sent)

    def at(self, route: str) -> list[Exchange]:
        return [each for each in self.seen if each.route == route]

    def failures(self) -> list[str]:
        """Requests without a good answer, with what was answered."""
        bad = [each for each in self.seen if not 200 <= each.status < 300]
        return [f"{each.route} {each.status}: {each.answer[:300]!r}" for each in bad]


def _read(headers: Any) -> dict[str, str]:
    return {name.decode().lower(): value.decode("latin-1") for name, value in headers}
