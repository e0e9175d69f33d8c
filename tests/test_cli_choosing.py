"""bon as a user runs it."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
from reward_world import BAD, GOOD, NAMES, World, write_rows
from safetensors.torch import load_file, save_file
from test_cli import Done, cells, here, run

from warmerge.pipeline.scoring import here as scoring_here
from warmerge.pipeline.scoring import judge
from warmerge.report import results
from warmerge.rewards.scoring import score

QUICK = ("--resamples", "100")
CHOICES = "choices of a: "


def pool(count: int = 12, n: int = 4) -> list[dict[str, Any]]:
    """Gold is what a good model thinks: good words less bad ones. No two candidates of a prompt are alike."""
    random = numpy.random.default_rng(3)
    rows = []
    for i in range(count):
        words = [[str(random.choice(GOOD if random.random() < 0.5 else BAD)) for _ in range(4)] for _ in range(n)]
        gold = [sum(word in GOOD for word in answer) + 0.01 * j for j, answer in enumerate(words)]
        candidates = [" ".join([*answer, NAMES[j]]) for j, answer in enumerate(words)]
        rows.append({"prompt": f"why {NAMES[i]}", "candidates": candidates, "gold": gold})
    return rows


@pytest.fixture
def models(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with copies of a, b, alien, and a pool, by short names."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "alien"):
        shutil.copytree(getattr(world, name), tmp_path / name)
    write_rows(tmp_path / "pool.jsonl", pool())
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a small run; where results are the question, nothing is drawn."""
    monkeypatch.setitem(results._FIGURES, results.BON, (lambda *_: [], ("rows", "wins")))


# --- processes of their own -------------------------------------------------------------------------------------------


