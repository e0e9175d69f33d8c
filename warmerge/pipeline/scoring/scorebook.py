"""Rewards of the same texts by many models: each model is scored once, and what is finished is kept in a file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import Interrupted, UsageError, plain
from warmerge.pipeline.scoring import Asked, Found, remove_units, score_all, unit_folder
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.kept import read_kept, write_kept
from warmerge.report.results import only_writer
from warmerge.rewards.bench import Measuring
from warmerge.rewards.scoring import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.pairs import Text

    Array = NDArray[numpy.float64]

SCORES = "scores.safetensors"
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


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
    """Texts, and what judges say of them. `kept` holds the scores by a judge's key, those of earlier runs too.

    `engine` and `address` are as for `scoring.score_all`; the units of an engine lie in `store`.
    """

    texts: Sequence[tuple[Text, Text]]
    fingerprint: str
    measuring: Measuring
    store: Path | None
    kept: dict[str, Scores] = field(default_factory=dict)
    begun: float = field(default_factory=time.time)
    engine: str = "inline"
    address: str = "auto"
    _tokens: list[Tokens] = field(default_factory=list)

    def missing(self, judges: Sequence[Judge]) -> int:
        """How many texts are still to be scored."""
        return len(self._missing(judges)) * len(self.texts)

    def scores(self, judge: Judge) -> Scores:
        """The judge's rewards of all texts; from `kept` if they are there. Raises as `measure`."""
        self.measure([judge])
        return self.kept[self._key(judge)]

    def measure(self, judges: Sequence[Judge]) -> None:
        """Scores the judges that are not in `kept`, each once.

        Raises:
            Interrupted: Ctrl-C; says what is kept.
            UsageError, RefusedError, WarmergeError: as `scoring.score_all`.
        """
        missing = self._missing(judges)
        asked = [Asked(judge, (self.texts,)) for judge in missing.values()]
        units = None if self.store is None else unit_folder(self.store / SCORES)
        try:
            found = score_all(
                asked, self.measuring, engine=self.engine, address=self.address, store=units, tokens=self._tokens
            )
            for key, one in zip(missing, found, strict=True):
                self.kept[key] = self._scores(one)
                self._save()
        except KeyboardInterrupt:
            raise Interrupted(self._stopped()) from None
        if units is not None:
            remove_units([Asked(judge, (self.texts,)) for judge in judges], self.measuring, units)

    def _scores(self, found: Found) -> Scores:
        doubts = tuple((doubt.where, doubt.what) for doubt in found.doubts)
        (rewards,), (seconds,), (cut,) = found.rewards, found.seconds, found.cuts
        return Scores(
            rewards, seconds, found.merge_seconds, found.weights_bytes, found.computed, *cut, doubts, self.begun
        )

    def _missing(self, judges: Sequence[Judge]) -> dict[str, Judge]:
        """The judges that are still to be scored, each once, by their keys."""
        found: dict[str, Judge] = {}
        for judge in judges:
            key = self._key(judge)
            if key not in self.kept:
                found.setdefault(key, judge)
        return found

    def _key(self, judge: Judge) -> str:
        """What decides a judge's rewards of these texts."""
        return judge.key(self.measuring.loading, self.fingerprint)

    def _save(self) -> None:
        """Writes what is known, and what another command kept there since the book was opened."""
        if self.store is None:
            return
        path = self.store / SCORES
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(path):
            with contextlib.suppress(FileNotFoundError, *_DAMAGED):  # of which `open_book` has told
                self.kept = {**_read(path), **self.kept}
            self._write(path)

    def _write(self, path: Path) -> None:
        facts = {key: {k: v for k, v in vars(found).items() if k != "rewards"} for key, found in self.kept.items()}
        rewards = {key: found.rewards for key, found in self.kept.items()}
        write_kept(path, rewards, {"facts": json.dumps(facts)})

    def _stopped(self) -> str:
        if self.store is None or not self.kept:
            return "stopped; nothing is kept"
        count = f"the rewards of {len(self.kept)} model{'s' if len(self.kept) > 1 else ''}"
        return f"stopped; {count} are kept in {plain(str(self.store / SCORES))}; the same command goes on there"


def open_book(
    texts: Sequence[tuple[Text, Text]],
    fingerprint: str,
    measuring: Measuring,
    store: Path | None = None,
    overwrite: bool = False,
    *,
    engine: str = "inline",
    address: str = "auto",
) -> ScoreBook:
    """A book of the texts, with what an earlier run left in `store`.

    Args:
        fingerprint: of the texts.
        overwrite: start anew where what lies there is damaged. Rewards of the same weights, texts, options and versions
            are those that would come out again, and are used in any case.
        engine, address: as for `scoring.score_all`.

    Raises:
        UsageError: what lies there is damaged, and not `overwrite`.
    """
    kept: dict[str, Scores] = {}
    path = None if store is None else store / SCORES
    if path is not None and path.exists():
        try:
            kept = _read(path)
        except _DAMAGED as error:
            if not overwrite:
                what = f"{plain(str(path))} is damaged ({error}); add --overwrite to start anew"
                raise UsageError(what) from None
    return ScoreBook(texts, fingerprint, measuring, store, kept, engine=engine, address=address)


def _read(path: Path) -> dict[str, Scores]:
    """What was kept in a file, by the keys of judges. Raises one of _DAMAGED where it is no such file."""
    rewards, metadata = read_kept(path)
    kept = {}
    for key, facts in json.loads(metadata["facts"]).items():
        doubts = tuple((where, what) for where, what in facts.pop("doubts"))
        kept[key] = Scores(rewards[key], doubts=doubts, **facts)
    return kept
