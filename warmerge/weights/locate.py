"""From what a user types to a checkpoint: a folder, a file, a Hub id, a store's address, an adapter with its base."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted, some
from warmerge.weights import adapter
from warmerge.weights.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    LowRank,
    Stored,
    Tensor,
    read_checkpoint,
    refuse_lone_shard,
)
from warmerge.weights.folder import Folder, open_folder
from warmerge.weights.remote import reading, stores
from warmerge.weights.small_files import OTHER_FILES, TOKENIZER_FILES

# An adapter of an adapter of an adapter is no longer a mistake.
_MOST_ADAPTERS = 3


def open_checkpoint(spec: str | Path, base: str | Path | None = None, *, streamed: bool = False) -> Checkpoint:
    """The checkpoint that `spec` names, from its headers alone.

    Args:
        spec: a folder, a .safetensors file, a Hub id (`org/name`, `org/name@revision`, `hf://org/name`), or a folder
            in an object store (`s3://bucket/name`). A local folder wins over a Hub id of the same name.
        base: for a LoRA adapter, the checkpoint that it adapts; without it the one that its config names. Of a member
            of `warmerge train --adapter` it must be the start, by some 4 KiB of each tensor.
        streamed: of what lies on the Hub, nothing is to be put in its cache.

    Raises:
        UsageError: there is no such file, folder, Hub id or address in a store.
        RefusedError: the checkpoint is damaged or of a kind that cannot be merged.
    """
    return _open(spec, base, streamed, ())


def _open(spec: str | Path, base: str | Path | None, streamed: bool, adapters: tuple[str, ...]) -> Checkpoint:
    """`adapters` are those whose base is being opened."""
    label, path = str(spec), Path(spec)
    if os.path.isfile(path):  # unlike Path's method False, not an error, for a name that no file can have
        return _single_file(path, label)
    folder = open_folder(path, label) if os.path.isdir(path) else _remote_folder(label, streamed)
    if ADAPTER_CONFIG not in folder.sizes() and ADAPTER_WEIGHTS not in folder.sizes():
        return read_checkpoint(folder)
    full = [name for name in folder.sizes() if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS]
    if full:
        what = f"holds both an adapter and full weights ({quoted(full[0])}); give one of them, in a folder of its own"
        raise RefusedError([Finding(label, what)])
    named = base if base is not None else adapter.base_named_by(folder)
    if named is None:
        raise UsageError(f"{plain(label)} is a LoRA adapter that does not name its base; give it with --base")
    if os.path.isdir(named) and Path(named).resolve() == path.resolve():
        raise UsageError(f"{plain(label)} is a LoRA adapter; --base must be the model that it adapts")
    if base is None and stores.is_store(str(named)):
        what = f"names as its base the address {quoted(str(named))}, which is asked only if you give it with --base"
        raise RefusedError([Finding(label, what)])
    if len(adapters) == _MOST_ADAPTERS:
        what = f"is an adapter of an adapter, and so on without an end: {some(adapters)}; give the model with --base"
        raise RefusedError([Finding(label, what)])
    full_base = _open(named, None, streamed, (*adapters, label))
    adapter.refuse_other_base(folder, full_base)
    return replace(adapter.read_adapter(folder, full_base), fallback=full_base.folder)


def _remote_folder(label: str, streamed: bool) -> Folder:
    return stores.open_store(label) if stores.is_store(label) else reading.open_hub(label, streamed=streamed)


def make_local(checkpoints: Sequence[Checkpoint], *, leave_stores: bool = False) -> list[Checkpoint]:
    """The same checkpoints with every needed file on this machine: what lies on the Hub is downloaded, cached.

    Only weight files that hold one of the tensors and the small files beside them are fetched.

    Args:
        leave_stores: what lies in an object store stays there, to be read piece by piece.

    Raises:
        UsageError: a checkpoint lies in an object store, and may not stay there.
    """
    needed: dict[str, tuple[Folder, set[str]]] = {}
    for checkpoint in checkpoints:
        folders = [checkpoint.folder, *([] if checkpoint.fallback is None else [checkpoint.fallback])]
        small = [(folder, file) for folder in folders for file in _small_files(folder)]
        for folder, file in (*checkpoint.weight_files, *small):
            needed.setdefault(folder.identity, (folder, set()))[1].add(file)
    for folder, _ in needed.values():
        if isinstance(folder, stores.StoreFolder) and not leave_stores:
            what = "can be averaged and inspected where it is; copy it here first to load it"
            raise UsageError(f"{plain(folder.label)} {what} (aws s3 cp --recursive, gsutil cp -r)")
    local = {identity: reading.download(folder, sorted(files)) for identity, (folder, files) in needed.items()}
    return [_moved(checkpoint, local) for checkpoint in checkpoints]


def _single_file(path: Path, label: str) -> Checkpoint:
    folder = open_folder(path.parent, str(Path(label).parent))
    if path.suffix != ".safetensors":
        what = "is a file, but not a .safetensors file; give a folder or a .safetensors file"
        raise UsageError(f"{plain(label)} {what}")
    if path.name == ADAPTER_WEIGHTS:
        raise UsageError(f"{plain(label)} is a LoRA adapter; give its folder")
    refuse_lone_shard(folder, path.name)
    return replace(read_checkpoint(folder, only_file=path.name), label=label)


def _small_files(folder: Folder) -> list[str]:
    names = folder.sizes()
    return [name for name in (*OTHER_FILES, *TOKENIZER_FILES) if name in names] + [
        n for n in names if n.endswith(".py")
    ]


def _moved(checkpoint: Checkpoint, local: Mapping[str, Folder]) -> Checkpoint:
    def part(stored: Stored) -> Stored:
        folder = local[stored.folder.identity]
        if folder is stored.folder:
            return stored
        if folder.sizes()[stored.file] != stored.folder.sizes()[stored.file]:
            what = "has another size than its header announced; remove it from the cache and download it again"
            raise RefusedError([Finding(f"{plain(folder.label)}/{stored.file}", what)])
        return replace(stored, folder=folder)

    def tensor(tensor: Tensor) -> Tensor:
        if isinstance(tensor, LowRank):
            return replace(tensor, weight=part(tensor.weight), up=part(tensor.up), down=part(tensor.down))
        return part(tensor)

    tensors = {name: tensor(found) for name, found in checkpoint.tensors.items()}
    fallback = None if checkpoint.fallback is None else local.get(checkpoint.fallback.identity)
    own = local.get(checkpoint.folder.identity, checkpoint.folder)
    return replace(checkpoint, folder=own, tensors=tensors, fallback=fallback)
