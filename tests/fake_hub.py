"""A model hub on loopback: the routes of Hugging Face and ModelScope that their libraries use to download."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`repos`: name -> path -> content. `gated`, `private`: names that need `token`. `rate`: bytes a second."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_right"
        self.rate = 0.0
        self.silent = False  # accept, and never answer
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}  # bytes of each file that went out
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.requests.append((http.command, path))
        while self.silent:
            time.sleep(0.05)
        length = int(http.headers.get("content-length") or 0)
        http.rfile.read(length)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.info(http, "/".join(parts[2:4]))
        elif parts[:3] == ["api", "v1", "models"]:
            self.modelscope(http, "/".join(parts[3:5]), parts[5:], query)
        elif parts[2:3] == ["resolve"] or parts[:3] == ["models"]:
            self.file(http, "/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.reply(http, 404, {"error": "no route"})

    def allowed(self, http: BaseHTTPRequestHandler, repo: str) -> bool:
        token = http.headers.get("authorization") == f"Bearer {self.token}"
        if repo not in self.repos or (repo in self.private and not token):
            self.reply(http, 401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        elif repo in self.gated and not token and "resolve" in http.path:
            self.reply(http, 403, {"error": "Access to model is restricted"}, {"X-Error-Code": "GatedRepo"})
        else:
            return True
        return False

    def info(self, http: BaseHTTPRequestHandler, repo: str) -> None:
        if self.allowed(http, repo):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.repos[repo].items()]
            self.reply(http, 200, {"id": repo, "sha": COMMIT, "siblings": siblings})

    def modelscope(self, http: BaseHTTPRequestHandler, repo: str, rest: list[str], query: dict[str, list[str]]) -> None:
        if repo not in self.repos:
            return self.reply(http, 404, {"Code": 10010205001, "Message": "not found", "Success": False})
        files = self.repos[repo]
        if rest == ["repo", "files"]:
            listed = [
                {"Path": name, "Name": name, "Size": len(data), "Type": "blob",
                 "Sha256": hashlib.sha256(data).hexdigest(),
                 "Revision": COMMIT}
                for name, data in files.items()
            ]  # fmt: skip
            return self.reply(http, 200, {"Code": 200, "Success": True, "Data": {"Files": listed}})
        if rest == ["repo"]:
            return self.file(http, repo, query["FilePath"][0])
        if rest == ["revisions"]:
            names = {"Tags": [], "Branches": [{"Revision": "master"}]}
            return self.reply(http, 200, {"Code": 200, "Success": True, "Data": {"RevisionMap": names}})
        self.reply(http, 200, {"Code": 200, "Success": True, "Data": {"Name": repo}})

    def file(self, http: BaseHTTPRequestHandler, repo: str, name: str) -> None:
        if not self.allowed(http, repo):
            return
        data = self.repos[repo].get(name)
        if data is None:
            return self.reply(http, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        start = 0
        wanted = http.headers.get("range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            http.send_response(206)
            http.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            http.send_response(200)
        http.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        http.send_header("X-Repo-Commit", COMMIT)
        http.send_header("Accept-Ranges", "bytes")
        http.send_header("Content-Length", str(len(data) - start))
        http.end_headers()
        if http.command == "HEAD":
            return
        for offset in range(start, len(data), 1 << 16):
            piece = data[offset : offset + (1 << 16)]
            try:
                http.wfile.write(piece)
            except OSError:
                return
            self.sent[name] = self.sent.get(name, 0) + len(piece)
            if self.rate:
                time.sleep(len(piece) / self.rate)

    def reply(
        self, http: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode()
        http.send_response(status)
        for name, value in (headers or {}).items():
            http.send_header(name, value)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(data)
