"""Settings: declared once, read from flags, environment and file; every mistake is reported with its place."""

import contextlib
import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import pytest

import llm_inference as product
from llm_inference import MODES, OPTIONS, EndpointConfig, Settings, build_parser, load_settings, resolve_aliases

DESIGN = """\
max_in_flight = 512

[[endpoint]]
engine = "vllm"
base_url = "http://gpu1:8000"
api_key_env = "VLLM_API_KEY"
slots = 2

[[endpoint]]
engine = "vllm"
base_url = "http://gpu2:8000"

[[endpoint]]
name = "embedder"
engine = "llamacpp"
model = "/models/bge-m3.gguf"
launch_args = ["embedding=true", "pooling_type=1"]

[[endpoint]]
engine = "llamacpp"
model = "Qwen/Qwen3-8B-GGUF:Q4_K_M"
start = "on_request"
stop_after = 600
group = "gpu0"

[alias]
fast = "vllm/Qwen/Qwen3-8B"
best = ["vllm/Qwen/Qwen3-32B", "fast"]
"""
ENV = {"VLLM_API_KEY": "secret-1"}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(text: str, mode: str = "serve", env: dict[str, str] | None = None, **flags: Any) -> Settings:
        Path("llm.toml").write_text(text)
        return load_settings({"config": "llm.toml", **flags}, mode, ENV if env is None else env)

    return write


def flags_of(*argv: str) -> dict[str, Any]:
    return vars(build_parser().parse_args(argv))


def test_the_file_of_the_design(written: Any) -> None:
    settings = written(DESIGN)
    assert settings.max_in_flight == 512 and settings.config == "llm.toml"
    assert [each.name for each in settings.endpoints] == ["vllm", "vllm-2", "embedder", "llamacpp"]
    first, _, embedder, big = settings.endpoints
    assert (first.slots, first.base_url, first.key(ENV)) == (2, "http://gpu1:8000", "secret-1")
    assert embedder.launch_args == ("embedding=true", "pooling_type=1") and embedder.start == "at_start"
    assert (big.start, big.stop_after, big.group) == ("on_request", 600, "gpu0")
    assert settings.aliases == {
        "fast": ("vllm/Qwen/Qwen3-8B",),
        "best": ("vllm/Qwen/Qwen3-32B", "vllm/Qwen/Qwen3-8B"),
    }
    assert dataclasses.replace(settings) == settings
    assert "secret" not in repr(settings)


