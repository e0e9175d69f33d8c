"""train: what a run leaves, that it goes on, and what it refuses before a member is trained.

Members are trained in this process, by the function that the engines call; the engines have tests of their own.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import World, own_accuracy, pairs, write_rows
from safetensors.torch import load_file

import warmerge
from warmerge.errors import Interrupted, RefusedError, UsageError, WarmergeError
from warmerge.pipeline import train as module
from warmerge.pipeline.engine import Outcome, Unit, child
from warmerge.pipeline.evaluate import evaluate
from warmerge.pipeline.scoring.judge import open_judge
from warmerge.pipeline.train import Trained, train
from warmerge.rewards.bench import Measuring
from warmerge.rewards.corruption import read_corruption
from warmerge.rewards.model import LoadOptions
from warmerge.training import preparation
from warmerge.training.head import head_digest
from warmerge.training.preparation import check_disk
from warmerge.training.recipe import Recipe
from warmerge.training.settings import TrainSettings
from warmerge.training.unit import run_member

pytest.importorskip("accelerate")
pytest.importorskip("trl")
FAST = Measuring(resamples=100)
SETTINGS = TrainSettings(Recipe(steps=4, batch=8, warmup=0, save_every=2), runs=2, lr=(1e-3, 3e-3))


def run_here(units: Sequence[Unit], **_: Any) -> list[Outcome]:
    """As an engine does, in this process."""
    found = []
    for unit in units:
        try:
            run_member(unit.folder, lambda: False)
            found.append(Outcome(unit, "done", ""))
        except WarmergeError as error:
            found.append(Outcome(unit, "failed", str(error)))
    return found


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_units", run_here)


def go(world: World, out: Path, **changes: Any) -> Trained:
    known: dict[str, Any] = {"settings": SETTINGS, "measuring": FAST, "val": [f"val={world.data('val')}"]}
    found = train(world.start, changes.pop("data", world.data("train")), out, **(known | changes))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run with label noise, which no test may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_units", run_here)
        return go(world, tmp_path_factory.mktemp("done") / "runs", corrupt=0.25, corrupt_seed=3)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("too late")


# --- what is left ---


def test_members_share_the_start_and_can_be_averaged(done: Trained, tmp_path: Path) -> None:
    record = json.loads((done.out / "train.json").read_text())
    assert record["head"] == head_digest(done.out / "init")
    folders = [done.out / "members" / name for name in ("01", "02")]
    for folder in folders:
        member = json.loads((folder / "member.json").read_text())
        assert (member["head"], member["init"], member["pairs"]) == (record["head"], "init", record["pairs"])
    merged = warmerge.average(folders, tmp_path / "warm")
    assert merged.warnings == ()
    for name, value in load_file(tmp_path / "warm" / "model.safetensors").items():
        one, two = (load_file(folder / "model.safetensors")[name].double() for folder in folders)
        assert torch.equal(value, ((one + two) / 2).float()), name
    assert not torch.equal(one, two)


def test_the_table_says_what_transformers_says(done: Trained, world: World) -> None:
    rows = [json.loads(line) for line in Path(world.data("val")).read_text().splitlines()]
    assert [row["member"] for row in done.members] == sorted(
        ("01", "02"), key=lambda name: -own_accuracy(done.out / "members" / name, rows)
    )
    for row in done.members:
        found = row["val"]["val"]
        assert found["accuracy"] == pytest.approx(own_accuracy(done.out / "members" / row["member"], rows))
        assert found["low"] <= found["accuracy"] <= found["high"]
        assert (found["n"], found["prompts"]) == (160, 80)
    assert done.start["val"]["accuracy"] == pytest.approx(own_accuracy(done.out / "init", rows))
    assert "ranked on val: choose members by it, and report on another set" in done.notes


def test_results_are_written_as_rows_and_figures(done: Trained) -> None:
    content = json.loads((done.out / "training.json").read_text())
    assert [(row["member"], row["step"]) for row in content["rows"]] == [
        (name, step) for name in ("01", "02") for step in (1, 2, 3, 4)
    ]
    assert {row["model"] for row in content["accuracies"]} == {"start", "01", "02"}
    for name in ("training.png", "training.svg", "training.csv", "training-members.csv"):
        assert (done.out / name).stat().st_size > 100, name


def test_exactly_so_many_labels_are_swapped_and_eval_reads_the_mask(done: Trained, world: World) -> None:
    corruption = read_corruption(done.out / "corruption.json")
    assert len(corruption.swapped) == round(0.25 * 500) == len(set(corruption.swapped))
    members = [str(done.out / "members" / name) for name in ("01", "02")]
    found = evaluate(members, [f"train={world.data('train')}"], mask=done.out / "corruption.json", measuring=FAST)
    sizes = {row["set"]: row["n"] for row in found.rows}
    assert sizes == {"train[swapped]": 125, "train[clean]": 375}


def test_swapped_labels_are_what_members_are_trained_on(done: Trained, world: World) -> None:
    """The pairs on the disk, decoded: exactly the swapped rows stand the other way round."""
    from safetensors.numpy import load_file as load
    from transformers import AutoTokenizer

    arrays, tokenizer = load(done.out / "pairs.safetensors"), AutoTokenizer.from_pretrained(done.out / "init")
    rows = [json.loads(line) for line in Path(world.data("train")).read_text().splitlines()]
    swapped = set(read_corruption(done.out / "corruption.json").swapped)

    def decoded(i: int) -> list[int]:
        found: list[int] = arrays["ids"][arrays["starts"][i] : arrays["starts"][i + 1]].tolist()
        return found

    for k, row in enumerate(rows):
        better, worse = ("rejected", "chosen") if k in swapped else ("chosen", "rejected")
        for side, answer in (("chosen", better), ("rejected", worse)):
            ids = tokenizer(f"{row['prompt']}\n\n{row[answer]} [END]")["input_ids"]
            assert decoded(arrays[side][k]) == ids


def test_next_commands_name_what_is_there(done: Trained, world: World) -> None:
    first, second = done.next
    assert first == f"warmerge average {done.out}/members/01 {done.out}/members/02 -o {done.out}-average"
    assert f"--init {done.out}/init --data val={world.data('val')}" in second
    assert f"--data train={world.data('train')} --mask {done.out}/corruption.json" in second


def test_train_json_is_enough_to_repeat_the_run(done: Trained, world: World, tmp_path: Path) -> None:
    again = go(world, tmp_path / "again", corrupt=0.25, corrupt_seed=3)
    for name in ("init", "members/01", "members/02"):
        one, two = (load_file(out / name / "model.safetensors") for out in (done.out, again.out))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    one, two = (json.loads((out / "train.json").read_text()) for out in (done.out, again.out))
    assert one.keys() == two.keys()
    assert {key for key in one if one[key] != two[key]} == set()


# --- going on ---


def test_the_same_command_again_trains_nothing(
    done: Trained, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done.out, tmp_path / "runs")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    monkeypatch.setattr("warmerge.training.preparation.make_start", never)
    monkeypatch.setattr("warmerge.training.unit.train_member", never)
    again = go(world, tmp_path / "runs", corrupt=0.25, corrupt_seed=3)
    assert [row["val"] for row in again.members] == [row["val"] for row in done.members]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_more_runs_are_added_to_those_that_are_there(
    done: Trained, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done.out, tmp_path / "runs")
    monkeypatch.setattr("warmerge.training.preparation.make_start", never)
    more = go(world, tmp_path / "runs", corrupt=0.25, corrupt_seed=3, settings=replace(SETTINGS, runs=3))
    assert sorted(row["member"] for row in more.members) == ["01", "02", "03"]
    assert (tmp_path / "runs/members/03/model.safetensors").exists()


def test_another_run_in_the_same_folder_is_refused_and_says_what_differs(
    done: Trained, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_units", never)
    with pytest.raises(UsageError) as error:
        go(world, done.out, corrupt=0.5, corrupt_seed=3, settings=replace(SETTINGS, seed=1))
    assert str(error.value).splitlines() == [
        f"{done.out} holds another run; choose another folder for -o, or delete it. Differing:",
        "  settings.seed: 0 there, 1 now",
        "  corruption: [0.25, 3] there, [0.5, 3] now",
    ]


def test_data_that_changed_is_noticed(world: World, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=1), val=())
    write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=5))
    with pytest.raises(UsageError, match="data_fingerprint: "):
        go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=1), val=())


def test_a_validation_set_that_changed_is_noticed(world: World, tmp_path: Path) -> None:
    """Members that are ranked in one table were measured on the same comparisons."""
    data, rows = write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4)), pairs(12, seed=7)
    others = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    one: dict[str, Any] = {"data": data, "settings": replace(SETTINGS, runs=1)}
    one["val"] = [write_rows(tmp_path / "val.jsonl", rows)]
    go(world, tmp_path / "runs", **one)
    write_rows(tmp_path / "val.jsonl", others)
    with pytest.raises(UsageError, match="val_fingerprints: "):
        go(world, tmp_path / "runs", **(one | {"settings": SETTINGS}))
    (tmp_path / "runs/members/01/result.json").unlink()  # one that ends after the set has changed
    with pytest.raises(
        RefusedError, match=r"val\.jsonl: has changed since: other members are measured on what it held"
    ):
        run_member(tmp_path / "runs/members/01", lambda: False)
    write_rows(tmp_path / "val.jsonl", rows)
    assert not go(world, tmp_path / "runs", **one).failed


def test_a_base_that_changed_is_noticed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_units", lambda *_, **__: [])
    data, base = (
        write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4)),
        shutil.copytree(world.start, tmp_path / "base"),
    )
    train(base, data, tmp_path / "runs", settings=SETTINGS, measuring=FAST)
    shutil.copytree(world.alien, base, dirs_exist_ok=True)
    with pytest.raises(UsageError, match="base_fingerprints: "):
        train(base, data, tmp_path / "runs", settings=SETTINGS, measuring=FAST)


def test_a_run_of_an_earlier_version_is_another_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_units", lambda *_, **__: [])
    data = write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4))
    go(world, tmp_path / "runs", data=data, val=())
    record = json.loads((tmp_path / "runs/train.json").read_text())
    del record["asked"]["base_fingerprints"], record["asked"]["val_fingerprints"]
    (tmp_path / "runs/train.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="base_fingerprints: null there"):
        go(world, tmp_path / "runs", data=data, val=())
    run_member(tmp_path / "runs/members/01", lambda: False)  # as another machine's engine may


def test_two_runs_are_not_prepared_in_one_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would train from the start that the other one has put there."""
    data = write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4))
    one: dict[str, Any] = {"settings": replace(SETTINGS, runs=1), "measuring": FAST}
    real = preparation.probe_head

    def meets(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(WarmergeError, match=r"another process is preparing a run in .*; wait for it, or choose"):
            train(world.alien, data, tmp_path / "runs", **one)
        return real(*arguments, **options)

    monkeypatch.setattr(preparation, "probe_head", meets)
    train(world.start, data, tmp_path / "runs", **one)
    init, start = (load_file(path / "model.safetensors") for path in (tmp_path / "runs/init", world.start))
    assert torch.equal(init["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_no_mask_of_an_interrupted_run_is_left(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval --mask` would call clean labels swapped: data and fingerprint are the same."""
    one: dict[str, Any] = {"data": write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4)), "val": ()}
    with monkeypatch.context() as patch:
        patch.setattr("warmerge.training.preparation.make_start", never)
        with pytest.raises(AssertionError, match="too late"):
            go(world, tmp_path / "runs", corrupt=0.25, **one)
    assert (tmp_path / "runs/corruption.json").exists()
    monkeypatch.setattr(module, "run_units", lambda *_, **__: [])
    go(world, tmp_path / "runs", **one)
    assert not (tmp_path / "runs/corruption.json").exists()


def test_an_adapter_does_not_take_another_base_in_the_place_of_its_own(world: World, tmp_path: Path) -> None:
    """After `mv runs old` and another run in `runs`."""
    recipe = replace(SETTINGS.recipe, steps=1, lora=2, adapter=True)
    data = write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4))
    go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=1, recipe=recipe), val=())
    (tmp_path / "runs").rename(tmp_path / "old")
    shutil.copytree(world.alien, tmp_path / "runs" / "init")
    member = tmp_path / "old" / "members" / "01"
    with pytest.raises(RefusedError, match="; give the start that it was trained from with --base"):
        open_judge(member)
    assert open_judge(member, tmp_path / "old" / "init").inputs


