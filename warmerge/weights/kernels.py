"""The two kernels of every merge, over one tile of one tensor: a weighted sum and a Gram matrix.

Both compute in float64. The sum of bfloat16 or float16 values is then exact unless their exponents lie more than
40 bits apart, so the mean is the correctly rounded one and does not depend on the members' order. With float32
accumulators neither holds. Summing in float64 costs about a fifth of a tile's time, rounding only once another fifth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch

from warmerge.weights.checkpoint import LowRank, Stored, Tensor
from warmerge.weights.folder import Folder, Reader

TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INTEGER_DTYPE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
# Bits of a float32 that are all zero in a value halfway between two neighbours of the 16-bit type.
_HALFWAY = {torch.bfloat16: 0x7FFF, torch.float16: 0x0FFF}
# 256 Ki elements: large enough to hide the interpreter, small enough for the accumulator to stay in the cache.
# The Gram matrix is summed tile by tile, so its last bit depends on this number; a mean's bits do not.
TILE = 1 << 18


class Workspace:
    """One thread's buffers, reused for every tile.

    On CUDA the host buffers are pinned and there are two of them: the next member is read from disk while the
    last one is still on its way to the GPU. `open_reader` makes this thread's reader of a folder.
    """

    def __init__(
        self,
        device: torch.device,
        elements: int = TILE,
        open_reader: Callable[[Folder], Reader] = lambda folder: folder.reader(),
    ) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self._raw = [torch.empty(elements * 8, dtype=torch.uint8, pin_memory=self.cuda) for _ in range(1 + self.cuda)]
        self._uploaded = [torch.cuda.Event() for _ in self._raw] if self.cuda else []  # type: ignore[no-untyped-call]
        self._turn = 0
        self._on_device = torch.empty(elements * 8, dtype=torch.uint8, device=device) if self.cuda else None
        self.host_out = torch.empty(elements * 8, dtype=torch.uint8, pin_memory=self.cuda)
        self.device_out = torch.empty(elements * 8, dtype=torch.uint8, device=device) if self.cuda else self.host_out
        self.accumulator = torch.empty(elements, dtype=torch.float64, device=device)
        self.wide = torch.empty(elements, dtype=torch.float64, device=device)
        self.single = torch.empty(elements, dtype=torch.float32, device=device)
        self.bits = torch.empty(elements, dtype=torch.int32, device=device)
        self.flags = torch.empty(2, elements, dtype=torch.bool, device=device)
        self._open_reader = open_reader
        self._readers: dict[str, Reader] = {}
        self._rows: torch.Tensor | None = None
        self._factors: tuple[LowRank, torch.Tensor, torch.Tensor] | None = None

    def close(self) -> None:
        """Closes the files that it read from."""
        for reader in self._readers.values():
            reader.close()

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Runs this thread's kernels on its own stream, so that one thread's upload overlaps another's compute."""
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def read(self, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a tensor, flat, on the device. Valid until the next call."""
        if isinstance(tensor, LowRank):
            return _read_low_rank(tensor, start, stop, self)
        self._turn = (self._turn + 1) % len(self._raw)
        if self.cuda:
            self._uploaded[self._turn].synchronize()
        width = tensor.nbytes // tensor.numel
        raw = self._raw[self._turn][: (stop - start) * width]
        reader = self._readers.get(tensor.folder.identity)
        if reader is None:
            reader = self._readers[tensor.folder.identity] = self._open_reader(tensor.folder)
        reader.readinto(tensor.file, tensor.offset + start * width, memory(raw))
        if self._on_device is None:
            return raw.view(TORCH_DTYPE[tensor.dtype])
        moved = self._on_device[: raw.numel()]
        moved.copy_(raw, non_blocking=True)
        self._uploaded[self._turn].record()
        return moved.view(TORCH_DTYPE[tensor.dtype])

    def factors(self, tensor: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """up (rows, r) and down (r, columns) of a LoRA tensor in float64; those of the last tensor are kept."""
        if self._factors is None or self._factors[0] is not tensor:
            up, down = (load(part).double().to(self.device) for part in (tensor.up, tensor.down))
            if tensor.factors_transposed:
                up, down = down.T, up.T
            self._factors = (tensor, up, down)
        return self._factors[1:]

    def rows(self, count: int, elements: int) -> torch.Tensor:
        """(count, elements) of float64 to write into; the same memory every time."""
        if self._rows is None or self._rows.numel() < count * elements:
            self._rows = torch.empty(count * self.accumulator.numel(), dtype=torch.float64, device=self.device)
        return self._rows[: count * elements].view(count, elements)

    def download(self, tile: torch.Tensor) -> torch.Tensor:
        """A tile of `device_out` on the host, ready to be written."""
        if self.stream is None:
            return tile
        host = self.host_out[: tile.numel() * tile.element_size()].view(tile.dtype)
        host.copy_(tile, non_blocking=True)
        self.stream.synchronize()
        return host


def weighted_sum(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    divisor: float,
    start: int,
    stop: int,
    dtype: torch.dtype,
    work: Workspace,
) -> torch.Tensor:
    """(sum_i coefficients[i] * tensors[i]) / divisor over elements start..stop, rounded once to `dtype`.

    A coefficient of exactly 0 adds nothing, so that an end point of a path is a member to the bit (-0.0 included);
    but what it leaves out must be finite too, and the result is NaN where it is not.
    """
    total = work.accumulator[: stop - start]
    wide = work.wide[: stop - start]
    empty, poison = True, 0.0
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        tile = work.read(tensor, start, stop)
        if coefficient == 0:
            poison += float((tile.double() * 0).sum())
        elif empty:
            total.copy_(tile)
            if coefficient != 1:
                total.mul_(coefficient)
            empty = False
        else:
            wide.copy_(tile)
            total.add_(wide, alpha=coefficient)
    assert not empty, "a rule gives at least one member a coefficient"
    if math.frexp(divisor)[0] == 0.5:  # a power of two: its reciprocal is exact, and a product is cheaper
        if divisor != 1:
            total.mul_(1 / divisor)
    elif work.cuda:
        # A tensor on the device: CUDA divides by a Python number by multiplying with its rounded reciprocal.
        total.div_(torch.tensor(divisor, dtype=torch.float64, device=total.device))
    else:
        total.div_(divisor)
    if poison != 0:  # NaN: 0 * NaN and 0 * Inf
        total.fill_(poison)
    out = work.device_out[: total.numel() * dtype.itemsize].view(dtype)
    _round(total, out, work)
    return work.download(out)


def _round(total: torch.Tensor, out: torch.Tensor, work: Workspace) -> None:
    """out = total, rounded once, to nearest, ties to even.

    torch casts float64 to a 16-bit type by way of float32, which rounds twice: where the first rounding ends on a tie
    of the second, the side on which the value lies is lost. There the float32 value is moved one step towards it. (The
    test also finds values that the 16-bit type has; one step of float32 does not change how they are rounded.)
    """
    if out.dtype not in _HALFWAY:
        out.copy_(total)
        return
    count = total.numel()
    single, there = work.single[:count], work.flags[0, :count]
    single.copy_(total)
    # numpy compares five times as fast as torch does on a CPU, and has the same names for it.
    buffers = (single, total, single.view(torch.int32), work.bits[:count], there, work.flags[1, :count])
    near, value, pattern, low, doubtful, at_tie = buffers if work.cuda else (buffer.numpy() for buffer in buffers)
    library: Any = torch if work.cuda else numpy
    library.not_equal(near, value, out=doubtful)
    library.bitwise_and(pattern, _HALFWAY[out.dtype], out=low)
    library.logical_not(low, out=at_tie)
    library.logical_and(doubtful, at_tie, out=doubtful)
    if doubtful.any():
        direction = torch.where(total[there] > single[there], math.inf, -math.inf).float()
        single[there] = torch.nextafter(single[there], direction)
    out.copy_(single)


def finite(tile: torch.Tensor) -> bool:
    """False if a value of the tile is NaN or Inf; rarely also when the finite values' sum overflows.

    One pass at the speed of a sum. A caller that gets False looks closer.
    """
    return math.isfinite(tile.sum(dtype=torch.float32 if tile.dtype == torch.float16 else None))


def gram(tensors: Sequence[Tensor], base: Tensor | None, start: int, stop: int, work: Workspace) -> list[list[float]]:
    """Inner products (M, M) of the members' task vectors theta_i - base over elements start..stop, in float64.

    Without a base the members themselves stand in for their task vectors.
    """
    count = stop - start
    rows = work.rows(len(tensors), count)
    for row, tensor in zip(rows, tensors, strict=True):
        row.copy_(work.read(tensor, start, stop))
    if base is not None:
        origin = work.wide[:count]
        origin.copy_(work.read(base, start, stop))
        rows.sub_(origin)
    products: list[list[float]] = (rows @ rows.T).tolist()
    return products


@contextlib.contextmanager
def one_thread_per_kernel() -> Iterator[None]:
    """Threads of ours work on different tiles; torch's own threads inside one tile would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into or write from."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def load(tensor: Stored) -> torch.Tensor:
    """A whole small tensor, in its own dtype and shape."""
    buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
    tensor.folder.readinto(tensor.file, tensor.offset, memory(buffer))
    return buffer.view(TORCH_DTYPE[tensor.dtype]).reshape(tensor.shape)


def _read_low_rank(tensor: LowRank, start: int, stop: int, work: Workspace) -> torch.Tensor:
    """W + scale * (up @ down) in float64: only the rows that the tile touches are multiplied."""
    columns = tensor.shape[-1]
    first, last = start // columns, -(-stop // columns)
    up, down = work.factors(tensor)
    delta = (up[first:last] @ down).reshape(-1)[start - first * columns : stop - first * columns]
    return delta.mul_(tensor.scale).add_(work.read(tensor.weight, start, stop))
