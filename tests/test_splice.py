"""The splice: tokens that go from the engine's connection to the client's without waking a task.

The slow path, which takes every burst through the tasks, is its reference: what a client reads is the same on both.
"""

import http.client
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llm_inference as product
from tests.fake_engine import FakeEngine, Reply, recorded
from tests.harness import PROMPT, Stand

USER = [{"role": "user", "content": PROMPT}]
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    "/api/v1/llm/chat": {"messages": USER},
    "/v1/messages": {"messages": USER, "max_tokens": 100},
    "/v1/responses": {"input": PROMPT},
}
PACE = 0.01
#: what differs from one request to the next
OWN = re.compile(rb'"(?:id|request_id|item_id|created|created_at|completed_at|ttft|total|tokens_per_second)": ?[^,}]*')


@pytest.fixture(params=["vllm", "sglang", "llamacpp"])
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with Stand(request.param) as found:
        yield found


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `EventWriter.push` returned."""
    seen: list[bool] = []
    push = product.EventWriter.push

    def watched(writer: product.EventWriter, burst: product.Burst) -> bool:
        seen.append(push(writer, burst))
        return seen[-1]

    monkeypatch.setattr(product.EventWriter, "push", watched)
    return seen


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches the splice off."""
    return lambda: monkeypatch.setattr(product.LimitsMixin, "splice", lambda self, cycle, make: None)


def paced(stand: Stand, **changed: Any) -> Reply:
    """The recorded stream, each event alone."""
    found = recorded(stand.engine.dialect, "chat_stream")
    events = re.findall(rb"data: .*?\n\n", b"".join(found.pieces), re.DOTALL)
    return Reply(**{"headers": found.headers, "pieces": events, "gap": PACE, "chunked": True, **changed})


def ask(stand: Stand, path: str, version: str = "HTTP/1.1") -> bytes:
    """The body of a streamed answer, as it came."""
    host, _, port = stand.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection._http_vsn_str = version  # type: ignore[attr-defined]
    key = stand.gateway.settings.made_key  # asked of HTTP/1.0, for a proxy may be in between
    body = json.dumps({"model": stand.model, "stream": True, **BODIES[path]})
    if path.startswith("/api"):
        body = json.dumps({"stream": True, **BODIES[path]})
    connection.request("POST", path, body, {"content-type": "application/json", "authorization": f"Bearer {key}"})
    reply = connection.getresponse()
    found = reply.read()
    connection.close()
    assert reply.status == 200, found
    return found


def alike(answer: bytes) -> bytes:
    """Without what differs from one request to the next, and without what depends on when it came."""
    lines = [
        line for line in answer.split(b"\n") if not line.startswith((b":", b"event: ping", b'data: {"type":"ping"'))
    ]
    return OWN.sub(b"", b"\n".join(filter(None, lines)))


@pytest.mark.parametrize("path", BODIES)
def test_both_paths_say_the_same(stand: Stand, path: str, pushes: list[bool], without: Callable[[], None]) -> None:
    stand.engine.script_chat(paced(stand))
    spliced = ask(stand, path)
    assert pushes.count(True) >= 2, pushes
    pushes.clear()
    without()
    stand.engine.script_chat(paced(stand))
    assert alike(spliced) == alike(ask(stand, path))
    assert not any(pushes)


def test_the_end_is_never_spliced(stand: Stand, pushes: list[bool]) -> None:
    """What ends an answer goes through the check."""
    stand.engine.script_chat(paced(stand))
    sent: list[bytes] = []
    splice = product.LimitsMixin.splice
    with pytest.MonkeyPatch.context() as patch:

        def watched(self: Any, cycle: Any, make: Callable[[], bytes]) -> bytes | None:
            part = splice(self, cycle, make)
            sent.append(part or b"")
            return part

        patch.setattr(product.LimitsMixin, "splice", watched)
        ask(stand, CHAT)
    assert any(pushes) and not re.search(rb'"finish_reason": ?"|\[DONE\]', b"".join(sent))


