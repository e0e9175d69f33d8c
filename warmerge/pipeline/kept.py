"""Arrays that a command keeps while it works, so that the same command goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]


def write_kept(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes arrays and what is said of them as one safetensors file, which appears whole or not at all."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save(dict(arrays), metadata={**metadata, "digest": _digest(arrays)}))
    os.replace(partial, path)


def read_kept(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """What `write_kept` wrote.

    Raises:
        ValueError: the file is damaged, or its arrays are not those that were written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata.get("digest") != _digest(arrays):
        raise ValueError("its contents changed")
    return arrays, metadata


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode() + arrays[key].tobytes())
    return digest.hexdigest()
