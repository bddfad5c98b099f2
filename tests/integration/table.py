"""Makes README.md beside this from the reports of `python -m tests.integration.run REPORTS`.

python -m tests.integration.table REPORTS
"""

import json
import re
import sys
import xml.etree.ElementTree as xml
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REAL = ("llama.cpp", "vLLM", "vLLM alone")
HEADS = {"llama.cpp": "llama.cpp, embedded", "vLLM": "vLLM, through us", "vLLM alone": "the same vLLM, straight"}
FAKES = "scripted engines"
COLUMNS = (*REAL, FAKES)
OURS = ("llama.cpp", "vLLM", FAKES)
MARKS = {"passed": "ok", "failed": "**fails**", "limit": "limit", "skipped": "–"}
#: words of a failure → its cause, where it was looked into
EXPLAINED = {
    "KeyError: 'France'": "LlamaIndex sends `tool_choice: null` here; the model then calls a tool that nobody offered",
    "event `response.incomplete`": "the model talks on to the limit, which openai-agents takes for an error",
    "assert '400' == 'context_length_exceeded'": "vLLM gives the status for a code",
    "'BadRequestError' == 'invalid_request_error'": "vLLM's own type of error, which Anthropic's API does not have",
    "None == 'model'": "vLLM lists models in OpenAI's form to an Anthropic client",
    "subprocess.TimeoutExpired": "Codex sends no limit, and the model sometimes talks on to the end of its context",
    "for Capital": "vLLM enforces the schema of a forced call only with `strict`; we ask it to",
}
INTRO = """# Clients against the server

Made by `python -m tests.integration.table` from the reports of several runs; do not edit. Last test: {date} UTC. Of a
test that was run again, the last result counts.

Each client is the published one, pointed at this server by its own settings only. The engines are real: the embedded
llama.cpp, and vLLM on the CPU with its hermes parser, both with SmolLM2-135M-Instruct and the template `tools.jinja`,
and the same vLLM without us. *Scripted engines* are the four fakes (Ollama, vLLM, SGLang, llama.cpp), for what such a
small model would not do: whole agents with their tools.

**ok**: passed. **fails**: failed; its message is below. **limit**: the engine or the client cannot do it; the cause is
below. **–**: not run there. A number is passed of run.

    python -m tests.integration.run REPORTS      # installs the clients; runs them on the embedded engine
    python -m tests.engines serve vllm -- --max-model-len 8192 --chat-template "$PWD/tests/integration/tools.jinja"
    LLM_TEST_VLLM_URL=http://127.0.0.1:PORT LLM_TEST_STRAIGHT=1 python -m tests.integration.run REPORTS
    python -m tests.integration.table REPORTS

The two command lines, pointed at a server of ours:

    ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=unused claude --model ENGINE/MODEL
    KEY=unused codex -m ENGINE/MODEL -c model_provider='"ours"' \\
     -c model_providers.ours='{{name="ours",base_url="http://localhost:8000/v1",wire_api="responses",env_key="KEY"}}'

Give Codex no alias that is a name of OpenAI's own (`gpt-…`): for those it sends its tools as an `additional_tools` item
with custom tools, which no engine here has; it is refused by name.
"""


@dataclass(frozen=True)
class Result:
    client: str
    feature: str
    engine: str
    versions: str
    outcome: str
    why: str
    sent: str = ""  #: what the client asked, as JSON (conftest.py: `recorded`)

    @property
    def column(self) -> str:
        return FAKES if self.engine.startswith("fake") or not self.engine else self.engine


def outcome_of(case: xml.Element) -> tuple[str, str]:
    """passed, failed, limit or skipped, and why."""
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            return "failed", why(found)
    skipped = case.find("skipped")
    if skipped is None:
        return "passed", ""
    expected = skipped.get("type") == "pytest.xfail"
    return "limit" if expected else "skipped", skipped.get("message") or ""


def why(failure: xml.Element) -> str:
    """The last error that the failure tells of, on one line and without addresses."""
    errors = re.findall(r"^E   (\S.*)$", failure.text or "", re.MULTILINE) or [failure.get("message") or "?"]
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", errors[0])
    text = re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|0x[0-9a-f]+", "…", text)
    return re.sub(r"\s+", " ", text)[:260]


def results_of(report: Path) -> tuple[str, list[Result]]:
    found, date = [], ""
    for suite in xml.parse(report).getroot().iter("testsuite"):
        date = max(date, (suite.get("timestamp") or "")[:16])
        for case in suite.iter("testcase"):
            told = {each.get("name"): each.get("value") or "" for each in case.iter("property")}
            if "client" in told:
                outcome, reason = outcome_of(case)
                fields = [told[name] for name in ("client", "feature", "engine", "versions")]
                found.append(Result(*fields, outcome, reason, told.get("sent", "")))
    return date, found