@pytest.mark.parametrize("path", [CHAT, "/api/v1/llm/chat"])
def test_tokens_that_spliced_events_report_are_counted(
    path: str, pushes: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's continuous_usage_stats: every event has the usage so far."""
    with Stand("vllm") as stand, caplog.at_level(logging.INFO, "llm_inference"):
        events = paced(stand).pieces
        counted = [
            piece.replace(b"}\n\n", b',"usage":{"prompt_tokens":70,"completion_tokens":%d}}\n\n' % number)
            for number, piece in enumerate(filter(product.is_plain, events), 1)
        ]
        finish = [piece for piece in events if b'"finish_reason":"' in piece][:1]
        stand.engine.script_chat(paced(stand, pieces=[*counted, *finish, events[-1]]))
        ask(stand, path)
    assert any(pushes)
    assert any(f" 70+{len(counted)} " in f"{record.getMessage()} " for record in caplog.records)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("error event", {"pieces": [b'data: {"error": {"message": "boom", "code": 500}}\n\n']}),
        ("no finish", {"pieces": [b"data: [DONE]\n\n"]}),
        ("reset", {"pieces": [], "end": "reset"}),
        ("end of file", {"pieces": [], "end": "eof"}),
        ("no event", {"pieces": [b"<html>\n\n"]}),
        ("half a line", {"pieces": [b'data: {"choices": [{"ind'], "end": "eof"}),
    ],
)
def test_a_fault_behind_spliced_tokens(stand: Stand, pushes: list[bool], name: str, cut: dict[str, Any]) -> None:
    whole = paced(stand)
    tokens = [piece for piece in whole.pieces if product.is_plain(piece)][:4]
    stand.engine.script_chat(paced(stand, **{**cut, "pieces": [*tokens, *cut["pieces"]]}))
    answer = ask(stand, CHAT)
    assert any(pushes), name
    assert b"[DONE]" not in answer and answer.count(b'"error"') == 1, answer


@pytest.mark.parametrize("path", BODIES)
def test_nothing_follows_the_end(stand: Stand, path: str, pushes: list[bool]) -> None:
    """What the engine sends behind [DONE] is not passed on."""
    whole = list(paced(stand).pieces)
    late = next(piece for piece in whole if product.is_plain(piece)).replace(b'"model"', b'"late":1,"model"')
    stand.engine.script_chat(paced(stand, pieces=[*whole, late, late]))
    answer = ask(stand, path)
    stand.engine.wait(lambda: stand.engine.live == 0)
    stand.engine.script_chat(paced(stand, pieces=whole))
    assert any(pushes) and alike(answer) == alike(ask(stand, path)), answer


def test_logprobs_of_llamacpp_are_not_spliced(pushes: list[bool]) -> None:
    """Its decoder brings them into OpenAI's shape."""
    with Stand("llamacpp") as stand:
        stand.engine.script_chat(paced(stand))
        reply = stand.post(CHAT, model=stand.model, messages=USER, stream=True, logprobs=True)
        assert reply.status_code == 200 and not any(pushes), reply.text


def test_lines_cut_anywhere(stand: Stand, without: Callable[[], None]) -> None:
    """Pieces that end within a line wait for its end."""
    first, second, *others = paced(stand).pieces
    rest = b"".join(others)
    comment = [b": a comment, ", b'data: {"in": "it"}\n\n']
    pieces = [first, second, *comment, *(rest[start : start + 97] for start in range(0, len(rest), 97))]
    stand.engine.script_chat(paced(stand, pieces=pieces, gap=0.002))
    spliced = ask(stand, CHAT)
    without()
    stand.engine.script_chat(paced(stand, pieces=pieces, gap=0.002))
    assert alike(spliced) == alike(ask(stand, CHAT))


def test_a_client_of_http_1_0(stand: Stand, pushes: list[bool]) -> None:
    stand.engine.script_chat(paced(stand))
    answer = ask(stand, CHAT, "HTTP/1.0")
    assert any(pushes) and answer.startswith(b"data: {") and answer.endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves(stand: Stand, pushes: list[bool]) -> None:
    tokens = [piece for piece in paced(stand).pieces if product.is_plain(piece)][:2]
    stand.engine.script_chat(paced(stand, pieces=tokens * 5000))
    with stand.leaving(CHAT, model=stand.model, messages=USER, stream=True) as client:
        client.getresponse().read(2000)
        assert any(pushes)
    stand.engine.wait(lambda: stand.engine.live == 0)


