"""The safetensors file format: the header, read with distrust and written to the byte.

A file is a little-endian u64 N, N bytes of JSON, then the tensors' data without holes.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from warmerge.errors import Finding, RefusedError, quoted
from warmerge.weights import foreign_json

# In the order of the format's own enumeration: writers put the data of later rows first.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
AVERAGED = frozenset({"F64", "F32", "BF16", "F16"})
# These must be equal in every member: there is no mean of a position index or a mask.
COMPARED = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}
# The format allows 100 MB, which costs a reader about 1 GB; 25 MB is 100,000 tensors and more.
HEADER_LIMIT = 25_000_000
# More than any framework's tensors have; the product of a long list of sizes takes minutes to compute.
DIMENSIONS = 64
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: dtype as the format names it, shape, first byte counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_header(read: Callable[[int, int], bytes], size: int, where: str) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, in file order.

    Args:
        read: read(offset, length) gives exactly those bytes of the file.
        size: the file's size in bytes.
        where: the file's name for messages.

    Raises:
        RefusedError: the file is empty, truncated, padded, a Git LFS pointer, not safetensors, or its header
            is over 25 MB, not strict JSON, has a name twice, or describes overlapping or missing bytes.
    """

    def refuse(what: str) -> RefusedError:
        return RefusedError([Finding(where, what)])

    if size == 0:
        raise refuse("is empty (0 bytes); download it again")
    start = read(0, min(size, 64))
    if start.startswith(_LFS_POINTER):
        raise refuse("is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if size < 8:
        raise refuse(f"is too short to be safetensors ({size} bytes)")
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_LIMIT:
        raise refuse(f"has a header of {length} bytes (limit {HEADER_LIMIT}); it is not safetensors, or hostile")
    if 8 + length > size:
        raise refuse(f"is truncated: the header alone needs {8 + length} bytes, found {size}; download it again")
    header = _parse_json(read(8, length), refuse)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("has a header whose __metadata__ is not a table of strings")
    if not all(map(_is_unicode, (*metadata, *metadata.values()))):
        raise refuse("has a header whose __metadata__ is not Unicode text")
    tensors = {name: _parse_entry(name, entry, 8 + length, refuse) for name, entry in header.items()}
    _check_layout(tensors, 8 + length, size, refuse)
    return dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The header of a new file and each tensor's first byte, to the byte as `safetensors.torch.save_file` writes.

    Args:
        tensors: name -> (dtype, shape); the order does not matter.
        metadata: what a model's file says of itself if not given.

    >>> header, offsets = build_header({"a": ("F32", (2,))})
    >>> len(header) % 8, offsets["a"] == len(header)
    (0, True)
    """
    ordered = sorted(tensors, key=lambda name: (-_RANK[tensors[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    relative, position = {}, 0
    for name in ordered:
        dtype, shape = tensors[name]
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        relative[name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in relative.items()}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file.

    >>> tensor_bytes("BF16", (3, 5)), tensor_bytes("F32", ()), tensor_bytes("F64", (0, 4))
    (30, 4, 0)
    """
    return math.prod(shape) * BITS[dtype] // 8


def _parse_json(text: bytes, refuse: Callable[[str], RefusedError]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise refuse(f"has {quoted(twice)} twice in its header")
        return table

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    def whole(digits: str) -> int:
        if digits == "-0":  # the format's own reader refuses it
            raise ValueError("-0 is no size")
        return int(digits)

    if not text.startswith(b"{"):
        raise refuse("has a header that does not start with '{'; it is not safetensors")
    try:
        header = foreign_json.parse(text, object_pairs_hook=unique, parse_constant=no_constant, parse_int=whole)
    except ValueError as error:
        raise refuse(f"has a header that is not JSON ({type(error).__name__}); it is damaged") from None
    assert isinstance(header, dict)
    return header


def _parse_entry(name: str, entry: Any, data: int, refuse: Callable[[str], RefusedError]) -> TensorHeader:
    def sizes(value: Any) -> bool:
        few = isinstance(value, list) and len(value) <= DIMENSIONS
        return few and all(type(n) is int and 0 <= n < 2**63 for n in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"has a damaged header entry for tensor {quoted(name)}")
    if not _is_unicode(name):
        raise refuse(f"has a tensor name that is not Unicode text: {quoted(name)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(f"has tensor {quoted(name)} of unknown dtype {quoted(str(dtype))}")
    if not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        raise refuse(f"has a damaged shape or offset for tensor {quoted(name)}")
    bits, found = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    needed = f"{bits // 8}" if bits % 8 == 0 else f"{bits}/8"
    if bits != found * 8:
        raise refuse(f"gives tensor {quoted(name)} {found} bytes where {dtype} {shape} needs {needed}")
    # Empty, but no reader can count its other sizes: the format's own multiplies them one by one.
    if found == 0 and math.prod(size for size in shape if size) * BITS[dtype] >= 2**63:
        raise refuse(f"has a damaged shape for tensor {quoted(name)}: {shape}")
    return TensorHeader(dtype, tuple(shape), data + offsets[0], found)


def _is_unicode(text: str) -> bool:
    """False where half a character stands in it, which JSON allows and no other reader takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_layout(
    tensors: Mapping[str, TensorHeader], data: int, size: int, refuse: Callable[[str], RefusedError]
) -> None:
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            kind = "overlaps" if tensor.offset < position else "leaves a hole before"
            raise refuse(f"{kind} tensor {quoted(name)} (expected at byte {position}, found at {tensor.offset})")
        position += tensor.nbytes
    if position > size:
        raise refuse(f"is truncated: expected {position} bytes, found {size}; download it again")
    if position < size:
        raise refuse(f"has {size - position} bytes after its last tensor: expected {position}, found {size}")
