"""The API on Ray Serve: two nodes, two replicas, a scripted vLLM; replicas and nodes are killed under load.

Needs `pip install -r tests/scale/requirements.txt` (an environment of its own); skipped where Ray is not installed.
Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm_inference as product
from tests.fake_engine import FakeEngine
from tests.harness import Command, clean_env, good, payloads, refused, refused_v1, until
from tests.processes import descendants, free_port

ray = pytest.importorskip("ray")
pytest.importorskip("aiohttp")

from tests.scale.load import Load, record, reported  # noqa: E402

KEY = "sk-scale"
AUTH = {"authorization": f"Bearer {KEY}"}
ASK = {"prompt": "hi"}


class Cluster:
    """Two nodes, an engine, and our API on both."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self.port, other = free_port(), free_port()
        os.environ |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(other),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        self.small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.engine = FakeEngine("vllm").start()
        self.nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, **self.small})
        self.second = self.nodes.add_node(num_cpus=1, **self.small)
        os.environ["RAY_ADDRESS"] = self.nodes.address
        self.url, self.second_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{other}"
        self.settings = product.Settings(
            engine="vllm",
            base_url=self.engine.base_url,
            api_keys=(KEY,),
            deadlines=product.Deadlines(total=60, idle=30),
        )
        began = time.monotonic()
        product.deploy(self.settings, host="127.0.0.1", port=self.port, replicas=2)
        record("ray", "deploy", {"ready_after_s": round(time.monotonic() - began, 1), "ray": ray.__version__})
        self.client = httpx.Client(base_url=self.url, headers=AUTH, timeout=60, trust_env=False)

    def close(self) -> None:
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self.nodes.shutdown()
        self.engine.stop()
        self.client.close()
        os.environ.pop("RAY_ADDRESS", None)

    def of(self, node: Any) -> set[int]:
        """The processes of a node."""
        found = {info.process.pid for infos in node.all_processes.values() for info in infos}
        return found | {pid for parent in found for pid in descendants(parent)}

    def another(self) -> None:
        """A node in the place of the second, which is dead."""
        self.nodes.remove_node(self.second, allow_graceful=False)
        self.second = self.nodes.add_node(num_cpus=1, **self.small)

    def replicas(self, node: Any = None) -> set[int]:
        nodes = [node] if node else [self.nodes.head_node, *self.nodes.worker_nodes]
        return {pid for each in nodes for pid in self.of(each) if command(pid).startswith("ray::ServeReplica")}

    def running(self) -> int:
        from ray import serve

        states = serve.status().applications["llm_inference"].deployments["api"].replica_states
        return sum(number for state, number in states.items() if str(getattr(state, "value", state)) == "RUNNING")

    def whole_again(self, without: set[int]) -> bool:
        return len(self.replicas() - without) == 2 and self.running() == 2


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def calm(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.engine.wait(lambda: cluster.engine.live == 0, 30)
    cluster.engine.reset()


# ------------------------------------------------------------------------------------------- the contract, through Ray


def test_both_nodes_have_a_replica_and_answer(cluster: Cluster) -> None:
    assert (len(cluster.replicas(cluster.nodes.head_node)), len(cluster.replicas(cluster.second))) == (1, 1)
    for url in (cluster.url, cluster.second_url):
        reply = httpx.post(url + "/api/v1/llm/generate", json=ASK, headers=AUTH, trust_env=False)
        assert good(reply)["text"] == cluster.engine.text
        assert reply.headers.get_list("x-request-id")[0] == reply.json()["request_id"]  # Ray adds one of its own
    reply = cluster.client.post(
        "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert reply.json()["choices"][0]["message"]["content"] == cluster.engine.text
    assert cluster.client.get("/ready").status_code == cluster.client.get("/docs").status_code == 200


def test_errors_have_our_classes(cluster: Cluster) -> None:
    refused(
        httpx.post(cluster.url + "/api/v1/llm/generate", json=ASK, trust_env=False), "unauthorized"
    )  # loopback needs the key too
    refused(cluster.client.post("/api/v1/llm/generate", json={"prompt": ""}), "invalid_request")
    refused(cluster.client.get("/nowhere"), "not_found")
    refused_v1(
        cluster.client.post(
            "/v1/chat/completions", json={"model": "nope", "messages": [{"role": "user", "content": "hi"}]}
        ),
        "model_not_found",
    )


def test_tokens_come_one_by_one(cluster: Cluster) -> None:
    cluster.engine.pace = 0.2
    began, times = time.monotonic(), []
    with cluster.client.stream("POST", "/api/v1/llm/generate", json=ASK | {"stream": True}) as reply:
        for _ in reply.iter_raw():
            times.append(time.monotonic() - began)
    assert times[0] < 0.6 and len(times) > 6 and max(b - a for a, b in itertools.pairwise(times)) < 0.8, times


@pytest.mark.parametrize("path", ["head", "second"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_engine_stops(cluster: Cluster, stream: bool, path: str) -> None:
    cluster.engine.pace = 5.0
    took = []
    for number in range(5):
        url = cluster.url if path == "head" else cluster.second_url
        client = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=20)
        headers = {**AUTH, "content-type": "application/json"}
        client.request("POST", "/api/v1/llm/generate", json.dumps(ASK | {"stream": stream}), headers)
        cluster.engine.wait(lambda: cluster.engine.live == 1)
        time.sleep(0.1 * number)
        gone = time.monotonic()
        client.close()
        cluster.engine.wait(lambda: cluster.engine.live == 0, 10)
        took.append(time.monotonic() - gone)
    record(
        "ray",
        f"client gone, {'streamed' if stream else 'whole'}, {path} node's proxy",
        {"upstream_closed_within_s": round(max(took), 3), "of": len(took)},
    )
    assert max(took) < 2.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"api_keys": ()}, "API key"),
        ({"base_url": "http://127.0.0.1:9"}, "runs already"),
        ({"launch_args": ("--x",)}, "starts no engine"),
    ],
)
def test_refused_before_anything_starts(cluster: Cluster, change: dict[str, Any], why: str) -> None:
    with pytest.raises(product.InvalidRequest, match=why):
        product.deploy(dataclasses.replace(cluster.settings, **change), host="127.0.0.1", port=cluster.port)


