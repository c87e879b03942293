# The targets are the manual. Two of them do everything on a machine with Python and nothing else:
#   make demo   the main job on the embedded default        make test   the whole suite
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
SPHINX := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees
TRITON := 3.7.1
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal
# what depends on a processor's arithmetic, and a smaller part in which most of that is float32
NUMERIC := $(addprefix tests/,analysis attribution benchmarks/test_stateful.py cli/test_demo.py compat engine estimators laws \
	measurement objectives optimizers policy results training) $(wildcard tests/test_*.py)
ROUNDED := $(addprefix tests/,analysis/test_attribute_edges.py benchmarks/test_stateful.py cli/test_demo.py compat \
	laws/test_updates.py measurement/test_second_order.py policy training/test_step.py)

.PHONY: help demo test coverage families kernels threads browser triton trackers soak check format bench notebooks docs links packages clean

help:            ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)   ## make a small policy, its rollouts and its optimizer state, and run the main job on them
	$(BIN)/funcprobe demo

test: $(STAMP)   ## the whole suite, doctests included
	$(PYTEST) --durations=10

coverage: $(STAMP) ## the same, with the lines and branches that no test reaches
	$(PYTEST) --cov --cov-report=term

kernels: $(STAMP) ## the numeric part with the arithmetic of an old processor and, where there is more, of AVX2
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) $(NUMERIC)
	! grep -qw avx512f /proc/cpuinfo || \
	    ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(ROUNDED)

threads: $(STAMP) ## a smaller part of it with two threads
	OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 $(PYTEST) $(ROUNDED)

families: $(STAMP) ## many architectures and adapters, asked the same (docs/families.md)
	$(PYTEST) -m "families or not families" tests/families

browser: $(STAMP) ## the token heat map in a real browser; needs chromium, chromium-driver and poppler-utils
	$(BIN)/python -m pytest -q -m browser

.triton/triton-$(TRITON).dist-info: $(STAMP)
	rm -rf .triton
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target .triton triton==$(TRITON)

triton: .triton/triton-$(TRITON).dist-info ## the kernels of a GPU by Triton's interpreter; Triton is put aside, in .triton
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(PYTEST) -m triton tests/engine

trackers: $(STAMP) ## a ledger in four real trackers, in an environment of their own
	test -x .venv-trackers/bin/python || $(PYTHON) -m venv .venv-trackers
	PIP_CONSTRAINT=constraints.txt .venv-trackers/bin/python -m pip install -q -e '.[dev,trackers]'
	.venv-trackers/bin/python -m pytest -q -m trackers tests/integrations

soak: $(STAMP)   ## a hundred kills at random moments, long and many rows, the same bits again; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

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

docs: $(STAMP)   ## the site in docs/_build/html: API, commands, notebooks, a demo run; a warning is an error
	$(SPHINX) -b html docs docs/_build/html

links: $(STAMP)  ## every link of the site, those to other sites over the network
	$(SPHINX) -b linkcheck docs docs/_build/links

packages: $(STAMP) ## wheel and sdist in fresh environments: core, each extra, other Pythons, torches; minutes, gigabytes
	$(BIN)/python .ci/packages.py

clean:           ## remove the environment and the caches
	rm -rf .venv .venv-trackers .triton .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage docs/_build docs/_generated
