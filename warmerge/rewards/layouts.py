r"""The layouts of public preference sets: from one row to the comparisons in it.

Column names are those of the data sets' own cards: RewardBench (arXiv 2403.13787), RewardBench 2 (2506.01937), RM-Bench
(2410.16184), "Learning to summarize from human feedback" (2009.01325), and TRL's preference format for all others.
"""

from __future__ import annotations

import json
import math
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from warmerge.errors import quoted, some

Row = Mapping[str, Any]
Message = Mapping[str, Any]
Text = str | tuple[Message, ...]

# Columns that a layout may have; where the first good row has one, all rows must.
_OPTIONAL = frozenset({"prompt_id", "subset", "margin"})
# A column that says what the answers answer, beside a chosen and a rejected that do not: it must not be dropped.
_LIKE_A_PROMPT = frozenset({"question", "instruction", "input", "query", "context", "history", "system", "post"})
_BEFORE_AN_ANSWER = ("system", "developer", "user")
_TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # as in trl-lib/tldr


class BadRow(ValueError):  # noqa: N818 - a verdict about data, not a fault of the program
    """Why a row does not fit its layout, as the end of a sentence that starts with the row's place."""


@dataclass(frozen=True)
class Comparison:
    """One preference: every answer in `chosen` should be rewarded above every answer in `rejected`.

    `prompt` is "" for plain-text rows with an implicit prompt: the answers are then whole texts, verbatim. `cluster`
    is what counts as one prompt when resampling; `subset` is "" where the layout has none; `row` counts from 1. For
    training: `margin` is by how much the chosen answer's reward should be larger at least, where a data set says so.
    """

    prompt: Text
    chosen: tuple[Text, ...]
    rejected: tuple[Text, ...]
    cluster: str
    subset: str
    row: int
    margin: float = 0.0


@dataclass(frozen=True)
class Layout:
    """How rows with the columns `needs` and without the columns `lacks` are read. `parse` raises BadRow."""

    name: str
    needs: frozenset[str]
    parse: Callable[[Row, int, frozenset[str]], list[Comparison]]
    lacks: frozenset[str] = frozenset()

    def fits(self, row: Row) -> bool:
        """Whether the columns of a row are those of this layout; what is in them is for `parse` to say."""
        return self.needs <= row.keys() and not self.lacks & row.keys()


def recognise(rows: Iterable[Row]) -> tuple[Layout, frozenset[str]] | None:
    """The layout of the first good row, and its optional columns; None where no row has the columns of any.

    Where rows have the columns of a layout but none of them is good, the layout that the first of them looks like.
    """
    looks_like = None
    for row in rows:
        optional = _OPTIONAL & row.keys()
        for layout in (layout for layout in LAYOUTS if layout.fits(row)):
            try:
                layout.parse(row, 1, optional)
            except BadRow:
                looks_like = looks_like or (layout, optional)
            else:
                return layout, optional
    return looks_like


def canonical(value: Any) -> str:
    """JSON that is the same for equal values: what messages, which are not hashable, are told apart by.

    >>> canonical(({"role": "user", "content": "é"},))
    '[{"content": "\\\\u00e9", "role": "user"}]'
    """
    return json.dumps(value, sort_keys=True, default=str)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _explicit(row: Row, number: int, optional: frozenset[str]) -> list[Comparison]:
    """TRL's explicit prompt, and RewardBench: `prompt`, `chosen`, `rejected`, each text or messages."""
    texts = {name: _text(_field(row, name), name) for name in ("prompt", "chosen", "rejected")}
    prompt, chosen, rejected = texts.values()
    if not all(isinstance(text, str) for text in texts.values()):
        prompt, chosen, rejected = _separate(prompt, _as_messages(chosen), _as_messages(rejected))
    # Where nothing says what the prompt is, pairs are their own: one cluster of them all could not be resampled.
    cluster = _scalar(row, "prompt_id") if "prompt_id" in optional else _key(prompt) or canonical([chosen, rejected])
    subset = _string(_field(row, "subset"), "'subset'") if "subset" in optional else ""
    return [Comparison(prompt, (chosen,), (rejected,), cluster, subset, number, _margin(row, optional))]


