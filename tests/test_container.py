"""README's Dockerfile and compose file, without a container daemon.

The Dockerfile's steps run on a copy-on-write copy of this machine's root (an overlay in namespaces of its own), so
`useradd` and `USER` are real and nothing outside is changed. What an image would bring and this does not is its base:
`FROM` is an empty virtual environment of the Python that runs the tests.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import llm_inference as product
from tests.fake_engine import FakeEngine
from tests.harness import API, Command, clean_env, until
from tests.processes import ROOT, descendants, free_port
from tests.test_readme import blocks, commands, with_port

#: the keys of the Compose specification that may stand here (compose-spec/schema/compose-spec.json, 2026)
FILE_KEYS = {"services", "volumes"}
SERVICE_KEYS = {"build", "depends_on", "environment", "image", "ports", "restart", "volumes"}
KEY = "sk-compose"


def dockerfile() -> list[tuple[str, str]]:
    """The instructions and their arguments."""
    (text,) = blocks("zh", "dockerfile")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines())]


def compose() -> dict[str, Any]:
    (text,) = blocks("zh", "yaml")
    return dict(yaml.safe_load(text))


def environment(given: dict[str, str]) -> dict[str, str]:
    """The variables of the service, with `${NAME:?message}` filled in as Compose does."""
    asked: dict[str, str] = compose()["services"]["llm"]["environment"]
    return {name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda at: given[at[1]], value) for name, value in asked.items()}


# ------------------------------------------------------------------------------------------------ the compose file


def test_its_keys_are_the_specifications() -> None:
    file = compose()
    assert set(file) <= FILE_KEYS
    for service in file["services"].values():
        assert set(service) <= SERVICE_KEYS and len({"image", "build"} & set(service)) == 1
        assert all(isinstance(value, str) for value in service.get("environment", {}).values())
        for volume in service.get("volumes", []):
            name, path = volume.split(":")
            assert name in file["volumes"] and path.startswith("/")
        assert set(service.get("depends_on", [])) <= set(file["services"])


def test_its_port_is_the_one_that_the_image_listens_on() -> None:
    (published,) = compose()["services"]["llm"]["ports"]
    assert published == f"{product.Settings().port}:{product.Settings().port}"
    assert product.Settings().host == "0.0.0.0"  # not loopback: nobody outside the container would reach it


def test_its_engine_is_the_other_service() -> None:
    name, port = re.fullmatch(
        r"http://(\w+):(\d+)", environment({"LLM_INFERENCE_API_KEY": KEY})["OLLAMA_HOST"]
    ).groups()  # type: ignore[union-attr]
    assert name in compose()["services"] and product.OllamaAdapter.default_url.endswith(f":{port}")


def test_its_environment_reaches_ollama_and_asks_for_the_key() -> None:
    """As it stands, but for the host's name."""
    variables = environment({"LLM_INFERENCE_API_KEY": KEY})
    with FakeEngine("ollama") as ollama:
        variables["OLLAMA_HOST"] = ollama.base_url
        with Command(env=variables, ready=False) as server:
            asked: dict[str, Any] = {"json": {"prompt": "hi", "max_tokens": 8}, "timeout": 30}
            url = f"{server.url}{API}/generate"
            with httpx.Client(trust_env=False) as client:
                assert client.post(url, **asked).status_code == 401
                reply = client.post(url, headers={"Authorization": f"Bearer {KEY}"}, **asked)
        assert reply.json()["data"]["engine_type"] == "ollama" and len(ollama.bodies) == 1


# ------------------------------------------------------------------------------------------------ the image


def test_the_dockerfile_has_known_instructions() -> None:
    """`built` below carries out no other."""
    names = [name for name, _ in dockerfile()]
    assert names[0] == "FROM" and names[-1] == "CMD"
    assert set(names) <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "HEALTHCHECK", "CMD"}
    image, _, version = dockerfile()[0][1].partition(":")
    assert image == "python" and tuple(map(int, version.removesuffix("-slim").split("."))) >= (3, 11)


