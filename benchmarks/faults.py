"""What is left when a command is killed, its disk is full or failing, or its inputs change: never something wrong.

Each trial is a fork of one process that has imported everything: a child in a fresh folder runs one command as a user
types it, on tiny models, and one thing goes wrong. Calls on files are counted, and made to fail, by a layer between the
process and libc (faults_layer.c, compiled here with gcc). What is left is compared, file by file, with what an
undisturbed run leaves; then the same command is given again, as its message says.

    python benchmarks/faults.py                                     # all commands, all faults; an hour and a half
    python benchmarks/faults.py --only average --only eval --trials 20
    python benchmarks/faults.py --only rl --fault 'killed at a call' --verbose
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import errno
import faulthandler
import gc
import hashlib
import importlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# As in faults_layer.c.
OPEN_READ, READ, MAP, OPEN_WRITE, WRITE, ALLOCATE, SYNC, NAME, CLOSE = (1 << bit for bit in range(9))
COUNT, FAIL, FAIL_ON, HALF, INTERRUPT, KILL_BEFORE, KILL_AFTER, SWAP = range(8)
READS, WRITES = OPEN_READ | READ | MAP, OPEN_WRITE | WRITE | ALLOCATE
# Rewards that are kept to go on from.
_KEPT = ("scores.safetensors", "points.safetensors")
_FEW = ("--resamples", "100")
_TOO_LONG = 240.0


@dataclass(frozen=True)
class Case:
    """A command, and what it leaves.

    `again` is added to the second try where the message of the first one asks for it; `before` lies in the output
    folder when it begins; `going_on` are files of a run that is not finished and says so; `victims` are files that are
    changed while they are read.
    """

    name: str
    arguments: tuple[str, ...]
    out: str = "out"
    going_on: str = r"$^"
    before: str | None = None
    victims: tuple[str, ...] = ()


_RM = ("rm-0/model-00002-of-00003.safetensors", "rm-1/model.safetensors", "rm-0/config.json", "rm-0/tokenizer.json")
_ONE = ("rm-1/model.safetensors", "rm-1/config.json", "rm-1/tokenizer.json")
_MEMBER = ("members/01/model.safetensors", "members/02/model.safetensors", "members/01/tokenizer.json")
_SMALL_RL = (
    "--steps", "4", "--batch", "8", "--answers", "4", "--lr", "1e-3", "--max-new-tokens", "8", "--control-every", "2",
    "--samples", "2", "--sample-every", "2", "--keep-every", "2", "--save-every", "2", "--micro-batch", "4",
    "--start-answers", "8",
)  # fmt: skip
_SMALL_TRAINING = ("--runs", "2", "--lr", "1e-3", "--batch", "4", "--steps", "4", "--engine", "inline", *_FEW)
_SAMPLING = r"out/(.*/)?[^/]*\.sampling\.json$"
# Starts whose head is not fitted yet, and checkpoints to go on from.
_TRAINING = r"out/(train\.json|init(-\d+)?/.*|sft/.*|.*\.jsonl)$"
CASES = (
    Case("average", ("average", "rm-0", "rm-1", "rm-2", "-o", "out", "--max-shard-size", "60KB"), victims=_RM),
    Case("average --resume", ("average", "rm-0", "rm-1", "rm-2", "-o", "out", "--max-shard-size", "60KB")),
    Case("average --overwrite", ("average", "rm-1", "rm-2", "-o", "out", "--overwrite"), before="warm"),
    Case("average, LoRA", ("average", "lora-0", "lora-1", "--base", "world-start", "-o", "out"),
         victims=("lora-1/adapter_model.safetensors", "world-start/model.safetensors", "lora-0/adapter_config.json")),
    Case("average --stream", ("average", "me/a", "me/b", "--stream", "-o", "out")),
    Case("eval", ("eval", "rm-0", "rm-1", "--data", "val=val.jsonl", *_FEW, "-o", "out"), victims=_RM),
    Case("eval --overwrite", ("eval", "rm-0", "rm-1", "--data", "val=val.jsonl", *_FEW, "-o", "out", "--overwrite"),
         before="results"),
    Case("lmc-curve", ("lmc-curve", "rm-0", "rm-1", "--data", "val=val.jsonl", "--points", "3", *_FEW, "-o", "out"),
         victims=_RM),
    Case("score", ("score", "rm-1", "--data", "pool.jsonl", "-o", "scored.jsonl"), out="scored.jsonl", victims=_ONE),
    Case("train", ("train", "--init", "world-start", "--data", "train.jsonl", "--val", "val=val.jsonl",
                   *_SMALL_TRAINING, "-o", "out"), going_on=_TRAINING, victims=("world-start/model.safetensors",)),
    Case("train --base", ("train", "--base", "world/base", "--data", "train.jsonl", *_SMALL_TRAINING,
                          "--sft-steps", "4", "--sft-checkpoints", "2", "--sft-batch", "4", "-o", "out"),
         going_on=_TRAINING, victims=("world/base/model.safetensors",)),
    Case("probe", ("probe", "rm-1", "--data", "train.jsonl", "-o", "out"), victims=_ONE),
    Case("bon", ("bon", "--policy", "world/sft", "--prompts", "world/held-out.jsonl", "-n", "4", "--max-new-tokens",
                 "6", "--rm", "members/01", "--warm", "warm=members/01,members/02", *_FEW, "-o", "out"),
         going_on=_SAMPLING, victims=(*_MEMBER, "world/sft/model.safetensors")),
    Case("rl", ("rl", "--policy", "world/sft", "--prompts", "world/prompts.jsonl", "--warm", "members/01,members/02",
                "--control", "members/03", *_SMALL_RL, "-o", "out"),
         going_on=r"out/(rl\.json|working/.*)$", victims=(*_MEMBER, "world/sft/model.safetensors")),
    Case("rl-report", ("rl-report", "seed-0/rl", "-o", "out")),
    Case("winrate", ("winrate", "--policy", "world/sft", "--policy", "world/base", "--prompts", "world/held-out.jsonl",
                     "--judge", "members/01", "--max-new-tokens", "6", *_FEW, "-o", "out"),
         going_on=_SAMPLING, victims=(_MEMBER[0], "world/sft/model.safetensors")),
    Case("report", ("report", "results", "lmc", "-o", "out.html"), out="out.html"),
    Case("theory", ("theory", "--trials", "20", "-o", "out")),
    Case("plot", ("plot", "out"), before="results"),
    Case("push", ("push", "warm", "me/pushed", "--license", "mit", "--no-run", "-y"), out="pushed",
         victims=("warm/model.safetensors", "warm/config.json")),
    Case("inspect", ("inspect", "rm-0", "rm-1", "--distances"), out="said", victims=_RM),
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one trial: at a call, at a time (a share of the undisturbed run's), or both."""

    action: int = COUNT
    mask: int = 0
    at: int = 0
    error: int = 0
    below: str = ""
    after: float | None = None
    victim: str = ""
    swap: str = ""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code or minus the signal, what it said, calls seen, at which call it went wrong."""

    code: int
    out: str
    err: str
    seen: int
    story: str
    seconds: float


@dataclass
class Row:
    """What became of the trials of one command under one fault."""

    case: str
    fault: str
    trials: int = 0
    refused: int = 0
    stopped: int = 0
    complete: int = 0
    wrong: int = 0
    tracebacks: int = 0
    unnamed: int = 0
    again: int = 0
    recovered: int = 0
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        recovered = f"{self.recovered} of {self.again}" if self.again else "another question"
        cells = (self.case, self.fault, self.trials, self.refused, self.stopped, self.complete, self.wrong,
                 self.tracebacks, self.unnamed, recovered)  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


HEADER = (
    "command", "what goes wrong", "trials", "refused or failed, with a message", "dead, nothing wrong left",
    "complete and right", "loads and is wrong", "tracebacks", "file not named", "right after the same command again",
)  # fmt: skip

# The columns of the table of sums, and the faults that each of them counts.
_KINDS = {
    "killed": ("killed",), "disk full": ("disk full",), "writing fails": ("a write",), "reading fails": ("a read",),
    "short, interrupted": ("short", "an interrupted"), "input changed": ("an input",),
}  # fmt: skip


def sums(lines: Sequence[str]) -> Iterator[str]:
    """The rows of a printed table, put together: a line for each command, and one for all."""
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in lines]
    yield "| " + " | ".join((HEADER[0], *_KINDS, *HEADER[3:])) + " |\n|" + "---|" * (len(_KINDS) + len(HEADER) - 2)
    for name in (*dict.fromkeys(row[0] for row in rows), "all"):
        mine = [row for row in rows if name in (row[0], "all")]
        kinds = [sum(int(row[2]) for row in mine if row[1].startswith(begins)) for begins in _KINDS.values()]
        again = [row[9].split(" of ") for row in mine if " of " in row[9]]
        recovered = " of ".join(f"{sum(int(pair[i]) for pair in again):,}" for i in range(2))
        counts = (f"{count:,}" for count in (*kinds, *(sum(int(row[i]) for row in mine) for i in range(3, 9))))
        yield "| " + " | ".join((name, *counts, recovered)) + " |"


# --- what is left ---


def meaning(path: Path) -> Any:
    """What a file says, in a form that can be compared.

    Raises:
        ValueError: nothing, for it does not load.
    """
    data = path.read_bytes()
    match path.suffix:
        case ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load

            try:
                tensors = load(data)
            except SafetensorError as error:
                raise ValueError(str(error)) from None
            return {name: hashlib.sha256(_bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
        case ".json":
            return json.loads(data)
        case ".jsonl":
            lines = data.decode().split("\n")
            return [json.loads(line) for line in lines[:-1]]  # what follows the last line end is no line yet
        case ".csv":
            return list(csv.DictReader(io.StringIO(data.decode())))
        case ".svg":
            with contextlib.suppress(ElementTree.ParseError):
                ElementTree.fromstring(data)
                return data
            raise ValueError("not an SVG")
        case ".png":
            if not data.endswith(b"IEND\xaeB`\x82"):
                raise ValueError("not a PNG")
        case ".html":
            if not data.rstrip().endswith(b"</html>"):
                raise ValueError("not a page")
            return re.sub(rb"\d+(\.\d+)? s\b", b"", data)
    return data


def _bytes_of(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def left(work: Path, case: Case) -> dict[str, Any]:
    """Every file that a user would see of the output, logs left out, and what it says; None where it does not load."""
    top = work / case.out
    files = sorted(top.rglob("*")) if top.is_dir() else [top]
    found: dict[str, Any] = {}
    for path in files:
        name = path.relative_to(work)
        if path.is_file() and path.suffix != ".txt" and not any(part.startswith(".") for part in name.parts):
            try:
                found[str(name)] = meaning(path)
            except (ValueError, UnicodeDecodeError):
                found[str(name)] = None
    return found


def listing(work: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time, hidden ones too."""
    states = {str(path): path.lstat() for path in work.rglob("*")}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def volatile(a: Any, b: Any) -> set[str]:
    """Names of the fields in which two undisturbed runs differ: times."""
    if isinstance(a, dict) and isinstance(b, dict):
        return set().union(*({key} if not isinstance(value, dict | list) and value != b.get(key)
                             else volatile(value, b.get(key)) for key, value in a.items()))  # fmt: skip
    if isinstance(a, list) and isinstance(b, list):
        return set().union(*(volatile(x, y) for x, y in zip(a, b, strict=False)))
    return set()


