"""The demo's task: the running sums of a row of digits, modulo 10. The answer to `31415...=` is `34894`.

Every token of an answer depends on the one before it and on one digit of the prompt, a slip spoils what follows, and
every answer can be checked exactly. Prompts fill a field of fixed width, so that a small model learns in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from funcprobe.errors import InputError, missing_extra

#: The vocabulary, in the order of ids.
SYMBOLS = (*"0123456789", ".", "=", "<eos>", "<pad>")


def answer(prompt: str, slips: Sequence[int] = ()) -> str:
    """Return the right completion of a prompt, without its end token; or, with `slips` to add on the way, a wrong one.

    Raises:
        InputError: If the prompt is not a row of digits, dots up to the width of the field and an equals sign.

    Example:
        >>> answer("31415...="), answer("31415...=", slips=[0, 0, 2])
        ('34894', '34016')
    """
    if not re.fullmatch(r"[0-9]+[.]*=", prompt):
        raise InputError(f"The prompt is {prompt!r}; this task expects digits, dots and an equals sign: '31415...='.")
    digits, total, written = prompt.rstrip(".="), 0, ""
    for number, digit in enumerate(digits):
        total = (total + int(digit) + (slips[number] if number < len(slips) else 0)) % 10
        written += str(total)
    return written


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return for every completion the share of positions that are right, over the longer of answer and completion.

    Raises:
        InputError: If a prompt is not of this task.

    Example:
        >>> reward(["31415...=", "12="], ["34894", "1"])
        [1.0, 0.5]
    """
    return [_share_right(answer(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True)]


def draw_prompts(
    count: int, shortest: int, longest: int, generator: torch.Generator, exclude: Collection[str] = ()
) -> list[str]:
    """Return `count` different prompts of `shortest` to `longest` digits, in a field of `longest`; none of `exclude`.

    Raises:
        InputError: If there are not that many prompts.
    """
    possible = sum(10**digits for digits in range(shortest, longest + 1)) - len(exclude)
    if not 0 < count <= possible / 2:  # above that, drawing until enough differ takes long
        raise InputError(f"{count} prompts were asked for; expected at least 1 and at most half of {possible}.")
    taken = set(exclude)
    drawn: list[str] = []
    while len(drawn) < count:
        digits = int(torch.randint(shortest, longest + 1, (), generator=generator))
        row = "".join(str(digit) for digit in torch.randint(10, (digits,), generator=generator).tolist())
        prompt = row.ljust(longest, ".") + "="
        if prompt not in taken:
            taken.add(prompt)
            drawn.append(prompt)
    return drawn


def build_tokenizer() -> Any:
    """Return the task's tokenizer, a token a character, as a `PreTrainedTokenizerFast`.

    Raises:
        MissingExtraError: If transformers or tokenizers is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        missing = missing_extra("transformers", "hf", "the demo's tokenizer")
        raise missing from error
    backend = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(SYMBOLS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def _share_right(right: str, completion: str) -> float:
    hits = sum(a == b for a, b in zip(right, completion, strict=False))
    return hits / max(len(right), len(completion))
