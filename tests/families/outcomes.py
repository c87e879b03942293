"""Every check of one model, and what came of it: right, refused in one sentence, or wrong."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

from funcprobe.errors import FuncprobeError
from tests.families.checks import CHECKS, Case, Wrong


class Outcome(NamedTuple):
    """What came of a check."""

    kind: Literal["right", "refused", "wrong"]
    said: str = ""  #: the sentence of a refusal, or what was wrong


def outcomes_of(build: Callable[[torch.dtype], nn.Module]) -> dict[str, Outcome]:
    """Return what came of every check; the last looks at what all others left behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows of a few tokens, of kernels, of releases: not what is asked here
        case = Case.of(build)
        _ = case.before
        return {name: _outcome(functools.partial(check, case)) for name, check in CHECKS.items()}


def _outcome(check: Callable[[], None]) -> Outcome:
    try:
        check()
    except Wrong as found:
        return Outcome("wrong", str(found))
    except FuncprobeError as refusal:
        said = str(refusal)
        return Outcome("refused" if is_one_sentence(said) else "wrong", said)
    except Exception as error:  # a raw error is what this table is to find, of whatever kind
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).strip().splitlines()[:1]
        return Outcome("wrong", f"{type(error).__name__}: {''.join(first)} ({last.filename}:{last.lineno})")
    return Outcome("right")


def is_one_sentence(said: str) -> bool:
    """Return whether a refusal is one calm sentence: one line that begins with a capital and ends with a full stop."""
    return "\n" not in said and said[:1].isupper() and said.endswith(".") and "!" not in said and len(said) < 600
