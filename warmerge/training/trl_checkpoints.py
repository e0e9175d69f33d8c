"""The checkpoints that TRL's trainers write to go on from, in a folder of their own. Only the last one is kept.

They are not written in one go: one that was written to its end carries a list of its files, written last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from warmerge.errors import Finding, RefusedError

WHOLE = "whole"


def finish_checkpoint(working: Path, step: int) -> None:
    """Marks the checkpoint of a step as whole, and removes all others."""
    written = working / f"checkpoint-{step}"
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    (written / WHOLE).write_text(json.dumps(sizes), encoding="utf-8")
    for other in working.glob("checkpoint-*"):
        if other != written:
            shutil.rmtree(other)


def last_checkpoint(working: Path) -> Path | None:
    """The last checkpoint that was written to its end.

    Raises:
        RefusedError: it has lost some of its files since: without them training would go on to other weights.
    """
    last = max((path.parent for path in working.glob(f"checkpoint-*/{WHOLE}")), key=step_of, default=None)
    if last is None:
        return None
    try:
        sizes = dict(json.loads((last / WHOLE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise RefusedError(
            [Finding(str(last / WHOLE), f"is damaged; delete {last.parent.parent} to begin again")]
        ) from None
    lost = [name for name, size in sizes.items() if not (last / name).is_file() or (last / name).stat().st_size != size]
    if lost:
        what = f"is missing or was cut; delete {last.parent.parent} to begin again"
        raise RefusedError(Finding(str(last / name), what) for name in lost)
    return last


def remove_partial(working: Path) -> None:
    """Removes the checkpoints that were not written to their end."""
    for path in working.glob("checkpoint-*"):
        if not (path / WHOLE).exists():
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written.

    >>> step_of(Path("working/checkpoint-200"))
    200
    """
    return int(checkpoint.name.rpartition("-")[2])
