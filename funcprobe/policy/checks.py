"""A check, on a few tokens, that the copy of somebody's module computes the same as the module, when it is made.

1. its logits are the module's own, in the module's own precision; 2. it reacts to every leaf that the module reacts to;
3. it writes nothing; 4. a row does not depend on the rows beside it; 5. decoding agrees with scoring; 6. two passes
agree; 7. the tangent is the derivative (held by `engine.tangent` when the first one is taken); 8. what training adds is
named. What fails is refused, mended with a word, or run in a way that passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe.errors import FuncprobeError
from funcprobe.policy.running import Seen, Watch
from funcprobe.policy.split import Decode, Features, Parts
from funcprobe.policy.training_only import TrainingTerm
from funcprobe.types import Params

#: How far two ways of computing one logit may be apart, in units of eps · (1 + the largest logit). A misplaced scale,
#: cap or position is off by far more; kernels that sum in another order by about the root of the hidden size.
ROUNDING_UNITS = 32.0

#: And never asked to be closer than this: parts of a float64 transformers model are float32 inside.
COARSEST_FLOAT32 = 1e-5

#: Entries of a leaf up to which its gradient is made to see whether it is finite.
SMALL = 2**20


class Finding(NamedTuple):
    """Something about a copy that a reader of its numbers should know."""

    kind: str  #: "forward", "autocast", "state", "rows", "head", "decoding", "unreached", "tangent" or "training"
    text: str  #: one sentence
    warns: bool = False  #: whether the numbers may not be those of the run


@dataclass
class Checks:
    """The proofs of a module's copy, check by check."""

    module: str  #: the class of the module
    results: dict[str, str] = field(default_factory=dict)  #: check -> outcome, a few words
    findings: list[Finding] = field(default_factory=list)
    training: tuple[TrainingTerm, ...] = ()  #: what training adds, and a step on the copy does not have
    tangents: dict[str, bool] = field(default_factory=dict)  #: mode -> whether its derivative was held, and is right
    detaches: bool = False  #: whether the module detaches anything
    undetached: bool = False  #: whether the derivative of what is computed goes through what the module detaches

    def found(self, kind: str, text: str, *, warns: bool = False) -> None:
        """Add a finding, once."""
        finding = Finding(kind, text, warns)
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def notes(self) -> tuple[str, ...]:
        """The decisions that were made about the copy, as notes."""
        return tuple(f.text for f in self.findings if not f.warns)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The reasons why the numbers may differ from the run's, as warnings."""
        return tuple(f.text for f in self.findings if f.warns)

    def __str__(self) -> str:
        """Return a line a check, and a line a finding."""
        width = max(map(len, self.results), default=0)
        rows = [f"  {name:<{width}}  {outcome}" for name, outcome in self.results.items()]
        return "\n".join([f"copy of {self.module}", *rows, *(f"  {f.text}" for f in self.findings)])


class Rejected(FuncprobeError):
    """A way to run the copy that disagrees with the module."""


class Trial(NamedTuple):
    """The rows that a copy is tried on, and the module's own outputs on them."""

    rows: tuple[Tensor, ...]  #: [L] of ids each, the shortest first
    seen: Seen

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """The rows as one batch: (ids [B, L], mask [B, L]), right-padded."""
        width = max(len(row) for row in self.rows)
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in self.rows])
        return ids, torch.arange(width, device=ids.device) < torch.tensor([[len(r)] for r in self.rows]).to(ids.device)

    @property
    def largest(self) -> float:
        """The largest finite logit, absolutely."""
        return max(float(torch.nan_to_num(z.detach(), 0.0, 0.0, 0.0).abs().max()) for z in self.seen.logits)

    @property
    def tolerance(self) -> float:
        """The distance up to which two logits are one."""
        return max(COARSEST_FLOAT32, ROUNDING_UNITS * self.seen.watch.eps) * (1 + self.largest)

    def gap(self, logits: Sequence[Tensor]) -> float:
        """Return the largest distance to the module's logits; beyond every tolerance where one alone is finite."""
        return max(gap(a, b) for a, b in zip(logits, self.seen.logits, strict=True))


