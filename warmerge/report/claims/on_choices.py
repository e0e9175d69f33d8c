"""What `bon` says about the paper's claims: over-optimisation by choosing, and what the average's choices are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from warmerge.errors import UsageError, counted, plain
from warmerge.report.claims.claim import (
    AGREES,
    DISAGREES,
    TOO_FEW,
    UNCLEAR,
    Claim,
    Gap,
    amount,
    bootstrapped,
    caution,
    gap_of,
    shown,
    table,
)
from warmerge.report.rows import Row, number, place, text

# Kinds of proxies, as the command writes them.
_RM, _ENSEMBLE, _WARM = "rm", "ensemble", "warm"
_HACKED = (
    "not from the WARM paper: choosing the best of more and more answers by a single reward model ends in worse ones, "
    "which is over-optimisation, or reward hacking (Gao et al., arXiv 2210.10760)"
)
_BETTER = {
    _RM: "the average's choices among N answers are worth more than a single model's (figures 6 and 7)",
    _ENSEMBLE: "the average's choices among N answers are worth more than the ensemble's (figures 6 and 7, M = 2)",
}


def bon_claims(content: Mapping[str, Any], source: str) -> list[Claim]:
    """Over-optimisation of single models, and what the average's choices are worth beside others, at the largest n."""
    rows = table(content, "rows")
    target = next((name for name in ("gold", "control") if any(name in row for row in rows)), None)
    if target is None:
        return []
    n = max(place(row, "n") for row in rows)
    prompts = max(place(row, "prompts") for row in rows)
    kinds = {text(row, "proxy"): str(row.get("kind")) for row in rows}
    peaks = {_named(row): row for row in table(content, "peaks") if row.get("target") == target}
    falls = {name: gap for name, row in peaks.items() if (gap := gap_of(row, "fall", "fall_", prompts)) is not None}
    claims = _hacked({name: peaks[name] for name in falls}, falls, target, n, source)
    for name in (name for name, kind in kinds.items() if kind == _WARM):
        paired = _against(content, name, target, n, prompts)
        singles = {other: gap for other, gap in paired.items() if kinds.get(other) == _RM}
        claims += [_better(name, singles, _RM, target, n, source)] if singles else []
        # An ensemble each: raw and standardised ones are different proxies.
        ensembles = {other: gap for other, gap in paired.items() if kinds.get(other) == _ENSEMBLE}
        claims += [_better(name, {other: gap}, _ENSEMBLE, target, n, source) for other, gap in ensembles.items()]
    return claims


def _named(row: Row) -> str:
    """A proxy's name; one that is no text is not what the rows call it."""
    if not isinstance(row.get("proxy"), str):
        raise UsageError(f"expected a name for 'proxy' in each row of peaks, found {plain(repr(row.get('proxy')))}")
    return text(row, "proxy")


def _hacked(peaks: Mapping[str, Row], gaps: Mapping[str, Gap], target: str, n: float, source: str) -> list[Claim]:
    """Agrees where more than half of the single models surely fall, disagrees where all are surely highest at n.
    How the average's choices went is told beside them."""
    falls = {name: gap for name, gap in gaps.items() if peaks[name].get("kind") == _RM}
    if not falls:
        return []
    prompts = next(iter(falls.values())).prompts
    fell = {name: gap for name, gap in falls.items() if gap.verdict == AGREES}
    rising = prompts >= TOO_FEW and all(number(peaks[name], "peak_low") >= n for name in falls)
    verdict = AGREES if 2 * len(fell) > len(falls) else DISAGREES if rising else UNCLEAR
    name, most = max((fell or falls).items(), key=lambda item: item[1].value)
    seen = (
        f"By {target}, choices of {len(fell)} of {counted(len(falls), 'single model')} are surely worth less at n = "
        f"{n:.0f} than at the best n ({counted(int(prompts), 'prompt')})."
    )
    if rising:
        seen += f" All are surely worth most at n = {n:.0f} itself: there is no over-optimisation up to there."
    elif most.value > 0:
        seen += f" The most is lost by {shown(name)}: {_lost(peaks[name], most)}."
    averages = [name for name in gaps if peaks[name].get("kind") == _WARM]
    seen += "".join(_average_fell(name, peaks[name], gaps[name], n) for name in averages)
    short = {
        AGREES: "choices of single models get worse as n grows",
        DISAGREES: "choices of single models only get better as n grows",
        UNCLEAR: "whether choices of single models get worse as n grows",
    }[verdict]
    where, found = f"up to n = {n:.0f}", f"{len(fell)} of {len(falls)} surely do"
    if any(gaps[name].verdict == AGREES for name in averages):
        found += "; those of the average surely do"
    return [Claim(_HACKED, seen + caution(prompts), verdict, source, (short, where, found))]


