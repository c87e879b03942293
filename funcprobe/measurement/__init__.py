"""Measurements of one update: how far observables move, measured and predicted, and how far to trust either."""
