"""Which files of a folder make a reward model, and what they must not say about the machine that they come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from warmerge.errors import UsageError, plain, some
from warmerge.report.card.text import public_warnings
from warmerge.weights import small_files
from warmerge.weights.checkpoint import ADAPTER_CONFIG, INDEX, Checkpoint, parse_json, read_json
from warmerge.weights.folder import TEMPLATES, LocalFolder, read_bytes
from warmerge.weights.output import MANIFEST

CARD = "README.md"
EVAL_FIGURE, CURVE_FIGURE = "eval.png", "lmc.png"
# What libraries note of where they loaded something from.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_LABELS = ("id2label", "label2id")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf)(\.index\.json)?$")
_KNOWN = frozenset(
    {
        *small_files.TOKENIZER_FILES, *small_files.OTHER_FILES, INDEX, MANIFEST, ADAPTER_CONFIG, EVAL_FIGURE,
        CURVE_FIGURE,
    }
)  # fmt: skip
# What of a merge's record is public: not the command and not the names of local folders.
_PUBLIC = (
    "warmerge", "versions", "rule", "copied_tensors", "dtype", "parameters", "bytes", "coefficients", "seconds",
)  # fmt: skip
_NAMES_OF_INPUTS = ("checkpoint", "repo", "revision", "adapter", "base")
_OF_SETS = {"name", "n", "prompts", "fingerprint"}
_PUBLIC_OF_INPUTS = ("role", "repo", "revision", "fingerprint", "bytes", "rank", "alpha", "use_rslora")


def model_files(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """The files that make the model: weights, index, config, tokenizer, own code, and the public part of its record.

    Weights are given as paths, small files as what is to be sent of them.

    Raises:
        UsageError: a warmerge.json that no merge writes.
    """
    folder = checkpoint.folder
    assert isinstance(folder, LocalFolder)
    files: dict[str, Path | bytes] = {file: folder.path / file for _, file in checkpoint.weight_files}
    names = [*small_files.OTHER_FILES, *small_files.TOKENIZER_FILES, INDEX]
    files |= {name: without_origin(name, read_bytes(folder, name)) for name in names if name in folder.sizes()}
    if (checkpoint.config or {}).get("auto_map"):
        files |= small_files.code_files(checkpoint)
    files |= small_files.tokenizer_code(checkpoint)
    manifest = merge_record(checkpoint) or read_json(folder, MANIFEST)
    if manifest is not None:
        files[MANIFEST] = (json.dumps(public_manifest(manifest), indent=2) + "\n").encode()
    return files


def left_out(checkpoint: Checkpoint, sent: Iterable[str]) -> tuple[str, ...]:
    """What else lies in the folder: states of optimisers, logs, results. It is not sent."""
    return tuple(sorted(set(checkpoint.folder.sizes()) - set(sent)))


def stale(names: Iterable[str], sent: Iterable[str]) -> tuple[str, ...]:
    """Files of a repository that would be taken for a part of the model that is sent, and are none.

    A model.safetensors beside an index would be loaded in its place, an old chat template would be applied.
    Other folders in the repository are left alone.

    >>> stale(["model.safetensors", "additional_chat_templates/default.jinja", "notes/a.txt"], ["model.safetensors"])
    ('additional_chat_templates/default.jinja',)
    """
    replaced = {name for name in names if "/" not in name and (name in _KNOWN or _WEIGHTS.fullmatch(name))}
    replaced |= {name for name in names if name.startswith(f"{TEMPLATES}/")}
    return tuple(sorted(replaced - set(sent)))


def without_origin(name: str, data: bytes) -> bytes:
    """A config (by its file's name) without what libraries note in it of where they read something: it decides nothing.

    To the byte as it was where there is no such note. All are left out: `runs/1` may be a path or a Hub id. Other files
    have none: what is called so in a vocabulary or an index is a token, or a tensor.

    >>> without_origin("config.json", b'{"_name_or_path": "/home/me/run 7", "hidden_size": 8}')
    b'{\\n  "hidden_size": 8\\n}\\n'
    >>> without_origin("config.json", b'{"hidden_size":8}')
    b'{"hidden_size":8}'
    """
    content = parse_json(data) if name.endswith("config.json") else None
    kept = _without_origins(content, parts=name == "config.json")
    if kept == content:
        return data
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")


def _without_origins(content: Any, parts: bool) -> Any:
    """With `parts` also of a model's parts: of its text model, of a vision tower. Names of labels are kept."""
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if not (key in _ORIGINS and value and isinstance(value, str))}
    if not parts:
        return kept
    return {key: value if key in _LABELS else _without_origins(value, parts) for key, value in kept.items()}


