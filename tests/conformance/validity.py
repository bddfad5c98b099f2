"""JSON validity through us: the fifty schemas with several prompts. Valid, an error, or (never) a wrong value."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .features import outcome
from .judge import DROPPED, FAILED, HONOURED, REFUSED
from .schemas import PROMPTS, SCHEMAS
from .sides import Json, Side

WORDS = {HONOURED: "valid", REFUSED: "honest error", FAILED: "honest error", DROPPED: "wrong"}


def measure(side: Side, prompts: int, names: Sequence[str] = tuple(SCHEMAS)) -> Json:
    """Counts, and each error by its schema and prompt."""
    started = time.monotonic()
    asked = [(name, number) for name in names for number in range(min(prompts, len(PROMPTS)))]
    with ThreadPoolExecutor(side.parallel) as pool:
        found = list(pool.map(lambda pair: outcome(side, SCHEMAS[pair[0]], PROMPTS[pair[1]]), asked))
    words = [WORDS[verdict] for verdict, _ in found]
    errors = [
        {"schema": name, "prompt": number, "verdict": word, "why": why[:160]}
        for (name, number), word, (_, why) in zip(asked, words, found, strict=True)
        if word != "valid"
    ]
    counts = {word: words.count(word) for word in ("valid", "honest error", "wrong")}
    return {"answers": len(asked), **counts, "seconds": round(time.monotonic() - started, 1), "errors": errors}
