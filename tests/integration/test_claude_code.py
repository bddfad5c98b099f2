"""Claude Code (npm) on /v1/messages. Every request that it makes must be answered.

On the fakes the whole of it, with its tools; on the real engines its requests without most of its 70 KB of tools, which
a model of 135 million parameters neither reads in reasonable time nor uses.
"""

import base64
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import TEXT
from tests.integration import npm
from tests.integration.conftest import Recorded, Target

pytestmark = [
    npm.needed,
    pytest.mark.usefixtures("alone"),
    pytest.mark.client("Claude Code", "npm:@anthropic-ai/claude-code"),
]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
MCP = {"command": sys.executable, "args": [str(Path(__file__).with_name("mcp_server.py"))]}
#: all that it ever asked for in these tests
ROUTES = {"HEAD /", "HEAD /ui", "POST /v1/messages", "POST /v1/messages/count_tokens"}
#: what it sends to /v1/messages; a new one makes the test fail, to be looked at
FIELDS = {
    "context_management",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "output_config",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
}


def ask(stand: Recorded, home: Path, *args: str) -> dict[str, Any]:
    return npm.claude(stand.url, stand.model, home, *args)


def answered(stand: Recorded) -> None:
    """Every request of the client was one that we know, and was answered."""
    recorder = stand.recorder
    assert not [each for each in recorder.failures() if not each.startswith("HEAD / 307")]
    assert {each.route for each in recorder.seen} <= ROUTES
    for each in recorder.at("POST /v1/messages"):
        assert set(each.json) <= FIELDS, set(each.json) - FIELDS


def results(stand: Recorded) -> list[Any]:
    """What the engine was told that tools said."""
    return [message["content"] for message in stand.engine.body["messages"] if message["role"] == "tool"]


def test_text(recorded: Recorded, tmp_path: Path) -> None:
    found = ask(recorded, tmp_path, "hi")
    assert (found["is_error"], found["result"]) == (False, TEXT)
    assert found["usage"]["output_tokens"] > 0
    answered(recorded)


def test_stream(recorded: Recorded, tmp_path: Path) -> None:
    streamed = ["--output-format", "stream-json", "--include-partial-messages", "--verbose"]
    found = ask(recorded, tmp_path, *streamed, "hi")
    events = [each["event"] for each in found["events"] if each["type"] == "stream_event"]
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    assert "".join(each["text"] for each in deltas if each["type"] == "text_delta") == TEXT
    answered(recorded)


def test_tools(recorded: Recorded, tmp_path: Path) -> None:
    """The model thinks and calls Bash, Claude Code runs it, and sends the result and the thinking back."""
    recorded.engine.reasoning = "I must look."
    recorded.engine.tool_call = ("Bash", {"command": "echo forty-two > made; cat made", "description": "make"})
    found = ask(recorded, tmp_path, "--allowedTools", "Bash", "--", "make it")
    assert (found["is_error"], found["result"]) == (False, TEXT)
    assert (tmp_path / "made").read_text() == "forty-two\n"
    assert results(recorded) == ["forty-two"]
    second = recorded.recorder.at("POST /v1/messages")[-1].json
    (turn,) = [message for message in second["messages"] if message["role"] == "assistant"]
    assert [block["type"] for block in turn["content"]] == ["thinking", "tool_use"]
    answered(recorded)