def settled(value: Any, times: set[str]) -> Any:
    """The same without those fields, and without the seconds in sentences."""
    if isinstance(value, str):
        return re.sub(r"in [\d.,]+ s: [\d.,]+ a second", "", value)
    if isinstance(value, dict):
        return {key: settled(inner, times) for key, inner in value.items() if key not in times}
    return [settled(inner, times) for inner in value] if isinstance(value, list) else value


def admitted(found: Mapping[str, Any], name: str) -> bool:
    """Whether a file is of a table of members which says itself that some of them failed."""
    table = found.get(str(Path(name).with_name("training.json"))) or {}
    return Path(name).name.startswith("training") and any(row["failed"] for row in table.get("members", ()))


def verdict(found: Mapping[str, Any], expected: Mapping[str, Any], case: Case, times: set[str]) -> str:
    """ "complete", "" for nothing or a part that says so, or what is wrong with what is left."""
    # What a model is loaded from must all be there.
    parts = [
        name for name in expected if re.search(r"(\.safetensors|\.index\.json|config\.json|tokenizer.*\.json)$", name)
    ]
    whole = {str(Path(name).parent) for name in parts if name.endswith("config.json")}
    for name, value in found.items():
        if value is None or re.match(case.going_on, name) or admitted(found, name):
            continue
        if name not in expected:
            return f"{name} is no file of an undisturbed run"
        a, b = settled(value, times), settled(expected[name], times)
        part = isinstance(a, list) and name.endswith(".jsonl") and a == b[: len(a)]
        kept = name.endswith(_KEPT) and a.items() <= b.items()
        if a != b and not part and not kept:
            return f"{name} is another than an undisturbed run's"
    for folder in whole:
        inside = {name for name, value in found.items() if str(Path(name).parent) == folder and value is not None}
        lacking = {name for name in parts if str(Path(name).parent) == folder} - inside
        if any(name.endswith(".safetensors") for name in inside) and lacking:
            return f"{folder} would load without {min(lacking)}"
    same = all(name in found and settled(found[name], times) == settled(expected[name], times) for name in expected
               if not name.endswith(_KEPT))  # fmt: skip
    return "complete" if same else ""


