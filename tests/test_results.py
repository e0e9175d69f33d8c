"""Results in a folder: what is written, what is replaced, and what is drawn again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from warmerge.errors import UsageError
from warmerge.report.results import CURVE, EVAL, VS_M, check_results, csv_text, redraw, without_nan, write_results


def row(**more: Any) -> dict[str, Any]:
    return {"set": "val", "model": "a", "kind": "member", "n": 9, "accuracy": 0.5, "low": 0.25, "high": 0.75, **more}


def test_a_result_is_written_as_json_csv_and_figures(tmp_path: Path) -> None:
    content = {
        "format": "x",
        "rows": [row(), row(model="b", reward=float("nan"))],
        "differences": [],
        "movements": [{"x": 1}],
    }
    written = write_results(tmp_path / "new" / "out", EVAL, content)
    assert [path.name for path in written] == ["eval.json", "eval.csv", "eval-movements.csv", "eval.png", "eval.svg"]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(path.name for path in written)
    assert json.loads(written[0].read_text(), parse_constant=pytest.fail)["rows"][1]["reward"] is None
    with written[1].open() as file:
        assert [line["reward"] for line in csv.DictReader(file)] == ["", ""]


def test_tables_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    write_results(tmp_path, EVAL, {"rows": [row()], "movements": [{"x": 1}]})
    write_results(tmp_path, EVAL, {"rows": [row(model="b")], "movements": []})
    assert not (tmp_path / "eval-movements.csv").exists()
    assert "b" in (tmp_path / "eval.csv").read_text()


def test_names_that_no_encoding_takes_are_escaped(tmp_path: Path) -> None:
    """A file name that is no UTF-8: results are not lost at the very end because of it."""
    name = b"r\xffm".decode(errors="surrogateescape")
    write_results(tmp_path, EVAL, {"rows": [row(model=name, set='a,"b"\n\x1b[31m')]})
    with (tmp_path / "eval.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["model"], found["set"]) == ("r\\udcffm", 'a,"b"\n\x1b[31m')
    assert json.loads((tmp_path / "eval.json").read_text())["rows"][0]["model"] == name


def test_numbers_keep_all_their_digits() -> None:
    value = 0.1 + 0.2
    assert csv_text([{"x": value, "y": None, "z": float("inf")}]) == f"x,y,z\n{value!r},,\n"
    assert without_nan({"a": (1, float("-inf")), "b": {"c": float("nan")}, "d": "nan"}) == {
        "a": [1, None], "b": {"c": None}, "d": "nan"
    }  # fmt: skip


def test_results_are_not_replaced_unasked(tmp_path: Path) -> None:
    check_results(tmp_path / "new", EVAL, False)
    check_results(tmp_path, EVAL, False)
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        check_results(tmp_path, EVAL, False)
    assert str(caught.value) == f"{tmp_path} holds eval.json already; choose another -o, or add --overwrite"
    check_results(tmp_path, EVAL, True)
    check_results(tmp_path, CURVE, False)
    with pytest.raises(UsageError, match=r"-o .*eval\.json is a file; name a folder"):
        check_results(tmp_path / "eval.json", EVAL, True)


def test_every_result_of_a_folder_is_drawn_again(tmp_path: Path) -> None:
    lmc = {"path": "a -> b", "set": "val", "n": 9, "lambda": 0.0, "wa": 0.5, "wa_low": 0.4, "wa_high": 0.6, "ens": 0.5,
           "diag": 0.5}  # fmt: skip
    write_results(tmp_path, CURVE, {"rows": [lmc, {**lmc, "lambda": 1.0}]})
    write_results(tmp_path, EVAL, {"rows": [row(length_correlation=float("nan"))]})
    names = [tmp_path / f"{kind}.{ending}" for kind in (EVAL, CURVE) for ending in ("png", "svg")]
    before = [path.read_bytes() for path in names]
    for path in names:
        path.unlink()
    assert redraw(tmp_path) == names
    assert [path.read_bytes() for path in names] == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"rows": 3}', '{"rows": [1]}', '{"rows": "ab"}', "\udcff", "[" * 100_000]
)
def test_what_is_no_result_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{VS_M}.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as caught:
        redraw(tmp_path)
    assert str(caught.value) == f"{tmp_path}/vs_m.json is not a result of warmerge"


def test_a_folder_without_results_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        redraw(tmp_path)
    names = "eval.json, curve.json, vs_m.json, training.json, bon.json, rl-report.json, winrate.json, theory.json"
    assert str(caught.value) == f"{tmp_path}: no results to draw; expected one of {names}"
