"""A checkpoint's tokenizer, found to be the model's own, and made into the renderer of its texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, quoted
from warmerge.rewards.render import TEMPLATES, Renderer
from warmerge.weights import small_files
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import LocalFolder

# A tokenizer that knows no limit says 1e30.
_NO_LIMIT = 1_000_000


def open_renderer(
    source: Checkpoint, module: Any, template: str, max_length: int | None, ends_texts: bool, trust_remote_code: bool
) -> Renderer:
    """The renderer for `module`, from the tokenizer beside the checkpoint's weights (or beside an adapter's base's).

    Args:
        template: auto, chat or plain.
        max_length: in tokens; None for as many as the model takes.
        ends_texts: whether plain texts end in the end-of-sequence token, as a decoder's do.

    Raises:
        UsageError: a template or length that cannot be used.
        RefusedError: no tokenizer, one that cannot be loaded, one with more tokens than the model has embeddings, or
            a length that is no number.
    """
    if template not in TEMPLATES:
        raise UsageError(f"--template: expected {', '.join(TEMPLATES)}, found {template!r}")
    tokenizer = open_tokenizer(source, trust_remote_code)
    rows, highest = module.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        what = f"has a tokenizer with ids up to {highest}, but embeddings for {rows} tokens: not the model's tokenizer"
        raise RefusedError([Finding(source.label, what)])
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise UsageError(f"--template chat: the tokenizer of {source.label} has no chat template")
    limit = _longest(source, tokenizer, module)
    if max_length is not None and not 1 <= max_length <= limit:
        raise UsageError(f"--max-length: expected 1 to {limit} tokens for {source.label}, found {max_length}")
    # The same files are read by another class for another model type.
    digest = f"{small_files.tokenizer_digest(source)} {type(tokenizer).__name__}"
    rule = "chat" if has_template and template != "plain" else "plain"
    return Renderer(tokenizer, digest, rule, max_length or limit, tokenizer.eos_token_id if ends_texts else None)


def pad_doubts(source: Checkpoint, tokenizer: Any, module: Any) -> list[Finding]:
    """A warning for a decoder whose config and tokenizer pad with different tokens.

    In padded batches transformers reads a decoder's reward at the last token that is not config.pad_token_id.
    """
    pad = module.config.get_text_config().pad_token_id
    if pad is None or tokenizer.pad_token_id in (pad, None):
        return []
    what = (
        f"has pad_token_id {pad}, its tokenizer pads with {tokenizer.pad_token_id}: in padded batches transformers "
        "would read the reward at another token. warmerge does not; other programs may"
    )
    return [Finding(f"{source.label}/config.json", what)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' own reports, advice and bars are kept off the terminal: what they would say is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def open_tokenizer(source: Checkpoint, trust_remote_code: bool) -> Any:
    """The tokenizer beside a checkpoint's weights.

    Raises:
        RefusedError: there is none, it cannot be loaded, or it names another vocabulary than tokenizer.json.
    """
    from transformers import AutoTokenizer

    folder = small_files.tokenizer_folder(source)
    if not isinstance(folder, LocalFolder) or not any(name in folder.sizes() for name in small_files.TOKENIZER_FILES):
        what = "has no tokenizer files; copy those of the model it was trained from"
        raise RefusedError([Finding(source.label, what)])
    if strange := small_files.strange_vocabularies(source):
        raise RefusedError(strange)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of tokenizer has its own ways to fail on a damaged file
        raise RefusedError([Finding(source.label, f"has a tokenizer that cannot be loaded: {error}"[:400])]) from error


def _longest(source: Checkpoint, tokenizer: Any, module: Any) -> int:
    """The most tokens that the model has positions for, or its tokenizer allows."""
    said = {
        ("tokenizer_config.json", "model_max_length"): tokenizer.model_max_length,
        ("config.json", "max_position_embeddings"): getattr(
            module.config.get_text_config(), "max_position_embeddings", None
        ),
    }
    wrong = [
        Finding(f"{source.label}/{file}", f"has {field} {quoted(str(value)[:60])}, expected a number; correct it there")
        for (file, field), value in said.items()
        if value is not None and type(value) not in (int, float)
    ]
    if wrong:
        raise RefusedError(wrong)
    limits = [n for n in said.values() if n is not None and n > 0]  # XLNet says -1
    # RoBERTa counts positions from behind its padding index, so it has fewer than its table.
    table: Any = getattr(getattr(module.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        limits.append(table.num_embeddings - padding - 1)
    return int(min([_NO_LIMIT, *limits]))
