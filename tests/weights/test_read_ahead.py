"""Streaming from a Hub, here one on 127.0.0.1: the same bytes as from a disk, few requests, bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_tensors, write_checkpoint
from loopback_hub import Fault, LoopbackHub

import warmerge
from warmerge.errors import RemoteError
from warmerge.weights.checkpoint import Stored
from warmerge.weights.folder import Folder, LocalFolder, open_folder
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.remote import asking, read_ahead, reading
from warmerge.weights.remote.read_ahead import Piece, ReadAhead, Window, read_pieces, windows
from warmerge.weights.samples import read_sample

RULES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "weighted": {"weights": (0.5, 0.3, 0.2)},
    "stock": {"base": "base"},
}


def large(seed: int) -> dict[str, torch.Tensor]:
    """A reward model of 5 MB, so that windows of 1 MiB have to be taken up one after the other."""
    values = torch.Generator().manual_seed(seed)
    return llama_tensors(seed) | {"model.embed_tokens.weight": torch.randn(80_000, 16, generator=values)}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    shards = {"a": 1, "b": 3, "c": 2, "base": 1}
    return {name: write_checkpoint(tmp_path / name, large(i), shards=n) for i, (name, n) in enumerate(shards.items())}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(read_ahead, "_LARGEST_WINDOW", 1 << 20)
    with LoopbackHub({f"me/{name}": folder for name, folder in folders.items()}) as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    waited: list[float] = []

    def pause(ahead: ReadAhead, seconds: float) -> bool:
        waited.append(seconds)
        return ahead._stopped.is_set()

    monkeypatch.setattr(asking.time, "sleep", waited.append)
    monkeypatch.setattr(ReadAhead, "_pause", pause)
    return waited


def merge(folders: dict[str, Path], out: Path, place: str, **choices: Any) -> dict[str, bytes]:
    """The files of a merge of a, b and c; `place` is put before their names, and before the base's."""
    names = [f"{place}/{name}" for name in "abc"]
    if "base" in choices:
        choices["base"] = f"{place}/base"
    warmerge.average(names, out, stream=place == "me", threads=2, **choices)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("warmerge.json", "README.md")}


