"""The table for README from a results file: `python -m tests.faults.table results.json --lang zh|en`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WORDS: dict[str, tuple[str, str, str, str]] = {  # what and its pass mark, in Chinese and in English
    "client_leaves": (
        "客户端离开（7 个时刻 × 4 种引擎 × 完整/流式 × 3 种请求 × 3 种离开）",
        "1 秒后仍开着的上游连接为 0",
        "client leaves (7 points × 4 dialects × whole/stream × 3 kinds of request × 3 ways to go)",
        "0 upstream connections open after 1 s",
    ),
    "cancels": ("大量取消，然后 200 个请求", "200 个全部作答", "cancels, then 200 requests", "200 of 200 answered"),
    "network": (
        "网络与流中途故障 × 引擎",
        "挂起 0，悄悄截断 0，期限 + 0.5 秒内给出有类型的错误",
        "network and mid-stream faults × dialects",
        "0 hung, 0 silent truncations, typed within deadline + 0.5 s",
    ),
    "slow_clients": (
        "慢、空闲、半开的连接，旁边是正常客户端",
        "到期即关，正常客户端 100 %",
        "slow, idle and half-open connections beside good ones",
        "closed at their limit, good clients 100 %",
    ),
    "hostile_bodies": (
        "恶意请求体（变异、hypothesis、schemathesis）",
        "意外 500 为 0，信封之外为 0，内存有界",
        "hostile bodies (mutations, hypothesis, schemathesis)",
        "0 unexpected 500, 0 outside the envelope, memory bounded",
    ),
    "gate": (
        "无钥匙:路由 × 路径 × Host × 请求头变异",
        "放行 0",
        "unauthenticated route × path × Host × header mutations",
        "0 through",
    ),
    "places": (
        "地点注入（URL、路径、CR/LF、$ref）",
        "诱饵命中 0，越界打开 0",
        "place injection (URLs, paths, CR/LF, $refs)",
        "0 canary hits, 0 outside opens",
    ),
    "overload": (
        "开环负载至容量的 10 倍",
        "有效吞吐 ≥ 峰值 90 %，拒绝 p99 ≤ 20 ms + 同时的空转 p99，挂起 0",
        "open-loop load to 10 × capacity",
        "goodput ≥ 90 % of peak, refusals p99 ≤ 20 ms + the idle p99 beside it, 0 hung",
    ),
    "engine_killed": (
        "引擎被 kill -9（含内嵌引擎）",
        "1 秒内有类型的错误，随后恢复",
        "engine killed -9 (the embedded one too)",
        "typed within 1 s; recovered",
    ),
    "engine_frozen": (
        "引擎被冻结（SIGSTOP）",
        "空闲期限内有类型的错误，随后恢复",
        "engine frozen (SIGSTOP)",
        "typed at the idle deadline; recovered",
    ),
    "parent_killed": (
        "我们自己被 kill -9 / 中断 / 返回",
        "2 秒后遗孤为 0",
        "we are killed -9, interrupted, or return",
        "0 orphans after 2 s",
    ),
    "fleet": (
        "12 个端点（4 种引擎）在负载下被杀、冻结、拒绝、变慢、503/429、抖动、全部消失又回来",
        "尚未开始的回答丢失 0，死端点每次停顿至多 1 次试探，首字节之后重发 0",
        "12 endpoints (4 dialects) killed, frozen, refusing, slow, 503/429, flapping, all gone and back, under load",
        "0 lost that had not begun, ≤ 1 trial a pause at a dead endpoint, 0 sent on after a first byte",
    ),
    "fleet_real": (
        "同上，3 个真实的 llama.cpp（kill -9、SIGSTOP）",
        "同上",
        "the same with 3 real llama.cpp (kill -9, SIGSTOP)",
        "the same",
    ),
    "storm": (
        "故障风暴，每个回答带随机数",
        "答错人 0，有效请求 ≥ 99.9 %",
        "fault storm with a nonce in every reply",
        "0 answers to the wrong caller, valid requests ≥ 99.9 %",
    ),
    "replaced": (
        "负载下更换地址背后的模型、版本和引擎",
        "由未被请求的模型作答 0",
        "models, versions and engines replaced behind their addresses, under load",
        "0 answers of a model that was not asked for",
    ),
    "soak": (
        "长跑",
        "描述符不增，每 100,000 个请求内存 ≤ 0.5 MB",
        "soak",
        "descriptors stay, memory ≤ 0.5 MB / 100,000 requests",
    ),
    "guards_off": (
        "逐个关掉防线",
        "每一个都让它的一行变红",
        "guards switched off one at a time",
        "each turns its row red",
    ),
}


def remark(name: str, figures: dict[str, Any]) -> str:
    """The figure beside the zero."""
    match name:
        case "client_leaves":
            return f"{max(figures['slowest_s'].values()):g} s"
        case "cancels":
            return str(figures["good afterwards"])
        case "network":
            return f"{figures['struck']:,} struck, ≤ {figures['slowest_s']:g} s"
        case "slow_clients":
            return f"good {figures['good clients']}"
        case "hostile_bodies":
            return f"+{figures['heavy_peak_growth_MB']:g} MB (≤ {figures['heavy_bound_MB']:g})"
        case "places":
            return f"{figures['canary hits']} hits, {figures['outside opens']} opens"
        case "overload":
            at = figures["10x"]
            refusals = f"p99 {at['refusal_p99_ms']:g} ms (idle {figures['yardstick_p99_ms']:g})"
            return f"{at['goodput_per_s']:g}/s of {figures['peak_per_s']:g}/s, {refusals}"
        case "engine_killed" | "engine_frozen":
            return f"≤ {figures['slowest_typed_s']:g} s"
        case "parent_killed":
            return f"≤ {max(each['slowest_s'] for each in figures.values()):g} s"
        case "fleet" | "fleet_real":
            broken = sum(each.get("begun, then broken", 0) for each in figures.values())
            return (
                f"{sum(each['sent on'] for each in figures.values())} sent on, {broken} had begun and end with an error"
            )
        case "storm":
            return str(figures["valid"])
        case "replaced":
            return f"{figures['requests']:,} requests"
        case "soak":
            growth = f"{figures['MB_per_100k']:g} MB / 100,000, fds {figures['fds_per_100k']:+g}"
            return f"{figures['requests']:,} requests, {growth}"
        case "guards_off":
            return f"{len(figures['red'])} of {figures['of']}"
    return ""


def table(results: dict[str, Any], lang: str) -> str:
    zh = lang == "zh"
    lines = (
        ["| 什么 | n | 不合格 | 通过标准 | 旁证 | |", "| --- | --: | --: | --- | --- | :-: |"]
        if zh
        else ["| what | n | bad | pass | beside it | |", "| --- | --: | --: | --- | --- | :-: |"]
    )
    for name, words in WORDS.items():
        if (row := results["rows"].get(name)) is None:
            continue
        try:
            beside = remark(name, row["figures"])
        except (KeyError, ValueError):
            beside = ""
        what, mark = words[:2] if zh else words[2:]
        lines.append(f"| {what} | {row['n']:,} | {row['bad']} | {mark} | {beside} | {'✗' if row['bad'] else '✓'} |")
    machine = results["machine"]
    short = [name for name, row in results["rows"].items() if not row["full"]]
    cores = f"{machine['cores']} {'核' if zh else 'cores'}"
    tail = f"\n{machine['when']}, {machine['cpu']}, {cores}, Python {machine['python']}."
    for name, row in results["rows"].items():
        if own := row.get("machine"):
            tail += f"\n{name}: {own['when']}, {own['cpu']}, {own['cores']} {'核' if zh else 'cores'}."
    if short:
        tail += f" {'短跑' if zh else 'Short form'}: {', '.join(short)}."
    return "\n".join(lines) + "\n" + tail


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("results", type=Path)
    options.add_argument("--lang", choices=("zh", "en"), default="en")
    args = options.parse_args()
    print(table(json.loads(args.results.read_text()), args.lang))


if __name__ == "__main__":
    main()
