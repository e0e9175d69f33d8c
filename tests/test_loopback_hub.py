"""The Hub on 127.0.0.1 is what the other tests rely on: here the real client and the `hf` command write to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash
from loopback_hub import CLIENT_WARNING, Fault, LoopbackHub
from safetensors import safe_open

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
CARD = b"---\nlicense: apache-2.0\nbase_model:\n- org/base\ntags:\n- reward-model\n---\n# a model\n"
WEIGHTS = bytes(range(256)) * 40
MAIN = {"config.json": b"{}", "model.safetensors": WEIGHTS, "old/model.bin": b"old", "old/notes.txt": b"n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub({"me/a": MAIN}) as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def add(name: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(name, data)


def commit(operations: list[Any], **options: Any) -> Any:
    return HfApi().create_commit("me/a", operations, commit_message="a title", **options)


def stored(revision: str | None = None) -> dict[str, bytes]:
    """What a client has after a download."""
    folder = Path(snapshot_download("me/a", revision=revision))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_repository_is_private_if_asked_and_made_once(hub: LoopbackHub) -> None:
    api = HfApi()
    created = api.create_repo("me/new", private=True)
    assert (str(created), created.repo_id) == (f"{hub.url}/me/new", "me/new")
    api.create_repo("public")
    assert {repo: api.model_info(repo).private for repo in ("me/a", "me/new", "me/public")} == {
        "me/a": False,
        "me/new": True,
        "me/public": False,
    }
    assert hub.private["me/new"]
    assert [f.rfilename for f in api.model_info("me/new").siblings] == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo("me/new")
    assert error.value.response.status_code == 409
    assert api.create_repo("me/new", private=False, exist_ok=True).repo_id == "me/new"
    assert hub.private["me/new"]
    assert len(hub.log("me/new")) == 1


def test_the_functions_of_the_package_talk_to_this_hub_too(hub: LoopbackHub) -> None:
    huggingface_hub.create_repo("me/new")
    assert "me/new" in hub.repos
    assert huggingface_hub.whoami("a token")["name"] == "me"


def test_one_commit_adds_replaces_and_deletes_and_the_old_one_stays_readable(hub: LoopbackHub) -> None:
    before = hub.commits["me/a"]
    operations = [
        add("README.md", CARD),
        add("config.json", b'{"new": 1}'),
        add("part/model-1.safetensors", WEIGHTS[1:]),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("old/"),
    ]
    made = commit(operations, commit_description="why", parent_commit=before)
    expected = {"README.md": CARD, "config.json": b'{"new": 1}', "part/model-1.safetensors": WEIGHTS[1:]}
    assert stored() == stored(made.oid) == hub.repos["me/a"] == expected
    assert stored(before) == MAIN
    assert made.commit_url == f"{hub.url}/me/a/commit/{made.oid}"
    listed = HfApi().list_repo_commits("me/a")
    assert [(c.commit_id, c.title, c.message) for c in listed] == [(made.oid, "a title", "why"), (before, "put", "")]
    assert [c.parent for c in hub.log("me/a")] == [before, None]


def test_the_ids_are_those_of_git_and_of_the_content(hub: LoopbackHub) -> None:
    made = commit([add("README.md", CARD), add("model.safetensors", WEIGHTS[2:])])
    digest, size = hashlib.sha256(WEIGHTS[2:]).hexdigest(), len(WEIGHTS) - 2
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    info = HfApi().model_info("me/a", files_metadata=True, revision=made.oid)
    siblings = {file.rfilename: file for file in info.siblings}
    tree = {file.path: file for file in HfApi().list_repo_tree("me/a", recursive=True, revision=made.oid)}
    for files in (siblings, tree):
        assert set(files) == {*MAIN, "README.md"}
        assert (files["README.md"].blob_id, files["README.md"].size) == (git_hash(CARD), len(CARD))
        assert files["README.md"].lfs is None
        large = files["model.safetensors"]
        assert (large.blob_id, large.size) == (git_hash(pointer), size)
        assert (large.lfs.sha256, large.lfs.size, large.lfs.pointer_size) == (digest, size, len(pointer))
    old = HfApi().model_info("me/a", files_metadata=True, revision=hub.log("me/a")[1].sha)
    assert {f.rfilename: f.lfs.sha256 for f in old.siblings if f.lfs} == {
        name: hashlib.sha256(MAIN[name]).hexdigest() for name in ("model.safetensors", "old/model.bin")
    }
    assert {f.size for f in HfApi().model_info("me/a").siblings} == {None}  # as on the Hub: only when asked for
    assert [file.path for file in HfApi().list_repo_tree("me/a", "old")] == ["old/model.bin", "old/notes.txt"]
    assert [file.path for file in HfApi().get_paths_info("me/a", ["config.json", "no"])] == ["config.json"]


def test_what_is_there_is_not_sent_again(hub: LoopbackHub) -> None:
    before = hub.commits["me/a"]
    unchanged = commit([add("config.json", b"{}"), add("model.safetensors", WEIGHTS)])
    assert unchanged.oid == before == hub.commits["me/a"]
    assert hub.asked("POST", "/commit/") == []
    made = commit([add("copy.safetensors", WEIGHTS), add("model.safetensors", WEIGHTS[3:])])
    assert len(hub.asked("PUT")) == 1
    copied = HfApi().create_commit(
        "me/a", [CommitOperationCopy("copy.safetensors", "again.safetensors")], commit_message="copy"
    )
    assert len(hub.asked("PUT")) == 1
    assert len({before, made.oid, copied.oid}) == 3
    assert stored()["again.safetensors"] == WEIGHTS
    assert stored()["model.safetensors"] == WEIGHTS[3:]


def test_large_files_are_lfs_empty_ones_are_not_and_ignored_ones_stay_here(hub: LoopbackHub) -> None:
    large = bytes(10_000_001)
    operations = [add("large.txt", large), add("empty.safetensors", b""), add("figure.png", b"png"), add("x.tmp", b"x")]
    commit([*operations, add(".gitignore", b"*.tmp\n")])
    files = {f.rfilename: f for f in HfApi().model_info("me/a", files_metadata=True).siblings}
    assert {name for name, file in files.items() if file.lfs} == {
        "figure.png",
        "large.txt",
        "model.safetensors",
        "old/model.bin",
    }
    assert "x.tmp" not in files
    assert stored()["large.txt"] == large
    assert stored()["empty.safetensors"] == b""


def test_a_stale_parent_is_refused(hub: LoopbackHub) -> None:
    stale = hub.commits["me/a"]
    head = hub.put("me/a", {**MAIN, "someone": b"else"})
    with pytest.raises(HfHubHTTPError, match=r"A commit has happened since\. Please") as error:
        commit([add("config.json", b"mine")], parent_commit=stale)
    assert error.value.response.status_code == 412
    assert error.value.response.json() == {"error": "A commit has happened since. Please refresh and try again."}
    assert (hub.commits["me/a"], hub.repos["me/a"]["config.json"]) == (head, b"{}")


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub) -> None:
    main = hub.commits["me/a"]
    made = commit([add("config.json", b"proposed"), add("model.safetensors", WEIGHTS[4:])], create_pr=True)
    assert (made.pr_url, made.pr_revision) == (f"{hub.url}/me/a/discussions/1", "refs/pr/1")
    assert (hub.commits["me/a"], stored()) == (main, MAIN)
    proposed = {**MAIN, "config.json": b"proposed", "model.safetensors": WEIGHTS[4:]}
    assert stored("refs/pr/1") == stored(made.oid) == proposed
    more = commit([add("config.json", b"better")], revision="refs/pr/1", parent_commit=made.oid)
    assert stored("refs/pr/1") == {**proposed, "config.json": b"better"}
    assert commit([add("config.json", b"other")], create_pr=True).pr_revision == "refs/pr/2"
    third = commit([add("config.json", b"on the first")], create_pr=True, parent_commit=made.oid)
    assert stored(third.pr_revision) == {**proposed, "config.json": b"on the first"}
    refs = HfApi().list_repo_refs("me/a", include_pull_requests=True)
    assert [(b.name, b.ref, b.target_commit) for b in refs.branches] == [("main", "refs/heads/main", main)]
    assert {p.ref: p.target_commit for p in refs.pull_requests}["refs/pr/1"] == more.oid
    assert stored() == MAIN


def test_branches(hub: LoopbackHub) -> None:
    api, first = HfApi(), hub.commits["me/a"]
    second = hub.put("me/a", {"config.json": b"2"})
    api.create_branch("me/a", branch="exp/1", revision=first)
    made = commit([add("config.json", b"branch")], revision="exp/1", parent_commit=first)
    assert stored("exp/1") == {**MAIN, "config.json": b"branch"}
    assert stored() == stored(second) == {"config.json": b"2"}
    refs = {b.name: b.target_commit for b in api.list_repo_refs("me/a").branches}
    assert refs == {"main": second, "exp/1": made.oid}
    for branch in ("main", "exp/1"):
        with pytest.raises(HfHubHTTPError, match="Reference already exists") as error:
            api.create_branch("me/a", branch=branch)
        assert error.value.response.status_code == 409
        api.create_branch("me/a", branch=branch, exist_ok=True)
    assert {b.name: b.target_commit for b in api.list_repo_refs("me/a").branches} == refs
    with pytest.raises(BadRequestError, match="Invalid reference for a branch"):
        api.create_branch("me/a", branch="refs/pr/9")
    for revision in ("missing", first):
        with pytest.raises(RevisionNotFoundError, match=f"Invalid rev id: {revision}"):
            HfApi().create_commit("me/a", [CommitOperationDelete("x")], commit_message="m", revision=revision)


def test_a_squash_forgets_what_no_branch_needs(hub: LoopbackHub) -> None:
    first = hub.commits["me/a"]
    kept = hub.put("me/a", {"config.json": b"2"})
    HfApi().create_branch("me/a", branch="kept")
    last = hub.put("me/a", {"config.json": b"3"})
    hub.forget("me/a")
    with pytest.raises(RevisionNotFoundError, match=f"Invalid rev id: {first}"):
        HfApi().model_info("me/a", revision=first)
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.hf_hub_download("me/a", "config.json", revision=first)
    assert stored(last) == stored() == {"config.json": b"3"}
    assert stored("kept") == stored(kept) == {"config.json": b"2"}


def never_uploaded() -> CommitOperationAdd:
    operation = add("model.safetensors", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    return operation


def as_regular() -> CommitOperationAdd:
    operation = add("model.safetensors", b"weights in git")
    operation._upload_mode, operation._is_uploaded = "regular", True
    return operation


@pytest.mark.parametrize(
    ("operation", "error", "text"),
    [
        (never_uploaded, BadRequestError, "The LFS content of model.safetensors has not been uploaded"),
        (as_regular, BadRequestError, "model.safetensors must be an LFS file"),
        (lambda: CommitOperationDelete("no.txt"), EntryNotFoundError, "A file with this name doesn't exist: no.txt"),
        (lambda: CommitOperationDelete("old"), EntryNotFoundError, "A file with this name doesn't exist: old"),
        (lambda: CommitOperationDelete("model.safetensors/"), EntryNotFoundError, "doesn't exist: model.safetensors"),
        (lambda: add(".git/hooks", b"x"), ValueError, "Invalid `path_in_repo`"),
    ],
)
def test_a_commit_is_made_whole_or_not_at_all(
    hub: LoopbackHub, operation: Callable[[], Any], error: type[Exception], text: str
) -> None:
    before = hub.commits["me/a"]
    with pytest.raises(error, match=re.escape(text)):
        commit([add("config.json", b"first"), CommitOperationDelete("old/notes.txt"), operation()])
    assert (hub.commits["me/a"], stored()) == (before, MAIN)


def test_an_upload_must_be_what_was_announced(hub: LoopbackHub) -> None:
    operation = add("model.safetensors", b"these bytes")
    operation.upload_info.sha256 = hashlib.sha256(b"other bytes").digest()
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model.safetensors'") as error:
        commit([operation])
    assert "The content is not what was announced" in str(error.value.__cause__)
    assert hashlib.sha256(b"other bytes").hexdigest() not in hub.objects["me/a"]


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("---\nlicense: [unclosed\n---\n# x", "Invalid metadata in README.md.\n- while parsing a flow sequence"),
        ("---\n- license\n---\n# x", "Invalid metadata in README.md.\n- the metadata must be a mapping"),
        ("---\nbase_model:\n- org/base\n- ./runs/1\n---\n", '"base_model[1]" with value "./runs/1" is not valid'),
    ],
)
def test_metadata_that_cannot_be_is_refused(hub: LoopbackHub, card: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        commit([add("README.md", card.encode())])
    assert hub.asked("POST", "/commit/") == []


def test_missing_metadata_are_warned_about(hub: LoopbackHub) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        commit([add("README.md", b"# no front matter")])
    assert stored()["README.md"] == b"# no front matter"
    assert HfApi().model_info("me/a").card_data is None


def test_the_card_is_that_of_the_revision(hub: LoopbackHub) -> None:
    first = commit([add("README.md", CARD)])
    commit([add("README.md", CARD.replace(b"apache-2.0", b"mit"))])
    card = HfApi().model_info("me/a", revision=first.oid).card_data
    assert (card.license, card.base_model, card.tags) == ("apache-2.0", ["org/base"], ["reward-model"])
    assert HfApi().model_info("me/a").card_data.license == "mit"


def test_who_may_what(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.tokens, hub.readers = {"writer"}, {"reader"}
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("me/a")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password") as error:
        HfApi().create_repo("me/b")
    assert error.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        HfApi(token="nobody").create_repo("me/b")
    reader = HfApi(token="reader")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert reader.model_info("me/a").sha == hub.commits["me/a"]
    for attempt in (
        lambda: reader.create_repo("me/b"),
        lambda: reader.create_branch("me/a", branch="b"),
        lambda: reader.create_commit("me/a", [add("README.md", CARD)], commit_message="m"),
        lambda: reader.create_commit("me/a", [CommitOperationDelete("config.json")], commit_message="m"),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights to write") as error:
            attempt()
        assert error.value.response.status_code == 403
    assert (set(hub.repos), hub.repos["me/a"], hub.branches["me/a"]) == ({"me/a"}, MAIN, {})
    hub.use(monkeypatch, tmp_path / "cache", "writer")
    assert HfApi().whoami()["auth"]["accessToken"]["role"] == "write"
    made = commit([add("model.safetensors", b"new")])
    assert hub.commits["me/a"] == made.oid
    assert {request.authorization for request in hub.asked("PUT")} == {None}  # a signed address needs no token


def test_a_full_repository(hub: LoopbackHub) -> None:
    hub.quota = len(WEIGHTS) + 10
    commit([add("small.bin", b"1234567")])
    with pytest.raises(HfHubHTTPError) as error:
        commit([add("large.bin", b"8")])
    message = "Private repository storage limit reached, please upgrade your plan"
    assert error.value.response.headers["X-Error-Message"] == message
    assert error.value.response.json() == {"error": message}
    assert f"403 Forbidden: {message}." in str(error.value)
    assert "large.bin" not in hub.repos["me/a"]


@pytest.mark.parametrize(("kind", "made"), [("hangup", False), ("lost", True)])
def test_an_answer_that_never_comes(hub: LoopbackHub, kind: str, made: bool) -> None:
    before = hub.commits["me/a"]
    hub.faults.append(Fault(kind, path="/commit/", method="POST"))
    with pytest.raises(Exception, match="Server disconnected without sending a response"):
        commit([add("config.json", b"new"), add("model.safetensors", WEIGHTS[5:])], parent_commit=before)
    assert [c.title for c in hub.log("me/a")] == ["a title", "put"][not made :]
    assert stored()["config.json"] == (b"new" if made else b"{}")
    assert len(hub.asked("POST", "/commit/")) == 1


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/lfs/", "/objects/verify"])
@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=429, headers={"Retry-After": "7"}), Fault("hangup"), Fault("lost")]
)
def test_a_busy_hub_gets_it_at_the_second_time(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, path: str, fault: Fault
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.faults.append(Fault(fault.kind, fault.status, fault.headers, path))
    commit([add("model.safetensors", WEIGHTS[6:])])
    assert hub.repos["me/a"]["model.safetensors"] == WEIGHTS[6:]
    assert [fault.times for fault in hub.faults] == [0]
    assert waits == [8.0 if fault.status == 429 else 1.0]


def test_the_client_asks_once_for_a_repository_and_for_a_commit(hub: LoopbackHub) -> None:
    busy = {"status": 429, "headers": {"Retry-After": "7"}}
    hub.faults += [Fault(path="/repos/create", **busy), Fault(path="/commit/", **busy)]
    for attempt in (lambda: HfApi().create_repo("me/b"), lambda: commit([add("config.json", b"new")])):
        with pytest.raises(HfHubHTTPError, match="429 Too Many Requests") as error:
            attempt()
        assert error.value.response.headers["Retry-After"] == "7"
    assert (set(hub.repos), hub.repos["me/a"]) == ({"me/a"}, MAIN)


def test_sixteen_writers(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    look = hub.at

    def slowly(*place: str) -> tuple[str, dict[str, bytes]]:
        """Long enough between the look at the head and the commit that a missing lock is noticed."""
        found = look(*place)
        time.sleep(0.003)
        return found

    monkeypatch.setattr(hub, "at", slowly)

    def write(number: int) -> str:
        name = f"model-{number}.safetensors"
        return str(commit([add(name, WEIGHTS[number:]), add(f"{number}.txt", b"%d" % number)]).oid)

    def race(number: int) -> int:
        try:
            commit([add("config.json", b"%d" % number)], parent_commit=head)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(16) as pool:
        shas = list(pool.map(write, range(16)))
        assert len(set(shas)) == 16
        assert len(hub.log("me/a")) == 17
        expected = {f"model-{i}.safetensors": WEIGHTS[i:] for i in range(16)} | {
            f"{i}.txt": b"%d" % i for i in range(16)
        }
        assert stored() == {**MAIN, **expected}
        head = hub.commits["me/a"]
        assert sorted(pool.map(race, range(16))) == [200] + [412] * 15
    assert len(hub.log("me/a")) == 18


def test_transformers_loads_what_was_pushed(hub: LoopbackHub, rm: Callable[..., Path], tmp_path: Path) -> None:
    folder = rm("warm", seed=3, shards=2)
    HfApi().create_repo("me/warm")
    HfApi().upload_folder(repo_id="me/warm", folder_path=folder)
    code = (
        "import json, warnings; warnings.simplefilter('error')\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "model, info = Auto.from_pretrained('me/warm', num_labels=1, output_loading_info=True)\n"
        "print(json.dumps([model.score.weight.tolist(), sorted(map(list, info.values()))]))"
    )
    environment = os.environ | hub.environment(tmp_path / "other")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    score, problems = json.loads(result.stdout)
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["score.weight"]
    with safe_open(folder / shard, "pt") as file:
        assert score == file.get_tensor("score.weight").tolist()
    assert not any(problems)


def test_the_hf_command_uploads_and_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    files = {"README.md": CARD, "model.safetensors": WEIGHTS, "sub/notes.txt": b"notes"}
    for name, data in files.items():
        (source / name).write_bytes(data)
    environment = os.environ | hub.environment(tmp_path / "other") | {"HF_TOKEN": "writer"}
    hub.tokens = {"writer"}
    command = str(Path(sys.executable).parent / "hf")
    for arguments in (
        ["upload", "me/new", str(source), "--private", "--commit-message", "by hand"],
        ["download", "me/new", "--local-dir", str(target)],
    ):
        result = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert hub.private["me/new"]
    assert [c.title for c in hub.log("me/new")] == ["by hand", "initial commit"]
    assert {name: (target / name).read_bytes() for name in files} == files