@pytest.mark.parametrize("rule", RULES)
def test_the_same_bytes_as_the_local_merge(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    choices = {"rule": rule, "max_shard_size": "2MB", **RULES[rule]}
    local = merge(folders, tmp_path / "local", str(tmp_path), **choices)
    assert merge(folders, tmp_path / "streamed", "me", **choices) == local
    assert len(local) > 3
    assert not list((tmp_path / "cache").rglob("*")), "nothing but the output is put on the disk"


def test_each_byte_is_asked_for_once_and_in_large_pieces(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    merge(folders, tmp_path / "out", "me")
    size = sum(path.stat().st_size for name in "abc" for path in folders[name].iterdir())
    # Beside the weights: the first 256 KiB of six files (headers), and the samples.
    assert size < hub.sent < size + 6 * 262_144 + 1_500_000
    assert len(hub.requests) < 60


def test_memory_is_bounded_and_freed(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MEMORY", 4 << 20)
    checkpoint = open_checkpoint("me/a", streamed=True)
    parts = [checkpoint.tensors[name].parts[0] for name in sorted(checkpoint.tensors)]
    ahead = ReadAhead(parts)
    (lane,) = ahead._lanes.values()
    largest = 0
    for part in parts:
        reader, data = ahead.reader(part.folder), bytearray(part.nbytes)
        for start in range(0, part.nbytes, 100_000):
            reader.readinto(part.file, part.offset + start, memoryview(data)[start : start + 100_000])
            largest = max(largest, len(lane._data))
    assert 2 <= largest <= 4, "windows of 1 MiB"
    assert lane._data == {}
    ahead.close()


def test_windows_join_neighbours_and_name_each_byte_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "x")
    parts = [Stored("U8", (n,), folder, "f", offset, n) for offset, n in ((0, 4), (4, 6), (20, 3), (0, 4))]
    assert windows(parts, 4) == [Window("f", 0, 4), Window("f", 4, 8), Window("f", 8, 10), Window("f", 20, 23)]


def test_what_is_read_twice_or_was_not_announced_is_right_too(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint("me/a", streamed=True)
    data = (folders["a"] / "model.safetensors").read_bytes()
    part = checkpoint.tensors["model.embed_tokens.weight"].parts[0]
    ahead = ReadAhead([part])
    reader = ahead.reader(part.folder)
    for offset, length in [(part.offset, 10), (part.offset, part.nbytes), (part.offset + 5, 99), (0, 300_000)] * 2:
        buffer = bytearray(length)
        reader.readinto(part.file, offset, memoryview(buffer))
        assert buffer == data[offset : offset + length]
    ahead.close()


def test_many_threads_read_the_same_windows(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint("me/a", streamed=True)
    data = (folders["a"] / "model.safetensors").read_bytes()
    part = checkpoint.tensors["model.embed_tokens.weight"].parts[0]
    ahead, wrong = ReadAhead([part]), []

    def read(start: int) -> None:
        buffer = bytearray(min(10_000, part.nbytes - start))
        ahead.reader(part.folder).readinto(part.file, part.offset + start, memoryview(buffer))
        if buffer != data[part.offset + start : part.offset + start + len(buffer)]:
            wrong.append(start)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 3_000_000, 10_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({request.range for request in hub.asked(path="model.safetensors")}) == len(
        hub.asked(path="model.safetensors")
    )
    ahead.close()


def test_local_folders_are_read_as_ever(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["a"])
    ahead = ReadAhead([tensor.parts[0] for tensor in checkpoint.tensors.values()])
    assert ahead._pool is None
    assert isinstance(checkpoint.folder, LocalFolder)
    reader = ahead.reader(checkpoint.folder)
    reader.close()
    ahead.close()


def test_samples_take_few_requests_and_are_those_of_the_disk(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    for name in ("a", "b"):
        streamed = open_checkpoint(f"me/{name}", streamed=True)
        hub.requests.clear()
        assert read_sample(streamed).fingerprint == read_sample(open_checkpoint(folders[name])).fingerprint
        assert len(hub.requests) <= 6


def test_pieces_come_in_the_order_that_they_were_asked_for(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    far: Folder = reading.open_hub("me/a", streamed=True)
    near = open_folder(folders["a"], "a")
    data = (folders["a"] / "model.safetensors").read_bytes()
    asked = [(far, 4_000_000, 9), (near, 3, 5), (far, 400_000, 7), (far, 300_000, 200_000), (far, 8, 0), (near, 0, 0)]
    found = read_pieces([Piece(folder, "model.safetensors", offset, length) for folder, offset, length in asked])
    assert found == [data[offset : offset + length] for _, offset, length in asked]
    assert len(hub.asked(path="model.safetensors")) == 2


# None more often than one window is tried less one: here waiting takes no time, so that one window may meet them all.
FAULTS: dict[str, Callable[[], list[Fault]]] = {
    "dropped connections": lambda: [Fault("hangup", path="/resolve/", times=6)],
    "errors": lambda: [Fault(status=500, path="/resolve/", times=3), Fault(status=503, path="/resolve/", times=3)],
    "rate limit": lambda: [Fault(status=429, headers={"Retry-After": "40"}, path="/resolve/", times=7)],
    "short bodies": lambda: [Fault("short", path="/resolve/", times=40)],
    "long bodies": lambda: [Fault("long", path="/resolve/", times=3)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_is_taken_up_where_it_broke(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, waits: list[float], fault: str
) -> None:
    expected = merge(folders, tmp_path / "local", str(tmp_path))

    def planned(prepared: object) -> None:
        hub.faults += FAULTS[fault]()
        hub.sent = 0

    assert merge(folders, tmp_path / "streamed", "me", on_plan=planned) == expected
    assert {left.times for left in hub.faults} == {0}
    assert waits, "a server in trouble is not asked again at once"
    if fault == "rate limit":
        assert set(waits) == {40.0}
    if fault == "short bodies":
        assert hub.sent < 1.2 * sum(path.stat().st_size for name in "abc" for path in folders[name].iterdir())


@pytest.mark.parametrize("kind", ["whole", "shifted", "html"])
def test_other_bytes_are_never_taken(hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    hub.faults.append(Fault(kind, path="c/resolve/", times=99))
    with pytest.raises(RemoteError, match=r"were asked for, the server sent"):
        merge(folders, tmp_path / "out", "me")
    assert not (tmp_path / "out").exists()


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merge(folders, tmp_path / "local", str(tmp_path))
    moved = []

    def move(prepared: object) -> None:
        moved.append(hub.put("me/b", folders["base"]))

    names = ["me/a", "me/b", "me/c"]
    merged = warmerge.average(names, tmp_path / "out", stream=True, on_plan=move)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert merged.manifest["inputs"][1]["revision"] not in moved


def test_a_history_that_is_rewritten_meanwhile_is_said(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    def squash(prepared: object) -> None:
        hub.put("me/b", folders["base"])
        hub.forget("me/b")

    with pytest.raises(RemoteError, match=r"me/b changed while it was read: its commit .{12} is no longer there; run"):
        warmerge.average(["me/a", "me/b"], tmp_path / "out", stream=True, on_plan=squash)
    assert not (tmp_path / "out").exists()


def test_a_stream_that_ends_is_resumed(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, waits: list[float]
) -> None:
    choices = {"max_shard_size": "1MB"}
    local = merge(folders, tmp_path / "local", str(tmp_path), **choices)
    hub.faults.append(Fault("hangup", path="b/resolve/", times=999))
    hub.faults[0].times = 0

    def cut(count: int) -> None:
        seen.append(count)
        if sum(seen) > 9_000_000:
            hub.faults[0].times = 999

    seen: list[int] = []
    names = ["me/a", "me/b", "me/c"]
    with pytest.raises(RemoteError, match=r"me/b cannot be read on: .* cannot be reached"):
        warmerge.average(names, tmp_path / "out", stream=True, progress=cut, threads=1, **choices)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    merged = warmerge.average(names, tmp_path / "out", stream=True, resume=True, **choices)
    assert merged.manifest["resumed_shards"]
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in local} == local


def test_who_still_reads_after_closing_gives_up_at_the_first_fault(hub: LoopbackHub) -> None:
    """One thread gives up while another is about to ask for its next windows."""
    checkpoint = open_checkpoint("me/a", streamed=True)
    part = checkpoint.tensors["model.embed_tokens.weight"].parts[0]
    ahead = ReadAhead([part])
    reader = ahead.reader(part.folder)
    ahead.close()
    hub.faults.append(Fault(status=429, headers={"Retry-After": "300"}, times=999))
    begun = time.monotonic()
    with pytest.raises(RemoteError, match="too many requests"):
        reader.readinto(part.file, part.offset + 1_000_000, memoryview(bytearray(10)))
    assert time.monotonic() - begun < 20


def test_giving_up_does_not_wait_for_what_is_under_way(hub: LoopbackHub) -> None:
    checkpoint = open_checkpoint("me/a", streamed=True)
    part = checkpoint.tensors["model.embed_tokens.weight"].parts[0]
    hub.faults.append(Fault(status=429, headers={"Retry-After": "300"}, times=999))
    hub.requests.clear()
    ahead = ReadAhead([part])
    begun, errors = time.monotonic(), []

    def read() -> None:
        try:
            ahead.reader(part.folder).readinto(part.file, part.offset + 1_000_000, memoryview(bytearray(10)))
        except RemoteError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    while not hub.asked(path="/resolve/"):
        time.sleep(0.01)
    ahead.close()
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 20
    assert "too many requests" in errors[0]