def test_an_image_that_a_tool_reads(tmp_path: Path) -> None:
    (tmp_path / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    with Recorded("llamacpp", capabilities=["vision"]) as stand:
        stand.engine.tool_call = ("Read", {"file_path": str(tmp_path / "pixel.png")})
        assert ask(stand, tmp_path, "--allowedTools", "Read", "--", "look")["result"] == TEXT
        assert "data:image/" in json.dumps(stand.engine.body["messages"])
        answered(stand)


def test_an_mcp_server(recorded: Recorded, tmp_path: Path) -> None:
    recorded.engine.tool_call = ("mcp__sky__weather", {"city": "Köln"})
    config = ["--strict-mcp-config", "--mcp-config", json.dumps({"mcpServers": {"sky": MCP}})]
    found = ask(recorded, tmp_path, *config, "--allowedTools", "mcp__sky__weather", "--", "Weather?")
    assert found["result"] == TEXT
    assert results(recorded) == ["sunny in Köln"]
    answered(recorded)


def test_structured_output(recorded: Recorded, tmp_path: Path) -> None:
    """`--json-schema` is a tool that it asks the model to call."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    recorded.engine.tool_call = ("StructuredOutput", {"city": "Paris"})
    found = ask(recorded, tmp_path, "--json-schema", json.dumps(schema), "--", "capital?")
    assert found["structured_output"] == {"city": "Paris"}
    answered(recorded)


def test_a_session_that_goes_on(recorded: Recorded, tmp_path: Path) -> None:
    session = str(uuid.uuid4())
    ask(recorded, tmp_path, "--session-id", session, "first question")
    ask(recorded, tmp_path, "--resume", session, "second question")
    sent = json.dumps(recorded.engine.body["messages"], ensure_ascii=False)
    assert sent.index("first question") < sent.index(TEXT) < sent.index("second question")
    assert not ask(recorded, tmp_path, "--resume", session, "/compact")["is_error"]
    answered(recorded)


def test_tokens_are_counted(recorded: Recorded, tmp_path: Path) -> None:
    found = ask(recorded, tmp_path, "/context")
    assert "Context Usage" in found["result"]
    assert recorded.recorder.at("POST /v1/messages/count_tokens")
    answered(recorded)


def test_web_search_is_offered_and_left_out(recorded: Recorded, tmp_path: Path) -> None:
    """WebSearch asks a model with a hosted tool: it answers without one, and the header says so."""
    recorded.engine.tool_call = ("WebSearch", {"query": "capital"})
    assert ask(recorded, tmp_path, "--allowedTools", "WebSearch", "--", "look")["result"] == TEXT
    ignored = [each.answer_headers.get("x-ignored-fields", "") for each in recorded.recorder.seen]
    assert any("web_search" in each for each in ignored)
    answered(recorded)


def test_a_prompt_that_is_too_long_is_known(tmp_path: Path) -> None:
    with Recorded("vllm") as stand:
        stand.engine.replay_chat("ctx_overflow")
        found = ask(stand, tmp_path, "hi")
    assert (found["is_error"], found["terminal_reason"]) == (True, "prompt_too_long")


def test_a_model_that_is_not_there_is_known(recorded: Recorded, tmp_path: Path) -> None:
    found = npm.claude(recorded.url, "nobody", tmp_path, "hi")
    assert found["is_error"] and found["api_error_status"] == 404
    assert "issue with the selected model" in found["result"]


# ------------------------------------------------------------------------------------------------ real engines

SMALL = ["--system-prompt", "You answer in one short sentence.", "--tools"]


def real(target: Target, home: Path, *args: str) -> dict[str, Any]:
    return npm.claude(target.url, target.model, home, *args, timeout=300, max_tokens=48)


def good(found: dict[str, Any]) -> None:
    """There is an answer; or it ended at the limit, which Claude Code calls an error by these words."""
    cut = "exceeded the 48 output token maximum" in found["result"]
    assert cut or not found["is_error"], found["result"]
    assert found["result"]


def test_real_text(target: Target, tmp_path: Path) -> None:
    good(real(target, tmp_path, *SMALL, "", "--", "What is the capital of France?"))


def test_real_tools(target: Target, tmp_path: Path) -> None:
    """Offered; whether the model calls one is its own affair."""
    good(real(target, tmp_path, *SMALL, "Read", "--", "What is the capital of France?"))


def test_real_session_that_goes_on(target: Target, tmp_path: Path) -> None:
    session = str(uuid.uuid4())
    good(real(target, tmp_path, *SMALL, "", "--session-id", session, "--", "What is the capital of France?"))
    good(real(target, tmp_path, *SMALL, "", "--resume", session, "--", "And of Spain?"))


def test_real_count_of_tokens(target: Target, tmp_path: Path) -> None:
    assert "Context Usage" in real(target, tmp_path, *SMALL, "", "--", "/context")["result"]
