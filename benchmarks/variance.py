"""Which estimator of the entropy has the smallest error: `python -m benchmarks.variance`, one core, two minutes.

All eight members of the entropy family, and their control variates, on the same samples of 64 prompts x 8 rollouts:
1,000 replications on each of two policies, along several steps each.

* enumerable: the policy of `prompted`, where ΔH and δH₁ are exact sums; eight random directions, each at an ESS
  of about .98.
* demo: the trained Qwen2 of `funcprobe demo` and its own next GRPO step, on six update batches. A pool of 2,048
  prompts x 8 rollouts stands for the population: replications are prompts drawn from it with their rollouts, and the
  truth is what the whole pool gives (its own error is a sixth of a sample's).
* unequal: the first policy, its reward raised by 2 for every prompt that begins with an odd symbol, as if those were
  easier. That moves no truth at all, only the noise; for the reward alone.

Nats per token and nats per sequence are compared as relative errors, `√(mean var / mean truth²)` over the steps.

What was expected, and why, before it was measured:

* Rao–Blackwell below surprisal: the entropy of a distribution does not depend on which token was drawn from it.
* per decision below sequence: a weight of the prefix leaves out what later tokens add to the noise.
* per token below per sequence where completions differ in length: the ratio cancels what length adds to both.
* the control variate: a gain where prompts differ (the design measured .6 for a reward and .9 for an entropy), none
  where rollouts of one prompt differ as much as any two do: eight rollouts know their mean only so well.

README.md beside this file has the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import funcprobe as fp
from benchmarks.harness import prompted, record
from funcprobe import engine
from funcprobe.cli.demo import prepare_demo
from funcprobe.cli.demo_task import draw_prompts
from funcprobe.cli.demo_training import MAX_GRAD_NORM, DemoSize, draw_rollouts
from funcprobe.estimators.observables import Entropy
from funcprobe.estimators.returns import ExpectedReward, expected_reward
from funcprobe.results.environment import describe_environment
from funcprobe.types import Params, Rollouts, TokenScores

PROMPTS, EACH, REPLICATIONS, CHUNK = 64, 8, 1000, 100
DIRECTIONS, LOG_WEIGHTS = 8, 0.14  # a standard deviation of .14 nats leaves an ESS of exp(-.14²), or .98
UPDATES, POOL = 6, 2048

Sampled = Entropy | ExpectedReward
PLAIN: tuple[Sampled, ...] = (*fp.entropy_family(), expected_reward())
QUANTITIES = ("ΔF", "δF₁")


class Case(NamedTuple):
    """One step, and where its samples come from."""

    policy: str
    pool: Rollouts  #: the rollouts that samples are rows of, rewards among them
    along: engine.Directional  #: the pool's scores at the anchor and their tangents along the step
    after: TokenScores  #: the pool's scores after the step
    truth: Callable[[Sampled], Tensor]  #: [2]: ΔF and δF₁ of what an estimator estimates
    draw: Callable[[int, torch.Generator], Tensor]  #: (count, generator) -> rows [count, PROMPTS · EACH] of the pool


class Row(NamedTuple):
    """The error of one estimator of one quantity on one policy."""

    policy: str
    observable: str
    unit: str
    quantity: str
    relative_error: float  #: √(mean variance / mean truth²) over steps
    with_control_variate: float  #: the same with the control variate
    truth: list[float]  #: step by step
    error: list[float]  #: standard deviation over replications, step by step
    error_with_control_variate: list[float]


def enumerable() -> tuple[list[Case], Params]:
    """Return one case a direction on the policy whose every completion is listed."""
    first = prompted.make_problem()
    problems = [first, *prompted.other_directions(first, DIRECTIONS - 1)]
    return [_enumerated(problem) for problem in problems], first.params


def _enumerated(problem: prompted.Problem) -> Case:
    p = problem.prompt.unsqueeze(1) * problem.along.scores.logp.sum(1).exp().view(len(problem.prompt), -1)
    exactly = problem.rollouts._replace(weight=p.flatten())
    spread = (exactly.weight * problem.along.tangents.logp.sum(1) ** 2).sum().sqrt()
    step = prompted.make_step(problem, float(LOG_WEIGHTS / spread))
    along = problem.along.scaled(step.scale)

    def draw(count: int, g: torch.Generator) -> Tensor:
        prompts = torch.multinomial(problem.prompt, count * PROMPTS, replacement=True, generator=g)
        uniform = torch.rand(len(prompts), EACH, dtype=torch.float64, generator=g)
        completions = torch.searchsorted(problem.cumulative[prompts], uniform)
        return (prompts.unsqueeze(1) * problem.cumulative.shape[1] + completions).view(count, -1)

    return Case(
        policy="enumerable",
        pool=problem.rollouts,
        along=along,
        after=step.after,
        truth=lambda o: _estimate(replace(o, control_variate=False), along, step.after, exactly),
        draw=draw,
    )


def unequal() -> tuple[list[Case], Params]:
    """Return the cases of `enumerable` with rewards raised by 2 wherever the prompt begins with an odd symbol."""
    cases, params = enumerable()
    raised = [_raised(case.pool) for case in cases]
    return [case._replace(policy="unequal", pool=pool) for case, pool in zip(cases, raised, strict=True)], params


def _raised(pool: Rollouts) -> Rollouts:
    assert pool.rewards is not None
    return pool._replace(rewards=pool.rewards + 2.0 * (pool.ids[:, 0] % 2))


def demo() -> tuple[list[Case], Params]:
    """Return one case an update batch on the demo's trained policy, all on one pool of fresh rollouts."""
    checkpoint = fp.load_checkpoint(prepare_demo().parent / "checkpoint")
    policy, params, optimizer, opt_state, tokenizer = checkpoint[:5]
    assert optimizer is not None
    assert opt_state is not None
    size, g = DemoSize(), torch.Generator().manual_seed(0)
    prompts = draw_prompts(POOL + UPDATES * size.batch_prompts, size.shortest, size.longest, g)
    drawn = partial(draw_rollouts, replace(size, group_size=EACH), policy, params, tokenizer, generator=g)
    pool, step = drawn(prompts=prompts[:POOL]), fp.make_step(policy, fp.grpo(), optimizer, MAX_GRAD_NORM)
    cases = []
    for number in range(UPDATES):
        start = POOL + number * size.batch_prompts
        taken = step(params, opt_state, drawn(prompts=prompts[start : start + size.batch_prompts]))
        microbatch = fp.TokenBudget(4096)
        along = engine.directional(policy, params, taken.delta, pool, microbatch=microbatch)
        with engine.math_attention():
            after = engine.scores(policy, taken.params, pool, microbatch=microbatch)
        truth = partial(_of_pool, along=along, after=after, pool=pool)
        cases.append(Case("demo", pool, along, after, truth, _draw_from_pool))
    return cases, params


