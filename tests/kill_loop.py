"""A started engine never outlives its parent: start, answer, end the parent, wait for every descendant to end.

python -m tests.kill_loop [--engine llamacpp|vllm|sglang] [--rounds 100] [--out tests/results/kill_loop.json]

Each round's parent is ended by SIGKILL, SIGINT or a plain return, in turn. Figures are for an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import engines
from tests.processes import ROOT, alive, descendants

PARENT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from llm_inference import LLMInferencer
llm = LLMInferencer(launch=True, **json.loads(sys.argv[1]))
llm.generate("hi", max_tokens=2)
print("up", flush=True)
sys.stdin.readline()
"""
ENDS = ("SIGKILL", "SIGINT", "return")


def options_for(engine: str) -> dict[str, Any]:
    """What starts it: vLLM and SGLang from the environments that engines.py makes."""
    if engine == "llamacpp":
        return {"engine_type": engine}
    spec, model = engines.ENGINES[engine], str(engines.hf_model())
    arguments = spec.arguments.replace("--model-path {model}", "").replace("--model {model}", "").split()
    environment = engines.ENVIRONMENT | spec.environment
    return {
        "engine_type": engine,
        "model_name": model,
        "python": str(engines.install(engine)),
        "launch_args": arguments,
        "launch_env": environment,
    }


def one_round(end: str, engine: str = "llamacpp") -> float:
    """Seconds from the parent's end to the end of its last descendant; 10 means never."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(options_for(engine))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )
    assert parent.stdin is not None and parent.stdout is not None and parent.stdout.readline() == "up\n"
    left = descendants(parent.pid)
    assert len(left) == 2 if engine == "llamacpp" else len(left) >= 4, "the watcher, the engine and its workers"
    began = time.monotonic()
    if end == "return":
        parent.stdin.close()
    else:
        os.kill(parent.pid, getattr(signal, end))
    while any(map(alive, left)) and time.monotonic() - began < 10:
        time.sleep(0.01)
    spent = time.monotonic() - began
    parent.kill()  # where it would not end: its round is lost, and the next ones are not
    parent.wait()
    return spent


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--engine", choices=("llamacpp", "vllm", "sglang"), default="llamacpp")
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    spent = {end: [one_round(end, args.engine) for _ in range(n, args.rounds, len(ENDS))] for n, end in enumerate(ENDS)}
    result = {
        end: {"n": len(all_), "worst_s": round(max(all_), 3), "later_than_2_s": sum(s > 2 for s in all_)}
        for end, all_ in spent.items()
        if all_
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(r["later_than_2_s"] for r in result.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
