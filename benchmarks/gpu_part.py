"""A part of benchmarks/gpu.py: how it keeps its rows and its time; and what the machine can do at most, measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import torch


class NotRunError(Exception):
    """A case that was not run, or failed; the next one is tried."""


@dataclass
class Part:
    """A part that is running: its name, sizes and place, until when (perf_counter), and its table so far."""

    name: str
    out: Path
    work: Path
    device: str
    smoke: bool
    ends: float
    rows: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False

    def row(self, **cells: object) -> None:
        """Prints a row, under a header where its columns are new, and writes all rows so far."""
        made = {name.replace("_", " "): _cell(value) for name, value in cells.items()}
        if not self.rows or self.rows[-1].keys() != made.keys():
            print("\n" + header(made), flush=True)
        print(line(made.values()), flush=True)
        self.rows.append(made)
        partial = self.out / f".{self.name}.partial"
        partial.write_text(json.dumps({"part": self.name, "machine": machine(self.work), "rows": self.rows}, indent=1))
        partial.replace(self.out / f"{self.name}.json")

    @contextlib.contextmanager
    def case(self, what: str, needs: float = 0.0) -> Iterator[None]:
        """For a case that takes about `needs` seconds: raises NotRunError, after a row that says so, where they are not
        left or the case fails. The other cases are wanted even so: the machine may be lent once only."""
        if time.perf_counter() + needs > self.ends:
            self.row(case=what, not_run="no time was left for it")
            raise NotRunError
        try:
            yield
        except NotRunError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a row, and the run's exit status
            traceback.print_exc()
            self.failed = True
            self.row(case=what, not_run=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            raise NotRunError from None


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def header(row: dict[str, str]) -> str:
    return line(row) + "\n" + "|---" * len(row) + "|"


def machine(work: Path) -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "date": str(date.today()), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores": str(os.cpu_count()), "cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "transformers": metadata.version("transformers"), "python": platform.python_version(),
        "files in": str(work.parent),
    }  # fmt: skip


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of several calls, each with everything that it started on the GPU; one before them is not timed."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def peak_gigabytes() -> float:
    """Most GPU memory that torch has held since the last call; nan without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    found = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return found


def bus_rates(device: str, nbytes: int, pinned: bool) -> tuple[float, float]:
    """GB/s from the host to the device, and back."""
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned and device != "cpu")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    up = seconds(lambda: there.copy_(host, non_blocking=pinned))
    down = seconds(lambda: host.copy_(there, non_blocking=pinned))
    return nbytes / up / 1e9, nbytes / down / 1e9


def matrix_peak(device: str, size: int) -> float:
    """TFLOP/s of the product of two square bf16 matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * size**3 / seconds(lambda: [a @ b for _ in range(10)]) / 1e12


def limits(part: Part) -> None:
    """Buses, memories, matrix products, the disk."""
    nbytes, size = (1 << 22, 64) if part.smoke else (1 << 30, 8192)
    begun = time.perf_counter()
    torch.ones(1, device=part.device)
    part.row(limit="first use of the device, s", found=time.perf_counter() - begun)
    if part.device != "cpu":
        begun = time.perf_counter()
        torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        part.row(limit="pinning 256 MiB of the host, s", found=time.perf_counter() - begun)
    here, copied = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    part.row(limit="host to host, all threads, GB/s copied", found=nbytes / seconds(lambda: copied.copy_(here)) / 1e9)
    for what, pinned in (("pinned", True), ("pageable", False)):
        up, down = bus_rates(part.device, nbytes, pinned)
        part.row(limit=f"host to device, {what}, GB/s", found=up)
        part.row(limit=f"device to host, {what}, GB/s", found=down)
    there, other = (torch.ones(nbytes, dtype=torch.uint8, device=part.device) for _ in range(2))
    copy = seconds(lambda: [other.copy_(there) for _ in range(10)]) / 10
    part.row(limit="device memory, GB/s read and written", found=2 * nbytes / copy / 1e9)
    part.row(limit=f"bf16 matrix product of {size}, TFLOP/s", found=matrix_peak(part.device, size))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "file"
        file.write_bytes(os.urandom(1 << 20) * (nbytes >> 20))
        with file.open("r+b", buffering=0) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for what in ("disk, cold", "disk, in the page cache"):
                stream.seek(0)
                begun = time.perf_counter()
                while stream.read(1 << 24):
                    pass
                part.row(limit=f"{what}, one thread, GB/s", found=nbytes / (time.perf_counter() - begun) / 1e9)
