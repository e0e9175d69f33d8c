"""What the demo does, step by step: the commands as a user types them in the demo's folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from warmerge.demo.world import EARLIER, SIZES

WORLD = ("python", "-m", "warmerge.demo.world")
# What a later step, or the table at the end, reads of an earlier one.
EVAL_OUT, REPORT = "eval", "report.html"
_TRAIN, _GOLD = "world/train.jsonl", "world/gold.py:gold"


@dataclass(frozen=True)
class Plan:
    """How much of everything; the world's size is `SIZES[size]`."""

    size: str = "demo"
    runs: int = 6
    epochs: int = 5
    gentle_epochs: int = 2
    candidates: int = 32
    rl_steps: int = 80


FULL = Plan()
QUICK = Plan(size="quick", runs=2, epochs=2, gentle_epochs=1, candidates=4, rl_steps=4)


@dataclass(frozen=True)
class Step:
    """A command, its headline, and what it is for."""

    title: str
    why: str
    command: tuple[str, ...]

    def typed(self) -> str:
        """The command as it is typed in a shell."""
        return shlex.join(self.command)


def steps(plan: Plan, seed: int) -> list[Step]:
    """The demo from an empty folder to report.html. The same plan and seed give the same commands."""
    sft_steps = SIZES[plan.size].sft_steps
    starts = [f"world/sft-{round(sft_steps * share)}" for share in EARLIER] + ["world/sft"]
    members = [f"members/members/{i:02}" for i in range(1, plan.runs + 1)]
    float32 = ("--precision", "float32")  # also where a GPU could do with less: numbers are those of any machine
    joined, one, inline = ",".join(members), ("--threads", "1"), ("--engine", "inline")
    noisy = ("--data", _TRAIN, "--corrupt", "0.25", "--corrupt-seed", str(seed), "--batch", "64", *float32)
    measured = ("--data", "val=world/val.jsonl", "--data", "ood=world/ood.jsonl")
    boot = () if plan is FULL else ("--resamples", "200")
    rl = (
        "warmerge", "rl", "--policy", "world/sft", "--prompts", "world/prompts.jsonl", "--control", _GOLD,
        "--scale", "std", "--kl-coef", "0.05", "--steps", str(plan.rl_steps), "--batch", "64", "--lr", "5e-4",
        "--max-new-tokens", "16", "--eos-penalty", "1", "--micro-batch", "64", "--control-every", "1",
        "--seed", str(seed), *one,
    )  # fmt: skip
    return [
        Step(
            "A world whose truth is known",
            "A tiny language model is pre-trained and fine-tuned to summarise posts. world/gold.py says what a\n"
            "summary is truly worth. It has decided the pairs; the reward models never see it.",
            (*WORLD, "world", "--size", plan.size, "--seed", str(seed)),
        ),
        Step(
            f"{plan.runs} reward models from one start, a quarter of their labels wrong",
            "One head is fitted to the frozen model and starts them all; they differ in fine-tuning checkpoint,\n"
            "learning rate, dropout and data order. Enough epochs to learn wrong labels by heart.",
            (
                "warmerge", "train", *(word for start in starts for word in ("--init", start)), *noisy,
                "--runs", str(plan.runs), "--epochs", str(plan.epochs), "--lr", "6e-4,1.2e-3,2.4e-3",
                "--dropout", "0,0.1", "--val", "val=world/val.jsonl", "--seed", str(seed), *boot, *one, *inline,
                "-o", "members",
            ),
        ),
        Step(
            "A control: one reward model, trained gently",
            "Two epochs at a low learning rate. An average has to beat such restraint to be worth its members.",
            (
                "warmerge", "train", "--base", "members/init-3", "--no-probe", *noisy, "--runs", "1",
                "--epochs", str(plan.gentle_epochs), "--lr", "5e-4", "--dropout", "0", "--seed", str(seed), *one,
                *inline, "-o", "gentle",
            ),
        ),
        Step(
            "May they be merged?",
            "Names, shapes, tokenizers, heads: everything that would make an average wrong is refused here.",
            ("warmerge", "inspect", *members),
        ),
        Step("Merge", "One model, at the cost of one model.", ("warmerge", "average", *members, "-o", "warm")),
        Step(
            "Is the way between two of them flat?",
            "Accuracy of weights mixed in eleven proportions: a valley in between would forbid to average.",
            ("warmerge", "lmc-curve", members[0], members[-1], *measured[:2], *boot, *one, "-o", "lmc"),
        ),
        Step(
            "Is the average better?",
            "Beside members, their ensembles and the average stand what must be beaten: the start with its probed\n"
            "head, members half-way back to it, the gentle one. Of the training pairs, swapped labels are shown apart.",
            (
                "warmerge", "eval", *members, "--init", "members/init-3", "--beside", "gentle=gentle/members/01",
                *measured, "--data", f"train={_TRAIN}", "--mask", "members/corruption.json", *boot, *one,
                "-o", EVAL_OUT,
            ),
        ),
        Step(
            "How far can they be trusted? Best of n",
            "Each picks the best of n answers; the gold reward says what its choice is worth. When a curve turns\n"
            "down, the picker is being fooled.",
            (
                "warmerge", "bon", "--policy", "world/sft", "--prompts", "world/held-out.jsonl",
                "-n", str(plan.candidates), "--max-new-tokens", "16", "--control", _GOLD,
                "--rm", f"single={members[0]}", "--ensemble", f"ensemble={joined},scale=std",
                "--warm", f"average={joined}", "--reference", "average",
                "--seed", str(seed), *boot, *one, "-o", "bon",
            ),
        ),
        Step(
            "A policy optimised against one member",
            "Watch control, the gold reward of its answers: it rises, and then the policy finds out what the\n"
            "reward model gets wrong.",
            (*rl, "--rm", members[0], "--name", "single", "-o", "rl/single"),
        ),
        Step(
            "The same against the average",
            "Compare the two at equal KL, not at equal steps.",
            (*rl, "--warm", joined, "--name", "average", "-o", "rl/average"),
        ),
        Step(
            "Side by side",
            "Peaks, gains at equal KL, and what two runs cannot tell.",
            ("warmerge", "rl-report", "rl/single", "rl/average", "-o", "rl-report"),
        ),
        Step(
            "All of it on one page",
            "Every figure and number, what the paper says, and what was seen here.",
            (
                "warmerge", "report", "members", "lmc", EVAL_OUT, "bon", "rl-report", "--title",
                f"warmerge demo, seed {seed}", "-o", REPORT,
            ),
        ),
    ]  # fmt: skip
