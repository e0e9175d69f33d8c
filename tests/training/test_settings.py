"""What users ask for becomes members: all combinations, different orders, the same ones again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from warmerge.errors import UsageError
from warmerge.training.recipe import Member, Recipe
from warmerge.training.settings import TrainSettings, default_lr, filled_in, members

RECIPE = Recipe(steps=0, batch=32, warmup=0, precision="auto")


def made(settings: TrainSettings, lr: tuple[float, ...] = (1e-5, 4e-5, 1e-4), inits: int = 1) -> list[Member]:
    folders = [f"init-{k}" for k in range(inits)]
    return members(settings, settings.recipe, lr, folders, "head", "pairs")


@pytest.mark.parametrize(("rates", "dropouts"), [(3, 2), (2, 2), (2, 3), (3, 3), (1, 4), (4, 1), (4, 2), (5, 3)])
def test_the_grid_goes_through_all_combinations(rates: int, dropouts: int) -> None:
    lr, dropout = tuple(1e-5 * (k + 1) for k in range(rates)), tuple(0.1 * k for k in range(dropouts))
    found = made(TrainSettings(RECIPE, runs=rates * dropouts, dropout=dropout), lr)
    assert {(member.lr, member.dropout) for member in found} == {(a, b) for a in lr for b in dropout}
    assert [member.lr for member in found[:rates]] == list(lr)


def test_few_members_differ_in_everything() -> None:
    first, second = made(TrainSettings(RECIPE, runs=2), inits=3)
    for field in ("name", "lr", "dropout", "seed", "init"):
        assert getattr(first, field) != getattr(second, field), field
    assert first.recipe == second.recipe
    assert (first.head, first.pairs) == (second.head, second.pairs) == ("head", "pairs")


def test_every_start_is_used() -> None:
    assert {member.init for member in made(TrainSettings(RECIPE, runs=6), inits=3)} == {"init-0", "init-1", "init-2"}


@pytest.mark.parametrize("draw", ["grid", "random"])
def test_more_members_leave_the_first_ones_as_they_are(draw: str) -> None:
    settings = TrainSettings(RECIPE, runs=3, draw=draw, seed=5)
    assert made(replace(settings, runs=9), inits=2)[:3] == made(settings, inits=2)


def test_random_members_lie_between_the_ends() -> None:
    found = made(TrainSettings(RECIPE, runs=200, draw="random", dropout=(0.1, 0.0, 0.3)))
    assert all(1e-5 <= member.lr <= 1e-4 and 0 <= member.dropout <= 0.3 for member in found)
    assert len({member.lr for member in found}) > 150
    # On a log scale half of them lie below the geometric mean.
    assert 70 < sum(member.lr < 10**-4.5 for member in found) < 130
    other = made(TrainSettings(RECIPE, runs=200, draw="random", dropout=(0.1, 0.0, 0.3), seed=1))
    assert [member.lr for member in other] != [member.lr for member in found]


def test_steps_warm_up_and_precision_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    settings = TrainSettings(RECIPE, epochs=10, warmup=0.1)
    found = filled_in(settings, 1000)
    assert (found.steps, found.warmup, found.precision) == (312, 31, "bfloat16")
    said = TrainSettings(replace(RECIPE, steps=7, precision="float32"), epochs=10)
    assert (filled_in(said, 1000).steps, filled_in(said, 1000).precision) == (7, "float32")
    assert filled_in(TrainSettings(RECIPE, epochs=0.001), 10).steps == 1


def test_learning_rates_fall_with_the_size_above_a_billion() -> None:
    assert default_lr(22_000_000, 0) == default_lr(10**9, 0) == (1e-5, 4e-5, 1e-4)
    assert default_lr(9 * 10**9, 0) == (3.33e-6, 1.33e-5, 3.33e-5)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as error:
        TrainSettings(
            Recipe(
                steps=0, batch=0, warmup=0, schedule="cosine", weight_decay=-1, label_smoothing=0.5, centring=-1,
                lora=-1, precision="float16", batch_tokens=0, save_every=0,
            ),
            runs=0, lr=(0.0,), dropout=(1.0,), draw="bayes", seed=-1, epochs=0, warmup=1,
        )  # fmt: skip
    flags = [part.split(":")[0] for part in str(error.value).split("; ")]
    assert flags == [
        "--runs", "--lr", "--dropout", "--draw", "--seed", "--epochs", "--warmup", "--batch", "--schedule",
        "--weight-decay", "--label-smoothing", "--centring", "--lora", "--precision", "--batch-tokens", "--save-every",
    ]  # fmt: skip
    assert "--label-smoothing: expected 0 to below 0.5, found 0.5" in str(error.value)


def test_no_dropout_at_all_is_a_value_too() -> None:
    assert made(TrainSettings(RECIPE, runs=1, dropout=(0.0,)))[0].dropout == 0
    with pytest.raises(UsageError, match=r"^--dropout: expected numbers from 0 to below 1, found \(\)$"):
        TrainSettings(RECIPE, dropout=())


def test_an_adapter_needs_lora() -> None:
    with pytest.raises(UsageError, match=r"^--adapter: expected --lora RANK beside it, found none$"):
        TrainSettings(replace(RECIPE, adapter=True))
