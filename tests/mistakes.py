"""Mistakes that users make, each made for real, and what they are told.

    python -m tests.mistakes        # writes tests/results/messages.md, which test_mistakes.py holds to what happens

A row says what was done, the error's class, and the words that its message must have: the value's name, and the range
or the near name where there is one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import llm_inference as product
from llm_inference import LLMInferencer
from tests.fake_engine import Dialect, FakeEngine, Reply
from tests.harness import Stand
from tests.processes import ROOT, is_setting

_NUMBERS = itertools.count()  # a start that failed is not tried again at once: each time another one

TABLE = ROOT / "tests/results/messages.md"
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WRONG_KEY = {"authorization": "Bearer no"}
PICTURE = "data:image/png;base64,iVBORw0KGgo="


@dataclass(frozen=True)
class Said:
    """What a user was told."""

    kind: str  #: the class of the error
    message: str  #: the reason and the fix
    fix: str = ""  #: where it is told apart
    output: str = ""  #: all that was printed, on a command line


@dataclass(frozen=True)
class Mistake:
    surface: str
    done: str  #: what was done
    kind: type[product.InferenceError]
    words: tuple[str, ...]  #: that the message has
    make: Callable[[Place], Said]


class Place:
    """Fake engines, servers in front of them, and a folder for files."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stands: dict[str, Stand] = {}

    def __enter__(self) -> Place:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mistakes-")))
        self._stack.enter_context(_without_settings())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def stand(self, dialect: Dialect = "vllm", name: str = "", **settings: Any) -> Stand:
        """A server in front of a fake engine; the same one for the same name."""
        key = name or dialect
        if key not in self._stands:
            self._stands[key] = self._stack.enter_context(Stand(dialect, **settings))
        return self._stands[key]

    def engine(self, dialect: Dialect = "vllm", **options: Any) -> FakeEngine:
        return self.stand(dialect).engine if not options else self._stack.enter_context(FakeEngine(dialect, **options))

    def llm(self, dialect: Dialect = "vllm", model: str | None = None, **options: Any) -> LLMInferencer:
        options.setdefault("base_url", self.engine(dialect).base_url)
        made = LLMInferencer(dialect, model, **options)
        self._stack.callback(made.close)
        return made

    def started(self, engine: str, model: Any = None, **options: Any) -> LLMInferencer:
        made = LLMInferencer(engine, model, launch=True, **options)
        self._stack.callback(made.close)
        return made

    def subfolder(self, name: str) -> str:
        (self.folder / name).mkdir(exist_ok=True)
        return str(self.folder / name)

    def file(self, name: str, content: str) -> str:
        (self.folder / name).write_text(content)
        return str(self.folder / name)

    def plainly(self, text: str) -> str:
        """A message without what differs from run to run."""
        text = text.replace(str(self.folder), "FOLDER").replace(str(ROOT), "ROOT").replace(sys.executable, "PYTHON")
        text = text.replace(str(Path.home()), "HOME")
        return re.sub(r"127\.0\.0\.1:(?!9\b|8080|8000)\d+", "127.0.0.1:PORT", text)


@contextlib.contextmanager
def _without_settings() -> Iterator[None]:
    """No setting of whoever runs this; nobody is on the engines' default ports."""
    before = dict(os.environ)
    for name in filter(is_setting, before):
        del os.environ[name]
    os.environ["OLLAMA_HOST"] = os.environ["VLLM_BASE_URL"] = os.environ["SGLANG_BASE_URL"] = "127.0.0.1:9"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


MISTAKES: list[Mistake] = []


def _add(
    surface: str, done: str, kind: type[product.InferenceError], words: str, make: Callable[[Place], Said]
) -> None:
    MISTAKES.append(Mistake(surface, done, kind, tuple(words.split(" | ")), make))


def python(done: str, kind: type[product.InferenceError], words: str, act: Callable[[Place], Any]) -> None:
    """A line of Python. It may return a result that holds the error (`batch`)."""

    def make(place: Place) -> Said:
        try:
            found = act(place)
        except product.InferenceError as exc:
            found = exc
        assert isinstance(found, product.InferenceError), f"it passed: {found!r}"
        return Said(found.kind, found.message, found.hint)

    _add("Python", done, kind, words, make)


