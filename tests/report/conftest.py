"""The browser that the pages of a module are opened in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.cases.browser import chromium

    with chromium(tmp_path_factory.mktemp("profile") / "fresh") as found:
        yield found
