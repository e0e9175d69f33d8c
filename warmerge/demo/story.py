"""What the demo does, step by step: the commands as a user types them in the demo's folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from warmerge.demo.world import EARLIER, SIZES

WORLD = ("python", "-m", "warmerge.demo.world")
# What a later step, or the table at the end, reads of an earlier one.
EVAL_OUT, POLICIES_LOG, REPORT = "eval", "policies.txt", "report.html"
_TRAIN, _GOLD = "world/train.jsonl", "world/gold.py:gold"
# Models so small that a second thread, a process for each of them or half the precision only cost time.
_ONE, _SMALL = ("--threads", "1"), ("--threads", "1", "--engine", "inline", "--precision", "float32")


@dataclass(frozen=True)
class Plan:
    """How much of everything; the world's size is `SIZES[size]`."""

    size: str = "demo"
    runs: int = 6
    epochs: int = 4
    gentle_epochs: int = 2
    candidates: int = 32
    rl_steps: int = 80

    def members(self) -> list[str]:
        """Their folders."""
        return [f"members/members/{i:02}" for i in range(1, self.runs + 1)]

    def starts(self) -> list[str]:
        """The checkpoints of one fine-tuning that members start from (WARM, "Baklava")."""
        steps = SIZES[self.size].sft_steps
        return [*(f"world/sft-{round(steps * share)}" for share in EARLIER), "world/sft"]

    def resamples(self) -> tuple[str, ...]:
        return () if self is FULL else ("--resamples", "200")


FULL = Plan()
QUICK = Plan(size="quick", runs=2, epochs=2, gentle_epochs=1, candidates=4, rl_steps=4)


@dataclass(frozen=True)
class Step:
    """Commands, their headline, and what they are for.

    With `log` they run beside the steps that follow, and what they say goes into that file; a step of a log alone waits
    for them, and shows it.
    """

    title: str
    why: str
    commands: tuple[tuple[str, ...], ...] = ()
    log: str = ""

    def typed(self) -> str:
        """The step as it is typed in a shell."""
        joined = " && ".join(shlex.join(command) for command in self.commands)
        if not self.log:
            return joined
        return f"({joined}) > {self.log} 2>&1 &" if self.commands else f"wait $!; cat {self.log}"


def steps(plan: Plan, seed: int) -> list[Step]:
    """The demo from an empty folder to report.html. The same plan and seed give the same commands."""
    return [
        *_models(plan, seed),
        _policies(plan, seed),
        _control(plan, seed),
        *_measured(plan, seed),
        *_gathered(plan, seed),
    ]


def _models(plan: Plan, seed: int) -> list[Step]:
    """A world and its reward models."""
    starts = [word for start in plan.starts() for word in ("--init", start)]
    return [
        Step(
            "A world whose truth is known",
            "A tiny language model is pre-trained and fine-tuned to summarise posts. world/gold.py says what a\n"
            "summary is truly worth. It has decided the pairs; the reward models never see it.",
            ((*WORLD, "world", "--size", plan.size, "--seed", str(seed)),),
        ),
        Step(
            f"{plan.runs} reward models from one start, a quarter of their labels wrong",
            "One head is fitted to the frozen model and starts them all; they differ in fine-tuning checkpoint,\n"
            "learning rate, dropout and data order. Epochs enough to learn wrong labels by heart.",
            ((
                "warmerge", "train", *starts, *_noisy(seed), "--runs", str(plan.runs), "--epochs", str(plan.epochs),
                "--lr", "7.5e-4,1.5e-3,3e-3", "--dropout", "0,0.1", "--seed", str(seed), *_SMALL, "-o", "members",
            ),),
        ),
    ]  # fmt: skip


def _control(plan: Plan, seed: int) -> Step:
    """What averaging is to beat, and does not stand in the paper."""
    return Step(
        "A control: one reward model, trained gently",
        "From the same start, few epochs, a low learning rate. An average has to beat such restraint to be worth\n"
        "its members.",
        ((
            "warmerge", "train", "--base", "members/init-3", "--no-probe", *_noisy(seed), "--runs", "1",
            "--epochs", str(plan.gentle_epochs), "--lr", "5e-4", "--dropout", "0", "--seed", str(seed), *_SMALL,
            "-o", "gentle",
        ),),
    )  # fmt: skip


