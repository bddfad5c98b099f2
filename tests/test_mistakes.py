"""Every mistake of mistakes.py is told as a user needs it, and the table of them is up to date."""

import re
from collections.abc import Iterator

import pytest

from llm_inference import InvalidRequest
from tests.mistakes import MISTAKES, TABLE, Mistake, Place, Said, written

#: words of pydantic, of Python and of frameworks, which say nothing to a user
FOREIGN = re.compile(
    r"Input should|Field required|Extra inputs|type=\w+_|Traceback|object has no attribute|validation error|NoneType|"
    r"Method Not Allowed|see the log|unexpected keyword|\bpydantic_core\b"
)
#: what another engine's name has no place in: advice for one engine in the error of another
ADVICE = {
    "vllm": ("vllm serve", "VLLM_", "--runner", "pip install vllm"),
    "ollama": ("ollama serve", "ollama pull", "OLLAMA_", "num_ctx"),
    "sglang": ("sglang.launch_server", "SGLANG_"),
    "llamacpp": ("llama-server", "LLAMACPP_", "--embeddings"),
}
def row(mistake: Mistake) -> object:
    return pytest.param(mistake, id=f"{mistake.surface}: {mistake.done}"[:80])


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Place() as found:
        yield found


@pytest.mark.parametrize("mistake", [row(each) for each in MISTAKES])
def test_a_mistake_is_told(mistake: Mistake, place: Place) -> None:
    said = mistake.make(place)
    message = place.plainly(said.message)
    assert said.kind == mistake.kind.kind, said
    assert [word for word in mistake.words if word not in message] == [], message
    assert said.fix.strip(" .;"), f"no fix: {message}"
    assert not FOREIGN.search(said.message + said.output), message
    assert len(said.message) < 600, message
    assert advice_of(said, mistake) <= 1, message


def advice_of(said: Said, mistake: Mistake) -> int:
    """How many engines' advice is in it. What names the choice of engines may name all."""
    if "one of" in said.message or "did you mean" in said.message:
        return 0
    return sum(any(word in said.message for word in words) for words in ADVICE.values())


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 80
    assert len({(each.surface, each.done) for each in MISTAKES}) == len(MISTAKES)
    assert {each.surface for each in MISTAKES} == {"Python", "HTTP", "command line", "config"}


def test_a_message_without_a_fix_is_noticed(place: Place) -> None:
    for said in (
        Said("invalid_request", "x: must be 1", ""),
        Said("invalid_request", "x: Input should be 1; send 1", "send 1"),
        Said("internal_error", "x: must be 1; send 1", "send 1"),
        Said("invalid_request", "must be 1; send 1", "send 1"),
    ):
        mistake = Mistake("Python", "…", InvalidRequest, ("x:",), lambda place, said=said: said)
        with pytest.raises(AssertionError):
            test_a_mistake_is_told(mistake, place)


def test_the_table_is_up_to_date() -> None:
    """`python -m tests.mistakes` writes it."""
    assert TABLE.read_text() == written()
