"""How far one RL update moves a policy's entropy, measured and predicted from the same pure step.

    after = step(params, opt_state, U).params            # one pure optimizer step on U
    delta = fp.tree.sub(after, params)                   # the step as a tree, no snapshot, no restore
    H = fp.anchored(fp.entropy(), policy, E, params)     # params -> SNIS entropy on E, sampled at `params`
    fp.tree.dot(torch.func.grad(H)(params), delta)       # first order
    H(after) - H(params)                                 # measured

Layers, each importing only from those above it in this table and from `types`, `tree`, `errors`:

    layer         what lives there
    data          rollouts: build, validate, slice, read and write
    objectives    advantages and losses, as functions of scores
    policy        nn.Module -> (policy, params); scores of a batch; sampling
    optimizers    pure optimizers, their groups and their states
    engine        values, gradients and directional derivatives of any function of scores
    estimators    importance weights and the observables made of them
    training      the pure step, and what it answers to a change of its gradient
    measurement   one update on held-out rollouts: first and second order, measured change, error bars
    checkpoints   Hugging Face folders, adapters, optimizer states, live training loops
    attribution   what parameters, prompts and tokens contribute
    results       what a verb returns: to be read, printed, saved and loaded
    analysis      the verbs, one a file
    report        tables, figures and pages
    cli           the command line
    compat        the stateful system's names, thin on top
    integrations  other trainers' batches and configurations, thin on top
"""

from funcprobe import errors, tree
from funcprobe.analysis.attribute import attribute, attribute_evaluation
from funcprobe.analysis.compare import compare
from funcprobe.analysis.largest_lr import LargestLr, largest_lr
from funcprobe.analysis.predict import predict
from funcprobe.analysis.probe import probe
from funcprobe.analysis.second_order import SecondOrder, second_order
from funcprobe.analysis.slope import slope
from funcprobe.analysis.sweep import sweep
from funcprobe.checkpoints.between import between
from funcprobe.checkpoints.checkpoint import Checkpoint
from funcprobe.checkpoints.folder import load_checkpoint
from funcprobe.checkpoints.live import from_training
from funcprobe.checkpoints.saving import save_checkpoint
from funcprobe.data.files import read_rollouts, write_rollouts
from funcprobe.data.rollouts import rollouts_from_lists, rollouts_from_padded
from funcprobe.engine import anchored
from funcprobe.estimators.custom import observable
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import entropy, entropy_family
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.measurement.readings import Reading
from funcprobe.measurement.update import Update
from funcprobe.objectives.by_name import (
    bnpo,
    cispo,
    clip_cov,
    dapo,
    dr_grpo,
    drop_negatives,
    entropy_bonus,
    grpo,
    gspo,
    kl_cov,
    reinforce,
    rloo,
    top_entropy_quantile,
)
from funcprobe.optimizers.factories import adam, adamw, from_torch, sgd
from funcprobe.optimizers.stored import stored
from funcprobe.policy.module import Policy, from_module
from funcprobe.policy.sampling import sample
from funcprobe.policy.scoring import score
from funcprobe.results.attribution import Attribution
from funcprobe.results.comparison import Comparison
from funcprobe.results.loading import load
from funcprobe.results.probe import ProbeResult
from funcprobe.results.sweep import SweepResult
from funcprobe.training.step import make_step
from funcprobe.types import Estimate, Rollouts, StepResult, TokenBudget, TokenScores

__version__ = "0.1.0"
__all__ = [
    "Attribution",
    "Checkpoint",
    "Comparison",
    "Estimate",
    "LargestLr",
    "Policy",
    "ProbeResult",
    "Reading",
    "Rollouts",
    "SecondOrder",
    "StepResult",
    "SweepResult",
    "TokenBudget",
    "TokenScores",
    "Update",
    "__version__",
    "adam",
    "adamw",
    "anchored",
    "attribute",
    "attribute_evaluation",
    "between",
    "bnpo",
    "cispo",
    "clip_cov",
    "compare",
    "dapo",
    "dr_grpo",
    "drop_negatives",
    "entropy",
    "entropy_bonus",
    "entropy_family",
    "errors",
    "expected_reward",
    "from_module",
    "from_torch",
    "from_training",
    "grpo",
    "gspo",
    "kl",
    "kl_cov",
    "largest_lr",
    "load",
    "load_checkpoint",
    "make_step",
    "mean_length",
    "observable",
    "predict",
    "probe",
    "read_rollouts",
    "reinforce",
    "rloo",
    "rollouts_from_lists",
    "rollouts_from_padded",
    "sample",
    "save_checkpoint",
    "score",
    "second_order",
    "sgd",
    "slope",
    "stored",
    "sweep",
    "top_entropy_quantile",
    "tree",
    "write_rollouts",
]
