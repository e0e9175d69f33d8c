"""Judges scored as units of work on an engine: windows of texts, dealt out, and put together again."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import torch

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, counted, plain, some
from warmerge.pipeline.engine import Outcome, Unit, run_units, visible_devices
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.scoring.asked import Asked, Found
from warmerge.pipeline.scoring.child import run_part
from warmerge.pipeline.scoring.judge import Judge, adapter_digest
from warmerge.pipeline.scoring.mixtures import digests_of_small_files
from warmerge.pipeline.scoring.parts import (
    TEXTS,
    UNIT,
    Merge,
    Part,
    Scored,
    Source,
    find_scored,
    finished,
    windows_of_unit,
    write_part,
)
from warmerge.pipeline.scoring.texts import Window, remove_windows, windows_of, write_windows
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import choose_dtype
from warmerge.version import versions
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.stream import refuse_changed

# Texts of a unit: so many that loading a model is a small part of it, so few that little waits for the last one.
_LEAST, _MOST = 2048, 32768
# How many units a cluster gets at least, where there is enough to do: its size is not known before it is asked.
_ON_RAY = 16
# Seconds between two looks at what units have finished, for the progress bar.
_LOOK_SECONDS = 1.0


def score_in_units(asked: Sequence[Asked], measuring: Measuring, engine: str, address: str, store: Path) -> list[Found]:
    """As `score_all`. What is in `store` already is not scored again; its folders are those of `parts`."""
    store = store.absolute()
    lists: dict[int, list[Window]] = {}
    for texts in (texts for one in asked for texts in one.lists):
        if id(texts) not in lists:
            lists[id(texts)] = write_windows(store / TEXTS, texts)
    keys = [one.judge.key(measuring.loading) for one in asked]
    parts: dict[str, Part] = {}
    for key, one in zip(keys, asked, strict=True):
        # One model by two names is one, and windows with the same texts are one.
        known = parts[key] if key in parts else _part(key, one.judge, measuring)
        once = {window.digest: window for window in known.windows}
        for window in (window for texts in one.lists for window in lists[id(texts)]):
            once.setdefault(window.digest, window)
        parts[key] = replace(known, windows=tuple(once.values()))
    judges = dict(zip(keys, (one.judge for one in asked), strict=True))
    done = _scored(parts, judges, measuring, engine, address, store)
    return [
        _found([[done[key][window.digest] for window in lists[id(texts)]] for texts in one.lists])
        for key, one in zip(keys, asked, strict=True)
    ]


def remove_units(asked: Sequence[Asked], measuring: Measuring, store: Path) -> None:
    """Removes what units found of this, after its results were written. Other questions may have been stopped in the
    same store: their finished parts, and the texts that these are of, are left. So is what cannot be removed, as a
    network's file system may have it: it is not used for anything else."""
    if not store.is_dir():
        return
    # What a model's folder or a text holds by now may not be readable: its parts are left too.
    with contextlib.suppress(RefusedError, OSError):
        keys = {one.judge.key(measuring.loading) for one in asked}
        lists = {id(texts): texts for one in asked for texts in one.lists}
        own = {window.digest for texts in lists.values() for window in windows_of(texts)}
        for folder in (path.parent for key in keys for path in (store / key).glob(f"*/{UNIT}")):
            if windows_of_unit(folder) <= own:
                shutil.rmtree(folder, ignore_errors=True)
        left = [windows_of_unit(path.parent) for path in store.glob(f"*/*/{UNIT}")]
        if not left:
            shutil.rmtree(store, ignore_errors=True)
        remove_windows(store / TEXTS, own.difference(*left))


def _scored(
    parts: Mapping[str, Part], judges: Mapping[str, Judge], measuring: Measuring, engine: str, address: str, store: Path
) -> dict[str, dict[str, Scored]]:
    """What is known of each window by each key, after all that was missing has been scored."""
    done = {key: find_scored(store, key, part.windows) for key, part in parts.items()}
    missing = [
        replace(part, windows=tuple(window for window in part.windows if window.digest not in done[key]))
        for key, part in parts.items()
    ]
    devices = ["cpu"] if measuring.loading.device == "cpu" else visible_devices() if engine == "local" else None
    units = _units(missing, store, _ON_RAY if engine == "ray" or devices is None else len(devices))
    try:
        outcomes = run_units(
            units, engine=engine, address=address, threads=measuring.threads, devices=devices,
            while_waiting=_counted(missing, store, measuring),
        )  # fmt: skip
        _refuse_failed(outcomes)
    finally:
        changed = _removed_where_changed(judges, store)
    if changed:
        raise RefusedError(changed)
    for part in missing:
        done[part.key] |= find_scored(store, part.key, part.windows)
        if any(window.digest not in done[part.key] for window in part.windows):
            what = f"parts of {plain(part.label)} that were finished are no longer in {plain(str(store))}"
            raise WarmergeError(f"{what}: another command removed them; give this one again when that one has ended")
        _refuse_mixed(part.label, done[part.key].values())
    return done


def _removed_where_changed(judges: Mapping[str, Judge], store: Path) -> list[Finding]:
    """Which files of the models changed since these were opened here. A unit compares samples of the weights, so it may
    have scored others under the first ones' key: all that is kept of such a model is removed."""
    findings: list[Finding] = []
    for key, judge in judges.items():
        try:
            refuse_changed([*judge.inputs, *(() if judge.into is None else judge.into.inputs)])
        except RefusedError as error:
            shutil.rmtree(store / key, ignore_errors=True)
            findings += error.findings
    return findings


