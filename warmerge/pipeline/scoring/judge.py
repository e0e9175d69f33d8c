"""A judge: a model that gives rewards, opened and named by its weights, not yet loaded. A checkpoint, or an average."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from warmerge.errors import Finding, RefusedError
from warmerge.pipeline.prepare import Spec, prepare
from warmerge.pipeline.scoring.mixtures import digests_of_small_files
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions, RewardModel, fill, load_reward_model
from warmerge.rewards.scoring import method_of
from warmerge.version import versions
from warmerge.weights.average import plan_fingerprint
from warmerge.weights.checkpoint import ADAPTER_CONFIG, Checkpoint
from warmerge.weights.folder import LocalFolder
from warmerge.weights.heads import is_head
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.output import made_of
from warmerge.weights.plan import MergePlan
from warmerge.weights.samples import read_sample
from warmerge.weights.small_files import small_file


@dataclass(frozen=True)
class Judge:
    """A model that gives rewards: a checkpoint, or with `plan` the average of several, made in memory.

    `inputs` are the checkpoints that it is made of; `fingerprints` name the weights of each. An average is poured into
    the model of `into`, a checkpoint of the same architecture; into that of its first input if not given. For other
    machines, which open all of it again: `specs` are how the inputs were named, `base` what adapters among them adapt,
    `dtype` what `plan` was made with.
    """

    label: str
    inputs: tuple[Checkpoint, ...]
    fingerprints: tuple[str, ...]
    plan: MergePlan | None = None
    warnings: tuple[Finding, ...] = ()
    specs: tuple[Spec, ...] = ()
    base: Spec | None = None
    dtype: str = "auto"
    into: Judge | None = None

    @property
    def host(self) -> Checkpoint:
        """What is loaded: the checkpoint itself, or whose module an average is poured into."""
        return self.inputs[0] if self.into is None else self.into.inputs[0]

    def contents(self) -> list[str]:
        """What decides its weights: a file that was written anew is another one."""
        if self.plan is not None:
            host = [] if self.into is None else self.into.contents()
            return [plan_fingerprint(self.plan, self.fingerprints), *host]
        (source,) = self.inputs
        files = [f"{f.identity}\0{name}\0{getattr(f, 'states', {}).get(name)}" for f, name in source.weight_files]
        return [*self.fingerprints, *files, adapter_digest(source)]

    def key(self, loading: LoadOptions, *more: str) -> str:
        """What decides its rewards (hex): its weights, files beside them, how it is loaded, versions, and `more`."""
        decides = [self.contents(), digests_of_small_files(self.host), asdict(loading), versions(), *more]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def folders(self) -> set[Path]:
        """Where its inputs lie on this machine."""
        return {source.folder.path for source in self.inputs if isinstance(source.folder, LocalFolder)}

    def ingredients(self) -> set[str]:
        """The fingerprints of its weights, and of those that they were made of, where warmerge.json says so."""
        earlier = [entry for folder in self.folders for entry in made_of(folder)]
        return {*self.fingerprints, *(str(entry["fingerprint"]) for entry in earlier if "fingerprint" in entry)}


def adapter_digest(source: Checkpoint) -> str:
    """A digest (hex) of an adapter's config: the scale of its product stands there alone."""
    return hashlib.sha256(small_file(source, ADAPTER_CONFIG) or b"").hexdigest()


def open_model(checkpoint: Spec, base: Spec | None = None) -> Judge:
    """A checkpoint as a judge, whether it has a reward head or not; one on the Hub is downloaded.

    Raises:
        UsageError, RefusedError, RemoteError: as `locate.open_checkpoint`.
    """
    return _judge(open_checkpoint(checkpoint, base), checkpoint, base)


def _judge(opened: Checkpoint, checkpoint: Spec, base: Spec | None) -> Judge:
    (source,) = make_local([opened])
    return Judge(source.label, (source,), (read_sample(source).fingerprint,), specs=(checkpoint,), base=base)


def open_judge(checkpoint: Spec, base: Spec | None = None) -> Judge:
    """A checkpoint as a judge; one on the Hub is downloaded.

    Raises:
        RefusedError: it has no reward head, which would be noticed on loading, after other models were scored.
        UsageError, RefusedError, RemoteError: as `locate.open_checkpoint`.
    """
    opened = open_checkpoint(checkpoint, base)
    if not any(map(is_head, opened.tensors)) and not (opened.config or {}).get("auto_map"):
        what = "has no reward head (no tensor named like score.weight, classifier.*, v_head.*): it is no reward model"
        raise RefusedError([Finding(opened.label, what)])
    return _judge(opened, checkpoint, base)


def open_average(label: str, checkpoints: Sequence[Spec], base: Spec | None = None) -> Judge:
    """The uniform average of checkpoints as a judge, checked as `average` checks it; nothing is merged yet.

    Raises:
        UsageError, RefusedError, RemoteError: as `prepare`.
    """
    # A base is for adapters: full models beside an adapter elsewhere are averaged without it.
    adapters = base is not None and any("adapter" in open_checkpoint(spec, base).details for spec in checkpoints)
    base = base if adapters else None
    prepared = prepare(checkpoints, base=base)
    members, specs = tuple(prepared.plan.members), tuple(checkpoints)
    return Judge(label, members, prepared.fingerprints, prepared.plan, prepared.warnings, specs, base)


def load_judge(judge: Judge, measuring: Measuring) -> RewardModel:
    """A judge with its weights in memory, merged there if it is an average.

    Raises:
        UsageError, RefusedError, WarmergeError: as `load_reward_model` and `fill`.
    """
    return poured(load_host(judge, measuring), judge, measuring)


def load_host(judge: Judge, measuring: Measuring) -> RewardModel:
    """The model that a judge's weights are, or are to be poured into, and the way to score with it.

    The way is chosen before anything is poured: it is the same wherever the average is made, in a module that was
    scored before or in a fresh one.

    Raises:
        UsageError, RefusedError, WarmergeError: as `load_reward_model`.
    """
    model = load_reward_model(judge.host, measuring.loading, measuring.base)
    method_of(model)
    return model


def poured(host: RewardModel, judge: Judge, measuring: Measuring) -> RewardModel:
    """`load_host`'s model with the weights of the judge: those of the average where it is one."""
    return host if judge.plan is None else fill(host, judge.plan, judge.label, measuring.threads)
