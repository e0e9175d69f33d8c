"""Write a checkpoint folder so that at no moment, whatever happens, there is one that loads and is wrong.

Everything is written in a hidden sibling of OUT. A shard carries the suffix .part and no header until its data is on
the disk; only when all is there do the shards get their names, the index last, and one rename makes it OUT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import UsageError, WarmergeError, naming
from warmerge.locks import take_lock
from warmerge.weights import foreign_json
from warmerge.weights.checkpoint import INDEX, parse_json
from warmerge.weights.kernels import memory
from warmerge.weights.plan import MergePlan, Shard, TensorPlan
from warmerge.weights.safetensors_format import BITS

MANIFEST = "warmerge.json"
_PROGRESS = "progress.json"
_LOCK = ".warmerge.lock"
# A file of its own beside each shard that has a note: in the record, all of them would be written anew with each shard.
_NOTE = ".note.json"


@dataclass(frozen=True)
class Output:
    """The folder being written. `finished` are the shards that are on the disk, each with a note kept for it."""

    out: Path
    partial: Path
    fingerprint: str
    finished: dict[str, Any]
    lock: int

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        return [shard for shard in shards if shard.file not in self.finished]


def made_of(folder: Path) -> list[dict[str, Any]]:
    """What the weights in a folder were made of, by warmerge.json: an entry for each input of a merge or of a new head,
    with its `checkpoint` as it was typed and its `fingerprint`. [] where nothing readable says so."""
    try:
        manifest = foreign_json.parse(foreign_json.text_of(folder / MANIFEST))
        entries = [*manifest.get("inputs", []), *([manifest["input"]] if "input" in manifest else [])]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def check_out(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuses an OUT that would overwrite, or lie in, what is being read.

    Raises:
        UsageError: OUT is a link, a file, an input, inside one, around one, or exists and may not be replaced.
    """
    if out.is_symlink():
        raise UsageError(f"{out} is a link; give the folder itself")
    for written in (out, _partial(out), _old(out)):
        target = written.resolve()
        for folder in (path.resolve() for path in inputs):
            if target == folder or folder in target.parents or target in folder.parents:
                raise UsageError(f"{written} is, lies in, or holds the input {folder}; choose another folder for -o")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; -o takes a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty; choose another folder, or add --overwrite")
    if not (out / MANIFEST).is_file():
        raise UsageError(
            f"{out} was not written by warmerge (no {MANIFEST} in it), so --overwrite leaves it alone; delete it"
        )


def open_output(
    out: Path, plan: MergePlan, fingerprint: str, *, overwrite: bool, resume: bool, extra_bytes: int
) -> Output:
    """Makes the hidden sibling folder, or takes up the one that an interrupted merge left.

    Args:
        overwrite: as for `check_out`, which is asked again now that no other merge can write there.
        fingerprint: stands for the inputs and the plan; only a run with the same one is continued.
        extra_bytes: what will be written beside the weights, for the check of free space.

    Raises:
        UsageError: `resume` without anything to resume, or from other inputs or another plan.
        WarmergeError: another merge is writing there, or the disk has not enough room.
    """
    partial, old = _partial(out), _old(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out.parent} cannot be made ({error.strerror}); choose another -o") from None
    if resume and not (partial / _PROGRESS).is_file():
        raise UsageError(f"nothing to resume: no interrupted merge into {out}")
    partial.mkdir(exist_ok=True)
    lock = _lock(out, partial)
    try:
        if old.is_dir() and not out.exists():  # an overwrite was stopped between its two renames
            os.rename(old, out)
        check_out(out, (), overwrite)
        finished = _finished(out, partial, plan, fingerprint) if resume else {}
        kept = {f"{file}{end}" for file in finished for end in (".part", _NOTE)} | {_LOCK}
        stale = [entry for entry in partial.iterdir() if entry.name not in kept]
        needed = extra_bytes + sum(shard.nbytes for shard in plan.shards if shard.file not in finished)
        free = shutil.disk_usage(partial).free + sum(entry.stat().st_blocks * 512 for entry in stale)
        if needed > free:
            if not resume:
                shutil.rmtree(partial)
            raise WarmergeError(f"{out.parent}: {needed:,} bytes are needed, {free:,} are free; nothing was written")
        for entry in stale:
            entry.unlink()
        _write_progress(partial, fingerprint, finished)
    except BaseException:
        os.close(lock)
        raise
    return Output(out, partial, fingerprint, finished, lock)