def last_of(results: list[Result]) -> list[Result]:
    """One result for each test and engine: the last, and a skip only where there is no other."""
    results = sorted(results, key=lambda each: each.outcome != "skipped")
    return list({(each.client, each.feature, each.engine): each for each in results}.values())


def cell(results: list[Result], notes: dict[str, int]) -> str:
    """One mark where all results are alike; else passed of run, and the causes."""
    ran = [each for each in results if each.outcome != "skipped"]
    if not ran:
        return MARKS["skipped"]
    passed = sum(each.outcome == "passed" for each in ran)
    causes = {each.why for each in ran if each.why}
    numbers = " ".join(f"[{notes.setdefault(cause, len(notes) + 1)}]" for cause in sorted(causes))
    outcomes = {each.outcome for each in ran}
    text = MARKS[outcomes.pop()] if len(outcomes) == 1 else f"{passed} of {len(ran)}"
    if len(ran) > 1 and text == MARKS["passed"]:
        text = f"ok ({len(ran)})"
    return f"{text} {numbers}".strip()


def summary(results: list[Result]) -> list[str]:
    lines = ["| client | " + " | ".join(HEADS.get(each, each) for each in COLUMNS) + " |", "|---|" + "--:|" * 4]
    clients = sorted({each.client for each in results}, key=str.lower)
    for client in [*clients, ""]:
        cells = []
        for column in COLUMNS:
            ran = [each for each in results if each.column == column and client in ("", each.client)]
            ran = [each for each in ran if each.outcome != "skipped"]
            cells.append(f"{sum(each.outcome == 'passed' for each in ran)} of {len(ran)}" if ran else "–")
        lines.append(f"| {client or '**all**'} | " + " | ".join(cells) + " |")
    return lines


def features(client: str, results: list[Result], notes: dict[str, int]) -> list[str]:
    """Each feature on each engine; of a standard suite only what did not pass everywhere."""
    rows: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for each in results:
        rows[each.feature][each.column].append(each)
    versions = sorted({each.versions for each in results})[-1]
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    lines = [f"### {client}", "", f"{versions}.", ""]
    if "standard suite" in client:
        alike = [name for name, row in rows.items() if not _differs(row)]
        lines += [
            f"{len(alike)} of {len(rows)} tests passed, or were not offered, on all of them. The others:",
            "",
        ]
        rows = {name: row for name, row in rows.items() if name not in alike}  # type: ignore[assignment]
    lines += ["| | " + " | ".join(HEADS.get(each, each) for each in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(column, []), notes) for column in columns) + " |")
    return [*lines, "", *asked(results)]


def asked(results: list[Result]) -> list[str]:
    """What the client sent to the scripted engines: its routes and fields, and what was left out and named."""
    seen: dict[str, set[str]] = defaultdict(set)
    for each in results:
        for name, values in json.loads(each.sent or "{}").items():
            seen[name] |= set(values)
    if not seen:
        return []
    said = {"routes": "It asked", "fields": "With the fields", "ignored": "Left out, and named in `X-Ignored-Fields`"}
    return [f"{text}: {', '.join(f'`{each}`' for each in sorted(seen[name]))}." for name, text in said.items()] + [""]


def _differs(row: dict[str, list[Result]]) -> bool:
    return any(each.outcome in ("failed", "limit") for results in row.values() for each in results)


def document(reports: Path) -> tuple[str, int]:
    read = sorted((results_of(report) for report in reports.glob("*.xml")), key=lambda pair: pair[0])
    dates = [date for date, _ in read]
    results = last_of([each for _, found in read for each in found])
    notes: dict[str, int] = {}
    lines = [INTRO.format(date=max(dates).replace("T", " ")), *summary(results), ""]
    for client in sorted({each.client for each in results}, key=str.lower):
        lines += features(client, [each for each in results if each.client == client], notes)
    lines += ["## Causes", ""] + [f"{number}. {_plain(cause)}" for cause, number in notes.items()]
    failed = sum(each.outcome == "failed" and each.column in OURS for each in results)
    return "\n".join(lines) + "\n", failed


def _plain(text: str) -> str:
    """The words of a failure as a line of the list, with its cause."""
    causes = [cause for words, cause in EXPLAINED.items() if words in text]
    found = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return f"{causes[0]}: {found}" if causes else found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    text, failed = document(Path(sys.argv[1]))
    (HERE / "README.md").write_text(text)
    print(f"{HERE.name}/README.md: {failed} failures through us")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
