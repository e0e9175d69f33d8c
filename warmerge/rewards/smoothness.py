"""How far a reward moves under small changes of an answer that should not matter. WARM, Remark 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.rewards import metrics
from warmerge.rewards.bench import Bench
from warmerge.rewards.pairs import Text
from warmerge.rewards.perturb import PERTURBATIONS, perturb

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class Sample:
    """Answers of a scored set, changed: `changed[i]` is its text number `origin[i]` after the change named `change[i]`.

    `prompts[i]` is what counts as its prompt when resampling.
    """

    scored: str
    origin: tuple[int, ...]
    change: tuple[str, ...]
    prompts: tuple[str, ...]
    changed: tuple[tuple[Text, Text], ...]


def sample_changes(bench: Bench, count: int) -> list[Sample]:
    """For each scored set `count` random answers, each in every change that there is something to change for."""
    samples = []
    for name, texts in bench.texts().items():
        prompts, seed = _prompts(bench, name), bench.measuring.seed
        picked = sorted(numpy.random.default_rng(seed).choice(len(texts), min(count, len(texts)), replace=False))
        made = [(int(i), change, perturb(texts[i][1], change, seed)) for i in picked for change in PERTURBATIONS]
        kept = [(i, change, answer) for i, change, answer in made if answer != texts[i][1]]
        if kept:
            origin, changes, answers = zip(*kept, strict=True)
            changed = tuple((texts[i][0], answer) for i, answer in zip(origin, answers, strict=True))
            samples.append(Sample(name, origin, changes, tuple(prompts[i] for i in origin), changed))
    return samples


def movements(
    bench: Bench,
    samples: Sequence[Sample],
    before: Mapping[str, Mapping[str, Array]],
    after: Mapping[str, Sequence[Array]],
) -> list[dict[str, Any]]:
    """Rows: for each set, model and change the mean of |r(changed) - r| / std(r), with an interval over prompts.

    std(r) is over all texts of the set. A model that gives them all one reward has no scale, and no row.

    Args:
        before: by model, by set: its rewards (N,) of the set's texts.
        after: by model: for each sample its rewards of the changed answers.
    """
    rows = []
    for number, sample in enumerate(samples):
        for model, moved in after.items():
            rewards = before[model][sample.scored]
            if not numpy.ptp(rewards):
                continue
            distance = numpy.abs(moved[number] - rewards[list(sample.origin)]) / metrics.spread(rewards)
            for change in ("all", *PERTURBATIONS):
                chosen = [i for i, name in enumerate(sample.change) if change in ("all", name)]
                if not chosen:
                    continue
                prompts = [sample.prompts[i] for i in chosen]
                drawn = metrics.replicates(
                    distance[None, chosen], prompts, bench.measuring.resamples, bench.measuring.seed
                )
                found = metrics.interval(float(distance[chosen].mean()), drawn[:, 0], len(set(prompts)))
                rows.append(
                    {
                        "set": sample.scored, "model": model, "change": change,
                        "n": len(chosen), "prompts": len(set(prompts)),
                        "moved": found.value, "low": found.low, "high": found.high,
                    }
                )  # fmt: skip
    return rows


def _prompts(bench: Bench, name: str) -> dict[int, str]:
    """The prompt of each text of a scored set: that of the first comparison, in any part of the set, that it is in."""
    prompts: dict[int, str] = {}
    for texts in (subset.texts for subset in bench.sets if subset.scored == name):
        for prompt, chosen, rejected in zip(texts.clusters, texts.chosen, texts.rejected, strict=True):
            for i in (*chosen, *rejected):
                prompts.setdefault(i, prompt)
    return prompts
