"""The model card: the README.md of a merged checkpoint, for a person who is deciding whether to use it.

Nothing is in it that was not measured, and no local path. What the numbers say is in `card_results`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from warmerge.errors import UsageError, quoted
from warmerge.report.card.results import (
    Results,
    curve_lines,
    index_results,
    length_words,
    read_results,
    result_lines,
)
from warmerge.report.card.text import (
    clean,
    code,
    escaped,
    inputs_of,
    left_out,
    public_warnings,
    table,
)

CARD_MARK = "<!-- Written by warmerge. Remove this line to keep your own text when you push again. -->"
PROMPT, ANSWER = "What is the capital of France?", "Paris."
_WARM = "[WARM](https://arxiv.org/abs/2401.12187)"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_CLASSIFIER = "ForSequenceClassification"
# How the rules that are no plain average are called in a sentence.
_MERGES = {"uniform": "uniform average", "weighted": "weighted average", "lambda": "weighted average"}


@dataclass(frozen=True)
class Example:
    """Lines of Python, and what they printed; None where they could not be run."""

    lines: str
    printed: str | None


@dataclass(frozen=True)
class CardFacts:
    """What only the publisher knows. The defaults are those of a folder that was just merged.

    Args:
        repo: "me/warm-rm"; None for a card in a local folder.
        revision: for the loading lines, when it is not main.
        architecture: class in config.json.
        license: some of license, license_name, license_link; {} where none is stated.
        base_model: Hub ids that the user named: what local members were fine-tuned from.
        fingerprint: of these weights, in hex.
        parameters, dtype, head: of these weights; head such as "score.weight [1, 384]".
        texts, ends_in_eos: as for `scoring_lines`; `texts` is None where it is not known.
        example: lines that were run.
        evaluation: an eval.json that measured this model, called `evaluated_as` in its rows.
        curve: a curve.json of this model's members.
        figures: "eval", "curve" -> name of a picture beside the card.
        member_names: name of a member in evaluation and curve -> its public name, such as "member 1".
    """

    repo: str | None = None
    revision: str | None = None
    architecture: str = ""
    license: Mapping[str, str] = field(default_factory=dict)
    base_model: tuple[str, ...] = ()
    fingerprint: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    head: str | None = None
    texts: str | None = None
    ends_in_eos: bool = False
    example: Example | None = None
    evaluation: Mapping[str, Any] | None = None
    evaluated_as: str = "average"
    curve: Mapping[str, Any] | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    member_names: Mapping[str, str] = field(default_factory=dict)


def model_card(manifest: Mapping[str, Any] | None, facts: CardFacts) -> str:
    """README.md of a reward model: what it is, how to use it, of what it was made, what was measured, what to doubt.

    Args:
        manifest: warmerge.json of a merge; `coefficients` may be missing while they are not yet measured. None for a
            model that is no merge of ours.

    Raises:
        UsageError: a `base_model` that is no Hub id; an evaluation without a row of `evaluated_as`, or with a row that
            `warmerge eval` does not write.
    """
    wrong = [name for name in facts.base_model if not _HUB_ID.fullmatch(name)]
    if wrong:
        raise UsageError(f"model card: expected Hub ids such as org/name as base model, found {quoted(wrong[0])}")
    results = None
    if facts.evaluation is not None:
        results = read_results(facts.evaluation, facts.evaluated_as, facts.member_names)
    title = facts.repo.split("/")[-1] if facts.repo else "Reward model" if manifest is None else "Merged reward model"
    curve = [] if facts.curve is None else curve_lines(facts.curve, facts.member_names, _picture(facts, "curve"))
    sections = [
        [_front_matter(manifest, facts, results, title), CARD_MARK],
        [f"# {escaped(title)}", "", _what_it_is(manifest, results is not None)],
        ["## Use it", "", *_use(facts)],
        [] if manifest is None else ["## What it is made of", "", *_made_of(manifest, facts)],
        ["## What was measured", "", *_measured(facts, results), *([""] if curve else []), *curve],
        ["## Limits", "", *_limits(manifest, results)],
        ["## Licence and origin", "", *_origin(manifest, facts)],
    ]
    return "\n\n".join("\n".join(section).strip() for section in sections if section) + "\n"


def scoring_lines(place: str, texts: str, revision: str | None = None, *, ends_in_eos: bool = False) -> str:
    """Lines of Python that print the reward of an answer, the one that `warmerge score` gives in float32.

    Args:
        place: Hub id or folder.
        texts: "chat" or "plain", how texts are rendered.
        ends_in_eos: whether plain texts end in an end-of-sequence token that the tokenizer does not add by itself.

    >>> scoring_lines("me/warm-rm", "plain").splitlines()[3]
    'tokenizer = AutoTokenizer.from_pretrained("me/warm-rm")'
    """
    source = _literal(place) + (f", revision={_literal(revision)}" if revision else "")
    if texts == "chat":
        said = '[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]'
        tokens = f"tokenizer.apply_chat_template(\n    {said},\n    tokenize=True, return_dict=True, "
        tokens += 'return_tensors="pt",\n)'
    else:
        end = " + tokenizer.eos_token" if ends_in_eos else ""
        tokens = rf'tokenizer(prompt + "\n\n" + answer{end}, return_tensors="pt")'
    return f"""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({source}, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained({source})
prompt, answer = {_literal(PROMPT)}, {_literal(ANSWER)}
tokens = {tokens}
print(round(model(**tokens).logits[0, 0].item(), 4))"""


def _literal(value: str) -> str:
    return json.dumps(value)  # a Python literal too, with the quotes of the other lines


def _front_matter(manifest: Mapping[str, Any] | None, facts: CardFacts, results: Results | None, title: str) -> str:
    import yaml

    stated = {key: clean(facts.license[key]) for key in ("license", "license_name", "license_link") if
              facts.license.get(key)}  # fmt: skip
    front: dict[str, Any] = {"library_name": "transformers", **stated}
    merged = list(dict.fromkeys(repo for entry in inputs_of(manifest, "member") if (repo := _hub_id(entry))))
    if merged or facts.base_model:
        front["base_model"] = merged or list(facts.base_model)
        front["base_model_relation"] = "merge" if merged else "finetune"
    if facts.architecture.endswith(_CLASSIFIER):
        front["pipeline_tag"] = "text-classification"
    front["tags"] = ["reward-model", *([] if manifest is None else ["warm", "model-merging"]), "warmerge", "RLHF"]
    measured = [] if results is None else index_results(results)
    if measured:
        front["model-index"] = [{"name": clean(title), "results": measured}]
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _what_it_is(manifest: Mapping[str, Any] | None, measured: bool) -> str:
    words = "A reward model: it gives a prompt with an answer one number, higher for an answer that it judges better."
    if manifest is not None:
        name, count = str(manifest["rule"]["name"]), len(inputs_of(manifest, "member"))
        merge = _MERGES.get(name, f"`{name}` merge" if name.isalnum() else "merge")
        words += f" Its weights are the {merge} of those of {count} fine-tuned reward models ({_WARM})."
        words += " How accurate that is was measured, see below; no more is claimed." if measured else ""
    return words


def _use(facts: CardFacts) -> list[str]:
    lines, place = [], facts.repo or "."
    example = facts.example
    if example is None and facts.texts is not None and facts.architecture.endswith(_CLASSIFIER):
        example = Example(scoring_lines(place, facts.texts, facts.revision, ends_in_eos=facts.ends_in_eos), None)
    said = ""
    if example is not None:
        printed = [] if example.printed is None else [f"# {clean(line)}" for line in example.printed.splitlines()]
        code_lines = "\n".join([example.lines, *printed])
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code_lines)), default=0))
        lines += [f"{fence}python", code_lines, fence, ""]
        said = "These lines were not run when this card was written. "
        if printed:
            said = "The last line is what they printed when this card was written. "
        said += "" if facts.repo else "`.` is this folder. "
    end = " and the end-of-sequence token" if facts.ends_in_eos else ""
    rule = {
        "chat": "The text is prompt and answer as messages in the tokenizer's chat template",
        "plain": f"The text is the prompt, a blank line (none where there is white space already), the answer{end}",
    }.get(
        facts.texts or "",
        "The text is made by the tokenizer's chat template, or without one is prompt, blank line, answer",
    )
    checkpoint = (facts.repo or "FOLDER") + (f"@{facts.revision}" if facts.repo and facts.revision else "")
    score = f"`warmerge score {checkpoint} --data pool.jsonl -o scored.jsonl`"
    lines.append(f"{said}{rule}; {score} does the same for many answers, and shortens texts that are too long.")
    lines.append("Rewards have no unit and no zero: compare answers to the same prompt, nothing else.")
    return lines


def _made_of(manifest: Mapping[str, Any], facts: CardFacts) -> list[str]:
    rule, rows = manifest["rule"], []
    numbered = [(f"member {i}", entry) for i, entry in enumerate(inputs_of(manifest, "member"), start=1)]
    numbered += [("base", entry) for entry in inputs_of(manifest, "base")]
    for (name, entry), coefficient in zip(numbered, _coefficients(manifest, len(numbered)), strict=True):
        rows.append([name, _where(entry), coefficient, f"`{_hex(entry.get('fingerprint', ''))[:16]}`"])
    chosen = "".join(f", {escaped(key)} = {escaped(value)}" for key, value in rule.items() if key not in
                     ("name", "formula", "source"))  # fmt: skip
    dtype = facts.dtype or manifest.get("dtype")
    lines = [
        *table(["", "checkpoint", "coefficient", "fingerprint of its weights"], rows),
        "",
        f"Rule: {escaped(rule['name'])}, {code(rule['formula'])}{chosen} ({escaped(rule['source'])}), tensor by "
        f"tensor; sums in float64, rounded once to {escaped(dtype or 'their dtype')}.",
    ]
    copied = len(manifest.get("copied_tensors") or [])
    if copied:
        lines.append(f"A partial merge: {copied} tensors are copies of one member's, the others are merged.")
    if facts.base_model and not all(_hub_id(entry) for entry in inputs_of(manifest, "member")):
        origin = f"{_links(facts.base_model)}, as their owner says"
        lines.append(f"Members that are not on the Hub were fine-tuned from {origin}.")
    return lines + _selected(manifest, facts)


def _selected(manifest: Mapping[str, Any], facts: CardFacts) -> list[str]:
    """How the members were chosen among more, and whether they are reported on the pairs that they were chosen by."""
    record = manifest.get("selection")
    if not isinstance(record, Mapping):
        return []
    used = {entry.get("fingerprint") for entry in record.get("sets") or []}
    sets = [entry for entry in (facts.evaluation or {}).get("sets") or [] if entry.get("fingerprint") in used]
    # A record that was published once says how many there were, and not their names.
    count, how = record.get("of") or len(record.get("accuracies") or []), escaped(record.get("selection"))
    words = f"The members were chosen from {count} checkpoints by their accuracy ({how})."
    if sets:
        words += (
            f" The numbers below on {_listed(sets)} are of the pairs that they were chosen by, which flatters them."
        )
    return [words]


def _listed(sets: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(escaped(re.split(r"[/\\]", str(entry.get("name")))[-1]) for entry in sets)


def _coefficients(manifest: Mapping[str, Any], count: int) -> list[str]:
    found = manifest.get("coefficients") or {}
    if "members" in found:
        values = [*found["members"], found.get("base", 0.0)][:count]
        return [f"{value:.4g}" for value in values]
    if manifest["rule"]["name"] == "uniform":
        return [f"{1 / count:.4g}"] * count
    return ["measured per tensor, see `warmerge.json`" if "per_tensor" in found else "see `warmerge.json`"] * count


def _where(entry: Mapping[str, Any]) -> str:
    repo = _hub_id(entry)
    revision = str(entry.get("revision", "main"))
    place = "not on the Hub"
    if repo:
        place = f"[{escaped(repo)}](https://huggingface.co/{quote(repo)}/tree/{quote(clean(revision), safe='')})"
    if "adapter" in entry:
        place += f", LoRA adapter (rank {escaped(entry.get('rank'))}, alpha {escaped(entry.get('alpha'))})"
    return place


def _measured(facts: CardFacts, results: Results | None) -> list[str]:
    if results is not None:
        return result_lines(results, _picture(facts, "eval"))
    return ["Nothing has been measured on this model unless it is written here."]


def _limits(manifest: Mapping[str, Any] | None, results: Results | None) -> list[str]:
    shared, safe = "It repeats the biases of the pairs that it was trained on: length, style, flattery.", ""
    if manifest is not None:
        shared = "Biases that all members share stay in the average: length, style, flattery."
        safe = " Averaging does not prevent that."
    lengths = length_words(results) if results is not None else ""
    lines = [
        f"- {shared} {lengths}".rstrip(),
        "- It is not safe to optimise against: RL and best-of-N find what it wrongly rewards."
        f"{safe} Keep a control reward, and read samples.",
        "- It is valid only on texts like those that it was trained on.",
    ]
    sentences = public_warnings(manifest)
    lines += [f"- Warned when it was merged: {escaped(sentence)}." for sentence in sentences if sentence]
    return lines + ([left_out(sentences.count(None), "warning", "merge")] if None in sentences else [])


def _origin(manifest: Mapping[str, Any] | None, facts: CardFacts) -> list[str]:
    stated = [
        clean(facts.license[key]) for key in ("license", "license_name", "license_link") if facts.license.get(key)
    ]
    lines = ["No licence is stated; ask its owner before using it."]
    if stated:
        lines = [f"Licence: {escaped(', '.join(stated))}."]
    if manifest is not None:
        versions = {"warmerge": manifest["warmerge"]} | dict(manifest.get("versions") or {})
        known = [f"{name} {versions[name]}" for name in ("warmerge", "torch", "transformers") if name in versions]
        record = "[`warmerge.json`](warmerge.json) holds the record: inputs, coefficients, versions."
        lines.append(f"Merged with {escaped(', '.join(known))}; {record}")
    parameters = facts.parameters or (manifest or {}).get("parameters")
    weights = [f"{parameters:,} parameters"] if parameters else []
    weights += [escaped(value) for value in (facts.dtype, facts.architecture) if value]
    weights += [f"reward head {escaped(facts.head)}"] if facts.head else []
    weights += [f"fingerprint `{_hex(facts.fingerprint)}`"] if facts.fingerprint else []
    return lines + ([f"Weights: {', '.join(weights)}."] if weights else [])


def _hub_id(entry: Mapping[str, Any]) -> str:
    repo = str(entry.get("repo", ""))
    return repo if _HUB_ID.fullmatch(repo) else ""


def _hex(fingerprint: object) -> str:
    return re.sub(r"[^0-9a-f]", "", str(fingerprint))


def _links(ids: Sequence[str]) -> str:
    return ", ".join(f"[{escaped(name)}](https://huggingface.co/{quote(name)})" for name in ids)


def _picture(facts: CardFacts, name: str) -> str | None:
    return quote(facts.figures[name]) if name in facts.figures else None
