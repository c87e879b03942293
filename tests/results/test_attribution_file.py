"""An attribution on disk: what is loaded is what was saved, and what is no attribution is refused calmly."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.results.parts import TABLES
from tests.cases.attributions import Stepped
from tests.cases.tables import LR, OBSERVABLES
from tests.cases.tokenizers import tokenizer
from tests.cases.trees import assert_same

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
    assert saved.save(tmp_path / "out") == tmp_path / "out"
    found = fp.Attribution.load(tmp_path / "out")
    for of in ("update", "evaluation"):
        for table in TABLES:
            if table == "influence" and saved.influence is None:
                continue
            assert found.to_frame(table, of).equals(saved.to_frame(table, of)), (table, of)  # type: ignore[arg-type]
        mine, theirs = getattr(found, of), getattr(saved, of)
        for field in ("through", "predictors"):
            assert_same(dict(getattr(mine, field)), dict(getattr(theirs, field)))
        assert_same(mine.scores._asdict(), theirs.scores._asdict())
        given = {n: x for n, x in theirs.rollouts._asdict().items() if x is not None}
        assert_same({n: x for n, x in mine.rollouts._asdict().items() if x is not None}, given)
    for field in ("observable", "form", "leaves", "vocabulary", "ledger", "completeness", "first_order", "unit"):
        assert getattr(found, field) == getattr(saved, field), field
    assert found.summary() == saved.summary()
    assert found._repr_html_() == saved._repr_html_()
    assert found.result.to_dict() == saved.result.to_dict()
    if saved.influence is None:
        assert found.influence is None
    else:
        assert found.influence is not None
        assert torch.equal(found.influence.matrix, saved.influence.matrix)
        assert torch.equal(found.influence.rows, saved.influence.rows)
        assert found.influence[1::2] == saved.influence[1::2]
    assert (found.result.delta is None) == (saved.result.delta is None)


def test_a_folder_is_written_whole_and_not_over_another(tmp_path: Path) -> None:
    place = tmp_path / "out"
    attribution("plain").save(place)
    assert {f.name for f in place.iterdir()} == {"result.json", "attribution.json", "attribution.safetensors"}
    with pytest.raises(InputError, match="exists already and is not overwritten"):
        attribution("everything").save(place)
    assert fp.Attribution.load(place).vocabulary is None
    attribution("everything").save(place, overwrite=True)
    assert fp.Attribution.load(place).vocabulary is not None
    assert list(tmp_path.iterdir()) == [place]
    # it is a result's folder too
    assert fp.ProbeResult.load(place).to_dict() == attribution("everything").result.to_dict()


def test_an_attribution_that_was_loaded_can_be_saved(tmp_path: Path) -> None:
    attribution("everything").save(tmp_path / "one")
    fp.Attribution.load(tmp_path / "one").save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def changed(folder: Path, **fields: Any) -> None:
    """Write other fields into attribution.json; None removes one."""
    file = folder / "attribution.json"
    plain = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps({n: x for n, x in plain.items() if x is not ...}), encoding="utf-8")


def without(folder: Path, *names: str) -> None:
    """Take arrays out of attribution.safetensors."""
    file = folder / "attribution.safetensors"
    save_file({n: x for n, x in load_file(file).items() if n not in names}, file)


def mixed(folder: Path, batch: str) -> None:
    """Put the contributions of another attribution's tokens in place of its own."""
    attribution("jacobian").save(folder / "other")
    theirs = load_file(folder / "other" / "attribution.safetensors")
    file = folder / "attribution.safetensors"
    save_file({n: theirs[n] if n.startswith(f"{batch}.through") else x for n, x in load_file(file).items()}, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no arrays": (lambda f: (f / "attribution.safetensors").unlink(), r"holds no attribution\.safetensors; expected a"),
    "no numbers": (lambda f: (f / "attribution.json").unlink(), r"holds no attribution\.json; expected a folder"),
    "no result": (lambda f: (f / "result.json").unlink(), r"holds no result\.json"),
    "cut numbers": (lambda f: (f / "attribution.json").write_text('{"schema_version": 1, "form'), "are damaged"),
    "no text": (lambda f: (f / "attribution.json").write_bytes(b"\xff\xfe{"), "are damaged"),
    "cut arrays": (lambda f: (f / "attribution.safetensors").write_bytes(b"\x08\x00\x00"), "are damaged"),
    "no object": (lambda f: (f / "attribution.json").write_text("[1, 2]"), "has schema version None"),
    "of tomorrow": (lambda f: changed(f, schema_version=2), "has schema version 2; this funcprobe reads 1"),
    "no leaves": (lambda f: changed(f, leaves=...), "not a whole attribution .'leaves'.; its files are damaged"),
    "odd leaves": (lambda f: changed(f, leaves=[{"name": "w", "weight": 1}]), "are damaged"),
    "odd words": (lambda f: changed(f, vocabulary=[1]), "are damaged"),
    "unknown observable": (lambda f: changed(f, observable="joy"), "not a whole attribution .'joy'.; its files are"),
    "no scores": (lambda f: without(f, "update.scores.logp"), "are damaged"),
    "no ids": (lambda f: without(f, "evaluation.rollouts.ids"), "are damaged"),
    "half the parts": (lambda f: without(f, "evaluation.through.logp"), "are damaged"),
    "no parts": (lambda f: without(f, "update.through.logp"), "are damaged"),
    "E of another": (lambda f: mixed(f, "evaluation"), "The evaluation tokens .* or those of two attributions"),
    "U of another": (lambda f: mixed(f, "update"), "The update tokens .* or those of two attributions"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    attribution("plain").save(tmp_path / "out")
    change, said = DAMAGE[damage]
    change(tmp_path / "out")
    with pytest.raises(InputError, match=said):
        fp.Attribution.load(tmp_path / "out")


def test_what_is_no_attribution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no attribution\.json; expected a folder that Attribution\.save"):
        fp.Attribution.load(tmp_path / "nowhere")
    attribution("plain").result.save(tmp_path / "probe")
    with pytest.raises(InputError, match=r"holds no attribution\.json"):
        fp.Attribution.load(tmp_path / "probe")
