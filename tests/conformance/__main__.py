"""python -m tests.conformance --engine X [--base-url URL] [--model M] [--bare] [--short] [--validity N] [--json FILE]

Asks the engine every question of the table, through us and, with --bare, the bare engine too; prints the cells. Exits 1
when we drop something in silence, or pass off a wrong JSON value.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm_inference import LLMInferencer

from . import features, judge, validity
from .sides import Json, Side, bare_side, through_us

MARKS = {
    judge.HONOURED: "+",
    judge.REFUSED: "r",
    judge.DROPPED: "DROPPED",
    judge.UNDECIDED: "?",
    judge.FAILED: "failed",
}


def ask_all(side: Side, rows: Sequence[judge.Feature]) -> list[judge.Cell]:
    cells = []
    print(f"\n{side.engine}, {side.label} ({side.model}, version {side.version or 'not told'})", flush=True)
    for cell in judge.run(side, rows):
        print(f"  {MARKS[cell.verdict]:8}{cell.feature:48}{cell.seconds:6.1f} s  {cell.note[:110]}", flush=True)
        cells.append(cell)
    print("  " + ", ".join(f"{count} {verdict}" for verdict, count in judge.counts(cells).items() if count))
    return cells


def chosen(short: bool, only: str) -> list[judge.Feature]:
    return [row for row in features.FEATURES if (row.short or not short) and only in row.name]


def measure(side: Side, prompts: int) -> Json:
    found = validity.measure(side, prompts)
    verdicts = f"{found['valid']} valid, {found['honest error']} honest errors, {found['wrong']} wrong"
    print(f"\nJSON validity, {found['answers']} answers in {found['seconds']} s: {verdicts}")
    for error in found["errors"]:
        print(f"  {error['verdict']:14}{error['schema']}, prompt {error['prompt']}: {error['why']}")
    return found


def merged(path: Path, new: Json) -> Json:
    """The new results over those of the file, so that some rows, or one side, can be asked again."""
    old: Json = json.loads(path.read_text()) if path.exists() else {}
    result = {**old, **new}
    sides = [name for name, value in result.items() if isinstance(value, list)]
    for side in sides:
        cells = {cell["feature"]: cell for each in (old, new) for cell in each.get(side, ())}
        result[side] = [cells[row.name] for row in features.FEATURES if row.name in cells]
    asked = [*(cell for side in sides for cell in result[side]), result.get("validity", {})]
    return {**result, "seconds": round(sum(each.get("seconds", 0.0) for each in asked), 1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", required=True, choices=list(LLMInferencer.ENGINE_MAP))
    parser.add_argument("--base-url", help="the engine's server; llamacpp is started where it is left out")
    parser.add_argument("--model")
    parser.add_argument("--bare", action="store_true", help="ask the bare engine too")
    parser.add_argument("--short", action="store_true", help="the rows of the run in CI")
    parser.add_argument("--only", default="", help="the rows with this in their name")
    parser.add_argument(
        "--validity", type=int, default=0, metavar="N", help="also the fifty schemas with N prompts (1 to 4) each"
    )
    parser.add_argument("--json", type=Path, help="write the results there, over what the file has")
    args = parser.parse_args(argv)
    started, llm = time.monotonic(), LLMInferencer(args.engine, args.model, base_url=args.base_url)
    try:
        with through_us(llm) as us:
            rows = chosen(args.short, args.only)
            result: Json = {
                "engine": args.engine,
                "version": us.version,
                "model": us.model,
                "date": datetime.date.today().isoformat(),
            }
            result["us"] = judge.as_json(ask_all(us, rows))
            if args.bare:
                result["bare"] = judge.as_json(ask_all(bare_side(us), rows))
            if args.validity:
                result["validity"] = measure(us, args.validity)
    finally:
        llm.close()
    print(f"\n{time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(merged(args.json, result), ensure_ascii=False, indent=1) + "\n")
    dropped = sum(cell["verdict"] == judge.DROPPED for cell in result["us"])
    return 1 if dropped or result.get("validity", {}).get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
