"""A repository on the Hub at one commit: headers by ranged requests, whole files only once they are needed."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from warmerge.errors import RefusedError, RemoteError, UsageError, plain, some
from warmerge.weights.folder import Folder, LocalFolder, hidden_templates, open_folder
from warmerge.weights.remote.asking import ATTEMPTS, Place, ask
from warmerge.weights.remote.ranges import PATIENCE, fill, is_small

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})")
_NOT_IN_REVISIONS = re.compile(r"\.\.|//|^/|/$|@\{|[\s\\~^:?*\[\x00-\x1f\x7f]")


def parse_hub_id(spec: str) -> tuple[str, str | None]:
    """Repository and revision of `org/name`, `org/name@revision`, `hf://org/name` or `hf://org/name@revision`.

    Raises:
        UsageError: it is none of these.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, at, revision = spec.removeprefix("hf://").partition("@")
    try:
        validate_repo_id(repo)
        valid = not spec.startswith(("hf://models/", "hf://datasets/", "hf://spaces/"))
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"no local folder {spec!r}, and not a Hub id (org/name or org/name@revision); check the path")
    if at and (not revision or _NOT_IN_REVISIONS.search(revision)):
        raise UsageError(f"{plain(spec)}: what follows the '@' must be a branch, a tag or a commit of {repo}")
    return repo, revision or None


def is_branch(name: str) -> bool:
    """Whether this can be a branch's name: no commit, no reference to something else, nothing that git forbids.

    >>> [is_branch(name) for name in ("v2", "me/trial", "", "a b", "refs/pr/1", "0" * 40)]
    [True, True, False, False, False, False]
    """
    other = name.startswith("refs/") or _COMMIT.fullmatch(name)
    return bool(name) and not other and not _NOT_IN_REVISIONS.search(name)