def prove(parts: Parts, params: Params, trial: Trial, checks: Checks) -> Parts:
    """Return the parts as they are, or with every row run alone, whichever agrees first; `checks` notes the proof.

    Raises:
        Rejected: If there is none.
        torch.OutOfMemoryError: As it came.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries say of two tokens is not about the user's own
            return _proved(parts, params, trial, checks)
    except (Rejected, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a head without its backbone runs into
        raise Rejected(f"{type(error).__name__}: {error}") from error


def decoding(decode: Decode, parts: Parts, params: Params, trial: Trial) -> float:
    """Return how far the logits after a cached step on a left-padded batch are from the module's; nan where it fails.

    Raises:
        torch.OutOfMemoryError: As it came.
    """
    rows = [row[:-1] for row in trial.rows]
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, (n, 0)) for row, n in zip(rows, pad, strict=True)])
    mask = torch.arange(width, device=ids.device) >= torch.tensor(pad, device=ids.device).unsqueeze(1)
    last = torch.stack([row[-1:] for row in trial.rows])
    try:
        with torch.no_grad():
            _, cache = decode(params, ids, mask, None)
            hidden, _ = decode(params, last, torch.nn.functional.pad(mask, (0, 1), value=True), cache)
            found = parts.readout(params, hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a cache of its own kind, or none
        return float("nan")
    return max(gap(z, own[-1]) for z, own in zip(found, trial.seen.logits, strict=True))


def alone(features: Features) -> Features:
    """Return features that run every row by itself, without padding: [B, L, D], 0 where a row is padded."""

    def by_row(params: Params, ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        found = [features(params, ids[k : k + 1, :n], mask[k : k + 1, :n])[0] for k, n in enumerate(lengths)]
        width = ids.shape[1]
        return torch.stack([torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[0])) for x in found])

    return by_row


def _proved(parts: Parts, params: Params, trial: Trial, checks: Checks) -> Parts:
    apart, unreached, finite = _compared(parts, params, trial)
    if not (apart <= trial.tolerance and finite):
        by_row = parts._replace(features=alone(parts.features), body=None)
        own_gap, own_unreached, own_finite = _compared(by_row, params, trial)
        if not own_gap <= trial.tolerance:
            raise Rejected(f"its logits are off by {own_gap:.1e}")
        if not (apart <= trial.tolerance) or own_finite:
            _tell_rows(checks, apart if apart > trial.tolerance else None)
            parts, apart, unreached = by_row, own_gap, own_unreached
    ids, mask = trial.padded
    with torch.no_grad():
        again = [z[: len(r)] for z, r in zip(_logits(parts, params, ids, mask), trial.rows, strict=True)]
    if not trial.gap(again) <= trial.tolerance:
        raise Rejected("two passes over the same rows differ: it draws random numbers in eval mode")
    missed = sorted(unreached & _reached(trial.seen.logits, trial.seen.leaves)) if unreached else []
    if missed:
        raise Rejected(f"it does not react to '{missed[0]}', as the module itself does")
    checks.results["logits are the module's own"] = f"to {apart:.1e} (at most {trial.tolerance:.1e})"
    checks.results["two passes agree"] = "yes"
    checks.results["leaves without effect on the trial rows"] = str(len(unreached)) if unreached else "none"
    return parts


def _compared(parts: Parts, params: Params, trial: Trial) -> tuple[float, frozenset[str], bool]:
    """Return (distance of the logits, leaves that they do not depend on, whether the gradient is finite).

    Raises:
        Rejected: If the copy computes in another precision.
    """
    ids, mask = trial.padded
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), Watch() as watch:
        together = _logits(parts, leaves, ids, mask)
    logits = [z[: len(row)] for z, row in zip(together, trial.rows, strict=True)]
    if watch.eps != trial.seen.watch.eps:
        raise Rejected(f"it computes in another precision (eps {watch.eps:.1e}, not {trial.seen.watch.eps:.1e})")
    unreached = frozenset(params) - _reached(logits, leaves)
    return trial.gap(logits), unreached, _is_finite(logits, [leaves[n] for n in params if n not in unreached])


def _reached(logits: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the leaves at which the graph of some logits ends."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    found, seen, todo = set(), set(), [z.grad_fn for z in logits]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None and id(leaf) in names:
            found.add(names[id(leaf)])
        todo += [before for before, _ in node.next_functions]
    return frozenset(found)


def _is_finite(logits: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Return whether the pullback of the finite logits' sum of squares is finite.

    It is pulled back to the first leaf, which stands before all others, and to small ones: what is not finite on the
    way shows there, and gradients of large matrices are never made. No number of a result is made of it.

    Raises:
        torch.OutOfMemoryError: As it came.
    """
    chosen = [leaf for k, leaf in enumerate(leaves) if k == 0 or leaf.numel() <= SMALL]
    total = sum((torch.where(torch.isfinite(z), z, 0.0).double().square().sum() for z in logits), torch.zeros(()))
    if not chosen or not total.requires_grad:
        return True
    try:
        found = torch.autograd.grad(total, chosen, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # said, in a sentence, where a gradient is asked for
        return True
    return all(bool(torch.isfinite(_values(g).sum())) for g in found if g is not None)


def _tell_rows(checks: Checks, apart: float | None) -> None:
    how = f"its logits differ by {apart:.1e}" if apart is not None else "its gradient is not finite"
    checks.results["a row alone and beside a longer one"] = "differ: rows are run alone"
    checks.found(
        "rows",
        f"A row of {checks.module} depends on the rows beside it ({how} beside a longer one), so every row is run "
        "alone, without padding; a training loop that pads its batches computes something else.",
        warns=True,
    )


def _logits(parts: Parts, params: Params, ids: Tensor, mask: Tensor) -> list[Tensor]:
    hidden = parts.features(params, ids.masked_fill(~mask, 0), mask)
    return list(parts.readout(params, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))


def gap(a: Tensor, b: Tensor) -> float:
    """Return the largest distance of two arrays of logits; beyond every tolerance where one alone is finite."""
    if a.shape != b.shape:
        return torch.inf
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs().nan_to_num(torch.inf)).max())


def _values(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.coalesce().values()
