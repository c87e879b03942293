"""Our step beside a real GRPOTrainer's, setting by setting: `python -m benchmarks.trl_settings` from the root.

For every setting a real trainer takes three steps on a tiny Qwen2. Before the last one our step is made of the live
pair: from the micro-batches and the configuration (the objective), and from `.grad` alone. The error is ‖Δθ ours −
Δθ theirs‖ / ‖Δθ theirs‖; theirs is a difference of two stored float32 trees, itself good to about 5e-6.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import funcprobe as fp
from benchmarks.harness import record
from funcprobe.errors import InputError
from funcprobe.results.environment import describe_environment
from tests.cases.third_party import third_party
from tests.cases.trl_runs import SETTINGS, arguments, distance, our_step, qwen2, train

PAGE = Path(__file__).parents[1] / "docs" / "frameworks" / "trl-settings.md"

#: Settings that no objective here expresses.
OTHERS: dict[str, dict[str, Any]] = {
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 3},
    "adaptive entropy": {"use_adaptive_entropy": True},
}


def looked_at(trainer: Any, model: nn.Module, optimizer: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return both of our steps; of the objective's there may be a refusal in its place."""
    given = fp.from_training(model, optimizer).update_from_grad().take().params
    found: dict[str, Any] = {"grad": {name: p.clone() for name, p in given.items()}}
    try:
        found["objective"] = our_step(trainer, model, optimizer, inputs).params
    except InputError as error:
        found["refused"] = str(error)
    return found


def rows(names: dict[str, dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every setting."""
    for name, options in names.items():
        with third_party():
            from trl import GRPOConfig, GRPOTrainer

            config = GRPOConfig(**arguments(folder / "run", **options))
            seen = train(GRPOTrainer, config, qwen2(folder / "base"), looked_at, (2,)).steps[2]
        row: dict[str, Any] = {"setting": name, "options": options, "refused": seen.ours.get("refused")}
        for way in ("objective", "grad"):
            if way in seen.ours:
                row[way] = distance(fp.tree.sub(seen.ours[way], seen.before), seen.delta)
        print(f"{name:<32} {row.get('objective', float('nan')):.1e} {row['grad']:.1e} {row['refused'] or ''}"[:110])
        yield row


def page(kept: dict[str, Any]) -> str:
    """Return the page of kept rows."""
    lines = [
        "# TRL, setting by setting",
        "",
        "How far our step is from that of a real `GRPOTrainer` (TRL 1.16) on a tiny Qwen2: ‖Δθ ours − Δθ theirs‖ /",
        "‖Δθ theirs‖, at most 1e-5 in the tests. *By the objective*: from the batches of `compute_loss` and the",
        "configuration. *By `.grad`*: from the gradient as it stands before the optimizer steps; 0 is the same bits.",
        "What the first cannot express is named; the second is exact for it. (`python -m benchmarks.trl_settings`)",
        "",
        "| setting | options | by the objective | by `.grad` |",
        "|---|---|---|---|",
    ]
    for row in kept["rows"]:
        options = ", ".join(f"{name}={value!r}" for name, value in row["options"].items()) or "those of TRL"
        error = f"{row['objective']:.1e}" if "objective" in row else "not expressible"
        lines.append(f"| {row['setting']} | `{options}` | {error} | {row['grad']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=record.RESULTS / "trl-settings.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows({**SETTINGS, **OTHERS}, Path(folder)))
    record.write(given.json, "trl_settings", {"threads": 1}, describe_environment(), found)
    PAGE.write_text(page(json.loads(given.json.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
