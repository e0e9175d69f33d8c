"""Results in a folder: one JSON file with everything, its rows as CSV, figures drawn from the rows at any time."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warmerge.errors import UsageError, WarmergeError, naming, plain
from warmerge.locks import take_lock
from warmerge.report.best_of_n import best_of_n_figure
from warmerge.report.figures import eval_figure, lmc_figure, vs_m_figure
from warmerge.report.learning import learning_figure
from warmerge.report.optimisation import optimisation_figure
from warmerge.report.rows import too_many
from warmerge.report.theory import theory_figure
from warmerge.report.win_rates import win_rate_figure

# Of a result's JSON file, in bytes: a hundred times what any command writes.
_LARGEST = 100_000_000
# What each kind of result is: its JSON file's stem, its tables; what draws it, and from which of them.
EVAL, CURVE, VS_M, TRAINING, BON = "eval", "curve", "vs_m", "training", "bon"
RL = "rl-report"
WINRATE = "winrate"
THEORY = "theory"
# KIND.json while it is not yet to be found.
_NUMBERS = "numbers"
# How long to wait for another command that writes the same results; it draws its figures meanwhile.
_LOCK_SECONDS, _POLL_SECONDS = 60.0, 0.1
_TABLES = {
    EVAL: ("rows", "differences", "movements"),
    CURVE: ("rows", "verdicts"),
    VS_M: ("rows",),
    TRAINING: ("rows", "members", "accuracies"),
    BON: ("rows", "differences", "wins", "peaks", "fits", "proxies"),
    RL: ("rows", "peaks", "equal_kl", "ends", "wins"),
    WINRATE: ("rows", "pairs", "policies"),
    THEORY: ("rows", "coefficients", "features"),
}
_FIGURES: dict[str, tuple[Callable[..., list[Path]], tuple[str, ...]]] = {
    EVAL: (eval_figure, ("rows",)),
    CURVE: (lmc_figure, ("rows",)),
    VS_M: (vs_m_figure, ("rows",)),
    TRAINING: (learning_figure, ("rows", "accuracies")),
    BON: (best_of_n_figure, ("rows", "wins")),
    RL: (optimisation_figure, ("rows", "peaks", "wins")),
    WINRATE: (win_rate_figure, ("rows",)),
    THEORY: (theory_figure, ("rows", "coefficients", "features")),
}


def check_results(folder: Path, kind: str, overwrite: bool) -> None:
    """Refuses to replace results, before hours are spent on new ones.

    Raises:
        UsageError: there are results of this kind, or the path is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"-o {plain(str(folder))} is a file; name a folder")
    if (folder / f"{kind}.json").exists() and not overwrite:
        raise UsageError(f"{plain(str(folder))} holds {kind}.json already; choose another -o, or add --overwrite")


