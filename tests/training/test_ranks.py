"""One member on two ranks, copied to each or divided between them: the same member, whatever starts or ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import here
from test_member import another, equal, parts, rows, start_run, train, weights
from test_member_ranks import on_two_ranks

from warmerge import average
from warmerge.errors import Interrupted, UsageError, WarmergeError
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.scoring import Tokens, score
from warmerge.training import saving
from warmerge.training.head import head_digest
from warmerge.training.member import Recipe, read_member
from warmerge.training.ranks import check_launcher, on_all_ranks, refuse_copies, shard
from warmerge.training.training_set import batch_of, micro_batches

SLOW = pytest.mark.slow
CPU = torch.device("cpu")
RECIPE = Recipe(steps=4, batch=8, warmup=1, save_every=2, batch_tokens=300)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TEXTS = [("The quick brown fox", "jumps."), ("What is the capital of France?", "The capital of France is Paris.")]
# No difference of rewards depends on these: what Adam makes of their gradients' rounding errors is arbitrary.
FREE = ("classifier.bias", "attention.self.key.bias")
# The first rank that comes to its step 3 is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from warmerge.training.unit import run_member

steps = iter(range(1, 100))
for folder in sys.argv[2:]:
    run_member(Path(folder), lambda: os.environ["RANK"] == sys.argv[1] and next(steps) == 4 and os.kill(os.getpid(), 9))
"""


def apart(one: Path, other: Path) -> float:
    """The largest relative difference of a tensor of two members."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(
        float((first[name] - second[name]).norm() / first[name].norm().clamp_min(1e-9))
        for name in first if not name.endswith(FREE)
    )  # fmt: skip


def rows_apart(one: Path, other: Path, key: str) -> float:
    return max(abs(a[key] / b[key] - 1) for a, b in zip(rows(one), rows(other), strict=True))


# --- what was asked of a launcher -----------------------------------------------------------------------------------

NOT_WITH = "members are not trained with it; to divide each between processes: torchrun --nproc_per_node N -m warmerge "


@pytest.mark.parametrize(
    ("environment", "divided", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, False, f"accelerate launch --use_fsdp: {NOT_WITH}train ... --shard"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True, f"accelerate launch --use_deepspeed: {NOT_WITH}train ... --shard"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, False,
            "accelerate launch was asked for several processes, but on CPUs it starts only one; start them with "
            "torchrun --nproc_per_node N -m warmerge train ...",
        ),
        (
            {"WORLD_SIZE": "1"}, True,
            "--shard divides each member between several processes, found one; start them with torchrun "
            "--nproc_per_node N -m warmerge train ...",
        ),
    ],
)  # fmt: skip
def test_launchers_that_would_do_something_else(
    environment: dict[str, str], divided: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refused:
        check_launcher(divided)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "False"},
        {"MASTER_ADDR": "head-node"},  # a cluster's
        {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"},
    ],
)
def test_launchers_that_do_as_they_are_told(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launcher(shard=False)


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_copies_of_a_command_by_mpirun_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        UsageError, match=rf"^2 processes were started by mpirun or srun \({name}\), which members are not"
    ):
        refuse_copies()
    monkeypatch.setenv("WORLD_SIZE", "4")  # a torchrun on each of two machines
    refuse_copies()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(name, "1")
    refuse_copies()


# --- what all ranks do, or none ---------------------------------------------------------------------------------------


def refused() -> str:
    raise UsageError("cannot be read")


def test_what_one_rank_cannot_do_no_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first of two; what the other one says is made up."""
    import accelerate

    def beside(other: tuple[str, str]) -> None:
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [*mine, other])

    accelerate.PartialState(cpu=True)  # as one process: that it is one of two is heard from the variable alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    beside(("", "2"))
    assert on_all_ranks(lambda: "found", lambda _: 2) == "found"
    with pytest.raises(UsageError, match=r"^cannot be read$"):
        on_all_ranks(refused)
    with pytest.raises(
        WarmergeError, match=r"^rank 0 found 3, rank 1 found 2: all ranks must share the run's folder; put"
    ):
        on_all_ranks(lambda: "found", lambda _: 3)
    beside(("failed", "no such file"))
    with pytest.raises(WarmergeError, match=r"^rank 1: no such file$"):
        on_all_ranks(lambda: "found")
    beside(("stopped", "by the user"))
    for work in (refused, lambda: "found"):
        with pytest.raises(Interrupted, match=r"^rank 1: by the user$"):
            on_all_ranks(work)


