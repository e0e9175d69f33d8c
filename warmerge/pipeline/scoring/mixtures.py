"""Rewards of weighted averages of the same members: one live model, filled anew for each; every mixture scored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, Interrupted, UsageError, plain
from warmerge.pipeline.prepare import Prepared, Spec, mixture, prepare
from warmerge.pipeline.scoring.kept import read_kept, write_kept
from warmerge.rewards.bench import Bench
from warmerge.rewards.model import RewardModel, fill, load_reward_model
from warmerge.version import versions
from warmerge.weights import small_files
from warmerge.weights.average import plan_fingerprint
from warmerge.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

Weights = tuple[float, ...]
POINTS = "points.safetensors"


@dataclass
class Mixtures:
    """Members that may be averaged, a test bench, and what is known of their mixtures.

    `known` holds the rewards (N,) of each set by the mixture's weights. With `store` they are also kept in a file there
    after each mixture, so that an interrupted run goes on where it stopped. `facts` are about the model that computed
    them, and are kept beside them: how it computed, the doubts found on loading it, how many texts it cut.
    """

    prepared: Prepared
    bench: Bench
    store: Path | None
    fingerprint: str
    known: dict[Weights, dict[str, Array]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    _model: RewardModel | None = None

    @property
    def count(self) -> int:
        return len(self.prepared.plan.members)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Reasons for doubt of the merge and of the model."""
        return (*self.prepared.warnings, *(Finding(*doubt) for doubt in self.facts.get("doubts", ())))

    @property
    def cuts(self) -> dict[str, dict[str, int]]:
        """As `Bench.cuts`, also where an earlier run scored all texts."""
        found: dict[str, dict[str, int]] = self.facts.get("cut", {})
        return found

    def single(self, i: int) -> Weights:
        """The weights of member i alone."""
        return tuple(float(i == j) for j in range(self.count))

    def uniform(self, chosen: Sequence[int]) -> Weights:
        """The weights of the average of some members."""
        return tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(self.count))

    def rewards(self, weights: Weights) -> dict[str, Array]:
        """The rewards (N,) of every scored set by the mixture with these weights; from `known` if they are there.

        Raises:
            Interrupted: Ctrl-C; says how many mixtures are kept.
            UsageError: the kept ones were computed in another precision.
        """
        if weights not in self.known:
            try:
                live, threads = self._live(), self.bench.measuring.threads
                model = fill(live, mixture(self.prepared.plan.members, weights), f"mixture {weights}", threads)
                self.known[weights] = self.bench.score(model)
                self.facts["cut"] = self.bench.cuts()
                self._save()
            except KeyboardInterrupt:
                raise Interrupted(self._stopped()) from None
        return self.known[weights]

    def measure(self, wanted: Iterable[Weights]) -> None:
        """Computes all of these mixtures; raises as `rewards`."""
        for weights in wanted:
            self.rewards(weights)

    def missing(self, wanted: Iterable[Weights]) -> int:
        """How many texts these mixtures still take."""
        todo = len({weights for weights in wanted if weights not in self.known})
        return todo * sum(map(len, self.bench.texts().values()))

    def _live(self) -> RewardModel:
        if self._model is None:
            model = load_reward_model(self.prepared.plan.members[0], self.bench.measuring.loading)
            # --dtype auto depends on the machine: a curve in two precisions would show a barrier that is none.
            computed = f"{str(model.module.dtype).removeprefix('torch.')} on {model.device.type}"
            if self.known and self.facts["computed"] != computed:
                if not self.overwrite:
                    what = f"holds points computed in {self.facts['computed']}, here it would be {computed}"
                    hint = "give --dtype and --device as they were, or choose another -o, or add --overwrite"
                    raise UsageError(f"{plain(str(self.store))} {what}; {hint}")
                self.known.clear()
            doubts = [(doubt.where, doubt.what, doubt.tensor) for doubt in model.warnings]
            self.facts, self._model = {"computed": computed, "doubts": doubts}, model
        return self._model

    def _stopped(self) -> str:
        if self.store is None or not self.known:
            return "stopped; nothing is kept"
        points = f"{len(self.known)} point{'s are' if len(self.known) > 1 else ' is'}"
        return f"stopped; {points} kept in {plain(str(self.store))}; the same command goes on there"

    def _save(self) -> None:
        if self.store is None:
            return
        points = {
            json.dumps([name, *weights]): rewards
            for weights, sets in self.known.items()
            for name, rewards in sets.items()
        }
        metadata = {"fingerprint": self.fingerprint, "facts": json.dumps(self.facts)}
        write_kept(self.store / POINTS, points, metadata)


def open_mixtures(
    checkpoints: Sequence[Spec], bench: Bench, store: Path | None = None, overwrite: bool = False
) -> Mixtures:
    """Checks that the checkpoints may be averaged, and finds what an earlier run with the same inputs left in `store`.

    Args:
        overwrite: start anew where `store` holds points of other inputs, or damaged ones.

    Raises:
        RefusedError: they may not be averaged.
        UsageError: `store` holds such points, and not `overwrite`.
    """
    prepared, loading = prepare(checkpoints, base=bench.measuring.base), asdict(bench.measuring.loading)
    inputs: list[Any] = [plan_fingerprint(prepared.plan, prepared.fingerprints), loading, versions()]
    inputs += [digests_of_small_files(prepared.plan.members[0])]
    inputs += sorted({(subset.scored, subset.preferences.fingerprint) for subset in bench.sets})
    fingerprint = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    known: dict[Weights, dict[str, Array]] = {}
    facts: dict[str, Any] = {}
    if store is not None and (store / POINTS).exists():
        try:
            known, facts = _stored(store, fingerprint)
        except UsageError:
            if not overwrite:
                raise
    return Mixtures(prepared, bench, store, fingerprint, known, facts, overwrite)


def digests_of_small_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of what turns texts into tokens and weights into a model: config, tokenizer, template, code."""
    names = (*small_files.OTHER_FILES, *small_files.TOKENIZER_FILES)
    files = {name: small_files.small_file(checkpoint, name) for name in names} | small_files.code_files(checkpoint)
    # An adapter's tokenizer may lie beside it, and the code of its model beside the base.
    files |= {f"tokenizer's {name}": data for name, data in small_files.tokenizer_code(checkpoint).items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if data is not None}


def _stored(store: Path, fingerprint: str) -> tuple[dict[Weights, dict[str, Array]], dict[str, Any]]:
    path = store / POINTS
    try:
        points, metadata = read_kept(path)
        if metadata.get("fingerprint") != fingerprint:
            what = "holds points of other checkpoints, data, options or versions"
            raise UsageError(f"{plain(str(store))} {what}; choose another -o, or add --overwrite")
        facts: dict[str, Any] = json.loads(metadata["facts"])
    except (ValueError, KeyError) as error:
        raise UsageError(f"{plain(str(path))} is damaged ({error}); add --overwrite to start anew") from None
    known: dict[Weights, dict[str, Array]] = {}
    for key, rewards in points.items():
        name, *weights = json.loads(key)
        known.setdefault(tuple(weights), {})[name] = rewards
    return known, facts
