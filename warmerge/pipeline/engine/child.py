"""The process that runs one unit, and what its parent knows of it. Both engines start it in the same way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from warmerge.errors import Finding, Interrupted, RefusedError, WarmergeError
from warmerge.locks import take_lock

LOG, _LOCK = "log.txt", ".lock"
POLL_SECONDS = 0.2
_LOCK_SECONDS = 60.0
# A terminal's Ctrl-C, passed on by a wrapper such as `uv run`, arrives twice: that close together they are one.
_SAME_SIGNAL_SECONDS = 1.0
SMALLER = "try a smaller --batch-tokens"
# With the parent's sys.path, and not `-m`: that would find modules in the current folder that the parent does not see.
_CHILD = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "from warmerge.pipeline.engine.child import main; main()"
)


@dataclass(frozen=True)
class Unit:
    """One piece of work, called as function(folder, stop) in a process of its own.

    `name` is for people, `function` is "package.module:name", `folder` is absolute, and exists on every machine that
    may run the unit. The function returns when the work is done; `stop()` tells it to write a checkpoint and to raise
    `Interrupted`.
    """

    name: str
    function: str
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a unit ended: "done", "failed" or "stopped"; and, unless done, why, in words for people.

    Of an error of warmerge's own, `exit_code` is its kind's, and `findings` are those of a refusal.
    """

    unit: Unit
    state: str
    message: str
    exit_code: int = 1
    findings: tuple[Finding, ...] = ()


def interrupted(units: Sequence[Unit], ended: Iterable[Outcome]) -> Interrupted:
    """What is raised when the user stopped the units."""
    done = sum(outcome.state == "done" for outcome in ended)
    return Interrupted(
        f"stopped; {done} of {len(units)} are finished and kept; the same command goes on, "
        "with those that had begun from their last checkpoint"
    )


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Gives stop(): whether Ctrl-C or SIGTERM came. They do nothing else; another Ctrl-C is a KeyboardInterrupt.

    Handlers are put back in the end. Outside of the main thread, which alone gets signals, stop() is always False. A
    Ctrl-C that is ignored, as in a shell's background job, stays so.

    >>> with stop_requested() as stop:
    ...     stop()
    False
    """
    came: list[float] = []

    def handle(number: int, frame: object) -> None:
        came.append(time.monotonic())
        if number == signal.SIGINT and came[-1] - came[0] > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def main() -> None:
    """Runs one unit: argv holds its function, its folder, the file that the outcome goes to, the parent's process."""
    function, where, report, parent = sys.argv[1:]
    shown = ", ".join(f"{name}={os.environ.get(name)}" for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} on {socket.gethostname()}, {shown}")
    with stop_requested() as stop:
        # An orphan would train for hours, and in the way of the next run.
        outcome = call(Unit("", function, Path(where)), lambda: stop() or os.getppid() != int(parent))
        if os.getppid() == int(parent):
            said = {key: value for key, value in asdict(outcome).items() if key != "unit"}
            Path(report).write_text(json.dumps(said) + "\n")
        else:
            Path(report).unlink()


def call(unit: Unit, stop: Callable[[], bool]) -> Outcome:
    """Runs a unit in this process; a traceback of what went wrong is printed."""
    try:
        with only_worker(unit.folder, stop):
            module, _, name = unit.function.partition(":")
            getattr(import_module(module), name)(unit.folder, stop)
    except (Interrupted, KeyboardInterrupt) as error:
        return Outcome(unit, "stopped", str(error))
    except BaseException as error:  # noqa: BLE001 - whatever a unit raises is its outcome, SystemExit too
        traceback.print_exc()
        code = error.exit_code if isinstance(error, WarmergeError) else 1
        findings = error.findings if isinstance(error, RefusedError) else ()
        return Outcome(unit, "failed", _reason(error, unit.folder / LOG), code, findings)
    return Outcome(unit, "done", "")


def _reason(error: BaseException, log: Path) -> str:
    if isinstance(error, WarmergeError):
        return str(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    # torch has a class for the GPU; on the CPU it raises a RuntimeError.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in text:
        return f"out of memory; {SMALLER} ({text.splitlines()[0]}; see {log})"
    return f"{text} (see {log})"


@contextmanager
def only_worker(folder: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Holds the lock on the folder. An orphan of a killed run may have it until its step and checkpoint are done."""
    # The file stays: to remove it would let a third process lock another file of that name.
    with (folder / _LOCK).open("a") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not take_lock(file.fileno()):
            if stop():
                raise Interrupted("stopped while another process was working in its folder")
            if time.monotonic() > deadline:
                raise WarmergeError(
                    f"another process has been working in {folder} for {_LOCK_SECONDS:.0f} seconds; "
                    "wait for it, or end it, and run the same command again"
                )
            time.sleep(POLL_SECONDS)
        yield


class Child:
    """A unit's running process. Its output is appended to the folder's log; its outcome comes back in a small file."""

    def __init__(
        self, unit: Unit, threads: int, device: str | None = None, cwd: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.unit = unit
        descriptor, report = tempfile.mkstemp(prefix="warmerge-")
        os.close(descriptor)
        self._report = Path(report)
        # The same as torch.set_num_threads (OMP_NUM_THREADS alone is not), and for numpy and all other libraries too.
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "MKL_DYNAMIC": "FALSE"}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        environment |= settings or {}
        command = [sys.executable, "-u", "-X", "faulthandler", "-c", _CHILD, os.pathsep.join(sys.path)]
        with (unit.folder / LOG).open("ab") as log:
            # In a session of its own a terminal's Ctrl-C does not reach it: the parent tells it.
            self.process = subprocess.Popen(
                [*command, unit.function, str(unit.folder), report, str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd, env=os.environ | environment,
                start_new_session=True,
            )  # fmt: skip

    def outcome(self) -> Outcome | None:
        """None while it runs. To be asked until it is not, and then no more."""
        code = self.process.poll()
        if code is None:
            return None
        report = self._report.read_text()
        self._report.unlink()
        if report.endswith("\n"):
            said = json.loads(report)
            findings = tuple(Finding(**finding) for finding in said.pop("findings"))
            return Outcome(self.unit, **said, findings=findings)
        if code in (-signal.SIGTERM, -signal.SIGINT):
            return Outcome(self.unit, "stopped", "stopped before it began")
        return Outcome(self.unit, "failed", f"{_death(code)} (see {self.unit.folder / LOG})")


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"killed by signal 9, as the kernel does when the machine runs out of memory; {SMALLER}"
    if code < 0:
        return f"crashed by signal {-code} ({signal.strsignal(-code)})"
    return f"its process ended with exit code {code} and said nothing"
