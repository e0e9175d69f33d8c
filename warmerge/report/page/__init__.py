"""One page of HTML for many results. It needs no network, and what stands in files cannot become a part of it."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from warmerge.errors import counted, plain
from warmerge.report.claims import Claim, claims_of
from warmerge.report.page.cells import Cell, Table, rows_table
from warmerge.report.page.claims import in_short
from warmerge.report.page.markup import badge, shown
from warmerge.report.page.style import SCRIPT, STYLE
from warmerge.report.page.svg import inline_figures
from warmerge.report.page.tables import tables_of
from warmerge.report.page.words import about, facts, notes_of, words_of
from warmerge.report.rows import too_many

# Rows of a result that are shown in full; the others are in its CSV file.
SHOWN_ROWS = 200
# Tables of more rows than these are folded: on a screen they hide what comes after them.
FOLDED_ROWS = 40
# Cells of more letters than these get a wider column.
_LONG = 28


@dataclass(frozen=True)
class Result:
    """What one section shows.

    Args:
        folder: where it was found, as it may be shown.
        kind: as in `results`.
        content: of its JSON file, without places on a machine.
        table: the file that has all its rows, as it may be shown; "" if there is none.
        figure: the file that has its figure, likewise.
    """

    folder: str
    kind: str
    content: Mapping[str, Any]
    table: str = ""
    figure: str = ""


@dataclass(frozen=True)
class Section:
    """A result, its markup, whose ids begin with `anchor`, and what it says of the paper's claims."""

    result: Result
    anchor: str
    html: str
    claims: tuple[Claim, ...]


def section(result: Result, anchor: str) -> Section:
    """The section of a result: figures drawn from its rows, tables, words, and how it was made.

    Args:
        anchor: an id that no other section of the page has.

    Raises:
        UsageError: rows that cannot be what their columns say.
    """
    kind, content, what = result.kind, result.content, about(result.kind)
    warnings, notes = notes_of(content)
    parts = [
        f'<section class="result" id="{anchor}" aria-labelledby="{anchor}-h">',
        f'<header><h2 id="{anchor}-h">{what.heading}</h2><p class="folder">{shown(result.folder)}</p>',
        f'<p class="what">{escape(what.measures)}</p></header>',
        *_figures(result, anchor),
        *(_table(table, f"{anchor}-t{i}") for i, table in enumerate(tables_of(kind, content), start=1)),
        _facts(facts(kind, content)),
        _says("What it says", words_of(content)),
        _says("Doubts", warnings, "doubts"),
        _says("Notes", notes),
        _all_rows(result, f"{anchor}-rows"),
        _made(content),
        "</section>",
    ]
    claims = tuple(claims_of([(result.folder, kind, content)]))
    return Section(result, anchor, "\n".join(filter(None, parts)), claims)


