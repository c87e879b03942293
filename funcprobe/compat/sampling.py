"""E and U of a probe: drawn from the configured dataset by one seed, or read from where an earlier probe left them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from funcprobe.cli.prompts import read_prompts
from funcprobe.compat import settings
from funcprobe.compat.batches import Batch
from funcprobe.compat.sections import Sections
from funcprobe.data.files import FORMATS, read_rollouts, write_rollouts
from funcprobe.errors import ConfigError, InputError
from funcprobe.policy.module import Policy
from funcprobe.policy.rewards import load_reward
from funcprobe.policy.sampling import sample
from funcprobe.types import Params, Rollouts

#: The seed of the stateful system.
MASTER_SEED = 42


class Source:
    """Where the batches of a probe come from; the same configuration gives the same batches, in whichever process."""

    def __init__(self, sections: Sections, policy: Policy, params: Params, tokenizer: Any) -> None:
        self.sections, self.policy, self.params, self.tokenizer = sections, policy, params, tokenizer
        self._dealt: tuple[list[list[int]], list[list[int]]] | None = None

    def evaluation(self) -> Batch:
        """Return E: `B_E` prompts drawn with replacement, none of them a prompt of U, one completion each.

        Raises:
            InputError: If a key, the dataset or a cached batch cannot be used.
        """
        return self._cached("E", lambda: self._draw(self._prompts()[0], 1, with_reward=False, seed=1))

    def update(self) -> Batch:
        """Return U: `B_U` distinct prompts, `G` completions each, with rewards.

        Raises:
            InputError: If a key, the dataset or a cached batch cannot be used.
        """
        group_size = self.sections.sizes[2]
        return self._cached("U", lambda: self._draw(self._prompts()[1], group_size, with_reward=True, seed=2))

    def _cached(self, which: str, draw: Any) -> Batch:
        reuse = self.sections.section("probe_reuse")
        place = reuse.get(f"{which.lower()}_batch_cache_path")
        if not reuse.get(f"reuse_{which}"):
            return draw()
        if place is None:
            raise ConfigError(
                f"probe_reuse.reuse_{which} is set and {which.lower()}_batch_cache_path is not; name the file."
            )
        path = Path(place)
        if path.exists():
            return read_rollouts(path) if path.suffix in FORMATS else read_cached(path)
        found = draw()
        write_cached(path, found)
        return found

    def _draw(self, prompts: list[list[int]], group_size: int, *, with_reward: bool, seed: int) -> Rollouts:
        generation = self.sections.section("generation")
        reward = self.sections.section("batch_config").get("reward")
        if with_reward and not isinstance(reward, str):
            raise ConfigError("batch_config.reward is missing; name the function that rewards U, as module:function.")
        end = settings.end_tokens(self.sections.config, self, None)
        if len(end) > 1:
            raise ConfigError(f"generation.eos_token_id is {sorted(end)}; completions end with one token.")
        return sample(
            self.policy,
            self.params,
            prompts,
            generator=torch.Generator().manual_seed(self._seed * 10 + seed),
            max_new_tokens=settings.whole(generation, "max_new_tokens", 256),
            eos_id=next(iter(end), None),
            temperature=settings.temperature_of(self.sections.config),
            group_size=group_size,
            reward=load_reward(str(reward)) if with_reward else None,
            tokenizer=self.tokenizer,
            batch_size=settings.whole(generation, "gen_batch_size", 8),
        )

    def _prompts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Deal prompts to E and U by the master seed, once: E gets none of U's.

        Raises:
            ConfigError: If there are too few.
        """
        if self._dealt is None:
            b_e, b_u, _ = self.sections.sizes
            generator = torch.Generator().manual_seed(self._seed)
            pool = self._distinct("U")
            if len(pool) < b_u:
                raise ConfigError(f"The dataset has {len(pool)} distinct prompts for U, and B_U is {b_u}.")
            update = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:b_u].tolist()]
            rest = [prompt for prompt in self._distinct("E") if prompt not in update]
            if not rest:
                raise ConfigError(
                    f"U takes all {len(pool)} prompts and leaves none to E; lower B_U, or name an E_split."
                )
            drawn = torch.randint(len(rest), (b_e,), generator=generator).tolist()
            self._dealt = [rest[i] for i in drawn], update
        return self._dealt

    def _distinct(self, which: str) -> list[list[int]]:
        batch = self.sections.section("batch_config")
        split = batch.get(f"{which}_split", batch.get("split"))
        found = read_prompts(dataset_file(batch.get("dataset_name"), split), self.tokenizer)
        return [list(prompt) for prompt in dict.fromkeys(map(tuple, found))]

    @property
    def _seed(self) -> int:
        return int(settings.number(self.sections.section("computation_options"), "master_seed", MASTER_SEED))


def dataset_file(name: Any, split: str | None) -> Path:
    """Return the file of prompts: `dataset_name` itself, or `<split>.jsonl`, `.parquet` or `.txt` in that folder.

    Raises:
        ConfigError: If there is none.
    """
    if not isinstance(name, str):
        raise ConfigError("batch_config.dataset_name is missing; name a file of prompts, or a folder with one a split.")
    path = Path(name)
    if path.is_file():
        if split is not None:
            raise ConfigError(f"{path} is one file and has no split '{split}'; leave the split out, or name a folder.")
        return path
    found = [path / f"{split}{suffix}" for suffix in (".jsonl", ".parquet", ".txt")]
    if not any(file.is_file() for file in found):
        raise ConfigError(f"batch_config.dataset_name: {path} is no file, and holds none of {[f.name for f in found]}.")
    return next(file for file in found if file.is_file())


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