def test_a_preparation_that_was_interrupted_is_begun_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    one: dict[str, Any] = {"data": data, "settings": replace(SETTINGS, runs=1), "val": ()}
    with monkeypatch.context() as patch:
        patch.setattr("warmerge.training.preparation.write_head", never)
        with pytest.raises(AssertionError, match="too late"):
            go(world, tmp_path / "runs", **one)
    assert "head" not in json.loads((tmp_path / "runs" / "train.json").read_text())
    found = go(world, tmp_path / "runs", **one)
    whole = go(world, tmp_path / "whole", **one)
    one_start, other = (load_file(run.out / "init" / "model.safetensors") for run in (found, whole))
    assert all(torch.equal(one_start[key], other[key]) for key in other)


def test_after_a_mistake_the_folder_can_be_used(world: World, tmp_path: Path) -> None:
    """A base that is not there leaves nothing; data that is refused leaves no run in the way of the next one."""
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    one: dict[str, Any] = {"settings": replace(SETTINGS, runs=1), "measuring": FAST}
    with pytest.raises(UsageError, match="no-such-base"):
        train(tmp_path / "no-such-base", data, tmp_path / "runs", **one)
    assert not (tmp_path / "runs").exists()
    same = write_rows(tmp_path / "same.jsonl", [_same(row) for row in pairs(8, seed=1)])
    with pytest.raises(RefusedError, match="nothing to learn"):
        train(world.start, same, tmp_path / "runs", **one)
    found = train(world.start, data, tmp_path / "runs", **one)
    assert found is not None
    assert not found.failed


