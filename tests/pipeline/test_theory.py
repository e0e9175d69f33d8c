"""`simulate_theory`: rows that hold the laws, words that follow the rows, files that can be drawn again."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import warmerge
from warmerge.errors import UsageError
from warmerge.pipeline import theory
from warmerge.pipeline.theory import IN, OUT, SCENARIOS, Theory, simulate_theory
from warmerge.report import results
from warmerge.report.results import redraw
from warmerge.rewards.feature_theory import FeatureGroup, Scenario

ONE = (Scenario("one", (FeatureGroup("task", 5, 0.6), FeatureGroup("few", 4, 0.2, sign=-1))),)


def at(found: Theory, scenario: str, data: str, m: int | None) -> dict[str, Any]:
    (row,) = (row for row in found.rows if (row["scenario"], row["data"], row["m"]) == (scenario, data, m))
    return row


@pytest.fixture(scope="module")
def found() -> Theory:
    return simulate_theory()


def test_coefficients_hold_the_laws_beside_the_simulation(found: Theory) -> None:
    sizes = [2, 6, 10, None]
    assert [(row["m"], row["p"]) for row in found.coefficients] == [(m, i / 20) for m in sizes for i in range(21)]
    for row in found.coefficients:
        p, m = row["p"], row["m"]
        assert row["ens_law"] == p
        assert row["wa_law"] == pytest.approx(p**2 if m is None else p / m + (1 - 1 / m) * p**2, abs=1e-12)
        drawn = m is not None and p in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        assert [row[key] is not None for key in ("ens", "ens_se", "wa", "wa_se")] == [drawn] * 4
        if drawn:
            assert abs(row["wa"] - row["wa_law"]) < 4 * row["wa_se"]
            assert row["ens_se"] == pytest.approx(math.sqrt(p * (1 - p) / m / 2000), rel=0.15)


def test_rows_say_who_wins_where(found: Theory) -> None:
    few, shortcut, nothing = (scenario.name for scenario in SCENARIOS)
    for name in (few, shortcut, nothing):
        for data in (IN, OUT):
            sizes = [row["m"] for row in found.rows if (row["scenario"], row["data"]) == (name, data)]
            assert sizes == [*range(1, 11), None]
            for row in found.rows:
                assert row["gain_law"] == row["wa_law"] - row["ens_law"]
                assert (row["ens"] is None) == (row["m"] not in (1, 2, 6, 10)) == (row["trials"] is None)
    wins = [at(found, few, OUT, m)["gain"] for m in (2, 6, 10)]
    losses = [at(found, shortcut, OUT, m)["gain"] for m in (2, 6, 10)]
    assert 0.1 < wins[0] < wins[1] < wins[2]
    assert -0.1 > losses[0] > losses[1] > losses[2]
    assert at(found, few, IN, 10) == at(found, nothing, IN, 10) | {"scenario": few}
    assert at(found, nothing, OUT, 10) == at(found, nothing, IN, 10) | {"data": OUT}
    assert all(-0.005 < row["gain_law"] <= 0 for row in found.rows if row["data"] == IN or row["scenario"] == nothing)


def test_words_follow_the_rows(found: Theory) -> None:
    coefficient, few, shortcut, nothing, agreement = found.words
    own = next(row for row in found.coefficients if (row["p"], row["m"]) == (0.3, 10))
    assert f"0.111 in an average of the weights of 10 (simulated: {own['wa']:.4f} +- {own['wa_se']:.4f};" in coefficient
    assert "3.33 times as much in the ensemble, 9.01 times in the average" in coefficient
    single, row, limit = (at(found, SCENARIOS[0].name, OUT, m) for m in (1, 10, None))
    assert few == (
        "what few runs learn flips (M = 10): the features that fail make up 45 % of the ensemble's reward, 22 % of the "
        f"average's. Out of distribution one member has the accuracy {single['ens']:.3f}, the ensemble "
        f"{row['ens']:.3f}, the average {row['wa']:.3f}: averaging weights is better than averaging rewards "
        f"({row['gain']:+.4f} +- {row['gain_se']:.4f}); as M -> inf the ensemble comes to {limit['ens_law']:.3f}, the "
        "average to 0.973. In distribution averaging weights or rewards makes next to no difference (-0.0016 +- 2e-05)."
    )
    assert "40 % of the ensemble's reward, 55 % of the average's" in shortcut
    assert re.search(r"averaging weights is worse than averaging rewards \(-0\.38\d\d \+- 0\.00\d\d\)", shortcut)
    assert "all features stay as they are" in nothing
    assert "In distribution" not in nothing
    assert "next to no difference (-0.0016 +- 2e-05)" in nothing
    assert re.fullmatch(
        r"The simulation agrees with the closed forms: of 126 simulated means the one farthest from its exact value is "
        r"0\.0\d{3} off, \d\.\d of its standard errors\.", agreement
    )  # fmt: skip
    assert found.warnings == ()


def test_words_of_other_numbers_are_other_words() -> None:
    def words(*groups: FeatureGroup, **more: Any) -> str:
        return simulate_theory(scenarios=[Scenario("s", groups)], members=[2], trials=50, **more).words[1]

    sure = words(FeatureGroup("a", 3, 1.0), FeatureGroup("b", 1, 1.0, sign=0))
    assert "make up 25 % of the ensemble's reward, 25 % of the average's" in sure
    assert "averaging weights or rewards makes no difference that 50 trials show (0 +- 0)" in sure
    assert "no run learns anything" in words(FeatureGroup("a", 3, 0.0, sign=-1))
    linear = words(FeatureGroup("a", 3, 0.5), FeatureGroup("b", 3, 0.1, sign=-1), layers=1)
    assert "makes no difference that 50 trials show (0 +- 0)" in linear
    costly = words(FeatureGroup("a", 6, 0.8), FeatureGroup("b", 20, 0.2), noise=2.0)
    assert "averaging weights is worse than averaging rewards (-0.02" in costly


def test_a_simulation_that_the_laws_do_not_explain_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    law = theory.theory.expected_accuracy
    monkeypatch.setattr(theory.theory, "expected_accuracy", lambda *given: law(*given) - 0.2 * (given[2:] == (2, 2)))
    found = simulate_theory(scenarios=ONE, members=[2])
    assert found.words[-1].startswith("The simulation does not agree with the closed forms: of ")
    (warning,) = found.warnings
    assert re.fullmatch(
        r"simulation: of 30 simulated means the one farthest from its exact value is 0\.[12]\d{3} off, \d+\.\d of its "
        r"standard errors: 4 are farther off than chance explains; one of the two is wrong, please report it",
        str(warning),
    )


def test_few_trials_of_rare_events_are_no_disagreement() -> None:
    """A single member that is wrong once in thousands of times: ten trials never see it, and think they are sure."""
    rare = Scenario("rare", (FeatureGroup("a", 1, 0.999), FeatureGroup("b", 1, 0.5, norm=0.1, sign=-1)))
    for seed in range(20):
        found = simulate_theory(scenarios=[rare], members=[2], trials=10, noise=0.01, seed=seed)
        assert found.warnings == ()


def test_sizes_are_sorted_and_lines_have_enough_points() -> None:
    found = simulate_theory(scenarios=ONE, members=[100, 2, 2], trials=20)
    assert found.record["members"] == [2, 100]
    sizes = [row["m"] for row in found.rows if row["data"] == OUT]
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 22, 32, 46, 68, 100, None]
    assert [row["m"] for row in found.rows if row["data"] == OUT and row["ens"] is not None] == [1, 2, 100]


def test_same_seed_same_result() -> None:
    first, again, other = (simulate_theory(scenarios=ONE, trials=40, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.rows != other.rows


def test_files_and_drawing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = simulate_theory(tmp_path / "out", scenarios=ONE, trials=30, command=["warmerge", "theory"])
    names = ["theory-coefficients.csv", "theory-features.csv", "theory.csv", "theory.json", "theory.png", "theory.svg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    content = json.loads((tmp_path / "out" / "theory.json").read_text(), parse_constant=pytest.fail)
    assert content == json.loads(json.dumps(found.as_json()))
    assert (content["format"], content["command"], content["noise"]) == (
        "warmerge theory 1", ["warmerge", "theory"], 1.0
    )  # fmt: skip
    with (tmp_path / "out" / "theory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["wa_law"]) for row in rows] == [row["wa_law"] for row in found.rows]
    assert rows[-1]["m"] == ""
    assert found.features[1] == {
        "scenario": "one", "features": "few", "count": 4, "p": 0.2, "norm": 1.0, "sign": -1, "m": 10, "ens_limit": 0.2,
        "wa_limit": pytest.approx(0.04), "ens_share": pytest.approx(0.8 / 3.8),
        "wa_share": pytest.approx(4 * 0.056 / (4 * 0.056 + 5 * 0.384)),
    }  # fmt: skip
    before = (tmp_path / "out" / "theory.png").read_bytes()
    assert [path.name for path in redraw(tmp_path / "out")] == ["theory.png", "theory.svg"]
    assert (tmp_path / "out" / "theory.png").read_bytes() == before
    with pytest.raises(UsageError, match=r"out holds theory\.json already; choose another -o, or add --overwrite"):
        simulate_theory(tmp_path / "out", scenarios=ONE, trials=30)
    monkeypatch.setitem(results._FIGURES, results.THEORY, (lambda *_: [], ("rows",)))
    simulate_theory(tmp_path / "out", scenarios=ONE, trials=31, overwrite=True)
    assert json.loads((tmp_path / "out" / "theory.json").read_text())["trials"] == 31


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"members": []}, "--members: expected at least one number of members, found none"),
        ({"members": [2, 0]}, "--members: expected whole numbers from 1 to 1,000, found 0"),
        ({"layers": 0}, "--layers: expected a whole number from 1 to 32, found 0"),
        ({"noise": 0.0}, "--noise: expected a standard deviation above 0, found 0"),
        ({"noise": 0.001}, "--noise: expected at least 0.003 for features whose norms are 3 together, found 0.001"),
        ({"trials": 1}, "--trials: expected a whole number from 2 to 1,000,000, found 1"),
        ({"seed": -1}, "--seed: expected a whole number of 0 or more, found -1"),
        ({"scenarios": []}, "expected at least one scenario, found none"),
        ({"scenarios": ONE * 2}, "two scenarios have the name 'one'"),
    ],
)
def test_what_cannot_be_simulated_is_said_before_anything_is_written(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        simulate_theory(tmp_path / "out", **{"scenarios": ONE, **given})
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_it_is_part_of_the_package() -> None:
    assert warmerge.simulate_theory is simulate_theory
    assert warmerge.Theory is Theory
    assert (warmerge.Scenario, warmerge.FeatureGroup) == (Scenario, FeatureGroup)
    assert {"simulate_theory", "Theory", "Scenario", "FeatureGroup"} <= set(warmerge.__all__)
