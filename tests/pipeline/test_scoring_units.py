"""Scoring as units of work: what comes out is what one process gives to the bit, whatever dies on the way.

Most units are run in this process, by the function that engines call; some in processes of their own; by hand on Ray.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import bot, user
from processes import alive, head_of_a_cluster, wait_for
from reward_world import VOCABULARY, World, pairs, with_head, write_rows, write_tokenizer
from safetensors.torch import load_file, save_file

from warmerge import Measuring, Proxy, best_of_n, evaluate
from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError
from warmerge.pipeline import engine
from warmerge.pipeline.engine import Outcome, Unit
from warmerge.pipeline.score import score_file
from warmerge.pipeline.scoring import Asked, child, remove_units, score_all, unit_folder, units
from warmerge.pipeline.scoring.judge import open_average, open_judge
from warmerge.pipeline.scoring.parts import find_scored, read_part, write_scored
from warmerge.pipeline.scoring.scorebook import SCORES, open_book
from warmerge.pipeline.scoring.texts import read_window, write_windows
from warmerge.report import results
from warmerge.rewards import model as models_floor
from warmerge.rewards import scoring
from warmerge.rewards.model import LoadOptions

FAST = Measuring(resamples=100)
HOST = socket.gethostname()
TEXTS = [(row["prompt"], row[side]) for row in pairs(20, 1) for side in ("chosen", "rejected")]
Ran = list[Unit]


@pytest.fixture
def many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and units so small that a few texts make several."""
    monkeypatch.setattr(scoring, "_FIRST_WINDOW", 4)
    monkeypatch.setattr(scoring, "_WINDOW", 16)
    monkeypatch.setattr(units, "_LEAST", 20)
    monkeypatch.setattr(units, "_MOST", 20)


