"""`warmerge rl` on a tiny policy: what is used of TRL is what it was taken for, and nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
import torch
from conftest import bot, lines, user
from rl_worlds import close, optimise, same_weights, small, untimed, watch_batches, write_prompts
from safetensors.torch import load_file, save_file

from warmerge import Interrupted, RefusedError, UsageError, WarmergeError
from warmerge.pipeline.proxies import Proxy
from warmerge.pipeline.reinforce import reward
from warmerge.pipeline.reinforce import run as running
from warmerge.pipeline.reinforce import trainer as training
from warmerge.pipeline.reinforce.trainer import order_of
from warmerge.pipeline.rl import Optimised
from warmerge.rewards.bench import Measuring

TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Optimised]:
    """A run that others are compared with."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, optimise(folder)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TRL made of each step's answers: tokens, masks, advantages; and the policy's weights at that moment."""
    return watch_batches(monkeypatch)


def log_probabilities(state: Mapping[str, torch.Tensor], batch: Mapping[str, Any]) -> torch.Tensor:
    """By hand: the tempered log-probability of each answer's tokens, (N,); one text at a time, without padding."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(causal_models.folder(), dtype=torch.float32).eval()
    module.load_state_dict(state)
    found = []
    for prompt, mask, answer, own in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        asked, said = prompt[mask.bool()], answer[own.bool()]
        logits = module(input_ids=torch.cat([asked, said])[None]).logits[0, len(asked) - 1 : -1]
        steps = (logits / TEMPERATURE).log_softmax(-1)
        found.append(steps[torch.arange(len(said)), said].sum())
    return torch.stack(found)


def start_state() -> dict[str, torch.Tensor]:
    return load_file(causal_models.folder() / "model.safetensors")


# --- what is used of TRL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["loo", "batch"])
def test_advantages_are_reward_less_kl_less_the_mean_of_the_others(
    tmp_path: Path, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, baseline: str
) -> None:
    rewards: list[list[float]] = []
    functions = reward.Rewards._optimised

    def heard(self: Any, *given: Any, **named: Any) -> Any:
        out = functions(self, *given, **named)
        rewards.append(out)
        return out

    monkeypatch.setattr(reward.Rewards, "_optimised", heard)
    found = optimise(tmp_path, baseline=baseline, steps=3, eos_penalty=0.5)
    assert len(batches) == len(rewards) == 3
    for batch, r, row in zip(batches, rewards, found.rows, strict=True):
        with torch.no_grad():
            kl = log_probabilities(batch["state"], batch) - log_probabilities(start_state(), batch)
        total = torch.tensor(r) - 0.05 * kl
        groups = total.view(-1, 4 if baseline == "loo" else 8)
        others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
        torch.testing.assert_close(batch["advantages"], (groups - others).view(-1), rtol=1e-4, atol=1e-4)
        assert close(row["kl_sequence"], float(kl.mean()), 1e-4)
        assert close(row["kl_token"], float(kl.sum() / batch["completion_mask"].sum()), 1e-4)
        assert close(row["length"], float(batch["completion_mask"].sum() / 8))
        assert close(row["reward"], float(numpy.mean(r)))
    assert abs(found.rows[2]["kl_sequence"]) > 1e-3  # else the penalty was not tried


def test_a_step_is_the_policy_gradient(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    """One update by hand, from the same answers: AdamW on -mean(A log pi), gradient clipped to norm 1."""
    from transformers import AutoModelForCausalLM

    found = optimise(tmp_path, steps=1, keep_every=1)
    (batch,) = batches
    module = AutoModelForCausalLM.from_pretrained(causal_models.folder(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    loss = torch.zeros(())
    for i in range(8):
        asked = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        said = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        logits = module(input_ids=torch.cat([asked, said])[None]).logits[0, len(asked) - 1 : -1]
        steps = (logits / TEMPERATURE).log_softmax(-1)
        loss = loss - batch["advantages"][i] * steps[torch.arange(len(said)), said].sum() / 8
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    assert close(found.rows[0]["gradient_norm"], float(norm), 1e-3)
    optimizer.step()
    for name, value in load_file(found.checkpoints[1] / "model.safetensors").items():
        # AdamW's first step is the sign of the gradient: where that is zero but for rounding, it is any sign.
        moved = (value - module.state_dict()[name]).abs() > 1e-4
        assert moved.float().mean() < 0.01, name


def test_the_control_reward_moves_nothing(tmp_path: Path, finished: tuple[Path, Optimised]) -> None:
    _, watched = finished
    alone = optimise(tmp_path, "alone", control=None)
    often = optimise(tmp_path, "often", control_every=1, sample_every=1, keep_every=1, save_every=3)
    for other in (alone, often):
        assert same_weights(watched.checkpoints[4], other.checkpoints[4])
    assert not same_weights(watched.checkpoints[2], watched.checkpoints[4])
    assert [row["control"] is None for row in watched.rows] == [False, False, True, False]
    assert {row["control"] for row in alone.rows} == {None}
    assert "no --control" in " ".join(alone.notes)


def test_metric_names_are_distinct() -> None:
    rewards = reward.Rewards(read=None, settings=small(), definition=None, members=[], judge=object())  # type: ignore[arg-type]
    functions, weights = rewards.functions()
    assert [function.__name__ for function in functions] == ["optimised", "proxy", "control"]
    assert weights == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("baseline", ["loo", "batch"])
def test_which_prompts_a_step_has(tmp_path: Path, batches: list[dict[str, Any]], baseline: str) -> None:
    optimise(tmp_path, baseline=baseline, steps=5)
    settings = small(baseline=baseline, steps=5)
    order = order_of(21, settings)
    for step, batch in enumerate(batches):
        share = order[step * settings.prompts_per_step : (step + 1) * settings.prompts_per_step]
        repeats = 4 if baseline == "loo" else 1
        assert batch["numbers"] == [number for number in share for _ in range(repeats)]
        assert len(set(share)) == len(share) == (2 if baseline == "loo" else 8)


def test_a_coefficient_of_zero_still_measures_the_divergence(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    found = optimise(tmp_path, kl_coef=0.0)
    assert abs(found.rows[-1]["kl_sequence"]) > 1e-3
    other = optimise(tmp_path, "other", kl_coef=1.0)
    assert not same_weights(found.checkpoints[4], other.checkpoints[4])


def test_a_reference_of_other_weights_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = running.make_trainer

    def spoiled(*given: Any) -> Any:
        trainer = make(*given)
        with torch.no_grad():
            trainer.ref_model.get_input_embeddings().weight += 0.5
        return trainer

    monkeypatch.setattr(running, "make_trainer", spoiled)
    with pytest.raises(WarmergeError, match=r"before the first update the policy differs from its start by .* nats"):
        optimise(tmp_path)


def test_a_trl_without_the_methods_that_are_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_METHODS", ("_tokenize_prompts", "_renamed_since"))
    with pytest.raises(UsageError, match=r"rl: TRL \S+ has no _renamed_since; pip install"):
        optimise(tmp_path)


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("shaping", ["none", "sigmoid"])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, stop: int, shaping: str) -> None:
    told: list[str] = []
    whole = optimise(tmp_path, "whole", shaping=shaping, steps=5)

    def interrupt(count: int) -> None:
        if len(told) == stop - 1:
            raise KeyboardInterrupt
        told.append("row")

    with pytest.raises(Interrupted, match=r"stopped; (nothing|step 2) is kept.*; the same command goes on"):
        optimise(tmp_path, shaping=shaping, steps=5, measuring=Measuring(progress=interrupt))
    resumed = optimise(tmp_path, shaping=shaping, steps=5)
    assert untimed(resumed.rows) == untimed(whole.rows)
    for step in (2, 4, 5):
        assert same_weights(resumed.checkpoints[step], whole.checkpoints[step])
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-0.jsonl", "step-2.jsonl", "step-4.jsonl", "step-5.jsonl"]
    for name in names:
        assert (tmp_path / "run/samples" / name).read_bytes() == (tmp_path / "whole/samples" / name).read_bytes()
    assert not (tmp_path / "run" / "working").exists()


def test_a_finished_run_is_returned_and_another_refused(finished: tuple[Path, Optimised]) -> None:
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    again = optimise(folder)
    assert again.rows == first.rows
    assert again.notes == first.notes
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
    with pytest.raises(UsageError) as raised:
        optimise(folder, lr=1e-4, control="letters")
    told = str(raised.value).splitlines()
    assert told[0] == f"{folder / 'run'} holds another run; choose another folder for -o, or delete it. Differing:"
    assert told[1].startswith('  control: ["length", ')
    assert told[2] == "  lr: 0.001 there, 0.0001 now"
    optimise(folder, save_every=1, keep_every=2, sample_every=9)  # what changes no weights is no other question


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"run is not empty and holds no readable rl\.json; choose another folder"):
        optimise(tmp_path)
    with pytest.raises(UsageError, match=r"-o .*prompts\.jsonl is a file; name a folder"):
        optimise(tmp_path, "prompts.jsonl", prompts=write_prompts(tmp_path / "prompts.jsonl"))


def test_rows_that_were_lost_are_noticed(tmp_path: Path) -> None:
    found = optimise(tmp_path)
    (tmp_path / "run" / "rows.jsonl").write_text(json.dumps(found.rows[0]) + "\n")
    with pytest.raises(UsageError, match=r"says that it is finished, but rows\.jsonl is not whole; delete the folder"):
        optimise(tmp_path)


def test_killed_between_the_last_step_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from warmerge.pipeline import rl

    with monkeypatch.context() as broken:
        broken.setattr(rl, "_finished", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optimise(tmp_path)
    assert (tmp_path / "run" / "working").exists()
    found = optimise(tmp_path)
    assert [row["step"] for row in found.rows] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "working").exists()


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_what_lies_in_the_folder(finished: tuple[Path, Optimised]) -> None:
    folder, found = finished
    run = folder / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "rl.json", "rows.jsonl", "samples", "start.jsonl", "step-2", "step-4",
    ]  # fmt: skip
    record = json.loads((run / "rl.json").read_text())
    assert record["finished"] is True
    assert record["checkpoints"] == [{"step": 2, "path": "step-2"}, {"step": 4, "path": "step-4"}]
    assert record["settings"]["kl_coef"] == 0.05
    assert record["proxy"]["name"] == "letters"
    assert [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()] == list(found.rows)
    start = [json.loads(line) for line in (run / "start.jsonl").read_text().splitlines()]
    assert len(start) == 16
    mean = numpy.mean([row["answer"].count("e") + len(row["answer"]) / 100 for row in start])
    assert f"rewards of the start's answers: mean {mean:.3g}" in found.notes[0]


def test_samples_are_of_prompts_that_are_not_trained_on(
    finished: tuple[Path, Optimised], tmp_path: Path, batches: list[dict[str, Any]]
) -> None:
    folder, _ = finished
    samples = {}
    for step in (0, 2, 4):
        rows = [json.loads(line) for line in (folder / f"run/samples/step-{step}.jsonl").read_text().splitlines()]
        assert [row["control"] for row in rows] == [len(row["answer"]) for row in rows]
        assert [row["proxy"] for row in rows] == [row["answer"].count("e") + len(row["answer"]) / 100 for row in rows]
        samples[step] = [row["prompt"] for row in rows]
    assert samples[0] == samples[2] == samples[4]
    assert len(samples[0]) == 3
    start = [json.loads(line)["prompt"] for line in (folder / "run" / "start.jsonl").read_text().splitlines()]
    assert not set(samples[0]) & set(start)


def test_a_kept_policy_is_a_policy(finished: tuple[Path, Optimised]) -> None:
    """It has its start's own small files, and can be sampled, optimised further, and scored."""
    folder, found = finished
    source = causal_models.folder()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (found.checkpoints[4] / name).read_bytes() == (source / name).read_bytes()
    further = optimise(folder, "further", policy=found.checkpoints[4], steps=1)
    assert close(further.rows[0]["kl_token"], 0.0)


