"""Scripts that end in every way a program can: each ends at once, and neither its processes nor the engine's work stay.

The fake engine streams for minutes, so a script that waits for an answer is noticed by its time."""

import functools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llm_inference as product
from llm_inference import Completion, EngineUnavailable, LLMInferencer
from tests.fake_engine import DIALECTS, FakeEngine
from tests.harness import SOON, clean_env, until
from tests.processes import ROOT

AT_ONCE = 10.0  # seconds for a whole script, its imports included, or so many times what an empty one needs here
TIMES = 5
LATE = 45.0  # after that a script counts as one that never ends
MARK = "LLM_TEST_EXIT_MARK"

PREAMBLE = """
import asyncio, atexit, gc, os, sys, threading, time
sys.path.insert(0, os.environ["ROOT"])
import llm_inference
from llm_inference import InferenceError, LLMInferencer
if "URL" in os.environ:
    llm = LLMInferencer(os.environ["ENGINE"], base_url=os.environ["URL"])
else:
    llm = LLMInferencer("llamacpp", launch=True)
LONG = "Count from one to two thousand, in words."

def begun(wanted=1):
    while len(llm_inference.asyncio.all_tasks(llm_inference.portal.loop)) < wanted:
        time.sleep(0.01)
    time.sleep(0.3)
"""


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str
    seconds: float


def marked(mark: str) -> list[int]:
    """The processes that inherited the script's environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def run_script(
    body: str, engine: FakeEngine | None = None, *, interrupt: int = 0, after: float = 0.0, **env: str
) -> Ended:
    """Runs the lines after PREAMBLE. `interrupt`: this signal, `after` seconds from the line "now" on stdout."""
    mark = str(uuid.uuid4())
    env |= {MARK: mark, "ROOT": str(ROOT)}
    if engine is not None:
        env |= {"URL": engine.base_url, "ENGINE": engine.dialect}
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + body],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_env(**env),
    )
    try:
        if interrupt:
            assert process.stdout
            while process.stdout.readline().strip() != "now":
                assert process.poll() is None, "it ended before its signal"
            time.sleep(after)
            begin = time.monotonic()
            process.send_signal(interrupt)
        out, err = process.communicate(timeout=LATE)
        ended = Ended(process.returncode, out, err, time.monotonic() - begin)
        until(lambda: not marked(mark), SOON + 3)
        return ended
    finally:
        for pid in {*marked(mark), process.pid} if process.poll() is None else marked(mark):
            os.kill(pid, signal.SIGKILL)


@functools.cache
def at_once() -> float:
    """The seconds within which a script ends at once: on a busy machine even one that does nothing needs some."""
    return max(AT_ONCE, TIMES * run_script("llm.close()\n").seconds)


def ended_well(ended: Ended, code: int = 0) -> None:
    """At once, with that code, and without a word about a generator, task or thread that could not be ended."""
    assert ended.code == code, ended
    assert ended.seconds < at_once(), ended
    for noise in ("Exception ignored", "never awaited", "was destroyed", "Fatal Python", "Event loop is closed"):
        assert noise not in ended.err, ended.err


@pytest.fixture
def slow(fake: Callable[..., FakeEngine]) -> FakeEngine:
    """An engine that needs some minutes for each answer."""
    return slowly(fake("vllm"))


def slowly(engine: FakeEngine) -> FakeEngine:
    engine.text, engine.pace = "word " * 4000, 0.05
    return engine


def at_exit(line: str) -> str:
    """A script whose exit handler runs that line. From Python 3.12 on no thread starts there: an error says so."""
    return f"""
s = []
@atexit.register
def last():
    try:
        {line}
    except InferenceError as exc:
        assert "is ending" in exc.reason or "deadline" in exc.reason