def _of_pool(o: Sampled, along: engine.Directional, after: TokenScores, pool: Rollouts) -> Tensor:
    """Return what the whole pool gives, by the default integrand and weighting: one truth for a unit."""
    best = Entropy(per=o.per) if isinstance(o, Entropy) else o
    return _estimate(replace(best, control_variate=True), along, after, pool)


def _draw_from_pool(count: int, g: torch.Generator) -> Tensor:
    prompts = torch.randint(POOL, (count, PROMPTS), generator=g)
    return (prompts.unsqueeze(-1) * EACH + torch.arange(EACH)).view(count, -1)


def _estimate(o: Sampled, along: engine.Directional, after: TokenScores, rollouts: Rollouts) -> Tensor:
    """Return [2]: ΔF and δF₁ by one estimator."""
    before, slope = engine.derivative(lambda s: o(s, along.scores, rollouts), along)
    return torch.stack([o(after, along.scores, rollouts) - before, slope])


def replications(case: Case, observables: tuple[Sampled, ...], count: int, g: torch.Generator) -> Tensor:
    """Return [count, observables, 2]: ΔF and δF₁ of every estimator, all of them on the same samples."""
    groups, ones = torch.arange(PROMPTS).repeat_interleave(EACH), torch.ones(PROMPTS * EACH, dtype=torch.float64)

    def one(rows: Tensor) -> Tensor:
        along = engine.Directional(prompted.take(case.along.scores, rows), prompted.take(case.along.tangents, rows))
        assert case.pool.rewards is not None
        sample = case.pool._replace(
            completion_mask=case.pool.completion_mask[rows],
            rewards=case.pool.rewards[rows],
            group_ids=groups,
            weight=ones,
        )
        after = prompted.take(case.after, rows)
        return torch.stack([_estimate(o, along, after, sample) for o in observables])

    return torch.vmap(one, chunk_size=CHUNK)(case.draw(count, g))