ROOT_FILESYSTEM = """\
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mount --rbind /dev /mnt/root/dev
mount -t proc proc /mnt/root/proc
"""


def steps(context: Path, base: Path, port: int) -> str:
    """A shell script that does what a builder does with the Dockerfile, and then runs the container."""
    said, user, folder = [ROOT_FILESYSTEM], "root", "/"
    path = f"{base}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    for above in Path(sys.base_prefix).parents:  # an image's Python can be read by everyone
        said.append(f"chmod a+x /mnt/root{above}")

    def inside(command: str, **variables: str) -> str:
        home = "/root" if user == "root" else f"/home/{user}"
        known = {"PATH": path, "HOME": home, **{name: os.environ[name] for name in os.environ if name[:4] == "PIP_"}}
        given = [f"{name}={value}" for name, value in (known | variables).items()]
        line = f"cd {folder} && exec env -i {shlex.join(given)} sh -c {shlex.quote(command)}"
        return f"chroot --userspec={user}:{user} /mnt/root sh -c {shlex.quote(line)}"

    for name, rest in dockerfile()[1:]:
        match name:
            case "WORKDIR":
                folder = rest
                said.append(f"mkdir -p /mnt/root{folder}")
            case "COPY":
                *files, _ = rest.split()
                said.append(f"cp {shlex.join(str(context / file) for file in files)} /mnt/root{folder}")
            case "RUN":
                said.append(inside(rest))
            case "USER":
                user = rest
            case "HEALTHCHECK":
                check = with_port(rest.removeprefix("CMD "), str(port))
                said.append(f"cat >/mnt/root/healthy <<'END'\n{check}\nEND")
            case "CMD":
                started = inside(f"exec {shlex.join(json.loads(rest))}", LLM_INFERENCE_PORT=str(port))
                healthy = inside("sh /healthy")
                said.append(f"(until {healthy} 2>/dev/null; do sleep 1; done; echo HEALTHY) &")
                said.append(f"exec {started}")
    return "\n".join(said)


@contextlib.contextmanager
def container(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Builds and runs it in this folder: its port, its process and what it said until it was healthy."""
    context, base, log, port = folder / "context", folder / "base", folder / "log", free_port()
    context.mkdir()
    for name, rest in dockerfile():
        for file in rest.split()[:-1] if name == "COPY" else ():
            shutil.copy(ROOT / file, context)
    venv.create(base, with_pip=True)
    for above in (folder, *folder.parents[:-1]):  # pytest's temporary folders are the user's alone
        above.chmod(above.stat().st_mode | 0o011)
    with log.open("w") as out:
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", steps(context, base, port)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or "HEALTHY" in log.read_text(), 600)
        assert process.poll() is None, log.read_text()
        yield port, process.pid, log.read_text()
    finally:
        process.kill()  # and with it everything in its namespace
        process.wait(20)


def owners(pid: int) -> set[str]:
    """The users of the servers below this process."""
    found = set()
    for child in descendants(pid):
        if b"--serve" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            found.add(Path(f"/proc/{child}/status").read_text().partition("Uid:\t")[2].split()[0])
    return found


@pytest.mark.skipif(os.environ.get("LLM_TEST_CONTAINER") != "1", reason="installs everything: set LLM_TEST_CONTAINER=1")
def test_the_steps_build_a_server_that_answers(tmp_path: Path) -> None:
    """Its health check passes, it is not root's, and README's first request is answered as README shows."""
    first = next(command for command in commands("zh") if command.startswith("curl "))
    (shown,) = blocks("zh", "json")
    with container(tmp_path) as (port, pid, said):
        asked = with_port(first, str(port))
        done = subprocess.run(asked, shell=True, capture_output=True, text=True, timeout=180, env=clean_env())
        assert json.loads(done.stdout)["data"]["text"] == json.loads(shown)["data"]["text"], said
        users = owners(pid)
        assert users and "0" not in users, users
    assert f"http://127.0.0.1:{port}{API}/generate" in said and "API key" in said, said
