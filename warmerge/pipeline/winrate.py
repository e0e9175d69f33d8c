"""`warmerge winrate`: policies answer the same prompts, and a judge says of each two answers which one is better.

OUT/answers/NAME.jsonl   each policy's answers, sampled once
OUT/verdicts.jsonl       what a language model replied, each reply as it came
OUT/rewards.jsonl        what a reward model gave
OUT/winrate.json, .csv   every number; winrate.png and .svg are drawn from them
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, UsageError, counted, plain
from warmerge.pipeline.judging.contenders import (
    Answers,
    Contender,
    answers_of,
    check_policies,
    parse_contenders,
    shared_prompts,
)
from warmerge.pipeline.judging.doubts import judge_doubts, prompt_doubts
from warmerge.pipeline.judging.llm import LlmJudge, is_address
from warmerge.pipeline.judging.matches import Match, Pair, by_llm, by_rewards
from warmerge.pipeline.judging.template import digest_of
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.sampling import Prompts, Sampling, read_prompts
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.rewarders import OwnFunction, Rewarder, load_rewarder, open_rewarder
from warmerge.report.results import WINRATE, check_results, without_nan, write_results, write_text
from warmerge.rewards import win_rates
from warmerge.rewards.bench import Measuring, answer_lengths
from warmerge.rewards.metrics import FEW
from warmerge.rewards.pools import said
from warmerge.version import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Array = NDArray[numpy.float64]

PROMPTS = "prompts.jsonl"
Load = Callable[[], Rewarder]
# WARM (arXiv 2401.12187) and others compare policies by answers that are sampled, at this temperature.
SAMPLING = Sampling(n=1, temperature=0.9)


@dataclass(frozen=True)
class WinRates:
    """What `win_rate` found. Rows are plain: what is in winrate.json and the CSV files.

    `rows`: how often a policy wins against another one; `pairs`: how the judge came to it; `policies`: who they are.
    """

    rows: tuple[dict[str, Any], ...]
    pairs: tuple[dict[str, Any], ...]
    policies: tuple[dict[str, Any], ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        tables = {name: list(getattr(self, name)) for name in ("rows", "pairs", "policies")}
        return {**self.record, **tables, "warnings": [str(warning) for warning in self.warnings]}


def win_rate(
    policies: Sequence[Spec],
    prompts: str,
    judge: Spec | LlmJudge,
    out: Spec,
    *,
    against: str | None = None,
    sampling: Sampling | None = None,
    measuring: Measuring | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> WinRates:
    """How often each policy's answer is judged better than another's to the same prompt: (wins + ties / 2) / n.

    Each policy answers each prompt once. By a reward model or a function the larger reward wins. A language model is
    asked about both orders of every pair: where its verdicts agree they count, where not, it is a tie. Answers that are
    the same tie without a question. Beside each win rate stands that of a judge that only counts characters.

    Args:
        policies: `[NAME=]LM`, causal language models; or files of answers, with `prompt` and `candidates`, of which the
            first counts.
        prompts: rows with `prompt`: a file, a folder, or a data set on the Hub.
        judge: a reward model, `FILE.py:FUNCTION`, or a language model behind an address.
        out: a folder for answers, verdicts, results and figures.
        against: compare all with this one only: the name of a policy, or another policy. If not given, all pairs.
        sampling: how answers are drawn, `SAMPLING` if not given; `n` is 1 and each policy has a seed of its own.
        measuring: how a reward model is loaded, prompts are read (`limit` counts them) and intervals made.
        say: is told what is being done, a line each.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors. Policies are looked at before any is sampled.
        WarmergeError: no reply of a language model can be read. Interrupted: Ctrl-C; the same command goes on.

    Example:
        >>> import warmerge
        >>> judge = warmerge.LlmJudge("http://localhost:8000/v1", "judge")
        >>> won = warmerge.win_rate(["rl/step-500"], "prompts.jsonl", judge, "wins", against="sft")  # doctest: +SKIP
        >>> won.rows[0]["win"]  # doctest: +SKIP
        0.71
    """
    measuring, out = measuring or Measuring(), Path(out)
    asked_for = sampling or SAMPLING
    contenders, chosen = parse_contenders(policies, against)
    check_results(out, WINRATE, overwrite)
    opened, load = _opened(judge, measuring)
    found = read_prompts(prompts, measuring.limit, measuring.seed, measuring.skip_bad_rows)
    check_policies(contenders, asked_for)
    answers = _answered(contenders, prompts, found, out, asked_for, measuring, overwrite, say)
    kept, notes = shared_prompts(found, answers, measuring.skip_bad_rows)
    names = [one.name for one in contenders]
    pairs = [(name, chosen) for name in names if name != chosen] if chosen else list(itertools.combinations(names, 2))
    match = Match(kept, {one.contender.name: one for one in answers}, tuple(pairs))
    warnings = [*_few(match), *prompt_doubts(contenders, kept)]
    warnings += [warning for one in answers for warning in one.warnings]
    if isinstance(opened, LlmJudge):
        warnings += opened.doubts()
        judged = by_llm(opened, match, out, measuring, overwrite, say)
    else:
        warnings += judge_doubts(opened, str(judge), contenders, kept)
        judged = by_rewards(load, match, out, say)
    label = opened.model if isinstance(opened, LlmJudge) else opened.label
    rows = [_row(match, pair, judged.outcomes[pair], label, measuring) for pair in match.pairs]
    record = _record(prompts, found, kept, opened, label, chosen, asked_for, measuring, command)
    record["notes"] = [*_left_out(found), *notes, *judged.notes]
    warnings += judged.warnings
    made = tuple(_policy(match, name) for name in names)
    result = WinRates(tuple(rows), judged.pairs, made, tuple(dict.fromkeys(warnings)), record)
    write_results(out, WINRATE, without_nan(result.as_json()), overwrite=overwrite)
    return result


def _opened(judge: Spec | LlmJudge, measuring: Measuring) -> tuple[LlmJudge | Judge | OwnFunction, Load]:
    """The judge, as far as it can be looked at without asking it anything; and what loads one that gives rewards."""
    if isinstance(judge, LlmJudge):
        judge.key()
        return judge, _never
    if is_address(judge):
        raise UsageError("--judge-model is missing: the name of the model at the address of --judge")
    opened = open_rewarder(judge, measuring.base)
    if isinstance(opened, Judge):
        return opened, lambda: load_rewarder(opened, measuring)
    # Small, and the user's own: a mistake in it is noticed before an hour of sampling.
    function = load_rewarder(opened, measuring)
    return opened, lambda: function


def _never() -> Rewarder:
    raise AssertionError("a language model gives no rewards")


def _answered(
    contenders: Sequence[Contender], prompts: str, found: Prompts, out: Path, sampling: Sampling, measuring: Measuring,
    overwrite: bool, say: Callable[[str], None],
) -> list[Answers]:  # fmt: skip
    """Every policy's answers."""
    source = prompts
    if measuring.limit is not None and any(not one.is_file for one in contenders):
        # Each policy has a seed of its own, and the sample of prompts must be the same for all.
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in found.texts]
        source = str(write_text(out / PROMPTS, "".join(lines)))
    answers = []
    for one in contenders:
        verb = "reading the first candidates of" if one.is_file else f"{counted(len(found.texts), 'answer')} of"
        say(f"{verb} {plain(one.name)}" + ("" if one.name == one.source else f" ({plain(one.source)})"))
        answers.append(answers_of(one, source, out, sampling, measuring, overwrite))
    return answers