def _implicit(row: Row, number: int, optional: frozenset[str]) -> list[Comparison]:
    """TRL's implicit prompt: `chosen` and `rejected` that begin alike."""
    if row.get("prompt") is not None:
        raise BadRow("has a 'prompt', the rows before it have none")
    chosen, rejected = (_text(_field(row, name), name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if columns := sorted(_LIKE_A_PROMPT & row.keys()):
            what = f"has {quoted(columns[0])} beside plain-text 'chosen' and 'rejected': if it is the prompt, rename it"
            raise BadRow(f"{what} to 'prompt', else remove it")
        cluster = _shared_start(chosen, rejected) or canonical([chosen, rejected])
        return [Comparison("", (chosen,), (rejected,), cluster, "", number, _margin(row, optional))]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow("has text on one side and messages on the other, and no 'prompt'")
    prompt = _shared_messages(chosen, rejected)
    if not prompt:
        raise BadRow("has no 'prompt', and 'chosen' and 'rejected' share no leading message before an answer")
    start = len(prompt)
    parts = (chosen[start:],), (rejected[start:],)
    return [Comparison(prompt, *parts, _key(prompt), "", number, _margin(row, optional))]


def _rewardbench_2(row: Row, number: int, optional: frozenset[str]) -> list[Comparison]:
    """RewardBench 2: every one of the correct answers (several in its Ties) above every one of the others."""
    prompt = _string(_field(row, "prompt"), "'prompt'")
    chosen, rejected = (_strings(row, name) for name in ("chosen", "rejected"))
    return [Comparison(prompt, chosen, rejected, prompt, _string(_field(row, "subset"), "'subset'"), number)]


def _rm_bench(row: Row, number: int, optional: frozenset[str]) -> list[Comparison]:
    """RM-Bench: both sides concise, detailed, detailed in markdown; hard where the wrong answer is the fancier one."""
    prompt, domain = (_string(_field(row, name), quoted(name)) for name in ("prompt", "domain"))
    chosen, rejected = (_strings(row, name, expected=3) for name in ("chosen", "rejected"))
    return [
        Comparison(prompt, (good,), (bad,), prompt, f"{domain}/{_style(i, j)}", number)
        for i, good in enumerate(chosen)
        for j, bad in enumerate(rejected)
    ]


def _style(chosen: int, rejected: int) -> str:
    if chosen == rejected:
        return "normal"
    return "hard" if chosen < rejected else "easy"


def _summaries(row: Row, number: int, optional: frozenset[str]) -> list[Comparison]:
    """OpenAI's summarize_from_feedback: two summaries of a Reddit post or a news article, and which was preferred."""
    info, summaries, choice = (_field(row, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, Mapping):
        raise BadRow(f"'info' is {_kind(info)}, expected an object")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, Mapping) for s in summaries)):
        raise BadRow("'summaries' is not a list of two objects")
    if type(choice) is not int or choice not in (0, 1):  # true and 1.0 are equal to 1, but not what the set has
        raise BadRow(f"'choice' is {_kind(choice)}, expected 0 or 1")
    parts = ("subreddit", "title", "post") if info.get("post") or not info.get("article") else ("article",)
    found = {name: _string(_field(info, name, "info."), f"'info.{name}'") for name in parts}
    prompt = _TLDR.format(**found) if "post" in found else f"{found['article']}\n\nTL;DR:"
    texts = [
        _string(_field(summary, "text", f"summaries[{i}]."), f"'summaries[{i}].text'")
        for i, summary in enumerate(summaries)
    ]
    answers = [" " + text.strip() for text in texts]
    cluster = _scalar(info, "id", "info.")
    return [Comparison(prompt, (answers[choice],), (answers[1 - choice],), cluster, "", number)]


_ANSWERS = frozenset({"chosen", "rejected"})
_PAIR = _ANSWERS | {"prompt"}
# The first that fits is taken: those with more columns come before those with fewer.
LAYOUTS = (
    Layout("RewardBench 2", _PAIR | {"subset", "num_correct"}, _rewardbench_2),
    Layout("RM-Bench", _PAIR | {"domain", "id"}, _rm_bench),
    Layout("RewardBench", _PAIR | {"subset", "chosen_model", "rejected_model"}, _explicit),
    Layout("TRL explicit prompt", _PAIR, _explicit),
    Layout("TRL implicit prompt", _ANSWERS, _implicit, lacks=frozenset({"prompt"})),
    Layout("summarize_from_feedback", frozenset({"info", "summaries", "choice"}), _summaries),
)


def answer_to(prompt: Any, answer: Any, name: str, number: int) -> tuple[Text, Text]:
    """A prompt and its answer as they would be read from a pair, so that a text has one reward wherever it stands.

    Args:
        name: what the answer is called where it stands, such as "candidates[3]".
        number: of the row, from 1.

    Raises:
        BadRow: one of them is no text and no list of messages.

    >>> answer_to("Say hi.", None, "candidates[3]", 1)
    Traceback (most recent call last):
    warmerge.rewards.layouts.BadRow: 'candidates[3]' is null
    """
    try:
        (found,) = _explicit({"prompt": prompt, "chosen": answer, "rejected": answer}, number, frozenset())
    except BadRow as error:
        raise BadRow(str(error).replace("'chosen", f"'{name}", 1)) from None
    return found.prompt, found.chosen[0]


