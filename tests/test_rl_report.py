"""Reports of optimised policies from their folders: what is read and refused, who belongs together, what is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from policy_runs import hacked, rising, straight, three_by_three, wins, write_rows, write_run

import warmerge
from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.pipeline.rl_report import RlReport, rl_report
from warmerge.report import results
from warmerge.report.optimisation import optimisation_figure


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; figures have tests of their own."""
    monkeypatch.setitem(results._FIGURES, results.RL, (lambda *_: [], ("rows",)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*folders: str | Path, **more: Any) -> RlReport:
    return rl_report(folders, "out", overwrite=True, **more)


def groups(found: RlReport) -> dict[str, int]:
    return {row["group"]: row["runs"] for row in found.peaks if row["run"] is None}


def refused(*folders: str | Path, **more: Any) -> list[str]:
    with pytest.raises(RefusedError) as caught:
        report(*folders, **more)
    return [str(finding) for finding in caught.value.findings]


def changed(folder: Path, **more: Any) -> None:
    record = json.loads((folder / "rl.json").read_text())
    record.update(more)
    (folder / "rl.json").write_text(json.dumps(record))


# --- what is written ---


def test_everything_is_in_the_json_and_in_tables(here: Path) -> None:
    three_by_three(here / "runs")
    (here / "wins.json").write_text(json.dumps(wins()))
    found = warmerge.rl_report(["runs"], "out", winrates=["wins.json"], command=["warmerge", "rl-report"])
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "rl-report-ends.csv", "rl-report-equal_kl.csv", "rl-report-peaks.csv", "rl-report-wins.csv", "rl-report.csv",
        "rl-report.json",
    ]  # fmt: skip
    content = json.loads((here / "out" / "rl-report.json").read_text(), parse_constant=pytest.fail)
    assert content == json.loads(json.dumps(found.as_json()))
    assert (content["format"], content["command"]) == ("warmerge rl-report 1", ["warmerge", "rl-report"])
    assert (content["smooth"], content["margin"], content["winrates"]) == (7, 0.5, ["wins.json"])
    assert [(run["run"], run["group"], run["seed"], run["steps"]) for run in content["runs"][:2]] == [
        ("runs/ensemble-0", "ensemble", 0, 140), ("runs/ensemble-1", "ensemble", 1, 140)
    ]  # fmt: skip
    assert groups(found) == {"ensemble": 3, "rm-0": 3, "warm": 3}
    assert found.warnings == ()
    assert len(content["rows"]) == (9 + 3) * (140 - 6)
    assert len(content["wins"]) == 12
    assert len(content["words"]) == 3 + 2 + 3


def test_results_are_not_replaced_unasked(here: Path) -> None:
    write_run(here / "run", hacked(9))
    rl_report(["run"], "out")
    with pytest.raises(UsageError, match=r"out holds rl-report\.json already"):
        rl_report(["run"], "out")


# --- which runs ---


def test_a_folder_of_runs_is_read_in_a_natural_order(here: Path) -> None:
    for i in (10, 2, 1):
        write_run(here / "runs" / f"run-{i}", hacked(9, seed=i), seed=i)
    (here / "runs" / "report").mkdir()
    (here / "runs" / "notes.txt").write_text("")
    found = report("runs")
    assert [row["run"] for row in found.peaks] == ["runs/run-1", "runs/run-2", "runs/run-10", None]


def test_a_run_named_twice_is_taken_once_and_a_copy_is_refused(here: Path) -> None:
    write_run(here / "runs" / "a", hacked(9))
    found = report("runs", "runs/a")
    assert groups(found) == {"warm": 1}
    assert "runs/a was named twice, and is taken once" in found.record["notes"]
    write_run(here / "runs" / "b", hacked(9))
    assert refused("runs") == ["runs/b: is the same run as runs/a; name it once"]


def test_seeds_are_a_group_and_kl_coefficients_are_in_its_name(here: Path) -> None:
    for kl in (0.05, 0.2):
        for seed in (0, 1):
            write_run(here / f"{kl}-{seed}", hacked(9, seed=seed), kl_coef=kl, seed=seed)
    write_run(here / "other", hacked(9), proxy="rm")
    found = report("0.05-0", "0.05-1", "0.2-0", "0.2-1", "other")
    assert groups(found) == {"warm, KL 0.05": 2, "warm, KL 0.2": 2, "rm, KL 0.05": 1}
    assert found.warnings == ()
    assert groups(report("0.05-0", "0.05-1")) == {"warm": 2}


