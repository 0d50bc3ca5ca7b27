# Everything runs from .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve demo test test-slow test-all lint format bench sample clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Make .venv with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

serve: $(INSTALLED) ## Serve the sample model over two stages; ARGS="--port 8001" passes options on
	$(BIN)/galaxyline serve $(ARGS)

demo: $(INSTALLED) ## Complete a prompt: make demo ARGS='"San Francisco is a"'
	$(BIN)/galaxyline demo $(ARGS)

test: $(INSTALLED) ## The quick tests
	$(BIN)/pytest

test-slow: $(INSTALLED) ## The tests that take longer
	$(BIN)/pytest -m slow

test-all: $(INSTALLED) ## All tests
	$(BIN)/pytest -m ""

lint: $(INSTALLED) ## ruff, mypy --strict and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Let ruff format the code and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## Hops, overhead and tokens a second, beside others; ARGS=--short only shows that it runs
	$(BIN)/python -m benchmarks $(ARGS)

sample: $(INSTALLED) ## Train the sample model again, from seed 0, into generated/sample
	OMP_WAIT_POLICY=passive $(BIN)/python -m weights.sample.train --seed 0 --out generated/sample

clean: ## Remove what was generated, .venv included
	rm -rf $(VENV) generated build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
