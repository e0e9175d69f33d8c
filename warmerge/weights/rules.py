"""What coefficients each tensor gets. Every rule is out = (sum_i c_i theta_i + c_0 base) / d, tensor by tensor.

To add a rule: write its equation as a function of the members' number, the options and, if it needs one, the Gram
matrix of the task vectors delta_i = theta_i - base; then give it a row in RULES. Everything else follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warmerge.errors import UsageError

Gram = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Options:
    """What the user chose for a rule; None where nothing was said."""

    weights: tuple[float, ...] | None = None
    normalize: bool = False
    lam: float | None = None
    eta: float | None = None

    def given(self) -> dict[str, object]:
        """The options that were chosen. 0.0 is a choice, None and False are not."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


FLAGS = {"weights": "--weights", "normalize": "--normalize", "lam": "--lambda", "eta": "--eta"}


@dataclass(frozen=True)
class Coefficients:
    """out = (sum_i members[i] * theta_i + base * theta_base) / divisor."""

    members: tuple[float, ...]
    base: float = 0.0
    divisor: float = 1.0


@dataclass(frozen=True)
class Rule:
    """One row of the table: how a rule is called, what it computes, what it needs, and who described it."""

    name: str
    formula: str
    source: str
    coefficients: Callable[[int, Options, Gram | None], Coefficients]
    options: frozenset[str] = frozenset()
    needs_base: bool = False
    needs_gram: bool = False
    members: int | None = None