def test_a_pool_in_a_process_of_its_own(models: Path) -> None:
    arguments = (
        "bon", "--pool", "pool.jsonl", "--rm", "a", "--ensemble", "ens=a,b", "--warm", "warm=a,b", "--control", "alien",
        "-o", "out", *QUICK,
    )  # fmt: skip
    done = run(*arguments, cwd=models)
    assert (done.code, done.err) == (0, "48 texts, 4 models: 192 rewards to compute\n")
    content = json.loads((models / "out" / "bon.json").read_text(), parse_constant=pytest.fail)
    assert content["command"] == ["warmerge", *arguments]
    lines = done.out.splitlines()
    assert lines[1] == "best of n = 4, 12 prompts, 48 candidates"
    last = {row["proxy"]: row for row in content["rows"] if row["n"] == 4}
    assert list(last) == ["a", "ens", "warm", "length", "random", "oracle"]
    minus = {(row["target"], row["proxy"]): row for row in content["differences"] if row["n"] == 4}
    for target in ("gold", "control"):
        header = next(i for i, line in enumerate(lines) if f" {target} at 4 [95 %]" in line)
        shown = {cells(line)[0]: cells(line) for line in lines[header + 2 : header + 2 + len(last)]}
        assert list(shown) == list(last)
        for name, row in last.items():
            value = f"{row[target]:.3f} [{row[f'{target}_low']:.3f}, {row[f'{target}_high']:.3f}]"
            assert shown[name][2] == value
            assert re.fullmatch("[▁▂▃▄▅▆▇█]{4}", shown[name][1])
            if name != "a":
                found = minus[target, name]
                assert shown[name][3] == f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
            if target == "gold":
                assert f"{row['win']:.3f} [{row['win_low']:.3f}, {row['win_high']:.3f}]" in shown[name]
                assert shown[name][-1] == f"{row['regret']:.3f} [{row['regret_low']:.3f}, {row['regret_high']:.3f}]"
    # What it costs, in the table and in the note.
    costs = {
        cells(line)[0]: cells(line)[1] for line in lines[lines.index("") + 1 :] if re.match(r" \w+ +\d+ +\d", line)
    }
    assert costs == {"a": "48", "ens": "96", "warm": "48"}
    assert content["notes"] == [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert lines[-2:] == [
        "intervals: percentile bootstrap over prompts, 100 resamples, seed 0",
        "choices of warm: out/chosen.jsonl",
    ]
    drawn = ["bon.png", "bon.svg", "bon-wins.png", "bon-wins.svg"]
    before = {name: (models / "out" / name).read_bytes() for name in drawn}
    for name in drawn:
        (models / "out" / name).unlink()
    assert here("plot", "out").out.split() == [f"out/{name}" for name in drawn]
    assert {name: (models / "out" / name).read_bytes() for name in drawn} == before


def inside(*arguments: str, cwd: Path) -> Done:
    """As `run`, within this process: seconds less."""
    return here(*arguments)


@pytest.mark.parametrize("how", [inside, pytest.param(run, marks=pytest.mark.slow)])
def test_a_policy_and_then_its_pool(models: Path, how: Any) -> None:
    causal_models.write(models / "policy")
    prompts = [{"prompt": prompt} for prompt in ("Say it.", "What is the sea?", "Say it.", "x" * 300)]
    write_rows(models / "prompts.jsonl", prompts)
    arguments = (
        "bon", "--policy", "policy", "--prompts", "prompts.jsonl", "-n", "4", "--max-new-tokens", "6", "--rm", "a",
        "--warm", "a,b", "--control", "alien", "--skip-bad-rows", "--max-length", "20", "-o", "out/new", *QUICK,
    )  # fmt: skip
    done = how(*arguments, cwd=models)
    assert done.code == 0
    rows = [json.loads(line) for line in (models / "out/new/pool.jsonl").read_text().splitlines()]
    assert [(row["prompt"], len(row["candidates"])) for row in rows] == [("Say it.", 4), ("What is the sea?", 4)]
    content = json.loads((models / "out/new/bon.json").read_text(), parse_constant=pytest.fail)
    assert content["notes"][:2] == [
        "1 prompt not asked: bad rows, or too long for the policy", "1 row of a prompt that was asked already"
    ]  # fmt: skip
    messages = done.err.splitlines()
    assert messages[0] == "sampling 4 answers of policy to each prompt of prompts.jsonl"
    assert re.fullmatch(r"\d texts, 3 models: \d+ rewards to compute", messages[1])
    assert all(message.startswith("warning: ") for message in messages[2:])
    assert f"warning: {content['warnings'][0]}" in messages
    said = [warning for warning in content["warnings"] if "answers were cut at 6 tokens" in warning]
    assert len(said) == 1
    assert said[0].startswith("out/new/pool.jsonl: ")
    chosen = [json.loads(line) for line in (models / "out/new/chosen.jsonl").read_text().splitlines()]
    assert all(line["chosen"] == row["candidates"][line["index"]] for line, row in zip(chosen, rows, strict=True))
    assert {line["proxy"] for line in chosen} == {"warm"}
    assert sorted(path.name for path in (models / "out/new").glob("*.svg")) == ["bon-wins.svg", "bon.svg"]
    # The pool that was sampled is a pool as any other.
    again = here(
        "bon", "--pool", "out/new/pool.jsonl", "--rm", "a", "--warm", "a,b", "--control", "alien", "--max-length", "20",
        "-o", "out/new", "--overwrite", *QUICK,
    )  # fmt: skip
    assert again.code == 0
    assert again.err.splitlines()[0].endswith(": all rewards are kept from an earlier run")
    redone = json.loads((models / "out/new/bon.json").read_text())
    assert redone["rows"] == content["rows"]


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_json_is_one_object(models: Path) -> None:
    write_rows(models / "one.jsonl", pool(1))
    done = here("bon", "--pool", "one.jsonl", "--rm", "a", "-o", "out", "--json", *QUICK)
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert done.code == 0
    assert found["rows"][0]["gold_low"] is None
    assert found == json.loads((models / "out" / "bon.json").read_text())
    assert done.err.splitlines() == [
        "4 texts, 1 model: 4 rewards to compute",
        "warning: one.jsonl: has one prompt: there are no intervals",
    ]


@pytest.mark.usefixtures("no_figures")
def test_beliefs_alone_are_printed_as_such(models: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "candidates")} for row in pool()]
    write_rows(models / "pool.jsonl", rows)
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "--rm", "b", "-o", "out", *QUICK)
    assert done.code == 0
    assert "own reward at 4, in std above the pool's mean [95 %]" in done.out
    for word in ("gold at", "control at", "beats a random one", "regret"):
        assert word not in done.out
    content = json.loads((models / "out" / "bon.json").read_text())
    (row,) = (row for row in content["rows"] if (row["proxy"], row["n"]) == ("b", 4))
    assert re.search(rf"^ b +{row['gain']:.3f} \[{row['gain_low']:.3f}, ", done.out, re.M)
    assert (
        "note: no gold and no --control: only what proxies think of their choices is known, not what these are worth"
    ) in done.out.splitlines()


