"""A Hub on 127.0.0.1: what huggingface_hub asks for to list, read, download and publish models, and its faults.

with LoopbackHub({"me/rm": {"config.json": b"{}"}}) as hub:
    hub.use(monkeypatch, tmp_path / "cache")  # this process's huggingface_hub now talks to it
    subprocess.run([...], env=os.environ | hub.environment(tmp_path / "cache"))  # a command under test does
    hub.requests                              # what was asked: method, path, range, token
    hub.faults.append(Fault(status=503))      # what the next matching request gets instead

The repositories and what is read of them are here; the routes that write are in loopback_hub_writing.py.
"""

from __future__ import annotations

import contextlib
import functools
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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".model", ".png")
REGULAR_BYTES = 10_000_000
USER = "me"
# Of the client, when it sends LFS contents: pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
CLIENT_WARNING = "ignore:Use 'content=<...>' to upload raw:DeprecationWarning"


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
    "short" (half of the body, announced as whole), "hangup" (closed before anything is done), "lost" (all is done,
    then closed without an answer), "shifted" (206, but other bytes), "long" (chunked, more than asked), "html" (a
    page of some proxy).
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


class Refusal(Exception):  # noqa: N818
    """An answer other than 200, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        plain = message.encode("ascii", "replace").decode()  # a header can hold no more
        self.headers = {"X-Error-Message": plain} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, bytes]
    parent: str | None
    title: str
    message: str


class LoopbackHub:
    """Serves repositories: id -> file -> bytes, or id -> a folder.

    `repos` has the files of their branch main and `commits` its sha; `branches` the sha of every other one, pull
    requests (refs/pr/1) among them; `history` all commits; `objects` the LFS contents by their sha256. A repository
    is `private[id]` or not. Who writes or reads needs one of `tokens`, unless that is None; `readers` may not write.
    LFS contents beyond `quota` bytes a repository are refused.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, bytes] | Path] | None = None) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.history: dict[str, dict[str, Commit]] = {}
        self.objects: dict[str, dict[str, bytes]] = {}
        self.announced: dict[tuple[str, str], int] = {}
        self.private: dict[str, bool] = {}
        self.lock = threading.RLock()
        for repo, files in (repos or {}).items():
            self.put(repo, files)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens: set[str] | None = None
        self.readers: set[str] = set()
        self.quota: int | None = None
        self.redirect_to: str | None = None
        self.sent = 0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put(self, repo: str, files: Mapping[str, bytes] | Path) -> str:
        """Replaces the contents of main by a new commit, which is returned; what it was stays in the history."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        return self.commit(repo, files, "put").sha

    def forget(self, repo: str) -> None:
        """Drops every commit that is not the newest of a branch, as a squash does: their shas are not found."""
        with self.lock:
            heads = {self.commits[repo], *self.branches[repo].values()}
            self.history[repo] = {sha: commit for sha, commit in self.history[repo].items() if sha in heads}

    def commit(
        self,
        repo: str,
        files: Mapping[str, bytes],
        title: str,
        message: str = "",
        branch: str = "main",
        parent: str | None = None,
    ) -> Commit:
        """A commit with exactly these files, the new head of `branch`; `parent` is by default its head so far."""
        with self.lock:
            history = self.history.setdefault(repo, {})
            branches = self.branches.setdefault(repo, {})
            parent = parent or (self.commits.get(repo) if branch == "main" else branches.get(branch))
            digest = hashlib.sha1(repr((repo, len(history), parent, title, message)).encode())
            for name, data in sorted(files.items()):
                digest.update(f"{name} {blob_id(name, data)}\n".encode())
            commit = Commit(digest.hexdigest(), dict(files), parent, title, message)
            history[commit.sha] = commit
            objects = self.objects.setdefault(repo, {})
            objects |= {sha256(data): data for name, data in files.items() if is_lfs(name, len(data))}
            self.private.setdefault(repo, False)
            if branch == "main":
                self.commits[repo], self.repos[repo] = commit.sha, commit.files
            else:
                branches[branch] = commit.sha
            return commit

    def at(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The sha and the files at a branch, a pull request or a commit; `Refusal` if there is none."""
        with self.lock:
            if repo not in self.repos:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            if revision in ("main", self.commits[repo]):
                return self.commits[repo], self.repos[repo]
            sha = self.branches[repo].get(revision, revision)
            if sha not in self.history[repo]:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return sha, self.history[repo][sha].files

    def log(self, repo: str, revision: str = "main") -> list[Commit]:
        """The commits of a branch that are still there, the newest first."""
        with self.lock:
            sha: str | None = self.at(repo, revision)[0]
            found = []
            while sha in self.history[repo]:
                found.append(self.history[repo][sha])
                sha = found[-1].parent
            return found

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
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip

    def use(self, monkeypatch: Any, cache: Path, token: str | None = None) -> None:
        """Makes the huggingface_hub of this process, which read its environment on import, talk to this Hub only."""
        from huggingface_hub import constants, hf_api

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # that of huggingface_hub.create_repo and its like
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    def asked(self, method: str = "GET", path: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and path in request.path]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    """Ends its connections when it ends: the client keeps them open, and a later Hub may get the same port."""

    daemon_threads = True
    request_queue_size = 64

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
    disable_nagle_algorithm = True  # or each body waits 40 ms for the receipt of its headers
    _lost = False

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, path = self.hub, unquote(self.path)
        body = self._body()
        if path.startswith("/api/agent-harnesses"):  # the client's own statistics, once a process
            return self._answer(404, b"")
        authorization = self.headers.get("Authorization")
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), authorization))
        fault = hub.take_fault(self.command, path)
        self._lost = fault is not None and fault.kind == "lost"
        if fault and fault.kind == "hangup":
            self.close_connection = True
            return None
        if fault and fault.kind == "html":
            return self._answer(200, b"<html>sign in to the network</html>", {"Content-Type": "text/html"})
        if fault and fault.status:
            return self._answer(fault.status, b"", dict(fault.headers))
        try:
            return self._route(body, fault.kind if fault else "")
        except Refusal as refusal:
            return self._json(refusal.status, refusal.body, refusal.headers)

    def _body(self) -> bytes:
        """The whole body, also of a request that is refused: the next one comes over the same connection."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("half a request must not be taken for a whole one")
        return body

    def _authorize(self, writes: bool) -> None:
        hub, token = self.hub, (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if hub.tokens is not None and token not in hub.tokens | hub.readers:
            if token:
                raise Refusal(401, "Invalid credentials in Authorization header")
            raise Refusal(401, "Invalid username or password.", "" if writes else "RepoNotFound")
        if writes and token in hub.readers:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{USER}" with this token')

    def _route(self, body: bytes, fault: str) -> None:
        from loopback_hub_writing import is_reading, write

        url = urlsplit(self.path)  # still quoted: refs%2Fpr%2F1 is one part of a path
        query = parse_qs(url.query)
        if self.command == "PUT":  # the address itself is the permission, as in a signed one
            return self._json(*write(self.hub, self.command, url.path, query, body))
        self._authorize(writes=self.command == "POST" and not is_reading(url.path))
        if self.command == "POST":
            return self._json(*write(self.hub, self.command, url.path, query, body))
        if url.path == "/api/whoami-v2":
            return self._whoami()
        if match := re.fullmatch(
            r"/api/models/(.+?)(?:/(revision|tree|refs|commits)(?:/([^/]+)(?:/(.+))?)?)?", url.path
        ):
            repo, what, revision, folder = (unquote(part or "") for part in match.groups())
            return self._json(200, self._api(repo, what or "revision", revision or "main", folder, query))
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path):
            return self._file(unquote(match[1]), unquote(match[2]), unquote(match[3]), fault)
        return self._answer(404, b"")

    def _whoami(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "test", "role": "read" if token in self.hub.readers else "write"}
        return self._json(
            200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}
        )

    def _api(self, repo: str, what: str, revision: str, folder: str, query: Mapping[str, list[str]]) -> Any:
        hub = self.hub
        commit, files = hub.at(repo, revision)
        if what == "tree":
            within = f"{folder}/" if folder else ""
            names = [name for name in files if name.startswith(within)]
            if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):  # folders are not listed
                names = [name for name in names if "/" not in name[len(within) :]]
            return [listed("path", "oid", name, files[name]) for name in names]
        if what == "commits":
            return [
                {"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": USER}], "date": _DATE}
                for c in hub.log(repo, revision)
            ]
        if what == "refs":
            return _refs(hub, repo)
        siblings = [listed("rfilename", "blobId", name, data) for name, data in files.items()]
        if "blobs" not in query:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "gated": False}
        with contextlib.suppress(ValueError):
            answer["cardData"] = front_matter(files.get("README.md", b"").decode())
        return answer | {"private": hub.private[repo]}

    def _file(self, repo: str, revision: str, name: str, fault: str) -> None:
        commit, files = self.hub.at(repo, revision)
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        etag = f'"{sha256(data) if is_lfs(name, len(data)) else blob_id(name, data)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if is_lfs(name, len(data)):
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

    def _json(self, status: int, answer: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(answer, default=str).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, fault: str = "") -> None:
        if self._lost:
            self.close_connection = True
            return
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
                with self.hub.lock:
                    self.hub.sent += len(body[start : start + 65536])
        except OSError:  # the client had seen enough
            self.close_connection = True


_DATE = "2024-01-22T00:00:00.000Z"


def _refs(hub: LoopbackHub, repo: str) -> dict[str, list[dict[str, str]]]:
    with hub.lock:
        heads = {"main": hub.commits[repo], **hub.branches[repo]}
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, sha in heads.items():
        pull = name.startswith("refs/pr/")
        ref = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": sha}
        found["pullRequests" if pull else "branches"].append(ref)
    return found


def is_lfs(name: str, size: int) -> bool:
    """Empty files are regular whatever their name: there is nothing to store."""
    return size > 0 and (name.endswith(LFS) or size > REGULAR_BYTES)


@functools.lru_cache(16)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(name: str, data: bytes) -> str:
    """What git calls the file: the id of its content, or for an LFS file that of the pointer which git has instead."""
    blob = _pointer(data) if is_lfs(name, len(data)) else data
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def _pointer(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


def listed(name_key: str, id_key: str, name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {name_key: name, id_key: blob_id(name, data), "size": len(data), "type": "file"}
    if is_lfs(name, len(data)):
        digest = sha256(data)
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": len(_pointer(data))}
    return entry


def front_matter(text: str) -> dict[str, Any] | None:
    """The mapping between the two --- at the beginning of a README; None without them; ValueError if it is none."""
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|$)", text, re.DOTALL)
    if block is None:
        return None
    try:
        found = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict):
        raise ValueError("the metadata must be a mapping")
    return found