def test_a_client_that_reads_late_gets_it_all(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client takes nothing, the engine's connection is read no further; nothing is lost or changes places."""
    waiting: list[int] = []
    splice = product.LimitsMixin.splice

    def watched(self: Any, cycle: Any, make: Callable[[], bytes]) -> bytes | None:
        part = splice(self, cycle, make)
        waiting.append(self.transport.get_write_buffer_size())
        return part

    monkeypatch.setattr(product.LimitsMixin, "splice", watched)
    (first, *_) = [piece for piece in paced(stand).pieces if product.is_plain(piece)]
    base = json.loads(first[6:])
    done = paced(stand).pieces[-1]
    texts = [f"{number:06d}" + "x" * 60_000 for number in range(300)]
    choice = base["choices"][0]
    events = []
    for text in texts:
        base["choices"] = [{**choice, "delta": {"content": text}}]
        events.append(b"data: " + json.dumps(base, separators=(",", ":")).encode() + b"\n\n")
    finish = [piece for piece in paced(stand).pieces if b'"finish_reason":"' in piece][:1]
    stand.engine.script_chat(paced(stand, pieces=[*events, *finish, done], gap=0.002))
    with stand.leaving(CHAT, model=stand.model, messages=USER, stream=True) as client:
        reply = client.getresponse()
        time.sleep(1)  # a client that is busy with something else
        answer = reply.read()
    assert re.findall(rb'"content":"(\d{6})x', answer) == [text[:6].encode() for text in texts]
    assert answer.endswith(b"data: [DONE]\n\n")
    assert 0 < max(waiting) < 2 << 20, "what waits for the client grows"


def test_the_idle_deadline_counts_from_the_last_token(fake: Callable[..., FakeEngine], pushes: list[bool]) -> None:
    """A stream may last longer than `idle`, and not be silent as long."""
    limits = product.Deadlines(connect=1, first_token=5, idle=0.5, total=20)
    with Stand("vllm", deadlines=limits) as stand:
        tokens = [piece for piece in paced(stand).pieces if product.is_plain(piece)][:2]
        slow = paced(stand, pieces=[*tokens * 5, *paced(stand).pieces[-3:]], gap=0.1)
        stand.engine.script_chat(slow)
        assert ask(stand, CHAT).endswith(b"data: [DONE]\n\n")
        assert any(pushes)
        stand.engine.script_chat(paced(stand, pieces=tokens * 2, end="stall"))
        assert b"idle deadline of 0.5 s passed" in ask(stand, CHAT)


def test_comments_fill_a_silence_between_spliced_tokens(monkeypatch: pytest.MonkeyPatch, pushes: list[bool]) -> None:
    monkeypatch.setattr(product, "KEEP_ALIVE_COMMENT", 0.1)
    with Stand("vllm") as stand:
        stand.engine.script_chat(paced(stand, gap=0.35))
        answer = ask(stand, CHAT)
    assert any(pushes) and b": keep-alive\n\n" in answer and answer.endswith(b"data: [DONE]\n\n")


def test_events_with_nothing_to_show_do_not_delay_the_comments(
    monkeypatch: pytest.MonkeyPatch, pushes: list[bool]
) -> None:
    """The client sees a silence, though the engine sends events."""
    monkeypatch.setattr(product, "KEEP_ALIVE_COMMENT", 0.3)
    with Stand("vllm") as stand:
        first, *others = paced(stand).pieces
        stand.engine.script_chat(paced(stand, pieces=[first] * 20 + others, gap=0.05))
        answer = ask(stand, "/v1/responses")
    assert pushes.count(True) > 10 and b": keep-alive\n\n" in answer


def test_a_checked_stream_is_not_spliced(stand: Stand, pushes: list[bool]) -> None:
    """Structured output is collected for its check: each burst goes through it."""
    ended = [piece.replace(b'"length"', b'"stop"') for piece in paced(stand).pieces]
    stand.engine.script_chat(paced(stand, pieces=ended))
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    reply = stand.post(CHAT, model=stand.model, messages=USER, stream=True, response_format=form)
    assert b'"error"' in reply.content and not any(pushes)
