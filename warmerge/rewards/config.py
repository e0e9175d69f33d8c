"""What a config.json means once transformers has filled in what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
