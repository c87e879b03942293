"""How far one RL update moves a policy's entropy, measured and predicted from the same pure step.

    after = step(params, opt_state, U).params            # one pure optimizer step on U
    delta = fp.tree.sub(after, params)                   # the step as a tree, no snapshot, no restore
    H = fp.anchored(fp.entropy(), policy, E, params)     # params -> SNIS entropy on E, sampled at `params`
    fp.tree.dot(torch.func.grad(H)(params), delta)       # first order
    H(after) - H(params)                                 # measured

Layers, each importing only from those above it in this table and from `types`, `tree`, `errors`:

    layer         what lives there
    data          rollouts: build, validate, slice, read and write
    policy        nn.Module -> (policy, params); scores of a batch; sampling
    engine        values, gradients and directional derivatives of any function of scores
    estimators    importance weights and the observables made of them
    training      objectives, optimizers, the pure step
    checkpoints   Hugging Face folders, adapters, optimizer states, live training loops
    analysis      one step, measured and predicted
    report        tables and figures
    cli           the command line
"""

from funcprobe import errors, tree

__version__ = "0.1.0"
__all__ = ["__version__", "errors", "tree"]
