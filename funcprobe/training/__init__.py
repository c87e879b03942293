"""Training as pure functions: advantages, objectives, optimizers and the step."""
