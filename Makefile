# The commands of the README. Everything runs in .venv, made from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test test-all lint benchmarks soak clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/dinoray demo --out demo_out

test: install
	$(BIN)/python tests/lanes.py

test-all: install
	$(BIN)/python tests/lanes.py --all

lint: install
	$(BIN)/ruff check .
	$(BIN)/lint-imports

benchmarks: install
	$(BIN)/python benchmarks/backbone.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/volume.py

soak: install
	$(BIN)/python benchmarks/soak.py

clean:
	rm -rf $(VENV) demo_out build *.egg-info
