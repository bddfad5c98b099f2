"""The two sides that are asked: `Us` (LLMInferencer, our server for /v1) and the `Bare` engine in its own API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from llm_inference import Chunk, Completion, InferenceError, LLMInferencer, Settings, Target, create_app
from tests.harness import serving

from .judge import Refusal, Undecidable

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
OUR_REFUSALS = ("invalid_request", "unsupported_feature", "context_too_long", "model_not_found")
TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back with a 200, whatever the dialect."""

    text: str = ""
    finish: str = ""
    reasoning: str = ""
    calls: tuple[Json, ...] = ()  #: tool calls in OpenAI's shape
    logprobs: tuple[Json, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    texts: tuple[str, ...] = ()  #: of every choice
    usage_events: int = 0  #: events of a stream that carry a usage
    ignored: tuple[str, ...] = ()
    result: Any = None


class Side(ABC):
    """One way to ask one engine. `ask` takes GenerateRequest's fields, `v1` an OpenAI body; both raise Refusal."""

    bare: bool
    label: str
    parallel = 4  #: requests at once, where many are asked for

    def __init__(self, engine: str, model: str, version: str, context: int | None) -> None:
        self.engine, self.model, self.version, self.context = engine, model, version, context
        self.memo: dict[Any, Any] = {}  #: answers that several rows look at

    @abstractmethod
    def ask(self, prompt: str | list[Json], *, stream: bool = False, **fields: Any) -> Answer: ...

    @abstractmethod
    def embed(self, text: str) -> list[float]: ...

    @abstractmethod
    def v1(self, path: str = CHAT, **body: Any) -> Answer: ...


class OnV1(Side):
    """The same questions as `side` takes, as OpenAI bodies to its /v1."""

    def __init__(self, side: Side) -> None:
        super().__init__(side.engine, side.model, side.version, side.context)
        self.side, self.bare, self.label = side, side.bare, side.label
        self.memo = side.memo.setdefault("/v1", {})

    def ask(self, prompt: str | list[Json], *, stream: bool = False, **fields: Any) -> Answer:
        body = {"messages": messages_of(prompt), **fields}
        return self.side.v1(**body, **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}))

    def embed(self, text: str) -> list[float]:
        return self.side.embed(text)

    def v1(self, path: str = CHAT, **body: Any) -> Answer:
        return self.side.v1(path, **body)


def messages_of(prompt: str | list[Json]) -> list[Json]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


# ------------------------------------------------------------------------------------------------ through us


class Us(Side):
    """LLMInferencer, and our HTTP server in front of the same one."""

    bare, label = False, "through us"

    def __init__(self, llm: LLMInferencer, url: str) -> None:
        health = llm.health()
        model = next((m for m in llm.models() if m.name == llm.model_name), llm.models()[0])
        super().__init__(llm.engine_type, model.name, str(health.get("version") or ""), model.context_length)
        self.llm, self.http = llm, HTTP(url)

    def ask(self, prompt: str | list[Json], *, stream: bool = False, **fields: Any) -> Answer:
        if "model" in fields:  # OpenAI's word; in Python it is another
            fields["model_name"] = fields.pop("model")
        try:
            done = asyncio.run(self._streamed(prompt, fields)) if stream else self.llm.complete(prompt, **fields)
        except InferenceError as exc:
            raise Refusal(exc.kind, f"{exc.reason}; {exc.hint}", exc.kind in OUR_REFUSALS) from exc
        return Answer(
            text=done.text,
            finish=done.finish_reason,
            reasoning=done.reasoning,
            calls=tuple(dict(call) for call in done.tool_calls),
            logprobs=done.logprobs,
            prompt_tokens=done.usage.prompt_tokens,
            tokens=done.usage.completion_tokens,
            texts=(done.text,),
            ignored=done.ignored,
            result=done.result,
        )

    async def _streamed(self, prompt: str | list[Json], fields: Json) -> Completion:
        request = self.llm.request(prompt, **fields)
        chunks: list[Chunk] = []
        async with contextlib.aclosing(self.llm.bursts(request)) as bursts:
            async for burst in bursts:
                chunks += burst
        return Completion.from_chunks(chunks)

    def embed(self, text: str) -> list[float]:
        try:
            return self.llm.embed(text)[0]
        except InferenceError as exc:
            raise Refusal(exc.kind, f"{exc.reason}; {exc.hint}", exc.kind in OUR_REFUSALS) from exc

    def v1(self, path: str = CHAT, **body: Any) -> Answer:
        return self.http.post(path, {"model": f"{self.engine}/{self.model}", **body})


