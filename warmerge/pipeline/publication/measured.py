"""Results of `eval` and `lmc-curve` of the model that is published, told by its fingerprint; and their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain
from warmerge.pipeline.found.results import Found, read_result
from warmerge.pipeline.publication.contents import CARD, CURVE_FIGURE, EVAL_FIGURE
from warmerge.report.card import CardFacts, model_card
from warmerge.report.card.figures import curve_picture, eval_picture
from warmerge.report.page.words import about
from warmerge.report.results import CURVE, EVAL
from warmerge.report.rows import too_many


@dataclass(frozen=True)
class Measured:
    """An eval.json in whose rows the model is called `evaluated_as`, a curve.json of its members; None where not given.

    `member_names`: what a member is called in their rows -> "member 1", as the card and warmerge.json number it.
    `pictures`: their figures (name -> PNG), drawn anew: names of local folders do not stand in them. `remarks`: what is
    not drawn, and why.
    """

    evaluation: Mapping[str, Any] | None = None
    evaluated_as: str = ""
    curve: Mapping[str, Any] | None = None
    member_names: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    remarks: tuple[Finding, ...] = ()


def read_measured(folders: Sequence[str | Path], fingerprint: str, manifest: Mapping[str, Any] | None) -> Measured:
    """The results in these folders, checked to be of these weights, as far as fingerprints tell (`read_sample`).

    Args:
        fingerprint: of the model's weights.
        manifest: its warmerge.json; None where it is no merge.

    Raises:
        UsageError: a folder without results, two results of one kind, or one that does not say what it measured.
        RefusedError: results of other models, or a file that is not as warmerge writes it.
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
    as_ = ""
    if evaluation is not None:
        with _as_written(evaluation[0] / f"{EVAL}.json", EVAL):
            as_ = _evaluated_as(*evaluation, fingerprint, manifest)
    if curve is not None and not set(curve[1]["fingerprints"].values()) <= set(numbers):
        what = "is the curve of other models than the members of this one; run lmc-curve on its members"
        raise RefusedError([Finding(str(curve[0] / f"{CURVE}.json"), what)])
    measured = Measured(evaluation and evaluation[1], as_, curve and curve[1], names)
    return _drawn(measured, {kind: folder / f"{kind}.json" for kind, (folder, _) in found.items()}, manifest)


def _read(path: Path) -> Mapping[str, Any]:
    findings: list[Finding] = []
    _, content = read_result(Found(path, str(path.parent)), findings)
    if findings:
        raise RefusedError(findings)
    weights = content.get("fingerprints")
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, str) for value in weights.values()):
        raise UsageError(f"{plain(str(path))} does not say which weights it measured; run the command again")
    return content


@contextmanager
def _as_written(path: Path, kind: str) -> Iterator[None]:
    """Refuses a result that cannot be told of. The file is anybody's: whatever is missing is said of the file."""
    try:
        yield
    except UsageError as error:
        what = str(error).removeprefix("figure: ").removeprefix("model card: ")
        raise RefusedError([Finding(str(path), what)]) from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"is not as warmerge {about(kind).command} writes it ({type(error).__name__}: {error})"
        raise RefusedError([Finding(str(path), what)]) from error


def _drawn(measured: Measured, paths: Mapping[str, Path], manifest: Mapping[str, Any] | None) -> Measured:
    """With its figures; and each file's part of a card written once, so that what is wrong is said of the file."""
    this, names = measured.evaluated_as, measured.member_names
    evaluation, curve = measured.evaluation or {}, measured.curve or {}
    parts: dict[str, tuple[Mapping[str, Any], CardFacts, str, Callable[[], bytes]]] = {
        EVAL: (
            evaluation, CardFacts(evaluation=evaluation, evaluated_as=this, member_names=names), EVAL_FIGURE,
            partial(eval_picture, evaluation, this, names),
        ),
        CURVE: (
            curve, CardFacts(curve=curve, member_names=names), CURVE_FIGURE, partial(curve_picture, curve, names)
        ),
    }  # fmt: skip
    pictures: dict[str, bytes] = {}
    remarks: list[Finding] = []
    for kind, path in paths.items():
        content, facts, name, draw = parts[kind]
        with _as_written(path, kind):
            model_card(manifest, facts)
            if much := too_many(kind, content):
                what = f"has no figure of {kind}.json: {much} are more than can be read in a picture"
                remarks.append(Finding(CARD, what))
            else:
                pictures[name] = draw()
    return replace(measured, pictures=pictures, remarks=tuple(remarks))


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
