"""The verdicts, and how one feature asked of one side becomes a cell of the table."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sides import Side

HONOURED = "honoured"
REFUSED = "refused"  # by a typed error that names the feature
DROPPED = "silently dropped"  # answered as if all were well, without what was asked
UNDECIDED = "not decidable here"
FAILED = "failed"  # an error that is no refusal: nothing was dropped, and nothing was answered
VERDICTS = (HONOURED, REFUSED, DROPPED, UNDECIDED, FAILED)


class Refusal(Exception):
    """The side gave an error: its kind (ours, or "http 400"), what it says, and whether that kind blames the
    request."""

    def __init__(self, kind: str, text: str, refuses: bool) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.refuses = kind, text, refuses


class Dropped(Exception):
    """What came back ignores what was asked."""


class Undecidable(Exception):
    """What came back would look the same either way."""


def check(true: bool, otherwise: str) -> None:
    if not true:
        raise Dropped(otherwise)


Decide = Callable[["Side"], "str | None"]


@dataclass(frozen=True)
class Feature:
    """A row: `decide` returns a note when the feature is honoured, and raises otherwise; `named`: how a refusal must
    name it."""

    name: str
    decide: Decide
    named: str
    short: bool  #: asked in the short run too


@dataclass(frozen=True)
class Cell:
    feature: str
    verdict: str
    note: str = ""
    seconds: float = 0.0
    source: str = ""  #: the transcript that it was read from, where no live engine was asked


FEATURES: list[Feature] = []


def feature(name: str, named: str, *, short: bool = True) -> Callable[[Decide], Decide]:
    """Puts a question into the table."""

    def add(decide: Decide) -> Decide:
        FEATURES.append(Feature(name, decide, named, short))
        return decide

    return add


def decide(row: Feature, side: Side) -> Cell:
    started = time.monotonic()
    verdict, note = _verdict(row, side)
    return Cell(row.name, verdict, " ".join(note.split())[:300], round(time.monotonic() - started, 2))


def _verdict(row: Feature, side: Side) -> tuple[str, str]:
    try:
        return HONOURED, row.decide(side) or ""
    except Dropped as exc:
        return DROPPED, str(exc)
    except Undecidable as exc:
        return UNDECIDED, str(exc)
    except Refusal as exc:
        named = re.search(row.named, exc.text, re.IGNORECASE) is not None
        return (REFUSED, str(exc)) if exc.refuses and named else (FAILED, str(exc))
    except Exception as exc:  # a lost connection, or an answer of an unknown shape: the cell says so, the others go on
        return FAILED, f"{type(exc).__name__}: {exc}"


def run(side: Side, rows: Iterable[Feature]) -> Iterator[Cell]:
    for row in rows:
        yield decide(row, side)


def counts(cells: Iterable[Cell]) -> dict[str, int]:
    verdicts = [cell.verdict for cell in cells]
    return {verdict: verdicts.count(verdict) for verdict in VERDICTS}


def as_json(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(cell).items() if value not in ("", 0.0)} for cell in cells]
