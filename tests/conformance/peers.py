"""The same questions to peers on /v1: one engine and model, bare, through us, through LiteLLM, and Xinference.

    python -c "from tests.bench.run import install_peers; install_peers()"  # once: LiteLLM, in its own environment
    python -m tests.bench.xinference --install                              # once: Xinference
    python -m tests.conformance.peers --engine llamacpp --json FILE         # starts and ends all; vllm: LiteLLM alone

Every side gets the same OpenAI bodies and is judged as a bare engine is. Each peer is as it comes (no setting but where
its engine is); `litellm-validating` is LiteLLM with the one switch that its documentation has against wrong answers,
enable_json_schema_validation. Xinference runs the same GGUF file by its own llama.cpp (the same release of xllamacpp,
the same settings).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from llm_inference import LlamaCppAdapter, LLMInferencer, pull_model
from tests.engines import running
from tests.processes import free_port

from ..bench import run as bench
from ..bench import xinference
from ..bench.proc import Process
from . import features, judge
from .__main__ import ask_all, merged
from .sides import HTTP, Bare, Json, Us, target_of, through_us

PROVIDERS = {
    "llamacpp": "openai",
    "vllm": "hosted_vllm",
}  #: LiteLLM's names; "openai" is what it documents for any server of OpenAI's dialect
NAMES = {row.name for row in features.FEATURES}
#: a row that is there for /v1 too is asked once; the last is a field of ours
ROWS = [
    row for row in features.FEATURES if f"/v1 {row.name}" not in NAMES and not row.name.startswith("on_unsupported")
]


class Peer(Bare):
    """A server of OpenAI's dialect in front of the engine that `us` talks to, or in its place."""

    def __init__(self, label: str, us: Us, url: str, model: str, key: str) -> None:
        super().__init__(us.engine, HTTP(url, {"authorization": f"Bearer {key}"}), us)
        self.label, self.model = label, model


@contextlib.contextmanager
def engine(kind: str) -> Iterator[tuple[str, Path | None]]:
    """Its URL, and its file: the embedded llama.cpp, but on a port of its own, or a real vLLM on the CPU."""
    if kind == "vllm":
        with running("vllm") as server:
            yield server.base_url, None
        return
    model, port = pull_model(None, lambda done, total: None, threading.Event()), free_port()
    adapter = LlamaCppAdapter(launch_args=(f"port={port}",))
    adapter.file = model
    command, env = adapter.command(SimpleNamespace(uds="127.0.0.1", key=bench.KEY))  # type: ignore[arg-type]
    with Process("llamacpp", command, port=port, env=env) as process:
        yield process.url, model.path


@contextlib.contextmanager
def litellm(us: Us, settings: Json) -> Iterator[tuple[str, str]]:
    port, target = free_port(), target_of(us)
    where = {"model": f"{PROVIDERS[us.engine]}/{us.model}", "api_base": target.url + "/v1", "api_key": bench.KEY}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        json.dump(
            {"model_list": [{"model_name": us.model, "litellm_params": where}], "litellm_settings": settings}, config
        )
        config.flush()
        command = [
            str(bench.peer_program("litellm")),
            "--config",
            config.name,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        env = {
            "LITELLM_MASTER_KEY": bench.KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
        }  # it stays on this machine
        with Process("litellm", command, port=port, ready="/health/liveliness", env=env) as process:
            yield process.url, us.model


@contextlib.contextmanager
def xinference_server(gguf: Path) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as home:
        process, model = xinference.xinference(gguf, home)
        with process:
            xinference.launch(process.url, gguf)
            yield process.url, model


def version(package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [str(bench.PEER_HOME / package / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def ask_peers(
    us: Us, gguf: Path | None, rows: Sequence[judge.Feature], names: Sequence[str]
) -> Iterator[tuple[str, Json | list[Json]]]:
    starts = {
        "us": contextlib.nullcontext((us.http.url, f"{us.engine}/{us.model}")),
        "bare": contextlib.nullcontext((target_of(us).url, us.model)),
        "litellm": litellm(us, {}),
        "litellm-validating": litellm(us, {"enable_json_schema_validation": True}),
    }
    if gguf:
        starts["xinference"] = xinference_server(gguf)
    for name in names:
        if name in starts:
            with starts[name] as (url, model):
                yield name, judge.as_json(ask_all(Peer(name, us, url, model, bench.KEY), rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", required=True, choices=list(PROVIDERS))
    parser.add_argument("--sides", default="us,bare,litellm,litellm-validating,xinference", help="by commas")
    parser.add_argument("--only", default="", help="the rows with this in their name")
    parser.add_argument("--json", type=Path, help="write the results there, over what the file has")
    args = parser.parse_args(argv)
    rows = [row for row in ROWS if args.only in row.name]
    with engine(args.engine) as (url, gguf):
        llm = LLMInferencer(args.engine, base_url=url, api_key=bench.KEY)
        try:
            with through_us(llm) as us:
                result: Json = {
                    "engine": args.engine,
                    "version": us.version,
                    "model": us.model,
                    "date": datetime.date.today().isoformat(),
                }
                result |= ask_peers(us, gguf, rows, args.sides.split(","))
                result["peers"] = {name: version(name) for name in ("litellm", "xinference") if name in result}
        finally:
            llm.close()
    if args.json:
        args.json.write_text(json.dumps(merged(args.json, result), ensure_ascii=False, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
