"""Results of `eval` and `lmc-curve` that are about the model that is published, told by the weights' fingerprints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain
from warmerge.report.results import CURVE, EVAL
from warmerge.weights.checkpoint import parse_json


@dataclass(frozen=True)
class Measured:
    """An eval.json in whose rows the model is called `evaluated_as`, a curve.json of its members; None where not given.

    `member_names`: what a member is called in their rows -> "member 1", as the card and warmerge.json number it.
    """

    evaluation: Mapping[str, Any] | None = None
    evaluated_as: str = ""
    curve: Mapping[str, Any] | None = None
    member_names: Mapping[str, str] = field(default_factory=dict)


def read_measured(folders: Sequence[str | Path], fingerprint: str, manifest: Mapping[str, Any] | None) -> Measured:
    """The results in these folders, checked to be of these weights.

    Args:
        fingerprint: of the model's weights.
        manifest: its warmerge.json; None where it is no merge.

    Raises:
        UsageError: a folder without results, two results of one kind, or one that does not say what it measured.
        RefusedError: results of other models.
    """
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for folder in map(Path, folders):
        kinds = [kind for kind in (EVAL, CURVE) if (folder / f"{kind}.json").is_file()]
        if not kinds:
            raise UsageError(f"--results {plain(str(folder))}: expected eval.json or curve.json in it, found neither")
        for kind in kinds:
            if kind in found:
                raise UsageError(
                    f"--results: {kind}.json is in {plain(str(found[kind][0]))} and in {plain(str(folder))}"
                )
            found[kind] = (folder, _read(folder / f"{kind}.json"))
    numbers = _member_numbers(manifest)
    names: dict[str, str] = {}
    for _, content in found.values():
        for name, weights in content["fingerprints"].items():
            if weights in numbers and names.setdefault(name, numbers[weights]) != numbers[weights]:
                both = " and ".join(plain(str(folder)) for folder, _ in found.values())
                raise UsageError(f"--results: {both} call different members {name!r}; run both commands from one place")
    evaluation, curve = (found.get(kind) for kind in (EVAL, CURVE))
    as_ = "" if evaluation is None else _evaluated_as(*evaluation, fingerprint, manifest)
    if curve is not None and not set(curve[1]["fingerprints"].values()) <= set(numbers):
        what = "is the curve of other models than the members of this one; run lmc-curve on its members"
        raise RefusedError([Finding(str(curve[0] / f"{CURVE}.json"), what)])
    return Measured(evaluation and evaluation[1], as_, curve and curve[1], names)


def _read(path: Path) -> Mapping[str, Any]:
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise UsageError(f"{plain(str(path))} is not a result of warmerge")
    if not isinstance(content.get("fingerprints"), dict) or not content["fingerprints"]:
        raise UsageError(f"{plain(str(path))} does not say which weights it measured; run the command again")
    return content


def _member_numbers(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Fingerprint of a member -> its public name."""
    members = [entry for entry in (manifest or {}).get("inputs", []) if entry["role"] == "member"]
    return {entry["fingerprint"]: f"member {number}" for number, entry in enumerate(members, start=1)}


def _evaluated_as(
    folder: Path, content: Mapping[str, Any], fingerprint: str, manifest: Mapping[str, Any] | None
) -> str:
    """The name of the rows that are about these weights: measured themselves, or as the average of the same members."""
    by_name: Mapping[str, str] = content["fingerprints"]
    for name, weights in by_name.items():
        if weights == fingerprint:
            return name
    kinds = {str(row["model"]): row["kind"] for row in content["rows"]}
    averaged = {weights for name, weights in by_name.items() if kinds.get(name) == "member"}
    averages = [name for name, kind in kinds.items() if kind == "average"]
    plain_average = manifest is not None and manifest["rule"]["name"] == "uniform" and not manifest["copied_tensors"]
    if averages and plain_average and averaged == set(_member_numbers(manifest)):
        return averages[0]
    what = "measured other models: neither these weights nor the average of the same members; run eval on this model"
    raise RefusedError([Finding(str(folder / f"{EVAL}.json"), what)])
