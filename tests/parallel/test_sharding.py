"""Verbs on parts of leaves give the numbers of whole ones; what cannot be run on parts is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import shards
from tests.cases.numbers import near, numbers
from tests.cases.processes import Ended

#: As for shares of rows (see test_world): the same float64 sums in another order, of which F keeps a hundredth or more.
#: Δθ is kept in float32, which rounds at 6e-8 what differs in its last bits.
SAME, KEPT = 1e-10, 1e-6


@pytest.fixture(scope="session")
def of_one() -> dict[str, Any]:
    return shards.everything()


@pytest.mark.parametrize("what", ["modes", "left_alone", "detaching", "verbs", "transformer"])
def test_parts_give_the_numbers_of_whole_leaves(parted: Ended, of_one: dict[str, Any], what: str) -> None:
    if what not in parted.returned[0]:
        return  # see `shards.ASKED`
    expected = dict(numbers(of_one[what]))
    for found in parted.returned:
        several = dict(numbers(found[what]))
        assert several.keys() == expected.keys()
        for place, value in expected.items():
            assert several[place] == near(place, value, KEPT if "kept" in place else SAME), place
    assert all(repr(found[what]) == repr(parted.returned[0][what]) for found in parted.returned)


#: What is tried -> the words of its refusal.
REFUSED = {
    "fsdp2": "sharded by FSDP2 or tensor parallelism (its parameters are DTensors), which is not run from here; save a",
    "fsdp2 module": "so a process sees a part of its parameters; load it whole in every process",
    "no layers": "TwoLines has no list of layers",
    "outside": "The model reads a leaf elsewhere than in the module that holds it",
    "float16": "The leaf 'embed.weight' is float16",
    "adapter": "31.6 % of the model is trained",
    "twice": "The leaves are parts already",
    "optimizer": "take SGD, Adam or AdamW",
    "list": "The layer 'layers.0' is called with a list",
    "anchored": "use probe(...)",
    "sample": "Rows are not sampled from parts of leaves",
    "named": "one holds parts of leaves and the other whole ones",
    "in a transform": "inside a torch.func transform",
    "whole": "The leaf 'embed.weight' is whole",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_parts_cannot_do_is_refused(parted: Ended, what: str) -> None:
    for found in (each["refusals"] for each in parted.returned if "refusals" in each):
        said = found[what]
        assert said["kind"] == ("CheckpointError" if what == "fsdp2" else "InputError")
        assert REFUSED[what] in said["said"]
        assert said["said"].count(". ") == 0  # one sentence


#: Seconds within which every process knows of the failure of another one.
SOON = 20.0


def test_a_failure_in_the_middle_of_a_pass_is_the_same_error_in_all(parted: Ended) -> None:
    for mode in ("forward", "reverse"):
        for how, kind in (("error", "ParallelError"), ("nan", "NumericsError")):
            each = [found["one_fails"][f"{mode} {how}"] for found in parted.returned]
            assert {(x["kind"], x["said"]) for x in each} == {(kind, each[0]["said"])}
            assert each[0]["said"].startswith("Process ")
            assert max(x["seconds"] for x in each) < SOON  # none waits for its timeout, of a minute
    assert len({found["one_fails"]["after"] for found in parted.returned}) == 1  # and all go on together


def test_an_entry_that_is_not_finite_is_found_by_all(parted: Ended) -> None:
    for found in parted.returned:
        assert found["not_finite"]["kind"] == "NumericsError"
        assert found["not_finite"]["said"].startswith("The gradient is not finite at 'embed.weight'")


def test_a_journal_knows_the_parts_of_every_process(parted: Ended) -> None:
    one, other = parted.returned[0]["identities"]
    assert one != other
    assert all(found["identities"] == [one, other] for found in parted.returned)
