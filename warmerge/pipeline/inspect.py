"""`warmerge inspect`: may these checkpoints be merged, and how far apart are they?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.pipeline.prepare import short_labels
from warmerge.report.results import without_nan
from warmerge.rewards.config import effective_config
from warmerge.weights import compat, small_files
from warmerge.weights.checkpoint import Checkpoint, LowRank
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.plan import choose_threads

if TYPE_CHECKING:
    from warmerge.weights.distances import Distances


@dataclass(frozen=True)
class Row:
    """What the headers and small files of one checkpoint say. `tokenizer` is a short digest, equal for equal files."""

    checkpoint: str
    architecture: str
    head: str
    parameters: int
    dtype: str
    files: int
    bytes: int
    tokenizer: str


@dataclass(frozen=True)
class Inspection:
    """`findings` are what `average` would refuse, `warnings` what it would warn of; `distances` on request."""

    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    distances: tuple[Distances, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN, which JSON does not have, becomes null."""
        content = {
            "checkpoints": [asdict(row) for row in self.rows],
            "findings": [asdict(finding) for finding in self.findings],
            "warnings": [asdict(warning) for warning in self.warnings],
            "distances": None if self.distances is None else [asdict(entry) for entry in self.distances],
        }
        cleaned: dict[str, Any] = without_nan(content)
        return cleaned


def inspect(
    checkpoints: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    distances: bool = False,
    any_model: bool = False,
    threads: int | None = None,
    figure: Path | None = None,
    progress: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Inspection:
    """Describes checkpoints and says whether `average` would merge them. Reads headers only, also over the Hub.

    Args:
        checkpoints: as for `average`; one alone is described.
        base: what the members started from; LoRA adapters need it if they do not name theirs.
        distances: also stream every weight, for norms, distances and angles.
        figure: a PNG of the angles between task vectors (with `base`), or of the distances between members.
        progress: called with the number of bytes of each finished tile; `on_bytes` once with their sum.

    Raises:
        UsageError: a name that is nothing, or a figure without `distances`.
        RefusedError: `distances` of checkpoints that do not have the same tensors.
    """
    if figure is not None:
        _check_figure(figure, distances)
    workers = choose_threads(threads)
    opened: list[Checkpoint] = []
    findings: list[Finding] = []
    for spec in checkpoints:
        try:
            opened.append(open_checkpoint(spec, base))
        except RefusedError as error:
            findings += error.findings
    rows = tuple(_row(checkpoint) for checkpoint in opened)
    warnings: list[Finding] = []
    if opened:
        refusals, warnings = compat.check(opened, any_model=any_model, effective_config=effective_config)
        findings += refusals
    if not distances:
        return Inspection(rows, tuple(findings), tuple(warnings))
    if findings:
        raise RefusedError(findings)
    if len(opened) < 2:
        raise UsageError("--distances takes two checkpoints or more")
    measured, doubted = _distances(opened, base, workers, progress, on_bytes)
    warnings += doubted
    if figure is not None:
        _draw(measured[0], short_labels([row.checkpoint for row in rows]), figure)
    return Inspection(rows, tuple(findings), tuple(warnings), tuple(measured))


def _distances(
    opened: Sequence[Checkpoint],
    base: str | Path | None,
    threads: int,
    progress: Callable[[int], None] | None,
    on_bytes: Callable[[int], None] | None,
) -> tuple[list[Distances], list[Finding]]:
    """Distances, and the doubts that `average` would warn of once it has looked into the weights."""
    from warmerge.weights.distances import measure_distances
    from warmerge.weights.samples import doubts, read_sample, same_contents

    inputs = [*opened, *([] if base is None else [open_checkpoint(base)])]
    local = make_local(inputs, leave_stores=True)
    members, base_checkpoint = local[: len(opened)], local[len(opened)] if base is not None else None
    if on_bytes is not None:
        on_bytes(sum(checkpoint.nbytes for checkpoint in local))
    samples = [read_sample(member) for member in members]
    if same := same_contents(members, samples):
        raise RefusedError(same)
    measured = measure_distances(members, base_checkpoint, threads, progress)
    return measured, doubts(members, samples)


def _row(checkpoint: Checkpoint) -> Row:
    config = checkpoint.config or {}
    dtypes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.numel
    adapted = any(isinstance(tensor, LowRank) for tensor in checkpoint.tensors.values())
    architecture = small_files.architecture(config) or ("not stated" if config else "no config.json")
    return Row(
        checkpoint.label,
        architecture + (" + LoRA" if adapted else ""),
        compat.head_shape(checkpoint),
        checkpoint.parameters,
        "+".join(dtype for dtype, _ in dtypes.most_common()),
        len(checkpoint.weight_files),
        checkpoint.nbytes,
        small_files.tokenizer_digest(checkpoint),
    )


def _check_figure(path: Path, distances: bool) -> None:
    """Refuses a figure that could not be drawn, before the weights are read for it."""
    if not distances:
        raise UsageError("--figure draws distances; add --distances")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--figure: expected a name ending in .png, .svg or .pdf, found {str(path)!r}")
    if not path.parent.is_dir():
        raise UsageError(f"--figure: the folder {path.parent} does not exist; make it first")


def _draw(whole: Distances, labels: Sequence[str], path: Path) -> None:
    from warmerge.report import heat_map

    if whole.cosines is not None:
        heat_map(whole.cosines, labels, "Angles between task vectors", "cosine", path, limits=(-1, 1))
    else:
        heat_map(whole.relative, labels, "Distance between members, relative to their norm", "|a - b| / |a|", path)
