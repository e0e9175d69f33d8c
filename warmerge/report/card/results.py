"""What a model card says of measurements: an eval.json and a curve.json as tables and sentences, under public names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from warmerge.errors import UsageError, some
from warmerge.report.card.text import MOST_NAMES, clean, escaped, left_out, table, without_paths
from warmerge.report.rows import Row, accuracy, ends, interval, number, sizes, text

THIS = "this model"
# A table of more columns than these is not read.
_COLUMNS = 4
# In the table of accuracies, but not among the differences.
_MORE_ENSEMBLES = tuple(f"ensemble ({how})" for how in ("mean, standardised", "median", "min, WCO", "UWO, k = 0.5"))
_VERDICTS = 8
_ORDER = ("ensemble", "average", "member", "merged", "halfway", "start", "baseline")
_HALFWAY = " half-way to start"
_BEST = re.compile(r"best member \((.*)\)", re.DOTALL)
# Sets that `eval --mask` makes of training pairs: accuracy there says nothing of new pairs.
_TRAINED_ON = re.compile(r".*\[(swapped|clean)\]", re.DOTALL)


@dataclass(frozen=True)
class Results:
    """An evaluation: its rows and differences by set and model, and what the card calls these.

    `rows`: (set, model) -> row; `differences`: (set, what this model is compared with) -> row, and of the best member
    which one it is; `sets`, `models`: name in the file -> public name, plain text.
    """

    this: str
    rows: Mapping[tuple[str, str], Row]
    differences: Mapping[tuple[str, str], tuple[Row, str]]
    sets: Mapping[str, str]
    models: Mapping[str, str]
    intervals: str
    notes: tuple[str, ...]
    notes_left_out: int


def read_results(evaluation: Mapping[str, Any], this: str, member_names: Mapping[str, str]) -> Results:
    """An eval.json for the card. Names of models that nobody called public become numbers.

    Args:
        this: which of the models in its rows is the one that the card is of.
        member_names: name in its rows -> public name.

    Raises:
        UsageError: no row is of `this`, or a row is not what `warmerge eval` writes.
    """
    rows = {(text(row, "set"), text(row, "model")): row for row in evaluation.get("rows") or []}
    names = [name for _, name in rows]
    if len(rows) != len(evaluation.get("rows") or []):
        raise UsageError("model card: expected one row for each model and set in the evaluation, found several")
    if this not in names:
        raise UsageError(f"model card: expected rows of {this!r} in the evaluation, found {some(set(names))}")
    models = _public_models(rows, this, member_names)
    differences = {}
    for row in evaluation.get("differences") or []:
        if row.get("a") == this:
            what, best = text(row, "b"), _BEST.fullmatch(text(row, "b"))
            whose = models.get(best[1], "a member") if best else ""
            differences[text(row, "set"), "best member" if best else what] = (row, whose)
    notes = _public_notes([str(note) for note in evaluation.get("notes") or []], models)
    kept = tuple(note for note in notes if note is not None)
    intervals = str(evaluation.get("intervals") or "95 %")
    return Results(this, rows, differences, public_sets(rows), models, intervals, kept, len(notes) - len(kept))


def _public_models(rows: Mapping[tuple[str, str], Row], this: str, member_names: Mapping[str, str]) -> dict[str, str]:
    found, others = {this: THIS, **{name: public for name, public in member_names.items() if name != this}}, 0
    for (_, name), row in rows.items():
        kind = row.get("kind")
        if name in found:
            continue
        if kind == "halfway" and name.removesuffix(_HALFWAY) in found:
            found[name] = f"{found[name.removesuffix(_HALFWAY)]} half-way to the start"
        elif kind == "average":
            found[name] = "uniform average of the members"
        elif kind in ("ensemble", "start", "baseline") and without_paths(name):
            found[name] = name
        else:
            others += 1
            found[name] = f"another model ({others})"
    return found


def public_sets(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The last part of each set's name, still distinct."""
    names = list(dict.fromkeys(name for name, _ in rows))
    lasts = [re.split(r"[/\\]", name)[-1].strip() or "pairs" for name in names]
    return dict(zip(names, _distinct(lasts), strict=True))


