# Two commands do everything on a fresh machine: make demo, make test. Each sets up .venv on first use.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test test-slow bench cuda-check docs lint clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.built ## generate a small data set, train on the CPU, evaluate, and write pictures to output/demo (about 10 minutes)
	$(PY) tools/quickstart.py

test: $(VENV)/.built ## the test suite (a few minutes on two cores)
	$(PY) -m pytest -q -m "not slow"

test-slow: $(VENV)/.built ## the tests that take longer
	$(PY) -m pytest -q -m slow

bench: $(VENV)/.built ## the ops and the detector against Detectron2, torchvision and torch.compile, into output/bench (minutes)
	$(PY) benchmarks/ops.py
	$(PY) benchmarks/detector.py

cuda-check: $(VENV)/.installed ## compile the CUDA kernels for every architecture, with or without a GPU or a CUDA toolkit
	$(PY) dev/cuda_check.py

docs: $(VENV)/.docs ## the documentation as HTML, into output/docs; a warning is an error
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -b html docs output/docs
	@echo "Open output/docs/index.html"

lint: $(VENV)/.installed ## ruff and clang-format over everything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(SOURCES))

clean: ## remove what was built, .venv included
	rm -rf $(VENV) build gs_d2.egg-info gs_d2/*.so output .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Set-up, in three steps that are redone only when what they depend on changes.
$(VENV)/.created: dev/preflight.py
	@$(PYTHON) dev/preflight.py
	@echo "Setting up $(VENV): torch and the rest take 5 GB and some minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created constraints.txt tools/install_detectron2.py
	@$(PIP) setuptools wheel ninja torch torchvision numpy scipy h5py matplotlib tqdm safetensors \
		pytest hypothesis ruff clang-format onnx onnxruntime onnxscript
	@$(PIP) --no-deps timm
	@$(PY) tools/install_detectron2.py
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "Building gs_d2._C"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.docs: $(VENV)/.built
	@$(PIP) sphinx myst-parser furo
	@touch $@
