"""What results say about the claims of the WARM paper (arXiv 2401.12187): for each, what was seen, and a verdict.

To add a claim: a function of a result's content that returns `Claim`s, called in the row of its kind of result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from warmerge.errors import UsageError, plain
from warmerge.report.claims.claim import AGREES, DISAGREES, UNCLEAR, Claim
from warmerge.report.claims.on_accuracy import eval_claims
from warmerge.report.claims.on_choices import bon_claims
from warmerge.report.claims.on_paths import curve_claims, vs_m_claims
from warmerge.report.claims.on_policies import rl_claims
from warmerge.report.results import BON, CURVE, EVAL, RL, VS_M

__all__ = ["Claim", "claims_of", "in_words"]

_CLAIMS = {EVAL: eval_claims, CURVE: curve_claims, VS_M: vs_m_claims, BON: bon_claims, RL: rl_claims}
_HEADS = {AGREES: "In line with the paper", DISAGREES: "Not in line with the paper", UNCLEAR: "It cannot be told"}
_BESIDE = "Beside what the paper reports"
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
            own = _CLAIMS[kind](content, folder) if kind in _CLAIMS else []
            found += [replace(claim, used=kind in (BON, RL)) for claim in own]
        except UsageError as error:
            what = str(error).removeprefix("figure: ")
            raise UsageError(f"{plain(folder)}: {kind}.json is not a result of warmerge: {what}") from None
    return found


def in_words(claims: Sequence[Claim]) -> str:
    """A paragraph for a newcomer: what agrees with the paper, what does not, what cannot be told, and apart from these
    what the paper does not report.

    What was seen in several places, or several times, is said once; what came of using rewards is said first.

    >>> claim = Claim("p", "s", "agrees", "ev", ("the average beats its members", "on val", "+2.0 points"))
    >>> in_words([claim])
    'In line with the paper: the average beats its members on val (+2.0 points).'
    """
    sentences = []
    for verdict, head in _HEADS.items():
        sentences += _sentence([claim for claim in claims if not claim.beyond and claim.verdict == verdict], head)
    # Of these a verdict is only whether it is so: what was seen says which.
    beyond = [claim for claim in claims if claim.beyond]
    sentences += _sentence([claim for claim in beyond if claim.verdict != UNCLEAR], _BESIDE)
    sentences += _sentence([claim for claim in beyond if claim.verdict == UNCLEAR], f"{_BESIDE}, it cannot be told")
    return " ".join(sentences) or "Nothing that was measured here bears on a claim of the paper."


def _sentence(claims: Sequence[Claim], head: str) -> list[str]:
    if not claims:
        return []
    whats: dict[str, dict[str, list[str]]] = {}
    ordered = sorted(claims, key=lambda claim: not claim.used)
    for claim in ordered:
        what, where, found = claim.short
        numbers = whats.setdefault(what or claim.seen.rstrip("."), {}).setdefault(where, [])
        numbers += [found] if found and found not in numbers else []
    said = [f"{what} {_places(places)}".strip() for what, places in whats.items()]
    # What came of using rewards is never among "... more".
    most = max(_MOST, len({claim.short[0] or claim.seen for claim in ordered if claim.used}))
    left = f"; and {len(said) - most} more" if len(said) > most else ""
    # "It cannot be told whether ..." goes on as one sentence.
    colon = " " if head.endswith("told") and all(words.startswith("whether ") for words in said) else ": "
    return [f"{head}{colon}{'; '.join(said[:most])}{left}."]


def _places(places: Mapping[str, Sequence[str]]) -> str:
    words = []
    for where, numbers in places.items():
        more = f" and {len(numbers) - 2} more" if len(numbers) > 2 else ""
        words.append(f"{where} ({', '.join(numbers[:2])}{more})".strip() if numbers else where)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