def merge_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """warmerge.json of a merge; None for a model that is none.

    Raises:
        UsageError: it is not what a merge writes, or contradicts itself: a card would say what it says.
    """
    manifest = read_json(checkpoint.folder, MANIFEST)
    if manifest is None or not {"rule", "inputs", "selection"} & manifest.keys():
        return None
    inputs = manifest.get("inputs")
    roles = [entry.get("role") for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    rule, selection = manifest.get("rule"), manifest.get("selection")
    right = {
        "rule": isinstance(rule, dict) and all(isinstance(rule.get(key), str) for key in ("name", "formula", "source")),
        "inputs": "member" in roles and roles.count("base") < 2 and all(map(_is_input, inputs or [])),
        "coefficients": _are_coefficients(manifest.get("coefficients", {}), roles.count("member")),
        "selection": "selection" not in manifest or _is_selection(selection),
        "copied_tensors": isinstance(manifest.get("copied_tensors"), list),
        "warnings": isinstance(manifest.get("warnings", []), list),
        "versions": isinstance(manifest.get("versions", {}), dict),
        "warmerge": isinstance(manifest.get("warmerge"), str),
    }
    if wrong := [key for key, known in right.items() if not known]:
        where = f"{plain(checkpoint.label)}/{MANIFEST}"
        raise UsageError(f"{where} is not what a merge writes (see {some(wrong)}); merge again, or delete it")
    return manifest


def _is_input(entry: Any) -> bool:
    if not isinstance(entry, dict) or ("repo" in entry) != ("revision" in entry):
        return False
    texts = [entry.get("fingerprint"), *(entry[key] for key in _NAMES_OF_INPUTS if key in entry)]
    return entry.get("role") in ("member", "base") and all(isinstance(text, str) for text in texts)


def _are_coefficients(found: Any, members: int) -> bool:
    """One for each member and one for the base; or those of each tensor, which no card shows."""
    if not isinstance(found, dict) or "members" not in found:
        return isinstance(found, dict)
    own = found["members"]
    numbers: list[Any] = [*own, found.get("base", 0.0)] if isinstance(own, list) and len(own) == members else [None]
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers)


def _is_selection(found: Any) -> bool:
    """As `average --select` writes it, or as it was published before: with counts in place of names."""
    if not isinstance(found, dict) or not isinstance(found.get("selection"), str):
        return False
    sets, kept = found.get("sets"), found.get("kept")
    counts = type(kept) is int and type(found.get("of")) is int
    names = isinstance(kept, list) and isinstance(found.get("accuracies"), dict)
    entries: list[Any] = sets if isinstance(sets, list) else [None]
    known = all(isinstance(entry, dict) and entry.keys() >= _OF_SETS for entry in entries)
    return (counts or names) and known and all(isinstance(entry["fingerprint"], str) for entry in entries)


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """warmerge.json without local paths: inputs are told by Hub id and commit, or by the fingerprint of their weights.

    >>> public_manifest({"command": ["warmerge", "average", "/home/me/a"], "dtype": "float32"})
    {'dtype': 'float32'}
    """
    public = {key: manifest[key] for key in _PUBLIC if key in manifest}
    if "inputs" in manifest:
        kept = [{key: entry[key] for key in _PUBLIC_OF_INPUTS if key in entry} for entry in manifest["inputs"]]
        public["inputs"] = kept
        public["warnings"] = [sentence for sentence in public_warnings(manifest) if sentence is not None]
    if "selection" in manifest:
        public["selection"] = _public_selection(manifest["selection"])
    return public


def _public_selection(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in place of the names of checkpoints; one that is public already stays as it is."""
    if isinstance(selection["kept"], int):
        return dict(selection)
    counts = {"kept": len(selection["kept"]), "of": len(selection["accuracies"])}
    sets = [{key: entry[key] for key in ("name", "n", "prompts", "fingerprint")} for entry in selection["sets"]]
    return {"selection": selection["selection"], **counts, "sets": sets}
