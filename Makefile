# `make help` lists the targets. PYTHON picks the interpreter, VENV the folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLAN := $(abspath $(VENV)/plan)
# Processes pytest runs in.
JOBS ?= 2
# Exactly this spelling: with another, pip may take a build for GPUs.
# `make setup TORCH=` leaves it out; the parity tests then skip.
TORCH ?= torch==2.13.0
# For the same tests; they need nothing more that the lock does not hold.
PEFT ?= peft==0.21.2 accelerate==1.15.0

# jax and flax differ between Python 3.11 and later, so there are two locks.
LOCK = requirements/lock-$(shell $(PYTHON) -c 'import sys; \
  print("py311" if sys.version_info < (3, 12) else "py312")').txt

# Some containers have no HOME; pip, transformers and others want one.
ifndef HOME
export HOME := $(CURDIR)/.cache/home
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart study plans test quick unit lint format types hooks lock clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-project $(VENV)/.stamp-torch $(VENV)/.stamp-plan ## Make .venv from the lock.

quickstart: $(VENV)/.stamp-project ## Distil a small model, in minutes on a CPU.
	rm -rf runs/quickstart
	$(BIN)/opd-jax train --config=configs/quickstart.py \
	  --workdir=runs/quickstart

study: $(VENV)/.stamp-project ## Compare all objectives: hours on a CPU.
	$(BIN)/python -m benchmarks.objectives --work=runs/study
	$(BIN)/python -m docs.generate

plans: setup ## Plan every config of a pod anew: hours on a CPU.
	PYTHONPATH=$(PLAN) $(BIN)/python -m benchmarks.plan --again
	$(BIN)/python -m docs.generate

$(VENV)/.stamp-lock: requirements/lock-py311.txt requirements/lock-py312.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) \
	  and "opd-jax needs Python 3.11 or later: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r $(LOCK)
	touch $@

$(VENV)/.stamp-project: $(VENV)/.stamp-lock pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Where pip would take the build for GPUs, gigabytes of it, nothing is taken.
$(VENV)/.stamp-torch: $(VENV)/.stamp-lock requirements/install_torch.sh
	@requirements/install_torch.sh $(BIN)/pip '$(TORCH)' $(PEFT)
	@touch $@

# The TPU compiler, for `opd-jax plan`. Beside the other packages: among them jax
# would look for a TPU each time it starts, and say that there is none.
$(VENV)/.stamp-plan: $(VENV)/.stamp-lock requirements/plan.txt
	rm -rf $(PLAN)
	$(BIN)/pip install --quiet --no-deps --require-hashes --target $(PLAN) \
	  -r requirements/plan.txt
	touch $@

test: lint types unit ## Everything CI runs.

unit: setup ## Run the tests. ARGS= goes to pytest.
	PYTHONPATH=$(PLAN) $(BIN)/pytest -n $(JOBS) --dist loadfile --durations=10 \
	  $(ARGS)

quick: setup ## Run the tests that are not marked slow.
	PYTHONPATH=$(PLAN) $(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow' \
	  $(ARGS)

lint: setup ## Check style and formatting.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: setup ## Format, and mend what ruff can mend.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: setup ## Check the types of opd_jax/.
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

hooks: setup ## Run the checks at every git commit.
	$(BIN)/pre-commit install

UV_COMPILE = UV_PYTHON_DOWNLOADS=never UV_CUSTOM_COMPILE_COMMAND='make lock' \
  $(BIN)/uv pip compile --generate-hashes --upgrade \
  --quiet --no-emit-index-url --no-emit-find-links
UV_PROJECT = $(UV_COMPILE) pyproject.toml --extra dev

lock: setup ## Renew both locks, and the pin of the TPU compiler.
	$(UV_PROJECT) --python-version 3.11 -o requirements/lock-py311.txt
	$(UV_PROJECT) --python-version 3.12 -o requirements/lock-py312.txt
	echo libtpu | $(UV_COMPILE) - --python-version 3.11 -o requirements/plan.txt

clean: ## Remove .venv and all caches; runs/ stays.
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
