"""A steady load, and the outcome of each request when something behind it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp

MESSAGES = [{"role": "user", "content": "Count from one to twenty, in words."}]
ROUTES = [
    ("/api/v1/llm/chat", False),
    ("/v1/chat/completions", True),
    ("/api/v1/llm/chat", True),
    ("/v1/chat/completions", False),
]  # path, streamed?


@dataclass(frozen=True, slots=True)
class Answer:
    began: float
    ended: float
    streamed: bool
    said: str  #: "ok", the kind of one of our errors, or what is none: "untyped …", "cut …", "silent end"


class Load:
    """`clients` at a time, each asking again as soon as it was answered: whole and streamed, on our routes and on
    OpenAI's, in turn."""

    def __init__(
        self, url: str, model: str, *, key: str = "", clients: int = 16, max_tokens: int = 64, pause: float = 0.0
    ) -> None:
        self.url, self.model, self.clients, self.max_tokens, self.pause = url, model, clients, max_tokens, pause
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.answers: list[Answer] = []
        self.stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing new is asked, and what was asked is waited for."""
        self.stopping = True
        self._thread.join(180)
        assert not self._thread.is_alive(), "a request hangs"

    async def _main(self) -> None:
        timeout = aiohttp.ClientTimeout(total=150)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=self.headers
        ) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self.clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        while not self.stopping:
            path, streamed = ROUTES[number % len(ROUTES)]
            body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": self.max_tokens, "stream": streamed}
            body |= {"model": self.model} if path.startswith("/v1") else {}
            began = time.monotonic()
            try:
                async with session.post(self.url + path, json=body) as reply:
                    said = verdict(reply.status, reply.headers.get("x-error-kind"), await reply.text(), streamed)
            except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                said = f"cut {type(exc).__name__}"
            self.answers.append(Answer(began, time.monotonic(), streamed, said))
            number += 1
            await asyncio.sleep(self.pause or (0.0 if said == "ok" else 0.05))


def verdict(status: int, kind: str | None, text: str, streamed: bool) -> str:
    if status != 200:
        return kind or f"untyped {status}"
    if not streamed:
        with contextlib.suppress(ValueError):
            body = json.loads(text)
            return "ok" if body.get("code") == 200 or body.get("choices") else "untyped 200"
        return "untyped 200"
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    if events and events[-1] == "[DONE]":
        return "ok" if '"finish_reason":"' in text or '"finish_reason": "' in text else "silent end"
    with contextlib.suppress(ValueError, IndexError):
        last = json.loads(events[-1])
        if "error" in last:
            return str(last["error"]["code"])
        if last.get("code", 200) != 200:
            return str(last["msg"].partition(":")[0])
    return "silent end"


def typed(said: str) -> bool:
    return not said.startswith(("ok", "untyped", "cut", "silent"))


def reported(answers: list[Answer], at: float) -> dict[str, Any]:
    """What a kill at that time did."""
    flying = [a for a in answers if a.began <= at < a.ended]
    hurt, after = [a for a in flying if a.said != "ok"], [a for a in answers if a.began > at]
    lost = [a for a in after if a.said != "ok"]
    bad = [a for a in answers if a.said != "ok" and not typed(a.said)]
    return {
        "requests": len(answers),
        "in_flight": len(flying),
        "in_flight_ended_as": dict(Counter(f"{a.said}{' (streamed)' if a.streamed else ''}" for a in flying)),
        "in_flight_told_within_s": round(max((a.ended - at for a in hurt), default=0.0), 2),
        "asked_after": len(after),
        "lost_beyond_in_flight": len(lost),
        "lost_as": dict(Counter(a.said for a in lost)),
        "failing_until_s": round(max((a.ended - at for a in lost), default=0.0), 2),
        "slowest_after_s": round(max((a.ended - a.began for a in after), default=0.0), 2),
        "untyped": len(bad),
        "untyped_as": dict(Counter(a.said for a in bad)),
        "silent_ends": sum(a.said == "silent end" for a in answers),
    }


def record(part: str, name: str, figures: dict[str, Any]) -> None:
    """Into the file that LLM_TEST_SCALE_JSON names, if it names one."""
    print(f"{part}, {name}: {json.dumps(figures)}", flush=True)
    if file := os.environ.get("LLM_TEST_SCALE_JSON"):
        path = Path(file)
        found = json.loads(path.read_text()) if path.exists() else {}
        found.setdefault(part, {})[name] = {"when": time.strftime("%Y-%m-%d %H:%M"), **figures}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
