"""The linear probe: features, the fit against references, the head in files."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import World
from safetensors.torch import load_file, save_file
from tiny_models import DECODERS, ENCODERS, folder, own_folder, texts

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.rewards.pairs import read_preferences, unique_texts
from warmerge.rewards.scoring import Tokens, score
from warmerge.training import probe as probe_module
from warmerge.training.head import head_digest, write_head
from warmerge.training.probe import (
    Probe,
    differences,
    features,
    features_fingerprint,
    fit,
    held_out_fifth,
    output_layer,
    probe_head,
)
from warmerge.training.training_set import TrainingSet, tokenise_pairs

CPU = LoadOptions(device="cpu", dtype="float32")
Array = numpy.ndarray[Any, Any]


def newton(x: torch.Tensor, strength: float) -> torch.Tensor:
    """The minimum of the probe's loss as its docstring writes it, by whole Newton steps with damping."""
    ridge = strength * x.square().sum(1).mean()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.exp(-(x @ w))).mean() + ridge / 2 * w.square().sum()

    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(loss, w)
        hessian = torch.autograd.functional.hessian(loss, w)
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while size > 1e-8 and loss(w - size * step) > loss(w):
            size /= 2
        w = w - size * step
        if gradient.norm() < 1e-13:
            break
    return w


def made(n: int, d: int, noise: float = 0.3, seed: int = 0) -> Array:
    """Differences of correlated features of very different scale, as hidden states are, with noisy labels."""
    random = numpy.random.default_rng(seed)
    x = random.standard_normal((n, d)) * numpy.logspace(1, -2, d)
    x = x @ numpy.linalg.qr(random.standard_normal((d, d)))[0]
    sign = numpy.sign(x @ random.standard_normal(d) + noise * 10 * random.standard_normal(n))
    found: Array = x * sign[:, None]
    return found


def prompts(n: int, each: int = 1) -> list[str]:
    return [f"prompt {i // each}" for i in range(n)]


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 8), (300, 30), (12, 40), (2, 3), (1, 5)])
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_the_fit_is_the_minimum_of_its_loss(n: int, d: int, strength: float) -> None:
    x = made(n, d)
    found = fit(x, prompts(n), [strength])
    expected = newton(torch.from_numpy(x), strength).numpy()
    numpy.testing.assert_allclose(found.weight, expected, rtol=0, atol=1e-6 * numpy.linalg.norm(expected))
    assert found.gradient < 1e-7
    margins = x @ expected
    assert found.loss == pytest.approx(numpy.log1p(numpy.exp(-margins)).mean(), abs=1e-7)
    assert found.accuracy == pytest.approx((margins >= 0).mean(), abs=1e-9)


def test_the_strength_is_the_best_on_prompts_that_were_held_out() -> None:
    x, clusters = made(120, 60, noise=1.0), prompts(120, each=3)
    strengths = (1e-4, 1e-2, 1.0)
    found = fit(x, clusters, strengths, seed=3)
    out = held_out_fifth(clusters, 3)
    losses = []
    for strength, tried in zip(strengths, found.tried, strict=True):
        # The strength counts in units of the mean squared difference of all pairs, held out or not.
        share = (x**2).sum(1).mean() / (x[~out] ** 2).sum(1).mean()
        margins = x[out] @ newton(torch.from_numpy(x[~out]), strength * share).numpy()
        assert tried["loss"] == pytest.approx(numpy.log1p(numpy.exp(-margins)).mean(), abs=1e-6)
        assert tried == {"strength": strength, "loss": tried["loss"], "accuracy": (margins >= 0).mean()}
        losses.append(tried["loss"])
    assert found.strength == strengths[int(numpy.argmin(losses))]
    # Overfitted and underfitted: neither end of the scale is the best here, so the choice is a real one.
    assert found.strength == 1e-2
    numpy.testing.assert_array_equal(found.weight, fit(x, clusters, [found.strength], seed=3).weight)


def test_whole_prompts_are_held_out() -> None:
    clusters = [f"prompt {i % 11}" for i in range(60)]
    out = held_out_fifth(clusters)
    held = {cluster for cluster, is_out in zip(clusters, out, strict=True) if is_out}
    kept = {cluster for cluster, is_out in zip(clusters, out, strict=True) if not is_out}
    assert len(held) == 2
    assert not held & kept
    assert (held_out_fifth(clusters, 1) != out).any()
    assert (held_out_fifth(clusters) == out).all()