def http(done: str, kind: type[product.InferenceError], words: str, act: Callable[[Place], httpx.Response]) -> None:
    """A request to our own routes, or in OpenAI's or Anthropic's format."""

    def make(place: Place) -> Said:
        reply = act(place)
        assert reply.status_code >= 400, f"it passed: {reply.text[:300]}"
        body = reply.json()
        message = body["error"]["message"] if "error" in body else body["msg"].partition(": ")[2]
        return Said(reply.headers["x-error-kind"], message, message.partition("; ")[2])

    _add("HTTP", done, kind, words, make)


def command(done: str, kind: type[product.InferenceError], words: str, act: Callable[[Place], list[str]]) -> None:
    """A command line, in this process."""

    def make(place: Place) -> Said:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), _quiet():
            try:
                status: Any = product.main(act(place))
            except SystemExit as exc:
                status = exc.code
        assert status in (1, 2), f"it passed: {status}: {printed.getvalue()}"
        lines = printed.getvalue().strip().splitlines()
        kind, _, message = lines[-1].partition(": ")
        return Said(kind, message, message.partition("; ")[2], printed.getvalue())

    _add("command line", done, kind, words, make)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def config(text: str, kind: type[product.InferenceError], words: str) -> None:
    """A file of settings."""

    def make(place: Place) -> Said:
        try:
            LLMInferencer.from_config(place.file("llm.toml", text)).close()
        except product.InferenceError as exc:
            return Said(exc.kind, exc.message, exc.hint)
        raise AssertionError("it passed")

    _add("config", text.replace("\n", " ⏎ "), kind, words, make)


INVALID, UNSUPPORTED = product.InvalidRequest, product.UnsupportedFeature

# Python: what is attached to, or started ---------------------------------------------------------
python(
    'LLMInferencer("olama")', product.UnknownEngine, "olama | did you mean 'ollama'", lambda p: LLMInferencer("olama")
)
python('LLMInferencer("vLLM")', product.UnknownEngine, "vLLM | did you mean 'vllm'", lambda p: LLMInferencer("vLLM"))
python('LLMInferencer("openai")', product.UnknownEngine, "openai | ollama | vllm | sglang | llamacpp",
       lambda p: LLMInferencer("openai"))  # fmt: skip
python("LLMInferencer(None)", product.UnknownEngine, "None | vllm",
       lambda p: LLMInferencer(None))  # type: ignore[arg-type]  # fmt: skip
python('LLMInferencer("vllm", model="m")', INVALID, "model | did you mean 'model_name'",
       lambda p: LLMInferencer("vllm", model="m"))  # type: ignore[call-arg]  # fmt: skip
python('LLMInferencer("vllm", url="http://x")', INVALID, "url | base_url",
       lambda p: LLMInferencer("vllm", url="http://x"))  # type: ignore[call-arg]  # fmt: skip
python('LLMInferencer("vllm", base_url="localhost:99999")', INVALID, "base_url | 65535",
       lambda p: p.llm(base_url="localhost:99999").generate("x"))  # fmt: skip
python('LLMInferencer("vllm", base_url="ftp://gpu1")', INVALID, "base_url | http",
       lambda p: p.llm(base_url="ftp://gpu1").generate("x"))  # fmt: skip
python('LLMInferencer("vllm", base_url=[])', INVALID, "base_url", lambda p: LLMInferencer("vllm", base_url=[]))
python('LLMInferencer("vllm", launch="yes")', INVALID, "launch | auto",
       lambda p: LLMInferencer("vllm", launch="yes"))  # type: ignore[arg-type]  # fmt: skip
python('LLMInferencer("vllm", launch_args="--x")', INVALID, "launch_args | list",
       lambda p: LLMInferencer("vllm", launch_args="--x"))  # fmt: skip
python('LLMInferencer("vllm", api_key=5)', INVALID, "api_key | string",
       lambda p: LLMInferencer("vllm", api_key=5))  # type: ignore[arg-type]  # fmt: skip
python('LLMInferencer("vllm", base_url=…, launch=True)', INVALID, "base_url | launch",
       lambda p: p.llm(base_url="http://127.0.0.1:9", launch=True).models())  # fmt: skip
