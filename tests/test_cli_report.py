"""report as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from result_contents import evaluation, theory
from test_cli import Done, here, run

from warmerge.report.claims import claims_of, in_words
from warmerge.report.results import EVAL, THEORY, write_results


def test_a_page_in_a_process_of_its_own(place: Path) -> None:
    write_results(place / "out" / "accuracy", EVAL, evaluation())
    (place / "out" / "accuracy" / "eval.svg").write_text("stale")
    done = run("report", "out", "--title", "Our models", cwd=place)
    assert (done.code, done.err) == (0, "")
    lines = [line.strip() for line in done.out.splitlines() if line.strip()]
    assert lines[0].split() == ["folder", "result"]
    assert lines[2].split() == ["accuracy", "eval"]
    assert lines[3:] == [in_words(claims_of([("accuracy", EVAL, evaluation())])), "report.html"]
    html = (place / "report.html").read_text()
    assert "<title>Our models</title>" in html
    assert "stale" not in html
    assert html.count("<svg ") == 1
    assert sorted(path.name for path in (place / "out" / "accuracy").iterdir()) == [
        "eval-differences.csv", "eval.csv", "eval.json", "eval.png", "eval.svg"
    ]  # fmt: skip


def test_json_is_one_object_and_what_is_left_out_goes_to_stderr(place: Path) -> None:
    write_results(place / "theory", THEORY, theory())
    (place / "runs").mkdir()
    (place / "runs" / "train.json").write_text("{}")
    done = here("report", "theory", "runs", "-o", "all.html", "--json")
    said = "runs: has train.json and no training.json: this training is not finished"
    assert (done.code, done.err) == (0, f"note: {said}\n")
    assert json.loads(done.out) == {
        "report": "all.html", "title": "Results of 2 folders",
        "results": [{"folder": "theory", "kind": "theory"}], "claims": [], "left_out": [said],
    }  # fmt: skip


def test_errors_have_their_exit_codes(place: Path) -> None:
    (place / "a").mkdir()
    (place / "a" / "eval.json").write_text("[]")
    assert here("report", "a") == Done(
        3, "", "warmerge: refused: a/eval.json: is not a result of warmerge: expected a JSON object\n"
    )
    (place / "a" / "eval.json").unlink()
    done = here("report", "a")
    assert done.code == 2
    assert done.err.startswith("warmerge: a: no results anywhere beneath; looked for training.json, eval.json, ")
    assert not (place / "report.html").exists()
