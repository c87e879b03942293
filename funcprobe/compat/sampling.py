"""E and U of a probe: drawn from the configured dataset by one seed, or read from where an earlier probe left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from funcprobe.cli.prompts import read_prompts
from funcprobe.compat.batches import Batch
from funcprobe.compat.settings import Settings
from funcprobe.data.files import FORMATS, read_rollouts, write_rollouts
from funcprobe.errors import ConfigError, InputError
from funcprobe.policy.module import Policy
from funcprobe.policy.rewards import load_reward
from funcprobe.policy.sampling import sample
from funcprobe.types import Params, Rollouts

#: Said where no function is named that rewards U.
REWARD = "the function that rewards U, as module:function"


@dataclass
class Source:
    """Where the batches of a probe come from; the same configuration gives the same batches, in whichever process."""

    settings: Settings
    policy: Policy
    params: Params
    tokenizer: Any

    def batch(self, which: Literal["E", "U"]) -> Batch:
        """Return E or U, from its cache where that is configured and there.

        E is `B_E` prompts drawn with replacement, none of them a prompt of U, one completion each; U is `B_U` distinct
        prompts, `G` completions each, with rewards.

        Raises:
            ConfigError: If a key or the dataset cannot be used.
            InputError: If a cached batch, a prompt or a reward cannot.
        """
        place = self.settings.get(f"probe_reuse.{which.lower()}_batch_cache_path")
        if not self.settings.get(f"probe_reuse.reuse_{which}"):
            return self._drawn(which)
        if place is None:
            raise ConfigError(
                f"probe_reuse.reuse_{which} is set and {which.lower()}_batch_cache_path is not; name the file."
            )
        path = Path(place)
        if not path.exists():
            write_cached(path, self._drawn(which))
        return read_rollouts(path) if path.suffix in FORMATS else read_cached(path)

    def _drawn(self, which: Literal["E", "U"]) -> Rollouts:
        settings, rewarded = self.settings, which == "U"
        return sample(
            self.policy,
            self.params,
            self._dealt[which],
            generator=torch.Generator().manual_seed(self._seed * 10 + (2 if rewarded else 1)),
            max_new_tokens=settings.get("generation.max_new_tokens", 256),
            eos_id=settings.end_tokens(self),
            temperature=settings.temperature(),
            group_size=settings.sizes[2] if rewarded else 1,
            reward=load_reward(settings.needed("batch_config.reward", REWARD)) if rewarded else None,
            tokenizer=self.tokenizer,
            batch_size=settings.get("generation.gen_batch_size", 8),
        )

    @cached_property
    def _dealt(self) -> dict[str, list[list[int]]]:
        """Prompts of E and U, dealt by the master seed once: E gets none of U's.

        Raises:
            ConfigError: If there are too few.
        """
        b_e, b_u, _ = self.settings.sizes
        generator = torch.Generator().manual_seed(self._seed)
        pool = self._distinct("U")
        if len(pool) < b_u:
            raise ConfigError(f"The dataset has {len(pool)} distinct prompts for U, and B_U is {b_u}.")
        update = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:b_u].tolist()]
        rest = [prompt for prompt in self._distinct("E") if prompt not in update]
        if not rest:
            raise ConfigError(f"U takes all {len(pool)} prompts and leaves none to E; lower B_U, or name an E_split.")
        drawn = torch.randint(len(rest), (b_e,), generator=generator).tolist()
        return {"E": [rest[i] for i in drawn], "U": update}

    def _distinct(self, which: str) -> list[list[int]]:
        split = self.settings.get(f"batch_config.{which}_split") or self.settings.get("batch_config.split")
        name = self.settings.needed("batch_config.dataset_name", "a file of prompts, or a folder with one a split")
        found = read_prompts(dataset_file(Path(name), split), self.tokenizer)
        return [list(prompt) for prompt in dict.fromkeys(map(tuple, found))]

    @property
    def _seed(self) -> int:
        return int(self.settings.get("computation_options.master_seed", 42))


def dataset_file(path: Path, split: str | None) -> Path:
    """Return the file of prompts: the path itself, or `<split>.jsonl`, `.parquet` or `.txt` in that folder.

    Raises:
        ConfigError: If there is none.
    """
    if path.is_file():
        if split is not None:
            raise ConfigError(f"{path} is one file and has no split '{split}'; leave the split out, or name a folder.")
        return path
    names = [f"{split}{suffix}" for suffix in (".jsonl", ".parquet", ".txt")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"batch_config.dataset_name: {path} is no file, and holds none of {names}.")


def read_cached(path: Path) -> Batch:
    """Return a batch that this or the stateful system left in a `.pt` file; nothing but tensors is unpickled.

    Raises:
        InputError: If the file holds anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file that is no pickle makes the unpickler trip over is anybody's guess
        raise InputError(
            f"{path} cannot be read as tensors and plain containers, and nothing else is unpickled."
        ) from error
    if not (isinstance(found, Mapping) and isinstance(found.get("data"), Mapping)):
        raise InputError(f"{path} holds no batch; expected a mapping with 'data', or a rollout file.")
    data = found["data"]
    return Rollouts(**data) if set(data) == set(Rollouts._fields) else dict(data)


def write_cached(path: Path, rollouts: Rollouts) -> None:
    """Write a batch where `read_cached` or `read_rollouts` finds it, by the file's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in FORMATS:
        write_rollouts(path, rollouts)
    else:
        torch.save({"data": rollouts._asdict()}, path)