python('LLMInferencer("vllm", deadlines=5)', INVALID, "deadlines | Deadlines",
       lambda p: LLMInferencer("vllm", deadlines=5))  # type: ignore[arg-type]  # fmt: skip
python("base_url where nobody listens", product.EngineUnavailable, "vllm | vllm serve",
       lambda p: p.llm(base_url="http://127.0.0.1:9").generate("x"))  # fmt: skip
python("base_url of an Ollama, given to vllm", product.EngineUnavailable, "base_url | vllm | engine_type='ollama'",
       lambda p: LLMInferencer("vllm", base_url=p.engine("ollama").base_url).generate("x"))  # fmt: skip
python("no api_key where the engine asks for one", product.EngineUnavailable, "key | VLLM_API_KEY | api_key=",
       lambda p: _locked(p).generate("x"))  # fmt: skip
python("vllm that is not installed, launch=True", product.EngineNotInstalled, "vllm | pip install vllm",
       lambda p: p.started("vllm", "m").generate("x"))  # fmt: skip
python('python="/nowhere/python"', product.EngineNotInstalled, "vllm | python: | interpreter",
       lambda p: p.started("vllm", f"m{next(_NUMBERS)}", python="/nowhere/python").generate("x"))  # fmt: skip
python("a .gguf file that is not there", product.ModelNotFound, "nope.gguf",
       lambda p: p.started("llamacpp", p.folder / "nope.gguf").generate("x"))  # fmt: skip
python("a .gguf file that is a text", product.ModelNotFound, "text.gguf | GGUF",
       lambda p: p.started("llamacpp", p.file("text.gguf", "hello")).generate("x"))  # fmt: skip
python("a folder as a .gguf file", product.ModelNotFound, "models | .gguf",
       lambda p: p.started("llamacpp", p.subfolder("models")).generate("x"))  # fmt: skip
python('launch_args=["n_ctxx=4096"] for llamacpp', INVALID, "n_ctxx | did you mean 'n_ctx'",
       lambda p: p.started("llamacpp", launch_args=[f"n_ctxx={4096 + next(_NUMBERS)}"]).generate("x"))  # fmt: skip
python('launch_args=["n_ctx=many"] for llamacpp', INVALID, "n_ctx | integer",
       lambda p: p.started("llamacpp", launch_args=["n_ctx=many"]).generate("x"))  # fmt: skip

# Python: what is asked ---------------------------------------------------------------------------
python("generate(5)", INVALID, "prompt", lambda p: p.llm().generate(5))  # type: ignore[arg-type]
python(
    'generate("x", temperature=3)', INVALID, "temperature | 0 | 2 | 3", lambda p: p.llm().generate("x", temperature=3)
)
python('generate("x", temperature="hot")', INVALID, "temperature | number",
       lambda p: p.llm().generate("x", temperature="hot"))  # type: ignore[arg-type]  # fmt: skip
python('generate("x", max_tokens=0)', INVALID, "max_tokens | 1 | 1000000 | 0",
       lambda p: p.llm().generate("x", max_tokens=0))  # fmt: skip
python('generate("x", max_tokens=1.5)', INVALID, "max_tokens | integer",
       lambda p: p.llm().generate("x", max_tokens=1.5))  # type: ignore[arg-type]  # fmt: skip
python('generate("x", top_p=2)', INVALID, "top_p | 0 | 1 | 2", lambda p: p.llm().generate("x", top_p=2))
python('generate("x", presence_penalty=5)', INVALID, "presence_penalty | -2 | 2 | 5",
       lambda p: p.llm().generate("x", presence_penalty=5))  # fmt: skip
python('generate("x", stop=[5])', INVALID, "stop[0]: must be a string",
       lambda p: p.llm().generate("x", stop=[5]))  # type: ignore[list-item]  # fmt: skip
python('generate("x", timeout=-1)', INVALID, "timeout | -1", lambda p: p.llm().generate("x", timeout=-1))
python('generate("x", temprature=1)', INVALID, "temprature | did you mean 'temperature'",
       lambda p: p.llm().generate("x", temprature=1))  # type: ignore[call-arg]  # fmt: skip
python('generate("x", model="m")', INVALID, "model | did you mean 'model_name'",
       lambda p: p.llm().generate("x", model="m"))  # type: ignore[call-arg]  # fmt: skip
