"""A folder in an object store (s3://, gs://, az:// and what else fsspec knows): read where it is, by ranges."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from warmerge.errors import Finding, RefusedError, RemoteError, UsageError, WarmergeError, plain
from warmerge.weights.remote.asking import ATTEMPTS
from warmerge.weights.remote.ranges import PATIENCE, fill, is_small

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 32.0
# http:// is left out: a web server lists no files. One letter is a drive of Windows.
_STORE = re.compile(r"(?!hf:|https?:)([a-z][a-z0-9+.-]+)://(?!.*::)")
_SECRETS = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@|\?[^\s\"']*")
_S3 = ("s3", "s3a")
_PACKAGES = dict.fromkeys(_S3, ("s3fs", "'warmerge[s3]'"))
_PACKAGES |= dict.fromkeys(("gs", "gcs"), ("gcsfs", "'warmerge[gs]'"))
_PACKAGES |= dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", "adlfs"))
# What the stores call that which tells one version of a file from another.
_VERSION = ("ETag", "etag", "generation", "VersionId", "LastModified", "last_modified", "updated", "mtime", "created")
_QUIET = logging.NullHandler()
_T = TypeVar("_T")


class ObjectState(NamedTuple):
    """What must stay the same in a file while it is being merged."""

    size: int
    version: tuple[str, ...]


def is_store(spec: str) -> bool:
    """Whether `spec` is an address in an object store.

    >>> [is_store(spec) for spec in ("s3://bucket/rm", "hf://org/rm", "org/rm", "C://rm", "https://host/rm")]
    [True, False, False, False, False]
    """
    return _STORE.match(spec) is not None


@dataclass(frozen=True)
class StoreFolder:
    """The files right under one address, as they were when it was opened; `system` is fsspec's, `path` its name."""

    label: str
    identity: str
    states: Mapping[str, ObjectState]
    system: Any = field(repr=False, compare=False)
    path: str
    starts: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def far(self) -> bool:
        return True

    def sizes(self) -> Mapping[str, int]:
        return {name: state.size for name, state in self.states.items()}

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with exactly those bytes of `file`.

        Raises:
            RefusedError: the file is shorter, or was changed or removed.
            RemoteError: the store did not give them.
        """
        StoreReader(self, ATTEMPTS).readinto(file, offset, buffer)

    def reader(self, pause: Callable[[float], object] | None = None) -> StoreReader:
        return StoreReader(self, PATIENCE, pause or time.sleep)

    def refuse_changed(self, files: Iterable[str]) -> None:
        """RefusedError if one of these files is not as it was when the folder was opened. One request."""
        try:
            now = _ask(lambda: _listed(self.system, self.path), self.label, PATIENCE)
        except UsageError:
            now = {}
        for file in files:
            if now.get(file) != self.states[file]:
                what = "changed while it was read (size, version or time), or was removed; merge it when it is still"
                raise RefusedError([Finding(f"{self.label}/{file}", what)])


@dataclass(frozen=True)
class StoreReader:
    """Ranges of one folder's files, each range tried `attempts` times; `pause` waits between two tries."""

    folder: StoreFolder
    attempts: int
    pause: Callable[[float], object] = time.sleep

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """As `StoreFolder.readinto`."""
        fill(self.folder.label, self.folder.sizes(), self.folder.starts, self._fetch, file, offset, buffer)

    def close(self) -> None:
        """Nothing is held between two requests."""

    def _fetch(self, file: str, start: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        folder, path, stop = self.folder, f"{self.folder.path}/{file}", start + len(buffer)
        try:
            data: bytes = _ask(
                lambda: folder.system.cat_file(path, start=start, end=stop), folder.label, self.attempts, self.pause
            )
        except WarmergeError as error:
            if _trouble(error.__cause__) in ("missing", "invalid"):  # perhaps it is no longer there, or not so long
                folder.refuse_changed([file])
            raise
        if len(data) != stop - start:
            folder.refuse_changed([file])
            what = f"{stop - start} bytes were asked for, the store sent {len(data)}; copy the folder here and merge it"
            raise RemoteError(f"{plain(folder.label)}/{plain(file)}: {what}")
        if is_small(file, folder.states[file].size):  # weights are looked at again when all of them have been read
            folder.refuse_changed([file])
        buffer[:] = data


def open_store(url: str) -> StoreFolder:
    """The folder at `url`, such as `s3://bucket/runs/1`. One request; sub-folders are left out.

    Raises:
        UsageError: there is no such folder, it is a single file, or a package for its kind of store is missing.
        RemoteError: the store cannot be reached, or does not let us read it.
    """
    scheme, label = url.partition("://")[0], _SECRETS.sub("", url).rstrip("/")
    if scheme in ("file", "local"):
        raise UsageError(f"{plain(label)} is on this machine; give its path without {scheme}://")
    if label != url.rstrip("/"):
        what = "leave the password, or what follows the '?', out of the address: it would be written into warmerge.json"
        raise UsageError(f"{plain(label)}: {what}; give it to fsspec by its configuration or environment")
    system, path = _file_system(url, scheme, label)
    attempts = ATTEMPTS if scheme in _S3 else 1  # the packages for other stores try again by themselves
    states = _ask(lambda: _listed(system, path), label, attempts)
    if not states and _ask(lambda: system.isfile(path), label, attempts):
        raise UsageError(f"{plain(label)} is a single file; give the folder that it is in")
    if unknown := [name for name, state in states.items() if not state.version]:
        what = f"{scheme}:// does not tell when {plain(unknown[0])} was changed; copy the folder here and merge it"
        raise RemoteError(f"{plain(label)}: {what}")
    if wrong := [name for name, state in states.items() if type(state.size) is not int or state.size < 0]:
        told = states[wrong[0]].size
        what = f"{scheme}:// tells {told!r} as its size, expected a number of bytes; copy the folder here"
        raise RemoteError(f"{plain(label)}/{plain(wrong[0])}: {what}")
    digest = hashlib.sha256(repr(sorted(states.items())).encode(errors="surrogatepass")).hexdigest()
    return StoreFolder(label, f"{label}@{digest[:40]}", states, system, path)


def _file_system(url: str, scheme: str, label: str) -> tuple[Any, str]:
    """fsspec's file system for this kind of store, and the folder's name in it. Nothing is asked for yet."""
    import fsspec

    for package in ("gcsfs", "azure"):  # what they write on stderr is said in the error, in one sentence
        logging.getLogger(package).addHandler(_QUIET)
    try:
        # The option sets our client for S3, which takes half a second to make, apart from that of others.
        system, path = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if scheme in _S3 else {}))
    except ImportError as error:
        needed = "{}: pip install {}".format(*_PACKAGES[scheme]) if scheme in _PACKAGES else f"a package ({error})"
        raise UsageError(f"{plain(label)}: {scheme}:// needs {needed}") from error
    except Exception as error:
        raise _explained(error, label) from error
    if scheme in _S3:
        # Its client would try five times, and s3fs that five times; `_ask` tries again, and can be stopped.
        system.retries = 1
        system.config_kwargs = {"retries": {"total_max_attempts": 1}} | system.config_kwargs
    return system, str(path).rstrip("/")


