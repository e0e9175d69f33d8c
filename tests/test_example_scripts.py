"""examples/trl_reward_function.py and examples/sweep_to_hub.sh, on tiny models."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from command_bridge import BASH, Bridge
from documented_commands import ROOT
from documented_folder import member, policy, prompts, rows
from loopback_hub import CLIENT_WARNING, LoopbackHub
from reward_world import pairs
from rl_worlds import same_weights
from safetensors.torch import load_file
from test_documented_commands import Reader

EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples are run: a policy, two members, prompts and pairs."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    policy()(Path("my-sft"))
    for i in range(2):
        member("llama", i)(Path(f"rm-{i}"))
    rows(prompts(12, 1))(Path("prompts.jsonl"))
    for i, (name, count) in enumerate((("pairs", 32), ("select", 16), ("test", 16))):
        rows(pairs(count, seed=i))(Path(f"{name}.jsonl"))
    return tmp_path


@pytest.mark.parametrize("members", [("rm-0",), ("rm-0", "rm-1")], ids=["one", "averaged"])
@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning", "ignore:'pin_memory' argument:UserWarning")
def test_a_trainer_of_ones_own_is_given_the_average(
    folder: Path, members: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rms = [word for name in members for word in ("--rm", name)]
    small = ("--steps", "2", "--batch", "8", "--answers", "4", "--max-new-tokens", "6", "--lr", "1e-3")
    asked = ["--policy", "my-sft", *rms, "--prompts", "prompts.jsonl", "-o", "out", *small]
    monkeypatch.setattr(sys, "argv", ["trl_reward_function.py", *asked])
    ran = runpy.run_path(str(EXAMPLES / "trl_reward_function.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^reward: -?\d+\.\d{3} at step 1, -?\d+\.\d{3} at step 2; out/policy$", said, re.M)
    logged = [row for row in ran["trainer"].state.log_history if "reward" in row]
    name = "reward_of_warm" if len(members) > 1 else "reward_of_rm-0"
    assert all(row["reward"] == row[f"rewards/{name}/mean"] != 0 for row in logged)
    assert not same_weights(folder / "my-sft", folder / "out/policy")
    if len(members) > 1:
        merged, *parts = (load_file(folder / n / "model.safetensors")["score.weight"] for n in ("out/warm", *members))
        assert numpy.allclose(merged, (parts[0].double() + parts[1].double()) / 2, atol=1e-7)
    assert (folder / "out/warm").exists() == (len(members) > 1)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub({}) as running:
        running.tokens = {"good"}
        running.use(monkeypatch, folder / "cache", token="good")
        yield running


SMALL = {
    "BASE": "my-sft", "PAIRS": "pairs.jsonl", "CHOOSE_ON": "select.jsonl", "REPORT_ON": "test.jsonl", "RUNS": "2",
    "LR": "1e-3,3e-3", "BATCH": "8", "MAX_LENGTH": "32", "SELECT": "best:2", "POINTS": "3",
}  # fmt: skip


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.filterwarnings(CLIENT_WARNING)
@pytest.mark.timeout(300)
def test_from_a_sweep_to_a_card_with_what_was_measured(hub: LoopbackHub, folder: Path) -> None:
    with Bridge(folder, Reader(folder).answer) as bridge:
        done = bridge.run(f"exec {EXAMPLES / 'sweep_to_hub.sh'}", **SMALL, PUSH="me/warm-rm", LICENSE="mit")
    assert done.code == 0, done.err
    titles = [line for line in done.out.splitlines() if line.startswith("== ")]
    assert [title.split()[1] for title in titles] == ["train", "may", "choose", "is", "is", "push"]
    assert "chosen: sweep/runs/members/0" in done.out
    assert "may be merged" in done.out
    files = hub.repos["me/warm-rm"]
    assert {"model.safetensors", "warmerge.json", "eval.png", "lmc.png"} <= set(files)
    assert files["model.safetensors"] == (folder / "sweep/warm/model.safetensors").read_bytes()
    accuracy = next(
        row["accuracy"]
        for row in json.loads((folder / "sweep/eval/eval.json").read_text())["rows"]
        if row["kind"] == "average"
    )
    card = files["README.md"].decode()
    assert f"value: {round(accuracy, 4)}" in card
    assert "license: mit" in card


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.timeout(300)
def test_a_dry_run_sends_nothing_and_the_next_run_trains_nothing_again(hub: LoopbackHub, folder: Path) -> None:
    stamps = []
    for _ in range(2):
        with Bridge(folder, Reader(folder).answer) as bridge:
            done = bridge.run(f"exec {EXAMPLES / 'sweep_to_hub.sh'}", **SMALL)
        assert done.code == 0, done.err
        assert "== push --dry-run" in done.out.splitlines()
        stamps.append({path: path.stat().st_mtime_ns for path in folder.glob("sweep/runs/members/*/model.safetensors")})
    assert len(stamps[0]) == 2
    assert stamps[0] == stamps[1]
    assert hub.repos == {}


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_a_step_that_fails_ends_the_script(hub: LoopbackHub, folder: Path) -> None:
    shutil.copy("pairs.jsonl", "broken.jsonl")
    Path("broken.jsonl").write_text(Path("broken.jsonl").read_text() + "{not json\n")
    with Bridge(folder, Reader(folder).answer) as bridge:
        done = bridge.run(f"exec {EXAMPLES / 'sweep_to_hub.sh'}", **(SMALL | {"PAIRS": "broken.jsonl"}))
    assert done.code == 3
    assert "broken.jsonl" in done.err
    assert done.out == "== train 2 members\n"
    assert not Path("sweep/warm").exists()