python('generate("x", stream=True)', INVALID, "stream | stream(",
       lambda p: p.llm().generate("x", stream=True))  # type: ignore[call-arg]  # fmt: skip
python('generate("x", top_logprobs=99)', INVALID, "top_logprobs | 20 | 99",
       lambda p: p.llm().generate("x", logprobs=True, top_logprobs=99))  # fmt: skip
python('generate("x", on_unsupported="skip")', INVALID, "on_unsupported | error | ignore",
       lambda p: p.llm().generate("x", on_unsupported="skip"))  # type: ignore[arg-type]  # fmt: skip
python('generate("x", model_name="missing")', product.ModelNotFound, "missing | it serves m",
       lambda p: p.llm().generate("x", model_name="missing"))  # fmt: skip
python("chat([])", INVALID, "messages | empty", lambda p: p.llm().chat([]))
python("chat() with the role 'bot'", INVALID, "role | user | assistant",
       lambda p: p.llm().chat([{"role": "bot", "content": "x"}]))  # fmt: skip
python("chat() without a content", INVALID, "messages | content", lambda p: p.llm().chat([{"role": "user"}]))
python("chat() with 'contents' for 'content'", INVALID, "contents | did you mean 'content'",
       lambda p: p.llm().chat([{"role": "user", "contents": "x"}]))  # fmt: skip
python(
    "an image of a URL",
    INVALID,
    "messages[0].content[0].image_url.url: | data:",
    lambda p: p.llm().chat(_image("https://example.com/a.png")),
)
python("an image for a model that reads none", UNSUPPORTED, "image", lambda p: p.llm("ollama").chat(_image(PICTURE)))
python('structured_generate("x", schema="Person")', INVALID, "schema | dict",
       lambda p: p.llm().structured_generate("x", schema="Person"))  # fmt: skip
python('schema={"a": "strng"}', INVALID, "schema | strng | did you mean \"string\"",
       lambda p: p.llm().structured_generate("x", schema={"a": "strng"}))  # fmt: skip
python('schema with "nullable": true', UNSUPPORTED, "schema | nullable",
       lambda p: p.llm().structured_generate("x", schema=_field(type="string", nullable=True)))  # fmt: skip
python('schema with "$ref": "https://…"', INVALID, "schema | $ref | $defs",
       lambda p: p.llm().structured_generate("x", schema=_field(**{"$ref": "https://example.com/s"})))  # fmt: skip
python('schema with "$ref" to nothing', INVALID, "schema | #/$defs/a | $defs",
       lambda p: p.llm().structured_generate("x", schema=_field(**{"$ref": "#/$defs/a"})))  # fmt: skip
python('schema with "pattern": "("', INVALID, "schema | pattern",
       lambda p: p.llm().structured_generate("x", schema=_field(type="string", pattern="(")))  # fmt: skip
python('schema with "minimum": "1"', INVALID, "schema | minimum",
       lambda p: p.llm().structured_generate("x", schema=_field(type="integer", minimum="1")))  # fmt: skip
python("schema of a type without a schema", INVALID, "schema | type",
       lambda p: p.llm().structured_generate("x", schema=Callable))  # type: ignore[arg-type]  # fmt: skip
python("an answer that max_tokens cuts", product.StructuredOutputInvalid, "max_tokens",
       lambda p: p.llm().structured_generate("x", schema=CITY, max_tokens=2))  # fmt: skip
python("choice=[]", INVALID, "choice | empty", lambda p: p.llm().generate("x", choice=[]))
python('choice="yes"', INVALID, "choice | list",
       lambda p: p.llm().generate("x", choice="yes"))  # type: ignore[arg-type]  # fmt: skip
python('regex="("', INVALID, "regex", lambda p: p.llm().generate("x", regex="("))
python("regex and choice together", INVALID, "regex | choice",
       lambda p: p.llm().generate("x", regex="a", choice=["a"]))  # fmt: skip
python(
    r'regex=r"\bx" on llama.cpp', UNSUPPORTED, "regex | \\b", lambda p: p.llm("llamacpp").generate("x", regex=r"\bx")
)
python("grammar on Ollama", UNSUPPORTED, "grammar | ollama | schema",
       lambda p: p.llm("ollama").generate("x", grammar='root ::= "a"'))  # fmt: skip
