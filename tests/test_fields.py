"""The table of fields against the engines' own request models, and the values that ask for nothing.

engine_fields.json holds the field names of the models: engine → version → surface (c chat, p completions, e embeddings,
r rerank, t tokenize, d detokenize;
of Ollama /api/chat, /api/generate and /api/embed, and its `options`). vLLM and SGLang are compared with the real models
where `tests/engines.py install` has made their environments; llama.cpp and Ollama were read from their sources.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llm_inference import (
    ENGINES,
    NO_OPS,
    NOT_FOR_CALLERS,
    OFF,
    SINCE,
    SURFACES,
    column,
    field_rows,
    harmless,
    is_off,
    version_tuple,
    without_no_ops,
)
from tests import engines
from tests.conformance.table import fields_markdown

MODELS: dict[str, dict[str, dict[str, list[str]]]] = json.loads(
    Path(__file__).with_name("engine_fields.json").read_text()
)
#: In the request model, and without effect: (surfaces, fields). Each was looked up in the server's source, or tried.
UNUSED_BY = {
    "vllm": {"cp": "mm_payload return_mm_kwargs return_token_offsets user session_id", "e": "user"},
    "sglang": {"cp": "user session_id", "c": "task", "p": "best_of suffix", "e": "user"},
    "llamacpp": {
        "cp": "response_fields return_tokens echo sse_ping_interval",
        "p": "continue_final_message reasoning_format reasoning_budget_tokens reasoning_budget_message",
    },
    "ollama": {},
}
#: Ollama's fields that its adapter fills from OpenAI's, and those of /api/generate that do not go with a raw prompt.
ADAPTERS_OWN = {"ollama": {"c": "think", "p": "think suffix logprobs top_logprobs"}}
PRINT_MODELS = {
    "vllm": (
        "from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as C;"
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest as P;"
        "from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest as E;"
        "from vllm.entrypoints.pooling.scoring.protocol import RerankRequest as R;"
        "from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest as T, DetokenizeRequest as D;"
    ),
    "sglang": (
        "from sglang.srt.entrypoints.openai.protocol import "
        "ChatCompletionRequest as C, CompletionRequest as P, EmbeddingRequest as E, "
        "V1RerankReqInput as R, TokenizeRequest as T, DetokenizeRequest as D;"
    ),
}
PRINT = "import json; print(json.dumps({k: sorted(m.model_fields) for k, m in zip('cpertd', (C, P, E, R, T, D))}))"


def newest(engine: str) -> dict[str, list[str]]:
    return MODELS[engine][max(MODELS[engine], key=version_tuple)]


def listed(table: dict[str, str], surface: str) -> set[str]:
    names: set[str] = set()
    for where, fields in table.items():
        if surface in where:
            names |= set(fields.split())
    return names


@pytest.mark.parametrize("surface", "cpe")
@pytest.mark.parametrize("engine", ENGINES)
def test_every_field_of_an_engine_has_a_row_or_a_reason(engine: str, surface: str) -> None:
    known = column(engine, surface).keys() | NOT_FOR_CALLERS.keys() | listed(ADAPTERS_OWN.get(engine, {}), surface)
    known |= listed(UNUSED_BY[engine], surface)
    assert set(newest(engine)[surface]) - known == set()


@pytest.mark.parametrize("surface", "cpe")
@pytest.mark.parametrize("engine", ENGINES)
def test_every_honoured_field_is_one_that_the_engine_has(engine: str, surface: str) -> None:
    models = newest(engine)
    for name, cell in column(engine, surface).items():
        outer, _, inner = (name if cell == "=" else cell).partition(".")
        if cell in ("-", ".", "~"):
            continue
        assert outer in models[surface], (name, cell)
        if outer == "options":
            assert (inner or name) in models["options"], (name, cell)


@pytest.mark.parametrize("surface", "cpe")
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_refused_as_not_honoured_is_not_honoured(engine: str, surface: str) -> None:
    unused = listed(UNUSED_BY[engine], surface) | listed(ADAPTERS_OWN.get(engine, {}), surface)
    for name, cell in column(engine, surface).items():
        if cell in ("-", "."):
            assert name not in newest(engine)[surface] or name in unused, name


#: Sent without standing in the model: `model`, which these ignore, as they serve one; vLLM has a second model.
SENT_BESIDE = {
    ("sglang", "r"): {"model"},
    ("llamacpp", "t"): {"model"},
    ("llamacpp", "d"): {"model"},
    ("vllm", "t"): {"prompt"},
}


@pytest.mark.parametrize("surface", "rtd")
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_the_fields_of_the_routes_that_generate_nothing(engine: str, surface: str) -> None:
    own = set(newest(engine)[surface])
    honoured: set[str] = set()
    for name, cell in column(engine, surface).items():
        if cell not in ("-", ".", "~"):
            honoured.add(name if cell == "=" else cell)
        elif cell in ("-", ".") and name != "user":
            assert name not in own, name
    assert honoured - own == SENT_BESIDE.get((engine, surface), set())
    translated = {name for name, cell in column(engine, surface).items() if cell == "~"}
    assert own - honoured - translated - NOT_FOR_CALLERS.keys() == {"parse_special", "user"} & own  # always true


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_field_newer_than_the_oldest_server_says_since_when(engine: str) -> None:
    oldest = min(MODELS[engine], key=version_tuple)
    for surface, names in newest(engine).items():
        if surface not in MODELS[engine][oldest]:
            continue
        added = set(names) - set(MODELS[engine][oldest][surface])
        honoured = {name for name, cell in column(engine, surface).items() if cell == "="}
        assert added & honoured <= SINCE[engine].keys()
        old = column(engine, surface, version_tuple(oldest))
        assert "=" not in {old[name] for name in added & honoured}


def test_rows_are_well_formed_and_do_not_contradict_one_another() -> None:
    seen: set[tuple[str, str]] = set()
    for where, cells, names in field_rows():
        assert set(where) <= set("cpeortd")
        assert len(cells) == len(ENGINES)
        for name in names:
            assert name not in NOT_FOR_CALLERS or where == "r"  # the documents of chat are refused
            places = {(surface, name) for surface in where}
            assert not places & seen, name
            seen |= places


def test_a_field_is_harmless_on_all_engines_that_do_not_honour_it() -> None:
    for where, cells, names in field_rows():
        if "." in cells:
            assert "-" not in cells, names
            for surface, letter in SURFACES.items():
                assert letter not in where or harmless(surface).issuperset(names)


def test_the_markdown_names_every_field() -> None:
    table = fields_markdown()
    assert len(table.splitlines()) < 60
    for _, _, names in field_rows():
        for name in names:
            assert f"`{name}`" in table


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_models_are_those_of_the_installed_engine(engine: str) -> None:
    python = engines._home(engine) / "bin" / "python"
    if not (python.parent.parent / "complete").exists():
        pytest.skip(f"{engine} is not installed: python tests/engines.py install {engine}")
    program = PRINT_MODELS[engine] + PRINT
    environment = engines.ENVIRONMENT | engines.ENGINES[engine].environment
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == newest(engine)


# Values that ask for nothing ----------------------------------------------------------------------------------------
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "model": "m"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "more",
    [
        {"stop": [], "tools": [], "functions": [], "n": 1, "best_of": 1, "echo": False, "suffix": "", "min_tokens": 0},
        {"max_tokens": -1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "ignore_eos": False},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": []},
        {"function_call": "none", "functions": []},
        {
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "service_tier": "auto",
            "user": "",
            "metadata": {},
        },
        dict.fromkeys(column("vllm", "c").keys() - {"messages", "model"}),
    ],
)
def test_what_asks_for_nothing_is_dropped(more: dict[str, Any]) -> None:
    assert without_no_ops(ASKED | more) == ASKED


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 0},  # on /v1/completions: the chosen token's
        {"logprobs": True, "top_logprobs": 0},
        {"seed": 0, "temperature": 0},
        {"n": True},  # a wrong type is not a 1
        {"tools": [TOOL], "tool_choice": "none"},
        {"top_p": 1, "min_p": 0.0, "repetition_penalty": 1.0},  # the engine's default may be another
        {"response_format": {"type": "text", "schema": {}}},
    ],
)
def test_what_asks_for_something_is_kept(more: dict[str, Any]) -> None:
    assert without_no_ops(ASKED | more) == ASKED | more


def test_top_k_has_one_spelling_of_off() -> None:
    assert without_no_ops({"top_k": 0}) == without_no_ops({"top_k": -1}) == {"top_k": -1}


def test_off_is_told_from_false_and_zero() -> None:
    assert is_off("min_p", 0)
    assert is_off("top_p", 1.0)
    assert is_off("parallel_tool_calls", True)
    assert is_off("chat_template_kwargs", {"enable_thinking": False})
    assert not is_off("min_p", False)
    assert not is_off("parallel_tool_calls", 1)
    assert not is_off("parallel_tool_calls", False)
    assert not is_off("temperature", 0)


def test_values_are_those_of_known_fields() -> None:
    known = set(NOT_FOR_CALLERS)
    for _, _, names in field_rows():
        known |= set(names)
    assert NO_OPS.keys() | OFF.keys() <= known
