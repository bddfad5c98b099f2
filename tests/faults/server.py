"""The server under test with a control socket and, where asked for, one guard switched off.

FAULTS_OFF       a name in guards.py: that line of the source is replaced before it is run
FAULTS_SETTINGS  JSON: fields of Settings (and `deadlines`: fields of Deadlines; `fleet`: those of fleet.Pace) that
                 no flag sets
FAULTS_CONTROL   a path: every connection gets the census as JSON; with `fleet`, also what was decided about endpoints
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.processes import ROOT

from .guards_list import switched_off

PRODUCT = Path(os.environ.get("FAULTS_PRODUCT_DIR") or ROOT) / "llm_inference.py"
OPENED: set[str] = set()  # what was opened, started or connected to, by Python's own audit
loops: list[asyncio.AbstractEventLoop] = []
MOMENTS: list[dict[str, Any]] = []  # what was decided about endpoints, where `observe` was called


def load(off: str, where: str) -> Any:
    """The product; with `off`, that guard's line replaced in a copy."""
    if off:
        (Path(where) / "llm_inference.py").write_text(switched_off(PRODUCT.read_text(), off))
        sys.path.insert(0, where)
    return importlib.import_module("llm_inference")


def census() -> dict[str, Any]:
    gc.collect()
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    workers = ("asyncio_", "uvloop_", "ThreadPoolExecutor", "control")  # a pool's idle threads stay, by design
    return {
        "tasks": sum(len(asyncio.all_tasks(loop)) for loop in loops),
        "threads": sum(not t.name.startswith(workers) for t in threading.enumerate()),
        "fds": len(kinds) - 2,
        "sockets": sum(kind.startswith("socket:") for kind in kinds) - 2,
        "children": len(children),
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "peak": int(status["VmHWM"].split()[0]) * 1024,
        "opened": sorted(OPENED),
        "thread_names": sorted(t.name for t in threading.enumerate()),
        "moments": list(MOMENTS),
    }


def control(path: str) -> None:
    """Tells the census to whoever connects; its own listener and connection are left out of the counts."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            peer, _ = listener.accept()
            with peer:
                try:
                    peer.sendall(json.dumps(census()).encode())
                except OSError:
                    continue


def audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], (str, bytes)):
        OPENED.add(os.fsdecode(args[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec"):
        OPENED.add(f"{event} {args[0]!s}")


def hurry(product: Any, pace: dict[str, float]) -> None:
    """What the module does about a failing endpoint, sooner."""
    product.Endpoint.FIRST_PAUSE, product.Endpoint.LONGEST_PAUSE = pace["first_pause"], pace["longest_pause"]
    product.Endpoint.LIST_TTL = pace["list_ttl"]
    brief, seconds = product.Deadlines.brief, pace["list_deadline"]
    product.Deadlines.brief = lambda self: dataclasses.replace(brief(self), first_token=seconds, total=seconds * 1.5)


def observe(product: Any) -> None:
    """From now on, note what is decided about endpoints, in the order of the decisions.

    `at` is when a request or a look was let through, not when it reached the endpoint, and when a failure was known to
    all: so what was let through before a failure was known is told from what was let through in spite of it, however
    long either then takes on a busy machine.

    "begun": a request was let through, which `asked` that. "look": after an outage, the endpoint is asked for its list.
    "list": it is asked for its list at all. "failed": its `kind`, `since` (no later than the pause began), whether it
    `counted` as an outage, and `until` when it is left alone. "back": the outage is over.
    """
    endpoint = product.Endpoint
    available, failed, recovered, look = endpoint.available, endpoint.failed, endpoint.recovered, endpoint.look
    try_by, begin = endpoint.try_by, product.Turns.begin
    let_through: dict[str, float] = {}  # both callers of `available` go on without a pause

    def note(each: Any, what: str, at: float | None = None, **more: Any) -> None:
        MOMENTS.append({"at": at or time.monotonic(), "endpoint": each.name, "what": what, **more})

    def asks_whether_available(self: Any, now: float) -> bool:
        at = time.monotonic()
        found: bool = available(self, now)
        if found:
            let_through[self.name] = at
        return found

    async def begins(self: Any, each: Any, request: Any) -> None:
        at = let_through.get(each.name) if each.failures else None  # if it is up, nothing is asked before
        note(each, "begun", at, asked=str(request.body["messages"][-1]["content"]))
        await begin(self, each, request)

    def tries(self: Any, who: object) -> None:
        waits = self.trial is not None and time.monotonic() - self.tried_at > self.LIST_TTL
        if self.failures and not waits and not isinstance(who, product.Served):
            note(self, "look", let_through.get(self.name))
        try_by(self, who)

    async def looks(self: Any) -> None:
        note(self, "list")
        await look(self)

    def fails(self: Any, error: Any) -> None:
        since, before = time.monotonic(), self.failures
        failed(self, error)
        note(self, "failed", kind=error.kind, since=since, counted=self.failures > before, until=self.retry_at)

    def recovers(self: Any, *who: object) -> None:
        before = self.failures
        recovered(self, *who)
        if before and not self.failures:
            note(self, "back")

    endpoint.available, endpoint.failed, endpoint.recovered = asks_whether_available, fails, recovers
    endpoint.try_by, endpoint.look, product.Turns.begin = tries, looks, begins


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="faults-off-") as where:
        product = load(os.environ.get("FAULTS_OFF", ""), where)
        import uvicorn

        more: dict[str, Any] = json.loads(os.environ.get("FAULTS_SETTINGS") or "{}")
        if "fleet" in more:
            hurry(product, more["fleet"])
            observe(product)
        read, startup = product.load_settings, uvicorn.Server.startup
        known = {each.name for each in dataclasses.fields(product.Settings)}

        def load_settings(*args: Any) -> Any:
            settings = read(*args)
            limits = dataclasses.replace(settings.deadlines, **more.get("deadlines", {}))
            return dataclasses.replace(
                settings,
                **{name: value for name, value in more.items() if name in known - {"deadlines"}},
                deadlines=limits,
            )

        async def started(self: uvicorn.Server, sockets: Any = None) -> None:
            loops[:] = [asyncio.get_running_loop(), product.portal.loop]
            await startup(self, sockets)
            sys.addaudithook(audit)

        product.load_settings, uvicorn.Server.startup = load_settings, started  # type: ignore[method-assign]
        if path := os.environ.get("FAULTS_CONTROL"):
            threading.Thread(target=control, args=(path,), name="control", daemon=True).start()
        found: int = product.main(sys.argv[1:])
        return found


if __name__ == "__main__":
    sys.exit(main())
