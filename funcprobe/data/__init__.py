"""Rollouts: build, validate, slice, read and write."""
