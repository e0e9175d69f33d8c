"""Reward heads: which tensors are one, whatever library trained it. A new kind of head is a name or two here."""

from __future__ import annotations

# One component of a tensor's name tells a reward head, whatever the architecture around it.
HEAD_NAMES = frozenset(
    {
        "score", "classifier", "classification_head", "value_head", "v_head", "reward_head", "rm_head",
        "regression_layer", "reward_model_head", "logits_proj",
    }
)  # fmt: skip
# Reward heads by other names: stored -> name in transformers. TRL's and OpenRLHF's heads are linear maps of the hidden
# state of the last token, be it the padding token or not; `score` is the same with a config that has no padding id.
HEAD_RENAMES = {
    "value_head.weight": "score.weight",
    "value_head.bias": "score.bias",
    "v_head.summary.weight": "score.weight",
    "v_head.summary.bias": "score.bias",
}
# Its rows are the model's labels.
FINAL_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a reward head.

    >>> is_head("score.weight"), is_head("model.layers.0.mlp.gate.e_score_correction_bias")
    (True, False)
    """
    return not HEAD_NAMES.isdisjoint(name.split("."))
