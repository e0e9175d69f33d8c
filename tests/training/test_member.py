"""One member: what it learns, that it is the same whatever interrupts it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import pairs as world_pairs
from reward_world import write_rows
from safetensors.torch import load_file
from tiny_models import edit_config, make_model, save, tokenizer

from warmerge import average, evaluate
from warmerge.errors import Interrupted, RefusedError, UsageError, WarmergeError
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.pairs import read_preferences, unique_texts
from warmerge.rewards.scoring import Tokens, score
from warmerge.training import saving
from warmerge.training.head import head_digest
from warmerge.training.member import Member, Recipe, bradley_terry, learning_rate, read_member, train_member
from warmerge.training.trainable import rewards, trainable
from warmerge.training.training_set import TrainingSet, read_pairs, save_pairs, tokenise_pairs
from warmerge.training.unit import RESULT, run_member

RECIPE = Recipe(steps=6, batch=8, warmup=1, save_every=2)
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


def start_run(
    runs: Path, kind: str = "llama", recipe: Recipe = RECIPE, dtype: Any = torch.float32, **changes: Any
) -> Path:
    """RUNS with a start, pairs, train.json and a member 01: its folder."""
    module = make_model(kind)
    with torch.no_grad():  # weights of the size that a model is trained with, so that it can learn
        for parameter in module.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    save(runs / "init", module.to(dtype), tokenizer(kind))
    preferences = read_preferences(write_rows(runs / "pairs.jsonl", world_pairs(60, 1)))
    texts = unique_texts(preferences)
    renderer = load_reward_model(runs / "init").renderer
    save_pairs(
        tokenise_pairs(preferences, texts, Tokens(renderer, texts.texts)), runs / "pairs.safetensors", "the pairs"
    )
    val = [
        f"{name}={write_rows(runs / f'{name}.jsonl', world_pairs(30, seed))}" for name, seed in (("val", 2), ("ood", 3))
    ]
    loading = {"device": "cpu", "dtype": "auto", "template": "auto", "max_length": None, "trust_remote_code": False}
    measuring = {"limit": None, "resamples": 200, "seed": 0, "skip_bad_rows": False, "batch_tokens": None}
    (runs / "train.json").write_text(json.dumps({"val": val, "loading": loading, "measuring": measuring}))
    member = Member("01", "init", head_digest(runs / "init"), "the pairs", 1e-3, 0.1, 0, recipe)
    return add_member(runs, replace(member, **changes))


def add_member(runs: Path, member: Member) -> Path:
    folder = runs / "members" / member.name
    folder.mkdir(parents=True)
    (folder / "member.json").write_text(json.dumps(asdict(member)))
    return folder


def another(folder: Path, name: str, recipe: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A second member of the same run, a fresh one, with changes."""
    member = read_member(folder / "member.json")
    return add_member(
        folder.parent.parent, replace(member, name=name, recipe=replace(member.recipe, **recipe or {}), **changes)
    )


def parts(folder: Path) -> tuple[Member, Path, TrainingSet]:
    runs = folder.parent.parent
    member = read_member(folder / "member.json")
    return member, runs / member.init, read_pairs(runs / "pairs.safetensors", member.pairs)


