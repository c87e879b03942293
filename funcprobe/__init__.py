"""How far one RL update moves a policy's entropy, measured and predicted from the same pure step.

    after = step(params, opt_state, U).params            # one pure optimizer step on U
    delta = fp.tree.sub(after, params)                   # the step as a tree, no snapshot, no restore
    H = fp.anchored(fp.entropy(), policy, E, params)     # params -> SNIS entropy on E, sampled at `params`
    fp.tree.dot(torch.func.grad(H)(params), delta)       # first order
    H(after) - H(params)                                 # measured

Public names are listed in `__init__.pyi` and imported on first use: `import funcprobe` alone imports no torch.

Layers, each importing only from those above it in this table and from `types`, `tree`, `errors`, `plugins`,
`visible_text`, `arguments`:

    layer         contents
    data          rollouts: build, validate, slice, read and write
    objectives    advantages and losses, as functions of scores
    policy        nn.Module -> (policy, params); scores of a batch; sampling
    optimizers    pure optimizers, their groups and their states
    parallel      one process or many: rows and leaves shared out, scores gathered, errors agreed on
    engine        values, gradients and directional derivatives of any function of scores
    estimators    importance weights and the observables made of them
    training      the pure step, and its response to a change of its gradient
    measurement   the Update, and its effect on held-out rollouts: first order, measured change, error bars
    checkpoints   Hugging Face folders, adapters, optimizer states, live training loops
    attribution   contributions of parameters, prompts and tokens to δF₁
    results       the results of the verbs: to be read, printed, saved and loaded
    analysis      the verbs (probe, sweep, compare, attribute, ...), one a file
    live          the ledger of a run in progress
    report        tables, figures and pages
    cli           the command line
    compat        the stateful system's names, thin on top
    integrations  other trainers' batches and configurations, thin on top
"""

from __future__ import annotations

import importlib
import os
import re

__version__ = "0.1.0"

with open(os.path.join(os.path.dirname(__file__), "__init__.pyi"), encoding="utf-8") as _stub:
    #: Public name -> the module that it comes from: the lines of the stub, which is what type checkers read.
    _MODULE_OF = {
        name: module for module, name in re.findall(r"^from ([\w.]+) import (\w+) as \2$", _stub.read(), re.MULTILINE)
    }

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use.

    Raises:
        AttributeError: If there is no such name.
    """
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'funcprobe' has no attribute '{name}'")
    # `from funcprobe import tree as tree` names a module, any other line a thing in one
    found = importlib.import_module(f"{module}.{name}") if module == __name__ else importlib.import_module(module)
    globals()[name] = found if module == __name__ else getattr(found, name)
    return globals()[name]


def __dir__() -> list[str]:
    """Return the public names and the modules that are loaded."""
    return sorted({*globals(), *__all__})
