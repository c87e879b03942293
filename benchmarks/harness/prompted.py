"""A policy with many prompts, small enough to list every completion of each: exact values, and samples for nothing.

Scores and tangents of all completions of all prompts are computed once; a sample is a choice of their rows, and an
exact value is a sum over them in which no importance weight appears.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import funcprobe as fp
from funcprobe import engine, tree
from funcprobe.policy.module import Policy
from funcprobe.types import Observable, Params, Rollouts, TokenScores

END, SYMBOLS, PROMPT, LONGEST = 0, 4, 3, 6


class Words(nn.Module):
    """A causal policy over a few symbols whose every token depends on the whole prompt; prompts differ in entropy."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(SYMBOLS, width), nn.Embedding(PROMPT + LONGEST, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, SYMBOLS)
        with torch.no_grad():
            self.head.bias[END] -= 1.0  # completions of four to five symbols
            self.mix.weight *= 3
            self.head.weight *= 2

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, L, SYMBOLS]."""
        x = torch.tanh(self.embed(ids) + self.place(torch.arange(ids.shape[1])))
        count = torch.arange(1, ids.shape[1] + 1, dtype=x.dtype).unsqueeze(-1)
        return self.head(torch.tanh(x + self.mix(x.cumsum(1) / count.sqrt())))


class Problem(NamedTuple):
    """Every completion of every prompt, scored, with the derivative along one direction."""

    policy: Policy
    params: Params
    direction: Params
    rollouts: Rollouts  #: M prompts, the same C completions of each in turn
    prompt: Tensor  #: [M] probability of every prompt
    cumulative: Tensor  #: [M, C] cumulative probability of a prompt's completions
    along: engine.Directional  #: scores at the anchor, tangents per unit of step


class Step(NamedTuple):
    """A step along the direction."""

    scale: float
    after: TokenScores


def make_problem(longest: int = LONGEST) -> Problem:
    """Return the policy, all its completions up to that length, and their scores and tangents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        policy, params = fp.from_module(Words().double())
    g = torch.Generator().manual_seed(3)
    direction = _random(params, g)
    prompt = torch.randn(SYMBOLS**PROMPT, generator=g, dtype=torch.float64).exp()
    rollouts = _everything(longest)
    along = engine.directional(policy, params, direction, rollouts)
    cumulative = along.scores.logp.sum(1).exp().view(len(prompt), -1).cumsum(1)
    return Problem(policy, params, direction, rollouts, prompt / prompt.sum(), cumulative / cumulative[:, -1:], along)


def make_step(problem: Problem, scale: float) -> Step:
    """Return the step to `params + scale · direction`."""
    moved = tree.axpy(scale, problem.direction, problem.params)
    return Step(scale, engine.scores(problem.policy, moved, problem.rollouts))


def other_directions(problem: Problem, count: int) -> list[Problem]:
    """Return the same problem along that many other random directions."""
    g = torch.Generator().manual_seed(4)
    return [_along(problem, _random(problem.params, g)) for _ in range(count)]


def coordinates(problem: Problem) -> list[Problem]:
    """Return the same problem along every single parameter in turn."""
    found = []
    for name, leaf in problem.params.items():
        for row in torch.eye(leaf.numel(), dtype=leaf.dtype):
            still = {other: torch.zeros_like(p) for other, p in problem.params.items()}
            found.append(_along(problem, still | {name: row.view_as(leaf)}))
    return found


def uneven(problem: Problem, rare: float = 1 / 6) -> Problem:
    """Return the same with prompts unlike one another: one in six is the one that the step moves most.

    The others are the half of all prompts that it moves least. Eight prompts miss that one in (5/6)⁸ = 23 % of
    samples, 32 in 0.3 %.
    """
    by_prompt = (len(problem.prompt), -1)

    def entropies(scores: TokenScores) -> Tensor:
        return (scores.logp.sum(1).exp() * scores.entropy.sum(1)).view(by_prompt).sum(1)

    _, moved = torch.func.jvp(entropies, (problem.along.scores,), (problem.along.tangents,))
    order = moved.abs().argsort()
    half = len(order) // 2
    prompt = torch.zeros_like(problem.prompt).index_fill(0, order[:half], (1 - rare) / half)
    return problem._replace(prompt=prompt.index_fill(0, order[-1:], rare))