python("tools=[{}]", INVALID, "tools", lambda p: p.llm().chat(USER, tools=[{}]))  # type: ignore[typeddict-item]
python("tool_choice of a tool that is not there", INVALID, "tool_choice | tools | get",
       lambda p: p.llm().chat(USER, tools=[TOOL], tool_choice=_forced("gte")))  # fmt: skip
python("tools for a model that uses none", UNSUPPORTED, "tools",
       lambda p: p.llm("ollama", base_url=_plain_ollama(p)).chat(USER, tools=[TOOL]))  # fmt: skip
python("think=True for a model that does not", UNSUPPORTED, "think",
       lambda p: p.llm("ollama").generate("x", think=True))  # fmt: skip
python("embed([])", INVALID, "empty", lambda p: p.llm().embed([]))
python("embed() with a model that chats", UNSUPPORTED, "vllm | embed | --runner pooling",
       lambda p: _refusing(p, 404, "The model does not support Embeddings API").embed("x"))  # fmt: skip
python('batch("abc")', INVALID, "prompts | list", lambda p: p.llm().batch("abc"))
python('batch(["x"], concurrency=0)', INVALID, "concurrency | 1 | 0", lambda p: p.llm().batch(["x"], concurrency=0))
python('batch(["x", 5])', INVALID, "prompt", lambda p: p.llm().batch(["x", 5])[1])  # type: ignore[list-item]
python("run() with a function that takes a function", INVALID, "tools | work | annotate",
       lambda p: p.llm().run("x", tools=[_untyped()]))  # fmt: skip
python("pull() without a name, on Ollama", INVALID, "model", lambda p: p.llm("ollama").pull())
python('pull("nope") on vLLM', UNSUPPORTED, "pull | vllm", lambda p: p.llm().pull("nope"))
python("a prompt longer than the context", product.ContextTooLong, "context | 8192",
       lambda p: _refusing(p, 400, _TOO_LONG).generate("x"))  # fmt: skip

# HTTP: our own routes ----------------------------------------------------------------------------
http("a body that is not JSON", INVALID, "JSON", lambda p: p.stand().raw("/generate", b"prompt=x"))
http("an empty body", INVALID, "body", lambda p: p.stand().raw("/generate", b""))
http("a list as body", INVALID, "body | object", lambda p: p.stand().raw("/generate", b"[]"))
http("/generate without a prompt", INVALID, "prompt", lambda p: p.stand().post("/generate"))
http(
    "/generate with messages",
    INVALID,
    "messages | /chat",
    lambda p: p.stand().post("/generate", messages=USER),
)
http("/chat without messages", INVALID, "messages", lambda p: p.stand().post("/chat"))
http('"temperature": 3', INVALID, "temperature | 0 | 2 | 3",
     lambda p: p.stand().post("/generate", prompt="x", temperature=3))  # fmt: skip
http('"max_token": 5', INVALID, "max_token | did you mean 'max_tokens'",
     lambda p: p.stand().post("/generate", prompt="x", max_token=5))  # fmt: skip
http(
    '"stream": "yes"', INVALID, "stream | true | false", lambda p: p.stand().post("/generate", prompt="x", stream="yes")
)
http('"engine_type": "olama"', product.UnknownEngine, "olama | did you mean 'ollama'",
     lambda p: p.stand().post("/generate", prompt="x", engine_type="olama"))  # fmt: skip
http('"engine_type": "sglang", which is not running', product.EngineUnavailable, "sglang",
     lambda p: p.stand().post("/generate", prompt="x", engine_type="sglang"))  # fmt: skip
http('"model_name": "missing"', product.ModelNotFound, "missing",
     lambda p: p.stand().post("/generate", prompt="x", model_name="missing"))  # fmt: skip
http(
    '"base_url" in a request',
    INVALID,
    "base_url",
    lambda p: p.stand().post("/generate", prompt="x", base_url="http://x"),
)
http("an unknown route", product.NotFound, "/api/v1/llm/generat | /api/v1/llm/generate",
     lambda p: p.stand().post("/generat", prompt="x"))  # fmt: skip
http("GET of /generate", product.MethodNotAllowed, "GET | POST",
     lambda p: p.stand().client.get("/api/v1/llm/generate"))  # fmt: skip
