"""Before the first step: the task, TRL's log-probabilities checked, and what the start policy's answers are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from warmerge.errors import Finding, RefusedError, plain
from warmerge.pipeline.reinforce.reward import Rewards, combined, scales_of
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.reinforce.trainer import answers_to, order_of
from warmerge.pipeline.sampling.policy import Answer, Drawn, OpenedPolicy, Questions
from warmerge.pipeline.scoring.rewarders import Texts
from warmerge.report.results import write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

START = "start.jsonl"
# Tokens of an answer on which TRL's log-probabilities are tried, and how far off they may be on average, in nats.
_TRIED = 16
_OFF, _OFF_BFLOAT16 = 1e-3, 0.05


@dataclass(frozen=True)
class Task:
    """What is optimised, on which prompts, into which folder. `held_out` are asked now and then, and not trained on."""

    policy: OpenedPolicy
    training: Questions
    held_out: Questions
    rewards: Rewards
    out: Path

    @property
    def settings(self) -> RlSettings:
        return self.rewards.settings

    @property
    def kept(self) -> dict[int, Path]:
        """After which steps the policy is kept, and where."""
        every, last = self.settings.keep_every, self.settings.steps
        return {step: self.out / f"step-{step}" for step in sorted({*range(every, last + 1, every), last})}


def read_answers(
    policy: OpenedPolicy, asked: Questions, numbers: Sequence[int], drawn: Sequence[Drawn]
) -> list[Answer]:
    """What was sampled after the prompts of these numbers, as text."""
    return [
        policy.answer(asked.texts[number], asked.ids[number], one) for number, one in zip(numbers, drawn, strict=True)
    ]


def reader(policy: OpenedPolicy, training: Questions) -> Callable[..., tuple[Texts, Any]]:
    """What `Rewards` reads a step's answers with."""

    def read(prompts: Sequence[str], completion_ids: Sequence[list[int]]) -> tuple[Texts, Any]:
        numbers = [int(prompt) for prompt in prompts]
        drawn = [Drawn(list(ids), ids[-1] in policy.ends) for ids in completion_ids]
        answers = read_answers(policy, training, numbers, drawn)
        texts: Texts = [(training.texts[number], answer.text) for number, answer in zip(numbers, answers, strict=True)]
        return texts, numpy.array([answer.finished for answer in answers])

    return read


def measure_start(task: Task, trainer: Any, begun: bool) -> None:
    """The scales of the rewards and r_ref, from answers of the start policy: sampled once, and read again later.

    Args:
        begun: the policy is the start no more, so that what was sampled before must be there.

    Raises:
        RefusedError: it is not, or is damaged; rewards that teach nothing.
    """
    rewards, path = task.rewards, task.out / START
    asked = _asked_of_the_start(task)
    members = _measured(path, asked, len(rewards.members))
    if members is None and begun:
        what = "is missing or damaged, and the policy is the start no more; delete the run's folder to begin again"
        raise RefusedError([Finding(str(path), what)])
    if members is None:
        drawn = answers_to(trainer, [task.training.ids[n] for n in asked], task.policy.ends, task.settings.seed)
        answers = read_answers(task.policy, task.training, asked, drawn)
        texts: Texts = [(task.training.texts[n], answer.text) for n, answer in zip(asked, answers, strict=True)]
        members, _ = rewards.of_members(texts)
        if trainer.is_world_process_zero():
            lines = [
                {"number": number, "prompt": prompt, "answer": answer.text, "tokens": answer.tokens,
                 "finished": answer.finished, "rewards": column}
                for number, (prompt, _), answer, column in zip(asked, texts, answers, members.T.tolist(), strict=True)
            ]  # fmt: skip
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        trainer.accelerator.wait_for_everyone()
    rewards.scales = scales_of(rewards.definition, members)
    if task.settings.shaping == "sigmoid":
        references = combined(rewards.definition, members, rewards.scales)
        rewards.references = dict(zip(asked, references.tolist(), strict=True))


def _asked_of_the_start(task: Task) -> list[int]:
    """Prompts of the run, by their numbers: all of them where each needs its own r_ref, else as many as make a scale,
    few prompts several times."""
    settings = task.settings
    prompts = list(dict.fromkeys(order_of(len(task.training.texts), settings)))
    if settings.shaping == "sigmoid":
        return prompts
    return [prompts[i % len(prompts)] for i in range(settings.start_answers)]


def _measured(path: Path, asked: Sequence[int], members: int) -> Array | None:
    """The rewards (M, N) that an earlier call has kept; None where they are not there, or not whole."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if [line["number"] for line in found] != list(asked):
            return None
        rewards = numpy.array([line["rewards"] for line in found], dtype=numpy.float64).T
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rewards if rewards.shape == (members, len(asked)) and numpy.isfinite(rewards).all() else None


def refuse_other_log_probabilities(trainer: Any, policy: OpenedPolicy, training: Questions) -> None:
    """TRL pads batches on the left, and computes the logits itself: they must be those that each text has alone.

    For models that count positions from the padding it does not (GPT-2), nor for those whose logits go through more
    than TRL knows of. Gradients and the KL divergence would be those of another model, and KL would still begin at 0.

    Raises:
        RefusedError: it does not.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # of a sharded model all ranks have to take part in each forward pass
    order = sorted(range(len(training.ids)), key=lambda number: len(training.ids[number]))
    chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    asked, answers = [training.ids[n] for n in chosen], [training.ids[n][:_TRIED] for n in chosen]
    width = max(map(len, asked))
    length = max(map(len, answers))
    ids = torch.zeros(len(asked), width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        ids[row, width - len(prompt) : width + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, width - len(prompt) : width + len(answer)] = 1
    device = trainer.accelerator.device
    model, part = trainer.model, (ids.to(device), mask.to(device))
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(model, *part, length, len(asked))[0]
        for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            text = torch.tensor([[*prompt, *answer]], device=device)
            with trainer.accelerator.autocast():
                logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, len(prompt) - 1 : -1]
            alone = (logits.float() / trainer.temperature).log_softmax(-1)[range(len(answer)), answer]
            off = float((found[row, : len(answer)].float() - alone).abs().mean())
            if off > (_OFF_BFLOAT16 if trainer.args.bf16 else _OFF) * (1 + float(alone.abs().mean())):
                what = f"TRL gives its tokens other log-probabilities than it has itself (by {off:.2g} nats on average)"
                known = "models that count positions from the padding, as GPT-2 does, cannot be optimised with it"
                raise RefusedError([Finding(f"--policy {plain(policy.source.label)}", f"{what}; {known}")])