def _distinct(names: Iterable[str]) -> list[str]:
    """Each name, or the first of name-2, name-3, ... that none before it has."""
    found: dict[str, None] = {}
    reached: dict[str, int] = {}
    for name in names:
        number, chosen = reached.get(name, 1), name
        while chosen in found:
            number += 1
            chosen = f"{name}-{number}"
        reached[name], found[chosen] = number, None
    return list(found)


def _public_notes(notes: Sequence[str], models: Mapping[str, str]) -> list[str | None]:
    """Notes of `eval` with public names where they name models: "X gives every text ...", "(std X 0.93, Y 1.6)".

    None for each that may name a local file; where there are more names than are looked for, for all.
    """
    if len(models) > MOST_NAMES:
        return [None] * len(notes)
    names = "|".join(re.escape(name) for name in sorted(models, key=len, reverse=True))
    places = re.compile(rf"(?<=: )({names})(?= gives every text)|(?:(?<=\(std )|(?<=, ))({names})(?= [-+.\dea-z]+[,)])")
    return [without_paths(places.sub(lambda found: models[found[1] or found[2]], note)) for note in notes]


def index_results(results: Results) -> list[dict[str, Any]]:
    """The results of this model for a card's `model-index`, one for each set that it was not trained on."""
    own = {name: results.rows.get((name, results.this), {}) for name in _held_out(results)}
    sets = [name for name, row in own.items() if not math.isnan(accuracy(row, "accuracy"))]
    slugs = [re.sub(r"[^a-z0-9._-]+", "-", results.sets[name].lower()).strip("-._") or "pairs" for name in sets]
    found: list[dict[str, Any]] = []
    for name, kind in zip(sets, _distinct(slugs), strict=True):
        row = own[name]
        low, high = interval(row)
        spread = "" if math.isnan(low) else f"; 95 % interval {low:.3f} to {high:.3f}"
        metric = f"accuracy ({sizes([row])}{spread})"
        found.append(
            {
                "task": {"type": "text-classification", "name": "Pairwise preference accuracy"},
                "dataset": {"name": clean(results.sets[name]), "type": kind},
                "metrics": [{"type": "accuracy", "value": round(accuracy(row, "accuracy"), 4), "name": metric}],
            }
        )
    return found


def result_lines(results: Results, figure: str | None) -> list[str]:
    """The section on accuracy: what to make of the numbers, those of all models, the differences, notes."""
    against = [what for what in dict.fromkeys(what for _, what in results.differences) if what not in _MORE_ENSEMBLES]
    how = "Accuracy is the share of preference pairs whose better answer gets the higher reward (a tie counts as right)"
    lines = [f"{how}; intervals: {escaped(results.intervals)}.", "", reading(results), ""]
    for start in range(0, len(results.sets), _COLUMNS):
        sets = list(results.sets)[start : start + _COLUMNS]
        head = ["accuracy [95 % interval]", *(escaped(results.sets[key]) for key in sets)]
        lines += [*table(head, [[name, *map(cell, sets)] for name, cell in _lines_of(results)]), ""]
        if against:
            compared = [[_what(what, results), *(_difference(results, key, what) for key in sets)] for what in against]
            lines += [*table(["this model's accuracy minus that of", *head[1:]], compared), ""]
    lines += [f"![Accuracy of the models in the table]({figure})", ""] if figure else []
    lines += [f"- {escaped(note)}" for note in results.notes]
    return lines + ([left_out(results.notes_left_out, "note", "evaluation")] if results.notes_left_out else [])