@dataclass(frozen=True)
class HubFolder:
    """The files in the root of a Hub repository at one commit; `asked` is the revision that the user gave.

    `streamed`: nothing of it is put in the Hub's cache, small files neither.
    """

    label: str
    repo: str
    revision: str
    files: Mapping[str, int]
    asked: str | None = None
    streamed: bool = False
    starts: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def identity(self) -> str:
        return f"hf://{self.repo}@{self.revision}"

    @property
    def place(self) -> Place:
        return Place(self.label, self.repo, self.asked, self.revision)

    @property
    def far(self) -> bool:
        return True

    def sizes(self) -> Mapping[str, int]:
        return self.files

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with exactly those bytes of `file`.

        Raises:
            RefusedError: the file has fewer bytes than that.
            RemoteError: the Hub did not give them.
        """
        HubReader(self, ATTEMPTS).readinto(file, offset, buffer)

    def reader(self, pause: Callable[[float], object] | None = None) -> HubReader:
        return HubReader(self, PATIENCE, pause)

    def refuse_changed(self, files: Iterable[str]) -> None:
        """A commit does not change."""


@dataclass(frozen=True)
class HubReader:
    """Ranges of one repository's files, each range tried `attempts` times; `pause` waits between two tries."""

    folder: HubFolder
    attempts: int
    pause: Callable[[float], object] | None = None

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """As `HubFolder.readinto`."""
        folder = self.folder
        if is_small(file, folder.files[file]) and not folder.streamed and file not in folder.starts:
            folder.starts[file] = self._cached(file)
        fill(folder.label, folder.files, folder.starts, self._fetch, file, offset, buffer)

    def close(self) -> None:
        """Nothing is held between two requests."""

    def _cached(self, file: str) -> bytes:
        from huggingface_hub import constants, hf_hub_download

        repo, commit = self.folder.repo, self.folder.revision

        def path() -> str:
            return str(hf_hub_download(repo, file, revision=commit, endpoint=constants.ENDPOINT))

        data = Path(ask(path, self.folder.place, attempts=1)).read_bytes()  # it tries again by itself
        if len(data) != self.folder.files[file]:
            raise _wrong_size(self.folder, [file])
        return data

    def _fetch(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills the buffer; a request that breaks is taken up where it broke."""
        done = received = 0

        def rest() -> None:
            nonlocal done, received
            for chunk in _requested(self.folder, file, offset + done, len(buffer) - done):
                if done + len(chunk) > len(buffer):
                    done = 0
                    raise ConnectionError("more bytes than were asked for")
                buffer[done : done + len(chunk)] = chunk
                done, received = done + len(chunk), max(received, done + len(chunk))
            if done < len(buffer):
                raise ConnectionError("fewer bytes than were asked for")

        ask(rest, self.folder.place, attempts=self.attempts, progress=lambda: received, pause=self.pause)


def _requested(folder: HubFolder, file: str, offset: int, length: int) -> Iterator[bytes]:
    """The server's answer to one request, in pieces. One that is not these bytes is not received."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    last, size = offset + length - 1, folder.files[file]
    url = f"{constants.ENDPOINT}/{folder.repo}/resolve/{folder.revision}/{quote(file)}"
    parts = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    headers = build_hf_headers(library_name="warmerge") | parts
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        sent = response.headers.get("Content-Range", "the whole file")
        if not (response.status_code == 200 and length == size) and not (
            response.status_code == 206 and sent in (f"bytes {offset}-{last}/{size}", f"bytes {offset}-{last}/*")
        ):
            what = f"bytes {offset}-{last}/{size} were asked for, the server sent {plain(sent)}"
            then = f"run `hf download {folder.repo} --revision {folder.revision}` and merge the folder that it prints"
            raise RemoteError(f"{plain(folder.label)}/{plain(file)}: {what} (status {response.status_code}); {then}")
        yield from response.iter_raw()


def open_hub(label: str, *, streamed: bool = False) -> Folder:
    """The repository that `label` names, at the commit that its revision stands for now. One request.

    With HF_HUB_OFFLINE set it is the copy in the Hub's cache.

    Args:
        label: `org/name`, `org/name@revision`, or either with `hf://` before it.
        streamed: nothing is to be put in the Hub's cache.

    Raises:
        UsageError: `label` cannot be a Hub id, or there is no such model.
        RemoteError: the Hub cannot be reached, or does not let us read it.
        RefusedError: transformers would apply a chat template of a sub-folder.
    """
    repo, asked = parse_hub_id(label)
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(label, repo, asked)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    api = HfApi(endpoint=constants.ENDPOINT, library_name="warmerge")
    place = Place(label, repo, asked)
    info = ask(lambda: api.model_info(repo, revision=asked, files_metadata=True, timeout=timeout), place)
    files = [(f.rfilename, f.lfs.size if f.lfs else f.size) for f in info.siblings or []]
    sizes = {name: size for name, size in files if isinstance(name, str) and "/" not in name}
    told = isinstance(info.sha, str) and _COMMIT.fullmatch(info.sha) and all(isinstance(name, str) for name, _ in files)
    known = {name: size for name, size in sizes.items() if type(size) is int and size >= 0}
    if not told or len(known) < len(sizes):
        what = "does not tell the commit, the files' names and their sizes as the Hub does"
        raise RemoteError(f"{plain(label)}: {constants.ENDPOINT} {what}; check HF_ENDPOINT and the proxy")
    if hidden := hidden_templates(label, (name for name, _ in files)):
        raise RefusedError(hidden)
    return HubFolder(label, repo, str(info.sha), known, asked, streamed)


def download(folder: Folder, files: list[str]) -> Folder:
    """`folder` with these files of it on this machine, in the Hub's cache. What is there already is not asked for.

    Raises:
        RemoteError: a file could not be had, or is not of the announced size.
    """
    if not isinstance(folder, HubFolder):
        return folder
    from huggingface_hub import constants, snapshot_download

    repo, commit, patterns = folder.repo, folder.revision, [glob.escape(file) for file in files]

    def path() -> str:
        return str(snapshot_download(repo, revision=commit, allow_patterns=patterns, endpoint=constants.ENDPOINT))

    snapshot = Path(ask(path, folder.place, attempts=1))  # it tries again by itself
    local = open_folder(snapshot, folder.label)
    found = local.sizes()
    # When the connection goes, snapshot_download may return a folder that holds only a part of the files.
    if missing := [file for file in files if file not in found]:
        raise RemoteError(f"{plain(folder.label)}: {some(missing)} could not be had; check the network and try again")
    if wrong := [file for file in files if found[file] != folder.files[file]]:
        raise _wrong_size(folder, wrong)
    _remember(snapshot, folder)
    return local


def revision_of(folder: Folder) -> dict[str, str]:
    """{"repo": ..., "revision": commit} of what came from the Hub, also by way of its cache; else {}."""
    if isinstance(folder, HubFolder):
        return {"repo": folder.repo, "revision": folder.revision}
    end = "/".join(folder.path.parts[-3:]) if isinstance(folder, LocalFolder) else ""
    match = _SNAPSHOT.fullmatch(end)
    return {"repo": match[1].replace("--", "/"), "revision": match[2]} if match else {}


def _open_cached(label: str, repo: str, asked: str | None) -> LocalFolder:
    from huggingface_hub import try_to_load_from_cache

    what = "is no local folder, and not in the Hub's cache"
    for file in ("config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(repo, file, revision=asked)
        if isinstance(found, str):
            folder = open_folder(Path(found).parent, label)
            if any(name.endswith((".safetensors", ".bin")) for name in folder.sizes()):
                return folder
            what = "is in the Hub's cache without its weights"
    raise RemoteError(f"{plain(label)} {what}; without --offline and HF_HUB_OFFLINE it is downloaded")


def _remember(snapshot: Path, folder: HubFolder) -> None:
    """Notes in the Hub's cache which commit the revision stood for, so that offline it is found by that name."""
    if _COMMIT.fullmatch(folder.asked or ""):
        return
    ref = snapshot.parent.parent / "refs" / (folder.asked or "main")
    fresh = ref.with_name(f"{ref.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written to serves as well
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(folder.revision)
        fresh.replace(ref)


def _wrong_size(folder: HubFolder, files: list[str]) -> RemoteError:
    what = f"{some(files)} in the Hub's cache is not of the size that the Hub announces"
    return RemoteError(f"{plain(folder.label)}: {what}; run `hf cache rm model/{folder.repo}` and try again")