# --- prompts and answers ----------------------------------------------------------------------------------------------


def _separate(
    prompt: Text, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and answers without overlap: many sets have whole conversations as answers, and the prompt once more."""
    if isinstance(prompt, str):
        shared = _shared_messages(chosen, rejected)
        if any(message["role"] == "user" and message["content"] == prompt for message in shared):
            return shared, chosen[len(shared) :], rejected[len(shared) :]
        prompt = ({"role": "user", "content": prompt},)
    sides = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[: len(prompt)] == prompt:
            side = side[len(prompt) :]
            if not side:
                raise BadRow(f"{quoted(name)} is the prompt alone, without an answer")
        elif side[0]["role"] in _BEFORE_AN_ANSWER:
            # A conversation about something else, or the same prompt in other words: the model would read both.
            raise BadRow(f"{quoted(name)} starts with a {side[0]['role']} message, but not with the prompt")
        sides.append(side)
    return prompt, sides[0], sides[1]


def _as_messages(text: Text) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},) if isinstance(text, str) else text


def _shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[Message, ...]:
    """The leading messages that both sides have, less what would leave a side without an answer."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return tuple(message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_start(chosen: str, rejected: str) -> str:
    r"""What two dialogues have in common, up to the last answer's mark (as in hh-rlhf), else up to a white space.

    >>> _shared_start("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant: Hey")
    '\n\nHuman: Hi\n\nAssistant:'
    >>> _shared_start("one two three", "one two thrice")
    'one two '
    """
    start = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - of texts, not of paths
    cut = re.match(r".*\n\nAssistant:", start, re.DOTALL) or re.match(r".*\s", start, re.DOTALL)
    return cut[0] if cut else ""


def _key(text: Text) -> str:
    return text if isinstance(text, str) else canonical(text)


# --- fields -----------------------------------------------------------------------------------------------------------


def _field(row: Row, name: str, above: str = "") -> Any:
    if row.get(name) is None:
        place = quoted(above + name)
        raise BadRow(f"{place} is null" if name in row else f"has no {place}, only {some(row)}")
    return row[name]


def _margin(row: Row, optional: frozenset[str]) -> float:
    """By how much the chosen answer is better, in TRL's column of that name; 0 without it."""
    value = _field(row, "margin") if "margin" in optional else 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"'margin' is {_kind(value)}, expected a number")
    return float(value)


def _scalar(row: Row, name: str, above: str = "") -> str:
    value = _field(row, name, above)
    if isinstance(value, Mapping | list):
        raise BadRow(f"{quoted(above + name)} is {_kind(value)}, expected text or a number")
    return _string(str(value), quoted(above + name))


def _text(value: Any, name: str) -> Text:
    """Text as it is, or a list of messages. Fields that are null are left out, as columnar files add them."""
    if isinstance(value, str):
        return _string(value, quoted(name))
    if not isinstance(value, list):
        raise BadRow(f"{quoted(name)} is {_kind(value)}, expected text or a list of messages")
    if not value:
        raise BadRow(f"{quoted(name)} is an empty list, expected one message or more")
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise BadRow(f"{quoted(place)} is {_kind(message)}, expected a message with role and content")
        for part in ("role", "content"):
            _string(_field(message, part, f"{place}."), quoted(f"{place}.{part}"))
        _string(json.dumps(message, default=str, ensure_ascii=False), quoted(place))
    return tuple({key: part for key, part in message.items() if part is not None} for message in value)


def _strings(row: Row, name: str, expected: int | None = None) -> tuple[str, ...]:
    value = _field(row, name)
    if not isinstance(value, list):
        raise BadRow(f"{quoted(name)} is {_kind(value)}, expected a list of texts")
    if not value or expected not in (None, len(value)):
        raise BadRow(f"{quoted(name)} is a list of {len(value)}, expected {expected or 'one or more'} texts")
    return tuple(_string(text, quoted(f"{name}[{i}]")) for i, text in enumerate(value))


def _string(value: Any, place: str) -> str:
    """`value`, if it is text that can be written as UTF-8: no tokenizer takes a lone surrogate."""
    if not isinstance(value, str):
        raise BadRow(f"{place} is {_kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{place} holds half a character, {value[error.start]!a}, which no tokenizer takes") from None
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words; small ones as they are.

    >>> _kind([]), _kind({}), _kind(None), _kind(2.5), _kind("no")
    ('a list', 'an object', 'null', '2.5', 'text')
    """
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if value is None:
        return "null"
    return "text" if isinstance(value, str) else str(value)[:40]
