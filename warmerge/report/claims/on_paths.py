"""What `lmc-curve` says about the paper's claims: paths between models, and more members in one average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmerge.errors import plain
from warmerge.report.claims.claim import (
    AGREES,
    DISAGREES,
    TOO_FEW,
    UNCLEAR,
    Claim,
    Gap,
    caution,
    gap_of,
    names_in,
    percent,
    points,
    shown,
    size,
    table,
)
from warmerge.report.rows import Row, accuracy, ends, flag, in_order, interval, number, place, text

_CONNECTED = (
    "between models of one pre-training and one probed head, the average of weights is nowhere less accurate than the "
    "straight line between their accuracies (Observation 1)"
)
_UNCONNECTED = "without a shared pre-training and a shared probed head, averaging weights fails (Observation 1)"
_GROWS = "not reported: that an average of more members is more accurate; the paper takes the M best of 10 runs"


# How the two ends of a path began, as far as the warnings of the result say.
_SHARED, _STRANGERS, _DOUBTFUL = "members", "models that do not share a start", "models that may not share a start"
_HEADS, _BODIES = " heads look independently drawn", "do they come from one pre-trained model?"


def curve_claims(content: Mapping[str, Any], source: str) -> list[Claim]:
    """Observation 1 on each set: paths between models of one start, and apart from them those between strangers."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in table(content, "verdicts"):
        if not any(math.isnan(x) for x in (_fall(row).low, _fall(row).high, number(row, "tolerance"))):
            groups.setdefault((text(row, "set"), _origin(content, text(row, "path"))), []).append(row)
    return [_connected(name, origin, rows, source) for (name, origin), rows in groups.items()]


def _origin(content: Mapping[str, Any], path: str) -> str:
    """Of heads the warnings name one pair alone; of bodies, each model that is far from the first one."""
    warnings, specs = names_in(content, "warnings"), names_in(content, "checkpoints")
    heads, bodies = ([warning for warning in warnings if doubt in warning] for doubt in (_HEADS, _BODIES))
    if not heads and not bodies:
        return _SHARED
    if len(specs) == 2:
        return _STRANGERS
    known = [next((plain(spec) for spec in specs if end in (spec, Path(spec).name)), None) for end in ends(path)]
    if None in known:  # the mean of all
        return _DOUBTFUL
    first, second = known
    for one, other in ((first, second), (second, first)):
        if any(warning.startswith(f"{one}: ") and f" with {other}'s: " in warning for warning in heads):
            return _STRANGERS
    far = [any(warning.startswith(f"{end}: ") for warning in bodies) for end in known]
    if far[0] != far[1]:
        return _STRANGERS
    return _DOUBTFUL if heads or all(far) else _SHARED


def _fall(row: Row) -> Gap:
    """By how much the average falls below the line, or, where one end only guesses, below the ensemble."""
    unknown = Gap(math.nan, math.nan, math.nan)
    if row.get("against") == "ensemble":
        return gap_of(row, "below_ensemble", "below_ensemble_") or unknown
    return gap_of(row, "barrier") or unknown


def _holds(row: Row) -> str:
    fall, tolerance = _fall(row), number(row, "tolerance")
    if fall.prompts < TOO_FEW:
        return "is open"
    if fall.high <= tolerance:
        return "holds"
    return "fails" if fall.low > tolerance else "is open"