http("no key", product.Unauthorized, "key | Authorization",
     lambda p: p.stand("vllm", "keyed", api_keys=("k",)).post("/generate", prompt="x"))  # fmt: skip
http("a wrong key", product.Unauthorized, "key",
     lambda p: p.stand("vllm", "keyed", api_keys=("k",)).post("/generate", WRONG_KEY, prompt="x"))  # fmt: skip
http("a body of 5 MiB", product.PayloadTooLarge, "body | 4", lambda p: p.stand().raw("/generate", b" " * (5 << 20)))
http("a compressed body", INVALID, "content-encoding | uncompressed",
     lambda p: p.stand().raw("/generate", b"\x1f\x8b", **{"content-encoding": "gzip"}))  # fmt: skip

# HTTP: OpenAI's and Anthropic's format -----------------------------------------------------------
http("/v1 without a model", INVALID, "model", lambda p: p.stand().post("/v1/chat/completions", messages=USER))
http("/v1 with an unknown model", product.ModelNotFound, "gpt-4o | /v1/models", lambda p: _chat(p, model="gpt-4o"))
http('/v1, "vlm/m"', product.ModelNotFound, "vlm | did you mean 'vllm", lambda p: _chat(p, model="vlm/m"))
http("/v1 without messages", INVALID, "messages",
     lambda p: p.stand().post("/v1/chat/completions", model=p.stand().model))  # fmt: skip
http('/v1, "n": 0', INVALID, "n: | 1 | 0", lambda p: _chat(p, n=0))
http('/v1, "max_tokens": "10"', INVALID, "max_tokens | integer", lambda p: _chat(p, max_tokens="10"))
http('/v1, "response_format": "json"', INVALID, "response_format", lambda p: _chat(p, response_format="json"))
http('/v1, "response_format" of the type "json"', INVALID, "response_format | json_object | json_schema",
     lambda p: _chat(p, response_format={"type": "json"}))  # fmt: skip
http("/v1, json_schema without a schema", INVALID, "response_format | schema",
     lambda p: _chat(p, response_format={"type": "json_schema"}))  # fmt: skip
http("/v1, a misspelt field", UNSUPPORTED, "temperatur | did you mean 'temperature'", lambda p: _chat(p, temperatur=1))
http("/v1, another engine's field", UNSUPPORTED, "mirostat | vllm", lambda p: _chat(p, mirostat=2))
http("/v1, audio", UNSUPPORTED, "modalities | vllm", lambda p: _chat(p, modalities=["text", "audio"]))
http("/v1/embeddings without an input", INVALID, "input",
     lambda p: p.stand().post("/v1/embeddings", model=p.stand().model))  # fmt: skip
http("/v1/responses, previous_response_id", UNSUPPORTED, "previous_response_id",
     lambda p: p.stand().post("/v1/responses", model=p.stand().model, input="x", previous_response_id="r"))  # fmt: skip
http("/v1/messages without max_tokens", INVALID, "max_tokens | is required",
     lambda p: p.stand().post("/v1/messages", model=p.stand().model, messages=USER))  # fmt: skip

# The command line --------------------------------------------------------------------------------
command("--serve --port 99999", INVALID, "--port | 1 | 65535 | 99999", lambda p: ["--serve", "--port", "99999"])
command("--serve --port abc", INVALID, "--port | abc", lambda p: ["--serve", "--port", "abc"])
command("--serve --prt 8000", INVALID, "--prt | did you mean '--port'", lambda p: ["--serve", "--prt", "8000"])
command("--serve --port", INVALID, "--port", lambda p: ["--serve", "--port"])
command("--serv", INVALID, "--serv | did you mean '--serve'", lambda p: ["--serv"])
command("serve", INVALID, "serve | --serve", lambda p: ["serve"])
command("--serve --engine olama", INVALID, "--engine | olama | did you mean 'ollama'",
        lambda p: ["--serve", "--engine", "olama"])  # fmt: skip
