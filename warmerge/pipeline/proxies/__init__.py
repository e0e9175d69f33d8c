"""Proxies: what a best-of-N choice or a policy is optimised against. Read from NAME=CKPT as users type them."""

from __future__ import annotations

import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warmerge.errors import UsageError, plain, quoted
from warmerge.rewards.ensembles import AGGREGATES

RM, ENSEMBLE, WARM, BASELINE = "rm", "ensemble", "warm", "baseline"
LENGTH, RANDOM, ORACLE = "length", "random", "oracle"
_TAKEN = (LENGTH, RANDOM, ORACLE, "gold", "control")
# Members are brought to one scale first where an aggregate compares them with each other; elsewhere scales are theirs.
_STANDARDIZED = ("min", "uwo")
_OPTIONS = ("agg", "k", "scale")


@dataclass(frozen=True)
class Proxy:
    """A reward to optimise: one model's, an ensemble's of several, or that of the average of their weights.

    Args:
        name: what tables and figures call it.
        kind: "rm", "ensemble" or "warm".
        checkpoints: one for an rm, two or more else.
        aggregate: for an ensemble, a row of `ensembles.AGGREGATES`.
        k: for uwo, how much disagreement costs.
        standardize: for an ensemble, members are standardised over all texts first.

    Raises:
        UsageError: too few checkpoints, one that is given twice, an unknown aggregate, a name that means something.

    >>> Proxy("both", "ensemble", ("a",))
    Traceback (most recent call last):
    warmerge.errors.UsageError: --ensemble both: expected two checkpoints or more, found 'a' alone
    """

    name: str
    kind: str
    checkpoints: tuple[str, ...]
    aggregate: str = "mean"
    k: float = 0.5
    standardize: bool = False

    def __post_init__(self) -> None:
        flag, given = f"--{self.kind} {plain(self.name)}", self.checkpoints
        if self.name in _TAKEN:
            raise UsageError(f"{flag}: the name {quoted(self.name)} is taken ({', '.join(_TAKEN)}); choose another")
        if self.kind not in (RM, ENSEMBLE, WARM):
            raise UsageError(f"{plain(self.name)}: expected a proxy of kind rm, ensemble or warm, found {self.kind!r}")
        if self.kind == RM and len(given) != 1:
            raise UsageError(
                f"{flag}: expected one checkpoint, found {len(given)}; several are an --ensemble or --warm"
            )
        if self.kind != RM and len(given) < 2:
            found = f"{quoted(given[0])} alone" if given else "none"
            raise UsageError(f"{flag}: expected two checkpoints or more, found {found}")
        places = [os.path.realpath(checkpoint) if os.path.exists(checkpoint) else checkpoint for checkpoint in given]
        for checkpoint, where in zip(given, places, strict=True):
            if places.count(where) > 1:
                raise UsageError(f"{flag}: {plain(checkpoint)} is given twice; give each checkpoint once")
        if self.aggregate not in AGGREGATES:
            raise UsageError(f"{flag}: expected agg={', '.join(AGGREGATES)}, found {self.aggregate!r}")
        if not (self.k >= 0 and math.isfinite(self.k)):
            raise UsageError(f"{flag}: expected k of 0 or more, found {self.k:g}")


