"""Linear probe: the reward head that is fitted on frozen features before any fine-tuning. WARM, section 3.1.

The one head it gives starts every member (arXiv 2401.12187): heads drawn apart would not average.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError
from warmerge.rewards.model import RewardModel, head_layers
from warmerge.rewards.scoring import Tokens, method_of, outputs
from warmerge.version import versions
from warmerge.weights.kernels import memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.training.training_set import TrainingSet

    Array = NDArray[numpy.float64]

# Multiples of the mean squared norm of a feature difference.
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Largest relative error of a fitted weight.
_ACCURACY = 1e-7


@dataclass(frozen=True)
class Probe:
    """A fitted head: `weight` (d,), and its loss and accuracy on the pairs that it was fitted on.

    `gradient` is the largest entry where the fit ended. `tried` holds for each strength the loss and the accuracy on a
    fifth of the prompts, of a head that was fitted on the others; it is empty with fewer than five prompts.
    """

    weight: Array
    strength: float
    loss: float
    accuracy: float
    gradient: float
    tried: tuple[dict[str, float], ...]


def probe_head(
    model: RewardModel,
    tokens: Tokens,
    pairs: TrainingSet,
    clusters: Sequence[str],
    *,
    cache: Path | None = None,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Probe:
    """The head fitted to the model's frozen features; the model itself stays as it is (see `write_head`).

    Args:
        tokens: of the texts that `pairs` are about, by the model's own renderer.
        clusters: the prompt of each pair.
        cache: a file that keeps the features; one that is there is used if it is of this body and these texts.
        strengths, seed: as for `fit`.
        batch_tokens, progress: as for `scoring.score`.

    Raises:
        UsageError, RefusedError, WarmergeError: as `features` and `fit`.
    """
    found = features(model, tokens, cache=cache, batch_tokens=batch_tokens, progress=progress)
    return fit(differences(found, pairs), clusters, strengths, seed)


def output_layer(module: Any) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer whose output is the reward.

    Raises:
        RefusedError: there is none, or more than one.
    """
    found = {
        name: layer
        for head, child in head_layers(module).items()
        for name, layer in ((f"{head}.{inner}".rstrip("."), layer) for inner, layer in child.named_modules())
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    }
    if len(found) != 1:
        what = f"has {len(found)} linear layers with one output after its base model, expected one: no head to fit"
        raise RefusedError([Finding(type(module).__name__, what)])
    return next(iter(found.items()))


