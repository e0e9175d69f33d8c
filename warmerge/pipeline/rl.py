"""rl: a policy optimised against a reward model, an ensemble or an average, watched by a control reward.

OUT/rl.json      what was asked, of what models; "finished" once the last step is done
OUT/rows.jsonl, samples/, step-N/, start.jsonl: see `reinforce.run`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

from warmerge.errors import Finding, RefusedError, UsageError, counted, plain, quoted
from warmerge.pipeline.found.rl_runs import FORMAT, RECORD, ROWS
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.proxies import WARM, Proxy
from warmerge.pipeline.proxies.choosers import doubts_before, judges_of, open_judges, single
from warmerge.pipeline.reinforce.record import WORKING, begun, decides, only_run
from warmerge.pipeline.reinforce.reward import Rewards
from warmerge.pipeline.reinforce.run import run
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.reinforce.start import Task, reader
from warmerge.pipeline.reinforce.trainer import join_ranks, need_trl
from warmerge.pipeline.sampling.policy import (
    OpenedPolicy,
    Questions,
    contents_of,
    fitting,
    open_for_sampling,
    open_policy,
)
from warmerge.pipeline.sampling.prompts import Prompts, read_prompts
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.rewarders import OwnFunction, is_function, load_rewarder, open_rewarder
from warmerge.rewards.bench import Measuring
from warmerge.training.record import write_json
from warmerge.version import versions
from warmerge.weights.locate import make_local
from warmerge.weights.samples import content_digest

# Steps at the end in which no group of answers had two different rewards: then the policy has stopped to learn.
_STILL = 10
# More answers cut than this are worth a warning.
_MANY = 0.05


@dataclass(frozen=True)
class Optimised:
    """A finished run: what is in its folder.

    `rows` are those of rows.jsonl, one for each step; `checkpoints` the kept policies by their step.
    """

    out: Path
    rows: tuple[dict[str, Any], ...]
    checkpoints: Mapping[int, Path]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {**self.record, "rows": list(self.rows), "warnings": [str(warning) for warning in self.warnings]}


def optimise_policy(
    policy: Spec,
    proxy: Proxy,
    prompts: str,
    out: Spec,
    *,
    control: Spec | None = None,
    settings: RlSettings | None = None,
    measuring: Measuring | None = None,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Optimised | None:
    """Optimises a language model against a proxy reward, and says at each step what a control reward makes of it.

    Reward models read texts, so that their tokenizers and the policy's may differ. An interrupted call that is made
    again goes on from its last checkpoint, to the same weights; one that was finished returns what lies there.

    Args:
        policy: a causal language model: the start, and the reference of the KL penalty.
        proxy: what is optimised.
        prompts: rows with a `prompt`: a file, a folder, or a data set on the Hub.
        out: the run's folder.
        control: a reward model that the proxy was not made from, or `FILE.py:FUNCTION`, which says what a text is
            worth. It never moves the policy.
        settings: how it is optimised.
        measuring: how reward models are loaded (`loading`, `base`, `batch_tokens`, `threads`) and prompts are read
            (`limit`, `skip_bad_rows`); `on_work` and `progress` count steps.
        say: is told what is being done, a line each.

    Returns:
        None on all ranks but the first, where `torchrun` or `accelerate launch` started several.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors; nothing was trained.
        WarmergeError: out of memory; a reward or a gradient that is not finite. Interrupted: Ctrl-C. Both keep what is
            finished.

    Example:
        >>> import warmerge
        >>> warm = warmerge.Proxy("warm", "warm", ("runs/1", "runs/2"))
        >>> done = warmerge.optimise_policy("sft", warm, "prompts.jsonl", "rl", control="big-rm")  # doctest: +SKIP
        >>> done.rows[-1]["control"]  # doctest: +SKIP
        0.83
    """
    need_trl()
    settings, measuring, out = settings or RlSettings(), measuring or Measuring(), Path(out)
    if measuring.loading.device not in ("auto", "cpu", "cuda"):
        what = "choose a GPU with CUDA_VISIBLE_DEVICES, as policy and reward models share it"
        raise UsageError(f"--device: expected auto, cpu or cuda, found {measuring.loading.device!r}; {what}")
    join_ranks(_on_cpu(measuring))
    first = int(os.environ.get("RANK", "0")) == 0
    found = read_prompts(prompts, measuring.limit, settings.seed, measuring.skip_bad_rows)
    source = open_for_sampling(policy)
    members = _members(proxy, measuring.base)
    judge = None if control is None else open_rewarder(control, measuring.base)
    (local,) = make_local([source])
    asked = {
        **contents_of(local), "weights": content_digest(local), "prompts": found.digest,
        "proxy": {**asdict(proxy), "checkpoints": None, "name": None}, "models": [decides(entry) for entry in members],
        "control": None if judge is None else decides(judge), "loading": asdict(measuring.loading),
        "settings": settings.deciding(),
    }  # fmt: skip
    with only_run(out) if first else nullcontext():
        earlier = begun(out, asked)
        if earlier.get("finished"):
            say("this run is finished: nothing is computed")
            return _result(out, earlier) if first else None
        opened = open_policy(local, settings.template, settings.trust_remote_code)
        training, held_out = _questions(opened, found, settings, measuring.skip_bad_rows)
        warnings = _doubts_before(proxy, members, control, judge, found)
        rewards = Rewards(
            reader(opened, training), settings, proxy, [load_rewarder(entry, measuring) for entry in members],
            None if judge is None else load_rewarder(judge, measuring),
        )  # fmt: skip
        for rewarder in [*rewards.members, *([] if rewards.judge is None else [rewards.judge])]:
            warnings += rewarder.warnings
        warnings = list(dict.fromkeys(warnings))
        task = Task(opened, training, held_out, rewards, out)
        record = {
            "format": FORMAT, "command": list(command), "versions": versions(), "finished": False,
            "policy": str(policy), "prompts": str(prompts), "control": None if control is None else str(control),
            "proxy": asdict(proxy), "settings": asdict(settings), "asked": asked, "counts": _counts(task, found),
            "notes": [], "warnings": list(map(str, warnings)),
        }  # fmt: skip
        _optimise(task, record, measuring, say if first else lambda line: None)
        return _finished(task, record, warnings) if first else None


def _on_cpu(measuring: Measuring) -> bool:
    return measuring.loading.device == "cpu"


# --- what was asked ---------------------------------------------------------------------------------------------------


def _members(proxy: Proxy, base: Spec | None) -> list[Judge | OwnFunction]:
    """What the proxy's rewards are made of: models, or functions where it is no average."""
    functions = [checkpoint for checkpoint in proxy.checkpoints if is_function(checkpoint)]
    if functions and proxy.kind == WARM:
        raise UsageError(f"--warm: {plain(functions[0])} is a function, which has no weights to average")
    if functions:
        return [open_rewarder(checkpoint, base) for checkpoint in proxy.checkpoints]
    judges = open_judges([proxy], None, base)
    return [judges[key] for key in judges_of(proxy)]


