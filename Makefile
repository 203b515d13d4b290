# Every target does its own set-up. PYTHON picks the interpreter (3.11 or 3.12), VENV the virtual environment.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) >/dev/null 2>&1 && $(name) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $(name))))
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
# Machines with a GPU bring a torch of their own; it is used as it is.
GPU_PYTHON ?= python3

.PHONY: help setup serve test test-all tools check arm-check gpu-check gpu-bench docs gpu-emulate image image-test unit-test clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'

NATIVE := setup.py $(wildcard service/kernels/native/*.c service/kernels/native/*.h)

$(VENV)/.serve: pyproject.toml constraints.txt $(NATIVE)
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 is needed; name one with PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || { echo "setup: creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing what serving needs (the first time takes a minute or two)"
	@$(INSTALL) --editable '.[torch,onnx]'
	@ls service/kernels/native/_native.*.* >/dev/null 2>&1 || echo "setup: the compiled CPU kernels were not built (is there a C compiler?); torch computes alone"
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	@echo "setup: installing what the tests need"
	@$(INSTALL) --editable '.[torch,train,dev]'
	@touch $@

setup: $(VENV)/.test ## create the virtual environment with everything in it

serve: $(VENV)/.serve ## serve the bundled model on http://127.0.0.1:8000 (flags: ARGS="--port 9000")
	@$(BIN)/deepseek-serve $(ARGS)

test: $(VENV)/.test ## run the tests, in two processes (ARGS="-n 0" for one)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.test ## run the tests, the slow ones too
	@$(MAKE) --no-print-directory tools || echo "test-all: what needs Prometheus is skipped"
	@$(BIN)/python -m pytest $(ARGS)

tools: ## unpack Debian's Prometheus and promtool into .tools, for the tests of deploy/
	@test -x .tools/usr/bin/promtool || deploy/fetch.sh prometheus

check: $(VENV)/.test ## lint, types, import contracts, and the measures of the code
	@$(BIN)/ruff check service tests loadtests docker deploy
	@$(BIN)/ruff format --check service tests loadtests docker deploy
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config importlinter.ini
	@$(BIN)/python -m tests.house.measures

arm-check: $(VENV)/.test ## run the compiled kernels' tests for aarch64 under emulation (apt-get install gcc-aarch64-linux-gnu qemu-user-static)
	@tests/kernels/arm64.sh $(ARGS)

gpu-check: ## run the kernels' tests on the GPU; GPU_PYTHON needs torch, triton, numpy, pytest and hypothesis; with what serving needs (and transformers) the engine runs there too
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make: $(GPU_PYTHON) finds no CUDA device; name an interpreter whose torch does with GPU_PYTHON="; exit 2; }
	@$(GPU_PYTHON) -m pytest -p no:cacheprovider -m "not slow" tests/kernels/gpu tests/kernels/test_dispatch.py tests/test_graph_parity.py tests/test_gpu_engine.py $(ARGS)

SM ?= 90
gpu-emulate: $(VENV)/.test ## compile the kernels for a GPU (SM=80, 87 or 90) and run their tests on what was compiled, without the GPU
	@EMULATE_SM=$(SM) $(BIN)/python -m pytest -n 2 -m "not slow" tests/kernels/gpu tests/test_graph_parity.py tests/test_gpu_engine.py --deselect tests/kernels/gpu/test_compile_gate.py $(ARGS)

gpu-bench: ## speed of the kernels and of serving on the GPU beside limits and peers, rows in loadtests/results (needs torch, triton and numpy in GPU_PYTHON; serving also msgspec and prometheus_client)
	@$(GPU_PYTHON) -m loadtests.gpu_bench --keep $(ARGS)

docs: $(VENV)/.test ## write docs/cli.md and the other files that are made from a definition
	@$(BIN)/python -m service.cli.docs
	@$(BIN)/python deploy/kubernetes/generate_rules.py

IMAGE ?= localhost/deepseek-service:cpu

image: ## build the cpu image with buildah (BASE=, WHEELS= or TORCH_INDEX= for torch's CPU build, KIND=gpu for another)
	@TAG=$(if $(KIND),localhost/deepseek-service:$(KIND),$(IMAGE)) docker/image.sh $(or $(KIND),cpu)

image-test: ## run the built cpu image and try what its users rely on (root, buildah, python3)
	@IMAGE=$(IMAGE) python3 docker/image_test.py

unit-test: ## boot a Debian whose systemd runs the unit over the built cpu image (root, buildah, systemd-container)
	@IMAGE=$(IMAGE) python3 deploy/systemd/boot_test.py

clean: ## remove the virtual environment and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info .tools service/kernels/native/*.so
