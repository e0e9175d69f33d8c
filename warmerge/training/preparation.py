"""What all members of a run share, made once: the pairs as tokens, the start with its one head, a page that says all.

    RUNS/train.json           what was asked, what came of it, every member: enough to repeat the run
    RUNS/corruption.json      which labels were swapped
    RUNS/pairs.safetensors    the training pairs as token ids
    RUNS/features.safetensors what the probe was fitted on
    RUNS/init/                the start; init-1/, init-2/ ... where there are several
    RUNS/members/01/          a member

A run that was interrupted is prepared again from what is there; one that was prepared is only read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import Finding, UsageError, WarmergeError, plain
from warmerge.rewards.bench import Bench, Measuring, cut_words, open_bench
from warmerge.rewards.corruption import Corruption, corrupt
from warmerge.rewards.layouts import canonical
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.rewards.pairs import PreferenceSet, UniqueTexts, read_preferences, unique_texts
from warmerge.rewards.scoring import Tokens
from warmerge.training.head import has_head, head_digest, write_head
from warmerge.training.probe import Probe, probe_head
from warmerge.training.recipe import Member, Recipe
from warmerge.training.record import (
    TRAIN,
    Asked,
    begun,
    only_preparation,
    question_of,
    write_json,
    write_members,
)
from warmerge.training.settings import TrainSettings, default_lr, filled_in, members
from warmerge.training.sft import fine_tune
from warmerge.training.start import make_start
from warmerge.training.training_set import TrainingSet, pair_clusters, save_pairs, tokenise_pairs
from warmerge.training.unit import accuracies
from warmerge.version import versions
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import LocalFolder
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.samples import read_sample

CORRUPTION, PAIRS, FEATURES = "corruption.json", "pairs.safetensors", "features.safetensors"


@dataclass(frozen=True)
class Run:
    """A run that was prepared: its members, how its start does on the validation sets, and what is said of it."""

    out: Path
    members: tuple[Member, ...]
    start: dict[str, dict[str, float]]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]


def prepare_run(
    asked: Asked, out: Path, measuring: Measuring, command: Sequence[str], say: Callable[[str], None]
) -> Run:
    """Makes what members share, or reads it where the same run was prepared before.

    Args:
        say: is told what is being done, a line each.

    Raises:
        UsageError: another run lies in `out`; an argument that cannot be used.
        RefusedError: a base, or data, that no reward model can be trained from.
        WarmergeError: the disk has not enough room; another process is preparing a run in `out`.
    """
    preferences = read_preferences(
        asked.data, skip_bad_rows=measuring.skip_bad_rows, limit=measuring.limit, seed=measuring.seed
    )
    if asked.settings.recipe.use_margins and not any(comparison.margin for comparison in preferences.comparisons):
        raise UsageError(f"--margins: {plain(asked.data)} has no column 'margin', or zeros in it; leave --margins away")
    bases = [open_checkpoint(base) for base in asked.base]  # what is not there is said before anything is written
    bench = open_bench(asked.val, measuring) if asked.val else Bench((), measuring)
    question = question_of(
        asked, preferences, measuring, [read_sample(base).fingerprint for base in bases],
        [subset.preferences.fingerprint for subset in bench.sets],
    )  # fmt: skip
    record = begun(out, question)
    if not record:
        with only_preparation(out):
            record = begun(out, question)  # by another process, since
            if not record:
                said = {"format": "warmerge train 1", "asked": question}
                write_json(out / TRAIN, said)
                record = _prepared(asked, out, bases, preferences, bench, say)
                write_json(out / TRAIN, {**said, "command": list(command), **record})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # members will be trained by other processes
    # More runs may be asked for later: the first ones stay what they were.
    recipe, lr = Recipe(**record["recipe"]), tuple(record["lr"])
    made = members(asked.settings, recipe, lr, record["inits"], record["head"], record["pairs"])
    write_members(out, made)
    notes, warnings = record["notes"], [Finding(**entry) for entry in record["warnings"]]
    return Run(out, tuple(made), record["start"], tuple(notes), tuple(warnings))


def _prepared(
    asked: Asked,
    out: Path,
    bases: Sequence[Checkpoint],
    preferences: PreferenceSet,
    bench: Bench,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The shared files, and what train.json says of them."""
    texts, measuring = unique_texts(preferences), bench.measuring
    swapped = corrupt(preferences.fingerprint, len(texts.chosen), *asked.corruption)
    if swapped.swapped:
        write_json(out / CORRUPTION, asdict(swapped))
    else:
        (out / CORRUPTION).unlink(missing_ok=True)  # of a run that was asked for before, and interrupted
    warnings = _shared_prompts(preferences, bench)
    sources = _sources(asked, out, bases, preferences, swapped, measuring.loading, say)
    inits = ["init"] if len(sources) == 1 else [f"init-{k}" for k in range(1, len(sources) + 1)]
    for source, init in zip(sources, inits, strict=True):
        shutil.rmtree(out / init, ignore_errors=True)
        warnings += make_start(
            source, out / init, trust_remote_code=measuring.loading.trust_remote_code, seed=asked.settings.seed
        )
        _settle_text_rule(out / init, measuring.loading)
    model = load_reward_model(out / inits[-1], measuring.loading)
    tokens = Tokens(model.renderer, texts.texts)
    pairs = tokenise_pairs(preferences, texts, tokens, swapped.swapped)
    fingerprint = _fingerprint(preferences, swapped, model)
    save_pairs(pairs, out / PAIRS, fingerprint)
    fitted = _fit_head(asked, out, inits, model, tokens, pairs, texts, measuring, say)
    if fitted is None and not has_head(sources[-1]):
        what = "--no-probe: members start from one random head; WARM fits it first, so that features are kept"
        warnings.append(Finding(str(out / inits[-1]), what))
    recipe = _recipe(asked.settings, len(pairs), out / inits[-1], measuring.loading)
    parameters = sum(p.numel() for p in model.module.parameters())
    check_disk(out, asked.settings.runs, parameters, recipe, say)
    return {
        "versions": versions(),
        "inits": inits,
        "head": head_digest(out / inits[-1]),
        "pairs": fingerprint,
        "comparisons": len(texts.chosen),
        "training_pairs": len(pairs),
        "swapped": len(swapped.swapped),
        "parameters": parameters,
        "recipe": asdict(recipe),
        "lr": list(asked.settings.lr or default_lr(parameters, recipe.lora)),
        "probe": None if fitted is None else {key: value for key, value in vars(fitted).items() if key != "weight"},
        "start": _measured(out / inits[-1], asked.val, measuring),
        "notes": _notes(tokens, preferences),
        "warnings": [vars(warning) for warning in dict.fromkeys(warnings)],
        **_for_members(asked, measuring),
    }


