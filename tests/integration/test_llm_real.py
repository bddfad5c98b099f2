"""simonw/llm on real engines, by its own file of extra OpenAI models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.asked import QUESTION
from tests.integration.conftest import Target

pytest.importorskip("llm")
pytestmark = pytest.mark.client("llm", "llm")
FIXED = ["-o", "temperature", "0", "-o", "max_tokens", "96"]


def run(target: Target, home: Path, *args: str) -> str:
    known = f"supports_schema: true\n  supports_tools: true\n  api_base: {target.v1}\n  api_key_name: ours"
    text = f"- model_id: ours\n  model_name: {target.model}\n  {known}\n"
    (home / "extra-openai-models.yaml").write_text(text)
    (home / "keys.json").write_text('{"ours": "none"}')
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LLM_USER_PATH": str(home)}
    command = [sys.executable, "-m", "llm", "prompt", "-m", "ours", *FIXED, *args]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_text(target: Target, tmp_path: Path, streamed: bool) -> None:
    assert "Paris" in run(target, tmp_path, *([] if streamed else ["--no-stream"]), QUESTION)


def test_schema(target: Target, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    assert json.loads(run(target, tmp_path, "--schema", json.dumps(schema), QUESTION))["city"] in ("Paris", "Rome")


def test_tools(target: Target, tmp_path: Path) -> None:
    code = 'def weather(city: str) -> str:\n    "The weather in a city."\n    return "sunny in " + city\n'
    assert run(target, tmp_path, "--functions", code, "What is the weather in Paris?").strip()


def test_a_conversation(target: Target, tmp_path: Path) -> None:
    run(target, tmp_path, QUESTION)
    assert run(target, tmp_path, "-c", "And of Spain?").strip()
