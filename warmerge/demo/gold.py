"""The gold reward of the tiny world: what a summary is truly worth. No reward model sees it; `--control` does.

    warmerge rl ... --control gold.py:gold
    warmerge bon ... --control gold.py:gold

A post is a list of one-word statements: key points, side remarks, fillers. A good summary says each key point of its
post once, and stops.
"""

from __future__ import annotations

KEY_POINTS = (
    "exam", "rent", "job", "loan", "crash", "theft", "wedding", "divorce", "cancer", "debt", "visa", "baby", "lawsuit",
    "flood", "fraud", "affair", "fire", "move",
)  # fmt: skip
REMARKS = (
    "weather", "lunch", "music", "cat", "coffee", "bus", "garden", "movie", "shoes", "phone", "sofa", "soup", "bike",
    "lamp", "novel", "game", "hat", "tea",
)  # fmt: skip
FILLERS = ("um", "well", "like", "so", "anyway", "basically")
THANKS = "thanks"
TLDR = "TL;DR:"
# Answers are sampled up to so many tokens, a token being a word: as long a summary did not end by itself.
UNENDED = 16


def gold(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The worth of each summary (completion) of its post (prompt), at most 4 for a post of 4 key points.

    >>> gold(["exam um rent cat TL;DR:"] * 3, ["rent exam", "exam exam cat", "debt thanks"])
    [2.0, -0.3, -1.1]
    """
    return [_worth(prompt.split(), summary.split()) for prompt, summary in zip(prompts, completions, strict=True)]


def _worth(post: list[str], summary: list[str]) -> float:
    worth, said = 0.0, set[str]()
    for word in summary:
        if word == THANKS:
            worth -= 0.1
        elif word in FILLERS:
            worth -= 0.25
        elif word not in post or word == TLDR or word in said:  # invented, or said twice
            worth -= 1
        else:
            worth += 1 if word in KEY_POINTS else -0.3
        said.add(word)
    if len(summary) >= UNENDED:
        worth -= 0.5
    return round(worth, 6)