def train(folder: Path, stop: Any = lambda: False) -> list[dict[str, Any]]:
    member, init, pairs = parts(folder)
    return list(train_member(member, init, pairs, folder, stop))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "model.safetensors" if (folder / "model.safetensors").exists() else "adapter_model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(folder / name)
    return tensors


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows as written, without what a clock decides."""
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def after(asked: int) -> Any:
    """stop() that says so in step `asked`."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= asked


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained member; nobody changes it."""
    folder = start_run(tmp_path_factory.mktemp("plain"))
    train(folder)
    return folder


@pytest.fixture
def fresh(tmp_path: Path, plain: Path) -> Path:
    """An untrained member of the same description, in a run of its own."""
    shutil.copytree(plain.parent.parent, tmp_path / "runs", ignore=shutil.ignore_patterns("members"))
    return add_member(tmp_path / "runs", read_member(plain / "member.json"))


def test_the_loss_is_that_of_the_paper_and_its_additions() -> None:
    random = numpy.random.default_rng(0)
    chosen, rejected, margins = random.normal(size=(3, 20))
    sigmoid = 1 / (1 + numpy.exp(-(chosen - rejected)))
    tensors = [torch.tensor(x) for x in (chosen, rejected, margins)]
    no_margins = torch.zeros(20, dtype=torch.float64)
    assert numpy.allclose(bradley_terry(*tensors[:2], no_margins, 0.0, 0.0), -numpy.log(sigmoid))
    smoothed = -0.9 * numpy.log(sigmoid) - 0.1 * numpy.log(1 - sigmoid)
    assert numpy.allclose(bradley_terry(*tensors[:2], no_margins, 0.1, 0.0), smoothed)
    apart = numpy.log1p(numpy.exp(-(chosen - rejected - margins))) + 0.01 * (chosen + rejected) ** 2
    assert numpy.allclose(bradley_terry(*tensors, 0.0, 0.01), apart)
    huge = torch.tensor([-1e4])
    assert bradley_terry(huge, -huge, torch.zeros(1), 0.0, 0.0).item() == pytest.approx(2e4)


def test_a_constant_learning_rate_stays_after_the_warm_up() -> None:
    member = Member("01", "init", "", "", 1.0, 0.0, 0, replace(RECIPE, schedule="constant", warmup=4))
    assert [learning_rate(step, member) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_first_step_is_adams_on_the_whole_batch(fresh: Path) -> None:
    """Against a plain loop: one text at a time, torch's own loss and optimizer."""
    folder = another(fresh, "02", {"steps": 1, "use_margins": True, "centring": 0.01}, dropout=0.0)
    member, init, pairs = parts(folder)
    pairs = replace(pairs, margins=numpy.linspace(0, 1, len(pairs)))
    (row,) = train_member(member, init, pairs, folder)
    from warmerge.training.training_set import batch_of

    module = load_reward_model(init).module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for k in batch_of(0, len(pairs), 8, member.seed):
        c, r = (
            module(input_ids=torch.tensor(pairs.text(i))[None]).logits[0, 0]
            for i in (pairs.chosen[k], pairs.rejected[k])
        )
        margin = c - r - float(pairs.margins[k])
        losses.append(-torch.nn.functional.logsigmoid(margin) + 0.01 * (c + r) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["tokens"] == pairs.tokens(batch_of(0, len(pairs), 8, member.seed))
    # Adam's first step moves each weight by its learning rate, up or down; gradients near zero may differ in sign.
    found = weights(folder)
    close = [torch.isclose(found[name], p, atol=1e-5).float().mean() for name, p in module.state_dict().items()]
    assert min(close) > 0.99


def test_the_token_budget_does_not_change_the_result(fresh: Path) -> None:
    one, other = another(fresh, "02", {"batch_tokens": 100}, dropout=0.0), another(fresh, "03", dropout=0.0)
    first, second = train(one), train(other)
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], abs=1e-5)
    a, b = weights(one), weights(other)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert not equal(one, fresh.parent.parent / "init")


def test_recomputed_activations_do_not_change_the_result(plain: Path, fresh: Path) -> None:
    folder = another(fresh, "02", {"gradient_checkpointing": True})
    train(folder)
    a, b = weights(folder), weights(plain)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_seed_decides_everything(plain: Path, fresh: Path) -> None:
    train(fresh)
    assert equal(fresh, plain)
    assert rows(fresh) == rows(plain)
    other = another(fresh, "02", seed=1)
    train(other)
    assert not equal(other, plain)


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, pytest.param({"lora": 2, "adapter": True}, marks=SLOW)])
def test_a_run_that_is_stopped_twice_ends_in_the_same_weights(fresh: Path, changes: dict[str, Any]) -> None:
    whole, stopped = another(fresh, "02", changes), another(fresh, "03", changes)
    # The name is no part of what is learned.
    train(whole)
    assert [row["step"] for row in train(stopped, after(1))] == [1]
    assert [path.name for path in saving.checkpoints(stopped)] == ["checkpoint-1"]
    assert not saving.is_saved(stopped)
    assert [row["step"] for row in train(stopped, after(3))] == [2, 3, 4]
    assert [row["step"] for row in train(stopped)] == [5, 6]
    assert equal(stopped, whole)
    assert rows(stopped) == rows(whole)
    assert train(stopped) == []


