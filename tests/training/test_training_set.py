"""Training pairs: made from comparisons, kept in a file, dealt out by a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import write_rows
from tiny_models import folder

from warmerge.errors import RefusedError
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.pairs import read_preferences, unique_texts
from warmerge.rewards.scoring import Tokens
from warmerge.training.training_set import TrainingSet, batch_of, micro_batches, read_pairs, save_pairs, tokenise_pairs


def made(
    tmp_path: Path, rows: list[dict[str, Any]], swapped: tuple[int, ...] = ()
) -> tuple[TrainingSet, list[list[int]]]:
    """The pairs of `rows`, and the tokens of each text of theirs, in order, as the scorer makes them."""
    preferences = read_preferences(write_rows(tmp_path / "pairs.jsonl", rows))
    texts = unique_texts(preferences)
    tokens = Tokens(load_reward_model(folder("llama")).renderer, texts.texts)
    ids = [entry.ids.tolist() for _, part in tokens for entry in part]
    return tokenise_pairs(preferences, texts, tokens, swapped), ids


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"why {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(count)]


def test_a_pair_holds_the_tokens_that_the_scorer_sees_and_its_margin(tmp_path: Path) -> None:
    rows = rows_of(3)
    for row, margin in zip(rows, (0.0, 0.5, 2.0), strict=True):
        row["margin"] = margin
    pairs, _ = made(tmp_path, rows)
    renderer = load_reward_model(folder("llama")).renderer
    for k, row in enumerate(rows):
        expected = next(iter(Tokens(renderer, [(row["prompt"], row["chosen"])])))[1][0].ids
        assert pairs.text(pairs.chosen[k]).tolist() == expected.tolist()
        assert expected[-1] == renderer.tokenizer.eos_token_id
    assert pairs.margins.tolist() == [0.0, 0.5, 2.0]
    assert len(pairs) == 3


def test_swapped_comparisons_exchange_their_sides(tmp_path: Path) -> None:
    straight, _ = made(tmp_path, rows_of(3))
    swapped, _ = made(tmp_path, rows_of(3), swapped=(1,))
    assert swapped.chosen.tolist() == [straight.chosen[0], straight.rejected[1], straight.chosen[2]]
    assert swapped.rejected.tolist() == [straight.rejected[0], straight.chosen[1], straight.rejected[2]]


def test_pairs_of_equal_tokens_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="chosen and rejected have the same tokens in every pair"):
        made(tmp_path, [{"prompt": "why", "chosen": "so", "rejected": [{"role": "assistant", "content": "so"}]}])


def test_a_file_gives_back_what_was_put_in(tmp_path: Path) -> None:
    pairs, _ = made(tmp_path, rows_of(5))
    save_pairs(pairs, tmp_path / "pairs.safetensors", "made of this")
    found = read_pairs(tmp_path / "pairs.safetensors", "made of this")
    for name, value in vars(pairs).items():
        assert numpy.array_equal(getattr(found, name), value)
        assert getattr(found, name).dtype == value.dtype
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_other_missing_and_damaged_pairs_are_refused(tmp_path: Path) -> None:
    pairs, _ = made(tmp_path, rows_of(5))
    path = tmp_path / "pairs.safetensors"
    save_pairs(pairs, path, "one")
    with pytest.raises(RefusedError, match=r"pairs.safetensors: holds the pairs one, expected two; train into a new"):
        read_pairs(path, "two")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RefusedError, match="cannot be read as training pairs"):
        read_pairs(path, "one")
    path.unlink()
    with pytest.raises(RefusedError, match="cannot be read as training pairs"):
        read_pairs(path, "one")


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_every_epoch_has_every_pair_once_and_an_order_of_its_own(size: int) -> None:
    dealt = numpy.concatenate([batch_of(step, 10, size, seed=3) for step in range(-(-40 // size))])[:40]
    epochs = dealt.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    # The sequence is the seed's: how it is cut into batches has no influence on it.
    assert dealt.tolist() == batch_of(0, 10, 40, seed=3).tolist()


def test_every_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(batch_of(0, 50, 50, seed).tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_passes_hold_every_pair_once_within_the_budget() -> None:
    random = numpy.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 60, random.integers(1, 30))
        parts = int(random.integers(1, len(lengths) + 1))
        found = micro_batches(lengths, 200, parts)
        assert sorted(numpy.concatenate(found).tolist()) == list(range(len(lengths)))
        assert len(found) >= parts
        assert all(2 * len(part) * lengths[part].max() <= 200 for part in found)
    assert [part.tolist() for part in micro_batches(numpy.array([500, 3]), 200)] == [[0], [1]]
