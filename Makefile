# Everything a fresh clone needs: Python 3.11 or 3.12, make and a C compiler.
#
# CPU builds of torch and torchvision come from PyTorch's CPU wheel index (its address is on PyTorch's "Get started" page):
#     make env TORCH_INDEX=<that address>
# Where the package index has only CUDA builds of torchvision, the environment is repaired (tools/repair_torchvision.py).

PYTHON ?= python3
EXTRAS ?= cpu,serve,dev
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help env quickstart test bench-quick lint clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## Create .venv and install sif_ray into it (TORCH_INDEX=..., EXTRAS=gpu,serve,dev)

quickstart: env ## Walk through every stage with tiny models; writes runs/quickstart/report.html
	$(BIN)/python jobs/quickstart.py --config configs/quickstart.yaml

test: env ## Run the default tests (PYTEST_ARGS=... is passed on)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench-quick: env ## Guard the speed of the parts against regressions, in two to three minutes on two cores
	$(BIN)/python jobs/bench.py quick --json runs/bench/quick.json

lint: env ## Check style, and types of method/, records.py and config/
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## Remove the environment and what tools have cached; runs/ stays
	rm -rf $(VENV) build artefacts *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(0 if ok else "sif_ray needs Python 3.11 or 3.12, not " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first, so that nothing after it chooses another build. torchaudio and torchcodec come with vLLM, do not load beside a CPU torch and are not used.
$(STAMP): pyproject.toml constraints.txt tools/repair_torchvision.py | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes and about 4 GB the first time"
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) torch torchvision,torch)
	$(INSTALL) -e ".[$(EXTRAS)]"
	$(if $(findstring cpu,$(EXTRAS)),$(PIP) uninstall -qq -y torchaudio torchcodec)
	$(BIN)/python tools/repair_torchvision.py
	@touch $@
