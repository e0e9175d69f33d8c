"""What runs of `warmerge rl` show of over-optimisation, as rows and plain sentences; nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted
from warmerge.pipeline.found.rl_runs import Folder, compared, grouped, read_runs
from warmerge.pipeline.prepare import Spec
from warmerge.report.optimisation_words import comparison_words, group_words, win_words
from warmerge.report.results import without_nan
from warmerge.rewards.over_optimisation import FEW_POINTS, default_window, optimisation
from warmerge.version import versions
from warmerge.weights.foreign_json import parse, text_of

_TABLES = ("rows", "peaks", "equal_kl", "ends", "wins")


@dataclass(frozen=True)
class RlReport:
    """What `rl-report` found. Rows are plain: what is in rl-report.json and the CSV files.

    A row with `run` is one run; where `run` is None it is the group's: the mean over its runs, with `_low`, `_high`
    and mostly `_sd`. `rows`: smoothed curves; `peaks`: of the control reward, and its collapse; `equal_kl`: gains where
    a KL is first reached; `ends`: at the last step; `wins`: win rates as they were given. `words`: a paragraph each.
    """

    rows: tuple[dict[str, Any], ...]
    peaks: tuple[dict[str, Any], ...]
    equal_kl: tuple[dict[str, Any], ...]
    ends: tuple[dict[str, Any], ...]
    wins: tuple[dict[str, Any], ...]
    words: tuple[str, ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        tables = {name: list(getattr(self, name)) for name in _TABLES}
        words = {"words": list(self.words), "warnings": [str(w) for w in self.warnings]}
        content: dict[str, Any] = without_nan({**self.record, **words, **tables})
        return content


def summary(
    folders: Sequence[Spec],
    where: str,
    *,
    smooth: int | None = None,
    margin: float = 0.5,
    winrates: Sequence[Spec] = (),
    command: Sequence[str] = (),
) -> RlReport:
    """Sets runs beside each other: control and proxy reward against steps and KL, peaks, collapses, gains at equal KL.

    Args:
        where: what doubts about the runs as a whole are said of.
        folders, smooth, margin, winrates: as in `warmerge.rl_report`.

    Raises:
        UsageError: a `smooth` that cannot be used.
        RefusedError: with all that is wrong with any of the runs or win rates.
    """
    read = read_runs(folders)
    wins = read_wins(winrates)
    groups = grouped(read.folders)
    window = _window(read.folders, smooth)
    tables = optimisation({name: [folder.run for folder in own] for name, own in groups.items()}, window, margin)
    warnings, notes = compared(groups, where)
    notes = [*_rules(read.folders, window, margin), *read.notes, *notes, *_shortened(groups)]
    record = {
        "format": "warmerge rl-report 1",
        "command": list(command),
        "versions": versions(),
        "smooth": window,
        "margin": margin,
        "runs": [_run_record(name, folder) for name, own in groups.items() for folder in own],
        "winrates": [str(path) for path in winrates],
        "notes": notes,
    }
    words = [group_words(name, tables.peaks, tables.ends, margin) for name in groups]
    words += comparison_words(tables.peaks, tables.equal_kl) + win_words(wins)
    return RlReport(
        tables.rows, tables.peaks, tables.equal_kl, tables.ends, tuple(wins), tuple(words),
        (*read.warnings, *warnings), record,
    )  # fmt: skip


def _window(folders: Sequence[Folder], smooth: int | None) -> int:
    shortest = min((folder.run for folder in folders), key=lambda run: len(run.points))
    points = len(shortest.points)
    if smooth is None:
        # A run that has only begun does not decide how all others are smoothed, but must have a curve too.
        finished = [len(folder.run.points) for folder in folders if folder.record["finished"]]
        half = points // 2
        return min(default_window(min(finished, default=points)), max(1, half - (half % 2 == 0)))
    if smooth < 1 or smooth % 2 == 0:
        raise UsageError(f"--smooth: expected an odd number of 1 or more, found {smooth}")
    if smooth >= points:
        found = f"{plain(shortest.name)} has the control reward of {points} steps"
        raise UsageError(f"--smooth: expected fewer than {points}, found {smooth}: {found}")
    return smooth


def _rules(folders: Sequence[Folder], window: int, margin: float) -> list[str]:
    """How the numbers were made, as a reader has to know."""
    rules = [
        "gains are in standard deviations of the start policy's answers (those of the first measured step)",
        f"each point is a mean of {window} measured steps, and stands at the middle one; the first such mean is the "
        "start, and at the ends nothing is filled in"
        if window > 1
        else "nothing is smoothed; the first measured step is the start",
        "a peak is the largest of many noisy means, and so a little too high; gains of less than 3 standard errors are "
        f"not counted as gains (with fewer than {FEW_POINTS} measured steps these errors are not known)",
        f"a collapse is the first step after the peak with less than {1 - margin:.0%} of its gain"
        if margin < 1
        else "a collapse is the first step after the peak that has lost more than the margin",
    ]
    if len(folders) > 1:
        rules.append("at equal steps the policy that moved least looks best: compare at equal KL")
    late = {folder.run.points[0]["step"] for folder in folders} - {1}
    if late:
        rules.append(f"the control reward is first measured at step {max(late)}: gains leave out what came before")
    return rules


def _shortened(groups: Mapping[str, Sequence[Folder]]) -> list[str]:
    """Groups whose runs do not all have the same measured steps."""
    notes = []
    for name, own in groups.items():
        steps = {tuple(point["step"] for point in folder.run.points) for folder in own}
        if len(steps) > 1:
            notes.append(f"{plain(name)}: its mean line has only the steps that all its runs have")
    return notes


def _run_record(group: str, folder: Folder) -> dict[str, Any]:
    record, steps = folder.record, folder.run.steps
    kept = ("policy", "prompts", "control", "proxy", "settings", "finished")
    return {
        "run": folder.run.name, "group": group, "seed": folder.seed, "steps": len(steps),
        "points": len(folder.run.points), **{key: record[key] for key in kept},
    }  # fmt: skip


# --- win rates ------------------------------------------------------------------------------------------------------


def read_wins(paths: Sequence[Spec]) -> list[dict[str, Any]]:
    """The rows of results of `warmerge winrate`, each with its `file`.

    Raises:
        RefusedError: with all that is wrong with any of them.
    """
    rows, findings = [], []
    for path in dict.fromkeys(map(str, paths)):
        try:
            found = [dict(row) for row in parse(text_of(Path(path)))["rows"]]
        except (OSError, ValueError) as error:
            what = f"cannot be read as a result of warmerge winrate: {getattr(error, 'strerror', None) or error}"
            findings.append(Finding(path, what))
            continue
        except (TypeError, KeyError):
            findings.append(Finding(path, "cannot be read as a result of warmerge winrate: JSON with rows"))
            continue
        if not found:
            findings.append(Finding(path, "has no win rates"))
        for number, row in enumerate(found, start=1):
            faults = _win_faults(row)
            findings += [Finding(path, f"row {number}: {fault}") for fault in faults]
            if not faults:
                names = ("policy", "against", "proxy", "step", "win", "low", "high", "n")
                rows.append({"file": path, **{name: row.get(name) for name in names}})
    if findings:
        raise RefusedError(findings)
    return rows


def _win_faults(row: Mapping[str, Any]) -> list[str]:
    """What of a row cannot be what its name says. Where nothing was judged there is no win rate, and no interval."""
    faults = []
    for key in ("policy", "against", "proxy"):
        value = row.get(key)
        if not (isinstance(value, str) and value) and not (key == "proxy" and value is None):
            faults.append(f"expected a name for {key!r}, found {quoted(str(value))}")
    for key in ("win", "low", "high"):
        value = row.get(key)
        if value is not None and not (_is_number(value) and 0 <= value <= 1):
            faults.append(f"expected a fraction from 0 to 1 for {key!r}, found {quoted(str(value))}")
    for key in ("n", "step"):
        value = row.get(key)
        if not (_is_number(value) and isinstance(value, int) and value >= 0) and not (key == "step" and value is None):
            faults.append(f"expected a whole number for {key!r}, found {quoted(str(value))}")
    ends = [row[key] for key in ("low", "win", "high") if row.get(key) is not None]
    if not faults and ends != sorted(ends):
        faults.append(f"expected low <= win <= high, found {' and '.join(map(str, ends))}")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
