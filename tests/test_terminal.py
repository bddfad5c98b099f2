"""The command in a terminal of 80 and of 120 columns: no line is wider, and it names itself as it was called."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import llm_inference as product
from tests.fake_engine import Dialect, FakeEngine
from tests.harness import Stand, clean_env
from tests.processes import ROOT, free_port
from tests.test_readme import blocks

LAUNCHER = """\
import importlib.util, sys
sys.path.insert(0, {root!r})
sys.dont_write_bytecode = True
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {hidden!r} else find(name, *more)
from llm_inference import main
sys.exit(main())
"""
WIDTHS = pytest.mark.parametrize("width", [80, 120])
RICH = pytest.mark.parametrize("hidden", [(), ("rich",)], ids=["rich", "plain"])


class Terminal:
    """The installed command in a pseudo-terminal, ended by its pid."""

    def __init__(self, folder: Path, width: int, *args: str, hidden: tuple[str, ...] = (), **env: str) -> None:
        script = folder / "llm-inference"
        script.write_text(LAUNCHER.format(root=str(ROOT), hidden=hidden))
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        known = {name: value for name, value in clean_env(**env).items() if name not in ("COLUMNS", "LINES")}
        argv = [sys.executable, str(script), *args]
        self.process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=known, cwd=folder)
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        os.close(self.ours)

    def pieces(self) -> Iterator[str]:
        try:
            while data := os.read(self.ours, 65536):
                yield data.decode(errors="replace")
        except OSError:  # EIO is a terminal's end
            return

    def lines(self, last: str = "") -> list[str]:
        """What is shown at the end, or once a line with `last` is there; a line that is drawn again counts once."""
        said = ""
        for piece in self.pieces():
            said += piece
            if last and last in said:
                break
        plain = re.sub(r"\x1b\[[\d;]*[mK]", "", said).replace("\r\n", "\n")
        return [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]


def too_wide(lines: list[str], width: int) -> list[str]:
    """A command to copy may be wider: a fold would break it."""
    return [line for line in lines if len(line) > width and "--serve --engine llamacpp --model" not in line]


@WIDTHS
def test_help(width: int, tmp_path: Path) -> None:
    with Terminal(tmp_path, width, "--help") as terminal:
        lines = terminal.lines()
    assert lines[0].startswith("usage: llm-inference ")
    assert too_wide(lines, width) == []


@WIDTHS
@RICH
def test_the_self_test(width: int, hidden: tuple[str, ...], tmp_path: Path) -> None:
    with ExitStack() as stack:
        dialects: dict[str, Dialect] = {
            "OLLAMA_HOST": "ollama",
            "VLLM_BASE_URL": "vllm",
            "LLAMACPP_BASE_URL": "llamacpp",
        }
        env = {name: stack.enter_context(FakeEngine(dialect)).base_url for name, dialect in dialects.items()}
        env["SGLANG_BASE_URL"] = f"http://127.0.0.1:{free_port()}"
        with Terminal(tmp_path, width, hidden=hidden, **env) as terminal:
            lines = terminal.lines()
    assert "3 of 4 answered." in lines and "Next: llm-inference --serve" in lines
    assert too_wide(lines, width) == []
    bars = [line.count("█") for line in lines if " ok" in line]
    assert len(bars) == 3
    if width == 120:  # the fastest has the longest, and no bar stands on a line of its own
        assert max(bars) >= 12 and min(bars) >= 1


@WIDTHS
@RICH
def test_check_config(width: int, hidden: tuple[str, ...], tmp_path: Path) -> None:
    (text,) = blocks("zh", "toml")
    (tmp_path / "llm.toml").write_text(text)
    argv = ("--check-config", "--config", "llm.toml")
    with Terminal(tmp_path, width, *argv, hidden=hidden, VLLM_API_KEY="secret") as terminal:
        lines = terminal.lines()
    assert "llm.toml is valid." in lines and too_wide(lines, width) == []
    rows = [
        line for line in lines if re.search(r"\b(vllm|embedder|llamacpp)\b.*\b(attached|at start|on request)", line)
    ]
    assert len(rows) == 4, lines


@WIDTHS
@pytest.mark.parametrize("engine", ["auto", "llamacpp"])
def test_the_banner(width: int, engine: str, tmp_path: Path) -> None:
    argv = ("--serve", "--engine", engine, "--port", str(free_port()))
    with Terminal(tmp_path, width, *argv) as terminal:
        lines = terminal.lines(last="reverse proxy")
    assert lines[0].startswith("llm_inference ") and too_wide(lines, width) == []
    for word in ("API key", "OpenAI", "Swagger UI", "Chat page", "llm-inference --serve --engine llamacpp --model"):
        assert any(word in line for line in lines), word


@WIDTHS
@RICH
def test_api_test(width: int, hidden: tuple[str, ...], tmp_path: Path) -> None:
    """Good cases and expected refusals stand in tables of their own."""
    with Stand("vllm") as stand, Terminal(tmp_path, width, "--api-test", "--base-url", stand.url, hidden=hidden) as it:
        stand.engine.answer = lambda ask: '{"city":"Paris","country":"France"}'
        lines = it.lines()
    assert too_wide(lines, width) == [] and any(" 0 failed, " in line for line in lines), lines
    title = next(number for number, line in enumerate(lines) if "must be refused" in line)
    statuses = [set(re.findall(r" ([2-5]\d\d) ", "\n".join(part))) for part in (lines[:title], lines[title:])]
    assert "200" in statuses[0] and "401" not in statuses[0] and {"400", "404", "405"} <= statuses[1]


def test_api_test_asks_every_documented_route() -> None:
    with Stand("vllm") as stand:
        paths = httpx.get(stand.url + "/openapi.json", trust_env=False).json()["paths"]
    documented = {f"{method.upper()} {path}" for path, each in paths.items() for method in each}
    asked = {case.request.replace("MODEL", "{name}") for case in product.CASES if isinstance(case.right, str)}
    assert {re.sub(r"\{\w+(:path)?\}", "{name}", route) for route in documented} - asked == set()


@pytest.mark.parametrize(
    ("done", "total", "figures"),
    [(0, 88 << 20, "0/88 MiB"), (44 << 20, 88 << 20, "44/88 MiB"), (146 << 20, 88 << 20, "88/88 MiB"), (3, 44, "3/44")],
)
def test_progress_never_passes_its_end(done: int, total: int, figures: str) -> None:
    shown, _, said = product.bar(done, total).partition(" ")
    assert said == figures and len(shown) == 24


def test_log_lines_name_the_endpoint_and_the_kind(tmp_path: Path) -> None:
    """Of an engine that cannot start, and of one that fails a request."""
    argv = ("--serve", "--engine", "llamacpp", "--model", "none.gguf", "--port", str(free_port()))
    with Terminal(tmp_path, 200, *argv) as terminal:
        lines = terminal.lines(last="not ready")
    said = [line for line in lines if "there is no file none.gguf" in line]
    assert said and all("model_not_found" in line for line in said), lines
    assert any("llamacpp" in line.partition("llm_inference ")[2] for line in said)


@WIDTHS
@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--engine", "olama"], "invalid_request: "),
        (["--prot", "1"], "invalid_request: "),
        (["--workers", "3"], "invalid_request: "),
        (["--check-config", "--config", "none.toml"], "invalid_request: "),
        (["--api-test", "--port", "1"], "no server answers at http://127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(width: int, argv: list[str], kind: str, tmp_path: Path) -> None:
    with Terminal(tmp_path, width, *argv) as terminal:
        lines = terminal.lines()
        status = terminal.process.wait(20)
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith(kind) and "; " in lines[0], lines


def test_the_page_names_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llm-inference"])
    with Stand("vllm") as stand:
        page = httpx.get(stand.url + "/ui", trust_env=False).text
    assert f"<code>llm-inference --serve {product.REAL_MODEL}</code>" in page


def test_the_page_shows_the_banners_command() -> None:
    assert f"<code>python llm_inference.py --serve {product.REAL_MODEL}</code>" in product.CHAT_PAGE


def test_the_models_name_is_not_folded_where_there_is_room(tmp_path: Path) -> None:
    """Without borders, cells of 72 columns and five gaps fit into 80."""
    with Terminal(tmp_path, 80, "--engine", "llamacpp") as terminal:
        lines = terminal.lines()
    assert any(product.DEFAULT_MODEL in line and "ok" in line for line in lines), lines