def uniform(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """theta = 1/M sum_i theta_i. WARM, section 3.1 (arXiv 2401.12187).

    >>> uniform(4, Options()) == Coefficients((1, 1, 1, 1), divisor=4)
    True
    """
    return Coefficients((1.0,) * count, divisor=float(count))


def weighted(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """theta = sum_i w_i theta_i, with sum_i w_i = 1. Model soups (arXiv 2203.05482)."""
    weights = options.weights
    if weights is None or len(weights) != count:
        found = "none" if weights is None else str(len(weights))
        raise UsageError(f"--weights: expected {count} numbers, one for each checkpoint, found {found}")
    if not all(map(math.isfinite, weights)) or not 0 < sum(weights) < math.inf:
        raise UsageError(f"--weights must be finite and have a positive sum; found {list(weights)}")
    total = math.fsum(weights)
    if options.normalize:
        return Coefficients(weights, divisor=total)
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UsageError(f"--weights sum to {total:.6g}, expected 1; change them, or add --normalize")
    return Coefficients(weights)


def interpolate(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """theta = (1 - lambda) theta_1 + lambda theta_2. WARM, Observation 1 (arXiv 2401.12187).

    >>> interpolate(2, Options(lam=0.25)).members
    (0.75, 0.25)
    """
    lam = _fraction("--lambda", options.lam)
    return Coefficients((1 - lam, lam))


def slerp(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """delta = sin((1-l) Omega)/sin(Omega) delta_1 + sin(l Omega)/sin(Omega) delta_2.

    WARP, section 3.2 (arXiv 2406.16768), tensor by tensor. Omega is the angle between the two task vectors. More
    than two members are merged one after the other, the m-th with l = 1/m, so their order matters a little. Task
    vectors that are zero, parallel or exactly opposite (always so in a tensor of one element) have no arc of their
    own: the straight line is taken.
    """
    assert gram is not None
    if count > 2 and options.lam is not None:
        raise UsageError("--lambda with --rule slerp takes two checkpoints; more are merged with 1/m each")
    merged = [1.0] + [0.0] * (count - 1)
    for m in range(2, count + 1):
        lam = 1 / m if options.lam is None else _fraction("--lambda", options.lam)
        other = [float(i == m - 1) for i in range(count)]
        a, b = _arc(_cosine(merged, other, gram), lam)
        merged = [a * x + b * y for x, y in zip(merged, other, strict=True)]
    return Coefficients(tuple(merged), base=1 - math.fsum(merged))


def liti(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """theta = (1 - eta) base + eta mean(theta_i). WARP, section 3.3, linear interpolation towards the init."""
    eta = _fraction("--eta", options.eta)
    return Coefficients((eta,) * count, base=(1 - eta) * count, divisor=float(count))


def stock(count: int, options: Options, gram: Gram | None = None) -> Coefficients:
    """theta = t mean(theta_i) + (1 - t) base, t = M cos / (1 + (M-1) cos). Model Stock, Eq. 4 (arXiv 2403.19522).

    cos is the mean over the pairs of members of the cosine of their task vectors, at least 0. Where a member did
    not move from the base, its angle is not defined and its pairs are left out; with no pair left, t = 1.
    """
    assert gram is not None
    units = [[float(i == j) for j in range(count)] for i in range(count)]
    moved = [i for i in range(count) if gram[i][i] > 0]
    pairs = [_cosine(units[i], units[j], gram) for i in moved for j in moved if i < j]
    cosines = [cosine for cosine in pairs if cosine is not None]
    if not cosines:
        return uniform(count, options)
    cos = max(0.0, math.fsum(cosines) / len(cosines))
    t = count * cos / (1 + (count - 1) * cos)
    return Coefficients((t,) * count, base=(1 - t) * count, divisor=float(count))


RULES = {
    rule.name: rule
    for rule in (
        Rule("uniform", "1/M sum_i theta_i", "WARM, arXiv 2401.12187", uniform),
        Rule(
            "weighted", "sum_i w_i theta_i", "model soups, arXiv 2203.05482", weighted,
            options=frozenset({"weights", "normalize"}),
        ),
        Rule(
            "lambda", "(1-l) theta_1 + l theta_2", "WARM, Observation 1", interpolate,
            options=frozenset({"lam"}), members=2,
        ),
        Rule(
            "slerp", "base + sin((1-l)W)/sin(W) d_1 + sin(lW)/sin(W) d_2", "WARP, arXiv 2406.16768", slerp,
            options=frozenset({"lam"}), needs_base=True, needs_gram=True,
        ),
        Rule(
            "liti", "(1-eta) base + eta/M sum_i theta_i", "WARP, arXiv 2406.16768", liti,
            options=frozenset({"eta"}), needs_base=True,
        ),
        Rule(
            "stock", "(1-t) base + t/M sum_i theta_i, t = M cos/(1+(M-1)cos)", "Model Stock, arXiv 2403.19522", stock,
            needs_base=True, needs_gram=True,
        ),
    )
}  # fmt: skip


def check_options(rule: Rule, options: Options, count: int, has_base: bool) -> None:
    """Refuses options that the rule would ignore, and a wrong number of checkpoints.

    Raises:
        UsageError: naming every such option and what the rule expects.
    """
    problems = [
        f"{flag} is not used by --rule {rule.name}"
        for field, flag in FLAGS.items()
        if field in options.given() and field not in rule.options
    ]
    if rule.needs_base and not has_base:
        problems.append(f"--rule {rule.name} needs --base, the checkpoint that the members started from")
    if rule.members is not None and count != rule.members:
        problems.append(f"--rule {rule.name} takes {rule.members} checkpoints, found {count}")
    if problems:
        raise UsageError("; ".join(problems))
    # Raises for numbers that are missing or out of range; any Gram matrix does for that.
    rule.coefficients(count, options, [[float(i == j) for j in range(count)] for i in range(count)])


def _fraction(flag: str, value: float | None) -> float:
    if value is None or not 0 <= value <= 1:
        raise UsageError(f"{flag}: expected a number from 0 to 1, found {value}")
    return value


def _cosine(a: Sequence[float], b: Sequence[float], gram: Gram) -> float | None:
    """Cosine of the angle between sum_i a_i delta_i and sum_i b_i delta_i; None where one of them is zero."""

    def inner(x: Sequence[float], y: Sequence[float]) -> float:
        return math.fsum(x[i] * y[j] * gram[i][j] for i in range(len(x)) for j in range(len(y)))

    norms = [math.sqrt(max(0.0, inner(v, v))) for v in (a, b)]
    if 0 in norms:
        return None
    return max(-1.0, min(1.0, inner(a, b) / norms[0] / norms[1]))


def _arc(cosine: float | None, lam: float) -> tuple[float, float]:
    if cosine is None or abs(cosine) > 1 - 1e-12:
        return 1 - lam, lam
    omega = math.acos(cosine)
    return math.sin((1 - lam) * omega) / math.sin(omega), math.sin(lam * omega) / math.sin(omega)
