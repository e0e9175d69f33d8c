"""`warmerge lmc-curve`: is the average of two reward models as accurate as the line between them? WARM, Observation 1.

WA    accuracy of one model, the weights averaged: Acc((1-l) phi_1 + l phi_2)
ENS   accuracy of the two rewards averaged: Acc((1-l) r_1 + l r_2), no further forward pass
Diag  the straight line between the two accuracies: (1-l) Acc(phi_1) + l Acc(phi_2)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, UsageError
from warmerge.pipeline.mixtures import Mixtures, Weights, open_mixtures
from warmerge.pipeline.prepare import Spec, short_labels
from warmerge.report.results import CURVE, check_results, write_results
from warmerge.rewards import metrics
from warmerge.rewards.bench import Sampling, Subset, columns, data_notes, open_bench, set_record
from warmerge.rewards.model import LoadOptions
from warmerge.rewards.pairs import read_all
from warmerge.version import versions

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
    base: Spec | None = None,
    options: LoadOptions | None = None,
    batch_tokens: int | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    sampling: Sampling | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    on_work: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
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

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors.
        Interrupted: Ctrl-C; the finished points are kept in `out`.

    Example:
        >>> import warmerge
        >>> warmerge.lmc_curve(["runs/1", "runs/2"], ["val.jsonl"]).verdicts[0]["verdict"]  # doctest: +SKIP
        'holds'
    """
    options, sampling = options or LoadOptions(), sampling or Sampling()
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
    sets = read_all(data, skip_bad_rows=skip_bad_rows, limit=limit, seed=sampling.seed)
    bench = open_bench(sets, batch_tokens, sampling, progress)
    mixtures = open_mixtures(
        checkpoints, bench, base=base, options=options, threads=threads, store=folder, overwrite=overwrite
    )
    lines = lines_between(mixtures, short_labels(checkpoints), path)
    singles = [mixtures.single(i) for i in range(mixtures.count)]
    wanted = [*singles, *(line.at(lam) for line in lines for lam in (0.0, 1.0, *grid))]
    if on_work is not None:
        on_work(mixtures.missing(wanted))
    mixtures.measure(wanted)
    rows, verdicts = [], []
    for line, subset in itertools.product(lines, bench.sets):
        made, verdict = trace(line, subset, mixtures, grid, tolerance)
        rows += made
        verdicts += verdict
    record = {
        "format": "warmerge lmc-curve 1",
        "command": list(command),
        "versions": versions(),
        "checkpoints": [str(checkpoint) for checkpoint in checkpoints],
        "fingerprint": mixtures.fingerprint,
        "sets": [set_record(subset) for subset in bench.sets],
        "intervals": f"{sampling.record()}; barrier: simultaneous over the inner points",
        "tolerance": tolerance,
        "loading": asdict(options),
        "cut": mixtures.cuts,
        "notes": data_notes(bench.sets, mixtures.cuts),
    }
    curve = Curve(tuple(rows), tuple(verdicts), mixtures.warnings, record)
    if folder is not None:
        write_results(folder, CURVE, curve.as_json())
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


def trace(
    line: Line, subset: Subset, mixtures: Mixtures, grid: Sequence[float], tolerance: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one path on one set, and its verdict (none where no lambda lies between the ends)."""
    bench = mixtures.bench
    member = numpy.stack([mixtures.rewards(mixtures.single(i))[subset.scored] for i in range(mixtures.count)])
    wa = numpy.stack([mixtures.rewards(line.at(lam))[subset.scored] for lam in (0.0, 1.0, *grid)])
    # Not a matrix product: its sums may round differently from column to column, and break a tie of all members.
    ens = numpy.stack([sum(w * rewards for w, rewards in zip(line.at(lam), member, strict=True)) for lam in grid])
    right = metrics.right(subset.margins(numpy.concatenate([wa, ens])))
    means, drawn = bench.means(subset, right)
    lam = numpy.asarray(grid)

    def split(values: Array) -> tuple[Array, Array, Array]:
        """WA, ENS and Diag at each lambda, of values (..., ends + WA + ENS)."""
        first, second = values[..., 0, None], values[..., 1, None]
        return values[..., 2 : 2 + len(lam)], values[..., 2 + len(lam) :], (1 - lam) * first + lam * second

    (wa_mean, ens_mean, diag), (wa_drawn, ens_drawn, diag_drawn) = split(means), split(drawn)
    wa_right, ens_right, diag_right = (part.T for part in split(right.T))
    rows = []
    for k, at in enumerate(grid):
        wa_found = metrics.interval(float(wa_mean[k]), wa_drawn[:, k], subset.prompts, bounds=(0.0, 1.0))
        ens_found = metrics.interval(float(ens_mean[k]), ens_drawn[:, k], subset.prompts, bounds=(0.0, 1.0))
        gain = metrics.difference(wa_right[k] - ens_right[k], wa_drawn[:, k] - ens_drawn[:, k], subset.texts.clusters)
        if sum(weight != 0 for weight in line.at(at)) == 1:
            gain = metrics.Estimate(0.0, 0.0, 0.0)  # one member alone: the two are the same model
        rows.append(
            {
                "path": line.name, "set": subset.name, "lambda": at, "n": subset.n, "prompts": subset.prompts,
                **columns("wa", wa_found), **columns("ens", ens_found), "diag": float(diag[k]),
                **columns("wa_minus_ens", gain), "reward_std": float(wa[2 + k].std()),
            }
        )  # fmt: skip
    inner = [k for k, at in enumerate(grid) if 0 < at < 1]
    if not inner:
        return rows, []

    def largest(other: Array, other_drawn: Array, other_right: Array) -> metrics.Estimate:
        """How far WA falls below another line at most, with bounds that hold at all inner points at once."""
        differing = metrics.differing((other_right - wa_right)[inner], subset.texts.clusters)
        gaps, gaps_drawn = (other - wa_mean)[inner], (other_drawn - wa_drawn)[:, inner]
        return metrics.barrier(gaps, gaps_drawn, clusters=subset.prompts, differing=differing)

    fall, loss = largest(diag, diag_drawn, diag_right), largest(ens_mean, ens_drawn, ens_right)
    ends = [metrics.interval(float(means[k]), drawn[:, k], subset.prompts, bounds=(0.0, 1.0)) for k in (0, 1)]
    # Towards an end that only guesses the straight line falls to one half, and so does anything: it tests nothing.
    against = "line" if min(end.low for end in ends) > 0.5 else "ensemble"
    found = fall if against == "line" else loss
    answer, names = metrics.verdict(found, tolerance), line.name.replace(" -> ", " to ")
    words = metrics.verdict_words(names, subset.name, found, tolerance, subset.n, against)
    if against == "line" and loss.low > tolerance:
        words += (
            f" It is up to {100 * loss.value:.1f} points below the ensemble of the same models (95 % interval "
            f"{100 * loss.low:.1f} to {100 * loss.high:.1f}): averaging their weights loses what averaging their "
            f"rewards keeps{'' if answer == 'does not hold' else ', so do not merge them'}."
        )
    return rows, [
        {
            "path": line.name, "set": subset.name, "n": subset.n, "prompts": subset.prompts,
            "barrier": fall.value, "low": fall.low, "high": fall.high,
            "at": grid[inner[int((diag - wa_mean)[inner].argmax())]],
            "below_ensemble": loss.value, "below_ensemble_low": loss.low, "below_ensemble_high": loss.high,
            "tolerance": tolerance, "against": against, "verdict": answer, "words": words,
        }
    ]  # fmt: skip
