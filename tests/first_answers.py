"""What the default model answers to the prompts that a newcomer meets first, and to others that were considered.

    python -m tests.first_answers        # writes tests/results/first_answers.md; about 2 minutes on 2 cores

A prompt is asked once at temperature 0, as the self-test and README ask, and TIMES times at the engine's own
temperature, as the chat page and /docs do. An answer is right when it ends by itself and matches the row's pattern.
"""

import datetime
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import httpx

import llm_inference as product
from tests.harness import API, serving
from tests.processes import ROOT

TABLE = ROOT / "tests/results/first_answers.md"
TIMES = 10
MODEL = f"llamacpp/{product.DEFAULT_MODEL}"
SHORT = " Answer in one short sentence."


@dataclass(frozen=True)
class Prompt:
    text: str
    right: str  #: a pattern, case-insensitive
    places: tuple[str, ...] = ()  #: where a newcomer meets it; none: considered only
    system: str | None = None
    schema: Any = None
    max_tokens: int = 64
    ends: bool = True  #: whether the answer must end by itself
    raw: bool = False  #: continued as it stands, by /v1/completions


FRUIT = "(apple|apricot|avocado|banana|berr|cherr|grape|kiwi|lemon|mango|melon|orange|papaya|peach|pear|pineapple|plum)"
COLOR = "(black|blue|brown|green|gr[ae]y|orange|pink|purple|red|violet|white|yellow)"
FIRST = "What is the capital of China?" + SHORT
PROMPTS = (
    Prompt(FIRST, r"\bBeijing\b", ("self-test", "README", "/docs", "page")),
    Prompt("What is Beijing?" + SHORT, r"\b(capital|city)\b.*\bChina\b", ("README",)),
    Prompt("What is the capital of Spain?", r"\bMadrid\b", ("README",), system="You answer in one short sentence."),
    Prompt("Name three fruits.", rf"{FRUIT}.*{FRUIT}.*{FRUIT}", ("README",), ends=False),
    Prompt("Name three colors.", rf"{COLOR}.*{COLOR}.*{COLOR}", ("README",), ends=False),
    Prompt(
        "Give three tips for good sleep. Be brief.",
        r"1\..*(sleep|bed|caffeine|routine)",
        ("README", "page"),
        ends=False,
    ),
    Prompt(
        "Anna is 34 years old.",
        r'"name": "Anna", "age": 34',
        ("README", "/docs"),
        schema={"name": "string", "age": "integer"},
    ),
    Prompt("小明今年12岁。", '"姓名": "小明", "年龄": 12', ("README",), schema={"姓名": "string", "年龄": "integer"}),
    Prompt("The capital of France is", r"^\W*Paris\b", ("/docs",), max_tokens=16, ends=False, raw=True),
    Prompt("What is the capital of France?" + SHORT, r"\bParis\b"),
    Prompt("What is the capital of Japan?" + SHORT, r"\bTokyo\b"),
    Prompt("What is photosynthesis?" + SHORT, r"\b(plants?|light|sun)"),
    Prompt("What is HTTP?" + SHORT, r"hypertext transfer protocol|protocol.*(web|internet|data)"),
    Prompt("What is Python?" + SHORT, r"programming language"),
    Prompt("Why is the sky blue?" + SHORT, r"scatter"),
    Prompt("What is 2 + 2?" + SHORT, r"\b(4|four)\b"),
    Prompt("Introduce Beijing.", r"\bBeijing\b.*\bChina\b", ends=False),
    Prompt("中国的首都是哪里？", "北京"),
    Prompt("中国的首都是哪里？用一句话回答。", "北京"),
    Prompt("介绍一下北京。", "首都|故宫|长城"),
    Prompt("用一句话介绍北京。", "首都|故宫|长城"),
    Prompt("1+1等于几？", r"(?<!\d)2(?!\d)|二"),
    Prompt("把“你好”翻译成英文。", r"\bhello\b|\bhi\b"),
    Prompt("Translate into Chinese: hello", "你好"),
)


def ask(server: httpx.Client, prompt: Prompt, temperature: float | None) -> tuple[bool, str]:
    """Whether the answer is right, and the answer."""
    body: dict[str, Any] = {"max_tokens": prompt.max_tokens}
    if temperature is not None:
        body["temperature"] = temperature
    if prompt.raw:
        reply = server.post("/v1/completions", json=body | {"model": MODEL, "prompt": prompt.text})
        answer = reply.json()["choices"][0]
    else:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        body["messages"] = [*messages, {"role": "user", "content": prompt.text}]
        route = "structured-generate" if prompt.schema else "chat"
        reply = server.post(f"{API}/{route}", json=body | ({"schema": prompt.schema} if prompt.schema else {}))
        if reply.json()["code"] != 200:
            return False, reply.json()["msg"]
        answer = reply.json()["data"]
    text = " ".join(answer["text"].split())
    ended = answer["finish_reason"] == "stop" or not prompt.ends
    return ended and bool(re.search(prompt.right, text, re.IGNORECASE)), text


def cell(text: str) -> str:
    return text.replace("|", r"\|")


def row(server: httpx.Client, prompt: Prompt) -> str:
    right, answer = ask(server, prompt, 0.0)
    count = sum(ask(server, prompt, None)[0] for _ in range(TIMES))
    cells = (
        cell(prompt.text),
        ", ".join(prompt.places) or "–",
        f"`{cell(prompt.right)}`",
        "yes" if right else "no",
        f"{count} of {TIMES}",
        cell(answer[:160]),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    app = product.create_app(product.Settings(engine="llamacpp"))
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=120) as server:
        rows = [row(server, prompt) for prompt in PROMPTS]
    day = datetime.datetime.now(datetime.UTC).date()
    versions = f"{product.DEFAULT_MODEL} on xllamacpp {importlib.metadata.version('xllamacpp')}"
    return "\n".join((
        "# First answers",
        "",
        f"Made by `python -m tests.first_answers` on {day}: {versions}.",
        "An answer is right when it matches the pattern (case-insensitive) and ends by itself; of a list, the",
        "beginning is enough. The prompts that have a place are the ones a newcomer meets there; the others were",
        "considered, Chinese ones too. `tests/test_first_answers.py` holds the places to this table.",
        "",
        f"| prompt | place | right means | right at temperature 0 | right of {TIMES} without one | answer at 0 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ))  # fmt: skip


if __name__ == "__main__":
    TABLE.write_text(table())
