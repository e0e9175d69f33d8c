"""theory as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Done, cells, here, run

from warmerge.report import results


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results._FIGURES, results.THEORY, (lambda *_: [], ("rows",)))


def test_in_a_process_of_its_own(place: Path) -> None:
    done = run("theory", "-o", "out", cwd=place)
    assert (done.code, done.err) == (0, "")
    content = json.loads((place / "out" / "theory.json").read_text(), parse_constant=pytest.fail)
    assert content["command"] == ["warmerge", "theory", "-o", "out"]
    lines = done.out.splitlines()
    first = lines.index(content["words"][0])
    tail = [*content["words"], *(f"note: {note}" for note in content["notes"])]
    tail += ["+-: standard error, from 2,000 draws of what runs learn (seed 0)", "out"]
    assert lines[first:] == tail
    assert any("the theory leaves out" in note for note in content["notes"])
    by_m = {row["m"]: row for row in content["coefficients"] if row["p"] == 0.3}
    (shown,) = (cells(line) for line in lines if line.startswith(" 0.3 "))
    assert shown == [
        "0.3", f"{by_m[10]['ens']:.3f} (0.300)", f"{by_m[2]['wa']:.3f} (0.195)", f"{by_m[6]['wa']:.3f} (0.125)",
        f"{by_m[10]['wa']:.3f} (0.111)", "(0.090)",
    ]  # fmt: skip
    inside, outside = (
        next(
            row
            for row in content["rows"]
            if (row["scenario"], row["data"], row["m"]) == ("what few runs learn flips", data, 10)
        )
        for data in ("in distribution", "out of distribution")
    )
    heading = next(i for i, line in enumerate(lines) if line.startswith("what few runs learn flips: 6 "))
    assert lines[heading].endswith("6 learned by most runs (p 0.8); 20 learned by few runs (p 0.2, flips)")
    shown = next(cells(line) for line in lines[heading:] if line.startswith(" 10 "))
    both = [f"{row[name]:.3f} ({row[f'{name}_law']:.3f})" for row in (inside, outside) for name in ("ens", "wa")]
    assert shown == ["10", *both, f"{outside['gain']:+.4f} +- {outside['gain_se']:.4f}"]
    assert {path.suffix for path in (place / "out").glob("theory.*")} == {".json", ".csv", ".png", ".svg"}


def test_nothing_is_written_unasked_and_json_is_one_object(place: Path) -> None:
    done = here("theory", "--json", "--trials", "20", "--members", "3", "--layers", "3", "--noise", "2", "--seed", "7")
    assert (done.code, done.err) == (0, "")
    content = json.loads(done.out, parse_constant=pytest.fail)
    assert [content[key] for key in ("trials", "members", "layers", "noise", "seed")] == [20, [3], 3, 2.0, 7]
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("no_figures")
def test_features_of_ones_own(place: Path) -> None:
    groups = (
        "--features",
        "task=12,p=0.5",
        "--features",
        "a=b=4,p=1,flips,norm=0.5",
        "--features",
        "x\x1b[31m=1,p=0,vanishes",
    )
    done = here("theory", *groups, "--members", "2,20", "--trials", "50", "-o", "out")
    assert (done.code, done.err) == (0, "")
    heading = "the given features: 12 task (p 0.5); 4 a=b (p 1, norm 0.5, flips); 1 'x\\x1b[31m' (p 0, vanishes)"
    assert heading in done.out.splitlines()
    assert "\x1b" not in done.out
    content = json.loads((place / "out" / "theory.json").read_text())
    assert {row["scenario"] for row in content["rows"]} == {"the given features"}
    assert [(row["features"], row["count"], row["p"], row["norm"], row["sign"]) for row in content["features"]] == [
        ("task", 12, 0.5, 1.0, 1), ("a=b", 4, 1.0, 0.5, -1), ("x\x1b[31m", 1, 0.0, 1.0, 0)
    ]  # fmt: skip
    again = here("theory", *groups, "-o", "out")
    assert again == Done(2, "", "warmerge: out holds theory.json already; choose another -o, or add --overwrite\n")
    assert here("theory", *groups, "-o", "out", "--overwrite", "--trials", "50").code == 0


@pytest.mark.parametrize(
    "text",
    ["", "task", "task=12", "task=12,p", "task=x,p=0.5", "=3,p=0.5", "task=12,q=0.5", "task=12,p=0.5,p=0.6",
     "task=12,p=0.5,flips,vanishes", "task=12,p=0.5,flip", "task=1.5,p=0.5", "task=12,p=half"],
)  # fmt: skip
def test_features_that_cannot_be_read(text: str) -> None:
    form = "expected NAME=COUNT,p=P, then ,norm=Z and ,flips or ,vanishes as you like, as in length=4,p=1,flips"
    assert here("theory", "--features", text) == Done(2, "", f"warmerge: --features: {form}; found {text!r}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--features", "a=3,p=1.2"), "features 'a': expected a probability p from 0 to 1, found 1.2"),
        (("--members", "2,2.5"), "--members: expected whole numbers with commas between them, found '2,2.5'"),
        (("--members", "2,nan"), "--members: expected whole numbers with commas between them, found '2,nan'"),
        (("--members", "two"), "--members: expected numbers with commas between them, found 'two'"),
        (("--members", "0"), "--members: expected whole numbers from 1 to 1,000, found 0"),
        (("--layers", "0"), "--layers: expected a whole number from 1 to 32, found 0"),
        (("--noise", "0"), "--noise: expected a standard deviation above 0, found 0"),
        (("--noise", "nan"), "--noise: expected a standard deviation above 0, found nan"),
        (("--trials", "1"), "--trials: expected a whole number from 2 to 1,000,000, found 1"),
        (("--seed", "-1"), "--seed: expected a whole number of 0 or more, found -1"),
    ],
)
def test_options_that_cannot_be_used(arguments: tuple[str, ...], message: str) -> None:
    assert here("theory", *arguments) == Done(2, "", f"warmerge: {message}\n")
