"""Reward functions: found by name, called as TRL calls them, their answers checked."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from funcprobe.errors import InputError

#: reward(prompts=[...], completions=[...]) -> one number a row; texts with a tokenizer, lists of ids without.
Reward = Callable[..., Sequence[float]]


def load_reward(name: str) -> Reward:
    """Return the reward function called `module:function`, from an installed module or one in the current directory.

    Raises:
        InputError: If the name has another form, the module is missing or fails to import, or it has no such function.

    Example:
        >>> load_reward("funcprobe.cli.demo_task:reward").__name__
        'reward'
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise InputError(f"The reward is '{name}'; expected the form module:function, such as my_rewards:exact_match.")
    found = getattr(_imported(module_name), attribute, None)
    if found is None:
        raise InputError(f"The module '{module_name}' has no '{attribute}'; check the name of the reward function.")
    if not callable(found):
        raise InputError(f"'{name}' is a {type(found).__name__}; expected a function of prompts and completions.")
    return found


def rewards_of(
    reward: Reward, prompts: Sequence[list[int]], completions: Sequence[list[int]], tokenizer: Any = None
) -> list[float]:
    """Return the rewards of all rows from one call `reward(prompts=..., completions=...)`.

    With a tokenizer the function sees texts, decoded without special tokens as in TRL, otherwise lists of ids.

    Raises:
        InputError: If it does not return one finite number a row.
    """
    shown = [[_text(row, tokenizer) for row in rows] for rows in (prompts, completions)]
    returned = reward(prompts=shown[0], completions=shown[1])
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        values = list(returned)
    except TypeError:
        raise InputError(
            f"The reward function '{name}' returned a {type(returned).__name__}; expected a list of numbers."
        ) from None
    if len(values) != len(completions):
        raise InputError(
            f"The reward function '{name}' returned {len(values)} values for {len(completions)} completions; expected "
            "one number a completion."
        )
    return [_number(name, row, value) for row, value in enumerate(values)]


def _text(row: list[int], tokenizer: Any) -> Any:
    return list(row) if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True)


def _number(name: str, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"The reward function '{name}' returned {value!r} for row {row}; expected a finite number.")
    return number


def _imported(name: str) -> ModuleType:
    with _current_directory_importable():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                raise InputError(
                    f"There is no module '{error.name}' to take the reward '{name}' from; run in the folder that holds "
                    "it, or install it."
                ) from error
            raise _broken(name, error) from error
        except Exception as error:
            raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> InputError:
    return InputError(f"The module '{name}' cannot be imported: {type(error).__name__}: {error}.")


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Search the current directory last, so that it hides nothing that is installed; an entry point does not."""
    here, before = os.getcwd(), list(sys.path)
    if here not in before:
        sys.path.append(here)
    try:
        yield
    finally:
        if here not in before and here in sys.path:
            sys.path.remove(here)
