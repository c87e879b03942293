"""The figure of a validation shows every method's effects at both ends, and the band of random drops."""

from __future__ import annotations

from funcprobe.attribution.trials import ENDS
from funcprobe.report.figures import plot_validation
from tests.cases.written_validation import validation


def test_a_line_for_every_method_and_end() -> None:
    found = validation()
    ax = plot_validation(found)
    lines = [list(map(float, line.get_ydata())) for line in ax.get_lines()[1:]]
    assert lines == [[found.effect(m, end, s) for s in found.shares] for m in found.methods for end in ENDS]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1.0 %", "10.0 %"]
    assert "Δentropy" in ax.get_ylabel()
