"""Opening a checkpoint: every layout is understood, and every folder that is not one whole model is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_tensors, write_checkpoint
from safetensors.torch import save_file

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.weights.checkpoint import INDEX, Checkpoint
from warmerge.weights.folder import read_bytes
from warmerge.weights.kernels import load
from warmerge.weights.locate import open_checkpoint

Writer = Callable[..., Path]
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


def findings(spec: Path) -> tuple[Finding, ...]:
    with pytest.raises(RefusedError) as refusal:
        open_checkpoint(spec)
    return refusal.value.findings


def only_finding(spec: Path) -> Finding:
    (found,) = findings(spec)
    return found


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        (part,) = checkpoint.tensors[name].parts
        assert torch.equal(load(part), expected), name


# --- layouts --------------------------------------------------------------------------------------------------------


def test_a_single_file(rm: Writer) -> None:
    folder = rm("a", seed=1)
    found = open_checkpoint(folder)
    assert_holds(found, llama_tensors(1))
    assert found.label == str(folder)
    assert found.config is not None
    assert found.config["model_type"] == "llama"
    assert [file for _, file in found.weight_files] == ["model.safetensors"]
    assert found.parameters == sum(t.numel() for t in llama_tensors(1).values())
    assert found.nbytes == 4 * found.parameters


def test_shards_with_an_index(rm: Writer) -> None:
    found = open_checkpoint(rm("a", seed=1, shards=3))
    assert_holds(found, llama_tensors(1))
    assert [file for _, file in found.weight_files] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_an_index_over_a_single_file(rm: Writer) -> None:
    folder = rm("a", seed=1)
    index = {"metadata": {}, "weight_map": dict.fromkeys(llama_tensors(1), "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert_holds(open_checkpoint(folder), llama_tensors(1))


def test_numbered_shards_without_an_index(rm: Writer) -> None:
    folder = rm("a", seed=1, shards=3)
    (folder / INDEX).unlink()
    assert_holds(open_checkpoint(folder), llama_tensors(1))


def test_files_of_other_names_without_an_index(rm: Writer) -> None:
    folder, tensors = rm("a", seed=1), llama_tensors(1)
    (folder / "model.safetensors").unlink()
    head = {"score.weight": tensors.pop("score.weight")}
    save_file(tensors, folder / "weights.safetensors")
    save_file(head, folder / "head.safetensors")
    assert_holds(open_checkpoint(folder), llama_tensors(1))


def test_a_single_file_given_by_name_leaves_the_others_alone(rm: Writer) -> None:
    folder = rm("a", seed=1)
    save_file(llama_tensors(2), folder / "step-200.safetensors")
    found = open_checkpoint(folder / "step-200.safetensors")
    assert_holds(found, llama_tensors(2))
    assert found.label == str(folder / "step-200.safetensors")
    assert found.config is not None


def test_a_file_of_another_name_alone_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(llama_tensors(1), tmp_path / "a" / "reward.safetensors")
    found = open_checkpoint(tmp_path / "a")
    assert_holds(found, llama_tensors(1))
    assert found.config is None


def test_a_one_of_one_shard_given_by_name_is_a_whole_model(rm: Writer) -> None:
    folder = rm("a", seed=1)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert_holds(open_checkpoint(folder / "model-00001-of-00001.safetensors"), llama_tensors(1))


def test_the_authors_second_copy_is_left_aside(rm: Writer) -> None:
    for folder in (rm("single", seed=1), rm("sharded", seed=1, shards=2)):
        save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
        assert_holds(open_checkpoint(folder), llama_tensors(1))


def test_sub_folders_pickles_and_other_files_beside_the_weights_do_no_harm(rm: Writer) -> None:
    folder = rm("a", seed=1)
    write_checkpoint(folder / "checkpoint-100", llama_tensors(2))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert_holds(open_checkpoint(folder), llama_tensors(1))


# --- no checkpoint at all -------------------------------------------------------------------------------------------


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert only_finding(tmp_path) == Finding(str(tmp_path), "holds no .safetensors file")


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs/nowhere"):
        open_checkpoint(tmp_path / "runs/nowhere")


def test_another_kind_of_file_is_a_usage_error(rm: Writer) -> None:
    with pytest.raises(UsageError, match=r"config\.json is a file, but not a \.safetensors file; give a folder"):
        open_checkpoint(rm("a") / "config.json")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert only_finding(tmp_path) == Finding(str(tmp_path), "holds no tensors")


PICKLES = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_only_is_refused_and_the_message_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    found = only_finding(tmp_path)
    assert found.what.startswith(f"holds pickle weights only ('{name}'), which can run code when loaded; convert them")
    assert "AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(new)" in found.what


# --- indexes that do not fit their shards ---------------------------------------------------------------------------


def test_an_index_that_names_a_missing_file_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    (folder / TWO).unlink()
    assert only_finding(folder) == Finding(f"{folder}/{INDEX}", f"names '{TWO}', which is missing; download it again")


def test_every_missing_file_is_named_at_once(rm: Writer) -> None:
    folder = rm("a", shards=3)
    for number in (1, 3):
        (folder / f"model-{number:05d}-of-00003.safetensors").unlink()
    assert [finding.what for finding in findings(folder)] == [
        f"names 'model-{number:05d}-of-00003.safetensors', which is missing; download it again" for number in (1, 3)
    ]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_shards_is_refused(rm: Writer, indexed: bool) -> None:
    folder = rm("a", shards=2)
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(name for name, file in table.items() if file == ONE)
    second = {n: t for n, t in llama_tensors(0).items() if table[n] == TWO} | {name: llama_tensors(0)[name]}
    save_file(second, folder / TWO)
    if not indexed:
        (folder / INDEX).unlink()
    found = findings(folder)
    assert found[0] == Finding(f"{folder}/{TWO}", f"holds tensor {name!r}, which '{ONE}' holds too")


def test_a_tensor_of_the_index_that_is_in_no_shard_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"score.bias": TWO}))
    assert only_finding(folder) == Finding(
        f"{folder}/{INDEX}", f"is promised in '{TWO}' but lies in no shard", "score.bias"
    )


def test_a_tensor_of_a_shard_that_is_not_in_the_index_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    file = json.loads((folder / INDEX).read_text())["weight_map"]["score.weight"]
    edit_index(folder, lambda index: index["weight_map"].pop("score.weight"))
    assert only_finding(folder) == Finding(f"{folder}/{INDEX}", f"lies in '{file}' but is not listed", "score.weight")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    real = table["score.weight"]
    wrong = ONE if real == TWO else TWO
    edit_index(folder, lambda index: index["weight_map"].update({"score.weight": wrong}))
    assert only_finding(folder) == Finding(
        f"{folder}/{INDEX}", f"is promised in '{wrong}', found in '{real}'", "score.weight"
    )


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "..\\outside.safetensors",
        "",
        "..",
        "model.bin",
    ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(rm: Writer, tmp_path: Path, path: str) -> None:
    folder = rm("a", shards=2)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "model.safetensors"):
        place.parent.mkdir(exist_ok=True)
        save_file({"score.weight": torch.ones(1, 16)}, place)
    edit_index(folder, lambda index: index["weight_map"].update({"score.weight": path}))
    found = only_finding(folder)
    assert found.where == f"{folder}/{INDEX}"
    assert found.what == f"names {path!r}, which is not a plain .safetensors file name of its own folder"


def test_an_index_with_an_absolute_path_is_refused(rm: Writer, tmp_path: Path) -> None:
    folder, target = rm("a", shards=2), rm("b") / "model.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"score.weight": str(target)}))
    what = f"names {str(target)!r}, which is not a plain .safetensors file name of its own folder"
    assert only_finding(folder) == Finding(f"{folder}/{INDEX}", what)


def test_an_index_beside_a_single_file_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    save_file(llama_tensors(9), folder / "model.safetensors")
    assert only_finding(folder) == Finding(
        f"{folder}/{INDEX}",
        "stands beside model.safetensors: two checkpoints in one folder, one of them stale; delete one",
    )


def test_a_stale_shard_beside_an_index_is_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    save_file({"score.weight": torch.ones(1, 16)}, folder / "model-00003-of-00003.safetensors")
    assert only_finding(folder) == Finding(
        str(folder),
        "holds weights that would be left out: 'model-00003-of-00003.safetensors' "
        f"({INDEX} does not name them); move them away, or merge them in",
    )


def test_a_head_kept_apart_from_a_single_file_is_refused(rm: Writer) -> None:
    folder = rm("a")
    save_file({"v_head.summary.weight": torch.ones(1, 16)}, folder / "value_head.safetensors")
    assert only_finding(folder) == Finding(
        str(folder),
        "holds weights that would be left out: 'value_head.safetensors' "
        "(transformers would load model.safetensors alone); move them away, or merge them in",
    )


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a":' * 100_000, "\udcff"])
def test_a_damaged_index_is_refused(rm: Writer, text: str) -> None:
    folder = rm("a", shards=2)
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert only_finding(folder) == Finding(f"{folder}/{INDEX}", "is not a JSON object; it is damaged")


@pytest.mark.parametrize("text", ["{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":1}}'])
def test_an_index_without_a_table_is_refused(rm: Writer, text: str) -> None:
    folder = rm("a", shards=2)
    (folder / INDEX).write_text(text)
    assert only_finding(folder) == Finding(
        f"{folder}/{INDEX}", "has no weight_map of tensor names to file names; it is damaged"
    )


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_a_file_that_says_null_is_damaged_not_absent(rm: Writer, file: str) -> None:
    folder = rm("a", shards=2)
    (folder / file).write_text("null")
    found = only_finding(folder)
    assert found.where == f"{folder}/{file}"
    assert "damaged" in found.what


# --- shards without an index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_shard_number_is_refused(rm: Writer, missing: int) -> None:
    folder = rm("a", shards=3)
    (folder / INDEX).unlink()
    (folder / f"model-{missing:05d}-of-00003.safetensors").unlink()
    numbers = [number for number in (1, 2, 3) if number != missing]
    assert only_finding(folder) == Finding(
        str(folder), f"has shards {numbers} of [3] and no index; some are missing or from another model"
    )


def test_shards_of_two_models_are_refused(rm: Writer) -> None:
    folder = rm("a", shards=2)
    (folder / INDEX).unlink()
    save_file({"x": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")
    assert only_finding(folder).what == (
        "has shards [1, 2, 3] of [2, 3] and no index; some are missing or from another model"
    )


def test_a_lone_shard_given_by_name_is_refused(rm: Writer) -> None:
    found = only_finding(rm("a", shards=2) / ONE)
    assert found.what == "is shard 1 of 2; give its folder, so that the whole model is merged"


def test_every_damaged_shard_is_named_at_once(rm: Writer) -> None:
    folder = rm("a", shards=3)
    files = sorted(folder.glob("*.safetensors"))
    files[0].write_bytes(b"")
    os.truncate(files[2], files[2].stat().st_size - 1)
    first, last = findings(folder)
    assert (first.where, first.what) == (f"{folder}/{files[0].name}", "is empty (0 bytes); download it again")
    assert last.where == f"{folder}/{files[2].name}"
    assert last.what.startswith("is truncated: expected ")


# --- small files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not a JSON object; it is damaged"),
        ("", "is not a JSON object; it is damaged"),
        ("[1]", "is not a JSON object; it is damaged"),
        ('"x"', "is not a JSON object; it is damaged"),
    ],
)
def test_a_damaged_config_is_refused(rm: Writer, text: str, what: str) -> None:
    folder = rm("a")
    (folder / "config.json").write_text(text)
    assert only_finding(folder) == Finding(f"{folder}/config.json", what)


def test_an_adapter_and_full_weights_in_one_folder_are_refused(rm: Writer) -> None:
    folder = rm("a")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert only_finding(folder) == Finding(
        str(folder),
        "holds both an adapter and full weights ('model.safetensors'); give one of them, in a folder of its own",
    )


def test_adapter_weights_without_their_config_are_not_taken_for_a_model(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert only_finding(tmp_path) == Finding(
        str(tmp_path), "holds an adapter's weights, but no adapter_config.json; add it"
    )


def test_an_adapter_file_given_by_name_is_a_usage_error(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"adapter_model.safetensors is a LoRA adapter; give its folder"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(rm: Writer, tmp_path: Path, file: str) -> None:
    folder = rm("a")
    target = tmp_path / "elsewhere" / file
    target.parent.mkdir()
    if (folder / file).exists():
        shutil.move(folder / file, target)
    else:
        target.write_text("{}")
    (folder / file).symlink_to(target)
    assert only_finding(folder) == Finding(
        f"{folder}/{file}", f"is a link out of its folder, to {str(target)!r}; copy the file"
    )


def test_a_link_to_nothing_is_refused(rm: Writer) -> None:
    folder = rm("a")
    (folder / "tokenizer.json").symlink_to("gone")
    assert only_finding(folder) == Finding(f"{folder}/tokenizer.json", "is a link to nothing; download the file again")


def test_links_within_the_folder_and_to_the_folder_are_followed(rm: Writer, tmp_path: Path) -> None:
    folder = rm("a", seed=1)
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to(folder)
    assert_holds(open_checkpoint(tmp_path / "link"), llama_tensors(1))


def hub_cache(tmp_path: Path, source: Path) -> Path:
    """The Hub cache's layout: snapshots/<commit>/<file> -> ../../blobs/<hash>."""
    repo = tmp_path / "hub" / "models--me--rm"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, repo / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_the_layout_of_the_hub_cache_is_accepted(rm: Writer, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, rm("a", seed=1, shards=2))
    assert_holds(open_checkpoint(snapshot), llama_tensors(1))


