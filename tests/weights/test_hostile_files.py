"""Checkpoints and adapters by strangers: merged rightly or refused in words; nothing else is opened, run or written."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import time
import tracemalloc
from importlib import metadata
from pathlib import Path
from typing import Any

import fuzz
import pytest
import safetensors
import torch
from conftest import CONFIG, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.weights import folder as folders
from warmerge.weights import foreign_json, samples
from warmerge.weights.checkpoint import read_checkpoint, read_json
from warmerge.weights.folder import open_folder, read_bytes
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.plan import natural_order
from warmerge.weights.safetensors_format import BITS, HEADER_LIMIT, parse_header, tensor_bytes
from warmerge.weights.samples import read_sample

installed = functools.cache(metadata.version)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up what is installed takes longer than these merges: once is enough."""
    monkeypatch.setattr(metadata, "version", installed)


# --- parsers ----------------------------------------------------------------------------------------------------------


@examples(150)
@given(seeds)
def test_a_header_is_read_as_safetensors_reads_it_or_refused(seed: int) -> None:
    fuzz.header(fuzz.from_seed("header", seed))


@examples(80)
@given(seeds)
def test_an_index_leads_to_files_of_its_folder_or_is_refused(seed: int) -> None:
    fuzz.index(fuzz.from_seed("index", seed))


@examples(80)
@given(seeds)
def test_a_config_is_compared_and_written_again_or_refused(seed: int) -> None:
    fuzz.config(fuzz.from_seed("config", seed))


@examples(50)
@given(seeds)
def test_tokenizer_files_are_compared_or_refused(seed: int) -> None:
    fuzz.tokenizer_files(fuzz.from_seed("tokenizer_files", seed))


@examples(100)
@given(seeds)
def test_an_adapter_fits_its_base_or_is_refused(seed: int) -> None:
    fuzz.adapter(fuzz.from_seed("adapter", seed))


def test_the_inputs_that_nothing_is_wrong_with_are_accepted() -> None:
    """Else all of the above would hold of a reader that refuses everything."""
    assert fuzz.header(fuzz.file_of(fuzz.tensors()))
    assert fuzz.index(fuzz.shards()["model.safetensors.index.json"])
    assert fuzz.config(json.dumps(fuzz.seeds()["config"]).encode())
    assert fuzz.tokenizer_files(b"\x00" + json.dumps(fuzz.seeds()["tokenizer.json"]).encode())
    accepted = {target: sum(fuzz.TARGETS[target](fuzz.from_seed(target, n)) for n in range(60))
                for target in ("header", "index", "config", "tokenizer_files", "adapter")}  # fmt: skip
    assert all(0 < count < 60 for count in accepted.values()), accepted


valid = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 4), max_size=4).map(tuple)).filter(
        lambda entry: fuzz_bits(entry) % 8 == 0
    ),
    max_size=8,
)


def fuzz_bits(entry: tuple[str, tuple[int, ...]]) -> int:
    product = BITS[entry[0]]
    for size in entry[1]:
        product *= size
    return product


@examples(60)
@given(valid, st.integers(0, 9), seeds)
def test_every_valid_file_is_accepted_by_both_readers(
    table: dict[str, tuple[str, tuple[int, ...]]], padding: int, seed: int
) -> None:
    """Names of any text, any dtype of the format, empty tensors, entries in any order, spaces behind them."""
    entries = list(fuzz.header_of(table).items())
    random.Random(seed).shuffle(entries)
    text = json.dumps(dict(entries)).encode() + b" " * padding
    data = bytes(range(256)) * 20
    assert fuzz.header(fuzz.framed(text, data[: sum(tensor_bytes(*entry) for entry in table.values())]))


