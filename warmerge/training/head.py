"""The reward head in a checkpoint's files: put there, and told from others."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from warmerge.errors import Finding, RefusedError, some
from warmerge.weights.checkpoint import Checkpoint, read_checkpoint
from warmerge.weights.folder import open_folder, read_bytes
from warmerge.weights.heads import is_head
from warmerge.weights.kernels import TORCH_DTYPE, memory
from warmerge.weights.locate import open_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

# A head of a file's dtype may be this far from the fitted one: bfloat16 has 8 bits.
_ROUNDING = 0.01


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether it is a reward model, and not a model that one can be made of."""
    return any(map(is_head, checkpoint.tensors))


def write_head(folder: Path, weight: Array) -> None:
    """Puts a fitted head (d,) into a reward model's files, in their dtype; a bias becomes 0: no comparison needs it.

    Each file is replaced at once by one that differs in these bytes alone.

    Raises:
        RefusedError: no tensor, or more than one, of shape (1, d) in the head; a dtype that cannot hold the values.
    """
    checkpoint = read_checkpoint(open_folder(folder, str(folder)))
    tensors = {name: part for name, tensor in checkpoint.tensors.items() if is_head(name) for part in tensor.parts}
    shape = (1, len(weight))
    final = [name for name, part in tensors.items() if name.endswith("weight") and part.shape == shape]
    if len(final) != 1 or tensors[final[0]].dtype not in TORCH_DTYPE:
        what = f"has the head {some(tensors)}; expected one weight of shape {list(shape)} in it"
        raise RefusedError([Finding(checkpoint.label, what)])
    stored = tensors[final[0]]
    exact = torch.from_numpy(weight)
    values = exact.to(TORCH_DTYPE[stored.dtype])
    if not (values.double() - exact).norm() <= _ROUNDING * exact.norm():
        what = f"is {stored.dtype}, which cannot hold the fitted head (values up to {exact.abs().max():.3g})"
        raise RefusedError([Finding(checkpoint.label, f"{what}; use a float32 or bfloat16 model", final[0])])
    changes: dict[str, dict[int, bytes]] = {stored.file: {stored.offset: bytes(memory(values))}}
    bias = tensors.get(final[0].removesuffix("weight") + "bias")
    if bias is not None:
        changes.setdefault(bias.file, {})[bias.offset] = bytes(bias.nbytes)
    for file, parts in changes.items():
        _replace_bytes(folder / file, parts)


def head_digest(folder: Path) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes of a reward model's head: equal for equal heads.

    Raises:
        RefusedError: there is no head in it.
    """
    checkpoint = open_checkpoint(folder)
    heads = sorted(name for name in checkpoint.tensors if is_head(name))
    if not heads:
        raise RefusedError([Finding(str(folder), "has no reward head")])
    digest = hashlib.sha256()
    for name in heads:
        for part in checkpoint.tensors[name].parts:
            digest.update(f"{name}\0{part.dtype}\0{part.shape}\0".encode(errors="surrogatepass"))
            digest.update(read_bytes(part.folder, part.file, part.offset, part.nbytes))
    return digest.hexdigest()


def _replace_bytes(path: Path, changes: Mapping[int, bytes]) -> None:
    """Replaces a file by a copy with other bytes at these offsets; it is on the disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.copyfile(path, partial)
        with partial.open("r+b") as file:
            for offset, data in changes.items():
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
