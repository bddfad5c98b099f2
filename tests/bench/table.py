"""The benchmark's tables in Markdown, made from results.json.

    python -m tests.bench.table [--lang en|zh] [--results tests/bench/results.json] [--into README.md]

`--into` replaces what stands between the lines `<!-- bench -->` and `<!-- /bench -->` of a file.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Json = dict[str, Any]

NAMES = {
    "direct": ("the stand-in engine itself", "替身引擎本身（直连）"),
    "echo": ("bare FastAPI echo, no engine behind it", "裸 FastAPI 回显（背后没有引擎）"),
    "v1": ("**ours** `/v1/chat/completions`, vLLM", "**本项目** `/v1/chat/completions`，vLLM"),
    "api": ("**ours** `/api/v1/llm/chat`, vLLM", "**本项目** `/api/v1/llm/chat`，vLLM"),
    "v1-ollama": ("**ours** `/v1/chat/completions`, Ollama", "**本项目** `/v1/chat/completions`，Ollama"),
    "api-ollama": ("**ours** `/api/v1/llm/chat`, Ollama", "**本项目** `/api/v1/llm/chat`，Ollama"),
    "responses": ("**ours** `/v1/responses`, vLLM", "**本项目** `/v1/responses`，vLLM"),
    "messages": ("**ours** `/v1/messages`, vLLM", "**本项目** `/v1/messages`，vLLM"),
    "relay": ("uvloop, bytes from socket to socket", "uvloop，套接字之间只搬运字节"),
    "nginx": ("nginx", "nginx"),
    "vllm-router": ("vllm-router (Rust)", "vllm-router（Rust）"),
    "litellm": ("LiteLLM's proxy", "LiteLLM 代理"),
    "ours": ("**ours**, vLLM", "**本项目**，vLLM"),
    "ours-ollama": ("**ours**, Ollama", "**本项目**，Ollama"),
}
WORDS = {
    "goals": ("Promises", "承诺"),
    "goals head": (("what", "at most", "measured", ""), ("项目", "上限", "实测", "")),
    "whole": ("Whole answers", "完整回答（非流式）"),
    "streamed": ("Streamed answers, {tokens} tokens each, back to back", "流式回答，每个 {tokens} 个 token，背靠背"),
    "conns head": (
        (
            "in front of the engine",
            "CPU ms a request, 16 conns",
            "256",
            "requests/s, 16",
            "256",
            "p50 / p99 ms, 16",
            "256",
            "RSS MiB",
            "errors",
        ),
        (
            "引擎前面的是",
            "每请求 CPU ms，16 连接",
            "256",
            "请求/秒，16",
            "256",
            "p50 / p99 ms，16",
            "256",
            "内存 MiB",
            "错误",
        ),
    ),
    "tokens head": (
        (
            "in front of the engine",
            "CPU µs a token, 16 conns",
            "256",
            "streams/s, 16",
            "256",
            "p50 / p99 ms a stream, 16",
            "256",
            "RSS MiB",
            "errors",
        ),
        (
            "引擎前面的是",
            "每 token CPU µs，16 连接",
            "256",
            "流/秒，16",
            "256",
            "每个流 p50 / p99 ms，16",
            "256",
            "内存 MiB",
            "错误",
        ),
    ),
    "paced": (
        "{streams} streams at once, 20 tokens/s each, the server on one core",
        "{streams} 个并发流，每个 20 token/秒，服务器占一个核",
    ),
    "paced head": (
        (
            "in front of the engine",
            "travel of a token, p50 ms",
            "p99",
            "max",
            "CPU of the core",
            "CPU µs a token",
            "KiB a stream",
            "errors",
        ),
        ("引擎前面的是", "token 路上时间 p50 ms", "p99", "最大", "占用该核", "每 token CPU µs", "每流 KiB", "错误"),
    ),
    "lone": ("A token that arrives alone", "单独到达的一个 token"),
    "lone head": (("in front of the engine", "travel p50 ms", "p99"), ("引擎前面的是", "路上时间 p50 ms", "p99")),
    "verbs": ("The Python verbs, µs of CPU a call", "Python 接口，每次调用的 CPU µs"),
    "verbs head": (("call", "ours", "bare HTTP client", "more"), ("调用", "本项目", "裸 HTTP 客户端", "多出")),
    "starts": ("Start", "启动"),
    "starts head": (
        ("server", "CPU s until ready", "idle RSS MiB", "sockets left after the load"),
        ("服务器", "就绪前 CPU 秒", "空闲内存 MiB", "负载后残留套接字"),
    ),
    "note": (
        "{when}, {cpu}, {cores} cores shared by load generator, stand-in engine, server{others}; Python {python}, "
        "{rounds} rounds, medians of the calmer half. CPU time is the server's own process tree's. "
        "Judge by CPU time and by ratios within this run; requests/s and latencies are this machine's.",
        "{when}，{cpu}，{cores} 核由负载发生器、替身引擎与服务器共用{others}；"
        "Python {python}，{rounds} 轮，取较安静一半的中位数。CPU 时间只计服务器自己的进程树。"
        "请以 CPU 时间与同次运行内的比值为准，"
        "请求/秒与延迟只代表这台机器。",
    ),
}
GOALS = {
    "v1 whole": (
        "`/v1` whole, CPU ms a request (16 / 256 connections)",
        "`/v1` 完整回答，每请求 CPU ms（16 / 256 连接）",
    ),
    "v1 stream": ("`/v1` streamed, CPU µs a token (16 / 256)", "`/v1` 流式，每 token CPU µs（16 / 256）"),
    "v1 ratio": ("`/v1` streamed, times vllm-router (16 / 256)", "`/v1` 流式，为 vllm-router 的倍数（16 / 256）"),
    "whole ratio": (
        "`/v1` whole, times vllm-router (16 / 256 connections)",
        "`/v1` 完整回答，为 vllm-router 的倍数（16 / 256 连接）",
    ),
    "paced ratio": (
        "{streams} paced streams, CPU a token, times vllm-router",
        "{streams} 个匀速流，每 token CPU，为 vllm-router 的倍数",
    ),
    "own ratio": ("… `/api/v1/llm/chat`, times `/v1`", "…… `/api/v1/llm/chat`，为 `/v1` 的倍数"),
    "api whole": (
        "`/api/v1/llm/chat` whole, CPU ms a request (16 / 256)",
        "`/api/v1/llm/chat` 完整回答，每请求 CPU ms（16 / 256）",
    ),
    "api stream": (
        "`/api/v1/llm/chat` streamed, CPU µs a token (16 / 256)",
        "`/api/v1/llm/chat` 流式，每 token CPU µs（16 / 256）",
    ),
    "verbs": (
        "Python verbs, ms of CPU more than a bare call (sync / async)",
        "Python 接口比裸调用多出的 CPU ms（同步 / 异步）",
    ),
    "late": (
        "{streams} streams on one core: latest token, ms beyond the engine's own",
        "{streams} 个流、一个核：最迟的 token 比引擎自身晚 ms",
    ),
    "errors": ("… errors", "…… 错误数"),
    "memory": ("… KiB a stream", "…… 每流 KiB"),
    "rss": ("idle server, MB RSS", "空闲服务器内存 MB"),
    "ready": ("ready in s of CPU", "就绪所需 CPU 秒"),
}


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Tables:
    """All tables of one results file in one language."""

    def __init__(self, results: Json, lang: str) -> None:
        self.results, self.which = results, ("en", "zh").index(lang)
        self.cases = {(case["target"], case["streamed"], case["conns"]): case for case in results.get("cases", [])}

    def word(self, key: str, **fields: Any) -> str:
        return str(WORDS[key][self.which]).format(**fields)

    def head(self, key: str) -> Sequence[str]:
        return WORDS[key + " head"][self.which]

    def name(self, target: str) -> str:
        return NAMES[target][self.which]

    def value(self, target: str, streamed: bool, conns: int, field: str) -> float | None:
        found = self.cases.get((target, streamed, conns))
        return found[field] if found else None

    def times_router(self, streamed: bool, conns: int, field: str) -> float | None:
        mine, rust = (self.value(target, streamed, conns, field) for target in ("v1", "vllm-router"))
        return mine / rust if mine and rust else None

    def back_to_back(self, streamed: bool) -> str:
        rows = []
        for target in dict.fromkeys(case["target"] for case in self.results["cases"]):
            both = [self.cases.get((target, streamed, conns)) for conns in (16, 256)]
            cost = "token_us" if streamed else "cpu_ms"
            row = [number(case and case[cost]) for case in both] + [number(case and case["rps"]) for case in both]
            row += [
                f"{number(case['p50_ms'], 2)} / {number(case['p99_ms'], 2)}" if case and case["p50_ms"] else "—"
                for case in both
            ]
            here = [case for case in both if case]
            rows.append(
                [
                    self.name(target),
                    *row,
                    number(max(case["rss_mib"] for case in here)),
                    str(sum(case["errors"] for case in here)),
                ]
            )
        title = self.word("streamed" if streamed else "whole", tokens=self.results["tokens"])
        return f"**{title}**\n\n{grid(self.head('tokens' if streamed else 'conns'), rows)}"

    def paced(self) -> str:
        tables = []
        for streams in dict.fromkeys(one["streams"] for one in self.results["paced"]):
            rows = [self.paced_row(one) for one in self.results["paced"] if one["streams"] == streams]
            tables.append(f"**{self.word('paced', streams=int(streams))}**\n\n{grid(self.head('paced'), rows)}")
        return "\n\n".join(tables)

    def paced_row(self, one: Json) -> list[str]:
        return [
            self.name(one["target"]),
            *(number(one[field]) for field in ("p50_ms", "p99_ms", "max_ms")),
            f"{one['cpu_share']:.0%}",
            number(one["token_us"]),
            number(one["kib_a_stream"]),
            str(one["errors"]),
        ]

    def lone(self) -> str:
        rows = [
            [self.name(one["target"]), number(one["p50_ms"]), number(one["p99_ms"])] for one in self.results["lone"]
        ]
        return f"**{self.word('lone')}**\n\n{grid(self.head('lone'), rows)}"

    def verbs(self) -> str:
        found = self.results["verbs"]
        pairs = (("chat", "http.client"), ("achat", "aiohttp"), ("achat x16", "aiohttp x16"))
        rows = [
            [f"`{mine}`", number(found[mine]), f"{number(found[bare])} ({bare})", number(found[mine] - found[bare])]
            for mine, bare in pairs
        ]
        rows += [
            [f"`{mine}`, {self.results['tokens']} tokens", number(found[mine]), "—", "—"]
            for mine in ("stream", "astream")
        ]
        return f"**{self.word('verbs')}**\n\n{grid(self.head('verbs'), rows)}"

    def starts(self) -> str:
        rows = [
            [self.name(s["target"]), number(s["ready_cpu_s"]), number(s["idle_rss_mib"]), number(s["sockets_left"])]
            for s in self.results["starts"]
        ]
        if found := self.results.get("import"):
            rows.append(["`import llm_inference`", number(found["cpu_s"]), number(found["rss_mib"]), "—"])
        return f"**{self.word('starts')}**\n\n{grid(self.head('starts'), rows)}"

    def goals(self) -> str:
        """Each promise, its limit, what was measured, and whether it holds."""
        rows: list[list[str]] = []

        def add(key: str, limit: float, *values: float | None, **fields: Any) -> None:
            known = [value for value in values if value is not None]
            if known:
                held = all(value <= limit for value in known)
                rows.append(
                    [
                        GOALS[key][self.which].format(**fields),
                        number(limit),
                        " / ".join(number(value) for value in known),
                        "✓" if held else "✗",
                    ]
                )

        both = (16, 256)
        if self.cases:
            add("v1 whole", 0.6, *(self.value("v1", False, conns, "cpu_ms") for conns in both))
            add("v1 stream", 12, *(self.value("v1", True, conns, "token_us") for conns in both))
            add("v1 ratio", 0.75, *(self.times_router(True, conns, "token_us") for conns in both))
            add("whole ratio", 2.5, *(self.times_router(False, conns, "cpu_ms") for conns in both))
            add("api whole", 0.7, *(self.value("api", False, conns, "cpu_ms") for conns in both))
            add("api stream", 20, *(self.value("api", True, conns, "token_us") for conns in both))
        if verbs := self.results.get("verbs"):
            add("verbs", 0.5, (verbs["chat"] - verbs["http.client"]) / 1e3, (verbs["achat"] - verbs["aiohttp"]) / 1e3)
        paced = {one["target"]: one for one in self.results.get("paced", [])}
        mine = [paced[name] for name in ("v1", "api") if name in paced]
        if mine and "direct" in paced:
            streams = int(mine[0]["streams"])
            if "vllm-router" in paced:
                add("paced ratio", 1.2, mine[0]["token_us"] / paced["vllm-router"]["token_us"], streams=streams)
            if len(mine) == 2:
                add("own ratio", 1.5, mine[1]["token_us"] / mine[0]["token_us"])
            add("late", 10, *(one["max_ms"] - paced["direct"]["max_ms"] for one in mine), streams=streams)
            add("errors", 0, *(one["errors"] for one in mine))
            add("memory", 25, *(one["kib_a_stream"] for one in mine))
        start = next((one for one in self.results.get("starts", []) if one["target"] == "ours"), None)
        if start:
            add("rss", 70, start["idle_rss_mib"] * 1.048576)
            add("ready", 0.4, start["ready_cpu_s"])
        return f"**{self.word('goals')}**\n\n{grid(self.head('goals'), rows)}"

    def note(self) -> str:
        shares = [case["others_share"] for case in self.results.get("cases", [])]
        busy = sorted(shares)[len(shares) // 2] if shares else 0.0
        reported = (
            (f", and other work ({busy:.1f} cores in the median)", f"，另有其他负载（中位数 {busy:.1f} 核）")[
                self.which
            ]
            if busy > 0.15
            else ""
        )
        machine = self.results["machine"]
        where = {"cpu": machine["cpu"], "cores": machine["cores"], "python": machine["versions"]["python"]}
        return self.word("note", when=self.results["when"], rounds=self.results["rounds"], others=reported, **where)

    def __str__(self) -> str:
        parts = [self.goals()]
        if self.cases:
            parts += [self.back_to_back(False), self.back_to_back(True)]
        parts += [getattr(self, name)() for name in ("paced", "lone", "verbs", "starts") if self.results.get(name)]
        return "\n\n".join([*parts, self.note()]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", choices=("en", "zh"), default="en")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--goals", action="store_true", help="the promises alone")
    parser.add_argument("--into", type=Path, help="a Markdown file to put them into")
    args = parser.parse_args()
    tables = Tables(json.loads(args.results.read_text()), args.lang)
    made = f"{tables.goals()}\n\n{tables.note()}\n" if args.goals else str(tables)
    if args.into is None:
        print(made, end="")
        return 0
    text = args.into.read_text()
    new, times = re.subn(
        r"(<!-- bench -->\n).*?(<!-- /bench -->)", lambda found: f"{found[1]}{made}{found[2]}", text, flags=re.DOTALL
    )
    if not times:
        raise SystemExit(f"{args.into} has no lines <!-- bench --> and <!-- /bench -->")
    args.into.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
