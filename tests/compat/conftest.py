"""A checkpoint folder with real Adam moments, a dataset with splits, and YAML files over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from funcprobe.checkpoints import save_checkpoint
from funcprobe.cli.demo_task import SYMBOLS, build_tokenizer, draw_prompts
from funcprobe.optimizers.factories import adamw
from funcprobe.policy.module import from_module
from tests.cases import models

#: What a file of the stateful system looks like, number for number.
YAML = """
checkpoint: {{checkpoint_path: checkpoint, dtype: fp32, use_qlora: false}}
batch_config: {{dataset_name: prompts, E_split: test, U_split: train, B_E: 6, B_U: 3, G: 4,
  reward: "funcprobe.cli.demo_task:reward"}}
computation_options: {{mb_size_prompts: 2, weighting_mode: dr_grpo, master_seed: 7}}
estimator: {{weighting_mode: dr_grpo, x_estimator_mode: rb_residual}}
true_delta_h: {{enabled: true, microbatch_size: 2, report_per_token: true, lr_override: none, snapshot_device: cpu}}
probe_reuse: {{reuse_E: false, reuse_U: false}}
generation: {{temperature: 0.9, max_new_tokens: 5, gen_batch_size: 4, top_p: 1.0}}
memory_config: {{amp: false}}
output: {{log_level: INFO}}
learning_rate: 2e-4
clip_eps: 0.2
max_grad_norm: 1.0
{more}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint/` after two steps, its saved rate 0 as at the end of a schedule; `prompts/{train,test}.txt`."""
    place = tmp_path_factory.mktemp("stateful")
    module = models.gpt2(torch.float32, vocabulary=len(SYMBOLS))
    _, params = from_module(module)
    optimizer = adamw(1e-3, weight_decay=0.1)
    opt_state = optimizer.init(params)
    for seed in (1, 2):
        gradient = models.direction(params, seed=seed)
        params, _, opt_state = optimizer.apply(params, opt_state, gradient)
    save_checkpoint(place / "checkpoint", module, params, adamw(0.0, weight_decay=0.1), opt_state, build_tokenizer())
    (place / "prompts").mkdir()
    prompts = draw_prompts(24, 2, 3, torch.Generator().manual_seed(1))
    for name, part in {"train": prompts[:12], "test": prompts[8:]}.items():  # four prompts in both
        (place / "prompts" / f"{name}.txt").write_text("\n".join(part) + "\n")
    return place


@pytest.fixture
def configured(folder: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Write the YAML file, with replacements and further lines, beside the checkpoint."""

    def write(*changes: tuple[str, str], more: str = "") -> Path:
        text = YAML.format(more=more)
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = folder / f"{request.node.name.replace('/', '_')[:60]}.yaml"
        path.write_text(text)
        return path

    return write
