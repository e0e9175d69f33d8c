"""What is asked of judges, and what they answer, however it is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from warmerge.errors import Finding, plain
from warmerge.pipeline.scoring.judge import Judge
from warmerge.rewards.bench import most_cut
from warmerge.rewards.model import RewardModel
from warmerge.rewards.render import Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Array = NDArray[numpy.float64]

Texts = Sequence[tuple["Text", "Text"]]


@dataclass(frozen=True)
class Asked:
    """A judge, and the lists of texts that it is to score. A list that several judges score is one object."""

    judge: Judge
    lists: tuple[Texts, ...]


@dataclass(frozen=True)
class Found:
    """What a judge gives.

    Of each list: `rewards` (N,), `seconds` of scoring without those of making tokens, `cuts` (texts that lost a part of
    their prompt, of their answer). Of the model: seconds to merge it, bytes of its weights in memory, dtype and device,
    the rule by which texts became tokens, reasons for doubt found on loading.
    """

    rewards: tuple[Array, ...]
    seconds: tuple[float, ...]
    cuts: tuple[tuple[int, int], ...]
    merge_seconds: float
    weights_bytes: int
    computed: str
    rule: str
    doubts: tuple[Finding, ...]


def computed_in(model: RewardModel) -> str:
    """The dtype of a model's body and the kind of device it is on, as in "float32 on cpu"."""
    return f"{str(model.module.dtype).removeprefix('torch.')} on {model.device.type}"


def doubts_of_mixing(computed: Iterable[tuple[str, str]]) -> list[Finding]:
    """A reason for doubt where models that are compared, each by its name, were not computed in one dtype and on one
    kind of device."""
    ways = list(computed)
    if len({way for _, way in ways}) < 2:
        return []
    which = "; ".join(f"{plain(name)}: {way}" for name, way in ways)
    return [Finding("rewards", f"were computed in different precisions ({which}); give --dtype and --device")]


def rule_of(renderer: Renderer) -> str:
    """The same for renderers that make the same tokens of every text."""
    return json.dumps([renderer.digest, renderer.template, renderer.max_length, renderer.ends])


def cuts_of(found: Sequence[Found], sets: Mapping[str, Texts]) -> dict[str, dict[str, int]]:
    """As `bench.most_cut`, for the sets that are the first lists of every judge."""
    cuts = {
        (name, one.rule): (name, len(texts), *cut)
        for one in found
        for (name, texts), cut in zip(sets.items(), one.cuts, strict=False)
    }
    return most_cut(cuts.values())