@pytest.mark.usefixtures("no_figures")
def test_fits_are_printed_where_there_are_enough_points(models: Path) -> None:
    write_rows(models / "pool.jsonl", pool(n=8))
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "-o", "out", *QUICK)
    content = json.loads((models / "out" / "bon.json").read_text())
    assert "Gao's gold(n) - gold(1) = d (alpha - beta d), d = sqrt(log n - (n-1)/n):" in done.out
    row = content["fits"][0]
    shown = [f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" for key in ("alpha", "beta")]
    assert ["a", "gold", *shown, f"{row['rms']:.3f}"] in [cells(line) for line in done.out.splitlines()]


@pytest.mark.usefixtures("no_figures")
def test_hostile_names_are_shown_safely(models: Path) -> None:
    names = ["[red]a", "b\x1b[31m", ":fire:"]
    for name, source in zip(names, ("a", "b", "alien"), strict=True):
        shutil.copytree(models / source, models / name)
    shutil.copy(models / "pool.jsonl", models / "po\x1b[0mol.jsonl")
    done = here(
        "bon", "--pool", "po\x1b[0mol.jsonl", "--rm", names[1], "--rm", names[0], "--control", ":fire:", "-n", "9",
        "--warm", f"x\x1b[1m={names[0]},{names[1]}", "-o", "o\x1b[2mut", *QUICK,
    )  # fmt: skip
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "\U0001f525" not in done.out
    for shown in ("[red]a", r"'b\x1b[31m'", r"minus 'b\x1b[31m' [95 %]", r"choices of 'x\x1b[1m': 'o\x1b[2mut/chosen"):
        assert shown in done.out
    assert r"warning: 'po\x1b[0mol.jsonl': has 4 candidates for a prompt, so n ends there, not at 9" in done.err


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_and_the_same_command_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bon", "--pool", "pool.jsonl", "--rm", "a", "--rm", "b", *QUICK, "-o"]
    whole = here(*command, "whole")
    scored: list[str] = []

    def stopping(model: Any, *arguments: Any) -> Any:
        scored.append(model.label)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score(model, *arguments)

    monkeypatch.setattr(scoring_here, "score", stopping)
    stopped = here(*command, "out")
    message = (
        "warmerge: stopped; the rewards of 1 model are kept in out/scores.safetensors; the same command goes on there"
    )
    assert stopped == Done(130, "", f"48 texts, 2 models: 96 rewards to compute\n{message}\n")
    again = here(*command, "out")
    assert (again.code, again.err) == (0, "48 texts, 2 models: 48 rewards to compute\n")
    assert scored == ["a", "b", "b"]
    timeless = [re.sub(r" \d+\.\d  |out/|whole/", " ", text) for text in (again.out, whole.out)]
    assert timeless[0] == timeless[1]
    for name in ("bon.csv", "bon-wins.csv", "bon-differences.csv", "chosen.jsonl"):
        assert (models / "out" / name).read_bytes() == (models / "whole" / name).read_bytes()
    refused = here(*command, "out")
    assert refused == Done(2, "", "warmerge: out holds bon.json already; choose another -o, or add --overwrite\n")


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_after_sampling_keeps_the_pool(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(models / "prompts.jsonl", [{"prompt": "Say it."}, {"prompt": "What is the sea?"}])
    command = [
        "bon", "--policy", causal_models.folder(), "--prompts", "prompts.jsonl", "-n", "3", "--max-new-tokens", "4",
        "--rm", "a", "-o", "out", *QUICK,
    ]  # fmt: skip
    with monkeypatch.context() as patch:

        def stopped(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(scoring_here, "score", stopped)
        done = here(*command)
    assert (done.code, done.out, done.err.splitlines()[-1]) == (130, "", "warmerge: stopped; nothing is kept")
    before = (models / "out" / "pool.jsonl").stat()
    assert here(*command).code == 0
    after = (models / "out" / "pool.jsonl").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert (models / "out" / "bon.json").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-n 0 --rm a", "-n: expected 1 or more, found 0"),
        ("-n -2 --rm a", "-n: expected 1 or more, found -2"),
        ("", "no proxy is given: name reward models with --rm, --ensemble or --warm"),
        ("--rm a --choose b", "--choose: expected one of 'a', found 'b'"),
        ("--rm a --choose random", "--choose: expected one of 'a', found 'random'"),
        ("--rm a --min-candidates 5", "--min-candidates 5: no prompt of pool.jsonl has more than 4"),
        ("--rm a --limit 0", "--limit: expected 1 or more, found 0"),
        ("--rm a --resamples 9", "--resamples: expected 100 or more, found 9"),
        ("--rm a --seed -1", "--seed: expected 0 or more, found -1"),
        ("--rm a --rm x=a --rm x=b", "two proxies are named 'x'; name one of them, as in --rm other=CKPT"),
        ("--rm ./nothing", "./nothing"),
        ("--rm a --engine slurm", "--engine: expected local, ray or inline, found 'slurm'"),
        ("--rm a --policy a", "give either --pool, or --policy and --prompts to sample one"),
        ("--rm a --prompts pool.jsonl",
         "--prompts: only for sampling, which goes with --policy and not with --pool"),
        ("--rm a --temperature 0.7 --top-p 0.9 --max-new-tokens 9 --policy-template chat --batch 2 --generator vllm",
         "--temperature, --top-p, --max-new-tokens, --batch, --policy-template, --generator: only for sampling, which "
         "goes with --policy and not with --pool"),
    ],
)  # fmt: skip
def test_usage_errors_come_before_a_model_is_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(judge, "load_reward_model", never)
    before = sorted(models.iterdir())
    done = here(
        "bon", "--pool", "pool.jsonl", "-o", "out", *(() if "--resamples" in arguments else QUICK), *arguments.split()
    )
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.startswith("warmerge: ")
    assert len(done.err.splitlines()) == 1
    assert sorted(models.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--rm a", 2, "give either --pool, or --policy and --prompts to sample one"),
        ("--rm a --policy POLICY", 2, "--policy: --prompts is missing, the rows with the prompts to ask it"),
        ("--rm a --policy POLICY --prompts pool.jsonl -n 0", 2, "-n: expected 1 or more, found 0"),
        ("--rm a --policy POLICY --prompts pool.jsonl --temperature 0", 2, "--temperature 0 would make all 64 answers"),
        ("--rm a --policy POLICY --prompts pool.jsonl --choose b", 2, "--choose: expected one of 'a', found 'b'"),
        ("--rm POLICY --policy POLICY --prompts pool.jsonl", 3, "POLICY: has no reward head (no tensor named like"),
        ("--rm a --control POLICY --policy POLICY --prompts pool.jsonl", 3, "POLICY: has no reward head (no tensor"),
    ],
)
def test_nothing_is_sampled_for_a_run_that_cannot_be_finished(
    models: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, message: str
) -> None:
    from warmerge.pipeline import bon

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was sampled")

    monkeypatch.setattr(bon, "sample_pool", never)
    place = str(causal_models.folder())
    done = here("bon", "-o", "out", *QUICK, *arguments.replace("POLICY", place).split())
    assert (done.code, done.out) == (code, "")
    assert message.replace("POLICY", place) in done.err
    assert not (models / "out").exists()


