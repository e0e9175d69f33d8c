"""The start that all members share: a folder that loads as a reward model, made of a language model, encoder or RM.

A head that is added here is random; it is the caller's to fit it (see `probe`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import Finding, RefusedError, UsageError, naming, quoted, some
from warmerge.rewards.config import transformers_config
from warmerge.rewards.model import DTYPES, LoadOptions, head_layers, is_causal, load_reward_model
from warmerge.rewards.tokenizer import open_tokenizer, quiet
from warmerge.version import versions
from warmerge.weights import small_files
from warmerge.weights.average import merge_into, write_merge
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import read_bytes
from warmerge.weights.heads import HEAD_RENAMES, is_head
from warmerge.weights.kernels import INTEGER_DTYPE, TORCH_DTYPE
from warmerge.weights.locate import make_local
from warmerge.weights.output import MANIFEST
from warmerge.weights.plan import MergePlan, choose_threads, plan_merge
from warmerge.weights.remote.reading import revision_of
from warmerge.weights.rules import RULES, Options
from warmerge.weights.safetensors_format import AVERAGED, COMPARED
from warmerge.weights.samples import read_sample
from warmerge.weights.stream import Engine

# What no reward uses: parts that predict tokens, the next sentence or replaced tokens, and tables that are computed.
_NOT_NEEDED = re.compile(
    r"^(lm_head|embed_out|cls|predictions|vocab_transform|vocab_layer_norm|vocab_projector|lm_predictions|"
    r"mask_predictions|generator_predictions|generator_lm_head|discriminator_predictions|sop_classifier|lm_loss)\."
    r"|^(decoder|head)\.(weight|bias)$|position_ids$|rotary_emb\.inv_freq$|(^|\.)pooler\."
)
# What a pre-trained encoder may lack besides a head: drawn once for all members.
_DRAWN = re.compile(r"(^|\.)pooler\.")
# Tokens that a vocabulary keeps in reserve.
_RESERVED = re.compile(r"pad|reserved|unused|extra_id", re.IGNORECASE)
PAD = "<|pad|>"
Files = dict[str, bytes]


def make_start(source: Checkpoint, out: Path, *, trust_remote_code: bool = False, seed: int = 0) -> list[Finding]:
    """Writes a checkpoint into the new folder `out` as a reward model, and says what was chosen for it.

    - A reward model stays as it is, every tensor byte for byte; adapters are merged as `average` would.
    - A decoder or encoder without a head gets one of one output, and keeps its own dtype. A decoder gets a padding
      token of its own if it has none: transformers' heads read the last token that is not padding, so if the end of a
      text is padding too, its reward is read one token earlier.

    `out` appears all at once: it is written beside, and renamed.

    Args:
        seed: of everything that is drawn: the head, and a pooler where an encoder came without one.

    Raises:
        UsageError: `out` exists.
        RefusedError: a head of several labels or a language model with a value head; an encoder-decoder; quantised
            weights; model code that is not trusted; weights that are missing or not known; no tokenizer, or one whose
            texts would not end in anything.
    """
    if out.exists():
        raise UsageError(f"{out} exists; choose another folder")
    (source,) = make_local([source])
    _refuse_weights(source)
    had_head = any(map(is_head, source.tensors))
    config = transformers_config(source, trust_remote_code, labels=None if had_head else 1)
    if config.is_encoder_decoder:
        what = f"is an encoder-decoder ({config.model_type}); training starts from a decoder or an encoder"
        raise RefusedError([Finding(source.label, what)])
    if had_head:
        return _write_as_it_is(source, out, trust_remote_code, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _write_with_new_head(source, config, out, trust_remote_code, seed)


def _refuse_weights(source: Checkpoint) -> None:
    """Refuses what its tensors' names and dtypes tell is no start."""
    odd = {name: tensor.dtype for name, tensor in source.tensors.items() if tensor.dtype not in AVERAGED | COMPARED}
    if odd:
        what = "which is no plain weight; take the bfloat16 or float32 checkpoint"
        raise RefusedError([Finding(source.label, f"is {dtype}, {what}", name) for name, dtype in odd.items()])
    value_head = [name for name in source.tensors if name in HEAD_RENAMES]
    if value_head:
        what = (
            f"is a language model with a value head ({some(value_head)}), which transformers would drop; save it as a "
            "sequence classifier, where that head is 'score.weight', or start from the model that it was made of"
        )
        raise RefusedError([Finding(source.label, what)])


# --- a reward model ---------------------------------------------------------------------------------------------------