TWO = '[[endpoint]]\nengine = "vllm"\nbase_url = "http://a:1"\n\n[[endpoint]]\nengine = "llamacpp"\n'
MISTAKES = [
    ("max_in_flight = 0", "llm.toml: max_in_flight (line 1): must be an integer from 1 to 100000, got 0"),
    ("\nqueue = true", "llm.toml: queue (line 2): must be an integer from 0 to 1000000, got True"),
    ("max_inflight = 3", "llm.toml: max_inflight (line 1): no such key; did you mean 'max_in_flight'?"),
    ("config = 'x'", "llm.toml: config (line 1): no such key"),
    ("replicas = '2'", "llm.toml: replicas (line 1): has no effect on --serve; use it with --serve --ray"),
    ("timeout = 'soon'", "llm.toml: timeout (line 1): must be a number from 0.1 to 1000000, got 'soon'"),
    ("cors_origin = ['https://a', 'b']", "llm.toml: cors_origin (line 1): must be an origin"),
    ("host = 'http://x'", "llm.toml: host (line 1): must be an address or host name without http:// and port"),
    ("host = 'x:8000'", "llm.toml: host (line 1): must be an address or host name without http:// and port"),
    ("api_key = 12345", "llm.toml: api_key (line 1): must be one or more keys; "),
    ("engine = 'olama'", "llm.toml: engine (line 1): no such engine: 'olama'; did you mean 'ollama'?"),
    ("launch_args = ['--x']", "llm.toml: launch_args (line 1): given without an engine"),
    (
        "api_key = 'a'\nno_auth = true",
        "llm.toml: no_auth (line 2): cannot be combined with api_key; leave one of them out",
    ),
    ("no_auth = 'maybe'", "llm.toml: no_auth (line 1): must be true or false, got 'maybe'"),
    ("a = 1\nb == 2", "llm.toml: not valid TOML: Invalid value (at line 2, column 4)"),
    ("[endpoint]\nengine = 'vllm'", "llm.toml: endpoint (line 1): must be an array of tables; write [[endpoint]]"),
    (TWO + "slots = 0", "llm.toml: endpoint[2].slots (line 7): must be an integer from 1 to 10000, got 0"),
    (TWO + "slot = 2", "llm.toml: endpoint[2].slot (line 7): no such key; did you mean 'slots'?"),
    (TWO + "api_key = 7", "llm.toml: endpoint[2].api_key (line 7): must be a string that is not empty; "),
    (TWO + "api_key_env = 'NONE'", "llm.toml: endpoint[2].api_key_env (line 7): the environment variable NONE is not"),
    (TWO + "start = 'onrequest'", "llm.toml: endpoint[2].start (line 7): must be at_start or on_request"),
    ("[[endpoint]]\nengine = 'vllm'", "llm.toml: endpoint[1].model (line 1): is required to start it; name it"),
    (
        "[[endpoint]]\nengine = 'ollama'\nstart = 'on_request'",
        "llm.toml: endpoint[1].models (line 1): its models are unknown until it runs; list the models",
    ),
    (
        TWO + "stop_after = 60",
        "endpoint[2].stop_after (line 7): what is stopped must be started again by a request; add",
    ),
    (TWO + "group = 'g'", "endpoint[2].group (line 7): what is stopped must be started again by a request; add"),
    (TWO + "name = 'vllm'", "llm.toml: endpoint[2].name (line 7): 'vllm' is another endpoint's name too"),
    (TWO + "name = 'a b'", "llm.toml: endpoint[2].name (line 7): must be letters, digits, dots and dashes"),
    (TWO + "launch_env = { A = 1 }", "llm.toml: endpoint[2].launch_env (line 7): must be a table of strings"),
    (TWO + "base_url = 'ftp://x'", "llm.toml: endpoint[2].base_url (line 7): not an http(s) URL"),
    (TWO + "base_url = 'unix:run/a.sock'", "endpoint[2].base_url (line 7): not an http(s) URL; for example"),
    (TWO + f"base_url = 'unix:/{'a' * 107}'", "endpoint[2].base_url (line 7): the socket's path is over 107 bytes"),
    (TWO + "base_url = 'x:1'\nstart = 'on_request'", "endpoint[2].start (line 8): this endpoint has a base_url"),
    (TWO + "base_url = 'x:1'\nlaunch_args = ['a']", "endpoint[2].launch_args (line 8): this endpoint has a base_url"),
    (TWO + "[[endpoint]]\nmodel = 'm'", "llm.toml: endpoint[3].engine (line 7): is required; one of ollama, vllm"),
    (TWO + "[[endpoint]]\nengine = 'vlm'", "endpoint[3].engine (line 8): no such engine: 'vlm'; did you mean 'vllm'?"),
    ("base_url = 'http://x'\n" + TWO, "llm.toml: base_url (line 1): cannot be combined with [[endpoint]] tables"),
    ("[alias]\nfast = 'vlm/x'", "llm.toml: alias.fast (line 2): no such engine or endpoint: 'vlm/x'; did you"),
    (
        "[alias]\nfast = 'vllm/x'\nbest = 'fst'",
        "llm.toml: alias.best (line 3): not name=engine/model, nor another alias",
    ),
    ("[alias]\nbest = 'fast'\nfast = 'best'", "alias.best (line 2): is circular (best -> fast -> best)"),
    ("[alias]\nbest = []", "llm.toml: alias (line 1): must be name=engine/model"),
    ("[alias]\nbest = 3", "llm.toml: alias (line 1): must be name=engine/model"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES)
def test_a_mistake_in_the_file_is_reported_with_its_place(written: Any, text: str, says: str) -> None:
    with pytest.raises(product.InvalidRequest) as caught:
        written(text)
    assert says in caught.value.message and "12345" not in caught.value.message


def test_a_file_that_cannot_be_read() -> None:
    for path in ("/nope/llm.toml", "/"):
        with pytest.raises(product.InvalidRequest, match="cannot be read"):
            load_settings({"config": path}, "serve", {})


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "llm.toml"
    path.write_bytes(b"host = '\xff'")
    with pytest.raises(product.InvalidRequest, match="not valid TOML"):
        load_settings({"config": str(path)}, "serve", {})
    path.write_bytes(b"\xef\xbb\xbfport = 9")
    assert load_settings({"config": str(path)}, "serve", {}).port == 9


def test_flags_over_environment_over_file(written: Any) -> None:
    text = "port = 1\nqueue = 1\nworkers = 1\n[alias]\na = 'vllm/file'\nb = 'vllm/file'"
    env = {"LLM_INFERENCE_PORT": "2", "LLM_INFERENCE_QUEUE": "2", "LLM_INFERENCE_ENGINE": ""}
    settings = written(text, env=env, **flags_of("--port", "3", "--alias", "b=vllm/x", "--alias", "b=a"))
    assert (settings.port, settings.queue, settings.workers, settings.engine) == (3, 2, 1, "auto")
    assert settings.aliases == {"a": ("vllm/file",), "b": ("vllm/x", "vllm/file")}


def test_every_flag_is_a_variable_and_a_key() -> None:
    env = {
        "LLM_INFERENCE_API_KEY": "a, b",
        "LLM_INFERENCE_TIMEOUT": "7.5",
        "LLM_INFERENCE_CORS_ORIGIN": "https://a,https://b",
        "LLM_INFERENCE_ALIAS": "x=vllm/m,y=x",
        "LLM_INFERENCE_HOST": "::1",
    }
    settings = load_settings({}, "serve", env)
    assert settings.api_keys == ("a", "b") and settings.cors_origins == ("https://a", "https://b")
    assert load_settings({}, "serve", {"LLM_INFERENCE_NO_AUTH": "yes"}).no_auth
    assert settings.deadlines == product.Deadlines(total=7.5, first_token=7.5, idle=7.5)
    assert settings.aliases == {"x": ("vllm/m",), "y": ("vllm/m",)} and settings.host == "::1"
    with pytest.raises(product.InvalidRequest, match="LLM_INFERENCE_PORT: must be an integer from 1 to 65535, got 'x'"):
        load_settings({}, "serve", {"LLM_INFERENCE_PORT": "x"})
    empty = dict.fromkeys(("LLM_INFERENCE_ENGINE", "LLM_INFERENCE_MODEL", "LLM_INFERENCE_API_KEY"), "")
    unset = load_settings({}, "serve", empty)
    assert (unset.engine, unset.model, unset.api_keys) == ("auto", None, ())
    assert load_settings({}, "self-test", {"LLM_INFERENCE_PORT": "x"}).port == 8000
    assert load_settings({}, "serve", {"LLM_INFERENCE_PORT": "tcp://10.0.0.1:80"}).port == 8000  # Kubernetes


def test_the_defaults_are_todays() -> None:
    settings = load_settings({}, "serve", {})
    assert (settings.host, settings.port, settings.engine, settings.model) == ("0.0.0.0", 8000, "auto", None)
    assert (settings.max_in_flight, settings.queue, settings.max_tokens_cap, settings.workers) == (256, 256, 8192, 1)
    assert settings.deadlines == product.Deadlines() and settings.replicas == "1" and not settings.no_auth
    assert len(settings.made_key) >= 32 and settings.made_key != Settings().made_key


@pytest.mark.parametrize(
    ("argv", "mode", "says"),
    [
        (["--workers", "3"], "self-test", "--workers has no effect on the self-test; use it with --serve"),
        (["--port", "8000"], "self-test", "use it with --serve or --serve --ray or --api-test"),
        (["--timeout", "5"], "api-test", "--timeout has no effect on --api-test"),
        (["--json"], "serve", "use it with the self-test"),
        (["--workers", "2"], "ray", "--workers has no effect on --serve --ray"),
        (["--config", "x"], "api-test", "--config has no effect on --api-test"),
        (["--replicas", "2"], "serve", "--serve --ray"),
        (["--port", "0"], "serve", "--port: must be an integer from 1 to 65535, got '0'"),
        (["--port", "1.5"], "serve", "--port"),
        (["--timeout", "nan"], "serve", "--timeout: must be a number from 0.1"),
        (["--timeout", "-1"], "serve", "--timeout"),
        (["--api-key", ","], "serve", "--api-key: must be one or more keys"),
        (["--api-key", ""], "serve", "--api-key"),
        (["--alias", "x"], "serve", "--alias: must be name=engine/model"),
        (["--alias", "my model=vllm/m"], "serve", "--alias"),
        (["--alias", "=vllm/m"], "serve", "--alias"),
        (["--alias", "x="], "serve", "--alias"),
        (["--alias", "x=foo/bar"], "serve", "--alias x: no such engine"),
        (["--alias", "x=foo"], "serve", "--alias x: not name=engine/model"),
        (["--cors-origin", "https://a/b"], "serve", "--cors-origin"),
        (["--replicas", "2-"], "ray", "--replicas: must be a number or a range"),
        (["--model", ""], "serve", "--model"),
        (["--python", "/x"], "serve", "--python: given without an engine"),
        (["--engine", "olama"], "self-test", "did you mean 'ollama'"),
    ],
)
def test_a_flag_that_is_wrong_is_refused_by_name(argv: list[str], mode: str, says: str) -> None:
    with pytest.raises(product.InvalidRequest) as caught:
        load_settings(flags_of(*argv), mode, {})
    assert says in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"max_in_flight": 0},
        {"max_in_flight": True},
        {"port": 70_000},
        {"engine": "olama"},
        {"cors_origins": ("x",)},
        {"cors_origins": 5},
        {"api_keys": [1]},
        {"api_keys": ""},
        {"aliases": {"a": "b"}},
        {"aliases": 5},
        {"deadlines": 0},
        {"header_timeout": 0},
        {"launch_args": "--x"},
        {"header_timeout": float("nan")},
        {"keep_alive": 0},
        {"no_auth": 5},
    ],
)
def test_direct_construction_checks_too(fields: dict[str, Any]) -> None:
    with contextlib.suppress(StopIteration):
        (name,) = fields
    if name == "api_keys" and fields[name] == "":
        assert Settings(**fields).api_keys == ()
        return
    with pytest.raises(product.InvalidRequest) as caught:
        Settings(**fields)
    assert (caught.value.param or "").partition(".")[0] == name and caught.value.reason.startswith(name)


