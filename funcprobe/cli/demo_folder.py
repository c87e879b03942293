"""The demo: a small real policy in an ordinary checkpoint folder, two rollout files and a configuration.

Everything is made on the spot from a seed. The folder appears whole or not at all, and a second call uses it again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from funcprobe.checkpoints import save_checkpoint
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, Trained, draw_rollouts, train
from funcprobe.data import ownership
from funcprobe.data.atomic import fresh_directory
from funcprobe.data.files import write_rollouts
from funcprobe.data.paths import path_of
from funcprobe.errors import InputError
from funcprobe.types import Progress

#: Raised whenever other files would be written for the same seed.
VERSION = 3

#: Says which demo the folder is, and what is in it.
MARKER = "demo.json"

#: Where files are kept that stand in a demo's place and are not as it left them.
PREVIOUS = "previous"

CONFIG = """\
# What `funcprobe run` reads. Paths are relative to this file. Every key can be given on the command line as well:
#   funcprobe run config.yaml --lr 1e-5 --output results-1e-5

checkpoint: checkpoint          # a Hugging Face or TRL folder: config.json, model.safetensors, optimizer.pt
optimizer: auto                 # read optimizer.pt; `fresh` starts a new AdamW at lr, and represents nothing of the run
lr: none                        # a number, or none: the saved one, which belongs to the next step of the run ({lr:.3g})
max_grad_norm: {max_grad_norm}              # no checkpoint holds it: state what training used (TRL's default is 1.0)

evaluation: evaluation.parquet  # E: {evaluation} completions of {evaluation_prompts} prompts, to measure the policy on
batch: batch.parquet            # U: {batch} completions of {batch_prompts} other prompts, to take the step on

objective:
  name: grpo                    # or reinforce, rloo, bnpo, dr_grpo, dapo, gspo, cispo
  epsilon: 0.2                  # options go by TRL's names
  scale_rewards: group

observable:
  integrand: rao_blackwell      # the entropy of every distribution on the way; or surprisal: -log p of what was drawn
  weighting: per_decision       # a token is weighted by its prefix alone; or sequence
  per: token                    # or sequence
also: [reward, kl]              # read from the same passes; or kl_before, length
order: 2                        # second order too: where first order ends

mode: auto                      # forward mode; reverse where the model has no forward derivative
device: cpu                     # or auto, cuda, cuda:0
output: results                 # result.json, the configuration as run, and a figure
"""


def prepare_demo(
    directory: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    size: DemoSize | None = None,
) -> Path:
    """Return the path of the demo's `config.yaml`, ready for `funcprobe run`; beside it stands everything it names.

    The folder is `directory`, or one for this seed in the cache ($FUNCPROBE_CACHE, $XDG_CACHE_HOME/funcprobe/demo or
    ~/.cache/funcprobe/demo). Where the same demo is there already it is used again, an edited configuration included;
    one that is damaged, older, of another seed or size is made anew, keeping files that are not the demo's. Equal
    seeds give equal files. The global random state stays as it is.

    Raises:
        InputError: If the folder holds anything else.
        MissingExtraError: If transformers or pyarrow is not installed.
    """
    size = DemoSize() if size is None else size
    target = (default_directory() / f"seed-{seed}" if directory is None else path_of(directory, "--dir")).absolute()
    identity = {"funcprobe demo": VERSION, "seed": seed, "size": asdict(size)}
    if force or not _is_intact(target, identity):
        _check_replaceable(target)
        _check_elsewhere(target)
        with fresh_directory(target, overwrite=True, check=_check_replaceable) as partial, _one_thread():
            history = _build(partial, size, seed, progress)
            files = {name: _digest(partial / name) for name in _files(partial)}
            (partial / MARKER).write_text(json.dumps({**identity, "training": history, "files": files}, indent=1))
            ownership.seal(partial)
            _keep_strays(target, partial)
    return target / "config.yaml"


def default_directory() -> Path:
    """Return the folder in which demos are cached: $FUNCPROBE_CACHE, or funcprobe/demo in the user's cache."""
    if own := os.environ.get("FUNCPROBE_CACHE"):
        return path_of(own, "$FUNCPROBE_CACHE")
    return path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "The cache folder") / "funcprobe" / "demo"


def _build(folder: Path, size: DemoSize, seed: int, progress: Progress | None) -> dict[str, Any]:
    """Write everything but the marker, and return the statistics of training by stage."""
    generator = torch.Generator().manual_seed(seed)
    trained = train(size, seed, generator, progress)
    save_checkpoint(
        folder / "checkpoint",
        trained.module,
        trained.params,
        trained.optimizer,
        trained.opt_state,
        trained.tokenizer,
        global_step=size.rl_steps,
    )
    prompts = draw_prompts(size.evaluation_prompts + size.batch_prompts, size.shortest, size.longest, generator)
    parts = {"evaluation": prompts[: size.evaluation_prompts], "batch": prompts[size.evaluation_prompts :]}
    rows = {name: _write_part(folder, name, part, size, trained, generator) for name, part in parts.items()}
    text = CONFIG.format(**{**asdict(size), **rows}, lr=trained.optimizer.lr, max_grad_norm=MAX_GRAD_NORM)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return trained.history


def _write_part(
    folder: Path, name: str, prompts: list[str], size: DemoSize, trained: Trained, generator: torch.Generator
) -> int:
    drawn = draw_rollouts(
        size, trained.policy, trained.params, trained.tokenizer, prompts, generator, step=size.rl_steps
    )
    write_rollouts(folder / f"{name}.parquet", drawn, tokenizer_id="funcprobe demo")
    return drawn.ids.shape[0]


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give the demo a folder of its own.")
    if target.exists() and any(target.iterdir()) and not ownership.holds(target, MARKER):
        raise InputError(
            f"{target} is not empty and holds no demo ({ownership.MARKER} does not say so); give a new or empty folder."
        )


def _check_elsewhere(target: Path) -> None:
    if target.exists() and Path.cwd().resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} is the folder you are in, which a new demo would replace; give another name.")


def _is_intact(target: Path, identity: dict[str, Any]) -> bool:
    """Return whether the folder holds this very demo, every file with the contents it was written with."""
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        same = {key: marker.get(key) for key in identity} == identity and (target / "config.yaml").is_file()
        return same and all(_digest(target / name) == digest for name, digest in marker["files"].items())
    except (OSError, ValueError, AttributeError, KeyError):
        return False


def _files(folder: Path) -> list[str]:
    """Return the relative names of the files that must not change: the configuration is there to be edited."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in ("config.yaml", ownership.MARKER))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _keep_strays(old: Path, new: Path) -> None:
    """Keep all that is not as the old demo left it: under its own name, or in `previous` where the new demo has one."""
    found = [path.relative_to(old) for path, _ in ownership.strays(old)] if old.is_dir() else []
    for name in sorted(found, key=lambda name: (new / name).exists()):
        path = old / name
        is_free = len(name.parts) == 1 and not (new / name).exists()
        kept = new / name if is_free else _free(new / PREVIOUS / name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, kept, symlinks=True)
        else:
            shutil.copy2(path, kept, follow_symlinks=False)


def _free(path: Path) -> Path:
    """Return a path like this one at which nothing stands."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(free for free in (path, *itertools.islice(others, 1000)) if not os.path.lexists(free))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: sums then have one order on any machine, and so small a model gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
