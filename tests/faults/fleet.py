"""Rows about a fleet under load: its endpoints are killed, frozen, refusing, slow, overloaded, flapping, all gone.

What reached each endpoint is read from the relays before them, not from the server under test. Whether it was to be
sent there depends on what the server knew when it decided to: that is read from the server (`observe` in server.py),
so that a busy machine, on which everything happens later, changes no verdict."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import llm_inference as product
from tests.processes import ROOT, free_port

from .engines import EngineProcess
from .network import BROKEN
from .relay import STATUSES, Diary, Entry, Relay
from .rig import API, DIALECTS, V1, Answer, Engine, Json, Result, Server, ask, at_once, judge, nonce, words_for

DEADLINES = {"connect": 2.0, "first_token": 60.0, "idle": 5.0, "total": 120.0}


@dataclass(frozen=True)
class Pace:
    """How soon the server does what it does about failures (seconds), and how long a fault lasts."""

    first_pause: float = product.Endpoint.FIRST_PAUSE
    longest_pause: float = product.Endpoint.LONGEST_PAUSE
    list_ttl: float = product.Endpoint.LIST_TTL
    list_deadline: float = product.Deadlines().brief().first_token
    n: int = 1000
    seconds: float = 15.0

    @property
    def notices_silence(self) -> float:
        """When a frozen endpoint is left alone, usually: its list is old, is asked for, does not come."""
        return self.list_ttl + self.list_deadline + 1.0


#: the short form; the long one has the module's own pauses
QUICK = Pace(first_pause=0.3, longest_pause=1.2, list_ttl=0.4, list_deadline=0.4, n=40, seconds=0.7)
QUICK_REAL = dataclasses.replace(QUICK, list_deadline=2.0, n=8)
REAL_FAULTS = ("killed", "frozen")  # that only a real process can show; the long form has them all
REPLICAS = 3


@dataclass(frozen=True)
class Fault:
    """What befalls two of three endpoints: the relays' mode, or what is done to their processes."""

    mode: str = ""
    retry_after: int = 0
    flaps: bool = False
    all: bool = False  #: it befalls every endpoint
    send: int = 0  #: the signal that real processes get
    passing: bool = False  #: nothing fails
    silent: bool = False  #: requests wait for an answer that does not come
    counted: bool = True  #: are the trials seen at the relay?


FAULTS = {
    "killed": Fault("refuse", send=signal.SIGKILL, counted=False),
    "frozen": Fault("freeze", send=signal.SIGSTOP, silent=True),
    "refusing": Fault("close"),
    "slow": Fault("slow", passing=True),
    "503": Fault("503"),
    "503, Retry-After": Fault("503", retry_after=2),
    "429": Fault("429"),
    "flapping": Fault("close", flaps=True, counted=False),
    "all gone and back": Fault("close", all=True),
}


@dataclass(frozen=True)
class Case:
    """One request."""

    model: str
    engine: str  #: "" where the model goes by its bare name
    v1: bool
    stream: bool
    name: str

    def body(self, tokens: int) -> Json:
        messages = [{"role": "user", "content": self.name}]
        body: Json = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": self.stream}
        if self.v1:
            return body | {"model": f"{self.engine}/{self.model}" if self.engine else self.model}
        return body | {"model_name": self.model} | ({"engine_type": self.engine} if self.engine else {})


