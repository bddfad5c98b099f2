"""Runs what npm installed: command lines and scripts, in an environment of their own, pointed at one server."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "node"
#: LLM_TEST_NODE: the folder in which `npm install` was run with node/package.json
MODULES = Path(os.environ.get("LLM_TEST_NODE") or HERE).resolve() / "node_modules"
KEY = "none"
needed = pytest.mark.skipif(
    not MODULES.exists(), reason="no node_modules: npm install in tests/integration/node, or LLM_TEST_NODE"
)


def version(package: str) -> str:
    found: str = json.loads((MODULES / package / "package.json").read_text())["version"]
    return found


def tool(name: str) -> str:
    """The path of a command."""
    return str(MODULES / ".bin" / name)


def environment(home: Path, **more: str) -> dict[str, str]:
    """Nothing of whoever runs the tests, their keys above all; `home` is an empty folder."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb", "NO_COLOR": "1", **more}


def run(argv: list[str], home: Path, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=home,
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def claude(url: str, model: str, home: Path, *args: str, timeout: float = 120, max_tokens: int = 256) -> dict[str, Any]:
    """`claude -p`, and its result: `is_error`, `result`, `terminal_reason` …"""
    quiet = dict.fromkeys(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY", "DISABLE_AUTOUPDATER"), "1")
    fixed = {"CLAUDE_CODE_MAX_RETRIES": "0", "MCP_CONNECTION_NONBLOCKING": "0"}
    fixed["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(max_tokens)
    argv = [tool("claude"), "-p", "--model", model, "--output-format", "json", *args]
    done = run(argv, home, timeout, ANTHROPIC_BASE_URL=url, ANTHROPIC_API_KEY=KEY, **quiet, **fixed)
    assert done.stdout.strip(), f"{done.returncode}: {done.stderr}"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {**lines[-1], "events": lines}


def codex(url: str, model: str, home: Path, *args: str, timeout: float = 120) -> list[dict[str, Any]]:
    """`codex exec`, and its events."""
    provider = f'{{name="ours",base_url="{url}/v1",wire_api="responses",env_key="OUR_KEY"'
    provider += ",request_max_retries=0,stream_max_retries=0}"
    settings = ["-c", 'model_provider="ours"', "-c", f"model_providers.ours={provider}"]
    argv = [tool("codex"), "exec", "--skip-git-repo-check", "--json", "-m", model, *settings, *args]
    done = run(argv, home, timeout, OUR_KEY=KEY)
    assert done.stdout.strip(), f"{done.returncode}: {done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def script(name: str, feature: str, url: str, model: str, home: Path, timeout: float = 120) -> Any:
    """What `node/NAME.mjs FEATURE` prints, as JSON. The script must lie beside node_modules to find the packages."""
    for source in HERE.glob("*.mjs"):
        if MODULES.parent != HERE:
            (MODULES.parent / source.name).write_text(source.read_text())
    done = run(["node", str(MODULES.parent / f"{name}.mjs"), feature], home, timeout, URL=url, MODEL=model, KEY=KEY)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return json.loads(done.stdout.splitlines()[-1])
