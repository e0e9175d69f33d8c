"""Arrays that a command keeps while it works, so that the same command goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import naming

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]


def write_kept(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Writes arrays and what is said of them as one safetensors file, which appears whole or not at all."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    data = save(dict(arrays), metadata={**metadata, "digest": _digest(arrays, metadata)})
    with naming(path):
        partial.write_bytes(data)
        os.replace(partial, path)


def read_kept(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """What `write_kept` wrote.

    Raises:
        ValueError: the file is damaged, or its arrays or what is said of them are not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata.pop("digest", None) != _digest(arrays, metadata):
        raise ValueError("its contents changed")
    return arrays, metadata


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    shapes = {key: [array.dtype.str, list(array.shape)] for key, array in arrays.items()}
    digest = hashlib.sha256(json.dumps([shapes, dict(metadata)], sort_keys=True).encode())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    return digest.hexdigest()
