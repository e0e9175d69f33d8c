"""What a page shows of best-of-N, of optimised policies, and of policies against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from warmerge.report.page.cells import Cell, Table, count, measured, named, numeral, share, span
from warmerge.report.rows import Row, number, place, sizes, text

Content = Mapping[str, Any]


def bon_tables(content: Content) -> list[Table]:
    """What the choices among the most candidates are worth, a table for each reward that judges them."""
    rows = content.get("rows") or []
    largest = int(max(place(row, "n") for row in rows)) if rows else 0
    last = [row for row in rows if place(row, "n") == largest]
    targets = [target for target in ("gold", "control") if any(target in row for row in last)]
    if not targets:
        head = (("Chosen by", ""), ("Own reward", "in standard deviations above the mean"))
        cells = tuple((named(row, "proxy"), measured(row, "gain", "gain_")) for row in last)
        return [Table(_best_of(largest, last), head, cells)]
    return [_bon_target(content, target, targets[0], largest, last) for target in targets]


def _best_of(largest: int, last: Sequence[Row]) -> str:
    return f"Best of {largest}: {sizes([{'prompts': row.get('prompts')} for row in last])}"


def _bon_target(content: Content, target: str, judge: str, largest: int, last: Sequence[Row]) -> Table:
    peaks = {text(row, "proxy"): row for row in content.get("peaks") or [] if row.get("target") == target}
    minus = {
        text(row, "proxy"): row
        for row in content.get("differences") or []
        if row.get("target") == target and row.get("n") == largest
    }
    reference = next((text(row, "to") for row in minus.values()), "")
    head = [("Chosen by", ""), (f"{target.capitalize()} reward of the choice", "")]
    head += [("Difference from", reference)] if minus else []
    head += [("Highest at N", ""), ("Lost since", "reward")] if peaks else []
    head += [("Beats a random answer", "share of prompts")] if target == judge else []
    cells = []
    for row in last:
        name = text(row, "proxy")
        own = [named(row, "proxy"), measured(row, target, f"{target}_")]
        if minus:
            itself = Cell("itself" if name == reference else "")
            own.append(measured(minus[name], "difference", sign="+") if name in minus else itself)
        if peaks:
            peak = peaks.get(name, {})
            own += [measured(peak, "peak_n", "peak_", form=".0f"), measured(peak, "fall", "fall_", form=".2f")]
        own += [share(row, "win", "win_")] if target == judge else []
        cells.append(tuple(own))
    marked = frozenset(i for i, row in enumerate(last) if row.get("kind") == "warm")
    return Table(f"{_best_of(largest, last)}, judged by the {target} reward", tuple(head), tuple(cells), marked)


def rl_tables(content: Content) -> list[Table]:
    """Where the control reward was highest and how it ended, then gains at equal KL, then win rates."""
    found = [_peaks(content)]
    if equal := [row for row in content.get("equal_kl") or [] if row.get("run") is None]:
        found.append(_equal_kl(equal))
    if wins := content.get("wins") or []:
        found.append(_wins(wins))
    return found


def _peaks(content: Content) -> Table:
    ends = {text(row, "group"): row for row in content.get("ends") or [] if row.get("run") is None}
    lost = f"{number(content, 'margin'):.0%} of it lost at step" if "margin" in content else "Lost at step"
    head = (
        ("Optimised against", ""), ("Runs", "n"), ("Highest at step", ""), ("at KL", "nats"),
        ("Control gain there", ""), (lost, ""), ("Control at the end", ""), ("Proxy at the end", ""),
        ("KL at the end", "nats"), ("Outcome", ""),
    )  # fmt: skip
    cells = []
    for row in content.get("peaks") or []:
        if row.get("run") is not None:
            continue
        name = text(row, "group")
        end = ends.get(name, {})
        cells.append(
            (Cell(name), count(row, "runs"), span(row, "step", ".0f"), span(row, "kl", ".2f"),
             span(row, "control_gain", ".2f", "+"), _collapse(row), span(end, "control_gain", ".2f", "+"),
             span(end, "proxy_gain", ".2f", "+"), span(end, "kl", ".2f"), Cell(str(row.get("outcome") or "")))
        )  # fmt: skip
    below = "Means over runs, in brackets lowest to highest run: that is no 95 % interval. Gains are in standard "
    below += "deviations of the start policy's answers."
    return Table("Peak of the control reward, and the end", head, tuple(cells), below=below)


def _equal_kl(rows: Sequence[Row]) -> Table:
    kls = sorted({place(row, "at_kl") for row in rows})
    by = {(text(row, "group"), place(row, "at_kl")): row for row in rows}
    head = (("Optimised against", ""), *((f"KL {kl:g}", "nats") for kl in kls))
    names = dict.fromkeys(name for name, _ in by)
    cells = tuple((Cell(name), *(_gain_of(by.get((name, kl), {})) for kl in kls)) for name in names)
    below = "Where a KL is first reached; in brackets lowest to highest run, and of how many runs."
    return Table("Control gain at equal KL", head, cells, below=below)


def _wins(rows: Sequence[Row]) -> Table:
    head = (("Policy", ""), ("Against", ""), ("Wins", "share of prompts"), ("n", "prompts"), ("From", ""))
    cells = tuple(
        (Cell(text(row, "policy")), Cell(text(row, "against")), share(row, "win"), count(row, "n"),
         Cell(str(row.get("file") or "")))
        for row in rows
    )  # fmt: skip
    return Table("Win rates", head, cells)


def _collapse(row: Row) -> Cell:
    if math.isnan(number(row, "collapse_step")):
        return Cell("never", value=math.inf)
    cell = span(row, "collapse_step", ".0f")
    runs, of = number(row, "runs"), number(row, "collapse_step_runs")
    few = f"in {of:.0f} of {runs:.0f} runs" if of < runs else ""
    return Cell(cell.words, " ".join(filter(None, (cell.aside, few))), cell.value)


def _gain_of(row: Row) -> Cell:
    cell = span(row, "control_gain", ".2f", "+")
    runs = number(row, "runs")
    return Cell(cell.words, " ".join(filter(None, (cell.aside, f"n = {runs:.0f}"))), cell.value) if row else Cell("")


def winrate_tables(content: Content) -> list[Table]:
    """Win rates of all pairs."""
    head = (
        ("Policy", ""), ("Against", ""), ("Wins", "share of prompts; a tie is half"), ("Won, tied, lost", "prompts"),
        ("If the longer answer won", ""), ("n", "prompts"),
    )  # fmt: skip
    cells = []
    for row in content.get("rows") or []:
        counts = " · ".join(f"{number(row, key):.0f}" for key in ("wins", "ties", "losses"))
        nothing = math.isnan(number(row, "win"))
        cells.append(
            (Cell(text(row, "policy")), Cell(text(row, "against")), share(row, "win"),
             Cell("" if nothing else counts, value=number(row, "wins")), numeral(row, "length_win", ".3f"),
             count(row, "n"))
        )  # fmt: skip
    return [Table("Policies against each other", head, tuple(cells))]
