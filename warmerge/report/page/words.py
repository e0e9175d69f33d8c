"""What a page says of each kind of result: its heading, what it measures, on how much, how its intervals were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from warmerge.errors import counted
from warmerge.report.results import BON, CURVE, EVAL, RL, THEORY, TRAINING, VS_M, WINRATE


@dataclass(frozen=True)
class About:
    """A kind of result for people. `figures`: what is to be seen in each of its figures; `command`: what writes it."""

    heading: str
    measures: str
    figures: tuple[str, ...]
    command: str


ABOUT = {
    TRAINING: About(
        "Training",
        "Several reward models were fine-tuned on the same pairs from one start with one shared head; they differ in "
        "learning rate, dropout and the order of the data.",
        ("Loss and accuracy of each member by training step; where pairs were set aside, its accuracy on these too",),
        "train",
    ),
    EVAL: About(
        "Accuracy",
        "How often each reward model gives the better answer of a pair the higher reward, and whether the average of "
        "the weights does better than its members and their ensemble.",
        ("Accuracy of each model with its 95 % interval, a panel for each set",),
        "eval",
    ),
    CURVE: About(
        "Linear mode connectivity",
        "Whether accuracy holds on the straight line between the weights of two models: only then is it safe to "
        "average them.",
        ("Accuracy of the averaged weights, of the ensemble and of the line between the ends, against lambda",),
        "lmc-curve",
    ),
    VS_M: About(
        "Accuracy against the number of members",
        "What each further member adds to the average of the weights, and to the ensemble.",
        ("Accuracy of the average and of the ensemble against the number of members",),
        "accuracy_vs_m",
    ),
    BON: About(
        "Best-of-N",
        "What the answer that a reward model picks out of N is worth by a reward that it does not see: beyond some N "
        "the choice exploits the model's errors, and gets worse.",
        ("Rewards of the chosen answer against N", "How often one chooser's answer is better than another's"),
        "bon",
    ),
    RL: About(
        "Policy optimisation",
        "What a policy gains by a control reward while it is optimised against a proxy, and where that gain is lost "
        "again although the proxy still rises: reward hacking.",
        ("Control and proxy reward against steps and against KL",),
        "rl-report",
    ),
    WINRATE: About(
        "Win rates",
        "How often a judge prefers the answer of one policy to that of another, on the same prompts.",
        ("Win rate of each policy with its 95 % interval",),
        "winrate",
    ),
    THEORY: About(
        "Theory",
        "A simulation of the paper's section 4.3: members that each learn only some of the features, their ensemble, "
        "and the average of their weights.",
        ("What a feature counts in ensemble and average, and their accuracy against the number of members",),
        "theory",
    ),
}
# Titles and intervals of results that do not say it themselves.
_NOT_RECORDED = "not recorded in this result"


def about(kind: str) -> About:
    """What is said of a kind, also of one that is new."""
    return ABOUT.get(kind, About(kind.capitalize(), f"Results of the kind {kind}.", (f"Figure of {kind}",), kind))


def facts(kind: str, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers were measured on, and how their intervals were made, as terms and sentences."""
    found = [("Measured on", words) for words in [_measured_on(kind, content)] if words]
    if kind == TRAINING and content.get("training_pairs"):
        found.insert(0, ("Trained on", _trained_on(content)))
    judge = content.get("judge")
    if isinstance(judge, Mapping) and judge.get("label"):
        found.append(("Judge", str(judge["label"])))
    if kind == TRAINING and not content.get("accuracies"):
        return found
    if kind == RL:
        runs = content.get("runs") or []
        controls = dict.fromkeys(str(run.get("control")) for run in runs)
        found += [("Control reward", ", ".join(controls))] if controls else []
        how = "lowest to highest run, no 95 % interval; those of win rates are 95 %, over prompts"
    elif kind == THEORY:
        how = "95 %: 1.96 standard errors of the simulated mean to both sides; what is called exact has none"
    else:
        how = f"95 %: {content['intervals']}" if content.get("intervals") else _NOT_RECORDED
    return [*found, ("Intervals", how + ("; a tie counts as right" if kind in _TIES else ""))]


_TIES = (TRAINING, EVAL, CURVE, VS_M)


def _trained_on(content: Mapping[str, Any]) -> str:
    words, swapped = counted(content["training_pairs"], "pair"), content.get("swapped")
    if swapped:
        words += f", the labels of {swapped:,} of them swapped on purpose ({swapped / content['training_pairs']:.0%})"
    return words


def _measured_on(kind: str, content: Mapping[str, Any]) -> str:
    if kind == RL:
        runs = content.get("runs") or []
        groups = len({run.get("group") for run in runs})
        return f"{counted(len(runs), 'run')} of {counted(groups, 'group')}: runs of a group differ only in their seed"
    if kind == BON and isinstance(pool := content.get("pool"), Mapping):
        return f"{counted(pool['candidates'], 'candidate')} of {counted(pool['prompts'], 'prompt')}, {pool['source']}"
    if kind == WINRATE and isinstance(prompts := content.get("prompts"), Mapping):
        return f"{counted(prompts['compared'], 'prompt')} of {prompts['asked']:,} asked, {prompts['source']}"
    if kind == THEORY:
        made = f"seed {content.get('seed')}, noise {content.get('noise')}, {content.get('layers')} layers"
        return f"{counted(content['trials'], 'simulated trial')} for each number; {made}"
    return "; ".join(_set(each) for each in content.get("sets") or [])


def _set(each: Mapping[str, Any]) -> str:
    words = f"{each['name']}: {counted(each['n'], 'pair')} of {counted(each['prompts'], 'prompt')}"
    return words + (f", {counted(each['skipped_rows'], 'bad row')} left out" if each.get("skipped_rows") else "")


def words_of(content: Mapping[str, Any]) -> list[str]:
    """What the result says of itself in sentences: its words, and its verdicts'."""
    found = [str(words) for words in content.get("words") or []]
    return found + [str(row["words"]) for row in content.get("verdicts") or [] if row.get("words")]


def notes_of(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Its warnings, and its notes."""
    warnings, notes = (list(dict.fromkeys(map(str, content.get(key) or []))) for key in ("warnings", "notes"))
    return warnings, notes


def joined(parts: Sequence[str]) -> str:
    """
    >>> joined(["a", "b", "c"]), joined(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
