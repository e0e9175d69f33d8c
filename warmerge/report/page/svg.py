"""Figures inside a page: matplotlib's SVG made small, harmless and legible where several stand in one document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from warmerge.report import canvas
from warmerge.report.results import draw

_KEPT = {"svg", "g", "defs", "path", "use", "rect", "clipPath", "image", "linearGradient", "stop"}
_DROPPED = {"metadata", "style"}  # the style is in the page's own; metadata names addresses on the network
_TO_ID = re.compile(r"url\(#([^)]*)\)")
_COORDINATES = ("d", "x", "y", "width", "height", "points")
_PIXELS = 4 / 3  # CSS pixels in a point
# As large as that letters of 8 points are read with ease.
_SCALE = 1.15


def inline_figures(kind: str, content: Mapping[str, Any], prefix: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    """The figures of a result, drawn from its rows, as `<svg>` elements for a page of HTML, each with its label.

    Args:
        prefix: begins all ids in them, and is of this result alone.
        labels: what is to be seen in each, for people who do not see it.

    Raises:
        UsageError: rows that cannot be drawn.
    """
    with TemporaryDirectory() as folder, canvas.svg_alone():
        sources = [path.read_text(encoding="utf-8") for path in draw(Path(folder), kind, content)]
    found = []
    for i, source in enumerate(sources, start=1):
        label = labels[min(i, len(labels)) - 1]
        found.append((inline_svg(source, f"{prefix}-f{i}", label), label))
    return found


def inline_svg(source: str, prefix: str, label: str) -> str:
    """An SVG file of matplotlib as an element of a page: no comments, no styles, no addresses, ids of its own.

    >>> inline_svg('<svg viewBox="0 0 3 4"><g id="a"><path d="M 0 0.123" style="fill: #fff"/></g></svg>', "p", "A line")
    '<svg viewBox="0 0 3 4" width="5" height="6" role="img" aria-label="A line"><path d="M 0 0.12" fill="#fff"/></svg>'
    """
    root = ElementTree.fromstring(source)
    used = set(_referred(root))
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    size = {"width": f"{width * _PIXELS * _SCALE:.0f}", "height": f"{height * _PIXELS * _SCALE:.0f}"}
    attributes = {"viewBox": root.attrib["viewBox"], **size, "role": "img", "aria-label": label}
    return _opening("svg", attributes) + "".join(_markup(child, prefix, used) for child in root) + "</svg>"


def _referred(root: ElementTree.Element) -> Iterator[str]:
    """The ids that something in the figure points to; all others only name parts."""
    for element in root.iter():
        for name, value in element.attrib.items():
            if _local(name) == "href" and value.startswith("#"):
                yield value[1:]
            yield from _TO_ID.findall(value)


def _markup(element: ElementTree.Element, prefix: str, used: set[str]) -> str:
    name = _local(element.tag)
    if name in _DROPPED:
        return ""
    assert name in _KEPT, f"matplotlib drew <{name}>, which the page does not know"
    inside = "".join(_markup(child, prefix, used) for child in element)
    attributes = _attributes(element, prefix, used)
    if name in ("g", "defs") and not inside:
        return ""
    if name == "g" and not attributes:
        return inside
    opening = _opening(name, attributes)
    return f"{opening}{inside}</{name}>" if inside else f"{opening[:-1]}/>"


def _attributes(element: ElementTree.Element, prefix: str, used: set[str]) -> dict[str, str]:
    """Styles become attributes, so that the page's policy need not allow styles of unknown origin."""
    found: dict[str, str] = {}
    for full, value in element.attrib.items():
        name = _local(full)
        if name == "style":
            pairs = (part.split(":", 1) for part in value.split(";") if ":" in part)
            found |= {key.strip(): _own(words.strip(), prefix) for key, words in pairs}
        elif name == "id":
            found |= {"id": f"{prefix}-{value}"} if value in used else {}
        elif name == "href":
            assert value.startswith(("#", "data:image/")), "matplotlib's figures hold all that they show"
            found["href"] = f"#{prefix}-{value[1:]}" if value.startswith("#") else value
        else:
            found[name] = _short(value) if name in _COORDINATES else _own(value, prefix)
    return found


def _opening(name: str, attributes: Mapping[str, str]) -> str:
    return "<" + " ".join([name, *(f'{key}="{escape(value)}"' for key, value in attributes.items())]) + ">"


def _own(value: str, prefix: str) -> str:
    return _TO_ID.sub(rf"url(#{prefix}-\1)", value)


def _short(value: str) -> str:
    """Coordinates to a hundredth of a point: half of the bytes."""
    rounded = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
    return " ".join(rounded.split())


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]
