"""`warmerge report`: all that the other commands left in some folders, as one page of HTML that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain
from warmerge.pipeline.found.results import FORMATS, TRAIN, Found, natural, read_result, walk
from warmerge.pipeline.found.rl_runs import RECORD, ROWS
from warmerge.pipeline.found.rl_summary import summary
from warmerge.pipeline.prepare import Spec
from warmerge.report.claims import Claim
from warmerge.report.page import Result, Section, page, section
from warmerge.report.page.places import without_places
from warmerge.report.page.words import about
from warmerge.report.results import RL, TRAINING, write_text
from warmerge.weights.foreign_json import parse, text_of

# What tells a run of `rl` from another; an rl-report that has all of it has this run.
_RUN = ("policy", "prompts", "control", "proxy", "settings")


@dataclass(frozen=True)
class Report:
    """What stands in the page. `results`: (folder, kind) of each section; `remarks`: what is not in it, and why."""

    path: Path
    title: str
    results: tuple[tuple[str, str], ...]
    claims: tuple[Claim, ...]
    remarks: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "report": str(self.path), "title": self.title,
            "results": [{"folder": folder, "kind": kind} for folder, kind in self.results],
            "claims": [asdict(claim) for claim in self.claims], "left_out": [str(remark) for remark in self.remarks],
        }  # fmt: skip


def write_report(
    folders: Sequence[Spec],
    out: Spec,
    *,
    title: str | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Report:
    """Writes one self-contained page of HTML with all results of warmerge anywhere beneath some folders.

    Figures are drawn from the rows. Runs of `warmerge rl` that none of the rl-reports has are summarised as rl-report
    does it. The same results give the same bytes.

    Args:
        folders: links in them are followed.
        out: the file to write.
        title: of the page; made of the folders' names if not given.

    Raises:
        UsageError: no results, or `out` is there already; with `overwrite` too if it is no file, or one of the results.
        RefusedError: with all results that are not warmerge's, or cannot be read.

    Example:
        >>> import warmerge
        >>> warmerge.write_report(["runs", "results"], "report.html").results  # doctest: +SKIP
        (('runs/training', 'training'), ('results', 'eval'))
    """
    out = Path(out)
    roots = _roots(folders, out, overwrite)
    findings: list[Finding] = []
    unique: dict[Path, Found] = {}
    for root, name in roots.items():
        for each in walk(root, name, findings):
            unique.setdefault(each.path.resolve(), each)
    found = list(unique.values())
    _check_is_no_result(out, found)
    read = [(each, *read_result(each, findings)) for each in found if each.path.stem in FORMATS]
    covered = {key for _, kind, content in read if kind == RL for key in _runs_of(content)}
    remarks: list[Finding] = []
    raw = [each for each in found if each.path.name == RECORD and not _is_left_out(each, covered, remarks)]
    if raw:
        read += _summarised(raw, roots, findings, command)
    _complain_of_training(found, remarks)
    if not read and not findings:
        raise UsageError(_nothing(folders, remarks))
    sections = _sections(read, roots, findings)
    if findings:
        raise RefusedError(findings)
    title = _title(roots) if title is None else title
    results = [each.result for each in sections]
    claims = tuple(claim for each in sections for claim in each.claims)
    html = page(title, sections, [str(remark) for remark in remarks])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    return Report(out, title, tuple((each.folder, each.kind) for each in results), claims, tuple(remarks))


def _roots(folders: Sequence[Spec], out: Path, overwrite: bool) -> dict[Path, str]:
    """The folders, each with what begins the names of all in it: nothing where there is only one."""
    if not folders:
        raise UsageError("no folder is given: name folders that hold results of warmerge")
    if out.is_dir():
        raise UsageError(f"-o {plain(str(out))} is a folder; name a file, such as {plain(str(out / 'report.html'))}")
    if os.path.lexists(out) and not out.is_file():
        raise UsageError(f"-o {plain(str(out))} is no regular file, and is not replaced; choose another -o")
    if out.exists() and not overwrite:
        raise UsageError(f"{plain(str(out))} is there already; choose another -o, or add --overwrite")
    roots = list(dict.fromkeys(Path(folder) for folder in folders))
    if missing := [
        Finding(str(root), "is no folder; name one that holds results") for root in roots if not root.is_dir()
    ]:
        raise RefusedError(missing)
    if len(roots) == 1:
        return {roots[0]: ""}
    parts = [root.resolve().parts[1:] for root in roots]
    for kept in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-kept:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return dict(zip(roots, names, strict=True))


def _check_is_no_result(out: Path, found: Sequence[Found]) -> None:
    """Refuses to replace what the page is made of, by whatever name, or names as the file of all rows."""
    if not out.exists():
        return
    for each in found:
        read_along = {f"{TRAINING}.json": TRAIN, RECORD: ROWS}.get(each.path.name, each.path.name)
        for path in (each.path, each.path.with_name(read_along), each.path.with_suffix(".csv")):
            if path.exists() and out.samefile(path):
                raise UsageError(f"-o {plain(str(out))} is one of the results of the page; choose another -o")


def _title(roots: Mapping[Path, str]) -> str:
    names = [root.resolve().name for root in roots]
    return f"Results of {names[0]}" if len(names) == 1 else f"Results of {len(names)} folders"


def _nothing(folders: Sequence[Spec], remarks: Sequence[Finding]) -> str:
    where = ", ".join(plain(str(folder)) for folder in folders)
    files = ", ".join(f"{kind}.json" for kind in FORMATS)
    said = "".join(f"; {remark}" for remark in remarks)
    return f"{where}: no results anywhere beneath; looked for {files}, and for runs of warmerge rl ({RECORD}){said}"


# --- sections -------------------------------------------------------------------------------------------------------


def _sections(
    read: Sequence[tuple[Found, str, dict[str, Any]]], roots: Mapping[Path, str], findings: list[Finding]
) -> list[Section]:
    """The sections in the page's order; what of a result cannot be shown is collected."""
    order = list(FORMATS)
    places = {str(where): name for root, name in roots.items() for where in (root.absolute(), root.resolve())}
    faulty = {finding.where for finding in findings}
    sections: list[Section] = []
    for found, kind, content in sorted(read, key=lambda each: (order.index(each[1]), natural(each[0].name))):
        if str(found.path) in faulty or not content:
            continue
        beside = (found.path.with_suffix(ending) for ending in (".csv", ".svg"))
        table, figure = (f"{found.name}/{path.name}" if path.is_file() else "" for path in beside)
        result = Result(found.name, kind, without_places(content, places), table, figure)
        try:
            sections.append(section(result, f"r{len(sections) + 1}"))
        except UsageError as error:
            findings.append(Finding(str(found.path), str(error).removeprefix("figure: ")))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            # The file is anybody's: what a command of ours always writes may be missing, or be something else.
            what = f"is not as warmerge {about(kind).command} writes it ({type(error).__name__}: {error})"
            findings.append(Finding(str(found.path), what))
    return sections