@contextlib.contextmanager
def through_us(llm: LLMInferencer) -> Iterator[Us]:
    """`llm` as it is, and behind our server on a free port."""
    llm.__enter__()
    with serving(create_app(Settings(engine=llm.engine_type), llm)) as url:
        yield Us(llm, url)


# ------------------------------------------------------------------------------------------- the bare engine


class Bare(Side):
    """vLLM, SGLang or llama.cpp in its own OpenAI dialect."""

    bare, label = True, "bare"
    NAMES: Mapping[str, Mapping[str, str]] = {"llamacpp": {"repetition_penalty": "repeat_penalty"}}
    #: where the engine takes a constraint that OpenAI has no field for
    CONSTRAINTS: Mapping[str, Mapping[str, str]] = {
        "vllm": {
            "choice": "structured_outputs.choice",
            "regex": "structured_outputs.regex",
            "grammar": "structured_outputs.grammar",
        },
        "sglang": {"regex": "regex", "grammar": "ebnf"},
        "llamacpp": {"grammar": "grammar"},
    }

    def __init__(self, engine: str, http: HTTP, us: Us) -> None:
        super().__init__(engine, us.model, us.version, us.context)
        self.http = http

    def ask(self, prompt: str | list[Json], *, stream: bool = False, **fields: Any) -> Answer:
        body = {"messages": messages_of(prompt), **self._translated(fields)}
        return self.v1(**body, **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}))

    def _translated(self, fields: Json) -> Json:
        names = self.NAMES.get(self.engine, {})
        body: Json = {}
        for name, value in fields.items():
            if name == "schema":
                body["response_format"] = response_format(value)
            elif name == "think":
                body["chat_template_kwargs"] = {"enable_thinking": value}
            elif name in ("choice", "regex", "grammar"):
                where, _, inner = self._constraint(name).partition(".")
                body[where] = {**body.get(where, {}), inner: value} if inner else value
            else:
                body[names.get(name, name)] = value
        return body

    def _constraint(self, name: str) -> str:
        known = self.CONSTRAINTS.get(self.engine, {})
        if name not in known:
            raise Undecidable(f"{self.engine} has no field for it")
        return known[name]

    def embed(self, text: str) -> list[float]:
        return self.http.embed({"model": self.model, "input": text})

    def v1(self, path: str = CHAT, **body: Any) -> Answer:
        return self.http.post(path, {"model": self.model, **body})


class BareOllama(Bare):
    """Ollama's native API for GenerateRequest's fields; its /v1 for the /v1 rows."""

    OPTIONS: Mapping[str, str] = {"max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"} | {
        name: name
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
    }

    def ask(self, prompt: str | list[Json], *, stream: bool = False, **fields: Any) -> Answer:
        body: Json = {"model": self.model, "messages": messages_of(prompt), "stream": False, "options": {}}
        for name, value in fields.items():
            if name in self.OPTIONS:
                body["options"][self.OPTIONS[name]] = [value] if name == "stop" and isinstance(value, str) else value
            elif name == "schema":
                body["format"] = value or "json"
            elif name in ("choice", "regex", "grammar"):
                raise Undecidable("ollama has no field for it")
            else:
                body[name] = value
        return self._read(self.http.send("/api/chat", body).json())

    @staticmethod
    def _read(payload: Json) -> Answer:
        message = payload["message"]
        calls = tuple(
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        )
        return Answer(
            text=message["content"],
            texts=(message["content"],),
            finish=payload.get("done_reason", ""),
            reasoning=message.get("thinking", ""),
            calls=calls,
            logprobs=tuple(payload.get("logprobs") or ()),
            prompt_tokens=payload.get("prompt_eval_count", 0),
            tokens=payload.get("eval_count", 0),
        )


def target_of(us: Us) -> Target:
    """Where the engine behind `us` is."""
    found = asyncio.run(us.llm.engine()).connection.target  # type: ignore[attr-defined]
    assert isinstance(found, Target)
    return found


def bare_side(us: Us) -> Bare:
    """The engine that `us` talks to, asked without us; an embedded one is reached with its own key on its own
    socket."""
    target = target_of(us)
    http = HTTP(target.url, target.headers, target.uds)
    return (BareOllama if us.engine == "ollama" else Bare)(us.engine, http, us)


def response_format(schema: Json) -> Json:
    return (
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        if schema
        else {"type": "json_object"}
    )


# --------------------------------------------------------------------------------------------- OpenAI's wire


