"""The stateful system's names, held to the pure core, to the stateful baseline, and to the faults of old."""