def exact(problem: Problem, step: Step, observable: Observable) -> Tensor:
    """Return [2]: ΔF and δF₁ of an entropy per token or of the expected reward, by summing over everything."""

    def value(scores: TokenScores) -> Tensor:
        p, mask, rewards = _probability(problem, scores), problem.rollouts.completion_mask, problem.rollouts.rewards
        if observable.unit == "reward":
            return (p * rewards).sum()
        return (p * scores.entropy.sum(1)).sum() / (p * mask.sum(1)).sum()

    before, slope = torch.func.jvp(value, (problem.along.scores,), (problem.along.tangents,))
    return torch.stack([value(step.after) - before, step.scale * slope])


def sample(problem: Problem, prompts: int, each: int, g: torch.Generator) -> tuple[Rollouts, Tensor]:
    """Return rollouts of freshly drawn prompts, each draw a group of its own, and their rows in the enumeration."""
    drawn = torch.multinomial(problem.prompt, prompts, replacement=True, generator=g)
    uniform = torch.rand(prompts, each, dtype=torch.float64, generator=g)
    completions = torch.searchsorted(problem.cumulative[drawn], uniform)
    rows = (drawn.unsqueeze(1) * problem.cumulative.shape[1] + completions).flatten()
    kept = {name: None if field is None else field[rows] for name, field in problem.rollouts._asdict().items()}
    return Rollouts(**kept)._replace(group_ids=torch.arange(prompts).repeat_interleave(each)), rows


def quantities(
    problem: Problem, step: Step, observables: tuple[Observable, ...], rollouts: Rollouts, rows: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return base weights [N] -> (ΔF, δF₁) of every observable in turn, [2·observables]."""
    anchor, after = take(problem.along.scores, rows), take(step.after, rows)
    along = engine.Directional(anchor, take(problem.along.tangents, rows, step.scale))

    def f(a: Tensor) -> Tensor:
        weighed, found = rollouts._replace(weight=a), []
        for observable in observables:
            before, slope = engine.derivative(lambda s, o=observable: o(s, anchor, weighed), along)
            found += [observable(after, anchor, weighed) - before, slope]
        return torch.stack(found)

    return f


def slopes(
    problems: list[Problem], observable: Observable, rollouts: Rollouts, rows: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return base weights [N] -> δF₁ per unit of step along the direction of each problem, [problems]."""
    anchor = take(problems[0].along.scores, rows)
    each = [take(p.along.tangents, rows) for p in problems]
    stacked = TokenScores(torch.stack([t.logp for t in each]), torch.stack([t.entropy for t in each]))

    def f(a: Tensor) -> Tensor:
        weighed = rollouts._replace(weight=a)

        def slope(tangents: TokenScores) -> Tensor:
            return engine.derivative(lambda s: observable(s, anchor, weighed), engine.Directional(anchor, tangents))[1]

        return torch.vmap(slope)(stacked)

    return f


def _everything(longest: int) -> Rollouts:
    """Return every completion of every prompt; the reward is 1 where enough symbols are odd, "enough" by the prompt."""
    listed, open_ = [], [[]]
    while open_:
        prefix = open_.pop()
        for symbol in range(SYMBOLS):
            grown = [*prefix, symbol]
            (listed if symbol == END or len(grown) == longest else open_).append(grown)
    pairs = [(list(prompt), c) for prompt in itertools.product(range(SYMBOLS), repeat=PROMPT) for c in listed]
    rewards = [float(sum(symbol % 2 for symbol in c) > prompt[0]) for prompt, c in pairs]
    prompts, completions = zip(*pairs, strict=True)
    return fp.rollouts_from_lists(prompts, completions, temperature=1.0, rewards=rewards)


def _along(problem: Problem, v: Params) -> Problem:
    along = engine.directional(problem.policy, problem.params, v, problem.rollouts)
    return problem._replace(direction=v, along=along)


def _random(params: Params, g: torch.Generator) -> Params:
    return {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in params.items()}


def _probability(problem: Problem, scores: TokenScores) -> Tensor:
    """Return [M·C]: the exact probability of every prompt and completion under the given scores."""
    conditional = scores.logp.sum(1).exp().view(len(problem.prompt), -1)
    return (problem.prompt.unsqueeze(1) * conditional).flatten()


def take(scores: TokenScores, rows: Tensor, scale: float = 1.0) -> TokenScores:
    return TokenScores(scale * scores.logp[rows], scale * scores.entropy[rows])
