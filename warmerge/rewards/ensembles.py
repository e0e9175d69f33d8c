"""Members' rewards as ensembles: no further forward pass, but all members' weights in memory when they are used.

To add an aggregate: its equation as a function of the rewards (M, N) and k, and one row in AGGREGATES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from warmerge.errors import UsageError
from warmerge.rewards import metrics

Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class Aggregate:
    """One row of the table: how an aggregate is called, what it computes, and who described it."""

    name: str
    formula: str
    source: str
    function: Callable[[Array, float], Array]


def _mean(rewards: Array, k: float) -> Array:
    """1/M sum_i r_i. ENS in WARM, section 3.1 (arXiv 2401.12187)."""
    out: Array = rewards.mean(axis=0)
    return out


def _min(rewards: Array, k: float) -> Array:
    """min_i r_i. Worst-case optimisation, WCO (arXiv 2310.02743)."""
    out: Array = rewards.min(axis=0)
    return out


def _uwo(rewards: Array, k: float) -> Array:
    """1/M sum_i r_i - k 1/M sum_i (r_i - 1/M sum_j r_j)^2. Uncertainty-weighted optimisation, UWO (2310.02743)."""
    out: Array = rewards.mean(axis=0) - k * rewards.var(axis=0)
    return out


def _median(rewards: Array, k: float) -> Array:
    """The middle reward; the mean of the two middle ones where M is even."""
    out: Array = numpy.median(rewards, axis=0)
    return out


AGGREGATES = {
    row.name: row
    for row in (
        Aggregate("mean", "1/M sum_i r_i", "WARM (ENS), arXiv 2401.12187", _mean),
        Aggregate("min", "min_i r_i", "WCO, arXiv 2310.02743", _min),
        Aggregate("uwo", "mean_i r_i - k var_i r_i", "UWO, arXiv 2310.02743", _uwo),
        Aggregate("median", "median_i r_i", "the usual robust mean", _median),
    )
}


def aggregate(rewards: Array, how: str, k: float = 0.5, standardize: bool = False) -> Array:
    """(N,): one reward for each text out of those (M, N) of M members.

    Args:
        how: a row of AGGREGATES.
        k: how much disagreement costs; only uwo uses it.
        standardize: first (r - its mean) / its standard deviation over the N texts, member by member; else a member
            with large rewards drowns out the others.

    Raises:
        UsageError: no such row, no member, or a k that is negative or not finite.
        RefusedError: rewards that are NaN or infinite, or, to be standardised, a member with no spread.

    >>> aggregate(numpy.array([[0.0, 1.0], [2.0, 1.0]]), "uwo", k=0.5).tolist()
    [0.5, 1.0]
    """
    if how not in AGGREGATES:
        raise UsageError(f"no aggregate is called {how!r}; there are {', '.join(AGGREGATES)}")
    if not 0 <= k < math.inf:
        raise UsageError(f"expected k, the price of disagreement, from 0 up, found {k}")
    rewards = metrics.finite(rewards)
    if rewards.ndim != 2 or not len(rewards):
        raise UsageError(f"expected rewards (members, texts) of at least one member, found {rewards.shape}")
    if standardize:
        scale = metrics.spread(rewards)[:, None]
        rewards = (rewards - rewards.mean(axis=1, keepdims=True)) / scale
    return AGGREGATES[how].function(rewards, k)


# Ensembles of the table: name -> (aggregate, members standardised first).
ENSEMBLES = {
    "ensemble (mean)": ("mean", False),
    "ensemble (mean, standardised)": ("mean", True),
    "ensemble (median)": ("median", False),
    "ensemble (min, WCO)": ("min", True),
    "ensemble (UWO, k = 0.5)": ("uwo", True),
}


@dataclass(frozen=True)
class Scored:
    """One line of the table before it is one: rewards (N,) of each scored set, seconds to score, bytes of weights, and
    of a model that was loaded from files the fingerprint of its weights."""

    name: str
    kind: str
    rewards: Mapping[str, Array]
    seconds: float | None = None
    weights_bytes: int | None = None
    fingerprint: str | None = None


def with_ensembles(scored: Sequence[Scored]) -> list[Scored]:
    """Members, then their ensembles (no further forward pass), then the average and what it has to beat.

    Members without any spread cannot be standardised: then the ensembles that would need it are left out.
    """
    members = [entry for entry in scored if entry.kind == "member"]
    ensembles = []
    for name, (how, standardize) in ENSEMBLES.items() if len(members) > 1 else ():
        if standardize and constant(members):
            continue
        rewards = {
            key: aggregate(numpy.stack([entry.rewards[key] for entry in members]), how, standardize=standardize)
            for key in members[0].rewards
        }
        seconds = sum(member.seconds or 0.0 for member in members)
        ensembles.append(Scored(name, "ensemble", rewards, seconds, sum(m.weights_bytes or 0 for m in members)))
    return [
        *members,
        *ensembles,
        *(entry for kind in ("average", "merged", "start", "halfway") for entry in scored if entry.kind == kind),
    ]


def constant(members: Sequence[Scored]) -> list[tuple[str, str]]:
    """(member, set) where a member gives every text the same reward."""
    return [(entry.name, key) for entry in members for key, rewards in entry.rewards.items() if not numpy.ptp(rewards)]


def ensemble_moved(scored: Sequence[Scored], moved: Mapping[str, list[Array]]) -> dict[str, list[Array]]:
    """The rewards of changed answers of each member, of the mean of all members, and of the average."""
    members = [entry.name for entry in scored if entry.kind == "member"]
    out = {name: moved[name] for name in members}
    if len(members) > 1:
        out["ensemble (mean)"] = [numpy.mean(rows, axis=0) for rows in zip(*out.values(), strict=True)]
    return out | dict(moved)
