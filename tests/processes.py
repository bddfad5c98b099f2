"""Processes, ports and the environment of what the tests start. Standard library only; Linux."""

import contextlib
import os
import platform
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: environment variables that steer llm_inference, an engine or an OpenAI client
SETTINGS = ("OLLAMA_", "VLLM_", "SGLANG_", "LLAMACPP_", "LLM_INFERENCE_", "OPENAI_")
CACHE_SETTING = "LLM_INFERENCE_TEST_CACHE"  # of tests/engines.py, not of the module


def is_setting(name: str) -> bool:
    return name.startswith(SETTINGS) and name != CACHE_SETTING


def neutral_environment() -> dict[str, str]:
    """This process's environment without any such setting."""
    return {name: value for name, value in os.environ.items() if not is_setting(name)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def descendants(pid: int) -> set[int]:
    """The processes below this one."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found |= {child} | descendants(child)
    return found


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the program's name; OSError where there is no such process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return stat(pid)[0] not in "ZX"
    return False


def cpu_seconds(pids: set[int]) -> float:
    """User and system seconds that these processes have taken."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, stat(pid)[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """What the kernel calls this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
