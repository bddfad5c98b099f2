"""The servers that the clients are tried on, and the row of the table that each test is.

Without variables: our server with the embedded llama.cpp. `LLM_TEST_VLLM_URL` adds our server in front of that vLLM,
and `LLM_TEST_STRAIGHT=1` the same vLLM without us. A test that asks for `target` runs on each of them, one that asks
for `recorded` on the fake engines. SmolLM2's own template knows no tools: the engines are started with `tools.jinja`.

    python -m tests.engines serve vllm -- --max-model-len 8192 --chat-template "$PWD/tests/integration/tools.jinja"
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm_inference as product
from tests.conftest import clear_environment
from tests.fake_engine import DIALECTS, Dialect
from tests.harness import Stand, serving
from tests.integration import npm
from tests.integration.recorder import Recorder

EMBEDDED = f"llamacpp/{product.DEFAULT_MODEL}"
ALIAS = "claude-3-haiku-20240307"  # some clients take only names that they know
CONTEXT = 8192  # tokens of a request; what SmolLM2 was trained on
VLLM = os.environ.get("LLM_TEST_VLLM_URL", "")
TARGETS = ["llama.cpp", *(["vLLM"] if VLLM else [])]
if VLLM and os.environ.get("LLM_TEST_STRAIGHT"):
    TARGETS.append("vLLM alone")


@dataclass(frozen=True)
class Target:
    """A server, and the name of the one model that it has."""

    name: str
    url: str  #: without /v1
    model: str
    recorder: Recorder | None = None  #: None where the server is not ours

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    @property
    def ours(self) -> bool:
        return self.recorder is not None


def _settings(name: str) -> product.Settings:
    if name == "vLLM":
        return product.Settings(engine="vllm", base_url=VLLM, aliases=(f"{ALIAS}=vllm/smollm2",))
    template = Path(__file__).with_name("tools.jinja").read_text()
    arguments = (f"n_ctx={CONTEXT}", f"chat_template={template}")
    return product.Settings(engine="llamacpp", launch_args=arguments, aliases=(f"{ALIAS}={EMBEDDED}",))


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each real engine in turn."""
    if request.param == "vLLM alone":
        model = httpx.get(f"{VLLM}/v1/models", trust_env=False).json()["data"][0]["id"]
        yield Target(request.param, VLLM, model)
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear_environment(monkeypatch)
        recorder = Recorder(product.create_app(_settings(request.param)))
        with serving(recorder) as url:
            yield Target(request.param, url, EMBEDDED if request.param == "llama.cpp" else "vllm/smollm2", recorder)


class Recorded(Stand):
    """A stand that keeps what clients send to it."""

    recorder: Recorder

    def served(self) -> Any:
        self.recorder = Recorder(self.app)
        return self.recorder


@pytest.fixture(scope="session", params=DIALECTS)
def each_recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    dialect: Dialect = request.param
    with Recorded(dialect) as stand:
        yield stand


@pytest.fixture
def recorded(request: pytest.FixtureRequest, each_recorded: Recorded) -> Iterator[Recorded]:
    """The app in front of each fake engine in turn; what it is asked is kept, and goes into the report."""
    each_recorded.engine.reset()
    seen = each_recorded.recorder.seen
    seen.clear()
    yield each_recorded
    ignored = [each.answer_headers.get("x-ignored-fields", "").split(", ") for each in seen]
    sent = {
        "routes": sorted({each.route for each in seen}),
        "fields": sorted({field for each in seen for field in each.json or ()}),
        "ignored": sorted({re.sub(r"\d+", "N", name) for names in ignored for name in names if name}),
    }
    request.node.user_properties.append(("sent", json.dumps(sent)))


# ------------------------------------------------------------------------------------------------- the table


def _version(package: str) -> str:
    """Of a package; `npm:NAME` is one of npm's."""
    try:
        if package.startswith("npm:"):
            return npm.version(package.removeprefix("npm:"))
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        return ""


def _engine(item: pytest.Item) -> str:
    """The column: the target, or the fake engine."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "target" in params:
        return str(params["target"])
    dialect = params.get("stand") or params.get("each_recorded")
    return f"fake {dialect}" if dialect else ""


def _feature(item: pytest.Item) -> str:
    """The row: the test's name, and its parameters other than the engine."""
    params = dict(getattr(getattr(item, "callspec", None), "params", {}))
    name = getattr(item, "originalname", item.name).removeprefix("test_").removeprefix("dspy_").replace("_", " ")
    rest = [str(value) for key, value in params.items() if key not in ("target", "stand", "each_recorded")]
    return f"{name} ({', '.join(rest)})" if rest else name


#: engines, what a failure says there, and its cause: nothing of ours, and more than this model can do
LIMITS = (
    (
        ("llama.cpp",),
        re.compile("there is no call of .{1,80} before max_tokens was reached"),
        "llama.cpp lets a forced call begin with free text, and this model does not come to the call",
    ),
    (
        ("llama.cpp", "vLLM", "vLLM alone"),
        re.compile(r"in test_agent_loop\n +assert any\(block\["),
        "LangChain's agent loop does not force the call, and this model answers in words",
    ),
    (
        ("llama.cpp", "vLLM", "vLLM alone"),
        re.compile("in test_json_mode\n.*(validation errors? for Joke|length limit was reached)", re.DOTALL),
        "JSON mode says the form in words alone, and this model does not keep to it, or to an end",
    ),
    (
        ("llama.cpp", "vLLM", "vLLM alone"),
        re.compile(
            "in test_structured_output_optional_param\n.*(Invalid JSON: EOF|length limit was reached)", re.DOTALL
        ),
        "a text without a bound in its schema, which this model goes on with until it is cut",
    ),
)


def _limit(engine: str, failure: str) -> str:
    """Why that failure is no fault of ours; "" where it may be one."""
    return next((why for engines, words, why in LIMITS if engine in engines and words.search(failure)), "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call" and report.failed and (reason := _limit(_engine(item), str(report.longrepr))):
        report.outcome, report.wasxfail = "skipped", reason
    return report


def _expect(item: pytest.Item) -> None:
    """What an engine cannot do must fail, and is told with its cause."""
    for mark in item.iter_markers("fails_on"):
        engines, reason = mark.args
        if _engine(item) in engines:
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _expect(item)
        mark = item.get_closest_marker("client")
        if mark is None:
            continue
        client, *packages = mark.args
        versions = [f"{package.removeprefix('npm:')} {_version(package)}" for package in packages if _version(package)]
        item.user_properties += [
            ("client", client),
            ("feature", _feature(item)),
            ("engine", _engine(item)),
            ("versions", ", ".join(versions)),
        ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "client(name, *packages): the client that a test is about, for the table")
    config.addinivalue_line("markers", "fails_on(engines, reason): what these engines cannot do")
