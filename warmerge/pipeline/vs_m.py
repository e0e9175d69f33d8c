"""`warmerge lmc-curve --accuracy-vs-m`: accuracy of the average and of the ensemble as members are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from warmerge.errors import Finding, UsageError
from warmerge.pipeline.prepare import Spec, short_labels
from warmerge.pipeline.ranking import check_order, rank
from warmerge.pipeline.scoring.mixtures import Mixtures, open_mixtures
from warmerge.report.results import VS_M, check_results, write_results
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, Subset, columns, open_bench, results_record


@dataclass(frozen=True)
class AccuracyVsM:
    """`rows`: M members on a set, `added` the one that made it M; `warnings`: reasons for doubt."""

    rows: tuple[dict[str, Any], ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {**self.record, "rows": list(self.rows), "warnings": [str(warning) for warning in self.warnings]}


def accuracy_vs_m(
    checkpoints: Sequence[Spec],
    data: Sequence[str],
    out: Spec | None = None,
    *,
    order: str = "best-first",
    select_data: Sequence[str] = (),
    measuring: Measuring | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> AccuracyVsM:
    """Accuracy of the average of M members and of their ensemble, M = 1, 2, ..., with intervals.

    Args:
        order: best-first, worst-first, random, or greedy (members that do not help are left out).
        select_data: the sets that members are ranked on; `data` if none is given, with a warning.

    Other arguments, and what is raised, as for `lmc_curve`.
    """
    if len(checkpoints) < 2:
        raise UsageError("accuracy against M takes two checkpoints or more")
    check_order(order)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_results(folder, VS_M, overwrite)
    bench = open_bench([*data, *select_data], measuring)
    reported, selecting = bench.sets[: len(data)], bench.sets[len(data) :] or bench.sets
    seen = {} if order == "random" else {subset.name: _seen(subset, selecting) for subset in reported}
    warnings = [_selected_on(subset, seen[subset.name]) for subset in reported if seen.get(subset.name)]
    mixtures = open_mixtures(checkpoints, bench, folder, overwrite)
    singles = [mixtures.single(i) for i in range(mixtures.count)]
    upper = [*singles, *(mixtures.uniform(range(m)) for m in range(2, mixtures.count + 1))]
    bench.measuring.on_work(mixtures.missing(upper))
    mixtures.measure(singles)
    ranked = rank(mixtures, selecting, order, bench.measuring.seed)
    mixtures.measure([mixtures.uniform(ranked[:m]) for m in range(1, len(ranked) + 1)])
    labels = short_labels(checkpoints)
    rows = [row for subset in reported for row in _rows(subset, mixtures, ranked, labels, seen.get(subset.name, 0))]
    fingerprints = dict(zip(short_labels(checkpoints), mixtures.prepared.fingerprints, strict=True))
    record = {
        **results_record("accuracy-vs-m 1", command, checkpoints, fingerprints, bench, mixtures.cuts),
        "fingerprint": mixtures.fingerprint,
        "order": order,
        "ranking": [labels[i] for i in ranked],
        "left_out": [label for i, label in enumerate(labels) if i not in ranked],
        "selected_on": [] if order == "random" else [subset.name for subset in selecting],
    }
    found = AccuracyVsM(tuple(rows), (*warnings, *mixtures.warnings), record)
    if folder is not None:
        write_results(folder, VS_M, found.as_json(), overwrite=overwrite)
    return found


def _rows(
    subset: Subset, mixtures: Mixtures, ranked: Sequence[int], labels: Sequence[str], seen: int
) -> list[dict[str, Any]]:
    members = numpy.stack([mixtures.rewards(mixtures.single(i))[subset.scored] for i in ranked])
    sizes = range(1, len(ranked) + 1)
    wa = numpy.stack([mixtures.rewards(mixtures.uniform(ranked[:m]))[subset.scored] for m in sizes])
    ens = numpy.stack([members[:m].mean(axis=0) for m in sizes])
    right = metrics.right(subset.margins(numpy.concatenate([wa, ens, members])))
    means, drawn = mixtures.bench.means(subset, right)
    rows = []
    for k, m in enumerate(sizes):
        wa_found, ens_found = (
            metrics.interval(float(means[at]), drawn[:, at], subset.prompts, bounds=(0.0, 1.0))
            for at in (k, len(ranked) + k)
        )
        rows.append(
            {
                "set": subset.name, "m": m, "added": labels[ranked[k]], "n": subset.n, "prompts": subset.prompts,
                **columns("wa", wa_found), **columns("ens", ens_found), "single": float(means[2 * len(ranked) + k]),
                "selected_on": seen == subset.prompts,
            }
        )  # fmt: skip
    return rows


def _seen(subset: Subset, selecting: Sequence[Subset]) -> int:
    """How many prompts of a reported set are also in those that members are ranked on."""
    return len(set(subset.texts.clusters) & {prompt for other in selecting for prompt in other.texts.clusters})


def _selected_on(subset: Subset, seen: int) -> Finding:
    if seen == subset.prompts:
        what = "members are ranked and reported on the same set, which overstates every M; rank on others"
    else:
        what = f"members are ranked on {seen} of its {subset.prompts} prompts, which overstates every M; rank on others"
    return Finding(subset.name, f"{what}: --select-data")