def _doubts_before(
    proxy: Proxy, members: Sequence[Judge | OwnFunction], control: Spec | None, judge: Judge | OwnFunction | None,
    found: Prompts,
) -> list[Finding]:  # fmt: skip
    """Reasons for doubt before anything is trained."""
    warnings = []
    models = {key: entry for key, entry in zip(judges_of(proxy), members, strict=True) if isinstance(entry, Judge)}
    if isinstance(judge, OwnFunction) and any(judge.same_as(entry) for entry in members):
        warnings.append(Finding(str(control), "is the control, and what is optimised: it sees no hacking of itself"))
    if isinstance(judge, Judge):
        if any(entry.ingredients() & judge.ingredients() for entry in models.values()):
            what = f"is the control, and shares weights with {quoted(proxy.name)}: it flatters it; judge by another"
            warnings.append(Finding(str(control), f"{what} model"))
        models[single(str(control))] = judge
    # What a proxy with a function among its members has in common with itself is not looked at.
    proxies = [proxy] if all(isinstance(entry, Judge) for entry in members) else []
    return warnings + doubts_before(found.texts, proxies, models, None)


def _questions(
    policy: OpenedPolicy, found: Prompts, settings: RlSettings, skip_too_long: bool
) -> tuple[Questions, Questions]:
    """The prompts to train on, and those that are held out to be read: other ones.

    Raises:
        UsageError: fewer prompts than a step needs. RefusedError: no end-of-sequence token; as `fitting`.
    """
    if not policy.ends:
        what = "names no end-of-sequence token in its files, so no answer would end; set eos_token_id in config.json"
        raise RefusedError([Finding(f"--policy {plain(policy.source.label)}", what)])
    asked = fitting(policy, found, settings.max_new_tokens, skip_too_long)
    n, needed = len(asked.texts), settings.prompts_per_step + settings.samples
    if n < needed:
        each = f"{settings.prompts_per_step} for each step and {settings.samples} held out (--samples)"
        raise UsageError(f"--prompts: expected at least {needed} different prompts, {each}, found {n}")
    drawn = numpy.random.default_rng([settings.seed, n]).permutation(n).tolist()
    held_out, training = sorted(drawn[: settings.samples]), sorted(drawn[settings.samples :])

    def part(rows: Sequence[int]) -> Questions:
        return Questions(tuple(asked.texts[i] for i in rows), tuple(asked.ids[i] for i in rows), asked.left_out)

    return part(training), part(held_out)


