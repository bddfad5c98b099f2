"""The guards in llm_inference.py: how to switch each one off in the source, and the row that must then fail."""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    old: str  # stands once in llm_inference.py
    new: str
    row: str
    focus: str  # the part of the row that looks at it


LIMITS = "= 4 << 20, 32 << 10, 64, 15.0"
GUARDS: dict[str, Guard] = {
    "the client is watched": Guard(
        "watch = asyncio.ensure_future(watch_client())", "watch = None", "client_leaves", "the engine thinks"
    ),
    "deadlines": Guard(
        '        self._expired = "total" if',
        '        return\n        self._expired = "total" if',
        "network",
        "stall@b1 vllm",
    ),
    "body limit": Guard(LIMITS, "= 4 << 30, 32 << 10, 64, 15.0", "hostile_bodies", "over 4 MiB"),
    "header limit": Guard(LIMITS, "= 4 << 20, 32 << 20, 64, 15.0", "hostile_bodies", "header"),
    "JSON depth": Guard(LIMITS, "= 4 << 20, 32 << 10, 6400, 15.0", "hostile_bodies", "nested too deep"),
    "no key twice": Guard("object_pairs_hook=_no_key_twice", "object_pairs_hook=dict", "hostile_bodies", "a key twice"),
    "tokens capped": Guard(
        "if max_tokens is not None and max_tokens > self.settings.max_tokens_cap:",
        "if False:",
        "hostile_bodies",
        "max_tokens 8193",
    ),
    "model names by pattern": Guard('MODEL_NAME = r"^', 'MODEL_NAME = r""  # r"^', "hostile_bodies", "model name"),
    "references are expanded and counted": Guard(
        "visit(resolve_ref(schema, ref), depth + 1, (*refs, ref))", "pass", "hostile_bodies", "laddered"
    ),
    "a relayed schema is looked at": Guard(
        "        if schema is not None and schema != ANY_OBJECT:\n            await",
        "        if False:\n            await",
        "places",
        "schema",
    ),
    "images are data": Guard('refuse_places(body.get("messages") or ())', "pass", "places", "part"),
    "never from ourselves": Guard(
        "if headers.get(HOP.encode()) == INSTANCE.encode():", "if False:", "hostile_bodies", "header"
    ),
    "the key": Guard(
        "if path not in PUBLIC and (why := self._refusal(scope, headers)):", 'if why := "":', "gate", "keyed"
    ),
    "the Host": Guard('if host != "localhost" and not is_loopback(host.strip("[]")):', "if False:", "gate", "host"),
    "the peer": Guard("if not is_loopback(peer):", "if False:", "gate", "host"),
    "forwarding headers": Guard(
        'if scope.get("http_version") == "1.0" or any(map(FORWARDED.fullmatch, headers)):',
        "if False:",
        "gate",
        "forwarded",
    ),
    "other pages": Guard('return "a page of another origin sent this one"', "pass", "gate", "page"),
    "the queue is bounded": Guard(
        "if self.gate.locked() and self.waiting >= self.settings.queue:", "if False:", "overload", ""
    ),
    "a line is bounded": Guard("    LIMIT = 8 << 20", "    LIMIT = 8 << 30", "network", "engine:endless vllm api"),
    "a reply is bounded": Guard(
        "limit: int = 32 << 20)", "limit: int = 32 << 30)", "network", "engine:endless vllm v1"
    ),
    "a relayed stream has its end": Guard(
        '            raise BadEngineReply(f"{engine.engine_type}\'s stream ended early"',
        '            return\n            raise BadEngineReply(f"{engine.engine_type}\'s stream ended early"',
        "network",
        "engine:early end vllm v1",
    ),
    "a stream has its finish": Guard(
        "        finish: str | None = None\n        usage, timing",
        '        finish: str | None = "stop"\n        usage, timing',
        "network",
        "engine:early end ollama api",
    ),
    "relayed events are looked at": Guard(
        "                    check_events(engine, data)",
        "                    pass",
        "network",
        "engine:garbage inside vllm v1",
    ),
    "an aborted answer is none": Guard(
        '    raise EngineUnavailable(f"the engine ended the answer with',
        '    return "stop"\n    raise EngineUnavailable(f"the engine ended the answer with',
        "network",
        "engine:aborted vllm api",
    ),
    "time for header and body": Guard(
        "self.late) if part else None", "lambda: None) if part else None", "slow_clients", "slow"
    ),
}


def switched_off(source: str, name: str) -> str:
    """The source without that guard. Raises LookupError where the source has changed: then this list has to be
    updated."""
    guard = GUARDS[name]
    if source.count(guard.old) != 1:
        raise LookupError(f"{name}: {guard.old!r} stands {source.count(guard.old)} times in llm_inference.py, not once")
    return source.replace(guard.old, guard.new)
