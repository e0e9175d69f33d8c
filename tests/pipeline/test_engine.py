"""Units of work on both engines: outcomes, stopping, and every way to die."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import alive, head_of_a_cluster, wait_for

from warmerge.errors import Interrupted, UsageError, WarmergeError
from warmerge.pipeline import engine
from warmerge.pipeline.engine import Outcome, Unit, child, ray_cluster, run_units, stop_requested

UNITS = """
import os, signal, sys, time
from warmerge.errors import Finding, Interrupted, RefusedError, WarmergeError

def write(folder, name, text):
    (folder / f".{name}").write_text(str(text))
    os.replace(folder / f".{name}", folder / name)

def say(folder, stop):
    with open(folder.parent / "order", "a") as file:
        file.write(f"{folder.name} begins\\n")
        time.sleep(0.05)
        file.write(f"{folder.name} ends\\n")

def steps(folder, stop, seconds=0.05):
    # Ten steps, with a checkpoint when it is told to stop, as a member is trained.
    done = int((folder / "checkpoint").read_text()) if (folder / "checkpoint").exists() else 0
    write(folder, "pids", f"{os.getpid()} {os.getppid()}")
    while done < 10:
        time.sleep(seconds)
        done += 1
        with open(folder / "rows", "a") as file:
            file.write(f"{done}\\n")
        if stop() or done % 3 == 0:
            write(folder, "checkpoint", done)
        if stop():
            raise Interrupted(f"stopped at step {done}")

def slow_steps(folder, stop):
    steps(folder, stop, 0.3)

def deaf(folder, stop):
    write(folder, "pids", f"{os.getpid()} {os.getppid()}")
    time.sleep(100)

def meet(folder, stop):
    # Ends only if the other unit runs at the same time.
    write(folder, "device", os.environ["CUDA_VISIBLE_DEVICES"])
    other = folder.parent / {"0": "1", "1": "0"}[folder.name] / "device"
    while not other.exists():
        time.sleep(0.01)

def numbers(folder, stop):
    import torch
    torch.manual_seed(int(folder.name))
    a = torch.randn(300, 500)
    product = (a @ a.T).softmax(1) @ a
    write(folder, "numbers", f"{torch.get_num_threads()} {product.double().sum().item().hex()}")

def refused(folder, stop):
    raise RefusedError([Finding("a", "is empty"), Finding("b", "is empty")])

def wrong(folder, stop):
    print("about to fail")
    raise ValueError("no such row")

def bare(folder, stop):
    raise AssertionError

def leave(folder, stop):
    sys.exit(7)

def vanish(folder, stop):
    os._exit(5)

def crash(folder, stop):
    os.kill(os.getpid(), signal.SIGSEGV)

def killed(folder, stop):
    os.kill(os.getpid(), signal.SIGKILL)

def memory(folder, stop):
    raise MemoryError

def gpu_memory(folder, stop):
    class OutOfMemoryError(RuntimeError):
        pass
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nGPU 0 has a total capacity of 1 GiB")

def cpu_memory(folder, stop):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
"""

# A job that a shell put in the background ignores Ctrl-C, and so would its children: the tests may be such a job.
DRIVER = """
import json, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from warmerge.errors import WarmergeError
from warmerge.pipeline.engine import Unit, run_units
function, options, *folders = sys.argv[1:]
units = [Unit(Path(folder).name, f"units_of_the_tests:{function}", Path(folder)) for folder in folders]
try:
    outcomes = run_units(units, threads=1, **json.loads(options))
except WarmergeError as error:
    print(error)
    sys.exit(error.exit_code)
