"""Long and rough use, outside of the suite: `make soak`, or python -m tests.soak --kills 20 for a part of it."""
