"""Models on a Hub, here one on 127.0.0.1: what is asked of it, and what is said when it does not answer well."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import loopback_hub
import pytest
from loopback_hub import Fault, LoopbackHub, not_found

from warmerge.errors import RefusedError, RemoteError, UsageError
from warmerge.weights import locate
from warmerge.weights.checkpoint import read_checkpoint
from warmerge.weights.folder import LocalFolder, open_folder, read_bytes
from warmerge.weights.remote import reading
from warmerge.weights.remote.pushing import look
from warmerge.weights.safetensors_format import build_header

CONFIG = json.dumps({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "pad_token_id": 0}).encode()
SECRET = "hf_thisIsASecret"


@functools.cache
def weights(seed: int, rows: int = 150_000, tensors: int = 1) -> bytes:
    """A safetensors file of 4 bytes a row and a head."""
    table = {f"model.layer{i}.weight": ("F32", (rows,)) for i in range(tensors)} | {"score.weight": ("F32", (1, 4))}
    header, _ = build_header(table)
    size = 4 * rows * tensors + 16
    return header + (bytes(range(seed, seed + 200)) * (size // 200 + 1))[:size]


def model(seed: int = 0) -> dict[str, bytes]:
    return {
        "config.json": CONFIG, "tokenizer_config.json": b"{}", "tokenizer.json": b'{"model": {}}',
        "model.safetensors": weights(seed), "README.md": b"# a model", "onnx/model.onnx": b"junk",
    }  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub({"me/a": model(0), "me/b": model(7)}) as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gpt2", ("gpt2", None)),
        ("me/a", ("me/a", None)),
        ("me/a@v1.0", ("me/a", "v1.0")),
        ("me/a@refs/pr/3", ("me/a", "refs/pr/3")),
        ("hf://me/a", ("me/a", None)),
        ("hf://me/a@main", ("me/a", "main")),
    ],
)
def test_ids_with_and_without_a_revision(spec: str, expected: tuple[str, str | None]) -> None:
    assert reading.parse_hub_id(spec) == expected


@pytest.mark.parametrize("spec", ["", "./runs/1", "runs/1/last", "~/x", "a b", "me/a--b", "hf://models/a", "hf://"])
def test_what_cannot_be_an_id_is_a_missing_folder(spec: str) -> None:
    with pytest.raises(UsageError, match=r"no local folder .* not a Hub id") as error:
        reading.open_hub(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "/main", "main/", "a..b", "a\x1b[31m", "a:b"])
def test_what_cannot_be_a_revision_is_refused(revision: str) -> None:
    with pytest.raises(UsageError, match=r"must be a branch, a tag or a commit of me/a") as error:
        reading.parse_hub_id(f"me/a@{revision}")
    assert "\x1b" not in str(error.value)


def test_opening_takes_one_request_and_records_the_commit(hub: LoopbackHub) -> None:
    folder = reading.open_hub("me/a")
    assert len(hub.requests) == 1
    assert folder.label == "me/a"
    assert folder.identity == f"hf://me/a@{hub.commits['me/a']}"
    assert reading.revision_of(folder) == {"repo": "me/a", "revision": hub.commits["me/a"]}
    assert folder.sizes() == {name: len(data) for name, data in model(0).items() if "/" not in name}


def test_everything_is_read_at_the_commit_even_when_the_branch_moves(hub: LoopbackHub) -> None:
    folder = reading.open_hub("hf://me/a@main")
    commit = hub.commits["me/a"]
    read_checkpoint(folder)
    assert all(f"/resolve/{commit}/" in request.path for request in hub.requests[1:])
    hub.put("me/a", model(9))
    hub.forget("me/a")
    lost = rf"hf://me/a@main changed while it was read: its commit {commit[:12]} is no longer there; run"
    with pytest.raises(RemoteError, match=lost):
        read_bytes(folder, "model.safetensors", 500_000, 8)


def test_headers_are_read_without_the_weights(hub: LoopbackHub) -> None:
    for name in ("me/a", "me/b"):
        checkpoint = read_checkpoint(reading.open_hub(name))
        assert checkpoint.tensors["score.weight"].shape == (1, 4)
        assert checkpoint.config == json.loads(CONFIG)
    asked = hub.asked(path="model.safetensors")
    assert [request.range for request in asked] == ["bytes=0-262143"] * 2
    assert hub.sent < 2 * 270_000  # of 600,000


def test_a_header_larger_than_the_window_takes_one_more_request(hub: LoopbackHub) -> None:
    data = weights(3, rows=2, tensors=4000)
    hub.put("me/a", {"config.json": CONFIG, "model.safetensors": data})
    header = 8 + int.from_bytes(data[:8], "little")
    assert header > 262144
    checkpoint = read_checkpoint(reading.open_hub("me/a"))
    assert len(checkpoint.tensors) == 4001
    assert [r.range for r in hub.asked(path="model.safetensors")] == ["bytes=0-262143", f"bytes=262144-{header - 1}"]


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 8), (0, 262144), (0, 262145), (262143, 1), (262143, 2), (262144, 1), (400_000, 200_000), (7, 0), (262144, 0)],
)
def test_any_range_gives_exactly_those_bytes(hub: LoopbackHub, offset: int, length: int) -> None:
    data = model(0)["model.safetensors"]
    assert read_bytes(reading.open_hub("me/a"), "model.safetensors", offset, length) == data[offset : offset + length]


def test_past_the_end_is_refused(hub: LoopbackHub) -> None:
    folder = reading.open_hub("me/a")
    for file in ("model.safetensors", "config.json"):
        with pytest.raises(RefusedError, match=r"it is damaged"):
            read_bytes(folder, file, folder.sizes()[file] - 1, 2)


def test_small_files_come_from_the_cache_the_second_time(hub: LoopbackHub) -> None:
    for _ in range(2):
        folder = reading.open_hub("me/a")
        assert read_bytes(folder, "tokenizer.json") == model()["tokenizer.json"]
        assert read_bytes(folder, "tokenizer.json", 2, 5) == b"model"
    assert len(hub.asked(path="tokenizer.json")) == 1


def test_an_empty_file_is_empty(hub: LoopbackHub) -> None:
    hub.put("me/a", {"config.json": b"", "model.safetensors": b""})
    folder = reading.open_hub("me/a")
    assert read_bytes(folder, "model.safetensors") == read_bytes(folder, "config.json") == b""
    with pytest.raises(RefusedError, match="is empty"):
        read_checkpoint(folder)


def test_from_ids_to_local_checkpoints(hub: LoopbackHub) -> None:
    junk = {"pytorch_model.bin": b"pickle", "training_args.bin": b"x", "consolidated.safetensors": b"z"}
    for name, seed in (("me/a", 0), ("me/b", 7)):
        hub.put(name, model(seed) | junk)
    checkpoints = [locate.open_checkpoint("me/a"), locate.open_checkpoint("hf://me/b@main")]
    assert checkpoints[0].identity != checkpoints[1].identity
    assert hub.sent < 2 * 270_000
    local = locate.make_local(checkpoints)
    files = {request.path.rsplit("/", 1)[1] for request in hub.asked(path="/resolve/")}
    assert files == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    for before, after, seed in zip(checkpoints, local, (0, 7), strict=True):
        assert isinstance(after.folder, LocalFolder)
        assert after.label == before.label == after.folder.label
        assert reading.revision_of(after.folder) == reading.revision_of(before.folder)
        assert read_bytes(after.folder, "model.safetensors") == model(seed)["model.safetensors"]
        assert after.tensors["score.weight"].folder == after.folder

    hub.requests.clear()
    assert [c.identity for c in locate.make_local([locate.open_checkpoint("me/a")])] == [local[0].identity]
    assert [request.range for request in hub.asked(path="/resolve/")] == ["bytes=0-262143"]


def test_only_the_files_asked_for_are_downloaded_and_only_once(hub: LoopbackHub) -> None:
    name = "model-[1]*.safetensors"
    hub.put("me/a", {"config.json": CONFIG, name: b"1234", "model-1x.safetensors": b"junk", "model.bin": b"junk"})
    folder = reading.open_hub("me/a")
    local = reading.download(folder, ["config.json", name])
    assert isinstance(local, LocalFolder)
    assert local.label == "me/a"
    assert local.sizes() == {"config.json": len(CONFIG), name: 4}
    assert read_bytes(local, name) == b"1234"
    hub.requests.clear()
    assert reading.download(folder, ["config.json", name]) == local
    assert hub.asked(path="/resolve/") == hub.asked("HEAD") == []


def test_a_local_folder_stays_as_it_is(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "x")
    assert reading.download(folder, ["config.json"]) is folder
    assert reading.revision_of(folder) == {}


NO_MODEL = "no local folder 'me/a' and no such model on the Hub; check the name, or if it is private, "
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
DISABLED = {"X-Error-Message": "Access to this resource is disabled."}
ERRORS = [
    (not_found("RepoNotFound", 401), None, NO_MODEL + "log in with `hf auth login`, or set HF_TOKEN"),
    (not_found("RepoNotFound", 404), SECRET, NO_MODEL + "check that your token may read it"),
    (
        not_found("GatedRepo", 401),
        None,
        "me/a is gated: accept its licence at HUB/me/a and log in with `hf auth login`",
    ),
    (
        not_found("GatedRepo", 403),
        SECRET,
        "me/a is gated: accept its licence at HUB/me/a with the account of your token",
    ),
    (
        not_found("RevisionNotFound"),
        None,
        "me/a has no revision 'main'; HUB/me/a/tree/main lists its branches and tags",
    ),
    (Fault(status=401, headers=BAD_TOKEN), SECRET, "the Hub does not accept your token; log in with `hf auth login`"),
    (Fault(status=403, headers=DISABLED), None, "me/a has been disabled on the Hub; HUB/me/a may say why"),
    (Fault(status=403), SECRET, "your token may not; give it read access to me/a at HUB/settings/tokens"),
    (Fault(status=429), None, "too many requests; try again later, and log in"),
    (Fault(status=429, headers={"Retry-After": "600"}), SECRET, "too many requests; try again in 600 s"),
    (Fault(status=503), None, "the Hub answered with status 503; try again later"),
    (Fault(status=404), None, "HUB does not answer as the Hub does (status 404); check HF_ENDPOINT and the proxy"),
    (Fault(status=418), None, "the Hub answered with status 418; try again later"),
    (Fault("hangup"), None, "HUB cannot be reached (RemoteProtocolError); check the name and the network, or add"),
]


@pytest.mark.parametrize("step", ["open", "model.safetensors", "config.json", "download"])
@pytest.mark.parametrize(("fault", "token", "text"), ERRORS)
def test_what_is_said_when_it_goes_wrong(
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    waits: list[float],
    step: str,
    fault: Fault,
    token: str | None,
    text: str,
) -> None:
    hub.use(monkeypatch, tmp_path / "cache", token)
    folder = reading.open_hub("me/a")
    hub.faults.append(replace(fault, times=99))
    steps: dict[str, Callable[[], object]] = {
        "open": lambda: reading.open_hub("me/a"),
        "download": lambda: reading.download(folder, ["model.safetensors"]),
    }
    with pytest.raises(UsageError if "no such model" in text else RemoteError) as error:
        steps.get(step, lambda: read_bytes(folder, step))()
    if step != "open":  # then it is known that the name and the revision are right
        text = text.replace("check the name and the network, or add", "check the network and run the command again")
        if "has no revision" in text:
            text = f"me/a changed while it was read: its commit {folder.revision[:12]} is no longer there; run"
    assert text.replace("HUB", hub.url) in str(error.value)
    assert "\n" not in str(error.value)
    assert SECRET not in "".join(traceback.format_exception(error.value))
    assert {request.authorization for request in hub.requests} == {f"Bearer {token}" if token else None}


def test_a_dead_address_is_said_quickly(hub: LoopbackHub, waits: list[float]) -> None:
    folder = reading.open_hub("me/a")
    hub.__exit__(None, None, None)
    with pytest.raises(RemoteError, match=r"me/a is no local folder, and http.* cannot be reached .ConnectError."):
        reading.open_hub("me/a")
    with pytest.raises(RemoteError, match=r"me/a cannot be read on: http.* cannot be reached .ConnectError."):
        read_bytes(folder, "model.safetensors", 0, 8)
    assert sum(waits) < 10
    with pytest.raises(RemoteError, match=r"cannot be reached .ConnectError."):
        read_bytes(folder, "config.json")


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([Fault(status=503), Fault(status=502)], [0.5, 1.0]),
        ([Fault(status=429, headers={"Retry-After": "7"})], [7.0]),
        ([Fault(status=429, headers={"RateLimit": '"api";r=0;t=12'}), Fault(status=500)], [12.0, 1.0]),
        ([Fault(status=429, headers={"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"})], [0.5]),
        ([Fault("hangup"), Fault("hangup"), Fault("hangup")], [0.5, 1.0, 2.0]),
        ([Fault("hangup"), Fault("short"), Fault("long")], [0.5, 0.5, 1.0]),  # the second got further
    ],
)
def test_a_busy_hub_is_asked_again(
    hub: LoopbackHub, waits: list[float], faults: list[Fault], expected: list[float]
) -> None:
    folder = reading.open_hub("me/a")
    hub.faults += faults
    start = 400_000
    assert read_bytes(folder, "model.safetensors", start, 5000) == model()["model.safetensors"][start : start + 5000]
    assert waits == expected


def test_a_busy_hub_is_not_asked_for_ever(hub: LoopbackHub, waits: list[float]) -> None:
    folder = reading.open_hub("me/a")
    hub.requests.clear()
    hub.faults.append(Fault("hangup", times=99))
    with pytest.raises(RemoteError, match=r"cannot be reached"):
        read_bytes(folder, "model.safetensors", 0, 8)
    assert len(hub.requests) == 4
    assert waits == [0.5, 1.0, 2.0]


def test_opening_is_tried_again_too(hub: LoopbackHub, waits: list[float]) -> None:
    hub.faults.append(Fault(status=500))
    assert reading.open_hub("me/a").label == "me/a"
    assert waits == [0.5]


def test_a_server_that_ignores_ranges_is_refused_before_it_has_sent_the_file(hub: LoopbackHub) -> None:
    hub.put("me/a", {"model.safetensors": weights(0, rows=8_000_000)})
    folder = reading.open_hub("me/a")
    hub.sent = 0
    hub.faults.append(Fault("whole", path="/resolve/"))
    with pytest.raises(RemoteError, match=r"sent the whole file .status 200.; run `hf download me/a --revision"):
        read_bytes(folder, "model.safetensors", 0, 8)
    assert len(hub.asked(path="/resolve/")) == 1
    assert hub.sent < 16_000_000


def test_a_whole_file_is_taken_when_the_whole_file_was_asked_for(hub: LoopbackHub) -> None:
    data = weights(0, rows=10)
    hub.put("me/a", {"model.safetensors": data})
    hub.faults.append(Fault("whole", path="/resolve/"))
    assert read_bytes(reading.open_hub("me/a"), "model.safetensors") == data


@pytest.mark.parametrize(("kind", "sent"), [("shifted", "bytes 1-262144/"), ("html", "the whole file .status 200.")])
def test_other_bytes_than_asked_for_are_not_taken(hub: LoopbackHub, kind: str, sent: str) -> None:
    folder = reading.open_hub("me/a")
    hub.faults.append(Fault(kind))
    with pytest.raises(RemoteError, match=rf"bytes 0-262143/.* were asked for, the server sent {sent}"):
        read_bytes(folder, "model.safetensors", 0, 8)


def test_a_page_of_some_proxy_is_not_taken_for_a_file(hub: LoopbackHub) -> None:
    folder = reading.open_hub("me/a")
    hub.faults.append(Fault("html", times=99))
    for action in (
        lambda: reading.open_hub("me/a"),
        lambda: read_bytes(folder, "config.json"),
        lambda: reading.download(folder, ["config.json"]),
    ):
        with pytest.raises(RemoteError, match=r"does not answer as the Hub does .*; check HF_ENDPOINT and the proxy"):
            action()


def test_a_file_that_has_vanished(hub: LoopbackHub) -> None:
    folder = reading.open_hub("me/a")
    for file in ("model.safetensors", "config.json"):
        del hub.repos["me/a"][file]
        with pytest.raises(RemoteError, match=r"lists a file that the Hub does not have"):
            read_bytes(folder, file)


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.use(monkeypatch, tmp_path / "cache", SECRET)
    hub.tokens = {SECRET}
    with LoopbackHub({"me/a": model(0)}) as storage:
        hub.redirect_to = storage.url
        folder = reading.open_hub("me/a")
        assert read_bytes(folder, "model.safetensors") == model()["model.safetensors"]
        assert {request.authorization for request in hub.requests} == {f"Bearer {SECRET}"}
        assert {request.authorization for request in storage.requests} == {None}
        assert storage.requests


def test_a_token_that_is_not_accepted(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.use(monkeypatch, tmp_path / "cache", SECRET)
    hub.tokens = {"another"}
    with pytest.raises(RemoteError, match=r"the Hub does not accept your token") as error:
        reading.open_hub("me/a")
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_offline_the_cache_serves(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = reading.open_hub("me/a")
    reading.download(folder, ["config.json", "model.safetensors"])
    read_checkpoint(reading.open_hub("me/b"))  # its header has been looked at, its weights are not here
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for label in ("me/a", "me/a@main", f"hf://me/a@{hub.commits['me/a']}"):
        cached = reading.open_hub(label)
        assert isinstance(cached, LocalFolder)
        assert cached.label == label
        assert reading.revision_of(cached) == reading.revision_of(folder)
        assert read_checkpoint(cached).tensors["score.weight"].shape == (1, 4)
    with pytest.raises(RemoteError, match=r"is in the Hub's cache without its weights; without --offline and HF_"):
        reading.open_hub(f"me/b@{hub.commits['me/b']}")
    for label in ("me/b", "me/c", "me/a@v2"):
        with pytest.raises(RemoteError, match=rf"{label} is no local folder, and not in the Hub's cache; without"):
            reading.open_hub(label)
    assert hub.requests == []


def test_half_a_download_is_not_taken_for_a_whole_one(hub: LoopbackHub, waits: list[float]) -> None:
    folder = reading.open_hub("me/a")
    read_bytes(folder, "config.json")  # now there is a snapshot folder, with one file
    hub.faults.append(Fault(status=503, path="/tree/", times=99))
    with pytest.raises(RemoteError, match=r"'model.safetensors' could not be had; check the network|status 503"):
        reading.download(folder, ["config.json", "model.safetensors"])


def test_a_damaged_cache_is_noticed(hub: LoopbackHub) -> None:
    folder = reading.open_hub("me/a")
    local = reading.download(folder, ["config.json", "model.safetensors"])
    assert isinstance(local, LocalFolder)
    for file in ("config.json", "model.safetensors"):
        with (local.path / file).resolve().open("ab") as blob:
            blob.write(b"more")
    with pytest.raises(RemoteError, match=r"is not of the size that the Hub announces; run `hf cache rm model/me/a`"):
        reading.download(folder, ["model.safetensors"])
    with pytest.raises(RemoteError, match=r"'config.json' in the Hub's cache"):
        read_bytes(folder, "config.json")


def test_a_cache_that_cannot_be_written(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device", "/some/where")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        RemoteError, match=r"me/a cannot be put in the Hub's cache .No space left on device.; make room"
    ):
        reading.download(reading.open_hub("me/a"), ["model.safetensors"])


def test_a_hub_that_tells_no_sizes(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commits["me/a"] = "main"
    with pytest.raises(RemoteError, match=r"me/a: http\S+ does not tell the commit, the files' names and their sizes "):
        reading.open_hub("me/a")


@pytest.mark.parametrize(
    "told",
    [{"sha": 5}, {"siblings": 5}, {"siblings": [{"rfilename": 5, "size": 1}]},
     *({"siblings": [{"rfilename": "config.json", "size": size}]} for size in (-5, "5", 2.5, None))],
    ids=str,
)  # fmt: skip
def test_a_hub_that_tells_nonsense(told: dict[str, Any], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = loopback_hub._Handler._api
    monkeypatch.setattr(loopback_hub._Handler, "_api", lambda *asked: api(*asked) | told)
    with pytest.raises(RemoteError, match=r"^me/a.* as the Hub does.*; check HF_ENDPOINT and the proxy$"):
        reading.open_hub("me/a")


def test_a_chat_template_in_a_folder_of_its_own_is_refused(hub: LoopbackHub) -> None:
    """transformers would download and apply it."""
    hub.put("me/a", {"config.json": CONFIG, "additional_chat_templates/default.jinja": b"{{ one }}"})
    with pytest.raises(RefusedError, match=r"me/a/additional_chat_templates/default\.jinja: takes the place of"):
        reading.open_hub("me/a")


@pytest.mark.parametrize("told", [{"sha": 5}, {"siblings": 5}, {"siblings": [{"rfilename": 5}]}], ids=str)
def test_a_hub_that_tells_nonsense_is_not_written_to(
    told: dict[str, Any], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = loopback_hub._Handler._api
    monkeypatch.setattr(loopback_hub._Handler, "_api", lambda *asked: api(*asked) | told)
    with pytest.raises(RemoteError, match=r"^me/a.* as the Hub does.*; check HF_ENDPOINT and the proxy$"):
        look("me/a", None, None)


def test_the_address_comes_from_the_environment_and_importing_costs_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    code = (
        "import sys; from warmerge.weights.remote import reading; assert 'huggingface_hub' not in sys.modules; "
        "folder = reading.open_hub('me/a'); print(reading.download(folder, ['config.json']).sizes())"
    )
    environment = os.environ | hub.environment(tmp_path / "other")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == (f"{{'config.json': {len(CONFIG)}}}\n", 0), result.stderr
