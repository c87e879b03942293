"""Processes whose leaves lie in parts, started once for all tests of them."""

from __future__ import annotations

import pytest

from tests.cases import shards
from tests.cases.processes import Ended, together


@pytest.fixture(scope="session", params=[2, 3])
def parted(request: pytest.FixtureRequest) -> Ended:
    """What two and three processes found out about parts of leaves."""
    ended = together(shards.everything, request.param)
    assert ended.codes == [0] * request.param, ended.words
    return ended
