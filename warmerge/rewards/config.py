"""What a config.json means: with what it leaves out, as transformers fills it in; and as a reward model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from warmerge.errors import Finding, RefusedError
from warmerge.weights import small_files
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import LocalFolder
from warmerge.weights.heads import FINAL_WEIGHTS, HEAD_RENAMES

# How a model computes, not what. With `kernels` installed, transformers takes some of their values for compiled code
# that it is to fetch from the Hub.
_IMPLEMENTATIONS = frozenset(
    {
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    }
)  # fmt: skip


def effective_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """All fields of a config, with the defaults of its model type; None where these are not known.

    Two versions of transformers write the same model in different words (rope_theta or rope_parameters, defaults
    spelled out or not); read back by one version they are equal. Not known are model types that this version does not
    have, or that bring code of their own, and configs that it cannot read.

    >>> short = effective_config({"model_type": "llama"})
    >>> long = effective_config({"model_type": "llama", "rms_norm_eps": 1e-6})
    >>> short == long
    True
    """
    from transformers import AutoConfig

    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None or "auto_map" in values:
        return None
    try:
        fields: Mapping[str, Any] = AutoConfig.for_model(model_type, **values).to_dict()
    except Exception:  # noqa: BLE001 - each model type's config class has its own ways to fail on a value
        return None
    return fields


def transformers_config(source: Checkpoint, trust_remote_code: bool, labels: int | None = None) -> Any:
    """The transformers config of a reward model.

    Args:
        labels: how many its head is to have; if not given, what config.json says, or where it says nothing the head.

    Raises:
        RefusedError: no config, an unknown or a quantised one, untrusted model code, more labels than one.
    """
    from transformers import AutoConfig

    stored, where = source.config, f"{source.label}/config.json"
    if stored is None:
        raise RefusedError([Finding(source.label, "has no config.json, so its architecture is not known; add it")])
    findings = [
        Finding(where, f"is quantised ({key}); score the unquantised checkpoint")
        for key in ("quantization_config", "compression_config")
        if stored.get(key)
    ]
    if stored.get("auto_map") and not trust_remote_code:
        what = "brings its own model code (auto_map); --trust-remote-code runs it, if you trust its authors"
        findings.append(Finding(where, what))
    value_head = any(name in HEAD_RENAMES for name in source.tensors)
    unsaid = "id2label" not in stored and "num_labels" not in stored
    one_row = any(source.tensors[name].shape[:1] == (1,) for name in FINAL_WEIGHTS if name in source.tensors)
    labels = labels or (1 if value_head or (unsaid and one_row) else small_files.num_labels(stored))
    if labels != 1:
        findings.append(Finding(where, f"has {labels} labels; a reward model has one (num_labels: 1)"))
    if findings:
        raise RefusedError(findings)
    try:
        if stored.get("auto_map") and isinstance(source.folder, LocalFolder):
            return AutoConfig.from_pretrained(source.folder.path, num_labels=1, trust_remote_code=True)
        said = _without_implementations(stored)
        said = {key: value for key, value in said.items() if key not in ("model_type", "id2label", "label2id")}
        said |= {"num_labels": 1} | ({"pad_token_id": None} if value_head else {})
        return AutoConfig.for_model(str(stored.get("model_type")), **said)
    except Exception as error:  # each config class has its own ways to fail on a value
        what = f"is not a config that transformers knows (model_type {stored.get('model_type')!r}): {error}"
        raise RefusedError([Finding(where, what[:400])]) from error


def _without_implementations(part: Any) -> Any:
    """A config, or a part of one, whose author does not choose what computes its attention and its experts."""
    if isinstance(part, Mapping):
        return {key: _without_implementations(value) for key, value in part.items() if key not in _IMPLEMENTATIONS}
    return [_without_implementations(value) for value in part] if isinstance(part, list) else part


def set_dropout(config: Any, probability: float) -> list[str]:
    """Sets every dropout of a config, and returns their names: before the model is made, so that those which a model
    applies by itself (Llama's attention) or leaves out where they are zero (ModernBERT's) are among them."""
    names = [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and (value is None or type(value) in (int, float))
    ]
    for name in names:
        setattr(config, name, probability)
    inner = config.get_text_config()
    return names if inner is config else names + set_dropout(inner, probability)
