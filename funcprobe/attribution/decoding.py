"""Token ids as text, for people: a string an id, so that tables and pages need no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from funcprobe.errors import InputError
from funcprobe.types import Rollouts


def vocabulary_of(tokenizer: Any, batches: Iterable[Rollouts]) -> dict[int, str] | None:
    """Return the text of every token id in the batches ("" of an id that it does not know); None without a tokenizer.

    An id is decoded after itself and the first text cut off, because a token that opens a text loses its leading space
    under some tokenizers.

    Raises:
        InputError: If it is no tokenizer.
    """
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "decode"):
        raise InputError(
            f"tokenizer is {tokenizer!r}, which cannot decode; give a tokenizer itself, such as load_checkpoint(...)."
            "tokenizer."
        )
    ids = sorted({int(i) for batch in batches for i in batch.ids[batch.attention_mask].unique().tolist()})
    return {i: _text(tokenizer, i) for i in ids}


def shown(token: int, vocabulary: Mapping[int, str] | None) -> str:
    """Return the text of a token, or its id in brackets where it has none.

    Example:
        >>> shown(7, {7: " the"}), shown(7, None)
        (' the', '[7]')
    """
    return (vocabulary or {}).get(token) or f"[{token}]"


def _text(tokenizer: Any, token: int) -> str:
    # transformers may tidy spaces away; a tokenizer of the package tokenizers has no such option
    tidy = {"clean_up_tokenization_spaces": False} if hasattr(tokenizer, "clean_up_tokenization_spaces") else {}
    once, twice = (tokenizer.decode([token] * n, skip_special_tokens=False, **tidy) for n in (1, 2))
    return twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once
