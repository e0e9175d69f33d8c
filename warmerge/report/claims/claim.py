"""What all claims of the paper share: a claim, a difference with its interval, and how both are put into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from warmerge.errors import UsageError, counted, plain
from warmerge.report.rows import Row, interval, number, shortened

AGREES, DISAGREES, UNCLEAR = "agrees", "disagrees", "cannot tell"
# A bootstrap over fewer prompts sees too little: over fewer than the first nothing is claimed, the second is a warning.
TOO_FEW, FEW = 10, 30
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond them 2.05 is a little too wide, not too narrow.
_T = (12.71, 4.303, 3.183, 2.777, 2.571, 2.447, 2.365, 2.307, 2.263, 2.229, 2.201, 2.179, 2.161, 2.145, 2.132, 2.120,
      2.110, 2.101, 2.094, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052)  # fmt: skip
_NAMES = 6
# How statements begin that the paper does not make: what is seen of them neither agrees nor disagrees with it.
_BEYOND = ("not reported", "not from the WARM paper")
# How far numbers of one row may be apart that should be equal.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Claim:
    """What the paper says, beside what a result shows.

    `paper`: its words and where they stand; `seen`: what was seen, with n and the 95 % interval; `verdict`: "agrees",
    "disagrees" or "cannot tell"; `source`: the folder of the result. `short`: the same in a few words for a paragraph:
    what, where, by how much. `used`: seen where rewards were used, by best-of-N or RL; that is said first.
    """

    paper: str
    seen: str
    verdict: str
    source: str
    short: tuple[str, str, str] = field(default=("", "", ""), repr=False)
    used: bool = field(default=False, repr=False)

    @property
    def beyond(self) -> bool:
        """Whether the statement is not the paper's."""
        return self.paper.startswith(_BEYOND)


@dataclass(frozen=True)
class Gap:
    """A difference and its 95 % interval (NaN where none is known), measured on `prompts` prompts."""

    value: float
    low: float
    high: float
    prompts: float = math.inf

    @property
    def verdict(self) -> str:
        """Agrees with "more than 0" where the whole interval is above 0, disagrees where it is below."""
        if self.prompts < TOO_FEW:
            return UNCLEAR
        return AGREES if self.low > 0 else DISAGREES if self.high < 0 else UNCLEAR

    def within(self, tolerance: float) -> str:
        """Agrees with "about 0" where the whole interval is within the tolerance, disagrees where it is outside."""
        if self.prompts < TOO_FEW:
            return UNCLEAR
        if -tolerance <= self.low and self.high <= tolerance:
            return AGREES
        return DISAGREES if self.low > tolerance or self.high < -tolerance else UNCLEAR

    def __neg__(self) -> Gap:
        return Gap(-self.value, -self.high, -self.low, self.prompts)


def gap_of(row: Row, key: str = "difference", prefix: str = "", prompts: float | None = None) -> Gap | None:
    """The difference in a row and its interval; None where it was not measured. No prompts in the row: unknown.

    >>> gap_of({"difference": 0.02, "low": 0.01, "high": 0.03, "prompts": 90}).verdict
    'agrees'
    """
    value, (low, high) = number(row, key), interval(row, prefix)
    if math.isnan(value):
        return None
    found = number(row, "prompts") if prompts is None else prompts
    return Gap(value, low, high, math.inf if math.isnan(found) else found)


def bootstrapped(gap: Gap | None) -> Gap | None:
    """The same difference of means.

    Raises:
        UsageError: it is outside of its own interval, where a bootstrap cannot put it.
    """
    if gap is not None and (gap.value < gap.low - ROUNDING or gap.value > gap.high + ROUNDING):
        raise UsageError(f"expected low <= difference <= high, found {gap.low:g}, {gap.value:g}, {gap.high:g}")
    return gap


