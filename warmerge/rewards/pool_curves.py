"""What every proxy's best-of-n is worth, for each n: plain rows, with intervals over prompts, all from the same draws.

Where several prompts are about one thing (`clusters`), they are drawn together. Differences are paired: both proxies
choose among the same candidates, and are resampled with the same prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from warmerge.rewards import best_of_n, metrics
from warmerge.rewards.bench import columns
from warmerge.rewards.metrics import Array
from warmerge.rewards.win_rates import with_interval

Ragged = Sequence[Array]
Row = dict[str, Any]
# The win rate of a random choice: known, not measured.
_HALF = metrics.Estimate(0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Chooser:
    """A proxy: its reward of every candidate, (N_p,) for each prompt. `believes`: these say how good it thinks they
    are; those of a random choice do not."""

    name: str
    kind: str
    rewards: Ragged
    believes: bool = True


@dataclass(frozen=True)
class PoolCurves:
    """Tables: `rows` of a proxy at an n, `differences` to one of them, `wins` of one proxy against another, `peaks`
    and `fits` of a proxy by a target."""

    rows: tuple[Row, ...]
    differences: tuple[Row, ...]
    wins: tuple[Row, ...]
    peaks: tuple[Row, ...]
    fits: tuple[Row, ...]


@dataclass(frozen=True)
class _Measured:
    """Best-of-n of each of K proxies by M measures at G sizes on P prompts: `values` (K, M, G, P), and the means of B
    resamples, `drawn` (B, K, M, G). `measures` are "reward", the targets, and "win"."""

    choosers: Sequence[Chooser]
    measures: tuple[str, ...]
    ns: tuple[int, ...]
    clusters: Sequence[str]
    values: Array
    drawn: Array

    @property
    def prompts(self) -> int:
        return len(set(self.clusters))

    def at(self, k: int, measure: str) -> tuple[Array, Array]:
        """A proxy's curve (G,) and its resamples (B, G)."""
        m = self.measures.index(measure)
        return self.values[k, m].mean(axis=-1), self.drawn[:, k, m]

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(measure for measure in self.measures if measure not in ("reward", "win"))

    def interval(self, value: float, drawn: Array) -> metrics.Estimate:
        return metrics.interval(float(value), drawn, self.prompts)


def pool_curves(
    choosers: Sequence[Chooser],
    targets: Mapping[str, Ragged],
    clusters: Sequence[str],
    n: int,
    resamples: int = 2000,
    seed: int = 0,
    reference: str | None = None,
) -> PoolCurves:
    """Best-of-1 to best-of-n by every proxy: the tables, n running over `best_of_n.grid`.

    Args:
        choosers: proxies. One named "oracle" is what regret is measured to, by gold, or without it by the first target.
        targets: what choices are worth, by name, such as "gold" and "control": (N_p,) for each prompt. The first one
            judges who wins.
        clusters: what counts as one prompt, for each prompt.
        n: the largest; every prompt has so many candidates.
        reference: the proxy that differences are to; the first if not given.
        resamples, seed: of the bootstrap; the seed also breaks ties between equal rewards.

    Raises:
        UsageError: a prompt with fewer than n candidates, or rows of different lengths.
        RefusedError: rewards or targets that are NaN or infinite.

    >>> gold = [numpy.array([0.0, 1.0]), numpy.array([2.0, 0.0])]
    >>> found = pool_curves([Chooser("last", "rm", [numpy.array([1.0, 2.0])] * 2)], {"gold": gold}, ["a", "b"], 2)
    >>> [(row["n"], row["gold"], row["win"]) for row in found.rows]
    [(1, 0.75, 0.5), (2, 0.5, 0.5)]
    """
    ns = best_of_n.grid(n)
    judge = next(iter(targets), None)
    measures = ("reward", *targets, *(("win",) if judge else ()))
    values = numpy.empty((len(choosers), len(measures), len(ns), len(clusters)))
    for p in range(len(clusters)):
        worth = [target[p] for target in targets.values()] + ([best_of_n.beats(targets[judge][p])] if judge else [])
        for k, chooser in enumerate(choosers):
            own = chooser.rewards[p]
            values[k, :, :, p] = best_of_n.expected(own, numpy.stack([own, *worth]), ns)
            # Best-of-1 is the pool's mean, whoever chooses: without the rounding of each proxy's own order.
            values[k, 1:, 0, p] = [numpy.mean(measure) for measure in worth]
    measured = _Measured(choosers, measures, ns, clusters, values, _resampled(values, clusters, resamples, seed))
    wins = () if judge is None else _wins(choosers, judge, targets[judge], clusters, ns, resamples, seed)
    differences = _differences(measured, choosers[0].name if reference is None else reference)
    tables = (_rows(measured), differences, wins, _peaks(measured), _fits(measured))
    return PoolCurves(*map(tuple, tables))


