"""README: its commands and code run, its two languages agree, its tables are the module's, its links lead somewhere.

`python -m tests.test_readme` writes the table of fields into tests/conformance/README.md.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm_inference as product
from tests.conformance.table import fields_markdown
from tests.fake_engine import FakeEngine
from tests.harness import Command, Stand, clean_env, run_command
from tests.integration.npm import MODULES, environment, needed
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("alone")

README = (ROOT / "README.md").read_text()
ZH, _, EN = README.partition("\n# English")
HALVES = {"zh": ZH, "en": EN}
FIELDS = ROOT / "tests" / "conformance" / "README.md"
READMES = [ROOT / "README.md", *sorted((ROOT / "tests").glob("**/README.md"))]
PORT = "8000"  #: the server's default, in README and in its banner


def blocks(half: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", HALVES[half], re.MULTILINE | re.DOTALL)


def without_comments(block: str) -> str:
    return re.sub(r"\s+# .*", "", block)


def prose(text: str) -> str:
    """The text without code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(half: str) -> list[str]:
    """The commands of the bash blocks, continued lines together."""
    lines = "\n".join(blocks(half, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    with Command("--engine", "llamacpp") as server:
        yield str(server.port)


def with_port(text: str, port: str) -> str:
    """README's text for another port than the default."""
    changed = text.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{port}")
    assert changed != text
    return changed


# ------------------------------------------------------------------------------------------------ its two languages


@pytest.mark.parametrize("half", HALVES)
def test_each_language_is_short(half: str) -> None:
    assert len(HALVES[half].strip().splitlines()) <= 300
    assert len(HALVES[half].encode()) <= 16 * 1024


@pytest.mark.parametrize("language", ["bash", "python", "json", "toml", "ini", "dockerfile", "yaml", "text"])
def test_both_languages_show_the_same_blocks(language: str) -> None:
    zh, en = ([without_comments(block) for block in blocks(half, language)] for half in HALVES)
    assert zh and zh == en


def test_both_languages_have_the_same_sections_tables_and_links() -> None:
    for mark in (r"^(#{2,3}) ", r"^(\||- )", r"\]\(([\w./#-]*/[\w./#-]*)\)"):
        zh, en = (re.findall(mark, half, re.MULTILINE) for half in HALVES.values())
        assert zh and zh == en, mark


def test_chinese_prose_has_full_width_punctuation() -> None:
    assert not re.findall(r".{0,9}(?:[\u4e00-\u9fff][,;:?!()]|[,;:?!()][\u4e00-\u9fff]).{0,9}", prose(ZH))


# ------------------------------------------------------------------------------------------------ its commands


def test_the_self_test_prints_what_is_shown() -> None:
    """Line for line, but for measured figures and versions."""
    done = run_command()
    assert done.returncode == 0, done.stderr
    printed = [re.sub(r"[\d.]+ *", "0 ", line).rstrip() for line in done.stdout.splitlines()]
    (shown,) = [block for block in blocks("zh", "text") if "self-test" in block]
    for line in shown.splitlines():
        if line != "…":
            assert re.sub(r"[\d.]+ *", "0 ", line).rstrip() in printed, done.stdout


@pytest.mark.skipif(os.environ.get("LLM_TEST_MINIMAL") != "1", reason="installs everything: set LLM_TEST_MINIMAL=1")
def test_the_first_command_runs_in_an_empty_environment(tmp_path: Path) -> None:
    for name in ("llm_inference.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=tmp_path, check=True)
    first = commands("zh")[0]
    env = clean_env(PATH=f"{tmp_path}/.venv/bin:{os.environ['PATH']}", XDG_CACHE_HOME=f"{tmp_path}/cache")
    done = subprocess.run(first, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "Beijing" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("half", HALVES)
def test_every_curl_is_answered(half: str, port: str) -> None:
    asked = [command for command in commands(half) if command.startswith("curl ")]
    assert len(asked) == 3
    for command in asked:
        done = subprocess.run(with_port(command, port), shell=True, capture_output=True, text=True, timeout=120)
        if '"stream"' in command:
            assert done.stdout.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(done.stdout)["code"] == 200, (command, done.stdout)


def test_the_first_answer_is_the_one_that_is_shown(port: str) -> None:
    first = next(command for command in commands("zh") if command.startswith("curl "))
    answer = subprocess.run(with_port(first, port), shell=True, capture_output=True, text=True, timeout=120).stdout
    (block,) = blocks("zh", "json")
    shown, real = json.loads(block), json.loads(answer)
    assert list(shown) == list(real) and list(shown["data"]) == list(real["data"])
    for name in ("text", "finish_reason", "engine_type", "model_name"):
        assert shown["data"][name] == real["data"][name]


@pytest.mark.parametrize("half", HALVES)
def test_the_command_line_takes_every_command(half: str) -> None:
    """Up to its settings; nothing is started."""
    started = re.findall(r"python llm_inference\.py[^&`\n#]*", HALVES[half])
    assert len(started) >= 5
    for command in started:
        arguments = shlex.split(command)[2:]
        mode, values = product.parse_arguments(arguments)
        product.load_settings(values, mode, {})


@needed
@pytest.mark.parametrize("name", ["claude -p Hi.", "codex exec --skip-git-repo-check Hi."])
def test_the_agents_are_answered(name: str, tmp_path: Path) -> None:
    """As typed, but without a terminal; their prompts are why README names a context length."""
    client = name.partition(" ")[0]
    (typed,) = [command for command in commands("zh") if f" {client} " in command]
    env = environment(tmp_path, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1")
    env["PATH"] = f"{MODULES / '.bin'}:{env['PATH']}"
    with Stand("vllm") as stand:
        command = with_port(typed.replace("ENGINE/MODEL", stand.model), stand.url.rpartition(":")[2])
        command = command.replace(f" {client} ", f" {name} ")
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and stand.engine.text in done.stdout, done.stderr
        assert 8_192 < len(json.dumps(stand.engine.body)) / 4 < 32_768


def test_the_banner_names_the_same_port() -> None:
    assert product.Settings().port == int(PORT)
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", ZH)) == {PORT, "11434", "30000", "8080"}


# ------------------------------------------------------------------------------------------------ its code and files


@pytest.mark.parametrize("half", HALVES)
def test_the_python_runs(half: str, port: str) -> None:
    """One block after the other in one process, as a reader would paste them into a notebook."""
    found = blocks(half, "python")
    assert len(found) == 3
    code = with_port("\n".join(found), port)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, env=clean_env()
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("hi"), done.stderr
    assert done.stdout.count("The capital of China is Beijing") >= 1, done.stdout
    assert "{'姓名': '小明', '年龄': 12}" in done.stdout and "name='Anna' age=34" in done.stdout


@pytest.mark.parametrize("half", HALVES)
def test_the_config_file_is_valid(half: str, tmp_path: Path) -> None:
    (text,) = blocks(half, "toml")
    file = tmp_path / "llm.toml"
    file.write_text(text)
    done = run_command("--check-config", "--config", str(file), VLLM_API_KEY="secret")
    assert done.returncode == 0, done.stderr
    for name in ("vllm-2", "embedder", "on request", "best = vllm/Qwen/Qwen3-32B, else vllm/Qwen/Qwen3-8B"):
        assert name in done.stdout


def test_the_config_file_serves_its_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the two addresses and the model's name there."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (text,) = blocks("zh", "toml")
    with FakeEngine("vllm") as one, FakeEngine("vllm") as two:
        text = text.replace("http://gpu1:8000", one.base_url).replace("http://gpu2:8000", two.base_url)
        file = tmp_path / "llm.toml"
        file.write_text(text.replace("Qwen/Qwen3-8B", one.model))
        llm = product.LLMInferencer.from_config(file)
        try:
            for alias in ("fast", "best"):
                assert llm.generate("hello", model_name=alias, max_tokens=8)
        finally:
            llm.close()
        assert len(one.bodies) + len(two.bodies) >= 2


def test_the_settings_are_all_in_the_table() -> None:
    for half in HALVES.values():
        table = re.search(r"^\| `--host`.*?\n\n", half, re.MULTILINE | re.DOTALL)
        assert table
        rows = {}
        for row in table[0].strip().splitlines():
            for flag in re.findall(r"`--([a-z-]+)", row.split("|")[1]):
                rows[flag] = row
        known = {key.replace("_", "-"): field for key, field in product.OPTIONS.items()}
        del known["launch-args"]  # behind --
        assert set(rows) == {*known, "ray"}
        for flag, field in known.items():
            if isinstance(field.default, int | str) and not isinstance(field.default, bool):
                assert str(field.default) in rows[flag], flag


def test_the_container_has_what_it_copies_and_its_commands_work(port: str) -> None:
    (text,) = blocks("zh", "dockerfile")
    copied = re.search(r"^COPY (.*) \./$", text, re.MULTILINE)
    healthy = re.search(r"^HEALTHCHECK CMD python (.*)$", text, re.MULTILINE)
    started = re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert copied and healthy and started
    assert all((ROOT / name).exists() for name in copied[1].split())
    subprocess.run([sys.executable, *shlex.split(with_port(healthy[1], port))], check=True, timeout=30)
    program, option, module, *flags = json.loads(started[1])
    assert (program, option, module) == ("python", "-m", "llm_inference")
    mode, values = product.parse_arguments(flags)
    assert mode == "serve" and not values


def test_the_compose_file_sets_variables_that_are_read() -> None:
    (text,) = blocks("zh", "yaml")
    names = re.findall(r"^ {6}([A-Z_]+): ", text, re.MULTILINE)
    settings = {f"LLM_INFERENCE_{key.upper()}" for key in product.OPTIONS}
    assert len(names) == 3 and set(names) <= settings | {"OLLAMA_HOST"}


def test_the_service_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("zh", "ini")
    started = re.search(r"^ExecStart=\S+ \S+ (.*)$", text, re.MULTILINE)
    assert started
    mode, values = product.parse_arguments(shlex.split(started[1]))
    assert mode == "serve" and not values
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "llm_inference.service"
        unit.write_text(re.sub(r"ExecStart=.*", "ExecStart=/bin/true", text))
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
        assert unit.name not in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------ what it refers to


def with_fields(text: str) -> str:
    """The text with the module's own table of fields in it."""
    begin, end = "<!-- fields -->\n", "<!-- /fields -->"
    head, _, rest = text.partition(begin)
    assert end in rest
    return head + begin + fields_markdown() + "\n" + end + rest.partition(end)[2]


def test_the_table_of_fields_is_the_modules() -> None:
    text = FIELDS.read_text()
    assert text == with_fields(text), "run python -m tests.test_readme"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_file_that_a_readme_names_is_there(readme: Path) -> None:
    text = readme.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (readme.parent / link).exists(), link
    for name in set(re.findall(r"(?<![\w./-])(?:tests|\.ci)/[\w./-]*[\w/]", text)):
        assert (ROOT / name).exists(), name
    for module in set(re.findall(r"python -m (tests(?:\.\w+)+)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_anchor_is_a_heading() -> None:
    for file, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", README):
        text = README
        if file:
            text = (ROOT / file).read_text()
        headings = [heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        assert anchor in headings, (file, anchor)


@pytest.mark.parametrize("half", HALVES)
def test_every_kind_of_error_in_the_table_exists(half: str) -> None:
    kinds = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", "".join(re.findall(r"^\|.*\| `.*$", HALVES[half], re.MULTILINE))))
    known = {cls.kind for cls in product.InferenceError.__subclasses__()}
    assert len(kinds & known) >= 9
    table = re.search(r"\| `kind` \|.*?\n\n", HALVES[half], re.DOTALL)
    assert table
    for name in re.findall(r"`([a-z_]+)`", table[0]):
        assert name in known | {"kind", "gpu_memory_utilization", "max_model_len"}, name


if __name__ == "__main__":
    FIELDS.write_text(with_fields(FIELDS.read_text()))