print([[outcome.state, outcome.message] for outcome in outcomes])
"""

MakeUnits = Callable[..., list[Unit]]
Drive = Callable[..., "subprocess.Popen[str]"]
STOPPED = (
    "stopped; {} of 3 are finished and kept; the same command goes on, "
    "with those that had begun from their last checkpoint\n"
)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the units' functions."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "units_of_the_tests.py").write_text(UNITS)
    return folder


@pytest.fixture
def make(tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> MakeUnits:
    """make("say", "wrong") gives units of these functions, in folders 0 and 1."""
    monkeypatch.syspath_prepend(code)

    def units(*functions: str) -> list[Unit]:
        made = []
        for i, name in enumerate(functions):
            folder = tmp_path / "units" / str(i)
            folder.mkdir(parents=True, exist_ok=True)
            made.append(Unit(f"unit {i}", f"units_of_the_tests:{name}", folder))
        return made

    return units


@pytest.fixture
def drive(code: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """drive("steps", folders, devices=["cpu"]) runs the units from a process that can be told and killed."""
    begun = []

    def start(function: str, units: list[Unit], **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, function, json.dumps(options), *(str(u.folder) for u in units)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(code)},
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def pids(unit: Unit) -> tuple[int, int]:
    """Of the unit's process and of its parent, once the unit has begun."""
    own, parent = wait_for(lambda: (unit.folder / "pids").exists() and (unit.folder / "pids").read_text()).split()
    return int(own), int(parent)


def rows(unit: Unit) -> list[int]:
    return [int(line) for line in (unit.folder / "rows").read_text().split()]


def log(unit: Unit) -> str:
    return (unit.folder / "log.txt").read_text()


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


# --- outcomes ---


def test_one_after_the_other_and_a_failure_stops_no_other(make: MakeUnits, tmp_path: Path) -> None:
    units = make("say", "wrong", "say")
    ended: list[Outcome] = []
    waited: list[float] = []
    outcomes = run_units(
        units, devices=["cpu"], on_outcome=ended.append, while_waiting=lambda: waited.append(time.monotonic())
    )
    assert states(outcomes) == ["done", "failed", "done"]
    assert [outcome.unit for outcome in outcomes] == units
    assert ended == outcomes
    assert outcomes[0].message == ""
    assert (tmp_path / "units" / "order").read_text().splitlines() == ["0 begins", "0 ends", "2 begins", "2 ends"]
    assert len(waited) >= 3
    assert all(0.15 < later - earlier < 2 for earlier, later in itertools.pairwise(waited))


WHY = {
    "refused": "refused, 2 findings:\n  - a: is empty\n  - b: is empty",
    "wrong": "ValueError: no such row (see LOG)",
    "bare": "AssertionError (see LOG)",
    "leave": "SystemExit: 7 (see LOG)",
    "vanish": "its process ended with exit code 5 and said nothing (see LOG)",
    "crash": "crashed by signal 11 (Segmentation fault) (see LOG)",
    "killed": "killed by signal 9, as the kernel does when the machine runs out of memory; "
    "try a smaller --batch-tokens (see LOG)",
    "memory": "out of memory; try a smaller --batch-tokens (MemoryError; see LOG)",
    "gpu_memory": "out of memory; try a smaller --batch-tokens "
    "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.; see LOG)",
    "cpu_memory": "out of memory; try a smaller --batch-tokens (RuntimeError: [enforce fail] DefaultCPUAllocator: "
    "can't allocate memory: you tried to allocate 9 bytes.; see LOG)",
    "absent": "AttributeError: module 'units_of_the_tests' has no attribute 'absent' (see LOG)",
}


def test_every_way_to_fail_is_named(make: MakeUnits) -> None:
    units = make(*WHY)
    outcomes = run_units(units, devices=["cpu", "cpu"])
    assert states(outcomes) == ["failed"] * len(WHY)
    found = {
        name: o.message.replace(str(o.unit.folder / "log.txt"), "LOG") for name, o in zip(WHY, outcomes, strict=True)
    }
    assert found == WHY
    assert "Traceback (most recent call last):" in log(units[1])
    assert log(units[1]).endswith("ValueError: no such row\n")
    assert "Fatal Python error: Segmentation fault" in log(units[5])


def test_the_log_is_appended_to(make: MakeUnits) -> None:
    (unit,) = make("wrong")
    for runs in (1, 2):
        run_units([unit], devices=["cpu"], threads=3)
        assert log(unit).count("about to fail\n") == runs
        assert log(unit).count("OMP_NUM_THREADS=3, CUDA_VISIBLE_DEVICES=\n") == runs


