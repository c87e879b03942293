"""Attributions of real steps on disk: what is loaded is what was saved, table by table."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.results.parts import TABLES
from tests.cases.attributions import Stepped
from tests.cases.kept import same
from tests.cases.tables import LR, OBSERVABLES
from tests.cases.tokenizers import tokenizer

KINDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": (("two lines",), {}),
    "everything": (
        ("gpt2", "grpo, kl", "adamw", 0.05),
        {"influence": "prompts", "tokenizer": tokenizer("words", True), "keep_delta": True, "bars": "jackknife"},
    ),
    "chosen leaves": (("two lines",), {"influence": "sequences", "leaves": ["head.bias"]}),
    "a statistic": (("two lines",), {"observable": OBSERVABLES["collision"]}),
    "jacobian": (("two lines", "grpo", fp.from_torch(torch.optim.RMSprop, lr=LR)), {}),
    "float32": (("qwen2, lora, float32",), {}),
}


@functools.cache
def attribution(kind: str) -> fp.Attribution:
    case, options = KINDS[kind]
    return Stepped(*case).attribute(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    saved = attribution(kind)
    saved.save(tmp_path / "one")
    found = fp.Attribution.load(tmp_path / "one")
    assert same(found, saved)
    for of in ("batch", "evaluation"):
        for table in TABLES:
            if table == "influence" and saved.influence is None:
                continue
            assert found.to_frame(table, of).equals(saved.to_frame(table, of)), (table, of)  # type: ignore[arg-type]
    for field in ("ledger", "completeness", "first_order", "unit"):
        assert getattr(found, field) == getattr(saved, field), field
    assert found.summary() == saved.summary()
    found.save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