# --- one trial ---


class Bench:
    """A folder with the inputs, the layer, and the Hub that some commands talk to."""

    def __init__(self, place: Path, layer: Any, hub: Hub) -> None:
        self.place, self.layer, self.hub = place, layer, hub
        self.world = place / "world"

    def fresh(self, case: Case, victim: str = "") -> Path:
        """An empty folder of the same name for each trial, with links to the inputs, or a copy of the one to change."""
        work = self.place / re.sub(r"\W+", "-", case.name)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for entry in self.world.iterdir():
            (work / entry.name).symlink_to(entry)
        if case.before:
            shutil.copytree(self.world / case.before, work / case.out)
        if victim:
            top = Path(victim).parts[0]
            (work / top).unlink()
            shutil.copytree(self.world / top, work / top)
            shutil.copy(work / victim, work / "other")
            _change(work / "other")
        if case.name == "push":
            self.hub.ask("forget")
        return work

    def run(self, case: Case, work: Path, fault: Fault, seconds: float = 0.0, more: Sequence[str] = ()) -> Ended:
        """One command in a child of its own."""
        begun = time.perf_counter()
        heard = work.parent / f"{work.name}.heard"
        shutil.rmtree(heard, ignore_errors=True)
        heard.mkdir()
        for name in ("out", "err"):
            (heard / name).touch()
        child = os.fork()
        if child == 0:
            self._in_child(case, work, heard, fault, more)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        deadline, now = begun + _TOO_LONG, begun
        when = None if fault.after is None else begun + fault.after * seconds
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            last, now = now, time.perf_counter()
            deadline += now - last if now - last > 5 else 0  # the machine itself was asleep
            if (when is not None and now >= when) or now >= deadline:
                if fault.swap and now < deadline:
                    change(work, fault)
                else:
                    os.killpg(child, signal.SIGKILL)
                when = None
            time.sleep(0.001)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it may have started
        said = {name: (heard / name).read_text(errors="replace") for name in ("out", "err")}
        seen, _, story = (_text(heard / "calls") or "0").partition(" ")
        if case.name == "inspect" and code == 0:
            (work / "said").write_text(said["out"])
        if case.name == "push":
            for name, text in self.hub.ask("dump").items():
                (work / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
                (work / "pushed" / name).write_bytes(bytes.fromhex(text))
        return Ended(code, said["out"], said["err"], int(seen), story, time.perf_counter() - begun)

    def _in_child(self, case: Case, work: Path, heard: Path, fault: Fault, more: Sequence[str]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            os.chdir(work)
            for number, name in ((1, "out"), (2, "err")):
                file = os.open(heard / name, os.O_WRONLY | os.O_APPEND)
                os.dup2(file, number)
                os.close(file)
            below = (
                (work / fault.victim).parent.resolve() if fault.victim else self.place if fault.mask & READS else work
            )
            if fault.victim:
                how = b"\0" if not fault.swap or fault.after is not None else fault.swap.encode()
                self.layer.faults_swap(bytes(work / fault.victim), bytes(work / "other"), how)
            if fault.mask:
                self.layer.faults_arm(bytes(below), fault.mask, fault.at, fault.action, fault.error)
            faulthandler.dump_traceback_later(_TOO_LONG - 20)  # to see where it hangs
            code = self._main([*case.arguments, *more])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001 - a traceback is what is looked for
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            self.layer.faults_disarm()
            Path(heard / "calls").write_text(f"{self.layer.faults_seen()} {self.layer.faults_story().decode()}")
            if os.environ.get("FAULTS_MODULES"):
                Path(os.environ["FAULTS_MODULES"]).write_text("\n".join(sys.modules))
            os._exit(code)

    @staticmethod
    def _main(arguments: list[str]) -> int:
        from warmerge import cli

        sys.argv = ["warmerge", *arguments]
        try:
            cli.app(arguments, prog_name="warmerge")
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        return 0


def _text(path: Path) -> str:
    """What a child has written, as far as it came."""
    return path.read_text() if path.exists() else ""


def change(work: Path, fault: Fault) -> None:
    """What SWAP does in the layer, at a time instead of at a call."""
    victim, other = work / fault.victim, work / "other"
    match fault.swap:
        case "r":
            os.replace(other, victim)
        case "d":
            victim.unlink()
        case "t":
            os.truncate(victim, victim.stat().st_size // 2)
        case "o":
            with victim.open("r+b") as file:
                file.write(other.read_bytes())


def _change(path: Path) -> None:
    """Other contents of the same length that load just as well."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".json" or data[:1] == b"{":
        for old, new in (('range": 0.02', 'range": 0.03'), ('"Ġthe"', '"Ġteh"'), ('alpha": 8', 'alpha": 9')):
            data = data.replace(old.encode(), new.encode())
        path.write_bytes(data)
        return
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(header, len(data), 4):
        data[i] ^= 0x5A
        data[i + 1] ^= 0x25
    path.write_bytes(bytes(data))


# --- what goes wrong ---


@dataclass(frozen=True)
class Baseline:
    """Undisturbed runs of a command: how long they take, what they leave, which fields of that are times, and how many
    calls of each kind they make."""

    seconds: float
    expected: dict[str, Any]
    times: set[str]
    calls: dict[int, int]


def baseline(bench: Bench, case: Case) -> Baseline:
    """Runs a command as it is: twice to see what differs, and once for each kind of calls to count them."""
    ended, found = [], []
    for _ in range(2):
        work = bench.fresh(case)
        ended.append(bench.run(case, work, Fault()))
        assert ended[-1].code == 0, f"{case.name}: {ended[-1]}"
        found.append(left(work, case))
        assert found[-1], f"{case.name} leaves nothing"
        assert None not in found[-1].values(), f"{case.name} leaves {found[-1]}"
    times = volatile(*found) | {"resumed_shards", "command", "resumed", "versions", "seconds"}
    calls = {}
    for mask in (READS, WRITES, WRITES | SYNC | NAME | CLOSE, WRITE | SYNC | NAME, READ | WRITE | SYNC | OPEN_READ):
        ended.append(bench.run(case, bench.fresh(case), Fault(mask=mask)))
        calls[mask] = ended[-1].seen
    return Baseline(min(e.seconds for e in ended), found[0], times, calls)


def faults_of(bench: Bench, case: Case, base: Baseline, trials: int, draw: random.Random) -> dict[str, list[Fault]]:
    """Each kind of fault, at so many calls or times; all where there are fewer."""

    def at(mask: int, count: int) -> list[int]:
        return sorted(draw.sample(range(1, base.calls[mask] + 1), min(count, base.calls[mask])))

    every, failing, slow = WRITES | SYNC | NAME | CLOSE, WRITE | SYNC | NAME, READ | WRITE | SYNC | OPEN_READ
    some = max(1, trials // 5)
    at_calls = [Fault((KILL_BEFORE, KILL_AFTER)[i % 2], every, n) for i, n in enumerate(at(every, trials // 2))]
    kinds = {
        "killed at any time": [Fault(after=draw.random()) for _ in range(trials - len(at_calls))],
        "killed at a call": at_calls,
        "disk full from a call on": [Fault(FAIL_ON, WRITES, n, errno.ENOSPC) for n in at(WRITES, some)],
        "a write, sync or rename fails": [Fault(FAIL, failing, n, errno.EIO) for n in at(failing, some)],
        "a read fails": [Fault((FAIL, FAIL_ON)[i % 2], READS, n, errno.EIO) for i, n in enumerate(at(READS, some))],
        "short reads and writes": [Fault(HALF, READ | WRITE, 1)],
        "an interrupted call": [Fault(INTERRUPT, slow, n) for n in at(slow, some)],
    }
    mask = OPEN_READ | READ | MAP | CLOSE
    for swap, words in (("r", "replaced"), ("o", "written into"), ("t", "cut"), ("d", "removed")):
        made = []
        for victim in case.victims:
            fault = Fault(COUNT, mask, victim=victim)
            seen = bench.run(case, bench.fresh(case, victim), fault).seen
            each = max(1, some // 2 // len(case.victims))
            calls = draw.sample(range(1, seen + 1), min(each, seen))
            made += [Fault(SWAP, mask, n, victim=victim, swap=swap) for n in calls]
            made += [Fault(victim=victim, swap=swap, after=draw.random()) for _ in range(each)]
        if made:
            kinds[f"an input {words} while it is read"] = made
    return {name: faults for name, faults in kinds.items() if faults}


def trial(
    bench: Bench, case: Case, fault: Fault, base: Baseline, others: Sequence[Mapping[str, Any]], row: Row
) -> None:
    """One fault, what is left after it, and the same command again."""
    work = bench.fresh(case, fault.victim)
    before = listing(work)
    ended = bench.run(case, work, fault, base.seconds)
    found = left(work, case)
    # Of a copy of an input, the fingerprints of a run's question are others than of the input itself.
    times = base.times | ({"fingerprint", "asked"} if fault.victim else set())
    if fault.victim:  # and they are the keys of rewards that are kept
        found = {name: value for name, value in found.items() if not name.endswith(_KEPT)}
    states = [verdict(found, expected, case, times) for expected in (base.expected, *others)]
    state = min(states, key=lambda s: 0 if s == "complete" else 1 if not s else 2)
    where = f"{fault.victim} {fault.swap} at {fault.at or fault.after} {ended.story.replace(str(work), '')}"
    row.trials += 1
    if state not in ("", "complete") or (ended.code == 0 and state != "complete"):
        row.wrong += 1
        row.notes.append(f"WRONG, code {ended.code}: {where}: {state or 'not complete'}: {ended.err[-300:]}")
    elif "Traceback" in ended.err or "panicked" in ended.err:
        row.tracebacks += 1
        row.notes.append(f"TRACEBACK: {where}: {ended.err[-700:]}")
    elif ended.code == 0 or (ended.code < 0 and state == "complete" == states[0]):
        row.complete += 1
    elif ended.code < 0:
        row.stopped += 1
        if -ended.code != signal.SIGKILL:
            row.notes.append(f"{signal.Signals(-ended.code).name}: {where}")
    else:
        row.refused += 1
        if not _named(ended, fault, bench):
            row.unnamed += 1
            row.notes.append(f"UNNAMED: {where}: {ended.err[-500:]}")
    if fault.victim:  # another input is another question
        return
    row.again += 1
    if listing(work) == before and case.name != "push":  # as if it had not been given yet
        row.recovered += 1
        return
    again = _again(bench, case, work)
    state = verdict(left(work, case), base.expected, case, base.times)
    if again.code == 0 and state == "complete":
        row.recovered += 1
    else:
        row.notes.append(
            f"NOT RECOVERED after {where}: code {again.code}, {state or 'not complete'}: {again.err[-500:]}"
        )


def _named(ended: Ended, fault: Fault, bench: Bench) -> bool:
    """Whether the message names the file, or a folder that it lies in."""
    path = Path(fault.victim or ended.story.split(" ")[-1])
    names = [re.sub(r"^\.|(\.partial|\.new|\.part|\.old)$", "", part) for part in path.parts[-4:]]
    if path.parent == bench.place:  # the folder that the command was given in
        names.append(".: ")
    if fault.action == FAIL_ON:  # several threads meet it, and any of their files will do
        names += os.listdir(bench.world)
    return any(len(name) > 1 and name in ended.err for name in names)


def _again(bench: Bench, case: Case, work: Path) -> Ended:
    """The same command, as often as its message asks for something to be added."""
    more = ["--resume"] if case.name == "average --resume" else []
    ended = bench.run(case, work, Fault(), more=more)
    if "nothing to resume" in ended.err:
        more = []
        ended = bench.run(case, work, Fault())
    if ended.code == 2 and "--overwrite" in ended.err:
        ended = bench.run(case, work, Fault(), more=["--overwrite"])
    return ended


def others_of(bench: Bench, case: Case, base: Baseline, victim: str) -> list[dict[str, Any]]:
    """What else may be left: what lay there before; or all of what the changed input gives, from the beginning."""
    found = [left(bench.fresh(case), case)] if case.before else []
    if victim:
        work = bench.fresh(case, victim)
        change(work, Fault(victim=victim, swap="r"))
        if bench.run(case, work, Fault()).code == 0:
            found.append(left(work, case))
    return found


# --- all of it ---


class Hub:
    """The loopback Hub of the tests in a process of its own: forks and threads do not go together."""

    def __init__(self, place: Path) -> None:
        environment = os.environ | {"LD_PRELOAD": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--hub", str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        os.environ.update(json.loads(self.process.stdout.readline()))

    def ask(self, what: str) -> dict[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))


def serve(place: Path) -> None:
    """The Hub's side: on "dump" the files of me/pushed, in hexadecimal digits; on "forget" it is gone."""
    sys.path.insert(0, str(ROOT / "tests"))
    from loopback_hub import LoopbackHub, Refusal

    with LoopbackHub({"me/a": place / "world" / "rm-1", "me/b": place / "world" / "rm-2"}) as hub:
        print(json.dumps({**hub.environment(place / "cache"), "HF_TOKEN": "hf_test"}), flush=True)
        for line in sys.stdin:
            if line.strip() == "forget":
                for table in (hub.commits, hub.repos, hub.history, hub.branches, hub.objects, hub.private):
                    table.pop("me/pushed", None)
            try:
                files = hub.at("me/pushed")[1]
            except (KeyError, Refusal):
                files = {}
            print(json.dumps({name: data.hex() for name, data in files.items()}), flush=True)


def build(world: Path) -> None:
    """The tiny models, data and results of the tests' documented folder, and two LoRA adapters."""
    sys.path.insert(0, str(ROOT / "tests"))
    import documented_folder
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny_models import tokenizer
    from transformers import AutoModelForSequenceClassification

    world.mkdir(parents=True)
    documented_folder.build(world)
    for seed in range(2):
        model = AutoModelForSequenceClassification.from_pretrained(world / "world-start")
        torch.manual_seed(seed)
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(world / f"lora-{seed}")
        tokenizer("llama").save_pretrained(world / f"lora-{seed}")


def _in_fork(work: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent says that it failed
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def imported(bench: Bench, cases: Sequence[Case]) -> None:
    """Imports here what the commands import, so that a child's time is the command's own."""
    names: set[str] = set()
    for case in cases:
        os.environ["FAULTS_MODULES"] = str(bench.place / f"modules-{os.getpid()}")
        ended = bench.run(case, bench.fresh(case), Fault())
        assert ended.code == 0, f"{case.name}: {ended}"
        names |= set((bench.place / f"modules-{os.getpid()}").read_text().split("\n"))
    del os.environ["FAULTS_MODULES"]
    for name in sorted(names - sys.modules.keys()):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def layer(place: Path) -> Path:
    """The compiled layer."""
    made, source = place / "layer.so", ROOT / "benchmarks" / "faults_layer.c"
    if made.exists() and made.stat().st_mtime > source.stat().st_mtime:
        return made
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", made, source, "-ldl"], check=True)
    return made


def measure(bench: Bench, case: Case, options: argparse.Namespace) -> Iterator[Row]:
    base, draw = baseline(bench, case), random.Random(options.seed)
    print(f"{case.name}: {base.seconds:.2f} s, calls {base.calls}, times {sorted(base.times)}", file=sys.stderr)
    others: dict[str, list[dict[str, Any]]] = {}
    for name, faults in faults_of(bench, case, base, options.trials, draw).items():
        if options.fault and not any(wanted in name for wanted in options.fault):
            continue
        row = Row(case.name, name)
        for fault in faults:
            if fault.victim not in others:
                others[fault.victim] = others_of(bench, case, base, fault.victim)
            trial(bench, case, fault, base, others[fault.victim], row)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="one command; repeatable")
    parser.add_argument("--fault", action="append", help="faults whose name holds this; repeatable")
    parser.add_argument("--trials", type=int, default=100, help="kills, half of them at calls; of other faults a fifth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/faults"), help="for inputs and outputs")
    parser.add_argument("--notes", type=Path, help="a file for what was found, trial by trial")
    parser.add_argument("--sum", type=Path, nargs="+", help="prints only the sums of tables that were printed before")
    parser.add_argument("--hub", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sum:
        printed = [line for file in options.sum for line in file.read_text().splitlines()]
        rows = [line for line in printed if line.startswith("| ") and HEADER[1] not in line]
        print(*sums(rows), sep="\n")
        return
    if options.hub:
        serve(options.hub)
        return
    place = options.folder.resolve()
    if "faults_layer" not in os.environ:
        place.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "LD_PRELOAD": str(layer(place)), "faults_layer": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        os.execv(sys.executable, [sys.executable, *sys.argv])
    preloaded = os.environ.pop("LD_PRELOAD")
    if not (place / "world").exists():
        _in_fork(lambda: build(place / "world.new"))  # here nothing that asks a Hub may be imported yet
        (place / "world.new").rename(place / "world")
    made = ctypes.CDLL(preloaded)
    made.faults_seen.restype = ctypes.c_long
    made.faults_story.restype = ctypes.c_char_p
    made.faults_arm.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    made.faults_swap.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char)
    bench = Bench(place, made, Hub(place))
    cases = [case for case in CASES if not options.only or case.name in options.only]
    imported(bench, cases)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    lines = []
    for case in cases:
        for row in measure(bench, case, options):
            lines.append(row.line())
            print(lines[-1], flush=True)
            if row.notes and options.notes:
                with options.notes.open("a") as file:
                    file.write(f"## {row.case}: {row.fault}\n" + "".join(f"- {note}\n" for note in row.notes))
    print("", *sums(lines), sep="\n")


if __name__ == "__main__":
    main()