@dataclass
class HTTP:
    """A server that speaks OpenAI's dialect. Errors of any shape become a Refusal."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    uds: str | None = None

    def __post_init__(self) -> None:
        no_reuse = httpx.Limits(
            max_keepalive_connections=0
        )  # llama.cpp closes a connection after a stream, and does not say so
        transport = httpx.HTTPTransport(uds=self.uds, limits=no_reuse)
        self.client = httpx.Client(transport=transport, timeout=TIMEOUT, headers=dict(self.headers), trust_env=False)

    def send(self, path: str, body: Json) -> httpx.Response:
        for _ in range(3):
            reply = self.client.post(self.url + path, json=body)
            if reply.status_code != 429:
                break
            time.sleep(6)  # LiteLLM lets a model rest for 5 seconds after some errors: that is not what is asked here
        if reply.status_code != 200:
            raise refusal(reply.status_code, reply.text, reply.headers.get("x-error-kind"))
        return reply

    def post(self, path: str, body: Json) -> Answer:
        reply = self.send(path, body)
        ignored = tuple(filter(None, reply.headers.get("x-ignored-fields", "").split(", ")))
        return read_events(reply.text) if body.get("stream") else read_whole(reply.json(), ignored)

    def embed(self, body: Json) -> list[float]:
        vector: list[float] = self.send("/v1/embeddings", body).json()["data"][0]["embedding"]
        return vector


def refusal(status: int, text: str, kind: str | None) -> Refusal:
    """An error in any dialect. llama.cpp blames itself (500) where it refuses an image, so what it says counts too."""
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    refuses = kind in OUR_REFUSALS if kind else 400 <= status < 500 or status == 501 or "not supported" in text
    return Refusal(kind or f"http {status}", text[:2000], refuses)


def read_whole(payload: Json, ignored: tuple[str, ...] = ()) -> Answer:
    choice = payload["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    usage = payload.get("usage") or {}
    return Answer(
        text=message.get("content") or "",
        finish=choice.get("finish_reason") or "",
        calls=tuple(message.get("tool_calls") or ()),
        ignored=ignored,
        reasoning=message.get("reasoning") or message.get("reasoning_content") or "",
        logprobs=_logprobs(choice),
        prompt_tokens=usage.get("prompt_tokens", 0),
        tokens=usage.get("completion_tokens", 0),
        texts=tuple(
            (each.get("message") or {"content": each.get("text")}).get("content") or "" for each in payload["choices"]
        ),
    )


def _logprobs(choice: Json) -> tuple[Json, ...]:
    given = choice.get("logprobs") or {}
    return tuple(
        given.get("content")
        or (
            {"token": token, "logprob": p}
            for token, p in zip(given.get("tokens", ()), given.get("token_logprobs", ()), strict=True)
        )
    )


def read_events(text: str) -> Answer:
    """A stream, put together. An error event is a Refusal; a stream that nothing ends is one too."""
    events = [
        line.removeprefix("data: ") for line in text.replace("\r\n", "\n").split("\n") if line.startswith("data: ")
    ]
    payloads = [json.loads(event) for event in events if event != "[DONE]"]
    for payload in payloads:
        if payload.get("error") is not None:
            raise refusal(400, json.dumps(payload), "error in the stream")
    choices = [choice for payload in payloads for choice in payload["choices"]]
    usages = [payload["usage"] for payload in payloads if payload.get("usage")]
    deltas = [choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    words = "".join(delta.get("content") or "" for delta in deltas)
    finish = next((choice["finish_reason"] for choice in reversed(choices) if choice.get("finish_reason")), "")
    if not finish:
        raise Refusal("cut stream", "the stream ended without a finish_reason", False)
    usage = usages[-1] if usages else {}
    return Answer(
        text=words,
        texts=(words,),
        finish=finish,
        calls=_joined(deltas),
        logprobs=tuple(each for choice in choices for each in _logprobs(choice)),
        reasoning="".join(delta.get("reasoning") or delta.get("reasoning_content") or "" for delta in deltas),
        usage_events=len(usages),
        prompt_tokens=usage.get("prompt_tokens", 0),
        tokens=usage.get("completion_tokens", 0),
    )


def _joined(deltas: list[Json]) -> tuple[Json, ...]:
    """Streamed tool calls; not by the module's own function, which is what is judged here."""
    calls: dict[int, Json] = {}
    for delta in (call for each in deltas for call in each.get("tool_calls") or ()):
        call = calls.setdefault(delta.get("index", 0), {"function": {"name": "", "arguments": ""}})
        for name in ("name", "arguments"):
            call["function"][name] += (delta.get("function") or {}).get(name) or ""
    return tuple(calls[index] for index in sorted(calls))
