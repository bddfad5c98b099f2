"""Every field of the Responses and Messages APIs, as the installed official clients type their requests.

The lists and the values are taken from the clients' own types: a field that is new in a client is a new row. A row is
two requests that differ in one field, or in the type of one tool, item or block.
"""

from __future__ import annotations

import importlib.metadata
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typing_extensions

Json = dict[str, Any]
Kinds = dict[str, list[type]]  #: the word in `type` → the types that have it
Wrap = Callable[[Json], Json]
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
CLIENTS = {RESPONSES: "openai", MESSAGES: "anthropic", COUNT: "anthropic"}
SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
OTHER_SCHEMA: Json = SCHEMA | {"properties": {"city": {"enum": ["Paris", "Rome"]}}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
OTHER_PIXEL = PIXEL.replace("Nk+M9Q", "NkYPhf")
USER: Json = {"role": "user", "content": "What is the weather?"}
ASSISTANT: Json = {"role": "assistant", "content": "It is warm."}
ANSWER = 24  #: tokens of an answer, at most


@dataclass(frozen=True)
class Row:
    """One field with one value: the request that has it, and the same one without it (or with another value)."""

    api: str
    name: str  #: `tools[function].strict`; in brackets stands a type
    value: Any
    plain: Json
    asked: Json
    of_type: bool = False  #: it is about a type, not about a field
    again: bool = False  #: the other request has the field too, with another value

    @property
    def key(self) -> str:
        value = json.dumps(self.value)
        return f"{self.api} {self.name}" + (f": {value}" if not self.of_type and len(value) <= 60 else "")


# ------------------------------------------------------------------------------------- what the clients' types say


def hints(*kinds: type) -> dict[str, Any]:
    """The fields of these types, and their types."""
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= typing_extensions.get_type_hints(kind)
    return found


def kinds_in(kind: Any) -> list[type]:
    """The typed dictionaries in a union, a list or an option."""
    if typing_extensions.is_typeddict(kind):
        return [kind]
    return [each for inner in typing.get_args(kind) for each in kinds_in(inner)]


def literals(kind: Any) -> list[Any]:
    """The words that may stand there."""
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [each for inner in typing.get_args(kind) for each in literals(inner)]


def is_list(kind: Any) -> bool:
    """Whether it is a list, or may be one."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return all(is_list(each) for each in typing.get_args(kind) if each is not type(None))
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def by_word(kind: Any) -> Kinds:
    """The typed dictionaries in it, by the words in their `type`."""
    found: Kinds = {}
    for each in kinds_in(kind):
        for word in literals(hints(each).get("type")):
            found.setdefault(word, []).append(each)
    return found


def is_required(kind: type, name: str) -> bool:
    hint = typing_extensions.get_type_hints(kind, include_extras=True)[name]
    return typing_extensions.get_origin(hint) is typing_extensions.Required or name in getattr(
        kind, "__required_keys__", ()
    )


def sample(kind: Any) -> Any:
    """The smallest value of a type; of a union, of its first member."""
    if typing_extensions.is_typeddict(kind):
        needed = {name: hint for name, hint in hints(kind).items() if is_required(kind, name)}
        return {name: sample(hint) for name, hint in (needed or hints(kind)).items()}  # an empty one asks for nothing
    plain = {str: "x", int: 7, float: 0.5, bool: True, object: "x"}
    if kind in plain:
        return plain[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return inner[0]
    if origin in (typing.Union, types.UnionType):
        return sample(next(each for each in inner if each is not type(None)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"a": "b"}
    return [sample(inner[0])] if inner else "x"


# ------------------------------------------------------------------------------------------- rows out of them

#: Values that say more than the smallest one, by row; a callable makes the request's object itself.
VALUES: dict[str, list[Any]] = {
    f"{RESPONSES} background": [True],
    f"{RESPONSES} input": ["Good evening."],
    f"{RESPONSES} instructions": ["Be brief."],
    f"{RESPONSES} max_output_tokens": [3],
    f"{RESPONSES} metadata": [{"a": "b"}],
    f"{RESPONSES} text": [{"format": {"type": "json_object"}}],
    f"{RESPONSES} text.format": [{"type": "json_object"}],
    f"{RESPONSES} reasoning": [{"effort": "low"}],
    f"{RESPONSES} tools": [[{"type": "function", "name": "other", "parameters": SCHEMA, "strict": False}]],
    f"{RESPONSES} tool_choice": ["none", "auto", "required"],
    f"{RESPONSES} parallel_tool_calls": [True, False],
    f"{RESPONSES} temperature": [1.5],
    f"{RESPONSES} top_logprobs": [2],
    f"{RESPONSES} stream_options": [{"include_obfuscation": True}, {"include_obfuscation": False}],
    f"{RESPONSES} stream_options.include_obfuscation": [True, False],
    f"{RESPONSES} text.format[json_schema].schema": [OTHER_SCHEMA],
    f"{RESPONSES} tools[function].parameters": [OTHER_SCHEMA],
    f"{MESSAGES} tools[custom].input_schema": [OTHER_SCHEMA],
    f"{MESSAGES} output_config.format.schema": [SCHEMA],
    f"{RESPONSES} tools[namespace].tools": [
        [{"type": "function", "name": "other", "parameters": SCHEMA, "strict": False}]
    ],
    f"{RESPONSES} tool_choice[allowed_tools].tools": [[{"type": "function", "name": "other"}]],
    f"{RESPONSES} tool_choice[allowed_tools].mode": ["required"],
    f"{RESPONSES} tool_choice[function].name": ["other"],
    f"{RESPONSES} input[function_call].arguments": ['{"city": "Rome"}'],
    f"{RESPONSES} input[reasoning].content": [[{"type": "reasoning_text", "text": "It is May."}]],
    f"{RESPONSES} input[reasoning].summary": [[{"type": "summary_text", "text": "It is May."}]],
    f"{RESPONSES} input.content[input_image].image_url": [f"data:image/png;base64,{OTHER_PIXEL}"],
    f"{RESPONSES} input[message].role": ["user", "system", "developer", "assistant"],
    f"{MESSAGES} max_tokens": [3],
    f"{MESSAGES} messages": [[{"role": "user", "content": "Good evening."}]],
    f"{MESSAGES} output_config": [{"format": {"type": "json_schema", "schema": SCHEMA}}],
    f"{MESSAGES} output_config.format": [{"type": "json_schema", "schema": SCHEMA}],
    f"{MESSAGES} stop_sequences": [["warm"]],
    f"{MESSAGES} system": ["Be brief.", [{"type": "text", "text": "Be brief."}]],
    f"{MESSAGES} thinking": [{"type": "disabled"}],
    f"{MESSAGES} tool_choice": [{"type": "none"}],
    f"{MESSAGES} tools": [[{"name": "other", "input_schema": SCHEMA}]],
    f"{MESSAGES} tools[custom].input_examples": [[{"city": "Rome"}]],
    f"{MESSAGES} tool_choice[tool].name": ["other"],
    f"{MESSAGES} messages[user].role": ["system", "assistant"],
    f"{MESSAGES} messages[assistant].role": ["user"],
    f"{MESSAGES} user[tool_result].content": ["rain", [{"type": "text", "text": "rain"}]],
    f"{MESSAGES} user[image].source": [{"type": "base64", "media_type": "image/png", "data": OTHER_PIXEL}],
    f"{MESSAGES} tool_result.content[image].source": [
        {"type": "base64", "media_type": "image/png", "data": OTHER_PIXEL}
    ],
    f"{MESSAGES} image.source[base64].data": [OTHER_PIXEL],
    f"{MESSAGES} assistant[tool_use].input": [{"city": "Rome"}],
}
for _name in ("max_tokens", "messages", "output_config", "system", "thinking", "tool_choice", "tools"):
    VALUES[f"{COUNT} {_name}"] = VALUES[f"{MESSAGES} {_name}"]

#: In no client's types: what becomes of a misspelt field of an object
UNKNOWN = {"frobnicate": int}

#: Fields that our readers know and these clients have no argument for: of other clients, or of earlier betas.
BESIDE: dict[str, Json] = {
    RESPONSES: {
        "client_metadata": {"a": "b"},
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["warm"],
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": 5},
        "logprobs": True,
        "max_completion_tokens": 3,
        "max_tokens": 3,
        "messages": [USER],
        "n": 2,
        "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
        "verbosity": "low",
        "stream": True,
        "frobnicate": 1,
    },
    MESSAGES: {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["warm"],
        "output_format": {"type": "json_schema", "schema": SCHEMA},
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "frobnicate": 1,
    },
    COUNT: {"max_tokens": 9, "betas": ["x"], "metadata": {"user_id": "u"}, "frobnicate": 1},
}


def values_of(key: str, hint: Any, present: Any) -> list[Any]:
    """What is sent for a field: VALUES, else each of its words, else the smallest value. Never what was there."""
    if key in VALUES:
        return [value for value in VALUES[key] if value != present]
    words = [word for word in literals(hint) if word is not None] if not kinds_in(hint) else []
    if is_list(hint):
        words = [[word] for word in words]
    if 0 < len(words) <= 12:
        return [word for word in words if word != present]
    value = sample(hint)
    if value == present:
        value = not value if isinstance(value, bool) else f"{value}2"
    return [f"{present}2" if isinstance(present, str) and isinstance(value, str) else value]


def fields(api: str, place: str, hinted: Mapping[str, Any], wrap: Wrap, base: Json) -> Iterator[Row]:
    """A row for each field of an object. `base` is the smallest object; `wrap` puts one into a request."""
    for name, hint in {**hinted, **(UNKNOWN if place else {})}.items():
        if name == "type":
            continue
        path = f"{place}.{name}" if place else name
        for value in values_of(f"{api} {path}", hint, base.get(name)):
            yield Row(api, path, value, wrap(base), wrap({**base, name: value}), again=name in base)


def of_types(api: str, place: str, kinds: Kinds, plain: Json, wrap: Wrap, skip: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each type of tool, item or block that has no object of its own among `skip`."""
    for word, each in kinds.items():
        if word is not None and word not in skip:
            name = f"{place}[{word}]"
            yield Row(api, name, None, plain, wrap({**sample(each[0]), "type": word}), of_type=True)


def objects(
    api: str, place: str, kinds: Kinds, plain: Json, put: Wrap, bases: Mapping[str, tuple[Json, Wrap | None]]
) -> Iterator[Row]:
    """The types of one place: those with a base are read by us, so that each of their fields is a row."""
    yield from of_types(api, place, kinds, plain, put, bases)
    for word, (base, own) in bases.items():
        yield Row(api, f"{place}[{word}]", None, plain, (own or put)(base), of_type=True)
        yield from fields(api, f"{place}[{word}]", hints(*kinds[word]), own or put, base)


def beside(api: str, base: Json, hinted: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in BESIDE[api].items():
        if name not in hinted:
            yield Row(api, name, value, base, {**base, name: value})


# ------------------------------------------------------------------------------------------------ /v1/responses

FUNCTION: Json = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
OTHER: Json = {"type": "function", "name": "other", "parameters": SCHEMA, "strict": False}
CALL: Json = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bonn"}'}
RESULT: Json = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
THOUGHT: Json = {"type": "reasoning", "id": "rs_1", "summary": []}
IMAGE: Json = {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{PIXEL}"}


def response_body(**more: Any) -> Json:
    return {"input": [USER], "temperature": 0, "max_output_tokens": ANSWER, **more}


def _call_in_a_round(call: Json) -> Json:
    """With an answer that has the call's id."""
    return response_body(input=[USER, call, RESULT | {"call_id": call["call_id"]}], tools=[FUNCTION])


def _result_in_a_round(result: Json) -> Json:
    return response_body(input=[USER, CALL | {"call_id": result["call_id"]}, result], tools=[FUNCTION])


def _two_tools(choice: Json) -> Json:
    return response_body(tools=[FUNCTION, OTHER], tool_choice=choice)


def _content(role: str) -> Wrap:
    def wrap(part: Json) -> Json:
        talk = [USER] if role == "assistant" else []
        return response_body(input=[*talk, {"role": role, "content": [part]}, USER])

    return wrap


def of_responses() -> Iterator[Row]:
    from openai.types.responses import response_create_params as create

    api, top = RESPONSES, hints(create.ResponseCreateParamsBase)
    base = response_body(model="")  # the model is filled in where it is asked
    with_tool = response_body(tools=[FUNCTION])
    needs_tools = ("tool_choice", "parallel_tool_calls")
    yield from fields(api, "", {name: top[name] for name in top if name not in needs_tools}, dict, base)
    yield from fields(api, "", {name: top[name] for name in needs_tools}, dict, with_tool)
    yield from beside(api, base, top)
    for name in ("text", "reasoning", "stream_options"):
        yield from fields(
            api, name, hints(*kinds_in(top[name])), lambda given, name=name: response_body(**{name: given}), {}
        )
    form = {"type": "json_schema", "name": "capital", "schema": SCHEMA}
    forms = by_word(hints(*kinds_in(top["text"]))["format"])
    yield from objects(
        api, "text.format", forms, response_body(), lambda given: response_body(text={"format": given}),
        {"text": ({"type": "text"}, None), "json_object": ({"type": "json_object"}, None), "json_schema": (form, None)},
    )  # fmt: skip
    space = {"type": "namespace", "name": "maps", "description": "of maps", "tools": [FUNCTION]}
    yield from objects(
        api, "tools", by_word(top["tools"]), with_tool, lambda tool: response_body(tools=[FUNCTION, tool]),
        {"function": (OTHER, None), "namespace": (space, None)},
    )  # fmt: skip
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    yield from objects(
        api, "tool_choice", by_word(top["tool_choice"]), response_body(tools=[FUNCTION, OTHER]), _two_tools,
        {"function": ({"type": "function", "name": "weather"}, None), "allowed_tools": (allowed, None)},
    )  # fmt: skip
    items = by_word(top["input"])
    yield from objects(
        api, "input", items, response_body(), lambda item: response_body(input=[USER, item, USER]),
        {
            "message": ({"type": "message", "role": "user", "content": "And now?"}, None),
            "function_call": (CALL, _call_in_a_round),
            "function_call_output": (RESULT, _result_in_a_round),
            "reasoning": (THOUGHT, lambda item: response_body(input=[USER, item, CALL, RESULT], tools=[FUNCTION])),
        },
    )  # fmt: skip
    said: Kinds = {}
    for each in items["message"]:
        said |= by_word(hints(each)["content"])
    bases: dict[str, tuple[Json, Wrap | None]] = {
        "input_text": ({"type": "input_text", "text": "Well?"}, None),
        "input_image": (IMAGE, None),
        "output_text": ({"type": "output_text", "text": "Well.", "annotations": []}, _content("assistant")),
        "refusal": ({"type": "refusal", "refusal": "No."}, _content("assistant")),
    }
    yield from objects(
        api, "input.content", said, _content("user")({"type": "input_text", "text": ""}), _content("user"), bases
    )


# ------------------------------------------------------------------------------------------------- /v1/messages

TOOL: Json = {"name": "weather", "input_schema": SCHEMA}
OTHER_TOOL: Json = {"name": "other", "input_schema": SCHEMA}
USE: Json = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bonn"}}
FOUND: Json = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
PICTURE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}


def message_body(**more: Any) -> Json:
    return {"messages": [USER], "max_tokens": ANSWER, "temperature": 0, **more}


def _user_block(block: Json) -> Json:
    return message_body(
        messages=[USER, ASSISTANT, {"role": "user", "content": [{"type": "text", "text": "Well?"}, block]}]
    )


def _assistant_block(block: Json) -> Json:
    said = [block, {"type": "text", "text": "So it is."}]
    return message_body(messages=[USER, {"role": "assistant", "content": said}, USER])


def _use_in_a_round(use: Json) -> Json:
    found = {"role": "user", "content": [FOUND | {"tool_use_id": use["id"]}]}
    return message_body(messages=[USER, {"role": "assistant", "content": [use]}, found], tools=[TOOL])


def _found_in_a_round(found: Json) -> Json:
    use = {"role": "assistant", "content": [USE | {"id": found["tool_use_id"]}]}
    return message_body(messages=[USER, use, {"role": "user", "content": [found]}], tools=[TOOL])


def _in_result(block: Json) -> Json:
    return _found_in_a_round(FOUND | {"content": [{"type": "text", "text": "sunny"}, block]})


def _of_blocks(turns: list[type]) -> Iterator[Row]:
    api = MESSAGES
    user, assistant = (by_word(hints(turn)["content"]) for turn in turns[:2])
    block = {"type": "text", "text": "It is May."}
    thinks = {"type": "thinking", "thinking": "It is May.", "signature": ""}
    yield from objects(
        api, "user", user, message_body(messages=[USER, ASSISTANT, {"role": "user", "content": "Well?"}]), _user_block,
        {"text": (block, None), "image": (PICTURE, None), "tool_result": (FOUND, _found_in_a_round)},
    )  # fmt: skip
    yield from objects(
        api, "assistant", assistant, _assistant_block({"type": "text", "text": "Now."}), _assistant_block,
        {
            "text": (block, None),
            "thinking": (thinks, None),
            "redacted_thinking": ({"type": "redacted_thinking", "data": "x"}, None),
            "tool_use": (USE, _use_in_a_round),
        },
    )  # fmt: skip
    inner = by_word(hints(*user["tool_result"])["content"])
    yield from objects(
        api, "tool_result.content", inner, _found_in_a_round(FOUND), _in_result,
        {"text": (block, None), "image": (PICTURE, None)},
    )  # fmt: skip
    sources = by_word(hints(*user["image"])["source"])
    yield from objects(
        api, "image.source", sources, _user_block(block), lambda given: _user_block({"type": "image", "source": given}),
        {"base64": (PICTURE["source"], None)},
    )  # fmt: skip


def of_messages() -> Iterator[Row]:
    from anthropic.types.beta import message_create_params as create

    api, top = MESSAGES, hints(create.MessageCreateParamsBase)
    base, with_tool = message_body(model=""), message_body(tools=[TOOL])
    yield from fields(api, "", {name: top[name] for name in top if name != "tool_choice"}, dict, base)
    yield from fields(api, "", {"tool_choice": top["tool_choice"]}, dict, with_tool)
    yield from beside(api, base, top)
    config = hints(*kinds_in(top["output_config"]))
    yield from fields(api, "output_config", config, lambda given: message_body(output_config=given), {})
    forms = hints(*kinds_in(config["format"]))
    form = {"type": "json_schema", "schema": OTHER_SCHEMA}
    yield from fields(
        api, "output_config.format", forms, lambda given: message_body(output_config={"format": given}), form
    )
    yield from objects(
        api, "thinking", by_word(top["thinking"]), base, lambda given: message_body(thinking=given),
        {
            "enabled": ({"type": "enabled", "budget_tokens": 1024}, None),
            "adaptive": ({"type": "adaptive"}, None),
            "disabled": ({"type": "disabled"}, None),
        },
    )  # fmt: skip
    yield from objects(
        api, "tools", by_word(top["tools"]), with_tool, lambda tool: message_body(tools=[TOOL, tool]),
        {"custom": (OTHER_TOOL | {"type": "custom"}, None)},
    )  # fmt: skip
    yield from objects(
        api, "tool_choice", by_word(top["tool_choice"]), message_body(tools=[TOOL, OTHER_TOOL]),
        lambda choice: message_body(tools=[TOOL, OTHER_TOOL], tool_choice=choice),
        {
            "auto": ({"type": "auto"}, None),
            "any": ({"type": "any"}, None),
            "tool": ({"type": "tool", "name": "weather"}, None),
            "none": ({"type": "none"}, None),
        },
    )  # fmt: skip
    blocks = by_word(top["system"])
    block = {"type": "text", "text": "Be brief."}
    yield from objects(api, "system", blocks, base, lambda given: message_body(system=[given]), {"text": (block, None)})
    turns = kinds_in(top["messages"])
    for turn, talk in zip(turns, (USER, ASSISTANT, {"role": "system", "content": "Be brief."}), strict=False):
        role = literals(hints(turn)["role"])
        name = f"messages[{talk['role']}]" if len(role) != 1 else f"messages[{role[0]}]"
        yield from fields(api, name, hints(turn), lambda given: message_body(messages=[USER, given, USER]), talk)
    yield from _of_blocks(turns)


def of_count() -> Iterator[Row]:
    from anthropic.types.beta import message_count_tokens_params as create

    top = hints(create.MessageCountTokensParams)
    base = {"messages": [USER], "model": ""}
    with_tool = base | {"tools": [TOOL]}
    yield from fields(COUNT, "", {name: top[name] for name in top if name != "tool_choice"}, dict, base)
    yield from fields(COUNT, "", {"tool_choice": top["tool_choice"]}, dict, with_tool)
    yield from beside(COUNT, base, top)


def all_rows() -> list[Row]:
    return [*of_responses(), *of_messages(), *of_count()]


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in sorted(set(CLIENTS.values()))}
