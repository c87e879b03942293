"""A batch of several processes is the parts of each, in the order of ranks; alone it is one's own."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe.data.rollouts import concatenate
from funcprobe.errors import InputError
from tests.cases import shared_work
from tests.cases.probes import prompted
from tests.cases.processes import together


def test_parts_are_put_together_in_every_process() -> None:
    ended = together(shared_work.parts_of_a_batch, 3)
    assert ended.codes == [0, 0, 0], ended.words
    expected = concatenate([prompted(1, 2, seed=0, first=3), prompted(1, 2, seed=2, first=23)])
    for found in ended.returned:
        for got, wanted in zip(found, expected, strict=True):
            assert (got is None and wanted is None) or torch.equal(got, wanted)


def test_the_step_of_a_ddp_trainer_is_that_of_the_batch_of_all() -> None:
    ended = together(shared_work.a_live_ddp_pair, 2)
    assert ended.codes == [0, 0], ended.words
    one, other = ended.returned
    assert one == other
    # float64 parameters of about .1 are rounded once by the live step, and their difference again
    assert one["off"] <= 1e-15
    assert one["change"] != 0.0


def test_alone_it_is_ones_own() -> None:
    own = prompted(2, 2, seed=1)
    assert torch.equal(fp.gather_rollouts(own).ids, own.ids)
    with pytest.raises(InputError, match="No process has any rollouts"):
        fp.gather_rollouts(None)