# -------------------------------------------------------------------------------------------------------- under load


@contextlib.contextmanager
def loaded(cluster: Cluster, clients: int = 16) -> Iterator[Load]:
    cluster.engine.pace = 0.06  # an answer takes half a second
    with Load(cluster.url, "m", key=KEY, clients=clients) as load:
        until(lambda: len(load.answers) > 2 * clients, 30)
        yield load


def test_a_rolling_update_loses_nothing(cluster: Cluster) -> None:
    before = cluster.replicas()
    with loaded(cluster) as load:
        at = time.monotonic()
        product.deploy(
            dataclasses.replace(cluster.settings, max_tokens_cap=4096), host="127.0.0.1", port=cluster.port, replicas=2
        )
        until(lambda: cluster.whole_again(before), 60)
        took = time.monotonic() - at
        time.sleep(1)
    figures = reported(load.answers, at) | {"all_new_after_s": round(took, 1)}
    record("ray", "rolling update under load", figures)
    assert all(answer.said == "ok" for answer in load.answers), figures
    answer = good(cluster.client.post("/api/v1/llm/generate", json=ASK | {"max_tokens": 5000}))
    assert answer["ignored"] == ["max_tokens"] and cluster.engine.bodies[-1]["max_tokens"] == 4096


def test_an_update_that_finds_no_engine_leaves_the_old_replicas(cluster: Cluster) -> None:
    """Its engine was there when deploy() looked, and is gone when the replica does."""
    until(lambda: cluster.whole_again(set()), 60)
    before, doomed = cluster.replicas(), FakeEngine("vllm").start()
    failed: list[BaseException] = []

    def update() -> None:
        try:
            product.deploy(
                dataclasses.replace(cluster.settings, base_url=doomed.base_url),
                host="127.0.0.1",
                port=cluster.port,
                replicas=2,
            )
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=update, daemon=True)
    with loaded(cluster, clients=4) as load:
        at = time.monotonic()
        thread.start()
        doomed.wait(lambda: any(seen.path == "/version" for seen in doomed.requests), 20)
        time.sleep(0.3)
        doomed.stop()
        thread.join(120)
        took = time.monotonic() - at
    survivors = cluster.replicas() & before
    record(
        "ray",
        "update whose engine is gone",
        reported(load.answers, at) | {"refused_after_s": round(took, 1), "old_replicas_left": len(survivors)},
    )
    assert survivors and all(answer.said == "ok" for answer in load.answers), load.answers
    assert isinstance(failed[0], product.EngineUnavailable), failed
    product.deploy(cluster.settings, host="127.0.0.1", port=cluster.port, replicas=2)


