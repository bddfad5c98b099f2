"""How soon a real engine stops working after its client has gone.

    python -m tests.faults.stops llamacpp vllm sglang [--json FILE]

Each engine is started by us. A request is cancelled in its prefill or in mid-answer; the engine has stopped when its
processes take less than a quarter of a core. Seconds, the worst of five.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from llm_inference import EngineChild, LLMInferencer
from tests import engines
from tests.kill_loop import options_for
from tests.processes import cpu_seconds, descendants

WINDOW, ROUNDS, NEVER = 0.3, 5, 60.0
LONG = "The quick brown fox jumps over the lazy dog. " * 150
MORE = {"sglang": ["--sleep-on-idle"]}  # or its scheduler spins when it has nothing to do


async def until_idle(pids: set[int]) -> float:
    """Seconds until a window begins in which they take less than a quarter of a core."""
    began = time.monotonic()
    while time.monotonic() - began < NEVER:
        start, used = time.monotonic(), cpu_seconds(pids)
        await asyncio.sleep(WINDOW)
        if cpu_seconds(pids) - used < 0.25 * WINDOW:
            return start - began
    return NEVER


async def stopped(llm: LLMInferencer, pids: set[int], how: str, when: str, turn: int) -> float:
    """One request that is cancelled, and how long the engine goes on."""
    await until_idle(pids)
    prompt = f"{turn} {how} {LONG if when == 'prefill' else 'Tell me a story.'}"
    options: dict[str, Any] = {"max_tokens": 1500 if when == "answer" else 64, "engine_options": {"ignore_eos": True}}

    async def complete() -> None:
        await llm.acomplete(prompt, **options)

    async def streamed() -> None:
        async for _ in llm.astream(prompt, **options):
            pass

    task = asyncio.ensure_future(complete() if how == "whole" else streamed())
    await asyncio.sleep(0.15 if when == "prefill" else 1.5)
    assert not task.done(), f"it was over before it was cancelled: {task}"
    task.cancel()
    await asyncio.wait([task])
    return await until_idle(pids)


async def measure(engine: str) -> dict[str, float]:
    options = options_for(engine)
    options["launch_args"] = [*options.get("launch_args", ()), *MORE.get(engine, ())]
    async with LLMInferencer(launch=True, **options) as llm:
        (child,) = EngineChild._all.values()
        assert child._process is not None
        pids = descendants(child._process.pid)
        await llm.agenerate("hi", max_tokens=4)
        return {f"{how}, {when}": round(max([await stopped(llm, pids, how, when, turn) for turn in range(ROUNDS)]), 2)
                for how in ("whole", "stream") for when in ("prefill", "answer")}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="+", choices=("llamacpp", *engines.ENGINES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    for name in args.engines:
        found[name] = asyncio.run(measure(name))
        print(name, found[name], flush=True)
        if args.json:
            args.json.write_text(json.dumps({"seconds, worst of": ROUNDS, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