def _part(key: str, judge: Judge, measuring: Measuring) -> Part:
    specs = zip(judge.inputs, judge.specs, judge.fingerprints, strict=True)
    into = judge.into
    merge = None
    if judge.plan is not None:
        merge = Merge(judge.plan.rule.name, asdict(judge.plan.options), judge.dtype)
    # --dtype auto may depend on a measurement: made once, so that units on equal machines compute alike.
    dtypes = {kind: choose_dtype(measuring.loading.dtype, judge.host, torch.device(kind)) for kind in ("cpu", "cuda")}
    return Part(
        key, judge.label,
        tuple(_source(opened, spec, fingerprint) for opened, spec, fingerprint in specs),
        None if into is None else _source(into.inputs[0], into.specs[0], into.fingerprints[0]),
        None if judge.base is None else _everywhere(judge.base),
        merge, asdict(measuring.loading), {kind: str(dtype).removeprefix("torch.") for kind, dtype in dtypes.items()},
        measuring.batch_tokens, versions(), (),
    )  # fmt: skip


def _source(opened: Checkpoint, spec: Spec, fingerprint: str) -> Source:
    small = digests_of_small_files(opened)
    return Source(opened.label, _everywhere(spec), fingerprint, adapter_digest(opened), small)


def _everywhere(spec: Spec) -> str:
    """A path as every machine has it; what lies on the Hub by its name. `..` stays: after a link it leads elsewhere."""
    return str(Path(spec).absolute()) if Path(spec).exists() else str(spec)


def _units(missing: Sequence[Part], store: Path, slots: int) -> list[Unit]:
    """Units for the windows that are missing, as many as there are slots or more, each of one model."""
    total = sum(window.count for part in missing for window in part.windows)
    size = min(max(total // slots, _LEAST), _MOST)
    units = []
    for part in missing:
        groups: list[list[Window]] = []
        for window in part.windows:
            if not groups or sum(each.count for each in groups[-1]) >= size:
                groups.append([])
            groups[-1].append(window)
        for group in groups:
            folder = store / part.key / group[0].digest[:16]
            write_part(folder, replace(part, windows=tuple(group)))
            units.append(Unit(part.label, f"{run_part.__module__}:{run_part.__name__}", folder))
    return units


def _counted(missing: Sequence[Part], store: Path, measuring: Measuring) -> Callable[[], None]:
    """Tells the progress bar of windows that were finished since it was last asked."""
    left = {(part.key, window.digest): window.count for part in missing for window in part.windows}
    measuring.on_work(sum(left.values()))
    looked = time.monotonic()

    def look() -> None:
        nonlocal looked
        if time.monotonic() - looked < _LOOK_SECONDS:
            return
        looked = time.monotonic()
        for entry in {(part.key, path.stem) for part in missing for path in finished(store, part.key)} & left.keys():
            measuring.progress(left.pop(entry))

    return look


def _refuse_failed(outcomes: Sequence[Outcome]) -> None:
    """All units that failed, each reason once, with the name of the model."""
    failed = [outcome for outcome in outcomes if outcome.state != "done"]
    if not failed:
        return
    kinds = {outcome.exit_code for outcome in failed}
    if kinds == {RefusedError.exit_code} and all(outcome.findings for outcome in failed):
        raise RefusedError(finding for outcome in failed for finding in outcome.findings)
    reasons = dict.fromkeys(
        f"\n  - {plain(outcome.unit.name)}: {outcome.message or outcome.state}" for outcome in failed
    )
    what = f"{len(failed)} of {counted(len(outcomes), 'part')} failed; what is finished is kept, and the same command"
    text = f"{what} tries these again:{''.join(reasons)}"
    raise UsageError(text) if kinds == {UsageError.exit_code} else WarmergeError(text)


def _refuse_mixed(label: str, scored: Iterable[Scored]) -> None:
    """A model's rewards in bfloat16 and in float32 are of two models: a difference between texts would be none."""
    machines: dict[str, set[str]] = {}
    for one in scored:
        machines.setdefault(one.computed, set()).add(one.machine)
    if len(machines) > 1:
        ways = "; ".join(f"{computed} ({some(names, 3)})" for computed, names in sorted(machines.items()))
        what = f"was scored in different ways by different machines or runs: {ways}; give --dtype and --device"
        raise RefusedError([Finding(label, what)])


def _found(lists: Sequence[Sequence[Scored]]) -> Found:
    """A judge's answer to its lists, put together from their windows."""
    every = [scored for windows in lists for scored in windows]
    (rule,) = {scored.rule for scored in every}  # made of files that were found to be the same
    return Found(
        tuple(numpy.concatenate([scored.rewards for scored in windows]) for windows in lists),
        tuple(sum(scored.seconds for scored in windows) for windows in lists),
        tuple((sum(s.cut[0] for s in windows), sum(s.cut[1] for s in windows)) for windows in lists),
        max(scored.merge_seconds for scored in every),
        every[0].weights_bytes,
        every[0].computed,
        rule,
        tuple(dict.fromkeys(doubt for scored in every for doubt in scored.doubts)),
    )