def test_a_member_that_was_edited_is_refused(done: Trained, world: World, tmp_path: Path) -> None:
    shutil.copytree(done.out, tmp_path / "runs")
    path = tmp_path / "runs/members/02/member.json"
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": 0.004'))
    with pytest.raises(
        RefusedError, match=r"members/02/member\.json: says something else than train\.json does; delete"
    ):
        go(world, tmp_path / "runs", corrupt=0.25, corrupt_seed=3)


def test_a_folder_of_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty and holds no train\.json; choose another folder for -o"):
        go(world, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_was_killed_while_it_wrote_its_record_is_begun_again(world: World, tmp_path: Path) -> None:
    (tmp_path / ".train.json.partial").write_text('{"asked": {"ba')
    go(world, tmp_path)
    assert (tmp_path / "training.json").exists()


# --- members that fail or are stopped ---


def test_a_failed_member_is_named_and_the_others_are_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(
        SETTINGS, lr=(1e-3, 1e9), runs=2, recipe=replace(SETTINGS.recipe, steps=6, max_gradient_norm=0.0)
    )
    found = go(world, tmp_path / "runs", settings=settings)
    assert [row["member"] for row in found.members] == ["01", "02"]
    (failed,) = found.failed
    assert failed["member"] == "02"
    assert "member 02" in failed["failed"]
    assert "not finite" in failed["failed"]
    assert not (tmp_path / "runs/members/02/model.safetensors").exists()
    assert found.next == ()


def test_one_that_is_stopped_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(units: Sequence[Unit], **_: Any) -> list[Outcome]:
        run_member(units[0].folder, lambda: True)
        raise AssertionError("was not stopped")

    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    one: dict[str, Any] = {"data": data, "settings": replace(SETTINGS, runs=1), "val": ()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_units", stopping)
        with pytest.raises(Interrupted, match="member 01 was stopped after 1 of 4 steps; run it again to go on"):
            go(world, tmp_path / "runs", **one)
    found, whole = go(world, tmp_path / "runs", **one), go(world, tmp_path / "whole", **one)
    one_end, other = (load_file(run.out / "members/01/model.safetensors") for run in (found, whole))
    assert all(torch.equal(one_end[key], other[key]) for key in other)


# --- several ranks ---


@pytest.fixture
def on_rank(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`on_rank(0, runs)`: the members that the first of two ranks turns to, where a run of three was prepared."""
    import accelerate

    data = write_rows(tmp_path / "pairs.jsonl", pairs(24, seed=4))
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_units", lambda *_, **__: [])
        go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=3), val=())
    names: list[Any] = []

    def run(rank: int, runs: int) -> list[str]:
        tried: list[str] = []

        class State:
            is_main_process = rank == 0

            def __init__(self, **_: Any) -> None: ...

        def broadcast(said: list[Any]) -> list[Any]:
            names[:] = said if rank == 0 else names
            return names

        monkeypatch.setattr(accelerate, "PartialState", State)
        monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
        monkeypatch.setattr(module, "on_all_ranks", lambda work: work())
        monkeypatch.setattr(module, "run_member", lambda folder, stop: tried.append(folder.name))
        monkeypatch.setenv("WORLD_SIZE", "2")
        train(world.start, data, tmp_path / "runs", settings=replace(SETTINGS, runs=runs), measuring=FAST)
        return tried

    return run


def test_ranks_train_the_members_that_were_asked_for(on_rank: Callable[..., list[str]]) -> None:
    assert on_rank(0, 2) == on_rank(1, 2) == ["01", "02"]


def test_ranks_leave_a_member_to_who_is_working_on_it(
    on_rank: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_LOCK_SECONDS", 0.1)
    with (tmp_path / "runs" / "members" / "01" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert on_rank(0, 2) == ["02"]


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_is_prepared(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="--batch 8: expected a multiple of 3, the processes that share each batch"):
        go(world, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# --- the start ---


def test_without_a_probe_the_heads_are_the_starts_own(world: World, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=1), val=(), probe=False)
    assert head_digest(tmp_path / "runs" / "init") == head_digest(world.start)


def test_several_starts_share_the_one_head(world: World, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    found = train([world.start, world.a], data, tmp_path / "runs", settings=SETTINGS, measuring=FAST)
    assert found is not None
    assert [row["init"] for row in sorted(found.members, key=lambda row: str(row["member"]))] == ["init-1", "init-2"]
    digests = {head_digest(tmp_path / "runs" / name) for name in ("init-1", "init-2")}
    assert len(digests) == 1
    assert digests.isdisjoint({head_digest(world.start), head_digest(world.a)})
    with pytest.raises(UsageError, match="--no-probe with several starts"):
        train([world.start, world.a], data, tmp_path / "other", settings=SETTINGS, measuring=FAST, probe=False)


def test_the_rule_that_texts_were_trained_by_is_the_members_own(world: World, tmp_path: Path) -> None:
    """--template plain and --max-length hold for everybody who loads a member."""
    from reward_world import write_tokenizer

    start = shutil.copytree(world.start, tmp_path / "start")
    write_tokenizer(start, template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    loading = LoadOptions(template="plain", max_length=10)
    found = train(
        start, data, tmp_path / "runs", settings=replace(SETTINGS, runs=1), measuring=replace(FAST, loading=loading)
    )
    assert found is not None
    from warmerge.rewards.model import load_reward_model

    renderer = load_reward_model(tmp_path / "runs/members/01").renderer
    assert (renderer.template, renderer.max_length) == ("plain", 10)
    assert any(note.startswith("training pairs: of ") and "--max-length" in note for note in found.notes)


# --- what is refused, or doubted, before a member is trained ---


def _same(row: dict[str, str]) -> dict[str, str]:
    return {**row, "rejected": row["chosen"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (list, "is empty: there is no row in it"),
        (lambda: [_same(row) for row in pairs(8, seed=1)], "nothing to learn"),
        (lambda: [{"prompt": "why", "chosen": "a"}], "which is no known layout"),
    ],
)
def test_data_that_teaches_nothing_is_refused(
    world: World, tmp_path: Path, rows: Callable[[], list[dict[str, str]]], message: str
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    with pytest.raises(RefusedError, match=message):
        go(world, tmp_path / "runs", data=data)


def test_prompts_shared_with_a_validation_set_are_counted(world: World, tmp_path: Path) -> None:
    rows = pairs(40, seed=4)
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    val = write_rows(tmp_path / "mine.jsonl", rows[:10] + pairs(20, seed=9))
    found = go(world, tmp_path / "runs", data=data, val=[val], settings=replace(SETTINGS, runs=1))
    said = [str(warning) for warning in found.warnings]
    assert "mine: shares 5 of its 15 prompts with the training pairs: its accuracies flatter" in said


@pytest.mark.parametrize(
    ("share", "message"),
    [(1.0, "--corrupt: expected a share from 0 to below 1, found 1"), (0.0001, "of 500 comparisons swaps none")],
)
def test_shares_that_make_no_sense(world: World, tmp_path: Path, share: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        go(world, tmp_path / "runs", corrupt=share)


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = Recipe(steps=200, batch=1, warmup=0, dtype="bfloat16")
    with pytest.raises(
        WarmergeError,
        match=r"6 members of 2,000,000 MB, checkpoints of up to 24,000,000 MB for each member at work do not",
    ):
        check_disk(tmp_path, 6, 10**12, recipe, said.append)
    check_disk(tmp_path, 6, 10**6, replace(recipe, steps=50), said.append)
    assert said[1].startswith("disk: 6 members of 2 MB; ")


def test_margins_that_are_not_there_are_missed(world: World, tmp_path: Path) -> None:
    settings = replace(SETTINGS, recipe=replace(SETTINGS.recipe, use_margins=True))
    with pytest.raises(UsageError, match=r"^--margins: .*train\.jsonl has no column 'margin', or zeros in it"):
        go(world, tmp_path / "runs", settings=settings)
    assert not (tmp_path / "runs").exists()


def test_no_base_is_a_usage_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base is missing"):
        train([], world.data("train"), tmp_path / "runs")


def test_what_is_said_on_the_way(world: World, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    said: list[str] = []
    go(world, tmp_path / "runs", data=data, settings=replace(SETTINGS, runs=1), say=said.append)
    assert said[0] == "fitting the head on the features of 80 texts"
    assert said[1].startswith("probe: right on ")
    assert said[2].startswith("disk: 1 members of ")
    assert said[3] == "training 1 of 1 members, 4 steps each"


def test_training_helps_where_there_is_something_to_learn(world: World, tmp_path: Path) -> None:
    """More steps on the same pairs: the loss falls, and the pairs are learned."""
    data = write_rows(tmp_path / "pairs.jsonl", pairs(64, seed=4, noise=0.0))
    settings = TrainSettings(Recipe(steps=40, batch=16, warmup=2), runs=1, lr=(3e-3,), dropout=(0.0,))
    found = go(world, tmp_path / "runs", data=data, settings=settings, val=())
    losses = [row["loss"] for row in found.curves]
    assert numpy.mean(losses[-5:]) < 0.6 * numpy.mean(losses[:5])
    assert found.members[0]["final_accuracy"] > 0.9
