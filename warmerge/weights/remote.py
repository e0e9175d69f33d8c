"""Checkpoints on the Hub: headers by ranged requests, whole files only once it is known that they are needed.

The only module that touches the network. A revision is resolved to a commit once, and everything is read at it.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import quote

from warmerge.errors import Finding, RefusedError, RemoteError, UsageError, WarmergeError, plain, some
from warmerge.weights.folder import Folder, LocalFolder, open_folder

# The header of a checkpoint of 2,000 tensors takes 256 KiB: one request shows all of it.
_WINDOW = 256 * 1024
# Configs and tokenizers are fetched whole, through the Hub's own cache.
_SMALL = 50 * 2**20
_ATTEMPTS = 4
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 60.0
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})")
_NOT_IN_REVISIONS = re.compile(r"\.\.|//|^/|/$|@\{|[\s\\~^:?*\[\x00-\x1f\x7f]")
_T = TypeVar("_T")


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


@dataclass(frozen=True)
class HubFolder:
    """The files in the root of a Hub repository at one commit; `asked` is the revision that the user gave."""

    label: str
    repo: str
    revision: str
    files: Mapping[str, int]
    asked: str | None = None
    windows: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def identity(self) -> str:
        return f"hf://{self.repo}@{self.revision}"

    def sizes(self) -> Mapping[str, int]:
        return self.files

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with exactly those bytes of `file`.

        Raises:
            RefusedError: the file has fewer bytes than that.
            RemoteError: the Hub did not give them.
        """
        end = offset + len(buffer)
        if end > self.files[file]:
            what = f"has {self.files[file]} bytes where {end} are needed; it is damaged"
            raise RefusedError([Finding(f"{self.label}/{file}", what)])
        if not file.endswith(".safetensors") and self.files[file] <= _SMALL:
            buffer[:] = self._whole(file)[offset:end]
            return
        start = self._window(file)[offset:end] if offset < _WINDOW else b""
        buffer[: len(start)] = start
        if len(start) < len(buffer):
            _ask(lambda: self._range(file, offset + len(start), buffer[len(start) :]), self)

    def reader(self) -> HubFolder:
        return self

    def close(self) -> None:
        """Nothing is held between two requests."""

    def refuse_changed(self, files: Iterable[str]) -> None:
        """A commit does not change."""

    def _whole(self, file: str) -> bytes:
        from huggingface_hub import constants, hf_hub_download

        def path() -> str:
            return str(hf_hub_download(self.repo, file, revision=self.revision, endpoint=constants.ENDPOINT))

        data = Path(_ask(path, self, attempts=1)).read_bytes()  # it tries again by itself
        if len(data) != self.files[file]:
            raise _wrong_size(self, [file])
        return data

    def _window(self, file: str) -> bytes:
        if file not in self.windows:
            data = bytearray(min(_WINDOW, self.files[file]))
            if data:
                _ask(lambda: self._range(file, 0, memoryview(data)), self)
            self.windows[file] = bytes(data)
        return self.windows[file]

    def _range(self, file: str, offset: int, buffer: memoryview) -> None:
        """One request. If the server answers with anything but these bytes, its answer is not received."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        last, size, done = offset + len(buffer) - 1, self.files[file], 0
        url = f"{constants.ENDPOINT}/{self.repo}/resolve/{self.revision}/{quote(file)}"
        parts = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(library_name="warmerge") | parts
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            sent = response.headers.get("Content-Range", "the whole file")
            if not (response.status_code == 200 and len(buffer) == size) and not (
                response.status_code == 206 and sent in (f"bytes {offset}-{last}/{size}", f"bytes {offset}-{last}/*")
            ):
                what = f"bytes {offset}-{last}/{size} were asked for, the server sent {plain(sent)}"
                then = f"run `hf download {self.repo} --revision {self.revision}` and merge the folder that it prints"
                raise RemoteError(f"{plain(self.label)}/{plain(file)}: {what} (status {response.status_code}); {then}")
            for chunk in response.iter_raw():
                if done + len(chunk) > len(buffer):
                    raise ConnectionError("more bytes than were asked for")
                buffer[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done < len(buffer):
            raise ConnectionError("fewer bytes than were asked for")


def open_hub(label: str) -> Folder:
    """The repository that `label` names, at the commit that its revision stands for now. One request.

    With HF_HUB_OFFLINE set it is the copy in the Hub's cache.

    Raises:
        UsageError: `label` cannot be a Hub id, or there is no such model.
        RemoteError: the Hub cannot be reached, or does not let us read it.
    """
    repo, asked = parse_hub_id(label)
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(label, repo, asked)
    unread, timeout = HubFolder(label, repo, asked or "main", {}, asked), constants.HF_HUB_ETAG_TIMEOUT
    api = HfApi(endpoint=constants.ENDPOINT, library_name="warmerge")
    info = _ask(lambda: api.model_info(repo, revision=asked, files_metadata=True, timeout=timeout), unread)
    sizes = {f.rfilename: f.lfs.size if f.lfs else f.size for f in info.siblings or [] if "/" not in f.rfilename}
    known = {name: size for name, size in sizes.items() if size is not None}
    if not _COMMIT.fullmatch(info.sha or "") or len(known) < len(sizes):
        raise RemoteError(f"{constants.ENDPOINT} does not tell the commit and the files' sizes; check HF_ENDPOINT")
    return HubFolder(label, repo, info.sha or "", known, asked)


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

    snapshot = Path(_ask(path, folder, attempts=1))  # it tries again by itself
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
    raise RemoteError(f"{plain(label)} {what}; unset HF_HUB_OFFLINE to download it")


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


def _ask(request: Callable[[], _T], folder: HubFolder, attempts: int = _ATTEMPTS) -> _T:
    """What `request` returns, asked again a few times when the Hub is busy or the connection breaks."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The root of the HTTP library's errors: that of httpx in huggingface_hub 1, of httpx2 in huggingface_hub 2.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    for attempt in range(attempts):
        try:
            return request()
        except (http_error, OSError, ValueError, KeyError, RuntimeError) as error:
            found = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            status, wait = _status(found), _wait(found)
            broken = status is None and isinstance(found, (http_error, ConnectionError))
            wait = _FIRST_WAIT * 2**attempt if wait is None else wait
            if attempt + 1 == attempts or wait > _LONGEST_WAIT or not (broken or status in _TRY_AGAIN):
                raise _explained(found, folder, broken) from error
        if wait > 5:
            logging.getLogger(__name__).warning("%s: the Hub asks to wait %g s", plain(folder.label), wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, in either of the headers that it uses for it."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after, limit = headers.get("Retry-After", ""), headers.get("RateLimit", "")
    match = re.fullmatch(r"\s*(\d+)\s*", after) or re.search(r"\br=0;t=(\d+)", limit)
    return float(match[1]) if match else None


def _explained(error: BaseException, folder: HubFolder, broken: bool) -> WarmergeError:
    """One sentence. The error's own text, with its addresses and request ids, is left to --debug."""
    from huggingface_hub import constants, errors, get_token

    hub, repo, asked = constants.ENDPOINT, folder.repo, folder.asked or "main"
    status, kind, has_token = _status(error), type(error).__name__, get_token() is not None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):  # first: it is a RepositoryNotFoundError too
        then = "with the account of your token" if has_token else f"and {log_in}"
        what = f"is gated: accept its licence at {hub}/{repo} {then}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        then = "check that your token may read it" if has_token else log_in
        missing = f"no local folder {folder.label!r} and no such model on the Hub"
        return UsageError(f"{missing}; check the name, or if it is private, {then}")
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"has no revision {asked!r}; {hub}/{repo}/tree/main lists its branches and tags"
    elif isinstance(error, errors.DisabledRepoError):
        what = f"has been disabled on the Hub; {hub}/{repo} may say why"
    elif isinstance(error, errors.EntryNotFoundError) and status == 404:
        what = f"lists a file that the Hub does not have; look at {hub}/{repo}/tree/{folder.revision}"
    elif status == 401:
        what = f"cannot be read: the Hub does not accept your token; {log_in} anew, or unset it for a public model"
    elif status == 403:
        what = f"cannot be read: your token may not; give it read access to {repo} at {hub}/settings/tokens"
    elif status == 429:
        wait = _wait(error)
        when = "later" if wait is None else f"in {wait:g} s"
        what = f"cannot be read: too many requests; try again {when}" + ("" if has_token else f", and {log_in}")
    elif status is not None:
        what = f"cannot be read: the Hub answered with status {status}; try again later"
    elif broken:
        what = (
            f"is no local folder, and {hub} cannot be reached ({kind}); check the name and the network, or set "
            "HF_HUB_OFFLINE=1 to use what is in the Hub's cache"
        )
    elif isinstance(error, OSError) and error.errno is not None:
        what = f"cannot be put in the Hub's cache ({error.strerror}); make room, or set HF_HOME to another disk"
    else:
        what = f"cannot be read: {hub} does not answer as the Hub does ({kind}); check HF_ENDPOINT and the proxy"
    return RemoteError(f"{plain(folder.label)} {what}")
