"""The command line: configuration, run, sample, demo."""