"""


HALF_READ = "s = llm.stream(LONG)\nfor piece in s:\n    break\n"
#: name: (script, its exit code)
SCRIPTS: dict[str, tuple[str, int]] = {
    "module level": (HALF_READ, 0),
    "next": ("s = llm.stream(LONG)\nnext(s)\n", 0),
    "many": ("kept = [llm.stream(LONG) for _ in range(20)]\nfor s in kept: next(s)\n", 0),
    "never begun": ("s = llm.stream(LONG)\n", 0),
    "inside with": ("with llm:\n    s = llm.stream(LONG)\n    for piece in s:\n        break\n", 0),
    "closed with a stream open": (HALF_READ + "llm.close()\n", 0),
    "after an exception": (HALF_READ + "raise ValueError('mine')\n", 1),
    "exception inside the loop": ("s = llm.stream(LONG)\nfor piece in s:\n    raise ValueError('mine')\n", 1),
    "inside with, after an exception": ("with llm:\n    s = llm.stream(LONG)\n    next(s)\n    1 / 0\n", 1),
    "sys.exit": (HALF_READ + "sys.exit(3)\n", 3),
    "sys.exit in the loop": ("s = llm.stream(LONG)\nfor piece in s:\n    sys.exit(3)\n", 3),
    "os._exit": (HALF_READ + "os._exit(4)\n", 4),
    "zip": ("for number, piece in zip(range(3), llm.stream(LONG)):\n    pass\n", 0),
    "zip kept": ("z = zip(range(3), llm.stream(LONG))\nlist(z)\n", 0),
    "zip reversed": ("z = zip(llm.stream(LONG), range(3))\nlist(z)\n", 0),
    "islice kept": ("import itertools\ni = itertools.islice(llm.stream(LONG), 3)\nnext(i)\n", 0),
    "map kept": ("m = map(str.upper, llm.stream(LONG))\nnext(m)\n", 0),
    "generator around it": (
        "def words():\n    for piece in llm.stream(LONG):\n        yield piece\nw = words()\nnext(w)\n",
        0,
    ),
    "cycle": ("class Box: pass\nbox = Box()\nbox.me, box.s = box, llm.stream(LONG)\nnext(box.s)\n", 0),
    "cycle, deleted": (
        "class Box: pass\nbox = Box()\nbox.me, box.s = box, llm.stream(LONG)\nnext(box.s)\ndel box\n",
        0,
    ),
    "collected on the background thread": (
        "gc.disable()\nclass Box: pass\nbox = Box()\nbox.me, box.s = box, llm.stream(LONG)\nnext(box.s)\ndel box\n"
        "done = threading.Event()\n"
        "llm_inference.portal.loop.call_soon_threadsafe(lambda: (gc.collect(), done.set()))\n"
        "assert done.wait(5)\n",
        0,
    ),
    "builtins": ("import builtins\nbuiltins.s = llm.stream(LONG)\nnext(builtins.s)\n", 0),
    "attribute of the module": ("llm_inference.s = llm.stream(LONG)\nnext(llm_inference.s)\n", 0),
    "two inferencers": (
        "other = LLMInferencer(os.environ['ENGINE'], base_url=os.environ['URL'])\n"
        "a, b = llm.stream(LONG), other.stream(LONG)\nnext(a), next(b)\n",
        0,
    ),
    "atexit closes the stream": (HALF_READ + "atexit.register(s.close)\n", 0),
    "atexit reads on": (HALF_READ + "atexit.register(lambda: next(s, None))\n", 0),
    "atexit closes the inferencer": (HALF_READ + "atexit.register(llm.close)\n", 0),
    "atexit begins a stream": (at_exit("s.append(llm.stream(LONG)) or next(s[0])"), 0),
    "atexit asks": (at_exit("llm.generate('hi', max_tokens=1, timeout=1)"), 0),
    "atexit closes what was never used": ("atexit.register(llm.close)\n", 0),
    "atexit closes what was never used, asynchronously": ("atexit.register(lambda: asyncio.run(llm.aclose()))\n", 0),
    "fork, the child exits": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    sys.exit(0)\nassert os.waitpid(pid, 0)[1] == 0\n",
        0,
    ),
    "fork, the child closes the stream": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    s.close()\n    sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n",
        0,
    ),
    "fork, the child closes the inferencer": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    llm.close()\n    sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n",
        0,
    ),
    "fork, the child reads on": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    try:\n        next(s)\n    except InferenceError:\n"
        "        pass\n    sys.exit(0)\nassert os.waitpid(pid, 0)[1] == 0\n",
        0,
    ),
    "fork, the child streams anew": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    t = llm.stream(LONG)\n    next(t)\n    sys.exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\nassert next(s)\n",
        0,
    ),
    "multiprocessing": (
        "import multiprocessing\ndef work():\n    t = llm.stream(LONG)\n    next(t)\n"
        + HALF_READ
        + "child = multiprocessing.get_context('fork').Process(target=work)\nchild.start()\nchild.join()\n"
        "assert child.exitcode == 0\n",
        0,
    ),
    "verb in __del__": (
        "class Keeper:\n    def __init__(self): self.llm, self.error = llm, InferenceError\n    def __del__(self):\n"
        "        try:\n            self.llm.generate('x')\n        except self.error:\n            pass\n"
        "keeper = Keeper()\n" + HALF_READ,
        0,
    ),
    "stream in __del__": (
        "class Keeper:\n    def __init__(self): self.llm, self.error = llm, InferenceError\n    def __del__(self):\n"
        "        try:\n            next(self.llm.stream('x'))\n        except self.error:\n            pass\n"
        "keeper = Keeper()\n",
        0,
    ),
    "close in __del__": (
        "class Keeper:\n    def __init__(self): self.llm, self.error = llm, InferenceError\n    def __del__(self):\n"
        "        try:\n            self.llm.close()\n        except self.error:\n            pass\n"
        "keeper = Keeper()\n" + HALF_READ,
        0,
    ),
    "first verb in __del__": (
        "class Keeper:\n    def __init__(self): self.llm, self.error = llm, InferenceError\n    def __del__(self):\n"
        "        try:\n            self.llm.models()\n        except self.error:\n            pass\n"
        "keeper = Keeper()\n",
        0,
    ),
    "a kept traceback": (
        "def read():\n    s = llm.stream(LONG)\n    for piece in s:\n        raise ValueError('mine')\n"
        "try:\n    read()\nexcept ValueError as exc:\n    kept = exc\n",
        0,
    ),
    "sys.last_value": (
        "def read():\n    s = llm.stream(LONG)\n    for piece in s:\n        raise ValueError('mine')\n"
        "try:\n    read()\nexcept ValueError as exc:\n"
        "    sys.last_value, sys.last_traceback = exc, exc.__traceback__\n",
        0,
    ),
    "a thread reads": (
        "def read():\n    for piece in llm.stream(LONG):\n        pass\n"
        "threading.Thread(target=read, daemon=True).start()\nbegun()\n",
        0,
    ),
    "a thread generates": (
        "threading.Thread(target=lambda: llm.generate(LONG), daemon=True).start()\nbegun()\n",
        0,
    ),
    "a thread began it": (
        "kept = []\ndef read():\n    kept.append(llm.stream(LONG))\n    next(kept[0])\n"
        "thread = threading.Thread(target=read)\nthread.start()\nthread.join()\n",
        0,
    ),
    "a batch is running": (
        "threading.Thread(target=lambda: llm.batch([LONG] * 20), daemon=True).start()\nbegun(9)\n",
        0,
    ),
    "a batch is closed": (
        "found = []\nthread = threading.Thread(target=lambda: found.extend(llm.batch([LONG] * 8)))\nthread.start()\n"
        "begun(9)\nllm.close()\nthread.join(5)\nassert not thread.is_alive()\n"
        "assert all(isinstance(each, InferenceError) for each in found), found\n",
        0,
    ),
    "asyncio": (
        "async def main():\n    global s\n    s = llm.astream(LONG)\n    await anext(s)\nasyncio.run(main())\n",
        0,
    ),
    "asyncio, a task left": (
        "async def main():\n    global task\n    task = asyncio.ensure_future(llm.agenerate(LONG))\n"
        "    await asyncio.sleep(0.5)\nasyncio.run(main())\n",
        0,
    ),
    "asyncio, sys.exit": (
        "async def main():\n    async for piece in llm.astream(LONG):\n        sys.exit(3)\nasyncio.run(main())\n",
        3,
    ),
    "asyncio, a loop of one's own": (
        "loop = asyncio.new_event_loop()\ns = llm.astream(LONG)\nloop.run_until_complete(anext(s))\n"
        "loop.run_until_complete(s.aclose())\nloop.close()\n",
        0,
    ),
    "in a running loop": (
        "async def main():\n    global s\n    s = llm.stream(LONG)\n    next(s)\nasyncio.run(main())\n",
        0,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_d13_e1_script_ends(name: str, slow: FakeEngine) -> None:
    """D13, E1: whatever holds a half-read stream, the script ends and the engine stops working for it."""
    script, code = SCRIPTS[name]
    ended_well(run_script(script, slow), code)
    slow.wait(lambda: slow.live == 0, SOON + 3)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["module level", "sys.exit", "a thread generates"])
def test_d13_e1_every_engine(name: str, dialect: Any, fake: Callable[..., FakeEngine]) -> None:
    """D13: the same on every engine: what is asked whole is streamed inside, so it stops too."""
    engine = slowly(fake(dialect))
    script, code = SCRIPTS[name]
    ended_well(run_script(script, engine), code)
    engine.wait(lambda: engine.live == 0, SOON + 3)


WITHOUT_HTTPTOOLS = "llm_inference.response_parser = lambda: llm_inference.H11Parser\n"


@pytest.mark.parametrize("name", ["module level", "sys.exit", "zip kept", "fork, the child exits", "a kept traceback"])
def test_d13_e1_without_httptools(name: str, slow: FakeEngine) -> None:
    """D13, E1 where the five packages alone are installed."""
    script, code = SCRIPTS[name]
    ended_well(run_script(WITHOUT_HTTPTOOLS + script, slow), code)
    slow.wait(lambda: slow.live == 0, SOON + 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "body",
    [
        "for piece in llm.stream(LONG):\n    print('now', flush=True)\n",
        "threading.Timer(1, print, ('now',), {'flush': True}).start()\nllm.generate(LONG)\n",
        "threading.Timer(1, print, ('now',), {'flush': True}).start()\nllm.batch([LONG] * 20)\n",
    ],
    ids=["stream", "generate", "batch"],
)
def test_d13_signals(body: str, number: int, slow: FakeEngine) -> None:
    """D13: Ctrl-C and SIGTERM end a script in the middle of a verb."""
    ended = run_script(body, slow, interrupt=number, after=0.2)
    assert ended.code in (-number, 1, 130), ended
    assert ended.seconds < at_once()
    slow.wait(lambda: slow.live == 0, SOON + 3)


@pytest.mark.parametrize("parser", ["httptools", "h11"])
@pytest.mark.parametrize("verb", ["generate", "stream", "embed", "batch"])
def test_e2_close_ends_those_who_wait(verb: str, parser: str, slow: FakeEngine) -> None:
    """E2: three threads wait for an answer when the inferencer is closed: each gets a typed error at once."""
    use = {
        "generate": "llm.generate(LONG)",
        "stream": "for _ in llm.stream(LONG): seen.add(threading.get_ident())",
        "embed": "llm.embed('x')",
        "batch": "errors.extend(llm.batch([LONG] * 2))",
    }[verb]
    slow.pace = 30.0 if verb == "embed" else 0.05
    wait = "while len(seen) < 3: time.sleep(0.01)" if verb == "stream" else "begun(3)"  # a stream is a task a step
    script = f"""