def hurt(
    cluster: Cluster, name: str, victims: set[int], number: signal.Signals = signal.SIGKILL, patience: float = 90
) -> dict[str, Any]:
    gone = cluster.replicas() & victims
    with loaded(cluster) as load:
        time.sleep(1)
        at = time.monotonic()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until(lambda: cluster.whole_again(gone), patience)
        full = time.monotonic() - at
        time.sleep(2)
    figures = reported(load.answers, at) | {"full_capacity_after_s": round(full, 1)}
    record("ray", name, figures)
    return figures


def test_replica_killed_under_load(cluster: Cluster) -> None:
    for node in (cluster.second, cluster.nodes.head_node):
        until(lambda: cluster.whole_again(set()), 60)
        victims = cluster.replicas(node) or cluster.replicas(cluster.nodes.head_node)
        figures = hurt(
            cluster,
            f"one replica killed -9, {'the other' if node is cluster.second else 'the same'} node",
            {min(victims)},
        )
        assert figures["lost_beyond_in_flight"] == 0 and figures["silent_ends"] == 0, figures
        assert len(figures["in_flight_ended_as"]) > 1, figures  # it was hit under load


def test_every_replica_killed_under_load(cluster: Cluster) -> None:
    """Nobody is left: what is asked meanwhile waits for a new replica, or is refused by Ray."""
    until(lambda: cluster.whole_again(set()), 60)
    figures = hurt(cluster, "both replicas killed -9", cluster.replicas())
    assert figures["silent_ends"] == 0, figures


def test_node_killed_under_load(cluster: Cluster) -> None:
    until(lambda: cluster.whole_again(set()) and bool(cluster.replicas(cluster.second)), 60)
    figures = hurt(cluster, "node killed -9", cluster.of(cluster.second))
    cluster.another()
    assert figures["lost_beyond_in_flight"] == 0 and figures["silent_ends"] == 0, figures


def test_node_frozen_under_load(cluster: Cluster) -> None:
    """As a machine without power: no connection is closed, nothing answers."""
    product.deploy(
        dataclasses.replace(cluster.settings, max_tokens_cap=4097), host="127.0.0.1", port=cluster.port, replicas=2
    )
    until(lambda: cluster.whole_again(set()) and bool(cluster.replicas(cluster.second)), 60)
    victims = cluster.of(cluster.second)
    try:
        figures = hurt(cluster, "node frozen", victims, signal.SIGSTOP, 150)
    finally:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.another()
    assert figures["silent_ends"] == 0, figures


# -------------------------------------------------------------------------------------------- limits, and the end of it


def test_our_limit_answers_before_rays(cluster: Cluster) -> None:
    small = dataclasses.replace(cluster.settings, max_in_flight=2, queue=1)
    product.deploy(small, host="127.0.0.1", port=cluster.port, replicas=1)
    until(lambda: cluster.running() == 1 and len(cluster.replicas()) == 1, 60)
    cluster.engine.pace = 0.1
    with ThreadPoolExecutor(60) as pool:
        replies = list(pool.map(lambda _: cluster.client.post("/api/v1/llm/generate", json=ASK), range(60)))
    kinds = [reply.headers.get("x-error-kind", "ok") for reply in replies]
    record("ray", "60 at once, places for 3", {kind: kinds.count(kind) for kind in set(kinds)})
    assert set(kinds) == {"ok", "busy"} and all(
        reply.headers["retry-after"] for reply in replies if reply.status_code == 429
    )