def _resampled(values: Array, clusters: Sequence[str], resamples: int, seed: int) -> Array:
    """(B, ...): the means of values (..., P) in each resample. Equal rows are summed once: a matrix product may round
    them differently, and then their difference would not be 0."""
    rows: dict[bytes, Array] = {row.tobytes(): row for row in values.reshape(-1, len(clusters))}
    number = {row: i for i, row in enumerate(rows)}
    place = [number[row.tobytes()] for row in values.reshape(-1, len(clusters))]
    drawn = metrics.replicates(numpy.stack(list(rows.values())), clusters, resamples, seed)
    return drawn[:, place].reshape(-1, *values.shape[:-1])


def tie_orders(sizes: Sequence[int], seed: int) -> list[best_of_n.Integers]:
    """A random order of each prompt's candidates: who comes first where rewards are equal."""
    return [numpy.random.default_rng([seed, p]).permutation(size) for p, size in enumerate(sizes)]


def _rows(found: _Measured) -> Iterator[Row]:
    names = [chooser.name for chooser in found.choosers]
    oracle = names.index("oracle") if "oracle" in names and found.targets else None
    judge = "gold" if "gold" in found.targets else next(iter(found.targets), "")
    for k, chooser in enumerate(found.choosers):
        spread = _spread(numpy.concatenate(list(chooser.rewards)))
        for g, n in enumerate(found.ns):
            row: Row = {"proxy": chooser.name, "kind": chooser.kind, "n": n, "kl_bound": best_of_n.kl_bound(n),
                        "prompts": found.prompts}  # fmt: skip
            if chooser.believes:
                mean, drawn = found.at(k, "reward")
                row |= columns("reward", found.interval(mean[g], drawn[:, g]))
                if spread:
                    gain = (drawn[:, g] - drawn[:, 0]) / spread
                    row |= columns("gain", found.interval((mean[g] - mean[0]) / spread, gain))
            for target in found.targets:
                mean, drawn = found.at(k, target)
                row |= columns(target, found.interval(mean[g], drawn[:, g]))
            if "win" in found.measures:
                m = found.measures.index("win")
                known = n == 1 or not chooser.believes  # a random choice against a random one
                win = _HALF if known else with_interval(found.values[k, m, g], found.drawn[:, k, m, g], found.clusters)
                row |= columns("win", win)
            if oracle is not None:
                best, best_drawn = found.at(oracle, judge)
                mean, drawn = found.at(k, judge)
                row |= columns("regret", found.interval(best[g] - mean[g], best_drawn[:, g] - drawn[:, g]))
            yield row


def _spread(rewards: Array) -> float:
    """Of all rewards; exactly 0 where they are equal, whose computed one may be 1e-17: dividing by it gives noise."""
    return 0.0 if (rewards == rewards[0]).all() else float(rewards.std())


def _differences(found: _Measured, reference: str) -> Iterator[Row]:
    first = next(k for k, chooser in enumerate(found.choosers) if chooser.name == reference)
    for k, chooser in enumerate(found.choosers):
        if k == first:
            continue
        for target in found.targets:
            (mean, drawn), (to, to_drawn) = found.at(k, target), found.at(first, target)
            for g, n in enumerate(found.ns):
                estimate = found.interval(mean[g] - to[g], drawn[:, g] - to_drawn[:, g])
                yield {"proxy": chooser.name, "to": reference, "n": n, "target": target, "difference": estimate.value,
                       "low": estimate.low, "high": estimate.high}  # fmt: skip


