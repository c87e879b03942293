"""Which tokens end a completion: all that a checkpoint names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from funcprobe.checkpoints import load_checkpoint
from funcprobe.errors import CheckpointError
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import Run, lora, qwen2


def folder_of(run: Run, place: Path, eos: Any, tokenizer: Any = None) -> Path:
    folder = shutil.copytree(run.folder, place / "c")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if tokenizer is not None:
        tokenizer.eos_token = "w7"
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("eos", "expected"), [(3, (3,)), ([5, 3], (3, 5)), ([], ()), (None, ()), ([4, 4], (4,))])
def test_every_token_of_the_generation_configuration(full_gpt2: Run, tmp_path: Path, eos: Any, expected: Any) -> None:
    assert load_checkpoint(folder_of(full_gpt2, tmp_path, eos), optimizer=None).eos_ids == expected


@pytest.mark.parametrize(("eos", "expected"), [(3, (3, 7)), ([7, 5], (5, 7)), (None, (7,))])
def test_the_tokenizers_own_is_one_of_them(
    full_gpt2: Run, tokenizer: Any, tmp_path: Path, eos: Any, expected: Any
) -> None:
    assert load_checkpoint(folder_of(full_gpt2, tmp_path, eos, tokenizer), optimizer=None).eos_ids == expected


def test_an_adapter_has_those_of_its_base(tmp_path: Path) -> None:
    base = qwen2(tie_word_embeddings=False)
    base.generation_config.eos_token_id = [2, 9]
    with third_party():
        base.save_pretrained(tmp_path / "base")
        lora(base).save_pretrained(tmp_path / "adapter")
    assert load_checkpoint(tmp_path / "adapter", tmp_path / "base", optimizer=None).eos_ids == (2, 9)
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert load_checkpoint(tmp_path / "adapter", tmp_path / "base", optimizer=None).eos_ids == (4,)


def test_a_folder_without_one_has_that_of_the_configuration(full_gpt2: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 6}))
    assert load_checkpoint(folder, optimizer=None).eos_ids == (6,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "</s>"}', "holds '</s>'; expected a token id, or a list of them"),
        ('{"eos_token_id": [1, 2.5]}', "holds 2.5; expected a token id"),
        ('{"eos_token_id": [true]}', "holds True; expected a token id"),
        ('{"eos_token_id": -1}', "holds -1; expected a token id"),
        ("{", "generation_config.json: this is not JSON"),
        ("[1]", "cannot read the model"),
    ],
)
def test_what_is_no_token_id_is_refused(full_gpt2: Run, tmp_path: Path, text: str, message: str) -> None:
    folder = shutil.copytree(full_gpt2.folder, tmp_path / "c")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, optimizer=None)
