"""A small real world for the command line: a Hugging Face folder with real Adam moments, and its rollouts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from funcprobe.checkpoints import load_checkpoint, save_checkpoint
from funcprobe.cli.command import carry_out
from funcprobe.cli.demo_task import SYMBOLS, build_tokenizer, draw_prompts, reward
from funcprobe.cli.run import COMMAND
from funcprobe.data.files import write_rollouts
from funcprobe.objectives.losses import grpo
from funcprobe.optimizers.factories import adamw
from funcprobe.policy.module import from_module
from funcprobe.policy.sampling import sample
from funcprobe.results.probe import ProbeResult
from funcprobe.training.step import make_step
from funcprobe.types import Rollouts
from tests.cases import models
from tests.cases.third_party import third_party
from tests.cases.trl_folders import Run, run_folder
from tests.cases.trl_runs import Seen
from tests.cases.world import Demo, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A one-layer Qwen2 after two GRPO steps, 24 + 24 rollouts of it, saved as TRL and `funcprobe sample` would."""
    folder = tmp_path_factory.mktemp("world")
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    module = models.qwen2(tied=False, seed=0, vocab_size=len(SYMBOLS), **size)
    tokenizer, generator = build_tokenizer(), torch.Generator().manual_seed(1)
    policy, params = from_module(module)
    prompts = draw_prompts(18, 2, 3, generator)

    def draw(part: list[str]) -> Rollouts:
        return sample(
            policy,
            params,
            [tokenizer.encode(p) for p in part],
            generator=generator,
            max_new_tokens=4,
            eos_id=tokenizer.eos_token_id,
            group_size=4,
            reward=reward,
            tokenizer=tokenizer,
        )

    optimizer = adamw(1e-3, weight_decay=0.0)
    step, opt_state = make_step(policy, grpo(), optimizer), optimizer.init(params)
    for _ in range(2):
        params, _, opt_state, *_ = step(params, opt_state, draw(prompts[12:]))
    evaluation, batch = draw(prompts[:6]), draw(prompts[6:12])
    save_checkpoint(folder / "checkpoint", module, params, optimizer, opt_state, tokenizer, global_step=2)
    write_rollouts(folder / "evaluation.parquet", evaluation)
    write_rollouts(folder / "batch.parquet", batch)
    return World(folder, evaluation, batch)


@pytest.fixture(scope="session")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo in its real size, made by the command once for all workers of a run; nobody changes it."""
    from funcprobe.cli.main import main

    place = tmp_path_factory.getbasetemp()
    shared = place.parent if place.name.startswith("popen-") else place  # a worker's folder stands in the run's
    folder, said = shared / "real-demo" / "demo", shared / "real-demo" / "said.txt"
    with FileLock(shared / "real-demo.lock"):
        if not said.exists():
            folder.parent.mkdir(exist_ok=True)
            heard = io.StringIO()
            with contextlib.redirect_stdout(heard):
                assert main(["demo", "--dir", str(folder)]) == 0
            said.write_text(heard.getvalue())
    return Demo(folder, said.read_text())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with 2 and one calm line on stderr, and nothing on stdout; return that line."""
    from funcprobe.cli.main import main

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("funcprobe: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """A TRL run of three steps, of which nothing but the seed differs from its defaults, and rollouts E beside it."""
    folder = tmp_path_factory.mktemp("trl") / "run"
    seen = run_folder(folder)
    with third_party():
        found = load_checkpoint(folder / "checkpoint-1")
    prompts = [[3, 4], [5, 6, 7]]
    evaluation = sample(
        found.policy,
        found.params,
        prompts,
        generator=torch.Generator().manual_seed(0),
        max_new_tokens=4,
        group_size=3,
        temperature=0.9,
        eos_id=1,
    )
    write_rollouts(folder / "evaluation.parquet", evaluation)
    return folder, seen


@pytest.fixture
def trl_run(trained: tuple[Path, list[Seen]], tmp_path: Path) -> Run:
    """Run the command on a checkpoint of the run and return its result."""
    folder, _ = trained

    def result(checkpoint: str, batch: Path | str, *words: str) -> ProbeResult:
        path = tmp_path / "c.yaml"
        lines = [f"checkpoint: {folder / checkpoint}", f"evaluation: {folder / 'evaluation.parquet'}"]
        path.write_text("\n".join([*lines, f"batch: {folder / batch}", "temperature: 0.9"]) + "\n")
        found: ProbeResult = carry_out(COMMAND, path, ["--force", "--bars", "none", *words])
        return found

    return result
