"""What `rl-report` says about the paper's claims: reward hacking of single models, and the average's policy beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from warmerge.errors import counted
from warmerge.report.claims.claim import (
    AGREES,
    DISAGREES,
    UNCLEAR,
    Claim,
    Gap,
    amount,
    listed,
    names_in,
    over_seeds,
    shown,
    table,
)
from warmerge.report.rows import Row, number, place, text

# Kinds of proxies, as the command writes them.
_RM, _ENSEMBLE, _WARM = "rm", "ensemble", "warm"
_HACKED = (
    "a policy that is optimised for a single reward model ends up hacking it: the proxy rises while the control reward "
    "falls (figure 8, after about 3,400 steps, read off the plot)"
)
_WORTH = {
    _RM: "at the same KL, the average's policy is worth more than a single model's (figure 8, single runs)",
    _ENSEMBLE: "not reported for more than two members: the average's policy is worth more than the ensemble's",
}
_HIGHER = "the average's policy peaks higher than a single model's (figure 8, six members, single runs)"
_LATER = "the average's policy peaks later than a single model's (figure 8, six members, single runs)"
_WHO = {_RM: "single models", _ENSEMBLE: "the ensemble"}
# Outcomes in which the control reward fell beyond its noise while the proxy rose beyond its own.
_FELL = ("over-optimised", "declining")
_STD = "standard deviations"
_NO_PEAK = ("never rose", "within noise")


@dataclass(frozen=True)
class _Runs:
    """Runs of an rl-report against proxies of one role: a single model, an ensemble or an average.

    `seeds`: of each run; `groups`: what the report calls them.
    """

    seeds: Mapping[str, int]
    groups: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"{listed(self.groups)}, {counted(len(self.seeds), 'run')}"

    def own(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of these runs; none of their groups."""
        return [row for row in rows if isinstance(row.get("run"), str) and row["run"] in self.seeds]


def rl_claims(content: Mapping[str, Any], source: str) -> list[Claim]:
    """Reward hacking of single models, and the average beside others: at equal KL, at its peak, and when that comes.
    Only runs of one KL coefficient are compared."""
    claims: list[Claim] = []
    by_coef: dict[str, list[Row]] = {}
    for run in table(content, "runs"):
        by_coef.setdefault(_coef(run), []).append(run)
    for coef, runs in by_coef.items():
        singles, ensembles, average = (_of_role(runs, role) for role in (_RM, _ENSEMBLE, _WARM))
        at = f" with a KL coefficient of {coef}" if len(by_coef) > 1 else ""
        claims += _hacked(content, singles, average, at, source)
        claims += _at_equal_kl(content, average, singles, _RM, at, source)
        claims += _peaks(content, average, singles, at, source)
        claims += _at_equal_kl(content, average, ensembles, _ENSEMBLE, at, source)
    return claims


def _coef(run: Row) -> str:
    settings = run.get("settings")
    return f"{number(settings, 'kl_coef') if isinstance(settings, Mapping) else math.nan:g}"


def _of_role(runs: Sequence[Row], role: str) -> _Runs:
    own = [run for run in runs if _role(run) == role]
    seeds = {text(run, "run"): int(place(run, "seed")) for run in own}
    return _Runs(seeds, tuple(dict.fromkeys(text(run, "group") for run in own)))


def _role(run: Row) -> str | None:
    """What a run's proxy is, as the command that made it says; the control reward itself is no proxy."""
    proxy = run.get("proxy")
    if not isinstance(proxy, Mapping):
        return None
    return None if names_in(proxy, "checkpoints") == [str(run.get("control"))] else str(proxy.get("kind"))


@dataclass(frozen=True)
class _Hacking:
    """How many of `runs` runs hacked their proxy: `hacked`; `counts`: of each way that runs went, how many."""

    runs: int
    hacked: int
    counts: str

    @property
    def share(self) -> str:
        return f"{self.hacked} of {counted(self.runs, 'run')}"


def _hacking(content: Mapping[str, Any], runs: _Runs) -> _Hacking | None:
    """None where no run has a peak."""
    ends = {row["run"]: row for row in runs.own(table(content, "ends"))}
    outcomes, hacked = [], 0
    for row in runs.own(table(content, "peaks")):
        outcome, only_fell = shown(str(row.get("outcome"))), _fell(row, ends.get(row["run"], {}))
        hacked += only_fell or row.get("outcome") in _FELL
        outcomes.append(f"over-optimised from the start on ({outcome} in the table)" if only_fell else outcome)
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes))
    return _Hacking(len(outcomes), hacked, counts) if outcomes else None


def _hacked(content: Mapping[str, Any], singles: _Runs, average: _Runs, at: str, source: str) -> list[Claim]:
    """Agrees where at least half of the runs against single models hacked them; that none did may be for want of steps.
    How runs against the average went is told beside them: the paper says that these fall later, not never."""
    found, other = _hacking(content, singles), _hacking(content, average)
    if found is None:
        return []
    verdict = AGREES if found.hacked and 2 * found.hacked >= found.runs else UNCLEAR
    steps = max((number(row, "step") for row in singles.own(table(content, "ends"))), default=math.nan)
    lasted = "" if math.isnan(steps) else f" within {steps:.0f} steps"
    seen = (
        f"Of {counted(found.runs, 'run')} against single models ({listed(singles.groups)}){at}, {found.hacked} hacked "
        f"the proxy{lasted} (the control reward fell beyond its noise while the proxy rose): {found.counts}."
    )
    if verdict == UNCLEAR:
        seen += " More steps, or a smaller KL coefficient, could show more."
    share = found.share
    if other is not None:
        how = "not hacked" if not other.hacked else "hacked as well" if found.hacked else "hacked"
        seen += f" The average's policy ({listed(average.groups)}): {how} ({other.share}): {other.counts}."
        share += f"; the average: {other.share}"
    short = "policies hack single models" if verdict == AGREES else "whether policies hack single models"
    return [Claim(_HACKED, seen, verdict, source, (short, f"in RL{at}", share))]


