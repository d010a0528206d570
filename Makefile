# Everything lives in .venv.  The pins give the versions that the tests ran with; to take the newest
# allowed ones, the index's CUDA build of torch included: make setup CONSTRAINTS=/dev/null
PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
BIN := .venv/bin
STAMP := .venv/.installed

# Threads that wait should sleep: spinning ones starve each other when anything else runs.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev,train]'
	touch $@

demo: setup
	$(BIN)/python -m flashtalk_rt.demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck
	$(BIN)/python -m pytest -q -m 'not alone' -n auto --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest -q -m alone

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo.mp4 demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