def test_what_python_callers_give() -> None:
    settings = Settings(
        api_keys=["a"],
        aliases={"x": "vllm/m"},
        deadlines=product.Deadlines(idle=0.2),
        engine="vllm",
        launch_args=["--x, y"],
        endpoints=[],
    )
    assert settings.api_keys == ("a",) and settings.aliases == {"x": ("vllm/m",)} and settings.deadlines.idle == 0.2
    assert settings.launch_args == ("--x, y",) and settings.endpoints == ()
    two = (EndpointConfig(engine="ollama"), EndpointConfig(engine="ollama"))
    assert Settings(endpoints=two).endpoints[1].name == "ollama-2"
    for wrong in (
        {"engine": "vllm", "slots": 0},
        {},
        {"engine": "x"},
        {"engine": "vllm", "api_key": "a", "api_key_env": "B"},
    ):
        with pytest.raises(product.InvalidRequest):
            EndpointConfig(**wrong)


def test_aliases_are_resolved_in_order_and_fast() -> None:
    assert resolve_aliases({"a": ("b", "vllm/x"), "b": ("vllm/y", "vllm/x")}, {"vllm"})["a"] == ("vllm/y", "vllm/x")
    with pytest.raises(product.InvalidRequest, match=r"circular \(a -> a\)"):
        resolve_aliases({"a": ("a",)}, {"vllm"})
    ladder = {f"a{n}": (f"a{n + 1}", f"a{n + 1}") for n in range(30)} | {"a30": ("vllm/m",)}
    assert resolve_aliases(ladder, {"vllm"})["a0"] == ("vllm/m",)
    chain = {f"a{n}": (f"a{n + 1}",) for n in range(5000)} | {"a5000": ("vllm/m",)}
    assert resolve_aliases(chain, {"vllm"})["a0"] == ("vllm/m",)


