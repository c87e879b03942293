"""The names of the stateful system, thin on the pure core: nothing is stepped, so nothing is snapshotted or restored.

    DeltaEntropyIS         entropy_change_two_batch: one step on U, the entropy measured on E before and after it
    ProbeComponents        compute_delta_h1_from_batches: the first order along a buffer Δθ, keyed by name or by id
    OfflineEntropyProbe    run_mixed_probe: both, from a YAML file, a checkpoint and a dataset
    buffers                names <-> ids, through DDP and PEFT prefixes

Modules and optimizers that are passed in are read and left as they are, bit for bit. Entropies are in nats per
sequence, under sequence weights; the keys that end in `_tok` are in nats per token. A key of a configuration that can
do nothing is an error.
"""

from funcprobe.compat import buffers
from funcprobe.compat.components import ProbeComponents
from funcprobe.compat.entropy_is import DeltaEntropyIS
from funcprobe.compat.offline import OfflineEntropyProbe

__all__ = ["DeltaEntropyIS", "OfflineEntropyProbe", "ProbeComponents", "buffers"]
