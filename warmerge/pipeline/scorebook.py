"""Rewards of the same texts by many models: each model is scored once, and what is finished is kept in a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import Finding, Interrupted, RefusedError, UsageError, plain
from warmerge.pipeline.kept import read_kept, write_kept
from warmerge.pipeline.mixtures import digests_of_small_files
from warmerge.pipeline.prepare import Spec, prepare
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import RewardModel, fill, load_reward_model
from warmerge.rewards.scoring import Tokens, doubts_of, score
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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.pairs import Text

    Array = NDArray[numpy.float64]

SCORES = "scores.safetensors"


@dataclass(frozen=True)
class Judge:
    """A model that gives rewards: a checkpoint, or with `plan` the average of several, made in memory.

    `inputs` are the checkpoints that it is made of; `fingerprints` name the weights of each.
    """

    label: str
    inputs: tuple[Checkpoint, ...]
    fingerprints: tuple[str, ...]
    plan: MergePlan | None = None
    warnings: tuple[Finding, ...] = ()

    def contents(self) -> list[str]:
        """What decides its weights: a file that was written anew is another one."""
        if self.plan is not None:
            return [plan_fingerprint(self.plan, self.fingerprints)]
        (source,) = self.inputs
        # The scale of an adapter's product stands in its config alone.
        scale = hashlib.sha256(small_file(source, ADAPTER_CONFIG) or b"").hexdigest()
        files = [f"{f.identity}\0{name}\0{getattr(f, 'states', {}).get(name)}" for f, name in source.weight_files]
        return [*self.fingerprints, *files, scale]

    @property
    def folders(self) -> set[Path]:
        """Where its inputs lie on this machine."""
        return {source.folder.path for source in self.inputs if isinstance(source.folder, LocalFolder)}

    def ingredients(self) -> set[str]:
        """The fingerprints of its weights, and of those that they were made of, where warmerge.json says so."""
        earlier = [entry for folder in self.folders for entry in made_of(folder)]
        return {*self.fingerprints, *(str(entry["fingerprint"]) for entry in earlier if "fingerprint" in entry)}


@dataclass(frozen=True)
class Scores:
    """A judge's rewards (texts,) and how they came about: seconds to score and to merge, bytes of weights in memory,
    dtype and device, texts that were cut, reasons for doubt, and when the run began that computed them: seconds of
    different runs cannot be compared."""

    rewards: Array
    seconds: float
    merge_seconds: float
    weights_bytes: int
    computed: str
    prompt_cut: int
    answer_cut: int
    doubts: tuple[tuple[str, str], ...]
    run: float


@dataclass
class ScoreBook:
    """Texts, and what judges say of them. `kept` holds the scores by a judge's key, those of earlier runs too."""

    texts: Sequence[tuple[Text, Text]]
    fingerprint: str
    measuring: Measuring
    store: Path | None
    kept: dict[str, Scores] = field(default_factory=dict)
    begun: float = field(default_factory=time.time)
    _tokens: list[Tokens] = field(default_factory=list)

    def missing(self, judges: Sequence[Judge]) -> int:
        """How many texts are still to be scored."""
        return len({self._key(judge) for judge in judges} - self.kept.keys()) * len(self.texts)

    def scores(self, judge: Judge) -> Scores:
        """The judge's rewards of all texts; from `kept` if they are there.

        Raises:
            Interrupted: Ctrl-C; says what is kept.
            UsageError, RefusedError, WarmergeError: as `load_reward_model` and `scoring.score`.
        """
        key = self._key(judge)
        if key not in self.kept:
            try:
                self.kept[key] = self._score(judge)
                self._save()
            except KeyboardInterrupt:
                raise Interrupted(self._stopped()) from None
        return self.kept[key]

    def _score(self, judge: Judge) -> Scores:
        model = load_reward_model(judge.inputs[0], self.measuring.loading, self.measuring.base)
        begun = time.perf_counter()
        model = _filled(model, judge, self.measuring)
        merge_seconds = time.perf_counter() - begun
        doubts = tuple((doubt.where, doubt.what) for doubt in doubts_of(model))
        # Made before the clock runs: only the first model would pay for the tokens that all of them use.
        tokens = self._tokens_of(model)
        cut = tokens.cut()
        begun = time.perf_counter()
        rewards = score(model, tokens, self.measuring.batch_tokens, self.measuring.progress)
        seconds = time.perf_counter() - begun
        computed = f"{str(model.module.dtype).removeprefix('torch.')} on {model.device.type}"
        return Scores(rewards, seconds, merge_seconds, model.nbytes, computed, *cut, doubts, self.begun)

    def _tokens_of(self, model: RewardModel) -> Tokens:
        """The tokens of all texts by a model's own rule; those of an earlier model of an equal rule, if any."""
        for known in self._tokens:
            if known.renderer == model.renderer:
                return known
        self._tokens.append(Tokens(model.renderer, self.texts))
        return self._tokens[-1]

    def _key(self, judge: Judge) -> str:
        """What decides a judge's rewards of these texts."""
        small, loading = digests_of_small_files(judge.inputs[0]), asdict(self.measuring.loading)
        decides = [judge.contents(), small, loading, versions(), self.fingerprint]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _save(self) -> None:
        if self.store is None:
            return
        facts = {key: {k: v for k, v in vars(found).items() if k != "rewards"} for key, found in self.kept.items()}
        rewards = {key: found.rewards for key, found in self.kept.items()}
        write_kept(self.store / SCORES, rewards, {"facts": json.dumps(facts)})

    def _stopped(self) -> str:
        if self.store is None or not self.kept:
            return "stopped; nothing is kept"
        count = f"the rewards of {len(self.kept)} model{'s' if len(self.kept) > 1 else ''}"
        return f"stopped; {count} are kept in {plain(str(self.store / SCORES))}; the same command goes on there"


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
    (source,) = make_local([opened])
    return Judge(source.label, (source,), (read_sample(source).fingerprint,))


