"""From the rewards of a proxy's models to the one number that is optimised for each answer: every formula is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, plain
from warmerge.pipeline.proxies import ENSEMBLE, Proxy
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.scoring.rewarders import Rewarder, Texts
from warmerge.rewards.ensembles import aggregate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]


# Rewards further from 0, in standard deviations, lose what tells them apart in float32, which has 7 digits.
_FAR = 1e5


@dataclass(frozen=True)
class Scales:
    """Means and standard deviations over answers of the start policy: of each member (M,), and of the proxy.

    Measured once: a scale that followed the policy would hide what it does to the reward.
    """

    member_means: tuple[float, ...]
    member_stds: tuple[float, ...]
    mean: float
    std: float


def scales_of(proxy: Proxy, members: Array) -> Scales:
    """The scales of rewards (M, N) of N answers of the start policy.

    Raises:
        RefusedError: every answer gets the same reward, by the proxy or by a member that is to be standardised.
    """
    means, stds = members.mean(axis=1), members.std(axis=1)
    flat = [name for name, std in zip(proxy.checkpoints, stds, strict=False) if std == 0] if proxy.standardize else []
    if flat:
        what = f"gives every answer of the start policy the same reward, so {plain(proxy.name)} cannot standardise it"
        raise RefusedError(Finding(name, f"{what}; leave it out, or add scale=raw") for name in flat)
    found = Scales(tuple(means.tolist()), tuple(stds.tolist()), 0.0, 1.0)
    rewards = combined(proxy, members, found)
    if numpy.ptp(rewards) == 0:
        what = f"gives each of {len(rewards)} answers of the start policy the reward {rewards[0]:.4g}"
        raise RefusedError([Finding(proxy.name, f"{what}: there is nothing to learn from it")])
    mean, std = float(rewards.mean()), float(rewards.std())
    if abs(mean) > _FAR * std:
        what = f"gives rewards of {mean:.6g} +- {std:.3g} to answers of the start policy: TRL computes in float32, "
        raise RefusedError([Finding(proxy.name, f"{what}in which these are hardly told apart; subtract a constant")])
    return Scales(found.member_means, found.member_stds, mean, std)


def combined(proxy: Proxy, members: Array, scales: Scales) -> Array:
    """The proxy's reward r (N,) from its members' (M, N); members are standardised first where the proxy says so."""
    if proxy.kind != ENSEMBLE:
        only: Array = members[0]
        return only
    return aggregate(standardised(members, scales) if proxy.standardize else members, proxy.aggregate, proxy.k)


def standardised(members: Array, scales: Scales) -> Array:
    """Rewards (M, N) with mean 0 and standard deviation 1 for each member on answers of the start policy."""
    stds = numpy.array([std or 1.0 for std in scales.member_stds])
    found: Array = (members - numpy.array(scales.member_means)[:, None]) / stds[:, None]
    return found


def disagreement(members: Array, scales: Scales) -> float:
    """The standard deviation over members, mean over answers, of rewards that were brought to one scale first: that one
    member likes all answers better than another does is no disagreement.

    >>> scales = Scales((0.0, 9.0), (1.0, 2.0), 0.0, 1.0)
    >>> disagreement(numpy.array([[1.0, 2.0], [11.0, 13.0]]), scales), disagreement(numpy.array([[1.0], [7.0]]), scales)
    (0.0, 1.0)
    """
    return float(standardised(members, scales).std(axis=0).mean())


def optimised(
    r: Array, settings: RlSettings, scales: Scales, reference: Array | None, finished: NDArray[numpy.bool_]
) -> Array:
    """What is optimised (N,), before the KL penalty: r scaled, clipped, shaped, less the penalty for a missing end.

    Args:
        r: the proxy's rewards (N,).
        reference: for the shape sigmoid(r - r_ref), of the start policy's own answers to the same prompts (N,).
        finished: whether each answer ended by itself (N,).

    >>> scales = Scales((0.0,), (1.0,), mean=1.0, std=2.0)
    >>> r, finished = numpy.array([5.0, 1.0]), numpy.array([True, False])
    >>> optimised(r, RlSettings(scale="std", clip=1.5, eos_penalty=1.0), scales, None, finished).tolist()
    [1.5, -1.0]
    """

    def bounded(values: Array) -> Array:
        if settings.scale == "std":
            values = (values - scales.mean) / scales.std
        return values if settings.clip is None else values.clip(-settings.clip, settings.clip)

    out = bounded(r)
    if settings.shaping == "sigmoid":
        assert reference is not None, "the start policy has answered every prompt"
        out = 1 / (1 + numpy.exp(-(out - bounded(reference)).clip(-500, 500)))
    return out - settings.eos_penalty * ~finished


def without_signal(rewards: Array, prompts: Sequence[str] | None) -> float:
    """The share of groups whose rewards are all equal, so that no answer is better than another.

    TRL's own count is of rewards with the KL penalty in them, which always differ.

    Args:
        rewards: (N,), before the KL penalty.
        prompts: that the answers belong to, a group each; None where all answers are one group.

    >>> without_signal(numpy.array([1.0, 1.0, 1.0, 2.0]), ["a", "a", "b", "b"]), without_signal(numpy.ones(3), None)
    (0.5, 1.0)
    """
    groups: dict[str, list[float]] = {}
    for prompt, reward in zip(["all"] * len(rewards) if prompts is None else prompts, rewards.tolist(), strict=True):
        groups.setdefault(prompt, []).append(reward)
    return sum(min(group) == max(group) for group in groups.values()) / len(groups)


@dataclass
class Rewards:
    """The rewards of a step's answers. TRL calls `optimised`, `proxy` and `control` in this order, at each step once.

    Args:
        read: (prompt numbers, sampled ids) -> texts, and whether each answer ended by itself.
        members: the models of the proxy; `judge` gives the control reward, every `settings.control_every` steps.
        references: r_ref of each prompt by its number, for the sigmoid shape.
    """

    read: Callable[[Sequence[str], Sequence[list[int]]], tuple[Texts, NDArray[numpy.bool_]]]
    settings: RlSettings
    definition: Proxy
    members: Sequence[Rewarder]
    judge: Rewarder | None
    scales: Scales | None = None
    references: dict[int, float] = field(default_factory=dict)
    _texts: Texts = ()
    _proxy: Array | None = None

    def of_members(self, texts: Texts) -> tuple[Array, int]:
        """The rewards (M, N) of all members, and how many of the texts the one that cuts most has cut."""
        given = [member.rewards(texts) for member in self.members]
        return numpy.stack([entry.rewards for entry in given]), max(entry.cut for entry in given)

    def functions(self) -> tuple[list[Callable[..., list[float | None]]], list[float]]:
        """TRL's reward functions and their weights: only the first one moves the policy, the others are logged."""

        def optimised(**given: Any) -> list[float | None]:
            return self._optimised(**given)

        def proxy(**_: Any) -> list[float | None]:
            assert self._proxy is not None, "TRL calls reward functions in their order"
            return list(self._proxy.tolist())

        def control(trainer_state: Any, prompts: Sequence[str], **_: Any) -> list[float | None]:
            step = trainer_state.global_step + 1
            assert self.judge is not None, "there is a control"
            if not self.measures_control(step):
                return [None] * len(prompts)
            judge = self.judge
            return list(self._at(step, lambda: _in_float32(judge.label, judge.rewards(self._texts).rewards)).tolist())

        functions: list[Callable[..., list[float | None]]] = [optimised, proxy]
        functions += [] if self.judge is None else [control]
        return functions, [1.0, 0.0, 0.0][: len(functions)]

    def measures_control(self, step: int) -> bool:
        return step in (1, self.settings.steps) or step % self.settings.control_every == 0

    def _optimised(
        self, prompts: Sequence[str], completion_ids: Sequence[list[int]], trainer_state: Any,
        log_metric: Callable[[str, float], None], **_: Any,
    ) -> list[float | None]:  # fmt: skip
        assert self.scales is not None, "the start policy was measured before"
        self._texts, finished = self.read(prompts, completion_ids)
        step, scales = trainer_state.global_step + 1, self.scales
        members, cut = self._at(step, lambda: self.of_members(self._texts))
        name = self.definition.name
        self._proxy = self._at(step, lambda: _in_float32(name, combined(self.definition, members, scales)))
        if len(members) > 1:
            log_metric("disagreement", disagreement(members, scales))
        log_metric("cut", cut / len(self._texts))
        # TRL's own count takes an answer that was cut at a padding token for one that has ended.
        log_metric("truncated", float(1 - finished.mean()))
        reference = numpy.array([self.references[int(p)] for p in prompts]) if self.references else None
        found = optimised(self._proxy, self.settings, scales, reference, finished)
        log_metric("no_signal", without_signal(found, prompts if self.settings.baseline == "loo" else None))
        return list(found.tolist())

    def _at(self, step: int, score: Callable[[], Any]) -> Any:
        """What `score` gives; its refusals (a reward of NaN, a function that fails) say at which step it was."""
        try:
            return score()
        except (RefusedError, UsageError) as error:
            found = "; ".join(map(str, error.findings)) if isinstance(error, RefusedError) else str(error)
            raise WarmergeError(f"step {step}: {found}. Earlier steps are kept") from error


def _in_float32(label: str, rewards: Array) -> Array:
    """The same rewards, if float32 holds them.

    Raises:
        RefusedError: it holds one of them as infinity.
    """
    with numpy.errstate(over="ignore"):
        wrong = numpy.flatnonzero(~numpy.isfinite(rewards.astype(numpy.float32)))
    if wrong.size:
        what = f"gives the reward {rewards[wrong[0]]:.4g} to text {wrong[0] + 1}, more than float32 holds"
        raise RefusedError([Finding(label, what)])
    return rewards
