"""Our server and nginx in front of `steps.py`: added time to first token and lost tokens/s.

    python -m tests.gpu.standin --out tests/gpu/standin.json [--also OTHER_COPY_OF/llm_inference.py]

Rounds are interleaved (the stand-in itself, ours, nginx, the other copy), and each is compared with the stand-in of its
own round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.load import LENGTHS
from tests.gpu.machine import ended, wait_until
from tests.gpu.run import at_once, one_load
from tests.processes import ROOT, free_port

HERE = Path(__file__).resolve().parent
NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
    uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
    upstream engine {{ server 127.0.0.1:{engine}; keepalive 512; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
#: streams, the engine's seconds a step, µs of its server's CPU a token
CASES = ((16, 0.0105, 60), (64, 0.0105, 60), (64, 0.0085, 120), (256, 0.015, 60))


def generator(lengths: tuple[int, ...] = LENGTHS) -> argparse.Namespace:
    """What run.py's loads are told: one process, for the machine has two cores."""
    return argparse.Namespace(lengths=list(lengths), processes=1)


def case(streams: int, step: float, cost: float, rounds: int, modules: dict[str, Path]) -> dict[str, Any]:
    def url(port: int) -> str:
        return f"http://127.0.0.1:{port}"

    engine, nginx = free_port(), shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    ports = {"engine": engine} | {name: free_port() for name in modules} | ({"nginx": free_port()} if nginx else {})
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, path: str, *command: str) -> None:
            log = work / f"{name}.log"
            process = stack.enter_context(ended(list(command), log, dict(os.environ)))
            wait_until(url(ports[name]) + path, process, log, 60)

        start(
            "engine",
            "/version",
            sys.executable,
            str(HERE / "steps.py"),
            "--port",
            str(engine),
            "--step",
            str(step),
            "--token-cost",
            str(cost),
        )
        if nginx:
            (work / "nginx.conf").write_text(NGINX.format(dir=work, engine=engine, port=ports["nginx"]))
            start("nginx", "/version", nginx, "-c", str(work / "nginx.conf"))
        for name, module in modules.items():
            where = ["--base-url", url(engine), "--host", "127.0.0.1", "--port", str(ports[name]), "--no-auth"]
            start(name, "/ready", sys.executable, str(module), "--serve", "--engine", "vllm", *where)
        for port in ports.values():
            one_load(generator((4, 8)), url(port), "m", streams, seed=1, warm_up=False)  # warms up
        seen = [
            {
                name: one_load(generator(), url(port), "m", streams, seed=1, warm_up=False)
                for name, port in ports.items()
            }
            for _ in range(rounds)
        ]
        together = {
            name: at_once(generator(), [url(engine), url(port)], "m", streams // 2, rounds, seed=1)
            for name, port in ports.items()
        }
    found: dict[str, Any] = {"streams": streams, "step_s": step, "token_cost_us": cost, "rounds": rounds}
    for name in ports:
        found[name] = {
            key: statistics.median(one[name][key] for one in seen) for key in ("tokens_per_s", "first_token_p50_ms")
        } | {"errors": sum(one[name]["errors"] for one in seen)}
        found[name] |= {
            "mixed_later_ms": together[name]["first_token_later_ms"],
            "mixed_later_ms_each": together[name]["first_token_later_ms_each"],
        }
        if name != "engine":
            ratios = [round(one[name]["tokens_per_s"] / one["engine"]["tokens_per_s"], 3) for one in seen]
            later = [round(one[name]["first_token_p50_ms"] - one["engine"]["first_token_p50_ms"], 1) for one in seen]
            found[name] |= {
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "first_token_later_ms": statistics.median(later),
                "later_ms": later,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--also", type=Path, help="another copy of the module, measured as `before`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    modules = {"ours": ROOT / "llm_inference.py"} | ({"before": args.also} if args.also else {})
    found = []
    for streams, step, cost in CASES:
        found.append(case(streams, step, cost, args.rounds, modules))
        print(json.dumps(found[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
