"""theory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.shared import Debug, Json, Overwrite, errors, numbers, table, warn
from warmerge.cli.tables import print_json
from warmerge.errors import UsageError, counted, plain, quoted

if TYPE_CHECKING:
    from warmerge.pipeline.theory import Theory
    from warmerge.rewards.feature_theory import FeatureGroup, Scenario

_SIGNS = {"flips": -1, "vanishes": 0}


def theory(
    members: Annotated[
        str, typer.Option(metavar="M,M,...", help="Numbers of members to simulate, with commas between them.")
    ] = "2,6,10",
    layers: Annotated[
        int,
        typer.Option(metavar="L", help="Layers of a net (the paper's Remark 4); 2: features and a head, its Eq. 5."),
    ] = 2,
    noise: Annotated[
        float, typer.Option(metavar="SIGMA", help="Standard deviation of inputs about their features (of norm 1).")
    ] = 1.0,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COUNT,p=P",
            help="So many features that a run learns with this probability; add ,norm=Z for their length, ,flips or "
            ",vanishes for what becomes of them out of distribution. Repeatable. Three scenarios, if not given.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", help="How often the runs are drawn.")] = 2000,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", rich_help_panel="Output", help="Folder for numbers and figure; only printed, if not given."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Why average weights rather than rewards? WARM's section 4.3, simulated beside its closed form, in seconds.

    Runs learn features by chance. An ensemble counts each as often as it is learned (p), an average of the weights of
    many as p^2: it drops what few runs learn, be that noise or not, and trusts what all do, be that right or not.
    Examples:

    warmerge theory

    warmerge theory -o theory --features task=12,p=0.5 --features length=4,p=1,flips --members 2,6,20
    """
    with errors(debug):
        from warmerge.pipeline.theory import SCENARIOS, simulate_theory

        found = simulate_theory(
            out, scenarios=[_scenario(features)] if features else SCENARIOS, members=_whole(members), layers=layers,
            noise=noise, trials=trials, seed=seed, overwrite=overwrite, command=["warmerge", *sys.argv[1:]],
        )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            print_theory(found, out)


def _whole(text: str) -> list[int]:
    found = numbers("--members", text) or ()
    if any(not value.is_integer() for value in found):
        raise UsageError(f"--members: expected whole numbers with commas between them, found {quoted(text)}")
    return [int(value) for value in found]


def _scenario(features: list[str]) -> Scenario:
    from warmerge.rewards.feature_theory import Scenario

    return Scenario("the given features", tuple(_group(text) for text in features))


def _group(text: str) -> FeatureGroup:
    """A group of features from NAME=COUNT,p=P[,norm=Z][,flips|,vanishes]."""
    from warmerge.rewards.feature_theory import FeatureGroup

    first, *rest = text.split(",")
    name, _, count = first.rpartition("=")
    signs = [_SIGNS[part] for part in rest if part in _SIGNS]
    pairs = [part.partition("=") for part in rest if part not in _SIGNS]
    given = {key: value for key, _, value in pairs}
    known = name and "p" in given and given.keys() <= {"p", "norm"} and len(given) == len(pairs) and len(signs) <= 1
    try:
        if not known:
            raise ValueError(text)
        return FeatureGroup(name, int(count), float(given["p"]), float(given.get("norm", 1)), *signs)
    except ValueError:
        form = "NAME=COUNT,p=P, then ,norm=Z and ,flips or ,vanishes as you like"
        raise UsageError(f"--features: expected {form}, as in length=4,p=1,flips; found {quoted(text)}") from None


def print_theory(found: Theory, out: Path | None) -> None:
    """Coefficients and accuracies as tables, words, notes, and where results were written."""
    sizes, layers = found.record["members"], found.record["layers"]
    typer.echo("\nIn all tables: simulated (exact)")
    typer.echo(f"\nExpected coefficient of a feature, {counted(layers, 'layer')}:")
    by_p: dict[float, list[Mapping[str, Any]]] = {}
    for row in found.coefficients:
        by_p.setdefault(row["p"], []).append(row)
    chosen = [rows for p, rows in by_p.items() if p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    columns = ["learned with p", "ENS, any M", *(f"WA, M = {m}" for m in sizes), "WA, M -> inf"]
    table(
        columns,
        [[f"{rows[0]['p']:g}", _both(rows[-2], "ens"), *(_both(row, "wa") for row in rows)] for rows in chosen],
    )
    for name in dict.fromkeys(row["scenario"] for row in found.rows):
        _print_scenario(name, found)
    for words in found.words:
        typer.echo(words)
    for note in found.record["notes"]:
        typer.echo(f"note: {note}")
    trials = found.record["trials"]
    typer.echo(f"+-: standard error, from {trials:,} draws of what runs learn (seed {found.record['seed']})")
    if out is not None:
        typer.echo(plain(str(out)))


def _print_scenario(name: str, found: Theory) -> None:
    """Accuracies of the M that were simulated, and as M -> inf; in and out of distribution."""
    from warmerge.pipeline.theory import IN, OUT, gain_text

    groups = [row for row in found.features if row["scenario"] == name]
    typer.echo(f"\n{plain(name)}: {'; '.join(_group_words(row) for row in groups)}")
    own = {(row["data"], row["m"]): row for row in found.rows if row["scenario"] == name}
    cells = []
    for inside, outside in ((row, own[OUT, m]) for (data, m), row in own.items() if data == IN):
        if inside["ens"] is None and inside["m"] is not None:
            continue
        accuracies = [_both(row, model) for row in (inside, outside) for model in ("ens", "wa")]
        gain = outside["gain_law"] if outside["gain"] is None else outside["gain"]
        size = "-> inf" if inside["m"] is None else str(inside["m"])
        cells.append([size, *accuracies, gain_text(gain, outside["gain_se"])])
    columns = ["accuracy, M", "in distribution: ENS", "WA", "out of distribution: ENS", "WA", "WA minus ENS"]
    table(columns, cells)


def _group_words(row: Mapping[str, Any]) -> str:
    worth = {1: "", -1: ", flips", 0: ", vanishes"}[row["sign"]]
    norm = "" if row["norm"] == 1 else f", norm {row['norm']:g}"
    return f"{row['count']} {plain(row['features'])} (p {row['p']:g}{norm}{worth})"


def _both(row: Mapping[str, Any], name: str) -> str:
    exact = f"({row[f'{name}_law']:.3f})"
    return exact if row[name] is None else f"{row[name]:.3f} {exact}"
