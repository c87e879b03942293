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
    analysis      one step or many, measured and predicted
    report        tables and figures
    cli           the command line
    compat        the stateful system's names, thin on top
    integrations  other trainers' batches and configurations, thin on top
"""

from funcprobe import errors, tree
from funcprobe.analysis.attribution import attribute, attribute_evaluation
from funcprobe.analysis.attribution_result import Attribution
from funcprobe.analysis.compare import Variant, compare
from funcprobe.analysis.comparison import Comparison
from funcprobe.analysis.expansion import SecondOrder, second_order
from funcprobe.analysis.largest_lr import LargestLr, largest_lr
from funcprobe.analysis.one_step import probe
from funcprobe.analysis.predictors import predict
from funcprobe.analysis.readings import Reading
from funcprobe.analysis.result import ProbeResult
from funcprobe.analysis.sweep import sweep
from funcprobe.analysis.sweep_result import SweepResult
from funcprobe.checkpoints.folder import Checkpoint, load_checkpoint
from funcprobe.checkpoints.live import from_training
from funcprobe.checkpoints.saving import save_checkpoint
from funcprobe.data.files import read_rollouts, write_rollouts
from funcprobe.data.rollouts import rollouts_from_lists, rollouts_from_padded
from funcprobe.engine import anchored
from funcprobe.estimators.custom import observable
from funcprobe.estimators.divergence import kl
from funcprobe.estimators.observables import entropy, entropy_family
from funcprobe.estimators.returns import expected_reward, mean_length
from funcprobe.policy.module import Policy, from_module
from funcprobe.policy.sampling import sample
from funcprobe.policy.scoring import score
from funcprobe.training.objectives import (
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
from funcprobe.training.optimizers import adam, adamw, from_torch, sgd
from funcprobe.training.step import make_step
from funcprobe.training.stored import stored
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
    "Variant",
    "__version__",
    "adam",
    "adamw",
    "anchored",
    "attribute",
    "attribute_evaluation",
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
    "stored",
    "sweep",
    "top_entropy_quantile",
    "tree",
    "write_rollouts",
]
