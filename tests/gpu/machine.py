"""Programs that are started and ended, their CPU time, and the GPU as nvidia-smi shows it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tests.processes import alive, descendants


@contextlib.contextmanager
def ended(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The program while the block runs; then it and whatever it started are ended."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=log.parent, start_new_session=True
        )
    try:
        yield process
    finally:
        family = {process.pid, *descendants(process.pid)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in [pid for pid in family if alive(pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            wait_for(lambda: process.poll() is not None and not any(map(alive, family)), 10)
        process.wait()


def none_alive(pids: Collection[int]) -> bool:
    return not any(map(alive, pids))


def cpu_seconds(pid: int) -> float:
    """Of the process and its children, --workers say."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(
        cpu_seconds(int(child)) for child in children
    )


def wait_for(test: Callable[[], bool], seconds: float) -> float | None:
    """How long it took until the test held; None when it never did."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if test():
            return round(time.monotonic() - began, 2)
        time.sleep(0.05)
    return None


def wait_until(url: str, process: subprocess.Popen[bytes], log: Path, patience: float) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode}; the end of its log:\n{tail(log)}")
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(url, timeout=30).status == 200)
        return False

    if wait_for(answers, patience) is None:
        raise RuntimeError(f"it was not ready within {patience:.0f} s; the end of its log:\n{tail(log)}")


def smi(query: str) -> list[str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.splitlines()
    return []


def gpu_used() -> int | None:
    """MiB in use on the first GPU."""
    lines = smi("--query-gpu=memory.used")
    return int(lines[0]) if lines else None


def gpu_processes() -> list[int]:
    return [
        int(line.split(",")[0]) for line in smi("--query-compute-apps=pid,used_memory") if line.split(",")[0].isdigit()
    ]


def off_the_gpu(pids: set[int]) -> bool:
    return pids.isdisjoint(gpu_processes())


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(line[:400] for line in log.read_text(errors="replace").splitlines()[-lines:])
