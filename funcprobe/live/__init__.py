"""The ledger of a run in progress: every window's change of entropy, measured on rollouts that are there anyway."""
