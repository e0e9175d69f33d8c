"""A member trained by two processes together is the member that one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_member import another, equal, rows, start_run, train, weights

from warmerge.training import saving
from warmerge.training.member import Recipe
from warmerge.training.unit import RESULT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RECIPE = Recipe(steps=4, batch=8, warmup=1, save_every=2, batch_tokens=300)
# What an engine does on every rank: one member after the other, and an error of all ranks is an error of that member.
SCRIPT = """
import os, sys
from pathlib import Path
from warmerge.errors import WarmergeError
from warmerge.training.unit import run_member

rank, last = int(os.environ["RANK"]), int(sys.argv[1])
for folder in sys.argv[2:]:
    steps = iter(range(1, 100))
    try:
        run_member(Path(folder), lambda: rank == 1 and last > 0 and next(steps) >= last)
    except WarmergeError as error:
        Path(folder, f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
"""

# Of rank 1: the disk fails where member 02 lies, and member 03 lies elsewhere.
ALONE = """
import os
from warmerge.errors import Finding, RefusedError
from warmerge.training import saving

load, checkpoints = saving.load_checkpoint, saving.checkpoints
def fails(checkpoint, module, *more):
    if checkpoint.parent.name == "02":
        raise RefusedError([Finding("the checkpoint", "cannot be read")])
    load(checkpoint, module, *more)
if os.environ["RANK"] == "1":
    saving.load_checkpoint = fails
    saving.checkpoints = lambda folder: [] if folder.name == "03" else checkpoints(folder)
"""


def on_two_ranks(tmp_path: Path, last: int, *folders: Path, first: str = "") -> None:
    """Runs the members; rank 1 alone is told to stop in step `last`, if that is not 0. Both run `first` before."""
    script = tmp_path / "both.py"
    script.write_text(first + SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(last), *map(str, folders)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all((one[name] - other[name]).norm() <= 1e-6 * one[name].norm() for name in one)


def losses(folder: Path) -> list[Any]:
    return [(row["loss"], row["accuracy"], row["tokens"]) for row in rows(folder)]


def test_two_ranks_equal_one_also_when_interrupted(tmp_path: Path) -> None:
    one = start_run(tmp_path, recipe=RECIPE, dropout=0.0)
    both, stopped, broken = another(one, "02"), another(one, "03"), another(one, "04", lr=1e30)
    train(one)
    on_two_ranks(tmp_path, 3, stopped)
    for rank in (0, 1):
        said = (stopped / f"error-{rank}.txt").read_text()
        assert said.startswith("Interrupted: member 03 was stopped after 3 of 4 steps")
    assert not saving.is_saved(stopped)
    # The member that fails on the way keeps nobody waiting, and nobody from the next one.
    on_two_ranks(tmp_path, 0, both, broken, stopped)
    assert close(weights(one), weights(both))
    for (loss, *other), (expected, *others) in zip(losses(both), losses(one), strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert other == others
    assert equal(stopped, both)
    assert rows(stopped) == rows(both)
    assert {(broken / f"error-{rank}.txt").read_text()[:34] for rank in (0, 1)} == {
        "WarmergeError: member 04: step 2 i"
    }
    assert not saving.is_saved(broken)
    results = [json.loads((folder / RESULT).read_text()) for folder in (both, stopped)]
    assert results[0]["val"] == results[1]["val"]


@pytest.mark.parametrize("divided", [False, True])
def test_a_rank_that_fails_alone_mixes_no_members(tmp_path: Path, divided: bool) -> None:
    """Rank 1 cannot read a checkpoint, then does not see one: no rank trains that member, both train the next one."""
    recipe = replace(RECIPE, shard=divided)
    whole = start_run(tmp_path, recipe=recipe, dropout=0.0)
    unread, unseen, following = another(whole, "02"), another(whole, "03"), another(whole, "04")
    on_two_ranks(tmp_path, 3, unread)
    on_two_ranks(tmp_path, 3, unseen)
    on_two_ranks(tmp_path, 0, whole, unread, unseen, following, first=ALONE)
    found = [[(folder / f"error-{rank}.txt").read_text() for rank in (0, 1)] for folder in (unread, unseen)]
    assert found[0][0].endswith("rank 1: refused: the checkpoint: cannot be read")
    assert found[0][1].endswith("RefusedError: refused: the checkpoint: cannot be read")
    assert all("rank 0 found 3, rank 1 found 0: all ranks must share the run's folder" in said for said in found[1])
    assert not saving.is_saved(unread)
    assert not saving.is_saved(unseen)
    assert equal(whole, following)
    for folder in (unread, unseen):
        on_two_ranks(tmp_path, 0, folder)
        assert equal(whole, folder)


def test_what_the_first_rank_cannot_write_ends_the_member_on_all(tmp_path: Path) -> None:
    folder = start_run(tmp_path, recipe=RECIPE, dropout=0.0)
    following = another(folder, "02")
    odd = another(folder, "03", {"batch": 7})
    (folder / ".checkpoint.partial").write_text("a file where a folder is to be made")
    on_two_ranks(tmp_path, 0, folder, odd, following)
    for rank in (0, 1):
        assert "a checkpoint at step 2 could not be written" in (folder / f"error-{rank}.txt").read_text()
        assert "--batch 7: expected a multiple of 2, the processes" in (odd / f"error-{rank}.txt").read_text()
    assert (following / RESULT).exists()
    assert not saving.is_saved(folder)
