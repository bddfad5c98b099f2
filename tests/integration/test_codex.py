"""The Codex CLI (npm) on /v1/responses. Every request that it makes must be answered.

On the fakes the whole of it, with its tools; on the real engines its requests with short instructions, which a model of
135 million parameters reads in reasonable time.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import TEXT
from tests.integration import npm
from tests.integration.conftest import Recorded, Target

pytestmark = [npm.needed, pytest.mark.usefixtures("alone"), pytest.mark.client("Codex CLI", "npm:@openai/codex")]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
FREE = "--dangerously-bypass-approvals-and-sandbox"
#: what it sends to /v1/responses; a new one makes the test fail, to be looked at
FIELDS = {
    "client_metadata",
    "include",
    "input",
    "instructions",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "store",
    "stream",
    "text",
    "tool_choice",
    "tools",
}


def ask(stand: Recorded, home: Path, *args: str) -> list[dict[str, Any]]:
    return npm.codex(stand.url, stand.model, home, *args)


def answered(stand: Recorded) -> None:
    """Every request of the client was one that we know, and was answered."""
    assert not stand.recorder.failures()
    assert {each.route for each in stand.recorder.seen} == {"POST /v1/responses"}
    for each in stand.recorder.seen:
        assert set(each.json) <= FIELDS, set(each.json) - FIELDS


def said(events: list[dict[str, Any]], kind: str = "agent_message") -> list[str]:
    items = [each["item"] for each in events if each["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == kind]


def failure(events: list[dict[str, Any]]) -> str:
    (found,) = [each["error"]["message"] for each in events if each["type"] == "turn.failed"]
    return str(found)


def results(stand: Recorded) -> list[str]:
    """What the engine was told that tools said."""
    return [message["content"] for message in stand.engine.body["messages"] if message["role"] == "tool"]


def test_text(recorded: Recorded, tmp_path: Path) -> None:
    events = ask(recorded, tmp_path, "hi")
    assert said(events) == [TEXT]
    assert events[-1]["usage"]["output_tokens"] > 0
    answered(recorded)


def test_tools(recorded: Recorded, tmp_path: Path) -> None:
    """The model thinks and calls a command, Codex runs it, and sends the result and the thinking back."""
    recorded.engine.reasoning = "I must look."
    recorded.engine.tool_call = ("exec_command", {"cmd": "echo forty-two > made; cat made"})
    events = ask(recorded, tmp_path, FREE, "make it")
    assert said(events) == [TEXT]
    assert said(events, "reasoning") == ["I must look."] * 2
    assert (tmp_path / "made").read_text() == "forty-two\n"
    assert "forty-two" in results(recorded)[0]
    kinds = [item["type"] for item in recorded.recorder.seen[-1].json["input"]]
    assert kinds[-3:] == ["reasoning", "function_call", "function_call_output"]
    answered(recorded)


def test_an_mcp_server(recorded: Recorded, tmp_path: Path) -> None:
    """Its tools come in a namespace, and a call of one must come back in it."""
    recorded.engine.tool_call = ("mcp__sky__weather", {"city": "Köln"})
    config = f"mcp_servers.sky={{command={json.dumps(SERVER[0])},args={json.dumps(SERVER[1:])},required=true}}"
    events = ask(recorded, tmp_path, FREE, "-c", config, "Weather?")
    assert said(events) == [TEXT]
    assert "sunny in Köln" in results(recorded)[0]
    calls = [item for item in recorded.recorder.seen[-1].json["input"] if item["type"] == "function_call"]
    assert [(item["namespace"], item["name"]) for item in calls] == [("mcp__sky", "weather")]
    answered(recorded)


@pytest.mark.parametrize("how", ["attached", "viewed by a tool"])
def test_an_image(how: str, tmp_path: Path) -> None:
    (tmp_path / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    with Recorded("llamacpp", capabilities=["vision"]) as stand:
        args = ["-i", "pixel.png"]
        if how != "attached":
            stand.engine.tool_call = ("view_image", {"path": str(tmp_path / "pixel.png")})
            args = []
        assert said(ask(stand, tmp_path, "What is it?", *args)) == [TEXT]
        assert "data:image/png" in json.dumps(stand.engine.body["messages"])
        answered(stand)


def test_structured_output(recorded: Recorded, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    recorded.engine.answer = lambda _: '{"city": "Paris"}'
    events = ask(recorded, tmp_path, "--output-schema", "schema.json", "capital?")
    assert [json.loads(text) for text in said(events)] == [{"city": "Paris"}]
    answered(recorded)


def test_a_session_that_goes_on(recorded: Recorded, tmp_path: Path) -> None:
    events = ask(recorded, tmp_path, "first question")
    ask(recorded, tmp_path, "resume", events[0]["thread_id"], "second question")
    sent = json.dumps(recorded.engine.body["messages"], ensure_ascii=False)
    assert sent.index("first question") < sent.index(TEXT) < sent.index("second question")
    answered(recorded)


def test_a_prompt_that_is_too_long_is_known(tmp_path: Path) -> None:
    with Recorded("vllm") as stand:
        stand.engine.replay_chat("ctx_overflow")
        assert "ran out of room in the model's context window" in failure(ask(stand, tmp_path, "hi"))


def test_a_model_that_is_not_there_is_said(recorded: Recorded, tmp_path: Path) -> None:
    assert "no engine serves the model 'nobody'" in failure(npm.codex(recorded.url, "nobody", tmp_path, "hi"))


# ------------------------------------------------------------------------------------------------ real engines


def real(target: Target, home: Path, *args: str) -> list[dict[str, Any]]:
    (home / "short.md").write_text("You answer in one short sentence.")
    brief = ["-c", 'model_instructions_file="short.md"', "-c", 'web_search="disabled"']
    for feature in ("multi_agent", "goals", "apps", "plugins"):
        brief += ["--disable", feature]
    return npm.codex(target.url, target.model, home, *brief, *args, timeout=300)


def test_real_text(target: Target, tmp_path: Path) -> None:
    events = real(target, tmp_path, "What is the capital of France?")
    assert events[-1]["type"] == "turn.completed", events
    assert events[-1]["usage"]["output_tokens"] > 0