def test_lora_trains_adapters_and_keeps_whole_models(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    found = optimise(tmp_path, lora=4, lr=1e-2, steps=3, keep_every=1)
    assert found.rows[0]["kl_token"] == 0.0
    assert abs(found.rows[2]["kl_sequence"]) > 1e-3
    start, first = start_state(), load_file(found.checkpoints[1] / "model.safetensors")
    assert first.keys() == start.keys()
    changed = {name for name in start if not start[name].equal(first[name])}
    assert changed == {name for name in start if "_proj" in name}
    # What is kept is what sampled the next step's answers.
    kept = load_file(found.checkpoints[2] / "model.safetensors")
    adapted = batches[2]["state"]
    for name in changed:
        stem = "base_model.model." + name.removesuffix(".weight")
        delta = adapted[f"{stem}.lora_B.default.weight"] @ adapted[f"{stem}.lora_A.default.weight"] * 2
        torch.testing.assert_close(kept[name], start[name] + delta, rtol=1e-5, atol=1e-6)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        optimise(tmp_path, "again", lora=4, lr=1e-2, steps=3, keep_every=1, measuring=Measuring(progress=interrupt))
    resumed = optimise(tmp_path, "again", lora=4, lr=1e-2, steps=3, keep_every=1)
    assert same_weights(resumed.checkpoints[3], found.checkpoints[3])


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "gpt_neox"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    found = optimise(tmp_path, policy=causal_models.folder(kind), steps=2)
    assert close(found.rows[0]["kl_token"], 0.0, 1e-4)
    assert found.rows[1]["kl_token"] != 0.0


def test_the_start_has_no_dropout_while_it_learns(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy", attention_dropout=0.5)
    assert close(optimise(tmp_path, policy=policy, steps=1).rows[0]["kl_token"], 0.0)


def test_standardised_rewards_and_references(tmp_path: Path) -> None:
    """The same reward times 1000: nothing changes where rewards are brought to one scale."""
    functions = tmp_path / "functions.py"
    optimise(tmp_path, "a", scale="std", clip=2.0, shaping="sigmoid")
    functions.write_text(functions.read_text().replace('text.count("e") + len(text) / 100', 'text.count("e") * 1024'))
    functions.write_text(functions.read_text() + "\ndef small(prompts, completions, **kwargs):\n    "
                         'return [text.count("e") for text in completions]\n')  # fmt: skip
    large = optimise(tmp_path, "b", scale="std", clip=2.0, shaping="sigmoid")
    less = optimise(
        tmp_path, "c", proxy=Proxy("small", "rm", (f"{functions}:small",)), scale="std", clip=2.0, shaping="sigmoid"
    )
    assert same_weights(large.checkpoints[4], less.checkpoints[4])
    assert all(0 < row["reward"] < 1 for row in large.rows)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_conversation_without_a_template_is_refused(tmp_path: Path) -> None:
    talk = [user("Hi."), bot("Hi!"), user("Why?")]
    (tmp_path / "talks.jsonl").write_bytes(
        lines([{"prompt": talk}] * 1 + [{"prompt": f"What is {i}?"} for i in range(9)])
    )
    with pytest.raises(RefusedError, match=r"holds a conversation .* the policy's tokenizer has no chat template"):
        optimise(tmp_path, prompts=str(tmp_path / "talks.jsonl"))


def test_messages_are_rendered_by_the_policys_template(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    policy = causal_models.folder(template=causal_models.TEMPLATE)
    (tmp_path / "talks.jsonl").write_bytes(lines([{"prompt": [user(f"What is {i}?")]} for i in range(9)]))
    optimise(tmp_path, policy=policy, prompts=str(tmp_path / "talks.jsonl"), steps=1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    batch = batches[0]
    text = tokenizer.decode(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()])
    assert text.startswith("<s><|user|>What is ")
    assert text.endswith("?<|assistant|>")


def test_prompts_longer_than_the_context(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(lines([{"prompt": "why " * 400}, *({"prompt": f"What is {i}?"} for i in range(9))]))
    with pytest.raises(RefusedError, match=r"long\.jsonl:1: has \d+ tokens, more than 246"):
        optimise(tmp_path, prompts=str(path))
    found = optimise(tmp_path, prompts=str(path), measuring=Measuring(skip_bad_rows=True), steps=1)
    assert "1 prompt left out: too long for the policy" in found.notes


def test_too_few_prompts(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "few.jsonl", 10)
    what = r"expected at least 11 different prompts, 8 for each step and 3 held out \(--samples\), found 10"
    with pytest.raises(UsageError, match=f"--prompts: {what}"):
        optimise(tmp_path, prompts=prompts, baseline="batch")


def test_a_reward_of_nan_stops_the_run_and_keeps_it(tmp_path: Path) -> None:
    functions = tmp_path / "late.py"
    functions.write_text(
        "calls = []\n"
        "def late(prompts, completions, **kwargs):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 6 else text.count('e') for text in completions]\n"
    )
    with pytest.raises(WarmergeError, match=r"step 4: .*late\.py:late: gives the reward nan to text 1\. Earlier steps"):
        optimise(tmp_path, proxy=Proxy("late", "rm", (f"{functions}:late",)), control=None)
    assert len((tmp_path / "run" / "rows.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "step-2" / "model.safetensors").exists()


def test_a_model_with_nan_in_its_head_is_refused(tmp_path: Path, world: Any) -> None:
    shutil.copytree(world.a, tmp_path / "broken")
    weights = load_file(world.a / "model.safetensors")
    weights["score.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    with pytest.raises((RefusedError, WarmergeError), match="broken: gives the reward nan to text"):
        optimise(tmp_path, proxy=Proxy("broken", "rm", (str(tmp_path / "broken"),)))


def test_a_constant_reward_teaches_nothing(tmp_path: Path) -> None:
    functions = tmp_path / "functions.py"
    functions.write_text("def flat(prompts, completions, **kwargs):\n    return [3.0] * len(completions)\n")
    proxy = Proxy("flat", "rm", (f"{functions}:flat",))
    what = r"flat: gives each of 16 answers of the start policy the reward 3: there is nothing to learn from it"
    with pytest.raises(RefusedError, match=what):
        optimise(tmp_path, proxy=proxy, control=None)


def test_rewards_that_become_constant_are_said(tmp_path: Path) -> None:
    """After two steps, when the policy has left its start: the KL penalty differs, the rewards do not."""
    functions = tmp_path / "fading.py"
    functions.write_text(
        "calls = []\n"
        "def fading(prompts, completions, **kwargs):\n"
        "    calls.append(1)\n"
        "    return [0.0 if len(calls) > 4 else float(len(text)) for text in completions]\n"
    )
    proxy = Proxy("fading", "rm", (f"{functions}:fading",))
    found = optimise(tmp_path, proxy=proxy, control=None, steps=12, sample_every=100)
    assert [row["no_signal"] for row in found.rows] == [0.0] * 2 + [1.0] * 10
    assert found.rows[3]["reward_std"] == 0.0
    assert abs(found.rows[-1]["kl_sequence"]) > 1e-3
    told = (
        "in the last 10 of 12 steps the answers that are compared all got the same reward: there was nothing to learn"
    )
    assert f"fading: {told}" in map(str, found.warnings)


def test_vllm_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--generator vllm cannot be used here: .*vLLM is not"):
        optimise(tmp_path, generator="vllm")


def test_a_control_that_is_the_proxy_is_said(tmp_path: Path, world: Any) -> None:
    found = optimise(tmp_path, control="letters", steps=1)
    assert any("is the control, and what is optimised" in str(warning) for warning in found.warnings)
    proxy = Proxy("warm", "warm", (str(world.a), str(world.b)))
    averaged = optimise(tmp_path, "warm", proxy=proxy, control=str(world.b), steps=1)
    assert any("is the control, and shares weights with 'warm'" in str(warning) for warning in averaged.warnings)


def test_a_run_goes_on_with_less_memory(tmp_path: Path) -> None:
    """Another micro-batch, after a stop: the same answers, and weights but for rounding."""
    whole = optimise(tmp_path, "whole", micro_batch=8)
    told: list[int] = []

    def interrupt(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        optimise(tmp_path, micro_batch=8, measuring=Measuring(progress=interrupt))
    less = optimise(tmp_path, micro_batch=2, gradient_checkpointing=True)
    for row, other in zip(less.rows, whole.rows, strict=True):
        assert close(row["proxy"], other["proxy"])
        assert close(row["kl_sequence"], other["kl_sequence"], 1e-3)
        assert close(row["gradient_norm"], other["gradient_norm"], 1e-3)


def test_out_of_memory_names_what_to_turn_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = running.make_trainer

    def full(*given: Any) -> Any:
        trainer = make(*given)

        def fail(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.training_step = fail
        return trainer

    monkeypatch.setattr(running, "make_trainer", full)
    what = (
        r"out of memory: try a lower --micro-batch \(now 4\) or --gradient-checkpointing, with which this run goes on "
        r"where it was; or a new one with a lower --max-new-tokens \(now 10\) or --batch \(now 8\), --lora RANK"
    )
    with pytest.raises(WarmergeError, match=what):
        optimise(tmp_path)


def test_a_policy_without_an_end_is_refused(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy")
    causal_models.edit(policy, "config.json", eos_token_id=None)
    causal_models.edit(policy, "tokenizer_config.json", eos_token=None)
    causal_models.edit(policy, "generation_config.json", eos_token_id=None)
    with pytest.raises(RefusedError, match="names no end-of-sequence token in its files, so no answer would end"):
        optimise(tmp_path, policy=policy)


def test_an_ensemble_says_how_much_its_members_disagree(tmp_path: Path, world: Any) -> None:
    proxy = Proxy("min", "ensemble", (str(world.a), str(world.alien)), "min", standardize=True)
    found = optimise(tmp_path, proxy=proxy, control=None, steps=2)
    assert all(row["disagreement"] > 0 for row in found.rows)
    single = optimise(tmp_path, "single", steps=1)
    assert single.rows[0]["disagreement"] is None


def ranks(folder: Path, name: str, stop: int = 0) -> subprocess.CompletedProcess[str]:
    """`optimise` on two ranks under torchrun, killed at its row `stop`."""
    script = folder / "ranks.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from rl_worlds import optimise\n"
        "from warmerge.rewards.bench import Measuring\n"
        "torch.set_num_threads(1)\n"
        "rows = []\n"
        "def progress(count):\n"
        "    rows.append(count)\n"
        "    if len(rows) == int(sys.argv[3]):\n"
        "        os._exit(9)\n"
        f"optimise(Path({str(folder)!r}), sys.argv[1], policy=sys.argv[2], measuring=Measuring(progress=progress))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [name, str(causal_models.folder()), str(stop)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_two_ranks_share_each_batch(tmp_path: Path) -> None:
    """One batch between them, one policy, one set of files."""
    optimise(tmp_path, "one", steps=1)  # writes functions and prompts
    done = ranks(tmp_path, "both")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "both" / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Shares of 8 answers.
    assert all((row["truncated"] * 8) % 1 == 0 for row in rows)
    assert rows[0]["kl_token"] == 0.0
    assert json.loads((tmp_path / "both" / "rl.json").read_text())["finished"] is True


@pytest.mark.slow
def test_two_ranks_go_on_where_they_were_killed(tmp_path: Path) -> None:
    optimise(tmp_path, "one", steps=1)
    assert ranks(tmp_path, "whole").returncode == 0
    assert ranks(tmp_path, "stopped", 3).returncode != 0
    again = ranks(tmp_path, "stopped")
    assert again.returncode == 0, again.stderr[-2000:]
    assert same_weights(tmp_path / "whole" / "step-4", tmp_path / "stopped" / "step-4")