errors, others, seen = [], [], set()
def work():
    try:
        {use}
    except InferenceError as exc:
        errors.append(exc)
    except BaseException as exc:
        others.append(repr(exc))
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads: thread.start()
{wait}
time.sleep(0.5)
begin = time.monotonic()
llm.close()
for thread in threads: thread.join(10)
print(time.monotonic() - begin, len(errors), others, [each.kind for each in errors])
"""
    ended = run_script((WITHOUT_HTTPTOOLS if parser == "h11" else "") + script, slow)
    ended_well(ended)
    seconds, count, rest = ended.out.split(" ", 2)
    assert float(seconds) < SOON, ended.out
    assert int(count) == (6 if verb == "batch" else 3), ended.out
    assert rest.startswith("[] "), ended.out


EMBEDDED = {
    "module level": (HALF_READ, 0),
    "sys.exit inside with": ("with llm:\n    s = llm.stream(LONG)\n    next(s)\n    sys.exit(3)\n", 3),
    "no close": ("llm.generate('Hi', max_tokens=4)\n", 0),
    "os._exit": (HALF_READ + "os._exit(4)\n", 4),
    "fork": (
        HALF_READ + "pid = os.fork()\nif pid == 0:\n    sys.exit(0)\nassert os.waitpid(pid, 0)[1] == 0\n"
        "assert next(s)\n",
        0,
    ),
    "starting": (
        "threading.Thread(target=llm.models, daemon=True).start()\nbegun()\n",
        0,
    ),
    "starting, with a stream": (
        "s = llm.stream(LONG)\nthreading.Thread(target=next, args=(s,), daemon=True).start()\nbegun()\n",
        0,
    ),
    "starting, closed": (
        "errors = []\ndef work():\n    try:\n        llm.generate('x')\n    except InferenceError as exc:\n"
        "        errors.append(exc)\nthread = threading.Thread(target=work)\nthread.start()\nbegun()\nllm.close()\n"
        "thread.join(5)\nassert not thread.is_alive() and errors, errors\n",
        0,
    ),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_d13_e1_embedded(name: str) -> None:
    """D13, E1: the engine that a script started goes with it."""
    script, code = EMBEDDED[name]
    ended = run_script(script)
    assert ended.code == code, ended
    assert ended.seconds < LATE
    assert "Exception ignored" not in ended.err, ended.err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_d13_embedded_killed(number: int) -> None:
    """D13: the started engine goes with a killed script."""
    ended = run_script(HALF_READ + "print('now', flush=True)\ntime.sleep(60)\n", interrupt=number)
    assert ended.code in (-number, 1), ended
    assert ended.seconds < at_once()


def test_e1_a_stream_after_the_end_says_why(slow: FakeEngine) -> None:
    """E1: a verb that is called while the interpreter ends raises a typed error instead of waiting."""
    script = """
