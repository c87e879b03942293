"""Reading a result of any kind."""

from __future__ import annotations

import os
from typing import TypeAlias

from funcprobe.errors import InputError
from funcprobe.results.any_lr import CurveResult
from funcprobe.results.attribution import Attribution
from funcprobe.results.books import Books
from funcprobe.results.comparison import Comparison
from funcprobe.results.diagnosis import Diagnosis
from funcprobe.results.ledger_lines import FILE
from funcprobe.results.probe import ProbeResult
from funcprobe.results.storage import decoded, folder_of, read
from funcprobe.results.sweep import SweepResult
from funcprobe.results.validation import Validation

AnyResult: TypeAlias = (
    ProbeResult | SweepResult | CurveResult | Comparison | Attribution | Validation | Diagnosis | Books
)

_CLASSES = (ProbeResult, SweepResult, CurveResult, Comparison, Attribution, Validation, Diagnosis, Books)

_KINDS: dict[str, type[AnyResult]] = {cls.kind: cls for cls in _CLASSES}


def load(path: str | os.PathLike[str]) -> AnyResult:
    """Return the result that stands in a folder, whichever kind it is; no model is needed. A ledger's folder is one.

    An address `hf://datasets/owner/name[@revision][/path]` is one of the Hub, as `push_to_hub` returns it.

    Raises:
        InputError: If there is none, it is damaged, or it has another schema version.
        MissingExtraError: If it is an address, and huggingface_hub is not installed.
    """
    folder = folder_of(path)
    if (folder / FILE).is_file():
        return Books.read(folder)
    plain, kind = read(folder)
    if kind not in _KINDS:
        raise InputError(f"{folder} holds a result of kind '{kind}'; this funcprobe reads {', '.join(_KINDS)}.")
    return decoded(_KINDS[kind], plain, folder)
