"""Rows -> figures and texts for people. The only module that imports matplotlib."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def model_card(manifest: Mapping[str, Any], architecture: str) -> str:
    """README.md of a merged checkpoint: what it is, of what, how, and how to load it. No local path is in it.

    Args:
        manifest: as in warmerge.json: `rule`, `inputs`, `coefficients` or None while they are not yet measured.
        architecture: class name in the config, for the lines that load it.
    """
    members = [entry for entry in manifest["inputs"] if entry["role"] == "member"]
    base = next((entry for entry in manifest["inputs"] if entry["role"] == "base"), None)
    ids = [entry["repo"] for entry in manifest["inputs"] if "repo" in entry]
    front = ["---", "library_name: transformers", "tags:", "- warmerge", "- model-merging", "- reward-model"]
    if "ForSequenceClassification" in architecture:
        front.insert(2, "pipeline_tag: text-classification")
    if ids:
        front += ["base_model:", *(f"- {json.dumps(repo)}" for repo in dict.fromkeys(ids))]
        front += ["base_model_relation: merge"]
    lines = [
        *front,
        "---",
        "",
        "# Merged reward model",
        "",
        f"The {manifest['rule']['name']} merge of {len(members)} checkpoints, by warmerge {manifest['warmerge']}:",
        f"`{manifest['rule']['formula']}` ({manifest['rule']['source']}), tensor by tensor, in float64, rounded once.",
        "",
        "| input | role | fingerprint of its weights |",
        "|---|---|---|",
    ]
    for number, entry in enumerate(members, start=1):
        lines.append(f"| {_origin(entry)} | member {number} | `{entry['fingerprint'][:16]}` |")
    if base is not None:
        lines.append(f"| {_origin(base)} | base | `{base['fingerprint'][:16]}` |")
    if "ForSequenceClassification" in architecture:
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            "model = AutoModelForSequenceClassification.from_pretrained(FOLDER).eval()  # this folder",
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
            'reward = model(**tokenizer("text", return_tensors="pt")).logits[0, 0].item()',
            "```",
        ]
    lines += [
        "",
        "Biases that all members share stay in the average. Nothing has been measured on this model unless it is",
        "written here. The full record of inputs, coefficients and versions is in `warmerge.json`.",
    ]
    return "\n".join(lines) + "\n"


def heat_map(
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    title: str,
    unit: str,
    path: Path,
    limits: tuple[float, float] | None = None,
) -> None:
    """A PNG of a square matrix (M, M), each value written into its cell.

    Args:
        values: NaN leaves its cell empty.
        labels: one for each row and column.
        unit: what the colours measure.
        limits: the values at the ends of the colour scale; 0 and the largest value if not given.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    count, diverging = len(labels), limits is not None
    low, high = limits or (0.0, max((v for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0)
    size = max(3.6, 1.6 + 0.62 * count)
    figure = Figure(figsize=(size + 1.4, size), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=low, vmax=high, cmap="RdBu_r" if diverging else "Blues")
    names = [label if len(label) <= 24 else "..." + label[-21:] for label in labels]
    axes.set_xticks(range(count), names, rotation=40, ha="right")
    axes.set_yticks(range(count), names)
    for i in range(count):
        for j in range(count):
            value = values[i][j]
            dark = abs(value) > 0.6 * max(abs(low), abs(high))
            text = "-" if math.isnan(value) else f"{value:.2f}" if diverging else f"{value:.3g}"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=unit, shrink=0.85)
    figure.savefig(path)


def _origin(entry: Mapping[str, Any]) -> str:
    if "repo" not in entry:
        return "local"
    return f"[{entry['repo']}](https://huggingface.co/{entry['repo']}/tree/{entry['revision']})"
