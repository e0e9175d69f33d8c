"""The checkpoints that TRL's trainers write to go on from, in a folder of their own. Only the last one is kept.

They are not written in one go: one that was written to its end carries a list of its files, written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warmerge.errors import Finding, RefusedError, WarmergeError, naming, plain

WHOLE = "whole"
# What torch says where a checkpoint cannot be written to its end, or read: of a full disk it does not speak.
_TORCH_SAYS = ("PytorchStream", "inline_container", "iostream error")


@contextmanager
def checkpoints_in(working: Path) -> Iterator[None]:
    """Around whatever writes checkpoints to a folder and reads them: what fails on the disk is said with the folder.

    Raises:
        WarmergeError: torch or safetensors could not write or read one. OSErrors without a name get the folder's.
    """
    from safetensors import SafetensorError

    try:
        with naming(working):
            yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_SAYS):
            raise
        what = f"a checkpoint in {plain(str(working))} cannot be written or read: {error}"
        hint = "Is the disk full? The same command goes on; if it says this again, delete the run's folder"
        raise WarmergeError(f"{what}. {hint}") from error


def finish_checkpoint(working: Path, step: int) -> None:
    """Marks the checkpoint of a step as whole, and removes all others."""
    written = working / f"checkpoint-{step}"
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    partial = working / f".{WHOLE}.partial"  # a list that was cut would be a damaged checkpoint
    partial.write_text(json.dumps(sizes), encoding="utf-8")
    os.replace(partial, written / WHOLE)
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
