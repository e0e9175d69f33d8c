"""Results as tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from warmerge.cli.shared import table, warn
from warmerge.errors import counted, plain

if TYPE_CHECKING:
    from warmerge.pipeline.bon import BestOfN
    from warmerge.pipeline.evaluate import Evaluation
    from warmerge.pipeline.inspect import Inspection
    from warmerge.pipeline.lmc import Curve
    from warmerge.pipeline.probe import Probed
    from warmerge.pipeline.train import Trained
    from warmerge.pipeline.vs_m import AccuracyVsM
    from warmerge.weights.distances import Distances


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object; NaN, which JSON does not have, as null."""
    from warmerge.report.results import without_nan

    typer.echo(json.dumps(without_nan(content), indent=2))


def _by_set(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    return sets


def _interval(row: Mapping[str, Any], key: str, low: str = "low", high: str = "high", sign: str = "") -> str:
    return f"{row[key]:{sign}.3f} [{row[low]:{sign}.3f}, {row[high]:{sign}.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


def print_evaluation(found: Evaluation) -> None:
    """A table of models for each set, what the average gains over others, how far small changes move rewards, notes."""
    columns = [
        "model",
        "accuracy [95 %]",
        "ties",
        "reward mean",
        "reward std",
        "corr(reward, length)",
        "seconds",
        "weights MB",
    ]
    differences, movements = _by_set(found.differences), _by_set(found.movements)
    for name, rows in _by_set(found.rows).items():
        typer.echo(_heading(name, rows))
        table(
            columns,
            [
                [
                    row["model"], _interval(row, "accuracy"), str(row["ties"]), _number(row["reward_mean"], ".3g"),
                    _number(row["reward_std"], ".3g"), _number(row["length_correlation"], ".2f"),
                    _number(row["seconds"], ".1f"), _number(row["weights_bytes"] and row["weights_bytes"] / 1e6, ".0f"),
                ]
                for row in rows
            ],
        )  # fmt: skip
        if name in differences:
            typer.echo("The average's accuracy minus that of:")
            table(
                ["", "difference [95 %]"],
                [[row["b"], _interval(row, "difference", sign="+")] for row in differences[name]],
            )
        if name in movements:
            _print_movements(movements[name])
    _print_notes(found.notes, found.record)


def _print_movements(rows: Sequence[Mapping[str, Any]]) -> None:
    typer.echo("Small changes of answers move the reward by so much of its standard deviation (mean [95 %]):")
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(f"{row['change']} (n = {row['n']})", {})[row["model"]] = _interval(row, "moved")
    table(
        ["change", *map(plain, models)],
        [[change, *(by.get(model, "") for model in models)] for change, by in cells.items()],
    )


def print_curve(found: Curve) -> None:
    """WA, ENS and Diag of each path and set as sparklines of one scale, then the verdicts and notes."""
    from warmerge.report import sparkline

    cells = []
    for path in dict.fromkeys(row["path"] for row in found.rows):
        for name, rows in _by_set([row for row in found.rows if row["path"] == path]).items():
            values = [[row[key] for row in rows] for key in ("wa", "ens", "diag")]
            low, high = min(map(min, values)), max(map(max, values))
            for label, line in zip(("WA", "ENS", "Diag"), values, strict=True):
                cells.append([path, name, str(rows[0]["n"]), label, sparkline(line, low, high), *_ends(rows, line)])
    table(["path", "set", "n", "", "lambda ->", "first", "middle", "last"], cells)
    for verdict in found.verdicts:
        typer.echo(verdict["words"])
    _print_notes(found.record["notes"], found.record)


def _ends(rows: Sequence[Mapping[str, Any]], line: Sequence[float]) -> list[str]:
    middle = min(range(len(rows)), key=lambda k: abs(rows[k]["lambda"] - 0.5))
    return [f"{line[k]:.3f}" for k in (0, middle, -1)]


def print_vs_m(found: AccuracyVsM) -> None:
    """Average and ensemble of M members for each set, who was left out, notes."""
    for name, rows in _by_set(found.rows).items():
        typer.echo(_heading(name, rows))
        table(
            ["M", "added", "alone", "average [95 %]", "ensemble [95 %]"],
            [
                [str(row["m"]), row["added"], f"{row['single']:.3f}", _interval(row, "wa", "wa_low", "wa_high"),
                 _interval(row, "ens", "ens_low", "ens_high")]
                for row in rows
            ],
        )  # fmt: skip
    if found.record["left_out"]:
        typer.echo(f"left out: {', '.join(map(plain, found.record['left_out']))}")
    _print_notes(found.record["notes"], found.record)


def _print_notes(notes: Sequence[str], record: Mapping[str, Any]) -> None:
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(f"intervals: {record['intervals']}; a tie counts as right")


def _heading(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"\n{plain(name)}: n = {rows[0]['n']} comparisons of {rows[0]['prompts']} prompts"


def print_best_of_n(found: BestOfN) -> None:
    """What the choices are worth by each target, what the proxies cost, how their curves bend, notes."""
    rows, n = [row for row in found.rows if row["n"] == found.record["n"]], found.record["n"]
    candidates = counted(found.record["pool"]["candidates"], "candidate")
    typer.echo(f"\nbest of n = {n}, {counted(rows[0]['prompts'], 'prompt')}, {candidates}")
    for target in ("gold", "control"):
        if target in rows[0]:
            _print_choices(found, rows, target)
    if not {"gold", "control"} & rows[0].keys():
        cells = [[row["proxy"], _interval(row, "gain", "gain_low", "gain_high")] for row in rows if "gain" in row]
        table(["proxy", f"own reward at {n}, in std above the pool's mean [95 %]"], cells)
    made = [row for row in found.proxies if "texts_scored" in row]
    table(
        ["proxy", "texts scored", "seconds", "weights MB", "reward mean", "reward std", "corr(reward, length)"],
        [
            [row["proxy"], f"{row['texts_scored']:,}", _number(row["seconds"], ".1f"),
             _number(row["weights_bytes"] / 1e6, ".0f"), _number(row["reward_mean"], ".3g"),
             _number(row["reward_std"], ".3g"), _number(row["length_correlation"], ".2f")]
            for row in made
        ],
    )  # fmt: skip
    for fit in found.fits[:1]:
        typer.echo(f"Gao's {fit['target']}(n) - {fit['target']}(1) = d (alpha - beta d), d = sqrt(log n - (n-1)/n):")
        table(
            ["proxy", "of", "alpha [95 %]", "beta [95 %]", "rms left"],
            [
                [row["proxy"], row["target"], _interval(row, "alpha", "alpha_low", "alpha_high"),
                 _interval(row, "beta", "beta_low", "beta_high"), f"{row['rms']:.3f}"]
                for row in found.fits
            ],
        )  # fmt: skip
    for note in found.record["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"intervals: {found.record['intervals']}")
    typer.echo(f"choices of {plain(found.record['chooser'])}: {plain(str(found.chosen))}")


def _print_choices(found: BestOfN, rows: Sequence[Mapping[str, Any]], target: str) -> None:
    """What the choices are worth by one target: its curve, its value at n, against another proxy, its peak."""
    from warmerge.report import sparkline

    n, reference = rows[0]["n"], found.record["reference"]
    curves = {row["proxy"]: [r[target] for r in found.rows if r["proxy"] == row["proxy"]] for row in rows}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    minus = {row["proxy"]: row for row in found.differences if (row["target"], row["n"]) == (target, n)}
    peaks = {row["proxy"]: row for row in found.peaks if row["target"] == target}
    judge = next(name for name in ("gold", "control") if name in rows[0])
    columns = ["proxy", f"n = 1 to {n}", f"{target} at {n} [95 %]", f"minus {plain(reference)} [95 %]"]
    columns += ["highest at n [95 %]"]
    columns += ["beats a random one [95 %]"] if target == judge else []
    columns += ["regret [95 %]"] if target == judge and "regret" in rows[0] else []
    cells = []
    for row in rows:
        name, peak = row["proxy"], peaks.get(row["proxy"])
        cell = [name, sparkline(curves[name], low, high), _interval(row, target, f"{target}_low", f"{target}_high")]
        cell += [_interval(minus[name], "difference", sign="+") if name in minus else ""]
        cell += ["" if peak is None else f"{peak['peak_n']} [{peak['peak_low']}, {peak['peak_high']}]"]
        cell += [_interval(row, "win", "win_low", "win_high")] if target == judge else []
        cell += [_interval(row, "regret", "regret_low", "regret_high")] if columns[-1].startswith("regret") else []
        cells.append(cell)
    table(columns, cells)


def print_trained(found: Trained) -> None:
    """The members, best first, the start beside them, and what to do next."""
    sets = list(dict.fromkeys(row["set"] for row in found.accuracies))
    columns = ["member", "lr", "dropout", "seed", "start", "loss", "training pairs right", *sets, "seconds"]
    cells = {(row["model"], row["set"]): _interval(row, "accuracy") for row in found.accuracies}
    rows = []
    for row in found.members:
        settings = [row["member"], f"{row['lr']:g}", f"{row['dropout']:g}", str(row["seed"]), row["init"]]
        if row["failed"]:
            rows.append([*settings, "failed", "", *("" for _ in sets), ""])
            continue
        learned = [f"{row['final_loss']:.3f}", f"{row['final_accuracy']:.3f}"]
        rows.append([*settings, *learned, *(cells[row["member"], name] for name in sets), f"{row['seconds']:.0f}"])
    if found.start:
        rows.append(["start", "", "", "", "", "", "", *(cells["start", name] for name in sets), ""])
    table(columns, rows)
    for row in found.failed:
        typer.echo(f"failed: member {row['member']}: {row['failed']}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    for i, command in enumerate(found.next):
        typer.echo(f"{'next:' if i == 0 else '     '} {command}")


def print_probed(found: Probed) -> None:
    """What the new head is worth on the prompts that were held out, and where it is."""
    typer.echo(
        f"right on pairs of held-out prompts: {found.before:.3f} with the old head, {found.after:.3f} with the new one"
    )
    typer.echo(str(found.out))


def print_inspection(found: Inspection) -> None:
    """What checkpoints are, how far apart, and every reason why they would not be merged."""
    columns = ["checkpoint", "architecture", "head", "parameters", "dtype", "files", "tokenizer"]
    cells = [
        [r.checkpoint, r.architecture, r.head, f"{r.parameters:,}", r.dtype, str(r.files), r.tokenizer]
        for r in found.rows
    ]
    table(columns, cells)
    if found.distances is not None:
        _print_distances(found.distances, [row.checkpoint for row in found.rows])
    warn(found.warnings)
    for finding in found.findings:
        typer.echo(f"refused: {finding}")
    if not found.findings and len(found.rows) > 1:
        typer.echo("These checkpoints may be merged.")


def _print_distances(distances: tuple[Distances, ...], labels: list[str]) -> None:
    whole = distances[0]
    if whole.cosines is None:
        typer.echo("\nDistance |a - b| / |a|:")
        table(
            ["", *labels],
            [[label, *(f"{v:.4g}" for v in row)] for label, row in zip(labels, whole.relative, strict=True)],
        )
        typer.echo("\nPart by part, to the first member:")
        table(["part", *labels[1:]], [[d.group, *(f"{v:.4g}" for v in d.relative[0][1:])] for d in distances])
        return
    assert whole.norms is not None
    assert whole.drift is not None
    typer.echo("\nTask vectors (member - base): norm, norm / |base|, and cosines:")
    rows = zip(labels, whole.norms, whole.drift, whole.cosines, strict=True)
    table(
        ["", "norm", "drift", *labels], [[a, f"{n:.4g}", f"{d:.4g}", *(f"{c:.3f}" for c in cs)] for a, n, d, cs in rows]
    )
    typer.echo("\nDrift part by part:")
    table(["part", *labels], [[d.group, *(f"{v:.4g}" for v in d.drift or ())] for d in distances])
