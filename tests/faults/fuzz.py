"""Coverage-guided fuzzing of everything that reads untrusted input (needs atheris).

    python -m tests.faults.fuzz -max_total_time=600

Bodies of every route, schemas, patterns, engines' streams and what the surfaces write of them. Any exception other than
InferenceError (or a ValueError of the answer check) ends the run with the input that caused it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["llm_inference"]):
    import llm_inference as product

PATHS = list(product.OPERATIONS)
ADAPTERS: list[Any] = [kind(base_url="127.0.0.1:9") for kind in product.LLMInferencer.ENGINE_MAP.values()]
ID = "5f4e0a52-3f1f-4f0e-9d5e-2b7f5f0c7a11"


def surface(path: str) -> product.Surface:
    return product.OPERATIONS[path].surface(ID, path)


def body(data: bytes, which: int) -> None:
    surface(PATHS[which % len(PATHS)]).read(product.parse_object(data))


def schema(data: bytes, which: int) -> None:
    found = product.parse_object(data)
    built, _ = product.normalize_schema(found.get("schema", found))
    product.check_limits(built)
    with contextlib.suppress(ValueError):
        product.SchemaCheck(built)(found.get("value"))


def stream(data: bytes, which: int) -> None:
    """An engine's bytes in two pieces, through its decoder, and out through a surface."""
    adapter, path = ADAPTERS[which % len(ADAPTERS)], PATHS[which // len(ADAPTERS) % len(PATHS)]
    asked = surface(path)
    request = asked.read(product.OPERATIONS[path].example | ({} if path in product.PLAIN else {"stream": True}))
    decode, lines = adapter.decoder(request, request.body | {"model": "m"}), product.LineReader()
    half = len(data) // 2
    with product.well_formed("the engine"):
        for part in (data[:half], data[half:], b"\n"):
            burst, error = decode(lines.complete(part))
            if burst is not None:
                asked.event(burst, request.served)
            if error is not None:
                asked.error_event(product.failure(error, path, ID)[2])
        asked.end(request.served)


TARGETS = (body, schema, stream)


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    with contextlib.suppress(product.InferenceError):
        TARGETS[data[0] % len(TARGETS)](data[2:], data[1])


async def main() -> None:
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    asyncio.run(main())  # deadlines and the like ask for the loop
