"""warmerge: one robust reward model out of many (WARM, arXiv 2401.12187).

>>> import warmerge
>>> warmerge.RefusedError.exit_code
3
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from warmerge.errors import Finding, Interrupted, RefusedError, RemoteError, UsageError, WarmergeError

if TYPE_CHECKING:
    from warmerge.pipeline.average import Merged, average, average_into
    from warmerge.pipeline.bon import BestOfN, Policy, best_of_n
    from warmerge.pipeline.evaluate import Evaluation, evaluate
    from warmerge.pipeline.inspect import Inspection, inspect
    from warmerge.pipeline.judging.llm import LlmJudge
    from warmerge.pipeline.lmc import Curve, lmc_curve
    from warmerge.pipeline.probe import Probed, probe
    from warmerge.pipeline.proxies import Proxy
    from warmerge.pipeline.push import Pushed, push
    from warmerge.pipeline.reinforce.settings import RlSettings
    from warmerge.pipeline.report import Report, write_report
    from warmerge.pipeline.rl import Optimised, optimise_policy
    from warmerge.pipeline.rl_report import RlReport, rl_report
    from warmerge.pipeline.sampling import SampledPool, Sampling, sample_pool
    from warmerge.pipeline.score import ScoredFile, reward_function, score_file
    from warmerge.pipeline.theory import Theory, simulate_theory
    from warmerge.pipeline.train import Trained, train
    from warmerge.pipeline.vs_m import AccuracyVsM, accuracy_vs_m
    from warmerge.pipeline.winrate import WinRates, win_rate
    from warmerge.rewards.bench import Measuring
    from warmerge.rewards.feature_theory import FeatureGroup, Scenario
    from warmerge.rewards.model import LoadOptions
    from warmerge.training.recipe import Recipe
    from warmerge.training.settings import TrainSettings
    from warmerge.training.sft import SftRecipe

__all__ = [
    "AccuracyVsM",
    "BestOfN",
    "Curve",
    "Evaluation",
    "FeatureGroup",
    "Finding",
    "Inspection",
    "Interrupted",
    "LlmJudge",
    "LoadOptions",
    "Measuring",
    "Merged",
    "Optimised",
    "Policy",
    "Probed",
    "Proxy",
    "Pushed",
    "Recipe",
    "RefusedError",
    "RemoteError",
    "Report",
    "RlReport",
    "RlSettings",
    "SampledPool",
    "Sampling",
    "Scenario",
    "ScoredFile",
    "SftRecipe",
    "Theory",
    "TrainSettings",
    "Trained",
    "UsageError",
    "WarmergeError",
    "WinRates",
    "accuracy_vs_m",
    "average",
    "average_into",
    "best_of_n",
    "evaluate",
    "inspect",
    "lmc_curve",
    "optimise_policy",
    "probe",
    "push",
    "reward_function",
    "rl_report",
    "sample_pool",
    "score_file",
    "simulate_theory",
    "train",
    "win_rate",
    "write_report",
]

# Imported when first used, so that `import warmerge` does not import torch.
_LAZY = {
    "Merged": "warmerge.pipeline.average",
    "average": "warmerge.pipeline.average",
    "average_into": "warmerge.pipeline.average",
    "BestOfN": "warmerge.pipeline.bon",
    "Policy": "warmerge.pipeline.bon",
    "best_of_n": "warmerge.pipeline.bon",
    "Proxy": "warmerge.pipeline.proxies",
    "RlReport": "warmerge.pipeline.rl_report",
    "rl_report": "warmerge.pipeline.rl_report",
    "SampledPool": "warmerge.pipeline.sampling",
    "Sampling": "warmerge.pipeline.sampling",
    "sample_pool": "warmerge.pipeline.sampling",
    "Evaluation": "warmerge.pipeline.evaluate",
    "evaluate": "warmerge.pipeline.evaluate",
    "Inspection": "warmerge.pipeline.inspect",
    "inspect": "warmerge.pipeline.inspect",
    "Curve": "warmerge.pipeline.lmc",
    "lmc_curve": "warmerge.pipeline.lmc",
    "ScoredFile": "warmerge.pipeline.score",
    "reward_function": "warmerge.pipeline.score",
    "score_file": "warmerge.pipeline.score",
    "AccuracyVsM": "warmerge.pipeline.vs_m",
    "accuracy_vs_m": "warmerge.pipeline.vs_m",
    "LlmJudge": "warmerge.pipeline.judging.llm",
    "WinRates": "warmerge.pipeline.winrate",
    "win_rate": "warmerge.pipeline.winrate",
    "Probed": "warmerge.pipeline.probe",
    "probe": "warmerge.pipeline.probe",
    "Pushed": "warmerge.pipeline.push",
    "push": "warmerge.pipeline.push",
    "Report": "warmerge.pipeline.report",
    "write_report": "warmerge.pipeline.report",
    "RlSettings": "warmerge.pipeline.reinforce.settings",
    "Optimised": "warmerge.pipeline.rl",
    "optimise_policy": "warmerge.pipeline.rl",
    "Theory": "warmerge.pipeline.theory",
    "simulate_theory": "warmerge.pipeline.theory",
    "Trained": "warmerge.pipeline.train",
    "train": "warmerge.pipeline.train",
    "Recipe": "warmerge.training.recipe",
    "TrainSettings": "warmerge.training.settings",
    "SftRecipe": "warmerge.training.sft",
    "Measuring": "warmerge.rewards.bench",
    "FeatureGroup": "warmerge.rewards.feature_theory",
    "Scenario": "warmerge.rewards.feature_theory",
    "LoadOptions": "warmerge.rewards.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'warmerge' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
