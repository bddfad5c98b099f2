"""The short conformance run on real engines: nothing is silently dropped; and the judge itself can fail."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_inference
from llm_inference import InvalidRequest, LLMInferencer
from tests.conformance import __main__ as command
from tests.conformance import breadth, features, judge, recorded, schemas, sides, table, validity
from tests.conftest import Attach
from tests.fake_engine import FakeEngine

ROWS = {row.name: row for row in features.FEATURES}


def no_drops(llm: LLMInferencer) -> None:
    with sides.through_us(llm) as us:
        cells = list(judge.run(us, [row for row in command.chosen(short=True, only="") if row.name != "schema"]))
        found = validity.measure(us, 1, schemas.SHORT)
    assert {cell.feature: cell.note for cell in cells if cell.verdict == judge.DROPPED} == {}
    assert sum(cell.verdict == judge.HONOURED for cell in cells) > len(cells) / 3, cells
    assert found["wrong"] == 0 and found["valid"] >= len(schemas.SHORT) / 2, found


def test_nothing_is_dropped_on_the_embedded_engine(embedded: LLMInferencer) -> None:
    no_drops(embedded)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "ollama"])
def test_nothing_is_dropped_on_a_real_server(kind: str, real_server: Callable[[str], LLMInferencer]) -> None:
    no_drops(real_server(kind))


def schemas_of_the_world(llm: LLMInferencer) -> None:
    """Some of the schemas of `python -m tests.conformance.breadth`: a right answer, or an error that says why not."""
    cases = breadth.quick(breadth.all_cases())
    with sides.through_us(llm) as us:
        found = asyncio.run(breadth.ask_all(us, cases, ["python"], 4))
    bad = [(each.case.id, each.why) for each in found if each.verdict == breadth.BAD]
    assert not bad, bad
    assert sum(each.verdict in ("engine", "checked") for each in found) >= len(cases) / 2, found


def test_real_world_schemas_on_the_embedded_engine(embedded: LLMInferencer) -> None:
    schemas_of_the_world(embedded)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_real_world_schemas_on_a_real_server(kind: str, real_server: Callable[[str], LLMInferencer]) -> None:
    schemas_of_the_world(real_server(kind))


def test_there_are_three_hundred_real_world_schemas() -> None:
    cases = breadth.all_cases()
    assert len(cases) >= 300 and len({case.id for case in cases}) == len(cases)
    assert min(Counter(case.source for case in cases).values()) >= 70


def case_of(schema: dict[str, Any], given: Any = None) -> breadth.Case:
    return breadth.Case("test", "x", schema if given is None else given, schema)


INTEGER = {"type": "integer"}
BREADTH: dict[str, tuple[breadth.Case, str, str]] = {
    "right": (case_of(INTEGER), "5", "engine"),
    "checked": (case_of({"type": "integer", "multipleOf": 5}), "5", "checked"),
    "misfit of what is checked": (case_of({"type": "integer", "multipleOf": 5}), "6", "misfit"),
    "misfit of what is claimed": (case_of(INTEGER), '"x"', "BAD"),
    "cut": (case_of(INTEGER), "[1, ", "cut"),
    "refused by name": (case_of({"type": "string", "nullable": True}), "5", "refused"),
    "refused without a name": (case_of({"$ref": "#/a/b"}), "5", "BAD"),
}


@pytest.mark.parametrize("name", BREADTH)
def test_the_judge_of_real_world_schemas(name: str, attach: Attach) -> None:
    case, text, verdict = BREADTH[name]
    with FakeEngine("vllm") as engine:
        engine.answer = lambda asked: text
        outcome = asyncio.run(breadth.ask_python(attach(engine), case, "python"))
    if name == "refused without a name":
        outcome = breadth.Outcome(case, "python", *breadth._of_error(case, InvalidRequest("no", "no"), "none"))
    assert outcome.verdict == verdict, outcome


def test_a_wrong_answer_that_is_passed_off_is_noticed(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_inference.SchemaCheck, "__call__", lambda self, value: None)
    with FakeEngine("vllm") as engine:
        engine.answer = lambda asked: '"x"'
        outcome = asyncio.run(breadth.ask_python(attach(engine), case_of(INTEGER), "python"))
    assert outcome.verdict == "BAD" and "passed off" in outcome.why


# ----------------------------------------------------------------------------------------------------- the judge itself


def heedless(ask: dict[str, Any]) -> str:
    """An engine that looks at the temperature, and at nothing else."""
    prompt = str(ask["messages"][-1]["content"])
    if "hello" in prompt:
        return "hello " * 20
    words = "the quick brown fox jumps over a lazy dog and then runs home to sleep until the morning".split()
    return " ".join(words if not ask.get("temperature") else random.choices(words, k=16))


@pytest.fixture(scope="module", params=["through us", "bare"])
def side(request: pytest.FixtureRequest) -> Iterator[sides.Side]:
    """A vLLM that heeds the temperature and max_tokens alone, through us and bare."""
    with FakeEngine("vllm") as engine, sides.through_us(LLMInferencer("vllm", base_url=engine.base_url)) as us:
        engine.answer = heedless
        yield us if request.param == "through us" else sides.bare_side(us)
        us.llm.close()


def verdict(side: sides.Side, name: str) -> str:
    return judge.decide(ROWS[name], side).verdict


DROPPED = (
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop, a text",
    "stop, a list",
    "stop inside a stream",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "tools, tool_choice auto",
    "images",
    "/v1 n",
    "/v1 logit_bias",
)
WE_REFUSE = (
    "an unknown field",
    "/v1 an unknown field",
    "/v1 guided_json",
    "/v1 regex",
    "/v1 format",
    "/v1 a remote image URL",
    "a broken regex",
    "two constraints at once",
)
WE_CHECK = (
    "schema",
    "schema inside a stream",
    "any JSON object",
    "choice",
    "regex",
    "/v1 response_format json_schema",
    "/v1 response_format json_schema, streamed",
    "/v1 structured_outputs",
)


@pytest.mark.parametrize("name", DROPPED)
def test_the_judge_sees_what_a_heedless_engine_drops(side: sides.Side, name: str) -> None:
    assert verdict(side, name) == judge.DROPPED


@pytest.mark.parametrize("name", WE_REFUSE)
def test_what_the_engine_drops_we_refuse(side: sides.Side, name: str) -> None:
    assert verdict(side, name) == (judge.DROPPED if side.bare else judge.REFUSED)


@pytest.mark.parametrize("name", WE_CHECK)
def test_a_wrong_answer_of_the_engine_is_an_error(side: sides.Side, name: str) -> None:
    assert verdict(side, name) == (judge.DROPPED if side.bare else judge.FAILED)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "temperature",
        "a cut answer says `length`",
        "a stream spells the whole answer",
        "/v1 stream_options",
    ],
)
def test_the_judge_sees_what_is_kept(side: sides.Side, name: str) -> None:
    assert verdict(side, name) == judge.HONOURED


def test_greedy_sampling_does_not_decide_a_cell(fake: Callable[..., FakeEngine], attach: Attach) -> None:
    with sides.through_us(attach(fake("vllm"))) as us:
        assert verdict(us, "top_k") == judge.UNDECIDED
        assert verdict(us, "temperature") == judge.DROPPED


def test_an_error_that_does_not_name_the_field_is_no_refusal() -> None:
    def decide(side: sides.Side) -> None:
        raise judge.Refusal("http 400", "bad request", True)

    row = judge.Feature("top_k", decide, "top_k", short=True)
    assert judge.decide(row, None).verdict == judge.FAILED  # type: ignore[arg-type]


def test_wrong_json_is_counted_as_wrong(fake: Callable[..., FakeEngine], attach: Attach) -> None:
    engine = fake("vllm")
    engine.answer = lambda ask: '{"city": "Paris", "population": "many"}'
    with sides.through_us(attach(engine)) as us:
        through, bare = (validity.measure(side, 1, ["flat object"]) for side in (us, sides.bare_side(us)))
    assert (through["honest error"], through["wrong"]) == (1, 0)
    assert bare["wrong"] == 1


def test_the_command_fails_on_a_drop_and_writes_what_it_saw(
    fake: Callable[..., FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, out = fake("vllm"), tmp_path / "vllm.json"
    engine.answer = heedless
    line = [
        "--engine",
        "vllm",
        "--base-url",
        engine.base_url,
        "--bare",
        "--only",
        "an unknown field",
        "--json",
        str(out),
    ]
    assert command.main(line) == 0  # only the bare engine drops it
    assert "DROPPED" in capsys.readouterr().out
    shown = table.markdown([json.loads(out.read_text())])
    assert "| an unknown field | refused | **dropped** |" in shown
    assert command.main(["--engine", "vllm", "--base-url", engine.base_url, "--only", "top_k"]) == 1


def test_recorded_drops_are_read_from_the_transcripts() -> None:
    verdicts = {
        (engine, cell.feature): cell.verdict
        for engine in ("ollama", "sglang")
        for cell in recorded.recorded_cells(engine)
    }
    assert (
        verdicts["sglang", "/v1 guided_json"]
        == verdicts["ollama", "/v1 n"]
        == verdicts["ollama", "a prompt that does not fit"]
        == judge.DROPPED
    )
    assert verdicts["sglang", "/v1 n"] == judge.HONOURED
    assert verdicts["ollama", "images"] == judge.REFUSED


def test_fifty_schemas_and_the_committed_results_hold_no_drop() -> None:
    assert len(schemas.SCHEMAS) == 50
    results = (Path(__file__).parent / "conformance" / "results").glob("*.json")
    sides = [path for path in results if not path.name.startswith("breadth_")]
    assert len(sides) >= 3
    for path in sides:
        result = json.loads(path.read_text())
        assert [cell["feature"] for cell in result["us"] if cell["verdict"] == judge.DROPPED] == [], path
        assert result.get("validity", {}).get("wrong", 0) == 0, path


def test_the_tables_of_real_world_schemas_are_those_of_the_results() -> None:
    folder = Path(breadth.__file__).parent
    results = [json.loads(path.read_text()) for path in folder.glob("results/breadth_*.json")]
    assert results
    for result in results:
        assert breadth.table(result) in (folder / "README.md").read_text()
        assert result["schemas"] >= 300
