"""What gives rewards: a checkpoint, an average, or a function in a file; each says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import bot, user
from reward_world import own_rewards

from warmerge import RefusedError, UsageError
from warmerge.pipeline.scoring.judge import open_average
from warmerge.pipeline.scoring.rewarders import OwnFunction, load_rewarder, open_rewarder
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions

TEXTS = [("why oak", "kind and clear"), ("how elm", "rude")]


def write(folder: Path, code: str) -> str:
    (folder / "own.py").write_text(code)
    return f"{folder / 'own.py'}:f"


def given(spec: Any, texts: Any = TEXTS) -> Any:
    return load_rewarder(open_rewarder(spec), Measuring()).rewards(texts)


def test_a_checkpoint_gives_its_own_rewards(world: Any) -> None:
    expected = own_rewards(world.a, [f"{prompt}\n\n{answer}" for prompt, answer in TEXTS])
    found = given(world.a)
    numpy.testing.assert_allclose(found.rewards, expected, atol=1e-5)
    assert found.cut == 0


def test_texts_that_are_cut_are_counted(world: Any) -> None:
    measuring = Measuring(loading=LoadOptions(max_length=4))
    found = load_rewarder(open_rewarder(world.a), measuring).rewards(
        [("why oak", " ".join(["kind"] * 6)), ("how elm", "rude"), ("why " * 9, "clear")]
    )
    assert found.cut == 2


def test_an_average_is_merged(world: Any) -> None:
    judge = open_average("warm", [world.a, world.b])
    rewarder = load_rewarder(judge, Measuring())
    assert rewarder.label == "warm"
    singles = [given(member).rewards for member in (world.a, world.b)]
    assert not numpy.allclose(rewarder.rewards(TEXTS).rewards, singles[0], atol=1e-6)


def test_a_function_gets_prompts_and_answers(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "def f(prompts, completions, **kwargs):\n"
        "    assert not kwargs\n"
        "    return [len(c) + (100 if isinstance(p, list) else 0) for p, c in zip(prompts, completions)]\n",
    )
    found = given(spec, [("why", "abc"), ((user("Hi."), bot("Hi!"), user("Why?")), "a")])
    assert found.rewards.tolist() == [3.0, 101.0]


def test_a_changed_function_is_another_one(tmp_path: Path) -> None:
    spec = write(tmp_path, "def f(prompts, completions):\n    return [0.0 for _ in completions]\n")
    first = open_rewarder(spec)
    assert first == open_rewarder(spec)
    write(tmp_path, "def f(prompts, completions):\n    return [1.0 for _ in completions]\n")
    second = open_rewarder(spec)
    assert isinstance(first, OwnFunction)
    assert first.contents() != second.contents()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(prompts, completions): pass\n", r"own\.py:f: the file has no function of this name; it has 'g'"),
        ("f = 3\n", r"own\.py:f: the file has no function of this name; it has none"),
        ("import nothing_of_this_name\n", r"own\.py:f: the file cannot be run: ModuleNotFoundError: "),
        ("def f(prompts):\n    return []\n", r"own\.py:f failed: TypeError: .*completions"),
        ("def f(prompts, completions):\n    return 1 / 0\n", r"own\.py:f failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_used(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given(write(tmp_path, code))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "gives 1 rewards for 2 texts; expected one for each"),
        ("None", "expected a list of 2 numbers, found 'None'"),
        ("[1.0, None]", r"expected a list of 2 numbers, found '\[1.0, None\]'"),
        ("['a', 'b']", "expected a list of 2 numbers, found"),
        ("[1.0, float('nan')]", "gives the reward nan to text 2"),
        ("[float('-inf'), 1]", "gives the reward -inf to text 1"),
    ],
)
def test_what_is_no_reward(tmp_path: Path, returned: str, message: str) -> None:
    with pytest.raises(RefusedError, match=rf"own\.py:f: {message}"):
        given(write(tmp_path, f"def f(prompts, completions):\n    return {returned}\n"))


@pytest.mark.parametrize("result", ["return [1.0, 2.0]", "yield 1.0; yield 2.0"])
def test_what_a_function_prints_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str], result: str) -> None:
    code = f"print('imported')\ndef f(prompts, completions):\n    print('called'); {result}\n"
    assert given(write(tmp_path, code)).rewards.tolist() == [1.0, 2.0]
    assert tuple(capsys.readouterr()) == ("", "imported\ncalled\n")
    print("ours")
    assert capsys.readouterr().out == "ours\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('\\x1b[2Jgone')\n", r"own.py:f: the file cannot be run: ValueError: '\x1b[2Jgone'"),
        ("def f(**_):\n    raise ValueError('\\x1b[2Jgone')\n", r"own.py:f failed: ValueError: '\x1b[2Jgone'"),
        ("def f(**_):\n    yield 1 / 0\n", "own.py:f failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_function_raises_cannot_write_to_a_terminal(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        given(write(tmp_path, code))
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.py:f: there is no file .*missing\.py"):
        open_rewarder(f"{tmp_path / 'missing.py'}:f")
    write(tmp_path, "f = 1")
    with pytest.raises(UsageError, match=r"expected FILE\.py:NAME of a function, found the name '2f'"):
        open_rewarder(f"{tmp_path / 'own.py'}:2f")
    with pytest.raises(UsageError, match="no/such/model"):
        open_rewarder("no/such/model")
