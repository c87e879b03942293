"""All that is asked: every family and every adapter, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from tests.families.adapters import ADAPTERS
from tests.families.table import FAMILIES


class Subject(Protocol):
    """What is asked: a family or an adapter."""

    @property
    def name(self) -> str:
        """What the page calls it."""
        ...

    @property
    def why(self) -> str:
        """What this one does that others do not."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """The checks that are refused, each with words of the sentence."""
        ...

    @property
    def quick(self) -> bool:
        """Whether every run of the tests has it."""
        ...

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Return the model."""
        ...


SUBJECTS: dict[str, Subject] = {**FAMILIES, **ADAPTERS}
