"""The cost of a ledger to a real GRPOTrainer, as a share of a step with its generation: `python benchmarks/live.py`.

A Qwen2 with random weights (hidden 256, 4 layers) trains on 32 completions a step, prompts of 8 tokens and completions
of 48, on one CPU thread. The processor time of the callback's hooks is taken inside the run, that of a step from one
step's beginning to the next, less the hooks; their ratio is the ledger's share, over all steps after the first few.
In reverse mode one backward pass gives ∇F, and with it δF₁ and the split, where forward mode takes both a tangent and
∇F: what is lost is the error bar of δF₁, and paths, so that ΔF is a difference of two evaluations.

What was expected, with u a forward pass over the batch: a step is 3u and its generation; a window 5u and a readout; an
opened step 3u + 3u more. If generating 48 tokens one by one costs about 6u (it is bound by reading weights), measuring
every step is 5 / 9 of it, measuring a tenth of them 6 %, and all of it every ten steps 12 %. It was not so: generating
costs about 3u here, and the parts of a step, summed every step, a tenth of it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import record

import funcprobe as fp
from funcprobe.integrations.trl import LedgerCallback
from funcprobe.results.environment import describe_environment

#: Options of the callback by the name of the row, and the share that was asked for.
ROWS: dict[str, tuple[dict[str, Any], float]] = {
    "measured every step": ({}, 0.25),
    "measured every step, 8 of 32 rows": ({"rows": 8}, 0.25),
    "measured every step, reverse mode": ({"mode": "reverse"}, 0.25),
    "measured every step, reverse mode, 8 of 32 rows": ({"mode": "reverse", "rows": 8}, 0.25),
    "measured every step, reverse mode, 8 of 32 rows, without the split": (
        {"mode": "reverse", "rows": 8, "split": False},
        0.25,
    ),
    "every=10": ({"every": 10}, 0.05),
    "every=10, reverse mode, without the split": ({"every": 10, "mode": "reverse", "split": False}, 0.05),
    "every=10, without the split": ({"every": 10, "split": False}, 0.05),
    "every=10, without the split, 8 of 32 rows": ({"every": 10, "split": False, "rows": 8}, 0.05),
    "every=10, its last generation opened to all tokens": ({"every": 10, "open_every": 1, "tokens": True}, 0.15),
}
HOOKS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_log")


class Timed(LedgerCallback):
    """A ledger that takes the processor time of its own hooks, and of every step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.own, self.steps = [0.0], [time.process_time()]
        for name in HOOKS:
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any, **named: Any) -> None:
            began = time.process_time()
            if hook.__name__ == "on_step_begin":
                self.steps.append(began)
                self.own.append(0.0)
            hook(*arguments, **named)
            self.own[-1] += time.process_time() - began

        return timed

    def shares(self, skipped: int) -> tuple[list[float], list[float]]:
        """Return seconds of the ledger, and of the step without it, for every step but the first few and the last."""
        whole = [b - a for a, b in zip(self.steps, self.steps[1:], strict=False)]
        own = self.own[: len(whole)]
        return own[skipped:], [w - o for w, o in zip(whole[skipped:], own[skipped:], strict=True)]


def trained(book: LedgerCallback, steps: int, folder: Path, vocabulary: int) -> None:
    """Train a model for some steps, watched by a ledger."""
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(vocabulary - 3)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=4, max_position_embeddings=128, **shape, **special)
    texts = [" ".join(f"w{(7 * i + j) % (vocabulary - 3)}" for j in range(8)) for i in range(64)]
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=48,
            learning_rate=1e-5,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )
    book.watch(trainer)
    trainer.train()


def measured(name: str, steps: int, vocabulary: int) -> dict[str, Any]:
    """Return a row: the ledger's processor time over that of the steps without it."""
    options, asked = ROWS[name]
    skipped = 2
    with tempfile.TemporaryDirectory() as folder:
        book = Timed(Path(folder) / "ledger", {"entropy": fp.entropy()}, **options)
        trained(book, steps, Path(folder), vocabulary)
        own, step = book.shares(skipped)
    books = book.books
    assert books is not None
    period = options.get("every", 1)
    whole = len(own) // period * period
    shares = [sum(own[k : k + period]) / sum(step[k : k + period]) for k in range(0, whole, period)]
    return {
        "row": name,
        "options": options,
        "asked": asked,
        "steps": len(own),
        "windows": len(books.windows),
        "share": sum(own[:whole]) / sum(step[:whole]),
        "quartiles": statistics.quantiles(shares, n=4) if len(shares) > 1 else shares,
        "step_seconds": statistics.median(step),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps a row")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", default="", metavar="WORDS", help="only rows of the table whose name has these words")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--json", type=Path, default=record.RESULTS / "live.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = 12 if given.quick else given.steps
    rows = [measured(name, steps, given.vocabulary) for name in ROWS if given.rows in name]
    print(f"{'row':<66} {'ledger / step':>14} {'quartiles':>18} {'asked':>7}")
    for row in rows:
        low, high = row["quartiles"][0], row["quartiles"][-1]
        print(f"{row['row']:<66} {row['share']:>14.3f} {f'{low:.3f} .. {high:.3f}':>18} {row['asked']:>7.2f}")
    if not given.quick:
        options = {"steps": steps, "vocabulary": given.vocabulary, "threads": 1}
        record.write(given.json, "live", options, describe_environment(torch.device("cpu"), {}), rows)


if __name__ == "__main__":
    main()
