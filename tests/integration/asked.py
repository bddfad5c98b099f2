"""What the clients ask on real engines: a model of 135 million parameters answers it, led by `tools.jinja`."""

from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "What is the capital of France? Answer in one short sentence."
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
STRUCTURE_QUESTION = "Which city is the capital of France?"
WEATHER_QUESTION = "What is the weather in Paris?"
CITIES = ("Paris", "Rome")
#: the parameters of `weather`: a call has one of two forms
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS},
}
RESPONSES_TOOL: dict[str, Any] = {"type": "function", "strict": False, **CHAT_TOOL["function"]}
MESSAGES_TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": PARAMETERS,
}


class Capital(BaseModel):
    """A capital."""

    city: Literal["Paris", "Rome"]
    large: bool


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"