def test_other_settings_tell_groups_apart_and_are_warned_of(here: Path) -> None:
    write_run(here / "a", hacked(9))
    write_run(here / "b", hacked(9), lr=1e-5, extra=[1])
    found = report("a", "b")
    assert groups(found) == {"warm, extra not given, lr 0.0003": 1, "warm, extra [1], lr 1e-05": 1}
    assert list(map(str, found.warnings)) == [
        "out: runs cannot be compared: lr differs between them: 0.0003 and 1e-05",
        "out: runs cannot be compared: extra differs between them: not given and [1]",
    ]


def test_whole_and_fractional_zero_are_one_setting(here: Path) -> None:
    write_run(here / "a", hacked(9), kl_coef=0)
    write_run(here / "b", hacked(9), kl_coef=0.0, seed=1)
    assert groups(report("a", "b")) == {"warm": 2}


def test_how_often_something_is_kept_tells_no_groups_apart(here: Path) -> None:
    write_run(here / "a", hacked(9), keep_every=500)
    write_run(here / "b", hacked(9), keep_every=3, seed=1)
    found = report("a", "b")
    assert (groups(found), found.warnings) == ({"warm": 2}, ())


def test_ensembles_that_are_combined_differently_are_two_groups(here: Path) -> None:
    write_run(here / "a", hacked(9), proxy="ens", kind="ensemble")
    write_run(here / "b", hacked(9), proxy="ens", kind="ensemble", aggregate="min")
    found = report("a", "b")
    assert groups(found) == {"ens, proxy aggregate mean": 1, "ens, proxy aggregate min": 1}
    assert found.warnings == ()


@pytest.mark.parametrize("key", ["control", "policy", "prompts"])
def test_runs_that_cannot_be_compared_are_warned_of(here: Path, key: str) -> None:
    write_run(here / "a", hacked(9))
    write_run(here / "b", hacked(9), proxy="rm", **{key: "another"})
    first = {"control": "gold.py:gold", "policy": "sft", "prompts": "prompts.jsonl"}[key]
    expected = f"out: runs cannot be compared: {key} differs between them: {first} and another"
    assert list(map(str, report("a", "b").warnings)) == [expected]


def test_a_world_for_each_seed_is_a_note(here: Path) -> None:
    for proxy in ("warm", "rm"):
        for seed in (0, 1):
            own = {"policy": f"world-{seed}/sft", "checkpoints": [f"world-{seed}/1"]}
            write_run(here / proxy / str(seed), hacked(9, seed=seed), proxy=proxy, seed=seed, **own)
    found = report("warm", "rm")
    assert found.warnings == ()
    assert found.record["notes"][-3:] == [
        "policy differs between seeds, and is the same for all runs of a seed: world-0/sft and world-1/sft",
        "warm: the proxy's checkpoints differ between its runs",
        "rm: the proxy's checkpoints differ between its runs",
    ]
    # Where a world is missing in one of the groups, the groups are of different worlds.
    assert [str(warning) for warning in report("warm", "rm/0").warnings] == [
        "out: runs cannot be compared: policy differs between them: world-0/sft and world-1/sft"
    ]


def test_runs_of_one_seed_in_a_group_are_said(here: Path) -> None:
    write_run(here / "a", hacked(9))
    write_run(here / "b", hacked(9, seed=5), checkpoints=["runs/3"])
    assert "warm: some of its runs have the same seed" in report("a", "b").record["notes"]


# --- unfinished runs ---


def test_an_unfinished_run_is_taken_with_a_warning(here: Path) -> None:
    folder = write_run(here / "run", hacked(30), finished=False)
    changed(folder, settings={**json.loads((folder / "rl.json").read_text())["settings"], "steps": 140})
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"step": 31, "pro')
    found = report("run")
    assert [str(warning) for warning in found.warnings] == [
        "run/rows.jsonl: line 31 is not written to its end, and is left out",
        "run: is not finished: its last step is 30 of 140",
    ]
    assert found.ends[0]["step"] == 30


