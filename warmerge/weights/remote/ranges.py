"""What every far folder does alike: a header or a small file takes one request, and is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from warmerge.errors import Finding, RefusedError

# The header of a checkpoint of 2,000 tensors takes 256 KiB: one request shows all of it.
WINDOW = 256 * 1024
# Configs and tokenizers are fetched whole.
SMALL = 50 * 2**20
# How often a range is tried by what streams for hours: it has to outlive a minute without a network.
PATIENCE = 8


def is_small(file: str, size: int) -> bool:
    """Whether a file is no weights and can be held in memory."""
    return not file.endswith(".safetensors") and size <= SMALL


def fill(
    label: str,
    sizes: Mapping[str, int],
    starts: dict[str, bytes],
    fetch: Callable[[str, int, memoryview], None],
    file: str,
    offset: int,
    buffer: memoryview,
) -> None:
    """Fills `buffer` with the bytes of `file` from `offset` on.

    Args:
        label, sizes: of the folder.
        starts: beginnings of files, those that are known; others are added.
        fetch: fetch(file, offset, buffer) is one request, of at least one byte.

    Raises:
        RefusedError: the file has fewer bytes than that; and whatever `fetch` raises.
    """
    size, end = sizes[file], offset + len(buffer)
    if end > size:
        what = f"has {size} bytes where {end} are needed; it is damaged"
        raise RefusedError([Finding(f"{label}/{file}", what)])
    kept = size if is_small(file, size) else min(WINDOW, size)
    if offset < kept and file not in starts:
        begun = bytearray(kept)
        fetch(file, 0, memoryview(begun))
        starts[file] = bytes(begun)
    start = starts[file][offset:end] if offset < kept else b""
    buffer[: len(start)] = start
    if len(start) < len(buffer):
        fetch(file, offset + len(start), buffer[len(start) :])
