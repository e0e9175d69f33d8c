"""Which files of a folder make a reward model, and what they must not say about the machine that they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from warmerge.report.card.text import public_warnings
from warmerge.weights import small_files
from warmerge.weights.checkpoint import ADAPTER_CONFIG, INDEX, Checkpoint, parse_json
from warmerge.weights.folder import LocalFolder, read_bytes
from warmerge.weights.output import MANIFEST

CARD = "README.md"
EVAL_FIGURE, CURVE_FIGURE = "eval.png", "lmc.png"
# What libraries note of where they loaded something from.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
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
_PUBLIC_OF_INPUTS = ("role", "repo", "revision", "fingerprint", "bytes", "rank", "alpha", "use_rslora")


def model_files(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """The files that make the model: weights, index, config, tokenizer, own code, and the public part of its record.

    Weights are given as paths, small files as what is to be sent of them.
    """
    folder = checkpoint.folder
    assert isinstance(folder, LocalFolder)
    files: dict[str, Path | bytes] = {file: folder.path / file for _, file in checkpoint.weight_files}
    names = [*small_files.OTHER_FILES, *small_files.TOKENIZER_FILES, INDEX]
    files |= {name: without_origin(read_bytes(folder, name)) for name in names if name in folder.sizes()}
    if (checkpoint.config or {}).get("auto_map"):
        files |= small_files.code_files(checkpoint)
    if MANIFEST in folder.sizes():
        manifest = public_manifest(json.loads(read_bytes(folder, MANIFEST)))
        files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    return files


def left_out(checkpoint: Checkpoint, sent: Iterable[str]) -> tuple[str, ...]:
    """What else lies in the folder: states of optimisers, logs, results. It is not sent."""
    return tuple(sorted(set(checkpoint.folder.sizes()) - set(sent)))


def stale(names: Iterable[str], sent: Iterable[str]) -> tuple[str, ...]:
    """Files of a repository that would be taken for a part of the model that is sent, and are none.

    A model.safetensors beside an index would be loaded in its place, an old chat template would be applied.
    Folders in the repository are left alone.
    """
    replaced = {name for name in names if "/" not in name and (name in _KNOWN or _WEIGHTS.fullmatch(name))}
    return tuple(sorted(replaced - set(sent)))


def without_origin(data: bytes) -> bytes:
    """A JSON file without what libraries note in it of where they read something, which decides nothing.

    To the byte as it was where there is no such note. All are left out: `runs/1` may be a path or a Hub id.

    >>> without_origin(b'{"_name_or_path": "/home/me/run 7", "hidden_size": 8}')
    b'{\\n  "hidden_size": 8\\n}\\n'
    >>> without_origin(b'{"hidden_size":8}')
    b'{"hidden_size":8}'
    """
    content = parse_json(data)
    kept = _without_origins(content)
    if kept == content:
        return data
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")


def _without_origins(content: Any) -> Any:
    """Also of the parts of a config: of its text model, of a vision tower."""
    if isinstance(content, list):
        return [_without_origins(part) for part in content]
    if not isinstance(content, dict):
        return content
    return {key: _without_origins(value) for key, value in content.items() if key not in _ORIGINS or not value}


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