def test_a_link_from_a_snapshot_to_elsewhere_than_its_blobs_is_refused(rm: Writer, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, rm("a", seed=1))
    secret = tmp_path / "hub" / "models--me--other" / "blobs" / "blob"
    secret.parent.mkdir(parents=True)
    secret.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(secret)
    assert "is a link out of its folder" in only_finding(snapshot).what


# --- names that anybody may have written ----------------------------------------------------------------------------

EVIL = "\x1b[31m\x07evil"


def assert_clean(message: str) -> None:
    assert "evil" in message
    assert all(line.isprintable() for line in message.splitlines())


def refusal_text(spec: Path) -> str:
    with pytest.raises(RefusedError) as refusal:
        open_checkpoint(spec)
    return str(refusal.value)


def test_an_escape_in_a_tensor_name_never_reaches_the_message(rm: Writer) -> None:
    folder = rm("a", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({EVIL: TWO}))
    assert_clean(refusal_text(folder))


def test_an_escape_in_a_file_name_of_the_index_never_reaches_the_message(rm: Writer) -> None:
    folder = rm("a", shards=2)
    edit_index(folder, lambda index: index["weight_map"].update({"x": f"{EVIL}.safetensors", "y": f"../{EVIL}"}))
    assert_clean(refusal_text(folder))


