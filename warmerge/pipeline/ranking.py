"""Members ranked by their accuracy on a selection set, for `average --select` and for accuracy against M."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy

from warmerge.errors import UsageError, plain
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.scoring.mixtures import Mixtures, Weights, open_mixtures
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, Subset, open_bench, set_record

ORDERS = ("best-first", "worst-first", "random", "greedy")


def accuracy(mixtures: Mixtures, weights: Weights, sets: Sequence[Subset]) -> float:
    """The mean over the sets of a mixture's accuracy on them."""
    rewards = mixtures.rewards(weights)
    shares = [metrics.right(subset.margins(rewards[subset.scored])).mean() for subset in sets]
    return float(numpy.mean(shares))


def check_order(order: str) -> None:
    """Raises UsageError if there is no such order, before anything is scored."""
    if order not in ORDERS:
        raise UsageError(f"--order: expected one of {', '.join(ORDERS)}, found {order!r}")


def rank(mixtures: Mixtures, sets: Sequence[Subset], order: str, seed: int = 0) -> list[int]:
    """The members (numbers from 0) in the order in which they are added; ties keep the order that they were given in.

    greedy is the greedy soup (arXiv 2203.05482, recipe 1): best first, and a member stays only if the average with it
    is at least as accurate as without; the others are left out.

    Raises:
        UsageError: no such order.
    """
    check_order(order)
    members = list(range(mixtures.count))
    if order == "random":
        return random.Random(seed).sample(members, len(members))
    alone = {i: accuracy(mixtures, mixtures.single(i), sets) for i in members}
    ranked = sorted(members, key=lambda i: alone[i] if order == "worst-first" else -alone[i])
    if order != "greedy":
        return ranked
    soup, best = ranked[:1], alone[ranked[0]]
    for i in ranked[1:]:
        with_it = accuracy(mixtures, mixtures.uniform([*soup, i]), sets)
        if with_it >= best:
            soup, best = [*soup, i], with_it
    return soup


def parse_selection(text: str, count: int) -> tuple[str, int | None]:
    """`best:M` or `greedy` as (order, M).

    >>> parse_selection("best:3", 10), parse_selection("greedy", 10)
    (('best-first', 3), ('greedy', None))

    Raises:
        UsageError: anything else, or an M that is not from 2 to the number of checkpoints.
    """
    kind, _, number = text.partition(":")
    if text == "greedy":
        return "greedy", None
    if kind == "best" and number.isdecimal() and 2 <= int(number) <= count:
        return "best-first", int(number)
    raise UsageError(f"--select: expected best:M with M from 2 to {count}, or greedy; found {text!r}")


def select_members(
    checkpoints: Sequence[Spec], selection: str, data: Sequence[str], measuring: Measuring | None = None
) -> tuple[list[Spec], dict[str, Any]]:
    """The checkpoints that `best:M` or `greedy` keeps by their accuracy on `data`, and how they were chosen.

    They stay in the order in which they were given, so that the result is that of averaging them by hand.

    Raises:
        UsageError, RefusedError: no such selection; checkpoints that may not be averaged; data that cannot be read.
    """
    order, size = parse_selection(selection, len(checkpoints))
    bench = open_bench(data, measuring)
    mixtures = open_mixtures(checkpoints, bench)
    singles = [mixtures.single(i) for i in range(mixtures.count)]
    more = len(singles) - 1 if order == "greedy" else 0
    bench.measuring.on_work(mixtures.missing(singles) * (len(singles) + more) // len(singles))
    mixtures.measure(singles)
    kept = sorted(rank(mixtures, bench.sets, order)[:size])
    if len(kept) < 2:
        what = f"only {plain(str(checkpoints[kept[0]]))} is left: no average with another one was as accurate"
        raise UsageError(f"--select {selection}: {what}; use that checkpoint alone, or --select best:M")
    alone = [accuracy(mixtures, weights, bench.sets) for weights in singles]
    return [checkpoints[i] for i in kept], {
        "selection": selection,
        "kept": [str(checkpoints[i]) for i in kept],
        "accuracies": {str(checkpoint): value for checkpoint, value in zip(checkpoints, alone, strict=True)},
        "sets": [set_record(subset) for subset in bench.sets],
    }
