"""The row about identity: models, versions and engines are replaced behind their addresses under load."""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
from dataclasses import dataclass, field

from tests.fake_engine import DIALECTS, VERSIONS, Dialect

from .rig import API, V1, Answer, Engine, Link, Result, World, asking, judge, nonce, request_bytes

MODELS = ("alpha", "beta", "gamma")
KINDS = ("model", "version", "engine")
HOWS = ("restarted", "at once")  # the port is closed in between; or no connection is ever refused
CALLERS = 3  # at each address
SETTLED = 5  # seconds until the model that is there now answers
#: what a request may end in while its server is replaced
EXPECTED = {"good", "model_not_found", "engine_unavailable", "bad_engine_reply", "engine_overloaded", "not_ready"}


@dataclass
class Address:
    """One address, what serves there, and what came from it."""

    dialect: Dialect  # that the server was told to expect
    engine: Engine  # what is there
    asked: int = 0
    right: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    last: str = "begun"


def identify(engine: Engine, model: str, version: str) -> None:
    """From now on it serves that model; each answer says so."""
    engine.model, engine.models, engine.version = model, [model], version
    engine.answer = lambda asked: f"{engine.dialect} serves {model}."


async def at_once(engine: Engine, model: str, version: str) -> None:
    """Another server has the address, without a refused connection: old connections end, new ones reach it."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def change() -> None:
        identify(engine, model, version)
        for writer in engine._writers:
            writer.transport.abort()
        loop.call_soon_threadsafe(done.set)

    engine._loop.call_soon_threadsafe(change)
    await done.wait()


async def restarted(address: Address, dialect: Dialect, model: str, version: str) -> None:
    """The server ends, and another one starts at its port."""
    port = address.engine.port
    await asyncio.to_thread(address.engine.stop)
    engine = Engine(dialect)
    engine.port = port
    identify(engine, model, version)
    await asyncio.to_thread(engine.start)
    address.engine = engine


async def replace(address: Address, kind: str, how: str, serial: int) -> None:
    model, version, dialect = address.engine.model, address.engine.version, address.engine.dialect
    if kind == "model":
        model = MODELS[(MODELS.index(model) + 1) % len(MODELS)]
    elif kind == "version":
        version = f"{VERSIONS[dialect]}.{serial}" if dialect != "llamacpp" else f"b{6714 + serial}-d2ee056e"
    elif kind == "engine":
        others = [each for each in DIALECTS if each != address.dialect]
        dialect = others[serial % len(others)]
        model = MODELS[(MODELS.index(model) + 1) % len(MODELS)]
    address.last = f"{kind}, {how}"
    if how == "at once" and kind != "engine":
        await at_once(address.engine, model, version)
    else:
        await restarted(address, dialect, model, version)


async def caller(world: World, address: Address, number: int, over: asyncio.Event) -> None:
    """Asks for one model after the other, whichever is there, on both surfaces, whole and streamed."""
    async with Link(world.port) as link:
        for turn in itertools.count(number):
            if over.is_set():
                return
            v1, stream = turn % 2 == 1, turn // 2 % 2 == 1
            await one(link, address, MODELS[turn % len(MODELS)], v1, stream)
            await asyncio.sleep(0)


async def one(link: Link, address: Address, model: str, v1: bool, stream: bool) -> None:
    body = asking(address.dialect, nonce(), v1=v1, stream=stream)
    body |= {"model": f"{address.dialect}/{model}"} if v1 else {"model_name": model}
    last = address.last
    answer: Answer = await link.ask(request_bytes(V1 if v1 else API, body))
    kind, text = judge(answer, v1=v1, stream=stream)
    address.asked += 1
    address.kinds[kind] += 1
    engine, _, served = text.rstrip(".").partition(" serves ")
    if kind not in EXPECTED:
        address.wrong.append(f"{address.dialect}: {kind} ({last})")
    elif served != (model if kind == "good" else model[: len(served)]):
        surface = f"{'v1' if v1 else 'api'}, {'stream' if stream else 'whole'}"
        what = f"{served} of {engine} answered for {model} ({last}; {surface})"
        address.wrong.append(f"{address.dialect}: another model: {what}")
    elif kind == "good":
        address.right[model] += 1


async def settled(address: Address) -> bool:
    """The model that is there answers again, where it is an engine of the kind that is expected."""
    if address.engine.dialect != address.dialect:
        asked = address.asked
        return await _until(lambda: address.asked >= asked + 2 * CALLERS)
    model = address.engine.model
    before = address.right[model]
    return await _until(lambda: address.right[model] > before)


async def _until(true: object) -> bool:
    assert callable(true)
    deadline = asyncio.get_running_loop().time() + SETTLED
    while not true():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.002)
    return True


async def replacements(address: Address, many: int, found: Result, rng: random.Random) -> None:
    for serial in range(many):
        back = address.engine.dialect != address.dialect
        kind, how = KINDS[serial % len(KINDS)], rng.choice(HOWS)
        if back:  # another engine was there: the expected kind comes back
            address.last = "engine, back"
            await restarted(address, address.dialect, rng.choice(MODELS), VERSIONS[address.dialect])
        else:
            await replace(address, kind, how, serial)
        found.check(await settled(address), f"{address.dialect}: no answer of the new server ({address.last})")


async def replaced(full: bool, off: str | None = None, focus: str = "") -> Result:
    """1,000 replacements of model, version and engine under load: nobody gets an answer of a model that was not asked
    for."""
    found, each = Result(), 250 if full else 15
    dialects = [dialect for dialect in DIALECTS if focus in dialect]
    async with World(off=off) as world:
        addresses = [Address(dialect, world.engines[dialect]) for dialect in dialects]
        for address in addresses:
            await at_once(address.engine, "alpha", VERSIONS[address.dialect])
        over = asyncio.Event()
        callers = [
            asyncio.ensure_future(caller(world, address, number, over))
            for address in addresses
            for number in range(CALLERS)
        ]
        try:
            await asyncio.gather(
                *(replacements(address, each, found, random.Random(n)) for n, address in enumerate(addresses))
            )
        finally:
            over.set()
            await asyncio.gather(*callers, return_exceptions=False)
        tell(addresses, found)
        for address in addresses:
            if address.engine is not world.engines[address.dialect]:
                await asyncio.to_thread(address.engine.stop)
        await world.census(found)
    return found


def tell(addresses: list[Address], found: Result) -> None:
    """The figures."""
    for address in addresses:
        found.bad += address.wrong
    found.figures |= {
        "replacements": found.n,
        "requests": sum(address.asked for address in addresses),
        "answered by the model asked for": {address.dialect: sum(address.right.values()) for address in addresses},
        "ends": dict(sum((address.kinds for address in addresses), collections.Counter[str]())),
    }
