"""The training pairs as token ids: made once for all members, kept in one file, dealt out in batches by a seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import Finding, RefusedError
from warmerge.rewards.forward import chunks
from warmerge.rewards.pairs import PreferenceSet, UniqueTexts
from warmerge.rewards.scoring import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[numpy.int64]


@dataclass(frozen=True)
class TrainingSet:
    """n pairs of N texts. Text i is ids[starts[i]:starts[i + 1]]; pair k is of the texts chosen[k] and rejected[k].

    `margins` (n,), float64, by how much the reward of the chosen answer should be larger at least; 0 where unsaid.
    """

    ids: Integers
    starts: Integers
    chosen: Integers
    rejected: Integers
    margins: NDArray[numpy.float64]

    def __len__(self) -> int:
        return len(self.chosen)

    def text(self, i: int) -> Integers:
        """The token ids of a text, (length,)."""
        return self.ids[self.starts[i] : self.starts[i + 1]]

    def tokens(self, pairs: Integers) -> int:
        """How many tokens the texts of these pairs have."""
        lengths = numpy.diff(self.starts)
        return int(lengths[self.chosen[pairs]].sum() + lengths[self.rejected[pairs]].sum())

    def longest(self, pairs: Integers) -> Integers:
        """Tokens of the longer text of each of these pairs, (len(pairs),)."""
        lengths = numpy.diff(self.starts)
        return numpy.maximum(lengths[self.chosen[pairs]], lengths[self.rejected[pairs]])


def tokenise_pairs(
    preferences: PreferenceSet, texts: UniqueTexts, tokens: Tokens, swapped: Sequence[int] = ()
) -> TrainingSet:
    """The comparisons as pairs: every chosen answer against every rejected one.

    Args:
        tokens: of `texts.texts`.
        swapped: comparisons (counted from 0) in which chosen and rejected are exchanged.

    Raises:
        RefusedError: the answers of all pairs have the same tokens, so that there is nothing to learn.
    """
    ids = [entry.ids for _, made in tokens for entry in made]
    wrong = set(swapped)
    rows = []
    for k, comparison in enumerate(preferences.comparisons):
        sides = (texts.chosen[k], texts.rejected[k])
        for chosen, rejected in itertools.product(*(sides[::-1] if k in wrong else sides)):
            rows.append((chosen, rejected, comparison.margin))
    if all(numpy.array_equal(ids[chosen], ids[rejected]) for chosen, rejected, _ in rows):
        what = "chosen and rejected have the same tokens in every pair: there is nothing to learn"
        raise RefusedError([Finding(preferences.source, what)])
    places = numpy.array([row[:2] for row in rows], dtype=numpy.int64)
    margins = numpy.array([row[2] for row in rows], dtype=numpy.float64)
    starts = numpy.cumsum([0, *(len(row) for row in ids)], dtype=numpy.int64)
    return TrainingSet(numpy.concatenate(ids), starts, places[:, 0], places[:, 1], margins)


def pair_clusters(texts: UniqueTexts) -> list[str]:
    """The prompt of each pair that `tokenise_pairs` makes: every chosen answer against every rejected one."""
    sizes = [len(chosen) * len(rejected) for chosen, rejected in zip(texts.chosen, texts.rejected, strict=True)]
    return [cluster for cluster, size in zip(texts.clusters, sizes, strict=True) for _ in range(size)]


def save_pairs(pairs: TrainingSet, path: Path, fingerprint: str) -> None:
    """Writes them as one safetensors file. `fingerprint` stands for what they were made from."""
    from safetensors.numpy import save

    arrays = {name: numpy.ascontiguousarray(value) for name, value in vars(pairs).items()}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save(arrays, metadata={"fingerprint": fingerprint}))
    partial.replace(path)


def read_pairs(path: Path, fingerprint: str) -> TrainingSet:
    """The pairs of a file.

    Raises:
        RefusedError: the file is not there or damaged, or was made from something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            found = (file.metadata() or {}).get("fingerprint")
            arrays = {field.name: file.get_tensor(field.name) for field in fields(TrainingSet)}
    except (SafetensorError, OSError) as error:
        what = f"cannot be read as training pairs ({error}); train into a new folder"
        raise RefusedError([Finding(str(path), what)]) from None
    if found != fingerprint:
        what = f"holds the pairs {found}, expected {fingerprint}; train into a new folder"
        raise RefusedError([Finding(str(path), what)])
    return TrainingSet(**arrays)


def batch_of(step: int, pairs: int, size: int, seed: int) -> Integers:
    """Which pairs a step takes, (size,). Epochs follow one another without a gap, each in an order of its own.

    A function of the step: a run that goes on needs no memory of what it has seen.

    >>> first, second = batch_of(0, 4, 3, seed=0), batch_of(1, 4, 3, seed=0)
    >>> sorted({*first.tolist(), int(second[0])})
    [0, 1, 2, 3]
    """
    places = numpy.arange(step * size, (step + 1) * size)
    orders = {int(epoch): _order(int(epoch), pairs, seed) for epoch in numpy.unique(places // pairs)}
    return numpy.array([orders[int(place // pairs)][place % pairs] for place in places])


def _order(epoch: int, pairs: int, seed: int) -> Integers:
    return numpy.random.default_rng([seed, epoch]).permutation(pairs)


def micro_batches(lengths: Integers, budget: int, parts: int = 1) -> list[Integers]:
    """The pairs of a batch (indices), of similar length together, in at least `parts` forward passes.

    Args:
        lengths: (n,), of the longer text of each pair.
        budget: most tokens of a pass, padding included; both texts of a pair are in one pass. A pass also ends where
            its padding would cost more than another one does.

    >>> [part.tolist() for part in micro_batches(numpy.array([5, 9, 9, 5]), 20)]
    [[1], [2], [0, 3]]
    """
    found = chunks(range(len(lengths)), (2 * lengths).tolist(), budget)
    while len(found) < parts:  # ranks pass in step: those with fewer passes split their largest
        largest = max(range(len(found)), key=lambda k: len(found[k]))
        assert len(found[largest]) > 1, "fewer pairs than passes"
        half = len(found[largest]) // 2
        found[largest : largest + 1] = [found[largest][:half], found[largest][half:]]
    return [numpy.array(part) for part in found]