def test_a_thousand_endpoints_and_ten_thousand_aliases_cost_less_than_a_second(written: Any) -> None:
    endpoints = "".join(f'[[endpoint]]\nengine = "vllm"\nbase_url = "http://gpu{n}:8000"\n' for n in range(1000))
    aliases = "[alias]\n" + "".join(f'a{n} = ["vllm/m{n}", "a{n % 7}"]\n' for n in range(7, 10_000))
    aliases += "".join(f'a{n} = "vllm/m"\n' for n in range(7))
    gc.collect()
    gc.freeze()  # or the collector looks at what thousands of tests have left, again and again
    try:
        began = time.thread_time()  # other tests' threads may be at work
        settings = written(endpoints + aliases)
        spent = time.thread_time() - began
    finally:
        gc.unfreeze()
    assert len(settings.endpoints) == 1000 and len(settings.aliases) == 10_000
    assert spent < 1


def test_help_has_every_flag_in_its_group() -> None:
    text = build_parser("llm-inference").format_help()
    assert text.startswith("usage: llm-inference")
    for group in ("modes:", "server:", "engine:", "access:", "limits:", "started engines:", "output:"):
        assert f"\n{group}\n" in text
    for key in OPTIONS:
        assert key == "launch_args" or f"--{key.replace('_', '-')}" in text
    assert set(MODES) >= {mode for field in OPTIONS.values() for mode in field.metadata["option"].modes}