class Fleet:
    """Endpoints behind relays, and the server before them."""

    def __init__(self, pace: Pace, off: str | None) -> None:
        self.pace, self.off = pace, off
        self.diary, self.tokens, self.callers = Diary(), 400, 16
        self.relays: dict[str, Relay] = {}
        self.engines: tuple[str, ...] = ()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        tables = []
        for name, (dialect, port) in (await asyncio.to_thread(self.start_engines)).items():
            relay = await self._stack.enter_async_context(Relay(name, port, self.diary))
            self.relays[name] = relay
            tables.append(
                f'[[endpoint]]\nname = "{name}"\nengine = "{dialect}"\nbase_url = "http://127.0.0.1:{relay.port}"\n'
            )
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-fleet-"))
        file = Path(folder) / "llm.toml"
        file.write_text("\n".join(tables))
        settings = {"deadlines": DEADLINES, "fleet": dataclasses.asdict(self.pace)}
        self.server = Server("--config", str(file), off=self.off, settings=settings)
        self._stack.push_async_callback(asyncio.to_thread, self.server.__exit__)
        await asyncio.to_thread(self.server.__enter__)
        self.port = self.server.port
        for name in self.relays:
            assert await self.answers(name, 20), f"{name} does not answer"

    def start_engines(self) -> dict[str, tuple[str, int]]:
        """Starts them, to be ended by the stack: dialect and port by the endpoint's name."""
        raise NotImplementedError

    def strike(self, name: str, number: int) -> bool:
        """Send a signal to an endpoint's process; False where it has none."""
        return False

    def revive(self, name: str) -> None:
        """The process is there, and moves."""

    def right(self, case: Case, text: str) -> bool:
        """Whether the answer's text is one to that request."""
        return text == words_for(case.name)

    async def answers(self, name: str, seconds: float) -> bool:
        """Whether the endpoint answers, addressed by its own name, within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            body = {"model": f"{name}/m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            answer = await ask(self.port, V1, body)
            if judge(answer, v1=True, stream=False)[0] == "good" and answer.headers["x-endpoint"] == name:
                return True
            await asyncio.sleep(0.1)
        return False

    def victims(self, fault: Fault) -> list[str]:
        """Two of the three replicas of each engine, or all."""
        return [name for name in self.relays if fault.all or not name.endswith(f"-{REPLICAS}")]


class FakeFleet(Fleet):
    """Three fakes of each dialect, all with the model `m`."""

    def start_engines(self) -> dict[str, tuple[str, int]]:
        self.engines = (*DIALECTS, "")
        found = {}
        for dialect, number in itertools.product(DIALECTS, range(1, REPLICAS + 1)):
            engine = Engine(dialect)
            engine.pace = 0.005
            self._stack.callback(engine.stop)
            engine.start()
            found[f"{dialect}-{number}"] = (dialect, engine.port)
        return found


class LlamaProcess(EngineProcess):
    """A real llama.cpp."""

    def __init__(self, model: Path) -> None:
        super().__init__("llamacpp", 0)
        self.model, self.port = model, free_port()

    def start(self) -> None:
        argv = [sys.executable, "-m", "tests.faults.llamacpp_process", str(self.model), str(self.port)]
        self.process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert "ready\n" in iter(self.process.stdout.readline, ""), "it ended"

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            super().send(number)


class RealFleet(Fleet):
    """Three processes of llama.cpp with the same model."""

    def start_engines(self) -> dict[str, tuple[str, int]]:
        self.engines, self.tokens, self.callers = ("llamacpp",), 2, 4
        model = product.pull_model(None, lambda done, total: None, threading.Event()).path
        self.processes = {f"llamacpp-{number}": LlamaProcess(model) for number in range(1, REPLICAS + 1)}
        for process in self.processes.values():
            process.start()
            self._stack.callback(process.kill)
        return {name: ("llamacpp", process.port) for name, process in self.processes.items()}

    def strike(self, name: str, number: int) -> bool:
        self.processes[name].send(number)
        return True

    def revive(self, name: str) -> None:
        process = self.processes[name]
        process.send(signal.SIGCONT)
        if process.process.poll() is not None:
            process.kill()
            process.start()

    def right(self, case: Case, text: str) -> bool:
        return bool(text)


class Phase:
    """One fault under load: what was asked, what came, and what the relays saw of it."""

    def __init__(self, fleet: Fleet, name: str, found: Result) -> None:
        self.fleet, self.name, self.fault, self.found = fleet, name, FAULTS[name], found
        self.answers: list[tuple[Case, Answer]] = []
        self.over = False
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        pace, victims, began = self.fleet.pace, self.fleet.victims(self.fault), time.monotonic()
        seconds = pace.seconds + (pace.notices_silence if self.fault.silent else 0.0)
        load = asyncio.ensure_future(self._load(pace.n, seconds))
        await asyncio.sleep(0.2)
        struck = time.monotonic()
        if self.fault.flaps:
            await self._flap(victims, load)
        else:
            await self._strike(victims)
        await load
        ended = time.monotonic()
        await self._look(victims)
        await self._revive(victims)
        self._judge()
        if self.fault.counted and not self.fault.passing:
            moments = (await asyncio.to_thread(self.fleet.server.census))["moments"]
            for name in victims:
                mine = [each for each in moments if each["endpoint"] == name and began <= each["at"] < ended]
                self._follow(name, [each for each in mine if each["at"] >= struck])
                self._compare(name, struck, ended, mine)
        for name in victims:
            back = await self.fleet.answers(name, 4 * pace.first_pause + pace.longest_pause)
            self.found.need(back, f"{self.name}: {name} is not used again")

    async def _strike(self, victims: list[str]) -> None:
        for name in victims:
            if not (self.fault.send and self.fleet.strike(name, self.fault.send)):
                await self.fleet.relays[name].set(self.fault.mode, self.fault.retry_after)

    async def _revive(self, victims: list[str]) -> None:
        for name in victims:
            await self.fleet.relays[name].set("")
            await asyncio.to_thread(self.fleet.revive, name)

    async def _flap(self, victims: list[str], load: asyncio.Future[None]) -> None:
        for mode in itertools.cycle(("close", "")):
            for name in victims:
                await self.fleet.relays[name].set(mode)
            await self._look(victims)
            if (await asyncio.wait({load}, timeout=0.3))[0]:
                return

    async def _look(self, victims: list[str]) -> None:
        """Counts the victims that the server has found to be down."""
        told = json.loads((await ask(self.fleet.port, "/ready", method="GET")).body)
        down = sum(each["state"] == "down" and each["name"] in victims for each in told["endpoints"])
        self.counts["down"] = max(self.counts["down"], down)

    async def _load(self, n: int, seconds: float) -> None:
        """Callers that ask until `n` requests and `seconds` have passed."""
        end, asked = time.monotonic() + seconds, itertools.count()
        engines = self.fleet.engines

        async def caller(_: int) -> None:
            while (number := next(asked)) < n or time.monotonic() < end:
                v1, stream = number % 2 == 1, number // 2 % 2 == 1
                case = Case("m", engines[number // 4 % len(engines)], v1, stream, nonce())
                body, path = case.body(self.fleet.tokens), V1 if v1 else API
                answer = await ask(self.fleet.port, path, body, timeout=DEADLINES["total"])
                self.answers.append((case, answer))
                await asyncio.sleep(0.03)

        await at_once(range(self.fleet.callers), caller)

    def _judge(self) -> None:
        """Each answer is good, or had begun and ends with a typed error; none was sent on after it had begun."""
        ways = self.fleet.diary.by_request()
        for case, answer in self.answers:
            way = ways[case.name]
            kind, text = judge(answer, v1=case.v1, stream=case.stream)
            what = f"{self.name}: {case.engine or 'any'}, {'v1' if case.v1 else 'api'}"
            what += f", {'stream' if case.stream else 'whole'}: {kind}"
            self.found.check(self._accounts_for(case, kind, text, way, answer), f"{what} {answer.body[:200]!r}")
            self.found.need(not sent_again(way), f"{what}: sent on after its first byte")
            self.counts["sent on"] += sum(entry.what == "chat" for entry in way) > 1
        self.counts["n"] = len(self.answers)
        down = self.counts["down"]
        self.found.need(bool(down) is not self.fault.passing, f"{self.name}: {down} endpoints were found to be down")

    def _accounts_for(self, case: Case, kind: str, text: str, way: list[Entry], answer: Answer) -> bool:
        if kind == "good":
            self.counts["good"] += 1
            return self.fleet.right(case, text)
        begun = any(entry.what == "first" for entry in way)
        if begun and kind in BROKEN | {"engine_timeout"} and not self.fault.passing:
            self.counts["begun, then broken"] += 1
            return True
        if self.fault.all and kind in ("engine_unavailable", "engine_overloaded") and not begun:
            self.counts["refused"] += 1
            return int(answer.headers.get("retry-after", 0)) >= 1
        self.counts["lost"] += 1
        return False

    def _follow(self, name: str, moments: list[Json]) -> None:
        """Once the server knows of the failure: one trial at the end of each pause, and none in between."""
        pace, fault, what = self.fleet.pace, self.fault, f"{self.name}: {name}"
        lists = fault.mode in STATUSES  # only what is generated is refused
        first = outages = trials = 0
        tried: Counter[str] = Counter()
        until, kind = 0.0, ""
        for moment in sorted(moments, key=lambda moment: float(moment["at"])):
            at = moment["at"]
            if moment["what"] == "failed":
                kind = moment["kind"]
                if moment["counted"]:
                    pause = min(pace.longest_pause, pace.first_pause * 2**outages)
                    if kind == "engine_overloaded":
                        pause = max(pause, fault.retry_after)
                    early = moment["since"] + pause - moment["until"]
                    self.found.need(early <= 0, f"{what}: its pause {outages + 1} is {early:.3f} s too short")
                    outages, until, tried = outages + 1, moment["until"], Counter()
            elif moment["what"] == "back":
                fine = not outages or (lists and kind != "engine_overloaded")
                self.found.need(fine, f"{what}: it is taken to be back, and is not")
                first = outages = 0
            elif moment["what"] == "begun" and not outages:
                first += 1
                self.found.need(first <= self.fleet.callers, f"{what}: asked {first} times before it was known")
            elif moment["what"] in ("begun", "look") and outages:
                how = moment["what"]
                most = int(not fault.silent) if how == "begun" else math.inf if lists else 1
                tried[how] += 1
                trials += how == "begun" or not lists
                self.found.need(at >= until, f"{what}: {how} {until - at:.3f} s before its pause ends")
                self.found.need(tried[how] <= most, f"{what}: {how} {tried[how]} times after a pause, more than {most}")
        self.counts["most trials"] = max(self.counts["most trials"], trials)

    def _compare(self, name: str, struck: float, ended: float, moments: list[Json]) -> None:
        """What reached the endpoint is what the server says that it let through, each once."""
        diary, what = self.fleet.diary, f"{self.name}: {name}"
        if self.fault.mode == "close":  # a refused connection is tried again where the engine is now
            times = len([at for at in diary.of(name, struck, "connection") if at < ended])
            most = 3 * sum(moment["what"] in ("begun", "list") for moment in moments)
            self.found.need(times <= most, f"{what}: {times} connections, more than {most}")
            return
        begun = {moment["asked"] for moment in moments if moment["what"] == "begun"}
        reached = Counter(
            entry.nonce
            for entry in diary.entries
            if entry.endpoint == name and entry.what == "chat" and struck <= entry.at < ended
        )
        for asked, times in reached.items():
            self.found.need(asked in begun, f"{what}: a request reached it that was sent elsewhere")
            self.found.need(times == 1, f"{what}: a request reached it {times} times")


def sent_again(way: list[Entry]) -> bool:
    """Whether a request was sent after an answer to it had begun."""
    whats = [entry.what for entry in way]
    return "first" in whats and "chat" in whats[whats.index("first") :]


async def run_phases(fleet: Fleet, faults: Iterable[str]) -> Result:
    found = Result()
    async with fleet:
        for name in faults:
            phase = Phase(fleet, name, found)
            await phase.run()
            found.figures[name] = dict(phase.counts)
        found.need(not fleet.server.unexpected, f"the log has {fleet.server.unexpected} unexpected errors")
    return found


async def fleet(full: bool, off: str | None = None, focus: str = "") -> Result:
    """Twelve fakes of all dialects: nothing is lost that another endpoint could answer, dead ones are left alone."""
    return await run_phases(FakeFleet(Pace() if full else QUICK, off), [name for name in FAULTS if focus in name])


async def fleet_real(full: bool, off: str | None = None, focus: str = "") -> Result:
    """The same with three processes of llama.cpp, killed and frozen for real."""
    faults = [name for name in (FAULTS if full else REAL_FAULTS) if focus in name]
    return await run_phases(RealFleet(Pace() if full else QUICK_REAL, off), faults)
