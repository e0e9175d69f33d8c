"""What large inputs cost, counted in operations and not in seconds: twice as much of anything takes twice as many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import save_file

import warmerge
from warmerge.errors import Interrupted, RefusedError
from warmerge.weights import output, samples, stream
from warmerge.weights.folder import LocalFolder
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.samples import read_sample

HEAD = torch.linspace(-1, 1, 16).reshape(1, 16)


def in_shards(folder: Path, seed: int, shards: int, each: int = 4) -> Path:
    """A checkpoint of so many files, one after the other with `each` tensors of 4 KB."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    for number in range(shards):
        names = [f"layers.{number * each + i}.weight" for i in range(each)]
        tensors = {name: 1 + 0.01 * torch.randn(1024, generator=random) for name in names}
        if number == shards - 1:
            tensors["score.weight"] = HEAD
        save_file(tensors, folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors")
    return folder


def test_each_shard_asks_only_whether_its_own_inputs_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = LocalFolder.refuse_changed

    def counting(folder: LocalFolder, files: Iterable[str]) -> None:
        names = list(files)
        asked.extend(names)
        real(folder, names)

    monkeypatch.setattr(LocalFolder, "refuse_changed", counting)
    counts = {}
    for shards in (5, 10, 20):
        members = [in_shards(tmp_path / f"{shards}-{seed}", seed, shards) for seed in (1, 2)]
        asked.clear()
        out = warmerge.average(members, tmp_path / f"out-{shards}", max_shard_size="16384B").out
        assert len(list(out.glob("*.safetensors"))) == shards + 1
        counts[shards] = len(asked)
    assert counts[20] - counts[10] == 2 * (counts[10] - counts[5])
    assert counts[20] < 10 * 20, "a few times for each file of two members, not for each shard all files"


def test_a_file_that_changes_after_its_shard_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of it was whole, and what is read of it from then on is refused."""
    members = [in_shards(tmp_path / f"{seed}", seed, 3) for seed in (1, 2)]
    expected = warmerge.average(members, tmp_path / "expected", max_shard_size="16384B").out
    first, second = sorted(members[0].glob("*.safetensors"))[:2]
    real, left = stream.refuse_changed_inputs, [first]

    def then_change(tensors: Iterable[Any]) -> None:
        real(tensors)
        if left:
            os.utime(left.pop(), ns=(1, 1))

    monkeypatch.setattr("warmerge.weights.average.refuse_changed_inputs", then_change)
    out = warmerge.average(members, tmp_path / "out", max_shard_size="16384B").out
    assert [p.read_bytes() for p in sorted(out.glob("*.safetensors"))] == [
        p.read_bytes() for p in sorted(expected.glob("*.safetensors"))
    ]
    left.append(second)
    with pytest.raises(RefusedError, match=f"{second.name}: changed while it was read"):
        warmerge.average(members, tmp_path / "again", max_shard_size="16384B")


@pytest.mark.parametrize("shards", [1, 6])
def test_a_sample_opens_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    checkpoint = open_checkpoint(in_shards(tmp_path / "member", 1, shards, each=8 // shards + 1))
    opened: list[str] = []
    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, *rest: (opened.append(Path(path).name), real(path, *rest))[1])
        read_sample(checkpoint)
    assert len(opened) == shards, opened
    assert len(set(opened)) == shards


def test_a_sample_of_many_tensors_is_no_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(in_shards(tmp_path / "member", 1, 2, each=50))
    whole = read_sample(checkpoint)
    assert len(whole.body) == 100 * 1024 + 16
    monkeypatch.setattr(samples, "BODY_VALUES", 4000)
    monkeypatch.setattr(samples, "_AT_ONCE", 7)
    found = read_sample(checkpoint)
    assert len(found.body) == 100 * (4000 // 101) + 16
    assert found.fingerprint == whole.fingerprint
    assert found.body[:39].tolist() == whole.body[:39].tolist()
    assert {name: head.tolist() for name, head in found.heads.items()} == {"score.weight": HEAD.flatten().tolist()}


def test_local_checkpoints_are_taken_as_they_are(tmp_path: Path) -> None:
    """No table of files is made anew for each tensor, and no tensor's record."""
    checkpoint = open_checkpoint(in_shards(tmp_path / "member", 1, 2))
    assert checkpoint.folder.sizes() is checkpoint.folder.sizes()
    (local,) = make_local([checkpoint])
    assert all(local.tensors[name] is tensor for name, tensor in checkpoint.tensors.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_gram_matrices_are_summed_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Those of all tiles of a model of 70B would take gigabytes."""
    members = [in_shards(tmp_path / f"{seed}", seed, 1, each=40) for seed in (1, 2, 3)]
    whole = warmerge.inspect(members, distances=True, threads=threads).distances
    waiting, most = 0, 0
    gram, summed = stream.gram, stream._summed

    def made(*arguments: Any) -> Any:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return gram(*arguments)

    def gone(parts: Any, count: int) -> Any:
        nonlocal waiting
        parts = list(parts)
        waiting -= len(parts)
        return summed(parts, count)

    monkeypatch.setattr(stream, "TILE", 64)  # 16 tiles of each tensor, where there was one
    monkeypatch.setattr(stream, "gram", made)
    monkeypatch.setattr(stream, "_summed", gone)
    assert whole is not None
    found = warmerge.inspect(members, distances=True, threads=threads).distances
    assert found is not None
    assert found[0].relative[0][1] == pytest.approx(whole[0].relative[0][1], rel=1e-12)
    assert waiting == 0
    assert most <= 16 * (threads + 1), "at most the tensors that the threads are at, of 40"


@pytest.mark.parametrize(
    "do",
    [
        lambda members, base, out: warmerge.average(members, out, rule="stock", base=base),
        lambda members, base, out: warmerge.inspect(members, distances=True),
    ],
    ids=["average", "inspect"],
)
def test_infinities_of_both_signs_in_one_sum_are_refused(tmp_path: Path, do: Callable[..., object]) -> None:
    """Their tiles' inner products are inf and -inf, which have no sum: a finding, not an arithmetic error."""
    members = []
    for seed in (1, 2):
        values = torch.ones(1 << 19)
        values[-1] = torch.inf if seed == 1 else -1.0
        values[0] = torch.inf if seed == 1 else 1.0
        members.append(write_checkpoint(tmp_path / f"{seed}", {"score.weight": HEAD * seed, "w": values}, config=None))
    base = write_checkpoint(tmp_path / "base", {"score.weight": HEAD, "w": torch.zeros(1 << 19)}, config=None)
    with pytest.raises(RefusedError, match=r"1/model\.safetensors: tensor 'w' holds inf at element"):
        do(members, base, tmp_path / "out")


def of_slerp(members: list[Path], base: Path, out: Path, **choices: Any) -> Path:
    sizes = {"max_shard_size": "16384B", "threads": 1, "rule": "slerp", "lam": 0.5, "base": base}
    return warmerge.average(members, out, **(sizes | choices)).out


def test_each_shards_coefficients_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [in_shards(tmp_path / f"{seed}", seed, 10) for seed in (0, 1, 2)]
    written: list[tuple[str, bytes]] = []
    real = output._write_synced

    def recording(path: Path, data: bytes) -> None:
        written.append((path.name, data))
        real(path, data)

    monkeypatch.setattr(output, "_write_synced", recording)
    out = of_slerp(members[1:], members[0], tmp_path / "out")
    notes = [json.loads(data) for name, data in written if name.endswith(".note.json")]
    assert len(notes) == 11
    tensors = [name for note in notes for name in note]
    assert len(tensors) == len(set(tensors)) == 41
    assert json.loads((out / "warmerge.json").read_text())["coefficients"]["per_tensor"].keys() == set(tensors)
    progress = [json.loads(data)["finished"] for name, data in written if name == "progress.json.new"]
    assert [len(finished) for finished in progress] == list(range(12))
    assert set(progress[-1].values()) == {True}
    assert not [path for path in out.iterdir() if "note" in path.name]


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["", "[]", '{"layers.0', None])
def test_a_shard_whose_coefficients_were_lost_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    members = [in_shards(tmp_path / f"{seed}", seed, 3) for seed in (0, 1, 2)]
    expected = of_slerp(members[1:], members[0], tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr("warmerge.weights.average.publish", interrupted)
        with pytest.raises(Interrupted, match="4 of 4 shards are finished and kept"):
            of_slerp(members[1:], members[0], tmp_path / "out")
    note = tmp_path / ".out.partial" / "model-00002-of-00004.safetensors.note.json"
    assert note.is_file()
    note.unlink() if damage is None else note.write_text(damage)
    out = of_slerp(members[1:], members[0], tmp_path / "out", resume=True)
    one, two = (json.loads((folder / "warmerge.json").read_text()) for folder in (out, expected))
    assert one["resumed_shards"] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 3, 4)]
    assert one["coefficients"] == two["coefficients"]
    for file in expected.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
