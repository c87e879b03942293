"""ΔH in float32 against the learning rate, both systems against a true float64 model: `python benchmarks/precision.py`.

A GPT-2 with random weights (float64 throughout when it is asked to be), AdamW with moments of a real step, learning
rates from 1e-2 to 1e-9. Both systems step along one gradient, that of the functional step in float32, so that the
update Δθ is the same; the truth is `H(θ + Δθ) − H(θ)` in float64 with Δθ that update *as a value*. Errors are relative
to Σ|terms|, the sum of the absolute contributions of tokens: what rounding is relative to, since ΔH itself may cancel.

The stateful system measures where its parameters are: θ′ as stored in float32, which is not θ + Δθ. So its error is
given in two parts as well, by a float64 model at that very θ′: `storage`, what H does between θ + Δθ and θ′, and
`subtraction`, what two float32 evaluations make of H(θ′) − H(θ).

What was expected: subtraction loses a digit with every decade of η, some 1e-3 of Σ|terms| at 1e-7 and all of it below
1e-9. Storage starts later and falls as fast: weights of .1 are 7e-9 apart, so that most entries do not move at 1e-9,
and below 1e-8 the stored step is another step. The functional system subtracts where that does no harm, at the largest
learning rates, and takes the path elsewhere: below 1e-5 of Σ|terms| (the path's tolerance) from 1e-3 down.

README.md beside this file says what was found, and where that expectation was wrong.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import comparing, narrow, record
from stateful import StatefulProbe
from stateful.snapshot import clear_gradients
from stateful.updates import optimizer_step
from torch import nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.data.rollouts import to_device
from funcprobe.measurement.evidence import Evidence
from funcprobe.measurement.path import subtraction_error
from funcprobe.results.environment import describe_environment
from funcprobe.types import Params, Rollouts

LRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
ENTROPY = fp.entropy()


@dataclass(frozen=True)
class AlongGradient(StatefulProbe):
    """The stateful probe, stepping along a gradient that it is given in place of its own."""

    given: Params = field(default_factory=dict)

    def _rl_update(self, update: Rollouts, lr: float | None) -> float:
        """Take the one step along the given gradient; return the learning rate used."""
        for name, p in self.module.named_parameters():
            p.grad = self.given[name].clone()
        used = optimizer_step(self.module, self.optimizer, self.max_grad_norm, lr)
        clear_gradients(self.module, self.optimizer)
        return used


class Truth(NamedTuple):
    """The same model in float64."""

    policy: fp.Policy
    params: Params
    evaluation: Rollouts

    def along(self, update: Params) -> Evidence:
        """Return scores at θ and at θ + update, and the tangents between."""
        wide = {name: u.double() for name, u in update.items()}
        along = engine.directional(self.policy, self.params, wide, self.evaluation)
        end = tree.add(self.params, wide)
        return Evidence(self.evaluation, along.scores, engine.scores(self.policy, end, self.evaluation, order=1), along)


def main() -> None:
    """Measure, print and write."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    rows = measured(options)
    headings = ("η", "true ΔH", "stateful error", "subtraction", "storage", "of |ΔH|", "functional error", "method")
    shown = ("stateful", "subtraction", "storage", "stateful_of_change", "functional")
    comparing.show(
        "error of ΔH in float32, relative to Σ|terms|",
        headings,
        [[f"{r['lr']:.0e}", f"{r['change']:+.3e}", *(f"{r[name]:.0e}" for name in shown), _method(r)] for r in rows],
    )
    if options.quick:
        print("nothing written: --quick shows that it runs, and its numbers are no figures")
        return
    out = Path(__file__).parent / "results" / f"precision-{options.device}.json"
    record.write(out, "precision", {**vars(options), "lrs": LRS}, describe_environment(options.device), rows)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every learning rate."""
    module, optimizer = _pair(options.hidden, options.layers, options.device)
    wide, wide_params = fp.from_module(copy.deepcopy(module).double())
    live = fp.from_training(module, optimizer)
    drawn = narrow.batches(live.policy, live.params, options.prompts)
    evaluation, update = (to_device(rollouts, options.device) for rollouts in drawn)
    step = fp.make_step(live.policy, fp.dr_grpo(), live.optimizer)
    gradient, _ = step.gradient(live.params, update)
    stateful = AlongGradient(module, optimizer, given=gradient)
    truth = Truth(wide, wide_params, evaluation)
    rows = []
    for lr in LRS[:: 3 if options.quick else 1]:
        old = stateful.run(evaluation, update, lr=lr)
        new = fp.probe(
            fp.Update.from_step(step, live.params, live.opt_state, update, lr=lr),
            evaluation,
            method="auto",
            bars=None,
            keep_delta=True,
        )
        assert new.delta is not None
        rows.append(_row(lr, old, new, truth.along(new.delta), truth.along(old.param_update)))
    return rows


def _row(lr: float, old: Any, new: fp.ProbeResult, exact: Evidence, stored: Evidence) -> dict[str, Any]:
    change, at_stored, size = float(exact.change(ENTROPY)), float(stored.change(ENTROPY)), exact.magnitude(ENTROPY)
    apart = tree.norm(tree.sub(new.delta, old.param_update)) / tree.norm(new.delta)
    return {
        "lr": lr,
        "change": change,
        "terms": size,
        "truth_error": subtraction_error(exact, ENTROPY, torch.finfo(torch.float64).eps) / size,
        "stateful": abs(old.deltaH_true - change) / size,
        "subtraction": abs(old.deltaH_true - at_stored) / size,
        "storage": abs(at_stored - change) / size,
        "stateful_of_change": abs(old.deltaH_true / change - 1),
        "stateful_change": old.deltaH_true,
        "stored_step_apart": float(apart),  # ‖(θ′ − θ) − Δθ‖ / ‖Δθ‖
        "functional": abs(new.change - change) / size,
        "functional_change": new.change,
        "functional_at_stored": abs(new.change - at_stored) / size,  # of a subtraction: its error without storage
        "functional_estimate": None if new.main.float_error is None else new.main.float_error / size,
        "method": new.main.method,
        "nodes": new.main.nodes,
    }


def _method(row: dict[str, Any]) -> str:
    return "subtraction" if row["method"] == "difference" else f"path, {row['nodes']}"


def _pair(hidden: int, layers: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = narrow.gpt2(hidden, layers).eval().to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.01)
    ids = torch.arange(2 * 32, device=device).reshape(2, 32)
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return module, optimizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="ΔH in float32 against the learning rate, both systems.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16, help="of E, and of U, four completions each (default 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three learning rates; writes nothing")
    return parser


if __name__ == "__main__":
    main()