def test_a_run_that_has_only_begun_does_not_decide_the_smoothing(here: Path) -> None:
    write_run(here / "a", hacked(140))
    write_run(here / "b", hacked(44, seed=1), finished=False, seed=1, steps=140)
    assert report("a", "b").record["smooth"] == report("a").record["smooth"] == 7
    assert report("b").record["smooth"] == 1
    write_run(here / "c", hacked(9, seed=2), finished=False, seed=2, steps=140)
    assert report("a", "c").record["smooth"] == 3


def test_a_group_of_runs_of_different_lengths_says_where_its_mean_line_is(here: Path) -> None:
    write_run(here / "a", hacked(30))
    write_run(here / "b", hacked(20, seed=1), finished=False, seed=1, steps=30)
    found = report("a", "b")
    assert "warm: its mean line has only the steps that all its runs have" in found.record["notes"]
    assert max(row["step"] for row in found.rows if row["run"] is None) == 20


def test_a_control_that_starts_late_is_a_note(here: Path) -> None:
    rows = hacked(40, every=10)
    rows[0].update(control=None, control_std=None)
    write_run(here / "run", rows)
    note = "the control reward is first measured at step 10: gains leave out what came before"
    assert report("run").record["notes"][-1] == note


# --- refusals ---


def test_folders_without_runs_are_all_named(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("")
    write_run(here / "bare" / "x", hacked(9))
    (here / "bare" / "x" / "rl.json").unlink()
    broken = write_run(here / "broken", hacked(9))
    (broken / "rows.jsonl").unlink()
    assert refused("empty", "file", "nowhere", "bare", "broken") == [
        "empty: has no rl.json, and no folder in it has; name one that warmerge rl wrote",
        "file: is no folder; name one that warmerge rl wrote",
        "nowhere: is no folder; name one that warmerge rl wrote",
        "bare/x/rl.json: is missing; it is written by warmerge rl, beside its rows",
        "broken/rows.jsonl: is missing; it is written by warmerge rl, beside rl.json",
    ]


def line(number: int, **more: Any) -> str:
    return json.dumps({**hacked(9)[number - 1], **more})


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({3: "{"}, "line 3 is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ({3: "[1]"}, "line 3 is no JSON object: '[1]'"),
        ({3: ""}, "line 3 is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ({3: None}, "line 3 has step 4, expected 3: steps are 1, 2, ... without a gap"),
        ({1: None}, "line 1 has step 2, expected 1: steps are 1, 2, ... without a gap"),
        ({3: line(3, step="3")}, "line 3 has step '3', expected 3: steps are 1, 2, ... without a gap"),
        ({3: line(3, proxy=None)}, "line 3 expected a number for 'proxy', found 'None'"),
        ({3: line(3, kl_sequence="0.1")}, "line 3 expected a number for 'kl_sequence', found '0.1'"),
        ({3: line(3, length=True)}, "line 3 expected a number for 'length', found 'True'"),
        ({3: line(3, control_std=None)}, "line 3 expected a number for 'control_std', found 'None'"),
        ({3: line(3, control=None)}, "line 3 expected a number for 'control', found 'None'"),
        ({3: line(3, proxy=float("nan"))}, "line 3 is not JSON: NaN is no number of JSON"),
        ({3: json.dumps({"step": 3})}, "line 3 expected a number for 'proxy', found nothing"),
        ({1: line(1, control_std=0)}, "line 1: expected 'control_std' above 0, in which gains are counted, found 0"),
        ({1: line(1, proxy_std=0.0)}, "line 1: expected 'proxy_std' above 0, in which gains are counted, found 0.0"),
        ({9: None}, "ends at step 8 of 9, but rl.json says that the run is finished"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(here: Path, change: dict[int, str | None], finding: str) -> None:
    folder = write_run(here / "run", hacked(9))
    lines = (folder / "rows.jsonl").read_text().splitlines()
    new = [change.get(i, old) for i, old in enumerate(lines, start=1)]
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in new if row is not None))
    assert refused("run") == [f"run/rows.jsonl: {finding}"]


def test_every_problem_of_every_run_is_told_at_once(here: Path) -> None:
    a, b = write_run(here / "a", hacked(9)), write_run(here / "b", hacked(9), seed=1)
    rows = hacked(9)
    rows[1]["proxy"] = rows[4]["length"] = None
    write_rows(a / "rows.jsonl", rows)
    changed(b, finished="yes", policy="", proxy={"name": "b"}, asked=None)
    found = refused("a", "b")
    assert found == [
        "a/rows.jsonl: line 2 expected a number for 'proxy', found 'None'",
        "a/rows.jsonl: line 5 expected a number for 'length', found 'None'",
        "b/rl.json: expected true or false for 'finished', found 'yes'",
        "b/rl.json: expected a name for 'policy', found ''",
        "b/rl.json: expected a list for 'proxy.checkpoints', found nothing",
        "b/rl.json: expected an object for 'asked', found 'None'",
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "expected the format 'warmerge rl 1', found 'None'"),
        ('{"format": "warmerge rl 2"}', "expected the format 'warmerge rl 1', found 'warmerge rl 2'"),
    ],
)
def test_records_of_another_kind_are_refused(here: Path, text: str, finding: str) -> None:
    folder = write_run(here / "run", hacked(9))
    (folder / "rl.json").write_text(text)
    assert refused("run") == [f"run/rl.json: {finding}"]