def _wins(
    choosers: Sequence[Chooser], judge: str, worth: Ragged, clusters: Sequence[str], ns: Sequence[int], resamples: int,
    seed: int,
) -> Iterator[Row]:  # fmt: skip
    """Each pair of proxies once: how often the first one's choice among the same n candidates is worth more."""
    pairs = list(itertools.combinations(choosers, 2))
    if not pairs:
        return
    values = numpy.empty((len(pairs), len(ns), len(clusters)))
    for p, order in enumerate(tie_orders([len(row) for row in worth], seed)):
        for i, (a, b) in enumerate(pairs):
            values[i, :, p] = best_of_n.win_rates(a.rewards[p], b.rewards[p], worth[p], order, ns)
    drawn = metrics.replicates(values.reshape(-1, len(clusters)), clusters, resamples, seed)
    drawn = drawn.reshape(-1, len(pairs), len(ns))
    for i, (a, b) in enumerate(pairs):
        for g, n in enumerate(ns):
            estimate = _HALF if n == 1 else with_interval(values[i, g], drawn[:, i, g], clusters)
            yield {"a": a.name, "b": b.name, "n": n, "target": judge, "win": estimate.value, "low": estimate.low,
                   "high": estimate.high}  # fmt: skip


def _peaks(found: _Measured) -> Iterator[Row]:
    """Where each curve is highest, and by how much it falls from there to the largest n.

    The interval of the peak is that of the peaks of the resamples. The fall is that from the n found here, which was
    chosen for being high, and so is a little overstated.
    """
    ns = numpy.array(found.ns)
    for k, chooser in enumerate(found.choosers):
        if not chooser.believes:
            continue
        for target in found.targets:
            mean, drawn = found.at(k, target)
            scale = float(numpy.abs(found.values[:, found.measures.index(target)]).max())
            peak = int(_highest(mean, scale))
            low, high = numpy.quantile(ns[_highest(drawn, scale)], (0.025, 0.975), method="nearest")
            if found.prompts < 2:  # one prompt says nothing about others
                low, high = ns[0], ns[-1]
            fall = found.interval(mean[peak] - mean[-1], drawn[:, peak] - drawn[:, -1])
            yield {"proxy": chooser.name, "kind": chooser.kind, "target": target, "peak_n": int(ns[peak]),
                   "peak_low": int(low), "peak_high": int(high), "at_peak": float(mean[peak]),
                   **columns("fall", fall)}  # fmt: skip


def _highest(curves: Array, scale: float) -> best_of_n.Integers:
    """(...): where curves (..., G) are highest; the first such place, also where they are level but for rounding."""
    top = curves.max(axis=-1, keepdims=True) - metrics.NO_SPREAD * scale
    first: best_of_n.Integers = numpy.asarray((curves >= top).argmax(axis=-1))
    return first


def _fits(found: _Measured) -> Iterator[Row]:
    """Gao et al.'s gold(n) - gold(1) = d (alpha - beta d), with intervals from the fits of the resamples; `rms` is what
    is left between the points and the curve."""
    if len(found.ns) <= best_of_n.FEWEST:
        return
    d = numpy.sqrt([best_of_n.kl_bound(n) for n in found.ns])
    for k, chooser in enumerate(found.choosers):
        if not chooser.believes:
            continue
        for target in found.targets:
            mean, drawn = found.at(k, target)
            alpha, beta = best_of_n.fit_overoptimisation(found.ns, mean)
            fits = best_of_n.fit_overoptimisation(found.ns, drawn)
            left = mean - mean[0] - d * (alpha - beta * d)
            yield {"proxy": chooser.name, "kind": chooser.kind, "target": target, "points": len(found.ns) - 1,
                   **columns("alpha", found.interval(alpha, fits[:, 0])),
                   **columns("beta", found.interval(beta, fits[:, 1])),
                   "rms": float(numpy.sqrt(numpy.mean(left[1:] ** 2)))}  # fmt: skip
