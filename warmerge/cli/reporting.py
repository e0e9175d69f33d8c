"""rl-report, report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.shared import Debug, Json, Overwrite, errors, table, warn
from warmerge.cli.tables import print_json
from warmerge.errors import plain

if TYPE_CHECKING:
    from warmerge.pipeline.rl_report import RlReport


def rl_report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR", help="Runs of warmerge rl, or folders that have such runs in them.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", rich_help_panel="Output", help="Folder for numbers, words and figures."),
    ],
    smooth: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Measured steps in a moving mean. An odd number; 1 smooths nothing. "
            "If not given, a twentieth of those of the shortest finished run.",
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(metavar="SHARE", help="A collapse has lost more than this share of the gain at the peak.")
    ] = 0.5,
    winrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Results of warmerge winrate (JSON), to show beside. Repeatable."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What optimised policies show: when does the control reward fall while the proxy still rises?

    Runs that differ only in their seed are one group. Gains are in standard deviations of the start policy's answers.
    Groups are compared at equal KL. One run of each is little: give several seeds. Examples:

    warmerge rl-report runs/rl -o report

    warmerge rl-report rl/warm-0 rl/warm-1 rl/single-0 rl/single-1 --winrate wins/winrate.json -o report
    """
    with errors(debug):
        from warmerge.pipeline.rl_report import rl_report as set_beside

        found = set_beside(
            folders, out, smooth=smooth, margin=margin, winrates=winrate or (), overwrite=overwrite,
            command=["warmerge", *sys.argv[1:]],
        )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            print_rl_report(found, out)


def print_rl_report(found: RlReport, out: Path) -> None:
    """Peaks, gains at equal KL, ends; then the words, notes, and where all of it is."""
    ends = {(row["group"], row["run"]): row for row in found.ends}
    columns = [
        "",
        "peak at step",
        "at KL",
        "control gain",
        "collapse at step",
        "control at end",
        "proxy at end",
        "KL at end",
        "outcome",
    ]
    cells = []
    for row in _groups_first(found.peaks):
        end = ends[row["group"], row["run"]]
        cells.append(
            [
                _name(row), f"{row['step']:.0f}", f"{row['kl']:.2f}", _gain(row), _collapse(row), _gain(end),
                f"{end['proxy_gain']:+.2f}", f"{end['kl']:.2f}", row["outcome"],
            ]
        )  # fmt: skip
    typer.echo("\nGains in standard deviations of the start policy's answers (+-: standard deviation over runs):")
    table(columns, cells)
    if found.equal_kl:
        typer.echo("Control gain where a KL (nats per answer) is first reached:")
        kls = list(dict.fromkeys(row["at_kl"] for row in found.equal_kl))
        by_run: dict[str, list[str]] = {}
        for row in _groups_first(found.equal_kl):
            by_run.setdefault(_name(row), []).append(_gain(row))
        table(["", *(f"{kl:g}" for kl in kls)], [[name, *values] for name, values in by_run.items()])
    for words in found.words:
        typer.echo(words)
    for note in found.record["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(plain(str(out)))


def _groups_first(rows: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """A group's row before those of its runs; of a group of one run the group's row alone."""
    groups = dict.fromkeys(row["group"] for row in rows)
    own = {group: [row for row in rows if row["group"] == group] for group in groups}
    shown = []
    for mine in own.values():
        shown += [row for row in mine if row["run"] is None]
        shown += [row for row in mine if row["run"] is not None] if mine[-1]["runs"] > 1 else []
    return shown


def _name(row: Mapping[str, Any]) -> str:
    return f"  {plain(row['run'])}" if row["run"] is not None else f"{plain(row['group'])} (n = {row['runs']})"


def _gain(row: Mapping[str, Any]) -> str:
    sd = row.get("control_gain_sd")
    return f"{row['control_gain']:+.2f}" + ("" if sd is None else f" +- {sd:.2f}")


def _collapse(row: Mapping[str, Any]) -> str:
    if row["collapse_step"] is None:
        return "none"
    of = row.get("collapse_step_runs", 1)
    return f"{row['collapse_step']:.0f}" + (f" ({of} of {row['runs']})" if of < row["runs"] else "")


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Folders with results anywhere beneath them.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", rich_help_panel="Output", help="The page to write: one file of HTML.")
    ] = Path("report.html"),
    title: Annotated[
        str | None, typer.Option(help="Title of the page; made of the folders' names if not given.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One page of all results: what train, eval, lmc-curve, bon, rl-report, winrate and theory left in some folders.

    The page is one file that needs no network: numbers with their intervals, figures drawn from the rows, and what of
    the paper they agree with. Runs of warmerge rl are summarised as rl-report does it. Examples:

    warmerge report results

    warmerge report runs results lmc --title "Our reward models" -o report.html
    """
    with errors(debug):
        from warmerge.pipeline.report import write_report
        from warmerge.report.claims import in_words

        found = write_report(folders, out, title=title, overwrite=overwrite, command=["warmerge", *sys.argv[1:]])
        for remark in found.remarks:
            typer.echo(f"note: {remark}", err=True)
        if as_json:
            print_json(found.as_json())
            return
        table(["folder", "result"], [[folder, kind] for folder, kind in found.results])
        typer.echo(in_words(found.claims))
        typer.echo(plain(str(out)))
