"""warmerge demo: the commands that it prints are those that it runs, and what they leave is a project."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from warmerge.cli import app
from warmerge.cli.demonstrating import program
from warmerge.demo import run as demo_run
from warmerge.demo.run import run_demo, script, summary
from warmerge.demo.story import FULL, QUICK, WORLD, Plan, Step, steps
from warmerge.errors import UsageError, WarmergeError


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_every_command_is_one_that_a_user_can_type(plan: Plan) -> None:
    group: Any = typer.main.get_command(app)
    for command in (command for step in steps(plan, seed=3) for command in step.commands):
        if command[:3] == WORLD:
            continue
        program, name, *words = command
        assert program == "warmerge"
        group.commands[name].make_context(name, list(words))  # raises where an option is not known


def test_later_steps_read_what_earlier_ones_write() -> None:
    story = steps(FULL, 0)
    commands = [command for step in story for command in step.commands]
    written = {"world"} | {command[command.index("-o") + 1] for command in commands if "-o" in command}
    read = {
        word.rpartition("=")[2].split("/")[0]
        for command in commands
        for joined in command[2:]
        for word in joined.split(",")
        if "/" in word
    }
    assert read <= {path.split("/")[0] for path in written}


def test_another_seed_reaches_every_command_that_draws() -> None:
    one, other = ([command for step in steps(FULL, seed) for command in step.commands] for seed in (0, 7))
    changed = [a[1] for a, b in zip(one, other, strict=True) if a != b]
    assert changed == ["-m", "train", "rl", "rl", "train", "bon", "report"]


def test_the_script_is_the_story(tmp_path: Path) -> None:
    text = script(steps(FULL, 0))
    shown = [line for line in text.splitlines()[4:] if line and not line.startswith("#")]
    assert shown == [step.typed() for step in steps(FULL, 0)]
    (tmp_path / "commands.sh").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "commands.sh")], check=True)


def test_it_runs_and_leaves_a_project(quick_demo: tuple[Path, str]) -> None:
    out, said = quick_demo
    for step in steps(QUICK, 0):
        assert f"\n$ {step.typed()}\n" in said
    assert said.splitlines()[-1] == f"{out}/report.html"
    expected = {
        "commands.sh", "policies.txt", "world", "members", "gentle", "warm", "lmc", "eval", "bon", "rl", "rl-report",
        "report.html",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == expected
    assert json.loads((out / "eval" / "eval.json").read_text())["command"][:2] == ["warmerge", "eval"]
    assert "the numbers mean nothing" in said


def test_its_table_shows_controls_beside_the_average(quick_demo: tuple[Path, str]) -> None:
    out, said = quick_demo
    rows = json.loads((out / "eval" / "eval.json").read_text())["rows"]
    table = said[said.index("Accuracy [95 %]; of swapped labels") :].splitlines()
    assert [name in table[1] for name in ("val (n = 128)", "ood", "train[swapped] (n = 32)", "train[clean] (n = 96)")]
    gentle = next(row for row in rows if row["model"] == "gentle" and row["set"] == "ood")
    line = next(line for line in table if line.startswith("gentle single"))
    assert f"{gentle['accuracy']:.3f} [{gentle['low']:.3f}, {gentle['high']:.3f}]" in line
    singles = [row["accuracy"] for row in rows if row["kind"] == "member" and row["set"] == "val"]
    line = next(line for line in table if line.startswith("single (mean of 2)"))
    assert line.split()[4] == f"{sum(singles) / 2:.3f}"


def test_the_project_can_be_gone_on_with(quick_demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = quick_demo
    monkeypatch.chdir(out)
    found = CliRunner().invoke(app, ["inspect", "warm", "members/members/01"])
    assert found.exit_code == 0, found.output


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(quick_demo: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = quick_demo
    again = tmp_path / "again"
    assert CliRunner().invoke(app, ["demo", "--quick", "-o", str(again)]).exit_code == 0
    for part in ("warm", "world/sft", "rl/average/step-4"):
        assert (again / part / "model.safetensors").read_bytes() == (out / part / "model.safetensors").read_bytes()
    assert (again / "bon" / "bon.csv").read_bytes() == (out / "bon" / "bon.csv").read_bytes()


# --- what it refuses --------------------------------------------------------------------------------------------------


def _never(words: Sequence[str]) -> int:
    raise AssertionError("a command was run")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is there already; choose another -o, or delete it$"):
        run_demo(tmp_path, _never, program, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "find_spec", lambda name: None if name in ("peft", "trl") else name)
    with pytest.raises(UsageError, match=r"^the demo needs peft, trl: pip install 'warmerge\[train\]'$"):
        run_demo(tmp_path / "demo", _never, program)
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path.cwd()
    said: list[str] = []
    monkeypatch.setattr("warmerge.demo.world.main", lambda words: None)
    with pytest.raises(WarmergeError, match=r"^the demo ends here: step 2, '2 .* wrong', gave the exit code 3$"):
        run_demo(tmp_path / "demo", lambda words: 3, program, quick=True, say=said.append)
    assert Path.cwd() == before
    assert said[-1].startswith("\n== 2 of 12")


def test_what_runs_beside_is_waited_for_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    commands = (("warmerge", "rules"), ("warmerge", "plot", "nowhere"), ("warmerge", "theory"))
    with demo_run._beside(program) as follow:
        assert follow(Step("", "", commands, "log.txt"), said.append) == 0
        assert not said
        assert follow(Step("", "", log="log.txt"), said.append) == 2
    assert "slerp" in said[0]
    assert "nowhere: no results to draw" in said[0]
    assert "simulated" not in said[0]


def test_what_runs_beside_ends_with_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    with demo_run._beside(lambda commands: ["sh", "-c", "sleep 60 & sleep 60"]) as follow:
        follow(Step("", "", (("warmerge", "rl"),), "log.txt"), print)
    assert time.monotonic() - begun < 30


def test_the_table_by_hand() -> None:
    kinds = {"start": "start", "1": "member", "2": "member", "1 half": "halfway", "gentle": "beside",
             "ensemble (mean, standardised)": "ensemble", "average": "average"}  # fmt: skip
    accuracies = dict(zip(kinds, (0.5, 0.6, 0.7, 0.65, 0.62, 0.68, 0.72), strict=True))
    rows = [
        {"set": "val", "model": name, "kind": kind, "accuracy": accuracies[name], "low": 0.1, "high": 0.9}
        for name, kind in kinds.items()
    ]
    lines = list(summary({"sets": [{"name": "val", "n": 9}], "rows": rows}))
    assert lines[1].split() == ["val", "(n", "=", "9)"]
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "start, head probed 0.500 [0.100, 0.900]",
        "gentle single 0.620 [0.100, 0.900]",
        "single (mean of 2) 0.650",
        "single, half-way to its start 0.650 [0.100, 0.900]",
        "ensemble, standardised 0.680 [0.100, 0.900]",
        "average 0.720 [0.100, 0.900]",
    ]
