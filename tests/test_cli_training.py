"""train and probe as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, head_of_a_cluster, wait_for
from reward_world import World, pairs, write_rows
from safetensors.torch import load_file
from test_cli import here, run

pytest.importorskip("accelerate")
pytest.importorskip("trl")
QUICK = ("--resamples", "100", "--steps", "3", "--batch", "8", "--threads", "1")


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the start and some pairs, by short names."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(world.start, tmp_path / "start")
    shutil.copy(world.data("val"), tmp_path / "val.jsonl")
    write_rows(tmp_path / "pairs.jsonl", pairs(40, seed=4))
    return tmp_path


def test_train_in_processes_of_its_own(folder: Path) -> None:
    """A member that fails beside one that does not; then the same command again."""
    asked = (
        "train", "--base", "start", "--data", "pairs.jsonl", "--val", "val=val.jsonl", "--runs", "2", "--lr",
        "1e-3,1e20", "-o", "runs", *QUICK,
    )  # fmt: skip
    done = run(*asked, cwd=folder)
    assert done.code == 1, done.err
    said = done.err.splitlines()
    assert said[0] == "fitting the head on the features of 80 texts"
    assert said[-1] == "warmerge: 1 of 2 members failed; the same command tries them again"
    assert re.search(r"^ 01 +0\.001 +0\.05 +0 +init +\d\.\d{3} +[01]\.\d{3} +0\.\d{3} \[", done.out, re.M)
    assert re.search(r"^failed: member 02: .*not finite", done.out, re.M)
    assert re.search(r"^ start +0\.\d{3} \[", done.out, re.M)
    stamp = (folder / "runs/members/01/model.safetensors").stat().st_mtime_ns
    again = run(*asked, cwd=folder)
    assert again.code == 1
    assert "training 1 of 2 members, 3 steps each" in again.err
    assert (folder / "runs/members/01/model.safetensors").stat().st_mtime_ns == stamp


def test_probe_in_a_process_of_its_own(folder: Path) -> None:
    done = run("probe", "start", "--data", "pairs.jsonl", "-o", "probed", cwd=folder)
    assert done.code == 0, done.err
    before, path = done.out.splitlines()
    assert path == "probed"
    assert re.fullmatch(
        r"right on pairs of held-out prompts: [01]\.\d{3} with the old head, [01]\.\d{3} with the new one", before
    )
    old, new = (load_file(folder / name / "model.safetensors") for name in ("start", "probed"))
    assert [name for name in old if not old[name].equal(new[name])] == ["score.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--data and -o missing; see warmerge train --help"),
        (["train", "--data", "x", "-o", "y"], "give --base MODEL, or --init CKPT for each of several starts"),
        (["train", "--data", "x", "-o", "y", "--base", "b", "--init", "c"], "give --base MODEL, or --init CKPT"),
        (["train", "--data", "x", "-o", "y", "--base", "b", "--lr", "fast"], "--lr: expected numbers with commas"),
        (["train", "--data", "x", "-o", "y", "--base", "b", "--steps", "0"], "--steps: expected 1 or more, found 0"),
        (["train", "--data", "x", "-o", "y", "--base", "b", "--runs", "0"], "--runs: expected 1 or more, found 0"),
        (["train", "--data", "x", "-o", "y", "--base", "b", "--sft-steps", "-1"], "--sft-steps: expected 1 or more"),
        (["train", "--data", "no.jsonl", "-o", "y", "--base", "b"], "no file or folder 'no.jsonl'"),
        (["probe", "x"], "--data and -o are needed"),
    ],
)
def test_usage(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_unknown_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = here("train", "--base", "start", "--data", "pairs.jsonl", "-o", "runs", "--engine", "slurm", *QUICK)
    assert done.code == 2
    assert "--engine: expected local, ray or inline, found " in done.err
    assert not (folder / "runs").exists()


def test_train_prints_one_json_object(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = here("train", "--base", "start", "--data", "pairs.jsonl", "--runs", "1", "--json", "-o", "runs", *QUICK)
    assert done.code == 0, done.err
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert (found["out"], [row["member"] for row in found["members"]]) == ("runs", ["01"])


def largest_difference(one: Path, two: Path) -> float:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


TRAIN = ("train", "--base", "start", "--data", "pairs.jsonl", "--runs", "2", "--dropout", "0", *QUICK)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_what_one_does(folder: Path) -> None:
    assert run(*TRAIN, "-o", "alone", cwd=folder).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "warmerge"]
    done = subprocess.run([*torchrun, *TRAIN, "-o", "both"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: warmerge average both/members/01 both/members/02 -o both-average") == 1
    for name in ("members/01", "members/02"):
        assert largest_difference(folder / "alone" / name, folder / "both" / name) < 1e-5
    assert largest_difference(folder / "alone" / "init", folder / "both" / "init") == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_cluster_trains_what_this_machine_does(folder: Path) -> None:
    assert run(*TRAIN, "-o", "alone", cwd=folder).code == 0
    with head_of_a_cluster(folder) as address:
        done = run(*TRAIN, "--engine", "ray", "--address", address, "-o", "cluster", cwd=folder)
    assert done.code == 0, done.err
    for name in ("members/01", "members/02"):
        assert largest_difference(folder / "alone" / name, folder / "cluster" / name) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_ray_worker_and_a_killed_command_change_no_weight(folder: Path) -> None:
    """SIGKILL to the worker that trains a member, then to the command; the same command goes on from a checkpoint."""
    asked = [sys.executable, "-m", "warmerge", *TRAIN, "--steps", "150", "--save-every", "10"]
    subprocess.run([*asked, "-o", "alone"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows, log = (folder / "cluster/members/01" / name for name in ("rows.jsonl", "log.txt"))

    def trained() -> int:
        return rows.read_bytes().count(b"\n") if rows.exists() else 0

    def process() -> int:
        """Of the member's last process, which its log names."""
        return int(re.findall(r"^--- .* process (\d+) on ", log.read_text(), re.M)[-1])

    with head_of_a_cluster(folder) as address:
        command = [*asked, "--engine", "ray", "--address", address, "-o", "cluster"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
            wait_for(lambda: trained() > 30, 300)
            first = process()
            os.kill(int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
            wait_for(lambda: process() != first and trained() > 60, 300)
            driver.kill()
        wait_for(lambda: not alive(process()), 60)
        assert not (folder / "cluster/members/01/result.json").exists()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^--- ", log.read_text(), re.M)) == 3
    for name in ("members/01", "members/02"):
        assert largest_difference(folder / "alone" / name, folder / "cluster" / name) == 0
