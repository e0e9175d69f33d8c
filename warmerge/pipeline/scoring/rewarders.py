"""What gives rewards to texts, loaded and ready to be asked many times: a reward model, an average, or a function.

A function is the user's own, `FILE.py:NAME`, with the signature of TRL's reward functions: where the worth of a text is
known (a rule, a test, a gold reward), no model has to stand for it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted, some
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.scoring.judge import Judge, load_judge, open_judge
from warmerge.rewards.bench import Measuring
from warmerge.rewards.scoring import Tokens, doubts_of, score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

Texts = Sequence[tuple["Text", "Text"]]


class Given(NamedTuple):
    """Rewards (N,) float64 of N texts, and how many of these were cut to the model's length limit."""

    rewards: NDArray[numpy.float64]
    cut: int


@dataclass(frozen=True)
class OwnFunction:
    """A reward function in a file: found, not yet run. `digest` is that of the file."""

    path: Path
    name: str
    digest: str

    @property
    def label(self) -> str:
        return f"{self.path}:{self.name}"

    def contents(self) -> list[str]:
        """What decides its rewards, as far as is known: the file may use others."""
        return [self.name, self.digest]

    def same_as(self, other: object) -> bool:
        """Whether another one, perhaps by another path, is this function."""
        return isinstance(other, OwnFunction) and other.contents() == self.contents()


@dataclass(frozen=True)
class Rewarder:
    """Gives rewards to (prompt, answer) texts. `warnings` are reasons for doubt found on loading."""

    label: str
    rewards: Callable[[Texts], Given]
    warnings: tuple[Finding, ...] = ()


def is_function(spec: Spec) -> bool:
    """Whether `FILE.py:NAME` is meant, and no checkpoint.

    >>> is_function("rules/gold.py:gold"), is_function("runs/1"), is_function("org/model.py")
    (True, False, False)
    """
    return str(spec).rpartition(":")[0].endswith(".py")


def open_rewarder(spec: Spec, base: Spec | None = None) -> Judge | OwnFunction:
    """A checkpoint or `FILE.py:NAME`, looked at but not loaded.

    Raises:
        UsageError: the file is not there.
        UsageError, RefusedError, RemoteError: as `open_judge`.
    """
    if not is_function(spec):
        return open_judge(spec, base)
    file, _, name = str(spec).rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{plain(str(spec))}: there is no file {plain(file)}")
    if not name.isidentifier():
        raise UsageError(f"{plain(str(spec))}: expected FILE.py:NAME of a function, found the name {quoted(name)}")
    return OwnFunction(path, name, hashlib.sha256(path.read_bytes()).hexdigest())


def load_rewarder(opened: Judge | OwnFunction, measuring: Measuring) -> Rewarder:
    """A reward model with its weights in memory, merged there where it is an average; or a function, imported.

    Raises:
        UsageError: the file has no such function, or fails when it is run.
        RefusedError, WarmergeError: as `load_reward_model` and `fill`.
    """
    if isinstance(opened, OwnFunction):
        return _of_function(opened)
    model = load_judge(opened, measuring)

    def rewards(texts: Texts) -> Given:
        tokens = Tokens(model.renderer, texts)
        found = score(model, tokens, measuring.batch_tokens)
        return Given(found, sum(entry.prompt_cut or entry.answer_cut for _, made in tokens for entry in made))

    return Rewarder(opened.label, rewards, (*opened.warnings, *doubts_of(model)))


def _of_function(opened: OwnFunction) -> Rewarder:
    where = plain(opened.label)
    name = f"warmerge_own_{hashlib.sha256(str(opened.path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, opened.path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        with _kept_apart():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{where}: the file cannot be run: {_said(error)}") from error
    function = getattr(module, opened.name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"{where}: the file has no function of this name; it has {some(known) or 'none'}")

    def rewards(texts: Texts) -> Given:
        # Copies: what it does to its messages is its own affair.
        given = copy.deepcopy([(list(p) if isinstance(p, tuple) else p, answer) for p, answer in texts])
        try:
            with _kept_apart():
                found = function(prompts=[prompt for prompt, _ in given], completions=[answer for _, answer in given])
                found = list(found) if isinstance(found, Iterator) else found  # a generator runs only now
        except (Exception, SystemExit) as error:
            raise UsageError(f"{where} failed: {_said(error)}") from error
        return Given(_checked(opened.label, found, len(texts)), 0)

    return Rewarder(opened.label, rewards)


@contextmanager
def _kept_apart() -> Iterator[None]:
    """For code of the user's. What it prints goes to stderr: stdout is for results, which programs read.

    Afterwards all random generators are where they were: what is sampled does not depend on who is asked for a reward.
    """
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


def _said(error: BaseException) -> str:
    """The words of an error of somebody else's code, which may be anything."""
    return f"{type(error).__name__}: {plain(str(error))}"


def _checked(label: str, found: Any, texts: int) -> NDArray[numpy.float64]:
    """What a function returned, if it is one finite number for each text."""
    try:
        values = [math.nan if isinstance(value, str) else float(value) for value in found]
        numbers = not any(isinstance(value, str) for value in found)
    except (TypeError, ValueError):
        numbers = False
    if not numbers:
        what = f"expected a list of {texts} numbers, found {quoted(str(found)[:80])}"
        raise RefusedError([Finding(label, what)])
    if len(values) != texts:
        raise RefusedError([Finding(label, f"gives {len(values)} rewards for {texts} texts; expected one for each")])
    wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if wrong is not None:
        raise RefusedError([Finding(label, f"gives the reward {values[wrong]} to text {wrong + 1}")])
    return numpy.array(values)
