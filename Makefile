# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# Two processes, each with whole files: most of the time goes into compiling, on one core.
PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: help demo test test-slow test-oldest lint bench notebooks docs dist clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(BIN)/python -m pip install -q -e '.[fasta,optimal,notebooks,ray]' --group dev --group docs
	@touch $@

demo: $(VENV)/.package ## Pack, feed and train on real text, in under two minutes
	$(BIN)/seqpack-jax demo

test: $(VENV)/.dev ## The test suite, doctests and README included
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.dev ## What starts processes and notebooks
	$(BIN)/python -m pytest -q -m slow

# The lower bounds of pyproject.toml, exactly; newer pyparsing warns matplotlib 3.9.
$(OLDEST)/.floors: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python .ci/floors.py > $(OLDEST)/floors.txt
	$(OLDEST)/bin/python -m pip install -q -r $(OLDEST)/floors.txt 'pytest>=8.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100' 'pyparsing<3.2'
	$(OLDEST)/bin/python -m pip install -q --no-deps -e .
	@touch $@

test-oldest: $(OLDEST)/.floors ## The suite on the oldest versions that are allowed
	$(OLDEST)/bin/python $(PYTEST) tests --ignore tests/test_notebooks.py \
	  --ignore tests/test_tokamax.py --ignore tests/test_tokamax_dispatch.py

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## Every figure of the README; rewrites benchmarks/RESULTS.md
	$(BIN)/python -m pip install -q --group bench
	$(BIN)/python -m pip install -q --no-deps seqpack==1.0.0
	$(BIN)/python benchmarks/run_all.py

notebooks: $(VENV)/.dev ## Run the notebooks and keep their outputs
	$(BIN)/python notebooks/run.py

docs: $(VENV)/.dev ## The site of guides, reference and notebooks, in build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees -c docs . build/docs

dist: $(VENV)/.dev ## Build wheel and sdist, check them, run the README's first block
	rm -rf dist
	$(BIN)/python -m pip install -q --group dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist $(VENV)-dist

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-dist $(OLDEST) build dist
