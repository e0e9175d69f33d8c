"""Preference sets as a test bench: a model put on it is scored on every set; accuracies come with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import UsageError, plain
from warmerge.rewards import metrics
from warmerge.rewards.model import LoadOptions, RewardModel
from warmerge.rewards.pairs import PreferenceSet, Text, UniqueTexts, read_all, unique_texts
from warmerge.rewards.render import Renderer
from warmerge.rewards.scoring import Tokens, score
from warmerge.version import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

# Of each scored set, as `Bench.cuts` counts them.
Cuts = Mapping[str, Mapping[str, int]]


def _silent(texts: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Measuring:
    """How models are measured: the same for `eval`, `lmc-curve`, accuracy against M and best-of-N.

    Args:
        loading: how models are loaded and texts rendered.
        base: for LoRA adapters, the model that they adapt.
        limit: a random sample of about so many comparisons of each set, by whole prompts; of a pool, so many prompts.
        skip_bad_rows: leave out and count the rows that do not fit, where they would be refused.
        resamples: of the bootstrap over prompts that makes the intervals.
        seed: of the bootstrap and of every random sample.
        batch_tokens: as for `scoring.score`.
        threads: CPU threads for merging in memory; all that may be used if not given.
        on_work, progress: called with the number of texts to score, and with those that are done.

    Raises:
        UsageError: fewer than 100 resamples, or a negative seed.
    """

    loading: LoadOptions = field(default_factory=LoadOptions)
    base: str | Path | None = None
    limit: int | None = None
    skip_bad_rows: bool = False
    resamples: int = 2000
    seed: int = 0
    batch_tokens: int | None = None
    threads: int | None = None
    on_work: Callable[[int], None] = _silent
    progress: Callable[[int], None] = _silent

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UsageError(f"--resamples: expected 100 or more, found {self.resamples}")
        if self.seed < 0:
            raise UsageError(f"--seed: expected 0 or more, found {self.seed}")

    def intervals(self) -> str:
        """How the intervals are made, in words."""
        return f"percentile bootstrap over prompts, {self.resamples} resamples, seed {self.seed}"


@dataclass(frozen=True)
class Subset:
    """A set of comparisons to report on. `texts` holds every answer once; `scored` names the texts it is scored by.

    `part` is "swapped" or "clean" for a part of a set whose labels were swapped (see `corruption`), else "".
    """

    name: str
    preferences: PreferenceSet
    texts: UniqueTexts
    scored: str
    part: str = ""

    @property
    def n(self) -> int:
        return len(self.texts.chosen)

    @property
    def prompts(self) -> int:
        return len(set(self.texts.clusters))

    def margins(self, rewards: Array) -> Array:
        """The least reward of a chosen answer minus the largest of a rejected one, (..., n) from rewards (..., N)."""
        return metrics.margins(rewards, self.texts.chosen, self.texts.rejected)


@dataclass
class Bench:
    """Sets of comparisons and their tokens, made once for each tokenizer."""

    sets: Sequence[Subset]
    measuring: Measuring
    _tokens: list[tuple[Renderer, str, Tokens]] = field(default_factory=list)

    def texts(self) -> dict[str, Sequence[tuple[Text, Text]]]:
        """The texts of every scored set, by name."""
        return {subset.scored: subset.texts.texts for subset in self.sets}

    def score(self, model: RewardModel) -> dict[str, Array]:
        """The model's rewards of every text, (N,) by the set that they belong to."""
        return {
            name: self._score(model, self.tokens(model.renderer, name, texts)) for name, texts in self.texts().items()
        }

    def _score(self, model: RewardModel, tokens: Tokens) -> Array:
        return score(model, tokens, self.measuring.batch_tokens, self.measuring.progress)

    def tokens(self, renderer: Renderer, name: str, texts: Sequence[tuple[Text, Text]]) -> Tokens:
        """The tokens of a set by a model's own rule; those of an earlier model of the same rule if there was one."""
        for known, other, made in self._tokens:
            if (known, other) == (renderer, name):
                return made
        made = Tokens(renderer, texts)
        self._tokens.append((renderer, name, made))
        return made

    def cuts(self) -> dict[str, dict[str, int]]:
        """How many texts of each scored set were cut to fit, as `most_cut` says."""
        return most_cut((name, len(tokens.texts), *tokens.cut()) for _, name, tokens in self._tokens)

    def means(self, subset: Subset, values: Array) -> tuple[Array, Array]:
        """Means (K,) of values (K, n), and their replicates (B, K) over the same resampled prompts for all K."""
        replicates = metrics.replicates(values, subset.texts.clusters, self.measuring.resamples, self.measuring.seed)
        return values.mean(axis=1), replicates


