"""What a merge will do, before it does any of it: which tensors from which members, in which dtype, in which shard."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.weights.checkpoint import Checkpoint, Tensor
from warmerge.weights.rules import Coefficients, Options, Rule
from warmerge.weights.safetensors_format import AVERAGED, build_header, tensor_bytes

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Selection:
    """Which tensors are merged; the others are copied from one member. `rest_from` counts from 0."""

    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    rest_from: int | None = None

    @property
    def partial(self) -> bool:
        return bool(self.only or self.excluded)

    def merges(self, name: str) -> bool:
        chosen = not self.only or any(fnmatch.fnmatchcase(name, glob) for glob in self.only)
        return chosen and not any(fnmatch.fnmatchcase(name, glob) for glob in self.excluded)


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor. `members` are the inputs it is made of: all of them, or one to copy from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    members: tuple[Tensor, ...]
    base: Tensor | None
    merged: bool

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.members if self.base is None else (*self.members, self.base)

    @property
    def input_bytes(self) -> int:
        return sum(part.nbytes for tensor in self.inputs for part in tensor.parts)

    @property
    def numel(self) -> int:
        return self.members[0].numel

    @property
    def averaged(self) -> bool:
        return self.members[0].dtype in AVERAGED


@dataclass(frozen=True)
class Shard:
    """One output file: its header to the byte, and where each tensor's data begins."""

    file: str
    tensors: tuple[TensorPlan, ...]
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class MergePlan:
    """A whole merge: inputs, rule, and the files that will be written."""

    members: tuple[Checkpoint, ...]
    base: Checkpoint | None
    rule: Rule
    options: Options
    shards: tuple[Shard, ...]

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.members if self.base is None else (*self.members, self.base)

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def input_bytes(self) -> int:
        passes = 2 if self.rule.needs_gram else 1
        return passes * sum(tensor.input_bytes for tensor in self.tensors)

    def constant_coefficients(self) -> Coefficients | None:
        """The coefficients of every merged tensor, or None when the rule measures them tensor by tensor."""
        return None if self.rule.needs_gram else self.rule.coefficients(len(self.members), self.options, None)


def plan_merge(
    members: Sequence[Checkpoint],
    rule: Rule,
    options: Options,
    *,
    base: Checkpoint | None = None,
    selection: Selection | None = None,
    dtype: str = "auto",
    max_shard_bytes: int = 5 * 10**9,
) -> MergePlan:
    """The plan of a merge whose members were found compatible by `compat.check`.

    Args:
        dtype: "auto" keeps each tensor's own dtype; float32, bfloat16 or float16 casts floating tensors.
        max_shard_bytes: a shard holds at most this many bytes of data, unless one tensor alone is larger.

    Raises:
        UsageError: a glob that matches no tensor, or a choice that leaves nothing to merge.
    """
    chosen = selection or Selection()
    source = members[0] if chosen.rest_from is None else members[chosen.rest_from]
    _check_globs(chosen, source)
    tensors = []
    for name in sorted(source.tensors, key=natural_order):
        own = source.tensors[name]
        merged = chosen.merges(name)
        inputs = tuple(member.tensors[name] for member in members) if merged else (own,)
        floating = own.dtype in AVERAGED
        target = DTYPES[dtype] if dtype != "auto" and floating else own.dtype
        base_tensor = base.tensors[name] if base is not None and rule.needs_base and merged and floating else None
        tensors.append(TensorPlan(name, target, own.shape, inputs, base_tensor, merged))
    return MergePlan(tuple(members), base, rule, options, tuple(_shards(tensors, max_shard_bytes)))


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key by which layers.2 comes before layers.10.

    >>> sorted(["h.10.w", "h.2.w", "h.w"], key=natural_order)
    ['h.2.w', 'h.10.w', 'h.w']
    """
    parts = [part for part in re.split(r"(\d+)", name) if part]
    # Not every digit of Unicode is a number's, and a number of thousands of digits is no layer's.
    numbers = [int(part) if part.isdecimal() and len(part) < 20 else None for part in parts]
    return [(number is None, number or 0, part) for number, part in zip(numbers, parts, strict=True)]


def parse_size(text: str) -> int:
    """Bytes from a size such as 5GB, 500MB or 64KB (powers of ten, as the Hub counts).

    >>> parse_size("5GB"), parse_size("1.5 mb")
    (5000000000, 1500000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** ["", "K", "M", "G", "T"].index(match[2].upper())) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: expected a size such as 5GB or 500MB, found {text!r}")
    return size


def choose_threads(threads: int | None) -> int:
    """`threads`, or without a wish the processors this process may use, at most 16: past that the disk is the limit.

    Raises:
        UsageError: fewer than one.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads: expected 1 or more, found {threads}")
        return threads
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, allowed)


def _check_globs(selection: Selection, source: Checkpoint) -> None:
    if selection.partial and selection.rest_from is None:
        raise UsageError("--only and --except need --rest-from N: the checkpoint that the other tensors come from")
    if not selection.partial and selection.rest_from is not None:
        raise UsageError("--rest-from is used with --only or --except; without them every tensor is merged")
    globs = (*selection.only, *selection.excluded)
    unmatched = [glob for glob in globs if not any(fnmatch.fnmatchcase(name, glob) for name in source.tensors)]
    if unmatched:
        raise UsageError(f"no tensor of {source.label} matches {', '.join(map(repr, unmatched))}")
    if not any(selection.merges(name) for name in source.tensors):
        raise UsageError("--only and --except leave no tensor to merge")


def _shards(tensors: Sequence[TensorPlan], max_bytes: int) -> list[Shard]:
    """Shards in natural order of names, whatever the members' own layouts: the output's bytes depend on neither."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    shards = []
    for number, group in enumerate(groups, start=1):
        many = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offsets = build_header({tensor.name: (tensor.dtype, tensor.shape) for tensor in group})
        ordered = tuple(sorted(group, key=lambda tensor: offsets[tensor.name]))
        size = len(header) + sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in group)
        shards.append(Shard("model.safetensors" if len(groups) == 1 else many, ordered, header, offsets, size))
    return shards


def refuse_missing_base_tensors(members: Sequence[Checkpoint], base: Checkpoint, selection: Selection) -> None:
    """Every merged tensor needs its counterpart in the base, of the same shape.

    Raises:
        RefusedError: naming each tensor that the base lacks or has in another shape.
    """
    findings = []
    source = members[selection.rest_from or 0]
    for name, tensor in source.tensors.items():
        if not selection.merges(name) or tensor.dtype not in AVERAGED:
            continue
        other = base.tensors.get(name)
        if other is None:
            findings.append(
                Finding(base.label, "is missing from the base; give the model that the members started from", name)
            )
        elif other.shape != tensor.shape or other.dtype not in AVERAGED:
            what = (
                f"is {other.dtype} {list(other.shape)} in the base, {tensor.dtype} {list(tensor.shape)} in the members"
            )
            findings.append(Finding(base.label, what, name))
    if findings:
        raise RefusedError(findings)
