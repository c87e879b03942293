"""Importance weights and the observables made of them, as functions of scores."""
