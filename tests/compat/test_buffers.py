"""Buffers from names to ids and back, through real wrappers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from funcprobe.compat import ProbeComponents, buffers
from funcprobe.errors import InputError
from tests.cases import models
from tests.cases import stateful as cases
from tests.cases.live_pairs import lora


def random_buffer(module: nn.Module) -> dict[str, torch.Tensor]:
    return models.direction({n: p.detach() for n, p in buffers.leaves(module).items()})


@pytest.mark.parametrize("make", [cases.table, lora])
def test_names_to_ids_and_back(make: Any) -> None:
    module = make()
    buffer = random_buffer(module)
    ids = buffers.by_id(buffer, module)
    assert set(ids) == {id(p) for p in module.parameters() if p.requires_grad}
    back = buffers.by_name(ids, module)
    assert list(back) == list(buffer)
    assert all(back[name].data_ptr() == x.data_ptr() for name, x in buffer.items())


def test_through_ddp_and_an_adapters_file(tmp_path: Path) -> None:
    module = lora()
    buffer = random_buffer(module)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        named = {
            name: buffer[name.removeprefix("module.")] for name, p in wrapped.named_parameters() if p.requires_grad
        }
        assert all(name.startswith("module.base_model.") for name in named)
        for held in (named, buffer, buffers.by_id(buffer, module)):
            for host in (wrapped, module):
                assert buffers.by_name(held, host).keys() == buffer.keys()
        assert buffers.leaves(wrapped).keys() == buffer.keys()
    finally:
        torch.distributed.destroy_process_group()
    from peft import get_peft_model_state_dict

    file = dict(get_peft_model_state_dict(module))
    assert not set(file) & set(buffer), "the file's names lack the adapter's"
    found = buffers.by_name(file, module)
    assert all(torch.equal(found[name], p) for name, p in buffers.leaves(module).items())


def test_what_does_not_fit_is_named(caplog: pytest.LogCaptureFixture) -> None:
    module = models.two_lines()
    buffer = random_buffer(module)
    with pytest.raises(InputError, match=r"differ in shape at 'head\.bias'"):
        buffers.by_name({**buffer, "head.bias": torch.zeros(2)}, module)
    with pytest.raises(InputError, match=r"'head\.bias' twice"):
        buffers.by_name({**buffer, "module.head.bias": buffer["head.bias"]}, module)
    with pytest.raises(InputError, match=r"2 unknown .*, 0 missing"):
        buffers.by_name({**buffer, 1: torch.zeros(1), "other": torch.zeros(1)}, module)  # type: ignore[dict-item]
    with caplog.at_level(logging.WARNING, "funcprobe.compat.buffers"):
        kept = buffers.by_name({"head.bias": buffer["head.bias"], "x": torch.zeros(1)}, module, strict=False)
    assert list(kept) == ["head.bias"]
    assert "1 unknown ('x') (ignored), 2 missing ('embed.weight', 'head.weight') (taken as 0)" in caplog.text
    with pytest.raises(InputError, match="matches nothing"):
        buffers.by_id(random_buffer(lora()), module, strict=False)


def test_a_name_that_fits_two_leaves_is_refused() -> None:
    both = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False), "weight": nn.Linear(2, 2, bias=False)})
    outer = nn.ModuleDict({"module": both})
    names = [name for name, _ in outer.named_parameters()]
    assert names == ["module.module.weight", "module.weight.weight"]
    twins = nn.Module()
    twins.a, twins.module = nn.Linear(2, 2, bias=False), nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    with pytest.raises(InputError, match=r"'_orig_mod\.a\.weight' fits"):
        buffers.by_name({"_orig_mod.a.weight": torch.zeros(2, 2)}, twins, strict=False)


def test_algebra_on_buffers() -> None:
    module = models.two_lines()
    components = ProbeComponents(module, {})
    total = components.zeros_like_params()
    assert all(x.dtype == torch.float32 and not x.any() for x in total.values())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in module.parameters()]
    components.add_into_param_buffer(total, scale=2.0)
    components.add_into_param_buffer(total)
    assert all(bool((x == 3).all()) for x in total.values())
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(module.parameters(), grads, strict=True))
    buffer = random_buffer(module)
    expected = 3 * sum(float(x.sum()) for x in buffer.values())
    assert components.dot_param_buffers(total, buffer) == pytest.approx(expected, rel=1e-12)
    assert components.coerce_buffer_to_id_keys(buffer).keys() == total.keys()
    with pytest.raises(InputError, match="1 missing"):
        components.dot_param_buffers(total, dict(list(buffer.items())[1:]))
    with pytest.raises(InputError, match=r"no entry for 'embed\.weight'"):
        components.add_into_param_buffer({})
