# Everything a developer or CI types. `make` alone explains itself.
#
# The virtual environment is .venv; farmem is installed in it in editable form, so
# that a change in a Python file needs no build and a change in a C file needs
# `make build`. Several makes at once wait for each other (flock on this folder).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
NATIVE_BUILD := build/native
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
JOBS ?= 2
export PATH := $(PATH):$(CURDIR)/$(BIN)
PYTEST_ARGS ?=

NATIVE_SOURCES := CMakeLists.txt $(shell find native -name '*.[ch]' -o -name CMakeLists.txt -o -name '*.py')

.PHONY: help build demo test lint man bench bench-net budget sim native tsan clean setup-build setup-test

help: ## Show this list
	@echo "farmem: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

build: setup-build $(VENV)/.built ## Install farmem into .venv, ready to run

demo: build ## Run a real program on more data than its budget
	@FARMEM_CONFIG=/dev/null $(BIN)/python tools/demo.py

test: setup-test $(VENV)/.built lint ## Lint, and run every test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.built ## Check style and types (ruff, mypy)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

man: $(VENV)/.built ## Write the man pages in docs/man, from the options and docs/man/parts
	@$(BIN)/python tools/man.py

bench: setup-test $(VENV)/.built ## Measure against everything local and the kernel's swap (ARGS=... passes options)
	@FARMEM_CONFIG=/dev/null $(BIN)/python tools/bench.py $(ARGS)

bench-net: setup-test $(VENV)/.built ## Measure a page from a server on this host beside bare TCP (ARGS=... passes options)
	@FARMEM_CONFIG=/dev/null $(BIN)/python tools/bench_net.py $(ARGS)

budget: setup-test $(VENV)/.built ## Hold real programs against their budgets from outside, and write docs/budget.md
	@rm -f build/budget.json
	@$(BIN)/python -m pytest tests/survive -k "test_same_result or redis" $(PYTEST_ARGS)
	@$(BIN)/python tools/budget_table.py

sim: native ## Run the simulator of the core with fresh seeds (ARGS=... passes options)
	@cmake --build $(NATIVE_BUILD) --target sim -j $(JOBS)
	@$(NATIVE_BUILD)/farmem-sim $(ARGS)

native: setup-build $(VENV)/.built ## Build the C tests (ASan, UBSan) and the simulator in build/native
	@flock . cmake -S . -B $(NATIVE_BUILD) -DFARMEM_TESTS=ON -DFARMEM_PYTHON=OFF -DFARMEM_LIBRARY=OFF >/dev/null
	@flock . cmake --build $(NATIVE_BUILD) --target native_tests sim -j $(JOBS)

tsan: native ## Run the C tests under the thread sanitizer
	@cmake --build $(NATIVE_BUILD) --target tsan -j $(JOBS)
	@for test in $(NATIVE_BUILD)/tsan/test_*; do echo "$$test"; "$$test"; done

clean: ## Remove what was built, .venv included
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

setup-build:
	@tools/setup.sh build

setup-test:
	@tools/setup.sh test

# The tools that build and test, as pyproject.toml names them. cmake and ninja come from PyPI
# where the system has none.
$(VENV)/.tools: pyproject.toml
	@python=$$(tools/setup.sh python); \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV) || { \
		echo "farmem: no virtual environment could be made: install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
	*p["project"]["optional-dependencies"]["test"], sep="\n")' >$(VENV)/requirements.txt
	@for tool in cmake ninja; do command -v $$tool >/dev/null || echo $$tool; done >>$(VENV)/requirements.txt
	@flock . $(PIP) install -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE_SOURCES) $(wildcard docs/man/*.[15]) pyproject.toml
	@flock . $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