def test_scale_and_order_of_the_pairs_do_not_matter() -> None:
    x, clusters = made(80, 10), prompts(80)
    found, larger = fit(x, clusters), fit(1000 * x, clusters)
    numpy.testing.assert_allclose(1000 * larger.weight, found.weight, atol=1e-6 * numpy.linalg.norm(found.weight))
    order = numpy.random.default_rng(0).permutation(80)
    moved = fit(x[order], [clusters[i] for i in order])
    numpy.testing.assert_allclose(moved.weight, found.weight, atol=1e-6 * numpy.linalg.norm(found.weight))
    assert moved.strength == found.strength


def test_pairs_of_one_prompt_are_fitted_with_the_strongest_regularisation() -> None:
    found = fit(made(50, 4), ["the only one"] * 50)
    assert (found.strength, found.tried) == (1.0, ())
    assert found.accuracy > 0.5


def test_pairs_that_all_point_one_way_and_pairs_that_are_ties() -> None:
    one_way = numpy.tile([[2.0, 0.0, -1.0]], (30, 1))
    found = fit(one_way, prompts(30), [1e-4])
    assert numpy.isfinite(found.weight).all()
    assert found.accuracy == 1.0
    direction = found.weight / numpy.linalg.norm(found.weight)
    numpy.testing.assert_allclose(direction, numpy.array([2, 0, -1]) / 5**0.5, atol=1e-9)
    with_ties = numpy.concatenate([one_way[:1], numpy.zeros((9, 3))])
    assert fit(with_ties, prompts(10), [1e-2]).accuracy == 1.0  # a tie counts as right
    assert fit(with_ties, prompts(10), [1e-2]).loss > 0.9 * numpy.log(2) * 0.9