def try_results(folder: Path, kind: str) -> None:
    """Finds out whether results can be written into a folder, or where it is to be made: before hours are spent.

    Raises:
        OSError: they cannot. WarmergeError: as `only_writer`.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with only_writer(place / f"{kind}.json"):
        pass


def write_results(folder: Path, kind: str, content: Mapping[str, Any], *, overwrite: bool = True) -> list[Path]:
    """Writes KIND.json, a CSV file for each table that has rows, and the figure as PNG and SVG. Returns their paths.

    NaN becomes null in JSON and an empty cell in CSV. What an earlier run wrote of this kind is replaced or removed,
    once all numbers are on the disk: KIND.json goes first and comes back last, so that nothing of another run lies
    beside it. Where a figure cannot be drawn the numbers are there all the same.

    Args:
        overwrite: replace what is there, also what another command wrote since `check_results` was asked.

    Raises:
        WarmergeError: there are results of this kind, and not `overwrite`; the message says where the new ones are.
            Or as `only_writer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / f"{kind}.json"):
        return _write_results(folder, kind, content, overwrite)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds the lock on a file that is to be written, by another file beside it that is there only meanwhile.

    Raises:
        WarmergeError: another command has held it for a minute.
    """
    name, deadline = path.with_name(f".{path.name}.lock"), time.monotonic() + _LOCK_SECONDS
    while True:
        # Not through a link, which may lead elsewhere.
        with os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as file:
            # Who had it has removed it, and a third command may have another one of this name.
            if take_lock(file.fileno()) and name.exists() and os.path.samestat(os.stat(name), os.fstat(file.fileno())):
                try:
                    yield
                finally:
                    name.unlink(missing_ok=True)
                return
        if time.monotonic() > deadline:
            what = f"another command has been writing {plain(str(path))} for {_LOCK_SECONDS:.0f} seconds"
            raise WarmergeError(f"{what}; wait for it, and give the same command again, or choose another -o")
        time.sleep(_POLL_SECONDS)


def _write_results(folder: Path, kind: str, content: Mapping[str, Any], overwrite: bool) -> list[Path]:
    fresh = folder / f".{kind}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_text(fresh / _NUMBERS, json.dumps(without_nan(content), indent=2) + "\n")
    written = [folder / f"{kind}.json"]
    for table, name in _table_files(kind).items():
        if content.get(table):
            written.append(folder / write_text(fresh / name, csv_text(content[table])).name)
    try:
        written += [folder / path.name for path in draw(fresh, kind, content)]
    finally:
        if (folder / f"{kind}.json").exists() and not overwrite:
            os.replace(fresh / _NUMBERS, fresh / f"{kind}.json")
            what = f"another command wrote {plain(str(folder / kind))}.json meanwhile, and it is left as it is"
            raise WarmergeError(f"{what}; what was found here is in {plain(str(fresh))}: move it elsewhere")
        _publish(fresh, folder, kind)
    return written


def _publish(fresh: Path, folder: Path, kind: str) -> None:
    figures = [f"{kind}{which}{ending}" for which in ("", "-wins") for ending in (".png", ".svg")]
    for name in (f"{kind}.json", *_table_files(kind).values(), *figures):
        (folder / name).unlink(missing_ok=True)
    for path in fresh.iterdir():
        if path.name != _NUMBERS and not path.name.startswith("."):
            os.replace(path, folder / path.name)
    os.replace(fresh / _NUMBERS, folder / f"{kind}.json")
    shutil.rmtree(fresh)


def _table_files(kind: str) -> dict[str, str]:
    """Table -> the name of its CSV file."""
    return {table: f"{kind}.csv" if table == "rows" else f"{kind}-{table}.csv" for table in _TABLES[kind]}


def redraw(folder: Path) -> list[Path]:
    """Draws the figures of every result in a folder again, from the rows in its JSON files. Returns their paths.

    Raises:
        UsageError: there is no result in the folder, or one that cannot be read.
    """
    found = [kind for kind in _TABLES if (folder / f"{kind}.json").is_file()]
    if not found:
        names = ", ".join(f"{kind}.json" for kind in _TABLES)
        raise UsageError(f"{plain(str(folder))}: no results to draw; expected one of {names}")
    drawn = []
    for kind in found:
        path, where = folder / f"{kind}.json", f"{plain(str(folder / kind))}.json"
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{where} has {path.stat().st_size:,} bytes, expected {_LARGEST:,} at most")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = all(isinstance(row, dict) for row in content["rows"])
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise UsageError(f"{where} is not a result of warmerge")
        if much := too_many(kind, content):
            raise UsageError(f"{where}: {much} are more than can be read in a picture; warmerge report has tables")
        try:
            drawn += draw(folder, kind, content)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            # The file is anybody's: what a command of ours always writes may be missing, or be something else.
            raise UsageError(f"{where} is not as warmerge writes it ({type(error).__name__})") from error
    return drawn


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Rows as CSV with a header of all their columns, numbers in full precision.

    >>> csv_text([{"set": "val", "n": 3}, {"set": "a,b", "n": float("nan"), "low": 0.1}])
    'set,n,low\nval,3,\n"a,b",,0.1\n'
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> Path:
    """Writes a file that appears whole or not at all. Half a character, as in a file name, becomes an escape."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        partial.unlink(missing_ok=True)  # it may be a link that leads elsewhere, or what a run that was killed left
        with partial.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        os.replace(partial, path)
    return path


def without_nan(value: Any) -> Any:
    """The same value with null, which JSON has, in place of NaN and infinities, which it has not."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if _is_nan(value) else value


def draw(folder: Path, kind: str, content: Mapping[str, Any]) -> list[Path]:
    """Draws the figures of a result's rows into a folder. Returns their paths, a .png and a .svg of each figure."""
    figure, tables = _FIGURES[kind]
    return figure(*(content.get(table) or [] for table in tables), folder / kind)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