def _counts(task: Task, found: Prompts) -> dict[str, int]:
    return {
        "prompts": len(task.training.texts), "held_out": len(task.held_out.texts), "too_long": task.held_out.left_out,
        "skipped_rows": found.skipped, "repeats": found.repeats,
    }  # fmt: skip


# --- the run ----------------------------------------------------------------------------------------------------------


def _optimise(task: Task, record: Mapping[str, Any], measuring: Measuring, say: Callable[[str], None]) -> None:
    settings, counts = task.settings, record["counts"]
    say(
        f"{counted(settings.steps, 'step')} of {settings.batch} answers to {settings.prompts_per_step} prompts, of "
        f"{counts['prompts']:,}; {counts['held_out']} held out; reward: {plain(task.rewards.definition.name)}"
    )
    left = [settings.steps]

    def begin() -> None:
        write_json(task.out / RECORD, record)

    def progress(row: Mapping[str, Any]) -> None:
        if left:  # the first row of this call: earlier ones are kept
            measuring.on_work(left.pop() - row["step"] + 1)
        measuring.progress(1)
        if row["step"] in (1, settings.steps) or row["step"] % settings.sample_every == 0:
            say(row_words(row))

    run(task, begin, progress, _on_cpu(measuring))


def row_words(row: Mapping[str, Any]) -> str:
    """A step in words.

    >>> row_words({"step": 5, "proxy": 1.0, "control": None, "kl_sequence": 2.5, "length": 30.0, "truncated": 0.25})
    'step 5: proxy 1.000, KL 2.50 nats per answer, 30.0 tokens, 25 % cut off'
    """
    control = "" if row["control"] is None else f", control {row['control']:.3f}"
    told = f"step {row['step']}: proxy {row['proxy']:.3f}{control}, KL {row['kl_sequence']:.2f} nats per answer"
    return f"{told}, {row['length']:.1f} tokens, {row['truncated']:.0%} cut off".replace("%", " %")