def test_bad_rows_are_refused_or_counted(models: Path) -> None:
    rows = [*pool(), {"prompt": "why", "candidates": ["a", "b"], "gold": [1.0, float("nan")]}]
    write_rows(models / "pool.jsonl", rows)
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "-o", "out", *QUICK)
    assert done == Done(
        3, "",
        "warmerge: refused, 2 findings:\n"
        "  - pool.jsonl:13: 'gold[1]' is NaN, expected a finite number\n"
        "  - pool.jsonl: --skip-bad-rows leaves bad rows out and counts them\n",
    )  # fmt: skip
    (models / "empty.jsonl").write_text("")
    done = here("bon", "--pool", "empty.jsonl", "--rm", "a", "-o", "out", *QUICK)
    assert done == Done(3, "", "warmerge: refused: empty.jsonl: is empty: there is no row in it\n")
    assert not (models / "out").exists()


@pytest.mark.usefixtures("no_figures")
def test_bad_rows_are_counted_on_request(models: Path) -> None:
    write_rows(models / "pool.jsonl", [*pool(), {"prompt": "why"}])
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "-o", "out", "--skip-bad-rows", *QUICK)
    assert (done.code, done.err) == (0, "48 texts, 1 model: 48 rewards to compute\n")
    assert "note: 1 bad rows were left out" in done.out.splitlines()


