"""Open a checkpoint: which files hold its weights, and where each tensor's bytes lie. Headers only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from warmerge.errors import Finding, RefusedError, quoted, some
from warmerge.weights import foreign_json
from warmerge.weights.folder import Folder, read_bytes
from warmerge.weights.safetensors_format import AVERAGED, HEADER_LIMIT, TensorHeader, parse_header
from warmerge.weights.sharded_training import how_to_gather, leftovers, refuse_parts_of_ranks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = re.compile(r"(pytorch_model|adapter_model|consolidated|model).*\.(bin|pt|pth|ckpt)$")
_OF_MANY = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
# Mistral and Llama repositories carry a second copy of the weights in their authors' own format.
_SECOND_COPY = re.compile(r"consolidated.*\.safetensors$")
# Layers or labels of one model. Ten million labels cost transformers a minute and 2.5 GB.
_MOST = 100_000
_COUNTED = re.compile("layer|label|depth|stage|block|dense|attention_types")


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in one file: dtype as safetensors names it, shape, position in bytes."""

    dtype: str
    shape: tuple[int, ...]
    folder: Folder = field(repr=False, compare=False)
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[Stored, ...]:
        return (self,)


@dataclass(frozen=True)
class LowRank:
    """A tensor of a model with a merged LoRA adapter: weight + scale * (up @ down).

    `weight` (rows, columns), `up` (rows, r), `down` (r, columns) as their files hold them; a flag says that
    the file holds the transpose. LoRA (arXiv 2106.09685), Eq. 3: h = W x + (alpha / r) B A x.
    """

    weight: Stored
    up: Stored
    down: Stored
    scale: float
    factors_transposed: bool = False

    @property
    def dtype(self) -> str:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def numel(self) -> int:
        return self.weight.numel

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def parts(self) -> tuple[Stored, ...]:
        return (self.weight, self.up, self.down)


Tensor = Stored | LowRank


@dataclass(frozen=True)
class Checkpoint:
    """One model: its tensors and the small files beside them. Nothing but headers and JSON has been read.

    `label` is what the user typed; `config` is config.json, or None where there is none;
    `details` goes into the manifest; `fallback` is where a LoRA adapter without a tokenizer of its own finds one.
    """

    label: str
    folder: Folder = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, Any] | None = field(repr=False)
    details: Mapping[str, Any] = field(default_factory=dict)
    fallback: Folder | None = field(default=None, repr=False)

    @property
    def weight_files(self) -> list[tuple[Folder, str]]:
        """Every file that holds a part of a tensor: one checkpoint's files, or an adapter's and its base's."""
        files = {(part.folder.identity, part.file): part.folder for t in self.tensors.values() for part in t.parts}
        return [(folder, file) for (_, file), folder in sorted(files.items(), key=lambda item: item[0])]

    @property
    def identity(self) -> frozenset[tuple[str, str]]:
        """Equal for two checkpoints that are the same files."""
        return frozenset((folder.identity, file) for folder, file in self.weight_files)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())


def read_json(folder: Folder, file: str) -> dict[str, Any] | None:
    """A JSON object in a file of the folder, or None where there is no such file.

    Raises:
        RefusedError: the file is not JSON, not an object, or larger than any of its kind.
    """
    if file not in folder.sizes():
        return None
    if file != "tokenizer.json" and folder.sizes()[file] > HEADER_LIMIT:
        what = f"has {folder.sizes()[file]:,} bytes (limit {HEADER_LIMIT:,}); it is damaged, or hostile"
        raise RefusedError([Finding(f"{folder.label}/{file}", what)])
    content = parse_json(read_bytes(folder, file))
    if not isinstance(content, dict):
        raise RefusedError([Finding(f"{folder.label}/{file}", "is not a JSON object; it is damaged")])
    return content


def parse_json(text: bytes) -> Any:
    """What a JSON text says; None also where it is not JSON, or more than `foreign_json.parse` reads."""
    try:
        return foreign_json.parse(text)
    except ValueError:
        return None