def _sources(
    asked: Asked,
    out: Path,
    bases: Sequence[Checkpoint],
    preferences: PreferenceSet,
    swapped: Corruption,
    loading: LoadOptions,
    say: Callable[[str], None],
) -> list[Checkpoint]:
    """The checkpoints that members start from, on this machine; after supervised fine-tuning if that was asked for."""
    local = make_local(bases)
    if asked.sft is None:
        return local
    if len(local) > 1:
        raise UsageError("--sft-steps makes the starts from one --base; leave --init away, or --sft-steps")
    folder, wrong = local[0].folder, set(swapped.swapped)
    if not isinstance(folder, LocalFolder):
        raise WarmergeError(f"{local[0].label}: expected files on this machine")
    say(f"fine-tuning {plain(local[0].label)} on the chosen answers for {asked.sft.steps} steps")
    answers = [
        (comparison.prompt, answer)
        for k, comparison in enumerate(preferences.comparisons)
        for answer in (comparison.rejected if k in wrong else comparison.chosen)
    ]
    kept = fine_tune(folder.path, answers, out / "sft", asked.sft, loading.template)
    return make_local([open_checkpoint(folder) for folder in kept])


def _settle_text_rule(init: Path, loading: LoadOptions) -> None:
    """What was asked of texts becomes the start's own rule, and so every member's: a reward model has to be used on
    texts that look as they did in training."""
    path = init / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = dict(settings)
    if loading.template == "plain":
        settings.pop("chat_template", None)
        (init / "chat_template.jinja").unlink(missing_ok=True)
        shutil.rmtree(init / "additional_chat_templates", ignore_errors=True)
    if loading.max_length is not None:
        settings["model_max_length"] = loading.max_length
    if settings != before:
        write_json(path, settings)