def over_seeds(differences: Sequence[float]) -> Gap:
    """The mean of one difference for each seed, with Student's 95 % interval; no interval of a single one.

    >>> found = over_seeds([0.1, 0.2, 0.3])
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
    (0.2, -0.048, 0.448)
    """
    count, value = len(differences), mean(differences)
    if count < 2:
        return Gap(value, math.nan, math.nan)
    half = (_T[count - 2] if count - 2 < len(_T) else 2.05) * stdev(differences) / math.sqrt(count)
    return Gap(value, value - half, value + half)


def table(content: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of a table; none where the result has no such table.

    Raises:
        UsageError: it is no table.
    """
    rows = content.get(name) or []
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"expected a table of rows in {name!r}")
    return list(rows)


def names_in(content: Mapping[str, Any], name: str) -> list[str]:
    """A list of names or sentences; none where there is no such list.

    Raises:
        UsageError: it is no list.
    """
    found = content.get(name) or []
    if not isinstance(found, list | tuple):
        raise UsageError(f"expected a list in {name!r}")
    return [str(entry) for entry in found]


# --- words ------------------------------------------------------------------------------------------------------------


def shown(name: str) -> str:
    """A name that anybody may have written, on one line and not longer than can be read."""
    return plain(shortened(name, 60))


def listed(names: Sequence[str]) -> str:
    """Names one after the other; of many the first few.

    >>> listed(["01"]), listed(["01", "02", "03"]), listed([str(i) for i in range(9)])
    ('01', '01, 02 and 03', '0, 1, 2, 3, 4, 5 and 3 more')
    """
    words = [shown(name) for name in names]
    if len(words) > _NAMES:
        words = [*words[:_NAMES], f"{len(words) - _NAMES} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def percent(share: float) -> str:
    """A fraction as people say it."""
    return f"{100 * share:.1f} %"


def points(gap: Gap, levels: Sequence[float] = (0.0,)) -> tuple[str, str]:
    """A difference of fractions in points and its interval, as few decimals as keep each number on its side of levels.

    >>> points(Gap(0.0494, 0.0371, 0.0614))
    ('+4.9 points', '95 % interval +3.7 to +6.1')
    """
    scaled = Gap(100 * gap.value, 100 * gap.low, 100 * gap.high)
    value, spread = amount(scaled, [100 * level for level in levels], 1)
    return f"{value} points", spread


def amount(gap: Gap, levels: Sequence[float] = (0.0,), digits: int = 2) -> tuple[str, str]:
    """A difference and its interval as it is; as few decimals, from `digits` on, as keep each on its side of levels.

    >>> amount(Gap(0.21, 0.004, 0.4)), amount(Gap(1.5, math.nan, math.nan))
    (('+0.210', '95 % interval +0.004 to +0.400'), ('+1.50', 'no interval is known'))
    """
    numbers = [x for x in (gap.value, gap.low, gap.high) if math.isfinite(x)]

    def keeps(places: int) -> bool:
        rounded = [round(x, places) for x in numbers]
        return all(
            (x > level, x < level) == (y > level, y < level)
            for x, y in zip(numbers, rounded, strict=True)
            for level in levels
        )

    places = next((places for places in range(digits, digits + 3) if keeps(places)), digits + 3)
    value, *ends = (f"{round(x, places) + 0.0:+.{places}f}" for x in numbers)
    return value, f"95 % interval {ends[0]} to {ends[1]}" if len(ends) == 2 else "no interval is known"


def size(row: Row) -> str:
    """On how much a row was measured.

    >>> size({"n": 2048, "prompts": 512}), size({"n": 3})
    ('n = 2,048 comparisons of 512 prompts', 'n = 3 comparisons')
    """
    n, prompts = number(row, "n"), number(row, "prompts")
    words = "n is not known" if math.isnan(n) else f"n = {counted(int(n), 'comparison')}"
    return words if math.isnan(prompts) else f"{words} of {counted(int(prompts), 'prompt')}"


def caution(prompts: float) -> str:
    """What has to be added where there are few prompts."""
    if prompts < TOO_FEW:
        return f" Only {counted(int(prompts), 'prompt')}: too few for any interval to be trusted."
    return f" Only {counted(int(prompts), 'prompt')}: the interval is a rough guess." if prompts < FEW else ""
