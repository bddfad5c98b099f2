"""The engine in this process (vllm.LLM, sglang.Engine): how long many short prompts take.

Run by the engine's interpreter:

    python tests/gpu/offline.py vllm '{"model": …, "load_format": "dummy"}' --prompts 10000 --tokens 16

Prints one line of JSON. The prompts are those that run.py asks over HTTP.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

Answer = Callable[[list[str]], int]


def questions(number: int) -> list[str]:
    return [f"What is {n} plus {n % 97}? Answer in one sentence." for n in range(number)]


def vllm_answer(options: dict[str, Any], tokens: int) -> Answer:
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    def answer(prompts: list[str]) -> int:
        done = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return answer


def sglang_answer(options: dict[str, Any], tokens: int) -> Answer:
    import sglang
    from transformers import AutoTokenizer

    engine = sglang.Engine(**options)
    tokenizer = AutoTokenizer.from_pretrained(options["model_path"])
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}

    def answer(prompts: list[str]) -> int:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return sum(one["meta_info"]["completion_tokens"] for one in engine.generate(texts, sampling))

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "sglang"))
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2)
    args = parser.parse_args()
    answer = (vllm_answer if args.engine == "vllm" else sglang_answer)(args.options, args.tokens)
    answer(questions(min(512, args.prompts)))  # warm-up
    found = []
    for _ in range(args.passes):
        began = time.perf_counter()
        tokens = answer(questions(args.prompts))
        found.append({"seconds": round(time.perf_counter() - began, 2), "tokens": tokens})
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
