"""Texts -> rewards: every score equals the model's own for that text alone, and NaN or infinity is no score.

The ways to run a model are in `forward`; the one that is used was found to agree with the model's own output.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy
import torch

from warmerge.errors import Finding, RefusedError, WarmergeError
from warmerge.rewards.forward import (
    Batches,
    Group,
    Ids,
    group_by_prefix,
    one_by_one,
    padded,
    prefix_reuse,
    scored_position,
)
from warmerge.rewards.model import RewardModel, is_causal
from warmerge.rewards.render import Encoded, Renderer, encode
from warmerge.rewards.tokenizer import quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.pairs import Text

__all__ = [
    "Group", "Tokens", "doubts_of", "group_by_prefix", "method_of", "one_by_one", "padded", "prefix_reuse", "score",
    "scored_position", "windows",
]  # fmt: skip
# Texts tokenised at a time: few at first, so that the model starts early; many later, so that lengths match.
_FIRST_WINDOW, _WINDOW = 256, 2048
# A module's verified method; forgotten with the module.
_METHODS: weakref.WeakKeyDictionary[Any, Callable[[Any, Ids, int], Batches]] = weakref.WeakKeyDictionary()


def windows(count: int) -> list[range]:
    """Which of so many texts are tokenised and scored together. No batch holds texts of two windows, so the rewards of
    one do not depend on where, when or beside which others it is scored.

    >>> windows(2400)
    [range(0, 256), range(256, 2304), range(2304, 2400)]
    """
    bounds = [0, *range(_FIRST_WINDOW, count, _WINDOW), count]
    return [range(a, b) for a, b in itertools.pairwise(bounds) if b > a]


class Tokens:
    """The tokens of many texts, made in a thread ahead of the model that reads them, and kept for the next model.

    With `window` the texts are that one window of a longer list. `waited` counts the seconds that models waited for
    their tokens.
    """

    def __init__(self, renderer: Renderer, texts: Sequence[tuple[Text, Text]], window: range | None = None) -> None:
        assert window is None or len(window) == len(texts)
        self.renderer = renderer
        self.texts = texts
        self.first = 0 if window is None else window.start
        self.waited = 0.0
        self._windows = windows(len(texts)) if window is None else [window]
        self._made: list[Future[list[Encoded]]] = []

    def begin(self) -> None:
        """Starts the thread that makes them, if it was not started before."""
        if not self._made:
            pool = ThreadPoolExecutor(1)
            for window in self._windows:
                part = self.texts[window.start - self.first : window.stop - self.first]
                self._made.append(pool.submit(encode, self.renderer, part))
            pool.shutdown(wait=False)

    def __iter__(self) -> Iterator[tuple[range, list[Encoded]]]:
        """Windows of texts: which ones, and their tokens."""
        self.begin()
        for window, made in zip(self._windows, self._made, strict=True):
            begun = time.perf_counter()
            encoded = made.result()
            self.waited += time.perf_counter() - begun
            yield window, encoded

    def cut(self) -> tuple[int, int]:
        """How many texts lost a part of their prompt, and how many of their answer."""
        encoded = [entry for _, made in self for entry in made]
        return sum(entry.prompt_cut for entry in encoded), sum(entry.answer_cut for entry in encoded)


def score(
    model: RewardModel,
    tokens: Tokens,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[numpy.float64]:
    """The reward of each text, (N,): the model's own output for that text alone (to 1e-4 in float32).

    Args:
        tokens: of the model's own renderer, or of an equal one.
        batch_tokens: the most tokens in a forward pass, padding included; halved when a GPU runs out of memory.
        progress: called with the number of texts that were finished.

    Raises:
        RefusedError: a reward that is not finite.
        WarmergeError: out of memory with a single text.
    """
    rewards = numpy.full(len(tokens.texts), numpy.nan)
    for rows, values in outputs(model, tokens, batch_tokens, progress):
        rewards[[row - tokens.first for row in rows]] = values[:, 0]
    return rewards


def outputs(
    model: RewardModel,
    tokens: Tokens,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[int], NDArray[numpy.float64]]]:
    """Which texts, and what the module gives for each, (texts, outputs): every text once. Otherwise as `score`."""
    assert tokens.renderer == model.renderer, "tokens of another tokenizer"
    method = method_of(model)
    budget = batch_tokens or (4096 if model.device.type == "cpu" else 65536)
    for window, encoded in tokens:
        left = set(window)
        while left:
            todo = sorted(left)
            ids = [encoded[i - window.start].ids for i in todo]
            try:
                # Inference mode is entered for each step: a generator that is not run to its end would leave it on.
                batches = method(model.module, ids, budget)
                while True:
                    with quiet(), torch.inference_mode():
                        found = next(batches, None)
                    if found is None:
                        break
                    done, values = [todo[row] for row in found[0]], found[1].double().cpu().numpy()
                    _refuse_not_finite(model, values, done)
                    left.difference_update(done)
                    yield done, values
                    if progress is not None:
                        progress(len(done))
            except torch.OutOfMemoryError:
                if budget <= max(map(len, ids)):
                    what = "out of memory with one text at a time; try --max-length, --dtype bfloat16 or a larger GPU"
                    raise WarmergeError(f"{model.label}: {what}") from None
                torch.cuda.empty_cache()
                budget //= 2


def method_of(model: RewardModel) -> Callable[[Any, Ids, int], Batches]:
    """The fastest way to score with this model that agrees with its own output on a few texts of random tokens.

    One text at a time is the way of a model that no other way agrees with.
    """
    module = model.module
    if module not in _METHODS:
        preferred = prefix_reuse if is_causal(module) else padded
        _METHODS[module] = preferred if _agrees(preferred, module, model.renderer.max_length) else one_by_one
    return _METHODS[module]


def doubts_of(model: RewardModel) -> list[Finding]:
    """Reasons for doubt found on loading a model, and whether it is scored the slow way."""
    slow = method_of(model) is one_by_one
    what = "is scored one text at a time: no faster way agrees with its own output"
    return [*model.warnings, *([Finding(model.label, what)] if slow else [])]


def _agrees(method: Callable[[Any, Ids, int], Batches], module: Any, max_length: int) -> bool:
    """Whether a method gives what the model gives for each text alone, in one chunk with padding and in several."""
    tolerance = 1e-3 if module.dtype == torch.float32 else 0.1
    try:
        ids = [row[-max_length:] for row in _probes(module)]
        with quiet(), torch.inference_mode():
            expected = torch.cat([values for _, values in one_by_one(module, ids, 0)])
            for budget in (4096, 100):
                found = torch.full_like(expected, torch.nan)
                for rows, values in method(module, ids, budget):
                    found[rows] = values
                if not torch.all((found - expected).abs() <= tolerance * (1 + expected.abs())):
                    return False
    except Exception:  # noqa: BLE001 - a cache, a mask or a head of another kind, or a model that refuses random tokens
        return False
    return True


def _probes(module: Any) -> list[NDArray[numpy.int64]]:
    """Random texts, the same each time: two groups with a shared prefix, and texts with padding tokens in them."""
    random = numpy.random.default_rng(0)
    vocabulary, pad = module.get_input_embeddings().weight.shape[0], module.config.get_text_config().pad_token_id
    ordinary = numpy.setdiff1d(numpy.arange(vocabulary), [pad or 0])
    ids = [random.choice(ordinary, 5)]
    for lengths in ((3, 7, 12), (4, 6)):
        shared = random.choice(ordinary, 20)
        ids += [numpy.concatenate([shared, random.choice(ordinary, n)]) for n in lengths]
    if pad is not None and pad < vocabulary:
        ids.append(numpy.concatenate([ids[-1], [pad]]))
        ids.append(numpy.concatenate([ids[0], [pad], ids[0]]))
    return ids


def _refuse_not_finite(model: RewardModel, values: NDArray[numpy.float64], texts: Sequence[int]) -> None:
    wrong = numpy.argwhere(~numpy.isfinite(values))
    if len(wrong):
        row, column = wrong[0]
        value, text = values[row, column], texts[row] + 1
        what = f"gives the reward {value} to text {text}; its weights hold NaN or overflow its dtype"
        raise RefusedError([Finding(model.label, what)])
