"""The part of benchmarks/gpu.py that trains: members of one start with random weights, on made-up pairs."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from gpu_models import WORDS, make_decoder
from gpu_part import NotRunError, Part, peak_gigabytes
from training import make_pairs

import warmerge
from warmerge.rewards.model import LoadOptions, load_reward_model
from warmerge.training.head import head_digest
from warmerge.training.member import Member, Recipe, train_member
from warmerge.training.trainable import rewards
from warmerge.training.training_set import TrainingSet


@dataclass(frozen=True)
class Setting:
    """What all members share."""

    init: Path
    pairs: TrainingSet
    steps: int
    batch: int


def train(part: Part) -> None:
    """Speed and memory of each member; whether the same member comes out twice; the accuracies of all and of their
    average on pairs that were held out, where there is one thing to learn: which half of the words is good."""
    shape, count, steps, batch, held = ("tiny", 2, 3, 4, 8) if part.smoke else ("135M", 6, 150, 32, 512)
    init = make_decoder(part.work / "init", shape, part.device, torch.float32)
    pairs = make_pairs(steps * batch + held, WORDS, 0)
    shared = Setting(init, _part_of(pairs, slice(0, -held)), steps, batch)
    short, folders, takes = min(20, steps), [], 10.0
    losses: dict[str, list[float]] = {}
    for k in range(count):
        with suppress(NotRunError), part.case(f"member {k + 1}", needs=takes):
            begun, folder = time.perf_counter(), part.work / f"member-{k + 1}"
            losses[str(k)] = _member(part, shared, folder, k, "bfloat16", steps)
            folders.append(folder)
            takes = time.perf_counter() - begun
        if k == 0:
            for precision in ("bfloat16", "float32"):
                with suppress(NotRunError), part.case(f"member 1 again, {precision}", needs=takes / 3):
                    losses[precision] = _member(part, shared, part.work / precision, 0, precision, short)
    if {"0", "bfloat16"} <= losses.keys():
        alike = losses["0"][:short] == losses["bfloat16"]
        part.row(check=f"member 1 begun again has the same {short} losses to the bit", found=alike)
    with suppress(NotRunError), part.case("accuracies"):
        warm = warmerge.average(folders, part.work / "warm").out
        for name, folder in [*((folder.name, folder) for folder in folders), ("average", warm)]:
            right = _accuracy(folder, pairs, numpy.arange(len(pairs) - held, len(pairs)), part.device)
            part.row(model=name, held_out_pairs=held, accuracy=right)


def _member(part: Part, shared: Setting, folder: Path, seed: int, precision: str, wanted: int) -> list[float]:
    """Trains a member, or its first steps, prints its row and returns its losses."""
    folder.mkdir()
    recipe = Recipe(
        shared.steps, shared.batch, warmup=shared.steps // 10, precision=precision, save_every=shared.steps + 1
    )
    member = Member(str(seed), "init", head_digest(shared.init), "", 1e-4, 0.0, seed, recipe)
    peak_gigabytes()
    rows, ends = [], []
    begun = time.perf_counter()
    for row in train_member(member, shared.init, shared.pairs, folder):
        rows.append(row)
        ends.append(time.perf_counter())
        if len(rows) == wanted < shared.steps:
            break
    timed, last = ends[-1] - ends[0], [row["accuracy"] for row in rows[-20:]]
    part.row(
        member=seed + 1, precision=precision, steps=len(rows), s=time.perf_counter() - begun,
        s_a_step=timed / (len(rows) - 1), tokens_per_s=sum(row["tokens"] for row in rows[1:]) / timed,
        peak_GB=peak_gigabytes(), first_loss=rows[0]["loss"], last_loss=rows[-1]["loss"],
        accuracy_of_last_steps=sum(last) / len(last),
    )  # fmt: skip
    return [row["loss"] for row in rows]


def _part_of(pairs: TrainingSet, which: slice) -> TrainingSet:
    """Some pairs of a set, with all its texts."""
    return replace(pairs, chosen=pairs.chosen[which], rejected=pairs.rejected[which], margins=pairs.margins[which])


@torch.inference_mode()
def _accuracy(folder: Path, pairs: TrainingSet, which: numpy.ndarray, device: str) -> float:
    model = load_reward_model(folder, LoadOptions(device=device, dtype="float32", template="plain"))
    parts = [rewards(model.module, model.module.config, pairs, some, model.device) for some in numpy.split(which, 8)]
    return float(torch.cat([chosen >= rejected for chosen, rejected in parts]).float().mean())
