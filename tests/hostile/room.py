"""A room of its own for every case: a small run of a real policy, which the case then spoils."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: A file that a payload writes if anything executes it; it lies outside of the room.
CANARY = "executed"

#: Prompt and completion of a row, in the demo's vocabulary of fourteen.
ROW: dict[str, Any] = {"prompt_ids": [3, 1, 11], "completion_ids": [3, 4, 12], "temperature": 1.0, "reward": 1.0}


class Case(NamedTuple):
    """One hostile input."""

    name: str
    said: str  #: must stand in the one line
    make: Callable[[Room], Sequence[object] | None]  #: spoils the room; returns the words, `run config.yaml` where None
    call: Callable[[Room], object] | None = None  #: asked in place of the command


class Room:
    """A folder with config.yaml, checkpoint/, evaluation.jsonl, batch.jsonl and prompts.txt, to be spoiled."""

    def __init__(self, folder: Path, canary: Path) -> None:
        self.folder, self.canary = folder, canary

    def path(self, name: str) -> Path:
        """Return a path in the room, whose folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file."""
        path = self.path(name)
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def config(self, **changes: object) -> None:
        """Write config.yaml; a change to None leaves the key out."""
        keys: dict[str, object] = {
            "checkpoint": "checkpoint",
            "evaluation": "evaluation.jsonl",
            "batch": "batch.jsonl",
            "device": "cpu",
            **changes,
        }
        self.write("config.yaml", "".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items() if v is not None))

    def raw(self, text: str) -> None:
        """Write config.yaml with a text after the keys that are required."""
        self.write("config.yaml", f"checkpoint: checkpoint\nevaluation: evaluation.jsonl\nbatch: batch.jsonl\n{text}\n")

    def edit(self, name: str, **changes: object) -> None:
        """Change keys of a JSON file; ... removes one."""
        plain = {**json.loads((self.folder / name).read_text()), **changes}
        self.write(name, json.dumps({k: v for k, v in plain.items() if v is not ...}))

    def rows(self, *rows: Mapping[str, Any], name: str = "evaluation.jsonl") -> None:
        """Write a file of rollouts, each the usual row with changes; ... removes a column."""
        whole = ({k: v for k, v in {**ROW, **row}.items() if v is not ...} for row in rows)
        self.write(name, "".join(json.dumps(row) + "\n" for row in whole))

    def parquet(self, columns: Mapping[str, Any], name: str = "evaluation.parquet") -> None:
        """Write a parquet file of arrays and name it as E."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_arrays([pa.array(v) for v in columns.values()], list(columns)), self.path(name))
        self.config(evaluation=name)

    def optimizer(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the optimizer's state."""
        import torch

        path = self.folder / "checkpoint" / "optimizer.pt"
        saved = torch.load(path, weights_only=True)
        change(saved)
        path.unlink()
        torch.save(saved, path)

    def weights(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the tensors of the weights."""
        from safetensors.torch import load_file, save_file

        path = self.folder / "checkpoint" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    def pickle(self) -> bytes:
        """Return a pickle that writes the canary when it is read."""
        import os
        import pickle

        class Payload:
            def __init__(self, path: str) -> None:
                self.path = path

            def __reduce__(self) -> Any:
                return os.system, (f"touch '{self.path}'",)

        return pickle.dumps(Payload(str(self.canary)))


def build(folder: Path) -> None:
    """Make the run that every room is a copy of."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from funcprobe.checkpoints import save_checkpoint
    from funcprobe.cli.demo_task import SYMBOLS, build_tokenizer
    from funcprobe.data.files import read_rollouts
    from funcprobe.objectives.losses import grpo
    from funcprobe.optimizers.factories import adamw
    from funcprobe.policy.module import from_module
    from funcprobe.training.step import make_step

    room = Room(folder, folder.parent / CANARY)
    completions = [[3, 4, 12], [3, 5, 12], [7, 12], [4, 4, 4]]
    rows = [{"completion_ids": c, "reward": float(i % 2)} for i, c in enumerate(completions)]
    room.rows(*rows)
    room.rows(*({**row, "prompt_ids": [4, 1, 11]} for row in rows), name="batch.jsonl")
    room.write("prompts.txt", "31=\n41=\n")
    room.config()
    torch.manual_seed(0)
    size = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 12, "eos_token_id": 12}
    module = GPT2LMHeadModel(GPT2Config(vocab_size=len(SYMBOLS), **size))  # type: ignore[arg-type]
    policy, params = from_module(module)
    optimizer = adamw(1e-3, weight_decay=0.0)
    step = make_step(policy, grpo(), optimizer)
    params, _, state, *_ = step(params, optimizer.init(params), read_rollouts(folder / "batch.jsonl"))
    save_checkpoint(folder / "checkpoint", module, params, optimizer, state, build_tokenizer())


def copied(template: Path, folder: Path, canary: Path) -> Room:
    """Return a room like the template."""
    shutil.copytree(template, folder, symlinks=True)
    return Room(folder, canary)
