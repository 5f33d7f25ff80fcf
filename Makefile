# Two commands for a newcomer: `make quickstart` and `make test`. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
N ?= 200
SEED ?= 0
JOBS ?= 2
FRAMES ?= 500000

.PHONY: help install quickstart test check bench chaos clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(STAMP)  ## make .venv and install asyncrl into it

tiny_model/recipe.json: tools/make_tiny_model.py | $(STAMP)
	$(BIN)/python tools/make_tiny_model.py --out tiny_model

quickstart: tiny_model/recipe.json  ## make a tiny model and train it, seven processes on two cores
	$(BIN)/asyncrl launch --topology launchers/quickstart.toml

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest tests/unit tests/contracts tests/pipeline tests/faults tests/shape

check: $(STAMP)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: tiny_model/recipe.json  ## the benchmark tables of the README
	$(BIN)/python -m tools.bench

chaos: $(STAMP)  ## FRAMES=500000 broken messages, then N=200 cases of SEED=0 that kill, stop, lose and damage
	FUZZ_FRAMES=$(FRAMES) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q tests/unit/test_fuzz_codec.py \
		tests/contracts/test_fuzz_router.py
	$(BIN)/python -m tools.chaos --cases $(N) --seed $(SEED) --jobs $(JOBS)

clean:  ## remove .venv, the tiny model and runs
	rm -rf $(VENV) tiny_model runs
