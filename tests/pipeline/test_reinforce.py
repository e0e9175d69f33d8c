"""The formulas of `warmerge rl`: scales, shapes, order; and the settings that are refused."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from warmerge import RefusedError, UsageError
from warmerge.pipeline.proxies import Proxy
from warmerge.pipeline.reinforce.reward import Scales, combined, disagreement, optimised, scales_of
from warmerge.pipeline.reinforce.run import row_of
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.reinforce.trainer import order_of

MEMBERS = numpy.array([[0.0, 2.0, 4.0], [10.0, 30.0, 20.0]])
UNIT = Scales((0.0,), (1.0,), 0.0, 1.0)


def ensemble(how: str = "mean", standardize: bool = True, k: float = 0.5) -> Proxy:
    return Proxy("ens", "ensemble", ("a", "b"), how, k, standardize)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [-1.2247449, 0.61237244, 0.61237244]),
        ("min", [-1.2247449, 0.0, 0.0]),
        ("uwo", [-1.2247449, 0.61237244 - 0.5 * 0.375, 0.61237244 - 0.5 * 0.375]),
    ],
)
def test_members_are_standardised_by_the_start(how: str, expected: list[float]) -> None:
    scales = scales_of(ensemble(how), MEMBERS)
    assert scales.member_means == (2.0, 20.0)
    numpy.testing.assert_allclose(scales.member_stds, [numpy.sqrt(8 / 3), numpy.sqrt(200 / 3)])
    found = combined(ensemble(how), MEMBERS, scales)
    numpy.testing.assert_allclose(found, expected, atol=1e-6)
    assert scales.mean == pytest.approx(found.mean())
    # The scale is the start's: other answers do not change it.
    shifted = combined(ensemble("mean"), MEMBERS + 100, scales)
    numpy.testing.assert_allclose(shifted - combined(ensemble("mean"), MEMBERS, scales), shifted[0] + 1.2247449)


def test_raw_members_are_combined_as_they_are() -> None:
    assert combined(ensemble(standardize=False), MEMBERS, UNIT).tolist() == [5.0, 16.0, 12.0]
    assert combined(Proxy("rm", "rm", ("a",)), MEMBERS[:1], UNIT).tolist() == [0.0, 2.0, 4.0]


def test_a_flat_reward_is_refused() -> None:
    flat = numpy.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    with pytest.raises(RefusedError, match=r"a: gives every answer .* so ens cannot standardise it; leave it out"):
        scales_of(ensemble(), flat)
    scales_of(ensemble(standardize=False), flat)
    with pytest.raises(RefusedError, match=r"rm: gives each of 3 answers .* the reward 1: there is nothing to learn"):
        scales_of(Proxy("rm", "rm", ("a",)), flat[:1])


def test_disagreement_is_of_one_scale() -> None:
    scales = scales_of(ensemble(), MEMBERS)
    assert disagreement(MEMBERS, scales) == pytest.approx(numpy.mean([0.0, 0.61237244, 0.61237244]), abs=1e-6)
    assert disagreement(numpy.array([[1.0, 2.0], [5.0, 5.0]]), Scales((0.0, 5.0), (1.0, 0.0), 0.0, 1.0)) == 0.75


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-3.0, 0.0, 3.0, 9.0]),
        ({"clip": 2.0}, [-2.0, 0.0, 2.0, 2.0]),
        ({"scale": "std"}, [-2.0, -0.5, 1.0, 4.0]),
        ({"scale": "std", "clip": 1.5}, [-1.5, -0.5, 1.0, 1.5]),
        ({"eos_penalty": 1.0}, [-3.0, -1.0, 3.0, 8.0]),
    ],
)
def test_the_reward_that_is_optimised(settings: dict[str, Any], expected: list[float]) -> None:
    r = numpy.array([-3.0, 0.0, 3.0, 9.0])
    finished = numpy.array([True, False, True, False])
    found = optimised(r, RlSettings(**settings), Scales((1.0,), (2.0,), mean=1.0, std=2.0), None, finished)
    numpy.testing.assert_allclose(found, expected)


def test_the_sigmoid_shape() -> None:
    r, reference = numpy.array([1.0, 5.0, -900.0]), numpy.array([1.0, 3.0, 900.0])
    settings, finished = RlSettings(shaping="sigmoid", eos_penalty=0.25), numpy.array([True, False, True])
    found = optimised(r, settings, UNIT, reference, finished)
    numpy.testing.assert_allclose(found, [0.5, 1 / (1 + numpy.exp(-2.0)) - 0.25, 0.0], atol=1e-12)
    # Both sides are scaled and bounded, before the difference is taken.
    bounded = RlSettings(shaping="sigmoid", scale="std", clip=1.0)
    found = optimised(r, bounded, Scales((1.0,), (2.0,), 1.0, 2.0), reference, numpy.array([True] * 3))
    numpy.testing.assert_allclose(found, 1 / (1 + numpy.exp(-numpy.array([0.0, 0.0, -2.0]))))


def test_the_order_of_prompts() -> None:
    settings = RlSettings(steps=7, batch=6, answers=2)
    order = numpy.array(order_of(10, settings)).reshape(7, 3)
    assert all(len(set(step)) == 3 for step in order.tolist())
    assert len(set(order[:3].ravel().tolist())) == 9  # an epoch has each prompt once
    assert order_of(10, settings) == order_of(10, settings)
    assert order_of(10, RlSettings(steps=7, batch=6, answers=2, seed=1)) != order_of(10, settings)
    assert order_of(10, RlSettings(steps=2, batch=6, answers=2)) == order.ravel().tolist()[:6]


def test_a_row_per_sequence() -> None:
    logs = {
        "step": 3, "completions/mean_length": 20.0, "rewards/proxy/mean": 1.0, "rewards/proxy/std": 0.5, "reward": 0.9,
        "reward_std": 0.4, "kl": 0.1, "entropy": 2.0, "truncated": 0.25, "cut": 0.0,
        "no_signal": 0.0, "learning_rate": 1e-5, "grad_norm": 1.0,
    }  # fmt: skip
    row = row_of(logs, RlSettings(batch=8), seconds=4.0)
    assert row["kl_sequence"] == 2.0
    assert row["tokens_per_second"] == 40.0
    assert row["control"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0, "lr": -1.0}, "--steps: expected 1 or more, found 0; --lr: expected a number above 0, found -1.0"),
        ({"kl_coef": float("nan")}, "--kl-coef: expected a number of 0 or more, found nan"),
        ({"batch": 10, "answers": 4}, r"--batch: expected a multiple of 4 \(--answers to each prompt\), found 10"),
        ({"baseline": "batch", "batch": 1}, "--batch: expected 2 or more: an answer's baseline is made of the others"),
        ({"baseline": "mean"}, "--baseline: expected loo or batch, found mean"),
        ({"answers": 1}, "--answers: expected 2 or more: an answer's baseline"),
        (
            {"shaping": "tanh", "scale": "unit"},
            "--shaping: expected none or sigmoid, found tanh; --scale: expected raw",
        ),
        ({"template": "jinja"}, "--policy-template: expected auto or chat or plain, found jinja"),
        ({"clip": 0.0}, "--clip: expected a number above 0, found 0.0"),
        ({"generator": "vllm", "baseline": "batch"}, "--generator vllm goes with --baseline loo alone"),
        ({"start_answers": 2}, "--start-answers: expected 8 or more, found 2"),
    ],
)
def test_settings_out_of_their_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RlSettings(**settings)


def test_what_decides() -> None:
    deciding = RlSettings().deciding()
    assert {"save_every", "keep_every", "sample_every", "micro_batch"}.isdisjoint(deciding)
    assert {"seed", "samples", "control_every", "kl_coef"} <= deciding.keys()
