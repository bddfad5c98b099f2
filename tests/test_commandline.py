"""The command line: tables that fit the terminal, bars, first steps, and mistakes that are refused by name."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_inference as product
from tests.processes import ROOT

ROWS = [
    ("llamacpp", "started by us", "SmolLM2-135M-Instruct.Q4_1", "0.35 s", "58", "ok"),
    ("vllm", "VLLM_BASE_URL", "a-very-long-model-name/" * 6, "-", "-", "failed: " + "why " * 40),
]
COLUMNS = ("engine", "found", "model", "first token", "tokens/s", "answer")


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_folds_instead_of_cutting(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    product.table("title", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    given = ["title", *COLUMNS, *ROWS[0], *ROWS[1]]
    assert sorted("".join(lines).replace(" ", "")) == sorted("".join(given).replace(" ", ""))


def test_bars_compare_on_a_wide_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product.with_bars([1.0, None, 2.0], "{:.0f}") == ["1", "-", "2"]
    monkeypatch.setattr(product.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert product.with_bars([5.0, None, 10.0], "{:.0f}") == [" 5 ██████", "-", "10 ████████████"]
    assert product.with_bars([5.0, None], "{:.0f}") == ["5", "-"]
    monkeypatch.setenv("COLUMNS", "80")
    assert product.with_bars([5.0, 10.0], "{:.0f}") == ["5", "10"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/usr/bin/llm-inference", "llm-inference --serve"),
        ("llm_inference.py", "python llm_inference.py --serve"),
        ("/x/pytest", "python llm_inference.py --serve"),
    ],
)
def test_commands_are_shown_with_the_name_it_was_called_by(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product.sys, "argv", [name])
    assert product.command("--serve") == says


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, True),
        ({"engine": "llamacpp"}, True),
        ({"engine": "vllm"}, False),
        ({"engine": "llamacpp", "model": "x.gguf"}, False),
        ({"endpoints": (product.EndpointConfig(engine="llamacpp", model="m.gguf"),)}, False),
    ],
)
def test_the_banner_names_the_demo_model(
    fields: dict[str, object], shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLAMACPP_MODEL", "LLAMACPP_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    product.banner(product.Settings(**fields))
    assert ("Qwen/Qwen3-0.6B-GGUF:Q8_0" in capsys.readouterr().out) is shown


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        ([], "self-test"),
        (["--serve"], "serve"),
        (["--serve", "--ray"], "ray"),
        (["--api-test"], "api-test"),
        (["--check-config"], "serve"),
    ],
)
def test_the_mode(argv: list[str], mode: str) -> None:
    assert product.parse_arguments(argv)[0] == mode


def test_the_engines_own_arguments_stand_behind_two_dashes() -> None:
    _, values = product.parse_arguments(["--serve", "--engine", "vllm", "--", "--tensor-parallel-size", "2", "--"])
    assert values["launch_args"] == ["--tensor-parallel-size", "2", "--"] and values["engine"] == "vllm"
    for argv in (["stray", "--", "x"], ["--ray"], ["--work", "2"]):
        with pytest.raises(product.InvalidRequest):
            product.parse_arguments(argv)


def test_check_config(tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    text = '[[endpoint]]\nengine = "vllm"\nbase_url = "http://gpu1:8000"\nslots = 2\n[alias]\nfast = "vllm/m"\n'
    with open("llm.toml", "w") as file:
        file.write(text)
    assert product.main(["--check-config", "--config", "llm.toml"]) == 0
    said = capsys.readouterr().out
    assert "http://gpu1:8000" in said and "attached" in said and "alias fast = vllm/m" in said
    with open("llm.toml", "w") as file:
        file.write(text.replace("2", "0"))
    assert product.main(["--check-config", "--config", "llm.toml"]) == 2
    assert "llm.toml: endpoint[1].slots (line 4)" in capsys.readouterr().err


def check_config(folder: Path, **options: Any) -> "subprocess.Popen[str]":
    (folder / "llm.toml").write_text('[alias]\n"快" = "vllm/m"\n' + '"alias-%d" = "vllm/m"\n' * 2 % (1, 2))
    command = [sys.executable, str(ROOT / "llm_inference.py"), "--check-config", "--config", "llm.toml"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, **options)


def test_a_terminal_without_unicode_shows_question_marks(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    with check_config(tmp_path, stdout=subprocess.PIPE, env=env) as process:
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "alias ? = vllm/m" in said, errors


def test_a_reader_that_leaves_is_no_error_of_ours(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with check_config(tmp_path, stdout=writing) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and not errors


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--workers", "3"], "--workers has no effect on the self-test; use it with --serve"),
        (["--no-auth"], "use it with --serve"),
        (["--python", "/x"], "--python has no effect on the self-test; use it with --serve"),
        (["--api-key", "x"], "--api-key"),
        (["--host", "::1"], "--host"),
        (["--api-test", "--timeout", "5"], "--timeout has no effect on --api-test"),
        (["--api-test", "--verbose"], "--verbose"),
        (["--api-test", "--engine-api-key", "x"], "--engine-api-key"),
        (["--serve", "--json"], "use it with the self-test"),
        (["--", "--x"], "'--x' has no effect on the self-test; use it with --serve"),
        (["--serve", "--ray", "--workers", "2"], "--workers has no effect on --serve --ray"),
        (["--serve", "--timeout", "nan"], "--timeout"),
        (["--serve", "--cors-origin", "foo"], "--cors-origin"),
        (["--serve", "--api-key", ","], "--api-key"),
        (["--serve", "--alias", "x=foo"], "not name=engine/model"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert product.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("invalid_request: ") and "Traceback" not in error
