"""Load a reward model to score with, or pour a merge of several into it. Refuses a head that was not there."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, some
from warmerge.rewards.config import set_dropout, transformers_config
from warmerge.rewards.render import Renderer
from warmerge.rewards.tokenizer import open_renderer, pad_doubts, quiet
from warmerge.weights.average import choose_device, merge_into
from warmerge.weights.checkpoint import INDEX, SINGLE, Checkpoint, Stored, Tensor, read_json
from warmerge.weights.folder import LocalFolder, read_bytes
from warmerge.weights.heads import HEAD_RENAMES, is_head
from warmerge.weights.kernels import INTEGER_DTYPE, TORCH_DTYPE
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.plan import MergePlan, choose_threads, plan_merge
from warmerge.weights.rules import RULES, Options
from warmerge.weights.stream import Engine, refuse_changed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The output layer of a language model beside a value head: no reward uses it.
_LM_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight")


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model. `module` is in eval mode, its head in float32.

    `warnings` are reasons for doubt found on loading; `source` is what was loaded.
    """

    label: str
    module: Any
    renderer: Renderer
    warnings: tuple[Finding, ...]
    source: Checkpoint

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


@dataclass(frozen=True)
class LoadOptions:
    """How to load and to render. `device`, `dtype`, `template`: "auto" or one of their names."""

    device: str = "auto"
    dtype: str = "auto"
    template: str = "auto"
    max_length: int | None = None
    trust_remote_code: bool = False


def load_reward_model(
    checkpoint: str | Path | Checkpoint,
    options: LoadOptions | None = None,
    base: str | Path | None = None,
    dropout: float | None = None,
) -> RewardModel:
    """A reward model from a checkpoint: decoder or encoder with one label, LoRA adapter, TRL or OpenRLHF value head.

    Args:
        checkpoint: a folder, a .safetensors file beside its config, a Hub id, or one that was opened already.
        options: device, dtype, text rule, length.
        base: for a LoRA adapter, the model that it adapts.
        dropout: for training, the probability of every dropout that the config knows.

    Raises:
        UsageError: an option that cannot be used; a checkpoint that is not there.
        RefusedError: a weight that is missing, unexpected or of another shape; more labels than one; model code that
            is not trusted; no tokenizer; quantised weights.

    Example:
        >>> load_reward_model("no/such/reward-model").label  # doctest: +SKIP
        'no/such/reward-model'
    """
    options = options or LoadOptions()
    device = _device(options.device)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, base)
    (source,) = make_local([opened])
    dtype = choose_dtype(options.dtype, source, device)
    with quiet():
        config = transformers_config(source, options.trust_remote_code)
        if dropout is not None:
            set_dropout(config, dropout)
        module = _load(source, config, dtype, options.trust_remote_code)
    _head_in_float32(module)
    _set_head(module, {name: _read(source.tensors[name]) for name in source.tensors if is_head(name)})
    module = module.to(device).eval()
    own_weights(module)
    refuse_changed([source])
    causal = is_causal(module)
    renderer = open_renderer(
        source,
        module,
        options.template,
        options.max_length,
        ends_texts=causal,
        trust_remote_code=options.trust_remote_code,
    )
    warnings = pad_doubts(source, renderer.tokenizer, module) if causal else []
    return RewardModel(source.label, module, renderer, tuple(warnings), source)


def fill(model: RewardModel, plan: MergePlan, label: str, threads: int | None = None) -> RewardModel:
    """Streams a merge of checkpoints like the model's own into its module, and returns it under another label.

    The weights are what `average` would write, rounded to the plan's dtype; no file is written. `model` itself has
    them too, for the module is the same; after an error it must not be used.

    Raises:
        RefusedError: the merge and the module do not have the same tensors, or a value is not finite.
    """
    live, engine = model.module.state_dict(), Engine(choose_threads(threads))
    if live.keys() == {tensor.name for tensor in plan.tensors}:
        merge_into(plan, live, engine)
    else:
        # Stored under other names than the live ones (fused experts, old spellings, value heads): by way of a state
        # dict, so that the same conversion applies as on loading.
        weights = _state_dict(plan, engine)
        with quiet():
            other = _from_state_dict(type(model.module), model.module.config, weights, model.module.dtype, model.label)
        model.module.load_state_dict(other.state_dict())
        _set_head(model.module, {name: tensor for name, tensor in weights.items() if is_head(name)})
    return replace(model, label=label)


def own_weights(module: Any) -> None:
    """Copies the weights that are on the CPU. transformers leaves them where their files are mapped into memory: what
    somebody writes into such a file afterwards would change the live model, and a file that is cut would kill us."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def is_causal(module: Any) -> bool:
    """Whether it is a left-to-right decoder whose last token goes through a `score` head, with a cache to reuse."""
    config = module.config.get_text_config()
    return hasattr(module, "score") and hasattr(config, "use_cache") and not module.config.is_encoder_decoder


def _device(name: str) -> torch.device:
    """auto: a GPU if there is one; of several the one that torchrun's processes of this machine divide them by."""
    if name != "auto":
        return choose_device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK", "")
    own = rank.isdecimal() and int(rank) < torch.cuda.device_count()
    return torch.device("cuda", int(rank)) if own else torch.device("cuda")


