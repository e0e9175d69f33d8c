"""Where a checkpoint's bytes come from. A folder here; the Hub's counterpart is in remote/."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted

# What is read whole, configs and tokenizers: the largest tokenizers that are in use have 60 MB.
WHOLE_LIMIT = 100_000_000
TEMPLATES = "additional_chat_templates"


class Folder(Protocol):
    """A flat set of files that can be read at any position."""

    @property
    def label(self) -> str:
        """The name that the user knows it by."""

    @property
    def identity(self) -> str:
        """Equal for two folders only when they are the same checkpoint."""

    @property
    def far(self) -> bool:
        """Whether each read is a request over a network: worth asking for much, early, and for several at once."""

    def sizes(self) -> Mapping[str, int]:
        """File name -> size in bytes."""

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills the whole buffer; RefusedError when the file is shorter or changed since it was first seen."""

    def reader(self, pause: Callable[[float], object] | None = None) -> Reader:
        """A reader for one thread. `pause` waits between two tries, and returns something true to give up."""

    def refuse_changed(self, files: Iterable[str]) -> None:
        """RefusedError if a file is not what it was when the folder was opened."""


class Reader(Protocol):
    """Reads one folder's files, again and again, from one thread."""

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """As `Folder.readinto`."""

    def close(self) -> None:
        """Gives back what it holds."""


def read_bytes(folder: Folder, file: str, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file: `length` of them from `offset`, or all that follow it.

    Raises:
        RefusedError: no length is given, and over 100 MB would be read.
    """
    size = folder.sizes()[file] - offset if length is None else length
    if length is None and size > WHOLE_LIMIT:
        what = f"has {size:,} bytes; a config or a tokenizer has {WHOLE_LIMIT:,} at most: it is damaged, or hostile"
        raise RefusedError([Finding(f"{folder.label}/{file}", what)])
    buffer = bytearray(size)
    folder.readinto(file, offset, memoryview(buffer))
    return bytes(buffer)


class FileState(NamedTuple):
    """What must stay the same in a file while it is being merged."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine's file system, as it was when it was opened."""

    label: str
    path: Path
    states: Mapping[str, FileState]

    @property
    def identity(self) -> str:
        return str(self.path)

    @property
    def far(self) -> bool:
        return False

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    @functools.cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Made once: it is asked for every tensor."""
        return {name: state.size for name, state in self.states.items()}

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `file`, by positional reads: no mmap, so a truncated file is an error, not a signal."""
        reader = LocalReader(self)
        try:
            reader.readinto(file, offset, buffer)
        finally:
            reader.close()
        self.refuse_changed([file])

    def reader(self, pause: Callable[[float], object] | None = None) -> LocalReader:
        return LocalReader(self)

    def refuse_changed(self, files: Iterable[str]) -> None:
        """RefusedError if one of these files is not as it was when the folder was opened.

        A file that is replaced while it is read is read on as it was; one that is written into would give a mixture,
        so what was read counts only once this has been asked afterwards.
        """
        for file in files:
            try:
                unchanged = _state((self.path / file).stat()) == self.states[file]
            except FileNotFoundError:
                unchanged = False
            if not unchanged:
                raise self.changed(file)

    def changed(self, file: str) -> RefusedError:
        what = "changed while it was read (size, time or inode), or was removed; merge it when it is still"
        return RefusedError([Finding(f"{self.label}/{file}", what)])


class LocalReader:
    """Keeps the last file open: tiles of one tensor follow each other, and each call less is a wait less for others."""

    def __init__(self, folder: LocalFolder) -> None:
        self.folder = folder
        self.file: str | None = None
        self.descriptor = -1

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        try:
            if file != self.file:
                self._open(file)
            done = os.preadv(self.descriptor, [buffer], offset) if len(buffer) else 0
            while done < len(buffer):
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise self.folder.changed(file)
                done += count
        except FileNotFoundError:
            raise self.folder.changed(file) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.folder.label}/{file}") from error

    def close(self) -> None:
        if self.file is not None:
            os.close(self.descriptor)
            self.file = None

    def _open(self, file: str) -> None:
        self.close()
        descriptor = os.open(self.folder.path / file, os.O_RDONLY)
        if _state(os.fstat(descriptor)) != self.folder.states[file]:
            os.close(descriptor)
            raise self.folder.changed(file)
        self.file, self.descriptor = file, descriptor


def open_folder(path: Path, label: str) -> LocalFolder:
    """The files of a folder, sub-folders left out.

    Raises:
        UsageError: `path` is not a folder.
        RefusedError: a file in it is a link that leads out of it (the Hub cache's own links are followed); a sub-folder
            holds the chat template that transformers would apply.
    """
    root = path.resolve()
    if not root.is_dir():
        raise UsageError(f"{plain(label)}: no such folder")
    states, findings = {}, []
    for entry in sorted(root.iterdir()):
        if not entry.is_file():
            if entry.is_symlink() and not entry.exists():
                findings.append(Finding(f"{label}/{entry.name}", "is a link to nothing; download the file again"))
            continue
        target = entry.resolve()
        if target.parent != root and target.parent != _hub_blobs(root):
            findings.append(
                Finding(
                    f"{label}/{entry.name}", f"is a link out of its folder, to {quoted(str(target))}; copy the file"
                )
            )
            continue
        states[entry.name] = _state(entry.stat())
    templates = (f"{TEMPLATES}/{file.name}" for file in (root / TEMPLATES).glob("*.jinja"))
    findings += hidden_templates(label, [*states, *templates])
    if findings:
        raise RefusedError(findings)
    return LocalFolder(label, root, states)


def hidden_templates(label: str, names: Iterable[str]) -> list[Finding]:
    """What is wrong where transformers would apply a chat template of a sub-folder, which nothing here looks at.

    Templates for other uses than plain conversations are left alone: they decide no reward.

    >>> hidden_templates("m", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
    []
    >>> print(*(found.where for found in hidden_templates("m", ["additional_chat_templates/default.jinja"])))
    m/additional_chat_templates/default.jinja
    """
    found, default = set(names), f"{TEMPLATES}/default.jinja"
    templates = sorted(name for name in found if name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja"))
    if default not in found and (not templates or "chat_template.jinja" in found):
        return []
    where = default if default in found else templates[0]
    what = (
        "takes the place of the chat template beside the weights when transformers loads the tokenizer; save the one "
        f"that is meant as chat_template.jinja beside the weights, and move {TEMPLATES}/ away"
    )
    return [Finding(f"{label}/{where}", what)]


def _state(stat: os.stat_result) -> FileState:
    return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ino)


def _hub_blobs(root: Path) -> Path | None:
    """The Hub cache keeps <repo>/snapshots/<commit>/file as a link to <repo>/blobs/<hash>."""
    return root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
