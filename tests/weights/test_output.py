"""Writing: at no moment, whatever happens, is there a folder that loads and is wrong; and nobody's work is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file

import warmerge
from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.weights import output
from warmerge.weights.output import check_out, made_of

ROOT = Path(warmerge.__file__).parents[1]
Members = list[Path]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder to the byte; of warmerge.json what does not tell the time or the way.

    A lock that a crash left behind is empty and means nothing.
    """
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert files.pop(".warmerge.lock", b"") == b""
    if "warmerge.json" in files:
        manifest = json.loads(files["warmerge.json"])
        files["warmerge.json"] = json.dumps(
            {key: value for key, value in manifest.items() if key not in ("seconds", "resumed_shards", "command")}
        ).encode()
    return files


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up what is installed takes longer than these merges."""
    monkeypatch.setattr("warmerge.pipeline.average.versions", lambda: {"warmerge": "test"})


@pytest.fixture
def members(tmp_path: Path) -> Members:
    """Two small checkpoints of four tensors, with a config and a tokenizer."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        names = ("model.a.weight", "model.b.weight", "model.c.weight", "score.weight")
        folder = write_checkpoint(
            tmp_path / "in" / f"m{seed}", {n: torch.randn(1, 16) for n in names}, {"num_labels": 1}
        )
        (folder / "tokenizer.json").write_text("{}")
        made.append(folder)
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def left(out: Path) -> list[str]:
    return sorted(entry.name for entry in out.parent.iterdir())


# --- where OUT may be ---


def test_out_must_not_touch_an_input(members: Members, tmp_path: Path) -> None:
    for out in (members[0], members[1], members[0] / "merged", members[0].parent, members[0] / ".." / "m1"):
        before = tree(members[0])
        with pytest.raises(UsageError) as caught:
            warmerge.average(members, out, overwrite=True)
        first = members[1] if out == members[1] else members[0]
        assert str(caught.value) == f"{out} is, lies in, or holds the input {first}; choose another folder for -o"
        assert tree(members[0]) == before
    link = tmp_path / "link"
    link.symlink_to(members[0].parent)
    with pytest.raises(UsageError, match="is, lies in, or holds the input"):
        warmerge.average(members, link / "m1" / "merged")


def test_out_must_not_touch_the_base(members: Members, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"lies in, or holds the input {members[1]}; choose another"):
        warmerge.average([members[0], members[0]], members[1] / "x", rule="liti", eta=0.5, base=members[1])


def test_out_must_not_touch_the_folder_of_a_single_file(members: Members, out: Path) -> None:
    files = [member / "model.safetensors" for member in members]
    with pytest.raises(UsageError, match=f"lies in, or holds the input {members[0]}; choose another"):
        warmerge.average(files, members[0] / "merged")


@pytest.mark.parametrize("name", [".out.partial", ".out.old"])
def test_an_input_must_not_be_where_the_work_is_done(members: Members, out: Path, name: str) -> None:
    """Someone who recovers a model from a hidden folder must not see it emptied."""
    hidden = out.parent / name
    shutil.copytree(members[0], hidden)
    before = tree(hidden)
    with pytest.raises(UsageError, match="is, lies in, or holds the input"):
        warmerge.average([hidden, members[1]], out)
    assert tree(hidden) == before


def test_what_out_may_be(members: Members, out: Path) -> None:
    check_out(out, members, overwrite=False)
    out.mkdir()
    check_out(out, members, overwrite=False)  # empty
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError) as caught:
        check_out(out, members, overwrite=False)
    assert str(caught.value) == f"{out} exists and is not empty; choose another folder, or add --overwrite"
    with pytest.raises(UsageError) as caught:
        check_out(out, members, overwrite=True)
    assert str(caught.value) == (
        f"{out} was not written by warmerge (no warmerge.json in it), so --overwrite leaves it alone; delete it"
    )
    assert tree(out) == {"notes.txt": b"mine"}
    file, link = out.parent / "file", out.parent / "link"
    file.write_text("")
    link.symlink_to(out)
    for place, message in ((file, "is a file; -o takes a folder"), (link, "is a link; give the folder itself")):
        for overwrite in (False, True):
            with pytest.raises(UsageError) as caught:
                check_out(place, members, overwrite)
            assert str(caught.value) == f"{place} {message}"