def parse_proxies(rms: Sequence[str], ensembles: Sequence[str] = (), warms: Sequence[str] = ()) -> tuple[Proxy, ...]:
    """Proxies as users type them, rms first, then ensembles, then averages, each in the order given.

    Args:
        rms: `NAME=CKPT`, or `CKPT`, which is named by the last part of its path.
        ensembles: `NAME=CKPT,CKPT` with perhaps `,agg=mean|min|uwo|median`, `,k=0.5`, `,scale=raw|std`. Members are
            standardised before min and uwo, which compare them, unless scale says otherwise.
        warms: `NAME=CKPT,CKPT`.
        A CKPT may be the NAME of one of the rms. Without NAME: "ensemble (AGG)", "warm".

    Raises:
        UsageError: none is given, two of one name, an option that is not known, and what `Proxy` refuses.

    >>> parse_proxies(["a=runs/1", "runs/2"], ["a,2,agg=uwo,k=1"])[2].checkpoints
    ('runs/1', 'runs/2')
    """
    singles = [_rm(spec) for spec in rms]
    named = {proxy.name: proxy.checkpoints[0] for proxy in singles}
    found = [*singles, *(_several(spec, ENSEMBLE, named) for spec in ensembles)]
    found += [_several(spec, WARM, named) for spec in warms]
    if not found:
        raise UsageError("no proxy is given: name reward models with --rm, --ensemble or --warm")
    names = [proxy.name for proxy in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two proxies are named {quoted(name)}; name one of them, as in --rm other=CKPT")
    return tuple(found)


def _rm(spec: str) -> Proxy:
    name, checkpoint = _named(spec)
    return Proxy(name or Path(checkpoint).name or checkpoint, RM, (checkpoint,))


def _several(spec: str, kind: str, named: dict[str, str]) -> Proxy:
    name, rest = _named(spec)
    parts = [part for part in rest.split(",") if part]
    # A Hub id has no =, and a path with one may have a / before it.
    options = [part for part in parts if _is_named(part) and part not in named]
    checkpoints = tuple(_resolved(part, named) for part in parts if part not in options)
    flag = f"--{kind} {plain(spec)}"
    if name in _OPTIONS:
        raise UsageError(f"{flag}: {name}= goes after the checkpoints, and is no name; expected NAME=CKPT,CKPT")
    if not checkpoints:
        raise UsageError(f"{flag}: expected NAME=CKPT,CKPT")
    how = _options(options, flag)
    if kind == WARM:
        if how:
            raise UsageError(f"{flag}: {plain(options[0])} goes with --ensemble; an average has no such option")
        return Proxy(name or WARM, WARM, checkpoints)
    aggregate = how.get("agg", "mean")
    scale = how.get("scale", "std" if aggregate in _STANDARDIZED else "raw")
    if scale not in ("raw", "std"):
        raise UsageError(f"{flag}: expected scale=raw or scale=std, found {scale!r}")
    if "k" in how and aggregate != "uwo":
        raise UsageError(f"{flag}: k goes with agg=uwo")
    try:
        k = float(how.get("k", "0.5"))
    except ValueError:
        raise UsageError(f"{flag}: expected k=NUMBER, found {how['k']!r}") from None
    return Proxy(name or f"{ENSEMBLE} ({aggregate})", ENSEMBLE, checkpoints, aggregate, k, scale == "std")


def _options(options: Sequence[str], flag: str) -> dict[str, str]:
    """The value of each option, KEY=VALUE."""
    found: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise UsageError(f"{flag}: {quoted(option)} is neither a path nor an option (agg=, k=, scale=)")
        if key in found:
            raise UsageError(f"{flag}: {key} is given twice; give it once")
        found[key] = value
    return found


def _named(spec: str) -> tuple[str, str]:
    """Name and rest of NAME=REST; "" for a spec without a name. An = inside of a path belongs to the path."""
    name, _, rest = spec.partition("=")
    if spec and (not _is_named(spec) or "," in name or os.path.exists(spec.partition(",")[0])):
        return "", spec
    if not (name and rest):
        raise UsageError(f"{quoted(spec)}: expected NAME=CKPT, or CKPT")
    return name, rest


def _is_named(text: str) -> bool:
    """Whether text is KEY=VALUE, and not a path with an = in it."""
    name, equals, _ = text.partition("=")
    return bool(equals) and "/" not in name and not os.path.exists(text)


def _resolved(part: str, named: dict[str, str]) -> str:
    """The checkpoint that is meant: a folder, a Hub id, or the rm of that name."""
    if part not in named:
        return part
    if os.path.exists(part) and os.path.realpath(part) != os.path.realpath(named[part]):
        raise UsageError(f"{quoted(part)} is both the name of --rm {plain(named[part])} and a path; rename the rm")
    return named[part]
