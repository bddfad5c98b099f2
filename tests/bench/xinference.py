"""Xinference beside us: the same GGUF file, binding (xllamacpp), settings and load.

python -m tests.bench.xinference --install     # once: Xinference into an environment of its own
python -m tests.bench.xinference               # writes tests/bench/xinference.json and prints the table
"""

import argparse
import asyncio
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp

import llm_inference
from tests.processes import free_port

from .proc import Process
from .run import HERE, PEER_HOME, PROGRAM, machine, rounded, say

HOME = PEER_HOME / "xinference"
CONTEXT, PARALLEL, TOKENS = 4096, 2, 64
PROMPT = "Write a long story about a lighthouse keeper and the sea."
#: what --serve gives its embedded engine, said to Xinference in its own words (its own default is a thread for every
#: core)
SAME = {
    "n_ctx": CONTEXT * PARALLEL,
    "n_parallel": PARALLEL,
    "kv_unified": False,
    "cache_idle_slots": False,
    "n_threads": llm_inference.free_cores(),
    "warmup": False,
}
MODEL = {
    "version": 2,
    "model_name": "smollm2",
    "model_lang": ["en"],
    "model_ability": ["chat"],
    "context_length": CONTEXT,
    "model_family": "smollm2",
    # the GGUF file's own
    "chat_template": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "stop_token_ids": [2],
    "stop": ["<|im_end|>"],
}


