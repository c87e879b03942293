"""The mapping of numbered states to names: solved from sizes and shapes, or refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe.checkpoints.optimizer_state import as_loaded, counted_beside, map_ids_to_names, state_by_name
from funcprobe.errors import CheckpointError
from tests.cases.trainer_runs import Run

Shape = tuple[int, ...]


def saved(groups: list[list[Shape | None]], **options: Any) -> dict[str, Any]:
    """Write a state_dict of these shapes; None is a parameter that never stepped."""
    state, listed, count = {}, [], 0
    for g, group in enumerate(groups):
        for i, shape in enumerate(group, start=count):
            if shape is not None:
                state[i] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        listed.append({"params": list(range(count, count + len(group))), "weight_decay": float(g), **options})
        count += len(group)
    return {"state": state, "param_groups": listed}


def every_mapping(names: dict[str, Shape], groups: list[list[Shape | None]]) -> list[dict[int, str]]:
    """The slow reference: try every assignment of names to groups, and keep those whose shapes agree in order."""
    owners = [g for g, group in enumerate(groups) for _ in group]
    starts = list(itertools.accumulate([0, *map(len, groups)]))
    found = []
    for path in sorted(set(itertools.permutations(owners))):
        counts, mapping = [0] * len(groups), {}
        for name, g in zip(names, path, strict=True):
            if groups[g][counts[g]] not in (None, names[name]):
                break
            mapping[starts[g] + counts[g]] = name
            counts[g] += 1
        else:
            found.append(mapping)
    return found


@st.composite
def interleaved(draw: st.DrawFn) -> tuple[dict[str, Shape], list[list[Shape | None]]]:
    """Names with few distinct shapes, dealt to up to three groups (some empty), a few without state, a few altered."""
    shapes = draw(st.lists(st.sampled_from([(2,), (3,), (2, 3)]), min_size=1, max_size=6))
    groups: list[list[Shape | None]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for shape in shapes:
        kept = draw(st.sampled_from([shape, shape, shape, shape, None, (4,)]))
        groups[draw(st.integers(0, len(groups) - 1))].append(kept)
    return {f"p{i}": shape for i, shape in enumerate(shapes)}, groups


@given(interleaved())
@settings(max_examples=300, deadline=None)
def test_the_mapping_is_the_only_one_or_refused(case: tuple[dict[str, Shape], list[list[Shape | None]]]) -> None:
    names, groups = case
    expected = every_mapping(names, groups)
    if all(shape is None for group in groups for shape in group):
        return  # no state at all is another question: see the tests on empty states
    if len(expected) == 1:
        assert map_ids_to_names(names, saved(groups)) == expected[0]
        return
    with pytest.raises(CheckpointError, match="ambiguous" if expected else "does not fit the model"):
        map_ids_to_names(names, saved(groups))


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2", "adapter"])
def test_real_trainer_state_is_mapped_to_the_truth(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    truth = run.truth()
    file = torch.load(run.folder / "optimizer.pt", weights_only=True)
    names = map_ids_to_names({n: tuple(v["exp_avg"].shape) for n, v in truth.items()}, file)
    assert sorted(names.values()) == sorted(truth)
    for i, name in names.items():
        for key, value in truth[name].items():
            assert torch.equal(file["state"][i][key], value), (name, key)


@pytest.mark.parametrize("which", ["full_qwen2", "full_gpt2"])
def test_plain_order_would_be_wrong_for_a_full_model(runs: dict[str, Run], which: str) -> None:
    run = runs[which]
    file = torch.load(run.folder / "optimizer.pt", weights_only=True)
    plain = dict(enumerate(run.truth()))
    shapes = {n: tuple(v["exp_avg"].shape) for n, v in run.truth().items()}
    wrong = [n for i, n in plain.items() if tuple(file["state"][i]["exp_avg"].shape) != shapes[n]]
    silent = [
        n
        for i, n in plain.items()
        if n not in wrong and not torch.equal(file["state"][i]["exp_avg"], run.truth()[n]["exp_avg"])
    ]
    assert wrong
    assert silent, "some of the wrong ones agree in shape, so a check of shapes alone would not see them"
    assert map_ids_to_names(shapes, file) != plain


def test_lora_groups_are_one_full_and_one_empty(adapter: Run) -> None:
    groups = torch.load(adapter.folder / "optimizer.pt", weights_only=True)["param_groups"]
    assert [len(g["params"]) for g in groups] == [9, 0]


def test_one_group_is_read_in_order() -> None:
    names = {"a": (2,), "b": (2,), "c": (3,)}
    assert map_ids_to_names(names, saved([[(2,), (2,), (3,)]])) == {0: "a", 1: "b", 2: "c"}


def test_count_that_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match="numbers 1 parameters and the model has 2 trainable ones"):
        map_ids_to_names({"a": (2,), "b": (2,)}, saved([[(2,)]]))


def test_first_shape_that_does_not_fit_is_named() -> None:
    message = r"first parameter without a place is 'b' of shape \(3,\).* of shape \(4,\)"
    with pytest.raises(CheckpointError, match=message):
        map_ids_to_names({"a": (2,), "b": (3,)}, saved([[(2,), (4,)]]))


def test_ambiguity_names_the_two_and_the_remedy() -> None:
    names = {"first.weight": (2, 2), "second.weight": (2, 2), "norm": (2,)}
    with pytest.raises(
        CheckpointError, match=r"ambiguous.*(first|second).weight.*(first|second).weight.*from_training"
    ):
        map_ids_to_names(names, saved([[(2, 2), (2,)], [(2, 2)]]))


def test_many_equal_groups_are_refused_in_good_time() -> None:
    names = {f"layer.{i}": (2,) for i in range(120)}
    with pytest.raises(CheckpointError, match="too many parameters of equal shapes"):
        map_ids_to_names(names, saved([[(2,)] * 20] * 6))


def test_a_parameter_that_never_stepped_fits_by_its_neighbours() -> None:
    names = {"a": (2, 2), "unused": (5, 5), "norm": (2,)}
    found = map_ids_to_names(names, saved([[(2, 2), None], [(2,)]]))
    assert found == {0: "a", 1: "unused", 2: "norm"}


def test_no_state_at_all_needs_one_group_or_equal_ones() -> None:
    names = {"a": (2,), "b": (3,)}
    assert map_ids_to_names(names, saved([[None, None]])) == {0: "a", 1: "b"}
    different = saved([[None], [None]])
    with pytest.raises(CheckpointError, match="ambiguous"):
        map_ids_to_names(names, different)
    for group in different["param_groups"]:
        group["weight_decay"] = 0.0
    assert map_ids_to_names(names, different) == {0: "a", 1: "b"}


def test_param_names_stored_by_torch_are_used_and_verified() -> None:
    names = {"a": (2,), "b": (2,)}
    parameters = {n: torch.nn.Parameter(torch.ones(2)) for n in ("b", "a")}
    live = torch.optim.AdamW([{"params": [("b", parameters["b"])]}, {"params": [("a", parameters["a"])]}], lr=0.1)
    for p in parameters.values():
        p.grad = torch.ones(2)
    live.step()
    assert map_ids_to_names(names, live.state_dict()) == {0: "b", 1: "a"}
    with pytest.raises(
        CheckpointError, match=r"state of 'a' in optimizer.pt has shape \(2,\) and the parameter \(3,\)"
    ):
        map_ids_to_names({"a": (3,), "b": (2,)}, live.state_dict())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1, 2], "holds list; expected a torch.optim state_dict"),
        ({"base_optimizer_state": {}, "zero_stage": 2}, r"\['base_optimizer_state', 'zero_stage'\]; expected"),
        ({"state": [], "param_groups": []}, "'state' in optimizer.pt is no mapping"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, "'param_groups' in optimizer.pt is no list of groups"),
        ({"state": {}, "param_groups": [{"params": [0, 0]}]}, "a parameter id in two groups"),
        ({"state": {3: {}}, "param_groups": [{"params": [0]}]}, "state for id 3, which is in no group"),
    ],
)
def test_a_damaged_layout_is_described(broken: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        map_ids_to_names({"a": (2,)}, broken)


def test_state_tensors_of_different_shapes() -> None:
    file = saved([[(2,)]])
    file["state"][0]["exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"state tensors of id 0 in optimizer\.pt differ in shape"):
        map_ids_to_names({"a": (2,)}, file)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_are_typed_as_load_state_dict_types_them(dtype: torch.dtype, fused: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
    writer = torch.optim.AdamW([p], lr=0.1, fused=fused)
    p.grad = torch.tensor([0.1, -0.2, 0.3])
    writer.step()
    file = writer.state_dict()
    leaf = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    reader = torch.optim.AdamW([leaf], lr=0.1, fused=fused)
    reader.load_state_dict(file)
    beside = counted_beside(file["param_groups"], {0: "w"})["w"]
    found = as_loaded(state_by_name(file["state"], {0: "w"})["w"], leaf.detach(), beside)
    for key, value in reader.state[leaf].items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
