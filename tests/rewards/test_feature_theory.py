"""The theory of section 4.3: the laws against enumeration and against nets whose weights really are averaged."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest

from warmerge.errors import UsageError
from warmerge.rewards import feature_theory as theory
from warmerge.rewards.feature_theory import (
    FeatureGroup,
    Scenario,
    accuracy,
    ens_limit,
    expected_accuracy,
    limit_accuracy,
    mean_of,
    simulate_accuracies,
    simulate_shares,
    wa_coefficient,
    wa_limit,
)

MIXED = Scenario(
    "mixed",
    (FeatureGroup("core", 2, 0.7, 1.3), FeatureGroup("noise", 2, 0.2, 0.6, -1), FeatureGroup("gone", 1, 0.4, 1.0, 0)),
)
FLIP = Scenario("flip", (FeatureGroup("core", 6, 0.8), FeatureGroup("few", 20, 0.2, sign=-1)))


# --- what is simulated is what the paper writes ---------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_coefficients_are_those_of_nets_whose_weights_are_averaged(layers: int) -> None:
    """Members w_i . F_i^(L-1) x as matrices over concatenated features; ENS averages rewards, WA each weight."""
    rng = numpy.random.default_rng(0)
    members, count, width = 4, 3, 5
    z = numpy.linalg.qr(rng.normal(size=(width, width)))[0][:count] * numpy.array([[1.0], [2.0], [0.5]])
    x = rng.normal(size=(7, count * width))
    learned = rng.random((members, count)) < 0.5
    heads = numpy.stack([numpy.concatenate([f * row for f, row in zip(own, z, strict=True)]) for own in learned])
    featurizers = numpy.stack([numpy.diag(numpy.repeat(own.astype(float), width)) for own in learned])

    def reward(head: numpy.ndarray, featurizer: numpy.ndarray) -> numpy.ndarray:
        return x @ numpy.linalg.matrix_power(featurizer, layers - 1) @ head

    ens = numpy.mean([reward(head, featurizer) for head, featurizer in zip(heads, featurizers, strict=True)], axis=0)
    wa = reward(heads.mean(axis=0), featurizers.mean(axis=0))
    each = numpy.einsum("njd,jd->nj", x.reshape(7, count, width), z)  # z_j . x_j
    share = learned.mean(axis=0)
    assert 0 < share.min() < share.max() < 1
    numpy.testing.assert_allclose(ens, each @ share, atol=1e-12)
    numpy.testing.assert_allclose(wa, each @ share**layers, atol=1e-12)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("p", [0.0, 0.15, 0.5, 1.0])
def test_the_law_is_what_enumeration_finds(members: int, layers: int, p: float) -> None:
    total = 0.0
    for learned in itertools.product((0, 1), repeat=members):
        weight = math.prod(p if f else 1 - p for f in learned)
        total += weight * (sum(learned) / members) ** layers
    assert wa_coefficient(p, members, layers) == pytest.approx(total, abs=1e-14)
    if layers == 2:
        assert wa_coefficient(p, members) == pytest.approx(p / members + (1 - 1 / members) * p**2, abs=1e-14)
    if layers == 1 or members == 1:
        assert wa_coefficient(p, members, layers) == pytest.approx(ens_limit(p), abs=1e-14)


def test_layers_that_draw_for_themselves_would_not_tell_the_two_apart() -> None:
    p, members, layers = 0.3, 2, 2
    ens = wa = 0.0
    for drawn in itertools.product((0, 1), repeat=members * layers):
        f = numpy.array(drawn).reshape(members, layers)
        weight = math.prod(p if one else 1 - p for one in drawn)
        ens += weight * f.prod(axis=1).mean()
        wa += weight * f.mean(axis=0).prod()
    assert (ens, wa) == pytest.approx((p**layers, p**layers))


def test_many_members_come_to_equation_5_and_remark_4() -> None:
    for p in (0.1, 0.5, 0.9):
        assert wa_limit(p) == p**2
        assert wa_limit(p, 4) == p**4
        assert wa_coefficient(p, 1000) - p**2 == pytest.approx(p * (1 - p) / 1000, rel=1e-8)
        gaps = [wa_coefficient(p, m, 4) - p**4 for m in (1, 2, 10, 100, 1000)]
        assert gaps == sorted(gaps, reverse=True)
        assert 0 < gaps[-1] < 0.002


# --- accuracies -----------------------------------------------------------------------------------------------------


def test_accuracy_is_how_often_drawn_inputs_are_right() -> None:
    rng = numpy.random.default_rng(1)
    n, width, noise = 40_000, 3, 1.5
    z = numpy.eye(width) * numpy.array([1.0, 2.0, 0.5])
    norms, signs, c = numpy.array([1.0, 2.0, 0.5]), numpy.array([1.0, -1.0, 0.0]), numpy.array([0.9, 0.2, 0.4])
    y = rng.choice([-1.0, 1.0], n)
    x = y[:, None, None] * signs[:, None] * z + noise * rng.normal(size=(n, 3, width))
    right = (y * numpy.einsum("njd,jd,j->n", x, z, c) > 0).astype(float)
    found = mean_of(right)
    assert abs(found.value - accuracy(c, norms, signs, noise)) < 4 * found.se
    assert 0.002 < found.se < 0.003
    pairs = numpy.einsum("njd,jd,j->n", x[y > 0][:19_000] - x[y < 0][:19_000], z, c) > 0
    on_pairs = mean_of(pairs.astype(float))
    assert abs(on_pairs.value - accuracy(c, norms, signs, noise / math.sqrt(2))) < 4 * on_pairs.se


def test_a_reward_that_learned_nothing_guesses() -> None:
    one = numpy.ones(2)
    found = accuracy(numpy.array([[0.0, 0.0], [1.0, 1.0], [1e-200, 0.0]]), one, one, 0.01)
    assert found.tolist() == [0.5, 1.0, 0.5]  # the square of the last one is nothing at all
    never = Scenario("never", (FeatureGroup("a", 3, 0.0),))
    assert expected_accuracy(never, 1.0, 4, 2) == pytest.approx(0.5, abs=1e-9)
    assert limit_accuracy(never, 1.0, 2) == 0.5


def enumerated(scenario: Scenario, noise: float, members: int, layers: int) -> float:
    p, norms, signs = (scenario.each(key) for key in ("p", "norm", "sign"))
    total = 0.0
    for counts in itertools.product(range(members + 1), repeat=len(p)):
        weight = math.prod(
            math.comb(members, k) * q**k * (1 - q) ** (members - k) for k, q in zip(counts, p, strict=True)
        )
        total += weight * accuracy((numpy.array(counts) / members) ** layers, norms, signs, noise).item()
    return total


@pytest.mark.parametrize("noise", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("members", "layers"), [(1, 1), (1, 2), (2, 2), (3, 2), (3, 1), (2, 9)])
def test_expected_accuracy_is_what_enumeration_finds(noise: float, members: int, layers: int) -> None:
    for scenario in (MIXED, MIXED.in_distribution()):
        found = expected_accuracy(scenario, noise, members, layers)
        assert found == pytest.approx(enumerated(scenario, noise, members, layers), abs=1e-8)


@pytest.mark.parametrize(
    ("ratio", "within"), [(0.1, 1e-9), (1.0, 1e-9), (2.5, 1e-9), (10.590889855, 4e-8), (100.0, 1e-9), (990.0, 1e-9)]
)
def test_expected_accuracy_is_as_exact_as_it_says(ratio: float, within: float) -> None:
    sure = Scenario("sure", (FeatureGroup("a", 1, 1.0),))
    exact = 0.5 * math.erfc(-ratio / math.sqrt(2))
    assert expected_accuracy(sure, 1.0 / ratio, 3, 2) == pytest.approx(exact, abs=within, rel=0)


@pytest.mark.parametrize("count", [1000, 10_000, 100_000])
def test_rounding_does_not_grow_with_the_number_of_features(count: int) -> None:
    """Half of so many are learned: the sum of them is surely right."""
    many = Scenario("many", (FeatureGroup("a", count, 0.5),))
    assert expected_accuracy(many, 1.0, 1000, 2) == pytest.approx(1.0, abs=1e-9, rel=0)
    assert abs(theory._binomial(1000, 0.5).sum() - 1.0) < 1e-15


def test_expected_accuracy_at_its_extremes() -> None:
    assert expected_accuracy(MIXED, 0.0023, 3, 32) == pytest.approx(enumerated(MIXED, 0.0023, 3, 32), abs=1e-7)
    for layers in (1, 2):
        limit = limit_accuracy(FLIP, 1.0, layers)
        gaps = [abs(expected_accuracy(FLIP, 1.0, m, layers) - limit) for m in (2, 20, 200, 1000)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 0.001


def test_in_distribution_an_average_is_never_the_more_accurate() -> None:
    """Of any shares whatsoever: powers of them are farther from equal."""
    rng = numpy.random.default_rng(2)
    for layers in (2, 3, 7):
        shares, norms = rng.random((500, 6)) * (rng.random((500, 6)) < 0.8), rng.random(6) + 0.1
        ens, wa = (accuracy(c, norms, numpy.ones(6), 0.7) for c in (shares, shares**layers))
        assert (wa <= ens + 1e-12).all()
        assert (wa < ens).mean() > 0.9
        equal = numpy.full((1, 6), 0.4)
        assert accuracy(equal**layers, norms, numpy.ones(6), 0.7) == pytest.approx(
            accuracy(equal, norms, numpy.ones(6), 0.7)
        )


# --- simulation -----------------------------------------------------------------------------------------------------


def test_shares_are_within_their_errors_of_the_laws() -> None:
    p, members = numpy.array([0.0, 0.1, 0.3, 0.8, 1.0]), [1, 2, 6, 10]
    drawn = simulate_shares(p, members, 4000, numpy.random.default_rng(3))
    for m, shares in zip(members, drawn, strict=True):
        assert shares.shape == (4000, 5)
        assert set(numpy.round(shares * m, 9).ravel()) <= set(range(m + 1))
        assert (shares[:, 0] == 0).all()
        assert (shares[:, 4] == 1).all()
        for j in (1, 2, 3):
            for layers in (1, 2, 4):
                found = mean_of(shares[:, j] ** layers)
                assert abs(found.value - wa_coefficient(p[j], m, layers)) < 4 * found.se
                variance = wa_coefficient(p[j], m, 2 * layers) - wa_coefficient(p[j], m, layers) ** 2
                # Of high powers of small shares few trials make most of the error.
                assert found.se == pytest.approx(math.sqrt(variance / 4000), rel=0.1 if layers < 4 else 0.4)


@pytest.mark.parametrize("scenario", [MIXED, FLIP, FLIP.in_distribution()])
@pytest.mark.parametrize("layers", [2, 3])
def test_accuracies_are_within_their_errors_of_the_closed_form(scenario: Scenario, layers: int) -> None:
    found = simulate_accuracies(scenario, 1.0, [1, 2, 6], layers, 4000, seed=4)
    for m, (ens, wa, gain) in found.items():
        exact = [expected_accuracy(scenario, 1.0, m, depth) for depth in (1, layers)]
        assert abs(ens.value - exact[0]) < 4 * ens.se
        assert abs(wa.value - exact[1]) < 4 * wa.se
        assert abs(gain.value - (exact[1] - exact[0])) <= 4 * gain.se
        assert gain.value == pytest.approx(wa.value - ens.value, abs=1e-12)
    assert found[1][0] == found[1][1]
    assert found[1][2] == theory.Mean(0.0, 0.0)
    if scenario == FLIP:
        assert found[6][2].value > 0.2


def test_same_seed_same_numbers_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate_accuracies(MIXED, 1.0, [1, 3], 2, 500, seed=5)
    assert simulate_accuracies(MIXED, 1.0, [1, 3], 2, 500, seed=5) == whole
    assert simulate_accuracies(MIXED, 1.0, [1, 3], 2, 500, seed=6) != whole
    monkeypatch.setattr(theory, "_AT_ONCE", 100)
    assert simulate_accuracies(MIXED, 1.0, [1, 3], 2, 500, seed=5) == whole


# --- what cannot be asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p": 1.01}, "expected a probability p from 0 to 1, found 1.01"),
        ({"p": -0.1}, "expected a probability p from 0 to 1, found -0.1"),
        ({"p": math.nan}, "expected a probability p from 0 to 1, found nan"),
        ({"count": 0}, "expected a count from 1 to 100,000, found 0"),
        ({"count": 100_001}, "expected a count from 1 to 100,000, found 100001"),
        ({"norm": 0.0}, "expected a norm from 1e-06 to 1e+06, found 0"),
        ({"norm": math.inf}, "expected a norm from 1e-06 to 1e+06, found inf"),
        ({"sign": 2}, "expected a sign of 1, -1 or 0 out of distribution, found 2"),
    ],
)
def test_features_that_cannot_be(changed: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        FeatureGroup(**{"name": "a\nb", "count": 3, "p": 0.5, **changed})  # type: ignore[arg-type]
    assert str(caught.value) == rf"features 'a\nb': {message}"


def test_scenarios_that_cannot_be() -> None:
    with pytest.raises(UsageError) as caught:
        Scenario("s", ())
    assert str(caught.value) == "scenario 's': expected at least one group of features, found none"
    with pytest.raises(UsageError) as caught:
        Scenario("s", (FeatureGroup("a", 1, 0.5), FeatureGroup("a", 2, 0.1)))
    assert str(caught.value) == "scenario 's': two groups of features have the name 'a'"


def test_numbers_out_of_range_are_said() -> None:
    cases = [
        (lambda: wa_limit(1.5), "p: expected a probability from 0 to 1, found 1.5"),
        (lambda: ens_limit(-1.0), "p: expected a probability from 0 to 1, found -1"),
        (lambda: wa_coefficient(0.5, 0), "--members: expected whole numbers from 1 to 1,000, found 0"),
        (lambda: wa_coefficient(0.5, 1001), "--members: expected whole numbers from 1 to 1,000, found 1001"),
        (lambda: wa_coefficient(0.5, 2, 0), "--layers: expected a whole number from 1 to 32, found 0"),
        (lambda: wa_limit(0.5, 33), "--layers: expected a whole number from 1 to 32, found 33"),
        (lambda: limit_accuracy(MIXED, 0.0, 2), "--noise: expected a standard deviation above 0, found 0"),
        (lambda: limit_accuracy(MIXED, -1.0, 2), "--noise: expected a standard deviation above 0, found -1"),
        (lambda: limit_accuracy(MIXED, math.nan, 2), "--noise: expected a standard deviation above 0, found nan"),
        (
            lambda: expected_accuracy(FLIP, 0.005, 2, 2),
            "--noise: expected at least 0.0051 for features whose norms are 5.1 together, found 0.005",
        ),
    ]
    for ask, message in cases:
        with pytest.raises(UsageError) as caught:
            ask()
        assert str(caught.value) == message