class Keeper:
    def __init__(self): self.llm = llm
    def __del__(self):
        try:
            self.llm.generate("x")
        except BaseException as exc:
            os.write(1, type(exc).__name__.encode())
    os = os
keeper = Keeper()
"""
    ended = run_script(script.replace("os.write", "self.os.write"), slow)
    ended_well(ended)
    assert ended.out == "EngineUnavailable", ended


def test_e2_close_between_two_calls(fake: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """E2: a verb that has asked for what the model can do, and not yet for its answer, ends when it is closed."""
    with LLMInferencer("vllm", base_url=fake("vllm").base_url) as llm:
        assert llm.fleet
        adapter = llm.fleet.endpoints[0].adapter
        prepare = adapter.prepare

        async def closed_meanwhile(request: Any) -> Any:
            body = await prepare(request)
            await llm.aclose()
            return body

        monkeypatch.setattr(adapter, "prepare", closed_meanwhile)
        with pytest.raises(EngineUnavailable):
            llm.generate("x")


@pytest.mark.parametrize("verb", ["batch", "run", "embed"])
def test_e2_close_ends_a_verb_of_several_requests(
    verb: str, fake: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E2: what was closed is not opened again by the next request of a verb that began before."""
    engine = fake("vllm")
    with LLMInferencer("vllm", base_url=engine.base_url) as llm:
        close_after_the_first(llm, monkeypatch)
        if verb == "batch":
            first, second = llm.batch(["one", "two"], concurrency=1)
            assert isinstance(first, Completion)
            assert isinstance(second, EngineUnavailable)
        elif verb == "run":
            engine.tool_call = ("at_exit", {"line": "x"})
            with pytest.raises(EngineUnavailable):
                llm.run("x", tools=[at_exit])
        else:
            with pytest.raises(EngineUnavailable):
                llm.embed("x")
        assert len(engine.asked) == (0 if verb == "embed" else 1)
        monkeypatch.undo()
        assert llm.chat([{"role": "user", "content": "x"}]), "a verb called after that connects anew"


def close_after_the_first(llm: LLMInferencer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inferencer is closed between the first request of a verb and the next."""

    def closing(function: Callable[..., Any]) -> Callable[..., Any]:
        async def closes(*args: Any, **options: Any) -> Any:
            found = await function(*args, **options)
            await llm.aclose()
            return found

        return closes

    monkeypatch.setattr(llm, "acomplete", closing(llm.acomplete))
    monkeypatch.setattr(product, "embedding_model", closing(product.embedding_model))