def load_judge(judge: Judge, measuring: Measuring) -> RewardModel:
    """A judge with its weights in memory, merged there if it is an average.

    Raises:
        UsageError, RefusedError, WarmergeError: as `load_reward_model` and `fill`.
    """
    return _filled(load_reward_model(judge.inputs[0], measuring.loading, measuring.base), judge, measuring)


def _filled(model: RewardModel, judge: Judge, measuring: Measuring) -> RewardModel:
    """The model of a judge's first input, with the weights of the average where it is one."""
    return model if judge.plan is None else fill(model, judge.plan, judge.label, measuring.threads)


def open_average(label: str, checkpoints: Sequence[Spec], base: Spec | None = None) -> Judge:
    """The uniform average of checkpoints as a judge, checked as `average` checks it; nothing is merged yet.

    Raises:
        UsageError, RefusedError, RemoteError: as `prepare`.
    """
    # A base is for adapters: full models beside an adapter elsewhere are averaged without it.
    adapters = base is not None and any("adapter" in open_checkpoint(spec, base).details for spec in checkpoints)
    prepared = prepare(checkpoints, base=base if adapters else None)
    return Judge(label, tuple(prepared.plan.members), prepared.fingerprints, prepared.plan, prepared.warnings)


def open_book(
    texts: Sequence[tuple[Text, Text]],
    fingerprint: str,
    measuring: Measuring,
    store: Path | None = None,
    overwrite: bool = False,
) -> ScoreBook:
    """A book of the texts, with what an earlier run left in `store`.

    Args:
        fingerprint: of the texts.
        overwrite: start anew where what lies there is damaged. Rewards of the same weights, texts, options and versions
            are those that would come out again, and are used in any case.

    Raises:
        UsageError: what lies there is damaged, and not `overwrite`.
    """
    kept: dict[str, Scores] = {}
    path = None if store is None else store / SCORES
    if path is not None and path.exists():
        try:
            rewards, metadata = read_kept(path)
            for key, facts in json.loads(metadata["facts"]).items():
                doubts = tuple((where, what) for where, what in facts.pop("doubts"))
                kept[key] = Scores(rewards[key], doubts=doubts, **facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not overwrite:
                what = f"{plain(str(path))} is damaged ({error}); add --overwrite to start anew"
                raise UsageError(what) from None
            kept = {}
    return ScoreBook(texts, fingerprint, measuring, store, kept)
