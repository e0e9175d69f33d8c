"""Checkpoints in object stores: in memory, and where s3fs and moto are installed in an S3 server on 127.0.0.1."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import llama_tensors, write_checkpoint
from fsspec.implementations.memory import MemoryFileSystem

import warmerge
from warmerge.errors import RefusedError, RemoteError, UsageError
from warmerge.pipeline.inspect import inspect
from warmerge.weights.folder import read_bytes
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.remote import read_ahead
from warmerge.weights.remote.stores import StoreFolder, is_store, open_store
from warmerge.weights.samples import read_sample

SHARDS = {"a": 1, "b": 3, "c": 2}


@dataclass
class Store:
    """A store with the checkpoints a, b and c under `url`; `system` is fsspec's way to it."""

    url: str
    system: Any

    def put(self, folder: Path) -> None:
        for path in folder.iterdir():
            self.system.pipe_file(f"{self.url}/{folder.name}/{path.name}", path.read_bytes())


def large(seed: int) -> dict[str, torch.Tensor]:
    """A reward model of 2 MB: several windows of 256 KiB."""
    values = torch.Generator().manual_seed(seed)
    return llama_tensors(seed) | {"model.embed_tokens.weight": torch.randn(30_000, 16, generator=values)}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(read_ahead, "_LARGEST_WINDOW", 1 << 18)
    return {name: write_checkpoint(tmp_path / name, large(i), shards=n) for i, (name, n) in enumerate(SHARDS.items())}


@pytest.fixture
def memory(folders: dict[str, Path]) -> Iterator[Store]:
    store = Store("memory://runs", fsspec.filesystem("memory"))
    for folder in folders.values():
        store.put(folder)
    yield store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.mkdir("bucket")
    store = Store("s3://bucket/runs", system)
    for folder in folders.values():
        store.put(folder)
    yield store
    system.rm("bucket", recursive=True)


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(read_ahead.ReadAhead, "_pause", lambda ahead, seconds: waited.append(seconds))
    return waited


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("warmerge.json", "README.md")
    }


def merge(names: list[str], out: Path, **choices: Any) -> dict[str, bytes]:
    warmerge.average(names, out, stream=True, threads=2, **choices)
    return contents(out)


def failing(monkeypatch: pytest.MonkeyPatch, errors: list[Exception], path: str = "") -> None:
    """The next reads in memory:// of a file whose name holds `path` fail with these errors."""
    cat_file = MemoryFileSystem.cat_file

    def fail_first(self: MemoryFileSystem, name: str, **limits: int) -> bytes:
        if errors and path in name:
            raise errors.pop(0)
        data: bytes = cat_file(self, name, **limits)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail_first)


@pytest.mark.parametrize("rule", [{}, {"rule": "weighted", "weights": (0.5, 0.3, 0.2)}, {"rule": "stock"}])
def test_the_same_bytes_as_the_local_merge(
    store: Store, folders: dict[str, Path], tmp_path: Path, rule: dict[str, Any]
) -> None:
    def names(place: object) -> tuple[list[str], dict[str, Any]]:
        members = [f"{place}/{name}" for name in "abc"]
        return (members[:2], rule | {"base": members[2]}) if rule.get("rule") == "stock" else (members, rule)

    members, choices = names(tmp_path)
    local = merge(members, tmp_path / "local", max_shard_size="1MB", **choices)
    members, choices = names(store.url)
    assert merge(members, tmp_path / "streamed", max_shard_size="1MB", **choices) == local
    assert len(local) > 3


