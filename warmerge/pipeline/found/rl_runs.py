"""What `warmerge rl` left in its folders, read strictly, and which of these runs belong together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, plain, quoted
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.reinforce.settings import FREE
from warmerge.rewards.over_optimisation import Run
from warmerge.weights.foreign_json import finite, parse, text_of

RECORD, ROWS, FORMAT = "rl.json", "rows.jsonl", "warmerge rl 1"
# Needed on every step, and of the control reward where it was measured.
_NEEDED = ("proxy", "proxy_std", "kl_sequence", "length", "truncated")
_CONTROL = ("control", "control_std")
# What must be alike for runs to be compared; the proxy's own settings stand beside those of the run.
_SHARED = ("control", "policy", "prompts")
# What runs of a group may differ in: the seed, and what changes nothing of the run but for rounding.
_FREE = ("seed", *FREE)
_OF_PROXY = ("kind", "aggregate", "k", "standardize")


@dataclass(frozen=True)
class Folder:
    """One run: its rl.json, and what is measured of it."""

    path: Path
    record: dict[str, Any]
    run: Run

    @property
    def seed(self) -> int:
        return int(self.record["settings"]["seed"])

    @property
    def settings(self) -> dict[str, str]:
        """All that the runs of a group have in common beside the proxy's name, each value as text."""
        own = {key: value for key, value in self.record["settings"].items() if key not in _FREE}
        own |= {f"proxy {key}": self.record["proxy"].get(key) for key in _OF_PROXY}
        return {key: _words(value) for key, value in own.items()}


@dataclass(frozen=True)
class Read:
    """All runs, reasons for doubt, and what else is to be said."""

    folders: list[Folder]
    warnings: list[Finding]
    notes: list[str]


def read_runs(folders: Sequence[Spec]) -> Read:
    """The runs in these folders: each that has an rl.json, or else its direct children that have one.

    Raises:
        RefusedError: with all that is wrong with any of them, and runs that are the same one.
    """
    findings: list[Finding] = []
    warnings: list[Finding] = []
    found: dict[Path, Path] = {}
    notes = []
    for path in (run for folder in folders for run in _runs_in(Path(folder), findings)):
        if found.setdefault(path.resolve(), path) is not path:
            notes.append(f"{plain(str(path))} was named twice, and is taken once")
    read = [folder for path in found.values() if (folder := _read(path, findings, warnings)) is not None]
    first: dict[str, Path] = {}
    for folder in read:
        other = first.setdefault(json.dumps(folder.record["asked"], sort_keys=True), folder.path)
        if other is not folder.path:
            findings.append(Finding(str(folder.path), f"is the same run as {plain(str(other))}; name it once"))
    if findings:
        raise RefusedError(findings)
    return Read(read, warnings, notes)


def _runs_in(folder: Path, findings: list[Finding]) -> list[Path]:
    if not folder.is_dir():
        findings.append(Finding(str(folder), "is no folder; name one that warmerge rl wrote"))
        return []
    # A folder with steps and no record is a run too: it is refused when it is read.
    if any((folder / name).is_file() for name in (RECORD, ROWS)):
        return [folder]
    children = sorted(folder.iterdir(), key=lambda child: _natural(child.name))
    runs = [child for child in children if any((child / name).is_file() for name in (RECORD, ROWS))]
    if not runs:
        findings.append(
            Finding(str(folder), f"has no {RECORD}, and no folder in it has; name one that warmerge rl wrote")
        )
    return runs