command("--serve --workers 0", INVALID, "--workers | 1 | 256 | 0", lambda p: ["--serve", "--workers", "0"])
command("--serve --alias fast", INVALID, "--alias | name=engine/model", lambda p: ["--serve", "--alias", "fast"])
command(
    "--serve --cors-origin page", INVALID, "--cors-origin | https://", lambda p: ["--serve", "--cors-origin", "page"]
)
command("--serve --config nope.toml", INVALID, "nope.toml", lambda p: ["--serve", "--config", "nope.toml"])
command("--engine vllm --base-url ftp://x --check-config", INVALID, "--base-url | http",
        lambda p: ["--engine", "vllm", "--base-url", "ftp://x", "--check-config"])  # fmt: skip
command("--workers 2 without --serve", INVALID, "--workers | --serve", lambda p: ["--workers", "2"])
command("--serve --python /x, no engine", INVALID, "--python | engine", lambda p: ["--serve", "--python", "/x"])
command("--serve --api-test", INVALID, "--serve | --api-test", lambda p: ["--serve", "--api-test"])

# Files of settings -------------------------------------------------------------------------------
config("max_in_flight = 0", INVALID, "llm.toml | max_in_flight | line 1 | 1 | 100000")
config("max_inflight = 3", INVALID, "max_inflight | did you mean 'max_in_flight'")
config("queue = 'many'", INVALID, "queue | line 1 | integer")
config("a = 1\nb == 2", INVALID, "llm.toml | TOML | line 2")
config("[endpoint]\nengine = 'vllm'", INVALID, "endpoint | [[endpoint]]")
config("[[endpoint]]\nmodel = 'm'", INVALID, "endpoint[1].engine | required")
config("[[endpoint]]\nengine = 'vlm'", INVALID, "engine | vlm | did you mean 'vllm'")
config("[[endpoint]]\nengine = 'ollama'\napi_key_env = 'NONE'", INVALID, "api_key_env | NONE")
config("[[endpoint]]\nengine = 'vllm'\nstart = 'later'", INVALID, "start | at_start | on_request")
config("[[endpoint]]\nengine = 'vllm'\nslots = 0", INVALID, "slots | 1 | 10000 | 0")
config("[alias]\nbest = 'fast'\nfast = 'best'", INVALID, "alias | best -> fast -> best")
config("[alias]\nfast = 'vlm/x'", INVALID, "alias.fast | vlm | did you mean")


def _field(**schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def _forced(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def _image(url: str) -> Any:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def _locked(place: Place) -> LLMInferencer:
    engine = place.engine("vllm", model="locked")
    engine.api_key = "secret"
    return place.llm(base_url=engine.base_url)


def _plain_ollama(place: Place) -> str:
    engine = place.engine("ollama", model="plain")
    engine.capabilities = ["completion"]
    return engine.base_url


def _refusing(place: Place, status: int, words: str) -> LLMInferencer:
    """An engine that refuses the next generation in its own words."""
    engine = place.engine("vllm", model="refusing")
    error = {"error": {"message": words, "type": "BadRequestError", "code": status}}
    engine.script(
        Reply(status=status, headers={"content-type": "application/json"}, pieces=[json.dumps(error).encode()])
    )
    return place.llm(base_url=engine.base_url)


_TOO_LONG = "This model's maximum context length is 8192 tokens. However, your request has 9000 input tokens."


def _untyped() -> Callable[..., Any]:
    def work(callback: Callable[[int], int]) -> str:
        return str(callback(1))

    return work


def _chat(place: Place, **fields: Any) -> httpx.Response:
    stand = place.stand()
    return stand.post("/v1/chat/completions", **({"model": stand.model, "messages": USER} | fields))


def written() -> str:
    """The table, made anew."""
    lines = ["| where | what was done | error | message |", "|---|---|---|---|"]
    with Place() as place:
        for mistake in MISTAKES:
            try:
                said = mistake.make(place)
            except AssertionError:
                said = Said("none", "nothing: it is not noticed")
            cells = (mistake.surface, f"`{mistake.done}`", said.kind, place.plainly(said.message))
            lines.append(f"| {' | '.join(cell.replace('|', '¦').replace(chr(10), ' ⏎ ') for cell in cells)} |")
    return HEAD + "\n".join(lines) + "\n"


HEAD = """# Error messages

One row for each mistake in `tests/mistakes.py`. `python -m tests.mistakes` writes this table, and
`tests/test_mistakes.py` checks it. The part after the semicolon is the fix.

"""


if __name__ == "__main__":
    TABLE.write_text(written())
