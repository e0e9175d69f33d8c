"""A queue of processes on this machine."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence

from warmerge.pipeline.engine.child import POLL_SECONDS, Child, Outcome, Unit


class Local:
    """A queue of units, and a slot for each device that they run on."""

    def __init__(self, units: Sequence[Unit], devices: Sequence[str] | None, threads: int | None) -> None:
        self._free = list(visible_devices() if devices is None else devices)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Shared among all slots, also if there are fewer units: the last one resumed alone computes as before.
        self._threads = threads or max(1, cpus // len(self._free))
        self._waiting = deque(enumerate(units))
        self._running: list[tuple[int, str, Child]] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def ended(self) -> list[tuple[int, Outcome]]:
        """Starts what there is room for, waits a moment, and returns what has ended."""
        while self._free and self._waiting:
            i, unit = self._waiting.popleft()
            device = self._free.pop(0)
            self._running.append((i, device, Child(unit, self._threads, device)))
        time.sleep(POLL_SECONDS)
        found = []
        for entry in list(self._running):
            i, device, process = entry
            outcome = process.outcome()
            if outcome is not None:
                self._running.remove(entry)
                self._free.append(device)
                found.append((i, outcome))
        return found

    def stop(self) -> None:
        self._waiting.clear()
        for _, _, running in self._running:
            running.process.terminate()

    def kill(self) -> None:
        for _, _, running in self._running:
            running.process.kill()

    def close(self) -> None:
        self.stop()
        while self._running:
            self.ended()


def visible_devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES for one process on each GPU that this process sees; or ["cpu"]."""
    import torch

    count = torch.cuda.device_count()  # does not initialise CUDA
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(i) for i in range(count)]
    # CUDA takes the names up to the first one that is no GPU.
    return names[:count] or ["cpu"]