def _natural(name: str) -> list[tuple[int, str]]:
    """An order in which run-10 comes after run-2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def grouped(folders: Sequence[Folder]) -> dict[str, list[Folder]]:
    """Runs that differ in nothing but their seed, what that seed's world is, and their models; by the group's name.

    The name is the proxy's, and what of the settings tells groups apart.
    """
    groups: dict[tuple[str, str], list[Folder]] = {}
    for folder in folders:
        key = folder.run.proxy, json.dumps(folder.settings, sort_keys=True)
        groups.setdefault(key, []).append(folder)
    named = {}
    first = list(dict.fromkeys(folder.run.proxy for folder in folders))
    # Those of one proxy beside each other, by their KL coefficient.
    for own in sorted(groups.values(), key=lambda own: (first.index(own[0].run.proxy), own[0].run.kl_coef)):
        alike = [other[0] for other in groups.values() if other[0].run.proxy == own[0].run.proxy]
        different = {key for key, value in own[0].settings.items() if any(o.settings.get(key) != value for o in alike)}
        different |= {key for other in alike for key in other.settings.keys() - own[0].settings.keys()}
        if len({folder.run.kl_coef for folder in folders}) > 1:
            different.add("kl_coef")
        in_order = sorted(different, key=lambda key: (key != "kl_coef", key))
        words = [f"{'KL' if key == 'kl_coef' else key} {_setting(own[0], key)}" for key in in_order]
        named[", ".join([own[0].run.proxy, *words])] = own
    return named


def compared(groups: dict[str, list[Folder]], where: str) -> tuple[list[Finding], list[str]]:
    """Warnings of what makes runs incomparable, and notes of what differs between seeds, as it may."""
    warnings, notes = [], []
    folders = [folder for own in groups.values() for folder in own]
    for key in _SHARED:
        values = list(dict.fromkeys(folder.record[key] for folder in folders))
        if len(values) == 1:
            continue
        shown = _some(values)
        by_seed = len({(folder.seed, folder.record[key]) for folder in folders}) == len({f.seed for f in folders})
        if by_seed and all({folder.record[key] for folder in own} == set(values) for own in groups.values()):
            notes.append(f"{key} differs between seeds, and is the same for all runs of a seed: {shown}")
        else:
            warnings.append(Finding(where, f"runs cannot be compared: {key} differs between them: {shown}"))
    keys = dict.fromkeys(key for own in groups.values() for key in own[0].settings)
    for key in keys:
        if key == "kl_coef" or key.startswith("proxy "):
            continue
        values = list(dict.fromkeys(_setting(own[0], key) for own in groups.values()))
        if len(values) > 1:
            warnings.append(Finding(where, f"runs cannot be compared: {key} differs between them: {_some(values)}"))
    for name, own in groups.items():
        if len({json.dumps(folder.record["proxy"]["checkpoints"]) for folder in own}) > 1:
            notes.append(f"{plain(name)}: the proxy's checkpoints differ between its runs")
        if len({folder.seed for folder in own}) < len(own):
            notes.append(f"{plain(name)}: some of its runs have the same seed")
    return warnings, notes


def _words(value: Any) -> str:
    """A setting as text: 0 and 0.0 are the same."""
    if _is_number(value):
        return format(value, ".12g")
    return plain(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _setting(folder: Folder, key: str) -> str:
    return folder.settings.get(key, "not given")


def _some(values: Sequence[Any], most: int = 4) -> str:
    words = [plain(str(value)) for value in values[:most]]
    return " and ".join(words) + (f" and {len(values) - most} more" if len(values) > most else "")


# --- one folder -----------------------------------------------------------------------------------------------------


def _read(path: Path, findings: list[Finding], warnings: list[Finding]) -> Folder | None:
    """A run; None, and why, where it cannot be used."""
    before = len(findings)
    record = _record(path / RECORD, findings)
    finished = bool(record and record["finished"])
    steps = _steps(path / ROWS, finished, findings, warnings)
    if record is None or len(findings) > before:
        return None
    settings = record["settings"]
    run = Run(str(path), record["proxy"]["name"], float(settings["kl_coef"]), steps)
    fault = _unusable(run.points)
    if finished and len(steps) != settings["steps"]:
        fault = f"ends at step {len(steps)} of {settings['steps']}, but {RECORD} says that the run is finished"
    if fault is not None:
        findings.append(Finding(str(path / ROWS), fault))
        return None
    if not finished:
        warnings.append(Finding(str(path), f"is not finished: its last step is {len(steps)} of {settings['steps']}"))
    return Folder(path, record, run)


def _unusable(points: Sequence[dict[str, Any]]) -> str | None:
    """Why no curve can be made of the steps that have a control reward, if that is so."""
    if len(points) < 2:
        found = "one step with a control reward" if points else "no control reward at all"
        return f"has {found}, expected two steps or more; run warmerge rl with --control"
    for key in ("proxy_std", "control_std"):
        if (std := points[0][key]) <= 0:
            return f"line {points[0]['step']}: expected {key!r} above 0, in which gains are counted, found {std}"
    return None


def _record(path: Path, findings: list[Finding]) -> dict[str, Any] | None:
    """rl.json; None, and why, where something needed is missing."""
    where = str(path)
    try:
        record = _json(text_of(path))
    except FileNotFoundError:
        findings.append(Finding(where, "is missing; it is written by warmerge rl, beside its rows"))
        return None
    except OSError as error:
        findings.append(Finding(where, f"cannot be read: {error.strerror}"))
        return None
    except ValueError as error:
        findings.append(Finding(where, f"is not JSON: {error}"))
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        findings.append(Finding(where, f"expected the format {FORMAT!r}, found {quoted(str(found))}"))
        return None
    missing = []
    for name, fits, kind in _RECORD_FIELDS:
        value: Any = record
        for part in name.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
        if not fits(value):
            found = "nothing" if value is _MISSING else quoted(str(value))
            missing.append(Finding(where, f"expected {kind} for {name!r}, found {found}"))
    findings += missing
    return None if missing else record


def _steps(path: Path, finished: bool, findings: list[Finding], warnings: list[Finding]) -> list[dict[str, Any]]:
    """The rows of all steps. Of a run that still goes on, a last line that is half written is left out, and said."""
    try:
        text = text_of(path)
    except FileNotFoundError:
        findings.append(Finding(str(path), f"is missing; it is written by warmerge rl, beside {RECORD}"))
        return []
    except UnicodeDecodeError as error:
        findings.append(Finding(str(path), f"is not UTF-8: {error}"))
        return []
    except (OSError, ValueError) as error:
        findings.append(Finding(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}"))
        return []
    *lines, last = text.split("\n")
    if last and finished:
        lines.append(last)
    elif last:
        warnings.append(Finding(str(path), f"line {len(lines) + 1} is not written to its end, and is left out"))
    rows: list[dict[str, Any]] = []
    expected = 1
    for number, line in enumerate(lines, start=1):
        row, fault = _row(line, expected)
        if fault is not None:
            findings.append(Finding(str(path), f"line {number} {fault}"))
        # After a gap go on from there: one missing step is one finding.
        expected = 1 + (row["step"] if _is_whole(row.get("step")) else expected)
        rows.append(row)
    return rows


def _row(line: str, expected: int) -> tuple[dict[str, Any], str | None]:
    """The row of a step, and what is wrong with it."""
    try:
        row = _json(line)
    except ValueError as error:
        return {}, f"is not JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"is no JSON object: {quoted(line[:40])}"
    if row.get("step") != expected:
        return row, f"has step {row.get('step')!r}, expected {expected}: steps are 1, 2, ... without a gap"
    control = _CONTROL if any(row.get(key) is not None for key in _CONTROL) else ()
    for key in (*_NEEDED, *control):
        if not _is_number(row.get(key)):
            found = "nothing" if key not in row else quoted(str(row[key]))
            return row, f"expected a number for {key!r}, found {found}"
    return {"control": None, **row}, None


def _json(text: str) -> Any:
    return parse(text, parse_constant=finite)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_MISSING = object()
_RECORD_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("finished", lambda value: isinstance(value, bool), "true or false"),
    ("policy", _is_text, "a name"),
    ("prompts", _is_text, "a name"),
    ("control", lambda value: value is None or _is_text(value), "a name or null"),
    ("proxy.name", _is_text, "a name"),
    ("proxy.checkpoints", lambda value: isinstance(value, list), "a list"),
    ("settings.steps", _is_whole, "a whole number"),
    ("settings.seed", _is_whole, "a whole number"),
    ("settings.kl_coef", _is_number, "a number"),
    ("asked", lambda value: isinstance(value, dict), "an object"),
)
