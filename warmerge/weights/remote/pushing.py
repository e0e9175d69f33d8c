"""Put files into a repository on the Hub: what is there, what would change, one commit."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmerge.errors import RemoteError, UsageError, plain
from warmerge.weights.remote.asking import ATTEMPTS, Place, ask, status_of
from warmerge.weights.remote.reading import parse_hub_id

# Another commit was made since the one that this one was to follow.
_MOVED = 412
# The Hub keeps files above 10 MB as large ones.
_NEVER_SMALL = 20 * 2**20
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Target:
    """A model repository as it is: `head` is the commit that `revision` stands for, None where there is none yet.

    `digests`: file -> sha256 of a large file, git's sha1 of a small one, as the Hub lists them. `new_branch`: the
    revision is to be made, from `head`.
    """

    repo: str
    revision: str | None
    exists: bool
    private: bool
    head: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    new_branch: bool = False

    @property
    def url(self) -> str:
        """The address of its page."""
        return page(self.repo) + (f"/tree/{self.revision}" if self.revision else "")

    @property
    def place(self) -> Place:
        return Place(self.repo, self.repo, self.revision, writing=True)


@dataclass(frozen=True)
class Change:
    """What a commit would do: files to add or replace, files to delete; `unchanged` are there already."""

    additions: tuple[Any, ...]
    deletions: tuple[str, ...]
    unchanged: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return not self.additions and not self.deletions

    @property
    def nbytes(self) -> int:
        """Bytes of what is to be added."""
        return sum(int(addition.upload_info.size) for addition in self.additions)


@dataclass(frozen=True)
class Published:
    """Where it is now: an address for people, and the commit."""

    url: str
    commit: str


def full_name(repo: str) -> str:
    """`repo` with the owner before it: the user whose token this is, where none is given.

    Raises:
        UsageError: it cannot be a repository's name.
        RemoteError: there is no token, or the Hub does not accept it.
    """
    name, revision = parse_hub_id(repo)
    if revision is not None:
        raise UsageError(f"{plain(repo)}: give the branch with --revision {revision}, not with an '@'")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("push needs the Hub: leave out --offline, and unset HF_HUB_OFFLINE")
    if get_token() is None:
        log_in = "log in with `hf auth login`, or set HF_TOKEN"
        raise RemoteError(f"{plain(name)} cannot be written without a token; {log_in}")
    if "/" in name:
        return name
    owner = ask(lambda: _api().whoami(), Place(name, name, writing=True))
    return f"{owner['name']}/{name}"


def look(repo: str, revision: str | None, private: bool | None) -> Target:
    """The repository as it is; where there is none, as it would be made.

    Args:
        private: as the user wants it; None keeps what is there, and makes new ones private.

    Raises:
        UsageError: it exists, and is not as private as the user wants it.
        RemoteError: the Hub does not let us see it.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    missing = False

    def info() -> Any:
        nonlocal missing
        try:
            return _api().model_info(repo, revision=revision, files_metadata=True)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            if status_of(error) == 404:
                return None
            raise
        except RevisionNotFoundError:
            missing = True
            return _api().model_info(repo, files_metadata=True)

    found = ask(info, Place(repo, repo, revision, writing=True))
    if found is None:
        return Target(repo, revision, exists=False, private=private is not False)
    if private is not None and private != bool(found.private):
        is_, wanted = ("private", "public") if found.private else ("public", "private")
        where = f"{_api().endpoint}/{repo}/settings"
        raise UsageError(f"{repo} exists and is {is_}; make it {wanted} at {where}, or leave out --{wanted}")
    digests = {f.rfilename: str(f.lfs.sha256 if f.lfs else f.blob_id) for f in found.siblings or []}
    if not isinstance(found.sha, str | None) or not all(isinstance(name, str) for name in digests):
        what = "does not tell the commit and the files' names as the Hub does; check HF_ENDPOINT and the proxy"
        raise RemoteError(f"{repo}: {_api().endpoint} {what}")
    return Target(repo, revision, True, bool(found.private), found.sha, digests, missing)


def change(
    target: Target, files: Mapping[str, Path | bytes], stale: Iterable[str], progress: Callable[[int], None]
) -> Change:
    """What has to be done for these files to be there, and those of `stale` that are there not to be.

    Reads every file once, to know it by its digest; `progress` is called with the bytes of each that is on the disk.
    """
    from huggingface_hub import CommitOperationAdd

    additions, unchanged = [], []
    for name, content in sorted(files.items()):
        added = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        if isinstance(content, Path):
            progress(int(added.upload_info.size))
        if target.digests.get(name) in _digests(added):
            unchanged.append(name)
        else:
            additions.append(added)
    gone = sorted(name for name in target.digests if name in set(stale))
    return Change(tuple(additions), tuple(gone), tuple(unchanged))


