"""A run: the start measured, the policy optimised, a row for each step, samples and policies kept on the way.

OUT/start.jsonl         answers of the start policy, with each member's reward: scales and r_ref are made of them
OUT/rows.jsonl          a row each step, as it is made
OUT/samples/step-N.jsonl  answers to the same held-out prompts after N steps: to be read
OUT/step-N/             the policy after N steps
OUT/working/            TRL's checkpoints, while it trains: the same command goes on from the last one
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from warmerge.errors import Finding, Interrupted, RefusedError, WarmergeError, naming, plain
from warmerge.pipeline.found.rl_runs import ROWS
from warmerge.pipeline.reinforce.record import WORKING
from warmerge.pipeline.reinforce.reward import combined
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.reinforce.start import Task, measure_start, read_answers, refuse_other_log_probabilities
from warmerge.pipeline.reinforce.trainer import answers_to, make_trainer
from warmerge.report.results import write_text
from warmerge.rewards.tokenizer import quiet
from warmerge.training.language_model import merged_state, write_language_model
from warmerge.training.trl_checkpoints import (
    checkpoints_in,
    finish_checkpoint,
    last_checkpoint,
    remove_partial,
    step_of,
)

SAMPLES = "samples"
# Nats per token between the policy and its start before the first update: they are one model.
_SAME = 1e-3


def run(
    task: Task, begin: Callable[[], None], progress: Callable[[Mapping[str, Any]], None], use_cpu: bool = False
) -> None:
    """Optimises the policy; one that was interrupted goes on from its last checkpoint, to the same weights.

    Under `accelerate launch` every rank calls this: each batch is split between them.

    Args:
        begin: called once on the first rank when all is ready to begin, before anything is written into the folder.
        progress: is given each step's row.
        use_cpu: even where there is a GPU.

    Raises:
        Interrupted: Ctrl-C.
        WarmergeError: out of memory; a gradient or a reward that is not finite; files that cannot be read or written.
        RefusedError: rewards that teach nothing; a run that lost some of its files; as `make_trainer`.
    """
    working = task.out / WORKING
    try:
        with checkpoints_in(working), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL reads a property of transformers that has a new name
            _run(task, working, begin, progress, use_cpu)
    except KeyboardInterrupt:
        at = last_checkpoint(working)
        found = "nothing is kept" if at is None else f"step {step_of(at)} is kept in {plain(str(working))}"
        raise Interrupted(f"stopped; {found}; the same command goes on") from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise WarmergeError(_out_of_memory(task.settings)) from error
        raise


def _run(
    task: Task, working: Path, begin: Callable[[], None], progress: Callable[[Mapping[str, Any]], None], use_cpu: bool
) -> None:
    trainer = make_trainer(task.policy, task.training, task.rewards, working, use_cpu)
    wait = trainer.accelerator.wait_for_everyone
    wait()  # until every rank has looked at what lies in the folder
    if trainer.is_world_process_zero():
        begin()
        remove_partial(working)
    wait()
    last = last_checkpoint(working)
    done = 0 if last is None else step_of(last)
    if trainer.is_world_process_zero():
        _cut_rows(task.out / ROWS, done)
    if done == 0:
        refuse_other_log_probabilities(trainer, task.policy, task.training)
    trainer.add_callback(_callback(task, trainer, wait, progress))
    if done < task.settings.steps:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    else:  # stopped after its last step
        measure_start(task, trainer, begun=True)
    wait()


# --- while it trains --------------------------------------------------------------------------------------------------


def _callback(task: Task, trainer: Any, wait: Callable[[], None], progress: Callable[[Mapping[str, Any]], None]) -> Any:
    """Measures the start, writes rows and samples, keeps policies and checkpoints."""
    from transformers import TrainerCallback

    settings, rows, kept = task.settings, task.out / ROWS, task.kept

    class Keeping(TrainerCallback):  # type: ignore[misc]
        begun = seconds = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            measure_start(task, trainer, begun=state.global_step > 0)
            if state.global_step == 0:
                write_samples(task, trainer, 0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.begun
            control.should_save |= state.global_step in kept

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            # Before anything is saved of this step.
            if "loss" not in (logs or {}):
                return
            row = row_of({**logs, "step": state.global_step}, settings, self.seconds)
            _refuse_broken(row, settings)
            if state.is_world_process_zero:
                with naming(rows), rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                progress(row)
            if state.global_step % settings.sample_every == 0 or state.global_step == settings.steps:
                write_samples(task, trainer, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in kept:
                _write_policy(task, trainer, kept[state.global_step])
            wait()  # each rank writes a part of TRL's checkpoint
            if state.is_world_process_zero:
                finish_checkpoint(task.out / WORKING, state.global_step)

    return Keeping()


def row_of(logs: Mapping[str, Any], settings: RlSettings, seconds: float) -> dict[str, Any]:
    """A step as TRL logs it, in warmerge's words; all of it is of answers that were sampled before the update.

    TRL's kl is per token: the sum over all tokens divided by their number. Times the mean length it is per answer. Its
    entropy is the mean over micro-batches of such a quotient.
    """
    length = logs["completions/mean_length"]
    return {
        "step": logs["step"],
        "proxy": logs["rewards/proxy/mean"], "proxy_std": logs["rewards/proxy/std"],
        "reward": logs["reward"], "reward_std": logs["reward_std"],
        "control": logs.get("rewards/control/mean"), "control_std": logs.get("rewards/control/std"),
        "disagreement": logs.get("disagreement"),
        "kl_token": logs["kl"], "kl_sequence": logs["kl"] * length,
        "length": length, "entropy": logs["entropy"], "truncated": logs["truncated"],
        "cut": logs["cut"], "no_signal": logs["no_signal"],
        "lr": logs["learning_rate"], "gradient_norm": logs["grad_norm"],
        "tokens_per_second": length * settings.batch / max(seconds, 1e-9), "seconds": seconds,
    }  # fmt: skip


def _refuse_broken(row: Mapping[str, Any], settings: RlSettings) -> None:
    """Stops a run that has lost its way, or that was never on it."""
    found = {key: row[key] for key in ("gradient_norm", "kl_sequence", "entropy")}
    if not all(math.isfinite(value) for value in found.values()):
        said = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in found.items())
        what = f"step {row['step']} is not finite ({said}); try a lower --lr or a larger --kl-coef"
        raise WarmergeError(f"{what}. Earlier steps are kept")
    if row["step"] == 1 and abs(row["kl_token"]) > _SAME:
        what = f"before the first update the policy differs from its start by {row['kl_token']:.3g} nats per token"
        raise WarmergeError(f"{what}: TRL loaded another model as reference; KL would be measured to the wrong start")


def write_samples(task: Task, trainer: Any, step: int) -> None:
    """Answers to the held-out prompts, with their rewards: so that one can read what the numbers mean."""
    if not task.held_out.texts:
        return
    seed = int(numpy.random.SeedSequence([task.settings.seed, 1 + step]).generate_state(1)[0])
    drawn = answers_to(trainer, task.held_out.ids, task.policy.ends, seed)
    if not trainer.is_world_process_zero():
        return
    answers = read_answers(task.policy, task.held_out, range(len(drawn)), drawn)
    texts = [(prompt, answer.text) for prompt, answer in zip(task.held_out.texts, answers, strict=True)]
    members, _ = task.rewards.of_members(texts)
    assert task.rewards.scales is not None, "the start was measured"
    proxy = combined(task.rewards.definition, members, task.rewards.scales).tolist()
    judge = task.rewards.judge
    control = [None] * len(texts) if judge is None else judge.rewards(texts).rewards.tolist()
    lines = [
        {
            "prompt": prompt,
            "answer": text,
            "proxy": r,
            "control": c,
            "tokens": answer.tokens,
            "finished": answer.finished,
        }
        for (prompt, text), answer, r, c in zip(texts, answers, proxy, control, strict=True)
    ]
    (task.out / SAMPLES).mkdir(exist_ok=True)
    write_text(
        task.out / SAMPLES / f"step-{step}.jsonl",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )


def _write_policy(task: Task, trainer: Any, folder: Path) -> None:
    module = trainer.accelerator.unwrap_model(trainer.model)
    if task.settings.lora:
        state, module = merged_state(module), module.get_base_model()
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        write_language_model(task.policy.source, task.policy.tokenizer, module, state, folder)


def _cut_rows(path: Path, done: int) -> None:
    """Leaves the rows of the steps that are kept; later ones are made again.

    Raises:
        RefusedError: they are not there.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if path.exists() else []
    try:
        # As whole as `rl-report` will want them: also a row that lost a part is lost.
        steps = [json.loads(line)["step"] for line in lines if len(json.loads(line)) > 1]
    except (ValueError, KeyError, TypeError):
        steps = []
    if steps != list(range(1, done + 1)):
        what = f"does not hold a row for each of the {done} steps that are kept; delete the run's folder to begin again"
        raise RefusedError([Finding(str(path), what)])
    write_text(path, "".join(lines))


def _out_of_memory(settings: RlSettings) -> str:
    """Which knobs take less memory, and how they stand: first those with which the same run goes on."""
    gentle = [f"a lower --micro-batch (now {settings.micro_batch})"] if settings.micro_batch > 1 else []
    gentle += [] if settings.gradient_checkpointing else ["--gradient-checkpointing"]
    more = [f"a lower --max-new-tokens (now {settings.max_new_tokens}) or --batch (now {settings.batch})"]
    more += [] if settings.lora else ["--lora RANK"]
    more += [] if settings.precision == "bfloat16" else ["--precision bfloat16"]
    again = f"try {' or '.join(gentle)}, with which this run goes on where it was; or a new one with " if gentle else ""
    return f"out of memory: {again or 'try a new run with '}{', '.join(more)}"
