"""Units one after the other in this process, for work that is done sooner than a process is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout

from warmerge.pipeline.engine.child import LOG, Outcome, Unit, call, interrupted, stop_requested


def run_inline(
    units: Sequence[Unit],
    threads: int | None,
    on_outcome: Callable[[Outcome], None],
    while_waiting: Callable[[], None],
) -> list[Outcome]:
    """As `run_units`, which is where its arguments are described."""
    import torch

    outcomes: list[Outcome] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with stop_requested() as stop:

            def look() -> bool:
                while_waiting()
                return stop()

            for unit in units:
                if stop():
                    break
                with (unit.folder / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
                    outcomes.append(call(unit, look))
                on_outcome(outcomes[-1])
            if stop():
                raise interrupted(units, outcomes)
    finally:
        torch.set_num_threads(before)
    return outcomes