# What the fuzzing found, or what stands at the end of what it can find; before, each was read, or ended in a traceback.
HEADERS = {
    "half a character in the metadata": (b'{"__metadata__":{"a":"\\ud800"}}', "whose __metadata__ is not Unicode text"),
    "half a character as its name": (b'{"__metadata__":{"\\udfff":""}}', "whose __metadata__ is not Unicode text"),
    "minus nothing as a size": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "is not JSON (ValueError)"),
    "minus nothing as an offset": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}', "is not JSON"),
    "an empty tensor of endless rows": (
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}',
        "has a damaged shape for tensor 'a': [4611686018427387904, 4, 0]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_what_the_official_reader_refuses_is_refused(text: bytes, message: str) -> None:
    file = fuzz.framed(text, b"")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)
    with pytest.raises(RefusedError) as refusal:
        parse_header(lambda offset, length: file[offset : offset + length], len(file), "m")
    assert message in str(refusal.value)


@pytest.mark.parametrize("depth", [101, 500, 960, 100_000])
def test_what_is_nested_deeply_is_refused_once_and_for_all(depth: int) -> None:
    """Python reads 960 levels, and fails on the next function that walks them."""
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(ValueError, match="nested more than 100 levels deep"):
            foreign_json.parse(opened * depth + "1" + closed * depth)
    assert foreign_json.parse("[" * 100 + "]" * 100)
    assert foreign_json.parse('"' + "[" * 5000 + '"') == "[" * 5000


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="a number in it has 301 digits"):
        foreign_json.parse("[" + "9" * 301 + "]")
    assert foreign_json.parse(b"9" * 300) == 10**300 - 1
    with pytest.raises(ValueError, match="1e999 is no number of JSON"):
        foreign_json.parse("[1e999]", parse_float=foreign_json.finite)


def test_the_order_of_names_knows_numbers_from_what_looks_like_one() -> None:
    """A superscript is a digit, and no number; Python reads numbers of 4,300 digits at most."""
    names = ["h.1²2", "h.²", "h.10", "h.9", "h." + "7" * 5000, "h.١٢"]
    assert sorted(names, key=natural_order)[:2] == ["h.1²2", "h.9"]


# --- memory and time --------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_of_gigabytes_is_not_read(name: str, tmp_path: Path) -> None:
    member = write_checkpoint(tmp_path / "m", {"score.weight": torch.ones(1, 4)})
    sparse(member / name, 10**12)
    with pytest.raises(RefusedError, match=r"has 1,000,000,000,000 bytes \(limit 25,000,000\)"):
        read_checkpoint(open_folder(member, "m"))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "own.py"])
def test_a_tokenizer_of_gigabytes_is_not_read(name: str, tmp_path: Path) -> None:
    sparse(tmp_path / name, 10**12)
    with pytest.raises(RefusedError, match=f"{name}: has 1,000,000,000,000 bytes; a config or a tokenizer has"):
        read_bytes(open_folder(tmp_path, "m"), name)
    with pytest.raises(RefusedError if name.endswith("json") else KeyError):
        read_json(open_folder(tmp_path, "m"), name) if name.endswith("json") else {}[name]


@pytest.mark.parametrize(
    "fields",
    [{"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 10**9}},
     {"parts": [{"decoder_layers": 100_001}]}, {"attention_types": [[["global"], 10**9]]},
     {"first_k_dense_replace": 10**9}],
    ids=str,
)  # fmt: skip
def test_layers_and_labels_without_end_are_refused(fields: dict[str, Any]) -> None:
    """transformers makes lists of as many entries: ten million took it a minute and 2.5 GB."""
    files = {"model.safetensors": fuzz.file_of(fuzz.tensors()), "config.json": json.dumps(fields).encode()}
    with pytest.raises(RefusedError, match="expected 100000 at most; it is damaged, or hostile"):
        read_checkpoint(fuzz.Files(files))


def test_other_numbers_may_be_large() -> None:
    fields = {"vocab_size_per_layer_input": 262_144, "layer_rope_theta": [1_000_000, 10_000], "block_size": 131_072}
    files = {"model.safetensors": fuzz.file_of(fuzz.tensors()), "config.json": json.dumps(fields).encode()}
    assert read_checkpoint(fuzz.Files(files)).config == fields


@pytest.mark.parametrize("piece", ['"%d":{},', '"%d":0,', '"%d":[[],[],[]],'])
def test_a_header_takes_at_most_forty_times_its_size(piece: str) -> None:
    text = ("{" + "".join(piece % number for number in range(5_000))[:-1] + "}").encode()
    file = fuzz.framed(text, b"")
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError):
            parse_header(lambda offset, length: file[offset : offset + length], len(file), "m")
        assert tracemalloc.get_traced_memory()[1] < 40 * len(text)
    finally:
        tracemalloc.stop()
    assert HEADER_LIMIT == 25_000_000


