"""The routes of the loopback Hub that change something: repositories, branches, LFS contents and commits.

`write` takes a request apart and gives status and JSON; `Refusal` is the answer in all other cases.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs, unquote

from loopback_hub import LFS, USER, LoopbackHub, Refusal, blob_id, front_matter, is_lfs, listed, sha256

Query = Mapping[str, list[str]]
Answer = tuple[int, Any]
_ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS).encode()
_FULL = "Private repository storage limit reached, please upgrade your plan"
_STALE = "A commit has happened since. Please refresh and try again."


def is_reading(route: str) -> bool:
    """Two questions come as a POST; they need no permission to write."""
    return route == "/api/validate-yaml" or "/paths-info/" in route


def write(hub: LoopbackHub, method: str, route: str, query: Query, body: bytes) -> Answer:
    """The answer to a PUT or POST whose path is `route`, still quoted."""
    if method == "PUT" and (match := re.fullmatch(r"/lfs/(.+)/([0-9a-f]{64})", route)):
        return _store(hub, match[1], match[2], body)
    if route == "/api/repos/create":
        return _create(hub, _parsed(body))
    if route == "/api/validate-yaml":
        return _validate(_parsed(body)["content"])
    if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/(batch|verify)", route):
        return (_batch if match[2] == "batch" else _verify)(hub, match[1], _parsed(body))
    if match := re.fullmatch(r"/api/models/(.+)/(preupload|commit|branch|paths-info)/([^/]+)", route):
        repo, revision = match[1], unquote(match[3])
        if match[2] == "preupload":
            return _preupload(hub, repo, revision, _parsed(body))
        if match[2] == "commit":
            lines = [_parsed(line) for line in body.splitlines() if line.strip()]
            return _commit(hub, repo, revision, lines, query.get("create_pr") == ["1"])
        if match[2] == "branch":
            return _branch(hub, repo, revision, _parsed(body).get("startingPoint", "main"))
        files = hub.at(repo, revision)[1]
        asked = parse_qs(body.decode()).get("paths", [])
        return 200, [listed("path", "oid", name, files[name]) for name in asked if name in files]
    raise Refusal(404, "there is no such route here")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"Invalid JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refusal(400, "Invalid JSON: an object is expected")
    return found


def _create(hub: LoopbackHub, asked: Mapping[str, Any]) -> Answer:
    if asked.get("type", "model") != "model":
        raise Refusal(400, "only models are here")
    repo = f"{asked.get('organization') or USER}/{asked['name']}"
    with hub.lock:
        if repo in hub.repos:
            raise Refusal(409, "You already created this model repo", url=f"{hub.url}/{repo}")
        hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.commit(repo, {".gitattributes": _ATTRIBUTES}, "initial commit")
    return 200, {"url": f"{hub.url}/{repo}", "name": repo}


def _validate(readme: str) -> Answer:
    errors = _card_errors(readme)
    if errors:
        raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": e} for e in errors], warnings=[])
    if not front_matter(readme):
        return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    return 200, {"errors": [], "warnings": []}


def _card_errors(readme: str) -> list[str]:
    """The Hub takes ids only as base models, and says so; its list of licences is not here."""
    try:
        card = front_matter(readme) or {}
    except ValueError as error:
        return [str(error)]
    bases = card.get("base_model", [])
    named = {"base_model": bases} if isinstance(bases, str) else {f"base_model[{i}]": b for i, b in enumerate(bases)}
    return [
        f'"{key}" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for key, base in named.items()
        if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", str(base))
    ]


def _preupload(hub: LoopbackHub, repo: str, revision: str, asked: Mapping[str, Any]) -> Answer:
    files = hub.at(repo, revision)[1]
    rules = asked.get("gitIgnore", files.get(".gitignore", b"").decode()).split()
    answers = []
    for file in asked["files"]:
        name, old = file["path"], files.get(file["path"])
        answer = {"path": name, "uploadMode": "lfs" if is_lfs(name, file["size"]) else "regular"}
        answer["shouldIgnore"] = any(fnmatch(name, rule) or fnmatch(name.rsplit("/")[-1], rule) for rule in rules)
        if old is not None:
            answer["oid"] = sha256(old) if is_lfs(name, len(old)) else blob_id(name, old)
        answers.append(answer)
    return 200, {"files": answers}


def _batch(hub: LoopbackHub, repo: str, asked: Mapping[str, Any]) -> Answer:
    hub.at(repo, asked.get("ref", {}).get("name", "main"))
    if asked["operation"] != "upload" or "basic" not in asked["transfers"] or asked["hash_algo"] != "sha256":
        raise Refusal(422, "only uploads in one piece, by sha256, are here")
    with hub.lock:
        stored = hub.objects[repo]
        new = {o["oid"]: o["size"] for o in asked["objects"] if o["oid"] not in stored}
        if hub.quota is not None and sum(new.values()) + sum(map(len, stored.values())) > hub.quota:
            raise Refusal(403, _FULL)
        hub.announced |= {(repo, oid): size for oid, size in new.items()}
    objects = []
    for item in asked["objects"]:
        answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
        if item["oid"] in new:
            upload = {"href": f"{hub.url}/lfs/{repo}/{item['oid']}?signature=x", "header": {}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify"}}
        objects.append(answer)
    return 200, {"transfer": "basic", "objects": objects}


def _store(hub: LoopbackHub, repo: str, oid: str, content: bytes) -> Answer:
    with hub.lock:
        size = hub.announced.get((repo, oid))
    if size is None:
        raise Refusal(403, "Request has expired")
    if len(content) != size or sha256(content) != oid:
        raise Refusal(400, "The content is not what was announced")
    with hub.lock:
        hub.objects[repo][oid] = content
    return 200, {}


def _verify(hub: LoopbackHub, repo: str, asked: Mapping[str, Any]) -> Answer:
    content = hub.objects[repo].get(asked["oid"])
    if content is None or len(content) != asked["size"]:
        raise Refusal(404, f"There is no LFS object {asked['oid']}")
    return 200, {}


def _commit(hub: LoopbackHub, repo: str, revision: str, lines: list[dict[str, Any]], pull: bool) -> Answer:
    if not lines or lines[0].get("key") != "header":
        raise Refusal(400, "The first line must be the header")
    header = lines[0]["value"]
    expected = header.get("parentCommit")
    with hub.lock:  # from the look at the head to the new head: of two writers with one parent, one is refused
        head, files = hub.at(repo, revision)
        if pull and expected:
            head, files = hub.at(repo, expected)
        elif revision != "main" and revision not in hub.branches[repo] and not pull:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        elif expected and not head.startswith(expected):
            raise Refusal(412, _STALE)
        changed = dict(files)
        for line in lines[1:]:
            _apply(changed, hub.objects[repo], line["key"], line["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in hub.branches[repo])
        branch = f"refs/pr/{number}" if pull else revision
        made = hub.commit(repo, changed, header["summary"], header.get("description", ""), branch, head)
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.url}/{repo}/commit/{made.sha}"}
    if pull:
        answer |= {"pullRequestUrl": f"{hub.url}/{repo}/discussions/{number}", "pullRequestRevision": branch}
    return 200, answer


def _apply(files: dict[str, bytes], objects: Mapping[str, bytes], key: str, value: Mapping[str, Any]) -> None:
    """One line of a commit, done to `files`."""
    path = value["path"].rstrip("/")
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.split("/")):
        raise Refusal(400, f"Invalid path: {path}")
    if key in ("file", "lfsFile"):
        files[path] = _content(path, objects, key, value)
        return
    if key not in ("deletedFile", "deletedFolder", "deletedEntry"):
        raise Refusal(400, f"Unknown operation: {key}")
    gone = [name for name in files if name.startswith(f"{path}/") and key != "deletedFile"]
    gone += [path] if path in files and key != "deletedFolder" else []
    if not gone:
        raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in gone:
        del files[name]


def _content(path: str, objects: Mapping[str, bytes], key: str, value: Mapping[str, Any]) -> bytes:
    if key == "lfsFile":
        content = objects.get(value["oid"])
        if content is None or len(content) != value.get("size", len(content)):
            raise Refusal(400, f"The LFS content of {path} has not been uploaded")
    else:
        content = base64.b64decode(value["content"], validate=True)
    if is_lfs(path, len(content)) != (key == "lfsFile"):
        raise Refusal(400, f"{path} must {'not ' * (key == 'lfsFile')}be an LFS file")
    if path == "README.md" and (errors := _card_errors(content.decode())):
        raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": e} for e in errors])
    return content


def _branch(hub: LoopbackHub, repo: str, name: str, start: str) -> Answer:
    with hub.lock:
        sha = hub.at(repo, start)[0]
        if name.startswith("refs/"):
            raise Refusal(400, "Invalid reference for a branch")
        if name == "main" or name in hub.branches[repo]:
            raise Refusal(409, "Reference already exists")
        hub.branches[repo][name] = sha
    return 200, {}
