"""The ledger of real TRL runs: its windows are the run's, and the run is bit for bit what it is without."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import funcprobe as fp
from funcprobe.errors import FuncprobeWarning, InputError
from funcprobe.integrations.trl import LedgerCallback, evaluation_from_trl, objective_from_config, rollouts_from_trl
from funcprobe.types import Params
from tests.cases.ledgers import telling
from tests.cases.third_party import third_party
from tests.cases.trees import assert_same
from tests.cases.trl_runs import arguments, leaves, prompts, qwen2, reward, tokenizer, trainables

STEPS = 4

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "off-policy": {"num_iterations": 2},
    "two steps a generation": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 8},
    "accumulated": {"gradient_accumulation_steps": 2},
    "two generations a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "without the truncated": {"mask_truncated_completions": True, "loss_type": "grpo"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl_ledger")


def trained(
    folder: Path, out: Path, book: LedgerCallback | None, *, lora: bool = False, kind: str = "GRPO", **options: Any
) -> Any:
    """Train with a ledger, or without, and return the trainer."""
    with third_party():
        import trl
        from datasets import Dataset
        from peft import LoraConfig
        from transformers.trainer_callback import PrinterCallback

        config = getattr(trl, f"{kind}Config")(**arguments(out, **{"max_steps": STEPS, **options}))
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=qwen2(folder / "base"),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts()}),
            processing_class=tokenizer(),
            **({"peft_config": adapter} if lora else {}),
        )
        trainer.remove_callback(PrinterCallback)
        if book is not None:
            book.watch(trainer)
        with telling() as told:
            trainer.train()
    trainer.told = told
    return trainer


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_step_is_in_a_window_and_is_the_trainers(folder: Path, tmp_path: Path, setting: str) -> None:
    book = LedgerCallback(tmp_path / "ledger", open_every=1)
    trained(folder, tmp_path, book, **SETTINGS[setting])
    books = book.books
    assert books is not None
    a_generation = {"off-policy": 2, "two steps a generation": 4}.get(setting, 1)
    firsts = [window.first for window in books]
    assert firsts == [*range(0, SETTINGS[setting].get("max_steps", STEPS) - a_generation, a_generation)]
    for window in books:
        assert window.last - window.first + 1 == a_generation
        if setting != "without the truncated":  # in which a batch may be left without any token
            assert [o.step for o in window.opened] == [*range(window.first, window.last + 1)]
        # float32: kernels of the optimizer differ by some units in the last place, and the batch is summed otherwise
        assert window.mismatch < 1e-3
        assert max([o.off for o in window.opened], default=0.0) < 1e-5
        parts = math.fsum(o.whole for o in window.opened)
        assert parts == pytest.approx(window.split["gradient on U"], rel=1e-3, abs=1e-6)
        assert abs(window.split["rounding and rest"]) < 1e-3 * math.fsum(map(abs, window.split.values()))
        assert window.trainer["grad_norm"] >= 0
        assert window.completeness < 1e-4
    if setting == "off-policy":  # on its second pass over a generation
        assert max(o.clipped for w in books for o in w.opened) > 0
    assert [(lost.first, lost.last) for lost in books.lost] == [
        (firsts[-1] + a_generation, firsts[-1] + 2 * a_generation - 1)
    ]
    assert fp.load(tmp_path / "ledger") == books


def test_a_window_is_the_change_between_two_generations(folder: Path, tmp_path: Path) -> None:
    """Against a probe by hand: θ of both moments copied, E from the batch that came next."""
    seen: list[tuple[Params, fp.Rollouts, fp.Policy]] = []

    class Copying(LedgerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            super().on_pre_optimizer_step(args, state, control, **given)
            pair = fp.from_training(given["model"], given["optimizer"])
            inputs = [inputs for inputs, _ in self._seen]
            drawn = evaluation_from_trl(inputs, temperature=args.temperature)
            seen.append(({name: p.clone() for name, p in pair.params.items()}, drawn, pair.policy))

    book = Copying(tmp_path / "ledger")
    trained(folder, tmp_path, book)
    assert book.books is not None
    for window in book.books:
        (before, _, _), (now, drawn, policy) = seen[window.first], seen[window.last + 1]
        back = fp.Update.from_delta(policy, now, fp.tree.sub(before, now), before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuncprobeWarning)
            plain = fp.probe(back, drawn, mode="reverse")
        assert window.main.change == pytest.approx(-plain.change, rel=1e-12)
        assert window.main.first_order == pytest.approx(-plain.first_order, rel=1e-6)  # Δθ of float32, both


def left_behind(trainer: Any) -> dict[str, Any]:
    """Return everything that a ledger could have changed."""
    state = trainer.optimizer.state
    timed = ("time", "runtime", "per_second")
    return {
        "parameters": leaves(trainer.model),
        "moments": {n: dict(state[p]) for n, p in trainables(trainer.model)},
        "generators": (torch.random.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
        "log": [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history],
        "modes": [(name, part.training) for name, part in trainer.model.named_modules()],
    }


@pytest.mark.parametrize(
    "options",
    [{"num_iterations": 2}, {"lora": True}, {"bf16": True}, {"kind": "RLOO"}],
    ids=["off-policy", "LoRA with dropout", "bfloat16 autocast", "RLOO"],
)
def test_training_is_bit_for_bit_the_same(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    book = LedgerCallback(tmp_path / "ledger", {"h": fp.entropy(), "kl": fp.kl()}, open_every=1, rows=4)
    with_ledger = left_behind(trained(folder, tmp_path / "a", book, **options))
    without = left_behind(trained(folder, tmp_path / "b", None, **options))
    assert book.books is not None
    assert len(book.books.windows) == (1 if "num_iterations" in options else STEPS - 1)
    assert_same(with_ledger, without)


def test_a_loss_that_is_not_expressible_still_has_its_parts(folder: Path, tmp_path: Path) -> None:
    book = LedgerCallback(tmp_path / "ledger", open_every=1)
    trainer = trained(folder, tmp_path, book, loss_type="sapo")
    assert [("not opened to their tokens" in text, "sapo" in text) for text in trainer.told] == [(True, True)]
    assert book.books is not None
    assert len(book.books.windows) == STEPS - 1
    for window in book.books:
        assert window.opened == ()
        assert abs(window.split["rounding and rest"]) < 1e-3 * math.fsum(map(abs, window.split.values()))


def drawing(policy: fp.Policy) -> Any:
    """Return how rollouts are drawn from a policy, by a generator of their own."""
    generator = torch.Generator().manual_seed(5)
    ids = [tokenizer()(text)["input_ids"] for text in prompts(rows=6)]
    return lambda params: fp.sample(policy, params, ids, generator=generator, max_new_tokens=8, eos_id=1)


def test_marks_at_both_ends_close_the_books(folder: Path, tmp_path: Path) -> None:
    book = LedgerCallback(tmp_path / "ledger", marks=drawing)
    trained(folder, tmp_path, book)
    assert book.books is not None
    assert [(w.first, w.last) for w in book.books] == [(k, k) for k in range(STEPS)]
    assert [mark.step for mark in book.books.marks] == [0, STEPS]
    assert book.books.closing["entropy"].missing == 0


def test_a_ledger_may_draw_its_own(folder: Path, tmp_path: Path) -> None:
    book = LedgerCallback(tmp_path / "ledger", draw=drawing)
    trained(folder, tmp_path, book)
    assert book.books is not None
    assert [(w.first, w.last) for w in book.books] == [(k, k) for k in range(STEPS)]
    assert book.books.lost == ()


def test_a_run_that_is_resumed_goes_on_in_its_ledger(folder: Path, tmp_path: Path) -> None:
    first = LedgerCallback()
    trained(folder, tmp_path, first, save_strategy="steps", save_steps=2)
    assert (tmp_path / "ledger" / "ledger.jsonl").is_file()
    with third_party():
        import trl
        from datasets import Dataset

        second = LedgerCallback()
        trainer = trl.GRPOTrainer(
            model=qwen2(folder / "base"),
            reward_funcs=reward,
            args=trl.GRPOConfig(**arguments(tmp_path, max_steps=STEPS)),
            train_dataset=Dataset.from_dict({"prompt": prompts()}),
            processing_class=tokenizer(),
        )
        second.watch(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "ledger" / "ledger.jsonl").read_text().splitlines()]
    assert "resumed" in kinds
    assert second.books is not None
    assert [window.first for window in second.books] == [0, 1, 2]


def test_a_trainer_that_is_not_watched_is_refused_before_it_trains(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sees no batches: call watch"):
        LedgerCallback(tmp_path).on_train_begin(object(), None, None)
    with pytest.raises(InputError, match="has no compute_loss"):
        LedgerCallback(tmp_path).watch(object())


@pytest.mark.parametrize(("field", "name"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_sharded_runs_are_refused_by_name(tmp_path: Path, field: str, name: str) -> None:
    book = LedgerCallback(tmp_path)
    book._watched = True
    with pytest.raises(InputError, match=f"set up with {name}, which keeps"):
        book.on_train_begin(type("Arguments", (), {field: "full_shard"})(), None, None)


def test_what_ends_the_ledger_does_not_end_the_run(folder: Path, tmp_path: Path) -> None:
    class Broken(LedgerCallback):
        def _evaluation(self, args: Any, inputs: Any) -> Any:
            raise OSError(28, "No space left on device")

    book = Broken(tmp_path / "ledger")
    trainer = trained(folder, tmp_path, book)
    assert len(trainer.told) == 1
    assert "The ledger ends here, and training goes on: " in trainer.told[0]
    assert "No space" in trainer.told[0]
    assert trainer.state.global_step == STEPS


def test_rows_that_the_loss_leaves_out_are_in_e(folder: Path, tmp_path: Path) -> None:
    kept: list[Any] = []

    class Copying(LedgerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            kept.append(([inputs for inputs, _ in self._seen], args))
            super().on_pre_optimizer_step(args, state, control, **given)

    trained(folder, tmp_path, Copying(tmp_path / "ledger"), mask_truncated_completions=True, loss_type="grpo")
    for inputs, args in kept:
        drawn = evaluation_from_trl(inputs, temperature=1.0, max_length=args.max_completion_length)
        if not any(bool(each["completion_mask"].any()) for each in inputs):
            assert bool((drawn.completion_mask.sum(1) == args.max_completion_length).all())
            continue
        trained_on = rollouts_from_trl(inputs, temperature=1.0)
        emptied = trained_on.completion_mask.sum(1) == 0
        assert bool(emptied.any())
        assert bool((drawn.completion_mask.sum(1)[emptied] == args.max_completion_length).all())
        assert torch.equal(drawn.completion_mask[~emptied].sum(1), trained_on.completion_mask[~emptied].sum(1))
        assert drawn.advantages is None
        assert objective_from_config(args, inputs) is not None
