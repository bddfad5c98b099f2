"""The five packages of the install line are enough (LLM_TEST_MINIMAL=1 runs it)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import llm_inference as product
from tests.fake_engine import FakeEngine
from tests.harness import Command, clean_env, payloads
from tests.processes import ROOT

FIVE = ("pydantic", "fastapi", "uvicorn", "requests", "httpx")
ABSENT = ("uvloop", "httptools", "xllamacpp", "rich", "ollama", "vllm", "sglang", "openai")


def python(interpreter: str, *args: str, **env: str) -> str:
    done = subprocess.run(
        [interpreter, *args], cwd=ROOT, capture_output=True, text=True, timeout=600, env=clean_env(**env), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(
    os.environ.get("LLM_TEST_MINIMAL") != "1", reason="installs a fresh environment: set LLM_TEST_MINIMAL=1"
)
def test_the_five_packages_are_enough(tmp_path: Path) -> None:
    python(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    five = str(tmp_path / "venv" / "bin" / "python")
    python(five, "-m", "pip", "install", "-q", "--disable-pip-version-check", *FIVE)
    script = f"""if True:
        import importlib.util
        assert not [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
        import llm_inference
        print(llm_inference.__version__)
    """
    assert python(five, "-c", script).strip() == product.__version__
    with FakeEngine("vllm") as engine:
        engine.answer = lambda ask: '{"city":"Paris","country":"France"}'
        asks = """if True:
            from llm_inference import LLMInferencer
            with LLMInferencer("vllm") as llm:
                text = llm.generate("hi")
                assert text == "".join(llm.stream("hi")) == llm.chat([{"role": "user", "content": "hi"}]), text
                print(llm.structured_generate("hi", schema={"city": "string", "country": "string"})["city"])
        """
        assert python(five, "-c", asks, VLLM_BASE_URL=engine.base_url).strip() == "Paris"
        with Command("--engine", "vllm", "--base-url", engine.base_url, python=five) as server:
            assert " 0 failed" in python(five, "llm_inference.py", "--api-test", "--port", str(server.port))
            ask = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
            assert payloads(httpx.post(f"{server.url}/v1/chat/completions", json=ask, trust_env=False))[-1] == "[DONE]"
            cut, engine.pace, engine.text, engine.answer = engine.cut, 0.05, "word " * 1000, None
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ask, trust_env=False) as reply:
                next(reply.iter_lines())
            engine.wait(lambda: engine.cut == cut + 1)  # client gone, with h11's parser too
            engine.pace, engine.text = 0, "x"
        assert '"ok": true' in python(
            five, "llm_inference.py", "--engine", "vllm", "--json", VLLM_BASE_URL=engine.base_url
        )
        missing = subprocess.run(
            [five, "llm_inference.py", "--engine", "llamacpp", "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            env=clean_env(),
            check=False,
        )
        assert missing.returncode == 1 and "pip install xllamacpp" in missing.stdout
