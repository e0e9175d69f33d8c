"""What results say about the claims of the WARM paper (arXiv 2401.12187): for each, what was seen, and a verdict.

To add a claim: a function of a result's content that returns `Claim`s, called in the row of its kind of result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from warmerge.errors import UsageError, plain
from warmerge.report.claim import AGREES, DISAGREES, UNCLEAR, Claim
from warmerge.report.claims_on_accuracy import eval_claims
from warmerge.report.claims_on_choices import bon_claims
from warmerge.report.claims_on_paths import curve_claims, vs_m_claims
from warmerge.report.claims_on_policies import rl_claims
from warmerge.report.results import BON, CURVE, EVAL, RL, VS_M

__all__ = ["Claim", "claims_of", "in_words"]

_CLAIMS = {EVAL: eval_claims, CURVE: curve_claims, VS_M: vs_m_claims, BON: bon_claims, RL: rl_claims}
_HEADS = {AGREES: "In line with {paper}", DISAGREES: "Not in line with {paper}", UNCLEAR: "It cannot be told"}
# A paragraph of more is not read.
_MOST = 4


def claims_of(results: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Claim]:
    """What each result says of the paper's claims, in the order of the results; nothing where its rows do not bear on
    any. A verdict counts a difference only where its 95 % interval excludes 0, and equality only within 1 point.

    Args:
        results: folder as it is shown, kind (a constant of `results`), and the content of its JSON file.

    Raises:
        UsageError: a result that warmerge did not write.

    >>> row = {"set": "val", "a": "average", "b": "mean of the members", "difference": 0.02, "low": 0.01, "high": 0.03}
    >>> member = {"set": "val", "model": "1", "kind": "member", "accuracy": 0.7}
    >>> content = {"rows": [member], "differences": [row | {"n": 900, "prompts": 90}]}
    >>> [(claim.verdict, claim.source) for claim in claims_of([("ev", "eval", content)])]
    [('agrees', 'ev')]
    """
    found = []
    for folder, kind, content in results:
        try:
            found += _CLAIMS[kind](content, folder) if kind in _CLAIMS else []
        except UsageError as error:
            what = str(error).removeprefix("figure: ")
            raise UsageError(f"{plain(folder)}: {kind}.json is not a result of warmerge: {what}") from None
    return found


def in_words(claims: Sequence[Claim]) -> str:
    """A paragraph for a newcomer: what agrees with the paper, what does not, what cannot be told.

    What was seen in several places, or several times, is said once.

    >>> claim = Claim("p", "s", "agrees", "ev", ("the average beats its members", "on val", "+2.0 points"))
    >>> in_words([claim])
    'In line with the paper: the average beats its members on val (+2.0 points).'
    """
    sentences = []
    for verdict, head in _HEADS.items():
        own = [claim for claim in claims if claim.verdict == verdict]
        if not own:
            continue
        implied = any(claim.paper.startswith("not reported") for claim in own)
        head = head.format(paper="the paper, or with what it implies" if implied else "the paper")
        whats: dict[str, dict[str, list[str]]] = {}
        for claim in own:
            what, where, found = claim.short
            numbers = whats.setdefault(what or claim.seen.rstrip("."), {}).setdefault(where, [])
            numbers += [found] if found and found not in numbers else []
        said = [f"{what} {_places(places)}".rstrip() for what, places in whats.items()]
        left = f"; and {len(said) - _MOST} more" if len(said) > _MOST else ""
        # "It cannot be told whether ..." goes on as one sentence.
        colon = " " if verdict == UNCLEAR and all(words.startswith("whether ") for words in said) else ": "
        sentences.append(f"{head}{colon}{'; '.join(said[:_MOST])}{left}.")
    return " ".join(sentences) or "Nothing that was measured here bears on a claim of the paper."


def _places(places: Mapping[str, Sequence[str]]) -> str:
    words = []
    for where, numbers in places.items():
        more = f" and {len(numbers) - 2} more" if len(numbers) > 2 else ""
        words.append(f"{where} ({', '.join(numbers[:2])}{more})" if numbers else where)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
