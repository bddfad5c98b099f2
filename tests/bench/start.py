"""What a start costs: `python llm_inference.py` and `python -m llm_inference`, in turn.

    python -m tests.bench.start [--rounds 7] [--out tests/bench/start.json]

CPU time and resident memory until /ready first says yes, with a stand-in engine attached. Python keeps the syntax tree
of the script that it runs, and compiles it each time; of a module it reads the cached bytecode.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

from tests.processes import ROOT, cpu_name, free_port

from .proc import Process
from .run import engine

HERE = Path(__file__).resolve().parent
WAYS = {"python llm_inference.py": ["llm_inference.py"], "python -m llm_inference": ["-m", "llm_inference"]}


def start(program: list[str], url: str) -> dict[str, float]:
    """One start: CPU seconds and MiB."""
    port = free_port()
    command = [sys.executable, *program, "--serve", "--host", "127.0.0.1", "--port", str(port), "--engine", "vllm"]
    environment = {"VLLM_BASE_URL": url, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with Process("start", command, port=port, ready="/ready", env=environment) as process:
        return {"ready_cpu_s": process.cpu_until_ready, "idle_rss_mib": process.ready_rss}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "start.json")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with engine(1) as upstream:
        start(WAYS["python -m llm_inference"], upstream.url)  # writes the bytecode
        for _ in range(args.rounds):
            for name, program in WAYS.items():
                found[name].append(start(program, upstream.url))
    rows = {}
    for name, starts in found.items():
        rows[name] = {key: round(statistics.median(each[key] for each in starts), 2) for key in starts[0]}
        print(f"{name:24} {rows[name]['ready_cpu_s']:.2f} s CPU, {rows[name]['idle_rss_mib']:.0f} MiB")
    machine = {"cpu": cpu_name(), "python": platform.python_version()}
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    args.out.write_text(json.dumps({"when": when, "machine": machine, "rounds": args.rounds, "starts": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