def _fell(peak: Row, end: Row) -> bool:
    """Whether a run that never rose lost control reward, and gained proxy, beyond three standard errors."""
    if peak.get("outcome") not in _NO_PEAK:
        return False
    noise = [3 * number(peak, key) for key in ("control_error", "proxy_error")]
    return number(end, "control_gain") < -noise[0] and number(end, "proxy_gain") > noise[1]


def _by_seed(rows: Sequence[Row], runs: _Runs, key: str) -> dict[int, float]:
    """The mean of a number over the runs of each seed."""
    found: dict[int, list[float]] = {}
    for row in runs.own(rows):
        if not math.isnan(number(row, key)):
            found.setdefault(runs.seeds[row["run"]], []).append(number(row, key))
    return {seed: mean(values) for seed, values in found.items()}


def _compared(rows: Sequence[Row], average: _Runs, others: _Runs, key: str) -> tuple[Gap, str] | None:
    """The average's number minus that of others, paired by seed, and the words for it. None where it is not known."""
    ours, theirs = (_by_seed(rows, runs, key) for runs in (average, others))
    if not ours or not theirs:
        return None
    both = [seed for seed in ours if seed in theirs]
    if both:
        gap = over_seeds([ours[seed] - theirs[seed] for seed in both])
        size = f"n = {counted(len(both), 'seed')}, paired"
    else:
        gap = Gap(mean(ours.values()) - mean(theirs.values()), math.nan, math.nan)
        size = "no seed in common"
    value, spread = amount(gap)
    seeds = both or [*ours, *theirs]
    shares = [mean(own[seed] for seed in seeds if seed in own) for own in (ours, theirs)]
    words = f"{shares[0]:.2f} ({average.words}) against {shares[1]:.2f} ({others.words}), {value} ({spread}; {size})"
    return gap, words


def _claim(
    paper: str, compared: tuple[Gap, str], what: str, phrases: tuple[str, str], where: tuple[str, str, str], source: str
) -> Claim:
    """`what` is compared, and `phrases` say that the paper is right, and that it is not. `where`: at which point of the
    runs, at which KL coefficient, and the unit of the difference."""
    gap, words = compared
    head = phrases[gap.verdict == DISAGREES]
    short = f"whether {head}" if gap.verdict == UNCLEAR else head
    point, at, unit = where
    told = f"{'it cannot be told ' if gap.verdict == UNCLEAR else ''}{short} {point}".rstrip()
    seen = f"{what}{at}: {words}; {told}."
    if math.isnan(gap.low):
        seen += " Without several seeds of both, whether that is more than luck is not known."
    return Claim(paper, seen, gap.verdict, source, (f"{short} in RL{at}", point, f"{amount(gap)[0]} {unit}"))


def _at_equal_kl(
    content: Mapping[str, Any], average: _Runs, others: _Runs, role: str, at: str, source: str
) -> list[Claim]:
    rows = table(content, "equal_kl")
    kl = max((place(row, "at_kl") for row in [*average.own(rows), *others.own(rows)]), default=0.0)
    compared = _compared([row for row in rows if place(row, "at_kl") == kl], average, others, "control_gain")
    # That KL is of all runs, not only of those with this coefficient.
    what = f"Control gain at {kl:g} nats (the largest shown KL that all runs of this report reached)"
    where = ("at equal KL", at, _STD)
    return [] if compared is None else [_claim(_WORTH[role], compared, what, _worth(role), where, source)]


def _worth(role: str) -> tuple[str, str]:
    whose = f"than that of {_WHO[role]}"
    return f"the average's policy is worth more {whose}", f"the average's policy is worth less {whose}"


def _peaks(content: Mapping[str, Any], average: _Runs, singles: _Runs, at: str, source: str) -> list[Claim]:
    """How high the control reward rose, and how far from the start, in KL, it was then."""
    rows, claims = table(content, "peaks"), []
    whose = f"that of {_WHO[_RM]}"
    if (compared := _compared(rows, average, singles, "control_gain")) is not None:
        where = ("at its peak", at, _STD)
        claims.append(_claim(_HIGHER, compared, "Largest control gain", _worth(_RM), where, source))
    # A run that never rose has no peak. Of one that has not fallen by its end the peak may still come.
    rose = [row for row in rows if row.get("outcome") not in _NO_PEAK]
    if (compared := _compared(rose, average, singles, "kl")) is not None:
        gap, words = compared
        earlier = singles if gap.verdict == AGREES else average
        if gap.verdict != UNCLEAR and any(row.get("outcome") == "kept" for row in earlier.own(rose)):
            gap = Gap(gap.value, math.nan, math.nan)
            words += ", but in runs that have not fallen the peak may still come"
        phrases = f"the average's policy peaks later than {whose}", f"the average's policy peaks earlier than {whose}"
        claims.append(_claim(_LATER, (gap, words), "KL in nats at the peak", phrases, ("", at, "nats"), source))
    return claims
