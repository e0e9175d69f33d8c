"""Which prompts a reward model was trained on, where train.json says so: a choice among answers to them flatters it."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Sequence
from pathlib import Path

from warmerge.errors import Finding, WarmergeError, plain
from warmerge.rewards.layouts import Comparison, Text
from warmerge.rewards.pairs import read_preferences
from warmerge.rewards.pools import said
from warmerge.rewards.rows import parse_named
from warmerge.training.record import MEMBERS, TRAIN
from warmerge.weights.foreign_json import parse, text_of
from warmerge.weights.output import made_of


def seen_in_training(folders: Iterable[Path], prompts: Sequence[Text]) -> list[Finding]:
    """A warning for each training run of these models that has some of these prompts in its data, or might.

    A member of `warmerge train` lies beside its run's train.json; a merge says in warmerge.json what it was made of.
    Models without either say nothing, and nothing is said of them.

    Args:
        folders: of checkpoints on this machine.
        prompts: those that the models will be judged on, repeats included.
    """
    runs = sorted({run for folder in folders for run in _runs(folder)})
    wanted = {said(prompt) for prompt in prompts}
    return [finding for run in runs for finding in _shared(run, wanted)]


def _runs(folder: Path) -> set[Path]:
    """The folders with a train.json that a model comes from, also by way of merges; each of these is looked at once."""
    runs: set[Path] = set()
    waiting, seen = [folder.resolve()], {folder.resolve()}
    while waiting:
        merge = waiting.pop()
        run = merge.parent.parent
        if merge.parent.name == MEMBERS and (run / TRAIN).is_file():
            runs.add(run)
            continue
        # Members, the base of task vectors, and what a head was fitted for.
        named = [str(entry["checkpoint"]) for entry in made_of(merge) if "checkpoint" in entry]
        # As it was typed: relative to where the merge was made, which is often here, or beside its output.
        places = {place for name in named for place in (Path(name), merge.parent / name) if os.path.isdir(place)}
        found = {place.resolve() for place in places} - seen
        waiting += found
        seen |= found
    return runs


def _shared(run: Path, wanted: set[str]) -> list[Finding]:
    where = str(run / TRAIN)
    try:
        record = parse(text_of(run / TRAIN))
        asked, limit, seed = record["asked"], record["measuring"]["limit"], record["measuring"]["seed"]
        source, fingerprint = parse_named(asked["data"])[1], asked["data_fingerprint"]
        if type(seed) is not int or not (limit is None or type(limit) is int):
            raise ValueError("no such sample can be drawn")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WarmergeError):
        return [Finding(where, "cannot be read: whether these models were trained on these prompts is unknown")]
    # Relative to where it was typed: beside the run's folder most often, or here.
    path = next((place for place in (run.parent / source, Path(source)) if os.path.exists(place)), None)
    if path is None:
        what = f"its training data {plain(source)} is not here: whether it holds these prompts is unknown"
        return [Finding(where, what)]
    try:
        found = read_preferences(str(path), skip_bad_rows=True, limit=limit, seed=seed)
    except WarmergeError as error:
        return [Finding(where, f"its training data cannot be read, so that its prompts are unknown: {error}")]
    both, changed = wanted & {_prompt(comparison) for comparison in found.comparisons}, found.fingerprint != fingerprint
    if changed and not both:
        what = f"its training data {plain(source)} has changed since: whether it held these prompts is unknown"
        return [Finding(where, what)]
    if not both:
        return []
    now = ", as it is now: it has changed since" if changed else ""
    what = f"{len(both)} of {len(wanted)} prompts are in its training data ({plain(source)}{now})"
    return [Finding(where, f"{what}; models do better on what they were trained on: use other prompts")]


def _prompt(comparison: Comparison) -> str:
    """What was asked; of whole texts, which have no prompt of their own, how both begin."""
    return said(comparison.prompt) if comparison.prompt else comparison.cluster