def test_an_escape_in_the_name_of_a_damaged_shard_never_reaches_the_message(rm: Writer) -> None:
    folder = rm("a")
    (folder / "model.safetensors").unlink()
    (folder / f"{EVIL}.safetensors").write_bytes(b"")
    assert_clean(refusal_text(folder))


def test_an_escape_in_the_name_of_an_unused_file_never_reaches_the_message(rm: Writer) -> None:
    folder = rm("a")
    (folder / f"{EVIL}.safetensors").write_bytes(b"")
    assert_clean(refusal_text(folder))


def test_an_escape_in_a_pickle_or_a_link_never_reaches_the_message(tmp_path: Path) -> None:
    (tmp_path / f"pytorch_model{EVIL}.bin").write_bytes(b"")
    assert_clean(refusal_text(tmp_path))
    (tmp_path / f"{EVIL}.json").symlink_to(f"/{EVIL}")
    assert_clean(refusal_text(tmp_path))


def test_an_escape_in_a_name_beside_an_adapter_never_reaches_the_message(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / f"{EVIL}.safetensors").write_bytes(b"")
    assert_clean(refusal_text(tmp_path))


# --- files that change ----------------------------------------------------------------------------------------------


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: os.utime(path, ns=(1, 1)),
        replaced,
    ],
    ids=["cut", "grown", "touched", "replaced"],
)
def test_a_file_that_changes_after_it_was_opened_is_noticed(rm: Writer, change: Callable[[Path], Any]) -> None:
    folder = rm("a")
    checkpoint = open_checkpoint(folder)
    assert len(read_bytes(checkpoint.folder, "model.safetensors", 0, 8)) == 8
    change(folder / "model.safetensors")
    with pytest.raises(RefusedError) as refusal:
        read_bytes(checkpoint.folder, "model.safetensors", 0, 8)
    (found,) = refusal.value.findings
    assert found.where == f"{folder}/model.safetensors"
    assert found.what == "changed while it was read (size, time or inode), or was removed; merge it when it is still"


def test_reading_past_the_end_is_refused_not_short(rm: Writer) -> None:
    checkpoint = open_checkpoint(rm("a"))
    size = checkpoint.folder.sizes()["model.safetensors"]
    with pytest.raises(RefusedError, match="changed while it was read"):
        read_bytes(checkpoint.folder, "model.safetensors", size - 4, 8)
