"""What `eval` says about the paper's claims: the average against its members, ensembles, wrong labels, shrinkage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from warmerge.errors import UsageError, counted
from warmerge.report.claims.claim import (
    AGREES,
    DISAGREES,
    ROUNDING,
    UNCLEAR,
    Claim,
    Gap,
    bootstrapped,
    caution,
    gap_of,
    listed,
    percent,
    points,
    shown,
    size,
    table,
)
from warmerge.report.rows import Row, accuracy, text

# Of an accuracy: what counts as the same, where the paper says that two are about equal.
TOLERANCE = 0.01
# So far above the share of wrong answers on other pairs, agreement with wrong labels is memory.
MEMORISED = 0.1
SWAPPED, CLEAN = "[swapped]", "[clean]"
_MEMBERS, _HALFWAY, _ENSEMBLE = "mean of the members", "mean of the half-way models", "ensemble (mean)"
_STANDARDISED = "ensemble (mean, standardised)"
_ENSEMBLES = {
    _ENSEMBLE: "the ensemble of its members' rewards",
    _STANDARDISED: "the ensemble of its members' standardised rewards",
}
_SHORT = {
    _MEMBERS: "its members", "start": "the shared start", _HALFWAY: "its members half-way to their start",
    **dict.fromkeys(_ENSEMBLES, "the ensemble"),
}  # fmt: skip
# Which of the two ensembles a number of a paragraph is of.
_OF = {_ENSEMBLE: "of plain rewards ", _STANDARDISED: "of standardised rewards "}
_BETTER = (
    "an average is more accurate than the models that it is made of (figure 4, two members, read off the plot: 77.9 % "
    "against 76.5 to 76.7 % on validation pairs, 71.7 % against 70.8 % out of distribution)"
)
_EQUAL = (
    "the average is about as accurate as the ensemble of its members' rewards (Observation 2; figure 4, two members, "
    "read off the plot: 77.9 % against 77.3 % on validation pairs, 71.7 % against 71.2 % out of distribution)"
)
_FORGETS = (
    "the average memorises fewer wrong labels than its members and their ensemble (Observation 3; figure 4, two "
    "members, read off the plot: it agrees with 45.0 % of the swapped labels, single models with 48.5 to 49.4 %, the "
    "ensemble with 48.9 %)"
)


@dataclass(frozen=True)
class _Evaluation:
    """An eval.json: its rows by set and model, the average's differences by set and what it is compared with."""

    rows: Mapping[tuple[str, str], Row]
    differences: Mapping[tuple[str, str], Row]
    source: str

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.rows))

    def masked(self, name: str) -> bool:
        """Whether a set is a part of training pairs of which some had their labels swapped."""
        whole = name.removesuffix(SWAPPED).removesuffix(CLEAN)
        return name != whole and {whole + SWAPPED, whole + CLEAN} <= set(self.sets)

    @property
    def held_out(self) -> list[str]:
        return [name for name in self.sets if not self.masked(name)]

    def members(self, name: str) -> list[str]:
        return [model for (key, model), row in self.rows.items() if key == name and row.get("kind") == "member"]

    def accuracy(self, name: str, model: str) -> float:
        """Of a row, or of the mean of several; NaN where it is not in the table."""
        several = {_MEMBERS: "member", _HALFWAY: "halfway"}
        if model not in several:
            return accuracy(self.rows.get((name, model), {}), "accuracy")
        own = [row for (key, _), row in self.rows.items() if key == name and row.get("kind") == several[model]]
        return mean(accuracy(row, "accuracy") for row in own) if own else math.nan

    def gap(self, name: str, against: str) -> Gap | None:
        row = self.differences.get((name, against))
        gap = None if row is None else bootstrapped(gap_of(row))
        found = self.accuracy(name, "average") - self.accuracy(name, against)
        if gap is not None and abs(found - gap.value) > ROUNDING:
            raise UsageError(
                f"expected a difference between the accuracies of average and {shown(against)} on {shown(name)} "
                f"of {found:.6g}, found {gap.value:.6g}"
            )
        return gap


