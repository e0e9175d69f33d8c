"""Units as tasks of an existing Ray cluster. The only module that imports Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmerge.errors import UsageError
from warmerge.pipeline.engine.child import LOG, POLL_SECONDS, SMALLER, Child, Outcome, Unit

_STOP = ".stop"
# What the user said by environment variables, or by --offline, and workers of a cluster would not hear of.
_SETTINGS = ("HF_HUB_OFFLINE",)
_PROBE_SECONDS = 60
_RETRIES = 3
# Ray starts a cluster with a token where one lies about, and does not look there when it connects.
_TOKEN_MISSING = "InvalidAuthToken"
_PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class OnRay:
    """Every unit is a task that runs the child process on a machine of the cluster, and again if its worker dies."""

    def __init__(
        self, units: Sequence[Unit], address: str, threads: int | None, devices: Sequence[str] | None = None
    ) -> None:
        self._ray, self._connected_here = _connect(address)
        self._units = units
        # A file left by a run that was killed does not stop this one.
        self._token = uuid.uuid4().hex
        self._killed = False
        self._pending: dict[Any, int] = {}
        try:
            device = "cpu" if devices == ["cpu"] else None
            resources, threads = _share(self._ray.nodes(), threads, gpus=device is None)
        except UsageError:
            self.close()
            raise
        settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
        task = self._ray.remote(_task).options(max_retries=_RETRIES, **resources)
        for i, unit in enumerate(units):
            self._pending[task.remote(unit, threads, self._token, os.getcwd(), device, settings)] = i

    @property
    def busy(self) -> bool:
        return bool(self._pending)

    def ended(self) -> list[tuple[int, Outcome]]:
        waiting = list(self._pending)
        ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        numbers = [self._pending.pop(task) for task in ready]
        return [(i, self._outcome(task, self._units[i])) for i, task in zip(numbers, ready, strict=True)]

    def _outcome(self, task: Any, unit: Unit) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            if self._killed:
                return Outcome(unit, "stopped", "")
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[-1]}"
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                why = f"out of memory; {SMALLER} ({why})"
            elif isinstance(error, self._ray.exceptions.WorkerCrashedError):
                why = f"its Ray worker died, and again on {_RETRIES} more tries ({why})"
            return Outcome(unit, "failed", f"{why} (see {unit.folder / LOG})")
        return outcome

    def stop(self) -> None:
        for i in self._pending.values():
            (self._units[i].folder / _STOP).write_text(self._token)

    def kill(self) -> None:
        self._killed = True
        for task in self._pending:
            self._ray.cancel(task, force=True)

    def close(self) -> None:
        if self._pending:
            self.stop()
        while self._pending:
            self.ended()
        for unit in self._units:
            (unit.folder / _STOP).unlink(missing_ok=True)
        if self._connected_here:
            self._ray.shutdown()


def _task(
    unit: Unit, threads: int, token: str, cwd: str, device: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Outcome:  # fmt: skip
    """What a Ray worker does for a unit. Ray has set CUDA_VISIBLE_DEVICES; a unit for "cpu" sees no GPU."""
    if not unit.folder.is_dir():
        where = socket.gethostname()
        return Outcome(
            unit, "failed", f"{unit.folder} is not on {where}: a Ray cluster's machines must share the folder"
        )
    if _told(unit.folder, token):
        return Outcome(unit, "stopped", "stopped before it began")
    running = Child(unit, threads, device, cwd if Path(cwd).is_dir() else None, settings)
    asked = time.monotonic()
    while (outcome := running.outcome()) is None:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - asked > 1:
            asked = time.monotonic()
            if _told(unit.folder, token):
                running.process.terminate()
    return outcome


def _told(folder: Path, token: str) -> bool:
    try:
        return (folder / _STOP).read_text() == token
    except FileNotFoundError:
        return False


def _connect(address: str) -> tuple[Any, bool]:
    """The ray module, connected to a cluster, and whether it is for us to disconnect."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray, which is not installed: pip install 'warmerge[ray]'") from None
    if ray.is_initialized():
        return ray, False
    # Where nothing answers, ray.init blocks for minutes and then ends the process: another process tries it first.
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
        said = probe.stderr
        lines = said.strip().splitlines()
        why = None if probe.returncode == 0 else lines[-1] if lines else f"exit code {probe.returncode}"
    except subprocess.TimeoutExpired as error:
        said = str(error.stderr)
        why = f"no answer in {_PROBE_SECONDS} seconds"
    if why is not None and _TOKEN_MISSING in said:
        raise UsageError(
            f"--engine ray: the Ray cluster at {address!r} asks for a token; set RAY_AUTH_MODE=token, with its token "
            "in ~/.ray/auth_token (where `ray get-auth-token --generate` writes one) or in RAY_AUTH_TOKEN"
        )
    if why is not None:
        raise UsageError(
            f"--engine ray: no Ray cluster at {address!r} ({why}); "
            "start one with `ray start --head`, or name the address of one"
        )
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray sets its own
    return ray, True


def _share(nodes: Sequence[dict[str, Any]], threads: int | None, gpus: bool = True) -> tuple[dict[str, int], int]:
    """What a unit asks of the cluster, and its threads: a GPU, or where there is none, or none is wanted, so many
    processors."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if with_gpus and gpus:
        shares = [max(1, int(machine.get("CPU", 1) // machine["GPU"])) for machine in with_gpus]
        return {"num_gpus": 1, "num_cpus": 0}, threads or min(shares)
    cpus = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    threads = threads or min(cpus, default=1)
    if threads > max(cpus, default=0):
        # Ray would wait for such a machine without end.
        raise UsageError(
            f"--threads: {threads}, but the machine of the Ray cluster with most processors has {max(cpus, default=0)}"
        )
    return {"num_cpus": threads}, threads
