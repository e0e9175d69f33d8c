"""What a unit does, in a process of its own, perhaps on another machine: opens the same model again, and scores.

"The same" is found out, not believed: other weights under the same path would give numbers that mean nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from warmerge.errors import Finding, Interrupted, RefusedError, UsageError, plain, some
from warmerge.pipeline.scoring.asked import computed_in, rule_of
from warmerge.pipeline.scoring.judge import Judge, adapter_digest, load_host, poured
from warmerge.pipeline.scoring.mixtures import digests_of_small_files
from warmerge.pipeline.scoring.parts import (
    TEXTS,
    Part,
    Scored,
    Source,
    find_scored,
    other_contents,
    read_part,
    write_scored,
)
from warmerge.pipeline.scoring.texts import read_window
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions
from warmerge.rewards.scoring import Tokens, doubts_of, score
from warmerge.version import versions
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.plan import plan_merge
from warmerge.weights.rules import RULES, Options
from warmerge.weights.samples import read_sample


def run_part(folder: Path, stop: Callable[[], bool]) -> None:
    """Scores the windows of the unit in `folder` that are not scored yet; each is kept when it is finished.

    Raises:
        Interrupted: `stop` said so, between two batches.
        RefusedError: this machine has other versions, weights, small files or texts than the one that asked.
        UsageError, RefusedError, WarmergeError: as `load_reward_model`, `fill` and `scoring.score`.
    """
    part, store = read_part(folder), folder.parent.parent
    done = find_scored(store, part.key, part.windows)
    todo = [window for window in part.windows if window.digest not in done]
    if not todo:
        return
    _refuse_other_versions(part)
    texts = [read_window(store / TEXTS, window) for window in todo]
    judge, measuring = _judge(part), _measuring(part)
    model = load_host(judge, measuring)
    begun = time.perf_counter()
    model = poured(model, judge, measuring)
    merge_seconds, doubts = time.perf_counter() - begun, tuple(doubts_of(model))

    def look(count: int) -> None:
        if stop():
            raise Interrupted("stopped; finished windows of texts are kept")

    look(0)
    tokens = [Tokens(model.renderer, each, window.range) for each, window in zip(texts, todo, strict=True)]
    for window, made, following in zip(todo, tokens, [*tokens[1:], None], strict=True):
        made.begin()
        if following is not None:
            following.begin()  # while the model reads this one
        begun = time.perf_counter()
        rewards = score(model, made, part.batch_tokens, look)
        seconds = time.perf_counter() - begun - made.waited
        found = Scored(
            rewards, seconds, merge_seconds, model.nbytes, computed_in(model), rule_of(model.renderer), made.cut(),
            doubts, socket.gethostname(),
        )  # fmt: skip
        write_scored(folder, part.key, window, found)
        print(f"{window.count} texts from {window.first + 1} in {seconds:.1f} s")


def _judge(part: Part) -> Judge:
    """The judge of the driver, opened here."""
    inputs = _opened([*part.inputs, *([] if part.into is None else [part.into])], part.base)
    own, into = inputs[: len(part.inputs)], inputs[len(part.inputs) :]
    fingerprints = tuple(source.fingerprint for source in part.inputs)
    host = Judge(into[0].label, tuple(into), (part.into.fingerprint,)) if part.into is not None else None
    if part.merge is None:
        return Judge(part.label, tuple(own), fingerprints)
    said = part.merge.options
    options = Options(**{**said, "weights": None if said["weights"] is None else tuple(said["weights"])})
    plan = plan_merge(own, RULES[part.merge.rule], options, dtype=part.merge.dtype)
    return Judge(part.label, tuple(own), fingerprints, plan, into=host)


def _opened(sources: Sequence[Source], base: str | None) -> list[Checkpoint]:
    """The checkpoints, found to be those of the driver; all that are not are named at once."""
    opened, findings, where = [], [], plain(socket.gethostname())
    shared = "machines of a cluster must share the folder, or hold the same files there"
    for source in sources:
        try:
            (found,) = make_local([open_checkpoint(source.at, base)])
        except (UsageError, RefusedError) as error:
            findings.append(Finding(source.label, f"cannot be opened on {where} ({error}); {shared}"))
            continue
        if read_sample(found).fingerprint != source.fingerprint or adapter_digest(found) != source.adapter:
            what = f"has other weights on {where}, in {plain(source.at)}, than where the command was given; {shared}"
            findings.append(Finding(source.label, what))
        elif differ := other_contents(source.small, digests_of_small_files(found)):
            what = f"has another {some(differ)} on {where}, in {plain(source.at)}, than where the command was given"
            findings.append(Finding(source.label, f"{what}; {shared}"))
        opened.append(replace(found, label=source.label))
    if findings:
        raise RefusedError(findings)
    return opened


def _refuse_other_versions(part: Part) -> None:
    here = versions()
    differ = [f"{name} {here.get(name)}, not {part.versions.get(name)}" for name in other_contents(part.versions, here)]
    if differ:
        what = f"has {', '.join(differ)}: rewards could differ; install what the command's machine has"
        raise RefusedError([Finding(plain(socket.gethostname()), what)])


def _measuring(part: Part) -> Measuring:
    """How the model is loaded here: in the dtype that the driver chose for this kind of device, where it chose one."""
    options = LoadOptions(**part.loading)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    kind = "cpu" if device == "auto" else device
    threads = torch.get_num_threads()  # of this unit: others may run beside it
    return Measuring(
        replace(options, device=kind, dtype=part.dtypes[kind]), batch_tokens=part.batch_tokens, threads=threads
    )
