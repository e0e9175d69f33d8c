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
from importlib import metadata
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, Interrupted, RefusedError
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, open_bench
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.training import saving
from warmerge.training.member import ROWS, Member, read_member, train_member
from warmerge.training.record import TRAIN, write_json
from warmerge.training.training_set import read_pairs
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
        UsageError, RefusedError, WarmergeError: as `train_member`, `load_reward_model` and `open_bench`.
    """
    if (folder / RESULT).exists():
        return
    runs, member = folder.parent.parent, read_member(folder / "member.json")
    init = runs / member.init
    pairs = read_pairs(runs / "pairs.safetensors", member.pairs)
    for _ in train_member(member, init, pairs, folder, stop):
        pass
    gc.collect()  # a divided model refers to itself: it would stay while it is measured, and while the next one trains
    if not saving.is_saved(folder):
        steps = saving.step_of(saving.checkpoints(folder)[-1])
        what = f"member {member.name} was stopped after {steps} of {member.recipe.steps} steps"
        raise Interrupted(f"{what}; run it again to go on")
    if int(os.environ.get("RANK", "0")) == 0:
        result = _curve(folder, member) | _measured(folder, member, init, _settings(runs / TRAIN))
        write_json(folder / RESULT, result)


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
        return {"val": found["val"], "loading": found["loading"], "measuring": found["measuring"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError([Finding(str(path), f"does not say how members are measured ({error!r})")]) from None


def _measured(folder: Path, member: Member, init: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The saved member as everybody will load it: accuracy and scale of its rewards on each validation set."""
    from warmerge.training.head import head_digest

    base = init if member.recipe.adapter else None
    measuring = Measuring(loading=LoadOptions(**settings["loading"]), base=base, **settings["measuring"])
    model = load_reward_model(folder, measuring.loading, measuring.base)
    return {
        "val": accuracies(model, settings["val"], measuring),
        "head": head_digest(folder),
        "warnings": [str(warning) for warning in model.warnings],
        "versions": {**versions(), **{name: metadata.version(name) for name in ("accelerate", "peft")}},
    }


def accuracies(model: RewardModel, val: Sequence[str], measuring: Measuring) -> dict[str, dict[str, float]]:
    """Accuracy with its interval, and the scale of the rewards, on each validation set, by its name."""
    if not val:
        return {}
    bench = open_bench(val, measuring)
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
