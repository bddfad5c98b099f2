"""A type checker on a user's script: wrong names and types are errors, right ones pass, results have their types."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")

START = """\
from pydantic import BaseModel
from llm_inference import LLMInferencer


class City(BaseModel):
    name: str
    population: int


llm = LLMInferencer("vllm", "m")


async def main() -> None:
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mypy's cache, so that the module itself is checked once."""
    return tmp_path_factory.mktemp("mypy")


def check(folder: Path, cache: Path, *lines: str) -> tuple[int, dict[str, list[str]]]:
    """mypy's exit status, and what mypy reports for each of these lines (in an async function)."""
    script = folder / "script.py"
    script.write_text(START + "".join(f"    {line}\n" for line in lines))
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty", "--follow-imports=silent"]
    done = subprocess.run(
        [*command, "--hide-error-context", "--cache-dir", str(cache), str(script)],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    messages: dict[str, list[str]] = {line: [] for line in lines}
    first = START.count("\n") + 1
    for number, message in re.findall(r"^script\.py:(\d+): (.*)$", done.stdout, re.MULTILINE):
        assert int(number) >= first, done.stdout
        messages[lines[int(number) - first]].append(message)
    return done.returncode, messages


WRONG = [
    'llm.generate("x", max_token=5)',
    'llm.generate("x", temperature="hot")',
    'llm.generate("x", model="x")',
    'llm.generate("x", stop=5)',
    "llm.generate(5)",
    'llm.chat("x", max_token=5)',
    'llm.chat([{"role": "user", "content": "x"}], temperature="hot")',
    'llm.complete("x", top_p="all")',
    'llm.stream("x", max_tokens="5")',
    'llm.structured_generate("x", schema=City, max_token=5)',
    'llm.structured_generate("x", scheme=City)',
    'llm.batch(["x"], temperatur=0.5)',
    'await llm.agenerate("x", max_token=5)',
    'await llm.achat("x", temperature="hot")',
    'await llm.acomplete("x", model="x")',
    'llm.astream("x", max_token=5)',
    'await llm.astructured_generate("x", schema=City, max_token=5)',
    'await llm.abatch(["x"], temperatur=0.5)',
    'LLMInferencer("vllm", model="x")',
    'LLMInferencer("vllm", base_urls="127.0.0.1:8000")',
]


def test_wrong_names_and_types_are_errors(tmp_path: Path, cache: Path) -> None:
    _, found = check(tmp_path, cache, *WRONG)
    assert [line for line, messages in found.items() if not any("error:" in each for each in messages)] == []


def test_a_right_script_passes(tmp_path: Path, cache: Path) -> None:
    status, found = check(
        tmp_path,
        cache,
        'llm.generate("x", max_tokens=5, temperature=0.5, stop=["a", "b"], seed=1)',
        'llm.generate("x", model_name="other", temperature=0, engine_options={"ignore_eos": True})',
        'llm.chat([{"role": "user", "content": "x"}], max_tokens=5, top_p=0.9)',
        'llm.complete("x", logprobs=True, top_logprobs=2)',
        'llm.structured_generate("x", schema={"city": "string"}, max_tokens=5)',
        'llm.batch(["x", "y"], max_tokens=5)',
        'llm.embed(["x", "y"])',
        'llm.stream("x").close()',
        'await llm.agenerate("x", max_tokens=5)',
        'await llm.astructured_generate("x", schema=City, temperature=0.0)',
        'LLMInferencer("ollama", "llama3.2", base_url="http://127.0.0.1:11434")',
    )
    assert status == 0, found


REVEALED = {
    'llm.generate("x")': "str",
    'llm.chat("x")': "str",
    'llm.complete("x")': "llm_inference.Completion",
    'llm.stream("x")': "typing.Iterator[str]",
    'llm.structured_generate("x", schema=City)': "script.City",
    'llm.structured_generate("x", schema={"city": "string"})': "dict[str, Any]",
    'llm.structured_generate("x", schema=list[City])': "list[script.City]",
    'await llm.agenerate("x")': "str",
    'await llm.acomplete("x")': "llm_inference.Completion",
    'llm.astream("x")': "typing.AsyncIterator[str]",
    'await llm.astructured_generate("x", schema=City)': "script.City",
}
#: other spellings of the same type, by version of mypy and by what a generator may be annotated as
SPELLINGS = {
    "builtins.": "",
    "collections.abc.": "typing.",
    "Generator[str, None, None]": "Iterator[str]",
    "AsyncGenerator[str, None]": "AsyncIterator[str]",
}


def test_results_have_their_types(tmp_path: Path, cache: Path) -> None:
    _, found = check(tmp_path, cache, *(f"reveal_type({call})" for call in REVEALED))
    revealed = {}
    for call in REVEALED:
        text = " ".join(found[f"reveal_type({call})"])
        for spelling, usual in SPELLINGS.items():
            text = text.replace(spelling, usual)
        match = re.search(r'Revealed type is "(.*?)"', text)
        revealed[call] = match[1] if match else text
    assert revealed == REVEALED