@pytest.mark.parametrize(
    ("measured", "found"), [(0, "no control reward at all"), (1, "one step with a control reward")]
)
def test_without_a_control_reward_there_is_nothing_to_see(here: Path, measured: int, found: str) -> None:
    rows = hacked(9)
    for row in rows[measured:]:
        row.update(control=None, control_std=None)
    write_run(here / "run", rows, control="gold.py:gold" if measured else None)
    expected = f"run/rows.jsonl: has {found}, expected two steps or more; run warmerge rl with --control"
    assert refused("run") == [expected]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"smooth": 2}, "--smooth: expected an odd number of 1 or more, found 2"),
        ({"smooth": -1}, "--smooth: expected an odd number of 1 or more, found -1"),
        ({"smooth": 9}, "--smooth: expected fewer than 9, found 9: run has the control reward of 9 steps"),
        ({"margin": 0.0}, "--margin: expected a share above 0, found 0.0"),
        ({"margin": float("nan")}, "--margin: expected a share above 0, found nan"),
    ],
)
def test_arguments_out_of_range(here: Path, more: dict[str, Any], message: str) -> None:
    write_run(here / "run", hacked(9))
    with pytest.raises(UsageError) as caught:
        report("run", **more)
    assert str(caught.value) == message
    with pytest.raises(UsageError, match="no run is given"):
        report()


def test_win_rates_that_cannot_be_right_are_refused(here: Path) -> None:
    write_run(here / "run", hacked(9))
    good = {"policy": "a", "against": "b", "win": 0.6, "low": 0.5, "high": 0.7, "n": 10, "step": 3, "proxy": "warm"}
    bad = [{**good, "win": 60}, {**good, "low": 0.65}, {**good, "n": None}, {**good, "policy": None},
           {**good, "step": 1.5}, {"policy": "a"}]  # fmt: skip
    (here / "bad.json").write_text(json.dumps({"rows": bad}))
    (here / "none.json").write_text('{"rows": []}')
    (here / "other.json").write_text("[]")
    found = refused("run", winrates=["bad.json", "none.json", "other.json", "nowhere.json"])
    assert found == [
        "bad.json: row 1: expected a fraction from 0 to 1 for 'win', found '60'",
        "bad.json: row 2: expected low <= win <= high, found 0.65 and 0.6 and 0.7",
        "bad.json: row 3: expected a whole number for 'n', found 'None'",
        "bad.json: row 4: expected a name for 'policy', found 'None'",
        "bad.json: row 5: expected a whole number for 'step', found '1.5'",
        "bad.json: row 6: expected a name for 'against', found 'None'",
        "bad.json: row 6: expected a whole number for 'n', found 'None'",
        "none.json: has no win rates",
        "other.json: cannot be read as a result of warmerge winrate: JSON with rows",
        "nowhere.json: cannot be read as a result of warmerge winrate: No such file or directory",
    ]
    assert not (here / "out").exists()


def test_a_pipe_of_win_rates_is_not_waited_for(here: Path) -> None:
    write_run(here / "run", hacked(9))
    os.mkfifo(here / "pipe.json")
    found = refused("run", winrates=["pipe.json"])
    assert found == ["pipe.json: cannot be read as a result of warmerge winrate: it is no regular file"]