def ours(gguf: Path) -> tuple[Process, str]:
    port = free_port()
    command = [
        sys.executable,
        str(PROGRAM),
        "--serve",
        "--engine",
        "llamacpp",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return Process(
        "ours", command, port=port, ready="/ready", env={"LLAMACPP_MODEL": str(gguf)}
    ), f"llamacpp/{gguf.stem}"


def xinference(gguf: Path, home: str) -> tuple[Process, str]:
    port = free_port()
    command = [
        str(HOME / "bin" / "xinference-local"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    return Process(
        "xinference",
        command,
        port=port,
        ready="/v1/models",
        env={"XINFERENCE_HOME": home, "HF_HUB_OFFLINE": "1", "XINFERENCE_AUTH_ADVANCED": "false"},
    ), "smollm2"


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as exc:
        raise RuntimeError(f"{url}: {exc.code} {exc.read()[:1000]!r}") from exc


def launch(url: str, gguf: Path) -> None:
    """Register the file and load it."""
    spec = {
        "model_format": "ggufv2",
        "model_size_in_billions": 1,
        "quantizations": ["Q4_1"],
        "quantization": "Q4_1",
        "model_id": "local/smollm2",
    }
    spec |= {"model_file_name_template": gguf.name, "model_uri": f"file://{gguf.parent}"}
    post(url + "/v1/model_registrations/LLM", {"model": json.dumps(MODEL | {"model_specs": [spec]}), "persist": False})
    post(
        url + "/v1/models",
        {
            "model_uid": "smollm2",
            "model_name": "smollm2",
            "model_engine": "llama.cpp",
            "model_format": "ggufv2",
            "model_size_in_billions": 1,
            "quantization": "Q4_1",
            "model_type": "LLM",
            "n_gpu": None,
            **SAME,
        },
    )


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first piece of text, seconds in all, pieces."""
    began, first, pieces = time.perf_counter(), 0.0, 0
    async with session.post(url, json=body | {"stream": True}) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {") and (json.loads(line[6:])["choices"] or [{}])[0].get("delta", {}).get(
                "content"
            ):
                first, pieces = first or time.perf_counter() - began, pieces + 1
    return first, time.perf_counter() - began, pieces


async def first_answer(url: str, model: str) -> None:
    async with aiohttp.ClientSession() as session:
        await stream(
            session,
            url + "/v1/chat/completions",
            {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
        )


async def load(url: str, model: str, rounds: int) -> dict[str, float]:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0}
    url += "/v1/chat/completions"
    found: dict[str, float] = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
        await stream(session, url, body)  # warm
        alone = [await stream(session, url, body) for _ in range(rounds)]
        found["first_token_ms"] = 1e3 * statistics.median(first for first, _, _ in alone)
        found["tokens_s_1"] = sum(n for _, _, n in alone) / sum(seconds for _, seconds, _ in alone)
        began = time.perf_counter()
        many = await asyncio.gather(*(stream(session, url, body) for _ in range(8 * max(1, rounds // 4))))
        found["tokens_s_8"] = sum(n for _, _, n in many) / (time.perf_counter() - began)

        async def short() -> None:
            for _ in range(rounds):
                async with session.post(url, json=body | {"max_tokens": 1}) as reply:
                    assert reply.status == 200, reply.status
                    found["prompt_tokens"] = (await reply.json())["usage"]["prompt_tokens"]

        began = time.perf_counter()
        await asyncio.gather(*(short() for _ in range(8)))
        found["requests_s"] = 8 * rounds / (time.perf_counter() - began)
    return found


def one(name: str, gguf: Path, rounds: int, home: str) -> dict[str, float]:
    say(f"{name}: start and load")
    began = time.monotonic()
    process, model = ours(gguf) if name == "ours" else xinference(gguf, home)
    with process:
        if name != "ours":
            launch(process.url, gguf)
        asyncio.run(first_answer(process.url, model))
        found = {"start_s": time.monotonic() - began, "start_cpu_s": process.cpu(), "rss_mib": process.rss()}
        before = process.cpu()
        found |= asyncio.run(load(process.url, model, rounds))
        return found | {"load_cpu_s": process.cpu() - before, "loaded_rss_mib": process.rss()}


ROWS = {
    "start_s": "start to the first answer, s",
    "start_cpu_s": "… CPU s",
    "rss_mib": "memory with the model, MiB",
    "first_token_ms": "first token, ms",
    "tokens_s_1": "tokens/s, 1 client",
    "tokens_s_8": "tokens/s, 8 clients",
    "requests_s": "requests/s of one token, 8 clients",
    "load_cpu_s": "CPU s of the whole load",
}


def table(results: dict[str, Any]) -> str:
    lines = ["| | ours | Xinference | ours ÷ Xinference |", "| --- | --: | --: | --: |"]
    for key, title in ROWS.items():
        mine, theirs = results["ours"][key], results["xinference"][key]
        lines.append(f"| {title} | {mine:.3g} | {theirs:.3g} | {mine / theirs:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help=f"put Xinference into {HOME}")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3, help="starts of each; medians are taken")
    parser.add_argument("--out", type=Path, default=HERE / "xinference.json")
    args = parser.parse_args()
    if args.install:
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
        own = importlib.metadata.version("xllamacpp")
        subprocess.run([str(HOME / "bin" / "pip"), "install", "-q", "xinference", f"xllamacpp=={own}"], check=True)
    gguf = llm_inference.pull_model(None, lambda done, total: None, threading.Event()).path
    found: dict[str, list[dict[str, float]]] = {"ours": [], "xinference": []}
    for _ in range(args.repeat):
        for name, runs in found.items():
            with tempfile.TemporaryDirectory() as home:
                runs.append(one(name, gguf, args.rounds, home))
    results: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    if results["ours"]["prompt_tokens"] != results["xinference"]["prompt_tokens"]:
        raise SystemExit("the two did not get the same prompt: their chat templates differ")
    versions = {
        name: subprocess.run([str(HOME / "bin" / "pip"), "show", name], capture_output=True, text=True, check=True)
        .stdout.splitlines()[1]
        .partition(": ")[2]
        for name in ("xinference", "xllamacpp")
    }
    results |= {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "versions": versions,
        "settings": SAME,
        "repeat": args.repeat,
    }
    args.out.write_text(json.dumps(rounded(results), indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
