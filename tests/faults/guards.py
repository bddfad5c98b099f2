"""The row that tests the other rows: with a guard switched off, its row must fail."""

from __future__ import annotations

from pathlib import Path

from . import rows
from .guards_list import GUARDS, switched_off
from .rig import Result
from .server import PRODUCT

QUICK = ("the client is watched", "no key twice", "the key", "a relayed stream has its end")


async def guards_off(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Each guard in turn: the row is green with it, and red without it."""
    found, green = Result(), dict[tuple[str, str], int]()
    names = [name for name in GUARDS if focus in name] if full or focus else list(QUICK)
    source = Path(PRODUCT).read_text()
    red: dict[str, str] = {}
    for name in GUARDS:  # that all of them are still in the source costs nothing
        try:
            switched_off(source, name)
        except LookupError as exc:
            found.need(False, str(exc))
            names = [each for each in names if each != name]
    for name in names:
        guard = GUARDS[name]
        row = rows.ROWS[guard.row]
        key = (guard.row, guard.focus)
        if key not in green:
            green[key] = len((await row(False, None, guard.focus)).bad)
        found.need(green[key] == 0, f"{guard.row} ({guard.focus}) is red with all guards on")
        try:
            without = await row(False, name, guard.focus)
            seen = without.bad
        except AssertionError as exc:  # not even the warm-up went through
            seen = [f"{exc}"[:200]]
        found.check(bool(seen), f"{name}: switched off, and {guard.row} ({guard.focus}) stayed green")
        red[name] = f"{guard.row}: {seen[0][:110]}" if seen else "-"
    found.figures |= {"red": red, "of": len(GUARDS)}
    return found
