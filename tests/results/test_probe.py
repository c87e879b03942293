"""A result of a probe is frozen, reads as its outcome, and says its numbers in text and HTML."""

from __future__ import annotations

import dataclasses
import json

import pytest

import funcprobe as fp
from tests.cases.written_probe import outcome, provenance, result, warned


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().outcome = outcome()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        result().change = 0.0  # type: ignore[misc]


def test_it_reads_as_its_outcome_and_its_provenance() -> None:
    found = result(second_order=4e-5, warnings=warned("careful"), notes=warned("decided"))
    for name in ("readings", "exchange", "health", "lr", "delta_norm", "rounding", "warnings", "notes", "info"):
        assert getattr(found, name) is getattr(found.outcome, name), name
    for name in ("evaluation", "batch", "mode", "environment", "timings"):
        assert getattr(found, name) is getattr(found.provenance, name), name
    main = found.main
    assert (found.change, found.first_order, found.remainder) == (main.change, main.first_order, main.remainder)
    assert (found.before, found.after, found.second_order) == (main.before, main.after, 4e-5)
    assert found.crossover_lr == pytest.approx(2e-6 * 9.7e-4 / 4e-5, rel=1e-12)
    assert found.linear_until_lr == pytest.approx(2e-6 * 9.7e-4 / 4e-5 / 20, rel=1e-12)


def test_the_summary_says_the_numbers() -> None:
    found = result(warnings=warned("a <b> & c"))
    text, page = found.summary(), found._repr_html_()
    assert text.startswith("One step at lr 2e-06 lowers the entropy by 0.001 nats per token (0.07 %). First order pred")
    for number in (found.change, found.first_order, found.remainder):
        assert f"{number:+.6e}" in text
        assert f"{number:+.6e}" in page
    assert "rao_blackwell/per_decision/token, nats per token\n" in text
    assert "E: 256 sequences, 5000 tokens, 32 prompts\nU: 128 sequences, 2500 tokens, 16 prompts\n" in text
    assert "1.000e-02  model.layers.0.mlp.up_proj.weight" in text
    assert text.endswith("Warning: a <b> & c.")
    assert "<table>" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert "<b> &" not in page


def test_an_update_that_was_given_as_a_delta_says_nothing_of_learning_rates_or_u() -> None:
    found = result(lr=None, batch=None, second_order=4e-5)
    text = found.summary()
    assert text.startswith("The update lowers the entropy by")
    assert "lr" not in text.replace("already", "")
    assert "U:" not in text
    assert "up to 1.2 of this update; |δF₂| = |δF₁| at 24 of it" in text
    assert found.crossover_lr is found.linear_until_lr is None


def test_everything_is_plain_in_a_dict() -> None:
    found = result(info={"loss": float("nan")})
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["outcome"]["readings"][found.observable]["change"] == found.change
    assert plain["outcome"]["info"] == {"loss": "nan"}
    assert plain["kind"] == "probe"


def test_a_provenance_tells_where_the_numbers_are_from() -> None:
    place = {"dtype": "float32", "storage": "bfloat16", "device": "cpu", "parameters": 7}
    text = fp.ProbeResult(outcome(), provenance(mode="reverse", environment=place)).summary()
    assert "First order in reverse mode, float32 stored in bfloat16 on cpu, 7 trainable parameters, 3.5 s" in text
