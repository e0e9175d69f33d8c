"""The lines of Python in a model card, run as they stand: what a reader gets is what they printed here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from warmerge.errors import Finding, RefusedError
from warmerge.report.card import ANSWER, PROMPT, Example, scoring_lines
from warmerge.rewards.config import transformers_config
from warmerge.rewards.model import LoadOptions, is_causal, load_reward_model
from warmerge.rewards.render import Renderer
from warmerge.rewards.scoring import Tokens, score
from warmerge.rewards.tokenizer import open_renderer, quiet
from warmerge.weights.checkpoint import Checkpoint

# Between the card's lines and warmerge's own scorer: both in float32, in sums of another order.
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Texts:
    """How the model's texts are made: "chat" or "plain", and whether a plain one gets an end-of-sequence token."""

    rule: str
    ends_in_eos: bool


def run_example(checkpoint: Checkpoint, folder: Path, place: str, revision: str | None) -> tuple[Texts, Example]:
    """Runs the card's lines on the folder, and compares what they print with warmerge's own reward of that answer.

    Args:
        place, revision: what stands in the card in place of the folder.

    Raises:
        RefusedError: the model does not load (a weight is missing, unexpected or of another shape, no tokenizer), the
            lines fail, or they print another reward than warmerge gives.
    """
    model = load_reward_model(checkpoint, LoadOptions(device="cpu", dtype="float32"))
    reward = float(score(model, Tokens(model.renderer, [(PROMPT, ANSWER)]))[0])
    texts = _texts(model.renderer)
    del model  # the lines load it once more
    lines = scoring_lines(str(folder), texts.rule, ends_in_eos=texts.ends_in_eos)
    ended = _run(lines)
    said = ended.stdout.strip()
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RefusedError([Finding(str(folder), f"is not loaded by the lines of its model card: {last[:300]}")])
    if not _is_number(said) or not abs(float(said) - reward) <= _TOLERANCE * max(1.0, abs(reward)):
        what = (
            f"gets reward {said[:60]} from the lines of its model card, {reward:.4f} from warmerge; do not use either"
        )
        raise RefusedError([Finding(str(folder), what)])
    return texts, Example(scoring_lines(place, texts.rule, revision, ends_in_eos=texts.ends_in_eos), said)


def texts_of(checkpoint: Checkpoint) -> Texts:
    """How the model's texts are made, from its config and tokenizer alone: whatever its size, no weight is read.

    Raises:
        RefusedError: a config that is no reward model's, or a tokenizer that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = transformers_config(checkpoint, trust_remote_code=False)
    try:
        with torch.device("meta"), quiet():
            module = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # each model class has its own ways to fail on a value
        what = f"makes no model, so nobody can load it: {error}"
        raise RefusedError([Finding(f"{checkpoint.label}/config.json", what[:400])]) from error
    return _texts(open_renderer(checkpoint, module, "auto", None, is_causal(module), trust_remote_code=False))


def fits_in_memory(checkpoint: Checkpoint) -> bool:
    """Whether there is room for the model in float32 (four bytes a parameter, and some)."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux: the system swaps, and the user knows the machine
        return True
    return checkpoint.parameters * 4 * 1.3 < free


def _texts(renderer: Renderer) -> Texts:
    own = renderer.tokenizer("a")["input_ids"]
    ends = renderer.ends is not None and own[-1:] != [renderer.ends]
    return Texts(renderer.template, renderer.template == "plain" and ends)


def _run(lines: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as elsewhere:  # not where a module of the user's may be called `transformers`
        return subprocess.run(
            [sys.executable, "-c", lines], env=environment, cwd=elsewhere, capture_output=True, text=True, check=False
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