def _write_as_it_is(source: Checkpoint, out: Path, trust_remote_code: bool, seed: int) -> list[Finding]:
    """A reward model: what transformers loads from `out` is what it is, also for adapters and shards without index."""
    dtype = next((name for name, known in DTYPES.items() if known == _own_dtype(source)), "float32")
    options = LoadOptions(device="cpu", dtype=dtype, trust_remote_code=trust_remote_code)
    model = load_reward_model(source, options)  # refuses whatever is incomplete
    config, warnings = json.loads(json.dumps(source.config)), list(model.warnings)
    files = _tokenizer_files(source)
    if "id2label" not in config and "num_labels" not in config:
        config["num_labels"] = 1  # transformers would take it for two
    if is_causal(model.module) and small_files.pad_token_id(config) is None:
        tokenizer = model.renderer.tokenizer
        rows = model.module.get_input_embeddings().weight.shape[0]
        found = _choose_padding(source, tokenizer, _ends(model.module.config, tokenizer), rows)
        if tokenizer.pad_token_id >= rows:
            what = (
                "has no padding token, and its vocabulary has none to spare, so it cannot be trained in batches; add "
                "one to tokenizer, embeddings and config.json (pad_token_id)"
            )
            raise RefusedError([Finding(source.label, what)])
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["pad_token_id"] = tokenizer.pad_token_id
        warnings += found
        files = _tokenizer_files(source, tokenizer) if found else files
    files |= _beside(source) | {"config.json": _config_json(source, config)}
    engine, record = Engine(choose_threads(None)), _record(source, "as it came", seed, warnings)
    write_merge(_alone(source), out, engine, files, record, fingerprint="start")
    return warnings


def _config_json(source: Checkpoint, config: dict[str, Any]) -> bytes:
    """config.json without the place where it once lay; to the byte as it is where nothing is to be changed."""
    config.pop("_name_or_path", None)
    if "config.json" in source.folder.sizes():
        stored = read_bytes(source.folder, "config.json")
        if json.loads(stored) == config:
            return stored
    return (json.dumps(config, indent=2) + "\n").encode()


def _alone(source: Checkpoint) -> MergePlan:
    """The plan that copies every tensor, and merges an adapter into its base."""
    return plan_merge([source], RULES["uniform"], Options())


# --- a model without a head -------------------------------------------------------------------------------------------


def _write_with_new_head(
    source: Checkpoint, config: Any, out: Path, trust_remote_code: bool, seed: int
) -> list[Finding]:
    if small_files.architecture(source.config or {}).endswith("ForSequenceClassification"):
        what = "is a sequence classifier by its config.json, but its head is missing; download it again"
        raise RefusedError([Finding(source.label, what)])
    module, warnings = _with_new_head(source, config, trust_remote_code)
    tokenizer = open_tokenizer(source, trust_remote_code)
    rows, chosen = module.get_input_embeddings().weight.shape[0], []
    if is_causal(module):
        if tokenizer.eos_token_id is None:
            what = (
                "has a tokenizer without an end-of-sequence token: texts would not end in anything that says so to a "
                "reward head; set eos_token in tokenizer_config.json"
            )
            raise RefusedError([Finding(source.label, what)])
        chosen = _choose_padding(source, tokenizer, _ends(config, tokenizer), rows)
        warnings += chosen
        module.config.pad_token_id = module.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if tokenizer.pad_token_id == rows:  # the row after the last
            with quiet():
                module.resize_token_embeddings(rows + 1, mean_resizing=False)
            rows += 1
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        what = f"has a tokenizer with ids up to {highest}, but embeddings for {rows} tokens: not the model's tokenizer"
        raise RefusedError([Finding(source.label, what)])
    files = _tokenizer_files(source, tokenizer if chosen else None) | _beside(source, but="generation_config.json")
    record = _record(source, "drawn", seed, warnings)
    _write_folder(out, module, files | {MANIFEST: (json.dumps(record, indent=2) + "\n").encode()})
    return warnings


def _with_new_head(source: Checkpoint, config: Any, trust_remote_code: bool) -> tuple[Any, list[Finding]]:
    """The module, its head drawn, and what else had to be drawn. Read as `average` reads it: any layout, adapters."""
    cls = _classifier(source, config, trust_remote_code)
    plan = _alone(source)
    dtypes = {**TORCH_DTYPE, **INTEGER_DTYPE}
    weights = {tensor.name: torch.empty(tensor.shape, dtype=dtypes[tensor.dtype]) for tensor in plan.tensors}
    merge_into(plan, weights, Engine(choose_threads(None)))
    with quiet():
        module, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=_own_dtype(source),
            ignore_mismatched_sizes=True,  # so that they are listed, with everything else that is wrong
            output_loading_info=True,
        )
    final = {name for name in info["missing_keys"] if _is_output(module, name)}
    missing = set(info["missing_keys"]) - final
    drawn = {name for name in missing if _DRAWN.search(name) or name.split(".")[0] in head_layers(module)}
    findings = []
    for names, what in (
        (missing - drawn, "missing, so transformers would draw them at random"),
        ({name for name in info["unexpected_keys"] if not _NOT_NEEDED.search(name)}, "not part of this architecture"),
        ({str(name[0]) for name in info["mismatched_keys"]}, "of another shape than the config says"),
    ):
        if names:
            be = "tensor is" if len(names) == 1 else "tensors are"
            findings.append(Finding(source.label, f"{len(names)} {be} {what}: {some(names)}"))
    if findings:
        raise RefusedError(findings)
    what = f"comes without {some(drawn)}: drawn at random, once for all members"
    return module.eval(), [Finding(source.label, what)] if drawn else []