def test_broken_checkpoints_are_named_at_once(models: Path) -> None:
    weights = models / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    tensors = load_file(models / "b" / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, models / "b" / "model.safetensors", metadata={"format": "pt"})
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "--rm", "b", "-o", "out", *QUICK)
    assert (done.code, done.out) == (3, "")
    lines = done.err.splitlines()
    assert lines[0] == "warmerge: refused, 2 findings:"
    assert lines[1].startswith("  - a/model.safetensors: ")
    assert lines[2].startswith("  - b: has no reward head (no tensor named like score.weight, ")


@pytest.mark.usefixtures("no_figures")
def test_damaged_rewards_are_refused_and_made_anew_on_request(models: Path) -> None:
    command = ["bon", "--pool", "pool.jsonl", "--rm", "a", *QUICK, "-o", "out"]
    first = here(*command)
    assert first.code == 0
    path = models / "out" / "scores.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b"\x00\x00\x00")
    (models / "out" / "bon.json").unlink()
    (models / "out" / "chosen.jsonl").unlink()
    done = here(*command)
    message = "warmerge: out/scores.safetensors is damaged (its contents changed); add --overwrite to start anew\n"
    assert done == Done(2, "", message)
    anew = here(*command, "--overwrite")
    assert (anew.code, anew.err) == (0, "48 texts, 1 model: 48 rewards to compute\n")
    assert re.sub(r" \d+\.\d  ", " ", anew.out) == re.sub(r" \d+\.\d  ", " ", first.out)


def test_a_place_that_is_no_folder(models: Path) -> None:
    (models / "file").write_text("mine")
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a", "-o", "file", *QUICK)
    assert done == Done(2, "", "warmerge: -o file is a file; name a folder\n")
    assert (models / "file").read_text() == "mine"
    assert stat.S_ISREG((models / "file").stat().st_mode)


def test_without_a_place(models: Path) -> None:
    done = here("bon", "--pool", "pool.jsonl", "--rm", "a")
    assert (done.code, done.out) == (2, "")
    assert "Missing option" in done.err
