"""TRL's GRPOTrainer and RLOOTrainer: a step's batch as rollouts, and the configuration's loss as an objective.

Everything comes from public things, which a subclass and a callback see: `compute_loss(model, inputs)` gets the
micro-batches of a step, and `on_pre_optimizer_step` the model and the optimizer just before it is taken.

    ledger = LedgerCallback("runs/ledger")               # every step's share of the change of entropy; see `Ledger`
    ledger.watch(trainer)

or one update by hand:

    class Watched(trl.GRPOTrainer):
        seen = []                                       # the micro-batches of one step

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen.append(dict(inputs))              # emptied by the callback, after every step
            return super().compute_loss(model, inputs, *args, **kwargs)

    # in on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs)
    U = rollouts_from_trl(trainer.seen, temperature=args.temperature)
    objective = objective_from_config(args, trainer.seen)
    update = fp.from_training(model, optimizer).update(objective, U, max_grad_norm=args.max_grad_norm or None)
    fp.probe(update, E)

trl itself is not imported: inputs are mappings of tensors, and a configuration is any object with its fields.
"""

from funcprobe.integrations.trl_batches import evaluation_from_trl, rollouts_from_trl
from funcprobe.integrations.trl_ledger import LedgerCallback
from funcprobe.integrations.trl_objectives import objective_from_config

__all__ = ["LedgerCallback", "evaluation_from_trl", "objective_from_config", "rollouts_from_trl"]
