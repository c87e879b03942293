"""Leaves in two and three processes: gathered with the derivatives of whole ones, in every mode, of every size."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe import tree
from funcprobe.errors import InputError
from funcprobe.parallel.shards import cut
from tests.cases import shards
from tests.cases.processes import Ended

#: Sums of some ten float64 terms of about 1 in another order: 10 · 2^-53 · 10, with room.
SAME = 1e-13


@pytest.mark.parametrize("law", shards.laws())
def test_gathered_leaves_have_the_derivatives_of_whole_ones(parted: Ended, law: str) -> None:
    size = len(parted.returned)
    for found in parted.returned:
        torch.testing.assert_close(found["laws"][law], shards.laws(size)[law], rtol=SAME, atol=SAME)


def test_a_process_holds_its_part_and_no_more(parted: Ended) -> None:
    size, held = len(parted.returned), [found["held"] for found in parted.returned]
    assert sum(each["own"] for each in held) == held[0]["parameters"]
    for each in held:
        assert each["own"] <= each["parameters"] / size + each["leaves"]  # each of which is cut upwards
        assert each["moments"] == 2 * each["own"]
        assert each["in the copy"] == 0


def test_the_name_of_a_part_is_its_leaf_s(parted: Ended) -> None:
    part = tree.Part("w", torch.Size([2]), torch.clone)
    assert part == "w"
    assert {part: 1}["w"] == 1
    assert tree.size({part: torch.ones(1)}) == 2


def test_a_process_alone_has_nothing_to_share() -> None:
    with pytest.raises(InputError, match="this one is alone; start them with torchrun --nproc-per-node N"):
        cut({"w": torch.ones(3)})
    with pytest.raises(InputError, match="The leaf 'w' is whole; expected the parts that `shard` returned"):
        fp.gather_leaves({"w": torch.ones(3)})
