"""Killed, out of room, inputs that change: nothing is left that loads and is wrong. At length: benchmarks/faults.py."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal_models
import pytest
import tiny_models
import torch
from rl_worlds import optimise, untimed
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_cli import environment, here

from warmerge.errors import RefusedError, WarmergeError, naming
from warmerge.report import canvas, results
from warmerge.report.results import EVAL, write_results
from warmerge.rewards.bench import Measuring
from warmerge.rewards.config import transformers_config
from warmerge.rewards.model import load_reward_model
from warmerge.training.language_model import load_language_model
from warmerge.training.trl_checkpoints import checkpoints_in, finish_checkpoint, last_checkpoint
from warmerge.weights.folder import open_folder, read_bytes
from warmerge.weights.locate import open_checkpoint

ROWS = [{"set": "val", "model": "a", "kind": "member", "n": 3, "accuracy": 0.5, "low": 0.4, "high": 0.6}]


def overwrite(file: Path) -> None:
    """Other values in the same file, as `cp` over it and trainers that save do."""
    with file.open("r+b") as opened:
        data = opened.read()
        opened.seek(8 + int.from_bytes(data[:8], "little"))
        opened.write(b"\x3e" * (len(data) - opened.tell()))


def values(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- inputs that change ---


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_loaded_reward_model_is_not_its_file_any_more(kind: str, tmp_path: Path) -> None:
    """transformers maps files into memory: written into or cut while texts are scored, they changed or killed us."""
    folder = tiny_models.own_folder(tmp_path / "rm", kind)
    module = load_reward_model(folder).module
    before = values(module)
    overwrite(folder / "model.safetensors")
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    os.truncate(folder / "model.safetensors", 10)
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())


def test_a_loaded_policy_is_not_its_file_any_more(tmp_path: Path) -> None:
    source = open_checkpoint(causal_models.write(tmp_path / "lm"))
    module = load_language_model(source, transformers_config(source, False, labels=1), torch.float32, False, "sampled")
    before = values(module)
    overwrite(tmp_path / "lm" / "model.safetensors")
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("when", ["before it is loaded", "cut before it is loaded", "while it is copied"])
@pytest.mark.parametrize("what", ["reward model", "policy"])
def test_a_file_that_changes_while_it_is_loaded_is_refused(
    what: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.own_folder(tmp_path / "m") if what == "reward model" else causal_models.write(tmp_path / "m")
    source = open_checkpoint(folder)
    config = transformers_config(source, False, labels=1)

    def load() -> object:
        if what == "reward model":
            return load_reward_model(source)
        return load_language_model(source, config, torch.float32, False, "sampled")

    if when == "before it is loaded":
        overwrite(folder / "model.safetensors")
    elif when == "cut before it is loaded":
        os.truncate(folder / "model.safetensors", 5000)
    else:
        clone = torch.Tensor.clone

        def late(tensor: torch.Tensor, **more: Any) -> torch.Tensor:
            monkeypatch.undo()
            overwrite(folder / "model.safetensors")
            return clone(tensor, **more)

        monkeypatch.setattr(torch.Tensor, "clone", late)
    with pytest.raises(RefusedError, match=r"m/model\.safetensors: changed while it was read"):
        load()


def test_a_failing_disk_is_said_with_the_model_that_lies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers reads, an error names no file."""
    folder = tiny_models.own_folder(tmp_path / "rm-0")

    def failing(*_: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", failing)
    with pytest.raises(RefusedError, match=r"rm-0: cannot be loaded as a reward model: .*Input/output error"):
        load_reward_model(folder)


def test_the_reference_of_a_run_is_not_its_file_any_more(tmp_path: Path) -> None:
    """TRL loads the start once more, to measure KL to: its file stayed mapped while the policy learned."""
    policy = causal_models.write(tmp_path / "lm")
    still = optimise(tmp_path, "still", policy=policy)
    seen: list[int] = []

    def written_into(count: int) -> None:
        seen.append(count)
        if len(seen) == 2:
            overwrite(policy / "model.safetensors")

    found = optimise(tmp_path, "disturbed", policy=policy, measuring=Measuring(progress=written_into))
    assert len(seen) > 2
    assert untimed(found.rows) == untimed(still.rows)


@pytest.mark.parametrize("how", ["written into", "cut", "replaced", "removed"])
def test_a_small_file_that_changes_while_it_is_read_is_refused(
    how: str, tmp_path: Path, rm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened as it was known, and held something else when it was read: old weights with a new tokenizer."""
    file = rm("a") / "config.json"
    (tmp_path / "other").write_bytes(file.read_bytes().replace(b'"hidden_size": 16', b'"hidden_size": 61'))
    folder, read = open_folder(tmp_path / "a", "a"), os.preadv

    def late(*given: Any) -> int:
        if how == "written into":
            file.write_bytes((tmp_path / "other").read_bytes())
        elif how == "cut":
            os.truncate(file, 10)
        elif how == "replaced":
            os.replace(tmp_path / "other", file)
        else:
            file.unlink()
        monkeypatch.undo()
        return read(*given)

    monkeypatch.setattr(os, "preadv", late)
    with pytest.raises(RefusedError, match=r"a/config\.json: changed while it was read"):
        read_bytes(folder, "config.json")


# --- results ---


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def stopped_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """From now on the call of this number that renames or removes a file does not happen, nor any later one."""
    seen = 0

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen >= call:
                raise Stopped
            return real(*given, **more)

        return wrapped

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, before(getattr(os, name)))


def test_tables_and_figures_of_two_runs_never_lie_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(rows: Any, stem: Path) -> list[Path]:
        return [results.write_text(stem.with_name(f"{stem.name}{end}"), rows[0]["model"]) for end in (".png", ".svg")]

    monkeypatch.setitem(results._FIGURES, EVAL, (draw, ("rows",)))
    old, new = (
        {"rows": [{"model": name}], "movements": [{"model": name}] * (name == "old")} for name in ("old", "new")
    )
    for call in range(1, 40):
        out = tmp_path / str(call)
        write_results(out, EVAL, old)
        with monkeypatch.context() as patch:
            stopped_at(patch, call)
            try:
                write_results(out, EVAL, new)
                done = True
            except Stopped:
                done = False
        visible = {path.name: path.read_text() for path in out.iterdir() if not path.name.startswith(".")}
        ages = {age for text in visible.values() for age in ("old", "new") if age in text}
        assert len(ages) <= 1, (call, visible)
        complete = {"eval.json", "eval.csv", "eval.png", "eval.svg"}
        if "eval.json" in visible:
            assert visible.keys() == complete | ({"eval-movements.csv"} if ages == {"old"} else set()), call
        write_results(out, EVAL, new)
        assert {path.name for path in out.iterdir()} == complete
        if done:
            assert call > 10
            return
    pytest.fail("never done")


def test_a_full_disk_keeps_the_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, EVAL, {"rows": ROWS})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, *given: Any, **more: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` says it: without a name

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*numbers'"):
            write_results(tmp_path, EVAL, {"rows": [{**ROWS[0], "model": "b"}]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_where_a_figure_cannot_be_drawn_the_numbers_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, EVAL, {"rows": ROWS})

    def full(*given: Any, **more: Any) -> None:
        given[1].write(b"half a figure")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        with pytest.raises(OSError, match=r"eval\.png"):
            write_results(tmp_path, EVAL, {"rows": [{**ROWS[0], "model": "b"}]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.csv", "eval.json"]
    assert json.loads((tmp_path / "eval.json").read_text())["rows"][0]["model"] == "b"


def test_a_figure_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = canvas.new_figure(2, 1)
    canvas.save(figure, tmp_path / "f.svg")
    before = (tmp_path / "f.svg").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *given: pytest.fail("not reached"))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **more: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            canvas.save(figure, tmp_path / "f.svg")
    assert (tmp_path / "f.svg").read_bytes() == before


# --- messages ---


def test_an_error_without_a_name_gets_one_and_keeps_its_own() -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'out/x'"), naming("out/x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"^a sentence of a library$"), naming("out/x"):
        raise OSError("a sentence of a library")
    with pytest.raises(OSError, match="other"), naming("out/x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "other")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("No space left on device (os error 28)"), "[Errno 28] No space left on device: 'out/x'"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
         "[Errno 28] No space left on device: 'out/x'"),
        (RuntimeError("unable to open file </a/b.safetensors> in read-only mode: Input/output error (5)"),
         "[Errno 5] Input/output error: '/a/b.safetensors'"),
        (RuntimeError("unable to mmap 12 bytes from file </a/b>: Cannot allocate memory (12)"),
         "[Errno 12] Cannot allocate memory: '/a/b'"),
    ],
)  # fmt: skip
def test_what_rust_and_torch_say_of_a_disk_is_an_error_of_the_disk(error: Exception, said: str) -> None:
    with pytest.raises(OSError, match=f"^{re.escape(said)}$"), naming("out/x"):
        raise error
    with pytest.raises(ValueError, match="shapes"), naming("out/x"):
        raise ValueError("shapes differ (12)")


def test_a_full_disk_is_said_with_the_file_and_what_to_do(
    tmp_path: Path, rm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, out = rm("a", seed=1), rm("b", seed=2), tmp_path / "warm"

    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        done = here("average", a, b, "-o", out)
    hint = "make room, then give the same command again"
    partial = tmp_path / ".warm.partial" / "progress.json.new"
    assert done == (1, "", f"warmerge: {partial}: No space left on device; {hint}\n")
    assert not out.exists()
    assert here("average", a, b, "-o", out) == (0, f"{out}\n", "")


@pytest.mark.parametrize(
    "error", [RuntimeError("basic_ios::clear: iostream error"), SafetensorError("I/O error: No space left")]
)
def test_what_torch_says_of_a_full_disk_is_said_with_the_folder(error: Exception) -> None:
    with pytest.raises(WarmergeError) as found, checkpoints_in(Path("out/working")):
        raise error
    assert str(found.value) == (
        f"a checkpoint in out/working cannot be written or read: {error}. Is the disk full? The same command goes on; "
        "if it says this again, delete the run's folder"
    )


def test_other_errors_of_training_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), checkpoints_in(Path("out/working")):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(OSError, match="Input/output error: 'out/working'"), checkpoints_in(Path("out/working")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_checkpoint_that_was_not_marked_to_the_end_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a damaged one, and the same command did not go on."""
    (tmp_path / "checkpoint-2").mkdir()
    with monkeypatch.context() as patch:
        stopped_at(patch, 1)
        with pytest.raises(Stopped):
            finish_checkpoint(tmp_path, 2)
    assert last_checkpoint(tmp_path) is None
    finish_checkpoint(tmp_path, 2)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_what_fails_after_the_last_rename_does_not_send_anybody_to_resume(
    tmp_path: Path, rm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, out = rm("a", seed=1), rm("b", seed=2), tmp_path / "warm"
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if out.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        done = here("average", a, b, "-o", out)
    said = f"warmerge: {tmp_path}: Input/output error; {out} is complete, but may not outlive a power cut\n"
    assert done == (1, "", said)
    assert len(load_file(out / "model.safetensors")) == len(load_file(a / "model.safetensors"))


# --- killed ---

# One process that runs the command once, so that all is imported. A child of it runs it again, and is killed at the
# n-th time that Python opens, renames or removes something beneath its folder.
_SERVER = """
import os, signal, sys
from warmerge import cli

place, out, *arguments = sys.argv[1:]
os.chdir(place)
here = os.getcwd()

def trial(n):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0
    def hook(event, given):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            names = [os.path.abspath(name) for name in given[:2] if isinstance(name, str | os.PathLike)]
            seen += any(os.fspath(name).startswith(here) and "/in" not in os.fspath(name) for name in names)
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
    if n:
        sys.addaudithook(hook)
    try:
        cli.app(arguments, prog_name="warmerge")
    except SystemExit as ended:
        os._exit(ended.code or 0)

try:
    cli.app(arguments, prog_name="warmerge")
except SystemExit as ended:
    assert not ended.code
os.rename(out, "expected")
for n in range(1, 200):
    code = trial(n)
    print(n, code, "there" if os.path.exists(out) else "nothing", flush=True)
    if code == 0:
        break
    if os.path.exists(out):
        os.rename(out, f"left-{n}")
    assert trial(0) == 0, n
    os.rename(out, f"again-{n}")
"""


def said(path: Path) -> dict[str, Any]:
    """Every file but for times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[str, Any] = {file.name: file.read_bytes() for file in files}
    manifest = json.loads(found.pop("warmerge.json", b"{}"))
    manifest.pop("seconds", None)
    return {name if path.is_dir() else "": data for name, data in found.items()} | {"manifest": manifest}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["average", "score"])
def test_killed_at_every_step_leaves_nothing_or_all_of_it(command: str, tmp_path: Path) -> None:
    for seed in range(2):
        tiny_models.own_folder(tmp_path / f"in-{seed}", seed=seed)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    out, arguments = {
        "average": ("warm", ["average", "in-0", "in-1", "-o", "warm", "--max-shard-size", "40KB"]),
        "score": ("out.jsonl", ["score", "in-0", "--data", "in.jsonl", "-o", "out.jsonl"]),
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, str(tmp_path), out, *arguments], capture_output=True, text=True, timeout=100,
        env=environment(OMP_NUM_THREADS="1"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = [line.split() for line in done.stdout.splitlines() if line.endswith(("there", "nothing"))]
    assert trials[-1][1:] == ["0", "there"]
    killed = [int(number) for number, code, _ in trials if code == "-9"]
    assert len(killed) == len(trials) - 1 >= 3
    expected = said(tmp_path / "expected")
    for n in killed:
        assert said(tmp_path / f"again-{n}") == expected
        if (tmp_path / f"left-{n}").exists():
            assert {**said(tmp_path / f"left-{n}"), ".warmerge.lock": b""} == {**expected, ".warmerge.lock": b""}
