"""No reference in a schema is ever fetched: 10,000 generated probes, a listening canary, an audit of opened files."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
from typing import Any

from llm_inference import InferenceError, SchemaCheck, check_limits, normalize_schema

WHERE = ("$ref", "$dynamicRef", "$recursiveRef", "$id", "$schema", "$anchor", "id", "$vocabulary", "contentSchema")
opened: list[str] = []
watching = 0  # the thread that is watched


def audit(event: str, args: tuple[Any, ...]) -> None:
    if watching == threading.get_ident() and event in (
        "open",
        "socket.connect",
        "socket.getaddrinfo",
        "urllib.Request",
    ):
        opened.append(f"{event} {args[:2]!r}")


def probes(place: str, count: int) -> list[dict[str, Any]]:
    """Schemas that name `place` under every keyword that could be followed, at many depths and in many dresses."""
    dice = random.Random(7)
    dresses = (
        lambda s: s,
        lambda s: {"properties": {"a": s}},
        lambda s: {"items": s},
        lambda s: {"anyOf": [{"type": "null"}, s]},
        lambda s: {"$defs": {"a": s}, "$ref": "#/$defs/a"},
        lambda s: {"additionalProperties": s},
        lambda s: {"not": s},
        lambda s: {"if": s, "then": s},
        lambda s: {"patternProperties": {"a": s}},
        lambda s: {"prefixItems": [s]},
    )
    found = []
    for _ in range(count):
        target = dice.choice(
            (
                f"http://{place}/x",
                f"//{place}/x",
                f"http://{place}/x#/a",
                "file:///etc/passwd",
                "/etc/passwd",
                "../../etc/passwd",
                "etc/passwd#",
                f"ftp://{place}/",
                "urn:x",
            )
        )
        schema: dict[str, Any] = {dice.choice(WHERE): target}
        if dice.random() < 0.5:
            schema["type"] = dice.choice(("object", "string", "array"))
        for _ in range(dice.randrange(4)):
            schema = dice.choice(dresses)(schema)
        found.append(schema)
    return found


def test_no_reference_leaves_a_schema() -> None:
    global watching
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0)
        schemas = probes(f"127.0.0.1:{canary.getsockname()[1]}", 10_000)
        sys.addaudithook(audit)
        watching = threading.get_ident()
        try:
            for schema in schemas:
                try:
                    found, _ = normalize_schema(schema)
                    check_limits(found)
                    check = SchemaCheck(found)
                except InferenceError:
                    continue
                for value in ({"a": 1}, ["x"], "x", None):
                    with contextlib.suppress(ValueError):
                        check(value)
        finally:
            watching = 0
        try:
            canary.accept()
            raise AssertionError("somebody called")
        except BlockingIOError:
            pass
    assert not opened, opened[:5]