def _fit_head(
    asked: Asked,
    out: Path,
    inits: Sequence[str],
    model: RewardModel,
    tokens: Tokens,
    pairs: TrainingSet,
    texts: UniqueTexts,
    measuring: Measuring,
    say: Callable[[str], None],
) -> Probe | None:
    """One head, fitted on the last start's features, for all starts: those after it would not be connected else."""
    if not asked.probe:
        if len(inits) > 1:
            raise UsageError("--no-probe with several starts: each would have a head of its own")
        return None
    say(f"fitting the head on the features of {len(texts.texts)} texts")
    measuring.on_work(len(texts.texts))
    fitted = probe_head(
        model, tokens, pairs, pair_clusters(texts), cache=out / FEATURES, seed=asked.settings.seed,
        batch_tokens=measuring.batch_tokens, progress=measuring.progress,
    )  # fmt: skip
    for init in inits:
        write_head(out / init, fitted.weight)
    held_out = next((entry for entry in fitted.tried if entry["strength"] == fitted.strength), None)
    if held_out is not None:
        say(f"probe: right on {held_out['accuracy']:.3f} of the pairs of a held-out fifth of the prompts")
    return fitted


def _fingerprint(preferences: PreferenceSet, swapped: Corruption, model: RewardModel) -> str:
    """Stands for the training pairs as they are trained on: texts, labels, and the rule that made tokens of them."""
    renderer = model.renderer
    parts = [
        preferences.fingerprint, [comparison.margin for comparison in preferences.comparisons], swapped.swapped,
        renderer.digest, renderer.template, renderer.max_length, renderer.ends,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recipe(settings: TrainSettings, pairs: int, init: Path, loading: LoadOptions) -> Recipe:
    """The recipe with everything said: members are saved in the dtype of their start."""
    stored = {tensor.dtype for tensor in open_checkpoint(init).tensors.values()}
    dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(stored.pop() if len(stored) == 1 else "F32")
    recipe = filled_in(settings, pairs)
    return replace(
        recipe, dtype=dtype or "float32", max_length=loading.max_length, trust_remote_code=loading.trust_remote_code
    )


def check_disk(out: Path, runs: int, parameters: int, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Says what will be written, and refuses what does not fit."""
    member = parameters * (4 if recipe.dtype == "float32" else 2)
    # Weights and Adam's two moments in float32; the new checkpoint is whole before the old one goes.
    state = 0 if recipe.steps <= recipe.save_every else 2 * parameters * (4 if recipe.lora else 12)
    free = shutil.disk_usage(out).free
    said = f"{runs} members of {member / 1e6:,.0f} MB"
    said += f", checkpoints of up to {state / 1e6:,.0f} MB for each member at work" if state else ""
    say(f"disk: {said}; {free / 1e6:,.0f} MB are free")
    kept = runs * state // 2 if recipe.keep_checkpoints else 0
    if runs * member + max(state, kept) > free:
        raise WarmergeError(f"{plain(str(out))}: {said} do not fit in the {free / 1e6:,.0f} MB that are free")


def _measured(init: Path, val: Sequence[str], measuring: Measuring) -> dict[str, dict[str, float]]:
    """How the start does on the validation sets: what fine-tuning has to beat."""
    if not val:
        return {}
    return accuracies(load_reward_model(init, measuring.loading), val, measuring)


def _shared_prompts(preferences: PreferenceSet, bench: Bench) -> list[Finding]:
    """Warnings of validation sets that hold prompts of the training set."""
    trained = {_prompt(comparison) for comparison in preferences.comparisons}
    warnings = []
    for subset in bench.sets:
        prompts = {_prompt(comparison) for comparison in subset.preferences.comparisons}
        if both := len(prompts & trained):
            what = f"shares {both} of its {len(prompts)} prompts with the training pairs: its accuracies flatter"
            warnings.append(Finding(subset.name, what))
    return warnings


def _prompt(comparison: Any) -> str:
    return canonical(comparison.prompt) if comparison.prompt else str(comparison.cluster)


def _notes(tokens: Tokens, preferences: PreferenceSet) -> list[str]:
    words = cut_words(len(tokens.texts), *tokens.cut())
    notes = [f"training pairs: {words}"] if words else []
    return notes + ([f"training pairs: {preferences.skipped} bad rows were left out"] if preferences.skipped else [])


def _for_members(asked: Asked, measuring: Measuring) -> dict[str, Any]:
    """What a member needs to measure itself, wherever it is trained: paths are absolute."""
    keys = ("limit", "resamples", "seed", "skip_bad_rows", "batch_tokens")
    return {
        "val": [_absolute(spec) for spec in asked.val],
        "loading": asdict(measuring.loading),
        "measuring": {key: getattr(measuring, key) for key in keys},
    }


def _absolute(spec: str) -> str:
    from warmerge.rewards.rows import parse_named

    name, source = parse_named(spec)
    return f"{name}={Path(source).absolute() if Path(source).exists() else source}"