def _row(match: Match, pair: Pair, outcomes: Array, judge: str, measuring: Measuring) -> dict[str, Any]:
    """A win rate, with what stands beside it: all over the prompts on which the judge gave a verdict."""
    known = ~numpy.isnan(outcomes)
    clusters = [said(prompt) for prompt in match.prompts]
    rate = win_rates.win_rate(outcomes, clusters, measuring.resamples, measuring.seed)
    first, second = (answer_lengths(list(zip(match.prompts, match.texts(name), strict=True)))[known] for name in pair)
    longer = win_rates.outcomes(first, second)
    policy = match.answers[pair[0]].contender
    counts = [_tokens(match, name) for name in pair]
    tokens, tokens_against = (None if c is None or not known.any() else float(c[known].mean()) for c in counts)
    return {
        "policy": pair[0], "against": pair[1], "judge": judge, "n": rate["n"], "win": rate["win"], "low": rate["low"],
        "high": rate["high"], "wins": rate["wins"], "ties": rate["ties"], "losses": rate["losses"],
        "length_win": float(longer.mean()) if len(longer) else math.nan, "tokens": tokens,
        "tokens_against": tokens_against, "step": policy.step, "proxy": policy.proxy,
    }  # fmt: skip


def _tokens(match: Match, name: str) -> Array | None:
    """(prompts,) tokens of a policy's answers, where they are known."""
    tokens = match.answers[name].tokens
    return None if tokens is None else numpy.array([tokens[said(prompt)] for prompt in match.prompts], dtype=float)


def _policy(match: Match, name: str) -> dict[str, Any]:
    """Who a policy is, and what its answers are like."""
    one, counts = match.answers[name], _tokens(match, name)
    mean = None if counts is None else float(counts.mean())
    texts = list(zip(match.prompts, match.texts(name), strict=True))
    return {
        "policy": name, "source": one.contender.source, "answers": str(one.path), "seed": one.seed,
        "step": one.contender.step, "proxy": one.contender.proxy, "tokens": mean,
        "characters": float(answer_lengths(texts).mean()),
    }  # fmt: skip


def _few(match: Match) -> list[Finding]:
    count = len(match.prompts)
    if count >= FEW:
        return []
    what = f"{counted(count, 'prompt')}: intervals over so few are too narrow to be trusted"
    return [Finding("--prompts", what if count > 1 else "one prompt: its win rate says nothing about others")]


def _left_out(prompts: Prompts) -> list[str]:
    notes = [f"{counted(prompts.skipped, 'bad row')} of the prompts left out"] if prompts.skipped else []
    return notes + ([f"{counted(prompts.repeats, 'row')} of a prompt seen before"] if prompts.repeats else [])


def _record(
    source: str, prompts: Prompts, kept: Sequence[Text], judge: LlmJudge | Judge | OwnFunction, label: str,
    against: str | None, sampling: Sampling, measuring: Measuring, command: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What winrate.json says of how it came about. A key is in none of it."""
    about: dict[str, Any] = {"label": label}
    if isinstance(judge, LlmJudge):
        about |= {**asdict(judge), "template_digest": digest_of(judge.template)}
    elif isinstance(judge, Judge):
        about |= {"fingerprints": list(judge.fingerprints), "loading": asdict(measuring.loading)}
    else:
        about |= {"file_digest": judge.digest}
    chosen = {key: value for key, value in asdict(sampling).items() if key not in ("n", "batch")}
    return {
        "format": "warmerge winrate 1",
        "command": list(command),
        "versions": versions(),
        "prompts": {
            "source": source, "asked": len(prompts.texts), "compared": len(kept), "digest": prompts.digest,
            "skipped_rows": prompts.skipped, "repeats": prompts.repeats,
        },
        "judge": about,
        "against": against,
        "sampling": chosen,
        "intervals": measuring.intervals(),
    }  # fmt: skip
