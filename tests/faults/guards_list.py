"""The guards in llm_inference.py: how to switch each one off in the source, and the row that must then fail."""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    old: str  # stands once in llm_inference.py
    new: str
    row: str
    focus: str  # the part of the row that looks at it


LIMITS = "= 4 << 20, 32 << 10, 64, 100_000"
GUARDS: dict[str, Guard] = {
    "the client is watched": Guard(
        "watch = asyncio.ensure_future(self._watch_client(receive))", "pass", "client_leaves", "the engine thinks"
    ),
    "deadlines": Guard(
        "        if self.end <= now:\n            self._expired",
        "        return\n        if self.end <= now:\n            self._expired",
        "network",
        "stall@b1 vllm",
    ),
    "body limit": Guard(LIMITS, "= 4 << 30, 32 << 10, 64, 100_000", "hostile_bodies", "over 4 MiB"),
    "header limit": Guard(LIMITS, "= 4 << 20, 32 << 20, 64, 100_000", "hostile_bodies", "header"),
    "JSON depth": Guard(LIMITS, "= 4 << 20, 32 << 10, 6400, 100_000", "hostile_bodies", "nested too deep"),
    "no key twice": Guard(
        "object_pairs_hook=_refuse_duplicate_keys", "object_pairs_hook=dict", "hostile_bodies", "a key twice"
    ),
    "tokens capped": Guard(
        "if type(body[name]) is int and body[name] > cap:",
        "if False:",
        "hostile_bodies",
        "capped",
    ),
    "model names are looked up": Guard(
        "        await self.check_served(model)\n        missing = await self.template_drops(",
        "        missing = await self.template_drops(",
        "hostile_bodies",
        "model name",
    ),
    "references are expanded and counted": Guard(
        "(self.counted and ref not in self.recursive)", "False", "hostile_bodies", "laddered"
    ),
    "a relayed schema is looked at": Guard(
        "            if schema:\n                check_limits",
        "            if False:\n                check_limits",
        "places",
        "schema",
    ),
    "images are data": Guard('refuse_addresses(body.get("messages") or ())', "pass", "places", "part"),
    "never from ourselves": Guard(
        "if headers.get(LOOP_HEADER.encode()) == INSTANCE.encode():", "if False:", "hostile_bodies", "header"
    ),
    "the key": Guard(
        "        if path not in PUBLIC:  # a preflight", "        if False:  # a preflight", "gate", "keyed"
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
        "if self.waiting >= self.settings.queue and self.places.locked():", "if False:", "overload", ""
    ),
    "a line is bounded": Guard("    LIMIT = 8 << 20", "    LIMIT = 8 << 30", "network", "engine:endless vllm api"),
    "a reply is bounded": Guard(
        "limit: int = 32 << 20)", "limit: int = 32 << 30)", "network", "engine:endless vllm v1"
    ),
    "a relayed stream has its end": Guard(
        "                            await anext(lines, None)\n                    return\n",
        "                            await anext(lines, None)\n        return\n",
        "network",
        "engine:early end vllm v1",
    ),
    "an answer has its finish": Guard(
        "        if any(choice.finish_reason is None for choice in self.choices.values()):",
        "        if False:",
        "network",
        "engine:no finish vllm api",
    ),
    "relayed events are looked at": Guard(
        "or not GOOD_ENDS.issuperset(ends) or not is_clean(data):",
        "and False:",
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
        "self.loop.call_later(seconds, self.late)", "self.loop.call_later(seconds, int)", "slow_clients", "slow"
    ),
    "a failed endpoint is left alone": Guard(
        "return not self.removed and self.retry_at <= now and self.trial is None",
        "return not self.removed",
        "fleet",
        "429",
    ),
    "what was asked before an outage does not end it": Guard(
        "if self.failures and self.trial is who:", "if self.failures:", "fleet", "503"
    ),
    "what waits for a silent endpoint is passed on": Guard(
        "            endpoint.drop_waiting()", "            pass", "fleet", "frozen"
    ),
}


def switched_off(source: str, name: str) -> str:
    """The source without that guard. Raises LookupError where the source has changed: then this list has to be
    updated."""
    guard = GUARDS[name]
    if source.count(guard.old) != 1:
        raise LookupError(f"{name}: {guard.old!r} stands {source.count(guard.old)} times in llm_inference.py, not once")
    return source.replace(guard.old, guard.new)
