"""Results of warmerge anywhere beneath a folder: which files they are, and what is in them, read strictly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, quoted
from warmerge.pipeline.found.rl_runs import RECORD
from warmerge.report.page.words import about
from warmerge.report.results import BON, CURVE, EVAL, RL, THEORY, TRAINING, VS_M, WINRATE
from warmerge.weights.foreign_json import finite, parse, text_of

# In the order of the page, and what their JSON files call themselves. Of a training that stands in train.json.
FORMATS = {
    TRAINING: None,
    EVAL: "warmerge eval 1",
    CURVE: "warmerge lmc-curve 1",
    VS_M: "warmerge accuracy-vs-m 1",
    BON: "warmerge bon 1",
    RL: "warmerge rl-report 1",
    WINRATE: "warmerge winrate 1",
    THEORY: "warmerge theory 1",
}
TRAIN, TRAIN_FORMAT = "train.json", "warmerge train 1"


@dataclass(frozen=True)
class Found:
    """A file, and what its folder is called on a page."""

    path: Path
    name: str


def walk(root: Path, name: str, findings: list[Finding]) -> Iterator[Found]:
    """Files that are results, and records of runs, folder by folder; none twice, also where links go in circles."""
    seen: set[Path] = set()

    def unreadable(error: OSError) -> None:
        findings.append(Finding(str(error.filename), f"cannot be read: {error.strerror}"))

    wanted = {f"{kind}.json" for kind in FORMATS} | {RECORD, TRAIN}
    for folder, children, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = Path(folder).resolve()
        if real in seen:
            children.clear()
            continue
        seen.add(real)
        children.sort(key=natural)
        below = Path(folder).relative_to(root)
        parts = [*([name] if name else []), *(below.parts)]
        shown = "/".join(parts) or root.resolve().name
        for file in sorted(wanted & set(files)):
            yield Found(Path(folder, file), shown)


def natural(name: str) -> list[tuple[int, str]]:
    """An order in which run-10 comes after run-2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_result(found: Found, findings: list[Finding]) -> tuple[str, dict[str, Any]]:
    """The kind and the content of a result; what is wrong with it is collected."""
    kind, where = found.path.stem, str(found.path)
    content = _json(found.path, findings)
    if content is None:
        return kind, {}
    expected = FORMATS[kind]
    if expected is not None and content.get("format") != expected:
        what = f"expected the format {expected!r}, found {quoted(str(content.get('format')))}"
        findings.append(Finding(where, f"is not a result of warmerge {about(kind).command}: {what}"))
    elif not _are_rows(content.get("rows")) or (kind == TRAINING and not _are_rows(content.get("members"))):
        needed = "rows and members" if kind == TRAINING else "rows"
        what = f"expected {needed}, lists of objects"
        findings.append(Finding(where, f"is not a result of warmerge {about(kind).command}: {what}"))
    elif kind == TRAINING:
        return kind, _training_record(found.path.with_name(TRAIN), findings) | content
    return kind, content


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _training_record(path: Path, findings: list[Finding]) -> dict[str, Any]:
    """What train.json says of how the members beside it were made and measured."""
    if not path.is_file():
        return {}
    record = _json(path, findings)
    if record is None:
        return {}
    if record.get("format") != TRAIN_FORMAT:
        what = f"expected the format {TRAIN_FORMAT!r}, found {quoted(str(record.get('format')))}"
        findings.append(Finding(str(path), what))
        return {}
    kept: dict[str, Any] = {
        key: record[key] for key in ("command", "versions", "training_pairs", "swapped") if key in record
    }
    measuring = record.get("measuring")
    if isinstance(measuring, dict) and {"resamples", "seed"} <= measuring.keys():
        how = f"percentile bootstrap over prompts, {measuring['resamples']} resamples, seed {measuring['seed']}"
        kept["intervals"] = how
    return kept


def _json(path: Path, findings: list[Finding]) -> dict[str, Any] | None:
    try:
        content = parse(text_of(path), parse_constant=finite, parse_float=finite)
    except ValueError as error:
        findings.append(Finding(str(path), f"is not JSON: {error}"))
        return None
    except OSError as error:
        findings.append(Finding(str(path), f"cannot be read: {error.strerror}"))
        return None
    if not isinstance(content, dict):
        findings.append(Finding(str(path), "is not a result of warmerge: expected a JSON object"))
        return None
    return content
