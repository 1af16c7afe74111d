# `make demo` and `make test` do all the set-up on a fresh machine and then their job.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# An index for torch alone: PyTorch's own wheels without CUDA are 4 GB smaller, see the README.
TORCH_INDEX ?=
PIP = $(BIN)/python -m pip install --quiet -c constraints.txt
TORCH = $(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision,@:)

.PHONY: demo test slow lint docs clean

demo: $(VENV)/.installed
	$(BIN)/restore demo -o demo-output

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH)
	$(PIP) -e ".[test,train]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo-output build dist site
