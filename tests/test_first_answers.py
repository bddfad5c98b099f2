"""The self-test, README, /docs and the chat page ask what `results/first_answers.md` says is answered well."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import llm_inference as product
from tests.first_answers import PROMPTS, TABLE, TIMES
from tests.test_readme import HALVES, blocks, commands

ENOUGH = 8  # of TIMES answers, where no temperature is given
Use = tuple[str, bool]  # a prompt, and whether it is asked at temperature 0


def uses(value: Any, cold: bool = False) -> Iterator[Use]:
    """The prompts of a request's body."""
    if isinstance(value, dict) and value.keys() & {"prompt", "messages", "input"}:
        prompt = value.get("prompt") or value.get("messages") or value.get("input")
        if isinstance(prompt, list):
            prompt = prompt[-1]["content"]
        yield prompt, value.get("temperature") == 0


def in_readme(half: str) -> Iterator[Use]:
    for command in commands(half):
        if command.startswith("curl "):
            yield from uses(json.loads(command.partition(" -d '")[2].rstrip("'")))
    for line in "\n".join(blocks(half, "python")).replace(",\n", ",").splitlines():
        if asked := re.search(r"llm\.(?:generate|chat|structured_generate|stream|complete|batch)\((.*)", line):
            prompts = re.findall(r'"((?:[A-Z小][^"]*)[.?。])"', re.sub(r'system="[^"]*"', "", asked[1]))
            assert prompts, line
            yield from ((prompt, "temperature=0" in line) for prompt in prompts)
        yield from ((prompt, False) for prompt in re.findall(r'question = .*, "([^"]*)"$', line))


def in_docs() -> Iterator[Use]:
    asked = (product.CHAT, product.COMPLETIONS, product.RESPONSES, product.MESSAGES)
    for path, operation in product.OPERATIONS.items():
        if path in asked or path.startswith(product.API):
            yield from uses(operation.example)


def in_page() -> Iterator[Use]:
    """What is offered where the demo model is chosen."""
    examples = re.search(r"^const EXAMPLES = \[(.*?)\]", product.CHAT_PAGE, re.MULTILINE | re.DOTALL)
    assert examples
    yield from ((prompt, False) for prompt in re.findall(r'"([^"]+)"', examples[1]))


PLACES = {
    "self-test": [(product.FIRST_PROMPT, True)],
    "README": [*in_readme("zh"), *in_readme("en")],
    "/docs": [*in_docs()],
    "page": [*in_page()],
}


def measured() -> dict[str, tuple[bool, int]]:
    """Of each prompt: whether it is right at temperature 0, and how often without one."""
    rows = re.findall(rf"^\| (.+?) \| .* \| (yes|no) \| (\d+) of {TIMES} \|", TABLE.read_text(), re.MULTILINE)
    return {prompt: (cold == "yes", int(count)) for prompt, cold, count in rows}


def test_the_table_has_every_prompt() -> None:
    """Otherwise: python -m tests.first_answers."""
    assert list(measured()) == [prompt.text for prompt in PROMPTS]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_has_the_prompts_that_the_table_says(place: str) -> None:
    assert {prompt for prompt, _ in PLACES[place]} == {prompt.text for prompt in PROMPTS if place in prompt.places}


@pytest.mark.parametrize(
    ("place", "use"), [(place, use) for place, each in PLACES.items() for use in dict.fromkeys(each)]
)
def test_a_prompt_is_answered_well_where_it_stands(place: str, use: Use) -> None:
    prompt, cold = use
    right, count = measured()[prompt]
    assert right and (cold or count >= ENOUGH), f"{place}: {prompt}"


def test_both_halves_of_readme_ask_the_same() -> None:
    zh, en = (sorted(in_readme(half)) for half in HALVES)
    assert zh == en and len(zh) >= 9
