"""The identity of a measurement is what its parts do, in any process, and not where they lie."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import funcprobe as fp
from funcprobe import tree
from funcprobe.measurement import identity
from tests.cases.identities import case, identified, identity_with, nudged, power, share_above
from tests.cases.probes import Offset


class WithoutRepr:
    """An observable that prints as an address."""

    name, unit, stats = "sum", "nats", {}
    weighting, proposal, inclusive = "none", "anchor", False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, scores: fp.TokenScores, anchor: fp.TokenScores, rollouts: fp.Rollouts) -> Tensor:
        return self.scale * scores.logp.sum()


def test_identity_is_what_things_do_and_not_where_they_are() -> None:
    pairs = [
        (share_above, 0.0, 0.5),
        (lambda exponent: share_above(0.0, stats=power(exponent)), 2, 3),
        (WithoutRepr, 1.0, 1.001),
    ]
    kept: list[Any] = []  # nothing is freed, so that no address comes again
    for make, one, two in pairs:
        kept += [make(one), make(one), make(two)]
        same, again, other = (identity_with(observable) for observable in kept[-3:])
        assert same == again
        assert same != other
    optimizers = [Offset(1e-3), Offset(1e-3), Offset(2e-3)]
    same, again, other = (identity_with(fp.entropy(), optimizer) for optimizer in optimizers)
    assert same == again
    assert same != other


def test_identity_is_the_same_in_another_process() -> None:
    code = """
        import torch
        torch.set_num_threads(1)
        from tests.cases import identities as t
        from tests.cases.probes import Offset
        print(t.identity_with(t.share_above(0.0, stats=t.power(2)), Offset()))
    """
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=True,
    )
    assert run.stdout.split()[-1] == identity_with(share_above(0.0, stats=power(2)), Offset())


def test_an_entry_between_the_samples_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SAMPLED_ENTRIES", 2)
    c = case()
    leaf = next(iter(c.params))
    before = identity_with(fp.entropy())
    moved = nudged(c.params, leaf)
    assert before != identified(c.update(params=moved), fp.entropy())
    copies = {name: p.clone() for name, p in tree.scale(1.0, c.params).items()}
    assert before == identified(c.update(params=copies), fp.entropy())