def commit(target: Target, change: Change, message: str, create_pr: bool) -> Published:
    """Makes the repository and the branch where they are missing, and one commit of the change.

    A lost connection is tried again; what was uploaded need not be uploaded twice.

    Raises:
        UsageError: the Hub does not accept the model card.
        RemoteError: the repository changed since it was looked at; no write access; no room; no network.
    """
    api, place = _api(), target.place
    ask(lambda: _check_card(change), place)  # before there is a repository, and weights in it
    if not target.exists:
        ask(lambda: api.create_repo(target.repo, private=target.private, exist_ok=True), place)
        target = _made(target)
    elif target.new_branch:
        branch = str(target.revision)
        ask(lambda: api.create_branch(target.repo, branch=branch, revision=target.head, exist_ok=True), place)
    if change.nothing:  # the branch alone
        return Published(target.url, str(target.head))
    revision = target.revision

    def upload() -> None:
        # With a .gitignore of the repository's own, files that it names would be left out without a word.
        api.preupload_lfs_files(
            target.repo, list(change.additions), revision=revision, create_pr=create_pr, gitignore_content=""
        )

    ask(upload, place)
    try:
        # A pull request is asked for once only: if its answer were lost, asking again would make a second one.
        made = ask(lambda: _commit(target, change, message, create_pr), place, attempts=1 if create_pr else ATTEMPTS)
    except RemoteError as error:
        status = status_of(error.__cause__ or error)
        if create_pr and status is None:
            what = f"look at {page(target.repo)}/discussions whether it is there before you run the command again"
            raise RemoteError(f"{target.repo}: no answer came to the pull request; {what}") from error
        if status != _MOVED:
            raise
        now = look(target.repo, revision, None)
        if not _is_there(now, change):
            raise _changed(target) from error
        return Published(target.url, str(now.head))  # it was our own commit, whose answer got lost
    return Published(made.pr_url or target.url, made.oid)


def license_of(repo: str, revision: str | None) -> dict[str, str]:
    """The licence fields of a model card on the Hub; {} where it has none."""
    info = ask(lambda: _api().model_info(repo, revision=revision), Place(repo, repo, revision))
    card = info.card_data
    found = {} if card is None else {key: card.get(key) for key in LICENSE_FIELDS}
    return {key: value for key, value in found.items() if value and isinstance(value, str)}  # a list is no one licence


def page(repo: str) -> str:
    """The address of a repository's page."""
    return f"{_api().endpoint}/{repo}"


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="warmerge")


def _changed(target: Target) -> RemoteError:
    what = "changed on the Hub since this command looked at it; run it again to see what it would replace now"
    return RemoteError(f"{target.repo} {what}")


def _check_card(change: Change) -> None:
    """Asks the Hub whether it would accept README.md; UsageError with its words where not."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    for addition in change.additions:
        if addition.path_in_repo == "README.md":
            with addition.as_file() as file:
                asked = {"content": file.read().decode(errors="replace"), "repoType": "model"}
            headers = build_hf_headers(library_name="warmerge")
            answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked, headers=headers)
            if answer.status_code == 400:
                said = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
                raise UsageError(f"README.md: the Hub does not accept its front matter ({plain(said)}); correct it")
            hf_raise_for_status(answer)


def _made(target: Target) -> Target:
    """The repository that was just made, with its first commit. Asking twice may have made it, or somebody else."""
    api, place = _api(), target.place
    if target.revision is not None:
        ask(lambda: api.create_branch(target.repo, branch=str(target.revision), exist_ok=True), place)
    now = look(target.repo, target.revision, None)
    if now.private != target.private or set(now.digests) - {".gitattributes"}:
        raise _changed(target)
    return now


def _commit(target: Target, change: Change, message: str, create_pr: bool) -> Any:
    from huggingface_hub import CommitOperationDelete

    operations = [*change.additions, *(CommitOperationDelete(name) for name in change.deletions)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warnings while validating metadata", UserWarning)
        return _api().create_commit(
            target.repo, operations, commit_message=message, revision=target.revision, parent_commit=target.head,
            create_pr=create_pr,
        )  # fmt: skip


def _is_there(now: Target, change: Change) -> bool:
    """Whether a repository has everything that the change was to bring, and nothing that it was to delete."""
    added = all(now.digests.get(addition.path_in_repo) in _digests(addition) for addition in change.additions)
    return added and not any(name in now.digests for name in change.deletions)


def _digests(addition: Any) -> set[str]:
    """What the Hub may know the file by: its sha256 if it keeps it as a large one, else git's name for it."""
    size = addition.upload_info.size
    found = {addition.upload_info.sha256.hex()}
    if size <= _NEVER_SMALL:
        with addition.as_file() as file:
            found.add(hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest())
    return found
