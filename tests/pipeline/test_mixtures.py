"""Rewards of mixtures: what is kept between runs, and that nothing is kept for other inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import World, pairs, with_head, write_rows, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from warmerge.errors import Interrupted, RefusedError, UsageError
from warmerge.pipeline.scoring import mixtures as module
from warmerge.pipeline.scoring.mixtures import POINTS, Mixtures, open_mixtures
from warmerge.rewards.bench import Measuring, open_bench
from warmerge.rewards.model import LoadOptions, load_reward_model


@pytest.fixture
def small(tmp_path: Path, world: World) -> Any:
    """small(store=..., ...): mixtures of copies of a and b on 12 pairs."""
    for name in ("a", "b"):
        shutil.copytree(getattr(world, name), tmp_path / name)
    data = write_rows(tmp_path / "val.jsonl", pairs(12, 1))

    def opened(store: Path | None = tmp_path / "out", overwrite: bool = False, **loading: Any) -> Mixtures:
        bench = open_bench([f"val={data}"], Measuring(LoadOptions(**loading)))
        return open_mixtures([tmp_path / "a", tmp_path / "b"], bench, store, overwrite)

    return opened


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("scored again")


def test_a_member_alone_and_the_average_are_what_they_are_on_disk(tmp_path: Path, small: Any) -> None:
    import warmerge

    warmerge.average([tmp_path / "a", tmp_path / "b"], tmp_path / "warm")
    found = small(store=None)
    for weights, folder in ((found.single(0), "a"), (found.single(1), "b"), (found.uniform([0, 1]), "warm")):
        alone = found.bench.score(load_reward_model(tmp_path / folder))
        assert numpy.array_equal(found.rewards(weights)["val"], alone["val"]), folder
    assert found.uniform([1]) == found.single(1)


def test_what_was_computed_is_kept_and_not_computed_again(
    tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small(max_length=12)
    wanted = [first.single(0), (0.25, 0.75)]
    texts = len(first.bench.texts()["val"])
    assert first.missing(wanted) == 2 * texts
    first.measure(wanted)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [POINTS]
    with safe_open(tmp_path / "out" / POINTS, framework="numpy") as file:
        assert sorted(file.keys()) == ['["val", 0.25, 0.75]', '["val", 1.0, 0.0]']
    monkeypatch.setattr(module, "load_reward_model", never)
    again = small(max_length=12)
    assert again.missing([*wanted, (0.5, 0.5)]) == texts
    again.measure(wanted)
    for weights in wanted:
        assert numpy.array_equal(again.rewards(weights)["val"], first.rewards(weights)["val"])
    # What is known of the texts and of the model is known without them, too.
    assert again.cuts == first.cuts
    assert again.cuts["val"]["answer_cut"] > 0
    assert again.warnings == first.warnings


def test_doubts_of_the_model_are_kept(tmp_path: Path, small: Any, world: World) -> None:
    head = load_file(world.a / "model.safetensors")["score.weight"]
    for name in ("a", "b"):
        with_head(getattr(world, name), tmp_path / name, head if name == "a" else head * 1.01, pad_token_id=1)
    first = small()
    first.measure([first.single(0)])
    (doubt,) = first.warnings
    assert "has pad_token_id 1, its tokenizer pads with 0" in doubt.what
    assert small().warnings == first.warnings


@pytest.mark.parametrize("what", ["weights", "tokenizer", "template", "config", "options", "data", "versions"])
def test_points_of_other_inputs_are_refused(
    tmp_path: Path, small: Any, world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first = small()
    first.measure([first.single(0)])
    options: dict[str, Any] = {}
    if what == "weights":
        shutil.copytree(world.c, tmp_path / "b", dirs_exist_ok=True)
    elif what == "tokenizer":
        for name in ("a", "b"):
            path = tmp_path / name / "tokenizer.json"
            path.write_text(path.read_text().replace('"warm"', '"wram"'))
    elif what == "template":
        for name in ("a", "b"):
            write_tokenizer(tmp_path / name, template="{% for m in messages %}{{ m.content }} {% endfor %}")
    elif what == "config":
        for name in ("a", "b"):
            path = tmp_path / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    elif what == "options":
        options = {"max_length": 20}
    elif what == "data":
        write_rows(tmp_path / "val.jsonl", pairs(12, 2))
    else:
        monkeypatch.setattr(module, "versions", lambda: {"warmerge": "another"})
    with pytest.raises(UsageError) as caught:
        small(**options)
    assert str(caught.value) == (
        f"{tmp_path / 'out'} holds points of other checkpoints, data, options or versions; choose another -o, or add "
        "--overwrite"
    )
    assert small(**options, overwrite=True).known == {}


def test_overwrite_keeps_points_of_the_same_inputs(small: Any) -> None:
    """An interrupted run with --overwrite goes on with the same command, as its message promises."""
    first = small()
    first.measure([first.single(0)])
    assert list(small(overwrite=True).known) == [first.single(0)]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: b"", flipped, lambda data: b"\xff" * 100])
def test_a_damaged_file_is_said(tmp_path: Path, small: Any, damage: Any) -> None:
    first = small()
    first.measure([first.single(0)])
    path = tmp_path / "out" / POINTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError) as caught:
        small()
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("); add --overwrite to start anew")
    assert small(overwrite=True).known == {}


def test_points_of_another_precision_are_not_continued(
    tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--dtype auto depends on the machine: two precisions in one curve would look like a barrier."""
    first = small()
    first.measure([first.single(0)])
    original = load_reward_model
    monkeypatch.setattr(module, "load_reward_model", lambda source, _: original(source, LoadOptions(dtype="bfloat16")))
    again = small()
    again.measure([first.single(0)])
    with pytest.raises(UsageError) as caught:
        again.measure([first.single(1)])
    assert str(caught.value) == (
        f"{tmp_path / 'out'} holds points computed in float32 on cpu, here it would be bfloat16 on cpu; give --dtype "
        "and --device as they were, or choose another -o, or add --overwrite"
    )
    anew = small(overwrite=True)
    anew.measure([first.single(0), first.single(1)])
    assert list(anew.known) == [first.single(1)]
    anew.rewards(first.single(0))
    assert not numpy.array_equal(anew.known[first.single(0)]["val"], first.known[first.single(0)]["val"])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "stopped; nothing is kept"),
        (1, "stopped; 1 point is kept in OUT; the same command goes on there"),
        (2, "stopped; 2 points are kept in OUT; the same command goes on there"),
    ],
)
def test_ctrl_c_says_what_is_kept(tmp_path: Path, small: Any, kept: int, message: str) -> None:
    found = small()
    found.measure([found.single(0), found.single(1)][:kept])

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    found.bench.measuring = replace(found.bench.measuring, progress=stopped)
    with pytest.raises(Interrupted) as caught:
        found.rewards((0.5, 0.5))
    assert str(caught.value) == message.replace("OUT", str(tmp_path / "out"))
    assert len(small().known) == kept


def test_nothing_is_kept_without_a_store(tmp_path: Path, small: Any) -> None:
    found = small(store=None)
    found.measure([found.single(0)])
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_may_not_be_averaged_are_refused(tmp_path: Path, small: Any, world: World) -> None:
    shutil.copytree(world.a, tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(RefusedError, match="has the same weights as"):
        small()
