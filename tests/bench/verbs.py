"""CPU time of a call through the Python verbs, beside a bare HTTP call (http.client, aiohttp).

    python verbs.py --url http://127.0.0.1:9100 --program ../../llm_inference.py --calls 2000

The stand-in engine is another process, so that this one's CPU time is the verbs' alone. Prints one line of JSON: µs a
call.
"""

import argparse
import asyncio
import http.client
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
BODY = {"model": "m", "messages": MESSAGES, "max_tokens": 64}
PATH = "/v1/chat/completions"


def load(program: str) -> Any:
    """The module that is measured, from its file."""
    spec = importlib.util.spec_from_file_location("llm_inference", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llm_inference"] = module
    spec.loader.exec_module(module)
    return module


def cost(work: Callable[[int], Any], calls: int) -> float:
    """µs of CPU time a call, of all our threads."""
    work(max(20, calls // 10))
    began = time.process_time()
    work(calls)
    return 1e6 * (time.process_time() - began) / calls


def measure(url: str, module: Any, calls: int, rounds: int) -> dict[str, float]:
    where = urlsplit(url)
    wire = http.client.HTTPConnection(where.hostname or "", where.port)
    llm = module.LLMInferencer("vllm", "m", base_url=url)

    def bare(times: int) -> None:
        for _ in range(times):
            wire.request("POST", PATH, json.dumps(BODY), {"content-type": "application/json"})
            json.loads(wire.getresponse().read())["choices"][0]["message"]["content"]

    def chat(times: int) -> None:
        for _ in range(times):
            llm.chat(MESSAGES, max_tokens=64)

    def stream(times: int) -> None:
        for _ in range(times):
            for _ in llm.stream(MESSAGES, max_tokens=64):
                pass

    found: dict[str, list[float]] = {}
    loop = asyncio.new_event_loop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        client = runner.run(open_session())
        aio = module.LLMInferencer("vllm", "m", base_url=url)

        async def abare(_: int) -> None:
            async with client.post(
                url + PATH, data=json.dumps(BODY), headers={"content-type": "application/json"}
            ) as reply:
                json.loads(await reply.read())["choices"][0]["message"]["content"]

        async def achat(_: int) -> None:
            await aio.achat(MESSAGES, max_tokens=64)

        async def astream(_: int) -> None:
            async for _text in aio.astream(MESSAGES, max_tokens=64):
                pass

        def at_once(one: Callable[[int], Coroutine[Any, Any, None]], width: int) -> Callable[[int], None]:
            async def lane(times: int) -> None:
                for number in range(times):
                    await one(number)

            async def lanes(times: int) -> None:
                await asyncio.gather(*(lane(times // width) for _ in range(width)))

            return lambda times: runner.run(lanes(times))

        few = max(10, calls // 20)
        for _ in range(rounds):
            for name, work, times in (
                ("http.client", bare, calls),
                ("chat", chat, calls),
                ("stream", stream, few),
                ("aiohttp", at_once(abare, 1), calls),
                ("achat", at_once(achat, 1), calls),
                ("astream", at_once(astream, 1), few),
                ("aiohttp x16", at_once(abare, 16), calls),
                ("achat x16", at_once(achat, 16), calls),
            ):
                found.setdefault(name, []).append(cost(work, times))
        runner.run(client.close())
        runner.run(aio.aclose())
    llm.close()
    return {name: statistics.median(values) for name, values in found.items()}


async def open_session() -> Any:
    import aiohttp

    return aiohttp.ClientSession()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--program", default=str(Path(__file__).resolve().parents[2] / "llm_inference.py"))
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args.url, load(args.program), args.calls, args.rounds)))


if __name__ == "__main__":
    main()
