"""The command line as a module: `python -m funcprobe`, or `torchrun --nproc-per-node 2 -m funcprobe`."""

from funcprobe.cli.main import process

if __name__ == "__main__":
    process()