def study(cases: list[Case], plain: tuple[Sampled, ...], count: int) -> Iterator[Row]:
    """Yield the errors of every estimator on the cases of one policy."""
    g, every = torch.Generator().manual_seed(0), (*plain, *(replace(o, control_variate=True) for o in plain))
    error = torch.stack([replications(case, every, count, g).std(0) for case in cases])  # [cases, observables, 2]
    truth = torch.stack([torch.stack([case.truth(o) for o in plain]) for case in cases])
    relative = (error**2).mean(0).sqrt() / (truth**2).mean(0).sqrt().repeat(2, 1)
    for k, o in enumerate(plain):
        for q, quantity in enumerate(QUANTITIES):
            yield Row(
                policy=cases[0].policy,
                observable=o.name,
                unit=o.unit,
                quantity=quantity,
                relative_error=float(relative[k, q]),
                with_control_variate=float(relative[k + len(plain), q]),
                truth=truth[:, k, q].tolist(),
                error=error[:, k, q].tolist(),
                error_with_control_variate=error[:, k + len(plain), q].tolist(),
            )


#: What is measured: the policy, and the estimators (with and without control variate) on it.
PLAN: tuple[tuple[Callable[[], tuple[list[Case], Params]], tuple[Sampled, ...]], ...] = (
    (enumerable, PLAIN),
    (demo, PLAIN),
    (unequal, (expected_reward(),)),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and write the JSON."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # small arrays: a second thread would only be waited for
    console, rows, environment = Console(width=150), [], {}
    for make, plain in PLAN:
        with console.status(f"measuring the {make.__name__} policy ..."):
            cases, params = make()
            found = list(study(cases, plain, asked.replications))
        console.print(_table(found, len(cases), asked.replications))
        environment[make.__name__] = describe_environment("cpu", params)
        rows += found
    options = {
        "replications": asked.replications,
        "prompts": PROMPTS,
        "each": EACH,
        "directions": DIRECTIONS,
        "log_weights": LOG_WEIGHTS,
        "updates": UPDATES,
        "pool": POOL,
    }
    record.write(asked.json, "variance", options, environment, [row._asdict() for row in rows])


def _table(rows: list[Row], steps: int, count: int) -> Table:
    """Return one line an estimator, the best entropy of each column marked."""
    title = (
        f"{rows[0].policy}: relative standard error, {PROMPTS} prompts x {EACH}, {steps} steps, {count} replications"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("observable", *QUANTITIES, *(f"{q} with control variate" for q in QUANTITIES), "with / without"):
        table.add_column(heading, justify="left" if heading == "observable" else "right")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.observable, []).append(row)
    values = {name: _values(found) for name, found in lines.items()}
    entropies = [v for name, v in values.items() if name != expected_reward().name] or list(values.values())
    best = [min(column) for column in zip(*entropies, strict=True)]
    for name, found in values.items():
        cells = [f"{'* ' if v == b else ''}{v:.4f}" for v, b in zip(found, best, strict=True)]
        table.add_row(name, *cells, f"{found[2] / found[0]:.3f}, {found[3] / found[1]:.3f}")
    return table


def _values(found: list[Row]) -> list[float]:
    return [row.relative_error for row in found] + [row.with_control_variate for row in found]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The standard error of every estimator of the entropy.")
    parser.add_argument("--replications", type=int, default=REPLICATIONS, help=f"default {REPLICATIONS}")
    results = Path(__file__).parent / "results" / "variance.json"
    parser.add_argument("--json", type=Path, metavar="PATH", default=results, help="where the numbers go")
    return parser


if __name__ == "__main__":
    main()