def test_numbers_that_no_axis_holds_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results._FIGURES, results.RL, (optimisation_figure, ("rows", "peaks", "wins")))
    write_run(here / "run", [row | {"kl_sequence": 1e308} for row in hacked(9)])
    with pytest.raises(WarmergeError, match=r"^out/rl-report\.json has the numbers, but their figure cannot be "):
        report("run")
    assert (here / "out" / "rl-report.json").is_file()


# --- words ---

FLAT = "answers of 12 tokens, 12 at the start; 0 % cut at the limit, 0 % at the start. One run: no spread is known."


def test_the_words_of_one_run_by_hand(here: Path) -> None:
    write_run(here / "run", straight((0, 0, 0), (2, 2, 1), (4, 4, 2), (1, 8, 4)))
    assert report("run").words == (
        "warm (1 run, 4 steps): the control reward was highest at step 3, KL 2.00 nats, 2.00 standard deviations above "
        "the start. It had lost more than half of its gain by step 4, while the proxy went from +2.00 to +4.00: this "
        f"is over-optimisation. At the end: control +0.50, proxy +4.00, KL 4.00 nats; {FLAT}",
    )


@pytest.mark.parametrize(
    ("points", "margin", "words"),
    [
        (
            [(0, 0, 0), (2, 2, 1), (4, 4, 2)], 0.5,
            "2.00 standard deviations above the start. It did not lose half of its gain within 3 steps, and no "
            "over-optimisation is seen so far.",
        ),
        (
            [(0, 0, 0), (4, 2, 1), (3, 4, 2)], 0.3,
            "It did not lose 30% of its gain within 3 steps, but fell to +1.50 while the proxy went from +1.00 to "
            "+2.00: it has begun to be lost.",
        ),
        (
            [(0, 0, 0), (4, 2, 1), (0, 1, 2)], 0.5,
            "while the proxy went from +1.00 to +0.50: the proxy rose by no more than its noise, and over-optimisation "
            "is not shown.",
        ),
        ([(0, 0, 0), (4, 2, 1), (0, 4, 2), (3, 6, 3)], 0.5, "this is over-optimisation. It came back before the end."),
        (
            [(0, 0, 0), (4, 2, 1), (0, 4, 2), (3, 6, 3), (1, 7, 4), (0, 8, 5)], 0.5,
            "this is over-optimisation. It came back for a while, and was lost for good from step 5 on. At the end",
        ),
        (
            [(4, 0, 0), (2, 2, 1), (0, 4, 2)], 0.5,
            "the control reward never rose above its start. It fell to -2.00 while the proxy rose to +2.00: "
            "over-optimisation from the start on.",
        ),
    ],
)  # fmt: skip
def test_what_one_run_shows_is_said(here: Path, points: list[Any], margin: float, words: str) -> None:
    write_run(here / "run", straight(*points))
    (found,) = report("run", margin=margin).words
    assert words in found


def test_a_rise_within_noise_is_no_peak(here: Path) -> None:
    write_run(here / "run", hacked(60, height=0.0, noise=0.5))
    (found,) = report("run").words
    assert "the control reward rose by no more than its own noise (at most " in found
    assert "over-optimisation" not in found


def two_seeds(here: Path, name: str, heights: tuple[float, float]) -> None:
    for seed, height in enumerate(heights):
        rows = straight((0, 0, 0), (2 * height, 2, 1), (0, 4, 2), std=2.0)
        write_run(here / name / str(seed), rows, proxy=name, seed=seed)


def test_groups_are_said_with_their_ranges(here: Path) -> None:
    two_seeds(here, "warm", (1.0, 2.0))
    (words,) = report("warm").words
    assert words.startswith(
        "warm (2 runs, 3 steps): the control reward was highest at step 2, KL 1.00 nats, 1.50 (1.00 to 2.00) standard "
        "deviations above the start (means over runs; in brackets lowest to highest). It had lost more than half of "
        "its gain in 2 of 2 runs by step 3, while the proxy went from +1.00 to +2.00: this is over-optimisation."
    )
    assert "no spread" not in words


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (
            (1.0, 1.8),
            "warm over rm: +0.10, no more than the spread over seeds (0.71): no difference is shown. Of so few",
        ),
        (
            (0.1, 0.2),
            "warm over rm: +1.35, more than the spread over seeds (0.71). Of so few runs the spread itself is",
        ),
    ],
)
def test_a_difference_within_the_spread_over_seeds_is_none(
    here: Path, other: tuple[float, float], verdict: str
) -> None:
    two_seeds(here, "rm", other)
    two_seeds(here, "warm", (1.0, 2.0))
    *_, peaks, at_kl = report("rm", "warm").words
    assert verdict in peaks
    assert peaks.startswith(
        "Largest control gain, in standard deviations (+- the standard deviation over seeds): "
        "warm +1.50 +- 0.71 (2 runs), rm "
    )
    assert at_kl.startswith(
        "Control gain at a KL of 2 nats, the largest shown that all reached, in standard deviations"
    )