def test_a_checkpoint_is_the_one_that_was_put_there(store: Store, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        opened = open_checkpoint(f"{store.url}/{name}/")
        assert (opened.label, opened.folder.far) == (f"{store.url}/{name}", True)
        assert opened.folder.sizes() == {path.name: path.stat().st_size for path in folder.iterdir()}
        assert read_sample(opened).fingerprint == read_sample(open_checkpoint(folder)).fingerprint
        for path in folder.iterdir():
            assert read_bytes(opened.folder, path.name) == path.read_bytes()
            assert read_bytes(opened.folder, path.name, 5, 7) == path.read_bytes()[5:12]


def test_identities_differ_between_versions_and_places(store: Store, folders: dict[str, Path]) -> None:
    first = open_store(f"{store.url}/a").identity
    assert open_store(f"{store.url}/a/").identity == first
    assert open_store(f"{store.url}/b").identity != first
    time.sleep(1.1 if store.url.startswith("s3") else 0.01)  # S3 tells whole seconds
    store.put(folders["a"])
    assert open_store(f"{store.url}/a").identity != first, "the same bytes, but written meanwhile"


def test_reads_are_few_and_large(
    memory: Store, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def noted(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        asked.append((path, start, end))
        data: bytes = cat_file(self, path, start, end)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    merge([f"{memory.url}/{name}" for name in "abc"], tmp_path / "out")
    size = sum(path.stat().st_size for folder in folders.values() for path in folder.iterdir())
    # Beside the weights: the first 256 KiB of six files (headers), and the samples.
    assert size < sum(end - start for _, start, end in asked) < size + 6 * 262_144 + 1_500_000
    assert len(asked) < 60
    assert len([path for path, *_ in asked if path.endswith("config.json")]) == 3
    assert len(set(asked)) == len(asked), "nothing is asked for twice"


def replace_weights(store: Store, name: str, edit: Callable[[bytes], bytes]) -> None:
    path = f"{store.url}/{name}/model.safetensors"
    store.system.pipe_file(path, edit(store.system.cat_file(path)))


EDITS: dict[str, Callable[[Store], None]] = {
    "replaced": lambda store: replace_weights(store, "a", lambda data: data[:-8] + b"\0" * 8),
    "shortened": lambda store: replace_weights(store, "a", lambda data: data[: len(data) // 2]),
    "removed": lambda store: store.system.rm(f"{store.url}/a/model.safetensors"),
    "removed with its folder": lambda store: store.system.rm(f"{store.url}/a", recursive=True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_changes_meanwhile_is_refused(
    store: Store, folders: dict[str, Path], tmp_path: Path, waits: list[float], edit: str
) -> None:
    names = [f"{store.url}/{name}" for name in "abc"]
    with pytest.raises(RefusedError) as refused:
        warmerge.average(names, tmp_path / "out", stream=True, on_plan=lambda prepared: EDITS[edit](store))
    what = "changed while it was read (size, version or time), or was removed; merge it when it is still"
    assert str(refused.value) == f"refused: {names[0]}/model.safetensors: {what}"
    assert not (tmp_path / "out").exists()
    assert waits == [], "asking again would not help"


def test_a_small_file_that_changed_since_it_was_listed_is_refused(store: Store) -> None:
    folder, path = open_store(f"{store.url}/a"), f"{store.url}/a/config.json"
    data = store.system.cat_file(path)
    store.system.pipe_file(path, data.replace(b'"pad_token_id": 0', b'"pad_token_id": 1'))
    with pytest.raises(RefusedError, match=r"a/config\.json: changed while it was read"):
        read_bytes(folder, "config.json")


def test_a_damaged_file_is_refused(store: Store) -> None:
    replace_weights(store, "a", lambda data: data[:-100])
    with pytest.raises(RefusedError, match=rf"{store.url}/a/model\.safetensors: .*(truncated|bytes)"):
        open_checkpoint(f"{store.url}/a")


def test_folders_without_a_checkpoint(store: Store, folders: dict[str, Path]) -> None:
    root, _, rest = store.url.partition("://")
    for missing in (f"{store.url}/nosuch", f"{root}://nosuch-{rest}/a"):
        with pytest.raises(UsageError) as usage:
            open_checkpoint(missing)
        assert str(usage.value) == f"{missing}: there is no such bucket or folder; check the name"
    store.system.pipe_file(f"{store.url}/deep/down/model.safetensors", b"x")
    with pytest.raises(RefusedError, match=r"deep: holds no \.safetensors file"):
        open_checkpoint(f"{store.url}/deep")
    with pytest.raises(UsageError) as usage:
        open_checkpoint(f"{store.url}/a/model.safetensors")
    expected = f"{store.url}/a/model.safetensors is a single file; give the folder that it is in"
    assert str(usage.value) == expected


def test_what_must_be_loaded_must_be_copied_first(store: Store, folders: dict[str, Path]) -> None:
    here, there = open_checkpoint(folders["b"]), open_checkpoint(f"{store.url}/a")
    with pytest.raises(UsageError) as usage:
        make_local([here, there])
    what = "can be averaged and inspected where it is; copy it here first to load it"
    assert str(usage.value) == f"{store.url}/a {what} (aws s3 cp --recursive, gsutil cp -r)"
    left, found = make_local([here, there], leave_stores=True)
    assert isinstance(found.folder, StoreFolder)
    assert (found.tensors, found.folder, left.folder) == (there.tensors, there.folder, here.folder)


def test_a_local_folder_wins(memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "memory:" / "runs" / "a", large(7))
    assert not open_checkpoint("memory://runs/a").folder.far


def test_inspect_reads_headers_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect([f"{store.url}/{name}" for name in "abc"])
    assert [(row.checkpoint, row.files) for row in found.rows] == [(f"{store.url}/{n}", SHARDS[n]) for n in "abc"]
    assert found.findings == ()


def test_what_breaks_is_asked_for_again(
    memory: Store, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    local = merge([str(folder) for folder in folders.values()], tmp_path / "local")

    def planned(prepared: object) -> None:
        failing(monkeypatch, [ConnectionError("reset"), TimeoutError(), RuntimeError("busy")], "b/")

    names = [f"{memory.url}/{name}" for name in "abc"]
    assert merge(names, tmp_path / "streamed", on_plan=planned) == local
    assert len(waits) == 3


def test_a_store_that_stays_away_is_given_up(
    memory: Store, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    folder = open_store(f"{memory.url}/a")
    said = "Could not connect to http://me:pw@host/key?X-Amz-Signature=secret\nand more"
    failing(monkeypatch, [ConnectionError(said)] * 99)
    with pytest.raises(RemoteError) as remote:
        folder.reader(lambda seconds: waits.append(seconds)).readinto("config.json", 0, memoryview(bytearray(9)))
    then = "check the network, the endpoint and the region"
    assert str(remote.value) == f"memory://runs/a cannot be read: Could not connect to http://host/key; {then}"
    assert waits == [0.5, 1, 2, 4, 8, 16, 32]
    with pytest.raises(RemoteError):
        folder.reader(lambda seconds: waits.append(seconds) or True).readinto(
            "config.json", 0, memoryview(bytearray(9))
        )
    assert waits[7:] == [0.5], "told to give up, it does not try again"


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied."), r"cannot be read: Access Denied; your credentials must allow to list and"),
        (
            OSError("Forbidden: u/rm\nme@x has no access"),
            r"cannot be read: Forbidden: u/rm; your credentials must allow",
        ),
        (
            ValueError("Must provide credentials!!"),
            r"cannot be read without credentials \(Must provide credentials\); log",
        ),
        (
            NoCredentialsError("Unable"),
            r"cannot be read without credentials \(Unable\); log in as the store's own tool",
        ),
    ],
)
def test_who_may_not_read_is_told_so_at_once(
    memory: Store, monkeypatch: pytest.MonkeyPatch, waits: list[float], error: Exception, said: str
) -> None:
    folder = open_store(f"{memory.url}/a")
    failing(monkeypatch, [error])
    with pytest.raises(RemoteError, match=f"^memory://runs/a {said}"):
        read_bytes(folder, "config.json")
    assert waits == []
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail: (_ for _ in ()).throw(error))
    with pytest.raises(RemoteError, match=f"^memory://runs/a {said}"):
        open_store(f"{memory.url}/a")


def test_bytes_that_were_not_asked_for_are_not_taken(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_store(f"{memory.url}/a")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, start, end: b"x" * (end - start + 1))
    with pytest.raises(RemoteError, match=r"a/config\.json: (\d+) bytes were asked for, the store sent \d+; copy the"):
        read_bytes(folder, "config.json")


@pytest.mark.parametrize("size", [None, -1, 2.5], ids=str)
def test_a_store_that_tells_no_size_is_not_trusted(size: Any, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ls = MemoryFileSystem.ls

    def listed(self: MemoryFileSystem, *asked: Any, **how: Any) -> list[dict[str, Any]]:
        entries = ls(self, *asked, **how)
        return [entry | ({"size": size} if entry["name"].endswith("config.json") else {}) for entry in entries]

    monkeypatch.setattr(MemoryFileSystem, "ls", listed)
    with pytest.raises(RemoteError, match=rf"^memory://runs/a/config\.json: memory:// tells {size} as its size, ex"):
        open_store(f"{memory.url}/a")


def test_a_store_that_does_not_tell_versions_is_not_trusted(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [{"name": "/runs/a/config.json", "size": 3, "type": "file"}]
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, detail: listed)
    with pytest.raises(RemoteError, match=r"runs/a: memory:// does not tell when config\.json was changed; copy the"):
        open_store("memory://runs/a")


ADDRESSES = {
    "file:///data/rm": r"file:///data/rm is on this machine; give its path without file://$",
    "s3://key:secret@bucket/rm": r"s3://bucket/rm: leave the password, .* out of the address",
    "az://rm/a?sig=secret": r"az://rm/a: leave the password, or what follows the '\?', out of the address",
    "nosuch://bucket/rm": r"nosuch://bucket/rm cannot be read: Protocol not known: nosuch;",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_cannot_be_used(address: str) -> None:
    assert is_store(address)
    with pytest.raises((UsageError, RemoteError), match=ADDRESSES[address]) as refused:
        open_checkpoint(address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("scheme", "package", "install"),
    [("s3", "s3fs", "'warmerge[s3]'"), ("gs", "gcsfs", "'warmerge[gs]'"), ("abfs", "adlfs", "adlfs")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, install: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UsageError) as usage:
        open_checkpoint(f"{scheme}://bucket/rm")
    assert str(usage.value) == f"{scheme}://bucket/rm: {scheme}:// needs {package}: pip install {install}"


def test_an_s3_server_that_is_not_there_is_said_soon(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.system.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r'^s3://bucket/rm cannot be read: Could not connect to .*:9/bucket"; check'):
        open_store("s3://bucket/rm")
    assert time.monotonic() - begun < 10


def test_s3_without_credentials(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3.system.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RemoteError, match=r"^s3://bucket/rm cannot be read without credentials \(Unable to locate"):
        open_store("s3://bucket/rm")