def test_a_command_in_one_process_divides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("train", "--data", "pairs.jsonl", "--base", "start", "--shard", "-o", "runs")
    assert (done.code, done.out) == (2, "")
    assert "--shard divides each member between several processes, found one; start them with torchrun" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="--shard: Linear has no list of layers to divide; train without it"):
        shard(torch.nn.Linear(2, 2), CPU, 2)
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    layers[1].weight = layers[0].weight
    with pytest.raises(
        UsageError, match=r"--shard: weights that several layers share are not divided \('0.0.weight'\)"
    ):
        shard(torch.nn.Sequential(layers), CPU, 2)


def test_what_a_launcher_says_of_accumulation_is_not_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes of a step are the recipe's; accelerate would divide the loss once more."""
    folder = start_run(tmp_path, recipe=replace(RECIPE, steps=2), dropout=0.0)
    launched = another(folder, "02")
    train(folder)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(launched)
    assert rows(launched) == rows(folder)
    assert equal(launched, folder)


def test_weights_that_no_reward_depends_on_do_not_stop_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BigBird's classifier has a pooler that it does not use: it gets no gradient, for which ranks would wait."""
    from accelerate.state import AcceleratorState
    from tiny_models import save, tokenizer
    from transformers import AutoModelForSequenceClassification, BigBirdConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = BigBirdConfig(vocab_size=400, attention_type="original_full", num_labels=1, **sizes)
    folder = start_run(tmp_path, "bert", replace(RECIPE, steps=3))
    save(tmp_path / "init", AutoModelForSequenceClassification.from_config(config), tokenizer("bert"))
    folder = another(folder, "02", head=head_digest(tmp_path / "init"))
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    for name, value in (launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    try:
        assert len(train(folder)) == 3
        assert torch.distributed.is_initialized()
    finally:
        AcceleratorState._reset_state(True)
        torch.distributed.destroy_process_group()


def test_a_checkpoint_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    """Tensors are written one after the other; the bytes are those of the library, which takes all at once."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saving.write_checkpoint(tmp_path, 1, module, optimizer, '{"of": "a member"}', keep=False)
    written = tmp_path / "checkpoint-1" / "state.safetensors"
    tensors = load_file(written)
    assert tensors.keys() >= {"parameter.0.weight", "optimizer.0.exp_avg_sq", "optimizer.3.step"}
    save_file(tensors, tmp_path / "whole", {"member": '{"of": "a member"}'})
    assert written.read_bytes() == (tmp_path / "whole").read_bytes()
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    again = torch.optim.AdamW(other.parameters())
    saving.load_checkpoint(tmp_path / "checkpoint-1", other, again, '{"of": "a member"}')
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    kept, read = (made.state_dict()["state"] for made in (optimizer, again))
    assert kept.keys() == read.keys()
    for number, state in kept.items():
        assert state.keys() == read[number].keys()
        assert all(torch.equal(value, read[number][key]) for key, value in state.items())


# --- on two ranks ---------------------------------------------------------------------------------------------------


def variants(first: Path, changes: dict[str, dict[str, Any]], begin: int, **all_of: Any) -> dict[str, Path]:
    """A member for each change of the recipe."""
    return {
        name: another(first, f"{begin + k:02d}", {**change, **all_of}, dropout=0.1 if name == "dropout" else 0.0)
        for k, (name, change) in enumerate(changes.items())
    }


@SLOW
@pytest.mark.timeout(900)
def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    """LoRA, clipped and unclipped gradients, one pass a step and several, as many on each rank though their texts
    differ; only dropout is of each rank's own, and the same whenever it is drawn."""
    first = start_run(tmp_path, recipe=RECIPE, dropout=0.0)
    changes: dict[str, dict[str, Any]] = {
        "passes": {}, "one pass": {"batch_tokens": 8192}, "lora": {"lora": 4}, "adapter": {"lora": 4, "adapter": True},
        "unclipped": {"max_gradient_norm": 0.0}, "recomputed": {"gradient_checkpointing": True}, "dropout": {},
    }  # fmt: skip
    alone, both = variants(first, changes, 10), variants(first, changes, 30)
    for folder in alone.values():
        train(folder)
    repeated = another(both["dropout"], "50")
    on_two_ranks(tmp_path, 0, *both.values(), repeated)
    for name in changes.keys() - {"dropout"}:
        assert apart(alone[name], both[name]) < 1e-5, name
        assert rows_apart(alone[name], both[name], "loss") < 1e-6, name
        assert rows_apart(alone[name], both[name], "gradient_norm") < 1e-5, name
    assert apart(alone["dropout"], both["dropout"]) > 1e-3
    assert equal(both["dropout"], repeated)
    assert rows(both["dropout"]) == rows(repeated)
    # What is compared is worth comparing: ranks alone would not have as many passes in each step.
    _, _, pairs = parts(first)
    shares = [batch_of(step, len(pairs), 8, 0)[rank::2] for step in range(4) for rank in range(2)]
    passes = [len(micro_batches(pairs.longest(share), RECIPE.batch_tokens)) for share in shares]
    assert any(passes[k] != passes[k + 1] for k in range(0, len(passes), 2))


@SLOW
@pytest.mark.timeout(900)
def test_a_divided_member_is_the_copied_one(tmp_path: Path) -> None:
    """All that a recipe can say, dropout too; what is saved is a reward model that averages with undivided members."""
    first = start_run(tmp_path, recipe=RECIPE, dropout=0.0)
    changes: dict[str, dict[str, Any]] = {
        "plain": {}, "lora": {"lora": 4}, "adapter": {"lora": 4, "adapter": True}, "dropout": {},
        "unclipped": {"max_gradient_norm": 0.0}, "recomputed": {"gradient_checkpointing": True},
        "frozen": {"freeze_embeddings": True}, "bfloat16": {"precision": "bfloat16"},
    }  # fmt: skip
    copied, divided = variants(first, changes, 10), variants(first, changes, 30, shard=True)
    on_two_ranks(tmp_path, 0, *copied.values(), *divided.values())
    for name in changes:
        coarse = name == "bfloat16"
        assert apart(copied[name], divided[name]) < (1e-2 if coarse else 1e-5), name
        assert rows_apart(copied[name], divided[name], "loss") < (1e-2 if coarse else 1e-6), name
        assert rows_apart(copied[name], divided[name], "gradient_norm") < (0.1 if coarse else 1e-5), name
        files = [
            sorted(p.name for p in folder.iterdir() if p.name != "member.json")
            for folder in (copied[name], divided[name])
        ]
        assert files[0] == files[1], name
        assert not saving.checkpoints(divided[name])
    train(another(first, "50", lr=2e-3))
    pair = [divided["plain"], first.parent / "50"]
    assert average(pair, tmp_path / "mean").warnings == ()
    one, two, mean = (load_file(folder / "model.safetensors") for folder in (*pair, tmp_path / "mean"))
    assert all(torch.equal(((one[n].double() + two[n].double()) / 2).float(), mean[n]) for n in mean)
    given = []
    for folder in (copied["plain"], divided["plain"]):
        model = load_reward_model(folder)
        given.append(score(model, Tokens(model.renderer, TEXTS)))
    assert numpy.abs(given[0] - given[1]).max() < 1e-4


@SLOW
@pytest.mark.timeout(900)
def test_divided_models_of_many_kinds(tmp_path: Path) -> None:
    """Layers in lists of other names, biases that no reward depends on, an encoder-decoder with shared embeddings."""
    pairs = []
    for kind in ("bert", "gpt2", "modernbert", "t5"):
        copied = start_run(tmp_path / kind, kind, replace(RECIPE, steps=3), dropout=0.0)
        pairs.append((copied, another(copied, "02", {"shard": True})))
    on_two_ranks(tmp_path, 0, *(folder for pair in pairs for folder in pair))
    for copied, divided in pairs:
        assert rows_apart(copied, divided, "loss") < 1e-6, copied
        assert rows_apart(copied, divided, "gradient_norm") < 1e-4, copied
        models = [load_reward_model(folder) for folder in (copied, divided)]
        one, two = (score(model, Tokens(model.renderer, TEXTS)) for model in models)
        assert abs((one[0] - one[1]) - (two[0] - two[1])) < 1e-4, copied


@SLOW
@pytest.mark.timeout(900)
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_all_and_the_run_goes_on_to_the_bit(tmp_path: Path, rank: str, divided: bool) -> None:
    recipe = replace(RECIPE, steps=6, shard=divided)
    whole = start_run(tmp_path, recipe=recipe, dropout=0.1)
    killed = another(whole, "02")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [*TORCHRUN, str(script), rank, str(killed)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"Signal {int(signal.SIGKILL)}" in done.stderr
    assert [folder.name for folder in saving.checkpoints(killed)] == ["checkpoint-2"]
    with safe_open(killed / "checkpoint-2" / "state.safetensors", framework="pt") as file:
        expected = {name: list(tensor.shape) for name, tensor in weights(whole.parent.parent / "init").items()}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
        assert {n.removeprefix("parameter."): s for n, s in shapes.items() if n.startswith("parameter.")} == expected
    on_two_ranks(tmp_path, 0, whole, killed)
    assert equal(whole, killed)
    assert rows(whole) == rows(killed)


@SLOW
@pytest.mark.timeout(900)
def test_what_the_first_rank_cannot_write_ends_a_divided_member_on_all(tmp_path: Path) -> None:
    """The others give their parts to the end, and go on to the next member."""
    folder = start_run(tmp_path, recipe=replace(RECIPE, shard=True), dropout=0.0)
    unsaved, following = another(folder, "02"), another(folder, "03")
    (folder / ".checkpoint.partial").write_text("a file where a folder is to be made")
    (unsaved / ".model.partial").write_text("a file where a folder is to be made")
    on_two_ranks(tmp_path, 0, folder, unsaved, following)
    for number in (0, 1):
        assert "a checkpoint at step 2 could not be written" in (folder / f"error-{number}.txt").read_text()
        assert "the trained model could not be written" in (unsaved / f"error-{number}.txt").read_text()
    assert saving.is_saved(following)
    assert not saving.is_saved(folder)
    assert [kept.name for kept in saving.checkpoints(unsaved)] == ["checkpoint-2"]


@SLOW
@pytest.mark.timeout(900)
def test_train_divides_as_users_type_it(tmp_path: Path) -> None:
    runs = tmp_path / "made"
    start_run(runs)
    asked = (
        "train", "--base", "made/init", "--data", "made/pairs.jsonl", "--runs", "1", "--dropout", "0", "--steps", "3",
        "--batch", "8", "--resamples", "100", "--threads", "1",
    )  # fmt: skip

    def run(*launcher: str, out: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, "-m", "warmerge", *asked, *more, "-o", out], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False,
        )  # fmt: skip

    for done in (run(sys.executable, out="alone"), run(*TORCHRUN, out="divided", more=("--shard",))):
        assert done.returncode == 0, done.stderr
    found = [tmp_path / out / "members" / "01" for out in ("alone", "divided")]
    assert apart(*found) < 1e-5
    assert [read_member(folder / "member.json").recipe.shard for folder in found] == [False, True]
    again = run(*TORCHRUN, out="divided")
    assert again.returncode == 1
    assert "settings.recipe.shard: true there, false now" in again.stderr
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2")
    done = run(*launcher, out="launched")
    assert done.returncode != 0
    assert "accelerate launch was asked for several processes, but on CPUs it starts only one" in done.stderr
    assert not (tmp_path / "launched").exists()