def features(
    model: RewardModel,
    tokens: Tokens,
    *,
    cache: Path | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[numpy.float32]:
    """What the last linear layer sees of each text, (N, d), float32: the reward is a linear function of it.

    Of a head of several layers (RoBERTa's dense and out_proj) this is the input of the last one.

    Args:
        cache: a file to read them from, or to keep them in.

    Raises:
        RefusedError: features that are not finite; a model without such a layer.
    """
    from safetensors.numpy import save

    if cache is None:
        return _computed(model, tokens, batch_tokens, progress)
    fingerprint = features_fingerprint(model, tokens)
    found = _cached(cache, fingerprint)
    if found is None:
        found = _computed(model, tokens, batch_tokens, progress)
        partial = cache.with_name(f".{cache.name}.partial")
        partial.write_bytes(save({"features": found}, metadata={"fingerprint": fingerprint}))
        os.replace(partial, cache)
    elif progress is not None:
        progress(len(found))
    return found


def features_fingerprint(model: RewardModel, tokens: Tokens) -> str:
    """A digest (hex) of all that decides the features: config, weights without the last layer, and token ids."""
    digest = hashlib.sha256(model.module.config.to_json_string().encode())
    digest.update(f"{versions()['torch']} {versions()['transformers']}".encode())
    head, _ = output_layer(model.module)
    for name, value in sorted(model.module.state_dict().items()):
        if not name.startswith(f"{head}."):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(memory(value.detach().cpu().contiguous()))
    for _, made in tokens:
        for entry in made:
            digest.update(len(entry.ids).to_bytes(8, "little") + entry.ids.tobytes())
    return digest.hexdigest()


def differences(features: NDArray[numpy.float32], pairs: TrainingSet) -> Array:
    """(n, d): features of each pair's chosen text minus those of its rejected one."""
    return features[pairs.chosen].astype(numpy.float64) - features[pairs.rejected]


def fit(differences: Array, clusters: Sequence[str], strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Probe:
    """The regularised Bradley-Terry logistic fit of rewards w.x to preferences; WARM, Equation 1, with a linear r.

        minimise over w   mean_i log(1 + exp(-w.(x_chosen - x_rejected)_i)) + strength/2 |w|^2 mean_i |difference_i|^2

    It is convex: what is returned does not depend on a start. The strength is the one with the least loss on a fifth of
    the prompts, fitted on the others (the largest where prompts are too few for that); the head is then fitted on all.

    Args:
        differences: (n, d), features of the chosen answer minus those of the rejected one.
        clusters: the prompt of each pair: whole prompts are held out.
        strengths: one or more, each above 0.

    Raises:
        UsageError: no strength, or one that is not a positive number.
        RefusedError: differences that are all zero, not finite, or that cancel out.
        WarmergeError: the fit did not converge.

    >>> found = fit(numpy.array([[1.0, 0.3], [1.0, -0.2], [1.0, 0.1], [-0.1, 0.2]]), list("abcd"))
    >>> bool(found.weight[0] > 0), found.accuracy
    (True, 0.75)
    """
    assert len(differences) == len(clusters), "one prompt for each pair"
    wrong = [strength for strength in strengths if not 0 < strength < math.inf]
    if wrong or not strengths:
        raise UsageError(f"--strength: expected positive numbers, found {wrong[0] if wrong else 'none'}")
    square = float((differences**2).sum(axis=1).mean()) if len(differences) else 0.0
    if not 0 < square < math.inf:
        what = "answers of a pair have the same features throughout" if square == 0 else "features are not finite"
        raise RefusedError([Finding("probe", f"{what}: there is nothing to fit a head to")])
    x = torch.from_numpy(differences / square**0.5)
    held_out = torch.from_numpy(held_out_fifth(clusters, seed))
    tried = []
    for strength in strengths if held_out.any() else ():
        loss, accuracy = _loss_and_accuracy(x[held_out], _minimised(x[~held_out], strength))
        tried.append({"strength": strength, "loss": loss, "accuracy": accuracy})
    best = min(tried, key=lambda entry: entry["loss"])["strength"] if tried else max(strengths)
    w = _minimised(x, best)
    if float(w.norm()) < _ACCURACY:
        what = "preferences cancel out: a head that fits them gives every answer the same reward"
        raise RefusedError([Finding("probe", what)])
    loss, accuracy = _loss_and_accuracy(x, w)
    gradient = float(_gradient(x, w, best).abs().max())
    return Probe((w / square**0.5).numpy(), best, loss, accuracy, gradient, tuple(tried))


def held_out_fifth(clusters: Sequence[str], seed: int = 0) -> NDArray[numpy.bool_]:
    """(n,): which pairs are those of a random fifth of the prompts; none with fewer than five prompts.

    >>> int(held_out_fifth(list("abcde")).sum()), int(held_out_fifth(list("abcd")).sum())
    (1, 0)
    """
    names = sorted(set(clusters))
    chosen = numpy.random.default_rng(seed).permutation(len(names))[: len(names) // 5]
    held_out = {names[i] for i in chosen}
    return numpy.array([cluster in held_out for cluster in clusters], dtype=bool)


def _computed(
    model: RewardModel, tokens: Tokens, batch_tokens: int | None, progress: Callable[[int], None] | None
) -> NDArray[numpy.float32]:
    _, layer = output_layer(model.module)
    found = numpy.empty((len(tokens.texts), layer.in_features), dtype=numpy.float32)
    method_of(model)  # verified with the head on: what it says of a linear layer's output holds for its input
    with _without_output_layer(model.module):
        for rows, values in outputs(model, tokens, batch_tokens, progress):
            found[rows] = values
    return found


def _cached(cache: Path, fingerprint: str) -> NDArray[numpy.float32] | None:
    """The features in a file; None if there is none, or it is damaged or of something else: it is only a cache."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(cache, framework="numpy") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            found: NDArray[numpy.float32] = file.get_tensor("features")
            return found
    except (FileNotFoundError, SafetensorError):
        return None


def _minimised(x: torch.Tensor, strength: float) -> torch.Tensor:
    """(d,), float64, to a relative error of 1e-7: Newton's method, each step solved by conjugate gradients.

    The loss curves by `strength` or more everywhere, so a gradient g is at most |g| / strength away from the minimum.
    """
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(100):
        gradient, loss = _gradient(x, w, strength), _objective(x, w, strength)
        if gradient.norm() <= max(_ACCURACY * strength * float(w.norm()), 1e-15):
            return w
        step = _newton_step(x, w, strength, gradient)
        slope, size = float(gradient @ step), 1.0
        # Far from the minimum a whole step may lead too far. Next to it the loss has no digits left to compare.
        while size > 1e-6 and _objective(x, w + size * step, strength) > loss + 1e-4 * size * slope + 1e-14:
            size /= 2
        w = w + size * step
    raise WarmergeError(f"the probe's fit with strength {strength} did not converge; try a larger one")


def _newton_step(x: torch.Tensor, w: torch.Tensor, strength: float, gradient: torch.Tensor) -> torch.Tensor:
    """(d,): -H^-1 gradient, the more exactly the closer the minimum; H itself, (d, d), is never built."""
    p = torch.sigmoid(x @ w)
    curvature = p * (1 - p) / len(x)
    step, residual = torch.zeros_like(w), -gradient
    direction, square = residual, float(residual @ residual)
    enough = square * min(0.25, square**0.25) ** 2
    for _ in range(1000):
        product = x.T @ (curvature * (x @ direction)) + strength * direction
        length = square / float(direction @ product)
        step, residual = step + length * direction, residual - length * product
        before, square = square, float(residual @ residual)
        if square <= enough:
            break
        direction = residual + square / before * direction
    return step


def _objective(x: torch.Tensor, w: torch.Tensor, strength: float) -> float:
    return float(nn.functional.softplus(-(x @ w)).mean() + strength / 2 * w @ w)


def _gradient(x: torch.Tensor, w: torch.Tensor, strength: float) -> torch.Tensor:
    return strength * w - x.T @ torch.sigmoid(-(x @ w)) / len(x)


def _loss_and_accuracy(x: torch.Tensor, w: torch.Tensor) -> tuple[float, float]:
    margins = x @ w
    return float(nn.functional.softplus(-margins).mean()), float((margins >= 0).double().mean())


@contextlib.contextmanager
def _without_output_layer(module: Any) -> Iterator[None]:
    """The module gives what its output layer would see."""
    name, layer = output_layer(module)
    module.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        module.set_submodule(name, layer)
