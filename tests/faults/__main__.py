"""Run the rows and write a results file.

    python -m tests.faults [--row NAME ...] [--full] [--json FILE]

Without --full each row takes seconds, and a red one is run once more. The exit status is 0 when no row found anything
bad."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.processes import cpu_name

from .rows import all_rows
from .server import PRODUCT


def run_row(name: str, full: bool) -> dict[str, Any]:
    """One row's result; what a row raises is bad too."""
    began = time.monotonic()
    try:
        result = asyncio.run(all_rows()[name](full)).as_json()  # type: ignore[arg-type]
    except Exception as exc:
        traceback.print_exc()
        result = {
            "n": 0,
            "bad": 1,
            "figures": {},
            "first_bad": [f"{type(exc).__name__}: {exc}"[:500]],
            "kinds_of_bad": {},
        }
    if not result["n"]:
        result["bad"] = max(1, result["bad"])  # a row that tried nothing has shown nothing
    return {**result, "seconds": round(time.monotonic() - began, 1), "full": full}


def machine() -> dict[str, Any]:
    source = hashlib.sha256(PRODUCT.read_bytes()).hexdigest()[:12]
    return {
        "llm_inference.py": source,
        "when": datetime.now().astimezone().isoformat(timespec="minutes"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def main() -> int:
    rows = all_rows()
    options = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    options.add_argument("--row", action="append", choices=list(rows), help="only this one (repeatable)")
    options.add_argument("--full", action="store_true", help="the long form")
    options.add_argument(
        "--json", type=Path, help="where the results go; rows that are not run now keep what they had there"
    )
    args = options.parse_args()
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"rows": {}}
    red = []
    for name in args.row or list(rows):
        result = run_row(name, args.full)
        # a busy machine misses deadlines of a second; a real fault is there the second time too
        if result["bad"] and not args.full:
            print(f"again {name:15} {result['bad']:5} of {result['n']:6}   {result['first_bad'][:3]}", flush=True)
            result = run_row(name, args.full)
        results["rows"][name] = result
        red += [name] if result["bad"] else []
        verdict = "RED  " if result["bad"] else "ok   "
        figures = json.dumps(result["figures"], ensure_ascii=False)[:400]
        counts = f"{result['bad']:5} of {result['n']:6}   {result['seconds']:6.1f} s"
        print(f"{verdict} {name:15} {counts}   {figures}", flush=True)
        for what in result["first_bad"]:
            print(f"        {what}", flush=True)
        if args.row and "machine" in results:  # the other rows are from another run
            result["machine"] = machine()
        else:
            results["machine"] = machine()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
