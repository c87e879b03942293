"""Inputs that mean harm, or look as if they did, and what must be said of each: see catalogue.py and judge.py."""
