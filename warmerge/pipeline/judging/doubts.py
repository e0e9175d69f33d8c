"""What a judge may have in common with what it judges: rewards that a policy was optimised for flatter it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from warmerge.errors import Finding, WarmergeError, plain, quoted, some
from warmerge.pipeline.found.rl_runs import RECORD
from warmerge.pipeline.judging.contenders import Contender
from warmerge.pipeline.sampling import read_prompts
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.rewarders import OwnFunction, open_rewarder
from warmerge.rewards.layouts import Text
from warmerge.rewards.pools import said
from warmerge.training.seen import seen_in_training
from warmerge.weights.foreign_json import parse, text_of


def judge_doubts(
    judge: Judge | OwnFunction, spec: str, contenders: Sequence[Contender], prompts: Sequence[Text]
) -> list[Finding]:
    """Warnings: a judge that is, or was made of, what a policy was optimised for; one trained on these prompts."""
    found = list(judge.warnings) if isinstance(judge, Judge) else []
    own = _ingredients(judge)
    for run in dict.fromkeys(contender.run for contender in contenders if contender.run is not None):
        found += _shared(run, own, spec)
    if isinstance(judge, Judge):
        found += seen_in_training(judge.folders, prompts)
    return found


def prompt_doubts(contenders: Sequence[Contender], prompts: Sequence[Text]) -> list[Finding]:
    """Warnings: policies that were optimised on these very prompts."""
    runs = dict.fromkeys(contender.run for contender in contenders if contender.run is not None)
    return [finding for run in runs for finding in _trained_on(run, prompts)]


def _shared(run: Path, own: set[str], spec: str) -> list[Finding]:
    """What the proxy of an rl run has in common with a judge of these ingredients."""
    try:
        proxy = parse(text_of(run / RECORD))["proxy"]
        name, checkpoints = str(proxy["name"]), [str(checkpoint) for checkpoint in proxy["checkpoints"]]
    except (OSError, ValueError, KeyError, TypeError):
        what = "cannot be read: whether the judge is what this run was optimised for is unknown"
        return [Finding(str(run / RECORD), what)]
    unknown = []
    for checkpoint in checkpoints:
        theirs = {spec} if checkpoint == spec else _opened(checkpoint, run)
        if theirs is None:
            unknown.append(checkpoint)
        elif theirs & {*own, spec}:
            what = f"shares weights with {quoted(name)}, which the policies of {plain(str(run))} were optimised for"
            return [Finding(spec, f"{what}: it flatters them; judge by another model")]
    if not unknown:
        return []
    what = f"its proxy {quoted(name)} is not here ({some(unknown)}): whether the judge shares its weights is unknown"
    return [Finding(str(run / RECORD), what)]


def _trained_on(run: Path, prompts: Sequence[Text]) -> list[Finding]:
    """A warning where a run's policies were optimised on some of these prompts, or might have been."""
    try:
        source = str(parse(text_of(run / RECORD))["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not a run of this version: nothing is known of its prompts
    path = next((place for place in (Path(source), run.parent / source, run / source) if place.exists()), None)
    try:
        known = None if path is None else {said(text) for text in read_prompts(str(path), skip_bad_rows=True).texts}
    except WarmergeError:
        known = None
    if known is None:
        what = f"its prompts {plain(source)} are not here: whether they hold the ones that are judged is unknown"
        return [Finding(str(run / RECORD), what)]
    both = known & {said(prompt) for prompt in prompts}
    what = f"{len(both)} of {len(prompts)} prompts are among those that its policies were optimised on; use other ones"
    return [Finding(str(run / RECORD), what)] if both else []


def _opened(checkpoint: str, run: Path) -> set[str] | None:
    """The ingredients of what a run was optimised for; None where it is not on this machine, or cannot be opened."""
    # As it was typed: relative to here most often, or to where the run lies.
    places = [checkpoint, str(run.parent / checkpoint), str(run / checkpoint)]
    for place in places:
        file = place.rpartition(":")[0]
        if Path(place).exists() or (file.endswith(".py") and Path(file).is_file()):
            try:
                return _ingredients(open_rewarder(place))
            except WarmergeError:
                return None
    return None


def _ingredients(judge: Judge | OwnFunction) -> set[str]:
    """What a judge's rewards are made of; of a function, its file and name."""
    return {"\0".join(judge.contents())} if isinstance(judge, OwnFunction) else judge.ingredients()
