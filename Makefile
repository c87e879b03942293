# The targets are the manual. Two of them do everything on a machine with Python and nothing else:
#   make demo   the main job on the embedded default        make test   the whole suite
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

.PHONY: help demo test families browser check format bench notebooks clean

help:            ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)   ## make a small policy, its rollouts and its optimizer state, and run the main job on them
	$(BIN)/funcprobe demo

test: $(STAMP)   ## the whole suite, doctests and coverage included
	$(BIN)/python -m pytest -q --cov --cov-report=term --durations=10

families: $(STAMP) ## many architectures and adapters, asked the same (docs/families.md)
	$(BIN)/python -m pytest -q -n auto -m "families or not families" tests/families

browser: $(STAMP) ## the token heat map in a real browser; needs chromium, chromium-driver and poppler-utils
	$(BIN)/python -m pytest -q -m browser

check: $(STAMP)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## apply the formatter and the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## every benchmark in turn; BENCH=--quick only shows that they run
	$(BIN)/python benchmarks/all.py $(BENCH)

notebooks: $(STAMP) ## execute every notebook in place of its stored outputs
	$(BIN)/python notebooks/execute.py

clean:           ## remove the environment and the caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