class ShardFile:
    """A shard being written: its place is reserved first, its header comes last."""

    def __init__(self, output: Output, shard: Shard) -> None:
        self.output, self.shard = output, shard
        self.path = output.partial / f"{shard.file}.part"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, shard.nbytes)
            else:  # macOS
                os.ftruncate(self.descriptor, shard.nbytes)
        except BaseException:
            self.abandon()
            raise

    def write(self, tensor: TensorPlan, start: int, tile: torch.Tensor) -> None:
        """Puts elements start.. of a tensor in their place; any thread, any order."""
        offset = self.shard.offsets[tensor.name] + start * BITS[tensor.dtype] // 8
        _write_all(self.descriptor, memory(tile), offset)

    def finish(self) -> None:
        """Data on the disk, then the header, then that on the disk too."""
        os.fsync(self.descriptor)
        _write_all(self.descriptor, memoryview(self.shard.header), 0)
        os.fsync(self.descriptor)
        os.close(self.descriptor)

    def abandon(self) -> None:
        """Closes the file without a header: it will not be used."""
        os.close(self.descriptor)


def mark_finished(output: Output, shard: Shard, note: Any) -> None:
    """Records on the disk that a shard need not be written again, and a note about it: a table (JSON), or None."""
    if note is not None:
        _write_synced(output.partial / f"{shard.file}{_NOTE}", json.dumps(note).encode())
    output.finished[shard.file] = note
    _write_progress(output.partial, output.fingerprint, output.finished)


def write_file(output: Output, name: str, data: bytes) -> None:
    """A small file beside the weights, with the permissions that the user's umask gives."""
    _write_synced(output.partial / name, data)


def publish(output: Output, plan: MergePlan) -> None:
    """Names the shards, writes the index last, and renames the folder to OUT in one step."""
    for shard in plan.shards:
        os.rename(output.partial / f"{shard.file}.part", output.partial / shard.file)
    if len(plan.shards) > 1:
        _write_synced(output.partial / INDEX, index_json(plan))
    (output.partial / _PROGRESS).unlink()
    for shard in plan.shards:
        (output.partial / f"{shard.file}{_NOTE}").unlink(missing_ok=True)
    sync(output.partial)
    old = _old(output.out)
    if output.out.exists() and any(output.out.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output.out, old)
    os.rename(output.partial, output.out)
    sync(output.out.parent)
    (output.out / _LOCK).unlink()  # only now: until the rename no other merge may touch the folder
    shutil.rmtree(old, ignore_errors=True)


def discard(output: Output) -> None:
    """Removes what was written: there is nothing in it worth resuming."""
    shutil.rmtree(output.partial)


def index_json(plan: MergePlan) -> bytes:
    """The index of a sharded checkpoint, as transformers writes it. Without `metadata` it would not load."""
    table = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel for tensor in plan.tensors),
            "total_size": sum(shard.nbytes - len(shard.header) for shard in plan.shards),
        },
        "weight_map": dict(sorted(table.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _lock(out: Path, partial: Path) -> int:
    """A descriptor that holds the only lock on `partial`."""
    descriptor = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    path = partial / _LOCK
    # Another merge may have renamed the folder to OUT since this file was opened.
    if not take_lock(descriptor) or not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
        os.close(descriptor)
        raise WarmergeError(f"another merge is writing {out} at this moment; wait for it or choose another -o")
    return descriptor


def _finished(out: Path, partial: Path, plan: MergePlan, fingerprint: str) -> dict[str, Any]:
    progress = parse_json((partial / _PROGRESS).read_bytes())
    if not isinstance(progress, dict) or progress.get("fingerprint") != fingerprint:
        raise UsageError(
            f"the interrupted merge into {out} had other inputs or another plan; start again without --resume"
        )
    notes, finished = progress["finished"], {}
    for shard in plan.shards:
        path = partial / f"{shard.file}.part"
        if not path.exists() and (partial / shard.file).exists():  # stopped between naming and publishing
            os.rename(partial / shard.file, path)
        if shard.file in notes and path.is_file() and path.stat().st_size == shard.nbytes:
            note = partial / f"{shard.file}{_NOTE}"
            content = parse_json(note.read_bytes()) if note.is_file() else None
            if notes[shard.file] and not isinstance(content, dict):
                continue
            with path.open("rb") as file:
                if file.read(len(shard.header)) == shard.header:
                    finished[shard.file] = content if notes[shard.file] else None
    return finished


def _write_progress(partial: Path, fingerprint: str, finished: Mapping[str, Any]) -> None:
    noted = {file: note is not None for file, note in finished.items()}
    data = json.dumps({"fingerprint": fingerprint, "finished": noted}).encode()
    fresh = partial / f"{_PROGRESS}.new"
    _write_synced(fresh, data)
    os.rename(fresh, partial / _PROGRESS)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with naming(path):
        try:
            _write_all(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwritev(descriptor, [data[done:]], offset + done)


def sync(path: Path) -> None:
    """On the disk, not only in memory: a name must not outlive a power cut that its content does not."""
    descriptor = os.open(path, os.O_RDONLY)
    with naming(path):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