def test_replicas_grow_with_the_load(cluster: Cluster) -> None:
    small = dataclasses.replace(cluster.settings, max_in_flight=8)
    product.deploy(small, host="127.0.0.1", port=cluster.port, replicas=(1, 2))
    until(lambda: cluster.running() == 1 and len(cluster.replicas()) == 1, 60)
    with loaded(cluster) as load:
        at = time.monotonic()
        until(lambda: cluster.running() == 2, 90)
        grown = time.monotonic() - at
        time.sleep(1)
    record("ray", "1 to 2 replicas", {"grown_after_s": round(grown, 1), **reported(load.answers, at)})
    assert all(answer.said == "ok" for answer in load.answers)


def test_removed_while_a_stream_runs(cluster: Cluster) -> None:
    from ray import serve

    cluster.engine.pace = 0.3
    ended: list[Any] = []

    def read() -> None:
        ended.append(payloads(cluster.client.post("/api/v1/llm/generate", json=ASK | {"stream": True})))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    cluster.engine.wait(lambda: cluster.engine.live == 1)
    time.sleep(0.5)
    serve.delete("llm_inference")
    reader.join(30)
    assert ended and ended[0][-1] == "[DONE]"
    assert cluster.client.post("/api/v1/llm/generate", json=ASK).status_code == 404  # Ray's own


def test_the_command(cluster: Cluster) -> None:
    """`--serve --ray` deploys to the cluster that RAY_ADDRESS names, and removes what it deployed when it is told to
    stop."""
    argv = [
        sys.executable,
        str(product.__file__),
        "--serve",
        "--ray",
        "--replicas",
        "2",
        "--engine",
        "vllm",
        "--base-url",
        cluster.engine.base_url,
    ]
    argv += ["--api-key", KEY, "--host", "127.0.0.1", "--port", str(cluster.port)]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_env()
    )
    try:
        assert process.stdout
        said = ""
        while "Swagger UI" not in said:  # the banner: it is deployed
            said += (line := process.stdout.readline())
            assert line, said
        assert cluster.running() == 2
        assert good(cluster.client.post("/api/v1/llm/generate", json=ASK))["text"] == cluster.engine.text
        process.terminate()
        assert process.wait(60) == 0
        assert cluster.client.post("/api/v1/llm/generate", json=ASK).status_code == 404  # Ray's own
    finally:
        process.kill()
        process.wait(5)


# ----------------------------------------------------------------------------------------------------------- overhead


class Tree:
    """What tests.bench.run.drive wants to know of a server that is many processes."""

    def __init__(self, url: str, pids: set[int]) -> None:
        self.url, self.pids = url, pids

    def cpu(self) -> float:
        total = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def rss(self) -> float:
        pages = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not shutil.which("wrk"), reason="apt install wrk")
def test_overhead(cluster: Cluster) -> None:
    from tests.bench import run as bench

    body = {"model": "m", "messages": bench.MESSAGES, "max_tokens": 256}
    with (
        bench.engine(bench.TOKENS) as upstream,
        Command("--engine", "vllm", "--base-url", upstream.url, "--api-key", bench.KEY) as direct,
    ):
        settings = product.Settings(engine="vllm", base_url=upstream.url, api_keys=(bench.KEY,))
        product.deploy(settings, host="127.0.0.1", port=cluster.port, replicas=1)
        through = Tree(
            cluster.url,
            cluster.of(cluster.nodes.head_node)
            | {pid for node in cluster.nodes.worker_nodes for pid in cluster.of(node)},
        )
        figures: dict[str, Any] = {"rss_mib": round(through.rss())}
        for streamed in (False, True):
            asked = body | ({"stream": True} if streamed else {})
            one, other = (
                [bench.drive(server, upstream, bench.V1, asked, 16, 4.0) for _ in range(3)]  # type: ignore[arg-type]
                for server in (Tree(direct.url, {direct.process.pid}), through)
            )
            what = "token_us" if streamed else "cpu_ms"
            ours, rays = (sorted(found[what] for found in each)[1] for each in (one, other))
            name = "streamed token, CPU µs" if streamed else "whole answer, CPU ms"
            figures[name] = {"--serve": round(ours, 3), "through Ray": round(rays, 3), "ratio": round(rays / ours, 1)}
            figures[name] |= {
                "per_s --serve": round(sorted(f["rps"] for f in one)[1]),
                "per_s Ray": round(sorted(f["rps"] for f in other)[1]),
            }
            assert not any(f["errors"] for f in (*one, *other)), (one, other)
    record("ray", "overhead", figures)
