"""Real artefacts, made on the spot: transformers.Trainer runs of tiny models, full and under LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from tests.cases import sharded_runs
from tests.cases.third_party import third_party
from tests.cases.trainer_runs import VOCABULARY, Run, gpt2, lora, qwen2, train


@pytest.fixture(scope="session")
def full_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tied embeddings, the default optimizer (`adamw_torch_fused`), a linear schedule run to its end: saved lr 0."""
    return train(qwen2(tie_word_embeddings=True), tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def full_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another decay rule (LayerNorm by class), `adamw_torch`, constant learning rate."""
    return train(gpt2(), tmp_path_factory.mktemp("gpt2"), optim="adamw_torch", lr_scheduler_type="constant")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA with a trained copy of the untied head, over a base that is saved in a folder."""
    place = tmp_path_factory.mktemp("lora")
    base = qwen2(tie_word_embeddings=False)
    with third_party():
        base.save_pretrained(place / "base")
        loaded = Qwen2ForCausalLM.from_pretrained(place / "base")
    model = lora(loaded, modules_to_save=["lm_head"])
    # B starts at zero; moved off it, so that a mapping of A to B cannot hide
    return train(model, place / "out", base=place / "base", lr_scheduler_type="constant")


@pytest.fixture(scope="session")
def runs(full_qwen2: Run, full_gpt2: Run, adapter: Run) -> dict[str, Run]:
    return {"full_qwen2": full_qwen2, "full_gpt2": full_gpt2, "adapter": adapter}


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of one FSDP2 run of two processes, as five frameworks write them."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded_runs.write(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
