"""The part of benchmarks/gpu.py on `average`: merges by the CPU and by CUDA, files in memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import average as merging
import numpy
import torch
from gpu_part import NotRunError, Part, bus_rates

from warmerge.pipeline.prepare import prepare
from warmerge.weights.average import write_merge
from warmerge.weights.kernels import TILE
from warmerge.weights.plan import choose_threads
from warmerge.weights.stream import Engine

_BIG = 1 << 22


@dataclass(frozen=True)
class Way:
    """How a merge is computed: the device, so many threads, elements of a tile."""

    device: str
    threads: int
    tile: int = TILE


def average(part: Part) -> None:
    """Each merge by each way, against the copy floor and the bus to the device."""
    most = choose_threads(None)
    ways = [Way("cpu", most), Way("cpu", 1), Way(part.device, 4), Way(part.device, most), Way(part.device, 4, _BIG)]
    # dtype, GB of a member, members of each merge; and whether other rules than the mean are tried on them
    sets = [
        (torch.bfloat16, 1.0, (2, 6, 16), True), (torch.float32, 1.0, (2, 6), False), (torch.bfloat16, 4.0, (2,), False)
    ]  # fmt: skip
    if part.smoke:
        merging.HIDDEN, merging.INNER, merging.VOCAB = 32, 48, 64
        sets = [(torch.bfloat16, 1e-5, (2, 3), True)]
    bus = bus_rates(part.device, 1 << (20 if part.smoke else 28), pinned=True)[0]
    for dtype, gigabytes, counts, rules in sets:
        made, most_members = part.work / "members", max(counts)

        def member(i: int, dtype: Any = dtype, size: float = gigabytes, made: Path = made) -> Path:
            return merging.make_member(made / str(i), i + 1, dtype, size, shards=2)

        what = f"{most_members} members of {gigabytes} GB"
        with contextlib.suppress(NotRunError), part.case(what, needs=10 * gigabytes):
            with ThreadPoolExecutor(8) as pool:
                members = list(pool.map(member, range(most_members)))
            for count in counts:
                _merges(part, members[:count], dtype, bus, ways)
            if rules:  # coefficients of two members, then a Gram matrix of each tensor
                _merges(part, members[:2], dtype, bus, ways[::3], rule="weighted", weights=(0.3, 0.7))
                _merges(part, members[:2], dtype, bus, ways[::3], rule="stock", base=members[-1])
        shutil.rmtree(made, ignore_errors=True)


def _merges(
    part: Part, members: Sequence[Path], dtype: torch.dtype, bus: float, ways: Sequence[Way], **choices: Any
) -> None:
    """One merge by each way; their bytes are compared with the first way's."""
    first, out = part.work / "first", part.work / "out"
    plan = prepare(members, any_model=True, **choices).plan
    moved, rule = plan.input_bytes + plan.output_bytes, choices.get("rule", "uniform")
    for way in ways:
        what = f"{len(members)} members, {rule}, {way.device}, {way.threads} threads, tiles of {way.tile}"
        with contextlib.suppress(NotRunError), part.case(what, needs=moved / (1e9 if way.threads > 1 else 5e8)):
            shutil.rmtree(out, ignore_errors=True)
            floor, times = merging.copy_floor(list(members), out, way.threads), []
            for _ in range(1 if part.smoke or way.threads == 1 else 2):
                shutil.rmtree(out, ignore_errors=True)
                engine = Engine(way.threads, torch.device(way.device), way.tile)
                written = write_merge(plan, out, engine, {}, {}, fingerprint="benchmark")
                times.append(max(1e-3, float(written["seconds"]["stream"])))
            best, unlike = min(times), differing(first, out) if first.exists() else 0
            if not first.exists():
                out.rename(first)
            part.row(
                M=len(members), rule=rule, dtype=str(dtype).removeprefix("torch."), GB_a_member=plan.output_bytes / 1e9,
                device=way.device, threads=way.threads, tile=way.tile, s=best, GB_per_s=moved / best / 1e9,
                x_copy_floor=best / floor, x_bus=best * bus * 1e9 / plan.input_bytes, bytes_unlike_the_first=unlike,
            )  # fmt: skip
    for folder in (first, out):
        shutil.rmtree(folder, ignore_errors=True)


def differing(a: Path, b: Path) -> int:
    """How many bytes of the weight files of two folders are not the same."""
    names = sorted(file.name for file in a.glob("*.safetensors"))
    assert names == sorted(file.name for file in b.glob("*.safetensors"))
    files = [(numpy.memmap(a / name, mode="r"), numpy.memmap(b / name, mode="r")) for name in names]
    return sum(int(numpy.count_nonzero(x != y)) for x, y in files)
