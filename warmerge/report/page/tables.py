"""What a page shows of each kind of result: few columns with human names, each number with its interval and n."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmerge.report.page.cells import (
    Cell,
    Table,
    count,
    measured,
    named,
    numeral,
    points,
    rows_table,
    set_column,
    share,
)
from warmerge.report.page.policies import bon_tables, rl_tables, winrate_tables
from warmerge.report.results import BON, CURVE, EVAL, RL, THEORY, TRAINING, VS_M, WINRATE
from warmerge.report.rows import Row, flag, groups, number, place, sizes, text

Content = Mapping[str, Any]


def tables_of(kind: str, content: Content) -> list[Table]:
    """The tables of a result that a reader wants first.

    Raises:
        UsageError: a row that lacks what its kind has, or has a value that cannot be what its column says.
    """
    return _TABLES[kind](content) if kind in _TABLES else [rows_table("Rows", content.get("rows") or [], 40)]


# --- one kind each --------------------------------------------------------------------------------------------------


def _training(content: Content) -> list[Table]:
    found = content.get("accuracies") or []
    by = {(text(row, "model"), text(row, "set")): row for row in found}
    sets = groups(found, "set") if found else {}
    head = [("Member", ""), ("Learning rate", ""), ("Dropout", ""), ("Started from", "")]
    head += [("Training pairs right", ""), ("Loss", "")]
    head += [set_column(name, rows) for name, rows in sets.items()]
    rows = []
    for row in content.get("members") or []:
        name = text(row, "member")
        own = [Cell(name), numeral(row, "lr", "g"), numeral(row, "dropout", "g"), Cell(str(row.get("init") or ""))]
        if row.get("failed"):
            rows.append((*own, Cell("failed", str(row["failed"])), *[Cell("")] * (1 + len(sets))))
            continue
        own += [numeral(row, "final_accuracy", ".3f"), numeral(row, "final_loss", ".3f")]
        rows.append((*own, *(share(by.get((name, at), {})) for at in sets)))
    marked: frozenset[int] = frozenset()
    if ("start", next(iter(sets), "")) in by:
        marked = frozenset({len(rows)})
        rows.append((Cell("start"), *[Cell("")] * 5, *(share(by.get(("start", at), {})) for at in sets)))
    below = "Loss and training pairs right are means of the last steps of the training, on its own labels: no interval."
    return [Table("The members, best first" if sets else "The members", tuple(head), tuple(rows), marked, below)]


def _eval(content: Content) -> list[Table]:
    rows = content.get("rows") or []
    sets, models = groups(rows, "set"), groups(rows, "model")
    by = {(text(row, "model"), text(row, "set")): row for row in rows}
    columns = tuple(set_column(name, own) for name, own in sets.items())
    cells = tuple(
        (named(own[0], "model"), *(share(by.get((model, name), {})) for name in sets)) for model, own in models.items()
    )
    marked = frozenset(i for i, own in enumerate(models.values()) if own[0].get("kind") == "average")
    found = [Table("Accuracy", (("Model", ""), *columns), cells, marked)]
    if differences := content.get("differences") or []:
        found.append(_differences(differences, columns, list(sets)))
    if movements := content.get("movements") or []:
        found.append(_movements(movements))
    return found


def _differences(rows: Sequence[Row], columns: Sequence[tuple[str, str]], sets: Sequence[str]) -> Table:
    # The best member is another one on each set: it is named beside the number.
    best = re.compile(r"best member \((.*)\)", re.DOTALL)
    by: dict[tuple[str, str], tuple[Row, str]] = {}
    for row in rows:
        other = text(row, "b")
        found = best.fullmatch(other)
        by["best member" if found else other, text(row, "set")] = row, found[1] if found else ""
    cells = []
    for other in dict.fromkeys(other for other, _ in by):
        own = [by.get((other, name), ({}, "")) for name in sets]
        cells.append((Cell(other), *(_difference(row, whose) for row, whose in own)))
    first = text(rows[0], "a")
    head = (("Compared with", ""), *columns)
    below = "Above 0 it is better than the other. Where the interval contains 0, no difference is shown."
    return Table(f"Accuracy: {first} minus others", head, tuple(cells), below=below)


def _difference(row: Row, whose: str) -> Cell:
    cell = measured(row, "difference", sign="+")
    return Cell(cell.words, " ".join(filter(None, (cell.aside, whose))), cell.value)


def _movements(rows: Sequence[Row]) -> Table:
    head = (("Small change", ""), ("Set", ""), ("Model", ""), ("Reward moved", "in its standard deviations"), ("n", ""))
    cells = tuple(
        (Cell(text(row, "change")), Cell(text(row, "set")), Cell(text(row, "model")), measured(row, "moved"),
         count(row, "n"))
        for row in rows
    )  # fmt: skip
    return Table("How far small changes of an answer move its reward", head, cells)


def _curve(content: Content) -> list[Table]:
    return [*([_verdicts(rows)] if (rows := content.get("verdicts") or []) else []), _middle(content)]


def _verdicts(rows: Sequence[Row]) -> Table:
    head = (
        ("Path", ""), ("Set", ""), ("Verdict", ""), ("Largest fall below the line", "points of accuracy"),
        ("Below the ensemble", "points of accuracy"), ("At lambda", ""), ("n", "pairs"),
    )  # fmt: skip
    cells = tuple(
        (Cell(text(row, "path")), Cell(text(row, "set")), Cell(text(row, "verdict"), verdict=True),
         points(row, "barrier"), points(row, "below_ensemble", "below_ensemble_"), numeral(row, "at", "g"),
         count(row, "n"))
        for row in rows
    )  # fmt: skip
    return Table("Does accuracy hold along the line?", head, cells)


def _middle(content: Content) -> Table:
    middle = []
    for path, own in groups(content.get("rows") or [], "path").items():
        for name, rows in groups(own, "set").items():
            row = min(rows, key=lambda row: abs(place(row, "lambda") - 0.5))
            middle.append(
                (Cell(path), Cell(name), numeral(row, "lambda", "g"), share(row, "wa", "wa_"),
                 share(row, "ens", "ens_"), numeral(row, "diag", ".3f"),
                 measured(row, "wa_minus_ens", "wa_minus_ens_", sign="+"), count(row, "n"))
            )  # fmt: skip
    head = (
        ("Path", ""), ("Set", ""), ("Lambda", ""), ("Average of weights", "accuracy"),
        ("Ensemble", "accuracy"), ("Straight line", "accuracy"), ("Average minus ensemble", ""), ("n", "pairs"),
    )  # fmt: skip
    return Table("In the middle of the line", head, tuple(middle))


def _vs_m(content: Content) -> list[Table]:
    head = (("Members", ""), ("Added", ""), ("Alone", "accuracy"), ("Average of weights", "accuracy"),
            ("Ensemble", "accuracy"))  # fmt: skip
    found = []
    for name, rows in groups(content.get("rows") or [], "set").items():
        cells = tuple(
            (count(row, "m"), Cell(text(row, "added")), numeral(row, "single", ".3f"), share(row, "wa", "wa_"),
             share(row, "ens", "ens_"))
            for row in rows
        )  # fmt: skip
        selected = any(flag(row, "selected_on") for row in rows)
        below = "Members were ranked on this very set, which flatters every number of it." if selected else ""
        found.append(Table(f"{name}: {sizes(rows)}", head, cells, below=below))
    return found


def _theory(content: Content) -> list[Table]:
    head = (
        ("Scenario", ""), ("Data", ""), ("Members", ""), ("Ensemble", "accuracy, simulated"), ("exactly", ""),
        ("Average of weights", "accuracy, simulated"), ("exactly", ""), ("Average minus ensemble", "simulated"),
        ("n", "trials"),
    )  # fmt: skip
    cells = tuple(
        (Cell(text(row, "scenario")), Cell(text(row, "data")), count(row, "m"), _simulated(row, "ens"),
         numeral(row, "ens_law", ".3f"), _simulated(row, "wa"), numeral(row, "wa_law", ".3f"),
         _simulated(row, "gain", "+"), count(row, "trials"))
        for row in content.get("rows") or []
        if not math.isnan(number(row, "trials"))
    )  # fmt: skip
    return [Table("Accuracy of what is made of M members", head, cells, below="One member is M = 1.")]


def _simulated(row: Row, key: str, sign: str = "") -> Cell:
    value, reach = number(row, key), 1.96 * number(row, f"{key}_se")
    return measured({"x": value, "low": value - reach, "high": value + reach}, "x", sign=sign)


_TABLES: dict[str, Callable[[Content], list[Table]]] = {
    TRAINING: _training,
    EVAL: _eval,
    CURVE: _curve,
    VS_M: _vs_m,
    BON: bon_tables,
    RL: rl_tables,
    WINRATE: winrate_tables,
    THEORY: _theory,
}
