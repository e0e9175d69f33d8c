"""The unit of work that an engine runs: one member in its folder, trained, measured, written down.

RUNS/members/01/member.json   what it is, written before
RUNS/members/01/result.json   how it went, written last: a member that has it is done
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, Interrupted, RefusedError
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, open_bench
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.training.member import ROWS, Member, read_member, train_member
from warmerge.training.ranks import on_all_ranks
from warmerge.training.record import TRAIN, write_json
from warmerge.training.training_set import TrainingSet, read_pairs
from warmerge.version import versions

RESULT = "result.json"
# The end of the learning curve that is summed up: the last tenth of the steps.
_END = 10


def run_member(folder: Path, stop: Callable[[], bool]) -> None:
    """Trains the member of `folder`, RUNS/members/NN, and measures it on the sets that RUNS/train.json names.

    A member that is done is left alone; one that was interrupted goes on where it was. Under torchrun every rank calls
    this: all train, the first one measures, and none of the others waits for that.

    Raises:
        Interrupted: `stop` said so; a checkpoint was written.
        UsageError, RefusedError, WarmergeError: as `train_member`, `load_reward_model` and `open_bench`; a validation
            set that is not what it was when the run was begun; ranks that do not share the folder.
    """
    read = on_all_ranks(partial(_read, folder), lambda read: read and asdict(read[0]))
    if read is None:
        return
    member, pairs = read
    runs, steps = folder.parent.parent, member.recipe.steps
    init = runs / member.init
    for row in train_member(member, init, pairs, folder, stop):
        steps = row["step"]
    gc.collect()  # a divided model refers to itself: it would stay while it is measured, and while the next one trains
    if steps < member.recipe.steps:
        what = f"member {member.name} was stopped after {steps} of {member.recipe.steps} steps"
        raise Interrupted(f"{what}; run it again to go on")
    if int(os.environ.get("RANK", "0")) == 0:
        result = _curve(folder, member) | _measured(folder, member, init, _settings(runs / TRAIN))
        write_json(folder / RESULT, result)


def _read(folder: Path) -> tuple[Member, TrainingSet] | None:
    """What a member is and the pairs that it is trained on; None where it is done."""
    if (folder / RESULT).exists():
        return None
    member = read_member(folder / "member.json")
    return member, read_pairs(folder.parent.parent / "pairs.safetensors", member.pairs)


def _curve(folder: Path, member: Member) -> dict[str, Any]:
    """What the rows of a finished training say together."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]
    if [row["step"] for row in rows] != list(range(1, member.recipe.steps + 1)):
        what = f"does not hold a row for each of {member.recipe.steps} steps; delete {folder} to train it again"
        raise RefusedError([Finding(str(folder / ROWS), what)])
    end = rows[-math.ceil(len(rows) / _END) :]
    return {
        "steps": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "final_loss": sum(row["loss"] for row in end) / len(end),
        "final_accuracy": sum(row["accuracy"] for row in end) / len(end),
    }


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = {"val": found["val"], "loading": found["loading"], "measuring": found["measuring"]}
        return {**settings, "val_fingerprints": found.get("asked", {}).get("val_fingerprints")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError([Finding(str(path), f"does not say how members are measured ({error!r})")]) from None


def _measured(folder: Path, member: Member, init: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The saved member as everybody will load it: accuracy and scale of its rewards on each validation set."""
    from warmerge.training.head import head_digest

    base = init if member.recipe.adapter else None
    measuring = Measuring(loading=LoadOptions(**settings["loading"]), base=base, **settings["measuring"])
    model = load_reward_model(folder, measuring.loading, measuring.base)
    return {
        "val": accuracies(model, settings["val"], measuring, settings["val_fingerprints"]),
        "head": head_digest(folder),
        "warnings": [str(warning) for warning in model.warnings],
        "versions": {**versions(), **{name: metadata.version(name) for name in ("accelerate", "peft")}},
    }


def accuracies(
    model: RewardModel, val: Sequence[str], measuring: Measuring, fingerprints: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy with its interval, and the scale of the rewards, on each validation set, by its name.

    Args:
        fingerprints: of the sets that are meant.

    Raises:
        RefusedError: a set is another one.
    """
    if not val:
        return {}
    bench = open_bench(val, measuring)
    found_now = [subset.preferences.fingerprint for subset in bench.sets]
    if fingerprints is not None and found_now != list(fingerprints):
        what = "other members are measured on what it held when the run was begun; put that back and run it again"
        changed = [s for s, now in zip(bench.sets, found_now, strict=True) if now not in fingerprints] or bench.sets
        raise RefusedError(Finding(s.preferences.source, f"has changed since: {what}") for s in changed)
    measuring.on_work(sum(map(len, bench.texts().values())))
    rewards, found = bench.score(model), {}
    for subset in bench.sets:
        values = rewards[subset.scored]
        means, drawn = bench.means(subset, metrics.right(subset.margins(values)[None]))
        accuracy = metrics.interval(float(means[0]), drawn[:, 0], subset.prompts, bounds=(0.0, 1.0))
        found[subset.name] = {
            "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high,
            "n": subset.n, "prompts": subset.prompts,
            # Members whose rewards have different scales do not weigh the same in an ensemble.
            "reward_mean": float(values.mean()), "reward_sd": float(values.std()),
        }  # fmt: skip
    return found
