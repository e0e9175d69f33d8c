"""Names and verdicts as HTML: what comes from anybody's file stays text."""

from __future__ import annotations

from html import escape

from warmerge.errors import plain

# What a verdict, of a claim or a curve, looks like beside its words.
_LOOKS = {"agrees": "good", "holds": "good", "disagrees": "bad", "does not hold": "bad"}


def shown(name: object) -> str:
    """A name from anybody's file as text of the page: escaped, without control characters, apart from what is beside.

    >>> shown("<b>"), shown("a\\u202eb")
    ('<bdi>&lt;b&gt;</bdi>', '<bdi>&#x27;a\\\\u202eb&#x27;</bdi>')
    """
    return f"<bdi>{escape(plain(str(name)))}</bdi>"


def badge(verdict: str, count: int = 0) -> str:
    """A verdict as words on a colour, and how often it was given if that is not 0."""
    look = f"badge {_LOOKS.get(verdict, '')}".strip()
    times = f" \N{MULTIPLICATION SIGN} {count}" if count else ""
    return f'<span class="{look}">{escape(plain(verdict.capitalize()))}{times}</span>'