def _complain_of_training(found: Sequence[Found], remarks: list[Finding]) -> None:
    for each in found:
        if each.path.name == TRAIN and not each.path.with_name(f"{TRAINING}.json").is_file():
            remarks.append(Finding(each.name, f"has {TRAIN} and no {TRAINING}.json: this training is not finished"))


# --- runs of rl that no report has ----------------------------------------------------------------------------------


def _runs_of(content: Mapping[str, Any]) -> Iterator[str]:
    """The runs that an rl-report has; its file is anybody's."""
    runs = content.get("runs")
    yield from (_key(run) for run in (runs if isinstance(runs, list) else []) if isinstance(run, dict))


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps({name: run.get(name) for name in (*_RUN, "steps")}, sort_keys=True)


def _is_left_out(found: Found, covered: set[str], remarks: list[Finding]) -> bool:
    """Whether a run is in one of the reports as it is now, or has no control reward to report."""
    try:
        record = parse(text_of(found.path))
        rows = text_of(found.path.with_name(ROWS))
        key = _key({**record, "steps": len(rows.split("\n")) - 1})
    except (OSError, ValueError, TypeError):
        return False  # it is refused, with its reason, when it is read in earnest
    if key in covered:
        return True
    if "control" in record and record["control"] is None:
        remarks.append(Finding(found.name, "is a run of warmerge rl without a control reward: it shows no hacking"))
        return True
    return False


def _summarised(
    raw: Sequence[Found], roots: Mapping[Path, str], findings: list[Finding], command: Sequence[str]
) -> list[tuple[Found, str, dict[str, Any]]]:
    """All runs together, as rl-report would show them."""
    names = [each.name for each in raw]
    folder = names[0] if len(names) == 1 else os.path.commonpath(names) or "runs of warmerge rl"
    try:
        content = summary([each.path.parent for each in raw], folder, command=command).as_json()
    except RefusedError as error:
        findings += error.findings
        return []
    # Runs are named as they were given: from the folder on, as everything else on the page.
    content = without_places(content, {str(root): name for root, name in roots.items() if root != Path()})
    return [(Found(raw[0].path.with_name(f"{RL}.json"), folder), RL, content)]
