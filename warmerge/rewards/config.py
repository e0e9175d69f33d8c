"""What a config.json means once transformers has filled in what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def effective_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields in which a config differs from the defaults of its model type.

    Two versions of transformers write the same model in different words (rope_theta or rope_parameters, defaults
    spelled out or not); read back by one version they are equal. A config of a model type that this version does not
    know, or that needs code of its own, is returned as it is.

    >>> short = effective_config({"model_type": "llama"})
    >>> long = effective_config({"model_type": "llama", "rms_norm_eps": 1e-6})
    >>> short == long
    True
    """
    from transformers import AutoConfig

    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None or "auto_map" in values:
        return config
    try:
        read = AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError):
        return config
    fields: Mapping[str, Any] = read.to_diff_dict()
    return fields
