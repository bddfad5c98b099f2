"""Coverage-guided fuzzing of everything that reads untrusted input (needs atheris).

    python -m tests.faults.fuzz -max_total_time=600

Bodies of every route, schemas, patterns, and engines' streams. Any exception other than InferenceError (or a ValueError
of the answer check) ends the run with the input that caused it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["llm_inference"]):
    import llm_inference as product

SHAPES: tuple[Any, ...] = (product.GenerateBody, product.ChatBody, product.StructuredBody, product.V1Fields)
ADAPTERS = [kind(base_url="127.0.0.1:9") for kind in product.LLMInferencer.ENGINE_MAP.values()]
HUB = product.Gateway(product.Settings(engine="llamacpp"))
RELAY = product.check_events


def body(data: bytes, which: int) -> None:
    HUB._parse(SHAPES[which % len(SHAPES)], data)


def schema(data: bytes, which: int) -> None:
    found = product.parse_object(data)
    built, _ = product.normalize_schema(found.get("schema", found))
    with contextlib.suppress(ValueError):
        product.SchemaCheck(built)(found.get("value"))


def stream(data: bytes, which: int) -> None:
    adapter = ADAPTERS[which % len(ADAPTERS)]
    reader = product.LineReader()
    half = len(data) // 2
    lines = reader.feed(data[:half]) + reader.feed(data[half:]) + reader.end()
    for payload in lines if adapter.ndjson else product.sse_payloads(lines):
        with contextlib.suppress(*product._MALFORMED):
            adapter._read_event(adapter.payload(payload))


def relayed(data: bytes, which: int) -> None:
    RELAY(ADAPTERS[which % 3 + 1], data)


TARGETS = (body, schema, stream, relayed)


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    with contextlib.suppress(product.InferenceError):
        TARGETS[data[0] % len(TARGETS)](data[2:], data[1])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
