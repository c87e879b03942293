"""Other people's trainers in funcprobe's terms: their batches as rollouts, their configurations as objectives."""
