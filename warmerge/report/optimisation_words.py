"""What runs of a policy's optimisation show, in plain sentences with their numbers. No more than these carry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from warmerge.errors import counted, plain
from warmerge.report.rows import Row

_STD = "standard deviations"
# Of up to so many groups all pairs are compared; of fewer runs than the second number a spread is a rough guess.
_MANY, _FEW = 4, 5
# Outcomes in which the control reward rose at all, beyond its noise.
_ROSE = {"kept", "declining", "collapsed", "over-optimised"}


def group_words(group: str, peaks: Sequence[Row], ends: Sequence[Row], margin: float) -> str:
    """A paragraph of one group: peak, collapse, end. Of one run it says that no spread is known.

    Args:
        peaks, ends: rows of runs, and with `run` None of groups.
        margin: the share of the gain that is lost in a collapse.
    """
    runs, peak = _of(peaks, group)
    last, end = _of(ends, group)
    count = len(runs)
    head = f"{plain(group)} ({counted(count, 'run')}, {_span(end, 'step', '.0f')} steps):"
    sentences = [_peak_words(runs, peak)]
    rose = [row for row in runs if row["outcome"] in _ROSE]
    sentences += _fall_words([row for row in runs if row["outcome"] not in _ROSE], last, count)
    sentences += _outcome_words(rose, last, count, margin)
    sentences.append(
        f"At the end: control {_span(end, 'control_gain', '+.2f')}, proxy {_span(end, 'proxy_gain', '+.2f')}, KL "
        f"{_span(end, 'kl', '.2f')} nats; answers of {_span(end, 'length', '.0f')} tokens, {end['length_start']:.0f} "
        f"at the start; {_percent(end['truncated'])} cut at the limit, {_percent(end['truncated_start'])} at the start."
    )
    if count == 1:
        sentences.append("One run: no spread is known.")
    return " ".join([head, *sentences])


def comparison_words(peaks: Sequence[Row], equal_kl: Sequence[Row]) -> list[str]:
    """How groups stand to one another: by their peaks, and at the largest KL that all runs reached."""
    groups = [row for row in peaks if row["run"] is None]
    if len(groups) < 2:
        return []
    words = [_compared("Largest control gain", groups)]
    kls = sorted({row["at_kl"] for row in equal_kl})
    if not kls:
        return [*words, "No KL was reached by all runs from below, so that nothing can be said at equal KL."]
    rows = [row for row in equal_kl if row["run"] is None and row["at_kl"] == kls[-1]]
    return [*words, _compared(f"Control gain at a KL of {kls[-1]:g} nats, the largest shown that all reached", rows)]


def win_words(wins: Sequence[Row]) -> list[str]:
    """A sentence for each pair of policies; of a proxy that has several steps, for those of its last one. Where several
    files have the pair, as of several seeds, the sentence is of all of them."""
    own: dict[tuple[Any, ...], list[Row]] = {}
    for row in wins:
        # Policies without a proxy or a step stand for themselves; "warm step 50" is the same one as "warm step 100".
        alone = row["proxy"] is None or row["step"] is None
        name = row["policy"] if alone else row["policy"].removesuffix(str(row["step"]))
        own.setdefault((alone, name, row["against"]), []).append(row)
    words = []
    for rows in own.values():
        last = max(row["step"] or 0 for row in rows)
        final = [row for row in rows if (row["step"] or 0) == last]
        known = [row for row in final if row["win"] is not None]
        words += [_win(row) for row in final] if len(known) < 2 else [_wins(known)]
    return words


def _wins(rows: Sequence[Row]) -> str:
    pair = f"{plain(rows[0]['policy'])} against {plain(rows[0]['against'])}"
    sure = sum(row["low"] is not None and not row["low"] <= 0.5 <= row["high"] for row in rows)
    wins = _values([100 * row["win"] for row in rows], ".1f")
    return f"{pair}: wins {wins} % in {len(rows)} results; the intervals of {sure} of them exclude 50 %."


def _win(row: Row) -> str:
    pair = f"{plain(row['policy'])} against {plain(row['against'])}"
    if row["win"] is None:
        return f"{pair}: no win rate, nothing was judged."
    interval = "no interval"
    side = "whether it is better is not known"
    if row["low"] is not None and row["high"] is not None:
        interval = f"95 %: {100 * row['low']:.1f} to {100 * row['high']:.1f}"
        side = "the interval holds 50 %" if row["low"] <= 0.5 <= row["high"] else "the interval excludes 50 %"
    return f"{pair}: wins {100 * row['win']:.1f} % ({interval}; n = {row['n']}); {side}."


def _peak_words(runs: Sequence[Row], peak: Row) -> str:
    outcomes = [row["outcome"] for row in runs]
    count = len(runs)
    flat, noisy = outcomes.count("never rose"), outcomes.count("within noise")
    if flat == count:
        return "the control reward never rose above its start" + ("." if count == 1 else " in any run.")
    gain = f"{_span(peak, 'control_gain', '.2f')} {_STD} above the start"
    at = f"step {_span(peak, 'step', '.0f')}, KL {_span(peak, 'kl', '.2f')} nats"
    if flat + noisy == count:
        return f"the control reward rose by no more than its own noise (at most {gain}, at {at})."
    words = f"the control reward was highest at {at}, {gain}"
    words += " (means over runs; in brackets lowest to highest)." if count > 1 else "."
    if flat + noisy:
        words += f" In {counted(flat + noisy, 'run')} of these it rose by no more than its own noise, or not at all."
    return words


def _fall_words(flat: Sequence[Row], ends: Sequence[Row], count: int) -> list[str]:
    """Runs that only ever lost: without a peak there is no collapse, and yet nothing is worse."""
    last = {row["run"]: row for row in ends}
    fell = [
        last[row["run"]]
        for row in flat
        if last[row["run"]]["control_gain"] < -3 * _known(row["control_error"])
        and last[row["run"]]["proxy_gain"] > 3 * _known(row["proxy_error"])
    ]
    if not fell:
        return []
    where = f"In {len(fell)} of {count} runs it" if count > 1 else "It"
    control, proxy = (_values([row[f"{key}_gain"] for row in fell], "+.2f") for key in ("control", "proxy"))
    return [f"{where} fell to {control} while the proxy rose to {proxy}: over-optimisation from the start on."]


def _known(error: float | None) -> float:
    return 0.0 if error is None or math.isnan(error) else error


def _outcome_words(rose: Sequence[Row], ends: Sequence[Row], count: int, margin: float) -> list[str]:
    """What became of the gains of the runs that had one."""
    last = {row["run"]: row for row in ends}
    lost = "half of its gain" if margin == 0.5 else f"{margin:.0%} of its gain"
    words = []
    for outcome in ("over-optimised", "collapsed", "declining", "kept"):
        own = [row for row in rose if row["outcome"] == outcome]
        if not own:
            continue
        where = f"in {len(own)} of {count} runs " if count > 1 else ""
        before = _values([row["proxy_gain"] for row in own], "+.2f")
        end = [last[row["run"]] for row in own]
        if outcome in ("over-optimised", "collapsed"):
            step = _values([row["collapse_step"] for row in own], ".0f")
            after = _values([row["collapse_proxy_gain"] for row in own], "+.2f")
            meaning = (
                "this is over-optimisation"
                if outcome == "over-optimised"
                else "the proxy rose by no more than its noise, and over-optimisation is not shown"
            )
            words.append(
                f"It had lost more than {lost} {where}by step {step}, while the proxy went from {before} to {after}: "
                f"{meaning}."
            )
            words += _lasting_words(own)
            continue
        words.append(_kept_words(outcome, where, lost, before, end))
    return words


def _lasting_words(collapsed: Sequence[Row]) -> list[str]:
    """Whether what was lost came back: once for a while, or to the end."""
    count = len(collapsed)
    some = "" if count == 1 else "in {} of these runs "
    for_good = [row for row in collapsed if row["collapse_lasting_step"] is not None]
    swayed = [row["collapse_lasting_step"] for row in for_good if row["collapse_lasting_step"] > row["collapse_step"]]
    words = []
    if swayed:
        step = _values(swayed, ".0f")
        words.append(f"It came back {some.format(len(swayed))}for a while, and was lost for good from step {step} on.")
    if len(for_good) < count:
        words.append(f"It came back {some.format(count - len(for_good))}before the end.")
    return words


def _kept_words(outcome: str, where: str, lost: str, before: str, end: Sequence[Row]) -> str:
    steps = _values([row["step"] for row in end], ".0f")
    words = f"It did not lose {lost} {where}within {steps} steps"
    if outcome == "kept":
        return words + ", and no over-optimisation is seen so far."
    control, proxy = (_values([row[f"{key}_gain"] for row in end], "+.2f") for key in ("control", "proxy"))
    return f"{words}, but fell to {control} while the proxy went from {before} to {proxy}: it has begun to be lost."


def _compared(what: str, groups: Sequence[Row]) -> str:
    """Groups in order, and each better one against each other, beside the spread over seeds. Of many groups only the
    best one is set against the others; of groups of one run none is."""
    ordered = sorted(groups, key=lambda row: -row["control_gain"])
    shown = [f"{plain(row['group'])} {_mean_and_sd(row)} ({counted(row['runs'], 'run')})" for row in ordered]
    several = [row for row in ordered if row["control_gain_sd"] is not None]
    pairs = list(itertools.combinations(several, 2))
    verdicts = [_verdict(*pair) for pair in (pairs if len(several) <= _MANY else pairs[: len(several) - 1])]
    words = [f"{what}, in {_STD} (+- the standard deviation over seeds): {', '.join(shown)}."]
    words += [f"{'; '.join(verdicts)}."] if verdicts else []
    if len(several) < len(ordered):
        words.append("Of one run, whether a difference is more than the luck of a seed is not known.")
    if any(row["runs"] < _FEW for row in several):
        words.append("Of so few runs the spread itself is a rough guess.")
    return " ".join(words)


def _verdict(best: Row, other: Row) -> str:
    difference = best["control_gain"] - other["control_gain"]
    spread = max(best["control_gain_sd"], other["control_gain_sd"])
    said = f"{plain(best['group'])} over {plain(other['group'])}: {difference:+.2f}"
    if difference <= spread:
        return f"{said}, no more than the spread over seeds ({spread:.2f}): no difference is shown"
    return f"{said}, more than the spread over seeds ({spread:.2f})"


def _mean_and_sd(row: Row) -> str:
    sd = row["control_gain_sd"]
    return f"{row['control_gain']:+.2f}" + ("" if sd is None else f" +- {sd:.2f}")


def _of(rows: Sequence[Row], group: str) -> tuple[list[Row], Row]:
    """The rows of a group's runs, and the group's own."""
    own = [row for row in rows if row["group"] == group]
    return [row for row in own if row["run"] is not None], next(row for row in own if row["run"] is None)


def _span(row: Row, key: str, form: str) -> str:
    """A mean, and the lowest and highest where there are several runs."""
    ends = [row[key]] if row["runs"] == 1 else [row[f"{key}_low"], row[f"{key}_high"]]
    return _ranged(row[key], ends, form)


def _values(values: Sequence[float], form: str) -> str:
    return _ranged(sum(values) / len(values), values, form)


def _ranged(mean: float, values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return format(mean, form) if low == high else f"{mean:{form}} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
