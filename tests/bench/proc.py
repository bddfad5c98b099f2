"""Servers under measurement: start, readiness, end; CPU time and memory of a process tree from /proc."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

from tests.processes import cpu_seconds, descendants, neutral_environment

TICK = os.sysconf("SC_CLK_TCK")


def many_sockets() -> None:
    """Thousands of sockets for us and for all that we start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def machine_busy() -> float:
    """CPU seconds that the whole machine has worked, to see who else did."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICK


class Process:
    """A server (or a load generator) in a process group of its own; standard error and output go to a file."""

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        port: int,
        ready: str = "/health",
        env: dict[str, str] | None = None,
        core: int | None = None,
    ) -> None:
        self.name, self.port, self.ready = name, port, ready
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.gettempdir()) / f"bench-{os.getpid()}-{name.replace(' ', '-')}.log"
        self.command = ["taskset", "-c", str(core), *command] if core is not None else command
        self.env = neutral_environment() | (env or {})

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env, start_new_session=True)
        self.pid = self.process.pid
        until = time.monotonic() + 180
        try:
            while not self.answers():
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{self.name} did not come up: {self.log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.03)
        except BaseException:
            self.end()
            raise
        self.cpu_until_ready, self.ready_rss, self.ready_sockets = self.cpu(), self.rss(), self.sockets()
        return self

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(self.url + self.ready, timeout=5) as reply:
                return bool(reply.status == 200)
        return False

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """Its own group, politely and then not; a child in a group of its own is ended by its id."""
        pids = self.tree()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
                break
        for pid in pids - {self.pid}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.log.unlink()

    def tree(self) -> set[int]:
        return {self.pid} | descendants(self.pid)

    def cpu(self) -> float:
        """User and system seconds of the tree."""
        return cpu_seconds(self.tree())

    def cpu_exactly(self) -> float:
        """The same from the scheduler's account: nanoseconds rather than ticks, but only of threads that run now."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def rss(self) -> float:
        """MiB of the tree."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                if found := re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()):
                    total += int(found[1])
        return total / 1024

    def sockets(self) -> int:
        """Open sockets of the tree: what is left of them after the load has gone shows a leak."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        total += os.readlink(link).startswith("socket:")
        return total
