"""README.md: the user's own, or the model card with lines that were run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, UsageError
from warmerge.pipeline.publication.contents import CARD, CURVE_FIGURE, EVAL_FIGURE
from warmerge.pipeline.publication.example import fits_in_memory, run_example, texts_of
from warmerge.pipeline.publication.measured import Measured
from warmerge.report.card import CARD_MARK, CardFacts, model_card
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import LocalFolder, read_bytes

_TOO_LARGE = "the model does not fit into this machine's memory in float32"
OWN = Finding(CARD, "is your own and is sent as it is; delete it to get a card by warmerge")


def own_card(checkpoint: Checkpoint) -> str | None:
    """The README.md that the user wrote; None where there is none or it is ours.

    Raises:
        UsageError: it is not UTF-8.
    """
    if CARD not in checkpoint.folder.sizes():
        return None
    try:
        text = read_bytes(checkpoint.folder, CARD).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{CARD} is not UTF-8; save it as UTF-8") from None
    return None if CARD_MARK in text else text


def refuse_for_own_card(given: Mapping[str, Any]) -> None:
    """UsageError where something was given (by its flag) that only a card of ours would say."""
    for flag in (flag for flag, value in given.items() if value):
        raise UsageError(f"{CARD} is your own and is sent as it is: leave out {flag}, or delete it to get a card by us")


def written_card(
    checkpoint: Checkpoint, manifest: Mapping[str, Any] | None, facts: CardFacts, measured: Measured, run_lines: bool
) -> tuple[str, list[Finding]]:
    """The card by warmerge, with the lines that were run and what they printed; and what the user is to know of it.

    Raises:
        RefusedError: the lines do not work, or do not agree with warmerge's own reward.
    """
    assert isinstance(checkpoint.folder, LocalFolder)
    drawn = {"eval": EVAL_FIGURE, "curve": CURVE_FIGURE}
    facts = replace(
        facts, evaluation=measured.evaluation, evaluated_as=measured.evaluated_as, curve=measured.curve,
        member_names=measured.member_names,
        figures={kind: name for kind, name in drawn.items() if name in measured.pictures},
    )  # fmt: skip
    why = _why_not_loaded(checkpoint, facts)
    if why:
        return model_card(manifest, facts), [_not_run(why)]
    why = "--no-run" if not run_lines else "" if fits_in_memory(checkpoint) else _TOO_LARGE
    if why:
        texts = texts_of(checkpoint)
        return model_card(manifest, replace(facts, texts=texts.rule, ends_in_eos=texts.ends_in_eos)), [_not_run(why)]
    texts, example = run_example(checkpoint, Path(checkpoint.folder.path), str(facts.repo), facts.revision)
    return model_card(manifest, replace(facts, texts=texts.rule, ends_in_eos=texts.ends_in_eos, example=example)), []


def _not_run(why: str) -> Finding:
    return Finding(CARD, f"its lines that load and score were not run: {why}")


def _why_not_loaded(checkpoint: Checkpoint, facts: CardFacts) -> str:
    """Why the card's lines are not for this model; "" where they are."""
    if (checkpoint.config or {}).get("auto_map"):
        return "the model brings its own code"
    if not facts.architecture.endswith("ForSequenceClassification"):
        return f"{facts.architecture or 'the model'} is not loaded by AutoModelForSequenceClassification"
    return ""
