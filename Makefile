# Everything here sets itself up: `make demo` and `make test` work on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint docs notebooks bench sanitize arm clean

demo: $(VENV)/demo-installed  ## train with and without batch normalization; look into demo/
	$(BIN)/batchnorm compare --out $(DEMO)

# The processes share the cores, so threads that wait must not spin.
test: $(VENV)/dev-installed browser  ## all tests, in several processes
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

lint: $(VENV)/dev-installed  ## formatter, linter, type checker
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

notebooks: $(VENV)/dev-installed  ## run the notebooks again, and keep what they print and draw
	$(BIN)/python examples/notebooks/execute.py

docs: $(VENV)/dev-installed  ## the site, into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs

bench: $(VENV)/dev-installed  ## the note's way of training beside ours
	$(BIN)/python benchmarks/lenet.py

sanitize: $(VENV)/dev-installed  ## the kernels' tests with the address and undefined-behaviour sanitizers
	tests/sanitize

arm:  ## the portable kernels on an emulated ARM processor; wants a cross compiler and qemu
	tests/portable/run

KERNELS := CMakeLists.txt $(wildcard src/batchnorm/kernels/cpu/*)

$(VENV)/demo-installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	touch $@

$(VENV)/dev-installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,export,dev]'
	touch $@ $(VENV)/demo-installed

# The page is opened in a real browser and drawn in Chinese: both come from the system's packages.
.PHONY: browser
browser:
	@tests/system-packages

clean:
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
