"""README: its commands run, its two halves agree, and the files it names exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import llm_inference as product
from tests.harness import Command
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("alone")

README = (ROOT / "README.md").read_text()
HALVES = dict(zip(("zh", "en"), README.split("\n# English\n"), strict=True))
ELSEWHERE = (
    "vllm",
    "langchain",
    "instructor",
)  # what these blocks need is not in tests/requirements.txt: tests/integration, tests/test_start.py


def blocks(half: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", HALVES[half], re.MULTILINE | re.DOTALL)


def plain(block: str) -> str:
    """Without comments, and without what a person asks the model."""
    block = re.sub(r"\s+#.*", "", block)
    return re.sub(r'("prompt": |"content": |generate\()"[^"]*"', r'\1"…"', block)


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    with Command("--engine", "llamacpp") as server:
        yield server.url.rpartition(":")[2]


@pytest.mark.parametrize("language", ["bash", "python", "json", "ini", "dockerfile"])
def test_both_halves_show_the_same_commands(language: str) -> None:
    zh, en = ([plain(block) for block in blocks(half, language)] for half in HALVES)
    if language in ("ini", "dockerfile"):  # shown once would do, but each half stands for itself
        assert len(zh) == 1
    assert zh and zh == en


def test_both_halves_have_the_same_sections_and_tables() -> None:
    zh, en = ([len(mark) for mark in re.findall(r"^(#{2,3}) ", half, re.MULTILINE)] for half in HALVES.values())
    assert zh == en
    zh, en = (len(re.findall(r"^\|", half, re.MULTILINE)) for half in HALVES.values())
    assert zh == en


@pytest.mark.parametrize("half", HALVES)
def test_the_python_runs(half: str, port: str) -> None:
    """One after the other in one process, as a reader would paste them into a notebook."""
    found = [
        block
        for block in blocks(half, "python")
        if not any(
            word in block
            for word in ELSEWHERE
            if f'"{word}' in block or f"import {word}" in block or f"from {word}" in block
        )
    ]
    assert len(found) >= 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(found).replace("8001", port)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("hi"), done.stderr


@pytest.mark.parametrize("half", HALVES)
def test_every_curl_is_answered(half: str, port: str) -> None:
    (block,) = [block for block in blocks(half, "bash") if "curl" in block]
    commands = re.findall(r"^curl .*?(?:[^\\]$)", block, re.MULTILINE | re.DOTALL)
    assert len(commands) == 7
    for command in commands:
        said = subprocess.run(
            command.replace("8001", port), shell=True, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        if "/metrics" in command:
            assert "llm_requests_total" in said
        elif '"stream"' in command:
            assert said.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(said)["code"] == 200, (command, said)


def test_every_flag_is_there() -> None:
    known = {flag for action in product.parser()._actions for flag in action.option_strings}
    for name, half in HALVES.items():
        commands = "\n".join(
            line
            for block in blocks(name, "bash")
            for line in block.splitlines()
            if line.startswith("python llm_inference.py")
        )
        shown = set(re.findall(r"(?<![\w-])--[a-z-]+", commands.replace("-- --tensor-parallel-size 2", "")))
        settings = re.search(r"^\| `--engine`.*?\n\n", half, re.MULTILINE | re.DOTALL)
        assert settings and shown <= known
        assert set(re.findall(r"`(--[a-z-]+)", settings[0])) <= known


def test_every_file_it_names_is_there() -> None:
    names = set(re.findall(r"(?:tests|\.ci)/[\w./-]*[\w/]", README))
    assert len(names) > 8 and not [name for name in names if not (ROOT / name).exists()]
    for module in set(re.findall(r"python -m (tests(?:\.\w+)+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
