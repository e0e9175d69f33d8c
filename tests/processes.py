"""Processes that tests start, kill and wait for; a Ray cluster among them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def wait_for(found: Callable[[], Any], seconds: float = 30) -> Any:
    """What `found` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not asked for its code does not."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def own_token() -> Iterator[None]:
    """For this process and those that it starts, a token that clusters ask for and are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex * 2)
        yield


@contextmanager
def head_of_a_cluster(code: Path) -> Iterator[str]:
    """Gives the address of a Ray cluster of two processors on this machine, whose workers find modules in `code`.

    It has a token of its own: what Ray does without one depends on whether one lies in the home folder.
    """
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, own_token():
        command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
        options = [f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
        with subprocess.Popen(
            [sys.executable, *command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONPATH": str(code)},
        ) as head:  # fmt: skip
            assert head.stdout is not None
            said = []
            for line in head.stdout:
                said.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                raise AssertionError("".join(said))
            threading.Thread(target=head.stdout.read).start()
            yield f"127.0.0.1:{port}"
            head.terminate()