def test_what_calls_itself_a_head_is_not_read_whole_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"classifier.weight": torch.ones(64, 64), "score.weight": torch.ones(1, 64), "x": torch.ones(2)}
    member = read_checkpoint(open_folder(write_checkpoint(tmp_path / "m", tensors), "m"))
    assert set(read_sample(member).heads) == {"classifier.weight", "score.weight"}
    monkeypatch.setattr(samples, "_HEAD_BYTES", 64 * 64 * 4)
    assert set(read_sample(member).heads) == {"classifier.weight"}
    monkeypatch.setattr(samples, "_HEAD_BYTES", 64 * 64 * 4 - 1)
    assert set(read_sample(member).heads) == set()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    member = write_checkpoint(tmp_path / "m", {"score.weight": torch.ones(1, 4)})
    (member / "model.safetensors").unlink()
    os.mkfifo(member / "model.safetensors")
    with pytest.raises(RefusedError, match=r"holds no \.safetensors file"):
        read_checkpoint(open_folder(member, "m"))
    with pytest.raises(UsageError, match="and not a Hub id"):
        open_checkpoint(member / "model.safetensors")


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_with(**changes: Any) -> dict[str, bytes]:
    table = {
        "a.q.lora_A.weight": ("F32", (2, 4)),
        "a.q.lora_B.weight": ("F32", (4, 2)),
        "score.weight": ("F32", (1, 4)),
    }
    weights = fuzz.file_of({f"base_model.model.{name}": entry for name, entry in table.items()})
    config = json.dumps(fuzz.seeds()["adapter"] | changes).encode()
    return {"adapter_config.json": config, "adapter_model.safetensors": weights}


def write_adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for name, data in adapter_with(**changes).items():
        (folder / name).write_bytes(data)
    return folder


def write_base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(fuzz.file_of(fuzz.tensors()))
    (folder / "config.json").write_text(json.dumps(fuzz.seeds()["config"]))
    return folder


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_rank_that_no_float_holds_is_refused(field: str, tmp_path: Path) -> None:
    text = adapter_with()["adapter_config.json"].decode()
    member = write_adapter(tmp_path / "a")
    number = fuzz.seeds()["adapter"][field]
    (member / "adapter_config.json").write_text(text.replace(f'"{field}": {number}', f'"{field}": 1{"0" * 400}'))
    with pytest.raises(RefusedError, match="is not a JSON object; it is damaged"):
        open_checkpoint(member, write_base(tmp_path / "base"))


@pytest.mark.parametrize("value", [5, "score", {"score": 1}, True])
def test_modules_to_save_that_are_no_list_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"has modules_to_save .*, expected a list of names; it is damaged"):
        open_checkpoint(write_adapter(tmp_path / "a", modules_to_save=value), write_base(tmp_path / "base"))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*)*x", "(a|a)(a|a)(a|a)(a|a)x", "a?a?a?a?aaaa", ".*.*.*x", r"(a)\1*", "(a{9}){9}", "x" * 501],
)
def test_a_pattern_that_may_match_for_ever_is_refused(pattern: str, tmp_path: Path) -> None:
    member = write_adapter(tmp_path / "a", rank_pattern={pattern: 2})
    with pytest.raises(RefusedError, match="in rank_pattern, regular expressions which may take for ever to match"):
        open_checkpoint(member, write_base(tmp_path / "base"))


