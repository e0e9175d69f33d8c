"""`warmerge probe`: a new last layer for a reward model, fitted on its frozen features; the rest stays as it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, UsageError
from warmerge.pipeline.prepare import Spec
from warmerge.report.results import without_nan
from warmerge.rewards.bench import Measuring, cut_words
from warmerge.rewards.model import RewardModel, load_reward_model
from warmerge.rewards.pairs import PreferenceSet, read_all, unique_texts
from warmerge.rewards.scoring import Tokens
from warmerge.training.head import has_head, write_head
from warmerge.training.probe import (
    STRENGTHS,
    Probe,
    differences,
    features,
    fit,
    held_out_fifth,
    output_layer,
)
from warmerge.training.start import make_start
from warmerge.training.training_set import pair_clusters, tokenise_pairs
from warmerge.version import versions
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.output import MANIFEST, check_out, sync
from warmerge.weights.remote.reading import revision_of
from warmerge.weights.samples import read_sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]


# A held-out loss larger by this factor makes it worth to try on.
_WORTH_IT = 1.01


@dataclass(frozen=True)
class Probed:
    """What `probe` wrote, and what it gained: accuracies of the old head and of the new one; a tie counts as right.

    `before` and `after` are on `held_out` pairs, those of a fifth of the prompts, `after` of a head that was fitted on
    the others; NaN with fewer than five prompts. (The strength is chosen on that fifth, which flatters it a little.)
    `fitted_before` and `fitted_after` are on all `n` pairs, which the new head has seen. `had_head`: whether the old
    head came with the checkpoint, or was drawn at random.
    """

    out: Path
    probe: Probe
    before: float
    after: float
    held_out: int
    fitted_before: float
    fitted_after: float
    had_head: bool
    n: int
    prompts: int
    warnings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it but the weight, as JSON has it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("out", "probe", "warnings")}
        fitted = {name: value for name, value in asdict(self.probe).items() if name != "weight"}
        warnings = [str(warning) for warning in self.warnings]
        return dict(without_nan({"out": str(self.out), **plain, "probe": fitted, "warnings": warnings}))


def probe(
    checkpoint: Spec,
    data: Sequence[str],
    out: Spec,
    *,
    measuring: Measuring | None = None,
    strengths: Sequence[float] | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Probed:
    """Writes `checkpoint` with a head fitted to all pairs of `data`: last-layer retraining, for instance of an average.

    Args:
        checkpoint: a reward model, or a language model or encoder, which gets a head first.
        data: sets of preference pairs, each `NAME=PATH` or `PATH`.
        out: a new folder, which appears all at once.
        measuring: how the model is loaded and texts are read and rendered; its seed draws the held-out fifth.
        strengths: of the regularisation; the best of them on held-out prompts is taken.
        overwrite: replace `out` if warmerge wrote it.
        command: for the record in warmerge.json: what was typed.

    Raises:
        UsageError, RefusedError, RemoteError, WarmergeError: see warmerge.errors. Nothing is left in `out` then.

    Example:
        >>> import warmerge
        >>> warmerge.probe("warm", ["balanced.jsonl"], "warm-probed").after  # doctest: +SKIP
        0.7312
    """
    measuring, target = measuring or Measuring(), Path(out)
    if not data:
        raise UsageError("--data is missing: at least one set of preference pairs, as NAME=PATH")
    inputs = [Path(spec) for spec in (checkpoint, measuring.base) if spec is not None and Path(spec).exists()]
    check_out(target, [path.parent if path.is_file() else path for path in inputs], overwrite)
    sets = read_all(data, skip_bad_rows=measuring.skip_bad_rows, limit=measuring.limit, seed=measuring.seed)
    (source,) = make_local([open_checkpoint(checkpoint, measuring.base)])
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        warnings = make_start(
            source, partial, trust_remote_code=measuring.loading.trust_remote_code, seed=measuring.seed
        )
        # What is fitted is what will be used: the copy, under the name that the user knows.
        model = load_reward_model(replace(open_checkpoint(partial), label=source.label), measuring.loading)
        found = _fit(model, sets, target, warnings, measuring, tuple(strengths or STRENGTHS), has_head(source))
        write_head(partial, found.probe.weight)
        record = _record(source, sets, found, measuring, command)
        (partial / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")
        _publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return found


def _fit(
    model: RewardModel,
    sets: Sequence[PreferenceSet],
    out: Path,
    warnings: Sequence[Finding],
    measuring: Measuring,
    strengths: tuple[float, ...],
    had_head: bool,
) -> Probed:
    """The head fitted to all sets together, next to the old one on the same pairs."""
    together = replace(
        sets[0],
        name="data",
        source=", ".join(entry.source for entry in sets),
        comparisons=tuple(comparison for entry in sets for comparison in entry.comparisons),
    )
    texts = unique_texts(together)
    tokens = Tokens(model.renderer, texts.texts)
    measuring.on_work(len(texts.texts))
    pairs = tokenise_pairs(together, texts, tokens)
    clusters = pair_clusters(texts)
    values = features(model, tokens, batch_tokens=measuring.batch_tokens, progress=measuring.progress)
    x = differences(values, pairs)
    fitted = fit(x, clusters, strengths, measuring.seed)
    _, layer = output_layer(model.module)
    old = layer.weight.detach().double().cpu().numpy()[0]
    right = x @ old >= 0
    part = held_out_fifth(clusters, measuring.seed)
    tried = {entry["strength"]: entry["accuracy"] for entry in fitted.tried}
    prompts = len(set(clusters))
    doubts = [*warnings, *model.warnings, *_doubts(sets, tokens, prompts, fitted, strengths)]
    return Probed(
        out=out,
        probe=fitted,
        before=float(right[part].mean()) if tried else math.nan,
        after=tried.get(fitted.strength, math.nan),
        held_out=int(part.sum()),
        fitted_before=float(right.mean()),
        fitted_after=fitted.accuracy,
        had_head=had_head,
        n=len(pairs),
        prompts=prompts,
        warnings=tuple(dict.fromkeys(doubts)),
    )


def _doubts(
    sets: Sequence[PreferenceSet], tokens: Tokens, prompts: int, fitted: Probe, strengths: tuple[float, ...]
) -> list[Finding]:
    found = [Finding(entry.source, f"{entry.skipped} bad rows were left out") for entry in sets if entry.skipped]
    if words := cut_words(len(tokens.texts), *tokens.cut()):
        found.append(Finding("data", words))
    if not fitted.tried:
        what = f"prompts: {prompts}; with fewer than five none is held out, so nothing says how good the new head is"
        found.append(Finding("data", what))
    losses = [entry["loss"] for entry in sorted(fitted.tried, key=lambda entry: entry["strength"])]
    if len(losses) > 1 and fitted.strength == min(strengths) and losses[1] > _WORTH_IT * losses[0]:
        what = f"the weakest regularisation that was tried ({fitted.strength:g}) was the best; try weaker ones too"
        found.append(Finding("probe", what))
    return found


def _record(
    source: Checkpoint, sets: Sequence[PreferenceSet], found: Probed, measuring: Measuring, command: Sequence[str]
) -> dict[str, Any]:
    """What warmerge.json says: all that is needed to do it again."""
    return {
        "command": list(command),
        "warmerge": versions()["warmerge"],
        "versions": versions(),
        "input": {
            "checkpoint": source.label,
            **revision_of(source.folder),
            **source.details,
            "fingerprint": read_sample(source).fingerprint,
        },
        "sets": [
            {
                "name": entry.name,
                "source": entry.source,
                "layout": entry.layout,
                "n": len(entry.comparisons),
                "skipped_rows": entry.skipped,
                "fingerprint": entry.fingerprint,
            }
            for entry in sets
        ],
        "loading": asdict(measuring.loading),
        "limit": measuring.limit,
        "seed": measuring.seed,
        **{key: value for key, value in found.as_json().items() if key != "out"},
    }


def _publish(partial: Path, out: Path) -> None:
    """Renames the finished folder to OUT; what `check_out` allowed to be replaced goes."""
    sync(partial / MANIFEST)
    old = out.parent / f".{out.name}.old"
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)
