"""A Hub on 127.0.0.1: what huggingface_hub asks for in order to list, read and download models, and its faults.

with LoopbackHub({"me/rm": {"config.json": b"{}"}}) as hub:
    hub.use(monkeypatch, tmp_path / "cache")  # this process's huggingface_hub now talks to it
    subprocess.run([...], env=os.environ | hub.environment(tmp_path / "cache"))  # a command under test does
    hub.requests                              # what was asked: method, path, range, token
    hub.faults.append(Fault(status=503))      # what the next matching request gets instead
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_LFS = (".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What goes wrong `times` times in requests whose path contains `path`.

    `status` and `headers` are answered as they stand; or `kind` is "whole" (Range is ignored, status 200),
    "short" (half of the body, announced as whole), "hangup" (closed before any answer), "shifted" (206, but
    other bytes), "long" (chunked, more than asked), "html" (a page of some proxy).
    """

    kind: str = ""
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    times: int = 1
    method: str = ""


def not_found(code: str = "RepoNotFound", status: int = 404) -> Fault:
    """The Hub's own errors are told apart by X-Error-Code: RepoNotFound, GatedRepo, RevisionNotFound, EntryNotFound."""
    return Fault(status=status, headers={"X-Error-Code": code}, times=99)


class LoopbackHub:
    """Serves repositories: id -> file -> bytes, or id -> a folder. Their one branch is main; `commits` has its sha."""

    def __init__(self, repos: Mapping[str, Mapping[str, bytes] | Path]) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        for repo, files in repos.items():
            self.put(repo, files)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens: set[str] | None = None
        self.redirect_to: str | None = None
        self.sent = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put(self, repo: str, files: Mapping[str, bytes] | Path) -> str:
        """Replaces the contents of a repository by a new commit, which is returned."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        self.repos[repo] = dict(files)
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        self.commits[repo] = digest.hexdigest()
        return self.commits[repo]

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def environment(self, cache: Path) -> dict[str, str]:
        """What a subprocess needs in its environment to talk to this Hub only."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_SAFETENSORS_CONVERSION": "1",
        }  # fmt: skip

    def use(self, monkeypatch: Any, cache: Path, token: str | None = None) -> None:
        """Makes the huggingface_hub of this process, which read its environment on import, talk to this Hub only."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    def asked(self, method: str = "GET", path: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and path in request.path]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    """Ends its connections when it ends: the client keeps them open, and a later Hub may get the same port."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self.open: list[socket.socket] = []
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news here."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, path = self.hub, unquote(self.path)
        if path.startswith("/api/agent-harnesses"):  # the client's own statistics, once a process
            return self._answer(404, b"")
        authorization = self.headers.get("Authorization")
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), authorization))
        fault = hub.take_fault(self.command, path)
        if fault and fault.kind == "hangup":
            self.close_connection = True
            return None
        if fault and fault.kind == "html":
            return self._answer(200, b"<html>sign in to the network</html>", {"Content-Type": "text/html"})
        if fault and fault.status:
            return self._answer(fault.status, b"", dict(fault.headers))
        if hub.tokens is not None and (authorization or "").removeprefix("Bearer ") not in hub.tokens:
            if authorization:
                return self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        route = urlsplit(path).path
        if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", route):
            return self._api(match[1], match[2] or "revision", match[3] or "main")
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", route):
            return self._file(match[1], match[2], match[3], fault.kind if fault else "")
        return self._answer(404, b"")

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit, or None after an answer that there is none."""
        if repo not in self.hub.repos:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in ("main", self.hub.commits[repo]):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return self.hub.commits[repo]

    def _api(self, repo: str, what: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = self.hub.repos[repo]
        answer: Any
        if what == "tree":
            answer = [_listed("path", "oid", name, data) | {"type": "file"} for name, data in files.items()]
        else:
            siblings = [_listed("rfilename", "blobId", name, data) for name, data in files.items()]
            answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str, fault: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return None
        if name not in self.hub.repos[repo]:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = self.hub.repos[repo][name]
        etag = f'"{_blob_id(name, data)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if name.endswith(_LFS):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": etag}
            if self.hub.redirect_to and self.command == "GET":  # large files lie at another address, signed
                return self._answer(302, b"", headers | {"Location": self.hub.redirect_to + self.path + "?signature=x"})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or fault == "whole":
            return self._answer(200, data, headers, fault)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if fault == "shifted":
            first, last = first + 1, last + 1
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._answer(206, data[first : last + 1], headers, fault)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, fault: str = "") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if fault == "long":
            self.send_header("Connection", "close")
            self.close_connection, body = True, body + b"more"
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "short":
            self.close_connection, body = True, body[: len(body) // 2]
        try:
            for start in range(0, len(body), 65536):
                self.wfile.write(body[start : start + 65536])
                self.hub.sent += len(body[start : start + 65536])
        except OSError:  # the client had seen enough
            self.close_connection = True


def _blob_id(name: str, data: bytes) -> str:
    if name.endswith(_LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _listed(name_key: str, id_key: str, name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {name_key: name, id_key: hashlib.sha1(data).hexdigest(), "size": len(data)}
    if name.endswith(_LFS):
        digest = _blob_id(name, data)
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}
    return entry