def test_a_link_to_nothing_is_a_link_too(members: Members, out: Path) -> None:
    out.symlink_to(out.parent / "gone")
    with pytest.raises(UsageError, match="is a link; give the folder itself"):
        warmerge.average(members, out)
    assert left(out) == ["out"]


def test_a_parent_that_is_a_file(members: Members, out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(WarmergeError, match=str(out)):
        warmerge.average(members, out / "merged")


def test_parents_are_made(members: Members, out: Path) -> None:
    assert warmerge.average(members, out / "deep" / "er").out == out / "deep" / "er"
    assert left(out / "deep" / "er") == ["er"]


def test_an_empty_folder_is_filled(members: Members, out: Path) -> None:
    out.mkdir()
    warmerge.average(members, out)
    assert left(out) == ["out"]
    assert (out / "model.safetensors").is_file()


def test_overwrite_replaces_the_whole_folder(members: Members, out: Path) -> None:
    warmerge.average(members, out, max_shard_size="100B")
    (out / "stale.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="exists and is not empty"):
        warmerge.average(members, out)
    fresh = warmerge.average(members, out.parent / "fresh").out
    warmerge.average(members, out, overwrite=True)
    assert tree(out) == tree(fresh)
    assert left(out) == ["fresh", "out"]


def test_overwrite_leaves_the_old_folder_when_the_merge_is_refused(members: Members, out: Path) -> None:
    warmerge.average(members, out)
    before = tree(out)
    bad = load_file(members[1] / "model.safetensors")
    bad["score.weight"][0, 0] = float("nan")
    write_checkpoint(members[1], bad, {"num_labels": 1})
    with pytest.raises(RefusedError, match="holds nan at element 0"):
        warmerge.average(members, out, overwrite=True)
    assert tree(out) == before
    assert left(out) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(members: Members, out: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        warmerge.average(members, out, max_shard_size="100B")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


# --- a crash at every step ---


class Killed(BaseException):
    """Neither an Exception nor KeyboardInterrupt: nothing may count on being told of its own death."""


class Unsynced(NamedTuple):
    descriptor: int
    offset: int
    length: int


class Machine:
    """Stands in for `os`, and for what pathlib and shutil do, under warmerge.weights.output; dies at step `dies_at`.

    From then on every step fails, as for a process that is gone. With `power_cut`, the first half of a last write
    arrives, and everything else that was written but not fsynced is zeros. fsync itself is only recorded: it costs
    time and shows nothing.
    """

    STEPS = ("fsync", "rename", "pwritev", "posix_fallocate", "unlink", "open", "mkdir", "rmtree")

    def __init__(self, dies_at: int | None = None, power_cut: bool = False) -> None:
        self.dies_at, self.power_cut = dies_at, power_cut
        self.log: list[str] = []
        self.dead = False
        self.lock = threading.RLock()
        self.unsynced: dict[int, list[Unsynced]] = {}

    def step(self, name: str, last_words: Callable[[], None] = lambda: None) -> None:
        with self.lock:
            if not self.dead:
                self.log.append(name)
                if len(self.log) == self.dies_at:
                    last_words()
                    self.die()
            if self.dead:
                raise Killed

    def die(self) -> None:
        self.dead = True
        for pieces in self.unsynced.values():
            for piece in pieces:
                if self.power_cut:
                    os.pwrite(piece.descriptor, bytes(piece.length), piece.offset)
                os.close(piece.descriptor)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.STEPS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return real(*args, **kwargs)

        return call

    def fsync(self, descriptor: int) -> None:
        self.step("fsync")
        with self.lock:
            for piece in self.unsynced.pop(os.fstat(descriptor).st_ino, []):
                os.close(piece.descriptor)

    def pwritev(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        def torn() -> None:
            if self.power_cut:
                os.pwritev(descriptor, [buffers[0][: len(buffers[0]) // 2]], offset)

        self.step("pwritev", torn)
        with self.lock:
            written = os.pwritev(descriptor, buffers, offset)
            pieces = self.unsynced.setdefault(os.fstat(descriptor).st_ino, [])
            pieces.append(Unsynced(os.dup(descriptor), offset, written))
        return written

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output, "os", self)
        for name in ("unlink", "mkdir"):
            monkeypatch.setattr(pathlib.Path, name, self._path(name, getattr(pathlib.Path, name)))

        class Shutil:
            def rmtree(_, *args: Any, **kwargs: Any) -> None:  # noqa: N805
                self.step("rmtree")
                shutil.rmtree(*args, **kwargs)

            disk_usage = staticmethod(shutil.disk_usage)

        monkeypatch.setattr(output, "shutil", Shutil())

    def _path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            if "place" in path.parts:
                self.step(name)
            return real(path, *args, **kwargs)

        return call


SHARDS = {"one shard": "5GB", "two shards": "128B"}


def check_partial(partial: Path, expected: dict[str, bytes]) -> None:
    """What lies in the hidden folder after a crash is not loadable, or is the merged model and no other."""
    for path in partial.iterdir():
        if path.name.endswith(".safetensors"):
            assert path.read_bytes() == expected[path.name], path.name
        elif path.name.endswith(".safetensors.part"):
            content, final = path.read_bytes(), expected[path.name.removesuffix(".part")]
            header = 8 + int.from_bytes(final[:8], "little")
            if content[:header] == final[:header]:
                assert content == final, path.name
        elif path.name == "model.safetensors.index.json":
            content, final = path.read_bytes(), expected[path.name]
            assert content in (final, final[: len(content)], bytes(len(content))), "a torn index is no JSON"
            assert all((partial / file).is_file() for file in expected if file.endswith(".safetensors"))


@pytest.mark.parametrize(
    ("size", "crash"), [("one shard", "killed"), ("two shards", "killed"), ("two shards", "power cut")]
)
def test_a_crash_at_every_step_leaves_nothing_wrong(
    members: Members, out: Path, monkeypatch: pytest.MonkeyPatch, size: str, crash: str
) -> None:
    choices: dict[str, Any] = {"max_shard_size": SHARDS[size], "threads": 1}
    expected = tree(warmerge.average(members, out.parent / "expected", **choices).out)
    machine = Machine()
    with monkeypatch.context() as patch:
        machine.install(patch)
        assert tree(warmerge.average(members, out, **choices).out) == expected
    steps = machine.log
    assert set(steps) == {"fsync", "rename", "pwritev", "posix_fallocate", "unlink", "open", "mkdir", "rmtree"}
    assert machine.unsynced == {}, "something was published that was not on the disk"
    assert len(steps) > 40
    outcomes = set()
    for at in range(1, len(steps) + 1):
        shutil.rmtree(out)
        with monkeypatch.context() as patch:
            Machine(at, power_cut=crash == "power cut").install(patch)
            with pytest.raises(Killed):
                warmerge.average(members, out, **choices)
        where = f"step {at} of {len(steps)}: {steps[at - 1]}"
        partial = out.parent / ".out.partial"
        if out.exists():
            assert tree(out) == expected, where
            outcomes.add("published")
            continue
        resumable = (partial / "progress.json").is_file()
        if partial.exists():
            check_partial(partial, expected)
        if not resumable:
            with pytest.raises(UsageError, match="nothing to resume: no interrupted merge into"):
                warmerge.average(members, out, resume=True, **choices)
        merged = warmerge.average(members, out, resume=resumable, **choices)
        assert tree(out) == expected, where
        assert left(out) == ["expected", "out"], where
        outcomes.add(("resumed", len(merged.manifest["resumed_shards"])) if resumable else "again")
    shards = 1 if size == "one shard" else 2
    assert outcomes == {"published", "again", *(("resumed", count) for count in range(shards + 1))}


def test_a_crash_at_every_step_of_overwriting_keeps_the_old_or_the_new(
    members: Members, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: dict[str, Any] = {"threads": 1, "overwrite": True}
    old = tree(warmerge.average(members, out, rule="lambda", lam=0.25).out)
    saved = shutil.copytree(out, out.parent / "saved")
    new = tree(warmerge.average(members, out.parent / "new").out)
    machine = Machine()
    with monkeypatch.context() as patch:
        machine.install(patch)
        warmerge.average(members, out, **choices)
    outcomes = set()
    for at in range(1, len(machine.log) + 1):
        shutil.rmtree(out)
        shutil.copytree(saved, out)
        with monkeypatch.context() as patch:
            Machine(at).install(patch)
            with pytest.raises(Killed):
                warmerge.average(members, out, **choices)
        if out.exists():
            outcomes.add("old" if tree(out) == old else "new")
            assert tree(out) in (old, new)
        else:  # between two renames: both are there, under hidden names
            outcomes.add("both")
            assert tree(out.parent / ".out.old") == old
        warmerge.average(members, out, **choices)
        assert tree(out) == new
        assert left(out) == ["new", "out", "saved"]
    assert outcomes >= {"old", "new"}


def test_data_is_on_the_disk_before_the_header_and_the_header_before_the_record(
    members: Members, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Recorder(Machine):
        def fsync(self, descriptor: int) -> None:
            events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

        def pwritev(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            events.append(f"{'header' if offset == 0 else 'data'} {name}")
            return os.pwritev(descriptor, buffers, offset)

        def rename(self, old: Path, new: Path) -> None:
            events.append(f"rename {Path(old).name} {Path(new).name}")
            os.rename(old, new)

    with monkeypatch.context() as patch:
        Recorder().install(patch)
        warmerge.average(members, out, threads=1)
    shard = "model.safetensors.part"
    order = [
        f"data {shard}",
        f"sync {shard}",
        f"header {shard}",
        f"rename {shard} model.safetensors",
        "sync .out.partial",
        "rename .out.partial out",
        "sync place",
    ]
    places = [events.index(event) for event in order]
    assert places == sorted(places)
    header = events.index(f"header {shard}")
    assert events[header + 1 : header + 4] == [
        f"sync {shard}",
        "header progress.json.new",
        "sync progress.json.new",
    ]
    for name in ("config.json", "tokenizer.json", "README.md", "warmerge.json"):
        assert events.index(f"sync {name}") == events.index(f"header {name}") + 1
        assert events.index(f"sync {name}") < events.index("rename .out.partial out")
    assert events.index("rename .out.partial out") == len(events) - 2


# --- resuming ---


@pytest.fixture
def interrupted(members: Members, out: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """interrupted(**choices) leaves a merge into `out` that was killed after its second shard."""

    def run(**choices: Any) -> None:
        marked: list[str] = []

        def mark(into: Any, shard: Any, note: Any) -> None:
            if len(marked) == 2:
                raise Killed
            real(into, shard, note)
            marked.append(shard.file)

        real = output.mark_finished
        with monkeypatch.context() as patch:
            patch.setattr("warmerge.weights.average.mark_finished", mark)
            with pytest.raises(Killed):
                warmerge.average(members, out, **({"max_shard_size": "64B", "threads": 1} | choices))
        assert marked == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
        assert not out.exists()

    return run


def test_resume_takes_the_finished_shards_and_says_so(
    members: Members, out: Path, interrupted: Callable[..., None]
) -> None:
    expected = tree(warmerge.average(members, out.parent / "expected", max_shard_size="64B").out)
    interrupted()
    part = out.parent / ".out.partial" / "model-00001-of-00004.safetensors.part"
    written = part.stat().st_ino, part.stat().st_mtime_ns
    merged = warmerge.average(members, out, resume=True, max_shard_size="64B")
    assert merged.manifest["resumed_shards"] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2)]
    stat = (out / "model-00001-of-00004.safetensors").stat()
    assert (stat.st_ino, stat.st_mtime_ns) == written
    assert tree(out) == expected


def test_a_measuring_rule_resumes_with_all_its_coefficients(
    members: Members, out: Path, interrupted: Callable[..., None]
) -> None:
    base = write_checkpoint(
        out.parent.parent / "base",
        {name: torch.zeros_like(tensor) for name, tensor in load_file(members[0] / "model.safetensors").items()},
        {"num_labels": 1},
    )
    (base / "tokenizer.json").write_text("{}")
    choices: dict[str, Any] = {"rule": "slerp", "base": base, "max_shard_size": "64B"}
    expected = warmerge.average(members, out.parent / "expected", **choices)
    interrupted(**choices)
    merged = warmerge.average(members, out, resume=True, **choices)
    assert merged.manifest["coefficients"] == expected.manifest["coefficients"]
    assert len(merged.manifest["coefficients"]["per_tensor"]) == 4
    assert tree(out) == tree(expected.out)


def touched(members: Members) -> dict[str, Any]:
    os.utime(members[0] / "model.safetensors", ns=(5, 5))
    return {}


def rewritten(members: Members) -> dict[str, Any]:
    file = members[1] / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + b"\x40")
    return {}


CHANGES: dict[str, Callable[[Members], dict[str, Any]]] = {
    "an input was touched": touched,
    "an input was rewritten": rewritten,
    "another rule": lambda members: {"rule": "weighted", "weights": (0.5, 0.5)},
    "another dtype": lambda members: {"dtype": "bfloat16"},
    "another shard size": lambda members: {"max_shard_size": "128B"},
    "a member more": lambda members: {"checkpoints": [*members, shutil.copytree(members[0], members[0].parent / "m3")]},
    "another order": lambda members: {"checkpoints": members[::-1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_another_merge(
    members: Members, out: Path, interrupted: Callable[..., None], change: str
) -> None:
    interrupted()
    choices: dict[str, Any] = {"max_shard_size": "64B", "allow_duplicates": True} | CHANGES[change](members)
    checkpoints = choices.pop("checkpoints", members)
    kept = left(out.parent / ".out.partial" / "x")
    with pytest.raises(UsageError) as caught:
        warmerge.average(checkpoints, out, resume=True, **choices)
    assert str(caught.value) == (
        f"the interrupted merge into {out} had other inputs or another plan; start again without --resume"
    )
    assert not out.exists()
    assert left(out.parent / ".out.partial" / "x") == kept
    warmerge.average(checkpoints, out, **choices)
    assert left(out) == ["out"]


def test_resume_refuses_another_choice_of_copied_tensors(
    members: Members, out: Path, interrupted: Callable[..., None]
) -> None:
    """The shards would look the same from outside, but hold tensors of one member and of another."""
    choices: dict[str, Any] = {"max_shard_size": "64B", "only": ["score*"]}
    interrupted(**choices, rest_from=1)
    with pytest.raises(UsageError, match="had other inputs or another plan; start again without --resume"):
        warmerge.average(members, out, resume=True, **choices, rest_from=2)
    other = choices | {"only": ["score*", "*a.weight"]}
    with pytest.raises(UsageError, match="had other inputs or another plan; start again without --resume"):
        warmerge.average(members, out, resume=True, **other, rest_from=1)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-8], lambda data: bytes(16) + data[16:], lambda data: b""],
    ids=["cut", "no header", "empty"],
)
def test_a_finished_shard_that_was_damaged_is_written_anew(
    members: Members, out: Path, interrupted: Callable[..., None], damage: Callable[[bytes], bytes]
) -> None:
    expected = tree(warmerge.average(members, out.parent / "expected", max_shard_size="64B").out)
    interrupted()
    part = out.parent / ".out.partial" / "model-00001-of-00004.safetensors.part"
    part.write_bytes(damage(part.read_bytes()))
    merged = warmerge.average(members, out, resume=True, max_shard_size="64B")
    assert merged.manifest["resumed_shards"] == ["model-00002-of-00004.safetensors"]
    assert tree(out) == expected


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"finished": {}}', b"null"])
def test_a_record_that_is_damaged_is_not_resumed(
    members: Members, out: Path, interrupted: Callable[..., None], content: bytes
) -> None:
    interrupted()
    (out.parent / ".out.partial" / "progress.json").write_bytes(content)
    with pytest.raises(UsageError, match="start again without --resume"):
        warmerge.average(members, out, resume=True, max_shard_size="64B")


def test_nothing_to_resume(members: Members, out: Path) -> None:
    with pytest.raises(UsageError) as caught:
        warmerge.average(members, out, resume=True)
    assert str(caught.value) == f"nothing to resume: no interrupted merge into {out}"
    assert left(out) == []


# --- real processes ---

# A job that a shell put in the background ignores Ctrl-C, and so would its children: the tests may be such a job.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import warmerge.weights.average as average
from warmerge.cli import main
finished = average.mark_finished
def slowly(*args):
    finished(*args)
    time.sleep(0.02)
average.mark_finished = slowly
sys.argv = ["warmerge", *sys.argv[1:]]
main()
"""


@pytest.fixture
def slow_merge(tmp_path: Path, out: Path) -> Iterator[tuple[Members, subprocess.Popen[str]]]:
    """A real `warmerge average` of 150 shards, caught when some of them are finished."""
    members = [
        write_checkpoint(
            tmp_path / f"many{seed}",
            {"score.weight": torch.full((1, 16), seed + 1)}
            | {f"x.{n:03}": torch.full((16,), n + seed + 1) for n in range(150)},
            config=None,
        )
        for seed in (0.0, 2.0)
    ]
    command = [sys.executable, "-c", SLOW, "average", *map(str, members), "-o", str(out), "--max-shard-size", "64B"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        progress, deadline = out.parent / ".out.partial" / "progress.json", time.monotonic() + 60
        while time.monotonic() < deadline:
            if progress.is_file() and len(json.loads(progress.read_bytes())["finished"]) >= 5:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        yield members, process
        process.kill()


def check_resumed(members: Members, out: Path) -> None:
    expected = warmerge.average(members, out.parent / "expected", max_shard_size="64B").out
    merged = warmerge.average(members, out, max_shard_size="64B", resume=True)
    assert 5 <= len(merged.manifest["resumed_shards"]) < 151
    assert tree(out) == tree(expected)
    assert load_file(out / "model-00151-of-00151.safetensors")["x.149"].tolist() == [151.0] * 16


def test_kill_9_in_the_middle_then_resume(slow_merge: tuple[Members, subprocess.Popen[str]], out: Path) -> None:
    members, process = slow_merge
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert left(out) == [".out.partial"]
    assert not list((out.parent / ".out.partial").glob("*.safetensors"))
    check_resumed(members, out)


def test_ctrl_c_says_how_to_resume(slow_merge: tuple[Members, subprocess.Popen[str]], out: Path) -> None:
    members, process = slow_merge
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    words = lines[0].split()
    assert words[:2] == ["warmerge:", "stopped;"]
    assert 5 <= int(words[2]) < 151
    assert " ".join(words[3:]) == (
        "of 151 shards are finished and kept; run the same command with --resume to continue, or delete "
        f"{out.parent / '.out.partial'}"
    )
    check_resumed(members, out)


# --- the disk, and two at once ---


def test_a_full_disk(members: Members, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Machine):
        def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
            self.log.append("posix_fallocate")
            if self.log.count("posix_fallocate") == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(descriptor, offset, length)

    expected = tree(warmerge.average(members, out.parent / "expected", max_shard_size="64B").out)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        Full().install(patch)
        with pytest.raises(WarmergeError) as caught:
            warmerge.average(members, out, max_shard_size="64B")
    assert str(caught.value) == (
        f"{out}: No space left on device; 2 of 4 shards are finished and kept; run the same command with "
        f"--resume to continue, or delete {out.parent / '.out.partial'}"
    )
    assert caught.value.exit_code == 1
    assert not out.exists()
    warmerge.average(members, out, max_shard_size="64B", resume=True)
    assert tree(out) == expected
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_little_room_is_seen_before_anything_is_written(
    members: Members, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_100))
    with pytest.raises(WarmergeError) as caught:
        warmerge.average(members, out)
    message = str(caught.value)
    assert message.startswith(f"{out.parent}: 1,00")
    assert message.endswith(" bytes are needed, 1,000,100 are free; nothing was written")
    assert caught.value.exit_code == 1
    assert left(out) == []


def test_too_little_room_keeps_what_could_be_resumed(
    members: Members, out: Path, interrupted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted()
    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
        with pytest.raises(WarmergeError, match=r"are needed, [\d,]+ are free"):
            warmerge.average(members, out, max_shard_size="64B", resume=True)
    merged = warmerge.average(members, out, max_shard_size="64B", resume=True)
    assert len(merged.manifest["resumed_shards"]) == 2


def test_two_merges_into_one_folder_at_once(members: Members, out: Path) -> None:
    second: list[str] = []

    def meanwhile(_: int) -> None:
        if not second:
            for resume in (False, True):
                with pytest.raises(WarmergeError) as caught:
                    warmerge.average(members, out, resume=resume)
                second.append(str(caught.value))

    warmerge.average(members, out, progress=meanwhile, threads=1)
    message = f"another merge is writing {out} at this moment; wait for it or choose another -o"
    assert second == [message] * 2
    assert tree(out) == tree(warmerge.average(members, out.parent / "alone").out)


def test_the_folder_stays_locked_until_it_has_its_name(
    members: Members, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second merge that starts while the first is published must not clear what is about to be OUT."""
    tried: list[str] = []

    class Late(Machine):
        def rename(self, old: Path, new: Path) -> None:
            if new == out:
                with monkeypatch.context() as undone:
                    undone.setattr(output, "os", os)
                    try:
                        warmerge.average(members, out, progress=lambda _: os.rename(old, new))
                    except WarmergeError as error:
                        tried.append(str(error))
            if not out.exists():
                os.rename(old, new)

    with monkeypatch.context() as patch:
        Late().install(patch)
        warmerge.average(members, out)
    assert tried == [f"another merge is writing {out} at this moment; wait for it or choose another -o"]
    assert tree(out) == tree(warmerge.average(members, out.parent / "alone").out)


def test_the_lock_goes_with_the_process_that_held_it(members: Members, out: Path) -> None:
    """A lock file that a crash left behind locks nothing."""
    partial = out.parent / ".out.partial"
    partial.mkdir()
    (partial / ".warmerge.lock").write_text("")
    (partial / "old.part").write_text("")
    with (partial / ".warmerge.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(WarmergeError, match="another merge is writing"):
            warmerge.average(members, out)
    warmerge.average(members, out)
    assert left(out) == ["out"]


# --- what it says afterwards ------------------------------------------------------------------------------------------


def test_what_a_folder_was_made_of(tmp_path: Path) -> None:
    first, second = {"checkpoint": "a", "fingerprint": "1"}, {"checkpoint": "b", "fingerprint": "2"}
    assert made_of(tmp_path) == []
    for content, expected in (
        ({"inputs": [first, second]}, [first, second]),
        ({"input": first}, [first]),
        ({"inputs": None}, []),
        ({"inputs": ["a", first]}, [first]),
        ({"inputs": [first], "input": "b"}, [first]),
        ({"inputs": 3}, []),
        ({}, []),
        ([first], []),
    ):
        (tmp_path / "warmerge.json").write_text(json.dumps(content))
        assert made_of(tmp_path) == expected, content
    (tmp_path / "warmerge.json").write_bytes(b'{"inputs": [')
    assert made_of(tmp_path) == []