def _listed(system: Any, path: str) -> dict[str, ObjectState]:
    """The files right under `path`, as they are now."""
    system.invalidate_cache()
    return {
        entry["name"][len(path) + 1 :]: ObjectState(
            entry.get("size"), tuple(f"{key} {entry[key]}" for key in _VERSION if entry.get(key))
        )
        for entry in system.ls(path, detail=True)
        if entry["type"] == "file" and entry["name"].rstrip("/") != path and "/" not in entry["name"][len(path) + 1 :]
    }


def _ask(request: Callable[[], _T], label: str, attempts: int, pause: Callable[[float], object] = time.sleep) -> _T:
    """What `request` returns, asked again as long as that may help; where `pause` returns something true, no longer.

    Raises:
        UsageError: there is no such file or folder.
        RemoteError: anything else that the store or the network says.
    """
    tried = 0
    while True:
        try:
            return request()
        except Exception as error:  # each store has errors of its own, without a common root
            tried += 1
            wait = min(_FIRST_WAIT * 2 ** (tried - 1), _LONGEST_WAIT)
            if tried >= attempts or _trouble(error) or pause(wait):
                raise _explained(error, label) from error


def _trouble(error: BaseException | None) -> str:
    """What is wrong with the request, by what the stores' packages raise; "" where asking again may help."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    said = str(error) if isinstance(error, ValueError) else type(error).__name__
    if re.search("credential|authenticat", said, re.IGNORECASE):
        return "no credentials"
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return "forbidden"
    return "invalid" if isinstance(error, ValueError) or getattr(error, "errno", None) == errno.EINVAL else ""


def _explained(error: Exception, label: str) -> WarmergeError:
    """One sentence, with what the store said, but without the secrets that an address in it may hold."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = plain(_SECRETS.sub("", text).strip().partition("\n")[0].rstrip(".!")) or type(error).__name__
    log_in = "log in as the store's own tool wants it (aws, gcloud, az)"
    trouble = _trouble(error)
    if trouble == "missing":
        return UsageError(f"{plain(label)}: there is no such bucket or folder; check the name")
    if trouble == "no credentials":
        then = f"{log_in}, or for a public bucket on S3 set FSSPEC_S3_ANON=true"
        return RemoteError(f"{plain(label)} cannot be read without credentials ({said}); {then}")
    if trouble == "forbidden":
        then = f"your credentials must allow to list and to read; check them, or {log_in} anew"
        return RemoteError(f"{plain(label)} cannot be read: {said}; {then}")
    return RemoteError(f"{plain(label)} cannot be read: {said}; check the network, the endpoint and the region")
