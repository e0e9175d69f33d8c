"""Independent units of work, such as the members of a run: a local queue of processes, or an existing Ray cluster.

These start the same child process for a unit, so a result does not depend on the engine; the third one, inline, saves
that process where starting it would take longer than the work. A unit may be killed
at any moment: its function looks into its folder, goes on from its last checkpoint, and has no other state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout

from warmerge.errors import UsageError
from warmerge.pipeline.engine.child import Outcome, Unit, interrupted, stop_requested
from warmerge.pipeline.engine.inline import run_inline
from warmerge.pipeline.engine.local import Local, visible_devices
from warmerge.pipeline.engine.ray_cluster import OnRay

__all__ = ["Outcome", "Unit", "check_engine", "run_units", "stop_requested", "visible_devices"]


def run_units(
    units: Sequence[Unit],
    *,
    engine: str = "local",
    address: str = "auto",
    threads: int | None = None,
    devices: Sequence[str] | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Runs all units and returns how each ended, in the order of `units`. One that fails does not stop the others.

    Args:
        engine: "local", a process at a time for each visible GPU, or one on the CPU; "ray", the cluster at `address`,
            whose machines share the units' folders and have warmerge installed; "inline", one after the other in this
            process: what kills a unit kills the run, which goes on when it is started again.
        threads: of each unit, on the CPU. None shares out the processors of a machine among its GPUs.
        devices: for "local", what units run on: CUDA_VISIBLE_DEVICES of each, or "cpu". None takes what is visible.
            For "ray" ["cpu"] leaves a cluster's GPUs alone.
        on_outcome: told of each outcome when the unit ends.
        while_waiting: called about five times a second.

    Raises:
        UsageError: an unknown engine, no Ray, no cluster, or more threads than its machines have.
        Interrupted: Ctrl-C or SIGTERM. The units were told to stop, and have; on another Ctrl-C they were killed.
    """
    check_engine(engine, threads)
    if not units:
        return []
    if engine == "inline":
        return run_inline(units, threads, on_outcome, while_waiting)
    running = Local(units, devices, threads) if engine == "local" else OnRay(units, address, threads, devices)
    outcomes: dict[int, Outcome] = {}
    told = False
    # Ray prints to stdout, where results go, when a worker dies.
    with stop_requested() as stop, redirect_stdout(sys.stderr) if engine == "ray" else nullcontext():
        try:
            while running.busy:
                if stop() and not told:
                    told = True
                    running.stop()
                for i, outcome in running.ended():
                    outcomes[i] = outcome
                    on_outcome(outcome)
                while_waiting()
        except KeyboardInterrupt:
            told = True
            running.kill()
        finally:
            running.close()
        if told or stop():
            raise interrupted(units, outcomes.values())
    return [outcomes[i] for i in range(len(units))]


def check_engine(engine: str, threads: int | None) -> None:
    """Refuses what `run_units` would refuse without looking at a cluster: for those who prepare units for long.

    Raises:
        UsageError: an unknown engine, or fewer threads than one.
    """
    if engine not in ("local", "ray", "inline"):
        raise UsageError(f"--engine: expected local, ray or inline, found {engine!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads: expected 1 or more, found {threads}")