def _connected(name: str, origin: str, rows: Sequence[Row], source: str) -> Claim:
    answers = [_holds(row) for row in rows]
    wanted, refuted = ("fails", "holds") if origin == _STRANGERS else ("holds", "fails")
    verdict = DISAGREES if refuted in answers else AGREES if set(answers) == {wanted} else UNCLEAR
    shows = {AGREES: wanted, DISAGREES: refuted, UNCLEAR: "is open"}[verdict]
    if origin == _DOUBTFUL:
        verdict = UNCLEAR
    row = max((row for row in rows if _holds(row) == shows), key=lambda row: _fall(row).high)
    fall, tolerance, (first, second) = _fall(row), number(row, "tolerance"), ends(text(row, "path"))
    value, spread = points(fall, (tolerance,))
    line = "the line between their accuracies"
    if row.get("against") == "ensemble":
        line = "the ensemble of both (the test where one end is no better than chance)"
    said = {"holds": "it holds", "fails": "it does not hold", "is open": "whether it holds cannot be told"}[shows]
    seen = (
        f"On {shown(name)}, from {shown(first)} to {shown(second)}, the largest fall below {line} is {value} "
        f"({spread}; {size(row)}), with a tolerance of {100 * tolerance:.6g}: {said}."
    )
    if len(rows) > 1:
        counts = ", ".join(f"{answers.count(word)} {word}" for word in ("holds", "fails", "is open") if word in answers)
        seen += f" That is the largest of its kind of {len(rows)} paths: {counts}."
    if origin != _SHARED:
        seen += f" These are {origin}, as the warnings of the result say."
    loss = gap_of(row, "below_ensemble", "below_ensemble_")
    if row.get("against") != "ensemble" and loss is not None and loss.low > tolerance:
        seen += f" Below the ensemble of both it is up to {points(loss, (tolerance,))[0]}: do not merge them."
    what = {
        "holds": f"averages of two {origin} keep their accuracy",
        "fails": f"averages of two {origin} lose accuracy",
        "is open": f"whether averages of two {origin} keep their accuracy",
    }["is open" if verdict == UNCLEAR else shows]
    paper = _UNCONNECTED if origin == _STRANGERS else _CONNECTED
    short = (what, f"on {shown(name)}", f"largest fall {value.lstrip('+')}" if fall.value > 0 else "no fall seen")
    return Claim(paper, seen + caution(fall.prompts), verdict, source, short)


# --- more members -----------------------------------------------------------------------------------------------------


def vs_m_claims(content: Mapping[str, Any], source: str) -> list[Claim]:
    """Whether the average of the most members is more accurate than the first member alone."""
    by_set: dict[str, list[Row]] = {}
    for row in table(content, "rows"):
        if not math.isnan(accuracy(row, "wa")):
            by_set.setdefault(text(row, "set"), []).append(row)
    order = str(content.get("order") or "")
    claims = (_grows(name, in_order(rows, "m"), order, source) for name, rows in by_set.items() if len(rows) > 1)
    return [claim for claim in claims if claim is not None]


def _grows(name: str, rows: Sequence[Row], order: str, source: str) -> Claim | None:
    first, last = rows[0], rows[-1]
    before, after = (interval(row, "wa_") for row in (first, last))
    prompts = number(last, "prompts")
    # Each has its own interval, and no paired one is kept: only where they lie apart is the difference sure.
    gap = Gap(number(last, "wa") - number(first, "wa"), after[0] - before[1], after[1] - before[0],
              math.inf if math.isnan(prompts) else prompts)  # fmt: skip
    verdict = UNCLEAR if order == "worst-first" else gap.verdict
    counts = [f"{place(row, 'm'):.0f}" for row in (first, last)]
    shares = [f"{percent(number(row, 'wa'))} ({percent(low)} to {percent(high)})" for row, (low, high) in
              ((first, before), (last, after))]  # fmt: skip
    said = {
        AGREES: "accuracy grows with the number of members", DISAGREES: "accuracy falls with the number of members",
        UNCLEAR: "whether accuracy grows with the number of members",
    }[verdict]  # fmt: skip
    why = ""
    if order == "worst-first":
        why = " cannot be told where each member is better than the one before"
    elif verdict == UNCLEAR:
        why = " cannot be told" + (", their intervals overlap" if gap.low <= 0 <= gap.high else "")
    seen = (
        f"On {shown(name)}, M = {counts[0]} is right on {shares[0]} and M = {counts[1]} on {shares[1]} (95 % intervals;"
        f" {size(last)}): {said}{why}."
    )
    if flag(last, "selected_on"):
        seen += " Members were ranked on this very set, which flatters every M."
    return Claim(_GROWS, seen + caution(gap.prompts), verdict, source, (said, f"on {shown(name)}", points(gap)[0]))
