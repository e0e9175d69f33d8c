"""rl as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import causal_models
import pytest
from rl_worlds import FUNCTIONS, same_weights, untimed, write_prompts
from test_cli import Done, here

from warmerge import UsageError
from warmerge.cli.optimising import proxy_of

ASKED = (
    "--prompts", "prompts.jsonl", "--control", "functions.py:length", "--steps", "4", "--batch", "8", "--lr", "1e-3",
    "--max-new-tokens", "10", "--control-every", "2", "--samples", "3", "--sample-every", "2", "--keep-every", "2",
    "--save-every", "1", "--start-answers", "16", "--micro-batch", "4",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "sft").symlink_to(causal_models.folder())
    return tmp_path


def rl(*arguments: str) -> Done:
    return here("rl", "--policy", "sft", *ASKED, *arguments)


def test_what_is_printed(folder: Path, world: Any) -> None:
    done = rl("--warm", f"{world.a},{world.b}", "-o", "out")
    assert done.code == 0, done.err
    first, *rest = done.err.splitlines()
    assert first == "4 steps of 8 answers to 2 prompts, of 21; 3 held out; reward: warm"
    assert [re.match(r"step (\d): proxy -?\d\.\d{3}, (control|KL)", line) is not None for line in rest[:3]] == [
        True
    ] * 3
    table = [line.split() for line in done.out.splitlines()]
    assert ["step", "proxy", "control", "disagreement", "KL", "tokens", "entropy", "cut", "off"] in table
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    shown = next(cells for cells in table if cells[:1] == ["4"])
    row = rows[3]
    assert shown == [
        "4", f"{row['proxy']:.3f}", f"{row['control']:.3f}", "-", f"{row['kl_sequence']:.2f}", f"{row['length']:.1f}",
        f"{row['entropy']:.2f}", f"{row['truncated']:.0%}",
    ]  # fmt: skip
    assert done.out.splitlines()[-2:] == ["policies: out/step-2, out/step-4", "next: warmerge rl-report out -o report"]
    again = rl("--warm", f"{world.a},{world.b}", "-o", "out", "--json")
    printed = json.loads(again.out)
    assert printed["rows"] == rows
    assert printed["finished"] is True
    assert "optimised" not in again.err


def test_a_killed_run_loses_nothing(folder: Path) -> None:
    """kill -9 in the middle of a run, in a process of its own; the same command ends as if nothing had been."""
    command = [sys.executable, "-m", "warmerge", "rl", "--policy", "sft", *ASKED, "--rm", "functions.py:letters"]
    process = subprocess.Popen([*command, "-o", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, deadline = folder / "killed" / "rows.jsonl", time.monotonic() + 90
    while not (rows.exists() and rows.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None or process.returncode == 0
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rl("--rm", "functions.py:letters", "-o", "killed").code == 0
    assert rl("--rm", "functions.py:letters", "-o", "whole").code == 0
    assert same_weights(folder / "killed/step-4", folder / "whole/step-4")
    found = [
        [json.loads(line) for line in Path(name, "rows.jsonl").read_text().splitlines()] for name in ("killed", "whole")
    ]
    assert untimed(found[0]) == untimed(found[1])


def test_an_error_is_one_message(folder: Path) -> None:
    done = rl("--rm", "functions.py:nothing", "-o", "out")
    assert done.code == 2
    assert "functions.py:nothing: the file has no function of this name; it has 'flat', 'length', 'letters'" in done.err
    assert "Traceback" not in done.err
    assert not Path("out").exists()
    constant = rl("--rm", "functions.py:flat", "-o", "out")
    assert constant.code == 3
    assert "flat" in constant.err
    assert "there is nothing to learn from it" in constant.err
    assert rl("--rm", "functions.py:letters", "--kl-coef", "-1", "-o", "x").err == (
        "warmerge: --kl-coef: expected a number of 0 or more, found -1.0\n"
    )


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    done = rl("--rm", "functions.py:letters", "-o", "out")
    assert done.code == 2
    assert "rl needs TRL" in done.err
    assert "pip install 'warmerge[train]'" in done.err


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    told = here("rl", "--help").out
    for option in ("--policy", "--rm", "--ensemble", "--warm", "--control", "--kl-coef", "--baseline", "--eos-penalty"):
        assert option in told
    assert "warmerge rl --policy sft --warm runs/1,runs/2" in " ".join(told.split())


# --- the one reward ---------------------------------------------------------------------------------------------------


def test_the_reward_that_is_meant() -> None:
    single = proxy_of(["a=runs/1"], None, None, None)
    assert (single.name, single.kind, single.checkpoints) == ("a", "rm", ("runs/1",))
    least = proxy_of(["a=runs/1", "runs/2"], "min", None, None)
    assert (least.name, least.checkpoints, least.aggregate) == ("ensemble (min)", ("runs/1", "runs/2"), "min")
    assert least.standardize
    costly = proxy_of(["runs/1", "runs/2"], "uwo,k=2,scale=raw", None, "mine")
    assert (costly.name, costly.k, costly.standardize) == ("mine", 2.0, False)
    warm = proxy_of((), None, "w=runs/1,runs/2", None)
    assert (warm.name, warm.kind, warm.checkpoints) == ("w", "warm", ("runs/1", "runs/2"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], None, None, None), "give either --rm, several --rm with --ensemble, or --warm: one reward is optimised"),
        ((["a"], None, "a,b", None), "give either --rm, several --rm with --ensemble, or --warm"),
        ((["a"], "mean", None, None), "--ensemble: give two --rm or more, whose rewards it combines"),
        ((["a", "b"], None, None, None), "2 --rm: say how their rewards are combined, as in --ensemble mean"),
        ((["a", "b"], "average", None, None), "expected agg=mean, min, uwo, median, found 'average'"),
    ],
)
def test_no_one_reward(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        proxy_of(*given)
