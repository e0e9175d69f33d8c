"""eval, lmc-curve, score, plot and average --select as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from reward_world import World, pairs, write_rows
from safetensors.torch import load_file
from test_cli import Done, here, run

import warmerge
from warmerge.rewards.bench import Bench

QUICK = ("--resamples", "100")


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


@pytest.fixture
def models(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of a, b and val, by short names."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in processes of their own as in this one: models this small only wait
    for name in ("a", "b"):
        shutil.copytree(getattr(world, name), tmp_path / name)
    shutil.copy(world.data("val"), tmp_path / "val.jsonl")
    return tmp_path


# --- processes of their own ---


def test_eval_in_a_process_of_its_own(models: Path) -> None:
    done = run("eval", "a", "b", "--data", "val.jsonl", "-o", "out", *QUICK, cwd=models)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[1] == "val: n = 160 comparisons of 80 prompts"
    content = json.loads((models / "out" / "eval.json").read_text())
    assert content["command"] == ["warmerge", "eval", "a", "b", "--data", "val.jsonl", "-o", "out", *QUICK]
    for row in content["rows"]:
        shown = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        (line,) = (line for line in lines if line.startswith(f" {row['model']}  ") and shown in line)
        assert f" {row['ties']} " in line
    for row in content["differences"]:
        shown = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        assert any(line.startswith(f" {row['b']}  ") and shown in line for line in lines)
    assert lines[-1] == "intervals: percentile bootstrap over prompts, 100 resamples, seed 0; a tie counts as right"


def test_lmc_curve_and_plot_in_processes_of_their_own(models: Path) -> None:
    done = run("lmc-curve", "a", "b", "--data", "val.jsonl", "-o", "lmc", "--points", "3", *QUICK, cwd=models)
    assert (done.code, done.err) == (0, "")
    content = json.loads((models / "lmc" / "curve.json").read_text())
    assert content["verdicts"][0]["words"] in done.out.splitlines()
    assert re.search(r"^ a -> b +val +160 +WA +[▁▂▃▄▅▆▇█]{3} +0\.\d{3} +0\.\d{3} +0\.\d{3} *$", done.out, re.M)
    before = (models / "lmc" / "curve.svg").read_bytes()
    drawn = run("plot", "lmc", cwd=models)
    assert drawn == Done(0, "lmc/curve.png\nlmc/curve.svg\n", "")
    assert (models / "lmc" / "curve.svg").read_bytes() == before


# --- eval ---


def test_threads_are_those_of_scoring_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    done = here("eval", models / "a", "--data", models / "val.jsonl", "--threads", "3", *QUICK)
    assert (done.code, set_to[0]) == (0, 3)
    done = here("eval", models / "a", "--data", models / "val.jsonl", "--threads", "0", *QUICK)
    assert (done.code, done.err) == (2, "warmerge: --threads: expected 1 or more, found 0\n")


def test_eval_json_is_one_object(models: Path) -> None:
    done = here("eval", models / "a", models / "b", "--data", f"v={models / 'val.jsonl'}", "--json", *QUICK)
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert (done.code, done.err) == (0, "")
    assert {row["set"] for row in found["rows"]} == {"v"}
    assert found["notes"] == ["the best member is picked on the very set that it is reported on, which flatters it"]


def test_eval_with_everything(models: Path, world: World) -> None:
    (models / "mask.json").write_text("{}")
    train = warmerge.evaluate([models / "a"], [world.data("train")]).record["sets"][0]
    mask = {"fingerprint": train["fingerprint"], "n": train["n"], "swapped": list(range(0, 500, 3))}
    (models / "mask.json").write_text(json.dumps(mask))
    done = here(
        "eval", models / "a", models / "b", "--init", world.start, "--perturb", "4", "--mask", models / "mask.json",
        "--data", f"train={world.data('train')}", "--data", f"val={models / 'val.jsonl'}", "--max-length", "11", *QUICK,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^train\[swapped\]: n = 167 comparisons of \d+ prompts$", done.out, re.M)
    assert "The average's accuracy minus that of:" in done.out
    assert re.search(r"^ mean of the half-way models +[+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", done.out, re.M)
    assert "Small changes of answers move the reward by so much of its standard deviation (mean [95 %]):" in done.out
    assert re.search(r"^ all \(n = \d+\) +\d\.\d{3} \[", done.out, re.M)
    assert re.search(
        r"^note: train: of \d+ texts \d+ lost the beginning of their prompt and \d+ the end", done.out, re.M
    )
    assert "they did not memorise label noise" in done.out


def test_eval_beside(models: Path, world: World) -> None:
    common = ["--data", f"v={models / 'val.jsonl'}", *QUICK]
    done = here("eval", models / "a", models / "b", "--beside", f"long={world.c}", "--beside", world.alien, *common)
    assert (done.code, done.err) == (0, "")
    for name in ("long", "alien"):
        assert len(re.findall(rf"^ {name}  .*\[[+-]?0\.", done.out, re.M)) == 2  # its accuracy, its difference
    done = here("eval", models / "a", models / "b", "--beside", world.start, *common)
    assert done == Done(
        2, "", "warmerge: --beside: the table has a row 'start' of something else; "
        f"name {world.start} otherwise, as in other={world.start}\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "A"], "--data is missing: preference pairs, as NAME=PATH or PATH"),
        (["lmc-curve", "A", "B", "-o", "O"], "--data is missing: preference pairs, as NAME=PATH or PATH"),
        (["lmc-curve", "A", "B", "--data", "V"], "-o OUT is missing: the folder for rows and figures"),
        (["eval", "A", "--data", "V", "--resamples", "9"], "--resamples: expected 100 or more, found 9"),
        (["eval", "A", "--data", "V", "--seed", "-1"], "--seed: expected 0 or more, found -1"),
        (["eval", "A", "--data", "V", "--batch-tokens", "0"], "--batch-tokens: expected 1 or more, found 0"),
        (["eval", "A", "--data", "V", "--limit", "0"], "--limit: expected 1 or more, found 0"),
        (["eval", "A", "--data", "V", "--perturb", "-3"], "--perturb: expected a number of answers, found -3"),
        (["score", "A", "--data", "V", "-o", "o.jsonl", "--batch-tokens", "0"], "--batch-tokens: expected 1 or more"),
        (["lmc-curve", "A", "B", "--data", "V", "-o", "O", "--order", "greedy"],
         "--order and --select-data go with --accuracy-vs-m"),
        (["lmc-curve", "A", "B", "--data", "V", "-o", "O", "--accuracy-vs-m", "--points", "5"],
         "--points, --lambdas, --extrapolate, --path and --tolerance do not go with --accuracy-vs-m"),
        (["lmc-curve", "A", "B", "--data", "V", "-o", "O", "--lambdas", "0,x"],
         "--lambdas: expected numbers with commas between them, found '0,x'"),
        (["eval", "A", "--data", "V", "-o", "O", "--engine", "slurm"], "--engine: expected local, ray or inline"),
        (["eval", "A", "--data", "V", "--engine", "local"], "--engine local: -o is missing; finished parts are kept"),
        (["score", "A", "--data", "V", "-o", "O.jsonl", "--engine", "local", "--device", "cuda:1"],
         "--device cuda:1: with --engine local each process has a GPU of its own; give --device cuda, and choose GPUs"),
        (["score", "A", "--data", "V", "-o", "O.jsonl", "--threads", "0"], "--threads: expected 1 or more, found 0"),
        (["plot", "A"], "A: no results to draw; expected one of eval.json, curve.json, vs_m.json"),
        (["average", "A", "B", "-o", "O", "--select", "greedy"], "--select and --data go together"),
        (["average", "A", "B", "--select", "greedy", "--data", "V"], "-o OUT is missing: the new folder for"),
        (["average", "A", "B", "-o", "A", "--select", "greedy", "--data", "V"], "is, lies in, or holds the input"),
        (["average", "A", "B", "-o", "FULL", "--select", "best:2", "--data", "V"], "FULL exists and is not empty;"),
        (["average", "A", "B", "-o", "O", "--select", "best:9", "--data", "V"], "--select: expected best:M with M"),
        (["average", "A", "B", "-o", "O", "--select", "best:2", "--data", "V", "--rule", "lambda", "--lambda", "0.1"],
         "--lambda goes by position, which --select changes: select first, then merge those"),
        (["average", "A", "B", "-o", "O", "--max-length", "9"], "--max-length is for --select: a merge has no texts"),
    ],
)  # fmt: skip
def test_usage_errors_come_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    for module in ("judge", "mixtures"):
        monkeypatch.setattr(f"warmerge.pipeline.scoring.{module}.load_reward_model", never)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    places = {"A": str(world.a), "B": str(world.b), "V": world.data("val"), "O": str(tmp_path / "o"), "FULL": str(full)}
    done = here(*(places.get(argument, argument) for argument in arguments))
    assert (done.code, done.out) == (2, "")
    assert re.sub(r"\bFULL\b|\bA\b(?=:)", lambda found: places[found[0]], message) in done.err
    assert done.err.startswith("warmerge: ")
    assert len(done.err.splitlines()) == 1


# --- lmc-curve ---


def test_ctrl_c_and_the_same_command_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["lmc-curve", models / "a", models / "b", "--data", models / "val.jsonl", "--points", "5", *QUICK, "-o"]
    whole = here(*command, models / "whole")
    original, calls = Bench.score, []

    def stopping(self: Bench, model: Any) -> Any:
        calls.append(model.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(Bench, "score", stopping)
    out = models / "out"
    stopped = here(*command, out)
    message = f"warmerge: stopped; 3 points are kept in {out}; the same command goes on there\n"
    assert stopped == Done(130, "", message)
    again = here(*command, out)
    assert (again.code, again.err) == (0, "")
    assert len(calls) == 4 + 2
    assert again.out == whole.out
    for name in ("curve.csv", "curve-verdicts.csv", "curve.png", "curve.svg"):
        assert (out / name).read_bytes() == (models / "whole" / name).read_bytes()
    assert (
        here(*command, out).err == f"warmerge: {out} holds curve.json already; choose another -o, or add --overwrite\n"
    )


def test_accuracy_against_m(models: Path, world: World) -> None:
    arguments = ["lmc-curve", models / "a", models / "b", world.harmful, "--accuracy-vs-m", "--order", "greedy", *QUICK]
    done = here(*arguments, "--data", models / "val.jsonl", "-o", models / "m")
    assert done.code == 0
    assert done.err.startswith(
        "warning: val: members are ranked and reported on the same set, which overstates every M"
    )
    content = json.loads((models / "m" / "vs_m.json").read_text())
    for row in content["rows"]:
        pattern = rf"^ {row['m']} +{row['added']} +{row['single']:.3f} +{row['wa']:.3f} \[{row['wa_low']:.3f}, "
        assert re.search(pattern, done.out, re.M)
    assert f"left out: {', '.join(content['left_out'])}" in done.out
    assert "harmful" in content["left_out"]


# --- average --select ---


@pytest.mark.parametrize("selection", ["best:2", "greedy"])
def test_a_selection_is_averaged_as_by_hand(world: World, tmp_path: Path, selection: str) -> None:
    members = [world.harmful, world.b, world.a, world.c]
    done = here("average", *members, "-o", tmp_path / "warm", "--select", selection, "--data", world.data("ood"))
    assert (done.code, done.out) == (0, f"{tmp_path / 'warm'}\n")
    chosen = json.loads((tmp_path / "warm" / "warmerge.json").read_text())["selection"]
    kept = [member for member in members if str(member) in chosen["kept"]]
    assert chosen["kept"] == [str(member) for member in kept]
    assert 2 <= len(kept) < 4
    assert world.harmful not in kept
    assert f"selected {len(kept)} of 4: {', '.join(chosen['kept'])}" in done.err
    assert (chosen["selection"], chosen["sets"][0]["n"]) == (selection, 100)
    assert here("average", *kept, "-o", tmp_path / "by-hand").code == 0
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("warm", "by-hand"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert load_file(ours).keys() == load_file(world.a / "model.safetensors").keys()


# --- score ---


def test_score_refuses_or_counts_bad_rows(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    write_rows(models / "in.jsonl", [{"prompt": "why", "completion": "clear"}, {"prompt": "why"}])
    done = here("score", "a", "--data", "in.jsonl", "-o", "out.jsonl")
    assert (done.code, done.out) == (3, "")
    assert done.err.splitlines() == [
        "warmerge: refused, 2 findings:",
        "  - in.jsonl:2: has the columns 'prompt'; expected chosen and rejected; prompt and candidates; prompt and one "
        "of completion, response, answer, output; text",
        "  - in.jsonl: --skip-bad-rows leaves bad rows out and counts them",
    ]
    done = here("score", "a", "--data", "in.jsonl", "-o", "out.jsonl", "--skip-bad-rows")
    assert done == Done(0, "out.jsonl\n", "note: 1 bad rows were left out\n")
    assert list(json.loads((models / "out.jsonl").read_text())) == ["prompt", "completion", "reward"]


def test_score_json(models: Path) -> None:
    done = here("score", models / "a", "--data", models / "val.jsonl", "-o", models / "s.jsonl.gz", "--json")
    assert json.loads(done.out) == {
        "out": str(models / "s.jsonl.gz"), "rows": 160, "answers": 320, "prompt_cut": 0, "answer_cut": 0, "skipped": 0,
        "warnings": [],
    }  # fmt: skip
    assert (done.code, done.err) == (0, "")


# --- names that would do something ---


def test_hostile_names_are_shown_safely(world: World, tmp_path: Path) -> None:
    names = ["[red]a", "b\x1b[31m", ":smile:"]
    for name, source in zip(names, (world.a, world.b, world.c), strict=True):
        shutil.copytree(source, tmp_path / name)
    data = write_rows(tmp_path / "v.jsonl", [*pairs(12, 1), {"prompt": 1}])
    members = [tmp_path / name for name in names]
    common = ["--data", f"[bold]\x1b[0m:fire:={data}", "--skip-bad-rows", *QUICK]
    done = here("eval", *members, *common, "--perturb", "2", "-o", tmp_path / "out")
    assert done.code == 0
    for argument in ("lmc-curve", "vs-m"):
        extra = ["--accuracy-vs-m"] if argument == "vs-m" else ["--points", "3"]
        more = here("lmc-curve", *members, *common, *extra, "-o", tmp_path / argument)
        assert more.code == 0
        done = Done(0, done.out + more.out, done.err + more.err)
    assert "\x1b" not in done.out + done.err
    assert not set("\U0001f525\U0001f603\U0001f604") & set(done.out)  # rich's :fire: and :smile:
    for shown in ("[red]a", r"'b\x1b[31m'", ":smile:", r"'[bold]\x1b[0m:fire:': n = 12 comparisons of 6 prompts"):
        assert shown in done.out
    assert r"note: '[bold]\x1b[0m:fire:': 1 bad rows were left out" in done.out
    redrawn = here("plot", tmp_path / "out")
    assert (redrawn.code, redrawn.err) == (0, "")


def test_a_wide_table_loses_nothing_in_a_pipe(world: World, tmp_path: Path) -> None:
    members = [tmp_path / f"{'a-very-long-name-of-a-run-' * 5}{i}" for i in range(3)]
    for member, source in zip(members, (world.a, world.b, world.c), strict=True):
        shutil.copytree(source, member)
    done = here("eval", *members, "--data", write_rows(tmp_path / "v.jsonl", pairs(12, 1)), "--perturb", "2", *QUICK)
    assert done.code == 0
    (header,) = (line for line in done.out.splitlines() if line.startswith(" change "))
    assert all(member.name in header for member in members)
