"""Texts as a language model is fine-tuned on them: their tokens, and where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from warmerge.rewards.forward import common
from warmerge.rewards.render import Encoded, Renderer, encode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Integers = NDArray[numpy.int64]

# Larger than any text: nothing is cut.
_UNCUT = 1 << 40


def tokenise_answers(renderer: Renderer, texts: Sequence[tuple[Text, Text]]) -> list[tuple[Encoded, int]]:
    """The tokens of each (prompt, answer), and at which of them the answer begins.

    It begins where the tokens differ from those of the same prompt with another answer. A token that reaches over the
    border is the answer's. A text without a prompt is all answer.

    Raises:
        RefusedError: as `render.encode`.
    """
    encoded = encode(renderer, texts)
    whole = replace(renderer, max_length=_UNCUT)
    others = encode(whole, [_same_prompt(renderer, *text) for text in texts])
    found = []
    for text, entry, other in zip(texts, encoded, others, strict=True):
        if not text[0]:
            begin = 0
        elif entry.prompt_cut or entry.answer_cut:
            uncut = encode(whole, [text])[0].ids
            begin = _after_cutting(uncut, common(uncut, other.ids), entry)
        else:
            begin = common(entry.ids, other.ids)
        found.append((entry, begin))
    return found


def _same_prompt(renderer: Renderer, prompt: Text, answer: Text) -> tuple[Text, Text]:
    """The prompt, and not this answer: another one, that begins with another letter."""
    answered, asked = _words(answer), _words(prompt)
    if not prompt:
        return prompt, answer
    if renderer.template == "plain" and answered[:1].isspace():
        return "", asked  # no blank line comes before such an answer: its own white space does
    letter = "y" if answered.lstrip().startswith("x") else "x"
    return prompt, letter if isinstance(answer, str) else ({"role": answer[0]["role"], "content": letter},)


def _words(text: Text) -> str:
    """What a text says first."""
    return text if isinstance(text, str) else str((text[0].get("content") if text else None) or "")


def _after_cutting(uncut: Integers, border: int, cut: Encoded) -> int:
    """Where the answer begins in a text that lost the left of its prompt, and perhaps the right of its answer."""
    if not cut.answer_cut:
        return len(cut.ids) - (len(uncut) - border)
    # The place around which most tokens are those around the border.
    before, after = uncut[:border][::-1], uncut[border:]
    fits = [common(cut.ids[:k][::-1], before) + common(cut.ids[k:], after) for k in range(len(cut.ids))]
    return int(numpy.argmax(fits))
