"""The theory of WARM, section 4.3 (arXiv 2401.12187): which features of its members an average of weights keeps.

An input is a bag of orthogonal features: x_j ~ N(y z_j, sigma^2 I) for a label y of +1 or -1. Run i learns feature j
(f_ij = 1) with probability p_j, else it does not (f_ij = 0). A model's reward is r(x) = sum_j c_j z_j . x_j. As in the
paper, what the noise of one feature leaks into another (z_j . x_k, about 0) is left out.

Two factors are multiplied: the head w_i = sum_j f_ij z_j, which uses exactly what its run has learned (Lemma 5 of the
paper's reference), and the features f_i. Both hold the *same* f_ij, and a net of L layers holds it L times:

    one member   c_j = f_ij^L = f_ij                  since f_ij is 0 or 1
    ENS of M     c_j = mean over i of f_ij            rewards averaged,  Eq. 4: p as M -> inf
    WA of M      c_j = (mean over i of f_ij)^L        weights averaged,  Eq. 5: p^2 as M -> inf; Remark 4: p^L

That a run's layers agree is all that sets WA apart. Were each layer to draw its features for itself, one member,
ENS and WA would all have the expected coefficient p^L, whatever M: not what Eq. 4 and 5 say, and not simulated here.
With L = 1 there is one factor, and WA is ENS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import UsageError, quoted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

MOST_MEMBERS, MOST_LAYERS, MOST_TRIALS = 1000, 32, 1_000_000
# How much larger than the noise all features together may be. Far above it every sum of features is surely right or
# surely wrong, and the integral of `expected_accuracy` would need ever more points for nothing.
_LARGEST_RATIO = 1000.0
# What is less probable than this is left out of the integral.
_NEVER = 1e-16
# Random numbers drawn at once: the memory that a simulation takes, however long it is.
_AT_ONCE = 4_000_000
_ERFC = numpy.frompyfunc(math.erfc, 1, 1)


@dataclass(frozen=True)
class FeatureGroup:
    """`count` features that a run learns with probability `p` each, independently, of length `norm` = |z_j|.

    `sign` says what they are worth out of distribution: 1 the same, -1 the opposite (they flip), 0 nothing.
    In distribution all features point the right way: that is why they are learned.

    Raises:
        UsageError: a number that is none of these.

    >>> FeatureGroup("style", 3, 1.5)
    Traceback (most recent call last):
    warmerge.errors.UsageError: features 'style': expected a probability p from 0 to 1, found 1.5
    """

    name: str
    count: int
    p: float
    norm: float = 1.0
    sign: int = 1

    def __post_init__(self) -> None:
        where = f"features {quoted(self.name)}"
        if not 1 <= self.count <= 100_000:
            raise UsageError(f"{where}: expected a count from 1 to 100,000, found {self.count}")
        if not 0 <= self.p <= 1:
            raise UsageError(f"{where}: expected a probability p from 0 to 1, found {self.p:g}")
        if not (math.isfinite(self.norm) and 1e-6 <= self.norm <= 1e6):
            raise UsageError(f"{where}: expected a norm from 1e-06 to 1e+06, found {self.norm:g}")
        if self.sign not in (1, -1, 0):
            raise UsageError(f"{where}: expected a sign of 1, -1 or 0 out of distribution, found {self.sign}")


@dataclass(frozen=True)
class Scenario:
    """What there is to learn, and what becomes of it out of distribution."""

    name: str
    groups: tuple[FeatureGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise UsageError(f"scenario {quoted(self.name)}: expected at least one group of features, found none")
        names = [group.name for group in self.groups]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UsageError(f"scenario {quoted(self.name)}: two groups of features have the name {quoted(twice)}")

    def in_distribution(self) -> Scenario:
        """The same features, all pointing the right way."""
        return replace(self, groups=tuple(replace(group, sign=1) for group in self.groups))

    def each(self, key: str) -> Array:
        """(F,): one number of every feature, group after group.

        >>> Scenario("s", (FeatureGroup("a", 2, 0.5), FeatureGroup("b", 1, 0.1))).each("p").tolist()
        [0.5, 0.5, 0.1]
        """
        values = [float(getattr(group, key)) for group in self.groups]
        found: Array = numpy.repeat(numpy.array(values), [group.count for group in self.groups])
        return found


# --- coefficients ---------------------------------------------------------------------------------------------------


def ens_limit(p: float) -> float:
    """The coefficient of a feature in an ensemble of infinitely many members, Eq. 4. It is the expected one at every M.

    >>> ens_limit(0.3)
    0.3
    """
    return checked_p(p)


def wa_limit(p: float, layers: int = 2) -> float:
    """The coefficient of a feature in an average of infinitely many members: Eq. 5 (two layers), Remark 4 (L layers).

    >>> round(wa_limit(0.3), 4), round(wa_limit(0.3, layers=3), 4)
    (0.09, 0.027)
    """
    return checked_p(p) ** checked_layers(layers)


def wa_coefficient(p: float, members: int, layers: int = 2) -> float:
    """The expected coefficient of a feature in an average of M members: E[(B / M)^L], where B ~ Binomial(M, p).

    With two layers it is p/M + (1 - 1/M) p^2: Eq. 5, to which M -> inf leads, and what few members leave of Eq. 4.

    >>> [round(wa_coefficient(0.3, m), 3) for m in (1, 2, 6, 10)]
    [0.3, 0.195, 0.125, 0.111]
    """
    shares = numpy.arange(checked_members(members) + 1) / members
    return float(_binomial(members, checked_p(p)) @ shares ** checked_layers(layers))


def _binomial(n: int, p: float) -> Array:
    """(n + 1,): the probability of 0, 1, ..., n successes.

    >>> _binomial(2, 0.5).round(12).tolist()
    [0.25, 0.5, 0.25]
    """
    k = numpy.arange(n + 1)
    if p in (0.0, 1.0):
        return numpy.asarray(k == n * p, dtype=numpy.float64)
    steps = numpy.log(n - k[:-1]) - numpy.log(k[1:])  # from one binomial coefficient to the next
    logs = numpy.concatenate([[0.0], numpy.cumsum(steps)]) + k * math.log(p) + (n - k) * math.log1p(-p)
    raw = numpy.exp(logs)
    # Rounding leaves the sum about 1e-13 from 1; the power of 100,000 equal features would make much of that.
    found: Array = raw / raw.sum()
    return found


# --- accuracies -----------------------------------------------------------------------------------------------------


def accuracy(coefficients: Array, norms: Array, signs: Array, noise: float) -> Array:
    """(...,): how often y r(x) > 0 for r(x) = sum_j c_j z_j . x_j, where x_j ~ N(sign_j y z_j, noise^2 I).

    It is Phi(signal / spread), signal = sum_j c_j sign_j |z_j|^2, spread = noise sqrt(sum_j c_j^2 |z_j|^2). On pairs,
    an input of either label, it is the same with noise / sqrt(2). A reward that has learned nothing (all c_j = 0)
    guesses: 1/2. (Counted as right, as ties of real models are, it would be perfect.)

    Args:
        coefficients: (..., F). norms, signs: (F,). noise: standard deviation of each coordinate, above 0.

    Raises:
        UsageError: a noise that is not above 0.

    >>> one = numpy.ones(1)
    >>> accuracy(one, one, one, 1.0).round(4).item(), accuracy(one, one, -one, 1.0).round(4).item()
    (0.8413, 0.1587)
    """
    signal = coefficients @ (signs * norms**2)
    spread = checked_noise(noise) * numpy.sqrt(coefficients**2 @ norms**2)
    ratio = numpy.divide(signal, spread, out=numpy.zeros_like(signal), where=spread > 0)
    found: Array = 0.5 * numpy.asarray(_ERFC(-ratio / math.sqrt(2)), dtype=numpy.float64)
    return found


def limit_accuracy(scenario: Scenario, noise: float, layers: int) -> float:
    """Accuracy out of distribution as M -> inf: with the coefficients p^layers. ENS is `layers` = 1."""
    coefficients = scenario.each("p") ** checked_layers(layers)
    return float(accuracy(coefficients, scenario.each("norm"), scenario.each("sign"), noise))


def expected_accuracy(scenario: Scenario, noise: float, members: int, layers: int) -> float:
    """Accuracy out of distribution, expected over what M runs learn. ENS is `layers` = 1.

    y r(x) is a sum of independent parts, one for each feature: with probability Binomial(M, p)(k) it is
    N(c sign |z|^2, (noise c |z|)^2), c = (k / M)^layers. Its characteristic function phi is their product, and
    P(y r > 0) + P(y r = 0) / 2 = 1/2 + 1/pi int_0^inf Im phi(t) / t dt (Gil-Pelaez 1951). On a logarithmic scale of t
    the integrand is smooth, and the trapezoidal rule converges exponentially.

    It is right to about 1e-9, but only to about 4e-8 where the norm of all features together, sqrt(sum |z|^2), is some
    3 to 30 times the noise.

    Raises:
        UsageError: numbers out of range, or a noise too small for the integral.

    >>> sure = Scenario("s", (FeatureGroup("a", 1, 1.0),))
    >>> round(expected_accuracy(sure, 1.0, members=3, layers=2), 4)
    0.8413
    """
    check_noise_of(scenario, noise)
    shares = (numpy.arange(checked_members(members) + 1) / members) ** checked_layers(layers)
    norms = [group.norm for group in scenario.groups]
    largest = float(scenario.each("norm") @ scenario.each("norm"))
    # A sum of features with the mean a and the spread b has |a| / b <= ratio, and is gone where t b is large: its phase
    # a t turns by at most a radian or so from one t to the next.
    ratio = math.sqrt(largest) / noise
    low, high = math.log(1e-9 / largest), math.log(7.0 / (noise * min(norms) * float(shares[1])))
    step = min(0.1, 1.0 / ratio)
    t = numpy.exp(numpy.arange(low, high + step, step))
    phi = numpy.ones(t.shape, dtype=numpy.complex128)
    for group in scenario.groups:
        one = numpy.zeros(t.shape, dtype=numpy.complex128)
        for weight, c in zip(_binomial(members, group.p), shares, strict=True):
            if weight < _NEVER:
                continue
            mean, spread = c * group.sign * group.norm**2, noise * c * group.norm
            one += weight * numpy.exp(1j * mean * t - 0.5 * (spread * t) ** 2)
        phi *= one**group.count
    return min(1.0, max(0.0, 0.5 + step * float(phi.imag.sum()) / math.pi))


# --- simulation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over trials and its standard error."""

    value: float
    se: float