@pytest.mark.parametrize(("x", "message"), [
    (numpy.zeros((6, 3)), "answers of a pair have the same features throughout: there is nothing to fit a head to"),
    (numpy.zeros((0, 3)), "answers of a pair have the same features throughout"),
    (numpy.full((6, 3), numpy.nan), "features are not finite"),
    (numpy.array([[1.0, 2.0], [-1.0, -2.0]]), "preferences cancel out: a head that fits them gives every answer"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused(x: Array, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        fit(x, prompts(len(x)))


@pytest.mark.parametrize(
    ("strengths", "found"), [([], "none"), ([1.0, 0.0], "0.0"), ([-1.0], "-1.0"), ([float("nan")], "nan")]
)
def test_strengths_are_positive(strengths: list[float], found: str) -> None:
    with pytest.raises(UsageError, match=f"--strength: expected positive numbers, found {found}"):
        fit(made(10, 3), prompts(10), strengths)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS, "xlnet"])
def test_the_reward_is_linear_in_the_features(kind: str) -> None:
    model = load_reward_model(folder(kind), CPU)
    tokens = Tokens(model.renderer, texts())
    rewards = score(model, tokens)
    found = features(model, tokens, batch_tokens=300)
    name, layer = output_layer(model.module)
    assert found.shape == (len(texts()), 32)
    assert found.dtype == numpy.float32
    bias = 0 if layer.bias is None else layer.bias.item()
    expected = found.astype(numpy.float64) @ layer.weight.detach().double().numpy()[0] + bias
    numpy.testing.assert_allclose(expected, rewards, atol=1e-4)
    assert rewards.std() > 0.05
    assert model.module.get_submodule(name) is layer
    numpy.testing.assert_array_equal(score(model, tokens), rewards)  # the model is as it was


def test_features_of_a_model_in_bfloat16_are_what_its_float32_head_sees() -> None:
    model = load_reward_model(folder("llama"), LoadOptions(device="cpu", dtype="bfloat16"))
    tokens = Tokens(model.renderer, texts())
    expected = features(model, tokens) @ model.module.score.weight.detach().numpy()[0]
    numpy.testing.assert_allclose(expected, score(model, tokens), atol=1e-4)


def test_the_head_comes_back_when_the_features_fail(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    broken = load_file(place / "model.safetensors")
    broken["model.norm.weight"][3] = torch.nan
    save_file(broken, place / "model.safetensors", {"format": "pt"})
    model = load_reward_model(place, CPU)
    with pytest.raises(RefusedError, match="gives the reward nan to text"):
        features(model, Tokens(model.renderer, texts()))
    assert isinstance(model.module.score, torch.nn.Linear)


def test_a_model_without_one_output_layer_is_refused() -> None:
    module = torch.nn.Module()
    module.base_model = torch.nn.Linear(2, 2)
    module.score = torch.nn.Linear(2, 2)
    with pytest.raises(RefusedError, match="has 0 linear layers with one output after its base model, expected one"):
        output_layer(module)


class RanError(Exception):
    """The model was asked for features."""


def test_features_are_kept_for_the_same_body_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = load_reward_model(own_folder(tmp_path / "rm"), CPU), tmp_path / "features.safetensors"
    tokens = Tokens(model.renderer, texts())
    expected = features(model, tokens, cache=cache)

    def ran(*arguments: Any) -> Any:
        raise RanError

    monkeypatch.setattr(probe_module, "outputs", ran)
    done: list[int] = []
    numpy.testing.assert_array_equal(features(model, tokens, cache=cache, progress=done.append), expected)
    assert sum(done) == len(texts())
    with torch.no_grad():
        model.module.score.weight += 1  # the head has no part in them
    numpy.testing.assert_array_equal(features(model, tokens, cache=cache), expected)
    with pytest.raises(RanError):
        features(model, Tokens(model.renderer, texts()[1:]), cache=cache)
    with torch.no_grad():
        model.module.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-4
    with pytest.raises(RanError):
        features(model, tokens, cache=cache)
    monkeypatch.undo()
    assert not numpy.array_equal(features(model, tokens, cache=cache), expected)
    again = cache.read_bytes()
    for damaged in (again[:-5], b"", b"x" * 100):
        cache.write_bytes(damaged)
        features(model, tokens, cache=cache)
        assert cache.read_bytes() == again
    assert [path.name for path in tmp_path.iterdir() if "features" in path.name] == ["features.safetensors"]


def test_another_setting_of_the_same_weights_has_other_features(tmp_path: Path) -> None:
    model = load_reward_model(own_folder(tmp_path / "rm"), CPU)
    tokens = Tokens(model.renderer, texts())
    before = features_fingerprint(model, tokens)
    model.module.config.rms_norm_eps *= 2
    assert features_fingerprint(model, tokens) != before


# --- the head of a model ----------------------------------------------------------------------------------------------


def pairs_of(model: RewardModel, data: str, limit: int | None = None) -> tuple[Tokens, TrainingSet, list[str]]:
    preferences = read_preferences(data, limit=limit)
    unique = unique_texts(preferences)
    tokens = Tokens(model.renderer, unique.texts)
    return tokens, tokenise_pairs(preferences, unique, tokens), list(unique.clusters)


def test_a_probed_head_in_its_file_gives_the_rewards_that_were_fitted(world: World, tmp_path: Path) -> None:
    place = Path(shutil.copytree(world.flat, tmp_path / "rm"))
    model = load_reward_model(place, CPU)
    tokens, pairs, clusters = pairs_of(model, world.data("train"))
    found = probe_head(model, tokens, pairs, clusters, cache=tmp_path / "features")
    write_head(place, found.weight)
    fitted = load_reward_model(place, CPU)
    values = features(model, tokens, cache=tmp_path / "features")
    rewards = score(fitted, tokens)
    numpy.testing.assert_allclose(rewards, values.astype(float) @ found.weight, atol=1e-4)
    margins = rewards[pairs.chosen] - rewards[pairs.rejected]
    assert (margins >= 0).mean() == pytest.approx(found.accuracy, abs=1 / len(pairs))
    assert numpy.logaddexp(0, -margins).mean() == pytest.approx(found.loss, abs=1e-5)
    assert found.accuracy > 0.75
    # And on pairs that it has not seen: what the head has learnt is no accident.
    tokens, pairs, _ = pairs_of(fitted, world.data("val"))
    rewards = score(fitted, tokens)
    assert (rewards[pairs.chosen] > rewards[pairs.rejected]).mean() > 0.75


def test_the_same_pairs_give_the_same_head_with_and_without_a_cache(world: World, tmp_path: Path) -> None:
    model = load_reward_model(world.a, CPU)
    tokens, pairs, clusters = pairs_of(model, world.data("train"), limit=60)
    found: list[Probe] = [
        probe_head(model, tokens, pairs, clusters, cache=cache) for cache in (None, tmp_path / "f", tmp_path / "f")
    ]
    for other in found[1:]:
        numpy.testing.assert_array_equal(other.weight, found[0].weight)
    x = differences(features(model, tokens), pairs)
    numpy.testing.assert_array_equal(fit(x, clusters).weight, found[0].weight)


# --- the head in files ------------------------------------------------------------------------------------------------

WEIGHT = numpy.linspace(-1.37, 2.11, 32)


@pytest.mark.parametrize(("kind", "weight", "bias"), [
    ("llama", "score.weight", None),
    ("bert", "classifier.weight", "classifier.bias"),
    ("roberta", "classifier.out_proj.weight", "classifier.out_proj.bias"),
    ("modernbert", "classifier.weight", "classifier.bias"),
    ("xlnet", "logits_proj.weight", "logits_proj.bias"),
])  # fmt: skip
def test_only_the_last_layer_of_the_files_changes(tmp_path: Path, kind: str, weight: str, bias: str | None) -> None:
    place = own_folder(tmp_path / "rm", kind)
    file = place / "model.safetensors"
    before, size, digest = load_file(file), file.stat().st_size, head_digest(place)
    write_head(place, WEIGHT)
    after = load_file(file)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {weight, bias} - {None}
    assert torch.equal(after[weight], torch.from_numpy(WEIGHT)[None].float())
    assert bias is None or after[bias].tolist() == [0.0]
    assert file.stat().st_size == size
    assert head_digest(place) != digest


def test_a_head_in_shards_and_in_bfloat16(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm", "bert", dtype=torch.bfloat16)
    single = Path(shutil.copytree(place, tmp_path / "single"))
    whole = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    # Weight and bias of the head in two files, and a third that has nothing of it.
    files = {"classifier.weight": 1, "classifier.bias": 2}
    for k in (1, 2, 3):
        part = {name: value for name, value in whole.items() if files.get(name, 3) == k}
        save_file(part, place / f"model-{k:05d}-of-00003.safetensors", {"format": "pt"})
    third = (place / "model-00003-of-00003.safetensors").stat()
    for folder_ in (place, single):
        write_head(folder_, WEIGHT)
    expected = torch.from_numpy(WEIGHT)[None].to(torch.bfloat16)
    assert torch.equal(load_file(place / "model-00001-of-00003.safetensors")["classifier.weight"], expected)
    assert load_file(place / "model-00002-of-00003.safetensors")["classifier.bias"].tolist() == [0.0]
    assert (place / "model-00003-of-00003.safetensors").stat() == third
    assert head_digest(place) == head_digest(single)


def test_a_dtype_that_cannot_hold_the_head_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm", dtype=torch.float16)
    before = (place / "model.safetensors").read_bytes()
    for weight, largest in ((WEIGHT * 1e6, "2.11e"), (WEIGHT * 1e-9, "2.11e-09")):
        with pytest.raises(RefusedError, match=r"'score\.weight' is F16, which cannot hold the fitted head") as refused:
            write_head(place, weight)
        assert largest in str(refused.value)
    assert (place / "model.safetensors").read_bytes() == before


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    with pytest.raises(RefusedError) as refused:
        write_head(place, numpy.ones(31))
    what = "has the head 'score.weight'; expected one weight of shape [1, 31] in it"
    assert str(refused.value) == f"refused: {place}: {what}"


def test_the_file_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = own_folder(tmp_path / "rm")
    file = place / "model.safetensors"
    original = Path(shutil.copy(file, tmp_path / "original"))
    before = original.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(probe_module.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_head(place, WEIGHT)
    assert file.read_bytes() == before
    names = sorted(path.name for path in place.iterdir())
    # Of a link, as in the Hub's cache, the link is replaced, not what it leads to.
    os.link(file, tmp_path / "other-name")
    mask = os.umask(0o022)
    try:
        write_head(place, WEIGHT)
    finally:
        os.umask(mask)
    assert (tmp_path / "other-name").read_bytes() == before != file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(path.name for path in place.iterdir()) == names


def test_equal_heads_have_equal_digests(tmp_path: Path) -> None:
    a, b = (own_folder(tmp_path / f"{seed}", "roberta", seed=seed) for seed in (1, 2))
    assert head_digest(a) != head_digest(b)
    tensors, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    mixed = {name: tensors[name] if name.startswith("classifier") else value for name, value in other.items()}
    save_file(mixed, b / "model.safetensors", {"format": "pt"})
    assert head_digest(a) == head_digest(b)
    mixed["classifier.dense.bias"][0] += 1e-3
    save_file(mixed, b / "model.safetensors", {"format": "pt"})
    assert head_digest(a) != head_digest(b)
    save_file({name: value.bfloat16().float() for name, value in tensors.items()}, a / "model.safetensors")
    rounded = head_digest(a)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, a / "model.safetensors")
    assert head_digest(a) != rounded
    bare = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    save_file(bare, a / "model.safetensors")
    with pytest.raises(RefusedError, match="has no reward head"):
        head_digest(a)