def read_checkpoint(folder: Folder, only_file: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, in whatever layout: one file, shards with an index, shards without.

    Args:
        folder: where its files are.
        only_file: one safetensors file that the user named; the others in the folder are then left alone.

    Raises:
        RefusedError: with every finding: no weights, pickle only, one rank's part, two layouts at once, a damaged
            file, an index that does not match its shards.
    """
    index = None if only_file else read_json(folder, INDEX)
    files = [only_file] if only_file else _choose_files(folder, index)
    refuse_parts_of_ranks(folder.label, files)
    headers: dict[str, dict[str, TensorHeader]] = {}
    findings: list[Finding] = []
    for file in files:
        try:
            headers[file] = parse_header(
                partial(read_bytes, folder, file), folder.sizes()[file], f"{folder.label}/{file}"
            )
        except RefusedError as error:
            findings += error.findings
    if findings:
        raise RefusedError(findings)
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for name, entry in header.items():
            if name in tensors:
                what = f"holds tensor {quoted(name)}, which {quoted(tensors[name].parts[0].file)} holds too"
                findings.append(Finding(f"{folder.label}/{file}", what))
            tensors[name] = Stored(entry.dtype, entry.shape, folder, file, entry.offset, entry.nbytes)
    if index is not None:
        findings += _check_index(folder.label, index["weight_map"], tensors)
    if not tensors:
        findings.append(Finding(folder.label, "holds no tensors"))
    weights = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype in AVERAGED}
    findings += leftovers(folder.label, weights)
    if findings:
        raise RefusedError(findings)
    config = read_json(folder, "config.json")
    if config is not None and (wrong := _wrong_types(config)):
        raise RefusedError([Finding(f"{folder.label}/config.json", what) for what in wrong])
    return Checkpoint(folder.label, folder, tensors, config)


def _choose_files(folder: Folder, index: Mapping[str, Any] | None) -> list[str]:
    names = folder.sizes()
    weights = [name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS]
    if index is not None:
        return _indexed_files(folder, index, weights)
    if not weights:
        pickles = sorted(name for name in names if _PICKLE.match(name))
        gather = how_to_gather(folder)
        if gather is not None:
            what = gather
        elif pickles:
            what = (
                f"holds pickle weights only ({some(pickles)}), which can run code when loaded; convert them once, "
                "where you trust them: AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(new)"
            )
        else:
            what = "holds no .safetensors file"
        raise RefusedError([Finding(folder.label, what)])
    if SINGLE in weights:
        _refuse_unused(folder.label, weights, {SINGLE}, "transformers would load model.safetensors alone")
        return [SINGLE]
    weights = [name for name in weights if not _SECOND_COPY.match(name)] or weights
    return _complete_shards(folder.label, weights)


def _indexed_files(folder: Folder, index: Mapping[str, Any], weights: Sequence[str]) -> list[str]:
    where = f"{folder.label}/{INDEX}"
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise RefusedError([Finding(where, "has no weight_map of tensor names to file names; it is damaged")])
    files = sorted(set(table.values()))
    findings = []
    for file in files:
        if "/" in file or "\\" in file or file in ("", ".", "..") or not file.endswith(".safetensors"):
            what = f"names {quoted(file)}, which is not a plain .safetensors file name of its own folder"
            findings.append(Finding(where, what))
        elif file not in folder.sizes():
            findings.append(Finding(where, f"names {quoted(file)}, which is missing; download it again"))
    if findings:
        raise RefusedError(findings)
    if SINGLE in weights and SINGLE not in files:
        what = f"stands beside {SINGLE}: two checkpoints in one folder, one of them stale; delete one"
        raise RefusedError([Finding(where, what)])
    _refuse_unused(folder.label, weights, set(files), f"{INDEX} does not name them")
    return files


def _refuse_unused(label: str, weights: Sequence[str], used: set[str], why: str) -> None:
    """A weight file that would be left out is stale, or a head kept apart: both have cost somebody a model."""
    unused = [name for name in weights if name not in used and not _SECOND_COPY.match(name)]
    if unused:
        what = f"holds weights that would be left out: {some(unused)} ({why}); move them away, or merge them in"
        raise RefusedError([Finding(label, what)])


def _complete_shards(label: str, weights: Sequence[str]) -> list[str]:
    """Shards without an index are taken together, if by their own numbers none is missing."""
    counts = {int(match[2]) for name in weights if (match := _OF_MANY.search(name))}
    if counts:
        numbers = sorted(int(match[1]) for name in weights if (match := _OF_MANY.search(name)))
        if len(counts) > 1 or numbers != list(range(1, max(counts) + 1)):
            what = f"has shards {numbers} of {sorted(counts)} and no index; some are missing or from another model"
            raise RefusedError([Finding(label, what)])
    return sorted(weights)


def _wrong_types(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields that the checks look at; null counts as not given."""
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "architectures": ("a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v)),
        "model_type": ("a name", lambda v: isinstance(v, str)),
        "num_labels": ("a number", lambda v: type(v) is int),
        "id2label": ("a table", lambda v: isinstance(v, dict)),
        "text_config": ("a table", lambda v: isinstance(v, dict)),
    }
    given = {field: config[field] for field in expected if config.get(field) is not None}
    wrong = [
        f"has {field} {json.dumps(value)[:60]}, expected {expected[field][0]}; it is damaged"
        for field, value in given.items()
        if not expected[field][1](value)
    ]
    too_many = [f"has {quoted(field)} {number}, expected {_MOST} at most; it is damaged, or hostile"
                for field, number in _counts(config) if number > _MOST]  # fmt: skip
    return wrong + too_many


def _counts(part: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every number of layers or labels in a config: transformers makes lists as long as they say."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _counts(value, str(key))
    elif isinstance(part, list):
        for value in part:
            # GPT-Neo's [[["global", "local"], 12]]. In other lists, such as a window for each layer, numbers are large.
            yield from _counts(value, name if name in ("attention_types", "stage_num_blocks") else "")
    elif type(part) is int and _COUNTED.search(name) and "size" not in name:
        yield name, part


def refuse_lone_shard(folder: Folder, file: str) -> None:
    """A single file given by name must be a whole model, not one shard of several."""
    match = _OF_MANY.search(file)
    if match and int(match[2]) > 1:
        what = f"is shard {int(match[1])} of {int(match[2])}; give its folder, so that the whole model is merged"
        raise RefusedError([Finding(f"{folder.label}", what)])


def _check_index(label: str, table: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[Finding]:
    where, findings = f"{label}/{INDEX}", []
    for name in sorted(set(table) - set(tensors)):
        findings.append(Finding(where, f"is promised in {quoted(table[name])} but lies in no shard", name))
    for name in sorted(set(tensors) - set(table)):
        findings.append(Finding(where, f"lies in {quoted(tensors[name].parts[0].file)} but is not listed", name))
    for name in sorted(set(tensors) & set(table)):
        if tensors[name].parts[0].file != table[name]:
            what = f"is promised in {quoted(table[name])}, found in {quoted(tensors[name].parts[0].file)}"
            findings.append(Finding(where, what, name))
    return findings