def eval_claims(content: Mapping[str, Any], source: str) -> list[Claim]:
    """Claims about the accuracy of the average: against its members, ensembles, wrong labels, and shrinkage."""
    found = _Evaluation(
        _unique(table(content, "rows"), "model"),
        _unique([row for row in table(content, "differences") if row.get("a") == "average"], "b"),
        source,
    )
    swapped = [name for name in found.sets if found.masked(name) and name.endswith(SWAPPED)]
    unmemorised = {name: _unmemorised(found, name) for name in swapped}
    claims = [_better(found, name, _MEMBERS, _BETTER, _named_members(found, name)) for name in found.held_out]
    # Not on clean training pairs: accuracy there is also memory, of which the average should have less.
    claims += [_equal(found, name, which) for name in found.held_out for which in _ENSEMBLES]
    for name, why in unmemorised.items():
        claims += [why] if why else [_forgets(found, name, which, _FORGETS) for which in (_MEMBERS, *_ENSEMBLES)]
    for which, words in _controls(found).items():
        paper = f"not reported: averaging is worth more than {words[0]}"
        claims += [_better(found, name, which, paper, words[1]) for name in found.held_out]
        # Before any training nothing is memorised: that the start knows fewer wrong labels says nothing.
        paper = f"not reported: averaging removes more label noise than {words[0]}"
        noisy = [name for name, why in unmemorised.items() if why is None and which != "start"]
        claims += [_forgets(found, name, which, paper, words[1]) for name in noisy]
    return [claim for claim in claims if claim is not None]


def _unique(rows: Sequence[Row], key: str) -> dict[tuple[str, str], Row]:
    found = {(text(row, "set"), text(row, key)): row for row in rows}
    if len(found) < len(rows):
        raise UsageError(f"expected one row for each set and {key!r}, found several")
    return found


def _controls(found: _Evaluation) -> dict[str, tuple[str, str]]:
    """What the paper does not compare with: name among the differences -> what it stands for, what the model is."""
    controls = {
        "start": ("the start alone, its probed head without further training", "the start that its members share"),
        _HALFWAY: ("shrinking each member half-way back to its start", "its members half-way back to their start"),
    }
    for (_, model), row in found.rows.items():
        if row.get("kind") == "beside":
            words = f"the model {shown(model)} measured beside it"
            controls[model] = (words.replace("model", "single model", 1), words)
    return controls


def _named_members(found: _Evaluation, name: str) -> str:
    members = found.members(name)
    return f"its {counted(len(members), 'member')} ({listed(members)})" if members else "its members"


def _sentence(found: _Evaluation, name: str, against: str, gap: Gap, head: str, levels: Sequence[float]) -> str:
    """`head`, then the accuracies, their difference, its interval and n."""
    row, (by, spread) = found.differences[name, against], points(gap, levels)
    both = [found.accuracy(name, model) for model in ("average", against)]
    shares = "" if any(map(math.isnan, both)) else f"{percent(both[0])} against {percent(both[1])}, "
    return f"On {shown(name)} {head}: {shares}{by} ({spread}; {size(row)}).{caution(gap.prompts)}"


def _judged(
    found: _Evaluation, name: str, against: str, paper: str, phrases: tuple[str, str], who: tuple[str, str], sign: int
) -> Claim | None:
    """A difference: the paper's side is the first of `phrases`, where it is positive (sign 1) or negative (-1).

    `who`: what the average is compared with, at length and in short.
    """
    gap = found.gap(name, against)
    if gap is None:
        return None
    verdict = (gap if sign > 0 else -gap).verdict
    verb = phrases[verdict == DISAGREES]
    head, short = (f"the average {verb} {words}" for words in who)
    where = _where(found, name)
    if found.masked(name):  # one set, and several to compare with: these are told one after the other
        short, where = f"the average {verb.removesuffix(' than')} {where}", f"than {who[1]}"
    if verdict == UNCLEAR:
        head, short = f"it cannot be told whether {head}", f"whether {short}"
    seen = _sentence(found, name, against, gap, head, (0.0,))
    return Claim(paper, seen, verdict, found.source, (short, where, _by(found, name, against, gap)))