def _classifier(source: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    """The class of the reward model that a config belongs to."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    try:
        with torch.device("meta"), quiet():
            return type(AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code))
    except (ValueError, ImportError, OSError, KeyError) as error:
        what = f"is a {config.model_type} model, for which there is no sequence classifier"
        raise RefusedError([Finding(source.label, what)]) from error


def _is_output(module: Any, name: str) -> bool:
    """Whether a parameter belongs to a layer after the base model that has one output."""
    layer = module.get_submodule(name.rpartition(".")[0])
    return name.split(".")[0] in head_layers(module) and getattr(layer, "out_features", None) == 1


def _write_folder(out: Path, module: Any, files: Mapping[str, bytes]) -> None:
    """A module and small files as a folder that is there as a whole or not at all."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet(), naming(out):
            module.save_pretrained(partial, max_shard_size="5GB")
        config = json.loads((partial / "config.json").read_text())
        config.pop("_name_or_path", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, data in files.items():
            (partial / name).write_bytes(data)
        mode = (partial / MANIFEST).stat().st_mode  # as the umask has it; safetensors' files are for their owner alone
        for file in partial.iterdir():
            file.chmod(mode)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# --- both -------------------------------------------------------------------------------------------------------------


def _own_dtype(source: Checkpoint) -> torch.dtype:
    """That of the body; float32, in which none loses anything, where it has several."""
    stored = {tensor.dtype for name, tensor in source.tensors.items() if not is_head(name)}
    found = {TORCH_DTYPE[dtype] for dtype in stored if dtype in TORCH_DTYPE}
    return found.pop() if len(found) == 1 else torch.float32


def _choose_padding(source: Checkpoint, tokenizer: Any, ends: set[int], rows: int) -> list[Finding]:
    """Gives the tokenizer a padding token that no text ends in, and says so if it is not its own.

    Else one that the vocabulary keeps in reserve; else a new one, with the next id.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return []
    reserved = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if i < rows and i not in ends}
    found = [i for i, token in reserved.items() if _RESERVED.search(token)]
    best = min(found, key=lambda i: ("pad" not in reserved[i].lower(), i), default=None)
    tokenizer.add_special_tokens({"pad_token": PAD if best is None else reserved[best]})
    what = f"has no padding token of its own: {quoted(tokenizer.pad_token)} (id {tokenizer.pad_token_id}) was chosen"
    return [Finding(source.label, f"{what}, and saved in config and tokenizer")]


def _ends(config: Any, tokenizer: Any) -> set[int]:
    """Tokens that texts end in: those of the tokenizer and of the model's own generation."""
    said = config.get_text_config().eos_token_id
    return {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}


def _tokenizer_files(source: Checkpoint, changed: Any = None) -> Files:
    """The tokenizer's files to the byte, or as `changed` saves itself; without the place where they once lay."""
    if changed is None:
        folder = small_files.tokenizer_folder(source)
        files = {name: read_bytes(folder, name) for name in small_files.TOKENIZER_FILES if name in folder.sizes()}
    else:
        with tempfile.TemporaryDirectory() as place:
            changed.save_pretrained(place)
            files = {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = {"name_or_path", "_name_or_path"} & settings.keys()
    if named:
        kept = {key: value for key, value in settings.items() if key not in named}
        files["tokenizer_config.json"] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _beside(source: Checkpoint, but: str = "") -> Files:
    """Other small files, and the code of a model that brings its own."""
    names = {*small_files.OTHER_FILES} - {"config.json", but}
    found = {name: data for name in sorted(names) if (data := small_files.small_file(source, name)) is not None}
    return found | (small_files.code_files(source) if (source.config or {}).get("auto_map") else {})


def _record(source: Checkpoint, head: str, seed: int, warnings: list[Finding]) -> dict[str, Any]:
    """What warmerge.json says of a start."""
    return {
        "versions": versions(),
        "start": {
            "checkpoint": source.label,
            **revision_of(source.folder),
            **source.details,
            "fingerprint": read_sample(source).fingerprint,
            "head": head,
            "seed": seed,
        },
        "warnings": [str(warning) for warning in warnings],
    }
