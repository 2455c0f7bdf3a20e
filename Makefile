SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
RANKS ?= 2
MASTER_PORT ?= 29500
OUTPUT ?= demo
# Flags of examples/finetune/main.py, and the launcher: torchrun does as well.
DEMO ?=
LAUNCH ?= colossalai run
# Largest difference between the losses of the ranks and of one process.
BOUND ?= 1e-12

# Each rank is one process on one core; the library's threads would only compete.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo demo-check test test-full test-latest clean

help:
	@echo "make demo         train a small Llama on $(RANKS) processes; results in $(OUTPUT)/"
	@echo "make demo-check   the same run on one process, compared with the one before"
	@echo "make test         lint, types and all tests"
	@echo "make test-full    make test, and checkpoints from every mesh on every mesh"
	@echo "make test-latest  the tests on torch 2.13 with colossalai installed without its pins"
	@echo "make clean        remove environments, caches and results"

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python >= 3.11 is needed, got %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	@touch $@

# `colossalai run` calls torchrun by name, hands its environment over through a shell, where a value that holds $(...)
# is executed, and prints all of it when a run fails.  So .venv comes first in PATH, and only what a run needs goes in.
# It also cuts the output at any byte, so that is ASCII.
HANDED := PATH HOME LANG TERM TMPDIR LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES OMP_NUM_THREADS TOKENIZERS_PARALLELISM \
	PYTHONIOENCODING PYTHONUNBUFFERED FORCE_COLOR COLUMNS
demo: $(VENV)/.installed
	@if [ -t 1 ]; then export FORCE_COLOR=1 COLUMNS="$$(tput cols)"; fi; \
	export PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONIOENCODING=ascii:replace PYTHONUNBUFFERED=1; \
	env -i $(foreach name,$(HANDED),$${$(name)+"$(name)=$$$(name)"}) \
		$(LAUNCH) --nproc_per_node $(RANKS) --master_port $(MASTER_PORT) examples/finetune/main.py --output $(OUTPUT) $(DEMO)

demo-check: $(VENV)/.installed
	$(VENV)/bin/python examples/finetune/main.py --reference --ranks $(RANKS) --output $(OUTPUT)/reference --no-save $(DEMO)
	$(VENV)/bin/python examples/finetune/compare_losses.py --bound $(BOUND) $(OUTPUT)/losses.csv $(OUTPUT)/reference/losses.csv

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

test-full: test
	$(VENV)/bin/python -m pytest -m full

# colossalai pins torch <= 2.5.1, so it is installed without dependencies; what its imports need is listed here.
$(LATEST)/.installed: setup.py
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet torch==2.13.0
	$(LATEST)/bin/pip install --quiet --no-deps 'colossalai>=0.5.0,<0.6'
	$(LATEST)/bin/pip install --quiet torch==2.13.0 'transformers==4.51.3' 'peft>=0.13,<=0.13.2' 'bitsandbytes>=0.50' \
		'galore_torch>=1.0' 'came_pytorch>=0.1.3' 'badam>=1.4' 'diffusers==0.29.0' numpy tqdm psutil packaging rich \
		click fabric contexttimer ninja safetensors einops pydantic ray sentencepiece google protobuf 'rpyc==6.0.0' \
		fastapi uvicorn matplotlib 'tokenizers>=0.21' accelerate hypothesis pytest pytorch_optimizer ruff mypy schedulefree
	$(LATEST)/bin/pip install --quiet --no-deps --editable .
	@touch $@

test-latest: $(LATEST)/.installed
	$(LATEST)/bin/python -m pytest

clean:
	rm -rf $(VENV) $(LATEST) $(OUTPUT) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
