"""rl-report as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from policy_runs import hacked, three_by_three, wins, write_run
from test_cli import Done, cells, here, run

from warmerge.report import results


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results._FIGURES, results.RL, (lambda *_: [], ("rows",)))


def test_three_proxies_in_a_process_of_its_own(place: Path) -> None:
    three_by_three(place / "runs")
    (place / "wins.json").write_text(json.dumps(wins()))
    arguments = ("rl-report", "runs", "--winrate", "wins.json", "-o", "out")
    done = run(*arguments, cwd=place)
    assert (done.code, done.err) == (0, "")
    content = json.loads((place / "out" / "rl-report.json").read_text(), parse_constant=pytest.fail)
    assert content["command"] == ["warmerge", *arguments]
    lines = done.out.splitlines()
    words = content["words"]
    at = lines.index(words[0])
    assert lines[at : at + len(words)] == words
    assert lines[at + len(words) : -1] == [f"note: {note}" for note in content["notes"]]
    assert lines[-1] == "out"
    peak = next(row for row in content["peaks"] if row["group"] == "warm" and row["run"] is None)
    end = next(row for row in content["ends"] if row["group"] == "warm" and row["run"] is None)
    shown = next(cells(line) for line in lines if line.startswith(" warm (n = 3)"))
    assert shown == [
        "warm (n = 3)", f"{peak['step']:.0f}", f"{peak['kl']:.2f}",
        f"{peak['control_gain']:+.2f} +- {peak['control_gain_sd']:.2f}", f"{peak['collapse_step']:.0f} (2 of 3)",
        f"{end['control_gain']:+.2f} +- {end['control_gain_sd']:.2f}", f"{end['proxy_gain']:+.2f}",
        f"{end['kl']:.2f}", "2 over-optimised, 1 declining",
    ]  # fmt: skip
    first, second = (cells(line) for line in lines if "runs/warm-0 " in line)
    assert first[0] == "runs/warm-0"
    own = [row for row in content["equal_kl"] if row["run"] == "runs/warm-0"]
    assert second[1:] == [f"{row['control_gain']:+.2f}" for row in own]
    assert {path.suffix for path in (place / "out").glob("rl-report.*")} == {".json", ".csv", ".png", ".svg"}


@pytest.mark.usefixtures("no_figures")
def test_json_is_one_object_and_warnings_go_to_stderr(place: Path) -> None:
    write_run(place / "a", hacked(9, noise=0.0), finished=False, steps=20)
    done = here("rl-report", "a", "-o", "out", "--json", "--smooth", "3", "--margin", "0.25")
    assert (done.code, done.err) == (0, "warning: a: is not finished: its last step is 9 of 20\n")
    content = json.loads(done.out, parse_constant=pytest.fail)
    assert content == json.loads((place / "out" / "rl-report.json").read_text())
    assert (content["smooth"], content["margin"]) == (3, 0.25)
    assert content["warnings"] == ["a: is not finished: its last step is 9 of 20"]
    # With nine points the noise is not known: null, not NaN.
    assert content["peaks"][0]["control_error"] is None


@pytest.mark.usefixtures("no_figures")
def test_a_group_of_one_run_has_one_row(place: Path) -> None:
    write_run(place / "a", hacked(30, top=10, noise=0.0))
    lines = here("rl-report", "a", "-o", "out").out.splitlines()
    shown = [cells(line) for line in lines if line.startswith(" warm (n = 1)")]
    assert shown[0][1:] == ["11", "1.50", "+1.00", "19", "-2.61", "+1.89", "5.38", "1 over-optimised"]
    assert all(re.fullmatch(r"[+-]\d\.\d\d", cell) for cell in shown[1][1:])
    assert not any("  a " in line for line in lines)


@pytest.mark.usefixtures("no_figures")
def test_names_cannot_write_to_the_terminal(place: Path) -> None:
    write_run(place / "a", hacked(9), proxy="x\x1b[31my")
    done = here("rl-report", "a", "-o", "out")
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "'x\\x1b[31my' (1 run, 9 steps)" in done.out


def test_what_cannot_be_read_is_refused_before_anything_is_written(place: Path) -> None:
    write_run(place / "a", hacked(9))
    (place / "b").mkdir()
    assert here("rl-report", "a", "b", "-o", "out") == Done(
        3, "", "warmerge: refused: b: has no rl.json, and no folder in it has; name one that warmerge rl wrote\n"
    )
    assert here("rl-report", "a", "-o", "out", "--smooth", "4") == Done(
        2, "", "warmerge: --smooth: expected an odd number of 1 or more, found 4\n"
    )
    assert not (place / "out").exists()


@pytest.mark.usefixtures("no_figures")
def test_results_are_replaced_only_with_overwrite(place: Path) -> None:
    write_run(place / "a", hacked(9))
    assert here("rl-report", "a", "-o", "out").code == 0
    refused = here("rl-report", "a", "-o", "out")
    message = "warmerge: out holds rl-report.json already; choose another -o, or add --overwrite\n"
    assert refused == Done(2, "", message)
    assert here("rl-report", "a", "-o", "out", "--overwrite").code == 0
