"""Rewards: equal to the model's own for each text alone, whatever is shared, padded, split or halved on the way."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from tiny_models import DECODERS, KINDS, OTHERS, PAD, Text, alone, folder, heard, texts

from warmerge.errors import RefusedError, WarmergeError
from warmerge.rewards import forward, scoring
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.rewards.render import encode
from warmerge.rewards.scoring import Group, Tokens, group_by_prefix, method_of, one_by_one, score

BUDGETS = (1, 64, 4096)
CASES = [(kind, pad) for kind in KINDS for pad in (("own", "eos", "none") if kind in DECODERS else ("own",))]
METHOD = {kind: "prefix_reuse" if kind in DECODERS else "padded" for kind in KINDS}
METHOD |= {kind: method for kind, (method, _) in OTHERS.items()}


def load(folder: Any, **options: Any) -> RewardModel:
    return load_reward_model(folder, LoadOptions(**{"device": "cpu", "dtype": "float32", **options}))


def ids_of(model: RewardModel, what: list[tuple[Text, Text]]) -> list[Any]:
    return [entry.ids for entry in encode(model.renderer, what)]


@pytest.mark.parametrize(("kind", "pad"), CASES)
def test_every_reward_is_the_one_of_the_text_alone(kind: str, pad: str) -> None:
    place, what = folder(kind, pad), texts()
    model = load(place)
    expected = alone(place, ids_of(model, what))
    assert expected.std() > 0.1, "the weights are too small to tell right from wrong"
    assert method_of(model).__name__ == METHOD[kind]
    for budget in BUDGETS:
        found = score(model, Tokens(model.renderer, what), budget)
        numpy.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"budget {budget}")


# --- mutations: what the test above must be able to find --------------------------------------------------------------


def mutant(old: str, new: str) -> Any:
    """The module `forward` with one thing wrong in it."""
    source = inspect.getsource(forward)
    assert source.count(old) == 1, "the code has changed; change the mutation too"
    module = types.ModuleType("warmerge.rewards.mutant")
    # dataclasses looks its module up
    module.__dict__["__name__"] = forward.__name__
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


SUFFIX_MASK = (
    "module.base_model(input_ids=_pad([texts[i][prefix:] for i in rows], 0, device), **reused)",
    "module.base_model(input_ids=(x := _pad([texts[i][prefix:] for i in rows], 0, device)), "
    "attention_mask=torch.ones_like(x), **reused)",
)
LAST_COLUMN = ("[lengths[i] - prefix - 1 for i in rows]", "[max(lengths[i] for i in rows) - prefix - 1] * len(rows)")
PAD_POOLED = ("numpy.flatnonzero(ids != pad)", "numpy.arange(len(ids))")
OTHER_PREFIX = ("[owner[i] for i in rows]", "[owner[rows[0]] for i in rows]")
LONG_PREFIX = (
    "cache = groups[0].prefix, DynamicCache",
    "cache = groups[0].prefix and groups[0].prefix - 1, DynamicCache",
)
UNSPLIT = ("< sizes[:, None]", "< sizes.max()")
SHARED_CACHE = ("    own.layers = [copy.copy(layer) for layer in cache.layers]\n", "")
MUTANTS = {
    "llama": [SUFFIX_MASK, LAST_COLUMN, PAD_POOLED, OTHER_PREFIX, SHARED_CACHE],
    "mistral": [SUFFIX_MASK, LAST_COLUMN],
    "gpt2": [SUFFIX_MASK, LAST_COLUMN, PAD_POOLED],
    "bert": [UNSPLIT],
    "modernbert": [UNSPLIT],
    "phi3": [("return min(limits, default=math.inf)", "return math.inf")],
}


def rewards_of(method: Any, model: RewardModel, ids: Any, budget: int) -> Any:
    found = numpy.full(len(ids), numpy.nan)
    with torch.inference_mode():
        for rows, values in method(model.module, ids, budget):
            found[rows] = values.numpy()[:, 0]
    return found


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in MUTANTS.items() for change in changes]
)
def test_a_mutant_is_found(kind: str, change: tuple[str, str]) -> None:
    model = load(folder(kind, "eos" if change is PAD_POOLED else "own"))
    ids, wrong = ids_of(model, texts()), mutant(*change)
    method = wrong.prefix_reuse if kind in DECODERS else wrong.padded
    try:
        off = max(abs(rewards_of(method, model, ids, b) - rewards_of(one_by_one, model, ids, b)).max() for b in BUDGETS)
    except (RuntimeError, IndexError, ValueError):
        off = numpy.inf
    assert off > 1e-2
    if kind != "phi3":  # texts of the length at which its rotations change would be too long for a check on loading
        assert not scoring._agrees(method, model.module, model.renderer.max_length)


def test_an_unchanged_mutant_is_right() -> None:
    model = load(folder("llama"))
    same = mutant("_MIN_PREFIX = 16", "_MIN_PREFIX = 17")
    ids = ids_of(model, texts())
    difference = rewards_of(same.prefix_reuse, model, ids, 64) - rewards_of(one_by_one, model, ids, 64)
    assert abs(difference).max() < 1e-4
    assert scoring._agrees(same.prefix_reuse, model.module, model.renderer.max_length)


# --- which method -----------------------------------------------------------------------------------------------------


def wrong_values(module: Any, ids: Any, budget: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    for rows, values in one_by_one(module, ids, budget):
        yield rows, values + (0.01 if len(ids) > 1 else 0.0) * (1 + values.abs())


def forgetful(module: Any, ids: Any, budget: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    yield next(one_by_one(module, ids, budget))


def raising(error: type[Exception]) -> Callable[..., Any]:
    def method(module: Any, ids: Any, budget: int) -> Iterator[Any]:
        raise error("this cache cannot be copied")
        yield

    return method


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "preferred", [wrong_values, forgetful, raising(NotImplementedError), raising(AssertionError), raising(ImportError)]
)
def test_a_method_that_is_wrong_or_raises_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kind: str, preferred: Callable[..., Any]
) -> None:
    monkeypatch.setattr(scoring, "prefix_reuse" if kind in DECODERS else "padded", preferred)
    model, what = load(folder(kind)), texts()[:4]
    assert method_of(model) is one_by_one
    found = score(model, Tokens(model.renderer, what))
    numpy.testing.assert_allclose(found, alone(folder(kind), ids_of(model, what)), atol=1e-5)


def test_the_check_runs_once_for_each_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, agrees = [], scoring._agrees
    monkeypatch.setattr(scoring, "_agrees", lambda *a: calls.append(a) or agrees(*a))
    model = load(folder("llama"))
    assert method_of(model) is method_of(model)
    assert len(calls) == 1
    assert method_of(load(folder("llama"))) is method_of(model)
    assert len(calls) == 2


def test_a_model_that_takes_no_random_tokens_is_scored_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """BART's and T5's heads read the end-of-sequence token, and raise where there is none."""
    model, own = load(folder("bert")), forward._own_output

    def strict(module: Any, inputs: torch.Tensor, mask: Any) -> torch.Tensor:
        if not (inputs == 2).any():
            raise IndexError("no </s>")
        return own(module, inputs, mask)

    monkeypatch.setattr(forward, "_own_output", strict)
    monkeypatch.setattr(scoring.numpy.random, "default_rng", lambda seed: numpy.random.Generator(numpy.random.PCG64(1)))
    assert method_of(model) is one_by_one
    found = score(model, Tokens(model.renderer, texts()[:3]))
    numpy.testing.assert_allclose(found, alone(folder("bert"), ids_of(model, texts()[:3])), atol=1e-5)


def test_short_limits_do_not_break_the_check() -> None:
    for limit in (1, 2, 5):
        model = load(folder("llama"), max_length=limit, template="plain")
        assert method_of(model).__name__ == "prefix_reuse"


# --- groups -----------------------------------------------------------------------------------------------------------


def row(*parts: Any) -> Any:
    return numpy.concatenate([numpy.atleast_1d(numpy.asarray(part, dtype=numpy.int64)) for part in parts])


def test_groups_share_their_prefix_and_keep_a_token() -> None:
    start = numpy.arange(100, 130)
    texts = [row(start, 1), row(start, 2, 3), row(7, 8, 9), start, row(start, 1), row(numpy.arange(300, 310), 4)]
    groups = {group.texts: group.prefix for group in group_by_prefix(texts)}
    assert groups == {(3, 0, 4, 1): 29, (2,): 0, (5,): 0}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_a_partition_with_true_prefixes(seed: int) -> None:
    random = numpy.random.default_rng(seed)
    texts: list[Any] = []
    for _ in range(12):
        base = random.integers(0, 3, 40) + 300 * (random.random() < 0.9)
        texts += [
            row(base[: random.integers(1, 40)], random.integers(0, 9, 1 + n)) for n in range(random.integers(1, 6))
        ]
    groups = group_by_prefix(texts)
    assert sorted(i for group in groups for i in group.texts) == list(range(len(texts)))
    assert any(group.prefix for group in groups)
    for group in groups:
        first = texts[group.texts[0]][: group.prefix]
        assert all(len(texts[i]) > group.prefix and (texts[i][: group.prefix] == first).all() for i in group.texts)
        assert group.prefix == 0 or group.prefix >= 16
    for budget in (1, 64, 4096):
        batches = list(forward._batched(groups, [len(text) for text in texts], budget))
        batched = [group for batch in batches for group in batch]
        assert {group.texts for group in batched} == {group.texts for group in groups}
        exact = {group.texts: group.prefix for group in groups}
        assert all(exact[group.texts] * 7 / 8 - 8 <= group.prefix <= exact[group.texts] for group in batched)
        assert all(len({group.prefix for group in batch}) == 1 for batch in batches)


def test_groups_of_the_same_rounded_prefix_run_together() -> None:
    groups = [Group((0, 1), 131), Group((2, 3), 137), Group((4,), 0)]
    assert [[g.prefix for g in batch] for batch in forward._batched(groups, [140, 141, 142, 143, 9], 10**5)] == [
        [128, 128],
        [0],
    ]


@pytest.mark.parametrize("budget", [1, 100, 1000, 100000])
def test_chunks_hold_every_text_once_and_little_padding(budget: int) -> None:
    lengths = [int(n) for n in numpy.random.default_rng(0).integers(1, 300, 100)]
    chunks = forward.chunks(range(100), lengths, budget)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(100))
    for chunk in chunks:
        padded = len(chunk) * lengths[chunk[0]]
        assert len(chunk) == 1 or padded <= budget
        assert padded - sum(lengths[i] for i in chunk) <= budget / 64
    if budget == 100000:
        assert len(chunks) < 40


# --- score ------------------------------------------------------------------------------------------------------------


def test_a_reward_that_is_not_a_number_is_refused() -> None:
    model = load(folder("llama", seed=3))
    with torch.no_grad():
        model.module.score.weight[0, 0] = torch.nan
    with pytest.raises(RefusedError, match=r"warmerge-tests.*gives the reward nan to text 1"):
        score(model, Tokens(model.renderer, texts()[:2]))


def test_an_infinite_reward_is_refused_with_the_models_name() -> None:
    model = load(folder("llama", seed=3))
    with torch.no_grad():
        model.module.score.weight[:] = 3e38
    with pytest.raises(RefusedError) as refused:
        score(model, Tokens(model.renderer, texts()[:2]))
    assert str(folder("llama", seed=3)) in str(refused.value)
    assert "to text 1; its weights hold NaN or overflow its dtype" in str(refused.value)


def test_out_of_memory_halves_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, what = load(folder("llama")), texts()
    expected, budgets = score(model, Tokens(model.renderer, what)), []
    real = method_of(model)

    def method(module: Any, ids: Any, budget: int) -> Iterator[Any]:
        budgets.append((budget, len(ids)))
        for number, batch in enumerate(real(module, ids, budget)):
            if len(budgets) <= 3 and number == len(budgets) - 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield batch

    monkeypatch.setitem(scoring._METHODS, model.module, method)
    done: list[int] = []
    found = score(model, Tokens(model.renderer, what), 2048, done.append)
    numpy.testing.assert_allclose(found, expected, atol=1e-4)
    assert [budget for budget, _ in budgets] == [2048, 1024, 512, 256]
    assert budgets[0][1] == budgets[1][1] == len(what) > budgets[2][1] > budgets[3][1]  # what was done is kept
    assert sum(done) == len(what)


def test_out_of_memory_with_one_text_names_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder("llama"))
    monkeypatch.setitem(scoring._METHODS, model.module, raising(torch.OutOfMemoryError))
    with pytest.raises(WarmergeError, match=r"one text at a time; try --max-length, --dtype bfloat16") as raised:
        score(model, Tokens(model.renderer, texts()[:3]))
    assert str(folder("llama")) in str(raised.value)


def test_progress_counts_every_text() -> None:
    model, done = load(folder("llama")), []
    score(model, Tokens(model.renderer, texts()), 64, done.append)
    assert sum(done) == len(texts())
    assert len(done) > 2


def test_transformers_gives_no_advice(capfd: pytest.CaptureFixture[str]) -> None:
    """It asks for a mask where a text begins or ends in the padding token; once a process, so it is made to forget."""
    from transformers.utils import logging

    model = load(folder("gpt2"))
    with heard() as said:
        logging.warning_once.cache_clear()
        model.module(torch.tensor([[0, 1, 2, 0]]))
    assert "attention_mask" in str(said), "transformers no longer says it: this test finds nothing"
    capfd.readouterr()
    with heard() as said:
        logging.warning_once.cache_clear()
        score(model, Tokens(model.renderer, [("", PAD), (PAD, PAD), ("the sea " * 900, "b")]))
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_no_texts_have_no_rewards() -> None:
    model = load(folder("llama"))
    assert score(model, Tokens(model.renderer, [])).shape == (0,)


def test_tokens_of_another_rule_are_not_taken() -> None:
    model, other = load(folder("llama")), load(folder("llama"), max_length=20)
    with pytest.raises(AssertionError):
        score(model, Tokens(other.renderer, texts()))


def test_many_windows_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_FIRST_WINDOW", 4)
    monkeypatch.setattr(scoring, "_WINDOW", 9)
    model, what = load(folder("llama")), texts()
    tokens = Tokens(model.renderer, what)
    assert [window for window, _ in tokens] == [range(4), range(4, 13), range(13, 22), range(22, 31), range(31, 35)]
    expected = alone(folder("llama"), ids_of(model, what))
    numpy.testing.assert_allclose(score(model, tokens, 256), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (256, [256]), (257, [256, 1]), (2400, [256, 2048, 96])]
)
def test_windows(monkeypatch: pytest.MonkeyPatch, count: int, sizes: list[int]) -> None:
    monkeypatch.setattr(scoring, "encode", lambda renderer, texts: list(texts))
    tokens = Tokens(load(folder("llama")).renderer, [("", str(i)) for i in range(count)])
    assert [len(window) for window, _ in tokens] == sizes
    assert [text for _, made in tokens for text in made] == tokens.texts


def test_texts_are_tokenised_once_for_several_models(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(scoring, "encode", lambda renderer, texts: calls.append(len(texts)) or encode(renderer, texts))
    first, second = load(folder("llama")), load(folder("llama", seed=1))
    tokens = Tokens(first.renderer, texts())
    one, other = score(first, tokens), score(second, tokens)
    tokens.cut()
    assert calls == [len(texts())]
    assert abs(one - other).max() > 0.1
    numpy.testing.assert_allclose(other, alone(folder("llama", seed=1), ids_of(second, texts())), atol=1e-4)


def test_cut_counts_what_was_cut() -> None:
    model = load(folder("llama"), max_length=20)
    long = "the sea is deep " * 20
    tokens = Tokens(model.renderer, [("hi", "ho"), (long, "ho"), ("hi", long), (long, long), ("", long)])
    assert tokens.cut() == (3, 2)
    assert numpy.isfinite(score(model, tokens)).all()


def test_an_error_in_a_thread_arrives() -> None:
    model = load(folder("llama"))
    conversation = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    with pytest.raises(RefusedError, match="conversation"):
        score(model, Tokens(model.renderer, [("a", "b"), (conversation, "c")]))


def test_a_chat_model_is_scored_too() -> None:
    from tiny_models import TEMPLATE

    model = load(folder("llama", template=TEMPLATE))
    what = [(prompt, answer) for prompt, answer in texts() if prompt]
    found = score(model, Tokens(model.renderer, what), 512)
    numpy.testing.assert_allclose(found, alone(folder("llama", template=TEMPLATE), ids_of(model, what)), atol=1e-4)
    assert abs(found - score(load(folder("llama")), Tokens(load(folder("llama")).renderer, what))).max() > 1e-2


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_bfloat16_differs_by_little(kind: str) -> None:
    what = texts()
    wide, narrow = load(folder(kind)), load(folder(kind), dtype="bfloat16")
    assert narrow.module.dtype == torch.bfloat16
    expected, found = (score(model, Tokens(model.renderer, what)) for model in (wide, narrow))
    assert 0 < abs(expected - found).max() < 0.35 * expected.std() + 0.1
    assert numpy.corrcoef(expected, found)[0, 1] > 0.98


def test_pad_tokens_are_read_where_transformers_reads() -> None:
    ids = numpy.array([5, 6, 0, 7, 0, 0])
    assert scoring.scored_position(ids, 0) == 3
    assert scoring.scored_position(ids, None) == 5
    assert scoring.scored_position(ids, 9) == 5
    assert scoring.scored_position(numpy.zeros(3, dtype=int), 0) == 0
