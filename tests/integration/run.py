"""Runs every client in its environment and keeps the reports, for `python -m tests.integration.table`.

    python -m tests.integration.run REPORTS [--work FOLDER] [--only NAME ...] [-- PYTEST ARGUMENTS]

Environments are made in FOLDER (a temporary one if none is named), or used as they are. `LLM_TEST_VLLM_URL` adds a real
vLLM behind us, `LLM_TEST_STRAIGHT=1` the same one alone. Exits 1 if a test failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Environment:
    """Clients that can be installed beside each other, and their tests."""

    requirements: str
    tests: tuple[str, ...]
    only: str = ""  #: pytest's -k
    npm: bool = False
    options: tuple[str, ...] = ()


#: LangChain keeps its connections over event loops: one loop for all tests
SESSION = ("-o", "asyncio_default_test_loop_scope=session", "-o", "asyncio_default_fixture_loop_scope=session")
ENVIRONMENTS = {
    "npm": Environment("../requirements.txt", ("claude_code", "codex", "node_real"), npm=True),
    "openai": Environment("requirements.txt", ("openai_client", "anthropic_client")),
    "agents": Environment("requirements.txt", ("agents_real", "pydantic_ai_real", "llm_real", "clients")),
    "scripted": Environment("requirements.txt", ("agents", "pydantic_ai")),
    "langchain": Environment(
        "requirements.txt", ("langchain_standard",), options=("-o", "asyncio_mode=auto", *SESSION)
    ),
    "litellm": Environment("litellm.txt", ("litellm_real", "agents"), only="litellm"),
    "instructor": Environment("instructor.txt", ("instructor_real", "agents", "clients"), only="instructor"),
    "llama_index": Environment("llama_index.txt", ("llama_index_real",)),
}


def python_of(work: Path, requirements: str) -> Path:
    """The interpreter of the environment with these requirements, made unless it is there."""
    home = work / (HERE / requirements).resolve().relative_to(ROOT).as_posix().replace("/", "-")
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / requirements)], check=True)
        (home / "complete").touch()
    return python


def node_of(work: Path) -> Path:
    """The folder with npm's packages. Claude Code's own step puts its program in place."""
    home = work / "node"
    if not (home / "complete").exists():
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "node" / "package.json", home)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"], cwd=home, check=True)
        subprocess.run(["node", "install.cjs"], cwd=home / "node_modules/@anthropic-ai/claude-code", check=True)
        (home / "complete").touch()
    return home


def run(name: str, work: Path, reports: Path, arguments: list[str]) -> int:
    environment = ENVIRONMENTS[name]
    variables = dict(os.environ)
    if environment.npm:
        variables["LLM_TEST_NODE"] = str(node_of(work))
    files = [f"tests/integration/test_{each}.py" for each in environment.tests]
    chosen = ["-k", environment.only] if environment.only else []
    report = ["--junitxml", str(reports / f"{name}.xml"), "-o", "junit_family=xunit1"]
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-rfE"]
    command = [str(python_of(work, environment.requirements)), "-m", "pytest", *files, *chosen, *report, *quiet]
    command += environment.options
    print(f"== {name}", flush=True)
    return subprocess.run([*command, *arguments], cwd=ROOT, env=variables, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    asked = parser.parse_args(own[:cut])
    asked.reports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)).resolve()
        codes = [run(name, work, asked.reports.resolve(), own[cut + 1 :]) for name in asked.only]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
