"""Tables as pandas frames, where pandas is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funcprobe.errors import missing_extra

if TYPE_CHECKING:
    from pandas import DataFrame


def frame_of(data: Any) -> DataFrame:
    """Return rows (a list of mappings) or columns (a mapping of sequences) as a pandas frame.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        missing = missing_extra("pandas", "app", "a data frame")
        raise missing from error
    return pandas.DataFrame(data)