def test_nothing_to_do() -> None:
    assert run_units([]) == []


def test_arguments_that_cannot_be_used(make: MakeUnits) -> None:
    with pytest.raises(UsageError, match=r"^--engine: expected local, ray or inline, found 'slurm'$"):
        run_units(make("say"), engine="slurm")
    with pytest.raises(UsageError, match=r"^--threads: expected 1 or more, found 0$"):
        run_units(make("say"), threads=0)


# --- devices and threads ---


def test_two_devices_work_at_the_same_time(make: MakeUnits) -> None:
    units = make("meet", "meet")
    assert states(run_units(units, devices=["3", "GPU-5f2c"])) == ["done", "done"]
    assert [(unit.folder / "device").read_text() for unit in units] == ["3", "GPU-5f2c"]


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [
        (None, 0, ["cpu"]),
        (None, 2, ["0", "1"]),
        ("", 0, ["cpu"]),
        ("2,3", 2, ["2", "3"]),
        ("GPU-aa, GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
        ("1,-1,0", 1, ["1"]),
    ],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int, expected: list[str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert engine.visible_devices() == expected


def test_threads_are_those_of_torch(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (unit,) = make("numbers")
    assert states(run_units([unit], devices=["cpu"], threads=3)) == ["done"]
    assert (unit.folder / "numbers").read_text().split()[0] == "3"


def test_inline_gives_what_a_process_of_its_own_gives(make: MakeUnits) -> None:
    """Outcomes, messages, logs and numbers; the caller's threads and the flow of the driver are as before."""
    import torch

    found, told, before = {}, list[Outcome](), torch.get_num_threads()
    for name in ("local", "inline"):
        units = make("say", "wrong", "numbers", "refused", "leave", "memory")
        outcomes = run_units(units, engine=name, threads=2, devices=["cpu"], on_outcome=told.append)
        assert told[-len(units) :] == outcomes
        found[name] = [states(outcomes), [o.message for o in outcomes], (units[2].folder / "numbers").read_text()]
        assert log(units[1]).count("about to fail\n") == (1 if name == "local" else 2)
        assert log(units[1]).endswith("ValueError: no such row\n")
    assert found["local"] == found["inline"]
    assert found["inline"][0] == ["done", "failed", "done", "failed", "failed", "failed"]
    assert torch.get_num_threads() == before


def test_inline_stops_when_it_is_told(make: MakeUnits, drive: Drive) -> None:
    units = make("slow_steps", "slow_steps", "slow_steps")
    process = drive("slow_steps", units, engine="inline")
    assert pids(units[0])[0] == process.pid
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (STOPPED.format(0), "")
    assert process.returncode == 130
    assert (units[0].folder / "checkpoint").read_text() == str(rows(units[0])[-1])
    assert not (units[1].folder / "log.txt").exists()
    assert drive("steps", units, engine="inline").communicate(timeout=30)[0].count("done") == 3
    assert [rows(unit) for unit in units] == [list(range(1, 11))] * 3


def test_inline_tells_the_driver_while_it_works(make: MakeUnits) -> None:
    looked: list[int] = []
    (unit,) = make("steps")
    run_units([unit], engine="inline", while_waiting=lambda: looked.append(len(rows(unit)) if looked else 0))
    assert len(looked) >= 10


def test_processors_are_shared_by_all_slots(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (unit,) = make("say")
    run_units([unit], devices=["0", "1"])
    assert "OMP_NUM_THREADS=4, CUDA_VISIBLE_DEVICES=0\n" in log(unit)


def test_a_module_in_the_current_folder_is_not_taken(
    make: MakeUnits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert states(run_units(make("say"), devices=["cpu"])) == ["done"]


# --- stopping ---


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Signals as a program in the foreground has them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_stop_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_requested() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by a wrapper
            monkeypatch.setattr(child, "_SAME_SIGNAL_SECONDS", -1.0)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("ctrl_c")
def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_from_another_thread(make: MakeUnits) -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.extend(run_units(make("say"), devices=["cpu"])))
    thread.start()
    thread.join()
    assert states(found) == ["done"]


def test_a_unit_that_is_told_stops_at_a_checkpoint(make: MakeUnits) -> None:
    units = make("steps", "say")
    told = []

    def tell() -> None:
        if not told and (units[0].folder / "rows").exists():
            told.append(pids(units[0])[0])
            os.kill(told[0], signal.SIGTERM)

    outcomes = run_units(units, devices=["cpu"], while_waiting=tell)
    assert states(outcomes) == ["stopped", "done"]
    last = rows(units[0])[-1]
    assert last < 10
    assert outcomes[0].message == f"stopped at step {last}"
    assert states(run_units(units[:1], devices=["cpu"])) == ["done"]
    assert rows(units[0]) == list(range(1, 11))


def test_a_mistake_of_the_caller_leaves_no_process(make: MakeUnits) -> None:
    (unit,) = make("slow_steps")

    def fail() -> None:
        pids(unit)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_units([unit], devices=["cpu"], while_waiting=fail)
    assert not alive(pids(unit)[0])
    assert (unit.folder / "checkpoint").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_driver_is_told(make: MakeUnits, drive: Drive, number: int) -> None:
    units = make("slow_steps", "slow_steps", "slow_steps")
    process = drive("slow_steps", units, devices=["cpu", "cpu"])
    child = pids(units[0])[0], pids(units[1])[0]
    os.killpg(process.pid, number)  # as a terminal does
    assert process.communicate(timeout=30) == (STOPPED.format(0), "")
    assert process.returncode == 130
    assert not any(map(alive, child))
    assert not (units[2].folder / "log.txt").exists()
    for unit in units[:2]:
        assert (unit.folder / "checkpoint").read_text() == str(rows(unit)[-1])
    again = drive("steps", units, devices=["cpu", "cpu"])
    assert again.communicate(timeout=30) == ("[['done', ''], ['done', ''], ['done', '']]\n", "")
    assert [rows(unit) for unit in units] == [list(range(1, 11))] * 3


def test_another_ctrl_c_kills(make: MakeUnits, drive: Drive) -> None:
    units = make("deaf", "deaf", "deaf")
    process = drive("deaf", units, devices=["cpu"])
    child, _ = pids(units[0])
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (STOPPED.format(0), "")
    assert process.returncode == 130
    assert not alive(child)


def test_the_driver_is_killed(make: MakeUnits, drive: Drive) -> None:
    (unit,) = make("slow_steps")
    process = drive("slow_steps", [unit], devices=["cpu"])
    child, _ = pids(unit)
    wait_for((unit.folder / "rows").exists)
    process.kill()
    process.wait()
    # The next run begins while the orphan is still at its last step.
    again = drive("steps", [unit], devices=["cpu"])
    wait_for(lambda: not alive(child), 5)
    assert again.communicate(timeout=30) == ("[['done', '']]\n", "")
    assert rows(unit) == list(range(1, 11))


# --- two at once ---


def test_a_folder_has_one_worker_at_a_time(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = make("say")
    with (unit.folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(1.0, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        begun = time.monotonic()
        assert states(run_units([unit], devices=["cpu"])) == ["done"]
        assert time.monotonic() - begun > 1

        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(child, "_LOCK_SECONDS", 0.3)
        with pytest.raises(WarmergeError) as caught, child.only_worker(unit.folder, lambda: False):
            raise AssertionError("two at once")
        assert str(caught.value) == (
            f"another process has been working in {unit.folder} for 0 seconds; "
            "wait for it, or end it, and run the same command again"
        )
        with pytest.raises(Interrupted), child.only_worker(unit.folder, lambda: True):
            raise AssertionError("two at once")


# --- Ray ---


def test_ray_is_not_installed(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"^--engine ray needs Ray, which is not installed: pip install 'warmerge\[ray\]'$"
    with pytest.raises(UsageError, match=message):
        run_units(make("say"), engine="ray")


def test_a_cluster_that_asks_for_a_token(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start --head` makes one where a token lies in the home folder; ray.init does not look there."""
    said = "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: ...\nConnectionError: Failed to connect"
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False))  # type: ignore[misc]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    with pytest.raises(UsageError) as caught:
        run_units(make("say"), engine="ray", address="10.0.0.1:6379")
    assert str(caught.value) == (
        "--engine ray: the Ray cluster at '10.0.0.1:6379' asks for a token; set RAY_AUTH_MODE=token, with its token in "
        "~/.ray/auth_token (where `ray get-auth-token --generate` writes one) or in RAY_AUTH_TOKEN"
    )


GPUS = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 64.0}}]
CPUS = [
    {"Alive": True, "Resources": {"memory": 1.0}},
    {"Alive": True, "Resources": {"CPU": 8.0}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 2.0, "GPU": 1.0}},
]


@pytest.mark.parametrize(
    ("nodes", "threads", "expected"),
    [
        (GPUS, None, ({"num_gpus": 1, "num_cpus": 0}, 4)),
        (GPUS, 6, ({"num_gpus": 1, "num_cpus": 0}, 6)),
        (CPUS, None, ({"num_cpus": 4}, 4)),
        (CPUS, 8, ({"num_cpus": 8}, 8)),
    ],
)
def test_what_a_unit_asks_of_a_cluster(nodes: list[Any], threads: int | None, expected: Any) -> None:
    assert ray_cluster._share(nodes, threads) == expected


def test_a_unit_may_leave_gpus_alone() -> None:
    assert ray_cluster._share(GPUS, None, gpus=False) == ({"num_cpus": 16}, 16)


@pytest.mark.parametrize(("nodes", "threads", "most"), [(CPUS, 9, 8), (CPUS[:1], None, 0)])
def test_more_threads_than_any_machine_has(nodes: list[Any], threads: int | None, most: int) -> None:
    with pytest.raises(UsageError) as caught:
        ray_cluster._share(nodes, threads)
    assert str(caught.value) == (
        f"--threads: {threads or 1}, but the machine of the Ray cluster with most processors has {most}"
    )


def test_a_folder_that_a_machine_does_not_have(tmp_path: Path) -> None:
    unit = Unit("unit 0", "units_of_the_tests:say", tmp_path / "elsewhere")
    outcome = ray_cluster._task(unit, 1, "", "/")
    where = f"{tmp_path / 'elsewhere'} is not on {socket.gethostname()}"
    assert outcome == Outcome(unit, "failed", f"{where}: a Ray cluster's machines must share the folder")


@pytest.fixture(scope="module")
def cluster(code: Path) -> Iterator[str]:
    """The address of a Ray cluster of two processors on this machine."""
    with head_of_a_cluster(code) as address:
        yield address


@pytest.mark.slow
def test_ray_gives_what_local_gives(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("numbers", "numbers", "numbers")
    found = []
    for options in ({"devices": ["cpu"]}, {"engine": "ray", "address": cluster}):
        process = drive("numbers", units, **options)
        assert process.communicate(timeout=100) == ("[['done', ''], ['done', ''], ['done', '']]\n", "")
        found.append([(unit.folder / "numbers").read_text() for unit in units])
        for unit in units:
            (unit.folder / "numbers").unlink()
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


@pytest.mark.slow
def test_a_ray_worker_dies_and_the_unit_goes_on(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("slow_steps", "slow_steps", "slow_steps")
    process = drive("slow_steps", units, engine="ray", address=cluster)
    child, worker = pids(units[0])
    wait_for((units[0].folder / "checkpoint").exists)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(child), 10)
    out, err = process.communicate(timeout=100)
    assert out == "[['done', ''], ['done', ''], ['done', '']]\n"
    assert "A worker died or was killed" in err
    assert log(units[0]).count("--- ") == 2
    assert pids(units[0])[1] != worker
    # It went on from a checkpoint, not from the start.
    assert rows(units[0]).count(1) == 1
    assert rows(units[0])[-1] == 10


@pytest.mark.slow
def test_a_failure_on_ray_is_not_tried_again(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("refused", "refused")
    process = drive("refused", units, engine="ray", address=cluster)
    out, _ = process.communicate(timeout=60)
    assert out == f"{[['failed', WHY['refused']]] * 2}\n"
    assert log(units[0]).count("--- ") == 1


@pytest.mark.slow
def test_a_worker_that_dies_each_time(make: MakeUnits, drive: Drive, cluster: str) -> None:
    (unit,) = make("deaf")
    process = drive("deaf", [unit], engine="ray", address=cluster)
    for _ in range(4):
        child, worker = pids(unit)
        (unit.folder / "pids").unlink()
        os.kill(child, signal.SIGSTOP)  # so that the worker's death is not noticed as the child's
        os.kill(worker, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert out.startswith("[['failed', 'its Ray worker died, and again on 3 more tries (WorkerCrashedError: ")
    assert out.endswith(f"(see {unit.folder / 'log.txt'})']]\n")


@pytest.mark.slow
def test_ctrl_c_on_ray(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("slow_steps", "slow_steps", "slow_steps")
    process = drive("slow_steps", units, engine="ray", address=cluster)
    running = {pids(units[0])[0], pids(units[1])[0]}
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (STOPPED.format(0), "")
    assert process.returncode == 130
    assert not any(map(alive, running))
    assert not any((unit.folder / ".stop").exists() for unit in units)
    assert not (units[2].folder / "log.txt").exists()
    assert (units[0].folder / "checkpoint").read_text() == str(rows(units[0])[-1])
    for unit in units:
        (unit.folder / ".stop").write_text("left by a run that was killed")
    again = drive("steps", units, engine="ray", address=cluster)
    assert again.communicate(timeout=60) == ("[['done', ''], ['done', ''], ['done', '']]\n", "")
    assert [rows(unit) for unit in units] == [list(range(1, 11))] * 3


@pytest.mark.slow
def test_another_ctrl_c_on_ray(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("deaf", "deaf", "deaf")
    process = drive("deaf", units, engine="ray", address=cluster)
    running = {pids(units[0])[0], pids(units[1])[0]}
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (STOPPED.format(0), "")
    assert process.returncode == 130
    for left in running:
        if alive(left):
            os.kill(left, signal.SIGKILL)


@pytest.mark.slow
def test_the_driver_on_ray_is_killed(make: MakeUnits, drive: Drive, cluster: str) -> None:
    units = make("slow_steps", "slow_steps")
    process = drive("slow_steps", units, engine="ray", address=cluster)
    running = {pids(units[0])[0], pids(units[1])[0]}
    wait_for((units[0].folder / "checkpoint").exists)
    process.kill()
    process.wait()
    again = drive("steps", units, engine="ray", address=cluster)
    assert again.communicate(timeout=60) == ("[['done', ''], ['done', '']]\n", "")
    assert not any(map(alive, running))
    assert rows(units[0]).count(1) == 1
    assert rows(units[0])[-1] == 10


@pytest.mark.slow
def test_more_threads_than_the_cluster_has(make: MakeUnits, cluster: str) -> None:
    code = (
        "import sys; from pathlib import Path; from warmerge.errors import UsageError; "
        "from warmerge.pipeline.engine import *\n"
        "try: run_units([Unit('', '', Path('/'))], engine='ray', address=sys.argv[1], threads=3)\n"
        "except UsageError as error: import ray; print(ray.is_initialized(), error)"
    )
    out = subprocess.run([sys.executable, "-c", code, cluster], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout == "False --threads: 3, but the machine of the Ray cluster with most processors has 2\n"


@pytest.mark.slow
def test_no_cluster_answers(make: MakeUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_cluster, "_PROBE_SECONDS", 5)
    with pytest.raises(UsageError) as caught:
        run_units(make("say"), engine="ray", address="127.0.0.1:1025")
    assert str(caught.value) == (
        "--engine ray: no Ray cluster at '127.0.0.1:1025' (no answer in 5 seconds); "
        "start one with `ray start --head`, or name the address of one"
    )