@pytest.fixture
def ran(many_windows: None, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The units that were run, in this process."""
    found: Ran = []

    def inside(asked: Sequence[Unit], **options: Any) -> list[Outcome]:
        found.extend(asked)
        return engine.run_units(asked, engine="inline", while_waiting=options["while_waiting"])

    monkeypatch.setattr(units, "run_units", inside)
    return found


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the question: nothing is drawn."""
    for kind in (results.EVAL, results.BON):
        monkeypatch.setitem(results._FIGURES, kind, (lambda *_: [], ("rows",)))


@pytest.fixture
def models(tmp_path: Path, world: World) -> Path:
    """A folder with copies of a, b, c."""
    for name in "abc":
        shutil.copytree(getattr(world, name), tmp_path / name)
    return tmp_path


def given(store: Path, *folders: Path, measuring: Measuring = FAST, texts: Any = TEXTS, name: str = "local") -> Any:
    """The rewards (models, texts) of checkpoints, scored as units."""
    asked = [Asked(open_judge(folder), (texts,)) for folder in folders]
    found = score_all(asked, measuring, engine=name, store=store)
    return numpy.stack([one.rewards[0] for one in found])


def parts(store: Path) -> list[Path]:
    """The files of finished windows."""
    return sorted(store.glob("*/*/*.safetensors"))


def timeless(value: Any) -> Any:
    """Results without what differs between two runs of one command."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k not in ("command", "chosen")}
    if isinstance(value, list):
        return [timeless(entry) for entry in value if not str(entry).startswith("cost: ")]
    return value


# --- equal to one process ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_eval_gives_what_one_process_gives(world: World, tmp_path: Path, ran: Ran) -> None:
    """Every kind of row: members, start, half-way, average, beside, an earlier merge; changed answers; cut texts."""
    import warmerge

    warmerge.average([world.a, world.c], tmp_path / "warm")
    write_rows(tmp_path / "val.jsonl", pairs(16, 2))
    write_rows(tmp_path / "ood.jsonl", pairs(8, 3, words=12))
    asked: dict[str, Any] = {
        "checkpoints": [world.a, world.b, tmp_path / "warm"], "init": world.start,
        "beside": [f"harmful={world.harmful}"], "data": [f"val={tmp_path}/val.jsonl", f"ood={tmp_path}/ood.jsonl"],
        "perturb_answers": 5, "measuring": replace(FAST, loading=LoadOptions(max_length=14)),
    }  # fmt: skip
    for name in ("inline", "local"):
        evaluate(**asked, out=tmp_path / name, engine=name)
    found, expected = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("local", "inline"))
    assert timeless(found) == timeless(expected)
    assert expected["cut"]["ood"]["answer_cut"] > 0
    # a, b, warm, start, harmful, the average, two half-way; each in several units.
    assert len({unit.name for unit in ran}) == 8
    assert len(ran) > 2 * 8
    assert sorted(path.name for path in (tmp_path / "local").iterdir()) == sorted(
        path.name for path in (tmp_path / "inline").iterdir()
    )


def test_score_gives_what_one_process_gives(world: World, tmp_path: Path, ran: Ran) -> None:
    data = write_rows(tmp_path / "in.jsonl", pairs(40, 2))
    before = score_file(world.a, data, tmp_path / "inline.jsonl")
    after = score_file(world.a, data, tmp_path / "local.jsonl", engine="local")
    assert (tmp_path / "local.jsonl").read_bytes() == (tmp_path / "inline.jsonl").read_bytes()
    assert replace(after, out=before.out) == before
    assert len(ran) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "inline.jsonl", "local.jsonl"]


@pytest.mark.usefixtures("no_figures")
def test_bon_gives_what_one_process_gives(world: World, tmp_path: Path, ran: Ran) -> None:
    rows = [
        {"prompt": row["prompt"], "candidates": [row["chosen"], row["rejected"]], "gold": [1, 0]} for row in pairs(9, 1)
    ]
    data = write_rows(tmp_path / "pool.jsonl", rows)
    members = (str(world.a), str(world.b))
    proxies = [Proxy("a", "rm", members[:1]), Proxy("ens", "ensemble", members), Proxy("warm", "warm", members)]
    for name in ("inline", "local"):
        best_of_n(data, proxies, tmp_path / name, control=world.alien, measuring=FAST, engine=name)
    found, expected = (json.loads((tmp_path / name / "bon.json").read_text()) for name in ("local", "inline"))
    assert timeless(found) == timeless(expected)
    one, other = ((tmp_path / name / "chosen.jsonl").read_bytes() for name in ("inline", "local"))
    assert one == other
    assert {unit.name for unit in ran} == {str(world.a), str(world.b), str(world.alien), "warm"}
    assert not list((tmp_path / "local").glob(".*"))


def test_conversations_and_half_characters_arrive(tmp_path: Path, models: Path, ran: Ran) -> None:
    write_tokenizer(models / "a", template="{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    texts = [((user("why oak"),), (bot("warm"), user("how"), bot("rude"))), ("why", "warm\r\n"), ("", "kind")]
    assert numpy.array_equal(
        given(tmp_path / "s", models / "a", texts=texts),
        given(tmp_path / "s", models / "a", texts=texts, name="inline"),
    )
    texts += [("half \ud83d of one", "and \ud83d")]
    (window,) = write_windows(tmp_path / "texts", texts)
    assert read_window(tmp_path / "texts", window) == texts


def test_a_value_that_json_does_not_have_is_refused(tmp_path: Path, models: Path, ran: Ran) -> None:
    """It would be another text on the other side."""
    message = {"role": "assistant", "content": "warm", "names": ("oak", "elm")}
    with pytest.raises(RefusedError) as caught:
        given(tmp_path / "s", models / "a", texts=[("why", "warm"), ("why", (message,))])
    what = "holds a value that is no JSON, and cannot be sent to another process; --engine inline scores it"
    assert str(caught.value) == f"refused: text 2: {what}"
    assert ran == []


def test_one_model_by_two_names_is_scored_once(tmp_path: Path, models: Path, ran: Ran) -> None:
    """And so is a window that two lists have in common."""
    asked = [Asked(open_judge(models / "a"), (TEXTS, TEXTS[:4])), Asked(open_judge(f"{models}/b/../a"), (TEXTS,))]
    one, other = score_all(asked, FAST, engine="local", store=tmp_path / "s")
    assert numpy.array_equal(one.rewards[0], other.rewards[0])
    assert numpy.array_equal(one.rewards[1], one.rewards[0][:4])
    assert len(parts(tmp_path / "s")) == 4


def test_an_adapter_is_the_same_there(tmp_path: Path, models: Path, ran: Ran) -> None:
    from test_scorebook import adapter

    lora = adapter(models / "lora", models / "a")
    judges = [open_judge(lora, models / "c"), open_average("warm", [models / "b", lora], models / "c")]
    asked = [Asked(judge, (TEXTS,)) for judge in judges]
    found, expected = (
        [one.rewards[0] for one in score_all(asked, FAST, engine=name, store=tmp_path / "s")]
        for name in ("local", "inline")
    )
    assert numpy.array_equal(found, expected)
    config = lora / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 8}))
    again = [Asked(open_judge(lora, models / "c"), (TEXTS,))]
    assert not numpy.array_equal(
        next(score_all(again, FAST, engine="local", store=tmp_path / "s")).rewards[0], found[0]
    )


def test_auto_dtype_is_decided_once(tmp_path: Path, models: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is measured: two units must not come to two results."""
    path = models / "a" / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    measured: list[bool] = []

    def alternating() -> bool:
        measured.append(not measured)
        return measured[-1]

    monkeypatch.setattr(models_floor, "bfloat16_is_faster", alternating)
    (found,) = score_all([Asked(open_judge(models / "a"), (TEXTS,))], FAST, engine="local", store=tmp_path / "s")
    assert (found.computed, measured, len(ran)) == ("bfloat16 on cpu", [True], 2)


# --- what is finished is kept -----------------------------------------------------------------------------------------


def stopping_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[int]:
    """Counts the texts of each window that is scored; the window number `call` raises instead."""
    scored: list[int] = []

    def counting(model: Any, tokens: Any, *arguments: Any) -> Any:
        if len(scored) == call:
            raise error
        scored.append(len(tokens.texts))
        return scoring.score(model, tokens, *arguments)

    monkeypatch.setattr(child, "score", counting)
    return scored


def test_nothing_is_lost_and_nothing_done_twice(
    tmp_path: Path, models: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s"
    scored = stopping_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(WarmergeError, match=r"^3 of 4 parts failed; what is finished is kept, and the same command"):
        # Of the first unit's two windows both are done, of the second's one of two; b's are stopped at once.
        given(store, models / "a", models / "b")
    assert (scored, len(parts(store)), len(ran)) == ([4, 16, 16], 3, 4)
    before = {path: path.stat().st_mtime_ns for path in parts(store)}
    ran.clear()
    scored = stopping_at(monkeypatch, 99, KeyboardInterrupt())
    found = given(store, models / "a", models / "b")
    assert scored == [4, 4, 16, 16, 4]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ran.clear()
    again = given(store, models / "a", models / "b")
    assert (ran, len(scored)) == ([], 5)
    assert numpy.array_equal(found, again)
    assert numpy.array_equal(found, given(store, models / "a", models / "b", name="inline"))


@pytest.mark.parametrize("what", ["weights", "time", "tokenizer", "max_length", "texts"])
def test_what_is_of_other_inputs_is_not_used(tmp_path: Path, models: Path, ran: Ran, what: str) -> None:
    store, measuring, texts = tmp_path / "s", FAST, TEXTS
    given(store, models / "a")
    weights = models / "a" / "model.safetensors"
    if what == "weights":
        shutil.copy(models / "b" / "model.safetensors", weights)
    elif what == "time":
        os.utime(weights, ns=(1, 1))
    elif what == "tokenizer":
        write_tokenizer(models / "a", [*VOCABULARY[:3], *reversed(VOCABULARY[3:])])
    elif what == "max_length":
        measuring = replace(FAST, loading=LoadOptions(max_length=9))
    else:
        texts = [*TEXTS[:2], TEXTS[3], TEXTS[2], *TEXTS[4:]]
    ran.clear()
    found = given(store, models / "a", measuring=measuring, texts=texts)
    assert sum(len(read_part(unit.folder).windows) for unit in ran) == (1 if what == "texts" else 4)
    assert numpy.array_equal(found, given(store, models / "a", measuring=measuring, texts=texts, name="inline"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"),
        lambda path: shutil.copy(parts(path.parents[2])[-1], path),
    ],
)
def test_a_damaged_part_is_scored_again(tmp_path: Path, models: Path, ran: Ran, damage: Any) -> None:
    store = tmp_path / "s"
    found = given(store, models / "a")
    damage(parts(store)[0])
    ran.clear()
    assert numpy.array_equal(given(store, models / "a"), found)
    assert len(ran) == 1


def test_another_number_of_workers_goes_on_too(
    tmp_path: Path, models: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s"
    found = given(store, models / "a")
    parts(store)[1].unlink()
    parts(store)[-1].unlink()
    monkeypatch.setattr(units, "_LEAST", 1)
    monkeypatch.setattr(units, "_MOST", 1)
    ran.clear()
    assert numpy.array_equal(given(store, models / "a"), found)
    assert len(ran) == 2


def test_units_are_large_enough_and_enough(tmp_path: Path, models: Path) -> None:
    """Loading a model must not be paid for a few texts, and all of eight GPUs want something to do."""
    judge = open_judge(models / "a")
    part = units._part("key", judge, FAST)
    windows = [units.Window(f"{i:016}", len(window)) for i, window in enumerate(scoring.windows(60_000))]

    def sizes(count: int, slots: int) -> list[int]:
        made = units._units([replace(part, windows=tuple(windows[:count]))], tmp_path / str(time.time()), slots)
        return [sum(window.count for window in read_part(unit.folder).windows) for unit in made]

    assert sizes(2, 8) == [2304]
    assert sizes(6, 8) == [2304, 2048, 2048, 2048, 2048]
    assert sizes(len(windows), 1) == [33024, 26976]
    assert len(sizes(len(windows), 8)) == 8
    assert len(sizes(len(windows), 16)) == 15


# --- what must not be mixed -------------------------------------------------------------------------------------------


def elsewhere(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """Changes something between the driver and the unit, as another machine may have it."""
    inside = units.run_units

    def other_machine(asked: Sequence[Unit], **options: Any) -> list[Outcome]:
        change()
        return inside(asked, **options)

    monkeypatch.setattr(units, "run_units", other_machine)


SHARED = "machines of a cluster must share the folder, or hold the same files there"


@pytest.mark.usefixtures("ran")
def test_other_weights_under_the_same_path_give_no_number(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap() -> None:
        for one, other in (("a", "b"), ("c", "b")):
            shutil.copy(models / other / "model.safetensors", models / one / "model.safetensors")

    elsewhere(monkeypatch, swap)
    asked = [
        Asked(open_judge(models / "a"), (TEXTS,)),
        Asked(open_average("warm", [models / "b", models / "c"]), (TEXTS,)),
    ]
    with pytest.raises(RefusedError) as caught:
        list(score_all(asked, FAST, engine="local", store=tmp_path / "s"))
    assert [str(finding) for finding in caught.value.findings] == [
        f"{models / name}: has other weights on {HOST}, in {models / name}, than where the command was given; {SHARED}"
        for name in "ac"
    ]
    assert parts(tmp_path / "s") == []


@pytest.mark.parametrize("what", ["tokenizer", "config", "absent", "versions", "texts", "unit"])
@pytest.mark.usefixtures("ran")
def test_other_files_or_versions_give_no_number(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store, path = tmp_path / "s", models / "a"
    config = json.loads((path / "config.json").read_text())
    there = f"on {HOST}, in {path}, than where the command was given; {SHARED}"
    change: Callable[[], Any]
    if what == "tokenizer":
        change, message = (
            (lambda: write_tokenizer(path, VOCABULARY[::-1])),
            f"{path}: has another 'tokenizer.json' {there}",
        )
    elif what == "config":
        change = lambda: (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))  # noqa: E731
        message = f"{path}: has another 'config.json' {there}"
    elif what == "absent":
        change, message = (lambda: shutil.rmtree(path)), f"{path}: cannot be opened on {HOST} ("
    elif what == "versions":
        monkeypatch.setattr(child, "versions", lambda: units.versions() | {"torch": "1.0"})
        change = lambda: None  # noqa: E731
        message = f"{HOST}: has torch 1.0, not {torch.__version__.split('+')[0]}"
    elif what == "texts":
        change = lambda: [file.write_text("[]") for file in (store / "texts").iterdir()]  # noqa: E731
        message = "does not hold the texts that it is named after; delete it"
    else:
        change = lambda: [file.write_text("{}") for file in store.glob("*/*/unit.json")]  # noqa: E731
        message = "does not say what is to be scored ('format'); delete its folder, and give the same command again"
    elsewhere(monkeypatch, change)
    with pytest.raises(RefusedError) as caught:
        given(store, path)
    assert message in str(caught.value)
    assert parts(store) == []


@pytest.mark.usefixtures("ran")
def test_two_dtypes_in_one_model_are_refused(tmp_path: Path, models: Path) -> None:
    """As where --dtype auto meets a machine with a GPU and one without."""
    store = tmp_path / "s"
    given(store, models / "a")
    first = parts(store)[0]
    part = read_part(first.parent)
    window = next(window for window in part.windows if window.digest == first.stem)
    (found,) = find_scored(store, part.key, [window]).values()
    write_scored(first.parent, part.key, window, replace(found, computed="bfloat16 on cuda", machine="gpu-1"))
    with pytest.raises(RefusedError) as caught:
        given(store, models / "a")
    what = "was scored in different ways by different machines or runs: "
    assert str(caught.value) == (
        f"refused: {models / 'a'}: {what}bfloat16 on cuda ('gpu-1'); float32 on cpu ({HOST!r}); "
        "give --dtype and --device"
    )
    # And this is the way out.
    assert numpy.array_equal(
        given(store, models / "a", measuring=replace(FAST, loading=LoadOptions(dtype="float32"))),
        given(store, models / "a", name="inline"),
    )


@pytest.mark.usefixtures("ran")
def test_weights_that_change_after_they_were_opened_are_refused(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no sample is taken: units give other rewards, and these must not be kept for those of the first weights."""
    path, name = models / "a" / "model.safetensors", "model.embed_tokens.weight"

    def change() -> None:
        tensors = load_file(path)
        tensors[name].view(-1)[-60:] += 3
        save_file(tensors, path, metadata={"format": "pt"})

    elsewhere(monkeypatch, change)
    with pytest.raises(RefusedError, match=r"a/model\.safetensors: changed while it was read"):
        given(tmp_path / "s", models / "a", models / "b")
    assert {read_part(part.parent).label for part in parts(tmp_path / "s")} == {str(models / "b")}


def test_a_path_through_a_link_is_the_same_for_units(models: Path) -> None:
    (models / "disk" / "deep").mkdir(parents=True)
    (models / "link").symlink_to(models / "disk" / "deep")
    (models / "b").rename(models / "disk" / "a")
    assert Path(units._everywhere(f"{models}/link/../a")).samefile(models / "disk" / "a")


@pytest.mark.usefixtures("ran", "no_figures")
def test_eval_says_that_models_were_computed_in_different_ways(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one model's units meet a machine with a GPU, and the other's one without."""
    on_gpu, data = str(models / "a"), write_rows(tmp_path / "val.jsonl", pairs(4, 2))
    monkeypatch.setattr(child, "computed_in", lambda model: f"bfloat16 on {'cuda' if model.label == on_gpu else 'cpu'}")
    asked: dict[str, Any] = {"data": [data], "out": tmp_path / "out", "with_average": False, "measuring": FAST}
    found = evaluate([models / "a", models / "b"], engine="local", **asked)
    ways = "a: bfloat16 on cuda; b: bfloat16 on cpu"
    what = f"were computed in different precisions ({ways}); give --dtype and --device"
    assert found.warnings == (Finding("rewards", what),)


# --- commands that meet -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("other", ["model", "texts"])
def test_finished_parts_of_another_question_are_kept(tmp_path: Path, models: Path, other: str) -> None:
    """A long run was stopped; a quick look into the same results must not remove its hours."""
    store = unit_folder(tmp_path / SCORES)
    given(store, models / "b")
    long, texts = parts(store), TEXTS if other == "model" else TEXTS[1:9]
    quick = open_judge(models / ("a" if other == "model" else "b"))
    open_book(texts, "texts", FAST, tmp_path, engine="local").measure([quick])
    assert parts(store) == long
    assert {path.stem for path in (store / "texts").iterdir()} == {path.stem for path in long}
    remove_units([Asked(open_judge(models / "b"), (TEXTS,))], FAST, store)
    assert not store.exists()


@pytest.mark.usefixtures("ran")
def test_parts_that_another_command_removed(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command twice at once: who ends first removes the parts of both."""
    store, inside = tmp_path / "s", units.run_units

    def removed(asked: Sequence[Unit], **options: Any) -> list[Outcome]:
        outcomes = inside(asked, **options)
        shutil.rmtree(store)
        return outcomes

    monkeypatch.setattr(units, "run_units", removed)
    with pytest.raises(WarmergeError) as caught:
        given(store, models / "a")
    what = f"parts of {models / 'a'} that were finished are no longer in {store}: another command removed them"
    assert str(caught.value) == f"{what}; give this one again when that one has ended"
    elsewhere(monkeypatch, lambda: shutil.rmtree(store / "texts"))
    with pytest.raises(WarmergeError, match="is not there: another command removed it"):
        given(store, models / "a")


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_model_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, models: Path, ran: Ran, world: World
) -> None:
    store = tmp_path / "s"
    head = load_file(world.a / "model.safetensors")["score.weight"]
    with_head(world.a, models / "nan", head * torch.nan)
    with pytest.raises(RefusedError) as caught:
        given(store, models / "nan", models / "b")
    # The texts of the second unit are counted in the whole list.
    assert [str(finding) for finding in caught.value.findings] == [
        f"{models / 'nan'}: gives the reward nan to text {text}; its weights hold NaN or overflow its dtype"
        for text in (1, 21)
    ]
    assert len(parts(store)) == 4
    ran.clear()
    with pytest.raises(RefusedError):
        given(store, models / "nan", models / "b")
    assert {unit.name for unit in ran} == {str(models / "nan")}


def test_errors_of_several_kinds(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [
        ("killed by signal 9", 1, ()), ("killed by signal 9", 1, ()), ("refused: x: y", 3, (Finding("x", "y"),)),
    ]  # fmt: skip
    said: list[Any] = []

    def failing(asked: Sequence[Unit], **_: Any) -> list[Outcome]:
        return [Outcome(unit, "failed", *end) for unit, end in zip(asked, said, strict=True)]

    monkeypatch.setattr(units, "run_units", failing)
    monkeypatch.setattr(scoring, "_FIRST_WINDOW", 4)
    monkeypatch.setattr(scoring, "_WINDOW", 16)
    monkeypatch.setattr(units, "_LEAST", 16)
    monkeypatch.setattr(units, "_MOST", 16)
    said[:] = ends
    with pytest.raises(WarmergeError) as caught:
        given(tmp_path / "s", models / "a")
    kept = "what is finished is kept, and the same command tries these again"
    assert str(caught.value) == (
        f"3 of 3 parts failed; {kept}:\n  - {models / 'a'}: killed by signal 9\n  - {models / 'a'}: refused: x: y"
    )
    assert caught.value.exit_code == 1
    said[:] = [("--device cuda: there is no such GPU here", 2, ())] * 3
    with pytest.raises(
        UsageError, match=r"^3 of 3 parts failed; .*\n  - .*a: --device cuda: there is no such GPU here$"
    ):
        given(tmp_path / "s", models / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "slurm"}, "--engine: expected local, ray or inline, found 'slurm'"),
        ({"engine": "local", "out": None}, "--engine local: -o is missing; finished parts are kept beside the results"),
        ({"engine": "ray", "measuring": Measuring(threads=0)}, "--threads: expected 1 or more, found 0"),
        (
            {"engine": "local", "measuring": Measuring(loading=LoadOptions(device="cuda:1"))},
            "--device cuda:1: with --engine local each process has a GPU of its own; give --device cuda, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_engines_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Said before data are read, or a model is opened."""
    with pytest.raises(UsageError) as caught:
        evaluate(["nothing"], ["nothing.jsonl"], **{"out": tmp_path / "out", **options})
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_all_gpus_of_this_machine_are_used(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process each; none of them where --device says so."""
    asked: list[Any] = []

    def remembering(given: Sequence[Unit], **options: Any) -> list[Outcome]:
        asked.append((options["devices"], len(given)))
        raise KeyboardInterrupt

    monkeypatch.setattr(units, "run_units", remembering)
    monkeypatch.setattr(units, "visible_devices", lambda: ["0", "1", "2"])
    monkeypatch.setattr(units, "_LEAST", 1)
    monkeypatch.setattr(scoring, "_FIRST_WINDOW", 4)
    monkeypatch.setattr(scoring, "_WINDOW", 4)
    for device in ("auto", "cuda", "cpu"):
        with pytest.raises(KeyboardInterrupt):
            given(tmp_path / "s", models / "a", measuring=replace(FAST, loading=LoadOptions(device=device)))
    assert asked == [(["0", "1", "2"], 3), (["0", "1", "2"], 3), (["cpu"], 1)]


def test_progress_counts_what_is_left(tmp_path: Path, models: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_LOOK_SECONDS", 0.0)
    begun: list[int] = []
    done: list[int] = []
    measuring = replace(FAST, on_work=begun.append, progress=done.append)
    given(tmp_path / "s", models / "a", measuring=measuring)
    assert begun == [40]
    # Windows are counted once each; of the last one it is heard no more.
    assert sorted(done) in ([4, 16], [4, 4, 16], [4, 16, 16])
    given(tmp_path / "s", models / "a", measuring=measuring)
    assert begun == [40, 0]


# --- processes of their own -------------------------------------------------------------------------------------------

# What `score` does, with units that take their time, and say which process they are.
SLOW = """
import os, time
from warmerge.pipeline.scoring import child
scored = child.score

def slow(model, tokens, *rest):
    time.sleep(0.5)
    with open("windows", "a") as file:
        file.write(f"{tokens.first}\\n")
    return scored(model, tokens, *rest)

def run_part(folder, stop):
    child.score = slow
    with open("pids", "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\\n")
    child.run_part(folder, stop)
"""
DRIVER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import slow_parts
from pathlib import Path
from warmerge.errors import WarmergeError
from warmerge.pipeline.score import score_file
from warmerge.pipeline.scoring import units
from warmerge.rewards import scoring
units.run_part, units._LEAST, units._MOST = slow_parts.run_part, 20, 20
scoring._FIRST_WINDOW, scoring._WINDOW = 4, 16
try:
    score_file("a", "in.jsonl", Path("out.jsonl"), threads=1, **json.loads(sys.argv[1]))
except WarmergeError as error:
    print(error)
    sys.exit(error.exit_code)
"""
Drive = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def drive(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    """drive(engine="local") scores 40 answers in four windows and two units from a process that can be killed."""
    monkeypatch.chdir(models)
    write_rows(models / "in.jsonl", pairs(20, 1))
    (models / "slow_parts.py").write_text(SLOW)
    begun = []

    def start(**options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": str(models)},
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def pids() -> list[list[int]]:
    """The process of each unit that began, and its parent."""
    path = Path("pids")
    return [list(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def windows_scored() -> list[int]:
    return [int(line) for line in Path("windows").read_text().split()]


def check(models: Path, *, repeated: int) -> None:
    """The result is that of one process, with at most so many windows begun twice; nothing is left beside it."""
    score_file(models / "a", str(models / "in.jsonl"), models / "expected.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_FIRST_WINDOW", 4)
        patch.setattr(scoring, "_WINDOW", 16)
        score_file(models / "a", str(models / "in.jsonl"), models / "expected.jsonl", overwrite=True)
    assert (models / "out.jsonl").read_bytes() == (models / "expected.jsonl").read_bytes()
    assert set(windows_scored()) == {0, 4, 20, 36}
    assert len(windows_scored()) <= 4 + repeated
    assert not list(models.glob(".*"))


@pytest.mark.usefixtures("drive")
def test_a_killed_unit_is_said_and_the_same_command_goes_on(
    models: Path, many_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(models)
    monkeypatch.setattr(units, "run_part", importlib.import_module("slow_parts").run_part)
    monkeypatch.setattr(units, "_MOST", 40)
    killed: list[int] = []
    inside = units.run_units

    def killing(asked: Sequence[Unit], **options: Any) -> list[Outcome]:
        def look() -> None:
            if parts(store) and not killed:
                killed.append(pids()[0][0])
                os.kill(killed[0], signal.SIGKILL)

        return inside(asked, **{**options, "while_waiting": look})

    monkeypatch.setattr(units, "run_units", killing)
    store, command = models / ".out.jsonl.units", {"engine": "local", "threads": 1}
    with pytest.raises(WarmergeError) as caught:
        score_file("a", "in.jsonl", "out.jsonl", **command)
    assert str(caught.value).startswith(
        "1 of 1 part failed; what is finished is kept, and the same command tries these again:\n  - a: killed by "
        "signal 9, as the kernel does when the machine runs out of memory; try a smaller --batch-tokens (see "
    )
    score_file("a", "in.jsonl", "out.jsonl", **command)
    check(models, repeated=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver(models: Path, drive: Drive) -> None:
    """With SIGKILL; then the same command."""
    first = drive(engine="local")
    store = models / ".out.jsonl.units"
    wait_for(lambda: parts(store), 120)
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(own) for own, _ in pids()), 60)
    kept = {path: path.stat().st_mtime_ns for path in parts(store)}
    assert drive(engine="local").communicate(timeout=200) == ("", "")
    assert kept
    check(models, repeated=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_and_the_same_command_again(models: Path, drive: Drive) -> None:
    first = drive(engine="local")
    store = models / ".out.jsonl.units"
    wait_for(lambda: parts(store), 120)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=200)
    assert (first.returncode, out) == (
        130,
        "stopped; 0 of 2 are finished and kept; the same command goes on, "
        "with those that had begun from their last checkpoint\n",
    )
    assert not any(alive(own) for own, _ in pids())
    assert drive(engine="local").communicate(timeout=200) == ("", "")
    check(models, repeated=1)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two processors on this machine."""
    code = tmp_path_factory.mktemp("code")
    (code / "slow_parts.py").write_text(SLOW)
    with head_of_a_cluster(code) as address:
        yield address


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_on_ray_give_what_one_process_gives(models: Path, world: World, cluster: str) -> None:
    """As users type them, with --threads 1."""
    rows = [{"prompt": row["prompt"], "candidates": [row["chosen"], row["rejected"]]} for row in pairs(9, 1)]
    write_rows(models / "pool.jsonl", rows)
    write_rows(models / "val.jsonl", pairs(200, 2))
    shutil.copytree(world.start, models / "start")
    commands = {
        "eval": [
            "eval",
            "a",
            "b",
            "c",
            "--init",
            "start",
            "--data",
            "val.jsonl",
            "--perturb",
            "5",
            "--resamples",
            "100",
        ],
        "bon": ["bon", "--pool", "pool.jsonl", "--rm", "a", "--warm", "w=a,b", "--control", "c", "--resamples", "100"],
        "score": ["score", "a", "--data", "val.jsonl"],
    }
    for name, command in commands.items():
        for where in ("inline", "ray"):
            out = f"{name}-{where}" + (".jsonl" if name == "score" else "")
            options = [
                "--engine",
                where,
                *(["--address", cluster] if where == "ray" else []),
                "--threads",
                "1",
                "-o",
                out,
            ]
            line = [sys.executable, "-W", "error", "-m", "warmerge", *command, *options]
            done = subprocess.run(line, cwd=models, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        if name == "score":
            assert (models / "score-ray.jsonl").read_bytes() == (models / "score-inline.jsonl").read_bytes()
            continue
        found, expected = (
            json.loads((models / f"{name}-{where}/{name}.json").read_text()) for where in ("ray", "inline")
        )
        assert timeless(found) == timeless(expected)
    assert not list(models.glob(".*")) + list(models.glob("*/.*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_ray_worker_and_a_killed_driver(models: Path, drive: Drive, cluster: str) -> None:
    first = drive(engine="ray", address=cluster)
    store = models / ".out.jsonl.units"
    wait_for(lambda: parts(store), 200)
    own, worker = pids()[0]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(own), 20)
    wait_for(lambda: len(parts(store)) > 1, 200)
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(own) for own, _ in pids()), 30)
    kept = {path: path.stat().st_mtime_ns for path in parts(store)}
    done = drive(engine="ray", address=cluster)
    out, _ = done.communicate(timeout=200)
    assert (done.returncode, out) == (0, "")
    assert len(kept) >= 2
    # One window each at most for the worker, and for the two units that the driver took with it.
    check(models, repeated=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ray_worker_dies_and_the_command_goes_on(models: Path, drive: Drive, cluster: str) -> None:
    process = drive(engine="ray", address=cluster)
    wait_for(lambda: parts(models / ".out.jsonl.units"), 200)
    os.kill(pids()[0][1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (0, ""), err
    assert len(pids()) == 3
    check(models, repeated=1)
