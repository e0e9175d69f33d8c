"""`warmerge lmc-curve`: is the average of two reward models as accurate as the line between them? WARM, Observation 1.

WA    accuracy of one model, the weights averaged: Acc((1-l) phi_1 + l phi_2)
ENS   accuracy of the two rewards averaged: Acc((1-l) r_1 + l r_2), no further forward pass
Diag  the straight line between the two accuracies: (1-l) Acc(phi_1) + l Acc(phi_2)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, UsageError
from warmerge.pipeline.prepare import Spec, short_labels
from warmerge.pipeline.scoring.mixtures import Mixtures, Weights, open_mixtures
from warmerge.report.results import CURVE, check_results, write_results
from warmerge.rewards import barriers, metrics
from warmerge.rewards.bench import Measuring, Subset, columns, open_bench, results_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

PATHS = ("pairs", "mean")


@dataclass(frozen=True)
class Line:
    """A straight path from one mixture of the members to another."""

    name: str
    start: Weights
    end: Weights

    def at(self, lam: float) -> Weights:
        """(1 - lambda) start + lambda end."""
        return tuple((1 - lam) * a + lam * b for a, b in zip(self.start, self.end, strict=True))


@dataclass(frozen=True)
class Curve:
    """`rows`: a point of a path on a set; `verdicts`: one for each path and set; `warnings`: doubts about the merge."""

    rows: tuple[dict[str, Any], ...]
    verdicts: tuple[dict[str, Any], ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        rows, verdicts = list(self.rows), list(self.verdicts)
        return {**self.record, "rows": rows, "verdicts": verdicts, "warnings": [str(w) for w in self.warnings]}


def lmc_curve(
    checkpoints: Sequence[Spec],
    data: Sequence[str],
    out: Spec | None = None,
    *,
    points: int = 11,
    lambdas: Sequence[float] | None = None,
    extrapolate: float = 0.0,
    path: str = "pairs",
    tolerance: float = 0.01,
    measuring: Measuring | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Curve:
    """Accuracy along the straight path between reward models, in weights and in rewards, with a verdict for each set.

    The verdict holds the average (WA) against Diag; where an end is not surely better than chance, against ENS.
    No weights are written: each point is streamed into one live model.

    Args:
        checkpoints: two or more; more than two are taken in all pairs, or each with the mean (`path="mean"`).
        data: sets of preference pairs, each `NAME=PATH` or `PATH`.
        out: a folder for curve.json, curve.csv and the figure. Finished points are kept there too, and a run with the
            same inputs and options starts from them.
        points: so many equally spaced lambdas from 0 to 1; `lambdas` gives them one by one.
        extrapolate: how far to go beyond both ends, in the same steps, rounded up to whole ones.
        tolerance: the fall below the line, as a fraction, that counts as a barrier.
        measuring: how models are loaded and scored, sets are read and intervals made.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors.
        Interrupted: Ctrl-C; the finished points are kept in `out`.

    Example:
        >>> import warmerge
        >>> warmerge.lmc_curve(["runs/1", "runs/2"], ["val.jsonl"]).verdicts[0]["verdict"]  # doctest: +SKIP
        'holds'
    """
    if len(checkpoints) < 2:
        raise UsageError("a path has two ends: give two checkpoints or more")
    if path not in PATHS:
        raise UsageError(f"--path: expected {' or '.join(PATHS)}, found {path!r}")
    if not 0 <= tolerance <= 1:
        raise UsageError(f"--tolerance: expected a fraction from 0 to 1 (0.01 is one point), found {tolerance}")
    grid = lambda_grid(points, lambdas, extrapolate)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_results(folder, CURVE, overwrite)
    bench = open_bench(data, measuring)
    mixtures = open_mixtures(checkpoints, bench, folder, overwrite)
    lines = lines_between(mixtures, short_labels(checkpoints), path)
    singles = [mixtures.single(i) for i in range(mixtures.count)]
    wanted = [*singles, *(line.at(lam) for line in lines for lam in (0.0, 1.0, *grid))]
    bench.measuring.on_work(mixtures.missing(wanted))
    mixtures.measure(wanted)
    rows, verdicts = [], []
    for line, subset in itertools.product(lines, bench.sets):
        made, verdict = trace(line, subset, mixtures, grid, tolerance)
        rows += made
        verdicts += verdict
    fingerprints = dict(zip(short_labels(checkpoints), mixtures.prepared.fingerprints, strict=True))
    record = {
        **results_record("lmc-curve 1", command, checkpoints, fingerprints, bench, mixtures.cuts),
        "fingerprint": mixtures.fingerprint,
        "intervals": f"{bench.measuring.intervals()}; barrier: simultaneous over the inner points",
        "tolerance": tolerance,
    }
    curve = Curve(tuple(rows), tuple(verdicts), mixtures.warnings, record)
    if folder is not None:
        write_results(folder, CURVE, curve.as_json(), overwrite=overwrite)
    return curve


def lambda_grid(
    points: int = 11, lambdas: Sequence[float] | None = None, extrapolate: float = 0.0
) -> tuple[float, ...]:
    """The lambdas of a curve, in order.

    >>> lambda_grid(5), lambda_grid(3, extrapolate=0.5), lambda_grid(lambdas=[0.7, 0.3])
    ((0.0, 0.25, 0.5, 0.75, 1.0), (-0.5, 0.0, 0.5, 1.0, 1.5), (0.3, 0.7))

    Raises:
        UsageError: fewer than three points, so that none is inside; numbers that cannot be; both `lambdas` and
            `extrapolate`.
    """
    if lambdas is not None and extrapolate:
        raise UsageError("--extrapolate continues the steps of --points; with --lambdas, name those beyond 0 and 1 too")
    if lambdas is not None:
        if not lambdas or not all(-10 <= lam <= 10 for lam in lambdas):
            raise UsageError(f"--lambdas: expected numbers such as 0,0.25,0.5,0.75,1, found {list(lambdas)}")
        return tuple(sorted(set(lambdas)))
    if points < 3:
        raise UsageError(f"--points: expected 3 or more, so that one lies between the ends; found {points}")
    if not 0 <= extrapolate <= 10:
        raise UsageError(f"--extrapolate: expected how far to go beyond 0 and 1, such as 0.2; found {extrapolate}")
    steps = points - 1
    beyond = math.ceil(round(extrapolate * steps, 9))
    return tuple(i / steps for i in range(-beyond, steps + beyond + 1))


def lines_between(mixtures: Mixtures, labels: Sequence[str], path: str) -> list[Line]:
    """All pairs of members, or each member to the mean of all."""
    count = mixtures.count
    if path == "mean":
        mean = mixtures.uniform(range(count))
        return [Line(f"{labels[i]} -> mean", mixtures.single(i), mean) for i in range(count)]
    pairs = itertools.combinations(range(count), 2)
    return [Line(f"{labels[i]} -> {labels[j]}", mixtures.single(i), mixtures.single(j)) for i, j in pairs]


@dataclass(frozen=True)
class Accuracies:
    """At each lambda of a path: `means` (L,), in each resample `drawn` (B, L), of each comparison `right` (L, n)."""

    means: Array
    drawn: Array
    right: Array

    def __sub__(self, other: Accuracies) -> Accuracies:
        return Accuracies(self.means - other.means, self.drawn - other.drawn, self.right - other.right)


def trace(
    line: Line, subset: Subset, mixtures: Mixtures, grid: Sequence[float], tolerance: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one path on one set, and its verdict (none where no lambda lies between the ends)."""
    bench, lam, points = mixtures.bench, numpy.asarray(grid), len(grid)
    member = numpy.stack([mixtures.rewards(mixtures.single(i))[subset.scored] for i in range(mixtures.count)])
    weights = numpy.stack([mixtures.rewards(line.at(lam))[subset.scored] for lam in (0.0, 1.0, *grid)])
    # Not a matrix product: its sums may round differently from column to column, and break a tie of all members.
    ensembles = numpy.stack([sum(w * r for w, r in zip(line.at(lam), member, strict=True)) for lam in grid])
    right = metrics.right(subset.margins(numpy.concatenate([weights, ensembles])))
    means, drawn = bench.means(subset, right)

    def at(columns: slice) -> Accuracies:
        return Accuracies(means[columns], drawn[:, columns], right[columns])

    def mixed(values: Array) -> Array:
        """(..., L) of the ends' (..., 2)."""
        return (1 - lam) * values[..., 0, None] + lam * values[..., 1, None]

    ends, wa, ens = at(slice(0, 2)), at(slice(2, 2 + points)), at(slice(2 + points, None))
    diag = Accuracies(mixed(ends.means), mixed(ends.drawn), mixed(ends.right.T).T)
    gain, rows = wa - ens, []
    for k, lam_k in enumerate(grid):
        wa_found, ens_found = (_interval(found, k, subset) for found in (wa, ens))
        gained = metrics.difference(gain.right[k], gain.drawn[:, k], subset.texts.clusters)
        if sum(weight != 0 for weight in line.at(lam_k)) == 1:
            gained = metrics.Estimate(0.0, 0.0, 0.0)  # one member alone: the two are the same model
        rows.append(
            {
                "path": line.name, "set": subset.name, "lambda": lam_k, "n": subset.n, "prompts": subset.prompts,
                **columns("wa", wa_found), **columns("ens", ens_found), "diag": float(diag.means[k]),
                **columns("wa_minus_ens", gained), "reward_std": float(weights[2 + k].std()),
            }
        )  # fmt: skip
    inner = [k for k, lam_k in enumerate(grid) if 0 < lam_k < 1]
    if not inner:
        return rows, []
    # Towards an end that only guesses the straight line falls to one half, and so does anything: it tests nothing.
    against = "line" if min(_interval(ends, k, subset).low for k in (0, 1)) > 0.5 else "ensemble"
    fall, loss = _largest(diag - wa, inner, subset), _largest(ens - wa, inner, subset)
    at_fall = grid[inner[int((diag - wa).means[inner].argmax())]]
    return rows, [_verdict(line, subset, fall, at_fall, loss, against, tolerance)]