def page(title: str, sections: Sequence[Section], remarks: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        remarks: what the reader must know of results that are not here.
    """
    style, script = STYLE.strip(), SCRIPT.strip()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    folders = len({each.result.folder for each in sections})
    lede = f"{counted(len(sections), 'result')} from {counted(folders, 'folder')}. Every number stands with what it "
    lede += "was measured on and, where it has one, with its interval."
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(plain(title))}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">Skip to the results</a>',
            '<div class="page">',
            f'<header class="top"><p class="over">warmerge report</p><h1>{shown(title)}</h1>',
            f'<p class="lede">{lede}</p></header>',
            '<main id="main">',
            in_short([(claim, each.anchor) for each in sections for claim in each.claims]),
            _says("Left out", remarks, "doubts"),
            _contents(sections),
            *(each.html for each in sections),
            "</main>",
            "<footer><p>Made by warmerge report. This file asks no network for anything.</p></footer>",
            "</div>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


# --- before the results ---------------------------------------------------------------------------------------------


def _contents(sections: Sequence[Section]) -> str:
    entries = [
        f'<li><a href="#{each.anchor}"><span>{about(each.result.kind).heading}</span>'
        f'<span class="where">{shown(each.result.folder)}</span></a></li>'
        for each in sections
    ]
    heading = '<section class="contents" aria-labelledby="contents-h"><h2 id="contents-h">Contents</h2>'
    return "\n".join([heading, '<nav aria-labelledby="contents-h"><ol>', *entries, "</ol></nav></section>"])


# --- parts of a section ---------------------------------------------------------------------------------------------


def _figures(result: Result, anchor: str) -> list[str]:
    if much := too_many(result.kind, result.content):
        own = f" The folder's own is {shown(result.figure)}." if result.figure else ""
        return [f'<p class="below">The figure is left out: {much} are more than can be read in a picture.{own}</p>']
    drawn = inline_figures(result.kind, result.content, anchor, about(result.kind).figures)
    return [_figure(svg, label) for svg, label in drawn]


def _figure(svg: str, label: str) -> str:
    return (
        f'<figure class="figure"><div class="scroll" tabindex="0" role="group" aria-label="Figure">{svg}</div>'
        f"<figcaption>{escape(label)}.</figcaption></figure>"
    )


def _table(table: Table, anchor: str) -> str:
    below = f'<p class="below">{escape(table.below)}</p>' if table.below else ""
    title, inside = escape(plain(table.title)), f"{_scrolled(table, anchor)}{below}"
    if not table.rows:
        return ""
    if len(table.rows) > FOLDED_ROWS:
        rows = counted(len(table.rows), "row")
        heading = f'<summary id="{anchor}">{title} <small>{rows}</small></summary>'
        return f'<details class="longer">{heading}<div class="inside">{inside}</div></details>'
    return f'<div class="table"><h3 id="{anchor}">{title}</h3>{inside}</div>'


def _scrolled(table: Table, labelled_by: str) -> str:
    """A table in a box that it scrolls within, also by the keyboard."""
    numeric = [any(row[at].value is not None for row in table.rows) for at in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{_n(number)}><span class="name">{escape(plain(words))}</span>'
        + (f"<small>{escape(plain(aside))}</small>" if aside else "")
        + "</th>"
        for (words, aside), number in zip(table.head, numeric, strict=True)
    )
    body = []
    for place, row in enumerate(table.rows):
        first, *others = (_cell(cell, at == 0, numeric[at]) for at, cell in enumerate(row))
        look = ' class="marked"' if place in table.marked else ""
        body.append(f"<tr{look}>{first}{''.join(others)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-labelledby="{labelled_by}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def _n(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(cell: Cell, first: bool, numeric: bool) -> str:
    value = "" if cell.value is None else f' data-v="{_sorted_by(cell.value)}"'
    words = badge(cell.words) if cell.verdict else shown(cell.words) if cell.words else ""
    aside = f' <span class="aside">{escape(plain(cell.aside))}</span>' if cell.aside else ""
    letters = 0 if numeric else len(cell.words) + len(cell.aside)
    width = "long" if letters > _LONG else "middling" if letters > _LONG // 2 else ""
    look = f' class="{width}"' if width else _n(numeric)
    inside = f"{look}{value}>{words}{aside}"
    return f'<th scope="row"{inside}</th>' if first else f"<td{inside}</td>"


def _sorted_by(value: float) -> str:
    return "Infinity" if value == float("inf") else f"{value:.12g}"


def _facts(found: Iterable[tuple[str, str]]) -> str:
    pairs = "".join(f"<dt>{term}</dt><dd>{escape(plain(words))}</dd>" for term, words in found)
    return f'<dl class="facts">{pairs}</dl>'


def _says(heading: str, sentences: Sequence[str], look: str = "") -> str:
    if not sentences:
        return ""
    lines = "".join(f"<li>{escape(plain(words))}</li>" for words in sentences)
    return f'<div class="says{" " + look if look else ""}"><h3>{heading}</h3><ul>{lines}</ul></div>'


def _all_rows(result: Result, anchor: str) -> str:
    rows = result.content.get("rows") or []
    few = len(rows) > SHOWN_ROWS
    where = f" All of them are in {shown(result.table)}." if result.table else ""
    table = rows_table("", rows, SHOWN_ROWS)
    said = f"The first {SHOWN_ROWS} of {len(rows):,} rows.{where}" if few else f"As in the file.{where}"
    said += f" {table.below}" if table.below else ""
    heading = f"{SHOWN_ROWS} of {counted(len(rows), 'row')}" if few else f"All {counted(len(rows), 'row')}"
    return (
        f'<details class="rows"><summary id="{anchor}">{heading} <small>in full</small></summary>'
        f'<div class="inside"><p class="below">{said}</p>{_scrolled(table, anchor)}'
        "</div></details>"
    )


def _made(content: Mapping[str, Any]) -> str:
    """The command line and the versions that made a result."""
    command = content.get("command") or []
    line = " ".join(map(_argument, map(str, command)))
    how = f"<pre><code>{escape(plain(line))}</code></pre>" if line else "made from Python; not recorded"
    versions = content.get("versions") or {}
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items()) or "not recorded"
    return (
        '<details class="made"><summary>How it was made</summary><div class="inside"><dl class="facts">'
        f"<dt>Command</dt><dd>{how}</dd><dt>Versions</dt><dd>{escape(plain(numbers))}</dd></dl></div></details>"
    )


def _argument(word: str) -> str:
    """As a shell takes it; the mark of a place that is not shown needs no quotes."""
    return word if re.fullmatch(r"[\w@%+=:,./…-]+", word) else shlex.quote(word)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