def test_single_runs_are_not_ranked(here: Path) -> None:
    write_run(here / "a", straight((0, 0, 0), (4, 2, 1), (0, 4, 2)), proxy="a")
    write_run(here / "b", straight((0, 0, 0), (2, 2, 0), (0, 4, 0)), proxy="b")
    *_, peaks, at_kl = report("a", "b").words
    assert "a +2.00 (1 run), b +1.00 (1 run). Of one run, whether a difference is more than the luck" in peaks
    assert " over " not in peaks.partition(":")[2]
    assert at_kl == "No KL was reached by all runs from below, so that nothing can be said at equal KL."


def test_the_last_step_of_each_proxy_is_said_of_win_rates(here: Path) -> None:
    write_run(here / "run", rising(9))
    rows = wins((20, 100), ("warm",))["rows"]
    rows += [{**rows[0], "step": None, "policy": "mine", "win": 0.45, "low": 0.4, "high": 0.55}]
    rows += [{**rows[0], "step": None, "policy": "unjudged", "win": None, "low": None, "high": None, "n": 0}]
    (here / "wins.json").write_text(json.dumps({"rows": rows}))
    assert report("run", winrates=["wins.json"]).words[1:] == (
        "warm/step-100 against sft: wins 86.4 % (95 %: 81.4 to 91.4; n = 192); the interval excludes 50 %.",
        "mine against sft: wins 45.0 % (95 %: 40.0 to 55.0; n = 192); the interval holds 50 %.",
        "unjudged against sft: no win rate, nothing was judged.",
    )


def test_results_of_several_seeds_are_one_sentence(here: Path) -> None:
    """A file for each seed: of each policy its last step, over all files. Policies of one proxy are not mixed."""
    write_run(here / "run", hacked(9))
    for number, (win, low, high) in enumerate([(0.4, 0.3, 0.5), (0.6, 0.55, 0.65), (0.8, 0.7, 0.9)]):
        rows = [
            {"policy": f"{name} step {step}", "against": "start", "win": win, "low": low, "high": high, "n": 40,
             "step": step, "proxy": "rm"}
            for name in ("rm-1", "rm-2") for step in (1, 10) if (name, number) != ("rm-2", 2)
        ]  # fmt: skip
        (here / f"seed-{number}.json").write_text(json.dumps({"rows": rows}))
    words = rl_report(["run"], "out", winrates=[f"seed-{number}.json" for number in range(3)]).words
    assert words[1:] == (
        "rm-1 step 10 against start: wins 60.0 (40.0 to 80.0) % in 3 results; the intervals of 2 of them exclude 50 %.",
        "rm-2 step 10 against start: wins 50.0 (40.0 to 60.0) % in 2 results; the intervals of 1 of them exclude 50 %.",
    )


def test_of_many_groups_only_the_best_is_set_against_the_others(here: Path) -> None:
    """All pairs of three groups are compared, but of five only those of the best one."""
    for place, names in (("few", "abc"), ("many", "abcde")):
        for i, name in enumerate(names):
            for seed in range(2):
                write_run(
                    here / place / f"{name}-{seed}",
                    straight((0, 0, 0), (9 - i, 2, 1), (0, 4, 2)),
                    proxy=name,
                    seed=seed,
                )
    few, many = (next(w for w in report(p).words if w.startswith("Largest")) for p in ("few", "many"))
    pairs = [[f"{a} over {b}:" in words for a in "abcde" for b in "abcde"].count(True) for words in (few, many)]
    assert pairs == [3, 4]
    assert "e over" not in many
