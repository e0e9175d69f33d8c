"""What a member is made by: the recipe that all members of a run share, and what is a member's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, some


@dataclass(frozen=True)
class Recipe:
    """How every member of a run is trained.

    `steps` of `batch` pairs each; `warmup` steps of rising learning rate, then it stays ("constant") or falls to zero
    ("linear"). `weight_decay` is of matrices, not of biases and norms. A `max_gradient_norm` of 0 clips nothing.
    `centring` weighs the squared sum of a pair's rewards, `use_margins` takes the margins of the pairs. `precision` is
    what the body computes in ("float32" or "bfloat16"), `dtype` what the member is saved in. `lora` is a rank, 0 for
    none, and `adapter` saves the adapter instead of the merged weights. `shard` divides weights, gradients and
    optimizer state between the processes that train it. `batch_tokens` is the most in one forward pass. A checkpoint is
    written every `save_every` steps; only the last one is kept, and none at the end, unless
    `keep_checkpoints`.
    """

    steps: int
    batch: int
    warmup: int
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    label_smoothing: float = 0.0
    centring: float = 0.0
    use_margins: bool = False
    lora: int = 0
    adapter: bool = False
    freeze_embeddings: bool = False
    gradient_checkpointing: bool = False
    shard: bool = False
    precision: str = "float32"
    dtype: str = "float32"
    batch_tokens: int = 8192
    save_every: int = 100
    keep_checkpoints: bool = False
    max_length: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Member:
    """All that one member depends on.

    `init` is the start's folder beside `members`, `head` the digest of the reward head in it, `pairs` the fingerprint
    of the training pairs.
    """

    name: str
    init: str
    head: str
    pairs: str
    lr: float
    dropout: float
    seed: int
    recipe: Recipe


def read_member(path: Path) -> Member:
    """The member that a member.json describes.

    Raises:
        RefusedError: it is not there or damaged, lacks a field, or has one that is not known.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        recipe = found["recipe"]
        findings = [*_wrong_fields(Member, found, str(path)), *_wrong_fields(Recipe, recipe, f"{path}, recipe")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError([Finding(str(path), f"cannot be read as a member ({error!r})")]) from None
    if findings:
        raise RefusedError(findings)
    return Member(**{**found, "recipe": Recipe(**recipe)})


def _wrong_fields(kind: type[Member] | type[Recipe], found: dict[str, Any], where: str) -> list[Finding]:
    known = {field.name for field in fields(kind)}
    return [
        Finding(where, f"{what} {some(names)}; was it written by another version of warmerge?")
        for what, names in (("has the unknown fields", found.keys() - known), ("lacks", known - found.keys()))
        if names
    ]


def learning_rate(step: int, member: Member) -> float:
    """Of a step counted from 0: rises over the warm-up, then is constant, or falls to zero at the last step's end.

    >>> recipe = Recipe(steps=10, batch=1, warmup=2)
    >>> [learning_rate(step, Member("0", "", "", "", 1.0, 0.0, 0, recipe)) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    recipe = member.recipe
    if step < recipe.warmup:
        return member.lr * (step + 1) / recipe.warmup
    left = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)
    return member.lr * (left if recipe.schedule == "linear" else 1.0)
