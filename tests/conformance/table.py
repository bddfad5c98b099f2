"""The results as a Markdown table: `python -m tests.conformance.table FILES...` (of peers.py: one table per engine)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import llm_inference as product

from .features import FEATURES
from .judge import DROPPED, FAILED, HONOURED, REFUSED, UNDECIDED, VERDICTS, as_json
from .recorded import ROWS, recorded_cells
from .sides import Json

SHOWN = {HONOURED: "✓", REFUSED: "refused", DROPPED: "**dropped**", UNDECIDED: "–", FAILED: "error"}
COUNTED = {FAILED: "another error", DROPPED: "dropped in silence"}
Column = tuple[str, dict[str, str]]  #: head, and the verdicts by feature
NAMES = {
    "ollama": "Ollama",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "litellm": "LiteLLM",
    "litellm-validating": "LiteLLM, validating",
    "xinference": "Xinference",
}


def fields_markdown() -> str:
    """The table of fields: one line for all fields with equal cells."""
    surfaces = {letter: path.rpartition("/")[2] for path, letter in product.SURFACES.items()}
    surfaces |= {"c": "chat", "o": "own"}
    words = {"=": "yes", "~": "yes", "-": "–", ".": "ignored"}
    grouped: dict[str, list[str]] = {}
    for where, cells, names in product.field_rows():
        shown = [words.get(cell, f"`{cell}`") for cell in cells]
        key = " | ".join([", ".join(surfaces[letter] for letter in where), *shown])
        grouped.setdefault(key, []).extend(f"`{name}`" for name in names)
    lines = ["| fields | where | Ollama | vLLM | SGLang | llama.cpp |", "|---|---|---|---|---|---|"]
    for key, fields in grouped.items():
        lines.append(f"| {' '.join(fields)} | {key} |")
    return "\n".join(lines)


def verdicts(cells: Iterable[Json]) -> dict[str, str]:
    return {cell["feature"]: cell["verdict"] for cell in cells}


def columns(results: Sequence[Json]) -> list[Column]:
    found: list[Column] = []
    for result in results:
        name = NAMES[result["engine"]]
        for side, head in (("us", f"{name}, through us"), ("bare", f"{name}, bare")):
            if side in result:
                found.append((head, verdicts(result[side])))
    asked = {result["engine"] for result in results if "bare" in result}
    for engine in sorted({row[0] for row in ROWS} - asked):
        found.append((f"{NAMES[engine]}, bare, recorded", verdicts(as_json(recorded_cells(engine)))))
    return found


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def totals(column: dict[str, str]) -> str:
    count = list(column.values()).count(DROPPED)
    return f"**{count}**" if count else "0"


def markdown(results: Sequence[Json]) -> str:
    table = columns(results)
    rows = [row.name for row in FEATURES if any(row.name in cells for _, cells in table)]
    lines = [line(["asked", *(head for head, _ in table)]), line(["---"] * (len(table) + 1))]
    lines += [line([name, *(SHOWN.get(cells.get(name, ""), "") for _, cells in table)]) for name in rows]
    lines.append(line(["**dropped in silence**", *(totals(cells) for _, cells in table)]))
    return "\n".join([*lines, "", *(below(result) for result in results)])


def below(result: Json) -> str:
    engine = f"{NAMES[result['engine']]} {result['version']}, {result['model']}"
    note = f"{engine}, {result['date']}, {result['seconds']:.0f} s of asking"
    if found := result.get("validity"):
        verdicts = f"{found['valid']} valid, {found['honest error']} honest errors, {found['wrong']} wrong"
        note += f"; JSON validity of {found['answers']} answers: {verdicts}"
    return f"- {note}."


def peers(result: Json) -> str:
    """Counts of each verdict, and the rows that any side drops; without the rows that nobody could be asked."""
    heads = {"us": "llm_inference", "bare": f"{NAMES[result['engine']]}, bare"}
    heads |= {name: NAMES.get(name, name) for name in ("litellm", "litellm-validating", "xinference")}
    table = {name: verdicts(result[name]) for name in heads if name in result}
    asked = [
        row.name for row in FEATURES if any(cells.get(row.name, UNDECIDED) != UNDECIDED for cells in table.values())
    ]
    lines = [
        line([f"/v1 on {NAMES[result['engine']]}, {len(asked)} questions", *(heads[name] for name in table)]),
        line(["---"] * (len(table) + 1)),
    ]
    tally = {
        verdict: [[cells[name] for name in asked].count(verdict) for cells in table.values()] for verdict in VERDICTS
    }
    lines += [
        line([f"**{COUNTED.get(verdict, verdict)}**", *map(str, numbers)])
        for verdict, numbers in tally.items()
        if any(numbers)
    ]
    dropped = [name for name in asked if any(cells[name] == DROPPED for cells in table.values())]
    lines += [line([name.removeprefix("/v1 "), *(SHOWN[cells[name]] for cells in table.values())]) for name in dropped]
    versions = ", ".join(f"{NAMES[name]} {version}" for name, version in result["peers"].items())
    return "\n".join(
        [*lines, "", below(result).replace(f", {result['model']}", f", {versions}, {result['model']}", 1), ""]
    )


def main(files: Sequence[str]) -> int:
    if not files:
        sys.exit(__doc__)
    results = [json.loads(Path(name).read_text()) for name in files]
    if engines := [result for result in results if "peers" not in result]:
        print(markdown(engines))
    for result in results:
        if "peers" in result:
            print(peers(result))
    print(
        "\n✓ honoured · refused: by an error that names it · error: one that is no refusal · "
        "–: cannot be told apart here · empty: not asked."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
