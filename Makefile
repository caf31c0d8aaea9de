# make demo    sets up, serves the demo model, fine-tunes it through the OpenAI SDK and shows it before and after
# make test    sets up, and passes the tests
# make help    lists the rest
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PORT ?= 8000
DATA ?= data
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo serve stop test vllm test-vllm check format lint conformance parity bench-gateway bench-llama
.PHONY: bench-rendering bench-reading bench-listing bench-trainer soak clean clean-venv

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(READY) ## make .venv with everything in it (about 6 minutes the first time on a machine, then a minute)

$(READY): pyproject.toml constraints.txt deploy/setup_venv.py
	@$(PYTHON) deploy/setup_venv.py $(VENV)
	@touch $@

demo: $(READY) ## serve the demo model, fine-tune it and compare; the server stays up
	@$(BIN)/python -m clients.demo --port $(PORT) --data $(DATA)

serve: $(READY) ## serve the demo model in the foreground
	@$(BIN)/tunegate serve --port $(PORT) --data $(DATA)

stop: ## stop the server that `make demo` left running
	@$(BIN)/python -m clients.demo --stop --data $(DATA)

test: $(READY) ## run the tests
	@$(BIN)/pytest --cov --cov-report= --ignore=tests/vllm

vllm: ## set vLLM's CPU build up in an environment of its own, for test-vllm (2 to 4 minutes the first time on a machine)
	@$(PYTHON) deploy/setup_vllm.py

test-vllm: $(READY) vllm ## run what needs real vLLM (about 7 minutes on 2 cores)
	@$(BIN)/pytest tests/vllm

check: format lint test ## format, lint, types, tests: what a change must pass

format: $(READY) ## rewrite the code as ruff formats it
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix-only .

lint: $(READY) ## format, lint and types, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

conformance: $(READY) ## openai-python's own tests and real programs against a gateway (CONFORMANCE="--sdk chat" for a part)
	@$(BIN)/python -m tests.conformance $(CONFORMANCE)

parity: $(READY) ## every template with every tokenizer, id for id beside transformers, FastChat and llama.cpp
	@$(BIN)/python -m tests.parity

bench-gateway: $(READY) ## the gateway beside vllm-router, LiteLLM and the direct line
	@$(BIN)/python -m tests.bench.gateway_lanes

bench-rendering: $(READY) ## what rendering 8k tokens costs, and the next turn of a long chat
	@$(BIN)/python -m tests.bench.rendering

bench-llama: $(READY) ## the llama worker beside llama-server and llama-cpp-python's server (BENCH="--quick" for two minutes)
	@$(BIN)/python -m tests.bench.llama_worker $(BENCH)

bench-trainer: $(READY) ## the trainer beside plain TRL, and a job's phases, warm and cold (BENCH="--quick" for two minutes)
	@$(BIN)/python -m tests.bench.trainer $(BENCH)

bench-reading: $(READY) ## a training file of 1 GB checked: how fast, and whether memory grows with it (many minutes)
	@$(BIN)/python -m tests.bench.reading $(BENCH)

bench-listing: $(READY) ## a page of a list, in a store of 100 and in one of 10,000 jobs and 100,000 events
	@$(BIN)/python -m tests.bench.listing

soak: $(READY) ## kill a job's trainer and its gateway a hundred times, and compare the bytes (SOAK="--kills 20" for a part)
	@$(BIN)/python -m tests.soak $(SOAK)

clean: ## remove what tests and tools leave behind (not .venv, not data)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv: ## remove .venv
	@rm -rf $(VENV)
