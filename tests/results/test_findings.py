"""Findings: a probe, alone or within an attribution, and everything beside it or nothing."""

from __future__ import annotations

import pytest

from funcprobe.errors import InputError
from tests.cases.written_diagnosis import findings
from tests.cases.written_probe import result


def test_the_probe_is_that_of_the_attribution_or_stands_alone() -> None:
    whole = findings()
    assert whole.attribution is not None
    assert whole.probe is whole.attribution.probe
    assert whole.main == whole.probe.main
    alone = result()
    assert findings(attribution=None, alone=alone).provenance is alone.provenance
    with pytest.raises(InputError, match="A diagnosis holds a probe, alone or within an attribution"):
        findings(attribution=None)