def open_bench(data: Sequence[str], measuring: Measuring | None = None) -> Bench:
    """A bench of whole sets, read from `NAME=PATH` or `PATH` each.

    Raises:
        UsageError: no set, or fewer than two prompts in one, so that nothing can be said about its spread.
        UsageError, RefusedError, RemoteError: as `pairs.read_all`.
    """
    measuring = measuring or Measuring()
    if not data:
        raise UsageError("--data is missing: at least one set of preference pairs, as NAME=PATH")
    sets = read_all(data, skip_bad_rows=measuring.skip_bad_rows, limit=measuring.limit, seed=measuring.seed)
    subsets = [Subset(entry.name, entry, unique_texts(entry), entry.name) for entry in sets]
    for subset in subsets:
        if subset.prompts < 2:
            raise UsageError(
                f"--data {plain(subset.name)}: {subset.n} comparisons of one prompt; an interval takes two prompts"
            )
    return Bench(subsets, measuring)


def most_cut(found: Iterable[tuple[str, int, int, int]]) -> dict[str, dict[str, int]]:
    """How many texts of each set were cut to fit, and by how many rules: models may differ in tokenizer and length
    limit. The counts are those of the rule that cuts most.

    Args:
        found: for each set and rule the set's name, its texts, those that lost a part of their prompt, of their answer.

    >>> most_cut([("val", 9, 1, 0), ("val", 9, 3, 2)])
    {'val': {'texts': 9, 'prompt_cut': 3, 'answer_cut': 2, 'rules': 2}}
    """
    counts: dict[str, dict[str, int]] = {}
    for name, texts, prompts, answers in found:
        cut = {"texts": texts, "prompt_cut": prompts, "answer_cut": answers, "rules": 1}
        if name in counts:
            cut = max(counts[name], cut, key=lambda each: each["prompt_cut"] + each["answer_cut"])
            cut = {**cut, "rules": counts[name]["rules"] + 1}
        counts[name] = cut
    return counts


def results_record(
    kind: str,
    command: Sequence[str],
    checkpoints: Sequence[str | Path],
    fingerprints: Mapping[str, str],
    bench: Bench,
    cuts: Cuts,
) -> dict[str, Any]:
    """What every results file says of how it came about: `kind` of results, inputs, versions and settings.

    `fingerprints`: a model's name in the rows -> which weights these were.
    """
    return {
        "format": f"warmerge {kind}",
        "command": list(command),
        "versions": versions(),
        "checkpoints": [str(checkpoint) for checkpoint in checkpoints],
        "fingerprints": dict(fingerprints),
        "sets": [set_record(subset) for subset in bench.sets],
        "intervals": bench.measuring.intervals(),
        "loading": asdict(bench.measuring.loading),
        "cut": dict(cuts),
        "notes": data_notes(bench.sets, cuts),
    }


def set_record(subset: Subset) -> dict[str, Any]:
    """What a results file says of a set."""
    return {
        "name": subset.name,
        "source": subset.preferences.source,
        "layout": subset.preferences.layout,
        "n": subset.n,
        "prompts": subset.prompts,
        "skipped_rows": subset.preferences.skipped,
        "fingerprint": subset.preferences.fingerprint,
    }


def data_notes(sets: Sequence[Subset], cuts: Cuts) -> list[str]:
    """What a reader of results should know of the data: texts that were cut (as `Bench.cuts` says), rows left out."""
    notes = []
    for name, cut in cuts.items():
        words = cut_words(cut["texts"], cut["prompt_cut"], cut["answer_cut"])
        several = f"; counted for the one of {cut['rules']} tokenizers or limits that cuts most"
        notes += [f"{plain(name)}: {words}{several if cut['rules'] > 1 else ''}"] if words else []
    skipped = {subset.scored: subset.preferences.skipped for subset in sets}
    return notes + [f"{plain(name)}: {count} bad rows were left out" for name, count in skipped.items() if count]


def cut_words(texts: int, prompt_cut: int, answer_cut: int) -> str:
    """How many texts were cut, as a sentence; "" if none was.

    >>> cut_words(10, 2, 0)
    'of 10 texts 2 lost the beginning of their prompt and 0 the end of their answer to the length limit (--max-length)'
    """
    if not prompt_cut and not answer_cut:
        return ""
    lost = f"{prompt_cut} lost the beginning of their prompt and {answer_cut} the end of their answer"
    return f"of {texts} texts {lost} to the length limit (--max-length)"


def columns(name: str, found: metrics.Estimate) -> dict[str, float]:
    """An estimate as the columns NAME, NAME_low and NAME_high of a row."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def answer_lengths(texts: Sequence[tuple[Text, Text]]) -> Array:
    """Characters of each answer, (N,): what a reward model that only counts would give."""

    def characters(answer: Text) -> int:
        return len(answer) if isinstance(answer, str) else sum(len(str(m["content"])) for m in answer)

    return numpy.array([characters(answer) for _, answer in texts], dtype=numpy.float64)
