"""Shell completion as a shell asks for it, and `python -m warmerge`, which is the same command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import COMMANDS, Done, environment, here

BASH = shutil.which("bash")


def module(*arguments: str, **variables: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "warmerge", *arguments],
        capture_output=True, text=True, env=environment(**variables), timeout=60,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def bash(script: str, home: Path) -> Done:
    """A script of a bash in which `warmerge` is this interpreter's; typer asks which shell its parent is."""
    assert BASH
    (home / "bin").mkdir(exist_ok=True)
    command = home / "bin" / "warmerge"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -W error -m warmerge "$@"\n')
    command.chmod(0o755)
    (home / "script.sh").write_text(script)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [BASH, "--norc", "script.sh"],
        capture_output=True, text=True, cwd=home, env=environment(PATH=path, HOME=str(home)), timeout=60,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def asked(*words: str) -> str:
    """What bash does when the user presses TAB after the last of these words, and prints of it."""
    line = " ".join(f"'{word}'" for word in words)
    pressed = f"COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}; _warmerge_completion warmerge"
    return f'{pressed}; echo "${{COMPREPLY[*]}}"\n'


def test_the_module_is_the_command() -> None:
    done = module("--help")
    assert (done.code, done.err) == (0, "")
    assert "Usage: warmerge [OPTIONS] COMMAND [ARGS]..." in done.out
    assert all(f" {command} " in done.out for command in COMMANDS)
    assert module("averge").err.startswith("Usage: warmerge [OPTIONS]")


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_bash_completes_commands_and_options_and_leaves_paths_to_itself(tmp_path: Path) -> None:
    questions = [["warmerge", ""], ["warmerge", "lm"], ["warmerge", "lmc-curve", "--po"], ["warmerge", "average", "r"]]
    done = bash("source <(warmerge --show-completion)\ncomplete -p\n" + "".join(asked(*q) for q in questions), tmp_path)
    assert (done.code, done.err) == (0, "")
    registered, commands, *others = done.out.splitlines()
    assert registered == "complete -o default -F _warmerge_completion warmerge"  # default: files, where it has nothing
    assert sorted(commands.split()) == COMMANDS
    assert others == ["lmc-curve", "--points", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "script.sh"}, "nothing was written to $HOME"


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_it_is_installed_only_on_request_and_bash_then_reads_it(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("alias mine=ls\n")
    done = bash("warmerge --install-completion", tmp_path)
    script = tmp_path / ".bash_completions" / "warmerge.sh"
    assert (done.code, done.err) == (0, "")
    assert f"bash completion installed in {script}" in done.out
    assert (tmp_path / ".bashrc").read_text().split() == ["alias", "mine=ls", "source", f"'{script}'"]
    again = bash("source .bashrc\n" + asked("warmerge", "insp"), tmp_path)
    assert (again.code, again.out, again.err) == (0, "inspect\n", "")


def test_zsh_gets_a_script_and_commands_with_what_they_are_for() -> None:
    shown = module(_WARMERGE_COMPLETE="source_zsh")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.lstrip().startswith("#compdef warmerge\n")
    assert "_WARMERGE_COMPLETE=complete_zsh warmerge)" in shown.out
    offered = module(_WARMERGE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="warmerge ")
    assert all(f'"{command}":"' in offered.out for command in COMMANDS)
    assert '"inspect":"Show what checkpoints are' in offered.out
    some = module(_WARMERGE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="warmerge rl-")
    assert ('"rl-report":"' in some.out, '"rl":"' in some.out, '"inspect":"' in some.out) == (True, False, False)


def test_only_the_help_of_the_whole_speaks_of_it() -> None:
    assert "--install-completion" in here("--help").out
    assert "completion" not in here("average", "--help").out