def _finished(task: Task, record: Mapping[str, Any], warnings: list[Finding]) -> Optimised:
    """What the run found, and its record, which says now that it is finished."""
    rows = _rows(task.out)
    warnings += _doubts(task, rows)
    done = {
        **record,
        "finished": True,
        # Of a run that was stopped, and went on with another --keep-every, not all that this one would have kept.
        "checkpoints": [{"step": step, "path": path.name} for step, path in _kept_policies(task.out)],
        "seconds": sum(row["seconds"] for row in rows),
        "notes": _notes(task, record["counts"], rows),
        "warnings": [str(warning) for warning in dict.fromkeys(warnings)],
        "findings": [[warning.where, warning.what] for warning in dict.fromkeys(warnings)],
    }
    write_json(task.out / RECORD, done)
    shutil.rmtree(task.out / WORKING, ignore_errors=True)
    return _result(task.out, done)


def _result(out: Path, record: Mapping[str, Any]) -> Optimised:
    missing = [entry["path"] for entry in record["checkpoints"] if not (out / entry["path"]).is_dir()]
    if missing or len(rows := _rows(out)) != record["settings"]["steps"]:
        what = f"{plain(str(out))} says that it is finished, but {', '.join(missing) or ROWS} is not whole"
        raise UsageError(f"{what}; delete the folder to run again")
    kept = {entry["step"]: out / entry["path"] for entry in record["checkpoints"]}
    warnings = tuple(Finding(*finding) for finding in record["findings"])
    return Optimised(out, tuple(rows), kept, tuple(record["notes"]), warnings, record)


def _kept_policies(out: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.name.removeprefix("step-")), path) for path in out.glob("step-*"))


def _rows(out: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (out / ROWS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RefusedError(
            [Finding(str(out / ROWS), f"cannot be read ({error}); delete the folder to run again")]
        ) from None


def _doubts(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Reasons for doubt that only the run shows."""
    found = []
    still = next((i for i, row in enumerate(reversed(rows)) if row["no_signal"] < 1), len(rows))
    if still >= min(_STILL, len(rows)):
        what = f"in the last {still} of {len(rows)} steps the answers that are compared all got the same reward"
        found.append(Finding(task.rewards.definition.name, f"{what}: there was nothing to learn"))
    last = rows[-1]
    if last["truncated"] > _MANY:
        what = f"{last['truncated']:.0%} of the last step's answers were cut at {task.settings.max_new_tokens} tokens"
        found.append(Finding(str(task.out), f"{what}; see --eos-penalty, --max-new-tokens".replace("%", " %")))
    if last["cut"] > _MANY:
        what = f"{last['cut']:.0%} of the last step's texts were longer than the reward model reads, and cut for it"
        found.append(Finding(str(task.out), what.replace("%", " %")))
    return found


def _notes(task: Task, counts: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the rows should know."""
    settings, scales = task.settings, task.rewards.scales
    assert scales is not None, "the start was measured"
    notes = []
    if settings.scale == "raw":
        notes.append(
            f"rewards of the start's answers: mean {scales.mean:.3g}, standard deviation {scales.std:.3g}; "
            f"--kl-coef {settings.kl_coef:g} weighs as {settings.kl_coef / scales.std:.2g} would on rewards of standard"
            " deviation 1: proxies of other scales are compared with --scale std, or at equal KL"
        )
    if task.rewards.judge is None:
        notes.append("no --control: only what the proxy thinks of its own policy is known, not what this is worth")
    stored = {tensor.dtype for tensor in task.policy.source.tensors.values()} - {"F32"}
    if stored:
        notes.append(
            f"the policy learns in float32, and is kept as its start is stored ({', '.join(sorted(stored))}): small "
            "steps may be lost in that rounding, and what is kept is a little off what the rows are about"
        )
    if counts["too_long"]:
        notes.append(f"{counted(counts['too_long'], 'prompt')} left out: too long for the policy")
    if counts["skipped_rows"]:
        notes.append(f"{counted(counts['skipped_rows'], 'bad row')} left out")
    tokens = sum(row["length"] for row in rows) * settings.batch
    seconds = max(sum(row["seconds"] for row in rows), 1e-9)
    notes.append(f"{tokens:,.0f} tokens sampled and learned from in {seconds:,.0f} s: {tokens / seconds:,.0f} a second")
    return notes