def _where(found: _Evaluation, name: str) -> str:
    """A set, in words for a newcomer."""
    whole = name.removesuffix(SWAPPED)
    if whole == name or not found.masked(name):
        return f"on {shown(name)}"
    return "among the swapped training labels" + ("" if whole == "train" else f" of {shown(whole)}")


def _by(found: _Evaluation, name: str, against: str, gap: Gap) -> str:
    """By how much; of wrong labels with how many each agrees, where that is known."""
    both = [found.accuracy(name, model) for model in ("average", against)]
    by = points(gap)[0] if gap.value else "no difference"
    if found.masked(name) and not any(map(math.isnan, both)):
        by = f"{percent(both[0])} against {percent(both[1])}"
    return _OF.get(against, "") + by


def _better(found: _Evaluation, name: str, against: str, paper: str, who: str) -> Claim | None:
    phrases = ("is more accurate than", "is less accurate than")
    whole = f"the mean of {who}" if against == _MEMBERS else who
    return _judged(found, name, against, paper, phrases, (whole, _SHORT.get(against, who)), 1)


def _forgets(found: _Evaluation, name: str, against: str, paper: str, who: str = "") -> Claim | None:
    """About swapped labels, where accuracy is agreement with a wrong label."""
    who = who or {_MEMBERS: _named_members(found, name), **_ENSEMBLES}[against]
    phrases = ("agrees with fewer wrong labels than", "agrees with more wrong labels than")
    return _judged(found, name, against, paper, phrases, (who, _SHORT.get(against, who)), -1)


def _equal(found: _Evaluation, name: str, against: str) -> Claim | None:
    gap = found.gap(name, against)
    if gap is None:
        return None
    verdict, who = gap.within(TOLERANCE), _ENSEMBLES[against]
    side = "more" if gap.value > 0 else "less"
    head = {
        AGREES: f"the average is as accurate as {who}, within 1 point",
        DISAGREES: f"the average is {side} accurate than {who}, by over 1 point",
        UNCLEAR: f"whether the average is as accurate as {who}, within 1 point",
    }[verdict]
    said = f"it cannot be told {head}" if verdict == UNCLEAR else head
    seen = _sentence(found, name, against, gap, said, (0.0, TOLERANCE, -TOLERANCE))
    if verdict == UNCLEAR and gap.verdict != UNCLEAR:
        seen += f" It is {side} accurate; whether by over 1 point is open."
    short = {
        AGREES: f"the average is within 1 point of {_SHORT[against]}",
        DISAGREES: f"the average is more than 1 point {'better' if gap.value > 0 else 'worse'} than {_SHORT[against]}",
        UNCLEAR: f"whether the average is within 1 point of {_SHORT[against]}",
    }[verdict]
    return Claim(_EQUAL, seen, verdict, found.source, (short, _where(found, name), _by(found, name, against, gap)))


def _unmemorised(found: _Evaluation, name: str) -> Claim | None:
    """Why nothing can be said of wrong labels: members did not memorise any. None where they did."""
    rows = [row for row in found.rows.values() if row.get("kind") == "member"]
    own = [row for row in rows if row["set"] == name]
    others = [accuracy(row, "accuracy") for row in rows if not found.masked(row["set"])]
    agreed = mean(accuracy(row, "accuracy") for row in own) if own else math.nan
    wrong = 1 - mean(others) if others else math.nan
    if agreed > wrong + MEMORISED or math.isnan(agreed):
        return None
    seen = f"On {shown(name)} members agree with {percent(agreed)} of the swapped labels ({size(own[0])})"
    if math.isnan(wrong):
        seen += "; whether that is memory cannot be told without a set that they were not trained on."
    else:
        seen += (
            f", and are wrong on {percent(wrong)} of {listed(found.held_out)}: that is not {100 * MEMORISED:.0f} "
            "points more, so they did not memorise label noise that an average could remove."
        )
    short = ("whether averaging removes memorised label noise", _where(found, name), "members memorised too little")
    return Claim(_FORGETS, seen, UNCLEAR, found.source, short)
