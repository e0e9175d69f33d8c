"""A real bash whose `warmerge` is this process's: pipes, loops and expansions are the shell's, imports cost nothing.

with Bridge(folder, answer) as bridge:
    done = bridge.run("warmerge average rm-* -o warm && ls warm")   # answer(["average", "rm-0", ...], folder) -> Done
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from test_cli import Done, environment

BASH = shutil.which("bash")
# Arguments go out through one pipe; the exit code comes back through another, after the two streams lie in files.
_STUB = """#!{bash}
{{ printf '%s\\0' "$PWD" "$@"; }} > "{place}/asked"
read -r code < "{place}/answered"
cat "{place}/out"
cat "{place}/err" >&2
exit "$code"
"""


class Bridge:
    """`answer(arguments, folder)` is called for each `warmerge`, in this thread; raises what it raises."""

    def __init__(self, folder: Path, answer: Callable[[Sequence[str], Path], Done]) -> None:
        self.folder, self.answer = folder, answer

    def __enter__(self) -> Bridge:
        self._place = Path(tempfile.mkdtemp(prefix="warmerge-bridge-"))
        for name in ("asked", "answered"):
            os.mkfifo(self._place / name)
        stub = self._place / "bin" / "warmerge"
        stub.parent.mkdir()
        stub.write_text(_STUB.format(bash=BASH, place=self._place))
        stub.chmod(0o755)
        # For reading and writing: so that a writer that comes later never finds nobody, and no end is ever read.
        self._asked = os.open(self._place / "asked", os.O_RDWR | os.O_NONBLOCK)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._asked)
        shutil.rmtree(self._place)

    def run(self, script: str, seconds: float = 240.0, **variables: str) -> Done:
        """What bash makes of a script in the folder; afterwards `self.folder` is where it ended."""
        path = f"{self._place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        ended = self._place / "pwd"
        text = f"trap 'pwd > \"{ended}\"' EXIT\n{script}\n"
        with (self._place / "shell.out").open("w+") as out, (self._place / "shell.err").open("w+") as err:
            shell = subprocess.Popen(
                [str(BASH), "--norc", "-c", text], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=environment(**{"PATH": path, "OMP_NUM_THREADS": "1", **variables}),
            )  # fmt: skip
            try:
                self._serve(shell, time.monotonic() + seconds)
            finally:
                shell.kill()
                shell.wait()
            out.seek(0), err.seek(0)
            done = Done(shell.returncode, out.read(), err.read())
        if ended.exists():
            self.folder = Path(ended.read_text().strip())
        return done

    def _serve(self, shell: subprocess.Popen[bytes], deadline: float) -> None:
        heard = b""
        while shell.poll() is None:
            assert time.monotonic() < deadline, f"the shell did not end in time; it had asked {heard!r}"
            if select.select([self._asked], [], [], 0.02)[0]:
                heard += os.read(self._asked, 1 << 16)
            elif heard.endswith(b"\0"):  # one write, and no more of it
                folder, *arguments = heard[:-1].decode().split("\0")
                heard = b""
                self._reply(self.answer(arguments, Path(folder)))

    def _reply(self, done: Done) -> None:
        (self._place / "out").write_text(done.out)
        (self._place / "err").write_text(done.err)
        with (self._place / "answered").open("w") as code:
            code.write(f"{done.code}\n")
