"""Stream a plan's tensors, tile by tile, on several threads, into a sink."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain

import torch

from warmerge.errors import Finding, RefusedError, plain
from warmerge.weights.checkpoint import Checkpoint, Stored, Tensor
from warmerge.weights.folder import Folder, read_bytes
from warmerge.weights.kernels import TILE, TORCH_DTYPE, Workspace, finite, gram, one_thread_per_kernel, weighted_sum
from warmerge.weights.plan import DTYPE_NAMES, MergePlan, TensorPlan
from warmerge.weights.remote.read_ahead import ReadAhead
from warmerge.weights.rules import Coefficients

Tile = tuple[TensorPlan, int, int]
Sink = Callable[[TensorPlan, int, torch.Tensor], None]
Progress = Callable[[int], None]


@dataclass
class Engine:
    """How tiles are computed: threads, device, tile size (elements). `bad` collects values that are not finite."""

    threads: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tile: int = TILE
    progress: Progress = lambda nbytes: None
    bad: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def run(
        self,
        items: Iterable[Tile],
        work: Callable[[Tile, Workspace], None],
        tile: int,
        parts: Iterable[Stored] = (),
    ) -> None:
        """Calls work(item, workspace) for every item, in order of starting, on all threads.

        The first exception stops the others and is raised here; so is Ctrl-C. `parts` is what the work will read, in
        order: those that are far away are asked for ahead.
        """
        lock, stop, iterator, ahead = threading.Lock(), threading.Event(), iter(items), ReadAhead(parts)

        def worker() -> None:
            workspace = Workspace(self.device, tile, ahead.reader)
            with contextlib.closing(workspace), workspace.active(), torch.inference_mode():
                while not stop.is_set():
                    with lock:
                        item = next(iterator, None)
                    if item is None:
                        return
                    work(item, workspace)

        with one_thread_per_kernel(), ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(worker) for _ in range(self.threads)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                ahead.close()
            for future in done:
                future.result()

    def merge(self, tensors: Sequence[TensorPlan], coefficients: dict[str, Coefficients], sink: Sink) -> None:
        """Sends every tile of `tensors` to sink(tensor, first element, tile); non-finite values go to `bad`."""

        def work(item: Tile, workspace: Workspace) -> None:
            tensor, start, stop = item
            if not tensor.averaged:
                sink(tensor, start, _raw_tile(tensor.members[0], start, stop))
            else:
                chosen = coefficients[tensor.name]
                factors = (*chosen.members, *([] if tensor.base is None else [chosen.base]))
                dtype = TORCH_DTYPE[tensor.dtype]
                tile = weighted_sum(tensor.inputs, factors, chosen.divisor, start, stop, dtype, workspace)
                if not finite(tile):
                    self._explain(tensor, tile, start, workspace)
                sink(tensor, start, tile)
            self.progress(tensor.input_bytes * (stop - start) // tensor.numel)

        averaged = [tensor for tensor in tensors if tensor.averaged]
        self.run(_tiles(tensors, self.tile), work, self.tile, _read_by_tiles(averaged))

    def grams(self, tensors: Sequence[TensorPlan]) -> dict[str, list[list[float]]]:
        """The Gram matrix (M, M) of each tensor's task vectors, summed exactly over fixed tiles.

        The result does not depend on threads or on `tile`: the blocks are fixed, and their parts are summed exactly.
        """
        parts: dict[str, list[list[list[float]]]] = {tensor.name: [] for tensor in tensors}
        sums = {tensor.name: _summed((), len(tensor.members)) for tensor in tensors}
        lock = threading.Lock()

        def work(item: Tile, workspace: Workspace) -> None:
            tensor, start, stop = item
            found = gram(tensor.members, tensor.base, start, stop, workspace)
            with lock:
                waiting = parts[tensor.name]
                waiting.append(found)
                # At once: the parts of all tensors of a large model would take gigabytes.
                if len(waiting) == -(-tensor.numel // TILE):
                    sums[tensor.name] = _summed(parts.pop(tensor.name), len(tensor.members))
            self.progress(tensor.input_bytes * (stop - start) // tensor.numel)

        self.run(_tiles(tensors, TILE), work, TILE, _read_by_tiles(tensors))
        return sums

    def refuse_bad(self) -> None:
        """Raises RefusedError with every value found so far that is not finite."""
        if self.bad:
            raise RefusedError(self.bad.values())

    def _explain(self, tensor: TensorPlan, tile: torch.Tensor, start: int, work: Workspace) -> None:
        """Finds which input holds the value, or whether the sum or the cast made it."""
        stop, blamed = start + tile.numel(), False
        for member in tensor.inputs:
            values = work.read(member, start, stop)
            wrong = (~torch.isfinite(values)).nonzero()
            if len(wrong):
                index, blamed = int(wrong[0]), True
                part = member.parts[0]
                what = (
                    f"holds {float(values[index])} at element {start + index}; leave this checkpoint out, or repair it"
                )
                where = f"{part.folder.label}/{part.file}"
                self.bad.setdefault((where, tensor.name), Finding(where, what, tensor.name))
        wrong = (~torch.isfinite(tile)).nonzero()
        if len(wrong) and not blamed:
            largest = torch.finfo(tile.dtype).max
            what = (
                f"becomes {float(tile[int(wrong[0])])} at element {start + int(wrong[0])}: the merged value does not "
                f"fit {DTYPE_NAMES[tensor.dtype]} (largest {largest:.4g}); choose --dtype bfloat16 or float32"
            )
            self.bad.setdefault(("output", tensor.name), Finding("output", what, tensor.name))


def coefficients_of(plan: MergePlan, tensors: Sequence[TensorPlan], engine: Engine) -> dict[str, Coefficients]:
    """Each tensor's coefficients: the rule's constants, or what it makes of the tensor's Gram matrix.

    Raises:
        RefusedError: a value that is not finite.
    """
    floating = [tensor for tensor in tensors if tensor.averaged]
    merged = [tensor for tensor in floating if tensor.merged]
    chosen = {tensor.name: Coefficients((1.0,)) for tensor in floating if not tensor.merged}
    constant = plan.constant_coefficients()
    if constant is not None:
        return chosen | {tensor.name: constant for tensor in merged}
    grams = engine.grams(merged)
    refuse_nonfinite([t for t in merged if not all(map(math.isfinite, chain(*grams[t.name])))], engine)
    measured = {name: plan.rule.coefficients(len(plan.members), plan.options, gram) for name, gram in grams.items()}
    return chosen | measured


def refuse_nonfinite(tensors: Sequence[TensorPlan], engine: Engine) -> None:
    """Looks for the NaN or Inf that made a Gram matrix of these tensors one, and raises RefusedError naming it."""
    plain_sums = {tensor.name: Coefficients((1.0,) * len(tensor.members), base=1.0) for tensor in tensors}
    engine.merge(tensors, plain_sums, lambda tensor, start, tile: None)
    engine.refuse_bad()


def refuse_changed(checkpoints: Iterable[Checkpoint]) -> None:
    """Raises RefusedError if an input file is not what it was when it was opened: ask after reading it."""
    _refuse_changed(tensor for checkpoint in checkpoints for tensor in checkpoint.tensors.values())


def refuse_changed_inputs(tensors: Iterable[TensorPlan]) -> None:
    """The same, of the files alone that these tensors are read from: what each shard asks when it has been computed."""
    _refuse_changed(tensor for plan in tensors for tensor in plan.inputs)


def _refuse_changed(tensors: Iterable[Tensor]) -> None:
    folders: dict[str, tuple[Folder, set[str]]] = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        folders.setdefault(part.folder.identity, (part.folder, set()))[1].add(part.file)
    for folder, files in folders.values():
        folder.refuse_changed(sorted(files))


def refuse_unequal_integers(plan: MergePlan) -> None:
    """Integer and boolean tensors have no mean: they must be equal in all members, byte for byte.

    Raises:
        RefusedError: naming every such tensor and the member in which it differs.
    """
    findings = []
    for tensor in plan.tensors:
        if tensor.averaged:
            continue
        for member, checkpoint in zip(tensor.members[1:], plan.members[1:], strict=False):
            for start in range(0, tensor.numel, TILE):
                stop = min(start + TILE, tensor.numel)
                if not torch.equal(_raw_tile(tensor.members[0], start, stop), _raw_tile(member, start, stop)):
                    what = (
                        f"({member.dtype}) differs from {plain(plan.members[0].label)}'s; integers cannot be averaged"
                    )
                    findings.append(Finding(checkpoint.label, what, tensor.name))
                    break
    if findings:
        raise RefusedError(findings)


def _tiles(tensors: Iterable[TensorPlan], size: int) -> Iterator[Tile]:
    for tensor in tensors:
        for start in range(0, tensor.numel, size):
            yield tensor, start, min(start + size, tensor.numel)


def _read_by_tiles(tensors: Iterable[TensorPlan]) -> Iterator[Stored]:
    """What is read of these tensors tile by tile: of a LoRA tensor the weight; its factors are read at once."""
    return (member.parts[0] for tensor in tensors for member in tensor.inputs)


def _raw_tile(tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    (part,) = tensor.parts
    width = part.nbytes // part.numel
    data = read_bytes(part.folder, part.file, part.offset + start * width, (stop - start) * width)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _summed(parts: Iterable[list[list[float]]], count: int) -> list[list[float]]:
    matrices = list(parts)
    return [[_sum([matrix[i][j] for matrix in matrices]) for j in range(count)] for i in range(count)]


def _sum(numbers: Sequence[float]) -> float:
    """Their exact sum, rounded once; NaN where it has none: infinities of both signs, or numbers that overflow."""
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):
        return math.nan