def test_a_run_that_is_told_to_stop_in_its_last_step_is_finished(fresh: Path, plain: Path) -> None:
    assert len(train(fresh, after(6))) == 6
    assert equal(fresh, plain)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_in_the_same_weights(fresh: Path, plain: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from warmerge.training.unit import run_member\n"
        "steps = iter(range(6))\n"
        "run_member(Path(sys.argv[1]), lambda: next(steps) == 4 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(fresh)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(rows(fresh)) == 4
    assert train(fresh)[0]["step"] == 5
    assert equal(fresh, plain)
    assert rows(fresh) == rows(plain)


def test_a_crash_between_the_files_of_a_checkpoint_loses_nothing(
    fresh: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before step 4's checkpoint has its name: half of it lies there, and two rows too many, one cut short.
    train(fresh, after(2))
    (fresh / ".checkpoint.partial").mkdir()
    (fresh / ".checkpoint.partial" / "state.safetensors").write_bytes(b"half of it")
    with (fresh / "rows.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    # After it has its name, before the earlier one is gone.
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or 1 / 0)
        shutil.os.rename(fresh / ".checkpoint.partial", fresh / ".half")
        with pytest.raises(ZeroDivisionError):
            train(fresh)
    assert [path.name for path in saving.checkpoints(fresh)] == ["checkpoint-2", "checkpoint-4"]
    train(fresh)
    assert equal(fresh, plain)
    assert rows(fresh) == rows(plain)
    assert saving.checkpoints(fresh) == []


def test_a_crash_while_the_model_is_put_in_place_leaves_no_model(
    fresh: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = os.replace

    def crash(source: Any, target: Any) -> None:
        if Path(target).name == "model.safetensors":
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            train(fresh)
    assert (fresh / "config.json").exists()
    assert not saving.is_saved(fresh)
    with pytest.raises((RefusedError, UsageError)):
        load_reward_model(fresh)
    assert [row["step"] for row in train(fresh)] == [5, 6]
    assert equal(fresh, plain)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(fresh: Path, plain: Path) -> None:
    train(fresh, after(2))
    state = (fresh / "checkpoint-2" / "state.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            WarmergeError, match=r"a checkpoint at step 4 could not be written .*MB are free.*make room"
        ):
            train(fresh)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (fresh / "checkpoint-2" / "state.safetensors").read_bytes() == state
    assert not list(fresh.glob(".*"))
    train(fresh)
    assert equal(fresh, plain)


def test_checkpoints_of_something_else_are_refused(fresh: Path) -> None:
    train(fresh, after(2))
    other = another(fresh, "02", lr=2e-3)
    shutil.copytree(fresh / "checkpoint-2", other / "checkpoint-2")
    with pytest.raises(RefusedError, match=r"belongs to another member or recipe than member.json says; delete this"):
        train(other)
    (fresh / "rows.jsonl").unlink()
    with pytest.raises(RefusedError, match=r"rows.jsonl: has 0 rows, but checkpoint-2 was written after 2"):
        train(fresh)
    (fresh / "checkpoint-2" / "state.safetensors").write_bytes(b"?")
    with pytest.raises(RefusedError, match=r"state.safetensors: cannot be read"):
        train(fresh)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(fresh: Path) -> None:
    folder = another(fresh, "02", lr=1e30)
    with pytest.raises(WarmergeError, match=r"^member 02: step 2 is not finite \(loss .*learning rate is 1e\+30"):
        train(folder)
    assert len(rows(folder)) == 1
    assert not saving.is_saved(folder)
    assert not list(folder.rglob("model*"))


def test_weights_that_overflow_the_members_dtype_are_not_saved(fresh: Path) -> None:
    init = fresh.parent.parent / "init"
    tensors = load_file(init / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    from safetensors.torch import save_file

    save_file(tensors, init / "model.safetensors", {"format": "pt"})
    folder = another(fresh, "02", {"steps": 1, "dtype": "float16"})
    with pytest.raises(WarmergeError, match=r"'model.norm.weight' of the trained model is not finite in float16"):
        train(folder)
    assert not saving.is_saved(folder)


@pytest.mark.parametrize(
    "kind", ["llama", "modernbert", pytest.param("bert", marks=SLOW), pytest.param("gpt2", marks=SLOW)]
)
def test_dropout_is_all_dropout(tmp_path: Path, kind: str) -> None:
    """Also that which a model applies by itself: with every nn.Dropout switched off its rewards still vary."""
    member, init, pairs = parts(start_run(tmp_path, kind, dropout=0.5))
    module = trainable(member, init, CPU)
    part = numpy.arange(4)
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout):
            assert child.p == 0.5
            if kind == "llama":
                child.p = 0.0
    with torch.no_grad():
        still = [rewards(module.eval(), module.config, pairs, part, CPU)[0] for _ in range(2)]
        varied = [rewards(module.train(), module.config, pairs, part, CPU)[0] for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.allclose(*varied, atol=1e-3)
    assert not torch.allclose(varied[0], still[0], atol=1e-3)


def test_without_dropout_training_computes_what_scoring_does(tmp_path: Path) -> None:
    edit_config(start_run(tmp_path, dropout=0.0).parent.parent / "init", attention_dropout=0.5)
    member, init, pairs = parts(tmp_path / "members" / "01")
    module = trainable(member, init, CPU).train()
    found, _ = rewards(module, module.config, pairs, numpy.arange(4), CPU)
    model = load_reward_model(init)
    texts = unique_texts(read_preferences(str(tmp_path / "pairs.jsonl"))).texts
    expected = score(model, Tokens(model.renderer, texts))[pairs.chosen[:4]]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
def test_bfloat16_is_for_the_body_alone(tmp_path: Path, lora: int) -> None:
    folder = start_run(tmp_path, recipe=replace(RECIPE, precision="bfloat16", lora=lora))
    member, init, pairs = parts(folder)
    module = trainable(member, init, CPU)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, inputs, out: seen.append((m, out.dtype)) if isinstance(m, torch.nn.Linear) else None
    )
    try:
        found, _ = rewards(module, module.config, pairs, numpy.arange(8), CPU)
    finally:
        hook.remove()
    heads = {dtype for layer, dtype in seen if layer.out_features == 1}
    assert heads == {torch.float32}
    assert {dtype for layer, dtype in seen if layer.out_features != 1} >= {torch.bfloat16}
    assert not torch.equal(found, found.bfloat16().float())
    train(folder)
    start = weights(init)
    assert not torch.equal(weights(folder)["score.weight"], start["score.weight"])


def test_frozen_embeddings_stay(fresh: Path) -> None:
    folder = another(fresh, "02", {"freeze_embeddings": True})
    train(folder)
    found, start = weights(folder), weights(fresh.parent.parent / "init")
    assert [name for name in start if torch.equal(found[name], start[name])] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_folder_is_a_model_like_its_start(fresh: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        train(fresh)
    finally:
        os.umask(before)
    init = fresh.parent.parent / "init"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (fresh / name).read_bytes() == (init / name).read_bytes()
    found, start = weights(fresh), weights(init)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in start.items()
    }
    expected = {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "member.json",
        "rows.jsonl",
    }
    assert {path.name for path in fresh.iterdir()} == expected
    made = [path for path in fresh.iterdir() if path.name not in ("member.json",)]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o666 & ~umask}


def test_another_dtype_is_said_in_the_config(tmp_path: Path) -> None:
    folder = start_run(tmp_path, recipe=replace(RECIPE, dtype="bfloat16", keep_checkpoints=True))
    train(folder)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((tmp_path / "init" / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert [path.name for path in saving.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert load_reward_model(folder).module.score.weight.shape == (1, 32)


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", *(pytest.param(k, marks=SLOW) for k in ("bert", "roberta", "modernbert"))]
)
def test_an_adapter_is_the_same_model_as_its_merge(tmp_path: Path, kind: str) -> None:
    recipe = replace(RECIPE, steps=3, lora=2)
    merged = start_run(tmp_path, kind, recipe)
    adapter = another(merged, "02", {"adapter": True})
    train(merged)
    train(adapter)
    model, by_path = load_reward_model(merged), load_reward_model(adapter)
    with_base = load_reward_model(adapter, base=tmp_path / "init")
    texts = [("why", "clear and kind"), ("how", "rude"), ("", "word")]
    tokens = Tokens(model.renderer, texts)
    expected = score(model, tokens)
    for other in (by_path, with_base):
        assert score(other, Tokens(other.renderer, texts)) == pytest.approx(expected, abs=1e-4)
    start = load_reward_model(tmp_path / "init")
    assert score(start, Tokens(start.renderer, texts)) != pytest.approx(expected, abs=1e-4)
    heads = [
        name for name, _ in model.module.named_parameters() if name.split(".")[0] in ("score", "classifier", "head")
    ]
    changed = [name for name in heads if name.endswith("weight") and "norm" not in name]
    before, trained = dict(start.module.named_parameters()), dict(model.module.named_parameters())
    assert changed
    assert not any(torch.equal(before[name], trained[name]) for name in changed)


def test_adapters_average(tmp_path: Path) -> None:
    first = start_run(tmp_path, recipe=replace(RECIPE, steps=3, lora=2, adapter=True))
    second = another(first, "02", seed=1, lr=2e-3)
    train(first)
    train(second)
    done = average([first, second], tmp_path / "mean", base=tmp_path / "init")
    assert done.warnings == ()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = average([moved / "members" / "01", moved / "members" / "02"], moved / "again", base=moved / "init")
    assert again.warnings == ()
    assert equal(moved / "mean", moved / "again")
    moved.rename(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_members_learn_and_average(tmp_path: Path, kind: str) -> None:
    """The real thing: two members of one start, better than it, and an average without a complaint."""
    recipe = Recipe(steps=20, batch=16, warmup=2, save_every=7)
    first = start_run(tmp_path, kind, recipe, lr=3e-3, dropout=0.0)
    second = another(first, "02", seed=1, lr=4e-3)
    for folder in (first, second):
        run_member(folder, lambda: False)
    found = [json.loads((folder / RESULT).read_text()) for folder in (first, second)]
    for folder, result in zip((first, second), found, strict=True):
        assert result["final_loss"] < rows(folder)[0]["loss"]
        assert result["final_accuracy"] > 0.6
    done = average([first, second], tmp_path / "mean")
    assert done.warnings == ()
    measured = evaluate([first, second, tmp_path / "mean"], [f"val={tmp_path / 'val.jsonl'}"], with_average=False)
    accuracies = {row["model"]: row["accuracy"] for row in measured.rows}
    assert measured.warnings == ()
    for folder, result in zip((first, second), found, strict=True):
        assert result["val"]["val"]["accuracy"] in accuracies.values(), folder


def test_a_wrong_start_is_refused(fresh: Path) -> None:
    folder = another(fresh, "02", head="0" * 64)
    with pytest.raises(
        RefusedError, match=r"init: has the head [0-9a-f]{64}, but member 02 was given 0{64}; it was ch"
    ):
        train(folder)
    with pytest.raises(RefusedError, match="holds the pairs the pairs, expected others"):
        run_member(another(fresh, "03", pairs="others"), lambda: False)


def test_rows_are_on_the_disk_before_their_checkpoint(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut nothing goes on from a checkpoint without its rows."""
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train(fresh)
    files = [name for name in synced if name in ("rows.jsonl", "state.safetensors", "model.safetensors")]
    assert files == ["rows.jsonl", "state.safetensors"] * 2 + ["rows.jsonl", "model.safetensors"]


def test_a_checkpoint_that_somebody_set_aside_is_none(tmp_path: Path) -> None:
    for name in ("checkpoint-200", "checkpoint-200.bak", "checkpoint-1000"):
        (tmp_path / name).mkdir()
    assert [path.name for path in saving.checkpoints(tmp_path)] == ["checkpoint-200", "checkpoint-1000"]


def test_processes_that_do_not_know_of_one_another_are_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # as one process: what is asked for afterwards comes too late
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes were started, but accelerate joined 1: each would train alone"):
        train(fresh)
    assert not (fresh / "rows.jsonl").exists()


def test_a_model_that_reads_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"gives texts of .* tokens other rewards in a padded batch than alone"):
        train(start_run(tmp_path, "xlnet"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cosine"}, "recipe: schedule is 'cosine', expected linear or constant"),
        ({"precision": "float16"}, "recipe: precision is 'float16', expected float32 or bfloat16"),
        ({"dtype": "int8"}, "recipe: dtype is 'int8', expected float32 or bfloat16 or float16"),
        ({"adapter": True}, "recipe: adapter without lora"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused(fresh: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train(another(fresh, "02", changes))


def test_a_description_that_is_not_understood_is_refused(fresh: Path) -> None:
    path = fresh / "member.json"
    whole = json.loads(path.read_text())
    assert read_member(path).recipe == RECIPE
    path.write_text(json.dumps({**whole, "momentum": 1, "recipe": {**whole["recipe"], "loss": "hinge"}}))
    with pytest.raises(RefusedError) as refused:
        read_member(path)
    assert "member.json: has the unknown fields 'momentum'; was it" in str(refused.value)
    assert "member.json, recipe: has the unknown fields 'loss'; was it" in str(refused.value)
    del whole["lr"]
    path.write_text(json.dumps(whole))
    with pytest.raises(RefusedError, match=r"member.json: lacks 'lr'"):
        read_member(path)
    path.write_text("[]")
    with pytest.raises(RefusedError, match="cannot be read as a member"):
        read_member(path)


def test_a_unit_measures_what_it_saved(fresh: Path) -> None:
    run_member(fresh, lambda: False)
    result = json.loads((fresh / RESULT).read_text())
    written = rows(fresh)
    assert result["steps"] == 6
    assert result["tokens"] == sum(row["tokens"] for row in written)
    assert result["final_loss"] == written[-1]["loss"]
    assert result["head"] == head_digest(fresh) != head_digest(fresh.parent.parent / "init")
    assert result["versions"].keys() >= {"warmerge", "torch", "accelerate", "peft"}
    assert list(result["val"]) == ["val", "ood"]
    for name, entry in result["val"].items():
        (row,) = [
            row
            for row in evaluate([fresh], [f"{name}={fresh.parent.parent / name}.jsonl"]).rows
            if row["kind"] == "member"
        ]
        assert (entry["accuracy"], entry["n"], entry["prompts"]) == (row["accuracy"], 30, 15)
        assert (entry["reward_mean"], entry["reward_sd"]) == (row["reward_mean"], row["reward_std"])
        assert entry["low"] <= entry["accuracy"] <= entry["high"]


def test_a_unit_does_only_what_is_left(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted, match="member 01 was stopped after 3 of 6 steps; run it again to go on"):
        run_member(fresh, after(3))
    assert not (fresh / RESULT).exists()
    train_json = fresh.parent.parent / "train.json"
    settings = train_json.read_text()
    train_json.write_text("{}")
    with pytest.raises(RefusedError, match=r"train.json: does not say how members are measured \(KeyError\('val'\)\)"):
        run_member(fresh, lambda: False)
    saved, trained = (fresh / "model.safetensors").stat().st_mtime_ns, rows(fresh)
    train_json.write_text(settings)
    run_member(fresh, lambda: pytest.fail("a finished training has no step to stop at"))
    assert (fresh / "model.safetensors").stat().st_mtime_ns == saved
    assert rows(fresh) == trained
    done = (fresh / RESULT).read_bytes()
    (fresh / "model.safetensors").unlink()
    run_member(fresh, lambda: False)
    assert (fresh / RESULT).read_bytes() == done
    assert not saving.is_saved(fresh)
