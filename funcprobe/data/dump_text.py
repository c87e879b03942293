"""Prompts and completions that a dump holds as text or messages, encoded again: ids near those that were sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funcprobe.data.dump_rows import Row
from funcprobe.errors import InputError, Note


def encoded(row: Row, tokenizer: Any, rendered: bool) -> Row:
    """Return a sequence of text with the ids of its prompt and its completion.

    A prompt is encoded as a trainer encodes one, with the tokenizer's own special tokens, unless it is `rendered`: then
    a chat template has put them there. Messages go through the tokenizer's template.

    Raises:
        InputError: If there is no text, or messages that are not of one turn.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return rest | {
        "prompt_ids": _prompt(prompt, tokenizer, rendered),
        "completion_ids": _ids(tokenizer, _reply(completion), False),
    }


def stamp(rows: int) -> Note:
    """Return the note that rollouts carry whose ids are made from text."""
    return Note(
        "retokenized",
        f"The ids of {rows} rows are made again from text (retokenized): special tokens, the one that ends a "
        "completion among them, are not in it, and a text may be encoded in other tokens than those that were sampled.",
    )


def _prompt(prompt: Any, tokenizer: Any, rendered: bool) -> list[int]:
    """Return the ids of a prompt of text or of messages.

    Raises:
        InputError: If it is neither, or the template does not take the messages.
    """
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt, not rendered)
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise InputError(f"'prompt' is {type(prompt).__name__}; expected text, or a list of messages.")
    plain = [{name: part for name, part in message.items() if part is not None} for message in prompt]
    text = _asked(tokenizer.apply_chat_template, plain, add_generation_prompt=True, tokenize=False)
    return _ids(tokenizer, text, False)


def _reply(completion: Any) -> str:
    """Return the text of a completion, which messages have where they are one of text.

    Raises:
        InputError: If it is something else.
    """
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    if not isinstance(completion, str):
        raise InputError(
            f"'completion' is {type(completion).__name__}; expected text, or one message of text (what tools wrote in "
            "between cannot be told from text)."
        )
    return completion


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the ids of a text.

    Raises:
        InputError: If it holds half a character, which no tokenizer encodes, or the tokenizer does not take it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a text holds half a character ({error.reason} at {error.start}).") from None
    return list(_asked(tokenizer, text, add_special_tokens=special)["input_ids"])


def _asked(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return the answer of a tokenizer, or of its chat template, which raise whatever they like.

    Raises:
        InputError: If it raises anything.
    """
    try:
        return function(*arguments, **options)
    except Exception as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"the tokenizer, or its chat template, does not take a text ({told:.120}).") from error
