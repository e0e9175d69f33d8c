"""What a user asks of a run, and the members that come of it: learning rate, dropout, data order and start of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from warmerge.errors import UsageError
from warmerge.training.recipe import Member, Recipe

# WARM, appendix B.1 (arXiv 2401.12187).
PAPER_LR = (1e-5, 4e-5, 1e-4)
PAPER_DROPOUT = (0.05, 0.1)
# A low-rank adapter wants about ten times the learning rate of full fine-tuning.
_LORA = 10
PRECISIONS = ("auto", "float32", "bfloat16")
SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """How members are trained and what differs between them.

    Args:
        runs: members.
        lr, dropout: the values that members take. No learning rate means `default_lr`.
        draw: "grid" goes through all combinations; "random" draws between the smallest and the largest value (learning
            rates on a log scale), and draws the start as well.
        seed: of the draw, of every member's data order and dropout, and of the probe's held-out prompts.
        epochs: how long, if the recipe does not say how many steps.
        warmup: share of the steps in which the learning rate rises.
        recipe: what all members have in common. Zero `steps`, and the precision "auto", are filled in by `filled_in`.

    Raises:
        UsageError: values out of their range; all of them are named.
    """

    recipe: Recipe
    runs: int = 6
    lr: tuple[float, ...] = ()
    dropout: tuple[float, ...] = PAPER_DROPOUT
    draw: str = "grid"
    seed: int = 0
    epochs: float = 1.0
    warmup: float = 0.05

    def __post_init__(self) -> None:
        recipe, infinite = self.recipe, float("inf")
        ranges = (
            ("--runs", "1 or more", self.runs, self.runs >= 1),
            ("--lr", "numbers above 0", self.lr, all(0 < lr < infinite for lr in self.lr)),
            ("--dropout", "numbers from 0 to below 1", self.dropout, all(0 <= p < 1 for p in self.dropout or (-1,))),
            ("--draw", "grid or random", self.draw, self.draw in ("grid", "random")),
            ("--seed", "0 or more", self.seed, self.seed >= 0),
            ("--epochs", "a number above 0", self.epochs, 0 < self.epochs < infinite),
            ("--warmup", "a share from 0 to below 1", self.warmup, 0 <= self.warmup < 1),
            ("--steps", "1 or more", recipe.steps, recipe.steps >= 0),
            ("--batch", "1 or more", recipe.batch, recipe.batch >= 1),
            ("--schedule", " or ".join(SCHEDULES), recipe.schedule, recipe.schedule in SCHEDULES),
            ("--weight-decay", "0 or more", recipe.weight_decay, 0 <= recipe.weight_decay < infinite),
            ("--label-smoothing", "0 to below 0.5", recipe.label_smoothing, 0 <= recipe.label_smoothing < 0.5),
            ("--centring", "0 or more", recipe.centring, 0 <= recipe.centring < infinite),
            ("--lora", "a rank of 1 or more", recipe.lora, recipe.lora >= 0),
            ("--adapter", "--lora RANK beside it", "none", recipe.lora > 0 or not recipe.adapter),
            ("--precision", ", ".join(PRECISIONS), recipe.precision, recipe.precision in PRECISIONS),
            ("--batch-tokens", "1 or more", recipe.batch_tokens, recipe.batch_tokens >= 1),
            ("--save-every", "1 or more", recipe.save_every, recipe.save_every >= 1),
        )  # fmt: skip
        wrong = [f"{flag}: expected {expected}, found {found}" for flag, expected, found, right in ranges if not right]
        if wrong:
            raise UsageError("; ".join(wrong))


def default_lr(parameters: int, lora: int) -> tuple[float, ...]:
    """The paper's learning rates; above 10^9 parameters less, by the square root of the size. For LoRA ten times that.

    The scaling is a rule of thumb, not the paper's.

    >>> default_lr(10**8, lora=0), default_lr(4 * 10**9, lora=0)
    ((1e-05, 4e-05, 0.0001), (5e-06, 2e-05, 5e-05))
    >>> default_lr(10**8, lora=16)
    (0.0001, 0.0004, 0.001)
    """
    factor = min(1.0, (1e9 / parameters) ** 0.5) * (_LORA if lora else 1)
    return tuple(float(f"{lr * factor:.3g}") for lr in PAPER_LR)


def precision_here(asked: str) -> str:
    """What "auto" means on this machine: bfloat16 on a GPU that has it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def filled_in(settings: TrainSettings, pairs: int) -> Recipe:
    """The recipe with its steps, its warm-up and its precision.

    >>> found = filled_in(TrainSettings(Recipe(steps=0, batch=32, warmup=0), epochs=20), 100)
    >>> found.steps, found.warmup
    (62, 3)
    """
    recipe = settings.recipe
    steps = recipe.steps or max(1, round(settings.epochs * pairs / recipe.batch))
    warmup = round(settings.warmup * steps)
    return replace(recipe, steps=steps, warmup=warmup, precision=precision_here(recipe.precision))


def members(
    settings: TrainSettings, recipe: Recipe, lr: Sequence[float], inits: Sequence[str], head: str, pairs: str
) -> list[Member]:
    """The members of a run, each fully described. The first k are the same however many follow.

    Args:
        lr: the learning rates.
        inits: folders to start from, as seen from the run's folder.
        head: digest of the reward head that is in all of them.
        pairs: fingerprint of the training pairs.

    >>> settings = TrainSettings(Recipe(steps=1, batch=1, warmup=0), runs=4, dropout=(0.0, 0.1))
    >>> made = members(settings, settings.recipe, (1e-5, 1e-4), ("init",), "", "")
    >>> [(member.lr, member.dropout, member.seed) for member in made]
    [(1e-05, 0.0, 0), (0.0001, 0.1, 1), (1e-05, 0.1, 2), (0.0001, 0.0, 3)]
    """
    source = random.Random(settings.seed)
    made = []
    for k in range(settings.runs):
        if settings.draw == "random":
            rate = float(f"{min(lr) * (max(lr) / min(lr)) ** source.random():.3g}")
            dropout = round(source.uniform(min(settings.dropout), max(settings.dropout)), 4)
            init = inits[source.randrange(len(inits))]
        else:
            # Neighbours differ in everything; after len(lr) * len(dropout) members all combinations were there.
            turn = k % len(lr) + k // len(lr)
            rate, dropout = lr[k % len(lr)], settings.dropout[turn % len(settings.dropout)]
            init = inits[turn % len(inits)]
        made.append(Member(f"{k + 1:02d}", init, head, pairs, rate, dropout, settings.seed + k, recipe))
    return made