def choose_dtype(name: str, source: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype that a checkpoint is scored in on a device. auto: the backbone's own on a GPU, float32 if it has
    several; on a CPU float32, or bfloat16 for such a backbone where that is faster.

    Raises:
        UsageError: `name` is neither auto nor one of DTYPES.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype: expected auto, {', '.join(DTYPES)}, found {name!r}")
        return DTYPES[name]
    backbone = [tensor.dtype for name, tensor in source.tensors.items() if not is_head(name)]
    stored = {TORCH_DTYPE[dtype] for dtype in backbone if dtype in TORCH_DTYPE}
    if device.type == "cpu":
        return torch.bfloat16 if stored == {torch.bfloat16} and bfloat16_is_faster() else torch.float32
    return stored.pop() if len(stored) == 1 else torch.float32


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones: measured, some milliseconds."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begun)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def _load(source: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The module in `dtype`: by transformers from the folder, where it would take the same files, else from memory."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    if not (isinstance(source.folder, LocalFolder) and _by_folder(source)):
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            what = f"is a {config.model_type} model, for which transformers has no sequence classifier"
            raise RefusedError([Finding(source.label, what)])
        weights = _state_dict(plan_merge([source], RULES["uniform"], Options()), Engine(choose_threads(None)))
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        with _making(source):
            return _from_state_dict(known, config, weights, dtype, source.label)
    with _making(source):
        module, info = AutoModelForSequenceClassification.from_pretrained(
            source.folder.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are listed, with everything else that is wrong
            output_loading_info=True,
        )
    _refuse_incomplete(source.label, info)
    return module


@contextlib.contextmanager
def _making(source: Checkpoint) -> Iterator[None]:
    """What transformers raises while it makes the model is a refusal: each class has its own ways to fail on a value
    of config.json, a KeyError for a name that it does not know, an AssertionError for a number."""
    try:
        yield
    except (WarmergeError, MemoryError):
        raise
    except Exception as error:
        refuse_changed([source])  # which would be why
        why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError | AssertionError) else str(error)
        raise RefusedError([Finding(source.label, f"cannot be loaded as a reward model: {why}"[:400])]) from error


def _by_folder(source: Checkpoint) -> bool:
    """Whether transformers would find these very tensors, by these names, in the folder."""
    own = all(isinstance(t, Stored) and t.folder is source.folder for t in source.tensors.values())
    index = read_json(source.folder, INDEX) or {}
    found = {SINGLE} if SINGLE in source.folder.sizes() else set(index.get("weight_map", {}).values())
    used = {file for _, file in source.weight_files}
    return own and used == found and HEAD_RENAMES.keys().isdisjoint(source.tensors)


def _from_state_dict(cls: Any, config: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, label: str) -> Any:
    """A model of tensors in memory, through transformers' own renaming and the table of head names."""
    named = {HEAD_RENAMES.get(name, name): tensor for name, tensor in weights.items()}
    if len(named) < len(weights):
        what = f"has several reward heads, {some(filter(is_head, weights))}; remove all but one"
        raise RefusedError([Finding(label, what)])
    bias = None
    if named.keys() != weights.keys():  # a value head beside a language model
        named = {name: tensor for name, tensor in named.items() if name not in _LM_HEADS}
        bias = named.pop("score.bias", None)
    module, info = cls.from_pretrained(
        None, config=config, state_dict=named, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _refuse_incomplete(label, info)
    if bias is not None:
        module.score.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return module


def _state_dict(plan: MergePlan, engine: Engine) -> dict[str, torch.Tensor]:
    """The merged tensors in memory, in the dtype of the plan."""
    dtypes = {**TORCH_DTYPE, **INTEGER_DTYPE}
    tensors = {tensor.name: torch.empty(tensor.shape, dtype=dtypes[tensor.dtype]) for tensor in plan.tensors}
    merge_into(plan, tensors, engine)
    return tensors


def _refuse_incomplete(label: str, info: Mapping[str, Any]) -> None:
    findings = []
    for key, what in (
        ("missing_keys", "missing, so transformers would draw them at random"),
        ("unexpected_keys", "not part of this architecture and would be dropped"),
        ("mismatched_keys", "of another shape than the config says"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(key) or ())
        if names:
            be = "tensor is" if len(names) == 1 else "tensors are"
            findings.append(Finding(label, f"{len(names)} {be} {what}: {some(names)}"))
    if info.get("error_msgs"):
        findings.append(Finding(label, f"cannot be loaded: {info['error_msgs'][0]}"[:400]))
    if findings:
        raise RefusedError(findings)


def head_layers(module: Any) -> dict[str, nn.Module]:
    """The layers after the base model, by name."""
    return {name: child for name, child in module.named_children() if child is not module.base_model}


def _head_in_float32(module: Any) -> None:
    """The layers after the base model compute in float32, whatever the model's dtype: in bfloat16 a reward of 4 has
    steps of .03."""

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    for head in head_layers(module).values():
        head.float().register_forward_pre_hook(widen)


def _set_head(module: Any, stored: Mapping[str, torch.Tensor | None]) -> None:
    """Gives the head its stored values again: float32 ones were rounded to the model's dtype."""
    parameters = dict(module.named_parameters())
    for name, tensor in stored.items():
        live = HEAD_RENAMES.get(name, name)
        if tensor is not None and live in parameters and live.split(".")[0] in head_layers(module):
            parameters[live].data.copy_(tensor)


def _read(tensor: Tensor) -> torch.Tensor | None:
    """The values of a stored tensor; None for one that is no plain floating-point tensor of a file."""
    if not isinstance(tensor, Stored) or tensor.dtype not in TORCH_DTYPE:
        return None
    data = bytearray(read_bytes(tensor.folder, tensor.file, tensor.offset, tensor.nbytes))
    return torch.frombuffer(data, dtype=TORCH_DTYPE[tensor.dtype]).view(tensor.shape)