@pytest.mark.parametrize(
    "pattern", ["q", "a.q", r"^a\.q", r".*\.(q|k|v)", r"a\.(q|k)", r"layers\.(1[0-9]|2[0-3])\.(q|v)", r"a\.\w+"]
)
def test_the_patterns_that_people_write_are_taken(pattern: str, tmp_path: Path) -> None:
    member = write_adapter(tmp_path / "a", alpha_pattern={pattern: 6})
    assert open_checkpoint(member, write_base(tmp_path / "base")).details["alpha_pattern"] == {pattern: 6}


def test_the_slowest_pattern_that_is_taken_ends(tmp_path: Path) -> None:
    """Two stars on the longest name, with the dots that PEFT's own prefix may end at."""
    module = ".".join("a" * 200)
    table = {f"base_model.model.{module}.lora_A.weight": ("F32", (2, 4)),
             f"base_model.model.{module}.lora_B.weight": ("F32", (4, 2))}  # fmt: skip
    member = write_adapter(tmp_path / "a", modules_to_save=None, rank_pattern={".*.*x": 2}, alpha_pattern={})
    (member / "adapter_model.safetensors").write_bytes(fuzz.file_of(table))
    begun = time.process_time()
    with pytest.raises(RefusedError, match="is adapted, but the base has no such tensor"):
        open_checkpoint(member, write_base(tmp_path / "base"))
    assert time.process_time() - begun < 5


def test_a_name_too_long_for_any_pattern_is_refused(tmp_path: Path) -> None:
    member = write_adapter(tmp_path / "a")
    table = {f"base_model.model.{'a' * 500}.lora_A.weight": ("F32", (2, 4))}
    (member / "adapter_model.safetensors").write_bytes(fuzz.file_of(table))
    with pytest.raises(RefusedError, match="has 531 characters, expected 500 at most"):
        open_checkpoint(member, write_base(tmp_path / "base"))


