"""The figure of a run shows the rows: loss and accuracy of each member, and what that was worth elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from warmerge.errors import UsageError
from warmerge.report.canvas import GREY
from warmerge.report.learning import draw_learning, learning_figure
from warmerge.report.results import TRAINING, redraw, write_results

Row = dict[str, Any]


def curves(members: int = 2, steps: int = 5) -> list[Row]:
    return [
        {"member": f"{k:02d}", "lr": 1e-5 * k, "dropout": 0.1, "step": s, "loss": 0.7 - 0.1 * k * s / steps,
         "accuracy": 0.5 + 0.01 * k}
        for k in range(1, members + 1)
        for s in range(1, steps + 1)
    ]  # fmt: skip


def accuracies(sets: tuple[str, ...] = ("val", "ood"), members: int = 2) -> list[Row]:
    models = [("start", "start"), *((f"{k:02d}", "member") for k in range(1, members + 1))]
    return [
        {"set": name, "model": model, "kind": kind, "n": 90, "accuracy": 0.6 + i / 100, "low": 0.5, "high": 0.7}
        for name in sets
        for i, (model, kind) in enumerate(models)
    ]


def lines(figure: Figure, panel: int) -> list[list[tuple[float, float]]]:
    return [[(x, y) for x, y in line.get_xydata().tolist()] for line in figure.axes[panel].lines]


def test_each_member_has_its_lines_and_each_set_its_panel() -> None:
    rows = curves()
    figure = draw_learning(rows, accuracies())
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["training loss", "share of training pairs right", "val\nn = 90", "ood\nn = 90"]
    for panel, key in ((0, "loss"), (1, "accuracy")):
        expected = [[(row["step"], row[key]) for row in rows if row["member"] == name] for name in ("01", "02")]
        assert lines(figure, panel) == expected
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["start", "01", "02"]
    assert [line[0][0] for line in lines(figure, 2)] == [0.6, 0.61, 0.62]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "01: lr 1e-05, dropout 0.1",
        "02: lr 2e-05, dropout 0.1",
    ]


def test_without_validation_sets_there_are_two_panels() -> None:
    assert len(draw_learning(curves(), []).axes) == 2


def test_steps_are_whole_numbers() -> None:
    figure = draw_learning(curves(steps=3), [])
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_one_step_is_seen() -> None:
    figure = draw_learning(curves(steps=1), [])
    assert [line.get_marker() for line in figure.axes[0].lines] == [".", "."]


def test_more_members_than_colours_are_grey() -> None:
    figure = draw_learning(curves(members=12), [])
    assert {line.get_color() for line in figure.axes[0].lines} == {GREY}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["each of 12 members"]


def test_a_run_is_drawn_again_from_its_rows(tmp_path: Path) -> None:
    content = {"rows": curves(), "accuracies": accuracies(), "members": [{"member": "01", "lr": 1e-5}]}
    written = write_results(tmp_path, TRAINING, content)
    assert sorted(path.name for path in written) == [
        "training-accuracies.csv", "training-members.csv", "training.csv", "training.json", "training.png",
        "training.svg",
    ]  # fmt: skip
    before = (tmp_path / "training.svg").read_bytes()
    (tmp_path / "training.svg").unlink()
    assert [path.name for path in redraw(tmp_path)] == ["training.png", "training.svg"]
    assert (tmp_path / "training.svg").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [({"step": None}, "expected a number for 'step'"), ({"accuracy": 60}, "expected a fraction from 0 to 1")],
)
def test_rows_that_cannot_be_right_are_refused(change: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        learning_figure([{**curves()[0], **change}], [], tmp_path / "x")