def mean_of(values: Array) -> Mean:
    """The mean of one number for each trial, (trials,).

    >>> mean_of(numpy.array([1.0, 3.0]))
    Mean(value=2.0, se=1.0)
    """
    return Mean(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def simulate_shares(p: Array, members: Sequence[int], trials: int, generator: numpy.random.Generator) -> list[Array]:
    """For each M of `members` a (trials, F) array: the share of the first M runs of a trial that learned a feature.

    Every f_ij is drawn for itself. The trials of all M are the same ones, so that differences between them are paired.

    Args:
        p: (F,). members: ascending.
    """
    found = [numpy.empty((trials, len(p))) for _ in members]
    block = max(1, _AT_ONCE // (members[-1] * len(p)))
    for start in range(0, trials, block):
        count = min(block, trials - start)
        learned = generator.random((count, members[-1], len(p))) < p
        for shares, m in zip(found, members, strict=True):
            shares[start : start + count] = learned[:, :m].mean(axis=1)
    return found


def simulate_accuracies(
    scenario: Scenario, noise: float, members: Sequence[int], layers: int, trials: int, seed: int
) -> dict[int, tuple[Mean, Mean, Mean]]:
    """For each M: accuracy out of distribution of ENS and of WA, and WA minus ENS, paired. M = 1 is a single member.

    In each trial M runs learn what they learn; what their ENS and their WA are then worth is `accuracy`, without noise.

    Args:
        members: ascending. seed: the same scenario and seed draw the same runs, in and out of distribution.
    """
    norms, signs = scenario.each("norm"), scenario.each("sign")
    drawn = simulate_shares(scenario.each("p"), members, trials, numpy.random.default_rng(seed))
    found = {}
    for m, shares in zip(members, drawn, strict=True):
        ens, wa = (accuracy(c, norms, signs, noise) for c in (shares, shares**layers))
        found[m] = (mean_of(ens), mean_of(wa), mean_of(wa - ens))
    return found


# --- what can be asked ----------------------------------------------------------------------------------------------


def checked_p(p: float) -> float:
    """p, if it is a probability; else UsageError."""
    if not 0 <= p <= 1:
        raise UsageError(f"p: expected a probability from 0 to 1, found {p:g}")
    return p


def checked_members(members: int) -> int:
    """A number of members that the laws can be computed for; else UsageError."""
    if not 1 <= members <= MOST_MEMBERS:
        raise UsageError(f"--members: expected whole numbers from 1 to {MOST_MEMBERS:,}, found {members}")
    return members


def checked_layers(layers: int) -> int:
    """A number of layers that the laws can be computed for; else UsageError."""
    if not 1 <= layers <= MOST_LAYERS:
        raise UsageError(f"--layers: expected a whole number from 1 to {MOST_LAYERS}, found {layers}")
    return layers


def checked_noise(noise: float) -> float:
    """A standard deviation above 0; else UsageError."""
    if not (math.isfinite(noise) and noise > 0):
        raise UsageError(f"--noise: expected a standard deviation above 0, found {noise:g}")
    return noise


def check_noise_of(scenario: Scenario, noise: float) -> None:
    """Refuses a noise next to which a scenario's features are too large to integrate."""
    total = float(numpy.linalg.norm(scenario.each("norm")))
    if total > checked_noise(noise) * _LARGEST_RATIO:
        least = f"expected at least {total / _LARGEST_RATIO:.3g} for features whose norms are {total:.3g} together"
        raise UsageError(f"--noise: {least}, found {noise:g}")
