"""What a page says in short: each statement of the paper, beside what was seen of it here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from warmerge.errors import counted, plain
from warmerge.report.claims import Claim, in_words
from warmerge.report.page.markup import badge, shown
from warmerge.report.page.words import joined

# More comparisons with the paper than these are folded, statement by statement.
FOLDED_CLAIMS = 8


def in_short(found: Sequence[tuple[Claim, str]]) -> str:
    """What agrees with the paper and what does not: as a paragraph each, then statement by statement.

    Args:
        found: claims, each with the id of the section that it is of.
    """
    claims = [claim for claim, _ in found]
    beyond = [claim for claim in claims if claim.beyond]
    statements: dict[str, list[tuple[Claim, str]]] = {}
    for claim, anchor in found:
        statements.setdefault(claim.paper, []).append((claim, anchor))
    kinds = [[claim for claim in claims if not claim.beyond and claim.verdict == verdict] for verdict in _VERDICTS]
    parts = ['<section id="in-short" aria-labelledby="in-short-h"><h2 id="in-short-h">In short</h2>']
    parts += [f'<p class="plain">{_counts(claims)}</p>'] if claims else []
    paragraphs = [in_words(own) for own in (*kinds, beyond) if own] or [in_words([])]
    parts += [f'<p class="plain">{escape(plain(words))}</p>' for words in paragraphs]
    folded = len(claims) > FOLDED_CLAIMS
    if claims:
        for apart, heading in _HEADINGS.items():
            own = {paper: each for paper, each in statements.items() if each[0][0].beyond == apart}
            entries = [_statement(paper, each, folded) for paper, each in own.items()]
            parts += [f"<h3>{heading}</h3>", '<ul class="claims">', *entries, "</ul>"] if entries else []
    return "\n".join([*parts, "</section>"])


def _counts(claims: Sequence[Claim]) -> str:
    """
    >>> _counts([Claim("a", "b", "agrees", "x"), Claim("a", "c", "cannot tell", "x")])
    '2 comparisons with the paper on 1 question: 1 agrees with it and 1 cannot be told.'
    >>> _counts([Claim("not reported: a", "b", "agrees", "x")])
    '1 comparison on 1 question beyond the paper.'
    """
    own, beyond = ([claim for claim in claims if claim.beyond == apart] for apart in _HEADINGS)
    found = [(sum(claim.verdict == verdict for claim in own), words) for verdict, words in _VERDICTS.items()]
    parts = [f"{count} {one if count == 1 else many}" for count, (one, many) in found if count]
    said = [f"{_comparisons(own, ' with the paper')}: {joined(parts)}."] if own else []
    said += [f"{_comparisons(beyond)} beyond the paper."] if beyond else []
    return " ".join(said)


def _comparisons(claims: Sequence[Claim], beside: str = "") -> str:
    questions = len({claim.paper for claim in claims})
    return f"{counted(len(claims), 'comparison')}{beside} on {counted(questions, 'question')}"


_HEADINGS = {
    False: "What the paper says, and what was seen here",
    True: "Beyond the paper: what it does not report, and what was seen here",
}


_VERDICTS = {
    "agrees": ("agrees with it", "agree with it"),
    "disagrees": ("disagrees with it", "disagree with it"),
    "cannot tell": ("cannot be told", "cannot be told"),
}


def _statement(paper: str, claims: Sequence[tuple[Claim, str]], folded: bool) -> str:
    """A statement of the paper, how often what was seen agrees with it, and each time what that was, and where."""
    counts = [(verdict, sum(claim.verdict == verdict for claim, _ in claims)) for verdict in _VERDICTS]
    badges = "".join(_badge(claims[0][0], verdict, count if count > 1 else 0) for verdict, count in counts if count)
    seen = []
    for claim, anchor in claims:
        verdict = _badge(claim, claim.verdict) if len(claims) > 1 else ""
        source = f'<p class="from">From <a href="#{anchor}">{shown(claim.source)}</a></p>'
        seen.append(f"<li>{verdict}<p>{escape(plain(claim.seen))}</p>{source}</li>")
    words = paper[:1].upper() + paper[1:]
    return (
        f'<li><details class="claim"{"" if folded else " open"}><summary><span class="badges">{badges}</span> '
        f'<span class="paper">{escape(plain(words))}</span></summary>'
        f'<ul class="inside">{"".join(seen)}</ul></details></li>'
    )


def _badge(claim: Claim, verdict: str, count: int = 0) -> str:
    """Of a statement that is not the paper's nothing agrees or disagrees with it: it is so here, or not."""
    return badge(_BEYOND[verdict] if claim.beyond else verdict, count)


_BEYOND = {"agrees": "so here", "disagrees": "not so here", "cannot tell": "cannot tell"}
