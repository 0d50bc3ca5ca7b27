# Everything runs from .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=
# Where it is set, each of a dozen processes would compile torch and Ray anew: they would start half as fast.
unexport PYTHONDONTWRITEBYTECODE
# Test processes that take whole files, as tests of a file share servers, in the order that tests/conftest.py gives.
WHOLE_FILES := --dist loadfile --no-loadscope-reorder
SIDE_BY_SIDE := -n 2 $(WHOLE_FILES)

# ttnn has wheels for Python 3.10 and 3.12 only, and wants older libraries: it gets an environment of its own.
TTNN_VENV := .venv-ttnn
TTNN_INSTALLED := $(TTNN_VENV)/installed
TTNN_PYTHON ?= $(shell .ci/ttnn-python)

.DEFAULT_GOAL := help
.PHONY: help install install-ttnn serve demo test test-slow test-all test-ttnn lint audit format options-doc bench chaos sample clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Make .venv with everything in it

# Not compiled ahead: most of what is installed is never imported, and Python compiles what is.
PIP_INSTALL = pip install --quiet --disable-pip-version-check --no-compile
# In a third of pip's time. It does not read pip's configuration, so where it finds no packages pip has to.
UV_INSTALL = uv pip install --quiet --python

# torch by pip alone, which finds a build for the processor where pip's configuration names one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -c constraints.txt torch uv
	$(BIN)/$(UV_INSTALL) $(BIN)/python -c constraints.txt --editable '.[dev]' || \
		$(BIN)/$(PIP_INSTALL) -c constraints.txt --editable '.[dev]'
	touch $@

serve: $(INSTALLED) ## Serve the sample model over two stages; ARGS="--port 8001" passes options on
	$(BIN)/galaxyline serve $(ARGS)

demo: $(INSTALLED) ## Complete a prompt: make demo ARGS='"San Francisco is a"'
	$(BIN)/galaxyline demo $(ARGS)

test: $(INSTALLED) ## The quick tests
	$(BIN)/pytest $(SIDE_BY_SIDE)

test-slow: $(INSTALLED) ## The tests that take longer
	$(BIN)/pytest -m slow $(SIDE_BY_SIDE)

test-all: $(INSTALLED) ## All tests
	$(BIN)/pytest -m "" $(SIDE_BY_SIDE)

ifeq ($(TTNN_PYTHON),)
install-ttnn test-ttnn:
	@echo "SKIPPED: ttnn needs Python 3.12 or 3.10; install one, or name it as TTNN_PYTHON=..." >&2
else
install-ttnn: $(TTNN_INSTALLED) ## Make .venv-ttnn, with ttnn: 7 GB

test-ttnn: $(TTNN_INSTALLED) ## The modules on the real ttnn package with mock Galaxies
	$(TTNN_VENV)/bin/pytest -m "" tests/galaxy
endif

$(TTNN_INSTALLED): pyproject.toml constraints-ttnn.txt
	$(TTNN_PYTHON) -m venv $(TTNN_VENV)
	$(TTNN_VENV)/bin/$(PIP_INSTALL) -c constraints-ttnn.txt uv
	$(TTNN_VENV)/bin/$(UV_INSTALL) $(TTNN_VENV)/bin/python -c constraints-ttnn.txt --editable '.[galaxy,galaxy-test]' || \
		$(TTNN_VENV)/bin/$(PIP_INSTALL) -c constraints-ttnn.txt --editable '.[galaxy,galaxy-test]'
	touch $@

lint: $(INSTALLED) ## ruff, mypy --strict, the import contracts and the worst of docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	.ci/check_sentences

audit: $(INSTALLED) ## bandit, and known vulnerabilities of the libraries, for which it asks api.osv.dev
	.ci/audit $(BIN)

format: $(INSTALLED) ## Let ruff format the code and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

options-doc: $(INSTALLED) ## Write docs/options.md from the options' definitions
	$(BIN)/python -m api.cli.document

bench: $(INSTALLED) ## Hops, overhead, tokens a second, traces, loading and scaling; ARGS=--short only shows that it runs
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(INSTALLED) ## Ten minutes of faults under load; ARGS="--minutes 3 --seed 2" and others are passed on
	$(BIN)/python -m benchmarks.chaos $(ARGS)

sample: $(INSTALLED) ## Train the sample model again, from seed 0, into generated/sample
	OMP_WAIT_POLICY=passive $(BIN)/python -m weights.sample.train --seed 0 --out generated/sample

clean: ## Remove what was generated, .venv included
	rm -rf $(VENV) $(TTNN_VENV) generated build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