def _lost(peak: Row, fall: Gap) -> str:
    value, spread = amount(fall)
    return f"{value.lstrip('+')} since n = {place(peak, 'peak_n'):.0f} ({spread})"


def _average_fell(name: str, peak: Row, fall: Gap, n: float) -> str:
    """What choosing by more and more answers did to the average's choices."""
    head = f" Those of the average ({shown(name)})"
    if fall.verdict == AGREES:
        return f"{head} are surely worth less than at the best n: {_lost(peak, fall)}."
    if fall.prompts >= TOO_FEW and number(peak, "peak_low") >= n:
        return f"{head} are surely worth most at n = {n:.0f} itself."
    lost = f"lost {_lost(peak, fall)}" if fall.value > 0 else f"are worth most at n = {n:.0f}"
    return f"{head} {lost}: whether they get worse cannot be told."


def _against(content: Mapping[str, Any], name: str, target: str, n: float, prompts: float) -> dict[str, Gap]:
    """The worth of a proxy's choices minus that of others, paired: to the reference, or from it to all others."""
    found = {}
    for row in table(content, "differences"):
        if row.get("target") != target or place(row, "n") != n:
            continue
        gap = bootstrapped(gap_of(row, prompts=prompts))
        if gap is not None and row.get("to") == name:
            found[text(row, "proxy")] = -gap
        elif gap is not None and row.get("proxy") == name:
            found[text(row, "to")] = gap
    return found


def _better(name: str, gaps: Mapping[str, Gap], kind: str, target: str, n: float, source: str) -> Claim:
    """Agrees where the average is surely better than all of them, disagrees where it is surely worse than one."""
    by: dict[str, list[str]] = {AGREES: [], DISAGREES: [], UNCLEAR: []}
    for other, gap in gaps.items():
        by[gap.verdict].append(other)
    verdict = DISAGREES if by[DISAGREES] else UNCLEAR if by[UNCLEAR] else AGREES
    prompts = next(iter(gaps.values())).prompts
    parts = []
    for which, words in ((AGREES, "more than those of"), (DISAGREES, "less than those of"),
                         (UNCLEAR, "not surely more or less than those of")):  # fmt: skip
        shares = [f"{shown(other)} ({', '.join(amount(gaps[other]))})" for other in by[which]]
        parts += [f"{words} {', '.join(shares)}"] if shares else []
    seen = (
        f"By {target}, choices of {shown(name)} at n = {n:.0f} are worth {'; '.join(parts)}; "
        f"n = {counted(int(prompts), 'prompt')}."
    )
    others = "the ensemble" if kind == _ENSEMBLE else "single models" if len(gaps) > 1 else "a single model"
    head = f"the average's choices at n = {n:.0f} are worth {'less' if verdict == DISAGREES else 'more'}"
    found = amount(next(iter(gaps.values())))[0]
    if len(gaps) > 1:
        found = f"surely {'less' if verdict == DISAGREES else 'more'} than {len(by[verdict])} of {len(gaps)}"
    if verdict == UNCLEAR and len(gaps) > 1:
        found = f"surely more than {len(by[AGREES])} of {len(gaps)}"
    short = (f"whether {head}" if verdict == UNCLEAR else head, f"than those of {others}", found)
    return Claim(_BETTER[kind], seen + caution(prompts), verdict, source, short)