@pytest.mark.parametrize("address", ["s3://bucket/base", "memory://base", "ftp://host/base", "sftp://host/base"])
def test_an_address_that_only_the_adapter_names_is_not_asked(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warmerge.weights.remote.stores.open_store", pytest.fail)
    member = write_adapter(tmp_path / "a", base_model_name_or_path=address)
    with pytest.raises(RefusedError, match="which is asked only if you give it with --base"):
        open_checkpoint(member)


@pytest.mark.parametrize("name", ["n" * 300, "n/" * 3000, "a\x00b", "\x1b[31m/x", "..", "/dev/zero", "‮gnp/x"])
def test_a_base_that_is_no_model_is_refused_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(WarmergeError) as error:
        open_checkpoint(write_adapter(tmp_path / "a", base_model_name_or_path=name))
    assert str(error.value).isprintable()


def test_adapters_of_each_other_are_no_endless_chain(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        write_adapter(tmp_path / one, base_model_name_or_path=str(tmp_path / other))
    with pytest.raises(RefusedError, match="is an adapter of an adapter, and so on without an end"):
        open_checkpoint(tmp_path / "a")


# --- average, from end to end -----------------------------------------------------------------------------------------


def small(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {"a.weight": (3, 4), "b.weight": (5,), "score.weight": (1, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()} | {"ids": torch.arange(3)}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def official(folder: Path) -> dict[str, torch.Tensor]:
    """What safetensors reads of a folder, shard by shard as the index says."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def damage(folder: Path, kinds: int, choose: fuzz.Choose) -> None:
    """One of what goes wrong, or is made wrong, in a folder of two shards."""
    shards, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    kind, shard = choose(kinds), shards[choose(2)]
    content = shard.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    if kind < 2:  # bits of a weight: some of them make a NaN
        at = size + choose(len(content) - size)
        shard.write_bytes(content[:at] + bytes([content[at] ^ (1 << choose(8))]) + content[at + 1 :])
    elif kind < 4:
        shard.write_bytes(fuzz.flipped(content[:size], choose) + content[size:])
    elif kind == 4:
        shards[0].rename(folder / "other")
        shards[1].rename(shards[0])
        (folder / "other").rename(shards[1])
    elif kind == 5:
        index.write_bytes(fuzz.mutated(json.loads(index.read_bytes()), choose))
    elif kind == 6:
        shard.write_bytes(content[: choose(len(content))])
    elif kind == 7:
        (folder / ("model.safetensors", "extra.safetensors")[choose(2)]).write_bytes(content)
    elif kind == 8:
        index.write_bytes(index.read_bytes().replace(shard.name.encode(), b"../b/" + shard.name.encode()))
    else:
        (folder / "config.json").write_bytes(fuzz.flipped((folder / "config.json").read_bytes(), choose))


def attacked(place: Path, seed: int, kinds: int) -> bool:
    """Merges a good member with a damaged one; whether it was accepted, and then rightly."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("good", "b"):
        write_checkpoint(place / "in" / name, small(len(name)), CONFIG, shards=2)
    damage(place / "in" / "b", kinds, random.Random(seed).randrange)
    before, out = tree(place), place / "out"
    try:
        warmerge.average([place / "in" / "good", place / "in" / "b"], out, threads=1)
    except WarmergeError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.replace("\n", "").isprintable()
        assert tree(place) == before, "a refused merge leaves nothing behind"
        return False
    written = tree(place)
    assert {name: data for name, data in written.items() if not name.startswith("out/")} == before
    inputs, found = [official(place / "in" / name) for name in ("good", "b")], official(out)
    assert found.keys() == inputs[0].keys() == inputs[1].keys()
    for name, tensor in found.items():
        one, other = (each[name] for each in inputs)
        expected = ((one.double() + other.double()) / 2).to(one.dtype) if one.is_floating_point() else one
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
        assert one.is_floating_point() or torch.equal(one, other)
    return True


def test_average_of_a_damaged_member_is_right_or_refused(tmp_path: Path) -> None:
    outcomes = [attacked(tmp_path / "place", seed, kinds=9) for seed in range(40)]
    assert 3 < sum(outcomes) < 20, "a flipped bit in a weight cannot be seen; most damage can"


@pytest.mark.slow
def test_average_of_damaged_members_is_right_or_refused(tmp_path: Path) -> None:
    for seed in range(1000, 4000):
        attacked(tmp_path / "place", seed, kinds=10)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/tmp/x.safetensors", "..\\x.safetensors", "sub/x.safetensors", ".."]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    member = write_checkpoint(tmp_path / "m", small(0), shards=2)
    index = member / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["b.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(RefusedError, match=r"is not a plain \.safetensors file name of its own folder"):
        read_checkpoint(open_folder(member, "m"))


def test_a_name_that_climbs_out_is_only_a_name(tmp_path: Path) -> None:
    """Names of tensors may hold anything; they are keys of a table, and no paths."""
    tensors = small(0) | {"../../x": torch.ones(2), "/tmp/y\x1b[31m\n": torch.ones(2)}
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        save_file(
            {k: v + (name == "b") * v.is_floating_point() for k, v in tensors.items()},
            tmp_path / "in" / name / "model.safetensors",
        )
    warmerge.average([tmp_path / "in" / "a", tmp_path / "in" / "b"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert official(tmp_path / "out").keys() == tensors.keys()
    assert "\x1b" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_not_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("torch.load", "pickle.load", "pickle.loads"):
        monkeypatch.setattr(loader, pytest.fail)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / kind).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(RefusedError, match=r"pickle weights only .* which can run code when loaded"):
        read_checkpoint(open_folder(tmp_path / "m", "m"))


def test_code_that_comes_with_a_member_is_copied_and_not_run(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    for name in ("a", "b"):
        folder = write_checkpoint(
            tmp_path / name, small(len(name) + (name == "b")), CONFIG | {"auto_map": {"AutoModel": "m.M"}}
        )
        (folder / "m.py").write_text(f"open({str(owned)!r}, 'w')\n")
    warmerge.average([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert (tmp_path / "out" / "m.py").is_file()
    assert not owned.exists()


def test_the_limits_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    for number in (HEADER_LIMIT // 10**6, folders.WHOLE_LIMIT // 10**6):
        assert f"{number} MB" in page
    assert f"{foreign_json.LEVELS} levels" in page
