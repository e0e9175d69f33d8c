"""`warmerge theory`: WARM's section 4.3, simulated and in closed form: what an average of weights keeps of its members.

OUT/theory.json, theory*.csv   every number; theory.png and .svg are drawn from them
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from warmerge.errors import Finding, UsageError, plain, quoted
from warmerge.report.results import THEORY, check_results, write_results
from warmerge.rewards import feature_theory as theory
from warmerge.rewards.feature_theory import FeatureGroup, Mean, Scenario
from warmerge.version import versions

_TABLES = ("rows", "coefficients", "features")
IN, OUT = "in distribution", "out of distribution"
_CORE, _DETAILS = FeatureGroup("learned by most runs", 6, 0.8), FeatureGroup("learned by few runs", 20, 0.2)
_TASK, _SHORTCUT = FeatureGroup("learned by half the runs", 12, 0.5), FeatureGroup("shortcut of all runs", 4, 1.0)
# One where an average of weights wins, one where it loses, one where nothing sets it apart.
SCENARIOS = (
    Scenario("what few runs learn flips", (_CORE, FeatureGroup("learned by few runs", 20, 0.2, sign=-1))),
    Scenario("a shortcut of all runs flips", (_TASK, FeatureGroup("shortcut of all runs", 4, 1.0, sign=-1))),
    Scenario("nothing flips", (_CORE, _DETAILS)),
)
# Smaller differences in accuracy than this are called none, however surely they are there.
_NO_DIFFERENCE = 0.005
_EXAMPLE_P = 0.3
_NOTES = (
    "accuracy is how often the reward has the sign of an input's label; the coefficients and accuracies called exact "
    "are expected values over what runs learn, not simulated",
    "in distribution every feature points the right way, and there an average of weights is never more accurate than "
    "the ensemble: equal coefficients are best, and a power drives them apart. All that it gains comes from features "
    "that fail and that few runs learn; where what fails is what most runs learn, it loses",
    "the theory leaves out: training (here a run just learns a feature or not, for itself, and its head uses exactly "
    "these), features that overlap or depend on each other, nets that are not linear in their features, and whether "
    "members can be averaged at all: that needs a shared start, and is what warmerge lmc-curve measures",
    "nobody knows p, or what flips, of a real reward model: take this for why averaging may help or harm, not for how "
    "much; warmerge eval measures that",
)


@dataclass(frozen=True)
class Theory:
    """What `theory` found. Rows are plain: what is in theory.json and the CSV files.

    `rows`: accuracies of a scenario for M members, in and out of distribution; `coefficients`: of a feature that a run
    learns with probability `p`; `features`: what the scenarios are made of. M = 1 is one member, `m` None is M -> inf.
    Columns that end in `_law` are exact; those of the same name without it are simulated, with a standard error `_se`,
    or None where nothing was simulated. `gain` is WA minus ENS in the same trials. `words`: a paragraph each.
    """

    rows: tuple[dict[str, Any], ...]
    coefficients: tuple[dict[str, Any], ...]
    features: tuple[dict[str, Any], ...]
    words: tuple[str, ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        tables = {name: list(getattr(self, name)) for name in _TABLES}
        return {**self.record, "words": list(self.words), "warnings": [str(w) for w in self.warnings], **tables}


def simulate_theory(
    out: str | Path | None = None,
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
    members: Sequence[int] = (2, 6, 10),
    layers: int = 2,
    noise: float = 1.0,
    trials: int = 2000,
    seed: int = 0,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Theory:
    """Coefficients and accuracies of one member, of ensembles and of weight averages: exact, and simulated beside it.

    Args:
        out: a folder for results and a figure; none are written if not given.
        scenarios: what there is to learn, and what of it flips out of distribution.
        members: sizes M to simulate.
        layers: L of Remark 4; 2 is the paper's net of features and a head.
        noise: standard deviation of each coordinate of the inputs. Features have the norm 1 if not said otherwise.
        trials: how often the runs are drawn. seed: same seed, same numbers.

    Raises:
        UsageError: an argument that cannot be used, or results that are there already.

    Example:
        >>> import warmerge
        >>> found = warmerge.simulate_theory(members=[2], trials=100)
        >>> [round(row["wa_law"], 3) for row in found.coefficients if row["p"] == 0.3]
        [0.195, 0.09]
    """
    sizes = _checked(scenarios, members, layers, noise, trials, seed)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_results(folder, THEORY, overwrite)
    coefficients = _coefficients(sizes, layers, trials, seed)
    rows = [row for one in scenarios for row in _rows(one, noise, sizes, layers, trials, seed)]
    features = [row for one in scenarios for row in _features(one, sizes[-1], layers)]
    words = [_coefficient_words(coefficients, sizes[-1])]
    words += [_scenario_words(one.name, sizes[-1], rows, features) for one in scenarios]
    agreement, warnings = _agreement([*rows, *coefficients], trials)
    record = {
        "format": "warmerge theory 1", "command": list(command), "versions": versions(), "members": list(sizes),
        "layers": layers, "noise": noise, "trials": trials, "seed": seed, "notes": list(_NOTES),
    }  # fmt: skip
    found = Theory(tuple(rows), tuple(coefficients), tuple(features), (*words, agreement), tuple(warnings), record)
    if folder is not None:
        write_results(folder, THEORY, found.as_json(), overwrite=overwrite)
    return found


def _checked(
    scenarios: Sequence[Scenario], members: Sequence[int], layers: int, noise: float, trials: int, seed: int
) -> list[int]:
    """The sizes M, ascending, each once."""
    if not members:
        raise UsageError("--members: expected at least one number of members, found none")
    sizes = sorted({theory.checked_members(m) for m in members})
    theory.checked_layers(layers)
    if not 2 <= trials <= theory.MOST_TRIALS:
        raise UsageError(f"--trials: expected a whole number from 2 to {theory.MOST_TRIALS:,}, found {trials}")
    if seed < 0:
        raise UsageError(f"--seed: expected a whole number of 0 or more, found {seed}")
    if not scenarios:
        raise UsageError("expected at least one scenario, found none")
    names = [one.name for one in scenarios]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"two scenarios have the name {quoted(twice)}")
    for one in scenarios:
        theory.check_noise_of(one, noise)
    return sizes


# --- rows -----------------------------------------------------------------------------------------------------------


def _coefficients(sizes: Sequence[int], layers: int, trials: int, seed: int) -> list[dict[str, Any]]:
    """p = 0, 0.05, ..., 1 for each M; every second of them, without the two ends, is also simulated."""
    grid = [round(0.05 * i, 2) for i in range(21)]
    simulated = grid[2:-1:2]
    drawn = theory.simulate_shares(numpy.array(simulated), sizes, trials, numpy.random.default_rng(seed))
    shares = dict(zip(sizes, drawn, strict=True))
    rows = []
    for m in (*sizes, None):
        for p in grid:
            wa = theory.wa_limit(p, layers) if m is None else theory.wa_coefficient(p, m, layers)
            row = {"p": p, "m": m, "ens_law": theory.ens_limit(p), "wa_law": wa}
            found: tuple[Mean | None, Mean | None] = (None, None)
            if m is not None and p in simulated:
                own = shares[m][:, simulated.index(p)]
                found = theory.mean_of(own), theory.mean_of(own**layers)
            rows.append({**row, **_columns(("ens", "wa"), found)})
    return rows


def _rows(
    scenario: Scenario, noise: float, sizes: Sequence[int], layers: int, trials: int, seed: int
) -> Iterator[dict[str, Any]]:
    simulated = sorted({1, *sizes})
    for data, world in ((IN, scenario.in_distribution()), (OUT, scenario)):
        measured = theory.simulate_accuracies(world, noise, simulated, layers, trials, seed)
        for m in (*_curve(simulated), None):
            if m is None:
                ens, wa = (theory.limit_accuracy(world, noise, depth) for depth in (1, layers))
            else:
                ens, wa = (theory.expected_accuracy(world, noise, m, depth) for depth in (1, layers))
            found = () if m is None else measured.get(m, ())
            yield {
                "scenario": scenario.name, "data": data, "m": m, "trials": trials if found else None,
                "ens_law": ens, "wa_law": wa, "gain_law": wa - ens,
                **_columns(("ens", "wa", "gain"), found or (None, None, None)),
            }  # fmt: skip


def _curve(simulated: Sequence[int]) -> list[int]:
    """The M at which exact accuracies make a line: all up to 10, then a few."""
    last = simulated[-1]
    beyond = {round(10 * (last / 10) ** (i / 6)) for i in range(1, 6)} if last > 10 else set()
    return sorted({*range(1, min(last, 10) + 1), *beyond, *simulated})


def _columns(names: Sequence[str], found: Sequence[Mean | None]) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for name, mean in zip(names, found, strict=True):
        columns |= {name: None if mean is None else mean.value, f"{name}_se": None if mean is None else mean.se}
    return columns


def _features(scenario: Scenario, m: int, layers: int) -> list[dict[str, Any]]:
    """`ens_share` and `wa_share`: what a group is of the expected reward of M members, in distribution."""
    laws = {
        depth: [g.count * g.norm**2 * theory.wa_coefficient(g.p, m, depth) for g in scenario.groups]
        for depth in (1, layers)
    }
    return [
        {
            "scenario": scenario.name, "features": group.name, "count": group.count, "p": group.p, "norm": group.norm,
            "sign": group.sign, "m": m, "ens_limit": theory.ens_limit(group.p),
            "wa_limit": theory.wa_limit(group.p, layers), "ens_share": _share(laws[1], i),
            "wa_share": _share(laws[layers], i),
        }
        for i, group in enumerate(scenario.groups)
    ]  # fmt: skip


def _share(rewards: Sequence[float], i: int) -> float | None:
    """None where no run learns anything."""
    return rewards[i] / sum(rewards) if sum(rewards) > 0 else None


# --- words ----------------------------------------------------------------------------------------------------------


def _coefficient_words(coefficients: Sequence[Mapping[str, Any]], m: int) -> str:
    (some,) = (row for row in coefficients if row["p"] == _EXAMPLE_P and row["m"] == m)
    (limit,) = (row for row in coefficients if row["p"] == _EXAMPLE_P and row["m"] is None)
    return (
        f"A feature that a run learns with probability {_EXAMPLE_P:g} has the coefficient {some['ens_law']:.3g} in an "
        f"ensemble, whatever M, and {some['wa_law']:.3g} in an average of the weights of {m} "
        f"(simulated: {some['wa']:.4f} +- {some['wa_se']:.4f}; M -> inf: {limit['wa_law']:.3g}). One that every run "
        f"learns keeps 1 in both: next to the first it weighs {1 / some['ens_law']:.3g} times as much in the ensemble, "
        f"{1 / some['wa_law']:.3g} times in the average."
    )


def _scenario_words(name: str, m: int, rows: Sequence[Mapping[str, Any]], features: Sequence[Mapping[str, Any]]) -> str:
    own = {(row["data"], row["m"]): row for row in rows if row["scenario"] == name}
    inside, outside, single, limit = own[IN, m], own[OUT, m], own[OUT, 1], own[OUT, None]
    failing = [row for row in features if row["scenario"] == name and row["sign"] != 1]
    if failing and failing[0]["ens_share"] is None:
        made = "no run learns anything."
    elif failing:
        ens, wa = (100 * sum(row[key] for row in failing) for key in ("ens_share", "wa_share"))
        made = f"the features that fail make up {ens:.0f} % of the ensemble's reward, {wa:.0f} % of the average's."
    else:
        made = "all features stay as they are."
    before = f" In distribution {_verdict(inside)}." if failing else ""
    return (
        f"{plain(name)} (M = {m}): {made} Out of distribution one member has the accuracy {single['ens']:.3f}, the "
        f"ensemble {outside['ens']:.3f}, the average {outside['wa']:.3f}: {_verdict(outside)}; as M -> inf the "
        f"ensemble comes to {limit['ens_law']:.3f}, the average to {limit['wa_law']:.3f}.{before}"
    )


def _verdict(row: Mapping[str, Any]) -> str:
    gain, se = row["gain"], row["gain_se"]
    found = f"({gain_text(gain, se)})"
    if abs(gain) <= 3 * se:
        return f"averaging weights or rewards makes no difference that {row['trials']:,} trials show {found}"
    if abs(gain) < _NO_DIFFERENCE:
        return f"averaging weights or rewards makes next to no difference {found}"
    return f"averaging weights is {'better' if gain > 0 else 'worse'} than averaging rewards {found}"


def gain_text(gain: float, se: float | None) -> str:
    """WA minus ENS with its standard error, if it has one; what four digits would show as zero in powers of ten.

    >>> gain_text(0.26512, 0.0037), gain_text(-0.0000123, 0.0000016), gain_text(0.0, None)
    ('+0.2651 +- 0.0037', '-1e-05 +- 2e-06', '0')
    """
    value = f"{gain:+.4f}" if abs(gain) >= 0.0005 or (se or 0) >= 0.0005 else f"{gain:+.0e}" if gain else "0"
    if se is None:
        return value
    return f"{value} +- " + (f"{se:.4f}" if se >= 0.0005 else f"{se:.0e}" if se else "0")


def _agreement(rows: Sequence[Mapping[str, Any]], trials: int) -> tuple[str, list[Finding]]:
    """How far simulated means are from exact ones; a warning where chance does not explain it."""
    found = [
        (abs(row[name] - row[f"{name}_law"]), row[f"{name}_se"])
        for row in rows
        for name in ("ens", "wa", "gain")
        if row.get(name) is not None
    ]
    # What happens in fewer than a few trials of all may not have happened in any: then the standard error is too small.
    beyond = [(off, se) for off, se in found if off > 5 * se + 10 / trials]
    off, se = max(beyond or found)
    errors = f", {off / se:.1f} of its standard errors" if se > 0 and not math.isclose(off, 0, abs_tol=1e-12) else ""
    how = f"of {len(found)} simulated means the one farthest from its exact value is {off:.4f} off{errors}"
    if not beyond:
        return f"The simulation agrees with the closed forms: {how}.", []
    what = f"{how}: {len(beyond)} are farther off than chance explains; one of the two is wrong, please report it"
    return f"The simulation does not agree with the closed forms: {how}.", [Finding("simulation", what)]
