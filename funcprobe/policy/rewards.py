"""Reward functions: found by name, called as TRL calls them, their answers checked."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from types import ModuleType
from typing import Any

from funcprobe.errors import InputError
from funcprobe.visible_text import bounded

#: reward(prompts=[...], completions=[...]) -> one number a row; texts with a tokenizer, lists of ids without.
Reward = Callable[..., Sequence[float]]


def load_reward(name: str) -> Reward:
    """Return the reward function called `module:function`, which runs the code of that module.

    Modules of the current directory come first, and stay importable, as under `python -m`.

    Raises:
        InputError: If the name has another form, the module is missing or fails to import, or it has no such function.

    Example:
        >>> load_reward("funcprobe.cli.demo_task:reward").__name__
        'reward'
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise InputError(f"The reward is '{name}'; expected the form module:function, such as my_rewards:exact_match.")
    try:
        found = getattr(_imported(module_name), attribute, None)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # of a module's own __getattr__
        raise InputError(f"The reward '{name}' cannot be had: {told(error)}.") from error
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
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        close = getattr(returned, "close", None)  # a coroutine that nobody waits for
        if callable(close):
            close()
        raise InputError(
            f"The reward function '{name}' returned a {type(returned).__name__}; expected a list of numbers."
        )
    try:
        values = list(itertools.islice(returned, len(completions) + 1))
    except (Exception, SystemExit, GeneratorExit) as error:
        raise InputError(f"The reward function '{name}' failed while it was listed: {told(error)}.") from error
    if len(values) > len(completions) and not isinstance(returned, Sized):
        raise InputError(
            f"The reward function '{name}' returned more values than the {len(completions)} completions; expected one "
            "number a completion."
        )
    count = len(returned) if isinstance(returned, Sized) else len(values)
    if count != len(completions):
        raise InputError(
            f"The reward function '{name}' returned {count} values for {len(completions)} completions; expected "
            "one number a completion."
        )
    return [_number(name, row, value) for row, value in enumerate(values)]


def _text(row: list[int], tokenizer: Any) -> Any:
    return list(row) if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True)


def _number(name: str, row: int, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except (Exception, SystemExit):  # a class's own __float__
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"The reward function '{name}' returned {_shown(value)} for row {row}; expected a finite number."
        )
    return number


def _imported(name: str) -> ModuleType:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise InputError(
                f"There is no module '{error.name}' to take the reward '{name}' from; run in the folder that holds "
                "it, or install it."
            ) from error
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def told(error: BaseException) -> str:
    """Return the words of somebody else's error, or its class where it cannot say any."""
    try:
        words = bounded(" ".join(str(error).split()), 200).rstrip(".")
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words}".rstrip(": ")


def _shown(value: Any) -> str:
    try:
        return bounded(repr(value), 80)
    except Exception:
        return f"a {type(value).__name__}"


def _broken(name: str, error: BaseException) -> InputError:
    return InputError(f"The module '{name}' cannot be imported: {told(error)}.")
