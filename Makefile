# make demo | test | test-all | integrations | lint | results | audit | gpu | clean.  PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
DEMO_STEPS ?= 1000
# pip's errors are shown, its warnings (a newer pip, a user who is root) are not.
QUIET_INSTALL := install -qq --disable-pip-version-check --root-user-action=ignore \
	--constraint constraints.txt

.PHONY: demo test test-all integrations lint format results audit gpu clean

demo: .venv/installed
	$(BIN)/python train.py -m experiment=demo steps=$(DEMO_STEPS) method=exact
	$(BIN)/python train.py -m experiment=demo steps=$(DEMO_STEPS) method=basis method.rank=32,1
	$(BIN)/python eval.py runs=runs/demo/$(DEMO_STEPS)

test: .venv/installed
	$(BIN)/python -m pytest

# With what is marked slow.
test-all: .venv/installed
	$(BIN)/python -m pytest -m ''

# The library in models and trainers of other packages. They come into .venv too; before that, the
# other targets skip these tests by name.
integrations: .venv/installed
	$(BIN)/python -m pip $(QUIET_INSTALL) --editable ".[integrations]"
	$(BIN)/python -m pytest -m '' tests/integrations

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

# Known vulnerabilities of the versions in constraints.txt, by the advisories of PyPI itself: a mirror
# has none, and then this fails. pip-audit has an environment of its own.
audit:
	$(PYTHON) -m venv .cache/audit
	.cache/audit/bin/python -m pip install -qq --disable-pip-version-check "pip-audit>=2.10,<3"
	.cache/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# On a lent or rented GPU, by the image's own torch. GPU="--minutes 20 --parts paper" chooses.
gpu:
	PYTHON=$(PYTHON) scripts/gpu_session.sh $(GPU)

# The exact versions of constraints.txt. torch alone first: the plain version takes the build for this machine.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv: some minutes, most of them for PyTorch."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip $(QUIET_INSTALL) torch
	$(BIN)/python -m pip $(QUIET_INSTALL) --editable ".[harness,dev,dashboard,experiments,sweeps]"
	touch $@

clean:
	rm -rf .venv .cache runs