def _interval(found: Accuracies, k: int, subset: Subset) -> metrics.Estimate:
    return metrics.interval(float(found.means[k]), found.drawn[:, k], subset.prompts, bounds=(0.0, 1.0))


def _largest(gap: Accuracies, inner: Sequence[int], subset: Subset) -> metrics.Estimate:
    """The largest gap of all inner points, with bounds that hold at all of them at once."""
    differing = metrics.differing(gap.right[inner], subset.texts.clusters)
    return barriers.barrier(gap.means[inner], gap.drawn[:, inner], clusters=subset.prompts, differing=differing)


def _verdict(
    line: Line,
    subset: Subset,
    fall: metrics.Estimate,
    at: float,
    loss: metrics.Estimate,
    against: str,
    tolerance: float,
) -> dict[str, Any]:
    """The verdict of a path on a set, from the fall below the line (largest `at` a lambda) and below the ensemble."""
    found, names = fall if against == "line" else loss, line.name.replace(" -> ", " to ")
    answer = barriers.verdict(found, tolerance)
    words = barriers.verdict_words(names, subset.name, found, tolerance, subset.n, against)
    if against == "line" and loss.low > tolerance:
        words += (
            f" It is up to {100 * loss.value:.1f} points below the ensemble of the same models (95 % interval "
            f"{100 * loss.low:.1f} to {100 * loss.high:.1f}): averaging their weights loses what averaging their "
            f"rewards keeps{'' if answer == 'does not hold' else ', so do not merge them'}."
        )
    return {
        "path": line.name, "set": subset.name, "n": subset.n, "prompts": subset.prompts,
        "barrier": fall.value, "low": fall.low, "high": fall.high, "at": at,
        "below_ensemble": loss.value, "below_ensemble_low": loss.low, "below_ensemble_high": loss.high,
        "tolerance": tolerance, "against": against, "verdict": answer, "words": words,
    }  # fmt: skip
