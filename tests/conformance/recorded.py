"""Results for bare engines that are not installed here, read from the transcripts in tests/wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .judge import DROPPED, HONOURED, REFUSED, Cell
from .schemas import fits, spelled
from .sides import Answer, BareOllama, Json, read_whole

WIRE = Path(__file__).resolve().parent.parent / "wire"
Kept = Callable[[Json, Answer], bool]  #: was what the body asks for kept by the answer?


def transcript(engine: str, name: str) -> tuple[Json, int, str]:
    """The body that was sent (empty where the transcript cuts it), the status and the body that came."""
    full: Json = json.loads((WIRE / engine / f"{name}.json").read_bytes())
    answer = full.get("response") or full
    sent, came = full["request"].get("body"), answer["body"]
    try:
        asked = json.loads(sent) if isinstance(sent, str) else sent
    except ValueError:
        asked = {}
    return asked, answer["status"], came if isinstance(came, str) else json.dumps(came)


def judged(engine: str, feature: str, name: str, kept: Kept) -> Cell:
    asked, status, came = transcript(engine, name)
    source = f"{engine}/{name}"
    if status >= 400:
        return Cell(feature, REFUSED, came[:200], source=source)
    payload = json.loads(came)
    answer = BareOllama._read(payload) if "message" in payload else read_whole(payload)
    return Cell(feature, HONOURED if kept(asked, answer) else DROPPED, answer.text[:60], source=source)


def never(asked: Json, answer: Answer) -> bool:
    """Nothing but a refusal would do."""
    return False


def short_enough(asked: Json, answer: Answer) -> bool:
    return answer.tokens <= int(asked["max_completion_tokens"])


def all_choices(asked: Json, answer: Answer) -> bool:
    return len(answer.texts) == int(asked["n"])


def is_json(asked: Json, answer: Answer) -> bool:
    schema = asked.get("guided_json") or asked.get("format") or json.loads(asked["json_schema"])
    try:
        return fits(schema, spelled(answer.text))
    except ValueError:
        return False


def is_choice(asked: Json, answer: Answer) -> bool:
    return answer.text in asked["structured_outputs"]["choice"]


def has_call(asked: Json, answer: Answer) -> bool:
    return bool(answer.calls)


def call_fits(asked: Json, answer: Answer) -> bool:
    schema = asked["tools"][0]["function"]["parameters"]
    return has_call(asked, answer) and all(
        fits(schema, spelled(call["function"]["arguments"])) for call in answer.calls
    )


def whole_prompt(tokens: int, asked: Json, answer: Answer) -> bool:
    return answer.prompt_tokens >= tokens


def suffix_seen(asked: Json, answer: Answer) -> bool:
    plain, _, came = transcript("sglang", "completions")
    return (
        answer.prompt_tokens > read_whole(json.loads(came)).prompt_tokens
        if plain["prompt"] == asked["prompt"]
        else True
    )


def same_twice(asked: Json, answer: Answer) -> bool:
    return answer.text == read_whole(json.loads(transcript("sglang", "chat_seed_b")[2])).text


ROWS: tuple[tuple[str, str, str, Kept], ...] = (
    ("ollama", "a prompt that does not fit", "19_ctx_chat_one_long_message", partial(whole_prompt, 4000)),
    ("ollama", "/v1 a prompt that does not fit", "19_v1_ctx_overflow", partial(whole_prompt, 16000)),
    ("ollama", "an unknown field", "11_unknown_top_level_field", never),
    ("ollama", "/v1 n", "15_v1_chat_n2", all_choices),
    ("ollama", "/v1 max_completion_tokens", "15_v1_chat_max_completion_tokens", short_enough),
    ("ollama", "schema", "07_chat_format_schema", is_json),
    ("ollama", "images", "18_chat_image_no_vision", never),
    ("ollama", "embeddings of a chat model", "13_embed_string", never),
    ("ollama", "think on", "16_think_true", never),
    ("ollama", "/v1 reasoning_effort", "15_v1_chat_reasoning_effort", never),
    ("ollama", "a wrong model name", "09_chat_unknown_model", never),
    ("sglang", "seed", "chat_seed_a", same_twice),
    ("sglang", "an unknown field", "p_unknown_field_1", never),
    ("sglang", "a wrong model name", "err_wrong_model", never),
    ("sglang", "/v1 guided_json", "chat_guided_json_ignored", is_json),
    ("sglang", "/v1 json_schema", "chat_json_schema_field_ignored", is_json),
    ("sglang", "/v1 structured_outputs", "chat_structured_outputs_ignored", is_choice),
    ("sglang", "tool_choice required", "tools_required", has_call),
    ("sglang", "tool_choice, a named function", "tools_named", has_call),
    ("sglang", "tool arguments, strict", "tools_qwen_required_strict", call_fits),
    ("sglang", "/v1 n", "chat_n2", all_choices),
    ("sglang", "/v1 max_completion_tokens", "chat_max_completion_tokens", short_enough),
    ("sglang", "/v1/completions suffix", "completions_suffix", suffix_seen),
    ("sglang", "images", "content_image", never),
    ("sglang", "embeddings of a chat model", "embeddings", never),
    ("sglang", "/v1 response_format json_schema without a schema", "rf_json_schema_missing", never),
)


def recorded_cells(engine: str) -> list[Cell]:
    return [judged(*row) for row in ROWS if row[0] == engine]