def _lines_of(results: Results) -> list[tuple[str, Callable[[str], str]]]:
    """The lines of the table: what each begins with, and its cell for a set. Half-way models share one."""
    kinds = {name: str(row.get("kind")) for (_, name), row in results.rows.items()}
    places = {name: _ORDER.index(kind) if kind in _ORDER else len(_ORDER) for name, kind in kinds.items()}
    own, between = results.this, [name for name, kind in kinds.items() if kind == "halfway" and name != results.this]

    def cell(name: str) -> Callable[[str], str]:
        return lambda key: _cell(results.rows.get((key, name), {}))

    def span(key: str) -> str:
        found = [number(results.rows.get((key, name), {}), "accuracy") for name in between]
        found = [value for value in found if not math.isnan(value)]
        return f"{min(found):.3f} to {max(found):.3f}" if found else "not measured"

    lines = [("measured on", lambda key: sizes([results.rows.get((key, own), {})])), (f"**{THIS}**", cell(own))]
    others = sorted((name for name in kinds if name != own and name not in between), key=lambda name: places[name])
    lines += [(escaped(results.models[name]), cell(name)) for name in others]
    return lines + ([("members half-way to the start, lowest to highest", span)] if between else [])


def _what(what: str, results: Results) -> str:
    known = ("best member", "mean of the members", "mean of the half-way models")
    public = what if what in known else results.models.get(what, "another model")
    return escaped(public + " on that set" * (what == "best member"))


