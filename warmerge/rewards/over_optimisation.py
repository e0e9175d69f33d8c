"""Over-optimisation of a policy, from the steps of its run: where the control reward is highest, and where it is lost.

Gains are in standard deviations of the start policy's answers, so that control and proxy can be set beside each other.
In every table a row with `run` is one run; a row whose `run` is None is its group: the mean over runs, with ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from warmerge.rewards.metrics import Array

Row = dict[str, Any]
Groups = Mapping[str, Sequence["Run"]]

# How a run went, as its row in `peaks` says.
NEVER_ROSE, NOISE, KEPT, DECLINING, COLLAPSED, OVER_OPTIMISED = (
    "never rose", "within noise", "kept", "declining", "collapsed", "over-optimised"
)  # fmt: skip
# A largest value among many noisy ones is large by chance: so many standard errors do not count as a gain.
_SURE = 3.0
FEW_POINTS = 20
_MEASURED = ("control", "proxy", "kl_sequence")


@dataclass(frozen=True)
class Run:
    """A run: its name, its proxy, its KL coefficient and its steps, of which at least two have a control reward."""

    name: str
    proxy: str
    kl_coef: float
    steps: Sequence[Row]

    @property
    def points(self) -> list[Row]:
        """The steps on which the control reward was measured."""
        return [row for row in self.steps if row["control"] is not None]


@dataclass(frozen=True)
class Curve:
    """A smoothed run: `steps`, gains of `control` and `proxy`, `kl` in nats for an answer, all (K,).

    `raw` has what was measured on the middle steps; the errors are standard errors of a gain, NaN where unknown.
    """

    steps: tuple[int, ...]
    control: Array
    proxy: Array
    kl: Array
    control_error: float
    proxy_error: float
    raw: tuple[Row, ...]


@dataclass(frozen=True)
class Optimisation:
    """Tables: `rows` of the smoothed curves, `peaks`, `equal_kl`, and `ends` at the last step."""

    rows: tuple[Row, ...]
    peaks: tuple[Row, ...]
    equal_kl: tuple[Row, ...]
    ends: tuple[Row, ...]


def optimisation(groups: Groups, window: int, margin: float) -> Optimisation:
    """How each run and each group went.

    Args:
        groups: runs that differ in their seed alone, by the name of the group.
        window: measured points in a moving mean: odd, and fewer than any run has.
        margin: share of the gain at the peak that is lost in a collapse; > 0.
    """
    curves = {name: [smoothed(run.points, window) for run in runs] for name, runs in groups.items()}
    kls = common_kls([curve for own in curves.values() for curve in own])
    rows: list[Row] = []
    peaks: list[Row] = []
    equal: list[Row] = []
    ends: list[Row] = []
    for name, runs in groups.items():
        own = list(zip(runs, curves[name], strict=True))
        rows += [{**row, "smooth": window} for row in _curve_rows(name, own)]
        about = {"proxy": runs[0].proxy, "kl_coef": runs[0].kl_coef}
        peaks += with_group([{**_of(name, run), **about, **peak(curve, margin)} for run, curve in own])
        for kl in kls:
            equal += with_group([{**_of(name, run), "at_kl": kl, **at_kl(curve, kl)} for run, curve in own])
        ends += with_group([{**_of(name, run), **_end(run, curve, window)} for run, curve in own])
    return Optimisation(tuple(rows), tuple(peaks), tuple(equal), tuple(ends))


def default_window(points: int) -> int:
    """A twentieth of the measured points, made odd, so that a mean has a middle.

    >>> [default_window(n) for n in (3, 40, 140, 3500)]
    [1, 1, 7, 175]
    """
    window = max(1, points // 20)
    return window - (window % 2 == 0)


def moving_mean(values: Sequence[float], window: int) -> Array:
    """The mean of each `window` neighbours, (K - window + 1,): at the ends nothing is filled in.

    >>> moving_mean([1.0, 2.0, 6.0, 4.0], 3).tolist()
    [3.0, 4.0]
    """
    windows = numpy.lib.stride_tricks.sliding_window_view(numpy.asarray(values, numpy.float64), window)
    return numpy.asarray(windows.mean(axis=-1))


def smoothed(points: Sequence[Row], window: int) -> Curve:
    """A run as moving means of its measured points, each standing at the middle one.

    The first mean is the start, whose gain is 0; standard deviations are those of the first point's answers.
    """
    middle = points[window // 2 : len(points) - window // 2]
    means = {key: moving_mean([row[key] for row in points], window) for key in _MEASURED}
    gains, errors = {}, {}
    for key in ("control", "proxy"):
        std = points[0][f"{key}_std"]
        gains[key] = (means[key] - means[key][0]) / std
        errors[key] = _error(numpy.asarray([row[key] for row in points]) / std, window)
    return Curve(
        tuple(row["step"] for row in middle), gains["control"], gains["proxy"], means["kl_sequence"],
        errors["control"], errors["proxy"], tuple(middle),
    )  # fmt: skip


def peak(curve: Curve, margin: float) -> Row:
    """Where a curve's control gain is highest, where `margin` of that is lost, and how the run went.

    The collapse is the first later point with less than 1 - margin of the largest gain; None where there is none.
    `collapse_lasting_step` is the first from which on it stays so to the end; None where the gain came back.
    """
    top = int(numpy.argmax(curve.control))
    gain = float(curve.control[top])
    outcome = NEVER_ROSE if gain <= 0 else NOISE if gain <= _beyond(curve.control_error) else KEPT
    below = numpy.flatnonzero(curve.control[top:] < (1 - margin) * gain) + top
    collapse = int(below[0]) if outcome == KEPT and below.size else None
    lost = curve.control < (1 - margin) * gain
    lasting = None if collapse is None or not lost[-1] else curve.steps[-int(numpy.argmin([*lost[::-1], False]))]
    more = curve.proxy - curve.proxy[top] > _beyond(curve.proxy_error)  # proxy than at the peak
    if collapse is not None:
        outcome = OVER_OPTIMISED if more[below].any() else COLLAPSED
    elif outcome == KEPT and more[-1] and gain - float(curve.control[-1]) > _beyond(curve.control_error):
        outcome = DECLINING
    return {
        "outcome": outcome, "step": curve.steps[top], "kl": float(curve.kl[top]), "control_gain": gain,
        "control_error": curve.control_error, "proxy_gain": float(curve.proxy[top]), "proxy_error": curve.proxy_error,
        **{f"collapse_{key}": value for key, value in _at(curve, collapse).items()}, "collapse_lasting_step": lasting,
    }  # fmt: skip


def common_kls(curves: Sequence[Curve]) -> tuple[float, ...]:
    """Three to five round KLs that every curve reached from below; fewer, or none, where curves start high.

    >>> flat = numpy.zeros(2)
    >>> common_kls([Curve((1, 2), flat, flat, numpy.asarray([0.0, end]), 0.0, 0.0, ()) for end in (4.6, 9.0)])
    (1.0, 2.0, 3.0, 4.0)
    """
    low, high = max(curve.kl[0] for curve in curves), min(curve.kl.max() for curve in curves)
    if high <= 0:
        return ()
    power = 10.0 ** math.floor(math.log10(high))
    step = max(base * scale for base in (1, 2, 2.5, 5) for scale in (power / 10, power) if high / (base * scale) >= 3)
    multiples = [round(k * step, 12) for k in range(1, 6)]
    return tuple(kl for kl in multiples if low < kl <= high)


def at_kl(curve: Curve, kl: float) -> Row:
    """Step and gains where a curve first reaches a KL that lies above its start, on the line between two points."""
    after = int(numpy.argmax(curve.kl >= kl))
    share = (kl - curve.kl[after - 1]) / (curve.kl[after] - curve.kl[after - 1])

    def between(values: Any) -> float:
        return float(values[after - 1] + share * (values[after] - values[after - 1]))

    return {"step": between(curve.steps), "control_gain": between(curve.control), "proxy_gain": between(curve.proxy)}


def with_group(rows: Sequence[Row]) -> list[Row]:
    """The rows of a group's runs, then the group's: of each number its mean, `_low`, `_high` and `_sd` over the runs.

    A number that is None for some runs is the mean of the others; `_runs` says of how many. `_sd` of one run is None.
    """
    first, count = rows[0], len(rows)
    group: Row = {"group": first["group"], "run": None, "runs": count}
    for key, value in first.items():
        if key in ("group", "run", "runs"):
            continue
        values = [row[key] for row in rows if row[key] is not None]
        if key in ("proxy", "kl_coef", "at_kl"):
            group[key] = value
        elif key == "outcome":
            group |= {key: _outcomes(values)}
        else:
            group |= {key: float(numpy.mean(values)) if values else None}
            group |= {f"{key}_low": min(values, default=None), f"{key}_high": max(values, default=None)}
            group |= {f"{key}_sd": float(numpy.std(values, ddof=1)) if len(values) > 1 else None}
            group |= {f"{key}_runs": len(values)} if key.startswith("collapse_") else {}
    return [*rows, group]


def _outcomes(values: Sequence[str]) -> str:
    return ", ".join(f"{values.count(value)} {value}" for value in dict.fromkeys(values))


def _curve_rows(group: str, own: Sequence[tuple[Run, Curve]]) -> list[Row]:
    """The points of each run, then those of the group: means and ends on the steps that all its runs have."""
    rows, at = [], []
    for run, curve in own:
        points = [
            {
                **_of(group, run), **_at(curve, i), "control_raw": raw["control"], "proxy_raw": raw["proxy"],
                "kl_raw": raw["kl_sequence"],
            }
            for i, raw in enumerate(curve.raw)
        ]  # fmt: skip
        rows += points
        at.append({point["step"]: point for point in points})
    for step in at[0]:
        here = [by_step[step] for by_step in at if step in by_step]
        if len(here) < len(own):
            continue
        row: Row = {"group": group, "run": None, "runs": len(own), "step": step}
        for key in ("kl", "control_gain", "proxy_gain"):
            values = [point[key] for point in here]
            row |= {key: sum(values) / len(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        rows.append(row)
    return rows


def _of(group: str, run: Run) -> Row:
    return {"group": group, "run": run.name, "runs": 1}


def _at(curve: Curve, i: int | None) -> Row:
    values: tuple[Any, ...] = (curve.steps, curve.kl, curve.control, curve.proxy)
    names = ("step", "kl", "control_gain", "proxy_gain")
    if i is None:
        return dict.fromkeys(names)
    return {name: int(own[i]) if name == "step" else float(own[i]) for name, own in zip(names, values, strict=True)}


def _end(run: Run, curve: Curve, window: int) -> Row:
    """The last step: means over the last `window` measured points, beside those over the first."""
    points = run.points
    row = {"step": run.steps[-1]["step"], **{key: value for key, value in _at(curve, -1).items() if key != "step"}}
    for key in ("length", "truncated"):
        row |= {key: float(moving_mean([point[key] for point in points[-window:]], window)[0])}
        row |= {f"{key}_start": float(moving_mean([point[key] for point in points[:window]], window)[0])}
    return row


def _error(values: Array, window: int) -> float:
    """Standard error of a gain, from the noise between neighbours: second differences, in which a slope cancels.

    NaN of fewer than 20 points, between which a curve bends too much to be told from noise. Where the noise of a step
    has the variance v, a second difference has 6 v, and the difference of two means of `window` steps 2 v / window.
    """
    if len(values) < FEW_POINTS:
        return math.nan
    bends = numpy.diff(values, n=2)
    return math.sqrt(float(numpy.mean(bends**2)) / 3 / window)


def _beyond(error: float) -> float:
    return 0.0 if math.isnan(error) else _SURE * error
