"""One step, measured and predicted, and the result it leaves."""
