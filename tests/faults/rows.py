"""All rows, in the order in which they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from . import clients, engines, gate, hostile, network, overload, places, replaced
from .rig import Result


class Row(Protocol):
    def __call__(self, full: bool, off: str | None = None, focus: str = "") -> Awaitable[Result]: ...


ROWS: dict[str, Row] = {
    "client_leaves": clients.client_leaves,
    "cancels": clients.cancels,
    "network": network.network,
    "slow_clients": clients.slow_clients,
    "hostile_bodies": hostile.hostile_bodies,
    "gate": gate.gate,
    "places": places.places,
    "overload": overload.overload,
    "engine_killed": engines.engine_killed,
    "engine_frozen": engines.engine_frozen,
    "parent_killed": engines.parent_killed,
    "storm": network.storm,
    "replaced": replaced.replaced,
    "soak": overload.soak,
}


def all_rows() -> dict[str, Callable[..., Awaitable[Result]]]:
    """ROWS, and the row that tests them."""
    from .guards import guards_off

    return {**ROWS, "guards_off": guards_off}
