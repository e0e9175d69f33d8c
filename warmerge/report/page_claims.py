"""What a page says in short: each statement of the paper, beside what was seen of it here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from warmerge.errors import counted, plain
from warmerge.report.claims import Claim, in_words
from warmerge.report.page_markup import badge, shown
from warmerge.report.page_words import joined

# More comparisons with the paper than these are folded, statement by statement.
FOLDED_CLAIMS = 8


def in_short(found: Sequence[tuple[Claim, str]]) -> str:
    """What agrees with the paper and what does not: as a paragraph each, then statement by statement.

    Args:
        found: claims, each with the id of the section that it is of.
    """
    claims = [claim for claim, _ in found]
    statements: dict[str, list[tuple[Claim, str]]] = {}
    for claim, anchor in found:
        statements.setdefault(claim.paper, []).append((claim, anchor))
    kinds = [[claim for claim in claims if claim.verdict == verdict] for verdict in _VERDICTS]
    parts = ['<section id="in-short" aria-labelledby="in-short-h"><h2 id="in-short-h">In short</h2>']
    parts += [f'<p class="plain">{_counts(claims, len(statements))}</p>'] if claims else []
    paragraphs = [in_words(own) for own in kinds if own] or [in_words([])]
    parts += [f'<p class="plain">{escape(plain(words))}</p>' for words in paragraphs]
    folded = len(claims) > FOLDED_CLAIMS
    if claims:
        entries = [_statement(paper, own, folded) for paper, own in statements.items()]
        parts += ["<h3>What the paper says, and what was seen here</h3>", '<ul class="claims">', *entries, "</ul>"]
    return "\n".join([*parts, "</section>"])


def _counts(claims: Sequence[Claim], statements: int) -> str:
    """
    >>> _counts([Claim("a", "b", "agrees", "x"), Claim("a", "c", "cannot tell", "x")], 1)
    '2 comparisons on 1 question: 1 agrees with the paper and 1 cannot be told.'
    """
    found = [(sum(claim.verdict == verdict for claim in claims), words) for verdict, words in _VERDICTS.items()]
    parts = [f"{count} {one if count == 1 else many}" for count, (one, many) in found if count]
    return f"{counted(len(claims), 'comparison')} on {counted(statements, 'question')}: {joined(parts)}."


_VERDICTS = {
    "agrees": ("agrees with the paper", "agree with the paper"),
    "disagrees": ("disagrees with it", "disagree with it"),
    "cannot tell": ("cannot be told", "cannot be told"),
}


def _statement(paper: str, claims: Sequence[tuple[Claim, str]], folded: bool) -> str:
    """A statement of the paper, how often what was seen agrees with it, and each time what that was, and where."""
    counts = [(verdict, sum(claim.verdict == verdict for claim, _ in claims)) for verdict in _VERDICTS]
    badges = "".join(badge(verdict, count if count > 1 else 0) for verdict, count in counts if count)
    seen = []
    for claim, anchor in claims:
        verdict = badge(claim.verdict) if len(claims) > 1 else ""
        source = f'<p class="from">From <a href="#{anchor}">{shown(claim.source)}</a></p>'
        seen.append(f"<li>{verdict}<p>{escape(plain(claim.seen))}</p>{source}</li>")
    words = paper[:1].upper() + paper[1:]
    return (
        f'<li><details class="claim"{"" if folded else " open"}><summary><span class="badges">{badges}</span> '
        f'<span class="paper">{escape(plain(words))}</span></summary>'
        f'<ul class="inside">{"".join(seen)}</ul></details></li>'
    )
