"""All families, in the order of the page."""

from __future__ import annotations

from tests.families.building import Family
from tests.families.dense import DENSE
from tests.families.hybrids import HYBRIDS
from tests.families.mixtures import MIXTURES
from tests.families.others import ENCODERS, MULTIMODAL

FAMILIES: dict[str, Family] = {family.name: family for family in (*DENSE, *MIXTURES, *HYBRIDS, *MULTIMODAL, *ENCODERS)}
