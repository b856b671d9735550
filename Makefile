# Commands for people; each says what it does. `make` alone lists them.

PYTHON_BIN := .venv/bin/python
# No look-up of newer versions: constraints.txt decides.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-slurm test-serving test-gpu lint format typecheck clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## Make or update .venv (PYTHON=/path/to/python3.12 to choose)
	@.ci/make-env

quickstart: env ## Train, distil and benchmark a small model here, about 5 minutes (QUICK=1: under 90 seconds)
	$(PYTHON_BIN) examples/quickstart/run.py

test: env ## Run the tests, two at a time, then those on a Slurm cluster (ARGS="-k losses -x": only these, to pytest)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm and not serving" $(ARGS)
	$(if $(ARGS),,$(PYTHON_BIN) -m pytest tests/slurm -m slurm)

test-slurm: env ## Run only the tests on a Slurm cluster, which they start here (root; packages: slurm/README.md)
	$(PYTHON_BIN) -m pytest tests/slurm -m slurm $(ARGS)

test-serving: env ## Run exports in vLLM on the CPU (.venv-vllm, 3.4 GB, made once; python3.11)
	tests/serving/make-env
	$(PYTHON_BIN) -m pytest tests/serving -m serving $(ARGS)

test-gpu: env ## Run the GPU tests, 10 minutes, and add what they find to docs/gpu-report.md (no network: docs/gpu.md)
	$(PYTHON_BIN) -m pytest tests/gpu -m gpu --gpu-report docs/gpu-report.md $(ARGS)

lint: env ## Check style, formatting and types
	$(PYTHON_BIN) -m ruff check
	$(PYTHON_BIN) -m ruff format --check
	$(PYTHON_BIN) -m pyright

format: env ## Fix style and formatting
	$(PYTHON_BIN) -m ruff check --fix
	$(PYTHON_BIN) -m ruff format

typecheck: env ## Check types only
	$(PYTHON_BIN) -m pyright

clean: ## Delete caches and build output (keeps .venv and runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .venv.old.*
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