def _noisy(seed: int) -> tuple[str, ...]:
    """The training pairs, a quarter of their labels swapped: the same for all."""
    return ("--data", _TRAIN, "--corrupt", "0.25", "--corrupt-seed", str(seed), "--batch", "64")


def _policies(plan: Plan, seed: int) -> Step:
    """The slowest step; it needs the members alone, and so runs beside all others."""
    rl = (
        "warmerge", "rl", "--policy", "world/sft", "--prompts", "world/prompts.jsonl", "--control", _GOLD,
        "--scale", "std", "--kl-coef", "0.05", "--steps", str(plan.rl_steps), "--batch", "64", "--lr", "5e-4",
        "--max-new-tokens", "16", "--eos-penalty", "1", "--micro-batch", "64", "--control-every", "1",
        "--seed", str(seed), *_ONE,
    )  # fmt: skip
    return Step(
        "Meanwhile, two policies are optimised: against one member, and against the average",
        "With the gold reward as control, which watches and is not optimised. They learn beside the next steps.",
        (
            (*rl, "--rm", plan.members()[0], "--name", "single", "-o", "rl/single"),
            (*rl, "--warm", ",".join(plan.members()), "--name", "average", "-o", "rl/average"),
        ),
        POLICIES_LOG,
    )


def _measured(plan: Plan, seed: int) -> list[Step]:
    """Merged, and set beside what it must beat."""
    members, joined, more = plan.members(), ",".join(plan.members()), (*plan.resamples(), *_ONE)
    return [
        Step(
            "May they be merged?",
            "Names, shapes, tokenizers, heads: everything that would make an average wrong is refused here.",
            (("warmerge", "inspect", *members),),
        ),
        Step("Merge", "One model, at the cost of one model.", (("warmerge", "average", *members, "-o", "warm"),)),
        Step(
            "Is the way between two of them flat?",
            "Accuracy of weights mixed in eleven proportions: a valley in between would forbid to average.",
            (("warmerge", "lmc-curve", members[0], members[-1], "--data", "val=world/val.jsonl", *more, "-o", "lmc"),),
        ),
        Step(
            "Is the average better?",
            "Beside members, their ensembles and the average stand what must be beaten: the start with its probed\n"
            "head, members half-way back to it, the gentle one. Of the training pairs, swapped labels are shown apart.",
            ((
                "warmerge", "eval", *members, "--init", "members/init-3", "--beside", "gentle=gentle/members/01",
                "--data", "val=world/val.jsonl", "--data", "ood=world/ood.jsonl", "--data", f"train={_TRAIN}",
                "--mask", "members/corruption.json", *more, "-o", EVAL_OUT,
            ),),
        ),
        Step(
            "How far can they be trusted? Best of n",
            "Each picks the best of n answers; the gold reward says what its choice is worth. Where a curve turns\n"
            "down, the picker is being fooled.",
            ((
                "warmerge", "bon", "--policy", "world/sft", "--prompts", "world/held-out.jsonl",
                "-n", str(plan.candidates), "--max-new-tokens", "16", "--control", _GOLD,
                "--rm", f"single={members[0]}", "--ensemble", f"ensemble={joined},scale=std",
                "--warm", f"average={joined}", "--reference", "average", "--seed", str(seed), *more, "-o", "bon",
            ),),
        ),
    ]  # fmt: skip


def _gathered(plan: Plan, seed: int) -> list[Step]:
    """What came of it."""
    title = f"warmerge demo, seed {seed}" if plan is FULL else "warmerge demo --quick: these numbers mean nothing"
    results = ("members", "lmc", EVAL_OUT, "bon", "rl-report")
    return [
        Step(
            "What the policies made of their rewards",
            "As long as control, the gold reward, rises with the proxy, a policy learns. Where control turns down and\n"
            "the proxy goes on rising, it has found out what its reward gets wrong.",
            log=POLICIES_LOG,
        ),
        Step(
            "Side by side",
            "Compare at equal KL, not at equal steps; and see what two runs cannot tell.",
            (("warmerge", "rl-report", "rl/single", "rl/average", "-o", "rl-report"),),
        ),
        Step(
            "All of it on one page",
            "Every figure and number, what the paper says, and what was seen here.",
            (("warmerge", "report", *results, "--title", title, "-o", REPORT),),
        ),
    ]
