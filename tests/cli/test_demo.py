"""The demo: made from a seed alone, used again while it is whole, and a folder like any user's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe.cli import demo_folder
from funcprobe.cli.command import carry_out
from funcprobe.cli.demo_folder import default_directory, prepare_demo
from funcprobe.cli.demo_task import SYMBOLS, answer, build_tokenizer, draw_prompts, reward
from funcprobe.cli.demo_training import DemoSize
from funcprobe.cli.run import COMMAND
from funcprobe.data.files import read_rollouts
from funcprobe.data.rollouts import overlap
from funcprobe.errors import InputError
from tests.cases.world import Demo

TINY = DemoSize(
    hidden_size=16,
    layers=1,
    heads=2,
    shortest=2,
    longest=4,
    supervised_steps=3,
    supervised_batch=4,
    rl_steps=2,
    rl_run=3,
    group_size=3,
    batch_prompts=4,
    evaluation_prompts=6,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny demo that nobody changes."""
    return prepare_demo(tmp_path_factory.mktemp("demo") / "made", size=TINY).parent


def tiny(folder: Path, seed: int = 0, force: bool = False) -> Path:
    """Make a tiny demo and return its folder."""
    return prepare_demo(folder, seed=seed, force=force, size=TINY).parent


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything numeric in a demo: leaves, moments, rollouts."""
    checkpoint = fp.load_checkpoint(folder / "checkpoint")
    assert checkpoint.opt_state is not None
    found = dict(checkpoint.params)
    found |= {f"{name} {key}": x for name, state in checkpoint.opt_state.items() for key, x in state.items()}
    for part in ("evaluation", "batch"):
        fields = read_rollouts(folder / f"{part}.parquet")._asdict()
        found |= {f"{part} {name}": x for name, x in fields.items() if x is not None}
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors are the same, bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_seed_decides_everything_and_the_global_state_stays(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        tiny(tmp_path / "again")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    again = tensors(tmp_path / "again")
    assert equal(again, tensors(made))
    assert (tmp_path / "again" / "demo.json").read_text() == (made / "demo.json").read_text()
    other, mine = tensors(tiny(tmp_path / "other", seed=1)), tensors(made)
    assert not any(torch.equal(other[name], mine[name]) for name in ("model.norm.weight", "batch ids"))


def test_the_checkpoint_is_one_that_a_run_left(made: Path) -> None:
    checkpoint = fp.load_checkpoint(made / "checkpoint")
    assert checkpoint.optimizer is not None
    assert checkpoint.opt_state is not None
    assert checkpoint.optimizer.lr == pytest.approx(TINY.rl_lr / 3)  # the linear schedule's, two steps into three
    assert {float(state["step"]) for state in checkpoint.opt_state.values()} == {2.0}
    assert all(bool(state["exp_avg_sq"].any()) for state in checkpoint.opt_state.values())
    assert json.loads((made / "checkpoint" / "trainer_state.json").read_text())["global_step"] == 2
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("314.=")) == "314.="


def test_both_batches_are_the_saved_policys_own_with_the_tasks_rewards(made: Path) -> None:
    checkpoint = fp.load_checkpoint(made / "checkpoint")
    evaluation, drawn = (read_rollouts(made / f"{part}.parquet") for part in ("evaluation", "batch"))
    assert (len(evaluation.ids), len(drawn.ids)) == (18, 12)
    assert overlap(evaluation, drawn) == (0, 0)
    for batch in (evaluation, drawn):
        assert batch.sampling_logps is not None
        assert batch.rewards is not None
        found = fp.score(checkpoint.policy, checkpoint.params, batch).logp
        # float32 logits of order one, a cache of keys against whole rows: a few times 6e-8
        assert float((found - batch.sampling_logps).abs().max()) < 1e-5
        starts, ends = batch.prompt_lengths.tolist(), batch.attention_mask.sum(1).tolist()
        decode = checkpoint.tokenizer.decode
        rows = list(zip(batch.ids.tolist(), starts, ends, strict=True))
        prompts = [decode(ids[:start]) for ids, start, _ in rows]
        completions = [decode(ids[start:end], skip_special_tokens=True) for ids, start, end in rows]
        assert batch.rewards.tolist() == reward(prompts, completions)


def test_the_configuration_runs_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "demo") / "config.yaml"
    text = config.read_text()
    assert "18 completions of 6 prompts" in text
    assert "12 completions of 4 other prompts" in text
    result = carry_out(COMMAND, config)
    assert result.lr == pytest.approx(TINY.rl_lr / 3)
    assert result.warnings == ()
    assert (tmp_path / "demo" / "results" / "result.json").is_file()


def test_a_second_call_uses_the_first_ones_and_leaves_an_edited_configuration(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "demo")
    (folder / "config.yaml").write_text("checkpoint: elsewhere\n")
    made = (folder / "checkpoint" / "model.safetensors").stat().st_ino
    tiny(folder)
    assert (folder / "checkpoint" / "model.safetensors").stat().st_ino == made
    assert (folder / "config.yaml").read_text() == "checkpoint: elsewhere\n"


def cut(path: Path) -> None:
    """Lose the end of a file."""
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut weights": lambda folder: cut(folder / "checkpoint" / "model.safetensors"),
    "lost rollouts": lambda folder: (folder / "batch.parquet").unlink(),
    "lost configuration": lambda folder: (folder / "config.yaml").unlink(),
    "cut marker": lambda folder: cut(folder / "demo.json"),
    "empty marker": lambda folder: (folder / "demo.json").write_text("[]"),
    "older": lambda folder: (folder / "demo.json").write_text(
        (folder / "demo.json").read_text().replace(f'"funcprobe demo": {demo_folder.VERSION}', '"funcprobe demo": 0')
    ),
    "another seed": lambda folder: (folder / "demo.json").write_text(
        (folder / "demo.json").read_text().replace('"seed": 0', '"seed": 5')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_another_is_made_anew(damage: str, made: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "demo")
    DAMAGE[damage](folder)
    tiny(folder)
    assert equal(tensors(folder), tensors(made))
    assert (folder / "config.yaml").read_text() == (made / "config.yaml").read_text()
    assert (folder / "demo.json").read_text() == (made / "demo.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]  # nothing half made is left beside it


def test_making_it_anew_keeps_what_is_not_the_demos(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "demo")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    (folder / "results").mkdir()
    (folder / "results" / "mine.txt").write_text("mine too")
    (folder / "config.yaml").write_text("# edited\n")
    stale = folder / "checkpoint" / "stale.bin"
    stale.write_text("old")
    tiny(folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "link").readlink() == Path("notes.txt")
    assert (folder / "results" / "mine.txt").read_text() == "mine too"
    assert not stale.exists()
    assert (folder / "previous" / "config.yaml").read_text() == "# edited\n"
    assert (folder / "previous" / "checkpoint" / "stale.bin").read_text() == "old"
    tiny(folder, force=True)  # what is not the demo's stays so
    assert (folder / "previous" / "config.yaml").read_text() == "# edited\n"


def test_folders_that_are_not_the_demos_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(
        InputError, match=r"photos is not empty and holds no demo \(\.funcprobe\.json does not say so\)"
    ):
        tiny(tmp_path / "photos", force=True)
    with pytest.raises(InputError, match=r"cat\.jpg is a file; give the demo a folder of its own"):
        tiny(tmp_path / "photos" / "cat.jpg")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="here is the folder you are in"):
        tiny(Path("."))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUNCPROBE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "funcprobe" / "demo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "funcprobe" / "demo"
    monkeypatch.setenv("FUNCPROBE_CACHE", str(tmp_path / "own"))
    assert default_directory() == tmp_path / "own"
    seeds = [prepare_demo(seed=seed, size=dataclasses.replace(TINY, supervised_steps=1)) for seed in (3, 4)]
    assert seeds == [tmp_path / "own" / f"seed-{seed}" / "config.yaml" for seed in (3, 4)]


def test_the_real_demo_learns_and_its_step_is_measured(real_demo: Demo) -> None:
    """The default size: training raises the reward, RL lowers the entropy, and the next step is small and linear."""
    before, taught, trained = json.loads((real_demo.folder / "demo.json").read_text())["training"].values()
    assert before["reward"] < 0.2 < 0.5 < taught["reward"] < trained["reward"] < 0.95
    assert 0.1 < trained["entropy"] < taught["entropy"] < 0.8
    result = fp.ProbeResult.load(real_demo.folder / "results")
    assert result.first_order is not None
    assert result.change < -1e-4  # float32 scores resolve about 1e-7
    assert 0.9 < result.first_order / result.change < 1.1
    assert result.health.ess_sequence > 0.99 * 512
    assert result.warnings == ()


def test_both_stages_of_the_training_are_watched(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare_demo(tmp_path / "demo", size=TINY, progress=lambda *args: seen.append(args))
    assert {what for what, _, _ in seen} == {"supervised steps", "GRPO steps"}


def test_the_reward_is_the_share_of_right_positions() -> None:
    assert reward(["31415...=", "0=", "12="], ["34894", "", "1299"]) == [1.0, 0.0, 0.25]
    assert reward(["12="], ["13"], completion_ids=[[1, 3]]) == [1.0]  # TRL passes more than is needed
    with pytest.raises(InputError, match="The prompt is 'Hello'; this task expects digits"):
        reward(["Hello"], ["3"])


def test_a_slip_spoils_what_follows() -> None:
    assert answer("1111=") == "1234"
    assert answer("1111=", slips=[0, 3]) == "1567"


def test_prompts_are_different_of_the_lengths_asked_for_and_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    first = draw_prompts(50, 2, 3, generator)
    second = draw_prompts(50, 2, 3, generator, exclude=first)
    assert len({*first, *second}) == 100
    assert {len(p) for p in first} == {4}  # a field of three and the equals sign
    assert {len(p.rstrip(".=")) for p in first} == {2, 3}
    with pytest.raises(InputError, match="500 prompts were asked for; expected at least 1 and at most half of 100"):
        draw_prompts(500, 2, 2, generator)


def test_the_tokenizer_knows_the_task_and_nothing_else() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode("31.=") == [3, 1, 10, 11]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (12, 13)
    assert len(tokenizer) == len(SYMBOLS)
    assert tokenizer.decode([3, 4, 12, 13], skip_special_tokens=True) == "34"
