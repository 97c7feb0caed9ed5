# make demo | test | test-all | lint | results | clean.  PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
DEMO_STEPS ?= 1000

.PHONY: demo test test-all lint format results clean

demo: .venv/installed
	$(BIN)/python train.py -m experiment=demo steps=$(DEMO_STEPS) method=exact
	$(BIN)/python train.py -m experiment=demo steps=$(DEMO_STEPS) method=basis method.rank=32,1
	$(BIN)/python eval.py runs=runs/demo/$(DEMO_STEPS)

test: .venv/installed
	$(BIN)/python -m pytest

# With what is marked slow.
test-all: .venv/installed
	$(BIN)/python -m pytest -m ''

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tables and figures of results/, rebuilt into runs/results and compared with what is committed.
results: .venv/installed
	$(BIN)/python scripts/results.py

# The exact versions of constraints.txt. torch alone first: the plain version takes the build for this machine.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[harness,dev,dashboard,experiments]"
	touch $@

# Tables and figures of results/ again, from what is kept there.
results: .venv/installed
	$(BIN)/python scripts/results.py

clean:
	rm -rf .venv .cache runs