def _cell(row: Row, key: str = "accuracy", sign: str = "") -> str:
    value, (low, high) = number(row, key), interval(row)
    if math.isnan(value):
        return "not measured"
    return f"{value:{sign}.3f}" + ("" if math.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _difference(results: Results, key: str, what: str) -> str:
    row, whose = results.differences.get((key, what), ({}, ""))
    return _cell(row, "difference", "+") + (f" ({escaped(whose)})" if whose else "")


def _held_out(results: Results) -> list[str]:
    return [key for key in results.sets if not _TRAINED_ON.fullmatch(key)]


def reading(results: Results) -> str:
    """What the numbers say, in a paragraph: against a coin, the ensemble, the best member, and models pulled back."""
    held_out = _held_out(results)
    said = [_judged([(results.sets[key], results.rows.get((key, results.this), {})) for key in held_out])]
    for what, words in (
        ("ensemble (mean)", "the ensemble of its members, which costs as much as all of them"),
        ("best member", "the best member (picked on the same pairs)"),
        ("mean of the half-way models", "its members pulled half-way back to their start"),
    ):
        rows = [(results.sets[key], results.differences[key, what][0]) for key in held_out if (key, what) in
                results.differences]  # fmt: skip
        said += [_judged(rows, words)] if rows else []
    if not results.differences:
        said.append("It was not compared pair by pair: where intervals overlap, they do not say which model is better.")
    trained = [escaped(results.sets[key]) for key in results.sets if key not in held_out]
    if trained:
        said.append(
            f"{' and '.join(trained)}: pairs that the members were trained on, no measure of new ones; on "
            "\\[swapped\\] the labels were made wrong on purpose, so that less is better."
        )
    return " ".join(filter(None, said))


def _judged(rows: Sequence[tuple[str, Row]], against: str = "") -> str:
    """Better, worse or cannot tell on each set: by accuracy against a coin, or by differences from another model."""
    key, level = ("difference", 0.0) if against else ("accuracy", 0.5)
    groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for name, row in rows:
        value, (low, high) = number(row, key), interval(row)
        answer = "better" if low > level else "worse" if high < level else "undecided"
        points = _points((value, low, high), 0.0) if against else f"{value:.3f}"
        groups[answer].append(escaped(name) if math.isnan(value) else f"{escaped(name)} ({points})")
    found = [f"{answer} on {', '.join(sets)}" for answer, sets in groups.items() if sets]
    return f"Against {against or 'a coin (0.5)'}: {'; '.join(found)}." if found else ""


def _points(values: Sequence[float], level: float) -> str:
    """A fraction and its interval in points: as few decimals as keep each number on its side of a level."""

    def keeps(digits: int) -> bool:
        shown = [round(100 * value, digits) for value in values]
        return all(
            (x > level, x < level) == (y > 100 * level, y < 100 * level) for x, y in zip(values, shown, strict=True)
        )

    digits = next((d for d in (1, 2, 3) if keeps(d)), 4)
    sign = "+" if level == 0 else ""
    value, low, high = (f"{round(100 * x, digits) + 0.0:{sign}.{digits}f}" for x in values)
    return f"{value} points" + ("" if math.isnan(values[1]) else f" [{low}, {high}]")


def length_words(results: Results) -> str:
    """What was measured of the length of answers, as sentences; "" if nothing was."""
    said, sets = [], _held_out(results) or list(results.sets)
    for (key, _), row in results.rows.items():
        if row.get("kind") == "baseline" and key in sets:
            said.append(f"{_cell(row)} on {escaped(results.sets[key])}")
    words = f"Preferring the longer answer has accuracy {', '.join(said)}. " if said else ""
    own = [(key, number(results.rows.get((key, results.this), {}), "length_correlation")) for key in sets]
    spans = ", ".join(f"{value:.2f} on {escaped(results.sets[key])}" for key, value in own if not math.isnan(value))
    return words + (f"Its rewards correlate with the length of the answer: {spans}." if spans else "")


def curve_lines(curve: Mapping[str, Any], member_names: Mapping[str, str], figure: str | None) -> list[str]:
    """The section on linear mode connectivity: the figure, and each verdict rebuilt from its numbers.

    Raises:
        UsageError: a verdict that `warmerge lmc-curve` does not write.
    """
    sets = public_sets((text(row, "set"), "") for row in [*(curve.get("rows") or []), *(curve.get("verdicts") or [])])
    found: dict[str, list[str]] = {"does not hold": [], "cannot tell": [], "holds": []}
    for row in curve.get("verdicts") or []:
        answer, words = _verdict(row, sets, member_names)
        found[answer].append(f"- **{answer}** {words}")
    bullets = [bullet for group in found.values() for bullet in group]
    lines = [
        "Linear mode connectivity: is accuracy kept on the straight line between two members' weights? It holds if the "
        "whole 95 % interval of the largest fall is within the tolerance, and cannot be told if only a part is.",
        *(["", f"![Accuracy along the lines between members]({figure})"] if figure else []),
        "",
        *bullets[:_VERDICTS],
    ]
    if len(bullets) > _VERDICTS:
        counts = ", ".join(f"{answer} {len(group)}" for answer, group in found.items())
        lines.append(f"- {len(bullets) - _VERDICTS} more are not shown; in all: {counts}")
    return lines if bullets or figure else []


def _verdict(row: Row, sets: Mapping[str, str], member_names: Mapping[str, str]) -> tuple[str, str]:
    names = {"mean": "the mean of the members"} | dict(member_names)
    (first, second), unknown = ends(text(row, "path")), ("one member", "another")
    named = [escaped(names.get(end, other)) for end, other in zip((first, second), unknown, strict=True)]
    beside_ensemble = row.get("against") == "ensemble"
    loss = (number(row, "below_ensemble"), *interval({
        "low": row.get("below_ensemble_low"), "high": row.get("below_ensemble_high")
    }))  # fmt: skip
    fall = loss if beside_ensemble else (number(row, "barrier"), *interval(row))
    tolerance = number(row, "tolerance")
    answer = "holds" if fall[2] <= tolerance else "does not hold" if fall[1] > tolerance else "cannot tell"
    line = "the line between their accuracies"
    if beside_ensemble:
        line = "the ensemble of the two (the test where one end is no better than a coin)"
    words = (
        f"on {escaped(sets[text(row, 'set')])}, from {named[0]} to {named[1]}: largest fall below {line} "
        f"{_points(fall, tolerance)}; tolerance {100 * tolerance:.6g}, {sizes([row])}."
    )
    if not beside_ensemble and loss[1] > tolerance:
        words += f" Below the ensemble of the two: {_points(loss, tolerance)}; averaging weights loses what that keeps."
    return answer, words
