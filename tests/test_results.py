"""Results in a folder: what is written, what is replaced, and what is drawn again."""

from __future__ import annotations

import csv
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from warmerge.errors import UsageError, WarmergeError
from warmerge.report import results
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


def test_two_commands_do_not_write_results_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins while the first one draws: it waits, and says so if that takes too long."""
    refusals: list[str] = []

    def meets(rows: Any, stem: Path) -> list[Path]:
        with pytest.raises(WarmergeError) as caught:
            write_results(tmp_path, EVAL, {"rows": [row(model="b")]})
        refusals.append(str(caught.value))
        return []

    monkeypatch.setattr(results, "_LOCK_SECONDS", 0.05)
    monkeypatch.setitem(results._FIGURES, EVAL, (meets, ("rows",)))
    write_results(tmp_path, EVAL, {"rows": [row()]})
    what = f"another command has been writing {tmp_path / 'eval.json'} for 0 seconds"
    assert refusals == [f"{what}; wait for it, and give the same command again, or choose another -o"]
    assert json.loads((tmp_path / "eval.json").read_text())["rows"][0]["model"] == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.csv", "eval.json"]


def test_the_next_in_line_takes_the_lock_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ends removes its lock: what a waiting thread has opened by then is no longer the one that others see."""
    inside, most = 0, 0

    def write(_: int) -> None:
        nonlocal inside, most
        with results.only_writer(tmp_path / "x"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    monkeypatch.setattr(results, "_POLL_SECONDS", 0.001)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(12)))
    assert most == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_makes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".eval.json.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.eval\.json\.lock"):
        write_results(tmp_path, EVAL, {"rows": [row()]})
    assert not (tmp_path / "elsewhere").exists()


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


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_nothing_is_drawn_through_a_link(tmp_path: Path, ending: str) -> None:
    """`plot` writes into the folder of a stranger."""
    (tmp_path / "in").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "in" / "eval.json").write_text(json.dumps({"rows": [row()]}))
    (tmp_path / "in" / f".eval{ending}.partial").symlink_to(tmp_path / "mine")
    assert len(redraw(tmp_path / "in")) == 2
    assert (tmp_path / "mine").read_text() == "mine"


def test_no_text_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.html.partial").symlink_to(tmp_path / "mine")
    assert results.write_text(tmp_path / "a.html", "new").read_text() == "new"
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("key", ["model", "set"])
def test_more_than_a_picture_shows_is_not_drawn(tmp_path: Path, key: str) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"rows": [row(**{key: f"{number}"}) for number in range(3000)]}))
    with pytest.raises(UsageError, match=rf"/eval\.json: 3,000 {key}s are more than can be read in a picture; w"):
        redraw(tmp_path)


def test_a_folder_without_results_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        redraw(tmp_path)
    names = "eval.json, curve.json, vs_m.json, training.json, bon.json, rl-report.json, winrate.json, theory.json"
    assert str(caught.value) == f"{tmp_path}: no results to draw; expected one of {names}"
